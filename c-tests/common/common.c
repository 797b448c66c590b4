/*
 * The team: see common.h for what it promises.
 *
 * The barrier: every rank but 0 tells that it has arrived; when rank 0 has heard of all, it lets
 * them go. Two semaphores to go by take turns, so that a rank that is early at the next barrier does
 * not take what lets a late one go from this. All begin at zero, as they are made: no one needs to
 * initialise anything.
 */
#include "common.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PHASES = 2, ARRIVALS = PHASES, DEPARTURES, CONTROL_SEMAPHORES };
enum { EXIT_USAGE = 2, EXIT_TIMEOUT = 3 };

static const double FIND_SECONDS = 30; /* how long a rank looks for rank 0's objects */
static const double CLEANUP_SECONDS = 1;

static const char *program_name = "?";
static int own_rank = -1;
static long timeout_seconds = 120;
static char timeout_message[160];

/* What a rank created or found, to be removed at the end or when it fails. */
static struct {
    enum { SEGMENT, SEMAPHORES, QUEUE } kind;
    int id;
} objects[3 * MAX_SLOTS + 2];
static int object_count;

static void remember(int kind, int id)
{
    objects[object_count].kind = kind;
    objects[object_count++].id = id;
}

static void remove_objects(void)
{
    while (object_count > 0) {
        object_count--;
        if (objects[object_count].kind == SEGMENT)
            shmctl(objects[object_count].id, IPC_RMID, NULL);
        else if (objects[object_count].kind == QUEUE)
            msgctl(objects[object_count].id, IPC_RMID, NULL);
        else
            semctl(objects[object_count].id, 0, IPC_RMID);
    }
}

static void complain(const char *format, va_list arguments, int error)
{
    char text[512];
    vsnprintf(text, sizeof text, format, arguments);
    if (error)
        fprintf(stderr, "%s: rank %d: %s: %s\n", program_name, own_rank, text, strerror(error));
    else
        fprintf(stderr, "%s: rank %d: %s\n", program_name, own_rank, text);
}

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    complain(format, arguments, 0);
    va_end(arguments);
    remove_objects();
    exit(EXIT_FAILURE);
}

void die_errno(const char *format, ...)
{
    int error = errno;
    va_list arguments;
    va_start(arguments, format);
    complain(format, arguments, error);
    va_end(arguments);
    remove_objects();
    exit(EXIT_FAILURE);
}

long must_(const char *file, int line, const char *call, long value)
{
    if (value == -1)
        die_errno("%s:%d: %s", file, line, call);
    return value;
}

/* The objects stay: a handler that interrupted an IPC call had better not make another. */
static void on_alarm(int signal)
{
    (void)signal;
    if (write(STDERR_FILENO, timeout_message, strlen(timeout_message)) < 0)
        _exit(EXIT_TIMEOUT + 1);
    _exit(EXIT_TIMEOUT);
}

void watchdog(void)
{
    snprintf(timeout_message, sizeof timeout_message,
             "%s: rank %d: watchdog: still running after %ld s\n", program_name, own_rank,
             timeout_seconds);
    struct sigaction action = {.sa_handler = on_alarm};
    must(sigaction(SIGALRM, &action, NULL));
    alarm((unsigned)timeout_seconds);
}

pid_t fork_watched(void)
{
    fflush(NULL);
    pid_t child = (pid_t)must(fork());
    if (child == 0)
        watchdog();
    return child;
}

void expect_success(pid_t child, const char *who)
{
    int status;
    must(waitpid(child, &status, 0));
    if (WIFSIGNALED(status))
        die("%s was killed by signal %d", who, WTERMSIG(status));
    if (WEXITSTATUS(status) != 0)
        die("%s exited with status %d", who, WEXITSTATUS(status));
}

void kill_child(pid_t child)
{
    must(kill(child, SIGKILL));
    must(waitpid(child, NULL, 0));
}

/* Calls `get` until the key exists, as long as it is reasonable to wait for rank 0. */
static int find(key_t key, const char *what, int (*get)(key_t))
{
    double deadline = now() + FIND_SECONDS;
    for (;;) {
        int id = get(key);
        if (id >= 0)
            return id;
        if (errno != ENOENT)
            die_errno("looking for %s with key 0x%x", what, (unsigned)key);
        if (now() > deadline)
            die("no %s with key 0x%x after %.0f s", what, (unsigned)key, FIND_SECONDS);
        nap();
    }
}

static int get_segment(key_t key)
{
    return shmget(key, 0, 0600);
}

static int get_semaphores(key_t key)
{
    return semget(key, 0, 0600);
}

static int get_queue(key_t key)
{
    return msgget(key, 0600);
}

static int semaphores_for(const struct team *team, key_t key, int count)
{
    int id;
    if (team->rank == 0) {
        id = semget(key, count, IPC_CREAT | IPC_EXCL | 0600);
        if (id < 0)
            die_errno("semget(key 0x%x, %d semaphores)", (unsigned)key, count);
    } else {
        id = find(key, "semaphore set", get_semaphores);
    }
    remember(SEMAPHORES, id);
    return id;
}

