/*
 * A ticket lock: take a number, wait until it is called. Fair by construction, and no semaphore:
 * only the coherence of two words of shared memory makes it right.
 */
#include "contend.h"

#include <stdatomic.h>

struct ticket_lock {
    _Alignas(PAGE) atomic_uint next;
    _Alignas(PAGE) atomic_uint serving;
};

static void acquire(void *state, int rank)
{
    (void)rank;
    struct ticket_lock *lock = state;
    unsigned ticket = atomic_fetch_add(&lock->next, 1), turns = 0;
    while (atomic_load_explicit(&lock->serving, memory_order_acquire) != ticket)
        spin_wait(&turns);
}

static void release(void *state, int rank)
{
    (void)rank;
    struct ticket_lock *lock = state;
    unsigned serving = atomic_load_explicit(&lock->serving, memory_order_relaxed);
    atomic_store_explicit(&lock->serving, serving + 1, memory_order_release);
}

static void run(struct team *team)
{
    contend(team, &(struct lock){sizeof(struct ticket_lock), NULL, acquire, release});
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"A ticket lock in shared memory.", 4, 1, contend_settings,
                                       run});
}
