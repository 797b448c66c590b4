/*
 * Memory-model litmus tests over several processes.
 *
 * A test is a few tiny threads of loads, stores and atomic additions on locations x, y, z. Its
 * outcome is what the loads returned and what the locations hold at the end. What outcomes are
 * allowed is not written down but computed: explore() runs every interleaving on an abstract
 * machine, sequentially consistent or x86-TSO (a FIFO store buffer per thread).
 *
 *   --order sc       seq_cst atomics               judged by sequential consistency
 *   --order fenced   plain moves, mfence between   judged by sequential consistency
 *   --order relaxed  plain moves                   judged by x86-TSO: store buffers are hardware's
 *                                                  right, even on a single machine
 *
 * A batch is many instances of one test, each on its own locations (each on its own page unless
 * --stride says otherwise). Rank 0 resets the batch; a barrier; all ranks run through it; a
 * barrier; rank 0 judges. The roles rotate over the ranks, and ranks pass through the instances in
 * windows shuffled differently, with small random delays, so that interleavings vary. Each rank
 * first reads some locations, to hold copies that a coherence protocol must invalidate.
 *
 * A location holds epoch * VALUES + value, the epoch being new for each batch: a value of another
 * epoch is a stale read, which is never allowed.
 *
 * --readers lets all loads of a test go through a second attach, made as a user who may only read:
 * needs root. Two such users take turns over the ranks.
 *
 * --broken gives each rank a private copy of the batch, refreshed now and then, and so must fail:
 * it shows that the judge can.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <unistd.h>

enum {
    LOCATIONS = 3,
    REGISTERS = 4,
    THREADS = 4,
    OPERATIONS = 2, /* of one thread, at most */
    VALUES = 4,
    OUTCOME_DIGITS = REGISTERS + LOCATIONS,
    OUTCOMES = 1 << (2 * OUTCOME_DIGITS),
    MAX_BATCH = 1 << 16,
};

struct operation {
    enum { END, LOAD, STORE, ADD } kind;
    int location;
    int value; /* STORE: what to store; LOAD, ADD: the register that gets the old value */
};

struct test {
    const char *name;
    int threads, registers, locations;
    struct operation code[THREADS][OPERATIONS];
};

enum { X, Y, Z };
#define W(location, value) {STORE, location, value}
#define R(location, reg) {LOAD, location, reg}
#define A(location, reg) {ADD, location, reg}

static const struct test TESTS[] = {
    {"SB", 2, 2, 2, {{W(X, 1), R(Y, 0)}, {W(Y, 1), R(X, 1)}}},
    {"MP", 2, 2, 2, {{W(X, 1), W(Y, 1)}, {R(Y, 0), R(X, 1)}}},
    {"LB", 2, 2, 2, {{R(X, 0), W(Y, 1)}, {R(Y, 1), W(X, 1)}}},
    {"R", 2, 1, 2, {{W(X, 1), W(Y, 1)}, {W(Y, 2), R(X, 0)}}},
    {"S", 2, 1, 2, {{W(X, 2), W(Y, 1)}, {R(Y, 0), W(X, 1)}}},
    {"2+2W", 2, 0, 2, {{W(X, 1), W(Y, 2)}, {W(Y, 1), W(X, 2)}}},
    {"WRC", 3, 3, 2, {{W(X, 1)}, {R(X, 0), W(Y, 1)}, {R(Y, 1), R(X, 2)}}},
    {"ISA2", 3, 3, 3, {{W(X, 1), W(Y, 1)}, {R(Y, 0), W(Z, 1)}, {R(Z, 1), R(X, 2)}}},
    {"IRIW", 4, 4, 2, {{W(X, 1)}, {W(Y, 1)}, {R(X, 0), R(Y, 1)}, {R(Y, 2), R(X, 3)}}},
    {"CoWW", 2, 1, 1, {{W(X, 1), W(X, 2)}, {R(X, 0)}}},
    {"CoWR", 2, 1, 1, {{W(X, 1), R(X, 0)}, {W(X, 2)}}},
    {"CoRW", 2, 1, 1, {{R(X, 0), W(X, 1)}, {W(X, 2)}}},
    {"CoRR", 2, 2, 1, {{W(X, 1)}, {R(X, 0), R(X, 1)}}},
    {"CoRR2", 4, 4, 1, {{W(X, 1)}, {W(X, 2)}, {R(X, 0), R(X, 1)}, {R(X, 2), R(X, 3)}}},
    {"Add", 3, 3, 1, {{A(X, 0)}, {A(X, 1)}, {A(X, 2)}}},
};
enum { TEST_COUNT = sizeof TESTS / sizeof TESTS[0] };

