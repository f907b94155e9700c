/* Context, allocator, errors, files, threads, random numbers: sections CORE to RNG. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
  #define _GNU_SOURCE /* sched_setaffinity */
#endif
#include "failing.h"
#include <fenv.h>
#include <pthread.h>
#ifdef __linux__
  #include <sched.h>
#endif
#include <sys/stat.h>
#include <unistd.h>

static void test_context(void)
{
    spm_context *ctx = spm_context_create(NULL);
    CHECK(ctx != NULL);
    CHECK(spm_context_threads(ctx) >= 1);
    CHECK_INT(spm_context_status(ctx), SPM_OK);
    CHECK_STR(spm_context_error(ctx), "");
    CHECK_STR(spm_status_text(SPM_E_SHAPE), "shapes do not fit");
    spm_context_destroy(ctx);
    spm_context_destroy(NULL);
}

/* A process that may use one processor (taskset, a container) gets one thread. */
static void test_allowed_cores(void)
{
#ifdef __linux__
    cpu_set_t all, one;
    spm_context *ctx;
    int cpu = 0;
    if (sched_getaffinity(0, sizeof all, &all) != 0) SKIP("the processors of this process are not known");
    while (cpu < CPU_SETSIZE - 1 && !CPU_ISSET(cpu, &all)) cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) SKIP("the processors of this process cannot be chosen");
    ctx = spm_context_create(NULL);
    (void)sched_setaffinity(0, sizeof all, &all);
    CHECK(ctx != NULL);
    CHECK_INT(spm_context_threads(ctx), 1);
    spm_context_destroy(ctx);
#else
    SKIP("Linux only");
#endif
}

static void test_allocator(void)
{
    failing f = SPM_ZERO;
    spm_context *ctx = failing_context(&f, 3);
    long calls, i;
    CHECK(ctx != NULL);
    spm_context_destroy(ctx);
    CHECK_INT(f.live, 0);
    calls = f.calls;
    for (i = 1; i <= calls; i++) { /* every allocation fails once */
        f.calls = 0;
        f.fail_at = i;
        CHECK(failing_context(&f, 3) == NULL);
        CHECK_INT(f.live, 0);
    }
}

static void test_first_error_stays(void)
{
    spm_context *ctx = spm_context_create(NULL);
    uint8_t *data;
    size_t size;
    spm_error err = SPM_ZERO;
    char kept[600];
    CHECK_INT(spm_file_read(ctx, "no/such/file.one", &data, &size, NULL), SPM_E_IO);
    snprintf(kept, sizeof kept, "%s", spm_context_error(ctx));
    CHECK(strstr(kept, "no/such/file.one") != NULL);
    CHECK_INT(spm_file_read(ctx, "no/such/file.two", &data, &size, NULL), SPM_E_IO);
    CHECK_STR(spm_context_error(ctx), kept);
    CHECK_INT(spm_file_read(ctx, "no/such/file.three", &data, &size, &err), SPM_E_IO);
    CHECK(strstr(err.text, "file.three") != NULL);
    CHECK_STR(spm_context_error(ctx), kept);
    spm_context_clear_error(ctx);
    CHECK_INT(spm_context_status(ctx), SPM_OK);
    spm_context_destroy(ctx);
}

static void test_files(void)
{
    spm_context *ctx = spm_context_create(NULL);
    const char *build = getenv("SPURMEM_BUILD");
    char folder[512], path[600], part[700];
    uint8_t *data;
    size_t size;
    spm_error err = SPM_ZERO;
    FILE *file;
    snprintf(folder, sizeof folder, "%s/core_files/a/b", build ? build : "/tmp");
    CHECK_INT(spm_directory_create(ctx, folder, &err), SPM_OK);
    CHECK_INT(spm_directory_create(ctx, folder, &err), SPM_OK);
    snprintf(path, sizeof path, "%s/file", folder);
    snprintf(part, sizeof part, "%s.part", path);
    CHECK_INT(spm_file_write(ctx, path, "hello", 5, &err), SPM_OK);
    CHECK_INT(spm_file_read(ctx, path, &data, &size, &err), SPM_OK);
    CHECK_INT(size, 5);
    CHECK(data && memcmp(data, "hello", 6) == 0);
    spm_free(ctx, data);
    CHECK_INT(spm_file_write(ctx, path, "", 0, &err), SPM_OK);
    CHECK_INT(spm_file_read(ctx, path, &data, &size, &err), SPM_OK);
    CHECK_INT(size, 0);
    spm_free(ctx, data);
    file = fopen(part, "rb");
    CHECK(file == NULL); /* no temporary file stays */
    if (file) fclose(file);
    CHECK(spm_file_write(ctx, folder, "x", 1, &err) != SPM_OK); /* the name of a folder */
    CHECK(err.text[0] != 0);
    memset(&err, 0, sizeof err);
    snprintf(part, sizeof part, "%s/below", path); /* a folder below a file */
    CHECK_INT(spm_directory_create(ctx, part, &err), SPM_E_IO);
    CHECK(strstr(err.text, "cannot create the folder") && !strstr(err.text, "No such file"));
    if (access("/dev/full", F_OK) == 0) { /* a full disk */
        char link[640];
        memset(&err, 0, sizeof err);
        snprintf(link, sizeof link, "%s/full", folder);
        snprintf(part, sizeof part, "%s.part", link);
        remove(part);
        remove(link);
        if (symlink("/dev/full", part) == 0) {
            CHECK_INT(spm_file_write(ctx, link, "hello", 5, &err), SPM_E_IO);
            CHECK(strstr(err.text, link) != NULL);
            CHECK(access(link, F_OK) != 0);
        }
    }
    spm_context_destroy(ctx);
}

