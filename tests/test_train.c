/* Section TRAIN: training learns; a step is what METHOD 2.6 writes down (done here with three forwards and gradients by
 * central differences); the same bits for any number of threads and however often a run is cut off and resumed; no
 * allocation in a step; sentences for everything that can be wrong. */
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
  #define _POSIX_C_SOURCE 200809L /* fork */
#endif
#include "../spurmem.h"
#include "failing.h"
#include "tiny.h"
#include "training.h"
#if !defined(_WIN32)
  #include <sys/types.h>
  #include <sys/wait.h>
  #include <unistd.h>
#endif

/* Takes the value of "seconds" out of every line: the one number that may differ. */
static size_t without_seconds(char *text, size_t size)
{
    size_t from = 0, to = 0;
    while (from < size) {
        if (size - from > 9 && memcmp(text + from, "\"seconds\"", 9) == 0) {
            while (from < size && text[from] != '}') from++;
        }
        if (from < size) text[to++] = text[from++];
    }
    return to;
}

/* Two runs must have come out the same: checkpoints, metrics, and the log of steps if `steps`. */
static int same_runs(const char *a, const char *b, int steps)
{
    int i, same = 1;
    for (i = 1; i < 6; i++) {
        size_t n = 0, m = 0;
        char *x, *y;
        if (i == 4 || (i == 5 && !steps)) continue;
        x = slurp(a, run_files[i], &n);
        y = slurp(b, run_files[i], &m);
        CHECK(x != NULL && y != NULL);
        if (x && y && i == 1) {
            n = without_seconds(x, n);
            m = without_seconds(y, m);
        }
        if (!x || !y || n != m || memcmp(x, y, n) != 0) {
            printf("    %s and %s: %s differs\n", a, b, run_files[i]);
            same = 0;
        }
        free(x);
        free(y);
    }
    return same;
}

/* Line `index` of a file of JSON lines (free it). */
static spm_json_value *json_line(spm_context *ctx, const char *run, const char *file, int index)
{
    size_t size = 0, at = 0, end;
    char *text = slurp(run, file, &size);
    spm_json_value *value = NULL;
    while (text && index-- > 0) {
        while (at < size && text[at] != '\n') at++;
        at++;
    }
    for (end = at; text && end < size && text[end] != '\n'; end++) {}
    if (text && end > at) value = spm_json_parse(ctx, file, text + at, end - at, NULL);
    free(text);
    return value;
}

static int count_lines(const char *run, const char *file)
{
    size_t size = 0, i;
    char *text = slurp(run, file, &size);
    int n = 0;
    for (i = 0; i < size; i++) n += text[i] == '\n';
    free(text);
    return n;
}

static double field(const spm_json_value *object, const char *key)
{
    return spm_json_as_number(spm_json_get(object, key), -1e9);
}

/* ---- learning ---- */

static int64_t epochs_seen;
static double epoch_wga[16];

static void on_epoch(void *user, int64_t epoch, const spm_eval *train_eval, const spm_eval *val, const spm_eval *test, double loss, double seconds)
{
    (void)user;
    CHECK_INT(epoch, epochs_seen);
    CHECK_INT(train_eval->count, 26);
    CHECK_INT(val->count, 12);
    CHECK_INT(test->count, 17);
    CHECK(loss > 0.0 && seconds >= 0.0);
    epoch_wga[epochs_seen & 15] = val->worst_accuracy;
    epochs_seen++;
}

static void erm_learns(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_model *model = tiny_model(b.ctx, TINY_ARCH, 0);
    spm_checkpoint_info info;
    spm_json_value *line, *first;
    spm_eval_desc evaluation = SPM_ZERO;
    spm_eval eval;
    double best = -1.0;
    int i, best_epoch = -1;
    desc.epochs = 10;
    desc.keep_every = 4;
    desc.on_epoch = on_epoch;
    epochs_seen = 0;
    check_trained(&b, &desc, fresh("learn"));
    CHECK_INT(result.epochs, 10);
    CHECK_INT(result.steps, 40);
    CHECK_INT(result.stopped, 0);
    CHECK_INT(epochs_seen, 10);
    CHECK_INT(count_lines("learn", "steps.jsonl"), 40);
    CHECK_INT(count_lines("learn", "metrics.jsonl"), 30);
    CHECK(test_exists(tiny_path("learn", "epoch-003.safetensors")) && !test_exists(tiny_path("learn", "epoch-002.safetensors")));
    for (i = 0; i < 10; i++) {
        if (epoch_wga[i] > best) {
            best = epoch_wga[i];
            best_epoch = i;
        }
    }
    CHECK_INT(result.best_epoch, best_epoch); /* the first of equally good ones */
    CHECK_NEAR(result.best_score, best, 0.0);
    /* metrics.jsonl: a line per epoch and split, in this order */
    first = json_line(b.ctx, "learn", "metrics.jsonl", 0);
    line = json_line(b.ctx, "learn", "metrics.jsonl", 27);
    CHECK_INT(spm_json_as_int(spm_json_get(line, "epoch"), -1), 9);
    CHECK_STR(spm_json_as_string(spm_json_get(line, "split"), ""), "train");
    CHECK(field(line, "mean_accuracy") > 0.95);
    CHECK(field(line, "loss") < 0.5 * field(first, "loss"));
    CHECK(field(line, "adjusted_accuracy") > 0.9 && field(line, "worst_group_accuracy") > 0.6 && field(line, "seconds") >= 0.0);
    CHECK_INT(spm_json_length(spm_json_get(line, "groups")), 4);
    /* last.safetensors is the model those numbers belong to, and says what it is */
    CHECK(spm_checkpoint_inspect(b.ctx, tiny_path("learn", "last.safetensors"), &info, NULL) == SPM_OK);
    CHECK_STR(info.method, "erm");
    CHECK_STR(info.class_names, "landbird|waterbird");
    CHECK_INT(info.epoch, 9);
    CHECK_INT(info.transform.height, TINY_SIZE);
    CHECK_STR(info.arch.name, TINY_ARCH);
    CHECK(spm_checkpoint_load(model, tiny_path("learn", "last.safetensors"), 0, NULL) == SPM_OK);
    evaluation.reading = desc.reading;
    CHECK(spm_evaluate(model, b.set, &evaluation, &eval, NULL) == SPM_OK);
    CHECK_NEAR(eval.loss, field(line, "loss"), 1e-8);
    spm_eval_free(b.ctx, &eval);
    CHECK(spm_checkpoint_inspect(b.ctx, tiny_path("learn", "best.safetensors"), &info, NULL) == SPM_OK);
    CHECK_INT(info.epoch, best_epoch);
    spm_json_free(b.ctx, first);
    spm_json_free(b.ctx, line);
    /* steps: from 1, all of them */
    line = json_line(b.ctx, "learn", "steps.jsonl", 39);
    CHECK_INT(spm_json_as_int(spm_json_get(line, "step"), -1), 40);
    CHECK_NEAR(field(line, "lr"), 2e-3, 1e-9);
    CHECK_NEAR(field(line, "loss"), field(line, "ce"), 0.0);
    spm_json_free(b.ctx, line);
    spm_model_destroy(model);
    bench_close(&b);
}

/* Which epoch is best, by each rule; evaluation every second epoch; no validation split. */
static void selection(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    tiny_counts counts = tiny_usual();
    spm_json_value *line;
    double best = -1.0;
    int i, best_epoch = -1;
    desc.epochs = 5;
    desc.eval_every = 2;
    desc.select = SPM_SELECT_ACCURACY;
    check_trained(&b, &desc, fresh("select"));
    CHECK_INT(count_lines("select", "metrics.jsonl"), 9); /* epochs 1, 3 and the last, 4 */
    for (i = 0; i < 3; i++) {
        line = json_line(b.ctx, "select", "metrics.jsonl", 3 * i + 1);
        CHECK_STR(spm_json_as_string(spm_json_get(line, "split"), ""), "val");
        CHECK_INT(spm_json_as_int(spm_json_get(line, "epoch"), -1), i < 2 ? 2 * i + 1 : 4);
        if (field(line, "mean_accuracy") > best) {
            best = field(line, "mean_accuracy");
            best_epoch = i < 2 ? 2 * i + 1 : 4;
        }
        spm_json_free(b.ctx, line);
    }
    CHECK_INT(result.best_epoch, best_epoch);
    CHECK_NEAR(result.best_score, best, 1e-8);
    desc.select = SPM_SELECT_LAST;
    desc.epochs = 2;
    desc.eval_every = 0;
    check_trained(&b, &desc, fresh("select"));
    CHECK_INT(result.best_epoch, 1);
    spm_dataset_close(b.set);
    memset(counts.group[1], 0, sizeof counts.group[1]);
    b.set = tiny_data(b.ctx, "noval", &counts);
    desc.select = SPM_SELECT_WGA;
    logs = 0;
    check_trained(&b, &desc, fresh("select"));
    CHECK_INT(result.best_epoch, 1);
    CHECK_INT(logs, 1);
    CHECK(strstr(last_log, "no validation split") != NULL);
    CHECK_INT(count_lines("select", "metrics.jsonl"), 4);
    bench_close(&b);
}

