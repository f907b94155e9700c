/* test_resize.c - resize against Pillow's numbers (golden hashes, and with SPURMEM_TEST_DATA the conformance set), the
 * same bits from every instruction set, crop, flip, creation and their errors. */
#include "test.h"
#include "sha256.h"
#include "../spurmem.h"

static spm_context *ctx;

static uint64_t fnv(const uint8_t *p, size_t n)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    while (n--) h = (h ^ *p++) * UINT64_C(0x100000001b3);
    return h;
}

static size_t bytes_of(const spm_image *image)
{
    return (size_t)image->width * (size_t)image->height * 3;
}

/* The picture of golden/make_resize.py. */
static spm_image pattern(int number, int w, int h)
{
    spm_image image;
    int x, y, c;
    CHECK_INT(spm_image_create(ctx, w, h, &image, NULL), SPM_OK);
    for (y = 0; y < h; y++) {
        for (x = 0; x < w; x++) {
            for (c = 0; c < 3; c++) {
                int ramp = (number * 37 + x * 7 + y * 13 + c * 50 + x * y) & 255;
                image.pixels[(y * w + x) * 3 + c] = (uint8_t)((x / 3 + y / 2 + c) % 4 == 0 ? 255 * (x & 1) : ramp);
            }
        }
    }
    return image;
}

/* A context of one instruction set, or NULL where the machine lacks it. */
static spm_context *context_of(int isa)
{
    spm_context_desc desc = SPM_ZERO;
    desc.threads = 1;
    desc.isa = (spm_isa)isa;
    return spm_context_create(&desc);
}

static void golden_numbers(void)
{
    static const struct { int w, h, to_w, to_h, filter; uint64_t hash; } cases[] = {
#include "golden/resize.inc"
    };
    static const uint8_t pixels[] = {
#include "golden/resize_pixels.inc"
    };
    spm_image image, out;
    int isa, i, number = -1;
    for (isa = SPM_ISA_C; isa <= SPM_ISA_AVX512; isa++) {
        spm_context *one = context_of(isa);
        if (!one) continue;
        for (i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
            char text[100];
            number = i / 5;
            image = pattern(number, cases[i].w, cases[i].h);
            spm_image_resize(one, &image, cases[i].to_w, cases[i].to_h, (spm_filter)cases[i].filter, &out, NULL);
            CHECK(out.width == cases[i].to_w && out.height == cases[i].to_h);
            snprintf(text, sizeof text, "%s: %d x %d to %d x %d by filter %d", spm_isa_name((spm_isa)isa), cases[i].w,
                     cases[i].h, cases[i].to_w, cases[i].to_h, cases[i].filter);
            CHECK_MSG(fnv(out.pixels, bytes_of(&out)) == cases[i].hash, text);
            spm_image_free(one, &out);
            spm_image_free(ctx, &image);
        }
        spm_context_destroy(one);
    }
    CHECK_INT(number, 18);
    image = pattern(0, 9, 8);
    CHECK_INT(spm_image_resize(ctx, &image, 5, 4, SPM_FILTER_BICUBIC, &out, NULL), SPM_OK);
    for (i = 0; i < 60; i++) CHECK_INT(out.pixels[i], pixels[i]);
    spm_image_free(ctx, &out);
    spm_image_free(ctx, &image);
}

/* Every instruction set against plain C at odd sizes; the input lies at the very end of its memory (for ASan). */
static void instruction_sets_agree(void)
{
    spm_context *plain = context_of(SPM_ISA_C);
    int isa, round;
    for (isa = SPM_ISA_NEON; isa <= SPM_ISA_AVX512; isa++) {
        spm_context *one = context_of(isa);
        if (!one) continue;
        for (round = 0; round < 300; round++) {
            int size[4], k, most = round % 3 == 0 ? 8 : round % 3 == 1 ? 40 : 200;
            spm_image image, a, b;
            size_t i;
            for (k = 0; k < 4; k++) {
                size[k] = 1 + (int)spm_random_below(1, (uint64_t)round, (uint64_t)k, (uint32_t)most);
            }
            image.width = size[0];
            image.height = size[1];
            image.pixels = (uint8_t *)malloc(bytes_of(&image));
            for (i = 0; i < bytes_of(&image); i++) image.pixels[i] = (uint8_t)spm_random_u32(2, (uint64_t)round, i);
            CHECK_INT(spm_image_resize(plain, &image, size[2], size[3], (spm_filter)(round % 5), &a, NULL), SPM_OK);
            CHECK_INT(spm_image_resize(one, &image, size[2], size[3], (spm_filter)(round % 5), &b, NULL), SPM_OK);
            CHECK(memcmp(a.pixels, b.pixels, bytes_of(&a)) == 0);
            spm_image_free(plain, &a);
            spm_image_free(one, &b);
            free(image.pixels);
        }
        spm_context_destroy(one);
    }
    spm_context_destroy(plain);
}

