/*
 * The common part of the lock programs: all ranks fight for one lock in shared memory.
 *
 * Under the lock a rank adds one to a counter in each of several pages, which must be equal before
 * and after; at the end each counter must be exactly the number of operations. A rank that never
 * got the lock, or waited for it longer than --patience, was starved, and the run fails.
 */
#ifndef CONTEND_H
#define CONTEND_H

#include "common.h"

struct lock {
    size_t size;                          /* of the lock's shared state, which starts zeroed */
    void (*create)(void *state);          /* by rank 0, before anyone uses it; may be null */
    void (*acquire)(void *state, int rank);
    void (*release)(void *state, int rank);
};

/* The options that a program passes to team_main. */
extern const struct setting contend_settings[];

/* Runs the fight; returns the lock's state, still attached, in all ranks. */
void *contend(struct team *, const struct lock *);

#endif
