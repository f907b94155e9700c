/* Sections DATA and LOAD: every data set format, every error sentence, transforms against Pillow and torchvision, and the promise that
 * a batch depends on (seed, epoch, example) alone.  All data sets are written here, below a temporary folder. */
#include "failing.h"
#include "logged.h"
#include "tar.h"
#include <stdarg.h>
#include <stdint.h>
#include <unistd.h>

static char root[400];

/* ---- writing small data sets ---- */

static void make_path(char *path, size_t size, const char *format, va_list list)
{
    size_t n = (size_t)snprintf(path, size, "%s/", root);
    vsnprintf(path + n, size - n, format, list);
}

/* root/... with its folders made. */
static const char *place(spm_context *ctx, const char *format, ...)
{
    static char path[800];
    char folder[800];
    char *slash;
    va_list list;
    va_start(list, format);
    make_path(path, sizeof path, format, list);
    va_end(list);
    snprintf(folder, sizeof folder, "%s", path);
    slash = strrchr(folder, '/');
    *slash = 0;
    CHECK(spm_directory_create(ctx, folder, NULL) == SPM_OK);
    return path;
}

static void put(spm_context *ctx, const char *path, const char *text)
{
    CHECK(spm_file_write(ctx, path, text, strlen(text), NULL) == SPM_OK);
}

static uint8_t pixel(int id, int x, int y, int c)
{
    return (uint8_t)((id * 37 + x * 7 + y * 13 + c * 50 + x * y) & 255);
}

static spm_image pattern(spm_context *ctx, int id, int width, int height)
{
    spm_image image = SPM_ZERO;
    int x, y, c;
    CHECK(spm_image_create(ctx, width, height, &image, NULL) == SPM_OK);
    for (y = 0; y < height; y++) {
        for (x = 0; x < width; x++) {
            for (c = 0; c < 3; c++) image.pixels[(y * width + x) * 3 + c] = pixel(id, x, y, c);
        }
    }
    return image;
}

static void put_picture(spm_context *ctx, const char *path, int id, int width, int height)
{
    spm_image image = pattern(ctx, id, width, height);
    uint8_t *data = NULL;
    size_t size = 0;
    if (strstr(path, ".jpg")) CHECK(spm_image_encode_jpeg(ctx, &image, 95, 0, &data, &size, NULL) == SPM_OK);
    else CHECK(spm_image_encode_png(ctx, &image, &data, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, path, data, size, NULL) == SPM_OK);
    spm_free(ctx, data);
    spm_image_free(ctx, &image);
}

static spm_dataset *open_set(spm_context *ctx, const char *name, spm_data_format format, spm_error *err)
{
    spm_dataset_desc desc = SPM_ZERO;
    char path[500];
    snprintf(path, sizeof path, "%s/%s", root, name);
    desc.path = path;
    desc.format = format;
    memset(err, 0, sizeof *err);
    return spm_dataset_open(ctx, &desc, err);
}

/* Opening must fail, with a sentence that holds all of the given words. */
static void check_refused(spm_context *ctx, const char *name, spm_data_format format, const char *a, const char *b)
{
    spm_error err;
    spm_dataset *set = open_set(ctx, name, format, &err);
    CHECK(set == NULL);
    CHECK(err.status != SPM_OK);
    if (!strstr(err.text, a) || !strstr(err.text, b)) {
        printf("    %s: \"%s\" lacks \"%s\" or \"%s\"\n", name, err.text, a, b);
        CHECK(0);
    }
    spm_dataset_close(set);
}

/* The same of a set whose file NAME/... has this text. */
static void check_refused_file(spm_context *ctx, const char *file, const char *text, spm_data_format format, const char *a, const char *b)
{
    char name[40];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(file, "/"), file);
    put(ctx, place(ctx, "%s", file), text);
    check_refused(ctx, name, format, a, b);
}

#define BIRDS 24
/* 24 pictures of 32 x 24, y and place by number, splits 14 / 4 / 6. */
static void write_birds(spm_context *ctx, const char *name, const char *place_file)
{
    char csv[4000];
    int i, n = snprintf(csv, sizeof csv, "\xef\xbb\xbfplace,split,\"y\",img_id,place_filename,img_filename\r\n");
    for (i = 0; i < BIRDS; i++) {
        put_picture(ctx, place(ctx, "%s/images/%02d, a.png", name, i), i, 32, 24);
        n += snprintf(csv + n, sizeof csv - (size_t)n, "%d,%d,%d,%d,%s,\"images/%02d, a.png\"\r\n", i & 1, i < 14 ? 0 : i < 18 ? 1 : 2,
                      i / 2 & 1, i + 1, place_file, i);
    }
    put(ctx, place(ctx, "%s/metadata.csv", name), csv);
}

/* ---- formats ---- */

