/* test_nets.c - architectures: names, sizes, shapes, FLOPs; logits and gradients against PyTorch (golden/nets.bin, made by
 * golden/make_nets.py); small networks learn; the same bits for any number of threads. */
#include "../spurmem.h"
#include "test.h"
#include "golden.h"

static spm_context *context(int threads, spm_isa isa)
{
    spm_context_desc desc;
    if (isa != SPM_ISA_AUTO && !golden_isa(isa)) return NULL;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    desc.isa = isa;
    return spm_context_create(&desc);
}

static spm_model *network_of(spm_context *ctx, const char *name, int64_t height, int64_t width, int64_t classes, uint64_t seed)
{
    spm_arch arch;
    spm_error err;
    spm_model *model;
    memset(&arch, 0, sizeof arch);
    memset(&err, 0, sizeof err);
    arch.height = height;
    arch.width_px = width;
    arch.classes = classes;
    if (spm_arch_parse(ctx, name, &arch, &err)) CHECK_MSG(0, err.text);
    model = spm_model_build(ctx, &arch, seed, &err);
    CHECK_STR(err.text, "");
    return model;
}

static spm_model *network(spm_context *ctx, const char *name, int64_t height, int64_t width, int64_t classes)
{
    return network_of(ctx, name, height, width, classes, 3);
}

static int64_t learnable(spm_model *model)
{
    int64_t sum = 0;
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        if (!(p->flags & SPM_PARAMETER_BUFFER)) sum += spm_tensor_count(&p->value);
    }
    return sum;
}

/* Numbers of parameters as torchvision, timm and the CIFAR ResNets' author give them; multiply-adds as published, a ViT's
 * less by what its last block leaves out (6 %). */
static void test_sizes(void)
{
    static const struct { char name[32]; int64_t parameters; double gflops; } known[] = {
        { "resnet18", 11689512, 3.64 }, { "resnet34", 21797672, 7.35 }, { "resnet50", 25557032, 8.21 }, { "resnet101", 44549160, 15.7 },
        { "resnet152", 60192808, 23.1 }, { "wide_resnet50_2", 68883240, 22.9 }, { "resnext50_32x4d", 25028904, 8.5 },
        { "resnet20", 269722, .082 }, { "resnet32", 464154, .139 }, { "resnet44", 658586, .197 }, { "resnet56", 853018, .254 },
        { "resnet110", 1727962, .51 }, { "deit_tiny", 5717416, 2.5 }, { "deit_small", 22050664, 9.2 }, { "deit_base", 86567656, 35.1 },
        { "deit_tiny_distilled", 5910800, 2.5 }, { "deit_small_distilled", 22436432, 9.3 }, { "deit_base_distilled", 87338192, 35.3 },
        { "vit_base", 86567656, 35.1 }
    };
    spm_context *ctx = context(0, SPM_ISA_AUTO);
    int i;
    for (i = 0; i < (int)(sizeof known / sizeof *known); i++) {
        spm_model *model = network_of(ctx, known[i].name, 0, 0, 0, SPM_NO_SEED); /* without seconds of random numbers */
        double gflops = spm_program_flops(spm_model_program(model), 1, 0) * 1e-9, back = spm_program_flops(spm_model_program(model), 1, 1) * 1e-9;
        CHECK_INT(learnable(model), known[i].parameters);
        CHECK_NEAR(gflops / known[i].gflops, 1, .07);
        CHECK(back > 1.85 * gflops && back < 2.01 * gflops);
        CHECK_NEAR(spm_program_flops(spm_model_program(model), 3, 0) * 1e-9, 3 * gflops, 1e-6 * gflops);
        spm_model_destroy(model);
    }
    for (i = 0; spm_arch_name_at(i); i++) CHECK(strlen(spm_arch_name_at(i)) > 2);
    CHECK(i >= 20 && spm_arch_name_at(-1) == NULL);
    spm_context_destroy(ctx);
}

static void check_parameter(spm_model *model, const char *name, const char *shape, int block, unsigned flags)
{
    char text[64];
    const int i = spm_model_find_parameter(model, name);
    CHECK_MSG(i >= 0, name);
    if (i < 0) return;
    CHECK_STR(spm_tensor_shape_text(&spm_model_parameter(model, i)->value, text, sizeof text), shape);
    CHECK_INT(spm_model_parameter(model, i)->block, block);
    CHECK_INT(spm_model_parameter(model, i)->flags, flags);
}

