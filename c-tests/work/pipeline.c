/*
 * A pipeline: each rank is a stage that takes blocks from the one before, changes every word of
 * them, and gives them to the next one; rank 0 makes them and the last rank adds them up.
 *
 * Between two stages is a ring of slots with two semaphores, for the free and for the filled ones.
 * A slot belongs to one stage at a time. The sum must be that of a sequential run of all stages.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>

enum { SLOTS = 8, FREE = 0, FILLED, SEMAPHORES };

static long blocks = 500, words = 1024, work = 1;
static bool unchecked;

/* Word `k` of block number `number`, as rank 0 makes it. */
static uint64_t made(long number, long k)
{
    return (uint64_t)(number * words + k);
}

/* What a stage does to a word: something whose order matters. */
static uint64_t changed(uint64_t word, int stage)
{
    for (long k = 0; k < work; k++)
        word = digest(word, (uint64_t)stage);
    return word;
}

/* The ring that stage `stage` fills, of as many blocks as there are slots. */
static uint64_t *slot(uint64_t *rings, int stage, long number)
{
    return rings + ((long)stage * SLOTS + number % SLOTS) * words;
}

/* What a stage does with one block; what the last one adds to the sum. */
static uint64_t pass_on(struct team *team, int set, uint64_t *rings, long number)
{
    int stage = team->rank, into = SEMAPHORES * stage, from = into - SEMAPHORES;
    bool first = stage == 0, last = stage == team->ranks - 1;
    const uint64_t *source = first ? NULL : slot(rings, stage - 1, number);
    uint64_t *target = last ? NULL : slot(rings, stage, number), sum = 0;
    if (!first)
        semaphore_change(set, from + FILLED, -1, 0);
    if (!last)
        semaphore_change(set, into + FREE, -1, 0);
    for (long k = 0; k < words; k++) {
        uint64_t word = changed(first ? made(number, k) : source[k], stage);
        if (last)
            sum += digest(made(number, k), word);
        else
            target[k] = word;
    }
    if (!last)
        semaphore_change(set, into + FILLED, 1, 0);
    if (!first)
        semaphore_change(set, from + FREE, 1, 0);
    return sum;
}

static uint64_t sequential(int stages)
{
    uint64_t sum = 0;
    for (long number = 0; number < blocks; number++)
        for (long k = 0; k < words; k++) {
            uint64_t word = made(number, k);
            for (int stage = 0; stage < stages; stage++)
                word = changed(word, stage);
            sum += digest(made(number, k), word);
        }
    return sum;
}

static void run(struct team *team)
{
    expect(words >= 1 && words <= 1 << 20, "%ld words?", words);
    int rings_count = team->ranks - 1;
    uint64_t *rings =
        team_segment(team, 0, (size_t)(rings_count * SLOTS * words) * sizeof *rings);
    uint64_t *sum = team_segment(team, 1, sizeof *sum);
    int set = team_semaphores(team, 0, rings_count * SEMAPHORES);
    if (team->rank == 0)
        for (int ring = 0; ring < rings_count; ring++)
            semaphore_set(set, SEMAPHORES * ring + FREE, SLOTS);
    team_barrier(team);

    double start = now();
    uint64_t part = 0;
    for (long number = 0; number < blocks; number++)
        part += pass_on(team, set, rings, number);
    if (team->rank == team->ranks - 1)
        *sum = part;
    team_barrier(team);
    double seconds = now() - start;

    team_result(team, seconds, part);
    if (team->rank != 0 || unchecked)
        return;
    start = now();
    uint64_t right = sequential(team->ranks);
    print_sequential(now() - start);
    expect(*sum == right, "the sum is %lx, should be %lx", *sum, right);
    for (int ring = 0; ring < rings_count; ring++)
        expect(semaphore_value(set, SEMAPHORES * ring + FREE) == SLOTS &&
                   semaphore_value(set, SEMAPHORES * ring + FILLED) == 0,
               "ring %d ended with %d slots free, %d filled", ring,
               semaphore_value(set, SEMAPHORES * ring + FREE),
               semaphore_value(set, SEMAPHORES * ring + FILLED));
    printf("%ld blocks through %d stages, %.0f/s\n", blocks, team->ranks,
           (double)blocks / seconds);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "blocks", .meaning = "how many", .number = &blocks},
        {.name = "words", .meaning = "of 8 bytes in a block", .number = &words},
        {.name = "work", .meaning = "what is done to each word, times so many", .number = &work},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A pipeline of producers and consumers.", 4, 2, settings,
                                       run});
}
