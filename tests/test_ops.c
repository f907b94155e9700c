/* test_ops.c - every operation: against PyTorch (golden/ops.bin, made by golden/make_ops.py), against plain double
 * code, gradients against central differences of that code, the same bits for 1, 2 and 3 threads, on every
 * instruction set that is there; and the corner cases one by one. */
#include "../spurmem.h"
#include "test.h"

#define THREADS 3

/* contexts of one instruction set with 1, 2 and 3 threads */
static spm_context *ctx_of[THREADS];

static int open_contexts(spm_isa isa)
{
    int i;
    for (i = 0; i < THREADS; i++) {
        spm_context_desc desc = SPM_ZERO;
        desc.isa = isa;
        desc.threads = i + 1;
        ctx_of[i] = spm_context_create(&desc);
        if (!ctx_of[i]) {
            while (i-- > 0) spm_context_destroy(ctx_of[i]);
            return 0;
        }
    }
    return 1;
}

static void close_contexts(void)
{
    int i;
    for (i = 0; i < THREADS; i++) spm_context_destroy(ctx_of[i]);
}

/* ---- cases ---- */

typedef struct op_case {
    spm_op op;
    const char *label;
    int64_t shape[SPM_OP_MAX_IN][SPM_MAX_RANK]; /* 0 ends a shape; nothing at [0]: no such input */
    spm_op_attr attr;
    int training, number;
    float scale[SPM_OP_MAX_IN], offset[SPM_OP_MAX_IN];
    char text[48];
} op_case;

/* The hash that make_ops.py has as well: 24 bits in [-1, 1). */
static float uniform(uint32_t seed, uint32_t index)
{
    uint32_t x = index * 2654435761u + seed * 0x9E3779B9u + 1u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    x ^= x >> 16;
    return (float)(x >> 8) / 8388608.0f - 1.0f;
}

static float *new_floats(int64_t n)
{
    char *raw = (char *)malloc((size_t)n * sizeof(float) + 128);
    char *at = raw + 64 + sizeof(void *) - ((uintptr_t)(raw + sizeof(void *)) & 63);
    memcpy(at - sizeof(void *), &raw, sizeof raw);
    memset(at, 0xff, (size_t)n * sizeof(float)); /* not-a-number: whoever reads before writing is found out */
    return (float *)(void *)at;
}

static void free_floats(float *p)
{
    void *raw;
    if (!p) return;
    memcpy(&raw, (char *)p - sizeof(void *), sizeof raw);
    free(raw);
}

/* A call with all its memory. */
static spm_error last_error;

static int prepare(spm_context *ctx, const op_case *test, spm_op_call *call)
{
    int i, k;
    size_t scratch, other;
    memset(call, 0, sizeof *call);
    last_error.status = SPM_OK;
    last_error.text[0] = 0;
    call->attr = test->attr;
    call->training = test->training;
    call->seed = 5;
    call->stream = 7;
    for (i = 0; i < SPM_OP_MAX_IN; i++) {
        const int64_t *s = test->shape[i];
        int64_t count, j;
        int rank = 0;
        for (k = 0; k < SPM_MAX_RANK && s[k]; k++) rank++;
        if (!rank) continue;
        call->in[i] = spm_tensor_make(NULL, rank, s[0], s[1], s[2], s[3]);
        count = spm_tensor_count(&call->in[i]);
        call->in[i].data = new_floats(count);
        for (j = 0; j < count; j++) {
            call->in[i].data[j] = test->scale[i] * uniform((uint32_t)(1000 * test->number + i),
                                                           (uint32_t)j) + test->offset[i];
        }
        call->n_in = i + 1;
    }
    if (spm_op_infer(ctx, test->op, call, &last_error)) return 0;
    for (i = 0; i < call->n_out; i++) call->out[i].data = new_floats(spm_tensor_count(&call->out[i]));
    call->d_out = call->out[0];
    call->d_out.data = new_floats(spm_tensor_count(&call->out[0]));
    for (i = 0; i < spm_tensor_count(&call->out[0]); i++) {
        call->d_out.data[i] = uniform((uint32_t)(1000 * test->number + 99), (uint32_t)i);
    }
    for (i = 0; i < call->n_in; i++) {
        if (!call->in[i].data || !spm_op_differentiable(test->op, i)) continue;
        call->d_in[i] = call->in[i];
        call->d_in[i].data = new_floats(spm_tensor_count(&call->in[i]));
    }
    scratch = spm_op_scratch(ctx, test->op, call, 0);
    other = spm_op_scratch(ctx, test->op, call, 1);
    if (other > scratch) scratch = other;
    call->scratch = new_floats((int64_t)(scratch / sizeof(float)) + 16);
    other = spm_op_packed(ctx, test->op, call);
    if (other) call->packed = new_floats((int64_t)(other / sizeof(float)) + 16);
    return 1;
}

static void release(spm_op_call *call)
{
    int i;
    for (i = 0; i < SPM_OP_MAX_IN; i++) {
        free_floats(call->in[i].data);
        free_floats(call->d_in[i].data);
    }
    for (i = 0; i < SPM_OP_MAX_OUT; i++) free_floats(call->out[i].data);
    free_floats(call->d_out.data);
    free_floats((float *)call->scratch);
    free_floats((float *)call->packed);
}

static void complain(const op_case *test, spm_context *ctx, const char *what, double value)
{
    char text[200];
    snprintf(text, sizeof text, "%s (%s) on %s: %s %.3g", spm_op_name(test->op), test->label,
             spm_isa_name(spm_context_isa(ctx)), what, value);
    CHECK_MSG(0, text);
}

/* Runs the case on 1, 2 and 3 threads; the results of 1 thread stay in *call, and the others must have the same bits.
 * */
static int run_case(const op_case *test, spm_op_call *call)
{
    int i, k;
    if (!prepare(ctx_of[0], test, call)) {
        complain(test, ctx_of[0], last_error.text, 0.0);
        release(call);
        return 0;
    }
    spm_op_forward(ctx_of[0], test->op, call);
    spm_op_backward(ctx_of[0], test->op, call);
    for (k = 1; k < THREADS; k++) {
        spm_op_call again;
        if (!prepare(ctx_of[k], test, &again)) return 0;
        spm_op_forward(ctx_of[k], test->op, &again);
        spm_op_backward(ctx_of[k], test->op, &again);
        for (i = 0; i < call->n_out; i++) {
            if (test->op == SPM_OP_MAX_POOL && i == 1) continue; /* its padding bytes are nobody's */
            if (memcmp(call->out[i].data, again.out[i].data, (size_t)spm_tensor_count(&call->out[i]) * sizeof(float))) {
                complain(test, ctx_of[k], "other bits with more threads, output", (double)i);
            }
        }
        for (i = 0; i < call->n_in; i++) {
            if (call->d_in[i].data && memcmp(call->d_in[i].data, again.d_in[i].data,
                                             (size_t)spm_tensor_count(&call->in[i]) * sizeof(float))) {
                complain(test, ctx_of[k], "other bits with more threads, gradient", (double)i);
            }
        }
        release(&again);
    }
    return 1;
}

/* ---- golden numbers ---- */

static const unsigned char *golden, *golden_end;

static int32_t take_int(void)
{
    uint32_t v = 0;
    int i;
    for (i = 0; i < 4 && golden + i < golden_end; i++) v |= (uint32_t)golden[i] << 8 * i;
    golden += 4;
    return (int32_t)v;
}

