/*
 * Processes are SIGKILLed at random points of a loop of attach, touch, lock, unlock, detach.
 *
 * Each rank kills children of its own. After each death the segment that only this family uses must
 * be back at its number of attaches within a second; the lock that all families share must still
 * work, and the counter that the survivors keep under it is exact at the end.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>

static long rounds = 100, longest_life_us = 2000;

struct shared {
    _Alignas(PAGE) volatile long by_survivors; /* under the lock */
    _Alignas(PAGE) atomic_long by_victims;
};

static _Noreturn void be_a_victim(int own_segment, int shared_segment, int lock)
{
    for (;;) {
        volatile long *own = attach(own_segment);
        struct shared *shared = attach(shared_segment);
        own[0]++;
        semaphore_change(lock, 0, -1, SEM_UNDO);
        atomic_fetch_add(&shared->by_victims, 1);
        semaphore_change(lock, 0, 1, SEM_UNDO);
        detach((void *)own);
        own = attach(own_segment);
        detach(shared);
        detach((void *)own);
    }
}

static bool is_free(void *lock)
{
    return semaphore_value(*(int *)lock, 0) == 1;
}

static void run(struct team *team)
{
    int shared_segment = team_segment_id(team, 0, sizeof(struct shared));
    struct shared *shared = attach(shared_segment);
    int lock = team_semaphores(team, 0, 1);
    if (team->rank == 0)
        semaphore_set(lock, 0, 1);
    int own_segment = (int)must(shmget(IPC_PRIVATE, PAGE, 0600));
    volatile long *own = attach(own_segment);
    team_barrier(team);

    uint64_t random = (uint64_t)team->rank;
    for (long round = 0; round < rounds; round++) {
        pid_t victim = fork_watched();
        if (victim == 0)
            be_a_victim(own_segment, shared_segment, lock);
        spin_for((double)random_below(&random, (uint64_t)longest_life_us + 1) * 1e-6);
        kill_child(victim);
        expect_attach_count(own_segment, 1, "SIGKILL");
        semaphore_change(lock, 0, -1, SEM_UNDO);
        shared->by_survivors = shared->by_survivors + 1;
        semaphore_change(lock, 0, 1, SEM_UNDO);
    }
    team_barrier(team);
    expect(shared->by_survivors == rounds * team->ranks, "the survivors counted %ld, not %ld",
           shared->by_survivors, rounds * team->ranks);
    expect_attach_count(shared_segment, team->ranks, "the last SIGKILL");
    expect(eventually(1, is_free, &lock), "the lock is at %d 1 s after the last death",
           semaphore_value(lock, 0));
    detach((void *)own);
    must(shmctl(own_segment, IPC_RMID, NULL));
    if (team->rank == 0)
        printf("%ld processes killed (after %ld turns in all), %ld additions by survivors: exact\n",
               rounds * team->ranks, atomic_load(&shared->by_victims), shared->by_survivors);
    team_barrier(team);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "processes killed by each rank", .number = &rounds},
        {.name = "life", .meaning = "longest life, microseconds", .number = &longest_life_us},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"nattch and locks against SIGKILL at random points.", 4, 1,
                                       settings, run});
}
