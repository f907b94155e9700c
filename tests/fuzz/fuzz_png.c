/* fuzz_png.c - any bytes as a PNG or PPM, whole and with allow_truncated, as they are and with every CRC mended (so
 * that mutations reach the code behind the checksums); what decodes must survive an encode and a second decode. */
#include "fuzz.h"

/* Writes the right CRC behind every chunk. */
static void mend(uint8_t *data, size_t size)
{
    size_t at = 8;
    while (size - at >= 12 && at < size) {
        size_t length = (size_t)data[at] << 24 | (size_t)data[at + 1] << 16 | (size_t)data[at + 2] << 8 | data[at + 3];
        uint32_t crc;
        int i;
        if (length > size - at - 12) break;
        crc = spmi_crc32(0, data + at + 4, length + 4);
        for (i = 0; i < 4; i++) data[at + 8 + length + (size_t)i] = (uint8_t)(crc >> (24 - 8 * i));
        at += length + 12;
    }
}

static void picture(spm_context *ctx, const uint8_t *data, size_t size, int allow_truncated)
{
    spm_decode_desc desc = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_image image, back;
    uint8_t *encoded;
    size_t encoded_size;
    int width, height;
    spm_image_format format = spm_image_probe(data, size, &width, &height);
    if (format == SPM_IMAGE_JPEG) return; /* fuzz_jpeg.c */
    desc.max_bytes = 4u << 20;
    desc.allow_truncated = allow_truncated;
    if (spm_image_decode(ctx, "fuzz", data, size, &desc, &image, &err) != SPM_OK) {
        if (!err.text[0] || image.pixels || image.width) abort();
        return;
    }
    if (image.width != width || image.height != height) abort();
    if ((size_t)width * (size_t)height <= 10000) {
        if (spm_image_encode_png(ctx, &image, &encoded, &encoded_size, &err) != SPM_OK) abort();
        if (spm_image_decode(ctx, "back", encoded, encoded_size, NULL, &back, &err) != SPM_OK) abort();
        if (memcmp(back.pixels, image.pixels, (size_t)width * (size_t)height * 3) != 0) abort();
        spm_image_free(ctx, &back);
        spm_free(ctx, encoded);
    }
    spm_image_free(ctx, &image);
}

FUZZ_BODY(ctx, data, size)
{
    uint8_t *copy = (uint8_t *)malloc(size + !size);
    if (!copy) return;
    picture(ctx, data, size, 0);
    picture(ctx, data, size, 1);
    if (size) memcpy(copy, data, size);
    if (size > 20) {
        mend(copy, size);
        picture(ctx, copy, size, 0);
        picture(ctx, copy, size, 1);
    }
    free(copy);
}
