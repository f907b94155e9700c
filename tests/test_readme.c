/* What README.md and the manual show must work: every shell block is run line by line, every C block is compiled, and so
 * is the program of the header's synopsis.  Runs from the root of the repository, as `make test` does, and needs what
 * `make` builds; all it writes lies below the build folder. */
#include "test.h"
#include <sys/stat.h>
#include <unistd.h>

static char build[300];
static char *readme;

static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

/* Runs a command with its output in build/readme/log; shows the output's end when it fails. */
static int run(const char *command)
{
    char line[4000];
    int code;
    snprintf(line, sizeof line, "{ %s\n} > %s/readme/log 2>&1", command, build);
    code = system(line);
    if (code != 0) {
        printf("    %.300s\n", command);
        snprintf(line, sizeof line, "tail -n 5 %s/readme/log | sed 's/^/    /'", build);
        fflush(stdout);
        if (system(line) != 0) printf("    (no output)\n");
    }
    return code;
}

/* The text of the index-th block that opens with ```language; *next: behind it.  NULL: there is none. */
static char *block(const char *text, const char *language, int index)
{
    char fence[20];
    size_t length = (size_t)snprintf(fence, sizeof fence, "\n```%s\n", language);
    const char *start = text, *end;
    char *copy;
    do {
        start = strstr(start, fence);
        if (!start) return NULL;
        start += length;
    } while (index-- > 0);
    end = strstr(start, "\n```");
    if (!end) return NULL;
    copy = (char *)calloc((size_t)(end - start) + 2, 1);
    if (copy) memcpy(copy, start, (size_t)(end - start) + 1);
    return copy;
}

/* The C compiler at no optimisation: the whole header each time. */
static int compile(const char *source, const char *program, const char *more)
{
    char command[1500];
    const char *cc = getenv("CC");
    snprintf(command, sizeof command, "%s -O0 -I. %s -o %s/readme/%s %s/readme/%s -lm -lpthread", cc && *cc ? cc : "cc", more, build, program, build, source);
    return run(command);
}

static void put(const char *name, const char *text)
{
    char path[400];
    FILE *file;
    snprintf(path, sizeof path, "%s/readme/%s", build, name);
    file = fopen(path, "wb");
    CHECK(file != NULL);
    if (!file) return;
    CHECK(fputs(text, file) >= 0);
    CHECK(fclose(file) == 0);
}

/* ---- the shell blocks ---- */

static void pictures(void)
{
    char command[900];
    if (exists("build/demo/birds/metadata.csv")) return;
    snprintf(command, sizeof command, "%s/synth_birds --out build/demo/birds --train 120 --val 40 --test 80", build);
    CHECK_INT(run(command), 0);
}

static void shell_blocks(void)
{
    char *text;
    int b, commands = 0;
    if (!exists("build/spurmem")) SKIP("build/spurmem is not built");
    CHECK_INT(system("rm -rf build/readme/erm build/readme/repaired"), 0);
    for (b = 0; (text = block(readme, "sh", b)) != NULL; b++) {
        char *line = text;
        while (*line) {
            char *end = strchr(line, '\n');
            while (end && end > line && end[-1] == '\\') { /* goes on */
                end[-1] = end[0] = ' ';
                end = strchr(end, '\n');
            }
            if (end) *end = 0;
            if (*line && *line != '#') {
                commands++;
                CHECK_MSG(run(line) == 0, line);
            }
            if (!end) break;
            line = end + 1;
        }
        free(text);
    }
    CHECK(commands >= 5);
    CHECK(exists("build/readme/report.html"));
}

/* ---- the C blocks ---- */

/* The checkpoint and the picture of the shell block's last `predict`. */
static int prediction(char *checkpoint, char *picture, size_t size)
{
    const char *at = strstr(readme, "spurmem predict --checkpoint ");
    if (!at || size < 200) return 0;
    return sscanf(at, "spurmem predict --checkpoint %199s %199s", checkpoint, picture) == 2;
}

static void c_blocks(void)
{
    char *text;
    int b;
    for (b = 0; (text = block(readme, "c", b)) != NULL; b++) {
        char source[40], program[40];
        snprintf(source, sizeof source, "snippet%d.c", b);
        snprintf(program, sizeof program, "snippet%d", b);
        put(source, text);
        CHECK_INT(compile(source, program, ""), 0);
        if (strstr(text, "classify CHECKPOINT PICTURE") && exists("build/spurmem")) {
            char checkpoint[200], picture[200], command[1000], *said, path[400];
            double a, c;
            CHECK(prediction(checkpoint, picture, sizeof picture));
            snprintf(command, sizeof command, "%s/readme/%s %s %s", build, program, checkpoint, picture);
            CHECK_INT(run(command), 0);
            snprintf(path, sizeof path, "%s/readme/log", build);
            said = test_read(path, NULL);
            CHECK(said && strstr(said, picture) && sscanf(said + strlen(picture), ": %lf against %lf", &a, &c) == 2);
            free(said);
            snprintf(command, sizeof command, "! %s/readme/%s no/such/file %s", build, program, picture);
            CHECK_INT(run(command), 0);
        }
        free(text);
    }
    CHECK(b >= 1);
}

