/*
 * Conformance of the message queue calls: every errno that one or two processes can provoke, and
 * what the manual pages msgget(2), msgop(2), msgctl(2) promise about types, sizes, flags, waiting,
 * pids and times.
 *
 * Rank 0 judges. Rank 1 (on another node, when run so) is the process at the other end; further
 * ranks only keep the barriers. Nothing tells whether a process waits at a queue, so a child is
 * taken to wait when it has been seen asleep for a while, and where the other rank has to wait, a
 * try that came too early is repeated.
 */
#include "common.h"

#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    NOBODY = 65534,
    SMALL = 16,         /* bytes of text of most messages here */
    ASLEEP_NAPS = 20,   /* a child seen asleep so often in a row waits */
    ATTEMPTS = 8,
};
static const double PATIENCE = 10; /* seconds for another process to reach a known state */

#ifndef MSG_COPY
#define MSG_COPY 040000
#endif
#ifndef MSG_STAT_ANY
#define MSG_STAT_ANY 13
#endif

struct message {
    long type;
    char text[SMALL];
};

static int new_queue(void)
{
    return (int)must(msgget(IPC_PRIVATE, 0600));
}

static void remove_queue(int queue)
{
    must(msgctl(queue, IPC_RMID, NULL));
}

static struct msqid_ds status_of(int queue)
{
    struct msqid_ds status;
    must(msgctl(queue, IPC_STAT, &status));
    return status;
}

static void set_capacity(int queue, size_t bytes)
{
    struct msqid_ds status = status_of(queue);
    status.msg_qbytes = bytes;
    must(msgctl(queue, IPC_SET, &status));
}

static struct msginfo limits(void)
{
    struct msginfo info;
    must(msgctl(0, IPC_INFO, (struct msqid_ds *)&info));
    return info;
}

static int send_text(int queue, long type, const char *text, int flags)
{
    struct message message = {.type = type};
    memcpy(message.text, text, strlen(text));
    return msgsnd(queue, &message, strlen(text), flags);
}

/* The next message that `type` and `flags` choose must be this one. */
static void expect_text(int queue, long type, int flags, long own, const char *text)
{
    struct message message = {0};
    ssize_t got = must(msgrcv(queue, &message, SMALL, type, flags));
    expect(message.type == own && (size_t)got == strlen(text) &&
               memcmp(message.text, text, strlen(text)) == 0,
           "got %zd bytes '%.16s' of type %ld, not '%s' of type %ld", got, message.text,
           message.type, text, own);
}

static void expect_count(int queue, unsigned long messages, unsigned long bytes)
{
    struct msqid_ds status = status_of(queue);
    expect(status.msg_qnum == messages && status.__msg_cbytes == bytes,
           "%lu messages, %lu bytes, not %lu, %lu", (unsigned long)status.msg_qnum,
           (unsigned long)status.__msg_cbytes, messages, bytes);
}

static char state_of(pid_t pid)
{
    char path[32], text[256] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (file) {
        if (!fgets(text, sizeof text, file))
            text[0] = 0;
        fclose(file);
    }
    const char *end = strrchr(text, ')');
    return end ? end[2] : 0;
}

/* Returns when a child that is about to block has done so. */
static void await_sleep(pid_t child)
{
    double deadline = now() + PATIENCE;
    for (int asleep = 0; asleep < ASLEEP_NAPS;) {
        expect(now() < deadline, "the child does not wait");
        asleep = state_of(child) == 'S' ? asleep + 1 : 0;
        nap();
    }
}

/* A child that receives and exits 0 if it gets this text. */
static pid_t fork_receiver(int queue, size_t room, long type, const char *text)
{
    pid_t child = fork_watched();
    if (child == 0) {
        struct message message = {0};
        ssize_t got = msgrcv(queue, &message, room, type, 0);
        if (text == NULL)
            _exit(got == -1 ? errno : 1);
        _exit((size_t)must(got) != strlen(text) || memcmp(message.text, text, strlen(text)) != 0);
    }
    await_sleep(child);
    return child;
}

static pid_t fork_sender(int queue, long type, const char *text)
{
    pid_t child = fork_watched();
    if (child == 0) {
        must(send_text(queue, type, text, 0));
        _exit(0);
    }
    await_sleep(child);
    return child;
}