static float take_float(void)
{
    int32_t bits = take_int();
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static void golden_case(int number)
{
    op_case test;
    spm_op_call call;
    int i, k, inputs, arrays, ok;
    memset(&test, 0, sizeof test);
    test.number = number;
    for (i = 1; i < SPM_OP_COUNT; i++) {
        if (!strncmp((const char *)golden, spm_op_name((spm_op)i), 16)) test.op = (spm_op)i;
    }
    memcpy(test.text, golden + 16, 24);
    test.label = test.text;
    golden += 40;
    for (i = 0; i < 2; i++) test.attr.kernel[i] = take_int();
    for (i = 0; i < 2; i++) test.attr.stride[i] = take_int();
    for (i = 0; i < 2; i++) test.attr.padding[i] = take_int();
    for (i = 0; i < 2; i++) test.attr.dilation[i] = take_int();
    test.attr.groups = take_int();
    test.attr.heads = take_int();
    test.attr.index = take_int();
    test.attr.tokens = take_int();
    test.attr.relu = take_int();
    test.training = take_int();
    test.attr.eps = take_float();
    test.attr.p = take_float();
    test.attr.temperature = take_float();
    test.attr.label_smoothing = take_float();
    inputs = take_int();
    for (i = 0; i < inputs && i < SPM_OP_MAX_IN; i++) {
        int rank = take_int();
        for (k = 0; k < 4; k++) {
            int64_t size = take_int();
            test.shape[i][k] = k < rank ? size : 0;
        }
        test.scale[i] = take_float();
        test.offset[i] = take_float();
    }
    ok = run_case(&test, &call);
    arrays = take_int();
    for (i = 0; i < arrays; i++) {
        int which = take_int(), count = take_int();
        spm_tensor want, got;
        double difference;
        if (!ok) {
            golden += 4 * count;
            continue;
        }
        got = which >= 100 ? call.d_in[which - 100] : call.out[which];
        want = got;
        CHECK_INT(count, spm_tensor_count(&got));
        want.data = new_floats(count);
        for (k = 0; k < count; k++) want.data[k] = take_float();
        difference = count == spm_tensor_count(&got) ? spm_tensor_difference(&got, &want) : 1.0;
        if (!(difference <= 1e-5)) complain(&test, ctx_of[0], which >= 100 ? "gradient off by" : "output off by",
                                            difference);
        free_floats(want.data);
    }
    if (ok) release(&call);
}

static void golden_file(void)
{
    static unsigned char file[400000];
    FILE *f = fopen("tests/golden/ops.bin", "rb");
    size_t size;
    int i, count;
    if (!f) f = fopen("golden/ops.bin", "rb");
    CHECK_MSG(f, "tests/golden/ops.bin is missing");
    if (!f) return;
    size = fread(file, 1, sizeof file, f);
    fclose(f);
    golden = file;
    golden_end = file + size;
    CHECK(size > 12 && !memcmp(golden, "SPMOPS1", 8));
    golden += 8;
    count = take_int();
    CHECK(count > 30);
    for (i = 0; i < count; i++) golden_case(i);
    CHECK(golden == golden_end);
}

/* ---- plain double code: out[0] of every operation from in[] as doubles ---- */

typedef struct doubles {
    double *in[SPM_OP_MAX_IN];
    double *y;
} doubles;

static double phi(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }

static void ref_conv(const spm_op_call *c, const doubles *v)
{
    const int64_t *x = c->in[0].shape, *w = c->in[1].shape, *y = c->out[0].shape;
    const int64_t group = w[0] / (c->attr.groups ? c->attr.groups : 1);
    int64_t n, h, q, o, a, b, i;
    for (n = 0; n < y[0]; n++) for (h = 0; h < y[1]; h++) for (q = 0; q < y[2]; q++) for (o = 0; o < y[3]; o++) {
        double s = v->in[2] ? v->in[2][o] : 0.0;
        for (a = 0; a < w[1]; a++) for (b = 0; b < w[2]; b++) for (i = 0; i < w[3]; i++) {
            int64_t r = h * c->attr.stride[0] + a * c->attr.dilation[0] - c->attr.padding[0];
            int64_t t = q * c->attr.stride[1] + b * c->attr.dilation[1] - c->attr.padding[1];
            if (r < 0 || t < 0 || r >= x[1] || t >= x[2]) continue;
            s += v->in[0][((n * x[1] + r) * x[2] + t) * x[3] + o / group * w[3] + i]
               * v->in[1][((o * w[1] + a) * w[2] + b) * w[3] + i];
        }
        v->y[((n * y[1] + h) * y[2] + q) * y[3] + o] = s;
    }
}

static void ref_norm(const spm_op_call *c, const doubles *v, int batch, int training)
{
    const int64_t n = c->in[0].shape[c->in[0].rank - 1], rows = spm_tensor_count(&c->in[0]) / n;
    const int64_t many = batch ? rows : n, sets = batch ? n : rows, step = batch ? n : 1, from = batch ? 1 : n;
    int64_t s, i;
    for (s = 0; s < sets; s++) {
        double mean = 0.0, var = 0.0, rstd;
        for (i = 0; i < many; i++) mean += v->in[0][s * from + i * step] / (double)many;
        for (i = 0; i < many; i++) var += pow(v->in[0][s * from + i * step] - mean, 2) / (double)many;
        if (batch && !training) mean = v->in[3][s], var = v->in[4][s];
        rstd = 1.0 / sqrt(var + (double)c->attr.eps);
        for (i = 0; i < many; i++) {
            int64_t at = s * from + i * step, ch = batch ? s : i;
            double y = (v->in[0][at] - mean) * rstd * v->in[1][ch] + v->in[2][ch];
            if (batch && v->in[5]) y += v->in[5][at];
            v->y[at] = batch && c->attr.relu && y < 0.0 ? 0.0 : y;
        }
    }
}

static void ref_softmax(int64_t rows, int64_t n, const double *x, double *y)
{
    int64_t r, i;
    for (r = 0; r < rows; r++, x += n, y += n) {
        double top = x[0], s = 0.0;
        for (i = 1; i < n; i++) if (x[i] > top) top = x[i];
        for (i = 0; i < n; i++) s += y[i] = exp(x[i] - top);
        for (i = 0; i < n; i++) y[i] /= s;
    }
}

static void ref_attention(const spm_op_call *c, const doubles *v)
{
    const int64_t t = c->in[0].shape[1], d = c->in[0].shape[2] / 3, heads = c->attr.heads, hd = d / heads;
    const int64_t asked = c->attr.tokens ? c->attr.tokens : t;
    double *p = (double *)malloc((size_t)t * sizeof *p);
    int64_t n, h, i, j, k;
    for (n = 0; n < c->in[0].shape[0]; n++) for (h = 0; h < heads; h++) for (i = 0; i < asked; i++) {
        const double *base = v->in[0] + n * t * 3 * d + h * hd;
        for (j = 0; j < t; j++) {
            p[j] = 0.0;
            for (k = 0; k < hd; k++) p[j] += base[i * 3 * d + k] * base[j * 3 * d + d + k] / sqrt((double)hd);
        }
        ref_softmax(1, t, p, p);
        for (k = 0; k < hd; k++) {
            double s = 0.0;
            for (j = 0; j < t; j++) s += p[j] * base[j * 3 * d + 2 * d + k];
            v->y[(n * asked + i) * d + h * hd + k] = s;
        }
    }
    free(p);
}

static void ref_pool(const spm_op_call *c, const doubles *v, int max)
{
    const int64_t *x = c->in[0].shape, *y = c->out[0].shape;
    int64_t n, h, q, o, a, b;
    for (n = 0; n < y[0]; n++) for (h = 0; h < y[1]; h++) for (q = 0; q < y[2]; q++) for (o = 0; o < y[3]; o++) {
        double s = max ? -1e30 : 0.0;
        for (a = 0; a < c->attr.kernel[0]; a++) for (b = 0; b < c->attr.kernel[1]; b++) {
            int64_t r = h * c->attr.stride[0] + a - c->attr.padding[0];
            int64_t t = q * c->attr.stride[1] + b - c->attr.padding[1];
            double e;
            if (r < 0 || t < 0 || r >= x[1] || t >= x[2]) continue;
            e = v->in[0][((n * x[1] + r) * x[2] + t) * x[3] + o];
            s = max ? (e > s ? e : s) : s + e / (double)(c->attr.kernel[0] * c->attr.kernel[1]);
        }
        v->y[((n * y[1] + h) * y[2] + q) * y[3] + o] = s;
    }
}

static void ref_cross_entropy(const spm_op_call *c, const doubles *v)
{
    const int64_t n = c->in[0].shape[0], k = c->in[0].shape[1];
    const double e = (double)c->attr.label_smoothing;
    double *p = (double *)malloc((size_t)k * sizeof *p);
    int64_t i, j;
    v->y[0] = 0.0;
    for (i = 0; i < n; i++) {
        ref_softmax(1, k, v->in[0] + i * k, p);
        for (j = 0; j < k; j++) {
            v->y[0] -= (v->in[2] ? v->in[2][i]
                        : 1.0 / (double)n) * ((1.0 - e) * v->in[1][i * k + j] + e / (double)k) * log(p[j]);
        }
    }
    free(p);
}

static void ref_ntxent(const spm_op_call *c, const doubles *v)
{
    const int64_t n = c->in[0].shape[0], d = c->in[0].shape[1];
    int64_t i, j, k;
    v->y[0] = 0.0;
    for (i = 0; i < 2 * n; i++) {
        double sum = 0.0, positive = 0.0;
        for (j = 0; j < 2 * n; j++) {
            const double *a = i < n ? v->in[0] + i * d : v->in[1] + (i - n) * d;
            const double *b = j < n ? v->in[0] + j * d : v->in[1] + (j - n) * d;
            double dot = 0.0, aa = 0.0, bb = 0.0;
            if (j == i) continue;
            for (k = 0; k < d; k++) dot += a[k] * b[k], aa += a[k] * a[k], bb += b[k] * b[k];
            dot /= sqrt(aa) * sqrt(bb) * (double)c->attr.temperature;
            sum += exp(dot);
            if (j == (i + n) % (2 * n)) positive = dot;
        }
        v->y[0] += (log(sum) - positive) / (double)(2 * n);
    }
}

/* Dropout has no other source of its mask than the operation: 0 or kept is read off its output. */
static void reference(spm_op op, const spm_op_call *c, const doubles *v, int training)
{
    const int64_t count = spm_tensor_count(&c->in[0]), outputs = spm_tensor_count(&c->out[0]);
    const int64_t n = c->in[0].shape[c->in[0].rank - 1];
    const int64_t *x = c->in[0].shape, *y = c->out[0].shape;
    int64_t i, j;
    switch (op) {
    case SPM_OP_CONV2D: ref_conv(c, v); break;
    case SPM_OP_LINEAR:
        for (i = 0; i < outputs; i++) {
            const int64_t o = c->in[1].shape[0];
            v->y[i] = v->in[2] ? v->in[2][i % o] : 0.0;
            for (j = 0; j < n; j++) v->y[i] += v->in[0][i / o * n + j] * v->in[1][i % o * n + j];
        }
        break;
    case SPM_OP_BATCH_NORM: ref_norm(c, v, 1, training); break;
    case SPM_OP_LAYER_NORM: ref_norm(c, v, 0, 0); break;
    case SPM_OP_RELU: for (i = 0; i < count; i++) v->y[i] = v->in[0][i] > 0.0 ? v->in[0][i] : 0.0; break;
    case SPM_OP_GELU: for (i = 0; i < count; i++) v->y[i] = v->in[0][i] * phi(v->in[0][i]); break;
    case SPM_OP_SOFTMAX: ref_softmax(count / n, n, v->in[0], v->y); break;
    case SPM_OP_ATTENTION: ref_attention(c, v); break;
    case SPM_OP_MAX_POOL: ref_pool(c, v, 1); break;
    case SPM_OP_AVG_POOL: ref_pool(c, v, 0); break;
    case SPM_OP_GLOBAL_POOL:
        for (i = 0; i < outputs; i++) v->y[i] = 0.0;
        for (i = 0; i < count; i++) v->y[i / (x[1] * x[2] * n) * n + i % n] += v->in[0][i] / (double)(x[1] * x[2]);
        break;
    case SPM_OP_ADD: for (i = 0; i < count; i++) v->y[i] = v->in[0][i] + v->in[1][i]; break;
    case SPM_OP_MEAN2: for (i = 0; i < count; i++) v->y[i] = (v->in[0][i] + v->in[1][i]) / 2; break;
    case SPM_OP_SHORTCUT_A:
        for (i = 0; i < outputs; i++) {
            const int64_t o = i % y[3] - (y[3] - n) / 2, w = i / y[3] % y[2], h = i / y[3] / y[2] % y[1];
            const int64_t row = i / y[3] / y[2] / y[1] * x[1] + h * c->attr.stride[0];
            v->y[i] = o < 0 || o >= n ? 0.0 : v->in[0][(row * x[2] + w * c->attr.stride[1]) * n + o];
        }
        break;
    case SPM_OP_DROPOUT: case SPM_OP_DROP_PATH:
        for (i = 0; i < count; i++) {
            v->y[i] = v->in[0][i];
            if (training) v->y[i] *= c->out[0].data[i] == 0.0f ? 0.0 : 1.0 / (1.0 - (double)c->attr.p);
        }
        break;
    case SPM_OP_TIED_DROPOUT:
        for (i = 0; i < count; i++) {
            v->y[i] = i % n >= c->attr.index && (!training || c->out[0].data[i] == 0.0f) ? 0.0 : v->in[0][i];
        }
        break;
    case SPM_OP_TOKENS:
        for (i = 0; i < outputs; i++) {
            const int64_t k = c->in[1].shape[0], all = k + c->in[3].shape[0], at = i % (y[1] * n), b = i / (y[1] * n);
            v->y[i] = v->in[2][at] + (at < k * n ? v->in[1][at] : at < all * n ? v->in[3][at - k * n]
                                      : v->in[0][b * (y[1] - all) * n + at - all * n]);
        }
        break;
    case SPM_OP_TOKEN:
        for (i = 0; i < outputs; i++) {
            const int64_t few = c->attr.tokens ? c->attr.tokens : 1, row = i / n;
            v->y[i] = v->in[0][(row / few * x[1] + c->attr.index + row % few) * n + i % n];
        }
        break;
    case SPM_OP_CROSS_ENTROPY: ref_cross_entropy(c, v); break;
    case SPM_OP_NTXENT: ref_ntxent(c, v); break;
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
}

static double weighted(spm_op op, const spm_op_call *call, const doubles *v, int training)
{
    double s = 0.0;
    int64_t i;
    reference(op, call, v, training);
    for (i = 0; i < spm_tensor_count(&call->out[0]); i++) s += v->y[i] * (double)call->d_out.data[i];
    return s;
}

/* Output against plain double code; `sampled` elements of every gradient against its central differences. */
static void check_case(const op_case *test, int sampled)
{
    spm_op_call call;
    doubles v;
    spm_tensor want;
    int64_t i, outputs;
    int k;
    if (!run_case(test, &call)) return;
    memset(&v, 0, sizeof v);
    outputs = spm_tensor_count(&call.out[0]);
    v.y = (double *)malloc((size_t)outputs * sizeof(double));
    for (k = 0; k < call.n_in; k++) {
        const int64_t n = spm_tensor_count(&call.in[k]);
        if (!call.in[k].data) continue;
        v.in[k] = (double *)malloc((size_t)n * sizeof(double));
        for (i = 0; i < n; i++) v.in[k][i] = (double)call.in[k].data[i];
    }
    reference(test->op, &call, &v, test->training);
    want = call.out[0];
    want.data = new_floats(outputs);
    for (i = 0; i < outputs; i++) want.data[i] = (float)v.y[i];
    if (!(spm_tensor_difference(&call.out[0], &want) <= 3e-6)) {
        complain(test, ctx_of[0], "output differs from plain code by", spm_tensor_difference(&call.out[0], &want));
    }
    free_floats(want.data);
    for (k = 0; k < call.n_in; k++) {
        double worst = 0.0, largest = 1e-30;
        int64_t n;
        if (!call.d_in[k].data) continue;
        n = spm_tensor_count(&call.in[k]);
        for (i = 0; i < n; i++) largest = fmax(largest, fabs((double)call.d_in[k].data[i]));
        for (i = 0; i < sampled && i < n; i++) {
            const int64_t at = n <= sampled ? i : i < sampled / 2 ? i * 7919 % n : n - 1 - (i - sampled / 2);
            const double x = v.in[k][at], h = test->attr.relu ? 1e-6 : 1e-5; /* less for fewer kinks */
            double slope, back;
            v.in[k][at] = x + h;
            slope = weighted(test->op, &call, &v, test->training);
            v.in[k][at] = x - h;
            back = weighted(test->op, &call, &v, test->training);
            v.in[k][at] = x;
            worst = fmax(worst, fabs((slope - back) / (2.0 * h) - (double)call.d_in[k].data[at]));
        }
        if (!(worst <= 1e-5 * largest)) complain(test, ctx_of[0], "gradient differs from plain code by",
                                                 worst / largest);
    }
    for (k = 0; k < SPM_OP_MAX_IN; k++) free(v.in[k]);
    free(v.y);
    release(&call);
}

static int case_number; /* counts from the same start for every instruction set, so that all see the same data */

static op_case make_case(spm_op op, const char *label)
{
    op_case test;
    int i;
    memset(&test, 0, sizeof test);
    test.op = op;
    test.label = label;
    test.number = case_number++;
    for (i = 0; i < SPM_OP_MAX_IN; i++) test.scale[i] = 1.0f;
    for (i = 0; i < 2; i++) test.attr.stride[i] = test.attr.dilation[i] = 1;
    return test;
}

static void shape(op_case *test, int input, int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    test->shape[input][0] = d0;
    test->shape[input][1] = d1;
    test->shape[input][2] = d2;
    test->shape[input][3] = d3;
}

static op_case case_bn(int64_t n, int64_t h, int64_t w, int64_t c, int training, int relu, int residual)
{
    op_case t = make_case(SPM_OP_BATCH_NORM, training ? "training" : "evaluation");
    int i;
    shape(&t, 0, n, h, w, c);
    for (i = 1; i < 5; i++) shape(&t, i, c, 0, 0, 0);
    if (residual) shape(&t, 5, n, h, w, c);
    t.scale[0] = 2.0f;
    t.scale[1] = t.scale[4] = 0.5f;
    t.offset[1] = 1.0f;
    t.offset[4] = 1.5f;
    t.attr.eps = 1e-5f;
    t.attr.relu = relu;
    t.training = training;
    return t;
}

static op_case case_pool(spm_op op, int64_t h, int64_t w, int64_t c, int64_t kernel, int64_t stride, int64_t padding)
{
    op_case t = make_case(op, "pool");
    int i;
    shape(&t, 0, 2, h, w, c);
    for (i = 0; i < 2; i++) {
        t.attr.kernel[i] = kernel;
        t.attr.stride[i] = stride;
        t.attr.padding[i] = padding;
    }
    return t;
}

static void norm_sizes(void)
{
    static const int64_t widths[] = { 1, 3, 15, 16, 17, 33, 64, 130 };
    op_case t;
    int i;
    for (i = 0; i < 8; i++) {
        t = case_bn(2, 5, 3, widths[i], i & 1, i >> 1 & 1, i % 3 == 0);
        check_case(&t, 12);
        t = make_case(SPM_OP_LAYER_NORM, "odd widths");
        shape(&t, 0, 3, 7, widths[i] + 1, 0);
        shape(&t, 1, widths[i] + 1, 0, 0, 0);
        shape(&t, 2, widths[i] + 1, 0, 0, 0);
        t.attr.eps = 1e-3f;
        t.offset[1] = 1.5f;
        check_case(&t, 12);
    }
    t = case_bn(3, 21, 23, 37, 1, 1, 1); /* several chunks of rows */
    check_case(&t, 8);
    t = case_bn(2, 29, 31, 131, 1, 0, 0); /* and of channels */
    check_case(&t, 4);
    t = case_bn(2, 29, 31, 131, 0, 1, 1);
    check_case(&t, 4);
    t = make_case(SPM_OP_LAYER_NORM, "many rows");
    shape(&t, 0, 9, 197, 96, 0);
    shape(&t, 1, 96, 0, 0, 0);
    shape(&t, 2, 96, 0, 0, 0);
    t.attr.eps = 1e-6f;
    check_case(&t, 4);
    t = make_case(SPM_OP_LAYER_NORM, "long rows");
    shape(&t, 0, 2, 3, 1201, 0);
    shape(&t, 1, 1201, 0, 0, 0);
    shape(&t, 2, 1201, 0, 0, 0);
    t.offset[0] = 3.0f;
    t.attr.eps = 1e-6f;
    check_case(&t, 6);
}

static void elementwise_sizes(void)
{
    static const spm_op ops[] = { SPM_OP_RELU, SPM_OP_GELU, SPM_OP_SOFTMAX, SPM_OP_ADD, SPM_OP_MEAN2, SPM_OP_DROPOUT,
                                 SPM_OP_DROP_PATH, SPM_OP_TIED_DROPOUT };
    static const int64_t widths[] = { 1, 2, 7, 16, 31, 100, 1003 };
    int i, k;
    for (i = 0; i < 8; i++) for (k = 0; k < 7; k++) {
        op_case t = make_case(ops[i], "odd sizes");
        shape(&t, 0, 5, widths[k], 0, 0);
        if (ops[i] == SPM_OP_ADD || ops[i] == SPM_OP_MEAN2) shape(&t, 1, 5, widths[k], 0, 0);
        if (ops[i] == SPM_OP_SOFTMAX) t.scale[0] = 5.0f;
        t.attr.p = 0.3f;
        t.training = k & 1;
        check_case(&t, 10);
    }
    for (i = 0; i < 8; i++) { /* several tasks */
        op_case t = make_case(ops[i], "large");
        shape(&t, 0, 3, 11, 1777, 0);
        if (ops[i] == SPM_OP_ADD || ops[i] == SPM_OP_MEAN2) shape(&t, 1, 3, 11, 1777, 0);
        t.attr.p = 0.5f;
        t.training = 1;
        check_case(&t, 2);
    }
}

static void pool_sizes(void)
{
    static const spm_op ops[] = { SPM_OP_MAX_POOL, SPM_OP_AVG_POOL };
    op_case t;
    int i;
    for (i = 0; i < 2; i++) {
        t = case_pool(ops[i], 11, 13, 64, 3, 2, 1);
        check_case(&t, 20);
        t = case_pool(ops[i], 7, 9, 19, 2, 2, 0);
        check_case(&t, 40);
        t = case_pool(ops[i], 5, 5, 3, 5, 1, 2);
        check_case(&t, 75);
        t = case_pool(ops[i], 6, 7, 33, 3, 3, 0);
        check_case(&t, 40);
        t = case_pool(ops[i], 4, 4, 1, 2, 3, 1);
        check_case(&t, 32);
        t = case_pool(ops[i], 3, 3, 17, 3, 1, 0);
        check_case(&t, 40);
    }
    t = make_case(SPM_OP_GLOBAL_POOL, "slabs");
    shape(&t, 0, 3, 9, 10, 261);
    check_case(&t, 10);
    t = make_case(SPM_OP_SHORTCUT_A, "odd");
    shape(&t, 0, 2, 5, 8, 7);
    t.attr.stride[0] = t.attr.stride[1] = 2;
    t.attr.groups = 18;
    check_case(&t, 40);
}

static void token_sizes(void)
{
    static const int64_t cuts[][3] = { { 1, 5, 1 }, { 5, 3, 1 }, { 16, 64, 2 }, { 33, 20, 5 }, { 197, 64, 1 },
                                      { 70, 12, 3 } };
    op_case t;
    int i;
    for (i = 0; i < 6; i++) {
        t = make_case(SPM_OP_ATTENTION, "odd sizes");
        shape(&t, 0, i < 4 ? 2 : 1, cuts[i][0], 3 * cuts[i][1] * cuts[i][2], 0);
        t.attr.heads = cuts[i][2];
        t.scale[0] = 2.0f;
        check_case(&t, i < 4 ? 24 : 6);
        for (t.attr.tokens = 1; t.attr.tokens <= cuts[i][0]; t.attr.tokens += t.attr.tokens == 1 ? 24 : cuts[i][0]) {
            check_case(&t, i < 4 ? 24 : 6);
        }
    }
    for (i = 1; i < 3; i++) {
        t = make_case(SPM_OP_TOKENS, "class tokens");
        shape(&t, 0, 5, 3, 4, 37);
        shape(&t, 1, i, 37, 0, 0);
        shape(&t, 2, 12 + i, 37, 0, 0);
        check_case(&t, 40);
        shape(&t, 2, 13 + i, 37, 0, 0);
        shape(&t, 3, 1, 37, 0, 0);
        check_case(&t, 40);
    }
    t = make_case(SPM_OP_TOKEN, "last");
    shape(&t, 0, 4, 6, 19, 0);
    t.attr.index = 5;
    check_case(&t, 40);
    t.attr.index = 2;
    t.attr.tokens = 4;
    check_case(&t, 40);
}

static void loss_sizes(void)
{
    static const int64_t cuts[][2] = { { 1, 2 }, { 7, 3 }, { 16, 1000 }, { 33, 10 } };
    op_case t;
    int i;
    for (i = 0; i < 4; i++) {
        t = make_case(SPM_OP_CROSS_ENTROPY, "odd sizes");
        shape(&t, 0, cuts[i][0], cuts[i][1], 0, 0);
        shape(&t, 1, cuts[i][0], cuts[i][1], 0, 0);
        if (i & 1) shape(&t, 2, cuts[i][0], 0, 0, 0);
        t.scale[0] = 6.0f;
        t.scale[1] = 0.25f;
        t.offset[1] = 0.25f;
        t.offset[2] = 1.5f;
        t.attr.label_smoothing = i == 2 ? 0.1f : 0.0f;
        check_case(&t, 20);
        t = make_case(SPM_OP_NTXENT, "odd sizes");
        shape(&t, 0, cuts[i][0] + !i, cuts[i][1] < 500 ? cuts[i][1] : 130, 0, 0); /* of one row the gradient is 0: below */
        shape(&t, 1, cuts[i][0] + !i, cuts[i][1] < 500 ? cuts[i][1] : 130, 0, 0);
        t.attr.temperature = 0.3f;
        check_case(&t, i == 2 ? 6 : 20);
    }
}

static void product_sizes(void)
{
    op_case t = make_case(SPM_OP_LINEAR, "bias");
    shape(&t, 0, 2, 13, 71, 0);
    shape(&t, 1, 35, 71, 0, 0);
    shape(&t, 2, 35, 0, 0, 0);
    check_case(&t, 12);
    t = make_case(SPM_OP_CONV2D, "3x3 stride 2");
    shape(&t, 0, 2, 11, 10, 18);
    shape(&t, 1, 33, 3, 3, 18);
    t.attr.stride[0] = t.attr.stride[1] = 2;
    t.attr.padding[0] = t.attr.padding[1] = 1;
    check_case(&t, 8);
    t = make_case(SPM_OP_CONV2D, "groups");
    shape(&t, 0, 1, 7, 9, 12);
    shape(&t, 1, 15, 3, 2, 4);
    shape(&t, 2, 15, 0, 0, 0);
    t.attr.groups = 3;
    t.attr.padding[0] = 1;
    check_case(&t, 20);
}

/* ---- corner cases ---- */

/* A case of a few numbers; `op` is one of those below. */
static op_case case_small(spm_op op, const char *label)
{
    op_case t = make_case(op, label);
    int i;
    if (op == SPM_OP_LAYER_NORM) {
        shape(&t, 0, 5, 9, 0, 0);
        for (i = 1; i < 3; i++) shape(&t, i, 9, 0, 0, 0);
    } else if (op == SPM_OP_ATTENTION) {
        t.attr.heads = 2;
        shape(&t, 0, 2, 7, 30, 0);
    } else if (op == SPM_OP_TOKENS) {
        shape(&t, 0, 5, 3, 4, 7);
        shape(&t, 1, 1, 7, 0, 0);
        shape(&t, 2, 13, 7, 0, 0);
    } else if (op == SPM_OP_NTXENT) {
        t.attr.temperature = 0.5f;
        for (i = 0; i < 2; i++) shape(&t, i, 4, 6, 0, 0);
    } else if (op == SPM_OP_DROPOUT) {
        t.attr.p = 0.5f;
        t.training = 1;
        shape(&t, 0, 4, 33, 0, 0);
    }
    return t;
}

/* Gradients are added where asked, and each can be left out without changing the others. */
static void gradient_modes(void)
{
    op_case tests[8];
    int i, k, n = 0;
    tests[n++] = case_bn(2, 9, 7, 35, 1, 1, 1);
    tests[n++] = case_bn(2, 9, 7, 35, 0, 1, 1);
    tests[n++] = case_small(SPM_OP_LAYER_NORM, "modes");
    tests[n++] = case_pool(SPM_OP_MAX_POOL, 7, 6, 19, 3, 2, 1);
    tests[n++] = case_small(SPM_OP_ATTENTION, "modes");
    tests[n++] = case_small(SPM_OP_TOKENS, "modes");
    tests[n++] = case_small(SPM_OP_NTXENT, "modes");
    tests[n++] = case_small(SPM_OP_DROPOUT, "modes");
    for (i = 0; i < n; i++) {
        spm_op_call call, again;
        if (!run_case(&tests[i], &call)) continue;
        for (k = 0; k < call.n_in; k++) {
            int64_t j, m;
            int other;
            if (!call.d_in[k].data || !prepare(ctx_of[1], &tests[i], &again)) continue;
            for (other = 0; other < again.n_in; other++) {
                if (other == k) continue;
                free_floats(again.d_in[other].data);
                again.d_in[other].data = NULL;
            }
            m = spm_tensor_count(&again.in[k]);
            for (j = 0; j < m; j++) again.d_in[k].data[j] = 1.0f;
            again.d_in_add[k] = 1;
            spm_op_forward(ctx_of[1], tests[i].op, &again);
            spm_op_backward(ctx_of[1], tests[i].op, &again);
            for (j = 0; j < m; j++) {
                const double want = (double)call.d_in[k].data[j] + 1.0;
                if (!(fabs((double)again.d_in[k].data[j] - want) <= 2e-6 * (1.0 + fabs(want)))) break;
            }
            if (j < m) complain(&tests[i], ctx_of[1], "added gradient is wrong for input", k);
            release(&again);
        }
        release(&call);
    }
}

/* Saved outputs may be left out where no backward pass follows, and y is the same. */
static void no_saved_outputs(void)
{
    op_case tests[6];
    int i, k, n = 0;
    tests[n++] = case_bn(2, 9, 7, 35, 0, 1, 1);
    tests[n++] = case_small(SPM_OP_LAYER_NORM, "modes");
    tests[n++] = case_pool(SPM_OP_MAX_POOL, 7, 6, 19, 3, 2, 1);
    tests[n++] = case_small(SPM_OP_ATTENTION, "modes");
    tests[n] = make_case(SPM_OP_CROSS_ENTROPY, "modes");
    shape(&tests[n], 0, 4, 6, 0, 0);
    shape(&tests[n++], 1, 4, 6, 0, 0);
    for (i = 0; i < n; i++) {
        spm_op_call call, again;
        if (!run_case(&tests[i], &call) || !prepare(ctx_of[1], &tests[i], &again)) continue;
        for (k = 1; k < SPM_OP_MAX_OUT; k++) {
            free_floats(again.out[k].data);
            again.out[k].data = NULL;
        }
        spm_op_forward(ctx_of[1], tests[i].op, &again);
        CHECK(!memcmp(call.out[0].data, again.out[0].data, (size_t)spm_tensor_count(&call.out[0]) * sizeof(float)));
        release(&call);
        release(&again);
    }
}

/* Mean 4000, deviation 1: a variance from E[x^2] - E[x]^2 in float would be lost. */
static void batch_norm_offset(void)
{
    op_case t = case_bn(3, 31, 29, 21, 1, 0, 0);
    spm_op_call call;
    int64_t i, c;
    t.scale[0] = 1.0f;
    t.offset[0] = 4000.0f;
    if (!run_case(&t, &call)) return;
    for (c = 0; c < 21; c++) {
        double mean = 0.0, var = 0.0;
        for (i = 0; i < 3 * 31 * 29; i++) mean += (double)call.in[0].data[i * 21 + c] / (3 * 31 * 29);
        for (i = 0; i < 3 * 31 * 29; i++) var += pow((double)call.in[0].data[i * 21 + c] - mean, 2) / (3 * 31 * 29);
        CHECK_NEAR(call.out[1].data[c], mean, 4000 * 7e-8);
        CHECK_NEAR(call.out[2].data[c], var, var * 2e-6);
    }
    release(&call);
}

static void gelu_accuracy(void)
{
    op_case t = make_case(SPM_OP_GELU, "accuracy");
    spm_op_call call;
    int64_t i;
    double worst = 0.0;
    shape(&t, 0, 200001, 0, 0, 0);
    if (!prepare(ctx_of[0], &t, &call)) return;
    for (i = 0; i < 200001; i++) call.in[0].data[i] = (float)(i - 100000) * 1.2e-4f; /* -12 .. 12 */
    spm_op_forward(ctx_of[0], t.op, &call);
    for (i = 0; i < 200001; i++) {
        const double x = (double)call.in[0].data[i], want = x * phi(x), ulp = fabs(want) * 1.2e-7 + 1e-37;
        worst = fmax(worst, fabs((double)call.out[0].data[i] - want) / ulp);
    }
    if (!(worst < 4.0)) complain(&t, ctx_of[0], "units in the last place:", worst);
    release(&call);
}

static void softmax_extremes(void)
{
    op_case t = make_case(SPM_OP_SOFTMAX, "extremes");
    spm_op_call call;
    int i;
    double sum = 0.0, worst = 0.0;
    shape(&t, 0, 2, 20, 0, 0);
    if (!prepare(ctx_of[0], &t, &call)) return;
    for (i = 0; i < 20; i++) call.in[0].data[i] = i == 3 ? 1e30f : i == 4 ? -INFINITY : -1e30f;
    for (i = 20; i < 40; i++) call.in[0].data[i] = 500.0f - 4.0f * (float)(i - 20);
    spm_op_forward(ctx_of[0], t.op, &call);
    for (i = 0; i < 20; i++) CHECK(call.out[0].data[i] == (i == 3 ? 1.0f : 0.0f));
    for (i = 0; i < 20; i++) sum += exp(-4.0 * i);
    for (i = 0; i < 20; i++) worst = fmax(worst, fabs((double)call.out[0].data[20 + i] * sum / exp(-4.0 * i) - 1.0));
    if (!(worst < 4e-7)) complain(&t, ctx_of[0], "relative error", worst);
    release(&call);
}

static void max_pool_ties(void)
{
    op_case t = case_pool(SPM_OP_MAX_POOL, 5, 6, 21, 3, 2, 1);
    spm_op_call call;
    int64_t n, h, w, c, i;
    if (!prepare(ctx_of[0], &t, &call)) return;
    for (i = 0; i < spm_tensor_count(&call.in[0]); i++) call.in[0].data[i] = floorf(call.in[0].data[i] * 1.5f);
    call.in[0].data[0] = NAN;
    call.in[0].data[1] = -INFINITY;
    for (i = 0; i < spm_tensor_count(&call.d_out); i++) call.d_out.data[i] = 1.0f;
    spm_op_forward(ctx_of[0], t.op, &call);
    spm_op_backward(ctx_of[0], t.op, &call);
    CHECK(call.out[0].data[0] != call.out[0].data[0]);
    CHECK(call.d_in[0].data[0] == 1.0f);
    for (n = 0; n < 2; n++) for (c = 0; c < 21; c++) { /* each window's gradient sits on its first maximum */
        float got[5][6], want[5][6];
        int same = 1;
        if (n == 0 && c < 1) continue;
        memset(want, 0, sizeof want);
        for (h = 0; h < 3; h++) for (w = 0; w < 3; w++) {
            int64_t a, b, ba = -1, bb = -1;
            for (a = h * 2 - 1; a < h * 2 + 2; a++) for (b = w * 2 - 1; b < w * 2 + 2; b++) {
                if (a < 0 || b < 0 || a >= 5 || b >= 6) continue;
                if (ba >= 0 && call.in[0].data[((n * 5 + a) * 6 + b) * 21 + c]
                               <= call.in[0].data[((n * 5 + ba) * 6 + bb) * 21 + c]) continue;
                ba = a;
                bb = b;
            }
            want[ba][bb] += 1.0f;
        }
        for (h = 0; h < 5; h++) for (w = 0; w < 6; w++) {
            got[h][w] = call.d_in[0].data[((n * 5 + h) * 6 + w) * 21 + c];
            if (got[h][w] != want[h][w]) same = 0;
        }
        CHECK(same);
    }
    release(&call);
}

/* Example-tied dropout: the same channels for an example in every epoch and batch and at every pixel, others for another
 * example; the first ones always, the rest never in evaluation mode; the gradient goes the same way. */
static void tied_dropout_draws(void)
{
    static const int64_t ids[] = { 3, 900000000007, 3 };
    op_case t = make_case(SPM_OP_TIED_DROPOUT, "draws");
    spm_op_call call;
    int64_t i, c, kept = 0, differ = 0;
    shape(&t, 0, 3, 2, 2, 1000);
    t.training = 1;
    t.attr.index = 200;
    t.attr.p = 0.75f;
    if (!prepare(ctx_of[2], &t, &call)) return;
    call.example = ids;
    for (i = 0; i < 12000; i++) call.in[0].data[i] = 2.0f;
    spm_op_forward(ctx_of[2], t.op, &call);
    for (c = 0; c < 1000; c++) {
        const float *y = call.out[0].data + c;
        for (i = 1; i < 4; i++) CHECK(y[0] == y[i * 1000]);
        CHECK(y[0] == y[8000] && (y[0] == 2.0f || (y[0] == 0.0f && c >= 200)));
        kept += c >= 200 && y[0] > 0.0f;
        differ += y[0] != y[4000];
    }
    CHECK(kept > 160 && kept < 240); /* 800 draws at .25 */
    CHECK(differ > 200 && differ < 400); /* 2 * .25 * .75 of 800 */
    call.stream++; /* another epoch */
    for (i = 0; i < 12000; i++) call.in[0].data[i] = call.out[0].data[i] > 0.0f ? 1.0f : 5.0f;
    spm_op_forward(ctx_of[0], t.op, &call);
    for (i = 0; i < 12000; i++) CHECK(call.out[0].data[i] == (call.in[0].data[i] < 2.0f ? 1.0f : 0.0f));
    call.training = 0;
    spm_op_forward(ctx_of[0], t.op, &call);
    for (i = 0; i < 12000; i++) CHECK(call.out[0].data[i] == (i % 1000 < 200 ? call.in[0].data[i] : 0.0f));
    release(&call);
}

/* A draw belongs to (seed, stream, example, element), whatever the batch looks like. */
static void dropout_draws(void)
{
    static const spm_op ops[] = { SPM_OP_DROPOUT, SPM_OP_DROP_PATH };
    static const int64_t ids[] = { 3, 900000000007, 0, 12 }, one[] = { 0 };
    int k;
    for (k = 0; k < 2; k++) {
        op_case t = make_case(ops[k], "draws"), single = t, many = t;
        spm_op_call call, alone;
        int64_t i, kept = 0;
        shape(&t, 0, 4, 9001, 0, 0);
        shape(&single, 0, 1, 9001, 0, 0);
        shape(&many, 0, 2000, 3, 0, 0);
        t.training = single.training = many.training = 1;
        t.attr.p = single.attr.p = many.attr.p = 0.25f;
        if (!prepare(ctx_of[2], &t, &call) || !prepare(ctx_of[0], &single, &alone)) return;
        call.example = ids;
        alone.example = one;
        for (i = 0; i < 4 * 9001; i++) call.in[0].data[i] = 1.0f;
        for (i = 0; i < 9001; i++) alone.in[0].data[i] = 1.0f;
        spm_op_forward(ctx_of[2], t.op, &call);
        spm_op_forward(ctx_of[0], t.op, &alone);
        CHECK(!memcmp(call.out[0].data + 2 * 9001, alone.out[0].data, 9001 * sizeof(float)));
        if (k == 0) {
            CHECK(memcmp(call.out[0].data + 9001, call.out[0].data, 9001 * sizeof(float)) != 0);
            for (i = 0; i < 4 * 9001; i++) kept += call.out[0].data[i] > 0.0f;
            CHECK_NEAR((double)kept / (4 * 9001), 0.75, 0.01);
            alone.stream++;
            spm_op_forward(ctx_of[0], t.op, &alone);
            CHECK(memcmp(call.out[0].data + 2 * 9001, alone.out[0].data, 9001 * sizeof(float)) != 0);
        }
        release(&call);
        release(&alone);
        if (k == 1 && prepare(ctx_of[0], &many, &call)) {
            for (i = 0; i < 6000; i++) call.in[0].data[i] = 3.0f;
            spm_op_forward(ctx_of[0], many.op, &call);
            for (i = 0; i < 2000; i++) {
                kept += call.out[0].data[3 * i] > 0.0f;
                CHECK(call.out[0].data[3 * i] == call.out[0].data[3 * i + 1]
                      && call.out[0].data[3 * i] == call.out[0].data[3 * i + 2]);
                CHECK(call.out[0].data[3 * i] == 0.0f || fabs((double)call.out[0].data[3 * i] - 4.0) < 1e-6);
            }
            CHECK_NEAR((double)kept / 2000, 0.75, 0.04);
            release(&call);
        }
    }
}

static void loss_extremes(void)
{
    op_case t = make_case(SPM_OP_CROSS_ENTROPY, "extremes");
    spm_op_call call;
    int i;
    shape(&t, 0, 2, 3, 0, 0);
    shape(&t, 1, 2, 3, 0, 0);
    if (!prepare(ctx_of[0], &t, &call)) return;
    for (i = 0; i < 6; i++) {
        call.in[0].data[i] = i == 0 ? 10000.0f : i == 4 ? 10000.0f : -10000.0f;
        call.in[1].data[i] = i == 0 || i == 3 ? 1.0f : 0.0f;
    }
    call.d_out.data[0] = 1.0f;
    spm_op_forward(ctx_of[0], t.op, &call);
    spm_op_backward(ctx_of[0], t.op, &call);
    CHECK(call.out[1].data[0] == 0.0f && call.out[1].data[1] == 20000.0f && call.out[0].data[0] == 10000.0f);
    CHECK(call.d_in[0].data[3] == -0.5f && call.d_in[0].data[4] == 0.5f && call.d_in[0].data[0] == 0.0f);
    release(&call);
}

static void ntxent_corners(void)
{
    op_case t = make_case(SPM_OP_NTXENT, "corners");
    spm_op_call call;
    int i;
    t.attr.temperature = 0.5f;
    shape(&t, 0, 1, 4, 0, 0);
    shape(&t, 1, 1, 4, 0, 0);
    if (!prepare(ctx_of[0], &t, &call)) return;
    spm_op_forward(ctx_of[0], t.op, &call); /* one pair: nothing to confuse it with */
    spm_op_backward(ctx_of[0], t.op, &call);
    CHECK(call.out[0].data[0] == 0.0f);
    for (i = 0; i < 4; i++) CHECK(call.d_in[0].data[i] == 0.0f && call.d_in[1].data[i] == 0.0f);
    release(&call);
    shape(&t, 0, 3, 4, 0, 0);
    shape(&t, 1, 3, 4, 0, 0);
    if (!prepare(ctx_of[0], &t, &call)) return;
    for (i = 0; i < 4; i++) call.in[0].data[4 + i] = 0.0f;
    spm_op_forward(ctx_of[0], t.op, &call);
    spm_op_backward(ctx_of[0], t.op, &call);
    CHECK(call.out[0].data[0] > 0.0f && call.out[0].data[0] < 10.0f);
    for (i = 0; i < 12; i++) CHECK(fabs((double)call.d_in[0].data[i]) < 10.0);
    for (i = 0; i < 4; i++) CHECK(call.d_in[0].data[4 + i] == 0.0f);
    release(&call);
    /* METHOD.md: two-class outputs at tau .5, batch 100, all equal: log(199) = 5.293 */
    shape(&t, 0, 100, 2, 0, 0);
    shape(&t, 1, 100, 2, 0, 0);
    t.scale[0] = t.scale[1] = 0.0f;
    t.offset[0] = t.offset[1] = 0.5f;
    if (!prepare(ctx_of[0], &t, &call)) return;
    spm_op_forward(ctx_of[0], t.op, &call);
    CHECK_NEAR(call.out[0].data[0], log(199.0), 1e-5);
    release(&call);
}

static void expect_error(const op_case *test, const char *a, const char *b)
{
    spm_op_call call;
    int ok = prepare(ctx_of[0], test, &call);
    if (ok) complain(test, ctx_of[0], "was accepted", 0.0);
    else if (!strstr(last_error.text, a) || !strstr(last_error.text, b)) {
        complain(test, ctx_of[0], last_error.text, 0.0);
    }
    release(&call);
}

static void refusals(void)
{
    op_case t = case_bn(2, 3, 3, 8, 1, 0, 0);
    spm_op_call call;
    spm_error err = SPM_ZERO;
    shape(&t, 1, 9, 0, 0, 0);
    expect_error(&t, "batch_norm: weight is [9]", "[2,3,3,8]");
    t = case_bn(2, 3, 3, 8, 1, 0, 0);
    shape(&t, 5, 2, 3, 3, 7);
    expect_error(&t, "batch_norm: residual is [2,3,3,7]", "[2,3,3,8]");
    t = make_case(SPM_OP_ADD, "shapes");
    shape(&t, 0, 2, 3, 0, 0);
    expect_error(&t, "add: input 1 is missing", "2 inputs");
    shape(&t, 1, 3, 2, 0, 0);
    expect_error(&t, "add: b is [3,2]", "[2,3]");
    t = make_case(SPM_OP_ATTENTION, "heads");
    shape(&t, 0, 1, 4, 21, 0);
    t.attr.heads = 2;
    expect_error(&t, "attention: 2 heads", "width 7");
    t.attr.heads = 1;
    t.attr.tokens = 5;
    expect_error(&t, "attention: the first 5 tokens", "of 4");
    t.attr.tokens = -1;
    expect_error(&t, "attention: the first -1 tokens", "of 4");
    t = make_case(SPM_OP_RELU, "inputs");
    shape(&t, 0, 2, 3, 0, 0);
    shape(&t, 1, 2, 3, 0, 0);
    expect_error(&t, "relu: takes at most 1", "got 2");
    t = case_pool(SPM_OP_MAX_POOL, 2, 2, 3, 3, 1, 0);
    expect_error(&t, "max_pool", "[2,2,2,3]");
    t = case_pool(SPM_OP_AVG_POOL, 5, 5, 3, 3, 1, 2);
    expect_error(&t, "avg_pool", "padding 2");
    t = make_case(SPM_OP_TOKEN, "index");
    shape(&t, 0, 2, 3, 4, 0);
    t.attr.index = 3;
    expect_error(&t, "token: index 3", "0..2");
    t.attr.index = 1;
    t.attr.tokens = 3;
    expect_error(&t, "token: 3 tokens from index 1 on", "of 3");
    t.attr.tokens = INT64_MAX;
    expect_error(&t, "token: 9223372036854775807 tokens from index 1 on", "of 3");
    t.attr.tokens = -1;
    expect_error(&t, "token: -1 tokens from index 1 on", "of 3");
    t = make_case(SPM_OP_TIED_DROPOUT, "channels");
    shape(&t, 0, 2, 3, 5, 0);
    t.attr.index = 6;
    expect_error(&t, "tied_dropout: 6 channels", "there are 5");
    t = make_case(SPM_OP_DROPOUT, "p");
    shape(&t, 0, 2, 3, 4, 0);
    t.attr.p = 1.5f;
    expect_error(&t, "dropout: p is 1.5", "0..1");
    t = make_case(SPM_OP_NTXENT, "temperature");
    shape(&t, 0, 2, 3, 0, 0);
    shape(&t, 1, 2, 3, 0, 0);
    expect_error(&t, "ntxent: temperature is 0", "above 0");
    t = make_case(SPM_OP_TOKENS, "position");
    shape(&t, 0, 2, 3, 4, 5);
    shape(&t, 1, 1, 5, 0, 0);
    shape(&t, 2, 12, 5, 0, 0);
    expect_error(&t, "tokens: position is [12,5], but must be [13,5]", "[2,3,4,5]");
    shape(&t, 3, 1, 4, 0, 0);
    expect_error(&t, "tokens: distillation is [1,4], but must be [1,5]", "[2,3,4,5]");
    memset(&call, 0, sizeof call);
    call.in[0] = spm_tensor_make(NULL, 4, 0, 3, 3, 8);
    call.n_in = 1;
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_GLOBAL_POOL, &call, &err), SPM_E_SHAPE);
    CHECK(strstr(err.text, "global_pool: input 0 is [0,3,3,8]") != NULL);
    memset(&err, 0, sizeof err);
    call.in[0] = spm_tensor_make(NULL, 4, INT64_C(1) << 40, 1 << 20, 3, 8);
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_GLOBAL_POOL, &call, &err), SPM_E_SHAPE);
    CHECK(strstr(err.text, "does not fit into memory") != NULL);
    memset(&err, 0, sizeof err); /* the input would fit, the scores of all pairs of tokens would not */
    call.in[0] = spm_tensor_make(NULL, 3, 1, INT64_C(1) << 34, 3, 0);
    call.attr.heads = 1;
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_ATTENTION, &call, &err), SPM_E_SHAPE);
    CHECK(strstr(err.text, "attention: output 1 would be [1,1,17179869184,17179869184]") != NULL
          || strstr(err.text, "input 0") != NULL); /* 32-bit */
    memset(&err, 0, sizeof err);
    call.n_in = SPM_OP_MAX_IN + 1;
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_ATTENTION, &call, &err), SPM_E_ARGUMENT);
    memset(&err, 0, sizeof err);
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_COUNT, &call, &err), SPM_E_ARGUMENT);
    CHECK(strstr(err.text, "is not known") != NULL);
    memset(&err, 0, sizeof err);
    memset(&call, 0, sizeof call);
    call.n_in = 1;
    call.in[0] = spm_tensor_make(NULL, 4, 1, 4, 4, 8);
    call.attr.groups = 8;
    call.attr.stride[0] = call.attr.stride[1] = INT64_MAX;
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_SHORTCUT_A, &call, &err), SPM_E_ARGUMENT);
}

