/* golden.h - what tests that compare with PyTorch share: the hash that their scripts use too, and reading little-endian files. */
#ifndef SPURMEM_GOLDEN_H
#define SPURMEM_GOLDEN_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../spurmem.h"

/* A stream by its name, and its number `index`, in [-1, 1): `draw` of golden/make_nets.py. */
static inline uint32_t golden_stream(const char *name)
{
    uint32_t seed = 2166136261u;
    for (; *name; name++) seed = (seed ^ (unsigned char)*name) * 16777619u;
    return seed;
}

static inline double golden_draw(uint32_t stream, uint32_t index)
{
    uint32_t x = index * 0x9E3779B1u + stream;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return (double)(x >> 8) / 8388608.0 - 1.0;
}

/* The file's 32-bit words, read from low byte to high; NULL if it is not there. */
static inline uint32_t *golden_read(const char *path, int *count)
{
    FILE *file = fopen(path, "rb");
    uint32_t *words;
    long size, i;
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    size = ftell(file) / 4;
    rewind(file);
    words = (uint32_t *)calloc((size_t)size + 1, 4);
    for (i = 0; words && i < size; i++) {
        unsigned char b[4];
        if (fread(b, 1, 4, file) != 4) break;
        words[i] = (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
    }
    fclose(file);
    *count = (int)size;
    return words;
}

static inline float golden_float(uint32_t word)
{
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* Two words, the lower first. */
static inline double golden_double(const uint32_t *words)
{
    const uint64_t bits = (uint64_t)words[1] << 32 | words[0];
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

/* PyTorch's index of element i of our OHWI weight (others: the same). */
static inline int64_t golden_index(const spm_tensor *t, int64_t i)
{
    int64_t o, h, w, c;
    if (t->rank != 4) return i;
    c = i % t->shape[3];
    i /= t->shape[3];
    w = i % t->shape[2];
    i /= t->shape[2];
    h = i % t->shape[1];
    o = i / t->shape[1];
    return ((o * t->shape[3] + c) * t->shape[1] + h) * t->shape[2] + w;
}

static inline int golden_ends_in(const char *name, const char *tail)
{
    const size_t n = strlen(name), m = strlen(tail);
    return n >= m && strcmp(name + n - m, tail) == 0;
}

/* 1 if an instruction set's turn comes: every one has it, or SPURMEM_ISA's alone. */
static inline int golden_isa(spm_isa isa)
{
    const char *only = getenv("SPURMEM_ISA");
    return !only || !*only || strcmp(only, spm_isa_name(isa)) == 0;
}

/* `fill` of make_nets.py */
static inline void golden_fill(spm_parameter *p)
{
    const uint32_t stream = golden_stream(p->name);
    int64_t i, n = spm_tensor_count(&p->value);
    double base = 0, scale = sqrt(4.0 / (double)(n / p->value.shape[0]));
    if (golden_ends_in(p->name, "running_var")) { base = 1; scale = 0.3; }
    else if (golden_ends_in(p->name, "running_mean") || golden_ends_in(p->name, "bias")) scale = 0.1;
    else if (strstr(p->name, "token") || strstr(p->name, "pos_embed")) scale = 0.5;
    else if (p->value.rank == 1) { base = 1; scale = 0.2; }
    for (i = 0; i < n; i++) p->value.data[i] = (float)(base + scale * golden_draw(stream, (uint32_t)golden_index(&p->value, i)));
}

/* `n` pictures drawn by name, NCHW there, NHWC here; free it. */
static inline float *golden_pictures(const char *name, int64_t n, int64_t height, int64_t width)
{
    const int64_t pixels = height * width;
    const uint32_t draws = golden_stream(name);
    float *image = (float *)malloc((size_t)(n * pixels * 3) * sizeof(float));
    int64_t i;
    for (i = 0; image && i < n * 3 * pixels; i++)
        image[(i / (3 * pixels) * pixels + i % pixels) * 3 + i / pixels % 3] = (float)golden_draw(draws, (uint32_t)i) * 1.5f;
    return image;
}
#endif