/* ---- one step, worked out here ---- */

/* Normalised temperature-scaled cross-entropy of rows a and b, [n][d] each (METHOD 2.6), in double. */
static double plain_ntx(const double *a, const double *b, int n, int d, double tau)
{
    double z[16][64], total = 0.0;
    int i, j, k;
    for (i = 0; i < 2 * n; i++) {
        const double *x = i < n ? a + i * d : b + (i - n) * d;
        double norm = 0.0;
        for (k = 0; k < d; k++) norm += x[k] * x[k];
        for (k = 0; k < d; k++) z[i][k] = x[k] / sqrt(norm);
    }
    for (i = 0; i < 2 * n; i++) {
        double sum = 0.0, positive = 0.0;
        for (j = 0; j < 2 * n; j++) {
            double dot = 0.0;
            if (j == i) continue;
            for (k = 0; k < d; k++) dot += z[i][k] * z[j][k];
            sum += exp(dot / tau);
            if (j == (i + n) % (2 * n)) positive = dot / tau;
        }
        total += log(sum) - positive;
    }
    return total / (2 * n);
}

/* d plain_ntx / d a (which = 0) or d b (1), by central differences. */
static void plain_ntx_gradient(double *a, double *b, int n, int d, double tau, int which, double *gradient)
{
    double *x = which ? b : a;
    int i;
    for (i = 0; i < n * d; i++) {
        const double kept = x[i], h = 1e-5;
        double high, low;
        x[i] = kept + h;
        high = plain_ntx(a, b, n, d, tau);
        x[i] = kept - h;
        low = plain_ntx(a, b, n, d, tau);
        x[i] = kept;
        gradient[i] = (high - low) / (2.0 * h);
    }
}

/* Weighted cross-entropy of outputs [n][2] in column order; adds scale * its gradient to `gradient`. */
static double plain_ce(const float *outputs, const int *column, const double *weight, int n, double scale, double *gradient)
{
    double total = 0.0;
    int i;
    for (i = 0; i < n; i++) {
        double other = (double)outputs[2 * i + 1 - column[i]], mine = (double)outputs[2 * i + column[i]], p = 1.0 / (1.0 + exp(other - mine));
        total -= weight[i] * log(p);
        gradient[2 * i + column[i]] += scale * weight[i] * (p - 1.0);
        gradient[2 * i + 1 - column[i]] += scale * weight[i] * (1.0 - p);
    }
    return total;
}

static int by_size(const void *x, const void *y)
{
    float a = *(const float *)x, b = *(const float *)y;
    return a < b ? -1 : a > b;
}

/* Q8: mask = |w| >= v[min(ceil(f n), n - 1)] over the weights of all convolutions, v ascending. */
static void plain_official_mask(spm_model *model, spm_run *pruned, double fraction)
{
    float *v = NULL, threshold;
    int64_t n = 0, k, j;
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        int64_t count = spm_tensor_count(&p->value);
        if (p->value.rank != 4) continue;
        v = (float *)realloc(v, (size_t)(n + count) * sizeof(float));
        for (j = 0; j < count; j++) v[n++] = fabsf(p->value.data[j]);
    }
    qsort(v, (size_t)n, sizeof *v, by_size);
    k = (int64_t)ceil(fraction * (double)n);
    threshold = v[k < n - 1 ? k : n - 1];
    for (i = 0, k = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        int64_t count = spm_tensor_count(&p->value);
        float *keep;
        if (p->value.rank != 4) continue;
        keep = (float *)malloc((size_t)count * sizeof(float));
        for (j = 0; j < count; j++) {
            keep[j] = fabsf(p->value.data[j]) >= threshold;
            k += keep[j] == 0.0f;
        }
        CHECK(spm_run_set_mask(pruned, i, keep) == SPM_OK);
        free(keep);
    }
    CHECK_INT(k, ceil(fraction * (double)n)); /* no ties among random weights */
    free(v);
}

/* The ranking for mask memory: every score is divided by its mean over the majority groups 0 and 3: what the minority alone needs. */
static spm_unit *plain_memory_ranking(spm_model *model, spm_dataset *set, const spm_train_desc *desc, int group)
{
    spm_unit *units[3] = { NULL, NULL, NULL };
    int64_t count = 0, used, i, j, k;
    int m;
    for (m = 0; m < 3; m++) {
        spm_attr_desc attr = SPM_ZERO;
        attr.reading = desc->reading;
        attr.criterion = desc->criterion;
        attr.group = m == 0 ? group : m == 1 ? 0 : 3;
        CHECK(spm_rank_units(model, set, &attr, NULL, &units[m], &count, &used, NULL) == SPM_OK);
    }
    for (i = 0; i < count; i++) {
        double sum = 0.0;
        for (m = 1; m < 3; m++) {
            for (j = 0; j < count; j++) {
                if (units[m][j].parameter == units[0][i].parameter && units[m][j].channel == units[0][i].channel) sum += units[m][j].score;
            }
        }
        units[0][i].score /= sum / 2.0;
    }
    for (i = 0; i < count; i++) { /* sorted by selection */
        for (j = k = i; j < count; j++) {
            if (units[0][j].score > units[0][k].score) k = j;
        }
        units[1][0] = units[0][i];
        units[0][i] = units[0][k];
        units[0][k] = units[1][0];
    }
    spm_free(spm_dataset_context(set), units[1]);
    spm_free(spm_dataset_context(set), units[2]);
    return units[0];
}

/* The rankings of the minority groups 1 and 2 take turns until ceil(f * units) are off. */
static void plain_critical_mask(spm_model *model, spm_dataset *set, const spm_train_desc *desc, spm_run *pruned)
{
    spm_context *ctx = spm_dataset_context(set);
    spm_unit *units[2] = { NULL, NULL };
    float *keep[256];
    int64_t count = 0, used, wanted, taken = 0, i, j;
    int g, k;
    memset(keep, 0, sizeof keep);
    for (g = 0; g < 2; g++) {
        spm_attr_desc attr = SPM_ZERO;
        attr.reading = desc->reading;
        attr.criterion = desc->criterion;
        attr.group = g + 1;
        CHECK(spm_rank_units(model, set, &attr, NULL, &units[g], &count, &used, NULL) == SPM_OK);
        if (desc->mask != SPM_MASK_MEMORY) continue;
        spm_free(ctx, units[g]);
        units[g] = plain_memory_ranking(model, set, desc, g + 1);
    }
    wanted = (int64_t)ceil(desc->prune_fraction * (double)count);
    for (i = 0; i < count; i++) {
        for (g = 0; g < 2 && taken < wanted; g++) {
            const spm_parameter *p = spm_model_parameter(model, units[g][i].parameter);
            int64_t total = spm_tensor_count(&p->value), row = total / p->value.shape[0];
            float **mask = &keep[units[g][i].parameter];
            if (!*mask) {
                *mask = (float *)malloc((size_t)total * sizeof(float));
                for (j = 0; j < total; j++) (*mask)[j] = 1.0f;
            }
            if ((*mask)[units[g][i].channel * row] == 0.0f) continue;
            for (j = 0; j < row; j++) (*mask)[units[g][i].channel * row + j] = 0.0f;
            taken++;
        }
    }
    CHECK_INT(taken, wanted);
    for (k = 0; k < 256; k++) {
        if (keep[k]) CHECK(spm_run_set_mask(pruned, k, keep[k]) == SPM_OK);
        free(keep[k]);
    }
    spm_free(ctx, units[0]);
    spm_free(ctx, units[1]);
}

