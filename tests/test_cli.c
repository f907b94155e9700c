/* The command line: every command of the built tool, run as a user runs it, its exit codes, sentences and JSON.
 *
 * SPURMEM_BUILD names the folder that holds `spurmem` and `synth_birds`; the test works in its subfolder test_cli. */
#define _XOPEN_SOURCE 700
#include "../spurmem.h"
#include "test.h"
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NET "--arch resnet18:width=8 --image-size 32 --resize exact"
#define BIRD "birds/images/test/00000.jpg"
#define MODEL "--data birds --checkpoint run/last.safetensors"
#define N_GROUPS 4

static char tool[4096], drawer[4200];
static spm_context *ctx;
static char *out, *err;      /* what the last run said */
static spm_json_value *root; /* the last parsed object */
static const char *line_now; /* the last command line, for the complaints */

/* ---- running the tool ---- */

/* A whole file with a zero behind it; "" where there is none. Freed with free. */
static char *slurp(const char *path, size_t *size)
{
    char *text = test_read(path, size);
    if (!text) text = (char *)calloc(1, 1);
    if (!text) exit(1);
    return text;
}

static void put(const char *path, const char *text)
{
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(text, 1, strlen(text), file) == strlen(text));
    if (file) fclose(file);
}

static int exists(const char *path)
{
    struct stat status;
    return stat(path, &status) == 0;
}

/* Runs the tool with these arguments: its exit code; `out` and `err` are what it printed. "@>FILE" sends stdout elsewhere. */
static int run(const char *format, ...)
{
    static char arguments[4000], command[16000];
    va_list list;
    char *elsewhere;
    int code;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    elsewhere = strstr(arguments, "@>");
    if (elsewhere) *elsewhere = 0;
    snprintf(command, sizeof command, "'%s' %s >%s 2>err.txt </dev/null", tool, arguments, elsewhere ? elsewhere + 2 : "out.txt");
    line_now = arguments;
    code = system(command);
    free(out);
    free(err);
    out = slurp(elsewhere ? "/dev/null" : "out.txt", NULL);
    err = slurp("err.txt", NULL);
    return WIFEXITED(code) ? WEXITSTATUS(code) : 1000;
}

static void complain(int line, const char *what)
{
    char text[900];
    snprintf(text, sizeof text, "spurmem %.300s: %.100s; stdout \"%.160s\", stderr \"%.300s\"", line_now, what, out, err);
    test_report("test_cli.c", line, text);
}

#define RUNS(code, ...) (run(__VA_ARGS__) == (code) ? (void)0 : complain(__LINE__, "another exit code than " #code))
#define SAYS(text) (strstr(err, text) ? (void)0 : complain(__LINE__, "stderr lacks " #text))
/* Fails with `code`, nothing on stdout, and one sentence on stderr that holds `text`. */
#define FAILS(code, text, ...) (RUNS(code, __VA_ARGS__), one_sentence(__LINE__), SAYS(text))

static void one_sentence(int line)
{
    size_t n = strlen(err);
    if (n < 12 || strncmp(err, "spurmem: ", 9) != 0 || strchr(err, '\n') != err + n - 1) complain(line, "not exactly one sentence on stderr");
    if (*out) complain(line, "something on stdout");
}

/* ---- looking at JSON ---- */

static const spm_json_value *parse(const char *text)
{
    spm_error why = SPM_ZERO;
    spm_json_free(ctx, root);
    root = spm_json_parse(ctx, "result", text, strlen(text), &why);
    if (!root) test_report("test_cli.c", __LINE__, why.text);
    return root;
}

static const spm_json_value *parse_file(const char *path)
{
    char *text = slurp(path, NULL);
    const spm_json_value *value = parse(text);
    free(text);
    return value;
}

static const spm_json_value *get(const spm_json_value *object, const char *key)
{
    const spm_json_value *value = spm_json_get(object, key);
    if (!value) {
        char text[200];
        snprintf(text, sizeof text, "the JSON lacks \"%.100s\"", key);
        test_report("test_cli.c", __LINE__, text);
    }
    return value;
}

static int64_t whole(const spm_json_value *object, const char *key)
{
    int64_t value = spm_json_as_int(get(object, key), INT64_MIN);
    CHECK_MSG(spm_json_type_of(spm_json_get(object, key)) == SPM_JSON_NUMBER && value != INT64_MIN, key);
    return value;
}

static double real(const spm_json_value *object, const char *key)
{
    CHECK_MSG(spm_json_type_of(get(object, key)) == SPM_JSON_NUMBER, key);
    return spm_json_as_number(spm_json_get(object, key), (double)NAN);
}

static double share(const spm_json_value *object, const char *key)
{
    double value = real(object, key);
    CHECK_MSG(value >= 0.0 && value <= 1.0, key);
    return value;
}

static const char *string(const spm_json_value *object, const char *key)
{
    CHECK_MSG(spm_json_type_of(get(object, key)) == SPM_JSON_STRING, key);
    return spm_json_as_string(spm_json_get(object, key), "");
}

static int is_null(const spm_json_value *object, const char *key)
{
    return get(object, key) && spm_json_type_of(spm_json_get(object, key)) == SPM_JSON_NULL;
}

static const spm_json_value *list(const spm_json_value *object, const char *key)
{
    CHECK_MSG(spm_json_type_of(get(object, key)) == SPM_JSON_ARRAY, key);
    return spm_json_get(object, key);
}

/* A list of all groups in id order; `mean`: of repeats, where correct / count is the accuracy only after rounding. */
static int64_t check_groups(const spm_json_value *groups, int mean)
{
    int64_t g, count, total = 0;
    CHECK_INT(spm_json_length(groups), N_GROUPS);
    for (g = 0; g < spm_json_length(groups); g++) {
        const spm_json_value *group = spm_json_at(groups, g), *ci = list(group, "ci95");
        CHECK_INT(whole(group, "id"), g);
        CHECK_INT(whole(group, "y"), g / 2);
        CHECK_INT(whole(group, "confounder"), g % 2);
        CHECK(*string(group, "name"));
        CHECK_INT(spm_json_length(ci), 2);
        count = whole(group, "count");
        total += count;
        if (count == 0) {
            CHECK(is_null(group, "accuracy") && is_null(group, "loss"));
            CHECK_INT(whole(group, "correct"), 0);
            CHECK(spm_json_type_of(spm_json_at(ci, 0)) == SPM_JSON_NULL && spm_json_type_of(spm_json_at(ci, 1)) == SPM_JSON_NULL);
        } else {
            double accuracy = share(group, "accuracy"), lo = spm_json_as_number(spm_json_at(ci, 0), -1.0), hi = spm_json_as_number(spm_json_at(ci, 1), -1.0);
            CHECK_NEAR(accuracy, (double)whole(group, "correct") / (double)count, mean ? 0.5 / (double)count + 1e-8 : 1e-8);
            CHECK(lo >= 0.0 && hi <= 1.0 && lo < hi);
            if (!mean) CHECK(lo <= accuracy && accuracy <= hi);
            CHECK(real(group, "loss") >= 0.0);
        }
    }
    return total;
}

/* The splits of a localize object's baseline or row: these, each with its groups. */
static void check_splits(const spm_json_value *splits, int mean)
{
    CHECK_INT(spm_json_length(splits), 2);
    CHECK_STR(spm_json_key_at(splits, 0), "train");
    CHECK_STR(spm_json_key_at(splits, 1), "test");
    CHECK_INT(check_groups(spm_json_get(splits, "train"), mean), 64);
    CHECK_INT(check_groups(spm_json_get(splits, "test"), mean), 24);
}

/* ---- the command line alone ---- */

static void test_help(void)
{
    static const char commands[][12] = { "train", "intervene", "eval", "localize", "predict", "decode", "report", "inspect", "convert", "bench" };
    int i;
    RUNS(0, "--help");
    for (i = 0; i < (int)(sizeof commands / sizeof commands[0]); i++) CHECK(strstr(out, commands[i]) != NULL);
    for (i = 0; i < (int)(sizeof commands / sizeof commands[0]); i++) {
        RUNS(0, "%s --help", commands[i]);
        CHECK(strstr(out, "--threads") && strstr(out, "--json") && !*err);
        RUNS(0, "%s --seed 3 -h", commands[i]);
    }
    RUNS(0, "--version");
    CHECK_INT(strncmp(out, "spurmem ", 8), 0);
}

