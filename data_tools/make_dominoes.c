/* make_dominoes.c - Dominoes (Shah et al. 2020, Kirichenko et al. 2022): above an MNIST digit, which is the confounder,
 * below a CIFAR-10 or Fashion-MNIST picture, which is the class.  In training the digit agrees with the class for most
 * pictures, in validation and test for half of them.
 *
 *     cc -O2 data_tools/make_dominoes.c -o make_dominoes -lm
 *     ./make_dominoes --mnist MNIST --objects cifar-10-batches-bin --out dominoes
 */
#include "tool.h"

enum { MNIST, OBJECTS, OUT, CLASSES, DIGITS, CORRELATION, TRAIN, VAL, TEST, FORMAT, QUALITY, SEED, FORCE };

static const tool_option options[] = {
    TOOL_MNIST,
    { "objects", 's', "DIR", NULL, "CIFAR-10 (binary version) or Fashion-MNIST's idx files", 0, 0 },
    TOOL_OUT,
    { "classes", 's', "A,B", "", "two classes of the objects (CIFAR 1,9 automobile and truck; Fashion 3,4 dress and coat)",
      0, 0 },
    { "digits", 's', "A,B", "0,1", "two digits; A belongs to the first class", 0, 0 },
    { "correlation", 'n', "F", "0.95", "share of training pictures whose digit agrees with the class", 0, 1 },
    { "train", 'i', "N", "8000", "pictures, from the training files", 2, 1000000 },
    { "val", 'i', "N", "2000", "pictures, from the training files, others than train's", 0, 1000000 },
    { "test", 'i', "N", "2000", "pictures, from the test files", 0, 1000000 },
    { "format", 's', "png|jpg", "png", "of the pictures", 0, 0 },
    { "quality", 'i', "N", "95", "of jpg", 1, 100 },
    TOOL_SEED,
    TOOL_FORCE,
};

typedef struct dominoes {
    tool *t;
    spm_dataset *digits, *objects;
    int digit[2], class_of[2];
    tool_item *items;
} dominoes;

/* The examples of `label` in the training (0) or test (1) files, shuffled; *n of them. NULL if memory runs out. */
static int64_t *examples_of(const spm_dataset *data, int label, int test, uint64_t seed, uint64_t stream, long *n)
{
    spm_split split = test ? SPM_TEST : SPM_TRAIN;
    const int64_t *ids = spm_dataset_split_ids(data, split);
    int64_t size = spm_dataset_split_size(data, split), i, k = 0;
    int64_t *found = (int64_t *)malloc((size_t)(size + 1) * sizeof *found);
    int64_t *order = (int64_t *)malloc((size_t)(size + 1) * sizeof *order);
    if (found && order) {
        for (i = 0; i < size; i++)
            if (spm_dataset_example(data, ids[i])->y == label) found[k++] = ids[i];
        spm_random_permutation(seed, stream, k, order);
        for (i = 0; i < k; i++) order[i] = found[order[i]];
    } else {
        free(order);
        order = NULL;
    }
    free(found);
    *n = (long)k;
    return order;
}

/* A 28 x 28 or 32 x 32 picture into the half of a 64 x 32 one that begins at row `top`, centred on black. */
static void put_half(const spm_image *from, spm_image *to, int top)
{
    int dx = (32 - from->width) / 2, dy = (32 - from->height) / 2, y;
    for (y = 0; y < from->height; y++)
        memcpy(to->pixels + ((size_t)(top + dy + y) * 32 + (size_t)dx) * 3,
               from->pixels + (size_t)y * (size_t)from->width * 3, (size_t)from->width * 3);
}

