/* bench.h - the usual pictures and a network for the tests of attribution and localization; behind tiny.h. */
#ifndef SPURMEM_TEST_BENCH_H
#define SPURMEM_TEST_BENCH_H

static spm_error last;

typedef struct bench {
    spm_context *ctx;
    spm_dataset *set;
    spm_model *model;
    spm_reading reading;
} bench;

/* The usual pictures and a network whose norms and head are not at their start values, so that every unit matters. */
static inline bench bench_open(const char *arch, int threads)
{
    bench b;
    tiny_counts counts = tiny_usual();
    int i;
    int64_t j;
    memset(&last, 0, sizeof last);
    b.ctx = tiny_context(threads);
    b.set = tiny_data(b.ctx, "set", &counts);
    b.model = tiny_model(b.ctx, arch, 11);
    b.reading = tiny_reading();
    for (i = 0; i < spm_model_parameter_count(b.model); i++) {
        spm_parameter *p = spm_model_parameter(b.model, i);
        for (j = 0; j < spm_tensor_count(&p->value); j++) {
            float n = spm_random_normal(21, (uint64_t)i, (uint64_t)j);
            if (p->value.rank == 1 && strstr(p->name, "running_var") == NULL) p->value.data[j] += 0.2f * n;
            if (p->flags & SPM_PARAMETER_HEAD) p->value.data[j] += 0.6f * n;
        }
    }
    spm_model_touch(b.model);
    return b;
}

static inline void bench_close(bench *b)
{
    spm_model_destroy(b->model);
    spm_dataset_close(b->set);
    spm_context_destroy(b->ctx);
}

/* FNV-1a over the bits of every parameter and buffer. */
static inline uint64_t model_hash(spm_model *model)
{
    uint64_t hash = 1469598103934665603u;
    int i;
    int64_t j;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        const unsigned char *bytes = (const unsigned char *)p->value.data;
        for (j = 0; j < spm_tensor_count(&p->value) * 4; j++) hash = (hash ^ bytes[j]) * 1099511628211u;
    }
    return hash;
}

static inline int64_t row_size(const spm_parameter *p)
{
    return spm_tensor_count(&p->value) / p->value.shape[0];
}

static inline double row_norm(const spm_parameter *p, const float *values, int64_t channel)
{
    int64_t row = row_size(p), i;
    double sum = 0.0;
    for (i = 0; i < row; i++) sum += (double)values[channel * row + i] * (double)values[channel * row + i];
    return sqrt(sum);
}

static inline int ranked(const spm_parameter *p)
{
    return (p->flags & SPM_PARAMETER_PRUNABLE) && !(p->flags & SPM_PARAMETER_HEAD);
}

/* One batch through the network in evaluation mode; leaves the gradient of the mean cross-entropy in the model. */
static inline void plain_gradient(bench *b, const int64_t *ids, int n)
{
    const spm_program *program = spm_model_program(b->model);
    spm_value outputs = spm_program_find(program, "outputs");
    spm_run_desc desc = SPM_ZERO;
    float *pixels = (float *)malloc((size_t)n * TINY_SIZE * TINY_SIZE * 3 * sizeof(float)), gradient[128];
    const float *out;
    spm_run *run;
    int i;
    desc.max_batch = n;
    desc.backward = 1;
    run = spm_run_create(b->model, &desc, NULL);
    for (i = 0; i < n; i++) tiny_pixels(b->set, &b->reading, ids[i], pixels + (size_t)i * TINY_SIZE * TINY_SIZE * 3);
    (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
    CHECK(spm_run_forward(run, n, 0) == SPM_OK);
    out = spm_run_data(run, outputs);
    for (i = 0; i < n; i++) {
        int y = spm_dataset_example(b->set, ids[i])->y, column = b->reading.label_reversed ? 1 - y : y;
        double p = 1.0 / (1.0 + exp((double)out[2 * i + 1 - column] - (double)out[2 * i + column]));
        gradient[2 * i + column] = (float)((p - 1.0) / n);
        gradient[2 * i + 1 - column] = (float)((1.0 - p) / n);
    }
    spm_model_zero_gradients(b->model);
    CHECK(spm_run_set_gradient(run, outputs, gradient) == SPM_OK);
    CHECK(spm_run_backward(run) == SPM_OK);
    spm_model_finish_gradients(b->model);
    spm_run_destroy(run);
    free(pixels);
}

/* spm_modify_units with the change in the arguments. */
static inline spm_status modify_units(spm_model *model, const spm_unit *units, int64_t count, spm_modify modify, double std,
                                      uint64_t seed, spm_model *rewind, spm_error *err)
{
    spm_change change = SPM_ZERO;
    change.modify = modify;
    change.std = std;
    change.seed = seed;
    change.rewind = rewind;
    return spm_modify_units(model, units, count, &change, err);
}
#endif