static void test_wrong_lines(void)
{
    RUNS(2, " ");
    CHECK(!*out);
    SAYS("train");
    SAYS("--help");
    FAILS(2, "did you mean train?", "trian --data x");
    FAILS(2, "--help", "frobnicate");
    FAILS(2, "did you mean --epochs?", "train --epochz 3");
    FAILS(2, "--epochs", "train --epochs");
    FAILS(2, "--epochs 2x", "train --epochs 2x");
    FAILS(2, "--json needs a value", "eval --json= " MODEL);
    FAILS(2, "--epochs 0", "train --data birds --out r --epochs 0");
    FAILS(2, "--batch 0", "train --data birds --out r --batch=0");
    FAILS(2, "--batch 99999999999999", "eval --batch 99999999999999 " MODEL);
    FAILS(2, "--threads -1", "eval --threads -1 " MODEL);
    FAILS(2, "--lr nan", "train --lr nan");
    FAILS(2, "--tau 0", "intervene --tau 0");
    FAILS(2, "--prune-fraction 1", "intervene --prune-fraction 1");
    FAILS(2, "--ce", "intervene " MODEL " --out r --ce off --contrast none");
    FAILS(2, "did you mean cosine?", "train --schedule cosin");
    FAILS(2, "sgd", "train --data birds --out r " NET " --momentum .9");
    FAILS(2, "--quiet takes no value", "eval --quiet=on");
    FAILS(2, "-q", "eval -q");
    FAILS(2, "no option --top", "eval --top 3");
    FAILS(2, "off: it takes options only", "train --data birds --out r " NET " --drop-last off");
    FAILS(2, "--only decode", "bench --only train:resnet18 a.jpg");
    FAILS(2, "from 0 to 1", "train --interpolate 2");
    FAILS(2, "below 1", "train --hold-out 1");
    FAILS(2, "at most 1", "train --gce-q 0");
    FAILS(2, "from 2 to", "train --upweight 1");
    FAILS(2, "--lr 1e-46", "train --lr 1e-46");
    FAILS(2, "63 bits", "train --seed 99999999999999999999");
    FAILS(2, "--permutations 0", "localize " MODEL " --permutations 0");
    FAILS(2, "--normalize", "eval " MODEL " --normalize 0,0,0/1e-40,1,1");
    FAILS(2, "pack DATA FILE", "pack birds");
    FAILS(2, "train needs --data", "train --out r " NET);
    FAILS(2, "train needs --out", "train --data birds " NET);
    FAILS(2, "intervene needs --checkpoint", "intervene --data birds --out r");
    FAILS(2, "eval needs --checkpoint", "eval --data birds");
    FAILS(2, "localize needs --data", "localize --checkpoint run/last.safetensors");
    FAILS(2, "predict needs --checkpoint", "predict a.jpg");
    FAILS(2, "predict needs at least one", "predict --checkpoint a.safetensors");
    FAILS(2, "decode needs --out-dir", "decode a.jpg");
    FAILS(2, "decode needs at least one", "decode --out-dir d");
    FAILS(2, "report needs", "report");
    FAILS(2, "inspect takes", "inspect");
    FAILS(2, "inspect takes", "inspect a b");
    FAILS(2, "convert takes two", "convert a.pth");
    FAILS(2, ".safetensors or .pth", "convert a.pth b.npz");
    FAILS(2, "resnet18", "train --data birds --out r --arch resnet19");
    FAILS(2, "--image-size 12y", "eval " MODEL " --image-size 12y");
    FAILS(2, "--normalize 1,2", "eval " MODEL " --normalize 1,2");
    FAILS(2, "--only", "bench --only gem");
    FAILS(2, "nearest", "bench --only train:resnet19");
    FAILS(2, "pictures", "bench --only decode");
    FAILS(2, "--top 1.5", "localize " MODEL " --top 1.5");
    FAILS(2, "--top 1,", "localize " MODEL " --top 1,");
    FAILS(2, "--groups 0,x", "localize " MODEL " --groups 0,x");
    FAILS(2, "--std nan", "localize " MODEL " --modify noise --std nan");
    FAILS(2, "--report-splits", "localize " MODEL " --report-splits train,tset");
    FAILS(2, "--report-splits", "localize " MODEL " --report-splits=");
    FAILS(2, "--rewind", "localize " MODEL " --modify rewind");
    FAILS(2, "--allow-same-split", "localize " MODEL " --select-split test");
}

static void test_missing_files(void)
{
    FAILS(1, "nodata", "train --data nodata --out r " NET);
    CHECK(!exists("r"));
    FAILS(1, "nodata", "train --data nodata --out r"); /* files come before a missing --arch */
    FAILS(1, "--arch", "train --data birds --out r");
    FAILS(1, "nodata", "eval --data nodata --checkpoint run/last.safetensors");
    FAILS(1, "no.safetensors", "eval --data birds --checkpoint no.safetensors");
    FAILS(1, "no.safetensors", "localize --data birds --checkpoint no.safetensors");
    FAILS(1, "no.safetensors", "localize " MODEL " --modify rewind --rewind no.safetensors");
    FAILS(1, "no.pth", "intervene --data birds --checkpoint no.pth --out r");
    FAILS(1, "no.pth", "predict --checkpoint no.pth " BIRD);
    FAILS(1, "no.jpg", "predict --checkpoint run/last.safetensors no.jpg");
    FAILS(1, "no.jpg", "decode --out-dir d no.jpg");
    FAILS(1, "norun", "report norun -o no.html");
    CHECK(!exists("no.html"));
    FAILS(1, "nothing", "inspect nothing");
    FAILS(1, "no.pth", "convert no.pth no.safetensors");
    CHECK(!exists("no.safetensors"));
    FAILS(1, "no.jpg", "bench --only decode no.jpg --json -");
    put("empty.jpg", "");
    FAILS(1, "empty.jpg", "inspect empty.jpg");
    FAILS(1, "empty.jpg", "predict --checkpoint run/last.safetensors empty.jpg");
    put("notes.txt", "no picture, no checkpoint\n");
    FAILS(1, "notes.txt", "inspect notes.txt");
    FAILS(1, "notes.txt", "eval --data birds --checkpoint notes.txt");
    FAILS(1, "notes.txt", "decode --out-dir d notes.txt");
}

/* ---- the main job, command by command ---- */

static int train_passed;

static void test_train(void)
{
    const spm_json_value *object;
    char *text, *line, *next;
    int lines = 0;
    RUNS(0, "train --data=birds --out run " NET " --epochs 2 --batch 16 --seed=7 --select wga --log-steps run_steps.jsonl --json train.json --quiet");
    CHECK_STR(err, "");
    CHECK(strstr(out, "run") != NULL);
    object = parse_file("train.json");
    CHECK_STR(string(object, "command"), "train");
    CHECK_STR(string(object, "out"), "run");
    CHECK_INT(whole(object, "epochs"), 2);
    CHECK_INT(whole(object, "steps"), 8);
    CHECK(whole(object, "best_epoch") == 0 || whole(object, "best_epoch") == 1);
    CHECK(exists("run/best.safetensors") && exists("run/last.safetensors") && exists("run/state.safetensors"));
    object = parse_file("run/config.json");
    CHECK_STR(string(object, "method"), "erm");
    CHECK_STR(string(object, "arch"), "resnet18:width=8");
    CHECK_STR(string(object, "optimizer"), "adam");
    CHECK_INT(whole(object, "seed"), 7);
    CHECK_INT(whole(object, "batch"), 16);
    CHECK_INT(whole(object, "epochs"), 2);
    CHECK_NEAR(real(object, "lr"), 1e-3, 1e-9);
    CHECK_INT(spm_json_length(list(object, "groups")), N_GROUPS);
    /* a line per (epoch, split) */
    text = slurp("run/metrics.jsonl", NULL);
    for (line = text; *line; line = next, lines++) {
        static const char splits[3][6] = { "train", "val", "test" };
        next = strchr(line, '\n');
        CHECK(next != NULL);
        if (!next) break;
        *next++ = 0;
        object = parse(line);
        CHECK_INT(whole(object, "epoch"), lines / 3);
        CHECK_STR(string(object, "split"), splits[lines % 3]);
        CHECK(real(object, "loss") > 0.0 && real(object, "seconds") >= 0.0);
        (void)share(object, "mean_accuracy");
        (void)share(object, "adjusted_accuracy");
        (void)share(object, "worst_group_accuracy");
        CHECK_INT(check_groups(list(object, "groups"), 0), lines % 3 == 0 ? 64 : 24);
    }
    CHECK_INT(lines, 6);
    free(text);
    /* a line per step, from 1 */
    lines = 0;
    text = slurp("run_steps.jsonl", NULL);
    for (line = text; *line; line = next) {
        next = strchr(line, '\n');
        if (!next) break;
        *next++ = 0;
        object = parse(line);
        CHECK_INT(whole(object, "step"), ++lines);
        CHECK(real(object, "loss") > 0.0);
        CHECK_NEAR(real(object, "loss"), real(object, "ce"), 1e-6);
        CHECK_NEAR(real(object, "lr"), 1e-3, 1e-9);
    }
    CHECK_INT(lines, 8);
    free(text);
    RUNS(0, "train --data birds --out run_json " NET " --epochs 1 --batch 64 --json - --quiet");
    object = parse(out);
    CHECK_STR(string(object, "command"), "train");
    CHECK(exists("run_json/best.safetensors") && exists("run_json/last.safetensors"));
    FAILS(1, "run", "train --data birds --out run " NET " --epochs 2");
    train_passed = test_bad_checks == 0;
}

