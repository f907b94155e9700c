/* fuzz_archive.c - any bytes as safetensors, torch zip or torch legacy file; every tensor is read both ways. */
#include "fuzz.h"

FUZZ_BODY(ctx, data, size)
{
    spm_error err = SPM_ZERO;
    spm_archive *archive = spm_archive_open_memory(ctx, "fuzz", data, size, &err);
    int64_t i;
    if (!archive) {
        if (!err.text[0]) abort();
        return;
    }
    (void)spm_archive_metadata(archive, "format");
    for (i = 0; i < spm_archive_count(archive) && i < 64; i++) {
        const spm_archive_tensor *tensor = spm_archive_tensor_at(archive, i);
        size_t most = size + (2u << 20);
        float *floats;
        int64_t *integers;
        spm_error read = SPM_ZERO;
        if (spm_archive_find(archive, tensor->name) != tensor || (uint64_t)tensor->count > most) abort();
        floats = (float *)malloc((size_t)tensor->count * sizeof *floats + 1);
        integers = (int64_t *)malloc((size_t)tensor->count * sizeof *integers + 1);
        if (floats && integers) {
            (void)spm_archive_read_f32(archive, tensor, floats, &read);
            (void)spm_archive_read_i64(archive, tensor, integers, &read);
        }
        free(floats);
        free(integers);
    }
    spm_archive_close(archive);
}
