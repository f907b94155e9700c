/* test_golden.c - training against PyTorch in double precision (golden/train.bin, made by golden/make_train.py): the
 * gradient of every parameter, ten steps of two optimizers, a step of the intervention in both profiles. */
#include "../spurmem.h"
#include "test.h"
#include "golden.h"
#include "exact.h"

#define SIGNS 64

static const char *golden_file = "tests/golden/train.bin";
static int other_file; /* 1: pictures that nobody chose: decisions may differ, errors without them may not */

static spm_context *context(spm_isa isa, int direct)
{
    spm_context_desc desc = SPM_ZERO;
    if (isa != SPM_ISA_AUTO && !golden_isa(isa)) return NULL;
    desc.isa = isa;
    desc.direct_convolution = direct;
    return spm_context_create(&desc);
}

static spm_model *network(spm_context *ctx, const char *name, int64_t side, int64_t classes, int softmax)
{
    spm_arch arch = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_model *model;
    int i;
    arch.height = arch.width_px = side;
    arch.classes = classes;
    arch.softmax_head = softmax;
    if (spm_arch_parse(ctx, name, &arch, &err)) CHECK_MSG(0, err.text);
    model = spm_model_build(ctx, &arch, SPM_NO_SEED, &err);
    CHECK_STR(err.text, "");
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        int64_t k;
        golden_fill(spm_model_parameter(model, i));
        for (k = 0; golden_ends_in(p->name, "bn3.weight") && k < spm_tensor_count(&p->value); k++) p->value.data[k] *= .25f;
    }
    spm_model_touch(model);
    return model;
}

static spm_value value_of(spm_model *model, const char *name)
{
    return spm_program_find(spm_model_program(model), name);
}

/* How far a gradient is from the golden one, relative to its norm: the root mean square of the differences along 64
 * vectors of signs estimates the L2 norm of the whole difference within a tenth or so. */
static double projected_error(const spm_parameter *p, const uint32_t *norm, const uint32_t *projections)
{
    double sum[SIGNS] = { 0 }, squares = 0;
    char name[160];
    int64_t i;
    int s, k;
    for (k = 0; k < SIGNS; k += 16) {
        uint32_t stream;
        snprintf(name, sizeof name, "signs%d %s", k / 16, p->name);
        stream = golden_stream(name);
        for (i = 0; i < spm_tensor_count(&p->value); i++) {
            const double g = (double)p->gradient[i];
            const uint32_t h = (uint32_t)((golden_draw(stream, (uint32_t)golden_index(&p->value, i)) + 1.0) * 8388608.0);
            for (s = 0; s < 16; s++) sum[k + s] += (1 - 2 * (double)(h >> (s + 4) & 1)) * g;
        }
    }
    for (s = 0; s < SIGNS; s++) {
        const double off = sum[s] - (double)golden_float(projections[s]);
        squares += off * off;
    }
    return sqrt(squares / SIGNS) / fmax((double)golden_float(*norm), 1e-20);
}

static const spm_isa isas[4] = { SPM_ISA_AVX512, SPM_ISA_AVX2, SPM_ISA_NEON, SPM_ISA_C };

/* The networks whose gradients are checked, on the picture of that number. */
typedef struct lesson {
    char net[16];
    int number, n, side, picture;
} lesson;

static const lesson lessons[4] = { { "resnet20", 0, 8, 16, 0 }, { "resnet18", 1, 4, 112, 0 }, { "resnet50", 2, 4, 64, 0 },
                                   { "deit_tiny", 3, 4, 64, 0 } };
#define RESNETS 3
#define LOGITS 10

static float *lesson_pictures(const lesson *l)
{
    char name[40];
    snprintf(name, sizeof name, "train%d %d", l->number, l->picture);
    return golden_pictures(name, l->n, l->side, l->side);
}

static void lesson_direction(const lesson *l, float *direction)
{
    char name[40];
    int i;
    snprintf(name, sizeof name, "train direction%d", l->number);
    for (i = 0; i < l->n * LOGITS; i++) direction[i] = (float)golden_draw(golden_stream(name), (uint32_t)i);
}

