/* test_optim.c - optimizers, clipping and schedules against PyTorch (golden/optim.bin, made by golden/make_optim.py) and against
 * the formulas in double. */
#include "../spurmem.h"
#include "test.h"
#include "golden.h"

#define N 37
#define CASES 6

/* A model of two parameters, the second of the same size and without decay. */
static spm_model *two_parameters(spm_context *ctx)
{
    spm_program *p = spm_program_create(ctx);
    int64_t shape[1] = { N };
    int i;
    spm_model *model;
    (void)spm_program_parameter(p, "a", 1, shape, SPM_INIT_ZERO, 0);
    (void)spm_program_parameter(p, "b", 1, shape, SPM_INIT_ZERO, SPM_PARAMETER_NO_DECAY);
    (void)spm_program_parameter(p, "running", 1, shape, SPM_INIT_ONE, SPM_PARAMETER_BUFFER);
    model = spm_model_create(p, 0, NULL);
    for (i = 0; i < N; i++) {
        spm_model_parameter(model, 0)->value.data[i] = spm_model_parameter(model, 1)->value.data[i] = (float)golden_draw(golden_stream("start"), (uint32_t)i);
    }
    return model;
}

/* Gradients of step `step`, marked as written. */
static void set_gradients(spm_model *model, int step)
{
    char name[32];
    int i;
    snprintf(name, sizeof name, "gradient%d", step);
    spm_model_finish_gradients(model);
    for (i = 0; i < N; i++) {
        float g = (float)golden_draw(golden_stream(name), (uint32_t)i);
        if (step % 3) g *= 0.01f;
        spm_model_parameter(model, 0)->gradient[i] = spm_model_parameter(model, 1)->gradient[i] = g;
    }
}

static spm_optimizer_desc desc_of(int which)
{
    spm_optimizer_desc d = spm_optimizer_desc_init();
    if (which < 3) d.kind = SPM_SGD;
    if (which == 0) d.lr = .1f;
    if (which == 1) { d.lr = .05f; d.momentum = .9f; d.weight_decay = 1e-2f; }
    if (which == 2) { d.lr = .05f; d.momentum = .9f; d.weight_decay = 5e-4f; d.nesterov = 1; }
    if (which == 4) { d.lr = 5e-3f; d.beta1 = .8f; d.beta2 = .99f; d.eps = 1e-6f; d.weight_decay = 1e-2f; }
    if (which == 5) { d.kind = SPM_ADAMW; d.lr = 2e-3f; d.weight_decay = .05f; }
    return d;
}

/* The formulas in double, for one element. */
static void reference(int which, double lr, int t, double g, double *p, double *m, double *v)
{
    static const double decay[CASES] = { 0, 1e-2, 5e-4, 0, 1e-2, .05 };
    const double b1 = which == 4 ? .8 : .9, b2 = which == 4 ? .99 : .999, eps = which == 4 ? 1e-6 : 1e-8;
    if (which < 3) {
        g += decay[which] * *p;
        if (which) {
            *m = .9 * *m + g;
            g = which == 2 ? g + .9 * *m : *m;
        }
        *p -= lr * g;
        return;
    }
    if (which == 5) *p *= 1 - lr * decay[which];
    else g += decay[which] * *p;
    *m = b1 * *m + (1 - b1) * g;
    *v = b2 * *v + (1 - b2) * g * g;
    *p -= lr / (1 - pow(b1, t)) * *m / (sqrt(*v) / sqrt(1 - pow(b2, t)) + eps);
}

