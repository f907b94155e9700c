/* Every allocation made to fail in turn.  Each job below is first run in peace, which counts its allocations, and then
 * again and again with one allocation failing (and with all from there on), on one thread and on two.  Each time it must end
 * with one sentence about memory, hand every block back, leave no half-written file, and work again once there is memory.
 * Short jobs are tried at every allocation, long ones at the first and last and a drawn sample between. */
#include "failing.h"
#include "scratch.h"
#include "tar.h"
#include <time.h>

typedef spm_status (*job_function)(spm_context *ctx, spm_error *err);

typedef struct job {
    const char *name;
    job_function run;
    const char *folder;   /* below the scratch folder: looked through after each failure; NULL: the job writes no files */
    int spare;            /* at most so many attempts may succeed, with the same results: see `fingerprint` */
    long edge, middle;    /* all allocations, if there are at most 2 edge + middle; else so many at each end and drawn between */
} job;

/* A number made from the results of a job.  Some allocations are done without (a cache of pictures, a worker thread): then
 * the job succeeds, and this must be the same as in peace. */
static uint64_t fingerprint;

static void add_to_fingerprint(const void *data, size_t size)
{
    const unsigned char *byte = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < size; i++) fingerprint = (fingerprint ^ byte[i]) * 0x100000001b3u;
}

static void add_file_to_fingerprint(const char *path)
{
    uint8_t *data;
    size_t size;
    if (spm_file_read(calm, path, &data, &size, NULL) == SPM_OK) add_to_fingerprint(data, size);
    spm_free(calm, data);
}

/* ---- jobs: formats ---- */

static spm_status out_of_memory(spm_error *err, const char *what)
{
    if (err->status == SPM_OK) { /* for functions that answer with NULL alone */
        err->status = SPM_E_MEMORY;
        snprintf(err->text, sizeof err->text, "out of memory for %s", what);
    }
    return err->status;
}

static spm_status job_json(spm_context *ctx, spm_error *err)
{
    spm_json *json = spm_json_create(ctx);
    spm_json_value *root = NULL;
    const char *text = NULL;
    int i;
    if (!json) return out_of_memory(err, "json");
    spm_json_object_begin(json, NULL);
    spm_json_array_begin(json, "list");
    for (i = 0; i < 200; i++) {
        if (i % 3) spm_json_number(json, NULL, i / 7.0);
        else spm_json_string(json, NULL, "a \"quoted\" w\xc3\xb6rd");
    }
    spm_json_array_end(json);
    spm_json_raw(json, "raw", "[1,2,{\"a\":null}]");
    spm_json_object_end(json);
    text = spm_json_finish(json);
    if (!text) (void)out_of_memory(err, "json");
    else root = spm_json_parse(ctx, "text", text, strlen(text), err);
    if (root) CHECK_INT(spm_json_length(spm_json_get(root, "list")), 200);
    spm_json_free(ctx, root);
    spm_json_destroy(json);
    return err->status;
}

static spm_status job_csv(spm_context *ctx, spm_error *err)
{
    char text[4000];
    size_t n = (size_t)snprintf(text, sizeof text, "a,\"b,c\",d\r\n");
    int i;
    spm_csv *csv;
    for (i = 0; i < 100; i++) n += (size_t)snprintf(text + n, sizeof text - n, "%d,\"x\"\"%d\",\r\n", i, i * i);
    csv = spm_csv_parse(ctx, "table.csv", text, n, 0, err);
    if (csv) CHECK_STR(spm_csv_field(csv, 99, 1), "x\"9801");
    spm_csv_destroy(csv);
    return err->status;
}

static spm_status archive_round_trip(spm_context *ctx, const char *path, spm_archive_kind kind, spm_error *err)
{
    spm_archive_writer *writer = spm_archive_create(ctx, path, kind, err);
    spm_archive *archive;
    const int64_t shape[2] = { 6, 5 }, one[1] = { 3 };
    const int64_t whole[3] = { 7, 8, -9 };
    float values[30], back[30];
    int64_t integers[3];
    int i;
    for (i = 0; i < 30; i++) values[i] = (float)i;
    if (!writer) return err->status;
    spm_archive_add_metadata(writer, "note", "text");
    for (i = 0; i < 12; i++) {
        char name[40];
        snprintf(name, sizeof name, "layer%d.weight", i);
        spm_archive_add(writer, name, SPM_F32, 2, shape);
    }
    spm_archive_add(writer, "steps", SPM_I64, 1, one);
    for (i = 0; i < 12; i++) spm_archive_put(writer, values);
    spm_archive_put(writer, whole);
    if (spm_archive_commit(writer, err)) return err->status;
    archive = spm_archive_open(ctx, path, err);
    if (!archive) return err->status;
    CHECK_INT(spm_archive_count(archive), 13);
    if (!spm_archive_read_f32(archive, spm_archive_find(archive, "layer7.weight"), back, err)) CHECK_NEAR(back[29], 29.0, 0);
    if (!err->status && !spm_archive_read_i64(archive, spm_archive_find(archive, "steps"), integers, err)) CHECK_INT(integers[2], -9);
    spm_archive_close(archive);
    add_file_to_fingerprint(path);
    return err->status;
}

