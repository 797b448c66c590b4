/*
 * users: processes of several users, groups and capabilities try every call on objects of every mode,
 * with a line for each: who, what, and what came of it. Started by root in an IPC namespace of its own.
 * Two systems that behave alike print the same.
 */
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
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
#include <sys/resource.h>
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

enum { KEY = 7, PAGE = 4096, LIFE = 100 /* s */, INDEX = 0x7fff };

/* The objects' creator and the owner that they are given to. */
enum { CREATOR = 1000, OWNER = 1001, OTHER = 1004 };

#define BIT(capability) (1UL << (capability))
#define OF_IPC (BIT(CAP_IPC_OWNER) | BIT(CAP_SYS_ADMIN) | BIT(CAP_IPC_LOCK) | BIT(CAP_SYS_RESOURCE))

enum how { PLAIN, AMBIENT /* executes itself, with these capabilities */, NAMESPACE /* a user namespace of its own */ };

static const struct person {
    const char *name;
    uid_t uid, real;
    gid_t gid, group;
    unsigned long capabilities;
    enum how how;
} people[] = {
    {"root", 0, 0, 0, 0, ~0UL, PLAIN},
    {"root without capabilities", 0, 0, 0, 0, 0, PLAIN},
    {"creator", CREATOR, CREATOR, CREATOR, CREATOR, 0, PLAIN},
    {"owner", OWNER, OWNER, OWNER, OWNER, 0, PLAIN},
    {"creator's group", 1002, 1002, CREATOR, 1002, 0, PLAIN},
    {"owner's group, supplementary", 1003, 1003, 1003, OWNER, 0, PLAIN},
    {"other", OTHER, OTHER, OTHER, OTHER, 0, PLAIN},
    {"other, really creator", OTHER, CREATOR, OTHER, OTHER, 0, PLAIN},
    {"other, really root", OTHER, 0, OTHER, OTHER, 0, PLAIN},
    {"IPC_OWNER", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_OWNER), PLAIN},
    {"IPC_OWNER, ambient", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_OWNER), AMBIENT},
    {"SYS_ADMIN", OTHER, OTHER, OTHER, OTHER, BIT(CAP_SYS_ADMIN), PLAIN},
    {"SYS_ADMIN and SYS_RESOURCE", OTHER, OTHER, OTHER, OTHER, BIT(CAP_SYS_ADMIN) | BIT(CAP_SYS_RESOURCE), AMBIENT},
    {"IPC_LOCK", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_LOCK), PLAIN},
    {"creator with SYS_RESOURCE", CREATOR, CREATOR, CREATOR, CREATOR, BIT(CAP_SYS_RESOURCE), PLAIN},
    {"all but those of IPC", OTHER, OTHER, OTHER, OTHER, ~OF_IPC, PLAIN},
    {"root of a namespace", OTHER, OTHER, OTHER, OTHER, 0, NAMESPACE},
};

enum { PEOPLE = sizeof people / sizeof people[0] };

static const int modes[] = {0,    0400, 0200, 0100, 0600, 0700, 0040, 0020, 0010, 0060, 0004, 0002,
                            0001, 0006, 0007, 0666, 0444, 0222, 0640, 0644, 0077, 0777};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
}

static void say_result(const char *what, long result)
{
    if (result == -1)
        say(" %s %s", what, strerrorname_np(errno));
    else
        say(" %s ok", what);
}

/* ---- becoming somebody -------------------------------------------------------------------- */

static void set_capabilities(unsigned long effective, unsigned long permitted, unsigned long inheritable)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct now[2], data[2];
    if (syscall(SYS_capget, &header, now) != 0)
        die("capget");
    for (int k = 0; k < 2; k++) {
        data[k].permitted = now[k].permitted & (unsigned)(permitted >> 32 * k);
        data[k].effective = data[k].permitted & (unsigned)(effective >> 32 * k);
        data[k].inheritable = data[k].permitted & (unsigned)(inheritable >> 32 * k);
    }
    if (syscall(SYS_capset, &header, data) != 0)
        die("capset");
}

