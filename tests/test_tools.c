/* test_tools.c - runs the built data tools, `spurmem pack` and the study on miniatures of the public archives that it draws
 * itself, and reads what they write with the library.  (synth_birds has a test of its own.) */
#include "programs.h"

static spm_dataset *open_set(const char *path)
{
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_dataset *set;
    where.path = path;
    set = spm_dataset_open(ctx, &where, &err);
    CHECK_STR(err.text, "");
    return set;
}

/* Writes a pair of idx files: n pictures of 28 x 28, labels i % 10, pixel values telling picture and place; gz or not. */
static uint8_t digit_pixel(int set, int i, int x, int y)
{
    return (uint8_t)((x > 8 && x < 20 && y > 4 && y < 24) ? 100 + (set * 31 + i * 7 + x * 3 + y) % 156 : 0);
}

static void write_digits(const char *folder, const char *set, int which, int n, int packed)
{
    size_t size = 16 + (size_t)n * 784, used = 16;
    uint8_t *x = (uint8_t *)malloc(size), *y = (uint8_t *)malloc((size_t)n + 8), *out = NULL;
    int i, r, c;
    CHECK(x && y);
    if (!x || !y) return;
    memcpy(x, "\0\0\x08\x03\0\0\0\0\0\0\0\x1c\0\0\0\x1c", 16);
    memcpy(y, "\0\0\x08\x01\0\0\0\0", 8);
    x[6] = y[6] = (uint8_t)(n >> 8);
    x[7] = y[7] = (uint8_t)n;
    for (i = 0; i < n; i++) {
        y[8 + i] = (uint8_t)(i % 10);
        for (r = 0; r < 28; r++)
            for (c = 0; c < 28; c++) x[used++] = digit_pixel(which, i, c, r);
    }
    if (packed) {
        size_t m;
        CHECK(spm_deflate(ctx, x, size, 2, &out, &m, NULL) == SPM_OK);
        put(at("%s/%s-images-idx3-ubyte.gz", folder, set), out, m);
        spm_free(ctx, out);
    } else {
        put(at("%s/%s-images-idx3-ubyte", folder, set), x, size);
    }
    put(at("%s/%s-labels-idx1-ubyte", folder, set), y, (size_t)n + 8);
    free(x);
    free(y);
}

static uint8_t object_byte(int file, int i, int k) { return (uint8_t)(file * 50 + i * 13 + k * 7); }

static void write_cifar(void)
{
    static uint8_t data[60 * 3073];
    int file, i, k;
    for (file = 0; file < 2; file++) {
        for (i = 0; i < 60; i++) {
            data[i * 3073] = (uint8_t)(i % 10);
            for (k = 0; k < 3072; k++) data[i * 3073 + 1 + k] = object_byte(file, i, k);
        }
        put(at(file ? "cifar/test_batch.bin" : "cifar/data_batch_1.bin"), data, sizeof data);
    }
}

/* ---- dominoes ---- */

