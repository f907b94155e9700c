/* fuzz_safetensors.c - any bytes as a safetensors file. */
#include "fuzz_archive.h"

FUZZ_BODY(ctx, data, size)
{
    fuzz_archive(ctx, data, size, "safetensors");
}
