/* exact.h - a second opinion on gradients: forward and backward pass of a recorded ResNet in double precision, in plain C.
 * It shares the program (which operations, which parameters) with the library and none of its arithmetic: convolutions and
 * linear layers are matrix products of gathered patches, all else follows the formulas of the header's table word for word. */
#ifndef SPURMEM_EXACT_H
#define SPURMEM_EXACT_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "../spurmem.h"

/* ---- c[m][n] += a b, each matrix by its strides, so that no transpose is ever written ---- */

#define EXACT_ROWS 32   /* of c in a task */
#define EXACT_DEEP 256  /* products in a pass: a's and b's panels stay in the caches */

typedef struct exact_matrix {
    const double *data;
    int64_t down, along; /* strides from row to row, from column to column */
} exact_matrix;

typedef struct exact_product {
    int64_t m, n, k;
    exact_matrix a;
    double *b;       /* [ceil(n/4)][k][4], zeros behind the last column */
    double *c;
} exact_product;

static inline exact_matrix exact_matrix_of(const double *data, int64_t down, int64_t along)
{
    exact_matrix m;
    m.data = data;
    m.down = down;
    m.along = along;
    return m;
}

static inline void exact_task(void *arg, int64_t task, int slot)
{
    const exact_product *p = (const exact_product *)arg;
    const int64_t first = task * EXACT_ROWS, rows = p->m - first < EXACT_ROWS ? p->m - first : EXACT_ROWS;
    double *panel = (double *)calloc(EXACT_ROWS * EXACT_DEEP, sizeof(double));
    int64_t from, i, j, q;
    int x, y;
    (void)slot;
    for (from = 0; panel && from < p->k; from += EXACT_DEEP) {
        const int64_t deep = p->k - from < EXACT_DEEP ? p->k - from : EXACT_DEEP;
        for (i = 0; i < rows; i++) {
            const double *a = p->a.data + (first + i) * p->a.down + from * p->a.along;
            for (q = 0; q < deep; q++) panel[(i / 4 * EXACT_DEEP + q) * 4 + i % 4] = a[q * p->a.along];
        }
        for (j = 0; j < p->n; j += 4) {
            const double *b = p->b + (j / 4 * p->k + from) * 4;
            for (i = 0; i < rows; i += 4) {
                const double *a = panel + i / 4 * EXACT_DEEP * 4;
                double sum[4][4] = { { 0 } };
                for (q = 0; q < deep; q++) {
                    for (y = 0; y < 4; y++) {
                        for (x = 0; x < 4; x++) sum[y][x] += a[q * 4 + y] * b[q * 4 + x];
                    }
                }
                for (y = 0; y < 4 && i + y < rows; y++) {
                    for (x = 0; x < 4 && j + x < p->n; x++) p->c[(first + i + y) * p->n + j + x] += sum[y][x];
                }
            }
        }
    }
    free(panel);
}

static inline void exact_multiply(spm_context *ctx, int64_t m, int64_t n, int64_t k, exact_matrix a, exact_matrix b, double *c)
{
    exact_product p;
    int64_t j, q;
    p.m = m;
    p.n = n;
    p.k = k;
    p.a = a;
    p.c = c;
    p.b = (double *)calloc((size_t)((n + 3) / 4 * 4 * k), sizeof(double));
    for (q = 0; p.b && q < k; q++) {
        for (j = 0; j < n; j++) p.b[(j / 4 * k + q) * 4 + j % 4] = b.data[q * b.down + j * b.along];
    }
    if (p.b) spm_parallel(ctx, (m + EXACT_ROWS - 1) / EXACT_ROWS, exact_task, &p);
    free(p.b);
}

/* ---- the operations ---- */

typedef struct exact_net {
    spm_context *ctx;
    const spm_program *program;
    int64_t n;                 /* examples */
    double **value, **gradient; /* by spm_value */
    double **decide;           /* or NULL: another's values of what ReLUs return and max pools read, which decide what passes */
    int values, unknown;       /* unknown: operations that this file does not know */
} exact_net;

static inline int64_t exact_count(const exact_net *net, spm_value v)
{
    const spm_tensor t = spm_program_shape(net->program, v, net->n);
    return spm_tensor_count(&t);
}

static inline double *exact_room(const exact_net *net, double **place, spm_value v)
{
    if (!place[v]) place[v] = (double *)calloc((size_t)exact_count(net, v), sizeof(double));
    return place[v];
}