static long rounds = 100000, batch = 256, stride = PAGE, seed = 1;
static const char *order_name = "sc", *only;
static bool broken, verbose, readers;

static enum order { SC, FENCED, RELAXED } order;

/* ---- the abstract machine: which outcomes are allowed ---- */

struct machine {
    int next[THREADS]; /* index of the thread's next operation */
    int memory[LOCATIONS];
    int registers[REGISTERS];
    struct {
        int first, end;
        struct operation stores[OPERATIONS];
    } buffer[THREADS];
};

static unsigned outcome_of(const int *registers, const int *memory)
{
    unsigned outcome = 0;
    for (int k = 0; k < REGISTERS; k++)
        outcome = outcome * VALUES + (unsigned)registers[k];
    for (int k = 0; k < LOCATIONS; k++)
        outcome = outcome * VALUES + (unsigned)memory[k];
    return outcome;
}

/* Marks every outcome that can follow from `m`: any thread steps, or any buffer drains a store. */
static void explore(const struct test *test, bool buffered, struct machine m, bool *allowed)
{
    bool finished = true;
    for (int t = 0; t < test->threads; t++) {
        int first = m.buffer[t].first, end = m.buffer[t].end;
        if (first < end) {
            finished = false;
            struct machine after = m;
            struct operation store = m.buffer[t].stores[first];
            after.memory[store.location] = store.value;
            after.buffer[t].first++;
            explore(test, buffered, after, allowed);
        }
        int next = m.next[t];
        if (next == OPERATIONS || test->code[t][next].kind == END)
            continue;
        finished = false;
        struct operation op = test->code[t][next];
        struct machine after = m;
        after.next[t]++;
        switch (op.kind) {
        case STORE:
            if (buffered)
                after.buffer[t].stores[after.buffer[t].end++] = op;
            else
                after.memory[op.location] = op.value;
            break;
        case LOAD:
            after.registers[op.value] = m.memory[op.location];
            for (int k = first; k < end; k++) /* the thread sees its own pending stores */
                if (m.buffer[t].stores[k].location == op.location)
                    after.registers[op.value] = m.buffer[t].stores[k].value;
            break;
        default: /* ADD: a locked instruction waits until the buffer is empty */
            if (first < end)
                continue;
            after.registers[op.value] = after.memory[op.location]++;
        }
        explore(test, buffered, after, allowed);
    }
    if (finished)
        allowed[outcome_of(m.registers, m.memory)] = true;
}

/* ---- the shared segment ---- */

/* What each rank saw, published at the end of a batch: one row of registers per instance. */
typedef uint64_t row[REGISTERS];

struct arena {
    unsigned char *locations; /* batch * LOCATIONS words, `stride` bytes apart */
    unsigned char *view;      /* the same, for loads */
    row *results;             /* written by the rank that plays the thread, register by register */
    unsigned char *copy;      /* --broken: this rank's private copy of the locations */
    size_t locations_size;
};

static size_t round_up(size_t size)
{
    return (size + PAGE - 1) / PAGE * PAGE;
}

static _Atomic uint64_t *location(unsigned char *base, long instance, int index)
{
    return (_Atomic uint64_t *)(base + (size_t)(instance * LOCATIONS + index) * (size_t)stride);
}

/* ---- running ---- */

