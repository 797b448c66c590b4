/*
 * Conformance of the semaphore calls: every errno that one or two processes can provoke, and what
 * the manual pages semget(2), semop(2), semctl(2) promise about values, counts, pids and times.
 *
 * Rank 0 judges. Rank 1 (on another node, when run so) is the process that blocks; further ranks
 * only keep the barriers. Nobody sleeps to let another block: GETNCNT and GETZCNT tell.
 */
#include "common.h"

#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum {
    OPERATIONS_MAX = 500,       /* SEMOPM of Linux */
    SEMAPHORES_MAX = 32000,     /* SEMMSL */
    NOBODY = 65534,
};
static const double PATIENCE = 10; /* seconds for another process to reach a known state */
static const struct timespec SHORT = {.tv_nsec = 50000000};

static int operate(int set, int index, int delta, int flags)
{
    struct sembuf operation = {(unsigned short)index, (short)delta, (short)flags};
    return semop(set, &operation, 1);
}

static int new_set(int count)
{
    return (int)must(semget(IPC_PRIVATE, count, 0600));
}

static void remove_set(int set)
{
    must(semctl(set, 0, IPC_RMID));
}

static void expect_value(int set, int index, int value)
{
    expect(semaphore_value(set, index) == value, "semaphore %d is %d, not %d", index,
           semaphore_value(set, index), value);
}

struct waiting {
    int set, index, decrementers, zero_waiters;
};

static bool are_waiting(void *argument)
{
    struct waiting *w = argument;
    return must(semctl(w->set, w->index, GETNCNT)) == w->decrementers &&
           must(semctl(w->set, w->index, GETZCNT)) == w->zero_waiters;
}

static void await_waiters(int set, int index, int decrementers, int zero_waiters)
{
    struct waiting waiting = {set, index, decrementers, zero_waiters};
    expect(eventually(PATIENCE, are_waiting, &waiting),
           "GETNCNT is %ld, not %d, or GETZCNT is %ld, not %d",
           must(semctl(set, index, GETNCNT)), decrementers, must(semctl(set, index, GETZCNT)),
           zero_waiters);
}

/* ---- one process ---- */

static void getting(const struct team *team)
{
    key_t key = team_key(team, 1);
    expect_errno(semget(key, 0, 0), ENOENT);
    expect_errno(semget(key, 1, 0), ENOENT);
    expect_errno(semget(key, 0, IPC_CREAT | 0600), EINVAL);
    expect_errno(semget(key, -1, IPC_CREAT | 0600), EINVAL);
    expect_errno(semget(key, SEMAPHORES_MAX + 1, IPC_CREAT | 0600), EINVAL);

    int set = (int)must(semget(key, 3, IPC_CREAT | IPC_EXCL | 0600));
    expect_errno(semget(key, 3, IPC_CREAT | IPC_EXCL | 0600), EEXIST);
    expect_errno(semget(key, 4, 0600), EINVAL);
    expect(must(semget(key, 3, IPC_CREAT | 0600)) == set, "the key found another set");
    expect(must(semget(key, 0, 0)) == set, "the key found another set");
    remove_set(set);
    expect_errno(semget(key, 0, 0), ENOENT);
    expect_errno(semctl(set, 0, IPC_RMID), EINVAL);
    expect_errno(operate(set, 0, 1, 0), EINVAL);

    int one = new_set(1), two = new_set(1);
    expect(one != two, "IPC_PRIVATE gave the same set twice");
    remove_set(one);
    remove_set(two);
}

static void operation_errors(const struct team *team)
{
    (void)team;
    static struct sembuf many[OPERATIONS_MAX + 1];
    int set = new_set(2);
    expect_errno(operate(-1, 0, 1, 0), EINVAL);
    expect_errno(semop(set, many, 0), EINVAL);
    expect_errno(semop(set, many, OPERATIONS_MAX + 1), E2BIG);
    must(semop(set, many, OPERATIONS_MAX)); /* all of them wait for zero: done at once */
    expect_errno(semop(set, (struct sembuf *)-1, 1), EFAULT);
    expect_errno(operate(set, 2, 1, 0), EFBIG);
    expect_errno(operate(set, 0, -1, IPC_NOWAIT), EAGAIN);
    must(operate(set, 0, SEMAPHORE_MAX, 0));
    expect_errno(operate(set, 0, 1, 0), ERANGE);
    expect_errno(operate(set, 0, 0, IPC_NOWAIT), EAGAIN);
    expect_value(set, 0, SEMAPHORE_MAX);

    /* The adjustment to undo has the same limits as a value. */
    must(operate(set, 0, -SEMAPHORE_MAX, SEM_UNDO));
    must(operate(set, 0, 1, 0));
    expect_errno(operate(set, 0, -1, SEM_UNDO), ERANGE);
    expect_value(set, 0, 1);
    remove_set(set);
}

