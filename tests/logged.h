/* logged.h - a context whose log the test reads. */
#ifndef SPURMEM_TEST_LOGGED_H
#define SPURMEM_TEST_LOGGED_H
#include "test.h"
#include "../spurmem.h"

static char last_log[600];
static int logs;

static inline void on_log(void *user, spm_log_level level, const char *text)
{
    (void)user;
    (void)level;
    snprintf(last_log, sizeof last_log, "%s", text);
    logs++;
}

static inline spm_context *logged_context(int threads)
{
    spm_context_desc desc = SPM_ZERO;
    desc.threads = threads;
    desc.log = on_log;
    logs = 0;
    last_log[0] = 0;
    return spm_context_create(&desc);
}
#endif
