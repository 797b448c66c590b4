/*
 * An MCS lock (Mellor-Crummey and Scott): waiters form a linked list and each spins on its own
 * page. Processes attach the segment at different addresses, so a link is not a pointer but the
 * index of a node, plus one; zero means none.
 */
#include "contend.h"

#include <stdatomic.h>

struct waiter {
    _Alignas(PAGE) atomic_int next;
    atomic_bool granted;
};

struct mcs_lock {
    _Alignas(PAGE) atomic_int tail;
    struct waiter waiters[MAX_RANKS];
};

static void acquire(void *state, int rank)
{
    struct mcs_lock *lock = state;
    struct waiter *self = &lock->waiters[rank];
    atomic_store(&self->next, 0);
    atomic_store(&self->granted, false);
    int before = atomic_exchange(&lock->tail, rank + 1);
    if (before == 0)
        return;
    atomic_store(&lock->waiters[before - 1].next, rank + 1);
    unsigned turns = 0;
    while (!atomic_load(&self->granted))
        spin_wait(&turns);
}

static void release(void *state, int rank)
{
    struct mcs_lock *lock = state;
    struct waiter *self = &lock->waiters[rank];
    int next = atomic_load(&self->next);
    if (next == 0) {
        int expected = rank + 1;
        if (atomic_compare_exchange_strong(&lock->tail, &expected, 0))
            return;
        unsigned turns = 0; /* somebody has swapped the tail but not linked itself yet */
        while ((next = atomic_load(&self->next)) == 0)
            spin_wait(&turns);
    }
    atomic_store(&lock->waiters[next - 1].granted, true);
}

static void run(struct team *team)
{
    contend(team, &(struct lock){sizeof(struct mcs_lock), NULL, acquire, release});
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"An MCS queue lock linked by offsets.", 4, 1,
                                       contend_settings, run});
}
