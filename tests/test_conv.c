/* conv2d and linear, forward and backward, against a naive sum in double precision: every instruction set of this
 * machine, odd shapes, the same bits for any number of threads. */
#define SPURMEM_STATIC
#define SPURMEM_IMPLEMENTATION
#include "../spurmem.h"
#include "test.h"

/* n h w c o kh kw, stride, padding and dilation in h and w, groups */
static const int cases[][14] = {
    { 1, 5, 5, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 7, 7, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 5, 4, 4, 32, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 1, 56, 56, 8, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 14, 13, 64, 128, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 3, 2, 2, 128, 96, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 1, 1, 40, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 9, 9, 17, 19, 3, 3, 2, 2, 1, 1, 1, 1, 1 },
    { 5, 8, 8, 32, 48, 3, 3, 2, 2, 1, 1, 1, 1, 1 },
    { 1, 33, 31, 3, 64, 7, 7, 2, 2, 3, 3, 1, 1, 1 },
    { 2, 32, 32, 3, 16, 7, 7, 2, 2, 3, 3, 1, 1, 1 },
    { 2, 16, 16, 3, 20, 4, 4, 4, 4, 0, 0, 1, 1, 1 },
    { 1, 17, 19, 3, 20, 4, 4, 4, 4, 0, 0, 1, 1, 1 },
    { 2, 9, 11, 5, 7, 3, 3, 3, 3, 0, 0, 1, 1, 1 },
    { 2, 9, 11, 5, 7, 2, 2, 3, 3, 1, 1, 1, 1, 1 },
    { 2, 10, 10, 6, 10, 3, 3, 1, 1, 2, 2, 2, 2, 1 },
    { 1, 12, 11, 6, 10, 3, 3, 2, 2, 2, 2, 2, 2, 1 },
    { 1, 12, 11, 6, 10, 3, 3, 2, 1, 3, 2, 3, 2, 1 },
    { 1, 13, 11, 4, 9, 3, 3, 4, 6, 3, 3, 6, 4, 1 },
    { 2, 8, 12, 12, 20, 1, 5, 1, 1, 0, 2, 1, 1, 1 },
    { 2, 12, 8, 12, 20, 5, 1, 1, 2, 2, 0, 1, 1, 1 },
    { 1, 9, 8, 7, 6, 2, 4, 1, 3, 0, 3, 1, 1, 1 },
    { 2, 6, 6, 64, 128, 1, 1, 1, 1, 0, 0, 1, 1, 1 },
    { 5, 3, 5, 37, 50, 1, 1, 1, 1, 0, 0, 1, 1, 1 },
    { 2, 7, 8, 64, 32, 1, 1, 2, 2, 0, 0, 1, 1, 1 },
    { 2, 7, 7, 512, 80, 1, 1, 2, 2, 0, 0, 1, 1, 1 },
    { 1, 5, 6, 9, 8, 1, 1, 1, 1, 1, 2, 1, 1, 1 },
    { 1, 5, 6, 9, 8, 1, 1, 3, 2, 1, 1, 1, 1, 1 },
    { 1, 4, 4, 1200, 40, 1, 1, 1, 1, 0, 0, 1, 1, 1 },
    { 1, 3, 3, 512, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 6, 6, 1024, 65, 1, 1, 1, 1, 0, 0, 1, 1, 1 },
    { 2, 8, 7, 12, 18, 3, 3, 1, 1, 1, 1, 1, 1, 3 },
    { 2, 8, 7, 32, 32, 3, 3, 2, 2, 1, 1, 1, 1, 8 },
    { 2, 6, 6, 64, 128, 3, 3, 1, 1, 1, 1, 1, 1, 2 },
    { 2, 6, 6, 24, 36, 1, 1, 1, 1, 0, 0, 1, 1, 4 },
    { 2, 9, 9, 21, 21, 3, 3, 1, 1, 1, 1, 1, 1, 21 },
    { 2, 9, 9, 32, 32, 3, 3, 2, 2, 1, 1, 1, 1, 32 },
    { 1, 9, 9, 5, 15, 5, 3, 1, 2, 2, 1, 1, 2, 5 },
    { 1, 20, 3, 20, 4, 3, 3, 1, 1, 3, 3, 1, 1, 1 },
    { 16, 4, 4, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 5, 8, 8, 32, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* from here by Winograd: flat tiles, shared filters */
    { 1, 30, 26, 49, 71, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 12, 11, 40, 33, 3, 3, 1, 1, 0, 2, 1, 1, 1 },
    { 3, 7, 7, 150, 200, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* and their own filters */
    { 20, 8, 7, 136, 136, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 1, 7, 7, 193, 197, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 17, 7, 7, 193, 197, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 33, 34, 49, 71, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* shared again, then weight gradients in chunks */
    { 3, 66, 65, 33, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 18, 28, 27, 68, 66, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 16, 28, 28, 72, 80, 3, 3, 1, 1, 1, 1, 1, 1, 2 },
    { 15, 28, 29, 64, 72, 3, 3, 1, 1, 1, 1, 1, 1, 2 },
    { 1, 248, 245, 32, 36, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* of several pieces */
    { 3, 9, 70, 20, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* flat tiles */
    { 40, 3, 3, 16, 17, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 33, 6, 6, 130, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1 },
    { 2, 5, 254, 16, 16, 3, 3, 1, 1, 0, 2, 1, 1, 1 },
    { 1, 5, 257, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1 }, /* too wide for them */
    { 2, 14, 15, 130, 136, 3, 3, 2, 2, 1, 1, 1, 1, 1 }, /* the corners of strided ones */
    { 1, 28, 29, 66, 132, 3, 3, 2, 2, 1, 1, 1, 1, 2 },
    { 5, 29, 28, 40, 36, 3, 3, 2, 2, 1, 0, 1, 1, 1 },
    { 2, 17, 16, 20, 24, 3, 3, 2, 2, 2, 2, 2, 2, 1 }, /* stride and dilation alike: flat tiles, */
    { 1, 31, 30, 40, 36, 3, 3, 2, 2, 2, 2, 2, 2, 1 }, /* and square ones */
    { 1, 16, 15, 66, 70, 2, 2, 1, 1, 0, 0, 1, 1, 1 }, /* 2x2 taps, and 2x2 phases of the input's gradient */
    { 1, 28, 30, 64, 66, 4, 4, 2, 2, 1, 1, 1, 1, 1 },
    { 3, 5, 5, 16, 20, 4, 4, 2, 2, 0, 0, 1, 1, 1 }, /* 2x2 outputs; pixels of the input that no output reads */
    { 2, 1, 1, 16, 20, 3, 3, 2, 2, 3, 3, 1, 1, 1 }, /* outputs that read no pixel */
    { 7, 3, 4, 16, 18, 3, 3, 2, 2, 2, 1, 2, 1, 1 } /* rows with holes */
};

static unsigned state = 1;

static float draw(void)
{
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

#define GUARD 32
/* An array with guards that `check_guards` looks at; filled with NaN, so that what is read before it is written shows.
 * */
static float *array_new(size_t count)
{
    float *p = (float *)malloc((count + 2 * GUARD) * sizeof *p);
    size_t i;
    for (i = 0; i < count + 2 * GUARD; i++) p[i] = (float)NAN;
    for (i = 0; i < GUARD; i++) p[i] = p[count + GUARD + i] = 12345.0f;
    return p + GUARD;
}

static void array_check(float *p, size_t count)
{
    size_t i;
    int bad = 0;
    for (i = 0; i < GUARD; i++) bad += p[-(int)i - 1] != 12345.0f || p[count + i] != 12345.0f;
    CHECK_INT(bad, 0);
}

static void array_free(float *p)
{
    if (p) free(p - GUARD);
}

static float *array_random(size_t count)
{
    float *p = array_new(count);
    size_t i;
    for (i = 0; i < count; i++) p[i] = draw();
    return p;
}

typedef struct problem {
    spm_op_call call;
    int linear;
    size_t count_y, count_x, count_w, count_b;
    double *y, *dx, *dw, *db; /* the reference */
    double depth_y, depth_x, depth_w;
    float *start[3];          /* what the gradients are added to */
} problem;

static void reference(problem *p)
{
    const spm_tensor *x = &p->call.in[0], *w = &p->call.in[1], *y = &p->call.out[0];
    const spm_op_attr *a = &p->call.attr;
    int64_t n, q, r, o, s, t, i, h, v;
    int64_t H = 1, W = 1, C = x->shape[x->rank - 1], O = w->shape[0], KH = 1, KW = 1, Q = 1, R = 1, N, ci, co;
    int64_t stride[2] = { 1, 1 }, dilation[2] = { 1, 1 }, padding[2] = { 0, 0 };
    if (p->linear) N = (int64_t)p->count_x / C;
    else {
        N = x->shape[0]; H = x->shape[1]; W = x->shape[2]; KH = w->shape[1]; KW = w->shape[2]; Q = y->shape[1];
        R = y->shape[2];
        stride[0] = a->stride[0]; stride[1] = a->stride[1]; padding[0] = a->padding[0]; padding[1] = a->padding[1];
        dilation[0] = a->dilation[0]; dilation[1] = a->dilation[1];
    }
    ci = C / (p->linear ? 1 : a->groups);
    co = O / (p->linear ? 1 : a->groups);
    p->y = (double *)calloc(p->count_y, sizeof(double));
    p->dx = (double *)calloc(p->count_x, sizeof(double));
    p->dw = (double *)calloc(p->count_w, sizeof(double));
    p->db = (double *)calloc(p->count_b, sizeof(double));
    p->depth_y = (double)(KH * KW * ci);
    p->depth_x = (double)(KH * KW * co);
    p->depth_w = (double)(N * Q * R);
    for (n = 0; n < N; n++) for (q = 0; q < Q; q++) for (r = 0; r < R; r++) for (o = 0; o < O; o++) {
        int64_t at = ((n * Q + q) * R + r) * O + o;
        double sum = p->call.in[2].data ? (double)p->call.in[2].data[o] : 0.0, dy = (double)p->call.d_out.data[at];
        p->db[o] += dy;
        for (s = 0; s < KH; s++) for (t = 0; t < KW; t++) {
            h = q * stride[0] + s * dilation[0] - padding[0];
            v = r * stride[1] + t * dilation[1] - padding[1];
            if (h < 0 || h >= H || v < 0 || v >= W) continue;
            for (i = 0; i < ci; i++) {
                int64_t xi = ((n * H + h) * W + v) * C + o / co * ci + i, wi = ((o * KH + s) * KW + t) * ci + i;
                sum += (double)x->data[xi] * (double)w->data[wi];
                p->dx[xi] += dy * (double)w->data[wi];
                p->dw[wi] += dy * (double)x->data[xi];
            }
        }
        p->y[at] = sum;
    }
}

static spm_status infer(spm_context *ctx, problem *p, spm_error *err)
{
    return p->linear ? spmi_linear_infer(ctx, &p->call, err) : spmi_conv2d_infer(ctx, &p->call, err);
}

static void problem_make(spm_context *ctx, problem *p, int bias)
{
    spm_error err = SPM_ZERO;
    spm_op_call *c = &p->call;
    int i;
    size_t n;
    c->n_in = bias ? 3 : 2;
    CHECK_INT(infer(ctx, p, &err), SPM_OK);
    for (p->count_x = 1, i = 0; i < c->in[0].rank; i++) p->count_x *= (size_t)c->in[0].shape[i];
    for (p->count_w = 1, i = 0; i < c->in[1].rank; i++) p->count_w *= (size_t)c->in[1].shape[i];
    for (p->count_y = 1, i = 0; i < c->out[0].rank; i++) p->count_y *= (size_t)c->out[0].shape[i];
    p->count_b = (size_t)c->in[1].shape[0];
    c->in[0].data = array_random(p->count_x);
    c->in[1].data = array_random(p->count_w);
    if (bias) {
        c->in[2].rank = 1;
        c->in[2].shape[0] = (int64_t)p->count_b;
        c->in[2].data = array_random(p->count_b);
    }
    c->d_out = c->out[0];
    c->d_out.data = array_random(p->count_y);
    for (i = 0; i < 3; i++) {
        n = i == 0 ? p->count_x : i == 1 ? p->count_w : p->count_b;
        p->start[i] = array_random(n);
    }
    reference(p);
}

static void problem_free(problem *p)
{
    int i;
    for (i = 0; i < 3; i++) {
        array_free(p->call.in[i].data);
        array_free(p->start[i]);
    }
    array_free(p->call.d_out.data);
    free(p->y);
    free(p->dx);
    free(p->dw);
    free(p->db);
}

static void compare(const char *what, const float *got, const double *want, const float *start, size_t count,
                    double depth, spm_isa isa, int index)
{
    double worst = 0.0, allowed = 1e-6 + 3.5e-6 * sqrt(depth);
    size_t i, at = 0;
    for (i = 0; i < count; i++) {
        double e = fabs((double)got[i] - want[i] - (start ? (double)start[i] : 0.0));
        if (!(e <= worst)) {
            worst = e;
            at = i;
        }
    }
    if (!(worst <= allowed)) {
        char text[200];
        snprintf(text, sizeof text, "%s %s, case %d: element %lu off by %g, allowed %g", spm_isa_name(isa), what,
                 index, (unsigned long)at, worst, allowed);
        test_report(__FILE__, __LINE__, text);
    }
}

/* Forward and backward on one context; fills out[0..3] = y, dx, dw, db (fresh arrays). */
static void execute(spm_context *ctx, problem *p, int add, int packed, float *out[4])
{
    size_t bytes_f, bytes_b, bytes_p, i;
    spm_op_call c = p->call;
    float *scratch, *pack = NULL;
    int j;
    out[0] = array_new(p->count_y);
    out[1] = array_new(p->count_x);
    out[2] = array_new(p->count_w);
    out[3] = array_new(p->count_b);
    for (j = 0; add && j < 3; j++) {
        memcpy(out[j + 1], p->start[j], sizeof(float) * (j == 0 ? p->count_x : j == 1 ? p->count_w : p->count_b));
    }
    c.out[0].data = out[0];
    bytes_p = p->linear ? spmi_linear_packed(ctx, &c) : spmi_conv2d_packed(ctx, &c);
    bytes_f = p->linear ? spmi_linear_scratch(ctx, &c, 0) : spmi_conv2d_scratch(ctx, &c, 0);
    bytes_b = p->linear ? spmi_linear_scratch(ctx, &c, 1) : spmi_conv2d_scratch(ctx, &c, 1);
    CHECK_INT(bytes_f % 4 + bytes_b % 4 + bytes_p % 4, 0);
    if (packed) {
        pack = array_new(bytes_p / 4);
        c.packed = pack;
    }
    scratch = array_new(bytes_f / 4);
    c.scratch = scratch;
    for (i = 0; i <= (size_t)packed; i++) { /* the second time with ready weights */
        if (p->linear) spmi_linear_forward(ctx, &c);
        else spmi_conv2d_forward(ctx, &c);
    }
    if (packed) {
        CHECK_INT(c.packed_ready, 1);
        array_check(pack, bytes_p / 4);
        array_free(pack);
    }
    array_check(scratch, bytes_f / 4);
    array_free(scratch);
    scratch = array_new(bytes_b / 4);
    c.scratch = scratch;
    for (j = 0; j < 3; j++) {
        c.d_in[j] = c.in[j];
        c.d_in[j].data = out[j + 1];
        c.d_in_add[j] = add;
    }
    if (p->linear) spmi_linear_backward(ctx, &c);
    else spmi_conv2d_backward(ctx, &c);
    array_check(scratch, bytes_b / 4);
    array_free(scratch);
    array_check(out[0], p->count_y);
    array_check(out[1], p->count_x);
    array_check(out[2], p->count_w);
    array_check(out[3], p->count_b);
}

static void free_results(float *out[4])
{
    int i;
    for (i = 0; i < 4; i++) array_free(out[i]);
}

static void check_problem(spm_context **ctx, int contexts, problem *p, int index)
{
    float *first[4], *out[4];
    const size_t count[4] = { p->count_y, p->count_x, p->count_w, p->count_b };
    int i, j, add = index % 2, bias = p->call.n_in > 2;
    for (i = 0; i < contexts; i++) {
        spm_isa isa = spm_context_isa(ctx[i]);
        execute(ctx[i], p, add, (index + i) % 3 == 0, i == 0 ? first : out);
        if (i == 0) {
            compare("y", first[0], p->y, NULL, p->count_y, p->depth_y, isa, index);
            compare("dx", first[1], p->dx, add ? p->start[0] : NULL, p->count_x, p->depth_x, isa, index);
            compare("dw", first[2], p->dw, add ? p->start[1] : NULL, p->count_w, p->depth_w, isa, index);
            if (bias) compare("db", first[3], p->db, add ? p->start[2] : NULL, p->count_b, p->depth_w, isa, index);
        } else {
            for (j = 0; j < 3 + bias; j++) {
                if (memcmp(first[j], out[j], count[j] * sizeof(float)) != 0) {
                    char text[160];
                    snprintf(text, sizeof text, "%s, case %d: result %d has other bits with %d threads",
                             spm_isa_name(isa), index, j, spm_context_threads(ctx[i]));
                    test_report(__FILE__, __LINE__, text);
                }
            }
            free_results(out);
        }
    }
    free_results(first);
}

static int contexts_make(spm_isa isa, spm_context *ctx[4])
{
    static const int threads[4] = { 2, 1, 3, 5 };
    int i;
    for (i = 0; i < 4; i++) {
        spm_context_desc desc = SPM_ZERO;
        desc.isa = isa;
        desc.threads = threads[i];
        ctx[i] = spm_context_create(&desc);
        if (!ctx[i]) return 0;
    }
    return 4;
}

static void test_isa(spm_isa isa)
{
    static const int linear[][4] = {
        { 1, 0, 16, 2 }, { 5, 0, 33, 2 }, { 16, 0, 512, 1000 }, { 3, 17, 48, 144 }, { 2, 197, 64, 65 }, { 7, 1, 1, 1 },
        { 300, 0, 20, 30 }, { 1, 3, 1300, 7 }
    };
    spm_context *ctx[4];
    int n = contexts_make(isa, ctx), i, d;
    if (!n) return; /* not on this machine */
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        const int *c = cases[i];
        problem p = SPM_ZERO;
        p.call.in[0] = spm_tensor_make(NULL, 4, c[0], c[1], c[2], c[3]);
        p.call.in[1] = spm_tensor_make(NULL, 4, c[4], c[5], c[6], c[3] / c[13]);
        for (d = 0; d < 2; d++) {
            p.call.attr.stride[d] = c[7 + d];
            p.call.attr.padding[d] = c[9 + d];
            p.call.attr.dilation[d] = c[11 + d];
        }
        p.call.attr.groups = c[13];
        problem_make(ctx[0], &p, i % 3 != 0);
        check_problem(ctx, n, &p, i);
        problem_free(&p);
    }
    for (i = 0; i < (int)(sizeof linear / sizeof *linear); i++) {
        const int *c = linear[i];
        problem p = SPM_ZERO;
        p.linear = 1;
        p.call.in[0] = c[1] ? spm_tensor_make(NULL, 3, c[0], c[1], c[2], 0) : spm_tensor_make(NULL, 2, c[0], c[2], 0,
                                                                                              0);
        p.call.in[1] = spm_tensor_make(NULL, 2, c[3], c[2], 0, 0);
        problem_make(ctx[0], &p, i % 3 != 0);
        check_problem(ctx, n, &p, 100 + i);
        problem_free(&p);
    }
    for (i = 0; i < n; i++) spm_context_destroy(ctx[i]);
}

static void test_plain_c(void) { test_isa(SPM_ISA_C); }
static void test_neon(void) { test_isa(SPM_ISA_NEON); }
static void test_avx2(void) { test_isa(SPM_ISA_AVX2); }
static void test_avx512(void) { test_isa(SPM_ISA_AVX512); }

/* Shapes that do not fit are refused with a sentence. */
static void test_refusals(void)
{
    static const int bad[][12] = { /* h w c o kh kw wi stride padding dilation groups */
        { 5, 5, 4, 4, 3, 3, 3, 1, 0, 1, 1, 0 }, { 5, 5, 4, 4, 6, 3, 4, 1, 0, 1, 1, 0 }, { 5, 5, 4, 6, 3, 3, 1, 1, 0, 1,
                                                                                          4, 0 },
        { 5, 5, 4, 4, 3, 3, 4, -1, 0, 1, 1, 0 }, { 5, 5, 4, 4, 3, 3, 4, 1, -1, 1, 1, 0 }, { 5, 5, 4, 4, 3, 3, 4, 1, 0,
                                                                                            3, 1, 0 },
        { 0, 5, 4, 4, 3, 3, 4, 1, 1, 1, 1, 0 }
    };
    spm_context *ctx = spm_context_create(NULL);
    int i, d;
    for (i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
        spm_op_call call = SPM_ZERO;
        spm_error err = SPM_ZERO;
        const int *c = bad[i];
        call.n_in = 2;
        call.in[0] = spm_tensor_make(NULL, 4, 1, c[0], c[1], c[2]);
        call.in[1] = spm_tensor_make(NULL, 4, c[3], c[4], c[5], c[6]);
        for (d = 0; d < 2; d++) {
            call.attr.stride[d] = c[7];
            call.attr.padding[d] = c[8];
            call.attr.dilation[d] = c[9];
        }
        call.attr.groups = c[10];
        CHECK_INT(spmi_conv2d_infer(ctx, &call, &err), SPM_E_SHAPE);
        CHECK(strncmp(err.text, "conv2d: ", 8) == 0);
    }
    {
        spm_op_call call = SPM_ZERO;
        spm_error err = SPM_ZERO;
        call.n_in = 2;
        call.in[0] = spm_tensor_make(NULL, 2, 4, 10, 0, 0);
        call.in[1] = spm_tensor_make(NULL, 2, 5, 11, 0, 0);
        CHECK_INT(spmi_linear_infer(ctx, &call, &err), SPM_E_SHAPE);
        CHECK(strncmp(err.text, "linear: ", 8) == 0);
    }
    spm_context_destroy(ctx);
}

/* By Winograd and tap by tap: the same numbers in other bits; a picture's bits do not depend on the batch around it.
 * Height, width, input and output channels, stride, groups; every kind of edge. */
static void test_winograd(void)
{
    static const int64_t shapes[][7] = { /* the last: 1 where plain C's outputs go by Winograd too */
        { 14, 13, 40, 72, 1, 1, 0 }, { 15, 14, 68, 72, 1, 1, 1 }, { 7, 7, 200, 150, 1, 1, 1 }, { 9, 11, 20, 17, 1, 1, 0 },
        { 28, 29, 66, 68, 2, 1, 0 }, { 14, 15, 130, 136, 2, 1, 0 }, { 28, 28, 130, 132, 2, 2, 0 }
    };
    const int cases = (int)(sizeof shapes / sizeof *shapes);
    int i, direct;
    for (i = 0; i < cases; i++) {
        const int64_t *shape = shapes[i];
        const int add = i / 2 % 2;
        spm_isa isa = SPM_ISA_C;
        int by_taps;
        float *out[2][4];
        problem p = SPM_ZERO;
        size_t picture;
        p.call.training = i % 2; /* filters are transformed in double, else in floats */
        p.call.in[0] = spm_tensor_make(NULL, 4, 2, shape[0], shape[1], shape[2]);
        p.call.in[1] = spm_tensor_make(NULL, 4, shape[3], 3, 3, shape[2] / shape[5]);
        p.call.attr.groups = shape[5];
        p.call.attr.stride[0] = p.call.attr.stride[1] = shape[4];
        p.call.attr.padding[0] = p.call.attr.padding[1] = p.call.attr.dilation[0] = p.call.attr.dilation[1] = 1;
        for (direct = 0; direct < 2; direct++) {
            spm_context_desc desc = SPM_ZERO;
            spm_context *ctx;
            desc.direct_convolution = direct;
            ctx = spm_context_create(&desc);
            isa = spm_context_isa(ctx);
            if (direct == 0) problem_make(ctx, &p, 0);
            execute(ctx, &p, add, i % 3 == 0, out[direct]);
            compare("y", out[direct][0], p.y, NULL, p.count_y, p.depth_y, spm_context_isa(ctx), 100 + 2 * i + direct);
            compare("dx", out[direct][1], p.dx, add ? p.start[0] : NULL, p.count_x, p.depth_x, spm_context_isa(ctx),
                    100 + 2 * i + direct);
            compare("dw", out[direct][2], p.dw, add ? p.start[1] : NULL, p.count_w, p.depth_w, spm_context_isa(ctx),
                    100 + 2 * i + direct);
            picture = p.count_y / 2;
            if (direct == 0) {
                float *one[4];
                problem q = p;
                q.call.in[0].shape[0] = q.call.out[0].shape[0] = q.call.d_out.shape[0] = 1;
                q.count_y /= 2;
                q.count_x /= 2;
                execute(ctx, &q, add, 0, one);
                CHECK(memcmp(one[0], out[0][0], picture * sizeof(float)) == 0);
                CHECK(memcmp(one[1], out[0][1], q.count_x * sizeof(float)) == 0);
                free_results(one);
            }
            spm_context_destroy(ctx);
        }
        by_taps = isa == SPM_ISA_C && !shape[6];
        CHECK((memcmp(out[0][0], out[1][0], p.count_y * sizeof(float)) == 0) == by_taps);
        CHECK(memcmp(out[0][1], out[1][1], p.count_x * sizeof(float)) != 0);
        CHECK(memcmp(out[0][2], out[1][2], p.count_w * sizeof(float)) != 0);
        free_results(out[0]);
        free_results(out[1]);
        problem_free(&p);
    }
}

int main(void)
{
    TEST(test_winograd);
    TEST(test_plain_c);
    TEST(test_neon);
    TEST(test_avx2);
    TEST(test_avx512);
    TEST(test_refusals);
    return TEST_END;
}
