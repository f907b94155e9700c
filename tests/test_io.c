/* Disks that are full, folders that cannot be written, files that end too early: every writer and the readers of what
 * training leaves behind.  Full disks are played by a limit on the size of files (RLIMIT_FSIZE), which fails a write at any
 * chosen byte, and by links to /dev/full. */
#include "failing.h"
#include "scratch.h"
#include <signal.h>
#include <sys/resource.h>

static failing memory; /* counts blocks only: nothing fails here for want of memory */

/* A limit on the size of every file written from here on; -1: none. */
static void limit_files(long bytes)
{
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes < 0 ? limit.rlim_max : (rlim_t)bytes;
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

typedef spm_status (*writer)(spm_context *ctx, const char *path, spm_error *err);

static spm_status write_file(spm_context *ctx, const char *path, spm_error *err)
{
    static char data[100000];
    return spm_file_write(ctx, path, data, sizeof data, err);
}

static spm_status write_archive(spm_context *ctx, const char *path, spm_error *err)
{
    static float values[20000];
    const int64_t shape[1] = { 20000 };
    spm_archive_writer *archive = spm_archive_create(ctx, path, strstr(path, ".pth") ? SPM_ARCHIVE_TORCH : SPM_ARCHIVE_SAFETENSORS, err);
    if (!archive) return err->status;
    spm_archive_add(archive, "a", SPM_F32, 1, shape);
    spm_archive_add(archive, "b", SPM_F32, 1, shape);
    spm_archive_put(archive, values);
    spm_archive_put(archive, values);
    return spm_archive_commit(archive, err);
}

static spm_status write_array(spm_context *ctx, const char *path, spm_error *err)
{
    static float values[20000];
    const int64_t shape[2] = { 200, 100 };
    return spm_npy_save_f32(ctx, path, values, 2, shape, err);
}

static spm_status write_checkpoint(spm_context *ctx, const char *path, spm_error *err)
{
    spm_checkpoint_info info = SPM_ZERO;
    spm_model *model;
    if (tiny_arch(ctx, TINY_VIT, &info.arch, err)) return err->status;
    model = spm_model_build(ctx, &info.arch, 1, err);
    if (!model) return err->status;
    info.has_arch = 1;
    info.transform = spm_transform_make(16, 16);
    (void)spm_checkpoint_save(model, path, &info, err);
    spm_model_destroy(model);
    return err->status;
}

static spm_status write_report(spm_context *ctx, const char *path, spm_error *err)
{
    const char *runs[1];
    spm_report_desc desc = SPM_ZERO;
    runs[0] = in_scratch("whole");
    desc.runs = runs;
    desc.n_runs = 1;
    return spm_report_write(ctx, &desc, path, err);
}

/* The writer must fail with SPM_E_IO and a sentence that names the path; nothing may stay but what was there. */
static void refused(const char *name, writer write, const char *path, const char *what)
{
    spm_error err = SPM_ZERO;
    spm_context *ctx = failing_context(&memory, 1);
    spm_status status = write(ctx, path, &err);
    char text[1500];
    spm_context_destroy(ctx);
    snprintf(text, sizeof text, "%s, %s: %s \"%.400s\"", name, what, spm_status_text(status), err.text);
    CHECK_MSG(status == SPM_E_IO && err.status == SPM_E_IO, text);
    CHECK_MSG(strstr(err.text, path) != NULL, text);
    CHECK_MSG(memory.live == 0, text);
}

static void try_writer(const char *name, writer write, const char *file)
{
    spm_error err = SPM_ZERO;
    char path[900], part[920];
    uint8_t *whole = NULL, *now = NULL;
    size_t size = 0, again = 0;
    long limit;
    snprintf(path, sizeof path, "%s", in_scratch(file));
    snprintf(part, sizeof part, "%s.part", path);
    CHECK_INT(write(calm, path, &err), SPM_OK);
    CHECK_INT(spm_file_read(calm, path, &whole, &size, &err), SPM_OK);
    for (limit = 0; limit < (long)size; limit += 1 + limit * 2 / 3) {
        char what[80];
        snprintf(what, sizeof what, "disk full at byte %ld of %ld", limit, (long)size);
        limit_files(limit);
        refused(name, write, path, what);
        limit_files(-1);
        CHECK(access(part, F_OK) != 0);
    }
    limit_files((long)size - 1);
    refused(name, write, path, "disk full at the last byte");
    limit_files(-1);
    /* the file that was there is still there */
    CHECK_INT(spm_file_read(calm, path, &now, &again, &err), SPM_OK);
    CHECK(again == size && now && memcmp(now, whole, size) == 0);
    spm_free(calm, now);
    if (access("/dev/full", W_OK) == 0) {
        CHECK_INT(symlink("/dev/full", part), 0);
        refused(name, write, path, "/dev/full");
        CHECK(access(part, F_OK) != 0);
    }
    memset(&err, 0, sizeof err);
    CHECK_INT(write(calm, path, &err), SPM_OK);
    (void)remove(path);
    snprintf(path, sizeof path, "%s/%s", in_scratch("no_folder"), file + 2);
    refused(name, write, path, "no such folder");
    snprintf(path, sizeof path, "%s/%s", in_scratch("plain"), file + 2);
    refused(name, write, path, "below a file");
    snprintf(path, sizeof path, "%s", in_scratch("taken"));
    strcat(path, strrchr(file, '.'));
    CHECK_INT(spm_directory_create(calm, path, NULL), SPM_OK);
    refused(name, write, path, "a folder of that name");
    CHECK_INT(rmdir(path), 0);
    if (geteuid() != 0) { /* the superuser may write everywhere */
        snprintf(path, sizeof path, "%s/%s", in_scratch("locked"), file + 2);
        refused(name, write, path, "a folder without write permission");
    }
    check_folder(name, in_scratch("w"), 0);
    check_folder(name, scratch, 0);
    spm_free(calm, whole);
}

static void files(void)
{
    try_writer("file", write_file, "w/a.bin");
}

static void archives(void)
{
    try_writer("safetensors", write_archive, "w/a.safetensors");
    try_writer("torch", write_archive, "w/a.pth");
    try_writer("npy", write_array, "w/a.npy");
}

static void checkpoints(void)
{
    try_writer("checkpoint", write_checkpoint, "w/c.safetensors");
    try_writer("torch checkpoint", write_checkpoint, "w/c.pth");
}

static void reports(void)
{
    try_writer("report", write_report, "w/r.html");
}

/* ---- training ---- */

static spm_status train(const char *out, int resume, const char *log_steps, spm_error *err)
{
    spm_context *ctx = failing_context(&memory, 1);
    spm_dataset *set = open_set(ctx, "birds", err);
    spm_train_desc desc = tiny_training(ctx, SPM_METHOD_INTERVENE, TINY_VIT, out, err);
    spm_train_result result;
    desc.epochs = 2;
    desc.resume = resume;
    desc.log_steps = log_steps;
    if (set) (void)spm_train(ctx, set, &desc, &result, err);
    spm_dataset_close(set);
    spm_context_destroy(ctx);
    CHECK_INT(memory.live, 0);
    return err->status;
}

static long file_size(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 ? (long)info.st_size : -1;
}

/* The same run on a disk that is full for any file beyond some size, then resumed with room: it ends in the same bytes. */
static void full_disk(void)
{
    char run[500], steps[600], text[900];
    long largest, limit;
    snprintf(run, sizeof run, "%s", in_scratch("full"));
    snprintf(steps, sizeof steps, "%s/steps.jsonl", run);
    largest = file_size(in_scratch("whole/state.safetensors"));
    CHECK(largest > 1000);
    for (limit = 0; limit < largest; limit += 1 + limit / 2) {
        spm_error err = SPM_ZERO;
        wipe(run, 0);
        limit_files(limit);
        (void)train(run, 0, steps, &err);
        limit_files(-1);
        snprintf(text, sizeof text, "training, disk full at byte %ld: %s \"%.400s\"", limit, spm_status_text(err.status), err.text);
        CHECK_MSG(err.status == SPM_E_IO && strstr(err.text, run) != NULL, text);
        check_folder("training on a full disk", run, 1);
        if (file_size(in_scratch("full/config.json")) < 0) continue; /* the run had not begun */
        memset(&err, 0, sizeof err);
        CHECK_INT(train(run, 1, steps, &err), SPM_OK);
        CHECK_STR(err.text, "");
        CHECK(test_same_files(in_scratch("full/last.safetensors"), in_scratch("whole/last.safetensors")));
        CHECK(test_same_files(steps, in_scratch("whole/steps.jsonl")));
    }
}

/* One file of the run folder on a full disk; with room again, the run goes on to the same bytes. */
static void full_file(const char *name, const char *link)
{
    spm_error err = SPM_ZERO;
    char run[500], steps[600], bad[600], text[900];
    snprintf(run, sizeof run, "%s", in_scratch("full"));
    snprintf(steps, sizeof steps, "%s/steps.jsonl", run);
    snprintf(bad, sizeof bad, "%s/%s", run, link);
    wipe(run, 0);
    CHECK_INT(symlink("/dev/full", bad), 0);
    (void)train(run, 0, steps, &err);
    snprintf(text, sizeof text, "%s on a full disk: %s \"%.400s\"", name, spm_status_text(err.status), err.text);
    CHECK_MSG(err.status == SPM_E_IO && strstr(err.text, name) != NULL, text);
    CHECK(access("/dev/full", W_OK) == 0);
    (void)remove(bad);
    check_folder(name, run, 1);
    if (file_size(in_scratch("full/config.json")) < 0) return; /* the run had not begun */
    memset(&err, 0, sizeof err);
    CHECK_INT(train(run, 1, steps, &err), SPM_OK);
    CHECK_STR(err.text, "");
    CHECK(test_same_files(in_scratch("full/last.safetensors"), in_scratch("whole/last.safetensors")));
}

static void full_files(void)
{
    if (access("/dev/full", W_OK) != 0) SKIP("there is no /dev/full");
    full_file("config.json", "config.json.part");
    full_file("state.safetensors", "state.safetensors.part");
    full_file("metrics.jsonl", "metrics.jsonl");
    full_file("best.safetensors", "best.safetensors.part");
    full_file("last.safetensors", "last.safetensors.part");
}

static void folders(void)
{
    spm_error err = SPM_ZERO;
    CHECK_INT(train(in_scratch("plain/run"), 0, NULL, &err), SPM_E_IO);
    CHECK_MSG(strstr(err.text, "plain") != NULL, err.text);
    memset(&err, 0, sizeof err);
    CHECK_INT(train(in_scratch("new/run"), 0, in_scratch("no_folder/steps.jsonl"), &err), SPM_E_IO);
    CHECK_MSG(strstr(err.text, "no_folder/steps.jsonl") != NULL, err.text);
    wipe(in_scratch("new"), 1);
    if (geteuid() != 0) {
        memset(&err, 0, sizeof err);
        CHECK_INT(train(in_scratch("locked/run"), 0, NULL, &err), SPM_E_IO);
        CHECK_MSG(strstr(err.text, "locked") != NULL, err.text);
    }
}

/* ---- inputs that end too early ---- */

static void cut(const char *from, const char *to, long bytes)
{
    uint8_t *data = NULL;
    size_t size = 0;
    FILE *file = fopen(to, "wb");
    CHECK(file != NULL && spm_file_read(calm, from, &data, &size, NULL) == SPM_OK);
    if (file) {
        CHECK(fwrite(data, 1, (size_t)bytes, file) == (size_t)bytes);
        fclose(file);
    }
    spm_free(calm, data);
}

static void short_checkpoints(void)
{
    static const char kinds[2][20] = { "w/s.safetensors", "w/s.pth" };
    int k;
    for (k = 0; k < 2; k++) {
        spm_error err = SPM_ZERO;
        char whole[500], path[500];
        long size, n;
        snprintf(whole, sizeof whole, "%s", in_scratch(kinds[k]));
        snprintf(path, sizeof path, "%s", in_scratch("short"));
        CHECK_INT(write_checkpoint(calm, whole, &err), SPM_OK);
        size = file_size(whole);
        for (n = 0; n < size; n += n < 200 || n > size - 300 ? 7 : size / 60) {
            spm_context *ctx = failing_context(&memory, 1);
            spm_arch arch;
            spm_model *model;
            memset(&err, 0, sizeof err);
            cut(whole, path, n);
            CHECK_INT(tiny_arch(ctx, TINY_VIT, &arch, &err), SPM_OK);
            model = spm_model_build(ctx, &arch, 0, &err);
            CHECK(spm_checkpoint_load(model, path, 0, &err) != SPM_OK);
            CHECK_MSG(strstr(err.text, path) != NULL, err.text);
            spm_model_destroy(model);
            spm_context_destroy(ctx);
            CHECK_INT(memory.live, 0);
        }
        (void)remove(whole);
        (void)remove(path);
    }
}

/* A run folder of which one file is cut: going on is refused, with the file's name. */
static void short_states(void)
{
    static const char names[3][20] = { "state.safetensors", "config.json", "metrics.jsonl" };
    int i, j;
    for (i = 0; i < 3; i++) {
        char from[600], to[600];
        long size = file_size((snprintf(from, sizeof from, "%s/%s", in_scratch("whole"), names[i]), from));
        for (j = 0; j < 8; j++) {
            spm_error err = SPM_ZERO;
            int k;
            wipe(in_scratch("full"), 0);
            for (k = 0; k < 3; k++) {
                snprintf(from, sizeof from, "%s/%s", in_scratch("whole"), names[k]);
                snprintf(to, sizeof to, "%s/%s", in_scratch("full"), names[k]);
                cut(from, to, k == i ? size * j / 8 : file_size(from));
            }
            CHECK(train(in_scratch("full"), 1, NULL, &err) != SPM_OK);
            CHECK_MSG(strstr(err.text, names[i]) != NULL, err.text);
        }
    }
}

static void short_pictures(void)
{
    static const char names[2][10] = { "00.jpg", "01.png" };
    int i;
    for (i = 0; i < 2; i++) {
        char whole[600], path[600];
        long size, n;
        snprintf(whole, sizeof whole, "%s/birds/p/%s", scratch, names[i]);
        snprintf(path, sizeof path, "%s/w/short_%s", scratch, names[i]);
        size = file_size(whole);
        for (n = 0; n < size - 24; n += 5) { /* the last bytes are checksums and say that the picture ends */
            spm_error err = SPM_ZERO;
            spm_context *ctx = failing_context(&memory, 1);
            spm_image image = SPM_ZERO;
            cut(whole, path, n);
            CHECK(spm_image_load(ctx, path, NULL, &image, &err) != SPM_OK);
            CHECK_MSG(strstr(err.text, path) != NULL, err.text);
            CHECK(image.pixels == NULL);
            spm_context_destroy(ctx);
            CHECK_INT(memory.live, 0);
        }
        (void)remove(path);
    }
}

static void read_folders(void)
{
    spm_error err = SPM_ZERO;
    uint8_t *data;
    size_t size;
    CHECK_INT(spm_file_read(calm, in_scratch("w"), &data, &size, &err), SPM_E_IO);
    CHECK_MSG(strstr(err.text, "memory") == NULL, err.text);
    CHECK(spm_archive_open(calm, in_scratch("w"), &err) == NULL);
    CHECK(spm_file_read(calm, "/", &data, &size, NULL) == SPM_E_IO);
    CHECK_MSG(strstr(spm_context_error(calm), "memory") == NULL, spm_context_error(calm));
    spm_context_clear_error(calm);
}

static void write_inputs(void)
{
    spm_error err = SPM_ZERO;
    put_birds("birds", 16);
    put_text("w/.keep", "");
    put_text("full/.keep", "");
    put_text("plain", "a file");
    put_text("locked/.keep", "");
    CHECK_INT(chmod(in_scratch("locked"), 0555), 0);
    CHECK_INT(train(in_scratch("whole"), 0, in_scratch("whole_steps.jsonl"), &err), SPM_OK);
    CHECK_STR(err.text, "");
    CHECK(rename(in_scratch("whole_steps.jsonl"), in_scratch("whole/steps.jsonl")) == 0);
}

int main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    pthread_mutex_init(&memory.lock, NULL);
    scratch_begin("io");
    TEST(write_inputs);
    TEST(files);
    TEST(archives);
    TEST(checkpoints);
    TEST(reports);
    TEST(full_disk);
    TEST(full_files);
    TEST(folders);
    TEST(short_checkpoints);
    TEST(short_states);
    TEST(short_pictures);
    TEST(read_folders);
    (void)chmod(in_scratch("locked"), 0755);
    scratch_end();
    pthread_mutex_destroy(&memory.lock);
    return TEST_END;
}
