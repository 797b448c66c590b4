/*
 * One message goes to and fro between ranks 0 and 1, over one queue with a type for each
 * direction; its text counts the strokes. Ranks 2 and up play in pairs likewise.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long rounds = 5000, bytes = 64;

struct ball {
    long type;
    long strokes;
    unsigned char rest[];
};

static void serve(int queue, struct ball *ball, long to)
{
    ball->type = to;
    ball->strokes++;
    must(msgsnd(queue, ball, (size_t)bytes, 0));
}

static void await(int queue, struct ball *ball, long own, long strokes)
{
    ssize_t got = must(msgrcv(queue, ball, (size_t)bytes, own, 0));
    expect(got == bytes && ball->type == own, "got %zd bytes of type %ld, not %ld of type %ld", got,
           ball->type, bytes, own);
    expect(ball->strokes == strokes, "stroke %ld, not %ld", ball->strokes, strokes);
}

static void run(struct team *team)
{
    if (bytes < (long)sizeof(long))
        bytes = sizeof(long);
    struct ball *ball = calloc(1, sizeof ball->type + (size_t)bytes);
    int queue = team_queue(team, 0);
    long own = team->rank + 1, other = (team->rank ^ 1) + 1;
    bool plays = other <= team->ranks;
    team_barrier(team);
    double start = now();
    for (long k = 0; plays && k < rounds; k++) {
        if (team->rank % 2 == 0) {
            serve(queue, ball, other);
            await(queue, ball, own, 2 * k + 2);
        } else {
            await(queue, ball, own, 2 * k + 1);
            serve(queue, ball, other);
        }
    }
    double seconds = now() - start;
    team_barrier(team);
    if (team->rank == 0) {
        struct msqid_ds status;
        must(msgctl(queue, IPC_STAT, &status));
        expect(status.msg_qnum == 0, "%lu messages are left", (unsigned long)status.msg_qnum);
        printf("%ld rounds of %ld bytes: %.1f us each\n", rounds, bytes,
               seconds / (double)rounds * 1e6);
    }
    free(ball);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "rounds", .meaning = "times to and fro", .number = &rounds},
        {.name = "bytes", .meaning = "of the message's text", .number = &bytes},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Two ranks play with one message.", 2, 2, settings, run});
}