static void test_eval(void)
{
    const spm_json_value *object, *groups, *worst;
    double lowest = 2.0, correct = 0.0;
    int64_t g, lowest_id = -1;
    RUNS(0, "eval " MODEL " --json eval.json");
    CHECK(strstr(out, "worst group") != NULL);
    object = parse_file("eval.json");
    CHECK_STR(string(object, "command"), "eval");
    CHECK_STR(string(object, "split"), "test");
    CHECK_INT(whole(object, "count"), 24);
    groups = list(object, "groups");
    CHECK_INT(check_groups(groups, 0), 24);
    for (g = 0; g < spm_json_length(groups); g++) {
        double accuracy = real(spm_json_at(groups, g), "accuracy");
        correct += (double)whole(spm_json_at(groups, g), "correct");
        if (accuracy < lowest) {
            lowest = accuracy;
            lowest_id = g;
        }
    }
    worst = get(object, "worst_group");
    CHECK_INT(whole(worst, "id"), lowest_id);
    CHECK_NEAR(share(worst, "accuracy"), lowest, 1e-9);
    CHECK_NEAR(share(object, "mean_accuracy"), correct / 24.0, 1e-8);
    (void)share(object, "adjusted_accuracy");
    CHECK_NEAR(share(object, "balanced_accuracy"), correct / 24.0, 1e-8); /* the test split is balanced */
    (void)share(object, "auroc");
    (void)share(object, "ece");
    RUNS(0, "eval --split=train --json - " MODEL);
    object = parse(out);
    CHECK_STR(string(object, "split"), "train");
    CHECK_INT(check_groups(list(object, "groups"), 0), 64);
    RUNS(0, "eval --split train --limit 10 --json - " MODEL);
    CHECK_INT(whole(parse(out), "count"), 10);
}

/* One group has no test example: count 0, nulls, left out of the worst and the means. */
static void test_empty_group(void)
{
    const spm_json_value *object, *group;
    char *text = slurp("birds/metadata.csv", NULL), *from, *to, *end;
    for (from = to = text; *from; from = end) {
        int id, y, split, place;
        char file[200];
        end = strchr(from, '\n');
        end = end ? end + 1 : from + strlen(from);
        if (sscanf(from, "%d,%199[^,],%d,%d,%d", &id, file, &y, &split, &place) == 5 && split == 2 && y == 0 && place == 1) continue;
        memmove(to, from, (size_t)(end - from));
        to += end - from;
    }
    *to = 0;
    CHECK(mkdir("gap", 0777) == 0 && symlink("../birds/images", "gap/images") == 0);
    put("gap/metadata.csv", text);
    free(text);
    RUNS(0, "eval --data gap --checkpoint run/last.safetensors --json -");
    object = parse(out);
    CHECK_INT(check_groups(list(object, "groups"), 0), 18);
    group = spm_json_at(list(object, "groups"), 1);
    CHECK_INT(whole(group, "count"), 0);
    CHECK(is_null(group, "accuracy"));
    CHECK(whole(get(object, "worst_group"), "id") != 1);
    RUNS(0, "eval --data gap --checkpoint run/last.safetensors");
    RUNS(0, "localize --data gap --checkpoint run/last.safetensors --groups 1 --top 1 --controls 2 --json -");
    object = parse(out);
    CHECK_INT(spm_json_length(list(object, "results")), 1);
    CHECK_INT(check_groups(spm_json_get(get(spm_json_at(list(object, "results"), 0), "splits"), "test"), 0), 18);
}

static void check_localize_row(const spm_json_value *row, int64_t group, int64_t top, int with_controls)
{
    const spm_json_value *controls = list(row, "controls");
    int64_t i;
    CHECK_INT(whole(row, "group"), group);
    CHECK_INT(whole(row, "top"), top);
    CHECK_STR(string(row, "modify"), "zero-unit");
    CHECK(is_null(row, "std"));
    CHECK_INT(whole(row, "repeat"), 0);
    check_splits(get(row, "splits"), 0);
    CHECK_INT(spm_json_length(controls), with_controls ? 2 * N_GROUPS : 0);
    for (i = 0; i < spm_json_length(controls); i++) {
        const spm_json_value *control = spm_json_at(controls, i);
        double p = real(control, "p_value");
        CHECK_STR(string(control, "split"), i < N_GROUPS ? "train" : "test");
        CHECK_INT(whole(control, "group"), i % N_GROUPS);
        CHECK_INT(whole(control, "n"), 2);
        CHECK(fabs(real(control, "mean_drop")) <= 1.0);
        CHECK_NEAR(3.0 * p, floor(3.0 * p + 0.5), 1e-6); /* (1 + a count) / (2 + 1) */
        CHECK(p > 0.3 && p <= 1.0);
    }
}

static void test_localize(void)
{
    const spm_json_value *object, *rankings, *results;
    int64_t i, u;
    RUNS(0, "localize " MODEL " --top 1,2 --controls 2 --groups 1,2 --json localize.json");
    CHECK(strstr(out, "conv1.weight") || strstr(out, ".weight["));
    CHECK(strstr(out, "baseline") && strstr(out, "selected on split train"));
    object = parse_file("localize.json");
    CHECK_STR(string(object, "command"), "localize");
    CHECK_STR(string(object, "criterion"), "gradient");
    CHECK_STR(string(object, "unit"), "channel");
    CHECK_STR(string(object, "profile"), "sound");
    CHECK_STR(string(object, "select_split"), "train");
    CHECK_STR(string(object, "selected_on"), "train");
    check_splits(get(object, "baseline"), 0);
    rankings = list(object, "rankings");
    CHECK_INT(spm_json_length(rankings), 2);
    for (i = 0; i < 2; i++) {
        const spm_json_value *ranking = spm_json_at(rankings, i), *units = list(ranking, "units");
        CHECK_INT(whole(ranking, "group"), i + 1);
        CHECK_INT(whole(ranking, "samples"), 2);
        CHECK_INT(spm_json_length(units), 2);
        for (u = 0; u < spm_json_length(units); u++) {
            CHECK(strstr(string(spm_json_at(units, u), "parameter"), ".weight") != NULL);
            CHECK(whole(spm_json_at(units, u), "channel") >= 0);
            CHECK(real(spm_json_at(units, u), "score") > 0.0);
        }
        CHECK(real(spm_json_at(units, 0), "score") >= real(spm_json_at(units, 1), "score"));
    }
    results = list(object, "results");
    CHECK_INT(spm_json_length(results), 4);
    for (i = 0; i < spm_json_length(results); i++) check_localize_row(spm_json_at(results, i), 1 + i / 2, 1 + i % 2, i % 2 == 1);
}

