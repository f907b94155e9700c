/* sha256.h - SHA-256 (FIPS 180-4) for tests that compare against hashes made elsewhere. */
#ifndef SPURMEM_TEST_SHA256_H
#define SPURMEM_TEST_SHA256_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct sha256_state {
    uint32_t h[8];
    uint8_t block[64];
    uint64_t bytes;
} sha256_state;

static inline uint32_t sha256_rotate(uint32_t x, int n)
{
    return (x >> n) | (x << (32 - n));
}

static inline void sha256_block(uint32_t *h, const uint8_t *p)
{
    static const uint32_t k[64] = {
        0x428a2f98u, 0x71374491u, 0xb5c0fbcfu, 0xe9b5dba5u, 0x3956c25bu, 0x59f111f1u, 0x923f82a4u, 0xab1c5ed5u,
        0xd807aa98u, 0x12835b01u, 0x243185beu, 0x550c7dc3u, 0x72be5d74u, 0x80deb1feu, 0x9bdc06a7u, 0xc19bf174u,
        0xe49b69c1u, 0xefbe4786u, 0x0fc19dc6u, 0x240ca1ccu, 0x2de92c6fu, 0x4a7484aau, 0x5cb0a9dcu, 0x76f988dau,
        0x983e5152u, 0xa831c66du, 0xb00327c8u, 0xbf597fc7u, 0xc6e00bf3u, 0xd5a79147u, 0x06ca6351u, 0x14292967u,
        0x27b70a85u, 0x2e1b2138u, 0x4d2c6dfcu, 0x53380d13u, 0x650a7354u, 0x766a0abbu, 0x81c2c92eu, 0x92722c85u,
        0xa2bfe8a1u, 0xa81a664bu, 0xc24b8b70u, 0xc76c51a3u, 0xd192e819u, 0xd6990624u, 0xf40e3585u, 0x106aa070u,
        0x19a4c116u, 0x1e376c08u, 0x2748774cu, 0x34b0bcb5u, 0x391c0cb3u, 0x4ed8aa4au, 0x5b9cca4fu, 0x682e6ff3u,
        0x748f82eeu, 0x78a5636fu, 0x84c87814u, 0x8cc70208u, 0x90befffau, 0xa4506cebu, 0xbef9a3f7u, 0xc67178f2u
    };
    uint32_t w[64], s[8];
    int i;
    for (i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (sha256_rotate(a, 7) ^ sha256_rotate(a, 18) ^ (a >> 3))
             + (sha256_rotate(b, 17) ^ sha256_rotate(b, 19) ^ (b >> 10));
    }
    memcpy(s, h, sizeof s);
    for (i = 0; i < 64; i++) {
        uint32_t e = s[4], a = s[0];
        uint32_t t1 = s[7] + (sha256_rotate(e, 6) ^ sha256_rotate(e, 11) ^ sha256_rotate(e, 25))
                    + ((e & s[5]) ^ (~e & s[6])) + k[i] + w[i];
        uint32_t t2 = (sha256_rotate(a, 2) ^ sha256_rotate(a, 13) ^ sha256_rotate(a, 22))
                    + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        s[7] = s[6]; s[6] = s[5]; s[5] = s[4]; s[4] = s[3] + t1;
        s[3] = s[2]; s[2] = s[1]; s[1] = s[0]; s[0] = t1 + t2;
    }
    for (i = 0; i < 8; i++) h[i] += s[i];
}

static inline void sha256_begin(sha256_state *state)
{
    static const uint32_t start[8] = {
        0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au, 0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u
    };
    memcpy(state->h, start, sizeof start);
    state->bytes = 0;
}

static inline void sha256_add(sha256_state *state, const void *data, size_t size)
{
    const uint8_t *p = (const uint8_t *)data;
    size_t held = (size_t)(state->bytes & 63);
    state->bytes += size;
    if (held) {
        size_t part = 64 - held < size ? 64 - held : size;
        memcpy(state->block + held, p, part);
        p += part;
        size -= part;
        if (held + part < 64) return;
        sha256_block(state->h, state->block);
    }
    for (; size >= 64; p += 64, size -= 64) sha256_block(state->h, p);
    if (size) memcpy(state->block, p, size);
}

/* Writes 64 hexadecimal digits and a terminator. */
static inline void sha256_end(sha256_state *state, char *hex)
{
    uint64_t bits = state->bytes * 8;
    uint8_t tail[72] = {0x80};
    size_t held = (size_t)(state->bytes & 63), pad = held < 56 ? 56 - held : 120 - held;
    int i;
    for (i = 0; i < 8; i++) tail[pad + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_add(state, tail, pad + 8);
    for (i = 0; i < 32; i++) {
        int byte = (int)((state->h[i / 4] >> (24 - 8 * (i % 4))) & 255u);
        hex[2 * i] = "0123456789abcdef"[byte >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[byte & 15];
    }
    hex[64] = 0;
}

/* The hash of one block of memory. */
static inline void sha256_hex(const void *data, size_t size, char *hex)
{
    sha256_state state;
    sha256_begin(&state);
    sha256_add(&state, data, size);
    sha256_end(&state, hex);
}
#endif
