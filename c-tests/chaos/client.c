/*
 * A client that may be killed, stopped or cut off at any moment, and leaves a history of what it
 * did, to be judged by somebody else.
 *
 *     client create                     makes the objects
 *     client work LOG NUMBER SEED       works until SIGTERM; NUMBER is no other client's
 *     client finish LOG                 looks at everything that is left, and removes the objects
 *
 * Any number of clients work at once. What they do, with what must hold:
 *
 *   registers   atomic loads, stores, compare-and-swaps of single words: linearizable
 *   counters    atomic additions: linearizable
 *   bank        transfers between accounts under a lock (SEM_UNDO); whoever finds a transfer half
 *               done takes it back: the sum never changes
 *   ring        a bounded queue in memory under a lock: nothing lost, doubled or out of order
 *   messages    a message queue: the same
 *   tokens      two semaphores at once, with SEM_UNDO: all there in the end
 *
 * The log is a file that is mapped, so that what was noted survives SIGKILL. An operation is noted
 * when it begins (`invoked`), and when it is over (`returned`; 0 if it never was): it took effect
 * at one moment between the two, or, where it never returned, at any later moment or never.
 */
#include "common.h"

#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { KEY = 0x6d730000 };
enum { MEMORY_KEY = KEY, BANK_KEY, RING_KEY, LOCKS_KEY, TOKENS_KEY, MESSAGES_KEY };
enum { BANK_LOCK, RING_LOCK, LOCKS };
enum { REGISTERS = 8, COUNTERS = 2, ACCOUNTS = 16, SLOTS = 8, TOKENS = 4 };
enum { MEMORY_BYTES = 6 << 20, EXTENT = 2 << 20, DEPOSIT = 1000, TOKENS_EACH = 2 };
enum { TYPES = 3, MAX_TEXT = 64 };
enum { TICK_US = 20000, MAX_PAUSE_NS = 300000, PATIENCE_S = 20 };
enum { CAPACITY = 1 << 20 }; /* entries of a log */
/* What a client exits with when a page is lost for good. */
enum { EXIT_LOST = 7 };

enum kind { READ = 1, WRITE, SWAP, ADD, AUDIT, PUSH, POP, SEND, RECEIVE, TRANSFER, TAKE };

struct entry {
    uint64_t invoked, returned; /* nanoseconds, CLOCK_MONOTONIC */
    uint32_t kind, object;
    int64_t argument, expected; /* `expected` of SWAP */
    int64_t result;             /* or an errno, negative */
};

struct bank {
    struct {
        volatile long balance;
        char space[1016]; /* four to a page */
    } accounts[ACCOUNTS];
    volatile struct {
        long active, from, to, from_balance, to_balance;
    } journal;
    volatile long holder;
};

struct ring {
    volatile long head, tail;
    _Alignas(PAGE) struct {
        volatile long value;
        char space[2040];
    } slots[SLOTS];
    volatile long holder;
};

struct message {
    long type;
    int64_t value;
    unsigned char text[MAX_TEXT];
};

/* Words that share a cache line, a page, an extent, and ones that share none. */
static const size_t register_at[REGISTERS] = {
    0, 8, 64, 2048, PAGE, EXTENT, 2 * EXTENT - 8, 2 * EXTENT + 3 * PAGE,
};
static const size_t counter_at[COUNTERS] = {EXTENT + 8, 3 * PAGE};

static char *memory;
static struct bank *bank;
static struct ring *ring;
static int memory_id, bank_id, ring_id, locks, tokens, messages;

static struct entry *entries;
static size_t used;
static long number;      /* of this client */
static uint64_t written; /* values so far */
static volatile sig_atomic_t ending;

static uint64_t clock_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Begins an operation: nothing of it is done before the time is noted. */
static struct entry *invoke(enum kind kind, uint32_t object, int64_t argument)
{
    struct entry *entry = &entries[used++];
    entry->object = object;
    entry->argument = argument;
    entry->kind = kind;
    entry->invoked = clock_now();
    atomic_thread_fence(memory_order_seq_cst);
    return entry;
}

/* Ends it: all of it is done before the time is noted. */
static void conclude(struct entry *entry, int64_t result)
{
    atomic_thread_fence(memory_order_seq_cst);
    entry->result = result;
    atomic_signal_fence(memory_order_seq_cst);
    entry->returned = clock_now();
}

