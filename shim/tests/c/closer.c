/* A program that treats every descriptor as its own, and one that has used them up. */
#include "fake.h"

#include <fcntl.h>
#include <sys/stat.h>

int main(void)
{
    for (int round = 0; round < 3; round++) {
        char *memory = shmat(6, NULL, 0);
        CHECK(memory != (void *)-1 && shmdt(memory) == 0);
        for (int fd = 3; fd < 4096; fd++)
            close(fd);
        CHECK(shmget(6, SIZE, 0) == 6);
        int null = open("/dev/null", O_RDWR);
        for (int fd = 3; fd < 1024; fd++)
            if (fd != null)
                CHECK(dup2(null, fd) == fd);
        CHECK(close(1023) == 0 && close(1022) == 0 && close(1021) == 0);
        CHECK(shmget(6, SIZE, 0) == 6);
        for (int fd = 3; fd < 1000; fd++) {
            struct stat status;
            CHECK(fstat(fd, &status) == 0 && S_ISCHR(status.st_mode)); /* nobody else's were closed */
        }
        for (int fd = 3; fd < 1024; fd++)
            close(fd);
    }

    CHECK(shmget(6, SIZE, 0) == 6);
    while (dup(0) != -1)
        ;
    FAILS(shmat(6, NULL, 0), ENOMEM);
    CHECK(close(3) == 0);
    char *memory = shmat(6, NULL, 0);
    CHECK(memory != (void *)-1 && shmdt(memory) == 0);
    return 0;
}