/* One value per channel: variance 0, so y = bias, and no gradient reaches x (PyTorch refuses this case). */
static void batch_norm_of_one(void)
{
    float x[3] = { 1.5f, -2.0f, 1e6f }, w[3] = { 2.0f, 1.0f, -1.0f }, b[3] = { 0.25f, 0.5f, -3.0f };
    float mean[3] = { 0, 0, 0 }, var[3] = { 1, 1, 1 }, y[3], m[3], v[3], dy[3] = { 1.0f, -2.0f, 0.5f }, dx[3], dw[3];
    char memory[4096];
    spm_op_call call;
    spm_error err = SPM_ZERO;
    int i;
    memset(&call, 0, sizeof call);
    call.n_in = 5;
    call.training = 1;
    call.attr.eps = 1e-5f;
    call.in[0] = spm_tensor_make(x, 2, 1, 3, 0, 0);
    call.in[1] = spm_tensor_make(w, 1, 3, 0, 0, 0);
    call.in[2] = spm_tensor_make(b, 1, 3, 0, 0, 0);
    call.in[3] = spm_tensor_make(mean, 1, 3, 0, 0, 0);
    call.in[4] = spm_tensor_make(var, 1, 3, 0, 0, 0);
    CHECK_INT(spm_op_infer(ctx_of[0], SPM_OP_BATCH_NORM, &call, &err), SPM_OK);
    call.out[0].data = y;
    call.out[1].data = m;
    call.out[2].data = v;
    call.scratch = memory + (64 - (uintptr_t)memory % 64) % 64;
    CHECK(spm_op_scratch(ctx_of[0], SPM_OP_BATCH_NORM, &call, 0) <= sizeof memory - 64);
    CHECK(spm_op_scratch(ctx_of[0], SPM_OP_BATCH_NORM, &call, 1) <= sizeof memory - 64);
    spm_op_forward(ctx_of[0], SPM_OP_BATCH_NORM, &call);
    call.d_out = call.out[0];
    call.d_out.data = dy;
    call.d_in[0] = call.in[0];
    call.d_in[0].data = dx;
    call.d_in[1] = call.in[1];
    call.d_in[1].data = dw;
    spm_op_backward(ctx_of[0], SPM_OP_BATCH_NORM, &call);
    for (i = 0; i < 3; i++) {
        CHECK_NEAR(y[i], b[i], 0);
        CHECK_NEAR(m[i], x[i], 0);
        CHECK_NEAR(v[i], 0, 0);
        CHECK_NEAR(dx[i], 0, 1e-3); /* of terms near 600 */
        CHECK_NEAR(dw[i], 0, 0);
    }
}

