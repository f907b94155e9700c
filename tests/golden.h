/* golden.h - what tests that compare with PyTorch share: the hash that their scripts use too, and reading little-endian files. */
#ifndef SPURMEM_GOLDEN_H
#define SPURMEM_GOLDEN_H
#include <stdint.h>

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
#endif
