/*
 * Executes itself with an empty environment, by every function there is, and each time finds the
 * segment that it made before. `cleared KEY HOW` is the program executed.
 */
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WAYS = 11, MANY = 2000 };

extern char **environ;

static void execute(const char *self, char *key, int way, char **empty)
{
    char how[] = {(char)('a' + way), '\0'};
    char *arguments[] = {"cleared", key, how, "x", "x", "x", "x", NULL};
    pid_t child;
    int status;
    char *crowd[MANY + 1];
    switch (way) {
    case 0: execve(self, arguments, empty); break;
    case 1: execle(self, "cleared", key, how, "x", "x", "x", "x", (char *)NULL, empty); break;
    case 2: execvpe(self, arguments, empty); break;
    case 3: fexecve(open(self, O_RDONLY | O_CLOEXEC), arguments, empty); break;
    case 4: execveat(AT_FDCWD, self, arguments, empty, 0); break;
    case 5: environ = empty; execv(self, arguments); break;
    case 6: environ = NULL; execl(self, "cleared", key, how, "x", "x", "x", "x", (char *)NULL); break;
    case 7: clearenv(); execlp(self, "cleared", key, how, "x", "x", "x", "x", (char *)NULL); break;
    case 8: clearenv(); execvp(self, arguments); break;
    case 9:
    case 10:
        for (int k = 0; k < MANY; k++)
            crowd[k] = way == 9 ? "FILLER=1" : "LD_PRELOAD=libc.so.6";
        crowd[way == 9 ? MANY : 1] = NULL;
        if ((way == 9 ? posix_spawn : posix_spawnp)(&child, self, NULL, NULL, arguments, crowd) != 0
            || waitpid(child, &status, 0) != child)
            break;
        _exit(WEXITSTATUS(status));
    }
    perror("cleared: exec");
    _exit(1);
}

int main(int argc, char **argv)
{
    if (argc > 2) {
        int id = shmget(atoi(argv[1]), 1, 0);
        char *memory = id == -1 ? (void *)-1 : shmat(id, NULL, SHM_RDONLY);
        if (memory == (void *)-1 || *memory != 'm' || argc != 7) {
            fprintf(stderr, "cleared: way %s: %s, %d arguments\n", argv[2], strerror(errno), argc);
            return 1;
        }
        return 0;
    }
    char key[16], *empty[] = {NULL};
    snprintf(key, sizeof key, "%d", getpid());
    int id = shmget(getpid(), 1, IPC_CREAT | 0600), failed = 0;
    char *memory = shmat(id, NULL, 0);
    *memory = 'm';
    for (int k = 0; k < 2 * WAYS; k++) {
        pid_t child = k < WAYS ? fork() : vfork();
        if (child == 0)
            execute(argv[0], key, k % WAYS, empty);
        int status;
        waitpid(child, &status, 0);
        failed |= status;
        if (k >= WAYS + 4) /* what follows changes the environment that a vfork shares */
            break;
    }
    shmctl(id, IPC_RMID, NULL);
    return failed != 0;
}