static void test_names_and_shapes(void)
{
    spm_context *ctx = context(1, SPM_ISA_AUTO);
    spm_model *model = network(ctx, "resnet50:width=16", 64, 64, 7);
    const spm_parameter *p;
    spm_value v;
    check_parameter(model, "conv1.weight", "[16,7,7,3]", 0, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "bn1.running_var", "[16]", 0, SPM_PARAMETER_BUFFER);
    check_parameter(model, "layer1.0.conv3.weight", "[64,1,1,16]", 1, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "layer1.0.downsample.0.weight", "[64,1,1,16]", 1, SPM_PARAMETER_PRUNABLE | SPM_PARAMETER_DOWNSAMPLE);
    check_parameter(model, "layer3.5.conv2.weight", "[64,3,3,64]", 13, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "layer4.2.bn3.weight", "[512]", 16, SPM_PARAMETER_NO_DECAY);
    check_parameter(model, "fc.weight", "[7,512]", 0, SPM_PARAMETER_HEAD);
    check_parameter(model, "fc.bias", "[7]", 0, SPM_PARAMETER_HEAD | SPM_PARAMETER_NO_DECAY);
    CHECK_INT(spm_model_find_parameter(model, "layer1.1.downsample.0.weight"), -1);
    p = spm_model_parameter(model, spm_model_find_parameter(model, "layer2.0.conv2.weight"));
    CHECK_STR(spm_model_parameter(model, p->norm_weight)->name, "layer2.0.bn2.weight");
    CHECK_STR(spm_model_parameter(model, p->norm_bias)->name, "layer2.0.bn2.bias");
    CHECK_INT(p->bias, -1);
    CHECK(p->norm_output > p->output && p->output > 0);
    CHECK_INT(spm_program_shape(spm_model_program(model), p->norm_output, 5).shape[3], 32);
    v = spm_program_find(spm_model_program(model), "features");
    CHECK_INT(spm_program_shape(spm_model_program(model), v, 5).shape[1], 512);
    CHECK(spm_program_find(spm_model_program(model), "block16") > 0 && spm_program_find(spm_model_program(model), "block17") == 0);
    CHECK(spm_program_find(spm_model_program(model), "outputs") == spm_program_find(spm_model_program(model), "logits"));
    spm_model_destroy(model);

    model = network(ctx, "resnet20", 0, 0, 0);
    check_parameter(model, "conv1.weight", "[16,3,3,3]", 0, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "layer3.0.conv1.weight", "[64,3,3,32]", 7, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "linear.weight", "[10,64]", 0, SPM_PARAMETER_HEAD);
    CHECK_INT(spm_model_find_parameter(model, "layer2.0.downsample.0.weight"), -1);
    spm_model_destroy(model);

    model = network(ctx, "vit:patch=8,dim=24,depth=2,heads=3,mlp=2,distilled=1", 32, 48, 2);
    check_parameter(model, "cls_token", "[1,24]", 0, SPM_PARAMETER_NO_DECAY);
    check_parameter(model, "dist_token", "[1,24]", 0, SPM_PARAMETER_NO_DECAY);
    check_parameter(model, "pos_embed", "[26,24]", 0, SPM_PARAMETER_NO_DECAY);
    check_parameter(model, "patch_embed.proj.weight", "[24,8,8,3]", 0, 0);
    check_parameter(model, "blocks.1.attn.qkv.weight", "[72,24]", 2, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "blocks.0.mlp.fc2.weight", "[24,48]", 1, SPM_PARAMETER_PRUNABLE);
    check_parameter(model, "head_dist.bias", "[2]", 0, SPM_PARAMETER_HEAD | SPM_PARAMETER_NO_DECAY);
    p = spm_model_parameter(model, spm_model_find_parameter(model, "blocks.1.mlp.fc1.weight"));
    CHECK_STR(spm_model_parameter(model, p->bias)->name, "blocks.1.mlp.fc1.bias");
    CHECK_INT(p->norm_weight, -1);
    CHECK_INT(p->norm_output, p->output);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

static const char *fails(spm_context *ctx, const char *text, int64_t height, spm_error *err)
{
    spm_arch arch;
    memset(&arch, 0, sizeof arch);
    memset(err, 0, sizeof *err);
    arch.height = arch.width_px = height;
    if (!spm_arch_parse(ctx, text, &arch, err)) {
        spm_model *model = spm_model_build(ctx, &arch, 1, err);
        CHECK_MSG(model == NULL, text);
        spm_model_destroy(model);
    }
    CHECK_MSG(err->status != SPM_OK, text);
    return err->text;
}

static void test_parsing(void)
{
    static const char *const canonical[][2] = {
        { "resnet18", "resnet18" }, { "resnet18:stem=cifar,width=16", "resnet18:width=16,stem=cifar" }, { "resnet18:width=64", "resnet18" },
        { "vit:patch=8,dim=96,depth=6,heads=3,mlp=2", "vit:patch=8,dim=96,depth=6,mlp=2" }, { "vit_b_16", "vit_base:names=torchvision" }, { "vit_tiny_patch16_224", "deit_tiny" }, { "vit_small", "deit_small" },
        { "deit_tiny_distilled_patch16_224", "deit_tiny_distilled" }, { "deit_small:eps=1e-5,drop_path=.1", "deit_small:eps=1e-05,drop_path=0.1" }
    };
    spm_context *ctx = context(1, SPM_ISA_AUTO);
    spm_arch arch, again;
    spm_error err;
    int i;
    for (i = 0; i < (int)(sizeof canonical / sizeof *canonical); i++) {
        memset(&arch, 0, sizeof arch);
        memset(&again, 0, sizeof again);
        CHECK_INT(spm_arch_parse(ctx, canonical[i][0], &arch, NULL), SPM_OK);
        CHECK_STR(arch.name, canonical[i][1]);
        CHECK_INT(spm_arch_parse(ctx, arch.name, &again, NULL), SPM_OK);
        CHECK_STR(again.name, arch.name);
        CHECK(again.width == arch.width && again.dim == arch.dim && again.norm_eps == arch.norm_eps && again.cifar_stem == arch.cifar_stem);
    }
    memset(&arch, 0, sizeof arch);
    (void)spm_arch_parse(ctx, "resnet56", &arch, NULL);
    CHECK(arch.height == 32 && arch.width_px == 32 && arch.classes == 10);
    memset(&arch, 0, sizeof arch);
    arch.height = 64;
    arch.classes = 2;
    arch.softmax_head = 1;
    (void)spm_arch_parse(ctx, "resnet50", &arch, NULL);
    CHECK(arch.height == 64 && arch.width_px == 224 && arch.classes == 2 && arch.softmax_head == 1);
    CHECK_STR(fails(ctx, "resnet51", 0, &err), "\"resnet51\" is no known architecture; the nearest is resnet50");
    CHECK_STR(fails(ctx, "diet_tiny", 0, &err), "\"diet_tiny\" is no known architecture; the nearest is deit_tiny");
    CHECK_STR(fails(ctx, "resnet18:widht=8", 0, &err), "resnet18: \"widht\" is no option of a ResNet; the nearest is width");
    CHECK(strstr(fails(ctx, "vit:hedas=3", 0, &err), "nearest is heads") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:width=", 0, &err), "whole number") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:width=0", 0, &err), "whole number") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:width=8x", 0, &err), "whole number") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:stem=big", 0, &err), "imagenet or cifar") != NULL);
    CHECK(strstr(fails(ctx, "vit:heads=5", 0, &err), "no multiple of heads 5") != NULL);
    CHECK(strstr(fails(ctx, "deit_tiny", 100, &err), "no multiple of the patch size 16") != NULL);
    CHECK(strstr(fails(ctx, "resnext50_32x4d:width=8", 0, &err), "at least 16") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:groups=2", 0, &err), "bottleneck") != NULL);
    CHECK(strstr(fails(ctx, "", 0, &err), "no known architecture") != NULL);
    CHECK(strstr(fails(ctx, "resnet18:", 0, &err), "no option") != NULL);
    spm_context_destroy(ctx);
}

