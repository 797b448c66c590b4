/*
 * duel SEED STEPS [NODES]: a random program of System V calls by several processes of several
 * users, whose capabilities come and go, the same for the same seed, with a line for each step: what was done and what came of it.
 * Two systems that behave alike print the same.
 *
 * A controller gives one step at a time to a worker and waits until it is done, or until the
 * semaphore set says that the worker waits there. Who went on because of a step is known from the
 * set's counts too, so nothing depends on time. Nobody waits at a message queue: who does so is not to
 * be seen, and who goes on is chance. With NODES, worker k runs on node k modulo NODES of
 * the lab that the environment names.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SHM_STAT_ANY
#define SHM_STAT_ANY 15
#endif
#ifndef SEM_STAT_ANY
#define SEM_STAT_ANY 20
#endif
#ifndef MSG_STAT_ANY
#define MSG_STAT_ANY 13
#endif
#ifndef MSG_COPY
#define MSG_COPY 040000
#endif

enum { WORKERS = 5, KEYS = 3, PLACES = 6, SEMS = 3, PAGE = 4096, TEXT = 1024, LIFE = 300 /* s */ };
enum { STEP_IN = 3, DONE_OUT = 4 };

/* Attaches at chosen addresses go here, where nothing else is. */
#define ARENA ((char *)0x100000000000)
#define ARENA_SIZE (PLACES * 8 * PAGE)

/* In half of all programs attaches are changed in part. The kernel then counts their pieces in
 * shm_nattch, and whoever made the last piece in shm_lpid, which is not worth imitating. */
static int in_parts;

/* What a worker is told: do `what` with these arguments. */
struct step {
    int what;
    long a, b, c, d;
};

/* ... and says. */
struct done {
    char text[TEXT];
};

enum what {
    SHMGET, SHMAT, SHMDT, SHMCTL, PEEK, POKE, PROTECT, UNMAP, ADVISE, REMAP, PIPE_IN, PIPE_OUT, MAPS,
    CHILD, SEMGET, SEMOP, SEMCTL, MSGGET, MSGSND, MSGRCV, MSGCTL, CAPABLE, WHATS
};

static uint64_t random_state;

/* splitmix64 */
static uint64_t next_random(void)
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static long below(long bound)
{
    return (long)(next_random() % (uint64_t)bound);
}

static int one_in(long n)
{
    return below(n) == 0;
}

#define PICK(...)                                                                                  \
    ((const long[]){__VA_ARGS__}[below(sizeof(long[]){__VA_ARGS__} / sizeof(long))])

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* ---- worker ------------------------------------------------------------------------------- */

static pid_t pids[WORKERS + 1]; /* the controller last; passed in the environment */
static char text[TEXT];
static size_t used;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    used += (size_t)vsnprintf(text + used, sizeof text - used, format, arguments);
    if (used >= sizeof text)
        used = sizeof text - 1;
    va_end(arguments);
}

static const char *who(pid_t pid)
{
    static char name[16];
    if (pid == 0)
        return "-";
    for (int k = 0; k <= WORKERS; k++)
        if (pids[k] == pid) {
            snprintf(name, sizeof name, "w%d", k);
            return name;
        }
    return "?";
}

static void say_result(long result)
{
    if (result == -1)
        say("%s", strerrorname_np(errno));
    else
        say("%ld", result);
}

static sigjmp_buf recovery;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    siglongjmp(recovery, signal);
}

static void nothing(int signal)
{
    (void)signal;
}

/* Runs `access`, and says which signal it raised if it did. */
#define GUARDED(access)                                                                            \
    do {                                                                                           \
        int signal = sigsetjmp(recovery, 1);                                                       \
        if (signal == 0)                                                                           \
            access;                                                                                \
        else                                                                                       \
            say("SIG%s", sigabbrev_np(signal));                                                    \
    } while (0)

static void say_perm(const struct ipc_perm *perm)
{
    say(" key %x uid %u gid %u cuid %u cgid %u mode %o", perm->__key, perm->uid, perm->gid,
        perm->cuid, perm->cgid, perm->mode);
}

