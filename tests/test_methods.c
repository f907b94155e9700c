/* Section TRAIN: the training methods beside ERM, each on a case whose answer is known: weights, orders, Group DRO's q, JTT's
 * error set, LfF's weights and DFR's and AFR's optimum are worked out here; all of them resume to the same bits. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include "training.h"

static int same_file(const char *a, const char *b, const char *file)
{
    return test_same_files(tiny_path(a, file), tiny_path(b, file));
}

static void check_refused(bench *b, spm_train_desc *desc, const char *a, const char *c)
{
    CHECK(train(b, desc, fresh("bad")) != SPM_OK);
    if (!strstr(last.text, a) || !strstr(last.text, c)) {
        printf("    \"%s\" lacks \"%s\" or \"%s\"\n", last.text, a, c);
        CHECK(0);
    }
}

/* A tensor of a run's saved state (free it). */
static float *state_tensor(bench *b, const char *run, const char *name, int64_t *count)
{
    spm_archive *state = spm_archive_open(b->ctx, tiny_path(run, "state.safetensors"), NULL);
    const spm_archive_tensor *t = state ? spm_archive_find(state, name) : NULL;
    float *values = t ? (float *)malloc((size_t)t->count * sizeof(float)) : NULL;
    *count = t ? t->count : 0;
    if (t) CHECK(spm_archive_read_f32(state, t, values, NULL) == SPM_OK);
    spm_archive_close(state);
    return values;
}

/* A network away from its start values, and its checkpoint. */
static spm_model *start_model(bench *b, const char *arch, char *file, size_t size)
{
    spm_model *model = tiny_model(b->ctx, arch, 77);
    int i;
    int64_t j;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        for (j = 0; p->value.rank == 1 && j < spm_tensor_count(&p->value); j++)
            p->value.data[j] += 0.3f * spm_random_uniform(8, (uint64_t)i, (uint64_t)j);
    }
    snprintf(file, size, "%s", tiny_path("start.safetensors", ""));
    CHECK(spm_checkpoint_save(model, file, NULL, NULL) == SPM_OK);
    return model;
}

static double row_loss(const float *row, int y)
{
    return log(1.0 + exp((double)row[1 - y] - (double)row[y]));
}

/* Forward of examples ids[0..n); the outputs are the run's. */
static const float *forward(bench *b, spm_model *model, spm_run *run, const spm_train_desc *desc, const int64_t *ids, int n)
{
    static float pixels[32 * TINY_SIZE * TINY_SIZE * 3];
    const spm_program *program = spm_model_program(model);
    int i;
    for (i = 0; i < n; i++) tiny_pixels(b->set, &desc->reading, ids[i], pixels + i * TINY_SIZE * TINY_SIZE * 3);
    CHECK(spm_run_input(run, spm_program_find(program, "image"), pixels) == SPM_OK);
    CHECK(spm_run_forward(run, n, 1) == SPM_OK);
    return spm_run_data(run, spm_program_find(program, "outputs"));
}

/* One SGD step with example weights worked out here, against the trainer's. */
static void check_weighted_step(bench *b, spm_train_desc *desc, const int64_t *ids, const double *weight, int n, double loss)
{
    char file[900];
    spm_model *start = start_model(b, TINY_ARCH, file, sizeof file), *trained = tiny_model(b->ctx, TINY_ARCH, 0);
    spm_run_desc running = SPM_ZERO;
    spm_run *run;
    float gradient[64];
    const float *rows;
    double total = 0.0;
    int i;
    int64_t j;
    running.max_batch = n;
    running.backward = 1;
    run = spm_run_create(start, &running, NULL);
    rows = forward(b, start, run, desc, ids, n);
    for (i = 0; i < n; i++) {
        int y = spm_dataset_example(b->set, ids[i])->y;
        double p = exp(-row_loss(rows + 2 * i, y));
        total += weight[i] * row_loss(rows + 2 * i, y);
        gradient[2 * i + y] = (float)(weight[i] * (p - 1.0));
        gradient[2 * i + 1 - y] = (float)(weight[i] * (1.0 - p));
    }
    if (loss >= 0.0) CHECK_NEAR(total, loss, 1e-4);
    spm_model_zero_gradients(start);
    CHECK(spm_run_set_gradient(run, spm_program_find(spm_model_program(start), "outputs"), gradient) == SPM_OK);
    CHECK(spm_run_backward(run) == SPM_OK);
    spm_model_finish_gradients(start);
    CHECK(spm_checkpoint_load(trained, tiny_path("step", "last.safetensors"), 0, NULL) == SPM_OK);
    for (i = 0; i < spm_model_parameter_count(start); i++) {
        const spm_parameter *p = spm_model_parameter(start, i), *t = spm_model_parameter(trained, i);
        double most = 0.0, off = 0.0;
        for (j = 0; j < spm_tensor_count(&p->value) && p->gradient; j++) {
            double change = -(double)desc->optimizer.lr * (double)p->gradient[j];
            most = fmax(most, fabs(change));
            off = fmax(off, fabs((double)t->value.data[j] - (double)p->value.data[j] - change));
        }
        if (off > 5e-3 * most + 1e-6) {
            printf("    %s is off by %g of a change of %g\n", p->name, off, most);
            CHECK(0);
        }
    }
    spm_run_destroy(run);
    spm_model_destroy(start);
    spm_model_destroy(trained);
}

