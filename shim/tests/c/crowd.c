/* More blocked threads than there are pooled connections, with other calls among them, a fork,
   and a second round on what is left. */
#include "fake.h"

#include <pthread.h>
#include <sys/wait.h>
#include <time.h>

enum { THREADS = 200 };

static void *block(void *unused)
{
    struct sembuf operation = {0, -1, 0};
    struct timespec timeout = {1, 500000000};
    FAILS(semtimedop(BLOCKS, &operation, 1, &timeout), EAGAIN);
    return unused;
}

int main(void)
{
    for (int round = 0; round < 2; round++) {
        pthread_t threads[THREADS];
        for (int i = 0; i < THREADS; i++)
            CHECK(pthread_create(&threads[i], NULL, block, NULL) == 0);
        usleep(500000);
        CHECK(shmget(6, SIZE, 0) == 6);
        pid_t child = fork();
        if (child == 0) {
            CHECK(shmget(6, SIZE, 0) == 6);
            _exit(0);
        }
        int how;
        CHECK(waitpid(child, &how, 0) == child && how == 0);
        for (int i = 0; i < THREADS; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
    }
    return 0;
}
