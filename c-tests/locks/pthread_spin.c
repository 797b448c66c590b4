/*
 * A pthread_spinlock_t, PTHREAD_PROCESS_SHARED, in a segment. It only spins, so it needs nothing
 * but coherent memory and works between nodes.
 */
#include "contend.h"

#include <pthread.h>

static void check(int error, const char *what)
{
    errno = error;
    if (error)
        die_errno("%s", what);
}

static void create(void *state)
{
    check(pthread_spin_init(state, PTHREAD_PROCESS_SHARED), "pthread_spin_init");
}

static void acquire(void *state, int rank)
{
    (void)rank;
    check(pthread_spin_lock(state), "pthread_spin_lock");
}

static void release(void *state, int rank)
{
    (void)rank;
    check(pthread_spin_unlock(state), "pthread_spin_unlock");
}

static void run(struct team *team)
{
    contend(team, &(struct lock){sizeof(pthread_spinlock_t), create, acquire, release});
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"A process-shared pthread spinlock.", 4, 1,
                                       contend_settings, run});
}