/* Initial values have the right spread, depend on the seed, and a new head leaves the body alone. */
static void test_initial_values(void)
{
    spm_context *ctx = context(2, SPM_ISA_AUTO);
    spm_model *a = network(ctx, "resnet18:width=32", 32, 32, 10), *b = network(ctx, "resnet18:width=32", 32, 32, 2);
    spm_parameter *p = spm_model_parameter(a, spm_model_find_parameter(a, "layer4.0.conv1.weight"));
    spm_parameter *q = spm_model_parameter(b, spm_model_find_parameter(b, "layer4.0.conv1.weight"));
    int64_t i, n = spm_tensor_count(&p->value);
    double sum = 0, squares = 0, most = 0;
    CHECK(memcmp(p->value.data, q->value.data, (size_t)n * sizeof(float)) == 0);
    for (i = 0; i < n; i++) {
        sum += (double)p->value.data[i];
        squares += (double)p->value.data[i] * (double)p->value.data[i];
    }
    CHECK_NEAR(squares / (double)n / (2.0 / (256 * 9)), 1, .02);
    CHECK_NEAR(sum / (double)n, 0, 3e-4);
    p = spm_model_parameter(a, spm_model_find_parameter(a, "fc.weight"));
    for (i = 0; i < spm_tensor_count(&p->value); i++) if (fabs((double)p->value.data[i]) > most) most = fabs((double)p->value.data[i]);
    CHECK(most <= 1.0 / 16 && most > .98 / 16);
    CHECK(fabs((double)spm_model_parameter(a, p->bias)->value.data[0]) <= 1.0 / 16 && spm_model_parameter(a, p->bias)->value.data[0] != 0.0f);
    spm_model_initialize(b, 4);
    CHECK(memcmp(spm_model_parameter(a, 0)->value.data, spm_model_parameter(b, 0)->value.data, 100) != 0);
    spm_model_destroy(a);
    spm_model_destroy(b);
    spm_context_destroy(ctx);
}

/* ---- PyTorch ---- */

typedef struct golden_case {
    char arch[64];
    int64_t n, height, width, classes;
} golden_case;

static const golden_case golden_cases[] = {
    { "resnet18", 2, 64, 64, 10 }, { "resnet50", 2, 64, 64, 10 }, { "resnext50_32x4d", 2, 48, 37, 4 }, { "resnet20", 5, 32, 32, 10 },
    { "vit:patch=16,dim=96,depth=3,heads=3", 5, 48, 64, 7 }, { "vit:patch=8,dim=40,depth=2,heads=4,mlp=2,distilled=1", 3, 32, 32, 7 }
};

static double worst_logit(const float *logits, const uint32_t *golden, int64_t n)
{
    double off = 0, top = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        const double want = (double)golden_float(golden[i]), d = fabs((double)logits[i] - want);
        if (fabs(want) > top) top = fabs(want);
        if (!(d <= off)) off = d;
    }
    return off / top;
}

