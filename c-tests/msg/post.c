/*
 * Producers and consumers by type, over one queue that is kept nearly full.
 *
 * Even ranks produce, odd ranks consume. Each consumer has a type of its own and sometimes asks for
 * it by other means: as the lowest type up to its own where it is the first consumer, or with room
 * for less than the text (E2BIG, then the same message in full). A message says who sent it, as
 * which of his to this consumer, and is filled from a generator seeded with that: so a message that
 * is lost, doubled, torn, out of its producer's order or in the wrong hands is noticed. At the end
 * everybody's sums are compared.
 *
 * --interrupt lets signals come all the time: a call then fails with EINTR and has done nothing, or
 * succeeds and has done all.
 */
#include "common.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { CAPACITY = 4000, TEXT_MAX = 1500 };

static long messages = 5000;
static bool interrupt;
static unsigned long interrupted;

struct letter {
    long type;
    struct {
        int from;
        int number;
        unsigned char fill[TEXT_MAX];
    } text;
};

enum { HEADER = offsetof(struct letter, text.fill) - offsetof(struct letter, text) };

/* What a rank has sent or got. */
struct sums {
    unsigned long messages, bytes, check;
};

static void post(int queue, const struct letter *letter, size_t size)
{
    while (msgsnd(queue, letter, size, 0) < 0) {
        if (errno != EINTR)
            die_errno("msgsnd(%zu bytes)", size);
        interrupted++;
    }
}

static ssize_t collect(int queue, struct letter *letter, size_t room, long type)
{
    ssize_t got;
    while ((got = msgrcv(queue, letter, room, type, 0)) < 0 && errno == EINTR)
        interrupted++;
    return got;
}

static void on_signal(int signal)
{
    (void)signal;
}

/* SA_RESTART restarts neither msgsnd nor msgrcv. */
static void signals_every(long microseconds)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    must(sigaction(SIGPROF, &action, NULL));
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGPROF};
    must(timer_create(CLOCK_MONOTONIC, &event, &timer));
    struct timespec period = {.tv_nsec = microseconds * 1000};
    must(timer_settime(timer, 0, &(struct itimerspec){period, period}, NULL));
}

static size_t length_of(uint64_t *state)
{
    /* Small ones mostly, that pass the large ones which wait for room. */
    return (size_t)random_below(state, random_below(state, 8) ? 40 : TEXT_MAX + 1);
}

static uint64_t seed_of(int from, int to, int number)
{
    return (uint64_t)from << 48 ^ (uint64_t)to << 40 ^ (uint64_t)number;
}

static void add(struct sums *sums, const struct letter *letter, size_t fill)
{
    sums->messages++;
    sums->bytes += fill;
    for (size_t k = 0; k < fill; k++)
        sums->check += letter->text.fill[k] * (k + 1);
}

static void produce(const struct team *team, int queue, struct sums *sums)
{
    static int numbers[MAX_RANKS];
    static struct letter letter;
    uint64_t choice = (uint64_t)team->rank + 1;
    int consumers = team->ranks / 2;
    for (long k = 0; k < messages; k++) {
        int to = (int)random_below(&choice, (uint64_t)consumers);
        uint64_t state = seed_of(team->rank, to, numbers[to]);
        size_t fill = length_of(&state);
        letter.type = to + 1;
        letter.text.from = team->rank;
        letter.text.number = numbers[to]++;
        for (size_t i = 0; i < fill; i++)
            letter.text.fill[i] = (unsigned char)random_next(&state);
        post(queue, &letter, HEADER + fill);
        add(sums, &letter, fill);
    }
    /* The end, for each consumer. */
    for (int to = 0; to < consumers; to++) {
        letter.type = to + 1;
        letter.text.from = team->rank;
        letter.text.number = -1 - numbers[to];
        post(queue, &letter, HEADER);
    }
}

