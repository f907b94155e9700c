/* Section ATTR: every criterion against its definition worked out here (central differences, plain sums, exact Shapley
 * values of two heads), completeness of the line integrals, Grad-CAM and attention rollout against their formulas. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include "bench.h"

#define VIT "vit:patch=4,dim=16,depth=2,heads=2,mlp=2"

static spm_unit *rank(bench *b, spm_criterion criterion, spm_unit_kind kind, int group, spm_attr_report *report, int64_t *count)
{
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    int64_t used = 0;
    uint64_t before = model_hash(b->model);
    desc.reading = b->reading;
    desc.criterion = criterion;
    desc.kind = kind;
    desc.group = group;
    desc.report = report;
    desc.steps = report ? (int64_t)report->loss : 0; /* tests hand the number of steps in here */
    desc.permutations = report ? report->permutations : 0;
    desc.truncation = 1e-12;
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_rank_units(b->model, b->set, &desc, NULL, &units, count, &used, &last), SPM_OK);
    CHECK_STR(last.text, "");
    CHECK(model_hash(b->model) == before);
    return units;
}

static const spm_unit *find(const spm_unit *units, int64_t count, int parameter, int64_t channel)
{
    int64_t u;
    for (u = 0; units && u < count; u++) {
        if (units[u].parameter == parameter && units[u].channel == channel) return &units[u];
    }
    CHECK_MSG(0, "a unit is missing from the ranking");
    return units;
}

/* Mean cross-entropy, or mean probability of the true class, of a group's training examples. */
static double measure(bench *b, int group, int probability)
{
    spm_eval_desc desc = SPM_ZERO;
    spm_eval eval;
    double sum = 0.0;
    int64_t i, n = 0;
    desc.reading = b->reading;
    spm_model_touch(b->model);
    CHECK_INT(spm_evaluate(b->model, b->set, &desc, &eval, NULL), SPM_OK);
    for (i = 0; i < eval.count; i++) {
        if (group >= 0 && eval.group[i] != group) continue;
        sum += (double)(probability ? eval.probability[i * 2 + eval.y[i]] : eval.example_loss[i]);
        n++;
    }
    spm_eval_free(b->ctx, &eval);
    return sum / (double)n;
}

/* z of a unit scaled by `factor`: gamma and beta of its norm, or row and bias. */
static void scale_channel(bench *b, int parameter, int64_t channel, float factor)
{
    spm_parameter *p = spm_model_parameter(b->model, parameter);
    int64_t i;
    if (p->norm_weight >= 0) {
        spm_model_parameter(b->model, p->norm_weight)->value.data[channel] *= factor;
        spm_model_parameter(b->model, p->norm_bias)->value.data[channel] *= factor;
        return;
    }
    for (i = 0; i < row_size(p); i++) p->value.data[channel * row_size(p) + i] *= factor;
    if (p->bias >= 0) spm_model_parameter(b->model, p->bias)->value.data[channel] *= factor;
}

/* sum of z dL/dz = dL/d(factor on z) at 1, by central differences. */
static void check_effect(bench *b, const spm_unit *units, int64_t count, const char *name, int64_t first, int64_t channels, int64_t unit)
{
    int parameter = spm_model_find_parameter(b->model, name), side;
    double loss[2], expected;
    int64_t c;
    const spm_unit *u = find(units, count, parameter, unit);
    for (side = 0; side < 2; side++) {
        float factor = side ? 1.002f : 0.998f;
        for (c = 0; c < channels; c++) scale_channel(b, parameter, first + c, factor);
        loss[side] = measure(b, 1, 0);
        for (c = 0; c < channels; c++) scale_channel(b, parameter, first + c, 1.0f / factor);
    }
    expected = fabs(loss[1] - loss[0]) / 0.004;
    CHECK_NEAR(u->score, expected, 0.02 * expected + 3e-4);
}