/* One network on one instruction set; returns the words it used. */
static int golden_network(spm_isa isa, int number, const uint32_t *golden)
{
    const golden_case *c = &golden_cases[number];
    const int n_logits = (int)golden[0], n_parameters = (int)golden[1];
    const uint32_t *eval = golden + 2, *train = eval + n_logits, *gradient = train + n_logits;
    spm_context *ctx = context(2, isa);
    spm_model *model;
    spm_run *run;
    spm_run_desc desc;
    float *image, *direction;
    char name[128];
    int64_t i, k;
    uint32_t draws;
    int p, found = 0;
    double worst = 0;
    if (!ctx) return 2 + 2 * n_logits + 2 * n_parameters;
    model = network_of(ctx, c->arch, c->height, c->width, c->classes, SPM_NO_SEED);
    for (p = 0; p < spm_model_parameter_count(model); p++) golden_fill(spm_model_parameter(model, p));
    spm_model_touch(model);
    direction = (float *)malloc((size_t)n_logits * sizeof(float));
    snprintf(name, sizeof name, "image%d", number);
    image = golden_pictures(name, c->n, c->height, c->width);
    snprintf(name, sizeof name, "direction%d", number);
    draws = golden_stream(name);
    for (i = 0; i < n_logits; i++) direction[i] = (float)golden_draw(draws, (uint32_t)i);
    memset(&desc, 0, sizeof desc);
    desc.max_batch = c->n;
    desc.backward = 1;
    run = spm_run_create(model, &desc, NULL);
    (void)spm_run_input(run, spm_program_find(spm_model_program(model), "image"), image);
    CHECK_INT(spm_run_forward(run, c->n, 0), SPM_OK);
    CHECK_INT(n_logits, c->n * c->classes);
    snprintf(name, sizeof name, "%s on %s", c->arch, spm_isa_name(isa));
    {
        const spm_value logits = spm_program_find(spm_model_program(model), "logits");
        const double off = worst_logit(spm_run_data(run, logits), eval, n_logits);
        if (!(off <= 1e-4)) printf("    %s: logits off by %g\n", name, off);
        CHECK_MSG(off <= 1e-4, name);
        CHECK_INT(spm_run_set_gradient(run, logits, direction), SPM_OK);
        CHECK_INT(spm_run_backward(run), SPM_OK);
        spm_model_finish_gradients(model);
    }
    for (p = 0; p < spm_model_parameter_count(model); p++) {
        const spm_parameter *q = spm_model_parameter(model, p);
        char stream[160];
        double norm = 0, projection = 0, want_norm, want_projection, off;
        if (!q->gradient) continue;
        if (found == n_parameters) break;
        snprintf(stream, sizeof stream, "project %s", q->name);
        draws = golden_stream(stream);
        for (k = 0; k < spm_tensor_count(&q->value); k++) {
            norm += (double)q->gradient[k] * (double)q->gradient[k];
            projection += (double)q->gradient[k] * golden_draw(draws, (uint32_t)golden_index(&q->value, k));
        }
        norm = sqrt(norm);
        want_norm = (double)golden_float(gradient[2 * found]);
        want_projection = (double)golden_float(gradient[2 * found + 1]);
        off = fmax(fabs(norm - want_norm), fabs(projection - want_projection)) / want_norm;
        if (!(off <= worst)) worst = off;
        if (!(off <= 3e-3)) { /* fp32 against fp64: a ReLU near 0 that falls on the other side costs 1e-3 */
            snprintf(stream, sizeof stream, "%.60s: gradient of %.60s off by %g", name, q->name, off);
            CHECK_MSG(0, stream);
        }
        found++;
    }
    CHECK_INT(found, n_parameters);
    /* training mode: batch statistics; PyTorch's own fp32 results are off by more the deeper the network */
    CHECK_INT(spm_run_forward(run, c->n, 1), SPM_OK);
    {
        const double off = worst_logit(spm_run_data(run, spm_program_find(spm_model_program(model), "logits")), train, n_logits);
        if (!(off <= 1e-3)) printf("    %s: training logits off by %g\n", name, off);
        CHECK_MSG(off <= 1e-3, name);
    }
    free(image);
    free(direction);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    return 2 + 2 * n_logits + 2 * n_parameters;
}

static void test_against_pytorch(void)
{
    static const spm_isa isas[] = { SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512, SPM_ISA_C };
    int words, at, i, k;
    uint32_t *golden = golden_read("tests/golden/nets.bin", &words);
    CHECK_MSG(golden != NULL, "tests/golden/nets.bin is missing (run from the repository's root)");
    if (!golden) return;
    for (k = 0; k < 4; k++) {
        at = 0;
        for (i = 0; i < (int)(sizeof golden_cases / sizeof *golden_cases); i++) {
            const int all = isas[k] != SPM_ISA_C || i > 2; /* plain C is slow: without the large ones */
            if (all) at += golden_network(isas[k], i, golden + at);
            else at += 2 + 2 * (int)golden[at] + 2 * (int)golden[at + 1];
        }
        CHECK_INT(at, words);
    }
    free(golden);
}

/* ---- training ---- */