/* One unshuffled step of a method on the first `batch` training examples. */
static void one_step(bench *b, spm_train_desc *desc, int batch)
{
    static char file[900];
    spm_model_destroy(start_model(b, TINY_ARCH, file, sizeof file));
    desc->checkpoint = file;
    desc->shuffle = 0;
    desc->max_steps = 1;
    desc->batch = batch;
    desc->optimizer.kind = SPM_SGD;
    desc->optimizer.lr = 0.05f;
    check_trained(b, desc, fresh("step"));
    CHECK_INT(result.steps, 1);
}

static double logged_loss(bench *b)
{
    size_t size;
    char *text = slurp("step", "steps.jsonl", &size);
    spm_json_value *line = text ? spm_json_parse(b->ctx, "steps", text, strcspn(text, "\n"), NULL) : NULL;
    double loss = spm_json_as_number(spm_json_get(line, "loss"), -1.0);
    spm_json_free(b->ctx, line);
    free(text);
    return loss;
}

/* Weighted cross-entropy: groups (n / (G n_g)), classes, and a power of the weights. */
static void reweight(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_REWEIGHT);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    double weight[26];
    int i, k;
    for (k = 0; k < 3; k++) {
        desc.by_class = k == 1;
        desc.weight_power = k == 2 ? 0.5f : 1.0f;
        one_step(&b, &desc, 26);
        for (i = 0; i < 26; i++) {
            double n = (double)spm_dataset_group_count(b.set, SPM_TRAIN, spm_dataset_example(b.set, ids[i])->group);
            weight[i] = (k == 1 ? 1.0 : pow(26.0 / (4.0 * n), k == 2 ? 0.5 : 1.0)) / 26.0;
        }
        check_weighted_step(&b, &desc, ids, weight, 26, logged_loss(&b));
    }
    bench_close(&b);
}

/* q after a step, with and without size adjustment; the step's weights q_g / n_g(batch). */
static void group_dro(void)
{
    tiny_counts counts = tiny_usual();
    bench b = bench_of("set", &counts, 2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_GROUPDRO);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    int64_t count;
    int k, i, g;
    for (k = 0; k < 3; k++) {
        char file[900];
        int batch = k == 2 ? 12 : 26; /* 12: groups 0 (10) and 1 (2 of 3); the others are absent */
        double loss[4] = { 0 }, in_batch[4] = { 0 }, q[4], total = 0.0, weight[26];
        spm_model *model;
        spm_run_desc running = SPM_ZERO;
        spm_run *run;
        const float *rows;
        float *saved;
        desc.dro_step = 0.1f;
        desc.dro_adjust = k ? 1.5f : 0.0f;
        one_step(&b, &desc, batch);
        model = start_model(&b, TINY_ARCH, file, sizeof file);
        running.max_batch = batch;
        run = spm_run_create(model, &running, NULL);
        rows = forward(&b, model, run, &desc, ids, batch);
        for (i = 0; i < batch; i++) {
            const spm_example *e = spm_dataset_example(b.set, ids[i]);
            loss[e->group] += row_loss(rows + 2 * i, e->y);
            in_batch[e->group] += 1.0;
        }
        for (g = 0; g < 4; g++) {
            double l = in_batch[g] > 0.0 ? loss[g] / in_batch[g] : 0.0;
            q[g] = 0.25 * exp(0.1 * (l + (k ? 1.5 : 0.0) / sqrt(counts.group[0][g])));
            total += q[g];
        }
        saved = state_tensor(&b, "step", "cells.q", &count);
        CHECK_INT(count, 4);
        for (g = 0; g < 4 && saved; g++) CHECK_NEAR(saved[g], q[g] / total, 1e-5);
        for (i = 0; i < batch; i++) {
            g = spm_dataset_example(b.set, ids[i])->group;
            weight[i] = q[g] / total / in_batch[g];
        }
        check_weighted_step(&b, &desc, ids, weight, batch, logged_loss(&b));
        free(saved);
        spm_run_destroy(run);
        spm_model_destroy(model);
    }
    bench_close(&b);
}

static int seen[64], seen_total;

static int64_t history_sum(bench *b, const char *run)
{
    size_t size;
    char *text = slurp(run, "history.csv", &size);
    spm_csv *csv = text ? spm_csv_parse(b->ctx, "history", text, size, ',', NULL) : NULL;
    int64_t i;
    CHECK(csv != NULL);
    seen_total = 0;
    for (i = 0; csv && i < spm_csv_rows(csv) && i < 64; i++) {
        /* trained at all: wrong at least once or right at least once */
        seen[i] = atoi(spm_csv_field(csv, i, spm_csv_column(csv, "first_right"))) >= 0
                  || atoi(spm_csv_field(csv, i, spm_csv_column(csv, "epochs_wrong"))) > 0;
        seen_total += seen[i];
    }
    i = csv ? spm_csv_rows(csv) : 0;
    spm_csv_destroy(csv);
    free(text);
    return i;
}

/* Orders: subsample has each group as often as the smallest and the same examples every epoch; resample draws n; a held-out
 * share is never seen; an epoch can be cut. */