static void make(void *user, const tool_item *item, long index, spm_image *image, spm_error *err)
{
    dominoes *d = (dominoes *)user;
    spm_context *ctx = spm_dataset_context(d->digits);
    spm_image half = SPM_ZERO;
    int k;
    (void)index;
    if (spm_image_create(ctx, 32, 64, image, err)) return;
    memset(image->pixels, 0, 32 * 64 * 3);
    for (k = 0; k < 2; k++) {
        if (spm_dataset_image(k ? d->objects : d->digits, k ? item->source : item->other, &half, err)) return;
        if (half.width <= 32 && half.height <= 32) put_half(&half, image, 32 * k);
        else {
            err->status = SPM_E_DATA;
            snprintf(err->text, sizeof err->text, "%.300s: pictures of %d x %d do not fit in 32 x 32",
                     spm_dataset_path(k ? d->objects : d->digits), half.width, half.height);
        }
        spm_image_free(ctx, &half);
        if (err->status) return;
    }
}

static int two_labels(tool *t, int option, const char *text, int labels[2])
{
    int used = 0;
    if (sscanf(text, "%d,%d%n", &labels[0], &labels[1], &used) == 2 && !text[used] && labels[0] != labels[1]
        && labels[0] >= 0 && labels[1] >= 0) return 1;
    tool_fail(t, "--%s %s: two different whole numbers are wanted, as 1,9", t->options[option].name, text);
    return 0;
}

/* Fills the items of one split: first n of `objects` behind `skip` for each class, groups, digits.  `first` is the index
 * of the split's first item. */
static int fill_split(dominoes *d, int split, long first, long n, const long skip[2])
{
    tool *t = d->t;
    uint64_t seed = tool_seed(t, SEED), stream = 10u * (uint64_t)(split + 1);
    long *member = (long *)malloc((size_t)(n + 1) * sizeof *member), i, have[2] = { 0, 0 }, next[2] = { 0, 0 };
    int64_t *object[2], *digit[2], *order = (int64_t *)malloc((size_t)(n + 1) * sizeof *order);
    int k, status = 0;
    object[1] = digit[1] = NULL;
    for (k = 0; !status && k < 2; k++) { /* the same shuffle for train and val, which take one part each */
        long count;
        object[k] = examples_of(d->objects, d->class_of[k], split == 2, seed, (uint64_t)k, &count);
        digit[k] = examples_of(d->digits, d->digit[k], split == 2, seed, 2u + (uint64_t)k, &have[k]);
        if (!object[k] || !digit[k]) status = 1;
        else if (!have[k])
            status = tool_fail(t, "%s: has no %s picture of digit %d", tool_value(t, MNIST),
                               split == 2 ? "test" : "training", d->digit[k]);
        else if (count - skip[k] < (n + 1 - k) / 2)
            status = tool_fail(t, "%s: has %ld %s pictures of class %d, %ld are wanted for %s%s; ask for fewer",
                               tool_value(t, OBJECTS), count, split == 2 ? "test" : "training", d->class_of[k],
                               skip[k] + (n + 1 - k) / 2, skip[k] ? "train and " : "", spm_split_name((spm_split)split));
    }
    if (!member || !order) status = 1;
    if (!status) spm_random_permutation(seed, stream, n, order);
    for (k = 0; !status && k < 2; k++) {
        long m = 0;
        for (i = 0; i < n; i++) {
            tool_item *item = &d->items[first + i];
            if (order[i] % 2 != k) continue;
            item->y = k;
            item->source = (long)object[k][skip[k] + m];
            member[m++] = first + i;
        }
        if (!tool_draw_confounders(d->items, member, m, k, 2, split ? 0.5 : tool_number(t, CORRELATION), seed,
                                   stream + 1u + (uint64_t)k)) status = 1;
    }
    for (i = 0; !status && i < n; i++) { /* digits serve again when they are used up; val's begin behind train's */
        tool_item *item = &d->items[first + i];
        long start = split == 1 ? have[item->a] / 2 : 0;
        item->other = (long)digit[item->a][(start + next[item->a]++) % have[item->a]];
        tool_item_number(item, split, i, tool_value(t, FORMAT));
        snprintf(item->place, sizeof item->place, "mnist_%d", d->digit[item->a]);
    }
    for (k = 0; k < 2; k++) {
        free(object[k]);
        free(digit[k]);
    }
    free(member);
    free(order);
    return status;
}