/* Every result of a batch norm with a ReLU, what a max pool reads among them: [values] for exact.h. */
static void keep_decisions(spm_run *run, spm_model *model, int64_t n, double **decide)
{
    const spm_program *program = spm_model_program(model);
    int i;
    for (i = 0; i < spm_program_op_count(program); i++) {
        spm_op op;
        spm_op_attr attr;
        const spm_value out = spm_program_op_at(program, i, &op, &attr, NULL);
        const spm_tensor shape = spm_program_shape(program, out, n);
        const float *values;
        int64_t k;
        if (op != SPM_OP_BATCH_NORM || !attr.relu) continue;
        if (!decide) {
            CHECK_INT(spm_run_keep(run, out), SPM_OK);
            continue;
        }
        values = spm_run_data(run, out);
        decide[out] = (double *)malloc((size_t)spm_tensor_count(&shape) * sizeof(double));
        for (k = 0; k < spm_tensor_count(&shape); k++) decide[out][k] = (double)values[k];
    }
}

/* Leaves the gradient of sum(direction * logits) in the model's parameters; `decide` (NULL: not wanted) gets what its
 * ReLUs returned. */
static spm_model *gradients_of(spm_context *ctx, const lesson *l, double **decide)
{
    spm_model *model = network(ctx, l->net, l->side, LOGITS, 0);
    spm_run_desc desc = SPM_ZERO;
    spm_run *run;
    float *image = lesson_pictures(l), direction[8 * LOGITS];
    lesson_direction(l, direction);
    desc.max_batch = l->n;
    desc.backward = 1;
    run = spm_run_create(model, &desc, NULL);
    if (decide) keep_decisions(run, model, l->n, NULL);
    (void)spm_run_input(run, value_of(model, "image"), image);
    CHECK_INT(spm_run_forward(run, l->n, 1), SPM_OK);
    if (decide) keep_decisions(run, model, l->n, decide);
    CHECK_INT(spm_run_set_gradient(run, value_of(model, "logits"), direction), SPM_OK);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    spm_model_finish_gradients(model);
    spm_run_destroy(run);
    free(image);
    return model;
}

/* What section A of train.bin says of a parameter. */
#define FACTS 6
static double exact_norm(const uint32_t *facts) { return golden_double(facts); }
static double exact_projection(const uint32_t *facts) { return golden_double(facts + 2); }
/* decided: 1: against the exact gradient under fp32's own decisions.  Never less than the rounding of the last digit, with
 * which every fp32 gradient ends. */
static double torch_error(const uint32_t *facts, int decided)
{
    return fmax((double)golden_float(facts[4 + decided]), 1.0 / 16777216.0);
}

static exact_net exact_of(spm_model *model, const lesson *l, double **decide)
{
    float *image = lesson_pictures(l), direction[8 * LOGITS];
    exact_net net;
    lesson_direction(l, direction);
    net = exact_gradients(model, l->n, image, direction, decide);
    CHECK_INT(net.unknown, 0);
    free(image);
    return net;
}

/* The double-precision gradients of exact.h are held to PyTorch's: norm and one projection of each.  The two round
 * otherwise, and the networks multiply that by thousands. */
static void check_exact(spm_model *model, const lesson *l, const exact_net *net, const uint32_t *facts)
{
    double worst = 0;
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        const double *g = net->gradient[p->id];
        double squares = 0, projection = 0;
        char name[160];
        uint32_t stream;
        int64_t k;
        if (p->flags & SPM_PARAMETER_BUFFER) continue;
        snprintf(name, sizeof name, "project %s", p->name);
        stream = golden_stream(name);
        for (k = 0; k < spm_tensor_count(&p->value); k++) {
            squares += g[k] * g[k];
            projection += g[k] * golden_draw(stream, (uint32_t)golden_index(&p->value, k));
        }
        worst = fmax(worst, fabs(sqrt(squares) - exact_norm(facts)) / exact_norm(facts));
        worst = fmax(worst, fabs(projection - exact_projection(facts)) / exact_norm(facts));
        CHECK_MSG(worst <= 1e-9, p->name);
        facts += FACTS;
    }
    if (getenv("VERBOSE")) printf("    %s: double precision here and in PyTorch differ by %.1e\n", l->net, worst);
}

