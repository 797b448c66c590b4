/* Children that inherit an attach and make no call of their own; prints their pids. */
#include "fake.h"

#include <signal.h>
#include <sys/wait.h>

int main(void)
{
    char *memory = shmat(6, NULL, 0);
    CHECK(memory != (void *)-1);
    printf("%d\n", getpid());
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        CHECK(memory[0] == 0);
        _exit(0);
    }
    CHECK(waitpid(child, NULL, 0) == child);
    printf("%d\n", child);
    fflush(stdout);
    /* No fork handler runs for this one; its first call introduces it. */
    child = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (child == 0) {
        CHECK(shmget(6, SIZE, 0) == 6);
        _exit(0);
    }
    CHECK(waitpid(child, NULL, 0) == child);
    printf("%d\n", child);
    CHECK(shmdt(memory) == 0);
    return 0;
}
