/* make_waterbirds.c - Waterbirds (Sagawa et al. 2020) from the public archives: birds of CUB-200-2011, cut out by their
 * segmentations, on backgrounds of Places365.  Land: bamboo_forest, forest/broadleaf; water: ocean, lake/natural.
 *
 *     cc -O2 data_tools/make_waterbirds.c -o make_waterbirds -lm
 *     ./make_waterbirds --cub CUB_200_2011 --places places365 --out waterbirds
 *
 * The published recipe: class, split (CUB's test pictures; a fifth of its training pictures becomes validation), group
 * counts (95 % in training, one half elsewhere), cropping, blending and columns.  Its random draws had no fixed seed, so
 * which picture stands where can be had only from its own metadata.csv: --like METADATA.csv repeats that to the picture
 * and the background.
 */
#include "tool.h"

enum { CUB, PLACES, OUT, SEGMENTATIONS, LIKE, CORRELATION, VAL_FRACTION, REUSE, FORMAT, QUALITY, SEED, FORCE };

static const tool_option options[] = {
    { "cub", 's', "DIR", NULL, "CUB_200_2011, unpacked: images.txt, train_test_split.txt, images/", 0, 0 },
    { "places", 's', "DIR", NULL, "Places365, unpacked: data_large, data_256 or train, or what is in it", 0, 0 },
    TOOL_OUT,
    { "segmentations", 's', "DIR", "", "CUB's segmentations, unpacked (segmentations in or beside the CUB folder)", 0, 0 },
    { "like", 's', "FILE", "", "metadata.csv whose pictures, splits, places and backgrounds are repeated", 0, 0 },
    { "correlation", 'n', "F", "0.95", "share of training pictures whose place agrees with the bird", 0, 1 },
    { "val-fraction", 'n', "F", "0.2", "share of CUB's training pictures that becomes validation", 0, 0.9 },
    { "reuse-places", 'b', NULL, NULL, "use backgrounds again when there are too few", 0, 0 },
    { "format", 's', "jpg|png", "jpg", "of the pictures", 0, 0 },
    { "quality", 'i', "N", "75", "of jpg; 75 with half chroma, as published", 1, 100 },
    TOOL_SEED,
    TOOL_FORCE,
};

/* The four categories: land, land, water, water; as in the archive's folders by letter, and as in the flat ones. */
static const char categories[4][2][24] = {
    { "b/bamboo_forest", "bamboo_forest" },
    { "f/forest/broadleaf", "forest-broadleaf" },
    { "o/ocean", "ocean" },
    { "l/lake/natural", "lake-natural" },
};

/* Species (parts of CUB's folder names) that live on water: seabirds, then waterfowl.  The published set looks for the
 * same parts, so that western and eastern species (a pewee, a meadowlark, a towhee) are terns there, and here. */
static const char water_birds[][16] = {
    "albatross", "auklet", "cormorant", "frigatebird", "fulmar", "gull", "jaeger", "kittiwake", "pelican", "puffin",
    "tern", "gadwall", "grebe", "mallard", "merganser", "guillemot", "pacific_loon"
};

typedef struct waterbirds {
    tool *t;
    spm_context *ctx;
    tool_item *items;
    char (*source)[200];       /* [count] CUB's file names; items have .png in their place if asked for */
    long count;
    char segmentations[1200], places[1200];
    int flat;                  /* 1: categories[.][1] are the folders' names */
} waterbirds;

static int is_folder(const char *path)
{
    DIR *folder = opendir(path);
    if (folder) closedir(folder);
    return folder != NULL;
}

static char *read_text(waterbirds *w, const char *folder, const char *name)
{
    char path[1400];
    uint8_t *data;
    size_t size;
    spm_error err;
    memset(&err, 0, sizeof err);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!spm_file_read(w->ctx, path, &data, &size, &err)) return (char *)data;
    tool_fail(w->t, "%s", err.text);
    return NULL;
}

/* 1 for a species of the water, from "001.Black_footed_Albatross/..." */
static int is_water_bird(const char *file)
{
    char species[100];
    const char *dot = strchr(file, '.');
    size_t i, n = 0;
    for (dot = dot ? dot + 1 : file; *dot && *dot != '/' && n + 1 < sizeof species; dot++)
        species[n++] = (char)(*dot >= 'A' && *dot <= 'Z' ? *dot + 32 : *dot);
    species[n] = 0;
    for (i = 0; i < sizeof water_birds / sizeof water_birds[0]; i++)
        if (strstr(species, water_birds[i])) return 1;
    return 0;
}

