/* test_pack.c - JSON, CSV, safetensors, torch files, tar, idx and npy: round trips, views, every number type, hostile
 * files, and (with SPURMEM_TEST_DATA) real checkpoints.  Torch files are built here by hand, byte for byte. */
#include "test.h"
#include <locale.h>
#include "../spurmem.h"

static spm_context *ctx;
static char folder[256];

static const char *scratch(const char *name)
{
    static char path[400];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* ---- bytes that grow ---- */
typedef struct bytes {
    uint8_t data[16384];
    size_t size;
} bytes;

static void put(bytes *b, const void *data, size_t size)
{
    if (b->size + size <= sizeof b->data) memcpy(b->data + b->size, data, size);
    b->size += size;
}

static void put_text(bytes *b, const char *text)
{
    put(b, text, strlen(text));
}

static void put_number(bytes *b, uint64_t value, int count)
{
    uint8_t byte;
    while (count--) {
        byte = (uint8_t)value;
        put(b, &byte, 1);
        value >>= 8;
    }
}

static void put_float(bytes *b, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    put_number(b, bits, 4);
}

/* ---- JSON ---- */
static void json_round_trip(void)
{
    spm_json *json = spm_json_create(ctx);
    spm_error err = SPM_ZERO;
    spm_json_value *root;
    const spm_json_value *list;
    const char *text;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "quote \" and \\", "line\nbreak\ttab \x01 \xC3\xA9 \xFF end");
    spm_json_int(json, "big", INT64_MAX);
    spm_json_number(json, "pi", 3.14159265358979);
    spm_json_number(json, "nan", NAN);
    spm_json_bool(json, "yes", 1);
    spm_json_array_begin(json, "list");
    spm_json_int(json, NULL, -1);
    spm_json_raw(json, NULL, "{\"raw\": 1e-3}");
    spm_json_array_end(json);
    spm_json_object_begin(json, "empty");
    spm_json_object_end(json);
    spm_json_object_end(json);
    text = spm_json_finish(json);
    CHECK_STR(text,
        "{\"quote \\\" and \\\\\": \"line\\nbreak\\ttab \\u0001 \xC3\xA9 \xEF\xBF\xBD end\", \"big\": 9223372036854775807, "
                    "\"pi\": 3.14159265, \"nan\": null, \"yes\": true, \"list\": [-1, {\"raw\": 1e-3}], \"empty\": {}}");
    root = text ? spm_json_parse(ctx, "round", text, strlen(text), &err) : NULL;
    CHECK(root != NULL);
    CHECK_INT(spm_json_length(root), 7);
    CHECK_INT(spm_json_as_int(spm_json_get(root, "big"), 0), INT64_MAX);
    CHECK_NEAR(spm_json_as_number(spm_json_get(root, "pi"), 0), 3.14159265, 0);
    CHECK_INT(spm_json_type_of(spm_json_get(root, "nan")), SPM_JSON_NULL);
    CHECK_INT(spm_json_as_int(spm_json_get(root, "yes"), 0), 1);
    list = spm_json_get(root, "list");
    CHECK_INT(spm_json_length(list), 2);
    CHECK_INT(spm_json_as_int(spm_json_at(list, 0), 0), -1);
    CHECK_NEAR(spm_json_as_number(spm_json_get(spm_json_at(list, 1), "raw"), 0), 1e-3, 0);
    CHECK_STR(spm_json_as_string(spm_json_at(root, 0), NULL), "line\nbreak\ttab \x01 \xC3\xA9 \xEF\xBF\xBD end");
    CHECK_STR(spm_json_key_at(root, 6), "empty");
    CHECK(spm_json_get(root, "absent") == NULL && spm_json_at(list, 2) == NULL && spm_json_get(NULL, "x") == NULL);
    spm_json_free(ctx, root);
    spm_json_destroy(json);
    json = spm_json_create(ctx);
    spm_json_object_begin(json, NULL);
    spm_json_int(json, NULL, 1); /* a member without a key */
    spm_json_object_end(json);
    CHECK(spm_json_finish(json) == NULL);
    spm_json_destroy(json);
    json = spm_json_create(ctx);
    spm_json_array_begin(json, NULL);
    CHECK(spm_json_finish(json) == NULL);
    spm_json_destroy(json);
}

static int json_ok(const char *text)
{
    spm_error err = SPM_ZERO;
    spm_json_value *root = spm_json_parse(ctx, "t.json", text, strlen(text), &err);
    if (!root) CHECK(err.status == SPM_E_FORMAT && strstr(err.text, "t.json") != NULL);
    spm_json_free(ctx, root);
    return root != NULL;
}

static void json_grammar(void)
{
    static const char good[][40] = { "0", "-0.5e+10", "[]", " [1 , 2 ] ", "\"\\u00e9\\ud83d\\ude00\"",
        "{\"a\":{\"a\":[]}}", "true", "\xEF\xBB\xBF[null]" };
    static const char bad[][40] = { "", "01", "1.", ".5", "+1", "-", "1e", "[1,]", "[1 2]", "{\"a\" 1}", "{a:1}",
        "{\"a\":1,}", "nul", "tru", "\"a", "\"\\x\"",
        "\"\\u12\"", "\"\t\"", "\"\xC0\x80\"", "\"\\u0000\"", "[1]]", "[", "{", "[1}", "NaN", "1 2", "'a'",
            "\"\xED\xA0\x80\"" };
    char deep[300];
    size_t i;
    for (i = 0; i < sizeof good / sizeof good[0]; i++) CHECK_MSG(json_ok(good[i]), good[i]);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) CHECK_MSG(!json_ok(bad[i]), bad[i]);
    for (i = 0; i < 64; i++) { deep[i] = '['; deep[64 + i] = ']'; }
    deep[128] = 0;
    CHECK(json_ok(deep));
    memset(deep, '[', 70);
    memset(deep + 70, ']', 70);
    deep[140] = 0;
    CHECK(!json_ok(deep));
}