/* Calls for every number of a patch matrix [H' W'][K K C] of one picture; `back` adds it into the picture, else it is
 * filled from there. */
static inline void exact_patches(const spm_tensor *x, const spm_tensor *y, const spm_op_attr *attr, int64_t kernel, double *picture,
                                 double *patches, int back)
{
    const int64_t h = x->shape[1], w = x->shape[2], c = x->shape[3];
    int64_t row, col, i, j, k;
    for (row = 0; row < y->shape[1]; row++) {
        for (col = 0; col < y->shape[2]; col++) {
            for (i = 0; i < kernel; i++) {
                const int64_t from = row * attr->stride[0] + i - attr->padding[0];
                for (j = 0; j < kernel; j++, patches += c) {
                    const int64_t at = col * attr->stride[1] + j - attr->padding[1];
                    const int inside = from >= 0 && from < h && at >= 0 && at < w;
                    double *pixel = picture + (from * w + at) * c;
                    for (k = 0; k < c; k++) {
                        if (!back) patches[k] = inside ? pixel[k] : 0;
                        else if (inside) pixel[k] += patches[k];
                    }
                }
            }
        }
    }
}

static inline void exact_conv(exact_net *net, spm_value out, const spm_value *in, const spm_op_attr *attr, int back)
{
    const spm_tensor x = spm_program_shape(net->program, in[0], net->n), w = spm_program_shape(net->program, in[1], net->n),
                     y = spm_program_shape(net->program, out, net->n);
    const int64_t pixels = y.shape[1] * y.shape[2], o = w.shape[0], k = w.shape[1] * w.shape[2] * w.shape[3];
    const int64_t x_size = x.shape[1] * x.shape[2] * x.shape[3];
    double *patches = (double *)malloc((size_t)(pixels * k) * sizeof(double));
    int64_t n;
    if (in[2] || attr->groups > 1 || attr->dilation[0] > 1 || attr->dilation[1] > 1) net->unknown++;
    for (n = 0; patches && n < net->n; n++) {
        exact_patches(&x, &y, attr, w.shape[1], net->value[in[0]] + n * x_size, patches, 0);
        if (!back) { /* y = patches w^T */
            exact_multiply(net->ctx, pixels, o, k, exact_matrix_of(patches, k, 1), exact_matrix_of(net->value[in[1]], 1, k),
                           net->value[out] + n * pixels * o);
        } else { /* dw = dy^T patches, dpatches = dy w */
            const double *dy = net->gradient[out] + n * pixels * o;
            exact_multiply(net->ctx, o, k, pixels, exact_matrix_of(dy, 1, o), exact_matrix_of(patches, k, 1), net->gradient[in[1]]);
            if (!net->gradient[in[0]]) continue; /* the picture */
            memset(patches, 0, (size_t)(pixels * k) * sizeof(double));
            exact_multiply(net->ctx, pixels, k, o, exact_matrix_of(dy, o, 1), exact_matrix_of(net->value[in[1]], k, 1), patches);
            exact_patches(&x, &y, attr, w.shape[1], net->gradient[in[0]] + n * x_size, patches, 1);
        }
    }
    free(patches);
}

static inline void exact_linear(exact_net *net, spm_value out, const spm_value *in, int back)
{
    const spm_tensor w = spm_program_shape(net->program, in[1], net->n);
    const int64_t o = w.shape[0], k = w.shape[1], rows = exact_count(net, in[0]) / k;
    const double *dy = net->gradient[out];
    int64_t n, i;
    if (!back) {
        exact_multiply(net->ctx, rows, o, k, exact_matrix_of(net->value[in[0]], k, 1), exact_matrix_of(net->value[in[1]], 1, k),
                       net->value[out]);
    } else {
        exact_multiply(net->ctx, o, k, rows, exact_matrix_of(dy, 1, o), exact_matrix_of(net->value[in[0]], k, 1), net->gradient[in[1]]);
        exact_multiply(net->ctx, rows, k, o, exact_matrix_of(dy, o, 1), exact_matrix_of(net->value[in[1]], k, 1), net->gradient[in[0]]);
    }
    for (n = 0; in[2] && n < rows; n++) {
        for (i = 0; i < o; i++) {
            if (back) net->gradient[in[2]][i] += dy[n * o + i];
            else net->value[out][n * o + i] += net->value[in[2]][i];
        }
    }
}

/* y = relu?(x^ w + b + r?), x^ = (x - mean) / sqrt(var + eps) over the batch;
 * dx = w / sqrt(var + eps) (dy - mean(dy) - x^ mean(dy x^)). */
