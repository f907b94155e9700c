/* Section CKPT: checkpoints go out and come back bit for bit, foreign names and layouts are understood, and what does not fit
 * is refused by name without touching the model. */
#include "failing.h"
#include "logged.h"
#include <stdarg.h>
#include <stdint.h>

static char root[400];

static const char *file(const char *name)
{
    static char path[2][500];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[0], "%s/%s", root, name);
    return path[turn];
}

static spm_model *build(spm_context *ctx, const char *text, int64_t size, int64_t classes, uint64_t seed, spm_arch *arch)
{
    spm_arch own = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_model *model;
    own.height = own.width_px = size;
    own.classes = classes;
    CHECK(spm_arch_parse(ctx, text, &own, &err) == SPM_OK);
    model = spm_model_build(ctx, &own, seed, &err);
    CHECK_STR(err.text, "");
    if (arch) *arch = own;
    return model;
}

/* Every value, buffers too, becomes a number of its own. */
static void scramble(spm_model *model, float shift)
{
    int i;
    int64_t k;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        for (k = 0; k < spm_tensor_count(&p->value); k++) p->value.data[k] = shift + (float)i + (float)k / 4096.0f;
    }
    spm_model_touch(model);
}

static int same_values(spm_model *a, spm_model *b)
{
    int i, n = spm_model_parameter_count(a);
    if (n != spm_model_parameter_count(b)) return 0;
    for (i = 0; i < n; i++) {
        const spm_tensor *x = &spm_model_parameter(a, i)->value, *y = &spm_model_parameter(b, i)->value;
        if (!spm_tensor_same_shape(x, y) || memcmp(x->data, y->data, (size_t)spm_tensor_count(x) * sizeof(float)) != 0) return 0;
    }
    return 1;
}

static void round_trips(void)
{
    static const char archs[][64] = { "resnet18:width=8,stem=cifar", "resnet50:width=8", "resnext50_32x4d:width=16", "resnet20",
                                      "vit:patch=8,dim=16,depth=2,heads=2,mlp=2", "vit:patch=8,dim=16,depth=1,heads=2,mlp=2,distilled=1" };
    static const char names[][20] = { "a.safetensors", "a.pth", "a.pt" };
    spm_context *ctx = logged_context(2);
    size_t a, n;
    for (a = 0; a < sizeof archs / sizeof archs[0]; a++) {
        for (n = 0; n < 2 + (a == 0); n++) {
            spm_error err = SPM_ZERO;
            spm_checkpoint_info info = SPM_ZERO, back;
            spm_model *from = build(ctx, archs[a], 32, 3, 1, &info.arch), *to = build(ctx, archs[a], 32, 3, 2, NULL);
            uint64_t version;
            if (!from || !to) { CHECK(0); spm_model_destroy(from); spm_model_destroy(to); continue; }
            scramble(from, 0.5f);
            info.transform = spm_transform_make(32, 32);
            info.transform.mean[1] = 0.1f;
            info.transform.resize = SPM_RESIZE_SHORT_SIDE;
            info.label_reversed = 1;
            info.arch.softmax_head = 1;
            info.epoch = 12;
            snprintf(info.method, sizeof info.method, "erm");
            snprintf(info.class_names, sizeof info.class_names, "cat|dog \"x\"|bird");
            CHECK(spm_checkpoint_save(from, file(names[n]), &info, &err) == SPM_OK);
            CHECK_STR(err.text, "");
            version = spm_model_version(to);
            CHECK(!same_values(from, to));
            CHECK(spm_checkpoint_load(to, file(names[n]), 0, &err) == SPM_OK);
            CHECK_STR(err.text, "");
            CHECK(same_values(from, to));
            CHECK(spm_model_version(to) != version);
            CHECK(spm_checkpoint_inspect(ctx, file(names[n]), &back, &err) == SPM_OK);
            CHECK_STR(back.source, n ? "torch zip" : "safetensors");
            CHECK_INT(back.has_arch, !n);
            if (!n) {
                CHECK_STR(back.arch.name, info.arch.name);
                CHECK(back.arch.height == 32 && back.arch.width_px == 32 && back.arch.classes == 3 && back.arch.softmax_head == 1);
                CHECK(memcmp(back.transform.mean, info.transform.mean, sizeof back.transform.mean) == 0);
                CHECK(memcmp(back.transform.std, info.transform.std, sizeof back.transform.std) == 0);
                CHECK(back.transform.resize == SPM_RESIZE_SHORT_SIDE && back.transform.height == 32 && back.label_reversed == 1 && back.epoch == 12);
                CHECK_STR(back.method, "erm");
                CHECK_STR(back.class_names, "cat|dog \"x\"|bird");
            } else {
                CHECK_INT(back.epoch, -1);
            }
            spm_model_destroy(from);
            spm_model_destroy(to);
        }
    }
    spm_context_destroy(ctx);
}

