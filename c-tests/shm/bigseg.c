/*
 * A large segment, larger perhaps than any node's memory budget: nothing may be lost.
 *
 * A page describes itself: its version, who wrote that, and words that are functions of these and
 * of the page's number. First each rank writes its own pages; everyone verifies all pages. Then all
 * write and verify random pages under striped locks. At the end the versions of all pages add up to
 * exactly the number of writes.
 */
#include "common.h"

#include <stdio.h>

enum { STRIPES = 64, BLOCK = 16 /* pages in a row that one rank writes first */ };

static long mib = 32, ops = 5000, write_percent = 50;

struct page {
    _Alignas(PAGE) uint64_t version;
    uint64_t writer;
    uint64_t words[PAGE / sizeof(uint64_t) - 2];
};

struct totals {
    _Alignas(PAGE) long writes[MAX_RANKS];
};

static void fill(struct page *page, uint64_t number, uint64_t version, uint64_t writer)
{
    uint64_t random = number << 32 ^ version << 8 ^ writer;
    page->version = version;
    page->writer = writer;
    for (size_t k = 0; k < sizeof page->words / sizeof *page->words; k++)
        page->words[k] = random_next(&random);
}

static void verify(const struct page *page, uint64_t number)
{
    uint64_t random = number << 32 ^ page->version << 8 ^ page->writer;
    for (size_t k = 0; k < sizeof page->words / sizeof *page->words; k++)
        expect(page->words[k] == random_next(&random),
               "page %lu, version %lu of rank %lu: word %zu is %016lx", number, page->version,
               page->writer, k, page->words[k]);
}

static void run(struct team *team)
{
    expect(mib > 0 && write_percent <= 100, "--mib %ld, --writes %ld?", mib, write_percent);
    uint64_t pages = (uint64_t)mib * (1 << 20) / PAGE, self = (uint64_t)team->rank;
    struct page *segment = team_segment(team, 0, pages * sizeof *segment);
    struct totals *totals = team_segment(team, 1, sizeof *totals);
    int locks = team_semaphores(team, 0, STRIPES);
    if (team->rank == 0)
        for (int k = 0; k < STRIPES; k++)
            semaphore_change(locks, k, 1, 0);

    double start = now();
    for (uint64_t p = 0; p < pages; p++)
        if (p / BLOCK % (uint64_t)team->ranks == self)
            fill(&segment[p], p, 1, self);
    team_barrier(team);
    double filled = now();
    for (uint64_t p = 0; p < pages; p++) {
        expect(segment[p].version == 1 && segment[p].writer == p / BLOCK % (uint64_t)team->ranks,
               "page %lu has version %lu of rank %lu", p, segment[p].version, segment[p].writer);
        verify(&segment[p], p);
    }
    team_barrier(team);
    double verified = now();

    uint64_t random = self;
    long writes = 0;
    for (long k = 0; k < ops; k++) {
        uint64_t p = random_below(&random, pages);
        bool writing = random_below(&random, 100) < (uint64_t)write_percent;
        semaphore_change(locks, (int)(p % STRIPES), -1, SEM_UNDO);
        verify(&segment[p], p);
        if (writing) {
            fill(&segment[p], p, segment[p].version + 1, self);
            writes++;
        }
        semaphore_change(locks, (int)(p % STRIPES), 1, SEM_UNDO);
    }
    totals->writes[team->rank] = writes;
    team_barrier(team);
    double mixed = now();

    uint64_t expected = pages, sum = 0;
    for (int rank = 0; rank < team->ranks; rank++)
        expected += (uint64_t)totals->writes[rank];
    for (uint64_t p = 0; p < pages; p++) {
        verify(&segment[p], p);
        sum += segment[p].version;
    }
    expect(sum == expected, "the versions add up to %lu, not %lu", sum, expected);
    if (team->rank == 0)
        printf("%ld MiB, %d ranks: filled in %.3f s, verified in %.3f s, %ld random accesses in "
               "%.3f s; %lu versions, all exact\n",
               mib, team->ranks, filled - start, verified - filled, ops * team->ranks,
               mixed - verified, sum);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "mib", .meaning = "size of the segment, MiB", .number = &mib},
        {.name = "ops", .meaning = "random accesses of each rank", .number = &ops},
        {.name = "writes", .meaning = "per cent of them that write", .number = &write_percent},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A large segment: every page verified by every rank.", 4, 1,
                                       settings, run});
}
