/*
 * Molecules that attract and repel each other: all pairs, as in the Water program of SPLASH. (Here
 * a molecule is a point with a Lennard-Jones potential, in a box whose sides meet.)
 *
 * Each rank owns a block of molecules, which it moves. It computes the forces between each of them
 * and the half of all molecules that follows, in memory of its own, and then adds them to the
 * shared ones, block by block, under the semaphore of the block. Forces are added as integers, so
 * the order does not matter and the result must equal a sequential run bit for bit.
 */
#include "common.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 3 };

static long molecules = 256, steps = 10;
static bool unchecked;

static const double TIME_STEP = 0.002, UNIT = 0x1p-32; /* of a force, as an integer */

struct molecule {
    double place[AXES], velocity[AXES];
};

struct force {
    int64_t of[AXES];
};

/* Molecules on a side of the cube that they are put into, one unit apart and a bit; it is the box. */
static long box(void)
{
    long side = 1;
    while (side * side * side < molecules)
        side++;
    return side;
}

static void put_molecules(struct molecule *at, long first, long last)
{
    long side = box();
    for (long m = first; m < last; m++) {
        uint64_t random = (uint64_t)m;
        const long place[AXES] = {m % side, m / side % side, m / side / side};
        for (int axis = 0; axis < AXES; axis++) {
            at[m].place[axis] = (double)place[axis] + (double)random_below(&random, 1000) / 1e4;
            at[m].velocity[axis] = (double)random_below(&random, 1000) / 1e3 - 0.5;
        }
    }
}

static void add_pair(const struct molecule *all, long a, long b, double side, struct force *forces)
{
    double apart[AXES], square = 0;
    for (int axis = 0; axis < AXES; axis++) {
        double d = all[a].place[axis] - all[b].place[axis];
        apart[axis] = d - side * rint(d / side);
        square += apart[axis] * apart[axis];
    }
    square = fmax(square, 0.5); /* nobody gets that near but by a step that is too long */
    double inverse = 1 / square, sixth = inverse * inverse * inverse * 0.25;
    double strength = 24 * inverse * sixth * (2 * sixth - 1);
    for (int axis = 0; axis < AXES; axis++) {
        int64_t force = llrint(strength * apart[axis] / UNIT);
        forces[a].of[axis] += force;
        forces[b].of[axis] -= force;
    }
}

/* The pairs of the molecules [first, last) with those that follow, up to half way round. */
static void add_pairs(const struct molecule *all, long first, long last, struct force *forces)
{
    double side = (double)box();
    for (long a = first; a < last; a++)
        for (long ahead = 1; ahead <= molecules / 2; ahead++) {
            bool twice = 2 * ahead == molecules && a >= ahead; /* both see each other half way */
            if (!twice)
                add_pair(all, a, (a + ahead) % molecules, side, forces);
        }
}

static void move(struct molecule *at, const struct force *forces, long first, long last)
{
    double side = (double)box();
    for (long m = first; m < last; m++)
        for (int axis = 0; axis < AXES; axis++) {
            at[m].velocity[axis] += TIME_STEP * (double)forces[m].of[axis] * UNIT;
            double place = at[m].place[axis] + TIME_STEP * at[m].velocity[axis];
            at[m].place[axis] = place - side * floor(place / side);
        }
}

/* Adds what this rank has computed to the shared forces, its own block first. */
static void publish(struct team *team, int set, struct force *shared, const struct force *own)
{
    for (int k = 0; k < team->ranks; k++) {
        int block = (team->rank + k) % team->ranks;
        semaphore_change(set, block, -1, 0);
        for (long m = share_of(team, block, molecules); m < share_of(team, block + 1, molecules); m++)
            for (int axis = 0; axis < AXES; axis++)
                shared[m].of[axis] += own[m].of[axis];
        semaphore_change(set, block, 1, 0);
    }
}

static void compare(const struct molecule *shared)
{
    struct molecule *all = calloc((size_t)molecules, sizeof *all);
    struct force *forces = calloc((size_t)molecules, sizeof *forces);
    if (!all || !forces)
        die("out of memory");
    put_molecules(all, 0, molecules);
    double start = now();
    for (long step = 0; step < steps; step++) {
        memset(forces, 0, (size_t)molecules * sizeof *forces);
        add_pairs(all, 0, molecules, forces);
        move(all, forces, 0, molecules);
    }
    print_sequential(now() - start);
    for (long m = 0; m < molecules; m++)
        expect(memcmp(&shared[m], &all[m], sizeof *all) == 0,
               "molecule %ld is at %.17g, should be at %.17g", m, shared[m].place[0],
               all[m].place[0]);
    printf("equal to the sequential result bit for bit\n");
    free(all);
    free(forces);
}

static void run(struct team *team)
{
    expect(molecules >= 2 && molecules <= 1 << 20, "%ld molecules?", molecules);
    struct molecule *all = team_segment(team, 0, (size_t)molecules * sizeof *all);
    struct force *forces = team_segment(team, 1, (size_t)molecules * sizeof *forces);
    struct force *own = calloc((size_t)molecules, sizeof *own);
    if (!own)
        die("out of memory");
    int set = team_semaphores(team, 0, team->ranks);
    if (team->rank == 0)
        for (int block = 0; block < team->ranks; block++)
            semaphore_set(set, block, 1);
    long first = share_of(team, team->rank, molecules);
    long last = share_of(team, team->rank + 1, molecules);
    put_molecules(all, first, last);
    team_barrier(team);

    double start = now();
    for (long step = 0; step < steps; step++) {
        memset(own, 0, (size_t)molecules * sizeof *own);
        memset(forces + first, 0, (size_t)(last - first) * sizeof *forces);
        add_pairs(all, first, last, own);
        team_barrier(team);
        publish(team, set, forces, own);
        team_barrier(team);
        move(all, forces, first, last);
        team_barrier(team);
    }
    double seconds = now() - start;

    uint64_t sum = 0, bits;
    for (long m = first; m < last; m++)
        for (int axis = 0; axis < AXES; axis++) {
            memcpy(&bits, &all[m].place[axis], sizeof bits);
            sum += digest((uint64_t)(m * AXES + axis), bits);
        }
    team_result(team, seconds, sum);
    if (team->rank == 0 && !unchecked)
        compare(all);
    free(own);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "molecules", .meaning = "how many", .number = &molecules},
        {.name = "steps", .meaning = "of time", .number = &steps},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Forces between all pairs of molecules, as in Water.", 4, 1,
                                       settings, run});
}
