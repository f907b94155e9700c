/* fuzz_torch_zip.c - any bytes as a zip file of torch.save.  The seeds say 0 for every CRC (which is not checked), so
 * that a changed pickle is still run. */
#include "fuzz_archive.h"

FUZZ_BODY(ctx, data, size)
{
    fuzz_archive(ctx, data, size, "torch zip");
}