/* ---- one process ---- */

static void getting(const struct team *team)
{
    key_t key = team_key(team, 1);
    expect_errno(msgget(key, 0), ENOENT);
    int queue = (int)must(msgget(key, IPC_CREAT | IPC_EXCL | 0600));
    expect_errno(msgget(key, IPC_CREAT | IPC_EXCL | 0600), EEXIST);
    expect(must(msgget(key, IPC_CREAT | 0600)) == queue, "the key found another queue");
    expect(must(msgget(key, 0)) == queue, "the key found another queue");
    remove_queue(queue);
    expect_errno(msgget(key, 0), ENOENT);
    expect_errno(msgctl(queue, IPC_RMID, NULL), EINVAL);
    expect_errno(send_text(queue, 1, "x", 0), EINVAL);
    expect_errno(msgrcv(queue, &(struct message){0}, SMALL, 0, 0), EINVAL);

    int one = new_queue(), two = new_queue();
    expect(one != two, "IPC_PRIVATE gave the same queue twice");
    remove_queue(one);
    remove_queue(two);
}

/* A page's end: the 8 bytes at the address can be read and written, what follows cannot. */
static long *edge(void)
{
    char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(pages != MAP_FAILED, "mmap");
    must(mprotect(pages + PAGE, PAGE, PROT_NONE));
    return (long *)(pages + PAGE) - 1;
}

static void sending_errors(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    expect_errno(send_text(-1, 1, "x", 0), EINVAL);
    expect_errno(send_text(queue, 0, "x", 0), EINVAL);
    expect_errno(send_text(queue, -1, "x", 0), EINVAL);
    struct message message = {.type = 1};
    expect_errno(msgsnd(queue, &message, (size_t)-1, 0), EINVAL);
    expect_errno(msgsnd(queue, &message, (size_t)limits().msgmax + 1, 0), EINVAL);
    expect_errno(msgsnd(queue, NULL, 0, 0), EFAULT);
    expect_errno(msgsnd(queue, (void *)-8, 1, 0), EFAULT);
    long *type = edge();
    *type = 4;
    expect_errno(msgsnd(queue, type, 1, 0), EFAULT);
    expect_count(queue, 0, 0);
    must(msgsnd(queue, type, 0, 0));
    expect_text(queue, 0, IPC_NOWAIT, 4, "");
    remove_queue(queue);
}

static void receiving_errors(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    struct message message;
    expect_errno(msgrcv(-1, &message, SMALL, 0, 0), EINVAL);
    expect_errno(msgrcv(queue, &message, (size_t)-1, 0, 0), EINVAL);
    expect_errno(msgrcv(queue, &message, SMALL, 0, IPC_NOWAIT), ENOMSG);
    must(send_text(queue, 3, "hello", 0));
    expect_errno(msgrcv(queue, &message, SMALL, 2, IPC_NOWAIT), ENOMSG);
    expect_errno(msgrcv(queue, &message, SMALL, -2, IPC_NOWAIT), ENOMSG);
    expect_errno(msgrcv(queue, &message, SMALL, 3, IPC_NOWAIT | MSG_EXCEPT), ENOMSG);
    expect_errno(msgrcv(queue, &message, 4, 0, 0), E2BIG);
    expect_count(queue, 1, 5);
    memset(message.text, '-', SMALL);
    expect(must(msgrcv(queue, &message, 4, 0, MSG_NOERROR)) == 4, "not cut to 4 bytes");
    expect(memcmp(message.text, "hell-", 5) == 0, "cut to '%.16s'", message.text);
    expect_count(queue, 0, 0);

    /* A message that cannot be written to the receiver's memory is lost, on Linux. */
    must(send_text(queue, 1, "lost", 0));
    expect_errno(msgrcv(queue, NULL, SMALL, 0, 0), EFAULT);
    expect_count(queue, 0, 0);
    must(send_text(queue, 7, "lost", 0));
    long *type = edge();
    expect_errno(msgrcv(queue, type, SMALL, 0, 0), EFAULT);
    must(send_text(queue, 7, "", 0));
    expect(must(msgrcv(queue, type, SMALL, 0, 0)) == 0 && *type == 7, "type %ld", *type);
    remove_queue(queue);
}