/* A network and its loss as two programs, an optimizer, 32 random pictures with random labels. */
typedef struct lesson {
    spm_context *ctx;
    spm_model *model, *loss;
    spm_run *run, *loss_run;
    spm_optimizer *optimizer;
    float *image, *target;
    int64_t *ids;
} lesson;

static lesson lesson_of(const char *arch, int px, int threads, int segments, float lr)
{
    lesson l;
    spm_run_desc desc;
    spm_optimizer_desc od = spm_optimizer_desc_init();
    int64_t shape[2] = { 0, 2 };
    int i, n = 32 * px * px * 3;
    spm_program *p;
    spm_value a, t;
    memset(&l, 0, sizeof l);
    memset(&desc, 0, sizeof desc);
    l.ctx = context(threads, SPM_ISA_AUTO);
    l.model = network(l.ctx, arch, px, px, 2);
    p = spm_program_create(l.ctx);
    a = spm_program_input(p, "logits", 2, shape, 1);
    t = spm_program_input(p, "target", 2, shape, 0);
    spm_program_output(p, "loss", spm_cross_entropy(p, a, t, 0, 0));
    l.loss = spm_model_create(p, 0, NULL);
    desc.max_batch = 32;
    desc.backward = 1;
    desc.segments = segments;
    desc.seed = 5;
    l.run = spm_run_create(l.model, &desc, NULL);
    l.loss_run = spm_run_create(l.loss, &desc, NULL);
    od.lr = lr;
    l.optimizer = spm_optimizer_create(l.model, &od, NULL);
    l.image = (float *)malloc((size_t)n * sizeof(float));
    l.target = (float *)calloc(64, sizeof(float));
    l.ids = (int64_t *)calloc(32, sizeof(int64_t));
    for (i = 0; i < n; i++) l.image[i] = spm_random_normal(9, 1, (uint64_t)i);
    for (i = 0; i < 32; i++) {
        const int label = (int)(spm_random_u32(9, 2, (uint64_t)i) & 1u);
        l.target[2 * i + label] = 1;
        l.ids[i] = i;
    }
    (void)spm_run_input(l.run, spm_program_find(spm_model_program(l.model), "image"), l.image);
    spm_run_examples(l.run, l.ids);
    (void)spm_run_input(l.loss_run, t, l.target);
    return l;
}

static double lesson_step(lesson *l, int n)
{
    const spm_value logits = spm_program_find(spm_model_program(l->model), "logits"), in = spm_program_find(spm_model_program(l->loss), "logits");
    double loss;
    CHECK_INT(spm_run_forward(l->run, n, 1), SPM_OK);
    (void)spm_run_input(l->loss_run, in, spm_run_data(l->run, logits));
    CHECK_INT(spm_run_forward(l->loss_run, n, 1), SPM_OK);
    CHECK_INT(spm_run_backward(l->loss_run), SPM_OK);
    loss = (double)spm_run_data(l->loss_run, spm_program_find(spm_model_program(l->loss), "loss"))[0];
    CHECK_INT(spm_run_set_gradient(l->run, logits, spm_run_gradient(l->loss_run, in)), SPM_OK);
    spm_model_zero_gradients(l->model);
    CHECK_INT(spm_run_backward(l->run), SPM_OK);
    CHECK_INT(spm_run_commit_statistics(l->run, .1f), SPM_OK);
    (void)spm_clip_gradients(l->model, 5.0);
    spm_optimizer_step(l->optimizer);
    return loss;
}

static void lesson_end(lesson *l)
{
    spm_optimizer_destroy(l->optimizer);
    spm_run_destroy(l->run);
    spm_run_destroy(l->loss_run);
    spm_model_destroy(l->model);
    spm_model_destroy(l->loss);
    free(l->image);
    free(l->target);
    free(l->ids);
    spm_context_destroy(l->ctx);
}

/* 32 random pictures are learned by heart; the committed statistics serve evaluation mode. */
static void test_overfitting(void)
{
    static const char archs[][64] = { "resnet18:width=8", "vit:patch=8,dim=48,depth=2,heads=3,mlp=2" };
    int i, step, right;
    for (i = 0; i < 2; i++) {
        lesson l = lesson_of(archs[i], 32, 0, 0, i ? 2e-3f : 3e-3f);
        double first = 0, last = 0;
        const float *out;
        for (step = 0; step < 60; step++) {
            last = lesson_step(&l, 32);
            if (!step) first = last;
        }
        CHECK(first > .4 && last < .02);
        CHECK_INT(spm_run_forward(l.run, 32, 0), SPM_OK);
        out = spm_run_data(l.run, spm_program_find(spm_model_program(l.model), "logits"));
        for (step = right = 0; step < 32; step++) right += (out[2 * step] > out[2 * step + 1]) == (l.target[2 * step] > 0.5f);
        CHECK_INT(right, 32);
        lesson_end(&l);
    }
}

