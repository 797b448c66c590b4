/*
 * A process of another user, told what to do on standard input as `sysv` is, that may only read a
 * segment.
 *
 *   become UID          another user, for good        attach KEY BYTES    shmget, shmat(SHM_RDONLY)
 *   check V             `ok` if V is at both ends of every page
 *   await V             waits until it is             detach
 *   permit              mprotect(PROT_WRITE)          fork                a child checks from now on
 *   move                mremap
 *   spoil V             tries to write V to every page by all means, hostile ones too
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(long), LIFE = 200 /* seconds */, RECEIVED = 64 };

static size_t size;
static volatile long *memory;

/* Copies of the descriptors that the library maps: it closes its own. */
static int received[RECEIVED], received_count;

/* A system call that no library sees. */
static long raw(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* In libc's stead, also for the library: what that maps, a hostile process may keep. */
long syscall(long number, ...)
{
    va_list list;
    long a[6];
    va_start(list, number);
    for (int k = 0; k < 6; k++)
        a[k] = va_arg(list, long);
    va_end(list);
    long result = raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (number == SYS_mmap && (int)a[4] >= 0 && received_count < RECEIVED)
        received[received_count++] = fcntl((int)a[4], F_DUPFD_CLOEXEC, 100);
    if (result >= 0 || result < -4095)
        return result;
    errno = (int)-result;
    return -1;
}

static void write_all(volatile long *at, long value)
{
    for (size_t page = 0; page < size / PAGE; page++) {
        at[page * WORDS] = value;
        at[page * WORDS + WORDS - 1] = value;
    }
}

/* Does something that may well kill its process, in a child. */
static void in_child(void (*attempt)(long), long value)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        attempt(value);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void by_mprotect(long value)
{
    raw(SYS_mprotect, (long)memory, (long)size, PROT_READ | PROT_WRITE, 0, 0, 0);
    write_all(memory, value);
}

static void by_pkey_mprotect(long value)
{
    raw(SYS_pkey_mprotect, (long)memory, (long)size, PROT_READ | PROT_WRITE, -1, 0, 0);
    write_all(memory, value);
}

static void by_mremap(long value)
{
    /* A second mapping of the same memory. */
    long copy = raw(SYS_mremap, (long)memory, 0, (long)size, MREMAP_MAYMOVE, 0, 0);
    if (copy < 0)
        return;
    raw(SYS_mprotect, copy, (long)size, PROT_READ | PROT_WRITE, 0, 0, 0);
    write_all((volatile long *)copy, value);
}

static void write_file(int fd, long value)
{
    for (size_t page = 0; page < size / PAGE; page++) {
        off_t at = (off_t)(page * PAGE);
        ssize_t done = pwrite(fd, &value, sizeof value, at);
        done += pwrite(fd, &value, sizeof value, at + PAGE - (off_t)sizeof value);
        (void)done;
    }
}

static void by_proc_mem(long value)
{
    int fd = open("/proc/self/mem", O_RDWR);
    for (size_t page = 0; page < size / PAGE; page++) {
        ssize_t done = pwrite(fd, &value, sizeof value, (off_t)((uintptr_t)memory + page * PAGE));
        (void)done;
    }
}

static void by_process_vm_writev(long value)
{
    struct iovec from = {&value, sizeof value}, to = {(void *)memory, sizeof value};
    process_vm_writev(getppid(), &from, 1, &to, 1, 0);
}

static void by_file(int fd, long value)
{
    write_file(fd, value);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED)
        write_all(at, value);
    int truncated = ftruncate(fd, 0);
    (void)truncated;
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size);
    fchmod(fd, 0777);
    fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE);
    write_file(fd, value);
}

static void by_name(const char *folder, long value)
{
    DIR *directory = opendir(folder);
    if (directory == NULL)
        return;
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        char path[512], target[512] = "";
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length < 0 || strstr(target, "memfd:") == NULL)
            continue;
        int fd = open(path, O_RDWR);
        if (fd >= 0)
            by_file(fd, value);
    }
}

static int is_memory(int fd)
{
    char path[64], target[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof target - 1) > 0 && strstr(target, "memfd:") != NULL;
}

static void by_descriptors(long value)
{
    for (int k = 0; k < received_count; k++) {
        if (!is_memory(received[k]))
            continue;
        by_file(received[k], value);
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", received[k]);
        int fd = open(path, O_RDWR);
        if (fd >= 0)
            by_file(fd, value);
    }
    by_name("/proc/self/fd", value);
}

