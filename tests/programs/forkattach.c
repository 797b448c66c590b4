/*
 * forkattach ROUNDS: attaches and forks follow each other closely, and meet. A child that was
 * forked after an attach counts; one that has no copy of it does not.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

static int segment;
static pthread_barrier_t start;
static pid_t child;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static long nattch(void)
{
    struct shmid_ds status;
    if (shmctl(segment, IPC_STAT, &status) == -1)
        die("IPC_STAT");
    return (long)status.shm_nattch;
}

static void *attach(void)
{
    void *address = shmat(segment, NULL, 0);
    if (address == (void *)-1)
        die("shmat");
    return address;
}

static void have_child(void)
{
    pid_t parent = getpid();
    child = fork();
    if (child == -1)
        die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (getppid() == parent)
            pause();
        _exit(0);
    }
}

static void end_child(void)
{
    kill(child, SIGKILL);
    if (waitpid(child, NULL, 0) != child)
        die("waitpid");
}

static long mapped(pid_t pid)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/maps", (int)pid);
    FILE *maps = fopen(path, "r");
    long count = 0;
    while (fgets(line, sizeof line, maps))
        count += strstr(line, "/memfd:migshm") != NULL;
    fclose(maps);
    return count;
}

static void expect(int holds, long round, const char *what, long is, long should)
{
    if (holds)
        return;
    fprintf(stderr, "round %ld: %ld attaches, %s %ld\n", round, is, what, should);
    exit(1);
}

static void *fork_meanwhile(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&start);
    have_child();
    return NULL;
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 100;
    segment = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600);
    if (segment == -1)
        die("shmget");
    alarm(120);
    for (long round = 0; round < rounds; round++) {
        void *address = attach();
        have_child();
        expect(nattch() == 2, round, "forked after the attach:", nattch(), 2);
        end_child();
        shmdt(address);
    }
    pthread_barrier_init(&start, NULL, 2);
    for (long round = 0; round < rounds; round++) {
        pthread_t forker;
        pthread_create(&forker, NULL, fork_meanwhile, NULL);
        pthread_barrier_wait(&start);
        void *address = attach();
        pthread_join(forker, NULL);
        long there = mapped(getpid()) + mapped(child);
        expect(nattch() <= there, round, "forked at the same time: at most", nattch(), there);
        end_child();
        shmdt(address);
        expect(nattch() == 0, round, "and then", nattch(), 0);
    }
    shmctl(segment, IPC_RMID, NULL);
    return 0;
}