static void types_choose(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    const struct {
        long type;
        const char *text;
    } messages[] = {{5, "a"}, {2, "b"}, {LONG_MAX, "c"}, {2, "d"}, {9, "e"}, {5, "f"}};
    for (int k = 0; k < 6; k++)
        must(send_text(queue, messages[k].type, messages[k].text, 0));
    expect_text(queue, 5, 0, 5, "a");
    expect_text(queue, -8, 0, 2, "b");
    expect_text(queue, 2, MSG_EXCEPT, LONG_MAX, "c");
    expect_text(queue, 0, 0, 2, "d");
    expect_text(queue, LONG_MIN, 0, 5, "f");
    expect_text(queue, 1, MSG_EXCEPT, 9, "e");
    expect_count(queue, 0, 0);
    remove_queue(queue);
}

static void copies(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    must(send_text(queue, 8, "first", 0));
    must(send_text(queue, 9, "second", 0));
    struct message message;
    int flags = MSG_COPY | IPC_NOWAIT;
    if (msgrcv(queue, &message, SMALL, 0, flags) == -1 && errno == ENOSYS) {
        remove_queue(queue); /* a kernel that was built without it */
        return;
    }
    expect_text(queue, 1, flags, 9, "second");
    expect_text(queue, 0, flags, 8, "first");
    expect_count(queue, 2, 11);
    expect(status_of(queue).msg_lrpid == 0, "a copy counts as a receive");
    expect_errno(msgrcv(queue, &message, SMALL, 2, flags), ENOMSG);
    expect_errno(msgrcv(queue, &message, SMALL, 0, MSG_COPY), EINVAL);
    expect_errno(msgrcv(queue, &message, SMALL, 0, flags | MSG_EXCEPT), EINVAL);
    expect_errno(msgrcv(queue, &message, 4, 0, flags), E2BIG);
    remove_queue(queue);
}

static void capacity(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    struct msginfo info = limits();
    expect(status_of(queue).msg_qbytes == (unsigned long)info.msgmnb, "msg_qbytes is %lu",
           (unsigned long)status_of(queue).msg_qbytes);

    static struct {
        long type;
        char text[1 << 16];
    } large = {.type = 1}, back;
    expect(info.msgmax < (int)sizeof large.text, "msgmax is %d", info.msgmax);
    for (int k = 0; k < info.msgmax; k++)
        large.text[k] = (char)(k * 7);
    must(msgsnd(queue, &large, (size_t)info.msgmax, IPC_NOWAIT));
    expect(must(msgrcv(queue, &back, sizeof back.text, 0, 0)) == info.msgmax, "it was cut");
    expect(memcmp(&large, &back, sizeof large) == 0, "the largest message is damaged");

    set_capacity(queue, 10);
    must(send_text(queue, 1, "123456", IPC_NOWAIT));
    expect_errno(send_text(queue, 1, "12345", IPC_NOWAIT), EAGAIN);
    must(send_text(queue, 1, "1234", IPC_NOWAIT));
    must(send_text(queue, 1, "", IPC_NOWAIT));
    expect_errno(send_text(queue, 1, "1", IPC_NOWAIT), EAGAIN);
    set_capacity(queue, 3);
    expect_errno(send_text(queue, 1, "", IPC_NOWAIT), EAGAIN); /* as many messages as bytes */
    expect_count(queue, 3, 10);
    remove_queue(queue);
}

