/* Sections ATTR and LOCAL: rankings against a gradient and norms computed here, every modification against its definition,
 * rows of results against a changed model evaluated from the pictures, controls and p-values worked out again. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include "bench.h"

/* ---- rankings ---- */

/* The `wanted` examples of a group (-1: of all) with the lowest probability of their class. Returns how many. */
static int plain_samples(bench *b, spm_split split, int group, int wanted, int64_t *ids)
{
    const spm_program *program = spm_model_program(b->model);
    const int64_t *all = spm_dataset_split_ids(b->set, split);
    double p[64];
    int64_t i;
    int n = 0, k, classes = 2;
    spm_run *run = spm_run_create(b->model, NULL, NULL);
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    for (i = 0; i < spm_dataset_split_size(b->set, split); i++) {
        const spm_example *e = spm_dataset_example(b->set, all[i]);
        const float *logits;
        double mine;
        int column = b->reading.label_reversed ? classes - 1 - e->y : e->y;
        if (group >= 0 && e->group != group) continue;
        tiny_pixels(b->set, &b->reading, all[i], pixels);
        (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
        CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
        logits = spm_run_data(run, spm_program_find(program, "logits"));
        mine = 1.0 / (1.0 + exp((double)logits[1 - column] - (double)logits[column]));
        for (k = n; k > 0 && p[k - 1] > mine; k--) {
            p[k] = p[k - 1];
            ids[k] = ids[k - 1];
        }
        p[k] = mine;
        ids[k] = all[i];
        n++;
    }
    spm_run_destroy(run);
    return n < wanted ? n : wanted;
}

static void check_sorted(const spm_unit *units, int64_t n)
{
    int64_t i;
    for (i = 1; i < n; i++) {
        const spm_unit *a = &units[i - 1], *c = &units[i];
        int in_order = a->score > c->score
                    || (a->score >= c->score && (a->parameter < c->parameter || (a->parameter == c->parameter && a->channel < c->channel)));
        CHECK(in_order);
        if (!in_order) return;
    }
}

/* Scores of spm_rank_units against what is computed here. what: 0 gradient, 1 weight x gradient. */
static void check_gradient_ranking(bench *b, int group, int samples, spm_criterion criterion)
{
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    int64_t count = 0, used = 0, u, i, all = 0, ids[64];
    int n = plain_samples(b, SPM_TRAIN, group, samples, ids), k;
    double top;
    desc.reading = b->reading;
    desc.group = group;
    desc.samples = samples;
    desc.criterion = criterion;
    CHECK_INT(spm_rank_units(b->model, b->set, &desc, NULL, &units, &count, &used, &last), SPM_OK);
    CHECK_STR(last.text, "");
    CHECK_INT(used, n);
    plain_gradient(b, ids, n);
    for (k = 0; k < spm_model_parameter_count(b->model); k++) {
        if (ranked(spm_model_parameter(b->model, k))) all += spm_model_parameter(b->model, k)->value.shape[0];
    }
    CHECK_INT(count, all);
    if (!units || count != all) return;
    check_sorted(units, count);
    top = units[0].score;
    CHECK(top > 0.0);
    for (u = 0; u < count; u++) {
        const spm_parameter *p = spm_model_parameter(b->model, units[u].parameter);
        int64_t row = row_size(p);
        double expected = 0.0;
        if (criterion == SPM_CRITERION_GRADIENT) expected = row_norm(p, p->gradient, units[u].channel);
        else {
            for (i = 0; i < row; i++) expected += (double)p->value.data[units[u].channel * row + i] * (double)p->gradient[units[u].channel * row + i];
            expected = fabs(expected);
        }
        CHECK_NEAR(units[u].score, expected, 2e-5 * top);
    }
    spm_free(b->ctx, units);
}

static void gradient_ranking(void)
{
    bench b = bench_open(TINY_ARCH, 2);
    check_gradient_ranking(&b, 1, 200, SPM_CRITERION_GRADIENT); /* a group smaller than the samples: all 3 of it */
    check_gradient_ranking(&b, 0, 4, SPM_CRITERION_GRADIENT);   /* the 4 of 10 that are known least */
    check_gradient_ranking(&b, -1, 200, SPM_CRITERION_GRADIENT);
    check_gradient_ranking(&b, 2, 2, SPM_CRITERION_WEIGHT_GRADIENT);
    b.reading.label_reversed = 1;
    check_gradient_ranking(&b, 3, 5, SPM_CRITERION_GRADIENT);
    bench_close(&b);
}

/* Quirk Q1: the gradient goes through the softmax of the head; and a transformer's linear layers have units too. */
static void gradient_ranking_variants(void)
{
    bench b = bench_open("vit:patch=4,dim=16,depth=2,heads=2,mlp=2", 1);
    spm_arch arch;
    check_gradient_ranking(&b, 0, 6, SPM_CRITERION_GRADIENT);
    bench_close(&b);
    b = bench_open(TINY_ARCH, 1);
    spm_model_destroy(b.model);
    arch = tiny_arch(b.ctx, TINY_ARCH);
    arch.softmax_head = 1;
    b.model = spm_model_build(b.ctx, &arch, 3, NULL);
    b.reading.softmax_head = 1;
    b.reading.label_reversed = 1;
    check_gradient_ranking(&b, 1, 200, SPM_CRITERION_GRADIENT);
    bench_close(&b);
}

static void magnitude_ranking(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    spm_parameter *stem, *down;
    int64_t count = 0, used = 7, u, fewer = 0;
    int i;
    desc.reading = b.reading;
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    CHECK_INT(spm_rank_units(b.model, b.set, &desc, NULL, &units, &count, &used, &last), SPM_OK);
    CHECK_INT(used, 0);
    check_sorted(units, count);
    for (u = 0; u < count; u++) {
        const spm_parameter *p = spm_model_parameter(b.model, units[u].parameter);
        CHECK(ranked(p));
        CHECK_NEAR(units[u].score, row_norm(p, p->value.data, units[u].channel), 1e-9);
    }
    spm_free(b.ctx, units);
    /* quirk Q3: no shortcut convolutions */
    desc.skip_downsample = 1;
    CHECK_INT(spm_rank_units(b.model, b.set, &desc, NULL, &units, &fewer, &used, &last), SPM_OK);
    CHECK_INT(count - fewer, 16 + 32 + 64);
    for (u = 0; u < fewer; u++) CHECK(!(spm_model_parameter(b.model, units[u].parameter)->flags & SPM_PARAMETER_DOWNSAMPLE));
    spm_free(b.ctx, units);
    /* ties: equal rows stand in the order of (parameter, channel) */
    stem = spm_model_parameter(b.model, spm_model_find_parameter(b.model, "conv1.weight"));
    down = spm_model_parameter(b.model, spm_model_find_parameter(b.model, "layer1.0.conv1.weight"));
    for (i = 0; i < (int)spm_tensor_count(&stem->value); i++) stem->value.data[i] = 0.0f;
    for (i = 0; i < (int)spm_tensor_count(&down->value); i++) down->value.data[i] = 0.0f;
    for (i = 0; i < 8; i++) stem->value.data[i * row_size(stem) + 3] = down->value.data[i * row_size(down) + 5] = 9.0f;
    spm_model_touch(b.model);
    CHECK_INT(spm_rank_units(b.model, b.set, &desc, NULL, &units, &count, &used, &last), SPM_OK);
    for (i = 0; i < 16; i++) {
        CHECK_NEAR(units[i].score, 9.0, 0.0);
        CHECK_INT(units[i].channel, i % 8);
        CHECK_STR(spm_model_parameter(b.model, units[i].parameter)->name, i < 8 ? "conv1.weight" : "layer1.0.conv1.weight");
    }
    check_sorted(units, count);
    spm_free(b.ctx, units);
    bench_close(&b);
    /* official ranks 4-D weights only; a transformer has none to rank */
    b = bench_open("vit:patch=4,dim=16,depth=1,heads=2", 1);
    desc.convolutions_only = 1;
    CHECK_INT(spm_rank_units(b.model, b.set, &desc, NULL, &units, &count, &used, &last), SPM_E_UNSUPPORTED);
    CHECK(last.text[0] != 0);
    bench_close(&b);
}

static void random_ranking(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units[3];
    int64_t count = 0, used = 0, u;
    int i, same = 0;
    desc.criterion = SPM_CRITERION_RANDOM;
    for (i = 0; i < 3; i++) {
        desc.seed = i == 2;
        CHECK_INT(spm_rank_units(b.model, b.set, &desc, NULL, &units[i], &count, &used, &last), SPM_OK);
        check_sorted(units[i], count);
    }
    for (u = 0; u < count; u++) {
        CHECK(units[0][u].parameter == units[1][u].parameter && units[0][u].channel == units[1][u].channel);
        same += units[0][u].parameter == units[2][u].parameter && units[0][u].channel == units[2][u].channel;
    }
    CHECK(same < count / 10);
    for (i = 0; i < 3; i++) spm_free(b.ctx, units[i]);
    bench_close(&b);
}

static void ranking_failures(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    tiny_counts counts = tiny_usual();
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    int64_t count = 0, used = 0;
    spm_dataset *gap;
    counts.group[0][2] = 0;
    gap = tiny_data(b.ctx, "gap", &counts);
    desc.reading = b.reading;
    desc.group = 2;
    CHECK_INT(spm_rank_units(b.model, gap, &desc, NULL, &units, &count, &used, &last), SPM_E_DATA);
    CHECK(units == NULL && count == 0);
    CHECK(strstr(last.text, "group 2 (waterbird on land)") && strstr(last.text, "train"));
    memset(&last, 0, sizeof last);
    desc.group = 1;
    desc.samples = (int64_t)1 << 60; /* more than there are, by far */
    CHECK_INT(spm_rank_units(b.model, gap, &desc, NULL, &units, &count, &used, &last), SPM_OK);
    CHECK_INT(used, 3);
    spm_free(b.ctx, units);
    spm_dataset_close(gap);
    bench_close(&b);
}

/* ---- modifications ---- */

static float *copy_of(spm_model *model, int parameter)
{
    const spm_parameter *p = spm_model_parameter(model, parameter);
    size_t bytes = (size_t)spm_tensor_count(&p->value) * sizeof(float);
    float *copy = (float *)malloc(bytes);
    memcpy(copy, p->value.data, bytes);
    return copy;
}

/* Number of rows in which two copies of a parameter differ; *first: the first of them. */
static int rows_changed(const spm_parameter *p, const float *before, int64_t *first)
{
    int64_t c, row = row_size(p);
    int n = 0;
    for (c = 0; c < p->value.shape[0]; c++) {
        if (memcmp(before + c * row, p->value.data + c * row, (size_t)row * sizeof(float)) == 0) continue;
        if (n++ == 0) *first = c;
    }
    return n;
}

static void modifications(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_model *earlier = tiny_model(b.ctx, TINY_ARCH, 99), *other = tiny_model(b.ctx, "resnet18:width=16,stem=cifar", 1);
    int w = spm_model_find_parameter(b.model, "layer2.0.conv1.weight");
    spm_parameter *p = spm_model_parameter(b.model, w);
    spm_unit unit = SPM_ZERO;
    int64_t row = row_size(p), i, first = -1;
    float *before = copy_of(b.model, w), *noisy;
    double sum = 0.0, squares = 0.0;
    uint64_t whole;
    unit.parameter = w;
    unit.channel = 5;
    /* zero: the row alone */
    whole = model_hash(b.model);
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO, 0, 0, NULL, &last), SPM_OK);
    CHECK_INT(rows_changed(p, before, &first), 1);
    CHECK_INT(first, 5);
    for (i = 0; i < row; i++) CHECK(p->value.data[5 * row + i] == 0.0f);
    memcpy(p->value.data, before, (size_t)spm_tensor_count(&p->value) * sizeof(float));
    CHECK(model_hash(b.model) == whole); /* nothing else was touched */
    /* noise: w += std N(0, 1), by seed */
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_NOISE, 0.02, 7, NULL, &last), SPM_OK);
    CHECK_INT(rows_changed(p, before, &first), 1);
    for (i = 0; i < row; i++) {
        double d = ((double)p->value.data[5 * row + i] - (double)before[5 * row + i]) / 0.02;
        sum += d;
        squares += d * d;
    }
    CHECK_NEAR(sum / (double)row, 0.0, 5.0 / sqrt((double)row));
    CHECK_NEAR(squares / (double)row, 1.0, 5.0 * sqrt(2.0 / (double)row));
    noisy = copy_of(b.model, w);
    memcpy(p->value.data, before, (size_t)spm_tensor_count(&p->value) * sizeof(float));
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_NOISE, 0.02, 7, NULL, &last), SPM_OK);
    CHECK_INT(rows_changed(p, noisy, &first), 0);
    memcpy(p->value.data, before, (size_t)spm_tensor_count(&p->value) * sizeof(float));
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_NOISE, 0.02, 8, NULL, &last), SPM_OK);
    CHECK_INT(rows_changed(p, noisy, &first), 1);
    /* reinit: w = std N(0, 1), whatever it was */
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_REINIT, 0.5, 7, NULL, &last), SPM_OK);
    free(noisy);
    noisy = copy_of(b.model, w);
    for (i = 0; i < row; i++) p->value.data[5 * row + i] = 100.0f;
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_REINIT, 0.5, 7, NULL, &last), SPM_OK);
    CHECK_INT(rows_changed(p, noisy, &first), 0);
    CHECK_NEAR(row_norm(p, p->value.data, 5) / sqrt((double)row), 0.5, 0.25);
    memcpy(p->value.data, before, (size_t)spm_tensor_count(&p->value) * sizeof(float));
    /* rewind: the row, or the whole parameter, of an earlier model */
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_REWIND, 0, 0, earlier, &last), SPM_OK);
    CHECK_INT(rows_changed(p, before, &first), 1);
    CHECK_INT(memcmp(p->value.data + 5 * row, spm_model_parameter(earlier, w)->value.data + 5 * row, (size_t)row * sizeof(float)), 0);
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_LAYER_REWIND, 0, 0, earlier, &last), SPM_OK);
    CHECK_INT(memcmp(p->value.data, spm_model_parameter(earlier, w)->value.data, (size_t)spm_tensor_count(&p->value) * sizeof(float)), 0);
    CHECK_STR(last.text, "");
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_REWIND, 0, 0, other, &last), SPM_E_SHAPE);
    CHECK(strstr(last.text, "layer2.0.conv1.weight") != NULL);
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_REWIND, 0, 0, NULL, NULL), SPM_E_SHAPE);
    free(before);
    free(noisy);
    spm_model_destroy(earlier);
    spm_model_destroy(other);
    bench_close(&b);
}