static void become(const struct person *p)
{
    if (prctl(PR_SET_KEEPCAPS, 1) || setgroups(1, &p->group) || setresgid(p->gid, p->gid, p->gid)
        || setresuid(p->real, p->uid, p->uid))
        die("setresuid");
    unsigned long c = p->capabilities;
    set_capabilities(c, c, p->how == AMBIENT ? c : 0);
    for (int k = 0; p->how == AMBIENT && k < 64; k++)
        if (c & BIT(k) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, k, 0, 0) != 0 && k != CAP_SYS_RESOURCE)
            die("ambient"); /* root of a container often lacks CAP_SYS_RESOURCE */
    if (p->how == NAMESPACE && unshare(CLONE_NEWUSER) != 0)
        die("unshare");
}

static const char *self;

/* Runs a part of the program as somebody: `what` with its argument. */
static void as(const struct person *p, void (*what)(int), int argument, int number)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == -1)
        die("fork");
    if (child == 0) {
        become(p);
        if (p->how == AMBIENT) {
            char part[16], text[16];
            snprintf(part, sizeof part, "%d", number);
            snprintf(text, sizeof text, "%d", argument);
            execl(self, self, part, text, NULL);
            die("exec");
        }
        what(argument);
        fflush(stdout);
        _exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0)
        say(" -> %x", status);
    say("\n");
}

/* ---- every call on an object -------------------------------------------------------------- */

static void try_attach(int id, const char *what, int flags)
{
    volatile char *at = shmat(id, NULL, flags);
    say_result(what, at == (void *)-1 ? -1 : 0);
    if (at == (void *)-1)
        return;
    char seen = *at;
    if ((flags & SHM_RDONLY) == 0)
        *at = (char)(seen + 1);
    /* What is attached for reading stays so. */
    else if (seen != 'k')
        say(" (%d)", seen);
    if (shmdt((void *)at) != 0)
        die("shmdt");
}

static void try_segment(int id)
{
    struct shmid_ds status;
    static const int flags[] = {0, 0400, 0200, 0600, 0004, 0100, 0666};
    for (int k = 0; k < 7; k++)
        say_result("shmget", shmget(KEY, 0, flags[k]) == id ? 0 : -1);
    try_attach(id, "read", SHM_RDONLY);
    try_attach(id, "write", 0);
    try_attach(id, "read-exec", SHM_RDONLY | SHM_EXEC);
    say_result("STAT", shmctl(id, IPC_STAT, &status));
    say_result("STAT by index", shmctl(id & INDEX, SHM_STAT, &status));
    say_result("STAT_ANY", shmctl(id & INDEX, SHM_STAT_ANY, &status));
    say_result("LOCK", shmctl(id, SHM_LOCK, NULL));
    say_result("UNLOCK", shmctl(id, SHM_UNLOCK, NULL));
    say_result("LOCK", shmctl(id, SHM_LOCK, NULL));
    memset(&status, 0, sizeof status);
    status.shm_perm.uid = geteuid();
    status.shm_perm.gid = 1;
    status.shm_perm.mode = 0606;
    say_result("SET", shmctl(id, IPC_SET, &status));
    say_result("RMID", shmctl(id, IPC_RMID, NULL));
}

static void try_set(int id)
{
    union {
        struct semid_ds status;
        unsigned short values[2];
    } buffer = {0};
    union {
        void *pointer;
        int value;
    } fourth = {&buffer};
    static const int flags[] = {0, 0400, 0200, 0600, 0004, 0100, 0666};
    for (int k = 0; k < 7; k++)
        say_result("semget", semget(KEY, 0, flags[k]) == id ? 0 : -1);
    struct sembuf up = {0, 1, 0}, down = {0, -1, IPC_NOWAIT | SEM_UNDO}, zero = {1, 0, IPC_NOWAIT};
    say_result("up", semop(id, &up, 1));
    say_result("down", semop(id, &down, 1));
    say_result("zero", semop(id, &zero, 1));
    static const int reading[] = {GETVAL, GETALL, GETPID, GETNCNT, GETZCNT};
    for (int k = 0; k < 5; k++) {
        fourth.pointer = &buffer;
        long result = semctl(id, 0, reading[k], fourth);
        say_result("GET", result == -1 ? -1 : 0);
    }
    fourth.value = 2;
    say_result("SETVAL", semctl(id, 0, SETVAL, fourth));
    buffer.values[0] = buffer.values[1] = 3;
    fourth.pointer = &buffer;
    say_result("SETALL", semctl(id, 0, SETALL, fourth));
    say_result("STAT", semctl(id, 0, IPC_STAT, fourth));
    say_result("STAT by index", semctl(id & INDEX, 0, SEM_STAT, fourth));
    say_result("STAT_ANY", semctl(id & INDEX, 0, SEM_STAT_ANY, fourth));
    memset(&buffer, 0, sizeof buffer);
    buffer.status.sem_perm.uid = geteuid();
    buffer.status.sem_perm.gid = 1;
    buffer.status.sem_perm.mode = 0606;
    say_result("SET", semctl(id, 0, IPC_SET, fourth));
    say_result("RMID", semctl(id, 0, IPC_RMID));
}

