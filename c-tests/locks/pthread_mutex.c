/*
 * A process-shared pthread mutex and condition variable in a segment. They sleep in futexes, which
 * are a host's own: this program is for the ranks of one node. (Between nodes, objects that spin
 * and System V semaphores work.)
 *
 * First the ranks fight for the mutex, then they pass a turn around a ring with the condition.
 */
#include "contend.h"

#include <pthread.h>
#include <stdio.h>

enum { LAPS = 500 };

struct monitor {
    pthread_mutex_t mutex;
    pthread_cond_t turn_changed;
    long turn; /* whose turn it is: turn % ranks */
};

static void check(int error, const char *what)
{
    errno = error;
    if (error)
        die_errno("%s", what);
}

static void create(void *state)
{
    struct monitor *monitor = state;
    pthread_mutexattr_t mutex;
    check(pthread_mutexattr_init(&mutex), "pthread_mutexattr_init");
    check(pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED), "setpshared");
    check(pthread_mutex_init(&monitor->mutex, &mutex), "pthread_mutex_init");
    pthread_condattr_t condition;
    check(pthread_condattr_init(&condition), "pthread_condattr_init");
    check(pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED), "setpshared");
    check(pthread_cond_init(&monitor->turn_changed, &condition), "pthread_cond_init");
}

static void acquire(void *state, int rank)
{
    (void)rank;
    check(pthread_mutex_lock(&((struct monitor *)state)->mutex), "pthread_mutex_lock");
}

static void release(void *state, int rank)
{
    (void)rank;
    check(pthread_mutex_unlock(&((struct monitor *)state)->mutex), "pthread_mutex_unlock");
}

static void run(struct team *team)
{
    struct monitor *monitor =
        contend(team, &(struct lock){sizeof(struct monitor), create, acquire, release});
    for (int lap = 0; lap < LAPS; lap++) {
        acquire(monitor, team->rank);
        while (monitor->turn % team->ranks != team->rank)
            check(pthread_cond_wait(&monitor->turn_changed, &monitor->mutex), "pthread_cond_wait");
        monitor->turn++;
        check(pthread_cond_broadcast(&monitor->turn_changed), "pthread_cond_broadcast");
        release(monitor, team->rank);
    }
    team_barrier(team);
    expect(monitor->turn == (long)LAPS * team->ranks, "the turn was passed %ld times, not %ld",
           monitor->turn, (long)LAPS * team->ranks);
    if (team->rank == 0)
        printf("turn passed %ld times around %d ranks\n", monitor->turn, team->ranks);
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"A process-shared pthread mutex and condition (one node).",
                                       4, 1, contend_settings, run});
}
