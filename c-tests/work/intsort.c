/*
 * Ranking of integer keys by counting, as in NAS IS; ten times, with two keys changed each time.
 *
 * Each rank owns a block of the keys and a range of their values. It counts its keys by value and
 * publishes the counts; then it adds up, for its range of values, the counts of all ranks; then it
 * knows, from the sums of the ranges below, the place of each value in the sorted sequence.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ITERATIONS = 10 };

static long keys = 1 << 16, values = 1 << 11;
static bool unchecked;

struct subtotal {
    _Alignas(PAGE) long keys;
};

struct shared {
    uint32_t *keys;             /* owned by blocks */
    uint32_t *counts;           /* for each rank, of all values */
    uint32_t *places;           /* of each value; owned by ranges */
    uint32_t *sorted;           /* owned by ranges */
    struct subtotal *subtotals; /* for each rank, of its range */
};

/* Bell-shaped, like those of NAS. */
static void make_keys(uint32_t *at, long first, long last)
{
    for (long k = first; k < last; k++) {
        uint64_t state = digest(0, (uint64_t)k), sum = 0;
        for (int draw = 0; draw < 4; draw++)
            sum += random_below(&state, (uint64_t)values);
        at[k] = (uint32_t)(sum / 4);
    }
}

/* The two keys that iteration `number` changes, where they are in [first, last). */
static void change_keys(uint32_t *at, long number, long first, long last)
{
    if (number >= first && number < last)
        at[number] = (uint32_t)number;
    if (number + ITERATIONS >= first && number + ITERATIONS < last)
        at[number + ITERATIONS] = (uint32_t)(values - 1 - number);
}

static void count(const uint32_t *from, long first, long last, uint32_t *counts)
{
    memset(counts, 0, (size_t)values * sizeof *counts);
    for (long k = first; k < last; k++)
        counts[from[k]]++;
}

/* One iteration. `counts` is memory of this rank's own, for all values. */
static void rank_keys(struct team *team, const struct shared *shared, long number, uint32_t *counts)
{
    long first = share_of(team, team->rank, keys), last = share_of(team, team->rank + 1, keys);
    change_keys(shared->keys, number, first, last);
    count(shared->keys, first, last, counts);
    memcpy(shared->counts + team->rank * values, counts, (size_t)values * sizeof *counts);
    team_barrier(team);

    long low = share_of(team, team->rank, values), high = share_of(team, team->rank + 1, values);
    long subtotal = 0;
    for (int rank = 0; rank < team->ranks; rank++) {
        if (rank != team->rank)
            for (long value = low; value < high; value++)
                counts[value] += shared->counts[rank * values + value];
    }
    for (long value = low; value < high; value++)
        subtotal += counts[value];
    shared->subtotals[team->rank].keys = subtotal;
    team_barrier(team);

    uint32_t place = 0;
    for (int rank = 0; rank < team->rank; rank++)
        place += (uint32_t)shared->subtotals[rank].keys;
    for (long value = low; value < high; place += counts[value++])
        shared->places[value] = place;
}

/* Writes the keys with values of this rank's range in order. */
static void write_sorted(struct team *team, const struct shared *shared, const uint32_t *counts)
{
    long low = share_of(team, team->rank, values), high = share_of(team, team->rank + 1, values);
    for (long value = low; value < high; value++)
        for (uint32_t k = 0; k < counts[value]; k++)
            shared->sorted[shared->places[value] + k] = (uint32_t)value;
}

/* Ranks by itself, and compares what the team has sorted. */
static void compare(const uint32_t *sorted)
{
    uint32_t *own = malloc((size_t)keys * sizeof *own);
    uint32_t *counts = malloc((size_t)values * sizeof *counts);
    if (!own || !counts)
        die("out of memory");
    make_keys(own, 0, keys);
    double start = now();
    for (long number = 0; number < ITERATIONS; number++) {
        change_keys(own, number, 0, keys);
        count(own, 0, keys, counts);
    }
    print_sequential(now() - start);
    long place = 0;
    for (long value = 0; value < values; value++)
        for (uint32_t k = 0; k < counts[value]; k++, place++)
            expect(sorted[place] == value, "key %ld of the sorted ones is %u, should be %ld", place,
                   sorted[place], value);
    printf("sorted\n");
    free(own);
    free(counts);
}

static void run(struct team *team)
{
    expect(keys >= 2 * ITERATIONS && keys <= 1L << 30, "%ld keys?", keys);
    expect(values >= ITERATIONS && values <= keys, "%ld values?", values);
    size_t bytes = (size_t)keys * sizeof(uint32_t), range = (size_t)values * sizeof(uint32_t);
    struct shared shared = {
        .keys = team_segment(team, 0, bytes),
        .counts = team_segment(team, 1, (size_t)team->ranks * range),
        .places = team_segment(team, 2, range),
        .sorted = team_segment(team, 3, bytes),
        .subtotals = team_segment(team, 4, (size_t)team->ranks * sizeof(struct subtotal)),
    };
    uint32_t *counts = malloc(range);
    if (!counts)
        die("out of memory");
    make_keys(shared.keys, share_of(team, team->rank, keys), share_of(team, team->rank + 1, keys));
    team_barrier(team);

    double start = now();
    for (long number = 0; number < ITERATIONS; number++)
        rank_keys(team, &shared, number, counts);
    team_barrier(team);
    double seconds = now() - start;

    uint64_t sum = 0;
    for (long value = share_of(team, team->rank, values);
         value < share_of(team, team->rank + 1, values); value++)
        sum += digest((uint64_t)value, shared.places[value]);
    if (!unchecked)
        write_sorted(team, &shared, counts);
    team_result(team, seconds, sum);
    if (team->rank == 0 && !unchecked)
        compare(shared.sorted);
    free(counts);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "keys", .meaning = "how many", .number = &keys},
        {.name = "values", .meaning = "they are below this", .number = &values},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Integer keys ranked as in NAS IS; its class A is 8388608 "
                                       "keys, 524288 values.",
                                       4, 1, settings, run});
}
