/* tar.h - writes ustar archives by hand. */
#ifndef SPURMEM_TEST_TAR_H
#define SPURMEM_TEST_TAR_H
#include "test.h"

static inline void tar_add(FILE *tar, const char *name, const void *data, size_t size)
{
    unsigned char header[512], zero[512];
    unsigned sum = 0;
    size_t i;
    memset(header, 0, sizeof header);
    memset(zero, 0, sizeof zero);
    snprintf((char *)header, 100, "%.99s", name);
    memcpy(header + 100, "0000644\0" "0000000\0" "0000000", 23);
    snprintf((char *)header + 124, 12, "%011lo", (unsigned long)size);
    snprintf((char *)header + 136, 12, "%011o", 0);
    memset(header + 148, ' ', 8);
    header[156] = '0';
    memcpy(header + 257, "ustar\00000", 8);
    for (i = 0; i < 512; i++) sum += header[i];
    snprintf((char *)header + 148, 8, "%06o", sum);
    fwrite(header, 1, 512, tar);
    fwrite(data, 1, size, tar);
    if (size % 512) fwrite(zero, 1, 512 - size % 512, tar);
}

/* Adds a copy of a file. */
static inline void tar_add_file(FILE *tar, const char *name, const char *path)
{
    size_t size;
    char *data = test_read(path, &size);
    CHECK(data != NULL);
    if (data) tar_add(tar, name, data, size);
    free(data);
}

static inline void tar_close(FILE *tar)
{
    unsigned char zero[1024] = { 0 };
    fwrite(zero, 1, sizeof zero, tar);
    fclose(tar);
}
#endif
