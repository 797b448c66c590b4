/* Threads that are cancelled while they make calls, none of which is a cancellation point. */
#include "fake.h"

#include <pthread.h>

static void *call(void *done)
{
    CHECK(pthread_cancel(pthread_self()) == 0);
    /* A connection of another group's is replaced. */
    if (geteuid() == 0)
        CHECK(syscall(SYS_setresgid, -1, ++*(int *)done, -1) == 0);
    CHECK(semget(6, 3, 0) == 6);
    void *memory = shmat(shmget(6, SIZE, 0), NULL, 0);
    CHECK(memory != (void *)-1 && shmdt(memory) == 0);
    struct sembuf up = {0, 1, 0};
    CHECK(semop(COMPLETES, &up, 1) == 0);
    *(int *)done = -1;
    pthread_testcancel();
    return NULL;
}

int main(void)
{
    for (int turn = 0; turn < 3; turn++) {
        pthread_t thread;
        int done = turn;
        void *result;
        CHECK(pthread_create(&thread, NULL, call, &done) == 0);
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED && done == -1);
    }
    return 0;
}
