/*
 * Processes are SIGKILLed at random moments of single operations with SEM_UNDO, which an
 * implementation may well do without a system call: each must have been done and owed, or neither.
 *
 * Every rank forks pairs of workers that take and give tokens as fast as they can, of a set that
 * the rank has for itself and of one that all ranks share, and kills them. Whenever both workers
 * of a rank are reaped, the rank's set is as it was; at the end the shared one is, too.
 */
#include "common.h"

#include <stdio.h>
#include <unistd.h>

/* So many tokens that none of the workers comes to the end of them, where undo is cut off. */
enum { SEMAPHORES = 3, TOKENS = SEMAPHORE_MAX / 2, WORKERS = 2 };

static long rounds = 200, longest_life_us = 1000;

static void operate(int set, int index, short change)
{
    struct sembuf operation = {(unsigned short)index, change, SEM_UNDO | IPC_NOWAIT};
    while (semop(set, &operation, 1) < 0) {
        if (errno == EAGAIN)
            return;
        if (errno != EINTR)
            die_errno("semop %+d", change);
    }
}

_Noreturn static void work(int own, int shared, uint64_t random)
{
    for (;;) {
        int index = (int)random_below(&random, SEMAPHORES);
        short change = random_below(&random, 2) ? -1 : 1;
        operate(random_below(&random, 64) ? own : shared, index, change);
    }
}

static void expect_tokens(int set, const char *when)
{
    unsigned short values[SEMAPHORES];
    must(semctl(set, 0, GETALL, (union semun){.array = values}));
    for (int index = 0; index < SEMAPHORES; index++)
        expect(values[index] == TOKENS, "semaphore %d is %d instead of %d %s", index,
               values[index], TOKENS, when);
}

static bool is_complete(void *set)
{
    for (int index = 0; index < SEMAPHORES; index++)
        if (semaphore_value(*(int *)set, index) != TOKENS)
            return false;
    return true;
}

static void fill(int set)
{
    for (int index = 0; index < SEMAPHORES; index++)
        semaphore_set(set, index, TOKENS);
}

static void run(struct team *team)
{
    int shared = team_semaphores(team, 0, SEMAPHORES);
    if (team->rank == 0)
        fill(shared);
    int own = must(semget(IPC_PRIVATE, SEMAPHORES, 0600));
    fill(own);
    team_barrier(team);

    uint64_t random = (uint64_t)team->rank;
    for (long round = 0; round < rounds; round++) {
        pid_t workers[WORKERS];
        for (int worker = 0; worker < WORKERS; worker++) {
            uint64_t seed = random_next(&random);
            workers[worker] = fork_watched();
            if (workers[worker] == 0)
                work(own, shared, seed);
        }
        for (int worker = 0; worker < WORKERS; worker++) {
            spin_for((double)random_below(&random, (uint64_t)longest_life_us + 1) * 1e-6);
            kill_child(workers[worker]);
        }
        expect_tokens(own, "after both workers were reaped");
    }
    must(semctl(own, 0, IPC_RMID));
    team_barrier(team);

    if (team->rank == 0) {
        expect(eventually(1, is_complete, &shared), "tokens are missing 1 s after the last death");
        printf("%ld workers killed, every token back\n", rounds * team->ranks * WORKERS);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "pairs of workers killed by each rank", .number = &rounds},
        {.name = "life", .meaning = "longest life of a worker, microseconds",
         .number = &longest_life_us},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Single operations with SEM_UNDO against SIGKILL.", 2, 1,
                                       settings, run});
}