/* A locale with a decimal comma: an installed one, or one that localedef makes. */
static int comma_locale(void)
{
    static const char names[][16] = { "de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE" };
    char command[300];
    size_t i;
    for (i = 0; i < 4; i++)
        if (setlocale(LC_ALL, names[i])) return 1;
    snprintf(command, sizeof command, "localedef -i de_DE -f UTF-8 %s >/dev/null 2>&1", scratch("de_DE.UTF-8"));
    if (system(command) == -1) return 0;
    setenv("LOCPATH", scratch(""), 1);
    return setlocale(LC_ALL, "de_DE.UTF-8") != NULL;
}

/* An application with a decimal comma writes and reads the same files as any other. */
static void decimal_comma(void)
{
    spm_arch arch = SPM_ZERO;
    spm_checkpoint_info info = SPM_ZERO, back;
    spm_model *model;
    char text[32], name[128];
    if (!comma_locale()) SKIP("no locale with a decimal comma is installed or can be made");
    snprintf(text, sizeof text, "%.1f", 0.5);
    CHECK_STR(text, "0,5");
    json_round_trip();
    arch.height = arch.width_px = 8;
    arch.classes = 2;
    CHECK_INT(spm_arch_parse(ctx, "vit:patch=4,dim=4,depth=1,heads=2,mlp=1,drop=0.25", &arch, NULL), SPM_OK);
    CHECK(arch.drop > 0.2f);
    CHECK(strstr(spm_arch_text(&arch, name, sizeof name), "drop=0.25") != NULL);
    model = spm_model_build(ctx, &arch, 1, NULL);
    info.arch = arch;
    info.transform = spm_transform_make(8, 8);
    CHECK_INT(spm_checkpoint_save(model, scratch("comma.safetensors"), &info, NULL), SPM_OK);
    setlocale(LC_ALL, "C");
    CHECK_INT(spm_checkpoint_inspect(ctx, scratch("comma.safetensors"), &back, NULL), SPM_OK);
    CHECK(back.arch.drop > 0.2f);
    CHECK(memcmp(back.transform.mean, info.transform.mean, sizeof back.transform.mean) == 0);
    CHECK(memcmp(back.transform.std, info.transform.std, sizeof back.transform.std) == 0);
    spm_model_destroy(model);
}

/* ---- CSV ---- */
static void csv_tables(void)
{
    static const char text[] = "\xEF\xBB\xBFimg,y,\"a \"\"b\"\"\"\r\n1.jpg,0,\"x,\n\"\"y\"\"\"\r\n\r\n2.jpg,1,\n\"\",,z";
    static const char blanks[] = "  A  B\nx.jpg -1   1\ny.jpg\t1 -1 \n";
    spm_error err = SPM_ZERO;
    spm_csv *csv = spm_csv_parse(ctx, "t.csv", text, sizeof text - 1, 0, &err);
    CHECK_STR(err.text, "");
    if (!csv) return;
    CHECK_INT(spm_csv_rows(csv), 3);
    CHECK_INT(spm_csv_columns(csv), 3);
    CHECK_INT(spm_csv_column(csv, "y"), 1);
    CHECK_INT(spm_csv_column(csv, "a \"b\""), 2);
    CHECK_INT(spm_csv_column(csv, "absent"), -1);
    CHECK_STR(spm_csv_field(csv, 0, 2), "x,\n\"y\"");
    CHECK_STR(spm_csv_field(csv, 1, 0), "2.jpg");
    CHECK_STR(spm_csv_field(csv, 1, 2), "");
    CHECK_STR(spm_csv_field(csv, 2, 2), "z");
    CHECK_INT(spm_csv_line(csv, 0), 2);
    CHECK_INT(spm_csv_line(csv, 1), 5);
    CHECK_INT(spm_csv_line(csv, 2), 6);
    CHECK(spm_csv_field(csv, 3, 0) == NULL && spm_csv_field(csv, 0, 3) == NULL && spm_csv_header(csv, -1) == NULL);
    spm_csv_destroy(csv);
    csv = spm_csv_parse(ctx, "b.txt", blanks, sizeof blanks - 1, ' ', &err);
    CHECK_STR(err.text, "");
    if (!csv) return;
    CHECK_INT(spm_csv_columns(csv), 3);
    CHECK_STR(spm_csv_header(csv, 0), "");
    CHECK_STR(spm_csv_header(csv, 2), "B");
    CHECK_STR(spm_csv_field(csv, 1, 0), "y.jpg");
    CHECK_STR(spm_csv_field(csv, 1, 2), "-1");
    spm_csv_destroy(csv);
}

static void csv_errors(void)
{
    static const char bad[][24] = { "", "\n\n", "a,b\n1\n", "a,b\n1,2,3\n", "a\n\"x\n", "a,b\n\"x\"y,2\n" };
    static const char says[][24] = { "is empty", "is empty", "line 2 has 1", "line 2 has 3", "never closed",
        "behind the closing" };
    size_t i;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        spm_error err = SPM_ZERO;
        CHECK_MSG(spm_csv_parse(ctx, "bad.csv", bad[i], strlen(bad[i]), ',', &err) == NULL, bad[i]);
        CHECK_MSG(strstr(err.text, "bad.csv") != NULL && strstr(err.text, says[i]) != NULL, err.text);
    }
    {
        spm_error err = SPM_ZERO;
        CHECK(spm_csv_parse(ctx, "bad.csv", "a\0b", 3, ',', &err) == NULL);
    }
}