static void dominoes(void)
{
    spm_dataset *set;
    int64_t i, agree[3] = { 0, 0, 0 };
    NEED_PROGRAMS();
    write_digits("mnist", "train", 0, 100, 1);
    write_digits("mnist", "t10k", 1, 100, 0);
    write_cifar();
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/dominoes --train 10 --val 2 --test 6 --quiet "
                  "--correlation 0.8"), 0);
    CHECK(said("18 pictures"));
    set = open_set(at("dominoes"));
    if (!set) return;
    CHECK(spm_dataset_size(set) == 18 && spm_dataset_split_size(set, SPM_TRAIN) == 10
          && spm_dataset_split_size(set, SPM_TEST) == 6);
    CHECK_STR(spm_dataset_group_name(set, 2), "truck, digit 0");
    for (i = 0; i < 18; i++) {
        const spm_example *e = spm_dataset_example(set, i);
        spm_image image = SPM_ZERO;
        int found[2] = { 0, 0 }, n, x, y, file = e->split == SPM_TEST;
        agree[e->split] += e->y == e->confounder;
        CHECK(spm_dataset_image(set, i, &image, NULL) == SPM_OK && image.width == 32 && image.height == 64);
        if (!image.pixels) continue;
        for (n = 0; n < 100; n++) { /* which digit, which object: by all their pixels */
            int same = n % 10 == (e->confounder ? 1 : 0);
            for (y = 0; same && y < 32; y++)
                for (x = 0; same && x < 32; x++) {
                    int inside = x >= 2 && x < 30 && y >= 2 && y < 30;
                    same = image.pixels[(y * 32 + x) * 3 + 1] == (inside ? digit_pixel(file, n, x - 2, y - 2) : 0);
                }
            found[0] += same;
        }
        for (n = 0; n < 60; n++) {
            int same = n % 10 == (e->y ? 9 : 1);
            for (x = 0; same && x < 1024; x++)
                same = image.pixels[(1024 + x) * 3] == object_byte(file, n, x)
                       && image.pixels[(1024 + x) * 3 + 2] == object_byte(file, n, 2048 + x);
            found[1] += same;
        }
        CHECK(found[0] >= 1 && found[1] == 1);
        spm_image_free(ctx, &image);
    }
    CHECK(agree[0] == 8 && agree[1] == 1 + 1 && agree[2] == 2 + 2);
    spm_dataset_close(set);
    /* the same seed, the same bytes; another seed, others */
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/dominoes2 --train 10 --val 2 --test 6 "
                  "--correlation=0.8 --quiet"), 0);
    CHECK(test_same_files(at("dominoes/metadata.csv"), at("dominoes2/metadata.csv"))
          && test_same_files(at("dominoes/images/train/00003.png"), at("dominoes2/images/train/00003.png")));
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/dominoes2 --train 10 --val 2 --test 6 "
                  "--correlation=0.8 --quiet --seed 1"), 0);
    CHECK(!test_same_files(at("dominoes/metadata.csv"), at("dominoes2/metadata.csv")));
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/dominoes3"), 1);
    CHECK(said("6 training pictures of class 1, 4000 are wanted"));
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/dominoes3 --classes 1,1"), 2);
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/nowhere --out @/dominoes3"), 1);
    CHECK(said("nowhere: no such file or folder"));
    CHECK_INT(run("make_dominoes --mnist @/mnist --objects @/cifar --out @/mnist --train 2 --val 0 --test 0"), 1);
    CHECK(said("holds something else"));
    CHECK_INT(run("make_dominoes --help"), 0);
    CHECK_INT(run("make_dominoes --objects @/cifar --out @/x"), 2);
    CHECK(said("--mnist DIR is missing"));
    CHECK_INT(run("make_dominoes --traim 3"), 2);
    CHECK(said("did you mean --train?"));
    CHECK_INT(run("make_dominoes --train 1.5"), 2);
    CHECK(said("a whole number from 2"));
}

/* ---- coloured MNIST ---- */