static void try_queue(int id)
{
    struct msqid_ds status;
    struct {
        long type;
        char text[8];
    } message = {2, "message"};
    static const int flags[] = {0, 0400, 0200, 0600, 0004, 0100, 0666};
    for (int k = 0; k < 7; k++)
        say_result("msgget", msgget(KEY, flags[k]) == id ? 0 : -1);
    say_result("send", msgsnd(id, &message, sizeof message.text, IPC_NOWAIT));
    message.type = 0;
    long result = msgrcv(id, &message, sizeof message.text, 0, IPC_NOWAIT | MSG_COPY);
    say_result("copy", result);
    result = msgrcv(id, &message, sizeof message.text, 0, IPC_NOWAIT);
    say_result("receive", result);
    say(" %ld", message.type);
    say_result("STAT", msgctl(id, IPC_STAT, &status));
    say_result("STAT by index", msgctl(id & INDEX, MSG_STAT, &status));
    say_result("STAT_ANY", msgctl(id & INDEX, MSG_STAT_ANY, &status));
    memset(&status, 0, sizeof status);
    status.msg_perm.uid = geteuid();
    status.msg_perm.gid = 1;
    status.msg_perm.mode = 0606;
    for (status.msg_qbytes = 16385; status.msg_qbytes >= 16383; status.msg_qbytes--)
        say_result("SET", msgctl(id, IPC_SET, &status));
    say_result("RMID", msgctl(id, IPC_RMID, NULL));
}

static void say_perm(const struct ipc_perm *p)
{
    say(": uid %u gid %u cuid %u cgid %u mode %o", p->uid, p->gid, p->cuid, p->cgid, p->mode);
}

/* A new object that its creator has given to its owner. */
static int new_object(int kind, int mode)
{
    int id = -1;
    if (setresgid(CREATOR, CREATOR, 0) || setresuid(CREATOR, CREATOR, 0))
        die("setresuid");
    if (kind == 0)
        id = shmget(KEY, PAGE, IPC_CREAT | IPC_EXCL | 0600);
    else if (kind == 1)
        id = semget(KEY, 2, IPC_CREAT | IPC_EXCL | 0600);
    else
        id = msgget(KEY, IPC_CREAT | IPC_EXCL | 0600);
    if (id == -1)
        die("get");
    union {
        struct shmid_ds segment;
        struct semid_ds set;
        struct msqid_ds queue;
    } status = {0};
    union {
        void *pointer;
    } fourth = {&status};
    struct ipc_perm owner = {.uid = OWNER, .gid = OWNER, .mode = (unsigned short)mode};
    if (kind == 0) {
        char *at = shmat(id, NULL, 0);
        *at = 'k';
        shmdt(at);
        status.segment.shm_perm = owner;
        if (shmctl(id, IPC_SET, &status.segment) != 0)
            die("shmctl");
    } else if (kind == 1) {
        status.set.sem_perm = owner;
        if (semctl(id, 0, IPC_SET, fourth) != 0)
            die("semctl");
    } else {
        struct {
            long type;
            char text[4];
        } message = {1, "one"};
        if (msgsnd(id, &message, sizeof message.text, 0) != 0)
            die("msgsnd");
        status.queue.msg_perm = owner;
        status.queue.msg_qbytes = 16384;
        if (msgctl(id, IPC_SET, &status.queue) != 0)
            die("msgctl");
    }
    if (setresuid(0, 0, 0) || setresgid(0, 0, 0))
        die("setresuid");
    return id;
}