/* ---- archives written and read back ---- */
static void archive_round_trip(spm_archive_kind kind, const char *name)
{
    spm_error err = SPM_ZERO;
    spm_archive_writer *writer = spm_archive_create(ctx, scratch(name), kind, &err);
    spm_archive *archive;
    const spm_archive_tensor *tensor;
    int64_t shape[4] = { 2, 3, 1, 5 }, none[2] = { 0, 7 }, batches = 123456789012345, back_integer[30];
    float values[30], back[30];
    uint8_t small[3] = { 0, 7, 255 };
    int64_t three = 3;
    int i;
    CHECK_STR(err.text, "");
    if (!writer) return;
    for (i = 0; i < 30; i++) values[i] = (float)(i * i) * 0.37f - 5.0f;
    values[7] = INFINITY;
    spm_archive_add_metadata(writer, "arch", "resnet18:width=16");
    spm_archive_add(writer, "layer1.0.conv1.weight", SPM_F32, 4, shape);
    spm_archive_add(writer, "bn.num_batches_tracked", SPM_I64, 0, NULL);
    spm_archive_add(writer, "mask", SPM_U8, 1, &three);
    spm_archive_add(writer, "nothing", SPM_F32, 2, none);
    spm_archive_put(writer, values);
    spm_archive_put(writer, &batches);
    spm_archive_put(writer, small);
    spm_archive_put(writer, values);
    CHECK_INT(spm_archive_commit(writer, &err), SPM_OK);
    archive = spm_archive_open(ctx, scratch(name), &err);
    CHECK_STR(err.text, "");
    if (!archive) return;
    CHECK_INT(spm_archive_count(archive), 4);
    CHECK_STR(spm_archive_format(archive), kind == SPM_ARCHIVE_TORCH ? "torch zip" : "safetensors");
    if (kind == SPM_ARCHIVE_SAFETENSORS) CHECK_STR(spm_archive_metadata(archive, "arch"), "resnet18:width=16");
    CHECK(spm_archive_metadata(archive, "absent") == NULL);
    tensor = spm_archive_find(archive, "layer1.0.conv1.weight");
    CHECK(tensor != NULL && tensor == spm_archive_tensor_at(archive, 0));
    if (tensor) {
        CHECK_INT(tensor->offset % 64, 0);
        CHECK_INT(tensor->rank, 4);
        CHECK_INT(tensor->shape[3], 5);
        CHECK_INT(spm_archive_read_f32(archive, tensor, back, &err), SPM_OK);
        CHECK(memcmp(values, back, sizeof values) == 0);
        CHECK_INT(spm_archive_read_i64(archive, tensor, back_integer, &err), SPM_E_FORMAT); /* fractions */
        CHECK(strstr(err.text, "layer1.0.conv1.weight") != NULL);
        memset(&err, 0, sizeof err);
    }
    tensor = spm_archive_find(archive, "bn.num_batches_tracked");
    CHECK(tensor != NULL && tensor->rank == 0 && tensor->count == 1);
    if (tensor) CHECK_INT(spm_archive_read_i64(archive, tensor, back_integer, &err), SPM_OK);
    CHECK_INT(back_integer[0], batches);
    tensor = spm_archive_find(archive, "mask");
    if (tensor) CHECK_INT(spm_archive_read_f32(archive, tensor, back, &err), SPM_OK);
    CHECK(back[0] == 0.0f && back[1] == 7.0f && back[2] == 255.0f);
    CHECK(spm_archive_find(archive, "absent") == NULL);
    spm_archive_close(archive);
}

static void safetensors_round_trip(void)
{
    archive_round_trip(SPM_ARCHIVE_SAFETENSORS, "a.safetensors");
}

static void torch_round_trip(void)
{
    archive_round_trip(SPM_ARCHIVE_TORCH, "a.pth");
}

static void writer_errors(void)
{
    spm_error err = SPM_ZERO;
    float value = 1;
    spm_archive_writer *writer = spm_archive_create(ctx, scratch("absent/x.pth"), SPM_ARCHIVE_TORCH, &err);
    CHECK(writer == NULL && strstr(err.text, "x.pth") != NULL);
    memset(&err, 0, sizeof err);
    writer = spm_archive_create(ctx, scratch("w.safetensors"), SPM_ARCHIVE_SAFETENSORS, &err);
    spm_archive_add(writer, "a", SPM_F32, 0, NULL);
    spm_archive_add(writer, "a", SPM_F32, 0, NULL);
    spm_archive_put(writer, &value);
    CHECK_INT(spm_archive_commit(writer, &err), SPM_E_ARGUMENT);
    CHECK(strstr(err.text, "twice") != NULL);
    memset(&err, 0, sizeof err);
    writer = spm_archive_create(ctx, scratch("w.safetensors"), SPM_ARCHIVE_SAFETENSORS, &err);
    spm_archive_add(writer, "a", SPM_F32, 0, NULL);
    spm_archive_add(writer, "b", SPM_F32, 0, NULL);
    spm_archive_put(writer, &value);
    CHECK_INT(spm_archive_commit(writer, &err), SPM_E_STATE);
    CHECK(strstr(err.text, "b is declared") != NULL);
    writer = spm_archive_create(ctx, scratch("w.safetensors"), SPM_ARCHIVE_SAFETENSORS, NULL);
    spm_archive_abort(writer);
    memset(&err, 0, sizeof err);
    CHECK(spm_archive_open(ctx, scratch("w.safetensors"), &err) == NULL); /* nothing was left */
    CHECK_INT(err.status, SPM_E_IO);
}

/* ---- safetensors by hand ---- */
static void safetensors_file(bytes *b, const char *header, size_t data)
{
    size_t i;
    b->size = 0;
    put_number(b, strlen(header), 8);
    put_text(b, header);
    for (i = 0; i < data; i++) put_number(b, i, 1);
}