static void coloured(void)
{
    static const char difficulties[6][20] = { "magnitude-large", "magnitude-medium", "magnitude-small", "variance-low",
                                              "variance-medium", "variance-high" };
    static const int most[6] = { 784, 16, 4, 49, 49, 49 };
    spm_dataset *set;
    spm_image image = SPM_ZERO;
    int64_t i;
    int k, x, y, agree = 0;
    NEED_PROGRAMS();
    write_digits("mnist", "train", 0, 100, 1);
    write_digits("mnist", "t10k", 1, 100, 0);
    for (k = 0; k < 6; k++) {
        int coloured_pixels = 0, box = 0;
        CHECK_INT(run("make_cmnist --mnist @/mnist --out @/five_%s --difficulty %s --correlation 0.75 --quiet",
                      difficulties[k], difficulties[k]), 0);
        set = open_set(at("five_%s", difficulties[k]));
        if (!set) return;
        CHECK(spm_dataset_classes(set) == 5 && spm_dataset_confounders(set) == 5 && spm_dataset_size(set) == 200);
        CHECK(spm_dataset_split_size(set, SPM_TRAIN) == 80 && spm_dataset_split_size(set, SPM_VAL) == 20);
        for (i = 0, agree = 0; i < 80; i++) agree += spm_dataset_example(set, i)->y == spm_dataset_example(set, i)->confounder;
        CHECK(agree >= 58 && agree <= 62); /* three quarters, rounded class by class */
        for (i = 0; i < 5; i++) CHECK_INT(spm_dataset_group_count(set, SPM_TEST, (int)i * 5 + 2), 4);
        CHECK(spm_dataset_image(set, 7, &image, NULL) == SPM_OK && image.width == 28);
        for (y = 0; image.pixels && y < 28; y++) {
            for (x = 0; x < 28; x++) {
                const uint8_t *p = image.pixels + (y * 28 + x) * 3;
                int digit = x > 8 && x < 20 && y > 4 && y < 24;
                CHECK(!digit || (p[0] == p[1] && p[1] == p[2] && p[0] >= 100));
                if (digit || !(p[0] | p[1] | p[2])) continue;
                coloured_pixels++;
                if (x >= box) box = x + 1;
                if (y >= box) box = y + 1;
            }
        }
        CHECK(coloured_pixels <= most[k] && coloured_pixels >= (k < 4 ? most[k] * 2 / 3 : 20));
        CHECK(box <= (k == 0 || k == 5 ? 28 : k == 1 ? 4 : k == 2 ? 2 : k == 3 ? 7 : 14));
        spm_image_free(ctx, &image);
        spm_dataset_close(set);
    }
    CHECK_INT(run("make_cmnist --mnist @/mnist --out @/two --variant two --quiet"), 0);
    set = open_set(at("two"));
    if (!set) return;
    CHECK_STR(spm_dataset_group_name(set, 1), "digit 0-4, green");
    for (i = agree = 0; i < 80; i++) agree += spm_dataset_example(set, i)->y == spm_dataset_example(set, i)->confounder;
    CHECK(agree >= 71 && agree <= 73);
    for (i = 0; i < 10; i++) { /* one channel holds the digit, the others nothing */
        int a = spm_dataset_example(set, i)->confounder, sum[3] = { 0, 0, 0 };
        CHECK(spm_dataset_image(set, i, &image, NULL) == SPM_OK);
        for (x = 0; image.pixels && x < 28 * 28 * 3; x++) sum[x % 3] += image.pixels[x];
        CHECK(sum[a] > 0 && sum[1 - a] == 0 && sum[2] == 0);
        spm_image_free(ctx, &image);
    }
    spm_dataset_close(set);
    CHECK_INT(run("make_cmnist --mnist @/mnist --out @/two3 --variant three"), 2);
    CHECK(said("one of two|five is wanted"));
}

/* ---- Waterbirds ---- */

#define BIRDS 30
static const char species[5][32] = { "001.Black_footed_Albatross", "014.Indigo_Bunting", "086.Pacific_Loon", "017.Cardinal",
                                     "144.Common_Tern" };

static spm_image flat(int width, int height, int r, int g, int b)
{
    spm_image image = SPM_ZERO;
    int i;
    CHECK(spm_image_create(ctx, width, height, &image, NULL) == SPM_OK);
    for (i = 0; image.pixels && i < width * height; i++) {
        image.pixels[3 * i] = (uint8_t)r;
        image.pixels[3 * i + 1] = (uint8_t)g;
        image.pixels[3 * i + 2] = (uint8_t)b;
    }
    return image;
}

static void put_picture(const char *path, spm_image *image)
{
    uint8_t *data = NULL;
    size_t size = 0;
    if (strstr(path, ".png")) CHECK(spm_image_encode_png(ctx, image, &data, &size, NULL) == SPM_OK);
    else CHECK(spm_image_encode_jpeg(ctx, image, 95, 0, &data, &size, NULL) == SPM_OK);
    put(path, data, size);
    spm_free(ctx, data);
    spm_image_free(ctx, image);
}