static void waterbirds(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set, *other;
    spm_dataset_desc desc = SPM_ZERO;
    char path[500];
    int i;
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    set = open_set(ctx, "birds", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set != NULL);
    if (!set) return;
    CHECK_INT(spm_dataset_format(set), SPM_DATA_WATERBIRDS);
    CHECK_INT(spm_dataset_size(set), BIRDS);
    CHECK_INT(spm_dataset_classes(set), 2);
    CHECK_INT(spm_dataset_confounders(set), 2);
    CHECK_INT(spm_dataset_groups(set), 4);
    CHECK_INT(spm_dataset_split_size(set, SPM_TRAIN), 14);
    CHECK_INT(spm_dataset_split_size(set, SPM_VAL), 4);
    CHECK_INT(spm_dataset_split_size(set, SPM_TEST), 6);
    CHECK_STR(spm_dataset_group_name(set, 0), "landbird on land");
    CHECK_STR(spm_dataset_group_name(set, 1), "landbird on water");
    CHECK_STR(spm_dataset_group_name(set, 2), "waterbird on land");
    CHECK_STR(spm_dataset_group_name(set, 3), "waterbird on water");
    CHECK_STR(spm_dataset_class_name(set, 1), "waterbird");
    CHECK_STR(spm_dataset_confounder_name(set, 0), "land");
    CHECK_STR(spm_dataset_example(set, 5)->file, "images/05, a.png");
    for (i = 0; i < BIRDS; i++) {
        const spm_example *e = spm_dataset_example(set, i);
        CHECK(e->confounder == (i & 1) && e->y == (i / 2 & 1) && e->group == e->y * 2 + e->confounder);
    }
    CHECK(spm_dataset_example(set, BIRDS) == NULL && spm_dataset_example(set, -1) == NULL);
    CHECK_INT(spm_dataset_group_count(set, SPM_TRAIN, 0), 4);
    CHECK_INT(spm_dataset_group_count(set, SPM_TRAIN, 3), 3);
    CHECK_INT(spm_dataset_group_count(set, SPM_TEST, 3), 2);
    for (i = 0; i < BIRDS; i++) { /* PNG is lossless: the very pixels come back, from the file and from memory */
        spm_image image = SPM_ZERO;
        CHECK(spm_dataset_image(set, i % 12, &image, &err) == SPM_OK);
        CHECK(image.width == 32 && image.height == 24);
        if (image.pixels) CHECK(image.pixels[(3 * 32 + 5) * 3 + 1] == pixel(i % 12, 5, 3, 1));
        spm_image_free(ctx, &image);
    }
    /* the hash is that of files, labels and splits */
    other = open_set(ctx, "birds", SPM_DATA_WATERBIRDS, &err);
    CHECK(other && spm_dataset_hash(other) == spm_dataset_hash(set));
    spm_dataset_close(other);
    snprintf(path, sizeof path, "%s/birds", root);
    desc.path = path;
    desc.limit = 3;
    other = spm_dataset_open(ctx, &desc, &err);
    CHECK(other && spm_dataset_hash(other) != spm_dataset_hash(set));
    CHECK(other && spm_dataset_split_size(other, SPM_TRAIN) == 3 && spm_dataset_split_size(other, SPM_TEST) == 3);
    CHECK(other && spm_dataset_split_ids(other, SPM_TEST)[2] == 20 && spm_dataset_size(other) == BIRDS);
    CHECK(other && spm_dataset_group_count(other, SPM_TRAIN, 3) == 0);
    spm_dataset_close(other);
    spm_dataset_close(set);
    /* the same columns, but no birds */
    write_birds(ctx, "digits", "mnist_0");
    (void)remove(place(ctx, "digits/class_names.txt")); /* of an earlier run of this test */
    (void)remove(place(ctx, "digits/confounder_names.txt"));
    (void)remove(place(ctx, "digits/group_names.txt"));
    set = open_set(ctx, "digits", SPM_DATA_AUTO, &err);
    CHECK_STR(set ? spm_dataset_group_name(set, 1) : NULL, "y=0, place=1");
    spm_dataset_close(set);
    put(ctx, place(ctx, "digits/class_names.txt"), "car\ntruck\n");
    put(ctx, place(ctx, "digits/confounder_names.txt"), "zero\r\none\r\n");
    set = open_set(ctx, "digits", SPM_DATA_METADATA, &err);
    CHECK_STR(set ? spm_dataset_group_name(set, 2) : NULL, "truck, zero");
    spm_dataset_close(set);
    put(ctx, place(ctx, "digits/group_names.txt"), "a\nb\nc\nd");
    set = open_set(ctx, "digits", SPM_DATA_AUTO, &err);
    CHECK_STR(set ? spm_dataset_group_name(set, 3) : NULL, "d");
    CHECK_STR(set ? spm_dataset_class_name(set, 0) : NULL, "car");
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void metadata(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    char csv[6000];
    int i, n, s;
    int64_t k;
    put(ctx, place(ctx, "alias/metadata.csv"), "path,label,a,split\nx.png,2,0,train\ny.png,0,3,Validation\nz.png,1,1,test\nw.png,1,1,2.0\n");
    set = open_set(ctx, "alias", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_METADATA);
    CHECK(set && spm_dataset_classes(set) == 3 && spm_dataset_confounders(set) == 4);
    CHECK(set && spm_dataset_example(set, 1)->group == 3 && spm_dataset_example(set, 1)->split == SPM_VAL);
    CHECK(set && spm_dataset_example(set, 3)->split == SPM_TEST);
    CHECK_STR(set ? spm_dataset_group_name(set, 11) : NULL, "label=2, a=3");
    spm_dataset_close(set);
    /* a table that was written on Windows */
    put_picture(ctx, place(ctx, "win/a/b/1.png"), 1, 9, 7);
    put(ctx, place(ctx, "win/metadata.csv"), "img_filename,y,place,split\r\na\\b\\1.png,0,0,0\r\n.\\a\\b\\1.png,1,0,1\r\n");
    set = open_set(ctx, "win", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    for (i = 0; set && i < 2; i++) {
        spm_image image = SPM_ZERO;
        CHECK_STR(spm_dataset_example(set, i)->file, "a/b/1.png");
        CHECK(spm_dataset_image(set, i, &image, &err) == SPM_OK && image.width == 9 && image.height == 7);
        spm_image_free(ctx, &image);
    }
    spm_dataset_close(set);
    /* a column "group" that holds y * K + a */
    put(ctx, place(ctx, "group/metadata.csv"), "filename,y,group,split\nx.png,0,0,0\ny.png,0,1,1\nz.png,1,2,2\nw.png,1,3,2\n");
    set = open_set(ctx, "group", SPM_DATA_AUTO, &err);
    CHECK(set && spm_dataset_confounders(set) == 2 && spm_dataset_example(set, 3)->confounder == 1 && spm_dataset_example(set, 2)->confounder == 0);
    spm_dataset_close(set);
    put(ctx, place(ctx, "group/metadata.csv"), "filename,y,group,split\nx.png,0,0,0\ny.png,0,1,1\nz.png,1,0,2\nw.png,1,1,2\n");
    set = open_set(ctx, "group", SPM_DATA_AUTO, &err);
    CHECK(set && spm_dataset_confounders(set) == 2 && spm_dataset_example(set, 3)->confounder == 1);
    spm_dataset_close(set);
    /* names instead of numbers */
    put(ctx, place(ctx, "named/metadata.csv"), "filename,label,place,split\nx.png,dog,snow,0\ny.png,cat,snow,1\nz.png,dog,\"a, b\",2\n");
    set = open_set(ctx, "named", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_classes(set) == 2 && spm_dataset_confounders(set) == 2);
    CHECK_STR(set ? spm_dataset_group_name(set, 3) : NULL, "dog, snow");
    CHECK_STR(set ? spm_dataset_confounder_name(set, 0) : NULL, "a, b");
    CHECK(set && spm_dataset_example(set, 0)->group == 3 && spm_dataset_example(set, 1)->group == 1 && spm_dataset_example(set, 2)->group == 2);
    spm_dataset_close(set);
    check_refused_file(ctx, "named/metadata.csv", "filename,label,place,split\nx.png,dog,1,0\ny.png,3,1,1\n", SPM_DATA_AUTO, "metadata.csv line 3: label is \"3\"", "line 2 has a name");
    check_refused_file(ctx, "named/metadata.csv", "filename,label,place,split\nx.png,dog,1,0\ny.png,,1,1\n", SPM_DATA_AUTO, "metadata.csv line 3: label is \"\"", "line 2 has a name");
    /* no splits: drawn, the same every time, by group, said once */
    n = snprintf(csv, sizeof csv, "img_filename,y,confounder\n");
    for (i = 0; i < 200; i++) n += snprintf(csv + n, sizeof csv - (size_t)n, "%d.png,%d,%d\n", i, i % 2, i % 20 == 0);
    put(ctx, place(ctx, "drawn/metadata.csv"), csv);
    logs = 0;
    set = open_set(ctx, "drawn", SPM_DATA_AUTO, &err);
    CHECK_INT(logs, 1);
    CHECK(strstr(last_log, "split") != NULL);
    CHECK(set && spm_dataset_split_size(set, SPM_TRAIN) == 140 && spm_dataset_split_size(set, SPM_VAL) == 20 && spm_dataset_split_size(set, SPM_TEST) == 40);
    CHECK(set && spm_dataset_group_count(set, SPM_TEST, 1) == 2 && spm_dataset_group_count(set, SPM_VAL, 1) == 1);
    if (set) {
        spm_dataset *again = open_set(ctx, "drawn", SPM_DATA_AUTO, &err);
        CHECK(again && spm_dataset_hash(again) == spm_dataset_hash(set));
        for (s = 0; again && s < SPM_SPLITS; s++) {
            for (k = 0; k < spm_dataset_split_size(set, (spm_split)s); k++) {
                CHECK(spm_dataset_split_ids(set, (spm_split)s)[k] == spm_dataset_split_ids(again, (spm_split)s)[k]);
            }
        }
        spm_dataset_close(again);
    }
    spm_dataset_close(set);
    /* a class that never occurs is said */
    put(ctx, place(ctx, "gap/metadata.csv"), "img_filename,y,place,split\na.png,0,0,0\nb.png,7,1,0\n");
    logs = 0;
    set = open_set(ctx, "gap", SPM_DATA_AUTO, &err);
    CHECK(set && spm_dataset_classes(set) == 8);
    CHECK(logs == 1 && strstr(last_log, "y = 1") != NULL);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void celeba(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_dataset_desc desc = SPM_ZERO;
    spm_image image = SPM_ZERO;
    char path[500];
    put(ctx, place(ctx, "celeba/list_attr_celeba.txt"),
        "4\nBald Blond_Hair Male Smiling \n000001.jpg -1  1 -1  1\n000002.jpg -1 -1  1 -1\n000003.jpg  1 -1 -1 -1\n000004.jpg -1  1  1  1\n");
    put(ctx, place(ctx, "celeba/list_eval_partition.txt"), "000004.jpg 2\n000002.jpg 0\n000001.jpg 0\n000003.jpg 1\n");
    put_picture(ctx, place(ctx, "celeba/img_align_celeba/000001.jpg"), 1, 16, 20);
    set = open_set(ctx, "celeba", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_CELEBA);
    CHECK_STR(set ? spm_dataset_group_name(set, 0) : NULL, "non-blond female");
    CHECK_STR(set ? spm_dataset_group_name(set, 3) : NULL, "blond male");
    CHECK(set && spm_dataset_example(set, 0)->group == 2 && spm_dataset_example(set, 1)->group == 1 && spm_dataset_example(set, 3)->group == 3);
    CHECK(set && spm_dataset_example(set, 3)->split == SPM_TEST && spm_dataset_example(set, 2)->split == SPM_VAL);
    CHECK(set && spm_dataset_image(set, 0, &image, &err) == SPM_OK && image.width == 16 && image.height == 20);
    CHECK_STR(err.text, "");
    spm_image_free(ctx, &image);
    memset(&err, 0, sizeof err);
    CHECK(set && spm_dataset_image(set, 1, &image, &err) != SPM_OK);
    CHECK(strstr(err.text, "list_attr_celeba.txt line 4") != NULL && strstr(err.text, "000002.jpg") != NULL);
    spm_dataset_close(set);
    snprintf(path, sizeof path, "%s/celeba", root);
    desc.path = path;
    desc.target = "Smiling";
    desc.confounder = "Male,Bald";
    memset(&err, 0, sizeof err);
    set = spm_dataset_open(ctx, &desc, &err);
    CHECK(set && spm_dataset_groups(set) == 8);
    CHECK_STR(set ? spm_dataset_group_name(set, 1) : NULL, "not Smiling, not Male, Bald");
    CHECK_STR(set ? spm_dataset_group_name(set, 6) : NULL, "Smiling, Male, not Bald");
    CHECK(set && spm_dataset_example(set, 2)->group == 1 && spm_dataset_example(set, 3)->group == 6);
    spm_dataset_close(set);
    desc.target = "Blonde";
    memset(&err, 0, sizeof err);
    CHECK(spm_dataset_open(ctx, &desc, &err) == NULL && strstr(err.text, "\"Blonde\"") && strstr(err.text, "Bald, Blond_Hair, Male, Smiling"));
    /* Kaggle's form */
    put(ctx, place(ctx, "kaggle/list_attr_celeba.csv"), "image_id,Blond_Hair,Male\n000001.jpg,-1,1\n000002.jpg,1,-1\n");
    put(ctx, place(ctx, "kaggle/list_eval_partition.csv"), "image_id,partition\n000001.jpg,0\n000002.jpg,2\n");
    put_picture(ctx, place(ctx, "kaggle/img_align_celeba/img_align_celeba/000001.jpg"), 1, 16, 20);
    set = open_set(ctx, "kaggle", SPM_DATA_CELEBA, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_example(set, 0)->group == 1 && spm_dataset_example(set, 1)->group == 2 && spm_dataset_example(set, 1)->split == SPM_TEST);
    CHECK(set && spm_dataset_image(set, 0, &image, &err) == SPM_OK);
    spm_image_free(ctx, &image);
    spm_dataset_close(set);
    check_refused_file(ctx, "celeba_bad/list_attr_celeba.txt", "2\nBlond_Hair Male\n000001.jpg -1 1\n000002.jpg x 1\n", SPM_DATA_AUTO, "line 4", "Blond_Hair is \"x\"");
    check_refused_file(ctx, "celeba_bad/list_attr_celeba.txt", "2\nBlond_Hair Male\n000001.jpg -1 1\n000002.jpg -1\n", SPM_DATA_AUTO, "line 4", "fields");
    check_refused_file(ctx, "celeba_bad/list_attr_celeba.txt", "", SPM_DATA_AUTO, "list_attr_celeba.txt", "empty");
    spm_context_destroy(ctx);
}

static void folders(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    int i;
    for (i = 0; i < 6; i++) {
        put_picture(ctx, place(ctx, "tree/%s/%s/%s/%d.png", i < 3 ? "train" : "val", i % 2 ? "dog" : "cat", i % 3 ? "grass" : "asphalt", i), i, 8, 8);
        put_picture(ctx, place(ctx, "plain/top/%s/%02d.png", i % 2 ? "dog" : "cat", i), i, 8, 8);
    }
    put(ctx, place(ctx, "tree/README"), "not a picture");
    set = open_set(ctx, "tree", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_FOLDER && spm_dataset_size(set) == 6);
    CHECK(set && spm_dataset_classes(set) == 2 && spm_dataset_confounders(set) == 2);
    CHECK_STR(set ? spm_dataset_group_name(set, 3) : NULL, "dog, grass");
    CHECK_INT(set ? spm_dataset_split_size(set, SPM_TRAIN) : -1, 3);
    CHECK_INT(set ? spm_dataset_split_size(set, SPM_VAL) : -1, 3);
    CHECK_INT(set ? spm_dataset_split_size(set, SPM_TEST) : -1, 0);
    CHECK_STR(set ? spm_dataset_example(set, 0)->file : NULL, "train/cat/asphalt/0.png");
    spm_dataset_close(set);
    set = open_set(ctx, "plain", SPM_DATA_FOLDER, &err);
    CHECK(set && spm_dataset_classes(set) == 2 && spm_dataset_confounders(set) == 1 && spm_dataset_size(set) == 6);
    CHECK_STR(set ? spm_dataset_group_name(set, 0) : NULL, "cat");
    CHECK_STR(set ? spm_dataset_example(set, 3)->file : NULL, "top/dog/01.png");
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void tar_files(void)
{
    spm_context *ctx = logged_context(2);
    spm_error err;
    spm_dataset *set, *folder;
    FILE *tar;
    char name[600], path[600];
    int i;
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    snprintf(name, sizeof name, "%s/birds.tar", root);
    tar = fopen(name, "wb");
    CHECK(tar != NULL);
    if (!tar) return;
    for (i = -1; i < BIRDS; i++) {
        if (i < 0) snprintf(name, sizeof name, "./birds/metadata.csv");
        else snprintf(name, sizeof name, "./birds/images/%02d, a.png", i);
        snprintf(path, sizeof path, "%s%.60s", root, name + 1);
        if (i != 7) tar_add_file(tar, name, path);
    }
    tar_close(tar);
    set = open_set(ctx, "birds.tar", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    folder = open_set(ctx, "birds", SPM_DATA_AUTO, &err);
    CHECK(set && folder && spm_dataset_hash(set) == spm_dataset_hash(folder));
    for (i = 0; set && folder && i < BIRDS; i++) {
        spm_image a = SPM_ZERO, b = SPM_ZERO;
        memset(&err, 0, sizeof err);
        CHECK(spm_dataset_image(folder, i, &b, NULL) == SPM_OK);
        if (i == 7) {
            CHECK(spm_dataset_image(set, i, &a, &err) != SPM_OK);
            CHECK(strstr(err.text, "metadata.csv line 9") != NULL && strstr(err.text, "images/07, a.png") != NULL);
        } else {
            CHECK(spm_dataset_image(set, i, &a, &err) == SPM_OK);
            CHECK(a.pixels && b.pixels && memcmp(a.pixels, b.pixels, 32 * 24 * 3) == 0);
        }
        spm_image_free(ctx, &a);
        spm_image_free(ctx, &b);
    }
    spm_dataset_close(set);
    spm_dataset_close(folder);
    spm_context_destroy(ctx);
}

static void blocks(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_image image = SPM_ZERO;
    static uint8_t x[16 + 3 * 20], y[8 + 3], cifar[2 * 3073], cifar100[3 * 3074];
    char names[901];
    uint8_t *packed = NULL;
    size_t size = 0;
    int i;
    memcpy(x, "\0\0\x08\x03\0\0\0\x03\0\0\0\x04\0\0\0\x05", 16);
    memcpy(y, "\0\0\x08\x01\0\0\0\x03\x02\x00\x01", 11);
    for (i = 0; i < 60; i++) x[16 + i] = (uint8_t)(i * 4);
    CHECK(spm_file_write(ctx, place(ctx, "mnist/train-images-idx3-ubyte"), x, sizeof x, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "mnist/train-labels-idx1-ubyte"), y, sizeof y, NULL) == SPM_OK);
    CHECK(spm_deflate(ctx, x, sizeof x, 2, &packed, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "mnist/t10k-images-idx3-ubyte.gz"), packed, size, NULL) == SPM_OK);
    spm_free(ctx, packed);
    CHECK(spm_deflate(ctx, y, sizeof y, 2, &packed, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "mnist/t10k-labels-idx1-ubyte.gz"), packed, size, NULL) == SPM_OK);
    spm_free(ctx, packed);
    set = open_set(ctx, "mnist", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_IDX && spm_dataset_size(set) == 6 && spm_dataset_classes(set) == 3);
    CHECK(set && spm_dataset_split_size(set, SPM_TEST) == 3 && spm_dataset_example(set, 3)->y == 2);
    CHECK(set && spm_dataset_image(set, 4, &image, &err) == SPM_OK && image.width == 5 && image.height == 4);
    CHECK(image.pixels && image.pixels[3] == x[16 + 21] && image.pixels[4] == x[16 + 21]);
    spm_image_free(ctx, &image);
    spm_dataset_close(set);
    CHECK(spm_file_write(ctx, place(ctx, "mnist/train-images-idx3-ubyte"), x, sizeof x - 1, NULL) == SPM_OK);
    check_refused(ctx, "mnist", SPM_DATA_AUTO, "train-images-idx3-ubyte", "wants 60 bytes of elements, it holds 59");
    for (i = 0; i < (int)sizeof cifar; i++) cifar[i] = (uint8_t)(i * 11);
    cifar[0] = 3;
    cifar[3073] = 9;
    CHECK(spm_file_write(ctx, place(ctx, "cifar/cifar-10-batches-bin/data_batch_1.bin"), cifar, sizeof cifar, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "cifar/cifar-10-batches-bin/test_batch.bin"), cifar, 3073, NULL) == SPM_OK);
    put(ctx, place(ctx, "cifar/cifar-10-batches-bin/batches.meta.txt"), "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n");
    set = open_set(ctx, "cifar", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_CIFAR && spm_dataset_size(set) == 3 && spm_dataset_classes(set) == 10);
    CHECK_STR(set ? spm_dataset_class_name(set, 9) : NULL, "truck");
    CHECK(set && spm_dataset_image(set, 1, &image, &err) == SPM_OK && image.width == 32);
    CHECK(image.pixels && image.pixels[3 * 33] == cifar[3074 + 33] && image.pixels[3 * 33 + 2] == cifar[3074 + 2048 + 33]);
    spm_image_free(ctx, &image);
    spm_dataset_close(set);
    CHECK(spm_file_write(ctx, place(ctx, "cifar/cifar-10-batches-bin/test_batch.bin"), cifar, 3000, NULL) == SPM_OK);
    check_refused(ctx, "cifar", SPM_DATA_AUTO, "test_batch.bin", "3000 bytes");
    /* CIFAR-100: two labels a record (superclass, class), found by looking and by name */
    for (i = 0; i < (int)sizeof cifar100; i++) cifar100[i] = (uint8_t)(i * 7);
    memcpy(cifar100, "\x13\x63", 2);
    memcpy(cifar100 + 3074, "\x04\x00", 2);
    memcpy(cifar100 + 2 * 3074, "\x0b\x2a", 2);
    CHECK(spm_file_write(ctx, place(ctx, "c100/cifar-100-binary/train.bin"), cifar100, sizeof cifar100, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "c100/cifar-100-binary/test.bin"), cifar100 + 3074, 2 * 3074, NULL) == SPM_OK);
    for (i = 0; i < 100; i++) snprintf(names + 9 * i, sizeof names - 9 * (size_t)i, "class_%02d\n", i);
    put(ctx, place(ctx, "c100/cifar-100-binary/fine_label_names.txt"), names);
    for (i = 0; i < 2; i++) {
        set = open_set(ctx, "c100", i ? SPM_DATA_CIFAR : SPM_DATA_AUTO, &err);
        CHECK_STR(err.text, "");
        CHECK(set && spm_dataset_format(set) == SPM_DATA_CIFAR && spm_dataset_size(set) == 5
              && spm_dataset_classes(set) == 100 && spm_dataset_confounders(set) == 1);
        CHECK(set && spm_dataset_split_size(set, SPM_TRAIN) == 3 && spm_dataset_split_size(set, SPM_TEST) == 2);
        CHECK(set && spm_dataset_example(set, 0)->y == 99 && spm_dataset_example(set, 1)->y == 0
              && spm_dataset_example(set, 4)->y == 42 && spm_dataset_example(set, 4)->split == SPM_TEST);
        CHECK_STR(set ? spm_dataset_class_name(set, 42) : NULL, "class_42");
        CHECK(set && spm_dataset_image(set, 4, &image, &err) == SPM_OK && image.width == 32 && image.height == 32);
        CHECK(image.pixels && image.pixels[3 * 33] == cifar100[2 * 3074 + 2 + 33]
              && image.pixels[3 * 33 + 1] == cifar100[2 * 3074 + 2 + 1024 + 33]);
        spm_image_free(ctx, &image);
        spm_dataset_close(set);
    }
    CHECK(spm_file_write(ctx, place(ctx, "c100/cifar-100-binary/train.bin"), cifar100, 3 * 3073, NULL) == SPM_OK);
    check_refused(ctx, "c100", SPM_DATA_AUTO, "train.bin", "not a multiple of 3074");
    spm_context_destroy(ctx);
}