static spm_status job_safetensors(spm_context *ctx, spm_error *err)
{
    return archive_round_trip(ctx, in_scratch("w/a.safetensors"), SPM_ARCHIVE_SAFETENSORS, err);
}

static spm_status job_torch(spm_context *ctx, spm_error *err)
{
    return archive_round_trip(ctx, in_scratch("w/a.pth"), SPM_ARCHIVE_TORCH, err);
}

static spm_status job_tar(spm_context *ctx, spm_error *err)
{
    spm_tar *tar = spm_tar_open(ctx, in_scratch("birds.tar"), err);
    uint8_t *data;
    size_t size;
    if (!tar) return err->status;
    if (!spm_tar_read(tar, spm_tar_find(tar, "x/metadata.csv"), &data, &size, err)) CHECK(size > 20);
    spm_free(ctx, data);
    spm_tar_close(tar);
    return err->status;
}

static spm_status job_arrays(spm_context *ctx, spm_error *err)
{
    const int64_t shape[2] = { 3, 2 };
    const float values[6] = { 1, 2, 3, 4, 5, 6 };
    spm_array array = SPM_ZERO;
    if (spm_npy_save_f32(ctx, in_scratch("w/a.npy"), values, 2, shape, err)) return err->status;
    if (!spm_npy_load(ctx, in_scratch("w/a.npy"), &array, err)) CHECK_INT(array.count, 6);
    spm_array_free(ctx, &array);
    memset(&array, 0, sizeof array);
    if (!err->status && !spm_idx_load(ctx, in_scratch("a.idx.gz"), &array, err)) CHECK_INT(array.count, 12);
    spm_array_free(ctx, &array);
    return err->status;
}

static spm_status job_deflate(spm_context *ctx, spm_error *err)
{
    static char text[40000];
    uint8_t *packed = NULL, *back = NULL;
    size_t size, n;
    int i;
    for (i = 0; i < (int)sizeof text; i++) text[i] = (char)(i % 251 + i / 999);
    if (!spm_deflate(ctx, text, sizeof text, 1, &packed, &size, err) && !spm_inflate(ctx, packed, size, 1, 0, &back, &n, err)) {
        CHECK(n == sizeof text && memcmp(back, text, n) == 0);
    }
    spm_free(ctx, packed);
    spm_free(ctx, back);
    return err->status;
}

/* ---- jobs: pictures ---- */

static spm_status picture_round_trip(spm_context *ctx, int kind, spm_error *err)
{
    spm_image image = SPM_ZERO, back = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0;
    int i;
    if (spm_image_create(ctx, 37, 29, &image, err)) return err->status;
    for (i = 0; i < 37 * 29 * 3; i++) image.pixels[i] = (uint8_t)(i * i / 31);
    if (kind < 2) (void)spm_image_encode_jpeg(ctx, &image, 80, kind, &data, &size, err);
    else if (kind == 2) (void)spm_image_encode_png(ctx, &image, &data, &size, err);
    else (void)spm_image_encode_ppm(ctx, &image, &data, &size, err);
    if (!err->status && !spm_image_decode(ctx, NULL, data, size, NULL, &back, err)) CHECK(back.width == 37 && back.height == 29);
    if (err->status) CHECK(back.pixels == NULL && back.width == 0);
    spm_free(ctx, data);
    spm_image_free(ctx, &image);
    spm_image_free(ctx, &back);
    return err->status;
}

static spm_status job_pictures(spm_context *ctx, spm_error *err)
{
    int kind;
    for (kind = 0; kind < 4; kind++)
        if (picture_round_trip(ctx, kind, err)) break;
    return err->status;
}

static spm_status job_load_pictures(spm_context *ctx, spm_error *err)
{
    spm_image image = SPM_ZERO;
    spm_decode_desc small = SPM_ZERO;
    small.scale = 2;
    if (!spm_image_load(ctx, in_scratch("birds/p/00.jpg"), NULL, &image, err)) CHECK_INT(image.width, 20);
    spm_image_free(ctx, &image);
    if (!err->status && !spm_image_load(ctx, in_scratch("birds/p/00.jpg"), &small, &image, err)) CHECK_INT(image.width, 10);
    spm_image_free(ctx, &image);
    if (!err->status && !spm_image_load(ctx, in_scratch("birds/p/01.png"), NULL, &image, err)) CHECK_INT(image.width, 20);
    spm_image_free(ctx, &image);
    return err->status;
}