/* What has become of an object, which then goes. */
static void say_end(int kind, int id)
{
    union {
        struct shmid_ds segment;
        struct semid_ds set;
        struct msqid_ds queue;
    } status;
    union {
        void *pointer;
    } fourth = {&status};
    say("    ");
    if (kind == 0) {
        long result = shmctl(id, IPC_STAT, &status.segment);
        say_result("segment", result);
        if (result != -1) {
            say_perm(&status.segment.shm_perm);
            char *at = shmat(id, NULL, SHM_RDONLY);
            say(" byte %d", *at);
            shmdt(at);
        }
        shmctl(id, IPC_RMID, NULL);
    } else if (kind == 1) {
        long result = semctl(id, 0, IPC_STAT, fourth);
        say_result("set", result);
        if (result != -1) {
            say_perm(&status.set.sem_perm);
            say(" values %d %d", semctl(id, 0, GETVAL), semctl(id, 1, GETVAL));
        }
        semctl(id, 0, IPC_RMID);
    } else {
        long result = msgctl(id, IPC_STAT, &status.queue);
        say_result("queue", result);
        if (result != -1) {
            say_perm(&status.queue.msg_perm);
            say(" messages %lu bytes %lu of %lu", status.queue.msg_qnum, status.queue.__msg_cbytes,
                status.queue.msg_qbytes);
        }
        msgctl(id, IPC_RMID, NULL);
    }
    say("\n");
}

static void (*const tries[])(int) = {try_segment, try_set, try_queue};

static void every_call_on_every_mode(void)
{
    for (int kind = 0; kind < 3; kind++)
        for (size_t m = 0; m < sizeof modes / sizeof modes[0]; m++)
            for (int k = 0; k < PEOPLE; k++) {
                int id = new_object(kind, modes[m]);
                say("%04o %s:", modes[m], people[k].name);
                as(&people[k], tries[kind], id, kind);
                say_end(kind, id);
            }
}

/* ---- capabilities that come and go -------------------------------------------------------- */

static void drop_and_raise(int id)
{
    struct msqid_ds status;
    unsigned long c = BIT(CAP_IPC_OWNER);
    for (int k = 0; k < 3; k++) {
        set_capabilities(c, c, 0);
        say_result("raised", msgctl(id, IPC_STAT, &status));
        set_capabilities(0, c, 0);
        say_result("lowered", msgctl(id, IPC_STAT, &status));
    }
    set_capabilities(0, 0, 0);
    say_result("dropped", msgctl(id, IPC_STAT, &status));
}

/* A child that drops what its parent has, and has its descriptors. */
static void drop_in_a_child(int id)
{
    struct msqid_ds status;
    say_result("parent", msgctl(id, IPC_STAT, &status));
    fflush(stdout);
    if (fork() == 0) {
        set_capabilities(0, 0, 0);
        say_result("child", msgctl(id, IPC_STAT, &status));
        fflush(stdout);
        _exit(0);
    }
    wait(NULL);
    say_result("parent", msgctl(id, IPC_STAT, &status));
}

static void become_another(int id)
{
    struct msqid_ds status;
    say_result("root", msgctl(id, IPC_STAT, &status));
    if (setresuid(OTHER, OTHER, 0) != 0)
        die("setresuid");
    say_result("other", msgctl(id, IPC_STAT, &status));
    if (setresuid(0, 0, 0) != 0)
        die("setresuid");
    say_result("root", msgctl(id, IPC_STAT, &status));
    if (setresuid(OTHER, -1, -1) != 0)
        die("setresuid");
    say_result("really other", msgctl(id, IPC_STAT, &status));
    if (setresuid(OWNER, OWNER, OWNER) != 0)
        die("setresuid");
    say_result("owner", msgctl(id, IPC_RMID, NULL));
}

static void capabilities_come_and_go(void)
{
    static const struct person holder = {"", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_OWNER), PLAIN};
    static void (*const parts[])(int) = {drop_and_raise, drop_in_a_child, become_another};
    for (int k = 0; k < 3; k++) {
        int id = new_object(2, 0);
        say("part %d:", k);
        as(k == 2 ? &people[0] : &holder, parts[k], id, -1);
        say_end(2, id);
    }
}

/* ---- calls that block, with capabilities --------------------------------------------------- */

static void nothing(int signal)
{
    (void)signal;
}

static int progress[2];

static void proceed(const char *what, long result)
{
    say_result(what, result);
    if (write(progress[1], "", 1) != 1)
        die("write");
}

static void block(int id)
{
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    struct sembuf down = {0, -1, 0};
    struct timespec soon = {0, 20000000};
    proceed("time is up", semtimedop(id, &down, 1, &soon));
    proceed("signal", semop(id, &down, 1));
    proceed("up", semop(id, &down, 1));
    proceed("removed", semop(id, &down, 1));
}