/* The next "NUMBER WORD" line of a list; 0 at its end, -1 where a line is not like that. */
static int next_line(char **at, long *number, char *word, size_t size)
{
    char *end;
    size_t n;
    *at += strspn(*at, "\r\n");
    if (!**at) return 0;
    *number = strtol(*at, &end, 10);
    if (end == *at || *end != ' ') return -1;
    end += strspn(end, " ");
    n = strcspn(end, " \r\n");
    if (n == 0 || n >= size) return -1;
    memcpy(word, end, n);
    word[n] = 0;
    *at = end + n;
    return 1;
}

/* images.txt and train_test_split.txt: names, classes, and split 0 (CUB's training pictures) or 2. */
static int read_cub(waterbirds *w)
{
    const char *cub = tool_value(w->t, CUB);
    char *images = read_text(w, cub, "images.txt"), *splits = images ? read_text(w, cub, "train_test_split.txt") : NULL;
    char *at = images, *split_at = splits, word[200], flag[16];
    long id, split_id, room = 0;
    int got, status = images && splits ? 0 : 1;
    while (!status && (got = next_line(&at, &id, word, sizeof word)) != 0) {
        tool_item *item;
        if (got < 0 || next_line(&split_at, &split_id, flag, sizeof flag) != 1 || id != split_id
            || (strcmp(flag, "0") != 0 && strcmp(flag, "1") != 0)) {
            status = tool_fail(w->t, "%s: images.txt or train_test_split.txt, line %ld: wants \"%ld NAME\" and \"%ld 0|1\"",
                               cub, w->count + 1, w->count + 1, w->count + 1);
            break;
        }
        if (w->count == room) {
            void *items = realloc(w->items, (size_t)(room = 2 * room + 1024) * sizeof *w->items);
            void *source = items ? realloc(w->source, (size_t)room * sizeof *w->source) : NULL;
            if (items) w->items = (tool_item *)items;
            if (source) w->source = (char (*)[200])source;
            if (!items || !source) {
                status = tool_fail(w->t, "out of memory");
                break;
            }
        }
        item = &w->items[w->count];
        memset(item, 0, sizeof *item);
        snprintf(w->source[w->count], sizeof *w->source, "%s", word);
        item->y = is_water_bird(word);
        item->split = flag[0] == '1' ? 0 : 2;
        item->source = w->count++;
    }
    if (!status && !w->count) status = tool_fail(w->t, "%s: images.txt is empty", cub);
    spm_free(w->ctx, images);
    spm_free(w->ctx, splits);
    return status;
}

/* Draws validation out of training, and places by class and split. */
static int draw_groups(waterbirds *w)
{
    uint64_t seed = tool_seed(w->t, SEED);
    double fraction = tool_number(w->t, VAL_FRACTION);
    long *member = (long *)malloc((size_t)w->count * sizeof *member), i, n = 0, k;
    int64_t *order = (int64_t *)malloc((size_t)w->count * sizeof *order);
    int s, y, status = !member || !order;
    for (i = 0; !status && i < w->count; i++)
        if (w->items[i].split == 0) member[n++] = i;
    if (!status) spm_random_permutation(seed, 1, n, order);
    for (k = 0; !status && k < (long)rint(fraction * (double)n); k++) w->items[member[order[k]]].split = 1;
    for (s = 0; !status && s < 3; s++) {
        for (y = 0; !status && y < 2; y++) {
            double share = s ? 0.5 : tool_number(w->t, CORRELATION), water; /* as published: rounded on water, half to even */
            for (i = n = 0; i < w->count; i++)
                if (w->items[i].split == s && w->items[i].y == y) member[n++] = i;
            water = rint((y ? share : 1 - share) * (double)n);
            share = n ? (y ? water : (double)n - water) / (double)n : 0;
            status = !tool_draw_confounders(w->items, member, n, y, 2, share, seed, 10u + 2u * (uint64_t)s + (uint64_t)y);
        }
    }
    free(member);
    free(order);
    return status ? tool_fail(w->t, "out of memory") : 0;
}

/* Finds the folder that all four categories lie in. */
static int find_places(waterbirds *w)
{
    static const char roots[][32] = { "", "data_large/", "data_256/", "train/", "places365_standard/train/" };
    char path[1400];
    size_t r;
    int flat, k;
    for (r = 0; r < sizeof roots / sizeof roots[0]; r++) {
        for (flat = 0; flat < 2; flat++) {
            for (k = 0; k < 4; k++) {
                snprintf(path, sizeof path, "%.1000s/%s%s", tool_value(w->t, PLACES), roots[r], categories[k][flat]);
                if (!is_folder(path)) break;
            }
            if (k < 4) continue;
            snprintf(w->places, sizeof w->places, "%.1000s/%s", tool_value(w->t, PLACES), roots[r]);
            w->flat = flat;
            return 0;
        }
    }
    return tool_fail(w->t, "%s: the folders b/bamboo_forest, f/forest/broadleaf, o/ocean and l/lake/natural are not in "
                     "it, nor in data_large, data_256 or train below it", tool_value(w->t, PLACES));
}

