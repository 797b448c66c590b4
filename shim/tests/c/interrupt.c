/* Blocked operations, and what ends them. */
#include "fake.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>

static volatile int handled;

static void handler(int signal)
{
    (void)signal;
    handled++;
    /* A call of its own, while the interrupted one has its connection. */
    struct sembuf operation = {0, 1, 0};
    CHECK(semop(COMPLETES, &operation, 1) == 0);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void alarm_in_50_ms(void)
{
    struct itimerval timer = {.it_value = {.tv_usec = 50000}};
    handled = 0;
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* semop is no cancellation point, so the cancellation waits until the call has ended. */
static void *cancelled_within(void *call_ended)
{
    struct sembuf operation = {0, -1, 0};
    struct timespec timeout = {0, 300000000};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);
    *(int *)call_ended = 1;
    pthread_testcancel();
    return NULL;
}

static sigjmp_buf escape;

static void jump(int signal)
{
    siglongjmp(escape, signal);
}

int main(void)
{
    struct sembuf operation = {0, -1, 0};
    for (int flags = 0; flags <= SA_RESTART; flags += SA_RESTART) {
        struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
        sigaction(SIGALRM, &action, NULL);

        alarm_in_50_ms();
        FAILS(semop(BLOCKS, &operation, 1), EINTR);
        CHECK(handled == 1);
        alarm_in_50_ms();
        struct timespec long_time = {1000, 0};
        FAILS(semtimedop(BLOCKS, &operation, 1, &long_time), EINTR);
        alarm_in_50_ms();
        FAILS(syscall(SYS_semop, BLOCKS, &operation, 1), EINTR);
        /* The operation was done before the interruption arrived. */
        alarm_in_50_ms();
        CHECK(semop(WINS, &operation, 1) == 0 && handled == 1);

        struct message message = {.type = 1};
        alarm_in_50_ms();
        FAILS(msgsnd(BLOCKS, &message, 1, 0), EINTR);
        alarm_in_50_ms();
        FAILS(msgrcv(BLOCKS, &message, 1, 0, 0), EINTR);
        CHECK(handled == 1 && message.type == 1);
        alarm_in_50_ms();
        CHECK(msgsnd(WINS, &message, 1, 0) == 0 && handled == 1);
        alarm_in_50_ms();
        CHECK(msgrcv(WINS, &message, 2, 0, 0) == 2 && handled == 1);
        CHECK(message.type == MTYPE && message.text[1] == 1);
    }

    double before = now();
    struct timespec timeout = {0, 80000000};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);
    CHECK(now() - before >= 0.08 && now() - before < 5);
    CHECK(semtimedop(WINS, &operation, 1, &timeout) == 0);
    timeout = (struct timespec){0, 0};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);
    CHECK(semtimedop(COMPLETES, &operation, 1, &timeout) == 0);
    timeout = (struct timespec){-1, 0};
    FAILS(semtimedop(COMPLETES, &operation, 1, &timeout), EINVAL);
    timeout = (struct timespec){0, 1000000000};
    FAILS(semtimedop(COMPLETES, &operation, 1, &timeout), EINVAL);
    FAILS(semtimedop(COMPLETES, &operation, 1, (void *)8), EFAULT);
    timeout = (struct timespec){0x7fffffffffffffff, 999999999};
    alarm_in_50_ms();
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EINTR);
    CHECK(semtimedop(COMPLETES, &operation, 1, NULL) == 0);

    int call_ended = 0;
    void *result;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, cancelled_within, &call_ended) == 0);
    usleep(100000);
    CHECK(pthread_cancel(thread) == 0 && pthread_join(thread, &result) == 0);
    CHECK(call_ended && result == PTHREAD_CANCELED);

    /* A handler that never returns costs a connection, no more. */
    signal(SIGALRM, jump);
    for (volatile int i = 0; i < 5; i++) {
        if (sigsetjmp(escape, 1) == 0) {
            alarm_in_50_ms();
            semop(BLOCKS, &operation, 1);
            CHECK(!"interrupted without the handler");
        }
        CHECK(semop(COMPLETES, &operation, 1) == 0);
    }
    return 0;
}
