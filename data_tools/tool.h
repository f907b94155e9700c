/* tool.h - what the data tools share: options, progress, and a folder of pictures in the Waterbirds layout.
 *
 * Include it first: it brings spurmem.h, with the implementation unless SPURMEM_LINKED says that an object has it.  So
 * every tool compiles alone, from any folder:
 *
 *     cc -O2 data_tools/make_dominoes.c -lm                             one thread
 *     cc -O2 -DSPURMEM_THREADS data_tools/make_dominoes.c -lm -lpthread all cores
 */
#ifndef SPURMEM_DATA_TOOL_H
#define SPURMEM_DATA_TOOL_H
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
  #define _POSIX_C_SOURCE 200809L /* isatty, opendir */
#endif
#ifndef SPURMEM_LINKED
  #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
  #include <io.h>
  #define tool_terminal() _isatty(2)
#else
  #include <unistd.h>
  #define tool_terminal() isatty(2)
#endif

static volatile sig_atomic_t tool_stop; /* 1 after Ctrl-C */

static inline void tool_interrupt(int number)
{
    (void)number;
    tool_stop = 1;
}

/* ---- options ---- */

/* type: s text, i whole number in [low, high], n number in [low, high], b switch.  `word` stands for the value in the
 * help; with '|' in it (and small letters) only these words are taken. */
typedef struct tool_option {
    const char *name;
    char type;
    const char *word, *fallback, *help;
    double low, high;
} tool_option;

typedef struct tool {
    const char *name;          /* of the program, for its sentences */
    const char *about;         /* the help's text before and behind the options */
    const char *notes;
    const tool_option *options;
    int count;
    int operand;               /* 1: a word without dashes is the value of the first option */
    const char *value[32];     /* NULL: not given and no default */
    int given[32];
    int quiet;
    double began, shown;
} tool;

/* Options that several tools have. */
#define TOOL_MNIST { "mnist", 's', "DIR", NULL, "folder (or .tar) of MNIST's four idx files, plain or .gz", 0, 0 }
#define TOOL_OUT   { "out", 's', "DIR", NULL, "the folder to write", 0, 0 }
#define TOOL_SEED  { "seed", 'i', "S", "0", "of everything random", 0, 9007199254740992.0 }
#define TOOL_FORCE { "force", 'b', NULL, NULL, "write into a folder that holds something else", 0, 0 }

static inline tool tool_make(const char *name, const char *about, const char *notes, const tool_option *options, size_t count)
{
    tool t = SPM_ZERO;
    t.name = name;
    t.about = about;
    t.notes = notes;
    t.options = options;
    t.count = (int)count;
    return t;
}

/* Prints "NAME: ..." as a line on stderr; returns 1, the exit status of a failed run. */
static inline int tool_fail(const tool *t, const char *format, ...)
{
    va_list list;
    fprintf(stderr, "%s: ", t->name);
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    return 1;
}

static inline void tool_help(const tool *t)
{
    int i;
    printf("%s\noptions (defaults in brackets):\n", t->about);
    for (i = 0; i < t->count; i++) {
        const tool_option *o = &t->options[i];
        char left[80];
        snprintf(left, sizeof left, "  --%s%s%s", o->name, o->word ? " " : "", o->word ? o->word : "");
        printf("%-28s %s", left, o->help);
        if (o->fallback && *o->fallback) printf(" (%s)", o->fallback);
        printf("\n");
    }
    printf("%-28s no progress\n%-28s this text\n\n%s"
           "Exit status: 0 done, 1 a file or a run failed, 2 the command line is wrong.\n", "  --quiet", "  --help",
           t->notes);
}

/* Letters to insert, delete or replace on the way from a to b (Levenshtein). */
static inline int tool_edits(const char *a, const char *b)
{
    int row[48], n = (int)strlen(b), i, j;
    if (n >= 48) return 99;
    for (j = 0; j <= n; j++) row[j] = j;
    for (i = 0; a[i]; i++) {
        int corner = row[0];
        row[0] = i + 1;
        for (j = 1; j <= n; j++) {
            int above = row[j], best = corner + (a[i] != b[j - 1]);
            if (above + 1 < best) best = above + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
            corner = above;
        }
    }
    return row[n];
}