static void fence(void)
{
#if defined __x86_64__ || defined __i386__
    __asm__ volatile("mfence" ::: "memory");
#else
    atomic_thread_fence(memory_order_seq_cst);
#endif
}

static uint64_t load(_Atomic uint64_t *at)
{
    return order == SC ? atomic_load(at) : atomic_load_explicit(at, memory_order_relaxed);
}

static void store(_Atomic uint64_t *at, uint64_t word)
{
    if (order == SC)
        atomic_store(at, word);
    else
        atomic_store_explicit(at, word, memory_order_relaxed);
}

/* One operation on one copy of the locations. */
static uint64_t perform(unsigned char *base, long instance, const struct operation *op,
                        uint64_t epoch)
{
    _Atomic uint64_t *at = location(base, instance, op->location);
    switch (op->kind) {
    case STORE:
        store(at, epoch * VALUES + (uint64_t)op->value);
        return 0;
    case ADD:
        return atomic_fetch_add(at, 1);
    default:
        return load(at);
    }
}

static void run_thread(const struct arena *arena, const struct test *test, int thread,
                       long instance, uint64_t epoch, uint64_t *seen)
{
    for (int k = 0; k < OPERATIONS && test->code[thread][k].kind != END; k++) {
        const struct operation *op = &test->code[thread][k];
        unsigned char *base = op->kind == LOAD ? arena->view : arena->locations;
        uint64_t word = perform(base, instance, op, epoch);
        if (broken)
            word = perform(arena->copy, instance, op, epoch);
        if (op->kind != STORE)
            seen[op->value] = word;
        if (order == FENCED)
            fence();
        else
            atomic_signal_fence(memory_order_seq_cst); /* plain moves, but in program order */
    }
}

/* The instances in this rank's order: shuffled within windows of the same size on all ranks. */
static void shuffle(long *sequence, long window, uint64_t *random)
{
    for (long k = 0; k < batch; k++)
        sequence[k] = k;
    for (long start = 0; start < batch; start += window) {
        long end = start + window < batch ? start + window : batch;
        for (long k = end - 1; k > start; k--) {
            long other = start + (long)random_below(random, (uint64_t)(k - start + 1));
            long kept = sequence[k];
            sequence[k] = sequence[other];
            sequence[other] = kept;
        }
    }
}

static void small_delay(uint64_t *random)
{
    volatile unsigned spin = (unsigned)random_below(random, 4) == 0
                                 ? (unsigned)random_below(random, 200) : 0;
    while (spin > 0)
        spin--;
}

/* This rank's part of one batch. `seen` is private until the batch is over. */
static void run_batch(const struct team *team, const struct arena *arena, const struct test *test,
                      uint64_t epoch, uint64_t *random, row *seen, long *sequence)
{
    static const long windows[] = {1, 1, 4, 16, MAX_BATCH};
    uint64_t common = (uint64_t)seed + epoch; /* the same on all ranks */
    shuffle(sequence, windows[random_below(&common, 5)], random);

    for (long k = 0; k < batch; k++)
        if (random_below(random, 4) == 0)
            load(location(arena->view, k, (int)random_below(random, LOCATIONS)));
    if (broken)
        memcpy(arena->copy, arena->locations, arena->locations_size);

    for (long k = 0; k < batch; k++) {
        long instance = sequence[k];
        int thread = (int)((team->rank + instance) % team->ranks);
        if (thread >= test->threads)
            continue;
        small_delay(random);
        run_thread(arena, test, thread, instance, epoch, seen[instance]);
        if (broken && random_below(random, 64) == 0)
            memcpy(arena->copy, arena->locations, arena->locations_size);
    }
    for (long k = 0; k < batch; k++) {
        int thread = (int)((team->rank + k) % team->ranks);
        if (thread >= test->threads)
            continue;
        for (int o = 0; o < OPERATIONS && test->code[thread][o].kind != END; o++)
            if (test->code[thread][o].kind != STORE) {
                int reg = test->code[thread][o].value;
                arena->results[k][reg] = seen[k][reg];
            }
    }
}

/* ---- judging ---- */