static void controls(const struct team *team)
{
    time_t before = time(NULL) - 1;
    key_t key = team_key(team, 1);
    int queue = (int)must(msgget(key, IPC_CREAT | IPC_EXCL | 0640));
    struct msqid_ds status = status_of(queue);
    expect(status.msg_stime == 0 && status.msg_rtime == 0, "times of a new queue are not 0");
    expect(status.msg_lspid == 0 && status.msg_lrpid == 0, "pids of a new queue are not 0");
    expect(status.msg_ctime >= before && status.msg_ctime <= time(NULL) + 1, "msg_ctime is off");
    expect(status.msg_perm.__key == key, "the key is 0x%x", status.msg_perm.__key);
    expect((status.msg_perm.mode & 0777) == 0640, "the mode is %o", status.msg_perm.mode);
    expect(status.msg_perm.uid == geteuid() && status.msg_perm.cuid == geteuid(),
           "the owner is %u", status.msg_perm.uid);

    must(send_text(queue, 1, "abc", 0));
    status = status_of(queue);
    expect(status.msg_stime >= before && status.msg_stime <= time(NULL) + 1, "msg_stime is off");
    expect(status.msg_lspid == getpid() && status.msg_lrpid == 0, "msg_lspid is %d",
           status.msg_lspid);
    expect_count(queue, 1, 3);
    expect_text(queue, 0, 0, 1, "abc");
    status = status_of(queue);
    expect(status.msg_rtime >= before && status.msg_rtime <= time(NULL) + 1, "msg_rtime is off");
    expect(status.msg_lrpid == getpid(), "msg_lrpid is %d", status.msg_lrpid);

    status.msg_perm.mode = 0600;
    status.msg_qbytes = 100;
    must(msgctl(queue, IPC_SET, &status));
    status = status_of(queue);
    expect((status.msg_perm.mode & 0777) == 0600 && status.msg_qbytes == 100,
           "IPC_SET left mode %o, %lu bytes", status.msg_perm.mode,
           (unsigned long)status.msg_qbytes);
    status.msg_perm.uid = (uid_t)-1;
    expect_errno(msgctl(queue, IPC_SET, &status), EINVAL);

    struct msginfo info;
    must(send_text(queue, 1, "abc", 0));
    long highest = must(msgctl(0, MSG_INFO, (struct msqid_ds *)&info));
    expect(info.msgpool >= 1 && info.msgmap >= 1 && info.msgtql >= 3,
           "MSG_INFO says %d queues, %d messages, %d bytes", info.msgpool, info.msgmap,
           info.msgtql);
    bool found = false;
    for (int index = 0; index <= highest; index++)
        if (msgctl(index, MSG_STAT, &status) == queue)
            found = status.msg_perm.__key == key && msgctl(index, MSG_STAT_ANY, &status) == queue;
    expect(found, "MSG_STAT does not find the queue");

    expect_errno(msgctl(queue, 4711, &status), EINVAL);
    expect_errno(msgctl(-1, IPC_STAT, &status), EINVAL);
    expect_errno(msgctl(queue, IPC_STAT, (struct msqid_ds *)-1), EFAULT);
    expect_errno(msgctl(queue, IPC_SET, (struct msqid_ds *)-1), EFAULT);
    remove_queue(queue);
}

/* ---- a process and its children ---- */

static void on_signal(int signal)
{
    (void)signal;
}

static void a_signal_interrupts(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    set_capacity(queue, 4);
    pid_t child = fork_watched();
    if (child == 0) {
        struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
        must(sigaction(SIGUSR1, &action, NULL));
        expect_errno(msgrcv(queue, &(struct message){0}, SMALL, 0, 0), EINTR);
        must(send_text(queue, 1, "full", 0));
        expect_errno(send_text(queue, 1, "more", 0), EINTR);
        _exit(0);
    }
    await_sleep(child);
    must(kill(child, SIGUSR1));
    double deadline = now() + PATIENCE;
    while (status_of(queue).msg_qnum == 0) {
        expect(now() < deadline, "the receiver was not interrupted");
        nap();
    }
    await_sleep(child);
    must(kill(child, SIGUSR1));
    expect_success(child, "the interrupted child");
    expect_text(queue, 0, 0, 1, "full");
    expect_count(queue, 0, 0);
    remove_queue(queue);
}

static void the_killed_neither_send_nor_receive(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    set_capacity(queue, 4);
    kill_child(fork_receiver(queue, SMALL, 0, "x"));
    nap();
    for (int k = 0; k < ASLEEP_NAPS; k++)
        nap(); /* the end of a process is noticed a moment later */
    must(send_text(queue, 1, "1234", 0));
    expect_count(queue, 1, 4);
    kill_child(fork_sender(queue, 1, "5678"));
    for (int k = 0; k < ASLEEP_NAPS; k++)
        nap();
    expect_text(queue, 0, 0, 1, "1234");
    expect_count(queue, 0, 0);
    remove_queue(queue);
}

