/* repair.c - the main job from beginning to end, through the public API: train a classifier that takes a shortcut, show
 * that it memorizes the groups where the shortcut fails, find the channels that carry this memory, train it away.
 *
 *     repair DATA OUT
 *
 * `make demo` runs it on the pictures of data_tools/synth_birds.c.  It prints one table and writes OUT/summary.json,
 * OUT/report.html and two run folders, OUT/erm and OUT/intervene. */
#ifndef SPURMEM_LINKED /* set by the Makefile, which compiles the implementation once for all programs */
    #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include "terminal.h"

typedef struct demo {
    spm_context *ctx;
    spm_dataset *data;
    const char *out;
    spm_arch arch;
    spm_reading reading;
    spm_error err;
} demo;

static void path_in(const demo *d, char *path, size_t size, const char *name)
{
    snprintf(path, size, "%s/%s", d->out, name);
}

static void section(const char *title)
{
    progress_clear();
    fprintf(stderr, "\n== %s\n", title);
}

static void common_settings(demo *d, spm_train_desc *desc, const char *run)
{
    desc->out = run;
    desc->arch = d->arch;
    desc->reading = d->reading;
    desc->seed = 1;
    desc->command = "make demo";
    desc->progress = on_progress;
    desc->on_epoch = on_epoch;
}

/* Plain training, kept to its end: by then every training picture is known by heart. */
static int train_erm(demo *d, const char *run)
{
    spm_train_desc desc = spm_train_desc_init(SPM_METHOD_ERM);
    spm_train_result result;
    common_settings(d, &desc, run);
    desc.epochs = 20;
    desc.eval_every = 5;
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.select = SPM_SELECT_LAST;
    return spm_train(d->ctx, d->data, &desc, &result, &d->err) == SPM_OK && !result.stopped;
}

/* The intervention of METHOD 2.6 in its sound profile: a second branch without the critical channels, contrast between
 * the branches' features, and a cross-entropy in which small groups weigh somewhat more than their share. */
static int train_intervention(demo *d, const char *run, const char *checkpoint)
{
    spm_train_desc desc = spm_train_desc_init(SPM_METHOD_INTERVENE);
    spm_train_result result;
    common_settings(d, &desc, run);
    desc.checkpoint = checkpoint;
    desc.epochs = 20;
    desc.eval_every = 4;
    desc.optimizer.lr = 3e-3f;
    desc.schedule = SPM_SCHEDULE_COSINE;
    desc.augment = SPM_AUGMENT_PAPER;
    desc.lambda = 10.0f;
    desc.weight_power = 0.25f; /* 1: groups weigh the same, which costs the majority */
    desc.prune_fraction = 0.05;
    desc.cross_entropy_pruned = 1;
    return spm_train(d->ctx, d->data, &desc, &result, &d->err) == SPM_OK && !result.stopped;
}

static spm_model *load(demo *d, const char *checkpoint)
{
    spm_model *model = spm_model_build(d->ctx, &d->arch, 0, &d->err);
    if (model && spm_checkpoint_load(model, checkpoint, 0, &d->err)) {
        spm_model_destroy(model);
        model = NULL;
    }
    return model;
}

static int evaluate(demo *d, spm_model *model, spm_split split, spm_eval *eval)
{
    spm_eval_desc desc = SPM_ZERO;
    desc.reading = d->reading;
    desc.split = split;
    desc.progress = on_progress;
    return spm_evaluate(model, d->data, &desc, eval, &d->err) == SPM_OK;
}

/* Removes the 1, 2 and 3 channels that rank highest for the groups where the shortcut fails (1: landbirds on water, 2:
 * waterbirds on land), and for the three 19 matched controls. */
static spm_json *localize(demo *d, spm_model *model, spm_criterion criterion)
{
    static const int minorities[2] = { 1, 2 };
    spm_localize_desc desc = SPM_ZERO;
    spm_json *json = spm_json_create(d->ctx);
    desc.reading = d->reading;
    desc.groups = minorities;
    desc.n_groups = 2;
    desc.criterion = criterion;
    desc.controls = 19;
    if (criterion == SPM_CRITERION_EXHAUSTIVE) { /* one unit at a time; the 95 % with the smallest first-order effect left out */
        desc.controls = 0;
        desc.top[desc.n_top++] = 1;
        desc.screen = 0.95;
    }
    desc.seed = 1;
    desc.progress = on_progress;
    if (json && spm_localize(model, d->data, &desc, json, NULL, &d->err)) {
        spm_json_destroy(json);
        json = NULL;
    }
    return json;
}