struct verdict {
    bool allowed[OUTCOMES];
    uint64_t seen[OUTCOMES];
    uint64_t stale;
};

static bool decode(uint64_t word, uint64_t epoch, int *value)
{
    *value = (int)(word % VALUES);
    return word / VALUES == epoch;
}

static void judge_batch(const struct arena *arena, const struct test *test, uint64_t epoch,
                        struct verdict *verdict)
{
    for (long k = 0; k < batch; k++) {
        int registers[REGISTERS] = {0}, memory[LOCATIONS] = {0};
        bool fresh = true;
        for (int r = 0; r < test->registers; r++)
            fresh &= decode(arena->results[k][r], epoch, &registers[r]);
        for (int l = 0; l < test->locations; l++)
            fresh &= decode(atomic_load(location(arena->locations, k, l)), epoch, &memory[l]);
        if (fresh)
            verdict->seen[outcome_of(registers, memory)]++;
        else
            verdict->stale++;
    }
}

/* Prints an outcome as its registers, a colon, the final locations, an equals sign, the count. */
static void print_outcome(const struct test *test, unsigned outcome, const struct verdict *verdict)
{
    char digits[OUTCOME_DIGITS];
    for (int k = OUTCOME_DIGITS - 1; k >= 0; k--, outcome /= VALUES)
        digits[k] = (char)('0' + outcome % VALUES);
    outcome = 0;
    for (int k = 0; k < OUTCOME_DIGITS; k++)
        outcome = outcome * VALUES + (unsigned)(digits[k] - '0');
    printf(" %.*s:%.*s=%llu%s", test->registers, digits, test->locations, digits + REGISTERS,
           (unsigned long long)verdict->seen[outcome], verdict->allowed[outcome] ? "" : "!");
}

static uint64_t report(const struct test *test, const struct verdict *verdict, long instances,
                       double seconds)
{
    uint64_t forbidden = verdict->stale;
    int seen = 0, allowed = 0;
    for (unsigned k = 0; k < OUTCOMES; k++) {
        allowed += verdict->allowed[k];
        seen += verdict->allowed[k] && verdict->seen[k];
        if (!verdict->allowed[k])
            forbidden += verdict->seen[k];
    }
    printf("%-6s %9ld %7.2f %4d/%-4d %9llu ", test->name, instances, seconds, seen, allowed,
           (unsigned long long)forbidden);
    enum { SHORT_LIST = 6 };
    int listed = 0;
    for (unsigned k = 0; k < OUTCOMES; k++)
        if (verdict->seen[k] && (verbose || !verdict->allowed[k] || listed < SHORT_LIST)) {
            print_outcome(test, k, verdict);
            listed++;
        }
    if (!verbose && listed < seen)
        printf(" ...");
    if (verdict->stale)
        printf(" stale=%llu!", (unsigned long long)verdict->stale);
    putchar('\n');
    fflush(stdout);
    return forbidden;
}

static void parse_options(const struct team *team)
{
    if (strcmp(order_name, "sc") == 0)
        order = SC;
    else if (strcmp(order_name, "fenced") == 0)
        order = FENCED;
    else if (strcmp(order_name, "relaxed") == 0)
        order = RELAXED;
    else
        die("--order is sc, fenced or relaxed, not %s", order_name);
#if !defined __x86_64__ && !defined __i386__
    expect(order == SC, "--order %s is judged by x86's model", order_name);
#endif
    expect(batch > 0 && batch <= MAX_BATCH, "--batch is at most %d", MAX_BATCH);
    expect(stride >= 8 && stride <= 1 << 21 && stride % 8 == 0, "--stride is a multiple of 8");
    bool known = !only;
    for (int k = 0; k < TEST_COUNT; k++)
        known |= only && strcmp(only, TESTS[k].name) == 0;
    expect(known, "no test is named %s", only);
    if (team->rank == 0)
        printf("order %s, judged by %s, %d ranks, stride %ld%s\n"
               "an outcome is REGISTERS:FINAL MEMORY=COUNT, ! marks a forbidden one\n"
               "test   instances seconds seen/allowed forbidden outcomes\n",
               order_name, order == RELAXED ? "x86-TSO" : "sequential consistency", team->ranks,
               stride, broken ? ", BROKEN on purpose" : "");
}

