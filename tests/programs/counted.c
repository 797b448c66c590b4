/*
 * counted NODE: what a process of the first node has done to its attaches counts for a process of
 * another one that it tells at once, by a pipe.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 300, SIZE = 8192, QUESTIONS = 0, ANSWERS = 1 };

static int observe(void)
{
    struct shmid_ds status;
    for (int segment; read(QUESTIONS, &segment, sizeof segment) == sizeof segment;) {
        long attaches = shmctl(segment, IPC_STAT, &status) == 0 ? (long)status.shm_nattch : -errno;
        if (write(ANSWERS, &attaches, sizeof attaches) != sizeof attaches)
            return 1;
    }
    return 0;
}

static int ask[2], answer[2], wrong;

static void expect(const char *after, int segment, long attaches)
{
    long seen;
    if (write(ask[1], &segment, sizeof segment) != sizeof segment ||
        read(answer[0], &seen, sizeof seen) != sizeof seen)
        exit(2);
    if (seen != attaches && wrong++ < 10)
        printf("%ld attaches after %s, not %ld\n", seen, after, attaches);
}

int main(int argc, char **argv)
{
    if (strcmp(argv[1], "observer") == 0)
        return observe();
    if (argc != 2 || pipe2(ask, O_CLOEXEC) || pipe2(answer, O_CLOEXEC))
        return 2;
    if (fork() == 0) {
        char directory[4096];
        snprintf(directory, sizeof directory, "%s/%s", getenv("MIGSHM_LAB"), argv[1]);
        setenv("MIGSHM_RUNTIME_DIR", directory, 1);
        dup2(ask[0], QUESTIONS);
        dup2(answer[1], ANSWERS);
        execl(argv[0], argv[0], "observer", NULL);
        _exit(2);
    }
    int first = shmget(IPC_PRIVATE, SIZE, 0600), second = shmget(IPC_PRIVATE, SIZE, 0600);
    char *place = shmat(first, NULL, 0);
    for (int round = 0; round < ROUNDS; round++) {
        expect("an attach", first, 1);
        if (shmat(second, place, 0) != (void *)-1 || errno != EINVAL)
            return 3;
        expect("one that failed", second, 0);
        if (shmat(second, place, SHM_REMAP) != place)
            return 3;
        expect("being covered", first, 0);
        expect("covering", second, 1);
        pid_t child = fork();
        if (child == 0)
            kill(getpid(), SIGKILL);
        waitpid(child, NULL, 0);
        expect("the end of a child", second, 1);
        munmap(place, SIZE);
        expect("munmap", second, 0);
        if (shmat(first, place, 0) != place)
            return 3;
    }
    shmdt(place);
    expect("a detach", first, 0);
    shmctl(first, IPC_RMID, NULL);
    shmctl(second, IPC_RMID, NULL);
    close(ask[1]);
    wait(NULL);
    return wrong != 0;
}