static void test_localize_more(void)
{
    const spm_json_value *object, *results, *row;
    int64_t i;
    RUNS(0, "localize --criterion magnitude --modify noise --std .1,.5 --repeats 2 --top 2 --controls 0 " MODEL " --json -");
    object = parse(out);
    CHECK_STR(string(object, "criterion"), "magnitude");
    CHECK_INT(spm_json_length(list(object, "rankings")), 1);
    CHECK(is_null(spm_json_at(list(object, "rankings"), 0), "group"));
    results = list(object, "results");
    CHECK_INT(spm_json_length(results), 6); /* two deviations, two repeats and their mean each */
    for (i = 0; i < spm_json_length(results); i++) {
        row = spm_json_at(results, i);
        CHECK(is_null(row, "group"));
        CHECK_STR(string(row, "modify"), "noise");
        CHECK_NEAR(real(row, "std"), i < 3 ? 0.1 : 0.5, 1e-9);
        if (i % 3 == 2) CHECK_STR(string(row, "repeat"), "mean");
        else CHECK_INT(whole(row, "repeat"), i % 3);
        check_splits(get(row, "splits"), i % 3 == 2);
        CHECK_INT(spm_json_length(list(row, "controls")), 0);
    }
    RUNS(0, "localize --modify reinit --repeats 1 --top 1 --controls 1 --groups 1 " MODEL " --json -");
    RUNS(0, "localize --modify rewind --rewind run/best.safetensors --top 1 --controls 1 --groups 1 " MODEL " --json -");
    RUNS(0, "localize --modify layer-rewind --rewind run/last.safetensors --top 1 --controls 0 --groups 1 " MODEL " --json -");
    object = parse(out);
    results = spm_json_get(get(object, "baseline"), "test");
    row = spm_json_get(get(spm_json_at(list(object, "results"), 0), "splits"), "test");
    for (i = 0; i < N_GROUPS; i++) CHECK_NEAR(real(spm_json_at(results, i), "loss"), real(spm_json_at(row, i), "loss"), 1e-7); /* to itself */
    RUNS(0, "localize --criterion random --modify zero --top 1 --controls 0 --select-split val --report-splits test " MODEL " --json -");
    object = parse(out);
    CHECK_STR(string(object, "select_split"), "val");
    CHECK_INT(spm_json_length(get(object, "baseline")), 1);
    RUNS(0, "localize --select-split test --allow-same-split --top 1 --controls 0 --groups 0 " MODEL " --json -");
    CHECK_STR(string(parse(out), "selected_on"), "test");
    FAILS(1, "group 9", "localize --groups 9 " MODEL);
    FAILS(1, "1000000", "localize --groups 1 --top 1000000 " MODEL);
}

/* Criteria and units of every kind, the exhaustive scan, single weights, quirks; and what is wrong with them. */
static void test_localize_kinds(void)
{
    const spm_json_value *object, *row;
    RUNS(0, "localize --criterion conductance --steps 4 --groups 1 --top 1 --controls 0 " MODEL " --json -");
    CHECK(get(spm_json_at(list(parse(out), "rankings"), 0), "completeness") != NULL);
    RUNS(0, "localize --unit weight --criterion magnitude --fraction 0,0.1,1 --order smallest --controls 0 " MODEL " --json -");
    object = parse(out);
    CHECK_INT(spm_json_length(list(object, "results")), 3);
    row = spm_json_at(list(object, "results"), 0);
    CHECK_INT(whole(row, "changed"), 0); /* k = 0 changes nothing */
    CHECK_STR(string(row, "modify"), "zero");
    RUNS(0, "localize --criterion exhaustive --groups 1 --top 1 --controls 0 " MODEL " --json -");
    CHECK(spm_json_length(list(get(parse(out), "scan"), "units")) > 0);
    RUNS(0, "localize --criterion exhaustive --groups 1 --top 1 --controls 0 " MODEL);
    CHECK(strstr(out, "spurious-memory index") != NULL);
    RUNS(0, "localize --groups 1 --top 1 --quirks " MODEL " --json -");
    CHECK_INT(spm_json_length(list(parse(out), "quirks")), 7);
    FAILS(2, "--quirk Q12=on", "localize --quirk Q12=on " MODEL);
    FAILS(2, "--fraction 2", "localize --unit weight --fraction 2 " MODEL);
    FAILS(2, "--dropout-p", "localize --unit weight --dropout-p 1.5 " MODEL);
    FAILS(1, "attention heads", "localize --unit head " MODEL);
    FAILS(1, "single weights", "localize --unit weight --criterion activation " MODEL);
    FAILS(2, "exhaustive", "train --criterion exhaustive --data birds --arch resnet18 --out never");
}

/* The grid rewinds by 5 and by 10 epochs; where one of the two checkpoints is missing, by the other. */
static void test_grid_rewinds(void)
{
    static const char folder[] = "grid/";
    spm_arch arch = SPM_ZERO;
    spm_checkpoint_info info = SPM_ZERO;
    spm_error why = SPM_ZERO;
    spm_model *model;
    const spm_json_value *results;
    int64_t i;
    int epoch, rewinds = 0;
    arch.height = arch.width_px = 32;
    arch.classes = 2;
    CHECK(spm_arch_parse(ctx, "resnet20:width=2", &arch, &why) == SPM_OK);
    CHECK(spm_directory_create(ctx, folder, NULL) == SPM_OK);
    info.arch = arch;
    info.transform = spm_transform_make(32, 32);
    for (epoch = 2; epoch <= 12; epoch += 10) { /* epoch-007 is not there */
        char path[64];
        model = spm_model_build(ctx, &arch, (uint64_t)epoch, &why);
        CHECK_STR(why.text, "");
        info.epoch = epoch;
        snprintf(path, sizeof path, "%sepoch-%03d.safetensors", folder, epoch);
        CHECK(spm_checkpoint_save(model, path, &info, &why) == SPM_OK);
        spm_model_destroy(model);
    }
    RUNS(0, "localize --grid paper --repeats 1 --controls 0 --data birds --checkpoint grid/epoch-012.safetensors --json -");
    SAYS("no checkpoint 5 epochs earlier");
    CHECK(strstr(err, "no checkpoint 10 epochs earlier") == NULL);
    results = list(parse(out), "results");
    for (i = 0; i < spm_json_length(results); i++) {
        const spm_json_value *row = spm_json_at(results, i);
        if (strcmp(string(row, "modify"), "rewind") != 0) continue;
        CHECK_STR(string(row, "rewind"), "grid/epoch-002.safetensors");
        rewinds++;
    }
    CHECK(rewinds > 0);
}

static void test_ledger(void)
{
    const spm_json_value *object;
    char *text;
    RUNS(0, "ledger --max-flips 4 --out ledger.csv --gradients gradients.csv " MODEL " --json -");
    object = parse(out);
    CHECK_STR(string(object, "command"), "ledger");
    CHECK_STR(string(object, "split"), "train");
    CHECK_INT(spm_json_length(list(object, "groups")), N_GROUPS);
    text = slurp("ledger.csv", NULL);
    CHECK(text && strncmp(text, "id,file,y,confounder,group,minority,predicted,correct,", 54) == 0);
    free(text);
    text = slurp("gradients.csv", NULL);
    CHECK(text && strncmp(text, "epoch,parameter,block,group,count,norm,share,cosine\n", 52) == 0);
    free(text);
    RUNS(0, "ledger --max-flips 0 " MODEL);
    CHECK(strncmp(out, "id,file,", 8) == 0 && strstr(out, ",network_influence\n0,") && strstr(out, ",\n1,"));
    RUNS(0, "ledger --max-flips 0 --influence network " MODEL);
    CHECK(strncmp(out, "id,file,", 8) == 0 && !strstr(out, ",\n"));
    FAILS(2, "--out", "ledger --json - " MODEL);
    FAILS(1, "nowhere", "ledger --history nowhere/history.csv " MODEL);
}

static void test_intervene(void)
{
    const spm_json_value *object;
    char *text;
    RUNS(0, "intervene " MODEL " --out fixed --epochs 2 --batch 32 --lr 1e-4 --log-steps fixed_steps.jsonl --json fixed.json --quiet");
    object = parse_file("fixed.json");
    CHECK_STR(string(object, "command"), "intervene");
    CHECK_INT(whole(object, "epochs"), 2);
    CHECK_INT(whole(object, "steps"), 4);
    CHECK(exists("fixed/best.safetensors") && exists("fixed/last.safetensors") && exists("fixed/metrics.jsonl"));
    object = parse_file("fixed/config.json");
    CHECK_STR(string(object, "method"), "intervene");
    CHECK_STR(string(object, "arch"), "resnet18:width=8");
    CHECK_STR(string(object, "mask"), "critical");
    CHECK_STR(string(object, "contrast"), "features");
    CHECK_STR(string(object, "bn"), "separate");
    CHECK_NEAR(real(object, "tau"), 0.5, 0.0);
    text = slurp("fixed_steps.jsonl", NULL);
    if (strchr(text, '\n')) *strchr(text, '\n') = 0;
    object = parse(text);
    CHECK_INT(whole(object, "step"), 1);
    CHECK(real(object, "ntxent") > 0.0 && real(object, "ce") > 0.0);
    CHECK_NEAR(real(object, "loss"), real(object, "ce") + real(object, "ntxent"), 1e-5);
    free(text);
    /* the same through train, and an ablation */
    RUNS(0, "train --method intervene " MODEL " --out fixed2 --epochs 2 --batch 32 --lr 1e-4 --quiet");
    CHECK(test_same_files("fixed/last.safetensors", "fixed2/last.safetensors"));
    RUNS(0, "intervene " MODEL " --out fixed3 --epochs 1 --batch 64 --mask random --contrast outputs --bn shared --group-labels off --lambda .2 --ce-pruned on --quiet");
    RUNS(0, "eval --data birds --checkpoint fixed/best.safetensors --json -");
    CHECK_INT(check_groups(list(parse(out), "groups"), 0), 24);
}