static void activation_gradient(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    int64_t count = 0, c;
    spm_unit *units = rank(&b, SPM_CRITERION_ACTIVATION_GRADIENT, SPM_UNIT_CHANNEL, 1, NULL, &count);
    for (c = 0; c < 3; c++) {
        check_effect(&b, units, count, "conv1.weight", c, 1, c);
        check_effect(&b, units, count, "layer1.0.conv2.weight", c, 1, c);
        check_effect(&b, units, count, "layer2.0.downsample.0.weight", c, 1, c);
    }
    spm_free(b.ctx, units);
    bench_close(&b);
    b = bench_open(VIT, 1);
    units = rank(&b, SPM_CRITERION_ACTIVATION_GRADIENT, SPM_UNIT_CHANNEL, 1, NULL, &count);
    CHECK_INT(count, 2 * (48 + 16 + 32 + 16));
    check_effect(&b, units, count, "blocks.0.mlp.fc1.weight", 3, 1, 3);
    check_effect(&b, units, count, "blocks.1.attn.proj.weight", 5, 1, 5);
    spm_free(b.ctx, units);
    units = rank(&b, SPM_CRITERION_ACTIVATION_GRADIENT, SPM_UNIT_HEAD, 1, NULL, &count);
    CHECK_INT(count, 4);
    check_effect(&b, units, count, "blocks.0.attn.qkv.weight", 32, 8, 0); /* head 0: value rows 32..39 */
    check_effect(&b, units, count, "blocks.1.attn.qkv.weight", 40, 8, 1);
    spm_free(b.ctx, units);
    bench_close(&b);
}

/* Root mean square of z, from the stored output of one convolution and of one linear layer. */
static void activation(void)
{
    static const char names[2][32] = { "layer2.0.conv1.weight", "blocks.1.mlp.fc1.weight" };
    int net, k;
    for (net = 0; net < 2; net++) {
        bench b = bench_open(net ? VIT : TINY_ARCH, 1);
        int64_t count = 0, i, positions = 0, seen = 0, channel = 4;
        int parameter = spm_model_find_parameter(b.model, names[net]);
        const spm_parameter *p = spm_model_parameter(b.model, parameter);
        spm_unit *units = rank(&b, SPM_CRITERION_ACTIVATION, SPM_UNIT_CHANNEL, 2, NULL, &count);
        spm_run *run = spm_run_create(b.model, NULL, NULL);
        static float pixels[TINY_SIZE * TINY_SIZE * 3];
        double sum = 0.0, scale = 1.0, shift = 0.0;
        if (p->norm_weight >= 0) {
            double mean = (double)spm_model_parameter(b.model, p->norm_bias + 1)->value.data[channel];
            double var = (double)spm_model_parameter(b.model, p->norm_bias + 2)->value.data[channel];
            scale = (double)spm_model_parameter(b.model, p->norm_weight)->value.data[channel] / sqrt(var + 1e-5);
            shift = (double)spm_model_parameter(b.model, p->norm_bias)->value.data[channel] - scale * mean;
        }
        CHECK(spm_run_keep(run, p->output) == SPM_OK);
        for (k = 0; k < spm_dataset_split_size(b.set, SPM_TRAIN); k++) {
            int64_t id = spm_dataset_split_ids(b.set, SPM_TRAIN)[k];
            spm_tensor out;
            if (spm_dataset_example(b.set, id)->group != 2) continue;
            tiny_pixels(b.set, &b.reading, id, pixels);
            (void)spm_run_input(run, spm_program_find(spm_model_program(b.model), "image"), pixels);
            CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
            out = spm_run_tensor(run, p->output);
            positions = spm_tensor_count(&out) / p->value.shape[0];
            for (i = 0; i < positions; i++) {
                double z = scale * (double)out.data[i * p->value.shape[0] + channel] + shift;
                sum += z * z;
            }
            seen++;
        }
        CHECK_NEAR(find(units, count, parameter, channel)->score, sqrt(sum / (double)(seen * positions)), 1e-5);
        spm_run_destroy(run);
        spm_free(b.ctx, units);
        bench_close(&b);
    }
}

/* The line integrals are complete up to the trapezoid rule, the more steps the better; and in the first convolution,
 * which is linear in the picture, integrated gradients and conductance are the same numbers. */
