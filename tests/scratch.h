/* scratch.h - what the tests of failures share: a scratch folder, tiny data sets written into it, and a look at what a
 * failure has left there. */
#ifndef SPURMEM_TEST_SCRATCH_H
#define SPURMEM_TEST_SCRATCH_H
#include "test.h"
#include "../spurmem.h"
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch[400];      /* its path */
static spm_context *calm;      /* a context whose allocations succeed */

static inline const char *in_scratch(const char *name)
{
    static char paths[4][800];
    static int next;
    char *path = paths[next++ & 3];
    snprintf(path, 800, "%s/%s", scratch, name);
    return path;
}

/* Removes a folder's plain files and links, and with `deep` what is below it as well. */
static inline void wipe(const char *folder, int deep)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    char path[1200];
    struct stat info;
    if (!dir) return;
    while ((entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(path, sizeof path, "%.800s/%.300s", folder, entry->d_name);
        if (lstat(path, &info) != 0) continue;
        if (!S_ISDIR(info.st_mode)) (void)remove(path);
        else if (deep) {
            wipe(path, 1);
            (void)rmdir(path);
        }
    }
    closedir(dir);
}

/* In memory where there is such a file system: the writers flush to the disk thousands of times here. */
static inline void scratch_begin(const char *name)
{
    spm_context_desc desc = SPM_ZERO;
    desc.threads = 1;
    calm = spm_context_create(&desc);
    snprintf(scratch, sizeof scratch, "%s/spurmem_%s_%ld", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", name, (long)getpid());
    wipe(scratch, 1);
    CHECK_INT(spm_directory_create(calm, scratch, NULL), SPM_OK);
}

static inline void scratch_end(void)
{
    spm_context_destroy(calm);
    wipe(scratch, 1);
    (void)rmdir(scratch);
}

/* Folders are made on the way. */
static inline void put_file(const char *name, const void *data, size_t size)
{
    char folder[800];
    snprintf(folder, sizeof folder, "%s", in_scratch(name));
    *strrchr(folder, '/') = 0;
    CHECK_INT(spm_directory_create(calm, folder, NULL), SPM_OK);
    CHECK_INT(spm_file_write(calm, in_scratch(name), data, size, NULL), SPM_OK);
}

static inline void put_text(const char *name, const char *text)
{
    put_file(name, text, strlen(text));
}

/* A picture that depends on id; JPEG or PNG by its name. */
static inline void put_picture(const char *name, int id, int width, int height)
{
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int i;
    CHECK_INT(spm_image_create(calm, width, height, &image, NULL), SPM_OK);
    for (i = 0; i < width * height * 3; i++) image.pixels[i] = (uint8_t)(id * 37 + i % (width * 3) * 3 + i / 97 * 11);
    if (strstr(name, ".jpg")) CHECK_INT(spm_image_encode_jpeg(calm, &image, 90, 1, &data, &size, NULL), SPM_OK);
    else CHECK_INT(spm_image_encode_png(calm, &image, &data, &size, NULL), SPM_OK);
    put_file(name, data, size);
    spm_free(calm, data);
    spm_image_free(calm, &image);
}

/* `count` pictures of 20 x 16 in the waterbirds layout: the first three quarters for training, where one in eight is a
 * landbird on water and one a waterbird on land, the rest for validation and test. */
static inline void put_birds(const char *name, int count)
{
    char csv[4000], picture[200];
    size_t at = (size_t)snprintf(csv, sizeof csv, "img_id,img_filename,y,split,place,place_filename\n");
    int i;
    for (i = 0; i < count; i++) {
        int split = i < count * 3 / 4 ? 0 : 1 + (i & 1);
        snprintf(picture, sizeof picture, "%s/p/%02d.%s", name, i, i % 3 == 0 ? "jpg" : "png");
        put_picture(picture, i, 20, 16);
        at += (size_t)snprintf(csv + at, sizeof csv - at, "%d,p/%02d.%s,%d,%d,%d,x\n", i, i, i % 3 == 0 ? "jpg" : "png", i / 2 & 1, split,
                               split ? i & 1 : (i / 2 & 1) ^ (i % 8 == 7 || i % 8 == 5));
    }
    snprintf(picture, sizeof picture, "%s/metadata.csv", name);
    put_file(picture, csv, at);
}

static inline spm_dataset *open_set(spm_context *ctx, const char *name, spm_error *err)
{
    spm_dataset_desc desc = SPM_ZERO;
    desc.path = in_scratch(name);
    return spm_dataset_open(ctx, &desc, err);
}

/* Two architectures at 16 x 16 with two classes. */
static inline spm_status tiny_arch(spm_context *ctx, const char *text, spm_arch *arch, spm_error *err)
{
    memset(arch, 0, sizeof *arch);
    arch->height = arch->width_px = 16;
    arch->classes = 2;
    return spm_arch_parse(ctx, text, arch, err);
}
#define TINY_RESNET "resnet18:width=8"
#define TINY_VIT "vit:patch=8,dim=16,depth=1,heads=2,mlp=2"

/* Settings of a training that takes a few milliseconds: 4 pictures a step, one epoch. */
static inline spm_train_desc tiny_training(spm_context *ctx, spm_method method, const char *arch, const char *out, spm_error *err)
{
    spm_train_desc desc = spm_train_desc_init(method);
    (void)tiny_arch(ctx, arch, &desc.arch, err);
    desc.reading.transform = spm_transform_make(16, 16);
    desc.out = out;
    desc.epochs = 1;
    desc.batch = 4;
    desc.workers = 1;
    return desc;
}

/* Every file of a folder that bears a final name must be whole; none may bear a temporary one.  `appended`: 1 where a
 * broken last line of a .jsonl file is right (training takes it away when it goes on). */
static inline void check_folder(const char *what, const char *folder, int appended)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    if (!dir) return;
    while ((entry = readdir(dir)) != NULL) {
        char path[1200], text[1500];
        const char *end = strrchr(entry->d_name, '.');
        spm_error err = SPM_ZERO;
        uint8_t *data = NULL;
        size_t size = 0;
        int whole = 1;
        if (entry->d_name[0] == '.' || !end) continue;
        snprintf(path, sizeof path, "%.800s/%.300s", folder, entry->d_name);
        if (strcmp(end, ".part") == 0) whole = 0;
        else if (strcmp(end, ".safetensors") == 0 || strcmp(end, ".pth") == 0) {
            spm_archive *archive = spm_archive_open(calm, path, &err);
            whole = archive != NULL;
            spm_archive_close(archive);
        } else if (spm_file_read(calm, path, &data, &size, &err) == SPM_OK) {
            if (strcmp(end, ".json") == 0) {
                spm_json_value *root = spm_json_parse(calm, path, (const char *)data, size, &err);
                whole = root != NULL;
                spm_json_free(calm, root);
            } else if (strcmp(end, ".jsonl") == 0) {
                const char *line = (const char *)data, *last = line + size;
                while (whole && line < last) {
                    const char *stop = (const char *)memchr(line, '\n', (size_t)(last - line));
                    spm_json_value *root;
                    if (!stop && appended) break;
                    root = stop ? spm_json_parse(calm, path, line, (size_t)(stop - line), &err) : NULL;
                    whole = root != NULL;
                    spm_json_free(calm, root);
                    if (stop) line = stop + 1;
                }
            } else if (strcmp(end, ".html") == 0) whole = size > 8 && strstr((const char *)data, "</html>") != NULL;
        }
        spm_free(calm, data);
        if (!whole) {
            snprintf(text, sizeof text, "%s leaves a broken file: %.300s %.400s", what, path, err.text);
            CHECK_MSG(0, text);
        }
    }
    closedir(dir);
}
#endif