static void number_types(void)
{
    static const uint8_t data[] = {
        0x00, 0x3C, 0x01, 0x00, 0xFF, 0x7B, 0x00, 0xFC, 0x00, 0x80,             /* F16: 1, 2^-24, 65504, -inf, -0 */
        0x80, 0x3F, 0x49, 0xC0,                                                 /* BF16: 1, -3.140625 */
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0xC0,                         /* F64: -2.5 */
        0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF,                         /* I64: -2 */
        /* I32 -3, I16 -4, I8 -5, U8 250, BOOL 1 */
        0xFD, 0xFF, 0xFF, 0xFF, 0xFC, 0xFF, 0xFB, 0xFA, 0x01 };
    static const char header[] = "{\"f16\":{\"dtype\":\"F16\",\"shape\":[5],\"data_offsets\":[0,10]},\"bf16\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[10,14]},"
        "\"f64\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[14,22]},\"i64\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[22,30]},"
        "\"i32\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[30,34]},\"i16\":{\"dtype\":\"I16\",\"shape\":[1],\"data_offsets\":[34,36]},"
        "\"i8\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[36,37]},\"u8\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[37,38]},"
        "\"bool\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[38,39]}}";
    static const char names[][8] = { "i64", "i32", "i16", "i8", "u8", "bool" };
    static const int wanted[] = { -2, -3, -4, -5, 250, 1 };
    bytes b;
    spm_error err = SPM_ZERO;
    spm_archive *archive;
    float f[5];
    int64_t n;
    int i;
    safetensors_file(&b, header, 0);
    put(&b, data, sizeof data);
    archive = spm_archive_open_memory(ctx, "types", b.data, b.size, &err);
    CHECK_STR(err.text, "");
    if (!archive) return;
    CHECK_INT(spm_archive_read_f32(archive, spm_archive_find(archive, "f16"), f, &err), SPM_OK);
    CHECK(f[0] == 1.0f && f[1] == 5.9604644775390625e-8f && f[2] == 65504.0f && f[3] == -INFINITY && f[4] == 0.0f
          && signbit(f[4]));
    CHECK_INT(spm_archive_read_f32(archive, spm_archive_find(archive, "bf16"), f, &err), SPM_OK);
    CHECK(f[0] == 1.0f && f[1] == -3.140625f);
    CHECK_INT(spm_archive_read_f32(archive, spm_archive_find(archive, "f64"), f, &err), SPM_OK);
    CHECK(f[0] == -2.5f);
    for (i = 0; i < 6; i++) {
        n = 0;
        CHECK_INT(spm_archive_read_i64(archive, spm_archive_find(archive, names[i]), &n, &err), SPM_OK);
        CHECK_INT(n, wanted[i]);
        CHECK_INT(spm_archive_read_f32(archive, spm_archive_find(archive, names[i]), f, &err), SPM_OK);
        CHECK(f[0] == (float)wanted[i]);
    }
    spm_archive_close(archive);
}

static void safetensors_hostile(void)
{
    static const char bad[][160] = {
        "[]", "{\"a\":1}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[100],\"data_offsets\":[0,400]}}",
            "{\"a\":{\"dtype\":\"Q4\",\"shape\":[2],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,8]}}",
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}",
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[9223372036854775800,9223372036854775807]}}",
            "{\"a\":{\"dtype\":\"F32\"" };
    bytes b;
    size_t i;
    spm_error err;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memset(&err, 0, sizeof err);
        safetensors_file(&b, bad[i], 32);
        CHECK_MSG(spm_archive_open_memory(ctx, "bad.safetensors", b.data, b.size, &err) == NULL, bad[i]);
        CHECK_MSG(strncmp(err.text, "bad.safetensors: ", 17) == 0, err.text);
    }
    for (i = 0; i < 8; i++) { /* header lengths beyond the file */
        memset(&err, 0, sizeof err);
        safetensors_file(&b, "{}", 0);
        b.data[i] |= 0x40;
        CHECK(spm_archive_open_memory(ctx, "bad.safetensors", b.data, b.size, &err) == NULL);
    }
    memset(&err, 0, sizeof err);
    b.size = 0;
    put_number(&b, 8000, 8);
    put_text(&b, "{\"a\":[");
    for (i = 0; i < 3996; i++) put_text(&b, "0,"); /* values that no header needs */
    CHECK(spm_archive_open_memory(ctx, "bad.safetensors", b.data, b.size, &err) == NULL);
}

/* ---- torch files by hand ---- */
static void pickle_text(bytes *b, const char *text)
{
    put_text(b, "X");
    put_number(b, strlen(text), 4);
    put_text(b, text);
}

static void pickle_int(bytes *b, int value)
{
    put_text(b, "J");
    put_number(b, (uint64_t)(int64_t)value, 4);
}

/* name -> view of FloatStorage `key` of `elements`: rank 2, given sizes and strides. */
static void pickle_tensor(bytes *b, const char *name, const char *key, int elements, int offset, int h, int w, int sh,
                          int sw)
{
    pickle_text(b, name);
    put_text(b, "ctorch._utils\n_rebuild_tensor_v2\n((");
    pickle_text(b, "storage");
    put_text(b, "ctorch\nFloatStorage\n");
    pickle_text(b, key);
    pickle_text(b, "cpu");
    pickle_int(b, elements);
    put_text(b, "tQ");
    pickle_int(b, offset);
    pickle_int(b, h);
    pickle_int(b, w);
    put_text(b, "\x86");
    pickle_int(b, sh);
    pickle_int(b, sw);
    put_text(b, "\x86\x89" "ccollections\nOrderedDict\n)RtR");
}

/* A legacy file around the pickle of the tree; one storage "0" with 0, 1, 2 ... */
static void legacy_file(bytes *b, const bytes *tree, int elements)
{
    int i;
    b->size = 0;
    put(b, "\x80\x02\x8A\x0Al\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.\x80\x02M\xE9\x03.\x80\x02}.", 15 + 6 + 4);
    put(b, tree->data, tree->size);
    if (elements < 0) { /* no storage at all */
        put_text(b, "\x80\x02].");
        return;
    }
    put_text(b, "\x80\x02](");
    pickle_text(b, "0");
    put_text(b, "e.");
    put_number(b, (uint64_t)elements, 8);
    for (i = 0; i < elements; i++) put_float(b, (float)i);
}

