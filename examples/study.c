/* study.c - the study behind the README's tables: does training against the memory of minority groups help, against which
 * baselines, and are the masked units the reason?
 *
 *     study OUT BIRDS DATA quick|full [THREADS]
 *
 * OUT gets a run folder per data set, network, seed and method, results.json and table.md.  BIRDS is what synth_birds has
 * drawn; DATA holds dominoes/ and celeba/ (a set that is not there is left out, which is said).  A second call goes on where
 * the first one ended.  `make study` and `make study STUDY=quick` run it.
 *
 * Protocol, fixed before the numbers were looked at: plain training without augmentation until every training picture is
 * known by heart; from that checkpoint every method gets the same epochs, rate (3e-3, Adam, cosine), batch and
 * augmentation, and its last epoch is what counts.  All numbers are of the test split.  A group is a majority one unless it
 * has less than half of its class's largest group; `majority` is the mean accuracy of these.  Any method may be mixed with
 * the checkpoint it started from, logit by logit, each over its spread: `line` has all shares, `tuned` the share with the
 * best worst group among those that cost the majority at most a point, both on the validation split. */
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

enum { SHARES = 21, MAX_GROUPS = 4, MAX_ROWS = 2000 };

typedef struct picture_set {
    char name[12];
    int64_t height, width;
    spm_resize_mode resize;
    spm_augment augment;
} picture_set;

static const picture_set sets[] = { { "dominoes", 64, 32, SPM_RESIZE_NONE, SPM_AUGMENT_LIGHT },
                                    { "birds", 64, 64, SPM_RESIZE_EXACT, SPM_AUGMENT_PAPER },
                                    { "celeba", 64, 64, SPM_RESIZE_EXACT, SPM_AUGMENT_LIGHT } };
static const char nets[][64] = { "resnet18:width=16", "vit:patch=8,dim=64,depth=4,heads=4,mlp=2" };
enum { N_SETS = 3, N_NETS = 2 };

typedef enum method {
    START, FURTHER, REWEIGHT, GROUP_DRO, JTT, DFR, INTERVENE, LABEL_FREE, RANDOM_MASK, OFFICIAL_MASK, NO_MASK, CE_ONLY,
    NTX_ONLY, METHODS
} method;
static const char method_names[METHODS][64] = {
    "ERM, the start", "ERM, further (augmentation)", "reweight", "Group DRO", "JTT", "DFR (last layer)",
    "intervention", "intervention, label-free", "- random masks", "- smallest weights masked", "- no masks",
    "- CE only (no masks, no contrast)", "- NTX only"
};

typedef struct point {
    double wga, majority, val_wga, val_majority;
} point;

typedef struct row {
    int set, net, method;
    int seed, groups;
    int64_t right[MAX_GROUPS], count[MAX_GROUPS];
    point line[SHARES];      /* share 0: the start; the last: the method */
    int tuned;               /* index into line */
    double seconds;
} row;

