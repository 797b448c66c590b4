/*
 * Waits that are short, and what ends them: a unit, a signal, a timeout, the removal of the set, the
 * end of the process. Each comes at any time after the wait has begun, as early as can be.
 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            printf("%d: %s (errno %s)\n", __LINE__, #condition, strerror(errno));             \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

enum { TRIALS = 100, TURNS = 2000, OFTEN = 20, ATTEMPTS = 20, LOCKERS = 4, HOLDS = 500 };

static struct sembuf take = {0, -1, 0}, give = {0, 1, 0};

/* What processes tell each other. */
static volatile struct {
    int begins, handled, interrupted;
    long held;
} *board;

/* Has this process know a set well. */
static void use(int set)
{
    for (int turn = 0; turn < OFTEN; turn++)
        CHECK(semop(set, &give, 1) == 0 && semop(set, &take, 1) == 0);
}

/* A set of two semaphores without a unit that has been used often. */
static int used_set(void)
{
    int set = semget(IPC_PRIVATE, 2, 0600);
    CHECK(set != -1);
    use(set);
    return set;
}

static long nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Waits until a process says that it begins to wait, and then for up to some 100 us. */
static void come_upon(int trial)
{
    while (!board->begins)
        sched_yield();
    long until = nanoseconds() + trial * 1000;
    while (nanoseconds() < until)
        ;
}