static spm_status job_resize(spm_context *ctx, spm_error *err)
{
    spm_image image = SPM_ZERO, result = SPM_ZERO;
    spm_transform transform = spm_transform_make(16, 16);
    int f;
    if (spm_image_create(ctx, 40, 30, &image, err)) return err->status;
    for (f = SPM_FILTER_BILINEAR; f <= SPM_FILTER_LANCZOS && !err->status; f++) {
        (void)spm_image_resize(ctx, &image, 16, 20, (spm_filter)f, &result, err);
        spm_image_free(ctx, &result);
    }
    if (!err->status) (void)spm_image_crop(ctx, &image, 3, 3, 20, 20, &result, err);
    spm_image_free(ctx, &result);
    for (f = SPM_RESIZE_PAPER; f <= SPM_RESIZE_SHORT_SIDE && !err->status; f++) {
        transform.resize = (spm_resize_mode)f;
        (void)spm_transform_image(ctx, &transform, &image, &result, err);
        spm_image_free(ctx, &result);
    }
    spm_image_free(ctx, &image);
    return err->status;
}

/* ---- jobs: data sets ---- */

static spm_status load_epoch(spm_context *ctx, const char *name, int workers, spm_error *err)
{
    spm_dataset *set = open_set(ctx, name, err);
    spm_loader_desc desc = SPM_ZERO;
    spm_loader *loader;
    spm_batch batch;
    int got = 1;
    if (!set) return err->status;
    desc.transform = spm_transform_make(8, 8);
    desc.batch = 2;
    desc.workers = workers;
    desc.shuffle = 1;
    desc.augment = SPM_AUGMENT_PAPER;
    loader = spm_loader_create(set, &desc, err);
    if (loader) {
        uint64_t hash = spm_dataset_hash(set);
        int g;
        add_to_fingerprint(&hash, sizeof hash);
        for (g = 0; g < spm_dataset_groups(set); g++) add_to_fingerprint(spm_dataset_group_name(set, g), strlen(spm_dataset_group_name(set, g)));
        if (spm_loader_start(loader, 0, NULL, 0)) got = -1;
        while (got > 0 && (got = spm_loader_next(loader, &batch)) > 0) {
            add_to_fingerprint(batch.pixels, (size_t)batch.count * 8 * 8 * 3 * sizeof(float));
            add_to_fingerprint(batch.group, (size_t)batch.count * sizeof(int32_t));
        }
        if (got < 0) *err = *spm_loader_error(loader);
        spm_loader_destroy(loader);
    }
    spm_dataset_close(set);
    return err->status;
}

static spm_status job_waterbirds(spm_context *ctx, spm_error *err)
{
    return load_epoch(ctx, "birds", spm_context_threads(ctx), err);
}

static spm_status job_celeba(spm_context *ctx, spm_error *err)
{
    return load_epoch(ctx, "celeba", 1, err);
}

static spm_status job_folders(spm_context *ctx, spm_error *err)
{
    return load_epoch(ctx, "tree", 1, err);
}

static spm_status job_tar_set(spm_context *ctx, spm_error *err)
{
    return load_epoch(ctx, "birds.tar", spm_context_threads(ctx), err);
}

/* ---- jobs: networks ---- */

static void write_nothing(void *user, spm_tensor *value)
{
    (void)user;
    value->data[0] = 0.0f;
}

/* Builds, runs forward and backward with a mask, hooks, a kept value, segments and own buffers, takes a step. */
static spm_status use_model(spm_context *ctx, const char *text, const char *masked, int segments, spm_error *err)
{
    static float pixels[2 * 16 * 16 * 3];
    const float gradient[4] = { 1, -1, 0, 2 };
    double sums[512];
    spm_arch arch;
    spm_model *model;
    spm_run *run = NULL;
    spm_optimizer *optimizer = NULL;
    spm_run_desc desc = SPM_ZERO;
    spm_optimizer_desc adam = spm_optimizer_desc_init();
    const spm_program *program;
    int p;
    memset(sums, 0, sizeof sums);
    if (tiny_arch(ctx, text, &arch, err)) return err->status;
    model = spm_model_build(ctx, &arch, 1, err);
    if (!model) return err->status;
    desc.max_batch = 2;
    desc.backward = 1;
    desc.segments = segments;
    run = spm_run_create(model, &desc, err);
    if (run) optimizer = spm_optimizer_create(model, &adam, err);
    program = spm_model_program(model);
    p = spm_model_find_parameter(model, masked);
    if (optimizer) {
        spm_parameter *parameter = spm_model_parameter(model, p);
        float *keep = (float *)calloc((size_t)spm_tensor_count(&parameter->value), sizeof(float));
        if (spm_run_keep(run, spm_program_find(program, "block1")) || spm_run_own_buffers(run, 1)
            || spm_run_hook(run, spm_program_find(program, "features"), SPM_HOOK_SUM, 0, sums)
            || spm_run_hook(run, parameter->id, SPM_HOOK_VALUE_GRADIENT, 0, sums)
            || spm_run_hook_write(run, spm_program_find(program, "features"), write_nothing, NULL) || spm_run_set_mask(run, p, keep)
            || spm_run_input(run, spm_program_find(program, "image"), pixels) || spm_run_forward(run, 2, 1)
            || spm_run_set_gradient(run, spm_program_find(program, "logits"), gradient) || spm_run_backward(run)
            || spm_run_commit_statistics(run, 0.1f)) {
            *err = *spm_run_error(run);
        } else {
            spm_model_finish_gradients(model);
            (void)spm_clip_gradients(model, 1.0);
            spm_optimizer_step(optimizer);
            CHECK_INT(spm_optimizer_steps(optimizer), 1);
        }
        free(keep);
    }
    spm_optimizer_destroy(optimizer);
    spm_run_destroy(run);
    spm_model_destroy(model);
    return err->status;
}

