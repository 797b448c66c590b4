/* Signals that come while an operation is on its way into its wait, and stops. */
#include "fake.h"

#include <signal.h>
#include <sys/wait.h>

static volatile int handled;

static void handler(int signal)
{
    (void)signal;
    handled++;
}

static volatile pid_t forked;

static void forking_handler(int signal)
{
    (void)signal;
    forked = fork();
}

int main(void)
{
    struct sembuf operation = {0, -1, 0};
    struct message message;
    struct timespec timeout = {1000, 0};
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < 1000; i++) {
        FAILS(semop(RAISES, &operation, 1), EINTR);
        FAILS(semtimedop(RAISES, &operation, 1, &timeout), EINTR);
        FAILS(msgrcv(RAISES, &message, 1, 0, 0), EINTR);
        CHECK(handled == 3 * (i + 1));
    }
    /* What the program itself has blocked interrupts nothing, and stays blocked. */
    sigset_t blocked, now;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    timeout = (struct timespec){0, 50000000};
    FAILS(semtimedop(RAISES, &operation, 1, &timeout), EAGAIN);
    CHECK(handled == 3000);
    sigprocmask(SIG_BLOCK, NULL, &now);
    CHECK(sigismember(&now, SIGUSR1) == 1 && sigismember(&now, SIGUSR2) == 0);
    sigprocmask(SIG_UNBLOCK, &blocked, NULL);
    CHECK(handled == 3001);

    /* A semop ends with EINTR when the process goes on after a stop (signal(7)). */
    pid_t parent = getpid(), stopper = fork();
    if (stopper == 0) {
        while (kill(parent, SIGSTOP) == 0 && kill(parent, SIGCONT) == 0)
            usleep(1000);
        _exit(0);
    }
    timeout = (struct timespec){1000, 0};
    FAILS(semop(BLOCKS, &operation, 1), EINTR);
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EINTR);
    CHECK(kill(stopper, SIGKILL) == 0 && waitpid(stopper, NULL, 0) == stopper);

    /* The child of a handler that forks is interrupted too, and the call stays its parent's. */
    signal(SIGUSR1, forking_handler);
    FAILS(semop(RAISES, &operation, 1), EINTR);
    if (forked == 0)
        _exit(0);
    int status;
    CHECK(waitpid(forked, &status, 0) == forked && status == 0);
    FAILS(semop(RAISES, &operation, 1), EINTR);
    if (forked == 0)
        _exit(0);
    CHECK(waitpid(forked, &status, 0) == forked && status == 0);

    /* A process that has all its descriptors open can wait all the same. */
    while (dup(0) != -1)
        ;
    CHECK(errno == EMFILE);
    timeout = (struct timespec){0, 1000000};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);
    FAILS(semop(RAISES, &operation, 1), EINTR);
    return 0;
}