static void several_operations_are_one(const struct team *team)
{
    (void)team;
    int set = new_set(3);
    struct sembuf fails[] = {{0, 5, 0}, {1, 1, 0}, {2, -1, IPC_NOWAIT}};
    expect_errno(semop(set, fails, 3), EAGAIN);
    for (int k = 0; k < 3; k++)
        expect_value(set, k, 0);

    struct sembuf overflows[] = {{0, 5, 0}, {0, SEMAPHORE_MAX, 0}};
    expect_errno(semop(set, overflows, 2), ERANGE);
    expect_value(set, 0, 0);

    struct sembuf up_then_down[] = {{0, 2, 0}, {0, -1, 0}, {1, 0, 0}, {1, 4, 0}};
    must(semop(set, up_then_down, 4));
    expect_value(set, 0, 1);
    expect_value(set, 1, 4);

    struct sembuf down_then_up[] = {{2, -1, IPC_NOWAIT}, {2, 1, 0}};
    expect_errno(semop(set, down_then_up, 2), EAGAIN);

    struct sembuf undone[] = {{0, -1, 0}, {7, 1, 0}};
    expect_errno(semop(set, undone, 2), EFBIG);
    expect_value(set, 0, 1);
    remove_set(set);
}

static void controls(const struct team *team)
{
    time_t before = time(NULL) - 1;
    int set = (int)must(semget(team_key(team, 1), 3, IPC_CREAT | IPC_EXCL | 0640));
    struct semid_ds status;
    must(semctl(set, 0, IPC_STAT, (union semun){.buf = &status}));
    expect(status.sem_nsems == 3, "sem_nsems is %lu", (unsigned long)status.sem_nsems);
    expect(status.sem_otime == 0, "sem_otime is not 0 before the first operation");
    expect(status.sem_ctime >= before && status.sem_ctime <= time(NULL) + 1, "sem_ctime is off");
    expect(status.sem_perm.__key == team_key(team, 1), "the key is 0x%x", status.sem_perm.__key);
    expect((status.sem_perm.mode & 0777) == 0640, "the mode is %o", status.sem_perm.mode);
    expect(status.sem_perm.uid == geteuid() && status.sem_perm.cuid == geteuid(),
           "the owner is %u", status.sem_perm.uid);

    status.sem_perm.mode = 0600;
    must(semctl(set, 0, IPC_SET, (union semun){.buf = &status}));
    must(semctl(set, 0, IPC_STAT, (union semun){.buf = &status}));
    expect((status.sem_perm.mode & 0777) == 0600, "IPC_SET left mode %o", status.sem_perm.mode);

    must(operate(set, 1, 2, 0));
    must(semctl(set, 0, IPC_STAT, (union semun){.buf = &status}));
    expect(status.sem_otime >= before && status.sem_otime <= time(NULL) + 1, "sem_otime is off");
    expect(must(semctl(set, 1, GETPID)) == getpid(), "GETPID is %ld after my semop",
           must(semctl(set, 1, GETPID)));
    expect(must(semctl(set, 0, GETPID)) == 0, "GETPID of an untouched semaphore is %ld",
           must(semctl(set, 0, GETPID)));
    must(semctl(set, 2, SETVAL, (union semun){.val = 7}));
    expect(must(semctl(set, 2, GETPID)) == getpid(), "GETPID after SETVAL is another's");

    unsigned short values[3];
    must(semctl(set, 0, GETALL, (union semun){.array = values}));
    expect(values[0] == 0 && values[1] == 2 && values[2] == 7, "GETALL says %u %u %u", values[0],
           values[1], values[2]);
    unsigned short others[3] = {SEMAPHORE_MAX, 0, 1};
    must(semctl(set, 0, SETALL, (union semun){.array = others}));
    expect_value(set, 0, SEMAPHORE_MAX);
    expect_value(set, 2, 1);

    others[1] = SEMAPHORE_MAX + 1;
    expect_errno(semctl(set, 0, SETALL, (union semun){.array = others}), ERANGE);
    expect_errno(semctl(set, 0, SETVAL, (union semun){.val = -1}), ERANGE);
    expect_errno(semctl(set, 0, SETVAL, (union semun){.val = SEMAPHORE_MAX + 1}), ERANGE);
    expect_errno(semctl(set, 3, SETVAL, (union semun){.val = 1}), EINVAL);
    expect_errno(semctl(set, 3, GETVAL), EINVAL);
    expect_errno(semctl(set, -1, GETVAL), EINVAL);
    expect_errno(semctl(set, 0, 4711), EINVAL);
    expect_errno(semctl(-1, 0, IPC_STAT, (union semun){.buf = &status}), EINVAL);
    remove_set(set);
}

