/* A handler forks while the program waits for the answer to a call that no signal ends. */
#include "fake.h"

#include <signal.h>
#include <sys/wait.h>

static volatile pid_t forked = -1;

static void handler(int signal)
{
    (void)signal;
    forked = fork();
}

int main(void)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
    alarm(60); /* who took the answer from the other would leave it waiting */
    int id = semget(FORKS, 3, 0);
    if (forked == 0) {
        CHECK(id == -1 && errno == EINTR);
        CHECK(semget(COMPLETES, 3, 0) == COMPLETES);
        return 0;
    }
    int status;
    CHECK(id == FORKS);
    CHECK(waitpid(forked, &status, 0) == forked && status == 0);
    return 0;
}
