/* Every function, with every kind of argument and result, from the place that argv[1] names.
   Built with -DCONSTRUCTOR it is a library that does so before main. */
#include "fake.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>

extern char **environ;

/* Whether no other thread may take an address that was given up. */
static int alone = 1;

static void segments(void)
{
    int id = shmget(6, SIZE, IPC_CREAT | 0600);
    CHECK(id == 6);
    FAILS(shmget(-1, SIZE, 0), ENOENT);

    char *first = shmat(id, NULL, 0);
    CHECK(first != (void *)-1);
    char *second = shmat(id, NULL, SHM_RDONLY);
    CHECK(second != (void *)-1 && second != first);
    strcpy(first + 8192, "shared");
    CHECK(strcmp(second + 8192, "shared") == 0);
    FAILS(shmat(id, second, 0), EINVAL);          /* occupied */
    FAILS(shmat(id, second + 1, 0), EINVAL);      /* unaligned */
    FAILS(shmat(id, NULL, SHM_REMAP), EINVAL);
    FAILS(shmat(-5, NULL, 0), EINVAL);
    FAILS(shmat(id, (void *)-4096, 0), EINVAL);   /* wraps */
    CHECK(shmat(id, second, SHM_REMAP) == second);
    CHECK(strcmp(second + 8192, "shared") == 0);
    CHECK(shmdt(second) == 0);
    if (alone) {
        CHECK(msync(second, 4096, MS_ASYNC) == -1); /* unmapped */
        CHECK(shmat(id, second + 5, SHM_RND) == second);
        CHECK(shmdt(second) == 0);
    }
    CHECK(shmdt(first) == 0);
    FAILS(shmdt((void *)0x5000), EINVAL);
    FAILS(shmdt((void *)0x5001), EINVAL);

    struct shmid_ds status;
    CHECK(shmctl(id, IPC_STAT, &status) == 0);
    CHECK(status.shm_perm.__key == id && status.shm_perm.uid == 11 && status.shm_perm.gid == 12);
    CHECK(status.shm_perm.cuid == 13 && status.shm_perm.cgid == 14);
    CHECK(status.shm_perm.mode == 01640 && status.shm_perm.__seq == 15);
    CHECK(status.shm_segsz == SIZE && status.shm_atime == 21 && status.shm_dtime == 22);
    CHECK(status.shm_ctime == 23 && status.shm_cpid == 24 && status.shm_lpid == 25);
    CHECK(status.shm_nattch == 26);
    CHECK(shmctl(3, SHM_STAT, &status) == 103 && shmctl(3, 15 /* SHM_STAT_ANY */, &status) == 103);
    FAILS(shmctl(id, IPC_STAT, NULL), EFAULT);
    FAILS(shmctl(id, IPC_STAT, (void *)8), EFAULT);
    FAILS(shmctl(id, IPC_STAT, (void *)"read-only"), EFAULT);
    FAILS(shmctl(id, IPC_SET, (void *)8), EFAULT);
    FAILS(shmctl(id, 99, &status), EINVAL);
    FAILS(shmctl(-1, IPC_STAT, &status), EINVAL);
    status.shm_perm.uid = 31;
    status.shm_perm.gid = 32;
    status.shm_perm.mode = 0600;
    CHECK(shmctl(id, IPC_SET, &status) == 0);
    CHECK(shmctl(id, SHM_LOCK, NULL) == 0 && shmctl(id, SHM_UNLOCK, NULL) == 0);
    CHECK(shmctl(id, IPC_RMID, NULL) == 0);

    struct shminfo limits;
    CHECK(shmctl(0, IPC_INFO, (void *)&limits) == 46);
    CHECK(limits.shmmax == 41 && limits.shmmin == 42 && limits.shmmni == 43);
    CHECK(limits.shmseg == 44 && limits.shmall == 45);
    struct shm_info usage;
    CHECK(shmctl(0, SHM_INFO, (void *)&usage) == 57);
    CHECK(usage.used_ids == 51 && usage.shm_tot == 52 && usage.shm_rss == 53);
    CHECK(usage.shm_swp == 54 && usage.swap_attempts == 55 && usage.swap_successes == 56);
}

