/*
 * What every program of this folder shares: a *team* of cooperating processes.
 *
 * A team is N processes ("ranks") that know nothing of each other but a System V key. Each is
 * started as `prog --key K --rank R --ranks N`, by hand, by a script, on one host or on several.
 * `prog --fork N`, or `prog` alone, forks the ranks itself.
 *
 * Rank 0 creates the objects, the others look for their keys until they appear; rank 0 removes
 * them when everyone has left. A team owns the keys K .. K+255, for segments, semaphore sets and
 * message queues alike; K is its own control set (barrier and departures), K+1+slot are the
 * program's.
 *
 * A program succeeds (exit 0) only if its result is exact. A rank that fails says why on stderr,
 * removes the team's objects, so that the others fail too instead of waiting, and exits 1.
 * A usage error exits 2; a rank that outlives --timeout says so and exits 3.
 */
#ifndef COMMON_H
#define COMMON_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/types.h>

enum {
    PAGE = 4096,
    MAX_RANKS = 64,
    MAX_SLOTS = 253, /* objects of each kind that a program may have besides those of the team */
    SEMAPHORE_MAX = 32767, /* SEMVMX of Linux */
};

/* The fourth argument of semctl(2), which the caller must define. */
union semun {
    int val;
    struct semid_ds *buf;
    unsigned short *array;
    struct seminfo *info;
};

struct team {
    key_t key;
    int rank;
    int ranks;
    int control;    /* semaphore set: the barrier's, and departures */
    unsigned phase; /* which of the two semaphores to go by comes next */
};

/* One command line option of a program; exactly one of the last three members is set. */
struct setting {
    const char *name;
    const char *meaning;
    long *number;
    const char **text;
    bool *flag;
};

struct program {
    const char *summary;
    int default_ranks;
    int min_ranks;
    const struct setting *settings; /* ended by a null name; may be null */
    void (*run)(struct team *);
};

/* Parses the command line, runs this process's rank (or forks all); returns the exit status. */
int team_main(int argc, char **argv, const struct program *);

/* Returns when all ranks have called it; what they wrote before is visible after. */
void team_barrier(struct team *);

/*
 * The result of a computation as one number, printed by rank 0 with the seconds that it took. It
 * is the sum of what each rank gives; all ranks call it. The form is for benchmarks to read:
 *
 *     parallel: 1.234567 s
 *     result: 0123456789abcdef
 */
void team_result(struct team *, double seconds, uint64_t part);

/* Prints the time of the sequential computation in the same form. */
void print_sequential(double seconds);

/* One part of a result; the sum over all parts does not depend on their order. */
uint64_t digest(uint64_t place, uint64_t value);

/* Where the share of this rank begins when `count` things are divided; it ends where the next one's
 * begins. */
long share_of(const struct team *, int rank, long count);

/* The key of the program's object in `slot`. */
key_t team_key(const struct team *, int slot);

/* The object in `slot`: created (zeroed, empty) by rank 0, waited for and found by the others. */
int team_segment_id(const struct team *, int slot, size_t size);
int team_semaphores(const struct team *, int slot, int count);

int team_queue(const struct team *, int slot);

/* The same segment, attached. */
void *team_segment(const struct team *, int slot, size_t size);

/* Attaches a segment or dies. */
void *attach(int segment);
void detach(const void *address);

/* One semaphore operation; restarted when a signal interrupts it, fatal when it fails. */
void semaphore_change(int set, int index, int delta, int flags);
int semaphore_value(int set, int index);
void semaphore_set(int set, int index, int value);

/* The number of attaches as shmctl(2) tells it. */
int attach_count(int segment);

/* Polls until `condition(argument)` holds, for at most `seconds`; whether it came to hold. */
bool eventually(double seconds, bool (*condition)(void *), void *argument);

/* eventually(), for 1 s, that the segment has `count` attaches; dies otherwise. */
void expect_attach_count(int segment, int count, const char *when);

/* Prints the message (and, for die_errno, errno) and ends the process and its team. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void die_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Dies with the message unless the condition holds. */
#define expect(condition, ...) ((condition) ? (void)0 : die(__VA_ARGS__))

/* Dies unless the call fails with exactly this errno. */
#define expect_errno(call, wanted)                                                        \
    do {                                                                                  \
        errno = 0;                                                                        \
        if ((intptr_t)(call) != -1)                                                       \
            die("%s:%d: %s succeeded, expected %s", __FILE__, __LINE__, #call, #wanted);  \
        if (errno != (wanted))                                                            \
            die_errno("%s:%d: %s: expected %s, got", __FILE__, __LINE__, #call, #wanted); \
    } while (0)

/* Dies if the call returns -1; its value otherwise. */
#define must(call) must_(__FILE__, __LINE__, #call, (call))
long must_(const char *file, int line, const char *call, long value);

/* Arms the watchdog in a process forked by the program itself (alarms are not inherited). */
void watchdog(void);

/* fork(2) that dies on failure, with the child's watchdog armed. */
pid_t fork_watched(void);

/* Waits for a child; dies unless it exited with status 0. */
void expect_success(pid_t child, const char *who);

/* SIGKILLs a child and reaps it. */
void kill_child(pid_t child);

double now(void);                /* seconds, monotonic */
void nap(void);                  /* about a millisecond, for polling loops */
void spin_for(double seconds);   /* burns processor time */
void spin_wait(unsigned *turns); /* one turn of a spin loop: pause, now and then sleep */

/* A small deterministic generator (splitmix64); the state may start as any seed. */
uint64_t random_next(uint64_t *state);
uint64_t random_below(uint64_t *state, uint64_t bound);

#endif
