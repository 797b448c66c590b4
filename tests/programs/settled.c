/*
 * Whoever has seen a process end finds its SEM_UNDO done and its attaches counted off, at once;
 * also where the set has been used so often before that operations on it may take a short cut.
 */
#include <errno.h>
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
    struct sembuf release = {.sem_op = 1}, take = {.sem_op = -1, .sem_flg = IPC_NOWAIT};
    struct sembuf lock = {.sem_op = -1, .sem_flg = SEM_UNDO};
    struct sembuf unlock = {.sem_op = 1, .sem_flg = SEM_UNDO}, extra = unlock;
    shmat(segment, NULL, 0);
    semop(set, &release, 1);
    for (int turn = 0; turn < 10; turn++) {
        semop(set, &take, 1);
        semop(set, &release, 1);
    }
    for (int round = 0; round < ROUNDS; round++) {
        pid_t child = round % 3 == 2 ? (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) : fork();
        if (child == 0) {
            if (round % 3 == 0)
                shmat(segment, NULL, 0);
            struct sembuf once = round % 5 == 4 ? extra : lock;
            for (int turn = 0; turn < 4; turn++)
                if (semop(set, &lock, 1) == -1 || semop(set, &unlock, 1) == -1)
                    _exit(1);
            if (semop(set, &once, 1) == -1)
                _exit(1);
            if (round % 2)
                kill(getpid(), SIGKILL);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        /* It is free, once. */
        wrong += semop(set, &take, 1) != 0 || semop(set, &take, 1) == 0 || errno != EAGAIN;
        semop(set, &release, 1);
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