static void plain_properties(void)
{
    spm_image image = pattern(3, 40, 30), out;
    int filter;
    size_t i;
    for (filter = 0; filter < 5; filter++) { /* the same size: the same picture */
        CHECK_INT(spm_image_resize(ctx, &image, 40, 30, (spm_filter)filter, &out, NULL), SPM_OK);
        CHECK(out.pixels != image.pixels && memcmp(out.pixels, image.pixels, bytes_of(&image)) == 0);
        spm_image_free(ctx, &out);
    }
    memset(image.pixels, 201, bytes_of(&image));
    for (filter = 0; filter < 5; filter++) { /* one colour stays that colour */
        CHECK_INT(spm_image_resize(ctx, &image, 7, 99, (spm_filter)filter, &out, NULL), SPM_OK);
        for (i = 0; i < bytes_of(&out); i++) if (out.pixels[i] != 201) break;
        CHECK(i == bytes_of(&out));
        spm_image_free(ctx, &out);
    }
    spm_image_free(ctx, &image);
}

static void crop_and_flip(void)
{
    spm_image image = pattern(1, 23, 17), cut, again;
    int x, y;
    spm_error err = SPM_ZERO;
    CHECK_INT(spm_image_crop(ctx, &image, 4, 5, 10, 12, &cut, &err), SPM_OK);
    CHECK(cut.width == 10 && cut.height == 12);
    for (y = 0; y < 12; y++) {
        for (x = 0; x < 10; x++) {
            CHECK(memcmp(cut.pixels + (y * 10 + x) * 3, image.pixels + ((y + 5) * 23 + x + 4) * 3, 3) == 0);
        }
    }
    CHECK_INT(spm_image_crop(ctx, &cut, 0, 0, 10, 12, &again, NULL), SPM_OK);
    spm_image_flip(&again);
    for (y = 0; y < 12; y++) {
        for (x = 0; x < 10; x++) {
            CHECK(memcmp(cut.pixels + (y * 10 + x) * 3, again.pixels + (y * 10 + 9 - x) * 3, 3) == 0);
        }
    }
    spm_image_flip(&again);
    CHECK(memcmp(cut.pixels, again.pixels, bytes_of(&cut)) == 0);
    spm_image_free(ctx, &again);
    CHECK_INT(spm_image_crop(ctx, &image, 22, 16, 1, 1, &again, NULL), SPM_OK);
    spm_image_flip(&again); /* a single column has nothing to swap */
    CHECK(memcmp(again.pixels, image.pixels + bytes_of(&image) - 3, 3) == 0);
    spm_image_free(ctx, &again);
    spm_image_free(ctx, &cut);
    CHECK_INT(spm_image_crop(ctx, &image, 14, 5, 10, 12, &cut, &err), SPM_E_ARGUMENT);
    CHECK_STR(err.text, "crop of 10 x 12 pixels at (14, 5) does not lie in the picture of 23 x 17");
    CHECK_INT(spm_image_crop(ctx, &image, -1, 5, 10, 12, &cut, &err), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_crop(ctx, &image, 1, 6, 10, 12, &cut, &err), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_crop(ctx, &image, 0, 0, 0, 12, &cut, &err), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_crop(ctx, &image, 2147483647, 0, 10, 12, &cut, &err), SPM_E_ARGUMENT);
    spm_image_free(ctx, &image);
}

/* Rotations and colour changes as torchvision makes them of Pillow pictures. */
static void rotated_and_adjusted(void)
{
    static const struct {
        int w, h, what;
        double factor;
        int filter, expand;
        double x, y;
        int fill;
        uint64_t hash;
    } cases[] = {
#include "golden/adjust.inc"
    };
    const int n = (int)(sizeof cases / sizeof cases[0]);
    spm_image image, out;
    spm_error err = SPM_ZERO;
    double far_away[2] = { 1e300, 0 }, none = 0;
    int i, number = -1;
    for (i = 0; i < n; i++) {
        const int f = cases[i].fill;
        const double center[2] = { cases[i].x, cases[i].y };
        const uint8_t fill[3] = { (uint8_t)f, (uint8_t)(f / 2), (uint8_t)(f / 3) };
        /* patterns are numbered within each kind; a rotation's three filters share one */
        number = i && cases[i].what == cases[i - 1].what ? number + 1 : 0;
        image = pattern(cases[i].what == 9 ? number / 3 : number, cases[i].w, cases[i].h);
        if (cases[i].what == 9) {
            CHECK_INT(spm_image_rotate(ctx, &image, cases[i].factor, (spm_filter)cases[i].filter, cases[i].expand,
                                       cases[i].x < 0 ? NULL : center, f ? fill : NULL, &out, NULL), SPM_OK);
            spm_image_free(ctx, &image);
            image = out;
        } else CHECK_INT(spm_image_adjust(ctx, &image, (spm_adjust)cases[i].what, cases[i].factor, NULL), SPM_OK);
        if (fnv(image.pixels, bytes_of(&image)) != cases[i].hash) CHECK_INT(i, -1);
        spm_image_free(ctx, &image);
    }
    image = pattern(0, 5, 4);
    CHECK_INT(spm_image_adjust(ctx, &image, SPM_ADJUST_HUE, .6, NULL), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_adjust(ctx, &image, SPM_ADJUST_CONTRAST, -.1, NULL), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_adjust(ctx, &image, SPM_ADJUST_BRIGHTNESS, none / none, &err), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_adjust(ctx, &image, (spm_adjust)4, 1, NULL), SPM_E_ARGUMENT);
    CHECK(err.text[0]);
    CHECK_INT(spm_image_rotate(ctx, &image, 3, SPM_FILTER_BOX, 0, NULL, NULL, &out, NULL), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_rotate(ctx, &image, none / none, SPM_FILTER_NEAREST, 0, NULL, NULL, &out, NULL),
              SPM_E_ARGUMENT);
    CHECK_INT(spm_image_rotate(ctx, &image, 3, SPM_FILTER_NEAREST, 0, far_away, NULL, &out, NULL), SPM_E_ARGUMENT);
    spm_image_free(ctx, &image);
}

