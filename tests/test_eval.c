/* Section EVAL: evaluation.  Formulas against numbers made elsewhere (exact integer arithmetic, roots of the defining
 * equation), metrics against a second, plain computation from the logits, a constant model worked out by hand. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"

static spm_error last; /* of the last evaluation */

static int evaluate(spm_model *model, spm_dataset *set, const spm_reading *reading, spm_split split, int64_t batch, spm_eval *eval)
{
    spm_eval_desc desc = SPM_ZERO;
    desc.reading = *reading;
    desc.split = split;
    desc.batch = batch;
    memset(&last, 0, sizeof last);
    memset(eval, 0, sizeof *eval);
    return spm_evaluate(model, set, &desc, eval, &last) == SPM_OK;
}

/* ---- formulas ---- */

/* Roots of (k/n - x)^2 = z^2 x (1 - x) / n in 40-digit decimals, z the normal quantile of .975. */
static void wilson(void)
{
    static const struct { int64_t correct, count; double low, high; } known[] = {
        { 8, 10, 0.4901624715366417, 0.9433178485456247 },
        { 50, 100, 0.4038315303659956, 0.5961684696340044 },
        { 2, 56, 0.009849425148236385, 0.1211878018049011 },
        { 1055, 1057, 0.9931273136814333, 0.9994809514316109 },
        { 0, 10, 0.0, 0.2775327998628892 },
        { 10, 10, 0.7224672001371107, 1.0 },
        { 1, 1, 0.2065493143772374, 1.0 },
    };
    double low, high;
    int i;
    for (i = 0; i < (int)(sizeof known / sizeof known[0]); i++) {
        spm_wilson(known[i].correct, known[i].count, &low, &high);
        CHECK_NEAR(low, known[i].low, 1e-9);
        CHECK_NEAR(high, known[i].high, 1e-9);
    }
    spm_wilson(0, 7, &low, &high);
    CHECK(low == 0.0 && high < 1.0); /* exactly 0 and 1 at the ends, no rounding dust */
    spm_wilson(7, 7, &low, &high);
    CHECK(high == 1.0 && low > 0.0);
    spm_wilson(0, 0, &low, &high);
    CHECK(low != low && high != high);
}

/* 2 * sum of C(n, i) / 2^n for i <= min(b, c), in exact integers (Python). */
static void mcnemar(void)
{
    CHECK_NEAR(spm_mcnemar(1, 9), 0.021484375, 1e-14);
    CHECK_NEAR(spm_mcnemar(9, 1), 0.021484375, 1e-14);
    CHECK_NEAR(spm_mcnemar(0, 5), 0.0625, 1e-14);
    CHECK_NEAR(spm_mcnemar(3, 5), 0.7265625, 1e-13);
    CHECK_NEAR(spm_mcnemar(4, 4), 1.0, 0.0);
    CHECK_NEAR(spm_mcnemar(0, 0), 1.0, 0.0);
    CHECK_NEAR(spm_mcnemar(400, 500) / 0.0009564441369189461, 1.0, 1e-10);
    CHECK_NEAR(spm_mcnemar(900, 1100) / 8.457089535503927e-06, 1.0, 1e-10);
    CHECK_NEAR(spm_mcnemar(10, 40) / 2.3861331676755526e-05, 1.0, 1e-10);
    CHECK(spm_mcnemar(0, 2000) >= 0.0 && spm_mcnemar(0, 2000) < 1e-300);
}