/* No parameter's gradient is more than twice as far from the exact one as PyTorch's fp32 gradient is; the largest ratio. */
static double check_gradients(spm_model *model, const exact_net *exact, const uint32_t *facts, int decided, const char *where)
{
    double worst = 0;
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        double off = 0, norm = 0, ratio;
        int64_t k;
        if (!p->gradient) continue;
        for (k = 0; k < spm_tensor_count(&p->value); k++) {
            const double d = (double)p->gradient[k] - exact->gradient[p->id][k];
            off += d * d;
            norm += exact->gradient[p->id][k] * exact->gradient[p->id][k];
        }
        ratio = sqrt(off / norm) / torch_error(facts, decided);
        worst = fmax(worst, ratio);
        if (!(ratio <= 2) && (decided || !other_file)) {
            char text[240];
            snprintf(text, sizeof text, "%s: gradient of %.60s off by %.2g, %.2f times PyTorch's fp32%s", where, p->name,
                     sqrt(off / norm), ratio, decided ? " (decisions set aside)" : "");
            CHECK_MSG(0, text);
        }
        facts += FACTS;
    }
    return worst;
}

/* Against the exact gradient; and against that of an exact network whose ReLUs and pools decide as the library's did,
 * which leaves out whether one near zero fell on the other side. */
static void compare_lesson(const lesson *l, const exact_net *exact, const uint32_t *facts, spm_isa isa, int direct)
{
    spm_context *ctx = context(isa, direct);
    double **decide, plain, decided;
    char where[80];
    spm_model *model;
    int64_t flips;
    int v;
    if (!ctx) return;
    snprintf(where, sizeof where, "%s on %s%s", l->net, spm_isa_name(isa), direct ? "" : " (Winograd)");
    decide = (double **)calloc((size_t)exact->values, sizeof(double *));
    model = gradients_of(ctx, l, decide);
    flips = exact_differences(exact, decide);
    plain = check_gradients(model, exact, facts, 0, where);
    if (flips) {
        exact_net led = exact_of(model, l, decide);
        decided = check_gradients(model, &led, facts, 1, where);
        exact_free(&led);
    } else {
        decided = check_gradients(model, exact, facts, 1, where);
    }
    if (getenv("VERBOSE"))
        printf("    %s: at most %.2f times PyTorch's error; %ld decisions differ, without them %.2f times\n", where, plain, (long)flips,
               decided);
    for (v = 0; v < exact->values; v++) free(decide[v]);
    free(decide);
    spm_model_destroy(model);
    spm_context_destroy(ctx);
}

/* Of DeiT-tiny every gradient is within 1e-4. */
static void transformer_lesson(const lesson *l, const uint32_t *golden, int count)
{
    int i, k;
    for (k = 0; k < 4; k++) {
        spm_context *ctx = context(isas[k], 1);
        const uint32_t *at = golden;
        double worst = 0;
        spm_model *model;
        if (!ctx) continue;
        model = gradients_of(ctx, l, NULL);
        CHECK_INT(spm_model_parameter_count(model), count);
        for (i = 0; i < count; i++, at += 1 + SIGNS) {
            const spm_parameter *p = spm_model_parameter(model, i);
            const double off = projected_error(p, at, at + 1);
            worst = fmax(worst, off);
            CHECK_MSG(off <= 1e-4, p->name);
        }
        if (getenv("VERBOSE")) printf("    %s on %s: off by %.1e\n", l->net, spm_isa_name(isas[k]), worst);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
    }
}