static int find_segmentations(waterbirds *w)
{
    static const char below[][20] = { "segmentations", "../segmentations" };
    int k;
    if (*tool_value(w->t, SEGMENTATIONS)) {
        snprintf(w->segmentations, sizeof w->segmentations, "%.1000s", tool_value(w->t, SEGMENTATIONS));
        if (is_folder(w->segmentations)) return 0;
        return tool_fail(w->t, "%s: is no folder", w->segmentations);
    }
    for (k = 0; k < 2; k++) {
        snprintf(w->segmentations, sizeof w->segmentations, "%.1000s/%s", tool_value(w->t, CUB), below[k]);
        if (is_folder(w->segmentations)) return 0;
    }
    return tool_fail(w->t, "%s: segmentations (an archive of its own) are neither in it nor beside it; name them with "
                     "--segmentations", tool_value(w->t, CUB));
}

static int by_name(const void *left, const void *right)
{
    return strcmp((const char *)left, (const char *)right);
}

/* All backgrounds of one place, as published names "/o/ocean/00000001.jpg", in a drawn order. NULL with a sentence. */
static char (*list_places(waterbirds *w, int place, long *count))[64]
{
    char (*names)[64] = NULL, (*drawn)[64] = NULL;
    int64_t *order;
    long n = 0, room = 0, i;
    int k;
    for (k = 2 * place; k < 2 * place + 2; k++) {
        char path[1400];
        DIR *folder;
        struct dirent *entry;
        snprintf(path, sizeof path, "%s%s", w->places, categories[k][w->flat]);
        folder = opendir(path);
        while (folder && (entry = readdir(folder)) != NULL) {
            size_t length = strlen(entry->d_name);
            if (length < 5 || length > 36 || strcmp(entry->d_name + length - 4, ".jpg") != 0) continue;
            if (n == room) {
                void *bigger = realloc(names, (size_t)(room = 2 * room + 1024) * sizeof *names);
                if (!bigger) break;
                names = (char (*)[64])bigger;
            }
            snprintf(names[n++], sizeof *names, "/%s/%.36s", categories[k][0], entry->d_name);
        }
        if (folder) closedir(folder);
    }
    order = (int64_t *)malloc((size_t)(n + 1) * sizeof *order);
    drawn = (char (*)[64])malloc((size_t)(n + 1) * sizeof *drawn);
    if (order && drawn && n) {
        qsort(names, (size_t)n, sizeof *names, by_name);
        spm_random_permutation(tool_seed(w->t, SEED), 50u + (uint64_t)place, n, order);
        for (i = 0; i < n; i++) memcpy(drawn[i], names[order[i]], sizeof *drawn);
    } else {
        free(drawn);
        drawn = NULL;
        tool_fail(w->t, "%s: has no .jpg in %s and %s", w->places, categories[2 * place][w->flat],
                  categories[2 * place + 1][w->flat]);
    }
    free(names);
    free(order);
    *count = n;
    return drawn;
}

/* Gives every picture that has none yet a background of its place. */
static int draw_places(waterbirds *w)
{
    int place, status = 0;
    for (place = 0; !status && place < 2; place++) {
        long have, wanted = 0, next = 0, i;
        char (*names)[64] = list_places(w, place, &have);
        if (!names) return 1;
        for (i = 0; i < w->count; i++) wanted += w->items[i].a == place && !w->items[i].place[0];
        if (wanted > have && !tool_on(w->t, REUSE))
            status = tool_fail(w->t, "%s: has %ld backgrounds of %s, %ld are wanted; --reuse-places uses some twice",
                               w->places, have, place ? "water" : "land", wanted);
        for (i = 0; !status && i < w->count; i++)
            if (w->items[i].a == place && !w->items[i].place[0])
                snprintf(w->items[i].place, sizeof w->items[i].place, "%s", names[next++ % have]);
        free(names);
    }
    return status;
}