static void line_integrals(void)
{
    int net;
    for (net = 0; net < 2; net++) {
        bench b = bench_open(net ? VIT : TINY_ARCH, 2);
        spm_attr_report coarse = SPM_ZERO, fine = SPM_ZERO, other = SPM_ZERO;
        int64_t count = 0, u, stem = 0;
        spm_unit *units;
        coarse.loss = 4;
        fine.loss = other.loss = 128;
        units = rank(&b, SPM_CRITERION_CONDUCTANCE, SPM_UNIT_CHANNEL, 1, &coarse, &count);
        spm_free(b.ctx, units);
        units = rank(&b, SPM_CRITERION_CONDUCTANCE, SPM_UNIT_CHANNEL, 1, &fine, &count);
        CHECK_NEAR(fine.loss, measure(&b, 1, 0), 1e-5);
        CHECK(fabs(fine.loss - fine.baseline_loss) > 1e-4);
        CHECK(fine.completeness_first < 0.03 && fine.completeness_last < 0.03);
        CHECK(fine.completeness_first <= coarse.completeness_first + 0.01);
        if (!net) {
            int64_t n = 0;
            spm_unit *same = rank(&b, SPM_CRITERION_INTEGRATED, SPM_UNIT_CHANNEL, 1, &other, &n);
            CHECK_INT(n, count);
            CHECK(other.completeness_first != other.completeness_first); /* it promises no completeness inside */
            for (u = 0; u < count; u++) {
                if (strcmp(spm_model_parameter(b.model, units[u].parameter)->name, "conv1.weight") != 0) continue;
                CHECK_NEAR(find(same, n, units[u].parameter, units[u].channel)->score, units[u].score, 1e-4 * units[0].score);
                stem++;
            }
            CHECK_INT(stem, 8);
            spm_free(b.ctx, same);
        } else {
            spm_attr_report heads = SPM_ZERO;
            spm_unit *four;
            heads.loss = 32;
            four = rank(&b, SPM_CRITERION_CONDUCTANCE, SPM_UNIT_HEAD, 1, &heads, &count);
            CHECK_INT(count, 4);
            CHECK(four[0].score > 0.0);
            spm_free(b.ctx, four);
        }
        spm_free(b.ctx, units);
        bench_close(&b);
    }
}

static void remove_head(bench *b, int64_t head)
{
    spm_unit unit = SPM_ZERO;
    unit.parameter = spm_model_find_parameter(b->model, "blocks.0.attn.qkv.weight");
    unit.channel = head;
    unit.kind = SPM_UNIT_HEAD;
    CHECK_INT(modify_units(b->model, &unit, 1, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL), SPM_OK);
}

/* Two heads: each order is one of two, so the estimate must be f a + (1 - f) b with f a multiple of 1/P, the same f for
 * both; the standard error follows; and the values add up to v(all) - v(none). */
static void shapley(void)
{
    bench b = bench_open("vit:patch=4,dim=16,depth=1,heads=2,mlp=2", 1);
    spm_attr_report report = SPM_ZERO;
    int w = spm_model_find_parameter(b.model, "blocks.0.attn.qkv.weight"), v, order = 16;
    spm_parameter *p = spm_model_parameter(b.model, w), *bias = spm_model_parameter(b.model, p->bias);
    size_t wn = (size_t)spm_tensor_count(&p->value) * sizeof(float), bn = (size_t)spm_tensor_count(&bias->value) * sizeof(float);
    float *weights = (float *)malloc(wn), *biases = (float *)malloc(bn);
    double value[4], f, sd;
    int64_t count = 0;
    spm_unit *units;
    const spm_unit *a, *c;
    memcpy(weights, p->value.data, wn);
    memcpy(biases, bias->value.data, bn);
    for (v = 0; v < 4; v++) { /* bit 0: head 0 removed */
        if (v & 1) remove_head(&b, 0);
        if (v & 2) remove_head(&b, 1);
        value[v] = measure(&b, 0, 1);
        memcpy(p->value.data, weights, wn);
        memcpy(bias->value.data, biases, bn);
    }
    spm_model_touch(b.model);
    report.permutations = order;
    units = rank(&b, SPM_CRITERION_SHAPLEY, SPM_UNIT_HEAD, 0, &report, &count);
    CHECK_INT(count, 2);
    a = find(units, count, w, 0);
    c = find(units, count, w, 1);
    CHECK_NEAR(report.full_value, value[0], 1e-6);
    CHECK_NEAR(report.chance, 0.5, 0.0);
    CHECK_INT(report.permutations, order);
    CHECK_INT(report.met, 2);
    CHECK(report.evaluations > order);
    CHECK_NEAR(a->score + c->score, value[0] - value[3], 1e-5);
    f = (a->score - (value[2] - value[3])) / ((value[0] - value[1]) - (value[2] - value[3]));
    CHECK(f > 0.0 && f < 1.0);
    CHECK_NEAR(f * order, floor(f * order + 0.5), 0.05);
    sd = sqrt(f * (1.0 - f) * order / (order - 1.0)) * fabs((value[0] - value[1]) - (value[2] - value[3]));
    CHECK_NEAR(a->error, sd / sqrt((double)order), 1e-6);
    CHECK_NEAR(report.max_error, a->error, 1e-6);
    spm_free(b.ctx, units);
    free(weights);
    free(biases);
    bench_close(&b);
}