static void tensor_differences(void)
{
    float a[3] = { 1.0f, INFINITY, 2.0f }, b[3] = { 1.0f, INFINITY, 4.0f };
    spm_tensor x = spm_tensor_make(a, 1, 3, 0, 0, 0), y = spm_tensor_make(b, 1, 3, 0, 0, 0);
    CHECK_NEAR(spm_tensor_difference(&x, &x), 0, 0);
    CHECK_NEAR(spm_tensor_difference(&x, &y), 0.5, 1e-12); /* equal infinities hide nothing */
    b[1] = 3.0f;
    CHECK(spm_tensor_difference(&x, &y) > 1e300 && spm_tensor_difference(&y, &x) > 1e300);
    b[1] = -INFINITY;
    CHECK(spm_tensor_difference(&x, &y) > 1e300);
    a[1] = NAN;
    CHECK(spm_tensor_difference(&x, &y) > 1e300 && spm_tensor_difference(&x, &x) > 1e300);
    y.shape[0] = 2;
    CHECK(spm_tensor_difference(&x, &y) > 1e300);
}

static void table(void)
{
    int i, k;
    CHECK_STR(spm_op_name(SPM_OP_CONV2D), "conv2d");
    CHECK_STR(spm_op_name(SPM_OP_NTXENT), "ntxent");
    for (i = 1; i < SPM_OP_COUNT; i++) {
        CHECK(spm_op_name((spm_op)i)[0] != 0 && strcmp(spm_op_name((spm_op)i), "none"));
        CHECK(spm_op_differentiable((spm_op)i, 0));
        CHECK(!spm_op_differentiable((spm_op)i, -1) && !spm_op_differentiable((spm_op)i, SPM_OP_MAX_IN));
        for (k = 0; k < i; k++) CHECK(strcmp(spm_op_name((spm_op)i), spm_op_name((spm_op)k)));
    }
    CHECK(!spm_op_differentiable(SPM_OP_BATCH_NORM, 3) && spm_op_differentiable(SPM_OP_BATCH_NORM, 5));
}

