/*
 * System calls that read and write shared pages in the kernel's own context: write, writev, pwrite,
 * send out of them; read, readv, pread, recv into them; a path name and a stat buffer in them.
 *
 * The pages are "cold" for the caller: another rank wrote them last, and the caller does not touch
 * them before it passes them to the kernel. Each transfer is unaligned, spans several pages, and
 * must be complete, as on plain memory. The ranks change roles every round.
 */
#include "common.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    REGION_PAGES = 5,
    OFFSET = 100,
    LENGTH = 3 * PAGE + 17, /* less than any pipe or socket buffer */
    SPLIT = PAGE + 55,
};

static long rounds = 5;

struct region {
    _Alignas(PAGE) unsigned char bytes[REGION_PAGES * PAGE];
};

struct shared {
    struct region source; /* written by the filler, sent by the sender */
    struct region target; /* last written by the filler, received into by the sender */
    struct region path;
    struct region status;
};

/* The two ends of a channel; a file's are the same descriptor. */
struct channel {
    int in, out;
};

static struct channel open_pipe(void)
{
    int ends[2];
    must(pipe(ends));
    return (struct channel){ends[0], ends[1]};
}

static struct channel open_stream(void)
{
    int ends[2];
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    return (struct channel){ends[0], ends[1]};
}

