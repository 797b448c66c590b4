/*
 * Two segments that are shared in two ways: what is still to be done, and what has come of it.
 *
 * In slot 0 ranks take rows from a counter by an atomic addition and spin until all are done; no
 * semaphore orders that. Slot 1 has the rows, which lie so that neighbours share pages; who has
 * computed a row tells the others by a semaphore operation. So slot 1 may have release consistency
 * and slot 0 may not.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>

enum { CELLS = 96 }; /* of a row, which is no whole page */

static long rows = 400;

struct work {
    _Atomic long ranks, next, done;
};

static uint32_t cell(long row, long column, int pass)
{
    uint64_t state = (uint64_t)(row * CELLS + column) + (uint64_t)pass * 1000003u;
    return (uint32_t)random_next(&state);
}

static void compute(struct team *team)
{
    struct work *work = team_segment(team, 0, sizeof *work);
    uint32_t(*row)[CELLS] = team_segment(team, 1, (size_t)rows * sizeof *row);
    atomic_fetch_add(&work->ranks, 1);
    team_barrier(team);
    expect(atomic_load(&work->ranks) == team->ranks, "of %d ranks only %ld are here", team->ranks,
           atomic_load(&work->ranks));
    for (int pass = 1; pass <= 2; pass++) {
        for (long next; (next = atomic_fetch_add(&work->next, 1)) < rows * pass;) {
            long own = next - rows * (pass - 1);
            for (long column = 0; column < CELLS; column++)
                row[own][column] += cell(own, column, pass);
            atomic_fetch_add(&work->done, 1);
        }
        for (unsigned turns = 0; atomic_load(&work->done) < rows * pass;)
            spin_wait(&turns);
        team_barrier(team);
        if (team->rank == 0)
            atomic_store(&work->next, rows * pass);
        for (long r = 0; r < rows; r++)
            for (long column = 0; column < CELLS; column++) {
                uint32_t right = cell(r, column, 1) + (pass == 2 ? cell(r, column, 2) : 0);
                expect(row[r][column] == right, "pass %d, row %ld, column %ld: %u, should be %u",
                       pass, r, column, row[r][column], right);
            }
        team_barrier(team);
    }
    if (team->rank == 0)
        printf("%ld rows by %d ranks, twice, all right\n", rows, team->ranks);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rows", .meaning = "rows to compute", .number = &rows},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Atomics in one segment, barriers for another.", 3, 1,
                                       settings, compute});
}