/* A prediction's numbers; `softmax`: the probabilities come from the logits in column order, reversed. */
static void check_prediction(const char *line, const char *file, int reversed)
{
    const spm_json_value *object = parse(line), *logits = list(object, "logits"), *probabilities = list(object, "probabilities");
    double a, b, p0, p1;
    int64_t class_index = whole(object, "class");
    CHECK_STR(string(object, "file"), file);
    CHECK_STR(string(object, "class_name"), class_index ? "waterbird" : "landbird");
    CHECK_INT(spm_json_length(logits), 2);
    CHECK_INT(spm_json_length(probabilities), 2);
    a = spm_json_as_number(spm_json_at(logits, reversed), 0.0);
    b = spm_json_as_number(spm_json_at(logits, !reversed), 0.0);
    p0 = spm_json_as_number(spm_json_at(probabilities, 0), -1.0);
    p1 = spm_json_as_number(spm_json_at(probabilities, 1), -1.0);
    CHECK_NEAR(p0 + p1, 1.0, 1e-6);
    CHECK_NEAR(p1, 1.0 / (1.0 + exp(a - b)), 1e-6);
    CHECK_INT(class_index, b > a);
}

/* Two lines, one per file, in the order given, and nothing else. */
static void check_two_lines(int reversed)
{
    char *second = strchr(out, '\n');
    CHECK(second && strchr(second + 1, '\n') == out + strlen(out) - 1);
    if (!second) return;
    *second++ = 0;
    check_prediction(out, "birds/images/test/00003.jpg", reversed);
    check_prediction(second, BIRD, reversed);
}

static void test_predict(void)
{
    const spm_json_value *object;
    RUNS(0, "predict birds/images/test/00003.jpg --checkpoint run/last.safetensors -- " BIRD);
    CHECK_STR(err, "");
    check_two_lines(0);
    RUNS(0, "predict --label-order reversed --checkpoint=run/last.safetensors birds/images/test/00003.jpg " BIRD);
    check_two_lines(1);
    RUNS(0, "predict --checkpoint run/last.safetensors --json - birds/images/test/00003.jpg " BIRD);
    RUNS(0, "predict --gradcam maps --checkpoint run/last.safetensors birds/images/test/00003.jpg");
    {
        spm_image map = SPM_ZERO;
        CHECK(spm_image_load(ctx, "maps/00003.png", NULL, &map, NULL) == SPM_OK);
        CHECK(map.width >= 256 && map.height >= 256);
        spm_image_free(ctx, &map);
    }
    object = spm_json_at(list(parse_file("maps/index.json"), "pictures"), 0);
    CHECK_STR(string(object, "file"), "00003.png");
    CHECK_STR(string(object, "source"), "birds/images/test/00003.jpg");
    CHECK(real(object, "probability") >= 0.5);
    RUNS(0, "predict --gradcam maps --map integrated-gradients --map-class 1 --checkpoint run/last.safetensors birds/images/test/00003.jpg " BIRD);
    object = spm_json_at(list(parse_file("maps/index.json"), "pictures"), 1);
    CHECK_STR(string(object, "map"), "integrated-gradients");
    CHECK_INT(whole(object, "map_height"), 32);
    FAILS(1, "Grad-CAM", "predict --gradcam maps --map rollout --checkpoint run/last.safetensors " BIRD);
    RUNS(0, "predict --checkpoint run/last.safetensors --json - birds/images/test/00003.jpg " BIRD);
    object = parse(out);
    CHECK_STR(string(object, "command"), "predict");
    CHECK_INT(spm_json_length(list(object, "predictions")), 2);
    CHECK_STR(string(spm_json_at(list(object, "predictions"), 1), "file"), BIRD);
    CHECK(symlink("birds/images/test/00000.jpg", "--odd.jpg") == 0);
    RUNS(0, "predict --checkpoint run/last.safetensors -- --odd.jpg");
    FAILS(2, "--odd", "predict --checkpoint run/last.safetensors --odd.jpg");
    FAILS(1, BIRD, "predict --checkpoint run/last.safetensors --resize none " BIRD);
}

static void test_report_page(void)
{
    char *text;
    RUNS(0, "report run fixed -o page.html");
    text = slurp("page.html", NULL);
    CHECK(strstr(text, "<html") && strstr(text, "</html>") && strstr(text, "<svg"));
    CHECK(!strstr(text, "<script src") && !strstr(text, "<link") && !strstr(text, "src=\"http") && !strstr(text, "href=\"http"));
    free(text);
    RUNS(0, "report run --output=page2.html --json -");
    CHECK_STR(string(parse(out), "command"), "report");
    CHECK(exists("page2.html"));
}

static void test_inspect(void)
{
    const spm_json_value *object, *splits, *tensors;
    int64_t i, values = 0;
    RUNS(0, "inspect run/last.safetensors");
    CHECK(strstr(out, "resnet18:width=8") && strstr(out, "conv1.weight") && strstr(out, "[8,3,7,7]"));
    RUNS(0, "inspect --json - run/last.safetensors");
    object = parse(out);
    CHECK_STR(string(object, "command"), "inspect");
    CHECK_STR(string(object, "arch"), "resnet18:width=8");
    tensors = list(object, "tensors");
    for (i = 0; i < spm_json_length(tensors); i++) {
        const spm_json_value *shape = list(spm_json_at(tensors, i), "shape");
        int64_t d, n = 1;
        CHECK(*string(spm_json_at(tensors, i), "name") && *string(spm_json_at(tensors, i), "dtype"));
        for (d = 0; d < spm_json_length(shape); d++) n *= spm_json_as_int(spm_json_at(shape, d), 0);
        values += n;
    }
    CHECK_INT(whole(object, "values"), values);
    RUNS(0, "inspect " BIRD);
    CHECK(strstr(out, "64 wide") != NULL);
    RUNS(0, "inspect " BIRD " --json -");
    CHECK_INT(whole(parse(out), "width"), 64);
    CHECK_INT(whole(root, "height"), 64);
    RUNS(0, "inspect birds --quiet");
    CHECK(strstr(out, "landbird on water") != NULL);
    RUNS(0, "inspect birds --json -");
    object = parse(out);
    CHECK_STR(string(object, "command"), "inspect");
    CHECK_INT(spm_json_length(list(object, "broken")), 0);
    splits = list(object, "splits");
    CHECK_INT(spm_json_length(splits), 3);
    for (i = 0; i < spm_json_length(splits); i++) {
        const spm_json_value *groups = list(spm_json_at(splits, i), "groups");
        int64_t g, sum = 0;
        CHECK_STR(string(spm_json_at(splits, i), "name"), i == 0 ? "train" : i == 1 ? "val" : "test");
        CHECK_INT(spm_json_length(groups), N_GROUPS);
        for (g = 0; g < spm_json_length(groups); g++) {
            CHECK_INT(whole(spm_json_at(groups, g), "id"), g);
            CHECK_INT(whole(spm_json_at(groups, g), "y"), g / 2);
            CHECK_INT(whole(spm_json_at(groups, g), "confounder"), g % 2);
            CHECK(*string(spm_json_at(groups, g), "name"));
            CHECK(is_null(spm_json_at(groups, g), "accuracy"));
            sum += whole(spm_json_at(groups, g), "count");
        }
        CHECK_INT(whole(spm_json_at(splits, i), "count"), sum);
    }
    RUNS(0, "inspect --arch resnet18 --json -");
    CHECK_INT(whole(parse(out), "values"), 11177538); /* torchvision's resnet18 with a head of 2 */
    CHECK_INT(whole(root, "parameters"), 11177538);
    CHECK_NEAR(spm_json_as_number(spm_json_get(root, "flops"), 0) / 3.64e9, 1, .02);
    CHECK(spm_json_as_number(spm_json_get(root, "run_bytes_training_per_picture"), 0)
          > spm_json_as_number(spm_json_get(root, "run_bytes_per_picture"), 1e18));
    object = spm_json_at(list(root, "layers"), 0);
    CHECK_STR(string(object, "name"), "conv1");
    CHECK_STR(string(object, "operation"), "conv2d");
    CHECK_INT(whole(object, "parameters"), 9408);
    CHECK_INT(spm_json_as_int(spm_json_at(list(object, "shape"), 3), 0), 64);
    RUNS(0, "inspect run/last.safetensors");
    CHECK(strstr(out, "layer4.1.conv2") && strstr(out, "GFLOP forward") && strstr(out, "activations"));
}