static inline void exact_batch_norm(exact_net *net, spm_value out, const spm_value *in, const spm_op_attr *attr, int back)
{
    const double *x = net->value[in[0]], *r = in[5] ? net->value[in[5]] : NULL;
    double *y = net->value[out], *dy = net->gradient[out];
    const double *by = net->decide && net->decide[out] ? net->decide[out] : y;
    const int64_t channels = exact_count(net, in[1]), count = exact_count(net, in[0]), rows = count / channels;
    int64_t c, i;
    for (c = 0; c < channels; c++) {
        const double w = net->value[in[1]][c], b = net->value[in[2]][c];
        double mean = 0, var = 0, d = 0, dx = 0, scale;
        for (i = c; i < count; i += channels) mean += x[i];
        mean /= (double)rows;
        for (i = c; i < count; i += channels) var += (x[i] - mean) * (x[i] - mean);
        scale = 1 / sqrt(var / (double)rows + (double)attr->eps);
        for (i = c; !back && i < count; i += channels) {
            y[i] = (x[i] - mean) * scale * w + b + (r ? r[i] : 0);
            if (attr->relu && !(by[i] > 0)) y[i] = 0;
        }
        for (i = c; back && i < count; i += channels) {
            if (attr->relu && !(by[i] > 0)) dy[i] = 0;
            if (r) net->gradient[in[5]][i] += dy[i];
            d += dy[i];
            dx += dy[i] * (x[i] - mean) * scale;
        }
        for (i = c; back && i < count; i += channels)
            net->gradient[in[0]][i] += w * scale * (dy[i] - d / (double)rows - (x[i] - mean) * scale * dx / (double)rows);
        if (!back) continue;
        net->gradient[in[1]][c] += dx;
        net->gradient[in[2]][c] += d;
    }
}

/* Which element of `by` [N,H,W,C] the element `to` of the pool's result is. */
static inline int64_t exact_winner(const spm_tensor *x, const spm_tensor *y, const spm_op_attr *attr, const double *by, int64_t to)
{
    const int64_t c = to % y->shape[3], col = to / y->shape[3] % y->shape[2], row = to / y->shape[3] / y->shape[2] % y->shape[1];
    const int64_t n = to / y->shape[3] / y->shape[2] / y->shape[1];
    int64_t best = -1, i, j;
    for (i = 0; i < attr->kernel[0]; i++) {
        const int64_t from = row * attr->stride[0] + i - attr->padding[0];
        for (j = 0; j < attr->kernel[1]; j++) {
            const int64_t at = col * attr->stride[1] + j - attr->padding[1];
            const int64_t k = ((n * x->shape[1] + from) * x->shape[2] + at) * x->shape[3] + c;
            if (from < 0 || from >= x->shape[1] || at < 0 || at >= x->shape[2]) continue;
            if (best < 0 || by[k] > by[best]) best = k;
        }
    }
    return best;
}

static inline void exact_max_pool(exact_net *net, spm_value out, spm_value in, const spm_op_attr *attr, int back)
{
    const spm_tensor x = spm_program_shape(net->program, in, net->n), y = spm_program_shape(net->program, out, net->n);
    const double *by = net->decide && net->decide[in] ? net->decide[in] : net->value[in];
    int64_t to;
    for (to = 0; to < spm_tensor_count(&y); to++) {
        const int64_t best = exact_winner(&x, &y, attr, by, to);
        if (back) net->gradient[in][best] += net->gradient[out][to];
        else net->value[out][to] = net->value[in][best];
    }
}

/* The mean over the picture, and option A's shortcut: every s-th pixel, zero channels on both sides. */
static inline void exact_pool_or_shortcut(exact_net *net, spm_op op, spm_value out, spm_value in, const spm_op_attr *attr, int back)
{
    const spm_tensor x = spm_program_shape(net->program, in, net->n), y = spm_program_shape(net->program, out, net->n);
    const int64_t c = x.shape[3], stride = attr->stride[0] > 0 ? attr->stride[0] : 1;
    int64_t i;
    for (i = 0; i < exact_count(net, in); i++) {
        const int64_t col = i / c % x.shape[2], row = i / c / x.shape[2] % x.shape[1], n = i / c / x.shape[2] / x.shape[1];
        const double share = op == SPM_OP_GLOBAL_POOL ? 1 / (double)(x.shape[1] * x.shape[2]) : 1;
        int64_t to = n * c + i % c;
        if (op == SPM_OP_SHORTCUT_A) {
            if (row % stride || col % stride) continue;
            to = ((n * y.shape[1] + row / stride) * y.shape[2] + col / stride) * y.shape[3] + (y.shape[3] - c) / 2 + i % c;
        }
        if (back) net->gradient[in][i] += net->gradient[out][to] * share;
        else net->value[out][to] += net->value[in][i] * share;
    }
}

