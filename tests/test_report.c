/* The HTML page: run folders with known numbers written by hand, what the page must say about them, hostile names, every
 * way a file can be missing or broken, the pictures that are drawn, and the page in headless Chromium where it is
 * installed. */
#define _XOPEN_SOURCE 700
#include "../spurmem.h"
#include "test.h"
#include "tiny.h"
#include <sys/stat.h>
#include <unistd.h>

#define HOSTILE "<script>alert(1)</script> & \\\"q\\\" 'x' \xC3\xA9\xE6\xB0\xB4 \\u202e\\u0007"

static spm_context *ctx;
static spm_error err;
static char *page; /* the last page */

static const char *text_of(const char *path)
{
    uint8_t *data = NULL;
    size_t size = 0;
    free(page);
    page = NULL;
    if (spm_file_read(ctx, path, &data, &size, &err)) return "";
    page = (char *)malloc(size + 1);
    if (!page) exit(1);
    memcpy(page, data, size);
    page[size] = 0;
    spm_free(ctx, data);
    return page;
}

static int times(const char *text, const char *part)
{
    int n = 0;
    for (; (text = strstr(text, part)) != NULL; text += strlen(part)) n++;
    return n;
}

/* A group of a metrics line. */
static void group(char *line, size_t size, int id, int y, int count, int correct, const char *name)
{
    size_t at = strlen(line);
    snprintf(line + at, size - at, "%s{\"id\": %d, \"name\": \"%s\", \"y\": %d, \"confounder\": %d, \"count\": %d, \"correct\": %d, "
             "\"accuracy\": %.9g, \"ci95\": [0, 1], \"loss\": 0.1}", id ? ", " : "", id, name, y, id % 2, count, correct,
             count ? (double)correct / count : 0.0);
}

/* A run folder of two epochs: per split four counts of right answers at the end. */
static void make_run(const char *folder, const char *method, const int *train, const int *test, const char *name2)
{
    static const int of_train[4] = { 100, 10, 10, 100 };
    char text[8000] = "", one[2000];
    int epoch, s, g;
    CHECK(spm_directory_create(ctx, tiny_path(folder, ""), &err) == SPM_OK);
    snprintf(text, sizeof text, "{\"program\": \"spurmem 0.1\", \"method\": \"%s\", \"seed\": 7, \"select\": \"last\", \"data_hash\": "
             "\"00ff\", \"command\": \"spurmem train <x>\", \"groups\": [\"land\", \"landwater\", \"%s\", \"water\"]}\n", method, name2);
    tiny_put(ctx, tiny_path(folder, "config.json"), text);
    *text = 0;
    for (epoch = 0; epoch < 2; epoch++) {
        for (s = 0; s < 2; s++) {
            double worst = 1.0, sum = 0.0;
            *one = 0;
            for (g = 0; g < 4; g++) {
                int count = s ? 50 : of_train[g], right = epoch ? (s ? test[g] : train[g]) : count / 2;
                double share = (double)right / count;
                group(one, sizeof one, g, g / 2, count, right, g == 2 ? name2 : "g");
                if (share < worst) worst = share;
                sum += share / 4;
            }
            snprintf(text + strlen(text), sizeof text - strlen(text), "{\"epoch\": %d, \"split\": \"%s\", \"loss\": 1, \"mean_accuracy\": "
                     "%.9g, \"adjusted_accuracy\": %.9g, \"worst_group_accuracy\": %.9g, \"groups\": [%s], \"seconds\": 1}\n", epoch,
                     s ? "test" : "train", sum, sum, worst, one);
        }
    }
    tiny_put(ctx, tiny_path(folder, "metrics.jsonl"), text);
}