static spm_status job_resnet(spm_context *ctx, spm_error *err)
{
    return use_model(ctx, TINY_RESNET, "conv1.weight", 0, err);
}

static spm_status job_vit(spm_context *ctx, spm_error *err)
{
    return use_model(ctx, TINY_VIT, "blocks.0.attn.qkv.weight", 1, err);
}

static spm_status job_gradient_check(spm_context *ctx, spm_error *err)
{
    spm_op_call call = SPM_ZERO;
    call.n_in = 3;
    call.attr.stride[0] = call.attr.stride[1] = 1;
    call.in[0] = spm_tensor_make(NULL, 4, 2, 5, 5, 3);
    call.in[1] = spm_tensor_make(NULL, 4, 4, 3, 3, 3);
    call.in[2] = spm_tensor_make(NULL, 1, 4, 0, 0, 0);
    CHECK(spm_gradient_check(ctx, SPM_OP_CONV2D, &call, 3, err) < 1e-2);
    return err->status;
}

static spm_model *loaded(spm_context *ctx, const char *text, const char *file, spm_error *err)
{
    spm_arch arch;
    spm_model *model = NULL;
    if (!tiny_arch(ctx, text, &arch, err)) model = spm_model_build(ctx, &arch, 1, err);
    if (model && spm_checkpoint_load(model, in_scratch(file), 0, err)) {
        spm_model_destroy(model);
        return NULL;
    }
    return model;
}

/* Inspect, load, save in both formats. */
static spm_status job_checkpoint(spm_context *ctx, spm_error *err)
{
    spm_checkpoint_info info;
    spm_model *model;
    if (spm_checkpoint_inspect(ctx, in_scratch("vit.safetensors"), &info, err)) return err->status;
    CHECK_INT(info.has_arch, 1);
    model = loaded(ctx, TINY_VIT, "vit.safetensors", err);
    if (!model) return err->status;
    if (!spm_checkpoint_save(model, in_scratch("w/b.safetensors"), &info, err) && !spm_checkpoint_save(model, in_scratch("w/b.pth"), &info, err)) {
        add_file_to_fingerprint(in_scratch("w/b.safetensors"));
        add_file_to_fingerprint(in_scratch("w/b.pth"));
    }
    spm_model_destroy(model);
    return err->status;
}

/* ---- jobs: the study ---- */

static spm_reading tiny_reading(void)
{
    spm_reading reading = SPM_ZERO;
    reading.transform = spm_transform_make(16, 16);
    return reading;
}

static spm_status job_evaluate(spm_context *ctx, spm_error *err)
{
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_model *model = set ? loaded(ctx, TINY_VIT, "vit.safetensors", err) : NULL;
    spm_eval_desc desc = SPM_ZERO;
    spm_eval eval;
    desc.reading = tiny_reading();
    desc.batch = 4;
    desc.workers = spm_context_threads(ctx);
    if (model && !spm_evaluate(model, set, &desc, &eval, err)) {
        spm_json *json = spm_json_create(ctx);
        spm_json_object_begin(json, NULL);
        spm_eval_json(json, "eval", &eval);
        spm_json_object_end(json);
        if (!spm_json_finish(json)) (void)out_of_memory(err, "json");
        else add_to_fingerprint(spm_json_finish(json), strlen(spm_json_finish(json)));
        spm_json_destroy(json);
        CHECK(eval.count == 12);
        spm_eval_free(ctx, &eval);
    }
    spm_model_destroy(model);
    spm_dataset_close(set);
    return err->status;
}

static spm_status rank(spm_context *ctx, const char *arch, const char *file, spm_error *err)
{
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_model *model = set ? loaded(ctx, arch, file, err) : NULL;
    spm_attr_desc desc = SPM_ZERO;
    spm_unit *units = NULL;
    int64_t count, used;
    desc.reading = tiny_reading();
    desc.samples = 3;
    desc.group = -1;
    desc.workers = 1;
    if (model && !spm_rank_units(model, set, &desc, NULL, &units, &count, &used, err)) {
        CHECK(count > 0 && used > 0);
        add_to_fingerprint(units, (size_t)count * sizeof *units);
    }
    desc.criterion = SPM_CRITERION_WEIGHT_GRADIENT;
    spm_free(ctx, units);
    units = NULL;
    if (model && !err->status) (void)spm_rank_units(model, set, &desc, NULL, &units, &count, &used, err);
    spm_free(ctx, units);
    spm_model_destroy(model);
    spm_dataset_close(set);
    return err->status;
}