/* A value that nobody else uses. */
static int64_t fresh_value(void)
{
    return (int64_t)number << 32 | (int64_t)++written;
}

static _Atomic int64_t *word(size_t offset)
{
    return (_Atomic int64_t *)(memory + offset);
}

static void read_register(uint32_t index, int64_t *seen)
{
    struct entry *entry = invoke(READ, index, 0);
    *seen = atomic_load(word(register_at[index]));
    conclude(entry, *seen);
}

static void write_register(uint32_t index)
{
    int64_t value = fresh_value();
    struct entry *entry = invoke(WRITE, index, value);
    atomic_store(word(register_at[index]), value);
    conclude(entry, 0);
}

static void swap_register(uint32_t index, int64_t *seen)
{
    struct entry *entry = invoke(SWAP, index, fresh_value());
    entry->expected = *seen;
    atomic_compare_exchange_strong(word(register_at[index]), seen, entry->argument);
    conclude(entry, *seen);
}

static void add(uint32_t index, int64_t amount)
{
    struct entry *entry = invoke(ADD, index, amount);
    conclude(entry, atomic_fetch_add(word(counter_at[index]), amount));
}

/* A lock that a client's death frees. The ticks interrupt the wait. */
static void lock(unsigned short which)
{
    while (semop(locks, &(struct sembuf){which, -1, SEM_UNDO}, 1) < 0)
        if (errno != EINTR)
            err(1, "lock %d", which);
}

static void unlock(unsigned short which)
{
    while (semop(locks, &(struct sembuf){which, 1, SEM_UNDO}, 1) < 0)
        if (errno != EINTR)
            err(1, "unlock %d", which);
}

static void expect_holder(volatile long *holder, const char *what)
{
    if (*holder != number)
        errx(1, "clients %ld and %ld hold the lock of the %s at once", number, *holder, what);
}

static void lock_bank(void)
{
    lock(BANK_LOCK);
    bank->holder = number;
    if (bank->journal.active) {
        bank->accounts[bank->journal.from].balance = bank->journal.from_balance;
        bank->accounts[bank->journal.to].balance = bank->journal.to_balance;
        bank->journal.active = 0;
    }
}

static void unlock_bank(void)
{
    expect_holder(&bank->holder, "bank");
    unlock(BANK_LOCK);
}

static void transfer(long from, long to, long amount)
{
    struct entry *entry = invoke(TRANSFER, 0, amount);
    lock_bank();
    bank->journal.from = from;
    bank->journal.to = to;
    bank->journal.from_balance = bank->accounts[from].balance;
    bank->journal.to_balance = bank->accounts[to].balance;
    bank->journal.active = 1;
    bank->accounts[from].balance -= amount;
    bank->accounts[to].balance += amount;
    bank->journal.active = 0;
    unlock_bank();
    conclude(entry, 0);
}

static void audit(void)
{
    struct entry *entry = invoke(AUDIT, 0, ACCOUNTS * DEPOSIT);
    lock_bank();
    long sum = 0;
    for (int account = 0; account < ACCOUNTS; account++)
        sum += bank->accounts[account].balance;
    unlock_bank();
    conclude(entry, sum);
}

static void push(void)
{
    struct entry *entry = invoke(PUSH, 0, fresh_value());
    lock(RING_LOCK);
    ring->holder = number;
    bool full = ring->tail - ring->head == SLOTS;
    if (!full) {
        ring->slots[ring->tail % SLOTS].value = entry->argument;
        ring->tail++;
    }
    expect_holder(&ring->holder, "ring");
    unlock(RING_LOCK);
    conclude(entry, full ? -EAGAIN : 0);
}

/* Whether there was anything. What is about to be taken is noted first. */
static bool pop(void)
{
    struct entry *entry = invoke(POP, 0, 0);
    lock(RING_LOCK);
    ring->holder = number;
    bool empty = ring->tail == ring->head;
    if (!empty) {
        entry->argument = ring->slots[ring->head % SLOTS].value;
        ring->head++;
    }
    expect_holder(&ring->holder, "ring");
    unlock(RING_LOCK);
    conclude(entry, empty ? -EAGAIN : entry->argument);
    return !empty;
}

static void send_message(uint32_t type, size_t length, int flags)
{
    struct message message = {.type = type, .value = fresh_value()};
    memset(message.text, (unsigned char)message.value, length);
    struct entry *entry = invoke(SEND, type, message.value);
    int result = msgsnd(messages, &message, sizeof message.value + length, flags);
    if (result < 0 && errno != EAGAIN && errno != EINTR)
        err(1, "msgsnd");
    conclude(entry, result < 0 ? -errno : 0);
}

