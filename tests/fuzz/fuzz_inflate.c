/* fuzz_inflate.c - any bytes as bare, zlib and gzip data under a cap, into growing and into exact memory; and the same
 * bytes packed (in one of the three, by their number) and unpacked again. */
#include "fuzz.h"

FUZZ_BODY(ctx, data, size)
{
    int wrapper;
    for (wrapper = 0; wrapper < 3; wrapper++) {
        spm_error err = SPM_ZERO;
        uint8_t *out, *again;
        size_t out_size, again_size;
        if (spm_inflate(ctx, data, size, wrapper, 3u << 20, &out, &out_size, &err) == SPM_OK) {
            if (!out || out_size > 3u << 20) abort();
            if (out_size) { /* a cap of exactly that size holds it, one byte less does not */
                if (spm_inflate(ctx, data, size, wrapper, out_size, &again, &again_size, &err) != SPM_OK) abort();
                if (again_size != out_size || memcmp(out, again, out_size) != 0) abort();
                spm_free(ctx, again);
            }
            if (out_size > 1) {
                if (spm_inflate(ctx, data, size, wrapper, out_size - 1, &again, &again_size, &err) == SPM_OK) abort();
            }
            spm_free(ctx, out);
        }
        else if (!err.text[0] || out) abort();
        if ((size_t)wrapper != size % 3) continue;
        memset(&err, 0, sizeof err);
        if (spm_deflate(ctx, data, size, wrapper, &out, &out_size, &err) != SPM_OK) abort();
        if (spm_inflate(ctx, out, out_size, wrapper, size + 1, &again, &again_size, &err) != SPM_OK) abort();
        if (again_size != size || (size && memcmp(again, data, size) != 0)) abort();
        spm_free(ctx, out);
        spm_free(ctx, again);
    }
}
