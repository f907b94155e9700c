/* fuzz_jpeg.c - the JPEG decoder against hostile files.
 *
 * clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_jpeg.c -lm -o fuzz_jpeg && ./fuzz_jpeg CORPUS
 * cc -g -DFUZZ_STANDALONE tests/fuzz/fuzz_jpeg.c -lm -o fuzz_jpeg && ./fuzz_jpeg FILE...     (replays files)
 *
 * The scale comes from the size of the input, so that a corpus is a folder of plain JPEG files.
 */
#define SPURMEM_IMPLEMENTATION
#include "../../spurmem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int scales[4] = {1, 2, 4, 8};
    spm_context *ctx = spm_context_create(NULL);
    int i;
    if (!ctx) return 0;
    for (i = 0; i < 2; i++) {
        spm_decode_desc desc = SPM_ZERO;
        spm_image image = SPM_ZERO;
        spm_error err = SPM_ZERO;
        int width, height;
        desc.max_bytes = (size_t)16 << 20;
        desc.allow_truncated = i;
        desc.apply_exif = i;
        desc.scale = i ? scales[size % 4] : 1;
        (void)spm_image_probe(data, size, &width, &height);
        if (spm_image_decode(ctx, "fuzz.jpg", data, size, &desc, &image, &err) == SPM_OK) {
            volatile uint8_t sink = 0;
            size_t n = (size_t)image.width * (size_t)image.height * 3, at;
            for (at = 0; at < n; at++) sink = (uint8_t)(sink ^ image.pixels[at]);
            spm_image_free(ctx, &image);
        }
    }
    spm_context_destroy(ctx);
    return 0;
}

#ifdef FUZZ_STANDALONE
int main(int argc, char **argv)
{
    spm_context *ctx = spm_context_create(NULL);
    int i;
    for (i = 1; i < argc && ctx; i++) {
        uint8_t *data = NULL;
        size_t size = 0;
        spm_error err = SPM_ZERO;
        if (spm_file_read(ctx, argv[i], &data, &size, &err) != SPM_OK) continue;
        LLVMFuzzerTestOneInput(data, size);
        spm_free(ctx, data);
    }
    spm_context_destroy(ctx);
    return 0;
}
#endif
