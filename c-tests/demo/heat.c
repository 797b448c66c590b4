/*
 * Heat in a square plate: Jacobi iteration on an N x N grid shared by all ranks.
 *
 * Two grids take turns as source and target. Each rank owns a band of rows and reads one row of
 * each neighbour; a barrier separates the steps. The borders are hot above and cold below.
 * The arithmetic of a cell does not depend on who computes it, so the result must equal a
 * sequential run bit for bit.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long size = 512, steps = 200;

static void heat_borders(double *grid)
{
    for (long k = 0; k < size; k++) {
        grid[k] = 100;
        grid[k * size] = grid[k * size + size - 1] = 100.0 * (double)(size - 1 - k) / (double)size;
    }
}

/* One Jacobi step of the rows [first, last). */
static void relax(const double *from, double *to, long first, long last)
{
    for (long row = first; row < last; row++) {
        const double *at = from + row * size;
        for (long k = 1; k < size - 1; k++)
            to[row * size + k] = 0.25 * (at[k - 1] + at[k + 1] + at[k - size] + at[k + size]);
    }
}

static void compare(const double *shared)
{
    size_t cells = (size_t)(size * size);
    double *grids[2] = {calloc(cells, sizeof(double)), calloc(cells, sizeof(double))};
    if (!grids[0] || !grids[1])
        die("out of memory");
    heat_borders(grids[0]);
    heat_borders(grids[1]);
    double start = now();
    for (long step = 0; step < steps; step++)
        relax(grids[step % 2], grids[(step + 1) % 2], 1, size - 1);
    printf("sequential: %.3f s\n", now() - start);
    const double *right = grids[steps % 2];
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

static void simulate(struct team *team)
{
    expect(size >= 3 && size <= 16384, "a grid of %ld x %ld?", size, size);
    size_t bytes = (size_t)(size * size) * sizeof(double);
    double *grids[2] = {team_segment(team, 0, bytes), team_segment(team, 1, bytes)};
    if (team->rank == 0) {
        heat_borders(grids[0]);
        heat_borders(grids[1]);
    }
    long inner = size - 2;
    long first = 1 + inner * team->rank / team->ranks;
    long last = 1 + inner * (team->rank + 1) / team->ranks;
    team_barrier(team);

    double start = now();
    for (long step = 0; step < steps; step++) {
        relax(grids[step % 2], grids[(step + 1) % 2], first, last);
        team_barrier(team);
    }
    if (team->rank == 0) {
        printf("%ld x %ld, %ld steps, %d ranks: %.3f s\n", size, size, steps, team->ranks,
               now() - start);
        compare(grids[steps % 2]);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "size", .meaning = "cells a side", .number = &size},
        {.name = "steps", .meaning = "Jacobi steps", .number = &steps},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Jacobi heat equation, exact to the last bit.", 4, 1,
                                       settings, simulate});
}
