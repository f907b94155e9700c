/* make_celeba.c - a metadata.csv for any pair (or more) of CelebA's forty attributes, beside CelebA's own files or in a
 * folder of its own.  No picture is copied.
 *
 *     cc -O2 data_tools/make_celeba.c -o make_celeba -lm
 *     ./make_celeba --celeba celeba --target Smiling --confounder Male,Young --out smiling
 */
#include "tool.h"

enum { CELEBA, TARGET, CONFOUNDER, OUT, LIST, FORCE };

static const tool_option options[] = {
    { "celeba", 's', "DIR", NULL, "folder with list_attr_celeba, list_eval_partition and img_align_celeba", 0, 0 },
    { "target", 's', "NAME", "Blond_Hair", "attribute that is the class", 0, 0 },
    { "confounder", 's', "NAME[,NAME...]", "Male", "attribute that is the confounder; several are numbered in binary", 0, 0 },
    { "out", 's', "DIR", "", "folder to write metadata.csv into; without it only the table of counts is shown", 0, 0 },
    { "list", 'b', NULL, NULL, "show, for every attribute as confounder, how strongly it goes with the target", 0, 0 },
    TOOL_FORCE,
};

/* 1 if there is a file of this name. */
static int is_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file) fclose(file);
    return file != NULL;
}

/* The folder of the pictures, with '/' at its end, as a whole path where the system tells it; 0 if there is none. */
static int picture_folder(const tool *t, const char *first, char *folder, size_t size)
{
    static const char candidates[][40] = { "img_align_celeba/img_align_celeba/", "img_align_celeba/", "Img/img_align_celeba/" };
    char root[1000], path[1200];
    size_t i;
#if !defined(_WIN32)
    char here[500] = "";
    if (tool_value(t, CELEBA)[0] != '/' && getcwd(here, sizeof here))
        snprintf(root, sizeof root, "%s/%.480s", here, tool_value(t, CELEBA));
    else
#endif
        snprintf(root, sizeof root, "%s", tool_value(t, CELEBA));
    for (i = 0; i < sizeof candidates / sizeof candidates[0]; i++) {
        snprintf(folder, size, "%s/%s", root, candidates[i]);
        snprintf(path, sizeof path, "%.1000s%.150s", folder, first);
        if (is_file(path)) return 1;
    }
    return 0;
}

static void counts(const spm_dataset *data)
{
    int s, g;
    printf("%-48s %8s %8s %8s\n", "group", "train", "val", "test");
    for (g = 0; g < spm_dataset_groups(data); g++) {
        printf("%-48s", spm_dataset_group_name(data, g));
        for (s = 0; s < SPM_SPLITS; s++) printf(" %8lld", (long long)spm_dataset_group_count(data, (spm_split)s, g));
        printf("\n");
    }
}

/* Correlation (phi) of the target with every other attribute over the training split, strongest first. */
static int list_attributes(tool *t, spm_context *ctx)
{
    static const char attributes[40][24] = {
        "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
        "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
        "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
        "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
        "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
        "Wearing_Necklace", "Wearing_Necktie", "Young" };
    double phi[40];
    int64_t least[40];
    int order[40], i, j, g, n = 0;
    for (i = 0; i < 40 && !tool_stop; i++) {
        spm_dataset_desc where = SPM_ZERO;
        spm_error err = SPM_ZERO;
        spm_dataset *data;
        double c[4], d;
        if (strcmp(attributes[i], tool_value(t, TARGET)) == 0) continue;
        where.path = tool_value(t, CELEBA);
        where.target = tool_value(t, TARGET);
        where.confounder = attributes[i];
        where.format = SPM_DATA_CELEBA;
        data = spm_dataset_open(ctx, &where, &err);
        if (!data) {
            if (strstr(err.text, attributes[i])) continue; /* a set without this attribute */
            return tool_fail(t, "%s", err.text);
        }
        least[n] = -1;
        for (g = 0; g < 4; g++) {
            int64_t count = spm_dataset_group_count(data, SPM_TRAIN, g);
            c[g] = (double)count;
            if (least[n] < 0 || count < least[n]) least[n] = count;
        }
        d = sqrt((c[0] + c[1]) * (c[2] + c[3]) * (c[0] + c[2]) * (c[1] + c[3]));
        phi[n] = d > 0.0 ? (c[0] * c[3] - c[1] * c[2]) / d : 0.0;
        for (j = n; j > 0 && fabs(phi[order[j - 1] & 63]) < fabs(phi[n]); j--) order[j] = order[j - 1];
        order[j] = n | i << 6;
        n++;
        spm_dataset_close(data);
    }
    printf("%-24s %11s %16s\n", "confounder", "correlation", "smallest group");
    for (j = 0; j < n; j++)
        printf("%-24s %11.3f %16lld\n", attributes[order[j] >> 6], phi[order[j] & 63], (long long)least[order[j] & 63]);
    return 0;
}