static void do_shmctl(int id, int command, long argument)
{
    union {
        struct shmid_ds status;
        struct shminfo limits;
        struct shm_info usage;
    } buffer;
    memset(&buffer, 0, sizeof buffer);
    if (command == IPC_SET) {
        buffer.status.shm_perm.mode = (unsigned short)(argument & 0777);
        buffer.status.shm_perm.uid = (uid_t)(argument >> 9 & 3) + 1000;
        buffer.status.shm_perm.gid = (gid_t)(argument >> 11 & 3) + 1000;
    }
    long result = shmctl(id, command, argument == -1 ? NULL : &buffer.status);
    say_result(result);
    if (result == -1 || argument == -1)
        return;
    if (command == IPC_STAT || command == SHM_STAT || command == SHM_STAT_ANY) {
        struct shmid_ds *s = &buffer.status;
        say_perm(&s->shm_perm);
        say(" size %zu cpid %s ctime %d", s->shm_segsz, who(s->shm_cpid), s->shm_ctime != 0);
        if (!in_parts)
            say(" nattch %lu lpid %s atime %d dtime %d", s->shm_nattch, who(s->shm_lpid),
                s->shm_atime != 0, s->shm_dtime != 0);
    } else if (command == IPC_INFO) {
        say(" max %lx min %lu mni %lu seg %lu all %lx", buffer.limits.shmmax, buffer.limits.shmmin,
            buffer.limits.shmmni, buffer.limits.shmseg, buffer.limits.shmall);
    } else if (command == SHM_INFO) {
        say(" used %d pages %lu", buffer.usage.used_ids, buffer.usage.shm_tot);
    }
}

static void do_semctl(int id, int number, int command, long argument)
{
    union {
        struct semid_ds status;
        struct seminfo limits;
        unsigned short values[SEMS + 5];
    } buffer;
    union semun {
        int value;
        void *pointer;
    } fourth;
    memset(&buffer, 0, sizeof buffer);
    fourth.pointer = argument == -1 ? NULL : (void *)&buffer;
    if (command == SETVAL) {
        fourth.pointer = NULL;
        fourth.value = (int)argument;
    } else if (command == SETALL) {
        for (int k = 0; k < SEMS; k++)
            buffer.values[k] = (unsigned short)(argument >> 2 * k & 3);
        if (argument == 77)
            buffer.values[0] = 40000;
    } else if (command == IPC_SET) {
        buffer.status.sem_perm.mode = (unsigned short)(argument & 0777);
        buffer.status.sem_perm.uid = (uid_t)(argument >> 9 & 3) + 1000;
        buffer.status.sem_perm.gid = (gid_t)(argument >> 11 & 3) + 1000;
    }
    long result = semctl(id, number, command, fourth);
    if (command == GETPID && result != -1) {
        say("%s", who((pid_t)result));
        return;
    }
    say_result(result);
    if (result == -1 || argument == -1)
        return;
    if (command == IPC_STAT || command == SEM_STAT || command == SEM_STAT_ANY) {
        say_perm(&buffer.status.sem_perm);
        say(" nsems %lu otime %d ctime %d", buffer.status.sem_nsems, buffer.status.sem_otime != 0,
            buffer.status.sem_ctime != 0);
    } else if (command == IPC_INFO || command == SEM_INFO) {
        struct seminfo *l = &buffer.limits;
        say(" %d %d %d %d %d %d %d %d %d %d", l->semmap, l->semmni, l->semmns, l->semmnu, l->semmsl,
            l->semopm, l->semume, l->semusz, l->semvmx, l->semaem);
    } else if (command == GETALL) {
        for (int k = 0; k < SEMS; k++)
            say(" %d", buffer.values[k]);
    }
}