/* --like: keeps the table's pictures, in its order, with its splits, places and backgrounds. */
static int follow_table(waterbirds *w)
{
    const char *path = tool_value(w->t, LIKE);
    uint8_t *data;
    size_t size;
    spm_error err;
    spm_csv *csv;
    tool_item *items;
    int file, y, split, place, place_file, status = 0;
    int64_t row;
    long at = 0;
    memset(&err, 0, sizeof err);
    if (spm_file_read(w->ctx, path, &data, &size, &err)) return tool_fail(w->t, "%s", err.text);
    csv = spm_csv_parse(w->ctx, path, (const char *)data, size, ',', &err);
    spm_free(w->ctx, data);
    if (!csv) return tool_fail(w->t, "%s", err.text);
    file = spm_csv_column(csv, "img_filename");
    y = spm_csv_column(csv, "y");
    split = spm_csv_column(csv, "split");
    place = spm_csv_column(csv, "place");
    place_file = spm_csv_column(csv, "place_filename");
    items = (tool_item *)calloc((size_t)spm_csv_rows(csv) + 1, sizeof *items);
    if (file < 0 || split < 0 || place < 0)
        status = tool_fail(w->t, "%s: lacks a column img_filename, split or place", path);
    if (!items) status = tool_fail(w->t, "out of memory");
    for (row = 0; !status && row < spm_csv_rows(csv); row++) {
        tool_item *item = &items[row];
        const char *name = spm_csv_field(csv, row, file);
        long tried; /* tables keep CUB's order: the next picture is most often the right one */
        for (tried = 0; tried < w->count && strcmp(w->source[at], name) != 0; tried++) at = (at + 1) % w->count;
        if (tried == w->count) {
            status = tool_fail(w->t, "%s: line %lld: CUB has no picture %s", path, (long long)spm_csv_line(csv, row), name);
            break;
        }
        *item = w->items[at];
        item->split = atoi(spm_csv_field(csv, row, split));
        item->a = atoi(spm_csv_field(csv, row, place));
        if (place_file >= 0) snprintf(item->place, sizeof item->place, "%.250s", spm_csv_field(csv, row, place_file));
        if (item->split < 0 || item->split > 2 || item->a < 0 || item->a > 1
            || (y >= 0 && atoi(spm_csv_field(csv, row, y)) != item->y)
            || (item->place[0] && item->place[0] != '/'))
            status = tool_fail(w->t, "%s: line %lld: y, split, place or place_filename is not Waterbirds'", path,
                               (long long)spm_csv_line(csv, row));
    }
    if (!status && spm_csv_rows(csv) == 0) status = tool_fail(w->t, "%s: has no rows", path);
    if (!status) {
        w->count = (long)spm_csv_rows(csv);
        free(w->items);
        w->items = items;
    } else {
        free(items);
    }
    spm_csv_destroy(csv);
    return status;
}

/* The background brought to `width` x `height`: enlarged first if it does not cover them, the longer side's surplus cut
 * off evenly, then Lanczos. */
static spm_status cover(spm_context *ctx, spm_image *place, int width, int height, spm_image *result, spm_error *err)
{
    spm_image part = SPM_ZERO;
    spm_status status = SPM_OK;
    double aspect = (double)width / height;
    int w, h, x = 0, y = 0;
    if (place->width < width || place->height < height) {
        w = width;
        h = (int)((double)width / place->width * place->height);
        if (h < height) {
            w = (int)((double)height / place->height * place->width);
            h = height;
        }
        if (w < width) w = width; /* a rounding below it would leave a gap */
        status = spm_image_resize(ctx, place, w, h, SPM_FILTER_LANCZOS, &part, err);
        spm_image_free(ctx, place);
        *place = part;
        memset(&part, 0, sizeof part);
        if (status) return status;
    }
    w = place->width;
    h = place->height;
    if ((double)w / h > aspect) x = (w - (int)(aspect * h)) / 2;
    else y = (h - (int)(w / aspect)) / 2;
    status = spm_image_crop(ctx, place, x, y, w - 2 * x, h - 2 * y, &part, err);
    if (!status) status = spm_image_resize(ctx, &part, width, height, SPM_FILTER_LANCZOS, result, err);
    spm_image_free(ctx, &part);
    return status;
}

