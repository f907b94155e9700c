/* programs.h - runs the built programs as a user does, in a folder of the test's own, and hears what they say.
 * SPURMEM_BUILD names the folder that holds them; without it the tests are skipped.  Include it first. */
#ifndef SPURMEM_TEST_PROGRAMS_H
#define SPURMEM_TEST_PROGRAMS_H
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
  #define _POSIX_C_SOURCE 200809L /* popen */
#endif
#include "../spurmem.h"
#include "test.h"
#include <stdarg.h>
#if !defined(_WIN32)
  #include <sys/wait.h>
#endif

static spm_context *ctx;
static const char *build; /* NULL: no programs to run */
static char root[600];    /* everything is written below it */
static char said_text[20000];

#define NEED_PROGRAMS() do { if (!build) SKIP("SPURMEM_BUILD does not name a folder with the programs"); } while (0)

/* Clears BUILD/name, if the folder BUILD has this program. */
static inline void programs_begin(const char *name, const char *program)
{
    char command[800];
    ctx = spm_context_create(NULL);
    test_folder(root, sizeof root, name);
    build = getenv("SPURMEM_BUILD");
    if (build && strlen(build) < 500) {
        snprintf(command, sizeof command, "%s/%s", build, program);
        if (*build && test_exists(command)) {
            snprintf(command, sizeof command, "rm -rf \"%s\"", root);
            if (system(command) != 0) printf("    %s: could not be cleared\n", root);
            return;
        }
    }
    build = NULL;
}

/* Runs "BUILD/<command>", '@' standing for the folder of this test; keeps what it says. Returns its exit status. */
static inline int run(const char *format, ...)
{
    char command[4000], line[3000];
    size_t n, i;
    int status;
    FILE *pipe;
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    n = (size_t)snprintf(command, sizeof command, "%s/", build);
    for (i = 0; line[i] && n + 700 < sizeof command; i++) {
        if (line[i] == '@') n += (size_t)snprintf(command + n, sizeof command - n, "%s", root);
        else command[n++] = line[i];
    }
    snprintf(command + n, sizeof command - n, " 2>&1");
    pipe = popen(command, "r");
    CHECK(pipe != NULL);
    if (!pipe) return -1;
    n = fread(said_text, 1, sizeof said_text - 1, pipe);
    said_text[n] = 0;
    while (fread(line, 1, sizeof line, pipe) > 0) continue;
    status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static inline int said(const char *text)
{
    if (strstr(said_text, text)) return 1;
    printf("    said: %.600s\n", said_text);
    return 0;
}

/* The path of a file of the test, its folder made; four may be in use at a time. */
static inline const char *at(const char *format, ...)
{
    static char path[4][1200];
    static int turn;
    char *to = path[turn = (turn + 1) % 4], folder[1200], *slash;
    size_t n = (size_t)snprintf(to, 1200, "%s/", root);
    va_list list;
    va_start(list, format);
    vsnprintf(to + n, 1200 - n, format, list);
    va_end(list);
    snprintf(folder, sizeof folder, "%s", to);
    slash = strrchr(folder, '/');
    *slash = 0;
    CHECK(spm_directory_create(ctx, folder, NULL) == SPM_OK);
    return to;
}

static inline void put(const char *path, const void *data, size_t size)
{
    CHECK(spm_file_write(ctx, path, data, size, NULL) == SPM_OK);
}

static inline void put_text(const char *path, const char *text) { put(path, text, strlen(text)); }
#endif