/* The published code's option: the share with the largest gradients of all examples' poorest (Q9: surest) ones. */
static void plain_gradient_mask(spm_model *model, spm_dataset *set, const spm_train_desc *desc, spm_run *pruned)
{
    spm_attr_desc attr = SPM_ZERO;
    spm_unit *units = NULL;
    float *keep[256];
    int64_t count = 0, used, i, j;
    int k;
    memset(keep, 0, sizeof keep);
    attr.reading = desc->reading;
    attr.group = -1;
    attr.samples = desc->mask_samples;
    attr.surest = desc->mask_surest;
    attr.convolutions_only = 1;
    CHECK(spm_rank_units(model, set, &attr, NULL, &units, &count, &used, NULL) == SPM_OK);
    CHECK_INT(used, desc->mask_samples);
    for (i = 0; i < (int64_t)ceil(desc->prune_fraction * (double)count); i++) {
        const spm_parameter *p = spm_model_parameter(model, units[i].parameter);
        int64_t total = spm_tensor_count(&p->value), row = total / p->value.shape[0];
        float **mask = &keep[units[i].parameter];
        if (!*mask) {
            *mask = (float *)malloc((size_t)total * sizeof(float));
            for (j = 0; j < total; j++) (*mask)[j] = 1.0f;
        }
        for (j = 0; j < row; j++) (*mask)[units[i].channel * row + j] = 0.0f;
    }
    for (k = 0; k < 256; k++) {
        if (keep[k]) CHECK(spm_run_set_mask(pruned, k, keep[k]) == SPM_OK);
        free(keep[k]);
    }
    spm_free(spm_dataset_context(set), units);
}

typedef struct plain_losses {
    double total, ce, ce_pruned, ntxent;
} plain_losses;

/* METHOD 2.6 as it stands there: f1 = dense(x) without gradient, f2 = pruned(x), NTX(stop f1, f2); f1' = dense(x),
 * NTX(f1', stop f2), lambda CE(f1'); statistics committed by each forward of the three where they are shared. SGD. */
static plain_losses plain_step(spm_model *model, spm_run *dense, spm_run *pruned, bench *b, const spm_train_desc *desc, const int64_t *ids, int n)
{
    const spm_program *program = spm_model_program(model);
    spm_value image = spm_program_find(program, "image"), outputs = spm_program_find(program, "outputs");
    spm_value contrast = spm_program_find(program, desc->contrast == SPM_CONTRAST_OUTPUTS ? "outputs" : "features");
    int d = desc->contrast == SPM_CONTRAST_OUTPUTS ? 2 : 64, i, column[8], method = desc->method == SPM_METHOD_INTERVENE;
    int ntx = method && desc->contrast != SPM_CONTRAST_NONE, ce = !method || desc->cross_entropy, ce_pruned = method && desc->cross_entropy && desc->cross_entropy_pruned;
    static float pixels[8 * TINY_SIZE * TINY_SIZE * 3], g[8 * 64];
    static double f1[8 * 64], f2[8 * 64], d_f1[8 * 64], d_f2[8 * 64];
    double weight[8], d_dense[16] = { 0 }, d_pruned[16] = { 0 };
    plain_losses loss = { 0, 0, 0, 0 };
    for (i = 0; i < n; i++) {
        const spm_example *e = spm_dataset_example(b->set, ids[i]);
        int balanced = method && desc->group_weighting && desc->group_labels;
        tiny_pixels(b->set, &desc->reading, ids[i], pixels + i * TINY_SIZE * TINY_SIZE * 3);
        column[i] = desc->reading.label_reversed ? 1 - e->y : e->y;
        weight[i] = (balanced ? 26.0 / (4.0 * (double)spm_dataset_group_count(b->set, SPM_TRAIN, e->group)) : 1.0) / n;
    }
    memset(d_f1, 0, sizeof d_f1);
    memset(d_f2, 0, sizeof d_f2);
    spm_model_zero_gradients(model);
    (void)spm_run_input(dense, image, pixels);
    (void)spm_run_input(pruned, image, pixels);
    if (ntx || ce_pruned) {
        CHECK(spm_run_forward(dense, n, 1) == SPM_OK);
        for (i = 0; i < n * d; i++) f1[i] = (double)spm_run_data(dense, contrast)[i];
        if (desc->bn_shared) (void)spm_run_commit_statistics(dense, 0.1f);
        CHECK(spm_run_forward(pruned, n, 1) == SPM_OK);
        for (i = 0; i < n * d; i++) f2[i] = (double)spm_run_data(pruned, contrast)[i];
        (void)spm_run_commit_statistics(pruned, 0.1f);
        if (ntx) {
            loss.ntxent = plain_ntx(f1, f2, n, d, (double)desc->tau);
            plain_ntx_gradient(f1, f2, n, d, (double)desc->tau, 1, d_f2);
        }
        if (ce_pruned) loss.ce_pruned = plain_ce(spm_run_data(pruned, outputs), column, weight, n, (double)desc->lambda, d_pruned);
        for (i = 0; i < n * 2; i++) g[i] = (float)(d_pruned[i] + (contrast == outputs ? d_f2[i] : 0.0));
        CHECK(spm_run_set_gradient(pruned, outputs, g) == SPM_OK);
        for (i = 0; i < n * d; i++) g[i] = (float)d_f2[i];
        if (contrast != outputs) CHECK(spm_run_set_gradient(pruned, contrast, g) == SPM_OK);
        CHECK(spm_run_backward(pruned) == SPM_OK);
    }
    CHECK(spm_run_forward(dense, n, 1) == SPM_OK);
    if (ntx) {
        for (i = 0; i < n * d; i++) f1[i] = (double)spm_run_data(dense, contrast)[i];
        loss.ntxent += plain_ntx(f1, f2, n, d, (double)desc->tau);
        plain_ntx_gradient(f1, f2, n, d, (double)desc->tau, 0, d_f1);
    }
    if (ce) loss.ce = plain_ce(spm_run_data(dense, outputs), column, weight, n, method ? (double)desc->lambda : 1.0, d_dense);
    for (i = 0; i < n * 2; i++) g[i] = (float)(d_dense[i] + (contrast == outputs ? d_f1[i] : 0.0));
    CHECK(spm_run_set_gradient(dense, outputs, g) == SPM_OK);
    for (i = 0; i < n * d; i++) g[i] = (float)d_f1[i];
    if (contrast != outputs) CHECK(spm_run_set_gradient(dense, contrast, g) == SPM_OK);
    CHECK(spm_run_backward(dense) == SPM_OK);
    (void)spm_run_commit_statistics(dense, 0.1f);
    spm_model_finish_gradients(model);
    loss.total = loss.ntxent + (method ? (double)desc->lambda : 1.0) * (loss.ce + loss.ce_pruned);
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        int64_t j;
        if (p->flags & SPM_PARAMETER_BUFFER) continue;
        for (j = 0; j < spm_tensor_count(&p->value); j++) p->value.data[j] -= desc->optimizer.lr * p->gradient[j];
    }
    spm_model_touch(model);
    return loss;
}

