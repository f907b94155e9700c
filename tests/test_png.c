/* test_png.c - deflate, PNG, PPM and the recognition of formats: round trips, every kind of PNG built by hand,
 * damage of every sort, bombs, failing allocations, and (with SPURMEM_TEST_DATA) the PNG files of the conformance
 * set. */
#include "failing.h"
#include "sha256.h"
#include "../spurmem.h"

static spm_context *ctx;

/* A context whose allocations are counted from here on. */
static spm_context *meter_context(failing *f)
{
    spm_context *made;
    memset(f, 0, sizeof *f);
    made = failing_context(f, 1);
    f->calls = f->live = 0;
    f->largest = 0;
    return made;
}

static uint8_t noise(uint32_t seed, size_t i)
{
    return (uint8_t)spm_random_u32(seed, 0, i);
}

/* ---- deflate ---- */

/* Test data by kind: noise, zeros, four letters, text, runs, a ramp. */
static void fill(uint8_t *data, size_t n, int kind)
{
    static const char text[] = "A channel that carries the background more than the bird is a channel to look at. ";
    size_t i;
    for (i = 0; i < n; i++) {
        uint8_t r = noise(7, i);
        data[i] = kind == 0 ? r : kind == 1 ? 0 : kind == 2 ? (uint8_t)("acgt"[r & 3])
                : kind == 3 ? (uint8_t)text[i % (sizeof text - 1)]
                : kind == 4 ? (i && r > 20 ? data[i - 1] : r) : (uint8_t)(i * i / 5000);
    }
}

static void deflate_round_trips(void)
{
    static const size_t sizes[] = { 0, 1, 2, 3, 4, 257, 258, 259, 1000, 32767, 32768, 32769, 65535, 65536, 200000 };
    static uint8_t data[200000];
    int kind, wrapper, s;
    for (kind = 0; kind < 6; kind++) {
        for (s = 0; s < (int)(sizeof sizes / sizeof sizes[0]); s++) {
            size_t n = sizes[s];
            fill(data, n, kind);
            for (wrapper = 0; wrapper < 3; wrapper++) {
                uint8_t *packed = NULL, *back = NULL;
                size_t packed_size = 0, size = 1;
                CHECK_INT(spm_deflate(ctx, data, n, wrapper, &packed, &packed_size, NULL), SPM_OK);
                CHECK(packed_size <= n + n / 1000 + 64);
                if (n == 200000 && kind) CHECK(packed_size < n / 2);
                CHECK_INT(spm_inflate(ctx, packed, packed_size, wrapper, n ? n : 1, &back, &size, NULL), SPM_OK);
                CHECK(back && size == n && memcmp(data, back, n) == 0);
                spm_free(ctx, back);
                if (n > 1) { /* one byte less is not enough */
                    spm_error err = SPM_ZERO;
                    CHECK_INT(spm_inflate(ctx, packed, packed_size, wrapper, n - 1, &back, &size, &err),
                              SPM_E_UNSUPPORTED);
                    CHECK(!back && strstr(err.text, "cap"));
                }
                spm_free(ctx, packed);
            }
        }
    }
}

/* Streams that zlib 1.2.13 made (zlib.compress of the text at level 9; gzip's name and comment put in by hand). */
static void inflate_known_streams(void)
{
    static const uint8_t fixed[] = { 0x78, 0xda, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0xd7, 0x51, 0xc8, 0x00, 0x51, 0x8a,
                                    0x8a, 0x00, 0x26, 0x27,
                                     0x04, 0xb7 };
    static const uint8_t gzip[] = { 0x1f, 0x8b, 8, 0x1c, 0, 0, 0, 0, 0, 3, 2, 0, 'x', 'y', 'n', 0, 'c', 0, 0x4b,
                                   0x4c, 0x4a, 0x06, 0x00,
                                    0xc2, 0x41, 0x24, 0x35, 3, 0, 0, 0,
                                    0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x4b, 0x4c, 0x4a, 0x06, 0x00, 0xc2, 0x41,
                                            0x24, 0x35, 3, 0, 0, 0, 0, 0 };
    uint8_t *out;
    size_t size;
    CHECK_INT(spm_inflate(ctx, fixed, sizeof fixed, 1, 0, &out, &size, NULL), SPM_OK);
    CHECK(size == 14 && memcmp(out, "hello, hello!!", 14) == 0);
    spm_free(ctx, out);
    CHECK_INT(spm_inflate(ctx, gzip, sizeof gzip, 2, 0, &out, &size, NULL), SPM_OK); /* two members, padding behind */
    CHECK(size == 6 && memcmp(out, "abcabc", 6) == 0);
    spm_free(ctx, out);
}