/* ---- packed ---- */

static int open_packed(spm_context *ctx, const char *name, int skip, spm_dataset **set, spm_error *err)
{
    spm_dataset_desc desc = SPM_ZERO;
    char path[500];
    snprintf(path, sizeof path, "%s/%s", root, name);
    desc.path = path;
    desc.skip_bad_images = skip;
    memset(err, 0, sizeof *err);
    *set = spm_dataset_open(ctx, &desc, err);
    return *set != NULL;
}

/* FNV over an epoch: ids, labels and floats in their order; 0 if it fails, with the loader's sentence in err. */
static uint64_t epoch_hash(spm_dataset *set, const spm_loader_desc *desc, spm_error *err)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    spm_loader *loader;
    spm_batch batch;
    int got = -1;
    memset(err, 0, sizeof *err);
    loader = spm_loader_create(set, desc, err);
    if (loader && spm_loader_start(loader, 1, NULL, 0) == SPM_OK) {
        while ((got = spm_loader_next(loader, &batch)) == 1) {
            size_t n = (size_t)(batch.count * desc->transform.height * desc->transform.width * 3), i;
            const uint8_t *floats = (const uint8_t *)batch.pixels;
            for (i = 0; i < n * 4; i++) hash = (hash ^ floats[i]) * UINT64_C(0x100000001b3);
            for (i = 0; i < (size_t)batch.count; i++)
                hash = (hash ^ (uint64_t)(batch.id[i] * 100000 + batch.group[i])) * UINT64_C(0x100000001b3);
        }
    }
    if (got < 0 && loader) *err = *spm_loader_error(loader);
    spm_loader_destroy(loader);
    return got < 0 ? 0 : hash;
}

