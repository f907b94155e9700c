/* test_synth.c - runs the built data tool synth_birds and looks at what it writes. */
#include "programs.h"

/* Runs it with --out BUILD/test_synth_data/name. */
static int run_out(const char *name, const char *arguments)
{
    return run("synth_birds --out \"@/%s\" %s", name, arguments);
}

static int exists(const char *name) { return test_exists(at("%s", name)); }
static int same(const char *a, const char *b) { return test_same_files(at("%s", a), at("%s", b)); }

static spm_csv *metadata(const char *folder)
{
    size_t size;
    char *data = test_read(at("%s/metadata.csv", folder), &size);
    spm_csv *csv = data ? spm_csv_parse(ctx, "metadata.csv", data, size, ',', NULL) : NULL;
    free(data);
    return csv;
}

static void count_groups(const char *folder, int counts[3][4])
{
    spm_csv *csv = metadata(folder);
    int64_t row;
    memset(counts, 0, 12 * sizeof(int));
    CHECK(csv != NULL);
    if (!csv) return;
    CHECK_INT(spm_csv_columns(csv), 6);
    for (row = 0; row < spm_csv_rows(csv); row++) {
        int y = atoi(spm_csv_field(csv, row, spm_csv_column(csv, "y")));
        int split = atoi(spm_csv_field(csv, row, spm_csv_column(csv, "split")));
        int place = atoi(spm_csv_field(csv, row, spm_csv_column(csv, "place")));
        const char *place_file = spm_csv_field(csv, row, spm_csv_column(csv, "place_filename"));
        CHECK_INT(atoi(spm_csv_field(csv, row, spm_csv_column(csv, "img_id"))), row + 1);
        CHECK(strncmp(place_file, place ? "water/" : "land/", place ? 6 : 5) == 0);
        CHECK(y >= 0 && y < 2 && place >= 0 && place < 2 && split >= 0 && split < 3);
        if (y >= 0 && y < 2 && place >= 0 && place < 2 && split >= 0 && split < 3) counts[split][2 * y + place]++;
    }
    spm_csv_destroy(csv);
}

static void counts_of_the_defaults(void)
{
    int counts[3][4], i;
    static const int train[4] = {950, 50, 50, 950};
    NEED_PROGRAMS();
    CHECK_INT(run_out("default", "--size 16 --quiet"), 0);
    CHECK(said("950"));
    count_groups("default", counts);
    for (i = 0; i < 4; i++) {
        CHECK_INT(counts[0][i], train[i]);
        CHECK_INT(counts[1][i], 100);
        CHECK_INT(counts[2][i], 250);
    }
}

static void counts_of_odd_numbers(void)
{
    int counts[3][4];
    NEED_PROGRAMS();
    CHECK_INT(run_out("odd", "--size=16 --train=7 --val=0 --test=5 --correlation=1"), 0);
    count_groups("odd", counts);
    CHECK_INT(counts[0][0] + counts[0][3], 7);
    CHECK_INT(counts[0][1] + counts[0][2], 0);
    CHECK_INT(counts[1][0] + counts[1][1] + counts[1][2] + counts[1][3], 0);
    CHECK_INT(counts[2][0] + counts[2][1] + counts[2][2] + counts[2][3], 5);
}

/* Every picture decodes, is 64 x 64, and is a picture: neither flat nor the same as the one before. */
static void pictures_decode(void)
{
    spm_csv *csv;
    int64_t row;
    uint64_t before = 0;
    NEED_PROGRAMS();
    CHECK_INT(run_out("pictures", "--train 40 --val 8 --test 16"), 0);
    csv = metadata("pictures");
    CHECK(csv != NULL);
    if (!csv) return;
    CHECK_INT(spm_csv_rows(csv), 64);
    for (row = 0; row < spm_csv_rows(csv); row++) {
        const char *name = spm_csv_field(csv, row, spm_csv_column(csv, "img_filename"));
        spm_image image = SPM_ZERO;
        spm_error error = SPM_ZERO;
        CHECK_MSG(spm_image_load(ctx, at("pictures/%s", name), NULL, &image, &error) == SPM_OK, error.text);
        if (!image.pixels) continue;
        CHECK_INT(image.width, 64);
        CHECK_INT(image.height, 64);
        if (image.width == 64 && image.height == 64) {
            uint64_t sum = 0;
            int low = 255, high = 0, i;
            for (i = 0; i < 64 * 64 * 3; i++) {
                sum = sum * 31u + image.pixels[i];
                low = image.pixels[i] < low ? image.pixels[i] : low;
                high = image.pixels[i] > high ? image.pixels[i] : high;
            }
            CHECK(high - low > 60);
            CHECK(sum != before);
            before = sum;
        }
        spm_image_free(ctx, &image);
    }
    spm_csv_destroy(csv);
}