static void inflate_refuses_damage(void)
{
    static uint8_t data[3000], copy[4000];
    uint8_t *packed, *back;
    size_t n, i, size;
    int wrapper, quiet = 0;
    fill(data, sizeof data, 2);
    for (wrapper = 1; wrapper < 3; wrapper++) {
        CHECK_INT(spm_deflate(ctx, data, sizeof data, wrapper, &packed, &n, NULL), SPM_OK);
        for (i = 0; i < n; i++) { /* cut off anywhere */
            spm_error err = SPM_ZERO;
            memcpy(copy, packed, i); /* the end of `copy` is not the end of the memory; ASan runs see the next one */
            CHECK_INT(spm_inflate(ctx, copy, i, wrapper, 0, &back, &size, &err), SPM_E_FORMAT);
            CHECK(!back && strstr(err.text, "cut off"));
        }
        /* one wrong bit: refused, or it carries nothing (padding, fields of gzip's header) */
        for (i = 0; i < n * 8; i++) {
            spm_error err = SPM_ZERO;
            memcpy(copy, packed, n);
            copy[i / 8] = (uint8_t)(copy[i / 8] ^ 1u << (i & 7));
            if (spm_inflate(ctx, copy, n, wrapper, 1 << 20, &back, &size, &err) == SPM_OK) {
                /* Adler misses balanced changes */
                CHECK(wrapper == 1 || (size == sizeof data && memcmp(back, data, size) == 0));
                quiet++;
                spm_free(ctx, back);
            }
            else CHECK(err.text[0]);
        }
        spm_free(ctx, packed);
    }
    CHECK(quiet < 2 * 8 + 80);
    { /* a block type, a stored length, a distance and a code that do not exist */
        static const uint8_t type3[] = { 7 }, stored[] = { 1, 5, 0, 0, 0, 1, 2, 3, 4, 5 };
        static const uint8_t far_back[] = { 0x4b, 0x04, 0x22 };
        spm_error err = SPM_ZERO;
        CHECK_INT(spm_inflate(ctx, type3, sizeof type3, 0, 0, &back, &size, &err), SPM_E_FORMAT);
        CHECK(strstr(err.text, "type"));
        memset(&err, 0, sizeof err);
        CHECK_INT(spm_inflate(ctx, stored, sizeof stored, 0, 0, &back, &size, &err), SPM_E_FORMAT);
        CHECK(strstr(err.text, "complement"));
        memset(&err, 0, sizeof err);
        CHECK_INT(spm_inflate(ctx, far_back, sizeof far_back, 0, 0, &back, &size, &err), SPM_E_FORMAT);
        CHECK(strstr(err.text, "reaches back"));
        memset(&err, 0, sizeof err);
        CHECK_INT(spm_inflate(ctx, stored, sizeof stored, 3, 0, &back, &size, &err), SPM_E_ARGUMENT);
        CHECK_INT(spm_deflate(ctx, stored, sizeof stored, 3, &back, &size, &err), SPM_E_ARGUMENT);
    }
}

static void inflate_bomb(void)
{
    failing m;
    spm_context *small = meter_context(&m);
    uint8_t *zeros = (uint8_t *)calloc(1, 20000000), *packed, *out;
    size_t n, size;
    spm_error err = SPM_ZERO;
    CHECK_INT(spm_deflate(ctx, zeros, 20000000, 2, &packed, &n, NULL), SPM_OK);
    CHECK(n < 30000);
    CHECK_INT(spm_inflate(small, packed, n, 2, 1000000, &out, &size, &err), SPM_E_UNSUPPORTED);
    CHECK(m.largest < 1100000);
    CHECK_INT(m.live, 0);
    spm_free(ctx, packed);
    free(zeros);
    spm_context_destroy(small);
}

/* ---- PNG built by hand ---- */

typedef struct file {
    uint8_t data[65536];
    size_t size;
} file;

static uint32_t crc_of(const uint8_t *p, size_t n)
{
    uint32_t crc = 0xffffffffu;
    int k;
    while (n--) for (crc ^= *p++, k = 0; k < 8; k++) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    return ~crc;
}

static void put32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

static void begin(file *f)
{
    memcpy(f->data, "\x89PNG\r\n\x1a\n", 8);
    f->size = 8;
}

static void chunk(file *f, const char *type, const void *body, size_t n)
{
    uint8_t *p = f->data + f->size;
    put32(p, (uint32_t)n);
    memcpy(p + 4, type, 4);
    if (n) memcpy(p + 8, body, n);
    put32(p + 8 + n, crc_of(p + 4, n + 4));
    f->size += n + 12;
}

static void header(file *f, uint32_t w, uint32_t h, int depth, int color, int interlaced)
{
    uint8_t b[13] = { 0 };
    put32(b, w);
    put32(b + 4, h);
    b[8] = (uint8_t)depth;
    b[9] = (uint8_t)color;
    b[12] = (uint8_t)interlaced;
    chunk(f, "IHDR", b, 13);
}

static int channels_of(int color)
{
    return color == 2 ? 3 : color == 4 ? 2 : color == 6 ? 4 : 1;
}

/* The sample at (x, y, channel) of the test picture. */
static unsigned sample(int x, int y, int c, int depth)
{
    return (unsigned)(noise(11, (size_t)((y * 97 + x) * 4 + c)) * 257 + x * 31 + y) & ((1u << depth) - 1);
}

