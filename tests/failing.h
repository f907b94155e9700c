/* failing.h - an allocator that counts, and fails on demand. */
#ifndef SPURMEM_TEST_FAILING_H
#define SPURMEM_TEST_FAILING_H
#include "test.h"
#include "../spurmem.h"
#include <pthread.h>

/* Call number `fail_at` fails, counted from 1 (0: none); `from_then_on`: all later ones too. */
typedef struct failing {
    pthread_mutex_t lock;
    long calls, live, fail_at;
    size_t largest;           /* that was asked for */
    int from_then_on;
} failing;

static inline void *failing_alloc(void *user, size_t bytes)
{
    failing *f = (failing *)user;
    void *memory = NULL;
    int fails;
    pthread_mutex_lock(&f->lock);
    f->calls++;
    if (bytes > f->largest) f->largest = bytes;
    fails = f->fail_at && (f->calls == f->fail_at || (f->from_then_on && f->calls > f->fail_at));
    if (!fails) {
        memory = malloc(bytes);
        if (memory) f->live++;
    }
    pthread_mutex_unlock(&f->lock);
    return memory;
}

static inline void failing_free(void *user, void *memory)
{
    failing *f = (failing *)user;
    pthread_mutex_lock(&f->lock);
    if (memory) f->live--;
    pthread_mutex_unlock(&f->lock);
    free(memory);
}

/* So many allocations succeed from here on, and none behind them. */
static inline void failing_after(failing *f, long allocations)
{
    f->fail_at = f->calls + allocations + 1;
    f->from_then_on = 1;
}

static inline spm_context *failing_context(failing *f, int threads)
{
    spm_context_desc desc = SPM_ZERO;
    desc.alloc = failing_alloc;
    desc.free = failing_free;
    desc.alloc_user = f;
    desc.threads = threads;
    return spm_context_create(&desc);
}
#endif