static void packed(void)
{
    static const spm_augment augments[] = { SPM_AUGMENT_NONE, SPM_AUGMENT_LIGHT, SPM_AUGMENT_PAPER };
    spm_context *ctx = logged_context(3);
    spm_error err;
    spm_dataset *set, *whole, *sized, *other;
    spm_transform transform = spm_transform_make(16, 12);
    spm_loader_desc desc = SPM_ZERO;
    char path[500];
    uint8_t *data = NULL, saved;
    size_t size = 0, i;
    int a;
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    set = open_set(ctx, "birds", SPM_DATA_AUTO, &err);
    snprintf(path, sizeof path, "%s/whole.pack", root);
    CHECK(set && spm_dataset_pack(set, path, NULL, NULL, NULL, &err) == SPM_OK);
    snprintf(path, sizeof path, "%s/sized.pack", root);
    CHECK(set && spm_dataset_pack(set, path, &transform, NULL, NULL, &err) == SPM_OK);
    CHECK_STR(err.text, "");
    if (!open_packed(ctx, "whole.pack", 0, &whole, &err) || !open_packed(ctx, "sized.pack", 0, &sized, &err)) {
        CHECK_STR(err.text, "");
        return;
    }
    CHECK(spm_dataset_format(whole) == SPM_DATA_PACKED && spm_dataset_size(whole) == BIRDS);
    CHECK(spm_dataset_hash(whole) == spm_dataset_hash(set) && spm_dataset_hash(sized) == spm_dataset_hash(set));
    CHECK_STR(spm_dataset_group_name(whole, 1), "landbird on water");
    CHECK_STR(spm_dataset_class_name(sized, 1), "waterbird");
    CHECK_STR(spm_dataset_example(sized, 3)->file, "images/03, a.png");
    /* the same bits as the unpacked set */
    desc.transform = transform;
    desc.batch = 4;
    desc.shuffle = 1;
    for (a = 0; a < 3; a++) {
        uint64_t reference;
        desc.augment = augments[a];
        reference = epoch_hash(set, &desc, &err);
        CHECK(reference != 0 && epoch_hash(whole, &desc, &err) == reference);
        if (a < 2) CHECK(epoch_hash(sized, &desc, &err) == reference);
        if (a < 2) CHECK(epoch_hash(sized, &desc, &err) == reference); /* out of memory this time */
    }
    CHECK(epoch_hash(sized, &desc, &err) == 0 && strstr(err.text, "--resize none") != NULL);
    desc.augment = SPM_AUGMENT_NONE;
    desc.transform.resize = SPM_RESIZE_EXACT;
    CHECK(epoch_hash(sized, &desc, &err) == 0 && strstr(err.text, "16 x 12 (--resize paper)") != NULL
          && strstr(err.text, "16 x 12 (--resize exact)") != NULL);
    desc.transform.resize = SPM_RESIZE_NONE; /* the size is there already */
    CHECK(epoch_hash(sized, &desc, &err) != 0);
    spm_dataset_close(sized);
    CHECK(spm_dataset_pack(whole, path, NULL, NULL, NULL, &err) == SPM_E_ARGUMENT);
    /* every byte counts: a damaged file is refused, or the picture that it hits is */
    snprintf(path, sizeof path, "%s/whole.pack", root);
    CHECK(spm_file_read(ctx, path, &data, &size, NULL) == SPM_OK);
    snprintf(path, sizeof path, "%s/damaged.pack", root);
    for (i = 8; data && i < size; i += i < 40 || size - i < 3000 ? 1 : 997) {
        int failures = 0, id;
        if (i < 32) continue; /* room for later versions */
        saved = data[i];
        data[i] = (uint8_t)(data[i] ^ 0x10);
        CHECK(spm_file_write(ctx, path, data, size, NULL) == SPM_OK);
        data[i] = saved;
        if (open_packed(ctx, "damaged.pack", 0, &other, &err)) {
            for (id = 0; id < BIRDS; id++) {
                spm_image image = SPM_ZERO;
                memset(&err, 0, sizeof err);
                failures += spm_dataset_image(other, id, &image, &err) != SPM_OK;
                if (err.status) CHECK(strstr(err.text, "checksum is wrong") != NULL);
                spm_image_free(ctx, &image);
            }
            CHECK(failures == 1 || (size - i <= 12 && size - i > 8 && failures == 0)); /* 4 bytes before the magic */
        } else {
            failures = strstr(err.text, "damaged") != NULL || strstr(err.text, "damaged.pack") != NULL;
            CHECK_INT(failures, 1);
        }
        spm_dataset_close(other);
    }
    for (i = 0; data && i < size; i += 501) {
        CHECK(spm_file_write(ctx, path, data, i, NULL) == SPM_OK);
        CHECK(!open_packed(ctx, "damaged.pack", 0, &other, &err) && err.text[0]);
    }
    spm_free(ctx, data);
    check_refused(ctx, "birds.tar", SPM_DATA_PACKED, "birds.tar", "no packed data set");
    spm_dataset_close(whole);
    spm_dataset_close(set);
    /* bad pictures: refused, or packed as what they are */
    write_birds(ctx, "broken", "/o/ocean/00001.jpg");
    put(ctx, place(ctx, "broken/images/09, a.png"), "no picture at all");
    snprintf(path, sizeof path, "%s/broken.pack", root);
    (void)remove(path);
    set = open_set(ctx, "broken", SPM_DATA_AUTO, &err);
    CHECK(set && spm_dataset_pack(set, path, NULL, NULL, NULL, &err) == SPM_E_FORMAT
          && strstr(err.text, "metadata.csv line 11") != NULL);
    CHECK(!open_packed(ctx, "broken.pack", 1, &other, &err) && strstr(err.text, "no such file") != NULL);
    spm_dataset_close(set);
    CHECK(open_packed(ctx, "broken", 1, &set, &err));
    CHECK(set && spm_dataset_pack(set, path, NULL, NULL, NULL, &err) == SPM_OK && spm_dataset_bad_count(set) == 1);
    desc.transform = transform;
    CHECK(open_packed(ctx, "broken.pack", 1, &other, &err));
    if (other) CHECK(epoch_hash(other, &desc, &err) == epoch_hash(set, &desc, &err) && err.status == SPM_OK);
    CHECK(other && spm_dataset_bad_count(other) == 1
          && strstr(spm_dataset_bad(other, 0, NULL), "could not be read when it was packed") != NULL);
    spm_dataset_close(other);
    CHECK(open_packed(ctx, "broken.pack", 0, &other, &err));
    if (other) CHECK(epoch_hash(other, &desc, &err) == 0 && strstr(err.text, "09, a.png") != NULL);
    spm_dataset_close(other);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void change_one_byte(const char *name)
{
    char path[500];
    FILE *file;
    snprintf(path, sizeof path, "%s/%s", root, name);
    file = fopen(path, "r+b");
    CHECK(file != NULL);
    if (!file) return;
    fseek(file, 5000, SEEK_SET);
    fputc(1, file);
    fclose(file);
}

/* Files that change, shrink or fail while they are read. */
static void unsteady_files(void)
{
    static const char files[][12] = { "birds.tar", "whole.pack" };
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_image image = SPM_ZERO;
    char path[500], part[520];
    uint8_t *data = NULL;
    size_t size, i;
    for (i = 0; i < 2; i++) { /* the tests before this one wrote them */
        set = open_set(ctx, files[i], SPM_DATA_AUTO, &err);
        CHECK(set && spm_dataset_image(set, 1, &image, &err) == SPM_OK);
        spm_image_free(ctx, &image);
        change_one_byte(files[i]);
        CHECK(set && spm_dataset_image(set, 2, &image, &err) == SPM_E_IO);
        CHECK(strstr(err.text, "was changed by another program while it was read") != NULL);
        spm_dataset_close(set);
        /* cut off */
        snprintf(path, sizeof path, "%s/%s", root, files[i]);
        CHECK(spm_file_read(ctx, path, &data, &size, NULL) == SPM_OK);
        set = open_set(ctx, files[i], SPM_DATA_AUTO, &err);
        {
            FILE *file = fopen(path, "wb");
            if (file) fclose(file);
        }
        memset(&err, 0, sizeof err);
        CHECK(set && spm_dataset_image(set, 3, &image, &err) == SPM_E_IO);
        CHECK(strstr(err.text, "cut while it was read") != NULL);
        spm_dataset_close(set);
        /* replaced by another under its name: the open one stays what it was */
        CHECK(spm_file_write(ctx, path, data, size, NULL) == SPM_OK);
        set = open_set(ctx, files[i], SPM_DATA_AUTO, &err);
        snprintf(part, sizeof part, "%s.new", path);
        CHECK(spm_file_write(ctx, part, "something else", 14, NULL) == SPM_OK && rename(part, path) == 0);
        CHECK(set && spm_dataset_image(set, 4, &image, &err) == SPM_OK);
        spm_image_free(ctx, &image);
        spm_dataset_close(set);
        spm_free(ctx, data);
    }
#if defined(__linux__)
    /* EIO: the kernel refuses to read the first page of a process's memory */
    write_birds(ctx, "failing", "/o/ocean/00001.jpg");
    snprintf(path, sizeof path, "%s", place(ctx, "failing/images/02, a.png"));
    (void)remove(path);
    if (symlink("/proc/self/mem", path) == 0) {
        set = open_set(ctx, "failing", SPM_DATA_AUTO, &err);
        memset(&err, 0, sizeof err);
        CHECK(set && spm_dataset_image(set, 2, &image, &err) == SPM_E_IO);
        CHECK(strstr(err.text, "metadata.csv line 4") != NULL && strstr(err.text, "02, a.png") != NULL
              && strstr(err.text, "reading failed") != NULL);
        CHECK(set && spm_dataset_image(set, 3, &image, &err) == SPM_OK);
        spm_image_free(ctx, &image);
        spm_dataset_close(set);
        (void)remove(path);
    }
#endif
    spm_context_destroy(ctx);
}

/* Layouts that other programs and archives use. */
static void other_layouts(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_image image = SPM_ZERO;
    char csv[1200], folder[500], path[700];
    static uint8_t x[16 + 3 * 20], y[8 + 3];
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    /* a table with whole paths, given by its own name; pictures relative to it */
    if (root[0] == '/') snprintf(folder, sizeof folder, "%s", root);
    else if (getcwd(path, sizeof path)) snprintf(folder, sizeof folder, "%.200s/%.200s", path, root);
    snprintf(csv, sizeof csv, "id,filename,split,y,a\n1,\"%s/birds/images/01, a.png\",0,0,1\n"
             "2,\"./birds/images/02, a.png\",2,1,0\n", folder);
    put(ctx, place(ctx, "metadata_waterbirds.csv"), csv);
    set = open_set(ctx, "metadata_waterbirds.csv", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_METADATA && spm_dataset_size(set) == 2);
    CHECK(set && spm_dataset_image(set, 0, &image, &err) == SPM_OK && image.pixels[4] == pixel(1, 1, 0, 1));
    spm_image_free(ctx, &image);
    CHECK(set && spm_dataset_image(set, 1, &image, &err) == SPM_OK && image.pixels[4] == pixel(2, 1, 0, 1));
    spm_image_free(ctx, &image);
    CHECK_STR(err.text, "");
    spm_dataset_close(set);
    check_refused(ctx, "metadata_waterbirds.csv", SPM_DATA_CELEBA, "metadata_waterbirds.csv", "celeba");
    check_refused(ctx, "metadata_waterbirds.csv", SPM_DATA_WATERBIRDS, "metadata_waterbirds.csv", "img_filename");
    /* CelebA as its archive has it */
    put(ctx, place(ctx, "archive/Anno/list_attr_celeba.txt"), "1\nBlond_Hair Male\n000001.jpg -1  1\n");
    put(ctx, place(ctx, "archive/Eval/list_eval_partition.txt"), "000001.jpg 2\n");
    put_picture(ctx, place(ctx, "archive/Img/img_align_celeba/000001.jpg"), 1, 16, 20);
    set = open_set(ctx, "archive", SPM_DATA_AUTO, &err);
    CHECK(set && spm_dataset_format(set) == SPM_DATA_CELEBA && spm_dataset_split_size(set, SPM_TEST) == 1);
    CHECK(set && spm_dataset_image(set, 0, &image, &err) == SPM_OK);
    CHECK_STR(err.text, "");
    spm_image_free(ctx, &image);
    spm_dataset_close(set);
    /* MNIST as torchvision keeps it, two folders down */
    memcpy(x, "\0\0\x08\x03\0\0\0\x03\0\0\0\x04\0\0\0\x05", 16);
    memcpy(y, "\0\0\x08\x01\0\0\0\x03\x02\x00\x01", 11);
    CHECK(spm_file_write(ctx, place(ctx, "torch/MNIST/raw/train-images-idx3-ubyte"), x, sizeof x, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "torch/MNIST/raw/train-labels-idx1-ubyte"), y, sizeof y, NULL) == SPM_OK);
    set = open_set(ctx, "torch", SPM_DATA_AUTO, &err);
    CHECK_STR(err.text, "");
    CHECK(set && spm_dataset_format(set) == SPM_DATA_IDX && spm_dataset_size(set) == 3);
    spm_dataset_close(set);
    x[2] = 0x0D; /* floats are no pictures */
    CHECK(spm_file_write(ctx, place(ctx, "torch/MNIST/raw/train-images-idx3-ubyte"), x, sizeof x, NULL) == SPM_OK);
    check_refused(ctx, "torch", SPM_DATA_AUTO, "train-images-idx3-ubyte", "wants 240 bytes");
    spm_context_destroy(ctx);
}