static struct channel open_datagram(void)
{
    int ends[2];
    must(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
    return (struct channel){ends[0], ends[1]};
}

static struct channel open_file(void)
{
    char name[] = "/tmp/kernelio.XXXXXX";
    int fd = (int)must(mkstemp(name));
    must(unlink(name));
    return (struct channel){fd, fd};
}

static void close_channel(struct channel channel)
{
    close(channel.in);
    if (channel.out != channel.in)
        close(channel.out);
}

static ssize_t by_write(int fd, unsigned char *bytes)
{
    return write(fd, bytes, LENGTH);
}

static ssize_t by_read(int fd, unsigned char *bytes)
{
    return read(fd, bytes, LENGTH);
}

/* A file is written at its beginning, so reading starts there. */
static ssize_t by_write_and_rewind(int fd, unsigned char *bytes)
{
    ssize_t written = write(fd, bytes, LENGTH);
    must(lseek(fd, 0, SEEK_SET));
    return written;
}

static ssize_t by_pwrite(int fd, unsigned char *bytes)
{
    return pwrite(fd, bytes, LENGTH, 0);
}

static ssize_t by_pread(int fd, unsigned char *bytes)
{
    return pread(fd, bytes, LENGTH, 0);
}

static ssize_t by_send(int fd, unsigned char *bytes)
{
    return send(fd, bytes, LENGTH, 0);
}

static ssize_t by_recv(int fd, unsigned char *bytes)
{
    return recv(fd, bytes, LENGTH, 0);
}

static ssize_t by_writev(int fd, unsigned char *bytes)
{
    struct iovec parts[] = {{bytes, SPLIT}, {bytes + SPLIT, LENGTH - SPLIT}};
    return writev(fd, parts, 2);
}

static ssize_t by_readv(int fd, unsigned char *bytes)
{
    struct iovec parts[] = {{bytes, SPLIT}, {bytes + SPLIT, LENGTH - SPLIT}};
    return readv(fd, parts, 2);
}

static ssize_t by_sendmsg(int fd, unsigned char *bytes)
{
    struct iovec parts[] = {{bytes, SPLIT}, {bytes + SPLIT, LENGTH - SPLIT}};
    return sendmsg(fd, &(struct msghdr){.msg_iov = parts, .msg_iovlen = 2}, 0);
}

static ssize_t by_recvmsg(int fd, unsigned char *bytes)
{
    struct iovec parts[] = {{bytes, SPLIT}, {bytes + SPLIT, LENGTH - SPLIT}};
    return recvmsg(fd, &(struct msghdr){.msg_iov = parts, .msg_iovlen = 2}, 0);
}

static const struct transfer {
    const char *name;
    struct channel (*open)(void);
    ssize_t (*out)(int, unsigned char *);
    ssize_t (*in)(int, unsigned char *);
} TRANSFERS[] = {
    {"write/read, pipe", open_pipe, by_write, by_read},
    {"writev/readv, pipe", open_pipe, by_writev, by_readv},
    {"write/read, file", open_file, by_write_and_rewind, by_read},
    {"pwrite/pread, file", open_file, by_pwrite, by_pread},
    {"send/recv, stream socket", open_stream, by_send, by_recv},
    {"sendmsg/recvmsg, stream socket", open_stream, by_sendmsg, by_recvmsg},
    {"send/recv, datagram socket", open_datagram, by_send, by_recv},
};
enum { TRANSFER_COUNT = sizeof TRANSFERS / sizeof TRANSFERS[0] };

static void fill(unsigned char *bytes, size_t size, uint64_t seed)
{
    for (size_t k = 0; k < size; k++)
        bytes[k] = (unsigned char)random_next(&seed);
}

static void expect_filled(const unsigned char *bytes, size_t size, uint64_t seed, const char *name,
                          const char *what)
{
    for (size_t k = 0; k < size; k++)
        expect(bytes[k] == (unsigned char)random_next(&seed), "%s: %s: byte %zu is wrong", name,
               what, k);
}

static void expect_complete(ssize_t moved, const char *name, const char *direction)
{
    if (moved < 0)
        die_errno("%s: %s", name, direction);
    expect(moved == LENGTH, "%s: %s moved %zd bytes of %d", name, direction, moved, LENGTH);
}

static void send_cold(const struct transfer *transfer, struct shared *shared, uint64_t seed)
{
    unsigned char own[LENGTH];
    struct channel channel = transfer->open();
    expect_complete(transfer->out(channel.out, shared->source.bytes + OFFSET), transfer->name,
                    "out of shared pages");
    expect_complete(transfer->in(channel.in, own), transfer->name, "in");
    expect_filled(own, LENGTH, seed, transfer->name, "out of shared pages");
    close_channel(channel);
}

static void receive_cold(const struct transfer *transfer, struct shared *shared, uint64_t seed)
{
    unsigned char own[LENGTH];
    fill(own, LENGTH, seed);
    struct channel channel = transfer->open();
    expect_complete(transfer->out(channel.out, own), transfer->name, "out");
    expect_complete(transfer->in(channel.in, shared->target.bytes + OFFSET), transfer->name,
                    "into shared pages");
    close_channel(channel);
}

/* The kernel reads a path, and writes a stat buffer, that straddle a page boundary. */
static char *straddling_path(struct shared *shared)
{
    return (char *)shared->path.bytes + PAGE - 4;
}

static struct stat *straddling_status(struct shared *shared)
{
    return (struct stat *)(shared->status.bytes + PAGE - 16);
}

static void one_round(struct team *team, struct shared *shared, long round)
{
    bool fills = team->rank == round % team->ranks;
    bool sends = team->rank == (round + 1) % team->ranks;
    for (int k = 0; k < TRANSFER_COUNT; k++) {
        const struct transfer *transfer = &TRANSFERS[k];
        uint64_t seed = (uint64_t)(round * TRANSFER_COUNT + k) * 3;
        if (fills) {
            fill(shared->source.bytes + OFFSET, LENGTH, seed);
            fill(shared->target.bytes, sizeof shared->target, seed + 1);
        }
        team_barrier(team);
        if (sends) {
            send_cold(transfer, shared, seed);
            receive_cold(transfer, shared, seed + 2);
        }
        team_barrier(team);
        if (fills) {
            expect_filled(shared->target.bytes + OFFSET, LENGTH, seed + 2, transfer->name,
                          "into shared pages, seen by the other rank");
            unsigned char before[OFFSET];
            fill(before, OFFSET, seed + 1);
            expect(memcmp(before, shared->target.bytes, OFFSET) == 0,
                   "%s: bytes before the buffer were changed", transfer->name);
        }
        team_barrier(team);
    }
    if (fills) {
        strcpy(straddling_path(shared), "/dev/null");
        memset(shared->status.bytes, 0xff, sizeof shared->status);
    }
    team_barrier(team);
    if (sends) {
        int fd = (int)must(open(straddling_path(shared), O_WRONLY));
        must(fstat(fd, straddling_status(shared)));
        close(fd);
    }
    team_barrier(team);
    if (fills)
        expect(S_ISCHR(straddling_status(shared)->st_mode), "fstat into shared pages was lost");
    team_barrier(team);
}

static void run(struct team *team)
{
    struct shared *shared = team_segment(team, 0, sizeof *shared);
    team_barrier(team);
    for (long round = 0; round < rounds; round++)
        one_round(team, shared, round);
    if (team->rank == 0)
        printf("%ld rounds of %d kinds of transfer, open and fstat: all complete and right\n",
               rounds, TRANSFER_COUNT);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "times to do everything", .number = &rounds},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"System calls on shared pages that another rank holds.", 2,
                                       1, settings, run});
}