static void do_semop(int id, long shape, long count)
{
    struct sembuf ops[4];
    for (long k = 0; k < count && k < 4; k++, shape >>= 8) {
        ops[k].sem_num = (unsigned short)(shape & 3);
        ops[k].sem_op = (short)((shape >> 2 & 7) - 3);
        ops[k].sem_flg = (short)((shape & 32 ? IPC_NOWAIT : 0) | (shape & 64 ? SEM_UNDO : 0));
        if (ops[k].sem_num == 3 && (shape & 128) == 0)
            ops[k].sem_num = 0; /* seldom EFBIG */
    }
    say_result(semop(id, count == 9 ? NULL : ops, (size_t)count));
}

/* Room for the largest message and one byte too many. */
static struct {
    long type;
    unsigned char text[8193];
} message;

/* Where a message is: in the worker's own memory, nowhere, or in the arena. */
static void *message_at(long place)
{
    return place == -1 ? (void *)&message : place == -2 ? NULL : ARENA + place;
}

static void do_msgsnd(int id, long type, size_t size, long place)
{
    message.type = type;
    for (size_t k = 0; k < size && k < sizeof message.text; k++)
        message.text[k] = (unsigned char)(type * 31 + (long)k * 7);
    say_result(msgsnd(id, message_at(place), size, IPC_NOWAIT));
}

static void do_msgrcv(int id, long type, size_t size, long flags_and_place)
{
    long place = flags_and_place >> 16;
    memset(&message, 0, sizeof message);
    long result = msgrcv(id, message_at(place), size, type, IPC_NOWAIT | (int)(flags_and_place & 0xffff));
    say_result(result);
    unsigned long sum = 0;
    for (size_t k = 0; k < sizeof message.text; k++)
        sum = sum * 131 + message.text[k];
    say(" type %ld sum %lx", message.type, sum);
}

static void do_msgctl(int id, int command, long argument)
{
    union {
        struct msqid_ds status;
        struct msginfo limits;
    } buffer;
    memset(&buffer, 0, sizeof buffer);
    if (command == IPC_SET) {
        static const unsigned long sizes[] = {16384, 16384, 100, 0, 16385, 1UL << 32, 0xffffffff, -1UL};
        buffer.status.msg_perm.mode = (unsigned short)(argument & 0777);
        buffer.status.msg_perm.uid = (uid_t)(argument >> 9 & 3) + 1000;
        buffer.status.msg_perm.gid = (gid_t)(argument >> 11 & 3) + 1000;
        buffer.status.msg_qbytes = sizes[argument >> 13 & 7];
    }
    long result = msgctl(id, command, argument == -1 ? NULL : &buffer.status);
    say_result(result);
    if (result == -1 || argument == -1)
        return;
    if (command == IPC_STAT || command == MSG_STAT || command == MSG_STAT_ANY) {
        struct msqid_ds *s = &buffer.status;
        say_perm(&s->msg_perm);
        say(" qnum %lu cbytes %lu qbytes %lx", s->msg_qnum, s->__msg_cbytes, s->msg_qbytes);
        say(" lspid %s", who(s->msg_lspid));
        say(" lrpid %s stime %d rtime %d ctime %d", who(s->msg_lrpid), s->msg_stime != 0,
            s->msg_rtime != 0, s->msg_ctime != 0);
    } else if (command == IPC_INFO || command == MSG_INFO) {
        struct msginfo *l = &buffer.limits;
        say(" %d %d %d %d %d %d %d %d", l->msgpool, l->msgmap, l->msgmax, l->msgmnb, l->msgmni, l->msgssz,
            l->msgtql, l->msgseg);
    }
}

/* The arena's mappings, as ranges with permissions. */
static void say_maps(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], mode[5], last_mode[5] = "";
    unsigned long start, end, last_start = 0, last_end = 0;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %4s", &start, &end, mode) != 3)
            continue;
        if (start < (unsigned long)ARENA || end > (unsigned long)ARENA + ARENA_SIZE)
            continue;
        if (start == last_end && strcmp(mode, last_mode) == 0) {
            last_end = end;
            continue;
        }
        if (last_end != 0)
            say(" %lx-%lx %s", last_start - (unsigned long)ARENA, last_end - (unsigned long)ARENA, last_mode);
        last_start = start, last_end = end;
        strcpy(last_mode, mode);
    }
    if (last_end != 0)
        say(" %lx-%lx %s", last_start - (unsigned long)ARENA, last_end - (unsigned long)ARENA, last_mode);
    fclose(maps);
}

