/* The program that starts the daemon must not notice that it had a child. */
#include "fake.h"

#include <signal.h>
#include <sys/wait.h>

static volatile int children;

static void handler(int signal)
{
    (void)signal;
    children++;
}

int main(void)
{
    signal(SIGCHLD, handler);
    signal(SIGUSR1, SIG_IGN);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    CHECK(shmget(6, SIZE, 0) == 6);
    usleep(100000);
    CHECK(children == 0);
    FAILS(wait(NULL), ECHILD);
    FAILS(waitpid(-1, NULL, __WALL | WNOHANG), ECHILD);
    sigset_t after;
    sigprocmask(SIG_SETMASK, NULL, &after);
    CHECK(memcmp(&mask, &after, 8) == 0);
    return 0;
}