/* Appends the rows of one pass, filtered by each filter in turn, to `raw`. */
static size_t rows_of(uint8_t *raw, int w, int h, int depth, int color, int x0, int y0, int dx, int dy)
{
    uint8_t above[1024] = { 0 }, row[1024];
    int n = channels_of(color), bytes = ((w - x0 + dx - 1) / dx * n * depth + 7) / 8;
    int step = n * depth < 8 ? 1 : n * depth / 8;
    size_t used = 0;
    int x, y, c, i;
    if (x0 >= w) return 0;
    for (y = y0; y < h; y += dy) {
        int filter = (y / dy) % 5, bit = 0;
        memset(row, 0, sizeof row);
        for (x = x0; x < w; x += dx) {
            for (c = 0; c < n; c++, bit += depth) {
                unsigned v = sample(x, y, c, depth);
                if (depth == 16) row[bit / 8 + 1] = (uint8_t)v;
                row[bit / 8] = (uint8_t)(row[bit / 8] | (depth == 16 ? v >> 8 : v << (8 - depth - bit % 8)));
            }
        }
        raw[used++] = (uint8_t)filter;
        for (i = 0; i < bytes; i++) {
            int a = i < step ? 0 : row[i - step], b = above[i], d = i < step ? 0 : above[i - step], p = a + b - d;
            int pa = abs(p - a), pb = abs(p - b), pc = abs(p - d);
            int guess = filter == 1 ? a : filter == 2 ? b : filter == 3 ? (a + b) / 2
                      : filter == 4 ? (pa <= pb && pa <= pc ? a : pb <= pc ? b : d) : 0;
            raw[used++] = (uint8_t)(row[i] - guess);
        }
        memcpy(above, row, sizeof above);
    }
    return used;
}

static size_t raw_of(uint8_t *raw, int w, int h, int depth, int color, int interlaced)
{
    static const int pass[7][4] = { { 0, 0, 8, 8 }, { 4, 0, 8, 8 }, { 0, 4, 4, 8 }, { 2, 0, 4, 4 }, { 0, 2, 2, 4 },
                                   { 1, 0, 2, 2 }, { 0, 1, 1, 2 } };
    size_t used = 0;
    int i;
    if (!interlaced) return rows_of(raw, w, h, depth, color, 0, 0, 1, 1);
    for (i = 0; i < 7; i++) {
        used += rows_of(raw + used, w, h, depth, color, pass[i][0], pass[i][1], pass[i][2], pass[i][3]);
    }
    return used;
}

/* A whole file; its deflate data is cut into IDAT chunks of `piece` bytes (0: one chunk). */
static void build(file *f, int w, int h, int depth, int color, int interlaced, size_t piece)
{
    static uint8_t raw[60000];
    uint8_t palette[768], *packed;
    size_t n, i;
    begin(f);
    header(f, (uint32_t)w, (uint32_t)h, depth, color, interlaced);
    chunk(f, "tEXt", "Title\0test", 10);
    for (i = 0; i < 600; i++) palette[i] = noise(5, i);
    if (color == 3) chunk(f, "PLTE", palette, depth == 8 ? 600 : (size_t)3 << depth); /* 200 colours */
    if (color == 3) chunk(f, "tRNS", "\0\x80", 2);
    n = raw_of(raw, w, h, depth, color, interlaced);
    CHECK_INT(spm_deflate(ctx, raw, n, 1, &packed, &n, NULL), SPM_OK);
    if (!piece) piece = n;
    for (i = 0; i < n; i += piece) chunk(f, "IDAT", packed + i, piece < n - i ? piece : n - i);
    spm_free(ctx, packed);
    chunk(f, "IEND", NULL, 0);
}

static int right_pixels(const spm_image *image, int depth, int color)
{
    int x, y, c;
    for (y = 0; y < image->height; y++) {
        for (x = 0; x < image->width; x++) {
            for (c = 0; c < 3; c++) {
                unsigned v = sample(x, y, color & 2 && color != 3 ? c : 0, depth), want;
                /* beyond the palette: a gray ramp */
                if (color == 3) want = v < 200 ? noise(5, v * 3 + (unsigned)c) : v;
                else want = depth == 16 ? v >> 8 : v * 255 / ((1u << depth) - 1);
                if (image->pixels[((size_t)y * (size_t)image->width + (size_t)x) * 3 + (size_t)c] != want) return 0;
            }
        }
    }
    return 1;
}

