/* tiny.h - a data set of a few 16 x 16 PNG pictures in the Waterbirds layout and a network that is small enough for it.
 *
 * The picture of example i: the class is a bright square in the left (0) or right (1) half; the place is the colour of the
 * ground, dull green (0) or blue (1); all of it under noise.  Include it behind spurmem.h and test.h. */
#ifndef SPURMEM_TEST_TINY_H
#define SPURMEM_TEST_TINY_H
#include <stdint.h>

#define TINY_SIZE 16
#define TINY_ARCH "resnet18:width=8,stem=cifar"

static char tiny_root[400]; /* a folder of this test's own */

static inline spm_context *tiny_context(int threads)
{
    spm_context_desc desc = SPM_ZERO;
    desc.threads = threads;
    return spm_context_create(&desc);
}

static inline void tiny_begin(const char *name)
{
    spm_context *ctx = tiny_context(1);
    test_folder(tiny_root, sizeof tiny_root, name);
    if (spm_directory_create(ctx, tiny_root, NULL)) printf("    %s cannot be made\n", tiny_root);
    spm_context_destroy(ctx);
}

/* The path of a file below the test's folder; four of them may be in use at a time. */
static inline const char *tiny_path(const char *folder, const char *name)
{
    static char path[4][900];
    static int next;
    next = (next + 1) & 3;
    snprintf(path[next], sizeof path[next], "%s/%s%s%s", tiny_root, folder, *name ? "/" : "", name);
    return path[next];
}

static inline void tiny_put(spm_context *ctx, const char *path, const char *text)
{
    CHECK(spm_file_write(ctx, path, text, strlen(text), NULL) == SPM_OK);
}

static inline void tiny_picture(spm_context *ctx, const char *path, int i, int y, int place)
{
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int r, c, k;
    CHECK(spm_image_create(ctx, TINY_SIZE, TINY_SIZE, &image, NULL) == SPM_OK);
    for (r = 0; r < TINY_SIZE; r++) {
        for (c = 0; c < TINY_SIZE; c++) {
            int square = r >= 5 && r < 11 && c >= (y ? 9 : 2) && c < (y ? 14 : 7);
            for (k = 0; k < 3; k++) {
                int ground = place ? (k == 2 ? 140 : 70) : (k == 1 ? 130 : 80);
                int noise = (int)spm_random_below(5, (uint64_t)i, (uint64_t)((r * TINY_SIZE + c) * 3 + k), 81) - 40;
                int value = ground + noise + (square ? 45 : 0);
                image.pixels[(r * TINY_SIZE + c) * 3 + k] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
            }
        }
    }
    CHECK(spm_image_encode_png(ctx, &image, &data, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, path, data, size, NULL) == SPM_OK);
    spm_free(ctx, data);
    spm_image_free(ctx, &image);
}

/* How many examples of group y * 2 + place stand in each split. */
typedef struct tiny_counts {
    int group[3][4];
} tiny_counts;

/* 26 to train on (groups 10, 3, 3, 10), 12 to validate, 17 to test. */
static inline tiny_counts tiny_usual(void)
{
    static const int counts[3][4] = { { 10, 3, 3, 10 }, { 3, 3, 3, 3 }, { 5, 4, 4, 4 } };
    tiny_counts c;
    memcpy(c.group, counts, sizeof counts);
    return c;
}

/* Writes NAME/ below the test's folder and opens it. */
static inline spm_dataset *tiny_data(spm_context *ctx, const char *name, const tiny_counts *counts)
{
    spm_dataset_desc desc = SPM_ZERO;
    spm_dataset *set;
    spm_error err = SPM_ZERO;
    char csv[8000], file[40];
    int split, g, k, i = 0, n = snprintf(csv, sizeof csv, "img_id,img_filename,y,split,place,place_filename\n");
    CHECK(spm_directory_create(ctx, tiny_path(name, ""), NULL) == SPM_OK);
    for (split = 0; split < 3; split++) {
        for (g = 0; g < 4; g++) {
            for (k = 0; k < counts->group[split][g]; k++, i++) {
                snprintf(file, sizeof file, "%03d.png", i);
                tiny_picture(ctx, tiny_path(name, file), i, g / 2, g % 2);
                n += snprintf(csv + n, sizeof csv - (size_t)n, "%d,%s,%d,%d,%d,%s\n", i + 1, file, g / 2, split, g % 2, g % 2 ? "/o/ocean/1.jpg" : "/f/forest/1.jpg");
            }
        }
    }
    tiny_put(ctx, tiny_path(name, "metadata.csv"), csv);
    desc.path = tiny_path(name, "");
    set = spm_dataset_open(ctx, &desc, &err);
    CHECK_STR(err.text, "");
    return set;
}

static inline spm_reading tiny_reading(void)
{
    spm_reading reading = SPM_ZERO;
    reading.transform = spm_transform_make(TINY_SIZE, TINY_SIZE);
    reading.transform.resize = SPM_RESIZE_NONE;
    return reading;
}

static inline spm_arch tiny_arch(spm_context *ctx, const char *name)
{
    spm_arch arch = SPM_ZERO;
    spm_error err = SPM_ZERO;
    arch.height = arch.width_px = TINY_SIZE;
    arch.classes = 2;
    CHECK(spm_arch_parse(ctx, name, &arch, &err) == SPM_OK);
    CHECK_STR(err.text, "");
    return arch;
}

static inline spm_model *tiny_model(spm_context *ctx, const char *name, uint64_t seed)
{
    spm_arch arch = tiny_arch(ctx, name);
    spm_error err = SPM_ZERO;
    spm_model *model = spm_model_build(ctx, &arch, seed, &err);
    CHECK_STR(err.text, "");
    return model;
}

/* An example's picture as the network sees it. */
static inline void tiny_pixels(spm_dataset *set, const spm_reading *reading, int64_t id, float *out)
{
    spm_image image = SPM_ZERO;
    CHECK(spm_dataset_image(set, id, &image, NULL) == SPM_OK);
    spm_transform_normalize(&reading->transform, &image, out);
    spm_image_free(spm_dataset_context(set), &image);
}
#endif
