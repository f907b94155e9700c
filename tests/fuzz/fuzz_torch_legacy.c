/* fuzz_torch_legacy.c - any bytes as a file of torch.save before 1.6. */
#include "fuzz_archive.h"

FUZZ_BODY(ctx, data, size)
{
    fuzz_archive(ctx, data, size, "torch legacy");
}