/* Birds are red with a mask over their left half (its border column at 128), land is green, water blue. */
static void write_cub(void)
{
    static const char places[4][24] = { "b/bamboo_forest", "f/forest/broadleaf", "o/ocean", "l/lake/natural" };
    char images[4000], splits[1000];
    size_t n = 0, m = 0;
    int i, x, y;
    for (i = 0; i < BIRDS; i++) {
        int w = 20 + i, h = 40 - i;
        spm_image image = flat(w, h, 200, 0, 0), mask = flat(w, h, 0, 0, 0);
        for (y = 0; y < h; y++)
            for (x = 0; x < 30; x++)
                if (x < w / 2 * 3) mask.pixels[y * w * 3 + x] = (uint8_t)(x < w / 2 * 3 - 3 ? 255 : 128);
        put_picture(at("CUB/images/%s/b_%04d.jpg", species[i % 5], i), &image);
        put_picture(at("CUB/segmentations/%s/b_%04d.png", species[i % 5], i), &mask);
        n += (size_t)snprintf(images + n, sizeof images - n, "%d %s/b_%04d.jpg\n", i + 1, species[i % 5], i);
        m += (size_t)snprintf(splits + m, sizeof splits - m, "%d %d\n", i + 1, i % 3 != 0);
    }
    put(at("CUB/images.txt"), images, n);
    put(at("CUB/train_test_split.txt"), splits, m);
    for (i = 0; i < 44; i++) {
        spm_image place = flat(15 + i, 70 - i, 0, i % 4 < 2 ? 220 : 0, i % 4 < 2 ? 0 : 220);
        put_picture(at("places/data_large/%s/%08d.jpg", places[i % 4], i), &place);
    }
}

static void waterbirds(void)
{
    spm_dataset *set;
    int64_t i, n[3] = { 0, 0, 0 }, water[3][2] = { { 0, 0 }, { 0, 0 }, { 0, 0 } }, all[3][2] = { { 0, 0 }, { 0, 0 }, { 0, 0 } };
    uint8_t *text = NULL;
    size_t size;
    int s, y;
    NEED_PROGRAMS();
    write_cub();
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/birds --quiet"), 0);
    set = open_set(at("birds"));
    if (!set) return;
    CHECK(spm_dataset_format(set) == SPM_DATA_WATERBIRDS && spm_dataset_size(set) == BIRDS);
    CHECK_STR(spm_dataset_group_name(set, 1), "landbird on water");
    CHECK_STR(spm_dataset_example(set, 3)->file, "017.Cardinal/b_0003.jpg");
    for (i = 0; i < BIRDS; i++) {
        const spm_example *e = spm_dataset_example(set, i);
        spm_image image = SPM_ZERO;
        const uint8_t *p;
        int w = 20 + (int)i, h = 40 - (int)i;
        CHECK_INT(e->y, i % 5 == 0 || i % 5 == 2 || i % 5 == 4); /* albatross, loon, tern */
        CHECK_INT(e->split == SPM_TEST, i % 3 == 0);
        n[e->split]++;
        all[e->split][e->y]++;
        water[e->split][e->y] += e->confounder;
        CHECK(spm_dataset_image(set, i, &image, NULL) == SPM_OK && image.width == w && image.height == h);
        if (!image.pixels) continue;
        p = image.pixels + h / 2 * w * 3; /* bird left, place right (JPEG: roughly) */
        CHECK(p[0] > 150 && p[1] < 60 && p[2] < 60);
        p += (w - 1) * 3;
        CHECK(p[0] < 60 && (e->confounder ? p[2] > 150 && p[1] < 60 : p[1] > 150 && p[2] < 60));
        spm_image_free(ctx, &image);
    }
    CHECK(n[2] == 10 && n[1] == 4 && n[0] == 16); /* a fifth of 20 */
    for (s = 0; s < 3; s++)
        for (y = 0; y < 2; y++)
            CHECK_INT(water[s][y], (int64_t)rint((s ? 0.5 : y ? 0.95 : 1 - 0.95) * (double)all[s][y])); /* as published */
    spm_dataset_close(set);
    CHECK(spm_file_read(ctx, at("birds/metadata.csv"), &text, &size, NULL) == SPM_OK);
    CHECK(text && strncmp((const char *)text, "img_id,img_filename,y,split,place,place_filename\n", 49) == 0
          && strstr((const char *)text, ",/o/ocean/000000") != NULL);
    spm_free(ctx, text);
    CHECK_INT(run("spurmem inspect @/birds/metadata.csv --quiet"), 0); /* the table by its own name */
    CHECK(said("0 of 30 pictures cannot be read"));
    /* a published table is repeated: another seed, the same set */
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/again --like @/birds/metadata.csv --seed 9 --quiet"), 0);
    CHECK(test_same_files(at("birds/metadata.csv"), at("again/metadata.csv"))
          && test_same_files(at("birds/014.Indigo_Bunting/b_0001.jpg"), at("again/014.Indigo_Bunting/b_0001.jpg")));
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/other --seed 9 --quiet"), 0);
    CHECK(!test_same_files(at("birds/metadata.csv"), at("other/metadata.csv")));
    /* what is missing is named */
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/CUB --out @/no"), 1);
    CHECK(said("b/bamboo_forest, f/forest/broadleaf, o/ocean and l/lake/natural"));
    CHECK_INT(run("make_waterbirds --cub @/places --places @/places --out @/no"), 1);
    CHECK(said("images.txt"));
    put_text(at("few.csv"), "img_filename,split,place\n144.Common_Tern/b_9999.jpg,0,1\n");
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/no --like @/few.csv"), 1);
    CHECK(said("few.csv: line 2: CUB has no picture 144.Common_Tern/b_9999.jpg"));
    CHECK(remove(at("CUB/segmentations/017.Cardinal/b_0003.png")) == 0);
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/no --quiet"), 1);
    CHECK(said("b_0003.png") && said("cannot be opened"));
    CHECK(spm_file_read(ctx, at("no/metadata.csv"), &text, &size, NULL) == SPM_E_IO); /* written last */
    put_text(at("CUB/train_test_split.txt"), "1 0\n2 x\n");
    CHECK_INT(run("make_waterbirds --cub @/CUB --places @/places --out @/no2"), 1);
    CHECK(said("train_test_split.txt, line 2"));
}