static void semaphores(void)
{
    int id = semget(COMPLETES, 3, IPC_CREAT | 0600);
    CHECK(id == COMPLETES);
    FAILS(semget(-1, 3, 0), ENOENT);

    struct sembuf operations[501] = {{0, -1, SEM_UNDO}, {1, 2, IPC_NOWAIT}};
    CHECK(semop(id, operations, 2) == 0);
    CHECK(semop(id, operations, 500) == 0);
    CHECK(semop(STALE, operations, 1) == 0);
    FAILS(semop(id, operations, 501), E2BIG);
    FAILS(semop(id, operations, 0), EINVAL);
    FAILS(semop(-1, operations, 1), EINVAL);
    FAILS(semop(id, NULL, 1), EFAULT);
    FAILS(semop(id, (void *)8, 1), EFAULT);
    CHECK(semop(id, operations, 1) == 0);

    unsigned short values[4] = {0, 0, 0, 1234};
    CHECK(semctl(id, 0, GETALL, values) == 0);
    CHECK(values[0] == 7 && values[1] == 8 && values[2] == 65535 && values[3] == 1234);
    FAILS(semctl(id, 0, GETALL, (void *)8), EFAULT);
    FAILS(semctl(id, 0, GETALL, NULL), EFAULT);
    CHECK(semctl(id, 0, SETALL, values) == 0);
    FAILS(semctl(id, 0, SETALL, (void *)8), EFAULT);
    values[2] = 5;
    FAILS(semctl(id, 0, SETALL, values), ERANGE);

    CHECK(semctl(id, 2, GETVAL) == 1002 && semctl(id, 2, GETPID) == 2002);
    CHECK(semctl(id, 2, GETNCNT) == 3002 && semctl(id, 2, GETZCNT) == 4002);
    union semun argument = {.val = 5};
    CHECK(semctl(id, 1, SETVAL, argument) == 0 && semctl(id, 1, SETVAL, 5) == 0);
    FAILS(semctl(id, 1, SETVAL, -1), ERANGE);

    struct semid_ds status;
    argument.buf = &status;
    CHECK(semctl(id, 0, IPC_STAT, argument) == 0);
    CHECK(status.sem_perm.__key == id && status.sem_perm.uid == 11 && status.sem_perm.__seq == 15);
    CHECK(status.sem_otime == 61 && status.sem_ctime == 62 && status.sem_nsems == 3);
    CHECK(semctl(3, 0, SEM_STAT, argument) == 103);
    CHECK(semctl(3, 0, 20 /* SEM_STAT_ANY */, argument) == 3);
    FAILS(semctl(id, 0, IPC_STAT, NULL), EFAULT);
    FAILS(semctl(id, 0, 99, argument), EINVAL);
    status.sem_perm.uid = 31;
    status.sem_perm.gid = 32;
    status.sem_perm.mode = 0600;
    CHECK(semctl(id, 0, IPC_SET, argument) == 0);

    struct seminfo limits;
    argument.buf = &limits;
    CHECK(semctl(0, 0, IPC_INFO, argument) == 81 && semctl(0, 0, SEM_INFO, argument) == 81);
    CHECK(limits.semmap == 71 && limits.semmni == 72 && limits.semmns == 73);
    CHECK(limits.semmnu == 74 && limits.semmsl == 75 && limits.semopm == 76);
    CHECK(limits.semume == 77 && limits.semusz == 78 && limits.semvmx == 79);
    CHECK(limits.semaem == 80);
    CHECK(semctl(id, 0, IPC_RMID) == 0);
}