/* The program between the first #define and the closing brace of the banner's synopsis. */
static void synopsis(void)
{
    char *header = test_read("spurmem.h", NULL), *program = (char *)calloc(10000, 1), *line, *end;
    size_t n = 0;
    CHECK(header != NULL && program != NULL);
    if (!header || !program) return;
    line = strstr(header, "#define SPURMEM_THREADS");
    CHECK(line != NULL);
    while (line && line > header && line[-1] != '\n') line--;
    for (; line && *line; line = end + 1) {
        size_t length;
        end = strchr(line, '\n');
        if (!end) break;
        if (strncmp(line, " *", 2) != 0) break;
        line += 2;
        length = (size_t)(end - line);
        if (n + length + 2 > 10000) break;
        memcpy(program + n, line, length);
        n += length;
        program[n++] = '\n';
        if (length >= 6 && strncmp(line, "     }", 6) == 0 && length == 6) break; /* main's */
    }
    CHECK(strstr(program, "int main(void)") != NULL);
    put("synopsis.c", program);
    CHECK_INT(compile("synopsis.c", "synopsis", ""), 0);
    put("synopsis.cc", program);
    if (system("c++ --version >/dev/null 2>&1") == 0) {
        char command[900];
        snprintf(command, sizeof command, "c++ -fsyntax-only -I. %s/readme/synopsis.cc", build);
        CHECK_INT(run(command), 0);
    }
    free(header);
    free(program);
}

/* ---- the commands ---- */

static void commands(void)
{
    char path[400], command[900], *help, *line, names[40][24];
    const char *at;
    int n = 0, i;
    snprintf(command, sizeof command, "%s/spurmem --help", build);
    if (!exists("build/spurmem")) SKIP("build/spurmem is not built");
    CHECK_INT(run(command), 0);
    snprintf(path, sizeof path, "%s/readme/log", build);
    help = test_read(path, NULL);
    line = help ? strstr(help, "commands:\n") : NULL;
    CHECK(line != NULL);
    if (!line) return;
    for (line += 10; strncmp(line, "  ", 2) == 0 && n < 40; line = strchr(line, '\n') + 1) {
        char quoted[40];
        if (sscanf(line, " %23s", names[n]) != 1) break;
        snprintf(quoted, sizeof quoted, "`%.23s`", names[n]);
        CHECK_MSG(strstr(readme, quoted) != NULL, names[n]);
        n++;
    }
    CHECK(n >= 8);
    for (at = readme; (at = strstr(at, "spurmem ")) != NULL; at += 8) { /* `spurmem COMMAND` in text, build/spurmem in blocks */
        char word[24] = "";
        int known = 0;
        if (at == readme || (at[-1] != '`' && at[-1] != '/')) continue;
        if (sscanf(at, "spurmem %23[a-zA-Z-]", word) != 1 || strcmp(word, "COMMAND") == 0 || word[0] == '-') continue;
        for (i = 0; i < n; i++) known |= strcmp(word, names[i]) == 0;
        CHECK_MSG(known, word);
    }
    for (i = 0; i < n; i++) {
        snprintf(command, sizeof command, "%.250s/spurmem %.23s --help", build, names[i]);
        CHECK_INT(run(command), 0);
    }
    free(help);
}

/* Files that README.md names in code marks exist. */
static void paths(void)
{
    const char *at;
    int found = 0;
    for (at = readme; (at = strchr(at, '`')) != NULL;) {
        char name[200];
        const char *end = strpbrk(at + 1, "`\n");
        size_t length = end ? (size_t)(end - at - 1) : 0;
        at = end && *end == '`' ? end + 1 : at + 1;
        if (!end || !length || length >= sizeof name || *end != '`') continue;
        memcpy(name, end - length, length);
        name[length] = 0;
        if (strncmp(name, "examples/", 9) != 0 && strncmp(name, "tests/", 6) != 0 && strncmp(name, "data_tools/", 11) != 0) continue;
        CHECK_MSG(exists(name), name);
        found++;
    }
    CHECK(found >= 2);
}

static void nothing_is_built(void)
{
    SKIP("SPURMEM_BUILD is not set: there is nothing to run");
}

int main(void)
{
    const char *where = getenv("SPURMEM_BUILD");
    char command[400];
    if (!where || !*where) {
        TEST(nothing_is_built);
        return TEST_END;
    }
    snprintf(build, sizeof build, "%.200s", where);
    readme = test_read("README.md", NULL);
    snprintf(command, sizeof command, "mkdir -p build/readme %s/readme", build);
    if (!readme || system(command) != 0) {
        printf("    README.md cannot be read; run this from the root of the repository\n");
        test_failed++;
        return TEST_END;
    }
    TEST(paths);
    TEST(commands);
    TEST(pictures);
    TEST(shell_blocks);
    TEST(c_blocks);
    TEST(synopsis);
    free(readme);
    return TEST_END;
}
