/*
 * Bounded buffer with three semaphores: free slots, filled slots, and a mutex for the indices.
 *
 * Even ranks produce, odd ranks consume. The payload is written and read outside the mutex: a slot
 * belongs to one rank between taking its index and passing it on. (So the buffer keeps indices of
 * free and of filled slots: with several producers, slots are not filled in the order taken.)
 * Each item carries its checksum; the sums of all items sent and received must be equal.
 */
#include "common.h"

#include <stdio.h>

enum { SLOTS = 16, PAYLOAD_WORDS = 64, FREE = 0, FILLED, MUTEX, SEMAPHORES };

static long ops = 5000;

struct slot {
    uint64_t number;
    uint64_t payload[PAYLOAD_WORDS];
    uint64_t checksum;
};

struct tally {
    _Alignas(PAGE) uint64_t sum;
    long items;
};

struct buffer {
    long head, tail;             /* under the mutex: ends of the ring of filled slots */
    int filled[SLOTS];           /* under the mutex: the ring */
    int empty[SLOTS];            /* under the mutex: a stack of free slots */
    int empty_count;
    struct tally tallies[MAX_RANKS];
    _Alignas(PAGE) struct slot slots[SLOTS];
};

static uint64_t fill(struct slot *slot, uint64_t number)
{
    uint64_t random = number, sum = 0;
    slot->number = number;
    for (int k = 0; k < PAYLOAD_WORDS; k++)
        sum = sum * 31 + (slot->payload[k] = random_next(&random));
    return slot->checksum = sum;
}

static void verify(const struct slot *slot)
{
    struct slot right;
    fill(&right, slot->number);
    expect(slot->checksum == right.checksum, "item %lu has a wrong checksum", slot->number);
    for (int k = 0; k < PAYLOAD_WORDS; k++)
        expect(slot->payload[k] == right.payload[k], "item %lu: word %d is damaged", slot->number,
               k);
}

static void produce(struct buffer *buffer, int set, uint64_t number)
{
    semaphore_change(set, FREE, -1, 0);
    semaphore_change(set, MUTEX, -1, SEM_UNDO);
    expect(buffer->empty_count > 0, "a free slot was promised, but there is none");
    int index = buffer->empty[--buffer->empty_count];
    semaphore_change(set, MUTEX, 1, SEM_UNDO);

    fill(&buffer->slots[index], number);

    semaphore_change(set, MUTEX, -1, SEM_UNDO);
    buffer->filled[buffer->head++ % SLOTS] = index;
    semaphore_change(set, MUTEX, 1, SEM_UNDO);
    semaphore_change(set, FILLED, 1, 0);
}

static uint64_t consume(struct buffer *buffer, int set)
{
    semaphore_change(set, FILLED, -1, 0);
    semaphore_change(set, MUTEX, -1, SEM_UNDO);
    expect(buffer->tail < buffer->head, "a filled slot was promised, but there is none");
    int index = buffer->filled[buffer->tail++ % SLOTS];
    semaphore_change(set, MUTEX, 1, SEM_UNDO);

    verify(&buffer->slots[index]);
    uint64_t number = buffer->slots[index].number;

    semaphore_change(set, MUTEX, -1, SEM_UNDO);
    expect(buffer->empty_count < SLOTS, "more slots are free than exist");
    buffer->empty[buffer->empty_count++] = index;
    semaphore_change(set, MUTEX, 1, SEM_UNDO);
    semaphore_change(set, FREE, 1, 0);
    return number;
}

/* How many of `total` items the consumer number `which` of `consumers` takes. */
static long quota(long total, int which, int consumers)
{
    return total / consumers + (which < total % consumers);
}

static void run(struct team *team)
{
    struct buffer *buffer = team_segment(team, 0, sizeof *buffer);
    int set = team_semaphores(team, 0, SEMAPHORES);
    if (team->rank == 0) {
        for (int k = 0; k < SLOTS; k++)
            buffer->empty[k] = k;
        buffer->empty_count = SLOTS;
        unsigned short initial[SEMAPHORES] = {[FREE] = SLOTS, [FILLED] = 0, [MUTEX] = 1};
        must(semctl(set, 0, SETALL, (union semun){.array = initial}));
    }
    team_barrier(team);

    int producers = (team->ranks + 1) / 2, consumers = team->ranks / 2;
    bool producing = team->rank % 2 == 0;
    struct tally tally = {0};
    double start = now();
    if (producing)
        for (long k = 0; k < ops; k++, tally.items++) {
            uint64_t number = (uint64_t)team->rank << 32 | (uint64_t)k;
            produce(buffer, set, number);
            tally.sum += number;
        }
    else
        for (long left = quota(ops * producers, team->rank / 2, consumers); left > 0; left--) {
            tally.sum += consume(buffer, set);
            tally.items++;
        }
    buffer->tallies[team->rank] = tally;
    team_barrier(team);
    if (team->rank != 0)
        return;

    uint64_t sums[2] = {0};
    long items[2] = {0};
    for (int rank = 0; rank < team->ranks; rank++) {
        sums[rank % 2] += buffer->tallies[rank].sum;
        items[rank % 2] += buffer->tallies[rank].items;
    }
    expect(items[0] == items[1], "%ld items sent, %ld received", items[0], items[1]);
    expect(sums[0] == sums[1], "the items received are not those sent");
    expect(semaphore_value(set, FREE) == SLOTS && semaphore_value(set, FILLED) == 0,
           "semaphores ended at %d free, %d filled", semaphore_value(set, FREE),
           semaphore_value(set, FILLED));
    printf("%ld items from %d producers to %d consumers, all intact, %.0f/s\n", items[0],
           producers, consumers, (double)items[0] / (now() - start));
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "items of each producer", .number = &ops},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Producers and consumers with three semaphores.", 4, 2,
                                       settings, run});
}