/* 1 if `value` is what the option takes; else a sentence is on stderr. */
static inline int tool_takes(const tool *t, const tool_option *o, const char *value)
{
    char *end;
    double number;
    if (o->type == 's') {
        const char *at = o->word;
        size_t n = strlen(value), m;
        if (!*value) {
            tool_fail(t, "--%s: a value is wanted: %s", o->name, o->word);
            return 0;
        }
        if (!strchr(o->word, '|') || (*o->word >= 'A' && *o->word <= 'Z')) return 1;
        for (; *at; at += m + (at[m] == '|')) {
            m = strcspn(at, "|");
            if (m == n && strncmp(at, value, n) == 0) return 1;
        }
        tool_fail(t, "--%s %s: one of %s is wanted", o->name, value, o->word);
        return 0;
    }
    number = strtod(value, &end);
    if (end != value && !*end && number >= o->low && number <= o->high && (o->type == 'n' || floor(number) == number))
        return 1;
    tool_fail(t, "--%s %s: a %snumber from %.15g to %.15g is wanted", o->name, value, o->type == 'i' ? "whole " : "",
              o->low, o->high);
    return 0;
}

/* Fills values; 0 done, 2 wrong (a sentence is on stderr), -1 the help was printed. */
static inline int tool_parse(tool *t, int argc, char **argv)
{
    int i, k, best;
    t->began = t->shown = spm_seconds();
    signal(SIGINT, tool_interrupt);
    signal(SIGTERM, tool_interrupt);
    for (k = 0; k < t->count; k++) t->value[k] = t->options[k].fallback;
    for (i = 1; i < argc; i++) {
        const char *word = argv[i], *equals = strchr(word, '=');
        size_t length = equals ? (size_t)(equals - word) : strlen(word);
        char name[48];
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            tool_help(t);
            return -1;
        }
        if (strcmp(word, "--quiet") == 0) {
            t->quiet = 1;
            continue;
        }
        if (t->operand && word[0] != '-' && !t->given[0]) {
            t->given[0] = 1;
            t->value[0] = word;
            continue;
        }
        if (strncmp(word, "--", 2) != 0 || length < 3) {
            tool_fail(t, "%s: options begin with --; --help lists them", word);
            return 2;
        }
        snprintf(name, sizeof name, "%.*s", (int)(length - 2 < 40 ? length - 2 : 40), word + 2);
        for (k = best = 0; k < t->count && strcmp(t->options[k].name, name) != 0; k++)
            if (tool_edits(name, t->options[k].name) < tool_edits(name, t->options[best].name)) best = k;
        if (k == t->count) {
            if (tool_edits(name, t->options[best].name) <= 3)
                tool_fail(t, "unknown option --%s; did you mean --%s?", name, t->options[best].name);
            else
                tool_fail(t, "unknown option --%s; --help lists them all", name);
            return 2;
        }
        t->given[k] = 1;
        if (t->options[k].type == 'b') {
            if (equals) {
                tool_fail(t, "--%s takes no value", name);
                return 2;
            }
            t->value[k] = "on";
            continue;
        }
        if (!equals && (i + 1 >= argc || strncmp(argv[i + 1], "--", 2) == 0)) {
            tool_fail(t, "--%s: a value is missing: %s", name, t->options[k].word);
            return 2;
        }
        t->value[k] = equals ? equals + 1 : argv[++i];
        if (!tool_takes(t, &t->options[k], t->value[k])) return 2;
    }
    for (k = 0; k < t->count; k++) { /* what has no default must be given; "" stands for "none" */
        if (t->value[k] || t->options[k].type == 'b') continue;
        tool_fail(t, "--%s %s is missing: %s; --help explains", t->options[k].name, t->options[k].word,
                  t->options[k].help);
        return 2;
    }
    return 0;
}

/* What every main does: reads the command line and runs the tool with a context.  The exit status. */
static inline int tool_main(tool *t, int argc, char **argv, int (*run)(tool *t, spm_context *ctx))
{
    spm_context *ctx;
    int status = tool_parse(t, argc, argv);
    if (status) return status < 0 ? 0 : status;
    ctx = spm_context_create(NULL);
    status = ctx ? run(t, ctx) : tool_fail(t, "out of memory");
    spm_context_destroy(ctx);
    return status;
}

static inline const char *tool_value(const tool *t, int option) { return t->value[option]; }
static inline double tool_number(const tool *t, int option) { return strtod(t->value[option], NULL); }
static inline long tool_whole(const tool *t, int option) { return (long)tool_number(t, option); }
static inline int tool_on(const tool *t, int option) { return t->value[option] != NULL; }
static inline int tool_is(const tool *t, int option, const char *word) { return strcmp(t->value[option], word) == 0; }
static inline uint64_t tool_seed(const tool *t, int option) { return (uint64_t)tool_number(t, option); }

