/*
 * C = A B, of N x N doubles.
 *
 * Each rank owns a band of rows of all three: it fills those of A and B, and computes those of C,
 * for which it reads all of B. The products of an element are added in the order of the sequential
 * loop, so the result must equal it bit for bit.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long size = 256;
static bool unchecked;

enum { BLOCK = 64 }; /* rows of B that are used while they are in the cache */

/* Rows [first, last); the numbers are small enough for a sum that is not worth looking at. */
static void fill(double *matrix, uint64_t which, long first, long last)
{
    for (long k = first * size; k < last * size; k++)
        matrix[k] = (double)(digest(which, (uint64_t)k) % 2001) / 1000.0 - 1.0;
}

static void add_row(double *restrict to, double factor, const double *restrict row)
{
    for (long k = 0; k < size; k++)
        to[k] += factor * row[k];
}

/* Rows [first, last) of C. */
static void multiply(const double *a, const double *b, double *c, long first, long last)
{
    memset(c + first * size, 0, (size_t)((last - first) * size) * sizeof *c);
    for (long block = 0; block < size; block += BLOCK)
        for (long row = first; row < last; row++)
            for (long k = block; k < block + BLOCK && k < size; k++)
                add_row(c + row * size, a[row * size + k], b + k * size);
}

static void compare(const double *shared)
{
    size_t bytes = (size_t)(size * size) * sizeof(double);
    double *a = malloc(bytes), *b = malloc(bytes), *c = malloc(bytes);
    if (!a || !b || !c)
        die("out of memory");
    fill(a, 0, 0, size);
    fill(b, 1, 0, size);
    double start = now();
    multiply(a, b, c, 0, size);
    print_sequential(now() - start);
    for (long k = 0; k < size * size; k++)
        expect(memcmp(&shared[k], &c[k], sizeof(double)) == 0,
               "row %ld column %ld is %.17g, should be %.17g", k / size, k % size, shared[k], c[k]);
    printf("equal to the sequential result bit for bit\n");
    free(a);
    free(b);
    free(c);
}

static uint64_t digest_rows(const double *matrix, long first, long last)
{
    uint64_t sum = 0, bits;
    for (long k = first * size; k < last * size; k++) {
        memcpy(&bits, &matrix[k], sizeof bits);
        sum += digest((uint64_t)k, bits);
    }
    return sum;
}

static void run(struct team *team)
{
    expect(size >= 1 && size <= 16384, "matrices of %ld x %ld?", size, size);
    size_t bytes = (size_t)(size * size) * sizeof(double);
    double *a = team_segment(team, 0, bytes), *b = team_segment(team, 1, bytes),
           *c = team_segment(team, 2, bytes);
    long first = share_of(team, team->rank, size), last = share_of(team, team->rank + 1, size);
    fill(a, 0, first, last);
    fill(b, 1, first, last);
    team_barrier(team);

    double start = now();
    multiply(a, b, c, first, last);
    team_barrier(team);
    team_result(team, now() - start, digest_rows(c, first, last));
    if (team->rank == 0 && !unchecked)
        compare(c);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "size", .meaning = "rows and columns", .number = &size},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Product of two square matrices.", 4, 1, settings, run});
}