/* Two steps of spm_train from a checkpoint against two steps done here. */
static void check_steps(bench *b, spm_train_desc *desc, const char *name)
{
    spm_model *start = spm_model_build(b->ctx, &desc->arch, 77, NULL), *mine = spm_model_build(b->ctx, &desc->arch, 0, NULL);
    spm_model *trained = spm_model_build(b->ctx, &desc->arch, 1, NULL);
    spm_run_desc running = SPM_ZERO;
    spm_run *dense, *pruned;
    char file[900];
    const int64_t *ids = spm_dataset_split_ids(b->set, SPM_TRAIN);
    plain_losses losses[2];
    int i, step;
    snprintf(file, sizeof file, "%s", tiny_path("start.safetensors", ""));
    for (i = 0; i < spm_model_parameter_count(start); i++) { /* away from the start values of norms and statistics */
        spm_parameter *p = spm_model_parameter(start, i);
        int64_t j;
        for (j = 0; p->value.rank == 1 && j < spm_tensor_count(&p->value); j++) p->value.data[j] += 0.3f * spm_random_uniform(8, (uint64_t)i, (uint64_t)j);
    }
    CHECK(spm_checkpoint_save(start, file, NULL, NULL) == SPM_OK);
    CHECK(spm_checkpoint_load(mine, file, 0, NULL) == SPM_OK);
    desc->checkpoint = file;
    desc->shuffle = 0;
    desc->max_steps = 2;
    desc->optimizer.kind = SPM_SGD;
    desc->optimizer.lr = 0.05f;
    check_trained(b, desc, fresh(name));
    CHECK_INT(result.steps, 2);
    CHECK_INT(result.stopped, 1);
    running.max_batch = 8;
    running.backward = 1;
    dense = spm_run_create(mine, &running, NULL);
    pruned = spm_run_create(mine, &running, NULL);
    if (!desc->bn_shared) (void)spm_run_own_buffers(pruned, 1);
    if (desc->method == SPM_METHOD_INTERVENE && desc->mask == SPM_MASK_OFFICIAL) plain_official_mask(mine, pruned, desc->prune_fraction);
    if (desc->method == SPM_METHOD_INTERVENE && (desc->mask == SPM_MASK_CRITICAL || desc->mask == SPM_MASK_MEMORY)) plain_critical_mask(mine, b->set, desc, pruned);
    if (desc->method == SPM_METHOD_INTERVENE && desc->mask == SPM_MASK_GRADIENT) plain_gradient_mask(mine, b->set, desc, pruned);
    for (step = 0; step < 2; step++) losses[step] = plain_step(mine, dense, pruned, b, desc, ids + 8 * step, 8);
    CHECK(spm_checkpoint_load(trained, tiny_path(name, "last.safetensors"), 0, NULL) == SPM_OK);
    for (step = 0; step < 2; step++) {
        spm_json_value *line = json_line(b->ctx, name, "steps.jsonl", step);
        CHECK_INT(spm_json_as_int(spm_json_get(line, "step"), -1), step + 1);
        CHECK_NEAR(field(line, "loss"), losses[step].total, 2e-4);
        CHECK_NEAR(field(line, "ce"), losses[step].ce, 2e-4);
        if (desc->method == SPM_METHOD_INTERVENE) {
            CHECK_NEAR(field(line, "ntxent"), losses[step].ntxent, 2e-4);
            CHECK_NEAR(field(line, "ce_pruned"), losses[step].ce_pruned, 2e-4);
        }
        spm_json_free(b->ctx, line);
    }
    for (i = 0; i < spm_model_parameter_count(mine); i++) { /* what the steps have changed, against the largest change */
        const spm_parameter *s = spm_model_parameter(start, i), *p = spm_model_parameter(mine, i), *t = spm_model_parameter(trained, i);
        double most = 0.0, off = 0.0;
        int64_t j;
        for (j = 0; j < spm_tensor_count(&p->value); j++) {
            most = fmax(most, fabs((double)p->value.data[j] - (double)s->value.data[j]));
            off = fmax(off, fabs((double)p->value.data[j] - (double)t->value.data[j]));
        }
        if (!(off <= 5e-3 * most + 1e-6)) {
            printf("    %s: %s is off by %g of a change of %g\n", name, p->name, off, most);
            CHECK(0);
        }
    }
    spm_run_destroy(dense);
    spm_run_destroy(pruned);
    spm_model_destroy(start);
    spm_model_destroy(mine);
    spm_model_destroy(trained);
}

static void steps_of_erm(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    check_steps(&b, &desc, "step_erm");
    desc.reading.label_reversed = 1;
    check_steps(&b, &desc, "step_erm");
    desc.segments = 1; /* less memory, the same numbers */
    check_steps(&b, &desc, "step_erm");
    desc.segments = 0;
    desc.keep_norms = 1; /* more memory */
    check_steps(&b, &desc, "step_erm");
    bench_close(&b);
}

static void steps_of_the_sound_profile(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    check_steps(&b, &desc, "step_sound");
    desc.cross_entropy_pruned = 1;
    desc.lambda = 0.7f;
    check_steps(&b, &desc, "step_sound");
    desc.mask = SPM_MASK_MEMORY;
    check_steps(&b, &desc, "step_sound");
    desc.mask = SPM_MASK_CRITICAL;
    desc.group_weighting = 0;
    desc.cross_entropy_pruned = 0;
    desc.bn_shared = 1;
    desc.tau = 0.1f;
    desc.criterion = SPM_CRITERION_WEIGHT_GRADIENT;
    check_steps(&b, &desc, "step_sound");
    bench_close(&b);
}

static void steps_of_the_official_profile(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    desc.official = 1;
    desc.arch.softmax_head = desc.reading.softmax_head = 1;
    desc.reading.label_reversed = 1;
    desc.lambda = 0.2f;
    desc.mask = SPM_MASK_OFFICIAL;
    desc.contrast = SPM_CONTRAST_OUTPUTS;
    desc.bn_shared = 1;
    desc.group_weighting = 0;
    check_steps(&b, &desc, "step_official");
    desc.prune_fraction = 0.01;
    desc.bn_shared = 0;
    check_steps(&b, &desc, "step_official");
    bench_close(&b);
}

/* The mask by gradient, the right way and the published code's (Q9); in a ViT single weights, exactly that share. */
static void steps_of_the_gradient_mask(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    spm_model *start;
    spm_attr_desc attr = SPM_ZERO;
    spm_unit *units = NULL;
    spm_archive *state;
    char file[900];
    int64_t count = 0, used, i, singles = 0, off = 0, wanted;
    float *mask = NULL;
    desc.mask = SPM_MASK_GRADIENT;
    desc.mask_samples = 8;
    check_steps(&b, &desc, "step_gradient");
    desc.mask_surest = 1;
    check_steps(&b, &desc, "step_gradient");
    desc.arch = tiny_arch(b.ctx, "vit:patch=4,dim=16,depth=2,heads=2,mlp=2");
    start = spm_model_build(b.ctx, &desc.arch, 5, NULL);
    snprintf(file, sizeof file, "%s", tiny_path("start.safetensors", ""));
    CHECK(start && spm_checkpoint_save(start, file, NULL, NULL) == SPM_OK);
    desc.checkpoint = file;
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("step_gradient"));
    attr.reading = desc.reading;
    attr.group = -1;
    attr.samples = 8;
    attr.surest = 1;
    attr.kind = SPM_UNIT_WEIGHT;
    CHECK(spm_rank_units(start, b.set, &attr, NULL, &units, &count, &used, NULL) == SPM_OK);
    for (i = 0; i < count; i++) singles += spm_model_parameter(start, units[i].parameter)->value.rank == 2;
    wanted = (int64_t)ceil(0.05 * (double)singles);
    CHECK(wanted > 100);
    state = spm_archive_open(b.ctx, tiny_path("step_gradient", "state.safetensors"), NULL);
    CHECK(state != NULL);
    for (i = 0; state && i < count && wanted > 0; i++) {
        const spm_parameter *p = spm_model_parameter(start, units[i].parameter);
        const spm_archive_tensor *t;
        char name[300];
        if (p->value.rank != 2) continue;
        snprintf(name, sizeof name, "mask.%s", p->name);
        t = spm_archive_find(state, name);
        CHECK(t != NULL);
        mask = (float *)malloc((size_t)spm_tensor_count(&p->value) * sizeof(float));
        if (t && spm_archive_read_f32(state, t, mask, NULL) == SPM_OK) off += mask[units[i].channel] == 0.0f;
        free(mask);
        wanted--;
    }
    CHECK_INT(off, (int64_t)ceil(0.05 * (double)singles));
    spm_archive_close(state);
    spm_free(b.ctx, units);
    spm_model_destroy(start);
    bench_close(&b);
}

/* The ablations: no mask, contrast alone, cross-entropy alone. */
static void steps_of_ablations(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    desc.mask = SPM_MASK_NONE;
    check_steps(&b, &desc, "step_ablation");
    desc.cross_entropy = 0;
    desc.mask = SPM_MASK_OFFICIAL;
    check_steps(&b, &desc, "step_ablation");
    desc.cross_entropy = 1;
    desc.contrast = SPM_CONTRAST_NONE;
    check_steps(&b, &desc, "step_ablation");
    desc.cross_entropy_pruned = 1;
    check_steps(&b, &desc, "step_ablation");
    bench_close(&b);
}