static spm_status job_rank(spm_context *ctx, spm_error *err)
{
    return rank(ctx, TINY_VIT, "vit.safetensors", err);
}

static spm_status localize(spm_context *ctx, spm_modify modify, int weights, spm_error *err)
{
    static const int groups[2] = { 1, 2 };
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_model *model = set ? loaded(ctx, TINY_VIT, "vit.safetensors", err) : NULL;
    spm_localize_desc desc = SPM_ZERO;
    spm_json *json = model ? spm_json_create(ctx) : NULL;
    desc.reading = tiny_reading();
    desc.groups = groups;
    desc.n_groups = 2;
    desc.controls = 2;
    desc.samples = 2;
    desc.batch = 4;
    desc.workers = 1;
    desc.modify = modify;
    desc.repeats = 1;
    desc.rewind_file[0] = in_scratch("vit.safetensors");
    desc.unit = weights ? SPM_UNIT_WEIGHT : SPM_UNIT_CHANNEL;
    desc.n_fraction = weights;
    desc.fraction[0] = 0.01;
    (void)tiny_arch(calm, TINY_VIT, &desc.rewind_arch, NULL);
    if (model && !json) (void)out_of_memory(err, "json");
    if (json && !spm_localize(model, set, &desc, json, NULL, err)) {
        const char *text = spm_json_finish(json);
        if (!text) (void)out_of_memory(err, "json");
        else add_to_fingerprint(text, strlen(text));
    }
    spm_json_destroy(json);
    spm_model_destroy(model);
    spm_dataset_close(set);
    return err->status;
}

/* Every unit's removal the fast way; and the ledger with flip counts and gradient shares. */
static spm_status job_scan(spm_context *ctx, spm_error *err)
{
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_model *model = set ? loaded(ctx, TINY_VIT, "vit.safetensors", err) : NULL;
    spm_localize_desc desc = SPM_ZERO;
    spm_json *json = model ? spm_json_create(ctx) : NULL;
    desc.reading = tiny_reading();
    desc.criterion = SPM_CRITERION_EXHAUSTIVE;
    desc.top[0] = desc.n_top = 1;
    desc.batch = 4;
    desc.workers = 1;
    desc.screen = 0.9;
    if (model && !json) (void)out_of_memory(err, "json");
    if (json && !spm_localize(model, set, &desc, json, NULL, err) && !spm_json_finish(json)) (void)out_of_memory(err, "json");
    spm_json_destroy(json);
    spm_model_destroy(model);
    spm_dataset_close(set);
    return err->status;
}

static spm_status job_ledger(spm_context *ctx, spm_error *err)
{
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_model *model = set ? loaded(ctx, TINY_VIT, "vit.safetensors", err) : NULL;
    spm_ledger_desc desc = SPM_ZERO;
    spm_ledger_row *rows = NULL;
    spm_gradient_share *shares = NULL;
    int64_t count = 0;
    desc.reading = tiny_reading();
    desc.batch = 4;
    desc.workers = 1;
    desc.max_flips = 2;
    desc.network_influence = 1;
    if (model && !spm_ledger(model, set, &desc, &rows, &count, err)) add_to_fingerprint(rows, (size_t)count * sizeof *rows);
    if (model && !err->status && !spm_gradient_shares(model, set, &desc.reading, SPM_TRAIN, 1, &shares, &count, err))
        add_to_fingerprint(shares, (size_t)count * sizeof *shares);
    spm_free(ctx, rows);
    spm_free(ctx, shares);
    spm_model_destroy(model);
    spm_dataset_close(set);
    return err->status;
}

static spm_status job_localize_zero(spm_context *ctx, spm_error *err)
{
    return localize(ctx, SPM_MODIFY_ZERO, 0, err);
}

static spm_status job_localize_rewind(spm_context *ctx, spm_error *err)
{
    return localize(ctx, SPM_MODIFY_LAYER_REWIND, 0, err);
}

static spm_status job_localize_weights(spm_context *ctx, spm_error *err)
{
    return localize(ctx, SPM_MODIFY_NOISE, 1, err);
}

static spm_status train(spm_context *ctx, spm_train_desc *desc, spm_error *err)
{
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_train_result result;
    if (set && !spm_train(ctx, set, desc, &result, err)) {
        CHECK_INT(result.epochs, 1);
        add_file_to_fingerprint(in_scratch("run/last.safetensors"));
        add_file_to_fingerprint(in_scratch("run/config.json"));
    }
    spm_dataset_close(set);
    return err->status;
}

/* A training in an empty folder. */
static spm_train_desc run_afresh(spm_method method, const char *arch, spm_error *err)
{
    spm_train_desc desc = tiny_training(calm, method, arch, in_scratch("run"), err);
    wipe(desc.out, 0);
    return desc;
}