typedef struct tally {
    int64_t hits[1000];
    int64_t by_slot[8];  /* [slot]: simultaneous calls have different slots, so no two write the same cell */
    spm_context *ctx;
} tally;

static void count_task(void *arg, int64_t task, int slot)
{
    tally *t = (tally *)arg;
    t->hits[task]++;
    t->by_slot[slot]++;
}

static void nested_task(void *arg, int64_t task, int slot)
{
    tally *t = (tally *)arg;
    (void)slot;
    if (task % 100 == 0) {
        tally inner;
        int64_t i;
        memset(&inner, 0, sizeof inner);
        spm_parallel(t->ctx, 10, count_task, &inner);
        for (i = 0; i < 10; i++) t->hits[task] += inner.hits[i];
    } else t->hits[task]++;
}

static void test_parallel(void)
{
    int threads;
    for (threads = 1; threads <= 5; threads++) {
        spm_context_desc desc = SPM_ZERO;
        tally t;
        int round, i, wrong = 0;
        int64_t total = 0;
        spm_context *ctx;
        desc.threads = threads;
        ctx = spm_context_create(&desc);
        memset(&t, 0, sizeof t);
        t.ctx = ctx;
        for (round = 0; round < 200; round++) spm_parallel(ctx, 1000, count_task, &t);
        for (i = 0; i < 1000; i++) wrong += t.hits[i] != 200;
        CHECK_INT(wrong, 0);
        for (i = 0; i < 8; i++) total += t.by_slot[i];
        CHECK_INT(total, 200 * 1000);
        for (i = threads; i < 8; i++) CHECK_INT(t.by_slot[i], 0);
        memset(t.hits, 0, sizeof t.hits);
        spm_parallel(ctx, 1000, nested_task, &t);
        for (i = 0; i < 1000; i++) wrong += t.hits[i] != (i % 100 == 0 ? 10 : 1);
        CHECK_INT(wrong, 0);
        spm_parallel(ctx, 0, count_task, &t);
        spm_context_destroy(ctx);
    }
}

/* Two application threads share one context: one of them gets the pool, the other one works alone. */
static void *share_context(void *user)
{
    tally *t = (tally *)user;
    int round;
    for (round = 0; round < 300; round++) spm_parallel(t->ctx, 1000, count_task, t);
    return NULL;
}

static void test_shared_pool(void)
{
    static tally t[2];
    spm_context_desc desc = SPM_ZERO;
    spm_context *ctx;
    pthread_t other;
    int i, k, wrong = 0;
    memset(t, 0, sizeof t);
    desc.threads = 3;
    ctx = spm_context_create(&desc);
    t[0].ctx = t[1].ctx = ctx;
    if (pthread_create(&other, NULL, share_context, &t[1]) != 0) {
        spm_context_destroy(ctx);
        SKIP("no thread");
    }
    (void)share_context(&t[0]);
    pthread_join(other, NULL);
    for (k = 0; k < 2; k++) {
        for (i = 0; i < 1000; i++) wrong += t[k].hits[i] != 300;
    }
    CHECK_INT(wrong, 0);
    spm_context_destroy(ctx);
}

/* A context may be read while another thread fails: the sentence that is handed out is complete. */
static void *fail_often(void *user)
{
    uint8_t *data;
    size_t size;
    int i;
    for (i = 0; i < 200; i++) (void)spm_file_read((spm_context *)user, "no/such/file.one", &data, &size, NULL);
    return NULL;
}

static void test_shared_errors(void)
{
    spm_context_desc desc = SPM_ZERO;
    spm_context *ctx;
    pthread_t other;
    int i, torn = 0;
    desc.threads = 2;
    ctx = spm_context_create(&desc);
    if (spm_context_threads(ctx) < 2 || pthread_create(&other, NULL, fail_often, ctx) != 0) {
        spm_context_destroy(ctx);
        SKIP("built without threads");
    }
    for (i = 0; i < 200; i++) {
        const char *text = spm_context_error(ctx);
        torn += *text && !strstr(text, "cannot be opened: ");
    }
    pthread_join(other, NULL);
    CHECK_INT(torn, 0);
    CHECK_INT(spm_context_status(ctx), SPM_E_IO);
    spm_context_destroy(ctx);
}

static void sequential_executor(void *user, int64_t tasks, void (*fn)(void *arg, int64_t task, int slot), void *arg)
{
    int64_t task;
    ++*(int *)user;
    for (task = tasks - 1; task >= 0; task--) fn(arg, task, 1);
}

