/* The ledger and gradient accounting of section LEDGER, each column against what is worked out here. */
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include "bench.h"

#define SMALL "resnet18:width=4,stem=cifar"

static spm_ledger_row *ledger(bench *b, const spm_ledger_desc *desc, int64_t *count)
{
    spm_ledger_row *rows = NULL;
    uint64_t before = model_hash(b->model);
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_ledger(b->model, b->set, desc, &rows, count, &last), SPM_OK);
    CHECK_STR(last.text, "");
    CHECK(model_hash(b->model) == before);
    return rows;
}

static void plain_columns(void)
{
    bench b = bench_open(SMALL, 2);
    spm_ledger_desc desc = SPM_ZERO;
    spm_eval_desc evaluation = SPM_ZERO;
    spm_eval eval;
    spm_ledger_row *rows;
    int64_t count = 0, i, k, j;
    int softmax;
    for (softmax = 0; softmax < 2; softmax++) {
        if (softmax) { /* quirks Q1 and Q2 */
            spm_arch arch = tiny_arch(b.ctx, SMALL);
            spm_model_destroy(b.model);
            arch.softmax_head = 1;
            b.model = spm_model_build(b.ctx, &arch, 5, NULL);
            b.reading.softmax_head = b.reading.label_reversed = 1;
        }
        desc.reading = evaluation.reading = b.reading;
        desc.max_flips = -1;
        desc.network_influence = 1;
        desc.batch = 5;
        rows = ledger(&b, &desc, &count);
        CHECK_INT(spm_evaluate(b.model, b.set, &evaluation, &eval, NULL), SPM_OK);
        CHECK_INT(count, eval.count);
        for (i = 0; i < count; i++) {
            double norm = 0.0, whole = 0.0;
            CHECK_INT(rows[i].id, eval.example[i]);
            CHECK_INT(rows[i].predicted, eval.predicted[i]);
            CHECK_NEAR(rows[i].probability, eval.probability[2 * i + eval.y[i]], 1e-6);
            CHECK_NEAR(rows[i].loss, eval.example_loss[i], 1e-5);
            CHECK_NEAR(rows[i].margin, eval.margin[i], 1e-5 * (1.0 + fabs((double)eval.margin[i])));
            CHECK_INT(rows[i].flip_count, -1);
            CHECK_INT(rows[i].first_epoch, -1);
            if (i % 5) continue;
            plain_gradient(&b, &rows[i].id, 1);
            for (k = 0; k < spm_model_parameter_count(b.model); k++) {
                const spm_parameter *p = spm_model_parameter(b.model, (int)k);
                for (j = 0; !(p->flags & SPM_PARAMETER_BUFFER) && j < spm_tensor_count(&p->value); j++) {
                    double square = (double)p->gradient[j] * (double)p->gradient[j];
                    whole += square;
                    norm += strncmp(p->name, "fc", 2) == 0 ? square : 0.0;
                }
            }
            CHECK_NEAR(rows[i].self_influence, norm, 1e-4 * norm + 1e-9);
            CHECK_NEAR(rows[i].network_influence, whole, 1e-4 * whole + 1e-9);
            CHECK(whole > norm);
        }
        spm_eval_free(b.ctx, &eval);
        spm_free(b.ctx, rows);
    }
    bench_close(&b);
}

/* The greedy removal again, one example, by changing the model: the next unit is the one with the largest
 * -(gamma dL/dgamma + beta dL/dbeta). */