/* zero-unit: what the next layer reads of the unit is 0. zero (quirk Q5): it is the constant that the norm makes of 0. */
static void unit_outputs(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    const spm_program *program = spm_model_program(b.model);
    int w = spm_model_find_parameter(b.model, "layer1.0.conv1.weight"), mean = spm_model_find_parameter(b.model, "layer1.0.bn1.running_mean");
    spm_parameter *p = spm_model_parameter(b.model, w);
    spm_unit unit = SPM_ZERO;
    spm_run *run;
    const float *out;
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    float gamma, beta, constant;
    int i, seen = 0;
    unit.parameter = w;
    unit.channel = 3;
    tiny_pixels(b.set, &b.reading, 0, pixels);
    run = spm_run_create(b.model, NULL, NULL);
    CHECK(spm_run_keep(run, p->norm_output) == SPM_OK);
    (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
    gamma = spm_model_parameter(b.model, p->norm_weight)->value.data[3];
    beta = spm_model_parameter(b.model, p->norm_bias)->value.data[3] = 0.75f;
    constant = beta - gamma * spm_model_parameter(b.model, mean)->value.data[3] / sqrtf(1.0f + 1e-5f);
    spm_model_touch(b.model);
    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
    out = spm_run_data(run, p->norm_output);
    for (i = 0; i < TINY_SIZE * TINY_SIZE; i++) seen += out[i * 8 + 3] > 0.0f;
    CHECK(seen > 0);
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO, 0, 0, NULL, NULL), SPM_OK);
    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
    out = spm_run_data(run, p->norm_output);
    for (i = 0; i < TINY_SIZE * TINY_SIZE; i++) CHECK_NEAR(out[i * 8 + 3], constant > 0.0f ? constant : 0.0f, 1e-5);
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL), SPM_OK);
    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
    out = spm_run_data(run, p->norm_output);
    for (i = 0; i < TINY_SIZE * TINY_SIZE; i++) CHECK(out[i * 8 + 3] == 0.0f);
    spm_run_destroy(run);
    bench_close(&b);
    /* a linear layer has no norm behind it: row and bias go */
    b = bench_open("vit:patch=4,dim=16,depth=1,heads=2", 1);
    w = spm_model_find_parameter(b.model, "blocks.0.mlp.fc1.weight");
    p = spm_model_parameter(b.model, w);
    unit.parameter = w;
    unit.channel = 7;
    CHECK_INT(modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL), SPM_OK);
    CHECK_NEAR(row_norm(p, p->value.data, 7), 0.0, 0.0);
    CHECK(p->bias >= 0 && spm_model_parameter(b.model, p->bias)->value.data[7] == 0.0f);
    CHECK(p->bias >= 0 && spm_model_parameter(b.model, p->bias)->value.data[6] != 0.0f);
    bench_close(&b);
}

/* ---- studies ---- */

/* Runs a study; the text of its JSON (free it) or NULL. The model must be the same bits afterwards. */
static char *study_text(bench *b, const spm_localize_desc *desc)
{
    spm_json *json = spm_json_create(b->ctx);
    uint64_t before = model_hash(b->model);
    char *copy = NULL;
    const char *text;
    memset(&last, 0, sizeof last);
    if (spm_localize(b->model, b->set, desc, json, NULL, &last) == SPM_OK) {
        text = spm_json_finish(json);
        CHECK(text != NULL);
        if (text) {
            copy = (char *)malloc(strlen(text) + 1);
            memcpy(copy, text, strlen(text) + 1);
        }
    }
    CHECK(model_hash(b->model) == before);
    spm_json_destroy(json);
    return copy;
}

static spm_json_value *study(bench *b, const spm_localize_desc *desc)
{
    char *text = study_text(b, desc);
    spm_json_value *root = text ? spm_json_parse(b->ctx, "study", text, strlen(text), NULL) : NULL;
    CHECK_STR(last.text, "");
    CHECK(root != NULL);
    free(text);
    return root;
}

static void check_refused(bench *b, const spm_localize_desc *desc, const char *a, const char *c)
{
    char *text = study_text(b, desc);
    CHECK(text == NULL);
    if (last.status == SPM_OK || !strstr(last.text, a) || !strstr(last.text, c)) {
        printf("    \"%s\" lacks \"%s\" or \"%s\"\n", last.text, a, c);
        CHECK(0);
    }
    free(text);
}

/* Group accuracies of a JSON list against an evaluation from the pictures. */
static void check_groups(const spm_json_value *groups, const spm_eval *eval)
{
    int g;
    CHECK_INT(spm_json_length(groups), eval->n_groups);
    for (g = 0; g < eval->n_groups; g++) {
        const spm_json_value *group = spm_json_at(groups, g);
        CHECK_INT(spm_json_as_int(spm_json_get(group, "id"), -1), g);
        CHECK_INT(spm_json_as_int(spm_json_get(group, "count"), -1), eval->groups[g].count);
        CHECK_INT(spm_json_as_int(spm_json_get(group, "correct"), -1), eval->groups[g].correct);
        CHECK_NEAR(spm_json_as_number(spm_json_get(group, "accuracy"), -1), eval->groups[g].accuracy, 1e-8);
        CHECK_NEAR(spm_json_as_number(spm_json_get(group, "loss"), -1), eval->groups[g].loss, 1e-7 * (1.0 + eval->groups[g].loss));
    }
}

static spm_eval evaluated(bench *b, spm_split split)
{
    spm_eval_desc desc = SPM_ZERO;
    spm_eval eval;
    desc.reading = b->reading;
    desc.split = split;
    CHECK_INT(spm_evaluate(b->model, b->set, &desc, &eval, NULL), SPM_OK);
    return eval;
}

static spm_localize_desc usual_study(const bench *b)
{
    spm_localize_desc desc = SPM_ZERO;
    desc.reading = b->reading;
    return desc;
}

/* Unit number u of ranking r, as the JSON names it. */
static spm_unit unit_at(bench *b, const spm_json_value *root, int64_t r, int64_t u)
{
    const spm_json_value *entry = spm_json_at(spm_json_get(spm_json_at(spm_json_get(root, "rankings"), r), "units"), u);
    spm_unit unit = SPM_ZERO;
    unit.parameter = spm_model_find_parameter(b->model, spm_json_as_string(spm_json_get(entry, "parameter"), ""));
    unit.channel = spm_json_as_int(spm_json_get(entry, "channel"), -1);
    unit.score = spm_json_as_number(spm_json_get(entry, "score"), -1.0);
    CHECK(unit.parameter >= 0 && unit.channel >= 0);
    return unit;
}