static void legacy_views(void)
{
    static const float wanted[6] = { 1, 5, 9, 2, 6, 10 };
    bytes tree, file;
    spm_error err = SPM_ZERO;
    spm_archive *archive;
    const spm_archive_tensor *tensor;
    float back[12];
    tree.size = 0;
    put_text(&tree, "\x80\x02}(");
    pickle_text(&tree, "best");
    put(&tree, "G\x40\x56\xF1\xEB\x85\x1E\xB8\x52", 9); /* BINFLOAT, as the files of old have it */
    pickle_text(&tree, "state_dict");
    put_text(&tree, "}(");
    pickle_tensor(&tree, "whole", "0", 12, 0, 3, 4, 4, 1);
    pickle_tensor(&tree, "turned", "0", 12, 1, 2, 3, 1, 4);
    pickle_tensor(&tree, "repeated", "0", 12, 11, 5, 1, 0, 1);
    put_text(&tree, "uu.");
    legacy_file(&file, &tree, 12);
    archive = spm_archive_open_memory(ctx, "old.th", file.data, file.size, &err);
    CHECK_STR(err.text, "");
    if (!archive) return;
    CHECK_STR(spm_archive_format(archive), "torch legacy");
    CHECK_INT(spm_archive_count(archive), 3);
    tensor = spm_archive_find(archive, "state_dict.whole");
    CHECK(tensor != NULL);
    if (tensor) CHECK_INT(spm_archive_read_f32(archive, tensor, back, &err), SPM_OK);
    CHECK(back[0] == 0.0f && back[11] == 11.0f);
    tensor = spm_archive_find(archive, "state_dict.turned");
    CHECK(tensor != NULL);
    if (tensor) CHECK_INT(spm_archive_read_f32(archive, tensor, back, &err), SPM_OK);
    CHECK(memcmp(back, wanted, sizeof wanted) == 0);
    tensor = spm_archive_find(archive, "state_dict.repeated");
    if (tensor) CHECK_INT(spm_archive_read_f32(archive, tensor, back, &err), SPM_OK);
    CHECK(back[0] == 11.0f && back[4] == 11.0f);
    spm_archive_close(archive);
}

static void legacy_refused(const char *what, const bytes *tree, int elements, const char *says)
{
    static bytes file;
    spm_error err = SPM_ZERO;
    legacy_file(&file, tree, elements);
    CHECK_MSG(spm_archive_open_memory(ctx, "bad.th", file.data, file.size, &err) == NULL, what);
    CHECK_MSG(strncmp(err.text, "bad.th: ", 8) == 0 && strstr(err.text, says) != NULL, err.text);
}

static void pickle_hostile(void)
{
    static const int views[][6] = { { 0, 3, 5, 4, 1, 12 }, { 10, 2, 2, 1, 1, 12 }, { -1, 1, 1, 1, 1, 12 },
        { 0, 2, 2, -1, 1, 12 }, { 0, 2, 2, 1, 1, 13 },
                                    { 0, 0x7FFFFFFF, 0x7FFFFFFF, 0, 0, 12 }, { 0x7FFFFFFF, 1, 1, 1, 1, 12 } };
    bytes tree;
    size_t i;
    tree.size = 0;
    put_text(&tree, "\x80\x02" "cposix\nsystem\n");
    pickle_text(&tree, "true");
    put_text(&tree, "\x85R.");
    legacy_refused("os.system", &tree, 0, "posix.system");
    tree.size = 0;
    put_text(&tree, "\x80\x04\x8C\x02os\x8C\x06system\x93.");
    legacy_refused("os.system by STACK_GLOBAL", &tree, 0, "os.system");
    tree.size = 0;
    put_text(&tree, "\x80\x02" "cbuiltins\neval\n.");
    legacy_refused("eval", &tree, 0, "builtins.eval");
    for (i = 0; i < sizeof views / sizeof views[0]; i++) {
        tree.size = 0;
        put_text(&tree, "\x80\x02}(");
        pickle_tensor(&tree, "w", "0", views[i][5], views[i][0], views[i][1], views[i][2], views[i][3], views[i][4]);
        put_text(&tree, "u.");
        legacy_refused("a view outside its storage", &tree, 12, "");
    }
    tree.size = 0;
    put_text(&tree, "\x80\x02}(");
    pickle_tensor(&tree, "w", "missing", 12, 0, 3, 4, 4, 1);
    put_text(&tree, "u.");
    legacy_refused("a storage that is not there", &tree, 12, "");
    tree.size = 0; /* a list in itself */
    put_text(&tree, "\x80\x02]q");
    put(&tree, "\0h\0a.", 5);
    legacy_refused("a list in itself", &tree, -1, "nested more than 24");
    tree.size = 0;
    put_text(&tree, "\x80\x02");
    for (i = 0; i < 5000; i++) put_text(&tree, "]");
    for (i = 0; i < 4999; i++) put_text(&tree, "a");
    put_text(&tree, ".");
    legacy_refused("5000 nested lists", &tree, 0, "");
    tree.size = 0; /* small to store, long to walk: a list of 3000 numbers, 3000 times */
    put_text(&tree, "\x80\x02](");
    for (i = 0; i < 3000; i++) put_text(&tree, "N");
    put(&tree, "eq\0](", 5);
    for (i = 0; i < 3000; i++) put(&tree, "h\0", 2);
    put_text(&tree, "e.");
    legacy_refused("3000 times the same list", &tree, -1, "repeats its parts");
    tree.size = 0; /* each list holds the one before ten times */
    put(&tree, "\x80\x02]q\0", 5);
    for (i = 0; i < 12; i++) {
        int k;
        put_text(&tree, "](");
        for (k = 0; k < 10; k++) {
            put_text(&tree, "h");
            put_number(&tree, i, 1);
        }
        put_text(&tree, "eq");
        put_number(&tree, i + 1, 1);
    }
    put_text(&tree, ".");
    legacy_refused("ten to the twelfth", &tree, -1, "repeats its parts");
}