static void make_study(const char *folder)
{
    char text[6000], one[2000] = "", after[2000] = "";
    int g;
    for (g = 0; g < 4; g++) {
        group(one, sizeof one, g, g / 2, 10, 10, "g");
        group(after, sizeof after, g, g / 2, 10, g == 2 ? 3 : 9, "g");
    }
    snprintf(text, sizeof text, "{\"command\": \"localize\", \"criterion\": \"gradient\", \"selected_on\": \"train\", \"baseline\": "
             "{\"train\": [%s]}, \"rankings\": [{\"group\": 2, \"samples\": 9, \"units\": [{\"parameter\": \"conv1.weight\", \"channel\": 4, "
             "\"score\": 2.5}]}], \"results\": [{\"group\": 2, \"top\": 1, \"modify\": \"zero-unit\", \"std\": null, \"repeat\": 0, "
             "\"splits\": {\"train\": [%s]}, \"controls\": [{\"split\": \"train\", \"group\": 2, \"n\": 3, \"mean_drop\": 0.1, "
             "\"p_value\": 0.25, \"drops\": [0.1, 0.0, 0.2]}]}]}", one, after);
    tiny_put(ctx, tiny_path(folder, "localize.json"), text);
}

static spm_status report(const char *first, const char *second, const char *results)
{
    static char a[500], b[500], out[500];
    const char *runs[2];
    spm_report_desc desc = SPM_ZERO;
    snprintf(a, sizeof a, "%s", tiny_path(first, ""));
    snprintf(b, sizeof b, "%s", second ? tiny_path(second, "") : "");
    snprintf(out, sizeof out, "%s", tiny_path("page.html", ""));
    runs[0] = a;
    runs[1] = b;
    desc.runs = runs;
    desc.n_runs = second ? 2 : 1;
    desc.results = results;
    memset(&err, 0, sizeof err);
    return spm_report_write(ctx, &desc, out, &err);
}

static const int before_train[4] = { 100, 10, 10, 100 }, before_test[4] = { 48, 20, 15, 49 };
static const int after_train[4] = { 90, 9, 9, 91 }, after_test[4] = { 44, 36, 37, 45 };

/* Start and end tags pair up, and no '<' stands where text should be: a small check of what a browser would repair. */
static void well_formed(const char *text)
{
    static const char empty[][8] = { "meta", "rect", "line", "use", "path", "circle", "img", "br", "!doctyp" };
    char stack[64][16];
    int depth = 0, i;
    const char *at = text;
    while ((at = strchr(at, '<')) != NULL) {
        char name[16] = "";
        int close = at[1] == '/', n = 0, single = 0;
        const char *end;
        char quote = 0;
        at += 1 + close;
        while (n < 15 && at[n] && !strchr(" >\n/", at[n])) { name[n] = at[n]; n++; }
        name[n] = 0;
        for (end = at; *end && (quote || *end != '>'); end++)
            if (*end == '"') quote = quote ? 0 : '"';
        if (!*end) { test_report("test_report.c", __LINE__, "a tag does not end"); return; }
        at = end;
        if (strcmp(name, "style") == 0 && !close) {
            at = strstr(at, "</style>");
            if (!at) { test_report("test_report.c", __LINE__, "style does not end"); return; }
            at += 8;
            continue;
        }
        for (i = 0; i < (int)(sizeof empty / sizeof empty[0]); i++) single |= strncmp(name, empty[i], 7) == 0 && strcmp(name, "title");
        if (strcmp(name, "q") == 0) single = 0;
        if (single && !close) continue;
        if (!close) {
            if (depth == 64) { test_report("test_report.c", __LINE__, "nested too deep"); return; }
            snprintf(stack[depth++], sizeof stack[0], "%s", name);
        } else if (single) {
            continue;
        } else if (depth == 0 || strcmp(stack[depth - 1], name) != 0) {
            char what[120];
            snprintf(what, sizeof what, "</%s> closes <%s> near \"%.40s\"", name, depth ? stack[depth - 1] : "nothing", at);
            test_report("test_report.c", __LINE__, what);
            return;
        } else
            depth--;
    }
    CHECK_INT(depth, 0);
}

