/*
 * The number of attaches follows processes however they come and go: fork, raw clone, vfork and
 * exec, posix_spawn, exit, SIGKILL, orphans. It must be right within a second.
 *
 * Every rank attaches the segment; rank 0 makes the children. A child is held with a pipe, so that
 * each count is taken while it is known to be alive. `cat` is the program executed: it answers what
 * it reads, which proves that the exec has happened.
 */
#include "common.h"

#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

extern char **environ;

/* Pipes to and from a child. */
struct link {
    int to_child[2], from_child[2];
};

static struct link open_link(void)
{
    struct link link;
    must(pipe2(link.to_child, 0));
    must(pipe2(link.from_child, 0));
    return link;
}

static void close_link(struct link link)
{
    for (int k = 0; k < 2; k++) {
        if (link.to_child[k] >= 0)
            close(link.to_child[k]);
        close(link.from_child[k]);
    }
}

static void say(int fd)
{
    expect(write(fd, "x", 1) == 1, "a pipe is broken");
}

static void hear(int fd)
{
    char byte;
    expect(read(fd, &byte, 1) == 1, "the child ended early");
}

/* What a child does in most cases: says that it lives, and ends when it is told to. */
static void live(struct link link)
{
    say(link.from_child[1]);
    hear(link.to_child[0]);
}

static void end_child(struct link link, pid_t child)
{
    say(link.to_child[1]);
    expect_success(child, "the child");
    close_link(link);
}

static void forked(int segment, int base)
{
    struct link link = open_link();
    pid_t child = fork_watched();
    if (child == 0) {
        live(link);
        _exit(0);
    }
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 1, "fork");
    end_child(link, child);
    expect_attach_count(segment, base, "the child's exit");
}

static void forked_and_detached(int segment, int base, char *address)
{
    struct link link = open_link();
    pid_t child = fork_watched();
    if (child == 0) {
        live(link);
        detach(address);
        live(link);
        attach(segment);
        attach(segment);
        live(link);
        _exit(0);
    }
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 1, "fork");
    say(link.to_child[1]);
    hear(link.from_child[0]);
    expect_attach_count(segment, base, "the child's detach");
    say(link.to_child[1]);
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 2, "the child's own two attaches");
    end_child(link, child);
    expect_attach_count(segment, base, "the child's exit");
}

static void killed(int segment, int base)
{
    struct link link = open_link();
    pid_t child = fork_watched();
    if (child == 0) {
        for (int k = 0; k < 3; k++)
            attach(segment);
        live(link);
        _exit(1);
    }
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 4, "fork and three attaches");
    kill_child(child);
    close_link(link);
    expect_attach_count(segment, base, "SIGKILL");
}

/* A child that neither libc nor an atfork handler knows of. */
static void raw_cloned(int segment, int base, volatile char *address)
{
    struct link link = open_link();
    pid_t child = (pid_t)must(syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0UL));
    if (child == 0) {
        watchdog();
        address[1] = 77;
        live(link);
        _exit(0);
    }
    hear(link.from_child[0]);
    expect(address[1] == 77, "a raw clone's write is not seen");
    expect_attach_count(segment, base + 1, "raw clone");
    end_child(link, child);
    expect_attach_count(segment, base, "the clone's exit");
}

static void orphaned(int segment, int base)
{
    struct link link = open_link();
    pid_t child = fork_watched();
    if (child == 0) {
        if (fork_watched() == 0) {
            live(link);
            _exit(0);
        }
        _exit(0);
    }
    expect_success(child, "the child");
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 1, "the child's exit, grandchild alive");
    say(link.to_child[1]);
    close_link(link);
    expect_attach_count(segment, base, "the grandchild's exit");
}

/* Ends the `cat` at the other end of the link, having checked that it runs and holds nothing. */
static void check_cat(int segment, int base, struct link link, pid_t child, const char *how)
{
    say(link.to_child[1]);
    hear(link.from_child[0]);
    expect_attach_count(segment, base, how);
    close(link.to_child[0]);
    close(link.to_child[1]);
    link.to_child[0] = link.to_child[1] = -1;
    expect_success(child, "cat");
    close_link(link);
    expect_attach_count(segment, base, "cat's exit");
}

static void become_cat(struct link link)
{
    if (dup2(link.to_child[0], 0) < 0 || dup2(link.from_child[1], 1) < 0 ||
        close(link.to_child[1]) < 0)
        _exit(126);
    execlp("cat", "cat", (char *)NULL);
    _exit(127);
}

static void forked_and_executed(int segment, int base)
{
    struct link link = open_link();
    pid_t child = fork_watched();
    if (child == 0) {
        live(link);
        become_cat(link);
    }
    hear(link.from_child[0]);
    expect_attach_count(segment, base + 1, "fork");
    say(link.to_child[1]);
    check_cat(segment, base, link, child, "exec");
}

static void vforked_and_executed(int segment, int base)
{
    struct link link = open_link();
    pid_t child = vfork();
    if (child == 0)
        become_cat(link);
    must(child);
    check_cat(segment, base, link, child, "vfork and exec");
}

static void spawned(int segment, int base)
{
    struct link link = open_link();
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, link.to_child[0], 0);
    posix_spawn_file_actions_adddup2(&actions, link.from_child[1], 1);
    posix_spawn_file_actions_addclose(&actions, link.to_child[1]);
    pid_t child;
    char *arguments[] = {"cat", NULL};
    errno = posix_spawnp(&child, "cat", &actions, NULL, arguments, environ);
    if (errno)
        die_errno("posix_spawn");
    posix_spawn_file_actions_destroy(&actions);
    check_cat(segment, base, link, child, "posix_spawn");
}

static void run(struct team *team)
{
    int segment = team_segment_id(team, 0, PAGE);
    char *address = attach(segment);
    team_barrier(team);
    if (team->rank == 0) {
        int base = team->ranks;
        expect_attach_count(segment, base, "all ranks attached");
        forked(segment, base);
        forked_and_detached(segment, base, address);
        killed(segment, base);
        raw_cloned(segment, base, address);
        orphaned(segment, base);
        forked_and_executed(segment, base);
        vforked_and_executed(segment, base);
        spawned(segment, base);
        address[0] = 1; /* the parent's own attach has survived all that */
        printf("nattch right after fork, detach, SIGKILL, clone, orphan, exec, vfork, spawn\n");
    }
    team_barrier(team);
    expect(address[0] == 1, "rank 0's last write is not seen");
}

int main(int argc, char **argv)
{
    return team_main(argc, argv,
                     &(struct program){"nattch through fork, clone, exec, spawn, exit, SIGKILL.", 2,
                                       1, NULL, run});
}