/* ---- errors ---- */

static void refusals(void)
{
    static const struct {
        const char *text;
        spm_data_format format;
        const char *a, *b; /* what the sentence holds */
    } tables[] = {
#define HEAD "img_filename,y,split,place\na.png,0,0,1\n"
        { "img_filename,y,split,spot\na.png,0,0,1\n", SPM_DATA_AUTO, "no column for the confounder", "img_filename, y, split, spot" },
        { "img_filename,y,split,place,y\na.png,0,0,1,1\n", SPM_DATA_AUTO, "two columns called y", "(2 and 5)" },
        { "picture,y,split,place\na.png,0,0,1\n", SPM_DATA_WATERBIRDS, "img_filename", "picture, y, split, place" },
        { "img_filename,kind,split,place\na.png,0,0,1\n", SPM_DATA_AUTO, "the class (y|label)", "kind" },
        { "img_filename,y,place\na.png,0,0\n", SPM_DATA_WATERBIRDS, "the split", "img_filename, y, place" },
        { HEAD "b.png,cat,0,1\n", SPM_DATA_AUTO, "metadata.csv line 3", "y is \"cat\"" },
        { HEAD "b.png,-1,0,1\n", SPM_DATA_AUTO, "line 3: y is -1", "out of range" },
        { HEAD "b.png,1,0,1000000\n", SPM_DATA_AUTO, "line 3: place is 1000000", "out of range" },
        { HEAD "b.png,1,0,\n", SPM_DATA_AUTO, "line 3: place is \"\"", "not a whole number" },
        { HEAD "b.png,1,3,1\n", SPM_DATA_AUTO, "line 3: split is \"3\"", "train" },
        { HEAD ",1,2,1\n", SPM_DATA_AUTO, "line 3: img_filename is empty", "" },
        { "img_filename,y,split,place\n", SPM_DATA_AUTO, "metadata.csv", "no examples" },
        { "", SPM_DATA_AUTO, "metadata.csv", "" },
        { "img_filename,y,split,place\na.png,9000,0,9000\n", SPM_DATA_AUTO, "groups", "65536" },
#undef HEAD
    };
    spm_context *ctx = logged_context(1);
    size_t i;
    check_refused(ctx, "nowhere", SPM_DATA_AUTO, "nowhere", "no such file or folder");
    CHECK(spm_directory_create(ctx, place(ctx, "hollow/x"), NULL) == SPM_OK);
    check_refused(ctx, "hollow", SPM_DATA_AUTO, "no data set found", "metadata.csv");
    check_refused(ctx, "hollow", SPM_DATA_WATERBIRDS, "hollow", "has no metadata.csv");
    check_refused(ctx, "hollow", SPM_DATA_CELEBA, "hollow", "list_attr_celeba");
    check_refused(ctx, "hollow", SPM_DATA_IDX, "hollow", "train-images-idx3-ubyte");
    check_refused(ctx, "hollow", SPM_DATA_CIFAR, "hollow", "data_batch_1.bin");
    for (i = 0; i < sizeof tables / sizeof tables[0]; i++)
        check_refused_file(ctx, "bad/metadata.csv", tables[i].text, tables[i].format, tables[i].a, tables[i].b);
    check_refused_file(ctx, "not.tar", "this is no tar file", SPM_DATA_AUTO, "not.tar", "");
    spm_context_destroy(ctx);
}

/* ---- transforms ---- */

static uint64_t fnv_words(const void *data, size_t count, int wide)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    size_t i;
    for (i = 0; i < count; i++) {
        uint32_t value;
        if (wide) memcpy(&value, (const char *)data + 4 * i, 4);
        else value = ((const uint8_t *)data)[i];
        hash = (hash ^ value) * UINT64_C(0x100000001b3);
    }
    return hash;
}

/* tests/golden/data_transform.py prints these lines: torchvision on Pillow images, pixels of pattern(). */
typedef struct golden_transform {
    int width, height, to_height, to_width, mode;
    uint64_t pixels, floats;
} golden_transform;
static const golden_transform golden[] = {
#include "golden/data_transform.inc"
};

