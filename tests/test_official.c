/* Profile official against PyTorch: ranking order and scores, threshold selections, and the group accuracies after each
 * change on a small ResNet-18 and drawn pictures (golden/localize.bin, made by golden/make_localize.py); then each quirk
 * by itself, and the head that official checkpoints have. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include "golden.h"

#define SIDE 32
#define PICTURES 76

static spm_error last;

static int64_t torch_index(const spm_tensor *t, int64_t i)
{
    int64_t in = t->shape[3], kw = t->shape[2], kh = t->shape[1], c, w, h;
    if (t->rank != 4) return i;
    c = i % in;
    i /= in;
    w = i % kw;
    h = i / kw % kh;
    return ((i / kw / kh * in + c) * kh + h) * kw + w;
}

/* Values as `fill` of make_localize.py draws them. */
static spm_model *network(spm_context *ctx, const char *prefix, float bias, int softmax)
{
    spm_arch arch = SPM_ZERO;
    spm_model *model;
    int i;
    int64_t j;
    arch.height = arch.width_px = SIDE;
    arch.classes = 2;
    arch.softmax_head = softmax;
    CHECK(spm_arch_parse(ctx, "resnet18:width=8", &arch, NULL) == SPM_OK);
    model = spm_model_build(ctx, &arch, SPM_NO_SEED, &last);
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        char name[128];
        double base = 0.0, scale = 0.3;
        uint32_t stream;
        snprintf(name, sizeof name, "%s%s", prefix, p->name);
        stream = golden_stream(name);
        if (strstr(p->name, "running_var")) base = 1.0, scale = 0.4;
        else if (strstr(p->name, "running_mean")) scale = 0.1;
        else if (strncmp(p->name, "fc", 2) == 0) scale = p->value.rank == 2 ? 2.0 : 0.0;
        else if (p->value.rank == 1 && !strstr(p->name, "bias")) base = 1.0;
        else if (p->value.rank == 4) scale = sqrt(6.0 / (double)(spm_tensor_count(&p->value) / p->value.shape[0]));
        for (j = 0; j < spm_tensor_count(&p->value); j++)
            p->value.data[j] = (float)(base + scale * golden_draw(stream, (uint32_t)torch_index(&p->value, j)));
        if (strcmp(p->name, "fc.bias") == 0) p->value.data[0] = bias;
    }
    spm_model_touch(model);
    return model;
}

/* The pictures, all in the test split (and one of each group in the training split, which official never looks at). */
static spm_dataset *pictures(spm_context *ctx)
{
    static const int sizes[4] = { 30, 8, 8, 30 };
    spm_dataset_desc desc = SPM_ZERO;
    static char csv[8000];
    int n = snprintf(csv, sizeof csv, "img_id,img_filename,y,split,place\n"), g, k, i = 0, y, x, c;
    CHECK(spm_directory_create(ctx, tiny_path("pictures", ""), NULL) == SPM_OK);
    for (g = 0; g < 4; g++) {
        for (k = 0; k < sizes[g]; k++, i++) {
            spm_image image = SPM_ZERO;
            uint8_t *data = NULL;
            size_t size = 0;
            char name[64], file[40];
            uint32_t base, noise;
            snprintf(name, sizeof name, "localize.base.%d", i);
            base = golden_stream(name);
            snprintf(name, sizeof name, "localize.noise.%d", i);
            noise = golden_stream(name);
            CHECK(spm_image_create(ctx, SIDE, SIDE, &image, NULL) == SPM_OK);
            for (y = 0; y < SIDE; y++) {
                for (x = 0; x < SIDE; x++) {
                    for (c = 0; c < 3; c++) {
                        uint32_t cell = (uint32_t)((y / 16 * 2 + x / 16) * 3 + c), at = (uint32_t)((y * SIDE + x) * 3 + c);
                        double v = floor(128.0 + 90.0 * golden_draw(base, cell) + 37.0 * golden_draw(noise, at));
                        image.pixels[at] = (uint8_t)(v < 0.0 ? 0.0 : v > 255.0 ? 255.0 : v);
                    }
                }
            }
            snprintf(file, sizeof file, "%03d.png", i);
            CHECK(spm_image_encode_png(ctx, &image, &data, &size, NULL) == SPM_OK);
            CHECK(spm_file_write(ctx, tiny_path("pictures", file), data, size, NULL) == SPM_OK);
            spm_free(ctx, data);
            spm_image_free(ctx, &image);
            n += snprintf(csv + n, sizeof csv - (size_t)n, "%d,%s,%d,%d,%d\n", i, file, g / 2, 2, g % 2);
            if (k == 0) n += snprintf(csv + n, sizeof csv - (size_t)n, "%d,%s,%d,%d,%d\n", i, file, g / 2, 0, g % 2);
        }
    }
    tiny_put(ctx, tiny_path("pictures", "metadata.csv"), csv);
    desc.path = tiny_path("pictures", "");
    return spm_dataset_open(ctx, &desc, &last);
}

