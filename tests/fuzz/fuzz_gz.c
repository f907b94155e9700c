/* fuzz_gz.c - any bytes as a gzip file; and any bytes as deflate data behind a gzip header that the first byte shapes
 * (extra field, name, comment, header checksum), with the right trailer: where the data unpacks, the file must, and two
 * members in a row must give it twice; one wrong bit of the trailer is an error. */
#include "fuzz.h"

static size_t member(uint8_t *out, int flags, const uint8_t *data, size_t size, const uint8_t *plain, size_t plain_size)
{
    static const uint8_t head[10] = { 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3 };
    const uint32_t crc = spmi_crc32(0, plain, plain_size);
    size_t at = 10;
    int i;
    memcpy(out, head, 10);
    out[3] = (uint8_t)(flags & 31);
    if (flags & 4) {
        memcpy(out + at, "\3\0abc", 5);
        at += 5;
    }
    for (i = 8; i <= 16; i *= 2) {
        if (!(flags & i)) continue;
        memcpy(out + at, "name", 5);
        at += 5;
    }
    if (flags & 2) {
        memcpy(out + at, "hc", 2);
        at += 2;
    }
    if (size) memcpy(out + at, data, size);
    at += size;
    for (i = 0; i < 4; i++) out[at++] = (uint8_t)(crc >> (8 * i));
    for (i = 0; i < 4; i++) out[at++] = (uint8_t)((uint64_t)plain_size >> (8 * i));
    return at;
}

FUZZ_BODY(ctx, data, size)
{
    spm_error err = SPM_ZERO;
    uint8_t *plain, *out, *file;
    size_t plain_size, out_size, n, used;
    spmi_inflater *s;
    if (spm_inflate(ctx, data, size, 2, 2u << 20, &out, &out_size, &err) == SPM_OK) spm_free(ctx, out);
    else if (!err.text[0] || out) abort();
    memset(&err, 0, sizeof err);
    if (size < 2 || spm_inflate(ctx, data + 1, size - 1, 0, 1u << 20, &plain, &plain_size, &err)) return;
    s = (spmi_inflater *)calloc(1, sizeof *s); /* how many bytes the data takes: what follows would be a trailer */
    file = (uint8_t *)malloc(2 * size + 100);
    if (!s || !file) abort();
    s->in = data + 1;
    s->size = size - 1;
    s->out = (uint8_t *)malloc(plain_size + !plain_size);
    s->capacity = s->limit = plain_size;
    if (!s->out || spmi_inflate_stream(s, 0) || s->used != plain_size) abort();
    used = s->at;
    free(s->out);
    free(s);
    n = member(file, data[0], data + 1, used, plain, plain_size);
    if (spm_inflate(ctx, file, n, 2, 0, &out, &out_size, &err)) abort();
    if (out_size != plain_size || (plain_size && memcmp(out, plain, plain_size) != 0)) abort();
    spm_free(ctx, out);
    memcpy(file + n, file, n);
    if (spm_inflate(ctx, file, 2 * n, 2, 0, &out, &out_size, &err) || out_size != 2 * plain_size) abort();
    spm_free(ctx, out);
    file[n - 1 - data[0] % 8] ^= 1;
    if (spm_inflate(ctx, file, n, 2, 0, &out, &out_size, &err) == SPM_OK) abort();
    spm_free(ctx, plain);
    free(file);
}
