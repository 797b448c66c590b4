/*
 * Every System V call made through syscall(2), as some programs and language runtimes do, mixed
 * with the libc functions: both must see the same objects, ids, memory and values.
 */
#include "common.h"

#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 5 };

static long ops = 2000;

struct letter {
    long type;
    long text;
};

static void raw_change(int set, int index, int delta, int flags)
{
    struct sembuf operation = {(unsigned short)index, (short)delta, (short)flags};
    while (syscall(SYS_semop, set, &operation, 1UL) < 0)
        if (errno != EINTR)
            die_errno("syscall(SYS_semop)");
}

static void errors(int segment, int set)
{
    struct sembuf take = {1, -1, 0};
    struct timespec soon = {.tv_nsec = 10000000};
    expect_errno(syscall(SYS_shmget, 0x12345, 0UL, 0), ENOENT);
    expect_errno(syscall(SYS_shmat, -1, NULL, 0), EINVAL);
    expect_errno(syscall(SYS_shmdt, NULL), EINVAL);
    expect_errno(syscall(SYS_shmctl, segment, 4711, NULL), EINVAL);
    expect_errno(syscall(SYS_semget, 0x12345, 0, 0), ENOENT);
    expect_errno(syscall(SYS_semop, set, &take, 0UL), EINVAL);
    expect_errno(syscall(SYS_semtimedop, set, &take, 1UL, &soon), EAGAIN);
    expect_errno(syscall(SYS_semctl, set, 9, GETVAL, 0UL), EINVAL);
    expect_errno(syscall(SYS_msgget, 0x12345, 0), ENOENT);
    expect_errno(syscall(SYS_msgsnd, -1, &(struct letter){.type = 1}, 0UL, 0), EINVAL);
    expect_errno(syscall(SYS_msgrcv, -1, NULL, 0UL, 0L, 0), EINVAL);
    expect_errno(syscall(SYS_msgctl, -1, IPC_RMID, NULL), EINVAL);
}

/* A letter that each rank sends to the next, by one way of calling, and gets by the other. */
static void pass_letters(const struct team *team, int queue)
{
    struct letter letter = {.type = 1 + (team->rank + 1) % team->ranks, .text = team->rank};
    must(syscall(SYS_msgsnd, queue, &letter, sizeof letter.text, 0));
    must(msgsnd(queue, &letter, sizeof letter.text, 0));
    for (int k = 0; k < 2; k++) {
        long got = k ? syscall(SYS_msgrcv, queue, &letter, sizeof letter.text, team->rank + 1L, 0)
                     : msgrcv(queue, &letter, sizeof letter.text, team->rank + 1, 0);
        int from = (team->rank + team->ranks - 1) % team->ranks;
        expect(must(got) == sizeof letter.text && letter.text == from, "a letter from %ld, not %d",
               letter.text, from);
    }
}

static void run(struct team *team)
{
    key_t key = team_key(team, SLOT);
    if (team->rank == 0) {
        int set = (int)must(syscall(SYS_semget, key, 2, IPC_CREAT | IPC_EXCL | 0600));
        must(syscall(SYS_semctl, set, 0, SETVAL, 1UL));
        must(syscall(SYS_shmget, key, 2UL * PAGE, IPC_CREAT | IPC_EXCL | 0600));
        must(syscall(SYS_msgget, key, IPC_CREAT | IPC_EXCL | 0600));
    }
    team_barrier(team);

    int segment = (int)must(syscall(SYS_shmget, key, 0UL, 0600));
    int set = (int)must(syscall(SYS_semget, key, 0, 0600));
    int queue = (int)must(syscall(SYS_msgget, key, 0600));
    expect(shmget(key, 0, 0600) == segment && semget(key, 0, 0600) == set &&
               msgget(key, 0600) == queue,
           "libc and syscall(2) find different objects");
    volatile long *raw = (volatile long *)must(syscall(SYS_shmat, segment, NULL, 0));
    volatile long *libc = attach(segment);
    team_barrier(team);

    struct shmid_ds status;
    must(syscall(SYS_shmctl, segment, IPC_STAT, &status));
    expect((int)status.shm_nattch == 2 * team->ranks, "nattch is %lu, not %d",
           (unsigned long)status.shm_nattch, 2 * team->ranks);
    if (team->rank == 0)
        errors(segment, set);
    pass_letters(team, queue);

    for (long k = 0; k < ops; k++) {
        bool by_libc = k % 2;
        if (by_libc)
            semaphore_change(set, 0, -1, SEM_UNDO);
        else
            raw_change(set, 0, -1, SEM_UNDO);
        raw[0] = raw[0] + 1;
        libc[PAGE / sizeof(long)] = libc[PAGE / sizeof(long)] + 1;
        if (by_libc)
            raw_change(set, 0, 1, SEM_UNDO);
        else
            semaphore_change(set, 0, 1, SEM_UNDO);
    }
    team_barrier(team);
    expect(libc[0] == ops * team->ranks && raw[PAGE / sizeof(long)] == ops * team->ranks,
           "the counters are %ld and %ld, not %ld", libc[0], raw[PAGE / sizeof(long)],
           ops * team->ranks);
    expect(must(syscall(SYS_semctl, set, 0, GETVAL, 0UL)) == 1, "the lock is not free");
    must(syscall(SYS_shmdt, raw));
    detach((void *)libc);
    team_barrier(team);
    if (team->rank == 0) {
        expect_attach_count(segment, 0, "all detaches");
        must(syscall(SYS_shmctl, segment, IPC_RMID, NULL));
        must(syscall(SYS_semctl, set, 0, IPC_RMID, 0UL));
        struct msqid_ds waiting;
        must(syscall(SYS_msgctl, queue, IPC_STAT, &waiting));
        expect(waiting.msg_qnum == 0, "%lu letters were not taken",
               (unsigned long)waiting.msg_qnum);
        must(syscall(SYS_msgctl, queue, IPC_RMID, NULL));
        expect_errno(shmget(key, 0, 0), ENOENT);
        expect_errno(semget(key, 0, 0), ENOENT);
        printf("%d ranks x %ld increments by syscall(2) and libc in turn: exact\n", team->ranks,
               ops);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "ops", .meaning = "increments of each rank", .number = &ops},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"All calls through syscall(2), mixed with libc.", 2, 1,
                                       settings, run});
}