static void png_of_every_kind(void)
{
    static const int kinds[15][2] = { { 1, 0 }, { 2, 0 }, { 4, 0 }, { 8, 0 }, { 16, 0 }, { 8, 2 }, { 16, 2 },
                                      { 1, 3 }, { 2, 3 },
                                      { 4, 3 }, { 8, 3 }, { 8, 4 }, { 16, 4 }, { 8, 6 }, { 16, 6 } };
    static const int sizes[][2] = { { 1, 1 }, { 2, 9 }, { 5, 3 }, { 8, 8 }, { 33, 21 } };
    static file f;
    int k, s, interlaced;
    for (k = 0; k < 15; k++) {
        for (s = 0; s < 5; s++) {
            for (interlaced = 0; interlaced < 2; interlaced++) {
                spm_error err = SPM_ZERO;
                spm_image image;
                int w, h;
                build(&f, sizes[s][0], sizes[s][1], kinds[k][0], kinds[k][1], interlaced, s == 4 ? 7 : 0);
                CHECK_INT(spm_image_probe(f.data, f.size, &w, &h), SPM_IMAGE_PNG);
                CHECK(w == sizes[s][0] && h == sizes[s][1]);
                spm_image_decode(ctx, "test.png", f.data, f.size, NULL, &image, &err);
                CHECK_STR(err.text, "");
                CHECK(image.width == w && image.height == h);
                CHECK(image.pixels && right_pixels(&image, kinds[k][0], kinds[k][1]));
                spm_image_free(ctx, &image);
            }
        }
    }
}

/* What a decode says: its text, "" if it succeeds. */
static const char *verdict(const file *f, const spm_decode_desc *desc)
{
    static spm_error err;
    spm_image image;
    uint8_t *exact = (uint8_t *)malloc(f->size + !f->size); /* so that a sanitizer sees reads behind the end */
    memset(&err, 0, sizeof err);
    if (f->size) memcpy(exact, f->data, f->size);
    spm_image_decode(ctx, "test.png", exact, f->size, desc, &image, &err);
    CHECK((err.status == SPM_OK) == (image.pixels != NULL));
    spm_image_free(ctx, &image);
    free(exact);
    return err.text;
}

static size_t find(const file *f, const char *type)
{
    size_t i;
    for (i = 0; i + 4 <= f->size; i++) if (memcmp(f->data + i, type, 4) == 0) return i;
    return 0;
}

static void png_damage(void)
{
    static file f, g;
    size_t idat, n, i, complete;
    char want[80];
    build(&f, 20, 13, 8, 2, 0, 0);
    CHECK_STR(verdict(&f, NULL), "");
    idat = find(&f, "IDAT") - 4;
    n = (size_t)f.data[idat] << 24 | (size_t)f.data[idat + 1] << 16 | (size_t)f.data[idat + 2] << 8 | f.data[idat + 3];
    g = f;
    g.data[30] ^= 1; /* IHDR's CRC */
    CHECK(strstr(verdict(&g, NULL), "chunk IHDR at byte 8: CRC"));
    g = f;
    g.data[find(&g, "Title")] ^= 1; /* in a chunk nobody needs */
    CHECK(strstr(verdict(&g, NULL), "chunk tEXt at byte 33: CRC"));
    g = f;
    g.data[idat + 8 + n] ^= 1; /* the CRC of the pixels, whose own checksum holds: only logged, as in Pillow */
    CHECK_STR(verdict(&g, NULL), "");
    g = f;
    g.data[idat + 8 + n - 1] ^= 1; /* the Adler checksum */
    snprintf(want, sizeof want, "chunk IDAT at byte %lu: CRC does not match, and the checksum", (unsigned long)idat);
    CHECK(strstr(verdict(&g, NULL), want));
    put32(g.data + idat + 8 + n, crc_of(g.data + idat + 4, n + 4));
    snprintf(want, sizeof want, "chunk IDAT at byte %lu: the checksum", (unsigned long)idat);
    CHECK(strstr(verdict(&g, NULL), want));
    g = f;
    g.data[12] = 'C', g.data[13] = 'g', g.data[14] = 'B', g.data[15] = 'I';
    put32(g.data + 29, crc_of(g.data + 12, 17));
    CHECK(strstr(verdict(&g, NULL), "Apple"));
    /* cut off anywhere: an error until the pixels are complete; with allow_truncated a picture once they have begun */
    complete = idat + 8 + n - 4; /* the checksum itself may be missing, as in Pillow */
    for (i = 0; i < f.size; i++) {
        spm_decode_desc keep = SPM_ZERO;
        g = f;
        g.size = i;
        if (i < complete) CHECK(verdict(&g, NULL)[0]);
        else CHECK_STR(verdict(&g, NULL), "");
        keep.allow_truncated = 1;
        if (i < idat) CHECK(verdict(&g, &keep)[0]);
        if (i >= idat + 8) CHECK_STR(verdict(&g, &keep), "");
    }
    { /* fewer rows than the header says; a filter that does not exist; reserved header values */
        static uint8_t raw[2000];
        static const int bad[][3] = { { 3, 0, 0 }, { 8, 1, 0 }, { 16, 3, 0 }, { 4, 2, 0 }, { 8, 5, 2 } };
        uint8_t *packed;
        size_t used = raw_of(raw, 20, 13, 8, 2, 0), size;
        int k;
        for (k = 0; k < 2; k++) {
            begin(&g);
            header(&g, 20, 13, 8, 2, 0);
            if (k) raw[61 * 3] = 9;
            CHECK_INT(spm_deflate(ctx, raw, k ? used : 61 * 12, 1, &packed, &size, NULL), SPM_OK);
            chunk(&g, "IDAT", packed, size);
            spm_free(ctx, packed);
            CHECK(strstr(verdict(&g, NULL), k ? "row 3 has filter 9" : "pixels end after 732 of 793 bytes"));
        }
        for (k = 0; k < 5; k++) {
            begin(&g);
            header(&g, 4, 4, bad[k][0], bad[k][1], bad[k][2]);
            chunk(&g, "IDAT", "x", 1);
            CHECK(strstr(verdict(&g, NULL), "no such colour type with so many bits exists in PNG"));
        }
        begin(&g);
        header(&g, 0, 4, 8, 2, 0);
        chunk(&g, "IDAT", "x", 1);
        CHECK(strstr(verdict(&g, NULL), "0 x 4"));
        begin(&g);
        chunk(&g, "IDAT", "x", 1);
        CHECK(strstr(verdict(&g, NULL), "chunk IDAT at byte 8: the pixels come before IHDR"));
        begin(&g);
        header(&g, 4, 4, 8, 2, 0);
        header(&g, 5, 5, 8, 2, 0); /* the size that a probe gives must be the picture's */
        chunk(&g, "IDAT", "x", 1);
        CHECK(strstr(verdict(&g, NULL), "chunk IHDR at byte 33: the first chunk, and no other"));
        begin(&g);
        header(&g, 4, 4, 8, 2, 0);
        chunk(&g, "IEND", NULL, 0);
        CHECK(strstr(verdict(&g, NULL), "without an IDAT"));
    }
    for (i = 0; i < 4000; i++) { /* bytes at random: any verdict, no crash */
        int k;
        build(&g, 5, 4, i & 1 ? 8 : 2, i & 2 ? 3 : 0, (int)(i >> 2 & 1), 9);
        for (k = 0; k <= (int)(i % 3); k++) {
            g.data[8 + spm_random_below(3, i, (uint64_t)k * 2, (uint32_t)g.size - 8)] = noise(4, i * 3 + (size_t)k);
        }
        (void)verdict(&g, NULL);
    }
}

