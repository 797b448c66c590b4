/*
 * Whoever has seen a process end finds its SEM_UNDO done and its attaches counted off, at once.
 */
#include <signal.h>
#include <stdio.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 300 };

int main(void)
{
    int set = semget(IPC_PRIVATE, 1, 0600), segment = shmget(IPC_PRIVATE, 4096, 0600), wrong = 0;
    struct sembuf release = {.sem_op = 1}, lock = {.sem_op = -1, .sem_flg = SEM_UNDO};
    shmat(segment, NULL, 0);
    semop(set, &release, 1);
    for (int round = 0; round < ROUNDS; round++) {
        pid_t child = round % 3 == 2 ? (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) : fork();
        if (child == 0) {
            if (round % 3 == 0)
                shmat(segment, NULL, 0);
            if (semop(set, &lock, 1) == -1)
                _exit(1);
            if (round % 2)
                kill(getpid(), SIGKILL);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        struct shmid_ds status;
        shmctl(segment, IPC_STAT, &status);
        wrong += semctl(set, 0, GETVAL) != 1 || status.shm_nattch != 1 || status.shm_lpid != child;
    }
    shmctl(segment, IPC_RMID, NULL);
    semctl(set, 0, IPC_RMID);
    if (wrong)
        printf("%d of %d rounds saw something unsettled\n", wrong, ROUNDS);
    return wrong != 0;
}