static void test_optimizers(void)
{
    static const spm_isa isas[] = { SPM_ISA_C, SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512 };
    int which, step, i, k, words, tried = 0;
    uint32_t *golden = golden_read("tests/golden/optim.bin", &words);
    CHECK_MSG(golden != NULL, "tests/golden/optim.bin is missing (run from the repository's root)");
    for (k = 0; golden && k < 4; k++) {
        spm_context_desc cd;
        spm_context *ctx;
        memset(&cd, 0, sizeof cd);
        cd.isa = isas[k];
        ctx = spm_context_create(&cd);
        if (!ctx) continue;
        tried++;
        for (which = 0; which < CASES; which++) {
            spm_model *model = two_parameters(ctx);
            spm_optimizer_desc d = desc_of(which);
            spm_optimizer *o = spm_optimizer_create(model, &d, NULL);
            const float *a = spm_model_parameter(model, 0)->value.data;
            double p[N], m[N] = { 0 }, v[N] = { 0 }, exact_lr = which == 5 ? 2e-3 : which == 4 ? 5e-3 : which == 3 ? 1e-3 : which ? .05 : .1;
            CHECK_INT(spm_optimizer_slots(o), which == 0 ? 0 : which < 3 ? 1 : 2);
            for (i = 0; i < N; i++) p[i] = golden_draw(golden_stream("start"), (uint32_t)i);
            for (step = 0; step < 20; step++) {
                uint64_t version = spm_model_version(model);
                if (step == 10) {
                    spm_optimizer_set_lr(o, spm_optimizer_lr(o) * .5f);
                    exact_lr *= .5;
                }
                set_gradients(model, step);
                for (i = 0; i < N; i++) reference(which, exact_lr, step + 1, (double)spm_model_parameter(model, 0)->gradient[i], &p[i], &m[i], &v[i]);
                spm_optimizer_step(o);
                CHECK(spm_model_version(model) > version);
                for (i = 0; i < N && (step == 0 || step == 19); i++) {
                    CHECK_NEAR(a[i], golden_float(golden[(2 * which + (step == 19)) * N + i]), 1e-6);
                }
                for (i = 0; i < N; i++) CHECK_NEAR(a[i], p[i], 1e-6);
            }
            CHECK_INT(spm_optimizer_steps(o), 20);
            if (which > 2) {
                for (i = 0; i < N; i++) CHECK_NEAR(spm_optimizer_state(o, 1, 1)[i], spm_optimizer_state(o, 1, 0)[i], which == 4 ? 1e3 : 0);
            }
            CHECK(spm_optimizer_state(o, 0, 2) == NULL && spm_optimizer_state(o, 2, 0) == NULL);
            CHECK(spm_model_parameter(model, 2)->value.data[0] == 1.0f);
            spm_optimizer_destroy(o);
            spm_model_destroy(model);
        }
        spm_context_destroy(ctx);
    }
    CHECK(tried >= 1);
    free(golden);
}

/* Decay spares biases and norms when asked; frozen parameters stay; resumed state goes on with the same bits. */
static void test_optimizer_options(void)
{
    spm_context *ctx = spm_context_create(NULL);
    spm_model *model = two_parameters(ctx), *other;
    spm_optimizer_desc d = desc_of(5);
    spm_optimizer *o, *resumed;
    spm_parameter *a = spm_model_parameter(model, 0), *b = spm_model_parameter(model, 1);
    spm_error err;
    int i, slot;
    d.decay_all = 0;
    o = spm_optimizer_create(model, &d, NULL);
    set_gradients(model, 0);
    spm_optimizer_step(o);
    for (i = 0; i < N; i++) CHECK_NEAR((double)b->value.data[i] - (double)a->value.data[i], golden_draw(golden_stream("start"), (uint32_t)i) * 2e-3 * .05, 1e-6);
    a->flags |= SPM_PARAMETER_FROZEN;
    {
        const float before = a->value.data[3], moved = b->value.data[3];
        set_gradients(model, 1);
        spm_optimizer_step(o);
        CHECK(a->value.data[3] == before && b->value.data[3] != moved);
    }
    a->flags &= ~(unsigned)SPM_PARAMETER_FROZEN;
    /* resume */
    other = two_parameters(ctx);
    resumed = spm_optimizer_create(other, &d, NULL);
    for (i = 0; i < 2; i++) {
        memcpy(spm_model_parameter(other, i)->value.data, spm_model_parameter(model, i)->value.data, N * sizeof(float));
        for (slot = 0; slot < 2; slot++) memcpy(spm_optimizer_state(resumed, slot, i), spm_optimizer_state(o, slot, i), N * sizeof(float));
    }
    spm_optimizer_set_steps(resumed, spm_optimizer_steps(o));
    set_gradients(model, 2);
    set_gradients(other, 2);
    spm_optimizer_step(o);
    spm_optimizer_step(resumed);
    for (i = 0; i < 2; i++) {
        CHECK(memcmp(spm_model_parameter(other, i)->value.data, spm_model_parameter(model, i)->value.data, N * sizeof(float)) == 0);
    }
    /* gradients that nobody wrote count as zero */
    spm_model_zero_gradients(model);
    CHECK_NEAR(spm_clip_gradients(model, 1), 0, 0);
    /* settings that make no sense */
    memset(&err, 0, sizeof err);
    d = spm_optimizer_desc_init();
    d.momentum = .9f;
    CHECK(spm_optimizer_create(model, &d, &err) == NULL && strstr(err.text, "momentum"));
    memset(&err, 0, sizeof err);
    d = spm_optimizer_desc_init();
    d.beta2 = 1;
    CHECK(spm_optimizer_create(model, &d, &err) == NULL && strstr(err.text, "betas"));
    memset(&err, 0, sizeof err);
    d = spm_optimizer_desc_init();
    d.kind = SPM_SGD;
    d.nesterov = 1;
    CHECK(spm_optimizer_create(model, &d, &err) == NULL && err.status == SPM_E_ARGUMENT);
    spm_optimizer_destroy(o);
    spm_optimizer_destroy(resumed);
    spm_model_destroy(model);
    spm_model_destroy(other);
    spm_context_destroy(ctx);
}

