/*
 * Operations on semaphore sets that are used so often that they may take a short cut: what a
 * program does around them has the effects that it has with system calls.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            printf("%d: %s (errno %s)\n", __LINE__, #condition, strerror(errno));             \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

enum { PAGE = 4096, OFTEN = 20, SETS = 200, FORKS = 60 };

static struct sembuf take = {0, -1, 0}, give = {0, 1, 0};

/* A set with one unit, which has been taken and given often. */
static int used_set(void)
{
    int set = semget(IPC_PRIVATE, 1, 0600);
    CHECK(set != -1 && semop(set, &give, 1) == 0);
    for (int turn = 0; turn < OFTEN; turn++)
        CHECK(semop(set, &take, 1) == 0 && semop(set, &give, 1) == 0);
    return set;
}

/* How often this process has given up the processor: each call of a daemon does. */
static long switches(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_nvcsw;
}

static void every_set_in_turn_has_its_short_cut(void)
{
    for (int number = 0; number < SETS; number++) {
        int set = used_set();
        long before = switches();
        for (int turn = 0; turn < 500; turn++)
            CHECK(semop(set, &take, 1) == 0 && semop(set, &give, 1) == 0);
        CHECK(switches() - before < 100);
        CHECK(semctl(set, 0, IPC_RMID) == 0);
    }
}

enum way { DETACHED, PROTECTED, COVERED, MOVED, WAYS };

/* An operation in memory that cannot be read any more. */
static void unreadable_operations_fault(void)
{
    int set = used_set();
    for (enum way way = 0; way < WAYS; way++) {
        int segment = shmget(IPC_PRIVATE, PAGE, 0600);
        struct sembuf *operation = way == DETACHED
            ? shmat(segment, NULL, 0)
            : mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int turn = 0; turn < OFTEN; turn++) {
            *operation = turn % 2 ? give : take;
            CHECK(semop(set, operation, 1) == 0);
        }
        void *elsewhere = (char *)operation + (1 << 24);
        switch (way) {
        case DETACHED: CHECK(shmdt(operation) == 0); break;
        case PROTECTED: CHECK(mprotect(operation, PAGE, PROT_NONE) == 0); break;
        case COVERED:
            CHECK(mmap(operation, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
                  == operation);
            break;
        default:
            CHECK(mremap(operation, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere)
                  == elsewhere);
        }
        CHECK(semop(set, operation, 1) == -1 && errno == EFAULT);
        shmctl(segment, IPC_RMID, NULL);
    }
    CHECK(semctl(set, 0, GETVAL) == 1 && semctl(set, 0, IPC_RMID) == 0);
}

static volatile sig_atomic_t is_child, forks, broken;

static void fork_in_handler(int signal)
{
    (void)signal;
    if (is_child)
        return;
    pid_t child = fork();
    if (child == 0) {
        struct itimerval never = {0};
        setitimer(ITIMER_REAL, &never, NULL);
        is_child = 1;
        return;
    }
    int status;
    while (waitpid(child, &status, 0) == -1)
        ;
    forks++;
    broken += status != 0;
}

/* The child goes on with the operation that the handler interrupted. */
static void children_of_handlers_go_on(void)
{
    int set = used_set();
    signal(SIGALRM, fork_in_handler);
    struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &often, NULL);
    while (forks < FORKS) {
        /* Units enough that nobody waits, whatever a child has done twice. */
        semop(set, &give, 1);
        if (is_child)
            _exit(0);
        struct sembuf perhaps = {0, -1, IPC_NOWAIT};
        semop(set, &perhaps, 1);
        if (is_child)
            _exit(0);
    }
    setitimer(ITIMER_REAL, &never, NULL);
    CHECK(broken == 0 && semctl(set, 0, IPC_RMID) == 0);
}

int main(void)
{
    alarm(100);
    every_set_in_turn_has_its_short_cut();
    unreadable_operations_fault();
    children_of_handlers_go_on();
    return 0;
}
