/*
 * Writers whose node may die at any moment, and who know what they had released by then.
 *
 *     ledger create           makes the objects
 *     ledger work LOG RANK    writes until it is killed; RANK, from 1, is no other writer's
 *     ledger show             prints what is there: page, rank and value, rank 0 being the counter
 *     ledger remove           removes the objects
 *
 * Step n of a writer is on one page, under that page's lock: it writes n into its own entry, and adds one
 * to the page's counter. When the lock is released, LOG (a file that is mapped) says n.
 */
#include "common.h"

#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { KEY = 0x6d740000 };
enum { PAGES = 12, LOCKS = 4, APART = 200, RANKS = PAGE / sizeof(long) };

static volatile long *memory;
static int locks;

static volatile long *entry(long page, long rank)
{
    return memory + page * APART * RANKS + rank;
}

static void lock(int number, short delta)
{
    struct sembuf op = {(unsigned short)number, delta, SEM_UNDO};
    if (semop(locks, &op, 1) != 0)
        err(1, "semop");
}

static void open_objects(int flags)
{
    int id = shmget(KEY, (size_t)PAGES * APART * PAGE, flags);
    if (id < 0)
        err(1, "shmget");
    memory = shmat(id, NULL, 0);
    if (memory == (void *)-1)
        err(1, "shmat");
    locks = semget(KEY, LOCKS, flags);
    if (locks < 0)
        err(1, "semget");
}

static void create(void)
{
    open_objects(IPC_CREAT | IPC_EXCL | 0600);
    unsigned short ones[LOCKS] = {1, 1, 1, 1};
    union semun all = {.array = ones};
    if (semctl(locks, 0, SETALL, all) != 0)
        err(1, "SETALL");
}

static _Noreturn void work(const char *path, long rank)
{
    int file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(long)) != 0)
        err(1, "%s", path);
    volatile long *done = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (done == MAP_FAILED)
        err(1, "mmap");
    for (long step = 1;; step++) {
        long page = (step + 4 * rank) % PAGES;
        lock((int)(page % LOCKS), -1);
        long before = *entry(page, rank), due = step > PAGES ? step - PAGES : 0;
        if (before != due)
            errx(1, "page %ld has %ld of rank %ld, not %ld", page, before, rank, due);
        *entry(page, rank) = step;
        *entry(page, 0) += 1;
        lock((int)(page % LOCKS), 1);
        *done = step;
    }
}

static void show(void)
{
    for (int number = 0; number < LOCKS; number++)
        lock(number, -1);
    for (long page = 0; page < PAGES; page++)
        for (long rank = 0; rank < (long)RANKS; rank++)
            if (*entry(page, rank) != 0)
                printf("%ld %ld %ld\n", page, rank, *entry(page, rank));
    for (int number = 0; number < LOCKS; number++)
        lock(number, 1);
}

static void remove_objects(void)
{
    int id = shmget(KEY, 0, 0);
    if (id < 0 || shmctl(id, IPC_RMID, NULL) != 0 || semctl(locks, 0, IPC_RMID) != 0)
        err(1, "cannot remove the objects");
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "create") == 0) {
        create();
        return 0;
    }
    open_objects(0);
    if (strcmp(what, "work") == 0 && argc == 4)
        work(argv[2], strtol(argv[3], NULL, 10));
    else if (strcmp(what, "show") == 0)
        show();
    else if (strcmp(what, "remove") == 0)
        remove_objects();
    else
        errx(2, "usage: ledger create | work LOG RANK | show | remove");
    return 0;
}