static int plain_flips(bench *b, int64_t id, int y, int most, spm_unit *first)
{
    float **all = (float **)malloc((size_t)spm_model_parameter_count(b->model) * sizeof *all);
    int step, i, flipped = -1;
    for (i = 0; i < spm_model_parameter_count(b->model); i++) {
        const spm_parameter *p = spm_model_parameter(b->model, i);
        size_t bytes = (size_t)spm_tensor_count(&p->value) * sizeof(float);
        all[i] = (float *)malloc(bytes);
        memcpy(all[i], p->value.data, bytes);
    }
    for (step = 0; step <= most && flipped < 0; step++) {
        const spm_program *program = spm_model_program(b->model);
        static float pixels[TINY_SIZE * TINY_SIZE * 3];
        spm_run *run = spm_run_create(b->model, NULL, NULL);
        const float *logits;
        double best = 0.0;
        spm_unit unit = SPM_ZERO;
        int64_t c;
        tiny_pixels(b->set, &b->reading, id, pixels);
        (void)spm_run_input(run, spm_program_find(program, "image"), pixels);
        CHECK(spm_run_forward(run, 1, 0) == SPM_OK);
        logits = spm_run_data(run, spm_program_find(program, "logits"));
        if (logits[1 - y] > logits[y]) flipped = step;
        spm_run_destroy(run);
        if (flipped >= 0 || step == most) break;
        plain_gradient(b, &id, 1);
        unit.parameter = -1;
        for (i = 0; i < spm_model_parameter_count(b->model); i++) {
            const spm_parameter *p = spm_model_parameter(b->model, i), *gamma, *beta;
            if (!ranked(p)) continue;
            gamma = spm_model_parameter(b->model, p->norm_weight);
            beta = spm_model_parameter(b->model, p->norm_bias);
            for (c = 0; c < p->value.shape[0]; c++) {
                double rise = -(double)gamma->value.data[c] * (double)gamma->gradient[c] - (double)beta->value.data[c] * (double)beta->gradient[c];
                if (rise <= best) continue;
                best = rise;
                unit.parameter = i;
                unit.channel = c;
            }
        }
        if (unit.parameter < 0) break;
        if (step == 0) *first = unit;
        CHECK_INT(modify_units(b->model, &unit, 1, SPM_MODIFY_ZERO_UNIT, 0, 0, NULL, NULL), SPM_OK);
    }
    for (i = 0; i < spm_model_parameter_count(b->model); i++) {
        spm_parameter *p = spm_model_parameter(b->model, i);
        memcpy(p->value.data, all[i], (size_t)spm_tensor_count(&p->value) * sizeof(float));
        free(all[i]);
    }
    free(all);
    spm_model_touch(b->model);
    return flipped;
}

static void flip_counts(void)
{
    bench b = bench_open(SMALL, 2);
    spm_ledger_desc desc = SPM_ZERO;
    spm_ledger_row *rows;
    int64_t count = 0, i;
    int some = 0;
    desc.reading = b.reading;
    desc.max_flips = 30;
    rows = ledger(&b, &desc, &count);
    for (i = 0; i < count; i++) some += rows[i].flip_count > 0;
    CHECK(some > 0);
    for (i = 0; i < count; i += 3) {
        int y = spm_dataset_example(b.set, rows[i].id)->y;
        spm_unit first = SPM_ZERO;
        first.parameter = -1;
        CHECK_INT(rows[i].flip_count, plain_flips(&b, rows[i].id, y, 30, &first));
        if (rows[i].predicted != y) CHECK_INT(rows[i].flip_count, 0);
        else {
            CHECK_INT(rows[i].flip_parameter, first.parameter);
            CHECK_INT(rows[i].flip_channel, first.channel);
        }
    }
    spm_free(b.ctx, rows);
    bench_close(&b);
    /* a transformer: more removals can only flip more */
    b = bench_open("vit:patch=4,dim=16,depth=1,heads=2,mlp=2", 1);
    desc.reading = b.reading;
    rows = ledger(&b, &desc, &count);
    for (i = some = 0; i < count; i++) some += rows[i].flip_count > 0;
    CHECK(some > 0);
    spm_free(b.ctx, rows);
    bench_close(&b);
}

static void history(void)
{
    bench b = bench_open(SMALL, 1);
    spm_ledger_desc desc = SPM_ZERO;
    spm_ledger_row *rows = NULL;
    int64_t count = 0, i;
    char text[3000];
    int n = snprintf(text, sizeof text, "id,y,first_right,epochs_wrong,forgotten\n");
    for (i = 0; i < 26; i++) {
        if (i != 7) n += snprintf(text + n, sizeof text - (size_t)n, "%d,0,%d,%d,%d\n", (int)i, (int)i % 5 - 1, (int)i + 1, (int)i % 3);
    }
    CHECK(spm_directory_create(b.ctx, tiny_path("run", ""), NULL) == SPM_OK);
    tiny_put(b.ctx, tiny_path("run", "history.csv"), text);
    desc.reading = b.reading;
    desc.max_flips = -1;
    desc.history = tiny_path("run", "");
    rows = ledger(&b, &desc, &count);
    CHECK_INT(count, 26);
    for (i = 0; i < count; i++) {
        CHECK(rows[i].network_influence != rows[i].network_influence); /* not asked for: NaN */
        CHECK_INT(rows[i].first_epoch, i == 7 ? -1 : i % 5 - 1);
        CHECK_INT(rows[i].epochs_wrong, i == 7 ? -1 : i + 1);
        CHECK_INT(rows[i].forgotten, i == 7 ? -1 : i % 3);
    }
    spm_free(b.ctx, rows);
    tiny_put(b.ctx, tiny_path("run", "history.csv"), "id,first_right\n0,0\n");
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_ledger(b.model, b.set, &desc, &rows, &count, &last), SPM_E_FORMAT);
    CHECK(rows == NULL && strstr(last.text, "epochs_wrong") && strstr(last.text, "history.csv"));
    desc.history = "/nonexistent/history.csv";
    memset(&last, 0, sizeof last);
    CHECK_INT(spm_ledger(b.model, b.set, &desc, &rows, &count, &last), SPM_E_IO);
    bench_close(&b);
}