static void messages(void)
{
    int id = msgget(COMPLETES, IPC_CREAT | 0600);
    CHECK(id == COMPLETES);
    FAILS(msgget(-1, 0), ENOENT);

    /* The fake daemon wants type bytes of text, each equal to the flags. */
    struct message message = {.type = 3};
    memset(message.text, 7, sizeof message.text);
    CHECK(msgsnd(id, &message, 3, 7) == 0);
    FAILS(msgsnd(id, &message, 2, 7), EIO);
    FAILS(msgsnd(id, &message, 0, 7), EIO);
    message.type = TEXT;
    CHECK(msgsnd(id, &message, TEXT, 7) == 0);
    FAILS(msgsnd(id, &message, TEXT + 1, 7), EINVAL);
    FAILS(msgsnd(id, &message, (size_t)-1, 7), EINVAL);
    FAILS(msgsnd(-1, &message, 1, 0), EINVAL);
    message.type = 0;
    FAILS(msgsnd(id, &message, 1, 0), EINVAL);
    FAILS(msgsnd(id, NULL, 1, 0), EFAULT);
    FAILS(msgsnd(id, (void *)8, TEXT + 1, 0), EFAULT);
    /* The type can be read, the text cannot. */
    char *edge = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(edge != MAP_FAILED && mprotect(edge + 4096, 4096, PROT_NONE) == 0);
    edge += 4096 - sizeof(long);
    *(long *)edge = 1;
    FAILS(msgsnd(id, edge, 1, 0), EFAULT);
    FAILS(msgsnd(id, edge, 0, 0), EIO);

    CHECK(msgrcv(id, &message, 5, -9, 77) == 5);
    CHECK(message.type == MTYPE && memcmp(message.text, "\0\1\2\3\4\7\7", 7) == 0);
    CHECK(msgrcv(id, &message, 0, -9, 77) == 0 && message.type == MTYPE);
    CHECK(msgrcv(id, &message, SSIZE_MAX, -9, 77) == TEXT);
    CHECK(message.text[TEXT - 1] == (TEXT - 1) % 256 && message.text[TEXT] == 7);
    FAILS(msgrcv(id, &message, 5, -8, 77), ENOMSG);
    FAILS(msgrcv(id, &message, 5, -9, 78), ENOMSG);
    FAILS(msgrcv(id, &message, (size_t)-1, -9, 77), EINVAL);
    FAILS(msgrcv(-1, &message, 5, -9, 77), EINVAL);
    FAILS(msgrcv(id, NULL, 5, -9, 77), EFAULT);
    FAILS(msgrcv(id, edge, 5, -9, 77), EFAULT);
    FAILS(msgrcv(id, edge, TEXT, 0, IPC_NOWAIT | 040000 /* MSG_COPY */), EFAULT);
    FAILS(msgrcv(id, &message, 5, 0, IPC_NOWAIT | 040000), ENOMSG);
    FAILS(msgrcv(id, NULL, 5, 0, 040000), EINVAL);
    FAILS(msgrcv(id, NULL, 5, 0, MSG_EXCEPT | IPC_NOWAIT | 040000), EINVAL);
    CHECK(msgrcv(id, edge, 0, -9, 77) == 0 && *(long *)edge == MTYPE);
    CHECK(munmap(edge + sizeof(long) - 4096, 8192) == 0);

    struct msqid_ds status;
    CHECK(msgctl(id, IPC_STAT, &status) == 0);
    CHECK(status.msg_perm.__key == id && status.msg_perm.uid == 11 && status.msg_perm.__seq == 15);
    CHECK(status.msg_stime == 91 && status.msg_rtime == 92 && status.msg_ctime == 93);
    CHECK(status.msg_cbytes == 94 && status.msg_qnum == 95 && status.msg_qbytes == 96);
    CHECK(status.msg_lspid == 97 && status.msg_lrpid == 98);
    CHECK(msgctl(3, MSG_STAT, &status) == 103 && msgctl(3, 13 /* MSG_STAT_ANY */, &status) == 103);
    FAILS(msgctl(id, IPC_STAT, NULL), EFAULT);
    FAILS(msgctl(id, IPC_SET, (void *)8), EFAULT);
    FAILS(msgctl(id, 99, &status), EINVAL);
    FAILS(msgctl(-1, IPC_STAT, &status), EINVAL);
    status.msg_perm.uid = 31;
    status.msg_perm.gid = 32;
    status.msg_perm.mode = 0600;
    status.msg_qbytes = 33;
    CHECK(msgctl(id, IPC_SET, &status) == 0);
    status.msg_qbytes = 34;
    FAILS(msgctl(id, IPC_SET, &status), EPERM);
    CHECK(msgctl(id, IPC_RMID, NULL) == 0);

    struct msginfo limits;
    CHECK(msgctl(0, IPC_INFO, (void *)&limits) == 109);
    CHECK(msgctl(0, MSG_INFO, (void *)&limits) == 109);
    CHECK(limits.msgpool == 101 && limits.msgmap == 102 && limits.msgmax == 103);
    CHECK(limits.msgmnb == 104 && limits.msgmni == 105 && limits.msgssz == 106);
    CHECK(limits.msgtql == 107 && limits.msgseg == 108);
}

static void *all(void *unused)
{
    segments();
    semaphores();
    messages();
    errno = 12345;
    CHECK(shmget(6, SIZE, 0) == 6 && errno == 12345);
    return unused;
}