/* ---- progress ---- */

static inline void tool_progress(tool *t, long done, long total)
{
    double now = spm_seconds(), rate;
    if (t->quiet || (done < total && now - t->shown < (tool_terminal() ? 0.1 : 5.0))) return;
    t->shown = now;
    rate = (double)done / (now - t->began > 1e-6 ? now - t->began : 1e-6);
    if (tool_terminal()) {
        char bar[31];
        int i;
        for (i = 0; i < 30; i++) bar[i] = i < (int)(30 * done / total) ? '#' : '.';
        bar[30] = 0;
        fprintf(stderr, "\r[%s] %ld/%ld pictures  %.0f/s  %.0f s left \033[K%s", bar, done, total, rate,
                (double)(total - done) / rate, done == total ? "\n" : "");
    } else {
        fprintf(stderr, "%ld/%ld pictures, %.0f/s, %.0f s left\n", done, total, rate, (double)(total - done) / rate);
    }
}

/* ---- text that grows ---- */

typedef struct tool_text {
    char *data;
    size_t length, room;
    int failed;
} tool_text;

static inline void tool_add(tool_text *text, const char *format, ...)
{
    char line[2600];
    int n;
    va_list list;
    va_start(list, format);
    n = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if (n < 0 || n >= (int)sizeof line) text->failed = 1;
    if (!text->failed && text->length + (size_t)n + 1 > text->room) {
        size_t room = 2 * text->room + (size_t)n + 4096;
        char *bigger = (char *)realloc(text->data, room);
        if (bigger) {
            text->data = bigger;
            text->room = room;
        } else {
            text->failed = 1;
        }
    }
    if (text->failed) return;
    memcpy(text->data + text->length, line, (size_t)n + 1);
    text->length += (size_t)n;
}

/* A field of a CSV line: quoted where it must be. */
static inline void tool_add_field(tool_text *text, const char *field)
{
    if (!strpbrk(field, ",\"\r\n")) {
        tool_add(text, "%s", field);
        return;
    }
    tool_add(text, "\"");
    for (; *field; field++) tool_add(text, *field == '"' ? "\"\"" : "%c", *field);
    tool_add(text, "\"");
}

/* ---- the folder that is made ---- */

/* One picture to make.  `make` gets its index. */
typedef struct tool_item {
    char file[256];           /* below the folder; .jpg or .png */
    char place[256];          /* place_filename */
    int y, a, split;
    long source, other;       /* the tool's own: which pictures it is made from */
} tool_item;

/* Makes the item picture `number` of a split, which its file is called by. */
static inline void tool_item_number(tool_item *item, int split, long number, const char *format)
{
    item->split = split;
    snprintf(item->file, sizeof item->file, "images/%s/%05ld.%s", spm_split_name((spm_split)split), number, format);
}

typedef void (*tool_make_fn)(void *user, const tool_item *item, long index, spm_image *image, spm_error *err);

#define TOOL_BATCH 64

typedef struct tool_set {
    tool *t;
    spm_context *ctx;
    const char *out;
    int classes, confounders, quality, half_chroma;
    const char *class_names, *confounder_names; /* a line each; NULL: none */
    const tool_item *items;
    long count;
    tool_make_fn make;
    void *user;
    long first;               /* of the batch */
    uint8_t *data[TOOL_BATCH];
    size_t size[TOOL_BATCH];
    spm_error error[TOOL_BATCH];
} tool_set;

/* A set to be written below `out`, with two classes and two confounders; the caller changes what is otherwise. */
static inline tool_set tool_set_make(tool *t, spm_context *ctx, const char *out, const tool_item *items, long count,
                                     tool_make_fn make, void *user)
{
    tool_set set;
    memset(&set, 0, sizeof set);
    set.t = t;
    set.ctx = ctx;
    set.out = out;
    set.classes = set.confounders = 2;
    set.items = items;
    set.count = count;
    set.make = make;
    set.user = user;
    return set;
}

static inline int tool_path(const tool_set *set, const char *name, char *path, size_t size)
{
    return snprintf(path, size, "%s/%s", set->out, name) < (int)size;
}