static void by_mapped_files(long value)
{
    by_name("/proc/self/map_files", value);
}

static void by_advice(long value)
{
    madvise((void *)memory, size, MADV_REMOVE);
    madvise((void *)memory, size, MADV_DONTNEED);
    madvise((void *)memory, size, MADV_POPULATE_WRITE);
    write_all(memory, value);
}

static void spoil(long value)
{
    void (*const attempts[])(long) = {by_mprotect,          by_pkey_mprotect, by_mremap,
                                      by_proc_mem,          by_process_vm_writev,
                                      by_descriptors,       by_mapped_files,  by_advice};
    int memories = 0;
    for (int k = 0; k < received_count; k++)
        memories += is_memory(received[k]);
    prctl(PR_SET_DUMPABLE, 1);
    for (size_t k = 0; k < sizeof attempts / sizeof *attempts; k++)
        in_child(attempts[k], value);
    puts(memories > 0 ? "ok" : "no descriptor came");
}

static int is_there(long value, long *found)
{
    for (size_t page = 0; page < size / PAGE; page++)
        for (size_t word = 0; word < WORDS; word += WORDS - 1)
            if ((*found = memory[page * WORDS + word]) != value)
                return 0;
    return 1;
}

static void check(long value)
{
    long found;
    if (is_there(value, &found))
        puts("ok");
    else
        printf("it is %ld\n", found);
}

static void await(long value)
{
    long found;
    for (time_t end = time(NULL) + 20; !is_there(value, &found); usleep(100))
        if (time(NULL) > end) {
            printf("it remains %ld\n", found);
            return;
        }
    puts("ok");
}

static void answer(long result)
{
    puts(result == -1 ? strerrorname_np(errno) : "ok");
}

static long attach(key_t key)
{
    int segment = shmget(key, 0, 0);
    if (segment == -1)
        return -1;
    void *address = shmat(segment, NULL, SHM_RDONLY);
    memory = address;
    return address == (void *)-1 ? -1 : 0;
}

/* With a page of its own before the attach, which may become writable. */
static int has_margin;

static long permit(void)
{
    char *start = (char *)memory - (has_margin ? PAGE : 0);
    size_t length = size + (has_margin ? PAGE : 0);
    long result = mprotect(start, length, PROT_READ | PROT_WRITE);
    if (has_margin)
        *start = 1;
    if (result == 0 || errno != EACCES)
        return result;
    return pkey_mprotect((void *)memory, size, PROT_READ | PROT_WRITE, -1);
}

static long move(void)
{
    char *to = mmap(NULL, PAGE + size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *address =
        mremap((void *)memory, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to + PAGE);
    memory = address;
    has_margin = 1;
    return address == MAP_FAILED ? -1 : 0;
}

/* The child goes on in this process's stead, which waits for its end. */
static void fork_on(void)
{
    pid_t child = fork();
    if (child > 0) {
        int status;
        waitpid(child, &status, 0);
        _exit(WEXITSTATUS(status));
    }
    answer(child);
}

static int obey(const char *verb, long first, long second)
{
    if (strcmp(verb, "become") == 0) {
        uid_t uid = (uid_t)first;
        answer(setgroups(0, NULL) == 0 && setresgid(uid, uid, uid) == 0 ? setresuid(uid, uid, uid)
                                                                      : -1);
    } else if (strcmp(verb, "attach") == 0) {
        size = (size_t)second;
        answer(attach((key_t)first));
    } else if (strcmp(verb, "detach") == 0)
        answer(shmdt((const void *)memory));
    else if (strcmp(verb, "check") == 0)
        check(first);
    else if (strcmp(verb, "await") == 0)
        await(first);
    else if (strcmp(verb, "permit") == 0)
        answer(permit());
    else if (strcmp(verb, "move") == 0)
        answer(move());
    else if (strcmp(verb, "fork") == 0)
        fork_on();
    else if (strcmp(verb, "spoil") == 0)
        spoil(first);
    else
        return 0;
    return 1;
}

int main(void)
{
    char line[100], verb[20];
    setvbuf(stdout, NULL, _IOLBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0); /* a child goes on where its parent was */
    alarm(LIFE);
    while (fgets(line, sizeof line, stdin) != NULL) {
        long first = 0, second = 0;
        if (sscanf(line, "%19s %li %li", verb, &first, &second) < 1 ||
            !obey(verb, first, second)) {
            fprintf(stderr, "reader: cannot do: %s", line);
            return 2;
        }
    }
    return 0;
}