static void gradient_shares(void)
{
    bench b = bench_open(SMALL, 2);
    spm_gradient_share *rows = NULL;
    int64_t count = 0, i, j, ids[4][32], whole[64], n = 0;
    int g, used[4] = { 0, 0, 0, 0 }, p;
    for (i = 0; i < spm_dataset_split_size(b.set, SPM_TRAIN); i++) {
        int64_t id = spm_dataset_split_ids(b.set, SPM_TRAIN)[i];
        g = spm_dataset_example(b.set, id)->group;
        ids[g][used[g]++] = id;
        whole[n++] = id;
    }
    CHECK_INT(spm_gradient_shares(b.model, b.set, &b.reading, SPM_TRAIN, 1, &rows, &count, &last), SPM_OK);
    CHECK(count > 0 && count % 4 == 0);
    for (g = 0; g < 4; g++) {
        plain_gradient(&b, ids[g], used[g]);
        for (i = g; i < count; i += 4) {
            const spm_parameter *q = spm_model_parameter(b.model, rows[i].parameter);
            double norm = 0.0;
            for (j = 0; j < spm_tensor_count(&q->value); j++) norm += (double)q->gradient[j] * (double)q->gradient[j];
            norm = sqrt(norm) * used[g] / (double)n;
            CHECK_INT(rows[i].group, g);
            CHECK_NEAR(rows[i].norm, norm, 1e-4 * norm + 1e-9);
        }
    }
    plain_gradient(&b, whole, (int)n);
    for (i = 0; i < count; i += 4) { /* projections on the whole gradient add up to its norm */
        double shares = 0.0, projected = 0.0, norm = 0.0;
        p = rows[i].parameter;
        for (j = 0; j < spm_tensor_count(&spm_model_parameter(b.model, p)->value); j++)
            norm += (double)spm_model_parameter(b.model, p)->gradient[j] * (double)spm_model_parameter(b.model, p)->gradient[j];
        for (g = 0; g < 4; g++) {
            shares += rows[i + g].share;
            projected += rows[i + g].norm * rows[i + g].cosine;
        }
        CHECK_NEAR(shares, 1.0, 1e-9);
        CHECK_NEAR(projected, sqrt(norm), 1e-3 * sqrt(norm) + 1e-8);
    }
    spm_free(b.ctx, rows);
    bench_close(&b);
}

/* A model whose head has fewer classes than the data: a sentence, and nothing is read behind the logits. */
static void gradient_shares_of_other_classes(void)
{
    bench b = bench_open(SMALL, 1);
    spm_dataset_desc desc = SPM_ZERO;
    spm_gradient_share *rows = (spm_gradient_share *)&desc;
    int64_t count = 7;
    spm_dataset_close(b.set);
    tiny_put(b.ctx, tiny_path("set", "metadata.csv"),
             "img_id,img_filename,y,split,place,place_filename\n1,000.png,0,0,0,a\n2,001.png,1,0,0,a\n3,002.png,4,0,0,a\n4,003.png,4,0,1,b\n");
    desc.path = tiny_path("set", "");
    b.set = spm_dataset_open(b.ctx, &desc, &last);
    CHECK_STR(last.text, "");
    CHECK_INT(spm_gradient_shares(b.model, b.set, &b.reading, SPM_TRAIN, 1, &rows, &count, &last), SPM_E_SHAPE);
    CHECK(rows == NULL && count == 0);
    CHECK(strstr(last.text, "5 classes") && strstr(last.text, "head has 2"));
    if (rows) spm_free(b.ctx, rows);
    bench_close(&b);
}

int main(void)
{
    tiny_begin("test_ledger");
    TEST(plain_columns);
    TEST(flip_counts);
    TEST(history);
    TEST(gradient_shares);
    TEST(gradient_shares_of_other_classes);
    return TEST_END;
}
