/*
 * False sharing: between two barriers every rank writes its own words of the same pages, word r of
 * every N consecutive ones, and nobody else's. After the barrier all look at all words.
 *
 * The words are visited column by column (the first own word of every page, then the second, ...),
 * as a loop over the columns of a matrix does whose rows are pages: each write is to another page
 * than the last. Values come back, so that a write that is lost or undone shows.
 */
#include "common.h"

#include <stdio.h>

enum { WORDS = PAGE / sizeof(uint32_t) };

static long pages = 8, rounds = 20;

static uint32_t value(long round, long page, long word)
{
    return (uint32_t)(page * WORDS + word) ^ (uint32_t)(round % 3);
}

static void share(struct team *team)
{
    expect(pages > 0 && rounds > 0, "nothing to do");
    volatile uint32_t(*page)[WORDS] = team_segment(team, 0, (size_t)pages * PAGE);
    double writing = 0;
    for (long round = 1; round <= rounds; round++) {
        team_barrier(team);
        double start = now();
        for (long word = team->rank; word < WORDS; word += team->ranks)
            for (long p = 0; p < pages; p++)
                page[p][word] = value(round, p, word);
        team_barrier(team);
        writing += now() - start;
        for (long p = 0; p < pages; p++)
            for (long word = 0; word < WORDS; word++)
                expect(page[p][word] == value(round, p, word),
                       "round %ld, page %ld, word %ld of rank %ld: %u, should be %u", round, p,
                       word, word % team->ranks, page[p][word], value(round, p, word));
    }
    if (team->rank == 0)
        printf("%ld pages written by %d ranks %ld times, none lost: %.0f us a round\n", pages,
               team->ranks, rounds, 1e6 * writing / (double)rounds);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "pages", .meaning = "pages that all ranks write", .number = &pages},
        {.name = "rounds", .meaning = "times that they do", .number = &rounds},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Alternate words of the same pages, written at once.", 2, 1,
                                       settings, share});
}