static void receivers_are_served_in_order(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    pid_t other = fork_receiver(queue, SMALL, 9, "ninth");
    pid_t first = fork_receiver(queue, SMALL, 0, "one");
    pid_t second = fork_receiver(queue, SMALL, -5, "two");
    must(send_text(queue, 1, "one", 0));
    expect_success(first, "the first receiver");
    must(send_text(queue, 1, "two", 0));
    expect_success(second, "the second receiver");
    expect(status_of(queue).msg_lrpid == second, "msg_lrpid is %d, not %d",
           status_of(queue).msg_lrpid, second);
    must(send_text(queue, 9, "ninth", 0));
    expect_success(other, "the receiver of another type");

    /* One that has no room for it fails, and the next one gets the message. */
    pid_t small = fork_receiver(queue, 2, 0, NULL);
    pid_t large = fork_receiver(queue, SMALL, 0, "large");
    must(send_text(queue, 1, "large", 0));
    expect_success(large, "the receiver with room");
    int how;
    must(waitpid(small, &how, 0));
    expect(WIFEXITED(how) && WEXITSTATUS(how) == E2BIG, "the receiver without room got %x", how);
    expect_count(queue, 0, 0);
    remove_queue(queue);
}

static void senders_wait_for_room(const struct team *team)
{
    (void)team;
    int queue = new_queue();
    set_capacity(queue, 4);
    must(send_text(queue, 1, "12", 0));
    must(send_text(queue, 1, "34", 0));
    pid_t large = fork_sender(queue, 2, "5678");
    pid_t small = fork_sender(queue, 3, "9");
    expect_text(queue, 0, 0, 1, "12");
    expect_success(small, "the sender for whom there is room");
    expect(status_of(queue).msg_lspid == small, "msg_lspid is %d, not %d",
           status_of(queue).msg_lspid, small);
    expect_count(queue, 2, 3);
    set_capacity(queue, 7);
    expect_success(large, "the sender who was given room");
    expect_count(queue, 3, 7);
    remove_queue(queue);

    /* Room is needed also where somebody waits for the message. */
    queue = new_queue();
    set_capacity(queue, 4);
    must(send_text(queue, 1, "1234", 0));
    pid_t receiver = fork_receiver(queue, SMALL, 2, "56");
    pid_t sender = fork_sender(queue, 2, "56");
    expect_text(queue, 1, 0, 1, "1234");
    expect_success(sender, "the sender");
    expect_success(receiver, "the receiver");
    remove_queue(queue);
}

static void become_nobody(void)
{
    must(setgroups(0, NULL));
    must(setgid(NOBODY));
    must(setuid(NOBODY));
}

static void strangers_are_refused(const struct team *team)
{
    if (geteuid() != 0)
        return;
    key_t key = team_key(team, 1);
    int queue = (int)must(msgget(key, IPC_CREAT | IPC_EXCL | 0604));
    must(send_text(queue, 1, "x", 0));
    pid_t child = fork_watched();
    if (child == 0) {
        become_nobody();
        struct msqid_ds status = status_of(queue);
        expect_errno(msgget(key, 0600), EACCES);
        expect(must(msgget(key, 0400)) == queue, "another queue");
        expect_errno(send_text(queue, 1, "x", 0), EACCES);
        expect_errno(msgctl(queue, IPC_SET, &status), EPERM);
        expect_errno(msgctl(queue, IPC_RMID, NULL), EPERM);
        expect_text(queue, 0, 0, 1, "x"); /* a reader may take */

        int own = new_queue();
        status = status_of(own);
        status.msg_qbytes = (unsigned long)limits().msgmnb + 1;
        expect_errno(msgctl(own, IPC_SET, &status), EPERM);
        remove_queue(own);
        _exit(0);
    }
    expect_success(child, "the stranger");

    /* Who waits is asked again when the permissions change. */
    child = fork_watched();
    if (child == 0) {
        become_nobody();
        expect_errno(msgrcv(queue, &(struct message){0}, SMALL, 0, 0), EACCES);
        _exit(0);
    }
    await_sleep(child);
    struct msqid_ds status = status_of(queue);
    status.msg_perm.mode = 0600;
    must(msgctl(queue, IPC_SET, &status));
    expect_success(child, "the stranger who waited");
    remove_queue(queue);
}

/* ---- two ranks, over the queue in slot 0 ---- */