/* mask random: as many units as critical masks, whole rows; seen in the saved state. */
static void random_mask(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    spm_model *model = tiny_model(b.ctx, TINY_ARCH, 0);
    spm_archive *state;
    int64_t i, j, c, units = 0, off = 0;
    desc.mask = SPM_MASK_RANDOM;
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("random"));
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, (int)i);
        if ((p->flags & SPM_PARAMETER_PRUNABLE) && !(p->flags & SPM_PARAMETER_HEAD)) units += p->value.shape[0];
    }
    state = spm_archive_open(b.ctx, tiny_path("random", "state.safetensors"), NULL);
    CHECK(state != NULL);
    for (i = 0; i < spm_archive_count(state); i++) {
        const spm_archive_tensor *t = spm_archive_tensor_at(state, i);
        const spm_parameter *p;
        float *keep;
        int64_t row;
        if (strncmp(t->name, "mask.", 5) != 0) continue;
        p = spm_model_parameter(model, spm_model_find_parameter(model, t->name + 5));
        CHECK(p != NULL);
        keep = (float *)malloc((size_t)t->count * sizeof(float));
        CHECK(spm_archive_read_f32(state, t, keep, NULL) == SPM_OK);
        row = t->count / p->value.shape[0];
        for (c = 0; c < p->value.shape[0]; c++) {
            off += keep[c * row] == 0.0f;
            for (j = 0; j < row; j++) CHECK(keep[c * row + j] == keep[c * row]);
        }
        free(keep);
    }
    CHECK_INT(off, ceil(0.05 * (double)units));
    spm_archive_close(state);
    spm_model_destroy(model);
    bench_close(&b);
}

/* Clipping: an SGD step of rate 1 has the length of the clip; schedules, as the log of steps shows them. */
static void clip_and_schedules(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_model *start = tiny_model(b.ctx, TINY_ARCH, 77), *after = tiny_model(b.ctx, TINY_ARCH, 0);
    spm_json_value *line;
    char file[900];
    double sum = 0.0;
    int i;
    int64_t j;
    snprintf(file, sizeof file, "%s", tiny_path("start.safetensors", ""));
    CHECK(spm_checkpoint_save(start, file, NULL, NULL) == SPM_OK);
    desc.checkpoint = file;
    desc.optimizer.kind = SPM_SGD;
    desc.optimizer.lr = 1.0f;
    desc.clip = 0.01;
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("clip"));
    CHECK(spm_checkpoint_load(after, tiny_path("clip", "last.safetensors"), 0, NULL) == SPM_OK);
    for (i = 0; i < spm_model_parameter_count(start); i++) {
        const spm_parameter *p = spm_model_parameter(start, i), *q = spm_model_parameter(after, i);
        for (j = 0; j < spm_tensor_count(&p->value) && !(p->flags & SPM_PARAMETER_BUFFER); j++) {
            double d = (double)p->value.data[j] - (double)q->value.data[j];
            sum += d * d;
        }
    }
    CHECK_NEAR(sqrt(sum), 0.01, 1e-5);
    desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.warmup = 1;
    desc.epochs = 3;
    check_trained(&b, &desc, fresh("clip"));
    for (i = 0; i < 3; i++) {
        line = json_line(b.ctx, "clip", "steps.jsonl", 4 * i + 3);
        CHECK_NEAR(field(line, "lr"), 2e-3 * (i == 2 ? 0.5 : 1.0), 1e-8);
        spm_json_free(b.ctx, line);
    }
    desc = small_run(b.ctx, SPM_METHOD_ERM); /* a rate that only wanders: the plateau halves it each epoch */
    desc.schedule = SPM_SCHEDULE_PLATEAU;
    desc.patience = 0;
    desc.optimizer.lr = 0.0f;
    desc.epochs = 3;
    check_trained(&b, &desc, fresh("clip"));
    spm_model_destroy(start);
    spm_model_destroy(after);
    bench_close(&b);
}

/* ---- the same bits ---- */

static void same_bits_for_any_threads(void)
{
    int threads, method;
    for (method = 0; method < 2; method++) {
        for (threads = 1; threads <= 3; threads++) {
            bench b = bench_open(threads);
            spm_train_desc desc = small_run(b.ctx, method ? SPM_METHOD_INTERVENE : SPM_METHOD_ERM);
            char name[32];
            desc.augment = method ? SPM_AUGMENT_LIGHT : SPM_AUGMENT_PAPER;
            desc.workers = threads;
            snprintf(name, sizeof name, "threads%d", threads);
            check_trained(&b, &desc, fresh(name));
            if (threads > 1) CHECK(same_runs("threads1", name, 1));
            bench_close(&b);
        }
    }
}

/* A run of 2 epochs of 4 steps, cut off after each of `stops` and resumed, against one that is not. */
static void check_resumed(bench *b, const spm_train_desc *wanted, const int *stops, int n_stops)
{
    spm_train_desc desc = *wanted;
    int i;
    check_trained(b, &desc, fresh("unbroken"));
    CHECK_INT(result.steps, 8);
    (void)fresh("broken");
    for (i = 0; i <= n_stops; i++) {
        desc.resume = i > 0;
        desc.max_steps = i < n_stops ? stops[i] : 0;
        check_trained(b, &desc, "broken");
        CHECK_INT(result.steps, i < n_stops ? stops[i] : 8);
        CHECK_INT(result.stopped, i < n_stops && stops[i] < 8);
        CHECK(test_exists(tiny_path("broken", "best.safetensors")) && test_exists(tiny_path("broken", "last.safetensors")));
    }
    CHECK(same_runs("unbroken", "broken", 1));
}

