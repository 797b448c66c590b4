/*
 * Conformance of shmget, shmat, shmdt and shmctl: the life cycle of a segment, every errno within
 * reach, sizes, the fields of IPC_STAT, removal that waits for the last detach.
 *
 * Rank 0 judges; rank 1 (on another node, when run so) is the other process of the last checks.
 */
#include "common.h"

#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { NOBODY = 65534, ODD_SIZE = PAGE + 904 };

static int new_segment(size_t size)
{
    return (int)must(shmget(IPC_PRIVATE, size, 0600));
}

static void remove_segment(int segment)
{
    must(shmctl(segment, IPC_RMID, NULL));
}

static struct shmid_ds stat_of(int segment)
{
    struct shmid_ds status;
    must(shmctl(segment, IPC_STAT, &status));
    return status;
}

static bool is_gone(void *segment)
{
    struct shmid_ds status;
    return shmctl(*(int *)segment, IPC_STAT, &status) < 0 && errno == EINVAL;
}

static void expect_gone(int segment)
{
    expect(eventually(1, is_gone, &segment), "the segment is still there");
}

static void getting(const struct team *team)
{
    key_t key = team_key(team, 1);
    expect_errno(shmget(key, 0, 0), ENOENT);
    expect_errno(shmget(key, PAGE, 0600), ENOENT);
    expect_errno(shmget(key, 0, IPC_CREAT | 0600), EINVAL);
    expect_errno(shmget(key, (size_t)-1, IPC_CREAT | 0600), EINVAL);

    int segment = (int)must(shmget(key, ODD_SIZE, IPC_CREAT | IPC_EXCL | 0600));
    expect_errno(shmget(key, ODD_SIZE, IPC_CREAT | IPC_EXCL | 0600), EEXIST);
    expect_errno(shmget(key, ODD_SIZE + 1, 0600), EINVAL);
    expect(must(shmget(key, ODD_SIZE, IPC_CREAT | 0600)) == segment, "another segment");
    expect(must(shmget(key, 1, 0)) == segment, "another segment");
    expect(must(shmget(key, 0, 0)) == segment, "another segment");
    remove_segment(segment);
    expect_errno(shmget(key, 0, 0), ENOENT);
    expect_errno(shmctl(segment, IPC_RMID, NULL), EINVAL);

    int one = new_segment(1), two = new_segment(1);
    expect(one != two, "IPC_PRIVATE gave the same segment twice");
    remove_segment(one);
    remove_segment(two);
}

static void attaching(const struct team *team)
{
    (void)team;
    int segment = new_segment(ODD_SIZE);
    unsigned char *one = attach(segment), *two = attach(segment);
    expect(one != two && (uintptr_t)one % PAGE == 0, "attached at %p and %p", one, two);
    for (int k = 0; k < 2 * PAGE; k++) /* whole pages are there, whatever the size */
        expect(one[k] == 0, "byte %d is not zero", k);
    one[0] = 1;
    one[2 * PAGE - 1] = 2;
    expect(two[0] == 1 && two[2 * PAGE - 1] == 2, "two attaches of one segment differ");
    expect_attach_count(segment, 2, "two attaches");
    detach(one);
    expect_attach_count(segment, 1, "a detach");
    expect(two[0] == 1, "a detach changed the other attach");
    expect_errno(shmdt(one), EINVAL);
    expect_errno(shmdt(two + 1), EINVAL);
    detach(two);
    expect_attach_count(segment, 0, "the last detach");

    one = attach(segment);
    expect(one[0] == 1 && one[2 * PAGE - 1] == 2, "the contents did not outlive the attaches");
    detach(one);
    remove_segment(segment);
    expect_errno(shmat(segment, NULL, 0), EINVAL);
    expect_errno(shmat(-1, NULL, 0), EINVAL);
}

static void attaching_at_an_address(const struct team *team)
{
    (void)team;
    int segment = new_segment(PAGE);
    char *room = mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(room != MAP_FAILED, "mmap");
    must(munmap(room, 4 * PAGE));

    expect_errno(shmat(segment, room + 8, 0), EINVAL);
    expect(shmat(segment, room, 0) == room, "not attached where asked");
    expect(shmat(segment, room + PAGE + 8, SHM_RND) == room + PAGE, "SHM_RND did not round down");
    expect_errno(shmat(segment, room, 0), EINVAL);
    expect_errno(shmat(segment, NULL, SHM_REMAP), EINVAL);
    expect_attach_count(segment, 2, "two attaches");

    int other = new_segment(PAGE);
    room[0] = 1;
    expect(shmat(other, room, SHM_REMAP) == room, "SHM_REMAP did not replace a mapping");
    expect(room[0] == 0 && room[PAGE] == 1, "SHM_REMAP left the old memory");
    expect_attach_count(segment, 1, "SHM_REMAP of one attach");
    detach(room);
    detach(room + PAGE);
    remove_segment(segment);
    remove_segment(other);
}