static void orders(void)
{
    tiny_counts counts = tiny_usual();
    bench b = bench_of("set", &counts, 2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_SUBSAMPLE);
    int i, g, of_group[4] = { 0 };
    check_trained(&b, &desc, fresh("order"));
    CHECK_INT(result.steps, 4); /* 12 examples in batches of 8, twice */
    CHECK_INT(history_sum(&b, "order"), 26);
    for (i = 0; i < 26; i++) of_group[i < 10 ? 0 : i < 13 ? 1 : i < 16 ? 2 : 3] += seen[i];
    for (g = 0; g < 4; g++) CHECK_INT(of_group[g], 3);
    desc = small_run(b.ctx, SPM_METHOD_SUBSAMPLE);
    desc.by_class = 1;
    check_trained(&b, &desc, fresh("order"));
    CHECK_INT(result.steps, 8);
    desc = small_run(b.ctx, SPM_METHOD_RESAMPLE);
    desc.epochs = 20;
    check_trained(&b, &desc, fresh("order"));
    CHECK_INT(result.steps, 80);
    history_sum(&b, "order");
    CHECK_INT(seen_total, 26);
    desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.hold_out = 0.5;
    desc.epochs = 3;
    check_trained(&b, &desc, fresh("order"));
    history_sum(&b, "order");
    CHECK(seen_total > 5 && seen_total < 21);
    i = seen_total;
    check_trained(&b, &desc, fresh("order2"));
    CHECK(same_file("order", "order2", "history.csv"));
    desc.epoch_examples = 3;
    desc.epochs = 1;
    check_trained(&b, &desc, fresh("order"));
    history_sum(&b, "order");
    CHECK_INT(seen_total, 3);
    CHECK_INT(result.steps, 1);
    bench_close(&b);
}

/* The balanced sampler: over many draws every group comes equally often (through the history's counts of a rate of 0). */
static void balanced_sampler(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_GROUPDRO);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    float *wrong, *right;
    double of_group[4] = { 0 }, all = 0.0;
    int64_t count, i;
    desc.balanced = 1;
    desc.optimizer.lr = 0.0f;
    desc.epochs = 40;
    desc.eval_every = 40;
    check_trained(&b, &desc, fresh("balanced"));
    CHECK_INT(result.steps, 160);
    wrong = state_tensor(&b, "balanced", "example.wrong", &count);
    right = state_tensor(&b, "balanced", "example.first", &count);
    CHECK(wrong && right);
    for (i = 0; i < 26 && wrong; i++) {
        of_group[spm_dataset_example(b.set, ids[i])->group] += (double)wrong[ids[i]];
        all += (double)wrong[ids[i]];
    }
    /* an untrained network is wrong about half of the draws; the small groups get their share of them */
    CHECK(all > 200.0);
    CHECK(of_group[1] + of_group[2] > 0.3 * all);
    free(wrong);
    free(right);
    bench_close(&b);
}

/* The error set is what the identifying model gets wrong; its members come `upweight` times; the second stage starts from
 * the initial weights: with nothing else to tell them apart, stage two of a run equals a run given the checkpoint. */
static void jtt(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_eval_desc evaluation = SPM_ZERO;
    spm_eval eval;
    spm_model *model = tiny_model(b.ctx, TINY_ARCH, 0);
    char id_file[900];
    float *copies;
    int64_t count, i, errors = 0;
    desc.epochs = 1;
    desc.optimizer.lr = 2e-4f;
    check_trained(&b, &desc, fresh("identify"));
    snprintf(id_file, sizeof id_file, "%s", tiny_path("identify", "last.safetensors"));
    CHECK(spm_checkpoint_load(model, id_file, 0, NULL) == SPM_OK);
    evaluation.reading = desc.reading;
    CHECK(spm_evaluate(model, b.set, &evaluation, &eval, NULL) == SPM_OK);
    desc = small_run(b.ctx, SPM_METHOD_JTT);
    desc.optimizer.lr = 2e-4f;
    desc.upweight = 3;
    desc.identify_epochs = 1;
    desc.max_steps = 5; /* 4 to identify, 1 of the main stage */
    check_trained(&b, &desc, fresh("jtt"));
    copies = state_tensor(&b, "jtt", "example.copies", &count);
    CHECK(copies != NULL && count == spm_dataset_size(b.set));
    for (i = 0; i < eval.count && copies; i++) {
        int wrong = eval.predicted[i] != eval.y[i];
        CHECK_NEAR(copies[eval.example[i]], wrong ? 3.0 : 1.0, 0.0);
        errors += wrong;
    }
    CHECK(errors > 0 && errors < 26);
    CHECK(strstr(last_log, "error set") != NULL);
    free(copies);
    desc.max_steps = 0;
    desc.epochs = 2;
    check_trained(&b, &desc, fresh("jtt"));
    CHECK_INT(result.epochs, 3);
    CHECK_INT(result.steps, 4 + 2 * ((26 + 2 * errors + 7) / 8));
    /* identified by a checkpoint: the same set, the same stage two but for the epoch's number in its order */
    desc.identify = id_file;
    check_trained(&b, &desc, fresh("jtt2"));
    CHECK_INT(result.epochs, 2);
    CHECK_INT(result.steps, 2 * ((26 + 2 * errors + 7) / 8));
    spm_eval_free(b.ctx, &eval);
    /* no error: a sentence */
    desc = small_run(b.ctx, SPM_METHOD_ERM);
    desc.epochs = 24;
    desc.optimizer.lr = 4e-3f;
    desc.select = SPM_SELECT_LAST;
    check_trained(&b, &desc, fresh("identify"));
    CHECK(spm_checkpoint_load(model, id_file, 0, NULL) == SPM_OK);
    CHECK(spm_evaluate(model, b.set, &evaluation, &eval, NULL) == SPM_OK);
    CHECK_NEAR(eval.mean_accuracy, 1.0, 0.0);
    spm_eval_free(b.ctx, &eval);
    desc = small_run(b.ctx, SPM_METHOD_JTT);
    desc.identify = id_file;
    check_refused(&b, &desc, "error set is empty", "--identify-epochs");
    spm_model_destroy(model);
    bench_close(&b);
}

