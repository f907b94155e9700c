/* study.c - the study behind the README's tables: does training against the memory of minority groups help, against which
 * baselines, and are the masked units the reason?
 *
 *     study OUT BIRDS DATA quick|full [threads=N] [sets=A,B] [nets=A,B] [methods=A,B] [seeds=A-B] [finished=1]
 *
 * OUT gets a run folder per data set, network, seed and method, results.json and table.md.  BIRDS is what synth_birds has
 * drawn; DATA holds dominoes/ and celeba/ (a set that is not there is left out, which is said).  A second call goes on where
 * the first one ended.  `make study` and `make study STUDY=quick` run it.
 *
 * Protocol: plain training without augmentation until every training picture is known by heart; from that checkpoint every
 * method gets the same epochs, rate (Adam, cosine), batch and augmentation (the recipe of a network and data set), and its
 * last epoch is what counts.  All numbers are of the test split.  A group is a majority one unless it has less than half of
 * its class's largest group; `majority` is the mean accuracy of these.
 *
 * Every method has a Pareto line: its logits mixed with those of the start, each over its spread.  The three families with
 * a power of the group weights, (n / (groups n_g))^power, the intervention with group labels and without and plain
 * reweighting, go from the start to the tempered weights (the recipe's power) and from there to power 1.  At each level
 * (the majority may change by +4 ... -10 points against the start) the validation split chooses the point of the line with
 * the best worst group among those that keep the level; the test split measures it. */
#if !defined(_XOPEN_SOURCE) && !defined(_WIN32)
  #define _XOPEN_SOURCE 700 /* symlink, realpath */
#endif
#ifndef SPURMEM_LINKED
    #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include "terminal.h"
#include <math.h>
#if !defined(_WIN32)
  #include <unistd.h>
#endif

enum { STEPS = 20, POINTS = 2 * STEPS + 1, LEVELS = 7, MAX_GROUPS = 4, MAX_ROWS = 2000 };

enum { N_SETS = 3, N_NETS = 2 };
typedef struct picture_set {
    char name[12];
    int64_t height, width;
    spm_resize_mode resize;
} picture_set;
static const picture_set sets[N_SETS] = { { "dominoes", 64, 32, SPM_RESIZE_NONE },
                                          { "birds", 64, 64, SPM_RESIZE_EXACT },
                                          { "celeba", 64, 64, SPM_RESIZE_EXACT } };

/* How every method is trained.  A transformer has no convolution to lean on: from 2,000 or 4,000 pictures it learns what a
 * car or a bird looks like in ten times as many epochs only. */
typedef struct recipe {
    int epochs, warmup;
    float power; /* of tempered group weights */
    spm_augment augment;
} recipe;
typedef struct network {
    char name[8], arch[64];
    int start_epochs;
    float lr; /* of every method */
    recipe recipes[N_SETS];
} network;
static const network nets[N_NETS] = {
    { "resnet", "resnet18:width=16", 20, 3e-3f,
      { { 10, 0, 0.3333f, SPM_AUGMENT_LIGHT }, { 10, 0, 0.3333f, SPM_AUGMENT_PAPER }, { 10, 0, 0.3333f, SPM_AUGMENT_LIGHT } } },
    { "vit", "vit:patch=8,dim=64,depth=4,heads=4,mlp=2", 40, 1e-3f,
      { { 100, 5, 0.3333f, SPM_AUGMENT_LIGHT }, { 100, 5, 0.6f, SPM_AUGMENT_LIGHT }, { 10, 0, 0.3333f, SPM_AUGMENT_LIGHT } } }
};

/* Levels of the Pareto table: the least change of the majority's accuracy, in points. */
static const int levels[LEVELS] = { 4, 2, 0, -1, -2, -5, -10 };

/* In the order they are run in: what others are measured from comes first. */
typedef enum method {
    START, FURTHER, CE_ONLY, REWEIGHT, GROUP_DRO, JTT, DFR, INTERVENE, INTERVENE_FULL, LABEL_FREE, LABEL_FREE_FULL,
    RANDOM_MASK, NO_MASK, OFFICIAL_MASK, NTX_ONLY, METHODS
} method;
typedef struct method_info {
    char folder[16], name[64];
    spm_method kind;
    method via; /* the Pareto line goes from the start over this one; START: straight */
} method_info;
static const method_info methods[METHODS] = {
    { "start", "ERM, the start", SPM_METHOD_ERM, START },
    { "further", "ERM, further (augmentation)", SPM_METHOD_ERM, START },
    { "ce-only", "reweight, tempered (CE only)", SPM_METHOD_REWEIGHT, START },
    { "reweight", "reweight, power 1", SPM_METHOD_REWEIGHT, CE_ONLY },
    { "groupdro", "Group DRO", SPM_METHOD_GROUPDRO, START },
    { "jtt", "JTT", SPM_METHOD_JTT, START },
    { "dfr", "DFR (last layer)", SPM_METHOD_DFR, START },
    { "intervene", "intervention, tempered", SPM_METHOD_INTERVENE, START },
    { "intervene-1", "intervention, power 1", SPM_METHOD_INTERVENE, INTERVENE },
    { "label-free", "intervention, label-free, tempered", SPM_METHOD_INTERVENE, START },
    { "label-free-1", "intervention, label-free, power 1", SPM_METHOD_INTERVENE, LABEL_FREE },
    { "random-mask", "intervention, random masks", SPM_METHOD_INTERVENE, START },
    { "no-mask", "intervention, no masks", SPM_METHOD_INTERVENE, START },
    { "official-mask", "intervention, smallest weights masked", SPM_METHOD_INTERVENE, START },
    { "ntx-only", "intervention, contrast alone", SPM_METHOD_INTERVENE, START }
};