/* PyTorch's layouts and names, num_batches_tracked included. */
static void layout(void)
{
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_model *model = build(ctx, "resnet18:width=8,stem=cifar", 32, 2, 1, NULL);
    spm_archive *archive;
    const spm_archive_tensor *t;
    float values[8 * 3 * 9];
    int64_t steps = 5;
    int o, i, k;
    CHECK(spm_checkpoint_save(model, file("layout.safetensors"), NULL, &err) == SPM_OK);
    archive = spm_archive_open(ctx, file("layout.safetensors"), &err);
    t = archive ? spm_archive_find(archive, "conv1.weight") : NULL;
    CHECK(t && t->rank == 4 && t->shape[0] == 8 && t->shape[1] == 3 && t->shape[2] == 3 && t->shape[3] == 3);
    if (t && t->count == 216) {
        const float *w = spm_model_parameter(model, spm_model_find_parameter(model, "conv1.weight"))->value.data;
        CHECK(spm_archive_read_f32(archive, t, values, &err) == SPM_OK);
        for (o = 0; o < 8; o++) {
            for (i = 0; i < 3; i++) {
                for (k = 0; k < 9; k++) CHECK(values[(o * 3 + i) * 9 + k] == w[(o * 9 + k) * 3 + i]);
            }
        }
    }
    t = archive ? spm_archive_find(archive, "layer2.0.downsample.1.num_batches_tracked") : NULL;
    CHECK(t && t->rank == 0 && t->dtype == SPM_I64);
    CHECK(t && spm_archive_read_i64(archive, t, &steps, &err) == SPM_OK && steps == 0);
    if (archive) spm_archive_close(archive);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* ---- foreign names ---- */

typedef const char *(*rename_fn)(const char *name, char *out, size_t size);

/* Writes the model under other names, with `extra` tensors of a trainer beside them. */
static void save_as(spm_model *model, const char *path, rename_fn rename_it, const char *extra, int flat_tokens)
{
    spm_context *ctx = spm_model_context(model);
    spm_error err = SPM_ZERO;
    spm_archive_writer *writer = spm_archive_create(ctx, path, SPM_ARCHIVE_SAFETENSORS, &err);
    int i, pass, n = spm_model_parameter_count(model);
    float *moved = (float *)malloc(1 << 20), one = 1;
    for (pass = 0; pass < 2 && writer; pass++) {
        for (i = 0; i < n; i++) {
            const spm_parameter *p = spm_model_parameter(model, i);
            const int64_t *s = p->value.shape;
            int64_t shape[4] = { 1, 1, 1, 1 };
            int rank = p->value.rank, axis, lead = rank == 2 && !flat_tokens && (strstr(p->name, "token") || strstr(p->name, "pos_embed"));
            char name[200];
            const char *as = rename_it(p->name, name, sizeof name);
            int64_t o, c, k;
            for (axis = 0; axis < rank; axis++) shape[axis + lead] = s[axis];
            if (rank == 4) shape[1] = s[3], shape[2] = s[1], shape[3] = s[2];
            if (!pass) {
                spm_archive_add(writer, as, SPM_F32, rank + lead, shape);
                continue;
            }
            if (rank != 4) {
                spm_archive_put(writer, p->value.data);
                continue;
            }
            for (o = 0; o < s[0]; o++) {
                for (c = 0; c < s[3]; c++) {
                    for (k = 0; k < s[1] * s[2]; k++) moved[(o * s[3] + c) * s[1] * s[2] + k] = p->value.data[(o * s[1] * s[2] + k) * s[3] + c];
                }
            }
            spm_archive_put(writer, moved);
        }
        if (extra && !pass) spm_archive_add(writer, extra, SPM_F32, 0, NULL);
        if (extra && pass) spm_archive_put(writer, &one);
    }
    free(moved);
    CHECK(writer && spm_archive_commit(writer, &err) == SPM_OK);
    CHECK_STR(err.text, "");
}

static const char *as_is(const char *name, char *out, size_t size)
{
    snprintf(out, size, "%s", name);
    return out;
}
static const char *as_module(const char *name, char *out, size_t size)
{
    snprintf(out, size, "state_dict.module.%s%s", name[0] == 'f' && name[1] == 'c' ? "fc.0." : "", name[0] == 'f' && name[1] == 'c' ? name + 3 : name);
    return out;
}
static const char *as_linear(const char *name, char *out, size_t size)
{
    int head = name[0] == 'f' && name[1] == 'c';
    snprintf(out, size, "model_state_dict.%s%s", head ? "linear." : "backbone.", head ? name + 3 : name);
    return out;
}
static const char *as_model(const char *name, char *out, size_t size)
{
    const char *d = strstr(name, ".downsample.");
    if (d) snprintf(out, size, "model.%.*s.shortcut.%s", (int)(d - name), name, d + 12);
    else snprintf(out, size, "model.%s", name);
    return out;
}
static const char *as_torchvision(const char *name, char *out, size_t size)
{
    static const char pairs[][2][32] = {
        { "norm1", "ln_1" }, { "norm2", "ln_2" }, { "attn.qkv.weight", "self_attention.in_proj_weight" }, { "attn.qkv.bias", "self_attention.in_proj_bias" },
        { "attn.proj", "self_attention.out_proj" }, { "mlp.fc1", "mlp.linear_1" }, { "mlp.fc2", "mlp.3" } };
    size_t i;
    snprintf(out, size, "%s", name);
    if (strcmp(name, "cls_token") == 0) snprintf(out, size, "class_token");
    else if (strcmp(name, "pos_embed") == 0) snprintf(out, size, "encoder.pos_embedding");
    else if (strncmp(name, "patch_embed.proj.", 17) == 0) snprintf(out, size, "conv_proj.%s", name + 17);
    else if (strncmp(name, "norm.", 5) == 0) snprintf(out, size, "encoder.ln.%s", name + 5);
    else if (strncmp(name, "head.", 5) == 0) snprintf(out, size, "heads.%s", name);
    else if (strncmp(name, "blocks.", 7) == 0) {
        const char *word = strchr(name + 7, '.') + 1;
        for (i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
            if (strncmp(word, pairs[i][0], strlen(pairs[i][0])) != 0) continue;
            snprintf(out, size, "encoder.layers.encoder_layer_%.*s%s%s", (int)(word - name - 7), name + 7, pairs[i][1], word + strlen(pairs[i][0]));
        }
    }
    return out;
}

static const char *as_encoder(const char *name, char *out, size_t size)
{
    int head = name[0] == 'f' && name[1] == 'c';
    snprintf(out, size, "%s%s", head ? "classifier.1." : "encoder.", head ? name + 3 : name);
    return out;
}
static const char *as_student(const char *name, char *out, size_t size)
{
    snprintf(out, size, "student.module.backbone.%s", name);
    return out;
}

static void check_foreign(spm_context *ctx, const char *arch, rename_fn rename_it, const char *extra, int flat)
{
    spm_error err = SPM_ZERO;
    spm_model *from = build(ctx, arch, 32, 3, 1, NULL), *to = build(ctx, arch, 32, 3, 2, NULL);
    scramble(from, 2);
    save_as(from, file("foreign.bin"), rename_it, extra, flat);
    CHECK(spm_checkpoint_load(to, file("foreign.bin"), 0, &err) == SPM_OK);
    CHECK_STR(err.text, "");
    CHECK(same_values(from, to));
    spm_model_destroy(from);
    spm_model_destroy(to);
}

static void foreign_names(void)
{
    spm_context *ctx = logged_context(2);
    const char *resnet = "resnet18:width=8,stem=cifar", *vit = "vit:patch=8,dim=16,depth=2,heads=2,mlp=2";
    check_foreign(ctx, resnet, as_is, "bn1.num_batches_tracked", 0);
    check_foreign(ctx, resnet, as_module, "optimizer.state.0.exp_avg", 0);
    check_foreign(ctx, resnet, as_linear, "epoch", 0);
    check_foreign(ctx, resnet, as_model, "model_ema.conv1.weight", 0);
    check_foreign(ctx, resnet, as_encoder, "optimizer.state.0.exp_avg", 0);
    check_foreign(ctx, resnet, as_student, "epoch", 0);
    check_foreign(ctx, vit, as_student, "epoch", 0);
    check_foreign(ctx, vit, as_is, NULL, 1);
    check_foreign(ctx, vit, as_torchvision, NULL, 0);
    spm_context_destroy(ctx);
}

/* ---- what does not fit ---- */

typedef struct tally {
    int of[3];
    char last[3][200];
} tally;

static void count_difference(void *user, spm_checkpoint_kind kind, const char *name, const char *in_file, const char *in_model)
{
    tally *t = (tally *)user;
    t->of[kind]++;
    snprintf(t->last[kind], sizeof t->last[kind], "%s %s/%s", name, in_file, in_model);
}

static const char *as_other(const char *name, char *out, size_t size)
{
    if (strncmp(name, "layer4.1.conv2", 14) == 0) snprintf(out, size, "layer4.9.conv2.weight");
    else snprintf(out, size, "%s", name);
    return out;
}

static void differences(void)
{
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO, load = SPM_ZERO, two = SPM_ZERO;
    spm_model *model = build(ctx, "resnet18:width=8,stem=cifar", 32, 2, 1, NULL), *many = build(ctx, "resnet18:width=8,stem=cifar", 32, 9, 1, NULL);
    spm_archive_writer *writer;
    tally t = { { 0, 0, 0 }, { "", "", "" } };
    float values[8 * 27] = { 0 };
    int64_t shape[4] = { 8, 3, 3, 3 }, vector[1] = { 8 };
    static const char parts[4][12] = { "weight", "bias", "running_mean", "running_var" };
    int pass, k, block, conv, side;
    save_as(model, file("other.safetensors"), as_other, "queue", 0);
    CHECK_INT(spm_checkpoint_compare(many, file("other.safetensors"), 0, count_difference, &t, &err), SPM_E_SHAPE);
    CHECK(t.of[SPM_CHECKPOINT_MISSING] == 1 && t.of[SPM_CHECKPOINT_SURPLUS] == 2 && t.of[SPM_CHECKPOINT_MISSHAPEN] == 2);
    CHECK_STR(t.last[SPM_CHECKPOINT_MISSING], "layer4.1.conv2.weight /[64,64,3,3]");
    CHECK_STR(t.last[SPM_CHECKPOINT_SURPLUS], "queue []/");
    CHECK_STR(t.last[SPM_CHECKPOINT_MISSHAPEN], "fc.bias [2]/[9]");
    CHECK(spm_checkpoint_load(many, file("other.safetensors"), 0, &load) == SPM_E_SHAPE);
    CHECK_STR(err.text, load.text);
    CHECK(spm_checkpoint_save(model, file("same.pth"), NULL, &two) == SPM_OK);
    CHECK(spm_checkpoint_compare(model, file("same.pth"), 0, count_difference, NULL, &two) == SPM_OK);
    /* the same network twice: which one is meant is not for us to say */
    writer = spm_archive_create(ctx, file("twice.safetensors"), SPM_ARCHIVE_SAFETENSORS, &two);
    for (pass = 0; pass < 2 && writer; pass++) {
        for (side = 0; side < 2; side++) {
            for (block = 0; block < 9; block++) {
                for (conv = block ? 1 : 0; conv <= (block ? 2 : 0); conv++) {
                    char name[100], base[60];
                    if (block) snprintf(base, sizeof base, "%s.layer%d.%d", side ? "teacher" : "student", (block + 1) / 2, (block + 1) % 2);
                    else snprintf(base, sizeof base, "%s", side ? "teacher" : "student");
                    snprintf(name, sizeof name, "%s.conv%d.weight", base, block ? conv : 1);
                    if (pass) spm_archive_put(writer, values);
                    else spm_archive_add(writer, name, SPM_F32, 4, shape);
                    for (k = 0; k < 4; k++) {
                        snprintf(name, sizeof name, "%s.bn%d.%s", base, block ? conv : 1, parts[k]);
                        if (pass) spm_archive_put(writer, values);
                        else spm_archive_add(writer, name, SPM_F32, 1, vector);
                    }
                }
            }
        }
    }
    CHECK(writer && spm_archive_commit(writer, &two) == SPM_OK);
    CHECK(spm_checkpoint_load(model, file("twice.safetensors"), 0, &two) == SPM_E_FORMAT);
    CHECK(strstr(two.text, "as student.* and as teacher.*") != NULL);
    spm_model_destroy(model);
    spm_model_destroy(many);
    spm_context_destroy(ctx);
}

/* ---- refusals ---- */

/* Loading must fail, name both texts, and leave every value as it was. */
static void check_refused(spm_model *model, const char *path, int partial, const char *a, const char *b, const char *c)
{
    spm_error err = SPM_ZERO;
    spm_context *ctx = spm_model_context(model);
    spm_archive *before;
    (void)ctx;
    (void)before;
    scramble(model, 7);
    CHECK(spm_checkpoint_load(model, path, partial, &err) != SPM_OK);
    if (!strstr(err.text, a) || !strstr(err.text, b) || !strstr(err.text, c)) {
        printf("    \"%s\" lacks \"%s\", \"%s\" or \"%s\"\n", err.text, a, b, c);
        CHECK(0);
    }
    {
        int i;
        int64_t k;
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            const spm_parameter *p = spm_model_parameter(model, i);
            for (k = 0; k < spm_tensor_count(&p->value); k++) {
                if (p->value.data[k] != 7 + (float)i + (float)k / 4096.0f) { CHECK_MSG(0, p->name); return; }
            }
        }
    }
}

