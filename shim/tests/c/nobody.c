/* Without a daemon every call fails as on a kernel without System V IPC. */
#include "fake.h"

#include <sys/wait.h>

int main(void)
{
    struct sembuf operation = {0, 1, 0};
    FAILS(shmget(6, SIZE, IPC_CREAT | 0600), ENOSYS);
    FAILS(shmat(6, NULL, 0), ENOSYS);
    FAILS(shmdt((void *)4096), ENOSYS);
    FAILS(shmctl(6, IPC_RMID, NULL), ENOSYS);
    FAILS(semget(1, 1, IPC_CREAT | 0600), ENOSYS);
    FAILS(semop(1, &operation, 1), ENOSYS);
    FAILS(semtimedop(1, &operation, 1, NULL), ENOSYS);
    FAILS(semctl(1, 0, GETVAL), ENOSYS);
    FAILS(syscall(SYS_shmget, 6, SIZE, IPC_CREAT | 0600), ENOSYS);
    if (fork() == 0) {
        FAILS(shmget(6, SIZE, 0), ENOSYS);
        _exit(0);
    }
    int how;
    CHECK(wait(&how) > 0 && how == 0);
    return 0;
}