static void resume_erm(void)
{
    static const int all[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, mid[1] = { 3 }, end[1] = { 4 };
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.augment = SPM_AUGMENT_PAPER;
    check_resumed(&b, &desc, all, 8);
    check_resumed(&b, &desc, mid, 1);
    check_resumed(&b, &desc, end, 1);
    desc.optimizer.kind = SPM_SGD;
    desc.optimizer.momentum = 0.9f;
    desc.schedule = SPM_SCHEDULE_PLATEAU;
    desc.patience = 0;
    desc.shuffle = 0;
    check_resumed(&b, &desc, all, 8);
    desc.optimizer.kind = SPM_ADAMW;
    desc.optimizer.momentum = 0.0f;
    desc.optimizer.weight_decay = 0.01f;
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.warmup = 1;
    desc.clip = 0.5;
    check_resumed(&b, &desc, mid, 1);
    desc.arch = tiny_arch(b.ctx, "vit:patch=8,dim=16,depth=2,heads=2,mlp=2,drop=0.2,drop_path=0.2"); /* random draws inside the network */
    check_resumed(&b, &desc, all, 8);
    bench_close(&b);
}

/* Every mask, contrast and setting of the batch norms, stopped amid each epoch and at the end of the first. */
static void resume_intervene(void)
{
    static const int stops[3] = { 2, 4, 7 };
    bench b = bench_open(2);
    int mask, contrast, shared;
    for (mask = SPM_MASK_CRITICAL; mask <= SPM_MASK_NONE; mask++) {
        for (contrast = SPM_CONTRAST_FEATURES; contrast <= SPM_CONTRAST_NONE; contrast++) {
            for (shared = 0; shared < 2; shared++) {
                spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
                desc.mask = (spm_mask_kind)mask;
                desc.contrast = (spm_contrast)contrast;
                desc.bn_shared = shared;
                desc.cross_entropy_pruned = contrast == SPM_CONTRAST_NONE;
                desc.arch.softmax_head = desc.reading.softmax_head = desc.official = contrast == SPM_CONTRAST_OUTPUTS;
                desc.augment = SPM_AUGMENT_LIGHT;
                if (contrast == SPM_CONTRAST_NONE && shared) continue; /* seen enough of it */
                check_resumed(&b, &desc, stops, 3);
            }
        }
    }
    bench_close(&b);
}

static int is_evaluation(const spm_progress *progress)
{
    return strncmp(progress->what, "evaluate", 8) == 0;
}

static int stop_each_step(void *user, const spm_progress *progress)
{
    CHECK_STR(progress->unit, "images");
    if (is_evaluation(progress)) return 0;
    CHECK(progress->total == 52 && progress->done <= 52 && progress->done > 0);
    ++*(int *)user;
    return 1;
}

/* Stops by the callback; a stop in the very last step is no stop; asking twice for the same number of steps does nothing. */
static void resume_after_callback(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    int i, calls = 0;
    size_t n, m;
    char *before, *after;
    check_trained(&b, &desc, fresh("unbroken"));
    desc.progress = stop_each_step;
    desc.progress_user = &calls;
    (void)fresh("broken");
    for (i = 0; i < 8; i++) {
        desc.resume = i > 0;
        check_trained(&b, &desc, "broken");
        CHECK_INT(result.steps, i + 1);
        CHECK_INT(result.stopped, i < 7);
    }
    CHECK_INT(calls, 8);
    CHECK(same_runs("unbroken", "broken", 1));
    check_trained(&b, &desc, "broken"); /* finished: resuming changes nothing */
    CHECK_INT(calls, 8);
    CHECK_INT(result.epochs, 2);
    CHECK(same_runs("unbroken", "broken", 1));
    desc.progress = NULL;
    desc.resume = 0;
    desc.max_steps = 3;
    check_trained(&b, &desc, fresh("broken"));
    before = slurp("broken", "last.safetensors", &n);
    desc.resume = 1;
    check_trained(&b, &desc, "broken");
    CHECK_INT(result.steps, 3);
    CHECK_INT(result.stopped, 1);
    after = slurp("broken", "last.safetensors", &m);
    CHECK(before && after && n == m && memcmp(before, after, n) == 0);
    free(before);
    free(after);
    /* a longer run of the same kind goes on where the shorter one ended */
    desc.max_steps = 0;
    desc.resume = 0;
    desc.epochs = 1;
    check_trained(&b, &desc, fresh("broken"));
    desc.resume = 1;
    desc.epochs = 2;
    check_trained(&b, &desc, "broken");
    CHECK(same_runs("unbroken", "broken", 1));
    bench_close(&b);
}

/* Stops at one batch of the evaluations, counted from 1. */
static int stop_in_evaluation(void *user, const spm_progress *progress)
{
    int *left = (int *)user;
    return is_evaluation(progress) && --*left == 0;
}

/* A stop amid an evaluation is at once and leaves nothing of it; the resumed run evaluates first, to the same files. */
static void resume_after_evaluation(void)
{
    static const spm_method methods[] = { SPM_METHOD_ERM, SPM_METHOD_INTERVENE, SPM_METHOD_JTT, SPM_METHOD_GROUPDRO };
    size_t m;
    for (m = 0; m < sizeof methods / sizeof *methods; m++) {
        bench b = bench_open(1);
        spm_train_desc desc = small_run(b.ctx, methods[m]);
        int left, stopped = 0, runs = 0;
        int64_t steps;
        desc.mask_every = 2;
        check_trained(&b, &desc, fresh("unbroken"));
        steps = result.steps;
        desc.progress = stop_in_evaluation;
        desc.progress_user = &left;
        (void)fresh("broken");
        for (; runs < 40; runs++) { /* in one place after another, JTT's error set among them */
            left = 1 + 5 * runs;
            desc.resume = runs > 0;
            check_trained(&b, &desc, "broken");
            stopped += result.stopped;
            if (!result.stopped) break;
            CHECK(result.steps <= steps);
        }
        CHECK(stopped >= 2);
        CHECK_INT(result.steps, steps);
        CHECK(same_runs("unbroken", "broken", 1));
        /* with a number of steps that ends with the epoch, the evaluation is still made up for */
        desc.progress = NULL;
        desc.resume = 0;
        desc.max_steps = 4;
        check_trained(&b, &desc, fresh("unbroken"));
        desc.progress = stop_in_evaluation;
        left = 1;
        check_trained(&b, &desc, fresh("broken"));
        CHECK(result.stopped);
        CHECK_INT(result.steps, 4);
        desc.progress = NULL;
        desc.resume = 1;
        check_trained(&b, &desc, "broken");
        CHECK_INT(result.steps, 4);
        CHECK(same_runs("unbroken", "broken", 1));
        bench_close(&b);
    }
}

#if !defined(_WIN32)
static int die_at_step_six(void *user, const spm_progress *progress)
{
    (void)user;
    if (!is_evaluation(progress) && progress->done >= 26 + 16) _exit(9); /* as a power cut would: nothing is closed or saved */
    return 0;
}
#endif

/* A process that dies amid the second epoch, and files that were written to after the state was saved. */
static void resume_after_death(void)
{
#if defined(_WIN32)
    SKIP("needs fork");
#else
    int method;
    for (method = 0; method < 2; method++) {
        spm_train_desc desc;
        bench b;
        FILE *f;
        int code = 0;
        pid_t child = fork();
        if (child == 0) {
            b = bench_open(2);
            desc = small_run(b.ctx, method ? SPM_METHOD_INTERVENE : SPM_METHOD_ERM);
            desc.progress = die_at_step_six;
            (void)train(&b, &desc, fresh("broken"));
            _exit(1);
        }
        CHECK(child > 0 && waitpid(child, &code, 0) == child);
        CHECK(WIFEXITED(code) && WEXITSTATUS(code) == 9);
        b = bench_open(2);
        desc = small_run(b.ctx, method ? SPM_METHOD_INTERVENE : SPM_METHOD_ERM);
        check_trained(&b, &desc, fresh("unbroken"));
        f = fopen(tiny_path("broken", "metrics.jsonl"), "ab");
        fputs("{\"epoch\":1,\"split\":\"tr", f);
        fclose(f);
        f = fopen(tiny_path("broken", "steps.jsonl"), "ab");
        fputs("{\"step\": 5, \"lo", f);
        fclose(f);
        desc.resume = 1;
        check_trained(&b, &desc, "broken");
        CHECK_INT(result.steps, 8);
        CHECK(same_runs("unbroken", "broken", 1));
        bench_close(&b);
    }
#endif
}

/* Pictures that cannot be read are left out, whole batches of them too; stopping and resuming keeps count. */
static void resume_with_bad_pictures(void)
{
    static const int bad[11] = { 2, 8, 9, 10, 11, 12, 13, 14, 15, 20, 25 }; /* the second batch has none left */
    tiny_counts counts = tiny_usual();
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_dataset_desc opening = SPM_ZERO;
    char file[32];
    int i;
    spm_dataset_close(b.set);
    spm_dataset_close(tiny_data(b.ctx, "holes", &counts));
    for (i = 0; i < 11; i++) {
        snprintf(file, sizeof file, "%03d.png", bad[i]);
        tiny_put(b.ctx, tiny_path("holes", file), "no picture");
    }
    opening.path = tiny_path("holes", "");
    b.set = spm_dataset_open(b.ctx, &opening, NULL);
    CHECK(train(&b, &desc, fresh("broken")) != SPM_OK);
    CHECK(strstr(last.text, ".png") != NULL);
    spm_dataset_close(b.set);
    opening.path = tiny_path("holes", "");
    opening.skip_bad_images = 1;
    b.set = spm_dataset_open(b.ctx, &opening, NULL);
    desc.shuffle = 0;
    check_trained(&b, &desc, fresh("unbroken"));
    CHECK_INT(result.steps, 6);
    CHECK_INT(spm_dataset_bad_count(b.set), 11);
    (void)fresh("broken");
    for (i = 1; i <= 6; i++) {
        desc.max_steps = i;
        desc.resume = i > 1;
        check_trained(&b, &desc, "broken");
        CHECK_INT(result.steps, i);
    }
    CHECK(same_runs("unbroken", "broken", 1));
    bench_close(&b);
}

/* ---- refusals ---- */

static void check_refused(bench *b, spm_train_desc *desc, const char *run, const char *a, const char *c)
{
    CHECK(train(b, desc, run) != SPM_OK);
    if (!strstr(last.text, a) || !strstr(last.text, c)) {
        printf("    \"%s\" lacks \"%s\" or \"%s\"\n", last.text, a, c);
        CHECK(0);
    }
}

/* Resuming with another setting names it and both values. */
static void changed_settings(void)
{
    bench b = bench_open(1);
    spm_train_desc begun = small_run(b.ctx, SPM_METHOD_INTERVENE), desc;
    tiny_counts counts = tiny_usual();
    spm_dataset *whole = b.set;
    begun.max_steps = 1;
    check_trained(&b, &begun, fresh("begun"));
    check_refused(&b, &begun, "begun", "begun", "--resume"); /* a folder with a run in it is not overwritten */
    begun.resume = 1;
    begun.max_steps = 2;
#define REFUSED(change, field_name, value) desc = begun; change; check_refused(&b, &desc, "begun", field_name " = ", value)
    REFUSED(desc.seed = 4, "seed", "now it is 4");
    REFUSED(desc.batch = 4, "batch", "now it is 4");
    REFUSED(desc.optimizer.lr = 1e-3f, "lr", "0.002");
    REFUSED(desc.optimizer.kind = SPM_ADAMW, "optimizer", "adamw");
    REFUSED(desc.optimizer.weight_decay = 0.5f, "weight_decay", "0.5");
    REFUSED(desc.optimizer.decay_all = 0, "decay_all", "now it is off");
    REFUSED(desc.shuffle = 0, "shuffle", "now it is off");
    REFUSED(desc.drop_last = 1, "drop_last", "now it is on");
    REFUSED(desc.augment = SPM_AUGMENT_LIGHT, "augment", "light");
    REFUSED(desc.schedule = SPM_SCHEDULE_PLATEAU, "schedule", "plateau");
    REFUSED(desc.warmup = 2, "warmup", "2");
    REFUSED(desc.clip = 1.5, "clip", "1.5");
    REFUSED(desc.select = SPM_SELECT_LAST, "select", "last");
    REFUSED(desc.eval_every = 3, "eval_every", "3");
    REFUSED(desc.reading.label_reversed = 1, "label_reversed", "on");
    REFUSED(desc.reading.transform.mean[0] = 0.5f, "normalize", "0.5");
    REFUSED(desc.reading.transform.resize = SPM_RESIZE_EXACT, "resize", "exact");
    REFUSED(desc.method = SPM_METHOD_ERM, "method", "erm");
    REFUSED(desc.arch = tiny_arch(b.ctx, "resnet18:width=16,stem=cifar"), "arch", "width=16");
    REFUSED(desc.tau = 0.25f, "tau", "0.25");
    REFUSED(desc.lambda = 0.25f, "lambda", "0.25");
    REFUSED(desc.prune_fraction = 0.5, "prune_fraction", "0.5");
    REFUSED(desc.mask = SPM_MASK_RANDOM, "mask", "random");
    REFUSED(desc.criterion = SPM_CRITERION_MAGNITUDE, "criterion", "magnitude");
    REFUSED(desc.contrast = SPM_CONTRAST_OUTPUTS, "contrast", "outputs");
    REFUSED(desc.cross_entropy = 0, "cross_entropy", "off");
    REFUSED(desc.cross_entropy_pruned = 1, "cross_entropy_pruned", "on");
    REFUSED(desc.bn_shared = 1, "bn", "shared");
    REFUSED(desc.group_labels = 0, "group_labels", "off");
    REFUSED(desc.official = 1, "profile", "official");
    counts.group[0][0] = 9;
    b.set = tiny_data(b.ctx, "other", &counts);
    REFUSED((void)0, "data_hash", "now it is");
    spm_dataset_close(b.set);
    b.set = whole;
#undef REFUSED
    check_trained(&b, &begun, "begun"); /* with the same ones it goes on */
    CHECK_INT(result.steps, 2);
    bench_close(&b);
}

static void sentences(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    spm_model *other = tiny_model(b.ctx, "resnet18:width=16,stem=cifar", 1);
    tiny_counts counts = tiny_usual();
    spm_dataset *whole = b.set;
    char path[900];
    FILE *f;
    /* settings that make no sense */
    desc.epochs = 0;
    check_refused(&b, &desc, fresh("bad"), "epochs is 0", "at least 1");
    desc.epochs = 1;
    desc.batch = 0;
    check_refused(&b, &desc, "bad", "batch is 0", "");
    desc.batch = 8;
    desc.tau = 0.0f;
    check_refused(&b, &desc, "bad", "tau is 0", "above 0");
    desc.tau = 0.5f;
    desc.prune_fraction = 1.0;
    check_refused(&b, &desc, "bad", "prune fraction is 1", "[0, 1)");
    desc.prune_fraction = 0.01;
    desc.contrast = SPM_CONTRAST_NONE;
    desc.cross_entropy = 0;
    check_refused(&b, &desc, "bad", "no loss to train on", "");
    desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.optimizer.momentum = 0.9f; /* Adam has none */
    check_refused(&b, &desc, "bad", "momentum", "");
    desc.optimizer.momentum = 0.0f;
    CHECK(!test_exists(tiny_path("bad", "config.json"))); /* nothing was begun */
    memset(&last, 0, sizeof last);
    desc.out = NULL;
    desc.log_steps = NULL;
    CHECK_INT(spm_train(b.ctx, b.set, &desc, &result, &last), SPM_E_ARGUMENT);
    CHECK(strstr(last.text, "--out") != NULL);
    /* folders */
    tiny_put(b.ctx, tiny_path("plain_file", ""), "a file");
    snprintf(path, sizeof path, "%s", tiny_path("plain_file", "run"));
    desc.out = path;
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_train(b.ctx, b.set, &desc, &result, &last), SPM_E_IO);
    CHECK(strstr(last.text, "plain_file") != NULL);
    desc.resume = 1;
    check_refused(&b, &desc, "bad", "no saved state", "--resume");
    desc.resume = 0;
    /* checkpoints */
    desc.checkpoint = "/nonexistent/start.safetensors";
    check_refused(&b, &desc, "bad", "/nonexistent/start.safetensors", "");
    snprintf(path, sizeof path, "%s", tiny_path("wide.safetensors", ""));
    CHECK(spm_checkpoint_save(other, path, NULL, NULL) == SPM_OK);
    desc.checkpoint = path;
    check_refused(&b, &desc, "bad", "wide.safetensors", "conv1.weight");
    desc.checkpoint = NULL;
    desc.arch.classes = 1;
    check_refused(&b, &desc, "bad", "2 classes", "has 1");
    desc.arch.classes = 2;
    /* batches */
    desc.batch = 27;
    desc.drop_last = 1;
    check_refused(&b, &desc, "bad", "fewer than one batch of 27", "--batch");
    desc.batch = 26;
    desc.epochs = 1;
    check_trained(&b, &desc, fresh("bad"));
    CHECK_INT(result.steps, 1);
    desc.batch = 12;
    check_trained(&b, &desc, fresh("bad")); /* 24 of 26 */
    CHECK_INT(result.steps, 2);
    desc.batch = 1000;
    desc.drop_last = 0;
    check_trained(&b, &desc, fresh("bad"));
    CHECK_INT(result.steps, 1);
    desc.batch = 25; /* a last batch of one */
    desc.method = SPM_METHOD_INTERVENE;
    check_trained(&b, &desc, fresh("bad"));
    CHECK_INT(result.steps, 2);
    /* no training split; a class that is nowhere in it */
    memset(counts.group[0], 0, sizeof counts.group[0]);
    b.set = tiny_data(b.ctx, "notrain", &counts);
    check_refused(&b, &desc, fresh("bad"), "notrain", "no training examples");
    spm_dataset_close(b.set);
    counts.group[0][1] = 6; /* one group: nothing is a minority, every mask still works */
    b.set = tiny_data(b.ctx, "onegroup", &counts);
    desc.batch = 4;
    check_trained(&b, &desc, fresh("bad"));
    spm_dataset_close(b.set);
    b.set = whole;
    /* options that would have no effect, or leave no loss */
    desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    desc.cross_entropy = 0;
    desc.mask_mode = SPM_MASK_MODE_FREEZE;
    check_refused(&b, &desc, fresh("bad"), "frozen channels", "no loss");
    desc.mask_mode = SPM_MASK_MODE_OFF;
    desc.cross_entropy_pruned = 1;
    check_refused(&b, &desc, fresh("bad"), "pruned branch's cross-entropy", "switch it on");
    desc = small_run(b.ctx, SPM_METHOD_JTT);
    desc.balanced = 1;
    check_refused(&b, &desc, fresh("bad"), "jtt", "balanced");
    /* the state of another network */
    desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("bad"));
    tiny_put(b.ctx, tiny_path("bad", "state.safetensors"), "\x08\0\0\0");
    desc.resume = 1;
    CHECK(train(&b, &desc, "bad") != SPM_OK);
    CHECK(strstr(last.text, "state.safetensors") != NULL);
    /* a log that was cut short */
    desc.resume = 0;
    desc.max_steps = 2;
    check_trained(&b, &desc, fresh("bad"));
    f = fopen(tiny_path("bad", "steps.jsonl"), "wb");
    fputs("x", f);
    fclose(f);
    desc.resume = 1;
    check_refused(&b, &desc, "bad", "steps.jsonl", "has 1 bytes");
    spm_model_destroy(other);
    bench_close(&b);
}