/* LfF's first step: the biased network's weights q p^q / n, and the other's B / (B + D) with each divided by its class's
 * largest. */
static void lff(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_LFF);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    double loss[26], most[2] = { 0 }, weight[26];
    char file[900];
    spm_model *model;
    spm_run_desc running = SPM_ZERO;
    spm_run *run;
    const float *rows;
    float *biased;
    int64_t count;
    int i;
    one_step(&b, &desc, 26); /* both networks start from the checkpoint, so their first losses are the same */
    model = start_model(&b, TINY_ARCH, file, sizeof file);
    running.max_batch = 26;
    running.backward = 1;
    run = spm_run_create(model, &running, NULL);
    rows = forward(&b, model, run, &desc, ids, 26);
    for (i = 0; i < 26; i++) {
        int y = spm_dataset_example(b.set, ids[i])->y;
        loss[i] = row_loss(rows + 2 * i, y);
        most[y] = fmax(most[y], loss[i]);
        weight[i] = 0.5 / 26.0; /* B = D */
    }
    biased = state_tensor(&b, "step", "example.biased", &count);
    for (i = 0; i < 26 && biased; i++) CHECK_NEAR(biased[ids[i]], 0.3 * loss[i], 1e-4);
    free(biased);
    check_weighted_step(&b, &desc, ids, weight, 26, logged_loss(&b));
    /* the biased network's own step */
    {
        float gradient[52], *moved;
        const spm_parameter *head = spm_model_parameter(model, spm_model_find_parameter(model, "fc.bias"));
        for (i = 0; i < 26; i++) {
            int y = spm_dataset_example(b.set, ids[i])->y;
            double p = exp(-loss[i]), w = 0.7 * pow(p, 0.7) / 26.0;
            gradient[2 * i + y] = (float)(w * (p - 1.0));
            gradient[2 * i + 1 - y] = (float)(w * (1.0 - p));
        }
        spm_model_zero_gradients(model);
        CHECK(spm_run_set_gradient(run, spm_program_find(spm_model_program(model), "outputs"), gradient) == SPM_OK);
        CHECK(spm_run_backward(run) == SPM_OK);
        spm_model_finish_gradients(model);
        moved = state_tensor(&b, "step", "biased.fc.bias", &count);
        CHECK(moved && count == 2);
        for (i = 0; i < 2 && moved; i++)
            CHECK_NEAR(moved[i], (double)head->value.data[i] - 0.05 * (double)head->gradient[i], 1e-5);
        free(moved);
    }
    spm_run_destroy(run);
    spm_model_destroy(model);
    bench_close(&b);
}

/* Features and logits of a split in evaluation mode. */
static int64_t features_of(bench *b, spm_model *model, const spm_train_desc *desc, spm_split split, float *x, float *z)
{
    const spm_program *program = spm_model_program(model);
    const int64_t *ids = spm_dataset_split_ids(b->set, split);
    int64_t n = spm_dataset_split_size(b->set, split), i;
    float *pixels = (float *)malloc(sizeof(float) * TINY_SIZE * TINY_SIZE * 3);
    spm_run_desc one = SPM_ZERO;
    spm_run *run = spm_run_create(model, &one, NULL);
    for (i = 0; i < n; i++) {
        tiny_pixels(b->set, &desc->reading, ids[i], pixels);
        CHECK(spm_run_input(run, spm_program_find(program, "image"), pixels) == SPM_OK);
        CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
        memcpy(x + i * 64, spm_run_data(run, spm_program_find(program, "features")), 64 * sizeof(float));
        memcpy(z + i * 2, spm_run_data(run, spm_program_find(program, "logits")), 2 * sizeof(float));
    }
    spm_run_destroy(run);
    free(pixels);
    return n;
}

static int stop_at_features(void *user, const spm_progress *progress)
{
    (void)user;
    return strstr(progress->what, "features") != NULL;
}

static int stop_at_fits(void *user, const spm_progress *progress)
{
    (void)user;
    return strcmp(progress->unit, "fits") == 0 && progress->done > 0;
}

/* DFR on a balanced validation split (every subset is the whole of it) is one convex problem: its optimum has, in
 * standardised features, |gradient| <= l1 where a weight is 0, = -l1 sign(w) elsewhere, and 0 for the bias. */