static int write_json(demo *d, const char *name, spm_json *json)
{
    char path[1024];
    const char *text = spm_json_finish(json);
    path_in(d, path, sizeof path, name);
    return text && spm_file_write(d->ctx, path, text, strlen(text), &d->err) == SPM_OK;
}

/* Whose pictures move the weights: every group's share of the gradient, for the report. */
static int write_gradients(demo *d, spm_model *model, const char *name, int64_t epoch)
{
    spm_gradient_share *rows = NULL;
    int64_t count = 0, i;
    size_t room, used;
    char path[1024], *text;
    if (spm_gradient_shares(model, d->data, &d->reading, SPM_TRAIN, 0, &rows, &count, &d->err)) return 0;
    room = (size_t)(count + 1) * 200;
    text = (char *)malloc(room);
    used = text ? (size_t)snprintf(text, room, "epoch,parameter,block,group,count,norm,share,cosine\n") : 0;
    for (i = 0; text && i < count && used < room; i++) {
        const spm_parameter *p = spm_model_parameter(model, rows[i].parameter);
        used += (size_t)snprintf(text + used, room - used, "%lld,%.80s,%d,%d,%lld,%.9g,%.9g,%.9g\n", (long long)epoch,
                                 p->name, p->block, rows[i].group,
                                 (long long)spm_dataset_group_count(d->data, SPM_TRAIN, rows[i].group), rows[i].norm,
                                 rows[i].share, rows[i].cosine);
    }
    path_in(d, path, sizeof path, name);
    i = text && used < room && spm_file_write(d->ctx, path, text, used, &d->err) == SPM_OK;
    free(text);
    spm_free(d->ctx, rows);
    return i != 0;
}

static void print_cell(const spm_group_metrics *g)
{
    char share[16];
    percent(share, sizeof share, g->accuracy);
    printf("  %5s (%4lld of %4lld)", share, (long long)g->correct, (long long)g->count);
}

static void print_table(const spm_eval *before, const spm_eval *after)
{
    int g, s;
    printf("\n%-22s  %-22s %-22s %-22s %-22s\n", "group", "train, ERM", "test, ERM", "train, intervention",
           "test, intervention");
    for (g = 0; g < before[0].n_groups; g++) {
        printf("%-22s", before[0].groups[g].name);
        for (s = 0; s < 4; s++) print_cell(s < 2 ? &before[s].groups[g] : &after[s - 2].groups[g]);
        printf("\n");
    }
    printf("%-22s", "worst group");
    for (s = 0; s < 4; s++)
        printf("  %5.1f               ", 100.0 * (s < 2 ? &before[s] : &after[s - 2])->worst_accuracy);
    printf("\n%-22s", "mean");
    for (s = 0; s < 4; s++)
        printf("  %5.1f               ", 100.0 * (s < 2 ? &before[s] : &after[s - 2])->mean_accuracy);
    printf("\n");
}

/* What removing a ranking's three channels did to group `g` of a split: accuracy before and after, p against controls. */
static void print_removal(const spm_json_value *study, const spm_json_value *row, const char *split, int64_t g)
{
    const spm_json_value *before = spm_json_at(spm_json_get(spm_json_get(study, "baseline"), split), g);
    const spm_json_value *after = spm_json_at(spm_json_get(spm_json_get(row, "splits"), split), g),
                         *controls = spm_json_get(row, "controls");
    int64_t i;
    printf("  %s %.1f to %.1f", split, 100.0 * spm_json_as_number(spm_json_get(before, "accuracy"), 0.0),
           100.0 * spm_json_as_number(spm_json_get(after, "accuracy"), 0.0));
    for (i = 0; i < spm_json_length(controls); i++) {
        const spm_json_value *control = spm_json_at(controls, i);
        if (strcmp(spm_json_as_string(spm_json_get(control, "split"), ""), split) != 0
            || spm_json_as_int(spm_json_get(control, "group"), -1) != g)
            continue;
        printf(" (19 controls: %+.1f points, p = %.2f)",
               -100.0 * spm_json_as_number(spm_json_get(control, "mean_drop"), 0.0),
               spm_json_as_number(spm_json_get(control, "p_value"), 1.0));
    }
}