/* A copy of all values, to put back. */
static float **save_all(spm_model *model)
{
    int i, n = spm_model_parameter_count(model);
    float **all = (float **)malloc((size_t)n * sizeof *all);
    for (i = 0; i < n; i++) all[i] = copy_of(model, i);
    return all;
}

static void restore_all(spm_model *model, float **all, int release)
{
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        memcpy(p->value.data, all[i], (size_t)spm_tensor_count(&p->value) * sizeof(float));
        if (release) free(all[i]);
    }
    if (release) free(all);
    spm_model_touch(model);
}

/* The object of CLI.md with its defaults: all groups, top 1, 2, 3, zero-unit, train and test. Every row is measured
 * again by changing the model and evaluating it from the pictures. */
static void rows_are_what_they_say(void)
{
    static const char keys[][16] = { "command", "criterion", "unit", "profile", "select_split", "baseline", "rankings", "results" };
    bench b = bench_open(TINY_ARCH, 2);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root = study(&b, &desc);
    const spm_json_value *rankings = spm_json_get(root, "rankings"), *results = spm_json_get(root, "results");
    float **all = save_all(b.model);
    spm_eval eval;
    int64_t r, u, k;
    int i, changed = 0;
    for (i = 0; i < (int)(sizeof keys / sizeof keys[0]); i++) CHECK(spm_json_get(root, keys[i]) != NULL);
    CHECK_STR(spm_json_as_string(spm_json_get(root, "command"), ""), "localize");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "criterion"), ""), "gradient");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "unit"), ""), "channel");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "profile"), ""), "sound");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "select_split"), ""), "train");
    CHECK_STR(spm_json_as_string(spm_json_get(root, "selected_on"), ""), "train");
    CHECK_INT(spm_json_length(spm_json_get(root, "baseline")), 2);
    for (i = 0; i < 3; i += 2) {
        eval = evaluated(&b, (spm_split)i);
        check_groups(spm_json_get(spm_json_get(root, "baseline"), spm_split_name((spm_split)i)), &eval);
        spm_eval_free(b.ctx, &eval);
    }
    CHECK_INT(spm_json_length(rankings), 4);
    CHECK_INT(spm_json_length(results), 12);
    for (r = 0; r < spm_json_length(rankings); r++) {
        const spm_json_value *ranking = spm_json_at(rankings, r);
        CHECK_INT(spm_json_as_int(spm_json_get(ranking, "group"), -1), r);
        CHECK_INT(spm_json_as_int(spm_json_get(ranking, "samples"), -1), spm_dataset_group_count(b.set, SPM_TRAIN, (int)r));
        CHECK_INT(spm_json_length(spm_json_get(ranking, "units")), 3);
    }
    for (k = 0; k < spm_json_length(results); k++) {
        const spm_json_value *row = spm_json_at(results, k), *splits = spm_json_get(row, "splits");
        int64_t top = spm_json_as_int(spm_json_get(row, "top"), -1);
        spm_unit units[3];
        CHECK_INT(spm_json_as_int(spm_json_get(row, "group"), -1), k / 3);
        CHECK_INT(top, k % 3 + 1);
        CHECK_STR(spm_json_as_string(spm_json_get(row, "modify"), ""), "zero-unit");
        CHECK_INT(spm_json_type_of(spm_json_get(row, "std")), SPM_JSON_NULL);
        CHECK_INT(spm_json_as_int(spm_json_get(row, "repeat"), -1), 0);
        CHECK_INT(spm_json_type_of(spm_json_get(row, "controls")), SPM_JSON_ARRAY);
        CHECK_INT(spm_json_length(spm_json_get(row, "controls")), 0);
        CHECK_INT(spm_json_length(splits), 2);
        for (u = 0; u < top && u < 3; u++) units[u] = unit_at(&b, root, k / 3, u);
        (void)modify_units(b.model, units, top, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL);
        for (i = 0; i < 3; i += 2) {
            eval = evaluated(&b, (spm_split)i);
            check_groups(spm_json_get(splits, spm_split_name((spm_split)i)), &eval);
            changed += fabs(eval.loss - spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(spm_json_get(root, "baseline"), "test"), 0), "loss"), 0)) > 1e-6;
            spm_eval_free(b.ctx, &eval);
        }
        restore_all(b.model, all, 0);
    }
    CHECK(changed > 0); /* removing units does something, or this test would show nothing */
    restore_all(b.model, all, 1);
    spm_json_free(b.ctx, root);
    bench_close(&b);
}

/* Stored block inputs change nothing: nor does their absence, the batch, the number of threads. */
static void prefix_and_threads(void)
{
    static const size_t bytes[4] = { 0, 1, 60000, (size_t)1 << 30 };
    char *first = NULL, *text;
    int variant;
    for (variant = 0; variant < 6; variant++) {
        bench b = bench_open(TINY_ARCH, variant < 4 ? 1 : variant - 2);
        spm_localize_desc desc = usual_study(&b);
        desc.prefix_bytes = variant < 4 ? bytes[variant] : 0;
        desc.batch = variant == 1 ? 5 : variant == 2 ? 1 : 0;
        desc.controls = 9;
        desc.top[0] = 2;
        desc.n_top = 1;
        text = study_text(&b, &desc);
        CHECK(text != NULL);
        if (variant == 0) first = text;
        else {
            CHECK(text && first && strcmp(text, first) == 0);
            free(text);
        }
        bench_close(&b);
    }
    free(first);
}

/* Every modification leaves the model as it was (study_text checks the bits), draws by seed, and has its rows. */
static void every_modification(void)
{
    bench b = bench_open(TINY_ARCH, 2);
    spm_model *earlier = tiny_model(b.ctx, TINY_ARCH, 99);
    spm_checkpoint_info info = SPM_ZERO;
    char file[900];
    int m, g;
    snprintf(file, sizeof file, "%s", tiny_path("earlier.safetensors", ""));
    info.arch = tiny_arch(b.ctx, TINY_ARCH);
    info.transform = b.reading.transform;
    CHECK(spm_checkpoint_save(earlier, file, &info, NULL) == SPM_OK);
    for (m = SPM_MODIFY_ZERO_UNIT; m <= SPM_MODIFY_LAYER_REWIND; m++) {
        spm_localize_desc desc = usual_study(&b);
        int noisy = m == SPM_MODIFY_NOISE || m == SPM_MODIFY_REINIT, one = 1;
        spm_json_value *root;
        const spm_json_value *results;
        spm_modify parsed = SPM_MODIFY_ZERO;
        CHECK(spm_modify_parse(spm_modify_name((spm_modify)m), &parsed) && parsed == (spm_modify)m);
        desc.modify = (spm_modify)m;
        desc.groups = &one;
        desc.n_groups = 1;
        desc.criterion = SPM_CRITERION_GRADIENT;
        desc.top[0] = 1;
        desc.top[1] = 4;
        desc.n_top = 2;
        desc.std[0] = 0.05;
        desc.std[1] = 2.0;
        desc.n_std = 2;
        desc.repeats = noisy ? 3 : 0;
        desc.rewind_file[0] = file;
        desc.seed = 4;
        root = study(&b, &desc);
        results = spm_json_get(root, "results");
        CHECK_INT(spm_json_length(spm_json_get(root, "rankings")), 1);
        CHECK_INT(spm_json_length(results), noisy ? 2 * 2 * 4 : 2);
        if (noisy && spm_json_length(results) == 16) {
            for (g = 0; g < 4; g++) { /* a row "mean" behind its repeats */
                const spm_json_value *mean = spm_json_at(results, 4 * g + 3);
                double sum[4] = { 0 };
                int r, k;
                CHECK_STR(spm_json_as_string(spm_json_get(mean, "repeat"), ""), "mean");
                CHECK_NEAR(spm_json_as_number(spm_json_get(mean, "std"), -1), g % 2 ? 2.0 : 0.05, 1e-9);
                for (r = 0; r < 3; r++) {
                    const spm_json_value *row = spm_json_at(results, 4 * g + r);
                    CHECK_INT(spm_json_as_int(spm_json_get(row, "repeat"), -1), r);
                    CHECK_INT(spm_json_as_int(spm_json_get(row, "top"), -1), g < 2 ? 1 : 4);
                    for (k = 0; k < 4; k++) sum[k] += spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(spm_json_get(row, "splits"), "test"), k), "accuracy"), -9) / 3.0;
                }
                for (k = 0; k < 4; k++) CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(spm_json_get(mean, "splits"), "test"), k), "accuracy"), -9), sum[k], 1e-8);
            }
        }
        spm_json_free(b.ctx, root);
    }
    {
        spm_localize_desc desc = usual_study(&b);
        desc.modify = SPM_MODIFY_REWIND;
        check_refused(&b, &desc, "--rewind", "rewind");
        desc.rewind_file[0] = "/nonexistent/earlier.safetensors";
        check_refused(&b, &desc, "/nonexistent/earlier.safetensors", "");
        desc = usual_study(&b);
        desc.modify = SPM_MODIFY_NOISE;
        desc.std[0] = 1e38; /* beyond all numbers: a sentence, not a result */
        desc.n_std = 1;
        check_refused(&b, &desc, "not a finite number", "example");
    }
    spm_model_destroy(earlier);
    bench_close(&b);
}

/* A group without examples has no mean over repeats: nothing is correct in it, and there is no accuracy or deviation. */
static void means_of_an_empty_group(void)
{
    bench b = bench_open("resnet18:width=2,stem=cifar", 1);
    spm_localize_desc desc = usual_study(&b);
    tiny_counts counts = tiny_usual();
    spm_json_value *root;
    const spm_json_value *mean, *group;
    int g;
    counts.group[2][1] = 0;
    spm_dataset_close(b.set);
    b.set = tiny_data(b.ctx, "gap", &counts);
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    desc.modify = SPM_MODIFY_NOISE;
    desc.std[0] = 1.0;
    desc.n_std = desc.n_top = 1;
    desc.top[0] = 3;
    desc.repeats = 3;
    root = study(&b, &desc);
    mean = spm_json_at(spm_json_get(root, "results"), 3);
    CHECK_STR(spm_json_as_string(spm_json_get(mean, "repeat"), ""), "mean");
    for (g = 0; g < 4; g++) {
        group = spm_json_at(spm_json_get(spm_json_get(mean, "splits"), "test"), g);
        CHECK(g == 1 ? spm_json_as_int(spm_json_get(group, "correct"), -1) == 0 : spm_json_as_int(spm_json_get(group, "correct"), -1) >= 0);
        CHECK_INT(spm_json_type_of(spm_json_get(group, "accuracy")), g == 1 ? SPM_JSON_NULL : SPM_JSON_NUMBER);
        CHECK_INT(spm_json_type_of(spm_json_at(spm_json_get(spm_json_get(mean, "accuracy_sd"), "test"), g)), g == 1 ? SPM_JSON_NULL : SPM_JSON_NUMBER);
    }
    spm_json_free(b.ctx, root);
    bench_close(&b);
}