static void dfr(void)
{
    tiny_counts counts = tiny_usual();
    bench b;
    spm_train_desc desc;
    char file[900];
    float x[64 * 64], z[128];
    double mean[64], spread[64], g[2][65], w[2][64];
    spm_model *model;
    const spm_parameter *weight, *bias;
    size_t size;
    char *text;
    spm_json_value *line;
    int64_t n, i, j;
    int c, k, zeros = 0;
    for (k = 0; k < 4; k++) counts.group[1][k] = 10;
    b = bench_of("dfr_set", &counts, 2);
    desc = small_run(b.ctx, SPM_METHOD_DFR);
    spm_model_destroy(start_model(&b, TINY_ARCH, file, sizeof file));
    model = tiny_model(b.ctx, TINY_ARCH, 0);
    desc.checkpoint = file;
    for (k = 0; k < 2; k++) { /* L1, then L2 */
        desc.subsets = k ? 3 : 1;
        desc.l1 = k ? 0.0 : 2.0;
        desc.l2 = k ? 3.0 : 0.0;
        check_trained(&b, &desc, fresh("dfr"));
        CHECK_INT(result.epochs, 0);
        CHECK(spm_checkpoint_load(model, tiny_path("dfr", "best.safetensors"), 0, NULL) == SPM_OK);
        n = features_of(&b, model, &desc, SPM_VAL, x, z);
        CHECK_INT(n, 40);
        memset(g, 0, sizeof g);
        for (j = 0; j < 64; j++) {
            mean[j] = spread[j] = 0.0;
            for (i = 0; i < n; i++) mean[j] += (double)x[i * 64 + j] / (double)n;
            for (i = 0; i < n; i++) spread[j] += pow((double)x[i * 64 + j] - mean[j], 2.0) / (double)n;
            spread[j] = spread[j] > 0.0 ? sqrt(spread[j]) : 1.0;
        }
        for (i = 0; i < n; i++) {
            int y = spm_dataset_example(b.set, spm_dataset_split_ids(b.set, SPM_VAL)[i])->y;
            double p = exp(-row_loss(z + 2 * i, y));
            for (c = 0; c < 2; c++) {
                double d = (c == y ? p - 1.0 : 1.0 - p) / (double)n;
                for (j = 0; j < 64; j++) g[c][j] += d * ((double)x[i * 64 + j] - mean[j]) / spread[j];
                g[c][64] += d;
            }
        }
        weight = spm_model_parameter(model, spm_model_find_parameter(model, "fc.weight"));
        bias = spm_model_parameter(model, spm_model_find_parameter(model, "fc.bias"));
        CHECK(weight && bias);
        for (c = 0; c < 2; c++) {
            CHECK_NEAR(g[c][64], 0.0, 2e-4);
            for (j = 0; j < 64; j++) {
                w[c][j] = (double)weight->value.data[c * 64 + j] * spread[j];
                if (k) CHECK_NEAR(g[c][j], -3.0 / 40.0 * w[c][j], 2e-4);
                else if (fabs(w[c][j]) < 1e-7) CHECK(fabs(g[c][j]) <= 2.0 / 40.0 + 2e-4);
                else CHECK_NEAR(g[c][j], w[c][j] > 0.0 ? -2.0 / 40.0 : 2.0 / 40.0, 2e-4);
                zeros += !k && fabs(w[c][j]) < 1e-7;
            }
        }
    }
    CHECK(zeros > 32); /* L1 is sparse */
    /* the way between both heads: its ends are the ERM head and the new one */
    text = slurp("dfr", "interpolation.json", &size);
    line = text ? spm_json_parse(b.ctx, "line", text, size, NULL) : NULL;
    CHECK_INT(spm_json_length(spm_json_get(line, "points")), 21);
    for (k = 0; k < 2; k++) {
        spm_eval_desc evaluation = SPM_ZERO;
        spm_eval eval;
        const spm_json_value *point = spm_json_at(spm_json_get(line, "points"), k ? 20 : 0);
        evaluation.reading = desc.reading;
        evaluation.split = SPM_TEST;
        if (!k) CHECK(spm_checkpoint_load(model, file, 0, NULL) == SPM_OK);
        else CHECK(spm_checkpoint_load(model, tiny_path("dfr", "last.safetensors"), 0, NULL) == SPM_OK);
        CHECK(spm_evaluate(model, b.set, &evaluation, &eval, NULL) == SPM_OK);
        CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_get(point, "test"), "worst_group_accuracy"), -1.0), eval.worst_accuracy, 1e-8);
        CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_get(point, "test"), "majority_accuracy"), -1.0),
                   0.5 * (eval.groups[0].accuracy + eval.groups[3].accuracy), 1e-8);
        spm_eval_free(b.ctx, &eval);
    }
    spm_json_free(b.ctx, line);
    free(text);
    /* a share of 0 changes no decision; penalties chosen on halves, after training from the start; resumable */
    desc.interpolate = 0.0;
    check_trained(&b, &desc, fresh("dfr"));
    desc = small_run(b.ctx, SPM_METHOD_DFR);
    check_trained(&b, &desc, fresh("dfr"));
    CHECK_INT(result.epochs, 2);
    desc.max_steps = 5;
    check_trained(&b, &desc, fresh("dfr2"));
    desc.max_steps = 0;
    desc.resume = 1;
    check_trained(&b, &desc, "dfr2");
    CHECK(same_file("dfr", "dfr2", "last.safetensors") && same_file("dfr", "dfr2", "interpolation.json"));
    /* more epochs would train over the new last layer */
    desc.epochs++;
    CHECK(train(&b, &desc, "dfr2") != SPM_OK);
    CHECK(strstr(last.text, "new last layer") != NULL);
    desc.epochs--;
    /* stopped while features are read or the last layer is fitted: a resumed run does that anew */
    for (k = 0; k < 2; k++) {
        desc.resume = 0;
        desc.progress = k ? stop_at_fits : stop_at_features;
        check_trained(&b, &desc, fresh("dfr2"));
        CHECK_INT(result.stopped, 1);
        desc.progress = NULL;
        desc.resume = 1;
        check_trained(&b, &desc, "dfr2");
        CHECK_INT(result.stopped, 0);
        CHECK(same_file("dfr", "dfr2", "last.safetensors") && same_file("dfr", "dfr2", "interpolation.json"));
    }
    spm_model_destroy(model);
    bench_close(&b);
}

