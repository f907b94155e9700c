/* test.h - the tiny harness of the test programs.
 *
 * A test program is: #include "test.h", functions that use CHECK..., and a main() that calls TEST(name) for each and
 * returns TEST_END.  One line is printed per failing check and one closing line `NAME: N passed, N failed, N skipped`
 * that tests/run.sh adds up.  A test counts as failed when any of its checks failed. */
#ifndef SPURMEM_TEST_H
#define SPURMEM_TEST_H
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* lstat and symlink, which -std=c99 hides otherwise */
#endif
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed, test_skipped, test_bad_checks, test_skip_now;

#define CHECK(cond) ((cond) ? (void)0 : test_report(__FILE__, __LINE__, #cond))
#define CHECK_MSG(cond, text) ((cond) ? (void)0 : test_report(__FILE__, __LINE__, text))
#define CHECK_NEAR(a, b, tolerance) test_near(__FILE__, __LINE__, #a " ~ " #b, (double)(a), (double)(b), (double)(tolerance))
#define CHECK_INT(a, b) test_int(__FILE__, __LINE__, #a " == " #b, (long long)(a), (long long)(b))
#define CHECK_STR(a, b) test_str(__FILE__, __LINE__, #a " == " #b, (a), (b))
#define SKIP(reason) do { printf("    skip: %s\n", (reason)); test_skip_now = 1; return; } while (0)
#define TEST(function) test_run(#function, function)
#define TEST_END test_end(__FILE__)

static inline void test_report(const char *file, int line, const char *text)
{
    if (++test_bad_checks <= 20) printf("    %s:%d: failed: %s\n", file, line, text);
}

static inline void test_near(const char *file, int line, const char *text, double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance)) {
        char buffer[400];
        snprintf(buffer, sizeof buffer, "%.200s: %.9g against %.9g, off by %.3g, allowed %.3g", text, a, b, a - b, tolerance);
        test_report(file, line, buffer);
    }
}

static inline void test_int(const char *file, int line, const char *text, long long a, long long b)
{
    if (a != b) {
        char buffer[400];
        snprintf(buffer, sizeof buffer, "%.200s: %lld against %lld", text, a, b);
        test_report(file, line, buffer);
    }
}

static inline void test_str(const char *file, int line, const char *text, const char *a, const char *b)
{
    if (!a || !b || strcmp(a, b) != 0) {
        char buffer[900];
        snprintf(buffer, sizeof buffer, "%.100s: \"%.350s\" against \"%.350s\"", text, a ? a : "(null)", b ? b : "(null)");
        test_report(file, line, buffer);
    }
}

static inline void test_run(const char *name, void (*function)(void))
{
    test_bad_checks = test_skip_now = 0;
    function();
    if (test_bad_checks) { test_failed++; printf("  FAIL %s (%d checks)\n", name, test_bad_checks); }
    else if (test_skip_now) test_skipped++;
    else test_passed++;
    fflush(stdout);
}

static inline int test_end(const char *file)
{
    const char *base = strrchr(file, '/');
    printf("%s: %d passed, %d failed, %d skipped\n", base ? base + 1 : file, test_passed, test_failed, test_skipped);
    return test_failed != 0;
}

/* ---- files ---- */

/* SPURMEM_BUILD/NAME, or /tmp/spurmem/NAME: the folder that a test may write into. */
static inline void test_folder(char *path, size_t size, const char *name)
{
    const char *build = getenv("SPURMEM_BUILD");
    snprintf(path, size, "%s/%s", build && *build ? build : "/tmp/spurmem", name);
}

/* A whole file with a 0 behind it (free it); NULL where there is none. */
static inline char *test_read(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    long n = file && fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    char *text = n < 0 ? NULL : (char *)malloc((size_t)n + 1);
    if (text) {
        rewind(file);
        n = (long)fread(text, 1, (size_t)n, file);
        text[n] = 0;
    }
    if (file) fclose(file);
    if (size) *size = text ? (size_t)n : 0;
    return text;
}

static inline int test_exists(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file) fclose(file);
    return file != NULL;
}

/* 1 if both files are there and hold the same bytes, at least one. */
static inline int test_same_files(const char *a, const char *b)
{
    size_t n, m;
    char *x = test_read(a, &n), *y = test_read(b, &m);
    int same = x && y && n > 0 && n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}
#endif
