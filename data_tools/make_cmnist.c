/* make_cmnist.c - coloured MNIST, two ways.
 *   two   Arjovsky et al. 2019 (IRM): the class is digit < 5 or not, with a quarter of the labels flipped; the digit is
 *         drawn red or green, and the colour agrees with the (noisy) label for most training pictures.
 *   five  SpuCoMNIST (Joshi et al. 2023): five classes {0,1} {2,3} {4,5} {6,7} {8,9} and five background colours; how
 *         much of the background is coloured (magnitude) or how widely it is scattered (variance) sets the difficulty.
 *
 *     cc -O2 data_tools/make_cmnist.c -o make_cmnist -lm
 *     ./make_cmnist --mnist MNIST --out cmnist
 */
#include "tool.h"

enum { MNIST, OUT, VARIANT, DIFFICULTY, CORRELATION, NOISE, VAL_FRACTION, LIMIT, SEED, FORCE };

static const tool_option options[] = {
    TOOL_MNIST,
    TOOL_OUT,
    { "variant", 's', "two|five", "five", "two: red and green digits; five: SpuCoMNIST's coloured backgrounds", 0, 0 },
    { "difficulty", 's',
      "magnitude-large|magnitude-medium|magnitude-small|variance-low|variance-medium|variance-high",
      "magnitude-large", "five: see below", 0, 0 },
    { "correlation", 'n', "F", "", "share of training pictures with their class's colour (five .995, two .9)", 0, 1 },
    { "label-noise", 'n', "F", "", "share of labels that are wrong (five 0, training only; two .25, everywhere)", 0, 1 },
    { "val-fraction", 'n', "F", "0.2", "share of the training files that becomes validation", 0, 0.9 },
    { "limit", 'i', "N", "0", "use the first N digits of the training and of the test files; 0: all", 0, 1e6 },
    TOOL_SEED,
    TOOL_FORCE,
};

typedef struct cmnist {
    tool *t;
    spm_dataset *digits;
    tool_item *items;
    int classes;      /* 2 or 5 */
    uint64_t seed;
} cmnist;

/* Colour k of five: hue k / 5 at full saturation and value. */
static void hue(int k, uint8_t rgb[3])
{
    static const uint8_t table[5][3] = { { 255, 0, 0 }, { 204, 255, 0 }, { 0, 255, 102 }, { 0, 102, 255 },
                                         { 204, 0, 255 } };
    memcpy(rgb, table[k], 3);
}

/* 1 where the background is coloured: `room` x `room` pixels of the upper left corner, or 49 of them drawn at random. */
static void background(const char *difficulty, uint64_t seed, uint64_t stream, int width, int height, uint8_t *on)
{
    int64_t order[28 * 28];
    int room = strcmp(difficulty, "magnitude-medium") == 0 ? 4 : strcmp(difficulty, "magnitude-small") == 0 ? 2
             : strcmp(difficulty, "variance-low") == 0 ? 7 : strcmp(difficulty, "variance-medium") == 0 ? 14 : 28;
    int drawn = strcmp(difficulty, "variance-medium") == 0 || strcmp(difficulty, "variance-high") == 0, i, n;
    n = room * room;
    memset(on, strcmp(difficulty, "magnitude-large") == 0, (size_t)(width * height));
    if (drawn) spm_random_permutation(seed, stream, n, order);
    for (i = 0; i < (drawn ? 49 : n); i++) {
        int at = drawn ? (int)order[i] : i, x = at % room, y = at / room;
        if (x < width && y < height) on[y * width + x] = 1;
    }
}

static void make(void *user, const tool_item *item, long index, spm_image *image, spm_error *err)
{
    cmnist *c = (cmnist *)user;
    uint8_t on[64 * 64], rgb[3];
    int i, k, n;
    if (spm_dataset_image(c->digits, item->source, image, err)) return;
    n = image->width * image->height;
    if (image->width > 64 || image->height > 64) {
        err->status = SPM_E_DATA;
        snprintf(err->text, sizeof err->text, "%.300s: pictures of %d x %d are no MNIST digits",
                 spm_dataset_path(c->digits), image->width, image->height);
        return;
    }
    if (c->classes == 2) { /* red or green digit on black: the other channels go */
        for (i = 0; i < n; i++)
            for (k = 0; k < 3; k++)
                if (k != item->a) image->pixels[3 * i + k] = 0;
        return;
    }
    hue(item->a, rgb);
    background(tool_value(c->t, DIFFICULTY), c->seed, 1000u + (uint64_t)index, image->width, image->height, on);
    for (i = 0; i < n; i++)
        if (on[i] && image->pixels[3 * i] == 0) memcpy(image->pixels + 3 * i, rgb, 3);
}