/* Five steps on 1, 2 and 3 threads, without and with segments: the same bits in every parameter. */
static void test_threads_and_segments(void)
{
    static const char archs[][80] = { "resnet18:width=8,stem=cifar", "resnet50:width=8,groups=2", "resnet20:width=4",
                                      "vit:patch=8,dim=36,depth=2,heads=3,mlp=2,drop=.1,drop_path=.2" };
    int i, way, step, p;
    for (i = 0; i < 4; i++) {
        lesson first = lesson_of(archs[i], 32, 1, 0, 1e-3f);
        for (step = 0; step < 3; step++) (void)lesson_step(&first, step == 1 ? 5 : 8);
        for (way = 1; way < 4; way++) {
            lesson l = lesson_of(archs[i], 32, way == 3 ? 2 : way + 1, way == 3, 1e-3f);
            for (step = 0; step < 3; step++) (void)lesson_step(&l, step == 1 ? 5 : 8);
            for (p = 0; p < spm_model_parameter_count(l.model); p++) {
                const spm_tensor *a = &spm_model_parameter(first.model, p)->value, *b = &spm_model_parameter(l.model, p)->value;
                CHECK_MSG(memcmp(a->data, b->data, (size_t)spm_tensor_count(a) * sizeof(float)) == 0, spm_model_parameter(l.model, p)->name);
            }
            lesson_end(&l);
        }
        lesson_end(&first);
    }
}

/* Draws follow the example's id and the step, not its place in the batch. */
static void test_keyed_draws(void)
{
    lesson l = lesson_of("vit:patch=16,dim=24,depth=2,heads=2,drop=.3,drop_path=.3", 32, 1, 0, 1e-3f);
    const spm_value logits = spm_program_find(spm_model_program(l.model), "logits"), image = spm_program_find(spm_model_program(l.model), "image");
    const size_t picture = 32 * 32 * 3;
    float want[8], *turned = (float *)malloc(4 * picture * sizeof(float));
    int64_t ids[4];
    int i;
    CHECK_INT(spm_run_forward(l.run, 4, 1), SPM_OK);
    memcpy(want, spm_run_data(l.run, logits), sizeof want);
    for (i = 0; i < 4; i++) {
        memcpy(turned + (size_t)(3 - i) * picture, l.image + (size_t)i * picture, picture * sizeof(float));
        ids[3 - i] = i;
    }
    (void)spm_run_input(l.run, image, turned);
    spm_run_examples(l.run, ids);
    CHECK_INT(spm_run_forward(l.run, 4, 1), SPM_OK);
    for (i = 0; i < 4; i++) CHECK(memcmp(spm_run_data(l.run, logits) + 2 * (3 - i), want + 2 * i, 8) == 0);
    spm_run_step(l.run, 1);
    CHECK_INT(spm_run_forward(l.run, 4, 1), SPM_OK);
    CHECK(memcmp(spm_run_data(l.run, logits), want + 6, 8) != 0 || memcmp(spm_run_data(l.run, logits) + 2, want + 4, 8) != 0);
    free(turned);
    lesson_end(&l);
}

