/* What the library does for itself, it does by system calls: the functions of another preloaded
 * library may make System V calls themselves, or say something else than the kernel. Here they
 * end the program. */
#include "fake.h"

#include <fcntl.h>
#include <time.h>

#ifdef LIBRARY

static void replaced(const char *name)
{
    syscall(SYS_write, 2, name, strlen(name));
    syscall(SYS_write, 2, " was called\n", 12);
    _exit(1);
}

#define REPLACE(function)                            \
    void replace_##function(void) __asm__(#function); \
    void replace_##function(void) { replaced(#function); }

REPLACE(clock_gettime)
REPLACE(connect)
REPLACE(dup2)
REPLACE(epoll_create1)
REPLACE(epoll_ctl)
REPLACE(epoll_pwait2)
REPLACE(fcntl)
REPLACE(flock)
REPLACE(fstat)
REPLACE(fstat64)
REPLACE(getegid)
REPLACE(geteuid)
REPLACE(getpid)
REPLACE(getrlimit)
REPLACE(ioctl)
REPLACE(lstat)
REPLACE(memfd_create)
REPLACE(mkdir)
REPLACE(pipe2)
REPLACE(poll)
REPLACE(ppoll)
REPLACE(process_vm_readv)
REPLACE(process_vm_writev)
REPLACE(read)
REPLACE(readlink)
REPLACE(recvmsg)
REPLACE(sendmsg)
REPLACE(setsid)
REPLACE(setsockopt)
REPLACE(socket)
REPLACE(stat)
REPLACE(waitpid)
REPLACE(write)
REPLACE(writev)

#else

int main(void)
{
    /* The first call starts a daemon. */
    CHECK(shmget(6, SIZE, 0) == 6);
    char *memory = shmat(6, NULL, 0);
    CHECK(memory != (void *)-1);
    CHECK(shmdt(memory) == 0);
    struct shmid_ds segment;
    CHECK(shmctl(6, IPC_STAT, &segment) == 0);

    struct sembuf operation = {0, 1, 0};
    CHECK(semop(COMPLETES, &operation, 1) == 0);
    struct timespec timeout = {0, 1000000};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);

    struct message message = {.type = 1, .text = {9}};
    CHECK(msgsnd(COMPLETES, &message, 1, 9) == 0);
    CHECK(msgrcv(COMPLETES, &message, 5, -9, 77) == 5);

    CHECK(openat(AT_FDCWD, "/proc/sysvipc/shm", O_RDONLY) >= 0);
    return 0;
}

#endif