/* AFR with a given gamma and pull: the gradient of sum mu CE + l2 / 2 |w - w_erm|^2 vanishes at the new head. */
static void afr(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_AFR);
    char file[900];
    float x[64 * 64], z[128];
    double g[2][65], mu[26], total = 0.0, of_class[2] = { 0 };
    spm_model *start = start_model(&b, TINY_ARCH, file, sizeof file), *model = tiny_model(b.ctx, TINY_ARCH, 0);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    const spm_parameter *w, *w0;
    float *held;
    int64_t n, i, j, count;
    int c;
    desc.checkpoint = file;
    desc.hold_out = 0.6;
    desc.gamma = 3.0;
    desc.l2 = 0.5;
    check_trained(&b, &desc, fresh("afr"));
    /* which are held out: those that a run of one epoch with the same seed and share does not see */
    {
        spm_train_desc erm = small_run(b.ctx, SPM_METHOD_ERM);
        erm.hold_out = 0.6;
        erm.epochs = 1;
        check_trained(&b, &erm, fresh("held"));
        history_sum(&b, "held");
    }
    held = state_tensor(&b, "afr", "example.cell", &count);
    free(held);
    n = features_of(&b, start, &desc, SPM_TRAIN, x, z);
    for (i = 0; i < n; i++) of_class[spm_dataset_example(b.set, ids[i])->y] += !seen[i];
    for (i = 0; i < n; i++) {
        int y = spm_dataset_example(b.set, ids[i])->y;
        mu[i] = seen[i] ? 0.0 : exp(-3.0 * exp(-row_loss(z + 2 * i, y))) / of_class[y];
        total += mu[i];
    }
    CHECK(spm_checkpoint_load(model, tiny_path("afr", "last.safetensors"), 0, NULL) == SPM_OK);
    n = features_of(&b, model, &desc, SPM_TRAIN, x, z);
    memset(g, 0, sizeof g);
    for (i = 0; i < n; i++) {
        int y = spm_dataset_example(b.set, ids[i])->y;
        double p = exp(-row_loss(z + 2 * i, y));
        for (c = 0; c < 2; c++) {
            double d = mu[i] / total * (c == y ? p - 1.0 : 1.0 - p);
            for (j = 0; j < 64; j++) g[c][j] += d * (double)x[i * 64 + j];
            g[c][64] += d;
        }
    }
    w = spm_model_parameter(model, spm_model_find_parameter(model, "fc.weight"));
    w0 = spm_model_parameter(start, spm_model_find_parameter(start, "fc.weight"));
    for (c = 0; c < 2; c++) {
        CHECK_NEAR(g[c][64], 0.0, 2e-4);
        for (j = 0; j < 64; j++)
            CHECK_NEAR(g[c][j] + 0.5 * ((double)w->value.data[c * 64 + j] - (double)w0->value.data[c * 64 + j]), 0.0, 2e-4);
    }
    desc.gamma = 0.0;
    desc.l2 = -1.0;
    check_trained(&b, &desc, fresh("afr")); /* chosen by validation */
    desc.hold_out = 0.0;
    check_refused(&b, &desc, "afr", "held-out share above 0");
    spm_model_destroy(start);
    spm_model_destroy(model);
    bench_close(&b);
}

/* Label-free: cells (class, memorized) come from the run's own history: Otsu's threshold on the epochs an example was wrong. */
static void label_free(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    float *wrong, *cell;
    int64_t count, i, k, memorized = 0;
    char file[900];
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    int y;
    desc.epochs = 8;
    check_trained(&b, &desc, fresh("past"));
    wrong = state_tensor(&b, "past", "example.wrong", &count);
    desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    snprintf(file, sizeof file, "%s", tiny_path("past", "last.safetensors"));
    desc.checkpoint = file;
    desc.group_labels = 0;
    desc.prune_fraction = 0.05;
    check_trained(&b, &desc, fresh("free"));
    cell = state_tensor(&b, "free", "example.cell", &count);
    CHECK(wrong && cell);
    for (y = 0; y < 2 && wrong && cell; y++) { /* within a class, all memorized ones were wrong more often than all others */
        float most = -1.0f, least = 1e9f;
        for (i = 0; i < 26; i++) {
            k = ids[i];
            if (spm_dataset_example(b.set, k)->y != y) continue;
            CHECK((int)cell[k] / 2 == y);
            if ((int)cell[k] & 1) {
                least = wrong[k] < least ? wrong[k] : least;
                memorized++;
            } else
                most = wrong[k] > most ? wrong[k] : most;
        }
        CHECK(least > most);
    }
    CHECK(memorized > 0 && memorized < 26);
    free(wrong);
    free(cell);
    /* resumed without the old run's folder at hand */
    check_trained(&b, &desc, fresh("unbroken"));
    desc.max_steps = 3;
    check_trained(&b, &desc, fresh("broken"));
    desc.max_steps = 0;
    desc.resume = 1;
    remove(tiny_path("past", "state.safetensors"));
    check_trained(&b, &desc, "broken");
    CHECK(same_file("unbroken", "broken", "last.safetensors"));
    desc.resume = 0;
    check_refused(&b, &desc, "holds no run", "--history");
    bench_close(&b);
}