typedef struct point {
    double wga, majority, val_wga, val_majority;
} point;

typedef struct row {
    int set, net, method;
    int seed, groups;
    int64_t right[MAX_GROUPS], count[MAX_GROUPS];
    int points;              /* of the line: STEPS + 1, or twice the steps over another method */
    point line[POINTS];      /* 0: the start; the last: the method */
    double seconds;
} row;

typedef struct study {
    spm_context *ctx;
    const char *out, *birds, *data;
    int quick, n_rows, finished; /* finished: nothing is trained, what is there is gathered */
    const char *only_sets, *only_nets, *only_methods; /* names between commas; NULL: all */
    int first_seed, last_seed;
    row rows[MAX_ROWS];
    spm_error err;
} study;

static int stopped(study *s)
{
    if (s->err.status == SPM_OK && !interrupted) return 0;
    return 1;
}

/* ---- data ---- */

static int exists(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

/* `link` leads to the folder `to`, also where an older link lost it. */
static int link_folder(study *s, const char *to, const char *link)
{
    int ok = exists(link);
#if !defined(_WIN32)
    if (!ok) {
        char *whole = realpath(to, NULL);
        (void)unlink(link);
        ok = whole && symlink(whole, link) == 0;
        free(whole);
    }
#endif
    if (!ok) {
        s->err.status = SPM_E_IO;
        snprintf(s->err.text, sizeof s->err.text, "%s: cannot be linked to %s", link, to);
    }
    return ok;
}

/* CelebA's minority has 37 test pictures in a partition, so every seed draws another one: of each group 55 % train, 10 %
 * val, 35 % test. */
static int partition_celeba(study *s, const char *from, const char *to, int seed)
{
    char list[1100], attributes[1100], pictures[1100], source[1100];
    spm_dataset_desc opening = SPM_ZERO;
    spm_dataset *data;
    uint8_t *table = NULL;
    size_t size = 0;
    int64_t i, n, at = 0;
    char *text;
    int ok;
    snprintf(list, sizeof list, "%s/list_eval_partition.txt", to);
    snprintf(attributes, sizeof attributes, "%s/list_attr_celeba.txt", to);
    snprintf(pictures, sizeof pictures, "%s/img_align_celeba", to);
    if (exists(list) && exists(pictures)) return 1;
    opening.path = from;
    data = spm_dataset_open(s->ctx, &opening, &s->err);
    n = data ? spm_dataset_size(data) : 0;
    text = (char *)malloc((size_t)n * 40 + 1);
    for (i = 0; text && i < n; i++) {
        const spm_example *e = spm_dataset_example(data, i);
        double draw = (double)spm_random_uniform((uint64_t)seed, 0x7061, (uint64_t)i);
        at += snprintf(text + at, 40, "%.24s %d\n", e->file, draw < 0.55 ? 0 : draw < 0.65 ? 1 : 2);
    }
    snprintf(source, sizeof source, "%s/list_attr_celeba.txt", from);
    ok = data && text && spm_directory_create(s->ctx, to, &s->err) == SPM_OK
         && spm_file_read(s->ctx, source, &table, &size, &s->err) == SPM_OK
         && spm_file_write(s->ctx, attributes, table, size, &s->err) == SPM_OK;
    snprintf(source, sizeof source, "%s/img_align_celeba", from);
    ok = ok && link_folder(s, source, pictures) && spm_file_write(s->ctx, list, text, (size_t)at, &s->err) == SPM_OK;
    spm_free(s->ctx, table);
    free(text);
    spm_dataset_close(data);
    return ok;
}

static void set_path(const study *s, int set, char *path, size_t size)
{
    if (set == 1)
        snprintf(path, size, "%s", s->birds);
    else
        snprintf(path, size, "%s/%s", s->data, sets[set].name);
}

static int set_exists(const study *s, int set)
{
    char path[1000], table[1100];
    set_path(s, set, path, sizeof path);
    snprintf(table, sizeof table, "%s/%s", path, set == 2 ? "list_attr_celeba.txt" : "metadata.csv");
    return exists(table);
}

static spm_dataset *open_set(study *s, int set, int seed)
{
    spm_dataset_desc opening = SPM_ZERO;
    char path[1000], own[1000];
    set_path(s, set, path, sizeof path);
    if (set == 2) {
        snprintf(own, sizeof own, "%s/celeba-partition-%d", s->out, seed);
        if (!partition_celeba(s, path, own, seed)) return NULL;
        snprintf(path, sizeof path, "%s", own);
    }
    opening.path = path;
    return spm_dataset_open(s->ctx, &opening, &s->err);
}

/* ---- training ---- */

static void folder(const study *s, char *path, size_t size, int set, int net, int seed, int m, const char *file)
{
    snprintf(path, size, "%s/%s-%s-%d/%s%s%s", s->out, sets[set].name, nets[net].name, seed, methods[m].folder,
             *file ? "/" : "", file);
}

static spm_train_desc settings(study *s, spm_dataset *data, spm_method kind, int set, int net, int seed)
{
    spm_train_desc desc = spm_train_desc_init(kind);
    desc.arch.height = sets[set].height;
    desc.arch.width_px = sets[set].width;
    desc.arch.classes = spm_dataset_classes(data);
    (void)spm_arch_parse(s->ctx, nets[net].arch, &desc.arch, &s->err);
    desc.reading.transform = spm_transform_make(sets[set].height, sets[set].width);
    desc.reading.transform.resize = sets[set].resize;
    desc.seed = (uint64_t)seed;
    desc.select = SPM_SELECT_LAST;
    desc.progress = on_progress;
    desc.on_epoch = on_epoch;
    return desc;
}

/* Trains, or goes on with what an earlier call has left; seconds are those of this call. */
static int train_into(study *s, spm_dataset *data, spm_train_desc *desc, const char *run)
{
    spm_train_result result;
    char config[1100];
    snprintf(config, sizeof config, "%s/config.json", run);
    desc->out = run;
    desc->eval_every = desc->epochs;
    desc->resume = exists(config);
    return spm_train(s->ctx, data, desc, &result, &s->err) == SPM_OK && (!result.stopped || desc->max_steps > 0)
           && !interrupted;
}

/* The checkpoint every method starts from, and the one of its first epoch, by which JTT finds its error set. */
static int train_start(study *s, spm_dataset *data, int set, int net, int seed)
{
    char run[1000], last[1000], first[1000];
    spm_train_desc desc = settings(s, data, SPM_METHOD_ERM, set, net, seed);
    uint8_t *bytes = NULL;
    size_t size = 0;
    int ok;
    folder(s, run, sizeof run, set, net, seed, START, "");
    folder(s, last, sizeof last, set, net, seed, START, "last.safetensors");
    folder(s, first, sizeof first, set, net, seed, START, "first.safetensors");
    desc.epochs = nets[net].start_epochs;
    if (!exists(first)) {
        desc.max_steps = (spm_dataset_split_size(data, SPM_TRAIN) + desc.batch - 1) / desc.batch;
        ok = train_into(s, data, &desc, run) && spm_file_read(s->ctx, last, &bytes, &size, &s->err) == SPM_OK
             && spm_file_write(s->ctx, first, bytes, size, &s->err) == SPM_OK;
        spm_free(s->ctx, bytes);
        if (!ok) return 0;
        desc.max_steps = 0;
    }
    return train_into(s, data, &desc, run);
}

static int train_method(study *s, spm_dataset *data, int set, int net, int seed, int m)
{
    char run[1000], start[1000], first[1000];
    spm_train_desc desc = settings(s, data, methods[m].kind, set, net, seed);
    const recipe *how = &nets[net].recipes[set];
    folder(s, run, sizeof run, set, net, seed, m, "");
    folder(s, start, sizeof start, set, net, seed, START, "last.safetensors");
    folder(s, first, sizeof first, set, net, seed, START, "first.safetensors");
    desc.checkpoint = start;
    desc.epochs = how->epochs;
    desc.warmup = how->warmup;
    desc.optimizer.lr = nets[net].lr;
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.augment = how->augment;
    desc.epoch_examples = spm_dataset_split_size(data, SPM_TRAIN);
    if (desc.epoch_examples > 4000) desc.epoch_examples /= 2;
    if (m == JTT) {
        desc.identify = first;
        desc.upweight = 20;
    }
    if (methods[m].via == START) desc.weight_power = how->power; /* over another method the line ends at power 1 */
    if (m >= INTERVENE) { /* both branches learn */
        desc.lambda = 10.0f;
        desc.mask = SPM_MASK_MEMORY;
        desc.prune_fraction = 0.2;
        desc.cross_entropy_pruned = 1;
        desc.group_labels = m != LABEL_FREE && m != LABEL_FREE_FULL;
    }
    if (m == RANDOM_MASK) desc.mask = SPM_MASK_RANDOM;
    if (m == OFFICIAL_MASK) desc.mask = SPM_MASK_OFFICIAL;
    if (m == NO_MASK) desc.mask = SPM_MASK_NONE;
    if (m == NTX_ONLY) desc.cross_entropy = desc.cross_entropy_pruned = 0;
    return train_into(s, data, &desc, run);
}

/* ---- measuring ---- */

static int evaluate(study *s, spm_dataset *data, const char *file, spm_eval evals[2])
{
    spm_checkpoint_info info;
    spm_eval_desc desc = SPM_ZERO;
    spm_model *model = NULL;
    int k, ok = spm_checkpoint_inspect(s->ctx, file, &info, &s->err) == SPM_OK;
    if (ok) model = spm_model_build(s->ctx, &info.arch, SPM_NO_SEED, &s->err);
    ok = model && spm_checkpoint_load(model, file, 0, &s->err) == SPM_OK;
    desc.reading.transform = info.transform;
    desc.batch = 100;
    for (k = 0; k < 2 && ok; k++) {
        desc.split = k ? SPM_TEST : SPM_VAL;
        ok = spm_evaluate(model, data, &desc, &evals[k], &s->err) == SPM_OK;
    }
    spm_model_destroy(model);
    return ok;
}

static double spread(const spm_eval *e)
{
    double sum = 0.0;
    int64_t i;
    for (i = 0; i < e->count; i++) sum += (double)e->margin[i] * (double)e->margin[i];
    return sqrt(sum / (double)e->count) + 1e-30;
}

/* Worst group and majority of (1 - share) a + share b on one split; counts may be NULL. */
static void mixed(const spm_dataset *data, const spm_eval *a, const spm_eval *b, double share, double over_a,
                  double over_b, double *wga, double *of_majority, int64_t *right, int64_t *count)
{
    int64_t r[MAX_GROUPS] = { 0 }, n[MAX_GROUPS] = { 0 }, i;
    int g, majorities = 0;
    for (i = 0; i < a->count; i++) {
        double margin = (1.0 - share) * (double)a->margin[i] / over_a + share * (double)b->margin[i] / over_b;
        r[a->group[i]] += margin > 0.0;
        n[a->group[i]]++;
    }
    *wga = 2.0;
    *of_majority = 0.0;
    for (g = 0; g < a->n_groups; g++) {
        double accuracy = n[g] ? (double)r[g] / (double)n[g] : 0.0;
        if (right) right[g] = r[g];
        if (count) count[g] = n[g];
        if (!n[g]) continue;
        if (accuracy < *wga) *wga = accuracy;
        if (spm_group_is_minority(data, g)) continue;
        *of_majority += accuracy;
        majorities++;
    }
    *of_majority /= majorities ? majorities : 1;
}

/* The Pareto line: logits mixed, each over its spread, from the start to the method, or over another method to it. */
static void measure(const spm_dataset *data, const spm_eval start[2], const spm_eval *via, const spm_eval now[2], row *r)
{
    int k;
    r->groups = start[0].n_groups;
    r->points = via ? POINTS : STEPS + 1;
    for (k = 0; k < r->points; k++) {
        const spm_eval *a = k > STEPS ? via : start, *b = via && k <= STEPS ? via : now;
        point *p = &r->line[k];
        double share = (double)(k > STEPS ? k - STEPS : k) / STEPS, over_a = spread(a), over_b = spread(b);
        mixed(data, &a[0], &b[0], share, over_a, over_b, &p->val_wga, &p->val_majority, NULL, NULL);
        mixed(data, &a[1], &b[1], share, over_a, over_b, &p->wga, &p->majority, r->right, r->count);
    }
}

/* The point of the line that the validation split likes best among those that keep the majority to the level; -1: none. */
static int at_level(const row *r, int level)
{
    int k, best = -1;
    for (k = 0; k < r->points; k++) {
        if (r->line[k].val_majority < r->line[0].val_majority + 0.01 * level - 1e-9) continue;
        if (best < 0 || r->line[k].val_wga > r->line[best].val_wga) best = k;
    }
    return best;
}

/* A finished row lies in its run folder, so that a later call need not measure it again. */
static int row_write(study *s, const char *path, const row *r)
{
    char text[8000];
    int k, n = snprintf(text, sizeof text, "%d %d %.17g\n", r->groups, r->points, r->seconds);
    for (k = 0; k < MAX_GROUPS; k++) {
        n += snprintf(text + n, sizeof text - (size_t)n, "%lld %lld\n", (long long)r->right[k], (long long)r->count[k]);
    }
    for (k = 0; k < r->points; k++) {
        const point *p = &r->line[k];
        n += snprintf(text + n, sizeof text - (size_t)n, "%.17g %.17g %.17g %.17g\n", p->wga, p->majority, p->val_wga,
                      p->val_majority);
    }
    return spm_file_write(s->ctx, path, text, (size_t)n, &s->err) == SPM_OK;
}

static int row_read(const char *path, row *r)
{
    FILE *f = fopen(path, "r");
    int k, ok = f && fscanf(f, "%d %d %lf", &r->groups, &r->points, &r->seconds) == 3 && r->points <= POINTS
                && r->points > 0 && r->groups <= MAX_GROUPS;
    for (k = 0; ok && k < MAX_GROUPS; k++) {
        long long right, count;
        ok = fscanf(f, "%lld %lld", &right, &count) == 2;
        r->right[k] = ok ? right : 0;
        r->count[k] = ok ? count : 0;
    }
    for (k = 0; ok && k < r->points; k++) {
        point *p = &r->line[k];
        ok = fscanf(f, "%lf %lf %lf %lf", &p->wga, &p->majority, &p->val_wga, &p->val_majority) == 4;
    }
    if (f) fclose(f);
    return ok;
}

/* ---- results ---- */

/* Sums over the seeds of a data set, network and method; differences are from the start of the same seed. */
typedef struct mean {
    double n, sum, squares;
} mean;

typedef struct sums {
    mean wga, kept, gain, change; /* kept: accuracy of the majority */
    mean level_gain[LEVELS], level_change[LEVELS]; /* where the validation split finds a point in every seed */
    mean ahead[LEVELS];                            /* of the intervention before this method, seed by seed */
    double seconds;
    int64_t right[MAX_GROUPS], count[MAX_GROUPS];
} sums;

static void take(mean *m, double value)
{
    m->n += 1.0;
    m->sum += value;
    m->squares += value * value;
}

static const row *find_row(const study *s, int set, int net, int seed, int m)
{
    int i;
    for (i = 0; i < s->n_rows; i++) {
        const row *r = &s->rows[i];
        if (r->set == set && r->net == net && r->seed == seed && r->method == m) return r;
    }
    return NULL;
}

static sums summary(const study *s, int set, int net, int m)
{
    sums t = SPM_ZERO;
    int i, g, k, mine, its;
    for (i = 0; i < s->n_rows; i++) {
        const row *r = &s->rows[i], *ours = find_row(s, set, net, r->seed, INTERVENE_FULL);
        const point *start = &r->line[0], *end = &r->line[r->points - 1];
        if (r->set != set || r->net != net || r->method != m) continue;
        take(&t.wga, end->wga);
        take(&t.kept, end->majority);
        take(&t.gain, end->wga - start->wga);
        take(&t.change, end->majority - start->majority);
        for (k = 0; k < LEVELS; k++) {
            if ((its = at_level(r, levels[k])) < 0) continue;
            take(&t.level_gain[k], r->line[its].wga - start->wga);
            take(&t.level_change[k], r->line[its].majority - start->majority);
            mine = ours ? at_level(ours, levels[k]) : -1;
            if (mine >= 0) take(&t.ahead[k], ours->line[mine].wga - r->line[its].wga);
        }
        t.seconds += r->seconds;
        for (g = 0; g < r->groups; g++) {
            t.right[g] += r->right[g];
            t.count[g] += r->count[g];
        }
    }
    return t;
}

static double mean_of(mean m)
{
    return m.n > 0.0 ? m.sum / m.n : (double)NAN;
}

/* The quantile .975 of Student's t: a table, then its expansion in 1 / freedom around the normal distribution's. */
static double student(int freedom)
{
    static const double few[8] = { 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306 };
    const double z = 1.959964, z3 = z * z * z, z5 = z3 * z * z, f = freedom;
    if (freedom <= 8) return few[freedom - 1];
    return z + ((z3 + z) / 4.0 + ((5.0 * z5 + 16.0 * z3 + 3.0 * z) / 96.0
                                  + (3.0 * z5 * z * z + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * f)) / f) / f;
}

/* Half the 95 % interval of a mean; NaN for one seed. */
static double half_interval(mean m)
{
    double variance;
    if (m.n < 2.0) return (double)NAN;
    variance = (m.squares - m.sum * m.sum / m.n) / (m.n - 1.0);
    return student((int)m.n - 1) * sqrt((variance > 0.0 ? variance : 0.0) / m.n);
}

/* Everything a run was made with, its seed and the hash of its data, stands in the config.json of its folder. */
static void config_json(const study *s, const row *r, spm_json *json)
{
    char file[1000], *text;
    uint8_t *data = NULL;
    size_t size = 0;
    spm_error none = SPM_ZERO;
    folder(s, file, sizeof file, r->set, r->net, r->seed, r->method, "config.json");
    if (spm_file_read(s->ctx, file, &data, &size, &none)) return;
    text = (char *)malloc(size + 1);
    if (text) {
        memcpy(text, data, size);
        text[size] = 0;
        spm_json_raw(json, "config", text);
    }
    free(text);
    spm_free(s->ctx, data);
}

static void row_json(const study *s, const row *r, spm_json *json)
{
    int k, g;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "set", sets[r->set].name);
    spm_json_string(json, "arch", nets[r->net].arch);
    spm_json_string(json, "method", methods[r->method].name);
    spm_json_int(json, "seed", r->seed);
    spm_json_number(json, "seconds", r->seconds);
    config_json(s, r, json);
    spm_json_array_begin(json, "test_groups");
    for (g = 0; g < r->groups; g++) {
        double low, high;
        spm_wilson(r->right[g], r->count[g], &low, &high);
        spm_json_object_begin(json, NULL);
        spm_json_int(json, "correct", r->right[g]);
        spm_json_int(json, "count", r->count[g]);
        spm_json_array_begin(json, "ci95");
        spm_json_number(json, NULL, low);
        spm_json_number(json, NULL, high);
        spm_json_array_end(json);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    spm_json_array_begin(json, "line"); /* shares 0 to 1: start to method; or to another method, and 1 to 2: from there */
    for (k = 0; k < r->points; k++) {
        spm_json_object_begin(json, NULL);
        spm_json_number(json, "share", (double)k / STEPS);
        spm_json_number(json, "worst_group_accuracy", r->line[k].wga);
        spm_json_number(json, "majority_accuracy", r->line[k].majority);
        spm_json_number(json, "val_worst_group_accuracy", r->line[k].val_wga);
        spm_json_number(json, "val_majority_accuracy", r->line[k].val_majority);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    spm_json_object_end(json);
}

static void mean_json(spm_json *json, const char *name, mean m)
{
    char half[64];
    snprintf(half, sizeof half, "%s_ci95_half", name);
    spm_json_number(json, name, mean_of(m));
    spm_json_number(json, half, half_interval(m));
}

static void summary_json(const study *s, spm_json *json)
{
    int set, net, m, g, k;
    spm_json_array_begin(json, "summary");
    for (set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) for (m = 0; m < METHODS; m++) {
        sums t = summary(s, set, net, m);
        double pooled = 2.0, low = 0.0, high = 0.0;
        if (t.wga.n < 1.0) continue;
        for (g = 0; g < MAX_GROUPS; g++) {
            double accuracy = t.count[g] ? (double)t.right[g] / (double)t.count[g] : 2.0;
            if (accuracy >= pooled) continue;
            pooled = accuracy;
            spm_wilson(t.right[g], t.count[g], &low, &high);
        }
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "set", sets[set].name);
        spm_json_string(json, "arch", nets[net].arch);
        spm_json_string(json, "method", methods[m].name);
        spm_json_int(json, "seeds", (int64_t)t.wga.n);
        mean_json(json, "worst_group_accuracy", t.wga);
        spm_json_number(json, "worst_group_pooled", pooled);
        spm_json_array_begin(json, "worst_group_pooled_ci95");
        spm_json_number(json, NULL, low);
        spm_json_number(json, NULL, high);
        spm_json_array_end(json);
        mean_json(json, "mean_majority_accuracy", t.kept);
        mean_json(json, "gain", t.gain);
        mean_json(json, "majority_change", t.change);
        spm_json_array_begin(json, "pareto"); /* chosen on the validation split, measured on the test split */
        for (k = 0; k < LEVELS; k++) {
            if (t.level_gain[k].n < t.wga.n) continue;
            spm_json_object_begin(json, NULL);
            spm_json_int(json, "least_majority_change_points", levels[k]);
            mean_json(json, "gain", t.level_gain[k]);
            mean_json(json, "majority_change", t.level_change[k]);
            if (t.ahead[k].n > 0.0) mean_json(json, "intervention_ahead", t.ahead[k]);
            spm_json_object_end(json);
        }
        spm_json_array_end(json);
        spm_json_number(json, "seconds", t.seconds / t.wga.n);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
}

/* "+24.1 +- 3.0" in points, or "-" for what some seed lacks. */
static void print_points(FILE *f, mean m, double seeds)
{
    double half = half_interval(m);
    if (m.n < seeds)
        fprintf(f, " - |");
    else if (half == half)
        fprintf(f, " %+.1f +- %.1f |", 100.0 * mean_of(m), 100.0 * half);
    else
        fprintf(f, " %+.1f |", 100.0 * mean_of(m));
}

/* How far the intervention's line is ahead of a method's at a level, over every set, network and seed that has both. */
static mean pooled_lead(const study *s, int m, int level)
{
    mean lead = SPM_ZERO;
    int i;
    for (i = 0; i < s->n_rows; i++) {
        const row *r = &s->rows[i], *ours = find_row(s, r->set, r->net, r->seed, INTERVENE_FULL);
        int its = r->method == m ? at_level(r, level) : -1, mine = ours && its >= 0 ? at_level(ours, level) : -1;
        if (mine >= 0) take(&lead, ours->line[mine].wga - r->line[its].wga);
    }
    return lead;
}

/* The tables of the README.  Behind gain and change of the method itself: the gain at three levels of the Pareto line, and
 * how far ahead of it the intervention's line is there. */
static void table_text(const study *s, FILE *f)
{
    enum { SHOWN = 3 };
    static const int shown[SHOWN] = { 3, 4, 5 };
    int set, net, m, k;
    for (set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) {
        sums start = summary(s, set, net, START);
        char worst[16], kept[16];
        if (start.wga.n < 1.0) continue;
        percent(worst, sizeof worst, mean_of(start.wga));
        percent(kept, sizeof kept, mean_of(start.kept));
        fprintf(f, "**%s, %s** (the start: worst group %s, majority %s; %d epochs, tempered: power %.2f)\n\n", sets[set].name,
                nets[net].arch, worst, kept, nets[net].recipes[set].epochs, (double)nets[net].recipes[set].power);
        fprintf(f, "| method | seeds | gain | majority |");
        for (k = 0; k < SHOWN; k++) fprintf(f, " gain at %d |", levels[shown[k]]);
        for (k = 0; k < SHOWN; k++) fprintf(f, " ahead at %d |", levels[shown[k]]);
        fprintf(f, "\n|---|---|---|---|---|---|---|---|---|---|");
        for (m = FURTHER; m < METHODS; m++) {
            sums t = summary(s, set, net, m);
            if (t.wga.n < 1.0) continue;
            fprintf(f, "\n| %s | %d |", methods[m].name, (int)t.wga.n);
            print_points(f, t.gain, t.wga.n);
            print_points(f, t.change, t.wga.n);
            for (k = 0; k < SHOWN; k++) print_points(f, t.level_gain[shown[k]], t.wga.n);
            for (k = 0; k < SHOWN; k++) {
                if (m == INTERVENE_FULL)
                    fprintf(f, " |");
                else
                    print_points(f, t.ahead[shown[k]], 1.0);
            }
        }
        fprintf(f, "\n\n");
    }
    fprintf(f, "| mean over the sets above | sets | gain | majority |");
    for (k = 0; k < SHOWN; k++) fprintf(f, " at %d: gain | majority |", levels[shown[k]]);
    for (k = 0; k < SHOWN; k++) fprintf(f, " ahead at %d |", levels[shown[k]]);
    fprintf(f, "\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (m = FURTHER; m < METHODS; m++) {
        double all[2 + 2 * SHOWN] = { 0.0 };
        int n = 0;
        for (set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) {
            sums t = summary(s, set, net, m);
            if (t.wga.n < 1.0) continue;
            all[0] += mean_of(t.gain);
            all[1] += mean_of(t.change);
            for (k = 0; k < SHOWN; k++) {
                all[2 + 2 * k] += mean_of(t.level_gain[shown[k]]);
                all[3 + 2 * k] += mean_of(t.level_change[shown[k]]);
            }
            n++;
        }
        if (!n) continue;
        fprintf(f, "| %s | %d |", methods[m].name, n);
        for (k = 0; k < 2 + 2 * SHOWN; k++) fprintf(f, " %+.1f |", 100.0 * all[k] / n);
        for (k = 0; k < SHOWN; k++) { /* over all sets and seeds at once */
            if (m == INTERVENE_FULL)
                fprintf(f, " |");
            else
                print_points(f, pooled_lead(s, m, levels[shown[k]]), 1.0);
        }
        fprintf(f, "\n");
    }
}

static int write_results(study *s)
{
    char path[1000];
    spm_json *json = spm_json_create(s->ctx);
    const char *text;
    FILE *f;
    int i, ok;
    if (!json) return 0;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", s->quick ? "make study STUDY=quick" : "make study");
    spm_json_string(json, "isa", spm_isa_name(spm_context_isa(s->ctx)));
    summary_json(s, json);
    spm_json_array_begin(json, "runs");
    for (i = 0; i < s->n_rows; i++) row_json(s, &s->rows[i], json);
    spm_json_array_end(json);
    spm_json_object_end(json);
    text = spm_json_finish(json);
    snprintf(path, sizeof path, "%s/results.json", s->out);
    ok = text && spm_file_write(s->ctx, path, text, strlen(text), &s->err) == SPM_OK;
    spm_json_destroy(json);
    snprintf(path, sizeof path, "%s/table.md", s->out);
    f = ok ? fopen(path, "w") : NULL;
    if (f) {
        table_text(s, f);
        ok = fclose(f) == 0;
    }
    return ok && f != NULL;
}

/* ---- all of it ---- */

/* 1 if `name` is among the names between commas; all are where there are none. */
static int chosen(const char *names, const char *name)
{
    size_t n = strlen(name);
    const char *at;
    for (at = names; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || !at[n])) return 1;
    }
    return names == NULL;
}