static void test_clip_and_schedules(void)
{
    static const double watched[15] = { 3.0, 2.0, 2.0, 1.99999, 1.5, 1.6, 1.6, 1.6, 1.6, 1.6, 1.2, 1.3, 1.3, 1.3, 1.3 };
    int words, i, at = 2 * CASES * N;
    uint32_t *golden = golden_read("tests/golden/optim.bin", &words);
    spm_context *ctx = spm_context_create(NULL);
    spm_model *model = two_parameters(ctx);
    spm_schedule s = spm_schedule_make(SPM_SCHEDULE_PLATEAU, 2e-4f, 15, 0, 1);
    CHECK(golden != NULL);
    if (!golden) return;
    CHECK_INT(words, at + 15 + 6 + 9 + 1 + N);
    for (i = 0; i < 15; i++) {
        CHECK_NEAR(spm_schedule_lr(&s, i), golden_float(golden[at++]), 1e-11);
        spm_schedule_observe(&s, watched[i]);
    }
    s = spm_schedule_make(SPM_SCHEDULE_PLATEAU, 3e-8f, 6, 0, 0);
    for (i = 0; i < 6; i++) {
        CHECK_NEAR(spm_schedule_lr(&s, i), golden_float(golden[at++]), 1e-15);
        spm_schedule_observe(&s, 1.0);
    }
    s = spm_schedule_make(SPM_SCHEDULE_COSINE, 1e-3f, 8, 0, 0);
    for (i = 0; i < 9; i++) CHECK_NEAR(spm_schedule_lr(&s, i), golden_float(golden[at++]), 1e-10);
    s = spm_schedule_make(SPM_SCHEDULE_COSINE, 1e-3f, 12, 4, 0);
    CHECK_NEAR(spm_schedule_lr(&s, 0), 2.5e-4, 1e-9);
    CHECK_NEAR(spm_schedule_lr(&s, 3), 1e-3, 1e-9);
    CHECK_NEAR(spm_schedule_lr(&s, 4), 1e-3, 1e-9);
    CHECK_NEAR(spm_schedule_lr(&s, 8), 5e-4, 1e-9);
    s = spm_schedule_make(SPM_SCHEDULE_NONE, 1e-3f, 12, 0, 0);
    spm_schedule_observe(&s, 1);
    CHECK_NEAR(spm_schedule_lr(&s, 100), 1e-3, 1e-10);
    /* one parameter alone, as in the script */
    spm_model_parameter(model, 1)->flags |= SPM_PARAMETER_FROZEN;
    set_gradients(model, 0);
    CHECK_NEAR(spm_clip_gradients(model, 0), golden_float(golden[at]), 1e-6);
    CHECK_NEAR(spm_clip_gradients(model, 0.75), golden_float(golden[at]), 1e-6);
    at++;
    for (i = 0; i < N; i++) CHECK_NEAR(spm_model_parameter(model, 0)->gradient[i], golden_float(golden[at + i]), 1e-7);
    CHECK_NEAR(spm_clip_gradients(model, 10), 0.75, 1e-5);
    CHECK_NEAR(spm_clip_gradients(model, 0), 0.75, 1e-5);
    free(golden);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

int main(void)
{
    TEST(test_optimizers);
    TEST(test_optimizer_options);
    TEST(test_clip_and_schedules);
    return TEST_END;
}