static void errors(void)
{
    spm_image image = pattern(1, 5, 5), out;
    spm_error err = SPM_ZERO;
    size_t i;
    CHECK_INT(spm_image_resize(ctx, &image, 0, 5, SPM_FILTER_BOX, &out, &err), SPM_E_FORMAT);
    memset(&err, 0, sizeof err);
    CHECK_INT(spm_image_resize(ctx, &image, 60000, 60000, SPM_FILTER_BOX, &out, &err), SPM_E_UNSUPPORTED);
    CHECK(strstr(err.text, "60000 x 60000"));
    CHECK_INT(spm_image_resize(ctx, &image, 5, 6, (spm_filter)17, &out, &err), SPM_E_ARGUMENT);
    CHECK_INT(spm_image_create(ctx, -1, 5, &out, &err), SPM_E_FORMAT);
    CHECK(out.pixels == NULL && out.width == 0);
    CHECK_INT(spm_image_create(ctx, 3, 5, &out, &err), SPM_OK);
    for (i = 0; i < 45; i++) CHECK(out.pixels[i] == 0);
    spm_image_free(ctx, &out);
    spm_image_free(ctx, &out);
    spm_image_free(ctx, NULL);
    spm_image_free(ctx, &image);
}

/* expected_resize.tsv: torchvision's Resize((h, w)) and CenterCrop of photos. */
static void resize_conformance(void)
{
    const char *folder = getenv("SPURMEM_TEST_DATA");
    char path[600], line[600];
    FILE *list;
    int matched = 0;
    if (!folder || !*folder) SKIP("resize conformance: SPURMEM_TEST_DATA is not set");
    snprintf(path, sizeof path, "%s/codec/expected_resize.tsv", folder);
    list = fopen(path, "r");
    if (!list) SKIP("resize conformance: codec/expected_resize.tsv is not there");
    while (fgets(line, sizeof line, list)) {
        char name[300], hash[80], hex[65];
        int w, h, crop;
        spm_image image, resized, cut;
        spm_error err = SPM_ZERO;
        if (sscanf(line, "%299[^\t]\t%d\t%d\t%d\t%79[^\t\n]", name, &w, &h, &crop, hash) != 5) continue;
        snprintf(path, sizeof path, "%s/codec/%s", folder, name);
        if (spm_image_load(ctx, path, NULL, &image, &err) != SPM_OK) {
            CHECK_MSG(0, err.text);
            continue;
        }
        CHECK_INT(spm_image_resize(ctx, &image, w, h, SPM_FILTER_BILINEAR, &resized, &err), SPM_OK);
        CHECK_INT(spm_image_crop(ctx, &resized, (w - crop) / 2, (h - crop) / 2, crop, crop, &cut, &err), SPM_OK);
        sha256_hex(cut.pixels, bytes_of(&cut), hex);
        if (strcmp(hex, hash) != 0) CHECK_MSG(0, line);
        matched++;
        spm_image_free(ctx, &image);
        spm_image_free(ctx, &resized);
        spm_image_free(ctx, &cut);
    }
    fclose(list);
    CHECK(matched >= 40);
}

int main(void)
{
    ctx = spm_context_create(NULL);
    TEST(golden_numbers);
    TEST(instruction_sets_agree);
    TEST(plain_properties);
    TEST(crop_and_flip);
    TEST(rotated_and_adjusted);
    TEST(errors);
    TEST(resize_conformance);
    spm_context_destroy(ctx);
    return TEST_END;
}