static void refusals(void)
{
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_model *small = build(ctx, "resnet18:width=8,stem=cifar", 32, 2, 1, NULL), *wide = build(ctx, "resnet18:width=16,stem=cifar", 32, 2, 1, NULL);
    spm_model *vit = build(ctx, "vit:patch=8,dim=16,depth=1,heads=2,mlp=2", 32, 2, 1, NULL), *many = build(ctx, "resnet18:width=8,stem=cifar", 32, 9, 1, NULL);
    spm_checkpoint_info info;
    uint8_t *data = NULL;
    size_t size = 0, cut;
    FILE *f;
    CHECK(spm_checkpoint_save(small, file("small.safetensors"), NULL, &err) == SPM_OK);
    CHECK(spm_checkpoint_save(small, file("small.pth"), NULL, &err) == SPM_OK);
    CHECK(spm_checkpoint_save(vit, file("vit.safetensors"), NULL, &err) == SPM_OK);
    check_refused(wide, file("small.safetensors"), 0, "conv1.weight: checkpoint has [8,3,3,3], model wants [16,3,3,3]", "of another shape", "small.safetensors");
    check_refused(wide, file("small.pth"), 1, "conv1.weight: checkpoint has [8,3,3,3], model wants [16,3,3,3]", "of another shape", "");
    check_refused(vit, file("small.safetensors"), 0, "18 missing (cls_token, pos_embed, patch_embed.proj.weight, ...)", "surplus (", "vit" + 3);
    check_refused(small, file("vit.safetensors"), 1, "missing (conv1.weight", "surplus (", "cls_token");
    check_refused(many, file("small.safetensors"), 0, "2 of another shape (fc.weight: checkpoint has [2,64], model wants [9,64]", "fc.bias", "");
    check_refused(small, file("nothing.safetensors"), 0, "nothing.safetensors", "", "");
    /* a new head */
    scramble(many, 7);
    CHECK(spm_checkpoint_load(many, file("small.safetensors"), 1, &err) == SPM_OK);
    CHECK(strstr(last_log, "fc.weight [2,64]") != NULL && strstr(last_log, "[9,64]") != NULL);
    {
        int head = spm_model_find_parameter(many, "fc.weight"), conv = spm_model_find_parameter(many, "conv1.weight");
        CHECK(spm_model_parameter(many, head)->value.data[3] == 7 + (float)head + 3 / 4096.0f);
        CHECK(memcmp(spm_model_parameter(many, conv)->value.data, spm_model_parameter(small, conv)->value.data, 8 * 27 * sizeof(float)) != 0);
    }
    /* cut-off files of both kinds */
    CHECK(spm_file_read(ctx, file("small.safetensors"), &data, &size, NULL) == SPM_OK);
    for (cut = 0; cut < size; cut += size / 7 + 1) {
        CHECK(spm_file_write(ctx, file("cut.safetensors"), data, cut, NULL) == SPM_OK);
        check_refused(small, file("cut.safetensors"), 0, "cut.safetensors", "", "");
    }
    spm_free(ctx, data);
    CHECK(spm_file_read(ctx, file("small.pth"), &data, &size, NULL) == SPM_OK);
    for (cut = 0; cut < size; cut += size / 7 + 1) {
        CHECK(spm_file_write(ctx, file("cut.pth"), data, cut, NULL) == SPM_OK);
        check_refused(small, file("cut.pth"), 0, "cut.pth", "", "");
    }
    spm_free(ctx, data);
    /* nowhere to write: an error, and nothing is left */
    memset(&err, 0, sizeof err);
    CHECK(spm_checkpoint_save(small, file("no/such/folder/x.safetensors"), NULL, &err) == SPM_E_IO);
    CHECK(strstr(err.text, "no/such/folder/x.safetensors") != NULL);
    memset(&err, 0, sizeof err);
    CHECK(spm_checkpoint_inspect(ctx, file("nothing.pth"), &info, &err) == SPM_E_IO && strstr(err.text, "nothing.pth") && info.epoch == -1);
    /* the metadata of another program is not taken for ours */
    {
        spm_archive_writer *writer = spm_archive_create(ctx, file("other.safetensors"), SPM_ARCHIVE_SAFETENSORS, &err);
        float one = 1;
        int64_t shape = 1;
        spm_archive_add_metadata(writer, "arch", "resnet18");
        spm_archive_add(writer, "w", SPM_F32, 1, &shape);
        spm_archive_put(writer, &one);
        memset(&err, 0, sizeof err);
        CHECK(spm_archive_commit(writer, &err) == SPM_OK);
        CHECK(spm_checkpoint_inspect(ctx, file("other.safetensors"), &info, &err) == SPM_OK && !info.has_arch);
        writer = spm_archive_create(ctx, file("other.safetensors"), SPM_ARCHIVE_SAFETENSORS, &err);
        spm_archive_add_metadata(writer, "writer", "spurmem 9");
        spm_archive_add_metadata(writer, "arch", "resnet19");
        spm_archive_add_metadata(writer, "image_size", "32x32");
        spm_archive_add_metadata(writer, "classes", "2");
        spm_archive_add(writer, "w", SPM_F32, 1, &shape);
        spm_archive_put(writer, &one);
        CHECK(spm_archive_commit(writer, &err) == SPM_OK);
        CHECK(spm_checkpoint_inspect(ctx, file("other.safetensors"), &info, &err) != SPM_OK && strstr(err.text, "resnet19") && !info.has_arch);
    }
    f = fopen(file("small.safetensors.part"), "rb");
    CHECK(f == NULL);
    if (f) fclose(f);
    spm_model_destroy(small);
    spm_model_destroy(wide);
    spm_model_destroy(vit);
    spm_model_destroy(many);
    spm_context_destroy(ctx);
}