static void heads_and_weights(void)
{
    bench b = bench_open(VIT, 1);
    int64_t count = 0, u, i, s;
    int w = spm_model_find_parameter(b.model, "blocks.1.attn.qkv.weight");
    const spm_parameter *p = spm_model_parameter(b.model, w);
    spm_unit *units = rank(&b, SPM_CRITERION_MAGNITUDE, SPM_UNIT_HEAD, 0, NULL, &count);
    double sum = 0.0;
    CHECK_INT(count, 4);
    for (s = 0; s < 3; s++) { /* head 1: rows 8..15 of q, of k and of v */
        for (i = (16 * s + 8) * 16; i < (16 * s + 16) * 16; i++) sum += (double)p->value.data[i] * (double)p->value.data[i];
    }
    CHECK_NEAR(find(units, count, w, 1)->score, sqrt(sum), 1e-9);
    spm_free(b.ctx, units);
    bench_close(&b);
    b = bench_open(TINY_ARCH, 1);
    units = rank(&b, SPM_CRITERION_WEIGHT_GRADIENT, SPM_UNIT_WEIGHT, 1, NULL, &count);
    for (u = 1; u < count; u++) CHECK(units[u - 1].score >= units[u].score);
    for (u = 0; u < count; u += 997) { /* the gradient of this ranking is still in the model */
        const spm_parameter *q = spm_model_parameter(b.model, units[u].parameter);
        CHECK_NEAR(units[u].score, fabs((double)q->value.data[units[u].channel] * (double)q->gradient[units[u].channel]), 1e-12);
    }
    spm_free(b.ctx, units);
    bench_close(&b);
}

static void refused(bench *b, spm_criterion criterion, spm_unit_kind kind, const char *word)
{
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    int64_t count = 0, used = 0;
    desc.reading = b->reading;
    desc.criterion = criterion;
    desc.kind = kind;
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_rank_units(b->model, b->set, &desc, NULL, &units, &count, &used, &last), SPM_E_UNSUPPORTED);
    CHECK(units == NULL && strstr(last.text, word) != NULL);
}

static void sentences(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    spm_map map;
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    int i;
    refused(&b, SPM_CRITERION_GRADIENT, SPM_UNIT_HEAD, "heads");
    refused(&b, SPM_CRITERION_CONDUCTANCE, SPM_UNIT_WEIGHT, "conductance");
    refused(&b, SPM_CRITERION_EXHAUSTIVE, SPM_UNIT_CHANNEL, "exhaustive");
    CHECK_INT(spm_explain(b.model, &b.reading, pixels, 2, SPM_MAP_AUTO, &map, &last), SPM_E_ARGUMENT);
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_explain(b.model, &b.reading, pixels, 0, SPM_MAP_ROLLOUT, &map, &last), SPM_E_UNSUPPORTED);
    CHECK(strstr(last.text, "attention") && map.values == NULL);
    for (i = SPM_CRITERION_GRADIENT; i <= SPM_CRITERION_RANDOM; i++) {
        spm_criterion back = SPM_CRITERION_RANDOM;
        CHECK(spm_criterion_parse(spm_criterion_name((spm_criterion)i), &back) && back == (spm_criterion)i);
    }
    CHECK(!spm_criterion_by_group(SPM_CRITERION_MAGNITUDE) && spm_criterion_by_group(SPM_CRITERION_SHAPLEY));
    bench_close(&b);
}

