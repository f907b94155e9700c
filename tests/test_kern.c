/* The matrix kernels of every instruction set of this machine against their plain-C twins, at odd sizes, and products
 * of
 * matrices with any strides against a naive sum. What lies behind the written part must stay untouched. */
#define SPURMEM_STATIC
#define SPURMEM_IMPLEMENTATION
#include "../spurmem.h"
#include "test.h"

static unsigned state = 7;

static float draw(void)
{
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static float *random_floats(int64_t count)
{
    float *p = (float *)malloc((size_t)(count + 1) * sizeof *p);
    int64_t i;
    for (i = 0; i < count; i++) p[i] = draw();
    return p;
}

/* Calls check(plain, ctx) for every instruction set of this machine. */
static void each_isa(void (*check)(spm_context *plain, spm_context *ctx))
{
    static const spm_isa isas[] = { SPM_ISA_C, SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512 };
    spm_context_desc desc = SPM_ZERO;
    spm_context *plain, *ctx;
    int i;
    desc.threads = 1;
    desc.isa = SPM_ISA_C;
    plain = spm_context_create(&desc);
    for (i = 0; i < (int)(sizeof isas / sizeof *isas); i++) {
        desc.isa = isas[i];
        ctx = spm_context_create(&desc);
        if (!ctx) continue; /* not on this machine */
        check(plain, ctx);
        spm_context_destroy(ctx);
    }
    spm_context_destroy(plain);
}

static void same(const char *what, const spm_context *ctx, const float *a, const float *b, int64_t count,
                 double allowed)
{
    int64_t i;
    for (i = 0; i < count; i++) {
        if (!(fabs((double)a[i] - (double)b[i]) <= allowed)) {
            char text[160];
            snprintf(text, sizeof text, "%s %s: element %ld of %ld is %g, plain C says %g",
                     spm_isa_name(spm_context_isa(ctx)), what,
                     (long)i, (long)count, (double)a[i], (double)b[i]);
            test_report(__FILE__, __LINE__, text);
            return;
        }
    }
}

/* ---- rows ---- */

typedef struct rows_case {
    int64_t rows, taps, k, columns;
    int accumulate, bias;
    const spm_op_norm *norm;
    int64_t a_step, gap; /* of a's elements; between the rows of b */
} rows_case;

static void run_rows(spm_context *ctx, const rows_case *t, const float *a, int64_t a_count, const float *b,
                     const float *bias, float *c)
{
    const int64_t depth = t->taps * t->k;
    float *packed = (float *)malloc(sizeof(float) * (size_t)(depth * spmi_round_up(t->columns, 64) + 1));
    float *apart = (float *)malloc(sizeof(float) * (size_t)(depth * (64 + t->gap) + 1));
    int64_t *a_at = (int64_t *)malloc(sizeof(int64_t) * (size_t)(t->rows + SPMI_ROWS_PAD)), i, j;
    int64_t *c_at = (int64_t *)malloc(sizeof(int64_t) * (size_t)t->rows),
        *tap_at = (int64_t *)malloc(sizeof(int64_t) * (size_t)(t->taps + 1));
    spm_op_norm norm = SPM_ZERO;
    spmi_rows g = SPM_ZERO;
    spmi_pack_panels(ctx, depth, t->columns, b, t->columns, 1, packed);
    for (i = 0; i < t->taps; i++) tap_at[i] = (i * 37) % 101;
    for (i = 0; i < t->rows + SPMI_ROWS_PAD; i++) a_at[i] = i < t->rows ? (i * 53) % (a_count - 101 - t->k * SPMI_MAX(t->a_step, 1)) : 0;
    for (i = 0; i < t->rows; i++) c_at[i] = (t->rows - 1 - i) * (t->columns + 3);
    g.a = a;
    g.a_at = a_at;
    g.tap_at = tap_at;
    g.taps = t->taps;
    g.k = t->k;
    g.a_step = t->a_step;
    g.c_at = c_at;
    g.rows = t->rows;
    g.accumulate = t->accumulate;
    for (j = 0; j < t->columns; j += g.width) {
        g.width = spmi_panel_width(ctx, t->columns - j);
        g.columns = (int)SPMI_MIN(t->columns - j, g.width);
        g.b = packed + j * depth;
        if (t->gap) {
            g.b_row = g.width + t->gap;
            for (i = 0; i < depth; i++) memcpy(apart + i * g.b_row, g.b + i * g.width, (size_t)g.width * sizeof(float));
            g.b = apart;
        }
        g.c = c + j;
        g.bias = t->bias ? bias + j : NULL;
        norm = t->norm ? spmi_norm_at(*t->norm, j, j) : norm;
        g.norm = t->norm ? &norm : NULL;
        SPMI_KERNEL(ctx, rows, (&g));
    }
    free(packed);
    free(apart);
    free(a_at);
    free(c_at);
    free(tap_at);
}

static void check_rows(spm_context *plain, spm_context *ctx)
{
    static const int64_t sizes[] = { 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 18, 25, 37 };
    static const int64_t columns[] = { 1, 3, 4, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 130 };
    rows_case t;
    int i, n = 0;
    for (i = 0; i < (int)(sizeof columns / sizeof *columns); i++) {
        int j;
        for (j = 0; j < (int)(sizeof sizes / sizeof *sizes); j++, n++) {
            int64_t count, a_count = 1000;
            float *a, *b, *bias, *c, *d, *vector;
            spm_op_norm norm = SPM_ZERO;
            t.rows = sizes[j];
            t.columns = columns[i];
            t.taps = n % 5;
            t.k = 1 + n * 7 % 40;
            t.a_step = n % 4 ? 0 : 1 + n % 7;
            t.gap = n % 4 ? 0 : n % 9;
            t.accumulate = n % 3 == 0;
            t.bias = n % 2;
            t.norm = n % 5 < 2 ? &norm : NULL;
            count = t.rows * (t.columns + 3);
            a = random_floats(a_count);
            b = random_floats(t.taps * t.k * t.columns);
            bias = random_floats(t.columns);
            norm.mean = vector = random_floats(3 * t.columns + count);
            norm.scale = vector + t.columns;
            norm.shift = vector + 2 * t.columns;
            norm.residual = n % 10 < 5 ? vector + 3 * t.columns : NULL;
            norm.relu = n % 3 > 0;
            c = random_floats(count);
            d = (float *)malloc(sizeof(float) * (size_t)count);
            memcpy(d, c, sizeof(float) * (size_t)count);
            run_rows(plain, &t, a, a_count, b, bias, c);
            run_rows(ctx, &t, a, a_count, b, bias, d);
            same("rows", ctx, d, c, count, 2e-5);
            free(a);
            free(b);
            free(bias);
            free(vector);
            free(c);
            free(d);
        }
    }
}

/* ---- deal and outer ---- */

static void run_outer(spm_context *ctx, int64_t outputs, int64_t blocks, int64_t k, int64_t columns, int accumulate,
                      const float *dy, const float *x, float *c)
{
    const int64_t pixels = blocks * k, r = spmi_outer_rows(ctx), panel = pixels * r + 16;
    float *a = (float *)malloc(sizeof(float) * (size_t)(spmi_round_up(outputs, r) / r * panel));
    int64_t *b_at = (int64_t *)malloc(sizeof(int64_t) * (size_t)blocks), t, j;
    spmi_outer g = SPM_ZERO;
    SPMI_KERNEL(ctx, deal, (pixels, outputs, dy, outputs + 1, a, panel));
    for (t = 0; t < blocks; t++) b_at[t] = t * 17 % 29;
    for (j = 0; j < columns; j += g.columns) {
        g.a = a;
        g.a_panel = panel;
        g.a_row = r;
        g.rows = outputs;
        g.blocks = blocks;
        g.k = k;
        g.b = x + j;
        g.b_at = b_at;
        g.b_row = columns + 2;
        g.c = c + j;
        g.c_row = columns + 5;
        g.columns = spmi_outer_columns(ctx, columns - j);
        g.accumulate = accumulate;
        g.ahead[0].at = g.ahead[1].at = x; /* fetching changes nothing */
        g.ahead[0].step = g.ahead[1].tile = 1;
        g.ahead[0].tiles = j % 3;
        g.ahead[1].tiles = j % 2;
        SPMI_KERNEL(ctx, outer, (&g));
    }
    free(a);
    free(b_at);
}

static void check_outer(spm_context *plain, spm_context *ctx)
{
    static const int64_t outputs[] = { 1, 3, 4, 7, 8, 9, 16, 21 }, columns[] = { 1, 2, 5, 8, 15, 16, 21, 24, 33, 48,
                                                                                 50, 64, 97 };
    int i, j, n = 0;
    for (i = 0; i < (int)(sizeof outputs / sizeof *outputs); i++) {
        for (j = 0; j < (int)(sizeof columns / sizeof *columns); j++, n++) {
            const int64_t blocks = 1 + n % 4, k = 1 + n % 11, count = outputs[i] * (columns[j] + 5);
            float *dy = random_floats(blocks * k * (outputs[i] + 1)),
                *x = random_floats(k * (columns[j] + 2) + 30 + columns[j]);
            float *c = random_floats(count), *d = (float *)malloc(sizeof(float) * (size_t)count);
            memcpy(d, c, sizeof(float) * (size_t)count);
            run_outer(plain, outputs[i], blocks, k, columns[j], n % 2, dy, x, c);
            run_outer(ctx, outputs[i], blocks, k, columns[j], n % 2, dy, x, d);
            same("outer", ctx, d, c, count, 2e-5);
            free(dy);
            free(x);
            free(c);
            free(d);
        }
    }
}

/* ---- kernels that move and add ---- */

static void check_moves(spm_context *plain, spm_context *ctx)
{
    int64_t rows, columns;
    for (rows = 1; rows < 40; rows += 3) {
        for (columns = 1; columns < 70; columns += rows < 10 ? 1 : 7) {
            const int64_t count = (rows + 2) * (columns + 5) * 2, at[2] = { 1, 0 };
            float *from = random_floats(count), *a = random_floats(count),
                *b = (float *)malloc(sizeof(float) * (size_t)count);
            memcpy(b, a, sizeof(float) * (size_t)count);
            SPMI_KERNEL(plain, transpose, (rows, columns, from, columns + 2, a, rows + 3));
            SPMI_KERNEL(ctx, transpose, (rows, columns, from, columns + 2, b, rows + 3));
            same("transpose", ctx, b, a, count, 0.0);
            CHECK(a[(columns - 1) * (rows + 3) + rows - 1] == from[(rows - 1) * (columns + 2) + columns - 1]);
            SPMI_KERNEL(plain, collect, (2, rows, from, at, columns + 1, columns, a, columns + 2));
            SPMI_KERNEL(ctx, collect, (2, rows, from, at, columns + 1, columns, b, columns + 2));
            same("collect", ctx, b, a, count, 0.0);
            SPMI_KERNEL(plain, column_sums, (rows, columns, from, columns + 1, a));
            SPMI_KERNEL(ctx, column_sums, (rows, columns, from, columns + 1, b));
            same("column_sums", ctx, b, a, count, 2e-5);
            free(from);
            free(a);
            free(b);
        }
    }
}

/* ---- products of matrices ---- */

static void check_products(spm_context *plain, spm_context *ctx)
{
    static const int64_t sizes[] = { 1, 2, 3, 5, 8, 13, 31, 64, 65, 97, 130, 257, 300, 530 };
    int n;
    (void)plain;
    for (n = 0; n < 150; n++) {
        const int turned = n % 3 == 0, add = n % 5 == 0;
        int64_t m, nn, k, i, j, l, a_row, a_col, b_row, b_col;
        float *a, *b, *c, *d, *scratch;
        double allowed;
        state = state * 1664525u + 1013904223u;
        m = sizes[(state >> 8) % 14];
        nn = sizes[(state >> 13) % 14];
        k = n % 29 == 0 ? 0 : sizes[(state >> 20) % 14];
        if (m * nn * k > 1000000) continue;
        a = random_floats(2 * m * k + 1);
        b = random_floats(2 * k * nn + 1);
        c = random_floats(m * (nn + 3));
        d = (float *)malloc(sizeof(float) * (size_t)(m * (nn + 3)));
        memcpy(d, c, sizeof(float) * (size_t)(m * (nn + 3)));
        a_row = turned ? 1 : n % 3 == 1 ? k : 2 * k;
        a_col = turned ? n % 2 ? m : 2 * m : 1;
        b_row = turned ? n % 2 ? nn : 2 * nn : n / 3 % 3 == 0 ? 1 : n / 3 % 3 == 1 ? nn : 2 * nn;
        b_col = turned ? 1 : n / 3 % 3 == 0 ? k : n / 3 % 3 == 1 ? 1 : 2;
        scratch = (float *)malloc(sizeof(float) * (size_t)(k * (nn + 16) + 1));
        if (turned) spmi_outer_product(ctx, m, nn, k, a, a_col, b, b_row, c, nn + 3, add, scratch);
        else {
            spmi_pack_panels(ctx, k, nn, b, b_row, b_col, scratch);
            spmi_rows_product(ctx, m, nn, k, a, a_row, scratch, c, nn + 3, add);
        }
        allowed = 2e-6 + 3e-6 * sqrt((double)k + 1.0);
        for (i = 0; i < m; i++) {
            for (j = 0; j < nn + 3; j++) {
                double sum = j < nn && !add ? 0.0 : (double)d[i * (nn + 3) + j];
                for (l = 0; j < nn && l < k; l++) {
                    sum += (double)a[i * a_row + l * a_col] * (double)b[l * b_row + j * b_col];
                }
                if (!(fabs(sum - (double)c[i * (nn + 3) + j]) <= (j < nn ? allowed : 0.0))) {
                    test_near(__FILE__, __LINE__, "product", (double)c[i * (nn + 3) + j], sum, allowed);
                    i = m;
                    break;
                }
            }
        }
        free(a);
        free(b);
        free(c);
        free(d);
        free(scratch);
    }
}

static void test_rows(void) { each_isa(check_rows); }
static void test_outer(void) { each_isa(check_outer); }
static void test_moves(void) { each_isa(check_moves); }
static void test_products(void) { each_isa(check_products); }

/* ---- bf16 ---- */

/* The nearest bf16 number by its definition: of the two neighbours, the nearer; of two equally near, the even one. */
static float nearest_bf16(float x)
{
    uint32_t u, low, high;
    float below, above;
    memcpy(&u, &x, sizeof u);
    if (x != x) u |= 0x00400000u;
    low = u & 0xffff0000u;
    high = low + 0x00010000u;
    memcpy(&below, &low, sizeof below);
    memcpy(&above, &high, sizeof above);
    if ((u & 0x7fffffffu) < 0x00800000u) {
        low &= 0x80000000u;
        memcpy(&below, &low, sizeof below);
        return below;
    }
    if (x != x || below == x) return below;
    if ((u & 0xffffu) == 0x8000u) return u >> 16 & 1u ? above : below;
    return (u & 0xffffu) < 0x8000u ? below : above;
}

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* Every upper half, with lower halves around the ties. */
static void check_half_round(spm_context *plain, spm_context *ctx)
{
    static const uint32_t lower[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    enum { N = 257 };
    float from[N], to[N], pairs[N];
    int64_t high, wrong = 0;
    int half, i;
    (void)plain;
    for (high = 0; high < 65536; high += 43) {
        for (i = 0; i < N; i++) {
            const uint32_t u = (uint32_t)((high + i / 6) & 0xffff) << 16 | lower[i % 6];
            memcpy(&from[i], &u, sizeof u);
        }
        for (half = 1; half <= (ctx->isa == SPM_ISA_AVX512 && spmi_cpu_has_bf16() ? 2 : 1); half++) {
            spmi_half_row(ctx, half, N, from, half == 2 ? pairs : to);
            for (i = 0; half == 2 && i < N; i++) {
                uint16_t e;
                uint32_t u;
                memcpy(&e, (const char *)pairs + 2 * i, sizeof e);
                u = (uint32_t)e << 16;
                memcpy(&to[i], &u, sizeof u);
            }
            for (i = 0; i < N; i++) wrong += bits_of(to[i]) != bits_of(nearest_bf16(from[i]));
        }
    }
    CHECK_INT(wrong, 0);
}

/* One convolution or linear layer with its three gradients; op_floats in, results out, all in one buffer. */
typedef struct half_case {
    int64_t n, h, w, c, o, kernel, stride, groups;
    int linear;
} half_case;

static float *half_run(spm_context *ctx, const half_case *t, const float *data, int what, int64_t *count)
{
    spm_op_call call = SPM_ZERO;
    const spm_op op = t->linear ? SPM_OP_LINEAR : SPM_OP_CONV2D;
    spm_error err = SPM_ZERO;
    int64_t sizes[4], i;
    float *memory, *result;
    size_t bytes;
    void *scratch;
    if (t->linear) {
        call.in[0] = spm_tensor_make(NULL, 2, t->n, t->c, 0, 0);
        call.in[1] = spm_tensor_make(NULL, 2, t->o, t->c, 0, 0);
    } else {
        call.in[0] = spm_tensor_make(NULL, 4, t->n, t->h, t->w, t->c);
        call.in[1] = spm_tensor_make(NULL, 4, t->o, t->kernel, t->kernel, t->c / t->groups);
        call.attr.stride[0] = call.attr.stride[1] = t->stride;
        call.attr.padding[0] = call.attr.padding[1] = t->kernel / 2;
        call.attr.groups = t->groups;
    }
    call.in[2] = spm_tensor_make(NULL, 1, t->o, 0, 0, 0);
    call.n_in = 3;
    if (spm_op_infer(ctx, op, &call, &err)) {
        test_report(__FILE__, __LINE__, err.text);
        return NULL;
    }
    for (i = 0; i < 3; i++) sizes[i] = spm_tensor_count(&call.in[i]);
    sizes[3] = spm_tensor_count(&call.out[0]);
    memory = (float *)malloc(sizeof(float) * (size_t)(sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    memcpy(memory, data, sizeof(float) * (size_t)(sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    call.in[0].data = memory;
    call.in[1].data = memory + sizes[0];
    call.in[2].data = call.in[1].data + sizes[1];
    call.d_out = call.out[0];
    call.d_out.data = call.in[2].data + sizes[2];
    *count = what == 0 ? sizes[3] : sizes[what - 1];
    result = (float *)malloc(sizeof(float) * (size_t)*count);
    bytes = SPMI_MAX(spm_op_scratch(ctx, op, &call, 0), spm_op_scratch(ctx, op, &call, 1));
    scratch = spmi_alloc(ctx, bytes);
    call.scratch = scratch;
    if (what == 0) {
        call.out[0].data = result;
        spm_op_forward(ctx, op, &call);
    } else {
        call.d_in[what - 1] = call.in[what - 1];
        call.d_in[what - 1].data = result;
        spm_op_backward(ctx, op, &call);
    }
    spmi_free(ctx, scratch);
    free(memory);
    return result;
}

/* bf16 layers against plain C on operands that were rounded before; the bias and its gradient are not rounded. The same
 * bits from one thread and from three. */
static void check_half_layers(spm_context *plain, spm_context *ctx)
{
    static const half_case cases[] = { { 3, 9, 7, 6, 10, 3, 1, 1, 0 },     { 2, 14, 14, 64, 66, 3, 1, 1, 0 },
                                       { 2, 13, 11, 34, 48, 3, 2, 1, 0 },  { 2, 15, 15, 16, 80, 1, 2, 1, 0 },
                                       { 1, 7, 7, 512, 130, 1, 1, 1, 0 },  { 2, 8, 8, 32, 32, 3, 1, 4, 0 },
                                       { 1, 9, 9, 2, 4, 7, 2, 1, 0 },      { 197, 1, 1, 96, 70, 1, 1, 1, 1 },
                                       { 33, 1, 1, 1300, 18, 1, 1, 1, 1 }, { 1, 1, 1, 2, 2, 1, 1, 1, 1 } };
    spm_context_desc desc = SPM_ZERO;
    spm_context *one, *three;
    int i, what, half, halves;
    desc.isa = spm_context_isa(ctx);
    desc.precision = SPM_PRECISION_BF16;
    desc.threads = 1;
    one = spm_context_create(&desc);
    desc.threads = 3;
    three = spm_context_create(&desc);
    CHECK(one->half >= 1 && spm_context_precision(one) == SPM_PRECISION_BF16);
    halves = one->half; /* 2: both ways are tried */
    for (i = 0; i < halves * (int)(sizeof cases / sizeof *cases); i++) {
        const half_case *t = &cases[i / halves];
        const int64_t x = t->n * t->h * t->w * t->c, w = t->o * t->kernel * t->kernel * t->c / t->groups;
        const int64_t most = x + w + t->o + t->n * t->h * t->w * t->o;
        float *raw = random_floats(most), *rounded = (float *)malloc(sizeof(float) * (size_t)most);
        int64_t j, count;
        half = 1 + i % halves;
        one->half = three->half = half;
        for (j = 0; j < most; j++) rounded[j] = j < x + w || j >= x + w + t->o ? nearest_bf16(raw[j]) : raw[j];
        for (what = 0; what <= 3; what++) { /* y, dx, dw, db */
            float *expect = half_run(plain, t, what == 3 ? raw : rounded, what, &count);
            float *got = half_run(one, t, raw, what, &count), *again = half_run(three, t, raw, what, &count);
            same("bf16 layer", ctx, got, expect, count, 2e-6 * sqrt((double)(what < 2 ? w : x)));
            CHECK(!memcmp(got, again, sizeof(float) * (size_t)count));
            free(expect);
            free(got);
            free(again);
        }
        free(raw);
        free(rounded);
    }
    spm_context_destroy(one);
    spm_context_destroy(three);
}

static void test_bf16(void)
{
    each_isa(check_half_round);
    each_isa(check_half_layers);
}

/* ---- outputs that go past the caches: the same bits as through them ---- */

enum { PAST_ROWS = 5, PAST_N = 96, PAST_COUNT = PAST_ROWS * PAST_N };

/* Kernel number `which` on fixed inputs, its output at y (which held `before`). */
static void run_past(spm_context *ctx, int which, const float *x, const float *b, float *y, int past)
{
    const volatile int64_t width = PAST_N; /* a constant makes gcc reason about rows of that length, and warn */
    const int64_t n = width;
    float mean[PAST_N], rstd[PAST_N];
    int i;
    for (i = 0; i < PAST_N; i++) {
        mean[i] = 0.25f * b[i];
        rstd[i] = 1.5f + b[i];
    }
    switch (which) {
    case 0: SPMI_KERNEL(ctx, relu, (PAST_ROWS * n, x, y, past)); break;
    case 1: SPMI_KERNEL(ctx, relu_back, (PAST_ROWS * n, x, b, y, 0, past)); break;
    case 2: SPMI_KERNEL(ctx, gelu, (PAST_ROWS * n, x, y, past)); break;
    case 3: SPMI_KERNEL(ctx, gelu_back, (PAST_ROWS * n, x, b, y, 0, past)); break;
    case 4: SPMI_KERNEL(ctx, scale, (PAST_ROWS * n, 0.75f, x, y, 0, past)); break;
    case 5: SPMI_KERNEL(ctx, sum_of, (PAST_ROWS * n, 0.5f, x, b, y, past)); break;
    case 6: SPMI_KERNEL(ctx, softmax, (PAST_ROWS, n, 2.0f, x, n, y, n, past)); break;
    case 7: SPMI_KERNEL(ctx, softmax_back, (PAST_ROWS, n, 2.0f, x, n, b, n, y, n, 0, past)); break;
    case 8: SPMI_KERNEL(ctx, layer_norm, (PAST_ROWS, n, x, b, b + PAST_N, 1e-5f, y, past, NULL, NULL)); break;
    case 9: SPMI_KERNEL(ctx, layer_norm_back, (PAST_ROWS, n, x, b, mean, rstd, b, y, 0, past, NULL, NULL)); break;
    case 10: SPMI_KERNEL(ctx, bn_apply, (PAST_ROWS, n, x, b, mean, rstd, b, 1, y, past)); break;
    default:
        SPMI_KERNEL(ctx, bn_back, (PAST_ROWS, n, x, NULL, b, mean, rstd, mean, rstd, mean, rstd, y, 0, NULL, 0, past));
        break;
    }
}

static void check_past(spm_context *plain, spm_context *ctx)
{
    float *x = random_floats(PAST_COUNT), *b = random_floats(PAST_COUNT), *raw = random_floats(2 * PAST_COUNT + 64);
    float *through = raw + (16 - (uintptr_t)raw / sizeof(float) % 16) % 16, *past = through + PAST_COUNT + 16;
    int which;
    (void)plain;
    for (which = 0; which < 12; which++) {
        const float guard = past[PAST_COUNT];
        run_past(ctx, which, x, b, through, 0);
        run_past(ctx, which, x, b, past, 1);
        CHECK(memcmp(through, past, PAST_COUNT * sizeof *past) == 0);
        CHECK(memcmp(&guard, past + PAST_COUNT, sizeof guard) == 0);
    }
    free(x);
    free(b);
    free(raw);
}

static void test_past(void)
{
    float *to = NULL, *from = to + 16;
    each_isa(check_past);
    CHECK(spmi_goes_past(from, to, 64, SPMI_PAST));
    CHECK(!spmi_goes_past(from, to, 64, SPMI_PAST - 1)); /* a cache holds it */
    CHECK(!spmi_goes_past(to, to, 64, SPMI_PAST));       /* in place: its lines were just read */
    CHECK(!spmi_goes_past(from, to, 65, SPMI_PAST));     /* rows that begin anywhere */
    CHECK(!spmi_goes_past(to, from + 1, 64, SPMI_PAST));
}

int main(void)
{
    TEST(test_rows);
    TEST(test_outer);
    TEST(test_moves);
    TEST(test_products);
    TEST(test_bf16);
    TEST(test_past);
    return TEST_END;
}