/* Labels of the items of one split (indices first..first + n): classes, noise, colours. */
static int fill_split(cmnist *c, int split, long first, long n, double correlation, double noise)
{
    uint64_t stream = 100u * (uint64_t)(split + 1);
    long *member = (long *)malloc((size_t)(n + 1) * sizeof *member), i, m;
    uint8_t *clean = (uint8_t *)malloc((size_t)n + 1);
    int64_t *order = (int64_t *)malloc((size_t)(n + 1) * sizeof *order);
    int y, status = !member || !clean || !order, two = c->classes == 2;
    static const char colours[5][8] = { "red", "lime", "spring", "blue", "violet" };
    for (i = 0; !status && i < n; i++) {
        int digit = spm_dataset_example(c->digits, c->items[first + i].source)->y;
        clean[i] = (uint8_t)(two ? digit >= 5 : digit / 2);
        c->items[first + i].y = clean[i];
    }
    if (!status && (two || !split)) { /* round(noise * n) labels become one of the others */
        spm_random_permutation(c->seed, stream, n, order);
        for (i = 0; i < (long)floor(noise * (double)n + 0.5); i++) {
            tool_item *item = &c->items[first + order[i]];
            item->y = (item->y + 1 + (int)spm_random_below(c->seed, stream + 1, (uint64_t)i, (uint32_t)c->classes - 1))
                      % c->classes;
        }
    }
    for (y = 0; !status && y < c->classes; y++) { /* two: the colour goes with the label as it is; five: with the digit */
        for (i = m = 0; i < n; i++)
            if ((two ? c->items[first + i].y : clean[i]) == y) member[m++] = first + i;
        status = !tool_draw_confounders(c->items, member, m, y, c->classes, split ? 1.0 / c->classes : correlation,
                                        c->seed, stream + 2u + (uint64_t)y);
    }
    for (i = 0; !status && i < n; i++) {
        tool_item *item = &c->items[first + i];
        tool_item_number(item, split, i, "png");
        snprintf(item->place, sizeof item->place, "%s", two ? item->a ? "green" : "red" : colours[item->a]);
    }
    free(member);
    free(clean);
    free(order);
    return status ? tool_fail(c->t, "out of memory") : 0;
}

static int write_set(cmnist *c, spm_context *ctx)
{
    tool *t = c->t;
    tool_set set;
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    int two = tool_is(t, VARIANT, "two"), s, status = 0;
    double correlation = *tool_value(t, CORRELATION) ? tool_number(t, CORRELATION) : two ? 0.9 : 0.995;
    double noise = *tool_value(t, NOISE) ? tool_number(t, NOISE) : two ? 0.25 : 0.0;
    int64_t size[2], *order = NULL, i;
    long n[3], first = 0;
    char made[400];
    where.path = tool_value(t, MNIST);
    where.format = SPM_DATA_IDX;
    where.limit = tool_whole(t, LIMIT);
    c->digits = spm_dataset_open(ctx, &where, &err);
    if (!c->digits) return tool_fail(t, "%s", err.text);
    if (spm_dataset_classes(c->digits) > 10)
        return tool_fail(t, "%s: has a label %d; digits are wanted", where.path, spm_dataset_classes(c->digits) - 1);
    c->classes = two ? 2 : 5;
    c->seed = tool_seed(t, SEED);
    size[0] = spm_dataset_split_size(c->digits, SPM_TRAIN);
    size[1] = spm_dataset_split_size(c->digits, SPM_TEST);
    n[1] = (long)floor(tool_number(t, VAL_FRACTION) * (double)size[0] + 0.5);
    n[0] = (long)size[0] - n[1];
    n[2] = (long)size[1];
    c->items = (tool_item *)calloc((size_t)(size[0] + size[1] + 1), sizeof *c->items);
    order = (int64_t *)malloc((size_t)(size[0] + 1) * sizeof *order);
    if (!c->items || !order) status = tool_fail(t, "out of memory");
    if (!status) spm_random_permutation(c->seed, 1, size[0], order);
    for (i = 0; !status && i < size[0]; i++)
        c->items[i].source = (long)spm_dataset_split_ids(c->digits, SPM_TRAIN)[order[i]];
    for (i = 0; !status && i < size[1]; i++)
        c->items[size[0] + i].source = (long)spm_dataset_split_ids(c->digits, SPM_TEST)[i];
    free(order);
    for (s = 0; !status && s < 3; s++) {
        status = fill_split(c, s, first, n[s], correlation, noise);
        first += n[s];
    }
    if (status) return status;
    set = tool_set_make(t, ctx, tool_value(t, OUT), c->items, n[0] + n[1] + n[2], make, c);
    set.classes = set.confounders = c->classes;
    set.class_names = two ? "digit 0-4\ndigit 5-9\n" : "digit 0-1\ndigit 2-3\ndigit 4-5\ndigit 6-7\ndigit 8-9\n";
    set.confounder_names = two ? "red\ngreen\n" : "red\nlime\nspring\nblue\nviolet\n";
    snprintf(made, sizeof made, "{\"tool\":\"make_cmnist\",\"variant\":\"%s\",\"difficulty\":\"%s\",\"seed\":%.0f,"
             "\"correlation\":%g,\"label_noise\":%g}\n", tool_value(t, VARIANT), two ? "" : tool_value(t, DIFFICULTY),
             tool_number(t, SEED), correlation, noise);
    return tool_write_set(&set, "make_cmnist.json", made, tool_on(t, FORCE));
}

static int run(tool *t, spm_context *ctx)
{
    cmnist c = SPM_ZERO;
    int status;
    c.t = t;
    status = write_set(&c, ctx);
    free(c.items);
    spm_dataset_close(c.digits);
    return status;
}

int main(int argc, char **argv)
{
    tool t = tool_make("make_cmnist",
        "usage: make_cmnist --mnist DIR --out DIR [options]\n\n"
        "Makes coloured MNIST in the Waterbirds layout: y the class, place the colour.\n",
        "Difficulty of five, easiest first: the background is coloured\n"
        "  magnitude-large   everywhere         variance-low      in the 7 x 7 pixels of one corner\n"
        "  magnitude-medium  in 4 x 4 pixels    variance-medium   in 49 pixels drawn from 14 x 14\n"
        "  magnitude-small   in 2 x 2 pixels    variance-high     in 49 pixels drawn from 28 x 28\n"
        "Training pictures without their class's colour have the others in turn; validation and test have every\n"
        "colour equally often. fetch.sh says where the files are.\n"
        "spurmem train --data DIR --arch resnet20 --image-size 28 --resize none --out RUN\n",
        options, sizeof options / sizeof options[0]);
    return tool_main(&t, argc, argv, run);
}