/* A child that inherits the attaches, writes to one, and ends in one of several ways. */
static void do_child(volatile char *byte, long value, long way)
{
    pid_t child = fork();
    if (child == 0) {
        if (sigsetjmp(recovery, 1) == 0) {
            if (way & 1)
                *byte = (char)value;
            if (way & 2)
                shmdt(ARENA);
        }
        if (way & 4)
            kill(getpid(), SIGKILL);
        _exit(*"" + (int)(way & 8));
    }
    int status;
    if (child == -1 || waitpid(child, &status, 0) != child)
        die("fork");
    say("%x", status);
}

static void do_pipe(char *address, long length, int in)
{
    int ends[2];
    char bytes[64];
    if (pipe(ends) == -1)
        die("pipe");
    memset(bytes, 'k', sizeof bytes);
    if (in && write(ends[1], bytes, sizeof bytes) == -1)
        die("write");
    say_result(in ? read(ends[0], address, (size_t)length) : write(ends[1], address, (size_t)length));
    close(ends[0]);
    close(ends[1]);
}

/* Has of the permitted capabilities these in effect. */
static void do_capable(long mask)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        die("capget");
    data[0].effective = data[0].permitted & (unsigned)mask;
    data[1].effective = 0;
    say_result(syscall(SYS_capset, &header, data));
}

static void do_step(const struct step *s)
{
    char *address = ARENA + s->a;
    switch ((enum what)s->what) {
    case SHMGET:
        say_result(shmget((key_t)s->a, (size_t)s->b, (int)s->c));
        break;
    case SHMAT: {
        char *at = shmat((int)s->a, s->b == -1 ? NULL : ARENA + s->b, (int)s->c);
        if (at == (void *)-1)
            say("%s", strerrorname_np(errno));
        else if (s->b != -1)
            say("%lx", (unsigned long)(at - ARENA));
        else
            say("%d", shmdt(at)); /* the kernel's choice cannot be compared */
        break;
    }
    case SHMDT:
        say_result(shmdt(address));
        break;
    case SHMCTL:
        do_shmctl((int)s->a, (int)s->b, s->c);
        break;
    case PEEK:
        GUARDED(say("%d", *(volatile char *)address));
        break;
    case POKE:
        GUARDED(*(volatile char *)address = (char)s->b);
        break;
    case PROTECT:
        say_result(mprotect(address, (size_t)s->b, (int)s->c));
        break;
    case UNMAP:
        say_result(munmap(address, (size_t)s->b));
        break;
    case ADVISE:
        say_result(madvise(address, (size_t)s->b, (int)s->c));
        break;
    case REMAP: {
        char *at = mremap(address, (size_t)s->b, (size_t)s->c, 0);
        if (at == MAP_FAILED)
            say("%s", strerrorname_np(errno));
        else
            say("%lx", (unsigned long)(at - ARENA));
        break;
    }
    case PIPE_IN:
    case PIPE_OUT:
        do_pipe(address, s->b, s->what == PIPE_IN);
        break;
    case MAPS:
        say_maps();
        break;
    case CHILD:
        do_child(address, s->b, s->c);
        break;
    case SEMGET:
        say_result(semget((key_t)s->a, (int)s->b, (int)s->c));
        break;
    case SEMOP:
        do_semop((int)s->a, s->b, s->c);
        break;
    case SEMCTL:
        do_semctl((int)s->a, (int)s->b, (int)s->c, s->d);
        break;
    case MSGGET:
        say_result(msgget((key_t)s->a, (int)s->b));
        break;
    case MSGSND:
        do_msgsnd((int)s->a, s->b, (size_t)s->c, s->d);
        break;
    case MSGRCV:
        do_msgrcv((int)s->a, s->b, (size_t)s->c, s->d);
        break;
    case MSGCTL:
        do_msgctl((int)s->a, (int)s->b, s->c);
        break;
    case CAPABLE:
        do_capable(s->a);
        break;
    case WHATS:
        break;
    }
}

