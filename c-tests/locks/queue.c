/*
 * A bounded lock-free queue of many producers and many consumers (Vyukov).
 *
 * Each cell has a sequence number: `position` when free for that position's producer, `position+1`
 * when filled, `position + CAPACITY` when emptied. Even ranks produce, odd ranks consume.
 *
 * Checked: every item arrives exactly once (a shared bitmap), intact, and the items that a consumer
 * gets from one producer come in the order they were sent.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>

enum { CAPACITY = 64, MAX_OPS = 1 << 20, WORD_BITS = 64 };

static long ops = 50000;

struct item {
    uint64_t producer, serial, check;
};

struct cell {
    _Alignas(128) atomic_ulong sequence;
    struct item item;
};

struct progress {
    _Alignas(PAGE) long done;
    double longest_wait;
};

struct queue {
    _Alignas(PAGE) atomic_ulong head; /* next position to fill */
    _Alignas(PAGE) atomic_ulong tail; /* next position to empty */
    _Alignas(PAGE) atomic_ulong claimed; /* items that some consumer has promised to fetch */
    struct progress ranks[MAX_RANKS];
    _Alignas(PAGE) struct cell cells[CAPACITY];
    _Alignas(PAGE) atomic_ullong received[]; /* bitmap: producer * ops + serial */
};

static uint64_t checksum(struct item item)
{
    uint64_t state = item.producer << 32 | item.serial;
    return random_next(&state);
}

static bool try_push(struct queue *queue, struct item item)
{
    unsigned long position = atomic_load(&queue->head);
    for (;;) {
        struct cell *cell = &queue->cells[position % CAPACITY];
        long lag = (long)(atomic_load(&cell->sequence) - position);
        if (lag < 0)
            return false;
        if (lag > 0) {
            position = atomic_load(&queue->head);
        } else if (atomic_compare_exchange_weak(&queue->head, &position, position + 1)) {
            cell->item = item;
            atomic_store(&cell->sequence, position + 1);
            return true;
        }
    }
}

static bool try_pop(struct queue *queue, struct item *item)
{
    unsigned long position = atomic_load(&queue->tail);
    for (;;) {
        struct cell *cell = &queue->cells[position % CAPACITY];
        long lag = (long)(atomic_load(&cell->sequence) - (position + 1));
        if (lag < 0)
            return false;
        if (lag > 0) {
            position = atomic_load(&queue->tail);
        } else if (atomic_compare_exchange_weak(&queue->tail, &position, position + 1)) {
            *item = cell->item;
            atomic_store(&cell->sequence, position + CAPACITY);
            return true;
        }
    }
}

static void produce(struct queue *queue, uint64_t producer, struct progress *progress)
{
    for (; progress->done < ops; progress->done++) {
        struct item item = {producer, (uint64_t)progress->done, 0};
        item.check = checksum(item);
        double start = now();
        unsigned turns = 0;
        while (!try_push(queue, item))
            spin_wait(&turns);
        if (now() - start > progress->longest_wait)
            progress->longest_wait = now() - start;
    }
}

static void consume(struct queue *queue, unsigned long total, uint64_t producers,
                    struct progress *progress)
{
    uint64_t expected[MAX_RANKS] = {0}; /* the least serial that may come from each producer */
    for (; atomic_fetch_add(&queue->claimed, 1) < total; progress->done++) {
        struct item item;
        double start = now();
        unsigned turns = 0;
        while (!try_pop(queue, &item))
            spin_wait(&turns);
        if (now() - start > progress->longest_wait)
            progress->longest_wait = now() - start;

        expect(item.producer < producers && item.serial < (uint64_t)ops &&
                   item.check == checksum(item),
               "a damaged item: producer %lu, serial %lu", item.producer, item.serial);
        expect(item.serial >= expected[item.producer],
               "out of order: serial %lu of producer %lu after %lu", item.serial, item.producer,
               expected[item.producer] - 1);
        expected[item.producer] = item.serial + 1;
        uint64_t index = item.producer * (uint64_t)ops + item.serial, bit = 1ULL << index % WORD_BITS;
        expect(!(atomic_fetch_or(&queue->received[index / WORD_BITS], bit) & bit),
               "serial %lu of producer %lu came twice", item.serial, item.producer);
    }
}

static void report(struct queue *queue, int ranks, unsigned long total)
{
    printf("rank  role        items  longest wait (ms)\n");
    for (int rank = 0; rank < ranks; rank++) {
        const struct progress *progress = &queue->ranks[rank];
        printf("%4d  %s %8ld %18.3f\n", rank, rank % 2 ? "consumer" : "producer", progress->done,
               progress->longest_wait * 1e3);
        /* Consumers may share the work as they like; producers each have their own. */
        expect(rank % 2 || progress->done == ops, "rank %d was starved", rank);
    }
    for (unsigned long k = 0; k < total; k++)
        expect(atomic_load(&queue->received[k / WORD_BITS]) >> k % WORD_BITS & 1,
               "serial %lu of producer %lu was lost", k % (unsigned long)ops,
               k / (unsigned long)ops);
}

static void run(struct team *team)
{
    expect(ops > 0 && ops <= MAX_OPS, "--ops is 1 to %d", MAX_OPS);
    uint64_t producers = (uint64_t)(team->ranks + 1) / 2;
    unsigned long total = producers * (unsigned long)ops;
    struct queue *queue = team_segment(team, 0, sizeof *queue + total / 8 + WORD_BITS);
    if (team->rank == 0)
        for (unsigned long k = 0; k < CAPACITY; k++)
            atomic_store(&queue->cells[k].sequence, k);
    team_barrier(team);

    struct progress progress = {0};
    if (team->rank % 2)
        consume(queue, total, producers, &progress);
    else
        produce(queue, (uint64_t)team->rank / 2, &progress);
    queue->ranks[team->rank] = progress;
    team_barrier(team);
    if (team->rank == 0)
        report(queue, team->ranks, total);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "items of each producer", .number = &ops},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A bounded lock-free MPMC queue.", 4, 2, settings, run});
}