static void read_only(const struct team *team)
{
    (void)team;
    int segment = new_segment(PAGE);
    volatile char *writable = attach(segment);
    char *readable = shmat(segment, NULL, SHM_RDONLY);
    expect(readable != (char *)-1, "shmat(SHM_RDONLY) fails");
    writable[5] = 42;
    expect(readable[5] == 42, "a read-only attach does not see a write");
    pid_t child = fork_watched();
    if (child == 0) {
        *(volatile char *)readable = 1;
        _exit(0);
    }
    int status;
    must(waitpid(child, &status, 0));
    expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV,
           "writing to a read-only attach did not raise SIGSEGV (status 0x%x)", status);
    expect_attach_count(segment, 2, "the death of a child");
    detach(readable);
    detach((void *)writable);
    remove_segment(segment);
}

static void status_fields(const struct team *team)
{
    time_t start = time(NULL) - 1;
    key_t key = team_key(team, 1);
    int segment = (int)must(shmget(key, ODD_SIZE, IPC_CREAT | IPC_EXCL | 0640));
    struct shmid_ds status = stat_of(segment);
    expect(status.shm_segsz == ODD_SIZE, "shm_segsz is %zu", status.shm_segsz);
    expect(status.shm_perm.__key == key, "the key is 0x%x", status.shm_perm.__key);
    expect((status.shm_perm.mode & 0777) == 0640, "the mode is %o", status.shm_perm.mode);
    expect(status.shm_perm.uid == geteuid() && status.shm_perm.cuid == geteuid() &&
               status.shm_perm.gid == getegid() && status.shm_perm.cgid == getegid(),
           "the owner is %u:%u", status.shm_perm.uid, status.shm_perm.gid);
    expect(status.shm_cpid == getpid() && status.shm_lpid == 0, "shm_cpid %d, shm_lpid %d",
           status.shm_cpid, status.shm_lpid);
    expect(status.shm_atime == 0 && status.shm_dtime == 0 && status.shm_nattch == 0,
           "a new segment was attached already");
    expect(status.shm_ctime >= start && status.shm_ctime <= time(NULL) + 1, "shm_ctime is off");

    void *address = attach(segment);
    status = stat_of(segment);
    expect(status.shm_atime >= start && status.shm_dtime == 0, "the times after shmat are off");
    expect(status.shm_lpid == getpid(), "shm_lpid is %d after my shmat", status.shm_lpid);
    detach(address);
    expect(stat_of(segment).shm_dtime >= start, "shm_dtime is off");

    status.shm_perm.mode = 0600;
    must(shmctl(segment, IPC_SET, &status));
    expect((stat_of(segment).shm_perm.mode & 0777) == 0600, "IPC_SET did not set the mode");
    expect_errno(shmctl(segment, 4711, &status), EINVAL);
    expect_errno(shmctl(-1, IPC_STAT, &status), EINVAL);
    remove_segment(segment);
}

static void removal_waits_for_the_last_detach(const struct team *team)
{
    key_t key = team_key(team, 1);
    int segment = (int)must(shmget(key, PAGE, IPC_CREAT | IPC_EXCL | 0600));
    volatile char *address = attach(segment);
    address[0] = 1;
    remove_segment(segment);
    expect_errno(shmget(key, 0, 0), ENOENT);
    struct shmid_ds status = stat_of(segment);
    expect(status.shm_perm.mode & SHM_DEST, "SHM_DEST is not set");
    expect(status.shm_nattch == 1, "nattch is %lu", (unsigned long)status.shm_nattch);

    int successor = (int)must(shmget(key, PAGE, IPC_CREAT | IPC_EXCL | 0600));
    expect(successor != segment, "the key found a removed segment");
    volatile char *again = attach(segment); /* Linux permits it, by id */
    address[1] = 2;
    expect(again[0] == 1 && again[1] == 2, "a removed segment lost its contents");
    detach((void *)address);
    expect(again[1] == 2, "a removed segment went before its last detach");
    detach((void *)again);
    expect_gone(segment);
    remove_segment(successor);
}