static spm_status job_erm(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_ERM, TINY_RESNET, err);
    desc.select = SPM_SELECT_LAST;
    desc.log_steps = in_scratch("run/steps.jsonl");
    desc.segments = 1;
    desc.keep_every = 1;
    desc.augment = SPM_AUGMENT_LIGHT;
    return train(ctx, &desc, err);
}

static spm_status job_intervene(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_INTERVENE, TINY_VIT, err);
    desc.checkpoint = in_scratch("vit.safetensors");
    desc.clip = 1.0;
    return train(ctx, &desc, err);
}

static spm_status job_official(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_INTERVENE, TINY_VIT, err);
    desc.official = desc.bn_shared = desc.cross_entropy_pruned = 1;
    desc.mask = SPM_MASK_OFFICIAL;
    desc.contrast = SPM_CONTRAST_OUTPUTS;
    return train(ctx, &desc, err);
}

static spm_status job_dfr(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_DFR, TINY_VIT, err);
    desc.subsets = 1;
    desc.l1 = 1.0;
    return train(ctx, &desc, err);
}

static spm_status job_jtt(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_JTT, TINY_VIT, err);
    desc.identify = in_scratch("vit.safetensors");
    desc.upweight = 2;
    return train(ctx, &desc, err);
}

static spm_status job_lff(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_LFF, TINY_VIT, err);
    return train(ctx, &desc, err);
}

/* Frozen units, an anchor, no group labels. */
static spm_status job_frozen(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_INTERVENE, TINY_VIT, err);
    desc.checkpoint = in_scratch("vit.safetensors");
    desc.history = in_scratch("whole");
    desc.group_labels = 0;
    desc.mask = SPM_MASK_MEMORY;
    desc.mask_mode = SPM_MASK_MODE_FREEZE;
    desc.anchor = 1.0f;
    return train(ctx, &desc, err);
}

/* The mask by gradient of the published code; and a map of integrated gradients. */
static spm_status job_gradient_mask(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_INTERVENE, TINY_VIT, err);
    static float pixels[64 * 64 * 3];
    spm_model *model;
    spm_map map = SPM_ZERO;
    desc.mask = SPM_MASK_GRADIENT;
    if (train(ctx, &desc, err)) return err->status;
    model = loaded(ctx, TINY_VIT, "vit.safetensors", err);
    if (model && !spm_explain(model, &desc.reading, pixels, 0, SPM_MAP_INTEGRATED, &map, err))
        add_to_fingerprint(map.values, (size_t)(map.height * map.width) * sizeof *map.values);
    spm_free(ctx, map.values);
    spm_model_destroy(model);
    return err->status;
}

static void copy_folder(const char *from, const char *to)
{
    DIR *dir = opendir(from);
    struct dirent *entry;
    if (!dir) return;
    while ((entry = readdir(dir)) != NULL) {
        char path[1200], target[1200];
        uint8_t *data;
        size_t size;
        FILE *file;
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", from, entry->d_name);
        snprintf(target, sizeof target, "%s/%s", to, entry->d_name);
        if (spm_file_read(calm, path, &data, &size, NULL)) continue;
        file = fopen(target, "wb");
        if (file) {
            CHECK(fwrite(data, 1, size, file) == size);
            fclose(file);
        }
        spm_free(calm, data);
    }
    closedir(dir);
}

/* Goes on with a run that was stopped within its epoch. */
static spm_status job_resume(spm_context *ctx, spm_error *err)
{
    spm_train_desc desc = run_afresh(SPM_METHOD_INTERVENE, TINY_VIT, err);
    copy_folder(in_scratch("stopped"), desc.out);
    desc.log_steps = in_scratch("run/steps.jsonl");
    desc.resume = 1;
    return train(ctx, &desc, err);
}

static spm_status job_report(spm_context *ctx, spm_error *err)
{
    const char *runs[1];
    spm_report_desc desc = SPM_ZERO;
    runs[0] = in_scratch("whole");
    desc.runs = runs;
    desc.n_runs = 1;
    wipe(in_scratch("w"), 0);
    return spm_report_write(ctx, &desc, in_scratch("w/report.html"), err);
}

/* ---- the driver ---- */

static failing fail;
static uint64_t peaceful; /* the job's fingerprint without failures */
static int passed_anyway; /* attempts of a job that succeeded although an allocation failed */

static void say(const char *name, int threads, const char *what, const char *text)
{
    char line[900];
    snprintf(line, sizeof line, "%s, %d threads, allocation %ld%s: %s %.400s", name, threads, fail.fail_at, fail.from_then_on ? " and on" : "", what, text);
    test_report(__FILE__, __LINE__, line);
}