static void classify(void)
{
    spm_reading reading = SPM_ZERO;
    float p[4];
    static const float two[2] = { 1.0f, 3.0f }, four[4] = { 0.5f, 2.0f, 2.0f, -1.0f }, huge[3] = { -1e30f, 1e30f, 0.0f };
    CHECK_INT(spm_classify(&reading, two, 2, p), 1);
    CHECK_NEAR(p[1], 1.0 / (1.0 + exp(-2.0)), 1e-7);
    CHECK_NEAR(p[0], 1.0 - 1.0 / (1.0 + exp(-2.0)), 1e-7);
    reading.label_reversed = 1; /* column 0 is the last class */
    CHECK_INT(spm_classify(&reading, two, 2, p), 0);
    CHECK_NEAR(p[0], 1.0 / (1.0 + exp(-2.0)), 1e-7);
    CHECK_INT(spm_classify(&reading, four, 4, p), 1); /* columns 2 and 1 tie: classes 1 and 2; the lower class */
    CHECK_NEAR(p[1], p[2], 0.0);
    CHECK(p[3] > p[0]); /* column 0 is class 3 */
    CHECK_NEAR(p[0] + p[1] + p[2] + p[3], 1.0, 1e-6);
    reading.label_reversed = 0;
    CHECK_INT(spm_classify(&reading, four, 4, p), 1);
    CHECK_INT(spm_classify(&reading, huge, 3, p), 1);
    CHECK(p[0] == 0.0f && p[1] == 1.0f && p[2] == 0.0f);
}

/* ---- a model that always says the same ---- */

/* Zero head weights and the given biases: every picture has these logits. */
static void make_constant(spm_model *model, const float *bias, int classes)
{
    int w = spm_model_find_parameter(model, "fc.weight"), b = spm_model_find_parameter(model, "fc.bias");
    CHECK(w >= 0 && b >= 0);
    if (w < 0 || b < 0) return;
    memset(spm_model_parameter(model, w)->value.data, 0, (size_t)spm_tensor_count(&spm_model_parameter(model, w)->value) * sizeof(float));
    memcpy(spm_model_parameter(model, b)->value.data, bias, (size_t)classes * sizeof(float));
    spm_model_touch(model);
}