/* The segment, attached by a user who may only read. */
static void *attach_to_read(struct team *team)
{
    enum { FIRST_READER = 65000, USERS = 2 };
    int segment = (int)must(shmget(team_key(team, 0), 0, 0));
    if (team->rank == 0) {
        struct shmid_ds status;
        must(shmctl(segment, IPC_STAT, &status));
        status.shm_perm.mode = 0644;
        must(shmctl(segment, IPC_SET, &status));
    }
    team_barrier(team);
    must(seteuid((uid_t)(FIRST_READER + team->rank / 2 % USERS)));
    expect_errno(shmat(segment, NULL, 0), EACCES);
    void *address = shmat(segment, NULL, SHM_RDONLY);
    if (address == (void *)-1)
        die_errno("shmat(SHM_RDONLY)");
    must(seteuid(0));
    return address;
}

static void run(struct team *team)
{
    parse_options(team);
    struct arena arena = {
        .locations_size = round_up((size_t)(batch * LOCATIONS) * (size_t)stride),
    };
    size_t results_size = round_up((size_t)batch * sizeof(row));
    arena.locations = team_segment(team, 0, arena.locations_size + results_size);
    arena.results = (row *)(arena.locations + arena.locations_size);
    arena.view = readers ? attach_to_read(team) : arena.locations;
    arena.copy = broken ? malloc(arena.locations_size) : NULL;
    row *seen = calloc((size_t)batch, sizeof(row));
    long *sequence = calloc((size_t)batch, sizeof *sequence);
    struct verdict *verdict = malloc(sizeof *verdict);
    if (!seen || !sequence || !verdict || (broken && !arena.copy))
        die("out of memory");

    uint64_t random = (uint64_t)seed * MAX_RANKS + (uint64_t)team->rank, epoch = 0, forbidden = 0;
    long batches = (rounds + batch - 1) / batch;
    for (int k = 0; k < TEST_COUNT; k++) {
        const struct test *test = &TESTS[k];
        if (test->threads > team->ranks || (only && strcmp(only, test->name) != 0))
            continue;
        memset(verdict, 0, sizeof *verdict);
        explore(test, order == RELAXED, (struct machine){0}, verdict->allowed);
        double start = now();
        for (long b = 0; b < batches; b++) {
            epoch++;
            if (team->rank == 0)
                for (long i = 0; i < batch; i++)
                    for (int l = 0; l < LOCATIONS; l++)
                        atomic_store(location(arena.locations, i, l), epoch * VALUES);
            team_barrier(team);
            run_batch(team, &arena, test, epoch, &random, seen, sequence);
            team_barrier(team);
            if (team->rank == 0)
                judge_batch(&arena, test, epoch, verdict);
        }
        if (team->rank == 0)
            forbidden += report(test, verdict, batches * batch, now() - start);
    }
    if (forbidden)
        die("%llu forbidden outcomes", (unsigned long long)forbidden);
    free(seen);
    free(sequence);
    free(verdict);
    free(arena.copy);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "instances of each test", .number = &rounds},
        {.name = "batch", .meaning = "instances between barriers", .number = &batch},
        {.name = "stride", .meaning = "bytes between locations", .number = &stride},
        {.name = "order", .meaning = "sc, fenced or relaxed", .text = &order_name},
        {.name = "test", .meaning = "only this test", .text = &only},
        {.name = "readers", .meaning = "load as a user who may only read", .flag = &readers},
        {.name = "seed", .meaning = "of delays and orders", .number = &seed},
        {.name = "broken", .meaning = "stale private copies: must fail", .flag = &broken},
        {.name = "verbose", .meaning = "list all outcomes", .flag = &verbose},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Memory-model litmus tests, judged by exhaustive models.", 4,
                                       2, settings, run});
}
