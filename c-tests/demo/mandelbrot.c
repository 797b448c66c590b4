/*
 * Many processes draw one Mandelbrot picture into one shared segment.
 *
 * Rows are handed out one by one: the next row number lives in the segment, guarded by a
 * semaphore. Each rank tints its rows in its own colour, so that the picture shows who drew what.
 * Rank 0 writes the picture as PPM and PNG and prints who did how much.
 *
 * The PNG needs no library: deflate's "stored" blocks carry the pixels uncompressed.
 */
#include "common.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long width = 1280, height = 800, iterations = 1500, chunk = 8;
static const char *output = "mandelbrot";
static bool self_check;

enum { SAMPLES = 4, CHECKED_ROWS = 16 };
static const double PI = 3.14159265358979;

struct share {
    bool present; /* rank 0 sees what the rank wrote */
    long rows;
    double seconds;
};

/* The segment: this, then the iteration counts, row by row, from `counts_offset` on. */
struct picture {
    long next_row;
    _Alignas(PAGE) struct {
        _Alignas(PAGE) struct share share;
    } ranks[MAX_RANKS];
};

/* One pixel, the average of SAMPLES * SAMPLES points. */
struct pixel {
    uint32_t steps; /* of all points together */
    uint8_t rgb[3]; /* not yet tinted */
    uint8_t rank;   /* who computed it */
};

/* Seahorse valley: enough detail to be worth several processes. */
static const double CENTRE_RE = -0.7443, CENTRE_IM = 0.1313, SPAN = 0.0052;

/* Iterates one point; returns how deep it is, smoothed: 0 if it never escapes. */
static double depth(double cr, double ci, uint32_t *steps)
{
    double r = 0, i = 0, r2 = 0, i2 = 0;
    long n = 0;
    for (; n < iterations && r2 + i2 <= 256; n++) {
        i = 2 * r * i + ci;
        r = r2 - i2 + cr;
        r2 = r * r;
        i2 = i * i;
    }
    *steps += (uint32_t)n;
    return r2 + i2 <= 256 ? 0 : log2((double)n + 4 - log2(log2(r2 + i2)));
}

/* A cosine palette: each channel its own phase of the same wave, brighter with depth. */
static double shade(double depth, int channel)
{
    static const double phase[3] = {0.00, 0.09, 0.20};
    return depth == 0 ? 0 : 0.5 - 0.5 * cos(2 * PI * (0.62 * depth + phase[channel] - 0.15));
}

static struct pixel compute(long column, long row)
{
    struct pixel pixel = {0};
    double scale = SPAN / (double)width, sum[3] = {0};
    for (int k = 0; k < SAMPLES * SAMPLES; k++) {
        double x = (double)column + (double)(k % SAMPLES) / SAMPLES - (double)width / 2;
        double y = (double)row + (double)(k / SAMPLES) / SAMPLES - (double)height / 2;
        double d = depth(CENTRE_RE + x * scale, CENTRE_IM + y * scale, &pixel.steps);
        for (int c = 0; c < 3; c++)
            sum[c] += shade(d, c);
    }
    for (int c = 0; c < 3; c++)
        pixel.rgb[c] = (uint8_t)(255 * sum[c] / (SAMPLES * SAMPLES));
    return pixel;
}

/* Mostly its own colour, partly that colour seen through its rank's. */
static void tinted(struct pixel pixel, int ranks, unsigned char *out)
{
    for (int c = 0; c < 3; c++) {
        double tint = 0.5 + 0.5 * cos(2 * PI * ((double)pixel.rank / ranks - c / 3.0));
        out[c] = (unsigned char)(pixel.rgb[c] * (0.65 + 0.35 * tint));
    }
}

static uint32_t crc_table[256];

static void make_crc_table(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320 ^ (c >> 1) : c >> 1;
        crc_table[n] = c;
    }
}

static unsigned char *put32(unsigned char *at, uint32_t value)
{
    for (int shift = 24; shift >= 0; shift -= 8)
        *at++ = (unsigned char)(value >> shift);
    return at;
}

static void write_all(FILE *file, const void *bytes, size_t size)
{
    if (fwrite(bytes, 1, size, file) != size)
        die_errno("writing the picture");
}

static FILE *create(const char *suffix)
{
    char name[512];
    snprintf(name, sizeof name, "%s%s", output, suffix);
    FILE *file = fopen(name, "wb");
    if (!file)
        die_errno("creating %s", name);
    return file;
}

static void finish(FILE *file)
{
    if (fclose(file) != 0)
        die_errno("writing the picture");
}

/* A PNG chunk; `data` has 4 free bytes before it for the type, which the CRC covers too. */
static void write_chunk(FILE *file, const char *type, unsigned char *data, size_t size)
{
    unsigned char number[4];
    put32(number, (uint32_t)size);
    write_all(file, number, 4);
    memcpy(data - 4, type, 4);
    write_all(file, data - 4, size + 4);
    uint32_t crc = 0xffffffff;
    for (size_t k = 0; k < size + 4; k++)
        crc = crc_table[(crc ^ data[(ptrdiff_t)k - 4]) & 0xff] ^ (crc >> 8);
    put32(number, ~crc);
    write_all(file, number, 4);
}