/* What spm_op_backward_reads does not name may be destroyed between the passes. */
static void kept_values(void)
{
    op_case tests[16];
    int i, k, n = 0;
    tests[n++] = case_bn(2, 9, 7, 35, 1, 1, 1);
    tests[n++] = case_bn(2, 9, 7, 35, 1, 0, 0);
    tests[n++] = case_bn(2, 9, 7, 35, 0, 1, 1);
    tests[n++] = case_pool(SPM_OP_MAX_POOL, 7, 6, 19, 3, 2, 1);
    tests[n++] = case_pool(SPM_OP_AVG_POOL, 7, 6, 19, 3, 2, 1);
    tests[n] = make_case(SPM_OP_RELU, "kept");
    shape(&tests[n++], 0, 5, 9, 0, 0);
    tests[n] = make_case(SPM_OP_GELU, "kept");
    shape(&tests[n++], 0, 5, 9, 0, 0);
    tests[n] = make_case(SPM_OP_SOFTMAX, "kept");
    shape(&tests[n++], 0, 5, 9, 0, 0);
    tests[n++] = case_small(SPM_OP_LAYER_NORM, "kept");
    tests[n++] = case_small(SPM_OP_ATTENTION, "kept");
    tests[n++] = case_small(SPM_OP_NTXENT, "kept");
    tests[n] = make_case(SPM_OP_CROSS_ENTROPY, "kept");
    shape(&tests[n], 0, 4, 6, 0, 0);
    shape(&tests[n], 1, 4, 6, 0, 0);
    shape(&tests[n++], 2, 4, 0, 0, 0);
    tests[n] = make_case(SPM_OP_LINEAR, "kept");
    shape(&tests[n], 0, 4, 6, 0, 0);
    shape(&tests[n], 1, 5, 6, 0, 0);
    shape(&tests[n++], 2, 5, 0, 0, 0);
    tests[n++] = case_small(SPM_OP_TOKENS, "kept");
    tests[n++] = case_small(SPM_OP_DROPOUT, "kept");
    for (i = 0; i < n; i++) {
        spm_op_call call, again;
        if (!run_case(&tests[i], &call) || !prepare(ctx_of[1], &tests[i], &again)) continue;
        spm_op_forward(ctx_of[1], tests[i].op, &again);
        for (k = 0; k < SPM_OP_MAX_IN; k++) { /* batch norm reads its residual's presence, never its values */
            if (again.in[k].data && !spm_op_backward_reads(tests[i].op, &again.attr, 0, k)) {
                memset(again.in[k].data, 0xff, (size_t)spm_tensor_count(&again.in[k]) * sizeof(float));
            }
        }
        for (k = 0; k < again.n_out; k++) {
            if (!spm_op_backward_reads(tests[i].op, &again.attr, 1, k)) {
                memset(again.out[k].data, 0xff, (size_t)spm_tensor_count(&again.out[k]) * sizeof(float));
            }
        }
        spm_op_backward(ctx_of[1], tests[i].op, &again);
        for (k = 0; k < call.n_in; k++) {
            if (call.d_in[k].data && memcmp(call.d_in[k].data, again.d_in[k].data,
                                            (size_t)spm_tensor_count(&call.in[k]) * sizeof(float))) {
                complain(&tests[i], ctx_of[1], "the backward pass reads more than it says; gradient", k);
            }
        }
        release(&call);
        release(&again);
    }
}