static void timeouts(const struct team *team)
{
    (void)team;
    int set = new_set(1);
    struct sembuf take = {0, -1, 0}, give = {0, 1, 0};
    double start = now();
    expect_errno(semtimedop(set, &take, 1, &SHORT), EAGAIN);
    double waited = now() - start;
    expect(waited >= (double)SHORT.tv_nsec * 1e-9 - 0.001, "timed out after only %.4f s", waited);
    expect_errno(semtimedop(set, &take, 1, &(struct timespec){0}), EAGAIN);
    expect_errno(semtimedop(set, &take, 1, &(struct timespec){.tv_nsec = 1000000000}), EINVAL);
    expect_errno(semtimedop(set, &take, 1, &(struct timespec){.tv_sec = -1}), EINVAL);
    must(semtimedop(set, &give, 1, &SHORT));
    must(semtimedop(set, &take, 1, NULL));
    expect_value(set, 0, 0);
    await_waiters(set, 0, 0, 0);
    remove_set(set);
}

/* ---- a process and its children ---- */

static void undo_at_exit(const struct team *team)
{
    (void)team;
    int set = new_set(1);
    semaphore_set(set, 0, 2);

    pid_t child = fork_watched();
    if (child == 0) {
        must(operate(set, 0, -1, SEM_UNDO));
        must(operate(set, 0, -1, SEM_UNDO));
        _exit(0);
    }
    expect_success(child, "the child that takes");
    must(operate(set, 0, -2, 0)); /* given back, at once or a moment later */

    child = fork_watched();
    if (child == 0) {
        must(operate(set, 0, 3, SEM_UNDO));
        must(operate(set, 0, -2, 0)); /* only 1 is left of the 3 to be taken back */
        _exit(0);
    }
    expect_success(child, "the child that gives");
    struct sembuf wait_zero = {0, 0, 0};
    must(semtimedop(set, &wait_zero, 1, &(struct timespec){.tv_sec = (time_t)PATIENCE}));

    /* SETVAL forgets what everyone had to undo. */
    semaphore_set(set, 0, 1);
    int steps = new_set(2);
    child = fork_watched();
    if (child == 0) {
        must(operate(set, 0, -1, SEM_UNDO));
        must(operate(steps, 0, 1, 0));
        must(operate(steps, 1, -1, 0));
        _exit(0);
    }
    must(operate(steps, 0, -1, 0));
    semaphore_set(set, 0, 5);
    must(operate(steps, 1, 1, 0));
    expect_success(child, "the child whose undo is forgotten");
    expect_value(set, 0, 5);
    remove_set(steps);
    remove_set(set);
}

static void on_signal(int signal)
{
    (void)signal;
}

static void a_signal_interrupts(const struct team *team)
{
    (void)team;
    int set = new_set(2);
    pid_t child = fork_watched();
    if (child == 0) {
        struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
        must(sigaction(SIGUSR1, &action, NULL));
        expect_errno(operate(set, 0, -1, 0), EINTR);
        struct sembuf take = {1, -1, 0};
        expect_errno(semtimedop(set, &take, 1, &(struct timespec){.tv_sec = 60}), EINTR);
        _exit(0);
    }
    for (int index = 0; index < 2; index++) {
        await_waiters(set, index, 1, 0);
        must(kill(child, SIGUSR1));
        await_waiters(set, index, 0, 0);
        expect_value(set, index, 0);
    }
    expect_success(child, "the interrupted child");
    remove_set(set);
}

static void a_killed_waiter_is_not_counted(const struct team *team)
{
    (void)team;
    int set = new_set(1);
    pid_t child = fork_watched();
    if (child == 0) {
        operate(set, 0, -1, 0);
        _exit(1);
    }
    await_waiters(set, 0, 1, 0);
    kill_child(child);
    await_waiters(set, 0, 0, 0);
    must(operate(set, 0, 1, 0));
    expect_value(set, 0, 1);
    remove_set(set);
}

static pid_t fork_taker(int set, int amount)
{
    pid_t child = fork_watched();
    if (child == 0) {
        must(operate(set, 0, -amount, 0));
        _exit(0);
    }
    return child;
}

static void waiters_are_served_in_order(const struct team *team)
{
    (void)team;
    int set = new_set(1);
    pid_t first = fork_taker(set, 1);
    await_waiters(set, 0, 1, 0);
    pid_t second = fork_taker(set, 1);
    await_waiters(set, 0, 2, 0);
    must(operate(set, 0, 1, 0));
    expect_success(first, "the first waiter");
    await_waiters(set, 0, 1, 0);
    must(operate(set, 0, 1, 0));
    expect_success(second, "the second waiter");

    /* One that wants more than there is does not block a modest one behind it. */
    pid_t greedy = fork_taker(set, 2);
    await_waiters(set, 0, 1, 0);
    pid_t modest = fork_taker(set, 1);
    await_waiters(set, 0, 2, 0);
    must(operate(set, 0, 1, 0));
    expect_success(modest, "the modest waiter");
    must(operate(set, 0, 2, 0));
    expect_success(greedy, "the greedy waiter");
    expect_value(set, 0, 0);
    remove_set(set);
}