static inline void tool_make_one(void *user, int64_t task, int slot)
{
    tool_set *set = (tool_set *)user;
    const tool_item *item = &set->items[set->first + (long)task];
    spm_image image;
    spm_error *err = &set->error[task];
    (void)slot;
    memset(&image, 0, sizeof image);
    memset(err, 0, sizeof *err);
    set->data[task] = NULL;
    set->make(set->user, item, set->first + (long)task, &image, err);
    if (!err->status && strstr(item->file, ".png"))
        spm_image_encode_png(set->ctx, &image, &set->data[task], &set->size[task], err);
    else if (!err->status)
        spm_image_encode_jpeg(set->ctx, &image, set->quality, set->half_chroma, &set->data[task], &set->size[task], err);
    spm_image_free(set->ctx, &image);
}

/* Writes one picture under a temporary name and renames it; not flushed to the disk one by one: metadata.csv is written
 * last, and flushed, and without it the folder is not a data set. */
static inline int tool_write_picture(const char *path, const uint8_t *data, size_t size)
{
    char temporary[1500];
    FILE *file;
    int reason = 0;
    snprintf(temporary, sizeof temporary, "%s.part", path);
    errno = 0;
    file = fopen(temporary, "wb");
    if (!file) return errno ? errno : EIO;
    if (fwrite(data, 1, size, file) != size) reason = errno ? errno : EIO;
    if (fclose(file) != 0 && !reason) reason = errno ? errno : EIO;
#if defined(_WIN32)
    (void)remove(path); /* rename does not replace there */
#endif
    if (!reason && rename(temporary, path) != 0) reason = errno ? errno : EIO;
    if (reason) (void)remove(temporary);
    return reason;
}

/* 1 if the folder is new or empty, 2 if this tool has made it before; if it holds something else 1 with `force`, or 0 and
 * a sentence on stderr. */