static int work(int number)
{
    static const struct {
        uid_t uid;
        gid_t gid, group;
    } users[WORKERS] = {{0, 0, 0}, {0, 0, 0}, {1000, 1000, 1000}, {1001, 1001, 1000}, {1002, 1002, 1002}};
    sscanf(getenv("DUEL_CONTROLLER"), "%d %d", &pids[WORKERS], &in_parts);
    gid_t group = users[number].group;
    if (users[number].uid != 0
        && (prctl(PR_SET_KEEPCAPS, number == WORKERS - 1) || setgroups(1, &group) || setresgid(users[number].gid, users[number].gid, users[number].gid)
            || setresuid(users[number].uid, users[number].uid, users[number].uid)))
        die("setresuid");
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    struct sigaction ignored = {.sa_handler = nothing, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &ignored, NULL);
    alarm(LIFE);
    if (read(STEP_IN, pids, WORKERS * sizeof pids[0]) != WORKERS * sizeof pids[0])
        die("pids");
    struct step step;
    while (read(STEP_IN, &step, sizeof step) == sizeof step) {
        used = 0;
        memset(text, 0, sizeof text);
        do_step(&step);
        if (write(DONE_OUT, text, sizeof text) != sizeof text)
            die("write");
    }
    return 0;
}

/* ---- controller ---------------------------------------------------------------------------- */

static int to[WORKERS], from[WORKERS];
static int waits_on[WORKERS]; /* the set's id, or -1 */

static void start_workers(const char *self, int nodes)
{
    char number[16], controller[16], directory[4096];
    snprintf(controller, sizeof controller, "%d %d", getpid(), in_parts);
    setenv("DUEL_CONTROLLER", controller, 1);
    pids[WORKERS] = getpid();
    for (int k = 0; k < WORKERS; k++) {
        int in[2], out[2];
        if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
            die("pipe2");
        snprintf(number, sizeof number, "%d", k);
        pids[k] = fork();
        if (pids[k] == 0) {
            int input = fcntl(in[0], F_DUPFD, 10), output = fcntl(out[1], F_DUPFD, 10);
            dup2(input, STEP_IN);
            dup2(output, DONE_OUT);
            close(input);
            close(output);
            if (nodes > 0) {
                snprintf(directory, sizeof directory, "%s/node%d", getenv("MIGSHM_LAB"), k % nodes + 1);
                setenv("MIGSHM_RUNTIME_DIR", directory, 1);
            }
            execl(self, self, "worker", number, NULL);
            die("exec");
        }
        to[k] = in[1];
        from[k] = out[0];
        waits_on[k] = -1;
    }
    for (int k = 0; k < WORKERS; k++)
        if (write(to[k], pids, WORKERS * sizeof pids[0]) != WORKERS * sizeof pids[0])
            die("write");
}

/* Prints what a worker says, and returns it as a number. */
static long print_done(int worker)
{
    struct done done;
    for (size_t got = 0; got < sizeof done;) {
        ssize_t more = read(from[worker], (char *)&done + got, sizeof done - got);
        if (more <= 0) {
            printf("w%d is gone\n", worker);
            exit(1);
        }
        got += (size_t)more;
    }
    printf("%s", done.text);
    return strtol(done.text, NULL, 10);
}

static int is_done(int worker, int milliseconds)
{
    struct pollfd poll_in = {.fd = from[worker], .events = POLLIN};
    return poll(&poll_in, 1, milliseconds) == 1;
}