/* As many sizes and standard deviations as there may be: none is lost. */
static void every_row_is_there(void)
{
    bench b = bench_open("resnet18:width=2,stem=cifar", 2);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root;
    const spm_json_value *results, *row;
    int64_t i;
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    desc.modify = SPM_MODIFY_NOISE;
    desc.repeats = 1;
    desc.report[SPM_TEST] = 1;
    desc.n_top = desc.n_std = SPM_LOCALIZE_MAX;
    for (i = 0; i < SPM_LOCALIZE_MAX; i++) {
        desc.top[i] = i + 1;
        desc.std[i] = 0.001 * (double)(i + 1);
    }
    root = study(&b, &desc);
    results = spm_json_get(root, "results");
    CHECK_INT(spm_json_length(results), SPM_LOCALIZE_MAX * SPM_LOCALIZE_MAX);
    row = spm_json_at(results, spm_json_length(results) - 1);
    CHECK_INT(spm_json_as_int(spm_json_get(row, "top"), -1), SPM_LOCALIZE_MAX);
    CHECK_NEAR(spm_json_as_number(spm_json_get(row, "std"), -1), 0.001 * SPM_LOCALIZE_MAX, 1e-12);
    spm_json_free(b.ctx, root);
    bench_close(&b);
}

/* ---- controls ---- */

typedef struct neighbour {
    int64_t channel;
    double gap;
} neighbour;

static int neighbour_order(const void *x, const void *y)
{
    const neighbour *a = (const neighbour *)x, *b = (const neighbour *)y;
    if (a->gap < b->gap || a->gap > b->gap) return a->gap < b->gap ? -1 : 1;
    return a->channel < b->channel ? -1 : 1;
}

/* One unit: the nearest in norm of its parameter, one after the other; p = (1 + at least the effect) / (n + 1). */
static void controls_of_one_unit(void)
{
    bench b = bench_open(TINY_ARCH, 2);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root;
    const spm_json_value *row, *controls;
    float **all = save_all(b.model);
    spm_eval base[3], real[3], other[3];
    spm_unit unit;
    spm_parameter *p;
    neighbour near[64];
    int64_t c, n = 0, j, wanted = 5;
    double drops[3][4] = { { 0 } }, gap = 0.0;
    int at_least[3][4] = { { 0 } }, group = 3, s, g;
    int64_t i;
    desc.groups = &group;
    desc.n_groups = 1;
    desc.top[0] = 1;
    desc.n_top = 1;
    desc.controls = wanted;
    desc.modify = SPM_MODIFY_ZERO;
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(root, "results")), 1);
    row = spm_json_at(spm_json_get(root, "results"), 0);
    controls = spm_json_get(row, "controls");
    unit = unit_at(&b, root, 0, 0);
    p = spm_model_parameter(b.model, unit.parameter);
    for (c = 0; c < p->value.shape[0]; c++) {
        if (c == unit.channel) continue;
        near[n].channel = c;
        near[n++].gap = fabs(row_norm(p, p->value.data, c) - row_norm(p, p->value.data, unit.channel));
    }
    qsort(near, (size_t)n, sizeof near[0], neighbour_order);
    for (s = 0; s < 3; s++) base[s] = evaluated(&b, (spm_split)s);
    (void)modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO, 0, 0, NULL, NULL);
    for (s = 0; s < 3; s++) real[s] = evaluated(&b, (spm_split)s);
    restore_all(b.model, all, 0);
    for (j = 0; j < wanted; j++) {
        spm_unit control = unit;
        control.channel = near[j].channel;
        gap += near[j].gap;
        (void)modify_units(b.model, &control, 1, SPM_MODIFY_ZERO, 0, 0, NULL, NULL);
        for (s = 0; s < 3; s++) {
            other[s] = evaluated(&b, (spm_split)s);
            for (g = 0; g < 4; g++) {
                double drop = base[s].groups[g].accuracy - other[s].groups[g].accuracy;
                drops[s][g] += drop;
                at_least[s][g] += drop >= base[s].groups[g].accuracy - real[s].groups[g].accuracy;
            }
            spm_eval_free(b.ctx, &other[s]);
        }
        restore_all(b.model, all, 0);
    }
    CHECK_INT(spm_json_length(controls), 8);
    for (i = 0; i < spm_json_length(controls); i++) {
        const spm_json_value *entry = spm_json_at(controls, i);
        spm_split split = SPM_VAL;
        CHECK(spm_split_parse(spm_json_as_string(spm_json_get(entry, "split"), "?"), &split));
        g = (int)spm_json_as_int(spm_json_get(entry, "group"), 0);
        CHECK_INT(g, i % 4);
        CHECK_INT(split, i < 4 ? SPM_TRAIN : SPM_TEST);
        CHECK_INT(spm_json_as_int(spm_json_get(entry, "n"), -1), wanted);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "mean_drop"), -9), drops[split][g] / (double)wanted, 1e-8);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "p_value"), -9), (1.0 + at_least[split][g]) / ((double)wanted + 1.0), 1e-8);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "mean_norm_gap"), -9), gap / (double)wanted, 1e-6);
    }
    for (s = 0; s < 3; s++) {
        spm_eval_free(b.ctx, &base[s]);
        spm_eval_free(b.ctx, &real[s]);
    }
    spm_json_free(b.ctx, root);
    restore_all(b.model, all, 1);
    bench_close(&b);
}

static int double_order(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Where more controls are wanted than there are sets of other units, each set is measured, and once: the drops are those
 * of all sets, changed one by one here. `per`: units of conv1 and of layer1.0.conv1 (8 channels each) that are studied. */
static void check_all_controls(const int *per, int64_t sets)
{
    static const char names[2][24] = { "conv1.weight", "layer1.0.conv1.weight" };
    bench b = bench_open(TINY_ARCH, 2);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root;
    const spm_json_value *controls;
    float **all;
    spm_eval base, real, other;
    double drops[4][64];
    int parameter[2], k, bits[2], g, studied[2] = { 0, 0 };
    int64_t n = 0, u, at_least[4] = { 0, 0, 0, 0 }, i;
    spm_unit units[8];
    for (k = 0; k < 2; k++) { /* the rows that magnitude finds first */
        spm_parameter *p;
        parameter[k] = spm_model_find_parameter(b.model, names[k]);
        p = spm_model_parameter(b.model, parameter[k]);
        for (i = 0; i < per[k]; i++) p->value.data[2 * i * row_size(p)] = 30.0f + (float)i;
        for (i = 0; i < per[k]; i++) studied[k] |= 1 << (2 * i);
    }
    spm_model_touch(b.model);
    all = save_all(b.model);
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    desc.modify = SPM_MODIFY_ZERO;
    desc.top[0] = per[0] + per[1];
    desc.n_top = 1;
    desc.controls = 63;
    desc.report[SPM_TRAIN] = 1;
    root = study(&b, &desc);
    base = evaluated(&b, SPM_TRAIN);
    for (u = 0; u < desc.top[0]; u++) {
        units[u] = unit_at(&b, root, 0, u);
        CHECK(studied[units[u].parameter == parameter[1]] >> units[u].channel & 1);
    }
    (void)modify_units(b.model, units, desc.top[0], SPM_MODIFY_ZERO, 0, 0, NULL, NULL);
    real = evaluated(&b, SPM_TRAIN);
    restore_all(b.model, all, 0);
    for (bits[0] = 0; bits[0] < 256; bits[0]++) {
        for (bits[1] = 0; bits[1] < 256; bits[1]++) {
            int fits = 1;
            for (k = 0, u = 0; k < 2; k++) {
                int count = 0;
                for (i = 0; i < 8; i++) count += bits[k] >> i & 1;
                fits &= count == per[k] && !(bits[k] & studied[k]);
                for (i = 0; fits && i < 8; i++) {
                    if (!(bits[k] >> i & 1)) continue;
                    units[u].parameter = parameter[k];
                    units[u++].channel = i;
                }
            }
            if (!fits || n >= 64) continue;
            (void)modify_units(b.model, units, u, SPM_MODIFY_ZERO, 0, 0, NULL, NULL);
            other = evaluated(&b, SPM_TRAIN);
            for (g = 0; g < 4; g++) {
                drops[g][n] = base.groups[g].accuracy - other.groups[g].accuracy;
                at_least[g] += drops[g][n] >= base.groups[g].accuracy - real.groups[g].accuracy;
            }
            n++;
            spm_eval_free(b.ctx, &other);
            restore_all(b.model, all, 0);
        }
    }
    CHECK_INT(n, sets);
    controls = spm_json_get(spm_json_at(spm_json_get(root, "results"), 0), "controls");
    CHECK_INT(spm_json_length(controls), 4);
    for (g = 0; g < 4; g++) {
        const spm_json_value *entry = spm_json_at(controls, g), *list = spm_json_get(entry, "drops");
        double measured[64];
        CHECK_INT(spm_json_as_int(spm_json_get(entry, "n"), -1), n);
        CHECK_INT(spm_json_length(list), n);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "p_value"), -9), (1.0 + (double)at_least[g]) / ((double)n + 1.0), 1e-8);
        for (i = 0; i < n; i++) measured[i] = spm_json_as_number(spm_json_at(list, i), -9);
        qsort(measured, (size_t)n, sizeof measured[0], double_order);
        qsort(drops[g], (size_t)n, sizeof drops[g][0], double_order);
        for (i = 0; i < n; i++) CHECK_NEAR(measured[i], drops[g][i], 1e-8);
    }
    spm_eval_free(b.ctx, &base);
    spm_eval_free(b.ctx, &real);
    spm_json_free(b.ctx, root);
    restore_all(b.model, all, 1);
    bench_close(&b);
}