static inline int tool_may_write(const tool_set *set, const char *marker, int force)
{
    DIR *folder = opendir(set->out);
    struct dirent *entry;
    int may = folder || errno != ENOTDIR;
    while (folder && (entry = readdir(folder)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (strcmp(entry->d_name, marker) == 0) {
            may = 2;
            break;
        }
        may = 0;
    }
    if (folder) closedir(folder);
    if (!may && !force)
        tool_fail(set->t, "%s holds something else; name an empty or new folder, or give --force", set->out);
    return may || !force ? may : 1;
}

/* Removes the pictures of an earlier set of this tool, which its table names. */
static inline void tool_remove_earlier(const tool_set *set)
{
    char path[1400];
    uint8_t *data = NULL;
    size_t size;
    spm_csv *csv = NULL;
    spm_error ignored;
    int64_t row;
    int column = -1;
    memset(&ignored, 0, sizeof ignored);
    if (!tool_path(set, "metadata.csv", path, sizeof path) || spm_file_read(set->ctx, path, &data, &size, &ignored))
        return;
    csv = spm_csv_parse(set->ctx, path, (const char *)data, size, ',', &ignored);
    spm_free(set->ctx, data);
    if (csv) column = spm_csv_column(csv, "img_filename");
    (void)remove(path); /* the folder is not complete from here on */
    for (row = 0; column >= 0 && row < spm_csv_rows(csv); row++) {
        const char *name = spm_csv_field(csv, row, column);
        if (name[0] != '/' && !strstr(name, "..") && (strstr(name, ".jpg") || strstr(name, ".png"))
            && tool_path(set, name, path, sizeof path)) (void)remove(path);
    }
    if (csv) spm_csv_destroy(csv);
}

/* The folders that the pictures lie in. */
static inline int tool_make_folders(tool_set *set)
{
    char last[300] = "", path[1400];
    spm_error err;
    long i;
    memset(&err, 0, sizeof err);
    for (i = 0; i < set->count; i++) {
        const char *slash = strrchr(set->items[i].file, '/');
        size_t n = slash ? (size_t)(slash - set->items[i].file) : 0;
        if (!n || (strncmp(last, set->items[i].file, n) == 0 && !last[n])) continue;
        snprintf(last, sizeof last, "%.*s", (int)n, set->items[i].file);
        if (!tool_path(set, last, path, sizeof path)) return tool_fail(set->t, "--out: the name is too long");
        if (spm_directory_create(set->ctx, path, &err)) return tool_fail(set->t, "%s", err.text);
    }
    return 0;
}

static inline int tool_write_text(tool_set *set, const char *name, const char *text)
{
    char path[1400];
    spm_error err;
    memset(&err, 0, sizeof err);
    if (!tool_path(set, name, path, sizeof path)) return tool_fail(set->t, "--out: the name is too long");
    return spm_file_write(set->ctx, path, text, strlen(text), &err) ? tool_fail(set->t, "%s", err.text) : 0;
}

/* Counts by split and group, as a table. */
static inline void tool_summary(const tool_set *set)
{
    int s, y, a;
    long i, n;
    printf("%-8s", "");
    for (y = 0; y < set->classes; y++)
        for (a = 0; a < set->confounders; a++) printf("  y=%d,a=%d", y, a);
    printf("      all\n");
    for (s = 0; s < SPM_SPLITS; s++) {
        long all = 0;
        printf("%-8s", spm_split_name((spm_split)s));
        for (y = 0; y < set->classes; y++) {
            for (a = 0; a < set->confounders; a++) {
                for (i = n = 0; i < set->count; i++)
                    n += set->items[i].split == s && set->items[i].y == y && set->items[i].a == a;
                printf("  %7ld", n);
                all += n;
            }
        }
        printf("  %7ld\n", all);
    }
}

/* Makes all pictures on the context's threads and writes the folder: pictures, the names' files, `marker` (what the set
 * was made from, JSON), and last metadata.csv.  0, or 1 with a sentence on stderr. */
static inline int tool_write_set(tool_set *set, const char *marker, const char *made_from, int force)
{
    tool_text csv = { NULL, 0, 0, 0 };
    char path[1400];
    long i;
    int status, k, may = tool_may_write(set, marker, force);
    if (!may) return 1;
    if (may == 2) tool_remove_earlier(set);
    else if (tool_path(set, "metadata.csv", path, sizeof path)) (void)remove(path);
    status = tool_make_folders(set);
    if (!status) status = tool_write_text(set, marker, made_from);
    if (!status && set->class_names) status = tool_write_text(set, "class_names.txt", set->class_names);
    if (!status && set->confounder_names) status = tool_write_text(set, "confounder_names.txt", set->confounder_names);
    tool_add(&csv, "img_id,img_filename,y,split,place,place_filename\n");
    for (set->first = 0; !status && set->first < set->count; set->first += TOOL_BATCH) {
        long n = set->count - set->first < TOOL_BATCH ? set->count - set->first : TOOL_BATCH;
        spm_parallel(set->ctx, n, tool_make_one, set);
        for (k = 0; k < n; k++) {
            const tool_item *item = &set->items[set->first + k];
            int reason = 0;
            if (!status && set->error[k].status) status = tool_fail(set->t, "%s", set->error[k].text);
            if (!status && !tool_path(set, item->file, path, sizeof path))
                status = tool_fail(set->t, "--out: the name is too long");
            if (!status) reason = tool_write_picture(path, set->data[k], set->size[k]);
            if (reason)
                status = tool_fail(set->t, "%s: cannot be written: %s; free some space or choose another folder", path,
                                   strerror(reason));
            spm_free(set->ctx, set->data[k]);
        }
        if (!status) tool_progress(set->t, set->first + n, set->count);
        if (!status && tool_stop) status = tool_fail(set->t, "stopped: there is no metadata.csv yet; run it again");
    }
    for (i = 0; !status && i < set->count; i++) {
        tool_add(&csv, "%ld,", i + 1);
        tool_add_field(&csv, set->items[i].file);
        tool_add(&csv, ",%d,%d,%d,", set->items[i].y, set->items[i].split, set->items[i].a);
        tool_add_field(&csv, set->items[i].place);
        tool_add(&csv, "\n");
    }
    if (!status && csv.failed) status = tool_fail(set->t, "out of memory");
    if (!status) status = tool_write_text(set, "metadata.csv", csv.data);
    free(csv.data);
    if (!status) {
        printf("%s: %ld pictures\n", set->out, set->count);
        tool_summary(set);
    }
    return status;
}

/* ---- drawing groups ---- */

/* Gives `n` members (indices into items) of one class their confounders: round(share * n) get `own`, the others the
 * remaining ones in turn; which is which is drawn with (seed, stream). 0 if memory runs out. */
static inline int tool_draw_confounders(tool_item *items, const long *member, long n, int own, int confounders,
                                        double share, uint64_t seed, uint64_t stream)
{
    int64_t *order = (int64_t *)malloc((size_t)(n ? n : 1) * sizeof *order);
    long at_home = (long)floor(share * (double)n + 0.5), i;
    if (!order) return 0;
    spm_random_permutation(seed, stream, n, order);
    for (i = 0; i < n; i++) {
        int a = own, step = (int)((i - at_home) % (confounders - 1)) + 1;
        if (i >= at_home) a = (own + step) % confounders;
        items[member[order[i]]].a = a;
    }
    free(order);
    return 1;
}
#endif