typedef struct bench {
    spm_context *ctx;
    spm_dataset *set;
    spm_model *model;
    spm_localize_desc desc;
    const uint32_t *golden;
    char earlier[900];
} bench;

static spm_json_value *study(bench *b)
{
    spm_json *json = spm_json_create(b->ctx);
    spm_json_value *root = NULL;
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_localize(b->model, b->set, &b->desc, json, NULL, &last), SPM_OK);
    CHECK_STR(last.text, "");
    if (!last.status) {
        const char *text = spm_json_finish(json);
        root = spm_json_parse(b->ctx, "study", text, strlen(text), NULL);
    }
    spm_json_destroy(json);
    return root;
}

static void check_correct(const spm_json_value *groups, const uint32_t *golden)
{
    int g;
    for (g = 0; g < 4; g++) CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(groups, g), "correct"), -1), (int32_t)golden[g]);
}

static const spm_json_value *row_groups(const spm_json_value *root, int64_t i)
{
    return spm_json_get(spm_json_get(spm_json_at(spm_json_get(root, "results"), i), "splits"), "test");
}

/* The ten best: the same units in the same order, scores within 5e-3 relative. */
static void check_ranking(const bench *b, const spm_json_value *root, int64_t r, const uint32_t *golden)
{
    const spm_json_value *units = spm_json_get(spm_json_at(spm_json_get(root, "rankings"), r), "units");
    int k;
    CHECK_INT(spm_json_length(units), 10);
    for (k = 0; k < 10; k++) {
        const spm_json_value *u = spm_json_at(units, k);
        double score = (double)golden_float(golden[3 * k + 2]);
        CHECK_STR(spm_json_as_string(spm_json_get(u, "parameter"), ""), spm_model_parameter(b->model, (int)golden[3 * k])->name);
        CHECK_INT(spm_json_as_int(spm_json_get(u, "channel"), -1), golden[3 * k + 1]);
        CHECK_NEAR(spm_json_as_number(spm_json_get(u, "score"), -1.0), score, 5e-3 * score);
    }
}