static void png_bombs(void)
{
    static const uint32_t sizes[][2] = {
        { 65500, 65500 }, { 0x7fffffff, 0x7fffffff }, { 0xffffffff, 1 }, { 20000, 10000 }, { 1, 300000000 }
    };
    static file f;
    static uint8_t body[900];
    failing m;
    spm_context *small = meter_context(&m);
    int k;
    for (k = 0; k < 5; k++) {
        spm_error err = SPM_ZERO;
        spm_image image;
        begin(&f);
        header(&f, sizes[k][0], sizes[k][1], k == 3 ? 8 : 16, k == 3 ? 0 : 6, k & 1);
        chunk(&f, "IDAT", body, sizeof body);
        m.largest = 0;
        CHECK(spm_image_decode(small, "bomb.png", f.data, f.size, NULL, &image, &err) != SPM_OK);
        CHECK(strstr(err.text, k < 3 || k == 4 ? "cap" : "cannot hold"));
        CHECK(m.largest < 100000);
        CHECK_INT(m.live, 0);
    }
    { /* within the cap of the picture, but not with the memory it takes to decode it */
        spm_decode_desc tight = SPM_ZERO;
        build(&f, 33, 21, 16, 6, 0, 0);
        tight.max_bytes = 33 * 21 * 3 + 500;
        CHECK(strstr(verdict(&f, &tight), "cap of 2579 bytes"));
        tight.max_bytes = 33 * 21 * 11 + 1000;
        CHECK_STR(verdict(&f, &tight), "");
    }
    spm_context_destroy(small);
}

static spm_image drawing(int w, int h, int gray)
{
    spm_image image;
    size_t i;
    CHECK_INT(spm_image_create(ctx, w, h, &image, NULL), SPM_OK);
    for (i = 0; i < (size_t)w * (size_t)h * 3; i++) {
        size_t pixel = i / 3, x = pixel % (size_t)w, y = pixel / (size_t)w;
        image.pixels[i] = (uint8_t)(x * 3 + y * 2 + (noise(2, gray ? pixel : i) & 7) + (gray ? 0 : i % 3 * 40));
    }
    return image;
}

static void png_encodes(void)
{
    static const int sizes[][2] = { { 1, 1 }, { 3, 2 }, { 1, 50 }, { 200, 150 } };
    int s, gray;
    for (s = 0; s < 4; s++) {
        for (gray = 0; gray < 2; gray++) {
            spm_image image = drawing(sizes[s][0], sizes[s][1], gray), back;
            uint8_t *data;
            size_t size;
            CHECK_INT(spm_image_encode_png(ctx, &image, &data, &size, NULL), SPM_OK);
            CHECK_INT(data[25], gray ? 0 : 2);
            if (s == 3) CHECK(size < (gray ? 16000u : 46000u)); /* 3 bits of noise a byte, of 8; zlib: 14278, 42539 */
            CHECK_INT(spm_image_decode(ctx, "back.png", data, size, NULL, &back, NULL), SPM_OK);
            CHECK(back.width == image.width && back.height == image.height
                  && memcmp(back.pixels, image.pixels, (size_t)back.width * (size_t)back.height * 3) == 0);
            spm_free(ctx, data);
            spm_image_free(ctx, &back);
            spm_image_free(ctx, &image);
        }
    }
}