/* The top channels of every ranking, and what removing all three does to the groups where the shortcut fails. */
static void print_channels(demo *d, spm_json *json, const char *criterion)
{
    const char *text = spm_json_finish(json);
    spm_json_value *study = spm_json_parse(d->ctx, "study", text, strlen(text), &d->err);
    const spm_json_value *rankings = spm_json_get(study, "rankings"), *results = spm_json_get(study, "results");
    int64_t i, u, g;
    for (i = 0; i < spm_json_length(rankings); i++) {
        const spm_json_value *ranking = spm_json_at(rankings, i), *units = spm_json_get(ranking, "units");
        int64_t group = spm_json_as_int(spm_json_get(ranking, "group"), -1);
        if (group >= 0)
            printf("%s, ranked for group %lld:", criterion, (long long)group);
        else
            printf("%s:", criterion);
        for (u = 0; u < spm_json_length(units); u++) {
            const spm_json_value *unit = spm_json_at(units, u);
            printf("  %s[%lld]", spm_json_as_string(spm_json_get(unit, "parameter"), "?"),
                   (long long)spm_json_as_int(spm_json_get(unit, "channel"), 0));
        }
        printf("\n");
        for (g = group >= 0 ? group : 1; g <= (group >= 0 ? group : 2); g++) {
            printf("    without them, group %lld:", (long long)g);
            print_removal(study, spm_json_at(results, 3 * i + 2), "train", g);
            print_removal(study, spm_json_at(results, 3 * i + 2), "test", g);
            printf("\n");
        }
    }
    spm_json_free(d->ctx, study);
}

/* summary.json: test metrics of both runs and the studies; erm/localize.json: the studies for the report. */
static int write_results(demo *d, const spm_eval *erm, const spm_eval *intervene, spm_json *gradient,
                         spm_json *magnitude, spm_json *scan)
{
    const char *by_gradient = spm_json_finish(gradient), *by_magnitude = spm_json_finish(magnitude),
               *by_scan = spm_json_finish(scan);
    spm_json *summary = spm_json_create(d->ctx), *studies = spm_json_create(d->ctx);
    int ok = summary && studies && by_gradient && by_magnitude && by_scan;
    if (ok) {
        spm_json_object_begin(summary, NULL);
        spm_eval_json(summary, "erm", erm);
        spm_eval_json(summary, "intervene", intervene);
        spm_json_raw(summary, "localize", by_gradient);
        spm_json_raw(summary, "localize_magnitude", by_magnitude);
        spm_json_object_end(summary);
        spm_json_object_begin(studies, NULL);
        spm_json_raw(studies, "gradient", by_gradient);
        spm_json_raw(studies, "magnitude", by_magnitude);
        spm_json_raw(studies, "exhaustive", by_scan);
        spm_json_object_end(studies);
        ok = write_json(d, "summary.json", summary) && write_json(d, "erm/localize.json", studies);
    }
    spm_json_destroy(summary);
    spm_json_destroy(studies);
    return ok;
}

static int write_report(demo *d, const char *erm, const char *intervene)
{
    spm_report_desc report = SPM_ZERO;
    const char *runs[2];
    char path[1024];
    runs[0] = erm;
    runs[1] = intervene;
    report.runs = runs;
    report.n_runs = 2;
    report.title = "Synthetic birds: memory found and removed";
    path_in(d, path, sizeof path, "report.html");
    if (spm_report_draw(d->ctx, d->data, runs, 2, 3, &d->err)) return 0;
    return spm_report_write(d->ctx, &report, path, &d->err) == SPM_OK;
}

