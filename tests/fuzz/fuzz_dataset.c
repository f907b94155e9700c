/* fuzz_dataset.c - any bytes as a data set; the first byte says what they are:
 *   0 the index of a packed file (its checksum and tail are made right)   1 a packed file behind its magic
 *   2 metadata.csv   3 CelebA's lists, cut at a byte 0xFF   4 a pair of idx files, cut likewise   5 a CIFAR file
 * 2 to 5 stand in a tar file.  Everything that the data set says is read, and its first pictures. */
#define FUZZ_MEMORY (24u << 20) /* 65,536 groups have names */
#include "fuzz.h"
#include "fuzz_file.h"

static void add_tar(const char *name, const void *bytes, size_t size)
{
    static const char zero[512];
    char head[512];
    unsigned sum = 0, i;
    memset(head, 0, sizeof head);
    snprintf(head, 100, "%s", name);
    snprintf(head + 124, 12, "%011lo", (unsigned long)size);
    memset(head + 148, ' ', 8);
    head[156] = '0';
    for (i = 0; i < 512; i++) sum += (unsigned char)head[i];
    snprintf(head + 148, 8, "%06o", sum);
    fuzz_file_add(head, sizeof head);
    fuzz_file_add(bytes, size);
    fuzz_file_add(zero, (512 - size % 512) % 512);
}

static void add_packed(const uint8_t *index, size_t size)
{
    uint8_t ends[32] = { 0 }, pictures[256];
    memset(pictures, 7, sizeof pictures);
    memcpy(ends, SPMI_PACKED_MAGIC, 8);
    fuzz_file_add(ends, sizeof ends);
    fuzz_file_add(pictures, sizeof pictures);
    memset(ends, 0, sizeof ends);
    spmi_pack_put(ends, fuzz_file_used, 8);
    spmi_pack_put(ends + 8, size, 8);
    spmi_pack_put(ends + 16, spmi_crc32(0, index, size), 4);
    memcpy(ends + 24, SPMI_PACKED_MAGIC, 8);
    fuzz_file_add(index, size);
    fuzz_file_add(ends, sizeof ends);
}

/* Writes the file that the input stands for. */
static void build(const uint8_t *data, size_t size)
{
    static const char zeros[1024], attributes[] = "list_attr_celeba.txt", partition[] = "list_eval_partition.txt";
    const uint8_t *rest = data + 1, *cut;
    size_t n = size - 1, first;
    cut = n ? (const uint8_t *)memchr(rest, 0xFF, n) : NULL;
    first = cut ? (size_t)(cut - rest) : n;
    switch (data[0] % 6) {
    case 0: add_packed(rest, n); return;
    case 1:
        fuzz_file_add(SPMI_PACKED_MAGIC, 8);
        fuzz_file_add(rest, n);
        return;
    case 2: add_tar("x/metadata.csv", rest, n); break;
    case 3:
        add_tar(attributes, rest, first);
        if (cut) add_tar(partition, cut + 1, n - first - 1);
        break;
    case 4:
        add_tar("train-images-idx3-ubyte", rest, first);
        if (cut) add_tar("train-labels-idx1-ubyte", cut + 1, n - first - 1);
        break;
    default: add_tar("data_batch_1.bin", rest, n); break;
    }
    fuzz_file_add(zeros, sizeof zeros);
}

FUZZ_BODY(ctx, data, size)
{
    spm_dataset_desc desc = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_dataset *set;
    char path[64];
    int64_t i;
    int s, g, all = 0;
    size_t sum = 0;
    if (!size) return;
    fuzz_file_open(path, sizeof path);
    build(data, size);
    desc.path = path;
    desc.cache_bytes = 1;
    set = spm_dataset_open(ctx, &desc, &err);
    if (!set) {
        if (!err.text[0]) abort();
        return;
    }
    for (i = 0; i < spm_dataset_size(set); i++) {
        const spm_example *e = spm_dataset_example(set, i);
        sum += strlen(e->file);
        if (e->group != e->y * spm_dataset_confounders(set) + e->confounder || e->group < 0
            || e->group >= spm_dataset_groups(set) || e->split >= SPM_SPLITS) abort();
    }
    for (s = 0; s < SPM_SPLITS; s++)
        for (g = 0; g < spm_dataset_groups(set); g++) {
            all += (int)spm_dataset_group_count(set, (spm_split)s, g);
            sum += strlen(spm_dataset_group_name(set, g));
        }
    if (all != spm_dataset_size(set) || sum == (size_t)-1) abort();
    for (i = 0; i < spm_dataset_size(set) && i < 8; i++) {
        spm_image image = SPM_ZERO;
        memset(&err, 0, sizeof err);
        if (spm_dataset_image(set, i, &image, &err) != SPM_OK && (!err.text[0] || image.pixels)) abort();
        spm_image_free(ctx, &image);
    }
    spm_dataset_close(set);
}