/* Test split 5, 4, 4, 4 of 17; training shares 10, 3, 3, 10 of 26; logits 0 and ln 3: class 1 with p = 3/4. */
static void constant_model(void)
{
    spm_context *ctx = tiny_context(2);
    tiny_counts counts = tiny_usual();
    spm_dataset *set = tiny_data(ctx, "set", &counts);
    spm_model *model = tiny_model(ctx, TINY_ARCH, 1);
    spm_reading reading = tiny_reading();
    const float bias[2] = { 0.0f, 1.0986122886681098f };
    spm_eval eval;
    make_constant(model, bias, 2);
    CHECK(evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    CHECK_STR(last.text, "");
    CHECK_INT(eval.count, 17);
    CHECK_NEAR(eval.mean_accuracy, 8.0 / 17.0, 1e-15);
    CHECK_NEAR(eval.balanced_accuracy, 0.5, 1e-15);
    CHECK_NEAR(eval.adjusted_accuracy, 13.0 / 26.0, 1e-15);
    CHECK_NEAR(eval.worst_accuracy, 0.0, 0.0);
    CHECK_INT(eval.worst_group, 0); /* the first of equally bad ones */
    CHECK_NEAR(eval.auroc, 0.5, 1e-15); /* all scores tie */
    CHECK_NEAR(eval.ece, 0.75 - 8.0 / 17.0, 1e-6);
    CHECK_NEAR(eval.loss, (9.0 * log(4.0) + 8.0 * log(4.0 / 3.0)) / 17.0, 1e-6);
    CHECK_NEAR(eval.groups[2].loss, log(4.0 / 3.0), 1e-6);
    CHECK_NEAR(eval.groups[2].accuracy, 1.0, 0.0);
    CHECK_NEAR(eval.margin[0], -1.0986122886681098, 1e-6);
    CHECK_NEAR(eval.margin[16], 1.0986122886681098, 1e-6);
    spm_eval_free(ctx, &eval);
    reading.label_reversed = 1; /* now class 0 with p = 3/4 */
    CHECK(evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    CHECK_NEAR(eval.mean_accuracy, 9.0 / 17.0, 1e-15);
    CHECK_NEAR(eval.groups[0].accuracy, 1.0, 0.0);
    CHECK_INT(eval.worst_group, 2);
    CHECK_NEAR(eval.loss, (8.0 * log(4.0) + 9.0 * log(4.0 / 3.0)) / 17.0, 1e-6);
    CHECK_INT(eval.predicted[3], 0);
    CHECK_NEAR(eval.probability[0], 0.75, 1e-6);
    spm_eval_free(ctx, &eval);
    reading.label_reversed = 0;
    reading.softmax_head = 1; /* quirk Q1: cross-entropy reads the probabilities 1/4, 3/4 as logits */
    CHECK(evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    CHECK_NEAR(eval.groups[3].loss, log(exp(0.25) + exp(0.75)) - 0.75, 1e-6);
    CHECK_NEAR(eval.groups[0].loss, log(exp(0.25) + exp(0.75)) - 0.25, 1e-6);
    CHECK_NEAR(eval.probability[1], 0.75, 1e-6);
    CHECK_INT(eval.predicted[0], 1);
    spm_eval_free(ctx, &eval);
    spm_model_destroy(model);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* ---- a second computation ---- */

/* Logits of a split, one picture at a time. */
static float *plain_logits(spm_model *model, spm_dataset *set, const spm_reading *reading, spm_split split, int classes)
{
    const spm_program *program = spm_model_program(model);
    const int64_t *ids = spm_dataset_split_ids(set, split);
    int64_t i, n = spm_dataset_split_size(set, split);
    float *logits = (float *)malloc((size_t)(n * classes) * sizeof(float)), pixels[TINY_SIZE * TINY_SIZE * 3];
    spm_run *run = spm_run_create(model, NULL, NULL);
    for (i = 0; i < n; i++) {
        tiny_pixels(set, reading, ids[i], pixels);
        CHECK(spm_run_input(run, spm_program_find(program, "image"), pixels) == SPM_OK);
        CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
        memcpy(logits + i * classes, spm_run_data(run, spm_program_find(program, "logits")), (size_t)classes * sizeof(float));
    }
    spm_run_destroy(run);
    return logits;
}

/* One-vs-rest AUROC by counting pairs. */
static double plain_auroc(const float *p, const int *y, int n, int classes, int c)
{
    double won = 0.0, pairs = 0.0;
    int i, j;
    for (i = 0; i < n; i++) {
        for (j = 0; j < n; j++) {
            float a = p[i * classes + c], b = p[j * classes + c];
            if (y[i] != c || y[j] == c) continue;
            pairs += 1.0;
            won += a > b ? 1.0 : a < b ? 0.0 : 0.5;
        }
    }
    return pairs > 0.0 ? won / pairs : -1.0;
}

/* Compares every metric of `eval` with what follows from the logits by definition. */
static void compare(spm_dataset *set, const spm_reading *reading, const spm_eval *eval, const float *logits, int classes)
{
    const int64_t *ids = spm_dataset_split_ids(set, eval->split);
    int n = (int)spm_dataset_split_size(set, eval->split), groups = spm_dataset_groups(set), confounders = spm_dataset_confounders(set), i, c, g;
    double *p = (double *)malloc((size_t)(n * classes) * sizeof(double)), bin_p[15] = { 0 }, bin_right[15] = { 0 }, ece = 0.0;
    double count[32] = { 0 }, right[32] = { 0 }, loss[32] = { 0 }, class_count[8] = { 0 }, class_right[8] = { 0 };
    double adjusted = 0.0, shares = 0.0, worst = 2.0, balanced = 0.0, seen = 0.0, auroc = 0.0, areas = 0.0, all = 0.0, all_loss = 0.0;
    int *y = (int *)malloc((size_t)n * sizeof(int));
    CHECK_INT(eval->count, n);
    CHECK_INT(eval->n_classes, classes);
    CHECK_INT(eval->n_groups, groups);
    for (i = 0; i < n; i++) {
        const spm_example *e = spm_dataset_example(set, ids[i]);
        double sum = 0.0, x[8], rival = -1e300, example_loss;
        int best = 0, bin;
        y[i] = e->y;
        for (c = 0; c < classes; c++) x[c] = (double)logits[i * classes + (reading->label_reversed ? classes - 1 - c : c)];
        for (c = 0; c < classes; c++) sum += exp(x[c]);
        for (c = 0; c < classes; c++) {
            p[i * classes + c] = exp(x[c]) / sum;
            if (x[c] > x[best]) best = c;
            if (c != e->y && x[c] > rival) rival = x[c];
        }
        example_loss = -log(p[i * classes + e->y]);
        if (reading->softmax_head) {
            for (sum = 0.0, c = 0; c < classes; c++) sum += exp(p[i * classes + c]);
            example_loss = log(sum) - p[i * classes + e->y];
        }
        CHECK_INT(eval->example[i], ids[i]);
        CHECK_INT(eval->y[i], e->y);
        CHECK_INT(eval->group[i], e->group);
        CHECK_INT(eval->predicted[i], best);
        CHECK_NEAR(eval->example_loss[i], example_loss, 1e-5);
        CHECK_NEAR(eval->margin[i], x[e->y] - rival, 1e-5);
        for (c = 0; c < classes; c++) CHECK_NEAR(eval->probability[i * classes + c], p[i * classes + c], 1e-6);
        count[e->group] += 1.0;
        right[e->group] += best == e->y;
        loss[e->group] += example_loss;
        class_count[e->y] += 1.0;
        class_right[e->y] += best == e->y;
        all += best == e->y;
        all_loss += example_loss;
        for (bin = 0; bin < 14 && (double)eval->probability[i * classes + best] > (bin + 1) / 15.0; bin++) {}
        bin_p[bin] += p[i * classes + best];
        bin_right[bin] += best == e->y;
    }
    for (i = 0; i < 15; i++) ece += fabs(bin_p[i] - bin_right[i]) / n;
    for (g = 0; g < groups; g++) {
        const spm_group_metrics *m = &eval->groups[g];
        double share = (double)spm_dataset_group_count(set, SPM_TRAIN, g), low, high;
        CHECK_INT(m->id, g);
        CHECK_INT(m->y, g / confounders);
        CHECK_INT(m->confounder, g % confounders);
        CHECK_STR(m->name, spm_dataset_group_name(set, g));
        CHECK_INT(m->count, count[g]);
        CHECK_INT(m->correct, right[g]);
        if (count[g] == 0.0) {
            CHECK(m->accuracy != m->accuracy && m->loss != m->loss && m->ci_low != m->ci_low && m->ci_high != m->ci_high);
            continue;
        }
        spm_wilson(m->correct, m->count, &low, &high);
        CHECK(m->ci_low == low && m->ci_high == high);
        CHECK_NEAR(m->accuracy, right[g] / count[g], 1e-15);
        CHECK_NEAR(m->loss, loss[g] / count[g], 1e-5);
        adjusted += share * right[g] / count[g];
        shares += share;
        if (right[g] / count[g] < worst) worst = right[g] / count[g];
    }
    for (c = 0; c < classes; c++) {
        double area = plain_auroc(eval->probability, y, n, classes, c);
        if (class_count[c] > 0.0) {
            balanced += class_right[c] / class_count[c];
            seen += 1.0;
        }
        if (area >= 0.0 && (classes > 2 || c == 1)) {
            auroc += area;
            areas += 1.0;
        }
    }
    CHECK_NEAR(eval->mean_accuracy, all / n, 1e-15);
    CHECK_NEAR(eval->loss, all_loss / n, 1e-5);
    CHECK_NEAR(eval->balanced_accuracy, balanced / seen, 1e-14);
    CHECK_NEAR(eval->adjusted_accuracy, adjusted / shares, 1e-14);
    CHECK_NEAR(eval->worst_accuracy, worst, 1e-15);
    CHECK_NEAR(eval->groups[eval->worst_group].accuracy, worst, 1e-15);
    CHECK_NEAR(eval->auroc, auroc / areas, 1e-12);
    CHECK_NEAR(eval->ece, ece, 1e-5);
    free(p);
    free(y);
}

/* Head weights that spread the logits, so that predictions are mixed. */
static void spread_head(spm_model *model, float scale)
{
    spm_parameter *w = spm_model_parameter(model, spm_model_find_parameter(model, "fc.weight"));
    int64_t i;
    for (i = 0; i < spm_tensor_count(&w->value); i++) w->value.data[i] = scale * spm_random_normal(3, 4, (uint64_t)i);
    spm_model_touch(model);
}

static void against_definition(void)
{
    spm_context *ctx = tiny_context(1);
    tiny_counts counts = tiny_usual();
    spm_dataset *set = tiny_data(ctx, "set", &counts);
    spm_model *model = tiny_model(ctx, TINY_ARCH, 5);
    int mode, split;
    spread_head(model, 3.0f);
    for (mode = 0; mode < 4; mode++) {
        for (split = 0; split < SPM_SPLITS; split++) {
            spm_reading reading = tiny_reading();
            spm_eval eval;
            float *logits;
            reading.label_reversed = mode & 1;
            reading.softmax_head = mode >> 1;
            logits = plain_logits(model, set, &reading, (spm_split)split, 2);
            CHECK(evaluate(model, set, &reading, (spm_split)split, 5, &eval));
            CHECK_STR(last.text, "");
            if (eval.count) compare(set, &reading, &eval, logits, 2);
            spm_eval_free(ctx, &eval);
            free(logits);
        }
    }
    spm_model_destroy(model);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* Three classes, two confounders, group 4 nowhere in test, group 1 nowhere in train, class 0 in one group only. */
static void three_classes(void)
{
    static const int counts[3][6] = { { 4, 0, 2, 2, 1, 4 }, { 0, 0, 0, 0, 0, 0 }, { 3, 2, 2, 3, 0, 3 } };
    spm_context *ctx = tiny_context(2);
    spm_dataset_desc desc = SPM_ZERO;
    spm_arch arch = tiny_arch(ctx, TINY_ARCH);
    spm_reading reading = tiny_reading();
    spm_dataset *set;
    spm_model *model;
    spm_eval eval;
    char csv[4000], file[32];
    int split, g, k, i = 0, n = snprintf(csv, sizeof csv, "split,y,place,img_filename\n");
    CHECK(spm_directory_create(ctx, tiny_path("three", ""), NULL) == SPM_OK);
    for (split = 0; split < 3; split++) {
        for (g = 0; g < 6; g++) {
            for (k = 0; k < counts[split][g]; k++, i++) {
                snprintf(file, sizeof file, "%d.png", i);
                tiny_picture(ctx, tiny_path("three", file), i, g / 2 & 1, g & 1);
                n += snprintf(csv + n, sizeof csv - (size_t)n, "%d,%d,%d,%s\n", split, g / 2, g % 2, file);
            }
        }
    }
    tiny_put(ctx, tiny_path("three", "metadata.csv"), csv);
    desc.path = tiny_path("three", "");
    set = spm_dataset_open(ctx, &desc, &last);
    CHECK_STR(last.text, "");
    arch.classes = 3;
    model = spm_model_build(ctx, &arch, 9, NULL);
    CHECK(set && model);
    if (set && model) {
        float *logits;
        spread_head(model, 4.0f);
        for (reading.label_reversed = 0; reading.label_reversed < 2; reading.label_reversed++) {
            logits = plain_logits(model, set, &reading, SPM_TEST, 3);
            CHECK(evaluate(model, set, &reading, SPM_TEST, 4, &eval));
            compare(set, &reading, &eval, logits, 3);
            CHECK_INT(eval.groups[4].count, 0);
            CHECK(eval.worst_group != 4);
            spm_eval_free(ctx, &eval);
            free(logits);
        }
        /* a split without examples: a sentence that says so */
        CHECK(!evaluate(model, set, &reading, SPM_VAL, 0, &eval));
        CHECK_INT(last.status, SPM_E_DATA);
        CHECK(strstr(last.text, "val") != NULL);
        CHECK(eval.groups == NULL);
    }
    spm_model_destroy(model);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* The object of the command line's eval, field by field, with an empty group in it. */
static void json_shape(void)
{
    spm_context *ctx = tiny_context(1);
    tiny_counts counts = tiny_usual();
    spm_dataset *set;
    spm_model *model = tiny_model(ctx, TINY_ARCH, 5);
    spm_reading reading = tiny_reading();
    spm_json *json = spm_json_create(ctx);
    spm_json_value *root;
    const spm_json_value *groups, *group;
    static const char top[][20] = { "command", "split", "count", "mean_accuracy", "adjusted_accuracy", "balanced_accuracy", "auroc", "ece", "worst_group", "groups" };
    static const char inner[][12] = { "id", "name", "y", "confounder", "count", "correct", "accuracy", "ci95", "loss" };
    const char *text;
    spm_eval eval;
    int i;
    counts.group[2][1] = 0;
    set = tiny_data(ctx, "gap", &counts);
    spread_head(model, 3.0f);
    CHECK(evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    spm_eval_json(json, NULL, &eval);
    text = spm_json_finish(json);
    CHECK(text != NULL);
    root = spm_json_parse(ctx, "eval", text, strlen(text), NULL);
    CHECK(root != NULL);
    CHECK_INT(spm_json_length(root), sizeof top / sizeof top[0]);
    for (i = 0; i < (int)(sizeof top / sizeof top[0]); i++) CHECK_STR(spm_json_key_at(root, i), top[i]);
    CHECK_STR(spm_json_as_string(spm_json_get(root, "command"), ""), "eval");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "split"), ""), "test");
    CHECK_INT(spm_json_as_int(spm_json_get(root, "count"), -1), 13);
    CHECK_NEAR(spm_json_as_number(spm_json_get(root, "mean_accuracy"), -1), eval.mean_accuracy, 1e-9);
    CHECK_NEAR(spm_json_as_number(spm_json_get(root, "auroc"), -1), eval.auroc, 1e-9);
    CHECK_NEAR(spm_json_as_number(spm_json_get(root, "ece"), -1), eval.ece, 1e-9);
    CHECK_INT(spm_json_as_int(spm_json_get(spm_json_get(root, "worst_group"), "id"), -2), eval.worst_group);
    CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_get(root, "worst_group"), "accuracy"), -1), eval.worst_accuracy, 1e-9);
    groups = spm_json_get(root, "groups");
    CHECK_INT(spm_json_length(groups), 4);
    group = spm_json_at(groups, 3);
    CHECK_INT(spm_json_length(group), sizeof inner / sizeof inner[0]);
    for (i = 0; i < (int)(sizeof inner / sizeof inner[0]); i++) CHECK_STR(spm_json_key_at(group, i), inner[i]);
    CHECK_STR(spm_json_as_string(spm_json_get(group, "name"), ""), "waterbird on water");
    CHECK_INT(spm_json_length(spm_json_get(group, "ci95")), 2);
    group = spm_json_at(groups, 1);
    CHECK_INT(spm_json_as_int(spm_json_get(group, "count"), -1), 0);
    CHECK_INT(spm_json_as_int(spm_json_get(group, "correct"), -1), 0);
    CHECK_INT(spm_json_type_of(spm_json_get(group, "accuracy")), SPM_JSON_NULL);
    CHECK_INT(spm_json_type_of(spm_json_at(spm_json_get(group, "ci95"), 0)), SPM_JSON_NULL);
    CHECK_INT(spm_json_type_of(spm_json_get(group, "loss")), SPM_JSON_NULL);
    spm_json_free(ctx, root);
    spm_json_destroy(json);
    spm_eval_free(ctx, &eval);
    spm_model_destroy(model);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
}

/* ---- the same bits ---- */

static void same_bits(void)
{
    static const int64_t batches[3] = { 1, 7, 64 };
    spm_eval first = SPM_ZERO;
    spm_context *ctx0 = NULL;
    int threads, b;
    for (threads = 1; threads <= 3; threads++) {
        spm_context *ctx = tiny_context(threads);
        tiny_counts counts = tiny_usual();
        spm_dataset *set = tiny_data(ctx, "set", &counts);
        spm_model *model = tiny_model(ctx, TINY_ARCH, 5);
        spm_reading reading = tiny_reading();
        spread_head(model, 3.0f);
        for (b = 0; b < 3; b++) {
            spm_eval eval;
            CHECK(evaluate(model, set, &reading, SPM_TRAIN, batches[b], &eval));
            if (threads == 1 && b == 0) {
                first = eval;
                ctx0 = ctx;
                continue;
            }
            CHECK_INT(eval.count, first.count);
            CHECK_INT(memcmp(eval.probability, first.probability, (size_t)eval.count * 2 * sizeof(float)), 0);
            CHECK_INT(memcmp(eval.example_loss, first.example_loss, (size_t)eval.count * sizeof(float)), 0);
            CHECK_INT(memcmp(eval.margin, first.margin, (size_t)eval.count * sizeof(float)), 0);
            CHECK(eval.auroc == first.auroc && eval.ece == first.ece && eval.loss == first.loss && eval.mean_accuracy == first.mean_accuracy);
            spm_eval_free(ctx, &eval);
        }
        spm_model_destroy(model);
        spm_dataset_close(set);
        if (ctx != ctx0) spm_context_destroy(ctx);
    }
    spm_eval_free(ctx0, &first);
    spm_context_destroy(ctx0);
}

/* ---- what can go wrong ---- */

static int stop_at_once(void *user, const spm_progress *progress)
{
    CHECK_STR(progress->unit, "images");
    CHECK_STR(progress->what, "evaluate train");
    CHECK_INT(progress->total, 26);
    *(int64_t *)user = progress->done;
    return 1;
}

static void failures(void)
{
    spm_context *ctx = tiny_context(2);
    tiny_counts counts = tiny_usual();
    spm_dataset *set = tiny_data(ctx, "bad", &counts), *skipping;
    spm_dataset_desc opening = SPM_ZERO;
    spm_model *model = tiny_model(ctx, TINY_ARCH, 5), *one;
    spm_reading reading = tiny_reading(), wrong = tiny_reading();
    spm_eval_desc desc = SPM_ZERO;
    spm_arch arch = tiny_arch(ctx, TINY_ARCH);
    spm_parameter *w;
    spm_eval eval;
    int64_t done = 0;
    /* fewer outputs than classes */
    arch.classes = 1;
    one = spm_model_build(ctx, &arch, 1, NULL);
    CHECK(!evaluate(one, set, &reading, SPM_TEST, 0, &eval));
    CHECK_INT(last.status, SPM_E_SHAPE);
    CHECK(strstr(last.text, "2 classes") && strstr(last.text, "has 1"));
    spm_model_destroy(one);
    /* a stop */
    desc.reading = reading;
    desc.split = SPM_TRAIN;
    desc.batch = 4;
    desc.progress = stop_at_once;
    desc.progress_user = &done;
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_evaluate(model, set, &desc, &eval, &last), SPM_E_STOPPED);
    CHECK_INT(done, 4);
    CHECK(strstr(last.text, "4 of 26") != NULL);
    CHECK(eval.groups == NULL);
    /* the context keeps the error of a call without err */
    spm_context_clear_error(ctx);
    CHECK_INT(spm_evaluate(model, set, &desc, &eval, NULL), SPM_E_STOPPED);
    CHECK(strstr(spm_context_error(ctx), "stopped") != NULL);
    spm_context_clear_error(ctx);
    /* pictures of another size than the network's, without resizing */
    wrong.transform.height = wrong.transform.width = 24;
    CHECK(!evaluate(model, set, &wrong, SPM_TEST, 0, &eval));
    CHECK(last.text[0] != 0);
    /* a model that has diverged */
    w = spm_model_parameter(model, spm_model_find_parameter(model, "fc.bias"));
    w->value.data[1] = (float)NAN;
    spm_model_touch(model);
    CHECK(!evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    CHECK_INT(last.status, SPM_E_NUMERIC);
    CHECK(strstr(last.text, "logit 1") != NULL);
    w->value.data[1] = 0.0f;
    spm_model_touch(model);
    spm_dataset_close(set);
    /* a broken and a missing picture: an error that names the first; or left out */
    tiny_put(ctx, tiny_path("bad", "040.png"), "this is no picture");
    remove(tiny_path("bad", "041.png"));
    opening.path = tiny_path("bad", "");
    opening.skip_bad_images = 1;
    skipping = spm_dataset_open(ctx, &opening, NULL);
    opening.skip_bad_images = 0;
    set = spm_dataset_open(ctx, &opening, NULL);
    CHECK(!evaluate(model, set, &reading, SPM_TEST, 0, &eval));
    CHECK(strstr(last.text, "040.png") != NULL);
    CHECK(evaluate(model, skipping, &reading, SPM_TEST, 1, &eval));
    CHECK_STR(last.text, "");
    CHECK_INT(eval.count, 15);
    CHECK_INT(eval.groups[0].count, 3);
    CHECK_INT(spm_dataset_bad_count(skipping), 2);
    spm_eval_free(ctx, &eval);
    spm_dataset_close(skipping);
    spm_dataset_close(set);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* The index by hand, and the coverage of its interval: three binomial differences with known truth, drawn 2,000 times. */
static void memory_index(void)
{
    spm_paired a, b, c;
    double low, high;
    int trial, inside = 0, i, k;
    a.n = 50; a.lost = 20; a.gained = 0;
    b.n = 100; b.lost = 10; b.gained = 5;
    c.n = 1000; c.lost = 30; c.gained = 10;
    CHECK_NEAR(spm_memory_index(&a, &b, &c, &low, &high), 0.4 - 0.05 - 0.02, 1e-12);
    CHECK(low < 0.33 && high > 0.33 && low > 0.0);
    b.n = 0;
    CHECK(spm_memory_index(&a, &b, &c, &low, &high) != spm_memory_index(&a, &b, &c, &low, &high)); /* NaN */
    for (trial = 0; trial < 2000; trial++) {
        static const double lost[3] = { 0.3, 0.1, 0.02 }, gained[3] = { 0.02, 0.05, 0.01 };
        static const int n[3] = { 60, 120, 400 };
        spm_paired p[3];
        memset(p, 0, sizeof p);
        for (k = 0; k < 3; k++) {
            p[k].n = n[k];
            for (i = 0; i < n[k]; i++) {
                double u = (double)spm_random_uniform(7, (uint64_t)trial, (uint64_t)(k * 1000 + i));
                p[k].lost += u < lost[k];
                p[k].gained += u >= lost[k] && u < lost[k] + gained[k];
            }
        }
        (void)spm_memory_index(&p[0], &p[1], &p[2], &low, &high);
        inside += low <= 0.28 - 0.05 - 0.01 && high >= 0.28 - 0.05 - 0.01;
    }
    CHECK_NEAR(inside / 2000.0, 0.95, 0.02);
}

int main(void)
{
    tiny_begin("test_eval");
    TEST(memory_index);
    TEST(wilson);
    TEST(mcnemar);
    TEST(classify);
    TEST(constant_model);
    TEST(against_definition);
    TEST(three_classes);
    TEST(json_shape);
    TEST(same_bits);
    TEST(failures);
    return TEST_END;
}
