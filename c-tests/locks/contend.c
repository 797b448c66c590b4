#include "contend.h"

#include <stdio.h>

enum { PAGES = 4 };

static long ops = 20000, patience = 20;

const struct setting contend_settings[] = {
    {.name = "ops", .meaning = "operations of each rank", .number = &ops},
    {.name = "patience", .meaning = "longest wait for the lock, seconds", .number = &patience},
    {0},
};

struct page {
    _Alignas(PAGE) volatile long counter;
};

struct progress {
    _Alignas(PAGE) long done;
    double seconds, longest_wait;
};

struct arena {
    struct page pages[PAGES];
    struct progress ranks[MAX_RANKS];
};

static void increment(struct page *pages, int rank)
{
    long before = pages[0].counter;
    for (int k = 0; k < PAGES; k++) {
        expect(pages[k].counter == before,
               "not alone under the lock: rank %d sees page %d at %ld, page 0 at %ld", rank, k,
               pages[k].counter, before);
        pages[k].counter = before + 1;
    }
}

static void report(const struct arena *arena, int ranks)
{
    printf("rank      ops  seconds  longest wait (ms)\n");
    for (int rank = 0; rank < ranks; rank++) {
        const struct progress *progress = &arena->ranks[rank];
        printf("%4d %8ld %8.3f %18.3f\n", rank, progress->done, progress->seconds,
               progress->longest_wait * 1e3);
        expect(progress->done == ops && (ops == 0 || progress->done > 0),
               "rank %d was starved: %ld operations", rank, progress->done);
    }
    for (int k = 0; k < PAGES; k++)
        expect(arena->pages[k].counter == ops * ranks, "page %d counts %ld, not %ld", k,
               arena->pages[k].counter, ops * ranks);
}

void *contend(struct team *team, const struct lock *lock)
{
    struct arena *arena = team_segment(team, 0, sizeof *arena + lock->size);
    void *state = arena + 1;
    if (team->rank == 0 && lock->create)
        lock->create(state);
    team_barrier(team);

    struct progress progress = {0};
    double start = now();
    for (; progress.done < ops; progress.done++) {
        double asked = now();
        lock->acquire(state, team->rank);
        double waited = now() - asked;
        increment(arena->pages, team->rank);
        lock->release(state, team->rank);
        if (waited > progress.longest_wait)
            progress.longest_wait = waited;
        expect(waited <= (double)patience, "starved: waited %.1f s for the lock, after %ld ops",
               waited, progress.done);
    }
    progress.seconds = now() - start;
    arena->ranks[team->rank] = progress;
    team_barrier(team);
    if (team->rank == 0)
        report(arena, team->ranks);
    return state;
}