static void controls_are_distinct(void)
{
    static const int pair[2] = { 2, 0 }, three[2] = { 3, 0 }, four[2] = { 4, 0 }, one_each[2] = { 1, 1 };
    check_all_controls(pair, 15);     /* 2 of the 6 others */
    check_all_controls(three, 10);    /* 3 of 5 */
    check_all_controls(four, 1);      /* 4 of 4 */
    check_all_controls(one_each, 49); /* 7 times 7 */
}

static void number_of_controls(void)
{
    bench b = bench_open(TINY_ARCH, 2);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root;
    const spm_json_value *results;
    int64_t i;
    desc.controls = 19;
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    root = study(&b, &desc);
    results = spm_json_get(root, "results");
    CHECK_INT(spm_json_length(spm_json_get(root, "rankings")), 1);
    CHECK_INT(spm_json_type_of(spm_json_get(spm_json_at(spm_json_get(root, "rankings"), 0), "group")), SPM_JSON_NULL);
    CHECK_INT(spm_json_length(results), 3);
    for (i = 0; i < 3; i++) { /* the rows of the largest top alone */
        const spm_json_value *row = spm_json_at(results, i), *controls = spm_json_get(row, "controls");
        CHECK_INT(spm_json_type_of(spm_json_get(row, "group")), SPM_JSON_NULL);
        CHECK_INT(spm_json_length(controls), i == 2 ? 8 : 0);
        if (i == 2) CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(controls, 0), "n"), -1), 19);
    }
    spm_json_free(b.ctx, root);
    /* one unit of a layer of 8 has 7 others, however many are wanted */
    for (i = 0; i < spm_model_parameter_count(b.model); i++) {
        spm_parameter *p = spm_model_parameter(b.model, (int)i);
        if (strcmp(p->name, "conv1.weight") == 0) p->value.data[0] = 50.0f;
    }
    spm_model_touch(b.model);
    desc.top[0] = 1;
    desc.n_top = 1;
    root = study(&b, &desc);
    CHECK_STR(spm_model_parameter(b.model, unit_at(&b, root, 0, 0).parameter)->name, "conv1.weight");
    CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(spm_json_at(spm_json_get(root, "results"), 0), "controls"), 0), "n"), -1), 7);
    spm_json_free(b.ctx, root);
    bench_close(&b);
}

/* ---- what is allowed ---- */

static int count_calls(void *user, const spm_progress *progress)
{
    int *calls = (int *)user;
    CHECK_STR(progress->unit, "changes");
    CHECK_INT(progress->done, ++calls[0]);
    CHECK_INT(progress->total, calls[1]);
    return calls[2] == calls[0];
}

static void rules_and_sentences(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_localize_desc desc = usual_study(&b);
    tiny_counts counts = tiny_usual();
    spm_json_value *root;
    spm_dataset *whole = b.set;
    int64_t units = 0;
    int i, groups[3] = { 0, 7, -1 }, calls[3] = { 0, 0, 0 };
    for (i = 0; i < spm_model_parameter_count(b.model); i++) units += ranked(spm_model_parameter(b.model, i)) ? spm_model_parameter(b.model, i)->value.shape[0] : 0;
    /* chosen and reported on one held-out split: only when asked for */
    desc.select_split = SPM_TEST;
    check_refused(&b, &desc, "test", "--allow-same-split");
    desc.allow_same_split = 1;
    root = study(&b, &desc);
    CHECK_STR(spm_json_as_string(spm_json_get(root, "selected_on"), ""), "test");
    spm_json_free(b.ctx, root);
    desc.allow_same_split = 0;
    desc.report[SPM_TRAIN] = desc.report[SPM_VAL] = 1; /* test is not reported: fine */
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(root, "baseline")), 2);
    CHECK(spm_json_get(spm_json_get(root, "baseline"), "val") != NULL);
    spm_json_free(b.ctx, root);
    desc.select_split = SPM_VAL;
    check_refused(&b, &desc, "val", "--allow-same-split");
    desc.official = 1;
    desc.quirks = SPM_QUIRK(7);
    root = study(&b, &desc);
    CHECK_STR(spm_json_as_string(spm_json_get(root, "profile"), ""), "official");
    spm_json_free(b.ctx, root);
    /* top */
    desc = usual_study(&b);
    desc.n_top = 1;
    desc.top[0] = units + 1;
    {
        char number[32];
        snprintf(number, sizeof number, "%ld", (long)units);
        check_refused(&b, &desc, "top", number);
    }
    desc.top[0] = -1;
    check_refused(&b, &desc, "top -1", "");
    desc.top[0] = 0; /* nothing is changed: the baseline again */
    desc.controls = 5;
    root = study(&b, &desc);
    {
        spm_eval eval = evaluated(&b, SPM_TEST);
        const spm_json_value *row = spm_json_at(spm_json_get(root, "results"), 2);
        check_groups(spm_json_get(spm_json_get(row, "splits"), "test"), &eval);
        CHECK_INT(spm_json_length(spm_json_get(spm_json_at(spm_json_get(root, "rankings"), 0), "units")), 0);
        spm_eval_free(b.ctx, &eval);
    }
    spm_json_free(b.ctx, root);
    desc.top[0] = units; /* every unit: still a result */
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(spm_json_at(spm_json_get(root, "results"), 0), "controls")), 0); /* none is left to compare with */
    spm_json_free(b.ctx, root);
    /* groups */
    desc = usual_study(&b);
    desc.groups = groups;
    desc.n_groups = 2;
    check_refused(&b, &desc, "group 7", "0 to 3");
    groups[1] = -1;
    check_refused(&b, &desc, "group -1", "0 to 3");
    counts.group[0][2] = 0;
    b.set = tiny_data(b.ctx, "gap", &counts);
    groups[1] = 2;
    check_refused(&b, &desc, "group 2 (waterbird on land)", "train");
    desc.groups = NULL; /* all: the empty group is left out */
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(root, "rankings")), 3);
    CHECK_INT(spm_json_length(spm_json_at(spm_json_get(root, "baseline"), 0)), 4);
    CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(spm_json_get(root, "baseline"), "train"), 2), "count"), -1), 0);
    CHECK_INT(spm_json_type_of(spm_json_get(spm_json_at(spm_json_get(spm_json_get(root, "baseline"), "train"), 2), "accuracy")), SPM_JSON_NULL);
    spm_json_free(b.ctx, root);
    spm_dataset_close(b.set);
    /* splits that are not there */
    memset(counts.group[1], 0, sizeof counts.group[1]);
    memset(counts.group[2], 0, sizeof counts.group[2]);
    counts.group[0][2] = 3;
    b.set = tiny_data(b.ctx, "trainonly", &counts);
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(root, "baseline")), 1);
    spm_json_free(b.ctx, root);
    desc.select_split = SPM_VAL;
    check_refused(&b, &desc, "val split", "");
    desc.select_split = SPM_TRAIN;
    desc.report[SPM_TEST] = 1;
    check_refused(&b, &desc, "none of the splits", "");
    spm_dataset_close(b.set);
    b.set = whole;
    /* progress, and a stop amid it; the model comes back whole (study_text looks) */
    desc = usual_study(&b);
    desc.progress = count_calls;
    desc.progress_user = calls;
    desc.controls = 2;
    calls[1] = 4 * (3 + 2);
    root = study(&b, &desc);
    CHECK_INT(calls[0], 20);
    spm_json_free(b.ctx, root);
    calls[0] = 0;
    calls[2] = 7;
    check_refused(&b, &desc, "stopped after 7 of 20", "");
    CHECK_INT(last.status, SPM_E_STOPPED);
    bench_close(&b);
}

/* ---- single weights ---- */

static spm_localize_desc weight_study(const bench *b, double fraction, int smallest, unsigned quirks)
{
    spm_localize_desc desc = usual_study(b);
    desc.unit = SPM_UNIT_WEIGHT;
    desc.criterion = SPM_CRITERION_MAGNITUDE;
    desc.modify = SPM_MODIFY_ZERO;
    desc.fraction[0] = fraction;
    desc.n_fraction = 1;
    desc.order_smallest = smallest;
    desc.quirks = quirks;
    return desc;
}

static int float_order(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* |w| of all single weights that are ranked, ascending, and their number. */
static float *sorted_magnitudes(spm_model *model, int64_t *n)
{
    int i, count = spm_model_parameter_count(model);
    int64_t j, at = 0;
    float *sorted;
    for (*n = 0, i = 0; i < count; i++)
        *n += ranked(spm_model_parameter(model, i)) ? spm_tensor_count(&spm_model_parameter(model, i)->value) : 0;
    sorted = (float *)malloc((size_t)*n * sizeof *sorted);
    for (i = 0; i < count; i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        for (j = 0; ranked(p) && j < spm_tensor_count(&p->value); j++) sorted[at++] = fabsf(p->value.data[j]);
    }
    qsort(sorted, (size_t)*n, sizeof *sorted, float_order);
    return sorted;
}

/* The rule of METHOD 2.4, sound and with quirk Q4, against a model changed here. */
static void single_weights(void)
{
    static const double fractions[4] = { 0.0, 0.003, 0.25, 1.0 };
    bench b = bench_open("resnet18:width=2,stem=cifar", 2);
    int variant, i, count = spm_model_parameter_count(b.model);
    float **all = save_all(b.model), *sorted;
    int64_t n = 0, j;
    spm_parameter *tie = spm_model_parameter(b.model, spm_model_find_parameter(b.model, "layer1.1.conv2.weight"));
    for (j = 0; j < 20; j++) tie->value.data[j] = 1e-3f; /* ties at the threshold */
    restore_all(b.model, all, 1);
    all = save_all(b.model);
    sorted = sorted_magnitudes(b.model, &n);
    for (variant = 0; variant < 16; variant++) {
        double fraction = fractions[variant / 4];
        int smallest = variant & 1, q4 = (variant >> 1) & 1;
        int64_t k = (int64_t)ceil(fraction * (double)n), changed = 0;
        float t = smallest ? sorted[q4 ? (k < n - 1 ? k : n - 1) : k ? k - 1 : 0] : k ? sorted[n - (q4 && k > n - 1 ? n - 1 : k)] : 0.0f;
        spm_localize_desc desc = weight_study(&b, fraction, smallest, q4 ? SPM_QUIRK(4) : 0);
        spm_json_value *root = study(&b, &desc);
        const spm_json_value *row = spm_json_at(spm_json_get(root, "results"), 0);
        spm_eval eval;
        for (i = 0; i < count; i++) {
            spm_parameter *p = spm_model_parameter(b.model, i);
            int in = q4 ? !(p->flags & SPM_PARAMETER_BUFFER) : ranked(p);
            for (j = 0; in && j < spm_tensor_count(&p->value); j++) {
                float w = fabsf(p->value.data[j]);
                int chosen = q4 && !smallest && k == 0 ? 1 : !q4 && k == 0 ? 0 : smallest ? w <= t : w >= t;
                if (!chosen) continue;
                if (!q4 && changed == k) continue; /* ties: the first in the order of the parameters */
                changed++;
                p->value.data[j] = 0.0f;
            }
        }
        spm_model_touch(b.model);
        CHECK_INT(spm_json_as_int(spm_json_get(row, "changed"), -1), changed);
        if (!q4) CHECK_INT(changed, k);
        CHECK_STR(spm_json_as_string(spm_json_get(row, "order"), ""), smallest ? "smallest" : "largest");
        eval = evaluated(&b, SPM_TEST);
        check_groups(spm_json_get(spm_json_get(row, "splits"), "test"), &eval);
        spm_eval_free(b.ctx, &eval);
        spm_json_free(b.ctx, root);
        restore_all(b.model, all, 0);
    }
    {
        spm_localize_desc desc = weight_study(&b, 0.5, 1, 0);
        spm_json_value *root;
        double share;
        desc.dropout_p = 0.8;
        root = study(&b, &desc);
        CHECK_INT(spm_json_length(spm_json_get(root, "results")), 4); /* random: 3 repeats and their mean */
        share = (double)spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(root, "results"), 1), "changed"), 0) / (0.5 * (double)n);
        CHECK_NEAR(share, 0.2, 5.0 * sqrt(0.16 / (0.5 * (double)n)));
        CHECK_INT(spm_json_length(spm_json_get(spm_json_get(spm_json_at(spm_json_get(root, "results"), 3), "accuracy_sd"), "test")), 4);
        spm_json_free(b.ctx, root);
        desc.modify = SPM_MODIFY_ZERO_UNIT;
        check_refused(&b, &desc, "zero-unit", "single weight");
        desc.modify = SPM_MODIFY_ZERO;
        desc.fraction[0] = 1.5;
        check_refused(&b, &desc, "fraction 1.5", "0 to 1");
        desc = usual_study(&b);
        desc.unit = SPM_UNIT_HEAD;
        check_refused(&b, &desc, "attention heads", "--unit");
    }
    free(sorted);
    restore_all(b.model, all, 1);
    bench_close(&b);
}