static void numbers(void)
{
    const char *text;
    make_run("erm", "erm", before_train, before_test, "waterland");
    make_run("fixed", "intervene", after_train, after_test, "waterland");
    make_study("erm");
    CHECK(report("erm", "fixed", NULL) == SPM_OK);
    text = text_of(tiny_path("page.html", ""));
    well_formed(text);
    /* the finding: 100 % in training, 15 of 50 = 30 % in test, then 37 of 50 = 74 %; majority (48 + 49) / 100 to 89 % */
    CHECK(strstr(text, "is right on 100.0 % of the training pictures of <q>waterland</q> and on 30.0 % of the test pictures"));
    CHECK(strstr(text, "gets 74.0 % of them right; the majority groups change by &minus;8.0 points"));
    CHECK(strstr(text, "30.0</span>") && strstr(text, "+42.0 points")); /* worst group 30 to 72 */
    CHECK(strstr(text, "15 of 50") && strstr(text, "37 of 50"));
    CHECK(strstr(text, "19.1&ndash;43.8")); /* Wilson's interval of 15 in 50 */
    CHECK(times(text, "minority, 10 in training") == 2 && times(text, "majority, 100 in training") == 2);
    /* the study: 100 to 30 %, three controls */
    CHECK(strstr(text, "conv1[4]") && strstr(text, "&minus;70.0") && strstr(text, "p&nbsp;=&nbsp;0.25"));
    CHECK_INT(times(text, "class=control"), 3);
    /* the protocol */
    CHECK(strstr(text, "spurmem train &lt;x&gt;") && strstr(text, "00ff") && strstr(text, "<tr class=differ><th scope=row>method"));
    CHECK(!strstr(text, "<tr class=differ><th scope=row>seed"));
    CHECK(!strstr(text, "nan") && !strstr(text, "inf%"));
    /* self-contained */
    CHECK(!strstr(text, "<script") && !strstr(text, "<link") && !strstr(text, "http") && !strstr(text, "@import") && !strstr(text, "url(//"));
    CHECK(strstr(text, "@media print") && strstr(text, "prefers-color-scheme:dark") && strstr(text, "lang=en"));
    CHECK_INT(times(text, "<svg") - 1, times(text, "role=img") + times(text, "aria-hidden=true><span")); /* each has a name or is hidden */
    CHECK_INT(times(text, "role=img><title>"), times(text, "role=img"));
}

/* A drop is a gain where it is negative; one run alone tells its own story. */
static void one_run(void)
{
    static const int flat[4] = { 50, 5, 5, 50 }, same[4] = { 25, 25, 25, 25 };
    CHECK(report("fixed", NULL, NULL) == SPM_OK);
    well_formed(text_of(tiny_path("page.html", "")));
    CHECK(!strstr(page, "&rarr;</span>") && !strstr(page, "id=memory"));
    make_run("flat", "erm", flat, same, "waterland");
    CHECK(report("flat", NULL, NULL) == SPM_OK);
    CHECK(strstr(text_of(tiny_path("page.html", "")), "no group shows a gap of 10 points or more"));
    CHECK(report("erm", "flat", NULL) == SPM_OK); /* two of one method: told apart by their folders */
    CHECK(strstr(text_of(tiny_path("page.html", "")), "erm (erm)") && strstr(page, "flat (erm)"));
}

static void hostile_names(void)
{
    const char *text;
    make_run("odd", "<img src=x onerror=y>", before_train, before_test, HOSTILE);
    CHECK(report("odd", NULL, NULL) == SPM_OK);
    text = text_of(tiny_path("page.html", ""));
    well_formed(text);
    CHECK(!strstr(text, "<script") && !strstr(text, "<img") && !strstr(text, "\"q\""));
    CHECK(strstr(text, "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;q&quot; &#39;x&#39; \xC3\xA9\xE6\xB0\xB4"));
    CHECK(!strchr(text, 7) && strstr(text, "\xEF\xBF\xBD"));
}