/* How many processes wait on a set; none if it is gone. */
static int waiting_on(int id)
{
    struct semid_ds status;
    union {
        void *pointer;
    } fourth = {&status};
    if (semctl(id, 0, IPC_STAT, fourth) == -1)
        return 0;
    int waiting = 0;
    for (int k = 0; k < (int)status.sem_nsems; k++)
        waiting += semctl(id, k, GETNCNT) + semctl(id, k, GETZCNT);
    return waiting;
}

/* Waits for those who must have gone on, and prints them. */
static void settle(int also)
{
    for (int k = 0; k < WORKERS; k++) {
        int id = waits_on[k];
        if (id < 0)
            continue;
        int noted = 0, ready = 0;
        for (int other = k; other < WORKERS; other++)
            noted += waits_on[other] == id;
        /* A signal ends the wait of one. */
        for (;;) {
            ready = 0;
            for (int other = k; other < WORKERS; other++)
                ready += waits_on[other] == id && is_done(other, 0);
            int waiting = waiting_on(id);
            int due = also != -1 && waits_on[also] == id && !is_done(also, 0);
            if (ready + waiting == noted && !due)
                break;
            poll(NULL, 0, 1);
        }
        for (int other = k; other < WORKERS; other++)
            if (waits_on[other] == id && is_done(other, 0)) {
                printf("    w%d goes on: ", other);
                print_done(other);
                printf("\n");
                waits_on[other] = -1;
            } else if (waits_on[other] == id && other != k) {
                waits_on[other] = -2 - id; /* seen */
            }
        if (waits_on[k] == id)
            waits_on[k] = -2 - id;
    }
    for (int k = 0; k < WORKERS; k++)
        if (waits_on[k] <= -2)
            waits_on[k] = -2 - waits_on[k];
}

/* Ids that were given out last. */
static long ids[3][4];

/* An id of a kind, seldom one that never was. */
static long any_id(long kind)
{
    return one_in(10) ? PICK(0, 1, 2, 32768, 65536, -1, 12345) : ids[kind][below(4)];
}

static long any_place(void)
{
    return below(PLACES) * 8 * PAGE;
}

/* A byte or page near the attaches. */
static long any_offset(void)
{
    return any_place() + below(4) * PAGE;
}

/* Mostly memory of the worker's own; seldom none, or that of a segment, which may end there. */
static long any_message_place(void)
{
    return one_in(8) ? PICK(-2, any_offset(), any_offset() + 4088) : -1;
}

