/*
 * A process that is told on standard input, as `sysv` is, what to do to its attach with mmap and
 * mremap.
 *
 *   segment KEY BYTES   shmget(IPC_CREAT), shmat      nattch      shmctl(IPC_STAT)
 *   fill V              V to both ends of every page, through one place after the other
 *   check V             `ok` if it is there, wherever the segment is mapped
 *   move                mremap to another address     resize      mremap to less, and to all again
 *   onto                ... on top of another attach  double      mremap of 0 bytes: mapped twice
 *   stay                ... with MREMAP_DONTUNMAP     cover       mmap(MAP_FIXED) over a page
 *   bury                attach, mmap(MAP_FIXED) over all of that
 *   raw 1               mmap and mremap by an instruction of its own from now on
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum { PAGE = 4096, WORDS = PAGE / sizeof(long), LIFE = 200 /* seconds */, PLACES = 4, OWN = 4711 };

typedef volatile long *memory;

static int segment, raw, places_count, turn, covered = -1;
static size_t size;
static memory places[PLACES];

static long instruction(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static void *do_mremap(memory from, size_t length, size_t new_length, int flags, void *to)
{
    if (!raw)
        return mremap((void *)from, length, new_length, flags, to);
    long result = instruction(SYS_mremap, (long)from, (long)length, (long)new_length, flags, (long)to, 0);
    return result < 0 ? MAP_FAILED : (void *)result;
}

static void *reserve(void)
{
    return mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static int is_ours(int place, size_t page)
{
    return covered >= 0 && place == 0 && page == (size_t)covered;
}

static void fill(long value)
{
    int place = turn++ % places_count;
    for (size_t page = 0; page < size / PAGE; page++)
        if (!is_ours(place, page)) {
            places[place][page * WORDS] = value;
            places[place][page * WORDS + WORDS - 1] = value;
        }
    puts("ok");
}

static void check(long value)
{
    for (int place = 0; place < places_count; place++)
        for (size_t page = 0; page < size / PAGE; page++)
            for (size_t word = 0; word < WORDS; word += WORDS - 1) {
                long found = places[place][page * WORDS + word];
                if (found != (is_ours(place, page) ? OWN : value)) {
                    printf("place %d page %zu word %zu is %ld\n", place, page, word, found);
                    return;
                }
            }
    puts("ok");
}

static void *move(void *to, int flags)
{
    return do_mremap(places[0], size, size, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to);
}

/* A place that the segment is at from now on, as well or instead. */
static void answer(void *place, int instead)
{
    if (place == MAP_FAILED || place == (void *)-1) {
        puts(strerrorname_np(errno));
        return;
    }
    places[instead ? 0 : places_count++] = place;
    puts("ok");
}

static void resize(void)
{
    void *less = do_mremap(places[0], size, size - 2 * PAGE, 0, NULL);
    if (less == MAP_FAILED)
        answer(less, 1);
    else
        answer(do_mremap(less, size - 2 * PAGE, size, MREMAP_MAYMOVE, NULL), 1);
}

static void cover(void)
{
    covered = 1;
    long *page = (long *)places[0] + covered * WORDS;
    int protection = PROT_READ | PROT_WRITE, flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS;
    if (raw)
        instruction(SYS_mmap, (long)page, PAGE, protection, flags, -1, 0);
    else if (mmap(page, PAGE, protection, flags, -1, 0) != page)
        puts(strerrorname_np(errno));
    page[0] = page[WORDS - 1] = OWN;
    puts("ok");
}

static void bury(void)
{
    void *second = shmat(segment, NULL, 0);
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS;
    void *over = mmap(second, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    puts(second != (void *)-1 && over == second ? "ok" : strerrorname_np(errno));
}

static int obey(const char *verb, long first, long second)
{
    if (strcmp(verb, "segment") == 0) {
        size = (size_t)second;
        segment = shmget((key_t)first, size, IPC_CREAT | 0600);
        places_count = 0;
        covered = -1;
        answer(shmat(segment, NULL, 0), 0);
    } else if (strcmp(verb, "nattch") == 0) {
        struct shmid_ds status;
        printf("%ld\n", shmctl(segment, IPC_STAT, &status) == 0 ? (long)status.shm_nattch : -1);
    } else if (strcmp(verb, "fill") == 0)
        fill(first);
    else if (strcmp(verb, "check") == 0)
        check(first);
    else if (strcmp(verb, "move") == 0)
        answer(move(reserve(), 0), 1);
    else if (strcmp(verb, "onto") == 0)
        answer(move(shmat(segment, NULL, 0), 0), 1);
    else if (strcmp(verb, "stay") == 0)
        answer(move(reserve(), MREMAP_DONTUNMAP), 0);
    else if (strcmp(verb, "double") == 0)
        answer(do_mremap(places[0], 0, size, MREMAP_MAYMOVE, NULL), 0);
    else if (strcmp(verb, "resize") == 0)
        resize();
    else if (strcmp(verb, "bury") == 0)
        bury();
    else if (strcmp(verb, "cover") == 0)
        cover();
    else if (strcmp(verb, "raw") == 0) {
        raw = (int)first;
        puts("ok");
    } else
        return 0;
    return 1;
}

int main(void)
{
    char line[100], verb[20];
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(LIFE);
    while (fgets(line, sizeof line, stdin) != NULL) {
        long first = 0, second = 0;
        if (sscanf(line, "%19s %li %li", verb, &first, &second) < 1 ||
            !obey(verb, first, second)) {
            fprintf(stderr, "mover: cannot do: %s", line);
            return 2;
        }
    }
    return 0;
}