/* Everything behind the training: studies, table, summary, report. */
static int finish(demo *d, const char *erm, const char *intervene, const char *erm_file, const char *repaired_file)
{
    spm_eval before[2], after[2];
    spm_model *model = load(d, erm_file), *repaired = model ? load(d, repaired_file) : NULL;
    spm_json *gradient = NULL, *magnitude = NULL, *scan = NULL;
    int ok = repaired != NULL, s;
    memset(before, 0, sizeof before);
    memset(after, 0, sizeof after);
    section("find the channels that carry the memory");
    if (ok) gradient = localize(d, model, SPM_CRITERION_GRADIENT);
    if (gradient) magnitude = localize(d, model, SPM_CRITERION_MAGNITUDE);
    if (magnitude) scan = localize(d, model, SPM_CRITERION_EXHAUSTIVE);
    ok = scan != NULL;
    ok = ok && evaluate(d, model, SPM_TRAIN, &before[0]) && evaluate(d, model, SPM_TEST, &before[1]);
    ok = ok && evaluate(d, repaired, SPM_TRAIN, &after[0]) && evaluate(d, repaired, SPM_TEST, &after[1]);
    ok = ok && write_gradients(d, model, "erm/gradients.csv", 19)
         && write_gradients(d, repaired, "intervene/gradients.csv", 19);
    ok = ok && write_results(d, &before[1], &after[1], gradient, magnitude, scan) && write_report(d, erm, intervene);
    progress_clear();
    if (ok) {
        print_table(before, after);
        printf("\nchannels that carry the memory\n");
        print_channels(d, gradient, "gradient");
        print_channels(d, magnitude, "magnitude");
        printf("\n%s/summary.json and %s/report.html have the rest\n", d->out, d->out);
    }
    for (s = 0; s < 2; s++) {
        spm_eval_free(d->ctx, &before[s]);
        spm_eval_free(d->ctx, &after[s]);
    }
    spm_json_destroy(gradient);
    spm_json_destroy(magnitude);
    spm_json_destroy(scan);
    spm_model_destroy(model);
    spm_model_destroy(repaired);
    return ok;
}

static int run(demo *d, const char *path)
{
    char erm[1024], intervene[1024], erm_file[1100], repaired_file[1100];
    spm_dataset_desc opening = SPM_ZERO;
    path_in(d, erm, sizeof erm, "erm");
    path_in(d, intervene, sizeof intervene, "intervene");
    snprintf(erm_file, sizeof erm_file, "%s/last.safetensors", erm);
    snprintf(repaired_file, sizeof repaired_file, "%s/best.safetensors", intervene);
    opening.path = path;
    d->data = spm_dataset_open(d->ctx, &opening, &d->err);
    if (!d->data) return 0;
    d->arch.height = d->arch.width_px = 64;
    d->arch.classes = spm_dataset_classes(d->data);
    if (spm_arch_parse(d->ctx, "resnet18:width=16", &d->arch, &d->err)) return 0;
    d->reading.transform = spm_transform_make(64, 64);
    d->reading.transform.resize = SPM_RESIZE_EXACT;
    section("train with empirical risk minimisation (ERM)");
    if (!train_erm(d, erm)) return 0;
    section("train it away (intervention)");
    if (!train_intervention(d, intervene, erm_file)) return 0;
    return finish(d, erm, intervene, erm_file, repaired_file);
}

int main(int argc, char **argv)
{
    spm_context_desc desc = SPM_ZERO;
    demo d;
    int ok;
    memset(&d, 0, sizeof d);
    if (argc != 3) {
        fprintf(stderr, "usage: repair DATA OUT\n");
        return 2;
    }
    d.out = argv[2];
    desc.log = on_log;
    d.ctx = spm_context_create(&desc);
    if (!d.ctx) {
        fprintf(stderr, "repair: no context: this machine lacks the instruction set in SPURMEM_ISA\n");
        return 1;
    }
    catch_interrupts();
    ok = run(&d, argv[1]);
    progress_clear();
    if (!ok) fprintf(stderr, "repair: %s\n", d.err.status ? d.err.text : "stopped");
    spm_dataset_close(d.data);
    spm_context_destroy(d.ctx);
    return ok ? 0 : 1;
}