static void consume(const struct team *team, int queue, struct sums *sums)
{
    static int numbers[MAX_RANKS];
    static struct letter letter;
    int self = team->rank / 2, producers = (team->ranks + 1) / 2;
    uint64_t choice = (uint64_t)team->rank + 1000;
    while (producers > 0) {
        long type = self == 0 && random_below(&choice, 2) ? -1 : self + 1;
        size_t room = sizeof letter.text;
        if (random_below(&choice, 10) == 0)
            room = HEADER - 1;
        ssize_t got = collect(queue, &letter, room, type);
        if (room < HEADER) {
            expect(got == -1 && errno == E2BIG, "%zd instead of E2BIG", got);
            continue;
        }
        must(got);
        expect(letter.type == self + 1, "a message of type %ld, not %d", letter.type, self + 1);
        int from = letter.text.from;
        expect(got >= HEADER && from >= 0 && from < team->ranks && from % 2 == 0,
               "a message of %zd bytes from %d", got, from);
        if (letter.text.number < 0) {
            expect(-1 - letter.text.number == numbers[from], "%d messages from %d, not %d",
                   numbers[from], from, -1 - letter.text.number);
            producers--;
            continue;
        }
        expect(letter.text.number == numbers[from], "message %d from %d, not %d",
               letter.text.number, from, numbers[from]);
        uint64_t state = seed_of(from, self, numbers[from]++);
        size_t fill = length_of(&state);
        expect((size_t)got == HEADER + fill, "%zd bytes, not %zu", got, HEADER + fill);
        for (size_t i = 0; i < fill; i++)
            expect(letter.text.fill[i] == (unsigned char)random_next(&state),
                   "byte %zu of %zu is damaged", i, fill);
        add(sums, &letter, fill);
    }
}

static void run(struct team *team)
{
    int queue = team_queue(team, 0), results = team_queue(team, 1);
    if (team->rank == 0) {
        struct msqid_ds status;
        must(msgctl(queue, IPC_STAT, &status));
        status.msg_qbytes = CAPACITY;
        must(msgctl(queue, IPC_SET, &status));
    }
    team_barrier(team);
    struct {
        long type;
        struct sums sums;
    } result = {.type = 1 + team->rank % 2};
    double start = now();
    if (interrupt)
        signals_every(300 + 50 * team->rank);
    if (team->rank % 2 == 0)
        produce(team, queue, &result.sums);
    else
        consume(team, queue, &result.sums);
    signal(SIGPROF, SIG_IGN);
    must(msgsnd(results, &result, sizeof result.sums, 0));
    team_barrier(team);
    if (team->rank != 0)
        return;

    struct sums sent[2] = {0}; /* sent, got */
    for (int k = 0; k < team->ranks; k++) {
        must(msgrcv(results, &result, sizeof result.sums, 0, IPC_NOWAIT));
        sent[result.type - 1].messages += result.sums.messages;
        sent[result.type - 1].bytes += result.sums.bytes;
        sent[result.type - 1].check += result.sums.check;
    }
    expect(memcmp(&sent[0], &sent[1], sizeof sent[0]) == 0,
           "sent %lu messages, %lu bytes, checksum %lx; got %lu, %lu, %lx", sent[0].messages,
           sent[0].bytes, sent[0].check, sent[1].messages, sent[1].bytes, sent[1].check);
    struct msqid_ds status;
    must(msgctl(queue, IPC_STAT, &status));
    expect(status.msg_qnum == 0 && status.__msg_cbytes == 0, "%lu messages, %lu bytes are left",
           (unsigned long)status.msg_qnum, (unsigned long)status.__msg_cbytes);
    printf("%lu messages, %lu bytes, checksum %lx: exact; %.0f messages/s", sent[0].messages,
           sent[0].bytes, sent[0].check, (double)sent[0].messages / (now() - start));
    if (interrupt)
        printf("; rank 0 was interrupted %lu times", interrupted);
    printf("\n");
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "messages", .meaning = "of each producer", .number = &messages},
        {.name = "interrupt", .meaning = "by signals all the time", .flag = &interrupt},
        {0},
    };
    return team_main(
        argc, argv,
        &(struct program){"Producers and consumers by type.", 4, 2, settings, run});
}