/* The evaluations of a method's checkpoint, made when they are first asked for. */
static const spm_eval *evaluated(study *s, spm_dataset *data, int set, int net, int seed, int m,
                                 spm_eval evals[METHODS][2])
{
    char file[1000];
    folder(s, file, sizeof file, set, net, seed, m, "last.safetensors");
    return evals[m][0].count > 0 || evaluate(s, data, file, evals[m]) ? evals[m] : NULL;
}

/* One data set, network and seed: the start, then every method from it. */
static int block(study *s, int set, int net, int seed)
{
    spm_dataset *data = NULL;
    spm_eval evals[METHODS][2];
    char file[1000];
    int m, k, ok = 1;
    memset(evals, 0, sizeof evals);
    for (m = START; ok && m < METHODS && s->n_rows < MAX_ROWS; m++) {
        row *r = &s->rows[s->n_rows];
        double begun = spm_seconds();
        method via = methods[m].via;
        memset(r, 0, sizeof *r);
        folder(s, file, sizeof file, set, net, seed, m, "row.txt");
        if (!row_read(file, r)) {
            const spm_eval *start = NULL, *now = NULL, *over = NULL;
            if (s->finished || (s->quick && (m == OFFICIAL_MASK || m == NTX_ONLY))
                || !chosen(s->only_methods, methods[m].folder) || (m != START && !find_row(s, set, net, seed, START)))
                continue;
            if (!data) data = open_set(s, set, seed);
            ok = data && (m == START ? train_start(s, data, set, net, seed) : train_method(s, data, set, net, seed, m));
            if (ok) start = evaluated(s, data, set, net, seed, START, evals);
            if (start) now = evaluated(s, data, set, net, seed, m, evals);
            if (now && via != START) over = evaluated(s, data, set, net, seed, via, evals);
            ok = now && (over || via == START);
            if (!ok) break;
            r->seconds = spm_seconds() - begun;
            measure(data, start, over, now, r);
            ok = row_write(s, file, r);
        }
        r->set = set;
        r->net = net;
        r->seed = seed;
        r->method = m;
        s->n_rows++;
        progress_clear();
        fprintf(stderr, "%-8s %-6s seed %d  %-37s worst group %5.1f (%+5.1f)  majority %5.1f (%+5.1f)  %.0f s\n",
                sets[set].name, nets[net].name, seed, methods[m].name, 100.0 * r->line[r->points - 1].wga,
                100.0 * (r->line[r->points - 1].wga - r->line[0].wga), 100.0 * r->line[r->points - 1].majority,
                100.0 * (r->line[r->points - 1].majority - r->line[0].majority), r->seconds);
        if (!s->finished && !s->only_methods) ok = write_results(s); /* parts may run side by side */
    }
    for (m = 0; m < METHODS; m++) {
        for (k = 0; k < 2; k++) spm_eval_free(s->ctx, &evals[m][k]);
    }
    spm_dataset_close(data);
    return ok;
}

