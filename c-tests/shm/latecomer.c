/*
 * The child first, the second process later.
 *
 * Rank 0 attaches a segment alone and makes children of it, by fork, raw clone, and a raw clone of
 * a raw clone. Only then do the other ranks attach. A system that begins to track accesses when a
 * second node appears must not have forgotten those children: they go on writing and reading.
 *
 * Rounds: each child writes its page; all ranks verify, each writes its own page; all children
 * verify. The children are driven through pipes, never through the segment.
 */
#include "common.h"

#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILDREN = 3, WORDS = PAGE / sizeof(long) };
enum command { WRITE, VERIFY, END };

static long rounds = 50;

struct page {
    _Alignas(PAGE) volatile long words[WORDS];
};

struct shared {
    struct page children[CHILDREN];
    struct page ranks[MAX_RANKS];
};

struct order {
    enum command command;
    int ranks;
    long round;
};

struct child {
    int orders, answers; /* our ends of the pipes */
};

static long content(int who, long round)
{
    return round * 1000 + who;
}

/* Touches the first and the last word only: the first access may well be a write. */
static void write_page(struct page *page, int who, long round)
{
    page->words[0] = content(who, round);
    page->words[WORDS - 1] = -content(who, round);
}

static bool is_right(const struct page *page, int who, long round)
{
    return page->words[0] == content(who, round) && page->words[WORDS - 1] == -content(who, round);
}

static _Noreturn void serve(struct shared *shared, int self, int orders, int answers)
{
    struct order order;
    while (read(orders, &order, sizeof order) == sizeof order && order.command != END) {
        char wrong = 0;
        if (order.command == WRITE)
            write_page(&shared->children[self], self, order.round);
        else
            for (int rank = 0; rank < order.ranks; rank++)
                if (!is_right(&shared->ranks[rank], MAX_RANKS + rank, order.round))
                    wrong = (char)(1 + rank);
        if (write(answers, &wrong, 1) != 1)
            _exit(1);
    }
    _exit(0);
}

static pid_t raw_clone(void)
{
    return (pid_t)must(syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0UL));
}

static struct child make_child(struct shared *shared, int self)
{
    int orders[2], answers[2];
    must(pipe(orders));
    must(pipe(answers));
    fflush(NULL);
    pid_t child = self == 0 ? (pid_t)must(fork()) : raw_clone();
    if (child == 0) {
        if (self == 2 && raw_clone() != 0)
            _exit(0); /* the grandchild serves */
        close(orders[1]); /* so that rank 0's death ends the child */
        close(answers[0]);
        serve(shared, self, orders[0], answers[1]);
    }
    close(orders[0]);
    close(answers[1]);
    return (struct child){orders[1], answers[0]};
}

static void command(const struct child *children, struct order order)
{
    for (int k = 0; k < CHILDREN; k++)
        expect(write(children[k].orders, &order, sizeof order) == sizeof order, "child %d is gone",
               k);
    for (int k = 0; order.command != END && k < CHILDREN; k++) {
        char wrong;
        expect(read(children[k].answers, &wrong, 1) == 1, "child %d is gone", k);
        expect(wrong == 0, "round %ld: child %d does not see what rank %d wrote", order.round, k,
               wrong - 1);
    }
}

static void run(struct team *team)
{
    struct shared *shared = NULL;
    struct child children[CHILDREN];
    if (team->rank == 0) {
        signal(SIGPIPE, SIG_IGN);
        shared = team_segment(team, 0, sizeof *shared);
        for (int k = 0; k < CHILDREN; k++)
            children[k] = make_child(shared, k);
        command(children, (struct order){WRITE, team->ranks, 0});
    }
    team_barrier(team);
    if (team->rank != 0)
        shared = team_segment(team, 0, sizeof *shared);
    for (int k = 0; k < CHILDREN; k++)
        expect(is_right(&shared->children[k], k, 0), "rank %d does not see what child %d wrote",
               team->rank, k);
    team_barrier(team);

    for (long round = 1; round <= rounds; round++) {
        if (team->rank == 0)
            command(children, (struct order){WRITE, team->ranks, round});
        team_barrier(team);
        for (int k = 0; k < CHILDREN; k++)
            expect(is_right(&shared->children[k], k, round),
                   "round %ld: child %d's write is not seen: %ld", round, k,
                   shared->children[k].words[0]);
        write_page(&shared->ranks[team->rank], MAX_RANKS + team->rank, round);
        team_barrier(team);
        if (team->rank == 0)
            command(children, (struct order){VERIFY, team->ranks, round});
        team_barrier(team);
    }
    if (team->rank == 0) {
        command(children, (struct order){.command = END});
        while (wait(NULL) > 0)
            ;
        printf("%ld rounds: %d children older than the second attach, %d ranks, all coherent\n",
               rounds, CHILDREN, team->ranks);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "write-and-verify rounds", .number = &rounds},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Children made before anybody else attached.", 2, 2,
                                       settings, run});
}