static void same_pixels(const spm_image *a, const char *path)
{
    spm_image b = SPM_ZERO;
    CHECK(spm_image_load(ctx, path, NULL, &b, NULL) == SPM_OK);
    CHECK(a->width == b.width && a->height == b.height);
    if (b.pixels && a->pixels && a->width == b.width && a->height == b.height) {
        CHECK_INT(memcmp(a->pixels, b.pixels, (size_t)(a->width * a->height * 3)), 0);
    }
    spm_image_free(ctx, &b);
}

static void test_decode(void)
{
    spm_image image = SPM_ZERO, ready = SPM_ZERO;
    spm_transform transform = spm_transform_make(24, 32);
    const spm_json_value *pictures;
    CHECK(spm_image_load(ctx, BIRD, NULL, &image, NULL) == SPM_OK);
    RUNS(0, "decode " BIRD " birds/images/test/00001.jpg --out-dir decoded/deep");
    same_pixels(&image, "decoded/deep/00000.png");
    CHECK(exists("decoded/deep/00001.png"));
    RUNS(0, "decode --as=ppm --out-dir decoded " BIRD " --json -");
    pictures = list(parse(out), "pictures");
    CHECK_STR(string(spm_json_at(pictures, 0), "output"), "decoded/00000.ppm");
    CHECK_INT(whole(spm_json_at(pictures, 0), "width"), 64);
    same_pixels(&image, "decoded/00000.ppm");
    CHECK(spm_transform_image(ctx, &transform, &image, &ready, NULL) == SPM_OK);
    RUNS(0, "decode --out-dir decoded --image-size 24x32 " BIRD);
    CHECK(ready.height == 24 && ready.width == 32);
    same_pixels(&ready, "decoded/00000.png");
    spm_image_free(ctx, &ready);
    transform.resize = SPM_RESIZE_EXACT;
    CHECK(spm_transform_image(ctx, &transform, &image, &ready, NULL) == SPM_OK);
    RUNS(0, "decode --out-dir decoded --image-size 24x32 --resize exact " BIRD);
    same_pixels(&ready, "decoded/00000.png");
    spm_image_free(ctx, &ready);
    spm_image_free(ctx, &image);
    RUNS(0, "decode --out-dir decoded --scale 2 --as jpg --quality 95 --chroma 444 " BIRD " --json -");
    pictures = list(parse(out), "pictures");
    CHECK_STR(string(spm_json_at(pictures, 0), "output"), "decoded/00000.jpg");
    CHECK_INT(whole(spm_json_at(pictures, 0), "width"), 32);
    RUNS(0, "decode --out-dir decoded --as pgm " BIRD);
    CHECK(exists("decoded/00000.pgm"));
    FAILS(2, "--quality", "decode --out-dir decoded --as jpg --quality 101 " BIRD);
    FAILS(2, "--scale", "decode --out-dir decoded --scale 3 " BIRD);
    FAILS(2, "--jitter", "train --data birds --out never --jitter .4,.4,.4");
    FAILS(2, "--jitter", "train --data birds --out never --jitter .4,.4,.4,.6");
    FAILS(2, "--rotate", "train --data birds --out never --rotate -1");
    FAILS(2, "decoded2/00000.png", "decode --out-dir decoded2 " BIRD " birds/images/val/00000.jpg");
    CHECK(!exists("decoded2"));
    FAILS(1, BIRD, "decode --out-dir decoded --image-size 32 --resize none " BIRD);
    FAILS(1, "notes.txt", "decode --out-dir notes.txt " BIRD);
}

static void logits_of(double *values)
{
    const spm_json_value *logits = list(parse(out), "logits");
    values[0] = spm_json_as_number(spm_json_at(logits, 0), 1e9);
    values[1] = spm_json_as_number(spm_json_at(logits, 1), -1e9);
}

static void test_convert(void)
{
    double native[2], torch[2], back[2];
    RUNS(0, "convert run/last.safetensors copy.pth");
    RUNS(0, "convert copy.pth copy.safetensors --json -");
    CHECK_STR(string(parse(out), "command"), "convert");
    CHECK_STR(string(root, "output"), "copy.safetensors");
    RUNS(0, "inspect copy.pth");
    CHECK(strstr(out, "torch") && strstr(out, "conv1.weight"));
    RUNS(0, "predict --checkpoint run/last.safetensors " BIRD);
    logits_of(native);
    RUNS(0, "predict --checkpoint copy.pth " NET " " BIRD);
    logits_of(torch);
    RUNS(0, "predict --checkpoint copy.safetensors " NET " " BIRD);
    logits_of(back);
    CHECK(native[0] == torch[0] && native[1] == torch[1]);
    CHECK(native[0] == back[0] && native[1] == back[1]);
    RUNS(0, "convert run/last.safetensors again.safetensors"); /* keeps what the file says about itself */
    RUNS(0, "eval --data birds --checkpoint again.safetensors --json again.json");
    CHECK(test_same_files("again.json", "eval.json"));
    FAILS(1, "copy.pth", "predict --checkpoint copy.pth " BIRD); /* a plain state dict: no architecture */
    SAYS("--arch");
    /* a ViT keeps the names that it was read under, through training too */
    RUNS(0, "train --data birds --arch vit:patch=16,dim=8,depth=1,heads=2,names=torchvision --image-size 32 --resize exact --epochs 1 --max-steps 1 --out tv");
    RUNS(0, "convert tv/last.safetensors tv.pth");
    RUNS(0, "train --data birds --checkpoint tv.pth --arch vit:patch=16,dim=8,depth=1,heads=2 --image-size 32 --resize exact --epochs 1 --max-steps 1 --out tv2");
    RUNS(0, "inspect tv2/last.safetensors");
    CHECK(strstr(out, "class_token") && strstr(out, "names=torchvision"));
    RUNS(0, "convert tv2/last.safetensors timm.pth --names timm");
    RUNS(0, "inspect timm.pth --arch vit:patch=16,dim=8,depth=1,heads=2 --image-size 32");
    CHECK(strstr(out, "blocks.0.attn.qkv.weight") && strstr(out, "every parameter of vit") && strstr(out, "32 x 32"));
    FAILS(2, "torchvision", "convert a.pth b.pth --names keras");
}

static void test_bench(void)
{
    const spm_json_value *object, *results;
    int64_t i;
    double peak;
    RUNS(0, "bench --only gemm --threads 1 --json -");
    object = parse(out);
    CHECK_STR(string(object, "command"), "bench");
    peak = real(object, "peak_gflops");
    CHECK(peak > 0.0 && *string(object, "isa"));
    CHECK(real(object, "copy_gbytes") > 0.0);
    CHECK_INT(whole(object, "threads"), 1);
    results = list(object, "results");
    CHECK(spm_json_length(results) >= 1);
    for (i = 0; i < spm_json_length(results); i++) {
        const spm_json_value *row = spm_json_at(results, i);
        CHECK(strstr(string(row, "name"), "gemm") != NULL);
        CHECK(whole(row, "batch") >= 1 && whole(row, "peak_bytes") > 0);
        CHECK(is_null(row, "images_per_second"));
        CHECK_NEAR(real(row, "share_of_peak"), real(row, "gflops") / real(row, "peak_gflops"), 1e-6);
    }
    RUNS(0, "bench --only train:resnet18:width=8 --batch 4 --image-size 32 --threads 1 --json bench.json");
    results = list(parse_file("bench.json"), "results");
    CHECK_INT(spm_json_length(results), 1);
    CHECK_INT(whole(spm_json_at(results, 0), "batch"), 4);
    CHECK(real(spm_json_at(results, 0), "images_per_second") > 0.0);
    RUNS(0, "bench --only intervene:resnet18:width=8 --batch 4 --image-size 32 --threads 1 --json bench.json");
    CHECK_STR(string(spm_json_at(list(parse_file("bench.json"), "results"), 0), "name"), "intervene:resnet18:width=8");
    RUNS(0, "bench --only scan:resnet18:width=8 --batch 4 --image-size 32 --threads 1 --json bench.json");
    CHECK(real(spm_json_at(list(parse_file("bench.json"), "results"), 0), "times_faster") > 0.0);
    RUNS(0, "bench --only start:resnet18:width=8 --image-size 32 --threads 1 --json bench.json");
    CHECK(real(spm_json_at(list(parse_file("bench.json"), "results"), 0), "seconds") > 0.0);
    RUNS(0, "bench --only decode --threads 1 --json - " BIRD);
    CHECK(real(spm_json_at(list(parse(out), "results"), 0), "images_per_second") > 0.0);
}

/* ---- stopping and going on ---- */

static void nap(void)
{
    struct timespec time = { 0, 5000000 };
    nanosleep(&time, NULL);
}