/* ---- CelebA ---- */

static void celeba(void)
{
    spm_dataset *set;
    spm_image image = SPM_ZERO;
    int i;
    NEED_PROGRAMS();
    put_text(at("celeba/list_attr_celeba.txt"),
        "4\nBald Blond_Hair Male Smiling \n000001.jpg -1  1 -1  1\n000002.jpg -1 -1  1 -1\n000003.jpg  1 -1 -1 -1\n"
        "000004.jpg -1  1  1  1\n");
    put_text(at("celeba/list_eval_partition.txt"), "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n");
    for (i = 1; i <= 4; i++) {
        spm_image face = flat(12, 16, 40 * i, 90, 90);
        put_picture(at("celeba/img_align_celeba/00000%d.jpg", i), &face);
    }
    CHECK_INT(run("make_celeba --celeba @/celeba --target Smiling --confounder Male,Bald --out @/smiling"), 0);
    CHECK(said("4 pictures") && said("Smiling, Male, not Bald"));
    set = open_set(at("smiling"));
    /* nobody is male and bald: the largest confounder of the table is 2 */
    CHECK(set && spm_dataset_confounders(set) == 3 && spm_dataset_size(set) == 4);
    CHECK(set && spm_dataset_example(set, 3)->confounder == 2 && spm_dataset_example(set, 3)->split == SPM_TEST);
    CHECK_STR(set ? spm_dataset_group_name(set, 5) : NULL, "Smiling, Male, not Bald");
    CHECK(set && spm_dataset_image(set, 3, &image, NULL) == SPM_OK && image.width == 12);
    spm_image_free(ctx, &image);
    spm_dataset_close(set);
    CHECK_INT(run("make_celeba --celeba @/celeba --out @/blond"), 0);
    set = open_set(at("blond"));
    CHECK_STR(set ? spm_dataset_group_name(set, 3) : NULL, "blond male");
    spm_dataset_close(set);
    CHECK_INT(run("make_celeba --celeba @/celeba --list"), 0);
    CHECK(said("Smiling") && said("smallest group"));
    CHECK_INT(run("make_celeba --celeba @/celeba --target Smiley"), 1);
    CHECK(said("no attribute \"Smiley\""));
    CHECK_INT(run("make_celeba --celeba @/celeba --out @/celeba"), 1);
    CHECK(said("holds something else"));
}

/* ---- verify, pack, inspect, fetch.sh ---- */

