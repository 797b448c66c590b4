/* What the fake daemon of tests/fake_node answers, and a check. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Semaphore sets and message queues. */
enum {
    COMPLETES = 1, /* semop, msgsnd, msgrcv return at once */
    BLOCKS = 2,    /* until it is cancelled */
    WINS = 3,      /* until it is cancelled, but then it has been done */
    DIES = 4,      /* the daemon hangs up */
    STALE = 5,     /* the answer to an earlier call comes first */
    RAISES = 6,    /* until it is cancelled; SIGUSR1 comes as soon as the daemon knows of it */
};

/* semget of this key: SIGUSR1 comes, and the answer once another process has called. */
#define FORKS 77777

/* The largest message, and the type of every one received. */
#define TEXT 8192
#define MTYPE 0x0102030405060708

struct message {
    long type;
    unsigned char text[TEXT + 1];
};

/* Bytes of every segment. */
#define SIZE (3 * 4096 - 1)

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: %s (errno %s)\n", __FILE__, __LINE__, #condition,         \
                    strerror(errno));                                                         \
            _exit(1);                                                                         \
        }                                                                                     \
    } while (0)

#define FAILS(call, expected) CHECK((errno = 0, (long)(call) == -1) && errno == (expected))

union semun {
    int val;
    void *buf;
    unsigned short *array;
};
