/* fuzz.h - one body for libFuzzer and for replaying files: `FUZZ_BODY(ctx, data, size) { ... }`.
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_X.c -lm          fuzzes
 *   cc -DFUZZ_STANDALONE tests/fuzz/fuzz_X.c -lm; ./a.out FILE...                     replays
 * The context's allocator refuses what no input of that size can need: a claim that the file cannot back is a
 * finding. */
#ifndef SPURMEM_FUZZ_H
#define SPURMEM_FUZZ_H
#define SPURMEM_STATIC
#include "../../spurmem.h"
#include <stdio.h>
#include <stdlib.h>

#ifndef FUZZ_MEMORY
  #define FUZZ_MEMORY (8u << 20) /* what an empty input may take */
#endif

typedef struct fuzz_memory {
    size_t most;
} fuzz_memory;

static void *fuzz_alloc(void *user, size_t bytes)
{
    const fuzz_memory *memory = (const fuzz_memory *)user;
    if (bytes > memory->most) {
        fprintf(stderr, "an allocation of %lu bytes, more than %lu\n", (unsigned long)bytes,
                (unsigned long)memory->most);
        abort();
    }
    return malloc(bytes);
}

static void fuzz_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

static void fuzz_one(spm_context *ctx, const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spm_context_desc desc = SPM_ZERO;
    fuzz_memory memory;
    spm_context *ctx;
    memory.most = size * 96 + FUZZ_MEMORY;
    desc.alloc = fuzz_alloc;
    desc.free = fuzz_free;
    desc.alloc_user = &memory;
    desc.threads = 1;
    ctx = spm_context_create(&desc);
    if (ctx) fuzz_one(ctx, data, size);
    spm_context_destroy(ctx);
    return 0;
}

#ifdef FUZZ_STANDALONE
int main(int argc, char **argv)
{
    int i;
    for (i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        uint8_t *data = NULL;
        size_t size = 0, room = 0, got = 1;
        if (!file) {
            fprintf(stderr, "%s: cannot be opened\n", argv[i]);
            return 1;
        }
        while (got) {
            if (size == room) {
                uint8_t *bigger = (uint8_t *)realloc(data, room = room * 2 + 65536);
                if (!bigger) return 1;
                data = bigger;
            }
            got = fread(data + size, 1, room - size, file);
            size += got;
        }
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
        free(data);
    }
    printf("%d inputs replayed\n", argc - 1);
    return 0;
}
#endif
#define FUZZ_BODY(ctx, data, size) static void fuzz_one(spm_context *ctx, const uint8_t *data, size_t size)
#endif