static void study_results(void)
{
    tiny_put(ctx, tiny_path("results.json", ""), "{\"tables\": [{\"method\": \"group_dro <b>\", \"majority_accuracy\": 0.9, "
             "\"worst_group_accuracy\": 0.8}, {\"method\": \"none\", \"majority_accuracy\": 7, \"worst_group_accuracy\": 0.8}], "
             "\"dfr\": {\"majority_accuracy\": 0.95, \"worst_group_accuracy\": 0.7}}");
    CHECK(report("erm", "fixed", tiny_path("results.json", "")) == SPM_OK);
    well_formed(text_of(tiny_path("page.html", "")));
    CHECK(strstr(page, "group_dro &lt;b&gt;: worst group 80.0 %, majority 90.0 %") && strstr(page, "dfr: worst group 70.0 %"));
    CHECK(!strstr(page, "none: worst"));
    /* what `make study` writes: lines, the mean over two seeds at their ends (70 and 80 % at 90 and 94 %) */
    tiny_put(ctx, tiny_path("results.json", ""), "{\"runs\": [{\"set\": \"dom<i>\", \"arch\": \"r\", \"method\": \"jtt\", \"seed\": 1, "
             "\"line\": [{\"worst_group_accuracy\": 0.1, \"majority_accuracy\": 0.99}, {\"worst_group_accuracy\": 0.7, "
             "\"majority_accuracy\": 0.9}]}, {\"set\": \"dom<i>\", \"arch\": \"r\", \"method\": \"jtt\", \"seed\": 2, \"line\": "
             "[{\"worst_group_accuracy\": 0.1, \"majority_accuracy\": 0.99}, {\"worst_group_accuracy\": 0.8, "
             "\"majority_accuracy\": 0.94}]}]}");
    CHECK(report("erm", "fixed", tiny_path("results.json", "")) == SPM_OK);
    well_formed(text_of(tiny_path("page.html", "")));
    CHECK(strstr(page, "<li>jtt <b>75.0</b> <small>at 92.0</small></li>") && strstr(page, "dom&lt;i&gt;"));
    CHECK_INT(times(page, "<li>"), 1);
    CHECK(report("erm", NULL, tiny_path("nothing.json", "")) != SPM_OK && strstr(err.text, "nothing.json"));
}

/* The exhaustive scan's map and index, and the gradient table. */
static void scan_and_gradients(void)
{
    make_run("scanned", "erm", before_train, before_test, "waterland");
    tiny_put(ctx, tiny_path("scanned", "localize.json"), "{\"scan\": {\"criterion\": \"exhaustive\", \"baseline\": {}, \"results\": [], "
             "\"scan\": {\"units\": [{\"parameter\": \"conv1.weight\", \"channel\": 0, \"norm\": 0.5, \"drop\": {\"train\": "
             "[0, 0.25, 0.5, 0], \"test\": [0, 0, 0.125, 0]}, \"memory_index\": {\"index\": 0.3, \"ci95\": [0.1, 0.5]}}, "
             "{\"parameter\": \"layer1.0.conv1.weight\", \"channel\": 7, \"norm\": 2, \"drop\": {\"train\": [0, 0, 0.1, 0]}, "
             "\"memory_index\": {\"index\": 0.4, \"ci95\": [0, 0.6]}}, {\"parameter\": \"layer1.0.conv2.weight\", \"channel\": 1, "
             "\"norm\": 1, \"drop\": {\"train\": [0, 0, null, 0]}}]}}}");
    tiny_put(ctx, tiny_path("scanned", "gradients.csv"), "epoch,parameter,block,group,count,norm,share,cosine\n"
             "0,conv1.weight,0,0,100,1,0.25,0\n0,conv1.weight,0,1,10,1,0.75,0\n0,fc.weight,0,0,100,1,0.5,0\n0,fc.weight,0,2,10,1,0.5,0\n"
             "4,conv1.weight,0,0,100,1,1,0\n4,conv1.weight,0,1,10,1,0,0\n4,fc.weight,0,0,100,1,nan,0\n");
    CHECK_MSG(report("scanned", NULL, NULL) == SPM_OK, err.text);
    well_formed(text_of(tiny_path("page.html", "")));
    CHECK(strstr(page, "3 removed one at a time") && times(page, "class=units") == 4); /* two layers of two groups */
    CHECK(strstr(page, "conv1[0]: &minus;50.0 points in training, &minus;12.5 on new pictures"));
    CHECK(strstr(page, "layer1.0.conv1[7]</code></th><td><b>+40.0</b></td><td>0.0 to +60.0")); /* the larger index first */
    CHECK(strstr(page, "<th scope=row>conv1</th><td class=heat style=\"--h:45%\">75.0</td>"));
    CHECK(strstr(page, "all layers</th><td class=heat style=\"--h:38%\">62.5</td><td class=heat style=\"--h:0%\">0.0</td>"));
    CHECK(strstr(page, "epoch 1</th><th scope=col>epoch 5") && strstr(page, "9.1 % of its training pictures"));
    tiny_put(ctx, tiny_path("scanned", "gradients.csv"), "epoch,parameter\n1\n");
    CHECK(report("scanned", NULL, NULL) != SPM_OK && strstr(err.text, "gradients.csv"));
    tiny_put(ctx, tiny_path("scanned", "gradients.csv"), "a,b\n1,2\n");
    CHECK(report("scanned", NULL, NULL) != SPM_OK && strstr(err.text, "lacks one of the columns"));
}

