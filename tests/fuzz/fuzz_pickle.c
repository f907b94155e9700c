/* fuzz_pickle.c - any bytes as the pickle of a torch zip file that is otherwise in order: four storages of 64, 16, 4 and
 * 0 bytes lie beside it under the keys 0 to 3. */
#include "fuzz_archive.h"

static uint8_t *put16(uint8_t *at, uint32_t value)
{
    *at++ = (uint8_t)value;
    *at++ = (uint8_t)(value >> 8);
    return at;
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    return put16(put16(at, value & 0xFFFF), value >> 16);
}

FUZZ_BODY(ctx, data, size)
{
    static const char names[5][10] = { "a/data.pkl", "a/data/0", "a/data/1", "a/data/2", "a/data/3" };
    const uint32_t sizes[5] = { (uint32_t)size, 64, 16, 4, 0 };
    uint32_t local[5], name, directory;
    uint8_t *file = (uint8_t *)malloc(size + 1024), *at = file;
    int i;
    if (!file || size > 0xFFFFFF) {
        free(file);
        return;
    }
    for (i = 0; i < 5; i++) {
        name = i ? 8 : 10;
        local[i] = (uint32_t)(at - file);
        at = put32(at, 0x04034B50u);
        memset(at, 0, 22);
        at = put16(at + 22, name);
        at = put16(at, 0);
        memcpy(at, names[i], name);
        at += name;
        if (i) memset(at, 0x3F, sizes[i]);
        else if (size) memcpy(at, data, size);
        at += sizes[i];
    }
    directory = (uint32_t)(at - file);
    for (i = 0; i < 5; i++) {
        name = i ? 8 : 10;
        at = put32(at, 0x02014B50u);
        memset(at, 0, 16);
        at = put32(put32(at + 16, sizes[i]), sizes[i]);
        at = put16(at, name);
        memset(at, 0, 12);
        at = put32(at + 12, local[i]);
        memcpy(at, names[i], name);
        at += name;
    }
    name = (uint32_t)(at - file) - directory;
    at = put32(at, 0x06054B50u);
    at = put32(at, 0);
    at = put16(put16(at, 5), 5);
    at = put16(put32(put32(at, name), directory), 0);
    fuzz_archive(ctx, file, (size_t)(at - file), "torch zip");
    free(file);
}