static spm_status load(waterbirds *w, const char *folder, const char *name, spm_image *image, spm_error *err)
{
    char path[1600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return spm_image_load(w->ctx, path, NULL, image, err);
}

/* bird * mask + background * (1 - mask), each term rounded half to even, as the published recipe does. */
static void make(void *user, const tool_item *item, long index, spm_image *image, spm_error *err)
{
    waterbirds *w = (waterbirds *)user;
    spm_image mask = SPM_ZERO, place = SPM_ZERO, ground = SPM_ZERO;
    char name[300], images[1100];
    const char *bird = w->source[item->source];
    const char *dot = strrchr(bird, '.');
    int k, length = 0;
    size_t i, n;
    (void)index;
    snprintf(images, sizeof images, "%.1000s/images", tool_value(w->t, CUB));
    if (load(w, images, bird, image, err)) return;
    snprintf(name, sizeof name, "%.*s.png", dot ? (int)(dot - bird) : (int)strlen(bird), bird);
    if (load(w, w->segmentations, name, &mask, err)) return;
    for (k = 0; k < 4 && !length; k++) { /* "/o/ocean/1.jpg" into the folder as it is called here */
        length = (int)strlen(categories[k][0]);
        if (strncmp(item->place + 1, categories[k][0], (size_t)length) == 0 && item->place[length + 1] == '/')
            snprintf(name, sizeof name, "%s%.200s", categories[k][w->flat], item->place + 1 + length);
        else length = 0;
    }
    if (!length) snprintf(name, sizeof name, "%.255s", item->place + 1);
    if (!load(w, w->places, name, &place, err) && (mask.width != image->width || mask.height != image->height)) {
        err->status = SPM_E_SHAPE;
        snprintf(err->text, sizeof err->text, "%.200s: has %d x %d pixels, its segmentation %d x %d", bird, image->width,
                 image->height, mask.width, mask.height);
    }
    if (!err->status) (void)cover(w->ctx, &place, image->width, image->height, &ground, err);
    n = err->status ? 0 : (size_t)image->width * (size_t)image->height * 3;
    for (i = 0; i < n; i++) {
        double m = mask.pixels[i] / 255.0;
        double sum = rint(image->pixels[i] * m) + rint(ground.pixels[i] * (1.0 - m));
        image->pixels[i] = (uint8_t)(sum > 255.0 ? 255.0 : sum);
    }
    spm_image_free(w->ctx, &mask);
    spm_image_free(w->ctx, &place);
    spm_image_free(w->ctx, &ground);
}

static int write_set(waterbirds *w)
{
    tool_set set;
    char made[500];
    long i;
    int status = read_cub(w);
    if (!status) status = find_segmentations(w);
    if (!status) status = find_places(w);
    if (!status) status = *tool_value(w->t, LIKE) ? follow_table(w) : draw_groups(w);
    if (!status) status = draw_places(w);
    if (status) return status;
    for (i = 0; i < w->count; i++) {
        const char *name = w->source[w->items[i].source], *dot = strrchr(name, '.');
        snprintf(w->items[i].file, sizeof w->items[i].file, "%.*s.%s", dot ? (int)(dot - name) : (int)strlen(name), name,
                 tool_value(w->t, FORMAT));
    }
    set = tool_set_make(w->t, w->ctx, tool_value(w->t, OUT), w->items, w->count, make, w);
    set.quality = (int)tool_whole(w->t, QUALITY);
    set.half_chroma = 1;
    snprintf(made, sizeof made, "{\"tool\":\"make_waterbirds\",\"seed\":%.0f,\"correlation\":%g,\"val_fraction\":%g,"
             "\"like\":%s}\n", tool_number(w->t, SEED), tool_number(w->t, CORRELATION),
             tool_number(w->t, VAL_FRACTION), *tool_value(w->t, LIKE) ? "true" : "false");
    return tool_write_set(&set, "make_waterbirds.json", made, tool_on(w->t, FORCE));
}

static int run(tool *t, spm_context *ctx)
{
    waterbirds w = SPM_ZERO;
    int status;
    w.t = t;
    w.ctx = ctx;
    status = write_set(&w);
    free(w.items);
    free(w.source);
    return status;
}

int main(int argc, char **argv)
{
    tool t = tool_make("make_waterbirds",
        "usage: make_waterbirds --cub DIR --places DIR --out DIR [options]\n\n"
        "Makes Waterbirds from CUB-200-2011, its segmentations and Places365: birds cut out and put on land or water.\n",
        "metadata.csv has the published columns: y 0 landbird, 1 waterbird; place 0 land, 1 water; split 0 train,\n"
        "1 val, 2 test. With CUB's 11,788 pictures the published counts are train 3498/184/56/1057, val\n"
        "467/466/133/133, test 2255/2255/642/642; which pictures become validation was drawn without a fixed seed, so\n"
        "the first two lines differ a little from draw to draw; --like METADATA.csv repeats a published set.\n"
        "fetch.sh says where the archives are.\n",
        options, sizeof options / sizeof options[0]);
    return tool_main(&t, argc, argv, run);
}
