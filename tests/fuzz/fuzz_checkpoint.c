/* fuzz_checkpoint.c - any bytes as a checkpoint: what it says about itself, copying it without its Python objects and under
 * other names, and loading it into a small ViT and a small ResNet, which must be as before when that fails.  The bytes pass through a file without a name. */
#include "fuzz.h"
#include "fuzz_file.h"

static double sum_of(spm_model *model)
{
    double sum = 0;
    int i;
    int64_t k;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_tensor *t = &spm_model_parameter(model, i)->value;
        for (k = 0; k < spm_tensor_count(t); k++) sum += (double)t->data[k] * (double)(k + i + 1);
    }
    return sum;
}

FUZZ_BODY(ctx, data, size)
{
    static const char archs[2][64] = { "vit:patch=4,dim=4,depth=1,heads=2,mlp=1", "resnet18:width=1,stem=cifar" };
    char path[64], copy[64];
    spm_convert_desc desc = SPM_ZERO;
    spm_checkpoint_info info;
    spm_error err = SPM_ZERO;
    int i;
    fuzz_file_open(path, sizeof path);
    fuzz_file_add(data, size);
    if (spm_checkpoint_inspect(ctx, path, &info, &err) && (!err.text[0] || info.has_arch)) abort();
    snprintf(copy, sizeof copy, "/dev/shm/fuzz_copy_%ld.%s", (long)getpid(), size & 2 ? "pth" : "safetensors");
    desc.names = size % 3 == 0 ? SPM_NAMES_AUTO : size % 3 == 1 ? SPM_NAMES_TIMM : SPM_NAMES_TORCHVISION;
    desc.skip_objects = 1;
    memset(&err, 0, sizeof err);
    if (spm_checkpoint_convert(ctx, path, copy, &desc, NULL, &err)) {
        if (!err.text[0]) abort();
    } else {
        spm_archive *archive = spm_archive_open(ctx, copy, &err);
        if (!archive) abort();
        spm_archive_close(archive);
        unlink(copy);
    }
    for (i = 0; i < 2; i++) {
        spm_arch arch = SPM_ZERO;
        spm_model *model;
        double before;
        arch.height = arch.width_px = 8;
        arch.classes = 2;
        memset(&err, 0, sizeof err);
        if (spm_arch_parse(ctx, archs[i], &arch, &err)) abort();
        model = spm_model_build(ctx, &arch, 1, &err);
        if (!model) abort();
        before = sum_of(model);
        if (spm_checkpoint_load(model, path, size & 1 ? 1 : 0, &err)) {
            const double after = sum_of(model);
            if (!err.text[0] || after < before || after > before) abort();
        }
        spm_model_destroy(model);
    }
}
