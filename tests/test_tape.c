/* test_tape.c - the tape: every operation's gradient, planning, segments, masks, hooks, prefixes, threads. */
#include "../spurmem.h"
#include "failing.h"
#include <pthread.h>

#include <stdint.h>

/* ---- every operation against central differences ---- */

typedef struct op_case {
    spm_op op;
    int rank[6];
    int64_t shape[6][4];
    int n_in;
    int64_t kernel, stride, padding, dilation, groups, heads, index;
    float p;
    int relu, training;
} op_case;

/* op, ranks, shapes, inputs, kernel stride padding dilation groups heads index p relu training */
static const op_case cases[] = {
    { SPM_OP_CONV2D, {4,4,1}, {{2,6,5,3},{4,3,3,3},{4}}, 3, 3,1,1,1,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4}, {{2,7,6,4},{6,3,3,4}}, 2, 3,2,1,1,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4}, {{1,9,8,3},{5,7,7,3}}, 2, 7,2,3,1,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4}, {{2,5,5,8},{12,1,1,8}}, 2, 1,1,0,1,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4,1}, {{2,6,6,8},{16,1,1,8},{16}}, 3, 1,2,0,1,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4}, {{2,6,6,8},{8,3,3,2}}, 2, 3,1,1,1,4, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4}, {{1,8,8,4},{4,3,3,4}}, 2, 3,1,2,2,1, 0,0,0,0,1 },
    { SPM_OP_CONV2D, {4,4,1}, {{2,8,8,3},{10,4,4,3},{10}}, 3, 4,4,0,1,1, 0,0,0,0,1 },
    { SPM_OP_LINEAR, {2,2,1}, {{5,7},{9,7},{9}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_LINEAR, {3,2,1}, {{2,3,20},{33,20},{33}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_LINEAR, {2,2}, {{1,16},{2,16}}, 2, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_BATCH_NORM, {4,1,1,1,1}, {{3,4,5,7},{7},{7},{7},{7}}, 5, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_BATCH_NORM, {4,1,1,1,1}, {{2,4,4,17},{17},{17},{17},{17}}, 5, 0,0,0,0,0, 0,0,0,1,1 },
    { SPM_OP_BATCH_NORM, {4,1,1,1,1,4}, {{2,4,4,16},{16},{16},{16},{16},{2,4,4,16}}, 6, 0,0,0,0,0, 0,0,0,1,1 },
    { SPM_OP_BATCH_NORM, {4,1,1,1,1,4}, {{2,3,4,5},{5},{5},{5},{5},{2,3,4,5}}, 6, 0,0,0,0,0, 0,0,0,1,0 },
    { SPM_OP_BATCH_NORM, {4,1,1,1,1}, {{2,3,4,5},{5},{5},{5},{5}}, 5, 0,0,0,0,0, 0,0,0,0,0 },
    { SPM_OP_LAYER_NORM, {3,1,1}, {{2,5,24},{24},{24}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_LAYER_NORM, {2,1,1}, {{3,7},{7},{7}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_RELU, {4}, {{2,3,3,5}}, 1, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_GELU, {3}, {{2,3,19}}, 1, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_SOFTMAX, {2}, {{4,9}}, 1, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_SOFTMAX, {3}, {{2,3,33}}, 1, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_ATTENTION, {3}, {{2,5,36}}, 1, 0,0,0,0,0, 3,0,0,0,1 },
    { SPM_OP_ATTENTION, {3}, {{1,17,48}}, 1, 0,0,0,0,0, 1,0,0,0,1 },
    { SPM_OP_ATTENTION, {3}, {{2,5,36}}, 1, 0,0,0,0,2, 3,0,0,0,1 },
    { SPM_OP_MAX_POOL, {4}, {{2,7,6,5}}, 1, 3,2,1,0,0, 0,0,0,0,1 },
    { SPM_OP_MAX_POOL, {4}, {{1,4,4,3}}, 1, 2,2,0,0,0, 0,0,0,0,1 },
    { SPM_OP_AVG_POOL, {4}, {{2,5,5,3}}, 1, 3,2,1,0,0, 0,0,0,0,1 },
    { SPM_OP_AVG_POOL, {4}, {{2,4,4,18}}, 1, 2,2,0,0,0, 0,0,0,0,1 },
    { SPM_OP_GLOBAL_POOL, {4}, {{2,4,3,9}}, 1, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_ADD, {3,3}, {{2,4,5},{2,4,5}}, 2, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_SHORTCUT_A, {4}, {{2,5,4,3}}, 1, 0,2,0,0,6, 0,0,0,0,1 },
    { SPM_OP_SHORTCUT_A, {4}, {{1,4,4,16}}, 1, 0,2,0,0,32, 0,0,0,0,1 },
    { SPM_OP_DROPOUT, {3}, {{2,5,11}}, 1, 0,0,0,0,0, 0,0,.3f,0,1 },
    { SPM_OP_DROP_PATH, {3}, {{9,5,3}}, 1, 0,0,0,0,0, 0,0,.4f,0,1 },
    { SPM_OP_TIED_DROPOUT, {3}, {{5,2,9}}, 1, 0,0,0,0,0, 0,3,.4f,0,1 },
    { SPM_OP_TOKENS, {4,2,2}, {{2,2,3,8},{1,8},{7,8}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_TOKENS, {4,2,2,2}, {{2,2,2,20},{1,20},{6,20},{1,20}}, 4, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_TOKENS, {4,2,2}, {{2,2,2,20},{2,20},{6,20}}, 3, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_TOKEN, {3}, {{2,4,9}}, 1, 0,0,0,0,0, 0,1,0,0,1 },
    { SPM_OP_TOKEN, {3}, {{2,4,9}}, 1, 0,0,0,0,2, 0,1,0,0,1 },
    { SPM_OP_MEAN2, {2,2}, {{3,4},{3,4}}, 2, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_CROSS_ENTROPY, {2,2}, {{4,5},{4,5}}, 2, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_CROSS_ENTROPY, {2,2,1}, {{6,2},{6,2},{6}}, 3, 0,0,0,0,0, 0,0,.1f,0,1 },
    { SPM_OP_NTXENT, {2,2}, {{5,8},{5,8}}, 2, 0,0,0,0,0, 0,0,0,0,1 },
    { SPM_OP_NTXENT, {2,2}, {{3,2},{3,2}}, 2, 0,0,0,0,0, 0,0,0,0,1 }
};

static spm_op_call call_of(const op_case *c)
{
    spm_op_call call;
    int i, k;
    memset(&call, 0, sizeof call);
    call.attr.kernel[0] = call.attr.kernel[1] = c->kernel;
    call.attr.stride[0] = call.attr.stride[1] = c->stride;
    call.attr.padding[0] = call.attr.padding[1] = c->padding;
    call.attr.dilation[0] = call.attr.dilation[1] = c->dilation;
    call.attr.groups = c->groups;
    call.attr.heads = c->heads;
    call.attr.index = c->index;
    if (c->op == SPM_OP_ATTENTION || c->op == SPM_OP_TOKEN) call.attr.tokens = c->groups;
    call.attr.eps = 1e-5f;
    call.attr.p = c->p;
    if (c->op == SPM_OP_CROSS_ENTROPY) call.attr.label_smoothing = c->p;
    call.attr.temperature = .5f;
    call.attr.relu = c->relu;
    call.training = c->training;
    call.seed = 7;
    call.n_in = c->n_in;
    for (i = 0; i < c->n_in; i++) {
        call.in[i].rank = c->rank[i];
        for (k = 0; k < c->rank[i]; k++) call.in[i].shape[k] = c->shape[i][k];
    }
    return call;
}

static spm_context *context(int threads)
{
    spm_context_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    return spm_context_create(&desc);
}

static void test_gradients_of_all_ops(void)
{
    spm_context *ctx = context(2);
    int seen[SPM_OP_COUNT], i;
    memset(seen, 0, sizeof seen);
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        spm_op_call call = call_of(&cases[i]);
        spm_error err;
        double error;
        memset(&err, 0, sizeof err);
        error = spm_gradient_check(ctx, cases[i].op, &call, 100 + (uint64_t)i, &err);
        seen[cases[i].op] = 1;
        if (!(error >= 0 && error < 2e-3)) {
            char text[600];
            snprintf(text, sizeof text, "case %d %s: relative error %g %s", i, spm_op_name(cases[i].op), error, err.text);
            CHECK_MSG(0, text);
        }
    }
    for (i = SPM_OP_NONE + 1; i < SPM_OP_COUNT; i++) CHECK_MSG(seen[i], spm_op_name((spm_op)i));
    spm_context_destroy(ctx);
}


/* ---- the contract of single operations that the planner relies on ---- */

typedef struct op_data {
    void *block;
    float *memory; /* in it, aligned */
    spm_op_call call;
} op_data;

/* A call with all its memory; in[] and d_out filled from seed (positive and normalised where an op wants that). */
static op_data op_make(spm_context *ctx, const op_case *c, uint64_t seed)
{
    op_data d;
    spm_error err;
    float dummy = 0;
    size_t at = 0, scratch, packed, total;
    int i, pass;
    int64_t k;
    memset(&err, 0, sizeof err);
    memset(&d, 0, sizeof d);
    d.call = call_of(c);
    for (i = 0; i < d.call.n_in; i++) if (d.call.in[i].rank) d.call.in[i].data = &dummy;
    CHECK_INT(spm_op_infer(ctx, c->op, &d.call, &err), SPM_OK);
    scratch = spm_op_scratch(ctx, c->op, &d.call, 0);
    if (spm_op_scratch(ctx, c->op, &d.call, 1) > scratch) scratch = spm_op_scratch(ctx, c->op, &d.call, 1);
    packed = spm_op_packed(ctx, c->op, &d.call);
    d.call.d_out = d.call.out[0];
    for (i = 0; i < d.call.n_in; i++) d.call.d_in[i] = d.call.in[i];
    for (pass = 0; pass < 2; pass++) {
        spm_tensor *all[2 * SPM_OP_MAX_IN + SPM_OP_MAX_OUT + 1];
        int n = 0;
        for (i = 0; i < d.call.n_in; i++) { all[n++] = &d.call.in[i]; all[n++] = &d.call.d_in[i]; }
        for (i = 0; i < d.call.n_out; i++) all[n++] = &d.call.out[i];
        all[n++] = &d.call.d_out;
        at = 0;
        for (i = 0; i < n; i++) {
            if (!all[i]->rank) continue;
            if (pass) all[i]->data = d.memory + at;
            at += ((size_t)spm_tensor_count(all[i]) + 31) / 16 * 16;
        }
        if (pass) break;
        total = at * sizeof(float) + scratch + packed + 256;
        d.block = calloc(total + 64, 1);
        d.memory = (float *)(void *)((char *)d.block + (64 - (uintptr_t)d.block % 64) % 64);
    }
    d.call.scratch = d.memory + at;
    d.call.packed = packed ? d.memory + at + (scratch + 63) / 64 * 16 : NULL;
    for (i = 0; i < d.call.n_in; i++) {
        for (k = 0; k < spm_tensor_count(&d.call.in[i]); k++) {
            float x = spm_random_normal(seed, (uint64_t)i, (uint64_t)k);
            if (c->op == SPM_OP_BATCH_NORM && i == 4) x = 1 + fabsf(x);
            if (c->op == SPM_OP_CROSS_ENTROPY && i > 0) x = fabsf(x) / 4;
            d.call.in[i].data[k] = x;
        }
        if (!spm_op_differentiable(c->op, i)) d.call.d_in[i].data = NULL;
    }
    for (k = 0; k < spm_tensor_count(&d.call.d_out); k++) d.call.d_out.data[k] = spm_random_normal(seed, 50, (uint64_t)k);
    return d;
}

static void fill(float *p, int64_t n, float x)
{
    int64_t i;
    for (i = 0; i < n; i++) p[i] = x;
}

/* What spm_op_backward_reads denies may be gone: NaN there changes no bit. One gradient alone is the same as all together, and
 * adding is the same as overwriting plus what was there. */
static void test_ops_read_what_they_say(void)
{
    spm_context *ctx = context(2);
    int i, j;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        op_data a = op_make(ctx, &cases[i], 5), b;
        spm_op op = cases[i].op;
        char text[100];
        snprintf(text, sizeof text, "case %d %s", i, spm_op_name(op));
        spm_op_forward(ctx, op, &a.call);
        spm_op_backward(ctx, op, &a.call);
        b = op_make(ctx, &cases[i], 5);
        spm_op_forward(ctx, op, &b.call);
        for (j = 0; j < b.call.n_in; j++) {
            if (b.call.in[j].data && !spm_op_backward_reads(op, &b.call.attr, 0, j)) fill(b.call.in[j].data, spm_tensor_count(&b.call.in[j]), NAN);
        }
        for (j = 0; j < b.call.n_out; j++) {
            if (!spm_op_backward_reads(op, &b.call.attr, 1, j)) fill(b.call.out[j].data, spm_tensor_count(&b.call.out[j]), NAN);
        }
        spm_op_backward(ctx, op, &b.call);
        for (j = 0; j < b.call.n_in; j++) {
            if (b.call.d_in[j].data) CHECK_MSG(memcmp(a.call.d_in[j].data, b.call.d_in[j].data, (size_t)spm_tensor_count(&a.call.d_in[j]) * 4) == 0, text);
        }
        for (j = 0; j < a.call.n_in; j++) {
            op_data one = op_make(ctx, &cases[i], 5);
            int k;
            int64_t e;
            double off = 0, top = 1e-6;
            if (a.call.d_in[j].data) {
                spm_op_forward(ctx, op, &one.call);
                for (k = 0; k < one.call.n_in; k++) if (k != j) one.call.d_in[k].data = NULL;
                one.call.d_in_add[j] = 1;
                fill(one.call.d_in[j].data, spm_tensor_count(&one.call.d_in[j]), 0.5f);
                spm_op_backward(ctx, op, &one.call);
                for (e = 0; e < spm_tensor_count(&one.call.d_in[j]); e++) {
                    const double x = (double)a.call.d_in[j].data[e], y = (double)one.call.d_in[j].data[e] - 0.5;
                    if (fabs(x) > top) top = fabs(x);
                    if (!(fabs(x - y) <= off)) off = fabs(x - y);
                }
                CHECK_MSG(off <= 1e-5 * (top + 1), text);
            }
            free(one.block);
        }
        free(a.block);
        free(b.block);
    }
    spm_context_destroy(ctx);
}

/* ---- networks for the tests below ---- */

static spm_model *network(spm_context *ctx, const char *name, int px, int classes)
{
    spm_arch arch;
    spm_error err;
    spm_model *model;
    memset(&arch, 0, sizeof arch);
    memset(&err, 0, sizeof err);
    arch.height = arch.width_px = px;
    arch.classes = classes;
    if (spm_arch_parse(ctx, name, &arch, &err)) CHECK_MSG(0, err.text);
    model = spm_model_build(ctx, &arch, 3, &err);
    CHECK_STR(err.text, "");
    return model;
}

static spm_run *run_of(spm_model *model, int64_t n, int backward, int segments)
{
    spm_run_desc desc;
    spm_error err;
    spm_run *run;
    memset(&desc, 0, sizeof desc);
    memset(&err, 0, sizeof err);
    desc.max_batch = n;
    desc.backward = backward;
    desc.segments = segments;
    desc.seed = 11;
    run = spm_run_create(model, &desc, &err);
    CHECK_STR(err.text, "");
    return run;
}

static float *noise(int64_t n, uint64_t seed)
{
    float *p = (float *)malloc((size_t)n * sizeof(float));
    int64_t i;
    for (i = 0; i < n; i++) p[i] = spm_random_normal(seed, 1, (uint64_t)i);
    return p;
}

static spm_value value_of(spm_model *model, const char *name)
{
    spm_value v = spm_program_find(spm_model_program(model), name);
    CHECK_MSG(v > 0, name);
    return v;
}

/* forward and backward of a network with a random gradient at the logits */
static void step(spm_run *run, spm_model *model, const float *image, const float *d_logits, int64_t n, int training)
{
    CHECK_INT(spm_run_input(run, value_of(model, "image"), image), SPM_OK);
    CHECK_INT(spm_run_forward(run, n, training), SPM_OK);
    CHECK_INT(spm_run_set_gradient(run, value_of(model, "logits"), d_logits), SPM_OK);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    CHECK_STR(spm_run_error(run)->text, "");
}

/* All gradients of a model, one behind the other. */
static float *gradients(spm_model *model, int64_t *total)
{
    float *all = NULL;
    int i, pass;
    for (pass = 0; pass < 2; pass++) {
        *total = 0;
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            spm_parameter *p = spm_model_parameter(model, i);
            int64_t n = spm_tensor_count(&p->value);
            if (!p->gradient) continue;
            if (pass) memcpy(all + *total, p->gradient, (size_t)n * sizeof(float));
            *total += n;
        }
        if (!pass) all = (float *)malloc((size_t)*total * sizeof(float));
    }
    return all;
}

static int same(const float *a, const float *b, int64_t n)
{
    return memcmp(a, b, (size_t)n * sizeof(float)) == 0;
}

static void zero_first_channel(void *user, spm_tensor *value)
{
    const int64_t channels = value->shape[value->rank - 1], n = spm_tensor_count(value);
    int64_t i;
    for (i = 0; i < n; i += channels) value->data[i] = 0;
    ++*(int *)user;
}

/* Memory sharing, replays of segments and of batch norms change no bit: against a run in which every value is kept; also
 * where a hook changes what lies behind the norms (way 4: with norms computed anew, 5: kept). */
static void test_plans_and_segments_change_nothing(void)
{
    static const char names[][64] = { "resnet18:width=8,stem=cifar", "resnet50:width=8", "resnet20:width=4",
                                      "vit:patch=8,dim=24,depth=3,heads=3,mlp=2,drop=.2,drop_path=.3", "vit:patch=8,dim=24,depth=2,heads=2,distilled=1" };
    int i, v, way, training;
    for (i = 0; i < 5; i++) {
        for (training = 0; training < 2; training++) {
            spm_context *ctx = context(2);
            spm_model *model = network(ctx, names[i], 32, 3);
            float *image = noise(4 * 32 * 32 * 3, 1), *d = noise(12, 2), *got[6] = { NULL, NULL, NULL, NULL, NULL, NULL };
            size_t bytes[6];
            int64_t total = 0;
            for (way = 0; way < 6; way++) {
                spm_run_desc desc;
                spm_run *run;
                int calls = 0;
                memset(&desc, 0, sizeof desc);
                desc.max_batch = 4;
                desc.backward = 1;
                desc.segments = way == 2;
                desc.keep_norms = way == 3 || way == 5;
                desc.seed = 11;
                run = spm_run_create(model, &desc, NULL);
                CHECK(run != NULL);
                for (v = 1; spm_program_shape(spm_model_program(model), v, 1).rank; v++) {
                    if (way == 0 && (i == 0 || v % 7 == 0)) (void)spm_run_keep(run, v);
                    spm_run_error(run)->status = SPM_OK;
                    spm_run_error(run)->text[0] = 0;
                }
                for (v = 0; way >= 4 && v < spm_model_parameter_count(model); v++) {
                    const spm_parameter *p = spm_model_parameter(model, v);
                    if (p->norm_output && p->norm_output != p->output && v % 2 == 0)
                        CHECK_INT(spm_run_hook_write(run, p->norm_output, zero_first_channel, &calls), SPM_OK);
                }
                spm_model_zero_gradients(model);
                step(run, model, image, d, 4, training);
                v = calls;
                spm_model_zero_gradients(model);
                step(run, model, image, d, 4, training); /* again, in memory that is no longer fresh */
                CHECK_INT(calls, 2 * v);
                CHECK((calls > 0) == (way >= 4 && i < 3));
                spm_model_finish_gradients(model);
                got[way] = gradients(model, &total);
                bytes[way] = spm_run_bytes(run);
                spm_run_destroy(run);
            }
            for (way = 1; way < 4; way++) CHECK_MSG(same(got[0], got[way], total), names[i]);
            CHECK_MSG(same(got[4], got[5], total), names[i]);
            CHECK_MSG(same(got[0], got[4], total) == (i >= 3), names[i]);
            CHECK_MSG(i < 3 ? bytes[1] < bytes[3] : bytes[1] <= bytes[3], names[i]);
            for (way = 0; way < 6; way++) free(got[way]);
            free(image);
            free(d);
            spm_model_destroy(model);
            spm_context_destroy(ctx);
        }
    }
}

/* A program whose values are used several times: x + x, a shared weight, a value with three readers; against differences. */
static void test_shared_values(void)
{
    spm_context *ctx = context(1);
    spm_program *p = spm_program_create(ctx);
    int64_t sx[2] = { 0, 6 }, sw[2] = { 6, 6 };
    spm_value x = spm_program_input(p, "x", 2, sx, 1), w = spm_program_parameter(p, "w", 2, sw, SPM_INIT_UNIFORM_FAN_IN, 0);
    spm_value a = spm_linear(p, x, w, 0), b, c;
    spm_model *model;
    spm_run *run;
    float *in = noise(18, 4), *r = noise(18, 5), *wv;
    const float *dx;
    int i;
    double error = 0, norm = 0;
    b = spm_add(p, a, a);
    c = spm_linear(p, spm_gelu(p, b), w, 0);
    c = spm_add(p, c, spm_add(p, a, x));
    spm_program_output(p, "y", c);
    model = spm_model_create(p, 1, NULL);
    CHECK(model != NULL);
    run = run_of(model, 3, 1, 0);
    wv = spm_model_parameter(model, 0)->value.data;
    (void)spm_run_input(run, x, in);
    CHECK_INT(spm_run_forward(run, 3, 1), SPM_OK);
    CHECK_INT(spm_run_set_gradient(run, c, r), SPM_OK);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    dx = spm_run_gradient(run, x);
    CHECK(dx != NULL);
    for (i = 0; dx && i < 18 + 36; i++) {
        float *at = i < 18 ? &in[i] : &wv[i - 18], kept = *at;
        double slope = 0, g;
        int sign, k;
        static float dx_copy[18];
        if (i == 0) memcpy(dx_copy, dx, sizeof dx_copy);
        for (sign = -1; sign <= 1; sign += 2) {
            *at = kept + (float)sign * 4e-3f;
            spm_model_touch(model);
            (void)spm_run_forward(run, 3, 1);
            for (k = 0; k < 18; k++) slope += sign * (double)r[k] * (double)spm_run_data(run, c)[k];
        }
        *at = kept;
        slope /= 8e-3;
        g = i < 18 ? (double)dx_copy[i] : (double)spm_model_parameter(model, 0)->gradient[i - 18];
        error += (g - slope) * (g - slope);
        norm += slope * slope;
    }
    CHECK(sqrt(error) < 1e-3 * sqrt(norm));
    free(in);
    free(r);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* A call that is refused with a sentence. */
static void refused(spm_run *run, spm_status got, spm_status want, const char *part)
{
    CHECK_INT(got, want);
    CHECK_MSG(strstr(spm_run_error(run)->text, part) != NULL, spm_run_error(run)->text);
    memset(spm_run_error(run), 0, sizeof(spm_error));
}

/* ---- masks: the dense and the pruned branch ---- */

static void masks_and_accumulation(int units)
{
    spm_context *ctx = context(2);
    spm_model *model = network(ctx, "resnet18:width=8,stem=cifar", 16, 2);
    spm_run *dense = run_of(model, 4, 1, 0), *pruned = run_of(model, 4, 1, 1);
    float *image = noise(4 * 16 * 16 * 3, 1), *d = noise(8, 2), *e = noise(8, 3), *one, *two, *both, *logits;
    int64_t total, k, at = 0;
    int w = spm_model_find_parameter(model, "layer2.0.conv1.weight"), i, dead = 0;
    spm_parameter *p = spm_model_parameter(model, w);
    const int64_t n = spm_tensor_count(&p->value);
    float *keep = (float *)malloc((size_t)n * sizeof(float)), *saved = (float *)malloc((size_t)n * sizeof(float));
    for (k = 0; k < n; k++) {
        const int64_t unit = k / (n / p->value.shape[0]);
        keep[k] = spm_random_uniform(3, 4, (uint64_t)(units ? unit : k)) < 0.3f ? 0.0f : 1.0f;
    }
    step(dense, model, image, d, 4, 1);
    spm_model_finish_gradients(model);
    one = gradients(model, &total);
    logits = (float *)malloc(8 * sizeof(float));
    memcpy(logits, spm_run_data(dense, value_of(model, "logits")), 8 * sizeof(float));
    /* the pruned branch: as if the weights were zero there, and no gradient reaches them */
    CHECK_INT(spm_run_set_mask(pruned, w, keep), SPM_OK);
    spm_model_zero_gradients(model);
    step(pruned, model, image, e, 4, 1);
    spm_model_finish_gradients(model);
    two = gradients(model, &total);
    memcpy(saved, p->value.data, (size_t)n * sizeof(float));
    for (k = 0; k < n; k++) {
        p->value.data[k] *= keep[k];
        if (keep[k] <= 0) dead += p->gradient[k] != 0.0f;
    }
    CHECK_INT(dead, 0);
    spm_model_touch(model);
    step(dense, model, image, e, 4, 1);
    CHECK(same(spm_run_data(dense, value_of(model, "logits")), spm_run_data(pruned, value_of(model, "logits")), 8));
    memcpy(p->value.data, saved, (size_t)n * sizeof(float));
    spm_model_touch(model);
    /* both, interleaved: the sum */
    spm_model_zero_gradients(model);
    (void)spm_run_forward(dense, 4, 1);
    (void)spm_run_forward(pruned, 4, 1);
    CHECK(same(spm_run_data(dense, value_of(model, "logits")), logits, 8));
    (void)spm_run_set_gradient(dense, value_of(model, "logits"), d);
    (void)spm_run_set_gradient(pruned, value_of(model, "logits"), e);
    CHECK_INT(spm_run_backward(dense), SPM_OK);
    CHECK_INT(spm_run_backward(pruned), SPM_OK);
    spm_model_finish_gradients(model);
    both = gradients(model, &total);
    {
        double off = 0, top = 0;
        for (k = 0; k < total; k++) {
            const double x = (double)one[k] + (double)two[k];
            if (fabs(x) > top) top = fabs(x);
            if (!(fabs(x - (double)both[k]) <= off)) off = fabs(x - (double)both[k]);
        }
        CHECK(off <= 1e-6 * top && top > 0);
    }
    /* and exactly the dense gradient where the mask is 0 */
    for (i = 0; i < w; i++) if (spm_model_parameter(model, i)->gradient) at += spm_tensor_count(&spm_model_parameter(model, i)->value);
    for (k = 0; k < n; k++) if (keep[k] <= 0) dead += both[at + k] != one[at + k];
    CHECK_INT(dead, 0);
    /* the mask goes: dense again */
    spm_run_clear_masks(pruned);
    (void)spm_run_forward(pruned, 4, 1);
    CHECK(same(spm_run_data(pruned, value_of(model, "logits")), logits, 8));
    CHECK(spm_run_set_mask(pruned, spm_model_find_parameter(model, "bn1.running_mean"), keep) != SPM_OK);
    free(image); free(d); free(e); free(one); free(two); free(both); free(keep); free(saved); free(logits);
    spm_run_destroy(dense);
    spm_run_destroy(pruned);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

static void test_masks_and_accumulation(void)
{
    masks_and_accumulation(0);
    masks_and_accumulation(1);
}

/* Two branches that share what they have in common: outputs and statistics are the same bits as without, gradients the
 * same sums, in another order in the common part; all of it the same bits with any number of threads. */
typedef struct branches {
    float *gradient, logits[2][8], features[2][1024];
    float *statistics;
    int64_t total, count;
    size_t bytes;
} branches;

static branches branches_of(const char *name, int px, const char *masked, int way, int share, int threads)
{
    branches b;
    spm_context_desc desc;
    spm_context *ctx;
    spm_model *model;
    spm_run *dense, *pruned;
    spm_run_desc running;
    float *image = noise(4 * px * px * 3, 1), *d = noise(8, 2), *e = noise(2 * 1024, 3), *keep;
    int i, turn;
    int64_t k, n;
    spm_tensor features;
    memset(&b, 0, sizeof b);
    memset(&desc, 0, sizeof desc);
    memset(&running, 0, sizeof running);
    desc.threads = threads;
    ctx = spm_context_create(&desc);
    model = network(ctx, name, px, 2);
    running.max_batch = 4;
    running.backward = 1;
    running.segments = way == 1;
    running.keep_norms = way == 2;
    dense = spm_run_create(model, &running, NULL);
    pruned = spm_run_create(model, &running, NULL);
    CHECK(dense && pruned);
    CHECK_INT(spm_run_own_buffers(pruned, 1), SPM_OK);
    i = spm_model_find_parameter(model, masked);
    CHECK_MSG(i >= 0, masked);
    n = spm_tensor_count(&spm_model_parameter(model, i)->value);
    keep = noise(n, 4);
    for (k = 0; k < n; k++) keep[k] = k < n / spm_model_parameter(model, i)->value.shape[0] ? 0.0f : 1.0f;
    CHECK_INT(spm_run_set_mask(pruned, i, keep), SPM_OK);
    if (share) CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
    features = spm_run_tensor(dense, value_of(model, "features"));
    for (turn = 0; turn < 2; turn++) { /* the second one with what the first has left in memory */
        spm_model_zero_gradients(model);
        CHECK_INT(spm_run_input(dense, value_of(model, "image"), image), SPM_OK);
        CHECK_INT(spm_run_input(pruned, value_of(model, "image"), image), SPM_OK);
        CHECK_INT(spm_run_forward(dense, 4, 1), SPM_OK);
        CHECK_INT(spm_run_forward(pruned, 4, 1), SPM_OK);
        CHECK_INT(spm_run_set_gradient(pruned, value_of(model, "features"), e), SPM_OK);
        CHECK_INT(spm_run_backward(pruned), SPM_OK);
        CHECK_INT(spm_run_set_gradient(dense, value_of(model, "features"), e + 4 * features.shape[1]), SPM_OK);
        CHECK_INT(spm_run_set_gradient(dense, value_of(model, "logits"), d), SPM_OK);
        CHECK_INT(spm_run_backward(dense), SPM_OK);
        CHECK_INT(spm_run_commit_statistics(dense, .1f), SPM_OK);
        CHECK_INT(spm_run_commit_statistics(pruned, .1f), SPM_OK);
        spm_model_finish_gradients(model);
    }
    CHECK_STR(spm_run_error(dense)->text, "");
    CHECK_STR(spm_run_error(pruned)->text, "");
    for (turn = 0; turn < 2; turn++) {
        spm_run *run = turn ? pruned : dense;
        memcpy(b.logits[turn], spm_run_data(run, value_of(model, "logits")), sizeof b.logits[turn]);
        memcpy(b.features[turn], spm_run_data(run, value_of(model, "features")),
               (size_t)(4 * features.shape[1]) * sizeof(float));
    }
    for (turn = 0; turn < 2; turn++) {
        b.count = 0;
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            const float *buffer = spm_run_buffer(pruned, i);
            n = spm_tensor_count(&spm_model_parameter(model, i)->value);
            for (k = 0; buffer && k < n; k++, b.count++) if (turn) b.statistics[b.count] = buffer[k];
        }
        if (!turn) b.statistics = (float *)calloc((size_t)b.count + 1, sizeof(float));
    }
    b.gradient = gradients(model, &b.total);
    b.bytes = spm_run_bytes(pruned);
    free(image); free(d); free(e); free(keep);
    spm_run_destroy(way ? dense : pruned); /* in either order */
    spm_run_destroy(way ? pruned : dense);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    return b;
}

static void branches_free(branches *b)
{
    free(b->gradient);
    free(b->statistics);
}

static void test_shared_branches(void)
{
    static const struct {
        const char *name, *masked;
        int px, common; /* 1: there is a common part */
    } nets[] = {
        { "resnet18:width=8,stem=cifar", "conv1.weight", 16, 0 },
        { "resnet18:width=8,stem=cifar", "layer1.0.conv1.weight", 16, 1 },
        { "resnet18:width=8,stem=cifar", "layer2.0.downsample.0.weight", 16, 1 },
        { "resnet18:width=8,stem=cifar", "fc.weight", 16, 1 },
        { "resnet50:width=8", "layer1.0.conv3.weight", 64, 1 },
        { "resnet50:width=8", "layer3.1.conv2.weight", 64, 1 },
        { "resnet18:width=32", "layer2.1.conv1.weight", 64, 1 },
        { "vit:patch=8,dim=24,depth=3,heads=3,mlp=2", "blocks.1.attn.proj.weight", 16, 1 },
        { "vit:patch=8,dim=24,depth=3,heads=3,mlp=2", "blocks.0.attn.qkv.weight", 16, 1 },
        { "vit:patch=8,dim=24,depth=3,heads=3,mlp=2,drop=0.2", "blocks.1.attn.proj.weight", 16, 1 },
    };
    int c, way; /* plain, by segments, with batch norms kept: each of them with every third network, all with one */
    for (c = 0; c < (int)(sizeof nets / sizeof *nets); c++) {
        for (way = 0; way < 3; way++) {
            branches apart, one, three;
            int64_t k, differ = 0;
            double off = 0, top = 0;
            if (way != c % 3 && c != 4) continue;
            apart = branches_of(nets[c].name, nets[c].px, nets[c].masked, way, 0, 2);
            one = branches_of(nets[c].name, nets[c].px, nets[c].masked, way, 1, 1);
            three = branches_of(nets[c].name, nets[c].px, nets[c].masked, way, 1, 3);
            CHECK(apart.total == one.total && apart.count == one.count);
            CHECK(same(apart.logits[0], one.logits[0], 16));
            CHECK(same(apart.features[0], one.features[0], 2 * 1024));
            CHECK(same(apart.statistics, one.statistics, apart.count));
            CHECK(same(three.gradient, one.gradient, one.total) && same(three.logits[0], one.logits[0], 16));
            for (k = 0; k < one.total; k++) {
                const double x = (double)apart.gradient[k], y = (double)one.gradient[k];
                if (fabs(x) > top) top = fabs(x);
                if (!(fabs(x - y) <= off)) off = fabs(x - y);
                differ += !same(&apart.gradient[k], &one.gradient[k], 1);
            }
            CHECK_MSG(off <= 2e-6 * top && top > 0, nets[c].masked);
            CHECK_MSG((differ > 0) == nets[c].common, nets[c].masked);
            CHECK_MSG(one.bytes < apart.bytes || !nets[c].common, nets[c].masked);
            branches_free(&apart);
            branches_free(&one);
            branches_free(&three);
        }
    }
}

/* Two branches by hand: x -> a = relu(x W0 + x) -> a W1 (masked) + gelu(x) V -> loss, which sends its gradient by default.
 * gelu(x) crosses over and wants no gradient. */
static void test_shared_program(void)
{
    int mode, share, i;
    for (mode = 0; mode < 3; mode++) { /* plain; what is in common frozen; and still its gradient wanted of the source */
        float *sums[2] = { NULL, NULL };
        int64_t total = 0, k;
        for (share = 0; share < 2; share++) {
            spm_context *ctx = context(2);
            spm_program *p = spm_program_create(ctx);
            const int64_t sx[2] = { 0, 32 }, sw[2] = { 32, 32 };
            spm_value x = spm_program_input(p, "x", 2, sx, 0), target = spm_program_input(p, "t", 2, sx, 0), w[3], a, y;
            float *data = noise(4 * 32, 1), *hot = noise(4 * 32, 2), *keep = noise(32 * 32, 3);
            spm_model *model;
            spm_run *runs[2];
            for (i = 0; i < 3; i++) {
                char name[8];
                snprintf(name, sizeof name, "w%d", i);
                w[i] = spm_program_parameter(p, name, 2, sw, SPM_INIT_TRUNC_NORMAL, 0);
            }
            y = spm_gelu(p, x);
            a = spm_relu(p, spm_add(p, spm_linear(p, x, w[0], 0), x));
            a = spm_add(p, spm_linear(p, a, w[1], 0), spm_linear(p, y, w[2], 0));
            spm_program_output(p, "loss", spm_cross_entropy(p, a, target, 0, 0));
            model = spm_model_create(p, 5, NULL);
            if (mode) spm_model_parameter(model, 0)->flags |= SPM_PARAMETER_FROZEN;
            for (i = 0; i < 2; i++) {
                runs[i] = run_of(model, 4, 1, 0);
                CHECK_INT(spm_run_input(runs[i], x, data), SPM_OK);
                CHECK_INT(spm_run_input(runs[i], target, hot), SPM_OK);
            }
            for (i = 0; i < 32 * 32; i++) keep[i] = i / 32 % 3 ? 1.0f : 0.0f;
            CHECK_INT(spm_run_set_mask(runs[1], spm_model_find_parameter(model, "w1"), keep), SPM_OK);
            if (mode == 2) CHECK_INT(spm_run_keep(runs[0], y), SPM_OK);
            if (share) CHECK_INT(spm_run_share(runs[1], runs[0]), SPM_OK);
            spm_model_zero_gradients(model);
            for (i = 0; i < 2; i++) CHECK_INT(spm_run_forward(runs[i], 4, 1), SPM_OK);
            for (i = 1; i >= 0; i--) CHECK_INT(spm_run_backward(runs[i]), SPM_OK);
            if (mode == 2) CHECK(spm_run_gradient(runs[0], y) != NULL);
            spm_model_finish_gradients(model);
            sums[share] = gradients(model, &total);
            for (i = 0; i < 2; i++) spm_run_destroy(runs[i]);
            spm_model_destroy(model);
            free(data); free(hot); free(keep);
            spm_context_destroy(ctx);
        }
        for (k = 0; k < total; k++) CHECK_NEAR(sums[0][k], sums[1][k], 1e-6);
        free(sums[0]);
        free(sums[1]);
    }
}

/* Every allocation of spm_run_share made to fail in turn, at first and at a move: the next call makes up for it. */
static void test_failing_share(void)
{
    long at;
    int done = 0, moved;
    for (at = 1; at < 400 && !done; at++) {
        for (moved = 0; moved < 2; moved++) {
            failing c = SPM_ZERO;
            spm_context *ctx = failing_context(&c, 2);
            spm_model *model = network(ctx, "resnet18:width=4,stem=cifar", 16, 2);
            spm_run *dense = run_of(model, 2, 1, 0), *pruned = run_of(model, 2, 1, 0);
            float *picture = noise(2 * 16 * 16 * 3, 1), keep[4 * 36], want[4];
            spm_status status;
            memset(keep, 0, sizeof keep);
            CHECK_INT(spm_run_set_mask(pruned, spm_model_find_parameter(model, "layer1.0.conv2.weight"), keep), SPM_OK);
            (void)spm_run_input(dense, value_of(model, "image"), picture);
            (void)spm_run_input(pruned, value_of(model, "image"), picture);
            CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
            memcpy(want, spm_run_data(pruned, value_of(model, "logits")), sizeof want);
            if (moved) {
                CHECK_INT(spm_run_keep(pruned, value_of(model, "block1")), SPM_OK);
                CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
                CHECK_INT(spm_run_set_mask(pruned, spm_model_find_parameter(model, "layer1.0.conv1.weight"), keep), SPM_OK);
                CHECK_INT(spm_run_set_mask(pruned, spm_model_find_parameter(model, "layer1.0.conv1.weight"), NULL), SPM_OK);
            }
            failing_after(&c, at - 1);
            status = spm_run_share(pruned, dense);
            c.fail_at = 0;
            if (status) {
                CHECK_INT(status, SPM_E_MEMORY);
                memset(spm_run_error(pruned), 0, sizeof(spm_error));
                if (at % 3 == 0) CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
            } else if (!moved) done = 1;
            if (!status || at % 3 == 0) {
                CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
                CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
                CHECK(same(want, spm_run_data(pruned, value_of(model, "logits")), 4));
            }
            spm_run_destroy(at % 2 ? dense : pruned);
            spm_run_destroy(at % 2 ? pruned : dense);
            free(picture);
            spm_model_destroy(model);
            spm_context_destroy(ctx);
            CHECK_INT(c.live, 0);
        }
    }
    CHECK(done);
}

/* A mask of whole units on what a batch norm adds, whose gradient the norm still reads when its step is over. */
static void test_masked_residual(void)
{
    spm_context *ctx = context(3);
    spm_program *p = spm_program_create(ctx);
    const int64_t sx[4] = { 4, 64, 64, 16 }, sw[4] = { 16, 3, 3, 16 }, sc[1] = { 16 };
    const int64_t n = 4 * 64 * 64 * 16;
    spm_value x = spm_program_parameter(p, "x", 4, sx, SPM_INIT_TRUNC_NORMAL, 0), c[4], y;
    spm_value w = spm_program_parameter(p, "w", 4, sw, SPM_INIT_HE_FAN_OUT, 0);
    spm_value r = spm_program_parameter(p, "r", 4, sx, SPM_INIT_TRUNC_NORMAL, 0);
    float *keep = noise(n, 1), *d = noise(n, 2);
    spm_model *model;
    spm_run *run;
    int64_t k;
    int i, way;
    double gradient[2] = { 0, 0 };
    for (i = 0; i < 4; i++) {
        char name[8];
        snprintf(name, sizeof name, "c%d", i);
        c[i] = spm_program_parameter(p, name, 1, sc, SPM_INIT_ONE, i < 2 ? 0 : SPM_PARAMETER_BUFFER);
    }
    y = spm_batch_norm(p, spm_conv2d(p, x, w, 0, 1, 1, 1, 1), c[0], c[1], c[2], c[3], r, 1e-5f, 1);
    spm_program_output(p, "y", y);
    model = spm_model_create(p, 5, NULL);
    for (k = 0; k < n; k++) keep[k] = k < n / 4 * 3 ? 0.0f : 1.0f;
    for (way = 0; way < 2; way++) { /* masked; then with zeros in its place */
        spm_parameter *residual = spm_model_parameter(model, spm_model_find_parameter(model, "r"));
        run = run_of(model, 4, 1, 0);
        if (!way) CHECK_INT(spm_run_set_mask(run, spm_model_find_parameter(model, "r"), keep), SPM_OK);
        for (k = 0; way && k < n; k++) residual->value.data[k] *= keep[k];
        spm_model_touch(model);
        spm_model_zero_gradients(model);
        CHECK_INT(spm_run_forward(run, 4, 1), SPM_OK);
        CHECK_INT(spm_run_set_gradient(run, y, d), SPM_OK);
        CHECK_INT(spm_run_backward(run), SPM_OK);
        spm_model_finish_gradients(model);
        for (k = 0; k < n; k++) CHECK(way || keep[k] > 0 || residual->gradient[k] == 0.0f);
        for (k = 0; k < 16 * 9 * 16; k++)
            gradient[way] += fabs((double)spm_model_parameter(model, spm_model_find_parameter(model, "w"))->gradient[k]);
        spm_run_destroy(run);
    }
    CHECK(gradient[0] > 0 && gradient[0] == gradient[1]);
    free(keep); free(d);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* What a run that shares with another one is told when the two do not go together. */
static void test_sharing_out_of_order(void)
{
    spm_context *ctx = context(1);
    spm_model *model = network(ctx, "resnet18:width=4,stem=cifar", 16, 2);
    spm_model *other = network(ctx, "resnet18:width=4,stem=cifar", 16, 2);
    spm_run *dense = run_of(model, 2, 1, 0), *pruned = run_of(model, 2, 1, 0), *third = run_of(model, 2, 1, 0);
    spm_run *plain = run_of(model, 2, 0, 0), *foreign = run_of(other, 2, 1, 0);
    spm_value image = value_of(model, "image"), logits = value_of(model, "logits"), block = value_of(model, "block5");
    float *picture = noise(2 * 16 * 16 * 3, 1), *d = noise(4, 2), *d_block = noise(2 * 8 * 8 * 8, 3), *keep = noise(16 * 16 * 9, 4);
    const int masked = spm_model_find_parameter(model, "layer3.0.conv2.weight");
    const int before = spm_model_find_parameter(model, "layer1.0.conv1.weight");
    size_t whole = spm_run_bytes(pruned), k;
    float *alone, *sum;
    int64_t total;
    double off = 0, top = 0;
    int turn;
    memset(keep, 0, 16 * sizeof(float));
    CHECK_INT(spm_run_set_mask(pruned, masked, keep), SPM_OK);
    refused(pruned, spm_run_share(pruned, pruned), SPM_E_ARGUMENT, "another run of the same model");
    refused(pruned, spm_run_share(pruned, plain), SPM_E_ARGUMENT, "backward = 1");
    refused(pruned, spm_run_share(pruned, foreign), SPM_E_ARGUMENT, "the same model");
    CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
    CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
    CHECK(spm_run_bytes(pruned) < whole);
    refused(third, spm_run_share(third, dense), SPM_E_ARGUMENT, "no third run");
    refused(third, spm_run_share(third, pruned), SPM_E_ARGUMENT, "no third run");
    refused(dense, spm_run_share(dense, third), SPM_E_ARGUMENT, "no third run");
    (void)spm_run_input(dense, image, picture);
    (void)spm_run_input(pruned, image, picture);
    refused(pruned, spm_run_forward(pruned, 2, 1), SPM_E_STATE, "behind a whole forward pass");
    CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
    refused(pruned, spm_run_forward(pruned, 1, 1), SPM_E_STATE, "as many examples");
    refused(pruned, spm_run_forward(pruned, 2, 0), SPM_E_STATE, "training mode");
    refused(pruned, spm_run_forward_from(pruned, block, 2, 1), SPM_E_STATE, "spm_run_share");
    CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
    CHECK_INT(spm_run_set_gradient(dense, logits, d), SPM_OK);
    CHECK_INT(spm_run_set_gradient(pruned, logits, d), SPM_OK);
    CHECK_INT(spm_run_backward(dense), SPM_OK);
    refused(pruned, spm_run_backward(pruned), SPM_E_STATE, "before that one");
    /* what was taken from a pass that is no more */
    CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
    CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
    CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
    refused(pruned, spm_run_backward(pruned), SPM_E_STATE, "wants a forward pass");
    refused(pruned, spm_run_commit_statistics(pruned, .1f), SPM_E_STATE, "no batch statistics");
    CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
    CHECK_INT(spm_run_keep(dense, value_of(model, "block6")), SPM_OK);
    refused(pruned, spm_run_backward(pruned), SPM_E_STATE, "wants a forward pass");
    /* a mask in the common part, a value of it that is wanted: not before they agree on it */
    CHECK_INT(spm_run_set_mask(pruned, before, keep), SPM_OK);
    CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
    refused(pruned, spm_run_forward(pruned, 2, 1), SPM_E_STATE, "call spm_run_share again");
    CHECK_INT(spm_run_set_mask(pruned, before, NULL), SPM_OK);
    CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
    CHECK_INT(spm_run_keep(pruned, value_of(model, "block3")), SPM_OK);
    refused(pruned, spm_run_forward(pruned, 2, 1), SPM_E_STATE, "call spm_run_share again");
    CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
    CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
    CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
    CHECK(spm_run_data(pruned, value_of(model, "block3")) != NULL);
    /* a gradient that the caller sends into what crosses over is added, whenever it comes */
    CHECK_INT(spm_run_share(pruned, NULL), SPM_OK);
    CHECK_INT(spm_run_keep(dense, block), SPM_OK);
    for (turn = 0, alone = NULL; turn < 3; turn++) {
        spm_model_zero_gradients(model);
        if (turn) CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
        CHECK_INT(spm_run_forward(dense, 2, 1), SPM_OK);
        CHECK_INT(spm_run_forward(pruned, 2, 1), SPM_OK);
        if (turn < 2) CHECK_INT(spm_run_set_gradient(dense, block, d_block), SPM_OK);
        CHECK_INT(spm_run_set_gradient(pruned, logits, d), SPM_OK);
        CHECK_INT(spm_run_backward(pruned), SPM_OK);
        if (turn == 2) CHECK_INT(spm_run_set_gradient(dense, block, d_block), SPM_OK);
        CHECK_INT(spm_run_backward(dense), SPM_OK);
        spm_model_finish_gradients(model);
        sum = gradients(model, &total);
        for (k = 0, off = top = 0; turn && k < (size_t)total; k++) {
            top = fmax(top, fabs((double)alone[k]));
            off = fmax(off, fabs((double)alone[k] - (double)sum[k]));
        }
        CHECK(off <= 2e-6 * top && (!turn || top > 0));
        if (turn) free(sum);
        else alone = sum;
    }
    CHECK_INT(spm_run_share(pruned, third), SPM_OK); /* and on to another one */
    CHECK_INT(spm_run_share(pruned, dense), SPM_OK);
    spm_run_destroy(dense);
    refused(pruned, spm_run_forward(pruned, 2, 1), SPM_E_STATE, "is gone");
    CHECK_INT(spm_run_share(pruned, NULL), SPM_OK);
    CHECK_INT(spm_run_forward(pruned, 2, 0), SPM_OK);
    free(picture); free(d); free(d_block); free(keep); free(alone);
    spm_run_destroy(pruned);
    spm_run_destroy(third);
    spm_run_destroy(plain);
    spm_run_destroy(foreign);
    spm_model_destroy(model);
    spm_model_destroy(other);
    spm_context_destroy(ctx);
}

static void test_frozen_parameters(void)
{
    spm_context *ctx = context(2);
    spm_model *model = network(ctx, "resnet20:width=4", 16, 2);
    spm_run *run = run_of(model, 3, 1, 0);
    float *image = noise(3 * 16 * 16 * 3, 1), *d = noise(6, 2), *all, *head;
    int64_t total;
    int i, count = spm_model_parameter_count(model);
    step(run, model, image, d, 3, 1);
    spm_model_finish_gradients(model);
    all = gradients(model, &total);
    for (i = 0; i < count; i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        if (!(p->flags & SPM_PARAMETER_HEAD)) p->flags |= SPM_PARAMETER_FROZEN;
        if (p->gradient) p->gradient[0] = 77;
    }
    spm_model_zero_gradients(model);
    step(run, model, image, d, 3, 1);
    for (i = 0; i < count; i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        if (p->gradient && !(p->flags & SPM_PARAMETER_HEAD)) CHECK(p->gradient[0] == 77.0f);
    }
    spm_model_finish_gradients(model);
    head = gradients(model, &total);
    CHECK(same(all + total - 2 * 16 - 2, head + total - 2 * 16 - 2, 2 * 16 + 2));
    CHECK(head[0] == 0.0f);
    free(image); free(d); free(all); free(head);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* ---- memory ---- */

static void test_steps_do_not_allocate(void)
{
    failing c = SPM_ZERO;
    spm_context *ctx = failing_context(&c, 2);
    spm_model *model = network(ctx, "resnet18:width=8,stem=cifar", 16, 2);
    spm_run *run = run_of(model, 4, 1, 1);
    spm_optimizer *optimizer = spm_optimizer_create(model, NULL, NULL);
    float *image = noise(4 * 16 * 16 * 3, 1), *d = noise(8, 2), *keep = noise(8 * 3 * 3 * 3, 3);
    double sums[16] = { 0 };
    long before;
    int i;
    CHECK_INT(spm_run_set_mask(run, 0, keep), SPM_OK);
    CHECK_INT(spm_run_hook(run, spm_model_parameter(model, 0)->id, SPM_HOOK_SUM_SQUARES, 1, sums), SPM_OK);
    CHECK_INT(spm_run_own_buffers(run, 1), SPM_OK);
    before = c.calls;
    for (i = 0; i < 3; i++) {
        spm_model_zero_gradients(model);
        step(run, model, image, d, i == 1 ? 3 : 4, i != 2);
        if (i != 2) CHECK_INT(spm_run_commit_statistics(run, .1f), SPM_OK);
        (void)spm_clip_gradients(model, 1);
        spm_optimizer_step(optimizer);
    }
    CHECK_INT(c.calls, before);
    free(image); free(d); free(keep);
    spm_optimizer_destroy(optimizer);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    CHECK_INT(c.live, 0);
}

/* Every allocation made to fail in turn: an error, no leak. */
static void test_failing_allocations(void)
{
    long at;
    int reached_end = 0;
    for (at = 1; at < 600 && !reached_end; at++) {
        failing c = SPM_ZERO;
        spm_context *ctx = failing_context(&c, 2);
        spm_arch arch;
        spm_error err;
        spm_model *model;
        spm_run *run = NULL;
        double out[64] = { 0 };
        float keep[4 * 27];
        spm_run_desc desc;
        memset(&arch, 0, sizeof arch);
        memset(&err, 0, sizeof err);
        memset(&desc, 0, sizeof desc);
        memset(keep, 0, sizeof keep);
        desc.backward = desc.segments = 1;
        arch.height = arch.width_px = 16;
        CHECK_INT(spm_arch_parse(ctx, "resnet18:width=4,stem=cifar", &arch, &err), SPM_OK);
        failing_after(&c, at - 1);
        model = spm_model_build(ctx, &arch, 1, &err);
        if (!model) CHECK_INT(err.status, SPM_E_MEMORY);
        if (model) run = spm_run_create(model, &desc, &err);
        if (model && !run) CHECK_INT(err.status, SPM_E_MEMORY);
        if (run) {
            spm_optimizer *optimizer = spm_optimizer_create(model, NULL, &err);
            int good = optimizer != NULL;
            good = !spm_run_set_mask(run, 0, keep) && good;
            good = !spm_run_own_buffers(run, 1) && good;
            good = !spm_run_hook(run, spm_model_parameter(model, 0)->norm_output, SPM_HOOK_VALUE_GRADIENT, 0, out) && good;
            good = !spm_run_hook(run, spm_model_parameter(model, 0)->id, SPM_HOOK_SUM, 1, out) && good;
            good = !spm_run_keep(run, spm_program_find(spm_model_program(model), "block2")) && good;
            if (good) reached_end = 1;
            else CHECK_INT(err.status ? err.status : spm_run_error(run)->status, SPM_E_MEMORY);
            spm_optimizer_destroy(optimizer);
        }
        c.fail_at = 0;
        spm_run_destroy(run);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
        CHECK_INT(c.live, 0);
    }
    CHECK(reached_end);
}

/* ---- hooks ---- */

static void zero_channel(void *user, spm_tensor *value)
{
    const int64_t c = value->shape[value->rank - 1], n = spm_tensor_count(value);
    int64_t i;
    for (i = *(int *)user; i < n; i += c) value->data[i] = 0.0f;
}

static void test_hooks(void)
{
    spm_context *ctx = context(2);
    spm_model *model = network(ctx, "resnet18:width=8,stem=cifar", 16, 2);
    int way, i, channel = 3;
    for (way = 0; way < 2; way++) {
        spm_run *run = run_of(model, 3, 1, way);
        spm_parameter *p = spm_model_parameter(model, spm_model_find_parameter(model, "layer2.0.conv1.weight"));
        spm_value v = p->norm_output;
        const int64_t c = p->value.shape[0], per = spm_tensor_count(&p->value) / c;
        float *image = noise(3 * 16 * 16 * 3, 1), *d = noise(6, 2);
        double sum[16] = { 0 }, squares[16] = { 0 }, product[16] = { 0 }, dsum[16] = { 0 }, dw[16] = { 0 }, wdw[16] = { 0 };
        CHECK_INT(spm_run_hook(run, v, SPM_HOOK_SUM, 0, sum), SPM_OK);
        CHECK_INT(spm_run_hook(run, v, SPM_HOOK_SUM_SQUARES, 0, squares), SPM_OK);
        CHECK_INT(spm_run_hook(run, v, SPM_HOOK_VALUE_GRADIENT, 0, product), SPM_OK);
        CHECK_INT(spm_run_hook(run, v, SPM_HOOK_SUM, 1, dsum), SPM_OK);
        CHECK_INT(spm_run_hook(run, p->id, SPM_HOOK_SUM_SQUARES, 1, dw), SPM_OK);
        CHECK_INT(spm_run_hook(run, p->id, SPM_HOOK_VALUE_GRADIENT, 1, wdw), SPM_OK);
        spm_model_zero_gradients(model);
        step(run, model, image, d, 3, 1);
        /* against a run that keeps the value */
        {
            spm_run *plain = run_of(model, 3, 1, 0);
            double want[4][16];
            int64_t k, n;
            const float *g, *x;
            memset(want, 0, sizeof want);
            CHECK_INT(spm_run_keep(plain, v), SPM_OK);
            spm_model_zero_gradients(model);
            step(plain, model, image, d, 3, 1);
            x = spm_run_data(plain, v);
            g = spm_run_gradient(plain, v);
            n = 3 * 8 * 8 * 16;
            CHECK(x && g && c == 16);
            for (k = 0; x && g && k < n; k++) {
                want[0][k % c] += (double)x[k];
                want[1][k % c] += (double)x[k] * (double)x[k];
                want[2][k % c] += (double)x[k] * (double)g[k];
                want[3][k % c] += (double)g[k];
            }
            for (i = 0; i < c; i++) {
                double s = 0, t = 0;
                CHECK_NEAR(sum[i], want[0][i], 1e-9 * (1 + fabs(want[0][i])));
                CHECK_NEAR(squares[i], want[1][i], 1e-9 * (1 + fabs(want[1][i])));
                CHECK_NEAR(product[i], want[2][i], 1e-9 * (1 + fabs(want[2][i])));
                CHECK_NEAR(dsum[i], want[3][i], 1e-9 * (1 + fabs(want[3][i])));
                for (k = 0; k < per; k++) {
                    s += (double)p->gradient[i * per + k] * (double)p->gradient[i * per + k];
                    t += (double)p->gradient[i * per + k] * (double)p->value.data[i * per + k];
                }
                CHECK_NEAR(dw[i], s, 1e-9 * (1 + s));
                CHECK_NEAR(wdw[i], t, 1e-9 * (1 + fabs(t)));
                CHECK(want[1][i] > 0 && s > 0);
            }
            spm_run_destroy(plain);
        }
        /* a write hook: the channel is gone, in the replay too */
        spm_run_clear_hooks(run);
        memset(sum, 0, sizeof sum);
        CHECK_INT(spm_run_hook_write(run, v, zero_channel, &channel), SPM_OK);
        CHECK_INT(spm_run_hook(run, v, SPM_HOOK_SUM_SQUARES, 0, sum), SPM_OK);
        spm_model_zero_gradients(model);
        step(run, model, image, d, 3, 1);
        CHECK(sum[3] == 0.0 && sum[2] > 0.0);
        { /* conv2's weight gradient of that input channel is exactly 0 */
            spm_parameter *q = spm_model_parameter(model, spm_model_find_parameter(model, "layer2.0.conv2.weight"));
            double s = 0, all = 0;
            int64_t k, m = spm_tensor_count(&q->value);
            for (k = 0; k < m; k++) {
                if (k % q->value.shape[3] == channel) s += fabs((double)q->gradient[k]);
                else all += fabs((double)q->gradient[k]);
            }
            CHECK(s == 0.0 && all > 0.0);
        }
        CHECK(spm_run_hook(run, 0, SPM_HOOK_SUM, 0, sum) == SPM_E_ARGUMENT);
        free(image);
        free(d);
        spm_run_destroy(run);
    }
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* ---- prefixes ---- */

static void test_forward_from(void)
{
    static const char names[][64] = { "resnet18:width=8,stem=cifar", "vit:patch=8,dim=24,depth=3,heads=3,mlp=2" };
    int i;
    for (i = 0; i < 2; i++) {
        spm_context *ctx = context(2);
        spm_model *model = network(ctx, names[i], 32, 3);
        spm_run *run = run_of(model, 4, 0, 0), *tail = run_of(model, 4, 1, 1);
        spm_value cut = value_of(model, "block3"), logits = value_of(model, "logits");
        float *image = noise(4 * 32 * 32 * 3, 1), *d = noise(12, 2), *stored, want[12];
        spm_tensor shape = spm_program_shape(spm_model_program(model), cut, 4);
        size_t bytes = (size_t)spm_tensor_count(&shape) * sizeof(float);
        CHECK(spm_run_data(run, cut) == NULL);
        CHECK_INT(spm_run_keep(run, cut), SPM_OK);
        (void)spm_run_input(run, value_of(model, "image"), image);
        CHECK_INT(spm_run_forward(run, 4, 0), SPM_OK);
        memcpy(want, spm_run_data(run, logits), sizeof want);
        stored = (float *)malloc(bytes);
        memcpy(stored, spm_run_data(run, cut), bytes);
        CHECK_INT(spm_run_input(tail, cut, stored), SPM_OK);
        CHECK_INT(spm_run_forward_from(tail, cut, 4, 0), SPM_OK);
        CHECK(same(spm_run_data(tail, logits), want, 12));
        /* parameters behind the cut get the same gradients, those before it none */
        CHECK_INT(spm_run_set_gradient(tail, logits, d), SPM_OK);
        CHECK_INT(spm_run_backward(tail), SPM_OK);
        {
            float *part, *whole;
            int64_t total, at = 0;
            int k;
            spm_run *full = run_of(model, 4, 1, 0);
            spm_model_finish_gradients(model);
            part = gradients(model, &total);
            spm_model_zero_gradients(model);
            step(full, model, image, d, 4, 0);
            spm_model_finish_gradients(model);
            whole = gradients(model, &total);
            for (k = 0; k < spm_model_parameter_count(model); k++) {
                spm_parameter *p = spm_model_parameter(model, k);
                int64_t e, n = spm_tensor_count(&p->value);
                if (!p->gradient) continue;
                if (p->block >= 3 || (p->flags & SPM_PARAMETER_HEAD)) CHECK_MSG(same(part + at, whole + at, n), p->name);
                else if (p->block) for (e = 0; e < n; e++) if (part[at + e] != 0.0f) { CHECK_MSG(0, p->name); break; }
                at += n;
            }
            free(part);
            free(whole);
            spm_run_destroy(full);
        }
        /* an interior value that the rest does not hang on alone: what goes around it must be bound too */
        {
            spm_parameter *p = spm_model_parameter(model, spm_model_find_parameter(model, i ? "blocks.2.attn.proj.weight" : "layer2.0.conv1.weight"));
            spm_run *whole = run_of(model, 4, 0, 0), *beside = run_of(model, 4, 0, 1);
            CHECK_INT(spm_run_keep(whole, p->norm_output), SPM_OK);
            (void)spm_run_input(whole, value_of(model, "image"), image);
            CHECK_INT(spm_run_forward(whole, 4, 0), SPM_OK);
            CHECK_INT(spm_run_input(beside, p->norm_output, spm_run_data(whole, p->norm_output)), SPM_OK);
            CHECK_INT(spm_run_forward_from(beside, p->norm_output, 4, 0), SPM_E_STATE);
            CHECK(strstr(spm_run_error(beside)->text, "before the value") != NULL);
            CHECK_INT(spm_run_input(beside, cut, stored), SPM_OK);
            CHECK_INT(spm_run_forward_from(beside, p->norm_output, 4, 0), SPM_OK);
            CHECK(same(spm_run_data(beside, logits), want, 12));
            stored[0] += 1.0f; /* and it is what is bound that counts */
            CHECK_INT(spm_run_forward_from(beside, p->norm_output, 4, 0), SPM_OK);
            CHECK(!same(spm_run_data(beside, logits), want, 12));
            spm_run_destroy(whole);
            spm_run_destroy(beside);
        }
        free(image);
        free(d);
        free(stored);
        spm_run_destroy(run);
        spm_run_destroy(tail);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
    }
}

/* ---- batch statistics ---- */

static void test_statistics(void)
{
    spm_context *ctx = context(1);
    spm_program *p = spm_program_create(ctx);
    int64_t sx[4] = { 0, 2, 1, 2 }, sc[1] = { 2 };
    spm_value x = spm_program_input(p, "x", 4, sx, 0);
    spm_value w = spm_program_parameter(p, "w", 1, sc, SPM_INIT_ONE, 0), b = spm_program_parameter(p, "b", 1, sc, SPM_INIT_ZERO, 0);
    spm_value mean = spm_program_parameter(p, "mean", 1, sc, SPM_INIT_ZERO, SPM_PARAMETER_BUFFER);
    spm_value var = spm_program_parameter(p, "var", 1, sc, SPM_INIT_ONE, SPM_PARAMETER_BUFFER);
    spm_value y = spm_batch_norm(p, x, w, b, mean, var, 0, 1e-5f, 0);
    static const float data[8] = { 1, 10, 2, 20, 3, 30, 6, 60 };
    spm_model *model;
    spm_run *run, *other;
    spm_program_output(p, "y", y);
    model = spm_model_create(p, 0, NULL);
    run = run_of(model, 2, 0, 0);
    other = run_of(model, 2, 0, 0);
    (void)spm_run_input(run, x, data);
    (void)spm_run_input(other, x, data);
    CHECK_INT(spm_run_forward(run, 2, 0), SPM_OK);
    CHECK_INT(spm_run_commit_statistics(run, .1f), SPM_E_STATE);
    CHECK_INT(spm_run_own_buffers(other, 1), SPM_OK);
    CHECK_INT(spm_run_forward(run, 2, 1), SPM_OK);
    CHECK_NEAR(spm_run_data(run, y)[0], -2 / sqrt(3.5), 1e-5);
    CHECK_NEAR(spm_run_buffer(run, 2)[0], 0, 0);
    CHECK_INT(spm_run_commit_statistics(run, .1f), SPM_OK);
    CHECK_NEAR(spm_run_buffer(run, 2)[0], .3, 1e-7);
    CHECK_NEAR(spm_run_buffer(run, 3)[0], .9 + .1 * 14 / 3, 1e-6); /* variance 3.5 of 4, unbiased 14/3 */
    CHECK_NEAR(spm_run_buffer(run, 3)[1], .9 + .1 * 1400 / 3, 1e-4);
    CHECK_NEAR(spm_run_buffer(other, 2)[0], 0, 0);
    CHECK_INT(spm_run_forward(other, 2, 1), SPM_OK);
    CHECK_INT(spm_run_commit_statistics(other, 1.0f), SPM_OK);
    CHECK_NEAR(spm_run_buffer(other, 2)[1], 30, 1e-5);
    CHECK_NEAR(spm_model_parameter(model, 2)->value.data[1], 3, 1e-6);
    CHECK_INT(spm_run_own_buffers(other, 0), SPM_OK);
    CHECK(spm_run_buffer(other, 2) == spm_model_parameter(model, 2)->value.data);
    CHECK(spm_run_buffer(other, 0) == NULL);
    spm_run_destroy(run);
    spm_run_destroy(other);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* ---- a loss over two runs, per-example results, defaults ---- */

static void test_loss_program(void)
{
    spm_context *ctx = context(1);
    spm_program *p = spm_program_create(ctx);
    int64_t s[2] = { 0, 3 };
    spm_value a = spm_program_input(p, "a", 2, s, 1), t = spm_program_input(p, "t", 2, s, 0), loss = spm_cross_entropy(p, a, t, 0, 0);
    static const float logits[6] = { 0, 0, 0, 1, 2, 3 }, target[6] = { 1, 0, 0, 0, 0, 1 };
    spm_model *model;
    spm_run *run;
    const float *g;
    spm_program_output(p, "loss", loss);
    spm_program_output(p, "each", spm_program_result(p, loss, 1));
    model = spm_model_create(p, 0, NULL);
    run = run_of(model, 4, 1, 0);
    CHECK_INT(spm_run_forward(run, 2, 1), SPM_E_STATE); /* nothing bound */
    CHECK(strstr(spm_run_error(run)->text, "value a is not bound") != NULL);
    memset(spm_run_error(run), 0, sizeof(spm_error));
    (void)spm_run_input(run, a, logits);
    (void)spm_run_input(run, t, target);
    CHECK_INT(spm_run_forward(run, 5, 1), SPM_E_ARGUMENT);
    CHECK_INT(spm_run_forward(run, 2, 1), SPM_OK);
    CHECK_NEAR(spm_run_data(run, loss)[0], (log(3.0) + 0.40760596444438) / 2, 1e-6);
    CHECK_NEAR(spm_run_data(run, loss + 1)[0], log(3.0), 1e-6);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    g = spm_run_gradient(run, a);
    CHECK(g != NULL);
    if (g) CHECK_NEAR(g[0], -1.0 / 3, 1e-6);
    CHECK(spm_run_gradient(run, t) == NULL);
    CHECK_INT(spm_run_backward(run), SPM_E_STATE);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* Calls out of order and arguments that do not fit. */
static void test_calls_out_of_order(void)
{
    spm_context *ctx = context(1);
    spm_model *model = network(ctx, "vit:patch=8,dim=24,depth=1,heads=3,mlp=2", 16, 3);
    const spm_program *program = spm_model_program(model);
    spm_run *run = run_of(model, 2, 1, 0), *plain = run_of(model, 2, 0, 0);
    spm_value image = value_of(model, "image"), logits = value_of(model, "logits"), block = value_of(model, "block1");
    spm_value in[SPM_OP_MAX_IN], probs = 0;
    float *picture = noise(2 * 16 * 16 * 3, 1), *d = noise(6, 2), *stored = noise(2 * 5 * 24, 3);
    double sum[64];
    spm_run_desc desc;
    spm_error err;
    spm_op op;
    int i, buffer;
    for (i = 0; i < spm_program_op_count(program); i++) {
        spm_value v = spm_program_op_at(program, i, &op, NULL, in);
        if (op == SPM_OP_ATTENTION) probs = v + 1;
    }
    memset(&err, 0, sizeof err);
    memset(&desc, 0, sizeof desc);
    desc.max_batch = -1;
    CHECK(spm_run_create(model, &desc, &err) == NULL && strstr(err.text, "max_batch is -1"));
    refused(run, spm_run_backward(run), SPM_E_STATE, "wants a forward pass");
    refused(run, spm_run_set_gradient(run, logits, d), SPM_E_STATE, "between forward and backward");
    refused(run, spm_run_commit_statistics(run, .1f), SPM_E_STATE, "no batch statistics");
    refused(run, spm_run_forward(run, 0, 0), SPM_E_ARGUMENT, "0 examples");
    refused(run, spm_run_forward(run, -3, 0), SPM_E_ARGUMENT, "-3 examples");
    refused(run, spm_run_forward(run, 3, 0), SPM_E_ARGUMENT, "3 examples");
    refused(run, spm_run_forward(run, 2, 0), SPM_E_STATE, "image is not bound");
    refused(run, spm_run_input(run, 0, picture), SPM_E_ARGUMENT, "spm_run_input");
    refused(run, spm_run_input(run, 100000, picture), SPM_E_ARGUMENT, "spm_run_input");
    refused(run, spm_run_input(run, spm_model_parameter(model, 0)->id, picture), SPM_E_ARGUMENT, "spm_run_input");
    refused(run, spm_run_keep(run, spm_model_parameter(model, 0)->id), SPM_E_ARGUMENT, "spm_run_keep");
    CHECK_INT(spm_run_keep(run, image), SPM_OK); /* of an input, its gradient */
    refused(run, spm_run_keep(run, -1), SPM_E_ARGUMENT, "spm_run_keep");
    refused(run, spm_run_forward_from(run, 0, 2, 0), SPM_E_ARGUMENT, "spm_run_forward_from");
    refused(run, spm_run_forward_from(run, block, 2, 0), SPM_E_STATE, "is not bound");
    refused(run, spm_run_set_mask(run, -1, d), SPM_E_ARGUMENT, "parameter -1");
    refused(run, spm_run_hook(run, logits, SPM_HOOK_SUM, 0, NULL), SPM_E_ARGUMENT, "spm_run_hook");
    refused(run, spm_run_hook(run, probs, SPM_HOOK_SUM, 1, sum), SPM_E_ARGUMENT, "a result that has none");
    refused(run, spm_run_hook(run, probs, SPM_HOOK_VALUE_GRADIENT, 0, sum), SPM_E_ARGUMENT, "a result that has none");
    refused(plain, spm_run_hook(plain, logits, SPM_HOOK_SUM, 1, sum), SPM_E_STATE, "backward = 1");
    refused(run, spm_run_hook_write(run, logits, NULL, NULL), SPM_E_ARGUMENT, "spm_run_hook_write");
    CHECK(spm_run_data(run, 0) == NULL && spm_run_gradient(run, logits) == NULL && spm_run_buffer(run, 0) == NULL);
    (void)spm_run_input(plain, image, picture);
    CHECK_INT(spm_run_forward(plain, 2, 1), SPM_OK);
    refused(plain, spm_run_set_gradient(plain, logits, d), SPM_E_STATE, "backward = 1");
    refused(plain, spm_run_backward(plain), SPM_E_STATE, "backward = 1");
    (void)spm_run_input(run, image, picture);
    CHECK_INT(spm_run_keep(run, probs), SPM_OK);
    CHECK_INT(spm_run_forward(run, 2, 1), SPM_OK);
    refused(run, spm_run_set_gradient(run, probs, stored), SPM_E_ARGUMENT, "spm_run_set_gradient");
    refused(run, spm_run_set_gradient(run, logits, NULL), SPM_E_ARGUMENT, "spm_run_set_gradient");
    refused(run, spm_run_set_gradient(run, block, stored), SPM_E_ARGUMENT, "spm_run_set_gradient");
    refused(run, spm_run_backward(run), SPM_E_STATE, "nothing to go backward from");
    /* the first error stays, and does not change what later calls answer */
    CHECK_INT(spm_run_forward(run, 3, 0), SPM_E_ARGUMENT);
    CHECK_INT(spm_run_backward(run), SPM_E_STATE);
    refused(run, spm_run_forward_from(run, block, 2, 0), SPM_E_STATE, "3 examples");
    spm_run_destroy(run);
    spm_run_destroy(plain);
    spm_model_destroy(model);
    /* buffers take no mask and no hook on a gradient they do not have */
    model = network(ctx, "resnet18:width=4,stem=cifar", 16, 3);
    run = run_of(model, 1, 1, 0);
    buffer = spm_model_find_parameter(model, "bn1.running_var");
    refused(run, spm_run_set_mask(run, buffer, d), SPM_E_ARGUMENT, "is a buffer");
    refused(run, spm_run_hook(run, spm_model_parameter(model, buffer)->id, SPM_HOOK_SUM, 1, sum), SPM_E_ARGUMENT,
            "of a buffer");
    CHECK(spm_program_flops(spm_model_program(model), 0, 0) == 0.0);
    CHECK_STR(spm_context_error(ctx), "");
    spm_run_destroy(run);
    spm_model_destroy(model);
    free(picture);
    free(d);
    free(stored);
    spm_context_destroy(ctx);
}

/* Hooks of a pass that begins in the middle: inputs it does not read are left alone (the picture is not even bound),
 * and the value it begins from is reduced like any other, but never written. */
static void test_hooks_of_prefixes(void)
{
    spm_context *ctx = context(1);
    spm_model *model = network(ctx, "resnet18:width=4,stem=cifar", 16, 3);
    spm_run *run = run_of(model, 2, 1, 0), *plain = run_of(model, 2, 1, 0);
    spm_value cut = value_of(model, "block3"), logits = value_of(model, "logits");
    spm_tensor shape = spm_program_shape(spm_model_program(model), cut, 2);
    const int64_t n = spm_tensor_count(&shape), c = shape.shape[3];
    float *stored = noise(n, 1), *d = noise(6, 2);
    double sum[8] = { 0 }, dsum[8] = { 0 }, product[8] = { 0 }, pixels[3] = { 0 }, want[3][8];
    const float *g;
    int64_t i;
    int channel = 1;
    CHECK(c <= 8);
    CHECK_INT(spm_run_hook(run, value_of(model, "image"), SPM_HOOK_SUM, 0, pixels), SPM_OK);
    CHECK_INT(spm_run_hook(run, cut, SPM_HOOK_SUM, 0, sum), SPM_OK);
    CHECK_INT(spm_run_hook(run, cut, SPM_HOOK_SUM, 1, dsum), SPM_OK);
    CHECK_INT(spm_run_hook(run, cut, SPM_HOOK_VALUE_GRADIENT, 0, product), SPM_OK);
    CHECK_INT(spm_run_hook_write(run, cut, zero_channel, &channel), SPM_OK);
    CHECK_INT(spm_run_input(run, cut, stored), SPM_OK);
    CHECK_INT(spm_run_forward_from(run, cut, 2, 0), SPM_OK);
    CHECK_INT(spm_run_set_gradient(run, logits, d), SPM_OK);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    CHECK_INT(spm_run_keep(plain, cut), SPM_OK);
    CHECK_INT(spm_run_input(plain, cut, stored), SPM_OK);
    CHECK_INT(spm_run_forward_from(plain, cut, 2, 0), SPM_OK);
    CHECK_INT(spm_run_set_gradient(plain, logits, d), SPM_OK);
    CHECK_INT(spm_run_backward(plain), SPM_OK);
    g = spm_run_gradient(plain, cut);
    CHECK(g != NULL);
    memset(want, 0, sizeof want);
    for (i = 0; g && i < n; i++) {
        want[0][i % c] += (double)stored[i];
        want[1][i % c] += (double)g[i];
        want[2][i % c] += (double)stored[i] * (double)g[i];
    }
    for (i = 0; i < c; i++) {
        CHECK_NEAR(sum[i], want[0][i], 1e-9 * (1 + fabs(want[0][i])));
        CHECK_NEAR(dsum[i], want[1][i], 1e-9 * (1 + fabs(want[1][i])));
        CHECK_NEAR(product[i], want[2][i], 1e-9 * (1 + fabs(want[2][i])));
    }
    CHECK(pixels[0] == 0.0 && sum[channel] != 0.0 && dsum[0] != 0.0);
    free(stored);
    free(d);
    spm_run_destroy(run);
    spm_run_destroy(plain);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

static void test_recording_errors(void)
{
    spm_context *ctx = context(1);
    spm_program *p = spm_program_create(ctx);
    int64_t sx[2] = { 0, 5 }, sw[2] = { 4, 6 };
    spm_value x = spm_program_input(p, "x", 2, sx, 0), w = spm_program_parameter(p, "w", 2, sw, SPM_INIT_ZERO, 0);
    spm_error err;
    memset(&err, 0, sizeof err);
    CHECK(x && w);
    CHECK_INT(spm_linear(p, x, w, 0), 0);
    CHECK_INT(spm_program_status(p), SPM_E_SHAPE);
    CHECK_INT(spm_relu(p, x), 0); /* a no-op now */
    CHECK(spm_model_create(p, 0, &err) == NULL);
    CHECK_INT(err.status, SPM_E_SHAPE);
    CHECK(strstr(err.text, "linear") && strstr(err.text, "[4,6]"));
    p = spm_program_create(ctx);
    memset(&err, 0, sizeof err);
    (void)spm_program_input(p, "x", 2, sx, 0);
    CHECK_INT(spm_program_input(p, "x", 2, sx, 0), 0);
    CHECK(spm_model_create(p, 0, &err) == NULL && strstr(err.text, "taken"));
    CHECK_INT(spm_relu(NULL, 1), 0);
    CHECK(spm_model_create(NULL, 0, &err) == NULL);
    CHECK_STR(spm_context_error(ctx), "");
    spm_context_destroy(ctx);
}

/* Every recorder enters its operation; the program can be read back, and be given up without a model. */
static void test_recorders(void)
{
    static const spm_op ops[] = {
        SPM_OP_CONV2D, SPM_OP_BATCH_NORM, SPM_OP_RELU, SPM_OP_MAX_POOL, SPM_OP_AVG_POOL, SPM_OP_DROPOUT, SPM_OP_TOKENS,
        SPM_OP_LAYER_NORM, SPM_OP_LINEAR, SPM_OP_ATTENTION, SPM_OP_GELU, SPM_OP_DROP_PATH, SPM_OP_ADD, SPM_OP_TOKEN,
        SPM_OP_SOFTMAX, SPM_OP_GLOBAL_POOL, SPM_OP_NTXENT, SPM_OP_CROSS_ENTROPY
    };
    spm_context *ctx = context(1);
    spm_program *p = spm_program_create(ctx);
    int64_t sx[4] = { 0, 9, 9, 3 }, sw[4] = { 6, 3, 3, 3 }, sc[1] = { 6 }, st[2] = { 1, 6 }, sp[2] = { 5, 6 };
    int64_t sq[2] = { 18, 6 };
    spm_value x = spm_program_input(p, "x", 4, sx, 0), w = spm_program_parameter(p, "w", 4, sw, SPM_INIT_ZERO, 0);
    spm_value c[4], t = spm_program_parameter(p, "t", 2, st, SPM_INIT_ZERO, 0), y, z, in[SPM_OP_MAX_IN];
    spm_value pos = spm_program_parameter(p, "p", 2, sp, SPM_INIT_ZERO, 0);
    spm_value q = spm_program_parameter(p, "q", 2, sq, SPM_INIT_ZERO, 0);
    spm_op op;
    spm_op_attr attr;
    int i;
    for (i = 0; i < 4; i++) {
        char name[16];
        snprintf(name, sizeof name, "c%d", i);
        c[i] = spm_program_parameter(p, name, 1, sc, SPM_INIT_ONE, 0);
    }
    y = spm_relu(p, spm_batch_norm(p, spm_conv2d(p, x, w, 0, 1, 1, 1, 1), c[0], c[1], c[2], c[3], 0, 1e-5f, 1));
    y = spm_dropout(p, spm_avg_pool(p, spm_max_pool(p, y, 3, 2, 1), 2, 2, 0), .5f); /* 9, 5, 2 pixels */
    z = spm_tokens(p, y, t, pos);
    z = spm_attention(p, spm_linear(p, spm_layer_norm(p, z, c[0], c[1], 1e-6f), q, 0), 2);
    z = spm_softmax(p, spm_token(p, spm_add(p, z, spm_drop_path(p, spm_gelu(p, z), .1f)), 4));
    (void)spm_ntxent(p, spm_global_pool(p, y), z, .5f);
    spm_program_mark(p, "middle", z);
    spm_program_segment(p);
    (void)spm_cross_entropy(p, z, z, 0, 0);
    CHECK_INT(spm_program_status(p), SPM_OK);
    CHECK_INT(spm_program_op_count(p), (int)(sizeof ops / sizeof *ops));
    for (i = 0; i < spm_program_op_count(p); i++) {
        CHECK(spm_program_op_at(p, i, &op, &attr, in) > 0);
        CHECK_STR(spm_op_name(op), spm_op_name(ops[i]));
    }
    CHECK_INT(spm_program_op_at(p, i, NULL, NULL, NULL), 0);
    CHECK(spm_program_find(p, "middle") == z && spm_program_find(p, "nowhere") == 0);
    CHECK_INT(spm_program_shape(p, z, 7).shape[0], 7);
    CHECK(spm_program_flops(p, 2, 1) > spm_program_flops(p, 2, 0));
    spm_program_destroy(p);
    spm_program_destroy(NULL);
    CHECK_STR(spm_context_error(ctx), "");
    spm_context_destroy(ctx);
}

/* Batch 1, 3 and 4 give the same logits for the same picture; fewer examples than max_batch are fine. */
static void test_batches_do_not_matter(void)
{
    static const char names[][64] = { "resnet18:width=8", "vit:patch=16,dim=48,depth=2,heads=3", "resnet50:width=8,groups=2" };
    int i;
    for (i = 0; i < 3; i++) {
        spm_context *ctx = context(2);
        spm_model *model = network(ctx, names[i], 64, 5);
        spm_run *run = run_of(model, 4, 0, 0);
        float *image = noise(4 * 64 * 64 * 3, 1), want[20];
        spm_value logits = value_of(model, "logits");
        (void)spm_run_input(run, value_of(model, "image"), image);
        CHECK_INT(spm_run_forward(run, 4, 0), SPM_OK);
        memcpy(want, spm_run_data(run, logits), sizeof want);
        CHECK_INT(spm_run_forward(run, 1, 0), SPM_OK);
        CHECK_MSG(same(spm_run_data(run, logits), want, 5), names[i]);
        CHECK_INT(spm_run_forward(run, 3, 0), SPM_OK);
        CHECK_MSG(same(spm_run_data(run, logits), want, 15), names[i]);
        CHECK_INT(spm_run_tensor(run, logits).shape[0], 3);
        free(image);
        spm_run_destroy(run);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
    }
}

/* ---- two runs of one model at the same time: tasks of a parallel-for each own one ---- */

typedef struct side_job {
    spm_run *run[2];
    spm_value image, logits;
    const float *data[2];
    int failed;
} side_job;

static void side_task(void *arg, int64_t task, int slot)
{
    side_job *job = (side_job *)arg;
    int i;
    (void)slot;
    for (i = 0; i < 3; i++) {
        if (spm_run_input(job->run[task], job->image, job->data[task]) || spm_run_forward(job->run[task], 2, 0)) job->failed = 1;
    }
}

static void test_runs_on_two_threads(void)
{
    spm_context *ctx = context(2);
    spm_model *model = network(ctx, "resnet18:width=8,stem=cifar", 32, 3);
    float *a = noise(2 * 32 * 32 * 3, 1), *b = noise(2 * 32 * 32 * 3, 2), want[2][6];
    side_job job;
    int k;
    memset(&job, 0, sizeof job);
    job.image = value_of(model, "image");
    job.logits = value_of(model, "logits");
    job.data[0] = a;
    job.data[1] = b;
    for (k = 0; k < 2; k++) {
        job.run[k] = run_of(model, 2, 0, 0);
        side_task(&job, k, 0);
        memcpy(want[k], spm_run_data(job.run[k], job.logits), sizeof want[k]);
    }
    spm_model_touch(model);
    spm_parallel(ctx, 2, side_task, &job);
    CHECK_INT(job.failed, 0);
    for (k = 0; k < 2; k++) {
        CHECK(same(spm_run_data(job.run[k], job.logits), want[k], 6));
        spm_run_destroy(job.run[k]);
    }
    CHECK(!same(want[0], want[1], 6));
    free(a);
    free(b);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* Three application threads train on one context: one of them at a time gets the pool. */
typedef struct trainee {
    spm_context *ctx;
    float *image, *gradients; /* of three passes backward, one behind the other */
    int failed;
} trainee;
enum { TRAINING_ROOM = 3 * 500000 };

static void *train_alone(void *user)
{
    trainee *t = (trainee *)user;
    spm_model *model = network(t->ctx, "resnet50:width=8", 32, 4);
    spm_run *run = run_of(model, 4, 1, 0);
    float upstream[16], *to = t->gradients;
    int k, p;
    for (k = 0; k < 16; k++) upstream[k] = 0.1f * (float)(k - 7);
    t->failed = spm_run_input(run, value_of(model, "image"), t->image) != SPM_OK;
    for (k = 0; k < 3; k++) {
        t->failed |= spm_run_forward(run, 4, 1) || spm_run_set_gradient(run, value_of(model, "logits"), upstream);
        spm_model_zero_gradients(model);
        t->failed |= spm_run_backward(run) != SPM_OK;
        for (p = 0; p < spm_model_parameter_count(model); p++) {
            const spm_parameter *own = spm_model_parameter(model, p);
            const int64_t n = spm_tensor_count(&own->value);
            if (own->flags & SPM_PARAMETER_BUFFER) continue;
            if ((t->failed |= n > t->gradients + TRAINING_ROOM - to) != 0) break;
            memcpy(to, own->gradient, (size_t)n * sizeof(float));
            to += n;
        }
    }
    spm_run_destroy(run);
    spm_model_destroy(model);
    return NULL;
}

static void test_training_on_three_threads(void)
{
    float *image = noise(4 * 32 * 32 * 3, 1);
    trainee t[4];
    pthread_t thread[3];
    int k, started = 0;
    for (k = 0; k < 4; k++) { /* the last one: on one thread */
        memset(&t[k], 0, sizeof t[k]);
        t[k].ctx = k % 3 == 0 ? context(k ? 1 : 3) : t[0].ctx;
        t[k].image = image;
        t[k].gradients = (float *)calloc(TRAINING_ROOM, sizeof(float));
    }
    (void)train_alone(&t[3]);
    while (started < 3 && pthread_create(&thread[started], NULL, train_alone, &t[started]) == 0) started++;
    for (k = 0; k < started; k++) {
        pthread_join(thread[k], NULL);
        CHECK(!t[k].failed && same(t[k].gradients, t[3].gradients, TRAINING_ROOM));
    }
    CHECK(!t[3].failed && t[3].gradients[0] != 0.0f);
    for (k = 0; k < 4; k++) {
        free(t[k].gradients);
        if (k % 3 == 0) spm_context_destroy(t[k].ctx);
    }
    free(image);
    if (started < 3) SKIP("no thread");
}

/* A convolution and its batch norm in one pass over memory (runs without backward) give the bits of two passes (runs
 * with), also in training, with a hook between them, with a kept value between them, and started in the middle. */
static void test_norms_in_one_go(void)
{
    spm_error err = SPM_ZERO;
    spm_context *ctx = spm_context_create(NULL);
    static const char nets[][40] = { "resnet18:width=32,stem=cifar", "resnet50:width=8", "resnext50_32x4d:width=16" };
    int i, k;
    for (i = 0; i < 3; i++) {
        spm_arch arch = SPM_ZERO;
        spm_run_desc desc = SPM_ZERO;
        float *pixels = (float *)malloc(sizeof(float) * 3 * 3 * 40 * 36), *want;
        spm_model *model = NULL;
        spm_run *two, *one;
        spm_value image, logits, conv = 0;
        size_t bytes;
        double sum[512];
        CHECK_INT(spm_arch_parse(ctx, nets[i], &arch, &err), SPM_OK);
        arch.height = 40;
        arch.width_px = 36;
        arch.classes = 5;
        model = spm_model_build(ctx, &arch, 3, &err);
        CHECK(model != NULL);
        if (!model) return;
        image = spm_program_find(spm_model_program(model), "image");
        logits = spm_program_find(spm_model_program(model), "logits");
        conv = spm_model_parameter(model, spm_model_find_parameter(model, "layer2.0.conv1.weight"))->output;
        for (k = 0; k < 3 * 3 * 40 * 36; k++) pixels[k] = spm_random_normal(5, 1, (uint64_t)k);
        desc.max_batch = 3;
        one = spm_run_create(model, &desc, &err);
        desc.backward = 1;
        two = spm_run_create(model, &desc, &err);
        CHECK(one && two);
        spm_run_input(one, image, pixels);
        spm_run_input(two, image, pixels);
        bytes = sizeof(float) * (size_t)(3 * arch.classes);
        want = (float *)malloc(bytes);
        for (k = 0; k < 5; k++) { /* training, evaluation with its statistics, a hook, a kept value, training again */
            const int training = k == 0 || k == 4;
            if (k == 2) CHECK_INT(spm_run_hook(one, conv, SPM_HOOK_SUM, 0, sum), SPM_OK);
            if (k == 3) CHECK_INT(spm_run_keep(one, conv), SPM_OK);
            memset(sum, 0, sizeof sum);
            CHECK_INT(spm_run_forward(two, 3, training), SPM_OK);
            memcpy(want, spm_run_data(two, logits), bytes);
            CHECK_INT(spm_run_forward(one, 3, training), SPM_OK);
            CHECK(memcmp(want, spm_run_data(one, logits), bytes) == 0);
            if (k == 0) CHECK_INT(spm_run_commit_statistics(one, 0.7f), SPM_OK);
            if (k == 2) CHECK(sum[0] != 0.0 && sum[1] != 0.0);
            if (k == 3) CHECK(spm_run_data(one, conv) != NULL);
        }
        free(want);
        free(pixels);
        spm_run_destroy(one);
        spm_run_destroy(two);
        spm_model_destroy(model);
    }
    spm_context_destroy(ctx);
}

/* ---- passes of batch norms inside the convolutions beside them ---- */

/* A convolution with a batch norm behind it: parameters named after `i`. */
static spm_value conv_norm(spm_program *p, int i, spm_value x, spm_value w, const spm_op_attr *attr, spm_value residual)
{
    const int64_t sc[1] = { 16 };
    char name[4][8];
    spm_value in[6];
    spm_op_attr norm;
    int k;
    for (k = 0; k < 4; k++) sprintf(name[k], "%c%d", "gbmv"[k], i);
    in[0] = x;
    in[1] = w;
    x = spm_program_op(p, SPM_OP_CONV2D, in, 2, attr);
    memset(&norm, 0, sizeof norm);
    norm.relu = 1;
    norm.eps = 1e-5f;
    in[0] = x;
    in[1] = spm_program_parameter(p, name[0], 1, sc, SPM_INIT_ONE, 0);
    in[2] = spm_program_parameter(p, name[1], 1, sc, SPM_INIT_ZERO, 0);
    in[3] = spm_program_parameter(p, name[2], 1, sc, SPM_INIT_ZERO, SPM_PARAMETER_BUFFER);
    in[4] = spm_program_parameter(p, name[3], 1, sc, SPM_INIT_ONE, SPM_PARAMETER_BUFFER);
    in[5] = residual < 0 ? x : residual;
    return spm_program_op(p, SPM_OP_BATCH_NORM, in, residual ? 6 : 5, &norm);
}

/* Convolutions with batch norms that stand in each other's way.  0: a wide, dilated stride, which leaves three of four
 * phases of dx without a tap and adds to what another reader has sent, one of 1x1 that passes over three of four pixels, a
 * residual; 1: a residual that is the norm's own x; 2: weights that are computed; 3: more padding than kernel; 4: a
 * picture that is its own weight. */
static spm_model *odd_network(spm_context *ctx, int kind)
{
    spm_program *p = spm_program_create(ctx);
    const int64_t sx[4] = { 0, 64, 64, 16 }, s3[4] = { 16, 3, 3, 16 }, s1[4] = { 16, 1, 1, 16 };
    spm_value x = spm_program_input(p, "image", 4, sx, 1), before = 0, second = 0, w, in[2];
    spm_op_attr attr;
    int i;
    for (i = 0; i < 5; i++) {
        const int wide = kind == 0 && i == 2, point = (kind == 0 && i == 3) || (kind == 3 && i % 2);
        char name[2][8];
        sprintf(name[0], "w%d", i);
        sprintf(name[1], "u%d", i);
        memset(&attr, 0, sizeof attr);
        attr.stride[0] = attr.stride[1] = kind == 0 && (i == 2 || i == 3) ? 2 : 1;
        if (kind == 3 && point) attr.stride[1] = 4;
        attr.dilation[0] = attr.dilation[1] = wide ? 2 : 1;
        attr.padding[0] = attr.padding[1] = wide ? 2 : !point;
        if (kind == 3 && point) attr.padding[0] = 2;
        w = spm_program_parameter(p, name[0], 4, point ? s1 : s3, SPM_INIT_HE_FAN_OUT, 0);
        if (kind == 2) w = spm_add(p, w, spm_program_parameter(p, name[1], 4, s3, SPM_INIT_HE_FAN_OUT, 0));
        x = conv_norm(p, i, x, w, &attr, kind == 1 ? -1 : kind == 0 && i == 1 ? before : 0);
        before = x;
        if (i == 1) second = x;
    }
    if (kind == 4) {
        memset(&attr, 0, sizeof attr);
        in[0] = in[1] = x;
        x = spm_program_op(p, SPM_OP_CONV2D, in, 2, &attr); /* [4,1,1,4] */
        spm_program_output(p, "logits", spm_global_pool(p, x));
    } else {
        spm_program_output(p, "logits", spm_add(p, spm_global_pool(p, x), spm_global_pool(p, second)));
    }
    return spm_model_create(p, 5, NULL);
}

/* Where every value and gradient is watched, passes are jobs of their own; else they go on beside: the same bits. */
static void test_passes_beside(void)
{
    static const char nets[][48] = { "", "", "", "", "", "resnet18:width=32,stem=cifar", "resnet50:width=16,stem=cifar",
                                     "resnext50_32x4d:width=16,stem=cifar" };
    int i, way, v, mode;
    for (i = 0; i < 8; i++) {
        const int channels = i < 5 ? 16 : 3;
        float *image = noise(4 * 64 * 64 * channels, 1), *d = noise(4 * 16, 2);
        double *sums = (double *)malloc(4096 * sizeof *sums);
        for (mode = 0; mode < (i < 5 ? 3 : 4); mode++) { /* plain, half of it frozen, bf16, without Winograd if it has any */
            float *want[2] = { NULL, NULL }, *dx = NULL;
            /* watched; then with one thread and three, segments, kept norms (under sanitizers, which take minutes: plain only) */
            for (way = 0; way < (mode && getenv("SPURMEM_SANITIZED") ? 3 : 5); way++) {
                int training;
                int64_t total = 0;
                spm_context_desc machine = SPM_ZERO;
                spm_context *ctx;
                spm_model *model;
                const spm_program *program;
                spm_run_desc desc = SPM_ZERO;
                spm_run *run;
                machine.threads = way == 1 ? 1 : 3;
                machine.precision = mode == 2 ? SPM_PRECISION_BF16 : SPM_PRECISION_FP32;
                machine.direct_convolution = mode == 3;
                ctx = spm_context_create(&machine);
                model = i < 5 ? odd_network(ctx, i) : network(ctx, nets[i], 64, 3);
                program = spm_model_program(model);
                for (v = 0; mode == 1 && v < spm_model_parameter_count(model); v++) {
                    if (v % 2 == 0) spm_model_parameter(model, v)->flags |= SPM_PARAMETER_FROZEN;
                }
                desc.max_batch = 4;
                desc.backward = 1;
                desc.segments = way == 3;
                desc.keep_norms = way == 4;
                desc.seed = 11;
                run = spm_run_create(model, &desc, NULL);
                for (v = 1; way == 0 && spm_program_shape(program, v, 1).rank; v++) {
                    (void)spm_run_hook(run, v, SPM_HOOK_SUM, 0, sums);
                    (void)spm_run_hook(run, v, SPM_HOOK_SUM, 1, sums);
                    spm_run_error(run)->status = SPM_OK;
                    spm_run_error(run)->text[0] = 0;
                }
                for (training = 1; training >= 0; training--) {
                    float *got;
                    spm_model_zero_gradients(model);
                    step(run, model, image, d, 4, training);
                    spm_model_finish_gradients(model);
                    got = gradients(model, &total);
                    if (way == 0) want[training] = got;
                    else {
                        CHECK_MSG(same(want[training], got, total), i < 5 ? "odd network" : nets[i]);
                        free(got);
                    }
                }
                if (i < 5) { /* the gradient of the input as well */
                    const size_t bytes = 4 * 64 * 64 * 16 * sizeof(float);
                    const float *now = spm_run_gradient(run, spm_program_find(program, "image"));
                    CHECK(now != NULL);
                    if (way == 0) memcpy(dx = (float *)malloc(bytes), now, bytes);
                    else CHECK(memcmp(dx, now, bytes) == 0);
                }
                spm_run_destroy(run);
                spm_model_destroy(model);
                spm_context_destroy(ctx);
            }
            free(want[0]);
            free(want[1]);
            free(dx);
        }
        free(image);
        free(d);
        free(sums);
    }
}

static void add_one(void *user, spm_tensor *value)
{
    int64_t i;
    for (i = 0; i < spm_tensor_count(value); i++) value->data[i] += 1.0f;
    ++*(int *)user;
}

/* A hook that writes to a batch norm's mean comes behind the result that was made with it. */
static void test_hook_behind_norm(void)
{
    float *image = noise(4 * 64 * 64 * 16, 1), *d = noise(4 * 16, 2), want[64];
    int way, calls = 0;
    for (way = 0; way < 2; way++) {
        spm_context *ctx = context(2);
        spm_model *model = odd_network(ctx, 0);
        spm_run *run = run_of(model, 4, 1, 0);
        spm_value norm = 0, got, in[SPM_OP_MAX_IN];
        spm_op op = SPM_OP_NONE;
        spm_op_attr attr;
        int i;
        for (i = 0; op != SPM_OP_BATCH_NORM; i++) norm = spm_program_op_at(spm_model_program(model), i, &op, &attr, in);
        if (way) CHECK_INT(spm_run_hook_write(run, norm + 1, add_one, &calls), SPM_OK);
        step(run, model, image, d, 4, 1);
        got = value_of(model, "logits");
        if (way) CHECK(memcmp(want, spm_run_data(run, got), sizeof want) == 0);
        else memcpy(want, spm_run_data(run, got), sizeof want);
        spm_run_destroy(run);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
    }
    CHECK(calls > 0);
    free(image);
    free(d);
}

int main(void)
{
    TEST(test_gradients_of_all_ops);
    TEST(test_ops_read_what_they_say);
    TEST(test_plans_and_segments_change_nothing);
    TEST(test_shared_values);
    TEST(test_masks_and_accumulation);
    TEST(test_shared_branches);
    TEST(test_shared_program);
    TEST(test_failing_share);
    TEST(test_masked_residual);
    TEST(test_sharing_out_of_order);
    TEST(test_frozen_parameters);
    TEST(test_steps_do_not_allocate);
    TEST(test_failing_allocations);
    TEST(test_hooks);
    TEST(test_forward_from);
    TEST(test_norms_in_one_go);
    TEST(test_passes_beside);
    TEST(test_hook_behind_norm);
    TEST(test_statistics);
    TEST(test_loss_program);
    TEST(test_calls_out_of_order);
    TEST(test_hooks_of_prefixes);
    TEST(test_recording_errors);
    TEST(test_recorders);
    TEST(test_batches_do_not_matter);
    TEST(test_runs_on_two_threads);
    TEST(test_training_on_three_threads);
    return TEST_END;
}