key_t team_key(const struct team *team, int slot)
{
    return team->key + 1 + slot;
}

int team_semaphores(const struct team *team, int slot, int count)
{
    return semaphores_for(team, team_key(team, slot), count);
}

int team_segment_id(const struct team *team, int slot, size_t size)
{
    key_t key = team_key(team, slot);
    int id;
    if (team->rank == 0) {
        id = shmget(key, size, IPC_CREAT | IPC_EXCL | 0600);
        if (id < 0)
            die_errno("shmget(key 0x%x, %zu bytes)", (unsigned)key, size);
    } else {
        id = find(key, "segment", get_segment);
    }
    remember(SEGMENT, id);
    return id;
}

int team_queue(const struct team *team, int slot)
{
    key_t key = team_key(team, slot);
    int id;
    if (team->rank == 0) {
        id = msgget(key, IPC_CREAT | IPC_EXCL | 0600);
        if (id < 0)
            die_errno("msgget(key 0x%x)", (unsigned)key);
    } else {
        id = find(key, "message queue", get_queue);
    }
    remember(QUEUE, id);
    return id;
}

void *team_segment(const struct team *team, int slot, size_t size)
{
    return attach(team_segment_id(team, slot, size));
}

void *attach(int segment)
{
    void *address = shmat(segment, NULL, 0);
    if (address == (void *)-1)
        die_errno("shmat(%d)", segment);
    return address;
}

void detach(const void *address)
{
    must(shmdt(address));
}

void semaphore_change(int set, int index, int delta, int flags)
{
    struct sembuf operation = {(unsigned short)index, (short)delta, (short)flags};
    while (semop(set, &operation, 1) < 0)
        if (errno != EINTR)
            die_errno("semop(%d, semaphore %d, %+d)", set, index, delta);
}

int semaphore_value(int set, int index)
{
    return (int)must(semctl(set, index, GETVAL));
}

void semaphore_set(int set, int index, int value)
{
    must(semctl(set, index, SETVAL, (union semun){.val = value}));
}

int attach_count(int segment)
{
    struct shmid_ds status;
    must(shmctl(segment, IPC_STAT, &status));
    return (int)status.shm_nattch;
}

bool eventually(double seconds, bool (*condition)(void *), void *argument)
{
    double deadline = now() + seconds;
    for (;;) {
        bool last_try = now() > deadline;
        if (condition(argument))
            return true;
        if (last_try)
            return false;
        nap();
    }
}

struct attach_wanted {
    int segment;
    int count;
};

static bool attach_count_is(void *argument)
{
    struct attach_wanted *wanted = argument;
    return attach_count(wanted->segment) == wanted->count;
}

void expect_attach_count(int segment, int count, const char *when)
{
    if (!eventually(CLEANUP_SECONDS, attach_count_is, &(struct attach_wanted){segment, count}))
        die("nattch is %d, not %d, %g s after %s", attach_count(segment), count, CLEANUP_SECONDS,
            when);
}

void team_barrier(struct team *team)
{
    int phase = (int)(team->phase++ % PHASES), others = team->ranks - 1;
    if (others == 0)
        return;
    if (team->rank == 0) {
        semaphore_change(team->control, ARRIVALS, -others, 0);
        semaphore_change(team->control, phase, others, 0);
    } else {
        semaphore_change(team->control, ARRIVALS, 1, 0);
        semaphore_change(team->control, phase, -1, 0);
    }
}

void team_result(struct team *team, double seconds, uint64_t part)
{
    /* A page for each rank. */
    uint64_t(*parts)[PAGE / sizeof(uint64_t)] =
        team_segment(team, MAX_SLOTS, (size_t)team->ranks * sizeof *parts);
    parts[team->rank][0] = part;
    team_barrier(team);
    if (team->rank != 0)
        return;
    uint64_t sum = 0;
    for (int rank = 0; rank < team->ranks; rank++)
        sum += parts[rank][0];
    printf("parallel: %.6f s\nresult: %016lx\n", seconds, sum);
}

void print_sequential(double seconds)
{
    printf("sequential: %.6f s\n", seconds);
}

uint64_t digest(uint64_t place, uint64_t value)
{
    uint64_t state = place;
    state = random_next(&state) ^ value;
    return random_next(&state);
}

long share_of(const struct team *team, int rank, long count)
{
    return count * rank / team->ranks;
}

static void run_rank(const struct program *program, struct team team)
{
    own_rank = team.rank;
    watchdog();
    team.control = semaphores_for(&team, team.key, CONTROL_SEMAPHORES);
    program->run(&team);
    if (team.rank != 0) {
        semaphore_change(team.control, DEPARTURES, 1, 0);
        return;
    }
    if (team.ranks > 1)
        semaphore_change(team.control, DEPARTURES, 1 - team.ranks, 0);
    remove_objects();
}