/* Waits until the child has finished a call and waits in the next. */
static void await_next(int id)
{
    char byte;
    if (read(progress[0], &byte, 1) != 1)
        die("read");
    while (semctl(id, 0, GETNCNT) != 1)
        sched_yield();
}

static void blocked_calls(void)
{
    static const struct person holder = {"", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_OWNER), PLAIN};
    int id = new_object(1, 0);
    fflush(stdout);
    if (pipe(progress) != 0)
        die("pipe");
    pid_t child = fork();
    if (child == 0) {
        become(&holder);
        block(id);
        fflush(stdout);
        _exit(0);
    }
    struct sembuf up = {0, 1, 0};
    await_next(id);
    kill(child, SIGUSR1);
    await_next(id);
    if (semop(id, &up, 1) != 0)
        die("semop");
    await_next(id);
    semctl(id, 0, IPC_RMID);
    int status;
    waitpid(child, &status, 0);
    say(" -> %x\n", status);
}

/* A receiver that waits is asked for its permission again when that changes. */
static void receive(int id)
{
    struct {
        long type;
        char text[8];
    } message = {0};
    long result = msgrcv(id, &message, sizeof message.text, 9, 0);
    say_result("received", result);
    say(" %ld", message.type);
}

static void reconsidered_calls(void)
{
    static const struct person holder = {"holder", OTHER, OTHER, OTHER, OTHER, BIT(CAP_IPC_OWNER), PLAIN};
    const struct person *waiting[] = {&holder, &people[6]};
    for (int k = 0; k < 2; k++) {
        int id = new_object(2, 0666);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            become(waiting[k]);
            receive(id);
            fflush(stdout);
            _exit(0);
        }
        /* Where it waits cannot be seen; whatever it is doing, it fails or succeeds alike. */
        struct msqid_ds status = {.msg_perm = {.uid = OWNER, .gid = OWNER, .mode = 0}, .msg_qbytes = 16384};
        msgctl(id, IPC_SET, &status);
        int ended;
        if (k == 0) {
            struct {
                long type;
                char text[4];
            } message = {9, "two"};
            msgsnd(id, &message, sizeof message.text, 0);
        }
        waitpid(child, &ended, 0);
        say(" -> %x\n", ended);
        say_end(2, id);
    }
}

/* ---- SHM_LOCK and its limit --------------------------------------------------------------- */

static void limit(rlim_t bytes)
{
    struct rlimit memlock;
    getrlimit(RLIMIT_MEMLOCK, &memlock);
    memlock.rlim_cur = bytes < memlock.rlim_max ? bytes : memlock.rlim_max;
    if (setrlimit(RLIMIT_MEMLOCK, &memlock) != 0)
        die("setrlimit");
}

static void say_lock(int id, const char *what, int command)
{
    struct shmid_ds status = {0};
    say_result(what, shmctl(id, command, NULL));
    shmctl(id & INDEX, SHM_STAT_ANY, &status);
    say(" %o", status.shm_perm.mode);
}

static void lock_within_limits(int capability)
{
    static const rlim_t limits[] = {0, 1, 4095, 4096, 8191, 8192, 12287, 12288, 1 << 20, RLIM_INFINITY};
    unsigned long permitted = BIT(CAP_SYS_RESOURCE) | (capability ? BIT(capability) : 0);
    set_capabilities(permitted, permitted, 0);
    for (size_t k = 0; k < sizeof limits / sizeof limits[0]; k++) {
        limit(limits[k]);
        int first = shmget(IPC_PRIVATE, 4097, 0600), second = shmget(IPC_PRIVATE, 1, 0600);
        say("\n  limit %ld:", (long)limits[k]);
        say_lock(first, "first", SHM_LOCK);
        say_lock(second, "second", SHM_LOCK);
        say_lock(second, "again", SHM_LOCK);
        say_lock(first, "unlock", SHM_UNLOCK);
        say_lock(first, "unlock", SHM_UNLOCK);
        say_lock(second, "second", SHM_LOCK);
        limit(0);
        say_lock(second, "unlock, limit 0", SHM_UNLOCK);
        limit(limits[k]);
        say_lock(second, "second", SHM_LOCK);
        /* The end of a segment ends its lock, the last detach if it is later. */
        void *at = shmat(second, NULL, 0);
        shmctl(second, IPC_RMID, NULL);
        say_lock(first, "first", SHM_LOCK);
        shmdt(at);
        say_lock(first, "first", SHM_LOCK);
        shmctl(first, IPC_RMID, NULL);
        first = shmget(IPC_PRIVATE, 8192, 0600);
        say_lock(first, "third", SHM_LOCK);
        shmctl(first, IPC_RMID, NULL);
    }
}