static void transforms(void)
{
    spm_context *ctx = logged_context(1);
    size_t i;
    static float out[300 * 300 * 3];
    for (i = 0; i < sizeof golden / sizeof golden[0]; i++) {
        const golden_transform *g = &golden[i];
        spm_transform t = spm_transform_make(g->to_height, g->to_width);
        spm_image image = pattern(ctx, (int)i, g->width, g->height), result = SPM_ZERO;
        t.resize = (spm_resize_mode)g->mode;
        CHECK(spm_transform_image(ctx, &t, &image, &result, NULL) == SPM_OK);
        CHECK(result.width == g->to_width && result.height == g->to_height);
        if (result.pixels) {
            size_t n = (size_t)g->to_width * (size_t)g->to_height * 3;
            CHECK_MSG(fnv_words(result.pixels, n, 0) == g->pixels, spm_resize_mode_name(t.resize));
            spm_transform_normalize(&t, &result, out);
            CHECK_MSG(fnv_words(out, n, 1) == g->floats, "normalised floats");
        }
        spm_image_free(ctx, &result);
        if (t.resize == SPM_RESIZE_NONE) {
            spm_error err = SPM_ZERO;
            t.height++;
            CHECK(spm_transform_image(ctx, &t, &image, &result, &err) == SPM_E_SHAPE && strstr(err.text, "--resize"));
        }
        spm_image_free(ctx, &image);
    }
    spm_context_destroy(ctx);
}

static void names(void)
{
    spm_split split;
    spm_resize_mode mode;
    spm_augment augment;
    spm_data_format format;
    int i;
    CHECK(spm_split_parse("Valid", &split) && split == SPM_VAL);
    CHECK(spm_split_parse("2", &split) && split == SPM_TEST);
    CHECK(!spm_split_parse("tests", &split) && !spm_split_parse("", &split));
    for (i = SPM_DATA_AUTO; i <= SPM_DATA_PACKED; i++) CHECK(spm_data_format_parse(spm_data_format_name((spm_data_format)i), &format) && (int)format == i);
    for (i = SPM_RESIZE_PAPER; i <= SPM_RESIZE_NONE; i++) CHECK(spm_resize_mode_parse(spm_resize_mode_name((spm_resize_mode)i), &mode) && (int)mode == i);
    for (i = SPM_AUGMENT_NONE; i <= SPM_AUGMENT_PAPER; i++) CHECK(spm_augment_parse(spm_augment_name((spm_augment)i), &augment) && (int)augment == i);
    CHECK(!spm_data_format_parse("birds", &format) && !spm_resize_mode_parse("fit", &mode) && !spm_augment_parse("", &augment));
}

/* ---- loaders ---- */

/* Hash per example of (id, floats, labels) over an epoch, indexed by id; *order gets the ids as they came. */
static int run_epoch(spm_loader *loader, int64_t epoch, uint64_t *hash, int64_t *order, int64_t size)
{
    spm_batch batch;
    int n = 0, got;
    CHECK(spm_loader_start(loader, epoch, NULL, 0) == SPM_OK);
    while ((got = spm_loader_next(loader, &batch)) == 1) {
        int64_t i;
        for (i = 0; i < batch.count; i++) {
            hash[batch.id[i]] = fnv_words(batch.pixels + i * size, (size_t)size, 1) + (uint64_t)batch.group[i] * 1000003u;
            CHECK(batch.group[i] == batch.y[i] * 2 + batch.confounder[i]);
            order[n++] = batch.id[i];
        }
    }
    CHECK_INT(got, 0);
    CHECK_INT(spm_loader_next(loader, &batch), 0);
    CHECK(spm_loader_waited(loader) >= 0);
    return n;
}

static void determinism(void)
{
    static const spm_augment augments[] = { SPM_AUGMENT_NONE, SPM_AUGMENT_LIGHT, SPM_AUGMENT_PAPER };
    static const int batches[] = { 1, 4, 5, 14, 64 };
    uint64_t reference[2][BIRDS], hash[BIRDS];
    int64_t reference_order[2][BIRDS], order[BIRDS];
    size_t a, b;
    int workers, epoch;
    for (a = 0; a < 3; a++) {
        for (workers = 1; workers <= 3; workers++) {
            for (b = 0; b < 5; b++) {
                spm_context *ctx = logged_context(workers);
                spm_error err = SPM_ZERO;
                spm_dataset_desc where = SPM_ZERO;
                spm_loader_desc desc = SPM_ZERO;
                spm_dataset *set;
                spm_loader *loader;
                char path[500];
                if (a == 0 && workers == 1 && b == 0) write_birds(ctx, "birds", "/o/ocean/00001.jpg");
                snprintf(path, sizeof path, "%s/birds", root);
                where.path = path;
                where.cache_bytes = b == 1 ? 1 : b == 2 ? 9000 : 0; /* nothing, a few, all kept: no difference */
                set = spm_dataset_open(ctx, &where, &err);
                desc.transform = spm_transform_make(16, 16);
                desc.batch = batches[b];
                desc.seed = 7;
                desc.workers = workers;
                desc.shuffle = 1;
                desc.augment = augments[a];
                loader = set ? spm_loader_create(set, &desc, &err) : NULL;
                CHECK_STR(err.text, "");
                for (epoch = 0; loader && epoch < 2; epoch++) {
                    int first = workers == 1 && b == 0, i;
                    memset(hash, 0, sizeof hash);
                    CHECK_INT(run_epoch(loader, epoch, hash, order, 16 * 16 * 3), 14);
                    if (first) {
                        memcpy(reference[epoch], hash, sizeof hash);
                        memcpy(reference_order[epoch], order, sizeof order);
                    }
                    CHECK(memcmp(hash, reference[epoch], sizeof hash) == 0);
                    for (i = 0; i < 14; i++) CHECK(order[i] == reference_order[epoch][i]);
                }
                spm_loader_destroy(loader);
                spm_dataset_close(set);
                spm_context_destroy(ctx);
            }
        }
        CHECK(memcmp(reference_order[0], reference_order[1], 14 * sizeof(int64_t)) != 0);
        if (a == 0) CHECK(memcmp(reference[0], reference[1], sizeof hash) == 0);
        else CHECK(memcmp(reference[0], reference[1], sizeof hash) != 0);
    }
}