static int fork_ranks(const struct program *program, struct team team)
{
    pid_t children[MAX_RANKS];
    fflush(NULL);
    for (int rank = 0; rank < team.ranks; rank++) {
        children[rank] = (pid_t)must(fork());
        if (children[rank] == 0) {
            team.rank = rank;
            run_rank(program, team);
            exit(EXIT_SUCCESS);
        }
    }
    int result = EXIT_SUCCESS;
    for (int rank = 0; rank < team.ranks; rank++) {
        int status;
        must(waitpid(children[rank], &status, 0));
        if (WIFSIGNALED(status))
            fprintf(stderr, "%s: rank %d was killed by signal %d\n", program_name, rank,
                    WTERMSIG(status));
        if (status != 0)
            result = WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILURE;
    }
    return result;
}

static void print_usage(FILE *out, const struct program *program)
{
    fprintf(out,
            "usage: %s --key K --rank R --ranks N [OPTIONS]   one rank of N, found by key K\n"
            "       %s [--fork N] [OPTIONS]                   all ranks, forked (default %d)\n\n"
            "%s\n\n"
            "  --key K        System V key; K..K+255 are used (also: environment SYSV_KEY)\n"
            "  --timeout S    fail after S seconds (default %ld)\n",
            program_name, program_name, program->default_ranks, program->summary,
            timeout_seconds);
    for (const struct setting *s = program->settings; s && s->name; s++) {
        char option[32];
        snprintf(option, sizeof option, "--%s%s", s->name, s->flag ? "" : " X");
        fprintf(out, "  %-14s %s", option, s->meaning);
        if (s->number)
            fprintf(out, " (default %ld)", *s->number);
        else if (s->text && *s->text)
            fprintf(out, " (default %s)", *s->text);
        fputc('\n', out);
    }
}

static _Noreturn void usage_error(const struct program *program, const char *problem,
                                  const char *what)
{
    fprintf(stderr, "%s: %s %s\n\n", program_name, problem, what);
    print_usage(stderr, program);
    exit(EXIT_USAGE);
}

static long parse_number(const struct program *program, const char *name, const char *text)
{
    char *end;
    errno = 0;
    long number = strtol(text, &end, 0);
    if (errno || end == text || *end || number < 0)
        usage_error(program, "not a number:", name);
    return number;
}

int team_main(int argc, char **argv, const struct program *program)
{
    const char *slash = strrchr(argv[0], '/');
    program_name = slash ? slash + 1 : argv[0];

    const char *key_text = getenv("SYSV_KEY");
    long rank = -1, ranks = 0, forks = 0;
    const struct setting common[] = {
        {.name = "key", .text = &key_text},  {.name = "rank", .number = &rank},
        {.name = "ranks", .number = &ranks}, {.name = "fork", .number = &forks},
        {.name = "timeout", .number = &timeout_seconds}, {0},
    };

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            print_usage(stdout, program);
            return EXIT_SUCCESS;
        }
        const struct setting *tables[] = {common, program->settings};
        const struct setting *found = NULL;
        for (int t = 0; t < 2; t++)
            for (const struct setting *s = tables[t]; s && s->name; s++)
                if (strncmp(argv[i], "--", 2) == 0 && strcmp(argv[i] + 2, s->name) == 0)
                    found = s;
        if (!found)
            usage_error(program, "unknown option", argv[i]);
        if (found->flag) {
            *found->flag = true;
            continue;
        }
        if (++i == argc)
            usage_error(program, "missing value of", argv[i - 1]);
        if (found->number)
            *found->number = parse_number(program, argv[i - 1], argv[i]);
        else
            *found->text = argv[i];
    }

    struct team team = {0};
    bool alone = rank < 0;
    if (alone)
        ranks = forks ? forks : program->default_ranks;
    if (ranks < program->min_ranks || ranks > MAX_RANKS)
        usage_error(program, "wrong number of ranks: at least", program->min_ranks > 1 ? "2" : "1");
    if (rank >= ranks)
        usage_error(program, "--rank", "must be less than --ranks");
    if (key_text)
        team.key = (key_t)parse_number(program, "--key", key_text);
    else if (alone)
        team.key = 0x40000000 | (key_t)(((unsigned)getpid() & 0x3fffff) << 8);
    else
        usage_error(program, "a rank needs", "--key");
    team.rank = (int)rank;
    team.ranks = (int)ranks;

    if (alone)
        return fork_ranks(program, team);
    run_rank(program, team);
    return EXIT_SUCCESS;
}

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

void spin_for(double seconds)
{
    double end = now() + seconds;
    while (now() < end)
        ;
}

/*
 * A fair lock may be handed to a process that has no processor, while those that have one spin: on
 * a busy machine every handover would then cost a time slice. So long waits sleep; yielding would
 * not do, for it gives the whole slice to whoever computes.
 */
void spin_wait(unsigned *turns)
{
    enum { PAUSES = 256 };
    if (++*turns % PAUSES == 0)
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
#if defined __x86_64__ || defined __i386__
    else
        __builtin_ia32_pause();
#endif
}

uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

uint64_t random_below(uint64_t *state, uint64_t bound)
{
    return random_next(state) % bound;
}