static void verify(void)
{
    uint8_t *data = NULL;
    size_t size;
    NEED_PROGRAMS();
    write_digits("mnist", "train", 0, 40, 0);
    write_digits("mnist", "t10k", 1, 40, 0);
    CHECK_INT(run("make_cmnist --mnist @/mnist --out @/check --quiet"), 0);
    CHECK_INT(run("verify @/check --quiet"), 0);
    CHECK(said("0 of 80 pictures cannot be read") && said("0 across splits") && said("in order"));
    CHECK(spm_file_read(ctx, at("check/images/train/00003.png"), &data, &size, NULL) == SPM_OK);
    if (data) put(at("check/images/test/00005.png"), data, size); /* a test picture that was trained on */
    spm_free(ctx, data);
    put_text(at("check/images/val/00001.png"), "nothing");
    CHECK_INT(run("verify --data @/check --quiet"), 1);
    CHECK(said("the same pixels in two splits") && said("images/train/00003.png (train) and images/test/00005.png (test)"));
    CHECK(said("1 of 80 pictures cannot be read") && said("unreadable: metadata.csv line"));
    CHECK(said("1 across splits") && said("not in order"));
    CHECK_INT(run("verify @/nowhere"), 1);
    CHECK_INT(run("verify"), 2);
}

static void pack(void)
{
    NEED_PROGRAMS();
    write_digits("mnist", "train", 0, 40, 0);
    write_digits("mnist", "t10k", 1, 40, 0);
    CHECK_INT(run("make_cmnist --mnist @/mnist --out @/topack --quiet"), 0);
    CHECK_INT(run("spurmem pack @/topack @/whole.pack --resize none --quiet"), 0);
    CHECK(said("80 pictures, whole"));
    CHECK_INT(run("spurmem pack --data @/topack -o @/sized.pack --image-size 14 --quiet --json -"), 0);
    CHECK(said("\"count\": 80") && said("\"height\": 14"));
    CHECK_INT(run("spurmem inspect @/whole.pack"), 0);
    CHECK(said("packed, 5 classes, 5 confounders") && said("0 of 80 pictures cannot be read"));
    /* training gives the same bytes from the folder and from the packed files */
    CHECK_INT(run("spurmem train --data @/topack --arch resnet20 --image-size 14 --epochs 1 --augment light --quiet --out @/r1"), 0);
    CHECK_INT(run("spurmem train --data @/whole.pack --arch resnet20 --image-size 14 --epochs 1 --augment light --quiet --out @/r2"), 0);
    CHECK_INT(run("spurmem train --data @/sized.pack --arch resnet20 --image-size 14 --epochs 1 --augment light --quiet --out @/r3"), 0);
    CHECK(test_same_files(at("r1/last.safetensors"), at("r2/last.safetensors")));
    CHECK(test_same_files(at("r1/last.safetensors"), at("r3/last.safetensors")));
    CHECK_INT(run("spurmem train --data @/whole.pack --arch resnet20 --image-size 14 --epochs 1 --augment light --quiet --out @/r5 --cache 0 --workers 3"), 0);
    CHECK(said("waiting for pictures") && test_same_files(at("r1/last.safetensors"), at("r5/last.safetensors")));
    CHECK_INT(run("spurmem train --data @/sized.pack --arch resnet20 --image-size 28 --epochs 1 --quiet --out @/r4"), 1);
    CHECK(said("14 x 14") && said("28 x 28"));
    /* bad pictures */
    put_text(at("topack/images/val/00001.png"), "nothing");
    (void)remove(at("bad.pack"));
    CHECK_INT(run("spurmem pack @/topack @/bad.pack --quiet"), 1);
    CHECK(said("metadata.csv line") && said("images/val/00001.png"));
    CHECK_INT(run("spurmem inspect @/bad.pack"), 1);
    CHECK_INT(run("spurmem pack @/topack @/bad.pack --on-bad-image skip --quiet"), 0);
    CHECK(said("1 pictures could not be read"));
    CHECK_INT(run("spurmem inspect @/bad.pack"), 0);
    CHECK(said("1 of 80 pictures cannot be read"));
    CHECK_INT(run("spurmem pack @/topack"), 2);
    CHECK_INT(run("spurmem pack @/topack @/a @/b"), 2);
    CHECK_INT(run("spurmem pack @/topack @/nowhere/a.pack --on-bad-image skip --quiet"), 1);
}