/* A training checkpoint of a network nobody knows -> its state dict, bare, types and order kept, in both formats. */
static void converting(void)
{
    static const char ends[3][20] = { "bare.pth", "bare.safetensors", "again.pth" };
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_archive_writer *writer = spm_archive_create(ctx, file("wrapped.pth"), SPM_ARCHIVE_TORCH, &err);
    const int64_t two = 2, steps = 7;
    const uint16_t halves[2] = { 0x3C00, 0xC000 };
    const double doubles[2] = { 0.1, 1e300 };
    char from[400];
    int i;
    spm_archive_add(writer, "epoch_stats", SPM_F64, 1, &two);
    spm_archive_add(writer, "model.module.z.half", SPM_F16, 1, &two);
    spm_archive_add(writer, "model.module.a.double", SPM_F64, 1, &two);
    spm_archive_add(writer, "model.module.num_batches_tracked", SPM_I64, 0, NULL);
    spm_archive_put(writer, doubles);
    spm_archive_put(writer, halves);
    spm_archive_put(writer, doubles);
    spm_archive_put(writer, &steps);
    CHECK(spm_archive_commit(writer, &err) == SPM_OK);
    snprintf(from, sizeof from, "%s", file("wrapped.pth"));
    for (i = 0; i < 3; i++) {
        spm_archive *archive;
        int64_t n = 0, whole = 0;
        uint16_t h[2] = { 0, 0 };
        double d[2] = { 0, 0 };
        CHECK(spm_checkpoint_convert(ctx, from, file(ends[i]), NULL, &n, &err) == SPM_OK);
        CHECK_STR(err.text, "");
        CHECK_INT(n, 3);
        archive = spm_archive_open(ctx, file(ends[i]), &err);
        CHECK(archive && spm_archive_count(archive) == 3);
        if (archive) {
            CHECK_STR(spm_archive_tensor_at(archive, 0)->name, "z.half");
            CHECK(spm_archive_tensor_at(archive, 0)->dtype == SPM_F16);
            CHECK(spm_archive_read(archive, spm_archive_tensor_at(archive, 0), h, &err) == SPM_OK);
            CHECK(spm_archive_read(archive, spm_archive_find(archive, "a.double"), d, &err) == SPM_OK);
            CHECK(spm_archive_read(archive, spm_archive_find(archive, "num_batches_tracked"), &whole, &err) == SPM_OK);
        }
        CHECK(h[0] == halves[0] && h[1] == halves[1] && d[0] >= 0.1 && d[0] <= 0.1 && d[1] >= 1e300 && whole == 7);
        spm_archive_close(archive);
        snprintf(from, sizeof from, "%s", file(ends[i]));
    }
    CHECK(spm_checkpoint_convert(ctx, file("absent.pth"), file("x.pth"), NULL, NULL, &err) == SPM_E_IO);
    CHECK(strstr(err.text, "absent.pth") != NULL);
    spm_context_destroy(ctx);
}