/* Every file missing or broken in turn: one sentence with its name, and the page of before stays. */
static void broken_files(void)
{
    static const char broken[][2][40] = { { "config.json", "" },     { "config.json", "{" },         { "config.json", "[1]" },
                                          { "metrics.jsonl", "" },   { "metrics.jsonl", "{\"a\": \n" }, { "localize.json", "{]" },
                                          { "localize.json", "3" },  { "gradcam/index.json", "nope" } };
    char was[2][9000];
    size_t i;
    make_run("broken", "erm", before_train, before_test, "waterland");
    CHECK(report("broken", NULL, NULL) == SPM_OK);
    CHECK(spm_directory_create(ctx, tiny_path("broken/gradcam", ""), &err) == SPM_OK);
    snprintf(was[0], sizeof was[0], "%s", text_of(tiny_path("broken", "config.json")));
    snprintf(was[1], sizeof was[1], "%s", text_of(tiny_path("broken", "metrics.jsonl")));
    for (i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        tiny_put(ctx, tiny_path("broken", broken[i][0]), broken[i][1]);
        CHECK_MSG(report("broken", NULL, NULL) != SPM_OK, broken[i][1]);
        CHECK_MSG(strstr(err.text, "broken") && strstr(err.text, broken[i][0]), err.text);
        CHECK(!strchr(err.text, '\n'));
        if (i < 5)
            tiny_put(ctx, tiny_path("broken", broken[i][0]), was[i < 3 ? 0 : 1]);
        else
            CHECK(remove(tiny_path("broken", broken[i][0])) == 0);
    }
    CHECK(remove(tiny_path("broken", "config.json")) == 0);
    CHECK(report("broken", NULL, NULL) != SPM_OK && strstr(err.text, "no run folder"));
    CHECK(report("nowhere", NULL, NULL) != SPM_OK && strstr(err.text, "nowhere: does not exist"));
    CHECK(spm_file_write(ctx, tiny_path("broken", ""), "x", 1, NULL) != SPM_OK); /* a folder */
    /* values of the wrong kind are dashes, not nonsense */
    tiny_put(ctx, tiny_path("broken", "config.json"), "{\"method\": 3, \"groups\": [1, null, \"c\"], \"select\": []}");
    tiny_put(ctx, tiny_path("broken", "metrics.jsonl"), "{\"epoch\": \"x\", \"split\": \"test\", \"groups\": [{\"accuracy\": 1e300, "
             "\"count\": 5, \"correct\": 9}, 7, {\"accuracy\": \"a\"}]}\n{\"epoch\": 1e18, \"split\": \"train\"}\n{\"torn");
    CHECK(report("broken", NULL, NULL) == SPM_OK);
    well_formed(text_of(tiny_path("page.html", "")));
    CHECK(!strstr(page, "nan") && !strstr(page, "e+"));
}

/* Pictures: drawn from a trained run, embedded, refused where the index points elsewhere. */
static void pictures(void)
{
    tiny_counts counts = tiny_usual();
    spm_dataset *data = tiny_data(ctx, "birds", &counts);
    spm_train_desc desc = spm_train_desc_init(SPM_METHOD_ERM);
    spm_train_result result;
    const char *runs[1];
    char folder[900];
    snprintf(folder, sizeof folder, "%s", tiny_path("trained", ""));
    runs[0] = folder;
    desc.out = folder;
    desc.arch = tiny_arch(ctx, TINY_ARCH);
    desc.reading = tiny_reading();
    desc.epochs = 1;
    desc.seed = 3;
    CHECK(spm_train(ctx, data, &desc, &result, &err) == SPM_OK);
    CHECK_MSG(spm_report_draw(ctx, data, runs, 1, 2, &err) == SPM_OK, err.text);
    CHECK(report("trained", NULL, NULL) == SPM_OK);
    well_formed(text_of(tiny_path("page.html", "")));
    if (strstr(text_of(tiny_path("trained/gradcam", "index.json")), "00.jpg")) {
        CHECK(strstr(text_of(tiny_path("page.html", "")), "data:image/jpeg;base64,/9j/") != NULL);
        CHECK_INT(times(page, "<img"), 2 * times(page, "<p><small>picture"));
        tiny_put(ctx, tiny_path("trained/gradcam", "00.jpg"), "no picture");
        CHECK(report("trained", NULL, NULL) != SPM_OK && strstr(err.text, "00.jpg: is neither a PNG nor a JPEG"));
    }
    tiny_put(ctx, tiny_path("trained/gradcam", "index.json"), "{\"pictures\": [{\"file\": \"../config.json\"}]}");
    CHECK(report("trained", NULL, NULL) != SPM_OK && strstr(err.text, "must name a picture in that folder"));
    tiny_put(ctx, tiny_path("trained/gradcam", "index.json"), "{\"pictures\": [{\"file\": \"none.png\"}]}");
    CHECK(report("trained", NULL, NULL) != SPM_OK && strstr(err.text, "none.png"));
    CHECK(remove(tiny_path("trained/gradcam", "index.json")) == 0);
    CHECK(remove(tiny_path("trained", "best.safetensors")) == 0);
    memset(&err, 0, sizeof err);
    CHECK(spm_report_draw(ctx, data, runs, 1, 2, &err) != SPM_OK && strstr(err.text, "best.safetensors"));
    spm_dataset_close(data);
}