static void failing_allocations(void)
{
    static file f;
    spm_image image = drawing(40, 30, 0);
    int what;
    build(&f, 20, 13, 8, 6, 1, 50);
    for (what = 0; what < 5; what++) {
        long fail_at;
        int done = 0;
        for (fail_at = 1; !done && fail_at < 100; fail_at++) {
            failing m;
            spm_context *tight = meter_context(&m);
            spm_error err = SPM_ZERO;
            spm_image out;
            uint8_t *data;
            size_t size;
            spm_status status;
            memset(&out, 0, sizeof out);
            data = NULL;
            m.fail_at = fail_at;
            switch (what) {
            case 0: status = spm_image_decode(tight, "x", f.data, f.size, NULL, &out, &err); break;
            case 1: status = spm_image_encode_png(tight, &image, &data, &size, &err); break;
            case 2: status = spm_image_resize(tight, &image, 17, 50, SPM_FILTER_LANCZOS, &out, &err); break;
            case 3: status = spm_image_encode_ppm(tight, &image, &data, &size, &err); break;
            /* no zlib data at all */
            default: status = spm_inflate(tight, f.data, f.size, 1, 0, &data, &size, &err); break;
            }
            done = m.calls < fail_at;
            if (!done) CHECK(status == SPM_E_MEMORY && strstr(err.text, "memory"));
            else if (what < 4) CHECK_INT(status, SPM_OK);
            spm_image_free(tight, &out);
            spm_free(tight, data);
            CHECK_INT(m.live, 0);
            spm_context_destroy(tight);
        }
        CHECK(done && fail_at > 2);
    }
    spm_image_free(ctx, &image);
}

/* ---- PPM, other formats ---- */

static const char *decode_text(const char *text, size_t size, uint8_t *rgb, int *w, int *h)
{
    static spm_error err;
    spm_image image;
    memset(&err, 0, sizeof err);
    if (spm_image_decode(ctx, "t", text, size, NULL, &image, &err) == SPM_OK && rgb) {
        *w = image.width;
        *h = image.height;
        memcpy(rgb, image.pixels, (size_t)*w * (size_t)*h * 3);
    }
    spm_image_free(ctx, &image);
    return err.text;
}