/* Where the sections A and B of the file end. */
static int behind_gradients(const uint32_t *golden)
{
    int at = 0, number;
    for (number = 0; number < 4; number++) at += 2 + (int)golden[at + 1] * (number < RESNETS ? FACTS : 1 + SIGNS);
    return at;
}

/* A file of one's own (make_train.py FILE PICTURE) may hold A alone. */
static void gradients(void)
{
    int words, number, k, at = 0;
    uint32_t *golden = golden_read(golden_file, &words);
    CHECK_MSG(golden != NULL, "tests/golden/train.bin is missing (run from the repository's root)");
    for (number = 0; golden && number < 4 && at < words; number++) {
        lesson l = lessons[number];
        const int count = (int)golden[at + 1];
        l.picture = (int)golden[at];
        at += 2;
        if (number == RESNETS) {
            transformer_lesson(&l, golden + at, count);
            at += count * (1 + SIGNS);
        } else {
            spm_context *ctx = context(SPM_ISA_AUTO, 1);
            spm_model *model = network(ctx, l.net, l.side, LOGITS, 0);
            exact_net exact = exact_of(model, &l, NULL);
            check_exact(model, &l, &exact, golden + at);
            for (k = 0; k < 8; k++) compare_lesson(&l, &exact, golden + at, isas[k / 2], k % 2);
            exact_free(&exact);
            spm_model_destroy(model);
            spm_context_destroy(ctx);
            at += count * FACTS;
        }
    }
    free(golden);
}

/* A loss as a program of its own; `second` is the other branch, or the target. */
static spm_model *loss_of(spm_context *ctx, int64_t width, int contrast)
{
    spm_program *p = spm_program_create(ctx);
    int64_t shape[2] = { 0, 0 };
    spm_value a, b;
    shape[1] = width;
    a = spm_program_input(p, "a", 2, shape, 1);
    b = spm_program_input(p, "b", 2, shape, contrast);
    spm_program_output(p, "loss", contrast ? spm_ntxent(p, a, b, .5f) : spm_cross_entropy(p, a, b, 0, 0));
    return spm_model_create(p, 0, NULL);
}

static double loss_step(spm_run *run, spm_model *loss, const float *a, const float *b, int n)
{
    (void)spm_run_input(run, value_of(loss, "a"), a);
    (void)spm_run_input(run, value_of(loss, "b"), b);
    CHECK_INT(spm_run_forward(run, n, 1), SPM_OK);
    CHECK_INT(spm_run_backward(run), SPM_OK);
    return (double)spm_run_data(run, value_of(loss, "loss"))[0];
}

