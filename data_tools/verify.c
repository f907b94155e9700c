/* verify.c - checks a data set before it is trained on: counts by split and group, every picture decoded, duplicates
 * within and across splits (by their pixels, whatever file they came from).
 *
 *     cc -O2 data_tools/verify.c -o verify -lm && ./verify waterbirds
 */
#include "tool.h"

enum { DATA, FORMAT, TARGET, CONFOUNDER, LIST };

static const tool_option options[] = {
    { "data", 's', "DIR|FILE", NULL, "the data set: any that spurmem reads; the option's name may be left out", 0, 0 },
    { "format", 's', "auto|waterbirds|celeba|metadata|folder|idx|cifar|packed", "auto", "its layout", 0, 0 },
    { "target", 's', "NAME", "Blond_Hair", "CelebA: the attribute to predict", 0, 0 },
    { "confounder", 's', "NAME", "Male", "CelebA: the confounder", 0, 0 },
    { "list", 'i', "N", "20", "name at most so many findings of a kind", 0, 1e9 },
};

/* One picture's pixels as 128 bits. */
typedef struct print {
    uint64_t a, b;
    int64_t id;
    int bad;
} print;

typedef struct verifier {
    spm_dataset *data;
    print *prints;
    int64_t first;
    spm_error error[TOOL_BATCH];
} verifier;

static uint64_t mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return h ^ h >> 29;
}

static void print_of(const spm_image *image, print *p)
{
    size_t n = (size_t)image->width * (size_t)image->height * 3, i;
    uint64_t word;
    p->a = mix(1, (uint64_t)image->width << 32 | (uint64_t)image->height);
    p->b = mix(2, p->a);
    for (i = 0; i + 8 <= n; i += 8) {
        memcpy(&word, image->pixels + i, 8);
        p->a = mix(p->a, word);
        p->b = mix(p->b, word ^ UINT64_C(0xD1B54A32D192ED03));
    }
    for (; i < n; i++) {
        p->a = mix(p->a, image->pixels[i]);
        p->b = mix(p->b, image->pixels[i]);
    }
}

static void look(void *user, int64_t task, int slot)
{
    verifier *v = (verifier *)user;
    print *p = &v->prints[v->first + task];
    spm_image image;
    (void)slot;
    memset(&image, 0, sizeof image);
    memset(&v->error[task], 0, sizeof v->error[task]);
    p->id = v->first + task;
    p->bad = spm_dataset_image(v->data, p->id, &image, &v->error[task]) != SPM_OK;
    if (!p->bad) print_of(&image, p);
    spm_image_free(spm_dataset_context(v->data), &image);
}

static int by_print(const void *left, const void *right)
{
    const print *p = (const print *)left, *q = (const print *)right;
    if (p->bad != q->bad) return p->bad - q->bad;
    if (!p->bad && p->a != q->a) return p->a < q->a ? -1 : 1;
    if (!p->bad && p->b != q->b) return p->b < q->b ? -1 : 1;
    return p->id < q->id ? -1 : p->id > q->id;
}

static void print_counts(const spm_dataset *data)
{
    int s, g, groups = spm_dataset_groups(data);
    printf("%s: %s, %lld pictures, %d classes, %d confounders\n", spm_dataset_path(data),
           spm_data_format_name(spm_dataset_format(data)), (long long)spm_dataset_size(data), spm_dataset_classes(data),
           spm_dataset_confounders(data));
    for (s = 0; s < SPM_SPLITS; s++) {
        int64_t all = spm_dataset_split_size(data, (spm_split)s);
        if (!all) continue;
        printf("  %s: %lld\n", spm_split_name((spm_split)s), (long long)all);
        for (g = 0; g < groups; g++) {
            int64_t n = spm_dataset_group_count(data, (spm_split)s, g);
            printf("    %-40s %8lld  %5.1f %%\n", spm_dataset_group_name(data, g), (long long)n, 100.0 * (double)n / (double)all);
        }
    }
}

/* Runs of equal prints: across splits, or with different labels (both fail), or only repeated. */
static int find_duplicates(const tool *t, const verifier *v, int64_t n)
{
    long list = tool_whole(t, LIST), across = 0, labels = 0, within = 0;
    int64_t i, j;
    for (i = 0; i < n && !v->prints[i].bad; i = j) {
        const spm_example *first = spm_dataset_example(v->data, v->prints[i].id);
        for (j = i + 1; j < n && !v->prints[j].bad && v->prints[j].a == v->prints[i].a && v->prints[j].b == v->prints[i].b; j++) {
            const spm_example *e = spm_dataset_example(v->data, v->prints[j].id);
            int other_split = e->split != first->split, other_label = e->group != first->group;
            long *kind = other_split ? &across : other_label ? &labels : &within;
            if ((*kind)++ < list)
                printf("  the same pixels%s%s: %s (%s) and %s (%s)\n", other_split ? " in two splits" : "",
                       other_label ? ", different labels" : "", first->file, spm_split_name(first->split), e->file,
                       spm_split_name(e->split));
        }
    }
    printf("duplicates: %ld across splits, %ld within a split with other labels, %ld more within a split\n", across, labels,
           within);
    return across || labels;
}

static int run(tool *t, spm_context *ctx)
{
    verifier v = SPM_ZERO;
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    int64_t n, k, bad = 0;
    int found = 0;
    where.path = tool_value(t, DATA);
    where.target = tool_value(t, TARGET);
    where.confounder = tool_value(t, CONFOUNDER);
    where.cache_bytes = 1; /* keep no picture */
    (void)spm_data_format_parse(tool_value(t, FORMAT), &where.format);
    v.data = spm_dataset_open(ctx, &where, &err);
    if (!v.data) return tool_fail(t, "%s", err.text);
    print_counts(v.data);
    n = spm_dataset_size(v.data);
    v.prints = (print *)calloc((size_t)n, sizeof *v.prints);
    if (!v.prints) {
        spm_dataset_close(v.data);
        return tool_fail(t, "out of memory");
    }
    for (v.first = 0; v.first < n && !tool_stop; v.first += TOOL_BATCH) {
        int64_t batch = n - v.first < TOOL_BATCH ? n - v.first : TOOL_BATCH;
        spm_parallel(ctx, batch, look, &v);
        for (k = 0; k < batch; k++)
            if (v.error[k].status && bad++ < tool_whole(t, LIST)) printf("  unreadable: %s\n", v.error[k].text);
        tool_progress(t, (long)(v.first + batch), (long)n);
    }
    if (!tool_stop) {
        printf("%lld of %lld pictures cannot be read\n", (long long)bad, (long long)n);
        qsort(v.prints, (size_t)n, sizeof *v.prints, by_print);
        found = find_duplicates(t, &v, n);
        printf(bad || found ? "not in order\n" : "in order\n");
    }
    free(v.prints);
    spm_dataset_close(v.data);
    if (tool_stop) return tool_fail(t, "stopped");
    return bad || found;
}

int main(int argc, char **argv)
{
    tool t = tool_make("verify",
        "usage: verify DATA [options]\n\n"
        "Checks a data set: counts by split and group, every picture decoded, duplicates by their pixels.\n",
        "Pictures that cannot be read, and the same pixels in two splits or with different labels, are failures (1).\n",
        options, sizeof options / sizeof options[0]);
    t.operand = 1;
    return tool_main(&t, argc, argv, run);
}