/* Locks of other processes of a user count, those of other users do not. */
static void lock_more(int id)
{
    limit(8192);
    say_lock(id, "given", SHM_LOCK);
    int own = shmget(IPC_PRIVATE, 8192, 0600);
    say_lock(own, "own", SHM_LOCK);
    say_lock(id, "unlock", SHM_UNLOCK);
    say_lock(own, "own", SHM_LOCK);
    shmctl(own, IPC_RMID, NULL);
}

static void locks_of_users(void)
{
    static const struct person lockers[] = {
        {"creator", CREATOR, CREATOR, CREATOR, CREATOR, BIT(CAP_SYS_RESOURCE), PLAIN},
        {"owner", OWNER, OWNER, OWNER, OWNER, BIT(CAP_SYS_RESOURCE), PLAIN},
        {"creator, really owner", CREATOR, OWNER, CREATOR, CREATOR, BIT(CAP_SYS_RESOURCE), PLAIN},
        {"owner, really other", OWNER, OTHER, OWNER, OWNER, BIT(CAP_SYS_RESOURCE), PLAIN},
        {"IPC_LOCK", OTHER, OTHER, OTHER, OTHER, BIT(CAP_SYS_RESOURCE) | BIT(CAP_IPC_LOCK), PLAIN},
        {"root", 0, 0, 0, 0, ~0UL, PLAIN},
    };
    enum { LOCKERS = sizeof lockers / sizeof lockers[0] };
    say("limits:");
    as(&lockers[0], lock_within_limits, 0, -1);
    say("limits with IPC_LOCK:");
    as(&lockers[4], lock_within_limits, CAP_IPC_LOCK, -1);
    for (int a = 0; a < LOCKERS; a++)
        for (int b = 0; b < LOCKERS; b++) {
            int id = new_object(0, 0600);
            say("locked by %s, then %s:", lockers[a].name, lockers[b].name);
            as(&lockers[a], lock_more, id, -1);
            as(&lockers[a], lock_more, id, -1);
            as(&lockers[b], lock_more, id, -1);
            as(&lockers[a], lock_more, id, -1);
            say_end(0, id);
        }
}

/* ---- huge pages, of which there are none -------------------------------------------------- */

static void get_huge(int unused)
{
    (void)unused;
    static const struct {
        size_t size;
        int flags;
    } cases[] = {
        {4096, SHM_HUGETLB},
        {1 << 21, SHM_HUGETLB},
        {1 << 21, SHM_HUGETLB | 21 << 26},
        {1 << 30, SHM_HUGETLB | 30 << 26},
        {4096, SHM_HUGETLB | 14 << 26},
        {4096, 14 << 26},
        {0, SHM_HUGETLB},
        {(size_t)-1, SHM_HUGETLB},
        {(size_t)1 << 62, SHM_HUGETLB},
    };
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        int id = shmget(IPC_PRIVATE, cases[k].size, cases[k].flags | 0600);
        say_result("huge", id == -1 ? -1 : 0);
        shmctl(id, IPC_RMID, NULL);
    }
}

static void huge_pages(void)
{
    for (int k = 0; k < PEOPLE; k++) {
        if (people[k].how == AMBIENT)
            continue;
        say("%s:", people[k].name);
        as(&people[k], get_huge, 0, -1);
    }
}

int main(int argc, char **argv)
{
    self = argv[0];
    alarm(LIFE);
    if (argc == 3) {
        tries[atoi(argv[1])](atoi(argv[2]));
        fflush(stdout);
        return 0;
    }
    if (semget(99, 0, 0) != -1 || errno != ENOENT) /* root is the first to call */
        die("not a place of our own");
    every_call_on_every_mode();
    capabilities_come_and_go();
    blocked_calls();
    reconsidered_calls();
    locks_of_users();
    if (argc == 2)
        huge_pages();
    say("end\n");
    return 0;
}