static void test_executor(void)
{
    spm_context_desc desc = SPM_ZERO;
    tally t;
    int calls = 0, i, wrong = 0;
    spm_context *ctx;
    desc.execute = sequential_executor;
    desc.execute_user = &calls;
    desc.threads = 2;
    ctx = spm_context_create(&desc);
    memset(&t, 0, sizeof t);
    spm_parallel(ctx, 1000, count_task, &t);
    for (i = 0; i < 1000; i++) wrong += t.hits[i] != 1;
    CHECK_INT(wrong, 0);
    CHECK_INT(calls, 1);
    spm_context_destroy(ctx);
}

/* An executor whose threads have the system's own denormal mode. */
static void foreign_executor(void *user, int64_t tasks, void (*fn)(void *arg, int64_t task, int slot), void *arg)
{
    int64_t task;
    (void)user;
    fesetenv(FE_DFL_ENV);
    for (task = 0; task < tasks; task++) fn(arg, task, 0);
}

static void halve_task(void *arg, int64_t task, int slot)
{
    volatile float *x = (volatile float *)arg + task;
    (void)slot;
    *x = *x * 0.5f;
}

/* Denormal numbers are treated alike on every thread, the executor's included. */
static void test_executor_denormals(void)
{
    float got[2][2];
    int way;
    for (way = 0; way < 2; way++) {
        spm_context_desc desc = SPM_ZERO;
        spm_context *ctx;
        desc.threads = 1;
        if (way) desc.execute = foreign_executor;
        ctx = spm_context_create(&desc);
        got[way][0] = got[way][1] = 1.5e-38f; /* half of it is no normal number */
        spm_parallel(ctx, 2, halve_task, got[way]);
        spm_context_destroy(ctx);
    }
    CHECK(memcmp(got[0], got[1], sizeof got[0]) == 0);
}

/* Known answers of Philox4x32-10 (Random123's kat_vectors): counter and key all zero, and all ones. */
static void test_philox(void)
{
    CHECK_INT(spm_random_u32(0, 0, 0), 0x6627e8d5u);
    CHECK_INT(spm_random_u32(UINT64_MAX, UINT64_MAX, UINT64_MAX), 0x408f276du);
}

static void test_random(void)
{
    double sum = 0.0, squares = 0.0, mean = 0.0;
    int64_t order[1000], i, n = 100000;
    int seen[1000], counts[7] = { 0, 0, 0, 0, 0, 0, 0 };
    for (i = 0; i < n; i++) {
        double u = (double)spm_random_uniform(1, 2, (uint64_t)i), z = (double)spm_random_normal(3, 4, (uint64_t)i);
        CHECK(u >= 0.0 && u < 1.0);
        mean += u / (double)n;
        sum += z / (double)n;
        squares += z * z / (double)n;
        counts[spm_random_below(5, 6, (uint64_t)i, 7)]++;
    }
    CHECK_NEAR(mean, 0.5, 0.005);
    CHECK_NEAR(sum, 0.0, 0.015);
    CHECK_NEAR(squares, 1.0, 0.02);
    for (i = 0; i < 7; i++) CHECK_NEAR(counts[i], (double)n / 7.0, 500);
    memset(seen, 0, sizeof seen);
    spm_random_permutation(9, 9, 1000, order);
    for (i = 0; i < 1000; i++) seen[order[i]]++;
    for (i = 0; i < 1000; i++) CHECK_INT(seen[i], 1);
    CHECK(spm_random_key(1, 2, 3) != spm_random_key(1, 3, 2));
}

static void test_isa(void)
{
    spm_isa isa;
    int i;
    CHECK(spm_isa_parse("avx2", &isa) && isa == SPM_ISA_AVX2);
    CHECK(!spm_isa_parse("sse9", &isa));
    for (i = SPM_ISA_C; i <= SPM_ISA_AVX512; i++) {
        spm_context_desc desc = SPM_ZERO;
        spm_context *ctx;
        desc.isa = (spm_isa)i;
        ctx = spm_context_create(&desc);
        if (i == SPM_ISA_C) CHECK(ctx != NULL);
        if (ctx) CHECK_INT(spm_context_isa(ctx), i);
        spm_context_destroy(ctx);
    }
}

static void test_clock_and_peak(void)
{
    spm_context_desc desc = SPM_ZERO;
    spm_context *ctx;
    double before = spm_seconds(), peak;
    desc.threads = 2;
    ctx = spm_context_create(&desc);
    peak = spm_measure_peak(ctx);
    CHECK(peak > 0.0 && peak < 1e6);
    CHECK(spm_seconds() > before);
    spm_context_destroy(ctx);
}

int main(void)
{
    TEST(test_context);
    TEST(test_allowed_cores);
    TEST(test_allocator);
    TEST(test_first_error_stays);
    TEST(test_files);
    TEST(test_parallel);
    TEST(test_shared_pool);
    TEST(test_shared_errors);
    TEST(test_executor);
    TEST(test_executor_denormals);
    TEST(test_philox);
    TEST(test_random);
    TEST(test_isa);
    TEST(test_clock_and_peak);
    return TEST_END;
}