/* Controls of single weights: as many others of every parameter, each selected one's nearest in magnitude that is left. */
static void controls_of_single_weights(void)
{
    enum { WANTED = 3 };
    bench b = bench_open("resnet18:width=2,stem=cifar", 2);
    spm_localize_desc desc = weight_study(&b, 0.01, 1, 0);
    int count = spm_model_parameter_count(b.model), i, c, g;
    float **all = save_all(b.model), *sorted, t;
    int64_t n = 0, j, k, m, chosen = 0;
    double gap = 0.0, drops[WANTED][4];
    spm_json_value *root;
    const spm_json_value *row, *controls;
    spm_eval before;
    char **used = (char **)calloc((size_t)count, sizeof *used);
    sorted = sorted_magnitudes(b.model, &n);
    t = sorted[(int64_t)ceil(0.01 * (double)n) - 1];
    before = evaluated(&b, SPM_TEST);
    for (c = 0; c < WANTED; c++) {
        spm_eval after;
        for (i = 0; i < count; i++) { /* from the smallest selected weight up, each takes the smallest unused one above */
            spm_parameter *p = spm_model_parameter(b.model, i);
            int64_t size = spm_tensor_count(&p->value), picks = 0;
            if (!ranked(p)) continue;
            if (!used[i]) used[i] = (char *)calloc((size_t)size, 1);
            for (j = 0; j < size; j++) picks += fabsf(all[i][j]) <= t;
            if (c == 0) chosen += picks;
            for (m = 0; m < picks; m++) {
                float mine = 0.0f, last_mine = -1.0f;
                for (k = 0; k <= m; k++) { /* the m-th smallest selected one */
                    for (j = 0, mine = 1e9f; j < size; j++) {
                        if (fabsf(all[i][j]) <= t && fabsf(all[i][j]) > last_mine && fabsf(all[i][j]) < mine) mine = fabsf(all[i][j]);
                    }
                    last_mine = mine;
                }
                for (j = 0, k = -1; j < size; j++) {
                    if (used[i][j] || fabsf(all[i][j]) <= t) continue;
                    if (k < 0 || fabsf(all[i][j]) < fabsf(all[i][k])) k = j;
                }
                CHECK(k >= 0);
                if (k < 0) continue;
                used[i][k] = 1;
                p->value.data[k] = 0.0f;
                gap += (double)fabsf(all[i][k]) - (double)mine;
            }
        }
        spm_model_touch(b.model);
        after = evaluated(&b, SPM_TEST);
        for (g = 0; g < 4; g++) drops[c][g] = before.groups[g].accuracy - after.groups[g].accuracy;
        spm_eval_free(b.ctx, &after);
        restore_all(b.model, all, 0);
    }
    desc.controls = WANTED;
    root = study(&b, &desc);
    row = spm_json_at(spm_json_get(root, "results"), 0);
    controls = spm_json_get(row, "controls");
    CHECK_INT(spm_json_as_int(spm_json_get(row, "changed"), -1), chosen);
    CHECK_INT(spm_json_length(controls), 8);
    for (j = 0; j < spm_json_length(controls); j++) {
        const spm_json_value *entry = spm_json_at(controls, j), *list = spm_json_get(entry, "drops");
        if (strcmp(spm_json_as_string(spm_json_get(entry, "split"), ""), "test") != 0) continue;
        g = (int)spm_json_as_int(spm_json_get(entry, "group"), 0);
        CHECK_INT(spm_json_length(list), WANTED);
        for (c = 0; c < WANTED; c++) CHECK_NEAR(spm_json_as_number(spm_json_at(list, c), -9.0), drops[c][g], 1e-9);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "mean_norm_gap"), -1.0), gap / (double)(WANTED * chosen), 1e-7);
    }
    spm_json_free(b.ctx, root);
    desc.fraction[0] = 0.6; /* fewer are left than there are selected ones */
    root = study(&b, &desc);
    CHECK_INT(spm_json_length(spm_json_get(spm_json_at(spm_json_get(root, "results"), 0), "controls")), 0);
    spm_json_free(b.ctx, root);
    spm_eval_free(b.ctx, &before);
    for (i = 0; i < count; i++) free(used[i]);
    free(used);
    free(sorted);
    restore_all(b.model, all, 1);
    bench_close(&b);
}

/* Quirk Q6: noise on single weights is uniform, so a tiny network's weights never fall by it. */
static void uniform_noise(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_unit unit = SPM_ZERO;
    spm_change change = SPM_ZERO;
    spm_parameter *p;
    int64_t i;
    float *before;
    double sum = 0.0;
    unit.parameter = spm_model_find_parameter(b.model, "layer3.0.conv1.weight");
    p = spm_model_parameter(b.model, unit.parameter);
    before = copy_of(b.model, unit.parameter);
    change.modify = SPM_MODIFY_NOISE;
    change.std = 0.5;
    change.uniform = 1;
    CHECK_INT(spm_modify_units(b.model, &unit, 1, &change, NULL), SPM_OK);
    for (i = 0; i < row_size(p); i++) {
        CHECK(p->value.data[i] >= before[i] && p->value.data[i] <= before[i] + 0.5f);
        sum += (double)(p->value.data[i] - before[i]);
    }
    CHECK_NEAR(sum / (double)row_size(p), 0.25, 0.05);
    free(before);
    bench_close(&b);
}

/* ---- mean ---- */