typedef struct study {
    spm_context *ctx;
    const char *out, *birds, *data;
    int quick, n_rows;
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

/* CelebA's minority has 37 test pictures in a partition, so every seed draws another one: of each group 55 % train, 10 %
 * val, 35 % test. */
static int partition_celeba(study *s, const char *from, const char *to, int seed)
{
    char path[1100], source[1100];
    spm_dataset_desc opening = SPM_ZERO;
    spm_dataset *data;
    uint8_t *table = NULL;
    size_t size = 0;
    int64_t i, n, at = 0;
    char *text;
    opening.path = from;
    snprintf(path, sizeof path, "%s/list_eval_partition.txt", to);
    if (exists(path)) return 1;
    data = spm_dataset_open(s->ctx, &opening, &s->err);
    if (!data || spm_directory_create(s->ctx, to, &s->err)) return 0;
    n = spm_dataset_size(data);
    text = (char *)malloc((size_t)n * 40 + 1);
    for (i = 0; text && i < n; i++) {
        const spm_example *e = spm_dataset_example(data, i);
        double draw = (double)spm_random_uniform((uint64_t)seed, 0x7061, (uint64_t)i);
        at += snprintf(text + at, 40, "%.24s %d\n", e->file, draw < 0.55 ? 0 : draw < 0.65 ? 1 : 2);
    }
    snprintf(source, sizeof source, "%s/list_attr_celeba.txt", from);
    if (!text || spm_file_read(s->ctx, source, &table, &size, &s->err)) return 0;
    snprintf(source, sizeof source, "%s/list_attr_celeba.txt", to);
    if (spm_file_write(s->ctx, source, table, size, &s->err)) return 0;
    snprintf(source, sizeof source, "%s/img_align_celeba", to);
#if defined(_WIN32)
    return 0;
#else
    {
        char target[1100], *whole;
        snprintf(target, sizeof target, "%s/img_align_celeba", from);
        whole = realpath(target, NULL);
        if (!exists(source) && (!whole || symlink(whole, source) != 0)) return 0;
        free(whole);
    }
#endif
    i = spm_file_write(s->ctx, path, text, (size_t)at, &s->err) == SPM_OK;
    spm_free(s->ctx, table);
    free(text);
    spm_dataset_close(data);
    return (int)i;
}

static spm_dataset *open_set(study *s, int set, int seed)
{
    spm_dataset_desc opening = SPM_ZERO;
    char path[1000], table[1100], own[1000];
    snprintf(path, sizeof path, "%s", s->birds);
    if (set != 1) snprintf(path, sizeof path, "%s/%s", s->data, sets[set].name);
    snprintf(table, sizeof table, "%s/%s", path, set == 2 ? "list_attr_celeba.txt" : "metadata.csv");
    if (!exists(table)) return NULL;
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
    static const char short_names[METHODS][16] = { "start", "further", "reweight", "groupdro", "jtt", "dfr", "intervene",
                                                   "label-free", "random-mask", "official-mask", "no-mask", "ce-only",
                                                   "ntx-only" };
    snprintf(path, size, "%s/%s-%s-%d/%s%s%s", s->out, sets[set].name, net ? "vit" : "resnet", seed, short_names[m],
             *file ? "/" : "", file);
}

static spm_train_desc settings(study *s, spm_dataset *data, spm_method kind, int set, int net, int seed)
{
    spm_train_desc desc = spm_train_desc_init(kind);
    desc.arch.height = sets[set].height;
    desc.arch.width_px = sets[set].width;
    desc.arch.classes = spm_dataset_classes(data);
    (void)spm_arch_parse(s->ctx, nets[net], &desc.arch, &s->err);
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
    desc.epochs = net ? 40 : 20;
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
    static const spm_method kinds[METHODS] = {
        SPM_METHOD_ERM, SPM_METHOD_ERM, SPM_METHOD_REWEIGHT, SPM_METHOD_GROUPDRO, SPM_METHOD_JTT, SPM_METHOD_DFR,
        SPM_METHOD_INTERVENE, SPM_METHOD_INTERVENE, SPM_METHOD_INTERVENE, SPM_METHOD_INTERVENE, SPM_METHOD_INTERVENE,
        SPM_METHOD_REWEIGHT, SPM_METHOD_INTERVENE
    };
    char run[1000], start[1000], first[1000];
    spm_train_desc desc = settings(s, data, kinds[m], set, net, seed);
    folder(s, run, sizeof run, set, net, seed, m, "");
    folder(s, start, sizeof start, set, net, seed, START, "last.safetensors");
    folder(s, first, sizeof first, set, net, seed, START, "first.safetensors");
    desc.checkpoint = start;
    desc.epochs = 20;
    desc.optimizer.lr = net ? 1e-3f : 3e-3f;
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.augment = sets[set].augment;
    desc.epoch_examples = spm_dataset_split_size(data, SPM_TRAIN);
    if (m == JTT) {
        desc.identify = first;
        desc.upweight = 20;
    }
    if (m >= INTERVENE) { /* both branches learn; groups weigh (n / (groups n_g))^(1/3) */
        desc.weight_power = 0.3333f;
        desc.lambda = 10.0f;
        desc.prune_fraction = 0.05;
        desc.cross_entropy_pruned = 1;
        desc.group_labels = m != LABEL_FREE;
    }
    if (m == RANDOM_MASK) desc.mask = SPM_MASK_RANDOM;
    if (m == OFFICIAL_MASK) desc.mask = SPM_MASK_OFFICIAL;
    if (m == NO_MASK) desc.mask = SPM_MASK_NONE;
    if (m == NTX_ONLY) desc.cross_entropy = 0;
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

static int majority(const spm_dataset *data, int group)
{
    int64_t of_class = 0, n = spm_dataset_group_count(data, SPM_TRAIN, group);
    int g, confounders = spm_dataset_confounders(data), first = group / confounders * confounders;
    for (g = first; g < first + confounders; g++) {
        if (spm_dataset_group_count(data, SPM_TRAIN, g) > of_class) of_class = spm_dataset_group_count(data, SPM_TRAIN, g);
    }
    return 2 * n >= of_class;
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
        if (!majority(data, g)) continue;
        *of_majority += accuracy;
        majorities++;
    }
    *of_majority /= majorities ? majorities : 1;
}

static void measure(const spm_dataset *data, const spm_eval start[2], const spm_eval now[2], row *r)
{
    double a = spread(&start[0]), b = spread(&now[0]), best = -1.0;
    int k;
    r->groups = start[0].n_groups;
    for (k = 0; k < SHARES; k++) {
        point *p = &r->line[k];
        double share = (double)k / (SHARES - 1);
        mixed(data, &start[0], &now[0], share, a, b, &p->val_wga, &p->val_majority, NULL, NULL);
        mixed(data, &start[1], &now[1], share, a, b, &p->wga, &p->majority, r->right, r->count);
        if (p->val_majority >= r->line[0].val_majority - 0.01 - 1e-9 && p->val_wga > best) {
            best = p->val_wga;
            r->tuned = k;
        }
    }
}

/* ---- results ---- */

typedef struct sums {
    double n, gain, gain2, wga, change, change2, tuned, tuned2, tuned_change, seconds;
    int64_t right[MAX_GROUPS], count[MAX_GROUPS];
} sums;

static sums summary(const study *s, int set, int net, int m)
{
    sums t = SPM_ZERO;
    int i, g;
    for (i = 0; i < s->n_rows; i++) {
        const row *r = &s->rows[i];
        const point *end = &r->line[SHARES - 1], *at = &r->line[r->tuned];
        double gain = end->wga - r->line[0].wga, change = end->majority - r->line[0].majority;
        if (r->set != set || r->net != net || r->method != m) continue;
        t.n += 1.0;
        t.wga += end->wga;
        t.gain += gain;
        t.gain2 += gain * gain;
        t.change += change;
        t.change2 += change * change;
        t.tuned += at->wga - r->line[0].wga;
        t.tuned2 += (at->wga - r->line[0].wga) * (at->wga - r->line[0].wga);
        t.tuned_change += at->majority - r->line[0].majority;
        t.seconds += r->seconds;
        for (g = 0; g < r->groups; g++) {
            t.right[g] += r->right[g];
            t.count[g] += r->count[g];
        }
    }
    return t;
}

/* Half the 95 % interval of a mean by Student's t; NaN for one seed. */
static double half_interval(double n, double sum, double squares)
{
    static const double quantile[9] = { 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262 };
    double variance;
    if (n < 2.0) return (double)NAN;
    variance = (squares - sum * sum / n) / (n - 1.0);
    return quantile[n > 10.0 ? 8 : (int)n - 2] * sqrt((variance > 0.0 ? variance : 0.0) / n);
}

static void row_json(const row *r, spm_json *json)
{
    int k, g;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "set", sets[r->set].name);
    spm_json_string(json, "arch", nets[r->net]);
    spm_json_string(json, "method", method_names[r->method]);
    spm_json_int(json, "seed", r->seed);
    spm_json_number(json, "seconds", r->seconds);
    spm_json_number(json, "tuned_share", (double)r->tuned / (SHARES - 1));
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
    spm_json_array_begin(json, "line"); /* the Pareto line: shares 0, .05 ... 1 of the method's logits */
    for (k = 0; k < SHARES; k++) {
        spm_json_object_begin(json, NULL);
        spm_json_number(json, "share", (double)k / (SHARES - 1));
        spm_json_number(json, "worst_group_accuracy", r->line[k].wga);
        spm_json_number(json, "majority_accuracy", r->line[k].majority);
        spm_json_number(json, "val_worst_group_accuracy", r->line[k].val_wga);
        spm_json_number(json, "val_majority_accuracy", r->line[k].val_majority);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    spm_json_object_end(json);
}

static void summary_json(const study *s, spm_json *json)
{
    int set, net, m, g;
    spm_json_array_begin(json, "summary");
    for (set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) for (m = 0; m < METHODS; m++) {
        sums t = summary(s, set, net, m);
        double pooled = 2.0, low = 0.0, high = 0.0;
        if (t.n < 1.0) continue;
        for (g = 0; g < MAX_GROUPS; g++) {
            double accuracy = t.count[g] ? (double)t.right[g] / (double)t.count[g] : 2.0;
            if (accuracy >= pooled) continue;
            pooled = accuracy;
            spm_wilson(t.right[g], t.count[g], &low, &high);
        }
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "set", sets[set].name);
        spm_json_string(json, "arch", nets[net]);
        spm_json_string(json, "method", method_names[m]);
        spm_json_int(json, "seeds", (int64_t)t.n);
        spm_json_number(json, "worst_group_accuracy", t.wga / t.n);
        spm_json_number(json, "worst_group_pooled", pooled);
        spm_json_array_begin(json, "worst_group_pooled_ci95");
        spm_json_number(json, NULL, low);
        spm_json_number(json, NULL, high);
        spm_json_array_end(json);
        spm_json_number(json, "gain", t.gain / t.n);
        spm_json_number(json, "gain_ci95_half", half_interval(t.n, t.gain, t.gain2));
        spm_json_number(json, "majority_change", t.change / t.n);
        spm_json_number(json, "majority_change_ci95_half", half_interval(t.n, t.change, t.change2));
        spm_json_number(json, "tuned_gain", t.tuned / t.n);
        spm_json_number(json, "tuned_gain_ci95_half", half_interval(t.n, t.tuned, t.tuned2));
        spm_json_number(json, "tuned_majority_change", t.tuned_change / t.n);
        spm_json_number(json, "seconds", t.seconds / t.n);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
}

/* "+24.1 +- 3.0" in points. */
static void points(char *text, size_t size, double n, double sum, double squares)
{
    double half = half_interval(n, sum, squares);
    if (half == half)
        snprintf(text, size, "%+.1f +- %.1f", 100.0 * sum / n, 100.0 * half);
    else
        snprintf(text, size, "%+.1f", 100.0 * sum / n);
}

static void table_text(const study *s, FILE *f)
{
    int set, net, m, k;
    for (set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) {
        sums start = summary(s, set, net, START);
        if (start.n < 1.0) continue;
        fprintf(f, "**%s, %s** (seeds: %d; ERM: worst group %.1f)\n\n", sets[set].name, nets[net], (int)start.n,
                100.0 * start.wga / start.n);
        fprintf(f, "| method | worst group | gain | majority | mixed with the start: gain | majority |\n");
        fprintf(f, "|---|---|---|---|---|---|\n");
        for (m = FURTHER; m < METHODS; m++) {
            sums t = summary(s, set, net, m);
            char worst[16], gain[40], change[40], tuned[40];
            if (t.n < 1.0) continue;
            percent(worst, sizeof worst, t.wga / t.n);
            points(gain, sizeof gain, t.n, t.gain, t.gain2);
            points(change, sizeof change, t.n, t.change, t.change2);
            points(tuned, sizeof tuned, t.n, t.tuned, t.tuned2);
            fprintf(f, "| %s | %s | %s | %s | %s | %+.1f |\n", method_names[m], worst, gain, change, tuned,
                    100.0 * t.tuned_change / t.n);
        }
        fprintf(f, "\n");
    }
    fprintf(f, "| mean over the sets above | gain | majority | mixed: gain | majority |\n|---|---|---|---|---|\n");
    for (m = FURTHER; m < METHODS; m++) {
        double gain = 0.0, change = 0.0, tuned = 0.0, tuned_change = 0.0;
        for (k = 0, set = 0; set < N_SETS; set++) for (net = 0; net < N_NETS; net++) {
            sums t = summary(s, set, net, m);
            if (t.n < 1.0) continue;
            gain += t.gain / t.n;
            change += t.change / t.n;
            tuned += t.tuned / t.n;
            tuned_change += t.tuned_change / t.n;
            k++;
        }
        if (k) {
            fprintf(f, "| %s | %+.1f | %+.1f | %+.1f | %+.1f |\n", method_names[m], 100.0 * gain / k, 100.0 * change / k,
                    100.0 * tuned / k, 100.0 * tuned_change / k);
        }
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
    for (i = 0; i < s->n_rows; i++) row_json(&s->rows[i], json);
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

/* One data set, network and seed: the start, then every method from it. */
static int block(study *s, int set, int net, int seed)
{
    spm_dataset *data = open_set(s, set, seed);
    spm_eval start[2], now[2];
    char file[1000];
    int m, ok = data != NULL;
    memset(start, 0, sizeof start);
    for (m = START; ok && m < METHODS && s->n_rows < MAX_ROWS; m++) {
        row *r = &s->rows[s->n_rows];
        double begun = spm_seconds();
        if (s->quick && m == OFFICIAL_MASK) continue;
        memset(r, 0, sizeof *r);
        memset(now, 0, sizeof now);
        ok = m == START ? train_start(s, data, set, net, seed) : train_method(s, data, set, net, seed, m);
        folder(s, file, sizeof file, set, net, seed, m, "last.safetensors");
        ok = ok && evaluate(s, data, file, m == START ? start : now);
        if (!ok) break;
        r->set = set;
        r->net = net;
        r->seed = seed;
        r->method = m;
        r->seconds = spm_seconds() - begun;
        measure(data, start, m == START ? start : now, r);
        progress_clear();
        fprintf(stderr, "%-8s %-6s seed %d  %-34s worst group %5.1f (%+5.1f)  majority %5.1f (%+5.1f)  %.0f s\n",
                sets[set].name, net ? "vit" : "resnet", seed, method_names[m], 100.0 * r->line[SHARES - 1].wga,
                100.0 * (r->line[SHARES - 1].wga - r->line[0].wga), 100.0 * r->line[SHARES - 1].majority,
                100.0 * (r->line[SHARES - 1].majority - r->line[0].majority), r->seconds);
        s->n_rows++;
        spm_eval_free(s->ctx, &now[0]);
        spm_eval_free(s->ctx, &now[1]);
        ok = write_results(s);
    }
    spm_eval_free(s->ctx, &start[0]);
    spm_eval_free(s->ctx, &start[1]);
    spm_dataset_close(data);
    return ok;
}

int main(int argc, char **argv)
{
    static study s;
    spm_context_desc desc = SPM_ZERO;
    int set, net, seed, ok = 1;
    if (argc < 5 || (strcmp(argv[4], "quick") != 0 && strcmp(argv[4], "full") != 0)) {
        fprintf(stderr, "usage: study OUT BIRDS DATA quick|full [THREADS]\n");
        return 2;
    }
    s.out = argv[1];
    s.birds = argv[2];
    s.data = argv[3];
    s.quick = strcmp(argv[4], "quick") == 0;
    desc.threads = argc > 5 ? atoi(argv[5]) : 0;
    desc.log = on_log;
    s.ctx = spm_context_create(&desc);
    if (!s.ctx) {
        fprintf(stderr, "study: no context: this machine lacks the instruction set in SPURMEM_ISA\n");
        return 1;
    }
    catch_interrupts();
    progress_quiet = !stderr_is_terminal();
    (void)spm_directory_create(s.ctx, s.out, &s.err);
    for (seed = 1; ok && seed <= (s.quick ? 1 : 5); seed++) {
        for (net = 0; ok && net < (s.quick ? 1 : N_NETS); net++) {
            for (set = 0; ok && set < (s.quick ? 2 : N_SETS); set++) {
                spm_dataset *data = open_set(&s, set, seed);
                ok = !stopped(&s);
                if (!data && ok && seed == 1 && net == 0)
                    fprintf(stderr, "%s: not there, left out\n", sets[set].name);
                spm_dataset_close(data);
                if (data) ok = block(&s, set, net, seed) && !stopped(&s);
            }
        }
    }
    progress_clear();
    if (ok) {
        table_text(&s, stdout);
        printf("\n%s/results.json has every run\n", s.out);
    } else
        fprintf(stderr, "study: %s\n", s.err.status ? s.err.text : "stopped; the same command goes on");
    spm_context_destroy(s.ctx);
    return ok ? 0 : 1;
}