static void the_same_seed_gives_the_same_bytes(void)
{
    char left[200], right[200];
    int i;
    NEED_PROGRAMS();
    CHECK_INT(run_out("a", "--train 30 --val 4 --test 8 --seed 7"), 0);
    CHECK_INT(run_out("b", "--train 30 --val 4 --test 8 --seed 7 --quiet"), 0);
    CHECK_INT(run_out("c", "--train 30 --val 0 --test 0 --seed 7"), 0);
    CHECK_INT(run_out("d", "--train 30 --val 4 --test 8 --seed 8"), 0);
    CHECK(same("a/metadata.csv", "b/metadata.csv"));
    CHECK(!same("a/metadata.csv", "d/metadata.csv"));
    for (i = 0; i < 30; i++) {
        snprintf(left, sizeof left, "a/images/train/%05d.jpg", i);
        snprintf(right, sizeof right, "b/images/train/%05d.jpg", i);
        CHECK(same(left, right));
        right[0] = 'c'; /* the other splits change nothing */
        CHECK(same(left, right));
        right[0] = 'd';
        CHECK(!same(left, right));
    }
    for (i = 0; i < 8; i++) {
        snprintf(left, sizeof left, "a/images/test/%05d.jpg", i);
        snprintf(right, sizeof right, "b/images/test/%05d.jpg", i);
        CHECK(same(left, right));
    }
}

static void a_wrong_command_line_is_2(void)
{
    NEED_PROGRAMS();
    CHECK_INT(run("synth_birds"), 2);
    CHECK(said("--out"));
    CHECK_INT(run_out("bad", "--trian 5"), 2);
    CHECK(said("--train"));
    CHECK_INT(run_out("bad", "--corelation=.5"), 2);
    CHECK(said("--correlation"));
    CHECK_INT(run_out("bad", "--entirely-different 5"), 2);
    CHECK_INT(run_out("bad", "--train many"), 2);
    CHECK_INT(run_out("bad", "--train -1"), 2);
    CHECK_INT(run_out("bad", "--train 5x"), 2);
    CHECK_INT(run_out("bad", "--train"), 2);
    CHECK_INT(run_out("bad", "--seed --quiet"), 2);
    CHECK_INT(run_out("bad", "--size 8"), 2);
    CHECK_INT(run_out("bad", "--correlation 1.5"), 2);
    CHECK_INT(run_out("bad", "--correlation nan"), 2);
    CHECK_INT(run_out("bad", "--seed -1"), 2);
    CHECK_INT(run_out("bad", "--quality 0"), 2);
    CHECK_INT(run_out("bad", "--quiet=1"), 2);
    CHECK_INT(run_out("bad", "--train 0 --val 0 --test 0"), 2);
    CHECK_INT(run_out("bad", "more"), 2);
    CHECK(!exists("bad/metadata.csv"));
    CHECK_INT(run("synth_birds --help"), 0);
    CHECK(said("--difficulty"));
}

static void folders_that_cannot_be_written_are_1(void)
{
    NEED_PROGRAMS();
    put_text(at("file"), "not a folder\n");
    CHECK_INT(run_out("file", "--train 2 --val 0 --test 0"), 1);
    CHECK_INT(run_out("file/below", "--train 2 --val 0 --test 0"), 1);
    CHECK(said("file"));
    put_text(at("foreign/letter.txt"), "mine\n");
    CHECK_INT(run_out("foreign", "--train 2 --val 0 --test 0"), 1);
    CHECK(said("--force"));
    CHECK(!exists("foreign/metadata.csv"));
    CHECK_INT(run_out("foreign", "--train 2 --val 0 --test 0 --force"), 0);
    CHECK(exists("foreign/metadata.csv") && exists("foreign/letter.txt"));
    spm_context_clear_error(ctx);
}

/* An earlier set of the tool is replaced, and pictures that the new one does not have go. */
static void an_earlier_set_is_replaced(void)
{
    NEED_PROGRAMS();
    CHECK_INT(run_out("again", "--train 9 --val 2 --test 3 --size 16"), 0);
    CHECK(exists("again/images/train/00008.jpg") && exists("again/images/test/00002.jpg"));
    CHECK_INT(run_out("again", "--train 4 --val 0 --test 3 --size 16"), 0);
    CHECK(exists("again/images/train/00003.jpg") && !exists("again/images/train/00004.jpg"));
    CHECK(!exists("again/images/val/00000.jpg") && exists("again/images/test/00002.jpg"));
}

int main(void)
{
    programs_begin("test_synth_data", "synth_birds");
    TEST(counts_of_the_defaults);
    TEST(counts_of_odd_numbers);
    TEST(pictures_decode);
    TEST(the_same_seed_gives_the_same_bytes);
    TEST(a_wrong_command_line_is_2);
    TEST(folders_that_cannot_be_written_are_1);
    TEST(an_earlier_set_is_replaced);
    spm_context_destroy(ctx);
    return TEST_END;
}
