/*
 * A process that makes the System V calls which it is told on standard input, one a line, and
 * answers each by a line: `ok`, a value, SIGBUS, or the name of the errno. It has at most one segment, one
 * semaphore and one message queue.
 *
 *   segment KEY BYTES   shmget(IPC_CREAT), shmat      fill V      V to both ends of every page
 *   attach, detach      of the same segment           check V     `ok` if it is there
 *   part FIRST END      pages that fill, check and census mean; at first all
 *   census              how many pages have something in both ends, and how many raise SIGBUS
 *   nattch              shmctl(IPC_STAT)              remove      shmctl(IPC_RMID)
 *   mode M              shmctl(IPC_SET)               children N  forks N that stay
 *   semaphore KEY       semget(IPC_CREAT)             change D    semop
 *   value               semctl(GETVAL)                lock D      semop with SEM_UNDO
 *   within D MS         semtimedop                    waiters     semctl(GETNCNT)
 *   forget              semctl(IPC_RMID)
 *   queue KEY           msgget(IPC_CREAT)             send T      msgsnd of type T, without text
 *   queued              msgctl(IPC_STAT): messages    receive T   msgrcv, answers the type
 *                                                     drop        msgctl(IPC_RMID)
 */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(long), LIFE = 200 /* seconds */ };

static int segment, set, queue;
static size_t size, first_page, end_page;
static volatile long *memory;
static sigjmp_buf lost;

static void on_lost_page(int signal)
{
    siglongjmp(lost, signal);
}

static long fill(long value)
{
    for (size_t page = first_page; page < end_page; page++) {
        memory[page * WORDS] = value;
        memory[page * WORDS + WORDS - 1] = value;
    }
    return 0;
}

static void check(long value)
{
    for (size_t page = first_page; page < end_page; page++)
        for (size_t word = 0; word < WORDS; word += WORDS - 1) {
            long found = memory[page * WORDS + word];
            if (found != value) {
                printf("page %zu word %zu is %ld\n", page, word, found);
                return;
            }
        }
    puts("ok");
}

static void census(void)
{
    volatile size_t held = 0, gone = 0;
    for (volatile size_t page = first_page; page < end_page; page++) {
        if (sigsetjmp(lost, 1) != 0)
            gone++;
        else if (memory[page * WORDS] == 0 || memory[page * WORDS + WORDS - 1] == 0) {
            printf("page %zu is zero\n", page);
            return;
        } else
            held++;
    }
    printf("%zu held, %zu lost\n", held, gone);
}

static long attach(void)
{
    void *address = shmat(segment, NULL, 0);
    memory = address;
    return address == (void *)-1 ? -1 : 0;
}

static long nattch(void)
{
    struct shmid_ds status;
    return shmctl(segment, IPC_STAT, &status) == 0 ? (long)status.shm_nattch : -1;
}

static long set_mode(long mode)
{
    struct shmid_ds status;
    if (shmctl(segment, IPC_STAT, &status) == -1)
        return -1;
    status.shm_perm.mode = (unsigned short)mode;
    return shmctl(segment, IPC_SET, &status);
}

static long have_children(long count)
{
    pid_t parent = getpid();
    while (count-- > 0) {
        pid_t child = fork();
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            while (getppid() == parent)
                pause();
            _exit(0);
        }
        if (child == -1)
            return -1;
    }
    return 0;
}

static long change(long delta, short flags)
{
    return semop(set, &(struct sembuf){.sem_op = (short)delta, .sem_flg = flags}, 1);
}

static long change_within(long delta, long milliseconds)
{
    struct timespec limit = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    return semtimedop(set, &(struct sembuf){.sem_op = (short)delta}, 1, &limit);
}

static long receive(long type)
{
    return msgrcv(queue, &type, 0, type, 0) == -1 ? -1 : type;
}

static long queued(void)
{
    struct msqid_ds status;
    return msgctl(queue, IPC_STAT, &status) == 0 ? (long)status.msg_qnum : -1;
}

static void answer(long result)
{
    puts(result == -1 ? strerrorname_np(errno) : "ok");
}

static void answer_value(long result)
{
    if (result == -1)
        answer(result);
    else
        printf("%ld\n", result);
}

static int obey(const char *verb, long first, long second)
{
    if (strcmp(verb, "segment") == 0) {
        size = (size_t)second;
        first_page = 0;
        end_page = size / PAGE;
        segment = shmget((key_t)first, size, IPC_CREAT | 0600);
        answer(segment == -1 ? -1 : attach());
    } else if (strcmp(verb, "part") == 0) {
        first_page = (size_t)first;
        end_page = (size_t)second;
        answer(0);
    } else if (strcmp(verb, "attach") == 0)
        answer(attach());
    else if (strcmp(verb, "detach") == 0)
        answer(shmdt((const void *)memory));
    else if (strcmp(verb, "fill") == 0)
        answer(fill(first));
    else if (strcmp(verb, "check") == 0)
        check(first);
    else if (strcmp(verb, "census") == 0)
        census();
    else if (strcmp(verb, "nattch") == 0)
        answer_value(nattch());
    else if (strcmp(verb, "mode") == 0)
        answer(set_mode(first));
    else if (strcmp(verb, "children") == 0)
        answer(have_children(first));
    else if (strcmp(verb, "remove") == 0)
        answer(shmctl(segment, IPC_RMID, NULL));
    else if (strcmp(verb, "semaphore") == 0)
        answer(set = semget((key_t)first, 1, IPC_CREAT | 0600));
    else if (strcmp(verb, "change") == 0)
        answer(change(first, 0));
    else if (strcmp(verb, "lock") == 0)
        answer(change(first, SEM_UNDO));
    else if (strcmp(verb, "within") == 0)
        answer(change_within(first, second));
    else if (strcmp(verb, "value") == 0)
        answer_value(semctl(set, 0, GETVAL));
    else if (strcmp(verb, "waiters") == 0)
        answer_value(semctl(set, 0, GETNCNT));
    else if (strcmp(verb, "forget") == 0)
        answer(semctl(set, 0, IPC_RMID));
    else if (strcmp(verb, "queue") == 0)
        answer(queue = msgget((key_t)first, IPC_CREAT | 0600));
    else if (strcmp(verb, "send") == 0)
        answer(msgsnd(queue, &first, 0, 0));
    else if (strcmp(verb, "receive") == 0)
        answer_value(receive(first));
    else if (strcmp(verb, "queued") == 0)
        answer_value(queued());
    else if (strcmp(verb, "drop") == 0)
        answer(msgctl(queue, IPC_RMID, NULL));
    else
        return 0;
    return 1;
}

int main(void)
{
    char line[100], verb[20];
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(LIFE); /* nobody waits for ever for an answer */
    sigaction(SIGBUS, &(struct sigaction){.sa_handler = on_lost_page}, NULL);
    while (fgets(line, sizeof line, stdin) != NULL) {
        long first = 0, second = 0;
        if (sigsetjmp(lost, 1) != 0) {
            puts("SIGBUS");
            continue;
        }
        if (sscanf(line, "%19s %li %li", verb, &first, &second) < 1 ||
            !obey(verb, first, second)) {
            fprintf(stderr, "sysv: cannot do: %s", line);
            return 2;
        }
    }
    return 0;
}