/* An example that comes again in an epoch is augmented anew, and an epoch that goes on amid its order knows it. */
static void repeated_examples(void)
{
    enum { FLOATS = 16 * 16 * 3 };
    static const int64_t order[6] = { 5, 7, 5, 5, 7, 2 };
    spm_context *ctx = logged_context(2);
    spm_loader_desc desc = SPM_ZERO;
    spm_loader *loader;
    spm_dataset *set;
    spm_batch batch;
    spm_error err;
    float whole[6 * FLOATS];
    int i;
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    set = open_set(ctx, "birds", SPM_DATA_AUTO, &err);
    desc.transform = spm_transform_make(16, 16);
    desc.batch = 2;
    desc.seed = 7;
    desc.augment = SPM_AUGMENT_PAPER;
    loader = set ? spm_loader_create(set, &desc, &err) : NULL;
    CHECK(loader != NULL);
    if (!loader) return;
    CHECK(spm_loader_start(loader, 1, order, 6) == SPM_OK);
    for (i = 0; i < 3; i++) {
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        memcpy(whole + 2 * i * FLOATS, batch.pixels, 2 * FLOATS * sizeof(float));
    }
#define SAME(a, b) (memcmp(whole + (a) * FLOATS, whole + (b) * FLOATS, FLOATS * sizeof(float)) == 0)
    CHECK(!SAME(0, 2) && !SAME(0, 3) && !SAME(2, 3) && !SAME(1, 4));
#undef SAME
    CHECK(spm_loader_start(loader, 1, order, 1) == SPM_OK && spm_loader_next(loader, &batch) == 1); /* the first: as ever */
    CHECK(memcmp(batch.pixels, whole, FLOATS * sizeof(float)) == 0);
    CHECK(spm_loader_resume(loader, 1, order, 6, 2) == SPM_OK);
    for (i = 1; i < 3; i++) {
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        CHECK(batch.id[0] == order[2 * i] && batch.id[1] == order[2 * i + 1]);
        CHECK(memcmp(batch.pixels, whole + 2 * i * FLOATS, 2 * FLOATS * sizeof(float)) == 0);
    }
    CHECK_INT(spm_loader_next(loader, &batch), 0);
    CHECK(spm_loader_resume(loader, 1, order, 6, 6) == SPM_E_ARGUMENT && spm_loader_resume(loader, 1, order, 6, -1) == SPM_E_ARGUMENT);
    spm_loader_destroy(loader);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void loading(void)
{
    spm_context *ctx = logged_context(2);
    spm_error err;
    spm_dataset *set;
    spm_loader_desc desc = SPM_ZERO;
    spm_loader *loader;
    spm_batch batch;
    int64_t order[5] = { 20, 3, 3, 0, 23 }, wrong = 99;
    int i;
    write_birds(ctx, "birds", "/o/ocean/00001.jpg");
    set = open_set(ctx, "birds", SPM_DATA_AUTO, &err);
    CHECK(set != NULL);
    if (!set) return;
    desc.transform = spm_transform_make(24, 32);
    desc.transform.resize = SPM_RESIZE_NONE;
    desc.batch = 4;
    desc.drop_last = 1;
    loader = spm_loader_create(set, &desc, &err);
    CHECK(loader != NULL);
    if (!loader) return;
    CHECK_INT(spm_loader_next(loader, &batch), -1); /* not started */
    CHECK_INT(spm_loader_error(loader)->status, SPM_E_STATE);
    CHECK(spm_loader_start(loader, 0, NULL, 0) == SPM_OK); /* in order; 14 examples, the last two dropped */
    for (i = 0; i < 3; i++) {
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        CHECK(batch.count == 4 && batch.id[0] == 4 * i && batch.id[3] == 4 * i + 3);
        if (batch.count == 4) CHECK(batch.pixels[24 * 32 * 3 + (2 * 32 + 1) * 3] == ((float)pixel(4 * i + 1, 1, 2, 0) / 255.0f - 0.485f) / 0.229f);
    }
    CHECK_INT(spm_loader_next(loader, &batch), 0);
    /* an order of the caller's, cut off in the middle by another start, and by destroy */
    for (i = 0; i < 3; i++) {
        CHECK(spm_loader_start(loader, 0, order, 5) == SPM_OK);
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        CHECK(batch.id[0] == 20 && batch.id[1] == 3 && batch.id[2] == 3 && batch.id[3] == 0);
    }
    CHECK(spm_loader_start(loader, 0, order, 3) == SPM_E_DATA);
    CHECK(strstr(spm_loader_error(loader)->text, "do not fill one batch of 4") != NULL);
    CHECK(spm_loader_start(loader, 0, &wrong, 1) == SPM_E_ARGUMENT);
    CHECK(spm_loader_start(loader, 0, NULL, 0) == SPM_OK);
    spm_loader_destroy(loader);
    desc.batch = 0; /* 64 */
    desc.drop_last = 0;
    loader = spm_loader_create(set, &desc, &err);
    CHECK(loader && spm_loader_start(loader, 0, order, 5) == SPM_OK && spm_loader_next(loader, &batch) == 1 && batch.count == 5);
    spm_loader_destroy(loader);
    desc.transform.height = 0;
    CHECK(spm_loader_create(set, &desc, &err) == NULL && strstr(err.text, "image size") != NULL);
    spm_dataset_close(set);
    put(ctx, place(ctx, "few/metadata.csv"), "img_filename,y,split,place\na.png,0,0,1\n");
    set = open_set(ctx, "few", SPM_DATA_AUTO, &err);
    desc.transform.height = 24;
    desc.split = SPM_VAL;
    loader = set ? spm_loader_create(set, &desc, &err) : NULL;
    CHECK(loader && spm_loader_start(loader, 0, NULL, 0) == SPM_E_DATA && strstr(spm_loader_error(loader)->text, "the val split has no examples"));
    spm_loader_destroy(loader);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

static void bad_pictures(void)
{
    spm_context *ctx = logged_context(3);
    spm_error err;
    spm_dataset *set;
    spm_dataset_desc where = SPM_ZERO;
    spm_loader_desc desc = SPM_ZERO;
    spm_loader *loader;
    spm_batch batch;
    char path[500];
    int64_t id = -1, seen = 0;
    int got, workers;
    write_birds(ctx, "broken", "/o/ocean/00001.jpg");
    put(ctx, place(ctx, "broken/images/09, a.png"), "no picture at all");
    CHECK(remove(place(ctx, "broken/images/06, a.png")) == 0);
    put(ctx, place(ctx, "broken/images/04, a.png"), "");
    snprintf(path, sizeof path, "%s/broken", root);
    where.path = path;
    desc.transform = spm_transform_make(8, 8);
    desc.batch = 2;
    for (workers = 1; workers <= 3; workers++) { /* whoever decodes: the first bad one in the order is reported, in its place */
        memset(&err, 0, sizeof err);
        set = spm_dataset_open(ctx, &where, &err);
        desc.workers = workers;
        loader = set ? spm_loader_create(set, &desc, &err) : NULL;
        CHECK(loader != NULL);
        if (!loader) return;
        CHECK(spm_loader_start(loader, 0, NULL, 0) == SPM_OK);
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        CHECK_INT(spm_loader_next(loader, &batch), 1);
        CHECK_INT(spm_loader_next(loader, &batch), -1);
        CHECK_INT(spm_loader_next(loader, &batch), -1);
        CHECK(strstr(spm_loader_error(loader)->text, "metadata.csv line 6") != NULL && strstr(spm_loader_error(loader)->text, "images/04, a.png") != NULL);
        spm_loader_destroy(loader);
        spm_dataset_close(set);
    }
    where.skip_bad_images = 1;
    set = spm_dataset_open(ctx, &where, &err);
    loader = set ? spm_loader_create(set, &desc, &err) : NULL;
    CHECK(loader && spm_loader_start(loader, 0, NULL, 0) == SPM_OK);
    while (loader && (got = spm_loader_next(loader, &batch)) == 1) {
        int64_t i;
        for (i = 0; i < batch.count; i++) {
            CHECK(batch.id[i] != 4 && batch.id[i] != 6 && batch.id[i] != 9 && batch.id[i] > id);
            id = batch.id[i];
        }
        seen += batch.count;
    }
    CHECK_INT(seen, 11);
    CHECK_INT(set ? spm_dataset_bad_count(set) : -1, 3);
    CHECK(set && strstr(spm_dataset_bad(set, 1, &id), "06, a.png") != NULL && id == 6);
    CHECK(set && spm_dataset_bad(set, 3, &id) == NULL);
    if (loader) { /* a rest of nothing but bad ones is empty; a split of nothing else is an error */
        int64_t none[2] = { 4, 6 };
        CHECK(spm_loader_start(loader, 0, none, 2) == SPM_OK && spm_loader_next(loader, &batch) == 0);
    }
    spm_loader_destroy(loader);
    spm_dataset_close(set);
    put(ctx, place(ctx, "lost/metadata.csv"), "img_filename,y,split,place\na.png,0,0,1\nb.png,1,0,1\n");
    snprintf(path, sizeof path, "%s/lost", root);
    set = spm_dataset_open(ctx, &where, &err);
    loader = set ? spm_loader_create(set, &desc, &err) : NULL;
    CHECK(loader && spm_loader_start(loader, 0, NULL, 0) == SPM_OK && spm_loader_next(loader, &batch) == -1);
    CHECK(loader && strstr(spm_loader_error(loader)->text, "none of the 2 pictures could be read") != NULL
          && strstr(spm_loader_error(loader)->text, "a.png") != NULL);
    spm_loader_destroy(loader);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* A picture whose red is x and whose green is y, so that the floats tell where a crop came from. */
static void augmentation(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_loader_desc desc = SPM_ZERO;
    spm_loader *loader;
    spm_batch batch;
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int x, y, epoch, flips = 0, pass;
    CHECK(spm_image_create(ctx, 64, 64, &image, NULL) == SPM_OK);
    for (y = 0; y < 64; y++) {
        for (x = 0; x < 64; x++) {
            image.pixels[(y * 64 + x) * 3] = (uint8_t)(60 + 2 * x);
            image.pixels[(y * 64 + x) * 3 + 1] = (uint8_t)(60 + 2 * y);
        }
    }
    CHECK(spm_image_encode_png(ctx, &image, &data, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "one/a.png"), data, size, NULL) == SPM_OK);
    spm_free(ctx, data);
    spm_image_free(ctx, &image);
    put(ctx, place(ctx, "one/metadata.csv"), "img_filename,y,split,place\na.png,0,0,0\n");
    set = open_set(ctx, "one", SPM_DATA_AUTO, &err);
    for (pass = 0; set && pass < 2; pass++) {
        double least = 1, most = 0, low = 10, high = 0;
        desc.transform = spm_transform_make(64, 64);
        for (x = 0; x < 3; x++) {
            desc.transform.mean[x] = 0;
            desc.transform.std[x] = 1.0f / 255.0f;
        }
        desc.transform.resize = SPM_RESIZE_EXACT;
        desc.augment = pass ? SPM_AUGMENT_PAPER : SPM_AUGMENT_LIGHT;
        loader = spm_loader_create(set, &desc, &err);
        flips = 0;
        for (epoch = 0; loader && epoch < 200; epoch++) {
            const float *p;
            CHECK(spm_loader_start(loader, epoch, NULL, 0) == SPM_OK && spm_loader_next(loader, &batch) == 1);
            if (batch.count != 1) break;
            p = batch.pixels + (32 * 64 + 20) * 3;
            flips += p[0] > p[3 * 20];
            if (!pass) { /* border of 4 black pixels, shifts of -4..4 */
                int black = 0, at = (int)(p[0] + 0.5f);
                for (x = 0; x < 64; x++) black += batch.pixels[(32 * 64 + x) * 3] < 1;
                CHECK(black <= 4);
                CHECK(at % 2 == 0 && ((p[0] > p[60] && at >= 60 + 2 * (43 - 4) && at <= 60 + 2 * (43 + 4))
                      || (p[0] < p[60] && at >= 60 + 2 * 16 && at <= 60 + 2 * 24)));
            } else { /* slopes tell the box: pixels per pixel */
                double w = fabs((double)p[0] - (double)p[3 * 20]) / 2 / 20 * 64, h = fabs((double)p[1] - (double)p[3 * 64 * 20 + 1]) / 2 / 20 * 64;
                double area = w * h / 4096, ratio = w / h;
                least = area < least ? area : least;
                most = area > most ? area : most;
                low = ratio < low ? ratio : low;
                high = ratio > high ? ratio : high;
            }
        }
        CHECK(flips > 70 && flips < 130);
        if (pass) {
            CHECK(least > 0.64 && least < 0.78 && most > 0.92 && most < 1.06);
            CHECK(low > 0.7 && low < 0.85 && high < 1.42 && high > 1.17);
        }
        spm_loader_destroy(loader);
    }
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* ---- every allocation made to fail in turn: an error each time, and nothing is left behind ---- */

static failing memory;

/* A context that has so many allocations left once it stands. */
static spm_context *short_context(long allocations)
{
    spm_context *ctx;
    memory.fail_at = 0;
    ctx = failing_context(&memory, 1);
    failing_after(&memory, allocations);
    return ctx;
}

static int load_all(long allocations, const char *name)
{
    spm_dataset_desc where = SPM_ZERO;
    spm_loader_desc desc = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_context *ctx = short_context(allocations);
    spm_dataset *set;
    spm_loader *loader = NULL;
    spm_batch batch;
    char path[500];
    int done = 0;
    snprintf(path, sizeof path, "%s/%s", root, name);
    where.path = path;
    desc.transform = spm_transform_make(8, 8);
    desc.workers = 1;
    desc.augment = SPM_AUGMENT_PAPER;
    set = spm_dataset_open(ctx, &where, &err);
    if (set) loader = spm_loader_create(set, &desc, &err);
    if (loader) {
        spm_status status = spm_loader_start(loader, 0, NULL, 0);
        int got = status ? -1 : 1;
        while (got == 1) got = spm_loader_next(loader, &batch);
        done = got == 0;
        if (got < 0) err = *spm_loader_error(loader);
    }
    if (!done) CHECK_MSG(err.status == SPM_E_MEMORY, err.text[0] ? err.text : "failed without an error");
    spm_loader_destroy(loader);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
    CHECK_INT(memory.live, 0);
    return done;
}

/* Packs few_birds to small.pack with so many allocations; 1 if that was enough. */
static int pack_all(long allocations)
{
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_context *ctx = short_context(1000000);
    spm_dataset *set;
    char path[500], to[500];
    int done = 0;
    snprintf(path, sizeof path, "%s/few_birds", root);
    snprintf(to, sizeof to, "%s/small.pack", root);
    (void)remove(to);
    where.path = path;
    set = spm_dataset_open(ctx, &where, &err);
    failing_after(&memory, allocations);
    done = set && spm_dataset_pack(set, to, NULL, NULL, NULL, &err) == SPM_OK;
    if (!done) {
        CHECK(!test_exists(to));
        CHECK_MSG(err.status == SPM_E_MEMORY, err.text[0] ? err.text : "failed without an error");
    }
    spm_dataset_close(set);
    spm_context_destroy(ctx);
    CHECK_INT(memory.live, 0);
    return done;
}

static void memory_failures(void)
{
    static const char sets[][12] = { "few_birds", "celeba_ok", "tree", "small.tar", "small.pack", "mnist_gz" };
    spm_context *ctx = logged_context(1);
    size_t s;
    FILE *tar;
    char path[500];
    uint8_t *data;
    size_t size;
    put(ctx, place(ctx, "few_birds/metadata.csv"), "img_filename,y,split,place\na.png,0,0,1\nb.png,1,0,0\n");
    put_picture(ctx, place(ctx, "few_birds/a.png"), 1, 12, 12);
    put_picture(ctx, place(ctx, "few_birds/b.png"), 1, 12, 12);
    put(ctx, place(ctx, "celeba_ok/list_attr_celeba.txt"), "1\nBlond_Hair Male\n000001.jpg -1 1\n");
    put(ctx, place(ctx, "celeba_ok/list_eval_partition.txt"), "000001.jpg 0\n");
    put_picture(ctx, place(ctx, "celeba_ok/img_align_celeba/000001.jpg"), 1, 16, 20);
    snprintf(path, sizeof path, "%s/small.tar", root);
    tar = fopen(path, "wb");
    if (tar) {
        tar_add(tar, "x/metadata.csv", "img_filename,y,place\na.png,0,1\n", 31);
        tar_add_file(tar, "x/a.png", place(ctx, "few_birds/a.png"));
        tar_close(tar);
    }
    CHECK(spm_deflate(ctx, "\0\0\x08\x03\0\0\0\1\0\0\0\2\0\0\0\2abcd", 20, 2, &data, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "mnist_gz/train-images-idx3-ubyte.gz"), data, size, NULL) == SPM_OK);
    spm_free(ctx, data);
    CHECK(spm_file_write(ctx, place(ctx, "mnist_gz/train-labels-idx1-ubyte"), "\0\0\x08\1\0\0\0\1", 9, NULL) == SPM_OK);
    for (s = 0; s < 1000 && !pack_all((long)s); s++) continue;
    CHECK(s > 10 && s < 1000);
    spm_context_destroy(ctx);
    for (s = 0; s < sizeof sets / sizeof sets[0]; s++) {
        long n;
        for (n = 0; n < 2000 && !load_all(n, sets[s]); n++) continue;
        CHECK(n > 10 && n < 2000);
    }
}

/* ---- the real sets, where they are ---- */

static void real_sets(void)
{
    const char *data = getenv("SPURMEM_TEST_DATA");
    spm_context *ctx;
    spm_error err = SPM_ZERO;
    spm_dataset *set;
    spm_dataset_desc where = SPM_ZERO;
    char path[700];
    if (!data) SKIP("SPURMEM_TEST_DATA is not set");
    ctx = logged_context(2);
    snprintf(path, sizeof path, "%s/celeba", data);
    where.path = path;
    set = spm_dataset_open(ctx, &where, &err);
    CHECK_STR(err.text, "");
    CHECK_INT(set ? spm_dataset_size(set) : 0, 10000);
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_TRAIN, 0) : 0, 2418);
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_TRAIN, 1) : 0, 2281);
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_VAL, 3) : 0, 7);
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_TEST, 2) : 0, 457);
    spm_dataset_close(set);
    memset(&err, 0, sizeof err);
    snprintf(path, sizeof path, "%s/dominoes", data);
    set = spm_dataset_open(ctx, &where, &err);
    CHECK_STR(err.text, "");
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_TRAIN, 0) : 0, 1898);
    CHECK_INT(set ? spm_dataset_group_count(set, SPM_TRAIN, 2) : 0, 105);
    CHECK_STR(set ? spm_dataset_group_name(set, 1) : NULL, "y=0, place=1");
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* Rotation and ColorJitter: on a plain gray picture brightness scales, contrast, saturation and hue do nothing, and a
 * turned picture has black corners and a whole middle.  The same bits for any number of workers. */