/* Of two entries by one name other readers may see the other one: refused. */
static void zip_twice(void)
{
    spm_error err = SPM_ZERO;
    spm_archive_writer *writer = spm_archive_create(ctx, scratch("twice.pth"), SPM_ARCHIVE_TORCH, &err);
    const float one = 1;
    uint8_t *data = NULL;
    size_t size = 0, i;
    int changed = 0;
    spm_archive_add(writer, "a", SPM_F32, 0, NULL);
    spm_archive_add(writer, "b", SPM_F32, 0, NULL);
    spm_archive_put(writer, &one);
    spm_archive_put(writer, &one);
    CHECK_INT(spm_archive_commit(writer, &err), SPM_OK);
    CHECK_INT(spm_file_read(ctx, scratch("twice.pth"), &data, &size, &err), SPM_OK);
    for (i = 0; i + 14 <= size; i++) {
        if (memcmp(data + i, "archive/data/1", 14)) continue;
        data[i + 13] = '0';
        changed++;
    }
    CHECK_INT(changed, 2);
    CHECK(spm_archive_open_memory(ctx, "twice.pth", data, size, &err) == NULL);
    CHECK_MSG(strstr(err.text, "archive/data/0 stands twice") != NULL, err.text);
    spm_free(ctx, data);
}

/* Values in the file's own type: what `convert` copies. */
static void raw_values(void)
{
    static const char header[] = "{\"h\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]}}";
    bytes b;
    spm_error err = SPM_ZERO;
    spm_archive *archive;
    uint16_t values[2] = { 0, 0 };
    safetensors_file(&b, header, 0);
    put(&b, "\x80\x3F\x49\xC0", 4);
    archive = spm_archive_open_memory(ctx, "raw", b.data, b.size, &err);
    CHECK(archive && spm_archive_read(archive, spm_archive_find(archive, "h"), values, &err) == SPM_OK);
    CHECK(values[0] == 0x3F80 && values[1] == 0xC049);
    spm_archive_close(archive);
}

/* Every truncation and every single-bit flip of a file: an error sentence or a file that can be read, never more. */
static void maltreat(const char *name, const uint8_t *data, size_t size, int flips_found)
{
    size_t length, bit, accepted = 0;
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    if (!copy) return;
    for (length = 0; length < size; length++) {
        spm_error err = SPM_ZERO;
        uint8_t *cut = (uint8_t *)malloc(length ? length : 1); /* exact, so that a sanitizer sees a read behind it */
        spm_archive *archive;
        if (!cut) break;
        memcpy(cut, data, length);
        archive = spm_archive_open_memory(ctx, name, cut, length, &err);
        CHECK_MSG(archive == NULL, "a truncated file was accepted");
        CHECK(strncmp(err.text, name, strlen(name)) == 0);
        spm_archive_close(archive);
        free(cut);
    }
    for (bit = 0; bit < size * 8; bit++) {
        spm_error err = SPM_ZERO;
        spm_archive *archive;
        int64_t i;
        memcpy(copy, data, size);
        copy[bit / 8] ^= (uint8_t)(1 << bit % 8);
        archive = spm_archive_open_memory(ctx, name, copy, size, &err);
        for (i = 0; archive && i < spm_archive_count(archive) && !err.status; i++) {
            const spm_archive_tensor *tensor = spm_archive_tensor_at(archive, i);
            float *out = (float *)malloc((size_t)tensor->count * sizeof *out + 1);
            if (out) (void)spm_archive_read_f32(archive, tensor, out, &err);
            free(out);
        }
        if (archive && !err.status) accepted++;
        else CHECK(strncmp(err.text, name, strlen(name)) == 0);
        spm_archive_close(archive);
    }
    if (flips_found) CHECK_MSG(accepted < size * 8 / 2, "more than half of the bit flips went unseen");
    free(copy);
}

static void maltreated_files(void)
{
    bytes tree, file;
    uint8_t *data;
    size_t size;
    spm_error err = SPM_ZERO;
    if (spm_file_read(ctx, scratch("a.safetensors"), &data, &size, &err) == SPM_OK) {
        maltreat("cut.safetensors", data, size, 0);
        spm_free(ctx, data);
    }
    if (spm_file_read(ctx, scratch("a.pth"), &data, &size, &err) == SPM_OK) {
        maltreat("cut.pth", data, size, 1);
        spm_free(ctx, data);
    }
    CHECK_STR(err.text, "");
    tree.size = 0;
    put_text(&tree, "\x80\x02}(");
    pickle_tensor(&tree, "turned", "0", 12, 1, 2, 3, 1, 4);
    put_text(&tree, "u.");
    legacy_file(&file, &tree, 12);
    maltreat("cut.th", file.data, file.size, 0);
}

/* ---- tar ---- */
static void tar_entry(bytes *b, const char *name, char kind, const char *body, size_t size)
{
    char head[512];
    unsigned sum = 0;
    size_t i;
    memset(head, 0, sizeof head);
    memcpy(head, name, strlen(name) < 100 ? strlen(name) : 100);
    memcpy(head + 100, "0000644", 8);
    snprintf(head + 124, 12, "%011lo", (unsigned long)size);
    memset(head + 148, ' ', 8);
    head[156] = kind;
    memcpy(head + 257, "ustar\00000", 8);
    for (i = 0; i < 512; i++) sum += (unsigned char)head[i];
    snprintf(head + 148, 8, "%06o", sum);
    put(b, head, 512);
    put(b, body, size);
    memset(head, 0, sizeof head);
    if (size % 512) put(b, head, 512 - size % 512);
}