/* Frozen units keep their values, all others move; damping multiplies the pruned branch's rows. */
static void freeze_and_damp(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    char file[900];
    spm_model *start = start_model(&b, TINY_ARCH, file, sizeof file), *after = tiny_model(b.ctx, TINY_ARCH, 0);
    int i, kept = 0, moved = 0;
    int64_t j, count;
    desc.checkpoint = file;
    desc.mask_mode = SPM_MASK_MODE_FREEZE;
    desc.mask_every = 10; /* one ranking for the whole run */
    desc.prune_fraction = 0.2;
    desc.max_steps = 6;
    check_trained(&b, &desc, fresh("freeze"));
    CHECK(spm_checkpoint_load(after, tiny_path("freeze", "last.safetensors"), 0, NULL) == SPM_OK);
    for (i = 0; i < spm_model_parameter_count(start); i++) {
        const spm_parameter *p = spm_model_parameter(start, i), *q = spm_model_parameter(after, i);
        char name[200];
        float *keep;
        snprintf(name, sizeof name, "mask.%s", p->name);
        keep = state_tensor(&b, "freeze", name, &count);
        for (j = 0; j < count && keep; j++) {
            int same = memcmp(&p->value.data[j], &q->value.data[j], sizeof(float)) == 0;
            if (keep[j] < 0.5f) CHECK(same);
            kept += keep[j] < 0.5f;
            moved += !same;
        }
        free(keep);
    }
    CHECK(kept > 100 && moved > 100);
    desc.max_steps = 0;
    check_trained(&b, &desc, fresh("unbroken"));
    desc.resume = 1;
    check_trained(&b, &desc, "freeze");
    CHECK(same_file("unbroken", "freeze", "last.safetensors"));
    desc.resume = 0;
    desc.mask_mode = SPM_MASK_MODE_DAMP;
    desc.damp = 1.0f; /* damping by 1 is no mask at all */
    check_trained(&b, &desc, fresh("damp"));
    desc.mask = SPM_MASK_NONE;
    check_trained(&b, &desc, fresh("none"));
    CHECK(same_file("damp", "none", "last.safetensors"));
    desc.mask = SPM_MASK_CRITICAL; /* damping by 0 is masking */
    desc.damp = 0.0f;
    check_trained(&b, &desc, fresh("damp"));
    desc.mask_mode = SPM_MASK_MODE_OFF;
    check_trained(&b, &desc, fresh("none"));
    CHECK(same_file("damp", "none", "last.safetensors"));
    spm_model_destroy(start);
    spm_model_destroy(after);
    bench_close(&b);
}

/* The anchor: on the majority the targets are (weight y + anchor p_start) / n; p_start by the network in evaluation mode. */
static void anchor(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_INTERVENE);
    const int64_t *ids = spm_dataset_split_ids(b.set, SPM_TRAIN);
    char file[900];
    spm_model *start;
    spm_run_desc running = SPM_ZERO;
    spm_run *run;
    float x[64 * 64], z[128];
    const float *rows;
    double total = 0.0;
    int i;
    desc.mask = SPM_MASK_NONE;
    desc.contrast = SPM_CONTRAST_NONE;
    desc.anchor = 2.0f;
    desc.group_weighting = 0;
    one_step(&b, &desc, 26);
    start = start_model(&b, TINY_ARCH, file, sizeof file);
    features_of(&b, start, &desc, SPM_TRAIN, x, z);
    running.max_batch = 26;
    run = spm_run_create(start, &running, NULL);
    rows = forward(&b, start, run, &desc, ids, 26);
    for (i = 0; i < 26; i++) {
        const spm_example *e = spm_dataset_example(b.set, ids[i]);
        total += row_loss(rows + 2 * i, e->y);
        if (e->group == 0 || e->group == 3) {
            total += 2.0 * exp(-row_loss(z + 2 * i, 0)) * row_loss(rows + 2 * i, 0);
            total += 2.0 * exp(-row_loss(z + 2 * i, 1)) * row_loss(rows + 2 * i, 1);
        }
    }
    CHECK_NEAR(logged_loss(&b), total / 26.0, 2e-4);
    spm_run_destroy(run);
    spm_model_destroy(start);
    bench_close(&b);
}

/* Every method, on 2 threads, cut off after each of some steps and resumed on 1 and on 3. */
static void resumed(void)
{
    static const int stops[4] = { 1, 3, 4, 6 };
    tiny_counts counts = tiny_usual();
    bench b = bench_of("set", &counts, 2), other = b;
    spm_context_desc threads = SPM_ZERO;
    int m, i;
    for (m = SPM_METHOD_REWEIGHT; m <= SPM_METHOD_FAIRDROPOUT; m++) {
        spm_train_desc desc = small_run(b.ctx, (spm_method)m);
        if (m == SPM_METHOD_JTT || m == SPM_METHOD_AFR) desc.optimizer.lr = 2e-4f;
        if (m == SPM_METHOD_AFR) desc.hold_out = 0.4;
        check_trained(&b, &desc, fresh("unbroken"));
        (void)fresh("broken");
        for (i = 0; i <= 4; i++) {
            threads.threads = i & 1 ? 3 : 1;
            other.ctx = spm_context_create(&threads);
            other.set = tiny_data(other.ctx, "set", &counts);
            desc.max_steps = i < 4 ? stops[i] : 0;
            desc.resume = i > 0;
            check_trained(&other, &desc, "broken");
            bench_close(&other);
        }
        if (!same_file("unbroken", "broken", "last.safetensors") || !same_file("unbroken", "broken", "history.csv")) {
            printf("    %s: differs when resumed\n", spm_method_name((spm_method)m));
            CHECK(0);
        }
    }
    bench_close(&b);
}

