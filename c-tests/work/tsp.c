/*
 * The shortest round trip through N cities, by branch and bound over a shared queue.
 *
 * The queue holds tours that have begun, the most promising first: a heap in the segment, under one
 * semaphore, of the places of tours that do not change any more. A rank takes the first one; one of fewer than --depth cities is replaced by its
 * continuations, a longer one is the rank's to search to its end. The best length so far is under
 * the same semaphore: a rank reads it with every tour that it takes and when it finds a better one.
 * The length must be that of a sequential search, the tour a round trip of that length.
 */
#include "common.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CITIES = 32, MAX_TOURS = 32768, SIDE = 1000 };

static long cities = 13, depth = 3, seed = 1;
static bool unchecked;

/* A tour that has begun. */
struct tour {
    int length;
    int bound; /* no round trip that begins so is shorter */
    int count;
    unsigned char city[MAX_CITIES];
};

/* What is computed before the search and never changes. */
struct map {
    int distance[MAX_CITIES][MAX_CITIES];
    unsigned char nearest[MAX_CITIES][MAX_CITIES]; /* the other cities of each, by distance */
};

/* All of it is under the semaphore. */
struct queue {
    struct tour best;
    int put, taken, waiting;
    struct {
        int bound, tour;
    } heap[MAX_TOURS];
    struct tour tours[MAX_TOURS]; /* in the order in which they were put */
};

/* A rank's own. */
struct search {
    const struct map *map;
    struct queue *queue;
    int set;
    int limit; /* a length known to be reached */
    struct tour tour;
    bool visited[MAX_CITIES];
};

static struct map *make_map(struct map *map)
{
    int x[MAX_CITIES], y[MAX_CITIES];
    uint64_t random = (uint64_t)seed;
    for (int a = 0; a < cities; a++) {
        x[a] = (int)random_below(&random, SIDE);
        y[a] = (int)random_below(&random, SIDE);
    }
    for (int a = 0; a < cities; a++) {
        int count = 0;
        for (int b = 0; b < cities; b++) {
            map->distance[a][b] = abs(x[a] - x[b]) + abs(y[a] - y[b]);
            if (b == a)
                continue;
            int k = count++;
            for (; k > 0 && map->distance[a][map->nearest[a][k - 1]] > map->distance[a][b]; k--)
                map->nearest[a][k] = map->nearest[a][k - 1];
            map->nearest[a][k] = (unsigned char)b;
        }
    }
    return map;
}

/* What any way out of a city costs at least. */
static int way_out(const struct map *map, int city)
{
    return map->distance[city][map->nearest[city][0]];
}

static int length_of(const struct map *map, const struct tour *tour)
{
    int length = 0;
    for (int k = 0; k < tour->count; k++)
        length += map->distance[tour->city[k]][tour->city[(k + 1) % tour->count]];
    return length;
}

/* From each city to the nearest one left, then improved by turning parts round as long as it helps. */
static struct tour first_tour(const struct map *map)
{
    struct tour tour = {.count = 1};
    bool visited[MAX_CITIES] = {true};
    while (tour.count < cities) {
        const unsigned char *next = map->nearest[tour.city[tour.count - 1]];
        while (visited[*next])
            next++;
        visited[*next] = true;
        tour.city[tour.count++] = *next;
    }
    tour.length = length_of(map, &tour);
    for (bool better = true; better;) {
        better = false;
        for (int low = 1; low < cities - 1; low++)
            for (int high = low + 1; high < cities; high++) {
                struct tour other = tour;
                for (int k = low; k <= high; k++)
                    other.city[k] = tour.city[low + high - k];
                other.length = length_of(map, &other);
                if (other.length < tour.length) {
                    tour = other;
                    better = true;
                }
            }
    }
    return tour;
}

static struct tour shortest_beginning(const struct map *map)
{
    struct tour tour = {.count = 1};
    for (int city = 0; city < cities; city++)
        tour.bound += way_out(map, city);
    return tour;
}

/* The tour with one city more. */
static struct tour extended(const struct map *map, const struct tour *tour, int city)
{
    struct tour longer = *tour;
    int last = tour->city[tour->count - 1], step = map->distance[last][city];
    longer.city[longer.count++] = (unsigned char)city;
    longer.length += step;
    longer.bound += step - way_out(map, last);
    return longer;
}

static void swap_entries(struct queue *queue, int a, int b)
{
    int bound = queue->heap[a].bound, tour = queue->heap[a].tour;
    queue->heap[a] = queue->heap[b];
    queue->heap[b].bound = bound;
    queue->heap[b].tour = tour;
}

static void put(struct queue *queue, const struct tour *tour)
{
    expect(queue->put < MAX_TOURS, "more than %d tours; use a smaller --depth", MAX_TOURS);
    int at = queue->waiting++, index = queue->put++;
    queue->tours[index] = *tour;
    queue->heap[at].bound = tour->bound;
    queue->heap[at].tour = index;
    for (; at > 0 && queue->heap[at].bound < queue->heap[(at - 1) / 2].bound; at = (at - 1) / 2)
        swap_entries(queue, at, (at - 1) / 2);
}

