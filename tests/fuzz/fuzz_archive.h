/* fuzz_archive.h - what every archive harness does with an archive that opened: all tensors are found by name, lie in
 * the file, and are read both ways. */
#ifndef SPURMEM_FUZZ_ARCHIVE_H
#define SPURMEM_FUZZ_ARCHIVE_H
#include "fuzz.h"

static void fuzz_archive(spm_context *ctx, const uint8_t *data, size_t size, const char *only)
{
    spm_error err = SPM_ZERO;
    spm_archive *archive = spm_archive_open_memory(ctx, "fuzz", data, size, &err);
    size_t budget = 8 * size + (4u << 20); /* many tensors may be views of one storage: not all are worth the time */
    int64_t i;
    if (!archive) {
        if (!err.text[0] || !err.status) abort();
        return;
    }
    if (err.status || strcmp(spm_archive_format(archive), only)) {
        if (err.status) abort();
        spm_archive_close(archive);
        return;
    }
    (void)spm_archive_metadata(archive, "format");
    for (i = 0; i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *tensor = spm_archive_tensor_at(archive, i);
        const size_t most = size + (2u << 20);
        float *floats;
        int64_t *integers, last = 0;
        int axis;
        spm_error read = SPM_ZERO;
        if (spm_archive_find(archive, tensor->name) != tensor || tensor->count < 0 || (uint64_t)tensor->count > most)
            abort();
        for (axis = 0; axis < tensor->rank && tensor->count; axis++)
            last += (tensor->shape[axis] - 1) * tensor->stride[axis];
        if (tensor->offset > size || (tensor->count && (uint64_t)last >= size - tensor->offset)) abort();
        if ((size_t)tensor->count > budget) continue;
        budget -= (size_t)tensor->count;
        floats = (float *)malloc((size_t)tensor->count * sizeof *floats + 1);
        integers = (int64_t *)malloc((size_t)tensor->count * sizeof *integers + 1);
        if (floats && integers) {
            if (spm_archive_read_f32(archive, tensor, floats, &read) && !read.text[0]) abort();
            (void)spm_archive_read_i64(archive, tensor, integers, &read);
        }
        free(floats);
        free(integers);
    }
    spm_archive_close(archive);
}
#endif