/* Whether a message came. */
static bool receive_message(long type, int flags)
{
    struct message message;
    struct entry *entry = invoke(RECEIVE, 0, type);
    size_t room = sizeof message.value + sizeof message.text;
    ssize_t length = msgrcv(messages, &message, room, type, flags);
    if (length < 0 && errno != ENOMSG && errno != EINTR)
        err(1, "msgrcv");
    if (length >= 0) {
        entry->object = (uint32_t)message.type;
        for (size_t i = 0; i < (size_t)length - sizeof message.value; i++)
            if (message.text[i] != (unsigned char)message.value)
                errx(1, "message %lx is damaged", (long)message.value);
    }
    conclude(entry, length < 0 ? -errno : message.value);
    return length >= 0;
}

static void take_tokens(unsigned short one, unsigned short other, uint64_t *random)
{
    struct entry *entry = invoke(TAKE, one, other);
    struct sembuf operations[] = {{one, -1, SEM_UNDO}, {other, -1, SEM_UNDO}};
    struct timespec limit = {.tv_nsec = (long)random_below(random, 5000000)};
    int result = semtimedop(tokens, operations, 2, &limit);
    if (result < 0 && errno != EAGAIN && errno != EINTR)
        err(1, "taking tokens");
    if (result == 0) {
        operations[0].sem_op = operations[1].sem_op = 1;
        while (semop(tokens, operations, 2) < 0)
            if (errno != EINTR)
                err(1, "returning tokens");
        result = 0;
    }
    conclude(entry, result < 0 ? -errno : 0);
}

static void detach_all(void)
{
    detach(memory);
    detach(bank);
    detach(ring);
}

static void attach_all(void)
{
    memory = attach(memory_id);
    bank = attach(bank_id);
    ring = attach(ring_id);
}

static void find_all(void)
{
    memory_id = (int)must(shmget(MEMORY_KEY, 0, 0));
    bank_id = (int)must(shmget(BANK_KEY, 0, 0));
    ring_id = (int)must(shmget(RING_KEY, 0, 0));
    locks = (int)must(semget(LOCKS_KEY, 0, 0));
    tokens = (int)must(semget(TOKENS_KEY, 0, 0));
    messages = (int)must(msgget(MESSAGES_KEY, 0));
}

static void open_log(const char *path)
{
    int file = (int)must(open(path, O_RDWR | O_CREAT | O_EXCL, 0600));
    size_t bytes = CAPACITY * sizeof *entries;
    must(ftruncate(file, (off_t)bytes));
    entries = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (entries == MAP_FAILED)
        err(1, "%s", path);
    close(file);
}

static void on_signal(int signal)
{
    if (signal == SIGTERM)
        ending = 1;
    if (signal == SIGBUS)
        _exit(EXIT_LOST);
}

static void catch_signals(void)
{
    /* Without SA_RESTART: what blocks is interrupted. */
    struct sigaction action = {.sa_handler = on_signal};
    must(sigaction(SIGTERM, &action, NULL));
    must(sigaction(SIGALRM, &action, NULL));
    must(sigaction(SIGBUS, &action, NULL));
    struct timeval tick = {.tv_usec = TICK_US};
    must(setitimer(ITIMER_REAL, &(struct itimerval){tick, tick}, NULL));
}

static void work(uint64_t random)
{
    int64_t seen[REGISTERS] = {0};
    while (!ending && used + 2 < CAPACITY) {
        uint64_t what = random_below(&random, 100);
        uint32_t index = (uint32_t)random_below(&random, REGISTERS);
        int flags = random_below(&random, 2) ? IPC_NOWAIT : 0;
        if (what < 20)
            read_register(index, &seen[index]);
        else if (what < 35)
            write_register(index);
        else if (what < 50)
            swap_register(index, &seen[index]);
        else if (what < 60)
            add((uint32_t)random_below(&random, COUNTERS), 1);
        else if (what < 68)
            transfer((long)random_below(&random, ACCOUNTS), (long)random_below(&random, ACCOUNTS),
                     (long)random_below(&random, DEPOSIT));
        else if (what < 70)
            audit();
        else if (what < 77)
            push();
        else if (what < 84)
            pop();
        else if (what < 90)
            send_message(1 + (uint32_t)random_below(&random, TYPES),
                         random_below(&random, MAX_TEXT + 1), flags);
        else if (what < 96)
            receive_message((long)random_below(&random, 2 * TYPES + 1) - TYPES, flags);
        else if (what < 99)
            take_tokens((unsigned short)random_below(&random, TOKENS),
                        (unsigned short)random_below(&random, TOKENS), &random);
        else {
            detach_all();
            attach_all();
        }
        if (random_below(&random, 2)) {
            struct timespec pause = {.tv_nsec = (long)random_below(&random, MAX_PAUSE_NS)};
            nanosleep(&pause, NULL);
        }
    }
}

