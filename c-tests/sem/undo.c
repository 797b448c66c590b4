/*
 * Holders of a lock are SIGKILLed at random moments, again and again; SEM_UNDO must release it.
 *
 * Every rank forks a worker that updates shared counters under the lock in a loop, kills it at a
 * random moment, does one update itself, and repeats. A worker may die between any two
 * instructions, so the update is journalled: whoever gets the lock next completes what it finds
 * half done. At the end the semaphores are back at their first values and the counters agree.
 *
 * The lock is two semaphores changed by one semop: the mutex (1 when free) and the number of
 * holders (0 when free); undo must restore both.
 */
#include "common.h"

#include <stdio.h>
#include <unistd.h>

enum { MUTEX, HOLDERS, SEMAPHORES };

static long rounds = 100, longest_life_us = 1500;

struct ledger {
    _Alignas(PAGE) volatile long total;
    _Alignas(PAGE) volatile long by_rank[MAX_RANKS];
    _Alignas(PAGE) struct {
        volatile bool active; /* the three fields below describe an update not yet complete */
        volatile int rank;
        volatile long total, by_rank; /* the values to be stored */
    } journal;
    volatile int holder; /* rank + 1 */
    volatile long recoveries;
};

static void change_lock(int set, short direction)
{
    struct sembuf operations[] = {
        {MUTEX, direction, SEM_UNDO},
        {HOLDERS, (short)-direction, SEM_UNDO},
    };
    while (semop(set, operations, 2) < 0)
        if (errno != EINTR)
            die_errno("semop, lock %+d", direction);
}

/* Time to be killed in. */
static void dawdle(void)
{
    for (volatile int turns = 0; turns < 500; turns++)
        ;
}

/* Idempotent: dying in the middle and being redone by the next holder gives the same result. */
static void complete(struct ledger *ledger)
{
    dawdle();
    ledger->total = ledger->journal.total;
    dawdle();
    ledger->by_rank[ledger->journal.rank] = ledger->journal.by_rank;
    ledger->journal.active = false;
}

static void update(struct ledger *ledger, int set, int rank)
{
    change_lock(set, -1);
    ledger->holder = rank + 1;
    if (ledger->journal.active) {
        complete(ledger);
        ledger->recoveries++;
    }
    ledger->journal.rank = rank;
    ledger->journal.total = ledger->total + 1;
    ledger->journal.by_rank = ledger->by_rank[rank] + 1;
    ledger->journal.active = true;
    complete(ledger);
    expect(ledger->holder == rank + 1, "two holders: ranks %d and %d", rank, ledger->holder - 1);
    change_lock(set, 1);
}

static bool is_free(void *set)
{
    unsigned short values[SEMAPHORES];
    must(semctl(*(int *)set, 0, GETALL, (union semun){.array = values}));
    return values[MUTEX] == 1 && values[HOLDERS] == 0;
}

static void run(struct team *team)
{
    struct ledger *ledger = team_segment(team, 0, sizeof *ledger);
    int set = team_semaphores(team, 0, SEMAPHORES);
    if (team->rank == 0)
        semaphore_set(set, MUTEX, 1);
    team_barrier(team);

    uint64_t random = (uint64_t)team->rank;
    double longest = 0;
    for (long round = 0; round < rounds; round++) {
        pid_t worker = fork_watched();
        if (worker == 0)
            for (;;)
                update(ledger, set, team->rank);
        spin_for((double)random_below(&random, (uint64_t)longest_life_us + 1) * 1e-6);
        kill_child(worker);
        double start = now();
        update(ledger, set, team->rank);
        if (now() - start > longest)
            longest = now() - start;
    }
    team_barrier(team);

    if (team->rank == 0) {
        expect(eventually(1, is_free, &set), "the lock is not free 1 s after the last death");
        long sum = 0;
        for (int rank = 0; rank < team->ranks; rank++) {
            expect(ledger->by_rank[rank] >= rounds, "rank %d made only %ld updates", rank,
                   ledger->by_rank[rank]);
            sum += ledger->by_rank[rank];
        }
        expect(!ledger->journal.active, "an update is still half done");
        expect(ledger->total == sum, "the total is %ld, the sum %ld", ledger->total, sum);
        printf("%ld workers killed, %ld half-done updates completed by others, %ld updates, "
               "all accounted for; longest wait of rank 0: %.3f ms\n",
               rounds * team->ranks, ledger->recoveries, sum, longest * 1e3);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "workers killed by each rank", .number = &rounds},
        {.name = "life", .meaning = "longest life of a worker, microseconds",
         .number = &longest_life_us},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"SEM_UNDO against SIGKILL at random moments.", 4, 1,
                                       settings, run});
}
