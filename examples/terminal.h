/* terminal.h - what the example programs share: a progress bar, an epoch line, Ctrl-C.
 *
 * Include it behind spurmem.h. Progress and log go to stderr: a bar with rate and time left on a terminal, a plain line
 * every ten seconds elsewhere. */
#ifndef SPURMEM_EXAMPLES_TERMINAL_H
#define SPURMEM_EXAMPLES_TERMINAL_H
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
    #include <io.h>
    #define stderr_is_terminal() _isatty(2)
#else
    #include <unistd.h>
    #define stderr_is_terminal() isatty(2)
#endif

static volatile sig_atomic_t interrupted; /* 1 after Ctrl-C: the next progress call stops the work */
static double progress_last;
static int progress_width, progress_quiet;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static void catch_interrupts(void)
{
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
}

static void progress_clear(void)
{
    if (progress_width) fprintf(stderr, "\r%*s\r", progress_width, "");
    progress_width = 0;
}

static int on_progress(void *user, const spm_progress *p)
{
    double rate = p->seconds > 0.0 ? (double)p->done / p->seconds : 0.0;
    double left = rate > 0.0 ? (double)(p->total - p->done) / rate : 0.0;
    int terminal = stderr_is_terminal(), i, filled = p->total > 0 ? (int)(24 * p->done / p->total) : 0, n;
    char bar[32];
    (void)user;
    if (p->seconds < progress_last) progress_last = 0.0; /* another piece of work has begun */
    if (progress_quiet || p->seconds - progress_last < (terminal ? 0.1 : 10.0)) return interrupted;
    progress_last = p->seconds;
    for (i = 0; i < 24; i++) bar[i] = i < filled ? '#' : '.';
    bar[24] = 0;
    if (terminal) {
        progress_clear();
        n = fprintf(stderr, "%-22s [%s] %3d%%  %8.1f %s/s  %d:%02d left", p->what, bar,
                    p->total > 0 ? (int)(100 * p->done / p->total) : 0, rate, p->unit, (int)left / 60, (int)left % 60);
        progress_width = n > 0 ? n : 0;
        fflush(stderr);
    } else {
        fprintf(stderr, "%s: %lld of %lld %s, %.1f/s, %d:%02d left\n", p->what, (long long)p->done, (long long)p->total,
                p->unit, rate, (int)left / 60, (int)left % 60);
    }
    return interrupted;
}

static void on_log(void *user, spm_log_level level, const char *text)
{
    (void)user;
    progress_clear();
    fprintf(stderr, "%s%s\n", level == SPM_LOG_WARNING ? "warning: " : "", text);
}

/* One line an epoch: the objective, then mean and worst-group accuracy of every split. */
static void on_epoch(void *user, int64_t epoch, const spm_eval *train, const spm_eval *val, const spm_eval *test,
                     double loss, double seconds)
{
    const spm_eval *evals[3];
    int i;
    (void)user;
    if (progress_quiet) return;
    evals[0] = train;
    evals[1] = val;
    evals[2] = test;
    progress_clear();
    fprintf(stderr, "epoch %3lld  loss %-8.4g", (long long)epoch + 1, loss);
    for (i = 0; i < 3; i++) {
        if (evals[i]->count)
            fprintf(stderr, "  %s: mean %5.1f, worst group %5.1f", spm_split_name(evals[i]->split),
                    100.0 * evals[i]->mean_accuracy, 100.0 * evals[i]->worst_accuracy);
    }
    fprintf(stderr, "  %.1f s\n", seconds);
}

/* "93.4", or "-" for NaN. */
static void percent(char *text, size_t size, double share)
{
    if (share == share)
        snprintf(text, size, "%.1f", 100.0 * share);
    else
        snprintf(text, size, "-");
}
#endif
