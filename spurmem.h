/* spurmem.h - v0.1 - find, prove and remove the memory of spurious correlations in image classifiers.  One C header.
 */
#ifndef SPMI_PASS
#ifndef SPURMEM_H
#define SPURMEM_H
/* Under -std=c99 libc hides POSIX unless asked before its first header. In gnu modes nothing is touched. */
#if (defined(SPURMEM_IMPLEMENTATION) || defined(SPURMEM_STATIC)) && defined(__STRICT_ANSI__) \
    && !defined(_POSIX_C_SOURCE) && !defined(_WIN32) && !defined(_FEATURES_H)
  #define _POSIX_C_SOURCE 200809L
#endif
#include <stddef.h>
#include <stdint.h>

#define SPURMEM_VERSION_MAJOR 0
#define SPURMEM_VERSION_MINOR 1

#ifdef SPURMEM_STATIC
  #if defined(__GNUC__) || defined(__clang__) || defined(__TINYC__)
    #define SPMDEF static __attribute__((unused))
  #else
    #define SPMDEF static
  #endif
#elif defined(__cplusplus)
  #define SPMDEF extern "C"
#else
  #define SPMDEF extern
#endif

#ifdef __cplusplus
  #define SPM_ZERO {}
#else
  #define SPM_ZERO {0}
#endif

/* ================================================================================================================
 * >>API-CORE  01  status, context, log, allocator, files
 * ============================================================================================================= */

/* Every status and its standing text.  Functions that can fail return a status, or NULL / a negative number. */
#define SPM_STATUS_LIST(X)                                        \
    X(SPM_OK,            "ok")                                    \
    X(SPM_E_ARGUMENT,    "invalid argument")                      \
    X(SPM_E_MEMORY,      "out of memory")                         \
    X(SPM_E_IO,          "input/output error")                    \
    X(SPM_E_FORMAT,      "malformed data")                        \
    X(SPM_E_UNSUPPORTED, "unsupported")                           \
    X(SPM_E_SHAPE,       "shapes do not fit")                     \
    X(SPM_E_DATA,        "the data set does not allow this")      \
    X(SPM_E_NUMERIC,     "not a finite number")                   \
    X(SPM_E_STATE,       "calls out of order")                    \
    X(SPM_E_STOPPED,     "stopped by the caller")

#define SPM_X(name, text) name,
typedef enum spm_status { SPM_STATUS_LIST(SPM_X) SPM_STATUS_COUNT } spm_status;
#undef SPM_X

/* One failure: a full sentence that names the object, the numbers and the mend.  `text` is "" while there is none. */
typedef struct spm_error {
    char text[496];
    spm_status status;
} spm_error;

/* Instruction sets.  SPM_ISA_AUTO takes the best one that both the build and the processor have. */
typedef enum spm_isa { SPM_ISA_AUTO, SPM_ISA_C, SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512 } spm_isa;

typedef enum spm_log_level { SPM_LOG_INFO, SPM_LOG_WARNING } spm_log_level;

typedef struct spm_context spm_context;

/* What a context is made from.  All zero (or a NULL desc) is a good default. */
typedef struct spm_context_desc {
    /* allocator: both or neither.  `alloc` may return memory of any alignment >= 8, or NULL. */
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory);
    void *alloc_user;
    void (*log)(void *user, spm_log_level level, const char *text); /* NULL: silent */
    void *log_user;
    /* An application's own executor: calls fn(arg, task, slot) once for every task in [0, tasks), from any threads, and
     * returns when all are done; two calls that run at the same time have different slots in [0, threads).
     * NULL: the library's own pool (SPURMEM_THREADS), or the caller's thread. */
    void (*execute)(void *user, int64_t tasks, void (*fn)(void *arg, int64_t task, int slot), void *arg);
    void *execute_user;
    int threads; /* 0: as many as cores; results do not depend on it */
    spm_isa isa; /* 0: the environment's SPURMEM_ISA, else the best */
} spm_context_desc;

/* Creates a context: allocator, log, thread pool, instruction set, first error.  NULL only if memory runs out or the
 * desc asks for an instruction set that this machine lacks.  A context may be shared between threads. */
SPMDEF spm_context *spm_context_create(const spm_context_desc *desc);
SPMDEF void spm_context_destroy(spm_context *ctx); /* after everything made from it; NULL is fine */
SPMDEF spm_status spm_context_status(const spm_context *ctx);      /* of the first error since the last clear */
SPMDEF const char *spm_context_error(const spm_context *ctx);      /* its sentence, "" if none */
SPMDEF void spm_context_clear_error(spm_context *ctx);
SPMDEF int spm_context_threads(const spm_context *ctx);
SPMDEF spm_isa spm_context_isa(const spm_context *ctx);
SPMDEF const char *spm_status_text(spm_status status);
SPMDEF const char *spm_isa_name(spm_isa isa);                       /* "c", "neon", "avx2", "avx512" */
SPMDEF int spm_isa_parse(const char *name, spm_isa *isa);           /* 1 if `name` is one of them or "auto" */

/* Reads a whole file.  *data (free it with spm_free) has *size bytes and a NUL behind them. */
SPMDEF spm_status spm_file_read(spm_context *ctx, const char *path, uint8_t **data, size_t *size, spm_error *err);
/* Writes a whole file: to a temporary name beside it, flushed, then renamed, so that `path` is never half-written. */
SPMDEF spm_status spm_file_write(spm_context *ctx, const char *path, const void *data, size_t size, spm_error *err);
SPMDEF spm_status spm_directory_create(spm_context *ctx, const char *path, spm_error *err); /* with its parents */
SPMDEF void spm_free(spm_context *ctx, void *memory);               /* what the library handed out; NULL is fine */

/* Progress of long work: called at step boundaries; a non-zero answer stops there, with resumable state. */
typedef struct spm_progress {
    const char *what;      /* "train", "evaluate test", "localize" ... */
    int64_t done, total;   /* in `unit`s */
    const char *unit;      /* "images", "steps" */
    double seconds;        /* since this work began */
} spm_progress;
typedef int (*spm_progress_fn)(void *user, const spm_progress *progress);

/* ================================================================================================================
 * >>API-POOL  03  parallel-for
 * ============================================================================================================= */

/* Calls fn(arg, task, slot) for every task in [0, tasks) on the context's threads; returns when all are done.
 * Which thread takes which task is not fixed, so tasks must not depend on it; `slot` < spm_context_threads() tells
 * simultaneous calls apart (for scratch memory).  Nested or simultaneous calls run on the caller's thread. */
SPMDEF void spm_parallel(spm_context *ctx, int64_t tasks, void (*fn)(void *arg, int64_t task, int slot), void *arg);

/* ================================================================================================================
 * >>API-RNG  04  counter-based random numbers
 * ============================================================================================================= */

/* A draw is a pure function of (seed, stream, index): Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
 * easy as 1, 2, 3").  No state, so results do not depend on order or threads. */
SPMDEF uint32_t spm_random_u32(uint64_t seed, uint64_t stream, uint64_t index);
SPMDEF float spm_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);  /* [0, 1), 24 bits */
SPMDEF float spm_random_normal(uint64_t seed, uint64_t stream, uint64_t index);   /* N(0, 1), Box-Muller */
SPMDEF uint32_t spm_random_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t n); /* uniform in [0, n) */
/* Fisher-Yates: order[0..n) becomes a permutation of 0..n-1. */
SPMDEF void spm_random_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *order);
/* Draws a seed for a sub-task: a hash of (seed, a, b), so that streams never overlap by accident. */
SPMDEF uint64_t spm_random_key(uint64_t seed, uint64_t a, uint64_t b);

/* ================================================================================================================
 * >>API-GEMM  06  the machine's limit
 * ============================================================================================================= */

/* GFLOP/s of fused multiply-adds in registers, on all the context's threads at once with its instruction set: what shares
 * of peak are shares of.  Takes about 0.1 s; take it again next to every measurement on a shared machine. */
SPMDEF double spm_measure_peak(spm_context *ctx);
/* Seconds of a clock that does not jump. */
SPMDEF double spm_seconds(void);

/* ================================================================================================================
 * >>API-TENSOR  07  tensors
 * ============================================================================================================= */

#define SPM_MAX_RANK 4

/* A dense row-major array of floats; it does not own `data`. Pictures are NHWC, tokens [N,T,D], convolution weights
 * [O][KH][KW][I/groups], linear weights [O][I]. Unused entries of `shape` are 0. */
typedef struct spm_tensor {
    float *data;
    int64_t shape[SPM_MAX_RANK];
    int rank;
} spm_tensor;

/* A tensor of the first `rank` sizes d0.. (others are ignored; rank is cut to 0..4). Test: test_ops.c. */
SPMDEF spm_tensor spm_tensor_make(float *data, int rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3);
/* Product of the shape; 0 for rank 0, for a negative size, and where the product does not fit. */
SPMDEF int64_t spm_tensor_count(const spm_tensor *tensor);
SPMDEF int spm_tensor_same_shape(const spm_tensor *a, const spm_tensor *b); /* rank and sizes; 1 or 0 */
/* "[16,112,112,64]" into `text`, cut at size; returns text. 96 bytes hold every shape. */
SPMDEF char *spm_tensor_shape_text(const spm_tensor *tensor, char *text, size_t size);
/* max |a - b| / max(max |b|, 1e-30): the project's measure for "the same numbers".  HUGE_VAL where shapes differ or a
 * value is not a number on one side. */
SPMDEF double spm_tensor_difference(const spm_tensor *a, const spm_tensor *b);

/* ================================================================================================================
 * >>API-OPS  08  operations: forward and backward, without a graph
 * ============================================================================================================= */

/* Every operation is called through one struct, spm_op_call, so that one table drives the tape, the gradient check, the
 * benches and the tests.  Inputs and outputs by operation (N batch; out[1..] are saved for the backward pass):
 *
 *  op             in                                                        out                                  attr
 *  conv2d         x[N,H,W,C] w[O,KH,KW,C/g] b[O]?                           y[N,H',W',O]                         kernel stride padding dilation groups
 *  linear         x[N,I] or [N,T,I]  w[O,I] b[O]?                           y[N,O] or [N,T,O]
 *  batch_norm     x[N,H,W,C] w[C] b[C] running_mean[C] running_var[C] r?    y, mean[C], var[C] (biased)          eps relu
 *                 (y = relu?(bn(x) + r?), r a residual of x's shape)
 *  layer_norm     x[..,D] w[D] b[D]                                         y, mean[rows], rstd[rows]            eps
 *  relu, gelu     x                                                         y                                    (gelu: exact, by erf)
 *  softmax        x[..,D]                                                   y, over the last axis
 *  attention      qkv[N,T,3D] (q, k, v; each [heads][D/heads])              y[N,T,D], probs[N,heads,T,T]         heads; scale 1/sqrt(D/heads)
 *  max_pool       x[N,H,W,C]                                                y[N,H',W',C], argmax                 kernel stride padding
 *  avg_pool       x[N,H,W,C]                                                y[N,H',W',C] (pads count, as PyTorch) kernel stride padding
 *  global_pool    x[N,H,W,C]                                                y[N,C]
 *  add            a b (same shape)                                          y
 *  shortcut_a     x[N,H,W,C]                                                y[N,ceil(H/s),ceil(W/s),C'] strided, channels zero-padded on both sides (CIFAR option A)   stride, groups = C'
 *  dropout        x                                                         y (kept values / (1 - p))            p
 *  drop_path      x[N,..]                                                   y (whole examples dropped)           p
 *  tokens         x[N,H,W,D] class[K,D] position[K+L+H*W,D] distillation[L,D]?  y[N,K+L+H*W,D], distillation tokens (L = 1, else 0) behind the class token
 *  token          x[N,T,D]                                                  y[N,D]: token attr.index             index
 *  mean2          a b                                                       (a + b) / 2 (distilled heads)
 *  cross_entropy  logits[N,C] target[N,C] weight[N]?                        loss[1] = sum_n weight[n] * loss_n (weight: default 1/N),
 *                                                                           per_example[N], probs[N,C]           label_smoothing
 *  ntxent         a[N,D] b[N,D]                                             loss[1], rows[2N,D] (normalised), norms[2N], probs[2N,2N]   temperature
 *                 (2N rows, row i's positive is the other view of the same example; mean over rows of -log(e^pos / sum of the 2N-1 others))
 *
 * patch embedding is conv2d with kernel = stride = patch. */
typedef enum spm_op {
    SPM_OP_NONE, SPM_OP_CONV2D, SPM_OP_LINEAR, SPM_OP_BATCH_NORM, SPM_OP_LAYER_NORM, SPM_OP_RELU, SPM_OP_GELU,
    SPM_OP_SOFTMAX, SPM_OP_ATTENTION, SPM_OP_MAX_POOL, SPM_OP_AVG_POOL, SPM_OP_GLOBAL_POOL, SPM_OP_ADD,
    SPM_OP_SHORTCUT_A, SPM_OP_DROPOUT, SPM_OP_DROP_PATH, SPM_OP_TOKENS, SPM_OP_TOKEN, SPM_OP_MEAN2,
    SPM_OP_CROSS_ENTROPY, SPM_OP_NTXENT, SPM_OP_COUNT
} spm_op;

#define SPM_OP_MAX_IN 6
#define SPM_OP_MAX_OUT 4

/* Settings of an operation; only those its row above names are read. Zero stride, dilation, groups mean 1. */
typedef struct spm_op_attr {
    int64_t kernel[2], stride[2], padding[2], dilation[2]; /* [height, width] */
    int64_t groups, heads, index;
    float eps, p, temperature, label_smoothing;
    int relu;
} spm_op_attr;

typedef struct spm_op_call {
    spm_op_attr attr;
    spm_tensor in[SPM_OP_MAX_IN];    /* an optional input that is not there has rank 0 and data NULL */
    spm_tensor out[SPM_OP_MAX_OUT];  /* shapes are set by spm_op_infer, data by the caller */
    spm_tensor d_out;                /* backward: gradient of out[0] */
    spm_tensor d_in[SPM_OP_MAX_IN];  /* backward: data NULL means not wanted */
    int d_in_add[SPM_OP_MAX_IN];     /* 1: add to what is there; 0: overwrite */
    int n_in, n_out;
    int training;                    /* 1: batch statistics, dropout on; 0: evaluation mode.  Same for both passes. */
    uint64_t seed, stream;           /* random draws of dropout and drop_path: element index counts from `example` */
    const int64_t *example;          /* [N] ids of the batch's examples for keyed draws, or NULL: 0..N-1 */
    void *scratch;                   /* spm_op_scratch() bytes, 64-byte aligned; contents are not kept */
    void *packed;                    /* spm_op_packed() bytes kept between calls, or NULL */
    int packed_ready;                /* 0: the weights have changed since `packed` was written; the op sets it to 1 */
} spm_op_call;

SPMDEF const char *spm_op_name(spm_op op);                 /* "conv2d" ... */
SPMDEF int spm_op_differentiable(spm_op op, int input);    /* 1 if in[input] can have a gradient */
/* 1 if the backward pass reads the values of in[index] (output = 0) or out[index] (output = 1): they must be kept until
 * then; all others may be overwritten after the forward pass.  Their shapes are always read. */
SPMDEF int spm_op_backward_reads(spm_op op, const spm_op_attr *attr, int output, int index);
/* Checks in[] (shapes only) against attr and sets out[].shape, out[].rank, n_out.  Errors name the op and both shapes. */
SPMDEF spm_status spm_op_infer(spm_context *ctx, spm_op op, spm_op_call *call, spm_error *err);
SPMDEF size_t spm_op_scratch(spm_context *ctx, spm_op op, const spm_op_call *call, int backward); /* bytes, after infer */
SPMDEF size_t spm_op_packed(spm_context *ctx, spm_op op, const spm_op_call *call);               /* bytes; 0: none */
SPMDEF double spm_op_flops(spm_op op, const spm_op_call *call, int backward);  /* multiply and add count as two */
/* No allocation, no failure once infer has passed. out[] must not overlap in[]; d_in may not overlap d_out. */
SPMDEF void spm_op_forward(spm_context *ctx, spm_op op, spm_op_call *call);
SPMDEF void spm_op_backward(spm_context *ctx, spm_op op, spm_op_call *call);


/* ================================================================================================================
 * >>API-TAPE  09  autograd: programs, models, runs
 * ============================================================================================================= */

/* A *program* is a list of operations, recorded once in the order of the calls below.  A *model* is a program and the
 * values of its parameters.  A *run* executes the program: it has its own activations, mask set, batch statistics and
 * random stream, and shares the model's parameters.  Two runs of one model are its dense and its pruned branch; a loss
 * over several runs is a small program of its own, whose input gradients are handed to spm_run_set_gradient. */
typedef struct spm_program spm_program;
typedef struct spm_model spm_model;
typedef struct spm_run spm_run;
typedef int spm_value; /* a value of a program, from 1; 0 is "none" (an optional input, or after an error) */

/* How a parameter starts:
 *   HE_FAN_OUT      N(0, 2 / (O KH KW)), torchvision's for ResNet convolutions (He et al. 2015, eq. 14)
 *   TRUNC_NORMAL    N(0, .02^2) cut at +-2, PyTorch's trunc_normal_(std=.02)
 *   UNIFORM_FAN_IN  U(-1/sqrt(f), 1/sqrt(f)), f the fan-in of the weight or of the weight that this bias belongs to:
 *                   PyTorch's default for convolutions and linear layers
 * A draw depends on (seed, the parameter's name, the element) and on nothing else. */
typedef enum spm_init { SPM_INIT_ZERO, SPM_INIT_ONE, SPM_INIT_HE_FAN_OUT, SPM_INIT_TRUNC_NORMAL, SPM_INIT_UNIFORM_FAN_IN } spm_init;

typedef enum spm_parameter_flags {
    SPM_PARAMETER_BUFFER     = 1,  /* running statistics: no gradient, no optimizer */
    SPM_PARAMETER_PRUNABLE   = 2,  /* a convolution or linear weight whose rows are units (METHOD.md 2.2) */
    SPM_PARAMETER_DOWNSAMPLE = 4,  /* a shortcut's convolution */
    SPM_PARAMETER_HEAD       = 8,  /* of the classifier */
    SPM_PARAMETER_NO_DECAY   = 16, /* biases, norms, tokens */
    SPM_PARAMETER_FROZEN     = 32  /* may be set and cleared between steps: no gradient is computed */
} spm_parameter_flags;

/* One parameter of a model.  `value` may be written between runs; call spm_model_touch afterwards. */
typedef struct spm_parameter {
    const char *name;          /* PyTorch's */
    spm_tensor value;          /* [O,KH,KW,I/g], [O,I], [C] ... */
    float *gradient;           /* same count, valid after a backward pass; NULL for buffers */
    unsigned flags;            /* of spm_parameter_flags */
    spm_init init;
    int block;                 /* number of the residual or transformer block it belongs to, from 1; 0: before or after them */
    /* what follows the unit: indices of parameters, or -1 */
    int norm_weight, norm_bias; /* the batch norm behind a convolution */
    int bias;                   /* the convolution's or linear layer's own bias */
    spm_value id;              /* this parameter in the program */
    spm_value output;          /* of a convolution or linear weight: what it computes, [..,O]; else 0 */
    spm_value norm_output;     /* the same after the batch norm behind it (and its residual and ReLU); without one = output */
} spm_parameter;

/* ---- recording ---- */

/* An empty program; NULL if memory runs out.  Every call below accepts NULL and, after an error (of shapes, names or
 * memory), does nothing and returns 0: check once, at spm_model_create or by spm_program_status.  The error's sentence
 * names the operation and the shapes.  Cost: recording infers shapes, it computes nothing.  Covered by test_tape. */
SPMDEF spm_program *spm_program_create(spm_context *ctx);
SPMDEF void spm_program_destroy(spm_program *program); /* not after spm_model_create took it; NULL is fine */
SPMDEF spm_status spm_program_status(const spm_program *program);

/* A value the caller binds with spm_run_input.  shape[0] == 0 stands for the batch; every shape that follows from it is
 * linear in the batch.  Pass gradient = 1 if spm_run_gradient() of it will be asked for. */
SPMDEF spm_value spm_program_input(spm_program *program, const char *name, int rank, const int64_t *shape, int gradient);
/* A parameter (flags: spm_parameter_flags).  Names are unique within a program; the order is the order of recording. */
SPMDEF spm_value spm_program_parameter(spm_program *program, const char *name, int rank, const int64_t *shape, spm_init init, unsigned flags);
/* Any operation of the table in section 08, by its inputs in that order (0: an optional input that is absent); returns
 * its out[0].  The others, the only ones without a gradient of their own, are had by spm_program_result. */
SPMDEF spm_value spm_program_op(spm_program *program, spm_op op, const spm_value *in, int n_in, const spm_op_attr *attr);
/* out[index] of the operation that computed `value` as its out[0]: per_example of a cross_entropy, probs of attention. */
SPMDEF spm_value spm_program_result(spm_program *program, spm_value value, int index);
/* Names a value as an output: readable with spm_run_data until the next forward, and open to spm_run_set_gradient. */
SPMDEF void spm_program_output(spm_program *program, const char *name, spm_value value);
/* Names a value without keeping it: found by name, usable as `first` of spm_run_forward_from; spm_run_keep makes it
 * readable in a run that wants it. */
SPMDEF void spm_program_mark(spm_program *program, const char *name, spm_value value);
/* A checkpoint boundary: between everything recorded so far and everything after (see spm_run_desc.segments). */
SPMDEF void spm_program_segment(spm_program *program);
SPMDEF void spm_program_block(spm_program *program, int block); /* parameters recorded from here belong to this block */

/* convenience recorders: spm_program_op with the attributes of section 08's table */
SPMDEF spm_value spm_conv2d(spm_program *program, spm_value x, spm_value w, spm_value b, int64_t stride, int64_t padding, int64_t dilation, int64_t groups);
SPMDEF spm_value spm_linear(spm_program *program, spm_value x, spm_value w, spm_value b);
SPMDEF spm_value spm_batch_norm(spm_program *program, spm_value x, spm_value w, spm_value b, spm_value mean, spm_value var, spm_value residual, float eps, int relu);
SPMDEF spm_value spm_layer_norm(spm_program *program, spm_value x, spm_value w, spm_value b, float eps);
SPMDEF spm_value spm_relu(spm_program *program, spm_value x);
SPMDEF spm_value spm_gelu(spm_program *program, spm_value x);
SPMDEF spm_value spm_softmax(spm_program *program, spm_value x);
SPMDEF spm_value spm_attention(spm_program *program, spm_value qkv, int64_t heads);
SPMDEF spm_value spm_max_pool(spm_program *program, spm_value x, int64_t kernel, int64_t stride, int64_t padding);
SPMDEF spm_value spm_avg_pool(spm_program *program, spm_value x, int64_t kernel, int64_t stride, int64_t padding);
SPMDEF spm_value spm_global_pool(spm_program *program, spm_value x);
SPMDEF spm_value spm_add(spm_program *program, spm_value a, spm_value b);
SPMDEF spm_value spm_dropout(spm_program *program, spm_value x, float p);
SPMDEF spm_value spm_drop_path(spm_program *program, spm_value x, float p);
SPMDEF spm_value spm_tokens(spm_program *program, spm_value x, spm_value class_token, spm_value position);
SPMDEF spm_value spm_token(spm_program *program, spm_value x, int64_t index);
SPMDEF spm_value spm_cross_entropy(spm_program *program, spm_value logits, spm_value target, spm_value weight, float label_smoothing);
SPMDEF spm_value spm_ntxent(spm_program *program, spm_value a, spm_value b, float temperature);

/* ---- reading a program ---- */

/* Shape of a value for a batch of n (data NULL).  An unknown value has rank 0. */
SPMDEF spm_tensor spm_program_shape(const spm_program *program, spm_value value, int64_t n);
/* An input, parameter, output or mark by name; 0 if absent. */
SPMDEF spm_value spm_program_find(const spm_program *program, const char *name);
/* Operations in the order of recording, and how many.  `in` gets SPM_OP_MAX_IN values (0: absent); each pointer may be
 * NULL.  Returns out[0]; 0 if index is out of range. */
SPMDEF int spm_program_op_count(const spm_program *program);
SPMDEF spm_value spm_program_op_at(const spm_program *program, int index, spm_op *op, spm_op_attr *attr, spm_value *in);
/* Floating-point operations of a forward pass for n examples (a multiply and an add count as two); backward = 1: of the
 * backward pass, without the data gradient of inputs that want none. */
SPMDEF double spm_program_flops(const spm_program *program, int64_t n, int backward);

/* ---- models ---- */

/* Takes the program over (also on failure) and initialises the parameters from `seed`.  NULL with the recording's error
 * if it had one, or if memory runs out. */
SPMDEF spm_model *spm_model_create(spm_program *program, uint64_t seed, spm_error *err);
SPMDEF void spm_model_destroy(spm_model *model); /* after its runs; NULL is fine */
SPMDEF spm_context *spm_model_context(const spm_model *model);
SPMDEF const spm_program *spm_model_program(const spm_model *model);
SPMDEF int spm_model_parameter_count(const spm_model *model);           /* buffers included */
SPMDEF spm_parameter *spm_model_parameter(spm_model *model, int index); /* NULL out of range */
SPMDEF int spm_model_find_parameter(const spm_model *model, const char *name); /* -1 if absent */
SPMDEF void spm_model_initialize(spm_model *model, uint64_t seed);      /* all parameters anew; touches */
/* Parameter values were changed from outside: runs renew what they derived from them (packed weights, masked copies).
 * Not needed after changes of buffers (running statistics), which are read in place. */
SPMDEF void spm_model_touch(spm_model *model);
SPMDEF uint64_t spm_model_version(const spm_model *model);              /* counts touches and optimizer steps */
/* Forgets all parameter gradients.  Cheap: the first backward pass after it overwrites, later ones add. */
SPMDEF void spm_model_zero_gradients(spm_model *model);
/* Finishes gradients: those that no backward pass has written since the last zero become 0. */
SPMDEF void spm_model_finish_gradients(spm_model *model);

/* ---- runs ---- */

typedef struct spm_run_desc {
    int64_t max_batch;   /* 0: 1 */
    int backward;        /* 1: keeps what the backward pass needs */
    int segments;        /* 1: keeps what crosses segment boundaries only and replays the inside, bit for bit */
    uint64_t seed;       /* of dropout and drop path */
} spm_run_desc;

/* A run; NULL with an error if memory runs out.  Memory is planned by liveness and taken here: forward and backward do
 * not allocate.  Runs of one model may work at the same time on different threads as long as none of them goes backward
 * and nobody writes parameters; a run itself belongs to one thread at a time.  Covered by test_tape. */
SPMDEF spm_run *spm_run_create(spm_model *model, const spm_run_desc *desc, spm_error *err);
SPMDEF void spm_run_destroy(spm_run *run);               /* NULL is fine */
SPMDEF spm_error *spm_run_error(spm_run *run);           /* the run's first error; clear it by setting it to zero */
SPMDEF size_t spm_run_bytes(const spm_run *run);         /* activations, gradients, scratch, packed weights, masks */
/* Binds an input to the caller's memory, [n, ...]; it must stay until the backward pass is done. */
SPMDEF spm_status spm_run_input(spm_run *run, spm_value value, const float *data);
/* Keys of the random draws of dropout and drop path: a draw depends on (seed, step, operation, example id, element).
 * ids: [n], staying until the backward pass is done; NULL (the start): 0..n-1. */
SPMDEF void spm_run_examples(spm_run *run, const int64_t *ids);
SPMDEF void spm_run_step(spm_run *run, uint64_t step);   /* the draws' stream (e.g. epoch); 0 at first */
/* Executes for 1 <= n <= max_batch examples. training: 1 batch statistics and dropout, 0 evaluation mode.
 * Every input that an operation uses must be bound. */
SPMDEF spm_status spm_run_forward(spm_run *run, int64_t n, int training);
/* As forward, but only what was recorded after the value `first` (any result; outputs and marks are found by name), which
 * the caller has bound with spm_run_input.  Everything `first` depends on is left alone, and nothing after `first` may
 * need it otherwise.  This is how a scan re-uses the part of the network that a change does not touch.  A backward pass
 * after it stops at `first` (its own gradient is had if it is an output or kept). */
SPMDEF spm_status spm_run_forward_from(spm_run *run, spm_value first, int64_t n, int training);
/* Keeps any value, and its gradient, readable until the next forward.  Plans the run's memory anew (call it once, before
 * forward); the value then counts as an output for the functions below. */
SPMDEF spm_status spm_run_keep(spm_run *run, spm_value value);
/* Data of inputs, parameters (masked if they are), outputs and kept values, after forward; NULL for any other. */
SPMDEF float *spm_run_data(spm_run *run, spm_value value);
SPMDEF spm_tensor spm_run_tensor(spm_run *run, spm_value value); /* the same with its shape for the last n */
/* The gradient a loss sends into an output, [n, ...], copied; between forward and backward.  Several outputs may have
 * one; they count for one backward pass.  Without any, a scalar output named "loss" gets 1. */
SPMDEF spm_status spm_run_set_gradient(spm_run *run, spm_value value, const float *gradient);
/* Adds into the model's parameter gradients (masked by the run's mask set) and fills the gradients of inputs.  Once per
 * forward.  Branches that lead only to frozen parameters and inputs without gradient are not computed. Parameters
 * must not change between the two passes. */
SPMDEF spm_status spm_run_backward(spm_run *run);
/* After backward: of inputs recorded with gradient = 1, outputs and kept values.  NULL if no gradient reached it. */
SPMDEF const float *spm_run_gradient(spm_run *run, spm_value value);
/* running = (1 - momentum) * running + momentum * batch (variance unbiased), for every batch norm of the last
 * training-mode forward, in the buffers this run uses.  Never happens by itself. */
SPMDEF spm_status spm_run_commit_statistics(spm_run *run, float momentum);
/* Mask set: keep[i] in {0,1} for every element of a parameter that is no buffer, or NULL for none; copied.  The run
 * computes with value * keep, and its gradient of that parameter is multiplied by keep before it is added. */
SPMDEF spm_status spm_run_set_mask(spm_run *run, int parameter, const float *keep);
SPMDEF void spm_run_clear_masks(spm_run *run);
/* own = 1: this run reads and commits running statistics of its own copy, made now (separate BN); 0: the model's. */
SPMDEF spm_status spm_run_own_buffers(spm_run *run, int own);
SPMDEF float *spm_run_buffer(spm_run *run, int parameter); /* the buffer this run uses; NULL if it is none */

/* Hooks: reductions as the run goes, per channel (last axis) of a value, per unit (first axis) of a parameter:
 *   SPM_HOOK_SUM             sum of v            (on_gradient: of v's gradient)
 *   SPM_HOOK_SUM_SQUARES     sum of v^2          (on_gradient: of its gradient)
 *   SPM_HOOK_VALUE_GRADIENT  sum of v * gradient (on_gradient is not read)
 * in double, by a fixed tree.  A parameter's gradient is this run's own, before it is added to the model's (and before the
 * mask).  `out` [channels] is added to by every pass and must live as long as the hook.  Hooks on a gradient need a run
 * with backward and make that gradient computed even where nothing else asks for it.  Set them before forward. */
typedef enum spm_hook_kind { SPM_HOOK_SUM, SPM_HOOK_SUM_SQUARES, SPM_HOOK_VALUE_GRADIENT } spm_hook_kind;
SPMDEF spm_status spm_run_hook(spm_run *run, spm_value value, spm_hook_kind kind, int on_gradient, double *out);
/* Write hook: called on the caller's thread after the result is computed (again when a segment is replayed), may change
 * it (ablation); the backward pass takes the change for a constant factor of 1.  It must give the same bits each time. */
SPMDEF spm_status spm_run_hook_write(spm_run *run, spm_value value, void (*fn)(void *user, spm_tensor *value), void *user);
SPMDEF void spm_run_clear_hooks(spm_run *run);

/* Checks an operation's backward pass: for random inputs kept away from kinks and L = sum(r * out[0]) with random r, the
 * gradient of each differentiable input against central differences (L summed in double; at most 192 elements per
 * input).  `shapes` gives attr, n_in, training, seed and the inputs' shapes (rank 0: absent).  Returns the largest over
 * the inputs of ||g - d|| / max(||d||, tiny) (about 1e-3 or less in fp32), or -1 with an error set. */
SPMDEF double spm_gradient_check(spm_context *ctx, spm_op op, const spm_op_call *shapes, uint64_t seed, spm_error *err);
/* ================================================================================================================
 * >>API-NETS  10  ResNet and ViT
 * ============================================================================================================= */

typedef enum spm_family { SPM_RESNET, SPM_VIT } spm_family;

/* An architecture, complete: spm_arch_parse fills it from text, spm_arch_text writes the canonical text back. */
typedef struct spm_arch {
    char name[64];                 /* "resnet18:width=16,stem=cifar" */
    spm_family family;
    int64_t height, width_px;      /* input size in pixels */
    int64_t classes;               /* outputs of the head */
    int softmax_head;              /* quirk Q1: the head ends in a softmax, losses see probabilities */
    /* ResNet */
    int64_t blocks[4];             /* 0 ends the list (CIFAR nets have three stages) */
    int64_t width;                 /* channels of the first stage (64; CIFAR nets 16) */
    int64_t groups, width_per_group;
    int bottleneck, cifar_stem, option_a;
    /* ViT */
    int64_t patch, dim, depth, heads, mlp_ratio;
    int distilled;
    float norm_eps;                /* ViT layer norms: 1e-6 */
    float drop, drop_path;         /* rates, 0 */
} spm_arch;

/* Parses "resnet18", "vit:patch=8,dim=96,depth=6,heads=3,mlp=2" ... (CLI.md lists all).  height, width_px and classes
 * become the architecture's defaults where they are 0. Errors name the option and the nearest known name. */
SPMDEF spm_status spm_arch_parse(spm_context *ctx, const char *text, spm_arch *arch, spm_error *err);
SPMDEF const char *spm_arch_name_at(int index); /* the known names, in order; NULL behind the last */
/* Builds the network: parameters with PyTorch's names, initialised from seed.  Input "image" [N,H,W,3]; outputs
 * "features" [N,D] (penultimate), "logits" [N,classes], "outputs" (= logits, or their softmax for softmax_head),
 * and "block1", "block2", ... (the input of residual or transformer block i), usable with spm_run_forward_from. */
SPMDEF spm_model *spm_model_build(spm_context *ctx, const spm_arch *arch, uint64_t seed, spm_error *err);

/* ================================================================================================================
 * >>API-OPTIM  11  optimizers, schedules, clipping
 * ============================================================================================================= */

typedef enum spm_optimizer_kind { SPM_ADAM, SPM_ADAMW, SPM_SGD } spm_optimizer_kind;

/* PyTorch's semantics and defaults. spm_optimizer_desc_init: adam, lr 1e-3, momentum 0, betas .9 .999, eps 1e-8. */
typedef struct spm_optimizer_desc {
    float lr, momentum, beta1, beta2, eps, weight_decay;
    int nesterov;
    int decay_all;               /* 1: weight decay on biases and norms as well (PyTorch's default); 0 skips NO_DECAY */
    spm_optimizer_kind kind;
} spm_optimizer_desc;
typedef struct spm_optimizer spm_optimizer;
SPMDEF spm_optimizer_desc spm_optimizer_desc_init(void);
SPMDEF spm_optimizer *spm_optimizer_create(spm_model *model, const spm_optimizer_desc *desc, spm_error *err);
SPMDEF void spm_optimizer_destroy(spm_optimizer *optimizer);
/* One step of all parameters that are neither buffers nor frozen, from model gradients (finished first); touches the model. */
SPMDEF void spm_optimizer_step(spm_optimizer *optimizer);
SPMDEF void spm_optimizer_set_lr(spm_optimizer *optimizer, float lr);
SPMDEF float spm_optimizer_lr(const spm_optimizer *optimizer);
SPMDEF int64_t spm_optimizer_steps(const spm_optimizer *optimizer);
/* State for resuming: tensors in the order of the parameters (slot 0: momentum or first moment; slot 1: second moment). */
SPMDEF int spm_optimizer_slots(const spm_optimizer *optimizer);
SPMDEF float *spm_optimizer_state(spm_optimizer *optimizer, int slot, int parameter); /* NULL if it has none */
SPMDEF void spm_optimizer_set_steps(spm_optimizer *optimizer, int64_t steps);
/* Global L2 norm of all gradients; scales them down to max_norm if larger (PyTorch's clip_grad_norm_).
 * max_norm 0 only measures. */
SPMDEF double spm_clip_gradients(spm_model *model, double max_norm);

typedef enum spm_schedule_kind { SPM_SCHEDULE_NONE, SPM_SCHEDULE_PLATEAU, SPM_SCHEDULE_COSINE } spm_schedule_kind;
/* Learning rate by epoch. PLATEAU: ReduceLROnPlateau(min, rel threshold 1e-4, factor, patience) on a watched number.
 * COSINE: to 0 over `epochs`.  warmup: linear from lr/warmup over that many epochs, before either. */
typedef struct spm_schedule {
    float lr, factor;            /* base rate; .5 */
    int64_t epochs, warmup, patience;
    double best;                 /* state: resumable as it is */
    int64_t bad_epochs;
    float scale;                 /* what plateau has multiplied so far */
    spm_schedule_kind kind;
} spm_schedule;
SPMDEF spm_schedule spm_schedule_make(spm_schedule_kind kind, float lr, int64_t epochs, int64_t warmup, int64_t patience);
SPMDEF float spm_schedule_lr(const spm_schedule *schedule, int64_t epoch);      /* for this epoch, from 0 */
SPMDEF void spm_schedule_observe(spm_schedule *schedule, double watched);       /* after an epoch */

/* ================================================================================================================
 * >>API-IMAGE  12  pictures: JPEG, PNG, PPM; resize, crop, flip
 * ============================================================================================================= */

/* 8-bit RGB, rows from the top, 3 bytes a pixel, no padding.  Free `pixels` with spm_image_free. */
typedef struct spm_image {
    uint8_t *pixels;
    int width, height;
} spm_image;

/* Cap on the bytes of one decoded picture and of the memory used to decode it; define it before including to change. */
#ifndef SPURMEM_MAX_IMAGE_BYTES
  #define SPURMEM_MAX_IMAGE_BYTES ((size_t)1 << 30)
#endif

typedef enum spm_image_format {
    SPM_IMAGE_UNKNOWN, SPM_IMAGE_JPEG, SPM_IMAGE_PNG, SPM_IMAGE_PPM, SPM_IMAGE_GIF, SPM_IMAGE_BMP, SPM_IMAGE_WEBP
} spm_image_format;

typedef enum spm_filter { SPM_FILTER_BILINEAR, SPM_FILTER_NEAREST, SPM_FILTER_BOX, SPM_FILTER_BICUBIC, SPM_FILTER_LANCZOS } spm_filter;

typedef struct spm_decode_desc {
    size_t max_bytes;    /* 0: SPURMEM_MAX_IMAGE_BYTES (1 GiB): cap on the decoded picture and the memory for it, before allocation */
    int apply_exif;      /* 1: turn the picture as its EXIF orientation says (off, as in Pillow's open) */
    int allow_truncated; /* 1: a cut-off file gives what is there instead of an error */
    int scale;           /* JPEG only: 0 or 1 full size; 2, 4, 8: that fraction, made in the DCT domain */
} spm_decode_desc;

SPMDEF spm_image_format spm_image_probe(const void *data, size_t size, int *width, int *height); /* width, height 0 if not known */
/* Decodes JPEG, PNG or PPM/PGM to RGB exactly as Pillow's open().convert("RGB") does (gray is repeated, alpha is dropped,
 * palettes are applied, 16-bit keeps the high byte, CMYK/YCCK through Pillow's formula).  `name` appears in error sentences. */
SPMDEF spm_status spm_image_decode(spm_context *ctx, const char *name, const void *data, size_t size,
                                   const spm_decode_desc *desc, spm_image *image, spm_error *err);
SPMDEF spm_status spm_image_load(spm_context *ctx, const char *path, const spm_decode_desc *desc, spm_image *image, spm_error *err);
SPMDEF spm_status spm_image_create(spm_context *ctx, int width, int height, spm_image *image, spm_error *err); /* black */
SPMDEF void spm_image_free(spm_context *ctx, spm_image *image);
/* Encoders hand out memory (spm_free). quality 1..100 with libjpeg's tables; chroma_420: 1 halves the chroma planes. */
SPMDEF spm_status spm_image_encode_jpeg(spm_context *ctx, const spm_image *image, int quality, int chroma_420, uint8_t **data, size_t *size, spm_error *err);
SPMDEF spm_status spm_image_encode_png(spm_context *ctx, const spm_image *image, uint8_t **data, size_t *size, spm_error *err);
SPMDEF spm_status spm_image_encode_ppm(spm_context *ctx, const spm_image *image, uint8_t **data, size_t *size, spm_error *err);
/* Antialiased resize, bit-exact with Pillow's 8-bit two-pass resize. `result` is a new image. */
SPMDEF spm_status spm_image_resize(spm_context *ctx, const spm_image *image, int width, int height, spm_filter filter, spm_image *result, spm_error *err);
SPMDEF spm_status spm_image_crop(spm_context *ctx, const spm_image *image, int x, int y, int width, int height, spm_image *result, spm_error *err);
SPMDEF void spm_image_flip(spm_image *image); /* left-right, in place */
/* Raw zlib-wrapped or bare deflate, used by PNG, gz and zip (wrapper: 0 none, 1 zlib, 2 gzip). */
SPMDEF spm_status spm_inflate(spm_context *ctx, const void *data, size_t size, int wrapper, size_t max_bytes, uint8_t **out, size_t *out_size, spm_error *err);
SPMDEF spm_status spm_deflate(spm_context *ctx, const void *data, size_t size, int wrapper, uint8_t **out, size_t *out_size, spm_error *err);

/* ================================================================================================================
 * >>API-PACK  13  file formats: JSON, CSV, safetensors, torch files, tar, idx, npy
 * ============================================================================================================= */

/* Readers trust nothing: every size is checked against the file before memory is taken, and a damaged or hostile file
 * ends in one sentence that names the file and the place.  Nothing is mapped: a file that shrinks is an error, no signal.
 * Numbers in files are assembled byte by byte, so big-endian machines read them too.
 * All of this section: tests/test_pack.c, tests/fuzz/fuzz_json.c, fuzz_csv.c, fuzz_archive.c, fuzz_tar.c. */

/* ---- JSON writing (RFC 8259) ----
 * A text that grows.  Calls never fail by themselves: a misplaced key, unbalanced brackets, more than 64 levels or a
 * failed allocation are remembered, and spm_json_finish then gives NULL; a NULL `json` is ignored as well.
 * `key` is the member's name inside an object, and NULL in an array and at the top level. */
typedef struct spm_json spm_json;
SPMDEF spm_json *spm_json_create(spm_context *ctx);                              /* NULL when memory runs out */
SPMDEF void spm_json_destroy(spm_json *json);
SPMDEF void spm_json_object_begin(spm_json *json, const char *key);
SPMDEF void spm_json_object_end(spm_json *json);
SPMDEF void spm_json_array_begin(spm_json *json, const char *key);
SPMDEF void spm_json_array_end(spm_json *json);
SPMDEF void spm_json_string(spm_json *json, const char *key, const char *value); /* NULL: null; invalid UTF-8: U+FFFD */
SPMDEF void spm_json_int(spm_json *json, const char *key, int64_t value);
SPMDEF void spm_json_number(spm_json *json, const char *key, double value);      /* 9 significant digits; NaN, inf: null */
SPMDEF void spm_json_bool(spm_json *json, const char *key, int value);
SPMDEF void spm_json_null(spm_json *json, const char *key);
SPMDEF void spm_json_raw(spm_json *json, const char *key, const char *text);     /* text that is JSON already */
/* The finished text on one line, without a newline (owned by json, terminated), or NULL. */
SPMDEF const char *spm_json_finish(spm_json *json);

/* ---- JSON reading ----
 * A tree in one allocation (about 40 bytes a value and the text).  Strict: no comments, no trailing commas, valid UTF-8,
 * at most 64 levels; a byte-order mark is skipped.  `text` may be freed afterwards.  `name` appears in error sentences. */
typedef struct spm_json_value spm_json_value;
typedef enum spm_json_type { SPM_JSON_NULL, SPM_JSON_BOOL, SPM_JSON_NUMBER, SPM_JSON_STRING, SPM_JSON_ARRAY, SPM_JSON_OBJECT } spm_json_type;
SPMDEF spm_json_value *spm_json_parse(spm_context *ctx, const char *name, const char *text, size_t size, spm_error *err); /* the root */
SPMDEF void spm_json_free(spm_context *ctx, spm_json_value *root);
/* All of these take NULL for a value that is not there, so that lookups can be chained. */
SPMDEF spm_json_type spm_json_type_of(const spm_json_value *value);              /* NULL gives SPM_JSON_NULL */
SPMDEF int64_t spm_json_length(const spm_json_value *value);                     /* elements or members */
SPMDEF const spm_json_value *spm_json_at(const spm_json_value *value, int64_t index);
SPMDEF const char *spm_json_key_at(const spm_json_value *object, int64_t index);
SPMDEF const spm_json_value *spm_json_get(const spm_json_value *object, const char *key); /* NULL if absent; of equal keys the last */
SPMDEF double spm_json_as_number(const spm_json_value *value, double otherwise);
SPMDEF int64_t spm_json_as_int(const spm_json_value *value, int64_t otherwise);  /* exact; booleans are 0 and 1; fractions: otherwise */
SPMDEF const char *spm_json_as_string(const spm_json_value *value, const char *otherwise);

/* ---- CSV (RFC 4180: quoted fields, doubled quotes, CR LF, LF or CR, a byte-order mark; empty lines are skipped) ----
 * The first row names the columns; every row must have as many fields.  separator 0 means ','; ' ' means runs of blanks
 * and tabs, and then the first column may lack a name (it is "").  `text` may be freed afterwards. */
typedef struct spm_csv spm_csv;
SPMDEF spm_csv *spm_csv_parse(spm_context *ctx, const char *name, const char *text, size_t size, char separator, spm_error *err);
SPMDEF void spm_csv_destroy(spm_csv *csv);
SPMDEF int64_t spm_csv_rows(const spm_csv *csv);                                 /* without the header row */
SPMDEF int spm_csv_columns(const spm_csv *csv);
SPMDEF const char *spm_csv_header(const spm_csv *csv, int column);
SPMDEF int spm_csv_column(const spm_csv *csv, const char *name);                 /* -1 if absent */
SPMDEF const char *spm_csv_field(const spm_csv *csv, int64_t row, int column);   /* NULL outside the table */
SPMDEF int64_t spm_csv_line(const spm_csv *csv, int64_t row);                    /* line of the file, from 1: for error sentences */

/* ---- named tensors of checkpoint files, read: safetensors, torch zip (since 1.6), torch legacy (before 1.6) ---- */
typedef enum spm_dtype { SPM_DTYPE_NONE, SPM_F32, SPM_F64, SPM_F16, SPM_BF16, SPM_I64, SPM_I32, SPM_I16, SPM_I8, SPM_U8, SPM_BOOL } spm_dtype;
#define SPM_ARCHIVE_MAX_RANK 8
typedef struct spm_archive_tensor {
    const char *name;
    int64_t shape[SPM_ARCHIVE_MAX_RANK];
    int64_t stride[SPM_ARCHIVE_MAX_RANK]; /* in elements */
    int64_t count;                        /* elements */
    uint64_t offset;                      /* of element 0 in the file */
    int rank;
    spm_dtype dtype;
} spm_archive_tensor;
typedef struct spm_archive spm_archive;
/* Opens by content, not by name.  Only headers are read; every tensor's bytes are known to lie inside the file when this
 * returns.  Torch files: the pickle is run by a closed machine that builds dicts, lists, tuples, numbers, strings and
 * tensors and refuses any other Python object by its name; nothing is executed.  Tensors of nested containers have the
 * keys joined by dots ("state_dict.layer1.0.conv1.weight", "optimizer.state.0.exp_avg"), in the file's order; what is no
 * tensor is left out; a lone tensor is called "tensor".  Big-endian and compressed torch files, sparse and quantized
 * tensors are refused.  An archive belongs to one thread at a time. */
SPMDEF spm_archive *spm_archive_open(spm_context *ctx, const char *path, spm_error *err);
/* The same over memory, which must stay until the archive is closed. */
SPMDEF spm_archive *spm_archive_open_memory(spm_context *ctx, const char *name, const void *data, size_t size, spm_error *err);
SPMDEF void spm_archive_close(spm_archive *archive);                             /* NULL is fine */
SPMDEF const char *spm_dtype_name(spm_dtype dtype);                              /* "F32", "BF16", ... as in safetensors */
SPMDEF const char *spm_archive_format(const spm_archive *archive);               /* "safetensors", "torch zip", "torch legacy" */
SPMDEF int64_t spm_archive_count(const spm_archive *archive);
SPMDEF const spm_archive_tensor *spm_archive_tensor_at(const spm_archive *archive, int64_t index); /* NULL outside */
SPMDEF const spm_archive_tensor *spm_archive_find(const spm_archive *archive, const char *name);   /* NULL if absent; hashed */
SPMDEF const char *spm_archive_metadata(const spm_archive *archive, const char *key); /* safetensors __metadata__; NULL if absent */
/* Reads one of the archive's tensors, row-major, converted to float or to int64; `out` holds tensor->count elements.
 * Exact wherever the target can hold the value; F64 and I64 to float round to nearest; a float that is no int64 is an
 * error.  Contiguous F32 (I64) goes straight from the file into `out`; other tensors pass a 64 KiB buffer, strided ones a
 * buffer of their span.  The CRC of a torch zip entry is checked before its values are used (0: torch left it out). */
SPMDEF spm_status spm_archive_read_f32(spm_archive *archive, const spm_archive_tensor *tensor, float *out, spm_error *err);
SPMDEF spm_status spm_archive_read_i64(spm_archive *archive, const spm_archive_tensor *tensor, int64_t *out, spm_error *err);

/* ---- named tensors, written ----
 * Tensors and metadata are declared first (safetensors has its sizes up front), then the values are put in that order.
 * The first failure is kept and reported by commit; until then nothing stands under the final name.  The bytes depend on
 * nothing but the arguments: no clock, no version.
 * SPM_ARCHIVE_SAFETENSORS: data begin at a multiple of 64.  SPM_ARCHIVE_TORCH: an OrderedDict of tensors, every storage
 * at a multiple of 64, which torch.load(weights_only=True) reads; metadata has no place there and is dropped. */
typedef struct spm_archive_writer spm_archive_writer;
typedef enum spm_archive_kind { SPM_ARCHIVE_SAFETENSORS, SPM_ARCHIVE_TORCH } spm_archive_kind;
SPMDEF spm_archive_writer *spm_archive_create(spm_context *ctx, const char *path, spm_archive_kind kind, spm_error *err);
SPMDEF void spm_archive_add_metadata(spm_archive_writer *writer, const char *key, const char *value);
SPMDEF void spm_archive_add(spm_archive_writer *writer, const char *name, spm_dtype dtype, int rank, const int64_t *shape);
SPMDEF void spm_archive_put(spm_archive_writer *writer, const void *values);     /* the next declared tensor, host order, row-major */
SPMDEF spm_status spm_archive_commit(spm_archive_writer *writer, spm_error *err); /* flush, rename into place; frees the writer */
SPMDEF void spm_archive_abort(spm_archive_writer *writer);                       /* frees; nothing is left; NULL is fine */

/* ---- tar (ustar, GNU and pax long names and sizes), read in place ----
 * Opening reads the headers (checksums are checked) and keeps names, offsets and sizes of the regular files; folders,
 * links and devices are left out.  Names have a leading "./" taken off; of equal names spm_tar_find gives the last. */
typedef struct spm_tar spm_tar;
SPMDEF spm_tar *spm_tar_open(spm_context *ctx, const char *path, spm_error *err);
SPMDEF spm_tar *spm_tar_open_memory(spm_context *ctx, const char *name, const void *data, size_t size, spm_error *err); /* data must stay */
SPMDEF void spm_tar_close(spm_tar *tar);                                         /* NULL is fine */
SPMDEF int64_t spm_tar_count(const spm_tar *tar);
SPMDEF const char *spm_tar_name(const spm_tar *tar, int64_t index);              /* NULL outside */
SPMDEF uint64_t spm_tar_size(const spm_tar *tar, int64_t index);
SPMDEF int64_t spm_tar_find(const spm_tar *tar, const char *name);               /* -1 if absent; hashed */
/* Reads one file: *data (spm_free) has *size bytes and a NUL behind them.  Any number of threads may read at once, each
 * with its own err (pread on POSIX, a lock elsewhere). */
SPMDEF spm_status spm_tar_read(spm_tar *tar, int64_t index, uint8_t **data, size_t *size, spm_error *err);

/* ---- plain arrays: idx (MNIST; also inside gzip) and npy (NumPy, C order) ---- */
typedef struct spm_array {
    void *data;       /* `count` elements in host order, row-major; spm_array_free */
    int64_t shape[SPM_ARCHIVE_MAX_RANK], count;
    int rank;
    spm_dtype dtype;  /* the file's */
} spm_array;
SPMDEF void spm_array_free(spm_context *ctx, spm_array *array);
SPMDEF spm_status spm_idx_load(spm_context *ctx, const char *path, spm_array *array, spm_error *err);
SPMDEF spm_status spm_idx_parse(spm_context *ctx, const char *name, const void *data, size_t size, spm_array *array, spm_error *err);
SPMDEF spm_status spm_npy_load(spm_context *ctx, const char *path, spm_array *array, spm_error *err);
SPMDEF spm_status spm_npy_parse(spm_context *ctx, const char *name, const void *data, size_t size, spm_array *array, spm_error *err);
SPMDEF spm_status spm_npy_save_f32(spm_context *ctx, const char *path, const float *values, int rank, const int64_t *shape, spm_error *err);

/* ================================================================================================================
 * >>API-DATA  14  data sets, groups, loaders
 * ============================================================================================================= */

typedef enum spm_split { SPM_TRAIN, SPM_VAL, SPM_TEST, SPM_SPLITS } spm_split;
SPMDEF const char *spm_split_name(spm_split split);                 /* "train", "val", "test" */
SPMDEF int spm_split_parse(const char *name, spm_split *split);     /* also "0", "1", "2"; 1 if it is one */

typedef enum spm_data_format {
    SPM_DATA_AUTO, SPM_DATA_WATERBIRDS, SPM_DATA_CELEBA, SPM_DATA_METADATA, SPM_DATA_FOLDER, SPM_DATA_IDX, SPM_DATA_CIFAR, SPM_DATA_PACKED
} spm_data_format;
SPMDEF int spm_data_format_parse(const char *name, spm_data_format *format);
SPMDEF const char *spm_data_format_name(spm_data_format format);

typedef struct spm_dataset_desc {
    const char *path;          /* a folder, or a tar file that is read in place */
    const char *target;        /* CelebA: attribute to predict (NULL: Blond_Hair) */
    const char *confounder;    /* CelebA: NULL: Male */
    int64_t limit;             /* keep the first so many examples of each split; 0: all */
    size_t cache_bytes;        /* decoded pictures kept in memory; 0: 1 GiB */
    int skip_bad_images;       /* 0: a bad picture is an error; 1: it is left out, counted and listed */
    int apply_exif;
    spm_data_format format;
} spm_dataset_desc;

/* One example: class y, confounder a, group y * n_confounders + a. `file` is relative to the data set. */
typedef struct spm_example {
    const char *file;
    int32_t y, confounder, group;
    spm_split split;
} spm_example;

typedef struct spm_dataset spm_dataset;
SPMDEF spm_dataset *spm_dataset_open(spm_context *ctx, const spm_dataset_desc *desc, spm_error *err);
SPMDEF void spm_dataset_close(spm_dataset *dataset);
SPMDEF spm_context *spm_dataset_context(const spm_dataset *dataset);
SPMDEF const char *spm_dataset_path(const spm_dataset *dataset);
SPMDEF spm_data_format spm_dataset_format(const spm_dataset *dataset);
SPMDEF int spm_dataset_classes(const spm_dataset *dataset);
SPMDEF int spm_dataset_confounders(const spm_dataset *dataset);
SPMDEF int spm_dataset_groups(const spm_dataset *dataset);
SPMDEF const char *spm_dataset_class_name(const spm_dataset *dataset, int y);
SPMDEF const char *spm_dataset_group_name(const spm_dataset *dataset, int group);  /* "landbird on water" */
SPMDEF int64_t spm_dataset_size(const spm_dataset *dataset);                        /* all splits */
SPMDEF const spm_example *spm_dataset_example(const spm_dataset *dataset, int64_t id); /* ids follow the metadata's rows */
SPMDEF int64_t spm_dataset_split_size(const spm_dataset *dataset, spm_split split);
SPMDEF const int64_t *spm_dataset_split_ids(const spm_dataset *dataset, spm_split split);
SPMDEF int64_t spm_dataset_group_count(const spm_dataset *dataset, spm_split split, int group);
SPMDEF uint64_t spm_dataset_hash(const spm_dataset *dataset);   /* of files, labels and splits: names the data in protocols */
/* Decodes one picture (through the cache). Thread-safe. */
SPMDEF spm_status spm_dataset_image(spm_dataset *dataset, int64_t id, spm_image *image, spm_error *err);
/* Pictures that could not be read so far (skip_bad_images), in the order of their ids. */
SPMDEF int64_t spm_dataset_bad_count(const spm_dataset *dataset);
SPMDEF const char *spm_dataset_bad(const spm_dataset *dataset, int64_t index, int64_t *id); /* the reason */

/* What happens to a picture on its way to the network. */
typedef enum spm_resize_mode { SPM_RESIZE_PAPER, SPM_RESIZE_EXACT, SPM_RESIZE_SHORT_SIDE, SPM_RESIZE_NONE } spm_resize_mode;
typedef enum spm_augment { SPM_AUGMENT_NONE, SPM_AUGMENT_LIGHT, SPM_AUGMENT_PAPER } spm_augment;
typedef struct spm_transform {
    int64_t height, width;
    float mean[3], std[3];
    spm_resize_mode resize;   /* CLI.md, --resize */
} spm_transform;
SPMDEF spm_transform spm_transform_make(int64_t height, int64_t width); /* ImageNet mean and std, SPM_RESIZE_PAPER */
SPMDEF int spm_resize_mode_parse(const char *name, spm_resize_mode *mode);
SPMDEF const char *spm_resize_mode_name(spm_resize_mode mode);
SPMDEF int spm_augment_parse(const char *name, spm_augment *augment);
SPMDEF const char *spm_augment_name(spm_augment augment);
/* The evaluation transform without the normalisation: 8-bit, height x width. */
SPMDEF spm_status spm_transform_image(spm_context *ctx, const spm_transform *transform, const spm_image *image, spm_image *result, spm_error *err);
/* (value / 255 - mean) / std into out[height][width][3]. */
SPMDEF void spm_transform_normalize(const spm_transform *transform, const spm_image *image, float *out);

typedef struct spm_loader_desc {
    spm_transform transform;
    int64_t batch;             /* 0: 64 */
    uint64_t seed;             /* of order and augmentation, keyed by (seed, epoch, example) */
    int workers;               /* 0: as many as the context's threads; without SPURMEM_THREADS the caller decodes */
    int shuffle, drop_last;
    spm_split split;
    spm_augment augment;
} spm_loader_desc;

/* A batch; its memory belongs to the loader and stays until the next spm_loader_next. */
typedef struct spm_batch {
    const float *pixels;       /* [count, height, width, 3] */
    const int64_t *id;         /* of examples */
    const int32_t *y, *confounder, *group;
    int64_t count;
} spm_batch;

typedef struct spm_loader spm_loader;
SPMDEF spm_loader *spm_loader_create(spm_dataset *dataset, const spm_loader_desc *desc, spm_error *err);
SPMDEF void spm_loader_destroy(spm_loader *loader);
/* Begins an epoch over order[0..n) (ids), or over the whole split (shuffled if the desc says so) when order is NULL. */
SPMDEF spm_status spm_loader_start(spm_loader *loader, int64_t epoch, const int64_t *order, int64_t n);
SPMDEF int spm_loader_next(spm_loader *loader, spm_batch *batch);   /* 1 a batch, 0 the end, -1 an error */
SPMDEF spm_error *spm_loader_error(spm_loader *loader);
SPMDEF double spm_loader_waited(const spm_loader *loader);          /* seconds that next() has waited since start */

/* ================================================================================================================
 * >>API-CKPT  15  checkpoints
 * ============================================================================================================= */

/* What a checkpoint says beside its tensors; all of it is in the safetensors metadata of files written here. */
typedef struct spm_checkpoint_info {
    spm_arch arch;
    spm_transform transform;
    int label_reversed;        /* quirk Q2: output column 0 is the last class */
    int has_arch;              /* 0: the file does not say (a torch file): arch and transform are the caller's */
    int64_t epoch;             /* -1: unknown */
    char method[32];           /* "erm", "intervene" ... or "" */
    char class_names[512];     /* joined by '|', or "" */
    char source[16];           /* "safetensors", "torch zip", "torch legacy" */
} spm_checkpoint_info;

/* Reads only what the file says about itself. */
SPMDEF spm_status spm_checkpoint_inspect(spm_context *ctx, const char *path, spm_checkpoint_info *info, spm_error *err);
/* Fills the model's parameters and buffers.  Strict: missing, surplus and misshaped parameters are listed in the error;
 * allow_partial = 1 accepts a head of another size (it keeps its initialisation; logged in one line).
 * Prefixes (module., model., backbone.), nesting (state_dict, model_state_dict, model) and head names are recognised. */
SPMDEF spm_status spm_checkpoint_load(spm_model *model, const char *path, int allow_partial, spm_error *err);
/* Writes .safetensors, or a torch .pth by the name's ending; PyTorch's layout (OIHW) and names. Atomic. */
SPMDEF spm_status spm_checkpoint_save(spm_model *model, const char *path, const spm_checkpoint_info *info, spm_error *err);

/* ================================================================================================================
 * >>API-EVAL  16  evaluation: groups, intervals, tests
 * ============================================================================================================= */

/* How a model's outputs are to be read. */
typedef struct spm_reading {
    spm_transform transform;
    int label_reversed;
    int softmax_head;
} spm_reading;

typedef struct spm_group_metrics {
    const char *name;              /* the data set's, valid while it is open */
    int64_t count, correct;
    double accuracy, ci_low, ci_high; /* Wilson 95 %; NaN for an empty group */
    double loss;                   /* mean cross-entropy; NaN if empty */
    int id, y, confounder;
} spm_group_metrics;

/* Metrics of one split and, per example in loader order, what they were made from. */
typedef struct spm_eval {
    int64_t count;
    double loss, mean_accuracy, adjusted_accuracy, balanced_accuracy, auroc, ece;
    double worst_accuracy;
    spm_group_metrics *groups;     /* [n_groups] */
    int64_t *example;              /* [count] ids */
    int32_t *y, *group, *predicted; /* [count] true class, group, predicted class */
    float *example_loss;           /* [count] cross-entropy */
    float *probability;            /* [count][n_classes], class order: softmax of the logits */
    float *margin;                 /* [count] true logit minus the largest other (class order) */
    int n_groups, n_classes, worst_group; /* worst_group -1: all empty */
    spm_split split;
} spm_eval;

typedef struct spm_eval_desc {
    spm_reading reading;
    int64_t batch;                 /* 0: 64 */
    int workers;
    spm_split split;
    spm_progress_fn progress;
    void *progress_user;
} spm_eval_desc;

/* Runs the model in evaluation mode over a split. adjusted_accuracy uses the training shares of the groups. */
SPMDEF spm_status spm_evaluate(spm_model *model, spm_dataset *dataset, const spm_eval_desc *desc, spm_eval *eval, spm_error *err);
SPMDEF void spm_eval_free(spm_context *ctx, spm_eval *eval);
/* The "eval" object of CLI.md; and a list of its groups under `key`. */
SPMDEF void spm_eval_json(spm_json *json, const char *key, const spm_eval *eval);
SPMDEF void spm_groups_json(spm_json *json, const char *key, const spm_eval *eval);

/* Wilson's 95 % score interval of correct / count. */
SPMDEF void spm_wilson(int64_t correct, int64_t count, double *low, double *high);
/* McNemar's exact two-sided p for paired changes: b only-before correct, c only-after correct. */
SPMDEF double spm_mcnemar(int64_t b, int64_t c);
/* softmax / class-order helpers: logits of one example in column order -> class and probabilities in class order. */
SPMDEF int spm_classify(const spm_reading *reading, const float *logits, int classes, float *probabilities);

/* ================================================================================================================
 * >>API-ATTR  17  attribution: scores of units
 * ============================================================================================================= */

/* A unit: one output channel of a convolution or one output of a linear layer (row `channel` of `parameter`). */
typedef struct spm_unit {
    int parameter;
    int64_t channel;
    double score;
} spm_unit;

typedef enum spm_criterion {
    SPM_CRITERION_GRADIENT,        /* L2 norm of the loss gradient's row */
    SPM_CRITERION_MAGNITUDE,       /* L2 norm of the weight's row */
    SPM_CRITERION_WEIGHT_GRADIENT, /* |sum of weight x gradient| over the row: the first-order effect of removing it */
    SPM_CRITERION_RANDOM
} spm_criterion;
SPMDEF int spm_criterion_parse(const char *name, spm_criterion *criterion);
SPMDEF const char *spm_criterion_name(spm_criterion criterion);

typedef struct spm_attr_desc {
    spm_reading reading;
    int64_t samples;           /* of a group, those with the lowest probability of the true class; 0: 200 */
    uint64_t seed;             /* random criterion */
    int group;                 /* -1: all groups together */
    int skip_downsample;       /* quirk Q3 for magnitude */
    int convolutions_only;     /* official ranks 4-D weights only */
    int workers;
    spm_split split;
    spm_criterion criterion;
} spm_attr_desc;

/* Scores every unit and sorts: largest first, ties by (parameter, channel).  `eval` (of desc->split) may hand in a
 * finished evaluation that samples are chosen by; NULL evaluates here.  *units is freed with spm_free. */
SPMDEF spm_status spm_rank_units(spm_model *model, spm_dataset *dataset, const spm_attr_desc *desc, const spm_eval *eval,
                                 spm_unit **units, int64_t *count, int64_t *samples_used, spm_error *err);

/* ================================================================================================================
 * >>API-LOCAL  18  localization: change units, measure every group
 * ============================================================================================================= */

typedef enum spm_modify {
    SPM_MODIFY_ZERO_UNIT, SPM_MODIFY_ZERO, SPM_MODIFY_NOISE, SPM_MODIFY_REINIT, SPM_MODIFY_REWIND, SPM_MODIFY_LAYER_REWIND
} spm_modify;
SPMDEF int spm_modify_parse(const char *name, spm_modify *modify);
SPMDEF const char *spm_modify_name(spm_modify modify);

#define SPM_LOCALIZE_MAX 32
typedef struct spm_localize_desc {
    spm_reading reading;
    const int *groups;         /* to rank for; NULL: all */
    int n_groups;
    int64_t top[SPM_LOCALIZE_MAX];      /* how many units are changed at once; none: 1, 2, 3 */
    int n_top;
    double fraction[SPM_LOCALIZE_MAX];  /* unit = weight: shares of single weights instead of top-k channels */
    int n_fraction, order_smallest, workers;
    double dropout_p;          /* each selected position stays selected with probability 1 - p */
    double std[SPM_LOCALIZE_MAX];       /* noise and reinit; none: .01 */
    int n_std;
    const char *rewind_file;   /* checkpoint for rewind and layer-rewind */
    spm_arch rewind_arch;      /* its architecture, where the file does not say */
    int64_t repeats;           /* 0: 1 (noise, reinit: 10) */
    int64_t controls;          /* matched random controls for the rows of the largest top; 0: none (the tool: 19) */
    int64_t samples, batch;
    size_t prefix_bytes;       /* memory for stored block inputs (prefix reuse); 0: 1 GiB */
    uint64_t seed;
    int official;              /* METHOD.md profile: quirks Q3-Q7 on */
    int allow_same_split;
    spm_split select_split;
    int report[SPM_SPLITS];    /* which splits to report; none: train and test */
    spm_criterion criterion;
    spm_modify modify;
    spm_progress_fn progress;
    void *progress_user;
} spm_localize_desc;

/* The result is the "localize" object of CLI.md, written into `json` under `key` (NULL: top level). The model's
 * parameters are the same bits before and after. */
SPMDEF spm_status spm_localize(spm_model *model, spm_dataset *dataset, const spm_localize_desc *desc, spm_json *json, const char *key, spm_error *err);
/* Applies a modification to chosen units (the caller keeps a copy if it wants the old values back). `rewind` is needed
 * by rewind and layer-rewind. */
SPMDEF spm_status spm_modify_units(spm_model *model, const spm_unit *units, int64_t count, spm_modify modify, double std,
                                   uint64_t seed, spm_model *rewind, spm_error *err);

/* ================================================================================================================
 * >>API-TRAIN  19  training, the intervention, run folders
 * ============================================================================================================= */

typedef enum spm_method { SPM_METHOD_ERM, SPM_METHOD_INTERVENE } spm_method;
typedef enum spm_mask_kind { SPM_MASK_CRITICAL, SPM_MASK_OFFICIAL, SPM_MASK_RANDOM, SPM_MASK_NONE } spm_mask_kind;
typedef enum spm_contrast { SPM_CONTRAST_FEATURES, SPM_CONTRAST_OUTPUTS, SPM_CONTRAST_NONE } spm_contrast;
typedef enum spm_select { SPM_SELECT_WGA, SPM_SELECT_ACCURACY, SPM_SELECT_LAST } spm_select;

/* spm_train_desc_init fills the defaults of CLI.md; zero means what it says. */
typedef struct spm_train_desc {
    const char *out;               /* the run folder */
    const char *checkpoint;        /* initial weights, or NULL */
    spm_arch arch;
    spm_reading reading;           /* transform, label order, head */
    spm_optimizer_desc optimizer;
    int64_t epochs, batch, warmup, patience;
    int64_t max_steps;             /* stop (resumable) after so many steps in all; 0: none */
    int64_t keep_every;            /* also keep epoch-NNN.safetensors every so many epochs; 0: none */
    int64_t eval_every;            /* evaluate every so many epochs, and the last; 0: 1 */
    double clip;
    uint64_t seed;
    const char *log_steps;         /* a JSON line per step, or NULL */
    int workers, shuffle, drop_last, allow_partial, resume, segments;
    /* the intervention (METHOD.md 2.6) */
    float tau, lambda;             /* contrast temperature; weight of the cross-entropy term */
    double prune_fraction;
    int cross_entropy;             /* --ce on|off */
    int cross_entropy_pruned;      /* 1: the pruned branch's outputs get the cross-entropy as well */
    int bn_shared;                 /* 1: all forwards commit to the same running statistics (Q11) */
    int group_labels;              /* 1: minority groups are known; 0: memorized examples are found by the model's history */
    int official;                  /* profile: every quirk of METHOD.md */
    int group_weighting;           /* 1: cross-entropy weighted so that every group counts the same */
    spm_criterion criterion;
    spm_mask_kind mask;
    spm_contrast contrast;
    spm_method method;
    spm_schedule_kind schedule;
    spm_augment augment;
    spm_select select;
    spm_progress_fn progress;
    void *progress_user;
    /* called after each evaluation of an epoch (metrics as in metrics.jsonl), may be NULL */
    void (*on_epoch)(void *user, int64_t epoch, const spm_eval *train, const spm_eval *val, const spm_eval *test, double loss, double seconds);
    void *on_epoch_user;
} spm_train_desc;

typedef struct spm_train_result {
    int64_t epochs, steps, best_epoch; /* epochs finished; steps done; epoch of best.safetensors */
    double best_score;                 /* of the selection rule */
    int stopped;                       /* 1: the progress callback asked to stop; --resume goes on from here */
} spm_train_result;

SPMDEF spm_train_desc spm_train_desc_init(spm_method method);
/* Trains into desc->out: config.json, metrics.jsonl, best.safetensors, last.safetensors, resume state.
 * The same bits for any number of threads, and for a resumed and an unbroken run. */
SPMDEF spm_status spm_train(spm_context *ctx, spm_dataset *dataset, const spm_train_desc *desc, spm_train_result *result, spm_error *err);

/* ================================================================================================================
 * >>API-REPORT  20  the HTML page
 * ============================================================================================================= */

typedef struct spm_report_desc {
    const char *const *runs;       /* run folders, in the order they are to stand on the page */
    int n_runs;
    const char *title;             /* NULL: "spurmem report" */
    const char *command;           /* shown in the protocol, or NULL */
} spm_report_desc;

/* One self-contained page (inline CSS and SVG, no script from elsewhere): curves per group over epochs, tables before and
 * after with counts and 95 % intervals, localization tables with controls, the protocol.  Reads what each run folder
 * holds: config.json, metrics.jsonl, eval.json, localize.json where they exist. Written atomically. */
SPMDEF spm_status spm_report_write(spm_context *ctx, const spm_report_desc *desc, const char *path, spm_error *err);

#endif /* SPURMEM_H */

/* ================================================================================================================
 *                                               IMPLEMENTATION
 * ============================================================================================================= */
#if (defined(SPURMEM_IMPLEMENTATION) || defined(SPURMEM_STATIC)) && !defined(SPURMEM_IMPLEMENTED)
/* 0 where an application included a system header under -std=c99 first, so that POSIX stayed hidden: no fsync then and a
 * coarser clock. */
#if defined(_WIN32) || (defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(__cplusplus))
  #define SPMI_POSIX 0
#else
  #define SPMI_POSIX 1
#endif
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(_WIN32)
  #ifndef WIN32_LEAN_AND_MEAN
    #define WIN32_LEAN_AND_MEAN
  #endif
  #ifndef NOMINMAX
    #define NOMINMAX
  #endif
  #include <windows.h>
  #include <direct.h>
#else
  #include <fcntl.h>
  #include <sys/stat.h>
  #include <sys/types.h>
  #include <unistd.h>
  #ifdef SPURMEM_THREADS
    #include <pthread.h>
  #endif
#endif

/* ================================================================================================================
 * >>CORE  01  status, context, log, allocator, checked sizes, text, files
 * ============================================================================================================= */

#if defined(__GNUC__) || defined(__clang__)
  #define SPMI_RESTRICT __restrict__
  #define SPMI_FORMAT(f, a) __attribute__((format(printf, f, a)))
#else
  #define SPMI_RESTRICT
  #define SPMI_FORMAT(f, a)
#endif

#define SPMI_ALIGN 64
#define SPMI_MIN(a, b) ((a) < (b) ? (a) : (b))
#define SPMI_MAX(a, b) ((a) > (b) ? (a) : (b))
#define SPMI_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* A lock that works before and without the pool: one flag. */
typedef struct spmi_lock {
#if defined(_WIN32) && defined(SPURMEM_THREADS)
    SRWLOCK native;
#elif defined(SPURMEM_THREADS)
    pthread_mutex_t native;
#else
    int unused;
#endif
} spmi_lock;

struct spmi_pool;

struct spm_context {
    spm_context_desc desc;
    spm_error error;
    spmi_lock lock;          /* guards `error` */
    struct spmi_pool *pool;  /* NULL: the caller's thread alone */
    int threads;
    spm_isa isa;
};

static void spmi_lock_init(spmi_lock *lock)
{
#if defined(_WIN32) && defined(SPURMEM_THREADS)
    InitializeSRWLock(&lock->native);
#elif defined(SPURMEM_THREADS)
    (void)pthread_mutex_init(&lock->native, NULL);
#else
    lock->unused = 0;
#endif
}

static void spmi_lock_free(spmi_lock *lock)
{
#if !defined(_WIN32) && defined(SPURMEM_THREADS)
    (void)pthread_mutex_destroy(&lock->native);
#else
    (void)lock;
#endif
}

static void spmi_lock_enter(spmi_lock *lock)
{
#if defined(_WIN32) && defined(SPURMEM_THREADS)
    AcquireSRWLockExclusive(&lock->native);
#elif defined(SPURMEM_THREADS)
    (void)pthread_mutex_lock(&lock->native);
#else
    (void)lock;
#endif
}

static void spmi_lock_leave(spmi_lock *lock)
{
#if defined(_WIN32) && defined(SPURMEM_THREADS)
    ReleaseSRWLockExclusive(&lock->native);
#elif defined(SPURMEM_THREADS)
    (void)pthread_mutex_unlock(&lock->native);
#else
    (void)lock;
#endif
}

/* The one place that formats text: always terminated, cut at `size`. Returns the length that was wanted. */
SPMI_FORMAT(3, 0)
static int spmi_format_list(char *buffer, size_t size, const char *format, va_list list)
{
    int n = vsnprintf(buffer, size, format, list);
    if (n < 0 && size) buffer[0] = 0;
    return n;
}

SPMI_FORMAT(3, 4)
static int spmi_format(char *buffer, size_t size, const char *format, ...)
{
    va_list list;
    int n;
    va_start(list, format);
    n = spmi_format_list(buffer, size, format, list);
    va_end(list);
    return n;
}

/* Records a failure in `err` (or in the context's own error if `err` is NULL) and returns its status.  The first one
 * stays: what follows from it would only hide it. */
SPMI_FORMAT(4, 5)
static spm_status spmi_fail(spm_context *ctx, spm_error *err, spm_status status, const char *format, ...)
{
    va_list list;
    spm_error *to = err ? err : &ctx->error;
    if (!err) spmi_lock_enter(&ctx->lock);
    if (to->status == SPM_OK) {
        to->status = status;
        va_start(list, format);
        (void)spmi_format_list(to->text, sizeof to->text, format, list);
        va_end(list);
    }
    if (!err) spmi_lock_leave(&ctx->lock);
    return status;
}

SPMI_FORMAT(3, 4)
static void spmi_log(const spm_context *ctx, spm_log_level level, const char *format, ...)
{
    char text[512];
    va_list list;
    if (!ctx->desc.log) return;
    va_start(list, format);
    (void)spmi_format_list(text, sizeof text, format, list);
    va_end(list);
    ctx->desc.log(ctx->desc.log_user, level, text);
}

/* a * b and a + b in size_t; 0 when the result does not fit. */
static int spmi_mul_size(size_t a, size_t b, size_t *result)
{
    if (b && a > SIZE_MAX / b) return 0;
    *result = a * b;
    return 1;
}

static int spmi_add_size(size_t a, size_t b, size_t *result)
{
    if (a > SIZE_MAX - b) return 0;
    *result = a + b;
    return 1;
}

/* a * b of dimensions that are >= 0; 0 when the product does not fit. */
static int spmi_mul_dim(int64_t a, int64_t b, int64_t *result)
{
    if (a < 0 || b < 0 || (b && a > INT64_MAX / b)) return 0;
    *result = a * b;
    return 1;
}

/* All memory of the library passes here: 64-byte aligned, the raw pointer is kept just below what is handed out. */
static void *spmi_alloc(const spm_context *ctx, size_t bytes)
{
    size_t total;
    void *raw;
    uintptr_t at;
    if (!spmi_add_size(bytes, SPMI_ALIGN + sizeof(void *), &total)) return NULL;
    raw = ctx->desc.alloc ? ctx->desc.alloc(ctx->desc.alloc_user, total) : malloc(total);
    if (!raw) return NULL;
    at = ((uintptr_t)raw + sizeof(void *) + SPMI_ALIGN - 1) & ~(uintptr_t)(SPMI_ALIGN - 1);
    memcpy((char *)raw + (at - (uintptr_t)raw) - sizeof(void *), &raw, sizeof raw);
    return (char *)raw + (at - (uintptr_t)raw);
}

static void *spmi_alloc_zero(const spm_context *ctx, size_t bytes)
{
    void *memory = spmi_alloc(ctx, bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

static void *spmi_alloc_array(const spm_context *ctx, int64_t count, size_t size)
{
    size_t bytes;
    if (count < 0 || (uint64_t)count > SIZE_MAX || !spmi_mul_size((size_t)count, size, &bytes)) return NULL;
    return spmi_alloc_zero(ctx, bytes);
}

static void spmi_free(const spm_context *ctx, void *memory)
{
    void *raw;
    if (!memory) return;
    memcpy(&raw, (char *)memory - sizeof(void *), sizeof raw);
    if (ctx->desc.free) ctx->desc.free(ctx->desc.alloc_user, raw);
    else free(raw);
}

SPMDEF void spm_free(spm_context *ctx, void *memory)
{
    spmi_free(ctx, memory);
}

/* A failed allocation, named by what it was for. */
static spm_status spmi_fail_memory(spm_context *ctx, spm_error *err, const char *what)
{
    return spmi_fail(ctx, err, SPM_E_MEMORY, "out of memory for %s", what);
}

/* Grows `*memory` (of `used` bytes) to hold `wanted`; the old block stays valid when this fails. */
static int spmi_grow(const spm_context *ctx, void **memory, size_t used, size_t *capacity, size_t wanted)
{
    size_t room = *capacity ? *capacity : 64;
    void *bigger;
    if (wanted <= *capacity) return 1;
    while (room < wanted) {
        if (room > SIZE_MAX / 2) return 0;
        room *= 2;
    }
    bigger = spmi_alloc(ctx, room);
    if (!bigger) return 0;
    if (used) memcpy(bigger, *memory, used);
    spmi_free(ctx, *memory);
    *memory = bigger;
    *capacity = room;
    return 1;
}

/* Text that grows.  After a failed allocation it stays as it is and `failed` is set: check once at the end. */
typedef struct spmi_text {
    spm_context *ctx;
    char *data; /* NULL or terminated */
    size_t length, capacity;
    int failed;
} spmi_text;

static spmi_text spmi_text_create(spm_context *ctx)
{
    spmi_text text = SPM_ZERO;
    text.ctx = ctx;
    return text;
}

static void spmi_text_free(spmi_text *text)
{
    spmi_free(text->ctx, text->data);
    text->data = NULL;
    text->length = text->capacity = 0;
}

static void spmi_text_append(spmi_text *text, const char *bytes, size_t count)
{
    void *memory = text->data;
    if (text->failed || count > SIZE_MAX - text->length - 1
        || !spmi_grow(text->ctx, &memory, text->length, &text->capacity, text->length + count + 1)) {
        text->failed = 1;
        return;
    }
    text->data = (char *)memory;
    if (count) memcpy(text->data + text->length, bytes, count);
    text->length += count;
    text->data[text->length] = 0;
}

static void spmi_text_add(spmi_text *text, const char *string)
{
    spmi_text_append(text, string, strlen(string));
}

SPMI_FORMAT(2, 3)
static void spmi_text_addf(spmi_text *text, const char *format, ...)
{
    char small[512];
    va_list list;
    int n;
    va_start(list, format);
    n = spmi_format_list(small, sizeof small, format, list);
    va_end(list);
    if (n < 0) text->failed = 1;
    else if ((size_t)n < sizeof small) spmi_text_append(text, small, (size_t)n);
    else {
        char *large = (char *)spmi_alloc(text->ctx, (size_t)n + 1);
        if (!large) { text->failed = 1; return; }
        va_start(list, format);
        (void)spmi_format_list(large, (size_t)n + 1, format, list);
        va_end(list);
        spmi_text_append(text, large, (size_t)n);
        spmi_free(text->ctx, large);
    }
}

/* A copy of `length` bytes of `string` with a terminator; NULL when memory runs out. */
static char *spmi_string_copy(const spm_context *ctx, const char *string, size_t length)
{
    char *copy = (char *)spmi_alloc(ctx, length + 1);
    if (!copy) return NULL;
    memcpy(copy, string, length);
    copy[length] = 0;
    return copy;
}

static int spmi_string_equal(const char *a, const char *b)
{
    return strcmp(a, b) == 0;
}

/* 1 if `string` ends in `suffix`, letters compared without case (file name endings). */
static int spmi_string_ends(const char *string, const char *suffix)
{
    size_t n = strlen(string), m = strlen(suffix), i;
    if (m > n) return 0;
    for (i = 0; i < m; i++) {
        int a = string[n - m + i], b = suffix[i];
        if (a >= 'A' && a <= 'Z') a += 'a' - 'A';
        if (a != b) return 0;
    }
    return 1;
}

SPMDEF const char *spm_status_text(spm_status status)
{
#define SPM_X(name, text) case name: return text;
    switch (status) {
    SPM_STATUS_LIST(SPM_X)
    case SPM_STATUS_COUNT: break;
    }
#undef SPM_X
    return "unknown status";
}

SPMDEF spm_status spm_context_status(const spm_context *ctx)
{
    return ctx->error.status;
}

SPMDEF const char *spm_context_error(const spm_context *ctx)
{
    return ctx->error.text;
}

SPMDEF void spm_context_clear_error(spm_context *ctx)
{
    spmi_lock_enter(&ctx->lock);
    ctx->error.status = SPM_OK;
    ctx->error.text[0] = 0;
    spmi_lock_leave(&ctx->lock);
}

/* Seconds of a clock that does not jump, for progress and benches only: no result depends on it. */
static double spmi_seconds(void)
{
#if defined(_WIN32)
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return (double)count.QuadPart / (double)frequency.QuadPart;
#elif SPMI_POSIX && defined(CLOCK_MONOTONIC)
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)clock() / (double)CLOCKS_PER_SEC;
#endif
}

/* ---- files ---- */

SPMDEF spm_status spm_file_read(spm_context *ctx, const char *path, uint8_t **data, size_t *size, spm_error *err)
{
    FILE *file = fopen(path, "rb");
    void *memory = NULL;
    size_t used = 0, capacity = 0, got;
    *data = NULL;
    *size = 0;
    if (!file) return spmi_fail(ctx, err, SPM_E_IO, "%s: cannot be opened: %s", path, strerror(errno));
    if (fseek(file, 0, SEEK_END) == 0) { /* a hint only: the file is read to its end whatever this says */
        long end = ftell(file);
        if (end > 0 && !spmi_grow(ctx, &memory, 0, &capacity, (size_t)end + 2)) {
            fclose(file);
            return spmi_fail(ctx, err, SPM_E_MEMORY, "%s: out of memory for its %ld bytes", path, end);
        }
        rewind(file);
    }
    for (;;) {
        if (!spmi_grow(ctx, &memory, used, &capacity, used + 2)) {
            spmi_free(ctx, memory);
            fclose(file);
            return spmi_fail(ctx, err, SPM_E_MEMORY, "%s: out of memory while reading it", path);
        }
        errno = 0;
        got = fread((char *)memory + used, 1, capacity - used - 1, file);
        if (got == 0) break;
        used += got;
    }
    if (ferror(file)) {
        int reason = errno;
        spmi_free(ctx, memory);
        fclose(file);
        return spmi_fail(ctx, err, SPM_E_IO, "%s: reading failed after %lu bytes: %s", path, (unsigned long)used,
                         reason ? strerror(reason) : "input/output error");
    }
    fclose(file);
    ((char *)memory)[used] = 0;
    *data = (uint8_t *)memory;
    *size = used;
    return SPM_OK;
}

/* A file that appears under its name only when it is complete: written beside it, flushed, renamed. */
typedef struct spmi_writer {
    spm_context *ctx;
    FILE *file;
    char *path, *temporary;
    int failed; /* errno of the first failed write */
} spmi_writer;

static void spmi_writer_abort(spmi_writer *writer)
{
    if (writer->file) {
        fclose(writer->file);
        (void)remove(writer->temporary);
    }
    writer->file = NULL;
    spmi_free(writer->ctx, writer->path);
    spmi_free(writer->ctx, writer->temporary);
    writer->path = writer->temporary = NULL;
}

static spm_status spmi_writer_open(spmi_writer *writer, spm_context *ctx, const char *path, spm_error *err)
{
    size_t length = strlen(path);
    memset(writer, 0, sizeof *writer);
    writer->ctx = ctx;
    writer->path = spmi_string_copy(ctx, path, length);
    writer->temporary = (char *)spmi_alloc(ctx, length + 16);
    if (!writer->path || !writer->temporary) {
        spmi_writer_abort(writer);
        return spmi_fail_memory(ctx, err, path);
    }
    (void)spmi_format(writer->temporary, length + 16, "%s.part", path);
    writer->file = fopen(writer->temporary, "wb");
    if (!writer->file) {
        spm_status status = spmi_fail(ctx, err, SPM_E_IO, "%s: cannot be written: %s", path, strerror(errno));
        spmi_writer_abort(writer);
        return status;
    }
    return SPM_OK;
}

static void spmi_writer_put(spmi_writer *writer, const void *data, size_t size)
{
    if (writer->failed || !size) return;
    errno = 0;
    if (fwrite(data, 1, size, writer->file) != size) writer->failed = errno ? errno : EIO;
}

/* Flushes a stream down to the disk; 0 when that fails. */
static int spmi_file_sync(FILE *file)
{
    if (fflush(file) != 0) return 0;
#if SPMI_POSIX
    if (fsync(fileno(file)) != 0 && errno != EINVAL && errno != ENOTSUP) return 0;
#endif
    return 1;
}

static int spmi_file_rename(const char *from, const char *to)
{
#if defined(_WIN32)
    return MoveFileExA(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
#else
    return rename(from, to) == 0;
#endif
}

static spm_status spmi_writer_commit(spmi_writer *writer, spm_error *err)
{
    spm_status status = SPM_OK;
    int reason = writer->failed;
    errno = 0;
    if (!reason && !spmi_file_sync(writer->file)) reason = errno ? errno : EIO;
    if (fclose(writer->file) != 0 && !reason) reason = errno ? errno : EIO;
    writer->file = NULL;
    if (!reason && !spmi_file_rename(writer->temporary, writer->path)) reason = errno ? errno : EIO;
    if (reason) {
        (void)remove(writer->temporary);
        status = spmi_fail(writer->ctx, err, SPM_E_IO, "%s: writing failed: %s; free some space or choose another folder",
                           writer->path, strerror(reason));
    }
#if SPMI_POSIX
    else { /* the folder's entry must reach the disk as well */
        char *slash = strrchr(writer->path, '/');
        int folder;
        if (slash) slash[slash == writer->path ? 1 : 0] = 0;
        folder = open(slash ? writer->path : ".", O_RDONLY);
        if (folder >= 0) {
            (void)fsync(folder);
            (void)close(folder);
        }
    }
#endif
    spmi_writer_abort(writer);
    return status;
}

SPMDEF spm_status spm_file_write(spm_context *ctx, const char *path, const void *data, size_t size, spm_error *err)
{
    spmi_writer writer;
    spm_status status = spmi_writer_open(&writer, ctx, path, err);
    if (status) return status;
    spmi_writer_put(&writer, data, size);
    return spmi_writer_commit(&writer, err);
}

/* 0 nothing there, 1 a file, 2 a folder. */
static int spmi_path_kind(const char *path)
{
#if defined(_WIN32)
    DWORD attributes = GetFileAttributesA(path);
    if (attributes == INVALID_FILE_ATTRIBUTES) return 0;
    return attributes & FILE_ATTRIBUTE_DIRECTORY ? 2 : 1;
#else
    struct stat info;
    if (stat(path, &info) != 0) return 0;
    return S_ISDIR(info.st_mode) ? 2 : 1;
#endif
}

static int spmi_make_directory(const char *path)
{
#if defined(_WIN32)
    return _mkdir(path) == 0;
#else
    return mkdir(path, 0777) == 0;
#endif
}

SPMDEF spm_status spm_directory_create(spm_context *ctx, const char *path, spm_error *err)
{
    size_t length = strlen(path), i;
    char *part = spmi_string_copy(ctx, path, length);
    if (!part) return spmi_fail_memory(ctx, err, path);
    for (i = 1; i <= length; i++) {
        char saved = part[i];
        if (saved != '/' && saved != 0) continue;
        part[i] = 0;
        if (spmi_path_kind(part) != 2 && !spmi_make_directory(part) && spmi_path_kind(part) != 2) {
            spm_status status = spmi_fail(ctx, err, SPM_E_IO, "%s: cannot create the folder %s: %s", path, part, strerror(errno));
            spmi_free(ctx, part);
            return status;
        }
        part[i] = saved;
    }
    spmi_free(ctx, part);
    return SPM_OK;
}

/* directory + "/" + name; NULL when memory runs out. */
static char *spmi_path_join(const spm_context *ctx, const char *directory, const char *name)
{
    size_t n = strlen(directory), m = strlen(name);
    char *path = (char *)spmi_alloc(ctx, n + m + 2);
    if (!path) return NULL;
    memcpy(path, directory, n);
    if (n && directory[n - 1] != '/') path[n++] = '/';
    memcpy(path + n, name, m + 1);
    return path;
}

/* ================================================================================================================
 * >>CPU  02  feature detection, denormal mode
 * ============================================================================================================= */

/* Which instruction sets this build has kernels for.  SPURMEM_NO_SIMD leaves only plain C. */
#if !defined(SPURMEM_NO_SIMD) && (defined(__GNUC__) || defined(__clang__)) && !defined(__TINYC__)
  #if defined(__x86_64__) && (!defined(_WIN32) || defined(SPURMEM_MINGW_AVX))
    /* MinGW's gcc spills wide registers to a stack that is aligned to 16 bytes only: plain C there by default. */
    #define SPMI_HAS_X86 1
  #elif defined(__aarch64__)
    #define SPMI_HAS_NEON 1
  #endif
#endif
#ifndef SPMI_HAS_X86
  #define SPMI_HAS_X86 0
#endif
#ifndef SPMI_HAS_NEON
  #define SPMI_HAS_NEON 0
#endif
#if SPMI_HAS_X86
  #include <cpuid.h>
  #include <immintrin.h>
#elif SPMI_HAS_NEON
  #include <arm_neon.h>
#endif

#if SPMI_HAS_X86
/* Register state that the system saves on a context switch (XCR0): AVX needs bits 1-2, AVX-512 bits 5-7 as well. */
static unsigned spmi_cpu_xcr0(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    (void)high;
    return low;
}
#endif

static int spmi_cpu_has(spm_isa isa)
{
    if (isa == SPM_ISA_C) return 1;
    if (isa == SPM_ISA_NEON) return SPMI_HAS_NEON;
#if SPMI_HAS_X86
    {
        unsigned a, b, c, d, xcr0;
        const unsigned osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12;              /* leaf 1, ecx */
        const unsigned avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31; /* leaf 7, ebx */
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (osxsave | avx | fma)) != (osxsave | avx | fma)) return 0;
        xcr0 = spmi_cpu_xcr0();
        if ((xcr0 & 0x06u) != 0x06u || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2)) return 0;
        if (isa == SPM_ISA_AVX2) return 1;
        if (isa == SPM_ISA_AVX512) return (xcr0 & 0xe0u) == 0xe0u && (b & (f | dq | bw | vl)) == (f | dq | bw | vl);
    }
#endif
    return 0;
}

SPMDEF const char *spm_isa_name(spm_isa isa)
{
    switch (isa) {
    case SPM_ISA_AUTO: return "auto";
    case SPM_ISA_C: return "c";
    case SPM_ISA_NEON: return "neon";
    case SPM_ISA_AVX2: return "avx2";
    case SPM_ISA_AVX512: return "avx512";
    }
    return "unknown";
}

SPMDEF int spm_isa_parse(const char *name, spm_isa *isa)
{
    int i;
    for (i = SPM_ISA_AUTO; i <= SPM_ISA_AVX512; i++) {
        if (spmi_string_equal(name, spm_isa_name((spm_isa)i))) {
            *isa = (spm_isa)i;
            return 1;
        }
    }
    return 0;
}

/* The instruction set to use: the one asked for, else the environment's, else the best. SPM_ISA_AUTO: not there. */
static spm_isa spmi_cpu_select(spm_isa wanted)
{
    static const spm_isa best[] = { SPM_ISA_AVX512, SPM_ISA_AVX2, SPM_ISA_NEON, SPM_ISA_C };
    const char *name = getenv("SPURMEM_ISA");
    int i;
    if (wanted == SPM_ISA_AUTO && name && *name && !spm_isa_parse(name, &wanted)) return SPM_ISA_AUTO;
    if (wanted != SPM_ISA_AUTO) return spmi_cpu_has(wanted) ? wanted : SPM_ISA_AUTO;
    for (i = 0; i < SPMI_COUNT(best); i++) {
        if (spmi_cpu_has(best[i])) return best[i];
    }
    return SPM_ISA_C;
}

static int spmi_cpu_cores(void)
{
#if defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwNumberOfProcessors > 0 ? (int)info.dwNumberOfProcessors : 1;
#elif defined(_SC_NPROCESSORS_ONLN)
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : cores > 1024 ? 1024 : (int)cores;
#else
    return 1;
#endif
}

/* Denormal numbers cost a hundred cycles each and carry nothing here: flushed to zero around all work of the library,
 * and the caller's mode is put back after it. */
static unsigned spmi_denormals_off(void)
{
#if SPMI_HAS_X86
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040u);
    return mode;
#elif SPMI_HAS_NEON
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (UINT64_C(1) << 24)));
    return (unsigned)mode;
#else
    return 0;
#endif
}

static void spmi_denormals_restore(unsigned mode)
{
#if SPMI_HAS_X86
    _mm_setcsr(mode);
#elif SPMI_HAS_NEON
    uint64_t wide = mode;
    __asm__ volatile("msr fpcr, %0" : : "r"(wide));
#else
    (void)mode;
#endif
}

/* ================================================================================================================
 * >>POOL  03  threads, parallel-for, the life of a context
 * ============================================================================================================= */

/* ---- threads: pthreads, Win32, or none ---- */

#if defined(SPURMEM_THREADS) && defined(_WIN32)
typedef HANDLE spmi_thread;
typedef CONDITION_VARIABLE spmi_condition;
#elif defined(SPURMEM_THREADS)
typedef pthread_t spmi_thread;
typedef pthread_cond_t spmi_condition;
#endif

#ifdef SPURMEM_THREADS
/* What a new thread runs; the pool and the loader both start theirs through this. */
typedef struct spmi_thread_start {
    void (*run)(void *arg);
    void *arg;
} spmi_thread_start;

#ifdef _WIN32
static DWORD WINAPI spmi_thread_main(void *arg)
#else
static void *spmi_thread_main(void *arg)
#endif
{
    spmi_thread_start *start = (spmi_thread_start *)arg;
    (void)spmi_denormals_off();
    start->run(start->arg);
    return 0;
}

/* `start` must outlive the thread. 0 when the system gives no thread. */
static int spmi_thread_create(spmi_thread *thread, spmi_thread_start *start)
{
#ifdef _WIN32
    *thread = CreateThread(NULL, 0, spmi_thread_main, start, 0, NULL);
    return *thread != NULL;
#else
    return pthread_create(thread, NULL, spmi_thread_main, start) == 0;
#endif
}

static void spmi_thread_join(spmi_thread thread)
{
#ifdef _WIN32
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
#else
    (void)pthread_join(thread, NULL);
#endif
}

static void spmi_condition_init(spmi_condition *condition)
{
#ifdef _WIN32
    InitializeConditionVariable(condition);
#else
    (void)pthread_cond_init(condition, NULL);
#endif
}

static void spmi_condition_free(spmi_condition *condition)
{
#ifdef _WIN32
    (void)condition;
#else
    (void)pthread_cond_destroy(condition);
#endif
}

static void spmi_condition_wait(spmi_condition *condition, spmi_lock *lock)
{
#ifdef _WIN32
    SleepConditionVariableSRW(condition, &lock->native, INFINITE, 0);
#else
    (void)pthread_cond_wait(condition, &lock->native);
#endif
}

static void spmi_condition_wake_all(spmi_condition *condition)
{
#ifdef _WIN32
    WakeAllConditionVariable(condition);
#else
    (void)pthread_cond_broadcast(condition);
#endif
}

/* ---- the pool ---- */

#if defined(__GNUC__) || defined(__clang__)
  #define SPMI_ATOMICS 1
  #define SPMI_LOAD(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
  #define SPMI_FETCH_ADD(p, v) __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL)
#else
  #define SPMI_ATOMICS 0
#endif

/* One job at a time.  `sequence` counts jobs; workers spin on it for some 50 microseconds, then sleep.  Tasks are taken
 * from a shared counter; a task belongs to no thread, so results cannot depend on who takes it. */
struct spmi_pool {
    spm_context *ctx;
    spmi_lock lock;
    spmi_condition wake, done;
    void (*fn)(void *arg, int64_t task, int slot);
    void *arg;
    int64_t tasks, next;      /* `next` is the counter */
    int64_t sequence;         /* of the current job */
    int working;              /* workers that have not finished the current job */
    int sleeping;             /* workers inside wait */
    int quit, busy;           /* `busy`: a job is under way */
    int workers;
    spmi_thread *threads;
    spmi_thread_start *starts;
    struct spmi_worker *slots;
};

typedef struct spmi_worker {
    struct spmi_pool *pool;
    int slot;
} spmi_worker;

static int64_t spmi_pool_take(struct spmi_pool *pool)
{
#if SPMI_ATOMICS
    return SPMI_FETCH_ADD(&pool->next, 1);
#else
    int64_t task;
    spmi_lock_enter(&pool->lock);
    task = pool->next++;
    spmi_lock_leave(&pool->lock);
    return task;
#endif
}

static void spmi_pool_work(struct spmi_pool *pool, int slot)
{
    int64_t task;
    while ((task = spmi_pool_take(pool)) < pool->tasks) pool->fn(pool->arg, task, slot);
}

/* Some 50 microseconds of looking for a new job without a system call. 1 if one came. */
static int spmi_pool_spin(struct spmi_pool *pool, int64_t seen)
{
#if SPMI_ATOMICS
    int i, j;
    for (i = 0; i < 400; i++) {
        if (SPMI_LOAD(&pool->sequence) != seen || SPMI_LOAD(&pool->quit)) return 1;
        for (j = 0; j < 8; j++) {
  #if SPMI_HAS_X86
            _mm_pause();
  #elif defined(__aarch64__)
            __asm__ volatile("yield");
  #endif
        }
    }
#else
    (void)pool;
    (void)seen;
#endif
    return 0;
}

static void spmi_pool_worker(void *arg)
{
    spmi_worker *worker = (spmi_worker *)arg;
    struct spmi_pool *pool = worker->pool;
    int64_t seen = 0;
    for (;;) {
        (void)spmi_pool_spin(pool, seen);
        spmi_lock_enter(&pool->lock);
        pool->sleeping++;
        while (pool->sequence == seen && !pool->quit) spmi_condition_wait(&pool->wake, &pool->lock);
        pool->sleeping--;
        if (pool->quit) {
            spmi_lock_leave(&pool->lock);
            return;
        }
        seen = pool->sequence;
        spmi_lock_leave(&pool->lock);
        spmi_pool_work(pool, worker->slot);
        spmi_lock_enter(&pool->lock);
        if (--pool->working == 0) spmi_condition_wake_all(&pool->done);
        spmi_lock_leave(&pool->lock);
    }
}

static void spmi_pool_destroy(struct spmi_pool *pool)
{
    int i;
    spm_context *ctx;
    if (!pool) return;
    ctx = pool->ctx;
    spmi_lock_enter(&pool->lock);
#if SPMI_ATOMICS
    __atomic_store_n(&pool->quit, 1, __ATOMIC_RELEASE);
#else
    pool->quit = 1;
#endif
    spmi_condition_wake_all(&pool->wake);
    spmi_lock_leave(&pool->lock);
    for (i = 0; i < pool->workers; i++) spmi_thread_join(pool->threads[i]);
    spmi_condition_free(&pool->wake);
    spmi_condition_free(&pool->done);
    spmi_lock_free(&pool->lock);
    spmi_free(ctx, pool->threads);
    spmi_free(ctx, pool->starts);
    spmi_free(ctx, pool->slots);
    spmi_free(ctx, pool);
}

/* A pool of up to threads - 1 workers (the caller is the last one); NULL when there is no memory for it. A system that
 * gives fewer threads gets a smaller pool: results do not depend on it. */
static struct spmi_pool *spmi_pool_create(spm_context *ctx, int threads)
{
    struct spmi_pool *pool = (struct spmi_pool *)spmi_alloc_zero(ctx, sizeof *pool);
    int i;
    if (!pool) return NULL;
    pool->ctx = ctx;
    spmi_lock_init(&pool->lock);
    spmi_condition_init(&pool->wake);
    spmi_condition_init(&pool->done);
    pool->threads = (spmi_thread *)spmi_alloc_array(ctx, threads - 1, sizeof *pool->threads);
    pool->starts = (spmi_thread_start *)spmi_alloc_array(ctx, threads - 1, sizeof *pool->starts);
    pool->slots = (spmi_worker *)spmi_alloc_array(ctx, threads - 1, sizeof *pool->slots);
    if (!pool->threads || !pool->starts || !pool->slots) {
        spmi_pool_destroy(pool);
        return NULL;
    }
    for (i = 0; i < threads - 1; i++) {
        pool->slots[i].pool = pool;
        pool->slots[i].slot = i + 1;
        pool->starts[i].run = spmi_pool_worker;
        pool->starts[i].arg = &pool->slots[i];
        if (!spmi_thread_create(&pool->threads[i], &pool->starts[i])) break;
        pool->workers++;
    }
    return pool;
}

/* Runs the job on the pool; 0 if it is busy with another one (nested or simultaneous): then the caller works alone. */
static int spmi_pool_run(struct spmi_pool *pool, int64_t tasks, void (*fn)(void *, int64_t, int), void *arg)
{
    spmi_lock_enter(&pool->lock);
    if (pool->busy) {
        spmi_lock_leave(&pool->lock);
        return 0;
    }
    pool->busy = 1;
    pool->fn = fn;
    pool->arg = arg;
    pool->tasks = tasks;
    pool->next = 0;
    pool->working = pool->workers;
#if SPMI_ATOMICS
    (void)SPMI_FETCH_ADD(&pool->sequence, 1);
#else
    pool->sequence++;
#endif
    if (pool->sleeping) spmi_condition_wake_all(&pool->wake);
    spmi_lock_leave(&pool->lock);
    spmi_pool_work(pool, 0);
    spmi_lock_enter(&pool->lock);
    while (pool->working) spmi_condition_wait(&pool->done, &pool->lock);
    pool->busy = 0;
    spmi_lock_leave(&pool->lock);
    return 1;
}
#endif /* SPURMEM_THREADS */

SPMDEF void spm_parallel(spm_context *ctx, int64_t tasks, void (*fn)(void *arg, int64_t task, int slot), void *arg)
{
    int64_t task;
    unsigned mode = spmi_denormals_off();
    if (ctx->desc.execute && tasks > 1) {
        ctx->desc.execute(ctx->desc.execute_user, tasks, fn, arg);
    } else {
#ifdef SPURMEM_THREADS
        if (tasks > 1 && ctx->pool && spmi_pool_run(ctx->pool, tasks, fn, arg)) {
            spmi_denormals_restore(mode);
            return;
        }
#endif
        for (task = 0; task < tasks; task++) fn(arg, task, 0);
    }
    spmi_denormals_restore(mode);
}

/* ---- the life of a context ---- */

SPMDEF spm_context *spm_context_create(const spm_context_desc *desc)
{
    spm_context start = SPM_ZERO;
    spm_context *ctx;
    spm_isa isa = spmi_cpu_select(desc ? desc->isa : SPM_ISA_AUTO);
    if (isa == SPM_ISA_AUTO) return NULL;
    if (desc) start.desc = *desc;
    if (!start.desc.alloc || !start.desc.free) {
        start.desc.alloc = NULL;
        start.desc.free = NULL;
    }
    ctx = (spm_context *)spmi_alloc(&start, sizeof *ctx);
    if (!ctx) return NULL;
    *ctx = start;
    spmi_lock_init(&ctx->lock);
    ctx->isa = isa;
    ctx->threads = ctx->desc.threads > 0 ? SPMI_MIN(ctx->desc.threads, 1024) : spmi_cpu_cores();
#ifdef SPURMEM_THREADS
    if (ctx->threads > 1 && !ctx->desc.execute) {
        ctx->pool = spmi_pool_create(ctx, ctx->threads);
        if (!ctx->pool) {
            spm_context_destroy(ctx);
            return NULL;
        }
    }
#else
    if (!ctx->desc.execute) ctx->threads = 1;
#endif
    return ctx;
}

SPMDEF void spm_context_destroy(spm_context *ctx)
{
    if (!ctx) return;
#ifdef SPURMEM_THREADS
    spmi_pool_destroy(ctx->pool);
#endif
    spmi_lock_free(&ctx->lock);
    spmi_free(ctx, ctx);
}

SPMDEF int spm_context_threads(const spm_context *ctx)
{
    return ctx->threads;
}

SPMDEF spm_isa spm_context_isa(const spm_context *ctx)
{
    return ctx->isa;
}

/* ================================================================================================================
 * >>RNG  04  Philox4x32-10
 * ============================================================================================================= */

/* Ten rounds over the 128-bit counter (index, stream) under the 64-bit key `seed`; four words come out. */
static void spmi_philox(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

SPMDEF uint32_t spm_random_u32(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    spmi_philox(seed, stream, index, words);
    return words[0];
}

SPMDEF float spm_random_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    return (float)(spm_random_u32(seed, stream, index) >> 8) * (1.0f / 16777216.0f);
}

SPMDEF float spm_random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    double u, v;
    spmi_philox(seed, stream, index, words);
    u = ((double)words[0] + 0.5) / 4294967296.0;
    v = (double)words[1] / 4294967296.0;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586477 * v));
}

/* Multiply-shift with rejection (Lemire 2019): exactly uniform. */
SPMDEF uint32_t spm_random_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t n)
{
    uint32_t words[4], threshold;
    int i;
    if (n <= 1) return 0;
    threshold = (uint32_t)(0u - n) % n;
    spmi_philox(seed, stream, index, words);
    for (i = 0; i < 4; i++) {
        uint64_t product = (uint64_t)words[i] * n;
        if ((uint32_t)product >= threshold) return (uint32_t)(product >> 32);
    }
    return (uint32_t)(((uint64_t)words[3] * n) >> 32); /* four rejections in a row: less than 1 in 10^12 for n < 2^22 */
}

SPMDEF void spm_random_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *order)
{
    int64_t i;
    for (i = 0; i < n; i++) order[i] = i;
    for (i = n - 1; i > 0; i--) {
        int64_t j = (int64_t)spm_random_below(seed, stream, (uint64_t)i, (uint32_t)(i + 1)), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

SPMDEF uint64_t spm_random_key(uint64_t seed, uint64_t a, uint64_t b)
{
    uint32_t words[4];
    spmi_philox(seed ^ UINT64_C(0x5851F42D4C957F2D), a, b, words);
    return (uint64_t)words[0] << 32 | words[1];
}

/* ================================================================================================================
 * >>KERN  05  kernels, one body for every instruction set
 * ----------------------------------------------------------------------------------------------------------------
 * The region between SPMI_PASS marks below is read once per instruction set: the header includes itself with
 * SPMI_PASS set, under a pragma that lets the compiler use that set, and every kernel name gets its suffix from
 * SPMI_K.  Kernels are written once, in terms of a few vector primitives (v_load, v_fma, ...).  Callers write
 *     SPMI_KERNEL(ctx, relu, (n, x, y));
 * which picks the body by the context's instruction set.
 * ============================================================================================================= */
#ifndef SPURMEM_SELF
  #define SPURMEM_SELF "spurmem.h"
#endif
#define SPMI_JOIN2(a, b) a##b
#define SPMI_JOIN(a, b) SPMI_JOIN2(a, b)

#define SPMI_PASS 1
#define SPMI_K(name) SPMI_JOIN(spmi_##name, _c)
#include SPURMEM_SELF
#undef SPMI_PASS
#undef SPMI_K

#if SPMI_HAS_X86
  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx2,fma")
    #pragma GCC optimize("fp-contract=off")
  #endif
  #define SPMI_PASS 2
  #define SPMI_K(name) SPMI_JOIN(spmi_##name, _avx2)
  #include SPURMEM_SELF
  #undef SPMI_PASS
  #undef SPMI_K
  #if defined(__clang__)
    #pragma clang attribute pop
    #pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
  #else
    #pragma GCC pop_options
    #pragma GCC push_options
    #pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
    #pragma GCC optimize("fp-contract=off")
  #endif
  #define SPMI_PASS 3
  #define SPMI_K(name) SPMI_JOIN(spmi_##name, _avx512)
  #include SPURMEM_SELF
  #undef SPMI_PASS
  #undef SPMI_K
  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif
#elif SPMI_HAS_NEON
  #define SPMI_PASS 4
  #define SPMI_K(name) SPMI_JOIN(spmi_##name, _neon)
  #include SPURMEM_SELF
  #undef SPMI_PASS
  #undef SPMI_K
#endif

#if SPMI_HAS_X86
  #define SPMI_KERNEL(ctx, name, arguments)                                            \
      do {                                                                             \
          if ((ctx)->isa == SPM_ISA_AVX512) SPMI_JOIN(spmi_##name, _avx512) arguments; \
          else if ((ctx)->isa == SPM_ISA_AVX2) SPMI_JOIN(spmi_##name, _avx2) arguments; \
          else SPMI_JOIN(spmi_##name, _c) arguments;                                   \
      } while (0)
#elif SPMI_HAS_NEON
  #define SPMI_KERNEL(ctx, name, arguments)                                            \
      do {                                                                             \
          if ((ctx)->isa == SPM_ISA_NEON) SPMI_JOIN(spmi_##name, _neon) arguments;     \
          else SPMI_JOIN(spmi_##name, _c) arguments;                                   \
      } while (0)
#else
  #define SPMI_KERNEL(ctx, name, arguments) SPMI_JOIN(spmi_##name, _c) arguments
#endif

#endif /* implementation, sections 01 to 05 */
#endif /* !SPMI_PASS */

#ifdef SPMI_PASS /* ---- the kernel region: read once per instruction set ---- */
/* ---- vector primitives: v_t holds V_W floats; `n` in v_loadn/v_storen is 1..V_W, the rest reads as 0 and is not
 * written.  v_fma(a, b, c) = a * b + c, one rounding where the set has it. v_select_gt(a, b, x, y) = a > b ? x : y.
 * v_sum adds by a fixed tree. ---- */
#if SPMI_PASS == 3
  #define V_W 16
  #define v_t __m512
  #define v_load(p) _mm512_loadu_ps(p)
  #define v_store(p, v) _mm512_storeu_ps(p, v)
  #define v_mask(n) ((__mmask16)((1u << (n)) - 1u))
  #define v_loadn(p, n) _mm512_maskz_loadu_ps(v_mask(n), p)
  #define v_storen(p, v, n) _mm512_mask_storeu_ps(p, v_mask(n), v)
  #define v_set(x) _mm512_set1_ps(x)
  #define v_zero() _mm512_setzero_ps()
  #define v_add(a, b) _mm512_add_ps(a, b)
  #define v_sub(a, b) _mm512_sub_ps(a, b)
  #define v_mul(a, b) _mm512_mul_ps(a, b)
  #define v_div(a, b) _mm512_div_ps(a, b)
  #define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
  #define v_max(a, b) _mm512_max_ps(a, b)
  #define v_min(a, b) _mm512_min_ps(a, b)
  #define v_sqrt(a) _mm512_sqrt_ps(a)
  #define v_abs(a) _mm512_abs_ps(a)
  #define v_round(a) _mm512_cvtepi32_ps(_mm512_cvtps_epi32(a)) /* |a| < 2^31 */
  #define v_select_gt(a, b, x, y) _mm512_mask_blend_ps(_mm512_cmplt_ps_mask(b, a), y, x)
  /* 2^k for integral k in [-126, 127] held as floats */
  #define v_exp2i(k) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(k), _mm512_set1_epi32(127)), 23))
#elif SPMI_PASS == 2
  #define V_W 8
  #define v_t __m256
  #define v_load(p) _mm256_loadu_ps(p)
  #define v_store(p, v) _mm256_storeu_ps(p, v)
  #define v_mask(n) _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
  #define v_loadn(p, n) _mm256_maskload_ps(p, v_mask(n))
  #define v_storen(p, v, n) _mm256_maskstore_ps(p, v_mask(n), v)
  #define v_set(x) _mm256_set1_ps(x)
  #define v_zero() _mm256_setzero_ps()
  #define v_add(a, b) _mm256_add_ps(a, b)
  #define v_sub(a, b) _mm256_sub_ps(a, b)
  #define v_mul(a, b) _mm256_mul_ps(a, b)
  #define v_div(a, b) _mm256_div_ps(a, b)
  #define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
  #define v_max(a, b) _mm256_max_ps(a, b)
  #define v_min(a, b) _mm256_min_ps(a, b)
  #define v_sqrt(a) _mm256_sqrt_ps(a)
  #define v_abs(a) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a)
  #define v_round(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
  #define v_select_gt(a, b, x, y) _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ))
  #define v_exp2i(k) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23))
#elif SPMI_PASS == 4
  #define V_W 4
  #define v_t float32x4_t
  #define v_load(p) vld1q_f32(p)
  #define v_store(p, v) vst1q_f32(p, v)
  #define v_loadn(p, n) spmi_neon_loadn(p, n)
  #define v_storen(p, v, n) spmi_neon_storen(p, v, n)
  #define v_set(x) vdupq_n_f32(x)
  #define v_zero() vdupq_n_f32(0.0f)
  #define v_add(a, b) vaddq_f32(a, b)
  #define v_sub(a, b) vsubq_f32(a, b)
  #define v_mul(a, b) vmulq_f32(a, b)
  #define v_div(a, b) vdivq_f32(a, b)
  #define v_fma(a, b, c) vfmaq_f32(c, a, b)
  #define v_max(a, b) vmaxq_f32(a, b)
  #define v_min(a, b) vminq_f32(a, b)
  #define v_sqrt(a) vsqrtq_f32(a)
  #define v_abs(a) vabsq_f32(a)
  #define v_round(a) vrndnq_f32(a)
  #define v_select_gt(a, b, x, y) vbslq_f32(vcgtq_f32(a, b), x, y)
  #define v_exp2i(k) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(k), vdupq_n_s32(127)), 23))
static float32x4_t spmi_neon_loadn(const float *p, int n)
{
    float lane[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    int i;
    for (i = 0; i < n && i < 4; i++) lane[i] = p[i];
    return vld1q_f32(lane);
}
static void spmi_neon_storen(float *p, float32x4_t v, int n)
{
    float lane[4];
    int i;
    vst1q_f32(lane, v);
    for (i = 0; i < n && i < 4; i++) p[i] = lane[i];
}
#else
  #define V_W 1
  #define v_t float
  #define v_load(p) (*(p))
  #define v_store(p, v) (*(p) = (v))
  #define v_loadn(p, n) ((void)(n), *(p))
  #define v_storen(p, v, n) ((void)(n), *(p) = (v))
  #define v_set(x) (x)
  #define v_zero() 0.0f
  #define v_add(a, b) ((a) + (b))
  #define v_sub(a, b) ((a) - (b))
  #define v_mul(a, b) ((a) * (b))
  #define v_div(a, b) ((a) / (b))
  #define v_fma(a, b, c) ((a) * (b) + (c))
  #define v_max(a, b) ((a) > (b) ? (a) : (b))
  #define v_min(a, b) ((a) < (b) ? (a) : (b))
  #define v_sqrt(a) sqrtf(a)
  #define v_abs(a) fabsf(a)
  #define v_round(a) rintf(a)
  #define v_select_gt(a, b, x, y) ((a) > (b) ? (x) : (y))
  #define v_exp2i(k) spmi_exp2i(k)
static float spmi_exp2i(float k)
{
    uint32_t bits = (uint32_t)((int)k + 127) << 23;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
#endif

static float SPMI_K(sum)(v_t v)
{
    float lane[V_W];
    int i, half;
    v_store(lane, v);
    for (half = V_W / 2; half > 0; half /= 2) {
        for (i = 0; i < half; i++) lane[i] += lane[i + half];
    }
    return lane[0];
}
#define v_sum(v) SPMI_K(sum)(v)

/* ---- matrix kernels ----
 * Every product of the library, dense or convolutional, forward or backward, ends in one of two loops:
 *
 *   rows    C[i][:] (+)= sum over taps t, k of  a[a_at[i] + tap_at[t] + k] * b[t][k][:]     (forward, backward data)
 *   outer   C[o][:] (+)= sum over rows t, p of  a[t][p][o] * b[b_at[t] + p * b_row + :]     (weight gradients)
 *
 * Both keep a tile of C in registers over the whole sum, load the vector side as it lies and broadcast the other side. In
 * `rows` the vector side is packed (panels of `width` columns), and the rows of the other are gathered by offset, so that
 * a tile may run over the end of an image row or of an image: small pictures fill tiles as well as large ones. */
#if SPMI_PASS == 1
typedef struct spmi_rows {
    const float *a;
    const int64_t *a_at;   /* [rows + SPMI_ROWS_PAD], the tail repeats any valid offset */
    const int64_t *tap_at; /* [taps] */
    int64_t taps, k;       /* k: length of one tap's contiguous run in a */
    const float *b;        /* [taps * k][width] */
    float *c;
    const int64_t *c_at;   /* [rows] */
    int64_t rows;
    int width, columns;    /* of the panel; columns <= width are stored */
    int accumulate;
    float alpha;
    const float *bias;     /* [columns] or NULL */
} spmi_rows;
#define SPMI_ROWS_PAD 12

typedef struct spmi_outer {
    const float *a;        /* panels [rows / R][blocks * k][R], zero-padded; R = spmi_outer_rows() */
    int64_t rows;          /* of C */
    int64_t blocks, k;     /* image rows, and pixels in each */
    const float *b;
    const int64_t *b_at;   /* [blocks] */
    int64_t b_row;         /* from one pixel to the next */
    float *c;
    int64_t c_row, columns;
    int accumulate;
} spmi_outer;

#if defined(__GNUC__) || defined(__clang__)
  #define SPMI_INLINE static inline __attribute__((always_inline))
#else
  #define SPMI_INLINE static
#endif
#if defined(__clang__)
  #define SPMI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__) && !defined(__TINYC__)
  #define SPMI_UNROLL _Pragma("GCC unroll 32")
#else
  #define SPMI_UNROLL
#endif
#endif /* first pass */

/* Tiles: vectors across (nv) and rows down (mr), so that accumulators + one row of b + one broadcast fit the registers. */
#if SPMI_PASS == 3 || SPMI_PASS == 4
  #define T_NV 4
  #define T_MR 12
#elif SPMI_PASS == 2
  #define T_NV 2
  #define T_MR 12
#else
  #define T_NV 8
  #define T_MR 4
#endif

/* One tile. mr and nv are constants where this is called, so all arrays become registers. `used` <= mr rows are stored. */
SPMI_INLINE void SPMI_K(rows_tile)(const spmi_rows *g, int64_t at, int64_t used, int mr, int nv)
{
    v_t acc[T_MR][T_NV];
    const float *b = g->b;
    const int64_t *a_at = g->a_at + at, *c_at = g->c_at + at;
    int64_t t, k;
    int i, j;
    SPMI_UNROLL for (i = 0; i < mr; i++) {
        SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_zero();
    }
    for (t = 0; t < g->taps; t++) {
        const float *x = g->a + g->tap_at[t], *row[T_MR];
        SPMI_UNROLL for (i = 0; i < mr; i++) row[i] = x + a_at[i];
        for (k = 0; k < g->k; k++) {
            v_t bv[T_NV];
            SPMI_UNROLL for (j = 0; j < nv; j++) bv[j] = v_load(b + j * V_W);
            SPMI_UNROLL for (i = 0; i < mr; i++) {
                v_t av = v_set(row[i][k]);
                SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_fma(av, bv[j], acc[i][j]);
            }
            b += nv * V_W;
        }
    }
    if (g->alpha != 1.0f) {
        v_t alpha = v_set(g->alpha);
        SPMI_UNROLL for (i = 0; i < mr; i++) {
            SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_mul(acc[i][j], alpha);
        }
    }
    if (g->columns == nv * V_W) {
        if (g->bias) {
            SPMI_UNROLL for (j = 0; j < nv; j++) {
                v_t bias = v_load(g->bias + j * V_W);
                SPMI_UNROLL for (i = 0; i < mr; i++) acc[i][j] = v_add(acc[i][j], bias);
            }
        }
        SPMI_UNROLL for (i = 0; i < mr; i++) {
            if (i < used) {
                float *c = g->c + c_at[i];
                if (g->accumulate) {
                    SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_add(v_load(c + j * V_W), acc[i][j]);
                }
                SPMI_UNROLL for (j = 0; j < nv; j++) v_store(c + j * V_W, acc[i][j]);
            }
        }
    } else {
        float tile[T_MR * T_NV * V_W];
        SPMI_UNROLL for (i = 0; i < mr; i++) {
            SPMI_UNROLL for (j = 0; j < nv; j++) v_store(tile + (i * nv + j) * V_W, acc[i][j]);
        }
        for (i = 0; i < mr && i < used; i++) {
            float *c = g->c + c_at[i];
            for (j = 0; j < g->columns; j++) {
                float sum = tile[i * nv * V_W + j];
                if (g->bias) sum += g->bias[j];
                c[j] = g->accumulate ? c[j] + sum : sum;
            }
        }
    }
}

#if SPMI_PASS == 3 || SPMI_PASS == 4
static void SPMI_K(rows_4)(const spmi_rows *g)
{
    int64_t at, left;
    for (at = 0; (left = g->rows - at) > 0; at += 6) {
        if (left > 3) SPMI_K(rows_tile)(g, at, left, 6, 4);
        else SPMI_K(rows_tile)(g, at, left, 3, 4);
    }
}
#endif

#if SPMI_PASS != 1
static void SPMI_K(rows_2)(const spmi_rows *g)
{
    const int full = SPMI_PASS == 2 ? 6 : 12;
    int64_t at, left;
    for (at = 0; (left = g->rows - at) > 0; at += full) {
        if (left > full / 2) SPMI_K(rows_tile)(g, at, left, SPMI_PASS == 2 ? 6 : 12, 2);
        else SPMI_K(rows_tile)(g, at, left, SPMI_PASS == 2 ? 3 : 6, 2);
    }
}

static void SPMI_K(rows_1)(const spmi_rows *g)
{
    int64_t at, left;
    for (at = 0; (left = g->rows - at) > 0; at += 12) {
        if (left > 6) SPMI_K(rows_tile)(g, at, left, 12, 1);
        else SPMI_K(rows_tile)(g, at, left, 6, 1);
    }
}

static void SPMI_K(rows)(const spmi_rows *g)
{
    switch (g->width / V_W) {
#if SPMI_PASS != 2
    case 4: SPMI_K(rows_4)(g); break;
#endif
    case 2: SPMI_K(rows_2)(g); break;
    default: SPMI_K(rows_1)(g); break;
    }
}
#else
static void SPMI_K(rows)(const spmi_rows *g)
{
    int64_t at;
    for (at = 0; at < g->rows; at += 4) {
        if (g->width == 8) SPMI_K(rows_tile)(g, at, g->rows - at, 4, 8);
        else SPMI_K(rows_tile)(g, at, g->rows - at, 4, 4);
    }
}
#endif
#undef T_NV
#undef T_MR

/* to[c * to_row + r] = from[r * from_row + c]: packs weights [O][K] into panels [K][O], and transposed operands. */
static void SPMI_K(transpose)(int64_t rows, int64_t columns, const float *from, int64_t from_row, float *to, int64_t to_row)
{
    int64_t r = 0, c;
#if SPMI_PASS == 2 || SPMI_PASS == 3
    for (; r + 4 <= rows; r += 4) {
        const float *at = from + r * from_row;
        for (c = 0; c + 4 <= columns; c += 4) {
            __m128 v0 = _mm_loadu_ps(at + c), v1 = _mm_loadu_ps(at + from_row + c);
            __m128 v2 = _mm_loadu_ps(at + 2 * from_row + c), v3 = _mm_loadu_ps(at + 3 * from_row + c);
            _MM_TRANSPOSE4_PS(v0, v1, v2, v3);
            _mm_storeu_ps(to + c * to_row + r, v0);
            _mm_storeu_ps(to + (c + 1) * to_row + r, v1);
            _mm_storeu_ps(to + (c + 2) * to_row + r, v2);
            _mm_storeu_ps(to + (c + 3) * to_row + r, v3);
        }
        for (; c < columns; c++) {
            float *t = to + c * to_row + r;
            t[0] = at[c];
            t[1] = at[from_row + c];
            t[2] = at[2 * from_row + c];
            t[3] = at[3 * from_row + c];
        }
    }
#elif SPMI_PASS == 4
    for (; r + 4 <= rows; r += 4) {
        const float *at = from + r * from_row;
        for (c = 0; c + 4 <= columns; c += 4) {
            float32x4x2_t low = vtrnq_f32(vld1q_f32(at + c), vld1q_f32(at + from_row + c));
            float32x4x2_t high = vtrnq_f32(vld1q_f32(at + 2 * from_row + c), vld1q_f32(at + 3 * from_row + c));
            float *t = to + c * to_row + r;
            vst1q_f32(t, vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0])));
            vst1q_f32(t + to_row, vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1])));
            vst1q_f32(t + 2 * to_row, vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0])));
            vst1q_f32(t + 3 * to_row, vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1])));
        }
        for (; c < columns; c++) {
            float *t = to + c * to_row + r;
            t[0] = at[c];
            t[1] = at[from_row + c];
            t[2] = at[2 * from_row + c];
            t[3] = at[3 * from_row + c];
        }
    }
#endif
    for (; r < rows; r++) {
        for (c = 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
    }
}

/* ---- outer products ---- */
#if SPMI_PASS == 2
  #define T_OR 4
#elif SPMI_PASS == 1
  #define T_OR 4
#else
  #define T_OR 8
#endif

/* T_OR rows of C by nv vectors. `last` is the number of valid lanes of the last vector; full says that it is V_W. */
SPMI_INLINE void SPMI_K(outer_tile)(const spmi_outer *g, const float *a, float *c, int rows, int last, int nv, int full)
{
    v_t acc[T_OR][4];
    int64_t t, p;
    int i, j;
    SPMI_UNROLL for (i = 0; i < T_OR; i++) {
        SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_zero();
    }
    for (t = 0; t < g->blocks; t++) {
        const float *b = g->b + g->b_at[t];
        for (p = 0; p < g->k; p++) {
            v_t bv[4];
            SPMI_UNROLL for (j = 0; j < nv - 1; j++) bv[j] = v_load(b + j * V_W);
            bv[nv - 1] = full ? v_load(b + (nv - 1) * V_W) : v_loadn(b + (nv - 1) * V_W, last);
            SPMI_UNROLL for (i = 0; i < T_OR; i++) {
                v_t av = v_set(a[i]);
                SPMI_UNROLL for (j = 0; j < nv; j++) acc[i][j] = v_fma(av, bv[j], acc[i][j]);
            }
            a += T_OR;
            b += g->b_row;
        }
    }
    SPMI_UNROLL for (i = 0; i < T_OR; i++) {
        if (i < rows) {
            float *to = c + i * g->c_row;
            if (g->accumulate) {
                SPMI_UNROLL for (j = 0; j < nv - 1; j++) acc[i][j] = v_add(v_load(to + j * V_W), acc[i][j]);
                acc[i][nv - 1] = v_add(full ? v_load(to + (nv - 1) * V_W) : v_loadn(to + (nv - 1) * V_W, last), acc[i][nv - 1]);
            }
            SPMI_UNROLL for (j = 0; j < nv - 1; j++) v_store(to + j * V_W, acc[i][j]);
            if (full) v_store(to + (nv - 1) * V_W, acc[i][nv - 1]);
            else v_storen(to + (nv - 1) * V_W, acc[i][nv - 1], last);
        }
    }
}

/* All rows of C, at most three vectors of columns. */
static void SPMI_K(outer)(const spmi_outer *g)
{
    const int64_t panel = g->blocks * g->k * T_OR;
    const int nv = (int)((g->columns + V_W - 1) / V_W), last = (int)g->columns - (nv - 1) * V_W;
    const float *a = g->a;
    float *c = g->c;
    int64_t i;
    for (i = 0; i < g->rows; i += T_OR, a += panel, c += T_OR * g->c_row) {
        int rows = (int)SPMI_MIN(g->rows - i, T_OR);
        if (last == V_W) {
            if (nv == 3) SPMI_K(outer_tile)(g, a, c, rows, V_W, 3, 1);
            else if (nv == 2) SPMI_K(outer_tile)(g, a, c, rows, V_W, 2, 1);
            else SPMI_K(outer_tile)(g, a, c, rows, V_W, 1, 1);
        } else {
            if (nv == 3) SPMI_K(outer_tile)(g, a, c, rows, last, 3, 0);
            else if (nv == 2) SPMI_K(outer_tile)(g, a, c, rows, last, 2, 0);
            else SPMI_K(outer_tile)(g, a, c, rows, last, 1, 0);
        }
    }
}
#undef T_OR

/* to[t * k + p][:columns] = from[at[t] + p * from_row + :columns]: the pixels that `outer` reads, moved close together. */
static void SPMI_K(collect)(int64_t blocks, int64_t k, const float *from, const int64_t *at, int64_t from_row, int64_t columns,
                            float *to, int64_t to_row)
{
    const int64_t vectors = columns / V_W;
    const int rest = (int)(columns - vectors * V_W);
    int64_t t, p, j;
    for (t = 0; t < blocks; t++) {
        const float *x = from + at[t];
        for (p = 0; p < k; p++, x += from_row, to += to_row) {
            for (j = 0; j < vectors; j++) v_store(to + j * V_W, v_load(x + j * V_W));
            if (rest) v_storen(to + j * V_W, v_loadn(x + j * V_W, rest), rest);
        }
    }
}

/* sums[j] += sum over rows of from[r * from_row + j] */
static void SPMI_K(column_sums)(int64_t rows, int64_t columns, const float *from, int64_t from_row, float *sums)
{
    int64_t j, r;
    for (j = 0; j < columns; j += V_W) {
        int n = (int)SPMI_MIN(columns - j, V_W);
        v_t s0 = v_zero(), s1 = v_zero();
        const float *at = from + j;
        if (n == V_W) {
            for (r = 0; r + 2 <= rows; r += 2, at += 2 * from_row) {
                s0 = v_add(s0, v_load(at));
                s1 = v_add(s1, v_load(at + from_row));
            }
            if (r < rows) s0 = v_add(s0, v_load(at));
        } else {
            for (r = 0; r < rows; r++, at += from_row) s0 = v_add(s0, v_loadn(at, n));
        }
        v_storen(sums + j, v_add(v_loadn(sums + j, n), v_add(s0, s1)), n);
    }
}

/* ---- elementwise, row and channel kernels ------------------------------------------------------------------------
 * Loops step through `n` floats by V_STEP: `r` is V_W, or what is left at the end.  v_get and v_put read and write r
 * lanes; the branch inside them is always predicted and costs nothing beside the memory traffic. */
#if V_W == 1
  #define v_get(p, r) ((void)(r), *(p))
  #define v_put(p, v, r) ((void)(r), *(p) = (v))
#else
  #define v_get(p, r) ((r) == V_W ? v_load(p) : v_loadn(p, r))
  #define v_put(p, v, r) do { if ((r) == V_W) v_store(p, v); else v_storen(p, v, r); } while (0)
#endif
#define V_STEP(i, r, n) for (i = 0; r = (int)SPMI_MIN((int64_t)V_W, (n) - i), i < (n); i += V_W)
/* v_select_eq(a, b, x, y) = a == b ? x : y; v_select_nan(a, x, y) = a is not a number ? x : y;
 * v_load_bytes, v_store_bytes: V_W unsigned bytes to and from floats. */
#if SPMI_PASS == 3
  #define v_select_eq(a, b, x, y) _mm512_mask_blend_ps(_mm512_cmpeq_ps_mask(a, b), y, x)
  #define v_select_nan(a, x, y) _mm512_mask_blend_ps(_mm512_cmpunord_ps_mask(a, a), y, x)
  #define v_load_bytes(p) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))))
  #define v_store_bytes(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
#elif SPMI_PASS == 2
  #define v_select_eq(a, b, x, y) _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ))
  #define v_select_nan(a, x, y) _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, a, _CMP_UNORD_Q))
  #define v_load_bytes(p) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
  #define v_store_bytes(p, v) SPMI_K(store_bytes)(p, v)
static void SPMI_K(store_bytes)(unsigned char *p, v_t v)
{
    const __m256i wide = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(words, words));
}
#elif SPMI_PASS == 4
  #define v_select_eq(a, b, x, y) vbslq_f32(vceqq_f32(a, b), x, y)
  #define v_select_nan(a, x, y) vbslq_f32(vceqq_f32(a, a), y, x)
  #define v_load_bytes(p) SPMI_K(load_bytes)(p)
  #define v_store_bytes(p, v) SPMI_K(store_bytes)(p, v)
static v_t SPMI_K(load_bytes)(const unsigned char *p)
{
    float lane[4];
    int i;
    for (i = 0; i < 4; i++) lane[i] = (float)p[i];
    return vld1q_f32(lane);
}
static void SPMI_K(store_bytes)(unsigned char *p, v_t v)
{
    float lane[4];
    int i;
    vst1q_f32(lane, v);
    for (i = 0; i < 4; i++) p[i] = (unsigned char)lane[i];
}
#else
  #define v_select_eq(a, b, x, y) ((a) == (b) ? (x) : (y))
  #define v_select_nan(a, x, y) ((a) == (a) ? (y) : (x))
  #define v_load_bytes(p) ((float)*(p))
  #define v_store_bytes(p, v) (*(p) = (unsigned char)(v))
#endif

/* exp(high + low) for a sum in [-87.3, 88]; below that 0. `low` carries what `high` had no bits for; exact digits of
 * a product, or 0.  ln 2 is split so that k * (its upper part) is exact without FMA too; 1 ulp. */
static v_t SPMI_K(exp2p)(v_t high, v_t low)
{
    const v_t x = v_add(high, low), bottom = v_set(-87.3f);
    const v_t k = v_round(v_mul(v_max(v_min(x, v_set(88.0f)), bottom), v_set(1.44269504f)));
    v_t r = v_fma(k, v_set(-0.693359375f), high), p;
    r = v_add(v_fma(k, v_set(2.12194440e-4f), r), low);
    p = v_fma(r, v_set(1.38144648e-3f), v_set(8.36878062e-3f));
    p = v_fma(p, r, v_set(4.16683943e-2f));
    p = v_fma(p, r, v_set(1.66665201e-1f));
    p = v_fma(p, r, v_set(4.99999934e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    p = v_mul(p, v_exp2i(k));
    return v_select_gt(bottom, x, v_zero(), p);
}

/* With a = |x|: e = exp(-x^2/2), and the return value h = Phi(-a), the normal distribution's lower tail.
 * h = e * q(a), where (a + 3) q(a) is a polynomial of degree 10 in (a - 3) / (a + 3) (our minimax fit on [0, 14], 1e-9).
 * x^2 is formed in two parts, because an error of half an ulp in 80 is too much inside exp. */
static v_t SPMI_K(tail)(v_t x, v_t *e)
{
    const v_t a = v_min(v_abs(x), v_set(14.0f));
    const v_t coarse = v_mul(v_round(v_mul(a, v_set(16.0f))), v_set(0.0625f));
    const v_t square = v_mul(v_mul(coarse, coarse), v_set(-0.5f));
    const v_t rest = v_mul(v_mul(v_sub(a, coarse), v_add(a, coarse)), v_set(-0.5f));
    const v_t inverse = v_div(v_set(1.0f), v_add(a, v_set(3.0f)));
    const v_t t = v_mul(v_sub(a, v_set(3.0f)), inverse);
    v_t p = v_fma(t, v_set(5.4398431e-5f), v_set(1.31126113e-4f));
    p = v_fma(p, t, v_set(-2.447971e-4f));
    p = v_fma(p, t, v_set(-1.0324427e-3f));
    p = v_fma(p, t, v_set(1.02483435e-3f));
    p = v_fma(p, t, v_set(6.96928776e-3f));
    p = v_fma(p, t, v_set(-1.04625327e-2f));
    p = v_fma(p, t, v_set(-4.7262687e-2f));
    p = v_fma(p, t, v_set(2.30017701e-1f));
    p = v_fma(p, t, v_set(-5.09331991e-1f));
    p = v_fma(p, t, v_set(7.2908369e-1f));
    *e = SPMI_K(exp2p)(square, rest);
    return v_mul(v_mul(p, inverse), *e);
}

/* y = max(x, 0); not-a-number stays (hence the order of the arguments of v_max). */
static void SPMI_K(relu)(int64_t n, const float *x, float *y)
{
    int64_t i;
    int r;
    V_STEP(i, r, n) v_put(y + i, v_max(v_zero(), v_get(x + i, r)), r);
}

/* dx = dy where y > 0, else 0 */
static void SPMI_K(relu_back)(int64_t n, const float *y, const float *dy, float *dx, int add)
{
    int64_t i;
    int r;
    V_STEP(i, r, n) {
        v_t g = v_select_gt(v_get(y + i, r), v_zero(), v_get(dy + i, r), v_zero());
        if (add) g = v_add(g, v_get(dx + i, r));
        v_put(dx + i, g, r);
    }
}

/* y = x Phi(x) */
static void SPMI_K(gelu)(int64_t n, const float *x, float *y)
{
    int64_t i;
    int r;
    V_STEP(i, r, n) {
        const v_t v = v_get(x + i, r);
        v_t e;
        const v_t h = SPMI_K(tail)(v, &e);
        v_put(y + i, v_mul(v, v_select_gt(v, v_zero(), v_sub(v_set(1.0f), h), h)), r);
    }
}

/* dx = dy (Phi(x) + x exp(-x^2/2) / sqrt(2 pi)) */
static void SPMI_K(gelu_back)(int64_t n, const float *x, const float *dy, float *dx, int add)
{
    int64_t i;
    int r;
    V_STEP(i, r, n) {
        const v_t v = v_get(x + i, r);
        v_t e, g;
        const v_t h = SPMI_K(tail)(v, &e);
        g = v_select_gt(v, v_zero(), v_sub(v_set(1.0f), h), h);
        g = v_mul(v_fma(v_mul(v, v_set(0.398942280f)), e, g), v_get(dy + i, r));
        if (add) g = v_add(g, v_get(dx + i, r));
        v_put(dx + i, g, r);
    }
}

/* y = s x, or y += s x */
static void SPMI_K(scale)(int64_t n, float s, const float *x, float *y, int add)
{
    const v_t f = v_set(s);
    int64_t i;
    int r;
    if (add) {
        V_STEP(i, r, n) v_put(y + i, v_fma(v_get(x + i, r), f, v_get(y + i, r)), r);
    } else {
        V_STEP(i, r, n) v_put(y + i, v_mul(v_get(x + i, r), f), r);
    }
}

/* y = s (a + b) */
static void SPMI_K(sum_of)(int64_t n, float s, const float *a, const float *b, float *y)
{
    const v_t f = v_set(s);
    int64_t i;
    int r;
    V_STEP(i, r, n) v_put(y + i, v_mul(v_add(v_get(a + i, r), v_get(b + i, r)), f), r);
}

/* ---- sums along a row: short float chains (16 vectors), added in double ---- */

#define SPMI_RUN (16 * V_W)

static double SPMI_K(row_sum)(int64_t n, const float *x)
{
    double total = 0.0;
    int64_t at, i;
    int r;
    for (at = 0; at < n; at += SPMI_RUN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_RUN, n - at);
        v_t s = v_zero();
        V_STEP(i, r, m) s = v_add(s, v_get(x + at + i, r));
        total += (double)v_sum(s);
    }
    return total;
}

/* sum of (x - shift)^2 */
static double SPMI_K(row_squares)(int64_t n, const float *x, float shift)
{
    double total = 0.0;
    int64_t at, i;
    int r;
    for (at = 0; at < n; at += SPMI_RUN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_RUN, n - at), full = m - m % V_W;
        const v_t c = v_set(shift);
        v_t s = v_zero();
        V_STEP(i, r, full) {
            const v_t d = v_sub(v_get(x + at + i, r), c);
            s = v_fma(d, d, s);
        }
        total += (double)v_sum(s);
        for (i = full; i < m; i++) { /* lanes beyond the row would read 0 - shift */
            const double d = (double)x[at + i] - (double)shift;
            total += d * d;
        }
    }
    return total;
}

static double SPMI_K(row_dot)(int64_t n, const float *a, const float *b)
{
    double total = 0.0;
    int64_t at, i;
    int r;
    for (at = 0; at < n; at += SPMI_RUN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_RUN, n - at);
        v_t s = v_zero();
        V_STEP(i, r, m) s = v_fma(v_get(a + at + i, r), v_get(b + at + i, r), s);
        total += (double)v_sum(s);
    }
    return total;
}

/* out[j] = s a . (row j of b) for `rows` rows of n floats */
static void SPMI_K(dots)(int64_t rows, int64_t n, float s, const float *a, const float *b, float *out)
{
    int64_t j;
    for (j = 0; j < rows; j++) out[j] = (float)((double)s * SPMI_K(row_dot)(n, a, b + j * n));
}

/* ---- softmax ---- */

/* y = softmax(s x) of each row; in place is fine.  Rows are shifted by their largest entry. */
static void SPMI_K(softmax)(int64_t rows, int64_t n, float s, const float *x, float *y)
{
    const v_t f = v_set(s);
    int64_t row, i;
    int r;
    for (row = 0; row < rows; row++, x += n, y += n) {
        const int64_t full = n - n % V_W;
        float top = x[0], inverse;
        double total = 0.0;
        v_t peak = v_set(x[0]), shift;
        V_STEP(i, r, full) peak = v_max(peak, v_get(x + i, r));
        {
            float lane[V_W];
            v_store(lane, peak);
            for (i = 0; i < V_W; i++) top = lane[i] > top ? lane[i] : top;
        }
        for (i = full; i < n; i++) top = x[i] > top ? x[i] : top;
        shift = v_set(-s * top);
        V_STEP(i, r, n) v_put(y + i, SPMI_K(exp2p)(v_fma(v_get(x + i, r), f, shift), v_zero()), r);
        total = SPMI_K(row_sum)(n, y);
        inverse = (float)(1.0 / total);
        SPMI_K(scale)(n, inverse, y, y, 0);
    }
}

/* dx = s y (dy - dy . y) of each row: gradient of softmax(s x) by x; dx may be dy */
static void SPMI_K(softmax_back)(int64_t rows, int64_t n, float s, const float *y, const float *dy, float *dx, int add)
{
    const v_t f = v_set(s);
    int64_t row, i;
    int r;
    for (row = 0; row < rows; row++, y += n, dy += n, dx += n) {
        const v_t dot = v_set((float)SPMI_K(row_dot)(n, y, dy));
        V_STEP(i, r, n) {
            v_t g = v_mul(v_mul(v_get(y + i, r), f), v_sub(v_get(dy + i, r), dot));
            if (add) g = v_add(g, v_get(dx + i, r));
            v_put(dx + i, g, r);
        }
    }
}

/* ---- layer norm ---- */

/* y = (x - mean) rstd w + b; mean and rstd of each row are kept if wanted.  Two passes over a row that is in L1. */
static void SPMI_K(layer_norm)(int64_t rows, int64_t n, const float *x, const float *w, const float *b, float eps,
                               float *y, float *mean, float *rstd)
{
    int64_t row, i;
    int r;
    for (row = 0; row < rows; row++, x += n, y += n) {
        const float m = (float)(SPMI_K(row_sum)(n, x) / (double)n);
        const float s = (float)(1.0 / sqrt(SPMI_K(row_squares)(n, x, m) / (double)n + (double)eps));
        const v_t center = v_set(m), factor = v_set(s);
        V_STEP(i, r, n) {
            const v_t h = v_mul(v_sub(v_get(x + i, r), center), factor);
            v_put(y + i, v_fma(h, v_get(w + i, r), v_get(b + i, r)), r);
        }
        if (mean) mean[row] = m;
        if (rstd) rstd[row] = s;
    }
}

/* h = (x - mean) rstd, g = dy w:  dx = rstd (g - mean(g) - h mean(g h)), dw += dy h, db += dy.  dx, dw, db may be NULL. */
static void SPMI_K(layer_norm_back)(int64_t rows, int64_t n, const float *x, const float *w, const float *mean, const float *rstd,
                                    const float *dy, float *dx, int add, float *dw, float *db)
{
    int64_t row, at, i;
    int r;
    for (row = 0; row < rows; row++, x += n, dy += n) {
        const v_t center = v_set(mean[row]), factor = v_set(rstd[row]);
        double sum = 0.0, dot = 0.0;
        v_t c0, c1;
        for (at = 0; at < n; at += SPMI_RUN) { /* lanes beyond the row have g = 0 */
            const int64_t m = SPMI_MIN((int64_t)SPMI_RUN, n - at);
            v_t s0 = v_zero(), s1 = v_zero();
            V_STEP(i, r, m) {
                const int64_t j = at + i;
                const v_t d = v_get(dy + j, r), h = v_mul(v_sub(v_get(x + j, r), center), factor);
                const v_t g = v_mul(d, v_get(w + j, r));
                s0 = v_add(s0, g);
                s1 = v_fma(g, h, s1);
                if (dw) v_put(dw + j, v_fma(d, h, v_get(dw + j, r)), r);
                if (db) v_put(db + j, v_add(d, v_get(db + j, r)), r);
            }
            sum += (double)v_sum(s0);
            dot += (double)v_sum(s1);
        }
        if (!dx) continue;
        c0 = v_set((float)(sum / (double)n));
        c1 = v_set((float)(dot / (double)n));
        V_STEP(i, r, n) {
            const v_t h = v_mul(v_sub(v_get(x + i, r), center), factor);
            v_t g = v_sub(v_mul(v_get(dy + i, r), v_get(w + i, r)), c0);
            g = v_mul(v_sub(g, v_mul(h, c1)), factor);
            if (add) g = v_add(g, v_get(dx + i, r));
            v_put(dx + i, g, r);
        }
        dx += n;
    }
}

/* ---- sums along columns: `width` channels of `rows` rows that lie `stride` floats apart ---- */

#define SPMI_CHAIN 64 /* rows summed in float; longer sums go on in double */

/* sum[c] = sum of x[.][c] */
static void SPMI_K(channel_sums)(int64_t rows, int64_t stride, int64_t width, const float *x, double *sum)
{
    int64_t c, p, at;
    int r, l;
    for (c = 0; c < width; c++) sum[c] = 0.0;
    for (at = 0; at < rows; at += SPMI_CHAIN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_CHAIN, rows - at);
        V_STEP(c, r, width) {
            const float *from = x + at * stride + c;
            v_t s = v_zero();
            float lane[V_W];
            for (p = 0; p < m; p++, from += stride) s = v_add(s, v_get(from, r));
            v_store(lane, s);
            for (l = 0; l < r; l++) sum[c + l] += (double)lane[l];
        }
    }
}

/* Moments of each column: base[c], s1[c] = sum of (x - base), s2[c] = sum of (x - base)^2, with base near the mean: the
 * mean of the first chain.  Each chain gets its own mean in a first pass and its squares around that in a second one (it
 * is in cache by then); chains are joined in double. */
static void SPMI_K(channel_moments)(int64_t rows, int64_t stride, int64_t width, const float *x, double *base, double *s1, double *s2)
{
    int64_t c, p, at;
    int r, l;
    for (at = 0; at < rows; at += SPMI_CHAIN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_CHAIN, rows - at), pairs = m - m % 2;
        const double count = (double)m;
        V_STEP(c, r, width) {
            const float *from = x + at * stride + c;
            v_t a = v_zero(), b = v_zero(), s, q0 = v_zero(), q1 = v_zero();
            float center[V_W], square[V_W], left[V_W];
            for (p = 0; p < pairs; p += 2) {
                a = v_add(a, v_get(from + p * stride, r));
                b = v_add(b, v_get(from + (p + 1) * stride, r));
            }
            if (p < m) a = v_add(a, v_get(from + p * stride, r));
            s = v_mul(v_add(a, b), v_set(1.0f / (float)m));
            a = b = v_zero();
            for (p = 0; p < pairs; p += 2) {
                const v_t d0 = v_sub(v_get(from + p * stride, r), s), d1 = v_sub(v_get(from + (p + 1) * stride, r), s);
                a = v_add(a, d0);
                b = v_add(b, d1);
                q0 = v_fma(d0, d0, q0);
                q1 = v_fma(d1, d1, q1);
            }
            if (p < m) {
                const v_t d0 = v_sub(v_get(from + p * stride, r), s);
                a = v_add(a, d0);
                q0 = v_fma(d0, d0, q0);
            }
            v_store(center, s);
            v_store(square, v_add(q0, q1));
            v_store(left, v_add(a, b)); /* by how much the float mean missed, times m */
            for (l = 0; l < r; l++) {
                double shift;
                if (at == 0) {
                    base[c + l] = (double)center[l];
                    s1[c + l] = s2[c + l] = 0.0;
                }
                shift = (double)center[l] - base[c + l];
                s1[c + l] += count * shift + (double)left[l];
                s2[c + l] += (double)square[l] + shift * (2.0 * (double)left[l] + count * shift);
            }
        }
    }
}

/* ---- batch norm: rows are pixels, `n` channels ---- */

/* y = relu?((x - mean) scale + shift + residual?) */
static void SPMI_K(bn_apply)(int64_t rows, int64_t n, const float *x, const float *residual, const float *mean,
                             const float *scale, const float *shift, int relu, float *y)
{
    int64_t row, i;
    int r;
    const v_t floor_at = v_set(relu ? 0.0f : -INFINITY);
    for (row = 0; row < rows; row++, x += n, y += n) {
        V_STEP(i, r, n) {
            v_t v = v_fma(v_sub(v_get(x + i, r), v_get(mean + i, r)), v_get(scale + i, r), v_get(shift + i, r));
            if (residual) v = v_add(v, v_get(residual + i, r));
            v_put(y + i, v_max(floor_at, v), r);
        }
        if (residual) residual += n;
    }
}

/* dz = dy, or dy where y > 0 (y given: a ReLU stands behind).  s0[c] = sum dz, s1[c] = sum dz (x - mean) over rows that
 * lie `stride` apart; dz is stored as well if `dz` is given. */
static void SPMI_K(bn_back_sums)(int64_t rows, int64_t stride, int64_t width, const float *x, const float *y, const float *dy,
                                 const float *mean, float *dz, double *s0, double *s1)
{
    int64_t c, p, at;
    int r, l;
    for (c = 0; c < width; c++) s0[c] = s1[c] = 0.0;
    for (at = 0; at < rows; at += SPMI_CHAIN) {
        const int64_t m = SPMI_MIN((int64_t)SPMI_CHAIN, rows - at);
        V_STEP(c, r, width) {
            const v_t center = v_get(mean + c, r);
            v_t a = v_zero(), b = v_zero();
            float lane0[V_W], lane1[V_W];
            for (p = 0; p < m; p++) {
                const int64_t j = (at + p) * stride + c;
                v_t g = v_get(dy + j, r);
                if (y) g = v_select_gt(v_get(y + j, r), v_zero(), g, v_zero());
                if (dz) v_put(dz + j, g, r);
                a = v_add(a, g);
                b = v_fma(g, v_sub(v_get(x + j, r), center), b);
            }
            v_store(lane0, a);
            v_store(lane1, b);
            for (l = 0; l < r; l++) {
                s0[c + l] += (double)lane0[l];
                s1[c + l] += (double)lane1[l];
            }
        }
    }
}

/* dx = a dz + b (x - mean) + c per channel (x NULL: b = c = 0); d_residual = dz.  dx, dr may be NULL. */
static void SPMI_K(bn_back)(int64_t rows, int64_t n, const float *x, const float *y, const float *dy, const float *mean,
                            const float *a, const float *b, const float *c, float *dx, int dx_add, float *dr, int dr_add)
{
    int64_t row, i, j;
    int r;
    for (row = 0; row < rows; row++) {
        V_STEP(i, r, n) {
            v_t g, d;
            j = row * n + i;
            g = v_get(dy + j, r);
            if (y) g = v_select_gt(v_get(y + j, r), v_zero(), g, v_zero());
            if (dr) v_put(dr + j, dr_add ? v_add(g, v_get(dr + j, r)) : g, r);
            if (!dx) continue;
            d = v_mul(g, v_get(a + i, r));
            if (x) d = v_add(d, v_fma(v_sub(v_get(x + j, r), v_get(mean + i, r)), v_get(b + i, r), v_get(c + i, r)));
            v_put(dx + j, dx_add ? v_add(d, v_get(dx + j, r)) : d, r);
        }
    }
}

/* ---- pooling: one picture's row of output pixels (forward) or input pixels (backward) ---- */

#if SPMI_PASS == 1
typedef struct spmi_pool_cut {
    int64_t kernel[2], stride[2], padding[2], in[2], out[2]; /* [height, width] */
    int64_t channels;
} spmi_pool_cut;
#endif

/* One row of max pooling: y[ow][c] and the window position of the first largest entry as a byte. `arg` may be NULL. */
static void SPMI_K(max_pool)(const spmi_pool_cut *cut, int64_t oh, const float *x, float *y, unsigned char *arg)
{
    const int64_t n = cut->channels, top = oh * cut->stride[0] - cut->padding[0];
    int64_t ow, c, kh, kw;
    int r, l;
    for (ow = 0; ow < cut->out[1]; ow++) {
        const int64_t left = ow * cut->stride[1] - cut->padding[1];
        V_STEP(c, r, n) {
            v_t best = v_set(-INFINITY), place = v_zero();
            int first = 1;
            for (kh = 0; kh < cut->kernel[0]; kh++) {
                if (top + kh < 0 || top + kh >= cut->in[0]) continue;
                for (kw = 0; kw < cut->kernel[1]; kw++) {
                    const int64_t w = left + kw;
                    v_t v, tap, kept;
                    if (w < 0 || w >= cut->in[1]) continue;
                    v = v_get(x + ((top + kh) * cut->in[1] + w) * n + c, r);
                    tap = v_set((float)(kh * cut->kernel[1] + kw));
                    if (first) {
                        best = v;
                        place = tap;
                        first = 0;
                        continue;
                    }
                    /* a larger one replaces, and so does the first not-a-number, for good */
                    kept = place;
                    place = v_select_gt(v, best, tap, v_select_nan(v, v_select_nan(best, kept, tap), kept));
                    best = v_select_nan(best, best, v_select_nan(v, v, v_max(v, best)));
                }
            }
            v_put(y + ow * n + c, best, r);
            if (!arg) continue;
            if (r == V_W) v_store_bytes(arg + c, place);
            else {
                float lane[V_W];
                v_store(lane, place);
                for (l = 0; l < r; l++) arg[c + l] = (unsigned char)lane[l];
            }
        }
        if (arg) arg += (n + 3) / 4 * 4;
    }
}

/* Gradient of one input row: gathers from every output window that covers it.  max (arg given): dy where the window chose this pixel;
 * average: factor * dy. */
static void SPMI_K(pool_back)(const spmi_pool_cut *cut, int64_t h, const float *dy, const unsigned char *arg, float factor,
                              float *dx, int add)
{
    const int64_t n = cut->channels, pitch = (n + 3) / 4 * 4;
    const v_t f = v_set(factor);
    int64_t i, c, oh, ow, kw;
    int r, l;
    if (!add) {
        V_STEP(i, r, cut->in[1] * n) v_put(dx + i, v_zero(), r);
    }
    for (oh = 0; oh < cut->out[0]; oh++) {
        const int64_t kh = h + cut->padding[0] - oh * cut->stride[0];
        if (kh < 0) break;
        if (kh >= cut->kernel[0]) continue;
        for (ow = 0; ow < cut->out[1]; ow++) {
            const float *g = dy + (oh * cut->out[1] + ow) * n;
            const unsigned char *a = arg ? arg + (oh * cut->out[1] + ow) * pitch : NULL;
            for (kw = 0; kw < cut->kernel[1]; kw++) {
                const int64_t w = ow * cut->stride[1] - cut->padding[1] + kw;
                const v_t tap = v_set((float)(kh * cut->kernel[1] + kw));
                float *to = dx + w * n;
                if (w < 0 || w >= cut->in[1]) continue;
                V_STEP(c, r, n) {
                    v_t v = v_get(g + c, r);
                    if (a && r == V_W) v = v_select_eq(v_load_bytes(a + c), tap, v, v_zero());
                    else if (a) {
                        float lane[V_W];
                        for (l = 0; l < V_W; l++) lane[l] = l < r ? (float)a[c + l] : -1.0f;
                        v = v_select_eq(v_load(lane), tap, v, v_zero());
                    } else v = v_mul(v, f);
                    v_put(to + c, v_add(v_get(to + c, r), v), r);
                }
            }
        }
    }
}

/* One row of average pooling; pads count as zeros. */
static void SPMI_K(avg_pool)(const spmi_pool_cut *cut, int64_t oh, const float *x, float factor, float *y)
{
    const int64_t n = cut->channels, top = oh * cut->stride[0] - cut->padding[0];
    int64_t ow, c, kh, kw;
    int r;
    for (ow = 0; ow < cut->out[1]; ow++) {
        const int64_t left = ow * cut->stride[1] - cut->padding[1];
        V_STEP(c, r, n) {
            v_t s = v_zero();
            for (kh = 0; kh < cut->kernel[0]; kh++) {
                if (top + kh < 0 || top + kh >= cut->in[0]) continue;
                for (kw = 0; kw < cut->kernel[1]; kw++) {
                    if (left + kw < 0 || left + kw >= cut->in[1]) continue;
                    s = v_add(s, v_get(x + ((top + kh) * cut->in[1] + left + kw) * n + c, r));
                }
            }
            v_put(y + ow * n + c, v_mul(s, v_set(factor)), r);
        }
    }
}

#undef SPMI_RUN
#undef SPMI_CHAIN
#undef V_STEP
#undef v_get
#undef v_put
#undef v_select_eq
#undef v_select_nan
#undef v_load_bytes
#undef v_store_bytes
/* ---- updates of parameters and gradients (TAPE and OPTIM): element-wise, any n ---- */

/* y = x * keep, or y += x * keep; keep NULL stands for ones. */
static void SPMI_K(tape_masked)(int64_t n, const float *x, const float *keep, float *y, int add)
{
    int64_t i;
    for (i = 0; i + V_W <= n; i += V_W) {
        v_t v = v_load(x + i);
        if (keep) v = v_mul(v, v_load(keep + i));
        if (add) v = v_add(v_load(y + i), v);
        v_store(y + i, v);
    }
    for (; i < n; i++) {
        float v = keep ? x[i] * keep[i] : x[i];
        y[i] = add ? y[i] + v : v;
    }
}

/* x *= factor */
static void SPMI_K(optim_scale)(int64_t n, float factor, float *x)
{
    int64_t i;
    for (i = 0; i + V_W <= n; i += V_W) v_store(x + i, v_mul(v_load(x + i), v_set(factor)));
    for (; i < n; i++) x[i] *= factor;
}

/* Adam and AdamW, in the order of PyTorch's operations.  k: decay added to the gradient (Adam), factor of the parameter
 * (AdamW: 1 - lr decay), beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, -lr / (1 - beta1^t).
 *   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps) */
static inline void SPMI_K(optim_adam_vector)(v_t *p, v_t g, v_t *m, v_t *v, const float *k)
{
    if (k[0] != 0.0f) g = v_fma(*p, v_set(k[0]), g);
    *p = v_mul(*p, v_set(k[1]));
    *m = v_fma(g, v_set(k[3]), v_mul(*m, v_set(k[2])));
    *v = v_add(v_mul(*v, v_set(k[4])), v_mul(v_mul(v_set(k[5]), g), g));
    *p = v_add(*p, v_div(v_mul(v_set(k[8]), *m), v_add(v_div(v_sqrt(*v), v_set(k[6])), v_set(k[7]))));
}

static void SPMI_K(optim_adam)(int64_t n, const float *k, const float *g, float *p, float *m, float *v)
{
    int64_t i;
    for (i = 0; i < n; i += V_W) {
        v_t a, b, c;
        if (n - i >= V_W) {
            a = v_load(p + i);
            b = v_load(m + i);
            c = v_load(v + i);
            SPMI_K(optim_adam_vector)(&a, v_load(g + i), &b, &c, k);
            v_store(p + i, a);
            v_store(m + i, b);
            v_store(v + i, c);
        } else {
            int left = (int)(n - i);
            a = v_loadn(p + i, left);
            b = v_loadn(m + i, left);
            c = v_loadn(v + i, left);
            SPMI_K(optim_adam_vector)(&a, v_loadn(g + i, left), &b, &c, k);
            v_storen(p + i, a, left);
            v_storen(m + i, b, left);
            v_storen(v + i, c, left);
        }
    }
}

/* SGD.  k: decay, momentum, -lr.   g += decay p;  m = momentum m + g;  g = nesterov ? g + momentum m : m;  p -= lr g.
 * m NULL: without momentum. */
static inline v_t SPMI_K(optim_sgd_vector)(v_t p, v_t g, v_t *m, const float *k, int nesterov)
{
    if (k[0] != 0.0f) g = v_fma(p, v_set(k[0]), g);
    if (m) {
        *m = v_add(v_mul(*m, v_set(k[1])), g);
        g = nesterov ? v_fma(*m, v_set(k[1]), g) : *m;
    }
    return v_fma(g, v_set(k[2]), p);
}

static void SPMI_K(optim_sgd)(int64_t n, const float *k, int nesterov, const float *g, float *p, float *m)
{
    int64_t i;
    for (i = 0; i < n; i += V_W) {
        v_t b = v_zero();
        if (n - i >= V_W) {
            if (m) b = v_load(m + i);
            v_store(p + i, SPMI_K(optim_sgd_vector)(v_load(p + i), v_load(g + i), m ? &b : NULL, k, nesterov));
            if (m) v_store(m + i, b);
        } else {
            int left = (int)(n - i);
            if (m) b = v_loadn(m + i, left);
            v_storen(p + i, SPMI_K(optim_sgd_vector)(v_loadn(p + i, left), v_loadn(g + i, left), m ? &b : NULL, k, nesterov), left);
            if (m) v_storen(m + i, b, left);
        }
    }
}
/* ---- the machine's own limit, for benches: twelve independent chains of fused multiply-adds in registers ---- */
static void SPMI_K(fma_chains)(int64_t rounds, float *sink)
{
    v_t a = v_set(sink[0]), m = v_set(0.999999f), s = v_set(1e-7f);
    v_t c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a, c10 = a, c11 = a;
    int64_t i;
    for (i = 0; i < rounds; i++) {
        c0 = v_fma(c0, m, s);
        c1 = v_fma(c1, m, s);
        c2 = v_fma(c2, m, s);
        c3 = v_fma(c3, m, s);
        c4 = v_fma(c4, m, s);
        c5 = v_fma(c5, m, s);
        c6 = v_fma(c6, m, s);
        c7 = v_fma(c7, m, s);
        c8 = v_fma(c8, m, s);
        c9 = v_fma(c9, m, s);
        c10 = v_fma(c10, m, s);
        c11 = v_fma(c11, m, s);
    }
    a = v_add(v_add(v_add(c0, c1), v_add(c2, c3)), v_add(v_add(c4, c5), v_add(c6, c7)));
    a = v_add(a, v_add(v_add(c8, c9), v_add(c10, c11)));
    sink[0] = v_sum(a);
    sink[1] = (float)(12 * 2 * V_W); /* operations a round */
}

#undef V_W
#undef v_t
#undef v_load
#undef v_store
#undef v_mask
#undef v_loadn
#undef v_storen
#undef v_set
#undef v_zero
#undef v_add
#undef v_sub
#undef v_mul
#undef v_div
#undef v_fma
#undef v_max
#undef v_min
#undef v_sqrt
#undef v_abs
#undef v_round
#undef v_select_gt
#undef v_exp2i
#undef v_sum
#endif /* SPMI_PASS: the end of the kernel region */

#if !defined(SPMI_PASS) && (defined(SPURMEM_IMPLEMENTATION) || defined(SPURMEM_STATIC)) && !defined(SPURMEM_IMPLEMENTED)
#define SPURMEM_IMPLEMENTED

/* ================================================================================================================
 * >>GEMM  06  packing, blocking, matrix products, convolution by taps
 * ----------------------------------------------------------------------------------------------------------------
 * B (the side that is vectorised) is packed into panels [K][width]; the panels of one matrix lie one behind the other,
 * so the panel that starts at column j starts at float j * K.  Sums over K are cut into blocks by K and the instruction
 * set alone, never by the other sizes or the threads: an element's bits do not depend on what is computed beside it.
 * ============================================================================================================= */

/* Lanes of a vector (the narrowest panel) and the width of a full panel. */
static int spmi_lanes(const spm_context *ctx)
{
    return ctx->isa == SPM_ISA_AVX512 ? 16 : ctx->isa == SPM_ISA_AVX2 ? 8 : 4;
}

static int spmi_full_panel(const spm_context *ctx)
{
    return ctx->isa == SPM_ISA_AVX512 ? 64 : ctx->isa == SPM_ISA_C ? 8 : 16;
}

/* Width of the next panel when `columns` are left: full ones first, then halves down to one vector. */
static int spmi_panel_width(const spm_context *ctx, int64_t columns)
{
    int lanes = spmi_lanes(ctx), width = spmi_full_panel(ctx);
    while (width > lanes && columns <= width - lanes) width /= 2;
    return width;
}

static int64_t spmi_round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

/* Bytes of `count` floats, rounded up so that what follows stays aligned. Scratch layouts are sums of these. */
static size_t spmi_float_bytes(int64_t count)
{
    return (size_t)spmi_round_up(count, SPMI_ALIGN / (int64_t)sizeof(float)) * sizeof(float);
}

#define SPMI_GEMM_KC 256  /* rows of B in a block: a panel of it stays in the second-level cache */
#define SPMI_GEMM_NC 512  /* columns of B packed at a time */
#define SPMI_GEMM_MC 96   /* rows of A between two walks along the panels */

/* C[m,n] (+)= alpha * A[m,k] B[k,n] (+ bias[n]), with any strides for A and B. C must overlap neither. */
typedef struct spmi_gemm {
    int64_t m, n, k;
    const float *a;
    int64_t a_row, a_col;
    const float *b;
    int64_t b_row, b_col;
    float *c;
    int64_t c_row;
    float alpha;
    int accumulate;
    const float *bias;
} spmi_gemm;

/* Rows a multiple of 2 KiB apart fall into the same few sets of the first-level cache and push each other out: worth a
 * copy where they are read more than once. */
static int spmi_stride_collides(int64_t floats)
{
    return floats > 0 && floats % 512 == 0;
}

/* to[i][j] = from[i * row + j * column], i < rows, j < columns. */
static void spmi_gather(spm_context *ctx, int64_t rows, int64_t columns, const float *from, int64_t row, int64_t column, float *to, int64_t to_row)
{
    int64_t i, j;
    if (column == 1) {
        for (i = 0; i < rows; i++) memcpy(to + i * to_row, from + i * row, (size_t)columns * sizeof *to);
    } else if (row == 1) {
        SPMI_KERNEL(ctx, transpose, (columns, rows, from, column, to, to_row));
    } else {
        for (i = 0; i < rows; i++) {
            for (j = 0; j < columns; j++) to[i * to_row + j] = from[i * row + j * column];
        }
    }
}

/* Packs one panel, B[k, columns] -> to[k][width]; the missing columns become 0. */
static void spmi_pack_panel(spm_context *ctx, int64_t k, int64_t columns, int width, const float *b, int64_t b_row, int64_t b_col, float *to)
{
    int64_t i;
    spmi_gather(ctx, k, columns, b, b_row, b_col, to, width);
    for (i = 0; columns < width && i < k; i++) {
        memset(to + i * width + columns, 0, (size_t)(width - columns) * sizeof *to);
    }
}

/* Packs B[k,n] into panels. */
static void spmi_pack_panels(spm_context *ctx, int64_t k, int64_t n, const float *b, int64_t b_row, int64_t b_col, float *to)
{
    int64_t j;
    int width;
    for (j = 0; j < n; j += width) {
        width = spmi_panel_width(ctx, n - j);
        spmi_pack_panel(ctx, k, SPMI_MIN(n - j, width), width, b + j * b_col, b_row, b_col, to + j * k);
    }
}

static size_t spmi_gemm_scratch(spm_context *ctx, int64_t m, int64_t n, int64_t k)
{
    int64_t kc = SPMI_MIN(k, SPMI_GEMM_KC);
    return spmi_float_bytes(kc * spmi_round_up(SPMI_MIN(n, SPMI_GEMM_NC), spmi_lanes(ctx)))
         + spmi_float_bytes((kc + 16) * SPMI_MIN(m, SPMI_GEMM_MC));
}

/* On the caller's thread, inside a task. */
static void spmi_gemm_serial(spm_context *ctx, const spmi_gemm *g, void *scratch)
{
    int64_t a_at[SPMI_GEMM_MC + SPMI_ROWS_PAD], c_at[SPMI_GEMM_MC], none = 0, n0, k0, m0, j, i;
    float *panels = (float *)scratch, *a_packed;
    a_packed = panels + spmi_float_bytes(SPMI_MIN(g->k, SPMI_GEMM_KC)
                                         * spmi_round_up(SPMI_MIN(g->n, SPMI_GEMM_NC), spmi_lanes(ctx))) / sizeof(float);
    for (n0 = 0; n0 < g->n; n0 += SPMI_GEMM_NC) {
        int64_t nc = SPMI_MIN(g->n - n0, SPMI_GEMM_NC);
        k0 = 0;
        do { /* once for k = 0 as well: C still has to be written */
            int64_t kc = SPMI_MIN(g->k - k0, SPMI_GEMM_KC);
            spmi_pack_panels(ctx, kc, nc, g->b + k0 * g->b_row + n0 * g->b_col, g->b_row, g->b_col, panels);
            for (m0 = 0; m0 < g->m; m0 += SPMI_GEMM_MC) {
                int64_t mc = SPMI_MIN(g->m - m0, SPMI_GEMM_MC);
                spmi_rows r;
                r.a = g->a + m0 * g->a_row + k0 * g->a_col;
                for (i = 0; i < mc; i++) a_at[i] = i * g->a_row;
                if (kc > 0 && (g->a_col != 1 || (spmi_stride_collides(g->a_row) && nc > spmi_full_panel(ctx)))) {
                    spmi_gather(ctx, mc, kc, r.a, g->a_row, g->a_col, a_packed, kc + 16);
                    r.a = a_packed;
                    for (i = 0; i < mc; i++) a_at[i] = i * (kc + 16);
                }
                for (i = mc; i < mc + SPMI_ROWS_PAD; i++) a_at[i] = 0;
                for (i = 0; i < mc; i++) c_at[i] = i * g->c_row;
                r.a_at = a_at;
                r.c_at = c_at;
                r.tap_at = &none;
                r.taps = 1;
                r.k = kc;
                r.rows = mc;
                r.alpha = g->alpha;
                r.accumulate = g->accumulate || k0 > 0;
                for (j = 0; j < nc; j += r.width) {
                    r.width = spmi_panel_width(ctx, nc - j);
                    r.columns = (int)SPMI_MIN(nc - j, r.width);
                    r.b = panels + j * kc;
                    r.c = g->c + m0 * g->c_row + n0 + j;
                    r.bias = g->bias && k0 == 0 ? g->bias + n0 + j : NULL;
                    SPMI_KERNEL(ctx, rows, (&r));
                }
            }
            k0 += SPMI_GEMM_KC;
        } while (k0 < g->k);
    }
}

/* The same on all threads: C is cut into blocks of rows and columns, each a serial product. */
#define SPMI_GEMM_TASK_M 192
#define SPMI_GEMM_TASK_N 256

typedef struct spmi_gemm_job {
    spm_context *ctx;
    const spmi_gemm *g;
    char *scratch;
    size_t slot_bytes;
    int64_t blocks_m;
} spmi_gemm_job;

static void spmi_gemm_task(void *arg, int64_t task, int slot)
{
    const spmi_gemm_job *job = (const spmi_gemm_job *)arg;
    spmi_gemm part = *job->g;
    int64_t m0 = task % job->blocks_m * SPMI_GEMM_TASK_M, n0 = task / job->blocks_m * SPMI_GEMM_TASK_N;
    part.m = SPMI_MIN(part.m - m0, SPMI_GEMM_TASK_M);
    part.n = SPMI_MIN(part.n - n0, SPMI_GEMM_TASK_N);
    part.a += m0 * part.a_row;
    part.b += n0 * part.b_col;
    part.c += m0 * part.c_row + n0;
    if (part.bias) part.bias += n0;
    spmi_gemm_serial(job->ctx, &part, job->scratch + (size_t)slot * job->slot_bytes);
}

static size_t spmi_gemm_parallel_scratch(spm_context *ctx, int64_t m, int64_t n, int64_t k)
{
    return (size_t)ctx->threads * spmi_gemm_scratch(ctx, SPMI_MIN(m, SPMI_GEMM_TASK_M), SPMI_MIN(n, SPMI_GEMM_TASK_N), k);
}

static void spmi_gemm_parallel(spm_context *ctx, const spmi_gemm *g, void *scratch)
{
    spmi_gemm_job job;
    job.ctx = ctx;
    job.g = g;
    job.scratch = (char *)scratch;
    job.slot_bytes = spmi_gemm_scratch(ctx, SPMI_MIN(g->m, SPMI_GEMM_TASK_M), SPMI_MIN(g->n, SPMI_GEMM_TASK_N), g->k);
    job.blocks_m = (g->m + SPMI_GEMM_TASK_M - 1) / SPMI_GEMM_TASK_M;
    spm_parallel(ctx, job.blocks_m * ((g->n + SPMI_GEMM_TASK_N - 1) / SPMI_GEMM_TASK_N), spmi_gemm_task, &job);
}

/* ---- convolution by taps ----
 * One engine serves the forward pass, the backward pass to the data and linear layers:
 *
 *     out[n, q, r, :] (+)= sum over taps (s, t) of  in[n, q * h.stride + h.offset + s * h.step,
 *                                                         r * w.stride + w.offset + t * w.step, :] W[s, t]
 *
 * with zeros outside the picture. NHWC makes the channels of neighbouring pixels one run, so taps next to each other in w
 * (step 1) become one tap of taps * depth channels: a 3x3 convolution is three long dot products, a 7x7 stem over 3
 * channels is seven of 21. Where taps reach outside, or a group's channels do not lie next to each other, the rows that
 * a task needs are first copied to its scratch with their zero border; activations stay dense in memory. */
typedef struct spmi_axis {
    int64_t size, count;                 /* of the input and of the output */
    int64_t stride, offset, step, taps;
} spmi_axis;

typedef struct spmi_window {
    const float *in;
    int64_t images, pixel, depth;        /* floats from pixel to pixel, and how many of them are read */
    spmi_axis h, w;
    /* worked out by spmi_window_plan */
    int copied, merged;
    int64_t taps, run;                   /* after merging: taps of `run` floats */
    int64_t h_stride, w_stride;          /* of the rows and columns as the kernel sees them */
    int64_t at_pixel, at_row;            /* floats from pixel to pixel and row to row, the same way */
    int64_t span_h, span_w;              /* input rows and columns under one output pixel */
} spmi_window;

static void spmi_window_plan(spmi_window *s, int avoid_collisions)
{
    const spmi_axis *h = &s->h, *w = &s->w;
    int border = h->offset < 0 || w->offset < 0
              || (h->count - 1) * h->stride + h->offset + (h->taps - 1) * h->step >= h->size
              || (w->count - 1) * w->stride + w->offset + (w->taps - 1) * w->step >= w->size;
    int split = s->depth != s->pixel && w->taps > 1 && w->step == 1;
    if (h->taps == 0 || w->taps == 0) border = 0; /* nothing is read */
    s->copied = border || split || (avoid_collisions && w->taps == 1 && spmi_stride_collides(s->pixel * w->stride));
    s->merged = w->step == 1 && w->taps > 1 && (s->copied || s->depth == s->pixel);
    s->taps = h->taps * (s->merged ? SPMI_MIN(w->taps, 1) : w->taps);
    s->run = s->merged ? w->taps * s->depth : s->depth;
    s->span_h = h->taps > 0 ? (h->taps - 1) * h->step + 1 : 0;
    s->span_w = w->taps > 0 ? (w->taps - 1) * w->step + 1 : 0;
    s->h_stride = h->stride;
    s->w_stride = w->stride;
    s->at_pixel = s->pixel;
    s->at_row = w->size * s->pixel;
    if (s->copied) { /* with one tap, only the rows and columns that are read are copied */
        if (h->taps == 1) s->h_stride = 1;
        if (w->taps == 1) s->w_stride = 1;
        s->at_pixel = s->depth;
        if (avoid_collisions && w->taps == 1 && spmi_stride_collides(s->depth)) s->at_pixel += 16;
        s->at_row = ((w->count - 1) * s->w_stride + s->span_w) * s->at_pixel;
    }
}

/* Floats that the copy of `rows` consecutive output rows (counted through all images) takes at most. */
static int64_t spmi_window_copy_floats(const spmi_window *s, int64_t rows)
{
    int64_t parts = rows / s->h.count + 2;
    if (!s->copied) return 0;
    return (rows * s->h_stride + SPMI_MIN(parts, rows) * s->span_h) * s->at_row;
}

/* One input row, columns as the kernel will see them, zeros where it is outside. */
static void spmi_window_copy_row(const spmi_window *s, int64_t image, int64_t y, float *to)
{
    const spmi_axis *w = &s->w;
    const int64_t columns = s->at_row / s->at_pixel, step = w->taps == 1 ? w->stride : 1;
    const float *from = s->in + (image * s->h.size + y) * w->size * s->pixel;
    int64_t x, first, end;
    if (y < 0 || y >= s->h.size) {
        memset(to, 0, (size_t)s->at_row * sizeof *to);
        return;
    }
    first = w->offset < 0 ? SPMI_MIN((-w->offset + step - 1) / step, columns) : 0; /* columns [first, end) are inside */
    end = w->size > w->offset ? SPMI_MIN((w->size - w->offset + step - 1) / step, columns) : 0;
    if (end < first) end = first;
    memset(to, 0, (size_t)(first * s->at_pixel) * sizeof *to);
    memset(to + end * s->at_pixel, 0, (size_t)((columns - end) * s->at_pixel) * sizeof *to);
    from += (w->offset + first * step) * s->pixel;
    to += first * s->at_pixel;
    if (step == 1 && s->pixel == s->at_pixel) {
        if (end > first) memcpy(to, from, (size_t)((end - first) * s->pixel) * sizeof *to);
        return;
    }
    for (x = first; x < end; x++, to += s->at_pixel, from += step * s->pixel) memcpy(to, from, (size_t)s->depth * sizeof *to);
}

/* Makes output rows [row0, row1) readable: copies if need be, and writes the offset of each row's first pixel, counted
 * from what it returns, to row_at. */
static const float *spmi_window_rows(const spmi_window *s, int64_t row0, int64_t row1, float *copy, int64_t *row_at)
{
    const spmi_axis *h = &s->h;
    int64_t row = row0, used = 0;
    if (!s->copied) {
        for (; row < row1; row++) {
            int64_t y = row / h->count * h->size + row % h->count * h->stride + h->offset;
            row_at[row - row0] = (y * s->w.size + s->w.offset) * s->pixel;
        }
        return s->in;
    }
    while (row < row1) {
        int64_t image = row / h->count, q0 = row % h->count, rows = SPMI_MIN(row1 - row, h->count - q0), i;
        int64_t lines = (rows - 1) * s->h_stride + s->span_h;
        for (i = 0; i < rows; i++) row_at[row - row0 + i] = (used + i * s->h_stride) * s->at_row;
        for (i = 0; i < lines; i++) {
            int64_t y = h->taps == 1 ? (q0 + i) * h->stride + h->offset : q0 * h->stride + h->offset + i;
            spmi_window_copy_row(s, image, y, copy + (used + i) * s->at_row);
        }
        used += lines;
        row += rows;
    }
    return copy;
}

/* Offsets of the taps from an output pixel's first input pixel. */
static void spmi_window_taps(const spmi_window *s, int64_t *tap_at)
{
    int64_t i, j, n = 0, columns = s->merged ? 1 : s->w.taps;
    for (i = 0; i < s->h.taps; i++) {
        for (j = 0; j < columns; j++) tap_at[n++] = i * s->h.step * s->at_row + j * s->w.step * s->at_pixel;
    }
}

#define SPMI_TASKS 16      /* a job is cut into about this many tasks at least, if it is large enough */
#define SPMI_TASK_MACS 1000000 /* less than this is not worth a task */
#define SPMI_TAP_KC 1152   /* longest piece of K that one pass of the kernel adds up */
#define SPMI_STRIP_FLOATS 49152 /* input floats of a strip: with a panel of B they fit the second-level cache */

typedef struct spmi_taps_job {
    spm_context *ctx;
    spmi_window window;
    int64_t columns;                     /* output channels */
    float *out;
    int64_t out_image, out_row, out_pixel; /* floats between images, rows, pixels of the output */
    const float *packed, *bias;
    int accumulate;
    /* worked out by spmi_taps_plan */
    int64_t strip, strips, groups;       /* output rows of a strip; groups of panels */
    size_t slot_bytes;
    char *scratch;
} spmi_taps_job;

static int64_t spmi_panel_count(const spm_context *ctx, int64_t columns)
{
    int64_t j, n = 0;
    for (j = 0; j < columns; j += spmi_panel_width(ctx, columns - j)) n++;
    return n;
}

/* Cuts the job into strips of output rows and groups of panels, by its shape alone. */
static void spmi_taps_plan(spmi_taps_job *job)
{
    spmi_window *s = &job->window;
    int64_t rows, pixels, depth, macs, wanted, least;
    spmi_window_plan(s, job->columns > spmi_full_panel(job->ctx));
    rows = s->images * s->h.count;
    depth = SPMI_MAX(s->taps * s->run, 1);
    macs = depth * job->columns;
    pixels = SPMI_STRIP_FLOATS / SPMI_MIN(depth, SPMI_MIN(s->h.stride * s->w.stride, 64) * SPMI_MAX(s->depth, 1));
    pixels = SPMI_MAX(48, SPMI_MIN(pixels, 2048));
    least = SPMI_MAX(48, SPMI_TASK_MACS / macs);
    wanted = rows * s->w.count / SPMI_TASKS;
    if (pixels > wanted) pixels = SPMI_MAX(wanted, SPMI_MIN(pixels, least));
    job->strip = SPMI_MAX(1, pixels / s->w.count);
    job->strips = (rows + job->strip - 1) / job->strip;
    job->strip = (rows + job->strips - 1) / job->strips;
    job->strips = (rows + job->strip - 1) / job->strip;
    job->groups = 1;
    if (job->strips < SPMI_TASKS && job->strip * s->w.count * macs > SPMI_TASK_MACS) {
        job->groups = SPMI_MIN((SPMI_TASKS + job->strips - 1) / job->strips, spmi_panel_count(job->ctx, job->columns));
    }
    job->slot_bytes = spmi_float_bytes(spmi_window_copy_floats(s, job->strip))
                    + spmi_float_bytes(2 * (job->strip * s->w.count * 2 + SPMI_ROWS_PAD + job->strip + s->taps));
}

static void spmi_taps_task(void *arg, int64_t task, int slot)
{
    const spmi_taps_job *job = (const spmi_taps_job *)arg;
    const spmi_window *s = &job->window;
    spm_context *ctx = job->ctx;
    const int64_t row0 = task / job->groups * job->strip, row1 = SPMI_MIN(row0 + job->strip, s->images * s->h.count);
    const int64_t pixels = (row1 - row0) * s->w.count, depth = s->taps * s->run;
    const int64_t panels = spmi_panel_count(ctx, job->columns), group = task % job->groups;
    const int64_t panel0 = group * panels / job->groups, panel1 = (group + 1) * panels / job->groups;
    const int64_t pieces = s->run > SPMI_TAP_KC ? (s->run + SPMI_TAP_KC - 1) / SPMI_TAP_KC : 1; /* of one tap */
    const int64_t piece = spmi_round_up((s->run + pieces - 1) / pieces, 16);
    const int64_t together = pieces > 1 ? 1 : SPMI_MAX(1, SPMI_TAP_KC / SPMI_MAX(s->run, 1)); /* taps in one pass */
    char *at = job->scratch + (size_t)slot * job->slot_bytes;
    float *copy = (float *)(void *)at;
    int64_t *a_at = (int64_t *)(void *)(at + spmi_float_bytes(spmi_window_copy_floats(s, job->strip)));
    int64_t *c_at = a_at + pixels + SPMI_ROWS_PAD, *row_at = c_at + pixels, *tap_at = row_at + (row1 - row0);
    const float *in;
    int64_t row, i, n = 0, t, k0, j, panel;
    spmi_rows g;
    in = spmi_window_rows(s, row0, row1, copy, row_at);
    spmi_window_taps(s, tap_at);
    for (row = row0; row < row1; row++) {
        int64_t to = row / s->h.count * job->out_image + row % s->h.count * job->out_row;
        for (i = 0; i < s->w.count; i++, n++) {
            a_at[n] = row_at[row - row0] + i * s->w_stride * s->at_pixel;
            c_at[n] = to + i * job->out_pixel;
        }
    }
    for (i = 0; i < SPMI_ROWS_PAD; i++) a_at[pixels + i] = a_at[pixels - 1];
    g.a_at = a_at;
    g.c_at = c_at;
    g.rows = pixels;
    g.alpha = 1.0f;
    t = 0;
    do { /* once without taps as well: the output still has to be written */
        for (k0 = 0; k0 == 0 || k0 < s->run; k0 += piece) {
            g.a = in + k0;
            g.tap_at = tap_at + t;
            g.taps = SPMI_MIN(s->taps - t, together);
            g.k = SPMI_MIN(s->run - k0, piece);
            g.accumulate = job->accumulate || t > 0 || k0 > 0;
            for (j = 0, panel = 0; panel < panel1; j += g.width, panel++) {
                g.width = spmi_panel_width(ctx, job->columns - j);
                if (panel < panel0) continue;
                g.columns = (int)SPMI_MIN(job->columns - j, g.width);
                g.b = job->packed + j * depth + (t * s->run + k0) * g.width;
                g.c = job->out + j;
                g.bias = job->bias && t == 0 && k0 == 0 ? job->bias + j : NULL;
                SPMI_KERNEL(ctx, rows, (&g));
            }
        }
        t += together;
    } while (t < s->taps);
}

/* After spmi_taps_plan; job->scratch has threads * slot_bytes. */
static void spmi_taps_run(spmi_taps_job *job)
{
    spm_parallel(job->ctx, job->strips * job->groups, spmi_taps_task, job);
}

/* ---- weight gradients ----
 * dW[o][tap][:] = sum over pixels of dy[pixel][o] * in[pixel's tap][:], with the same reading of the input. Tasks are
 * ranges of o; where these are few, the pixels are cut into chunks as well, whose sums are added in their order. */
typedef struct spmi_weight_job {
    spm_context *ctx;
    spmi_window window;
    const float *dy;
    int64_t dy_pixel, outputs;           /* floats from pixel to pixel; o of this group */
    float *dw, *db;                      /* [outputs][taps * run], [outputs]; either may be NULL */
    int add_dw, add_db;
    /* worked out by spmi_weight_plan */
    int64_t block, chunk, chunks;        /* output rows that are read together; rows of a chunk */
    int64_t range, ranges;               /* outputs of a task */
    int collect;                         /* 1: the pixels of a panel are copied together before they are used */
    size_t slot_bytes, partial_bytes, copy_bytes, panel_bytes;
    char *scratch;                       /* slots, then partial sums of chunks 1.. */
} spmi_weight_job;

#define SPMI_WEIGHT_PIXELS 128           /* read together: three vectors of each fill most of the first-level cache */
#define SPMI_WEIGHT_PARTIAL (1 << 20)    /* floats of partial sums at most */
#define SPMI_WEIGHT_RANGE 64             /* outputs of a task at least, if there are as many: they share the reading */

/* Height of the tile of the `outer` kernel. */
static int spmi_outer_rows(const spm_context *ctx)
{
    return ctx->isa == SPM_ISA_AVX512 || ctx->isa == SPM_ISA_NEON ? 8 : 4;
}

/* Columns of the next call of the `outer` kernel: three vectors; what is left at the end is cut 2 + 2, 2 or 1. */
static int64_t spmi_outer_columns(const spm_context *ctx, int64_t left)
{
    const int64_t lanes = ctx->isa == SPM_ISA_C ? 1 : spmi_lanes(ctx);
    return SPMI_MIN(left, left > 3 * lanes && left <= 4 * lanes ? 2 * lanes : 3 * lanes);
}

static void spmi_weight_plan(spmi_weight_job *job)
{
    spmi_window *s = &job->window;
    int64_t rows, blocks, size, most;
    spmi_window_plan(s, 0);
    rows = s->images * s->h.count;
    size = job->outputs * (s->taps * s->run + 1);
    job->collect = job->outputs >= 32 || s->run % spmi_lanes(job->ctx) != 0;
    job->block = SPMI_MIN(rows, SPMI_MAX(1, SPMI_WEIGHT_PIXELS / s->w.count));
    blocks = (rows + job->block - 1) / job->block;
    most = SPMI_MIN(SPMI_WEIGHT_PARTIAL / size + 1, SPMI_MAX(1, rows * s->w.count * size / SPMI_TASK_MACS));
    job->chunks = SPMI_MIN(SPMI_MIN(most, SPMI_MAX(1, blocks / 2)), SPMI_TASKS);
    job->chunk = (blocks + job->chunks - 1) / job->chunks * job->block;
    job->chunks = (rows + job->chunk - 1) / job->chunk;
    job->ranges = SPMI_MAX(1, SPMI_MIN((SPMI_TASKS + job->chunks - 1) / job->chunks, job->outputs / SPMI_WEIGHT_RANGE));
    job->range = spmi_round_up((job->outputs + job->ranges - 1) / job->ranges, 8);
    job->ranges = (job->outputs + job->range - 1) / job->range;
    job->copy_bytes = spmi_float_bytes(spmi_window_copy_floats(s, job->block));
    job->panel_bytes = job->collect ? spmi_float_bytes(job->block * s->w.count * spmi_outer_columns(job->ctx, s->taps * s->run)) : 0;
    job->slot_bytes = job->copy_bytes + job->panel_bytes + spmi_float_bytes(job->block * s->w.count * job->range)
                    + spmi_float_bytes(2 * (job->block + s->taps));
    job->partial_bytes = spmi_float_bytes((job->chunks - 1) * size);
}

/* dy[pixels][count] -> panels [count / R][pixels][R], zero-padded. */
static void spmi_weight_pack(const spm_context *ctx, const float *dy, int64_t dy_pixel, int64_t pixels, int64_t count, float *to)
{
    const int64_t r = spmi_outer_rows(ctx);
    int64_t o, p;
    for (o = 0; o < count; o += r) {
        const float *from = dy + o;
        if (count - o >= 8 && r == 8) {
            for (p = 0; p < pixels; p++, from += dy_pixel, to += 8) memcpy(to, from, 8 * sizeof *to);
        } else if (count - o >= 4 && r == 4) {
            for (p = 0; p < pixels; p++, from += dy_pixel, to += 4) memcpy(to, from, 4 * sizeof *to);
        } else {
            for (p = 0; p < pixels; p++, from += dy_pixel, to += r) {
                memset(to, 0, (size_t)r * sizeof *to);
                memcpy(to, from, (size_t)(count - o) * sizeof *to);
            }
        }
    }
}

/* dw (+)= dy x input over the pixels of g, the input read where it lies. */
static void spmi_weight_direct(const spmi_weight_job *job, spmi_outer g, const int64_t *tap_at)
{
    const spmi_window *s = &job->window;
    const float *b = g.b;
    int64_t t, j;
    for (t = 0; t < s->taps; t++) {
        for (j = 0; j < s->run; j += g.columns) {
            g.columns = spmi_outer_columns(job->ctx, s->run - j);
            g.b = b + tap_at[t] + j;
            SPMI_KERNEL(job->ctx, outer, (&g));
            g.c += g.columns;
        }
    }
}

/* The same with the pixels of each panel of columns collected first: one run of short rows, whatever the picture's size,
 * and panels that run on from one tap into the next. */
static void spmi_weight_collected(const spmi_weight_job *job, spmi_outer g, const int64_t *tap_at, float *panel)
{
    const spmi_window *s = &job->window;
    const int64_t size = s->taps * s->run, none = 0;
    spmi_outer p = g;
    int64_t j, i, piece;
    p.b = panel;
    p.b_at = &none;
    p.blocks = 1;
    p.k = g.blocks * g.k;
    for (j = 0; j < size; j += p.columns) {
        p.columns = spmi_outer_columns(job->ctx, size - j);
        p.b_row = p.columns;
        for (i = 0; i < p.columns; i += piece) {
            int64_t tap = (j + i) / s->run, from = (j + i) % s->run;
            piece = SPMI_MIN(p.columns - i, s->run - from);
            SPMI_KERNEL(job->ctx, collect, (g.blocks, g.k, g.b + tap_at[tap] + from, g.b_at, g.b_row, piece, panel + i, p.b_row));
        }
        SPMI_KERNEL(job->ctx, outer, (&p));
        p.c += p.columns;
    }
}

static void spmi_weight_task(void *arg, int64_t task, int slot)
{
    const spmi_weight_job *job = (const spmi_weight_job *)arg;
    const spmi_window *s = &job->window;
    spm_context *ctx = job->ctx;
    const int64_t size = s->taps * s->run, chunk = task / job->ranges, o0 = task % job->ranges * job->range;
    const int64_t count = SPMI_MIN(job->range, job->outputs - o0), first = chunk * job->chunk;
    const int64_t end = SPMI_MIN(first + job->chunk, s->images * s->h.count);
    char *at = job->scratch + (size_t)slot * job->slot_bytes;
    float *copy = (float *)(void *)at, *panel = (float *)(void *)(at + job->copy_bytes);
    float *dy_panels = (float *)(void *)(at + job->copy_bytes + job->panel_bytes), *dw = job->dw, *db = job->db;
    int64_t *row_at = (int64_t *)(void *)((char *)dy_panels + spmi_float_bytes(job->block * s->w.count * job->range));
    int64_t *tap_at = row_at + job->block, row;
    int add_dw = job->add_dw, add_db = job->add_db;
    spmi_outer g;
    if (chunk > 0) { /* partial sums: [outputs][size] and [outputs] of each chunk */
        float *partial = (float *)(void *)(job->scratch + (size_t)ctx->threads * job->slot_bytes);
        if (dw) dw = partial + (chunk - 1) * job->outputs * (size + 1);
        if (db) db = partial + (chunk - 1) * job->outputs * (size + 1) + job->outputs * size;
        add_dw = add_db = 0;
    }
    spmi_window_taps(s, tap_at);
    if (db && !add_db) memset(db + o0, 0, (size_t)count * sizeof *db);
    for (row = first; row < end; row += job->block) {
        int64_t rows = SPMI_MIN(job->block, end - row);
        const float *dy = job->dy + row * s->w.count * job->dy_pixel + o0;
        if (db) SPMI_KERNEL(ctx, column_sums, (rows * s->w.count, count, dy, job->dy_pixel, db + o0));
        if (!dw) continue;
        spmi_weight_pack(ctx, dy, job->dy_pixel, rows * s->w.count, count, dy_panels);
        g.b = spmi_window_rows(s, row, row + rows, copy, row_at);
        g.a = dy_panels;
        g.rows = count;
        g.blocks = rows;
        g.k = s->w.count;
        g.b_at = row_at;
        g.b_row = s->w_stride * s->at_pixel;
        g.c = dw + o0 * size;
        g.c_row = size;
        g.columns = 0;
        g.accumulate = add_dw || row > first;
        if (job->collect) spmi_weight_collected(job, g, tap_at, panel);
        else spmi_weight_direct(job, g, tap_at);
    }
}

/* dw and db += the chunks' partial sums, in order; cut by elements. */
#define SPMI_WEIGHT_FOLD 16384

static void spmi_weight_fold(void *arg, int64_t task, int slot)
{
    const spmi_weight_job *job = (const spmi_weight_job *)arg;
    const int64_t size = job->window.taps * job->window.run, all = job->outputs * (size + 1);
    const float *partial = (const float *)(const void *)(job->scratch + (size_t)job->ctx->threads * job->slot_bytes);
    const int64_t from = task * SPMI_WEIGHT_FOLD, end = SPMI_MIN(from + SPMI_WEIGHT_FOLD, all);
    int64_t i, c;
    (void)slot;
    for (c = 0; c < job->chunks - 1; c++, partial += all) {
        for (i = from; job->dw && i < SPMI_MIN(end, job->outputs * size); i++) job->dw[i] += partial[i];
        for (i = SPMI_MAX(from, job->outputs * size); job->db && i < end; i++) job->db[i - job->outputs * size] += partial[i];
    }
}

static size_t spmi_weight_scratch(const spmi_weight_job *job)
{
    return (size_t)job->ctx->threads * job->slot_bytes + job->partial_bytes;
}

/* After spmi_weight_plan; job->scratch has spmi_weight_scratch bytes. */
static void spmi_weight_run(spmi_weight_job *job)
{
    int64_t all = job->outputs * (job->window.taps * job->window.run + 1);
    spm_parallel(job->ctx, job->chunks * job->ranges, spmi_weight_task, job);
    if (job->chunks > 1) spm_parallel(job->ctx, (all + SPMI_WEIGHT_FOLD - 1) / SPMI_WEIGHT_FOLD, spmi_weight_fold, job);
}

/* ---- the machine's limit ---- */

static void spmi_peak_task(void *arg, int64_t task, int slot)
{
    float *sinks = (float *)arg;
    spm_context *ctx;
    (void)slot;
    memcpy(&ctx, sinks, sizeof ctx);
    sinks += 16 * (task + 1);
    sinks[0] = 1.0f;
    SPMI_KERNEL(ctx, fma_chains, (1000000, sinks));
}

SPMDEF double spm_measure_peak(spm_context *ctx)
{
    int threads = ctx->threads, round;
    float *sinks = (float *)spmi_alloc_array(ctx, 16 * (threads + 1), sizeof *sinks);
    double best = 0.0;
    if (!sinks) return 0.0;
    memcpy(sinks, &ctx, sizeof ctx);
    for (round = 0; round < 5; round++) {
        double start = spmi_seconds(), seconds, rate;
        spm_parallel(ctx, threads, spmi_peak_task, sinks);
        seconds = spmi_seconds() - start;
        rate = seconds > 0.0 ? 1e6 * (double)sinks[17] * threads / seconds * 1e-9 : 0.0;
        best = SPMI_MAX(best, rate);
    }
    spmi_free(ctx, sinks);
    return best;
}

SPMDEF double spm_seconds(void)
{
    return spmi_seconds();
}

/* ================================================================================================================
 * >>TENSOR  07  shapes, compare, print
 * ============================================================================================================= */

SPMDEF spm_tensor spm_tensor_make(float *data, int rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    spm_tensor tensor = SPM_ZERO;
    tensor.data = data;
    tensor.rank = rank < 0 ? 0 : SPMI_MIN(rank, SPM_MAX_RANK);
    tensor.shape[0] = tensor.rank > 0 ? d0 : 0;
    tensor.shape[1] = tensor.rank > 1 ? d1 : 0;
    tensor.shape[2] = tensor.rank > 2 ? d2 : 0;
    tensor.shape[3] = tensor.rank > 3 ? d3 : 0;
    return tensor;
}

SPMDEF int64_t spm_tensor_count(const spm_tensor *tensor)
{
    int64_t count = 1;
    int i;
    if (tensor->rank <= 0) return 0;
    for (i = 0; i < tensor->rank; i++) {
        if (!spmi_mul_dim(count, tensor->shape[i], &count)) return 0;
    }
    return count;
}

SPMDEF int spm_tensor_same_shape(const spm_tensor *a, const spm_tensor *b)
{
    int i;
    if (a->rank != b->rank) return 0;
    for (i = 0; i < a->rank; i++) {
        if (a->shape[i] != b->shape[i]) return 0;
    }
    return 1;
}

SPMDEF char *spm_tensor_shape_text(const spm_tensor *tensor, char *text, size_t size)
{
    size_t used = 1;
    int i;
    if (!size) return text;
    (void)spmi_format(text, size, "[");
    for (i = 0; i < tensor->rank && used < size; i++) {
        int n = spmi_format(text + used, size - used, i ? ",%lld" : "%lld", (long long)tensor->shape[i]);
        if (n > 0) used += (size_t)n;
    }
    if (used < size) (void)spmi_format(text + used, size - used, "]");
    return text;
}

SPMDEF double spm_tensor_difference(const spm_tensor *a, const spm_tensor *b)
{
    double worst = 0.0, largest = 0.0;
    int64_t i, n = spm_tensor_count(a);
    if (!spm_tensor_same_shape(a, b)) return HUGE_VAL;
    for (i = 0; i < n; i++) {
        const double x = (double)a->data[i], y = (double)b->data[i], d = fabs(x - y);
        if (!(d <= worst)) worst = x == y ? worst : d; /* equal infinities differ by nothing */
        if (worst != worst) return HUGE_VAL;
        largest = SPMI_MAX(largest, fabs(y));
    }
    return worst > 0.0 ? worst / SPMI_MAX(largest, 1e-30) : 0.0;
}

/* ================================================================================================================
 * >>OPS  08  operations: shape checks and work sharing that they have in common
 * ----------------------------------------------------------------------------------------------------------------
 * Each operation X has spmi_X_infer, _forward, _backward, _flops and, where it needs memory, _scratch and _packed; the table
 * at the end of the section makes the public functions of them.  Work is cut into tasks by shape alone, and every sum
 * over tasks is taken in a fixed order, so results do not depend on the number of threads.
 * ============================================================================================================= */

#define SPMI_GRAIN 16384 /* floats per task of memory-bound work: 64 KiB */

/* Bytes of a * b items, rounded up so that what follows stays aligned.  Overflow cannot come here: infer has checked the
 * tensors these sizes derive from. */
static size_t spmi_bytes(int64_t a, int64_t b, size_t item)
{
    return (size_t)spmi_round_up(a * b * (int64_t)item, SPMI_ALIGN);
}

/* The next `bytes` (of spmi_bytes) of a block of scratch memory; moves *at behind them. */
static void *spmi_carve(void **at, size_t bytes)
{
    void *memory = *at;
    *at = (char *)*at + bytes;
    return memory;
}

static spm_status spmi_op_fail(spm_context *ctx, spm_error *err, const char *op, const char *what, const spm_tensor *got,
                               const char *rule)
{
    char text[96];
    return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: %s is %s, but must be %s", op, what, spm_tensor_shape_text(got, text, sizeof text), rule);
}

/* Fails unless `got` has exactly the wanted shape, which follows from `from`. */
static spm_status spmi_op_want(spm_context *ctx, spm_error *err, const char *op, const char *what, const spm_tensor *got,
                               const spm_tensor *from, int rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    const spm_tensor want = spm_tensor_make(NULL, rank, d0, d1, d2, d3);
    char a[96], b[96], c[96];
    if (spm_tensor_same_shape(got, &want)) return SPM_OK;
    return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: %s is %s, but must be %s to go with %s", op, what,
                     spm_tensor_shape_text(got, a, sizeof a), spm_tensor_shape_text(&want, b, sizeof b),
                     spm_tensor_shape_text(from, c, sizeof c));
}

static spm_status spmi_op_want_like(spm_context *ctx, spm_error *err, const char *op, const char *what, const spm_tensor *got,
                                    const spm_tensor *from)
{
    return spmi_op_want(ctx, err, op, what, got, from, from->rank, from->shape[0], from->shape[1], from->shape[2], from->shape[3]);
}

/* Adds an output of this shape to the call; the caller's data pointer stays. */
static void spmi_op_out(spm_op_call *call, int rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    spm_tensor *out = &call->out[call->n_out++];
    *out = spm_tensor_make(out->data, rank, d0, d1, d2, d3);
}

static void spmi_op_out_like(spm_op_call *call, const spm_tensor *from)
{
    spmi_op_out(call, from->rank, from->shape[0], from->shape[1], from->shape[2], from->shape[3]);
}

/* Size of the last axis. */
static int64_t spmi_last(const spm_tensor *tensor)
{
    return tensor->shape[tensor->rank - 1];
}

static int64_t spmi_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static size_t spmi_none_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    (void)ctx;
    (void)call;
    (void)backward;
    return 0;
}

static size_t spmi_none_packed(spm_context *ctx, const spm_op_call *call)
{
    (void)ctx;
    (void)call;
    return 0;
}

/* ---- elementwise work in parallel ---- */

typedef enum spmi_each_kind {
    SPMI_EACH_SCALE, SPMI_EACH_SUM, SPMI_EACH_RELU, SPMI_EACH_RELU_BACK, SPMI_EACH_GELU, SPMI_EACH_GELU_BACK
} spmi_each_kind;

typedef struct spmi_each {
    spm_context *ctx;
    spmi_each_kind kind;
    int64_t n;
    float s;
    const float *a, *b;
    float *y;
    int add;
} spmi_each;

static void spmi_each_task(void *arg, int64_t task, int slot)
{
    const spmi_each *each = (const spmi_each *)arg;
    const int64_t at = task * SPMI_GRAIN, n = SPMI_MIN((int64_t)SPMI_GRAIN, each->n - at);
    const float *a = each->a + at, *b = each->b ? each->b + at : NULL;
    float *y = each->y + at;
    (void)slot;
    switch (each->kind) {
    case SPMI_EACH_SCALE: SPMI_KERNEL(each->ctx, scale, (n, each->s, a, y, each->add)); break;
    case SPMI_EACH_SUM: SPMI_KERNEL(each->ctx, sum_of, (n, each->s, a, b, y)); break;
    case SPMI_EACH_RELU: SPMI_KERNEL(each->ctx, relu, (n, a, y)); break;
    case SPMI_EACH_RELU_BACK: SPMI_KERNEL(each->ctx, relu_back, (n, a, b, y, each->add)); break;
    case SPMI_EACH_GELU: SPMI_KERNEL(each->ctx, gelu, (n, a, y)); break;
    case SPMI_EACH_GELU_BACK: SPMI_KERNEL(each->ctx, gelu_back, (n, a, b, y, each->add)); break;
    }
}

/* y = f(a, b) (or y += f where the kernel can) for n floats. */
static void spmi_each_run(spm_context *ctx, spmi_each_kind kind, int64_t n, float s, const float *a, const float *b, float *y, int add)
{
    spmi_each each = SPM_ZERO;
    each.ctx = ctx;
    each.kind = kind;
    each.n = n;
    each.s = s;
    each.a = a;
    each.b = b;
    each.y = y;
    each.add = add;
    spm_parallel(ctx, spmi_ceil_div(n, SPMI_GRAIN), spmi_each_task, &each);
}

/* The common end of many backward passes: d_in[index] = (or +=) s * gradient, if wanted. */
static void spmi_op_pass_gradient(spm_context *ctx, spm_op_call *call, int index, float s)
{
    if (!call->d_in[index].data) return;
    spmi_each_run(ctx, SPMI_EACH_SCALE, spm_tensor_count(&call->out[0]), s, call->d_out.data, NULL, call->d_in[index].data,
                  call->d_in_add[index]);
}

/* ---- conv2d and linear ----
 * y[n,q,r,o] = b[o] + sum over s,t,i of x[n, q*stride + s*dilation - padding, r*.. + t*.. - .., i] w[o,s,t,i], zeros
 * outside the picture; with groups, o's group sees its own range of i.  A linear layer is a 1x1 convolution over a
 * picture that is one pixel wide and as high as there are rows; so is every 1x1 convolution with stride 1. */
typedef struct spmi_conv {
    int64_t n, h, w, c, o, oh, ow;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t groups, ci, co;  /* input and output channels of a group */
    int64_t k;               /* floats of one filter */
} spmi_conv;

/* The geometry of a call that infer has passed. */
static spmi_conv spmi_conv_of(const spm_op_call *call, int linear)
{
    const spm_tensor *x = &call->in[0], *w = &call->in[1];
    spmi_conv v = SPM_ZERO;
    int i;
    v.groups = 1;
    v.o = w->shape[0];
    for (i = 0; i < 2; i++) v.kernel[i] = v.stride[i] = v.dilation[i] = 1;
    if (linear) {
        v.n = v.w = v.ow = 1;
        v.c = x->shape[x->rank - 1];
        v.h = v.oh = x->shape[0] * (x->rank == 3 ? x->shape[1] : 1);
    } else {
        v.n = x->shape[0];
        v.h = x->shape[1];
        v.w = x->shape[2];
        v.c = x->shape[3];
        v.groups = SPMI_MAX(call->attr.groups, 1);
        for (i = 0; i < 2; i++) {
            v.kernel[i] = w->shape[1 + i];
            v.stride[i] = SPMI_MAX(call->attr.stride[i], 1);
            v.padding[i] = call->attr.padding[i];
            v.dilation[i] = SPMI_MAX(call->attr.dilation[i], 1);
        }
        v.oh = (v.h + 2 * v.padding[0] - v.dilation[0] * (v.kernel[0] - 1) - 1) / v.stride[0] + 1;
        v.ow = (v.w + 2 * v.padding[1] - v.dilation[1] * (v.kernel[1] - 1) - 1) / v.stride[1] + 1;
        if (v.kernel[0] * v.kernel[1] * v.stride[0] * v.stride[1] == 1 && v.padding[0] + v.padding[1] == 0) {
            v.h = v.oh = v.n * v.h * v.w;
            v.n = v.w = v.ow = 1;
        }
    }
    v.ci = v.c / v.groups;
    v.co = v.o / v.groups;
    v.k = v.kernel[0] * v.kernel[1] * v.ci;
    return v;
}

/* Shapes and geometry above this are refused, so that no product of them overflows. */
#define SPMI_DIM_MAX (INT64_C(1) << 31)

/* 1 if every dimension is in [1, SPMI_DIM_MAX) and the tensor's bytes fit int64_t and size_t. */
static int spmi_shape_sane(const spm_tensor *t)
{
    int64_t count = 16 * (int64_t)sizeof(float);
    int i;
    if (t->rank < 1 || t->rank > SPM_MAX_RANK) return 0;
    for (i = 0; i < t->rank; i++) {
        if (t->shape[i] < 1 || t->shape[i] >= SPMI_DIM_MAX || !spmi_mul_dim(count, t->shape[i], &count)) return 0;
    }
    return (uint64_t)count <= SIZE_MAX;
}

static spm_status spmi_conv2d_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0], *w = &call->in[1], *b = &call->in[2];
    const spm_op_attr *attr = &call->attr;
    const int64_t groups = SPMI_MAX(attr->groups, 1);
    int64_t out[2];
    int i;
    if (call->n_in < 2 || call->n_in > 3 || x->rank != 4 || w->rank != 4 || !spmi_shape_sane(x) || !spmi_shape_sane(w)) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: wants x[N,H,W,C] and w[O,KH,KW,C/groups], got %d inputs of ranks %d and %d",
                         call->n_in, x->rank, w->rank);
    }
    if (x->shape[3] % groups || w->shape[0] % groups || w->shape[3] != x->shape[3] / groups) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: x has %ld channels, w is [%ld,%ld,%ld,%ld], groups %ld; "
                         "w's last axis must be channels / groups, and both counts divisible by groups",
                         (long)x->shape[3], (long)w->shape[0], (long)w->shape[1], (long)w->shape[2], (long)w->shape[3], (long)groups);
    }
    if (call->n_in == 3 && b->rank != 0 && (b->rank != 1 || b->shape[0] != w->shape[0])) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: the bias has %ld elements, w has %ld outputs", (long)b->shape[0], (long)w->shape[0]);
    }
    for (i = 0; i < 2; i++) {
        int64_t stride = SPMI_MAX(attr->stride[i], 1), dilation = SPMI_MAX(attr->dilation[i], 1), span;
        if (attr->kernel[i] != 0 && attr->kernel[i] != w->shape[1 + i]) {
            return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: kernel %ld does not match w's %ld", (long)attr->kernel[i], (long)w->shape[1 + i]);
        }
        if (attr->stride[i] < 0 || attr->dilation[i] < 0 || attr->padding[i] < 0 || stride >= SPMI_DIM_MAX
            || dilation >= SPMI_DIM_MAX || attr->padding[i] >= SPMI_DIM_MAX || !spmi_mul_dim(dilation, w->shape[1 + i] - 1, &span)
            || span >= x->shape[1 + i] + 2 * attr->padding[i]) {
            return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: kernel %ld with stride %ld, padding %ld, dilation %ld does not fit an input of %ld",
                             (long)w->shape[1 + i], (long)stride, (long)attr->padding[i], (long)dilation, (long)x->shape[1 + i]);
        }
        out[i] = (x->shape[1 + i] + 2 * attr->padding[i] - span - 1) / stride + 1;
    }
    call->out[0].rank = 4;
    call->out[0].shape[0] = x->shape[0];
    call->out[0].shape[1] = out[0];
    call->out[0].shape[2] = out[1];
    call->out[0].shape[3] = w->shape[0];
    call->n_out = 1;
    if (!spmi_shape_sane(&call->out[0])) return spmi_fail(ctx, err, SPM_E_SHAPE, "conv2d: the output [%ld,%ld,%ld,%ld] is too large",
        (long)x->shape[0], (long)out[0], (long)out[1], (long)w->shape[0]);
    return SPM_OK;
}

static spm_status spmi_linear_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0], *w = &call->in[1], *b = &call->in[2];
    if (call->n_in < 2 || call->n_in > 3 || (x->rank != 2 && x->rank != 3) || w->rank != 2 || !spmi_shape_sane(x) || !spmi_shape_sane(w)) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "linear: wants x[N,I] or [N,T,I] and w[O,I], got %d inputs of ranks %d and %d",
                         call->n_in, x->rank, w->rank);
    }
    if (x->shape[x->rank - 1] != w->shape[1]) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "linear: x has %ld features, w is [%ld,%ld]", (long)x->shape[x->rank - 1],
                         (long)w->shape[0], (long)w->shape[1]);
    }
    if (call->n_in == 3 && b->rank != 0 && (b->rank != 1 || b->shape[0] != w->shape[0])) {
        return spmi_fail(ctx, err, SPM_E_SHAPE, "linear: the bias has %ld elements, w has %ld outputs", (long)b->shape[0], (long)w->shape[0]);
    }
    call->out[0].rank = x->rank;
    memcpy(call->out[0].shape, x->shape, sizeof x->shape);
    call->out[0].shape[x->rank - 1] = w->shape[0];
    call->n_out = 1;
    if (!spmi_shape_sane(&call->out[0])) return spmi_fail(ctx, err, SPM_E_SHAPE, "linear: the output with %ld features is too large", (long)w->shape[0]);
    return SPM_OK;
}

/* ---- packed weights ---- */

/* Packs taps [0, taps) of one group's product: B[tap][k][columns] panels from b + tap_at(tap). */
typedef struct spmi_conv_pack {
    spm_context *ctx;
    const float *w;          /* the element (tap 0, k 0, column 0) */
    int64_t taps_h, taps_w, tap_h, tap_w; /* counts, and floats from tap to tap */
    int64_t k, k_at, columns, column_at;
    float *to;
} spmi_conv_pack;

static void spmi_conv_pack_task(void *arg, int64_t task, int slot)
{
    const spmi_conv_pack *job = (const spmi_conv_pack *)arg;
    const int64_t panels = spmi_panel_count(job->ctx, job->columns), taps = job->taps_h * job->taps_w;
    const int64_t panel = task % panels, tap = task / panels;
    const float *w = job->w + tap / job->taps_w * job->tap_h + tap % job->taps_w * job->tap_w;
    int64_t j = 0, i;
    int width = spmi_panel_width(job->ctx, job->columns);
    (void)slot;
    for (i = 0; i < panel; i++) {
        j += width;
        width = spmi_panel_width(job->ctx, job->columns - j);
    }
    spmi_pack_panel(job->ctx, job->k, SPMI_MIN(job->columns - j, width), width, w + j * job->column_at, job->k_at, job->column_at,
                    job->to + j * taps * job->k + tap * job->k * width);
}

static void spmi_conv_pack_run(spmi_conv_pack *job)
{
    spm_parallel(job->ctx, job->taps_h * job->taps_w * spmi_panel_count(job->ctx, job->columns), spmi_conv_pack_task, job);
}

/* Floats of one group's packed forward weights; a filter is one run of k floats there. */
static int64_t spmi_conv_packed_floats(spm_context *ctx, const spmi_conv *v)
{
    return spmi_round_up(v->k * spmi_round_up(v->co, spmi_lanes(ctx)), 16);
}

static void spmi_conv_pack_forward(spm_context *ctx, const spmi_conv *v, const float *w, float *to)
{
    spmi_conv_pack job;
    int64_t g;
    job.ctx = ctx;
    job.taps_h = job.taps_w = 1;
    job.tap_h = job.tap_w = 0;
    job.k = v->k;
    job.k_at = 1;
    job.columns = v->co;
    job.column_at = v->k;
    for (g = 0; g < v->groups; g++) {
        job.w = w + g * v->co * v->k;
        job.to = to + g * spmi_conv_packed_floats(ctx, v);
        spmi_conv_pack_run(&job);
    }
}

/* ---- forward ---- */

/* What the forward pass and the weight gradient read: group g of x. */
static spmi_window spmi_conv_input(const spmi_conv *v, const float *x, int64_t g)
{
    spmi_window s = SPM_ZERO;
    s.in = x ? x + g * v->ci : NULL;
    s.images = v->n;
    s.pixel = v->c;
    s.depth = v->ci;
    s.h.size = v->h;
    s.h.count = v->oh;
    s.h.stride = v->stride[0];
    s.h.offset = -v->padding[0];
    s.h.step = v->dilation[0];
    s.h.taps = v->kernel[0];
    s.w.size = v->w;
    s.w.count = v->ow;
    s.w.stride = v->stride[1];
    s.w.offset = -v->padding[1];
    s.w.step = v->dilation[1];
    s.w.taps = v->kernel[1];
    return s;
}

static spmi_taps_job spmi_conv_forward_job(spm_context *ctx, const spmi_conv *v)
{
    spmi_taps_job job = SPM_ZERO;
    job.ctx = ctx;
    job.window = spmi_conv_input(v, NULL, 0);
    job.columns = v->co;
    job.out_pixel = v->o;
    job.out_row = v->ow * v->o;
    job.out_image = v->oh * v->ow * v->o;
    spmi_taps_plan(&job);
    return job;
}

static void spmi_conv_forward(spm_context *ctx, spm_op_call *call, int linear)
{
    const spmi_conv v = spmi_conv_of(call, linear);
    const float *bias = call->n_in > 2 ? call->in[2].data : NULL;
    float *packed = (float *)call->packed;
    char *scratch = (char *)call->scratch;
    spmi_taps_job job = spmi_conv_forward_job(ctx, &v);
    int64_t g;
    if (!packed) {
        packed = (float *)call->scratch;
        scratch += (size_t)(v.groups * spmi_conv_packed_floats(ctx, &v)) * sizeof(float);
    }
    if (!call->packed || !call->packed_ready) spmi_conv_pack_forward(ctx, &v, call->in[1].data, packed);
    if (call->packed) call->packed_ready = 1;
    job.scratch = scratch;
    for (g = 0; g < v.groups; g++) {
        job.window.in = call->in[0].data + g * v.ci;
        job.out = call->out[0].data + g * v.co;
        job.packed = packed + g * spmi_conv_packed_floats(ctx, &v);
        job.bias = bias ? bias + g * v.co : NULL;
        spmi_taps_run(&job);
    }
}

/* ---- backward: dx[n,h,w,i] = sum over o and all (q,r,s,t) that meet (h,w) of dy[n,q,r,o] w[o,s,t,i],
 *      dw[o,s,t,i] = sum over n,q,r of dy[n,q,r,o] x[.., i],  db[o] = sum over n,q,r of dy[n,q,r,o] ---- */

/* The taps that meet output positions phase, phase + stride, ...: kernel indices last, last - period, ... */
typedef struct spmi_conv_phase {
    spmi_axis axis;          /* over dy */
    int64_t last, period;
} spmi_conv_phase;

static spmi_conv_phase spmi_conv_phase_of(const spmi_conv *v, int d, int64_t phase)
{
    const int64_t stride = v->stride[d], dilation = v->dilation[d], size = d == 0 ? v->h : v->w;
    int64_t a = stride, b = dilation, k;
    spmi_conv_phase p = SPM_ZERO;
    while (b) { /* a = gcd */
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    p.period = stride / a;
    p.axis.size = d == 0 ? v->oh : v->ow;
    p.axis.count = (size - phase + stride - 1) / stride;
    p.axis.stride = 1;
    p.axis.step = dilation / a;
    for (k = v->kernel[d] - 1; k >= 0; k--) {
        int64_t at = phase + v->padding[d] - k * dilation;
        if (at % stride == 0) {
            p.last = k;
            p.axis.offset = at / stride;
            p.axis.taps = k / p.period + 1;
            break;
        }
    }
    return p;
}

static spmi_taps_job spmi_conv_data_job(spm_context *ctx, const spmi_conv *v, const spmi_conv_phase *ph, const spmi_conv_phase *pw)
{
    spmi_taps_job job = SPM_ZERO;
    job.ctx = ctx;
    job.window.images = v->n;
    job.window.pixel = v->o;
    job.window.depth = v->co;
    job.window.h = ph->axis;
    job.window.w = pw->axis;
    job.columns = v->ci;
    job.out_image = v->h * v->w * v->c;
    job.out_row = v->stride[0] * v->w * v->c;
    job.out_pixel = v->stride[1] * v->c;
    spmi_taps_plan(&job);
    return job;
}

/* Floats of the packed weights of one phase at most. */
static int64_t spmi_conv_data_floats(spm_context *ctx, const spmi_conv *v)
{
    return spmi_round_up(v->kernel[0] * v->kernel[1] * v->co * spmi_round_up(v->ci, spmi_lanes(ctx)), 16);
}

static void spmi_conv_backward_data(spm_context *ctx, const spmi_conv *v, spm_op_call *call)
{
    const int64_t phases_h = SPMI_MIN(v->stride[0], v->h), phases_w = SPMI_MIN(v->stride[1], v->w);
    int64_t h, w, g;
    for (h = 0; h < phases_h; h++) {
        const spmi_conv_phase ph = spmi_conv_phase_of(v, 0, h);
        for (w = 0; w < phases_w; w++) {
            const spmi_conv_phase pw = spmi_conv_phase_of(v, 1, w);
            spmi_taps_job job = spmi_conv_data_job(ctx, v, &ph, &pw);
            spmi_conv_pack pack;
            pack.ctx = ctx;
            pack.taps_h = ph.axis.taps;
            pack.taps_w = pw.axis.taps;
            pack.tap_h = -ph.period * v->kernel[1] * v->ci;
            pack.tap_w = -pw.period * v->ci;
            pack.k = v->co;
            pack.k_at = v->k;
            pack.columns = v->ci;
            pack.column_at = 1;
            pack.to = (float *)call->scratch;
            job.packed = pack.to;
            job.accumulate = call->d_in_add[0];
            job.scratch = (char *)call->scratch + (size_t)spmi_conv_data_floats(ctx, v) * sizeof(float);
            for (g = 0; g < v->groups; g++) {
                pack.w = call->in[1].data + g * v->co * v->k + (ph.last * v->kernel[1] + pw.last) * v->ci;
                if (pack.taps_h * pack.taps_w > 0) spmi_conv_pack_run(&pack);
                job.window.in = call->d_out.data + g * v->co;
                job.out = call->d_in[0].data + (h * v->w + w) * v->c + g * v->ci;
                spmi_taps_run(&job);
            }
        }
    }
}

static spmi_weight_job spmi_conv_weight_job(spm_context *ctx, const spmi_conv *v)
{
    spmi_weight_job job = SPM_ZERO;
    job.ctx = ctx;
    job.window = spmi_conv_input(v, NULL, 0);
    job.outputs = v->co;
    job.dy_pixel = v->o;
    spmi_weight_plan(&job);
    return job;
}

static void spmi_conv_backward(spm_context *ctx, spm_op_call *call, int linear)
{
    const spmi_conv v = spmi_conv_of(call, linear);
    float *db = call->n_in > 2 && call->in[2].data ? call->d_in[2].data : NULL;
    int64_t g;
    if (call->d_in[0].data) spmi_conv_backward_data(ctx, &v, call);
    if (call->d_in[1].data || db) {
        spmi_weight_job job = spmi_conv_weight_job(ctx, &v);
        job.scratch = (char *)call->scratch;
        job.add_dw = call->d_in_add[1];
        job.add_db = call->d_in_add[2];
        for (g = 0; g < v.groups; g++) {
            job.window.in = call->in[0].data + g * v.ci;
            job.dy = call->d_out.data + g * v.co;
            job.dw = call->d_in[1].data ? call->d_in[1].data + g * v.co * v.k : NULL;
            job.db = db ? db + g * v.co : NULL;
            spmi_weight_run(&job);
        }
    }
}

/* ---- what the table of operations asks ---- */

static size_t spmi_conv_scratch(spm_context *ctx, const spm_op_call *call, int backward, int linear)
{
    const spmi_conv v = spmi_conv_of(call, linear);
    size_t most = 0, bytes;
    int64_t h, w;
    if (!backward) {
        const spmi_taps_job job = spmi_conv_forward_job(ctx, &v);
        return (size_t)(v.groups * spmi_conv_packed_floats(ctx, &v)) * sizeof(float) + (size_t)ctx->threads * job.slot_bytes;
    }
    for (h = 0; h < SPMI_MIN(v.stride[0], v.h); h++) {
        const spmi_conv_phase ph = spmi_conv_phase_of(&v, 0, h);
        for (w = 0; w < SPMI_MIN(v.stride[1], v.w); w++) {
            const spmi_conv_phase pw = spmi_conv_phase_of(&v, 1, w);
            const spmi_taps_job job = spmi_conv_data_job(ctx, &v, &ph, &pw);
            most = SPMI_MAX(most, job.slot_bytes);
        }
    }
    most = most * (size_t)ctx->threads + (size_t)spmi_conv_data_floats(ctx, &v) * sizeof(float);
    {
        const spmi_weight_job job = spmi_conv_weight_job(ctx, &v);
        bytes = spmi_weight_scratch(&job);
    }
    return SPMI_MAX(most, bytes);
}

static size_t spmi_conv_packed(spm_context *ctx, const spm_op_call *call, int linear)
{
    const spmi_conv v = spmi_conv_of(call, linear);
    return (size_t)(v.groups * spmi_conv_packed_floats(ctx, &v)) * sizeof(float);
}

/* A forward pass or one gradient is one product; the backward pass counts the gradients that are wanted. */
static double spmi_conv_flops(const spm_op_call *call, int backward, int linear)
{
    const spmi_conv v = spmi_conv_of(call, linear);
    const double product = 2.0 * (double)(v.n * v.oh * v.ow) * (double)v.o * (double)v.k;
    return backward ? product * ((call->d_in[0].data != NULL) + (call->d_in[1].data != NULL)) : product;
}

static size_t spmi_conv2d_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    return spmi_conv_scratch(ctx, call, backward, 0);
}

static size_t spmi_conv2d_packed(spm_context *ctx, const spm_op_call *call)
{
    return spmi_conv_packed(ctx, call, 0);
}

static void spmi_conv2d_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_conv_forward(ctx, call, 0);
}

static void spmi_conv2d_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_conv_backward(ctx, call, 0);
}

static double spmi_conv2d_flops(const spm_op_call *call, int backward)
{
    return spmi_conv_flops(call, backward, 0);
}

static size_t spmi_linear_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    return spmi_conv_scratch(ctx, call, backward, 1);
}

static size_t spmi_linear_packed(spm_context *ctx, const spm_op_call *call)
{
    return spmi_conv_packed(ctx, call, 1);
}

static void spmi_linear_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_conv_forward(ctx, call, 1);
}

static void spmi_linear_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_conv_backward(ctx, call, 1);
}

static double spmi_linear_flops(const spm_op_call *call, int backward)
{
    return spmi_conv_flops(call, backward, 1);
}

/* ---- batch norm --------------------------------------------------------------------------------------------------
 * Rows are the N H W pixels.  y = relu?((x - mean) rstd w + b + r?), rstd = 1 / sqrt(var + eps), mean and var of the batch
 * (training) or the running ones.  Backward, with dz = dy where y > 0 (all of it without ReLU), P pixels:
 *     db = sum dz,  dw = rstd sum dz (x - mean),  dr = dz,
 *     dx = w rstd (dz - db / P - (x - mean) rstd dw / P)     in training, w rstd dz in evaluation mode.
 * Ioffe and Szegedy 2015. */

typedef struct spmi_bn {
    spm_context *ctx;
    spm_op_call *call;
    int64_t rows, channels;
    int64_t chunk, chunks;        /* rows per partial sum */
    int64_t slab, slabs;          /* channels per partial sum */
    double *part[3];              /* [chunks][channels] each */
    float *coefficient[3];        /* [channels] each */
    const float *mean;
    const float *dz, *y;          /* backward: gradient to read, and y if it still wants the ReLU's mask */
    float *store;                 /* backward, first pass: where dz goes */
    const float *x;
    float *dx, *dr;
    int64_t grain;                /* rows per task of the last pass */
} spmi_bn;

/* The cut of the work, and the scratch memory's layout if there is one yet. Returns its size. */
static size_t spmi_bn_plan(spm_context *ctx, const spm_op_call *call, int backward, spmi_bn *bn)
{
    void *at = call->scratch;
    const int parts = backward ? 2 : call->training ? 3 : 0;
    size_t total = 0;
    int i;
    memset(bn, 0, sizeof *bn);
    bn->ctx = ctx;
    bn->channels = spmi_last(&call->in[0]);
    bn->rows = spm_tensor_count(&call->in[0]) / bn->channels;
    bn->chunk = SPMI_MAX((int64_t)512, spmi_ceil_div(spmi_ceil_div(bn->rows, 256), 64) * 64);
    bn->chunks = spmi_ceil_div(bn->rows, bn->chunk);
    bn->slab = 128;
    bn->slabs = spmi_ceil_div(bn->channels, bn->slab);
    bn->grain = SPMI_MAX((int64_t)1, SPMI_GRAIN / bn->channels);
    for (i = 0; i < parts; i++) {
        const size_t bytes = spmi_bytes(bn->chunks, bn->channels, sizeof(double));
        total += bytes;
        if (at) bn->part[i] = (double *)spmi_carve(&at, bytes);
    }
    for (i = 0; i < 3; i++) {
        const size_t bytes = spmi_bytes(bn->channels, 1, sizeof(float));
        total += bytes;
        if (at) bn->coefficient[i] = (float *)spmi_carve(&at, bytes);
    }
    return total;
}

static size_t spmi_batch_norm_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    spmi_bn bn;
    spm_op_call plain = *call;
    plain.scratch = NULL;
    return SPMI_MAX(spmi_bn_plan(ctx, &plain, backward, &bn), (size_t)SPMI_ALIGN);
}

static spm_status spmi_batch_norm_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    const int64_t c = spmi_last(x);
    if (x->rank < 2) return spmi_op_fail(ctx, err, "batch_norm", "x", x, "[N,..,C] with 2 to 4 axes");
    if (spmi_op_want(ctx, err, "batch_norm", "weight", &call->in[1], x, 1, c, 0, 0, 0)
        || spmi_op_want(ctx, err, "batch_norm", "bias", &call->in[2], x, 1, c, 0, 0, 0)
        || spmi_op_want(ctx, err, "batch_norm", "running_mean", &call->in[3], x, 1, c, 0, 0, 0)
        || spmi_op_want(ctx, err, "batch_norm", "running_var", &call->in[4], x, 1, c, 0, 0, 0)
        || (call->in[5].rank && spmi_op_want_like(ctx, err, "batch_norm", "residual", &call->in[5], x))) return SPM_E_SHAPE;
    spmi_op_out_like(call, x);
    spmi_op_out(call, 1, c, 0, 0, 0);
    spmi_op_out(call, 1, c, 0, 0, 0);
    return SPM_OK;
}

static void spmi_bn_moments_task(void *arg, int64_t task, int slot)
{
    const spmi_bn *bn = (const spmi_bn *)arg;
    const int64_t chunk = task / bn->slabs, c = task % bn->slabs * bn->slab, row = chunk * bn->chunk;
    const int64_t at = chunk * bn->channels + c;
    (void)slot;
    SPMI_KERNEL(bn->ctx, channel_moments, (SPMI_MIN(bn->chunk, bn->rows - row), bn->channels, SPMI_MIN(bn->slab, bn->channels - c),
                                          bn->call->in[0].data + row * bn->channels + c, bn->part[0] + at, bn->part[1] + at,
                                          bn->part[2] + at));
}

/* Joins the chunks' moments, in their order, around the first chunk's base. */
static void spmi_bn_join_moments(const spmi_bn *bn, float *mean, float *var)
{
    const double rows = (double)bn->rows;
    int64_t c, k;
    for (c = 0; c < bn->channels; c++) {
        const double base = bn->part[0][c];
        double s1 = 0.0, s2 = 0.0;
        for (k = 0; k < bn->chunks; k++) {
            const int64_t at = k * bn->channels + c;
            const double n = (double)SPMI_MIN(bn->chunk, bn->rows - k * bn->chunk), shift = bn->part[0][at] - base;
            s1 += bn->part[1][at] + n * shift;
            s2 += bn->part[2][at] + shift * (2.0 * bn->part[1][at] + n * shift);
        }
        mean[c] = (float)(base + s1 / rows);
        var[c] = (float)SPMI_MAX(0.0, (s2 - s1 * s1 / rows) / rows);
    }
}

static void spmi_bn_apply_task(void *arg, int64_t task, int slot)
{
    const spmi_bn *bn = (const spmi_bn *)arg;
    const spm_op_call *call = bn->call;
    const int64_t row = task * bn->grain, n = SPMI_MIN(bn->grain, bn->rows - row), at = row * bn->channels;
    (void)slot;
    SPMI_KERNEL(bn->ctx, bn_apply, (n, bn->channels, call->in[0].data + at, call->in[5].data ? call->in[5].data + at : NULL, bn->mean,
                                    bn->coefficient[0], call->in[2].data, call->attr.relu, call->out[0].data + at));
}

static void spmi_batch_norm_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_bn bn;
    const float *var = call->in[4].data;
    int64_t c;
    (void)spmi_bn_plan(ctx, call, 0, &bn);
    bn.call = call;
    bn.mean = call->in[3].data;
    if (call->training) {
        spm_parallel(ctx, bn.chunks * bn.slabs, spmi_bn_moments_task, &bn);
        spmi_bn_join_moments(&bn, call->out[1].data, call->out[2].data);
        bn.mean = call->out[1].data;
        var = call->out[2].data;
    } else {
        if (call->out[1].data) memcpy(call->out[1].data, call->in[3].data, (size_t)bn.channels * sizeof(float));
        if (call->out[2].data) memcpy(call->out[2].data, call->in[4].data, (size_t)bn.channels * sizeof(float));
    }
    for (c = 0; c < bn.channels; c++) {
        bn.coefficient[0][c] = (float)((double)call->in[1].data[c] / sqrt((double)var[c] + (double)call->attr.eps));
    }
    spm_parallel(ctx, spmi_ceil_div(bn.rows, bn.grain), spmi_bn_apply_task, &bn);
}

static void spmi_bn_sums_task(void *arg, int64_t task, int slot)
{
    const spmi_bn *bn = (const spmi_bn *)arg;
    const int64_t chunk = task / bn->slabs, c = task % bn->slabs * bn->slab, row = chunk * bn->chunk;
    const int64_t at = chunk * bn->channels + c, from = row * bn->channels + c;
    (void)slot;
    SPMI_KERNEL(bn->ctx, bn_back_sums, (SPMI_MIN(bn->chunk, bn->rows - row), bn->channels, SPMI_MIN(bn->slab, bn->channels - c),
                                        bn->call->in[0].data + from, bn->y ? bn->y + from : NULL, bn->dz + from, bn->mean + c,
                                        bn->store ? bn->store + from : NULL, bn->part[0] + at, bn->part[1] + at));
}

static void spmi_bn_back_task(void *arg, int64_t task, int slot)
{
    const spmi_bn *bn = (const spmi_bn *)arg;
    const spm_op_call *call = bn->call;
    const int64_t row = task * bn->grain, n = SPMI_MIN(bn->grain, bn->rows - row), at = row * bn->channels;
    (void)slot;
    SPMI_KERNEL(bn->ctx, bn_back, (n, bn->channels, bn->x ? bn->x + at : NULL, bn->y ? bn->y + at : NULL, bn->dz + at, bn->mean,
                                   bn->coefficient[0], bn->coefficient[1], bn->coefficient[2], bn->dx ? bn->dx + at : NULL,
                                   call->d_in_add[0], bn->dr ? bn->dr + at : NULL, call->d_in_add[5]));
}

/* Two passes over the data; the first one stores dz where a residual wants it, and the second reads it from there. */
static void spmi_batch_norm_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_bn bn;
    const float *var;
    float *dw = call->d_in[1].data, *db = call->d_in[2].data;
    int64_t c, k;
    int sums;
    (void)spmi_bn_plan(ctx, call, 1, &bn);
    bn.call = call;
    bn.mean = call->out[1].data ? call->out[1].data : call->in[3].data;
    var = call->out[2].data ? call->out[2].data : call->in[4].data;
    bn.dz = call->d_out.data;
    bn.y = call->attr.relu ? call->out[0].data : NULL;
    bn.dx = call->d_in[0].data;
    bn.dr = call->in[5].data ? call->d_in[5].data : NULL;
    sums = dw || db || (bn.dx && call->training);
    if (sums) {
        if (bn.dr && !call->d_in_add[5]) bn.store = bn.dr;
        spm_parallel(ctx, bn.chunks * bn.slabs, spmi_bn_sums_task, &bn);
        if (bn.store) {
            bn.dz = bn.store;
            bn.y = NULL;
            bn.dr = NULL;
        }
    }
    for (c = 0; c < bn.channels; c++) {
        const double rstd = 1.0 / sqrt((double)var[c] + (double)call->attr.eps), w = (double)call->in[1].data[c];
        double s0 = 0.0, s1 = 0.0;
        if (sums) {
            for (k = 0; k < bn.chunks; k++) {
                s0 += bn.part[0][k * bn.channels + c];
                s1 += bn.part[1][k * bn.channels + c];
            }
            if (dw) dw[c] = (float)(rstd * s1 + (call->d_in_add[1] ? (double)dw[c] : 0.0));
            if (db) db[c] = (float)(s0 + (call->d_in_add[2] ? (double)db[c] : 0.0));
        }
        bn.coefficient[0][c] = (float)(w * rstd);
        bn.coefficient[1][c] = (float)(-w * rstd * rstd * rstd * s1 / (double)bn.rows);
        bn.coefficient[2][c] = (float)(-w * rstd * s0 / (double)bn.rows);
    }
    bn.x = call->training ? call->in[0].data : NULL;
    if (bn.dx || bn.dr) spm_parallel(ctx, spmi_ceil_div(bn.rows, bn.grain), spmi_bn_back_task, &bn);
}

static double spmi_batch_norm_flops(const spm_op_call *call, int backward)
{
    return (backward ? 11.0 : 9.0) * (double)spm_tensor_count(&call->in[0]);
}

/* ---- layer norm: over the last axis of every row (Ba et al. 2016); the formulas stand at the kernels ---- */

typedef struct spmi_ln {
    spm_context *ctx;
    spm_op_call *call;
    int64_t rows, n, chunk, chunks;
    float *part; /* [chunks][2][n]: sums of dy h and dy */
} spmi_ln;

static void spmi_ln_plan(spm_context *ctx, spm_op_call *call, spmi_ln *ln)
{
    ln->ctx = ctx;
    ln->call = call;
    ln->n = spmi_last(&call->in[0]);
    ln->rows = spm_tensor_count(&call->in[0]) / ln->n;
    ln->chunk = SPMI_MIN((int64_t)256, SPMI_MAX((int64_t)16, spmi_ceil_div(ln->rows, 64)));
    ln->chunks = spmi_ceil_div(ln->rows, ln->chunk);
    ln->part = (float *)call->scratch;
}

static size_t spmi_layer_norm_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    spmi_ln ln;
    spm_op_call copy = *call;
    spmi_ln_plan(ctx, &copy, &ln);
    return backward ? spmi_bytes(ln.chunks, 2 * ln.n, sizeof(float)) : 0;
}

static spm_status spmi_layer_norm_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    const int64_t d = spmi_last(x);
    if (spmi_op_want(ctx, err, "layer_norm", "weight", &call->in[1], x, 1, d, 0, 0, 0)
        || spmi_op_want(ctx, err, "layer_norm", "bias", &call->in[2], x, 1, d, 0, 0, 0)) return SPM_E_SHAPE;
    spmi_op_out_like(call, x);
    spmi_op_out(call, 1, spm_tensor_count(x) / d, 0, 0, 0);
    spmi_op_out(call, 1, spm_tensor_count(x) / d, 0, 0, 0);
    return SPM_OK;
}

static void spmi_ln_forward_task(void *arg, int64_t task, int slot)
{
    const spmi_ln *ln = (const spmi_ln *)arg;
    const spm_op_call *call = ln->call;
    const int64_t row = task * ln->chunk, rows = SPMI_MIN(ln->chunk, ln->rows - row);
    (void)slot;
    SPMI_KERNEL(ln->ctx, layer_norm, (rows, ln->n, call->in[0].data + row * ln->n, call->in[1].data, call->in[2].data, call->attr.eps,
                                      call->out[0].data + row * ln->n, call->out[1].data ? call->out[1].data + row : NULL,
                                      call->out[2].data ? call->out[2].data + row : NULL));
}

static void spmi_layer_norm_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_ln ln;
    spmi_ln_plan(ctx, call, &ln);
    spm_parallel(ctx, ln.chunks, spmi_ln_forward_task, &ln);
}

static void spmi_ln_backward_task(void *arg, int64_t task, int slot)
{
    const spmi_ln *ln = (const spmi_ln *)arg;
    const spm_op_call *call = ln->call;
    const int64_t row = task * ln->chunk, rows = SPMI_MIN(ln->chunk, ln->rows - row);
    float *dw = call->d_in[1].data ? ln->part + task * 2 * ln->n : NULL;
    float *db = call->d_in[2].data ? ln->part + (task * 2 + 1) * ln->n : NULL;
    (void)slot;
    if (dw) memset(dw, 0, (size_t)ln->n * sizeof(float));
    if (db) memset(db, 0, (size_t)ln->n * sizeof(float));
    SPMI_KERNEL(ln->ctx, layer_norm_back, (rows, ln->n, call->in[0].data + row * ln->n, call->in[1].data, call->out[1].data + row,
                                           call->out[2].data + row, call->d_out.data + row * ln->n,
                                           call->d_in[0].data ? call->d_in[0].data + row * ln->n : NULL, call->d_in_add[0], dw, db));
}

/* One task: 128 columns of both sums, chunk by chunk. */
static void spmi_ln_join_task(void *arg, int64_t task, int slot)
{
    const spmi_ln *ln = (const spmi_ln *)arg;
    const spm_op_call *call = ln->call;
    const int64_t c = task * 128, width = SPMI_MIN((int64_t)128, ln->n - c);
    double sum[128];
    int64_t i;
    int k;
    (void)slot;
    for (k = 0; k < 2; k++) {
        float *to = call->d_in[1 + k].data;
        if (!to) continue;
        SPMI_KERNEL(ln->ctx, channel_sums, (ln->chunks, 2 * ln->n, width, ln->part + k * ln->n + c, sum));
        for (i = 0; i < width; i++) to[c + i] = (float)(sum[i] + (call->d_in_add[1 + k] ? (double)to[c + i] : 0.0));
    }
}

static void spmi_layer_norm_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_ln ln;
    spmi_ln_plan(ctx, call, &ln);
    spm_parallel(ctx, ln.chunks, spmi_ln_backward_task, &ln);
    if (call->d_in[1].data || call->d_in[2].data) spm_parallel(ctx, spmi_ceil_div(ln.n, 128), spmi_ln_join_task, &ln);
}

static double spmi_layer_norm_flops(const spm_op_call *call, int backward)
{
    return (backward ? 14.0 : 8.0) * (double)spm_tensor_count(&call->in[0]);
}

/* ---- relu, gelu ---- */

static spm_status spmi_relu_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    (void)ctx;
    (void)err;
    spmi_op_out_like(call, &call->in[0]);
    return SPM_OK;
}

static void spmi_relu_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_each_run(ctx, SPMI_EACH_RELU, spm_tensor_count(&call->in[0]), 0.0f, call->in[0].data, NULL, call->out[0].data, 0);
}

static void spmi_relu_backward(spm_context *ctx, spm_op_call *call)
{
    if (!call->d_in[0].data) return;
    spmi_each_run(ctx, SPMI_EACH_RELU_BACK, spm_tensor_count(&call->in[0]), 0.0f, call->out[0].data, call->d_out.data,
                  call->d_in[0].data, call->d_in_add[0]);
}

static double spmi_relu_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return (double)spm_tensor_count(&call->in[0]);
}

/* Gaussian error linear unit, exact form x Phi(x) (Hendrycks and Gimpel 2016). */
static spm_status spmi_gelu_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_relu_infer(ctx, call, err);
}

static void spmi_gelu_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_each_run(ctx, SPMI_EACH_GELU, spm_tensor_count(&call->in[0]), 0.0f, call->in[0].data, NULL, call->out[0].data, 0);
}

static void spmi_gelu_backward(spm_context *ctx, spm_op_call *call)
{
    if (!call->d_in[0].data) return;
    spmi_each_run(ctx, SPMI_EACH_GELU_BACK, spm_tensor_count(&call->in[0]), 0.0f, call->in[0].data, call->d_out.data,
                  call->d_in[0].data, call->d_in_add[0]);
}

static double spmi_gelu_flops(const spm_op_call *call, int backward)
{
    return (backward ? 55.0 : 50.0) * (double)spm_tensor_count(&call->in[0]);
}

/* ---- softmax over the last axis; dx = y (dy - dy . y) ---- */

typedef struct spmi_row_job {
    spm_context *ctx;
    spm_op_call *call;
    int64_t rows, n, grain;
    int backward;
} spmi_row_job;

static spm_status spmi_softmax_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_relu_infer(ctx, call, err);
}

static void spmi_softmax_task(void *arg, int64_t task, int slot)
{
    const spmi_row_job *job = (const spmi_row_job *)arg;
    const spm_op_call *call = job->call;
    const int64_t row = task * job->grain, rows = SPMI_MIN(job->grain, job->rows - row), at = row * job->n;
    (void)slot;
    if (job->backward) {
        SPMI_KERNEL(job->ctx, softmax_back, (rows, job->n, 1.0f, call->out[0].data + at, call->d_out.data + at,
                                             call->d_in[0].data + at, call->d_in_add[0]));
    } else {
        SPMI_KERNEL(job->ctx, softmax, (rows, job->n, 1.0f, call->in[0].data + at, call->out[0].data + at));
    }
}

static void spmi_softmax_run(spm_context *ctx, spm_op_call *call, int backward)
{
    spmi_row_job job;
    job.ctx = ctx;
    job.call = call;
    job.n = spmi_last(&call->in[0]);
    job.rows = spm_tensor_count(&call->in[0]) / job.n;
    job.grain = SPMI_MAX((int64_t)1, SPMI_GRAIN / 4 / job.n);
    job.backward = backward;
    spm_parallel(ctx, spmi_ceil_div(job.rows, job.grain), spmi_softmax_task, &job);
}

static void spmi_softmax_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_softmax_run(ctx, call, 0);
}

static void spmi_softmax_backward(spm_context *ctx, spm_op_call *call)
{
    if (call->d_in[0].data) spmi_softmax_run(ctx, call, 1);
}

static double spmi_softmax_flops(const spm_op_call *call, int backward)
{
    return (backward ? 4.0 : 20.0) * (double)spm_tensor_count(&call->in[0]);
}

/* ---- add, mean2 ---- */

static spm_status spmi_add_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    if (spmi_op_want_like(ctx, err, "add", "b", &call->in[1], &call->in[0])) return SPM_E_SHAPE;
    spmi_op_out_like(call, &call->in[0]);
    return SPM_OK;
}

static void spmi_add_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_each_run(ctx, SPMI_EACH_SUM, spm_tensor_count(&call->in[0]), 1.0f, call->in[0].data, call->in[1].data, call->out[0].data, 0);
}

static void spmi_add_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_op_pass_gradient(ctx, call, 0, 1.0f);
    spmi_op_pass_gradient(ctx, call, 1, 1.0f);
}

static double spmi_add_flops(const spm_op_call *call, int backward)
{
    return (backward ? 0.0 : 1.0) * (double)spm_tensor_count(&call->in[0]);
}

static spm_status spmi_mean2_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    if (spmi_op_want_like(ctx, err, "mean2", "b", &call->in[1], &call->in[0])) return SPM_E_SHAPE;
    spmi_op_out_like(call, &call->in[0]);
    return SPM_OK;
}

static void spmi_mean2_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_each_run(ctx, SPMI_EACH_SUM, spm_tensor_count(&call->in[0]), 0.5f, call->in[0].data, call->in[1].data, call->out[0].data, 0);
}

static void spmi_mean2_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_op_pass_gradient(ctx, call, 0, 0.5f);
    spmi_op_pass_gradient(ctx, call, 1, 0.5f);
}

static double spmi_mean2_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return 2.0 * (double)spm_tensor_count(&call->in[0]);
}

/* ---- dropout (Srivastava et al. 2014), drop path (Huang et al. 2016) --------------------------------------------------
 * Draws are keyed by (seed, stream, example id, element), so they are the same for any batching, and the backward pass
 * draws again instead of storing a mask. */

typedef struct spmi_drop {
    spm_context *ctx;
    spm_op_call *call;
    const float *from;
    float *to;
    int64_t n;        /* elements per example */
    int64_t grain, parts;
    int add, whole;   /* whole: one draw decides about the example */
} spmi_drop;

static spm_status spmi_drop_infer(spm_context *ctx, spm_op_call *call, spm_error *err, const char *op)
{
    const float p = call->attr.p;
    if (!(p >= 0.0f && p <= 1.0f)) return spmi_fail(ctx, err, SPM_E_ARGUMENT, "%s: p is %g, but must lie in 0..1", op, (double)p);
    spmi_op_out_like(call, &call->in[0]);
    return SPM_OK;
}

static void spmi_drop_task(void *arg, int64_t task, int slot)
{
    const spmi_drop *drop = (const spmi_drop *)arg;
    const spm_op_call *call = drop->call;
    const double p = (double)call->attr.p;
    const int64_t example = task / drop->parts, start = task % drop->parts * drop->grain;
    const int64_t n = SPMI_MIN(drop->grain, drop->n - start), at = example * drop->n + start;
    const uint64_t id = call->example ? (uint64_t)call->example[example] : (uint64_t)example;
    const uint64_t key = spm_random_key(call->seed, call->stream, id), limit = (uint64_t)(p * 4294967296.0);
    const float keep = p < 1.0 ? (float)(1.0 / (1.0 - p)) : 0.0f;
    int64_t i;
    int k;
    (void)slot;
    if (drop->whole) {
        const float s = spm_random_u32(key, 0, 0) >= limit ? keep : 0.0f;
        SPMI_KERNEL(drop->ctx, scale, (n, s, drop->from + at, drop->to + at, drop->add));
        return;
    }
    for (i = 0; i < n; i += 4) {
        uint32_t words[4];
        spmi_philox(key, 0, (uint64_t)((start + i) / 4), words); /* grain is a multiple of 4 */
        for (k = 0; k < 4 && i + k < n; k++) {
            const float v = words[k] >= limit ? drop->from[at + i + k] * keep : 0.0f;
            drop->to[at + i + k] = drop->add ? drop->to[at + i + k] + v : v;
        }
    }
}

static void spmi_drop_run(spm_context *ctx, spm_op_call *call, const float *from, float *to, int add, int whole)
{
    spmi_drop drop;
    const int64_t count = spm_tensor_count(&call->in[0]);
    if (!to) return;
    if (!call->training || !(call->attr.p > 0.0f)) {
        spmi_each_run(ctx, SPMI_EACH_SCALE, count, 1.0f, from, NULL, to, add);
        return;
    }
    drop.ctx = ctx;
    drop.call = call;
    drop.from = from;
    drop.to = to;
    drop.n = count / call->in[0].shape[0];
    drop.grain = SPMI_GRAIN / 4;
    drop.parts = spmi_ceil_div(drop.n, drop.grain);
    drop.add = add;
    drop.whole = whole;
    spm_parallel(ctx, call->in[0].shape[0] * drop.parts, spmi_drop_task, &drop);
}

static spm_status spmi_dropout_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_drop_infer(ctx, call, err, "dropout");
}

static void spmi_dropout_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_drop_run(ctx, call, call->in[0].data, call->out[0].data, 0, 0);
}

static void spmi_dropout_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_drop_run(ctx, call, call->d_out.data, call->d_in[0].data, call->d_in_add[0], 0);
}

static double spmi_dropout_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return (double)spm_tensor_count(&call->in[0]);
}

static spm_status spmi_drop_path_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_drop_infer(ctx, call, err, "drop_path");
}

static void spmi_drop_path_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_drop_run(ctx, call, call->in[0].data, call->out[0].data, 0, 1);
}

static void spmi_drop_path_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_drop_run(ctx, call, call->d_out.data, call->d_in[0].data, call->d_in_add[0], 1);
}

static double spmi_drop_path_flops(const spm_op_call *call, int backward)
{
    return spmi_dropout_flops(call, backward);
}

/* ---- pooling -------------------------------------------------------------------------------------------------------
 * H' = floor((H + 2 padding - kernel) / stride) + 1, as PyTorch without ceil_mode.  max_pool sees pads as -infinity, keeps the
 * first of equal entries and lets not-a-number through; avg_pool counts pads as zeros.  out[1] of max_pool holds bytes:
 * for every output pixel the window position (kh KW + kw) of each channel's maximum, padded to whole floats. */

typedef struct spmi_pooling_job {
    spm_context *ctx;
    spm_op_call *call;
    spmi_pool_cut cut;
    int max, backward;
} spmi_pooling_job;

static void spmi_pooling_plan(spm_context *ctx, spm_op_call *call, int max, int backward, spmi_pooling_job *job)
{
    int i;
    job->ctx = ctx;
    job->call = call;
    job->max = max;
    job->backward = backward;
    job->cut.channels = call->in[0].shape[3];
    for (i = 0; i < 2; i++) {
        job->cut.kernel[i] = call->attr.kernel[i];
        job->cut.stride[i] = SPMI_MAX(call->attr.stride[i], (int64_t)1);
        job->cut.padding[i] = call->attr.padding[i];
        job->cut.in[i] = call->in[0].shape[1 + i];
        job->cut.out[i] = call->out[0].shape[1 + i];
    }
}

static spm_status spmi_pooling_infer(spm_context *ctx, spm_op_call *call, spm_error *err, const char *op, int max)
{
    const spm_tensor *x = &call->in[0];
    const spm_op_attr *attr = &call->attr;
    int64_t size[2];
    int i;
    if (x->rank != 4) return spmi_op_fail(ctx, err, op, "x", x, "[N,H,W,C]");
    for (i = 0; i < 2; i++) {
        const int64_t k = attr->kernel[i], s = SPMI_MAX(attr->stride[i], (int64_t)1), p = attr->padding[i];
        if (k < 1 || attr->stride[i] < 0 || p < 0 || p > k / 2) {
            return spmi_fail(ctx, err, SPM_E_ARGUMENT, "%s: kernel %lld, stride %lld, padding %lld; the kernel must be at least 1 and "
                             "the padding at most half of it", op, (long long)k, (long long)attr->stride[i], (long long)p);
        }
        if (x->shape[1 + i] + 2 * p < k) {
            char text[96];
            return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: a window of [%lld,%lld] with padding [%lld,%lld] does not fit into x %s", op,
                             (long long)attr->kernel[0], (long long)attr->kernel[1], (long long)attr->padding[0],
                             (long long)attr->padding[1], spm_tensor_shape_text(x, text, sizeof text));
        }
        size[i] = (x->shape[1 + i] + 2 * p - k) / s + 1;
    }
    if (max && (attr->kernel[0] > 256 || attr->kernel[1] > 256 || attr->kernel[0] * attr->kernel[1] > 256)) {
        return spmi_fail(ctx, err, SPM_E_UNSUPPORTED, "%s: a window of [%lld,%lld] has more than 256 pixels; pool in two steps", op,
                         (long long)attr->kernel[0], (long long)attr->kernel[1]);
    }
    spmi_op_out(call, 4, x->shape[0], size[0], size[1], x->shape[3]);
    if (max) spmi_op_out(call, 4, x->shape[0], size[0], size[1], (x->shape[3] + 3) / 4);
    return SPM_OK;
}

/* One task: one row of output pixels (forward) or of input pixels (backward). */
static void spmi_pooling_task(void *arg, int64_t task, int slot)
{
    const spmi_pooling_job *job = (const spmi_pooling_job *)arg;
    const spmi_pool_cut *cut = &job->cut;
    const spm_op_call *call = job->call;
    const int64_t rows = job->backward ? cut->in[0] : cut->out[0], n = task / rows, row = task % rows;
    const int64_t out_row = cut->out[1] * cut->channels, in_row = cut->in[1] * cut->channels;
    const int64_t arg_row = cut->out[1] * ((cut->channels + 3) / 4 * 4);
    const float factor = 1.0f / (float)(cut->kernel[0] * cut->kernel[1]);
    unsigned char *place = job->max && call->out[1].data ? (unsigned char *)(void *)call->out[1].data + n * cut->out[0] * arg_row : NULL;
    (void)slot;
    if (job->backward) {
        SPMI_KERNEL(job->ctx, pool_back, (cut, row, call->d_out.data + n * cut->out[0] * out_row, place, factor,
                                          call->d_in[0].data + task * in_row, call->d_in_add[0]));
    } else if (job->max) {
        SPMI_KERNEL(job->ctx, max_pool, (cut, row, call->in[0].data + n * cut->in[0] * in_row, call->out[0].data + task * out_row,
                                         place ? place + row * arg_row : NULL));
    } else {
        SPMI_KERNEL(job->ctx, avg_pool, (cut, row, call->in[0].data + n * cut->in[0] * in_row, factor, call->out[0].data + task * out_row));
    }
}

static void spmi_pooling_run(spm_context *ctx, spm_op_call *call, int max, int backward)
{
    spmi_pooling_job job;
    if (backward && !call->d_in[0].data) return;
    spmi_pooling_plan(ctx, call, max, backward, &job);
    spm_parallel(ctx, call->in[0].shape[0] * (backward ? job.cut.in[0] : job.cut.out[0]), spmi_pooling_task, &job);
}

static double spmi_max_pool_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return (double)spm_tensor_count(&call->out[0]) * (double)call->attr.kernel[0] * (double)call->attr.kernel[1];
}

static spm_status spmi_max_pool_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_pooling_infer(ctx, call, err, "max_pool", 1);
}

static void spmi_max_pool_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_pooling_run(ctx, call, 1, 0);
}

static void spmi_max_pool_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_pooling_run(ctx, call, 1, 1);
}

static double spmi_avg_pool_flops(const spm_op_call *call, int backward)
{
    return spmi_max_pool_flops(call, backward);
}

static spm_status spmi_avg_pool_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    return spmi_pooling_infer(ctx, call, err, "avg_pool", 0);
}

static void spmi_avg_pool_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_pooling_run(ctx, call, 0, 0);
}

static void spmi_avg_pool_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_pooling_run(ctx, call, 0, 1);
}

/* ---- global average pool: y = mean over H and W, dx = dy / (H W) ---- */

#define SPMI_POOL_SLAB 128

typedef struct spmi_global {
    spm_context *ctx;
    spm_op_call *call;
    int64_t pixels, channels, slabs;
} spmi_global;

static spmi_global spmi_global_plan(spm_context *ctx, spm_op_call *call)
{
    spmi_global job;
    job.ctx = ctx;
    job.call = call;
    job.pixels = call->in[0].shape[1] * call->in[0].shape[2];
    job.channels = call->in[0].shape[3];
    job.slabs = spmi_ceil_div(job.channels, SPMI_POOL_SLAB);
    return job;
}

static spm_status spmi_global_pool_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    if (x->rank != 4) return spmi_op_fail(ctx, err, "global_pool", "x", x, "[N,H,W,C]");
    spmi_op_out(call, 2, x->shape[0], x->shape[3], 0, 0);
    return SPM_OK;
}

static void spmi_global_forward_task(void *arg, int64_t task, int slot)
{
    const spmi_global *job = (const spmi_global *)arg;
    const int64_t n = task / job->slabs, c = task % job->slabs * SPMI_POOL_SLAB;
    const int64_t width = SPMI_MIN((int64_t)SPMI_POOL_SLAB, job->channels - c);
    float *y = job->call->out[0].data + n * job->channels + c;
    double sum[SPMI_POOL_SLAB];
    int64_t i;
    (void)slot;
    SPMI_KERNEL(job->ctx, channel_sums, (job->pixels, job->channels, width, job->call->in[0].data + n * job->pixels * job->channels + c, sum));
    for (i = 0; i < width; i++) y[i] = (float)(sum[i] / (double)job->pixels);
}

static void spmi_global_pool_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_global job = spmi_global_plan(ctx, call);
    spm_parallel(ctx, call->in[0].shape[0] * job.slabs, spmi_global_forward_task, &job);
}

static void spmi_global_backward_task(void *arg, int64_t task, int slot)
{
    const spmi_global *job = (const spmi_global *)arg;
    const float s = (float)(1.0 / (double)job->pixels);
    int64_t p;
    (void)slot;
    for (p = 0; p < job->pixels; p++) {
        SPMI_KERNEL(job->ctx, scale, (job->channels, s, job->call->d_out.data + task * job->channels,
                                      job->call->d_in[0].data + (task * job->pixels + p) * job->channels, job->call->d_in_add[0]));
    }
}

static void spmi_global_pool_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_global job = spmi_global_plan(ctx, call);
    if (call->d_in[0].data) spm_parallel(ctx, call->in[0].shape[0], spmi_global_backward_task, &job);
}

static double spmi_global_pool_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return (double)spm_tensor_count(&call->in[0]);
}

/* ---- shortcut_a: the identity of He et al. 2016, option A: every stride-th pixel, new channels are 0 on both sides
 * ((C' - C) / 2 in front) ---- */

typedef struct spmi_shortcut {
    spm_context *ctx;
    spm_op_call *call;
    int64_t stride[2], front;
    int backward;
} spmi_shortcut;

static spm_status spmi_shortcut_a_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    const int64_t sh = SPMI_MAX(call->attr.stride[0], (int64_t)1), sw = SPMI_MAX(call->attr.stride[1], (int64_t)1);
    if (x->rank != 4) return spmi_op_fail(ctx, err, "shortcut_a", "x", x, "[N,H,W,C]");
    if (call->attr.groups < x->shape[3]) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "shortcut_a: x has %lld channels, y would have %lld (attr.groups); it must not have less",
                         (long long)x->shape[3], (long long)call->attr.groups);
    }
    spmi_op_out(call, 4, x->shape[0], spmi_ceil_div(x->shape[1], sh), spmi_ceil_div(x->shape[2], sw), call->attr.groups);
    return SPM_OK;
}

/* One task: one row of output pixels (forward), or one row of input pixels (backward). */
static void spmi_shortcut_task(void *arg, int64_t task, int slot)
{
    const spmi_shortcut *job = (const spmi_shortcut *)arg;
    const spm_op_call *call = job->call;
    const spm_tensor *x = &call->in[0], *y = &call->out[0];
    const int64_t c = x->shape[3], wide = y->shape[3], sh = job->stride[0], sw = job->stride[1];
    int64_t w;
    (void)slot;
    if (!job->backward) {
        const float *from = x->data + (task / y->shape[1] * x->shape[1] + task % y->shape[1] * sh) * x->shape[2] * c;
        float *to = y->data + task * y->shape[2] * wide;
        memset(to, 0, (size_t)(y->shape[2] * wide) * sizeof(float));
        for (w = 0; w < y->shape[2]; w++) memcpy(to + w * wide + job->front, from + w * sw * c, (size_t)c * sizeof(float));
    } else {
        const int64_t h = task % x->shape[1];
        float *to = call->d_in[0].data + task * x->shape[2] * c;
        const float *from = call->d_out.data + (task / x->shape[1] * y->shape[1] + h / sh) * y->shape[2] * wide + job->front;
        if (!call->d_in_add[0]) memset(to, 0, (size_t)(x->shape[2] * c) * sizeof(float));
        if (h % sh) return;
        for (w = 0; w < y->shape[2]; w++) SPMI_KERNEL(job->ctx, scale, (c, 1.0f, from + w * wide, to + w * sw * c, 1));
    }
}

static void spmi_shortcut_run(spm_context *ctx, spm_op_call *call, int backward)
{
    spmi_shortcut job;
    job.ctx = ctx;
    job.call = call;
    job.stride[0] = SPMI_MAX(call->attr.stride[0], (int64_t)1);
    job.stride[1] = SPMI_MAX(call->attr.stride[1], (int64_t)1);
    job.front = (call->out[0].shape[3] - call->in[0].shape[3]) / 2;
    job.backward = backward;
    spm_parallel(ctx, call->in[0].shape[0] * (backward ? call->in[0].shape[1] : call->out[0].shape[1]), spmi_shortcut_task, &job);
}

static void spmi_shortcut_a_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_shortcut_run(ctx, call, 0);
}

static void spmi_shortcut_a_backward(spm_context *ctx, spm_op_call *call)
{
    if (call->d_in[0].data) spmi_shortcut_run(ctx, call, 1);
}

static double spmi_shortcut_a_flops(const spm_op_call *call, int backward)
{
    (void)call;
    (void)backward;
    return 0.0;
}

/* ---- multi-head self-attention (Vaswani et al. 2017) --------------------------------------------------------------------
 * Per example and head, with d = D / heads and s = 1 / sqrt(d):  P = softmax(s q k^T),  y = P v.  Backward:
 *     dv = P^T dy,  dP = dy v^T,  dS = s P (dP - rowsum(dP P)),  dq = dS k,  dk = dS^T q.
 * One task does one head of one example; its products run inside the task. */

typedef struct spmi_attention {
    spm_context *ctx;
    spm_op_call *call;
    int64_t tokens, width, head, heads;
    float scale;
    size_t matrix, slot_bytes;  /* bytes of a [T,T] matrix; of one slot's scratch (such a matrix, then the product's) */
} spmi_attention;

static void spmi_attention_plan(spm_context *ctx, const spm_op_call *call, spmi_attention *job)
{
    const int64_t t = call->in[0].shape[1];
    size_t product;
    memset(job, 0, sizeof *job);
    job->ctx = ctx;
    job->tokens = t;
    job->width = call->in[0].shape[2] / 3;
    job->heads = call->attr.heads;
    job->head = job->width / job->heads;
    job->scale = (float)(1.0 / sqrt((double)job->head));
    job->matrix = spmi_bytes(t, t, sizeof(float));
    product = SPMI_MAX(spmi_gemm_scratch(ctx, t, t, job->head), spmi_gemm_scratch(ctx, t, job->head, t));
    job->slot_bytes = job->matrix + spmi_bytes((int64_t)product, 1, 1);
}

static size_t spmi_attention_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    spmi_attention job;
    (void)backward;
    spmi_attention_plan(ctx, call, &job);
    return (size_t)ctx->threads * job.slot_bytes;
}

static spm_status spmi_attention_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    const int64_t heads = call->attr.heads;
    int64_t d;
    if (x->rank != 3 || x->shape[2] % 3) return spmi_op_fail(ctx, err, "attention", "qkv", x, "[N,T,3D]");
    d = x->shape[2] / 3;
    if (heads < 1 || d % heads) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "attention: %lld heads do not divide the width %lld", (long long)heads, (long long)d);
    }
    spmi_op_out(call, 3, x->shape[0], x->shape[1], d, 0);
    spmi_op_out(call, 4, x->shape[0], heads, x->shape[1], x->shape[1]);
    return SPM_OK;
}

/* c[m,n] = (or +=) a b in `scratch`; (row, column) strides of a and b. */
static void spmi_attention_product(spm_context *ctx, int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                                   const float *b, int64_t b_row, int64_t b_col, float *c, int64_t c_row, int add, void *scratch)
{
    spmi_gemm g = SPM_ZERO;
    g.m = m;
    g.n = n;
    g.k = k;
    g.a = a;
    g.a_row = a_row;
    g.a_col = a_col;
    g.b = b;
    g.b_row = b_row;
    g.b_col = b_col;
    g.c = c;
    g.c_row = c_row;
    g.alpha = 1.0f;
    g.accumulate = add;
    spmi_gemm_serial(ctx, &g, scratch);
}

static void spmi_attention_forward_task(void *arg, int64_t task, int slot)
{
    const spmi_attention *job = (const spmi_attention *)arg;
    const spm_op_call *call = job->call;
    const int64_t t = job->tokens, d = job->width, hd = job->head, n = task / job->heads, h = task % job->heads;
    const float *q = call->in[0].data + n * t * 3 * d + h * hd, *k = q + d, *v = k + d;
    float *y = call->out[0].data + n * t * d + h * hd;
    char *scratch = (char *)call->scratch + (size_t)slot * job->slot_bytes;
    float *probs = call->out[1].data ? call->out[1].data + task * t * t : (float *)(void *)scratch;
    void *work = scratch + job->matrix;
    spmi_attention_product(job->ctx, t, t, hd, q, 3 * d, 1, k, 1, 3 * d, probs, t, 0, work);
    SPMI_KERNEL(job->ctx, softmax, (t, t, job->scale, probs, probs));
    spmi_attention_product(job->ctx, t, hd, t, probs, t, 1, v, 3 * d, 1, y, d, 0, work);
}

static void spmi_attention_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_attention job;
    spmi_attention_plan(ctx, call, &job);
    job.call = call;
    spm_parallel(ctx, call->in[0].shape[0] * job.heads, spmi_attention_forward_task, &job);
}

static void spmi_attention_backward_task(void *arg, int64_t task, int slot)
{
    const spmi_attention *job = (const spmi_attention *)arg;
    const spm_op_call *call = job->call;
    const int64_t t = job->tokens, d = job->width, hd = job->head, n = task / job->heads, h = task % job->heads;
    const float *q = call->in[0].data + n * t * 3 * d + h * hd, *k = q + d, *v = k + d;
    const float *dy = call->d_out.data + n * t * d + h * hd, *probs = call->out[1].data + task * t * t;
    float *dq = call->d_in[0].data + n * t * 3 * d + h * hd, *dk = dq + d, *dv = dk + d;
    char *scratch = (char *)call->scratch + (size_t)slot * job->slot_bytes;
    float *ds = (float *)(void *)scratch;
    void *work = scratch + job->matrix;
    const int add = call->d_in_add[0];
    spmi_attention_product(job->ctx, t, hd, t, probs, 1, t, dy, d, 1, dv, 3 * d, add, work);
    spmi_attention_product(job->ctx, t, t, hd, dy, d, 1, v, 1, 3 * d, ds, t, 0, work);
    SPMI_KERNEL(job->ctx, softmax_back, (t, t, job->scale, probs, ds, ds, 0));
    spmi_attention_product(job->ctx, t, hd, t, ds, t, 1, k, 3 * d, 1, dq, 3 * d, add, work);
    spmi_attention_product(job->ctx, t, hd, t, ds, 1, t, q, 3 * d, 1, dk, 3 * d, add, work);
}

static void spmi_attention_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_attention job;
    if (!call->d_in[0].data) return;
    spmi_attention_plan(ctx, call, &job);
    job.call = call;
    spm_parallel(ctx, call->in[0].shape[0] * job.heads, spmi_attention_backward_task, &job);
}

static double spmi_attention_flops(const spm_op_call *call, int backward)
{
    const double n = (double)call->in[0].shape[0], t = (double)call->in[0].shape[1], d = (double)(call->in[0].shape[2] / 3);
    return n * t * t * ((backward ? 8.0 : 4.0) * d + (backward ? 4.0 : 20.0) * (double)call->attr.heads);
}

/* ---- tokens: class tokens in front of the patches, positions added to all.  The position's gradient is the sum of dy over
 * the batch, the gradients of the class tokens and of the distillation tokens behind them its first rows. ---- */

typedef struct spmi_tokens {
    spm_context *ctx;
    spm_op_call *call;
    int64_t batch, classes, extra, patches, width; /* class tokens, those and the distillation tokens, H W, D */
} spmi_tokens;

static spmi_tokens spmi_tokens_plan(spm_context *ctx, spm_op_call *call)
{
    spmi_tokens job;
    job.ctx = ctx;
    job.call = call;
    job.batch = call->in[0].shape[0];
    job.classes = call->in[1].shape[0];
    job.extra = job.classes + (call->in[3].rank ? call->in[3].shape[0] : 0);
    job.patches = call->in[0].shape[1] * call->in[0].shape[2];
    job.width = call->in[0].shape[3];
    return job;
}

static spm_status spmi_tokens_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    int64_t all;
    if (x->rank != 4) return spmi_op_fail(ctx, err, "tokens", "x", x, "[N,H,W,D]");
    if (spmi_op_want(ctx, err, "tokens", "class", &call->in[1], x, 2, call->in[1].shape[0], x->shape[3], 0, 0)) return SPM_E_SHAPE;
    if (call->in[3].rank && spmi_op_want(ctx, err, "tokens", "distillation", &call->in[3], x, 2, call->in[3].shape[0], x->shape[3], 0, 0)) return SPM_E_SHAPE;
    all = spmi_tokens_plan(ctx, call).extra + x->shape[1] * x->shape[2];
    if (spmi_op_want(ctx, err, "tokens", "position", &call->in[2], x, 2, all, x->shape[3], 0, 0)) return SPM_E_SHAPE;
    spmi_op_out(call, 3, x->shape[0], all, x->shape[3], 0);
    return SPM_OK;
}

static void spmi_tokens_forward_task(void *arg, int64_t task, int slot)
{
    const spmi_tokens *job = (const spmi_tokens *)arg;
    const spm_op_call *call = job->call;
    const int64_t first = job->classes * job->width, head = job->extra * job->width, rest = job->patches * job->width;
    const float *position = call->in[2].data;
    float *y = call->out[0].data + task * (head + rest);
    (void)slot;
    SPMI_KERNEL(job->ctx, sum_of, (first, 1.0f, call->in[1].data, position, y));
    if (head > first) SPMI_KERNEL(job->ctx, sum_of, (head - first, 1.0f, call->in[3].data, position + first, y + first));
    SPMI_KERNEL(job->ctx, sum_of, (rest, 1.0f, call->in[0].data + task * rest, position + head, y + head));
}

static void spmi_tokens_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_tokens job = spmi_tokens_plan(ctx, call);
    spm_parallel(ctx, job.batch, spmi_tokens_forward_task, &job);
}

static void spmi_tokens_copy_task(void *arg, int64_t task, int slot)
{
    const spmi_tokens *job = (const spmi_tokens *)arg;
    const spm_op_call *call = job->call;
    const int64_t head = job->extra * job->width, rest = job->patches * job->width;
    (void)slot;
    SPMI_KERNEL(job->ctx, scale, (rest, 1.0f, call->d_out.data + task * (head + rest) + head, call->d_in[0].data + task * rest,
                                  call->d_in_add[0]));
}

/* One task: 128 columns of [K + H W] x D, summed over the batch. */
static void spmi_tokens_sum_task(void *arg, int64_t task, int slot)
{
    const spmi_tokens *job = (const spmi_tokens *)arg;
    const spm_op_call *call = job->call;
    const int64_t first = job->classes * job->width, head = job->extra * job->width, all = head + job->patches * job->width;
    const int64_t at = task * 128, width = SPMI_MIN((int64_t)128, all - at);
    float *d_class = call->d_in[1].data, *d_position = call->d_in[2].data, *d_distillation = call->d_in[3].data;
    double sum[128];
    int64_t i;
    (void)slot;
    SPMI_KERNEL(job->ctx, channel_sums, (job->batch, all, width, call->d_out.data + at, sum));
    for (i = 0; i < width; i++) {
        const int64_t k = at + i;
        if (d_class && k < first) d_class[k] = (float)(sum[i] + (call->d_in_add[1] ? (double)d_class[k] : 0.0));
        if (d_distillation && k >= first && k < head) {
            d_distillation[k - first] = (float)(sum[i] + (call->d_in_add[3] ? (double)d_distillation[k - first] : 0.0));
        }
        if (d_position) d_position[at + i] = (float)(sum[i] + (call->d_in_add[2] ? (double)d_position[at + i] : 0.0));
    }
}

static void spmi_tokens_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_tokens job = spmi_tokens_plan(ctx, call);
    const int64_t summed = (call->d_in[2].data ? job.extra + job.patches : job.extra) * job.width;
    if (call->d_in[0].data) spm_parallel(ctx, job.batch, spmi_tokens_copy_task, &job);
    if (call->d_in[1].data || call->d_in[2].data || call->d_in[3].data) spm_parallel(ctx, spmi_ceil_div(summed, 128), spmi_tokens_sum_task, &job);
}

static double spmi_tokens_flops(const spm_op_call *call, int backward)
{
    (void)backward;
    return (double)spm_tensor_count(&call->out[0]);
}

/* ---- token: one token of each example ---- */

static spm_status spmi_token_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    if (x->rank != 3) return spmi_op_fail(ctx, err, "token", "x", x, "[N,T,D]");
    if (call->attr.index < 0 || call->attr.index >= x->shape[1]) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "token: index %lld is outside of 0..%lld", (long long)call->attr.index,
                         (long long)x->shape[1] - 1);
    }
    spmi_op_out(call, 2, x->shape[0], x->shape[2], 0, 0);
    return SPM_OK;
}

static void spmi_token_forward(spm_context *ctx, spm_op_call *call)
{
    const int64_t t = call->in[0].shape[1], d = call->in[0].shape[2];
    int64_t n;
    (void)ctx;
    for (n = 0; n < call->in[0].shape[0]; n++) {
        memcpy(call->out[0].data + n * d, call->in[0].data + (n * t + call->attr.index) * d, (size_t)d * sizeof(float));
    }
}

static void spmi_token_backward(spm_context *ctx, spm_op_call *call)
{
    const int64_t t = call->in[0].shape[1], d = call->in[0].shape[2];
    float *dx = call->d_in[0].data;
    int64_t n;
    if (!dx) return;
    if (!call->d_in_add[0]) memset(dx, 0, (size_t)spm_tensor_count(&call->in[0]) * sizeof(float));
    for (n = 0; n < call->in[0].shape[0]; n++) {
        SPMI_KERNEL(ctx, scale, (d, 1.0f, call->d_out.data + n * d, dx + (n * t + call->attr.index) * d, 1));
    }
}

static double spmi_token_flops(const spm_op_call *call, int backward)
{
    (void)call;
    (void)backward;
    return 0.0;
}

/* ---- cross-entropy of soft targets ---------------------------------------------------------------------------------------
 * t' = (1 - e) target + e / C with e = label_smoothing;  loss_n = sum_c t'_c (log sum_j e^x_j - x_c);
 * loss = sum_n weight_n loss_n;  dx_c = dloss weight_n (probs_c sum_j t'_j - t'_c).  Rows are shifted by their largest logit, and
 * the sums run in double. */

static spm_status spmi_cross_entropy_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *x = &call->in[0];
    const float e = call->attr.label_smoothing;
    if (x->rank != 2) return spmi_op_fail(ctx, err, "cross_entropy", "logits", x, "[N,C]");
    if (spmi_op_want_like(ctx, err, "cross_entropy", "target", &call->in[1], x)
        || (call->in[2].rank && spmi_op_want(ctx, err, "cross_entropy", "weight", &call->in[2], x, 1, x->shape[0], 0, 0, 0))) return SPM_E_SHAPE;
    if (!(e >= 0.0f && e <= 1.0f)) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "cross_entropy: label_smoothing is %g, but must lie in 0..1", (double)e);
    }
    spmi_op_out(call, 1, 1, 0, 0, 0);
    spmi_op_out(call, 1, x->shape[0], 0, 0, 0);
    spmi_op_out(call, 2, x->shape[0], x->shape[1], 0, 0);
    return SPM_OK;
}

static size_t spmi_cross_entropy_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    (void)ctx;
    return backward ? 0 : spmi_bytes(call->in[0].shape[0], 1, sizeof(double));
}

static void spmi_cross_entropy_forward_task(void *arg, int64_t n, int slot)
{
    const spm_op_call *call = (const spm_op_call *)arg;
    const int64_t classes = call->in[0].shape[1];
    const float *x = call->in[0].data + n * classes, *target = call->in[1].data + n * classes;
    float *probs = call->out[2].data ? call->out[2].data + n * classes : NULL;
    const double e = (double)call->attr.label_smoothing;
    double top = (double)x[0], sum = 0.0, lse, loss = 0.0;
    int64_t c;
    (void)slot;
    for (c = 1; c < classes; c++) top = (double)x[c] > top ? (double)x[c] : top;
    for (c = 0; c < classes; c++) sum += exp((double)x[c] - top);
    lse = top + log(sum);
    for (c = 0; c < classes; c++) {
        const double t = (1.0 - e) * (double)target[c] + e / (double)classes, gap = lse - (double)x[c];
        if (t > 0.0 || t < 0.0) loss += t * gap; /* an impossible class (logit -infinity) of no weight costs nothing */
        if (probs) probs[c] = (float)exp(-gap);
    }
    if (lse != lse) loss = lse;
    if (call->out[1].data) call->out[1].data[n] = (float)loss;
    ((double *)call->scratch)[n] = loss;
}

static void spmi_cross_entropy_forward(spm_context *ctx, spm_op_call *call)
{
    const int64_t rows = call->in[0].shape[0];
    const double *loss = (const double *)call->scratch;
    double total = 0.0;
    int64_t n;
    spm_parallel(ctx, rows, spmi_cross_entropy_forward_task, call);
    for (n = 0; n < rows; n++) total += call->in[2].data ? (double)call->in[2].data[n] * loss[n] : loss[n] / (double)rows;
    call->out[0].data[0] = (float)total;
}

static void spmi_cross_entropy_backward(spm_context *ctx, spm_op_call *call)
{
    const int64_t rows = call->in[0].shape[0], classes = call->in[0].shape[1];
    const double e = (double)call->attr.label_smoothing;
    float *dx = call->d_in[0].data;
    int64_t n, c;
    (void)ctx;
    if (!dx) return;
    for (n = 0; n < rows; n++) {
        const float *target = call->in[1].data + n * classes, *probs = call->out[2].data + n * classes;
        const double s = (double)call->d_out.data[0] * (call->in[2].data ? (double)call->in[2].data[n] : 1.0 / (double)rows);
        double sum = e;
        for (c = 0; c < classes; c++) sum += (1.0 - e) * (double)target[c];
        for (c = 0; c < classes; c++, dx++) {
            const double t = (1.0 - e) * (double)target[c] + e / (double)classes;
            const float g = (float)(s * ((double)probs[c] * sum - t));
            *dx = call->d_in_add[0] ? *dx + g : g;
        }
    }
}

static double spmi_cross_entropy_flops(const spm_op_call *call, int backward)
{
    return (backward ? 6.0 : 50.0) * (double)spm_tensor_count(&call->in[0]);
}

/* ---- NT-Xent (Chen et al. 2020, "A simple framework for contrastive learning of visual representations") -----------------
 * z_i = x_i / max(|x_i|, 1e-12) for the 2N rows of a and b; S = z z^T / tau; P_ij = softmax of S_i over j != i;
 * loss = mean_i -log P_i,pos(i), pos(i) = i +- N.  With G = (P - [j = pos(i)]) dloss / 2N (0 on the diagonal):
 *     dz = (G + G^T) z / tau,   dx_i = (dz_i - z_i (z_i . dz_i)) / |x_i|,
 * and dx_i = 0 for a row of no length: it has no direction to turn.  N = 1 leaves only the positive: loss 0. */

typedef struct spmi_ntxent {
    spm_context *ctx;
    spm_op_call *call;
    int64_t n, rows, width;
    double *loss;      /* forward: [2N] */
    float *work;       /* backward: [threads][D] */
} spmi_ntxent;

static spmi_ntxent spmi_ntxent_plan(spm_context *ctx, spm_op_call *call)
{
    spmi_ntxent job;
    job.ctx = ctx;
    job.call = call;
    job.n = call->in[0].shape[0];
    job.rows = 2 * job.n;
    job.width = call->in[0].shape[1];
    job.loss = (double *)call->scratch;
    job.work = (float *)call->scratch;
    return job;
}

static spm_status spmi_ntxent_infer(spm_context *ctx, spm_op_call *call, spm_error *err)
{
    const spm_tensor *a = &call->in[0];
    if (a->rank != 2) return spmi_op_fail(ctx, err, "ntxent", "a", a, "[N,D]");
    if (spmi_op_want_like(ctx, err, "ntxent", "b", &call->in[1], a)) return SPM_E_SHAPE;
    if (!(call->attr.temperature > 0.0f)) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "ntxent: temperature is %g, but must be above 0", (double)call->attr.temperature);
    }
    spmi_op_out(call, 1, 1, 0, 0, 0);
    spmi_op_out(call, 2, 2 * a->shape[0], a->shape[1], 0, 0);
    spmi_op_out(call, 1, 2 * a->shape[0], 0, 0, 0);
    spmi_op_out(call, 2, 2 * a->shape[0], 2 * a->shape[0], 0, 0);
    return SPM_OK;
}

static size_t spmi_ntxent_scratch(spm_context *ctx, const spm_op_call *call, int backward)
{
    if (backward) return (size_t)ctx->threads * spmi_bytes(call->in[0].shape[1], 1, sizeof(float));
    return spmi_bytes(2 * call->in[0].shape[0], 1, sizeof(double));
}

static void spmi_ntxent_normalize_task(void *arg, int64_t i, int slot)
{
    const spmi_ntxent *job = (const spmi_ntxent *)arg;
    const spm_op_call *call = job->call;
    const float *x = i < job->n ? call->in[0].data + i * job->width : call->in[1].data + (i - job->n) * job->width;
    double squares = 0.0, norm;
    int64_t k;
    (void)slot;
    for (k = 0; k < job->width; k++) squares += (double)x[k] * (double)x[k];
    norm = sqrt(squares);
    call->out[2].data[i] = (float)norm;
    norm = 1.0 / (norm > 1e-12 ? norm : 1e-12);
    for (k = 0; k < job->width; k++) call->out[1].data[i * job->width + k] = (float)(norm * (double)x[k]);
}

static void spmi_ntxent_forward_task(void *arg, int64_t i, int slot)
{
    const spmi_ntxent *job = (const spmi_ntxent *)arg;
    const float *z = job->call->out[1].data;
    float *p = job->call->out[3].data + i * job->rows;
    const int64_t positive = i < job->n ? i + job->n : i - job->n;
    double top = -HUGE_VAL, sum = 0.0, lse;
    int64_t j;
    (void)slot;
    SPMI_KERNEL(job->ctx, dots, (job->rows, job->width, 1.0f / job->call->attr.temperature, z + i * job->width, z, p));
    for (j = 0; j < job->rows; j++) {
        if (j != i && (double)p[j] > top) top = (double)p[j];
    }
    for (j = 0; j < job->rows; j++) sum += j == i ? 0.0 : exp((double)p[j] - top);
    lse = top + log(sum);
    job->loss[i] = lse - (double)p[positive];
    for (j = 0; j < job->rows; j++) p[j] = j == i ? 0.0f : (float)exp((double)p[j] - lse);
}

static void spmi_ntxent_forward(spm_context *ctx, spm_op_call *call)
{
    spmi_ntxent job = spmi_ntxent_plan(ctx, call);
    double total = 0.0;
    int64_t i;
    spm_parallel(ctx, job.rows, spmi_ntxent_normalize_task, &job);
    spm_parallel(ctx, job.rows, spmi_ntxent_forward_task, &job);
    for (i = 0; i < job.rows; i++) total += job.loss[i];
    call->out[0].data[0] = (float)(total / (double)job.rows);
}

static void spmi_ntxent_backward_task(void *arg, int64_t i, int slot)
{
    const spmi_ntxent *job = (const spmi_ntxent *)arg;
    const spm_op_call *call = job->call;
    const int64_t d = job->width, positive = i < job->n ? i + job->n : i - job->n;
    const int input = i < job->n ? 0 : 1;
    const float *z = call->out[1].data, *p = call->out[3].data, *own = z + i * d, norm = call->out[2].data[i];
    const double s = (double)call->d_out.data[0] / ((double)job->rows * (double)call->attr.temperature);
    float *dz = job->work + (size_t)slot * (spmi_bytes(d, 1, sizeof(float)) / sizeof(float));
    float *dx = call->d_in[input].data;
    double dot = 0.0;
    int64_t j, k;
    if (!dx) return;
    dx += (input ? i - job->n : i) * d;
    memset(dz, 0, (size_t)d * sizeof(float));
    for (j = 0; j < job->rows; j++) {
        double g = (double)p[i * job->rows + j] + (double)p[j * job->rows + i] - (j == positive ? 2.0 : 0.0);
        if (j != i) SPMI_KERNEL(job->ctx, scale, (d, (float)(s * g), z + j * d, dz, 1));
    }
    for (k = 0; k < d; k++) dot += (double)own[k] * (double)dz[k];
    for (k = 0; k < d; k++) {
        const double g = norm > 1e-12f ? ((double)dz[k] - dot * (double)own[k]) / (double)norm : 0.0;
        dx[k] = (float)(g + (call->d_in_add[input] ? (double)dx[k] : 0.0));
    }
}

static void spmi_ntxent_backward(spm_context *ctx, spm_op_call *call)
{
    spmi_ntxent job = spmi_ntxent_plan(ctx, call);
    if (call->d_in[0].data || call->d_in[1].data) spm_parallel(ctx, job.rows, spmi_ntxent_backward_task, &job);
}

static double spmi_ntxent_flops(const spm_op_call *call, int backward)
{
    const double rows = 2.0 * (double)call->in[0].shape[0], d = (double)call->in[0].shape[1];
    return rows * rows * (2.0 * d + (backward ? 4.0 : 50.0));
}

/* ---- the table: enumerator, name, function to size the packed weights, function to size the scratch memory ---- */

#define SPMI_OPS(X)                                                                            \
    X(CONV2D, conv2d, spmi_conv2d_packed, spmi_conv2d_scratch)                                 \
    X(LINEAR, linear, spmi_linear_packed, spmi_linear_scratch)                                 \
    X(BATCH_NORM, batch_norm, spmi_none_packed, spmi_batch_norm_scratch)                       \
    X(LAYER_NORM, layer_norm, spmi_none_packed, spmi_layer_norm_scratch)                       \
    X(RELU, relu, spmi_none_packed, spmi_none_scratch)                                         \
    X(GELU, gelu, spmi_none_packed, spmi_none_scratch)                                         \
    X(SOFTMAX, softmax, spmi_none_packed, spmi_none_scratch)                                   \
    X(ATTENTION, attention, spmi_none_packed, spmi_attention_scratch)                          \
    X(MAX_POOL, max_pool, spmi_none_packed, spmi_none_scratch)                                 \
    X(AVG_POOL, avg_pool, spmi_none_packed, spmi_none_scratch)                                 \
    X(GLOBAL_POOL, global_pool, spmi_none_packed, spmi_none_scratch)                           \
    X(ADD, add, spmi_none_packed, spmi_none_scratch)                                           \
    X(SHORTCUT_A, shortcut_a, spmi_none_packed, spmi_none_scratch)                             \
    X(DROPOUT, dropout, spmi_none_packed, spmi_none_scratch)                                   \
    X(DROP_PATH, drop_path, spmi_none_packed, spmi_none_scratch)                               \
    X(TOKENS, tokens, spmi_none_packed, spmi_none_scratch)                                     \
    X(TOKEN, token, spmi_none_packed, spmi_none_scratch)                                       \
    X(MEAN2, mean2, spmi_none_packed, spmi_none_scratch)                                       \
    X(CROSS_ENTROPY, cross_entropy, spmi_none_packed, spmi_cross_entropy_scratch)              \
    X(NTXENT, ntxent, spmi_none_packed, spmi_ntxent_scratch)

SPMDEF const char *spm_op_name(spm_op op)
{
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: return #name;
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    return "none";
}

/* What the operations need and give: inputs that must be there, inputs at most, and the inputs that have gradients (bit i). */
typedef struct spmi_op_facts {
    int required, most, gradients;
} spmi_op_facts;

static spmi_op_facts spmi_op_info(spm_op op)
{
    static const unsigned char facts[SPM_OP_COUNT][3] = {
        { 0, 0, 0 },
        { 2, 3, 7 }, { 2, 3, 7 },              /* conv2d, linear */
        { 5, 6, 1 | 2 | 4 | 32 }, { 3, 3, 7 }, /* batch_norm, layer_norm */
        { 1, 1, 1 }, { 1, 1, 1 }, { 1, 1, 1 }, { 1, 1, 1 }, /* relu, gelu, softmax, attention */
        { 1, 1, 1 }, { 1, 1, 1 }, { 1, 1, 1 }, { 2, 2, 3 }, /* max_pool, avg_pool, global_pool, add */
        { 1, 1, 1 }, { 1, 1, 1 }, { 1, 1, 1 }, { 3, 4, 15 }, /* shortcut_a, dropout, drop_path, tokens */
        { 1, 1, 1 }, { 2, 2, 3 }, { 2, 3, 1 }, { 2, 2, 3 }  /* token, mean2, cross_entropy, ntxent */
    };
    spmi_op_facts info = SPM_ZERO;
    if (op > SPM_OP_NONE && op < SPM_OP_COUNT) {
        info.required = facts[op][0];
        info.most = facts[op][1];
        info.gradients = facts[op][2];
    }
    return info;
}

SPMDEF int spm_op_differentiable(spm_op op, int input)
{
    return input >= 0 && input < SPM_OP_MAX_IN && (spmi_op_info(op).gradients >> input & 1);
}

SPMDEF int spm_op_backward_reads(spm_op op, const spm_op_attr *attr, int output, int index)
{
    switch (op) {
    case SPM_OP_CONV2D: case SPM_OP_LINEAR: return !output && index < 2;
    case SPM_OP_BATCH_NORM:
        if (!output) return index < 2;
        return index == 0 ? attr->relu != 0 : index < 3;
    case SPM_OP_LAYER_NORM: return output ? index == 1 || index == 2 : index < 2;
    case SPM_OP_RELU: case SPM_OP_SOFTMAX: return output && index == 0;
    case SPM_OP_GELU: return !output && index == 0;
    case SPM_OP_ATTENTION: return index == (output ? 1 : 0);
    case SPM_OP_MAX_POOL: return output && index == 1;
    case SPM_OP_CROSS_ENTROPY: return output ? index == 2 : index == 1 || index == 2;
    case SPM_OP_NTXENT: return output && index > 0;
    case SPM_OP_AVG_POOL: case SPM_OP_GLOBAL_POOL: case SPM_OP_ADD: case SPM_OP_SHORTCUT_A: case SPM_OP_DROPOUT:
    case SPM_OP_DROP_PATH: case SPM_OP_TOKENS: case SPM_OP_TOKEN: case SPM_OP_MEAN2: case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
    return 0;
}

/* Every input that is there has 1 to 4 axes of at least 1, and fits into memory with room for what scratch derives from it. */
static spm_status spmi_op_check_inputs(spm_context *ctx, spm_op op, spm_op_call *call, spm_error *err)
{
    const spmi_op_facts info = spmi_op_info(op);
    const spm_tensor absent = SPM_ZERO;
    int i, k;
    for (i = 0; i < SPM_OP_MAX_IN; i++) {
        const spm_tensor *x = &call->in[i];
        int64_t count = 64 * (int64_t)sizeof(double);
        char text[96];
        if (i >= call->n_in || i >= info.most) {
            if (i < call->n_in && x->rank) {
                return spmi_fail(ctx, err, SPM_E_ARGUMENT, "%s: takes at most %d inputs, but got %d", spm_op_name(op), info.most, call->n_in);
            }
            call->in[i] = absent;
        }
        if (!x->rank && i >= info.required) continue;
        if (!x->rank) {
            return spmi_fail(ctx, err, SPM_E_ARGUMENT, "%s: input %d is missing; it needs %d inputs", spm_op_name(op), i, info.required);
        }
        if (x->rank < 0 || x->rank > SPM_MAX_RANK) {
            return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: input %d has %d axes, but must have 1 to %d", spm_op_name(op), i, x->rank, SPM_MAX_RANK);
        }
        for (k = 0; k < x->rank; k++) {
            if (x->shape[k] < 1) {
                return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: input %d is %s; no size may be below 1", spm_op_name(op), i,
                                 spm_tensor_shape_text(x, text, sizeof text));
            }
            if (!spmi_mul_dim(count, x->shape[k], &count) || (uint64_t)count > SIZE_MAX / 2) {
                return spmi_fail(ctx, err, SPM_E_SHAPE, "%s: input %d is %s, which does not fit into memory", spm_op_name(op), i,
                                 spm_tensor_shape_text(x, text, sizeof text));
            }
        }
    }
    return SPM_OK;
}

SPMDEF spm_status spm_op_infer(spm_context *ctx, spm_op op, spm_op_call *call, spm_error *err)
{
    const spm_status status = spmi_op_check_inputs(ctx, op, call, err);
    call->n_out = 0;
    if (status) return status;
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: return spmi_##name##_infer(ctx, call, err);
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    return spmi_fail(ctx, err, SPM_E_ARGUMENT, "operation %d is not known", (int)op);
}

SPMDEF size_t spm_op_scratch(spm_context *ctx, spm_op op, const spm_op_call *call, int backward)
{
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: return scratch(ctx, call, backward);
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    return 0;
}

SPMDEF size_t spm_op_packed(spm_context *ctx, spm_op op, const spm_op_call *call)
{
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: return packed(ctx, call);
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    return 0;
}

SPMDEF double spm_op_flops(spm_op op, const spm_op_call *call, int backward)
{
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: return spmi_##name##_flops(call, backward);
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    return 0.0;
}

SPMDEF void spm_op_forward(spm_context *ctx, spm_op op, spm_op_call *call)
{
    const unsigned mode = spmi_denormals_off();
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: spmi_##name##_forward(ctx, call); break;
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    spmi_denormals_restore(mode);
}

SPMDEF void spm_op_backward(spm_context *ctx, spm_op op, spm_op_call *call)
{
    const unsigned mode = spmi_denormals_off();
#define SPM_X(OP, name, packed, scratch) case SPM_OP_##OP: spmi_##name##_backward(ctx, call); break;
    switch (op) {
    SPMI_OPS(SPM_X)
    case SPM_OP_NONE: case SPM_OP_COUNT: break;
    }
#undef SPM_X
    spmi_denormals_restore(mode);
}


/* ================================================================================================================
 * >>TAPE  09  programs, models, plans, runs, the gradient check
 * ============================================================================================================= */

/* ---- programs ---- */

#define SPMI_TAPE_BATCH 2 /* shapes are recorded for this batch and the next one: they are linear in the batch */

typedef enum spmi_value_kind { SPMI_VALUE_INPUT, SPMI_VALUE_PARAMETER, SPMI_VALUE_RESULT } spmi_value_kind;

typedef struct spmi_tape_value {
    int64_t shape[2][SPM_MAX_RANK]; /* at SPMI_TAPE_BATCH and one more */
    int rank;
    int index;   /* parameter: its number; result: its step; -1 for an input */
    int slot;    /* result: which out[] */
    int wanted;  /* input: its gradient is asked for; result: 1 if it is an output */
    spmi_value_kind kind;
} spmi_tape_value;

typedef struct spmi_tape_step {
    spm_op_attr attr;
    int in[SPM_OP_MAX_IN], n_in;
    int out, n_out;  /* the values of out[k] are out + k */
    int segment;
    spm_op op;
} spmi_tape_step;

typedef struct spmi_tape_parameter {
    unsigned flags;
    int block, value, name;
    spm_init init;
} spmi_tape_parameter;

typedef struct spmi_tape_name {
    char *text;
    int value;
    int output; /* 1: an output */
} spmi_tape_name;

struct spm_program {
    spm_context *ctx;
    spm_error error;
    spmi_tape_value *values; /* [0] is "none" */
    spmi_tape_step *steps;
    spmi_tape_parameter *parameters;
    spmi_tape_name *names;
    size_t values_room, steps_room, parameters_room, names_room; /* bytes */
    int n_values, n_steps, n_parameters, n_names;
    int segment, block;
    float present; /* stands for the data of inputs that are there while only shapes are known */
};

SPMDEF spm_program *spm_program_create(spm_context *ctx)
{
    spm_program *program = (spm_program *)spmi_alloc_zero(ctx, sizeof *program);
    if (program) {
        program->ctx = ctx;
        program->values_room = 64 * sizeof *program->values;
        program->values = (spmi_tape_value *)spmi_alloc_zero(ctx, program->values_room);
        program->n_values = 1;
    }
    if (!program || !program->values) {
        (void)spmi_fail_memory(ctx, NULL, "a program");
        spmi_free(ctx, program);
        return NULL;
    }
    return program;
}

SPMDEF void spm_program_destroy(spm_program *program)
{
    spm_context *ctx;
    int i;
    if (!program) return;
    ctx = program->ctx;
    for (i = 0; i < program->n_names; i++) spmi_free(ctx, program->names[i].text);
    spmi_free(ctx, program->names);
    spmi_free(ctx, program->parameters);
    spmi_free(ctx, program->steps);
    spmi_free(ctx, program->values);
    spmi_free(ctx, program);
}

SPMDEF spm_status spm_program_status(const spm_program *program)
{
    return program ? program->error.status : SPM_E_MEMORY;
}

/* Room for one more element of `size` bytes in an array of the program; the grown array, NULL after an error. */
static void *spmi_program_room(spm_program *program, void *array, size_t *room, int count, size_t size)
{
    if (!spmi_grow(program->ctx, &array, (size_t)count * size, room, (size_t)(count + 1) * size)) {
        (void)spmi_fail_memory(program->ctx, &program->error, "the recording of a program");
        return NULL;
    }
    return array;
}

static int spmi_program_add_value(spm_program *program, const spmi_tape_value *value)
{
    void *array = spmi_program_room(program, program->values, &program->values_room, program->n_values, sizeof *value);
    if (!array) return 0;
    program->values = (spmi_tape_value *)array;
    program->values[program->n_values] = *value;
    return program->n_values++;
}

static int spmi_program_find_name(const spm_program *program, const char *name)
{
    int i;
    for (i = 0; i < program->n_names; i++) {
        if (spmi_string_equal(program->names[i].text, name)) return i;
    }
    return -1;
}

/* Enters a name; -1 after an error. */
static int spmi_program_add_name(spm_program *program, const char *name, int value, int output)
{
    void *array;
    spmi_tape_name *entry;
    if (spmi_program_find_name(program, name) >= 0) {
        (void)spmi_fail(program->ctx, &program->error, SPM_E_ARGUMENT, "%s: this name is taken already; names of a program are unique", name);
        return -1;
    }
    array = spmi_program_room(program, program->names, &program->names_room, program->n_names, sizeof *entry);
    if (!array) return -1;
    program->names = (spmi_tape_name *)array;
    entry = &program->names[program->n_names];
    entry->text = spmi_string_copy(program->ctx, name, strlen(name));
    if (!entry->text) {
        (void)spmi_fail_memory(program->ctx, &program->error, name);
        return -1;
    }
    entry->value = value;
    entry->output = output;
    return program->n_names++;
}

/* 1 if nothing has gone wrong and `value` exists; records the failure otherwise. */
static int spmi_program_check(spm_program *program, spm_value value, const char *what)
{
    if (!program || program->error.status) return 0;
    if (value > 0 && value < program->n_values) return 1;
    (void)spmi_fail(program->ctx, &program->error, SPM_E_ARGUMENT, "%s: value %d does not exist; the program has 1 to %d",
                    what, value, program->n_values - 1);
    return 0;
}

/* Shape of a value of the user's own: 1 if it is sound. */
static int spmi_program_set_shape(spm_program *program, const char *name, int rank, const int64_t *shape, int batch, spmi_tape_value *value)
{
    int64_t count = 1;
    int i, good = rank >= 1 && rank <= SPM_MAX_RANK;
    for (i = 0; good && i < rank; i++) {
        int64_t low = shape[i], high = shape[i];
        if (i == 0 && batch && shape[0] == 0) {
            low = SPMI_TAPE_BATCH;
            high = SPMI_TAPE_BATCH + 1;
        }
        good = low > 0 && spmi_mul_dim(count, high, &count);
        value->shape[0][i] = low;
        value->shape[1][i] = high;
    }
    value->rank = rank;
    if (good && count <= INT64_MAX / 8) return 1;
    (void)spmi_fail(program->ctx, &program->error, SPM_E_SHAPE, "%s: a shape wants 1 to %d dimensions of at least 1%s", name,
                    SPM_MAX_RANK, batch ? " (the first may be 0: the batch)" : "");
    return 0;
}

SPMDEF spm_value spm_program_input(spm_program *program, const char *name, int rank, const int64_t *shape, int gradient)
{
    spmi_tape_value value = SPM_ZERO;
    int id;
    if (!program || program->error.status || !spmi_program_set_shape(program, name, rank, shape, 1, &value)) return 0;
    value.kind = SPMI_VALUE_INPUT;
    value.index = -1;
    value.wanted = gradient != 0;
    id = spmi_program_add_value(program, &value);
    return id && spmi_program_add_name(program, name, id, 0) >= 0 ? id : 0;
}

SPMDEF spm_value spm_program_parameter(spm_program *program, const char *name, int rank, const int64_t *shape, spm_init init, unsigned flags)
{
    spmi_tape_value value = SPM_ZERO;
    spmi_tape_parameter *parameter;
    void *array;
    int id, entry;
    if (!program || program->error.status || !spmi_program_set_shape(program, name, rank, shape, 0, &value)) return 0;
    value.kind = SPMI_VALUE_PARAMETER;
    value.index = program->n_parameters;
    array = spmi_program_room(program, program->parameters, &program->parameters_room, program->n_parameters, sizeof *parameter);
    if (!array) return 0;
    program->parameters = (spmi_tape_parameter *)array;
    id = spmi_program_add_value(program, &value);
    entry = id ? spmi_program_add_name(program, name, id, 0) : -1;
    if (entry < 0) return 0;
    parameter = &program->parameters[program->n_parameters++];
    parameter->flags = flags;
    parameter->block = program->block;
    parameter->value = id;
    parameter->name = entry;
    parameter->init = init;
    return id;
}

/* The shape of a value for a batch of n, by the line through the two recorded ones. */
static spm_tensor spmi_tape_shape(const spm_program *program, int id, int64_t n, float *data)
{
    const spmi_tape_value *value = &program->values[id];
    spm_tensor tensor = SPM_ZERO;
    int i;
    tensor.data = data;
    tensor.rank = value->rank;
    for (i = 0; i < value->rank; i++) {
        tensor.shape[i] = value->shape[0][i] + (value->shape[1][i] - value->shape[0][i]) * (n - SPMI_TAPE_BATCH);
    }
    return tensor;
}

/* A call of a step as far as it follows from shapes; the inputs that are there point to `present`. */
static void spmi_tape_call(const spm_program *program, const spmi_tape_step *step, int64_t n, float *present, spm_op_call *call)
{
    int i;
    memset(call, 0, sizeof *call);
    call->attr = step->attr;
    call->n_in = step->n_in;
    for (i = 0; i < step->n_in; i++) {
        if (step->in[i]) call->in[i] = spmi_tape_shape(program, step->in[i], n, present);
    }
}

SPMDEF spm_value spm_program_op(spm_program *program, spm_op op, const spm_value *in, int n_in, const spm_op_attr *attr)
{
    spmi_tape_step step = SPM_ZERO;
    spm_op_call call[2];
    void *array;
    int i, k, id = 0;
    if (!program || program->error.status) return 0;
    if (op <= SPM_OP_NONE || op >= SPM_OP_COUNT || n_in < 1 || n_in > SPM_OP_MAX_IN) {
        (void)spmi_fail(program->ctx, &program->error, SPM_E_ARGUMENT, "operation %d with %d inputs does not exist", (int)op, n_in);
        return 0;
    }
    step.op = op;
    step.n_in = n_in;
    step.segment = program->segment;
    if (attr) step.attr = *attr;
    for (i = 0; i < n_in; i++) {
        if (in[i] && !spmi_program_check(program, in[i], spm_op_name(op))) return 0;
        step.in[i] = in[i];
    }
    for (k = 0; k < 2; k++) {
        spmi_tape_call(program, &step, SPMI_TAPE_BATCH + k, &program->present, &call[k]);
        if (spm_op_infer(program->ctx, op, &call[k], &program->error)) return 0;
    }
    array = spmi_program_room(program, program->steps, &program->steps_room, program->n_steps, sizeof step);
    if (!array) return 0;
    program->steps = (spmi_tape_step *)array;
    step.n_out = call[0].n_out;
    step.out = program->n_values;
    for (i = 0; i < step.n_out; i++) {
        spmi_tape_value value = SPM_ZERO;
        value.kind = SPMI_VALUE_RESULT;
        value.index = program->n_steps;
        value.slot = i;
        value.rank = call[0].out[i].rank;
        for (k = 0; k < 2; k++) memcpy(value.shape[k], call[k].out[i].shape, sizeof value.shape[k]);
        id = spmi_program_add_value(program, &value);
        if (!id) return 0;
    }
    program->steps[program->n_steps++] = step;
    return step.out;
}

SPMDEF spm_value spm_program_result(spm_program *program, spm_value value, int index)
{
    const spmi_tape_value *v;
    if (!spmi_program_check(program, value, "spm_program_result")) return 0;
    v = &program->values[value];
    if (v->kind == SPMI_VALUE_RESULT && v->slot == 0 && index >= 0 && index < program->steps[v->index].n_out) return value + index;
    (void)spmi_fail(program->ctx, &program->error, SPM_E_ARGUMENT, "spm_program_result: value %d is no operation's first result, or it has no result %d",
                    value, index);
    return 0;
}

SPMDEF void spm_program_output(spm_program *program, const char *name, spm_value value)
{
    if (!spmi_program_check(program, value, name)) return;
    if (spmi_program_add_name(program, name, value, 1) >= 0 && program->values[value].kind == SPMI_VALUE_RESULT) {
        program->values[value].wanted = 1;
    }
}

SPMDEF void spm_program_mark(spm_program *program, const char *name, spm_value value)
{
    if (spmi_program_check(program, value, name)) (void)spmi_program_add_name(program, name, value, 0);
}

SPMDEF void spm_program_segment(spm_program *program)
{
    if (program && !program->error.status) program->segment++;
}

SPMDEF void spm_program_block(spm_program *program, int block)
{
    if (program) program->block = block;
}

SPMDEF spm_tensor spm_program_shape(const spm_program *program, spm_value value, int64_t n)
{
    spm_tensor none = SPM_ZERO;
    if (!program || value <= 0 || value >= program->n_values) return none;
    return spmi_tape_shape(program, value, n, NULL);
}

SPMDEF spm_value spm_program_find(const spm_program *program, const char *name)
{
    int i = program ? spmi_program_find_name(program, name) : -1;
    return i < 0 ? 0 : program->names[i].value;
}

SPMDEF int spm_program_op_count(const spm_program *program)
{
    return program ? program->n_steps : 0;
}

SPMDEF spm_value spm_program_op_at(const spm_program *program, int index, spm_op *op, spm_op_attr *attr, spm_value *in)
{
    const spmi_tape_step *step;
    int i;
    if (!program || index < 0 || index >= program->n_steps) return 0;
    step = &program->steps[index];
    if (op) *op = step->op;
    if (attr) *attr = step->attr;
    for (i = 0; in && i < SPM_OP_MAX_IN; i++) in[i] = step->in[i];
    return step->out;
}

/* ---- recorders of single operations ---- */

static spm_value spmi_record(spm_program *program, spm_op op, int n_in, spm_value a, spm_value b, spm_value c, const spm_op_attr *attr)
{
    spm_value in[3];
    in[0] = a;
    in[1] = b;
    in[2] = c;
    return spm_program_op(program, op, in, n_in, attr);
}

static spm_op_attr spmi_window_attr(int64_t kernel, int64_t stride, int64_t padding)
{
    spm_op_attr attr = SPM_ZERO;
    attr.kernel[0] = attr.kernel[1] = kernel;
    attr.stride[0] = attr.stride[1] = stride;
    attr.padding[0] = attr.padding[1] = padding;
    return attr;
}

SPMDEF spm_value spm_conv2d(spm_program *program, spm_value x, spm_value w, spm_value b, int64_t stride, int64_t padding, int64_t dilation, int64_t groups)
{
    spm_op_attr attr;
    spm_tensor weight;
    if (!spmi_program_check(program, w, "conv2d weight")) return 0;
    weight = spmi_tape_shape(program, w, SPMI_TAPE_BATCH, NULL);
    attr = spmi_window_attr(0, stride, padding);
    attr.kernel[0] = weight.shape[1];
    attr.kernel[1] = weight.shape[2];
    attr.dilation[0] = attr.dilation[1] = dilation;
    attr.groups = groups;
    return spmi_record(program, SPM_OP_CONV2D, 3, x, w, b, &attr);
}

SPMDEF spm_value spm_linear(spm_program *program, spm_value x, spm_value w, spm_value b)
{
    return spmi_record(program, SPM_OP_LINEAR, 3, x, w, b, NULL);
}

SPMDEF spm_value spm_batch_norm(spm_program *program, spm_value x, spm_value w, spm_value b, spm_value mean, spm_value var, spm_value residual, float eps, int relu)
{
    spm_op_attr attr = SPM_ZERO;
    spm_value in[6];
    in[0] = x;
    in[1] = w;
    in[2] = b;
    in[3] = mean;
    in[4] = var;
    in[5] = residual;
    attr.eps = eps;
    attr.relu = relu;
    return spm_program_op(program, SPM_OP_BATCH_NORM, in, 6, &attr);
}

SPMDEF spm_value spm_layer_norm(spm_program *program, spm_value x, spm_value w, spm_value b, float eps)
{
    spm_op_attr attr = SPM_ZERO;
    attr.eps = eps;
    return spmi_record(program, SPM_OP_LAYER_NORM, 3, x, w, b, &attr);
}

SPMDEF spm_value spm_relu(spm_program *program, spm_value x)
{
    return spmi_record(program, SPM_OP_RELU, 1, x, 0, 0, NULL);
}

SPMDEF spm_value spm_gelu(spm_program *program, spm_value x)
{
    return spmi_record(program, SPM_OP_GELU, 1, x, 0, 0, NULL);
}

SPMDEF spm_value spm_softmax(spm_program *program, spm_value x)
{
    return spmi_record(program, SPM_OP_SOFTMAX, 1, x, 0, 0, NULL);
}

SPMDEF spm_value spm_attention(spm_program *program, spm_value qkv, int64_t heads)
{
    spm_op_attr attr = SPM_ZERO;
    attr.heads = heads;
    return spmi_record(program, SPM_OP_ATTENTION, 1, qkv, 0, 0, &attr);
}

SPMDEF spm_value spm_max_pool(spm_program *program, spm_value x, int64_t kernel, int64_t stride, int64_t padding)
{
    spm_op_attr attr = spmi_window_attr(kernel, stride, padding);
    return spmi_record(program, SPM_OP_MAX_POOL, 1, x, 0, 0, &attr);
}

SPMDEF spm_value spm_avg_pool(spm_program *program, spm_value x, int64_t kernel, int64_t stride, int64_t padding)
{
    spm_op_attr attr = spmi_window_attr(kernel, stride, padding);
    return spmi_record(program, SPM_OP_AVG_POOL, 1, x, 0, 0, &attr);
}

SPMDEF spm_value spm_global_pool(spm_program *program, spm_value x)
{
    return spmi_record(program, SPM_OP_GLOBAL_POOL, 1, x, 0, 0, NULL);
}

SPMDEF spm_value spm_add(spm_program *program, spm_value a, spm_value b)
{
    return spmi_record(program, SPM_OP_ADD, 2, a, b, 0, NULL);
}

SPMDEF spm_value spm_dropout(spm_program *program, spm_value x, float p)
{
    spm_op_attr attr = SPM_ZERO;
    attr.p = p;
    return spmi_record(program, SPM_OP_DROPOUT, 1, x, 0, 0, &attr);
}

SPMDEF spm_value spm_drop_path(spm_program *program, spm_value x, float p)
{
    spm_op_attr attr = SPM_ZERO;
    attr.p = p;
    return spmi_record(program, SPM_OP_DROP_PATH, 1, x, 0, 0, &attr);
}

SPMDEF spm_value spm_tokens(spm_program *program, spm_value x, spm_value class_token, spm_value position)
{
    return spmi_record(program, SPM_OP_TOKENS, 3, x, class_token, position, NULL);
}

SPMDEF spm_value spm_token(spm_program *program, spm_value x, int64_t index)
{
    spm_op_attr attr = SPM_ZERO;
    attr.index = index;
    return spmi_record(program, SPM_OP_TOKEN, 1, x, 0, 0, &attr);
}

SPMDEF spm_value spm_cross_entropy(spm_program *program, spm_value logits, spm_value target, spm_value weight, float label_smoothing)
{
    spm_op_attr attr = SPM_ZERO;
    attr.label_smoothing = label_smoothing;
    return spmi_record(program, SPM_OP_CROSS_ENTROPY, 3, logits, target, weight, &attr);
}

SPMDEF spm_value spm_ntxent(spm_program *program, spm_value a, spm_value b, float temperature)
{
    spm_op_attr attr = SPM_ZERO;
    attr.temperature = temperature;
    return spmi_record(program, SPM_OP_NTXENT, 2, a, b, 0, &attr);
}

/* ---- what gradients need ---- */

/* need[v] = 1 where a gradient is of use: `wanted[v]` itself (NULL: as recorded), a parameter that is no buffer, or a
 * result that depends on such a value. */
static void spmi_tape_needs(const spm_program *program, const unsigned char *wanted, unsigned char *need)
{
    int v, s, i;
    need[0] = 0;
    for (v = 1; v < program->n_values; v++) {
        const spmi_tape_value *value = &program->values[v];
        if (value->kind == SPMI_VALUE_PARAMETER) need[v] = !(program->parameters[value->index].flags & SPM_PARAMETER_BUFFER);
        else need[v] = (unsigned char)(wanted ? wanted[v] : value->kind == SPMI_VALUE_INPUT && value->wanted);
    }
    for (s = 0; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        for (i = 0; i < step->n_in; i++) {
            if (need[step->in[i]] && spm_op_differentiable(step->op, i)) need[step->out] = 1;
        }
    }
}

SPMDEF double spm_program_flops(const spm_program *program, int64_t n, int backward)
{
    unsigned char *need = program ? (unsigned char *)spmi_alloc_array(program->ctx, program->n_values, 1) : NULL;
    double flops = 0.0;
    int s, i;
    if (!need) return 0.0;
    spmi_tape_needs(program, NULL, need);
    for (s = 0; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        spm_op_call call;
        float present = 0.0f;
        if (backward && !need[step->out]) continue;
        spmi_tape_call(program, step, n, &present, &call);
        if (spm_op_infer(program->ctx, step->op, &call, NULL)) break;
        for (i = 0; i < step->n_in; i++) {
            if (need[step->in[i]] && spm_op_differentiable(step->op, i)) {
                call.d_in[i] = call.in[i];
                call.d_in[i].data = &present;
            }
        }
        flops += spm_op_flops(step->op, &call, backward);
    }
    spmi_free(program->ctx, need);
    return flops;
}

/* ---- models ---- */

struct spm_model {
    spm_context *ctx;
    spm_program *program;
    spm_parameter *parameters;
    unsigned char *written; /* 1: the gradient holds something since the last zero */
    float *values, *gradients;
    int64_t *fan_in;        /* for SPM_INIT_UNIFORM_FAN_IN */
    uint64_t version;
    int n_parameters;
};

static int64_t spmi_tensor_fan_in(const spm_tensor *tensor)
{
    int64_t fan = 1;
    int i;
    for (i = 1; i < tensor->rank; i++) fan *= tensor->shape[i];
    return fan;
}

/* Fills in what follows each unit: its bias, its output, the batch norm that consumes that. */
static void spmi_model_resolve(spm_model *model)
{
    const spm_program *program = model->program;
    int s, t;
    for (s = 0; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        const spmi_tape_value *weight, *bias;
        spm_parameter *p;
        if (step->op != SPM_OP_CONV2D && step->op != SPM_OP_LINEAR) continue;
        weight = &program->values[step->in[1]];
        bias = &program->values[step->in[2]];
        if (weight->kind != SPMI_VALUE_PARAMETER) continue;
        p = &model->parameters[weight->index];
        p->output = p->norm_output = step->out;
        if (step->in[2] && bias->kind == SPMI_VALUE_PARAMETER) {
            p->bias = bias->index;
            model->fan_in[bias->index] = spmi_tensor_fan_in(&p->value);
        }
        for (t = s + 1; t < program->n_steps; t++) {
            const spmi_tape_step *norm = &program->steps[t];
            if (norm->op != SPM_OP_BATCH_NORM || norm->in[0] != step->out) continue;
            p->norm_output = norm->out;
            if (program->values[norm->in[1]].kind == SPMI_VALUE_PARAMETER) p->norm_weight = program->values[norm->in[1]].index;
            if (program->values[norm->in[2]].kind == SPMI_VALUE_PARAMETER) p->norm_bias = program->values[norm->in[2]].index;
            break;
        }
    }
}

SPMDEF void spm_model_destroy(spm_model *model)
{
    spm_context *ctx;
    if (!model) return;
    ctx = model->ctx;
    spm_program_destroy(model->program);
    spmi_free(ctx, model->parameters);
    spmi_free(ctx, model->written);
    spmi_free(ctx, model->values);
    spmi_free(ctx, model->gradients);
    spmi_free(ctx, model->fan_in);
    spmi_free(ctx, model);
}

/* Floats that a parameter takes in the arenas: whole 64-byte lines, so that no two share one. */
static int64_t spmi_line_floats(int64_t count)
{
    return (count + 15) / 16 * 16;
}

static size_t spmi_line_bytes(size_t bytes)
{
    return (bytes + SPMI_ALIGN - 1) & ~(size_t)(SPMI_ALIGN - 1);
}

/* Fills the table of parameters; their memory follows when the sum is known. 0 if it overflows. */
static int spmi_model_layout(spm_model *model, int64_t *total)
{
    const spm_program *program = model->program;
    int i;
    *total = 0;
    for (i = 0; i < model->n_parameters; i++) {
        const spmi_tape_parameter *from = &program->parameters[i];
        spm_parameter *p = &model->parameters[i];
        int64_t count;
        p->name = program->names[from->name].text;
        p->value = spmi_tape_shape(program, from->value, 1, NULL);
        p->flags = from->flags;
        p->init = from->init;
        p->block = from->block;
        p->norm_weight = p->norm_bias = p->bias = -1;
        p->id = from->value;
        model->fan_in[i] = spmi_tensor_fan_in(&p->value);
        count = spmi_line_floats(spm_tensor_count(&p->value));
        if (*total > INT64_MAX / 8 - count) return 0;
        *total += count;
    }
    return 1;
}

SPMDEF spm_model *spm_model_create(spm_program *program, uint64_t seed, spm_error *err)
{
    spm_context *ctx;
    spm_model *model;
    int64_t total, at = 0;
    int i, n;
    if (!program) return NULL; /* its creation has reported that memory ran out */
    ctx = program->ctx;
    model = program->error.status ? NULL : (spm_model *)spmi_alloc_zero(ctx, sizeof *model);
    if (!model) {
        if (program->error.status) (void)spmi_fail(ctx, err, program->error.status, "%s", program->error.text);
        else (void)spmi_fail_memory(ctx, err, "a model");
        spm_program_destroy(program);
        return NULL;
    }
    model->ctx = ctx;
    model->program = program;
    model->n_parameters = n = program->n_parameters;
    model->parameters = (spm_parameter *)spmi_alloc_array(ctx, n, sizeof *model->parameters);
    model->written = (unsigned char *)spmi_alloc_array(ctx, n, 1);
    model->fan_in = (int64_t *)spmi_alloc_array(ctx, n, sizeof *model->fan_in);
    if (model->parameters && model->written && model->fan_in && spmi_model_layout(model, &total)) {
        model->values = (float *)spmi_alloc_array(ctx, total, sizeof(float));
        /* left as the system gives it: pages that no backward pass writes are never touched */
        if ((uint64_t)total <= SIZE_MAX / sizeof(float)) model->gradients = (float *)spmi_alloc(ctx, (size_t)total * sizeof(float));
    }
    if (!model->values || !model->gradients) {
        (void)spmi_fail_memory(ctx, err, "the parameters of a model");
        spm_model_destroy(model);
        return NULL;
    }
    for (i = 0; i < n; i++) {
        spm_parameter *p = &model->parameters[i];
        p->value.data = model->values + at;
        p->gradient = p->flags & SPM_PARAMETER_BUFFER ? NULL : model->gradients + at;
        at += spmi_line_floats(spm_tensor_count(&p->value));
    }
    spmi_model_resolve(model);
    spm_model_initialize(model, seed);
    return model;
}

SPMDEF spm_context *spm_model_context(const spm_model *model)
{
    return model->ctx;
}

SPMDEF const spm_program *spm_model_program(const spm_model *model)
{
    return model->program;
}

SPMDEF int spm_model_parameter_count(const spm_model *model)
{
    return model->n_parameters;
}

SPMDEF spm_parameter *spm_model_parameter(spm_model *model, int index)
{
    return index >= 0 && index < model->n_parameters ? &model->parameters[index] : NULL;
}

SPMDEF int spm_model_find_parameter(const spm_model *model, const char *name)
{
    int i;
    for (i = 0; i < model->n_parameters; i++) {
        if (spmi_string_equal(model->parameters[i].name, name)) return i;
    }
    return -1;
}

/* ---- initial values ---- */

#define SPMI_INIT_CHUNK 4096

typedef struct spmi_init_job {
    uint64_t key;
    float *data;
    int64_t count;
    float scale;
    int normal; /* 1: N(0, scale^2), 0: U(-scale, scale) */
} spmi_init_job;

/* Four draws come from one block of the generator: element 4 b + j is draw j of block b. */
static void spmi_init_task(void *arg, int64_t task, int slot)
{
    const spmi_init_job *job = (const spmi_init_job *)arg;
    int64_t i = task * SPMI_INIT_CHUNK, end = SPMI_MIN(job->count, i + SPMI_INIT_CHUNK);
    (void)slot;
    for (; i < end; i += 4) {
        uint32_t words[4];
        double draw[4];
        int j;
        spmi_philox(job->key, 0, (uint64_t)(i / 4), words);
        for (j = 0; j < 4; j += 2) {
            double u = ((double)words[j] + 0.5) / 4294967296.0, v = ((double)words[j + 1] + 0.5) / 4294967296.0;
            double radius = job->normal ? sqrt(-2.0 * log(u)) : 0.0, angle = 6.283185307179586477 * v;
            draw[j] = job->normal ? radius * cos(angle) : 2.0 * u - 1.0;
            draw[j + 1] = job->normal ? radius * sin(angle) : 2.0 * v - 1.0;
        }
        for (j = 0; j < 4 && i + j < end; j++) job->data[i + j] = (float)(draw[j] * (double)job->scale);
    }
}

/* FNV-1a of a name: the stream of its draws. */
static uint64_t spmi_name_hash(const char *name)
{
    uint64_t hash = UINT64_C(14695981039346656037);
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * UINT64_C(1099511628211);
    return hash;
}

SPMDEF void spm_model_initialize(spm_model *model, uint64_t seed)
{
    int n;
    for (n = 0; n < model->n_parameters; n++) {
        spm_parameter *p = &model->parameters[n];
        int64_t count = spm_tensor_count(&p->value), i;
        spmi_init_job job = SPM_ZERO;
        if (p->init == SPM_INIT_ZERO || p->init == SPM_INIT_ONE) {
            for (i = 0; i < count; i++) p->value.data[i] = p->init == SPM_INIT_ONE ? 1.0f : 0.0f;
            continue;
        }
        job.key = spm_random_key(seed, spmi_name_hash(p->name), 0);
        job.data = p->value.data;
        job.count = count;
        job.normal = p->init != SPM_INIT_UNIFORM_FAN_IN;
        if (p->init == SPM_INIT_HE_FAN_OUT) {
            int64_t window = p->value.rank == 4 ? p->value.shape[1] * p->value.shape[2] : 1;
            job.scale = (float)sqrt(2.0 / (double)(p->value.shape[0] * window));
        } else {
            /* trunc_normal_ cuts at 100 standard deviations, which no draw here reaches (|N| < 6.7) */
            job.scale = job.normal ? 0.02f : (float)(1.0 / sqrt((double)model->fan_in[n]));
        }
        spm_parallel(model->ctx, (count + SPMI_INIT_CHUNK - 1) / SPMI_INIT_CHUNK, spmi_init_task, &job);
    }
    spm_model_touch(model);
}

SPMDEF void spm_model_touch(spm_model *model)
{
    model->version++;
}

SPMDEF uint64_t spm_model_version(const spm_model *model)
{
    return model->version;
}

SPMDEF void spm_model_zero_gradients(spm_model *model)
{
    if (model->n_parameters) memset(model->written, 0, (size_t)model->n_parameters);
}

SPMDEF void spm_model_finish_gradients(spm_model *model)
{
    int i;
    for (i = 0; i < model->n_parameters; i++) {
        spm_parameter *p = &model->parameters[i];
        if (p->gradient && !model->written[i]) memset(p->gradient, 0, (size_t)spm_tensor_count(&p->value) * sizeof(float));
        model->written[i] = 1;
    }
}

/* ---- plans: who lives when, and where ----------------------------------------------------------------------------
 * Time is a line of steps: the forward pass, then per segment, from the last to the first, the segment's replay and its
 * backward steps.  Every value and every gradient lives from its first writer to its last reader; two that never live
 * at the same time may share memory.  The last segment is not replayed: its values are still there.  Inside the
 * others only what later segments read is kept; the rest has a second, replayed life ("replay" below). */

typedef struct spmi_buffer {
    size_t bytes, offset;
    int start, end; /* both included; start > end: not used */
    int id;
} spmi_buffer;

/* What a run asks of a value beyond the program. */
#define SPMI_WANT_KEEP 1            /* its data and gradient stay */
#define SPMI_WANT_GRADIENT 2        /* a hook reads its gradient */
#define SPMI_WANT_VALUE_GRADIENT 4  /* a hook reads both at the same time */

typedef struct spmi_plan {
    size_t bytes;            /* of the arena */
    int last;                /* the end of time */
    int segments;            /* 1: without replays */
    unsigned char *wanted;   /* per value: its gradient is for somebody outside */
    unsigned char *need, *have; /* per value: its gradient is of use; one can arrive */
    unsigned char *active;   /* per step: can have a backward pass */
    unsigned char *pinned, *kept, *saved; /* per value: to the end; across segments; read by some backward step */
    unsigned char *replayed; /* per step */
    int *replay_time, *backward_time; /* per step; -1: never */
    int n_buffers;
    /* three buffers per value (value, replay, gradient), then one per step for a gradient that cannot be written in place
     * because its value stands among the inputs twice */
    spmi_buffer *buffers;
} spmi_plan;

static void spmi_plan_free(spm_context *ctx, spmi_plan *plan)
{
    spmi_free(ctx, plan->wanted);
    spmi_free(ctx, plan->replay_time);
    spmi_free(ctx, plan->buffers);
    memset(plan, 0, sizeof *plan);
}

/* Memory for the tables of a plan; the byte tables share one block, as do the times. 0 if memory runs out. */
static int spmi_plan_alloc(const spm_program *program, spmi_plan *plan)
{
    const int values = program->n_values, steps = program->n_steps;
    memset(plan, 0, sizeof *plan);
    plan->n_buffers = 3 * values + steps;
    plan->wanted = (unsigned char *)spmi_alloc_array(program->ctx, 6 * (int64_t)values + 2 * (int64_t)steps, 1);
    plan->replay_time = (int *)spmi_alloc_array(program->ctx, 2 * (int64_t)steps, sizeof(int));
    plan->buffers = (spmi_buffer *)spmi_alloc_array(program->ctx, plan->n_buffers, sizeof *plan->buffers);
    if (!plan->wanted || !plan->replay_time || !plan->buffers) {
        spmi_plan_free(program->ctx, plan);
        return 0;
    }
    plan->need = plan->wanted + values;
    plan->have = plan->need + values;
    plan->pinned = plan->have + values;
    plan->kept = plan->pinned + values;
    plan->saved = plan->kept + values;
    plan->active = plan->saved + values;
    plan->replayed = plan->active + steps;
    plan->backward_time = plan->replay_time + steps;
    return 1;
}

/* Wanted, needed and possible gradients; pinned values. */
static void spmi_plan_gradients(const spm_program *program, const unsigned char *want, int backward, spmi_plan *plan)
{
    int v, s, i;
    for (v = 1; v < program->n_values; v++) {
        const spmi_tape_value *value = &program->values[v];
        plan->wanted[v] = value->kind != SPMI_VALUE_PARAMETER && (value->wanted || want[v]);
        plan->pinned[v] = value->kind == SPMI_VALUE_RESULT && (value->wanted || (want[v] & SPMI_WANT_KEEP));
        plan->have[v] = plan->pinned[v];
    }
    for (s = 0; s < program->n_steps; s++) { /* batch statistics wait for their commit */
        const spmi_tape_step *step = &program->steps[s];
        if (step->op == SPM_OP_BATCH_NORM) plan->pinned[step->out + 1] = plan->pinned[step->out + 2] = 1;
    }
    if (!backward) return;
    spmi_tape_needs(program, plan->wanted, plan->need);
    for (s = program->n_steps - 1; s >= 0; s--) {
        const spmi_tape_step *step = &program->steps[s];
        if (!plan->have[step->out]) continue;
        for (i = 0; i < step->n_in; i++) {
            if (!plan->need[step->in[i]] || !spm_op_differentiable(step->op, i)) continue;
            plan->active[s] = 1;
            plan->have[step->in[i]] = 1;
        }
    }
}

/* Which values backward steps read, which ones outlive their segment, which steps are replayed. */
static void spmi_plan_segments(const spm_program *program, const unsigned char *want, int backward, spmi_plan *plan)
{
    const int last_segment = program->n_steps ? program->steps[program->n_steps - 1].segment : 0;
    int v, s, i;
    for (s = 0; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        for (i = 0; i < step->n_in; i++) {
            v = step->in[i];
            if (plan->active[s] && spm_op_backward_reads(step->op, &step->attr, 0, i)) plan->saved[v] = 1;
            if (program->values[v].kind == SPMI_VALUE_RESULT && program->steps[program->values[v].index].segment != step->segment) plan->kept[v] = 1;
        }
        for (i = 0; i < step->n_out; i++) {
            v = step->out + i;
            if (plan->active[s] && spm_op_backward_reads(step->op, &step->attr, 1, i)) plan->saved[v] = 1;
            if (backward && (want[v] & SPMI_WANT_VALUE_GRADIENT)) plan->saved[v] = 1;
            if (plan->segments < 2 || step->segment == last_segment || plan->pinned[v]) plan->kept[v] = 1;
        }
    }
    if (plan->segments < 2) return;
    for (s = program->n_steps - 1; s >= 0; s--) {
        const spmi_tape_step *step = &program->steps[s];
        if (step->segment == last_segment) continue;
        for (i = 0; i < step->n_out; i++) {
            v = step->out + i;
            if (!plan->kept[v] && plan->saved[v]) plan->replayed[s] = 1;
        }
        /* what a replayed step reads inside its segment must be replayed as well: `saved` hands that on */
        for (i = 0; plan->replayed[s] && i < step->n_in; i++) {
            if (!plan->kept[step->in[i]]) plan->saved[step->in[i]] = 1;
        }
    }
}

static void spmi_plan_times(const spm_program *program, int backward, spmi_plan *plan)
{
    int s, end = program->n_steps, first, now = program->n_steps;
    for (s = 0; s < program->n_steps; s++) plan->replay_time[s] = plan->backward_time[s] = -1;
    while (backward && end > 0) {
        for (first = end - 1; first > 0 && plan->segments > 1 && program->steps[first - 1].segment == program->steps[end - 1].segment; first--) {
        }
        if (plan->segments < 2) first = 0;
        for (s = first; s < end; s++) {
            if (plan->replayed[s]) plan->replay_time[s] = now++;
        }
        for (s = end - 1; s >= first; s--) plan->backward_time[s] = now++;
        end = first;
    }
    plan->last = now;
}

static void spmi_buffer_use(spmi_buffer *buffer, int time)
{
    if (time < 0) return;
    if (time < buffer->start) buffer->start = time;
    if (time > buffer->end) buffer->end = time;
}

#define SPMI_BUFFER_VALUE(v) (3 * (v))
#define SPMI_BUFFER_REPLAY(v) (3 * (v) + 1)
#define SPMI_BUFFER_GRADIENT(v) (3 * (v) + 2)
#define SPMI_BUFFER_TWICE(program, s) (3 * (program)->n_values + (s))

/* The lives of everything that step s reads and writes. */
static void spmi_plan_step(const spm_program *program, int s, spmi_plan *plan)
{
    const spmi_tape_step *step = &program->steps[s];
    const int replay = plan->replay_time[s], back = plan->active[s] ? plan->backward_time[s] : -1;
    int i, j;
    for (i = 0; i < step->n_in + step->n_out; i++) {
        const int is_in = i < step->n_in, v = is_in ? step->in[i] : step->out + i - step->n_in;
        const int saved = spm_op_backward_reads(step->op, &step->attr, !is_in, is_in ? i : i - step->n_in);
        spmi_buffer *first = &plan->buffers[SPMI_BUFFER_VALUE(v)];
        spmi_buffer *second = plan->kept[v] ? first : &plan->buffers[SPMI_BUFFER_REPLAY(v)];
        if (!v || program->values[v].kind != SPMI_VALUE_RESULT) continue;
        spmi_buffer_use(first, s);
        spmi_buffer_use(second, replay);
        if (saved) spmi_buffer_use(second, back);
        if (plan->pinned[v]) spmi_buffer_use(first, plan->last);
    }
    if (plan->backward_time[s] < 0) return;
    /* the gradient of its result is read here, by the step or by a hook */
    if (plan->have[step->out] && plan->need[step->out]) {
        spmi_buffer_use(&plan->buffers[SPMI_BUFFER_GRADIENT(step->out)], plan->backward_time[s]);
    }
    for (i = 0; i < step->n_in && plan->active[s]; i++) {
        const int v = step->in[i];
        if (!plan->need[v] || !spm_op_differentiable(step->op, i)) continue;
        if (program->values[v].kind != SPMI_VALUE_PARAMETER) spmi_buffer_use(&plan->buffers[SPMI_BUFFER_GRADIENT(v)], back);
        for (j = 0; j < i; j++) {
            if (step->in[j] == v) spmi_buffer_use(&plan->buffers[SPMI_BUFFER_TWICE(program, s)], back);
        }
    }
}

/* The lives of all buffers and their sizes. 0 if a size overflows. */
static int spmi_plan_lives(const spm_program *program, const unsigned char *want, int64_t n, int backward, spmi_plan *plan)
{
    int v, s, i;
    for (i = 0; i < plan->n_buffers; i++) {
        plan->buffers[i].start = INT_MAX;
        plan->buffers[i].end = -1;
        plan->buffers[i].id = i;
    }
    for (s = 0; s < program->n_steps; s++) spmi_plan_step(program, s, plan);
    for (v = 1; v < program->n_values; v++) {
        const spmi_tape_value *value = &program->values[v];
        const spm_tensor shape = spmi_tape_shape(program, v, n, NULL);
        const int64_t count = spm_tensor_count(&shape);
        size_t bytes;
        if (value->kind == SPMI_VALUE_PARAMETER) continue;
        if (!count || !spmi_mul_size((size_t)count, sizeof(float), &bytes) || bytes > SIZE_MAX / 4
            || (uint64_t)count > SIZE_MAX / sizeof(float)) return 0;
        for (i = 0; i < 3; i++) plan->buffers[3 * v + i].bytes = spmi_line_bytes(bytes);
        if (!backward) continue;
        /* gradients that come from or go to the outside */
        if (plan->pinned[v] && plan->need[v]) spmi_buffer_use(&plan->buffers[SPMI_BUFFER_GRADIENT(v)], program->n_steps);
        if ((plan->pinned[v] || value->kind == SPMI_VALUE_INPUT) && plan->wanted[v] && plan->have[v]) {
            spmi_buffer_use(&plan->buffers[SPMI_BUFFER_GRADIENT(v)], plan->last);
        }
        /* a hook reads the value when its gradient is complete: just before its own step goes backward */
        if ((want[v] & SPMI_WANT_VALUE_GRADIENT) && value->kind == SPMI_VALUE_RESULT) {
            spmi_buffer_use(&plan->buffers[plan->kept[v] ? SPMI_BUFFER_VALUE(v) : SPMI_BUFFER_REPLAY(v)], plan->backward_time[value->index]);
        }
    }
    for (s = 0; s < program->n_steps; s++) {
        spmi_buffer *twice = &plan->buffers[SPMI_BUFFER_TWICE(program, s)];
        if (twice->end < 0) continue;
        for (i = 0; i < program->steps[s].n_in; i++) {
            const spm_tensor shape = spmi_tape_shape(program, program->steps[s].in[i], n, NULL);
            if (program->steps[s].in[i]) twice->bytes = SPMI_MAX(twice->bytes, spmi_line_bytes((size_t)spm_tensor_count(&shape) * sizeof(float)));
        }
    }
    return 1;
}

/* Large ones first; among equals the earlier. */
static int spmi_buffer_order(const void *a, const void *b)
{
    const spmi_buffer *x = (const spmi_buffer *)a, *y = (const spmi_buffer *)b;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? 1 : -1;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int spmi_buffer_by_id(const void *a, const void *b)
{
    return ((const spmi_buffer *)a)->id < ((const spmi_buffer *)b)->id ? -1 : 1;
}

/* Offsets: the largest buffer first, each into the tightest gap between those that live at the same time.  O(n^2) for n
 * buffers, a few milliseconds for the deepest networks. 0 if memory runs out or the sum overflows. */
static int spmi_plan_pack(spm_context *ctx, spmi_plan *plan)
{
    int *placed = (int *)spmi_alloc_array(ctx, plan->n_buffers, sizeof(int));
    int i, j, n = 0, good = placed != NULL;
    plan->bytes = 0;
    if (good) qsort(plan->buffers, (size_t)plan->n_buffers, sizeof *plan->buffers, spmi_buffer_order);
    for (i = 0; good && i < plan->n_buffers; i++) {
        spmi_buffer *buffer = &plan->buffers[i];
        size_t top = 0, best = SIZE_MAX, best_gap = SIZE_MAX;
        if (buffer->end < 0) continue;
        for (j = 0; j < n; j++) { /* placed: in the order of offsets */
            const spmi_buffer *other = &plan->buffers[placed[j]];
            if (other->end < buffer->start || other->start > buffer->end) continue;
            if (other->offset > top && other->offset - top >= buffer->bytes && other->offset - top < best_gap) {
                best_gap = other->offset - top;
                best = top;
            }
            top = SPMI_MAX(top, other->offset + other->bytes);
        }
        buffer->offset = best == SIZE_MAX ? top : best;
        good = spmi_add_size(buffer->offset, buffer->bytes, &top);
        plan->bytes = SPMI_MAX(plan->bytes, top);
        for (j = n++; j > 0 && plan->buffers[placed[j - 1]].offset > buffer->offset; j--) placed[j] = placed[j - 1];
        placed[j] = i;
    }
    if (good) qsort(plan->buffers, (size_t)plan->n_buffers, sizeof *plan->buffers, spmi_buffer_by_id);
    spmi_free(ctx, placed);
    return good;
}

/* A plan for batches of n; `want` are the run's wishes per value. 0 if memory runs out. */
static int spmi_plan_create(const spm_program *program, const unsigned char *want, int64_t n, int backward, int segments, spmi_plan *plan)
{
    if (!spmi_plan_alloc(program, plan)) return 0;
    plan->segments = backward && segments ? program->segment + 1 : 1;
    spmi_plan_gradients(program, want, backward, plan);
    spmi_plan_segments(program, want, backward, plan);
    spmi_plan_times(program, backward, plan);
    if (spmi_plan_lives(program, want, n, backward, plan) && spmi_plan_pack(program->ctx, plan)) return 1;
    spmi_plan_free(program->ctx, plan);
    return 0;
}

/* ---- runs ---- */

#define SPMI_TAPE_CHUNK 32768 /* floats per task of an element-wise pass */
#define SPMI_HOOK_CHUNKS 16   /* partial sums of a hook */

typedef struct spmi_hook {
    int value;
    int kind;                 /* spm_hook_kind; -1: a write hook */
    int on_gradient;
    double *out;
    void (*fn)(void *user, spm_tensor *value);
    void *user;
} spmi_hook;

typedef struct spmi_run_value {
    float *data, *replay, *gradient; /* planned memory; `replay` is `data` unless the value has a second life */
    float *bound;                    /* the caller's */
    unsigned char want;              /* SPMI_WANT_... */
    unsigned char hooked;            /* 1: some hook watches it */
    unsigned char need, written;     /* of the gradient, in this backward pass */
} spmi_run_value;

typedef struct spmi_run_parameter {
    float *keep, *masked;   /* the mask, and value * keep; NULL: none */
    uint64_t masked_version;
    float *own;             /* the run's own buffer; NULL: the model's */
    int uses;               /* operations that read it */
    unsigned char hooked;   /* 1: some hook watches its gradient */
} spmi_run_parameter;

typedef enum spmi_run_state { SPMI_RUN_IDLE, SPMI_RUN_FORWARD, SPMI_RUN_BACKWARD } spmi_run_state;

struct spm_run {
    spm_context *ctx;
    spm_model *model;
    const spm_program *program;
    spm_run_desc desc;
    spm_error error;
    spmi_plan plan;
    spmi_run_value *values;
    spmi_run_parameter *parameters;
    spm_op_call *calls;      /* one per step */
    uint64_t *packed_version; /* per step: of the model, + 1; 0: the packed weights are stale */
    char *arena, *packed, *scratch;
    size_t packed_bytes, scratch_bytes;
    float *aside;            /* gradients of masked and hooked parameters of one step */
    int64_t aside_count;
    double *partial;         /* of hooks: [SPMI_HOOK_CHUNKS][channels] */
    int64_t partial_channels;
    spmi_hook *hooks;
    size_t hooks_room;
    int n_hooks;
    size_t mask_bytes;
    float *own;              /* memory of own buffers */
    const int64_t *examples;
    uint64_t stream;
    int64_t n;               /* the last batch; 0: shapes are not set */
    int first, first_step;   /* forward_from: the value it began behind (0: none) and the step */
    int training, set_gradients;
    spmi_run_state state;
};

SPMDEF void spm_run_destroy(spm_run *run)
{
    spm_context *ctx;
    int i;
    if (!run) return;
    ctx = run->ctx;
    for (i = 0; run->parameters && i < run->model->n_parameters; i++) {
        spmi_free(ctx, run->parameters[i].keep);
        spmi_free(ctx, run->parameters[i].masked);
    }
    spmi_plan_free(ctx, &run->plan);
    spmi_free(ctx, run->values);
    spmi_free(ctx, run->parameters);
    spmi_free(ctx, run->calls);
    spmi_free(ctx, run->packed_version);
    spmi_free(ctx, run->arena);
    spmi_free(ctx, run->packed);
    spmi_free(ctx, run->scratch);
    spmi_free(ctx, run->aside);
    spmi_free(ctx, run->partial);
    spmi_free(ctx, run->hooks);
    spmi_free(ctx, run->own);
    spmi_free(ctx, run);
}

/* Plans anew after the wishes have changed; the old plan stays when memory runs out. */
static spm_status spmi_run_plan(spm_run *run)
{
    const spm_program *program = run->program;
    unsigned char *want = (unsigned char *)spmi_alloc_array(run->ctx, program->n_values, 1);
    spmi_plan plan = SPM_ZERO;
    char *arena = NULL;
    int v;
    for (v = 0; want && v < program->n_values; v++) want[v] = run->values[v].want;
    if (want && spmi_plan_create(program, want, run->desc.max_batch, run->desc.backward, run->desc.segments, &plan)) {
        arena = (char *)spmi_alloc(run->ctx, plan.bytes + SPMI_ALIGN);
        if (!arena) spmi_plan_free(run->ctx, &plan);
    }
    spmi_free(run->ctx, want);
    if (!arena) return spmi_fail(run->ctx, &run->error, SPM_E_MEMORY, "out of memory for a run's activations at batch %lld", (long long)run->desc.max_batch);
    spmi_plan_free(run->ctx, &run->plan);
    spmi_free(run->ctx, run->arena);
    run->plan = plan;
    run->arena = arena;
    run->state = SPMI_RUN_IDLE;
    for (v = 1; v < program->n_values; v++) {
        const spmi_buffer *b = &plan.buffers[3 * v];
        spmi_run_value *value = &run->values[v];
        value->data = b[0].end >= 0 ? (float *)(void *)(arena + b[0].offset) : NULL;
        value->replay = b[1].end >= 0 ? (float *)(void *)(arena + b[1].offset) : value->data;
        value->gradient = b[2].end >= 0 ? (float *)(void *)(arena + b[2].offset) : NULL;
    }
    return SPM_OK;
}

/* Sets the shapes of all calls for batch n and makes sure that the scratch memory is enough (operations ask for no less
 * memory at a larger batch, so it is: taken once at max_batch). */
static spm_status spmi_run_shapes(spm_run *run, int64_t n)
{
    int s, pass;
    size_t scratch = 0;
    run->n = 0;
    for (s = 0; s < run->program->n_steps; s++) {
        const spmi_tape_step *step = &run->program->steps[s];
        spm_op_call *call = &run->calls[s];
        void *packed = call->packed;
        const int ready = call->packed_ready;
        spmi_tape_call(run->program, step, n, &run->model->program->present, call);
        call->packed = packed;
        call->packed_ready = ready;
        if (spm_op_infer(run->ctx, step->op, call, &run->error)) return run->error.status;
        for (pass = 0; pass < 2; pass++) {
            call->training = pass;
            scratch = SPMI_MAX(scratch, spm_op_scratch(run->ctx, step->op, call, 0));
            if (run->desc.backward) scratch = SPMI_MAX(scratch, spm_op_scratch(run->ctx, step->op, call, 1));
        }
    }
    if (scratch > run->scratch_bytes || !run->scratch) {
        char *larger = (char *)spmi_alloc(run->ctx, scratch + SPMI_ALIGN);
        if (!larger) return spmi_fail_memory(run->ctx, &run->error, "the scratch memory of a run");
        spmi_free(run->ctx, run->scratch);
        run->scratch = larger;
        run->scratch_bytes = scratch;
    }
    run->n = n;
    return SPM_OK;
}

/* Packed weights, for operations whose weight is a parameter: their places in one block. */
static spm_status spmi_run_pack_memory(spm_run *run)
{
    const spm_program *program = run->program;
    size_t at = 0;
    int s, pass;
    for (pass = 0; pass < 2; pass++) {
        for (at = 0, s = 0; s < program->n_steps; s++) {
            const spmi_tape_step *step = &program->steps[s];
            size_t bytes;
            if (step->n_in < 2 || !step->in[1] || program->values[step->in[1]].kind != SPMI_VALUE_PARAMETER) continue;
            bytes = spm_op_packed(run->ctx, step->op, &run->calls[s]);
            if (!bytes) continue;
            if (pass) run->calls[s].packed = run->packed + at;
            if (!spmi_add_size(at, spmi_line_bytes(bytes), &at)) return spmi_fail_memory(run->ctx, &run->error, "packed weights");
        }
        if (pass || !at) break;
        run->packed = (char *)spmi_alloc(run->ctx, at);
        if (!run->packed) return spmi_fail_memory(run->ctx, &run->error, "packed weights");
        run->packed_bytes = at;
    }
    return SPM_OK;
}

SPMDEF spm_run *spm_run_create(spm_model *model, const spm_run_desc *desc, spm_error *err)
{
    spm_context *ctx = model->ctx;
    const spm_program *program = model->program;
    spm_run *run = (spm_run *)spmi_alloc_zero(ctx, sizeof *run);
    int s, i;
    if (!run) {
        (void)spmi_fail_memory(ctx, err, "a run");
        return NULL;
    }
    run->ctx = ctx;
    run->model = model;
    run->program = program;
    if (desc) run->desc = *desc;
    if (run->desc.max_batch == 0) run->desc.max_batch = 1;
    if (run->desc.max_batch < 0 || run->desc.max_batch > INT32_MAX) {
        (void)spmi_fail(ctx, &run->error, SPM_E_ARGUMENT, "a run's max_batch is %lld; it must be 1 or more", (long long)run->desc.max_batch);
    }
    run->values = (spmi_run_value *)spmi_alloc_array(ctx, program->n_values, sizeof *run->values);
    run->parameters = (spmi_run_parameter *)spmi_alloc_array(ctx, program->n_parameters, sizeof *run->parameters);
    run->calls = (spm_op_call *)spmi_alloc_array(ctx, program->n_steps, sizeof *run->calls);
    run->packed_version = (uint64_t *)spmi_alloc_array(ctx, program->n_steps, sizeof *run->packed_version);
    if (!run->values || !run->parameters || !run->calls || !run->packed_version) (void)spmi_fail_memory(ctx, &run->error, "a run");
    if (!run->error.status && !spmi_run_shapes(run, run->desc.max_batch) && !spmi_run_pack_memory(run)) (void)spmi_run_plan(run);
    if (run->error.status) {
        (void)spmi_fail(ctx, err, run->error.status, "%s", run->error.text);
        spm_run_destroy(run);
        return NULL;
    }
    for (s = 0; s < program->n_steps; s++) {
        for (i = 0; i < program->steps[s].n_in; i++) {
            const spmi_tape_value *value = &program->values[program->steps[s].in[i]];
            if (program->steps[s].in[i] && value->kind == SPMI_VALUE_PARAMETER) run->parameters[value->index].uses++;
        }
    }
    return run;
}

SPMDEF spm_error *spm_run_error(spm_run *run)
{
    return &run->error;
}

SPMDEF size_t spm_run_bytes(const spm_run *run)
{
    return run->plan.bytes + run->scratch_bytes + run->packed_bytes + run->mask_bytes + (size_t)run->aside_count * sizeof(float)
        + (size_t)run->partial_channels * SPMI_HOOK_CHUNKS * sizeof(double);
}

static int spmi_run_has(const spm_run *run, spm_value value)
{
    return value > 0 && value < run->program->n_values;
}

static spm_status spmi_run_no_value(spm_run *run, spm_value value, const char *what)
{
    return spmi_fail(run->ctx, &run->error, SPM_E_ARGUMENT, "%s: value %d is not one for this call (a program's values are 1 to %d)", what, value,
                     run->program->n_values - 1);
}

/* A parameter's data as this run sees it. */
static float *spmi_run_parameter_data(const spm_run *run, int index)
{
    const spmi_run_parameter *p = &run->parameters[index];
    return p->masked ? p->masked : p->own ? p->own : run->model->parameters[index].value.data;
}

/* A value's data: in its first life, or (replay = 1) during the backward pass. */
static float *spmi_run_value_data(const spm_run *run, int v, int replay)
{
    const spmi_tape_value *value = &run->program->values[v];
    if (value->kind == SPMI_VALUE_PARAMETER) return spmi_run_parameter_data(run, value->index);
    if (value->kind == SPMI_VALUE_INPUT || v == run->first) return run->values[v].bound;
    return replay ? run->values[v].replay : run->values[v].data;
}

SPMDEF spm_status spm_run_input(spm_run *run, spm_value value, const float *data)
{
    if (!spmi_run_has(run, value) || run->program->values[value].kind == SPMI_VALUE_PARAMETER) return spmi_run_no_value(run, value, "spm_run_input");
    memcpy(&run->values[value].bound, &data, sizeof data); /* only read */
    return SPM_OK;
}

SPMDEF void spm_run_examples(spm_run *run, const int64_t *ids)
{
    run->examples = ids;
}

SPMDEF void spm_run_step(spm_run *run, uint64_t step)
{
    run->stream = step;
}

/* ---- element-wise passes and hooks ---- */

typedef struct spmi_tape_job {
    spm_context *ctx;
    const float *x, *keep, *gradient;
    float *y;
    double *partial;
    int64_t count, channels, rows, chunk; /* `rows` runs of `channels`, or of a unit's elements */
    int add, kind;
} spmi_tape_job;

static void spmi_masked_task(void *arg, int64_t task, int slot)
{
    const spmi_tape_job *job = (const spmi_tape_job *)arg;
    const int64_t at = task * SPMI_TAPE_CHUNK, n = SPMI_MIN(job->count - at, (int64_t)SPMI_TAPE_CHUNK);
    (void)slot;
    SPMI_KERNEL(job->ctx, tape_masked, (n, job->x + at, job->keep ? job->keep + at : NULL, job->y + at, job->add));
}

/* y = x * keep, or y += x * keep; keep NULL: ones. */
static void spmi_masked(spm_context *ctx, int64_t count, const float *x, const float *keep, float *y, int add)
{
    spmi_tape_job job = SPM_ZERO;
    job.ctx = ctx;
    job.x = x;
    job.keep = keep;
    job.y = y;
    job.count = count;
    job.add = add;
    spm_parallel(ctx, (count + SPMI_TAPE_CHUNK - 1) / SPMI_TAPE_CHUNK, spmi_masked_task, &job);
}

static double spmi_hook_term(const spmi_tape_job *job, int64_t i)
{
    const double x = (double)job->x[i];
    return job->kind == SPM_HOOK_SUM ? x : job->kind == SPM_HOOK_SUM_SQUARES ? x * x : x * (double)job->gradient[i];
}

/* One chunk of rows, summed per channel. */
static void spmi_hook_value_task(void *arg, int64_t task, int slot)
{
    const spmi_tape_job *job = (const spmi_tape_job *)arg;
    const int64_t end = SPMI_MIN(job->rows, (task + 1) * job->chunk);
    double *sum = job->partial + task * job->channels;
    int64_t row, c;
    (void)slot;
    for (c = 0; c < job->channels; c++) sum[c] = 0.0;
    for (row = task * job->chunk; row < end; row++) {
        for (c = 0; c < job->channels; c++) sum[c] += spmi_hook_term(job, row * job->channels + c);
    }
}

/* One unit of a parameter. */
static void spmi_hook_unit_task(void *arg, int64_t task, int slot)
{
    const spmi_tape_job *job = (const spmi_tape_job *)arg;
    const int64_t size = job->count / job->channels;
    double sum = 0.0;
    int64_t i;
    (void)slot;
    for (i = task * size; i < (task + 1) * size; i++) sum += spmi_hook_term(job, i);
    job->partial[task] = sum;
}

/* Adds the reduction of `shape`d data to out. unit: per first axis, else per last. */
static void spmi_hook_reduce(spm_run *run, const spmi_hook *hook, const spm_tensor *shape, const float *x, const float *gradient, int unit)
{
    spmi_tape_job job = SPM_ZERO;
    int64_t c, k, chunks;
    job.kind = hook->kind;
    job.x = x;
    job.gradient = gradient;
    job.partial = run->partial;
    job.count = spm_tensor_count(shape);
    job.channels = unit ? shape->shape[0] : shape->shape[shape->rank - 1];
    job.rows = job.count / job.channels;
    if (unit) {
        spm_parallel(run->ctx, job.channels, spmi_hook_unit_task, &job);
        for (c = 0; c < job.channels; c++) hook->out[c] += job.partial[c];
        return;
    }
    job.chunk = SPMI_MAX((int64_t)1, (job.rows + SPMI_HOOK_CHUNKS - 1) / SPMI_HOOK_CHUNKS);
    chunks = (job.rows + job.chunk - 1) / job.chunk;
    spm_parallel(run->ctx, chunks, spmi_hook_value_task, &job);
    for (c = 0; c < job.channels; c++) {
        for (k = 1; k < chunks; k++) job.partial[c] += job.partial[k * job.channels + c];
        hook->out[c] += job.partial[c];
    }
}

/* Runs the hooks of a value: after it was computed (gradient NULL), or when its gradient is complete. */
static void spmi_run_hooks(spm_run *run, int v, float *data, const float *gradient, int replay)
{
    const int unit = run->program->values[v].kind == SPMI_VALUE_PARAMETER;
    spm_tensor tensor = spmi_tape_shape(run->program, v, run->n, data);
    int i;
    for (i = 0; i < run->n_hooks; i++) {
        const spmi_hook *hook = &run->hooks[i];
        const int backward = hook->on_gradient || hook->kind == SPM_HOOK_VALUE_GRADIENT;
        if (hook->value != v) continue;
        if (hook->kind < 0) {
            if (!gradient) hook->fn(hook->user, &tensor);
        } else if (!replay && backward == (gradient != NULL)) {
            spmi_hook_reduce(run, hook, &tensor, hook->on_gradient && hook->kind != SPM_HOOK_VALUE_GRADIENT ? gradient : data, gradient, unit);
        }
    }
}

/* ---- forward ---- */

/* Points a call's inputs and outputs to their data. */
static void spmi_run_point(spm_run *run, int s, int replay)
{
    const spmi_tape_step *step = &run->program->steps[s];
    spm_op_call *call = &run->calls[s];
    int i;
    for (i = 0; i < step->n_in; i++) call->in[i].data = step->in[i] ? spmi_run_value_data(run, step->in[i], replay) : NULL;
    for (i = 0; i < step->n_out; i++) call->out[i].data = replay ? run->values[step->out + i].replay : run->values[step->out + i].data;
    call->scratch = run->scratch;
}

static void spmi_run_forward_step(spm_run *run, int s, int replay)
{
    const spmi_tape_step *step = &run->program->steps[s];
    int i;
    spmi_run_point(run, s, replay);
    spm_op_forward(run->ctx, step->op, &run->calls[s]);
    for (i = 0; run->n_hooks && i < step->n_out; i++) {
        if (run->values[step->out + i].hooked) spmi_run_hooks(run, step->out + i, run->calls[s].out[i].data, NULL, replay);
    }
}

/* Renews what was derived from parameters: masked copies; packed weights are marked stale. */
static void spmi_run_refresh(spm_run *run)
{
    const spm_program *program = run->program;
    const uint64_t now = run->model->version + 1;
    int p, s;
    for (p = 0; p < run->model->n_parameters; p++) {
        spmi_run_parameter *own = &run->parameters[p];
        const spm_tensor *value = &run->model->parameters[p].value;
        if (!own->masked || own->masked_version == now) continue;
        spmi_masked(run->ctx, spm_tensor_count(value), value->data, own->keep, own->masked, 0);
        own->masked_version = now;
    }
    for (s = 0; s < program->n_steps; s++) {
        if (run->packed_version[s] != now) run->calls[s].packed_ready = 0;
        run->packed_version[s] = now;
    }
}

/* Checks that everything the steps from run->first_step on read is there. */
static spm_status spmi_run_check_bound(spm_run *run)
{
    const spm_program *program = run->program;
    int s, i, j;
    for (s = run->first_step; s < program->n_steps; s++) {
        for (i = 0; i < program->steps[s].n_in; i++) {
            const int v = program->steps[s].in[i];
            const spmi_tape_value *value = &program->values[v];
            if (!v || value->kind == SPMI_VALUE_PARAMETER) continue;
            if (value->kind == SPMI_VALUE_INPUT || v == run->first) {
                if (run->values[v].bound) continue;
                for (j = 0; j < program->n_names && program->names[j].value != v; j++) {
                }
                return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "%s: the value %s is not bound; call spm_run_input before forward",
                                 spm_op_name(program->steps[s].op), j < program->n_names ? program->names[j].text : "to start from");
            }
            if (value->index < run->first_step) {
                return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "%s (operation %d) needs value %d from before the value that the run starts from",
                                 spm_op_name(program->steps[s].op), s, v);
            }
        }
    }
    return SPM_OK;
}

static spm_status spmi_run_forward(spm_run *run, int first, int first_step, int64_t n, int training)
{
    const spm_program *program = run->program;
    unsigned mode;
    int s, v;
    run->state = SPMI_RUN_IDLE;
    if (n < 1 || n > run->desc.max_batch) {
        return spmi_fail(run->ctx, &run->error, SPM_E_ARGUMENT, "a forward pass of %lld examples in a run made for 1 to %lld", (long long)n,
                         (long long)run->desc.max_batch);
    }
    run->first = first;
    run->first_step = first_step;
    if (spmi_run_check_bound(run)) return run->error.status;
    if (run->n != n && spmi_run_shapes(run, n)) return run->error.status;
    run->training = training != 0;
    run->set_gradients = 0;
    for (v = 0; v < program->n_values; v++) run->values[v].written = 0;
    mode = spmi_denormals_off();
    spmi_run_refresh(run);
    for (v = 1; v < program->n_values && run->n_hooks; v++) {
        if (run->values[v].hooked && program->values[v].kind != SPMI_VALUE_RESULT) spmi_run_hooks(run, v, spmi_run_value_data(run, v, 0), NULL, 0);
    }
    for (s = first_step; s < program->n_steps; s++) {
        spm_op_call *call = &run->calls[s];
        call->training = run->training;
        call->seed = spm_random_key(run->desc.seed, (uint64_t)s, 0);
        call->stream = run->stream;
        call->example = run->examples;
        spmi_run_forward_step(run, s, 0);
    }
    spmi_denormals_restore(mode);
    run->state = SPMI_RUN_FORWARD;
    return SPM_OK;
}

SPMDEF spm_status spm_run_forward(spm_run *run, int64_t n, int training)
{
    return spmi_run_forward(run, 0, 0, n, training);
}

SPMDEF spm_status spm_run_forward_from(spm_run *run, spm_value first, int64_t n, int training)
{
    const spmi_tape_value *value;
    if (!spmi_run_has(run, first)) return spmi_run_no_value(run, first, "spm_run_forward_from");
    value = &run->program->values[first];
    if (value->kind == SPMI_VALUE_PARAMETER) return spmi_run_no_value(run, first, "spm_run_forward_from");
    return spmi_run_forward(run, first, value->index + 1, n, training);
}

/* 1 if the value's data and gradient stay to the end. */
static int spmi_run_kept(const spm_run *run, int v)
{
    const spmi_tape_value *value = &run->program->values[v];
    return value->kind == SPMI_VALUE_RESULT && (value->wanted || (run->values[v].want & SPMI_WANT_KEEP));
}

SPMDEF float *spm_run_data(spm_run *run, spm_value value)
{
    const spmi_tape_value *v;
    if (!spmi_run_has(run, value)) return NULL;
    v = &run->program->values[value];
    if (v->kind != SPMI_VALUE_RESULT || value == run->first || spmi_run_kept(run, value)) return spmi_run_value_data(run, value, 0);
    return NULL;
}

SPMDEF spm_tensor spm_run_tensor(spm_run *run, spm_value value)
{
    spm_tensor none = SPM_ZERO;
    if (!spmi_run_has(run, value)) return none;
    return spmi_tape_shape(run->program, value, run->n ? run->n : run->desc.max_batch, spm_run_data(run, value));
}

SPMDEF spm_status spm_run_keep(spm_run *run, spm_value value)
{
    if (!spmi_run_has(run, value) || run->program->values[value].kind != SPMI_VALUE_RESULT) return spmi_run_no_value(run, value, "spm_run_keep");
    if (spmi_run_kept(run, value)) return SPM_OK;
    run->values[value].want |= SPMI_WANT_KEEP;
    if (!spmi_run_plan(run)) return SPM_OK;
    run->values[value].want &= (unsigned char)~SPMI_WANT_KEEP;
    return run->error.status;
}

/* ---- backward ---- */

SPMDEF spm_status spm_run_set_gradient(spm_run *run, spm_value value, const float *gradient)
{
    spm_tensor shape;
    if (!spmi_run_has(run, value) || !spmi_run_kept(run, value)) return spmi_run_no_value(run, value, "spm_run_set_gradient takes outputs and kept values");
    if (run->state != SPMI_RUN_FORWARD || !run->desc.backward) {
        return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "a gradient is set between forward and backward, in a run made with backward = 1");
    }
    run->set_gradients = 1;
    if (!run->values[value].gradient) return SPM_OK; /* nothing it could reach */
    shape = spmi_tape_shape(run->program, value, run->n, NULL);
    memcpy(run->values[value].gradient, gradient, (size_t)spm_tensor_count(&shape) * sizeof(float));
    run->values[value].written = 1;
    return SPM_OK;
}

/* 1 if the parameter's gradient takes a way around: it is masked or watched. */
static int spmi_run_aside(const spm_run *run, int parameter)
{
    return run->parameters[parameter].keep != NULL || run->parameters[parameter].hooked;
}

/* Which gradients this backward pass computes: spmi_tape_needs, less frozen parameters, plus watched ones, and nothing
 * from before the value that the pass started from. */
static void spmi_run_needs(spm_run *run)
{
    const spm_program *program = run->program;
    int v, s, i;
    for (v = 1; v < program->n_values; v++) {
        const spmi_tape_value *value = &program->values[v];
        spmi_run_value *mine = &run->values[v];
        if (value->kind == SPMI_VALUE_PARAMETER) {
            const unsigned flags = run->model->parameters[value->index].flags;
            mine->need = !(flags & SPM_PARAMETER_BUFFER) && (!(flags & SPM_PARAMETER_FROZEN) || run->parameters[value->index].hooked);
        } else {
            mine->need = run->plan.wanted[v] && mine->gradient && (value->kind == SPMI_VALUE_INPUT || value->index >= run->first_step || v == run->first);
        }
    }
    for (s = run->first_step; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        for (i = 0; i < step->n_in; i++) {
            if (run->values[step->in[i]].need && spm_op_differentiable(step->op, i)) run->values[step->out].need = 1;
        }
    }
}

/* Where the gradient of input i goes. `aside` counts the floats already in use there. */
static void spmi_run_point_gradient(spm_run *run, int s, int i, int64_t *aside)
{
    const spmi_tape_step *step = &run->program->steps[s];
    const int v = step->in[i];
    spm_op_call *call = &run->calls[s];
    spmi_run_value *mine = &run->values[v];
    int j;
    call->d_in[i] = call->in[i];
    for (j = 0; j < i; j++) {
        if (step->in[j] == v) {
            call->d_in[i].data = (float *)(void *)(run->arena + run->plan.buffers[SPMI_BUFFER_TWICE(run->program, s)].offset);
            return;
        }
    }
    if (run->program->values[v].kind == SPMI_VALUE_PARAMETER) {
        const int p = run->program->values[v].index;
        if (spmi_run_aside(run, p)) {
            call->d_in[i].data = run->aside + *aside;
            *aside += spmi_line_floats(spm_tensor_count(&call->in[i]));
        } else {
            call->d_in[i].data = run->model->parameters[p].gradient;
            call->d_in_add[i] = run->model->written[p];
            run->model->written[p] = 1;
        }
        return;
    }
    call->d_in[i].data = mine->gradient;
    call->d_in_add[i] = mine->written;
    mine->written = 1;
}

/* After a step: gradients that took a way around reach their places. */
static void spmi_run_collect(spm_run *run, int s)
{
    const spmi_tape_step *step = &run->program->steps[s];
    const spm_op_call *call = &run->calls[s];
    int i, j;
    for (i = step->n_in - 1; i >= 0; i--) {
        for (j = 0; j < i && call->d_in[i].data; j++) {
            if (step->in[j] != step->in[i]) continue;
            spmi_masked(run->ctx, spm_tensor_count(&call->in[i]), call->d_in[i].data, NULL, call->d_in[j].data, 1);
            break;
        }
    }
    for (i = 0; i < step->n_in; i++) {
        const int v = step->in[i], p = run->program->values[v].index;
        spm_parameter *parameter;
        if (!v || !call->d_in[i].data || run->program->values[v].kind != SPMI_VALUE_PARAMETER || !spmi_run_aside(run, p)) continue;
        for (j = 0; j < i && step->in[j] != v; j++) {
        }
        if (j < i) continue; /* it came with the first one */
        parameter = &run->model->parameters[p];
        if (run->parameters[p].hooked) spmi_run_hooks(run, v, call->in[i].data, call->d_in[i].data, 0);
        if (parameter->flags & SPM_PARAMETER_FROZEN) continue;
        spmi_masked(run->ctx, spm_tensor_count(&parameter->value), call->d_in[i].data, run->parameters[p].keep, parameter->gradient, run->model->written[p]);
        run->model->written[p] = 1;
    }
}

static void spmi_run_backward_step(spm_run *run, int s)
{
    const spmi_tape_step *step = &run->program->steps[s];
    spm_op_call *call = &run->calls[s];
    spmi_run_value *out = &run->values[step->out];
    int64_t aside = 0;
    int i, wanted = 0;
    if (!out->written) return;
    if (out->hooked) spmi_run_hooks(run, step->out, spmi_run_value_data(run, step->out, 1), out->gradient, 0);
    for (i = 0; i < step->n_in; i++) {
        call->d_in[i].data = NULL;
        call->d_in_add[i] = 0;
        if (step->in[i] && run->values[step->in[i]].need && spm_op_differentiable(step->op, i)) wanted = 1;
    }
    if (!wanted) return;
    spmi_run_point(run, s, 1);
    call->d_out = call->out[0];
    call->d_out.data = out->gradient;
    for (i = 0; i < step->n_in; i++) {
        if (step->in[i] && run->values[step->in[i]].need && spm_op_differentiable(step->op, i)) spmi_run_point_gradient(run, s, i, &aside);
    }
    spm_op_backward(run->ctx, step->op, call);
    spmi_run_collect(run, s);
}

/* The default: a scalar output "loss" sends 1. */
static spm_status spmi_run_default_gradient(spm_run *run)
{
    const float one = 1.0f;
    const spm_value loss = spm_program_find(run->program, "loss");
    const spm_tensor shape = spm_program_shape(run->program, loss, run->n);
    if (loss && spm_tensor_count(&shape) == 1 && spmi_run_kept(run, loss)) return spm_run_set_gradient(run, loss, &one);
    return spmi_fail(run->ctx, &run->error, SPM_E_STATE,
                     "nothing to go backward from: set a gradient with spm_run_set_gradient, or name a scalar output \"loss\"");
}

SPMDEF spm_status spm_run_backward(spm_run *run)
{
    const spm_program *program = run->program;
    unsigned mode;
    int s, v, first, end = program->n_steps;
    if (run->state != SPMI_RUN_FORWARD || !run->desc.backward) {
        return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "a backward pass wants a forward pass before it, in a run made with backward = 1");
    }
    if (!run->set_gradients && spmi_run_default_gradient(run)) return run->error.status;
    mode = spmi_denormals_off();
    spmi_run_needs(run);
    while (end > run->first_step) { /* one segment: [first, end) */
        int useful = run->values[program->steps[end - 1].out].need;
        first = end - 1;
        while (first > run->first_step && (run->plan.segments < 2 || program->steps[first - 1].segment == program->steps[end - 1].segment)) {
            first--;
            useful |= run->values[program->steps[first].out].need;
        }
        for (s = first; s < end && useful; s++) {
            if (run->plan.replayed[s]) spmi_run_forward_step(run, s, 1);
        }
        for (s = end - 1; s >= first; s--) spmi_run_backward_step(run, s);
        end = first;
    }
    for (v = 1; v < program->n_values && run->n_hooks; v++) {
        if (run->values[v].hooked && program->values[v].kind == SPMI_VALUE_INPUT && run->values[v].written) {
            spmi_run_hooks(run, v, run->values[v].bound, run->values[v].gradient, 0);
        }
    }
    spmi_denormals_restore(mode);
    run->state = SPMI_RUN_BACKWARD;
    return SPM_OK;
}

SPMDEF const float *spm_run_gradient(spm_run *run, spm_value value)
{
    if (!spmi_run_has(run, value) || run->state != SPMI_RUN_BACKWARD || !run->values[value].written) return NULL;
    return run->program->values[value].kind == SPMI_VALUE_INPUT || spmi_run_kept(run, value) ? run->values[value].gradient : NULL;
}

/* ---- batch statistics and buffers ---- */

SPMDEF float *spm_run_buffer(spm_run *run, int parameter)
{
    if (parameter < 0 || parameter >= run->model->n_parameters || !(run->model->parameters[parameter].flags & SPM_PARAMETER_BUFFER)) return NULL;
    return spmi_run_parameter_data(run, parameter);
}

SPMDEF spm_status spm_run_commit_statistics(spm_run *run, float momentum)
{
    const spm_program *program = run->program;
    int s, k;
    int64_t c;
    if (run->state == SPMI_RUN_IDLE || !run->training) {
        return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "there are no batch statistics to commit: the last forward pass was not in training mode");
    }
    for (s = run->first_step; s < program->n_steps; s++) {
        const spmi_tape_step *step = &program->steps[s];
        const spm_tensor *x = &run->calls[s].in[0];
        double count, unbiased;
        if (step->op != SPM_OP_BATCH_NORM) continue;
        count = (double)(spm_tensor_count(x) / x->shape[x->rank - 1]);
        unbiased = count > 1.0 ? count / (count - 1.0) : 1.0;
        for (k = 0; k < 2; k++) {
            const spmi_tape_value *target = &program->values[step->in[3 + k]];
            const float *batch = run->values[step->out + 1 + k].data;
            float *running;
            if (target->kind != SPMI_VALUE_PARAMETER) continue;
            running = spmi_run_parameter_data(run, target->index);
            for (c = 0; c < x->shape[x->rank - 1]; c++) {
                const double now = (double)batch[c] * (k ? unbiased : 1.0);
                running[c] = (float)((1.0 - (double)momentum) * (double)running[c] + (double)momentum * now);
            }
        }
    }
    return SPM_OK;
}

SPMDEF spm_status spm_run_own_buffers(spm_run *run, int own)
{
    int64_t total = 0, at = 0;
    int i;
    for (i = 0; i < run->model->n_parameters; i++) {
        if (run->model->parameters[i].flags & SPM_PARAMETER_BUFFER) total += spmi_line_floats(spm_tensor_count(&run->model->parameters[i].value));
    }
    if (own && !run->own) {
        run->own = (float *)spmi_alloc_array(run->ctx, total, sizeof(float));
        if (!run->own) return spmi_fail_memory(run->ctx, &run->error, "a run's own batch statistics");
        run->mask_bytes += (size_t)total * sizeof(float);
    }
    for (i = 0; i < run->model->n_parameters; i++) {
        const spm_parameter *p = &run->model->parameters[i];
        if (!(p->flags & SPM_PARAMETER_BUFFER)) continue;
        run->parameters[i].own = own ? run->own + at : NULL;
        if (own) memcpy(run->own + at, p->value.data, (size_t)spm_tensor_count(&p->value) * sizeof(float));
        at += spmi_line_floats(spm_tensor_count(&p->value));
    }
    return SPM_OK;
}

/* ---- masks and hooks ---- */

/* Room for the gradients that go around in one step. */
static spm_status spmi_run_aside_memory(spm_run *run)
{
    const spm_program *program = run->program;
    int64_t most = 0;
    float *larger;
    int s, i;
    for (s = 0; s < program->n_steps; s++) {
        int64_t sum = 0;
        for (i = 0; i < program->steps[s].n_in; i++) {
            const spmi_tape_value *value = &program->values[program->steps[s].in[i]];
            if (!program->steps[s].in[i] || value->kind != SPMI_VALUE_PARAMETER || !spmi_run_aside(run, value->index)) continue;
            sum += spmi_line_floats(spm_tensor_count(&run->model->parameters[value->index].value));
        }
        most = SPMI_MAX(most, sum);
    }
    if (most <= run->aside_count || !run->desc.backward) return SPM_OK;
    larger = (float *)spmi_alloc_array(run->ctx, most, sizeof(float));
    if (!larger) return spmi_fail_memory(run->ctx, &run->error, "the gradients of masked or watched parameters");
    spmi_free(run->ctx, run->aside);
    run->aside = larger;
    run->aside_count = most;
    return SPM_OK;
}

static void spmi_run_drop_mask(spm_run *run, int parameter)
{
    spmi_run_parameter *p = &run->parameters[parameter];
    run->mask_bytes -= 2 * (size_t)spm_tensor_count(&run->model->parameters[parameter].value) * sizeof(float);
    spmi_free(run->ctx, p->keep);
    spmi_free(run->ctx, p->masked);
    p->keep = p->masked = NULL;
}

/* Weights packed from this parameter are stale. */
static void spmi_run_stale(spm_run *run, int parameter)
{
    const spm_program *program = run->program;
    int s;
    for (s = 0; s < program->n_steps; s++) {
        const int v = program->steps[s].n_in > 1 ? program->steps[s].in[1] : 0;
        if (v && program->values[v].kind == SPMI_VALUE_PARAMETER && program->values[v].index == parameter) run->packed_version[s] = 0;
    }
}

SPMDEF spm_status spm_run_set_mask(spm_run *run, int parameter, const float *keep)
{
    spmi_run_parameter *p;
    int64_t count;
    if (parameter < 0 || parameter >= run->model->n_parameters || (run->model->parameters[parameter].flags & SPM_PARAMETER_BUFFER)) {
        return spmi_fail(run->ctx, &run->error, SPM_E_ARGUMENT, "spm_run_set_mask: parameter %d does not exist or is a buffer, which takes no mask", parameter);
    }
    p = &run->parameters[parameter];
    count = spm_tensor_count(&run->model->parameters[parameter].value);
    run->state = SPMI_RUN_IDLE;
    spmi_run_stale(run, parameter);
    if (!keep) {
        if (p->keep) spmi_run_drop_mask(run, parameter);
        return SPM_OK;
    }
    if (!p->keep) {
        p->keep = (float *)spmi_alloc_array(run->ctx, count, sizeof(float));
        p->masked = (float *)spmi_alloc_array(run->ctx, count, sizeof(float));
        run->mask_bytes += 2 * (size_t)count * sizeof(float);
        if (!p->keep || !p->masked || spmi_run_aside_memory(run)) {
            spmi_run_drop_mask(run, parameter);
            return spmi_fail_memory(run->ctx, &run->error, run->model->parameters[parameter].name);
        }
    }
    memcpy(p->keep, keep, (size_t)count * sizeof(float));
    p->masked_version = 0;
    return SPM_OK;
}

SPMDEF void spm_run_clear_masks(spm_run *run)
{
    int i;
    for (i = 0; i < run->model->n_parameters; i++) {
        if (run->parameters[i].keep) (void)spm_run_set_mask(run, i, NULL);
    }
}

/* Enters a hook and what it needs: memory for partial sums, a plan under which the data is there. */
static spm_status spmi_run_add_hook(spm_run *run, const spmi_hook *hook, unsigned char want)
{
    const spm_program *program = run->program;
    const spmi_tape_value *value = &program->values[hook->value];
    const int parameter = value->kind == SPMI_VALUE_PARAMETER;
    const unsigned char before = run->values[hook->value].want;
    const spm_tensor shape = spmi_tape_shape(program, hook->value, run->desc.max_batch, NULL);
    int64_t channels = parameter ? (shape.shape[0] + SPMI_HOOK_CHUNKS - 1) / SPMI_HOOK_CHUNKS : shape.shape[shape.rank - 1];
    void *memory = run->hooks;
    if (!spmi_grow(run->ctx, &memory, (size_t)run->n_hooks * sizeof *hook, &run->hooks_room, (size_t)(run->n_hooks + 1) * sizeof *hook)) {
        return spmi_fail_memory(run->ctx, &run->error, "a hook");
    }
    run->hooks = (spmi_hook *)memory;
    if (hook->kind >= 0 && channels > run->partial_channels) {
        double *larger = (double *)spmi_alloc_array(run->ctx, channels * SPMI_HOOK_CHUNKS, sizeof(double));
        if (!larger) return spmi_fail_memory(run->ctx, &run->error, "a hook");
        spmi_free(run->ctx, run->partial);
        run->partial = larger;
        run->partial_channels = channels;
    }
    run->state = SPMI_RUN_IDLE;
    if (parameter && want) {
        const unsigned char watched = run->parameters[value->index].hooked;
        run->parameters[value->index].hooked = 1;
        if (spmi_run_aside_memory(run)) {
            run->parameters[value->index].hooked = watched;
            return run->error.status;
        }
    } else if (want & (unsigned char)~before) {
        run->values[hook->value].want |= want;
        if (spmi_run_plan(run)) {
            run->values[hook->value].want = before;
            return run->error.status;
        }
    }
    run->hooks[run->n_hooks++] = *hook;
    run->values[hook->value].hooked = 1;
    return SPM_OK;
}

SPMDEF spm_status spm_run_hook(spm_run *run, spm_value value, spm_hook_kind kind, int on_gradient, double *out)
{
    spmi_hook hook = SPM_ZERO;
    const int backward = on_gradient || kind == SPM_HOOK_VALUE_GRADIENT;
    if (!spmi_run_has(run, value) || !out || (unsigned)kind > (unsigned)SPM_HOOK_VALUE_GRADIENT) return spmi_run_no_value(run, value, "spm_run_hook");
    if (backward && !run->desc.backward) {
        return spmi_fail(run->ctx, &run->error, SPM_E_STATE, "a hook on a gradient wants a run made with backward = 1");
    }
    if (backward && run->program->values[value].kind == SPMI_VALUE_PARAMETER) {
        const int p = run->program->values[value].index;
        if (run->model->parameters[p].flags & SPM_PARAMETER_BUFFER) return spmi_run_no_value(run, value, "spm_run_hook on the gradient of a buffer");
        if (kind == SPM_HOOK_SUM_SQUARES && run->parameters[p].uses > 1) {
            return spmi_fail(run->ctx, &run->error, SPM_E_UNSUPPORTED, "%s: squares of a gradient cannot be watched, because %d operations share the parameter",
                             run->model->parameters[p].name, run->parameters[p].uses);
        }
    }
    hook.value = value;
    hook.kind = (int)kind;
    hook.on_gradient = on_gradient != 0;
    hook.out = out;
    return spmi_run_add_hook(run, &hook, !backward ? 0 : kind == SPM_HOOK_VALUE_GRADIENT ? SPMI_WANT_VALUE_GRADIENT : SPMI_WANT_GRADIENT);
}

SPMDEF spm_status spm_run_hook_write(spm_run *run, spm_value value, void (*fn)(void *user, spm_tensor *value), void *user)
{
    spmi_hook hook = SPM_ZERO;
    if (!fn || !spmi_run_has(run, value) || run->program->values[value].kind != SPMI_VALUE_RESULT) return spmi_run_no_value(run, value, "spm_run_hook_write");
    hook.value = value;
    hook.kind = -1;
    hook.fn = fn;
    hook.user = user;
    return spmi_run_add_hook(run, &hook, 0);
}

SPMDEF void spm_run_clear_hooks(spm_run *run)
{
    int i;
    for (i = 0; i < run->n_hooks; i++) {
        const int v = run->hooks[i].value;
        run->values[v].hooked = 0;
        if (run->program->values[v].kind == SPMI_VALUE_PARAMETER) run->parameters[run->program->values[v].index].hooked = 0;
    }
    run->n_hooks = 0;
}

/* ---- the gradient check ---- */

#define SPMI_CHECK_ELEMENTS 192 /* of one input that are moved */
#define SPMI_CHECK_STEP 4e-3f

typedef struct spmi_check {
    spm_context *ctx;
    spm_op_call call;
    spm_op op;
    float *r;      /* the loss is sum(r * out[0]) */
    void *memory;
} spmi_check;

/* Random contents of input i.  Operations with kinks get numbers that a step does not carry over one. */
static void spmi_check_fill(spmi_check *check, int i, uint64_t seed)
{
    const spm_tensor *in = &check->call.in[i];
    const int64_t count = spm_tensor_count(in), last = count ? in->shape[in->rank - 1] : 1;
    int64_t k, j;
    for (k = 0; k < count; k++) {
        float u = spm_random_uniform(seed, (uint64_t)i, (uint64_t)k), x = 2.0f * u - 1.0f;
        if (check->op == SPM_OP_RELU) x += x < 0.0f ? -0.1f : 0.1f;
        if (check->op == SPM_OP_BATCH_NORM && (i == 1 || i == 4)) x = 0.5f + u;
        if (check->op == SPM_OP_LAYER_NORM && i == 1) x = 0.5f + u;
        if (check->op == SPM_OP_CROSS_ENTROPY && i == 1) x = 0.05f + u;
        if (check->op == SPM_OP_CROSS_ENTROPY && i == 2) x = (0.2f + u) / (float)count;
        in->data[k] = x;
    }
    if (check->op == SPM_OP_CROSS_ENTROPY && i == 1) {
        for (k = 0; k < count; k += last) {
            float sum = 0.0f;
            for (j = 0; j < last; j++) sum += in->data[k + j];
            for (j = 0; j < last; j++) in->data[k + j] /= sum;
        }
    }
    if (check->op == SPM_OP_MAX_POOL) { /* all different, .02 apart: sorted by a random walk through the places */
        for (k = 0; k < count; k++) in->data[k] = 0.02f * (float)(k - count / 2);
        for (k = count - 1; k > 0; k--) {
            const int64_t other = (int64_t)spm_random_below(seed, 77, (uint64_t)k, (uint32_t)(k + 1));
            const float kept = in->data[k];
            in->data[k] = in->data[other];
            in->data[other] = kept;
        }
    }
}

static double spmi_check_loss(spmi_check *check)
{
    const int64_t count = spm_tensor_count(&check->call.out[0]);
    double sum = 0.0;
    int64_t i;
    check->call.packed_ready = 0;
    spm_op_forward(check->ctx, check->op, &check->call);
    for (i = 0; i < count; i++) sum += (double)check->r[i] * (double)check->call.out[0].data[i];
    return sum;
}

/* Random r; none where a fused ReLU is near its kink. */
static void spmi_check_direction(spmi_check *check, uint64_t seed)
{
    const int64_t count = spm_tensor_count(&check->call.out[0]);
    const int relu = check->call.attr.relu;
    int64_t i;
    for (i = 0; i < count; i++) check->r[i] = spm_random_normal(seed, 99, (uint64_t)i);
    if (check->op != SPM_OP_BATCH_NORM || !relu) return;
    check->call.attr.relu = 0;
    (void)spmi_check_loss(check);
    check->call.attr.relu = relu;
    for (i = 0; i < count; i++) {
        if (fabsf(check->call.out[0].data[i]) < 0.15f) check->r[i] = 0.0f;
    }
}

/* Takes all memory of the check: tensors, scratch, packed weights. 0 if there is none. */
static int spmi_check_alloc(spmi_check *check)
{
    spm_op_call *call = &check->call;
    const size_t scratch = spmi_line_bytes(SPMI_MAX(spm_op_scratch(check->ctx, check->op, call, 0), spm_op_scratch(check->ctx, check->op, call, 1)));
    const size_t packed = spmi_line_bytes(spm_op_packed(check->ctx, check->op, call));
    size_t bytes = scratch + packed, floats = 0;
    char *at;
    int i, pass;
    for (pass = 0; pass < 2; pass++) {
        at = (char *)check->memory + bytes;
        floats = 0;
        for (i = 0; i < 2 * SPM_OP_MAX_IN + SPM_OP_MAX_OUT + 1; i++) {
            spm_tensor *t = i < SPM_OP_MAX_IN ? &call->in[i] : i < 2 * SPM_OP_MAX_IN ? &call->d_in[i - SPM_OP_MAX_IN]
                : i < 2 * SPM_OP_MAX_IN + SPM_OP_MAX_OUT ? &call->out[i - 2 * SPM_OP_MAX_IN] : &call->d_out;
            if (pass && t->rank > 0) t->data = (float *)(void *)(at + floats * sizeof(float));
            floats += (size_t)spmi_line_floats(spm_tensor_count(t));
        }
        if (pass) break;
        check->memory = spmi_alloc_zero(check->ctx, bytes + floats * sizeof(float));
        if (!check->memory) return 0;
    }
    call->scratch = check->memory;
    call->packed = packed ? (char *)check->memory + scratch : NULL;
    check->r = call->d_out.data;
    return 1;
}

/* ||g - d|| / ||d|| of one input. */
static double spmi_check_input(spmi_check *check, int i, uint64_t seed)
{
    const spm_tensor *in = &check->call.in[i];
    const int64_t count = spm_tensor_count(in), tries = SPMI_MIN(count, (int64_t)SPMI_CHECK_ELEMENTS);
    double error = 0.0, norm = 0.0;
    int64_t t;
    for (t = 0; t < tries; t++) {
        const int64_t k = tries == count ? t : (int64_t)spm_random_below(seed, 55 + (uint64_t)i, (uint64_t)t, (uint32_t)SPMI_MIN(count, (int64_t)UINT32_MAX));
        const float kept = in->data[k], up = kept + SPMI_CHECK_STEP, down = kept - SPMI_CHECK_STEP;
        double slope, off;
        in->data[k] = up;
        slope = spmi_check_loss(check);
        in->data[k] = down;
        slope = (slope - spmi_check_loss(check)) / ((double)up - (double)down);
        in->data[k] = kept;
        off = (double)check->call.d_in[i].data[k] - slope;
        error += off * off;
        norm += slope * slope;
    }
    return sqrt(error) / SPMI_MAX(sqrt(norm), 1e-3);
}

SPMDEF double spm_gradient_check(spm_context *ctx, spm_op op, const spm_op_call *shapes, uint64_t seed, spm_error *err)
{
    spmi_check check;
    double worst = 0.0;
    float present = 0.0f;
    unsigned mode;
    int i, tested = 0;
    memset(&check, 0, sizeof check);
    check.ctx = ctx;
    check.op = op;
    check.call = *shapes;
    for (i = 0; i < SPM_OP_MAX_IN; i++) check.call.in[i].data = i < shapes->n_in && shapes->in[i].rank > 0 ? &present : NULL;
    if (spm_op_infer(ctx, op, &check.call, err)) return -1.0;
    check.call.d_out = check.call.out[0];
    for (i = 0; i < check.call.n_in; i++) {
        memset(&check.call.d_in[i], 0, sizeof check.call.d_in[i]);
        if (check.call.in[i].data && spm_op_differentiable(op, i)) {
            check.call.d_in[i] = check.call.in[i];
            tested++;
        }
    }
    if (!tested) {
        (void)spmi_fail(ctx, err, SPM_E_ARGUMENT, "%s: has no differentiable input to check", spm_op_name(op));
        return -1.0;
    }
    if (!spmi_check_alloc(&check)) {
        (void)spmi_fail_memory(ctx, err, "a gradient check");
        return -1.0;
    }
    mode = spmi_denormals_off();
    for (i = 0; i < check.call.n_in; i++) spmi_check_fill(&check, i, seed);
    spmi_check_direction(&check, seed);
    (void)spmi_check_loss(&check);
    spm_op_backward(ctx, op, &check.call);
    for (i = 0; i < check.call.n_in; i++) {
        double error;
        if (!check.call.d_in[i].data) continue;
        error = spmi_check_input(&check, i, seed);
        if (!(error <= worst)) worst = error; /* NaN counts as the worst */
    }
    spmi_denormals_restore(mode);
    spmi_free(ctx, check.memory);
    return worst;
}
/* ================================================================================================================
 * >>IMAGE  12  pictures: memory, resize, crop, flip; deflate; JPEG, PNG, PPM
 * ============================================================================================================= */

/* ---- memory of pictures ---- */

/* Every decoder calls this before it allocates anything: both sides in [1, 2^30) and the RGB picture within the cap
 * (max_bytes; 0: SPURMEM_MAX_IMAGE_BYTES). What passes can be multiplied in int64_t without a further thought. */
static spm_status spmi_image_check_size(spm_context *ctx, const char *name, int64_t width, int64_t height,
                                        size_t max_bytes, spm_error *err)
{
    const int64_t side = (int64_t)1 << 30;
    const uint64_t cap = max_bytes ? max_bytes : SPURMEM_MAX_IMAGE_BYTES;
    if (width < 1 || height < 1) {
        return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: a picture of %.0f x %.0f pixels has no content; both sides must be at least 1",
                         name, (double)width, (double)height);
    }
    if (width >= side || height >= side || (uint64_t)(width * height) > cap / 3) {
        return spmi_fail(ctx, err, SPM_E_UNSUPPORTED,
                         "%s: %.0f x %.0f pixels need more than the cap of %.0f bytes; raise max_bytes (or "
                         "SPURMEM_MAX_IMAGE_BYTES) if the picture is to be trusted",
                         name, (double)width, (double)height, (double)cap);
    }
    return SPM_OK;
}

SPMDEF spm_status spm_image_create(spm_context *ctx, int width, int height, spm_image *image, spm_error *err)
{
    spm_status status;
    image->pixels = NULL;
    image->width = image->height = 0;
    status = spmi_image_check_size(ctx, "picture", width, height, 0, err);
    if (status) return status;
    image->pixels = (uint8_t *)spmi_alloc_array(ctx, (int64_t)width * height, 3);
    if (!image->pixels) {
        return spmi_fail(ctx, err, SPM_E_MEMORY, "out of memory for a picture of %d x %d pixels", width, height);
    }
    image->width = width;
    image->height = height;
    return SPM_OK;
}

SPMDEF void spm_image_free(spm_context *ctx, spm_image *image)
{
    if (!image) return;
    spmi_free(ctx, image->pixels);
    image->pixels = NULL;
    image->width = image->height = 0;
}

SPMDEF spm_status spm_image_crop(spm_context *ctx, const spm_image *image, int x, int y, int width, int height,
                                 spm_image *result, spm_error *err)
{
    spm_image cut = SPM_ZERO;
    spm_status status;
    int row;
    if (x < 0 || y < 0 || width < 1 || height < 1 || x > image->width - width || y > image->height - height) {
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "crop of %d x %d pixels at (%d, %d) does not lie in the picture of %d x %d",
                         width, height, x, y, image->width, image->height);
    }
    status = spm_image_create(ctx, width, height, &cut, err);
    if (status) return status;
    for (row = 0; row < height; row++) {
        memcpy(cut.pixels + (size_t)row * (size_t)width * 3,
               image->pixels + ((size_t)(y + row) * (size_t)image->width + (size_t)x) * 3, (size_t)width * 3);
    }
    *result = cut;
    return SPM_OK;
}

SPMDEF void spm_image_flip(spm_image *image)
{
    int row;
    for (row = 0; row < image->height; row++) {
        uint8_t *left = image->pixels + (size_t)row * (size_t)image->width * 3;
        uint8_t *right = left + (size_t)image->width * 3 - 3;
        for (; left < right; left += 3, right -= 3) {
            uint8_t r = left[0], g = left[1], b = left[2];
            left[0] = right[0];
            left[1] = right[1];
            left[2] = right[2];
            right[0] = r;
            right[1] = g;
            right[2] = b;
        }
    }
}
/* ---- JPEG (ITU-T T.81, JFIF) ----------------------------------------------------------------------------------
 * Pixel for pixel what Pillow makes through libjpeg-turbo, also for damaged files: where the standard leaves room, the
 * comments name the choice.  The order below: tables, bit reader, Huffman codes, file segments, block decoding, inverse
 * transforms, upsampling and colour, the two passes (one scan straight to pixels; many scans through coefficients),
 * the encoder. */

#define SPMI_JPEG_LOOK 10 /* bits that the fast Huffman tables look at */
#define SPMI_JPEG_CLAMP(v) ((uint8_t)((v) < 0 ? 0 : (v) > 255 ? 255 : (v)))

/* Zigzag order to row-major.  Damaged data can run up to 15 places too far: those land on the last coefficient. */
static const uint8_t spmi_jpeg_zigzag[80] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63
};

/* The Huffman tables of T.81 annex K.3: counts of codes with 1..16 bits, then the symbols.  Rows: luma, chroma. */
static const uint8_t spmi_jpeg_dc_bits[2][16] = {
    {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0}, {0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0}
};
static const uint8_t spmi_jpeg_dc_values[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
static const uint8_t spmi_jpeg_ac_bits[2][16] = {
    {0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125}, {0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119}
};
static const uint8_t spmi_jpeg_ac_values[2][162] = {
    {0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71,
     0x14, 0x32, 0x81, 0x91, 0xa1, 0x08, 0x23, 0x42, 0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0, 0x24, 0x33, 0x62, 0x72,
     0x82, 0x09, 0x0a, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x34, 0x35, 0x36, 0x37,
     0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59,
     0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x83,
     0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3,
     0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3,
     0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe1, 0xe2,
     0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa},
    {0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22,
     0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xa1, 0xb1, 0xc1, 0x09, 0x23, 0x33, 0x52, 0xf0, 0x15, 0x62, 0x72, 0xd1,
     0x0a, 0x16, 0x24, 0x34, 0xe1, 0x25, 0xf1, 0x17, 0x18, 0x19, 0x1a, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x35, 0x36,
     0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
     0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a,
     0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a,
     0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba,
     0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda,
     0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa}
};

typedef enum spmi_jpeg_color { SPMI_JPEG_GRAY, SPMI_JPEG_YCC, SPMI_JPEG_RGB, SPMI_JPEG_CMYK, SPMI_JPEG_YCCK } spmi_jpeg_color;

/* How a component reaches the full size; the fancy ones are triangle filters. */
typedef enum spmi_jpeg_up {
    SPMI_JPEG_UP_NONE, SPMI_JPEG_UP_H2V1, SPMI_JPEG_UP_H1V2, SPMI_JPEG_UP_H2V2, SPMI_JPEG_UP_COPY
} spmi_jpeg_up;

/* A Huffman code as the file gives it, and the tables made from it when a scan first uses it.
 * An entry of `look` (0: code longer than SPMI_JPEG_LOOK bits) is bits to drop | run << 8 | size << 12 | value << 16:
 * either the value's own bits fitted too (value != 0, size 0) or `size` more bits are to be read. */
typedef struct spmi_jpeg_huffman {
    uint32_t look[1 << SPMI_JPEG_LOOK];
    uint32_t limit[17];  /* codes of at most n bits, left-aligned in 16, are below limit[n] */
    int32_t offset[17];  /* index of a code's symbol minus the code */
    int present;
    int made;            /* 0 no tables yet, 1 with values, 2 without */
    uint8_t bits[17];
    uint8_t values[256];
} spmi_jpeg_huffman;

typedef struct spmi_jpeg_component {
    int id, h, v, quant_index;
    int group;                       /* v as the file gives it: the rows that the smoothing takes together */
    int dc_index, ac_index, dc;      /* of the current scan; DC predictor */
    int quant_known;                 /* the quantiser is the one in force when the component's first scan starts */
    uint16_t quant[64];              /* row-major */
    int64_t blocks_wide, blocks_high; /* that hold pixels */
    int64_t stride_blocks, rows_blocks; /* rounded up to whole MCUs */
    int16_t *coefficients;           /* many scans only */
    int size;                        /* pixels per block and axis after the transform: 8, or less when scaled */
    int width, height;               /* of the component at that size */
    int expand_h, expand_v;
    spmi_jpeg_up up;
    int rows_per_mcu;
    size_t stride;
    uint8_t *rows;                   /* one row of MCUs, below one kept row of the MCU row before */
    uint8_t *wide;                   /* one upsampled row */
    int16_t known[64];               /* progressive: lowest bit known of each coefficient, -1 nothing known */
    int16_t known_before[64];        /* the same before the last scan */
} spmi_jpeg_component;

typedef struct spmi_jpeg {
    spm_context *ctx;
    const char *name;
    spm_error *err;
    spm_status status;               /* of the failure, if a function below returned 0 */
    const spm_decode_desc *desc;

    const uint8_t *data, *at, *end;
    uint64_t bits;                   /* next bits of the scan, the first one on top */
    int count;                       /* valid ones; below 0 once a scan asked for more than there is */
    int marker;                      /* met in a scan and not used yet; 0 none */
    int ended;                       /* the file ended without an end-of-image marker */
    int starved;                     /* the data of this restart interval ran out: its blocks stay as they are */

    int width, height, components, progressive;
    int max_h, max_v, min_size;      /* min_size: 8 / scale */
    int mcus_wide, mcus_high;        /* of the interleaved grid */
    int out_width, out_height;
    int seen_frame, seen_jfif, seen_adobe, adobe_transform, orientation, seen_exif;
    spmi_jpeg_color color;
    int restart_interval, restart_left, restart_next;
    int scan_count, scan[4], spectral_start, spectral_end, bit_high, bit_low;
    int scans, last_good_group;      /* up to which row of MCUs the last scan had data */
    uint32_t eob_run;
    int64_t work_left;               /* blocks that scans may still visit */
    int context;                     /* 1: some component is filtered vertically and needs the next MCU row */
    int next_row;                    /* of the picture, to be written */
    uint16_t *filter;                /* one row of column sums for the 2x2 triangle filter */
    uint8_t *line;                   /* one RGB row, where the picture is turned */
    spm_image *image;
    spmi_jpeg_component component[4];
    uint16_t quant[4][64];
    int quant_present[4];
    spmi_jpeg_huffman dc[4], ac[4];
} spmi_jpeg;

#define SPMI_JPEG_FAIL(d, code, ...) ((d)->status = spmi_fail((d)->ctx, (d)->err, code, __VA_ARGS__), 0)

/* ---- segments ---- */

/* The next marker's code; a file that ends instead counts as ended with an end-of-image marker. */
static int spmi_jpeg_next_marker(spmi_jpeg *d)
{
    for (;;) {
        while (d->at < d->end && *d->at != 0xff) d->at++;
        while (d->at < d->end && *d->at == 0xff) d->at++;
        if (d->at >= d->end) {
            d->ended = 1;
            return 0xd9;
        }
        if (*d->at++) return d->at[-1];
    }
}

/* Reads a segment's length and gives its payload, of which `have` bytes are in the file; the reader then stands behind
 * it.  0: not even the length is there. */
static int spmi_jpeg_segment(spmi_jpeg *d, const uint8_t **payload, int *length, int *have)
{
    if (d->end - d->at < 2) {
        d->at = d->end;
        d->ended = 1;
        return 0;
    }
    *length = (d->at[0] << 8 | d->at[1]) - 2; /* below 0: the caller refuses it, or skips nothing, as libjpeg does */
    d->at += 2;
    *payload = d->at;
    *have = SPMI_MAX(*length, 0);
    if (d->end - d->at < *have) *have = (int)(d->end - d->at);
    d->at += *have;
    return 1;
}

/* The readers of segments fail on the first wrong field, even where the file ends inside the segment: what is wrong is
 * an error, what is only missing may be forgiven.  They return 0 failed, 1 fine (d->ended: up to the end of the file). */
static int spmi_jpeg_read_quant(spmi_jpeg *d, const uint8_t *p, int length, int have)
{
    while (length > 0) {
        int index, wide, i, bytes;
        if (have < 1) break;
        index = p[0] & 15;
        wide = p[0] >> 4;
        if (index > 3)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: quantization table %d is out of range; the file is damaged", d->name, index);
        bytes = wide ? 129 : 65;
        if (have < bytes) break;
        for (i = 0; i < 64; i++)
            d->quant[index][spmi_jpeg_zigzag[i]] = (uint16_t)(wide ? p[1 + 2 * i] << 8 | p[2 + 2 * i] : p[1 + i]);
        d->quant_present[index] = 1;
        p += bytes;
        have -= bytes;
        length -= bytes;
    }
    if (length > have) d->ended = 1;
    else if (length != 0)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a quantization table has the wrong length; the file is damaged", d->name);
    return 1;
}

static void spmi_jpeg_set_huffman(spmi_jpeg_huffman *h, const uint8_t *bits, const uint8_t *values, int count)
{
    h->bits[0] = 0;
    memcpy(h->bits + 1, bits, 16);
    memset(h->values, 0, sizeof h->values);
    memcpy(h->values, values, (size_t)count);
    h->present = 1;
    h->made = 0;
}

static int spmi_jpeg_read_huffman(spmi_jpeg *d, const uint8_t *p, int length, int have)
{
    while (length > 16) {
        int index, is_ac, count = 0, i;
        if (have < 17) break;
        index = p[0] & 15;
        is_ac = p[0] >> 4 & 1;
        for (i = 1; i <= 16; i++) count += p[i];
        if (count > 256 || count > length - 17 || p[0] > 0x1f || index > 3)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: Huffman table %d with %d codes is not valid; the file is damaged",
                                  d->name, index, count);
        if (have < 17 + count) break;
        spmi_jpeg_set_huffman(is_ac ? &d->ac[index] : &d->dc[index], p + 1, p + 17, count);
        p += 17 + count;
        have -= 17 + count;
        length -= 17 + count;
    }
    if (length > have) d->ended = 1;
    else if (length != 0)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a Huffman table has the wrong length; the file is damaged", d->name);
    return 1;
}

static int spmi_jpeg_read_frame(spmi_jpeg *d, int marker, const uint8_t *p, int length, int have)
{
    int i;
    if (have < 6 && length > have) {
        d->ended = 1;
        return 1;
    }
    if (length < 6 || d->seen_frame || length != 6 + 3 * p[5])
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: %s; the file is damaged", d->name,
                              d->seen_frame ? "a second frame header" : "the frame header has the wrong length");
    d->height = p[1] << 8 | p[2];
    d->width = p[3] << 8 | p[4];
    d->components = p[5];
    d->progressive = marker == 0xc2;
    if (marker == 0xc9 || marker == 0xca)
        return SPMI_JPEG_FAIL(d, SPM_E_UNSUPPORTED, "%s: arithmetic-coded JPEG is not supported; save it with Huffman coding "
                              "(jpegtran does so without loss)", d->name);
    if (p[0] != 8)
        return SPMI_JPEG_FAIL(d, SPM_E_UNSUPPORTED, "%s: JPEG with %d bits a sample is not supported; save it with 8", d->name, p[0]);
    if (d->width < 1 || d->height < 1 || d->width > 65500 || d->height > 65500)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a picture of %d x %d pixels is not possible; 1 to 65500 are", d->name,
                              d->width, d->height);
    if (d->components != 1 && d->components != 3 && d->components != 4)
        return SPMI_JPEG_FAIL(d, SPM_E_UNSUPPORTED, "%s: JPEG with %d components is not supported; 1, 3 and 4 are", d->name,
                              d->components);
    if (length > have) {
        d->ended = 1;
        return 1;
    }
    for (i = 0; i < d->components; i++) {
        spmi_jpeg_component *c = &d->component[i];
        c->id = p[6 + 3 * i];
        c->h = p[7 + 3 * i] >> 4;
        c->v = p[7 + 3 * i] & 15;
        c->quant_index = p[8 + 3 * i];
        if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: sampling factors %dx%d are not possible; the file is damaged", d->name,
                                  c->h, c->v);
    }
    d->seen_frame = 1;
    return 1;
}

/* The scan header: which components, which tables, which part of the coefficients. */
static int spmi_jpeg_read_scan(spmi_jpeg *d, const uint8_t *p, int length, int have)
{
    int i, j, n = have > 0 ? p[0] : 0;
    if (have < 1 && length > have) {
        d->ended = 1;
        return 1;
    }
    if (!d->seen_frame || n < 1 || n > 4 || length != 2 * n + 4)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan header %s; the file is damaged", d->name,
                              d->seen_frame ? "has the wrong length" : "comes before the frame header");
    if (length > have) {
        d->ended = 1;
        return 1;
    }
    d->scan_count = n;
    for (i = 0; i < n; i++) {
        int id = p[1 + 2 * i];
        /* Scans keep the frame's order, so the search starts at i: that also resolves repeated ids as libjpeg does. */
        for (j = i; j < d->components && d->component[j].id != id; j++) {}
        if (j == d->components)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan names component %d, which the frame lacks; the file is damaged",
                                  d->name, id);
        d->scan[i] = j;
        d->component[j].dc_index = p[2 + 2 * i] >> 4;
        d->component[j].ac_index = p[2 + 2 * i] & 15;
        for (j = 0; j < i; j++) {
            if (d->scan[j] == d->scan[i])
                return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan names component %d twice; the file is damaged", d->name, id);
        }
    }
    p += 1 + 2 * n;
    d->spectral_start = p[0];
    d->spectral_end = p[1];
    d->bit_high = p[2] >> 4;
    d->bit_low = p[2] & 15;
    d->scans++;
    return 1;
}

/* EXIF orientation 1..8 from an APP1 payload (a small TIFF file, of either byte order); 1 if it has none. */
static int spmi_jpeg_exif_orientation(const uint8_t *p, int length)
{
    const uint8_t *tiff = p + 6;
    int size = length - 6, big, entries, i;
    uint32_t first;
    if (length < 14 || memcmp(p, "Exif\0", 5) != 0) return 1;
    big = tiff[0] == 'M';
    if (!(big ? tiff[1] == 'M' : tiff[0] == 'I' && tiff[1] == 'I')) return 1;
#define SPMI_EXIF16(q) (big ? (q)[0] << 8 | (q)[1] : (q)[1] << 8 | (q)[0])
    first = big ? (uint32_t)tiff[4] << 24 | (uint32_t)tiff[5] << 16 | (uint32_t)tiff[6] << 8 | tiff[7]
                : (uint32_t)tiff[7] << 24 | (uint32_t)tiff[6] << 16 | (uint32_t)tiff[5] << 8 | tiff[4];
    if (SPMI_EXIF16(tiff + 2) != 42 || first > 65535 || (int)first > size - 2) return 1;
    entries = SPMI_EXIF16(tiff + first);
    for (i = 0; i < entries && (int)first + 2 + 12 * (i + 1) <= size; i++) {
        const uint8_t *entry = tiff + first + 2 + 12 * i;
        if (SPMI_EXIF16(entry) == 0x0112) {
            int type = SPMI_EXIF16(entry + 2), value = 1;
            if (type == 3) value = SPMI_EXIF16(entry + 8);
            if (type == 4) value = big ? entry[11] : entry[8];
            return value >= 1 && value <= 8 ? value : 1;
        }
    }
#undef SPMI_EXIF16
    return 1;
}

/* Reads segments up to the next scan or the end of the image.  Returns 0 failed, 1 a scan follows, 2 the end. */
static int spmi_jpeg_read_segments(spmi_jpeg *d)
{
    for (;;) {
        const uint8_t *p;
        int length, have, marker = d->marker ? d->marker : spmi_jpeg_next_marker(d);
        d->marker = 0;
        if (marker == 0xd9) return 2;
        if ((marker >= 0xd0 && marker <= 0xd7) || (marker == 0x01 && d->scans)) continue; /* stray ones without payload */
        if (marker == 0xd8)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a second picture starts inside the first; the file is damaged", d->name);
        if (marker < 0xc0 || marker == 0xde || marker == 0xdf || (marker >= 0xf0 && marker != 0xfe))
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: marker FF%02X at byte %lu is not valid; the file is damaged", d->name,
                                  (unsigned)marker, (unsigned long)(d->at - d->data));
        if (marker == 0xc3 || marker == 0xc8 || (marker >= 0xc5 && marker <= 0xcf && marker % 4 != 0 && marker != 0xc9 && marker != 0xca))
            return SPMI_JPEG_FAIL(d, SPM_E_UNSUPPORTED, "%s: this is a lossless or hierarchical JPEG (frame type %d), which is not "
                                  "supported; save it as baseline or progressive JPEG", d->name, marker - 0xc0);
        if (!spmi_jpeg_segment(d, &p, &length, &have)) return 2;
        if (marker == 0xdb) {
            if (!spmi_jpeg_read_quant(d, p, length, have)) return 0;
        } else if (marker == 0xc4) {
            if (!spmi_jpeg_read_huffman(d, p, length, have)) return 0;
        } else if (marker == 0xda) {
            if (!spmi_jpeg_read_scan(d, p, length, have)) return 0;
            return d->ended ? 2 : 1;
        } else if (marker == 0xdd) {
            if (length != 2)
                return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: the restart interval has the wrong length; the file is damaged", d->name);
            if (have == 2) d->restart_interval = p[0] << 8 | p[1];
        } else if (marker <= 0xcf && marker != 0xcc) {
            if (!spmi_jpeg_read_frame(d, marker, p, length, have)) return 0;
        } else if (marker == 0xe0) {
            if (have >= 14 && memcmp(p, "JFIF\0", 5) == 0) d->seen_jfif = 1;
        } else if (marker == 0xee) {
            if (have >= 12 && memcmp(p, "Adobe", 5) == 0) {
                d->seen_adobe = 1;
                d->adobe_transform = p[11];
            }
        } else if (marker == 0xe1 && !d->seen_exif && have >= 5 && memcmp(p, "Exif\0", 5) == 0) {
            d->seen_exif = 1;
            d->orientation = spmi_jpeg_exif_orientation(p, have);
        }
        if (have < length) d->ended = 1;
        if (d->ended) return 2;
    }
}

/* 1 and the size if the data is a JPEG file with a frame header. */
static int spmi_jpeg_probe(const uint8_t *data, size_t size, int *width, int *height)
{
    size_t at = 2;
    *width = *height = 0;
    if (size < 4 || data[0] != 0xff || data[1] != 0xd8 || data[2] != 0xff) return 0;
    for (;;) {
        int marker;
        while (at < size && data[at] != 0xff) at++;
        while (at < size && data[at] == 0xff) at++;
        if (size - at < 8) return 0;
        marker = data[at++];
        if (marker == 0 || marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) continue;
        if (marker == 0xd9 || marker == 0xda) return 0;
        if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
            *height = data[at + 3] << 8 | data[at + 4];
            *width = data[at + 5] << 8 | data[at + 6];
            return 1;
        }
        at += SPMI_MAX((size_t)(data[at] << 8 | data[at + 1]), 2);
        if (at > size) return 0;
    }
}

/* ---- bits and codes ---- */

/* Fills the reader byte by byte: the way at stuffed bytes (FF 00), markers and the end of the file.  Past a marker
 * nothing is added, so that zeros are read and `count` falls below 0. */
static void spmi_jpeg_refill_slowly(spmi_jpeg *d)
{
    while (d->count <= 56 && !d->marker) {
        int byte;
        if (d->at >= d->end) {
            d->ended = 1;
            d->marker = 0xd9;
            return;
        }
        byte = *d->at++;
        if (byte == 0xff) {
            int next = 0xff;
            while (next == 0xff && d->at < d->end) next = *d->at++;
            if (next == 0xff) {
                d->ended = 1;
                d->marker = 0xd9;
                return;
            }
            if (next) {
                d->marker = next;
                return;
            }
        }
        d->bits |= (uint64_t)byte << (56 - d->count);
        d->count += 8;
    }
}

/* At least 32 valid bits, if the data has them: eight bytes at a time while none of them is FF. */
static inline void spmi_jpeg_refill(spmi_jpeg *d)
{
    if (d->count >= 32) return;
    if (d->end - d->at >= 8 && !d->marker) {
        const uint8_t *p = d->at;
        uint64_t word = (uint64_t)p[0] << 56 | (uint64_t)p[1] << 48 | (uint64_t)p[2] << 40 | (uint64_t)p[3] << 32
                      | (uint64_t)p[4] << 24 | (uint64_t)p[5] << 16 | (uint64_t)p[6] << 8 | (uint64_t)p[7];
        if (((~word - 0x0101010101010101u) & word & 0x8080808080808080u) == 0) {
            int bytes = (63 - d->count) >> 3;
            d->bits |= word >> d->count;
            d->at += bytes;
            d->count += 8 * bytes;
            return;
        }
    }
    spmi_jpeg_refill_slowly(d);
}

/* The next n (1..16) bits. */
static inline int spmi_jpeg_take(spmi_jpeg *d, int n)
{
    int v = (int)(d->bits >> (64 - n));
    d->bits <<= n;
    d->count -= n;
    return v;
}

/* A value of `size` bits stands for -(2^size - 1) .. -2^(size-1), 2^(size-1) .. 2^size - 1. */
static inline int spmi_jpeg_extend(int v, int size)
{
    return v < 1 << (size - 1) ? v - (1 << size) + 1 : v;
}

/* Makes the lookup tables of a code.  kind 1: entries hold values where they fit; 2: symbols only. */
static int spmi_jpeg_make_huffman(spmi_jpeg *d, spmi_jpeg_huffman *tables, int index, int is_dc, int kind)
{
    spmi_jpeg_huffman *h = index < 4 ? &tables[index] : NULL;
    int n, i, next = 0;
    uint32_t code = 0;
    if (!h || !h->present)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan uses Huffman table %d, which is missing; the file is damaged", d->name, index);
    if (h->made == kind) return 1;
    memset(h->look, 0, sizeof h->look);
    for (n = 1; n <= 16; n++) {
        h->offset[n] = next - (int)code;
        for (i = 0; i < h->bits[n]; i++, code++, next++) {
            int symbol = h->values[next], size = symbol & 15;
            uint32_t entry = (uint32_t)n | (uint32_t)(symbol >> 4) << 8 | (uint32_t)size << 12, at, last;
            if (is_dc && symbol > 15)
                return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a Huffman table has a wrong DC symbol; the file is damaged", d->name);
            if (n > SPMI_JPEG_LOOK || code >> n) continue;
            at = code << (SPMI_JPEG_LOOK - n);
            last = at + (1u << (SPMI_JPEG_LOOK - n));
            for (; at < last; at++) {
                h->look[at] = entry;
                if (kind == 1 && size > 0 && n + size <= SPMI_JPEG_LOOK) {
                    int bits = (int)(at >> (SPMI_JPEG_LOOK - n - size)) & ((1 << size) - 1);
                    h->look[at] = (uint32_t)(n + size) | (uint32_t)(symbol >> 4) << 8
                                | (uint32_t)spmi_jpeg_extend(bits, size) << 16;
                }
            }
        }
        if (h->bits[n] && code >= 1u << n)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a Huffman table has more codes than fit; the file is damaged", d->name);
        h->limit[n] = code << (16 - n);
        code <<= 1;
    }
    h->made = kind;
    return 1;
}

/* The entry for a code of more than SPMI_JPEG_LOOK bits.  What is no code at all drops 17 bits and gives symbol 0. */
static uint32_t spmi_jpeg_long_code(const spmi_jpeg_huffman *h, uint64_t bits)
{
    uint32_t code = (uint32_t)(bits >> 48);
    int n;
    for (n = SPMI_JPEG_LOOK + 1; n <= 16; n++) {
        if (code < h->limit[n]) {
            uint32_t symbol = h->values[((int)(code >> (16 - n)) + h->offset[n]) & 255];
            return (uint32_t)n | symbol >> 4 << 8 | (symbol & 15) << 12;
        }
    }
    return 17;
}

static inline uint32_t spmi_jpeg_code(spmi_jpeg *d, const spmi_jpeg_huffman *h)
{
    uint32_t entry;
    spmi_jpeg_refill(d);
    entry = h->look[d->bits >> (64 - SPMI_JPEG_LOOK)];
    if (!entry) entry = spmi_jpeg_long_code(h, d->bits);
    d->bits <<= entry & 255;
    d->count -= (int)(entry & 255);
    return entry;
}

/* A whole coded value: from the entry, or the bits behind the code. */
static inline int spmi_jpeg_value(spmi_jpeg *d, uint32_t entry)
{
    int size = (int)(entry >> 12) & 15;
    if (size) return spmi_jpeg_extend(spmi_jpeg_take(d, size), size);
    return (int16_t)(entry >> 16);
}

/* DC: the difference is added with wrap-around, as damaged files make it grow without bound. */
static inline int spmi_jpeg_dc(spmi_jpeg *d, spmi_jpeg_component *c)
{
    uint32_t entry = spmi_jpeg_code(d, &d->dc[c->dc_index]);
    c->dc = (int)((uint32_t)c->dc + (uint32_t)spmi_jpeg_value(d, entry));
    return c->dc;
}

/* One block of a sequential scan, written over `block` (zeros, or what another scan left).  Returns the place in
 * zigzag order of the last coefficient met. */
static int spmi_jpeg_block(spmi_jpeg *d, spmi_jpeg_component *c, int16_t *block)
{
    const spmi_jpeg_huffman *h = &d->ac[c->ac_index];
    int k = 1, last = 0;
    block[0] = (int16_t)spmi_jpeg_dc(d, c);
    do {
        uint32_t entry = spmi_jpeg_code(d, h);
        if (entry >> 12) {
            k += (int)(entry >> 8) & 15;
            block[spmi_jpeg_zigzag[k]] = (int16_t)spmi_jpeg_value(d, entry);
            last = k++;
        } else {
            if ((entry >> 8 & 15) != 15) break;
            k += 16;
        }
    } while (k < 64);
    return last;
}

/* Starts the next restart interval: finds its marker, or decides as libjpeg's resynchronisation does whether a wrong one
 * is skipped (the restart was lost earlier) or left for later (data is missing up to it). */
static void spmi_jpeg_restart(spmi_jpeg *d)
{
    int wanted = 0xd0 + d->restart_next, i;
    d->bits = 0;
    d->count = 0;
    if (!d->marker) d->marker = spmi_jpeg_next_marker(d);
    while (d->marker != wanted) {
        int ahead = (d->marker - wanted) & 7;
        if (d->marker >= 0xc0 && (d->marker < 0xd0 || d->marker > 0xd7 || ahead == 1 || ahead == 2)) break;
        if (d->marker >= 0xc0 && ahead != 6 && ahead != 7) {
            d->marker = wanted;
            break;
        }
        d->marker = spmi_jpeg_next_marker(d);
    }
    if (d->marker == wanted) {
        d->marker = 0;
        d->starved = 0;
    }
    d->restart_next = (d->restart_next + 1) & 7;
    d->restart_left = d->restart_interval;
    d->eob_run = 0;
    for (i = 0; i < d->components; i++) d->component[i].dc = 0;
}

/* Whether all that is left of this scan would stay as it is: no more data, and no restart marker to resume at. */
static int spmi_jpeg_scan_is_over(const spmi_jpeg *d)
{
    return d->starved && d->marker && (!d->restart_interval || d->marker < 0xd0 || d->marker > 0xd7);
}

/* ---- inverse transforms: coefficients and quantiser row-major, `out` gets size x size samples ----
 * The "islow" method (Loeffler, Ligtenberg, Moschytz 1989; 13-bit constants, columns before rows) with the word sizes
 * of libjpeg-turbo's vector code, which show only in damaged files: dequantised values and some sums wrap at 16 bits,
 * the values between the passes saturate there. */

#define SPMI_JPEG_DEQUANT(i) ((int16_t)((int)coef[i] * (int)quant[i]))
#define SPMI_JPEG_MUL(x, c) ((uint32_t)((int32_t)(x) * (c)))
#define SPMI_JPEG_DESCALE(x, n) ((int32_t)((x) + (1u << ((n) - 1))) >> (n))

/* What the pass over the columns left, in 16 bits; `flat`: no column had more than its first coefficient. */
static void spmi_jpeg_saturate(int32_t *work, int count, int flat)
{
    int i;
    for (i = 0; i < count; i++)
        work[i] = flat ? (int16_t)work[i] : work[i] < -32768 ? -32768 : work[i] > 32767 ? 32767 : work[i];
}

static inline uint8_t spmi_jpeg_sample(int32_t v)
{
    v += 128;
    return SPMI_JPEG_CLAMP(v);
}

/* One 8-point inverse transform with results scaled up by 2^13: x in order of frequency, y in order of place. */
static inline void spmi_jpeg_idct_line(const int32_t *x, uint32_t *y)
{
    uint32_t e0 = (uint32_t)(int16_t)(x[0] + x[4]) << 13, e1 = (uint32_t)(int16_t)(x[0] - x[4]) << 13;
    uint32_t e2 = SPMI_JPEG_MUL(x[2], 4433) + SPMI_JPEG_MUL(x[6], 4433 - 15137);
    uint32_t e3 = SPMI_JPEG_MUL(x[2], 4433 + 6270) + SPMI_JPEG_MUL(x[6], 4433);
    int32_t s3 = (int16_t)(x[7] + x[3]), s4 = (int16_t)(x[5] + x[1]);
    uint32_t o3 = SPMI_JPEG_MUL(s3, 9633 - 16069) + SPMI_JPEG_MUL(s4, 9633);
    uint32_t o4 = SPMI_JPEG_MUL(s3, 9633) + SPMI_JPEG_MUL(s4, 9633 - 3196);
    uint32_t t0 = SPMI_JPEG_MUL(x[7], 2446 - 7373) - SPMI_JPEG_MUL(x[1], 7373) + o3;
    uint32_t t1 = SPMI_JPEG_MUL(x[5], 16819 - 20995) - SPMI_JPEG_MUL(x[3], 20995) + o4;
    uint32_t t2 = SPMI_JPEG_MUL(x[3], 25172 - 20995) - SPMI_JPEG_MUL(x[5], 20995) + o3;
    uint32_t t3 = SPMI_JPEG_MUL(x[1], 12299 - 7373) - SPMI_JPEG_MUL(x[7], 7373) + o4;
    uint32_t a0 = e0 + e3, a3 = e0 - e3, a1 = e1 + e2, a2 = e1 - e2;
    y[0] = a0 + t3;
    y[7] = a0 - t3;
    y[1] = a1 + t2;
    y[6] = a1 - t2;
    y[2] = a2 + t1;
    y[5] = a2 - t1;
    y[3] = a3 + t0;
    y[4] = a3 - t0;
}

static void spmi_jpeg_idct8(const int16_t *coef, const uint16_t *quant, uint8_t *out, size_t stride)
{
    int32_t work[64], x[8];
    uint32_t y[8], over = 0;
    int r, c, flat = 1;
    for (c = 0; c < 8; c++) {
        if (!(coef[8 + c] | coef[16 + c] | coef[24 + c] | coef[32 + c] | coef[40 + c] | coef[48 + c] | coef[56 + c])) {
            int32_t v = SPMI_JPEG_DEQUANT(c) * 4;
            over |= (uint32_t)(v + 32768);
            for (r = 0; r < 8; r++) work[8 * r + c] = v;
            continue;
        }
        flat = 0;
        for (r = 0; r < 8; r++) x[r] = SPMI_JPEG_DEQUANT(8 * r + c);
        spmi_jpeg_idct_line(x, y);
        for (r = 0; r < 8; r++) {
            int32_t v = SPMI_JPEG_DESCALE(y[r], 11);
            over |= (uint32_t)v + 32768u;
            work[8 * r + c] = v;
        }
    }
    if (over >> 16) spmi_jpeg_saturate(work, 64, flat);
    for (r = 0; r < 8; r++, out += stride) {
        const int32_t *w = work + 8 * r;
        if (!(w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7])) {
            memset(out, spmi_jpeg_sample((w[0] + 16) >> 5), 8);
            continue;
        }
        spmi_jpeg_idct_line(w, y);
        for (c = 0; c < 8; c++) out[c] = spmi_jpeg_sample(SPMI_JPEG_DESCALE(y[c], 18));
    }
}

/* Half size: the four lowest output frequencies of each axis; the eighth-rate coefficient 4 does not take part. */
static inline void spmi_jpeg_idct4_line(const int32_t *x, uint32_t *y)
{
    uint32_t e = (uint32_t)x[0] << 14;
    uint32_t e2 = SPMI_JPEG_MUL(x[2], 15137) - SPMI_JPEG_MUL(x[6], 6270);
    uint32_t o0 = SPMI_JPEG_MUL(x[7], -1730) + SPMI_JPEG_MUL(x[5], 11893) + SPMI_JPEG_MUL(x[3], -17799) + SPMI_JPEG_MUL(x[1], 8697);
    uint32_t o2 = SPMI_JPEG_MUL(x[7], -4176) + SPMI_JPEG_MUL(x[5], -4926) + SPMI_JPEG_MUL(x[3], 7373) + SPMI_JPEG_MUL(x[1], 20995);
    y[0] = e + e2 + o2;
    y[3] = e + e2 - o2;
    y[1] = e - e2 + o0;
    y[2] = e - e2 - o0;
}

static void spmi_jpeg_idct4(const int16_t *coef, const uint16_t *quant, uint8_t *out, size_t stride)
{
    int32_t work[32], x[8];
    uint32_t y[4];
    int r, c, flat = 1;
    for (c = 0; c < 8; c++) {
        work[c] = work[8 + c] = work[16 + c] = work[24 + c] = 0;
        if (c == 4) continue;
        for (r = 0; r < 8; r++) x[r] = SPMI_JPEG_DEQUANT(8 * r + c);
        for (r = 1; r < 8; r++) flat &= r == 4 || coef[8 * r + c] == 0;
        spmi_jpeg_idct4_line(x, y);
        for (r = 0; r < 4; r++) work[8 * r + c] = SPMI_JPEG_DESCALE(y[r], 12);
    }
    spmi_jpeg_saturate(work, 32, flat);
    for (r = 0; r < 4; r++, out += stride) {
        spmi_jpeg_idct4_line(work + 8 * r, y);
        for (c = 0; c < 4; c++) out[c] = spmi_jpeg_sample(SPMI_JPEG_DESCALE(y[c], 19));
    }
}

/* A quarter: only the first and the odd coefficients take part. */
static inline void spmi_jpeg_idct2_line(const int32_t *x, uint32_t *y)
{
    uint32_t e = (uint32_t)x[0] << 15;
    uint32_t o = SPMI_JPEG_MUL(x[7], -5906) + SPMI_JPEG_MUL(x[5], 6967) + SPMI_JPEG_MUL(x[3], -10426) + SPMI_JPEG_MUL(x[1], 29692);
    y[0] = e + o;
    y[1] = e - o;
}

static void spmi_jpeg_idct2(const int16_t *coef, const uint16_t *quant, uint8_t *out, size_t stride)
{
    int32_t work[16], x[8];
    uint32_t y[2];
    int r, c;
    for (c = 0; c < 8; c++) {
        work[c] = work[8 + c] = 0;
        if (c == 2 || c == 4 || c == 6) continue;
        for (r = 0; r < 8; r++) x[r] = SPMI_JPEG_DEQUANT(8 * r + c);
        spmi_jpeg_idct2_line(x, y);
        work[c] = SPMI_JPEG_DESCALE(y[0], 13);
        work[8 + c] = SPMI_JPEG_DESCALE(y[1], 13);
    }
    spmi_jpeg_saturate(work, 16, 0);
    for (r = 0; r < 2; r++, out += stride) {
        spmi_jpeg_idct2_line(work + 8 * r, y);
        for (c = 0; c < 2; c++) out[c] = spmi_jpeg_sample(SPMI_JPEG_DESCALE(y[c], 20));
    }
}

/* `last`: no coefficient behind this place in zigzag order is set. */
static void spmi_jpeg_idct(const spmi_jpeg_component *c, const int16_t *coef, int last, uint8_t *out)
{
    const uint16_t *quant = c->quant;
    int r;
    if (c->size == 8) {
        if (last) {
            spmi_jpeg_idct8(coef, quant, out, c->stride);
        } else {
            int v = (int16_t)(SPMI_JPEG_DEQUANT(0) * 4);
            v = spmi_jpeg_sample((v + 16) >> 5);
            for (r = 0; r < 8; r++) memset(out + (size_t)r * c->stride, v, 8);
        }
    } else if (c->size == 4) {
        spmi_jpeg_idct4(coef, quant, out, c->stride);
    } else if (c->size == 2) {
        spmi_jpeg_idct2(coef, quant, out, c->stride);
    } else { /* the mean; libjpeg's range table repeats every 1024 values */
        int v = ((int)coef[0] * (int16_t)quant[0] + 4) >> 3;
        *out = spmi_jpeg_sample(((v & 1023) ^ 512) - 512);
    }
}

#undef SPMI_JPEG_DEQUANT
#undef SPMI_JPEG_MUL
#undef SPMI_JPEG_DESCALE

/* ---- upsampling and colour: one row of the picture at a time ---- */

/* in[0 .. n) to out[0 .. 2n): each output is 3/4 of its own sample and 1/4 of the neighbour on its side; rounding
 * alternates.  n > 2. */
static void spmi_jpeg_widen_2(const uint8_t *SPMI_RESTRICT in, int n, uint8_t *SPMI_RESTRICT out)
{
    int i;
    out[0] = in[0];
    out[1] = (uint8_t)((3 * in[0] + in[1] + 2) >> 2);
    for (i = 1; i < n - 1; i++) {
        out[2 * i] = (uint8_t)((3 * in[i] + in[i - 1] + 1) >> 2);
        out[2 * i + 1] = (uint8_t)((3 * in[i] + in[i + 1] + 2) >> 2);
    }
    out[2 * n - 2] = (uint8_t)((3 * in[n - 1] + in[n - 2] + 1) >> 2);
    out[2 * n - 1] = in[n - 1];
}

/* The same in both directions: `near` weighs 3/4, `far` (the row above or below) 1/4.  `sum` is scratch for n values. */
static void spmi_jpeg_widen_2x2(const uint8_t *near_row, const uint8_t *far_row, int n, uint16_t *SPMI_RESTRICT sum,
                                uint8_t *SPMI_RESTRICT out)
{
    int i;
    for (i = 0; i < n; i++) sum[i] = (uint16_t)(3 * near_row[i] + far_row[i]);
    out[0] = (uint8_t)((4 * sum[0] + 8) >> 4);
    out[1] = (uint8_t)((3 * sum[0] + sum[1] + 7) >> 4);
    for (i = 1; i < n - 1; i++) {
        out[2 * i] = (uint8_t)((3 * sum[i] + sum[i - 1] + 8) >> 4);
        out[2 * i + 1] = (uint8_t)((3 * sum[i] + sum[i + 1] + 7) >> 4);
    }
    out[2 * n - 2] = (uint8_t)((3 * sum[n - 1] + sum[n - 2] + 8) >> 4);
    out[2 * n - 1] = (uint8_t)((4 * sum[n - 1] + 7) >> 4);
}

/* Row y of the picture, of one component, at full width.  `first`: the component's row that rows[0] holds. */
static const uint8_t *spmi_jpeg_component_row(spmi_jpeg *d, spmi_jpeg_component *c, int y, int first)
{
    int row = y / c->expand_v, part = y % c->expand_v, i, j;
    const uint8_t *in = c->rows + (size_t)(row - first) * c->stride;
    if (c->up == SPMI_JPEG_UP_NONE) return in;
    if (c->up == SPMI_JPEG_UP_H2V1) {
        spmi_jpeg_widen_2(in, c->width, c->wide);
    } else if (c->up == SPMI_JPEG_UP_COPY) {
        if (c->expand_h == 1) return in;
        for (i = 0; i * c->expand_h < d->out_width; i++)
            for (j = 0; j < c->expand_h; j++) c->wide[i * c->expand_h + j] = in[i];
    } else {
        const uint8_t *far_row = in;
        if (part == 0 && row > 0) far_row = in - c->stride;
        if (part == 1 && row < c->height - 1) far_row = in + c->stride;
        if (c->up == SPMI_JPEG_UP_H2V2) spmi_jpeg_widen_2x2(in, far_row, c->width, d->filter, c->wide);
        else for (i = 0; i < c->width; i++) c->wide[i] = (uint8_t)((3 * in[i] + far_row[i] + 1 + part) >> 2);
    }
    return c->wide;
}

/* YCbCr to RGB with 16-bit fixed point: R = Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb. */
static void spmi_jpeg_ycc_row(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int n, uint8_t *SPMI_RESTRICT out)
{
    int i;
    for (i = 0; i < n; i++) {
        int l = y[i], b = cb[i] - 128, r = cr[i] - 128;
        int red = l + ((91881 * r + 32768) >> 16);
        int green = l + ((-22554 * b - 46802 * r + 32768) >> 16);
        int blue = l + ((116130 * b + 32768) >> 16);
        out[3 * i] = SPMI_JPEG_CLAMP(red);
        out[3 * i + 1] = SPMI_JPEG_CLAMP(green);
        out[3 * i + 2] = SPMI_JPEG_CLAMP(blue);
    }
}

/* Pillow's CMYK to RGB, after its inversion of the file's values (Adobe stores them inverted): r, g, b in `out` become
 * k - r' k / 255 with r' = 255 - r rounded; `out` holds 255 - ink. */
static void spmi_jpeg_ink_row(const uint8_t *k, int n, uint8_t *out)
{
    int i, j;
    for (i = 0; i < n; i++) {
        for (j = 0; j < 3; j++) {
            int t = out[3 * i + j] * k[i] + 128, v = k[i] - ((t + (t >> 8)) >> 8);
            out[3 * i + j] = SPMI_JPEG_CLAMP(v);
        }
    }
}

/* Puts an RGB row where the EXIF orientation wants it. */
static void spmi_jpeg_place_row(const spmi_jpeg *d, int y, const uint8_t *line)
{
    int o = d->orientation, w = d->out_width, h = d->out_height, x;
    int back = o == 2 || o == 3 || o == 7 || o == 8, up = o == 3 || o == 4 || o == 6 || o == 7;
    size_t row = (size_t)(up ? h - 1 - y : y);
    for (x = 0; x < w; x++) {
        size_t column = (size_t)(back ? w - 1 - x : x);
        size_t at = o >= 5 ? column * (size_t)h + row : row * (size_t)w + column;
        memcpy(d->image->pixels + 3 * at, line + 3 * x, 3);
    }
}

static void spmi_jpeg_write_row(spmi_jpeg *d, int y, int mcu_row)
{
    const uint8_t *plane[4] = {NULL, NULL, NULL, NULL};
    uint8_t *out = d->orientation > 1 ? d->line : d->image->pixels + (size_t)y * 3 * (size_t)d->out_width;
    int i, n = d->out_width;
    for (i = 0; i < d->components; i++) {
        spmi_jpeg_component *c = &d->component[i];
        plane[i] = spmi_jpeg_component_row(d, c, y, mcu_row * c->rows_per_mcu - 1);
    }
    if (d->color == SPMI_JPEG_YCC || d->color == SPMI_JPEG_YCCK) {
        spmi_jpeg_ycc_row(plane[0], plane[1], plane[2], n, out);
    } else if (d->color == SPMI_JPEG_GRAY) {
        for (i = 0; i < n; i++) out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = plane[0][i];
    } else {
        uint8_t flip = d->color == SPMI_JPEG_CMYK ? 255 : 0;
        for (i = 0; i < n; i++) {
            out[3 * i] = plane[0][i] ^ flip;
            out[3 * i + 1] = plane[1][i] ^ flip;
            out[3 * i + 2] = plane[2][i] ^ flip;
        }
    }
    if (d->components == 4) spmi_jpeg_ink_row(plane[3], n, out);
    if (d->orientation > 1) spmi_jpeg_place_row(d, y, out);
}

/* Writes the rows that the MCU row just decoded completes, and keeps its last row for the filters of the next. */
static void spmi_jpeg_write_rows(spmi_jpeg *d, int mcu_row)
{
    int last = mcu_row == d->mcus_high - 1, i;
    int stop = last ? d->out_height : (mcu_row + 1) * d->max_v * d->min_size - d->context;
    for (; d->next_row < stop; d->next_row++) spmi_jpeg_write_row(d, d->next_row, mcu_row);
    for (i = 0; i < d->components && !last; i++) {
        spmi_jpeg_component *c = &d->component[i];
        memcpy(c->rows, c->rows + (size_t)c->rows_per_mcu * c->stride, c->stride);
    }
}

/* ---- frame ---- */

/* Colours as libjpeg guesses them: markers first, then component ids. */
static spmi_jpeg_color spmi_jpeg_guess_color(const spmi_jpeg *d)
{
    const spmi_jpeg_component *c = d->component;
    if (d->components == 1) return SPMI_JPEG_GRAY;
    if (d->components == 4) return d->seen_adobe && d->adobe_transform != 0 ? SPMI_JPEG_YCCK : SPMI_JPEG_CMYK;
    if (d->seen_jfif) return SPMI_JPEG_YCC;
    if (d->seen_adobe) return d->adobe_transform == 0 ? SPMI_JPEG_RGB : SPMI_JPEG_YCC;
    return c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B' ? SPMI_JPEG_RGB : SPMI_JPEG_YCC;
}

static int64_t spmi_jpeg_ceil(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Everything that follows from the frame header: sizes in blocks and pixels, how components reach the full size. */
static int spmi_jpeg_set_up(spmi_jpeg *d)
{
    int i, scale = d->desc->scale;
    if (scale != 0 && scale != 1 && scale != 2 && scale != 4 && scale != 8)
        return SPMI_JPEG_FAIL(d, SPM_E_ARGUMENT, "%s: cannot decode at 1/%d; the scale is 1, 2, 4 or 8", d->name, scale);
    d->min_size = scale > 1 ? 8 / scale : 8;
    d->color = spmi_jpeg_guess_color(d);
    if (!d->desc->apply_exif) d->orientation = 1;
    d->component[0].group = d->component[0].v;
    if (d->components == 1) d->component[0].h = d->component[0].v = 1; /* a lone component has units of one block */
    for (i = 0; i < d->components; i++) {
        d->max_h = SPMI_MAX(d->max_h, d->component[i].h);
        d->max_v = SPMI_MAX(d->max_v, d->component[i].v);
    }
    d->mcus_wide = (int)spmi_jpeg_ceil(d->width, 8 * d->max_h);
    d->mcus_high = (int)spmi_jpeg_ceil(d->height, 8 * d->max_v);
    d->out_width = (int)spmi_jpeg_ceil((int64_t)d->width * d->min_size, 8);
    d->out_height = (int)spmi_jpeg_ceil((int64_t)d->height * d->min_size, 8);
    for (i = 0; i < d->components; i++) {
        spmi_jpeg_component *c = &d->component[i];
        int fancy = d->min_size > 1, h_in, v_in;
        for (c->size = d->min_size; c->size < 8; c->size *= 2) { /* a scaled picture may need no upsampling */
            if (d->max_h * d->min_size % (c->h * c->size * 2) || d->max_v * d->min_size % (c->v * c->size * 2)) break;
        }
        if (d->components > 1) c->group = c->v;
        c->blocks_wide = spmi_jpeg_ceil((int64_t)d->width * c->h, 8 * d->max_h);
        c->blocks_high = spmi_jpeg_ceil((int64_t)d->height * c->v, 8 * d->max_v);
        c->stride_blocks = (int64_t)d->mcus_wide * c->h;
        c->rows_blocks = (int64_t)d->mcus_high * c->v;
        c->width = (int)spmi_jpeg_ceil((int64_t)d->width * c->h * c->size, 8 * d->max_h);
        c->height = (int)spmi_jpeg_ceil((int64_t)d->height * c->v * c->size, 8 * d->max_v);
        h_in = c->h * c->size / d->min_size;
        v_in = c->v * c->size / d->min_size;
        if (d->max_h % h_in || d->max_v % v_in)
            return SPMI_JPEG_FAIL(d, SPM_E_UNSUPPORTED, "%s: sampling factors %dx%d beside %dx%d are not supported; whole ratios are",
                                  d->name, c->h, c->v, d->max_h, d->max_v);
        c->expand_h = d->max_h / h_in;
        c->expand_v = d->max_v / v_in;
        c->up = SPMI_JPEG_UP_COPY;
        if (c->expand_h == 1 && c->expand_v == 1) c->up = SPMI_JPEG_UP_NONE;
        else if (c->expand_h == 2 && c->expand_v == 1 && fancy && c->width > 2) c->up = SPMI_JPEG_UP_H2V1;
        else if (c->expand_h == 1 && c->expand_v == 2 && fancy) c->up = SPMI_JPEG_UP_H1V2;
        else if (c->expand_h == 2 && c->expand_v == 2 && fancy && c->width > 2) c->up = SPMI_JPEG_UP_H2V2;
        if (c->up == SPMI_JPEG_UP_H1V2 || c->up == SPMI_JPEG_UP_H2V2) d->context = 1;
        c->rows_per_mcu = c->v * c->size;
        c->stride = ((size_t)c->stride_blocks * (size_t)c->size + 63) & ~(size_t)63;
    }
    return 1;
}

/* Memory for the picture, one row of MCUs and, with `whole`, all coefficients; the sum is checked first. */
static int spmi_jpeg_allocate(spmi_jpeg *d, int whole)
{
    int turned = d->orientation >= 5, width = turned ? d->out_height : d->out_width, height = turned ? d->out_width : d->out_height;
    uint64_t total = (uint64_t)width * (uint64_t)height * 3;
    size_t wide = (size_t)d->mcus_wide * (size_t)(d->max_h * d->min_size) + 64;
    int i, ok = 1;
    d->status = spmi_image_check_size(d->ctx, d->name, width, height, d->desc->max_bytes, d->err);
    if (d->status) return 0;
    for (i = 0; i < d->components && whole; i++)
        total += (uint64_t)d->component[i].stride_blocks * (uint64_t)d->component[i].rows_blocks * 128;
    if (total > d->desc->max_bytes)
        return SPMI_JPEG_FAIL(d, SPM_E_MEMORY, "%s: %d x %d pixels of a JPEG in several scans need %llu bytes, the limit is %llu; "
                              "raise max_bytes", d->name, d->width, d->height, (unsigned long long)total,
                              (unsigned long long)d->desc->max_bytes);
    d->status = spm_image_create(d->ctx, width, height, d->image, d->err);
    if (d->status) return 0;
    for (i = 0; i < d->components; i++) {
        spmi_jpeg_component *c = &d->component[i];
        c->rows = (uint8_t *)spmi_alloc_array(d->ctx, c->rows_per_mcu + 1, c->stride);
        if (c->up != SPMI_JPEG_UP_NONE) c->wide = (uint8_t *)spmi_alloc_zero(d->ctx, wide);
        if (whole) c->coefficients = (int16_t *)spmi_alloc_array(d->ctx, c->stride_blocks * c->rows_blocks, 128);
        ok = ok && c->rows && (c->wide || c->up == SPMI_JPEG_UP_NONE) && (c->coefficients || !whole);
    }
    d->filter = (uint16_t *)spmi_alloc_array(d->ctx, (int64_t)wide, sizeof(uint16_t));
    d->line = (uint8_t *)spmi_alloc_array(d->ctx, d->out_width, 3);
    if (!ok || !d->filter || !d->line)
        return SPMI_JPEG_FAIL(d, SPM_E_MEMORY, "%s: out of memory for decoding %d x %d pixels", d->name, d->width, d->height);
    return 1;
}

static int spmi_jpeg_truncated(spmi_jpeg *d)
{
    return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: the image file is truncated: its %lu bytes end before the picture does; copy it again, "
                          "or allow truncated files", d->name, (unsigned long)(d->end - d->data));
}

/* ---- scans ---- */

/* Progressive scans carry one band of coefficients, one bit deeper each time; what contradicts itself is refused, what
 * only comes in an odd order is not (as libjpeg has it).  Keeps account of the bits known, for the smoothing. */
static int spmi_jpeg_check_band(spmi_jpeg *d)
{
    int start = d->spectral_start, end = d->spectral_end, high = d->bit_high, low = d->bit_low, i, k;
    if (start == 0 ? end != 0 : start > end || end > 63 || d->scan_count != 1) low = 99;
    if (low > 13 || (high != 0 && low != high - 1))
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a progressive scan of coefficients %d to %d, bits %d to %d, is not possible; the "
                              "file is damaged", d->name, start, end, high, d->bit_low);
    for (i = 0; i < d->scan_count; i++) {
        spmi_jpeg_component *c = &d->component[d->scan[i]];
        for (k = SPMI_MIN(start, 1); k <= SPMI_MAX(end, 9); k++) c->known_before[k] = d->scans > 1 ? c->known[k] : 0;
        for (k = start; k <= end; k++) c->known[k] = (int16_t)low;
    }
    return 1;
}

static int spmi_jpeg_start_scan(spmi_jpeg *d)
{
    int i, blocks = 0;
    for (i = 0; i < d->scan_count; i++) {
        spmi_jpeg_component *c = &d->component[d->scan[i]];
        int kind = d->progressive && d->spectral_start > 0 && d->bit_high > 0 ? 2 : 1;
        blocks += c->h * c->v;
        c->dc = 0;
        if (!c->quant_known) {
            if (c->quant_index > 3 || !d->quant_present[c->quant_index])
                return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: quantization table %d is missing; the file is damaged", d->name,
                                      c->quant_index);
            memcpy(c->quant, d->quant[c->quant_index], sizeof c->quant);
            c->quant_known = 1;
        }
        if ((!d->progressive || (d->spectral_start == 0 && d->bit_high == 0))
            && !spmi_jpeg_make_huffman(d, d->dc, c->dc_index, 1, 1))
            return 0;
        if ((!d->progressive || d->spectral_start > 0) && !spmi_jpeg_make_huffman(d, d->ac, c->ac_index, 0, kind)) return 0;
    }
    if (d->scan_count > 1 && blocks > 10)
        return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan of %d blocks in each unit is not possible; at most 10 are", d->name, blocks);
    if (d->progressive && !spmi_jpeg_check_band(d)) return 0;
    d->bits = 0;
    d->count = d->marker = d->starved = d->restart_next = 0;
    d->restart_left = d->restart_interval;
    d->eob_run = 0;
    return 1;
}

/* First pass over a band of AC coefficients. */
static void spmi_jpeg_ac_first(spmi_jpeg *d, const spmi_jpeg_huffman *h, int16_t *block)
{
    int k, end = d->spectral_end, low = d->bit_low;
    if (d->eob_run) {
        d->eob_run--;
        return;
    }
    for (k = d->spectral_start; k <= end; k++) {
        uint32_t entry = spmi_jpeg_code(d, h);
        int run = (int)(entry >> 8) & 15;
        if (entry >> 12) {
            k += run;
            block[spmi_jpeg_zigzag[k]] = (int16_t)((uint32_t)spmi_jpeg_value(d, entry) << low);
        } else if (run == 15) {
            k += 15;
        } else {
            d->eob_run = (1u << run) - 1;
            if (run) d->eob_run += (uint32_t)spmi_jpeg_take(d, run);
            return;
        }
    }
}

/* One correction bit for a coefficient that is not zero. */
static inline void spmi_jpeg_correct(spmi_jpeg *d, int16_t *value, int bit)
{
    spmi_jpeg_refill(d);
    if (spmi_jpeg_take(d, 1) && (*value & bit) == 0) *value = (int16_t)(*value + (*value >= 0 ? bit : -bit));
}

/* A later pass: one more bit for known coefficients, new ones of size one between them. */
static void spmi_jpeg_ac_refine(spmi_jpeg *d, const spmi_jpeg_huffman *h, int16_t *block)
{
    int k = d->spectral_start, end = d->spectral_end, bit = 1 << d->bit_low;
    if (!d->eob_run) {
        for (; k <= end; k++) {
            uint32_t entry = spmi_jpeg_code(d, h);
            int run = (int)(entry >> 8) & 15, value = 0;
            if (entry >> 12) {
                value = spmi_jpeg_take(d, 1) ? bit : -bit;
            } else if (run != 15) {
                d->eob_run = 1u << run;
                if (run) d->eob_run += (uint32_t)spmi_jpeg_take(d, run);
                break;
            }
            do { /* over `run` zeros, correcting what is not zero */
                int16_t *at = block + spmi_jpeg_zigzag[k];
                if (*at) spmi_jpeg_correct(d, at, bit);
                else if (--run < 0) break;
                k++;
            } while (k <= end);
            if (value) block[spmi_jpeg_zigzag[k]] = (int16_t)value;
        }
    }
    if (d->eob_run) {
        for (; k <= end; k++) {
            int16_t *at = block + spmi_jpeg_zigzag[k];
            if (*at) spmi_jpeg_correct(d, at, bit);
        }
        d->eob_run--;
    }
}

/* One block of whatever kind of scan this is, in the coefficient store. */
static void spmi_jpeg_scan_block(spmi_jpeg *d, spmi_jpeg_component *c, int64_t row, int64_t column)
{
    int16_t *block = c->coefficients + (row * c->stride_blocks + column) * 64;
    if (!d->progressive) {
        (void)spmi_jpeg_block(d, c, block);
    } else if (d->spectral_start > 0) {
        if (d->bit_high == 0) spmi_jpeg_ac_first(d, &d->ac[c->ac_index], block);
        else spmi_jpeg_ac_refine(d, &d->ac[c->ac_index], block);
    } else if (d->bit_high == 0) {
        block[0] = (int16_t)((uint32_t)spmi_jpeg_dc(d, c) << d->bit_low);
    } else {
        spmi_jpeg_refill(d);
        if (spmi_jpeg_take(d, 1)) block[0] = (int16_t)(block[0] | 1 << d->bit_low);
    }
}

/* One scan into the coefficient store.  A scan with one component covers only blocks that hold pixels. */
static int spmi_jpeg_read_coefficients(spmi_jpeg *d)
{
    int single = d->scan_count == 1, i, x, y;
    spmi_jpeg_component *only = &d->component[d->scan[0]];
    int64_t rows = single ? only->blocks_high : d->mcus_high, columns = single ? only->blocks_wide : d->mcus_wide, row, column;
    for (row = 0; row < rows; row++) {
        int group = (int)(single ? row / only->group : row);
        d->work_left -= columns;
        if (d->work_left < 0)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: more scans (%d) than any real picture of this size has; the file is damaged "
                                  "or hostile", d->name, d->scans);
        for (column = 0; column < columns; column++) {
            if (d->restart_interval && d->restart_left == 0) spmi_jpeg_restart(d);
            if (d->restart_interval) d->restart_left--;
            if (d->starved) {
                if (spmi_jpeg_scan_is_over(d)) return 1;
                continue;
            }
            d->last_good_group = group;
            if (single) {
                spmi_jpeg_scan_block(d, only, row, column);
            } else {
                for (i = 0; i < d->scan_count; i++) {
                    spmi_jpeg_component *c = &d->component[d->scan[i]];
                    for (y = 0; y < c->v; y++)
                        for (x = 0; x < c->h; x++) spmi_jpeg_scan_block(d, c, row * c->v + y, column * c->h + x);
                }
            }
            if (d->count < 0) d->starved = 1;
        }
    }
    return 1;
}

/* ---- smoothing of progressive pictures whose later scans are missing ----
 * Coefficients not known to full precision and still zero are estimated from the DC values of the 5 x 5 blocks around
 * (T.81 K.8 does so with 3 x 3); while no AC coefficient at all is known, the DC values are smoothed as well.
 * The kernels are libjpeg-turbo's, in units of 1/256 of a quantiser step. */
static const uint8_t spmi_jpeg_smooth_place[10] = {0, 1, 8, 16, 9, 2, 3, 10, 17, 24};
static const int16_t spmi_jpeg_smooth_dc_only[10][25] = {
    {-2, -6, -8, -6, -2, -6, 6, 42, 6, -6, -8, 42, 152, 42, -8, -6, 6, 42, 6, -6, -2, -6, -8, -6, -2},
    {-1, -1, 0, 1, 1, -3, 13, 0, -13, 3, -3, 38, 0, -38, 3, -3, 13, 0, -13, 3, -1, -1, 0, 1, 1},
    {-1, -3, -3, -3, -1, -1, 13, 38, 13, -1, 0, 0, 0, 0, 0, 1, -13, -38, -13, 1, 1, 3, 3, 3, 1},
    {0, 0, 1, 0, 0, 0, 2, 7, 2, 0, 0, -5, -14, -5, 0, 0, 2, 7, 2, 0, 0, 0, 1, 0, 0},
    {-1, 0, 0, 0, 1, 0, 9, 0, -9, 0, 0, 0, 0, 0, 0, 0, -9, 0, 9, 0, 1, 0, 0, 0, -1},
    {0, 0, 0, 0, 0, 0, 2, -5, 2, 0, 1, 7, -14, 7, 1, 0, 2, -5, 2, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 1, 0, -1, 0, 0, 2, 0, -2, 0, 0, 1, 0, -1, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 1, -3, 1, 0, 0, 0, 0, 0, 0, 0, -1, 3, -1, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 1, 0, -1, 0, 0, -3, 0, 3, 0, 0, 1, 0, -1, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0, -1, -2, -1, 0, 0, 0, 0, 0, 0}
};
static const int16_t spmi_jpeg_smooth_some_ac[6][25] = {
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -7, 50, 0, -50, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0, 0, -7, 0, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0, -50, 0, 0, 0, 0, 7, 0, 0},
    {0, 0, -1, 0, 0, 0, 0, 13, 0, 0, 0, 0, -24, 0, 0, 0, 0, 13, 0, 0, 0, 0, -1, 0, 0},
    {0, -1, 0, 1, 0, -1, 10, 0, -10, 1, 0, 0, 0, 0, 0, 1, -10, 0, 10, -1, 0, 1, 0, -1, 0},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 13, -24, 13, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
};

static int spmi_jpeg_wants_smoothing(const spmi_jpeg *d)
{
    int i, k, useful = 0;
    if (!d->progressive) return 0;
    for (i = 0; i < d->components; i++) {
        const spmi_jpeg_component *c = &d->component[i];
        if (!c->quant_known || c->known[0] < 0) return 0;
        for (k = 0; k < 10; k++) {
            if (c->quant[spmi_jpeg_smooth_place[k]] == 0) return 0;
            if (k > 0 && c->known[k] != 0) useful = 1;
        }
    }
    return useful;
}

/* The block rows two above to two below `row`, which is at `in`; missing ones repeat the nearest.  Which ones count as
 * missing is libjpeg-turbo's choice: it looks at groups of c->group rows, and at the upper edge a group too early. */
static void spmi_jpeg_smooth_rows(const spmi_jpeg_component *c, int64_t row, const int16_t *in, const int16_t *rows[5])
{
    int64_t pitch = c->stride_blocks * 64, groups = (c->blocks_high + c->group - 1) / c->group;
    int64_t group = row / c->group, at = row % c->group, high = SPMI_MIN(c->group, c->blocks_high - group * c->group);
    rows[2] = in;
    rows[1] = row > 0 ? in - pitch : in;
    rows[0] = at > 1 || group > 1 ? in - 2 * pitch : rows[1];
    rows[3] = at < high - 1 || group < groups - 1 ? in + pitch : in;
    rows[4] = at < high - 2 || group < groups - 2 ? in + 2 * pitch : rows[3];
}

/* The estimates for one block, into a copy of it.  rows[0..4]: first coefficients of the block rows two above to two
 * below (edge rows repeated). */
static void spmi_jpeg_smooth(const spmi_jpeg_component *c, const int16_t *known, int dc_only, const int16_t *const rows[5],
                             int64_t column, int16_t *block)
{
    int dc[25], i, k;
    for (i = 0; i < 25; i++) {
        int64_t at = column + i % 5 - 2;
        /* past the right edge libjpeg-turbo repeats the last column, but in two columns the first */
        if (at < 0 || (at > 1 && c->blocks_wide == 2)) at = 0;
        at = SPMI_MIN(at, c->blocks_wide - 1);
        dc[i] = rows[i / 5][64 * at];
    }
    for (k = dc_only ? 0 : 1; k < (dc_only ? 10 : 6); k++) {
        const int16_t *kernel = dc_only ? spmi_jpeg_smooth_dc_only[k] : spmi_jpeg_smooth_some_ac[k];
        int place = spmi_jpeg_smooth_place[k], bit = k ? known[k] : 0, sum = 0, estimate;
        int64_t step = c->quant[place], scaled;
        if (k && (bit == 0 || block[place] != 0)) continue;
        for (i = 0; i < 25; i++) sum += kernel[i] * dc[i];
        scaled = (int64_t)sum * c->quant[0];
        estimate = (int)((128 * step + (scaled < 0 ? -scaled : scaled)) / (256 * step));
        if (bit > 0 && estimate >= 1 << bit) estimate = (1 << bit) - 1;
        block[place] = (int16_t)(scaled < 0 ? -estimate : estimate);
    }
}

/* ---- the two ways to pixels ---- */

/* One row of MCUs of the only scan: decoded and transformed block by block. */
static void spmi_jpeg_decode_mcu_row(spmi_jpeg *d, int mcu_row)
{
    int16_t block[64];
    int column, i, x, y;
    for (column = 0; column < d->mcus_wide; column++) {
        if (d->restart_interval && d->restart_left == 0) spmi_jpeg_restart(d);
        if (d->restart_interval) d->restart_left--;
        for (i = 0; i < d->scan_count; i++) {
            spmi_jpeg_component *c = &d->component[d->scan[i]];
            for (y = 0; y < c->v; y++) {
                uint8_t *out = c->rows + (size_t)(1 + y * c->size) * c->stride + (size_t)(column * c->h * c->size);
                for (x = 0; x < c->h; x++, out += c->size) {
                    int last = 0;
                    memset(block, 0, sizeof block);
                    if (!d->starved) last = spmi_jpeg_block(d, c, block);
                    if ((int64_t)column * c->h + x < c->blocks_wide && (int64_t)mcu_row * c->v + y < c->blocks_high)
                        spmi_jpeg_idct(c, block, last, out);
                }
            }
        }
        if (d->count < 0) d->starved = 1;
    }
}

/* One row of MCUs from the coefficient store. */
static void spmi_jpeg_transform_mcu_row(spmi_jpeg *d, int mcu_row, int smoothing)
{
    int i, k, y;
    for (i = 0; i < d->components; i++) {
        spmi_jpeg_component *c = &d->component[i];
        int good = mcu_row * c->v / c->group <= d->last_good_group;
        const int16_t *known = good ? c->known : c->known_before;
        int dc_only = 1, high = (int)SPMI_MIN(c->v, c->blocks_high - (int64_t)mcu_row * c->v);
        int16_t unknown[10];
        for (k = 0; k < 10; k++) unknown[k] = -1;
        if (!good && d->scans < 2) known = unknown;
        for (k = 1; k < 10; k++) dc_only = dc_only && known[k] == -1;
        for (y = 0; y < high; y++) {
            int64_t row = (int64_t)mcu_row * c->v + y, column;
            const int16_t *in = c->coefficients + row * c->stride_blocks * 64, *rows[5];
            uint8_t *out = c->rows + (size_t)(1 + y * c->size) * c->stride;
            spmi_jpeg_smooth_rows(c, row, in, rows);
            for (column = 0; column < c->blocks_wide; column++, in += 64, out += c->size) {
                int16_t block[64];
                int any = 0;
                memcpy(block, in, sizeof block);
                if (smoothing) spmi_jpeg_smooth(c, known, dc_only, rows, column, block);
                for (k = 1; k < 64; k++) any |= block[k];
                spmi_jpeg_idct(c, block, any ? 63 : 0, out);
            }
        }
    }
}

/* Decodes the picture whose first scan header has just been read. */
static int spmi_jpeg_decode_scans(spmi_jpeg *d)
{
    int several = d->progressive || d->scan_count < d->components, allow = d->desc->allow_truncated, i, k, more, row;
    int64_t blocks = 0;
    if (!spmi_jpeg_set_up(d) || !spmi_jpeg_allocate(d, several)) return 0;
    for (i = 0; i < d->components; i++) {
        blocks += d->component[i].stride_blocks * d->component[i].rows_blocks;
        for (k = 0; k < 64; k++) d->component[i].known[k] = -1;
    }
    if (!d->progressive) { /* motion JPEG leaves the standard tables out */
        for (i = 0; i < 2; i++) {
            if (!d->dc[i].present) spmi_jpeg_set_huffman(&d->dc[i], spmi_jpeg_dc_bits[i], spmi_jpeg_dc_values, 12);
            if (!d->ac[i].present) spmi_jpeg_set_huffman(&d->ac[i], spmi_jpeg_ac_bits[i], spmi_jpeg_ac_values[i], 162);
        }
    }
    if (!several) {
        if (!spmi_jpeg_start_scan(d)) return 0;
        for (row = 0; row < d->mcus_high; row++) {
            spmi_jpeg_decode_mcu_row(d, row);
            if (d->ended && !allow) return spmi_jpeg_truncated(d);
            spmi_jpeg_write_rows(d, row);
        }
        more = spmi_jpeg_read_segments(d);
        if (more == 1)
            return SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: a scan follows after the picture is complete; the file is damaged", d->name);
        return more; /* with all rows there, a missing end marker is forgiven */
    }
    d->work_left = (1 << 24) + 256 * blocks; /* hostile files repeat scans without end */
    do {
        if (!spmi_jpeg_start_scan(d) || !spmi_jpeg_read_coefficients(d)) return 0;
        more = spmi_jpeg_read_segments(d);
        if (!more) return 0;
        if (d->ended && !allow) return spmi_jpeg_truncated(d);
    } while (more == 1);
    k = spmi_jpeg_wants_smoothing(d);
    for (row = 0; row < d->mcus_high; row++) {
        spmi_jpeg_transform_mcu_row(d, row, k);
        spmi_jpeg_write_rows(d, row);
    }
    return 1;
}

/* Decodes a whole file; `desc` has its byte limit filled in. */
static spm_status spmi_jpeg_decode(spm_context *ctx, const char *name, const uint8_t *data, size_t size,
                                   const spm_decode_desc *desc, spm_image *image, spm_error *err)
{
    spmi_jpeg *d = (spmi_jpeg *)spmi_alloc_zero(ctx, sizeof *d);
    spm_status status;
    int i, ok;
    memset(image, 0, sizeof *image);
    if (!d) return spmi_fail(ctx, err, SPM_E_MEMORY, "%s: out of memory for the JPEG decoder", name);
    d->ctx = ctx;
    d->name = name;
    d->err = err;
    d->desc = desc;
    d->data = data;
    d->at = data + SPMI_MIN(size, 2);
    d->end = data + size;
    d->image = image;
    d->orientation = 1;
    if (size < 3 || data[0] != 0xff || data[1] != 0xd8 || data[2] != 0xff) {
        ok = SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: not a JPEG file; it does not start with FF D8 FF", name);
    } else {
        ok = spmi_jpeg_read_segments(d);
        if (ok == 2)
            ok = d->ended ? spmi_jpeg_truncated(d)
                          : SPMI_JPEG_FAIL(d, SPM_E_FORMAT, "%s: the JPEG file ends without a picture in it", name);
        else if (ok) ok = spmi_jpeg_decode_scans(d);
    }
    status = d->status;
    for (i = 0; i < 4; i++) {
        spmi_free(ctx, d->component[i].rows);
        spmi_free(ctx, d->component[i].wide);
        spmi_free(ctx, d->component[i].coefficients);
    }
    spmi_free(ctx, d->filter);
    spmi_free(ctx, d->line);
    if (!ok) spm_image_free(ctx, image);
    spmi_free(ctx, d);
    return status;
}

/* ---- encoder: baseline, the tables and the arithmetic of libjpeg ---- */

/* Quantisers of T.81 annex K.1 at quality 50, row-major: luma, chroma. */
static const uint8_t spmi_jpeg_base_quant[2][64] = {
    {16, 11, 10, 16, 24,  40,  51,  61, 12, 12, 14, 19, 26,  58,  60,  55, 14, 13, 16, 24, 40, 57, 69, 56,
     14, 17, 22, 29, 51,  87,  80,  62, 18, 22, 37, 56, 68,  109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
     49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99},
    {17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
     47, 66, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
     99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99}
};

typedef struct spmi_jpeg_writer {
    spm_context *ctx;
    uint8_t *data;
    size_t size, capacity;
    int failed;
    uint64_t bits;               /* the low `count` bits wait to be written */
    int count;
    uint16_t quant[2][64];       /* row-major */
    uint32_t inverse[2][64];     /* 2^32 / (8 quant), rounded up: exact for all quotients that occur */
    uint16_t dc_code[2][12], ac_code[2][256];
    uint8_t dc_length[2][12], ac_length[2][256];
    int dc[3];
} spmi_jpeg_writer;

/* Room for `bytes` more; after a failure writing goes on nowhere. */
static int spmi_jpeg_room(spmi_jpeg_writer *w, size_t bytes)
{
    void *memory = w->data;
    if (w->failed || !spmi_grow(w->ctx, &memory, w->size, &w->capacity, w->size + bytes)) {
        w->failed = 1;
        return 0;
    }
    w->data = (uint8_t *)memory;
    return 1;
}

static void spmi_jpeg_put_byte(spmi_jpeg_writer *w, int value)
{
    w->data[w->size++] = (uint8_t)value;
}

static void spmi_jpeg_put_marker(spmi_jpeg_writer *w, int marker, int length)
{
    spmi_jpeg_put_byte(w, 0xff);
    spmi_jpeg_put_byte(w, marker);
    spmi_jpeg_put_byte(w, length >> 8);
    spmi_jpeg_put_byte(w, length & 255);
}

/* Appends n <= 16 bits; bytes of FF get a zero behind them. */
static inline void spmi_jpeg_put_bits(spmi_jpeg_writer *w, unsigned value, int n)
{
    w->bits = w->bits << n | value;
    w->count += n;
    while (w->count >= 8) {
        uint8_t byte = (uint8_t)(w->bits >> (w->count - 8));
        w->data[w->size++] = byte;
        if (byte == 0xff) w->data[w->size++] = 0;
        w->count -= 8;
    }
}

static void spmi_jpeg_put_table(spmi_jpeg_writer *w, int index, const uint8_t *bits, const uint8_t *values, int count,
                                uint16_t *codes, uint8_t *lengths)
{
    int n, i, next = 0;
    unsigned code = 0;
    spmi_jpeg_put_marker(w, 0xc4, 19 + count);
    spmi_jpeg_put_byte(w, index);
    for (i = 0; i < 16; i++) spmi_jpeg_put_byte(w, bits[i]);
    for (i = 0; i < count; i++) spmi_jpeg_put_byte(w, values[i]);
    for (n = 1; n <= 16; n++, code <<= 1) {
        for (i = 0; i < bits[n - 1]; i++, code++, next++) {
            codes[values[next]] = (uint16_t)code;
            lengths[values[next]] = (uint8_t)n;
        }
    }
}

/* Everything before the first coded bit; also derives the tables that coding uses. */
static void spmi_jpeg_put_header(spmi_jpeg_writer *w, const spm_image *image, int quality, int halved)
{
    static const uint8_t jfif[14] = {'J', 'F', 'I', 'F', 0, 1, 1, 0, 0, 1, 0, 1, 0, 0};
    int t, i, scale = quality < 50 ? 5000 / quality : 200 - 2 * quality;
    spmi_jpeg_put_byte(w, 0xff);
    spmi_jpeg_put_byte(w, 0xd8);
    spmi_jpeg_put_marker(w, 0xe0, 16);
    for (i = 0; i < 14; i++) spmi_jpeg_put_byte(w, jfif[i]);
    for (t = 0; t < 2; t++) {
        spmi_jpeg_put_marker(w, 0xdb, 67);
        spmi_jpeg_put_byte(w, t);
        for (i = 0; i < 64; i++) {
            int v = (spmi_jpeg_base_quant[t][i] * scale + 50) / 100;
            v = SPMI_MIN(SPMI_MAX(v, 1), 255);
            w->quant[t][i] = (uint16_t)v;
            w->inverse[t][i] = (uint32_t)(((uint64_t)1 << 32) / (uint64_t)(8 * v)) + 1;
        }
        for (i = 0; i < 64; i++) spmi_jpeg_put_byte(w, w->quant[t][spmi_jpeg_zigzag[i]]);
    }
    spmi_jpeg_put_marker(w, 0xc0, 17);
    spmi_jpeg_put_byte(w, 8);
    spmi_jpeg_put_byte(w, image->height >> 8);
    spmi_jpeg_put_byte(w, image->height & 255);
    spmi_jpeg_put_byte(w, image->width >> 8);
    spmi_jpeg_put_byte(w, image->width & 255);
    spmi_jpeg_put_byte(w, 3);
    for (i = 0; i < 3; i++) {
        spmi_jpeg_put_byte(w, i + 1);
        spmi_jpeg_put_byte(w, i == 0 && halved ? 0x22 : 0x11);
        spmi_jpeg_put_byte(w, i > 0);
    }
    for (t = 0; t < 2; t++) {
        spmi_jpeg_put_table(w, t, spmi_jpeg_dc_bits[t], spmi_jpeg_dc_values, 12, w->dc_code[t], w->dc_length[t]);
        spmi_jpeg_put_table(w, 0x10 | t, spmi_jpeg_ac_bits[t], spmi_jpeg_ac_values[t], 162, w->ac_code[t], w->ac_length[t]);
    }
    spmi_jpeg_put_marker(w, 0xda, 12);
    spmi_jpeg_put_byte(w, 3);
    for (i = 0; i < 3; i++) {
        spmi_jpeg_put_byte(w, i + 1);
        spmi_jpeg_put_byte(w, i > 0 ? 0x11 : 0);
    }
    spmi_jpeg_put_byte(w, 0);
    spmi_jpeg_put_byte(w, 63);
    spmi_jpeg_put_byte(w, 0);
}

/* One 8-point forward transform, in place, elements `step` apart.  The first pass keeps 2 extra bits, the second drops them. */
static inline void spmi_jpeg_fdct_line(int32_t *x, int step, int first)
{
    int shift = first ? 11 : 15;
    int32_t round = 1 << (shift - 1);
    int32_t s0 = x[0] + x[7 * step], d0 = x[0] - x[7 * step], s1 = x[step] + x[6 * step], d1 = x[step] - x[6 * step];
    int32_t s2 = x[2 * step] + x[5 * step], d2 = x[2 * step] - x[5 * step];
    int32_t s3 = x[3 * step] + x[4 * step], d3 = x[3 * step] - x[4 * step];
    int32_t e0 = s0 + s3, e3 = s0 - s3, e1 = s1 + s2, e2 = s1 - s2, z = (e2 + e3) * 4433;
    int32_t z5 = (d3 + d2 + d1 + d0) * 9633, z3 = (d3 + d1) * -16069 + z5, z4 = (d2 + d0) * -3196 + z5;
    int32_t z1 = (d3 + d0) * -7373, z2 = (d2 + d1) * -20995;
    x[0] = first ? (e0 + e1) * 4 : (e0 + e1 + 2) >> 2;
    x[4 * step] = first ? (e0 - e1) * 4 : (e0 - e1 + 2) >> 2;
    x[2 * step] = (z + e3 * 6270 + round) >> shift;
    x[6 * step] = (z - e2 * 15137 + round) >> shift;
    x[7 * step] = (d3 * 2446 + z1 + z3 + round) >> shift;
    x[5 * step] = (d2 * 16819 + z2 + z4 + round) >> shift;
    x[3 * step] = (d1 * 25172 + z2 + z3 + round) >> shift;
    x[step] = (d0 * 12299 + z1 + z4 + round) >> shift;
}

static int spmi_jpeg_bit_size(int v)
{
    int n = 0;
    for (v = v < 0 ? -v : v; v; v >>= 1) n++;
    return n;
}

/* Codes the DC difference of component i. */
static void spmi_jpeg_put_dc(spmi_jpeg_writer *w, int i, int dc)
{
    int t = i > 0, v = dc - w->dc[i], n = spmi_jpeg_bit_size(v);
    w->dc[i] = dc;
    spmi_jpeg_put_bits(w, w->dc_code[t][n], w->dc_length[t][n]);
    if (n) spmi_jpeg_put_bits(w, (unsigned)(v < 0 ? v - 1 : v) & ((1u << n) - 1), n);
}

/* Transforms, quantises (to nearest, halves away from zero) and codes one block of samples of component i. */
static void spmi_jpeg_put_block(spmi_jpeg_writer *w, int i, const uint8_t *samples, size_t stride)
{
    int32_t x[64];
    int t = i > 0, k, r, run = 0;
    for (r = 0; r < 8; r++)
        for (k = 0; k < 8; k++) x[8 * r + k] = samples[(size_t)r * stride + (size_t)k] - 128;
    for (r = 0; r < 8; r++) spmi_jpeg_fdct_line(x + 8 * r, 1, 1);
    for (k = 0; k < 8; k++) spmi_jpeg_fdct_line(x + k, 8, 0);
    for (k = 0; k < 64; k++) {
        uint32_t size = (uint32_t)(x[k] < 0 ? -x[k] : x[k]) + 4u * w->quant[t][k];
        int32_t v = (int32_t)((uint64_t)size * w->inverse[t][k] >> 32);
        x[k] = x[k] < 0 ? -v : v;
    }
    spmi_jpeg_put_dc(w, i, x[0]);
    for (k = 1; k < 64; k++) {
        int v = x[spmi_jpeg_zigzag[k]], n;
        if (v == 0) {
            run++;
            continue;
        }
        for (; run > 15; run -= 16) spmi_jpeg_put_bits(w, w->ac_code[t][0xf0], w->ac_length[t][0xf0]);
        n = spmi_jpeg_bit_size(v);
        spmi_jpeg_put_bits(w, w->ac_code[t][run << 4 | n], w->ac_length[t][run << 4 | n]);
        spmi_jpeg_put_bits(w, (unsigned)(v < 0 ? v - 1 : v) & ((1u << n) - 1), n);
        run = 0;
    }
    if (run) spmi_jpeg_put_bits(w, w->ac_code[t][0], w->ac_length[t][0]);
}

/* Row y of the picture in YCbCr, the last pixel repeated up to `width`: three rows, `stride` apart. */
static void spmi_jpeg_split_row(const spm_image *image, int y, int width, uint8_t *out, size_t stride)
{
    const uint8_t *p = image->pixels + (size_t)y * 3 * (size_t)image->width;
    int i;
    for (i = 0; i < image->width; i++) {
        int r = p[3 * i], g = p[3 * i + 1], b = p[3 * i + 2];
        out[i] = (uint8_t)((19595 * r + 38470 * g + 7471 * b + 32768) >> 16);
        out[stride + (size_t)i] = (uint8_t)((-11059 * r - 21709 * g + 32768 * b + 8421375) >> 16);
        out[2 * stride + (size_t)i] = (uint8_t)((32768 * r - 27439 * g - 5329 * b + 8421375) >> 16);
    }
    for (i = 0; i < 3; i++)
        memset(out + (size_t)i * stride + image->width, out[(size_t)i * stride + (size_t)image->width - 1], (size_t)(width - image->width));
}

/* Means of 2 x 2 samples; halves are rounded down and up in turn. */
static void spmi_jpeg_halve(const uint8_t *a, const uint8_t *b, int n, uint8_t *out)
{
    int i;
    for (i = 0; i < n; i++) out[i] = (uint8_t)((a[2 * i] + a[2 * i + 1] + b[2 * i] + b[2 * i + 1] + 1 + (i & 1)) >> 2);
}

/* Codes one row of MCUs.  Blocks that hold no pixels at all repeat the DC value before them. */
static void spmi_jpeg_put_mcu_row(spmi_jpeg_writer *w, const spm_image *image, int mcu_row, int halved, uint8_t *rows, size_t stride)
{
    int side = halved ? 16 : 8, mcus = (image->width + side - 1) / side, width = mcus * side, column, x, y, i;
    int real_wide = (image->width + 7) / 8, real_high = (image->height + 7) / 8;
    uint8_t *small = rows + 3 * (size_t)side * stride; /* after the full-size rows of all three: 2 x 8 chroma rows */
    for (y = 0; y < side; y++)
        spmi_jpeg_split_row(image, SPMI_MIN(mcu_row * side + y, image->height - 1), width, rows + (size_t)y * stride, (size_t)side * stride);
    for (i = 1; i < 3 && halved; i++) {
        const uint8_t *in = rows + (size_t)(side * i) * stride;
        int filled = SPMI_MIN(8, (image->height + 1) / 2 - mcu_row * 8);
        for (y = 0; y < 8; y++) {
            uint8_t *out = small + (size_t)(8 * (i - 1) + y) * stride;
            if (y < filled) spmi_jpeg_halve(in + (size_t)(2 * y) * stride, in + (size_t)(2 * y + 1) * stride, mcus * 8, out);
            else memcpy(out, out - stride, stride);
        }
    }
    for (column = 0; column < mcus; column++) {
        if (!spmi_jpeg_room(w, 6 * 512)) return;
        for (y = 0; y < side / 8; y++) {
            for (x = 0; x < side / 8; x++) {
                int at = column * side / 8 + x;
                if (at < real_wide && mcu_row * side / 8 + y < real_high) {
                    spmi_jpeg_put_block(w, 0, rows + (size_t)(8 * y) * stride + (size_t)(8 * at), stride);
                } else {
                    spmi_jpeg_put_dc(w, 0, w->dc[0]);
                    spmi_jpeg_put_bits(w, w->ac_code[0][0], w->ac_length[0][0]);
                }
            }
        }
        for (i = 1; i < 3; i++) {
            const uint8_t *from = halved ? small + (size_t)(8 * (i - 1)) * stride : rows + (size_t)(side * i) * stride;
            spmi_jpeg_put_block(w, i, from + 8 * (size_t)column, stride);
        }
    }
}

SPMDEF spm_status spm_image_encode_jpeg(spm_context *ctx, const spm_image *image, int quality, int chroma_420,
                                        uint8_t **data, size_t *size, spm_error *err)
{
    int side = chroma_420 ? 16 : 8, row;
    spmi_jpeg_writer *w;
    uint8_t *rows;
    size_t stride;
    *data = NULL;
    *size = 0;
    if (quality < 1 || quality > 100) return spmi_fail(ctx, err, SPM_E_ARGUMENT, "JPEG quality %d is out of range; 1 to 100 are possible", quality);
    if (image->width < 1 || image->height < 1 || image->width > 65500 || image->height > 65500)
        return spmi_fail(ctx, err, SPM_E_ARGUMENT, "a picture of %d x %d pixels cannot be a JPEG file; both sides must be 1 to 65500",
                         image->width, image->height);
    stride = ((size_t)image->width + 15) & ~(size_t)15;
    w = (spmi_jpeg_writer *)spmi_alloc_zero(ctx, sizeof *w);
    rows = (uint8_t *)spmi_alloc_array(ctx, 3 * side + 16, stride);
    if (w && rows) {
        w->ctx = ctx;
        if (spmi_jpeg_room(w, 1024)) spmi_jpeg_put_header(w, image, quality, chroma_420);
        for (row = 0; row * side < image->height && !w->failed; row++)
            spmi_jpeg_put_mcu_row(w, image, row, chroma_420, rows, stride);
        if (spmi_jpeg_room(w, 16)) {
            spmi_jpeg_put_bits(w, 0x7f, 7); /* ones up to the next whole byte */
            spmi_jpeg_put_byte(w, 0xff);
            spmi_jpeg_put_byte(w, 0xd9);
        }
    }
    if (w && rows && !w->failed) {
        *data = w->data;
        *size = w->size;
    } else if (w) {
        spmi_free(ctx, w->data);
    }
    row = w && rows && !w->failed;
    spmi_free(ctx, w);
    spmi_free(ctx, rows);
    return row ? SPM_OK : spmi_fail(ctx, err, SPM_E_MEMORY, "out of memory for a JPEG file of %d x %d pixels", image->width, image->height);
}

#undef SPMI_JPEG_CLAMP
#undef SPMI_JPEG_FAIL
#undef SPMI_JPEG_LOOK

/* ================================================================================================================
 * >>PACK  13  file formats: JSON, CSV, safetensors, torch files, tar, idx, npy
 * ============================================================================================================= */

/* ---- numbers as text, whatever the locale's decimal point is ---- */

/* `value` (finite) with `digits` significant digits.  printf writes the locale's decimal point, one byte or several:
 * whatever is no part of a number becomes one '.'. */
static void spmi_number_format(char *out, size_t size, double value, int digits)
{
    char text[64];
    size_t from, to = 0;
    int foreign = 0;
    (void)spmi_format(text, sizeof text, "%.*g", digits, value);
    for (from = 0; text[from] && to + 1 < size; from++) {
        char c = text[from];
        if ((c >= '0' && c <= '9') || c == '-' || c == '+' || c == 'e' || c == '.') {
            out[to++] = c;
            foreign = 0;
        } else if (!foreign) {
            out[to++] = '.';
            foreign = 1;
        }
    }
    out[to] = 0;
}

/* Parses `length` bytes that the caller has checked to be a decimal number with '.' as its point.  strtod wants the
 * locale's point, which is found by printing 0.5. */
static int spmi_number_parse(const char *text, size_t length, double *value)
{
    char buffer[512], half[32];
    size_t used = 0, i, n;
    const char *end;
    char *stop;
    (void)spmi_format(half, sizeof half, "%.1f", 0.5);
    n = strlen(half);
    for (i = 0; i < length; i++) {
        if (used + n + 1 > sizeof buffer) return 0;
        if (text[i] == '.' && n > 2) {
            memcpy(buffer + used, half + 1, n - 2);
            used += n - 2;
        } else {
            buffer[used++] = text[i];
        }
    }
    if (!used) return 0;
    buffer[used] = 0;
    end = buffer + used;
    *value = strtod(buffer, &stop);
    return stop == end;
}

/* Length of the well-formed UTF-8 sequence at `at` (Unicode table 3-7), or 0. */
static int spmi_utf8_length(const char *at, size_t left)
{
    unsigned char a = (unsigned char)at[0], b, low = 0x80, high = 0xBF;
    int length, i;
    if (a < 0x80) return 1;
    if (a < 0xC2 || a > 0xF4) return 0;
    length = a < 0xE0 ? 2 : a < 0xF0 ? 3 : 4;
    if (left < (size_t)length) return 0;
    if (a == 0xE0) low = 0xA0;
    if (a == 0xED) high = 0x9F;
    if (a == 0xF0) low = 0x90;
    if (a == 0xF4) high = 0x8F;
    b = (unsigned char)at[1];
    if (b < low || b > high) return 0;
    for (i = 2; i < length; i++)
        if (((unsigned char)at[i] & 0xC0) != 0x80) return 0;
    return length;
}

/* Writes code point `code` (< 0x110000, no surrogate) as UTF-8; returns the bytes used. */
static int spmi_utf8_put(char *out, uint32_t code)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | (code >> 6));
        out[1] = (char)(0x80 | (code & 63));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | (code >> 12));
        out[1] = (char)(0x80 | ((code >> 6) & 63));
        out[2] = (char)(0x80 | (code & 63));
        return 3;
    }
    out[0] = (char)(0xF0 | (code >> 18));
    out[1] = (char)(0x80 | ((code >> 12) & 63));
    out[2] = (char)(0x80 | ((code >> 6) & 63));
    out[3] = (char)(0x80 | (code & 63));
    return 4;
}

/* ---- JSON writing ---- */

#define SPMI_JSON_DEPTH 64

struct spm_json {
    spmi_text text;
    int depth, wrong;                  /* wrong: brackets or keys do not fit */
    char bracket[SPMI_JSON_DEPTH];     /* the closing bracket of each open level */
    unsigned char filled[SPMI_JSON_DEPTH + 1];
};

SPMDEF spm_json *spm_json_create(spm_context *ctx)
{
    spm_json *json = (spm_json *)spmi_alloc_zero(ctx, sizeof *json);
    if (!json) return NULL;
    json->text = spmi_text_create(ctx);
    return json;
}

SPMDEF void spm_json_destroy(spm_json *json)
{
    spm_context *ctx;
    if (!json) return;
    ctx = json->text.ctx;
    spmi_text_free(&json->text);
    spmi_free(ctx, json);
}

static void spmi_json_quote(spmi_text *text, const char *string)
{
    size_t left = strlen(string), run = 0;
    const char *at = string;
    spmi_text_append(text, "\"", 1);
    while (left > run) {
        unsigned char c = (unsigned char)at[run];
        int length = spmi_utf8_length(at + run, left - run);
        if (c >= 0x20 && c != '"' && c != '\\' && length) {
            run += (size_t)length;
            continue;
        }
        spmi_text_append(text, at, run);
        if (!length) spmi_text_add(text, "\xEF\xBF\xBD");
        else if (c == '"') spmi_text_add(text, "\\\"");
        else if (c == '\\') spmi_text_add(text, "\\\\");
        else if (c == '\n') spmi_text_add(text, "\\n");
        else if (c == '\t') spmi_text_add(text, "\\t");
        else if (c == '\r') spmi_text_add(text, "\\r");
        else spmi_text_addf(text, "\\u%04x", (unsigned)c);
        at += run + 1;
        left -= run + 1;
        run = 0;
    }
    spmi_text_append(text, at, run);
    spmi_text_append(text, "\"", 1);
}

/* What stands before a value: the separator and, inside an object, its key.  0 when nothing may follow. */
static int spmi_json_begin_value(spm_json *json, const char *key)
{
    int in_object;
    if (!json) return 0;
    in_object = json->depth > 0 && json->bracket[json->depth - 1] == '}';
    if (in_object != (key != NULL) || (json->depth == 0 && json->filled[0])) json->wrong = 1;
    if (json->wrong) return 0;
    if (json->filled[json->depth]) spmi_text_append(&json->text, ", ", 2);
    json->filled[json->depth] = 1;
    if (key) {
        spmi_json_quote(&json->text, key);
        spmi_text_append(&json->text, ": ", 2);
    }
    return 1;
}

static void spmi_json_open(spm_json *json, const char *key, char open, char close)
{
    if (!spmi_json_begin_value(json, key)) return;
    if (json->depth == SPMI_JSON_DEPTH) {
        json->wrong = 1;
        return;
    }
    json->bracket[json->depth++] = close;
    json->filled[json->depth] = 0;
    spmi_text_append(&json->text, &open, 1);
}

static void spmi_json_close(spm_json *json, char close)
{
    if (!json) return;
    if (json->depth == 0 || json->bracket[json->depth - 1] != close) json->wrong = 1;
    if (json->wrong) return;
    json->depth--;
    spmi_text_append(&json->text, &close, 1);
}

SPMDEF void spm_json_object_begin(spm_json *json, const char *key)
{
    spmi_json_open(json, key, '{', '}');
}

SPMDEF void spm_json_object_end(spm_json *json)
{
    spmi_json_close(json, '}');
}

SPMDEF void spm_json_array_begin(spm_json *json, const char *key)
{
    spmi_json_open(json, key, '[', ']');
}

SPMDEF void spm_json_array_end(spm_json *json)
{
    spmi_json_close(json, ']');
}

SPMDEF void spm_json_raw(spm_json *json, const char *key, const char *text)
{
    if (spmi_json_begin_value(json, key)) spmi_text_add(&json->text, text);
}

SPMDEF void spm_json_string(spm_json *json, const char *key, const char *value)
{
    if (!value) spm_json_raw(json, key, "null");
    else if (spmi_json_begin_value(json, key)) spmi_json_quote(&json->text, value);
}

SPMDEF void spm_json_int(spm_json *json, const char *key, int64_t value)
{
    char text[32];
    (void)spmi_format(text, sizeof text, "%lld", (long long)value);
    spm_json_raw(json, key, text);
}

SPMDEF void spm_json_number(spm_json *json, const char *key, double value)
{
    char text[64];
    if (!(value >= -DBL_MAX && value <= DBL_MAX)) {
        spm_json_raw(json, key, "null");
        return;
    }
    spmi_number_format(text, sizeof text, value, 9);
    spm_json_raw(json, key, text);
}

SPMDEF void spm_json_bool(spm_json *json, const char *key, int value)
{
    spm_json_raw(json, key, value ? "true" : "false");
}

SPMDEF void spm_json_null(spm_json *json, const char *key)
{
    spm_json_raw(json, key, "null");
}

SPMDEF const char *spm_json_finish(spm_json *json)
{
    if (!json || json->wrong || json->depth || !json->filled[0] || json->text.failed) return NULL;
    return json->text.data;
}

/* ---- JSON reading ---- */

struct spm_json_value {
    const char *key; /* in an object */
    union {
        double number;
        const char *string;
        spm_json_value *items;
    } as;
    int64_t integer; /* of a boolean, of a number that is an int64; elements of a container */
    spm_json_type type;
    int exact;       /* a number whose `integer` is its exact value */
};

/* One allocation holds everything: `room` values and behind them the text, whose strings are decoded in place.  Values
 * whose container is still open grow from the bottom like a stack; when a container closes, its values move to the top
 * as one block that stays there.  A text with k commas and b opening brackets has at most 1 + k + b values, and each
 * stands in exactly one of the two places, so they never meet.  The root ends at the bottom. */
typedef struct spmi_json_parser {
    spm_context *ctx;
    spm_error *err;
    const char *name;
    char *text;
    size_t size, at;
    spm_json_value *values;
    size_t low, high;
    int failed;
} spmi_json_parser;

static void spmi_json_fail(spmi_json_parser *p, size_t at, const char *what)
{
    if (!p->failed)
        (void)spmi_fail(p->ctx, p->err, SPM_E_FORMAT, "%s: JSON, byte %lu: %s", p->name, (unsigned long)at, what);
    p->failed = 1;
}

static void spmi_json_space(spmi_json_parser *p)
{
    while (p->at < p->size) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return;
        p->at++;
    }
}

/* Four hexadecimal digits at `at`, or -1. */
static int32_t spmi_json_hex(const spmi_json_parser *p, size_t at)
{
    int32_t code = 0;
    int i;
    if (p->size - at < 4) return -1;
    for (i = 0; i < 4; i++) {
        char c = p->text[at + (size_t)i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return -1;
        code = code * 16 + digit;
    }
    return code;
}

/* The escape whose backslash is at p->at; decoded bytes go to `out`, which lies at or below it.  Returns their number. */
static int spmi_json_escape(spmi_json_parser *p, char *out)
{
    size_t from = p->at;
    int32_t code, second;
    char c = p->size - from > 1 ? p->text[from + 1] : 0;
    p->at = from + 2;
    switch (c) {
    case '"': case '\\': case '/': out[0] = c; return 1;
    case 'b': out[0] = '\b'; return 1;
    case 'f': out[0] = '\f'; return 1;
    case 'n': out[0] = '\n'; return 1;
    case 'r': out[0] = '\r'; return 1;
    case 't': out[0] = '\t'; return 1;
    case 'u': break;
    default:
        spmi_json_fail(p, from, "unknown escape in a string");
        return 0;
    }
    code = spmi_json_hex(p, p->at);
    if (code < 0) {
        spmi_json_fail(p, from, "\\u wants four hexadecimal digits");
        return 0;
    }
    p->at += 4;
    if (code >= 0xD800 && code < 0xDC00 && p->size - p->at >= 6 && p->text[p->at] == '\\' && p->text[p->at + 1] == 'u') {
        second = spmi_json_hex(p, p->at + 2);
        if (second >= 0xDC00 && second < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (second - 0xDC00);
            p->at += 6;
        }
    }
    if (code == 0) {
        spmi_json_fail(p, from, "a NUL character inside a string is not supported");
        return 0;
    }
    if (code >= 0xD800 && code < 0xE000) code = 0xFFFD; /* a lone surrogate */
    return spmi_utf8_put(out, (uint32_t)code);
}

/* A string whose opening quote is at p->at, decoded in place and terminated; NULL on failure. */
static const char *spmi_json_text(spmi_json_parser *p)
{
    size_t start = p->at + 1, out = start;
    p->at = start;
    while (p->at < p->size) {
        unsigned char c = (unsigned char)p->text[p->at];
        int length = spmi_utf8_length(p->text + p->at, p->size - p->at);
        if (c == '"') {
            p->text[out] = 0;
            p->at++;
            return p->text + start;
        }
        if (c == '\\') {
            out += (size_t)spmi_json_escape(p, p->text + out);
            if (p->failed) return NULL;
        } else if (c < 0x20 || !length) {
            spmi_json_fail(p, p->at, c < 0x20 ? "control character inside a string" : "not valid UTF-8");
            return NULL;
        } else {
            memmove(p->text + out, p->text + p->at, (size_t)length);
            out += (size_t)length;
            p->at += (size_t)length;
        }
    }
    spmi_json_fail(p, start - 1, "this string has no closing quote");
    return NULL;
}

/* Steps over digits; 0 if there are none. */
static int spmi_json_digits(spmi_json_parser *p)
{
    size_t start = p->at;
    while (p->at < p->size && p->text[p->at] >= '0' && p->text[p->at] <= '9') p->at++;
    return p->at > start;
}

static void spmi_json_read_number(spmi_json_parser *p, spm_json_value *value)
{
    size_t start = p->at, digits;
    int negative = p->text[start] == '-', ok, whole = 1;
    if (negative) p->at++;
    digits = p->at;
    ok = spmi_json_digits(p) && (p->text[digits] != '0' || p->at == digits + 1);
    if (ok && p->at < p->size && p->text[p->at] == '.') {
        p->at++;
        whole = 0;
        ok = spmi_json_digits(p);
    }
    if (ok && p->at < p->size && (p->text[p->at] == 'e' || p->text[p->at] == 'E')) {
        p->at++;
        whole = 0;
        if (p->at < p->size && (p->text[p->at] == '+' || p->text[p->at] == '-')) p->at++;
        ok = spmi_json_digits(p);
    }
    if (!ok || !spmi_number_parse(p->text + start, p->at - start, &value->as.number)) {
        spmi_json_fail(p, start, "malformed number");
        return;
    }
    value->type = SPM_JSON_NUMBER;
    if (whole && p->at - digits <= 19) {
        uint64_t magnitude = 0;
        size_t i;
        for (i = digits; i < p->at; i++) magnitude = magnitude * 10 + (uint64_t)(p->text[i] - '0');
        if (magnitude <= (uint64_t)INT64_MAX) {
            value->integer = negative ? -(int64_t)magnitude : (int64_t)magnitude;
            value->exact = 1;
        }
    }
}

static int spmi_json_word(spmi_json_parser *p, const char *word)
{
    size_t n = strlen(word);
    if (p->size - p->at < n || memcmp(p->text + p->at, word, n) != 0) return 0;
    p->at += n;
    return 1;
}

/* Parses one value into the bottom stack.  Recursion is bounded by SPMI_JSON_DEPTH. */
static void spmi_json_read(spmi_json_parser *p, const char *key, int depth)
{
    spm_json_value *value = &p->values[p->low];
    size_t first, count;
    char c, close;
    memset(value, 0, sizeof *value);
    value->key = key;
    p->low++;
    spmi_json_space(p);
    c = p->at < p->size ? p->text[p->at] : 0;
    if (c == '"') {
        value->type = SPM_JSON_STRING;
        value->as.string = spmi_json_text(p);
        return;
    }
    if (c == '-' || (c >= '0' && c <= '9')) {
        spmi_json_read_number(p, value);
        return;
    }
    if (c != '{' && c != '[') {
        if (spmi_json_word(p, "null")) value->type = SPM_JSON_NULL;
        else if (spmi_json_word(p, "true") || spmi_json_word(p, "false")) {
            value->type = SPM_JSON_BOOL;
            value->integer = c == 't';
        } else spmi_json_fail(p, p->at, p->at < p->size ? "a value is expected here" : "the text ends too early");
        return;
    }
    if (depth == SPMI_JSON_DEPTH) {
        spmi_json_fail(p, p->at, "nested more than 64 levels deep");
        return;
    }
    close = c == '{' ? '}' : ']';
    value->type = c == '{' ? SPM_JSON_OBJECT : SPM_JSON_ARRAY;
    first = p->low;
    p->at++;
    spmi_json_space(p);
    if (p->at < p->size && p->text[p->at] == close) {
        p->at++;
        return;
    }
    for (;;) {
        const char *member = NULL;
        if (c == '{') {
            spmi_json_space(p);
            if (p->at >= p->size || p->text[p->at] != '"') {
                spmi_json_fail(p, p->at, "a member name in quotes is expected here");
                return;
            }
            member = spmi_json_text(p);
            if (!member) return;
            spmi_json_space(p);
            if (p->at >= p->size || p->text[p->at] != ':') {
                spmi_json_fail(p, p->at, "a colon is expected here");
                return;
            }
            p->at++;
        }
        spmi_json_read(p, member, depth + 1);
        if (p->failed) return;
        spmi_json_space(p);
        if (p->at < p->size && p->text[p->at] == close) break;
        if (p->at >= p->size || p->text[p->at] != ',') {
            spmi_json_fail(p, p->at, c == '{' ? "a comma or } is expected here" : "a comma or ] is expected here");
            return;
        }
        p->at++;
    }
    p->at++;
    count = p->low - first;
    memmove(p->values + p->high - count, p->values + first, count * sizeof *value);
    p->high -= count;
    p->low = first;
    value->as.items = p->values + p->high;
    value->integer = (int64_t)count;
}

/* spm_json_parse with a cap on the number of values, so that a hostile text cannot claim more memory than is sensible. */
static spm_json_value *spmi_json_parse_limited(spm_context *ctx, const char *name, const char *text, size_t size,
                                               size_t most, spm_error *err)
{
    spmi_json_parser p = SPM_ZERO;
    size_t room = 1, bytes, total, i;
    int quoted = 0;
    if (size >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) { /* a byte-order mark */
        text += 3;
        size -= 3;
    }
    for (i = 0; i < size; i++) {
        char c = text[i];
        if (quoted && c == '\\') i++;
        else if (c == '"') quoted = !quoted;
        else if (!quoted && (c == ',' || c == '[' || c == '{')) room++;
    }
    if (room > most) {
        (void)spmi_fail(ctx, err, SPM_E_FORMAT, "%s: JSON with more than %lu values in %lu bytes; the file is damaged", name,
                        (unsigned long)most, (unsigned long)size);
        return NULL;
    }
    if (!spmi_mul_size(room, sizeof(spm_json_value), &bytes) || !spmi_add_size(bytes, size, &total)
        || !spmi_add_size(total, 1, &total) || (p.values = (spm_json_value *)spmi_alloc(ctx, total)) == NULL) {
        (void)spmi_fail(ctx, err, SPM_E_MEMORY, "%s: out of memory for %lu JSON values", name, (unsigned long)room);
        return NULL;
    }
    p.ctx = ctx;
    p.err = err;
    p.name = name;
    p.text = (char *)p.values + bytes;
    p.size = size;
    p.high = room;
    if (size) memcpy(p.text, text, size);
    p.text[size] = 0;
    spmi_json_read(&p, NULL, 0);
    spmi_json_space(&p);
    if (!p.failed && p.at < size) spmi_json_fail(&p, p.at, "there is more text behind the value");
    if (p.failed) {
        spmi_free(ctx, p.values);
        return NULL;
    }
    return p.values;
}

SPMDEF spm_json_value *spm_json_parse(spm_context *ctx, const char *name, const char *text, size_t size, spm_error *err)
{
    return spmi_json_parse_limited(ctx, name, text, size, SIZE_MAX, err);
}

SPMDEF void spm_json_free(spm_context *ctx, spm_json_value *root)
{
    spmi_free(ctx, root);
}

SPMDEF spm_json_type spm_json_type_of(const spm_json_value *value)
{
    return value ? value->type : SPM_JSON_NULL;
}

SPMDEF int64_t spm_json_length(const spm_json_value *value)
{
    return value && (value->type == SPM_JSON_ARRAY || value->type == SPM_JSON_OBJECT) ? value->integer : 0;
}

SPMDEF const spm_json_value *spm_json_at(const spm_json_value *value, int64_t index)
{
    return index >= 0 && index < spm_json_length(value) ? &value->as.items[index] : NULL;
}

SPMDEF const char *spm_json_key_at(const spm_json_value *object, int64_t index)
{
    const spm_json_value *member = spm_json_at(object, index);
    return member ? member->key : NULL;
}

SPMDEF const spm_json_value *spm_json_get(const spm_json_value *object, const char *key)
{
    int64_t i;
    if (spm_json_type_of(object) != SPM_JSON_OBJECT) return NULL;
    for (i = object->integer - 1; i >= 0; i--)
        if (spmi_string_equal(object->as.items[i].key, key)) return &object->as.items[i];
    return NULL;
}

SPMDEF double spm_json_as_number(const spm_json_value *value, double otherwise)
{
    return spm_json_type_of(value) == SPM_JSON_NUMBER ? value->as.number : otherwise;
}

SPMDEF int64_t spm_json_as_int(const spm_json_value *value, int64_t otherwise)
{
    double number;
    if (spm_json_type_of(value) == SPM_JSON_BOOL) return value->integer;
    if (spm_json_type_of(value) != SPM_JSON_NUMBER) return otherwise;
    if (value->exact) return value->integer;
    number = value->as.number;
    if (!(number > -9.2e18 && number < 9.2e18)) return otherwise;
    return (double)(int64_t)number >= number && (double)(int64_t)number <= number ? (int64_t)number : otherwise;
}

SPMDEF const char *spm_json_as_string(const spm_json_value *value, const char *otherwise)
{
    return spm_json_type_of(value) == SPM_JSON_STRING ? value->as.string : otherwise;
}
#undef SPMI_JSON_DEPTH

/* ---- CSV ---- */

struct spm_csv {
    spm_context *ctx;
    const char *name;
    char *text;      /* the caller's text; fields are decoded in place and terminated */
    char **fields;   /* header first, then row after row, `columns` each */
    int64_t *lines;  /* of each row, the header included */
    size_t fields_used, fields_room, lines_used, lines_room; /* used: elements, room: bytes */
    size_t columns;
    int64_t rows;    /* with the header */
};

SPMDEF void spm_csv_destroy(spm_csv *csv)
{
    if (!csv) return;
    spmi_free(csv->ctx, csv->text);
    spmi_free(csv->ctx, csv->fields);
    spmi_free(csv->ctx, csv->lines);
    spmi_free(csv->ctx, csv);
}

static int spmi_csv_add_field(spm_csv *csv, char *field)
{
    void *memory = csv->fields;
    size_t size = sizeof(char *);
    if (!spmi_grow(csv->ctx, &memory, csv->fields_used * size, &csv->fields_room, (csv->fields_used + 1) * size)) return 0;
    csv->fields = (char **)memory;
    csv->fields[csv->fields_used++] = field;
    return 1;
}

static int spmi_csv_add_line(spm_csv *csv, int64_t line)
{
    void *memory = csv->lines;
    size_t size = sizeof(int64_t);
    if (!spmi_grow(csv->ctx, &memory, csv->lines_used * size, &csv->lines_room, (csv->lines_used + 1) * size)) return 0;
    csv->lines = (int64_t *)memory;
    csv->lines[csv->lines_used++] = line;
    return 1;
}

/* One row is complete: its number of fields must be the header's.  In white-space tables a header may lack the name of
 * the first column (CelebA's list_attr_celeba.txt): it is then called "". */
static spm_status spmi_csv_end_row(spm_csv *csv, char separator, int64_t line, char *empty, spm_error *err)
{
    size_t count = csv->fields_used - (size_t)csv->rows * csv->columns;
    if (csv->rows == 0) csv->columns = count;
    else if (csv->rows == 1 && separator == ' ' && count == csv->columns + 1) {
        if (!spmi_csv_add_field(csv, NULL)) return spmi_fail_memory(csv->ctx, err, csv->name);
        memmove(csv->fields + 1, csv->fields, (csv->fields_used - 1) * sizeof(char *));
        csv->fields[0] = empty;
        csv->columns++;
    } else if (count != csv->columns) {
        return spmi_fail(csv->ctx, err, SPM_E_FORMAT, "%s: line %lld has %lu fields, but the header has %lu columns", csv->name,
                         (long long)line, (unsigned long)count, (unsigned long)csv->columns);
    }
    csv->rows++;
    return spmi_csv_add_line(csv, line) ? SPM_OK : spmi_fail_memory(csv->ctx, err, csv->name);
}

static int spmi_csv_blank(char c)
{
    return c == ' ' || c == '\t';
}

/* Decodes the quoted field whose opening quote is at *at: doubled quotes become one.  *at ends behind the closing quote,
 * *out behind the decoded text. */
static spm_status spmi_csv_quoted(spm_csv *csv, size_t size, size_t *at, size_t *out, int64_t *line, spm_error *err)
{
    char *text = csv->text;
    size_t i = *at + 1, o = *at;
    int64_t start = *line;
    for (;;) {
        if (i >= size)
            return spmi_fail(csv->ctx, err, SPM_E_FORMAT, "%s: line %lld: a quoted field is never closed", csv->name, (long long)start);
        if (text[i] == '"') {
            if (i + 1 >= size || text[i + 1] != '"') break;
            i++;
        } else if (text[i] == '\n' || (text[i] == '\r' && text[i + 1] != '\n')) {
            (*line)++;
        }
        text[o++] = text[i++];
    }
    *at = i + 1;
    *out = o;
    return SPM_OK;
}

static spm_status spmi_csv_read(spm_csv *csv, size_t size, char separator, spm_error *err)
{
    char *text = csv->text;
    size_t at = 0;
    int64_t line = 1;
    if (size >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) at = 3;
    while (at < size) {
        int64_t first_line = line;
        int open = 1;
        if (separator == ' ')
            while (at < size && spmi_csv_blank(text[at])) at++;
        if (at < size && (text[at] == '\n' || text[at] == '\r')) { /* an empty line */
            at += text[at] == '\r' && text[at + 1] == '\n' ? 2 : 1;
            line++;
            continue;
        }
        if (at >= size) break;
        while (open) {
            size_t start = at, out;
            char stop;
            if (at < size && text[at] == '"') {
                spm_status status = spmi_csv_quoted(csv, size, &at, &out, &line, err);
                if (status) return status;
            } else {
                while (at < size && text[at] != '\n' && text[at] != '\r' && text[at] != separator
                       && !(separator == ' ' && text[at] == '\t')) at++;
                out = at;
            }
            if (!spmi_csv_add_field(csv, text + start)) return spmi_fail_memory(csv->ctx, err, csv->name);
            if (separator == ' ')
                while (at < size && spmi_csv_blank(text[at])) at++;
            stop = at < size ? text[at] : '\n';
            if (stop == '\n' || stop == '\r') {
                at += stop == '\r' && text[at + 1] == '\n' ? 2 : 1;
                line++;
                open = 0;
            } else if (stop == separator) {
                at++;
            } else if (separator != ' ') {
                return spmi_fail(csv->ctx, err, SPM_E_FORMAT, "%s: line %lld: there is text behind the closing quote of a field",
                                 csv->name, (long long)line);
            }
            text[out] = 0; /* last: it may overwrite the separator or the end of the line */
        }
        {
            spm_status status = spmi_csv_end_row(csv, separator, first_line, text + size, err);
            if (status) return status;
        }
    }
    if (!csv->rows)
        return spmi_fail(csv->ctx, err, SPM_E_FORMAT, "%s: is empty; a header row with the column names is expected", csv->name);
    return SPM_OK;
}

SPMDEF spm_csv *spm_csv_parse(spm_context *ctx, const char *name, const char *text, size_t size, char separator, spm_error *err)
{
    spm_csv *csv;
    const void *nul = size ? memchr(text, 0, size) : NULL;
    if (nul) {
        (void)spmi_fail(ctx, err, SPM_E_FORMAT, "%s: byte %lu is 0; this is not a text file", name,
                        (unsigned long)((const char *)nul - text));
        return NULL;
    }
    csv = (spm_csv *)spmi_alloc_zero(ctx, sizeof *csv);
    if (!csv || size > SIZE_MAX / 64 || (csv->text = spmi_string_copy(ctx, text, size)) == NULL) {
        spmi_free(ctx, csv);
        (void)spmi_fail_memory(ctx, err, name);
        return NULL;
    }
    csv->ctx = ctx;
    csv->name = name;
    if (spmi_csv_read(csv, size, separator ? separator : ',', err)) {
        spm_csv_destroy(csv);
        return NULL;
    }
    csv->name = NULL; /* the caller's, not ours to keep */
    return csv;
}

SPMDEF int64_t spm_csv_rows(const spm_csv *csv)
{
    return csv->rows - 1;
}

SPMDEF int spm_csv_columns(const spm_csv *csv)
{
    return (int)csv->columns;
}

SPMDEF const char *spm_csv_header(const spm_csv *csv, int column)
{
    return column >= 0 && (size_t)column < csv->columns ? csv->fields[column] : NULL;
}

SPMDEF int spm_csv_column(const spm_csv *csv, const char *name)
{
    size_t i;
    for (i = 0; i < csv->columns; i++)
        if (spmi_string_equal(csv->fields[i], name)) return (int)i;
    return -1;
}

SPMDEF const char *spm_csv_field(const spm_csv *csv, int64_t row, int column)
{
    if (row < 0 || row >= csv->rows - 1 || column < 0 || (size_t)column >= csv->columns) return NULL;
    return csv->fields[(size_t)(row + 1) * csv->columns + (size_t)column];
}

SPMDEF int64_t spm_csv_line(const spm_csv *csv, int64_t row)
{
    return row >= -1 && row < csv->rows - 1 ? csv->lines[row + 1] : 0;
}

/* ---- what the readers of archives and tar files share ---- */

static uint16_t spmi_pack_u16(const uint8_t *at)
{
    return (uint16_t)(at[0] | (unsigned)at[1] << 8);
}

static uint32_t spmi_pack_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint64_t spmi_pack_u64(const uint8_t *at)
{
    return (uint64_t)spmi_pack_u32(at) | (uint64_t)spmi_pack_u32(at + 4) << 32;
}

/* Writes the lowest `bytes` bytes of `value`, the lowest first. */
static void spmi_pack_put(uint8_t *at, uint64_t value, int bytes)
{
    int i;
    for (i = 0; i < bytes; i++) at[i] = (uint8_t)(value >> (8 * i));
}

static int spmi_host_little(void)
{
    const uint16_t probe = 1;
    uint8_t first;
    memcpy(&first, &probe, 1);
    return first == 1;
}

/* Bytes that can be read at any place from any thread: a file, or the caller's memory. */
typedef struct spmi_source {
    spm_context *ctx;
    char *name;
    const uint8_t *memory; /* NULL: a file */
    uint64_t size;
#if SPMI_POSIX
    int descriptor;
#else
    FILE *file;
    spmi_lock lock;
#endif
} spmi_source;

static void spmi_source_close(spmi_source *source)
{
    if (source->name && !source->memory) {
#if SPMI_POSIX
        if (source->descriptor >= 0) (void)close(source->descriptor);
#else
        if (source->file) fclose(source->file);
        spmi_lock_free(&source->lock);
#endif
    }
    spmi_free(source->ctx, source->name);
    source->name = NULL;
}

static spm_status spmi_source_memory(spmi_source *source, spm_context *ctx, const char *name, const void *data, size_t size,
                                     spm_error *err)
{
    memset(source, 0, sizeof *source);
    source->ctx = ctx;
    source->memory = data ? (const uint8_t *)data : (const uint8_t *)"";
    source->size = data ? size : 0;
    source->name = spmi_string_copy(ctx, name, strlen(name));
    return source->name ? SPM_OK : spmi_fail_memory(ctx, err, name);
}

#if SPMI_POSIX
static spm_status spmi_source_open(spmi_source *source, spm_context *ctx, const char *path, spm_error *err)
{
    struct stat info;
    memset(source, 0, sizeof *source);
    source->ctx = ctx;
    source->descriptor = open(path, O_RDONLY);
    if (source->descriptor < 0)
        return spmi_fail(ctx, err, SPM_E_IO, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(source->descriptor, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < 0) {
        (void)close(source->descriptor);
        return spmi_fail(ctx, err, SPM_E_IO, "%s: is not a regular file", path);
    }
    source->size = (uint64_t)info.st_size;
    source->name = spmi_string_copy(ctx, path, strlen(path));
    if (!source->name) {
        (void)close(source->descriptor);
        return spmi_fail_memory(ctx, err, path);
    }
    return SPM_OK;
}
#else
static int spmi_source_seek(FILE *file, uint64_t offset, int whence)
{
#if defined(_WIN32)
    return offset <= (uint64_t)INT64_MAX && _fseeki64(file, (int64_t)offset, whence) == 0;
#else
    return offset <= (uint64_t)LONG_MAX && fseek(file, (long)offset, whence) == 0;
#endif
}

static spm_status spmi_source_open(spmi_source *source, spm_context *ctx, const char *path, spm_error *err)
{
    int64_t end = -1;
    memset(source, 0, sizeof *source);
    source->ctx = ctx;
    if (spmi_path_kind(path) == 2) return spmi_fail(ctx, err, SPM_E_IO, "%s: is not a regular file", path);
    source->file = fopen(path, "rb");
    if (!source->file) return spmi_fail(ctx, err, SPM_E_IO, "%s: cannot be opened: %s", path, strerror(errno));
    if (spmi_source_seek(source->file, 0, SEEK_END)) {
#if defined(_WIN32)
        end = _ftelli64(source->file);
#else
        end = ftell(source->file);
#endif
    }
    source->name = end < 0 ? NULL : spmi_string_copy(ctx, path, strlen(path));
    if (!source->name) {
        fclose(source->file);
        return end < 0 ? spmi_fail(ctx, err, SPM_E_IO, "%s: its size cannot be found", path) : spmi_fail_memory(ctx, err, path);
    }
    source->size = (uint64_t)end;
    spmi_lock_init(&source->lock);
    return SPM_OK;
}
#endif

/* Reads exactly `bytes` bytes at `offset`, or fails. */
static spm_status spmi_source_read(spmi_source *source, uint64_t offset, void *out, size_t bytes, spm_error *err)
{
    size_t done = 0;
    int reason = 0;
    if (offset > source->size || bytes > source->size - offset)
        return spmi_fail(source->ctx, err, SPM_E_FORMAT, "%s: %lu bytes are wanted at offset %llu, but the file ends at %llu",
                         source->name, (unsigned long)bytes, (unsigned long long)offset, (unsigned long long)source->size);
    if (source->memory) {
        if (bytes) memcpy(out, source->memory + (size_t)offset, bytes);
        return SPM_OK;
    }
#if SPMI_POSIX
    while (done < bytes) {
        size_t wanted = SPMI_MIN(bytes - done, (size_t)1 << 30);
        ssize_t got = pread(source->descriptor, (uint8_t *)out + done, wanted, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            reason = got < 0 ? errno : 0;
            break;
        }
        done += (size_t)got;
    }
#else
    spmi_lock_enter(&source->lock);
    errno = 0;
    if (spmi_source_seek(source->file, offset, SEEK_SET)) done = fread(out, 1, bytes, source->file);
    reason = errno;
    spmi_lock_leave(&source->lock);
#endif
    if (done == bytes) return SPM_OK;
    return spmi_fail(source->ctx, err, SPM_E_IO, "%s: reading %lu bytes at offset %llu failed: %s", source->name,
                     (unsigned long)bytes, (unsigned long long)offset, reason ? strerror(reason) : "the file was cut while it was read");
}

/* CRC-32 of zip (polynomial 0xEDB88320, reflected), sixteen bytes a step (after Kounavis and Berry 2005).  The tables
 * are made where they are needed: the library has no mutable globals. */
typedef struct spmi_crc {
    uint32_t table[16][256];
} spmi_crc;

static void spmi_crc_init(spmi_crc *crc)
{
    uint32_t i, j;
    for (i = 0; i < 256; i++) {
        uint32_t c = i;
        for (j = 0; j < 8; j++) c = (c >> 1) ^ (0xEDB88320u & (0u - (c & 1)));
        crc->table[0][i] = c;
    }
    for (i = 0; i < 256; i++)
        for (j = 1; j < 16; j++)
            crc->table[j][i] = (crc->table[j - 1][i] >> 8) ^ crc->table[0][crc->table[j - 1][i] & 255];
}

/* Four bytes through the tables `row` to `row` - 3. */
static uint32_t spmi_crc_word(const spmi_crc *crc, uint32_t word, int row)
{
    return crc->table[row][word & 255] ^ crc->table[row - 1][(word >> 8) & 255] ^ crc->table[row - 2][(word >> 16) & 255]
           ^ crc->table[row - 3][word >> 24];
}

/* Continues `value` (0 at the start) over `bytes` bytes. */
static uint32_t spmi_crc_add(const spmi_crc *crc, uint32_t value, const void *data, size_t bytes)
{
    const uint8_t *at = (const uint8_t *)data;
    uint32_t c = ~value;
    while (bytes >= 16) {
        c = spmi_crc_word(crc, c ^ spmi_pack_u32(at), 15) ^ spmi_crc_word(crc, spmi_pack_u32(at + 4), 11)
            ^ spmi_crc_word(crc, spmi_pack_u32(at + 8), 7) ^ spmi_crc_word(crc, spmi_pack_u32(at + 12), 3);
        at += 16;
        bytes -= 16;
    }
    while (bytes--) c = (c >> 8) ^ crc->table[0][(c ^ *at++) & 255];
    return ~c;
}

/* A hash table over records whose first member is their name; `slots` hold index + 1. */
typedef struct spmi_names {
    const char *records;
    int64_t *slots;
    size_t stride, mask;
} spmi_names;

static const char *spmi_names_at(const spmi_names *names, int64_t index)
{
    const char *name;
    memcpy(&name, names->records + (size_t)index * names->stride, sizeof name);
    return name;
}

/* The slot of `name`, or the empty one where it belongs (FNV-1a, linear probing). */
static size_t spmi_names_slot(const spmi_names *names, const char *name)
{
    uint64_t hash = 0xCBF29CE484222325u;
    const char *c;
    size_t slot;
    for (c = name; *c; c++) hash = (hash ^ (uint8_t)*c) * 0x100000001B3u;
    slot = (size_t)(hash ^ hash >> 32) & names->mask;
    while (names->slots[slot] && !spmi_string_equal(spmi_names_at(names, names->slots[slot] - 1), name))
        slot = (slot + 1) & names->mask;
    return slot;
}

/* Indexes `count` records; of equal names the last one wins, and *repeated (if not NULL) is the later of a pair or -1. */
static int spmi_names_build(spm_context *ctx, spmi_names *names, const void *records, size_t stride, int64_t count,
                            int64_t *repeated)
{
    size_t room = 16;
    int64_t i;
    while (room / 2 < (size_t)count) {
        if (room > SIZE_MAX / 2) return 0;
        room *= 2;
    }
    names->records = (const char *)records;
    names->stride = stride;
    names->mask = room - 1;
    names->slots = (int64_t *)spmi_alloc_array(ctx, (int64_t)room, sizeof(int64_t));
    if (!names->slots) return 0;
    if (repeated) *repeated = -1;
    for (i = 0; i < count; i++) {
        size_t slot = spmi_names_slot(names, spmi_names_at(names, i));
        if (names->slots[slot] && repeated) *repeated = i;
        names->slots[slot] = i + 1;
    }
    return 1;
}

static int64_t spmi_names_find(const spmi_names *names, const char *name)
{
    return names->slots[spmi_names_slot(names, name)] - 1;
}

/* ---- archives: what all formats share, and safetensors ---- */

typedef enum spmi_archive_format { SPMI_SAFETENSORS, SPMI_TORCH_ZIP, SPMI_TORCH_LEGACY } spmi_archive_format;

/* One storage of a torch file: bytes [offset, offset + size); safetensors has one per tensor. */
typedef struct spmi_storage {
    uint64_t offset, size;
    uint32_t crc;
    int check; /* 1: `crc` has to be checked before values are handed out */
} spmi_storage;

struct spm_archive {
    spm_context *ctx;
    spmi_source source;
    spm_archive_tensor *tensors;
    int64_t *storage_of;      /* of each tensor; NULL in safetensors */
    int64_t count;
    spmi_storage *storages;
    spmi_names names;
    spm_json_value *header;   /* safetensors: names and metadata live in it */
    char *text;               /* torch: the names */
    uint8_t *buffer;          /* SPMI_ARCHIVE_BUFFER bytes */
    spmi_crc crc;
    spmi_archive_format format;
};

#define SPMI_ARCHIVE_BUFFER 65536
#define SPMI_SAFETENSORS_HEADER_MAX 100000000u /* the limit of the reference reader */

static int spmi_dtype_size(spm_dtype dtype)
{
    switch (dtype) {
    case SPM_F64: case SPM_I64: return 8;
    case SPM_F32: case SPM_I32: return 4;
    case SPM_F16: case SPM_BF16: case SPM_I16: return 2;
    case SPM_I8: case SPM_U8: case SPM_BOOL: return 1;
    case SPM_DTYPE_NONE: break;
    }
    return 0;
}

/* The names of safetensors. */
SPMDEF const char *spm_dtype_name(spm_dtype dtype)
{
    switch (dtype) {
    case SPM_F32: return "F32";
    case SPM_F64: return "F64";
    case SPM_F16: return "F16";
    case SPM_BF16: return "BF16";
    case SPM_I64: return "I64";
    case SPM_I32: return "I32";
    case SPM_I16: return "I16";
    case SPM_I8: return "I8";
    case SPM_U8: return "U8";
    case SPM_BOOL: return "BOOL";
    case SPM_DTYPE_NONE: break;
    }
    return "none";
}

static const char *spmi_torch_storage_name(spm_dtype dtype)
{
    switch (dtype) {
    case SPM_F32: return "FloatStorage";
    case SPM_F64: return "DoubleStorage";
    case SPM_F16: return "HalfStorage";
    case SPM_BF16: return "BFloat16Storage";
    case SPM_I64: return "LongStorage";
    case SPM_I32: return "IntStorage";
    case SPM_I16: return "ShortStorage";
    case SPM_I8: return "CharStorage";
    case SPM_U8: return "ByteStorage";
    case SPM_BOOL: return "BoolStorage";
    case SPM_DTYPE_NONE: break;
    }
    return "";
}

static spm_dtype spmi_dtype_parse(const char *name)
{
    static const spm_dtype all[] = { SPM_F32, SPM_F64, SPM_F16, SPM_BF16, SPM_I64, SPM_I32, SPM_I16, SPM_I8, SPM_U8, SPM_BOOL };
    int i;
    for (i = 0; i < SPMI_COUNT(all); i++)
        if (spmi_string_equal(spm_dtype_name(all[i]), name)) return all[i];
    return SPM_DTYPE_NONE;
}

/* Row-major strides and the number of elements; 0 when that does not fit. */
static int spmi_archive_row_major(spm_archive_tensor *tensor)
{
    int axis;
    int64_t count = 1;
    for (axis = tensor->rank - 1; axis >= 0; axis--) {
        tensor->stride[axis] = count;
        if (!spmi_mul_dim(count, tensor->shape[axis], &count)) return 0;
        if (count == 0) break;
    }
    for (; axis >= 0; axis--) tensor->stride[axis] = 0;
    tensor->count = count;
    return 1;
}

static spm_status spmi_archive_check_crc(spm_archive *archive, const spm_archive_tensor *tensor, spmi_storage *storage,
                                         uint32_t crc, spm_error *err)
{
    if (crc != storage->crc)
        return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: %.100s: the CRC of its bytes at offset %llu does not match; the file is damaged",
                         archive->source.name, tensor->name, (unsigned long long)storage->offset);
    storage->check = 0;
    return SPM_OK;
}

/* One member of a safetensors header: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}. */
static spm_status spmi_safetensors_tensor(spm_archive *archive, const char *name, const spm_json_value *value, uint64_t data,
                                          spm_archive_tensor *tensor, spm_error *err)
{
    const spm_json_value *shape = spm_json_get(value, "shape"), *offsets = spm_json_get(value, "data_offsets");
    const char *dtype = spm_json_as_string(spm_json_get(value, "dtype"), NULL), *file = archive->source.name;
    int64_t begin = spm_json_as_int(spm_json_at(offsets, 0), -1), end = spm_json_as_int(spm_json_at(offsets, 1), -1), bytes;
    int axis;
    tensor->name = name;
    if (!dtype || spm_json_type_of(shape) != SPM_JSON_ARRAY || spm_json_length(offsets) != 2)
        return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: %.100s: its header entry lacks dtype, shape or data_offsets", file, name);
    tensor->dtype = spmi_dtype_parse(dtype);
    if (tensor->dtype == SPM_DTYPE_NONE)
        return spmi_fail(archive->ctx, err, SPM_E_UNSUPPORTED, "%s: %.100s: the number type %.20s is not supported; convert it to F32",
                         file, name, dtype);
    if (spm_json_length(shape) > SPM_ARCHIVE_MAX_RANK)
        return spmi_fail(archive->ctx, err, SPM_E_UNSUPPORTED, "%s: %.100s: has %lld axes, at most %d are supported", file, name,
                         (long long)spm_json_length(shape), SPM_ARCHIVE_MAX_RANK);
    tensor->rank = (int)spm_json_length(shape);
    for (axis = 0; axis < tensor->rank; axis++) {
        tensor->shape[axis] = spm_json_as_int(spm_json_at(shape, axis), -1);
        if (tensor->shape[axis] < 0)
            return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: %.100s: axis %d of its shape is not a size", file, name, axis);
    }
    if (!spmi_archive_row_major(tensor) || !spmi_mul_dim(tensor->count, spmi_dtype_size(tensor->dtype), &bytes)
        || begin < 0 || end < begin || end - begin != bytes)
        return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: %.100s: its data_offsets [%lld, %lld] do not fit its shape and dtype",
                         file, name, (long long)begin, (long long)end);
    if ((uint64_t)end > archive->source.size - data)
        return spmi_fail(archive->ctx, err, SPM_E_FORMAT,
                         "%s: %.100s: its data end at byte %llu, but the file ends at byte %llu; it was cut short or damaged", file,
                         name, (unsigned long long)end + data, (unsigned long long)archive->source.size);
    tensor->offset = data + (uint64_t)begin;
    return SPM_OK;
}

static int spmi_safetensors_order(const void *a, const void *b)
{
    const spm_archive_tensor *const *left = (const spm_archive_tensor *const *)a, *const *right = (const spm_archive_tensor *const *)b;
    if ((*left)->offset != (*right)->offset) return (*left)->offset < (*right)->offset ? -1 : 1;
    return (*left)->count == (*right)->count ? 0 : (*left)->count < (*right)->count ? -1 : 1;
}

/* No byte may belong to two tensors. */
static spm_status spmi_safetensors_overlap(spm_archive *archive, spm_error *err)
{
    const spm_archive_tensor **order;
    spm_status status = SPM_OK;
    int64_t i;
    order = (const spm_archive_tensor **)spmi_alloc_array(archive->ctx, archive->count + 1, sizeof *order);
    if (!order) return spmi_fail_memory(archive->ctx, err, archive->source.name);
    for (i = 0; i < archive->count; i++) order[i] = &archive->tensors[i];
    qsort((void *)order, (size_t)archive->count, sizeof *order, spmi_safetensors_order);
    for (i = 1; i < archive->count && !status; i++) {
        const spm_archive_tensor *t = order[i - 1];
        if (order[i]->offset < t->offset + (uint64_t)t->count * (uint64_t)spmi_dtype_size(t->dtype))
            status = spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: the data of %.100s and %.100s overlap; the file is damaged",
                               archive->source.name, t->name, order[i]->name);
    }
    spmi_free(archive->ctx, (void *)order);
    return status;
}

/* u64 header length, that many bytes of JSON, the data. */
static spm_status spmi_safetensors_open(spm_archive *archive, uint64_t length, spm_error *err)
{
    spm_context *ctx = archive->ctx;
    const char *name = archive->source.name;
    int64_t members, i;
    char *text = (char *)spmi_alloc(ctx, (size_t)length);
    spm_status status;
    if (!text) return spmi_fail_memory(ctx, err, name);
    status = spmi_source_read(&archive->source, 8, text, (size_t)length, err);
    /* A tensor's entry takes at least 50 bytes and at most 14 values: one value in four bytes is ample. */
    if (!status && !(archive->header = spmi_json_parse_limited(ctx, name, text, (size_t)length, (size_t)length / 4 + 16, err)))
        status = SPM_E_FORMAT;
    spmi_free(ctx, text);
    if (status) return status;
    if (spm_json_type_of(archive->header) != SPM_JSON_OBJECT)
        return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: its header is not a JSON object", name);
    members = spm_json_length(archive->header);
    archive->tensors = (spm_archive_tensor *)spmi_alloc_array(ctx, members + 1, sizeof(spm_archive_tensor));
    if (!archive->tensors) return spmi_fail_memory(ctx, err, name);
    for (i = 0; i < members; i++) {
        const char *key = spm_json_key_at(archive->header, i);
        if (spmi_string_equal(key, "__metadata__")) continue;
        status = spmi_safetensors_tensor(archive, key, spm_json_at(archive->header, i), 8 + length,
                                         &archive->tensors[archive->count], err);
        if (status) return status;
        archive->count++;
    }
    return spmi_safetensors_overlap(archive, err);
}

/* ---- torch files: the pickle machine ----
 * A closed interpreter of the opcodes that torch.save emits (protocols 2 to 5).  It builds numbers, strings, tuples,
 * lists and dicts as plain data; the few globals below are recognised by name and never looked up; every other one ends
 * the reading.  A tensor is only its argument tuple until the tree is walked; nothing is executed and no size is trusted.
 * Memory grows with the bytes read: each opcode makes at most a few small records, and their sum is capped. */

typedef enum spmi_pickle_type {
    SPMI_P_NONE, SPMI_P_BOOL, SPMI_P_INT, SPMI_P_FLOAT, SPMI_P_STRING, SPMI_P_BIG, SPMI_P_MARK,
    SPMI_P_TUPLE, SPMI_P_LIST, SPMI_P_DICT, SPMI_P_GLOBAL, SPMI_P_STORAGE, SPMI_P_TENSOR
} spmi_pickle_type;

typedef enum spmi_pickle_global {
    SPMI_G_UNKNOWN, SPMI_G_DICT, SPMI_G_TENSOR, SPMI_G_PARAMETER, SPMI_G_SIZE, SPMI_G_STORAGE /* + spm_dtype */
} spmi_pickle_global;

/* bits: an integer; a global; the place of a string's bytes; the object of a container; for storages and tensors the
 * object of their argument tuple. */
typedef struct spmi_pickle_value {
    uint32_t type, length;
    uint64_t bits;
} spmi_pickle_value;

typedef struct spmi_pickle_cell {
    spmi_pickle_value value;
    uint32_t next; /* cell + 1, or 0 */
} spmi_pickle_cell;

/* A tuple, list or dict (key, value, key, value ...): a chain of cells, so that appending never copies. */
typedef struct spmi_pickle_object {
    uint32_t head, tail, count;
} spmi_pickle_object;

typedef struct spmi_pickle {
    spm_archive *archive;
    spm_error *err;
    const char *entry;            /* for error sentences */
    uint64_t base, limit;         /* of the bytes in the file: first, one behind the last */
    uint8_t *bytes;
    size_t have, room, at, op;    /* op: of the opcode being run */
    spmi_pickle_value *stack, *memo;
    spmi_pickle_cell *cells;
    spmi_pickle_object *objects;
    uint32_t *storages;           /* object of every persistent id, in order of occurrence */
    size_t stack_used, memo_used, cells_used, objects_used, storages_used;
    size_t stack_room, memo_room, cells_room, objects_room, storages_room; /* bytes */
    spm_status status;
} spmi_pickle;

static void spmi_pickle_free(spmi_pickle *p)
{
    spm_context *ctx = p->archive->ctx;
    spmi_free(ctx, p->bytes);
    spmi_free(ctx, p->stack);
    spmi_free(ctx, p->memo);
    spmi_free(ctx, p->cells);
    spmi_free(ctx, p->objects);
    spmi_free(ctx, p->storages);
}

/* Ends the reading with a sentence that holds the file, the place and `what`, which may name `detail`. */
static void spmi_pickle_fail(spmi_pickle *p, spm_status status, const char *what, const char *detail)
{
    if (p->status) return;
    p->status = spmi_fail(p->archive->ctx, p->err, status, "%s: %s, byte %llu: %s%s", p->archive->source.name, p->entry,
                          (unsigned long long)p->base + p->op, what, detail);
}

static void spmi_pickle_no_memory(spmi_pickle *p)
{
    if (!p->status) p->status = spmi_fail_memory(p->archive->ctx, p->err, p->archive->source.name);
}

/* Room for one more record in one of the arrays.  Honest files need at most about 20 bytes of records for a byte of
 * pickle; capacities may be twice that. */
static void *spmi_pickle_reserve(spmi_pickle *p, void *array, size_t used, size_t *room, size_t size)
{
    size_t total = p->stack_room + p->memo_room + p->cells_room + p->objects_room + p->storages_room;
    if (p->status || (used + 1) * size <= *room) return array;
    if (total / 64 > p->have + 65536) spmi_pickle_fail(p, SPM_E_FORMAT, "more objects than a checkpoint can have; the file is damaged", "");
    else if (!spmi_grow(p->archive->ctx, &array, used * size, room, (used + 1) * size)) spmi_pickle_no_memory(p);
    return array;
}

/* Makes `count` bytes available at p->at; 0 at the end of the file or entry. */
static int spmi_pickle_need(spmi_pickle *p, size_t count)
{
    uint64_t left = p->limit - p->base - p->have;
    size_t more, missing;
    void *memory = p->bytes;
    if (p->status) return 0;
    if (count <= p->have - p->at) return 1;
    missing = count - (p->have - p->at);
    if (missing > left || p->have > (size_t)1 << 28) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "the pickle ends too early; the file was cut short or damaged", "");
        return 0;
    }
    more = SPMI_MAX(missing, SPMI_MAX(p->have, (size_t)4096));
    if (more > left) more = (size_t)left;
    if (!spmi_grow(p->archive->ctx, &memory, p->have, &p->room, p->have + more + 1)) {
        spmi_pickle_no_memory(p);
        return 0;
    }
    p->bytes = (uint8_t *)memory;
    p->status = spmi_source_read(&p->archive->source, p->base + p->have, p->bytes + p->have, more, p->err);
    if (p->status) return 0;
    p->have += more;
    return 1;
}

/* An unsigned number of `count` bytes. */
static uint64_t spmi_pickle_number(spmi_pickle *p, size_t count)
{
    uint64_t value = 0;
    size_t i;
    if (!spmi_pickle_need(p, count)) return 0;
    for (i = 0; i < count; i++) value |= (uint64_t)p->bytes[p->at + i] << (8 * i);
    p->at += count;
    return value;
}

static void spmi_pickle_push_value(spmi_pickle *p, spmi_pickle_value value)
{
    p->stack = (spmi_pickle_value *)spmi_pickle_reserve(p, p->stack, p->stack_used, &p->stack_room, sizeof *p->stack);
    if (!p->status) p->stack[p->stack_used++] = value;
}

static void spmi_pickle_push(spmi_pickle *p, spmi_pickle_type type, uint64_t bits, uint32_t length)
{
    spmi_pickle_value value;
    value.type = (uint32_t)type;
    value.length = length;
    value.bits = bits;
    spmi_pickle_push_value(p, value);
}

static spmi_pickle_value spmi_pickle_pop(spmi_pickle *p)
{
    spmi_pickle_value none = SPM_ZERO;
    if (p->status) return none;
    if (!p->stack_used) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "the pickle's stack is empty; the file is damaged", "");
        return none;
    }
    return p->stack[--p->stack_used];
}

/* Bytes of `length` at p->at as a value of `type`. */
static void spmi_pickle_push_bytes(spmi_pickle *p, spmi_pickle_type type, uint64_t length)
{
    if (length > 0xFFFFFFFFu || !spmi_pickle_need(p, (size_t)length)) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "a string is longer than the file; the file is damaged", "");
        return;
    }
    spmi_pickle_push(p, type, p->at, (uint32_t)length);
    p->at += (size_t)length;
}

static uint32_t spmi_pickle_object_new(spmi_pickle *p)
{
    p->objects = (spmi_pickle_object *)spmi_pickle_reserve(p, p->objects, p->objects_used, &p->objects_room, sizeof *p->objects);
    if (p->status) return 0;
    memset(&p->objects[p->objects_used], 0, sizeof *p->objects);
    return (uint32_t)p->objects_used++;
}

static void spmi_pickle_append(spmi_pickle *p, uint32_t object, spmi_pickle_value value)
{
    spmi_pickle_object *o;
    p->cells = (spmi_pickle_cell *)spmi_pickle_reserve(p, p->cells, p->cells_used, &p->cells_room, sizeof *p->cells);
    if (p->status) return;
    o = &p->objects[object];
    p->cells[p->cells_used].value = value;
    p->cells[p->cells_used].next = 0;
    p->cells_used++;
    if (o->tail) p->cells[o->tail - 1].next = (uint32_t)p->cells_used;
    else o->head = (uint32_t)p->cells_used;
    o->tail = (uint32_t)p->cells_used;
    o->count++;
}

/* Element `index` of a container; None when it is not there. */
static spmi_pickle_value spmi_pickle_at(const spmi_pickle *p, uint32_t object, uint32_t index)
{
    spmi_pickle_value none = SPM_ZERO;
    uint32_t cell = p->objects[object].head;
    while (cell && index--) cell = p->cells[cell - 1].next;
    return cell ? p->cells[cell - 1].value : none;
}

/* The stack's place behind the topmost mark. */
static size_t spmi_pickle_mark(spmi_pickle *p)
{
    size_t i = p->stack_used;
    while (i && p->stack[i - 1].type != SPMI_P_MARK) i--;
    if (!i) spmi_pickle_fail(p, SPM_E_FORMAT, "the pickle lacks a mark; the file is damaged", "");
    return i;
}

/* Moves what lies on the stack from `first` on into the container, and drops the mark (if there is one) as well. */
static void spmi_pickle_collect(spmi_pickle *p, uint32_t object, size_t first, size_t drop)
{
    size_t i;
    for (i = first; i < p->stack_used && !p->status; i++) {
        if (p->stack[i].type == SPMI_P_MARK) spmi_pickle_fail(p, SPM_E_FORMAT, "a mark inside a container; the file is damaged", "");
        spmi_pickle_append(p, object, p->stack[i]);
    }
    if (!p->status) p->stack_used = first - drop;
}

static void spmi_pickle_tuple(spmi_pickle *p, size_t first, size_t drop, spmi_pickle_type type)
{
    uint32_t object = spmi_pickle_object_new(p);
    if (p->status) return;
    spmi_pickle_collect(p, object, first, drop);
    if (type == SPMI_P_DICT && p->objects[object].count % 2) spmi_pickle_fail(p, SPM_E_FORMAT, "a dict key without a value; the file is damaged", "");
    spmi_pickle_push(p, type, object, 0);
}

/* Appends the stack from `first` on to the list or dict below (and below the mark, if `drop`). */
static void spmi_pickle_extend(spmi_pickle *p, size_t first, size_t drop, spmi_pickle_type type)
{
    if (p->status) return;
    if (first < drop + 1 || p->stack[first - drop - 1].type != (uint32_t)type
        || (type == SPMI_P_DICT && (p->stack_used - first) % 2)) {
        spmi_pickle_fail(p, SPM_E_FORMAT, type == SPMI_P_DICT ? "items for something that is no dict" : "items for something that is no list", "");
        return;
    }
    spmi_pickle_collect(p, (uint32_t)p->stack[first - drop - 1].bits, first, drop);
}

static void spmi_pickle_memo_put(spmi_pickle *p, uint64_t index)
{
    if (p->status) return;
    if (!p->stack_used || p->stack[p->stack_used - 1].type == SPMI_P_MARK || index >= p->have) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "a memo entry that cannot be; the file is damaged", "");
        return;
    }
    while (p->memo_used <= (size_t)index) {
        p->memo = (spmi_pickle_value *)spmi_pickle_reserve(p, p->memo, p->memo_used, &p->memo_room, sizeof *p->memo);
        if (p->status) return;
        memset(&p->memo[p->memo_used], 0, sizeof *p->memo);
        p->memo[p->memo_used++].type = SPMI_P_MARK; /* not set */
    }
    p->memo[index] = p->stack[p->stack_used - 1];
}

static void spmi_pickle_memo_get(spmi_pickle *p, uint64_t index)
{
    if (p->status) return;
    if (index >= p->memo_used || p->memo[index].type == SPMI_P_MARK)
        spmi_pickle_fail(p, SPM_E_FORMAT, "a memo entry that was never stored; the file is damaged", "");
    else
        spmi_pickle_push_value(p, p->memo[index]);
}

/* The known globals; anything else is refused with its name. */
static void spmi_pickle_push_global(spmi_pickle *p, const char *module, const char *name)
{
    uint64_t global = SPMI_G_UNKNOWN;
    char full[200];
    size_t i;
    if (p->status) return;
    if (spmi_string_equal(module, "torch") || spmi_string_equal(module, "torch.cuda")) {
        static const spm_dtype all[] = { SPM_F32, SPM_F64, SPM_F16, SPM_BF16, SPM_I64, SPM_I32, SPM_I16, SPM_I8, SPM_U8, SPM_BOOL };
        for (i = 0; i < (size_t)SPMI_COUNT(all); i++)
            if (spmi_string_equal(name, spmi_torch_storage_name(all[i]))) global = (uint64_t)SPMI_G_STORAGE + (uint64_t)all[i];
        if (spmi_string_equal(name, "Size")) global = SPMI_G_SIZE;
    } else if (spmi_string_equal(module, "torch._utils")) {
        if (spmi_string_equal(name, "_rebuild_tensor") || spmi_string_equal(name, "_rebuild_tensor_v2")) global = SPMI_G_TENSOR;
        else if (spmi_string_equal(name, "_rebuild_parameter")) global = SPMI_G_PARAMETER;
    } else if (spmi_string_equal(module, "collections") && spmi_string_equal(name, "OrderedDict")) {
        global = SPMI_G_DICT;
    }
    if (global != SPMI_G_UNKNOWN) {
        spmi_pickle_push(p, SPMI_P_GLOBAL, global, 0);
        return;
    }
    (void)spmi_format(full, sizeof full, "%.90s.%.90s", module, name);
    for (i = 0; full[i]; i++)
        if ((unsigned char)full[i] < 0x20 || (unsigned char)full[i] >= 0x7F) full[i] = '?';
    spmi_pickle_fail(p, SPM_E_UNSUPPORTED, "wants a Python object that is not plain data (save model.state_dict() alone): ", full);
}

/* A line of at most 127 bytes, without its newline. */
static void spmi_pickle_line(spmi_pickle *p, char out[128])
{
    size_t used = 0;
    while (spmi_pickle_need(p, 1)) {
        char c = (char)p->bytes[p->at++];
        if (c == '\n') break;
        if (used == 127) {
            spmi_pickle_fail(p, SPM_E_FORMAT, "a global's name is too long; the file is damaged", "");
            break;
        }
        out[used++] = c;
    }
    out[used] = 0;
}

static void spmi_pickle_short(const spmi_pickle *p, spmi_pickle_value value, char out[128])
{
    size_t length = SPMI_MIN(value.length, 127u);
    memcpy(out, p->bytes + value.bits, length);
    out[length] = 0;
}

static void spmi_pickle_global_op(spmi_pickle *p, int from_stack)
{
    char module[128], name[128];
    if (!from_stack) {
        spmi_pickle_line(p, module);
        spmi_pickle_line(p, name);
    } else {
        spmi_pickle_value n = spmi_pickle_pop(p), m = spmi_pickle_pop(p);
        if (p->status) return;
        if (n.type != SPMI_P_STRING || m.type != SPMI_P_STRING) {
            spmi_pickle_fail(p, SPM_E_FORMAT, "a global without a name; the file is damaged", "");
            return;
        }
        spmi_pickle_short(p, m, module);
        spmi_pickle_short(p, n, name);
    }
    spmi_pickle_push_global(p, module, name);
}

/* REDUCE and NEWOBJ: callable and argument tuple become plain data. */
static void spmi_pickle_call(spmi_pickle *p)
{
    spmi_pickle_value args = spmi_pickle_pop(p), callable = spmi_pickle_pop(p), first;
    uint32_t object, cell;
    if (p->status) return;
    if (callable.type != SPMI_P_GLOBAL || args.type != SPMI_P_TUPLE) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "calls something that is no known function; refused", "");
        return;
    }
    first = spmi_pickle_at(p, (uint32_t)args.bits, 0);
    if (callable.bits == SPMI_G_TENSOR) {
        spmi_pickle_push(p, SPMI_P_TENSOR, args.bits, 0);
    } else if (callable.bits == SPMI_G_PARAMETER && first.type == SPMI_P_TENSOR) {
        spmi_pickle_push_value(p, first);
    } else if (callable.bits == SPMI_G_SIZE && (first.type == SPMI_P_TUPLE || first.type == SPMI_P_LIST)) {
        spmi_pickle_push(p, SPMI_P_TUPLE, first.bits, 0);
    } else if (callable.bits == SPMI_G_DICT) {
        object = spmi_pickle_object_new(p);
        if (first.type == SPMI_P_LIST && !p->status) { /* Python 2: a list of [key, value] lists */
            for (cell = p->objects[first.bits].head; cell && !p->status; cell = p->cells[cell - 1].next) {
                spmi_pickle_value pair = p->cells[cell - 1].value;
                if ((pair.type != SPMI_P_LIST && pair.type != SPMI_P_TUPLE) || p->objects[pair.bits].count != 2) {
                    spmi_pickle_fail(p, SPM_E_FORMAT, "an OrderedDict of something that is no pair; the file is damaged", "");
                    return;
                }
                spmi_pickle_append(p, object, spmi_pickle_at(p, (uint32_t)pair.bits, 0));
                spmi_pickle_append(p, object, spmi_pickle_at(p, (uint32_t)pair.bits, 1));
            }
        }
        spmi_pickle_push(p, SPMI_P_DICT, object, 0);
    } else {
        spmi_pickle_fail(p, SPM_E_FORMAT, "a call with arguments that do not fit; refused", "");
    }
}

static void spmi_pickle_persistent(spmi_pickle *p)
{
    spmi_pickle_value id = spmi_pickle_pop(p);
    if (p->status) return;
    if (id.type != SPMI_P_TUPLE || p->objects[id.bits].count < 5) {
        spmi_pickle_fail(p, SPM_E_FORMAT, "a persistent id that names no storage; the file is damaged", "");
        return;
    }
    p->storages = (uint32_t *)spmi_pickle_reserve(p, p->storages, p->storages_used, &p->storages_room, sizeof *p->storages);
    if (p->status) return;
    p->storages[p->storages_used++] = (uint32_t)id.bits;
    spmi_pickle_push(p, SPMI_P_STORAGE, id.bits, 0);
}

static void spmi_pickle_float(spmi_pickle *p)
{
    uint64_t bits = 0;
    int i;
    if (!spmi_pickle_need(p, 8)) return;
    for (i = 0; i < 8; i++) bits = bits << 8 | p->bytes[p->at++]; /* big-endian, unlike all else */
    spmi_pickle_push(p, SPMI_P_FLOAT, bits, 0);
}

static void spmi_pickle_long(spmi_pickle *p, uint64_t length)
{
    if (length > 8) {
        spmi_pickle_push_bytes(p, SPMI_P_BIG, length);
    } else {
        uint64_t value = spmi_pickle_number(p, (size_t)length);
        if (length && length < 8 && value >> (8 * length - 1)) value |= ~(uint64_t)0 << (8 * length); /* sign */
        spmi_pickle_push(p, SPMI_P_INT, value, 0);
    }
}

/* The operands of one tuple opcode of fixed size. */
static void spmi_pickle_fixed_tuple(spmi_pickle *p, size_t count)
{
    if (p->stack_used < count) spmi_pickle_fail(p, SPM_E_FORMAT, "the pickle's stack is empty; the file is damaged", "");
    else spmi_pickle_tuple(p, p->stack_used - count, 0, SPMI_P_TUPLE);
}

/* Runs one pickle from p->at to its STOP; its value is returned.  Long, as a switch over 50 opcodes is. */
static spmi_pickle_value spmi_pickle_run(spmi_pickle *p)
{
    spmi_pickle_value none = SPM_ZERO;
    p->stack_used = p->memo_used = 0;
    while (!p->status) {
        uint64_t n;
        size_t mark;
        p->op = p->at;
        switch ((int)spmi_pickle_number(p, 1)) {
        case 0x80: /* PROTO */
            if (spmi_pickle_number(p, 1) > 5) spmi_pickle_fail(p, SPM_E_UNSUPPORTED, "an unknown pickle protocol", "");
            break;
        case 0x95: (void)spmi_pickle_number(p, 8); break;                                     /* FRAME */
        case '.': return spmi_pickle_pop(p);                                                  /* STOP */
        case '(': spmi_pickle_push(p, SPMI_P_MARK, 0, 0); break;                              /* MARK */
        case '0': (void)spmi_pickle_pop(p); break;                                            /* POP */
        case '1':                                                                             /* POP_MARK */
            mark = spmi_pickle_mark(p);
            if (mark) p->stack_used = mark - 1;
            break;
        case '2':                                                                             /* DUP */
            if (p->stack_used && p->stack[p->stack_used - 1].type != SPMI_P_MARK) spmi_pickle_push_value(p, p->stack[p->stack_used - 1]);
            else (void)spmi_pickle_fail(p, SPM_E_FORMAT, "nothing to repeat; the file is damaged", "");
            break;
        case 'N': spmi_pickle_push(p, SPMI_P_NONE, 0, 0); break;                              /* NONE */
        case 0x88: spmi_pickle_push(p, SPMI_P_BOOL, 1, 0); break;                             /* NEWTRUE */
        case 0x89: spmi_pickle_push(p, SPMI_P_BOOL, 0, 0); break;                             /* NEWFALSE */
        case 'K': n = spmi_pickle_number(p, 1); spmi_pickle_push(p, SPMI_P_INT, n, 0); break; /* BININT1 */
        case 'M': n = spmi_pickle_number(p, 2); spmi_pickle_push(p, SPMI_P_INT, n, 0); break; /* BININT2 */
        case 'J': spmi_pickle_long(p, 4); break;                                              /* BININT */
        case 0x8A: spmi_pickle_long(p, spmi_pickle_number(p, 1)); break;                      /* LONG1 */
        case 0x8B: spmi_pickle_long(p, spmi_pickle_number(p, 4)); break;                      /* LONG4 */
        case 'G': spmi_pickle_float(p); break;                                                /* BINFLOAT */
        case 'U': case 0x8C: case 'C':                                /* SHORT_BINSTRING, SHORT_BINUNICODE, SHORT_BINBYTES */
            spmi_pickle_push_bytes(p, SPMI_P_STRING, spmi_pickle_number(p, 1));
            break;
        case 'T': case 'X': case 'B':                                                 /* BINSTRING, BINUNICODE, BINBYTES */
            spmi_pickle_push_bytes(p, SPMI_P_STRING, spmi_pickle_number(p, 4));
            break;
        case 0x8D: case 0x8E:                                                                 /* BINUNICODE8, BINBYTES8 */
            spmi_pickle_push_bytes(p, SPMI_P_STRING, spmi_pickle_number(p, 8));
            break;
        case ')': spmi_pickle_tuple(p, p->stack_used, 0, SPMI_P_TUPLE); break;                /* EMPTY_TUPLE */
        case ']': case 0x8F: spmi_pickle_tuple(p, p->stack_used, 0, SPMI_P_LIST); break;      /* EMPTY_LIST, EMPTY_SET */
        case '}': spmi_pickle_tuple(p, p->stack_used, 0, SPMI_P_DICT); break;                 /* EMPTY_DICT */
        case 0x85: spmi_pickle_fixed_tuple(p, 1); break;                                      /* TUPLE1 */
        case 0x86: spmi_pickle_fixed_tuple(p, 2); break;                                      /* TUPLE2 */
        case 0x87: spmi_pickle_fixed_tuple(p, 3); break;                                      /* TUPLE3 */
        case 't': mark = spmi_pickle_mark(p); spmi_pickle_tuple(p, mark, 1, SPMI_P_TUPLE); break;         /* TUPLE */
        case 'l': case 0x91: mark = spmi_pickle_mark(p); spmi_pickle_tuple(p, mark, 1, SPMI_P_LIST); break; /* LIST, FROZENSET */
        case 'd': mark = spmi_pickle_mark(p); spmi_pickle_tuple(p, mark, 1, SPMI_P_DICT); break;          /* DICT */
        case 'e': case 0x90: mark = spmi_pickle_mark(p); spmi_pickle_extend(p, mark, 1, SPMI_P_LIST); break; /* APPENDS, ADDITEMS */
        case 'u': mark = spmi_pickle_mark(p); spmi_pickle_extend(p, mark, 1, SPMI_P_DICT); break;         /* SETITEMS */
        case 'a': spmi_pickle_extend(p, p->stack_used - (p->stack_used > 0), 0, SPMI_P_LIST); break;      /* APPEND */
        case 's': spmi_pickle_extend(p, p->stack_used > 1 ? p->stack_used - 2 : 0, 0, SPMI_P_DICT); break; /* SETITEM */
        case 'q': spmi_pickle_memo_put(p, spmi_pickle_number(p, 1)); break;                   /* BINPUT */
        case 'r': spmi_pickle_memo_put(p, spmi_pickle_number(p, 4)); break;                   /* LONG_BINPUT */
        case 0x94: spmi_pickle_memo_put(p, p->memo_used); break;                              /* MEMOIZE */
        case 'h': spmi_pickle_memo_get(p, spmi_pickle_number(p, 1)); break;                   /* BINGET */
        case 'j': spmi_pickle_memo_get(p, spmi_pickle_number(p, 4)); break;                   /* LONG_BINGET */
        case 'c': spmi_pickle_global_op(p, 0); break;                                         /* GLOBAL */
        case 0x93: spmi_pickle_global_op(p, 1); break;                                        /* STACK_GLOBAL */
        case 'R': case 0x81: spmi_pickle_call(p); break;                                      /* REDUCE, NEWOBJ */
        case 'Q': spmi_pickle_persistent(p); break;                                           /* BINPERSID */
        case 'b':                                                     /* BUILD: the attributes of an OrderedDict are dropped */
            (void)spmi_pickle_pop(p);
            if (!p->stack_used || p->stack[p->stack_used - 1].type != SPMI_P_DICT)
                spmi_pickle_fail(p, SPM_E_FORMAT, "sets attributes of something that is no dict; refused", "");
            break;
        default:
            spmi_pickle_fail(p, SPM_E_FORMAT, "an opcode that torch.save does not write; the file is damaged", "");
        }
    }
    return none;
}

/* A string of at most 4096 bytes as a C string: its terminator overwrites the opcode behind it, so only when all pickles
 * have been run.  NULL for anything else. */
static const char *spmi_pickle_text(spmi_pickle *p, spmi_pickle_value value)
{
    if (value.type != SPMI_P_STRING || value.length > 4096 || memchr(p->bytes + value.bits, 0, value.length)) return NULL;
    p->bytes[value.bits + value.length] = 0;
    return (const char *)(p->bytes + value.bits);
}

/* ---- torch files: from the pickle's tree to named tensors ---- */

/* A storage by its key.  Zip: an entry; legacy: a place behind the pickles. */
typedef struct spmi_torch_key {
    const char *name;
    int64_t elements, storage; /* storage: index in archive->storages, -1 while unknown */
    uint64_t local;            /* zip: offset of the local header; 0 in legacy files */
    int stored;                /* zip: neither compressed nor encrypted */
    spm_dtype dtype;
} spmi_torch_key;

typedef struct spmi_torch {
    spmi_pickle pickle;
    spmi_torch_key *keys;
    int64_t keys_count;
    spmi_names names;       /* over keys */
    uint8_t *directory;     /* zip: the central directory, whose bytes hold the entries' names */
    char prefix[200];       /* zip: what stands before data.pkl */
    char path[1024];        /* name of the tensor at hand */
    size_t visits, text_used, text_room;
    int fill;               /* 0: count tensors and bytes of names, 1: make them */
} spmi_torch;

static void spmi_torch_free(spmi_torch *t)
{
    spm_context *ctx = t->pickle.archive->ctx;
    spmi_pickle_free(&t->pickle);
    spmi_free(ctx, t->keys);
    spmi_free(ctx, t->names.slots);
    spmi_free(ctx, t->directory);
}

/* A failure that concerns the tensor at hand. */
static spm_status spmi_torch_fail(spmi_torch *t, spm_status status, const char *what)
{
    return spmi_fail(t->pickle.archive->ctx, t->pickle.err, status, "%s: %.150s: %s", t->pickle.archive->source.name,
                     t->path[0] ? t->path : t->pickle.entry, what);
}

/* Finds where the data of a zip entry begin: behind its local header. */
static spm_status spmi_torch_zip_locate(spmi_torch *t, int64_t index, spmi_storage *storage)
{
    spm_archive *archive = t->pickle.archive;
    spmi_torch_key *key = &t->keys[index];
    uint8_t head[30];
    spm_status status = spmi_source_read(&archive->source, key->local, head, sizeof head, t->pickle.err);
    if (status) return status;
    storage->offset = key->local + 30 + spmi_pack_u16(head + 26) + spmi_pack_u16(head + 28);
    if (memcmp(head, "PK\3\4", 4) != 0 || storage->offset > archive->source.size
        || storage->size > archive->source.size - storage->offset)
        return spmi_fail(archive->ctx, t->pickle.err, SPM_E_FORMAT,
                         "%s: entry %.150s at offset %llu does not lie inside the file; it was cut short or damaged",
                         archive->source.name, key->name, (unsigned long long)key->local);
    if (!key->stored)
        return spmi_fail(archive->ctx, t->pickle.err, SPM_E_UNSUPPORTED,
                         "%s: entry %.150s is compressed or encrypted, which torch.save never does; save it again with torch",
                         archive->source.name, key->name);
    key->storage = index;
    return SPM_OK;
}

/* ('storage', type, key, location, elements[, view]): its dtype, its index, and the element where a legacy view begins. */
static spm_status spmi_torch_storage(spmi_torch *t, uint32_t id, spm_dtype *dtype, int64_t *elements, int64_t *storage, int64_t *view)
{
    spmi_pickle *p = &t->pickle;
    spm_archive *archive = p->archive;
    spmi_pickle_value type = spmi_pickle_at(p, id, 1), count = spmi_pickle_at(p, id, 4), part = spmi_pickle_at(p, id, 5);
    const char *name = spmi_pickle_text(p, spmi_pickle_at(p, id, 2));
    char entry[512];
    int64_t index, bytes;
    *view = 0;
    if (!name || type.type != SPMI_P_GLOBAL || type.bits <= SPMI_G_STORAGE || count.type != SPMI_P_INT)
        return spmi_torch_fail(t, SPM_E_FORMAT, "its storage is not described as torch does; the file is damaged");
    *dtype = (spm_dtype)(type.bits - SPMI_G_STORAGE);
    *elements = (int64_t)count.bits;
    if (archive->format == SPMI_TORCH_ZIP) (void)spmi_format(entry, sizeof entry, "%sdata/%.200s", t->prefix, name);
    else (void)spmi_format(entry, sizeof entry, "%.500s", name);
    index = spmi_names_find(&t->names, entry);
    if (index < 0)
        return spmi_fail(archive->ctx, p->err, SPM_E_FORMAT, "%s: %.150s: its storage %.100s is not in the file; it was cut short or damaged",
                         archive->source.name, t->path, entry);
    if (archive->format == SPMI_TORCH_ZIP && t->keys[index].storage < 0) {
        spm_status status = spmi_torch_zip_locate(t, index, &archive->storages[index]);
        if (status) return status;
    }
    *storage = t->keys[index].storage;
    if (*storage < 0 || !spmi_mul_dim(*elements, spmi_dtype_size(*dtype), &bytes)
        || (uint64_t)bytes > archive->storages[*storage].size)
        return spmi_fail(archive->ctx, p->err, SPM_E_FORMAT, "%s: %.150s: its storage %.100s is smaller than its %lld elements",
                         archive->source.name, t->path, entry, (long long)*elements);
    if (part.type == SPMI_P_TUPLE) { /* (key of the view, first element, elements) */
        spmi_pickle_value first = spmi_pickle_at(p, (uint32_t)part.bits, 1);
        *view = first.type == SPMI_P_INT ? (int64_t)first.bits : -1;
        if (*view < 0 || *view > *elements) return spmi_torch_fail(t, SPM_E_FORMAT, "a view that begins outside its storage; the file is damaged");
    }
    return SPM_OK;
}

/* A tuple of sizes or strides, none negative; the number of axes or -1. */
static int spmi_torch_sizes(const spmi_pickle *p, spmi_pickle_value value, int64_t *out)
{
    uint32_t cell;
    int rank = 0;
    if ((value.type != SPMI_P_TUPLE && value.type != SPMI_P_LIST) || p->objects[value.bits].count > SPM_ARCHIVE_MAX_RANK) return -1;
    for (cell = p->objects[value.bits].head; cell; cell = p->cells[cell - 1].next) {
        if (p->cells[cell - 1].value.type != SPMI_P_INT || p->cells[cell - 1].value.bits > (uint64_t)INT64_MAX) return -1;
        out[rank++] = (int64_t)p->cells[cell - 1].value.bits;
    }
    return rank;
}

/* _rebuild_tensor(_v2): (storage, offset, sizes, strides, ...).  All elements must lie inside the storage. */
static spm_status spmi_torch_tensor(spmi_torch *t, uint32_t args, spm_archive_tensor *tensor, int64_t *storage)
{
    spmi_pickle *p = &t->pickle;
    spmi_pickle_value from = spmi_pickle_at(p, args, 0), offset = spmi_pickle_at(p, args, 1);
    int64_t elements = 0, view = 0, last, span, bytes;
    int axis;
    spm_status status;
    if (from.type != SPMI_P_STORAGE || offset.type != SPMI_P_INT)
        return spmi_torch_fail(t, SPM_E_FORMAT, "is not rebuilt from a storage; the file is damaged");
    status = spmi_torch_storage(t, (uint32_t)from.bits, &tensor->dtype, &elements, storage, &view);
    if (status) return status;
    tensor->rank = spmi_torch_sizes(p, spmi_pickle_at(p, args, 2), tensor->shape);
    if (tensor->rank < 0 || spmi_torch_sizes(p, spmi_pickle_at(p, args, 3), tensor->stride) != tensor->rank)
        return spmi_torch_fail(t, SPM_E_FORMAT, "its sizes and strides do not fit, or it has more than 8 axes");
    tensor->count = 1;
    last = (int64_t)offset.bits;
    for (axis = 0; axis < tensor->rank; axis++) {
        if (!spmi_mul_dim(tensor->count, tensor->shape[axis], &tensor->count)) return spmi_torch_fail(t, SPM_E_FORMAT, "its shape is too large");
        if (tensor->shape[axis] == 0) continue;
        if (!spmi_mul_dim(tensor->shape[axis] - 1, tensor->stride[axis], &span) || last < 0 || span > INT64_MAX - last)
            return spmi_torch_fail(t, SPM_E_FORMAT, "its strides are too large; the file is damaged");
        last += span;
    }
    if (tensor->count && (last < 0 || last >= elements - view || (int64_t)offset.bits < 0))
        return spmi_torch_fail(t, SPM_E_FORMAT, "its elements reach beyond its storage; the file is damaged");
    /* Strides of 0 (torch's expand) repeat elements: a claim of more than the file itself plus a mebibyte is refused. */
    if (!spmi_mul_dim(tensor->count, spmi_dtype_size(tensor->dtype), &bytes)
        || (uint64_t)bytes > p->archive->source.size + ((uint64_t)1 << 20))
        return spmi_torch_fail(t, SPM_E_FORMAT, "claims more elements than the file can hold; save it contiguous");
    tensor->offset = p->archive->storages[*storage].offset;
    if (tensor->count) tensor->offset += (uint64_t)(view + (int64_t)offset.bits) * (uint64_t)spmi_dtype_size(tensor->dtype);
    return SPM_OK;
}

/* Walks the tree; the names of nested tensors are their keys joined by dots.  Recursion is bounded by `depth`; a tree
 * that repeats parts of itself is bounded by the number of visits. */
static spm_status spmi_torch_walk(spmi_torch *t, spmi_pickle_value value, size_t length, int depth)
{
    spmi_pickle *p = &t->pickle;
    spm_archive *archive = p->archive;
    spm_status status = SPM_OK;
    uint32_t cell;
    int64_t index = 0;
    if (++t->visits > p->cells_used + 256) return spmi_torch_fail(t, SPM_E_FORMAT, "the tree contains itself; the file is damaged");
    if (value.type == SPMI_P_TENSOR) {
        const char *name = length ? t->path : "tensor";
        size_t bytes = strlen(name) + 1;
        if (t->fill) {
            spm_archive_tensor *tensor = &archive->tensors[archive->count];
            status = spmi_torch_tensor(t, (uint32_t)value.bits, tensor, &archive->storage_of[archive->count]);
            if (status) return status;
            memcpy(archive->text + t->text_used, name, bytes);
            tensor->name = archive->text + t->text_used;
        }
        t->text_used += bytes;
        archive->count++;
        return SPM_OK;
    }
    if (value.type != SPMI_P_DICT && value.type != SPMI_P_LIST && value.type != SPMI_P_TUPLE) return SPM_OK;
    if (depth == 24) return spmi_torch_fail(t, SPM_E_FORMAT, "nested more than 24 levels deep");
    for (cell = p->objects[value.bits].head; cell && !status; cell = p->cells[cell - 1].next, index++) {
        spmi_pickle_value item = p->cells[cell - 1].value;
        char number[24];
        const char *key = number;
        int wrote;
        (void)spmi_format(number, sizeof number, "%lld", (long long)index);
        if (value.type == SPMI_P_DICT) {
            if (item.type == SPMI_P_INT) (void)spmi_format(number, sizeof number, "%lld", (long long)item.bits);
            else key = spmi_pickle_text(p, item);
            cell = p->cells[cell - 1].next;
            item = p->cells[cell - 1].value;
        }
        if (item.type < SPMI_P_TUPLE || item.type == SPMI_P_STORAGE || item.type == SPMI_P_GLOBAL) continue;
        if (!key) continue; /* named by a tuple or the like: no parameter */
        wrote = spmi_format(t->path + length, sizeof t->path - length, "%s%s", length ? "." : "", key);
        if (wrote < 0 || (size_t)wrote >= sizeof t->path - length)
            return spmi_torch_fail(t, SPM_E_FORMAT, "a name of more than 1000 bytes; the file is damaged");
        status = spmi_torch_walk(t, item, length + (size_t)wrote, depth + 1);
        t->path[length] = 0;
    }
    return status;
}

/* Two walks: one that counts, one that fills. */
static spm_status spmi_torch_collect(spmi_torch *t, spmi_pickle_value root)
{
    spm_archive *archive = t->pickle.archive;
    spm_status status = spmi_torch_walk(t, root, 0, 0);
    if (status) return status;
    if (t->text_used / 64 > t->pickle.have + 65536) return spmi_torch_fail(t, SPM_E_FORMAT, "longer names than the file can hold; the file is damaged");
    archive->tensors = (spm_archive_tensor *)spmi_alloc_array(archive->ctx, archive->count + 1, sizeof(spm_archive_tensor));
    archive->storage_of = (int64_t *)spmi_alloc_array(archive->ctx, archive->count + 1, sizeof(int64_t));
    archive->text = (char *)spmi_alloc(archive->ctx, t->text_used + 1);
    if (!archive->tensors || !archive->storage_of || !archive->text)
        return spmi_fail_memory(archive->ctx, t->pickle.err, archive->source.name);
    t->fill = 1;
    t->visits = t->text_used = 0;
    archive->count = 0;
    return spmi_torch_walk(t, root, 0, 0);
}

/* ---- torch files since 1.6: a zip of stored entries ---- */

/* Finds the central directory: *offset, *size, *count. */
static spm_status spmi_zip_directory(spm_archive *archive, uint64_t *offset, uint64_t *size, uint64_t *count, spm_error *err)
{
    uint64_t total = archive->source.size;
    size_t tail = (size_t)SPMI_MIN(total, (uint64_t)65557), at;
    uint8_t *bytes = (uint8_t *)spmi_alloc(archive->ctx, tail), *found = NULL, big[56];
    spm_status status;
    if (!bytes) return spmi_fail_memory(archive->ctx, err, archive->source.name);
    status = spmi_source_read(&archive->source, total - tail, bytes, tail, err);
    for (at = tail; !status && at >= 22 && !found; at--) {
        uint8_t *end = bytes + at - 22;
        if (memcmp(end, "PK\5\6", 4) == 0 && (size_t)spmi_pack_u16(end + 20) == tail - at) found = end;
    }
    if (!status && !found)
        status = spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: this zip file of %llu bytes has no central directory; it was cut short",
                           archive->source.name, (unsigned long long)total);
    if (!status) {
        *count = spmi_pack_u16(found + 10);
        *size = spmi_pack_u32(found + 12);
        *offset = spmi_pack_u32(found + 16);
        if (found - bytes >= 20 && memcmp(found - 20, "PK\6\7", 4) == 0) { /* zip64 */
            status = spmi_source_read(&archive->source, spmi_pack_u64(found - 12), big, sizeof big, err);
            if (!status && memcmp(big, "PK\6\6", 4) != 0)
                status = spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: offset %llu: no zip64 record is here; the file is damaged",
                                   archive->source.name, (unsigned long long)spmi_pack_u64(found - 12));
            *count = spmi_pack_u64(big + 32);
            *size = spmi_pack_u64(big + 40);
            *offset = spmi_pack_u64(big + 48);
        }
    }
    spmi_free(archive->ctx, bytes);
    if (status) return status;
    if (*offset > total || *size > total - *offset || *count > *size / 46)
        return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: its central directory (%llu entries at offset %llu) does not fit the file",
                         archive->source.name, (unsigned long long)*count, (unsigned long long)*offset);
    return SPM_OK;
}

/* Reads one record of the central directory, which ends at `end`; NULL if it does not fit.  The name is moved to the
 * record's first bytes, where there is room for its terminator. */
static uint8_t *spmi_zip_record(uint8_t *at, const uint8_t *end, spmi_torch_key *key, spmi_storage *storage)
{
    size_t name, extra, comment, i;
    uint64_t packed, local;
    if (end - at < 46 || memcmp(at, "PK\1\2", 4) != 0) return NULL;
    name = spmi_pack_u16(at + 28);
    extra = spmi_pack_u16(at + 30);
    comment = spmi_pack_u16(at + 32);
    if ((size_t)(end - at) - 46 < name + extra + comment) return NULL;
    key->stored = spmi_pack_u16(at + 10) == 0 && !(spmi_pack_u16(at + 8) & 1);
    storage->crc = spmi_pack_u32(at + 16);
    storage->check = storage->crc != 0; /* torch can be told to leave the CRC out */
    packed = spmi_pack_u32(at + 20);
    storage->size = spmi_pack_u32(at + 24);
    local = spmi_pack_u32(at + 42);
    for (i = 0; i + 4 <= extra; i += 4 + (size_t)spmi_pack_u16(at + 46 + name + i + 2)) { /* zip64: what did not fit above */
        const uint8_t *field = at + 46 + name + i;
        size_t left = spmi_pack_u16(field + 2), used = 4;
        if (spmi_pack_u16(field) != 1) continue;
        if (left > extra - i - 4) return NULL;
        if (storage->size == 0xFFFFFFFFu && left >= 8) { storage->size = spmi_pack_u64(field + used); used += 8; left -= 8; }
        if (packed == 0xFFFFFFFFu && left >= 8) { packed = spmi_pack_u64(field + used); used += 8; left -= 8; }
        if (local == 0xFFFFFFFFu && left >= 8) local = spmi_pack_u64(field + used);
        break;
    }
    if (packed != storage->size) key->stored = 0;
    key->local = local;
    key->storage = -1;
    memmove(at, at + 46, name);
    at[name] = 0;
    key->name = (const char *)at;
    return at + 46 + name + extra + comment;
}

/* data.pkl and byteorder must be intact before the pickle is run. */
static spm_status spmi_torch_zip_entry(spmi_torch *t, int64_t index)
{
    spm_archive *archive = t->pickle.archive;
    spm_archive_tensor whole = SPM_ZERO;
    spmi_storage *storage = &archive->storages[index];
    spm_status status = spmi_torch_zip_locate(t, index, storage);
    uint64_t at;
    uint32_t crc = 0;
    if (status) return status;
    whole.name = t->keys[index].name;
    for (at = 0; at < storage->size && storage->check; at += SPMI_ARCHIVE_BUFFER) {
        size_t piece = (size_t)SPMI_MIN(storage->size - at, (uint64_t)SPMI_ARCHIVE_BUFFER);
        status = spmi_source_read(&archive->source, storage->offset + at, archive->buffer, piece, t->pickle.err);
        if (status) return status;
        crc = spmi_crc_add(&archive->crc, crc, archive->buffer, piece);
    }
    return storage->check ? spmi_archive_check_crc(archive, &whole, storage, crc, t->pickle.err) : SPM_OK;
}

static spm_status spmi_torch_zip_read(spmi_torch *t)
{
    spm_archive *archive = t->pickle.archive;
    spm_context *ctx = archive->ctx;
    spm_error *err = t->pickle.err;
    uint64_t offset = 0, size = 0, count = 0;
    int64_t i, pickle = -1, order;
    char name[256];
    uint8_t *at;
    spmi_pickle_value root;
    spm_status status = spmi_zip_directory(archive, &offset, &size, &count, err);
    if (status) return status;
    t->directory = (uint8_t *)spmi_alloc(ctx, (size_t)size + 1);
    t->keys = (spmi_torch_key *)spmi_alloc_array(ctx, (int64_t)count + 1, sizeof(spmi_torch_key));
    archive->storages = (spmi_storage *)spmi_alloc_array(ctx, (int64_t)count + 1, sizeof(spmi_storage));
    if (!t->directory || !t->keys || !archive->storages) return spmi_fail_memory(ctx, err, archive->source.name);
    status = spmi_source_read(&archive->source, offset, t->directory, (size_t)size, err);
    if (status) return status;
    for (i = 0, at = t->directory; i < (int64_t)count; i++) {
        uint8_t *next = spmi_zip_record(at, t->directory + size, &t->keys[i], &archive->storages[i]);
        size_t length;
        if (!next)
            return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: record %lld of its central directory (offset %llu) is damaged",
                             archive->source.name, (long long)i, (unsigned long long)(offset + (uint64_t)(at - t->directory)));
        length = strlen(t->keys[i].name);
        if (length >= 8 && length < sizeof t->prefix && spmi_string_equal(t->keys[i].name + length - 8, "data.pkl")
            && (length == 8 || t->keys[i].name[length - 9] == '/') && (pickle < 0 || length < strlen(t->keys[pickle].name)))
            pickle = i;
        at = next;
    }
    t->keys_count = (int64_t)count;
    if (pickle < 0)
        return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: is a zip file without data.pkl: not a checkpoint of torch.save", archive->source.name);
    (void)spmi_format(t->prefix, sizeof t->prefix, "%.*s", (int)strlen(t->keys[pickle].name) - 8, t->keys[pickle].name);
    if (!spmi_names_build(ctx, &t->names, t->keys, sizeof(spmi_torch_key), t->keys_count, NULL))
        return spmi_fail_memory(ctx, err, archive->source.name);
    (void)spmi_format(name, sizeof name, "%sbyteorder", t->prefix);
    order = spmi_names_find(&t->names, name);
    if (order >= 0 && archive->storages[order].size == 3)
        return spmi_fail(ctx, err, SPM_E_UNSUPPORTED, "%s: was written by a big-endian machine; save it again on another one", archive->source.name);
    status = spmi_torch_zip_entry(t, pickle);
    if (status) return status;
    t->pickle.entry = "data.pkl";
    t->pickle.base = archive->storages[pickle].offset;
    t->pickle.limit = t->pickle.base + archive->storages[pickle].size;
    root = spmi_pickle_run(&t->pickle);
    return t->pickle.status ? t->pickle.status : spmi_torch_collect(t, root);
}

static spm_status spmi_torch_zip_open(spm_archive *archive, spm_error *err)
{
    spmi_torch *t = (spmi_torch *)spmi_alloc_zero(archive->ctx, sizeof *t);
    spm_status status;
    if (!t) return spmi_fail_memory(archive->ctx, err, archive->source.name);
    t->pickle.archive = archive;
    t->pickle.err = err;
    status = spmi_torch_zip_read(t);
    spmi_torch_free(t);
    spmi_free(archive->ctx, t);
    return status;
}

/* ---- torch files before 1.6: magic number, protocol version, system info, tree, storage keys (five pickles), then for
 * every key the number of elements (int64) and the elements ---- */

static spm_status spmi_torch_legacy_storages(spmi_torch *t, spmi_pickle_value list)
{
    spmi_pickle *p = &t->pickle;
    spm_archive *archive = p->archive;
    uint64_t at = p->base + p->at;
    uint32_t cell, ids = (uint32_t)p->storages_used, i;
    int64_t used = 0, bytes;
    if (list.type != SPMI_P_LIST) return spmi_torch_fail(t, SPM_E_FORMAT, "the list of storages is missing; the file is damaged");
    t->keys = (spmi_torch_key *)spmi_alloc_array(archive->ctx, (int64_t)ids + 1, sizeof(spmi_torch_key));
    archive->storages = (spmi_storage *)spmi_alloc_array(archive->ctx, (int64_t)p->objects[list.bits].count + 1, sizeof(spmi_storage));
    if (!t->keys || !archive->storages) return spmi_fail_memory(archive->ctx, p->err, archive->source.name);
    for (i = 0; i < ids; i++) {
        spmi_torch_key *key = &t->keys[i];
        spmi_pickle_value type = spmi_pickle_at(p, p->storages[i], 1), count = spmi_pickle_at(p, p->storages[i], 4);
        key->name = spmi_pickle_text(p, spmi_pickle_at(p, p->storages[i], 2));
        key->storage = -1;
        if (!key->name || type.type != SPMI_P_GLOBAL || type.bits <= SPMI_G_STORAGE || count.type != SPMI_P_INT)
            return spmi_torch_fail(t, SPM_E_FORMAT, "a storage is not described as torch does; the file is damaged");
        key->dtype = (spm_dtype)(type.bits - SPMI_G_STORAGE);
        key->elements = (int64_t)count.bits;
    }
    t->keys_count = ids;
    if (!spmi_names_build(archive->ctx, &t->names, t->keys, sizeof(spmi_torch_key), t->keys_count, NULL))
        return spmi_fail_memory(archive->ctx, p->err, archive->source.name);
    for (cell = p->objects[list.bits].head; cell; cell = p->cells[cell - 1].next, used++) {
        const char *name = spmi_pickle_text(p, p->cells[cell - 1].value);
        int64_t index = name ? spmi_names_find(&t->names, name) : -1;
        uint8_t number[8];
        spm_status status;
        if (index < 0) return spmi_torch_fail(t, SPM_E_FORMAT, "a storage that no tensor uses; the file is damaged");
        status = spmi_source_read(&archive->source, at, number, sizeof number, p->err);
        if (status) return status;
        at += 8;
        if (spmi_pack_u64(number) != (uint64_t)t->keys[index].elements
            || !spmi_mul_dim(t->keys[index].elements, spmi_dtype_size(t->keys[index].dtype), &bytes)
            || (uint64_t)bytes > archive->source.size - at)
            return spmi_fail(archive->ctx, p->err, SPM_E_FORMAT,
                             "%s: storage %.60s at offset %llu claims %llu elements, which do not fit; the file was cut short or damaged",
                             archive->source.name, name, (unsigned long long)at - 8, (unsigned long long)spmi_pack_u64(number));
        t->keys[index].storage = used;
        archive->storages[used].offset = at;
        archive->storages[used].size = (uint64_t)bytes;
        at += (uint64_t)bytes;
    }
    return SPM_OK;
}

static spm_status spmi_torch_legacy_read(spmi_torch *t)
{
    static const uint8_t magic[10] = { 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19 };
    spmi_pickle *p = &t->pickle;
    spm_archive *archive = p->archive;
    spmi_pickle_value value, root, system;
    uint32_t cell;
    spm_status status;
    p->entry = "pickle";
    p->limit = archive->source.size;
    value = spmi_pickle_run(p);
    if (!p->status && (value.type != SPMI_P_BIG || value.length != 10 || memcmp(p->bytes + value.bits, magic, 10) != 0))
        return spmi_fail(archive->ctx, p->err, SPM_E_FORMAT, "%s: is a pickle, but not one of torch.save", archive->source.name);
    value = spmi_pickle_run(p);
    if (!p->status && (value.type != SPMI_P_INT || value.bits != 1001))
        return spmi_fail(archive->ctx, p->err, SPM_E_UNSUPPORTED, "%s: has an unknown version of torch's old format; save it again",
                         archive->source.name);
    system = spmi_pickle_run(p);
    root = spmi_pickle_run(p);
    value = spmi_pickle_run(p);
    if (p->status) return p->status;
    for (cell = system.type == SPMI_P_DICT ? p->objects[system.bits].head : 0; cell; cell = p->cells[cell - 1].next) {
        const char *key = spmi_pickle_text(p, p->cells[cell - 1].value);
        cell = p->cells[cell - 1].next;
        if (key && spmi_string_equal(key, "little_endian") && p->cells[cell - 1].value.type == SPMI_P_BOOL && !p->cells[cell - 1].value.bits)
            return spmi_fail(archive->ctx, p->err, SPM_E_UNSUPPORTED, "%s: was written by a big-endian machine; save it again on another one",
                             archive->source.name);
    }
    status = spmi_torch_legacy_storages(t, value);
    return status ? status : spmi_torch_collect(t, root);
}

static spm_status spmi_torch_legacy_open(spm_archive *archive, spm_error *err)
{
    spmi_torch *t = (spmi_torch *)spmi_alloc_zero(archive->ctx, sizeof *t);
    spm_status status;
    if (!t) return spmi_fail_memory(archive->ctx, err, archive->source.name);
    t->pickle.archive = archive;
    t->pickle.err = err;
    status = spmi_torch_legacy_read(t);
    spmi_torch_free(t);
    spmi_free(archive->ctx, t);
    return status;
}

/* ---- archives: opening, finding, reading with conversion ---- */

SPMDEF void spm_archive_close(spm_archive *archive)
{
    spm_context *ctx;
    if (!archive) return;
    ctx = archive->ctx;
    spmi_source_close(&archive->source);
    spmi_free(ctx, archive->tensors);
    spmi_free(ctx, archive->storage_of);
    spmi_free(ctx, archive->storages);
    spmi_free(ctx, archive->names.slots);
    spm_json_free(ctx, archive->header);
    spmi_free(ctx, archive->text);
    spmi_free(ctx, archive->buffer);
    spmi_free(ctx, archive);
}

/* Finds the format by the first bytes and reads the header. */
static spm_status spmi_archive_open_source(spm_archive *archive, spm_error *err)
{
    spm_context *ctx = archive->ctx;
    uint64_t size = archive->source.size, length;
    uint8_t head[16];
    int64_t repeated;
    spm_status status;
    memset(head, 0, sizeof head);
    status = spmi_source_read(&archive->source, 0, head, (size_t)SPMI_MIN(size, (uint64_t)sizeof head), err);
    if (status) return status;
    length = spmi_pack_u64(head);
    archive->buffer = (uint8_t *)spmi_alloc(ctx, SPMI_ARCHIVE_BUFFER);
    if (!archive->buffer) return spmi_fail_memory(ctx, err, archive->source.name);
    spmi_crc_init(&archive->crc);
    if (memcmp(head, "PK\3\4", 4) == 0) {
        archive->format = SPMI_TORCH_ZIP;
        status = spmi_torch_zip_open(archive, err);
    } else if (head[0] == 0x80 && head[1] >= 2 && head[1] <= 5 && size >= 16) {
        archive->format = SPMI_TORCH_LEGACY;
        status = spmi_torch_legacy_open(archive, err);
    } else if (size >= 9 && head[8] == '{') {
        archive->format = SPMI_SAFETENSORS;
        if (length > size - 8 || length > SPMI_SAFETENSORS_HEADER_MAX)
            return spmi_fail(ctx, err, SPM_E_FORMAT,
                             "%s: its header of %llu bytes does not fit a file of %llu bytes; it was cut short or damaged",
                             archive->source.name, (unsigned long long)length, (unsigned long long)size);
        status = spmi_safetensors_open(archive, length, err);
    } else {
        return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: is neither a safetensors file nor a file of torch.save (%llu bytes)",
                         archive->source.name, (unsigned long long)size);
    }
    if (status) return status;
    if (!spmi_names_build(ctx, &archive->names, archive->tensors, sizeof(spm_archive_tensor), archive->count, &repeated))
        return spmi_fail_memory(ctx, err, archive->source.name);
    if (repeated >= 0)
        return spmi_fail(ctx, err, SPM_E_FORMAT, "%s: the name %.100s occurs twice; the file is damaged", archive->source.name,
                         archive->tensors[repeated].name);
    return SPM_OK;
}

SPMDEF spm_archive *spm_archive_open(spm_context *ctx, const char *path, spm_error *err)
{
    spm_archive *archive = (spm_archive *)spmi_alloc_zero(ctx, sizeof *archive);
    if (!archive) {
        (void)spmi_fail_memory(ctx, err, path);
        return NULL;
    }
    archive->ctx = ctx;
    archive->source.ctx = ctx;
    if (spmi_source_open(&archive->source, ctx, path, err) || spmi_archive_open_source(archive, err)) {
        spm_archive_close(archive);
        return NULL;
    }
    return archive;
}

SPMDEF spm_archive *spm_archive_open_memory(spm_context *ctx, const char *name, const void *data, size_t size, spm_error *err)
{
    spm_archive *archive = (spm_archive *)spmi_alloc_zero(ctx, sizeof *archive);
    if (!archive) {
        (void)spmi_fail_memory(ctx, err, name);
        return NULL;
    }
    archive->ctx = ctx;
    archive->source.ctx = ctx;
    if (spmi_source_memory(&archive->source, ctx, name, data, size, err) || spmi_archive_open_source(archive, err)) {
        spm_archive_close(archive);
        return NULL;
    }
    return archive;
}

SPMDEF const char *spm_archive_format(const spm_archive *archive)
{
    switch (archive->format) {
    case SPMI_TORCH_ZIP: return "torch zip";
    case SPMI_TORCH_LEGACY: return "torch legacy";
    case SPMI_SAFETENSORS: break;
    }
    return "safetensors";
}

SPMDEF int64_t spm_archive_count(const spm_archive *archive)
{
    return archive->count;
}

SPMDEF const spm_archive_tensor *spm_archive_tensor_at(const spm_archive *archive, int64_t index)
{
    return index >= 0 && index < archive->count ? &archive->tensors[index] : NULL;
}

SPMDEF const spm_archive_tensor *spm_archive_find(const spm_archive *archive, const char *name)
{
    return spm_archive_tensor_at(archive, spmi_names_find(&archive->names, name));
}

SPMDEF const char *spm_archive_metadata(const spm_archive *archive, const char *key)
{
    return spm_json_as_string(spm_json_get(spm_json_get(archive->header, "__metadata__"), key), NULL);
}

/* IEEE 754 binary16; exact, as every half is a float. */
static float spmi_half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u, bits;
    float value;
    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24 */
        value = (float)fraction * (1.0f / 16777216.0f);
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double spmi_archive_double(spm_dtype dtype, const uint8_t *at)
{
    uint64_t wide;
    uint32_t bits;
    double value;
    float single;
    switch (dtype) {
    case SPM_F64:
        wide = spmi_pack_u64(at);
        memcpy(&value, &wide, sizeof value);
        return value;
    case SPM_F16: return (double)spmi_half_to_float(spmi_pack_u16(at));
    case SPM_F32: bits = spmi_pack_u32(at); break;
    default: bits = (uint32_t)spmi_pack_u16(at) << 16; break; /* SPM_BF16: the upper half of a float */
    }
    memcpy(&single, &bits, sizeof single);
    return (double)single;
}

/* Two's complement of 1, 2, 4 or 8 bytes. */
static int64_t spmi_archive_integer(spm_dtype dtype, const uint8_t *at)
{
    uint64_t wide;
    int64_t value;
    switch (dtype) {
    case SPM_I64: wide = spmi_pack_u64(at); break;
    case SPM_I32: wide = (uint64_t)spmi_pack_u32(at) | (at[3] & 0x80 ? 0xFFFFFFFF00000000u : 0u); break;
    case SPM_I16: wide = (uint64_t)spmi_pack_u16(at) | (at[1] & 0x80 ? 0xFFFFFFFFFFFF0000u : 0u); break;
    case SPM_I8: wide = (uint64_t)at[0] | (at[0] & 0x80 ? 0xFFFFFFFFFFFFFF00u : 0u); break;
    case SPM_BOOL: wide = at[0] != 0; break;
    default: wide = at[0]; break;
    }
    memcpy(&value, &wide, sizeof value);
    return value;
}

static int spmi_dtype_float(spm_dtype dtype)
{
    return dtype == SPM_F32 || dtype == SPM_F64 || dtype == SPM_F16 || dtype == SPM_BF16;
}

/* n elements `step` bytes apart become floats.  Types that weights really have get loops of their own. */
static void spmi_archive_to_float(spm_dtype dtype, const uint8_t *in, ptrdiff_t step, int64_t n, float *out)
{
    int64_t i;
    uint32_t bits;
    if (dtype == SPM_F32 || dtype == SPM_BF16) {
        for (i = 0; i < n; i++, in += step) {
            bits = dtype == SPM_F32 ? spmi_pack_u32(in) : (uint32_t)spmi_pack_u16(in) << 16;
            memcpy(&out[i], &bits, sizeof bits);
        }
    } else if (dtype == SPM_F16) {
        for (i = 0; i < n; i++, in += step) out[i] = spmi_half_to_float(spmi_pack_u16(in));
    } else if (dtype == SPM_F64) {
        for (i = 0; i < n; i++, in += step) out[i] = (float)spmi_archive_double(dtype, in);
    } else {
        for (i = 0; i < n; i++, in += step) out[i] = (float)spmi_archive_integer(dtype, in);
    }
}

/* The same for int64_t; the index of the first element that is no such integer, or -1. */
static int64_t spmi_archive_to_integer(spm_dtype dtype, const uint8_t *in, ptrdiff_t step, int64_t n, int64_t *out)
{
    int64_t i;
    for (i = 0; i < n; i++, in += step) {
        if (spmi_dtype_float(dtype)) {
            double value = spmi_archive_double(dtype, in);
            if (!(value >= -9223372036854775808.0 && value < 9223372036854775808.0)) return i;
            out[i] = (int64_t)value;
            if ((double)out[i] > value || (double)out[i] < value) return i;
        } else {
            out[i] = spmi_archive_integer(dtype, in);
        }
    }
    return -1;
}

static int spmi_archive_contiguous(const spm_archive_tensor *tensor)
{
    int64_t expected = 1;
    int axis;
    for (axis = tensor->rank - 1; axis >= 0; axis--) {
        if (tensor->shape[axis] != 1 && tensor->stride[axis] != expected) return 0;
        expected *= tensor->shape[axis];
    }
    return 1;
}

/* Reads a storage through once for its CRC: for tensors that are only a part of it. */
static spm_status spmi_archive_verify(spm_archive *archive, const spm_archive_tensor *tensor, spmi_storage *storage, spm_error *err)
{
    uint64_t at = storage->offset, end = storage->offset + storage->size;
    uint32_t crc = 0;
    while (at < end) {
        size_t bytes = (size_t)SPMI_MIN(end - at, (uint64_t)SPMI_ARCHIVE_BUFFER);
        spm_status status = spmi_source_read(&archive->source, at, archive->buffer, bytes, err);
        if (status) return status;
        crc = spmi_crc_add(&archive->crc, crc, archive->buffer, bytes);
        at += bytes;
    }
    return spmi_archive_check_crc(archive, tensor, storage, crc, err);
}

/* Where converted elements go: exactly one of the two is set. */
typedef struct spmi_archive_target {
    float *floats;
    int64_t *integers;
} spmi_archive_target;

static spm_status spmi_archive_convert(spm_archive *archive, const spm_archive_tensor *tensor, const uint8_t *in, ptrdiff_t step,
                                       int64_t first, int64_t n, spmi_archive_target out, spm_error *err)
{
    int64_t bad = -1;
    if (out.floats) spmi_archive_to_float(tensor->dtype, in, step, n, out.floats + first);
    else bad = spmi_archive_to_integer(tensor->dtype, in, step, n, out.integers + first);
    if (bad < 0) return SPM_OK;
    return spmi_fail(archive->ctx, err, SPM_E_FORMAT, "%s: %.100s: element %lld is %.9g, which is not a 64-bit integer",
                     archive->source.name, tensor->name, (long long)(first + bad),
                     spmi_archive_double(tensor->dtype, in + (ptrdiff_t)bad * step));
}

/* Any strides: the span of the tensor is read as a whole, then walked row by row. */
static spm_status spmi_archive_read_strided(spm_archive *archive, const spm_archive_tensor *tensor, spmi_archive_target out,
                                            spm_error *err)
{
    int64_t index[SPM_ARCHIVE_MAX_RANK], span = 1, done = 0, row = tensor->shape[tensor->rank - 1], from = 0;
    int size = spmi_dtype_size(tensor->dtype), axis;
    ptrdiff_t step = (ptrdiff_t)tensor->stride[tensor->rank - 1] * size;
    spm_status status;
    uint8_t *bytes;
    for (axis = 0; axis < tensor->rank; axis++) { /* cannot overflow: checked against the storage at opening */
        span += (tensor->shape[axis] - 1) * tensor->stride[axis];
        index[axis] = 0;
    }
    if ((uint64_t)span > SIZE_MAX / 8 || (bytes = (uint8_t *)spmi_alloc(archive->ctx, (size_t)span * (size_t)size)) == NULL)
        return spmi_fail_memory(archive->ctx, err, tensor->name);
    status = spmi_source_read(&archive->source, tensor->offset, bytes, (size_t)span * (size_t)size, err);
    while (!status && done < tensor->count) {
        status = spmi_archive_convert(archive, tensor, bytes + (ptrdiff_t)from * size, step, done, row, out, err);
        done += row;
        for (axis = tensor->rank - 2; axis >= 0; axis--) {
            from += tensor->stride[axis];
            if (++index[axis] < tensor->shape[axis]) break;
            from -= tensor->stride[axis] * tensor->shape[axis];
            index[axis] = 0;
        }
    }
    spmi_free(archive->ctx, bytes);
    return status;
}

static spm_status spmi_archive_read(spm_archive *archive, const spm_archive_tensor *tensor, spmi_archive_target out, spm_error *err)
{
    size_t size = (size_t)spmi_dtype_size(tensor->dtype);
    spmi_storage *storage = archive->storage_of ? &archive->storages[archive->storage_of[tensor - archive->tensors]] : NULL;
    int whole;
    uint32_t crc = 0;
    int64_t done = 0, chunk;
    spm_status status = SPM_OK;
    if (tensor->count == 0) return SPM_OK;
    if ((uint64_t)tensor->count > SIZE_MAX / 8) return spmi_fail_memory(archive->ctx, err, tensor->name);
    whole = spmi_archive_contiguous(tensor) && storage && storage->check && storage->offset == tensor->offset
            && storage->size == (uint64_t)tensor->count * size;
    if (storage && storage->check && !whole && (status = spmi_archive_verify(archive, tensor, storage, err)) != SPM_OK) return status;
    if (!spmi_archive_contiguous(tensor)) return spmi_archive_read_strided(archive, tensor, out, err);
    if (spmi_host_little() && (out.floats ? tensor->dtype == SPM_F32 : tensor->dtype == SPM_I64)) { /* straight into `out` */
        uint8_t *bytes = out.floats ? (uint8_t *)out.floats : (uint8_t *)out.integers;
        size_t total = (size_t)tensor->count * size, at;
        for (at = 0; at < total && !status; at += 4 * SPMI_ARCHIVE_BUFFER) { /* pieces that the CRC finds in the cache */
            size_t piece = SPMI_MIN(total - at, (size_t)4 * SPMI_ARCHIVE_BUFFER);
            if (!whole) piece = total - at;
            status = spmi_source_read(&archive->source, tensor->offset + at, bytes + at, piece, err);
            if (whole && !status) crc = spmi_crc_add(&archive->crc, crc, bytes + at, piece);
            if (!whole) break;
        }
    } else {
        for (; done < tensor->count && !status; done += chunk) {
            chunk = SPMI_MIN(tensor->count - done, (int64_t)(SPMI_ARCHIVE_BUFFER / size));
            status = spmi_source_read(&archive->source, tensor->offset + (uint64_t)done * size, archive->buffer, (size_t)chunk * size, err);
            if (status) break;
            if (whole) crc = spmi_crc_add(&archive->crc, crc, archive->buffer, (size_t)chunk * size);
            status = spmi_archive_convert(archive, tensor, archive->buffer, (ptrdiff_t)size, done, chunk, out, err);
        }
    }
    return whole && !status ? spmi_archive_check_crc(archive, tensor, storage, crc, err) : status;
}

SPMDEF spm_status spm_archive_read_f32(spm_archive *archive, const spm_archive_tensor *tensor, float *out, spm_error *err)
{
    spmi_archive_target target = SPM_ZERO;
    target.floats = out;
    return spmi_archive_read(archive, tensor, target, err);
}

SPMDEF spm_status spm_archive_read_i64(spm_archive *archive, const spm_archive_tensor *tensor, int64_t *out, spm_error *err)
{
    spmi_archive_target target = SPM_ZERO;
    target.integers = out;
    return spmi_archive_read(archive, tensor, target, err);
}

/* ---- archives: writing ---- */

/* One declared tensor.  The name comes first: spmi_names wants it there. */
typedef struct spmi_declared {
    const char *name;
    int64_t shape[SPM_ARCHIVE_MAX_RANK], count;
    uint64_t bytes;
    int rank;
    spm_dtype dtype;
} spmi_declared;

/* One finished entry of a zip, for its central directory. */
typedef struct spmi_zip_item {
    char name[40];
    uint64_t offset, size; /* of the local header; of the data */
    uint32_t crc;
} spmi_zip_item;

struct spm_archive_writer {
    spm_context *ctx;
    spmi_writer file;
    spm_error error;          /* the first failure; commit reports it */
    spm_archive_kind kind;
    spmi_declared *declared;
    size_t declared_room;     /* bytes */
    int64_t count, next;      /* declared; the one that the next put writes */
    int started;
    uint64_t position;
    spm_json *metadata;
    spmi_zip_item *items;
    int64_t items_used;
    spmi_crc crc;
};

#define SPMI_ZIP_ALIGN 64

SPMDEF void spm_archive_abort(spm_archive_writer *writer)
{
    int64_t i;
    spm_context *ctx;
    union { const char *name; void *memory; } owned; /* takes the const off a name that is ours */
    if (!writer) return;
    ctx = writer->ctx;
    spmi_writer_abort(&writer->file);
    for (i = 0; i < writer->count; i++) {
        owned.name = writer->declared[i].name;
        spmi_free(ctx, owned.memory);
    }
    spmi_free(ctx, writer->declared);
    spmi_free(ctx, writer->items);
    spm_json_destroy(writer->metadata);
    spmi_free(ctx, writer);
}

SPMDEF spm_archive_writer *spm_archive_create(spm_context *ctx, const char *path, spm_archive_kind kind, spm_error *err)
{
    spm_archive_writer *writer = (spm_archive_writer *)spmi_alloc_zero(ctx, sizeof *writer);
    if (!writer || (writer->metadata = spm_json_create(ctx)) == NULL) {
        spmi_free(ctx, writer);
        (void)spmi_fail_memory(ctx, err, path);
        return NULL;
    }
    writer->ctx = ctx;
    writer->file.ctx = ctx;
    writer->kind = kind;
    spmi_crc_init(&writer->crc);
    spm_json_object_begin(writer->metadata, NULL);
    if (spmi_writer_open(&writer->file, ctx, path, err)) {
        spm_archive_abort(writer);
        return NULL;
    }
    return writer;
}

SPMDEF void spm_archive_add_metadata(spm_archive_writer *writer, const char *key, const char *value)
{
    if (writer->started)
        (void)spmi_fail(writer->ctx, &writer->error, SPM_E_STATE, "%s: metadata \"%.60s\" comes after the first tensor's values",
                        writer->file.path, key);
    else
        spm_json_string(writer->metadata, key, value);
}

SPMDEF void spm_archive_add(spm_archive_writer *writer, const char *name, spm_dtype dtype, int rank, const int64_t *shape)
{
    spmi_declared *tensor;
    void *memory = writer->declared;
    int64_t bytes;
    int axis;
    spm_error *err = &writer->error;
    const char *path = writer->file.path;
    if (err->status) return;
    if (writer->started || rank < 0 || rank > SPM_ARCHIVE_MAX_RANK || !spmi_dtype_size(dtype)) {
        (void)spmi_fail(writer->ctx, err, writer->started ? SPM_E_STATE : SPM_E_ARGUMENT,
                        "%s: %.100s: declared after the first tensor's values, or with a bad dtype or rank (%d)", path, name, rank);
        return;
    }
    if (!spmi_grow(writer->ctx, &memory, (size_t)writer->count * sizeof *tensor, &writer->declared_room,
                   ((size_t)writer->count + 1) * sizeof *tensor)) {
        (void)spmi_fail_memory(writer->ctx, err, path);
        return;
    }
    writer->declared = (spmi_declared *)memory;
    tensor = &writer->declared[writer->count];
    memset(tensor, 0, sizeof *tensor);
    tensor->dtype = dtype;
    tensor->rank = rank;
    tensor->count = 1;
    for (axis = 0; axis < rank; axis++) {
        tensor->shape[axis] = shape[axis];
        if (!spmi_mul_dim(tensor->count, shape[axis], &tensor->count)) break;
    }
    if (axis < rank || !spmi_mul_dim(tensor->count, spmi_dtype_size(dtype), &bytes)
        || (writer->kind == SPM_ARCHIVE_TORCH && bytes > (int64_t)0xFFFFFFFE)) {
        (void)spmi_fail(writer->ctx, err, SPM_E_SHAPE, "%s: %.100s: its shape is negative or too large for this format", path, name);
        return;
    }
    tensor->bytes = (uint64_t)bytes;
    tensor->name = spmi_string_copy(writer->ctx, name, strlen(name));
    if (!tensor->name) (void)spmi_fail_memory(writer->ctx, err, path);
    else writer->count++;
}

static void spmi_archive_put_bytes(spm_archive_writer *writer, const void *data, size_t size)
{
    spmi_writer_put(&writer->file, data, size);
    writer->position += size;
}

/* Header length, header padded with blanks so that the data begin at a multiple of 64. */
static void spmi_safetensors_start(spm_archive_writer *writer)
{
    spm_json *json = spm_json_create(writer->ctx);
    const char *metadata, *text;
    uint64_t begin = 0, length;
    uint8_t number[8];
    int64_t i;
    int axis;
    spm_json_object_end(writer->metadata);
    metadata = spm_json_finish(writer->metadata);
    spm_json_object_begin(json, NULL);
    if (metadata && strlen(metadata) > 2) spm_json_raw(json, "__metadata__", metadata);
    for (i = 0; i < writer->count; i++) {
        const spmi_declared *tensor = &writer->declared[i];
        spm_json_object_begin(json, tensor->name);
        spm_json_string(json, "dtype", spm_dtype_name(tensor->dtype));
        spm_json_array_begin(json, "shape");
        for (axis = 0; axis < tensor->rank; axis++) spm_json_int(json, NULL, tensor->shape[axis]);
        spm_json_array_end(json);
        spm_json_array_begin(json, "data_offsets");
        spm_json_int(json, NULL, (int64_t)begin);
        begin += tensor->bytes;
        spm_json_int(json, NULL, (int64_t)begin);
        spm_json_array_end(json);
        spm_json_object_end(json);
    }
    spm_json_object_end(json);
    text = spm_json_finish(json);
    if (!text || !metadata) {
        (void)spmi_fail_memory(writer->ctx, &writer->error, writer->file.path);
    } else {
        length = strlen(text);
        spmi_pack_put(number, (length + 8 + 63) / 64 * 64 - 8, 8);
        spmi_archive_put_bytes(writer, number, 8);
        spmi_archive_put_bytes(writer, text, (size_t)length);
        while (writer->position % 64) spmi_archive_put_bytes(writer, " ", 1);
    }
    spm_json_destroy(json);
}

/* ---- the zip of torch.save ---- */

/* Local header of a stored entry; an extra field of zeros puts its data on a multiple of 64. */
static void spmi_zip_begin(spm_archive_writer *writer, const char *name, uint64_t size, uint32_t crc)
{
    spmi_zip_item *item = &writer->items[writer->items_used++];
    uint8_t head[30 + 40 + 4 + 2 * SPMI_ZIP_ALIGN];
    size_t length, extra = 0;
    memset(head, 0, sizeof head);
    (void)spmi_format(item->name, sizeof item->name, "%s", name);
    length = strlen(item->name);
    item->offset = writer->position;
    item->size = size;
    item->crc = crc;
    if ((writer->position + 30 + length) % SPMI_ZIP_ALIGN)
        extra = 4 + (size_t)((SPMI_ZIP_ALIGN - (writer->position + 34 + length) % SPMI_ZIP_ALIGN) % SPMI_ZIP_ALIGN);
    spmi_pack_put(head, 0x04034B50u, 4);
    spmi_pack_put(head + 4, 20, 2);
    spmi_pack_put(head + 6, 0x0800, 2);   /* names are UTF-8 */
    spmi_pack_put(head + 12, 0x0021, 2);  /* 1980-01-01: files do not depend on the clock */
    spmi_pack_put(head + 14, crc, 4);
    spmi_pack_put(head + 18, size, 4);
    spmi_pack_put(head + 22, size, 4);
    spmi_pack_put(head + 26, length, 2);
    spmi_pack_put(head + 28, extra, 2);
    memcpy(head + 30, item->name, length);
    if (extra) {
        spmi_pack_put(head + 30 + length, 0x4246, 2);
        spmi_pack_put(head + 32 + length, extra - 4, 2);
    }
    spmi_archive_put_bytes(writer, head, 30 + length + extra);
}

static void spmi_zip_small(spm_archive_writer *writer, const char *name, const void *data, size_t size)
{
    spmi_zip_begin(writer, name, size, spmi_crc_add(&writer->crc, 0, data, size));
    spmi_archive_put_bytes(writer, data, size);
}

/* Central directory, with the zip64 records where a number needs them. */
static void spmi_zip_finish(spm_archive_writer *writer)
{
    uint64_t begin = writer->position, size, count = (uint64_t)writer->items_used;
    uint8_t end[56 + 20 + 22];
    int64_t i;
    int big;
    for (i = 0; i < writer->items_used; i++) {
        const spmi_zip_item *item = &writer->items[i];
        size_t length = strlen(item->name);
        int far = item->offset >= 0xFFFFFFFFu;
        uint8_t head[46 + 40 + 12];
        memset(head, 0, sizeof head);
        spmi_pack_put(head, 0x02014B50u, 4);
        spmi_pack_put(head + 4, far ? 45 : 20, 2);
        spmi_pack_put(head + 6, far ? 45 : 20, 2);
        spmi_pack_put(head + 8, 0x0800, 2);
        spmi_pack_put(head + 14, 0x0021, 2);
        spmi_pack_put(head + 16, item->crc, 4);
        spmi_pack_put(head + 20, item->size, 4);
        spmi_pack_put(head + 24, item->size, 4);
        spmi_pack_put(head + 28, length, 2);
        spmi_pack_put(head + 30, far ? 12 : 0, 2);
        spmi_pack_put(head + 42, far ? 0xFFFFFFFFu : item->offset, 4);
        memcpy(head + 46, item->name, length);
        if (far) {
            spmi_pack_put(head + 46 + length, 1, 2);
            spmi_pack_put(head + 48 + length, 8, 2);
            spmi_pack_put(head + 50 + length, item->offset, 8);
        }
        spmi_archive_put_bytes(writer, head, 46 + length + (far ? 12 : 0));
    }
    size = writer->position - begin;
    big = begin >= 0xFFFFFFFFu || size >= 0xFFFFFFFFu || count >= 0xFFFFu;
    memset(end, 0, sizeof end);
    spmi_pack_put(end, 0x06064B50u, 4);
    spmi_pack_put(end + 4, 44, 8);
    spmi_pack_put(end + 12, 45, 2);
    spmi_pack_put(end + 14, 45, 2);
    spmi_pack_put(end + 24, count, 8);
    spmi_pack_put(end + 32, count, 8);
    spmi_pack_put(end + 40, size, 8);
    spmi_pack_put(end + 48, begin, 8);
    spmi_pack_put(end + 56, 0x07064B50u, 4);
    spmi_pack_put(end + 64, begin + size, 8);
    spmi_pack_put(end + 72, 1, 4);
    spmi_pack_put(end + 76, 0x06054B50u, 4);
    spmi_pack_put(end + 84, SPMI_MIN(count, 0xFFFFu), 2);
    spmi_pack_put(end + 86, SPMI_MIN(count, 0xFFFFu), 2);
    spmi_pack_put(end + 88, SPMI_MIN(size, 0xFFFFFFFFu), 4);
    spmi_pack_put(end + 92, SPMI_MIN(begin, 0xFFFFFFFFu), 4);
    if (big) spmi_archive_put_bytes(writer, end, sizeof end);
    else spmi_archive_put_bytes(writer, end + 76, 22);
}

static void spmi_pickle_string(spmi_text *out, const char *string)
{
    size_t length = strlen(string);
    uint8_t head[5];
    char bytes[5];
    head[0] = 'X'; /* BINUNICODE */
    spmi_pack_put(head + 1, length, 4);
    memcpy(bytes, head, 5);
    spmi_text_append(out, bytes, 5);
    spmi_text_append(out, string, length);
}

static void spmi_pickle_int(spmi_text *out, int64_t value)
{
    uint8_t head[11];
    char bytes[11];
    int length;
    if (value <= 0x7FFFFFFF) { /* BININT */
        head[0] = 'J';
        spmi_pack_put(head + 1, (uint64_t)value, 4);
        length = 5;
    } else { /* LONG1 of eight bytes */
        head[0] = 0x8A;
        head[1] = 8;
        spmi_pack_put(head + 2, (uint64_t)value, 8);
        length = 10;
    }
    memcpy(bytes, head, (size_t)length);
    spmi_text_append(out, bytes, (size_t)length);
}

/* The pickle (protocol 2) of OrderedDict([(name, torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False,
 * OrderedDict())), ...]), storages being persistent ids ('storage', type, key, 'cpu', elements). */
static void spmi_torch_pickle(const spm_archive_writer *writer, spmi_text *out)
{
    int64_t i, stride[SPM_ARCHIVE_MAX_RANK];
    int axis;
    spmi_text_add(out, "\x80\x02" "ccollections\nOrderedDict\n)R(");
    for (i = 0; i < writer->count; i++) {
        const spmi_declared *tensor = &writer->declared[i];
        char key[24];
        int64_t step = 1;
        (void)spmi_format(key, sizeof key, "%lld", (long long)i);
        spmi_pickle_string(out, tensor->name);
        spmi_text_add(out, "ctorch._utils\n_rebuild_tensor_v2\n((");
        spmi_pickle_string(out, "storage");
        spmi_text_addf(out, "ctorch\n%s\n", spmi_torch_storage_name(tensor->dtype));
        spmi_pickle_string(out, key);
        spmi_pickle_string(out, "cpu");
        spmi_pickle_int(out, tensor->count);
        spmi_text_add(out, "tQ");
        spmi_pickle_int(out, 0);
        spmi_text_add(out, "(");
        for (axis = 0; axis < tensor->rank; axis++) spmi_pickle_int(out, tensor->shape[axis]);
        spmi_text_add(out, "t(");
        for (axis = tensor->rank - 1; axis >= 0; axis--) {
            stride[axis] = step;
            step *= SPMI_MAX(tensor->shape[axis], 1);
        }
        for (axis = 0; axis < tensor->rank; axis++) spmi_pickle_int(out, stride[axis]);
        spmi_text_add(out, "t\x89" "ccollections\nOrderedDict\n)RtR");
    }
    spmi_text_add(out, "u.");
}

static void spmi_torch_start(spm_archive_writer *writer)
{
    spmi_text pickle = spmi_text_create(writer->ctx);
    writer->items = (spmi_zip_item *)spmi_alloc_array(writer->ctx, writer->count + 4, sizeof(spmi_zip_item));
    spmi_torch_pickle(writer, &pickle);
    if (!writer->items || pickle.failed || pickle.length > 0xFFFFFFFEu) {
        (void)spmi_fail_memory(writer->ctx, &writer->error, writer->file.path);
    } else {
        spmi_zip_small(writer, "archive/data.pkl", pickle.data, pickle.length);
        spmi_zip_small(writer, "archive/byteorder", "little", 6);
    }
    spmi_text_free(&pickle);
}

/* Everything is declared: names are checked and the header is written. */
static void spmi_archive_start(spm_archive_writer *writer)
{
    spmi_names names = SPM_ZERO;
    int64_t repeated = -1;
    if (writer->started || writer->error.status) return;
    writer->started = 1;
    if (!spmi_names_build(writer->ctx, &names, writer->declared, sizeof(spmi_declared), writer->count, &repeated)) {
        (void)spmi_fail_memory(writer->ctx, &writer->error, writer->file.path);
        return;
    }
    spmi_free(writer->ctx, names.slots);
    if (repeated >= 0)
        (void)spmi_fail(writer->ctx, &writer->error, SPM_E_ARGUMENT, "%s: the name %.100s is declared twice", writer->file.path,
                        writer->declared[repeated].name);
    else if (writer->kind == SPM_ARCHIVE_TORCH) spmi_torch_start(writer);
    else spmi_safetensors_start(writer);
}

/* Turns up to 4096 bytes of elements of `size` bytes into little-endian order. */
static size_t spmi_archive_swap(uint8_t *out, const uint8_t *in, size_t left, size_t size)
{
    size_t bytes = SPMI_MIN(left, (size_t)4096), i;
    for (i = 0; i < bytes; i++) out[i] = in[i / size * size + (size - 1 - i % size)];
    return bytes;
}

SPMDEF void spm_archive_put(spm_archive_writer *writer, const void *values)
{
    const uint8_t *in = (const uint8_t *)values;
    const spmi_declared *tensor;
    uint8_t swapped[4096];
    size_t at, piece, total, size;
    uint32_t crc = 0;
    spmi_archive_start(writer);
    if (writer->error.status) return;
    if (writer->next == writer->count) {
        (void)spmi_fail(writer->ctx, &writer->error, SPM_E_STATE, "%s: more tensors are written than the %lld that were declared",
                        writer->file.path, (long long)writer->count);
        return;
    }
    tensor = &writer->declared[writer->next];
    total = (size_t)tensor->bytes;
    size = (size_t)spmi_dtype_size(tensor->dtype);
    if (writer->kind == SPM_ARCHIVE_TORCH) {
        char name[40];
        if (spmi_host_little()) crc = spmi_crc_add(&writer->crc, 0, in, total);
        else for (at = 0; at < total; at += piece) {
            piece = spmi_archive_swap(swapped, in + at, total - at, size);
            crc = spmi_crc_add(&writer->crc, crc, swapped, piece);
        }
        (void)spmi_format(name, sizeof name, "archive/data/%lld", (long long)writer->next);
        spmi_zip_begin(writer, name, total, crc);
    }
    if (spmi_host_little()) spmi_archive_put_bytes(writer, in, total);
    else for (at = 0; at < total; at += piece) {
        piece = spmi_archive_swap(swapped, in + at, total - at, size);
        spmi_archive_put_bytes(writer, swapped, piece);
    }
    writer->next++;
}

SPMDEF spm_status spm_archive_commit(spm_archive_writer *writer, spm_error *err)
{
    spm_status status;
    spmi_archive_start(writer);
    if (!writer->error.status && writer->next < writer->count)
        (void)spmi_fail(writer->ctx, &writer->error, SPM_E_STATE, "%s: %.100s is declared, but its values were never written",
                        writer->file.path, writer->declared[writer->next].name);
    if (writer->error.status) {
        status = spmi_fail(writer->ctx, err, writer->error.status, "%s", writer->error.text);
    } else {
        if (writer->kind == SPM_ARCHIVE_TORCH) {
            spmi_zip_small(writer, "archive/version", "3\n", 2);
            spmi_zip_finish(writer);
        }
        status = spmi_writer_commit(&writer->file, err);
    }
    spm_archive_abort(writer);
    return status;
}
#undef SPMI_ZIP_ALIGN

/* ---- tar ---- */

typedef struct spmi_tar_entry {
    const char *name;
    uint64_t offset, size;
} spmi_tar_entry;

struct spm_tar {
    spm_context *ctx;
    spmi_source source;
    spmi_tar_entry *entries;
    size_t room;      /* bytes */
    int64_t count;
    spmi_names names;
};

SPMDEF void spm_tar_close(spm_tar *tar)
{
    int64_t i;
    union { const char *name; void *memory; } owned; /* takes the const off a name that is ours */
    if (!tar) return;
    for (i = 0; i < tar->count; i++) {
        owned.name = tar->entries[i].name;
        spmi_free(tar->ctx, owned.memory);
    }
    spmi_free(tar->ctx, tar->entries);
    spmi_free(tar->ctx, tar->names.slots);
    spmi_source_close(&tar->source);
    spmi_free(tar->ctx, tar);
}

/* A number field: octal digits with blanks around them, or (GNU) big-endian binary behind a byte 0x80.  0 on failure. */
static int spmi_tar_number(const uint8_t *field, size_t length, uint64_t *value)
{
    size_t i = 0;
    *value = 0;
    if (field[0] == 0x80) {
        for (i = 1; i < length; i++) {
            if (*value >> 55) return 0;
            *value = *value << 8 | field[i];
        }
        return 1;
    }
    while (i < length && field[i] == ' ') i++;
    for (; i < length && field[i] >= '0' && field[i] <= '7'; i++) {
        if (*value >> 60) return 0;
        *value = *value << 3 | (uint64_t)(field[i] - '0');
    }
    return i == length || field[i] == 0 || field[i] == ' ';
}

/* The sum over the header with the checksum field as blanks; old tars summed signed bytes. */
static int spmi_tar_checksum(const uint8_t *head)
{
    uint64_t wanted;
    int64_t sum = 0, old = 0;
    int i;
    for (i = 0; i < 512; i++) {
        int byte = i >= 148 && i < 156 ? ' ' : head[i];
        sum += byte;
        old += byte < 128 ? byte : byte - 256;
    }
    return spmi_tar_number(head + 148, 8, &wanted) && ((int64_t)wanted == sum || (int64_t)wanted == old);
}

static const char *spmi_tar_plain(const char *name)
{
    while (name[0] == '.' && name[1] == '/') {
        name += 2;
        while (*name == '/') name++;
    }
    return name;
}

/* What pax and GNU headers say about the entry that follows them. */
typedef struct spmi_tar_next {
    char *name;
    uint64_t size;
    int has_size;
} spmi_tar_next;

/* pax records "LENGTH KEY=VALUE\n"; path and size matter here. */
static spm_status spmi_tar_pax(spm_tar *tar, const char *text, size_t size, uint64_t offset, spmi_tar_next *next, spm_error *err)
{
    size_t at = 0;
    while (at < size && text[at]) {
        size_t length = 0, i = at, value;
        while (i < size && text[i] >= '0' && text[i] <= '9' && length <= size) length = length * 10 + (size_t)(text[i++] - '0');
        if (i >= size || text[i] != ' ' || length <= i - at + 1 || length > size - at || text[at + length - 1] != '\n')
            return spmi_fail(tar->ctx, err, SPM_E_FORMAT, "%s: offset %llu: a pax record is damaged", tar->source.name,
                             (unsigned long long)(offset + at));
        i++;
        value = i;
        while (value < at + length && text[value] != '=') value++;
        if (value < at + length) {
            size_t key = value - i, bytes = at + length - 1 - ++value;
            if (key == 4 && memcmp(text + i, "path", 4) == 0) {
                spmi_free(tar->ctx, next->name);
                next->name = spmi_string_copy(tar->ctx, text + value, bytes);
                if (!next->name) return spmi_fail_memory(tar->ctx, err, tar->source.name);
            } else if (key == 4 && memcmp(text + i, "size", 4) == 0) {
                next->size = 0;
                for (; bytes && text[value] >= '0' && text[value] <= '9' && next->size <= (uint64_t)INT64_MAX / 16; value++, bytes--)
                    next->size = next->size * 10 + (uint64_t)(text[value] - '0');
                next->has_size = 1;
                if (bytes)
                    return spmi_fail(tar->ctx, err, SPM_E_FORMAT, "%s: offset %llu: a pax size is no number", tar->source.name,
                                     (unsigned long long)(offset + at));
            } else if (key >= 10 && memcmp(text + i, "GNU.sparse", 10) == 0) {
                return spmi_fail(tar->ctx, err, SPM_E_UNSUPPORTED, "%s: offset %llu: sparse files are not supported; pack them with plain tar",
                                 tar->source.name, (unsigned long long)(offset + at));
            }
        }
        at += length;
    }
    return SPM_OK;
}

/* A GNU 'L' or pax 'x' header's body, read into `next`. */
static spm_status spmi_tar_long(spm_tar *tar, uint8_t kind, uint64_t offset, uint64_t size, spmi_tar_next *next, spm_error *err)
{
    char *text;
    spm_status status;
    if (size > 1048576)
        return spmi_fail(tar->ctx, err, SPM_E_FORMAT, "%s: offset %llu: a name record of %llu bytes; the file is damaged", tar->source.name,
                         (unsigned long long)offset, (unsigned long long)size);
    text = (char *)spmi_alloc(tar->ctx, (size_t)size + 1);
    if (!text) return spmi_fail_memory(tar->ctx, err, tar->source.name);
    status = spmi_source_read(&tar->source, offset, text, (size_t)size, err);
    text[size] = 0;
    if (!status && kind == 'L') {
        spmi_free(tar->ctx, next->name);
        next->name = text;
        return SPM_OK;
    }
    if (!status) status = spmi_tar_pax(tar, text, (size_t)size, offset, next, err);
    spmi_free(tar->ctx, text);
    return status;
}

/* Adds a regular file; its name comes from `next`, or from the header's prefix and name fields. */
static spm_status spmi_tar_add(spm_tar *tar, const uint8_t *head, uint64_t offset, uint64_t size, const spmi_tar_next *next, spm_error *err)
{
    char name[260];
    const char *plain = name;
    size_t used = 0, i;
    void *memory = tar->entries;
    char *copy;
    if (next->name) {
        plain = next->name;
    } else {
        if (memcmp(head + 257, "ustar\0", 6) == 0 && head[345]) { /* GNU tars ("ustar  ") keep times there */
            for (i = 0; i < 155 && head[345 + i]; i++) name[used++] = (char)head[345 + i];
            name[used++] = '/';
        }
        for (i = 0; i < 100 && head[i]; i++) name[used++] = (char)head[i];
        name[used] = 0;
    }
    plain = spmi_tar_plain(plain);
    if (!*plain || plain[strlen(plain) - 1] == '/') return SPM_OK; /* a folder of the oldest format */
    copy = spmi_string_copy(tar->ctx, plain, strlen(plain));
    if (!copy || !spmi_grow(tar->ctx, &memory, (size_t)tar->count * sizeof *tar->entries, &tar->room,
                            ((size_t)tar->count + 1) * sizeof *tar->entries)) {
        spmi_free(tar->ctx, copy);
        return spmi_fail_memory(tar->ctx, err, tar->source.name);
    }
    tar->entries = (spmi_tar_entry *)memory;
    tar->entries[tar->count].name = copy;
    tar->entries[tar->count].offset = offset;
    tar->entries[tar->count].size = size;
    tar->count++;
    return SPM_OK;
}

/* Lists the entries: 512-byte headers, each followed by its data, padded to 512.  Ends at a block of zeros. */
static spm_status spmi_tar_scan(spm_tar *tar, spmi_tar_next *next, spm_error *err)
{
    uint64_t at = 0, size, total = tar->source.size;
    uint8_t head[512];
    spm_status status = SPM_OK;
    if (total < 512)
        return spmi_fail(tar->ctx, err, SPM_E_FORMAT, "%s: is not a tar file (%llu bytes)", tar->source.name, (unsigned long long)total);
    while (!status && total - at >= 512) {
        uint8_t kind;
        int i;
        status = spmi_source_read(&tar->source, at, head, 512, err);
        if (status) return status;
        for (i = 0; i < 512 && !head[i]; i++) {}
        if (i == 512) return SPM_OK;
        kind = head[156];
        if (!spmi_tar_checksum(head) || !spmi_tar_number(head + 124, 12, &size))
            return spmi_fail(tar->ctx, err, SPM_E_FORMAT,
                             at ? "%s: offset %llu: the tar header's checksum or size is wrong; the file is damaged"
                                : "%s: offset %llu: this is not a tar header (a compressed tar must be unpacked first)",
                             tar->source.name, (unsigned long long)at);
        at += 512;
        if (next->has_size && kind != 'L' && kind != 'K' && kind != 'x' && kind != 'g') size = next->size;
        if (kind >= '1' && kind <= '6') size = 0; /* links, devices and folders have no data */
        if (size > total - at)
            return spmi_fail(tar->ctx, err, SPM_E_FORMAT,
                             "%s: offset %llu: entry %.100s of %llu bytes reaches beyond the end of the file at %llu; it was cut short",
                             tar->source.name, (unsigned long long)at - 512, (const char *)head, (unsigned long long)size,
                             (unsigned long long)total);
        if (kind == 'L' || kind == 'x') {
            status = spmi_tar_long(tar, kind, at, size, next, err);
        } else if (kind == 'S') {
            status = spmi_fail(tar->ctx, err, SPM_E_UNSUPPORTED, "%s: offset %llu: sparse files are not supported; pack them with plain tar",
                               tar->source.name, (unsigned long long)at - 512);
        } else if (kind != 'K' && kind != 'g') {
            if (kind == '0' || kind == 0 || kind == '7') status = spmi_tar_add(tar, head, at, size, next, err);
            spmi_free(tar->ctx, next->name);
            memset(next, 0, sizeof *next);
        }
        at += SPMI_MIN((size + 511) / 512 * 512, total - at);
    }
    if (!status && at < total)
        status = spmi_fail(tar->ctx, err, SPM_E_FORMAT, "%s: offset %llu: a header of %llu bytes instead of 512; the file was cut short",
                           tar->source.name, (unsigned long long)at, (unsigned long long)(total - at));
    return status;
}

static spm_tar *spmi_tar_create(spm_context *ctx, const char *name, spm_error *err)
{
    spm_tar *tar = (spm_tar *)spmi_alloc_zero(ctx, sizeof *tar);
    if (!tar) {
        (void)spmi_fail_memory(ctx, err, name);
        return NULL;
    }
    tar->ctx = ctx;
    tar->source.ctx = ctx;
    return tar;
}

/* The source is open, or `status` says why not. */
static spm_tar *spmi_tar_begin(spm_tar *tar, spm_status status, spm_error *err)
{
    spmi_tar_next next = SPM_ZERO;
    if (!status) status = spmi_tar_scan(tar, &next, err);
    spmi_free(tar->ctx, next.name);
    if (!status && !spmi_names_build(tar->ctx, &tar->names, tar->entries, sizeof(spmi_tar_entry), tar->count, NULL))
        status = spmi_fail_memory(tar->ctx, err, tar->source.name);
    if (!status) return tar;
    spm_tar_close(tar);
    return NULL;
}

SPMDEF spm_tar *spm_tar_open(spm_context *ctx, const char *path, spm_error *err)
{
    spm_tar *tar = spmi_tar_create(ctx, path, err);
    return tar ? spmi_tar_begin(tar, spmi_source_open(&tar->source, ctx, path, err), err) : NULL;
}

SPMDEF spm_tar *spm_tar_open_memory(spm_context *ctx, const char *name, const void *data, size_t size, spm_error *err)
{
    spm_tar *tar = spmi_tar_create(ctx, name, err);
    return tar ? spmi_tar_begin(tar, spmi_source_memory(&tar->source, ctx, name, data, size, err), err) : NULL;
}

SPMDEF int64_t spm_tar_count(const spm_tar *tar)
{
    return tar->count;
}

SPMDEF const char *spm_tar_name(const spm_tar *tar, int64_t index)
{
    return index >= 0 && index < tar->count ? tar->entries[index].name : NULL;
}

SPMDEF uint64_t spm_tar_size(const spm_tar *tar, int64_t index)
{
    return index >= 0 && index < tar->count ? tar->entries[index].size : 0;
}

SPMDEF int64_t spm_tar_find(const spm_tar *tar, const char *name)
{
    return spmi_names_find(&tar->names, spmi_tar_plain(name));
}

SPMDEF spm_status spm_tar_read(spm_tar *tar, int64_t index, uint8_t **data, size_t *size, spm_error *err)
{
    const spmi_tar_entry *entry;
    spm_status status;
    *data = NULL;
    *size = 0;
    if (index < 0 || index >= tar->count)
        return spmi_fail(tar->ctx, err, SPM_E_ARGUMENT, "%s: has no entry %lld (it has %lld)", tar->source.name, (long long)index,
                         (long long)tar->count);
    entry = &tar->entries[index];
    if (entry->size < SIZE_MAX / 2) *data = (uint8_t *)spmi_alloc(tar->ctx, (size_t)entry->size + 1);
    if (!*data) return spmi_fail_memory(tar->ctx, err, entry->name);
    status = spmi_source_read(&tar->source, entry->offset, *data, (size_t)entry->size, err);
    if (status) {
        spmi_free(tar->ctx, *data);
        *data = NULL;
        return status;
    }
    (*data)[entry->size] = 0;
    *size = (size_t)entry->size;
    return SPM_OK;
}
#endif /* implementation, sections 06 to 20 */