static void ten_steps(void)
{
    int words, kind, step, i, at;
    uint32_t *golden = golden_read(golden_file, &words);
    CHECK(golden != NULL);
    if (!golden) return;
    at = behind_gradients(golden);
    for (kind = 0; kind < 2; kind++) {
        spm_context *ctx = context(SPM_ISA_AUTO, 1);
        spm_model *model = network(ctx, "resnet20", 32, 10, 0), *loss = loss_of(ctx, 10, 0);
        spm_run_desc desc = SPM_ZERO;
        spm_optimizer_desc how = spm_optimizer_desc_init();
        spm_optimizer *optimizer;
        spm_run *run, *loss_run;
        float *image = golden_pictures("steps", 16, 32, 32), target[160] = { 0 };
        double off_loss = 0, off_running = 0;
        how.kind = kind ? SPM_ADAM : SPM_SGD;
        how.lr = 1e-5f;
        if (!kind) how.momentum = .9f;
        optimizer = spm_optimizer_create(model, &how, NULL);
        desc.max_batch = 16;
        desc.backward = 1;
        run = spm_run_create(model, &desc, NULL);
        loss_run = spm_run_create(loss, &desc, NULL);
        for (i = 0; i < 16; i++) target[10 * i + i % 10] = 1;
        (void)spm_run_input(run, value_of(model, "image"), image);
        for (step = 0; step < 10; step++, at++) {
            const spm_value logits = value_of(model, "logits");
            double l;
            CHECK_INT(spm_run_forward(run, 16, 1), SPM_OK);
            l = loss_step(loss_run, loss, spm_run_data(run, logits), target, 16);
            off_loss = fmax(off_loss, fabs(l - (double)golden_float(golden[at])));
            CHECK_INT(spm_run_set_gradient(run, logits, spm_run_gradient(loss_run, value_of(loss, "a"))), SPM_OK);
            spm_model_zero_gradients(model);
            CHECK_INT(spm_run_backward(run), SPM_OK);
            CHECK_INT(spm_run_commit_statistics(run, .1f), SPM_OK);
            spm_optimizer_step(optimizer);
        }
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            const spm_parameter *p = spm_model_parameter(model, i);
            int64_t k;
            if (!(p->flags & SPM_PARAMETER_BUFFER)) continue;
            for (k = 0; k < spm_tensor_count(&p->value); k++, at++)
                off_running = fmax(off_running, fabs((double)p->value.data[k] - (double)golden_float(golden[at])));
        }
        if (getenv("VERBOSE")) printf("    ten steps: losses off by %.2g, running statistics by %.2g\n", off_loss, off_running);
        CHECK(off_loss <= 2e-3 && off_running <= 1e-4);
        spm_optimizer_destroy(optimizer);
        spm_run_destroy(run);
        spm_run_destroy(loss_run);
        spm_model_destroy(model);
        spm_model_destroy(loss);
        spm_context_destroy(ctx);
        free(image);
    }
    free(golden);
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Official: all convolution weights but the smallest 1 %; sound: all but the first channels. */
static void mask_convolutions(spm_model *model, spm_run *run, int official)
{
    float *all = NULL, *keep, threshold = 0;
    int64_t n = 0, k, most = 1;
    int i, pass;
    for (pass = 0; pass < 2; pass++) {
        n = 0;
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            const spm_tensor *t = &spm_model_parameter(model, i)->value;
            if (t->rank != 4) continue;
            for (k = 0; pass && k < spm_tensor_count(t); k++) all[n + k] = fabsf(t->data[k]);
            n += spm_tensor_count(t);
            if (spm_tensor_count(t) > most) most = spm_tensor_count(t);
        }
        if (!pass) all = (float *)malloc((size_t)n * sizeof(float));
    }
    qsort(all, (size_t)n, sizeof(float), ascending);
    threshold = all[(int64_t)ceil(.01 * (double)n)];
    keep = (float *)malloc((size_t)most * sizeof(float));
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_tensor *t = &spm_model_parameter(model, i)->value;
        if (t->rank != 4) continue;
        for (k = 0; k < spm_tensor_count(t); k++)
            keep[k] = official ? fabsf(t->data[k]) >= threshold : k >= spm_tensor_count(t) / t->shape[0];
        CHECK_INT(spm_run_set_mask(run, i, keep), SPM_OK);
    }
    free(keep);
    free(all);
}

static void check_branch(spm_model *model, const uint32_t *golden, int branch, const char *profile)
{
    double worst = 0;
    int i, found = 0;
    spm_model_finish_gradients(model);
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        const spm_parameter *p = spm_model_parameter(model, i);
        const uint32_t *at = golden + (2 * found + branch) * (1 + SIGNS);
        double error;
        if (!p->gradient) continue;
        found++;
        if (golden_float(*at) < 1e-12f) continue; /* sound: no loss reaches the pruned branch's head */
        error = projected_error(p, at, at + 1);
        worst = fmax(worst, error);
        CHECK_MSG(error <= 1e-4, p->name);
    }
    if (getenv("VERBOSE")) printf("    %s, %s gradients off by %.2g\n", profile, branch ? "masked" : "dense", worst);
}