/* Outputs beyond SPMI_PAST go past the caches: the same bits as those of the halves, which do not. */
static void large_outputs(void)
{
    static const int64_t width[2] = { 1024, 1000 };
    int k, part;
    for (k = 0; k < 2; k++) {
        const int64_t n = width[k], rows = 2 * ((INT64_C(8) << 20) / n / 2 + 8);
        op_case whole = make_case(SPM_OP_LAYER_NORM, "large");
        spm_op_call call, half;
        shape(&whole, 0, rows, n, 0, 0);
        shape(&whole, 1, n, 0, 0, 0);
        shape(&whole, 2, n, 0, 0, 0);
        CHECK(prepare(ctx_of[1], &whole, &call));
        spm_op_forward(ctx_of[1], whole.op, &call);
        spm_op_backward(ctx_of[1], whole.op, &call);
        whole.shape[0][0] = rows / 2;
        CHECK(prepare(ctx_of[1], &whole, &half));
        for (part = 0; part < 2; part++) {
            const int64_t at = part * (rows / 2) * n;
            const size_t bytes = (size_t)(rows / 2 * n) * sizeof(float);
            memcpy(half.in[0].data, call.in[0].data + at, bytes);
            memcpy(half.d_out.data, call.d_out.data + at, bytes);
            memcpy(half.in[1].data, call.in[1].data, (size_t)n * sizeof(float));
            memcpy(half.in[2].data, call.in[2].data, (size_t)n * sizeof(float));
            spm_op_forward(ctx_of[1], whole.op, &half);
            spm_op_backward(ctx_of[1], whole.op, &half);
            CHECK(memcmp(half.out[0].data, call.out[0].data + at, bytes) == 0);
            CHECK(memcmp(half.d_in[0].data, call.d_in[0].data + at, bytes) == 0);
        }
        release(&call);
        release(&half);
    }
}

int main(void)
{
    static const spm_isa sets[] = { SPM_ISA_C, SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512 };
    int i;
    for (i = 0; i < 4; i++) {
        if (!open_contexts(sets[i])) continue;
        case_number = 500;
        TEST(golden_file);
        TEST(norm_sizes);
        TEST(elementwise_sizes);
        TEST(pool_sizes);
        TEST(token_sizes);
        TEST(loss_sizes);
        TEST(product_sizes);
        TEST(gradient_modes);
        TEST(no_saved_outputs);
        TEST(kept_values);
        TEST(batch_norm_offset);
        TEST(gelu_accuracy);
        TEST(softmax_extremes);
        TEST(max_pool_ties);
        TEST(dropout_draws);
        TEST(tied_dropout_draws);
        TEST(loss_extremes);
        TEST(ntxent_corners);
        TEST(refusals);
        TEST(batch_norm_of_one);
        TEST(tensor_differences);
        TEST(table);
        close_contexts();
    }
    if (open_contexts(SPM_ISA_AUTO)) {
        TEST(large_outputs);
        close_contexts();
    }
    return TEST_END;
}