static void tar_files(void)
{
    static bytes b, copy;
    static const char pax[] = "26 path=dir/by pax name.x\n15 comment=hey\n";
    char long_name[180], zeros[1024];
    spm_error err = SPM_ZERO;
    spm_tar *tar;
    uint8_t *data;
    size_t size, i;
    memset(long_name, 'n', sizeof long_name);
    memcpy(long_name + 170, "/end.jpg", 9);
    memset(zeros, 0, sizeof zeros);
    b.size = 0;
    tar_entry(&b, "./a.txt", '0', "hello", 5);
    tar_entry(&b, "folder/", '5', "", 0);
    tar_entry(&b, "././@LongLink", 'L', long_name, strlen(long_name) + 1);
    tar_entry(&b, "nnnn", '0', "long", 4);
    tar_entry(&b, "PaxHeaders/x", 'x', pax, sizeof pax - 1);
    tar_entry(&b, "cut", '0', "pax", 3);
    tar_entry(&b, "a.txt", '0', "newer", 5);
    tar_entry(&b, "empty", 0, "", 0);
    put(&b, zeros, sizeof zeros);
    tar = spm_tar_open_memory(ctx, "t.tar", b.data, b.size, &err);
    CHECK_STR(err.text, "");
    if (!tar) return;
    CHECK_INT(spm_tar_count(tar), 5);
    CHECK_STR(spm_tar_name(tar, 0), "a.txt");
    CHECK_INT(spm_tar_find(tar, "./a.txt"), 3);
    CHECK_INT(spm_tar_find(tar, long_name), 1);
    CHECK_INT(spm_tar_find(tar, "dir/by pax name.x"), 2);
    CHECK_INT(spm_tar_find(tar, "absent"), -1);
    CHECK_INT(spm_tar_size(tar, 2), 3);
    CHECK_INT(spm_tar_read(tar, 3, &data, &size, &err), SPM_OK);
    CHECK_INT(size, 5);
    CHECK_STR((char *)data, "newer");
    spm_free(ctx, data);
    CHECK_INT(spm_tar_read(tar, 5, &data, &size, &err), SPM_E_ARGUMENT);
    spm_tar_close(tar);
    CHECK_INT(spm_file_write(ctx, scratch("t.tar"), b.data, b.size, NULL), SPM_OK);
    memset(&err, 0, sizeof err);
    tar = spm_tar_open(ctx, scratch("t.tar"), &err);
    CHECK_STR(err.text, "");
    if (tar) CHECK_INT(spm_tar_read(tar, 1, &data, &size, &err), SPM_OK);
    CHECK_STR((char *)data, "long");
    spm_free(ctx, data);
    spm_tar_close(tar);
    for (i = 0; i < b.size - 1024; i += 37) { /* cut short, and one byte of a header changed */
        memset(&err, 0, sizeof err);
        tar = spm_tar_open_memory(ctx, "t.tar", b.data, i, &err);
        CHECK(tar == NULL && strncmp(err.text, "t.tar: ", 7) == 0);
        spm_tar_close(tar);
        memcpy(copy.data, b.data, b.size);
        copy.data[i] ^= 0x11;
        memset(&err, 0, sizeof err);
        tar = spm_tar_open_memory(ctx, "t.tar", copy.data, b.size, &err);
        if (i < 512) CHECK(tar == NULL);
        spm_tar_close(tar);
    }
}

/* ---- idx and npy ---- */
static void idx_arrays(void)
{
    static const uint8_t images[] = { 0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60 };
    static const uint8_t shorts[] = { 0, 0, 0x0B, 1, 0, 0, 0, 2, 0x01, 0x02, 0xFF, 0xFE };
    static const uint8_t huge[] = { 0, 0, 8, 3, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF,
        0xFF, 1 };
    spm_error err = SPM_ZERO;
    spm_array array;
    uint8_t *packed;
    size_t packed_size, i;
    int16_t two[2] = { 0, 0 };
    CHECK_INT(spm_idx_parse(ctx, "images", images, sizeof images, &array, &err), SPM_OK);
    CHECK_INT(array.count, 6);
    CHECK_INT(array.shape[2], 3);
    if (array.data) CHECK_INT(((uint8_t *)array.data)[5], 60);
    spm_array_free(ctx, &array);
    CHECK_INT(spm_idx_parse(ctx, "shorts", shorts, sizeof shorts, &array, &err), SPM_OK);
    if (array.data) memcpy(two, array.data, 4);
    CHECK(two[0] == 0x0102 && two[1] == -2);
    spm_array_free(ctx, &array);
    CHECK_INT(spm_deflate(ctx, images, sizeof images, 2, &packed, &packed_size, &err), SPM_OK);
    CHECK_INT(spm_file_write(ctx, scratch("images.gz"), packed, packed_size, &err), SPM_OK);
    CHECK_INT(spm_idx_load(ctx, scratch("images.gz"), &array, &err), SPM_OK);
    CHECK_INT(array.count, 6);
    spm_array_free(ctx, &array);
    CHECK_STR(err.text, "");
    CHECK_INT(spm_idx_parse(ctx, "huge", huge, sizeof huge, &array, &err), SPM_E_FORMAT);
    for (i = 0; i < sizeof images; i++) CHECK(spm_idx_parse(ctx, "cut", images, i, &array, &err) != SPM_OK);
    for (i = 0; i < packed_size; i++) CHECK(spm_idx_parse(ctx, "cut", packed, i, &array, &err) != SPM_OK);
    spm_free(ctx, packed);
}