static void intervention_steps(void)
{
    int words, profile, i, at;
    uint32_t *golden = golden_read(golden_file, &words);
    CHECK(golden != NULL);
    if (!golden) return;
    at = behind_gradients(golden) + 2 * (10 + 2 * (16 * 7 + 32 * 6 + 64 * 6));
    for (profile = 0; profile < 2; profile++) {
        const int official = profile == 0;
        spm_context *ctx = context(SPM_ISA_AUTO, 1);
        spm_model *model = network(ctx, "resnet20", 16, 2, official), *contrast = loss_of(ctx, official ? 2 : 64, 1), *ce = loss_of(ctx, 2, 0);
        const spm_value compared = value_of(model, official ? "outputs" : "features"), outputs = value_of(model, "outputs");
        spm_run_desc desc = SPM_ZERO;
        spm_run *dense, *pruned, *contrast_run, *ce_run;
        char name[40];
        float *image, target[16] = { 0 }, gradient[16];
        const float *from_ce, *from_contrast;
        double ntxent, cross;
        snprintf(name, sizeof name, "intervention %d", (int)golden[at++]);
        image = golden_pictures(name, 8, 16, 16);
        desc.max_batch = 8;
        desc.backward = 1;
        dense = spm_run_create(model, &desc, NULL);
        pruned = spm_run_create(model, &desc, NULL);
        contrast_run = spm_run_create(contrast, &desc, NULL);
        ce_run = spm_run_create(ce, &desc, NULL);
        mask_convolutions(model, pruned, official);
        for (i = 0; i < 8; i++) target[2 * i + i % 2] = 1;
        (void)spm_run_input(dense, value_of(model, "image"), image);
        (void)spm_run_input(pruned, value_of(model, "image"), image);
        CHECK_INT(spm_run_forward(dense, 8, 1), SPM_OK);
        CHECK_INT(spm_run_forward(pruned, 8, 1), SPM_OK);
        ntxent = 2 * loss_step(contrast_run, contrast, spm_run_data(dense, compared), spm_run_data(pruned, compared), 8);
        cross = loss_step(ce_run, ce, spm_run_data(dense, outputs), target, 8);
        CHECK_NEAR(ntxent, golden_float(golden[at]), 1e-5);
        CHECK_NEAR(cross, golden_float(golden[at + 1]), 1e-5);
        from_ce = spm_run_gradient(ce_run, value_of(ce, "a"));
        from_contrast = spm_run_gradient(contrast_run, value_of(contrast, "a"));
        for (i = 0; i < 16; i++) gradient[i] = .2f * from_ce[i] + (official ? from_contrast[i] : 0.0f);
        CHECK_INT(spm_run_set_gradient(dense, outputs, gradient), SPM_OK);
        if (!official) CHECK_INT(spm_run_set_gradient(dense, compared, from_contrast), SPM_OK);
        spm_model_zero_gradients(model);
        CHECK_INT(spm_run_backward(dense), SPM_OK);
        check_branch(model, golden + at + 3, 0, official ? "official" : "sound");
        CHECK_INT(spm_run_set_gradient(pruned, compared, spm_run_gradient(contrast_run, value_of(contrast, "b"))), SPM_OK);
        spm_model_zero_gradients(model);
        CHECK_INT(spm_run_backward(pruned), SPM_OK);
        check_branch(model, golden + at + 3, 1, official ? "official" : "sound");
        at += 3 + (int)golden[at + 2] * 2 * (1 + SIGNS);
        spm_run_destroy(dense);
        spm_run_destroy(pruned);
        spm_run_destroy(contrast_run);
        spm_run_destroy(ce_run);
        spm_model_destroy(model);
        spm_model_destroy(contrast);
        spm_model_destroy(ce);
        spm_context_destroy(ctx);
        free(image);
    }
    CHECK_INT(at, words);
    free(golden);
}

int main(int argc, char **argv)
{
    other_file = argc > 1; /* golden/README.md */
    if (other_file) golden_file = argv[1];
    TEST(gradients);
    if (other_file) return TEST_END;
    TEST(ten_steps);
    TEST(intervention_steps);
    return TEST_END;
}
