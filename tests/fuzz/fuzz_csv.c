/* fuzz_csv.c - any bytes as a table, with commas and with white space; every field is touched. */
#include "fuzz.h"

static void table(spm_context *ctx, const uint8_t *data, size_t size, char separator)
{
    spm_error err = SPM_ZERO;
    spm_csv *csv = spm_csv_parse(ctx, "fuzz.csv", (const char *)data, size, separator, &err);
    int64_t row;
    int column;
    size_t sum = 0;
    if (!csv) {
        if (!err.text[0]) abort();
        return;
    }
    for (column = 0; column < spm_csv_columns(csv); column++) {
        sum += strlen(spm_csv_header(csv, column));
        if (spm_csv_column(csv, spm_csv_header(csv, column)) < 0) abort();
        for (row = 0; row < spm_csv_rows(csv) && row < 1000; row++) sum += strlen(spm_csv_field(csv, row, column));
    }
    for (row = 1; row < spm_csv_rows(csv); row++)
        if (spm_csv_line(csv, row) <= spm_csv_line(csv, row - 1)) abort();
    if (sum > size) abort();
    spm_csv_destroy(csv);
}

FUZZ_BODY(ctx, data, size)
{
    table(ctx, data, size, ',');
    table(ctx, data, size, ' ');
}
