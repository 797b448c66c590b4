/*
 * A seqlock: writers make a sequence number odd, change data in two pages, make it even again;
 * readers copy the data without writing anything and retry if the number was odd or has changed.
 *
 * The data are functions of a version, so a reader recognises any mixture of two versions. Every
 * rank reads, and now and then writes; the last version is exactly the number of writes.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>

enum { WORDS = 16, WRITE_EVERY = 8 };

static long ops = 20000;

struct progress {
    _Alignas(PAGE) long reads, writes, retries;
    double longest_wait;
};

struct shared {
    _Alignas(PAGE) atomic_ulong sequence;
    struct {
        _Alignas(PAGE) atomic_ulong words[WORDS];
    } halves[2];
    struct progress ranks[MAX_RANKS];
};

static atomic_ulong *word(struct shared *shared, int k)
{
    return &shared->halves[k % 2].words[k / 2];
}

static unsigned long content(unsigned long version, int k)
{
    return version * (2 * (unsigned long)k + 1);
}

static void write_next(struct shared *shared)
{
    unsigned long sequence;
    unsigned turns = 0;
    for (;;) {
        sequence = atomic_load(&shared->sequence) & ~1UL;
        if (atomic_compare_exchange_weak(&shared->sequence, &sequence, sequence + 1))
            break;
        spin_wait(&turns);
    }
    unsigned long version = sequence / 2 + 1;
    for (int k = 0; k < WORDS; k++)
        atomic_store_explicit(word(shared, k), content(version, k), memory_order_release);
    atomic_store(&shared->sequence, sequence + 2);
}

/* Returns the version read; counts the retries. */
static unsigned long read_consistent(struct shared *shared, long *retries)
{
    unsigned turns = 0;
    for (;; ++*retries, spin_wait(&turns)) {
        unsigned long copy[WORDS], before = atomic_load(&shared->sequence);
        if (before & 1)
            continue;
        for (int k = 0; k < WORDS; k++)
            copy[k] = atomic_load_explicit(word(shared, k), memory_order_acquire);
        if (atomic_load(&shared->sequence) != before)
            continue;
        for (int k = 0; k < WORDS; k++)
            expect(copy[k] == content(before / 2, k), "torn read of version %lu: word %d is %lu",
                   before / 2, k, copy[k]);
        return before / 2;
    }
}

static void run(struct team *team)
{
    struct shared *shared = team_segment(team, 0, sizeof *shared);
    team_barrier(team);

    struct progress progress = {0};
    unsigned long last = 0;
    for (long k = 0; k < ops; k++) {
        double start = now();
        if (k % WRITE_EVERY == 0) {
            write_next(shared);
            progress.writes++;
        } else {
            unsigned long version = read_consistent(shared, &progress.retries);
            expect(version >= last, "version %lu was read after version %lu", version, last);
            last = version;
            progress.reads++;
        }
        if (now() - start > progress.longest_wait)
            progress.longest_wait = now() - start;
    }
    shared->ranks[team->rank] = progress;
    team_barrier(team);
    if (team->rank != 0)
        return;

    unsigned long writes = 0;
    printf("rank    reads   writes  retries  longest wait (ms)\n");
    for (int rank = 0; rank < team->ranks; rank++) {
        const struct progress *p = &shared->ranks[rank];
        printf("%4d %8ld %8ld %8ld %18.3f\n", rank, p->reads, p->writes, p->retries,
               p->longest_wait * 1e3);
        expect(p->reads + p->writes == ops, "rank %d was starved", rank);
        writes += (unsigned long)p->writes;
    }
    long retries = 0;
    unsigned long version = read_consistent(shared, &retries);
    expect(version == writes, "the last version is %lu after %lu writes", version, writes);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "operations of each rank", .number = &ops},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A seqlock over two pages.", 4, 1, settings, run});
}