static void create(void)
{
    memory_id = (int)must(shmget(MEMORY_KEY, MEMORY_BYTES, IPC_CREAT | IPC_EXCL | 0600));
    bank_id = (int)must(shmget(BANK_KEY, sizeof *bank, IPC_CREAT | IPC_EXCL | 0600));
    ring_id = (int)must(shmget(RING_KEY, sizeof *ring, IPC_CREAT | IPC_EXCL | 0600));
    locks = (int)must(semget(LOCKS_KEY, LOCKS, IPC_CREAT | IPC_EXCL | 0600));
    tokens = (int)must(semget(TOKENS_KEY, TOKENS, IPC_CREAT | IPC_EXCL | 0600));
    messages = (int)must(msgget(MESSAGES_KEY, IPC_CREAT | IPC_EXCL | 0600));
    bank = attach(bank_id);
    for (int account = 0; account < ACCOUNTS; account++)
        bank->accounts[account].balance = DEPOSIT;
    detach(bank);
    for (int which = 0; which < LOCKS; which++)
        semaphore_set(locks, which, 1);
    for (int which = 0; which < TOKENS; which++)
        semaphore_set(tokens, which, TOKENS_EACH);
}

static bool are_complete(void *nothing)
{
    (void)nothing;
    for (int which = 0; which < LOCKS; which++)
        if (semaphore_value(locks, which) != 1)
            return false;
    for (int which = 0; which < TOKENS; which++)
        if (semaphore_value(tokens, which) != TOKENS_EACH)
            return false;
    return true;
}

static bool are_detached(void *nothing)
{
    (void)nothing;
    return attach_count(memory_id) + attach_count(bank_id) + attach_count(ring_id) == 0;
}

static void finish(void)
{
    if (!eventually(PATIENCE_S, are_complete, NULL)) {
        for (int which = 0; which < LOCKS; which++)
            warnx("lock %d is %d", which, semaphore_value(locks, which));
        for (int which = 0; which < TOKENS; which++)
            warnx("%d tokens of %d at %d", semaphore_value(tokens, which), TOKENS_EACH, which);
        errx(1, "what dead clients held has not come back");
    }
    if (!eventually(PATIENCE_S, are_detached, NULL))
        errx(1, "dead clients are attached: memory %d, bank %d, ring %d", attach_count(memory_id),
             attach_count(bank_id), attach_count(ring_id));
    attach_all();
    int64_t seen;
    for (uint32_t index = 0; index < REGISTERS; index++)
        read_register(index, &seen);
    for (uint32_t index = 0; index < COUNTERS; index++)
        add(index, 0);
    audit();
    while (pop())
        ;
    while (receive_message(0, IPC_NOWAIT))
        ;
    detach_all();
    must(shmctl(memory_id, IPC_RMID, NULL));
    must(shmctl(bank_id, IPC_RMID, NULL));
    must(shmctl(ring_id, IPC_RMID, NULL));
    must(semctl(locks, 0, IPC_RMID));
    must(semctl(tokens, 0, IPC_RMID));
    must(msgctl(messages, IPC_RMID, NULL));
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "create") == 0 && argc == 2) {
        create();
    } else if (strcmp(what, "work") == 0 && argc == 5) {
        number = strtol(argv[3], NULL, 0);
        open_log(argv[2]);
        catch_signals();
        find_all();
        attach_all();
        work(strtoull(argv[4], NULL, 0));
        detach_all();
    } else if (strcmp(what, "finish") == 0 && argc == 3) {
        open_log(argv[2]);
        find_all();
        finish();
    } else {
        fprintf(stderr, "usage: %s create | work LOG NUMBER SEED | finish LOG\n",
                argv[0]);
        return 2;
    }
    return 0;
}