static inline void exact_op(exact_net *net, int index, int back)
{
    spm_op op;
    spm_op_attr attr;
    spm_value in[SPM_OP_MAX_IN], out = spm_program_op_at(net->program, index, &op, &attr, in);
    if (!back) (void)exact_room(net, net->value, out);
    switch (op) {
    case SPM_OP_CONV2D: exact_conv(net, out, in, &attr, back); break;
    case SPM_OP_LINEAR: exact_linear(net, out, in, back); break;
    case SPM_OP_BATCH_NORM: exact_batch_norm(net, out, in, &attr, back); break;
    case SPM_OP_MAX_POOL: exact_max_pool(net, out, in[0], &attr, back); break;
    case SPM_OP_GLOBAL_POOL: case SPM_OP_SHORTCUT_A: exact_pool_or_shortcut(net, op, out, in[0], &attr, back); break;
    default: net->unknown++;
    }
}

static inline void exact_free(exact_net *net)
{
    int v;
    for (v = 0; v < net->values; v++) {
        free(net->value[v]);
        free(net->gradient[v]);
    }
    free(net->value);
    free(net->gradient);
    memset(net, 0, sizeof *net);
}

/* How many ReLUs and max pools decide otherwise by `decide` (of all values that exact_gradients wants). */
static inline int64_t exact_differences(const exact_net *net, double **decide)
{
    int64_t count = 0, k;
    int i;
    for (i = 0; i < spm_program_op_count(net->program); i++) {
        spm_op op;
        spm_op_attr attr;
        spm_value in[SPM_OP_MAX_IN], out = spm_program_op_at(net->program, i, &op, &attr, in);
        if (op == SPM_OP_BATCH_NORM && attr.relu) {
            for (k = 0; k < exact_count(net, out); k++) count += (decide[out][k] > 0) != (net->value[out][k] > 0);
        } else if (op == SPM_OP_MAX_POOL) {
            const spm_tensor x = spm_program_shape(net->program, in[0], net->n), y = spm_program_shape(net->program, out, net->n);
            for (k = 0; k < spm_tensor_count(&y); k++)
                count += exact_winner(&x, &y, &attr, decide[in[0]], k) != exact_winner(&x, &y, &attr, net->value[in[0]], k);
        }
    }
    return count;
}

/* The gradient of sum(direction * logits) in training mode for n pictures, by spm_value in net.gradient; exact_free it. */
static inline exact_net exact_gradients(spm_model *model, int64_t n, const float *image, const float *direction, double **decide)
{
    exact_net net;
    const spm_program *program = spm_model_program(model);
    const spm_value input = spm_program_find(program, "image"), logits = spm_program_find(program, "logits");
    int64_t k;
    int i, ops = spm_program_op_count(program);
    net.ctx = spm_model_context(model);
    net.program = program;
    net.n = n;
    net.decide = decide;
    net.unknown = 0;
    net.values = spm_program_op_at(program, ops - 1, NULL, NULL, NULL) + SPM_OP_MAX_OUT;
    net.value = (double **)calloc((size_t)net.values, sizeof(double *));
    net.gradient = (double **)calloc((size_t)net.values, sizeof(double *));
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        double *value = exact_room(&net, net.value, p->id);
        (void)exact_room(&net, net.gradient, p->id);
        for (k = 0; k < spm_tensor_count(&p->value); k++) value[k] = (double)p->value.data[k];
    }
    (void)exact_room(&net, net.value, input);
    for (k = 0; k < exact_count(&net, input); k++) net.value[input][k] = (double)image[k];
    for (i = 0; i < ops; i++) exact_op(&net, i, 0);
    for (i = 0; i < ops; i++) (void)exact_room(&net, net.gradient, spm_program_op_at(program, i, NULL, NULL, NULL));
    for (k = 0; k < exact_count(&net, logits); k++) net.gradient[logits][k] = (double)direction[k];
    for (i = ops; i-- > 0;) exact_op(&net, i, 1);
    return net;
}
#endif