/* One attempt with one allocation failing; 1 when the job needed fewer. */
static int attempt(const job *j, int threads, long fail_at, int from_then_on, int again)
{
    spm_error err = SPM_ZERO;
    spm_context *ctx;
    spm_status status;
    long before, calls;
    fail.fail_at = 0;
    ctx = failing_context(&fail, threads);
    before = fail.live;
    fingerprint = 0;
    fail.calls = 0;
    fail.from_then_on = from_then_on;
    fail.fail_at = fail_at;
    status = j->run(ctx, &err);
    calls = fail.calls;
    if (calls < fail_at) {
        if (status) say(j->name, threads, "fails without a failing allocation:", err.text);
    } else if (!status) {
        if (fingerprint != peaceful) say(j->name, threads, "succeeds with other results", "");
        if (++passed_anyway > j->spare) say(j->name, threads, "is said to have succeeded", "");
    } else {
        if (!err.text[0]) say(j->name, threads, "fails without a sentence", "");
        else if (status != SPM_E_MEMORY && !strstr(err.text, "memory")) say(j->name, threads, "fails with another reason:", err.text);
    }
    if (fail.live != before) say(j->name, threads, fail.live > before ? "leaks" : "frees twice", err.text);
    if (j->folder && status) check_folder(j->name, in_scratch(j->folder), 0);
    fail.fail_at = 0;
    if (again) {
        memset(&err, 0, sizeof err);
        if (j->run(ctx, &err)) say(j->name, threads, "does not work again afterwards:", err.text);
    }
    spm_context_destroy(ctx);
    if (fail.live) say(j->name, threads, "left blocks behind when the context was gone", "");
    fail.live = 0;
    return calls < fail_at;
}

static double seconds_of(clock_t from)
{
    return (double)(clock() - from) / CLOCKS_PER_SEC;
}

static void run_job(const job *j)
{
    int threads;
    for (threads = 1; threads <= 2; threads++) {
        clock_t started = clock();
        spm_context *ctx = NULL;
        spm_error err = SPM_ZERO;
        long calls, n, all = 2 * j->edge + j->middle, tried = 0, edge = threads == 1 ? j->edge : j->edge / 4 + 1;
        fail.fail_at = 0;
        ctx = failing_context(&fail, threads);
        fail.calls = 0;
        fingerprint = 0;
        if (j->run(ctx, &err)) say(j->name, threads, "fails in peace:", err.text);
        calls = fail.calls;
        if (threads == 2 && j->spare) CHECK_MSG(fingerprint == peaceful, "other results on two threads");
        peaceful = fingerprint;
        spm_context_destroy(ctx);
        CHECK_INT(fail.live, 0);
        CHECK(calls > 0);
        if (threads == 2) all /= 4;
        passed_anyway = 0;
        for (n = 1; n <= calls; n++) {
            int middle = calls > all && n > edge && n <= calls - edge;
            long drawn = calls - 2 * edge > 0 ? calls - 2 * edge : 1, want = threads == 1 ? j->middle : j->middle / 4;
            if (middle && (long)spm_random_below(7, (uint64_t)threads, (uint64_t)n, (uint32_t)drawn) >= want) continue;
            (void)attempt(j, threads, n, 0, n % 16 == 5);
            if (n % 4 == threads) (void)attempt(j, threads, n, 1, 0);
            tried++;
        }
        if (getenv("ALLOC_TIMES")) printf("%-18s %d: %5ld allocations, %4ld tried, %.2f s\n", j->name, threads, calls, tried, seconds_of(started));
    }
}

/* ---- what the jobs read ---- */

static void write_tar(void)
{
    static const char csv[] = "img_filename,y,place\na.png,0,1\nb.jpg,1,0\n";
    FILE *tar = fopen(in_scratch("birds.tar"), "wb");
    CHECK(tar != NULL);
    if (!tar) return;
    tar_add(tar, "x/metadata.csv", csv, sizeof csv - 1);
    tar_add_file(tar, "x/a.png", in_scratch("birds/p/01.png"));
    tar_add_file(tar, "x/b.jpg", in_scratch("birds/p/00.jpg"));
    tar_close(tar);
}

