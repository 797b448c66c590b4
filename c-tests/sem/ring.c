/*
 * Pages that go round with a baton: rank r waits for its semaphore, changes the guarded pages, and
 * raises the semaphore of rank r + 1. Each pass changes every page, so whoever comes next sees one
 * that is missing or old.
 */
#include "common.h"

#include <stdio.h>

enum { PAGES_MAX = 64 };

static long rounds = 1000, pages = 2;

struct guarded {
    _Alignas(PAGE) volatile long passes; /* how often the page was changed */
    volatile long last;                  /* by whom */
};

static void run(struct team *team)
{
    expect(pages >= 1 && pages <= PAGES_MAX, "--pages is 1 to %d", PAGES_MAX);
    struct guarded *guarded = team_segment(team, 0, (size_t)pages * sizeof *guarded);
    int set = team_semaphores(team, 0, team->ranks);
    team_barrier(team);
    if (team->rank == 0)
        semaphore_set(set, 0, 1);

    int next = (team->rank + 1) % team->ranks, before = (team->rank + team->ranks - 1) % team->ranks;
    double start = now();
    for (long round = 0; round < rounds; round++) {
        long passes = round * team->ranks + team->rank;
        semaphore_change(set, team->rank, -1, 0);
        for (long page = 0; page < pages; page++) {
            expect(guarded[page].passes == passes, "page %ld was changed %ld times, not %ld", page,
                   guarded[page].passes, passes);
            expect(passes == 0 || guarded[page].last == before, "page %ld comes from rank %ld, not %d",
                   page, guarded[page].last, before);
            guarded[page].last = team->rank;
            guarded[page].passes++;
        }
        semaphore_change(set, next, 1, 0);
    }
    team_barrier(team);
    if (team->rank == 0)
        printf("%ld pages went round %ld times, %.1f us for each pass\n", pages, rounds,
               (now() - start) * 1e6 / (double)(rounds * team->ranks));
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "times that the baton comes round", .number = &rounds},
        {.name = "pages", .meaning = "pages that go with it", .number = &pages},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Pages that go round with a baton of semaphores.", 4, 1,
                                       settings, run});
}