static bench bench_open(int *found)
{
    bench b;
    int words = 0;
    spm_checkpoint_info info = SPM_ZERO;
    spm_model *earlier;
    memset(&b, 0, sizeof b);
    b.golden = golden_read("tests/golden/localize.bin", &words);
    *found = b.golden != NULL && words > 300;
    CHECK(*found);
    if (!*found) return b;
    b.ctx = tiny_context(2);
    b.set = pictures(b.ctx);
    b.model = network(b.ctx, "", golden_float(b.golden[0]), 1);
    earlier = network(b.ctx, "earlier.", golden_float(b.golden[0]), 1);
    snprintf(b.earlier, sizeof b.earlier, "%s", tiny_path("official_earlier.safetensors", ""));
    info.arch.height = info.arch.width_px = SIDE;
    info.arch.classes = 2;
    info.arch.softmax_head = 1;
    CHECK(spm_arch_parse(b.ctx, "resnet18:width=8", &info.arch, NULL) == SPM_OK);
    CHECK(spm_checkpoint_save(earlier, b.earlier, &info, NULL) == SPM_OK);
    spm_model_destroy(earlier);
    b.desc.reading.transform = spm_transform_make(SIDE, SIDE);
    b.desc.reading.transform.resize = SPM_RESIZE_NONE;
    b.desc.reading.label_reversed = b.desc.reading.softmax_head = 1;
    b.desc.official = 1;
    b.desc.quirks = SPM_QUIRKS_OFFICIAL;
    b.desc.samples = 20;
    b.desc.select_split = SPM_TEST;
    b.desc.report[SPM_TEST] = 1;
    b.desc.modify = SPM_MODIFY_ZERO;
    return b;
}

static void bench_close(bench *b)
{
    spm_model_destroy(b->model);
    spm_dataset_close(b->set);
    spm_context_destroy(b->ctx);
    free((void *)(uintptr_t)b->golden);
}

/* Number for number: everything the golden file has. */
static void number_for_number(void)
{
    static const int64_t tops[5] = { 1, 2, 3, 5, 10 };
    static const double fractions[5] = { 0.0, 0.001, 0.05, 0.4, 1.0 };
    int found, criterion, rewind, k, i;
    bench b = bench_open(&found);
    const uint32_t *at = b.golden + 9, *changes = b.golden + 9 + 4 * 31 + 30;
    if (!found) return;
    for (criterion = 0; criterion < 2; criterion++) {
        int rankings = criterion ? 1 : 4, r;
        b.desc.criterion = criterion ? SPM_CRITERION_MAGNITUDE : SPM_CRITERION_GRADIENT;
        for (rewind = 0; rewind < 2; rewind++) {
            spm_json_value *root;
            b.desc.modify = rewind ? SPM_MODIFY_REWIND : SPM_MODIFY_ZERO;
            b.desc.rewind_file[0] = rewind ? b.earlier : NULL;
            b.desc.n_top = rewind ? 3 : 5;
            for (k = 0; k < 5; k++) b.desc.top[k] = tops[k];
            root = study(&b);
            CHECK_STR(spm_json_as_string(spm_json_get(root, "selected_on"), ""), "test");
            CHECK_INT(spm_json_as_int(spm_json_get(root, "reports_selection_split"), 0), 1);
            for (i = 0; i < 4; i++) {
                const spm_json_value *g = spm_json_at(spm_json_get(spm_json_get(root, "baseline"), "test"), i);
                CHECK_INT(spm_json_as_int(spm_json_get(g, "count"), -1), b.golden[1 + 2 * i]);
                CHECK_INT(spm_json_as_int(spm_json_get(g, "correct"), -1), b.golden[2 + 2 * i]);
            }
            for (r = 0; r < rankings; r++) {
                const uint32_t *ranked = criterion ? at + 4 * 31 : at + 31 * r + 1;
                const uint32_t *rows = changes + 32 * (criterion ? 4 : r) + (rewind ? 20 : 0);
                if (!rewind) check_ranking(&b, root, r, ranked);
                if (!criterion) CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(root, "rankings"), r), "samples"), -1), at[31 * r]);
                for (k = 0; k < b.desc.n_top; k++) check_correct(row_groups(root, r * b.desc.n_top + k), rows + 4 * k);
            }
            spm_json_free(b.ctx, root);
        }
    }
    changes += 5 * 32;
    b.desc.unit = SPM_UNIT_WEIGHT;
    b.desc.modify = SPM_MODIFY_ZERO;
    for (k = 0; k < 5; k++) b.desc.fraction[k] = fractions[k];
    b.desc.n_fraction = 5;
    for (i = 0; i < 2; i++) {
        spm_json_value *root;
        b.desc.order_smallest = !i;
        root = study(&b);
        for (k = 0; k < 5; k++) {
            const spm_json_value *row = spm_json_at(spm_json_get(root, "results"), k);
            const uint32_t *want = changes + 5 * (2 * k + i);
            CHECK_INT(spm_json_as_int(spm_json_get(row, "changed"), -1), want[0]);
            if ((int32_t)want[1] >= 0) check_correct(row_groups(root, k), want + 1);
        }
        spm_json_free(b.ctx, root);
    }
    bench_close(&b);
}