/* After the change the unit puts out one constant: the mean of what it put out over the training split. */
static void mean_output(void)
{
    static const char names[3][32] = { "layer1.0.conv1.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight" };
    int k;
    for (k = 0; k < 3; k++) {
        bench b = bench_open(k ? "vit:patch=4,dim=16,depth=1,heads=2" : TINY_ARCH, 1);
        const spm_program *program = spm_model_program(b.model);
        spm_unit unit = SPM_ZERO;
        spm_change change = SPM_ZERO;
        double *means = NULL, sum = 0.0;
        const spm_parameter *p;
        spm_run *run = spm_run_create(b.model, NULL, NULL);
        static float pixels[TINY_SIZE * TINY_SIZE * 3];
        int64_t i, j, cells = 0, channels, n = spm_dataset_split_size(b.set, SPM_TRAIN);
        spm_value value;
        int pass, op_index;
        unit.parameter = spm_model_find_parameter(b.model, names[k]);
        unit.channel = 1;
        unit.kind = k == 2 ? SPM_UNIT_HEAD : SPM_UNIT_CHANNEL;
        p = spm_model_parameter(b.model, unit.parameter);
        value = k == 0 ? p->norm_output : p->output;
        for (op_index = 0; k == 2 && op_index < spm_program_op_count(program); op_index++) {
            spm_op op;
            spm_value out = spm_program_op_at(program, op_index, &op, NULL, NULL);
            if (op == SPM_OP_ATTENTION) value = out;
        }
        if (k == 0) spm_model_parameter(b.model, p->norm_bias)->value.data[1] = 9.0f; /* so that the ReLU does nothing */
        spm_model_touch(b.model);
        CHECK_INT(spm_unit_means(b.model, b.set, &b.reading, SPM_TRAIN, 1, &means, NULL), SPM_OK);
        CHECK(spm_run_keep(run, value) == SPM_OK);
        for (pass = 0; pass < 2; pass++) {
            for (i = 0; i < n; i++) {
                spm_tensor out;
                tiny_pixels(b.set, &b.reading, spm_dataset_split_ids(b.set, SPM_TRAIN)[i], pixels);
                (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
                CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
                out = spm_run_tensor(run, value);
                channels = out.shape[out.rank - 1];
                for (j = 0; j < spm_tensor_count(&out) / channels; j++) {
                    double v = (double)out.data[j * channels + (k == 2 ? 8 + 3 : 1)]; /* of head 1: its dimension 3 */
                    if (pass) CHECK_NEAR(v, sum, 1e-4);
                    else sum += v;
                    cells += !pass;
                }
            }
            if (pass) break;
            sum /= (double)cells;
            change.modify = SPM_MODIFY_MEAN;
            CHECK_INT(spm_modify_units(b.model, &unit, 1, &change, &last), SPM_E_ARGUMENT); /* no means given */
            change.means = means;
            CHECK_INT(spm_modify_units(b.model, &unit, 1, &change, NULL), SPM_OK);
        }
        spm_run_destroy(run);
        spm_free(b.ctx, means);
        bench_close(&b);
    }
}

/* An allocator that finds out who writes behind what was asked for. */
#define FENCE 1024

static int broken_fences;

static void *fenced_alloc(void *user, size_t bytes)
{
    unsigned char *memory = (unsigned char *)malloc(64 + bytes + FENCE);
    (void)user;
    if (!memory) return NULL;
    memcpy(memory, &bytes, sizeof bytes);
    memset(memory + 64 + bytes, 0x5a, FENCE);
    return memory + 64;
}

static void fenced_free(void *user, void *pointer)
{
    unsigned char *memory = (unsigned char *)pointer;
    size_t bytes, i;
    int whole = 1;
    (void)user;
    if (!memory) return;
    memcpy(&bytes, memory - 64, sizeof bytes);
    for (i = 0; i < FENCE; i++) whole &= memory[bytes + i] == 0x5a;
    broken_fences += !whole;
    free(memory - 64);
}

/* A recorded program whose last parameter is ranked, without a norm, a bias or a head: the means are its raw outputs'. */
static void mean_output_of_a_recorded_program(void)
{
    static const int64_t image[4] = { 0, TINY_SIZE, TINY_SIZE, 3 }, first[4] = { 8, 3, 3, 3 }, second[4] = { 64, 3, 3, 8 };
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    spm_context_desc fenced = SPM_ZERO;
    tiny_counts counts = tiny_usual();
    spm_program *program;
    spm_value x, outer, inner;
    spm_reading reading = tiny_reading();
    spm_unit unit = SPM_ZERO;
    spm_change change = SPM_ZERO;
    spm_model *model;
    spm_run *run;
    double *means = NULL, sum[64] = { 0 };
    int64_t n, i, j, c, cells = 0;
    bench b = SPM_ZERO;
    fenced.threads = 1;
    fenced.alloc = fenced_alloc;
    fenced.free = fenced_free;
    broken_fences = 0;
    memset(&last, 0, sizeof last);
    b.ctx = spm_context_create(&fenced);
    b.set = tiny_data(b.ctx, "set", &counts);
    program = spm_program_create(b.ctx);
    x = spm_program_input(program, "image", 4, image, 0);
    inner = spm_conv2d(program, x, spm_program_parameter(program, "first", 4, first, SPM_INIT_HE_FAN_OUT, SPM_PARAMETER_PRUNABLE), 0, 2, 1, 1, 1);
    outer = spm_conv2d(program, spm_relu(program, inner), spm_program_parameter(program, "second", 4, second, SPM_INIT_HE_FAN_OUT, SPM_PARAMETER_PRUNABLE), 0, 2, 1, 1, 1);
    x = spm_global_pool(program, outer);
    spm_program_output(program, "logits", x);
    spm_program_output(program, "outputs", x);
    model = b.model = spm_model_create(program, 1, &last);
    CHECK_STR(last.text, "");
    CHECK_INT(spm_unit_means(model, b.set, &reading, SPM_TRAIN, 1, &means, &last), SPM_OK);
    CHECK_STR(last.text, "");
    run = spm_run_create(model, NULL, NULL);
    CHECK(spm_run_keep(run, outer) == SPM_OK);
    n = spm_dataset_split_size(b.set, SPM_TRAIN);
    for (i = 0; i < n; i++) {
        spm_tensor out;
        tiny_pixels(b.set, &reading, spm_dataset_split_ids(b.set, SPM_TRAIN)[i], pixels);
        (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
        CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
        out = spm_run_tensor(run, outer);
        cells += spm_tensor_count(&out) / 64;
        for (j = 0; j < spm_tensor_count(&out); j++) sum[j % 64] += (double)out.data[j];
    }
    for (c = 0; means && c < 64; c++) CHECK_NEAR(means[8 + c], sum[c] / (double)cells, 1e-5);
    unit.parameter = 1;
    unit.channel = 63;
    change.modify = SPM_MODIFY_MEAN;
    change.means = means;
    CHECK_INT(spm_modify_units(model, &unit, 1, &change, &last), SPM_E_UNSUPPORTED); /* there is no bias to hold it */
    CHECK(strstr(last.text, "second: ") != NULL);
    spm_free(b.ctx, means);
    CHECK_INT(broken_fences, 0);
    spm_run_destroy(run);
    bench_close(&b);
    CHECK_INT(broken_fences, 0);
}

/* ---- the exhaustive scan ---- */

static double scan_part(const spm_json_value *root, int64_t u, const char *what, const char *split, int g)
{
    const spm_json_value *unit = spm_json_at(spm_json_get(spm_json_get(root, "scan"), "units"), u);
    return spm_json_as_number(spm_json_at(spm_json_get(spm_json_get(unit, what), split), g), -9.0);
}

static double scan_drop(const spm_json_value *root, int64_t u, const char *split, int g)
{
    return scan_part(root, u, "drop", split, g);
}

/* Every unit's removal: resumed gives the bits of plain, fast the same predictions; and some of them are worked out by
 * changing the model here. */
static void exhaustive_scan(void)
{
    static const char archs[4][48] = { "resnet18:width=2,stem=cifar", "vit:patch=8,dim=8,depth=1,heads=2,mlp=2", "resnet20:width=2", "resnet50:width=2,stem=cifar" };
    int net, way;
    for (net = 0; net < 4; net++) {
        bench b = bench_open(archs[net], net == 1 ? 1 : 2);
        spm_localize_desc desc = usual_study(&b);
        spm_json_value *root[3];
        float **all = save_all(b.model);
        int64_t units, u, k, lost = 0, unchanged;
        int g;
        desc.criterion = SPM_CRITERION_EXHAUSTIVE;
        desc.top[0] = 1;
        desc.n_top = 1;
        desc.batch = 7;
        for (way = 0; way < (net == 3 ? 2 : 3); way++) {
            desc.scan_plain = way;
            root[way] = study(&b, &desc);
        }
        if (net == 3) root[2] = NULL;
        units = spm_json_length(spm_json_get(spm_json_get(root[0], "scan"), "units"));
        unchanged = spm_json_as_int(spm_json_get(spm_json_get(root[0], "scan"), "unchanged"), -1);
        CHECK(net == 1 || unchanged > 0);
        CHECK(spm_json_as_int(spm_json_get(spm_json_get(root[0], "scan"), "forwards"), 1 << 30) < spm_json_as_int(spm_json_get(spm_json_get(root[1], "scan"), "forwards"), 0) || net == 1);
        for (u = 0; u < units; u++) {
            for (g = 0; g < 4; g++) {
                for (way = 1; way < (root[2] ? 3 : 2); way++) {
                    CHECK_NEAR(scan_drop(root[0], u, "train", g), scan_drop(root[way], u, "train", g), 0.0);
                    CHECK_NEAR(scan_drop(root[0], u, "test", g), scan_drop(root[way], u, "test", g), 0.0);
                    CHECK_NEAR(scan_part(root[0], u, "loss_rise", "test", g), scan_part(root[way], u, "loss_rise", "test", g), 2e-5);
                }
                if (root[2]) CHECK_NEAR(scan_part(root[1], u, "loss_rise", "train", g), scan_part(root[2], u, "loss_rise", "train", g), 0.0);
                lost += fabs(scan_part(root[0], u, "loss_rise", "test", g)) > 1e-3;
            }
        }
        CHECK(lost > units / 4);
        for (k = 0; k < 6; k++) {
            const spm_json_value *entry;
            spm_unit unit = SPM_ZERO;
            spm_eval before = evaluated(&b, SPM_TEST), after;
            u = (units * (2 * k + 1)) / 12;
            entry = spm_json_at(spm_json_get(spm_json_get(root[0], "scan"), "units"), u);
            unit.parameter = spm_model_find_parameter(b.model, spm_json_as_string(spm_json_get(entry, "parameter"), ""));
            unit.channel = spm_json_as_int(spm_json_get(entry, "channel"), -1);
            (void)modify_units(b.model, &unit, 1, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL);
            after = evaluated(&b, SPM_TEST);
            for (g = 0; g < 4; g++) CHECK_NEAR(scan_drop(root[0], u, "test", g), before.groups[g].accuracy - after.groups[g].accuracy, 1e-8);
            spm_eval_free(b.ctx, &before);
            spm_eval_free(b.ctx, &after);
            restore_all(b.model, all, 0);
        }
        for (g = 0; g < 4; g++) { /* the ranking of a group is by its drop on the selection split */
            spm_unit first = unit_at(&b, root[0], g, 0);
            double best = -9.0;
            for (u = 0; u < units; u++) best = scan_drop(root[0], u, "train", g) > best ? scan_drop(root[0], u, "train", g) : best;
            CHECK_NEAR(first.score, best, 1e-6);
        }
        for (way = 0; way < 3; way++) spm_json_free(b.ctx, root[way]);
        if (net == 0) {
            const spm_json_value *screening;
            desc.scan_plain = 0;
            desc.screen = 0.5;
            root[0] = study(&b, &desc);
            screening = spm_json_get(spm_json_get(root[0], "scan"), "screening");
            CHECK_INT(spm_json_as_int(spm_json_get(screening, "left_out"), -1), units / 2);
            CHECK(spm_json_as_int(spm_json_get(screening, "checked"), 0) > units / 40);
            CHECK_INT(spm_json_length(spm_json_get(spm_json_get(root[0], "scan"), "units")), units - units / 2 + spm_json_as_int(spm_json_get(screening, "checked"), 0));
            CHECK(spm_json_as_int(spm_json_get(screening, "missed"), -1) >= 0);
            spm_json_free(b.ctx, root[0]);
            desc.screen = 0.0;
            desc.unit = SPM_UNIT_WEIGHT;
            desc.modify = SPM_MODIFY_ZERO;
            check_refused(&b, &desc, "exhaustive", "--unit");
        }
        restore_all(b.model, all, 1);
        bench_close(&b);
    }
}

/* Under bf16 rank-1 updates would be another network's: the fast way resumes there, and says so. */
static void exhaustive_scan_in_bf16(void)
{
    spm_context_desc half = SPM_ZERO;
    spm_json_value *root[3];
    tiny_counts counts = tiny_usual();
    int64_t u, units;
    int way, g;
    spm_localize_desc desc;
    bench b = SPM_ZERO;
    b.reading = tiny_reading();
    desc = usual_study(&b);
    half.threads = 1;
    half.precision = SPM_PRECISION_BF16;
    b.ctx = spm_context_create(&half);
    b.set = tiny_data(b.ctx, "set", &counts);
    b.model = tiny_model(b.ctx, "resnet20:width=2", 11);
    desc.criterion = SPM_CRITERION_EXHAUSTIVE;
    desc.top[0] = 1;
    desc.n_top = 1;
    for (way = 0; way < 3; way++) {
        desc.scan_plain = way;
        root[way] = study(&b, &desc);
        CHECK_STR(spm_json_as_string(spm_json_get(spm_json_get(root[way], "scan"), "way"), ""), way == 2 ? "plain" : "resumed");
    }
    units = spm_json_length(spm_json_get(spm_json_get(root[0], "scan"), "units"));
    CHECK(units > 0);
    for (u = 0; u < units; u++) {
        for (g = 0; g < 4; g++) {
            for (way = 1; way < 3; way++) {
                CHECK_NEAR(scan_drop(root[0], u, "test", g), scan_drop(root[way], u, "test", g), 0.0);
                CHECK_NEAR(scan_part(root[0], u, "loss_rise", "train", g), scan_part(root[way], u, "loss_rise", "train", g), 0.0);
            }
        }
    }
    for (way = 0; way < 3; way++) spm_json_free(b.ctx, root[way]);
    bench_close(&b);
}

/* ---- paired tests and the memory index ---- */

static void paired_rows(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_localize_desc desc = usual_study(&b);
    spm_json_value *root = study(&b, &desc);
    const spm_json_value *row = spm_json_at(spm_json_get(root, "results"), 2), *paired = spm_json_get(row, "paired"), *index = spm_json_get(row, "memory_index");
    float **all = save_all(b.model);
    spm_eval before[3], after[3];
    spm_unit units[3];
    double low, high;
    spm_paired total[3][6];
    int64_t i;
    int s, u;
    for (u = 0; u < 3; u++) units[u] = unit_at(&b, root, 0, u);
    for (s = 0; s < 3; s++) before[s] = evaluated(&b, (spm_split)s);
    (void)modify_units(b.model, units, 3, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL);
    memset(total, 0, sizeof total);
    for (s = 0; s < 3; s++) {
        after[s] = evaluated(&b, (spm_split)s);
        for (i = 0; i < before[s].count; i++) {
            int g = before[s].group[i], k, was = before[s].predicted[i] == before[s].y[i], is = after[s].predicted[i] == after[s].y[i];
            for (k = 0; k < 2; k++) {
                spm_paired *cell = &total[s][k ? (g == 1 || g == 2 ? 4 : 5) : g]; /* groups 1 and 2 are the minority */
                cell->n++;
                cell->lost += was && !is;
                cell->gained += !was && is;
            }
        }
    }
    CHECK_INT(spm_json_length(paired), 8);
    for (i = 0; i < 8; i++) {
        const spm_json_value *entry = spm_json_at(paired, i);
        const spm_paired *cell = &total[i < 4 ? 0 : 2][i % 4];
        CHECK_INT(spm_json_as_int(spm_json_get(entry, "lost"), -1), cell->lost);
        CHECK_INT(spm_json_as_int(spm_json_get(entry, "gained"), -1), cell->gained);
        CHECK_NEAR(spm_json_as_number(spm_json_get(entry, "p_value"), -1), spm_mcnemar(cell->lost, cell->gained), 1e-8);
    }
    CHECK_NEAR(spm_json_as_number(spm_json_get(index, "index"), -9), spm_memory_index(&total[0][4], &total[2][4], &total[0][5], &low, &high), 1e-8);
    CHECK_NEAR(spm_json_as_number(spm_json_at(spm_json_get(index, "ci95"), 0), -9), low, 1e-8);
    CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(index, "groups"), 2), "index"), -9), spm_memory_index(&total[0][2], &total[2][2], &total[0][5], &low, &high), 1e-8);
    CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(index, "groups"), 3), "index"), -9), spm_memory_index(&total[0][3], &total[2][3], &total[0][0], &low, &high), 1e-8);
    for (s = 0; s < 3; s++) {
        spm_eval_free(b.ctx, &before[s]);
        spm_eval_free(b.ctx, &after[s]);
    }
    restore_all(b.model, all, 1);
    spm_json_free(b.ctx, root);
    bench_close(&b);
}

