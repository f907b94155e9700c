/* fuzz_file.h - a file for readers that want a path: in memory where the system has such a folder, without a name, so
 * that nothing is left behind.  fuzz_file_open empties it and gives its path; fuzz_file_add appends. */
#ifndef SPURMEM_FUZZ_FILE_H
#define SPURMEM_FUZZ_FILE_H
#include <fcntl.h>

static int fuzz_file = -1;
static size_t fuzz_file_used;

static void fuzz_file_open(char *path, size_t size)
{
    if (fuzz_file < 0) {
        snprintf(path, size, "/dev/shm/fuzz_file_%ld", (long)getpid());
        fuzz_file = open(path, O_RDWR | O_CREAT, 0600);
        if (fuzz_file < 0) abort();
        unlink(path);
    }
    if (ftruncate(fuzz_file, 0) != 0) abort();
    fuzz_file_used = 0;
    snprintf(path, size, "/proc/self/fd/%d", fuzz_file);
}

static void fuzz_file_add(const void *bytes, size_t size)
{
    if (size && pwrite(fuzz_file, bytes, size, (off_t)fuzz_file_used) != (ssize_t)size) abort();
    fuzz_file_used += size;
}
#endif