static spm_unit top_unit(const bench *b, const spm_json_value *root)
{
    const spm_json_value *u = spm_json_at(spm_json_get(spm_json_at(spm_json_get(root, "rankings"), 0), "units"), 0);
    spm_unit unit = SPM_ZERO;
    unit.parameter = spm_model_find_parameter(b->model, spm_json_as_string(spm_json_get(u, "parameter"), ""));
    unit.channel = spm_json_as_int(spm_json_get(u, "channel"), -1);
    unit.score = spm_json_as_number(spm_json_get(u, "score"), 0.0);
    return unit;
}

/* Each quirk off by itself does what it says and nothing else. */
static void quirks_one_by_one(void)
{
    int found;
    bench b = bench_open(&found);
    spm_json_value *on, *off;
    spm_model *plain;
    if (!found) return;
    /* Q1: without the softmax the loss is that of logits; another scale of the gradient */
    b.desc.n_top = 1;
    b.desc.top[0] = 1;
    on = study(&b);
    plain = b.model;
    b.model = network(b.ctx, "", golden_float(b.golden[0]), 0);
    b.desc.reading.softmax_head = 0;
    off = study(&b);
    CHECK(fabs(top_unit(&b, on).score - top_unit(&b, off).score) > 1e-3);
    spm_model_destroy(b.model);
    b.model = plain;
    b.desc.reading.softmax_head = 1;
    spm_json_free(b.ctx, off);
    spm_json_free(b.ctx, on);
    /* Q3: shortcuts count by magnitude as well */
    b.desc.criterion = SPM_CRITERION_MAGNITUDE;
    b.desc.top[0] = 400;
    on = study(&b);
    b.desc.quirks = SPM_QUIRKS_OFFICIAL & ~SPM_QUIRK(3);
    off = study(&b);
    CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(off, "rankings"), 0), "ranked"), 0)
              - spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(on, "rankings"), 0), "ranked"), 0), 16 + 32 + 64);
    spm_json_free(b.ctx, off);
    spm_json_free(b.ctx, on);
    /* Q4: exactly k weights of the convolutions; the head stays */
    b.desc.unit = SPM_UNIT_WEIGHT;
    b.desc.fraction[0] = 0.0;
    b.desc.n_fraction = 1;
    b.desc.quirks = SPM_QUIRKS_OFFICIAL & ~SPM_QUIRK(4);
    off = study(&b);
    CHECK_INT(spm_json_as_int(spm_json_get(spm_json_at(spm_json_get(off, "results"), 0), "changed"), -1), 0);
    spm_json_free(b.ctx, off);
    /* Q7: choosing on what is reported is refused without it */
    b.desc.quirks = SPM_QUIRKS_OFFICIAL & ~SPM_QUIRK(7);
    {
        spm_json *json = spm_json_create(b.ctx);
        memset(&last, 0, sizeof last);
        CHECK_INT(spm_localize(b.model, b.set, &b.desc, json, NULL, &last), SPM_E_ARGUMENT);
        CHECK(strstr(last.text, "--allow-same-split") != NULL);
        spm_json_destroy(json);
    }
    bench_close(&b);
}

int main(void)
{
    tiny_begin("test_official");
    TEST(number_for_number);
    TEST(quirks_one_by_one);
    return TEST_END;
}