static int write_set(tool *t, const spm_dataset *data, tool_set *set)
{
    char folder[1200], made[400], path[1400];
    tool_text csv = { NULL, 0, 0, 0 }, classes = { NULL, 0, 0, 0 }, confounders = { NULL, 0, 0, 0 }, groups = { NULL, 0, 0, 0 };
    spm_error err = SPM_ZERO;
    int64_t i;
    int status, k, most_y = 0, most_a = 0;
    if (!tool_may_write(set, "make_celeba.json", tool_on(t, FORCE))) return 1;
    if (!picture_folder(t, spm_dataset_example(data, 0)->file, folder, sizeof folder))
        return tool_fail(t, "%s: the picture %s is nowhere below it; img_align_celeba must lie there, unpacked",
                         tool_value(t, CELEBA), spm_dataset_example(data, 0)->file);
    if (spm_directory_create(set->ctx, set->out, &err)) return tool_fail(t, "%s", err.text);
    tool_add(&csv, "img_id,img_filename,y,split,place\n");
    for (i = 0; i < spm_dataset_size(data); i++) {
        const spm_example *e = spm_dataset_example(data, i);
        snprintf(path, sizeof path, "%s%.200s", folder, e->file);
        tool_add(&csv, "%lld,", (long long)i + 1);
        tool_add_field(&csv, path);
        tool_add(&csv, ",%d,%d,%d\n", (int)e->y, (int)e->split, (int)e->confounder);
        if (e->y > most_y) most_y = (int)e->y;
        if (e->confounder > most_a) most_a = (int)e->confounder;
    }
    for (k = 0; k < spm_dataset_classes(data); k++) tool_add(&classes, "%s\n", spm_dataset_class_name(data, k));
    for (k = 0; k < spm_dataset_confounders(data); k++)
        tool_add(&confounders, "%s\n", spm_dataset_confounder_name(data, k));
    for (k = 0; k < spm_dataset_groups(data); k++) tool_add(&groups, "%s\n", spm_dataset_group_name(data, k));
    snprintf(made, sizeof made, "{\"tool\":\"make_celeba\",\"target\":\"%.80s\",\"confounder\":\"%.200s\"}\n",
             tool_value(t, TARGET), tool_value(t, CONFOUNDER));
    status = csv.failed || classes.failed || confounders.failed || groups.failed ? tool_fail(t, "out of memory") : 0;
    if (!status) status = tool_write_text(set, "make_celeba.json", made);
    if (!status) status = tool_write_text(set, "class_names.txt", classes.data);
    if (!status) status = tool_write_text(set, "confounder_names.txt", confounders.data);
    /* groups are numbered by the largest values that occur */
    if (!status && most_y + 1 == spm_dataset_classes(data) && most_a + 1 == spm_dataset_confounders(data))
        status = tool_write_text(set, "group_names.txt", groups.data);
    if (!status) status = tool_write_text(set, "metadata.csv", csv.data);
    free(csv.data);
    free(classes.data);
    free(confounders.data);
    free(groups.data);
    if (!status) printf("%s/metadata.csv: %lld pictures\n", set->out, (long long)spm_dataset_size(data));
    return status;
}

static int run(tool *t, spm_context *ctx)
{
    spm_dataset_desc where = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_dataset *data;
    tool_set set;
    int status = 0;
    where.path = tool_value(t, CELEBA);
    where.target = tool_value(t, TARGET);
    where.confounder = tool_value(t, CONFOUNDER);
    where.format = SPM_DATA_CELEBA;
    data = spm_dataset_open(ctx, &where, &err);
    if (!data) return tool_fail(t, "%s", err.text);
    set = tool_set_make(t, ctx, tool_value(t, OUT), NULL, 0, NULL, NULL);
    if (*set.out) status = write_set(t, data, &set);
    if (!status && tool_on(t, LIST)) status = list_attributes(t, ctx);
    else if (!status) counts(data);
    spm_dataset_close(data);
    return status;
}

int main(int argc, char **argv)
{
    tool t = tool_make("make_celeba",
        "usage: make_celeba --celeba DIR [options]\n\n"
        "Writes a metadata.csv (and the groups' names) for any pair of CelebA's attributes; copies no picture.\n",
        "The table names the pictures by their whole paths: it may lie anywhere, as long as they stay where they are.\n"
        "(spurmem --data CELEBA --target NAME --confounder NAME needs no table.)\n",
        options, sizeof options / sizeof options[0]);
    return tool_main(&t, argc, argv, run);
}