static void strangers_are_refused(const struct team *team)
{
    if (geteuid() != 0)
        return;
    key_t key = team_key(team, 1);
    int set = (int)must(semget(key, 1, IPC_CREAT | IPC_EXCL | 0604));
    pid_t child = fork_watched();
    if (child == 0) {
        must(setgroups(0, NULL));
        must(setgid(NOBODY));
        must(setuid(NOBODY));
        struct semid_ds status;
        expect_errno(semget(key, 0, 0600), EACCES);
        expect(must(semget(key, 0, 0400)) == set, "another set");
        expect(must(semctl(set, 0, GETVAL)) == 0, "GETVAL by a reader");
        must(semctl(set, 0, IPC_STAT, (union semun){.buf = &status}));
        must(operate(set, 0, 0, 0)); /* waiting for zero needs read permission only */
        expect_errno(operate(set, 0, 1, 0), EACCES);
        expect_errno(semctl(set, 0, SETVAL, (union semun){.val = 1}), EACCES);
        expect_errno(semctl(set, 0, IPC_SET, (union semun){.buf = &status}), EPERM);
        expect_errno(semctl(set, 0, IPC_RMID), EPERM);
        _exit(0);
    }
    expect_success(child, "the stranger");
    remove_set(set);
}

/* ---- two ranks; the shared set has semaphores 0 and 1, at 0 ---- */

static void a_decrementer_is_counted_and_woken(struct team *team, int set)
{
    if (team->rank == 0) {
        await_waiters(set, 0, 1, 0);
        must(operate(set, 0, 2, 0));
        team_barrier(team);
        expect_value(set, 0, 0);
    } else {
        if (team->rank == 1)
            must(operate(set, 0, -2, 0));
        team_barrier(team);
    }
}

static void a_zero_waiter_is_counted_and_woken(struct team *team, int set)
{
    if (team->rank == 0)
        must(operate(set, 1, 3, 0));
    team_barrier(team);
    if (team->rank == 0) {
        await_waiters(set, 1, 0, 1);
        must(operate(set, 1, -2, 0)); /* not zero yet */
        await_waiters(set, 1, 0, 1);
        must(semctl(set, 1, SETVAL, (union semun){.val = 0}));
    } else if (team->rank == 1) {
        must(operate(set, 1, 0, 0));
    }
    team_barrier(team);
}

static void removal_wakes_with_EIDRM(struct team *team, int set)
{
    if (team->rank == 0) {
        await_waiters(set, 0, 1, 0);
        remove_set(set);
    } else if (team->rank == 1) {
        expect_errno(operate(set, 0, -1, 0), EIDRM);
    }
    team_barrier(team);
    expect_errno(operate(set, 0, -1, 0), EINVAL);
    expect_errno(semget(team_key(team, 0), 0, 0), ENOENT);
}

static void run(struct team *team)
{
    static const struct {
        const char *name;
        void (*check)(const struct team *);
    } alone[] = {
        {"semget", getting},
        {"semop errors", operation_errors},
        {"several operations are one", several_operations_are_one},
        {"semctl", controls},
        {"semtimedop", timeouts},
        {"undo at exit", undo_at_exit},
        {"a signal interrupts in spite of SA_RESTART", a_signal_interrupts},
        {"a killed waiter is not counted", a_killed_waiter_is_not_counted},
        {"waiters are served in order", waiters_are_served_in_order},
        {"strangers are refused", strangers_are_refused},
    };
    static const struct {
        const char *name;
        void (*check)(struct team *, int set);
    } together[] = {
        {"a decrementer is counted and woken", a_decrementer_is_counted_and_woken},
        {"a zero waiter is counted and woken", a_zero_waiter_is_counted_and_woken},
        {"removal wakes with EIDRM", removal_wakes_with_EIDRM},
    };
    if (team->rank == 0)
        for (size_t k = 0; k < sizeof alone / sizeof *alone; k++) {
            alone[k].check(team);
            printf("ok  %s\n", alone[k].name);
            fflush(stdout);
        }
    int set = team_semaphores(team, 0, 2);
    team_barrier(team);
    for (size_t k = 0; k < sizeof together / sizeof *together; k++) {
        together[k].check(team, set);
        team_barrier(team);
        if (team->rank == 0)
            printf("ok  %s\n", together[k].name);
    }
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"Conformance of semget, semop, semtimedop, semctl.", 2, 2,
                                       NULL, run});
}