static void write_png(const unsigned char *rgb)
{
    enum { STORED_MAX = 65535 };
    size_t line = 1 + 3 * (size_t)width, raw_size = line * (size_t)height;
    size_t blocks = (raw_size + STORED_MAX - 1) / STORED_MAX;
    unsigned char *buffer = malloc(4 + 2 + raw_size + 5 * blocks + 4);
    if (!buffer)
        die("out of memory");
    unsigned char *data = buffer + 4;
    make_crc_table();

    FILE *file = create(".png");
    write_all(file, "\x89PNG\r\n\x1a\n", 8);

    unsigned char *at = put32(put32(data, (uint32_t)width), (uint32_t)height);
    memcpy(at, "\x08\x02\x00\x00\x00", 5); /* 8 bits a channel, RGB */
    write_chunk(file, "IHDR", data, 13);

    at = data;
    *at++ = 0x78; /* zlib header: deflate, 32 KiB window, no preset dictionary */
    *at++ = 0x01;
    uint32_t a = 1, b = 0; /* Adler-32 */
    for (size_t k = 0; k < raw_size; k++) {
        if (k % STORED_MAX == 0) {
            size_t size = raw_size - k < STORED_MAX ? raw_size - k : STORED_MAX;
            *at++ = k + size == raw_size; /* last block? type 00: stored */
            *at++ = (unsigned char)size;
            *at++ = (unsigned char)(size >> 8);
            *at++ = (unsigned char)~size;
            *at++ = (unsigned char)(~size >> 8);
        }
        size_t column = k % line; /* each line starts with its filter type, 0 */
        *at = column == 0 ? 0 : rgb[k / line * (line - 1) + column - 1];
        a = (a + *at++) % 65521;
        b = (b + a) % 65521;
    }
    at = put32(at, b << 16 | a);
    write_chunk(file, "IDAT", data, (size_t)(at - data));
    write_chunk(file, "IEND", data, 0);
    finish(file);
    free(buffer);
}

static void write_pictures(const struct pixel *pixels, int ranks)
{
    size_t count = (size_t)width * (size_t)height;
    unsigned char *rgb = malloc(3 * count);
    if (!rgb)
        die("out of memory");
    for (size_t k = 0; k < count; k++)
        tinted(pixels[k], ranks, rgb + 3 * k);
    FILE *file = create(".ppm");
    fprintf(file, "P6\n%ld %ld\n255\n", width, height);
    write_all(file, rgb, 3 * count);
    finish(file);
    write_png(rgb);
    free(rgb);
}

static void check_rows(const struct pixel *pixels)
{
    uint64_t random = 1;
    for (int n = 0; n < CHECKED_ROWS; n++) {
        long row = (long)random_below(&random, (uint64_t)height);
        for (long column = 0; column < width; column++) {
            struct pixel seen = pixels[row * width + column], right = compute(column, row);
            expect(seen.steps == right.steps && memcmp(seen.rgb, right.rgb, 3) == 0,
                   "row %ld column %ld: %u steps, should be %u", row, column, seen.steps,
                   right.steps);
        }
    }
    printf("self-check: %d rows recomputed, all equal\n", CHECKED_ROWS);
}

static void report(const struct picture *picture, int ranks)
{
    long total = 0;
    printf("rank   rows  seconds\n");
    for (int rank = 0; rank < ranks; rank++) {
        struct share share = picture->ranks[rank].share;
        printf("%4d %6ld %8.2f\n", rank, share.rows, share.seconds);
        expect(share.present, "rank %d's work is not visible", rank);
        total += share.rows;
    }
    expect(total == height, "%ld rows were drawn, not %ld", total, height);
}

static void draw(struct team *team)
{
    expect(width > 0 && height > 0 && chunk > 0 && width * height <= 1L << 28,
           "a picture of %ld x %ld by %ld rows?", width, height, chunk);
    size_t size = sizeof(struct picture) + (size_t)(width * height) * sizeof(struct pixel);
    struct picture *picture = team_segment(team, 0, size);
    struct pixel *pixels = (struct pixel *)(picture + 1);
    int lock = team_semaphores(team, 0, 1);
    if (team->rank == 0)
        semaphore_set(lock, 0, 1);
    team_barrier(team);

    double start = now();
    struct share share = {.present = true};
    for (;;) {
        semaphore_change(lock, 0, -1, SEM_UNDO);
        long row = picture->next_row;
        picture->next_row = row + chunk;
        semaphore_change(lock, 0, 1, SEM_UNDO);
        if (row >= height)
            break;
        for (long end = row + chunk; row < end && row < height; row++) {
            for (long column = 0; column < width; column++) {
                struct pixel pixel = compute(column, row);
                pixel.rank = (uint8_t)team->rank;
                pixels[row * width + column] = pixel;
            }
            share.rows++;
        }
    }
    share.seconds = now() - start;
    picture->ranks[team->rank].share = share;
    team_barrier(team);

    if (team->rank == 0) {
        report(picture, team->ranks);
        if (self_check)
            check_rows(pixels);
        write_pictures(pixels, team->ranks);
        printf("wrote %s.ppm and %s.png\n", output, output);
    }
}

int main(int argc, char **argv)
{
    static const struct setting settings[] = {
        {.name = "width", .meaning = "pixels", .number = &width},
        {.name = "height", .meaning = "pixels", .number = &height},
        {.name = "iterations", .meaning = "steps until a point counts as inside",
         .number = &iterations},
        {.name = "chunk", .meaning = "rows taken at a time", .number = &chunk},
        {.name = "output", .meaning = "name without .ppm/.png", .text = &output},
        {.name = "self-check", .meaning = "recompute sample rows and compare", .flag = &self_check},
        {0},
    };
    return team_main(argc, argv,
                     &(struct program){"Draws the Mandelbrot set, rows handed out dynamically.", 4,
                                       1, settings, draw});
}