#define TEXT(s) s, sizeof s - 1
static void ppm_pictures(void)
{
    uint8_t rgb[300];
    int w = 0, h = 0;
    uint8_t *data;
    size_t size;
    spm_image image = drawing(7, 5, 0), back;
    CHECK_STR(decode_text(TEXT("P6\n2 1\n255\nabcdef"), rgb, &w, &h), "");
    CHECK(w == 2 && h == 1 && memcmp(rgb, "abcdef", 6) == 0);
    CHECK_STR(decode_text(TEXT("P5 # gray\n2\t2 255 AbCd"), rgb, &w, &h), "");
    CHECK(w == 2 && h == 2 && memcmp(rgb, "AAAbbbCCCddd", 12) == 0);
    CHECK_STR(decode_text(TEXT("P2\n# a comment\n3 1\n15\n0 7\n15"), rgb, &w, &h), "");
    CHECK(rgb[0] == 0 && rgb[3] == 119 && rgb[8] == 255);
    CHECK_STR(decode_text(TEXT("P3 1 1 255 1 2 3"), rgb, &w, &h), "");
    CHECK(rgb[0] == 1 && rgb[1] == 2 && rgb[2] == 3);
    CHECK_STR(decode_text(TEXT("P6 1 1 65535\n\x12\x34\xff\xff\x00\x80"), rgb, &w, &h), "");
    CHECK(rgb[0] == 18 && rgb[1] == 255 && rgb[2] == 0);
    CHECK_STR(decode_text(TEXT("P2 4 1 2 0 1 2 1"), rgb, &w, &h), "");
    CHECK(rgb[3] == 128 && rgb[6] == 255); /* 127.5 goes to the even side */
    CHECK(strstr(decode_text(TEXT("P6 2 2 255\nabcdef"), NULL, NULL, NULL), "cut off"));
    CHECK(strstr(decode_text(TEXT("P3 1 1 255 1 2"), NULL, NULL, NULL), "cut off"));
    CHECK(strstr(decode_text(TEXT("P3 1 1 255 1 2 256"), NULL, NULL, NULL), "not a number from 0 to 255"));
    CHECK(strstr(decode_text(TEXT("P6 2 x 255\nabcdef"), NULL, NULL, NULL), "header"));
    CHECK(strstr(decode_text(TEXT("P6 2 2 70000\nabcdef"), NULL, NULL, NULL), "header"));
    CHECK(strstr(decode_text(TEXT("P6 65500 65500 255\nabcdef"), NULL, NULL, NULL), "cap"));
    CHECK(strstr(decode_text(TEXT("P6 999999999999 1 255\nabcdef"), NULL, NULL, NULL), "header"));
    CHECK_STR(decode_text(TEXT("P1\n3#\n 1 01 1"), rgb, &w, &h), ""); /* a comment does not end a number */
    CHECK(w == 3 && h == 1 && rgb[0] == 255 && rgb[3] == 0 && rgb[6] == 0);
    CHECK_STR(decode_text(TEXT("P4 3 2\n\x5f\xa0"), rgb, &w, &h), "");
    CHECK(w == 3 && h == 2 && rgb[0] == 255 && rgb[3] == 0 && rgb[6] == 255 && rgb[9] == 0 && rgb[12] == 255 && !rgb[15]);
    CHECK(strstr(decode_text(TEXT("P4 9 2\nabc"), NULL, NULL, NULL), "cut off"));
    CHECK(strstr(decode_text(TEXT("P1 2 1 12"), NULL, NULL, NULL), "not a number from 0 to 1"));
    CHECK_STR(decode_text(TEXT("P1 2 1 10 1 #x\n"), NULL, NULL, NULL), "");
    CHECK(strstr(decode_text(TEXT("P1 2 1 10 8"), NULL, NULL, NULL), "is no pixel"));
    CHECK_INT(spm_image_encode_ppm(ctx, &image, &data, &size, NULL), SPM_OK);
    CHECK_INT(spm_image_decode(ctx, "t", data, size, NULL, &back, NULL), SPM_OK);
    CHECK(back.width == 7 && back.height == 5 && memcmp(back.pixels, image.pixels, 7 * 5 * 3) == 0);
    spm_free(ctx, data);
    spm_image_free(ctx, &back);
    CHECK_INT(spm_image_encode_pgm(ctx, &image, &data, &size, NULL), SPM_OK);
    CHECK(size == 11 + 35 && memcmp(data, "P5\n7 5\n255\n", 11) == 0);
    CHECK_INT(spm_image_decode(ctx, "t", data, size, NULL, &back, NULL), SPM_OK);
    for (w = 0; w < 35; w++) {
        const uint8_t *p = image.pixels + 3 * w;
        h = (19595 * p[0] + 38470 * p[1] + 7471 * p[2] + 32768) >> 16;
        CHECK(back.pixels[3 * w] == h && back.pixels[3 * w + 1] == h && back.pixels[3 * w + 2] == h);
    }
    spm_free(ctx, data);
    spm_image_free(ctx, &back);
    spm_image_free(ctx, &image);
}

static void other_formats(void)
{
    int w, h;
    spm_error err = SPM_ZERO;
    spm_image image;
    CHECK(strstr(decode_text(TEXT("GIF89a\x05\0\x04\0xxxx"), NULL, NULL, NULL), "t: GIF pictures are not read"));
    CHECK(strstr(decode_text(TEXT("BMxxxxxxxx"), NULL, NULL, NULL), "BMP"));
    CHECK(strstr(decode_text(TEXT("RIFFxxxxWEBPVP8 "), NULL, NULL, NULL), "WebP"));
    CHECK(strstr(decode_text(TEXT("<html>not found</html>"), NULL, NULL, NULL), "JPEG, PNG, PPM, PGM and PBM"));
    CHECK(strstr(decode_text(TEXT(""), NULL, NULL, NULL), "empty"));
    CHECK_INT(spm_image_probe("GIF89a\x05\0\x04\0", 10, &w, &h), SPM_IMAGE_GIF);
    CHECK(w == 5 && h == 4);
    CHECK_INT(spm_image_probe("BM", 2, NULL, NULL), SPM_IMAGE_BMP);
    CHECK_INT(spm_image_probe("P6 31 4 255\n", 12, &w, &h), SPM_IMAGE_PPM);
    CHECK(w == 31 && h == 4);
    CHECK_INT(spm_image_probe("", 0, &w, &h), SPM_IMAGE_UNKNOWN);
    CHECK_INT(spm_image_load(ctx, "/nonexistent/x.png", NULL, &image, &err), SPM_E_IO);
    CHECK(!image.pixels && strstr(err.text, "/nonexistent/x.png"));
}

/* ---- golden/verdicts.bin: PNG, JPEG and netpbm files, odd and damaged, whole and cut at every byte ---- */