/* The page as a browser has it after loading: all sections, all titles, nothing that it had to repair or fetch. */
static void in_chromium(void)
{
    char command[3000], folder[800];
    const char *text;
    static const int widths[3] = { 400, 1000, 1600 };
    int i;
    if (system("command -v chromium >/dev/null 2>&1") != 0 || getenv("SPURMEM_SANITIZED")) SKIP("no chromium here");
    CHECK(realpath(tiny_path("", ""), folder) != NULL);
    make_run("odd", "erm", before_train, before_test, HOSTILE);
    make_study("odd");
    CHECK(report("odd", "fixed", NULL) == SPM_OK);
    snprintf(command, sizeof command, "cd '%s' && timeout 100 chromium --headless --no-sandbox --disable-gpu --dump-dom 'file://%s/page.html' "
             ">dom.html 2>/dev/null", folder, folder);
    if (system(command) != 0) SKIP("chromium does not start here");
    text = text_of(tiny_path("dom.html", ""));
    CHECK(strstr(text, "id=\"groups\"") && strstr(text, "id=\"curves\"") && strstr(text, "id=\"pareto\"")
          && strstr(text, "id=\"memory\"") && strstr(text, "id=\"protocol\""));
    CHECK(!strstr(text, "<script") && strstr(text, "&lt;script&gt;"));
    CHECK_INT(times(text, "<svg") - 1, times(text, "role=\"img\"") + times(text, "class=\"bar axis\""));
    for (i = 0; i < 3; i++) { /* the picture of the page is as wide as the window: nothing sticks out */
        spm_image shot = SPM_ZERO;
        int64_t p, dark = 0;
        snprintf(command, sizeof command, "cd '%s' && timeout 100 chromium --headless --no-sandbox --disable-gpu --hide-scrollbars "
                 "--window-size=%d,1200 --screenshot=shot.png 'file://%s/page.html' >/dev/null 2>&1", folder, widths[i], folder);
        CHECK_INT(system(command), 0);
        CHECK(spm_image_load(ctx, tiny_path("shot.png", ""), NULL, &shot, &err) == SPM_OK);
        CHECK_INT(shot.width, widths[i]);
        for (p = 0; p < (int64_t)shot.width * shot.height; p++) dark += shot.pixels[3 * p] < 100;
        CHECK(dark > 2000); /* there is text and there are bars */
        spm_image_free(ctx, &shot);
    }
}

int main(void)
{
    char command[600];
    tiny_begin("test_report");
    snprintf(command, sizeof command, "rm -rf '%s'/*", tiny_root); /* what an earlier test left */
    if (system(command) != 0) printf("    %s cannot be emptied\n", tiny_root);
    ctx = tiny_context(1);
    TEST(numbers);
    TEST(one_run);
    TEST(hostile_names);
    TEST(study_results);
    TEST(scan_and_gradients);
    TEST(broken_files);
    TEST(pictures);
    TEST(in_chromium);
    free(page);
    spm_context_destroy(ctx);
    return TEST_END;
}
