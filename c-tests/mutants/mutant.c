/*
 * System V IPC broken on purpose: a preload library that shows that the programs notice.
 *
 * MUTANT names the fault:
 *   private   an attach is a private copy of the segment
 *   nonblock  semop, msgsnd, msgrcv return success where they ought to wait
 *   piecewise semop does its operations one by one
 *   noundo    SEM_UNDO is ignored
 *   leak      attaches inherited by fork are counted for ever
 *   nodetach  shmdt does nothing
 *   anytype   msgrcv takes the first message, whatever type is asked for
 *   truncate  msgsnd loses the last byte of a message
 *
 * A team's control set (its key ends in 00, see common.h) always works, so that programs get past
 * their barriers and must find the fault in what they test.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

static int control = -1;
static unsigned forks; /* made by this process */

static bool is(const char *mutant)
{
    const char *wanted = getenv("MUTANT");
    return wanted && strcmp(wanted, mutant) == 0;
}

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

int semget(key_t key, int count, int flags)
{
    int set = ((int (*)(key_t, int, int))real("semget"))(key, count, flags);
    if (key != IPC_PRIVATE && (key & 0xff) == 0)
        control = set;
    return set;
}

int semop(int set, struct sembuf *operations, size_t count)
{
    int (*really)(int, struct sembuf *, size_t) = real("semop");
    if (set == control || count == 0 || count > 2 || operations == (void *)-1)
        return really(set, operations, count);
    struct sembuf changed[2];
    memcpy(changed, operations, count * sizeof *operations);
    if (is("piecewise")) {
        for (size_t k = 0; k < count; k++) {
            if (k > 0)
                usleep(100); /* others get in between */
            if (really(set, &changed[k], 1) < 0)
                return -1;
        }
        return 0;
    }
    for (size_t k = 0; k < count; k++) {
        if (is("noundo"))
            changed[k].sem_flg &= ~SEM_UNDO;
        if (is("nonblock"))
            changed[k].sem_flg |= IPC_NOWAIT;
    }
    int result = really(set, changed, count);
    return result < 0 && errno == EAGAIN && is("nonblock") ? 0 : result;
}

int msgsnd(int queue, const void *message, size_t size, int flags)
{
    int (*really)(int, const void *, size_t, int) = real("msgsnd");
    int result = really(queue, message, size - (size > 0 && is("truncate")),
                        is("nonblock") ? flags | IPC_NOWAIT : flags);
    return result < 0 && errno == EAGAIN && is("nonblock") ? 0 : result;
}

ssize_t msgrcv(int queue, void *message, size_t size, long type, int flags)
{
    ssize_t (*really)(int, void *, size_t, long, int) = real("msgrcv");
    ssize_t result = really(queue, message, size, is("anytype") ? 0 : type,
                            is("nonblock") ? flags | IPC_NOWAIT : flags);
    return result < 0 && errno == ENOMSG && is("nonblock") ? 0 : result;
}

void *shmat(int segment, const void *address, int flags)
{
    void *attached = ((void *(*)(int, const void *, int))real("shmat"))(segment, address, flags);
    struct shmid_ds status;
    if (!is("private") || attached == (void *)-1 || shmctl(segment, IPC_STAT, &status) < 0)
        return attached;
    size_t size = status.shm_segsz;
    void *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(copy, attached, size);
    return mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, attached);
}

int shmdt(const void *address)
{
    if (is("nodetach"))
        return 0;
    int result = ((int (*)(const void *))real("shmdt"))(address);
    return is("private") ? 0 : result;
}

int shmctl(int segment, int command, struct shmid_ds *status)
{
    int result = ((int (*)(int, int, struct shmid_ds *))real("shmctl"))(segment, command, status);
    if (result >= 0 && command == IPC_STAT && is("leak"))
        status->shm_nattch += forks;
    return result;
}

pid_t fork(void)
{
    pid_t child = ((pid_t (*)(void))real("fork"))();
    forks += child > 0;
    return child;
}