static void published(void)
{
    static const int sizes[3][4] = { { 3498, 184, 56, 1057 }, { 467, 466, 133, 133 }, { 2255, 2255, 642, 642 } };
    char *csv;
    size_t n = 0, room = 11788 * 48 + 200;
    int s, g, k;
    spm_image one;
    NEED_PROGRAMS();
    csv = (char *)malloc(room);
    if (!csv) return;
    one = flat(4, 4, 1, 2, 3);
    put_picture(at("counts/a.png"), &one);
    n = (size_t)snprintf(csv, room, "img_id,img_filename,y,split,place,place_filename\n");
    for (s = 0; s < 3; s++)
        for (g = 0; g < 4; g++)
            for (k = 0; k < sizes[s][g]; k++)
                n += (size_t)snprintf(csv + n, room - n, "%d,a.png,%d,%d,%d,/o/ocean/1.jpg\n", k, g / 2, s, g % 2);
    put(at("counts/metadata.csv"), csv, n);
    CHECK_INT(run("spurmem inspect @/counts --quiet"), 0);
    CHECK(said("the counts are those of the published Waterbirds"));
    csv[n - 1] = 0; /* without its last row */
    strrchr(csv, '\n')[1] = 0;
    put_text(at("counts/metadata.csv"), csv);
    CHECK_INT(run("spurmem inspect @/counts --quiet"), 0);
    CHECK(said("1 of 12 counts differ from those of the published Waterbirds"));
    free(csv);
}

static void fetch(void)
{
    char command[1000];
    NEED_PROGRAMS();
    snprintf(command, sizeof command, "sh data_tools/fetch.sh >\"%s\"", at("fetched"));
    CHECK_INT(system(command), 0);
    snprintf(command, sizeof command, "sh data_tools/fetch.sh --check \"%s\" nothing 2>/dev/null", root);
    CHECK(system(command) != 0);
    put_text(at("downloads/mnist/t10k-labels-idx1-ubyte.gz"), "too short");
    snprintf(command, sizeof command, "sh data_tools/fetch.sh --check \"%s/downloads\" mnist >\"%s\" 2>&1", root, at("fetched"));
    CHECK(system(command) != 0);
}

/* Every method of the study trains, and what is there is gone on with; on 24 pictures its rows mean nothing. */
static void study(void)
{
    static const char line[] = "study @/study @/few @/none full nets=resnet sets=birds seeds=1-1 threads=1";
    uint8_t *table = NULL, *again = NULL;
    size_t size = 0, same = 0;
    spm_json_value *results;
    NEED_PROGRAMS();
    CHECK_INT(run("synth_birds --out @/few --train 24 --val 12 --test 12 --correlation 0.75 --quiet"), 0);
    CHECK_INT(run(line), 0);
    CHECK(said("birds    resnet seed 1  ERM, the start") && said("seed 1  intervention, contrast alone"));
    CHECK(spm_file_read(ctx, at("study/table.md"), &table, &size, NULL) == SPM_OK);
    CHECK_INT(spm_file_read(ctx, at("study/results.json"), &again, &same, NULL), SPM_OK);
    results = again ? spm_json_parse(ctx, "results.json", (const char *)again, same, NULL) : NULL;
    CHECK_INT(spm_json_length(spm_json_get(results, "runs")), 15);
    spm_json_free(ctx, results);
    spm_free(ctx, again);
    /* a run that was not measured is gone on with: nothing is left of it to train, so the row is the same */
    CHECK_INT(remove(at("study/birds-resnet-1/ntx-only/row.txt")), 0);
    CHECK_INT(run(line), 0);
    again = NULL;
    CHECK(spm_file_read(ctx, at("study/table.md"), &again, &same, NULL) == SPM_OK);
    CHECK(table && again && size == same && memcmp(table, again, size) == 0);
    spm_free(ctx, table);
    spm_free(ctx, again);
    CHECK_INT(run("study @/study @/few @/none weekly"), 2);
    CHECK(said("usage: study OUT BIRDS DATA quick|full"));
}

int main(void)
{
    programs_begin("test_tools_data", "spurmem");
    if (getenv("SPURMEM_SANITIZED")) build = NULL; /* the programs are not the sanitized ones */
    TEST(dominoes);
    TEST(coloured);
    TEST(waterbirds);
    TEST(celeba);
    TEST(verify);
    TEST(pack);
    TEST(published);
    TEST(fetch);
    TEST(study);
    spm_context_destroy(ctx);
    return TEST_END;
}
