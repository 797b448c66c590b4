/*
 * Heat in a square plate: Jacobi iteration, or red-black SOR, on an N x N grid shared by all ranks.
 *
 * Jacobi: two grids take turns as source and target. Each rank owns a band of rows and reads one
 * row of each neighbour; a barrier separates the steps. SOR: one grid, of whose cells those of one
 * colour are computed from those of the other; a barrier after each colour.
 * The borders are hot above and cold below. The arithmetic of a cell does not depend on who
 * computes it, so the result must equal a sequential run bit for bit.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long size = 512, steps = 200;
static bool sor, unchecked;

/* The rows [first, last), cold but for the borders. */
static void heat_borders(double *grid, long first, long last)
{
    for (long row = first; row < last; row++) {
        double *cells = grid + row * size;
        memset(cells, 0, (size_t)size * sizeof *cells);
        cells[0] = cells[size - 1] = 100.0 * (double)(size - 1 - row) / (double)size;
        for (long k = 0; row == 0 && k < size; k++)
            cells[k] = 100;
    }
}

/* One Jacobi step of the rows [first, last). */
static void relax(const double *restrict from, double *restrict to, long first, long last)
{
    for (long row = first; row < last; row++) {
        const double *at = from + row * size;
        for (long k = 1; k < size - 1; k++)
            to[row * size + k] = 0.25 * (at[k - 1] + at[k + 1] + at[k - size] + at[k + size]);
    }
}

/* Half a step of SOR: the cells of one colour in the rows [first, last). */
static void relax_colour(double *grid, long colour, long first, long last)
{
    const double omega = 1.5;
    for (long row = first; row < last; row++) {
        double *at = grid + row * size;
        for (long k = 1 + (row + colour) % 2; k < size - 1; k += 2)
            at[k] += omega * (0.25 * (at[k - 1] + at[k + 1] + at[k - size] + at[k + size]) - at[k]);
    }
}

/* All steps of the rows [first, last), with the team, if there is one; returns the result. */
static const double *iterate(double *const grids[2], long first, long last, struct team *team)
{
    for (long step = 0; step < steps; step++)
        for (long half = 0; half < 1 + sor; half++) {
            if (sor)
                relax_colour(grids[0], half, first, last);
            else
                relax(grids[step % 2], grids[(step + 1) % 2], first, last);
            if (team)
                team_barrier(team);
        }
    return grids[sor ? 0 : steps % 2];
}

static void compare(const double *shared)
{
    size_t cells = (size_t)(size * size);
    double *grids[2] = {malloc(cells * sizeof(double)), malloc(cells * sizeof(double))};
    if (!grids[0] || !grids[1])
        die("out of memory");
    heat_borders(grids[0], 0, size);
    heat_borders(grids[1], 0, size);
    double start = now();
    const double *right = iterate(grids, 1, size - 1, NULL);
    print_sequential(now() - start);
    for (size_t k = 0; k < cells; k++)
        expect(memcmp(&shared[k], &right[k], sizeof(double)) == 0,
               "row %zu column %zu is %.17g, should be %.17g", k / (size_t)size, k % (size_t)size,
               shared[k], right[k]);
    double sum = 0;
    for (size_t k = 0; k < cells; k++)
        sum += right[k];
    printf("equal to the sequential result bit for bit; mean %.6f\n", sum / (double)cells);
    free(grids[0]);
    free(grids[1]);
}

static uint64_t digest_rows(const double *grid, long first, long last)
{
    uint64_t sum = 0, bits;
    for (long k = first * size; k < last * size; k++) {
        memcpy(&bits, &grid[k], sizeof bits);
        sum += digest((uint64_t)k, bits);
    }
    return sum;
}

static void simulate(struct team *team)
{
    expect(size >= 3 && size <= 16384, "a grid of %ld x %ld?", size, size);
    size_t bytes = (size_t)(size * size) * sizeof(double);
    double *grids[2] = {team_segment(team, 0, bytes), team_segment(team, 1, bytes)};
    long first = 1 + share_of(team, team->rank, size - 2);
    long last = 1 + share_of(team, team->rank + 1, size - 2);
    long above = team->rank == 0, below = team->rank == team->ranks - 1;
    heat_borders(grids[0], first - above, last + below);
    heat_borders(grids[1], first - above, last + below);
    team_barrier(team);

    double start = now();
    const double *result = iterate(grids, first, last, team);
    team_result(team, now() - start, digest_rows(result, first, last));
    if (team->rank == 0 && !unchecked)
        compare(result);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "size", .meaning = "cells a side", .number = &size},
        {.name = "steps", .meaning = "steps", .number = &steps},
        {.name = "sor", .meaning = "red-black SOR instead of Jacobi iteration", .flag = &sor},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Heat equation, exact to the last bit.", 4, 1, settings,
                                       simulate});
}