/* Names, settings that make no sense, batches of one class or one example. */
static void corners(void)
{
    tiny_counts counts = tiny_usual();
    bench b = bench_of("set", &counts, 2);
    spm_train_desc desc;
    spm_method method;
    int m;
    CHECK(!spm_method_parse("sgd", &method));
    for (m = 0; m < SPM_METHODS; m++) {
        CHECK(spm_method_parse(spm_method_name((spm_method)m), &method));
        CHECK_INT(method, m);
    }
    for (m = SPM_METHOD_ERM; m <= SPM_METHOD_INTERVENE; m++) { /* unshuffled batches hold one class; the last one is of one */
        desc = small_run(b.ctx, (spm_method)m);
        desc.shuffle = 0;
        desc.batch = 5;
        desc.epochs = 1;
        if (m == SPM_METHOD_AFR) desc.hold_out = 0.4;
        check_trained(&b, &desc, fresh("corner"));
    }
#define REFUSED(m, change, text) desc = small_run(b.ctx, m); change; check_refused(&b, &desc, spm_method_name(m), text)
    REFUSED(SPM_METHOD_GROUPDRO, desc.dro_step = 0.0f, "step size");
    REFUSED(SPM_METHOD_GROUPDRO, desc.dro_adjust = -1.0f, "size adjustment");
    REFUSED(SPM_METHOD_JTT, desc.upweight = 1, "upweighted 2 times");
    REFUSED(SPM_METHOD_LFF, desc.gce = 0.0f, "q must be in");
    REFUSED(SPM_METHOD_LFF, desc.ema = 1.0f, "past's share");
    REFUSED(SPM_METHOD_DFR, desc.subsets = 0, "number of subsets");
    REFUSED(SPM_METHOD_DFR, desc.interpolate = 1.5, "share of the new head");
    REFUSED(SPM_METHOD_AFR, desc.gamma = -1.0, "gamma");
    REFUSED(SPM_METHOD_ERM, desc.hold_out = 1.0, "held-out share");
    REFUSED(SPM_METHOD_ERM, desc.epoch_examples = -1, "examples of an epoch");
    REFUSED(SPM_METHOD_FAIRDROPOUT, desc.arch = tiny_arch(b.ctx, TINY_ARCH), "off=RATE");
    REFUSED(SPM_METHOD_INTERVENE, desc.anchor = 1.0f, "checkpoint");
    REFUSED(SPM_METHOD_INTERVENE, desc.damp = -1.0f, "damping factor");
#undef REFUSED
    bench_close(&b);
    memset(counts.group[1], 0, sizeof counts.group[1]);
    b = bench_of("noval", &counts, 2);
    desc = small_run(b.ctx, SPM_METHOD_DFR);
    check_refused(&b, &desc, "no validation split", "dfr");
    bench_close(&b);
}

/* A rate that throws the weights out of range: the layer is named, and last.safetensors holds finite values. */
static void diverged(void)
{
    bench b = bench_open(2);
    spm_train_desc desc = small_run(b.ctx, SPM_METHOD_ERM);
    spm_model *model = tiny_model(b.ctx, TINY_ARCH, 0);
    spm_archive *archive;
    int64_t i, j;
    desc.optimizer.kind = SPM_SGD;
    desc.epochs = 20;
    desc.optimizer.lr = 1e25f;
    CHECK_INT(train(&b, &desc, fresh("nan")), SPM_E_NUMERIC);
    CHECK(strstr(last.text, "step ") && strstr(last.text, "first in the") && strstr(last.text, ".weight"));
    archive = spm_archive_open(b.ctx, tiny_path("nan", "last.safetensors"), NULL);
    CHECK(archive != NULL && strstr(last.text, "last.safetensors") != NULL);
    for (i = 0; archive && i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *t = spm_archive_tensor_at(archive, i);
        float *values = (float *)malloc((size_t)t->count * sizeof(float));
        if (spm_archive_read_f32(archive, t, values, NULL) == SPM_OK) {
            for (j = 0; j < t->count; j++) CHECK(fabsf(values[j]) < 3e38f);
        }
        free(values);
    }
    spm_archive_close(archive);
    spm_model_destroy(model);
    bench_close(&b);
}

int main(void)
{
    tiny_begin("test_methods");
    TEST(reweight);
    TEST(group_dro);
    TEST(orders);
    TEST(balanced_sampler);
    TEST(jtt);
    TEST(lff);
    TEST(dfr);
    TEST(afr);
    TEST(label_free);
    TEST(freeze_and_damp);
    TEST(anchor);
    TEST(resumed);
    TEST(corners);
    TEST(diverged);
    return TEST_END;
}