static int write_set(dominoes *d, spm_context *ctx)
{
    tool *t = d->t;
    tool_set set;
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    char names[2][240], made[400];
    long n[3], first = 0;
    long none[2] = { 0, 0 }, taken[2];
    int s, k, status = 0, fashion;
    const char *classes = tool_value(t, CLASSES);
    where.path = tool_value(t, MNIST);
    where.format = SPM_DATA_IDX;
    d->digits = spm_dataset_open(ctx, &where, &err);
    where.path = tool_value(t, OBJECTS);
    where.format = SPM_DATA_AUTO;
    if (d->digits) d->objects = spm_dataset_open(ctx, &where, &err);
    if (!d->objects) return tool_fail(t, "%s", err.text);
    fashion = spm_dataset_format(d->objects) == SPM_DATA_IDX;
    if (!fashion && spm_dataset_format(d->objects) != SPM_DATA_CIFAR)
        return tool_fail(t, "%s: is neither CIFAR-10 (binary version) nor Fashion-MNIST (idx files)", where.path);
    if (!two_labels(t, CLASSES, *classes ? classes : fashion ? "3,4" : "1,9", d->class_of)) return 2;
    if (!two_labels(t, DIGITS, tool_value(t, DIGITS), d->digit)) return 2;
    for (k = 0; k < 3; k++) n[k] = tool_whole(t, TRAIN + k);
    d->items = (tool_item *)calloc((size_t)(n[0] + n[1] + n[2]), sizeof *d->items);
    taken[0] = (n[0] + 1) / 2;
    taken[1] = n[0] / 2;
    for (s = 0; d->items && !status && s < 3; s++) {
        status = fill_split(d, s, first, n[s], s == 1 ? taken : none);
        first += n[s];
    }
    if (!d->items || status) return status ? status : tool_fail(t, "out of memory");
    set = tool_set_make(t, ctx, tool_value(t, OUT), d->items, n[0] + n[1] + n[2], make, d);
    set.quality = (int)tool_whole(t, QUALITY);
    if (fashion && !*classes)
        snprintf(names[0], sizeof names[0], "dress\ncoat\n");
    else if (!fashion && !*classes)
        snprintf(names[0], sizeof names[0], "automobile\ntruck\n");
    else
        snprintf(names[0], sizeof names[0], "%.100s\n%.100s\n", spm_dataset_class_name(d->objects, d->class_of[0]),
                 spm_dataset_class_name(d->objects, d->class_of[1]));
    snprintf(names[1], sizeof names[1], "digit %d\ndigit %d\n", d->digit[0], d->digit[1]);
    set.class_names = names[0];
    set.confounder_names = names[1];
    snprintf(made, sizeof made, "{\"tool\":\"make_dominoes\",\"seed\":%.0f,\"correlation\":%g,\"classes\":[%d,%d],"
             "\"digits\":[%d,%d],\"train\":%ld,\"val\":%ld,\"test\":%ld}\n", tool_number(t, SEED),
             tool_number(t, CORRELATION), d->class_of[0], d->class_of[1], d->digit[0], d->digit[1], n[0], n[1], n[2]);
    return tool_write_set(&set, "make_dominoes.json", made, tool_on(t, FORCE));
}

static int run(tool *t, spm_context *ctx)
{
    dominoes d = SPM_ZERO;
    int status;
    d.t = t;
    status = write_set(&d, ctx);
    free(d.items);
    spm_dataset_close(d.objects);
    spm_dataset_close(d.digits);
    return status;
}

int main(int argc, char **argv)
{
    tool t = tool_make("make_dominoes",
        "usage: make_dominoes --mnist DIR --objects DIR --out DIR [options]\n\n"
        "Makes Dominoes, 64 high x 32 wide: above an MNIST digit (the confounder), below a CIFAR-10 or\n"
        "Fashion-MNIST picture (the class), in the Waterbirds layout.\n",
        "Every object is used once; digits serve again when they are used up. fetch.sh says where the files are.\n"
        "spurmem train --data DIR --arch resnet18:width=16,stem=cifar --image-size 64x32 --resize none --out RUN\n",
        options, sizeof options / sizeof options[0]);
    return tool_main(&t, argc, argv, run);
}
