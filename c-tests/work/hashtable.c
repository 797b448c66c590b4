/*
 * A hash table that is read more often than it is changed.
 *
 * The table has stripes, each with a semaphore for many readers or one writer: it holds as many
 * units as there are ranks, of which a reader takes one and a writer all. Every rank looks keys up,
 * and now and then adds to one, whoever has added to it before. An entry carries a check, which
 * every reader verifies; in the end each entry must be what a sequential run makes of it.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>

enum { STRIPES = 16, NO_KEY = 0 };

static long ops = 5000, keys = 2000, writes = 5;
static bool unchecked;

struct entry {
    uint64_t key;
    uint64_t sum, count; /* of what was added */
    uint64_t check;
};

/* Entries of a stripe: a power of two, about half of them unused. */
static long stripe_size(void)
{
    long size = 16;
    while (size < 2 * keys / STRIPES)
        size *= 2;
    return size;
}

static uint64_t check_of(const struct entry *entry)
{
    return digest(entry->key, digest(entry->sum, entry->count));
}

static int stripe_of(uint64_t key)
{
    return (int)(digest(0, key) % STRIPES);
}

/* The entry of a key, or the unused one where it belongs. */
static struct entry *find(struct entry *table, uint64_t key)
{
    long size = stripe_size();
    struct entry *stripe = table + stripe_of(key) * size;
    uint64_t at = digest(1, key);
    for (long tried = 0; tried < size; tried++, at++) {
        struct entry *entry = &stripe[at % (uint64_t)size];
        if (entry->key == key || entry->key == NO_KEY)
            return entry;
    }
    die("stripe %d is full; use more --keys", stripe_of(key));
}

static void add(struct entry *entry, uint64_t key, uint64_t value)
{
    entry->key = key;
    entry->sum += value;
    entry->count++;
    entry->check = check_of(entry);
}

static void verify(const struct entry *entry)
{
    expect(entry->key == NO_KEY || entry->check == check_of(entry),
           "the entry of key %lu is damaged", entry->key);
}

/* What one rank does, on the shared table with its semaphores, or alone with `set` -1. */
static void operate(struct entry *table, int set, int rank, int ranks)
{
    uint64_t random = digest(2, (uint64_t)rank);
    for (long k = 0; k < ops; k++) {
        uint64_t key = 1 + random_below(&random, (uint64_t)keys);
        bool writing = random_below(&random, 100) < (uint64_t)writes;
        uint64_t value = random_next(&random);
        int units = writing ? ranks : 1;
        if (set >= 0)
            semaphore_change(set, stripe_of(key), -units, 0);
        struct entry *entry = find(table, key);
        verify(entry);
        if (writing)
            add(entry, key, value);
        if (set >= 0)
            semaphore_change(set, stripe_of(key), units, 0);
    }
}

static void compare(struct entry *shared, int ranks)
{
    long size = STRIPES * stripe_size(), used[2] = {0};
    struct entry *own = calloc((size_t)size, sizeof *own);
    if (!own)
        die("out of memory");
    double start = now();
    for (int rank = 0; rank < ranks; rank++)
        operate(own, -1, rank, ranks);
    print_sequential(now() - start);
    for (long k = 0; k < size; k++) {
        used[0] += shared[k].key != NO_KEY;
        if (own[k].key == NO_KEY)
            continue;
        used[1]++;
        const struct entry *found = find(shared, own[k].key);
        expect(found->key != NO_KEY, "key %lu is missing", own[k].key);
        expect(found->sum == own[k].sum && found->count == own[k].count,
               "%lu additions to key %lu, or others than the %lu", found->count, own[k].key,
               own[k].count);
    }
    expect(used[0] == used[1], "%ld keys, should be %ld", used[0], used[1]);
    printf("%ld keys, as in the sequential run\n", used[0]);
    free(own);
}

static void run(struct team *team)
{
    expect(writes <= 100, "%ld %% of writes?", writes);
    long size = STRIPES * stripe_size();
    struct entry *table = team_segment(team, 0, (size_t)size * sizeof *table);
    int set = team_semaphores(team, 0, STRIPES);
    if (team->rank == 0)
        for (int stripe = 0; stripe < STRIPES; stripe++)
            semaphore_set(set, stripe, team->ranks);
    team_barrier(team);

    double start = now();
    operate(table, set, team->rank, team->ranks);
    team_barrier(team);
    double seconds = now() - start;

    uint64_t sum = 0;
    for (long k = 0; team->rank == 0 && k < size; k++)
        if (table[k].key != NO_KEY)
            sum += table[k].check;
    team_result(team, seconds, sum);
    if (team->rank != 0)
        return;
    for (int stripe = 0; stripe < STRIPES; stripe++)
        expect(semaphore_value(set, stripe) == team->ranks, "semaphore %d ended at %d", stripe,
               semaphore_value(set, stripe));
    printf("%.0f operations/s\n", (double)(ops * team->ranks) / seconds);
    if (!unchecked)
        compare(table, team->ranks);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "operations of each rank", .number = &ops},
        {.name = "keys", .meaning = "different ones", .number = &keys},
        {.name = "writes", .meaning = "operations that write, in a hundred", .number = &writes},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A read-mostly hash table under reader-writer semaphores.",
                                       4, 1, settings, run});
}
