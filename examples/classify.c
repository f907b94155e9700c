/* classify.c - the README's program: one picture through a checkpoint. */
#ifndef SPURMEM_LINKED
  #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include <stdio.h>
#include <stdlib.h>

/* Which bird is it?  classify CHECKPOINT PICTURE */
int main(int argc, char **argv)
{
    spm_error err = SPM_ZERO;
    spm_context *ctx = spm_context_create(NULL);
    spm_checkpoint_info info;
    spm_run_desc one = SPM_ZERO;
    spm_image picture, ready;
    if (argc != 3 || spm_checkpoint_inspect(ctx, argv[1], &info, &err)) return 1;
    spm_model *model = spm_model_build(ctx, &info.arch, 0, &err);
    if (!model || spm_checkpoint_load(model, argv[1], 0, &err) || spm_image_load(ctx, argv[2], NULL, &picture, &err)
        || spm_transform_image(ctx, &info.transform, &picture, &ready, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    float *pixels = (float *)malloc(sizeof(float) * 3 * (size_t)(ready.width * ready.height));
    spm_transform_normalize(&info.transform, &ready, pixels);
    spm_run *run = spm_run_create(model, &one, &err);
    const spm_program *program = spm_model_program(model);
    spm_run_input(run, spm_program_find(program, "image"), pixels);
    if (spm_run_forward(run, 1, 0)) return 1;
    const float *logits = spm_run_data(run, spm_program_find(program, "logits"));
    printf("%s: %g against %g\n", argv[2], (double)logits[0], (double)logits[1]);
    free(pixels);
    spm_image_free(ctx, &ready);
    spm_image_free(ctx, &picture);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    return 0;
}
