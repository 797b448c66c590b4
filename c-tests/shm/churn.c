/*
 * A storm of object life cycles by many processes at once. Every turn a rank picks at random:
 *
 *   lasting    find a lasting segment and set by key, attach, add one under its semaphore, detach
 *   private    create a private segment and set, use them, detach, remove
 *   contested  try to create a key exclusively that others want too; whoever succeeds is alone with
 *              the name until it removes it
 *
 * At the end every lasting counter is exact, nothing is attached, and everything can be removed.
 */
#include "common.h"

#include <stdatomic.h>
#include <stdio.h>

enum { MAX_OBJECTS = 200, CONTESTED = 8, LEDGER_SLOT = MAX_OBJECTS, CONTESTED_SLOT };

static long objects = 100, seconds = 2;

struct tally {
    _Alignas(PAGE) long increments[MAX_OBJECTS];
    long lasting, private, contested;
};

struct ledger {
    _Alignas(PAGE) atomic_int owners[CONTESTED]; /* how many believe that they own the key */
    struct tally tallies[MAX_RANKS];
};

/* Adds one to the first word of an object that all ranks share. */
static void use_lasting(const struct team *team, long object)
{
    key_t key = team_key(team, (int)object);
    int segment = (int)must(shmget(key, PAGE, 0600)), set = (int)must(semget(key, 1, 0600));
    volatile long *counter = attach(segment);
    semaphore_change(set, 0, -1, SEM_UNDO);
    *counter = *counter + 1;
    semaphore_change(set, 0, 1, SEM_UNDO);
    detach((void *)counter);
}

static void use_private(uint64_t *random)
{
    size_t pages = 1 + random_below(random, 16);
    int segment = (int)must(shmget(IPC_PRIVATE, pages * PAGE, 0600));
    int set = (int)must(semget(IPC_PRIVATE, 3, 0600));
    volatile char *bytes = attach(segment);
    for (size_t p = 0; p < pages; p++) {
        expect(bytes[p * PAGE] == 0, "page %zu of a new segment is not zero", p);
        bytes[p * PAGE] = 1;
    }
    semaphore_change(set, 2, 1, SEM_UNDO);
    expect(semaphore_value(set, 2) == 1 && semaphore_value(set, 0) == 0,
           "a new set has wrong values");
    if (random_below(random, 2)) { /* removed before or after the last detach */
        must(shmctl(segment, IPC_RMID, NULL));
        expect(bytes[0] == 1, "a removed segment lost its contents");
        detach((void *)bytes);
    } else {
        detach((void *)bytes);
        must(shmctl(segment, IPC_RMID, NULL));
    }
    must(semctl(set, 0, IPC_RMID));
    expect_errno(shmat(segment, NULL, 0), EINVAL);
    expect_errno(semctl(set, 0, GETVAL), EINVAL);
}

/* Whether this rank got to create the contested name. */
static bool use_contested(const struct team *team, struct ledger *ledger, int which)
{
    key_t key = team_key(team, CONTESTED_SLOT + which);
    int segment = shmget(key, PAGE, IPC_CREAT | IPC_EXCL | 0600);
    if (segment < 0) {
        expect(errno == EEXIST, "creating a contested key failed with errno %d", errno);
        return false;
    }
    expect(atomic_fetch_add(&ledger->owners[which], 1) == 0, "a key has two exclusive creators");
    int set = (int)must(semget(key, 1, IPC_CREAT | IPC_EXCL | 0600));
    volatile int *mark = attach(segment);
    expect(*mark == 0, "a new segment holds %d", *mark);
    *mark = team->rank + 1;
    semaphore_change(set, 0, 5, 0);
    expect(*mark == team->rank + 1 && semaphore_value(set, 0) == 5, "somebody else was here");
    detach((void *)mark);
    must(semctl(set, 0, IPC_RMID));
    atomic_fetch_sub(&ledger->owners[which], 1);
    must(shmctl(segment, IPC_RMID, NULL));
    return true;
}

static void check(const struct team *team, const struct ledger *ledger)
{
    long total = 0, private = 0, contested = 0;
    for (int rank = 0; rank < team->ranks; rank++) {
        total += ledger->tallies[rank].lasting;
        private += ledger->tallies[rank].private;
        contested += ledger->tallies[rank].contested;
    }
    for (long object = 0; object < objects; object++) {
        key_t key = team_key(team, (int)object);
        int segment = (int)must(shmget(key, 0, 0600)), set = (int)must(semget(key, 0, 0600));
        expect_attach_count(segment, 0, "the storm");
        expect(semaphore_value(set, 0) == 1, "set %ld ended at %d", object,
               semaphore_value(set, 0));
        long expected = 0;
        for (int rank = 0; rank < team->ranks; rank++)
            expected += ledger->tallies[rank].increments[object];
        const long *counter = attach(segment);
        expect(*counter == expected, "segment %ld counts %ld, not %ld", object, *counter,
               expected);
        detach(counter);
    }
    printf("%d ranks, %ld objects of each kind: %ld locked increments, %ld private life cycles, "
           "%ld contested ones; all exact\n",
           team->ranks, objects, total, private, contested);
}

static void run(struct team *team)
{
    expect(objects > 0 && objects <= MAX_OBJECTS, "--objects is 1 to %d", MAX_OBJECTS);
    if (team->rank == 0)
        for (int object = 0; object < objects; object++) {
            team_segment_id(team, object, PAGE);
            semaphore_change(team_semaphores(team, object, 1), 0, 1, 0);
        }
    struct ledger *ledger = team_segment(team, LEDGER_SLOT, sizeof *ledger);
    team_barrier(team);

    struct tally *tally = &ledger->tallies[team->rank];
    uint64_t random = (uint64_t)team->rank;
    double end = now() + (double)seconds;
    do {
        switch (random_below(&random, 4)) {
        case 0:
            use_private(&random);
            tally->private++;
            break;
        case 1:
            tally->contested +=
                use_contested(team, ledger, (int)random_below(&random, CONTESTED));
            break;
        default: {
            long object = (long)random_below(&random, (uint64_t)objects);
            use_lasting(team, object);
            tally->increments[object]++;
            tally->lasting++;
        }
        }
    } while (now() < end);
    team_barrier(team);
    if (team->rank == 0)
        check(team, ledger);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "objects", .meaning = "lasting segments, and as many sets", .number = &objects},
        {.name = "seconds", .meaning = "how long", .number = &seconds},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"A storm of create, attach, touch, detach, remove.", 4, 1,
                                       settings, run});
}
