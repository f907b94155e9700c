/* fuzz_idx.c - any bytes as an idx file (plain or gzip) and as a npy file. */
#include "fuzz.h"

static void look(spm_context *ctx, spm_status status, spm_array *array, const spm_error *err, size_t size)
{
    const uint8_t *bytes = (const uint8_t *)array->data;
    size_t i, n = 0, total;
    int axis;
    int64_t count = 1;
    if (status) {
        if (!err->text[0] || array->data) abort();
        return;
    }
    for (axis = 0; axis < array->rank; axis++) count *= array->shape[axis];
    if (count != array->count || array->dtype == SPM_DTYPE_NONE) abort();
    total = (size_t)array->count * (array->dtype == SPM_F64 || array->dtype == SPM_I64 ? 8u : 1u);
    if ((uint64_t)array->count > (uint64_t)size * 1040) abort();
    for (i = 0; i < total; i++) n += bytes[i];
    if (n == (size_t)-1) abort();
    spm_array_free(ctx, array);
}

FUZZ_BODY(ctx, data, size)
{
    spm_error err = SPM_ZERO;
    spm_array array;
    spm_status status = spm_idx_parse(ctx, "fuzz-idx3-ubyte", data, size, &array, &err);
    look(ctx, status, &array, &err, size);
    memset(&err, 0, sizeof err);
    status = spm_npy_parse(ctx, "fuzz.npy", data, size, &array, &err);
    look(ctx, status, &array, &err, size);
}