/* Another number of as many digits in the saved state. */
static void spoil_state(const char *run, const char *was, const char *is)
{
    size_t size = 0, n = strlen(was), i;
    char *text = slurp(run, "state.safetensors", &size);
    FILE *f;
    CHECK(n == strlen(is));
    for (i = 0; i + n <= size && memcmp(text + i, was, n) != 0; i++) {}
    CHECK(i + n <= size);
    if (i + n <= size) memcpy(text + i, is, n);
    f = fopen(tiny_path(run, "state.safetensors"), "wb");
    if (f) {
        fwrite(text, 1, size, f);
        fclose(f);
    }
    free(text);
}

/* A state that no run can have saved: one sentence, before anything is computed from it. */
static void damaged_state(void)
{
    static const char spoilt[2][2][24] = { { "\"position\": \"8\"", "\"position\": \"3\"" },
                                           { "\"position\": \"3\"", "\"position\": \"9\"" } };
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_archive *state;
    const spm_archive_tensor *wrong;
    char past[900], file[950];
    int i;
    snprintf(past, sizeof past, "%s", tiny_path("past", ""));
    snprintf(file, sizeof file, "%s/state.safetensors", past);
    CHECK(spm_directory_create(b.ctx, past, NULL) == SPM_OK);
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("spoilt"));
    desc.resume = 1;
    desc.max_steps = 0;
    for (i = 0; i < 2; i++) {
        spoil_state("spoilt", spoilt[i][0], spoilt[i][1]);
        check_refused(&b, &desc, "spoilt", "state.safetensors", "position cannot be");
    }
    desc.resume = 0;
    desc.max_steps = 1;
    check_trained(&b, &desc, fresh("spoilt"));
    state = spm_archive_open(b.ctx, tiny_path("spoilt", "state.safetensors"), NULL);
    wrong = state ? spm_archive_find(state, "example.wrong") : NULL;
    CHECK(wrong != NULL);
    if (wrong) { /* a state of that tensor alone, as the history of a label-free intervention */
        float *values = (float *)calloc((size_t)wrong->count, sizeof(float));
        const int64_t count = wrong->count;
        static const float odd[3] = { -1000.0f, 0.5f, 1e30f };
        for (i = 0; i < 3; i++) {
            spm_archive_writer *writer = spm_archive_create(b.ctx, file, SPM_ARCHIVE_SAFETENSORS, NULL);
            values[1] = odd[i];
            CHECK(writer != NULL);
            spm_archive_add(writer, "example.wrong", SPM_F32, 1, &count);
            spm_archive_put(writer, values);
            CHECK(spm_archive_commit(writer, NULL) == SPM_OK);
            desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
            desc.group_labels = 0;
            desc.history = past;
            check_refused(&b, &desc, fresh("spoilt"), "history is damaged", "state.safetensors");
        }
        free(values);
    }
    spm_archive_close(state);
    bench_close(&b);
}

