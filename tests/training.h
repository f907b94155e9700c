/* training.h - runs of the trainer, each in a folder of its own below the test's; behind tiny.h. */
#ifndef SPURMEM_TEST_TRAINING_H
#define SPURMEM_TEST_TRAINING_H
#include "logged.h"

static spm_error last;
static spm_train_result result;

/* ---- run folders ---- */

static const char run_files[][24] = { "config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "state.safetensors", "steps.jsonl",
    "history.csv", "interpolation.json", "epoch-000.safetensors", "epoch-001.safetensors", "epoch-002.safetensors", "epoch-003.safetensors" };

/* A run folder that holds nothing. */
static inline const char *fresh(const char *name)
{
    int i;
    for (i = 0; i < (int)(sizeof run_files / sizeof run_files[0]); i++) remove(tiny_path(name, run_files[i]));
    return name;
}

static inline char *slurp(const char *run, const char *file, size_t *size) { return test_read(tiny_path(run, file), size); }

/* ---- training ---- */

typedef struct bench {
    spm_context *ctx;
    spm_dataset *set;
} bench;

static inline bench bench_of(const char *name, const tiny_counts *counts, int threads)
{
    bench b;
    b.ctx = logged_context(threads);
    b.set = tiny_data(b.ctx, name, counts);
    return b;
}

/* With the usual pictures. */
static inline bench bench_open(int threads)
{
    tiny_counts counts = tiny_usual();
    return bench_of("set", &counts, threads);
}

static inline void bench_close(bench *b)
{
    spm_dataset_close(b->set);
    spm_context_destroy(b->ctx);
}

/* Settings of a small run: 26 pictures, batches of 8, so 4 steps an epoch. */
static inline spm_train_desc small_run(spm_context *ctx, spm_method method)
{
    spm_train_desc desc = spm_train_desc_init(method);
    desc.arch = tiny_arch(ctx, method == SPM_METHOD_FAIRDROPOUT ? TINY_ARCH ",always=0.5,off=0.5" : TINY_ARCH);
    desc.reading = tiny_reading();
    desc.epochs = 2;
    desc.batch = 8;
    desc.seed = 3;
    desc.optimizer.lr = 2e-3f;
    desc.prune_fraction = 0.05;
    return desc;
}

/* Trains into a folder below the test's; the log of steps lies in it. */
static inline spm_status train(bench *b, spm_train_desc *desc, const char *run)
{
    char out[900], steps[900];
    snprintf(out, sizeof out, "%s", tiny_path(run, ""));
    snprintf(steps, sizeof steps, "%s", tiny_path(run, "steps.jsonl"));
    CHECK(spm_directory_create(b->ctx, out, NULL) == SPM_OK);
    desc->out = out;
    desc->log_steps = steps;
    memset(&last, 0, sizeof last);
    return spm_train(b->ctx, b->set, desc, &result, &last);
}

static inline void check_trained(bench *b, spm_train_desc *desc, const char *run)
{
    CHECK_INT(train(b, desc, run), SPM_OK);
    CHECK_STR(last.text, "");
}
#endif
