/* fuzz_jpeg.c - any bytes as a JPEG: whole, with allow_truncated, turned and scaled.  The scale comes from the size of
 * the input, so that a corpus is a folder of plain JPEG files.  What decodes must survive an encode and a decode, and
 * plain C must give the same pixels as the machine's best instruction set. */
#include "fuzz.h"

static spm_status decode(spm_context *ctx, const uint8_t *data, size_t size, int lenient, spm_image *image)
{
    static const int scales[4] = { 1, 2, 4, 8 };
    spm_decode_desc desc = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_status status;
    int width, height;
    desc.max_bytes = 1u << 20;
    desc.allow_truncated = desc.apply_exif = lenient;
    desc.scale = lenient ? scales[size % 4] : 0;
    status = spm_image_decode(ctx, "fuzz", data, size, &desc, image, &err);
    if (status) {
        if (!err.text[0] || image->pixels || image->width) abort();
        return status;
    }
    if (spm_image_probe(data, size, &width, &height) != SPM_IMAGE_JPEG) return status;
    if (!lenient && (image->width != width || image->height != height)) abort();
    if ((size_t)image->width * (size_t)image->height * 3 > desc.max_bytes) abort();
    return status;
}

FUZZ_BODY(ctx, data, size)
{
    int lenient;
    if (spm_image_probe(data, size, NULL, NULL) == SPM_IMAGE_PNG) return; /* fuzz_png.c */
    for (lenient = 0; lenient < 2; lenient++) {
        const spm_isa best = ctx->isa;
        spm_image image, again;
        spm_error err = SPM_ZERO;
        size_t pixels, encoded_size;
        uint8_t *encoded;
        if (decode(ctx, data, size, lenient, &image)) continue;
        pixels = (size_t)image.width * (size_t)image.height;
        ctx->isa = SPM_ISA_C;
        if (decode(ctx, data, size, lenient, &again)) abort();
        ctx->isa = best;
        if (memcmp(image.pixels, again.pixels, pixels * 3) != 0) abort();
        spm_image_free(ctx, &again);
        if (pixels <= 4096) {
            const int quality = (int)(size % 100) + 1;
            if (spm_image_encode_jpeg(ctx, &image, quality, lenient, &encoded, &encoded_size, &err)) abort();
            if (spm_image_decode(ctx, "back", encoded, encoded_size, NULL, &again, &err)) abort();
            if (again.width != image.width || again.height != image.height) abort();
            spm_image_free(ctx, &again);
            spm_free(ctx, encoded);
        }
        spm_image_free(ctx, &image);
    }
}