#ifdef CONSTRUCTOR
__attribute__((constructor)) static void construct(void)
{
    all(NULL);
}
#else
static void by_number(void)
{
    struct sembuf operation = {0, 1, 0};
    struct timespec second = {1, 0};
    struct semid_ds set;
    struct shmid_ds segment;
    CHECK(syscall(SYS_shmget, 6, (size_t)SIZE, 0600) == 6);
    FAILS(syscall(SYS_shmget, -1, (size_t)SIZE, 0600), ENOENT);
    char *memory = (void *)syscall(SYS_shmat, 6, NULL, 0);
    CHECK(memory != (void *)-1);
    memory[SIZE] = 1;
    CHECK(syscall(SYS_shmdt, memory) == 0);
    CHECK(syscall(SYS_shmctl, 6, IPC_STAT, &segment) == 0 && segment.shm_segsz == SIZE);
    CHECK(syscall(SYS_semget, COMPLETES, 3, 0600) == COMPLETES);
    CHECK(syscall(SYS_semop, COMPLETES, &operation, 1) == 0);
    CHECK(syscall(SYS_semtimedop, COMPLETES, &operation, 1, &second) == 0);
    CHECK(syscall(SYS_semctl, COMPLETES, 0, IPC_STAT | 0x100 /* IPC_64 */, &set) == 0);
    CHECK(set.sem_nsems == 3);
    CHECK(syscall(SYS_semctl, COMPLETES, 1, SETVAL, 4) == 0);
    struct message message = {.type = 1, .text = {9}};
    struct msqid_ds queue;
    CHECK(syscall(SYS_msgget, COMPLETES, 0600) == COMPLETES);
    CHECK(syscall(SYS_msgsnd, COMPLETES, &message, 1UL, 9) == 0);
    CHECK(syscall(SYS_msgrcv, COMPLETES, &message, 2UL, -9L, 77) == 2 && message.type == MTYPE);
    FAILS(syscall(SYS_msgrcv, COMPLETES, &message, 2UL, -9L, 76), ENOMSG);
    CHECK(syscall(SYS_msgctl, COMPLETES, IPC_STAT | 0x100 /* IPC_64 */, &queue) == 0);
    CHECK(queue.msg_qnum == 95);

    /* Everything else goes to the kernel. */
    CHECK(syscall(SYS_getpid) == getpid());
    FAILS(syscall(SYS_close, -1), EBADF);
    FAILS(syscall(100000), ENOSYS);
    char *six = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(six != MAP_FAILED && six[4095] == 0);
    int child = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL), how;
    if (child == 0)
        _exit(7);
    CHECK(waitpid(child, &how, 0) == child && WEXITSTATUS(how) == 7);
}

static void handler(int signal)
{
    (void)signal;
    all(NULL);
}

static void reap(pid_t child)
{
    int how;
    CHECK(child > 0 && waitpid(child, &how, 0) == child && WIFEXITED(how) && WEXITSTATUS(how) == 0);
}

int main(int argc, char **argv)
{
    const char *from = argc > 1 ? argv[1] : "main";
    if (strcmp(from, "nowhere") == 0)
        return 0;
    if (strcmp(from, "main") == 0) {
        all(NULL);
    } else if (strcmp(from, "syscall") == 0) {
        by_number();
    } else if (strcmp(from, "thread") == 0) {
        pthread_t threads[8];
        alone = 0;
        for (int i = 0; i < 8; i++)
            CHECK(pthread_create(&threads[i], NULL, all, NULL) == 0);
        for (int i = 0; i < 8; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
    } else if (strcmp(from, "signal") == 0) {
        signal(SIGUSR1, handler);
        raise(SIGUSR1);
    } else if (strcmp(from, "fork") == 0) {
        all(NULL);
        pid_t child = fork();
        if (child == 0) {
            all(NULL);
            pid_t grandchild = fork();
            if (grandchild == 0) {
                all(NULL);
                _exit(0);
            }
            reap(grandchild);
            _exit(0);
        }
        all(NULL);
        reap(child);
        all(NULL);
    } else if (strcmp(from, "clone") == 0) {
        all(NULL);
        pid_t child = syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
        if (child == 0) {
            all(NULL);
            _exit(0);
        }
        all(NULL);
        reap(child);
    } else if (strcmp(from, "vfork") == 0) {
        all(NULL);
        pid_t child = vfork();
        if (child == 0) {
            execl(argv[0], argv[0], "main", NULL);
            _exit(1);
        }
        reap(child);
        all(NULL);
    } else if (strcmp(from, "spawn") == 0) {
        all(NULL);
        char *arguments[] = {argv[0], "main", NULL};
        pid_t child;
        CHECK(posix_spawn(&child, argv[0], NULL, NULL, arguments, environ) == 0);
        reap(child);
        all(NULL);
    } else {
        return 2;
    }
    return 0;
}
#endif