#define LONG "train --data birds " NET " --epochs 12 --batch 16 --augment light --seed 3 --quiet --threads 1"

static void test_interrupt(void)
{
    const char *arguments[] = { tool, "train", "--data", "birds", "--arch", "resnet18:width=8", "--image-size", "32", "--resize", "exact", "--epochs", "12",
                                "--batch", "16", "--augment", "light", "--seed", "3", "--quiet", "--threads", "1", "--log-steps", "cut_steps.jsonl", "--out", "cut", NULL };
    int status = 0, i;
    pid_t child;
    RUNS(0, LONG " --out whole --log-steps whole_steps.jsonl");
    fflush(stdout);
    child = fork();
    if (child == 0) {
        int log = open("cut.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (log >= 0) {
            dup2(log, 1);
            dup2(log, 2);
        }
        execv(tool, (char *const *)arguments);
        _exit(99);
    }
    CHECK(child > 0);
    for (i = 0; i < 6000 && !exists("cut/metrics.jsonl"); i++) nap(); /* the first epoch is over */
    CHECK_INT(kill(child, SIGINT), 0);
    CHECK_INT(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0); /* stopped as asked, resumable */
    CHECK(exists("cut/best.safetensors") && exists("cut/last.safetensors") && exists("cut/state.safetensors"));
    {
        char *said = slurp("cut.txt", NULL);
        CHECK_MSG(strstr(said, "--resume") != NULL, said);
        free(said);
    }
    CHECK(!test_same_files("cut/last.safetensors", "whole/last.safetensors"));
    RUNS(0, "eval --data birds --checkpoint cut/last.safetensors --json -");
    RUNS(0, LONG " --out cut --log-steps cut_steps.jsonl --resume");
    CHECK(test_same_files("cut/last.safetensors", "whole/last.safetensors"));
    CHECK(test_same_files("cut/best.safetensors", "whole/best.safetensors"));
    CHECK(test_same_files("cut_steps.jsonl", "whole_steps.jsonl"));
}

static void test_max_steps(void)
{
    const spm_json_value *object;
    char *a, *b, *x, *y;
    int lines = 0;
    FAILS(1, "part", LONG " --out part --resume"); /* nothing to resume */
    RUNS(0, LONG " --out part --max-steps 6 --json -");
    object = parse(out);
    CHECK_INT(whole(object, "steps"), 6);
    CHECK_INT(whole(object, "epochs"), 1);
    CHECK_INT(spm_json_as_int(get(object, "stopped"), 0), 1);
    CHECK(exists("part/best.safetensors") && exists("part/last.safetensors"));
    FAILS(1, "seed", LONG " --out part --resume --seed 4");
    RUNS(0, LONG " --out part --resume");
    CHECK(strstr(out, "12 epochs") != NULL);
    CHECK(test_same_files("part/last.safetensors", "whole/last.safetensors"));
    CHECK(test_same_files("part/best.safetensors", "whole/best.safetensors"));
    /* the same metrics, up to the seconds */
    a = x = slurp("part/metrics.jsonl", NULL);
    b = y = slurp("whole/metrics.jsonl", NULL);
    while (*x && *y) {
        char *end = strstr(x, "\"seconds\""), *other = strstr(y, "\"seconds\"");
        CHECK(end && other && end - x == other - y && memcmp(x, y, (size_t)(end - x)) == 0);
        if (!end || !other || !strchr(end, '\n') || !strchr(other, '\n')) break;
        x = strchr(end, '\n') + 1;
        y = strchr(other, '\n') + 1;
        lines++;
    }
    CHECK_INT(lines, 36);
    CHECK(!*x && !*y);
    free(a);
    free(b);
    RUNS(0, "train --data birds " NET " --epochs 1 --batch 16 --max-steps 1 --out first --quiet"); /* before any epoch has ended */
    CHECK(exists("first/best.safetensors") && exists("first/last.safetensors"));
}

static void test_threads(void)
{
    RUNS(0, "eval " MODEL " --threads 1 --json eval1.json");
    RUNS(0, "eval " MODEL " --threads 2 --workers 3 --json eval2.json");
    CHECK(test_same_files("eval1.json", "eval2.json"));
    RUNS(0, "localize " MODEL " --top 1,2 --controls 2 --groups 1,2 --threads 1 --json local1.json");
    RUNS(0, "localize " MODEL " --top 1,2 --controls 2 --groups 1,2 --threads 2 --json local2.json");
    CHECK(test_same_files("local1.json", "local2.json"));
    CHECK(test_same_files("local1.json", "localize.json"));
    RUNS(0, "train --data birds --out run2 " NET " --epochs 2 --batch 16 --seed=7 --threads 1 --quiet --json -");
    CHECK(test_same_files("run/last.safetensors", "run2/last.safetensors"));
    RUNS(0, "train --data birds --out run3 " NET " --epochs 2 --batch 16 --seed=7 --threads 2 --workers 1 --segments --quiet --json -");
    CHECK(test_same_files("run/last.safetensors", "run3/last.safetensors"));
}

/* ---- what can go wrong ---- */

static void test_full_disk(void)
{
    if (!exists("/dev/full")) SKIP("there is no /dev/full");
    RUNS(1, "eval " MODEL " --json /dev/full");
    SAYS("/dev/full");
    FAILS(1, "stdout", "eval " MODEL " --json - @>/dev/full");
    FAILS(1, "stdout", "eval " MODEL " @>/dev/full");
    FAILS(1, "stdout", "predict --checkpoint run/last.safetensors " BIRD " @>/dev/full");
    FAILS(1, "stdout", "inspect run/last.safetensors @>/dev/full");
    FAILS(1, "/dev/full", "report run -o /dev/full");
    RUNS(1, "train --data birds --out full " NET " --epochs 1 --log-steps /dev/full --quiet");
    SAYS("/dev/full");
    CHECK(exists("/dev/full"));
}

static void test_unwritable(void)
{
    put("wall", "a file in the way\n");
    FAILS(1, "wall", "train --data birds --out wall " NET " --epochs 1 --quiet");
    FAILS(1, "wall/run", "train --data birds --out wall/run " NET " --epochs 1 --quiet");
    FAILS(1, "wall/run", "intervene " MODEL " --out wall/run --epochs 1 --quiet");
    FAILS(1, "wall", "decode --out-dir wall/d " BIRD);
    FAILS(1, "wall/page.html", "report run -o wall/page.html");
    FAILS(1, "wall/x.safetensors", "convert run/last.safetensors wall/x.safetensors");
    RUNS(1, "eval " MODEL " --json wall/eval.json");
    SAYS("wall/eval.json");
    RUNS(1, "train --data birds --out logless " NET " --epochs 1 --log-steps wall/steps.jsonl --quiet");
    SAYS("wall/steps.jsonl");
}

/* A copy of the birds' metadata in `folder`, with the line of the test picture 00000 replaced. */
static void spoil(const char *folder, const char *row)
{
    char path[200], *text = slurp("birds/metadata.csv", NULL), *at = strstr(text, "images/test/00000.jpg"), *spoilt = (char *)malloc(strlen(text) + 400);
    CHECK(at && spoilt);
    if (at && spoilt) {
        char *end = strchr(at, '\n');
        while (at > text && at[-1] != '\n') at--;
        sprintf(spoilt, "%.*s%s%s", (int)(at - text), text, row, end);
        CHECK_INT(mkdir(folder, 0777), 0);
        snprintf(path, sizeof path, "%s/images", folder);
        CHECK_INT(symlink("../birds/images", path), 0);
        snprintf(path, sizeof path, "%s/metadata.csv", folder);
        put(path, spoilt);
    }
    free(spoilt);
    free(text);
}