static void strangers_are_refused(const struct team *team)
{
    if (geteuid() != 0)
        return;
    key_t key = team_key(team, 1);
    int segment = (int)must(shmget(key, PAGE, IPC_CREAT | IPC_EXCL | 0604));
    int closed = new_segment(PAGE);
    volatile char *address = attach(segment);
    address[0] = 7;
    pid_t child = fork_watched();
    if (child == 0) {
        must(setgroups(0, NULL));
        must(setgid(NOBODY));
        must(setuid(NOBODY));
        struct shmid_ds status;
        expect_errno(shmget(key, 0, 0600), EACCES);
        expect(must(shmget(key, 0, 0400)) == segment, "another segment");
        must(shmctl(segment, IPC_STAT, &status));
        expect_errno(shmctl(closed, IPC_STAT, &status), EACCES);
        expect_errno(shmat(segment, NULL, 0), EACCES);
        expect_errno(shmat(closed, NULL, SHM_RDONLY), EACCES);
        char *readable = shmat(segment, NULL, SHM_RDONLY);
        expect(readable != (char *)-1 && readable[0] == 7, "a permitted read-only attach fails");
        expect_errno(shmctl(segment, IPC_SET, &status), EPERM);
        expect_errno(shmctl(segment, IPC_RMID, NULL), EPERM);
        _exit(0);
    }
    expect_success(child, "the stranger");
    detach((void *)address);
    remove_segment(segment);
    remove_segment(closed);
}

static void unmapping_detaches(const struct team *team)
{
    (void)team;
    int segment = new_segment(3 * PAGE);
    char *address = attach(segment);
    must(munmap(address, 3 * PAGE));
    expect_attach_count(segment, 0, "munmap of the whole attach");
    remove_segment(segment);
}

/* ---- with rank 1 ---- */

struct page {
    _Alignas(PAGE) volatile int value;
    volatile pid_t pid;
};

static void with_another_process(struct team *team)
{
    int segment = team_segment_id(team, 0, 2 * sizeof(struct page));
    struct page *pages = NULL;
    int self = team->rank;
    if (self <= 1) {
        pages = attach(segment);
        pages[self].value = 100 + self;
        pages[self].pid = getpid();
    }
    team_barrier(team);
    if (self <= 1) {
        expect(pages[!self].value == 101 - self, "rank %d sees %d", self, pages[!self].value);
        expect_attach_count(segment, 2, "two ranks attached");
        expect(stat_of(segment).shm_cpid == pages[0].pid, "shm_cpid is not rank 0's");
    }
    team_barrier(team);
    if (self == 1) { /* what a third attach, at another address, sees */
        struct page *again = attach(segment);
        pages[1].value = 201;
        expect(again[1].value == 201 && again[0].value == 100, "two attaches differ");
        expect(stat_of(segment).shm_lpid == getpid(), "shm_lpid is not mine");
        detach(again);
    }
    team_barrier(team);
    if (self == 0)
        remove_segment(segment);
    team_barrier(team);
    expect_errno(shmget(team_key(team, 0), 0, 0), ENOENT);
    if (self == 0) { /* rank 1 still uses the removed segment */
        expect(pages[1].value == 201, "rank 0 sees %d", pages[1].value);
        detach(pages);
    }
    team_barrier(team);
    if (self == 1) {
        expect(pages[0].value == 100, "a removed segment lost its contents");
        expect_attach_count(segment, 1, "rank 0's detach");
        detach(pages);
    }
    team_barrier(team);
    expect_gone(segment);
}

static void run(struct team *team)
{
    static const struct {
        const char *name;
        void (*check)(const struct team *);
    } alone[] = {
        {"shmget", getting},
        {"shmat and shmdt", attaching},
        {"shmat at an address", attaching_at_an_address},
        {"SHM_RDONLY", read_only},
        {"IPC_STAT and IPC_SET", status_fields},
        {"removal waits for the last detach", removal_waits_for_the_last_detach},
        {"strangers are refused", strangers_are_refused},
        {"munmap detaches", unmapping_detaches},
    };
    if (team->rank == 0)
        for (size_t k = 0; k < sizeof alone / sizeof *alone; k++) {
            alone[k].check(team);
            printf("ok  %s\n", alone[k].name);
            fflush(stdout);
        }
    with_another_process(team);
    if (team->rank == 0)
        printf("ok  two processes\n");
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"Conformance of shmget, shmat, shmdt, shmctl.", 2, 2,
                                       NULL, run});
}
