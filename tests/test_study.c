/* The study as `make study` runs it, on a handful of drawn birds: every method of the table comes out, and a
 * second call repeats the numbers from the run folders that the first one has left; Ctrl-C at any time changes nothing. */
#define _XOPEN_SOURCE 700
#include "../spurmem.h"
#include "test.h"
#include <stdlib.h>

static char build[3000];

static int run(const char *format)
{
    char command[9000];
    snprintf(command, sizeof command, format, build, build, build, build);
    return system(command);
}

static spm_json_value *read_results(spm_context *ctx)
{
    char path[3100];
    uint8_t *data = NULL;
    size_t size = 0;
    spm_json_value *root = NULL;
    snprintf(path, sizeof path, "%s/test_study/out/results.json", build);
    if (spm_file_read(ctx, path, &data, &size, NULL) == SPM_OK)
        root = spm_json_parse(ctx, path, (const char *)data, size, NULL);
    spm_free(ctx, data);
    return root;
}

static double number(const spm_json_value *object, const char *key)
{
    return spm_json_as_number(spm_json_get(object, key), -9.0);
}

static void study(void)
{
    spm_context *ctx = spm_context_create(NULL);
    spm_json_value *first, *again;
    const spm_json_value *runs, *summary;
    int64_t i, k;
    CHECK_INT(run("rm -rf %s/test_study && %s/synth_birds --out %s/test_study/birds --train 60 --val 16 --test 16 --quiet"), 0);
    CHECK_INT(run("%s/study %s/test_study/out %s/test_study/birds /nowhere quick > %s/test_study/table 2> /dev/null"), 0);
    first = read_results(ctx);
    runs = spm_json_get(first, "runs");
    summary = spm_json_get(first, "summary");
    CHECK_INT(spm_json_length(runs), 13);
    CHECK_INT(spm_json_length(summary), 13);
    for (i = 0; i < spm_json_length(runs); i++) {
        const spm_json_value *r = spm_json_at(runs, i), *line = spm_json_get(r, "line"), *end = spm_json_at(line, spm_json_length(line) - 1);
        double worst = 2.0;
        int over = strstr(spm_json_as_string(spm_json_get(r, "method"), ""), "power 1") != NULL;
        const spm_json_value *config = spm_json_get(r, "config"); /* what it was made with */
        CHECK_INT(spm_json_as_int(spm_json_get(config, "seed"), 0), 1);
        CHECK_INT(spm_json_as_int(spm_json_get(config, "epochs"), 0), i == 0 ? 20 : 10);
        CHECK_INT((int64_t)strlen(spm_json_as_string(spm_json_get(config, "data_hash"), "")), 16);
        CHECK_INT(spm_json_length(line), over ? 41 : 21); /* the power's line goes over tempered weights */
        CHECK_STR(spm_json_as_string(spm_json_get(r, "set"), ""), "birds");
        for (k = 0; k < 4; k++) {
            const spm_json_value *g = spm_json_at(spm_json_get(r, "test_groups"), k);
            double accuracy = number(g, "correct") / number(g, "count");
            worst = accuracy < worst ? accuracy : worst;
        }
        CHECK_NEAR(number(end, "worst_group_accuracy"), worst, 1e-8);
        CHECK(number(end, "majority_accuracy") >= worst && number(end, "majority_accuracy") <= 1.0);
    }
    for (i = 0; i < spm_json_length(summary); i++) { /* means over the seeds, against the start of each */
        const spm_json_value *s = spm_json_at(summary, i);
        const spm_json_value *line = spm_json_get(spm_json_at(runs, i), "line"), *pareto = spm_json_get(s, "pareto");
        double start = number(spm_json_at(line, 0), "worst_group_accuracy"), start_val = number(spm_json_at(line, 0), "val_majority_accuracy");
        int64_t n = spm_json_length(line);
        CHECK_INT(spm_json_as_int(spm_json_get(s, "seeds"), 0), 1);
        CHECK_NEAR(number(s, "gain"), number(spm_json_at(line, n - 1), "worst_group_accuracy") - start, 1e-8);
        CHECK(spm_json_length(pareto) >= 5); /* at 0 and below the start itself is there */
        for (k = 0; k < spm_json_length(pareto); k++) { /* the validation split chooses, the test split is told */
            const spm_json_value *level = spm_json_at(pareto, k);
            int64_t j, best = -1;
            for (j = 0; j < n; j++) {
                if (number(spm_json_at(line, j), "val_majority_accuracy") < start_val + number(level, "least_majority_change_points") / 100.0 - 1e-9) continue;
                if (best < 0 || number(spm_json_at(line, j), "val_worst_group_accuracy") > number(spm_json_at(line, best), "val_worst_group_accuracy")) best = j;
            }
            CHECK_NEAR(number(level, "gain"), number(spm_json_at(line, best), "worst_group_accuracy") - start, 1e-8);
        }
    }
    CHECK_INT(run("%s/study %s/test_study/out %s/test_study/birds /nowhere quick > %s/test_study/again 2> /dev/null"), 0);
    CHECK_INT(run("cmp -s %s/test_study/table %s/test_study/again"), 0);
    again = read_results(ctx);
    CHECK_INT(spm_json_length(spm_json_get(again, "runs")), 13);
    CHECK_INT(run("%s/study %s/test_study/out %s/test_study/birds /nowhere quick finished=1 > %s/test_study/again 2> /dev/null"), 0);
    CHECK_INT(run("cmp -s %s/test_study/table %s/test_study/again"), 0);
    CHECK_INT(run("%s/study %s/test_study/out %s/test_study/birds /nowhere slow > /dev/null 2> %s/test_study/again"), 512);
    CHECK_INT(run("%s/study %s/test_study/out %s/test_study/birds /nowhere quick seed=3 > /dev/null 2> %s/test_study/again"), 512);
    spm_json_free(ctx, first);
    spm_json_free(ctx, again);
    spm_context_destroy(ctx);
}

/* Stopped by Ctrl-C again and again, a little later each time, until it is through: the same rows (but for the seconds in
 * their first line) as above, where nothing stopped it. */
static void interrupted(void)
{
    static const char methods[3][12] = { "start", "jtt", "intervene" };
    char command[9000];
    int stops = 0, rc = -1, k;
    while (rc != 0 && stops < 100) {
        snprintf(command, sizeof command,
                 "%s/study %s/test_study/stopped %s/test_study/birds /nowhere quick methods=start,jtt,intervene"
                 " > /dev/null 2> %s/test_study/log & p=$!; (sleep %.2f; kill -INT $p) 2> /dev/null & wait $p",
                 build, build, build, build, 0.1 + 0.02 * stops);
        rc = system(command);
        if (rc == 0) break;
        CHECK_INT(rc, 256);
        CHECK_INT(run("grep -q 'stopped; the same command goes on' %s/test_study/log"), 0);
        stops++;
    }
    CHECK_INT(rc, 0);
    CHECK(stops > 1);
    for (k = 0; k < 3; k++) {
        snprintf(command, sizeof command,
                 "cd %s/test_study && tail -n +2 out/birds-resnet-1/%s/row.txt > a && tail -n +2 stopped/birds-resnet-1/%s/row.txt | cmp -s a - && test -s a",
                 build, methods[k], methods[k]);
        CHECK_INT(system(command), 0);
    }
}

int main(void)
{
    const char *folder = getenv("SPURMEM_BUILD");
    if (folder) snprintf(build, sizeof build, "%s", folder);
    if (folder) {
        TEST(study);
        TEST(interrupted);
    } else
        printf("    SPURMEM_BUILD is not set: there is nothing to run\n");
    return TEST_END;
}