static void write_idx(void)
{
    static const uint8_t idx[] = { 0, 0, 8, 2, 0, 0, 0, 3, 0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    uint8_t *packed;
    size_t size;
    CHECK_INT(spm_deflate(calm, idx, sizeof idx, 2, &packed, &size, NULL), SPM_OK);
    put_file("a.idx.gz", packed, size);
    spm_free(calm, packed);
}

static void write_inputs(void)
{
    spm_error err = SPM_ZERO;
    spm_train_desc desc;
    spm_dataset *set;
    spm_train_result result;
    put_birds("birds", 16);
    put_text("celeba/list_attr_celeba.txt", "2\nBlond_Hair Male\n000001.jpg -1 1\n000002.jpg 1 -1\n");
    put_text("celeba/list_eval_partition.txt", "000001.jpg 0\n000002.jpg 0\n");
    put_picture("celeba/img_align_celeba/000001.jpg", 1, 16, 20);
    put_picture("celeba/img_align_celeba/000002.jpg", 2, 16, 20);
    put_picture("tree/train/cat/a.png", 1, 12, 12);
    put_picture("tree/train/dog/b.png", 2, 12, 12);
    put_picture("tree/val/dog/c.png", 3, 12, 12);
    put_text("w/.keep", "");
    put_text("run/.keep", "");
    write_tar();
    write_idx();
    set = open_set(calm, "birds", &err);
    desc = tiny_training(calm, SPM_METHOD_ERM, TINY_VIT, in_scratch("whole"), &err);
    CHECK(set && spm_train(calm, set, &desc, &result, &err) == SPM_OK);
    copy_folder(in_scratch("whole"), scratch);
    CHECK(rename(in_scratch("last.safetensors"), in_scratch("vit.safetensors")) == 0);
    desc = tiny_training(calm, SPM_METHOD_INTERVENE, TINY_VIT, in_scratch("stopped"), &err);
    put_text("stopped/.keep", "");
    desc.log_steps = in_scratch("stopped/steps.jsonl");
    desc.max_steps = 2;
    CHECK(set && spm_train(calm, set, &desc, &result, &err) == SPM_OK && result.stopped);
    spm_dataset_close(set);
    CHECK_STR(err.text, "");
}

static void contexts(void)
{
    int threads;
    for (threads = 1; threads <= 2; threads++) {
        long calls, n;
        fail.fail_at = fail.calls = 0;
        spm_context_destroy(failing_context(&fail, threads));
        calls = fail.calls;
        for (n = 1; n <= calls; n++) {
            fail.calls = 0;
            fail.fail_at = n;
            CHECK(failing_context(&fail, threads) == NULL);
            CHECK_INT(fail.live, 0);
        }
        CHECK(calls > 0);
    }
}

#define JOB(function, folder, spare, edge, middle) \
    static void function##_fails(void) { const job j = { #function, job_##function, folder, spare, edge, middle }; run_job(&j); }
JOB(json, NULL, 0, 200, 100)
JOB(csv, NULL, 0, 200, 100)
JOB(safetensors, "w", 0, 200, 100)
JOB(torch, "w", 2, 200, 100)
JOB(tar, NULL, 0, 200, 100)
JOB(arrays, "w", 0, 200, 100)
JOB(deflate, NULL, 0, 200, 100)
JOB(pictures, NULL, 0, 200, 100)
JOB(load_pictures, NULL, 0, 200, 100)
JOB(resize, NULL, 0, 200, 100)
JOB(waterbirds, NULL, 4, 200, 100)
JOB(celeba, NULL, 4, 200, 100)
JOB(folders, NULL, 4, 200, 100)
JOB(tar_set, NULL, 4, 200, 100)
JOB(resnet, NULL, 0, 200, 100)
JOB(vit, NULL, 0, 200, 100)
JOB(gradient_check, NULL, 0, 200, 100)
JOB(checkpoint, "w", 1, 200, 100)
JOB(evaluate, NULL, 4, 200, 100)
JOB(rank, NULL, 8, 200, 100)
JOB(localize_zero, NULL, 10, 200, 100)
JOB(scan, NULL, 10, 60, 60)
JOB(ledger, NULL, 10, 60, 60)
JOB(localize_rewind, NULL, 10, 200, 100)
JOB(localize_weights, NULL, 10, 200, 100)
JOB(erm, "run", 6, 60, 60)
JOB(intervene, "run", 8, 100, 100)
JOB(dfr, "run", 8, 60, 60)
JOB(jtt, "run", 8, 60, 60)
JOB(lff, "run", 8, 60, 60)
JOB(frozen, "run", 8, 60, 60)
JOB(official, "run", 6, 40, 40)
JOB(gradient_mask, "run", 6, 40, 40)
JOB(resume, "run", 8, 100, 100)
JOB(report, "w", 0, 200, 100)

int main(void)
{
    pthread_mutex_init(&fail.lock, NULL);
    scratch_begin("alloc_files");
    TEST(write_inputs);
    TEST(contexts);
    TEST(json_fails);
    TEST(csv_fails);
    TEST(safetensors_fails);
    TEST(torch_fails);
    TEST(tar_fails);
    TEST(arrays_fails);
    TEST(deflate_fails);
    TEST(pictures_fails);
    TEST(load_pictures_fails);
    TEST(resize_fails);
    TEST(waterbirds_fails);
    TEST(celeba_fails);
    TEST(folders_fails);
    TEST(tar_set_fails);
    TEST(resnet_fails);
    TEST(vit_fails);
    TEST(gradient_check_fails);
    TEST(checkpoint_fails);
    TEST(evaluate_fails);
    TEST(rank_fails);
    TEST(localize_zero_fails);
    TEST(scan_fails);
    TEST(ledger_fails);
    TEST(localize_rewind_fails);
    TEST(localize_weights_fails);
    TEST(erm_fails);
    TEST(intervene_fails);
    TEST(dfr_fails);
    TEST(jtt_fails);
    TEST(lff_fails);
    TEST(frozen_fails);
    TEST(official_fails);
    TEST(gradient_mask_fails);
    TEST(resume_fails);
    TEST(report_fails);
    scratch_end();
    pthread_mutex_destroy(&fail.lock);
    return TEST_END;
}
