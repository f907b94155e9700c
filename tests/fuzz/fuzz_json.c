/* fuzz_json.c - any bytes as JSON; what parses is written out and must parse again to the same shape. */
#include "fuzz.h"

static void rewrite(spm_json *json, const char *key, const spm_json_value *value)
{
    int64_t i;
    switch (spm_json_type_of(value)) {
    case SPM_JSON_NULL: spm_json_null(json, key); break;
    case SPM_JSON_BOOL: spm_json_bool(json, key, spm_json_as_int(value, 0) != 0); break;
    case SPM_JSON_NUMBER: spm_json_number(json, key, spm_json_as_number(value, 0)); break;
    case SPM_JSON_STRING: spm_json_string(json, key, spm_json_as_string(value, NULL)); break;
    case SPM_JSON_ARRAY:
        spm_json_array_begin(json, key);
        for (i = 0; i < spm_json_length(value); i++) rewrite(json, NULL, spm_json_at(value, i));
        spm_json_array_end(json);
        break;
    case SPM_JSON_OBJECT:
        spm_json_object_begin(json, key);
        for (i = 0; i < spm_json_length(value); i++) rewrite(json, spm_json_key_at(value, i), spm_json_at(value, i));
        spm_json_object_end(json);
        break;
    }
}

static void same(const spm_json_value *a, const spm_json_value *b)
{
    int64_t i;
    if (spm_json_type_of(a) != spm_json_type_of(b) && spm_json_type_of(a) != SPM_JSON_NUMBER) abort(); /* inf is null */
    if (spm_json_length(a) != spm_json_length(b)) abort();
    if (spm_json_type_of(a) == SPM_JSON_STRING && strcmp(spm_json_as_string(a, ""),
                                                         spm_json_as_string(b, "")) != 0) abort();
    for (i = 0; i < spm_json_length(a); i++) same(spm_json_at(a, i), spm_json_at(b, i));
}

FUZZ_BODY(ctx, data, size)
{
    spm_error err = SPM_ZERO;
    spm_json_value *root = spm_json_parse(ctx, "fuzz.json", (const char *)data, size, &err), *again;
    spm_json *json;
    const char *text;
    if (!root) {
        if (!err.text[0]) abort();
        return;
    }
    json = spm_json_create(ctx);
    rewrite(json, NULL, root);
    text = spm_json_finish(json);
    if (!text) abort();
    again = spm_json_parse(ctx, "again.json", text, strlen(text), &err);
    if (!again) abort();
    same(root, again);
    spm_json_free(ctx, again);
    spm_json_free(ctx, root);
    spm_json_destroy(json);
}