/* The softmax head (quirk Q1): outputs are the softmax of the logits. */
static void test_softmax_head(void)
{
    spm_context *ctx = context(1, SPM_ISA_AUTO);
    spm_arch arch;
    spm_model *model;
    spm_run *run;
    float *image = (float *)calloc(16 * 16 * 3, sizeof(float));
    const float *logits, *outputs;
    memset(&arch, 0, sizeof arch);
    arch.height = arch.width_px = 16;
    arch.classes = 2;
    arch.softmax_head = 1;
    CHECK_INT(spm_arch_parse(ctx, "resnet20:width=4", &arch, NULL), SPM_OK);
    model = spm_model_build(ctx, &arch, 1, NULL);
    run = spm_run_create(model, NULL, NULL);
    (void)spm_run_input(run, spm_program_find(spm_model_program(model), "image"), image);
    CHECK_INT(spm_run_forward(run, 1, 0), SPM_OK);
    logits = spm_run_data(run, spm_program_find(spm_model_program(model), "logits"));
    outputs = spm_run_data(run, spm_program_find(spm_model_program(model), "outputs"));
    CHECK_NEAR(outputs[0], 1 / (1 + exp((double)logits[1] - (double)logits[0])), 1e-6);
    CHECK_NEAR(outputs[0] + outputs[1], 1, 1e-6);
    free(image);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* Logits of every architecture (golden/logits.bin) on every instruction set, for batches of 5 and 1.  Those of more than 12
 * million parameters only where SPURMEM_ALL is set: their weights alone take a while to draw. */
static void every_architecture(void)
{
    static const char names[][24] = { "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
        "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
        "vit_tiny_patch16_224", "vit_small_patch16_384", "vit_b_16", "deit_large", "deit_tiny_distilled", "deit_small_distilled",
        "deit_base_distilled" };
    static const spm_isa isas[] = { SPM_ISA_NEON, SPM_ISA_AVX2, SPM_ISA_AVX512, SPM_ISA_C };
    const int count = (int)(sizeof names / sizeof names[0]);
    int words, i, k, j, n;
    uint32_t *golden = golden_read("tests/golden/logits.bin", &words);
    CHECK_MSG(golden && words == 15 * count, "tests/golden/logits.bin is missing (run from the repository's root)");
    for (i = 0; golden && i < count; i++) {
        const int64_t h = i < 10 ? 75 : i < 15 ? 35 : 48, w = i < 10 ? 61 : i < 15 ? 29 : 80;
        spm_context *first = context(0, SPM_ISA_AUTO);
        spm_model *drawn = network_of(first, names[i], h, w, 3, SPM_NO_SEED);
        double worst = 0, largest = 0;
        char name[40];
        float *image;
        int64_t parameters = 0;
        snprintf(name, sizeof name, "logits%d", i);
        image = golden_pictures(name, 5, h, w);
        for (j = 0; j < spm_model_parameter_count(drawn); j++) parameters += spm_tensor_count(&spm_model_parameter(drawn, j)->value);
        if (parameters < 12000000 || getenv("SPURMEM_ALL")) {
            for (j = 0; j < spm_model_parameter_count(drawn); j++) golden_fill(spm_model_parameter(drawn, j));
            for (j = 0; j < 15; j++) largest = fmax(largest, fabs((double)golden_float(golden[15 * i + j])));
            for (k = 0; k < 4; k++) {
                spm_context *ctx = context(0, isas[k]);
                spm_model *model = ctx ? network_of(ctx, names[i], h, w, 3, SPM_NO_SEED) : NULL;
                for (j = 0; model && j < spm_model_parameter_count(model); j++) {
                    const spm_tensor *t = &spm_model_parameter(model, j)->value;
                    memcpy(t->data, spm_model_parameter(drawn, j)->value.data, (size_t)spm_tensor_count(t) * sizeof(float));
                }
                if (model) spm_model_touch(model);
                for (n = 5; model && n > 0; n -= 4) {
                    spm_run_desc desc = SPM_ZERO;
                    spm_run *run;
                    desc.max_batch = n;
                    run = spm_run_create(model, &desc, NULL);
                    (void)spm_run_input(run, spm_program_find(spm_model_program(model), "image"), image);
                    CHECK_INT(spm_run_forward(run, n, 0), SPM_OK);
                    for (j = 0; j < 3 * n; j++)
                        worst = fmax(worst, fabs((double)spm_run_data(run, spm_program_find(spm_model_program(model), "logits"))[j]
                                                 - (double)golden_float(golden[15 * i + j])));
                    spm_run_destroy(run);
                }
                CHECK_MSG(worst <= 1e-4 * largest, names[i]);
                spm_model_destroy(model);
                spm_context_destroy(ctx);
            }
            if (getenv("VERBOSE")) printf("    %s: logits off by %.1e of the largest\n", names[i], worst / largest);
            fflush(stdout);
        }
        spm_model_destroy(drawn);
        spm_context_destroy(first);
        free(image);
    }
    free(golden);
}

/* ---- the last block of a ViT goes on with the tokens that a head reads: a network that takes all of them to its end ---- */

enum { LAST_D = 48, LAST_T = 17 };

static spm_value last_parameter(spm_program *p, const char *prefix, const char *rest, int64_t rows, int64_t columns)
{
    char name[64];
    const int64_t shape[2] = { rows, columns };
    snprintf(name, sizeof name, "%s%s", prefix, rest);
    return spm_program_parameter(p, name, columns ? 2 : 1, shape, SPM_INIT_ZERO, 0);
}

static spm_value last_linear(spm_program *p, const char *prefix, const char *layer, spm_value x, int64_t in, int64_t out)
{
    char rest[64];
    spm_value w;
    snprintf(rest, sizeof rest, "%s.weight", layer);
    w = last_parameter(p, prefix, rest, out, in);
    snprintf(rest, sizeof rest, "%s.bias", layer);
    return spm_linear(p, x, w, last_parameter(p, prefix, rest, out, 0));
}

static spm_value last_norm(spm_program *p, const char *prefix, const char *layer, spm_value x)
{
    char rest[64];
    spm_value w;
    snprintf(rest, sizeof rest, "%s.weight", layer);
    w = last_parameter(p, prefix, rest, LAST_D, 0);
    snprintf(rest, sizeof rest, "%s.bias", layer);
    return spm_layer_norm(p, x, w, last_parameter(p, prefix, rest, LAST_D, 0), 1e-6f);
}

/* vit:patch=8,dim=48,depth=2,heads=3,mlp=2 of 32 x 32 pixels and 5 classes, step by step. */
static spm_program *all_tokens(spm_context *ctx)
{
    static const char *const blocks[] = { "blocks.0.", "blocks.1." };
    const int64_t image[4] = { 0, 32, 32, 3 }, patch[4] = { LAST_D, 8, 8, 3 };
    spm_program *p = spm_program_create(ctx);
    spm_value x = spm_program_input(p, "image", 4, image, 0), y, class_token, position;
    int i;
    class_token = last_parameter(p, "", "cls_token", 1, LAST_D);
    position = last_parameter(p, "", "pos_embed", LAST_T, LAST_D);
    y = spm_program_parameter(p, "patch_embed.proj.weight", 4, patch, SPM_INIT_ZERO, 0);
    x = spm_conv2d(p, x, y, last_parameter(p, "", "patch_embed.proj.bias", LAST_D, 0), 8, 0, 1, 1);
    x = spm_tokens(p, x, class_token, position);
    for (i = 0; i < 2; i++) {
        y = last_linear(p, blocks[i], "attn.qkv", last_norm(p, blocks[i], "norm1", x), LAST_D, 3 * LAST_D);
        x = spm_add(p, x, last_linear(p, blocks[i], "attn.proj", spm_attention(p, y, 3), LAST_D, LAST_D));
        y = spm_gelu(p, last_linear(p, blocks[i], "mlp.fc1", last_norm(p, blocks[i], "norm2", x), LAST_D, 2 * LAST_D));
        x = spm_add(p, x, last_linear(p, blocks[i], "mlp.fc2", y, 2 * LAST_D, LAST_D));
    }
    x = spm_token(p, last_norm(p, "", "norm", x), 0);
    spm_program_output(p, "logits", last_linear(p, "", "head", x, LAST_D, 5));
    return p;
}

static void test_last_tokens(void)
{
    spm_context *ctx = context(2, SPM_ISA_AUTO);
    spm_model *few = network(ctx, "vit:patch=8,dim=48,depth=2,heads=3,mlp=2", 32, 32, 5), *all, *two;
    const spm_program *program = spm_model_program(few);
    float *image = (float *)malloc(3 * 32 * 32 * 3 * sizeof *image), d[15];
    spm_run_desc desc = SPM_ZERO;
    spm_run *runs[2];
    spm_tensor last;
    int i, k;
    all = spm_model_create(all_tokens(ctx), SPM_NO_SEED, NULL);
    CHECK(all != NULL);
    if (!all) return;
    CHECK_INT(spm_model_parameter_count(all), spm_model_parameter_count(few));
    for (i = 0; i < spm_model_parameter_count(few); i++) {
        const spm_parameter *from = spm_model_parameter(few, i);
        spm_parameter *to = spm_model_parameter(all, spm_model_find_parameter(all, from->name));
        CHECK_MSG(to && spm_tensor_same_shape(&to->value, &from->value), from->name);
        if (to) memcpy(to->value.data, from->value.data, (size_t)spm_tensor_count(&from->value) * sizeof(float));
    }
    spm_model_touch(all);
    for (i = 0; i < 3 * 32 * 32 * 3; i++) image[i] = spm_random_normal(3, 1, (uint64_t)i);
    for (i = 0; i < 15; i++) d[i] = spm_random_normal(3, 2, (uint64_t)i);
    desc.max_batch = 3;
    desc.backward = 1;
    for (k = 0; k < 2; k++) {
        spm_model *model = k ? all : few;
        spm_value logits = spm_program_find(spm_model_program(model), "logits");
        runs[k] = spm_run_create(model, &desc, NULL);
        (void)spm_run_input(runs[k], spm_program_find(spm_model_program(model), "image"), image);
        CHECK_INT(spm_run_forward(runs[k], 3, 1), SPM_OK);
        (void)spm_run_set_gradient(runs[k], logits, d);
        CHECK_INT(spm_run_backward(runs[k]), SPM_OK);
        spm_model_finish_gradients(model);
    }
    CHECK(memcmp(spm_run_data(runs[0], spm_program_find(program, "logits")),
                 spm_run_data(runs[1], spm_program_find(spm_model_program(all), "logits")), sizeof d) == 0);
    for (i = 0; i < spm_model_parameter_count(few); i++) { /* sums without the zeros have other chains */
        const spm_parameter *p = spm_model_parameter(few, i);
        spm_tensor got = p->value, want = p->value;
        got.data = p->gradient;
        want.data = spm_model_parameter(all, spm_model_find_parameter(all, p->name))->gradient;
        CHECK_MSG(spm_tensor_difference(&got, &want) <= 2e-6, p->name);
    }
    last = spm_program_shape(program, spm_program_find(program, "last"), 3);
    CHECK(last.rank == 3 && last.shape[1] == 1 && last.shape[2] == LAST_D);
    two = network(ctx, "vit:patch=8,dim=48,depth=2,heads=3,mlp=2,distilled=1", 32, 32, 5);
    last = spm_program_shape(spm_model_program(two), spm_program_find(spm_model_program(two), "last"), 3);
    CHECK(last.rank == 3 && last.shape[1] == 2);
    CHECK(spm_program_flops(program, 1, 0) < .9 * spm_program_flops(spm_model_program(all), 1, 0));
    for (k = 0; k < 2; k++) spm_run_destroy(runs[k]);
    free(image);
    spm_model_destroy(few);
    spm_model_destroy(all);
    spm_model_destroy(two);
    spm_context_destroy(ctx);
}

/* `test_nets logits`: every architecture's logits alone, for slow machines and emulated ones. */
int main(int argc, char **argv)
{
    TEST(every_architecture);
    if (argc > 1 && strcmp(argv[1], "logits") == 0) return TEST_END;
    TEST(test_against_pytorch);
    TEST(test_last_tokens);
    TEST(test_sizes);
    TEST(test_names_and_shapes);
    TEST(test_parsing);
    TEST(test_initial_values);
    TEST(test_overfitting);
    TEST(test_threads_and_segments);
    TEST(test_keyed_draws);
    TEST(test_softmax_head);
    return TEST_END;
}
