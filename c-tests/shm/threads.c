/*
 * Threads inside each process: atomics on shared pages, semaphore locks, attaches of their own.
 *
 * All threads of all ranks add to the same counters, and the totals are exact. A thread that exits
 * holding a SEM_UNDO adjustment does not undo it: the adjustment is the process's, and is undone
 * when the process ends.
 */
#include "common.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

enum { PAGES = 8, MAX_THREADS = 64, LOCK = 0, TOKENS, SEMAPHORES };

static long threads = 4, ops = 2000;

struct shared {
    struct {
        _Alignas(PAGE) atomic_long added;
        volatile long locked;
    } pages[PAGES];
};

static int segment, set;
static struct shared *shared;

static void *hammer(void *argument)
{
    uint64_t random = (uintptr_t)argument;
    struct shared *own = attach(segment);
    for (long k = 0; k < ops; k++) {
        uint64_t page = random_below(&random, PAGES);
        atomic_fetch_add(&shared->pages[page].added, 1);
        if (k % 4 == 0) {
            semaphore_change(set, LOCK, -1, SEM_UNDO);
            own->pages[page].locked = own->pages[page].locked + 1;
            semaphore_change(set, LOCK, 1, SEM_UNDO);
        }
        if (k % 64 == 0) {
            detach(own);
            own = attach(segment);
        }
    }
    detach(own);
    return NULL;
}

static void start(pthread_t *thread, void *(*body)(void *), void *argument)
{
    errno = pthread_create(thread, NULL, body, argument);
    if (errno)
        die_errno("pthread_create");
}

static void join(pthread_t thread)
{
    errno = pthread_join(thread, NULL);
    if (errno)
        die_errno("pthread_join");
}

static void *give_a_token(void *argument)
{
    semaphore_change(set, TOKENS, 1, SEM_UNDO);
    return argument;
}

static bool no_tokens(void *argument)
{
    (void)argument;
    return semaphore_value(set, TOKENS) == 0;
}

/* A child process has a thread give a token; the token outlives the thread but not the process. */
static void undo_is_the_process_s(void)
{
    pid_t child = fork_watched();
    if (child == 0) {
        pthread_t thread;
        start(&thread, give_a_token, NULL);
        join(thread);
        _exit(semaphore_value(set, TOKENS) != 1);
    }
    expect_success(child, "the process whose thread gave a token and ended (token undone?)");
    expect(eventually(1, no_tokens, NULL), "the token outlived its process");
}

static void run(struct team *team)
{
    expect(threads > 0 && threads <= MAX_THREADS, "--threads is 1 to %d", MAX_THREADS);
    segment = team_segment_id(team, 0, sizeof *shared);
    shared = attach(segment);
    set = team_semaphores(team, 0, SEMAPHORES);
    if (team->rank == 0) {
        undo_is_the_process_s();
        semaphore_set(set, LOCK, 1);
    }
    team_barrier(team);

    pthread_t ids[MAX_THREADS];
    for (long k = 0; k < threads; k++)
        start(&ids[k], hammer, (void *)(uintptr_t)(team->rank * MAX_THREADS + k));
    for (long k = 0; k < threads; k++)
        join(ids[k]);
    team_barrier(team);

    long added = 0, locked = 0, locked_ops = (ops + 3) / 4;
    for (int p = 0; p < PAGES; p++) {
        added += atomic_load(&shared->pages[p].added);
        locked += shared->pages[p].locked;
    }
    expect(added == ops * threads * team->ranks, "atomics added %ld, not %ld", added,
           ops * threads * team->ranks);
    expect(locked == locked_ops * threads * team->ranks, "locked additions are %ld, not %ld",
           locked, locked_ops * threads * team->ranks);
    expect(semaphore_value(set, LOCK) == 1, "the lock ended at %d", semaphore_value(set, LOCK));
    expect_attach_count(segment, team->ranks, "the threads' detaches");
    if (team->rank == 0)
        printf("%d ranks x %ld threads: %ld atomic and %ld locked additions, exact\n", team->ranks,
               threads, added, locked);
    team_barrier(team);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "threads", .meaning = "threads of each rank", .number = &threads},
        {.name = "ops", .meaning = "operations of each thread", .number = &ops},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Threads in each process, atomics and semaphores.", 2, 1,
                                       settings, run});
}
