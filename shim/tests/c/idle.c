/* No System V call: between the two writes, only what the program itself asks for. */
#include "fake.h"

#include <sys/wait.h>

int main(void)
{
    CHECK(write(1, "begin\n", 6) == 6);
    if (fork() == 0)
        _exit(0);
    wait(NULL);
    syscall(SYS_getppid);
    CHECK(write(1, "end\n", 4) == 4);
    return 0;
}
