/* Waits for children by every function, and ends a thread that is blocked in one. */
#include "fake.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

static pid_t make_child(void)
{
    pid_t child = fork();
    if (child == 0)
        _exit(9);
    return child;
}

static void clean(void *cleaned)
{
    *(int *)cleaned = 1;
}

static void *block(void *cleaned)
{
    pthread_cleanup_push(clean, cleaned);
    waitpid(-1, NULL, 0);
    pthread_cleanup_pop(0);
    return NULL;
}

int main(void)
{
    int how;
    struct rusage usage;
    siginfo_t info;
    pid_t child = make_child();
    CHECK(wait(&how) == child); /* before any call: nobody is told */
    CHECK(semget(6, 3, 0) == 6);

    errno = 77;
    child = make_child();
    CHECK(wait(&how) == child && WEXITSTATUS(how) == 9);
    child = make_child();
    CHECK(waitpid(child, &how, 0) == child && WEXITSTATUS(how) == 9);
    child = make_child();
    CHECK(wait3(&how, 0, &usage) == child && WEXITSTATUS(how) == 9);
    child = make_child();
    CHECK(wait4(child, &how, 0, &usage) == child && WEXITSTATUS(how) == 9);
    child = make_child();
    CHECK(waitid(P_PID, (id_t)child, &info, WEXITED) == 0 && info.si_pid == child && info.si_status == 9);
    CHECK(errno == 77);
    FAILS(waitpid(-1, NULL, 0), ECHILD);

    child = fork();
    if (child == 0)
        for (;;)
            pause();
    CHECK(waitpid(child, NULL, WNOHANG) == 0); /* nor is anybody of this */
    CHECK(waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG) == 0 && info.si_pid == 0);
    pthread_t thread;
    int cleaned = 0;
    void *result;
    CHECK(pthread_create(&thread, NULL, block, &cleaned) == 0);
    CHECK(pthread_cancel(thread) == 0);
    CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED && cleaned);
    CHECK(kill(child, SIGKILL) == 0 && wait(&how) == child && WTERMSIG(how) == SIGKILL);
    return 0;
}