static int usage(void)
{
    fprintf(stderr, "usage: study OUT BIRDS DATA quick|full [threads=N] [sets=A,B] [nets=A,B] [methods=A,B] [seeds=A-B]"
                    " [finished=1]\n"
                    "sets: dominoes, birds, celeba; nets: resnet, vit; methods: the names of their run folders\n"
                    "finished=1 trains nothing and gathers what is there\n");
    return 2;
}

int main(int argc, char **argv)
{
    static study s;
    spm_context_desc desc = SPM_ZERO;
    int set, net, seed, i, ok = 1;
    if (argc < 5 || (strcmp(argv[4], "quick") != 0 && strcmp(argv[4], "full") != 0)) return usage();
    s.out = argv[1];
    s.birds = argv[2];
    s.data = argv[3];
    s.quick = strcmp(argv[4], "quick") == 0;
    s.first_seed = 1;
    s.last_seed = s.quick ? 1 : 5;
    if (s.quick) s.only_nets = "resnet";
    desc.log = on_log;
    for (i = 5; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        value = value ? value + 1 : "";
        if (strncmp(argv[i], "threads=", 8) == 0) desc.threads = atoi(value);
        else if (strncmp(argv[i], "sets=", 5) == 0) s.only_sets = value;
        else if (strncmp(argv[i], "nets=", 5) == 0) s.only_nets = value;
        else if (strncmp(argv[i], "methods=", 8) == 0) s.only_methods = value;
        else if (strcmp(argv[i], "finished=1") == 0) s.finished = 1;
        else if (sscanf(argv[i], "seeds=%d-%d", &s.first_seed, &s.last_seed) != 2) return usage();
    }
    s.ctx = spm_context_create(&desc);
    if (!s.ctx) {
        fprintf(stderr, "study: no context: this machine lacks the instruction set in SPURMEM_ISA\n");
        return 1;
    }
    catch_interrupts();
    progress_quiet = !stderr_is_terminal();
    (void)spm_directory_create(s.ctx, s.out, &s.err);
    for (seed = s.first_seed; ok && seed <= s.last_seed; seed++) {
        for (net = 0; ok && net < N_NETS; net++) {
            for (set = 0; ok && set < N_SETS; set++) {
                if (!chosen(s.only_nets, nets[net].name) || !chosen(s.only_sets, sets[set].name)) continue;
                if (!set_exists(&s, set)) {
                    if (seed == s.first_seed) fprintf(stderr, "%s: not there, left out\n", sets[set].name);
                    continue;
                }
                ok = block(&s, set, net, seed) && !stopped(&s);
            }
        }
    }
    progress_clear();
    if (ok && !s.only_methods) ok = write_results(&s);
    if (ok && !s.only_methods) {
        table_text(&s, stdout);
        printf("\n%s/results.json has every run\n", s.out);
    } else if (!ok)
        fprintf(stderr, "study: %s\n", s.err.status ? s.err.text : "stopped; the same command goes on");
    spm_context_destroy(s.ctx);
    return ok ? 0 : 1;
}
