/*
 * Dining philosophers with multi-operation semop: both forks are taken at once or not at all, so
 * nobody deadlocks.
 *
 * Rank r is philosopher r; forks lie between neighbours, one semaphore each. The segment says who
 * holds each fork, and nobody else may. And as forks are taken and laid down in pairs, any snapshot
 * of all semaphores (GETALL) shows an even number of them taken.
 */
#include "common.h"

#include <stdio.h>

static long meals = 2000;

struct fork_holder {
    _Alignas(PAGE) volatile int philosopher; /* rank + 1; 0 while it lies on the table */
};

struct table {
    struct fork_holder forks[MAX_RANKS];
    _Alignas(PAGE) volatile long eaten[MAX_RANKS];
};

static void change_forks(int set, int left, int right, short direction)
{
    struct sembuf operations[] = {
        {(unsigned short)left, direction, 0},
        {(unsigned short)right, direction, 0},
    };
    while (semop(set, operations, 2) < 0)
        if (errno != EINTR)
            die_errno("semop, forks %+d", direction);
}

static void expect_pairs(int set, int forks)
{
    unsigned short values[MAX_RANKS];
    must(semctl(set, 0, GETALL, (union semun){.array = values}));
    int taken = forks;
    for (int k = 0; k < forks; k++)
        taken -= values[k];
    expect(taken % 2 == 0, "%d of %d forks are taken: a pair is torn", taken, forks);
}

static void run(struct team *team)
{
    struct table *table = team_segment(team, 0, sizeof *table);
    int set = team_semaphores(team, 0, team->ranks);
    if (team->rank == 0) {
        unsigned short ones[MAX_RANKS];
        for (int k = 0; k < team->ranks; k++)
            ones[k] = 1;
        must(semctl(set, 0, SETALL, (union semun){.array = ones}));
    }
    team_barrier(team);

    int self = team->rank + 1, forks[2] = {team->rank, (team->rank + 1) % team->ranks};
    double start = now();
    for (long meal = 0; meal < meals; meal++) {
        change_forks(set, forks[0], forks[1], -1);
        for (int k = 0; k < 2; k++) {
            expect(table->forks[forks[k]].philosopher == 0, "fork %d is still held by rank %d",
                   forks[k], table->forks[forks[k]].philosopher - 1);
            table->forks[forks[k]].philosopher = self;
        }
        table->eaten[team->rank]++;
        expect_pairs(set, team->ranks);
        for (int k = 0; k < 2; k++) {
            expect(table->forks[forks[k]].philosopher == self, "fork %d was taken by rank %d",
                   forks[k], table->forks[forks[k]].philosopher - 1);
            table->forks[forks[k]].philosopher = 0;
        }
        change_forks(set, forks[0], forks[1], 1);
    }
    team_barrier(team);
    for (int rank = 0; rank < team->ranks; rank++) {
        expect(table->eaten[rank] == meals, "rank %d ate %ld times", rank, table->eaten[rank]);
        expect(semaphore_value(set, rank) == 1, "fork %d ended at %d", rank,
               semaphore_value(set, rank));
    }
    if (team->rank == 0)
        printf("%d philosophers ate %ld meals each, %.0f meals/s\n", team->ranks, meals,
               (double)(meals * team->ranks) / (now() - start));
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "meals of each philosopher", .number = &meals},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Dining philosophers with multi-operation semop.", 5, 2,
                                       settings, run});
}
