/* autograd.c - the tape by itself: a small network learns which of two rings a point lies on.
 *
 *     autograd
 *
 * It records a program with two layers and a loss, trains it with Adam, and prints loss and accuracy. */
#ifndef SPURMEM_LINKED
  #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include <math.h>
#include <stdio.h>

enum { POINTS = 256, HIDDEN = 32, STEPS = 300 };

static spm_value layer(spm_program *p, spm_value x, int64_t in, int64_t out, const char *weight, const char *bias)
{
    int64_t shape[2], bias_shape[1];
    shape[0] = out;
    shape[1] = in;
    bias_shape[0] = out;
    return spm_linear(p, x, spm_program_parameter(p, weight, 2, shape, SPM_INIT_UNIFORM_FAN_IN, 0),
                      spm_program_parameter(p, bias, 1, bias_shape, SPM_INIT_ZERO, SPM_PARAMETER_NO_DECAY));
}

int main(void)
{
    static float points[POINTS][2], targets[POINTS][2];
    spm_error err = SPM_ZERO;
    spm_context *ctx = spm_context_create(NULL);
    spm_program *p = spm_program_create(ctx);
    spm_run_desc batch = SPM_ZERO;
    spm_optimizer_desc adam = spm_optimizer_desc_init();
    int64_t pairs[2] = { 0, 2 }; /* the first dimension is the batch */
    spm_value x = spm_program_input(p, "points", 2, pairs, 0), y = spm_program_input(p, "targets", 2, pairs, 0);
    spm_value hidden = spm_gelu(p, layer(p, x, 2, HIDDEN, "fc1.weight", "fc1.bias"));
    spm_value logits = layer(p, hidden, HIDDEN, 2, "fc2.weight", "fc2.bias");
    spm_value loss = spm_cross_entropy(p, logits, y, 0, 0.0f);
    spm_model *model;
    spm_run *run = NULL;
    spm_optimizer *optimizer = NULL;
    int i, step, right = 0;
    spm_program_output(p, "logits", logits);
    spm_program_output(p, "loss", loss);
    for (i = 0; i < POINTS; i++) {
        float angle = 6.2831853f * spm_random_uniform(1, 0, (uint64_t)i);
        float radius = (i % 2 ? 1.0f : 0.5f) + 0.08f * spm_random_normal(1, 1, (uint64_t)i);
        points[i][0] = radius * cosf(angle);
        points[i][1] = radius * sinf(angle);
        targets[i][i % 2] = 1.0f;
    }
    batch.max_batch = POINTS;
    batch.backward = 1;
    adam.lr = 0.02f;
    model = spm_model_create(p, 1, &err);
    if (model) run = spm_run_create(model, &batch, &err);
    if (run) optimizer = spm_optimizer_create(model, &adam, &err);
    for (step = 0; optimizer && step < STEPS; step++) {
        spm_run_input(run, x, points[0]);
        spm_run_input(run, y, targets[0]);
        if (spm_run_forward(run, POINTS, 1)) break;
        spm_model_zero_gradients(model);
        if (spm_run_backward(run)) break; /* from the output named "loss" */
        spm_optimizer_step(optimizer);
        if (step % 100 == 0 || step == STEPS - 1) printf("step %3d  loss %.4f\n", step, (double)spm_run_data(run, loss)[0]);
    }
    if (step < STEPS) {
        fprintf(stderr, "autograd: %s\n", run && spm_run_error(run)->status ? spm_run_error(run)->text : err.text);
        return 1;
    }
    for (i = 0; i < POINTS; i++) {
        const float *out = spm_run_data(run, logits) + 2 * i;
        right += (out[1] > out[0]) == i % 2;
    }
    printf("%d of %d points right\n", right, POINTS);
    spm_optimizer_destroy(optimizer);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    return right > POINTS * 95 / 100 ? 0 : 1;
}