static struct tour take(struct queue *queue)
{
    int index = queue->heap[0].tour;
    expect(index >= 0 && index < queue->put, "the queue is damaged");
    int last = --queue->waiting;
    queue->heap[0] = queue->heap[last];
    queue->taken++;
    for (int at = 0;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2 && child < last; child++)
            if (queue->heap[child].bound < queue->heap[least].bound)
                least = child;
        if (least == at)
            return queue->tours[index];
        swap_entries(queue, at, least);
        at = least;
    }
}

static void put_continuations(const struct map *map, struct queue *queue, const struct tour *tour)
{
    for (int city = 0; city < cities; city++) {
        if (memchr(tour->city, city, (size_t)tour->count))
            continue;
        struct tour longer = extended(map, tour, city);
        if (longer.bound < queue->best.length)
            put(queue, &longer);
    }
}

/* The next tour to be searched; false if there are no more. */
static bool next_tour(struct search *search)
{
    struct queue *queue = search->queue;
    bool found = false;
    semaphore_change(search->set, 0, -1, 0);
    while (!found && queue->waiting > 0) {
        search->tour = take(queue);
        if (search->tour.bound >= queue->best.length)
            continue;
        if (search->tour.count < depth)
            put_continuations(search->map, queue, &search->tour);
        else
            found = true;
    }
    search->limit = queue->best.length;
    semaphore_change(search->set, 0, 1, 0);
    return found;
}

/* A round trip shorter than any this rank knew. */
static void found_shorter(struct search *search, int length)
{
    search->limit = length;
    if (!search->queue)
        return;
    struct tour *best = &search->queue->best;
    semaphore_change(search->set, 0, -1, 0);
    if (length < best->length) {
        *best = search->tour;
        best->length = length;
    } else {
        search->limit = best->length;
    }
    semaphore_change(search->set, 0, 1, 0);
}

/* All continuations of the search's tour, nearest city first. */
static void search_on(struct search *search, int length, int bound)
{
    const struct map *map = search->map;
    struct tour *tour = &search->tour;
    int last = tour->city[tour->count - 1], saved = way_out(map, last);
    if (tour->count == cities) {
        length += map->distance[last][tour->city[0]];
        if (length < search->limit)
            found_shorter(search, length);
        return;
    }
    for (int k = 0; k < cities - 1; k++) {
        int city = map->nearest[last][k], step = map->distance[last][city];
        if (bound + step - saved >= search->limit)
            return;
        if (search->visited[city])
            continue;
        search->visited[city] = true;
        tour->city[tour->count++] = (unsigned char)city;
        search_on(search, length + step, bound + step - saved);
        tour->count--;
        search->visited[city] = false;
    }
}

static void search_tour(struct search *search)
{
    memset(search->visited, false, sizeof search->visited);
    for (int k = 0; k < search->tour.count; k++)
        search->visited[search->tour.city[k]] = true;
    search_on(search, search->tour.length, search->tour.bound);
}

static void compare(const struct map *map, const struct tour *best)
{
    bool visited[MAX_CITIES] = {false};
    for (int k = 0; k < cities; k++) {
        expect(!visited[best->city[k]], "city %d is visited twice", best->city[k]);
        visited[best->city[k]] = true;
    }
    expect(length_of(map, best) == best->length, "the best tour has %d, not %d",
           length_of(map, best), best->length);
    struct search search = {.map = map,
                            .limit = first_tour(map).length,
                            .tour = shortest_beginning(map)};
    double start = now();
    search_tour(&search);
    print_sequential(now() - start);
    expect(search.limit == best->length, "the best tour has %d, should have %d", best->length,
           search.limit);
    printf("%d, as the sequential search\n", best->length);
}

static void run(struct team *team)
{
    expect(cities >= 4 && cities <= MAX_CITIES, "%ld cities?", cities);
    struct map *map = team_segment(team, 0, sizeof *map);
    struct queue *queue = team_segment(team, 1, sizeof *queue);
    int set = team_semaphores(team, 0, 1);
    if (team->rank == 0) {
        queue->best = first_tour(make_map(map));
        struct tour tour = shortest_beginning(map);
        put(queue, &tour);
        semaphore_set(set, 0, 1);
    }
    team_barrier(team);

    double start = now();
    struct search search = {.map = map, .queue = queue, .set = set};
    long searched = 0;
    while (next_tour(&search)) {
        search_tour(&search);
        searched++;
    }
    team_barrier(team);
    double seconds = now() - start;

    expect(queue->best.count == cities, "there is no best tour");
    printf("rank %d searched %ld of %d tours\n", team->rank, searched, queue->taken);
    fflush(stdout);
    team_result(team, seconds, team->rank == 0 ? (uint64_t)queue->best.length : 0);
    if (team->rank != 0)
        return;
    expect(queue->put == queue->taken, "%d tours put, %d taken", queue->put, queue->taken);
    expect(semaphore_value(set, 0) == 1, "the semaphore ended at %d", semaphore_value(set, 0));
    if (!unchecked)
        compare(map, &queue->best);
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "cities", .meaning = "how many", .number = &cities},
        {.name = "depth", .meaning = "cities of a tour that is searched by one rank", .number = &depth},
        {.name = "seed", .meaning = "where they are", .number = &seed},
        {.name = "unchecked", .meaning = "no sequential run", .flag = &unchecked},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Travelling salesman by branch and bound, a shared queue.",
                                       4, 1, settings, run});
}