static void verdicts_of_pillow(void)
{
    static uint8_t golden[1 << 17];
    FILE *file = fopen("tests/golden/verdicts.bin", "rb");
    size_t size = file ? fread(golden, 1, sizeof golden, file) : 0, at = 0;
    int files = 0, cuts = 0, accepted = 0, wrong = 0;
    if (file) fclose(file);
    CHECK(size > 40000 && size < sizeof golden);
    while (at + 2 <= size) {
        const size_t n = (size_t)golden[at] | (size_t)golden[at + 1] << 8;
        const uint8_t *data = golden + at + 2, *crc = data + n, *bits = crc + 4;
        size_t cut;
        if (at + 6 + n + (n + 8) / 8 > size) break;
        for (cut = 0; cut <= n; cut++, cuts++) {
            uint8_t *exact = (uint8_t *)malloc(cut + !cut); /* so that a sanitizer sees reads behind the end */
            spm_image image;
            spm_error err = SPM_ZERO;
            const uint8_t *p = crc;
            if (cut) memcpy(exact, data, cut);
            spm_image_decode(ctx, "picture", exact, cut, NULL, &image, &err);
            free(exact);
            if ((image.pixels != NULL) != (bits[cut / 8] >> cut % 8 & 1)) {
                printf("    file %d, %d of %d bytes: Pillow decides otherwise (%s)\n", files, (int)cut, (int)n, err.text);
                wrong++;
            }
            accepted += image.pixels != NULL;
            if (cut == n && (p[0] | p[1] | p[2] | p[3])) {
                const uint32_t sum = crc_of(image.pixels, (size_t)image.width * (size_t)image.height * 3);
                wrong += sum != ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
            }
            spm_image_free(ctx, &image);
        }
        at += 6 + n + (n + 8) / 8;
        files++;
    }
    CHECK_INT(wrong, 0);
    CHECK_INT(at, size);
    CHECK_INT(files, 190);
    CHECK(cuts > 30000 && accepted > 1000);
}

/* The file above is what Pillow says: run again where there is a Python with Pillow 9.4. */
static void verdicts_are_pillows(void)
{
    const int code = system("python3 tests/golden/make_verdicts.py check tests/golden/verdicts.bin >/dev/null 2>&1"
                            " || /usr/bin/python3 tests/golden/make_verdicts.py check tests/golden/verdicts.bin"
                            " >/dev/null 2>&1");
    if (code == 2 || code == 2 << 8 || code == 127 << 8) SKIP("Pillow's verdicts made again: no Python with Pillow 9.4");
    CHECK_INT(code, 0);
}

/* ---- conformance: expected.tsv says what Pillow 9.4 makes of each file ---- */

static void png_conformance(void)
{
    const char *folder = getenv("SPURMEM_TEST_DATA");
    char path[600], line[1000];
    FILE *list;
    int matched = 0, gray16 = 0, refused = 0;
    if (!folder || !*folder) SKIP("PNG conformance: SPURMEM_TEST_DATA is not set");
    snprintf(path, sizeof path, "%s/codec/expected.tsv", folder);
    list = fopen(path, "r");
    if (!list) SKIP("PNG conformance: codec/expected.tsv is not there");
    while (fgets(line, sizeof line, list)) {
        char name[300], origin[40], verdict_text[20], format[20], mode[20], hash[80], hex[65];
        long bytes, w, h;
        spm_image image;
        spm_error err = SPM_ZERO;
        if (sscanf(line, "%299[^\t]\t%39[^\t]\t%ld\t%19[^\t]\t%19[^\t]\t%19[^\t]\t%ld\t%ld\t%79[^\t\n]", name,
                   origin, &bytes, verdict_text,
                   format, mode, &w, &h, hash) != 9) continue;
        if (strcmp(format, "PNG") != 0 && !strstr(name, ".png")) continue;
        snprintf(path, sizeof path, "%s/codec/%s", folder, name);
        spm_image_load(ctx, path, NULL, &image, &err);
        if (strcmp(verdict_text, "ok") != 0) {
            if (err.status == SPM_OK) CHECK_MSG(0, name);
            CHECK(strstr(err.text, name) != NULL);
            refused++;
        }
        else if (!image.pixels || image.width != w || image.height != h) CHECK_MSG(0, err.text[0] ? err.text : name);
        else if (strcmp(mode, "I") == 0) gray16++; /* 16-bit gray: Pillow clips at 255, here the high byte is kept */
        else {
            sha256_hex(image.pixels, (size_t)w * (size_t)h * 3, hex);
            if (strcmp(hex, hash) != 0) CHECK_MSG(0, name);
            matched++;
        }
        spm_image_free(ctx, &image);
    }
    fclose(list);
    CHECK_INT(matched, 221);
    CHECK_INT(gray16, 12);
    CHECK_INT(refused, 20);
}

int main(void)
{
    ctx = spm_context_create(NULL);
    TEST(deflate_round_trips);
    TEST(inflate_known_streams);
    TEST(inflate_refuses_damage);
    TEST(inflate_bomb);
    TEST(png_of_every_kind);
    TEST(png_damage);
    TEST(png_bombs);
    TEST(png_encodes);
    TEST(failing_allocations);
    TEST(ppm_pictures);
    TEST(other_formats);
    TEST(verdicts_of_pillow);
    TEST(verdicts_are_pillows);
    TEST(png_conformance);
    spm_context_destroy(ctx);
    return TEST_END;
}