/* Stopped at the end of an epoch that was not evaluated, a run has both checkpoints all the same. */
static void both_checkpoints(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    size_t size = 0;
    char *bytes;
    desc.epochs = 3;
    desc.eval_every = 3;
    desc.max_steps = 4;
    check_trained(&b, &desc, fresh("both"));
    bytes = slurp("both", "best.safetensors", &size);
    CHECK(bytes != NULL && size > 0);
    free(bytes);
    bench_close(&b);
}

/* A loss that is no number: one sentence, and the checkpoints of before stay as they are. */
static void diverged(void)
{
    bench b = bench_open(1);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_archive *state;
    const spm_archive_tensor *t;
    size_t n, m;
    char *before, *after;
    FILE *f;
    uint64_t at = 0;
    desc.epochs = 1;
    check_trained(&b, &desc, fresh("nan"));
    before = slurp("nan", "last.safetensors", &n);
    state = spm_archive_open(b.ctx, tiny_path("nan", "state.safetensors"), NULL);
    t = state ? spm_archive_find(state, "model.fc.bias") : NULL;
    CHECK(t != NULL);
    if (t) at = t->offset;
    spm_archive_close(state);
    f = fopen(tiny_path("nan", "state.safetensors"), "r+b");
    fseek(f, (long)at, SEEK_SET);
    fwrite("\0\0\xc0\x7f", 1, 4, f);
    fclose(f);
    desc.epochs = 2;
    desc.resume = 1;
    CHECK_INT(train(&b, &desc, "nan"), SPM_E_NUMERIC);
    CHECK(strstr(last.text, "step 5") && strstr(last.text, "not a finite number") && strstr(last.text, "--lr"));
    after = slurp("nan", "last.safetensors", &m);
    CHECK(before && after && n == m && memcmp(before, after, n) == 0);
    CHECK_INT(count_lines("nan", "metrics.jsonl"), 3);
    free(before);
    free(after);
    desc = small_run(b.ctx, SPM_METHOD_ERM); /* in the first epoch: the folder may begin another run */
    desc.epochs = 1;
    desc.optimizer.kind = SPM_SGD;
    desc.optimizer.lr = 1e30f;
    CHECK_INT(train(&b, &desc, fresh("nan")), SPM_E_NUMERIC);
    CHECK(strstr(last.text, "of epoch 1") && strstr(last.text, "first in"));
    CHECK(!test_exists(tiny_path("nan", "config.json")) && !test_exists(tiny_path("nan", "state.safetensors")));
    desc.optimizer.lr = 1e-3f;
    desc.resume = 1;
    CHECK_INT(train(&b, &desc, "nan"), SPM_E_STATE);
    CHECK(strstr(last.text, "leave --resume out"));
    desc.resume = 0;
    check_trained(&b, &desc, "nan");
    bench_close(&b);
}

/* ---- memory ---- */

static failing memory;
static int steps_counted;
static long allocations_at[16];

static int count_step(void *user, const spm_progress *progress)
{
    (void)user;
    if (is_evaluation(progress)) return 0;
    pthread_mutex_lock(&memory.lock);
    if (steps_counted < 16) allocations_at[steps_counted++] = memory.calls;
    pthread_mutex_unlock(&memory.lock);
    return 0;
}

/* Once an epoch is under way and the pictures are kept, a step takes no memory; and all of it is given back. */
static void no_allocation_in_a_step(void)
{
    int variant;
    for (variant = 0; variant < 4; variant++) {
        spm_train_desc desc;
        bench b;
        int i;
        tiny_counts counts = tiny_usual();
        b.ctx = failing_context(&memory, 2);
        b.set = tiny_data(b.ctx, "set", &counts);
        desc = small_run(b.ctx, variant > 1 ? SPM_METHOD_INTERVENE : SPM_METHOD_ERM);
        desc.augment = variant == 1 ? SPM_AUGMENT_LIGHT : SPM_AUGMENT_NONE;
        desc.segments = variant == 1;
        desc.mask = variant == 3 ? SPM_MASK_OFFICIAL : SPM_MASK_CRITICAL;
        desc.clip = 1.0;
        desc.progress = count_step;
        steps_counted = 0;
        check_trained(&b, &desc, fresh("count"));
        CHECK_INT(steps_counted, 8);
        for (i = 5; i < 8; i++) CHECK_INT(allocations_at[i], allocations_at[4]); /* steps 6, 7, 8 of the second epoch */
        bench_close(&b);
        CHECK_INT(memory.live, 0);
    }
}

int main(void)
{
    tiny_begin("test_train");
    TEST(erm_learns);
    TEST(selection);
    TEST(steps_of_erm);
    TEST(steps_of_the_sound_profile);
    TEST(steps_of_the_official_profile);
    TEST(steps_of_the_gradient_mask);
    TEST(steps_of_ablations);
    TEST(random_mask);
    TEST(clip_and_schedules);
    TEST(same_bits_for_any_threads);
    TEST(resume_erm);
    TEST(resume_intervene);
    TEST(resume_after_callback);
    TEST(resume_after_evaluation);
    TEST(resume_after_death);
    TEST(resume_with_bad_pictures);
    TEST(changed_settings);
    TEST(sentences);
    TEST(damaged_state);
    TEST(both_checkpoints);
    TEST(diverged);
    TEST(no_allocation_in_a_step);
    return TEST_END;
}
