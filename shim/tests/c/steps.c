/* Calls on demand: for each line on stdin one call, whose errno is printed. */
#include "fake.h"

int main(void)
{
    char line[64];
    struct sembuf operation = {0, -1, 0};
    while (fgets(line, sizeof line, stdin)) {
        int result = 0;
        errno = 0;
        if (strcmp(line, "call\n") == 0)
            result = shmget(6, SIZE, 0);
        else if (strcmp(line, "die\n") == 0)
            result = semop(DIES, &operation, 1);
        else if (strcmp(line, "nobody\n") == 0)
            result = seteuid(65534);
        printf("%d\n", result == -1 ? errno : 0);
        fflush(stdout);
    }
    return 0;
}