/* Waits for a child, which has ended well. */
static void check_child(pid_t child)
{
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static int alter(int set, int num, int amount, int flags)
{
    struct sembuf operation = {num, amount, flags};
    return semop(set, &operation, 1);
}

/* Few of the waits of two processes that answer each other need anybody else. */
static void two_processes_answer_each_other(void)
{
    int few = 0;
    for (int attempt = 0; attempt < ATTEMPTS && !few; attempt++) {
        int set = used_set();
        pid_t child = fork();
        for (int turn = 0; turn < TURNS; turn++) {
            int side = child == 0;
            CHECK(alter(set, side ? 0 : 1, 1, 0) == 0);
            CHECK(alter(set, side ? 1 : 0, -1, 0) == 0);
        }
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        static long before;
        if (child == 0)
            _exit(0);
        check_child(child);
        few = usage.ru_nvcsw - before < TURNS / 2;
        before = usage.ru_nvcsw;
        CHECK(semctl(set, 0, IPC_RMID) == 0);
    }
    if (getenv("LD_PRELOAD"))
        CHECK(few);
}

/* A lock excludes, whoever waits for it and however. */
static void a_lock_excludes(int flags)
{
    int set = used_set();
    pid_t lockers[LOCKERS];
    board->held = 0;
    for (int locker = 0; locker < LOCKERS; locker++)
        if ((lockers[locker] = fork()) == 0) {
            for (int hold = 0; hold < HOLDS; hold++) {
                CHECK(alter(set, 0, -1, flags) == 0);
                board->held++;
                CHECK(alter(set, 0, 1, flags) == 0);
            }
            _exit(0);
        }
    CHECK(semop(set, &give, 1) == 0);
    for (int locker = 0; locker < LOCKERS; locker++)
        check_child(lockers[locker]);
    CHECK(board->held == LOCKERS * HOLDS && semctl(set, 0, GETVAL) == 1);
    CHECK(semctl(set, 0, IPC_RMID) == 0);
}

static void note(int signal)
{
    (void)signal;
    board->handled++;
}

static void ignore(int signal)
{
    (void)signal;
}

/* A signal that is ignored does not end a wait. */
static void an_ignored_signal_does_nothing(void)
{
    int set = used_set();
    signal(SIGUSR2, SIG_IGN);
    for (int trial = 0; trial < TRIALS; trial++) {
        board->begins = 0;
        pid_t child = fork();
        if (child == 0) {
            use(set);
            board->begins = 1;
            CHECK(semop(set, &take, 1) == 0);
            _exit(0);
        }
        come_upon(trial % 40);
        kill(child, SIGUSR2);
        kill(child, SIGCHLD);
        usleep(trial % 2 * 500);
        CHECK(semop(set, &give, 1) == 0);
        check_child(child);
    }
    CHECK(semctl(set, 0, IPC_RMID) == 0);
}

/* One handler ends one wait. */
static void a_handler_ends_a_wait(void)
{
    int set = used_set(), ended_by_the_first = 0;
    struct sigaction with_handler = {.sa_handler = note, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &with_handler, NULL);
    for (int trial = 0; trial < TRIALS; trial++) {
        memset((void *)board, 0, sizeof *board);
        pid_t child = fork();
        if (child == 0) {
            use(set);
            board->begins = 1;
            CHECK(semop(set, &take, 1) == -1 && errno == EINTR);
            board->interrupted = board->handled;
            CHECK(board->interrupted >= 1);
            _exit(0);
        }
        come_upon(trial);
        kill(child, SIGUSR1);
        /* It may have come before the wait. */
        int status;
        for (int look = 1; waitpid(child, &status, WNOHANG) == 0; look++) {
            usleep(200);
            if (look % 500 == 0)
                kill(child, SIGUSR1);
        }
        CHECK(status == 0 && semctl(set, 0, GETVAL) == 0);
        ended_by_the_first += board->interrupted == 1;
    }
    CHECK(ended_by_the_first > TRIALS / 2);
    CHECK(semctl(set, 0, IPC_RMID) == 0);
}

/* A wait lasts as long as it was told to at least, and ends with nothing taken. */
static void a_wait_ends_with_its_time(void)
{
    int set = used_set();
    for (int trial = 0; trial < TRIALS; trial++) {
        struct timespec timeout = {0, trial * 2000};
        long begin = nanoseconds();
        CHECK(semtimedop(set, &take, 1, &timeout) == -1 && errno == EAGAIN);
        CHECK(nanoseconds() - begin >= timeout.tv_nsec);
        CHECK(semop(set, &give, 1) == 0 && semop(set, &take, 1) == 0);
    }
    CHECK(semctl(set, 0, IPC_RMID) == 0);
}

/* Whoever waits for a set that is removed hears of it. */
static void a_removal_ends_a_wait(void)
{
    for (int trial = 0; trial < TRIALS; trial++) {
        int set = used_set();
        memset((void *)board, 0, sizeof *board);
        pid_t child = fork();
        if (child == 0) {
            use(set);
            board->begins = 1;
            CHECK(semop(set, &take, 1) == -1 && (errno == EIDRM || errno == EINVAL));
            _exit(0);
        }
        come_upon(trial);
        CHECK(semctl(set, 0, IPC_RMID) == 0);
        check_child(child);
    }
}

/* A process that is killed as it waits takes nothing; what it took with SEM_UNDO is given back. */
static void a_killed_process_takes_nothing(void)
{
    int set = used_set();
    for (int trial = 0; trial < TRIALS; trial++) {
        memset((void *)board, 0, sizeof *board);
        pid_t child = fork();
        if (child == 0) {
            use(set);
            board->begins = 1;
            alter(set, 0, -1, SEM_UNDO);
            pause();
            _exit(0);
        }
        come_upon(trial);
        if (trial % 2)
            CHECK(semop(set, &give, 1) == 0);
        kill(child, SIGKILL);
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (trial % 2 == 0)
            CHECK(semop(set, &give, 1) == 0);
        CHECK(semop(set, &take, 1) == 0 && semctl(set, 0, GETVAL) == 0);
    }
    CHECK(semctl(set, 0, IPC_RMID) == 0);
}

int main(void)
{
    alarm(100);
    signal(SIGUSR1, ignore);
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    two_processes_answer_each_other();
    a_lock_excludes(0);
    a_lock_excludes(SEM_UNDO);
    an_ignored_signal_does_nothing();
    a_handler_ends_a_wait();
    a_wait_ends_with_its_time();
    a_removal_ends_a_wait();
    a_killed_process_takes_nothing();
    return 0;
}
