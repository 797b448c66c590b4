/*
 * Waiting for zero, in its two classic uses.
 *
 * A starting gate: the gate stands at 1, everybody waits for zero, rank 0 counts the waiters with
 * GETZCNT and opens only when all are there; nobody may have passed before.
 * A lock by a two-operation semop: wait for zero and increment, at once. Free is 0, held is 1.
 */
#include "common.h"

#include <stdio.h>

enum { GATE, LOCK, SEMAPHORES };

static const double HOLD_SECONDS = 50e-6; /* long enough for others to be waiting */

static long rounds = 200;

struct shared {
    struct {
        _Alignas(PAGE) volatile long passed; /* gates that the rank has passed */
    } ranks[MAX_RANKS];
    _Alignas(PAGE) volatile long counter;
};

struct waiters {
    int set, count;
};

static bool all_wait(void *argument)
{
    struct waiters *waiters = argument;
    return must(semctl(waiters->set, GATE, GETZCNT)) == waiters->count;
}

static void lock(int set)
{
    struct sembuf operations[] = {{LOCK, 0, 0}, {LOCK, 1, SEM_UNDO}};
    while (semop(set, operations, 2) < 0)
        if (errno != EINTR)
            die_errno("semop, wait for zero and increment");
}

static void run(struct team *team)
{
    struct shared *shared = team_segment(team, 0, sizeof *shared);
    int set = team_semaphores(team, 0, SEMAPHORES);

    for (long round = 0; round < rounds; round++) {
        if (team->rank == 0)
            semaphore_set(set, GATE, 1);
        team_barrier(team);
        if (team->rank == 0) {
            struct waiters waiters = {set, team->ranks - 1};
            expect(eventually(20, all_wait, &waiters), "only %ld of %d ranks wait at the gate",
                   must(semctl(set, GATE, GETZCNT)), waiters.count);
            for (int rank = 0; rank < team->ranks; rank++)
                expect(shared->ranks[rank].passed == round, "rank %d passed a closed gate", rank);
            semaphore_change(set, GATE, -1, 0);
        } else {
            semaphore_change(set, GATE, 0, 0);
        }
        shared->ranks[team->rank].passed++;

        lock(set);
        long before = shared->counter;
        spin_for(HOLD_SECONDS);
        shared->counter = before + 1;
        expect(semaphore_value(set, LOCK) == 1, "the held lock is at %d",
               semaphore_value(set, LOCK));
        semaphore_change(set, LOCK, -1, SEM_UNDO);
        team_barrier(team);
    }
    expect(shared->counter == rounds * team->ranks, "the counter is %ld, not %ld", shared->counter,
           rounds * team->ranks);
    if (team->rank == 0)
        printf("%ld gates passed together by %d ranks, %ld locked increments\n", rounds,
               team->ranks, shared->counter);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "gates to pass", .number = &rounds},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A barrier and a lock by wait-for-zero.", 4, 1, settings,
                                       run});
}