static void changes_by_chance(void)
{
    spm_context *ctx = logged_context(1);
    spm_error err;
    spm_dataset *set;
    spm_loader_desc desc = SPM_ZERO;
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int pass, epoch, i;
    CHECK(spm_image_create(ctx, 32, 32, &image, NULL) == SPM_OK);
    memset(image.pixels, 100, 32 * 32 * 3);
    CHECK(spm_image_encode_png(ctx, &image, &data, &size, NULL) == SPM_OK);
    CHECK(spm_file_write(ctx, place(ctx, "changed/a.png"), data, size, NULL) == SPM_OK);
    spm_free(ctx, data);
    spm_image_free(ctx, &image);
    put(ctx, place(ctx, "changed/metadata.csv"), "img_filename,y,split,place\na.png,0,0,0\n");
    set = open_set(ctx, "changed", SPM_DATA_AUTO, &err);
    desc.transform = spm_transform_make(32, 32);
    desc.transform.resize = SPM_RESIZE_EXACT;
    for (i = 0; i < 3; i++) {
        desc.transform.mean[i] = 0;
        desc.transform.std[i] = 1.0f / 255.0f;
    }
    for (pass = 0; set && pass < 6; pass++) {
        double least = 1000, most = 0, sum = 0;
        int turned = 0;
        memset(desc.jitter, 0, sizeof desc.jitter);
        desc.rotate = pass == 4 ? 60.0f : 0.0f;
        if (pass < 4) desc.jitter[pass] = pass == 3 ? 0.5f : 0.4f;
        if (pass == 5) desc.jitter[0] = 0.2f;
        desc.augment = pass == 5 ? SPM_AUGMENT_PAPER : SPM_AUGMENT_NONE;
        for (epoch = 0; epoch < 100; epoch++) {
            float kept[32 * 32 * 3];
            int workers;
            for (workers = 1; workers < 3; workers++) {
                spm_loader *loader;
                spm_batch batch;
                desc.workers = workers;
                loader = spm_loader_create(set, &desc, &err);
                CHECK_MSG(loader != NULL, err.text);
                if (!loader) break;
                CHECK(spm_loader_start(loader, epoch, NULL, 0) == SPM_OK && spm_loader_next(loader, &batch) == 1);
                if (workers == 1) memcpy(kept, batch.pixels, sizeof kept);
                else CHECK(memcmp(kept, batch.pixels, sizeof kept) == 0);
                spm_loader_destroy(loader);
                if (epoch > 4) break; /* two loaders are enough for some epochs */
            }
            for (i = 0; i < 32 * 32 * 3; i++) {
                least = (double)kept[i] < least ? (double)kept[i] : least;
                most = (double)kept[i] > most ? (double)kept[i] : most;
            }
            turned += kept[0] < 1;
            sum += (double)kept[(16 * 32 + 16) * 3];
        }
        if (pass == 0) CHECK(least >= 59 && least < 65 && most > 135 && most < 141 && fabs(sum / 100 - 100) < 8);
        if (pass >= 1 && pass <= 3) CHECK(least > 99.9 && most < 100.1);
        if (pass == 4) CHECK(turned > 80 && fabs(sum / 100 - 100) < .01 && most < 100.1);
        if (pass == 5) CHECK(least >= 79 && most < 121 && most > 110);
    }
    desc.jitter[3] = .6f;
    CHECK(set && !spm_loader_create(set, &desc, &err) && err.status == SPM_E_ARGUMENT && strstr(err.text, "hue"));
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

int main(void)
{
    test_folder(root, sizeof root, "test_data");
    TEST(names);
    TEST(waterbirds);
    TEST(metadata);
    TEST(celeba);
    TEST(folders);
    TEST(tar_files);
    TEST(blocks);
    TEST(packed);
    TEST(unsteady_files);
    TEST(other_layouts);
    TEST(refusals);
    TEST(transforms);
    TEST(loading);
    TEST(bad_pictures);
    TEST(determinism);
    TEST(repeated_examples);
    TEST(augmentation);
    TEST(changes_by_chance);
    TEST(memory_failures);
    TEST(real_sets);
    return TEST_END;
}