/* ---- whose names a ViT has ---- */

static int holds(spm_context *ctx, const char *path, const char *const *names, int count)
{
    spm_error err = SPM_ZERO;
    spm_archive *archive = spm_archive_open(ctx, path, &err);
    int i, found = 0;
    CHECK_STR(err.text, "");
    for (i = 0; archive && i < count; i++) found += spm_archive_find(archive, names[i]) != NULL;
    if (archive && spm_archive_count(archive) != count) found = -1;
    spm_archive_close(archive);
    return found;
}

/* torchvision's names (of its VisionTransformer.state_dict()) and timm's for the same network of one block; every way
 * between the two, in files and through a model, gives the same tensors. */
static void vit_names(void)
{
    static const char *const timm[] = { "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.norm2.weight", "blocks.0.norm2.bias",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias" };
#define BLOCK "encoder.layers.encoder_layer_0."
    static const char *const torchvision[] = { "class_token", "encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias",
        BLOCK "ln_1.weight", BLOCK "ln_1.bias", BLOCK "self_attention.in_proj_weight", BLOCK "self_attention.in_proj_bias",
        BLOCK "self_attention.out_proj.weight", BLOCK "self_attention.out_proj.bias", BLOCK "ln_2.weight", BLOCK "ln_2.bias",
        BLOCK "mlp.0.weight", BLOCK "mlp.0.bias", BLOCK "mlp.3.weight", BLOCK "mlp.3.bias",
        "encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias" };
#undef BLOCK
    const int count = (int)(sizeof timm / sizeof timm[0]);
    static const char text[] = "vit:patch=8,dim=16,depth=1,heads=2,mlp=2";
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_checkpoint_info info = SPM_ZERO, back;
    spm_convert_desc desc = SPM_ZERO;
    spm_arch arch = SPM_ZERO;
    spm_model *from = build(ctx, text, 32, 3, 1, &info.arch), *to = build(ctx, text, 32, 3, 2, NULL);
    char path[500];
    scramble(from, 3);
    info.transform = spm_transform_make(32, 32);
    CHECK(spm_checkpoint_save(from, file("timm.pth"), &info, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("timm.pth"), timm, count), count);
    info.arch.names = SPM_NAMES_TORCHVISION;
    (void)spm_arch_text(&info.arch, info.arch.name, sizeof info.arch.name);
    CHECK_STR(info.arch.name, "vit:patch=8,dim=16,depth=1,heads=2,mlp=2,names=torchvision");
    CHECK(spm_checkpoint_save(from, file("tv.pth"), &info, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("tv.pth"), torchvision, count), count);
    CHECK(spm_checkpoint_load(to, file("tv.pth"), 0, &err) == SPM_OK);
    CHECK(same_values(from, to));
    /* what a file says of its names reaches the next file */
    CHECK(spm_checkpoint_inspect(ctx, file("tv.pth"), &back, &err) == SPM_OK && !back.has_arch);
    CHECK_INT(back.arch.names, SPM_NAMES_TORCHVISION);
    CHECK(spm_arch_parse(ctx, "vit_base", &back.arch, &err) == SPM_OK);
    CHECK_STR(back.arch.name, "vit_base:names=torchvision");
    CHECK(spm_arch_parse(ctx, "vit_base:names=timm", &back.arch, &err) == SPM_OK);
    CHECK_STR(back.arch.name, "vit_base");
    CHECK(spm_checkpoint_inspect(ctx, file("timm.pth"), &back, &err) == SPM_OK);
    CHECK_INT(back.arch.names, SPM_NAMES_TIMM);
    CHECK(spm_arch_parse(ctx, "vit_l_16", &back.arch, &err) == SPM_OK);
    CHECK_STR(back.arch.name, "vit_large");
    CHECK(spm_checkpoint_save(from, file("tv.safetensors"), &info, &err) == SPM_OK);
    CHECK(spm_checkpoint_inspect(ctx, file("tv.safetensors"), &back, &err) == SPM_OK && back.has_arch);
    CHECK_STR(back.arch.name, info.arch.name);
    /* converting keeps the names, or changes them both ways */
    snprintf(path, sizeof path, "%s", file("tv.safetensors"));
    CHECK(spm_checkpoint_convert(ctx, path, file("kept.pth"), NULL, NULL, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("kept.pth"), torchvision, count), count);
    desc.names = SPM_NAMES_TIMM;
    CHECK(spm_checkpoint_convert(ctx, path, file("there.safetensors"), &desc, NULL, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("there.safetensors"), timm, count), count);
    CHECK(spm_checkpoint_inspect(ctx, file("there.safetensors"), &back, &err) == SPM_OK);
    CHECK_STR(back.arch.name, text);
    desc.names = SPM_NAMES_TORCHVISION;
    snprintf(path, sizeof path, "%s", file("there.safetensors"));
    CHECK(spm_checkpoint_convert(ctx, path, file("back.safetensors"), &desc, NULL, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("back.safetensors"), torchvision, count), count);
    spm_model_initialize(to, 5);
    CHECK(spm_checkpoint_load(to, file("back.safetensors"), 0, &err) == SPM_OK);
    CHECK(same_values(from, to));
    /* the older spelling of the MLP becomes the newer one */
    save_as(from, file("older.safetensors"), as_torchvision, NULL, 0);
    snprintf(path, sizeof path, "%s", file("older.safetensors"));
    CHECK(holds(ctx, path, torchvision, count) == count - 2);
    CHECK(spm_checkpoint_convert(ctx, path, file("newer.pth"), &desc, NULL, &err) == SPM_OK);
    CHECK_INT(holds(ctx, file("newer.pth"), torchvision, count), count);
    CHECK_STR(err.text, "");
    /* a ResNet has one naming; a distilled network none in torchvision */
    spm_model_destroy(from);
    from = build(ctx, "resnet18:width=8", 32, 3, 1, NULL);
    CHECK(spm_checkpoint_save(from, file("resnet.pth"), NULL, &err) == SPM_OK);
    snprintf(path, sizeof path, "%s", file("resnet.pth"));
    CHECK(spm_checkpoint_convert(ctx, path, file("resnet.safetensors"), &desc, NULL, &err) == SPM_OK);
    CHECK(spm_checkpoint_load(from, file("resnet.safetensors"), 0, &err) == SPM_OK);
    spm_model_destroy(from);
    from = build(ctx, "vit:patch=8,dim=16,depth=1,heads=2,mlp=2,distilled=1", 32, 3, 1, NULL);
    CHECK(spm_checkpoint_save(from, file("distilled.pth"), NULL, &err) == SPM_OK);
    snprintf(path, sizeof path, "%s", file("distilled.pth"));
    CHECK(spm_checkpoint_convert(ctx, path, file("none.pth"), &desc, NULL, &err) == SPM_E_UNSUPPORTED);
    CHECK_MSG(strstr(err.text, "dist_token") != NULL, err.text);
    arch.height = arch.width_px = 32;
    memset(&err, 0, sizeof err);
    CHECK(spm_arch_parse(ctx, "deit_tiny_distilled:names=torchvision", &arch, &err) == SPM_OK);
    CHECK(spm_model_build(ctx, &arch, SPM_NO_SEED, &err) == NULL && strstr(err.text, "distilled"));
    memset(&err, 0, sizeof err);
    CHECK(spm_arch_parse(ctx, "vit_base:names=keras", &arch, &err) == SPM_E_ARGUMENT && strstr(err.text, "timm or torchvision"));
    CHECK(spm_arch_parse(ctx, "resnet18:names=timm", &arch, &err) == SPM_E_ARGUMENT);
    spm_model_destroy(from);
    spm_model_destroy(to);
    spm_context_destroy(ctx);
}

/* ---- beside the network ---- */

static const char *as_net(const char *name, char *out, size_t size)
{
    snprintf(out, size, "net.%s", name);
    return out;
}

static void beside(void)
{
    static const char *const trainers[] = { "optimizer.state.0.exp_avg", "epoch", "lr_scheduler.last_lr", "best_acc", "scaler._scale" };
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_model *model = build(ctx, "resnet18:width=8,stem=cifar", 32, 2, 1, NULL);
    tally t = { { 0, 0, 0 }, { "", "", "" } };
    size_t i;
    for (i = 0; i < sizeof trainers / sizeof trainers[0]; i++) {
        save_as(model, file("beside.bin"), as_net, trainers[i], 0);
        last_log[0] = 0;
        CHECK(spm_checkpoint_load(model, file("beside.bin"), 0, &err) == SPM_OK);
        CHECK_MSG(strstr(last_log, "tensors beside the network that are not read: 1 (") != NULL, last_log);
        CHECK_MSG(strncmp(strstr(last_log, "read: 1 (") + 9, trainers[i], strcspn(trainers[i], ".")) == 0, last_log);
    }
    save_as(model, file("beside.bin"), as_net, "projector.0.weight", 0);
    CHECK_INT(spm_checkpoint_compare(model, file("beside.bin"), 0, count_difference, &t, &err), SPM_E_SHAPE);
    CHECK(t.of[SPM_CHECKPOINT_SURPLUS] == 1 && t.of[0] + t.of[1] == 0);
    CHECK_STR(t.last[SPM_CHECKPOINT_SURPLUS], "projector.0.weight []/");
    CHECK_MSG(strstr(err.text, "1 surplus (projector.0.weight)") != NULL, err.text);
    CHECK(spm_checkpoint_load(model, file("beside.bin"), 1, &err) == SPM_OK);
    CHECK_MSG(strstr(last_log, "not read: 1 (projector)") != NULL, last_log);
    save_as(model, file("beside.bin"), as_module, "state_dict.queue", 0); /* in the state dict, so no trainer's */
    memset(&err, 0, sizeof err);
    CHECK(spm_checkpoint_load(model, file("beside.bin"), 0, &err) == SPM_E_SHAPE);
    CHECK_MSG(strstr(err.text, "1 surplus (queue)") != NULL, err.text);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* ---- Python objects in torch files ---- */

typedef struct bytes {
    unsigned char data[2000];
    size_t used;
} bytes;

static void put(bytes *b, const void *from, size_t count)
{
    memcpy(b->data + b->used, from, count);
    b->used += count;
}
static void put_key(bytes *b, const char *text)
{
    const unsigned char head[5] = { 'X', (unsigned char)strlen(text), 0, 0, 0 };
    put(b, head, 5);
    put(b, text, strlen(text));
}
#define PUT(b, literal) put(b, literal, sizeof literal - 1)

/* torch.save (before 1.6) of {"model": {"w": tensor of 2, or what `tensor` makes}, "other": object}: the object's opcodes
 * are the caller's. */
static void save_legacy(const char *path, const char *object, size_t size, int fake_storage)
{
    static const unsigned char head[] = { 0x80, 2, 0x8A, 10, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19, '.',
                                          0x80, 2, 'M', 0xE9, 3, '.', 0x80, 2, '}', '.', 0x80, 2, '}' };
    bytes b;
    FILE *f = fopen(path, "wb");
    b.used = 0;
    put(&b, head, sizeof head);
    put_key(&b, "model");
    PUT(&b, "}");
    put_key(&b, "w");
    PUT(&b, "ctorch._utils\n_rebuild_tensor_v2\n((");
    put_key(&b, "storage");
    if (fake_storage) PUT(&b, "cos\nsystem\n");
    else PUT(&b, "ctorch\nFloatStorage\n");
    put_key(&b, "0");
    put_key(&b, "cpu");
    PUT(&b, "K\2tQK\0K\2\205K\1\205\211ccollections\nOrderedDict\n)RtRss");
    put_key(&b, "other");
    put(&b, object, size);
    PUT(&b, "s.\x80\2]");
    put_key(&b, "0");
    PUT(&b, "a.\2\0\0\0\0\0\0\0\0\0\x80\x3F\0\0\0\xC0"); /* 2 elements: 1, -2 */
    CHECK(f && fwrite(b.data, 1, b.used, f) == b.used);
    if (f) fclose(f);
}

static void python_objects(void)
{
    /* argparse.Namespace(lr=.5); numpy.float64; a call of os.system("x"), whose result has attributes and items */
    static const char named[] = "cargparse\nNamespace\n)\x81}X\2\0\0\0lrG\x3F\xE0\0\0\0\0\0\0sb";
    static const char scalar[] = "cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0f8K\0K\1\207R"
        "(K\3X\1\0\0\0<NNNJ\xFF\xFF\xFF\xFFJ\xFF\xFF\xFF\xFFK\0tbU\10\0\0\0\0\0\0\0\0\206R";
    static const char call[] = "cposix\nsystem\nX\1\0\0\0x\205R}b(X\1\0\0\0ku]X\1\0\0\0va0";
    static const char plain[] = "(ctorch\ndevice\nX\3\0\0\0cpu\205Rctorch\nfloat32\nccollections\nOrderedDict\n)R"
        "ccollections\ndefaultdict\nc__builtin__\nlist\n\205RX\1\0\0\0aK\1sccollections\nCounter\n}X\1\0\0\0bK\1s\205R"
        "cbuiltins\nset\n]K\1a\205Rc_codecs\nencode\nX\1\0\0\0xX\6\0\0\0latin1\206Rcbuiltins\ncomplex\nG\0\0\0\0\0\0\0\0"
        "G\0\0\0\0\0\0\0\0\206Rctorch\nSize\nK\2\205\205Rt";
    spm_context *ctx = logged_context(2);
    spm_error err = SPM_ZERO;
    spm_archive *archive;
    spm_convert_desc desc = SPM_ZERO;
    const struct { const char *bytes; size_t size; const char *name; } objects[] = {
        { named, sizeof named - 1, "argparse.Namespace" }, { scalar, sizeof scalar - 1, "numpy.core.multiarray.scalar" },
        { call, sizeof call - 1, "posix.system" } };
    char from[500];
    int64_t n = 0;
    size_t i;
    snprintf(from, sizeof from, "%s", file("objects.pt"));
    save_legacy(from, plain, sizeof plain - 1, 0);
    archive = spm_archive_open(ctx, from, &err);
    CHECK_STR(err.text, "");
    CHECK(archive && spm_archive_count(archive) == 1 && spm_archive_find(archive, "model.w") != NULL);
    spm_archive_close(archive);
    desc.skip_objects = 1;
    for (i = 0; i < sizeof objects / sizeof objects[0]; i++) {
        float w[2] = { 0, 0 };
        memset(&err, 0, sizeof err);
        save_legacy(from, objects[i].bytes, objects[i].size, 0);
        CHECK(spm_archive_open(ctx, from, &err) == NULL && err.status == SPM_E_UNSUPPORTED);
        CHECK_MSG(strstr(err.text, objects[i].name) != NULL, err.text);
        memset(&err, 0, sizeof err);
        CHECK(spm_checkpoint_convert(ctx, from, file("objects.safetensors"), NULL, NULL, &err) == SPM_E_UNSUPPORTED);
        memset(&err, 0, sizeof err);
        CHECK(spm_checkpoint_convert(ctx, from, file("objects.safetensors"), &desc, &n, &err) == SPM_OK);
        CHECK_STR(err.text, "");
        CHECK_INT(n, 1);
        CHECK_MSG(strstr(last_log, "passed over") && strstr(last_log, objects[i].name), last_log);
        archive = spm_archive_open(ctx, file("objects.safetensors"), &err);
        CHECK(archive && spm_archive_read_f32(archive, spm_archive_find(archive, "w"), w, &err) == SPM_OK);
        CHECK(w[0] == 1.0f && w[1] == -2.0f);
        spm_archive_close(archive);
    }
    /* an object is no storage; and tensors inside of objects are none */
    save_legacy(from, named, sizeof named - 1, 1);
    CHECK(spm_checkpoint_convert(ctx, from, file("none.safetensors"), &desc, NULL, &err) == SPM_E_FORMAT);
    CHECK_MSG(strstr(err.text, "not described as torch does") != NULL, err.text);
    spm_context_destroy(ctx);
}

/* What loading costs: less than a fifth of the file beside the model, whatever the format, and no value changes when a
 * checksum is wrong. */
static size_t most_bytes, live_bytes;
static void *counting_alloc(void *user, size_t bytes)
{
    size_t *memory = (size_t *)malloc(bytes + 64);
    (void)user;
    if (!memory) return NULL;
    *memory = bytes;
    live_bytes += bytes;
    if (live_bytes > most_bytes) most_bytes = live_bytes;
    return memory + 8;
}
static void counting_free(void *user, void *memory)
{
    (void)user;
    if (!memory) return;
    live_bytes -= ((size_t *)memory)[-8];
    free((size_t *)memory - 8);
}

static void loading_memory(void)
{
    static const char names[2][24] = { "memory.pth", "memory.safetensors" };
    spm_context_desc how = SPM_ZERO;
    spm_context *ctx;
    spm_model *model;
    spm_error err = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int i;
    how.alloc = counting_alloc;
    how.free = counting_free;
    how.threads = 2;
    ctx = spm_context_create(&how);
    model = build(ctx, "resnet18:width=32", 64, 10, 1, NULL);
    for (i = 0; model && i < 2; i++) {
        const float first = spm_model_parameter(model, 0)->value.data[0];
        size_t before;
        CHECK(spm_checkpoint_save(model, file(names[i]), NULL, &err) == SPM_OK);
        spm_model_initialize(model, 9);
        before = most_bytes = live_bytes;
        CHECK(spm_checkpoint_load(model, file(names[i]), 0, &err) == SPM_OK);
        CHECK(spm_model_parameter(model, 0)->value.data[0] == first);
        CHECK_MSG(most_bytes - before < 11200000 / 5, names[i]);
    }
    if (model && spm_file_read(ctx, file(names[0]), &data, &size, &err) == SPM_OK) {
        const float kept = spm_model_parameter(model, 5)->value.data[0];
        data[size / 2] ^= 1; /* in the midst of some weight */
        CHECK(spm_file_write(ctx, file(names[0]), data, size, &err) == SPM_OK);
        spm_free(ctx, data);
        spm_model_parameter(model, 0)->value.data[0] = 42;
        CHECK(spm_checkpoint_load(model, file(names[0]), 0, &err) == SPM_E_FORMAT);
        CHECK_MSG(strstr(err.text, "CRC") != NULL, err.text);
        CHECK(spm_model_parameter(model, 0)->value.data[0] == 42 && spm_model_parameter(model, 5)->value.data[0] == kept);
    }
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    CHECK_INT(live_bytes, 0);
}

/* ---- position embeddings for another picture size: tests/golden/ckpt_pos_embed.py ---- */

typedef struct golden_grid {
    int side, rows, columns;
    float values[72];
} golden_grid;
static const golden_grid grids[] = {
#include "golden/ckpt_pos_embed.inc"
};

static void position_embeddings(void)
{
    spm_context *ctx = logged_context(2);
    size_t g;
    for (g = 0; g < sizeof grids / sizeof grids[0]; g++) {
        spm_error err = SPM_ZERO;
        spm_arch arch = SPM_ZERO;
        spm_model *from = build(ctx, "vit:patch=4,dim=2,depth=1,heads=1,mlp=2", 4 * grids[g].side, 2, 1, NULL), *to;
        spm_parameter *p = from ? spm_model_parameter(from, spm_model_find_parameter(from, "pos_embed")) : NULL;
        int i, n = grids[g].side * grids[g].side * 2, m = grids[g].rows * grids[g].columns * 2;
        arch.height = 4 * grids[g].rows;
        arch.width_px = 4 * grids[g].columns;
        arch.classes = 2;
        CHECK(spm_arch_parse(ctx, "vit:patch=4,dim=2,depth=1,heads=1,mlp=2", &arch, &err) == SPM_OK);
        to = spm_model_build(ctx, &arch, 2, &err);
        CHECK(p && to);
        if (!p || !to) return;
        p->value.data[0] = 5;
        p->value.data[1] = 6;
        for (i = 0; i < n; i++) p->value.data[2 + i] = (float)sin((double)((float)i * 1.7f));
        CHECK(spm_checkpoint_save(from, file("grid.safetensors"), NULL, &err) == SPM_OK);
        CHECK(spm_checkpoint_load(to, file("grid.safetensors"), 0, &err) == SPM_OK);
        CHECK_STR(err.text, "");
        CHECK(strstr(last_log, "pos_embed: resized from") != NULL);
        p = spm_model_parameter(to, spm_model_find_parameter(to, "pos_embed"));
        CHECK(p->value.data[0] == 5 && p->value.data[1] == 6);
        for (i = 0; i < m; i++) CHECK_NEAR(p->value.data[2 + i], grids[g].values[i], 3e-6);
        spm_model_destroy(from);
        spm_model_destroy(to);
    }
    spm_context_destroy(ctx);
}

/* ---- every allocation made to fail in turn ---- */

static void memory_failures(void)
{
    failing memory = SPM_ZERO;
    spm_context *ctx = failing_context(&memory, 1);
    spm_model *model;
    spm_arch arch = SPM_ZERO;
    spm_convert_desc desc = SPM_ZERO;
    int what;
    desc.names = SPM_NAMES_TORCHVISION;
    model = build(ctx, "vit:patch=8,dim=4,depth=1,heads=2,mlp=2", 16, 2, 1, &arch);
    for (what = 0; model && what < 8; what++) {
        long n, live = memory.live;
        int done = 0;
        for (n = 0; n < 3000 && !done; n++) {
            spm_error err = SPM_ZERO;
            spm_checkpoint_info info = SPM_ZERO;
            const char *path = file(what % 2 ? "oom.pth" : "oom.safetensors");
            info.arch = arch;
            failing_after(&memory, n);
            if (what < 2) done = spm_checkpoint_save(model, path, &info, &err) == SPM_OK;
            else if (what < 4) done = spm_checkpoint_load(model, path, 0, &err) == SPM_OK;
            else if (what < 6) done = spm_checkpoint_inspect(ctx, path, &info, &err) == SPM_OK;
            else done = spm_checkpoint_convert(ctx, path, file("oom.copy.safetensors"), &desc, NULL, &err) == SPM_OK;
            if (!done) CHECK_MSG(err.status == SPM_E_MEMORY, err.text[0] ? err.text : "failed without an error");
            CHECK_INT(memory.live, live);
        }
        CHECK(done && n > 3);
    }
    spm_model_destroy(model);
    spm_context_destroy(ctx);
    CHECK_INT(memory.live, 0);
}

/* ---- PyTorch's own file: a legacy checkpoint under state_dict.module., checked by its logits ---- */

static void resnet20(void)
{
    const char *data = getenv("SPURMEM_TEST_DATA");
    spm_context *ctx;
    spm_error err = SPM_ZERO;
    spm_model *model;
    spm_run *run;
    spm_run_desc how = SPM_ZERO;
    spm_json_value *json;
    const spm_json_value *outputs;
    spm_transform t = spm_transform_make(32, 32);
    uint8_t *text = NULL;
    size_t size = 0;
    char path[700];
    static float pixels[32 * 32 * 32 * 3];
    int64_t i, n, at, right = 0, c;
    double worst = 0;
    if (!data) SKIP("SPURMEM_TEST_DATA is not set");
    ctx = logged_context(2);
    snprintf(path, sizeof path, "%s/checkpoints/resnet20_expected.json", data);
    if (spm_file_read(ctx, path, &text, &size, NULL)) {
        spm_context_destroy(ctx);
        SKIP("no checkpoints in SPURMEM_TEST_DATA");
    }
    json = spm_json_parse(ctx, path, (const char *)text, size, &err);
    outputs = spm_json_get(json, "outputs");
    spm_free(ctx, text);
    model = build(ctx, "resnet20", 32, 10, 1, NULL);
    snprintf(path, sizeof path, "%s/checkpoints/resnet20-12fca82f.th", data);
    CHECK(spm_checkpoint_load(model, path, 0, &err) == SPM_OK);
    CHECK_STR(err.text, "");
    how.max_batch = 32;
    run = spm_run_create(model, &how, &err);
    CHECK(run != NULL);
    n = spm_json_length(outputs);
    CHECK_INT(n, 256);
    for (at = 0; run && at < n; at += 32) {
        const float *logits;
        for (i = 0; i < 32; i++) {
            spm_image image = SPM_ZERO;
            snprintf(path, sizeof path, "%s/checkpoints/%s", data, spm_json_as_string(spm_json_get(spm_json_at(outputs, at + i), "file"), ""));
            CHECK(spm_image_load(ctx, path, NULL, &image, &err) == SPM_OK);
            CHECK(image.width == 32 && image.height == 32);
            if (image.pixels) spm_transform_normalize(&t, &image, pixels + i * 32 * 32 * 3);
            spm_image_free(ctx, &image);
        }
        CHECK(spm_run_input(run, spm_program_find(spm_model_program(model), "image"), pixels) == SPM_OK);
        CHECK(spm_run_forward(run, 32, 0) == SPM_OK);
        logits = spm_run_data(run, spm_program_find(spm_model_program(model), "logits"));
        for (i = 0; logits && i < 32; i++) {
            const spm_json_value *expected = spm_json_at(outputs, at + i);
            int64_t best = 0;
            for (c = 0; c < 10; c++) {
                double off = fabs((double)logits[i * 10 + c] - spm_json_as_number(spm_json_at(spm_json_get(expected, "logits"), c), 1e9));
                if (off > worst) worst = off;
                if (logits[i * 10 + c] > logits[i * 10 + best]) best = c;
            }
            right += best == spm_json_as_int(spm_json_get(expected, "label"), -1);
        }
    }
    CHECK_INT(right, 256);
    CHECK_NEAR(worst, 0, 1e-3);
    spm_run_destroy(run);
    spm_model_destroy(model);
    spm_json_free(ctx, json);
    spm_context_destroy(ctx);
}

int main(void)
{
    spm_context *ctx = logged_context(2);
    test_folder(root, sizeof root, "test_ckpt");
    if (spm_directory_create(ctx, root, NULL)) printf("    %s cannot be made\n", root);
    spm_context_destroy(ctx);
    TEST(round_trips);
    TEST(layout);
    TEST(foreign_names);
    TEST(differences);
    TEST(refusals);
    TEST(converting);
    TEST(vit_names);
    TEST(beside);
    TEST(python_objects);
    TEST(loading_memory);
    TEST(position_embeddings);
    TEST(memory_failures);
    TEST(resnet20);
    return TEST_END;
}