static void test_bad_pictures(void)
{
    const spm_json_value *object;
    size_t size;
    char *jpeg = slurp(BIRD, &size);
    FILE *file;
    int i;
    spoil("missing", "1,gone.jpg,0,2,0,land/bamboo");
    spoil("broken", "1,half.jpg,0,2,0,land/bamboo");
    file = fopen("broken/half.jpg", "wb");
    CHECK(file && fwrite(jpeg, 1, size / 2, file) == size / 2);
    if (file) fclose(file);
    free(jpeg);
    for (i = 0; i < 2; i++) {
        const char *data = i ? "broken" : "missing", *name = i ? "half.jpg" : "gone.jpg";
        FAILS(1, name, "eval --data %s --checkpoint run/last.safetensors --quiet", data);
        FAILS(1, name, "eval --data %s --checkpoint run/last.safetensors --on-bad-image fail --json - --quiet", data);
        RUNS(0, "eval --data %s --checkpoint run/last.safetensors --on-bad-image skip --json - --quiet", data);
        SAYS(name);
        object = parse(out);
        CHECK_INT(whole(object, "count"), 23);
        CHECK_INT(check_groups(list(object, "groups"), 0), 23);
        RUNS(0, "train --data %s --out skip%d " NET " --epochs 1 --on-bad-image skip --quiet", data, i);
        SAYS(name);
        RUNS(0, "inspect %s --json -", data);
        object = list(parse(out), "broken");
        CHECK_INT(spm_json_length(object), 1);
        CHECK(strstr(string(spm_json_at(object, 0), "file"), name) && *string(spm_json_at(object, 0), "reason"));
    }
    FAILS(1, "half.jpg", "predict --checkpoint run/last.safetensors broken/half.jpg");
    FAILS(1, "half.jpg", "decode --out-dir halves broken/half.jpg");
    CHECK(!exists("halves/half.png"));
    FAILS(1, "half.jpg", "inspect broken/half.jpg");
    RUNS(1, "predict --checkpoint run/last.safetensors " BIRD " broken/half.jpg"); /* what came before it is there */
    SAYS("half.jpg");
    check_prediction(out, BIRD, 0);
}

static void test_bad_labels(void)
{
    spoil("label", "1,images/test/00000.jpg,-1,2,0,land/bamboo");
    FAILS(1, "metadata.csv", "eval --data label --checkpoint run/last.safetensors --quiet");
    spoil("letter", "1,images/test/00000.jpg,two,2,0,land/bamboo");
    FAILS(1, "metadata.csv", "eval --data letter --checkpoint run/last.safetensors --quiet");
    spoil("third", "1,images/test/00000.jpg,2,2,0,land/bamboo");
    FAILS(1, "3 classes", "eval --data third --checkpoint run/last.safetensors --quiet");
    spoil("split", "1,images/test/00000.jpg,0,9,0,land/bamboo");
    FAILS(1, "metadata.csv", "eval --data split --checkpoint run/last.safetensors --quiet");
    CHECK(mkdir("columns", 0777) == 0 && symlink("../birds/images", "columns/images") == 0);
    put("columns/metadata.csv", "img_id,img_filename,kind,split,place\n1,images/test/00000.jpg,0,0,0\n");
    FAILS(1, "columns", "inspect columns --quiet");
}

static void test_other_architecture(void)
{
    FAILS(1, "conv1.weight", "eval " MODEL " --arch resnet18:width=16");
    SAYS("run/last.safetensors");
    SAYS("[8,3,7,7]");
    SAYS("[16,3,7,7]");
    FAILS(1, "layer1.2.conv1.weight", "eval " MODEL " --arch resnet34:width=8");
    FAILS(1, "fc.weight", "eval " MODEL " --num-classes 5");
    SAYS("[2,64]");
    SAYS("[5,64]");
    RUNS(0, "eval " MODEL " --num-classes 5 --allow-partial --json - --quiet");
    SAYS("head");
    FAILS(1, "conv1.weight", "train " MODEL " --arch resnet18:width=16 --out other --quiet");
    CHECK(!exists("other/config.json"));
}

static void test_official(void)
{
    const spm_json_value *object;
    RUNS(0, "train --profile official --data birds --out paper " NET " --epochs 1 --batch 32 --quiet --json -");
    object = parse_file("paper/config.json");
    CHECK_STR(string(object, "augment"), "paper");
    CHECK_STR(string(object, "schedule"), "plateau");
    CHECK_NEAR(real(object, "lr"), 5e-6, 1e-12);
    CHECK_INT(spm_json_as_int(get(object, "label_reversed"), 0), 1);
    CHECK_INT(spm_json_as_int(get(object, "softmax_head"), 0), 1);
    RUNS(0, "eval --profile official --data birds --checkpoint paper/last.safetensors --json paper1.json");
    RUNS(0, "eval --data birds --checkpoint paper/last.safetensors --json paper2.json"); /* the file says how it is read */
    CHECK(test_same_files("paper1.json", "paper2.json"));
    RUNS(0, "localize --profile official --data birds --checkpoint paper/last.safetensors --groups 1 --top 1 --controls 2 --select-split test --json -");
    object = parse(out);
    CHECK_STR(string(object, "profile"), "official");
    CHECK_STR(string(object, "selected_on"), "test");
    CHECK_STR(string(spm_json_at(list(object, "results"), 0), "modify"), "zero");
    RUNS(0, "intervene --profile official --data birds --checkpoint paper/last.safetensors --out paper_fixed --epochs 1 --log-steps paper.jsonl --quiet");
    object = parse_file("paper_fixed/config.json");
    CHECK_STR(string(object, "profile"), "official");
    CHECK_STR(string(object, "mask"), "official");
    CHECK_STR(string(object, "contrast"), "outputs");
    CHECK_STR(string(object, "bn"), "shared");
    CHECK_INT(whole(object, "batch"), 100);
    CHECK_NEAR(real(object, "lr"), 2e-4, 1e-9);
    CHECK_NEAR(real(object, "lambda"), 0.2, 1e-7);
    object = parse_file("paper.jsonl");
    CHECK_NEAR(real(object, "loss"), 0.2 * real(object, "ce") + real(object, "ntxent"), 1e-5);
    RUNS(0, "intervene --profile official --quirk Q8=off,Q10=off,Q11=off --data birds --checkpoint paper/last.safetensors --out paper_quirks --max-steps 1 --quiet");
    object = parse_file("paper_quirks/config.json");
    CHECK_STR(string(object, "mask"), "critical");
    CHECK_STR(string(object, "contrast"), "features");
    CHECK_STR(string(object, "bn"), "separate");
    RUNS(0, "intervene --profile official --quirk Q9=on --data birds --checkpoint paper/last.safetensors --out paper_q9 --max-steps 1 --quiet");
    object = parse_file("paper_q9/config.json");
    CHECK_STR(string(object, "mask"), "gradient");
    CHECK(spm_json_type_of(get(object, "mask_surest")) == SPM_JSON_BOOL && spm_json_as_int(get(object, "mask_surest"), 0) == 1);
    RUNS(0, "predict --checkpoint paper_fixed/last.safetensors " BIRD);
    check_prediction(out, BIRD, 1);
}

/* ---- main ---- */

int main(void)
{
    static char command[9000];
    const char *build = getenv("SPURMEM_BUILD");
    char base[4000], *found = build && *build ? realpath(build, NULL) : NULL;
    spm_context_desc desc = SPM_ZERO;
    snprintf(base, sizeof base, "%s", found ? found : "");
    free(found);
    snprintf(tool, sizeof tool, "%s/spurmem", base);
    snprintf(drawer, sizeof drawer, "%s/synth_birds", base);
    if (!*base || access(tool, X_OK) != 0 || access(drawer, X_OK) != 0) {
        printf("    skip: SPURMEM_BUILD names no folder with spurmem and synth_birds\n");
        test_skipped = 1;
        return TEST_END;
    }
    out = slurp("/dev/null", NULL);
    err = slurp("/dev/null", NULL);
    snprintf(command, sizeof command, "rm -rf '%s/test_cli' && mkdir -p '%s/test_cli'", base, base);
    if (system(command) != 0) return 1;
    strcat(base, "/test_cli");
    if (chdir(base) != 0) return 1;
    snprintf(command, sizeof command, "'%s' --out birds --train 64 --val 24 --test 24 --quiet >draw.txt 2>&1", drawer);
    if (system(command) != 0) {
        printf("    synth_birds failed, see %s/draw.txt\n", base);
        return 1;
    }
    desc.threads = 1;
    ctx = spm_context_create(&desc);
    if (!ctx) return 1;
    TEST(test_help);
    TEST(test_wrong_lines);
    TEST(test_train);
    if (train_passed) {
        TEST(test_missing_files);
        TEST(test_eval);
        TEST(test_empty_group);
        TEST(test_localize);
        TEST(test_localize_more);
        TEST(test_localize_kinds);
        TEST(test_grid_rewinds);
        TEST(test_ledger);
        TEST(test_intervene);
        TEST(test_predict);
        TEST(test_report_page);
        TEST(test_inspect);
        TEST(test_decode);
        TEST(test_convert);
        TEST(test_bench);
        TEST(test_interrupt);
        TEST(test_max_steps);
        TEST(test_threads);
        TEST(test_full_disk);
        TEST(test_unwritable);
        TEST(test_bad_pictures);
        TEST(test_bad_labels);
        TEST(test_other_architecture);
        TEST(test_official);
    }
    spm_json_free(ctx, root);
    spm_context_destroy(ctx);
    free(out);
    free(err);
    return TEST_END;
}