/* ---- maps ---- */

/* The pool and the head are linear, so the map is relu(A w / positions) with w the class's row of the head. */
static void gradcam(void)
{
    bench b = bench_open(TINY_ARCH, 1);
    const spm_program *program = spm_model_program(b.model);
    spm_value value = spm_program_find(program, "last");
    const spm_parameter *head = spm_model_parameter(b.model, spm_model_find_parameter(b.model, "fc.weight"));
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    spm_run *run = spm_run_create(b.model, NULL, NULL);
    spm_tensor a;
    spm_map map;
    int reversed, y;
    int64_t i, c;
    tiny_pixels(b.set, &b.reading, 3, pixels);
    CHECK(spm_run_keep(run, value) == SPM_OK);
    (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
    a = spm_run_tensor(run, value);
    for (reversed = 0; reversed < 2; reversed++) {
        b.reading.label_reversed = reversed;
        for (y = -1; y < 2; y++) {
            int column;
            CHECK_INT(spm_explain(b.model, &b.reading, pixels, y, SPM_MAP_AUTO, &map, NULL), SPM_OK);
            CHECK_INT(map.height, a.shape[1]);
            CHECK_INT(map.width, a.shape[2]);
            if (y >= 0) CHECK_INT(map.class_index, y);
            column = reversed ? 1 - map.class_index : map.class_index;
            for (i = 0; i < map.height * map.width; i++) {
                double sum = 0.0;
                for (c = 0; c < a.shape[3]; c++) sum += (double)a.data[i * a.shape[3] + c] * (double)head->value.data[column * a.shape[3] + c];
                sum /= (double)(map.height * map.width);
                CHECK_NEAR(map.values[i], sum > 0.0 ? sum : 0.0, 1e-5);
            }
            spm_free(b.ctx, map.values);
        }
    }
    spm_run_destroy(run);
    bench_close(&b);
}

/* Rollout by whole matrices: (A2 + I) / 2 times (A1 + I) / 2, row of the class token. */
static void rollout(void)
{
    bench b = bench_open(VIT, 1);
    const spm_program *program = spm_model_program(b.model);
    enum { T = 17 };
    static double matrix[2][T][T], row[T];
    static float pixels[TINY_SIZE * TINY_SIZE * 3];
    spm_value probs[2];
    spm_run *run = spm_run_create(b.model, NULL, NULL);
    spm_map map;
    spm_op op;
    double total = 0.0;
    int s, n = 0, i, j, h;
    tiny_pixels(b.set, &b.reading, 5, pixels);
    for (s = 0; s < spm_program_op_count(program); s++) {
        spm_value out = spm_program_op_at(program, s, &op, NULL, NULL);
        if (op == SPM_OP_ATTENTION && n < 2) probs[n++] = out + 1; /* the second result */
    }
    CHECK_INT(n, 2);
    for (s = 0; s < 2; s++) CHECK(spm_run_keep(run, probs[s]) == SPM_OK);
    (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
    for (s = 0; s < 2; s++) {
        const float *p = spm_run_data(run, probs[s]);
        for (i = 0; i < (s ? 1 : T); i++) { /* the last block asks for the class token alone */
            for (j = 0; j < T; j++) {
                matrix[s][i][j] = i == j ? 0.5 : 0.0;
                for (h = 0; h < 2; h++) matrix[s][i][j] += 0.25 * (double)p[(h * (s ? 1 : T) + i) * T + j];
            }
        }
    }
    for (j = 0; j < T; j++) {
        row[j] = 0.0;
        for (i = 0; i < T; i++) row[j] += matrix[1][0][i] * matrix[0][i][j];
        total += row[j];
    }
    CHECK_NEAR(total, 1.0, 1e-5);
    CHECK_INT(spm_explain(b.model, &b.reading, pixels, -1, SPM_MAP_AUTO, &map, NULL), SPM_OK);
    CHECK(map.height == 4 && map.width == 4);
    for (i = 0; i < 16; i++) CHECK_NEAR(map.values[i], row[i + 1], 1e-6);
    spm_free(b.ctx, map.values);
    spm_run_destroy(run);
    bench_close(&b);
}

/* Pixel by pixel: the signed sum is the logit's difference; a pixel's value by central differences along the line. */
static void integrated(void)
{
    int k;
    for (k = 0; k < 2; k++) {
        bench b = bench_open(k ? VIT : TINY_ARCH, 1);
        const spm_program *program = spm_model_program(b.model);
        spm_value image = spm_program_find(program, "image"), logits = spm_program_find(program, "logits");
        static float pixels[TINY_SIZE * TINY_SIZE * 3], at[TINY_SIZE * TINY_SIZE * 3];
        spm_run *run = spm_run_create(b.model, NULL, NULL);
        spm_map map;
        double probe = 0.0;
        int i, c, step, side;
        tiny_pixels(b.set, &b.reading, 3, pixels);
        CHECK_INT(spm_explain(b.model, &b.reading, pixels, 1, SPM_MAP_INTEGRATED, &map, NULL), SPM_OK);
        CHECK(map.height == TINY_SIZE && map.width == TINY_SIZE && map.class_index == 1);
        CHECK(fabs(map.difference) > 1e-3);
        CHECK_NEAR(map.sum, map.difference, (k ? 0.02 : 0.15) * fabs(map.difference) + 1e-4); /* ReLUs bend the line */
        for (step = 0; step < 32; step++) { /* one pixel by central differences along the line */
            for (c = 0; c < 3; c++) {
                double two[2];
                for (side = 0; side < 2; side++) {
                    for (i = 0; i < TINY_SIZE * TINY_SIZE * 3; i++) at[i] = pixels[i] * (float)((step + 0.5) / 32.0);
                    at[(5 * TINY_SIZE + 9) * 3 + c] += side ? 2e-2f : -2e-2f;
                    (void)spm_run_input(run, image, at);
                    CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
                    two[side] = (double)spm_run_data(run, logits)[1];
                }
                probe += (two[1] - two[0]) / 4e-2 / 32.0 * (double)pixels[(5 * TINY_SIZE + 9) * 3 + c];
            }
        }
        CHECK_NEAR(map.values[5 * TINY_SIZE + 9], fabs(probe), 0.05 * fabs(probe) + 1e-4);
        spm_free(b.ctx, map.values);
        spm_run_destroy(run);
        bench_close(&b);
    }
}

static void overlay(void)
{
    spm_context *ctx = tiny_context(1);
    float values[4] = { 0.0f, 0.0f, 0.0f, 8.0f };
    spm_map map = SPM_ZERO;
    spm_image picture, result;
    int i;
    CHECK(spm_image_create(ctx, 20, 20, &picture, NULL) == SPM_OK);
    for (i = 0; i < 400; i++) picture.pixels[3 * i] = 200;
    map.values = values;
    map.height = map.width = 2;
    CHECK_INT(spm_map_overlay(ctx, &map, &picture, &result, NULL), SPM_OK);
    CHECK(result.width == 20 && result.height == 20);
    CHECK_INT(result.pixels[0], 60); /* no heat: the gray of the picture */
    CHECK_INT(result.pixels[2], 60);
    i = 3 * (19 * 20 + 19); /* full heat: .7 of the lightest colour */
    CHECK_NEAR(result.pixels[i], 0.3 * 59.8 + 0.7 * 252, 1.0);
    CHECK_NEAR(result.pixels[i + 1], 0.3 * 59.8 + 0.7 * 255, 1.0);
    spm_image_free(ctx, &result);
    values[3] = 0.0f; /* a map of zeros is no division by zero */
    CHECK_INT(spm_map_overlay(ctx, &map, &picture, &result, NULL), SPM_OK);
    CHECK_INT(result.pixels[i], 60);
    spm_image_free(ctx, &result);
    map.values = NULL;
    CHECK_INT(spm_map_overlay(ctx, &map, &picture, &result, NULL), SPM_E_ARGUMENT);
    spm_image_free(ctx, &picture);
    spm_context_destroy(ctx);
}

int main(void)
{
    tiny_begin("test_attr");
    TEST(activation_gradient);
    TEST(activation);
    TEST(line_integrals);
    TEST(shapley);
    TEST(heads_and_weights);
    TEST(sentences);
    TEST(gradcam);
    TEST(rollout);
    TEST(integrated);
    TEST(overlay);
    return TEST_END;
}