static void npy_arrays(void)
{
    static const char big[] = "{'descr': '>i2', 'fortran_order': False, 'shape': (2, 1), }";
    int64_t shape[3] = { 2, 1, 3 };
    float values[6] = { 1, 2, 3, 4, 5, -0.5f };
    spm_error err = SPM_ZERO;
    spm_array array;
    bytes b;
    uint8_t *data;
    size_t size, i;
    int rank;
    for (rank = 0; rank <= 3; rank++) {
        CHECK_INT(spm_npy_save_f32(ctx, scratch("x.npy"), values, rank, shape, &err), SPM_OK);
        CHECK_INT(spm_npy_load(ctx, scratch("x.npy"), &array, &err), SPM_OK);
        CHECK_INT(array.rank, rank);
        CHECK_INT(array.dtype, SPM_F32);
        CHECK_INT(array.count, rank == 0 ? 1 : rank == 3 ? 6 : 2);
        if (array.data) CHECK(memcmp(array.data, values, (size_t)array.count * 4) == 0);
        spm_array_free(ctx, &array);
    }
    CHECK_STR(err.text, "");
    b.size = 0;
    put(&b, "\x93NUMPY\x01\x00", 8);
    put_number(&b, sizeof big - 1, 2);
    put_text(&b, big);
    put(&b, "\x00\x07\xFF\xFF", 4);
    CHECK_INT(spm_npy_parse(ctx, "big", b.data, b.size, &array, &err), SPM_OK);
    if (array.data) CHECK(((int16_t *)array.data)[0] == 7 && ((int16_t *)array.data)[1] == -1);
    spm_array_free(ctx, &array);
    CHECK_INT(spm_file_read(ctx, scratch("x.npy"), &data, &size, &err), SPM_OK);
    for (i = 0; i < size; i++) CHECK(spm_npy_parse(ctx, "cut", data, i, &array, &err) != SPM_OK);
    spm_free(ctx, data);
}

/* ---- real files ---- */
static spm_archive *open_real(const char *name, spm_error *err)
{
    const char *root = getenv("SPURMEM_TEST_DATA");
    char path[600];
    snprintf(path, sizeof path, "%s/checkpoints/%s", root ? root : "", name);
    return spm_archive_open(ctx, path, err);
}

/* Counts and sums of absolute values, as torch 1.13 computes them in double precision. */
#define RESNET20_COUNT 97
#define RESNET20_ELEMENTS 271098
#define RESNET20_SUM 21349.5626
#define VIT_COUNT 74
#define VIT_ELEMENTS 213642
#define VIT_SUM 47923.9721

static void real_checkpoints(void)
{
    spm_error err = SPM_ZERO;
    spm_archive *archive;
    int64_t i, elements = 0;
    double sum = 0;
    if (!getenv("SPURMEM_TEST_DATA")) SKIP("SPURMEM_TEST_DATA is not set: real checkpoints");
    archive = open_real("resnet20-12fca82f.th", &err);
    if (!archive && err.status == SPM_E_IO) SKIP("no real checkpoints in SPURMEM_TEST_DATA");
    CHECK_STR(err.text, "");
    if (!archive) return;
    CHECK_INT(spm_archive_count(archive), RESNET20_COUNT);
    for (i = 0; i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *tensor = spm_archive_tensor_at(archive, i);
        float *values = (float *)malloc((size_t)tensor->count * sizeof *values);
        int64_t k;
        CHECK(strncmp(tensor->name, "state_dict.module.", 18) == 0);
        CHECK_INT(spm_archive_read_f32(archive, tensor, values, &err), SPM_OK);
        for (k = 0; k < tensor->count; k++) sum += fabs((double)values[k]);
        elements += tensor->count;
        free(values);
    }
    CHECK_INT(elements, RESNET20_ELEMENTS);
    CHECK_NEAR(sum, RESNET20_SUM, 1e-6 * RESNET20_SUM);
    spm_archive_close(archive);
    archive = open_real("vit_mnist.pth", &err);
    CHECK_STR(err.text, "");
    if (!archive) return;
    CHECK_INT(spm_archive_count(archive), VIT_COUNT);
    elements = 0;
    sum = 0;
    for (i = 0; i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *tensor = spm_archive_tensor_at(archive, i);
        float *values = (float *)malloc((size_t)tensor->count * sizeof *values);
        int64_t k;
        CHECK_INT(spm_archive_read_f32(archive, tensor, values, &err), SPM_OK);
        for (k = 0; k < tensor->count; k++) sum += fabs((double)values[k]);
        elements += tensor->count;
        free(values);
    }
    CHECK_INT(elements, VIT_ELEMENTS);
    CHECK_NEAR(sum, VIT_SUM, 1e-6 * VIT_SUM);
    spm_archive_close(archive);
}

int main(void)
{
    const char *temporary = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/spurmem_test_pack", temporary ? temporary : "/tmp");
    ctx = spm_context_create(NULL);
    if (!ctx || spm_directory_create(ctx, folder, NULL)) {
        printf("no context or no temporary folder\n");
        return 1;
    }
    TEST(json_round_trip);
    TEST(json_grammar);
    TEST(decimal_comma);
    TEST(csv_tables);
    TEST(csv_errors);
    TEST(safetensors_round_trip);
    TEST(torch_round_trip);
    TEST(writer_errors);
    TEST(number_types);
    TEST(safetensors_hostile);
    TEST(legacy_views);
    TEST(pickle_hostile);
    TEST(zip_twice);
    TEST(raw_values);
    TEST(maltreated_files);
    TEST(tar_files);
    TEST(idx_arrays);
    TEST(npy_arrays);
    TEST(real_checkpoints);
    remove(scratch("a.safetensors"));
    remove(scratch("a.pth"));
    remove(scratch("t.tar"));
    remove(scratch("images.gz"));
    remove(scratch("x.npy"));
    remove(folder);
    spm_context_destroy(ctx);
    return TEST_END;
}