static struct step random_step(void)
{
    struct step s = {.what = (int)PICK(SHMGET, SHMGET, SHMAT, SHMAT, SHMAT, SHMDT, SHMCTL, SHMCTL, PEEK, PEEK,
                                       POKE, POKE, PROTECT, UNMAP, ADVISE, REMAP, PIPE_IN, PIPE_OUT, MAPS, CHILD,
                                       SEMGET, SEMOP, SEMOP, SEMOP, SEMCTL, SEMCTL, MSGGET, MSGSND, MSGSND,
                                       MSGRCV, MSGRCV, MSGCTL, CAPABLE)};
    switch ((enum what)s.what) {
    case SHMGET:
        s.a = one_in(8) ? 0 : 1 + below(KEYS);
        s.b = in_parts ? PICK(0, 1, 4096, 5000, 8192, 12288, 12288, 12288, 12288, -1)
                       : PICK(0, 9000, 12288, 12288, -1);
        s.c = PICK(0, 0600, 0666, 0444, 0222, 01000, 01600, 01666, 01666, 01666, 01666, 01644, 01640, 03666);
        break;
    case SHMAT:
        s.a = any_id(0);
        s.b = one_in(6) ? -1 : (in_parts ? any_offset() : any_place()) + PICK(0, 0, 0, 0, 1, 100, 4095);
        s.c = PICK(0, 0, 0, SHM_RDONLY, SHM_RDONLY, SHM_RND, SHM_RND | SHM_RDONLY, SHM_REMAP, SHM_REMAP | SHM_RND,
                   SHM_EXEC, SHM_RDONLY | SHM_EXEC);
        break;
    case SHMDT:
        s.a = one_in(4) ? any_offset() + PICK(0, 0, 1, 100) : any_place();
        break;
    case SHMCTL:
        s.a = any_id(0);
        s.b = one_in(10) ? PICK(IPC_RMID, 77, GETVAL)
                         : PICK(IPC_STAT, IPC_STAT, IPC_STAT, SHM_STAT, SHM_STAT_ANY, IPC_SET, SHM_LOCK, SHM_UNLOCK,
                                IPC_INFO, SHM_INFO);
        s.c = s.b == IPC_SET ? below(1 << 13) | 0400 : one_in(20) && s.b != IPC_INFO && s.b != SHM_INFO ? -1 : 0;
        break;
    case PEEK:
    case POKE:
        s.a = any_offset() + PICK(0, 1, 4095);
        s.b = below(127);
        break;
    case PROTECT:
        s.a = in_parts ? any_offset() : any_place();
        s.b = in_parts ? PAGE * (1 + below(3)) : 8 * PAGE;
        s.c = PICK(PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC);
        break;
    case UNMAP:
        s.a = in_parts ? any_offset() : any_place();
        s.b = in_parts ? PAGE * (1 + below(3)) : 8 * PAGE;
        break;
    case ADVISE:
        s.a = in_parts ? any_offset() : any_place();
        s.b = in_parts ? PAGE * (1 + below(3)) : 8 * PAGE;
        s.c = PICK(MADV_NORMAL, MADV_DONTNEED, MADV_DONTNEED, MADV_WILLNEED, MADV_RANDOM);
        break;
    case REMAP:
        s.a = any_offset();
        /* Only smaller: pieces of several attaches that are neighbours in the segment and in memory
         * are one mapping of a memfd, and can grow together, but not of System V. */
        s.b = PAGE * (2 + below(2));
        s.c = s.b - PAGE;
        break;
    case PIPE_IN:
    case PIPE_OUT:
        s.a = any_offset() + PICK(0, 4090);
        s.b = PICK(1, 20, 64);
        break;
    case CHILD:
        s.a = any_offset() + below(4);
        s.b = below(127);
        s.c = below(16);
        break;
    case SEMGET:
        s.a = one_in(8) ? 0 : 1 + below(KEYS);
        s.b = PICK(0, 1, 2, 3, 3, 3, 3, -1, 32001);
        s.c = PICK(0, 0600, 0666, 0444, 01000, 01600, 01666, 01666, 01666, 01644, 03666);
        break;
    case SEMOP:
        s.a = any_id(1);
        s.b = (long)(next_random() & 0x7fffffff);
        s.c = one_in(12) ? PICK(0, 501, 9) : PICK(1, 1, 1, 2, 2, 3);
        break;
    case SEMCTL:
        s.a = any_id(1);
        s.b = PICK(0, 0, 0, 1, 2, 3, -1);
        s.c = one_in(20) ? PICK(IPC_RMID, 77)
                         : PICK(IPC_STAT, SEM_STAT, SEM_STAT_ANY, IPC_SET, IPC_INFO, SEM_INFO, GETVAL, GETVAL,
                                SETVAL, GETALL, GETALL, SETALL, GETPID, GETPID, GETNCNT, GETZCNT);
        s.d = s.c == SETVAL    ? PICK(0, 1, 2, 3, 32767, 32768, -1)
              : s.c == SETALL  ? PICK(0, 1, 5, 27, 63, 77)
              : s.c == IPC_SET ? below(1 << 13) | 0600
                               : 0;
        break;
    case MSGGET:
        s.a = one_in(8) ? 0 : 1 + below(KEYS);
        s.b = PICK(0, 0600, 0666, 0444, 01000, 01600, 01666, 01666, 01666, 01644, 03666);
        break;
    case MSGSND:
        s.a = any_id(2);
        s.b = PICK(1, 2, 3, 4, 4, 0, -1, INT64_MAX);
        s.c = PICK(0, 1, 20, 100, 100, 3000, 8192, 8193, -1);
        s.d = any_message_place();
        break;
    case MSGRCV:
        s.a = any_id(2);
        s.b = PICK(0, 0, 1, 2, -2, -3, -1, 4, INT64_MIN);
        s.c = PICK(0, 19, 100, 8192, 8192, 8192, INT64_MAX, -1);
        s.d = any_message_place() * 65536 + PICK(0, 0, MSG_NOERROR, MSG_EXCEPT, MSG_NOERROR | MSG_EXCEPT, MSG_COPY,
                                                 MSG_COPY | MSG_NOERROR, MSG_COPY | MSG_EXCEPT);
        break;
    case MSGCTL:
        s.a = any_id(2);
        s.b = one_in(12) ? PICK(IPC_RMID, 77)
                         : PICK(IPC_STAT, IPC_STAT, IPC_STAT, MSG_STAT, MSG_STAT_ANY, IPC_SET, IPC_INFO, MSG_INFO);
        s.c = s.b == IPC_SET ? below(1 << 16) | 0600 : one_in(20) && s.b != IPC_INFO && s.b != MSG_INFO ? -1 : 0;
        break;
    case CAPABLE:
        s.a = PICK(0, -1, 1L << CAP_IPC_OWNER, 1L << CAP_SYS_ADMIN, 1L << CAP_IPC_LOCK, 1L << CAP_SYS_RESOURCE);
        break;
    default:
        break;
    }
    return s;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "worker") == 0)
        return work(atoi(argv[2]));
    if (argc < 3)
        return 2;
    static const char *const names[] = {"shmget",  "shmat",   "shmdt",    "shmctl",    "peek", "poke",
                                        "mprotect", "munmap",  "madvise",  "mremap",    "pipe in", "pipe out",
                                        "maps",    "child",   "semget",   "semop",     "semctl", "msgget", "msgsnd",
                                        "msgrcv",  "msgctl", "capable"};
    uint64_t seed = strtoull(argv[1], NULL, 0);
    in_parts = seed % 2 == 0;
    long steps = atol(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    alarm(LIFE);
    if (semget(99, 0, 0) != -1 || errno != ENOENT) /* root is the first to call */
        die("not a place of our own");
    setvbuf(stdout, NULL, _IOLBF, 0);
    start_workers(argv[0], argc > 3 ? atoi(argv[3]) : 0);
    for (long step = 0; step < steps; step++) {
        random_state = seed * 1000003 + (uint64_t)step;
        next_random();
        int worker = (int)below(WORKERS);
        struct step s = random_step();
        if (s.what == REMAP && !in_parts)
            continue;
        if (waits_on[worker] != -1) {
            if (!one_in(3))
                continue;
            printf("%ld signal w%d\n", step, worker);
            kill(pids[worker], SIGUSR1);
            settle(worker);
            continue;
        }
        printf("%ld w%d %s %ld %lx %lx %lx: ", step, worker, names[s.what], s.a, s.b, s.c, s.d);
        int blocks = s.what == SEMOP, before = blocks ? waiting_on((int)s.a) : 0;
        if (write(to[worker], &s, sizeof s) != sizeof s)
            die("write");
        while (!is_done(worker, blocks ? 1 : LIFE * 1000))
            if (blocks && waiting_on((int)s.a) > before) {
                waits_on[worker] = (int)s.a;
                break;
            }
        if (waits_on[worker] != -1) {
            printf("waits");
        } else {
            long result = print_done(worker);
            if (s.what == SHMGET || s.what == SEMGET || s.what == MSGGET)
                ids[s.what == SHMGET ? 0 : s.what == SEMGET ? 1 : 2][below(4)] = result;
        }
        printf("\n");
        settle(-1);
    }
    for (int k = 0; k < WORKERS; k++)
        kill(pids[k], SIGKILL);
    while (wait(NULL) > 0)
        ;
    printf("end\n");
    return 0;
}