static void messages_go_both_ways(struct team *team, int queue)
{
    if (team->rank == 0) {
        must(send_text(queue, 1, "question", 0));
        expect_text(queue, 2, 0, 2, "answer");
    } else if (team->rank == 1) {
        expect_text(queue, 1, 0, 1, "question");
        must(send_text(queue, 2, "answer", 0));
    }
    team_barrier(team);
    if (team->rank == 0)
        expect_count(queue, 0, 0);
}

static void a_full_queue_holds_the_sender_up(struct team *team, int queue)
{
    static bool sent;
    if (team->rank == 0) {
        set_capacity(queue, 4);
        must(send_text(queue, 1, "full", 0));
    }
    team_barrier(team);
    if (team->rank == 1) {
        must(send_text(queue, 2, "more", 0));
        sent = true;
    } else if (team->rank == 0) {
        for (int k = 0; k < ASLEEP_NAPS; k++)
            nap();
        expect_count(queue, 1, 4);
        expect_text(queue, 0, 0, 1, "full");
        expect_text(queue, 0, 0, 2, "more");
    }
    team_barrier(team);
    expect(team->rank != 1 || sent, "it was not sent");
}

static void removal_wakes_with_EIDRM(struct team *team, int queue)
{
    (void)queue;
    int done = team_semaphores(team, 0, 1);
    for (int attempt = 0; semaphore_value(done, 0) == 0; attempt++) {
        expect(attempt < 2 * ATTEMPTS, "no waiter got EIDRM");
        bool sends = attempt % 2; /* in turn */
        key_t key = team_key(team, 2 + attempt);
        if (team->rank == 0) {
            int doomed = (int)must(msgget(key, IPC_CREAT | IPC_EXCL | 0600));
            set_capacity(doomed, 0);
        }
        team_barrier(team);
        int doomed = (int)must(msgget(key, 0));
        team_barrier(team);
        if (team->rank == 0) {
            for (int k = 0; k < ASLEEP_NAPS << attempt / 2; k++)
                nap();
            remove_queue(doomed);
        } else if (team->rank == 1) {
            static bool sender_woken, receiver_woken;
            errno = 0;
            long result = sends ? send_text(doomed, 1, "x", 0)
                                : msgrcv(doomed, &(struct message){0}, SMALL, 0, 0);
            expect(result == -1 && (errno == EIDRM || errno == EINVAL), "%ld", result);
            *(sends ? &sender_woken : &receiver_woken) |= errno == EIDRM;
            if (sender_woken && receiver_woken)
                semaphore_change(done, 0, 1, 0);
        }
        team_barrier(team);
        expect_errno(msgrcv(doomed, &(struct message){0}, SMALL, 0, 0), EINVAL);
    }
}

static void run(struct team *team)
{
    static const struct {
        const char *name;
        void (*check)(const struct team *);
    } alone[] = {
        {"msgget", getting},
        {"msgsnd errors", sending_errors},
        {"msgrcv errors", receiving_errors},
        {"types choose", types_choose},
        {"copies", copies},
        {"capacity", capacity},
        {"msgctl", controls},
        {"a signal interrupts in spite of SA_RESTART", a_signal_interrupts},
        {"the killed neither send nor receive", the_killed_neither_send_nor_receive},
        {"receivers are served in order", receivers_are_served_in_order},
        {"senders wait for room", senders_wait_for_room},
        {"strangers are refused", strangers_are_refused},
    };
    static const struct {
        const char *name;
        void (*check)(struct team *, int queue);
    } together[] = {
        {"messages go both ways", messages_go_both_ways},
        {"a full queue holds the sender up", a_full_queue_holds_the_sender_up},
        {"removal wakes with EIDRM", removal_wakes_with_EIDRM},
    };
    if (team->rank == 0)
        for (size_t k = 0; k < sizeof alone / sizeof *alone; k++) {
            alone[k].check(team);
            printf("ok  %s\n", alone[k].name);
            fflush(stdout);
        }
    int queue = team_queue(team, 0);
    team_barrier(team);
    for (size_t k = 0; k < sizeof together / sizeof *together; k++) {
        together[k].check(team, queue);
        team_barrier(team);
        if (team->rank == 0)
            printf("ok  %s\n", together[k].name);
    }
}

int main(int argc, char **argv)
{
    return team_main(
        argc, argv,
        &(struct program){"Conformance of msgget, msgsnd, msgrcv, msgctl.", 2, 2, NULL, run});
}
