/* fuzz_tar.c - any bytes as a tar file; every entry is found and read. */
#include "fuzz.h"

FUZZ_BODY(ctx, data, size)
{
    spm_error err = SPM_ZERO;
    spm_tar *tar = spm_tar_open_memory(ctx, "fuzz.tar", data, size, &err);
    int64_t i;
    if (!tar) {
        if (!err.text[0]) abort();
        return;
    }
    for (i = 0; i < spm_tar_count(tar); i++) {
        uint8_t *bytes = NULL;
        size_t bytes_size = 0;
        if (spm_tar_find(tar, spm_tar_name(tar, i)) < i) abort();
        if (spm_tar_read(tar, i, &bytes, &bytes_size, &err) || bytes_size != spm_tar_size(tar, i)
            || bytes[bytes_size]) abort();
        spm_free(ctx, bytes);
    }
    spm_tar_close(tar);
}
