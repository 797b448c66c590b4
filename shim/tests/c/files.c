/* The files that tell of System V objects, by every function that opens one; and other files,
   which open as ever. argv[1] is a folder to write to. */
#include "fake.h"

#include <fcntl.h>
#include <sys/stat.h>

int __open(const char *, int, ...);
int __open64(const char *, int, ...);
int __open_2(const char *, int);
int __open64_2(const char *, int);
int __openat_2(int, const char *, int);
int __openat64_2(int, const char *, int);

static const char shm[] = "/proc/sysvipc/shm";
static const char limit[] = "/proc/sys/kernel/sem";
static const char limit_text[] = "75\t73\t76\t72\n";

static void is_limit(int fd)
{
    char text[64] = "";
    CHECK(fd >= 0);
    CHECK(read(fd, text, sizeof text) == sizeof limit_text - 1 && strcmp(text, limit_text) == 0);
    CHECK(read(fd, text, 1) == 0);
    CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
    close(fd);
}

static void descriptors(void)
{
    int kernel = open("/proc/sys/kernel", O_RDONLY | O_DIRECTORY);
    is_limit(open(limit, O_RDONLY));
    is_limit(open64(limit, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
    is_limit(__open(limit, O_RDONLY));
    is_limit(__open64(limit, O_RDONLY));
    is_limit(__open_2(limit, O_RDONLY));
    is_limit(__open64_2(limit, O_RDONLY));
    is_limit(openat(-1, limit, O_RDONLY));
    is_limit(openat64(kernel, "sem", O_RDONLY));
    is_limit(__openat_2(kernel, "./sem", O_RDONLY));
    is_limit(__openat64_2(kernel, "../kernel/sem", O_RDONLY));

    /* The lowest that is free, as ever. */
    close(0);
    CHECK(open(limit, O_RDONLY | O_CLOEXEC) == 0 && fcntl(0, F_GETFD) == FD_CLOEXEC);
    close(0);
    CHECK(open(limit, O_RDONLY) == 0 && fcntl(0, F_GETFD) == 0);
    FAILS(open(limit, O_RDWR), EACCES);
    FAILS(open(limit, O_WRONLY | O_TRUNC), EACCES);
    FAILS(openat(kernel, "sem", O_WRONLY), EACCES);
    FAILS(open(limit, O_RDONLY | O_DIRECTORY), ENOTDIR);
    close(kernel);
}

static void streams(void)
{
    char line[300];
    FILE *file = fopen(limit, "r");
    CHECK(file && fgets(line, sizeof line, file) && strcmp(line, limit_text) == 0);
    CHECK(freopen(limit, "re", file) == file && fcntl(fileno(file), F_GETFD) == FD_CLOEXEC);
    CHECK(fgets(line, sizeof line, file) && !fgets(line, sizeof line, file));
    CHECK(freopen64(limit, "r", file) == file && fgets(line, sizeof line, file));
    fclose(file);
    errno = 0;
    CHECK(!fopen(limit, "r+") && errno == EACCES);
    CHECK(!fopen64(limit, "w") && errno == EACCES);

    /* A heading, and one line for each index up to the highest. */
    CHECK((file = fopen64(shm, "r")));
    int lines = 0;
    while (fgets(line, sizeof line, file))
        if (++lines == 2)
            CHECK(strcmp(line, "         0        100  1640                 12287    24    25     26    11    12 "
                               "   13    14         21         22         23                     0"
                               "                     0\n") == 0);
    CHECK(lines == 59);
    fclose(file);
}

static void others(const char *folder)
{
    CHECK(chdir(folder) == 0);
    umask(0);
    struct stat status;
    int fd = open("sem", O_CREAT | O_EXCL | O_RDWR, 0604);
    CHECK(fd >= 0 && fstat(fd, &status) == 0 && (status.st_mode & 0777) == 0604);
    CHECK(write(fd, "mine", 4) == 4);
    close(fd);
    fd = openat(AT_FDCWD, "shm", O_CREAT | O_RDWR, 0640);
    CHECK(fd >= 0 && fstat(fd, &status) == 0 && (status.st_mode & 0777) == 0640);
    close(fd);
    FILE *file = fopen("sem", "r+");
    CHECK(file && fgetc(file) == 'm');
    CHECK(freopen(NULL, "r", file) == file);
    fclose(file);
    FAILS(open("nothing/shm", O_RDONLY), ENOENT);
    FAILS(openat(-1, "shm", O_RDONLY), EBADF);
    FAILS(open("/proc/sysvipc/shm/shm", O_RDONLY), ENOTDIR);
    FAILS(open(NULL, O_RDONLY), EFAULT);
    fd = open("/proc/sysvipc", O_RDONLY | O_DIRECTORY);
    CHECK(fd >= 0);
    close(fd);
}

int main(int count, char **arguments)
{
    CHECK(count == 2);
    descriptors();
    streams();
    others(arguments[1]);
    return 0;
}