/* ---- the grid ---- */

static void paper_grid(void)
{
    bench b = bench_open("resnet18:width=2,stem=cifar", 2);
    spm_localize_desc desc = usual_study(&b);
    spm_model *earlier = tiny_model(b.ctx, "resnet18:width=2,stem=cifar", 99);
    spm_checkpoint_info info = SPM_ZERO;
    char file[900];
    spm_json_value *root;
    const spm_json_value *results;
    int64_t i, zero = 0, noise = 0, reinit = 0, rewind = 0, weights = 0, shares = 0;
    snprintf(file, sizeof file, "%s", tiny_path("earlier2.safetensors", ""));
    info.arch = tiny_arch(b.ctx, "resnet18:width=2,stem=cifar");
    info.transform = b.reading.transform;
    CHECK(spm_checkpoint_save(earlier, file, &info, NULL) == SPM_OK);
    desc.grid = 1;
    desc.repeats = 1;
    desc.rewind_file[0] = file;
    desc.rewind_file[1] = file;
    root = study(&b, &desc);
    results = spm_json_get(root, "results");
    for (i = 0; i < spm_json_length(results); i++) {
        const spm_json_value *row = spm_json_at(results, i);
        const char *modify = spm_json_as_string(spm_json_get(row, "modify"), "");
        int weight = spm_json_get(row, "fraction") != NULL, magnitude = strcmp(spm_json_as_string(spm_json_get(row, "criterion"), ""), "magnitude") == 0;
        weights += weight;
        shares += weight && spm_json_as_number(spm_json_get(row, "fraction"), 0.0) > 0.01;
        if (weight || !magnitude) continue;
        zero += strcmp(modify, "zero-unit") == 0;
        noise += strcmp(modify, "noise") == 0;
        reinit += strcmp(modify, "reinit") == 0;
        rewind += strcmp(modify, "rewind") == 0;
    }
    CHECK_INT(spm_json_length(spm_json_get(root, "rankings")), 4 + 1 + 1);
    CHECK_INT(zero, 10);
    CHECK_INT(noise, 3 * 3);
    CHECK_INT(reinit, 3 * 5); /* .005 .01 .02 and .15 .1 */
    CHECK_INT(rewind, 3 * 2);
    CHECK_INT(weights, 3 * (1 + 3 + 3 + 2) + 8);
    CHECK_INT(shares, 8);
    CHECK_INT(spm_json_length(results), 4 * (10 + 9 + 9 + 6) + 10 + 9 + 15 + 6 + weights);
    spm_json_free(b.ctx, root);
    spm_model_destroy(earlier);
    bench_close(&b);
}

/* ---- layers ---- */

/* Rewound: the layer of the earlier model in this one; re-trained: the majority's training loss comes down again. */
static void layers(void)
{
    bench b = bench_open("resnet18:width=2,stem=cifar", 2);
    spm_localize_desc desc = usual_study(&b);
    spm_model *earlier = tiny_model(b.ctx, "resnet18:width=2,stem=cifar", 99);
    spm_checkpoint_info info = SPM_ZERO;
    char file[900], *first, *second;
    spm_json_value *root;
    const spm_json_value *list;
    float **all = save_all(b.model);
    double before = 0.0, after = 0.0;
    int64_t i;
    snprintf(file, sizeof file, "%s", tiny_path("earlier3.safetensors", ""));
    info.arch = tiny_arch(b.ctx, "resnet18:width=2,stem=cifar");
    info.transform = b.reading.transform;
    CHECK(spm_checkpoint_save(earlier, file, &info, NULL) == SPM_OK);
    desc.layers = 1;
    check_refused(&b, &desc, "--rewind", "layers");
    desc.rewind_file[0] = file;
    desc.retrain_epochs = 8;
    first = study_text(&b, &desc);
    second = study_text(&b, &desc);
    CHECK(first && second && strcmp(first, second) == 0);
    root = first ? spm_json_parse(b.ctx, "layers", first, strlen(first), NULL) : NULL;
    list = spm_json_get(root, "layers");
    CHECK_INT(spm_json_length(list), 20);
    for (i = 0; i < spm_json_length(list); i++) {
        const spm_json_value *layer = spm_json_at(list, i), *rewound = spm_json_get(spm_json_get(layer, "rewound"), "splits"), *again = spm_json_get(spm_json_get(layer, "retrained"), "splits");
        int p = spm_model_find_parameter(b.model, spm_json_as_string(spm_json_get(layer, "parameter"), "")), g;
        spm_parameter *q = spm_model_parameter(b.model, p);
        spm_eval eval;
        for (g = 0; g < 4; g += 3) {
            before += spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(rewound, "train"), g), "loss"), 0.0);
            after += spm_json_as_number(spm_json_get(spm_json_at(spm_json_get(again, "train"), g), "loss"), 1e9);
        }
        if (i % 6) continue;
        memcpy(q->value.data, spm_model_parameter(earlier, p)->value.data, (size_t)spm_tensor_count(&q->value) * sizeof(float));
        spm_model_touch(b.model);
        eval = evaluated(&b, SPM_TEST);
        check_groups(spm_json_get(rewound, "test"), &eval);
        spm_eval_free(b.ctx, &eval);
        restore_all(b.model, all, 0);
    }
    CHECK(after < before);
    free(first);
    free(second);
    spm_json_free(b.ctx, root);
    restore_all(b.model, all, 1);
    spm_model_destroy(earlier);
    bench_close(&b);
}

int main(void)
{
    tiny_begin("test_local");
    TEST(gradient_ranking);
    TEST(gradient_ranking_variants);
    TEST(magnitude_ranking);
    TEST(random_ranking);
    TEST(ranking_failures);
    TEST(modifications);
    TEST(unit_outputs);
    TEST(rows_are_what_they_say);
    TEST(prefix_and_threads);
    TEST(every_modification);
    TEST(means_of_an_empty_group);
    TEST(every_row_is_there);
    TEST(controls_of_one_unit);
    TEST(controls_are_distinct);
    TEST(number_of_controls);
    TEST(controls_of_single_weights);
    TEST(rules_and_sentences);
    TEST(single_weights);
    TEST(uniform_noise);
    TEST(mean_output);
    TEST(mean_output_of_a_recorded_program);
    TEST(exhaustive_scan);
    TEST(exhaustive_scan_in_bf16);
    TEST(paired_rows);
    TEST(paper_grid);
    TEST(layers);
    return TEST_END;
}
