/*
 * The textbook use: a semaphore as a mutex around plain, non-atomic increments.
 *
 * Each operation adds one to a counter in every page; all counters are equal whenever the lock is
 * free, and exactly ranks * ops at the end.
 */
#include "common.h"

#include <stdio.h>

static long ops = 5000, pages = 4;
static bool undo;

struct page {
    _Alignas(PAGE) volatile long counter;
};

static void run(struct team *team)
{
    expect(pages > 0 && pages <= 1 << 16, "--pages %ld?", pages);
    struct page *counters = team_segment(team, 0, (size_t)pages * sizeof *counters);
    int lock = team_semaphores(team, 0, 1);
    if (team->rank == 0)
        semaphore_set(lock, 0, 1);
    team_barrier(team);

    int flags = undo ? SEM_UNDO : 0;
    double start = now();
    for (long k = 0; k < ops; k++) {
        semaphore_change(lock, 0, -1, flags);
        long before = counters[0].counter;
        for (long p = 0; p < pages; p++) {
            expect(counters[p].counter == before, "page %ld counts %ld, page 0 %ld", p,
                   counters[p].counter, before);
            counters[p].counter = before + 1;
        }
        semaphore_change(lock, 0, 1, flags);
    }
    double seconds = now() - start;
    team_barrier(team);

    for (long p = 0; p < pages; p++)
        expect(counters[p].counter == ops * team->ranks, "page %ld counts %ld, not %ld", p,
               counters[p].counter, ops * team->ranks);
    expect(semaphore_value(lock, 0) == 1, "the lock ended at %d", semaphore_value(lock, 0));
    if (team->rank == 0)
        printf("%d ranks x %ld locked increments of %ld pages: exact, %.0f/s\n", team->ranks, ops,
               pages, (double)(ops * team->ranks) / seconds);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "increments of each rank", .number = &ops},
        {.name = "pages", .meaning = "pages touched under the lock", .number = &pages},
        {.name = "undo", .meaning = "use SEM_UNDO", .flag = &undo},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Counters guarded by a semaphore, exact.", 4, 1, settings,
                                       run});
}
