/* spurmem.c - the command-line tool: train, localize, repair, evaluate and inspect image classifiers.
 *
 *     cc -O2 -DSPURMEM_THREADS -o spurmem examples/spurmem.c -lm -lpthread
 *     ./spurmem --help
 *
 * It uses the public API of spurmem.h only, so it is also the largest example.  Results go to stdout, progress and log to
 * stderr.  Exit codes: 0 done, 1 a file or a run failed, 2 the command line is wrong. */
#ifndef SPURMEM_LINKED /* set by the Makefile, which compiles the implementation once for all programs */
    #define SPURMEM_IMPLEMENTATION
#endif
#include "../spurmem.h"
#include "terminal.h"
#include <errno.h>
#include <float.h>
#include <math.h>
#include <time.h>
#if !defined(_WIN32)
    #include <sys/resource.h>
#endif

/* ---- the command line ---- */

enum {
    TRAIN = 1,
    INTERVENE = 2,
    EVAL = 4,
    LOCALIZE = 8,
    PREDICT = 16,
    DECODE = 32,
    REPORT = 64,
    INSPECT = 128,
    CONVERT = 256,
    BENCH = 512,
    PACK = 1024,
    LEDGER = 2048,
    LEARN = TRAIN | INTERVENE,
    WITH_DATA = LEARN | EVAL | LOCALIZE | LEDGER | INSPECT | PACK | REPORT,
    WITH_MODEL = LEARN | EVAL | LOCALIZE | LEDGER | PREDICT | INSPECT,
    EVERY = 4095
};

typedef struct command {
    int id;
    const char *name, *operands, *summary, *example;
} command;

static const command commands[] = {
    { TRAIN, "train", "", "train a classifier into a run folder (--data, --arch or --checkpoint, --out)",
      "--data birds --arch resnet18:width=16 --image-size 64 --resize exact --epochs 20 --out runs/erm" },
    { INTERVENE, "intervene", "", "train against memorization, from a checkpoint (--data, --checkpoint, --out)",
      "--data birds --checkpoint runs/erm/last.safetensors --epochs 20 --augment paper --out runs/repaired" },
    { EVAL, "eval", "", "group metrics of a checkpoint on one split (--data, --checkpoint)",
      "--data birds --checkpoint runs/erm/best.safetensors --split test" },
    { LOCALIZE, "localize", "", "rank units, change them, measure every group (--data, --checkpoint)",
      "--data birds --checkpoint runs/erm/last.safetensors --groups 1,2 --json runs/erm/localize.json" },
    { LEDGER, "ledger", "", "a CSV row per example: margin, self-influence, flip count, history (--data, --checkpoint)",
      "--data birds --checkpoint runs/erm/last.safetensors --out ledger.csv --gradients runs/erm/gradients.csv" },
    { PREDICT, "predict", "FILE...", "classify pictures: a JSON line each (--checkpoint)",
      "--checkpoint runs/erm/best.safetensors --gradcam maps birds/images/test/*.jpg" },
    { DECODE, "decode", "IMAGE...", "decode pictures to PNG or PPM, as the network sees them (--out-dir)",
      "--image-size 64 --out-dir decoded birds/images/test/*.jpg" },
    { REPORT, "report", "RUN...", "one self-contained HTML page about run folders, the first is the \"before\" (-o FILE)",
      "runs/erm runs/repaired --data birds -o report.html" },
    { INSPECT, "inspect", "FILE|DIR", "what a checkpoint, a picture or a data set holds",
      "birds" },
    { PACK, "pack", "DATA FILE", "a data set decoded, resized, checksummed into one file for repeated epochs",
      "birds birds.packed --image-size 64" },
    { CONVERT, "convert", "IN OUT", "a checkpoint to .safetensors, or to a .pth that torch.load reads",
      "model.pth model.safetensors" },
    { BENCH, "bench", "[FILE...]", "speed of this machine: peak, kernels, models, decoding",
      "--only gemm" },
};

typedef enum option_id {
    O_THREADS,
    O_ISA,
    O_SEED,
    O_QUIET,
    O_JSON,
    O_CONV,
    O_PRECISION,
    O_HELP,
    O_DATA,
    O_FORMAT,
    O_TARGET,
    O_CONFOUNDER,
    O_LIMIT,
    O_BAD_IMAGE,
    O_CACHE,
    O_EXIF,
    O_IMAGE_SIZE,
    O_NORMALIZE,
    O_RESIZE,
    O_ARCH,
    O_CHECKPOINT,
    O_NUM_CLASSES,
    O_ALLOW_PARTIAL,
    O_HEAD,
    O_LABEL_ORDER,
    O_PROFILE,
    O_QUIRK,
    O_BATCH,
    O_WORKERS,
    O_OUT,
    O_METHOD,
    O_EPOCHS,
    O_OPTIMIZER,
    O_LR,
    O_WEIGHT_DECAY,
    O_MOMENTUM,
    O_NESTEROV,
    O_SCHEDULE,
    O_WARMUP,
    O_PATIENCE,
    O_CLIP,
    O_AUGMENT,
    O_ROTATE,
    O_JITTER,
    O_SHUFFLE,
    O_DROP_LAST,
    O_SELECT,
    O_MAX_STEPS,
    O_KEEP_EVERY,
    O_EVAL_EVERY,
    O_RESUME,
    O_LOG_STEPS,
    O_SEGMENTS,
    O_KEEP_NORMS,
    O_TAU,
    O_LAMBDA,
    O_PRUNE_FRACTION,
    O_MASK,
    O_CONTRAST,
    O_CE,
    O_CE_PRUNED,
    O_BN,
    O_GROUP_LABELS,
    O_GROUP_WEIGHTING,
    O_WEIGHT_POWER,
    O_ANCHOR,
    O_MASK_MODE,
    O_DAMP,
    O_MASK_EVERY,
    O_MASK_RAMP,
    O_HISTORY,
    O_MAX_FLIPS,
    O_INFLUENCE,
    O_GRADIENTS,
    O_CELLS,
    O_BALANCED,
    O_EPOCH_EXAMPLES,
    O_HOLD_OUT,
    O_DRO_STEP,
    O_DRO_ADJUST,
    O_IDENTIFY,
    O_IDENTIFY_EPOCHS,
    O_UPWEIGHT,
    O_GCE,
    O_EMA,
    O_SUBSETS,
    O_L1,
    O_L2,
    O_GAMMA,
    O_INTERPOLATE,
    O_SPLIT,
    O_CRITERION,
    O_GROUPS,
    O_UNIT,
    O_TOP,
    O_FRACTION,
    O_ORDER,
    O_DROPOUT_P,
    O_MODIFY,
    O_STD,
    O_REWIND,
    O_LAYERS,
    O_RETRAIN_EPOCHS,
    O_GRID,
    O_STEPS,
    O_PERMUTATIONS,
    O_TRUNCATION,
    O_SCAN,
    O_SCREEN,
    O_QUIRKS,
    O_REPEATS,
    O_CONTROLS,
    O_SAMPLES,
    O_SELECT_SPLIT,
    O_REPORT_SPLITS,
    O_ALLOW_SAME_SPLIT,
    O_NAMES,
    O_SKIP_OBJECTS,
    O_GRADCAM,
    O_MAP,
    O_MAP_CLASS,
    O_OUT_DIR,
    O_AS,
    O_QUALITY,
    O_CHROMA,
    O_SCALE,
    O_OUTPUT,
    O_RESULTS,
    O_TITLE,
    O_PICTURES,
    O_ONLY,
    O_COUNT
} option_id;

/* `value`: NULL for a switch; "a|b" for a choice; else a word for the help. `type`: i integer, n number, s text, c choice,
 * l list. */
typedef struct option {
    option_id id;
    int commands;
    char type;
    const char *name, *value, *fallback, *help;
} option;

static const option options[] = {
    { O_THREADS, EVERY, 'i', "threads", "N", "0", "threads to compute on; 0: all cores. Results do not depend on it" },
    { O_ISA, EVERY, 'c', "isa", "auto|c|avx2|avx512|neon", "auto", "instruction set" },
    { O_SEED, EVERY, 'i', "seed", "S", "0", "of everything random" },
    { O_QUIET, EVERY, 'b', "quiet", NULL, NULL, "no progress on stderr" },
    { O_JSON, EVERY, 's', "json", "FILE", NULL, "write the result as one JSON object; - is stdout" },
    { O_CONV, EVERY, 'c', "conv", "auto|direct", "auto",
      "auto: 3x3 and 2x2 convolutions by Winograd where it\n"
      "                                           pays; direct: never" },
    { O_PRECISION, EVERY, 'c', "precision", "fp32|bf16", "fp32",
      "bf16: convolutions and linear layers multiply numbers\n"
      "                                           rounded to bfloat16, sums and weights stay fp32" },
    { O_HELP, EVERY, 'b', "help", NULL, NULL, "this text" },
    { O_DATA, WITH_DATA, 's', "data", "DIR|FILE", NULL,
      "the data set: a folder, a .tar of it, a table .csv, or what pack wrote" },
    { O_FORMAT, WITH_DATA, 'c', "format", "auto|waterbirds|celeba|metadata|folder|idx|cifar|packed", "auto",
      "layout of the data set" },
    { O_TARGET, WITH_DATA, 's', "target", "NAME", "Blond_Hair", "CelebA: the attribute to predict" },
    { O_CONFOUNDER, WITH_DATA, 's', "confounder", "NAME[,NAME...]", "Male", "CelebA: the confounder, or several" },
    { O_LIMIT, WITH_DATA & ~PACK, 'i', "limit", "N", "0", "use the first N examples of each split; 0: all" },
    { O_BAD_IMAGE, WITH_DATA, 'c', "on-bad-image", "fail|skip", "fail",
      "skip leaves unreadable pictures out, counts and lists them" },
    { O_CACHE, WITH_DATA & ~(PACK | INSPECT), 'i', "cache", "MIB", "1024",
      "memory for decoded pictures, in MiB; 0: decode them every time" },
    { O_EXIF, WITH_DATA | PREDICT | DECODE, 'c', "exif", "on|off", "off",
      "turn pictures as their EXIF orientation says" },
    { O_IMAGE_SIZE, WITH_MODEL | DECODE | BENCH | PACK, 's', "image-size", "N|HxW", NULL,
      "network input (the checkpoint's, else 224, CIFAR nets 32)" },
    { O_NORMALIZE, WITH_MODEL, 's', "normalize", "imagenet|none|m1,m2,m3/s1,s2,s3", "imagenet",
      "mean and standard deviation" },
    { O_RESIZE, WITH_MODEL | DECODE | PACK, 'c', "resize", "paper|exact|short-side|none", "paper",
      "how a picture gets the input size; pack: none keeps pictures whole" },
    { O_ARCH, WITH_MODEL, 's', "arch", "NAME", NULL,
      "resnet18 ... vit_large, with changes: resnet18:width=16,stem=cifar" },
    { O_CHECKPOINT, WITH_MODEL, 's', "checkpoint", "FILE", NULL, ".safetensors, .pth, .pt or .th" },
    { O_NUM_CLASSES, WITH_MODEL, 'i', "num-classes", "N", "0",
      "outputs of the head; 0: the checkpoint's, else the data set's" },
    { O_ALLOW_PARTIAL, WITH_MODEL, 'b', "allow-partial", NULL, NULL,
      "accept a checkpoint with another head; the head starts anew" },
    { O_HEAD, WITH_MODEL, 'c', "head", "logits|softmax", "logits", "softmax: quirk Q1 of the published code" },
    { O_LABEL_ORDER, WITH_MODEL, 'c', "label-order", "forward|reversed", "forward",
      "reversed: quirk Q2, output column 0 is the last class" },
    { O_PROFILE, WITH_MODEL, 'c', "profile", "sound|official", "sound",
      "official: the published code's behaviour, quirks included" },
    { O_QUIRK, WITH_MODEL, 's', "quirk", "Qn=on|off,...", NULL,
      "one quirk (Q1 to Q11) against the profile; may be given several times" },
    { O_BATCH, LEARN | EVAL | LOCALIZE | LEDGER | BENCH, 'i', "batch", "N", "64", "examples a step" },
    { O_WORKERS, LEARN | EVAL | LOCALIZE | LEDGER, 'i', "workers", "N", "0", "threads that read pictures; 0: as many as cores" },
    { O_OUT, LEARN | PACK | LEDGER, 's', "out", "RUN", NULL, "run folder; pack: the file; ledger: the CSV (stdout)" },
    { O_METHOD, TRAIN, 'c', "method",
      "erm|reweight|resample|subsample|groupdro|jtt|lff|dfr|afr|fairdropout|intervene", "erm", "training method" },
    { O_EPOCHS, LEARN, 'i', "epochs", "N", "30", "passes over the training split" },
    { O_OPTIMIZER, LEARN, 'c', "optimizer", "adam|adamw|sgd", "adam", "optimizer" },
    { O_LR, LEARN, 'n', "lr", "F", "1e-3", "learning rate" },
    { O_WEIGHT_DECAY, LEARN, 'n', "weight-decay", "F", "0", "weight decay, as PyTorch's" },
    { O_MOMENTUM, LEARN, 'n', "momentum", "F", NULL, "sgd only (.9)" },
    { O_NESTEROV, LEARN, 'b', "nesterov", NULL, NULL, "sgd only" },
    { O_SCHEDULE, LEARN, 'c', "schedule", "none|plateau|cosine", "none", "learning rate over epochs" },
    { O_WARMUP, LEARN, 'i', "warmup", "N", "0", "epochs of linear warm-up" },
    { O_PATIENCE, LEARN, 'i', "patience", "N", "3", "plateau: epochs without improvement before the rate halves" },
    { O_CLIP, LEARN, 'n', "clip", "F", "0", "largest L2 norm of the gradient; 0: off" },
    { O_AUGMENT, LEARN, 'c', "augment", "none|light|paper", "none",
      "light: flip and shifted crop; paper: RandomResizedCrop and flip" },
    { O_ROTATE, LEARN, 'n', "rotate", "DEGREES", "0", "turn by up to so many degrees either way, by chance" },
    { O_JITTER, LEARN, 's', "jitter", "B,C,S,H", NULL,
      "ColorJitter: brightness, contrast, saturation (0 to 1000), hue (0 to .5)" },
    { O_SHUFFLE, LEARN, 'c', "shuffle", "on|off", "on", "new order every epoch" },
    { O_DROP_LAST, LEARN, 'b', "drop-last", NULL, NULL, "leave out an incomplete last batch" },
    { O_SELECT, LEARN, 'c', "select", "wga|accuracy|last", "wga",
      "which epoch becomes best.safetensors (by the validation split)" },
    { O_MAX_STEPS, LEARN, 'i', "max-steps", "N", "0", "stop, resumable, after N steps in all" },
    { O_KEEP_EVERY, LEARN, 'i', "keep-every", "N", "0", "also keep epoch-NNN.safetensors every N epochs" },
    { O_EVAL_EVERY, LEARN, 'i', "eval-every", "N", "1", "evaluate all splits every N epochs, and after the last" },
    { O_RESUME, LEARN, 'b', "resume", NULL, NULL, "go on with the run in --out" },
    { O_LOG_STEPS, LEARN, 's', "log-steps", "FILE", NULL, "a JSON line per step" },
    { O_SEGMENTS, LEARN | BENCH, 'b', "segments", NULL, NULL, "less memory: recompute activations block by block" },
    { O_KEEP_NORMS, LEARN | BENCH, 'b', "keep-norms", NULL, NULL, "more memory, faster: recompute no batch norms" },
    { O_TAU, LEARN, 'n', "tau", "F", "0.5", "intervention: temperature of the contrast" },
    { O_LAMBDA, LEARN, 'n', "lambda", "F", NULL, "intervention: weight of the cross-entropy (1; official .2)" },
    { O_PRUNE_FRACTION, LEARN, 'n', "prune-fraction", "F", "0.01",
      "intervention: share of units (official: weights) masked" },
    { O_MASK, LEARN, 'c', "mask", "critical|memory|gradient|official|random|none", "critical",
      "intervention: what the pruned branch masks" },
    { O_CONTRAST, LEARN, 'c', "contrast", "features|outputs|none", "features", "intervention: what is contrasted" },
    { O_CE, LEARN, 'c', "ce", "on|off", "on", "intervention: cross-entropy of the dense branch" },
    { O_CE_PRUNED, LEARN, 'c', "ce-pruned", "on|off", "off",
      "intervention: cross-entropy of the pruned branch as well" },
    { O_BN, LEARN, 'c', "bn", "separate|shared", "separate", "intervention: running statistics of the branches" },
    { O_GROUP_LABELS, LEARN, 'c', "group-labels", "on|off", "on",
      "off: (class, memorized) take the place of groups; see --history" },
    { O_HISTORY, LEARN | LEDGER, 's', "history", "RUN", NULL,
      "the run whose history is read (train: with group-labels off); default: the checkpoint's folder" },
    { O_MAX_FLIPS, LEDGER, 'i', "max-flips", "N", "16", "most units removed for a flip count; 0: no flip counts" },
    { O_INFLUENCE, LEDGER, 'c', "influence", "head|network", "head",
      "network: self-influence by all parameters too (a backward pass per example)" },
    { O_GRADIENTS, LEDGER, 's', "gradients", "FILE", NULL,
      "also write a CSV of each group's share of the gradient by layer, of this and all kept epoch checkpoints" },
    { O_CELLS, LEARN, 'c', "cells", "group|class", "group", "what reweight, resample, subsample, groupdro balance" },
    { O_BALANCED, LEARN, 'c', "balanced-sampler", "on|off", "off", "draw every group equally often (any method)" },
    { O_EPOCH_EXAMPLES, LEARN, 'i', "epoch-examples", "N", "0", "end an epoch after N examples; 0: all" },
    { O_HOLD_OUT, LEARN, 'n', "hold-out", "F", NULL, "share of the training split that is not trained on (0; afr .2)" },
    { O_DRO_STEP, TRAIN, 'n', "step-size", "F", "0.01", "groupdro: step of the groups' weights" },
    { O_DRO_ADJUST, TRAIN, 'n', "size-adjustment", "F", "0", "groupdro: C of the term C / sqrt(n)" },
    { O_IDENTIFY, TRAIN, 's', "identify", "FILE", NULL, "jtt: the checkpoint that finds the error set" },
    { O_IDENTIFY_EPOCHS, TRAIN, 'i', "identify-epochs", "N", "0",
      "jtt: epochs of the model that finds the error set; 0: a fifth of --epochs" },
    { O_UPWEIGHT, TRAIN, 'i', "upweight", "N", "50", "jtt: how often an epoch has an example of the error set" },
    { O_GCE, TRAIN, 'n', "gce-q", "F", "0.7", "lff: q of the biased network's loss" },
    { O_EMA, TRAIN, 'n', "ema", "F", "0.7", "lff: share of the past in the running losses" },
    { O_SUBSETS, TRAIN, 'i', "subsets", "N", "20", "dfr: balanced subsets that are averaged over" },
    { O_L1, TRAIN, 'n', "l1", "F", NULL, "dfr: L1 penalty (default: chosen on halves of the validation split)" },
    { O_L2, TRAIN, 'n', "l2", "F", NULL,
      "dfr: L2 penalty (0); afr: pull to the ERM head (default: chosen by validation)" },
    { O_GAMMA, TRAIN, 'n', "gamma", "F", "0", "afr: weights are exp(-gamma p); 0: chosen by validation" },
    { O_INTERPOLATE, TRAIN, 'n', "interpolate", "F", "1", "dfr, afr: share of the new head; the rest is the ERM head" },
    { O_WEIGHT_POWER, LEARN, 'n', "weight-power", "F", "1", "power of the groups' weights; 0: all equal" },
    { O_ANCHOR, LEARN, 'n', "anchor", "F", "0",
      "intervention: weight of KL(start || now) on the majority, beside the cross-entropy" },
    { O_MASK_MODE, LEARN, 'c', "mask-mode", "off|damp|freeze", "off",
      "intervention: chosen units are off or damped in the pruned branch, or not trained" },
    { O_DAMP, LEARN, 'n', "damp", "F", "0.5", "mask-mode damp: factor of the units' weights" },
    { O_MASK_EVERY, LEARN, 'i', "mask-every", "N", "1", "intervention: epochs from one ranking to the next" },
    { O_MASK_RAMP, LEARN, 'i', "mask-ramp", "N", "0", "intervention: epochs in which the masked share grows" },
    { O_GROUP_WEIGHTING, LEARN, 'c', "group-weighting", "on|off", "on",
      "intervention: every group weighs the same in the cross-entropy" },
    { O_SPLIT, EVAL | LEDGER, 'c', "split", "train|val|test", "test", "split to evaluate (ledger: train)" },
    { O_CRITERION, LEARN | LOCALIZE, 'c', "criterion",
      "gradient|magnitude|weight-gradient|activation|activation-gradient|integrated-gradients|conductance|shapley|"
      "exhaustive|random",
      "gradient", "how units are ranked (exhaustive: localize only)" },
    { O_GROUPS, LOCALIZE, 'l', "groups", "all|0,1,...", "all", "groups to rank units for" },
    { O_UNIT, LOCALIZE, 'c', "unit", "channel|head|weight", "channel",
      "what is ranked and changed: output channels and units, attention heads, single weights" },
    { O_TOP, LOCALIZE, 'l', "top", "K,...", "1,2,3", "how many units are changed at once" },
    { O_FRACTION, LOCALIZE, 'l', "fraction", "F,...", "1e-5,2e-5,3e-5", "unit weight: shares of the single weights" },
    { O_ORDER, LOCALIZE, 'c', "order", "smallest|largest", "largest",
      "unit weight: which end of the scores (official: smallest)" },
    { O_DROPOUT_P, LOCALIZE, 'n', "dropout-p", "P", "0", "unit weight: share of the selected ones that stay as they are" },
    { O_MODIFY, LOCALIZE, 'c', "modify", "zero|zero-unit|mean|noise|reinit|rewind|layer-rewind", "zero-unit",
      "what happens to them (official and unit weight: zero)" },
    { O_STD, LOCALIZE, 'l', "std", "F,...", "0.01", "of noise and reinit" },
    { O_REWIND, LOCALIZE, 's', "rewind", "FILE,...", NULL,
      "earlier checkpoints for rewind and layer-rewind (grid: epochs 5 and 10 before, if the run folder has them)" },
    { O_LAYERS, LOCALIZE, 'c', "layers", "rewind|retrain", NULL,
      "study layers instead of units: each alone back to --rewind; then trained again on the majority groups" },
    { O_RETRAIN_EPOCHS, LOCALIZE, 'i', "retrain-epochs", "N", "1", "layers retrain: epochs" },
    { O_GRID, LOCALIZE, 'c', "grid", "paper", NULL,
      "the paper's whole study in one call: gradient and magnitude, smallest weights, every change" },
    { O_STEPS, LOCALIZE, 'i', "steps", "N", "16", "conductance, integrated-gradients: intervals of the line" },
    { O_PERMUTATIONS, LOCALIZE, 'i', "permutations", "N", "20", "shapley: orders of removal" },
    { O_TRUNCATION, LOCALIZE, 'n', "truncation", "F", "0.1", "shapley: an order ends this near to chance" },
    { O_SCAN, LOCALIZE, 'c', "scan", "fast|resumed|plain", "fast",
      "exhaustive: rank-1 updates (fp32 alone, else resumed), resuming at the unit's block (bit-equal), or from the "
      "pictures" },
    { O_SCREEN, LOCALIZE, 'n', "screen", "F", "0", "exhaustive: share of units left out by first-order screening" },
    { O_QUIRKS, LOCALIZE, 'b', "quirks", NULL, NULL, "repeat the study with each quirk switched and say what it changes" },
    { O_REPEATS, LOCALIZE, 'i', "repeats", "N", NULL, "repetitions (1; noise and reinit 10)" },
    { O_CONTROLS, LOCALIZE, 'i', "controls", "N", "19", "matched controls for the rows of the largest top" },
    { O_SAMPLES, LOCALIZE, 'i', "samples", "N", "200", "examples of a group that its gradient is taken on" },
    { O_SELECT_SPLIT, LOCALIZE, 'c', "select-split", "train|val|test", "train", "split that units are chosen on" },
    { O_REPORT_SPLITS, LOCALIZE, 'l', "report-splits", "train,test", "train,test", "splits that are reported" },
    { O_ALLOW_SAME_SPLIT, LOCALIZE, 'b', "allow-same-split", NULL, NULL,
      "report val or test although units were chosen on it" },
    { O_NAMES, CONVERT, 'c', "names", "keep|timm|torchvision", "keep", "whose names a ViT's parameters get" },
    { O_SKIP_OBJECTS, CONVERT, 'b', "skip-objects", NULL, NULL,
      "pass over Python objects that are not plain data (argparse.Namespace ...), which are refused otherwise" },
    { O_GRADCAM, PREDICT, 's', "gradcam", "DIR", NULL,
      "write DIR/NAME.png: where the network looked, over the picture as it sees it, and DIR/index.json" },
    { O_MAP, PREDICT, 'c', "map", "auto|gradcam|rollout|integrated-gradients", "auto",
      "what is drawn; auto: Grad-CAM, of a ViT attention rollout; integrated-gradients: pixel by pixel" },
    { O_MAP_CLASS, PREDICT, 'i', "map-class", "C", "-1", "class that the map explains; -1: the predicted one" },
    { O_OUT_DIR, DECODE, 's', "out-dir", "DIR", NULL, "folder for the decoded pictures" },
    { O_AS, DECODE, 'c', "as", "png|jpg|ppm|pgm", "png", "their format" },
    { O_QUALITY, DECODE, 'i', "quality", "N", "75", "jpg: 1 to 100" },
    { O_CHROMA, DECODE, 'c', "chroma", "420|444", "420", "jpg: colour at half the resolution or in full" },
    { O_SCALE, DECODE | BENCH, 'c', "scale", "1|2|4|8", "1", "read JPEG at 1/N of its size (Pillow's draft mode)" },
    { O_OUTPUT, REPORT, 's', "output", "FILE", "report.html", "the page; -o is short for it" },
    { O_RESULTS, REPORT, 's', "results", "FILE", NULL,
      "results.json of a study: its methods as further points of the Pareto plot" },
    { O_TITLE, REPORT, 's', "title", "TEXT", NULL, "the page's headline" },
    { O_PICTURES, REPORT, 'i', "pictures", "N", "3",
      "with --data: draw Grad-CAM of N training and N test pictures of each minority group into RUN/gradcam" },
    { O_ONLY, BENCH, 's', "only", "NAME", NULL, "one part: train:ARCH, infer:ARCH, intervene:ARCH,\n"
      "                                           scan:ARCH, start:ARCH, gemm, conv, attention, memory, decode" },
};
#define N_COMMANDS ((int)(sizeof commands / sizeof commands[0]))
#define N_OPTIONS ((int)(sizeof options / sizeof options[0]))

/* Everything the command line said. */
typedef struct cli {
    const command *command;
    const char *value[O_COUNT]; /* NULL: not given and no default */
    int given[O_COUNT];
    unsigned quirk_on, quirk_off; /* --quirk, of SPM_QUIRK */
    const char **operand;
    int operands;
    spm_context *ctx;
    char text[4096]; /* the command line as given, cut at the end */
} cli;

/* Edit distance, for suggestions. */
static int distance(const char *a, const char *b)
{
    int row[64], i, j, n = (int)strlen(a), m = (int)strlen(b);
    if (n > 62 || m > 62) return 99;
    for (j = 0; j <= m; j++) row[j] = j;
    for (i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (j = 1; j <= m; j++) {
            int up = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (up + 1 < best) best = up + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = up;
            row[j] = best;
        }
    }
    return row[m];
}

static int wrong(const char *text)
{
    fprintf(stderr, "spurmem: %s\n", text);
    return 2;
}

/* The one sentence about a failed run. */
static int failed(const spm_error *error)
{
    fprintf(stderr, "spurmem: %s\n", error->text[0] ? error->text : spm_status_text(error->status));
    return 1;
}

/* Ctrl-C ended the work before its result was there. */
static int stopped(const char *what, int64_t done, int64_t total)
{
    fprintf(stderr, "spurmem: %s: stopped after %lld of %lld\n", what, (long long)done, (long long)total);
    return 1;
}

static void print_option(const option *o)
{
    int left = printf("  --%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "");
    if (left > 42) /* too long for the column: the help starts below */
        left = printf("\n") - 1;
    printf("%*s %s", 42 - left, "", o->help);
    if (o->fallback) printf(" (%s)", o->fallback);
    printf("\n");
}

static void help_all(FILE *out)
{
    int i;
    fprintf(out,
            "spurmem %d.%d - find, prove and remove the memory of spurious correlations in image classifiers\n\n"
            "usage: spurmem COMMAND [--option value | --option=value]... [operand]...\n\ncommands:\n",
            SPURMEM_VERSION_MAJOR, SPURMEM_VERSION_MINOR);
    for (i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-10s %-10s %s\n", commands[i].name, commands[i].operands, commands[i].summary);
    fprintf(out, "\nspurmem COMMAND --help lists the command's options; spurmem --version prints the version.\n"
                 "Exit codes: 0 done (a training that Ctrl-C or --max-steps stopped has saved its state: also 0),\n"
                 "1 a file or a run failed or was stopped, 2 the command line is wrong.\n");
}

/* The options with ids from `first` up to `end` that belong to a command, under a heading. */
static void help_options(const command *c, const char *heading, int first, int end)
{
    int i, any = 0;
    for (i = 0; i < N_OPTIONS; i++) {
        if (!(options[i].commands & c->id) || (int)options[i].id < first || (int)options[i].id >= end) continue;
        if (!any++) printf("\n%s (defaults in brackets):\n", heading);
        print_option(&options[i]);
    }
}

static void help_command(const command *c)
{
    printf("usage: spurmem %s [options]%s%s\n\n%s\n\nexample:\n  spurmem %s %s\n", c->name, *c->operands ? " " : "",
           c->operands, c->summary, c->name, c->example);
    help_options(c, "options", O_BATCH, O_COUNT);
    help_options(c, "data", O_DATA, O_IMAGE_SIZE);
    help_options(c, "pictures and model", O_IMAGE_SIZE, O_BATCH);
    help_options(c, "common to all commands", 0, O_DATA);
    if (c->id == LOCALIZE) {
        printf("\nJSON beside the common fields: quirks (in force), reports_selection_split; in rankings: criterion, unit,\n"
               "ranked, completeness (conductance), sampling (shapley, with an error per unit); in results: criterion,\n"
               "unit, fraction with order and dropout_p, rewind, changed, accuracy_sd (row \"mean\"), paired (examples lost\n"
               "and gained with McNemar's exact p), memory_index (spurious-memory index with 95 %% interval, of all\n"
               "minority groups and of each group); scan (exhaustive): way, forwards, seconds, screening, units with\n"
               "block, norm, drop and loss_rise by split and group, memory_index.  Controls are distinct sets of other\n"
               "units, or of other single weights: n says how many were found and measured.\n");
    }
}

/* 1 if `value` is one of "a|b|c". */
static int is_choice(const char *choices, const char *value)
{
    size_t length = strlen(value);
    while (*choices) {
        size_t n = strcspn(choices, "|");
        if (n == length && strncmp(choices, value, n) == 0) return 1;
        choices += n + (choices[n] == '|');
    }
    return 0;
}

/* The choice of "a|b|c" that is nearest to `value`, in `text`; 0 if none is near. */
static int nearest_choice(const char *choices, const char *value, char *text, size_t size)
{
    int least = 4;
    text[0] = 0;
    while (*choices) {
        char choice[32];
        size_t n = strcspn(choices, "|");
        int d;
        snprintf(choice, sizeof choice, "%.*s", (int)(n < 31 ? n : 31), choices);
        d = distance(value, choice);
        if (d < least && d < (int)n) {
            least = d;
            snprintf(text, size, "%s", choice);
        }
        choices += n + (choices[n] == '|');
    }
    return text[0] != 0;
}

/* Checks one value by its option's type; 0 and a sentence when it is wrong. */
static int check_value(const option *o, const char *value)
{
    char text[400], nearest[32], *end;
    if (o->type == 'c' && !is_choice(o->value, value)) {
        int near = nearest_choice(o->value, value, nearest, sizeof nearest);
        snprintf(text, sizeof text, "--%s %.100s: it must be one of %s%s%s%s", o->name, value, o->value,
                 near ? "; did you mean " : "", nearest, near ? "?" : "");
        wrong(text);
        return 0;
    }
    if (!*value) {
        snprintf(text, sizeof text, "--%s needs a value: %s", o->name, o->value);
        wrong(text);
        return 0;
    }
    if (o->type == 'i' && o->id != O_SEED) {
        long long number = strtoll(value, &end, 10);
        int least = o->id == O_UPWEIGHT ? 2 : o->id == O_BATCH || o->id == O_EPOCHS || o->id == O_SAMPLES
                                                  || o->id == O_REPEATS || o->id == O_STEPS || o->id == O_PERMUTATIONS
                                                  || o->id == O_SUBSETS;
        if (end == value || *end || number < least || number > 1000000000) {
            snprintf(text, sizeof text, "--%s %.100s: it must be a whole number from %d to 1000000000", o->name, value,
                     least);
            wrong(text);
            return 0;
        }
    }
    if (o->id == O_SEED) {
        errno = 0;
        (void)strtoll(value, &end, 10);
        if (end == value || *end || errno == ERANGE) {
            snprintf(text, sizeof text, "--%s %.100s: it must be a whole number of 63 bits", o->name, value);
            wrong(text);
            return 0;
        }
    }
    if (o->type == 'n') {
        double number = strtod(value, &end);
        const int positive = o->id == O_TAU || o->id == O_GCE, share = o->id == O_PRUNE_FRACTION || o->id == O_HOLD_OUT;
        const int whole_share = o->id == O_INTERPOLATE || o->id == O_GCE;
        const char *range = o->id == O_GCE ? "above 0, at most 1" : positive ? "above 0" : share ? "from 0 to below 1"
                            : whole_share ? "from 0 to 1" : "0 or more";
        int inside = number >= 0.0 && number < 1e30 && !(positive && number <= 0.0) && !(share && number >= 1.0)
                     && !(whole_share && number > 1.0) && ((float)number > 0.0f || number <= 0.0); /* no float: not 0 */
        if (end == value || *end || !inside) {
            snprintf(text, sizeof text, "--%s %.100s: it must be a number, %s", o->name, value, range);
            wrong(text);
            return 0;
        }
    }
    return 1;
}

static const option *find_option(const char *name, size_t length)
{
    int i;
    for (i = 0; i < N_OPTIONS; i++) {
        if (strlen(options[i].name) == length && strncmp(options[i].name, name, length) == 0) return &options[i];
    }
    return NULL;
}

static int unknown_option(const command *c, const char *name)
{
    char text[300];
    const char *best = NULL;
    int i, least = 4;
    for (i = 0; i < N_OPTIONS; i++) {
        int d = (options[i].commands & c->id) ? distance(name, options[i].name) : 99;
        if (d < least && 2 * d <= (int)strlen(name)) {
            least = d;
            best = options[i].name;
        }
    }
    if (best)
        snprintf(text, sizeof text, "%s has no option --%s; did you mean --%s?", c->name, name, best);
    else
        snprintf(text, sizeof text, "%s has no option --%s; spurmem %s --help lists them", c->name, name, c->name);
    return wrong(text);
}

/* "Q3=on,Q5=off" into the line; 2 and a sentence if it is none. */
static int read_quirks(cli *line, const char *text)
{
    char complaint[200];
    const char *at = text;
    for (;;) {
        char *end;
        long n = *at == 'Q' || *at == 'q' ? strtol(at + 1, &end, 10) : 0;
        int on = n >= 1 && n <= 11 && strncmp(end, "=on", 3) == 0, off = n >= 1 && n <= 11 && strncmp(end, "=off", 4) == 0;
        if (!on && !off) break;
        line->quirk_on = on ? line->quirk_on | SPM_QUIRK(n) : line->quirk_on & ~SPM_QUIRK(n);
        line->quirk_off = off ? line->quirk_off | SPM_QUIRK(n) : line->quirk_off & ~SPM_QUIRK(n);
        at = end + (on ? 3 : 4);
        if (*at == 0) return 0;
        if (*at++ != ',') break;
    }
    snprintf(complaint, sizeof complaint, "--quirk %.80s: it must be Q1 to Q11 with =on or =off, like Q5=off", text);
    return wrong(complaint);
}

/* Fills `line`; 0 done, 2 wrong, -1 help was printed. */
static int parse(cli *line, int argc, char **argv)
{
    int i, plain = 0;
    for (i = 0; i < N_OPTIONS; i++) line->value[options[i].id] = options[i].fallback;
    for (i = 2; i < argc; i++) {
        char name[64], text[200];
        const char *word = argv[i], *equals;
        const option *o;
        size_t length;
        if (plain || word[0] != '-' || word[1] == 0) {
            line->operand[line->operands++] = word;
            continue;
        }
        if (strcmp(word, "--") == 0) {
            plain = 1;
            continue;
        }
        if (strcmp(word, "-o") == 0) word = line->command->id == PACK ? "--out" : "--output";
        if (strcmp(word, "-h") == 0) word = "--help";
        if (word[1] != '-') {
            snprintf(text, sizeof text, "%s: options have two dashes; spurmem %s --help lists them", word,
                     line->command->name);
            return wrong(text);
        }
        equals = strchr(word, '=');
        length = equals ? (size_t)(equals - word) - 2 : strlen(word) - 2;
        snprintf(name, sizeof name, "%.*s", (int)(length < 60 ? length : 60), word + 2);
        o = find_option(word + 2, length);
        if (!o || !(o->commands & line->command->id)) return unknown_option(line->command, name);
        if (o->id == O_HELP) {
            help_command(line->command);
            return -1;
        }
        line->given[o->id] = 1;
        if (!o->value) {
            if (equals) {
                snprintf(text, sizeof text, "--%s takes no value", o->name);
                return wrong(text);
            }
            line->value[o->id] = "on";
            continue;
        }
        if (!equals && i + 1 >= argc) {
            snprintf(text, sizeof text, "--%s needs a value: %s", o->name, o->value);
            return wrong(text);
        }
        line->value[o->id] = equals ? equals + 1 : argv[++i];
        if (!check_value(o, line->value[o->id])) return 2;
        if (o->id == O_QUIRK && read_quirks(line, line->value[O_QUIRK])) return 2;
    }
    return 0;
}

/* 2 and a sentence if there are words that the command has no use for: "off" behind a switch is one. */
static int check_operands(const cli *line)
{
    char text[300];
    const char *only = line->value[O_ONLY];
    if (line->operands == 0 || (*line->command->operands && !(line->command->id == BENCH && only && strcmp(only, "decode"))))
        return 0;
    snprintf(text, sizeof text, "%s %.100s: %s; spurmem %s --help lists what it takes", line->command->name, line->operand[0],
             line->command->id == BENCH ? "files are for --only decode" : "it takes options only", line->command->name);
    return wrong(text);
}

static int is_on(const cli *line, option_id id)
{
    return line->value[id] && strcmp(line->value[id], "on") == 0;
}

static int is(const cli *line, option_id id, const char *value)
{
    return line->value[id] && strcmp(line->value[id], value) == 0;
}

static int64_t integer(const cli *line, option_id id)
{
    return line->value[id] ? strtoll(line->value[id], NULL, 10) : 0;
}

static double number(const cli *line, option_id id)
{
    return line->value[id] ? strtod(line->value[id], NULL) : 0.0;
}

static int required(const cli *line, option_id id)
{
    char text[200];
    int i;
    if (line->value[id]) return 1;
    for (i = 0; i < N_OPTIONS; i++) {
        if (options[i].id == id)
            snprintf(text, sizeof text, "%s needs --%s %s", line->command->name, options[i].name, options[i].value);
    }
    wrong(text);
    return 0;
}

/* The quirks in force: the profile's, less and more what --quirk says. */
static unsigned quirks(const cli *line)
{
    unsigned all = is(line, O_PROFILE, "official") ? SPM_QUIRKS_OFFICIAL : 0;
    return (all | line->quirk_on) & ~line->quirk_off;
}

/* A comma list of finite numbers. Returns how many, or -1. */
static int number_list(const char *text, double *out, int most)
{
    int n = 0;
    char *end;
    while (n < most) {
        out[n] = strtod(text, &end);
        if (end == text || !(fabs(out[n]) < 1e15)) return -1;
        n++;
        if (*end == 0) return n;
        if (*end != ',') return -1;
        text = end + 1;
    }
    return -1;
}

/* A comma list of whole numbers, 0 or more. Returns how many, or -1. */
static int whole_list(const char *text, double *out, int most)
{
    int i, n = number_list(text, out, most);
    for (i = 0; i < n; i++) {
        if (out[i] < 0.0 || out[i] > 1e9 || out[i] != floor(out[i])) return -1;
    }
    return n;
}

/* ---- results ---- */

/* 0 when stdout is to hold JSON alone. */
static int prints(const cli *line)
{
    return !is(line, O_JSON, "-");
}

/* Writes the result where --json says; frees it. */
static int finish_json(cli *line, spm_json *json)
{
    const char *text = spm_json_finish(json);
    spm_error err = SPM_ZERO;
    int rc = 0;
    if (!text) {
        fprintf(stderr, "spurmem: out of memory for the JSON result\n");
        rc = 1;
    } else if (is(line, O_JSON, "-")) {
        printf("%s\n", text); /* main sees whether it arrived */
    } else if (line->value[O_JSON]) {
        if (spm_file_write(line->ctx, line->value[O_JSON], text, strlen(text), &err)) rc = failed(&err);
    }
    spm_json_destroy(json);
    return rc;
}

static void print_eval(const spm_eval *e)
{
    int g;
    printf("%s split, %lld images\n\n  %-28s %7s %8s %9s  %s\n", spm_split_name(e->split), (long long)e->count, "group",
           "count", "correct", "accuracy", "95 % interval");
    for (g = 0; g < e->n_groups; g++) {
        char a[16], lo[16], hi[16];
        percent(a, sizeof a, e->groups[g].accuracy);
        percent(lo, sizeof lo, e->groups[g].ci_low);
        percent(hi, sizeof hi, e->groups[g].ci_high);
        printf("  %-28s %7lld %8lld %9s  %s to %s%s\n", e->groups[g].name, (long long)e->groups[g].count,
               (long long)e->groups[g].correct, a, lo, hi, g == e->worst_group ? "   worst" : "");
    }
    printf("\n  worst group %.1f   mean %.1f   adjusted %.1f   balanced %.1f   AUROC %.4f   ECE %.4f\n",
           100.0 * e->worst_accuracy, 100.0 * e->mean_accuracy, 100.0 * e->adjusted_accuracy,
           100.0 * e->balanced_accuracy, e->auroc, e->ece);
}

/* ---- models and data ---- */

/* "224" or "64x32" -> height, width. */
static int parse_size(const char *text, int64_t *height, int64_t *width)
{
    char *end;
    *height = *width = strtoll(text, &end, 10);
    if (end != text && (*end == 'x' || *end == 'X')) {
        text = end + 1;
        *width = strtoll(text, &end, 10);
    }
    return end != text && *end == 0 && *height > 0 && *width > 0 && *height <= 16384 && *width <= 16384;
}

static int parse_normalize(const char *text, spm_transform *transform)
{
    double mean[3], std[3];
    char first[100];
    const char *slash = strchr(text, '/');
    int c;
    if (strcmp(text, "imagenet") == 0) return 1;
    if (strcmp(text, "none") == 0) {
        for (c = 0; c < 3; c++) {
            transform->mean[c] = 0.0f;
            transform->std[c] = 1.0f;
        }
        return 1;
    }
    if (!slash || (size_t)(slash - text) >= sizeof first) return 0;
    snprintf(first, sizeof first, "%.*s", (int)(slash - text), text);
    if (number_list(first, mean, 3) != 3 || number_list(slash + 1, std, 3) != 3) return 0;
    for (c = 0; c < 3; c++) {
        if (!((float)std[c] >= FLT_MIN && (float)std[c] <= FLT_MAX && fabs(mean[c]) <= (double)FLT_MAX)) return 0;
        transform->mean[c] = (float)mean[c];
        transform->std[c] = (float)std[c];
    }
    return 1;
}

/* What the command line alone can get wrong about the model. */
static int check_model_options(const cli *line)
{
    spm_transform transform = spm_transform_make(8, 8);
    double jitter[4];
    int64_t h, w;
    int i;
    char text[300];
    if (line->value[O_IMAGE_SIZE] && !parse_size(line->value[O_IMAGE_SIZE], &h, &w)) {
        snprintf(text, sizeof text, "--image-size %s: it must be N or HxW", line->value[O_IMAGE_SIZE]);
        return wrong(text);
    }
    if (line->value[O_ARCH]) {
        spm_arch arch;
        spm_error err = SPM_ZERO;
        memset(&arch, 0, sizeof arch);
        if (spm_arch_parse(line->ctx, line->value[O_ARCH], &arch, &err)) {
            snprintf(text, sizeof text, "--arch: %.250s", err.text);
            return wrong(text);
        }
    }
    if (line->value[O_JITTER]) {
        const int n = number_list(line->value[O_JITTER], jitter, 4);
        for (i = 0; n == 4 && i < 4 && jitter[i] >= 0.0 && jitter[i] <= (i == 3 ? 0.5 : 1000.0);) i++;
        if (n != 4 || i < 4)
            return wrong("--jitter takes four numbers: brightness,contrast,saturation (0 to 1000) and hue (0 to .5), as "
                         ".4,.4,.4,.1");
    }
    if (line->value[O_ROTATE] && !(number(line, O_ROTATE) >= 0.0 && number(line, O_ROTATE) <= 180.0))
        return wrong("--rotate must be from 0 to 180 degrees");
    if (line->value[O_NORMALIZE] && !parse_normalize(line->value[O_NORMALIZE], &transform)) {
        snprintf(text, sizeof text, "--normalize %s: it must be imagenet, none or m1,m2,m3/s1,s2,s3",
                 line->value[O_NORMALIZE]);
        return wrong(text);
    }
    return 0;
}

/* Rows of the classifier in a file that does not say how many classes it has; 0 if it has none. */
static int64_t head_classes(cli *line, const char *file)
{
    static const char heads[][20] = { "fc.weight",         "fc.0.weight",   "head.weight",      "head.0.weight",
                                      "heads.head.weight", "linear.weight", "classifier.weight", "fc.1.weight",
                                      "head.fc.weight", "last_linear.weight", "classifier.0.weight",
                                      "classifier.1.weight" };
    spm_error err = SPM_ZERO;
    spm_archive *archive = spm_archive_open(line->ctx, file, &err);
    int64_t i, classes = 0;
    int h;
    for (i = 0; archive && i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *t = spm_archive_tensor_at(archive, i);
        for (h = 0; h < (int)(sizeof heads / sizeof heads[0]); h++) { /* whatever wraps the name */
            size_t n = strlen(t->name), m = strlen(heads[h]);
            if (t->rank == 2 && n >= m && strcmp(t->name + n - m, heads[h]) == 0
                && (n == m || t->name[n - m - 1] == '.'))
                classes = t->shape[0];
        }
    }
    spm_archive_close(archive);
    return classes;
}

/* Architecture and reading, from the checkpoint where it says and from the options where they are given. */
static spm_status resolve_model(cli *line, int data_classes, spm_arch *arch, spm_reading *reading, spm_error *err)
{
    spm_checkpoint_info info;
    const char *file = line->value[O_CHECKPOINT];
    int official = is(line, O_PROFILE, "official");
    int64_t h = 0, w = 0;
    spm_status status;
    memset(&info, 0, sizeof info);
    memset(arch, 0, sizeof *arch);
    memset(reading, 0, sizeof *reading);
    if (file) {
        status = spm_checkpoint_inspect(line->ctx, file, &info, err);
        if (status) return status;
    }
    if (!line->value[O_ARCH] && !info.has_arch) {
        err->status = SPM_E_ARGUMENT;
        if (file)
            snprintf(err->text, sizeof err->text, "%s: the file does not say its architecture; give it with --arch",
                     file);
        else
            snprintf(err->text, sizeof err->text, "%s needs --arch NAME or --checkpoint FILE", line->command->name);
        return err->status;
    }
    if (line->value[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &h, &w);
    if (line->value[O_ARCH]) {
        arch->height = h ? h : info.has_arch ? info.arch.height : 0;
        arch->width_px = w ? w : info.has_arch ? info.arch.width_px : 0;
        arch->classes = integer(line, O_NUM_CLASSES);
        if (!arch->classes && file) arch->classes = info.has_arch ? info.arch.classes : head_classes(line, file);
        if (!arch->classes) arch->classes = data_classes;
        if (line->value[O_ALLOW_PARTIAL] && !integer(line, O_NUM_CLASSES) && data_classes) arch->classes = data_classes;
        arch->softmax_head = info.has_arch ? info.arch.softmax_head : 0;
        arch->names = info.arch.names;
        status = spm_arch_parse(line->ctx, line->value[O_ARCH], arch, err);
        if (status) return status;
    } else {
        *arch = info.arch;
        if (h) {
            arch->height = h;
            arch->width_px = w;
        }
        if (integer(line, O_NUM_CLASSES))
            arch->classes = integer(line, O_NUM_CLASSES);
        else if (line->value[O_ALLOW_PARTIAL] && data_classes)
            arch->classes = data_classes;
    }
    reading->transform = info.has_arch ? info.transform : spm_transform_make(arch->height, arch->width_px);
    reading->transform.height = arch->height;
    reading->transform.width = arch->width_px;
    if (line->given[O_NORMALIZE]) {
        spm_transform plain = spm_transform_make(arch->height, arch->width_px);
        memcpy(reading->transform.mean, plain.mean, sizeof plain.mean);
        memcpy(reading->transform.std, plain.std, sizeof plain.std);
        (void)parse_normalize(line->value[O_NORMALIZE], &reading->transform);
    }
    if (line->given[O_RESIZE]) (void)spm_resize_mode_parse(line->value[O_RESIZE], &reading->transform.resize);
    reading->label_reversed = info.has_arch ? info.label_reversed : 0;
    if (!info.has_arch && official) reading->label_reversed = arch->softmax_head = 1;
    if ((line->quirk_on | line->quirk_off) & SPM_QUIRK(1)) arch->softmax_head = (quirks(line) & SPM_QUIRK(1)) != 0;
    if ((line->quirk_on | line->quirk_off) & SPM_QUIRK(2)) reading->label_reversed = (quirks(line) & SPM_QUIRK(2)) != 0;
    if (line->given[O_LABEL_ORDER]) reading->label_reversed = is(line, O_LABEL_ORDER, "reversed");
    if (line->given[O_HEAD]) arch->softmax_head = is(line, O_HEAD, "softmax");
    reading->softmax_head = arch->softmax_head;
    return SPM_OK;
}

/* once: pictures are read once, and not kept in memory. */
static spm_dataset *open_data(cli *line, int once, spm_error *err)
{
    spm_dataset_desc desc = SPM_ZERO;
    desc.cache_bytes = 1;
    if (!once && integer(line, O_CACHE)) {
        int64_t most = (int64_t)((size_t)-1 >> 21), wanted = integer(line, O_CACHE);
        desc.cache_bytes = (size_t)(wanted < most ? wanted : most) << 20;
    }
    desc.path = line->value[O_DATA];
    desc.target = line->value[O_TARGET];
    desc.confounder = line->value[O_CONFOUNDER];
    desc.limit = integer(line, O_LIMIT);
    desc.skip_bad_images = is(line, O_BAD_IMAGE, "skip");
    desc.apply_exif = is_on(line, O_EXIF);
    (void)spm_data_format_parse(line->value[O_FORMAT], &desc.format);
    return spm_dataset_open(line->ctx, &desc, err);
}

static spm_model *open_model(cli *line, int data_classes, spm_arch *arch, spm_reading *reading, spm_error *err)
{
    spm_model *model;
    if (resolve_model(line, data_classes, arch, reading, err)) return NULL;
    /* only a head that the file lacks keeps its first values */
    model = spm_model_build(line->ctx, arch, is_on(line, O_ALLOW_PARTIAL) ? (uint64_t)integer(line, O_SEED) : SPM_NO_SEED,
                            err);
    if (model && spm_checkpoint_load(model, line->value[O_CHECKPOINT], is_on(line, O_ALLOW_PARTIAL), err)) {
        const size_t used = strlen(err->text);
        if (err->status == SPM_E_SHAPE)
            snprintf(err->text + used, sizeof err->text - used, " - all: spurmem inspect FILE --arch NAME");
        spm_model_destroy(model);
        model = NULL;
    }
    return model;
}

static void list_bad(const spm_dataset *data)
{
    int64_t i, n = spm_dataset_bad_count(data), id;
    if (n) fprintf(stderr, "%lld pictures could not be read and were left out:\n", (long long)n);
    for (i = 0; i < n && i < 20; i++) fprintf(stderr, "  %s\n", spm_dataset_bad(data, i, &id));
    if (n > 20) fprintf(stderr, "  and %lld more\n", (long long)(n - 20));
}

/* ---- train and intervene ---- */

static int fill_optimizer(const cli *line, spm_train_desc *desc)
{
    desc->optimizer.kind = is(line, O_OPTIMIZER, "sgd")     ? SPM_SGD
                           : is(line, O_OPTIMIZER, "adamw") ? SPM_ADAMW
                                                            : SPM_ADAM;
    desc->optimizer.decay_all = 1;
    desc->optimizer.lr = (float)number(line, O_LR);
    desc->optimizer.weight_decay = (float)number(line, O_WEIGHT_DECAY);
    desc->optimizer.nesterov = is_on(line, O_NESTEROV);
    desc->optimizer.momentum = line->value[O_MOMENTUM]           ? (float)number(line, O_MOMENTUM)
                               : desc->optimizer.kind == SPM_SGD ? 0.9f
                                                                 : 0.0f;
    if (desc->optimizer.kind != SPM_SGD && (desc->optimizer.momentum != 0.0f || desc->optimizer.nesterov)) {
        return wrong("--momentum and --nesterov belong to --optimizer sgd");
    }
    return 0;
}

/* The published code's values, where the command line does not say otherwise. */
static void fill_official(const cli *line, spm_train_desc *desc, int intervene)
{
    desc->official = 1;
    if (!line->given[O_AUGMENT]) desc->augment = SPM_AUGMENT_PAPER;
    if (!line->given[O_SCHEDULE]) desc->schedule = SPM_SCHEDULE_PLATEAU;
    if (!line->given[O_BATCH]) desc->batch = intervene ? 100 : 256;
    if (!line->given[O_EPOCHS]) desc->epochs = intervene ? 21 : 101;
    if (!line->given[O_LR]) desc->optimizer.lr = intervene ? 2e-4f : 5e-6f;
    if (!line->given[O_PATIENCE]) desc->patience = intervene ? 1 : 3;
    if (!line->given[O_LAMBDA]) desc->lambda = 0.2f;
    if (!line->given[O_GROUP_WEIGHTING]) desc->group_weighting = 0;
}

/* Q8 to Q11, where the profile or --quirk has a say and the option that they stand for is not given itself. */
static void fill_quirks(const cli *line, spm_train_desc *desc)
{
    unsigned on = quirks(line), said = line->quirk_on | line->quirk_off | on;
    if ((said & SPM_QUIRK(8)) && !line->given[O_MASK])
        desc->mask = on & SPM_QUIRK(8) ? SPM_MASK_OFFICIAL : SPM_MASK_CRITICAL;
    if ((line->quirk_on & SPM_QUIRK(9)) && !line->given[O_MASK]) desc->mask = SPM_MASK_GRADIENT;
    desc->mask_surest = (on & SPM_QUIRK(9)) != 0;
    if ((said & SPM_QUIRK(10)) && !line->given[O_CONTRAST])
        desc->contrast = on & SPM_QUIRK(10) ? SPM_CONTRAST_OUTPUTS : SPM_CONTRAST_FEATURES;
    if ((said & SPM_QUIRK(11)) && !line->given[O_BN]) desc->bn_shared = (on & SPM_QUIRK(11)) != 0;
}

/* Options of `train` alone. */
static void fill_methods(const cli *line, spm_train_desc *desc)
{
    desc->dro_step = (float)number(line, O_DRO_STEP);
    desc->dro_adjust = (float)number(line, O_DRO_ADJUST);
    desc->identify = line->value[O_IDENTIFY];
    desc->identify_epochs = integer(line, O_IDENTIFY_EPOCHS);
    desc->upweight = integer(line, O_UPWEIGHT);
    desc->gce = (float)number(line, O_GCE);
    desc->ema = (float)number(line, O_EMA);
    desc->subsets = integer(line, O_SUBSETS);
    if (line->value[O_L1]) desc->l1 = number(line, O_L1);
    if (line->value[O_L2]) desc->l2 = number(line, O_L2);
    if (desc->method == SPM_METHOD_DFR && line->value[O_L2] && !line->value[O_L1]) desc->l1 = 0.0;
    desc->gamma = number(line, O_GAMMA);
    desc->interpolate = number(line, O_INTERPOLATE);
}

static int fill_train(const cli *line, spm_train_desc *desc, int intervene)
{
    spm_method method = SPM_METHOD_INTERVENE;
    if (!intervene) (void)spm_method_parse(line->value[O_METHOD], &method);
    *desc = spm_train_desc_init(method);
    desc->out = line->value[O_OUT];
    desc->checkpoint = line->value[O_CHECKPOINT];
    desc->epochs = integer(line, O_EPOCHS);
    desc->batch = integer(line, O_BATCH);
    desc->warmup = integer(line, O_WARMUP);
    desc->patience = integer(line, O_PATIENCE);
    desc->max_steps = integer(line, O_MAX_STEPS);
    desc->keep_every = integer(line, O_KEEP_EVERY);
    desc->eval_every = integer(line, O_EVAL_EVERY);
    desc->clip = number(line, O_CLIP);
    desc->seed = (uint64_t)integer(line, O_SEED);
    desc->log_steps = line->value[O_LOG_STEPS];
    desc->command = line->text;
    desc->workers = (int)integer(line, O_WORKERS);
    desc->shuffle = is_on(line, O_SHUFFLE);
    desc->drop_last = is_on(line, O_DROP_LAST);
    desc->allow_partial = is_on(line, O_ALLOW_PARTIAL);
    desc->resume = is_on(line, O_RESUME);
    desc->segments = is_on(line, O_SEGMENTS);
    desc->keep_norms = is_on(line, O_KEEP_NORMS);
    desc->schedule = is(line, O_SCHEDULE, "plateau")  ? SPM_SCHEDULE_PLATEAU
                     : is(line, O_SCHEDULE, "cosine") ? SPM_SCHEDULE_COSINE
                                                      : SPM_SCHEDULE_NONE;
    (void)spm_augment_parse(line->value[O_AUGMENT], &desc->augment);
    desc->rotate = (float)number(line, O_ROTATE);
    if (line->value[O_JITTER]) {
        double jitter[4];
        int i;
        (void)number_list(line->value[O_JITTER], jitter, 4);
        for (i = 0; i < 4; i++) desc->jitter[i] = (float)jitter[i];
    }
    desc->select = is(line, O_SELECT, "wga")        ? SPM_SELECT_WGA
                   : is(line, O_SELECT, "accuracy") ? SPM_SELECT_ACCURACY
                                                    : SPM_SELECT_LAST;
    desc->tau = (float)number(line, O_TAU);
    if (line->value[O_LAMBDA]) desc->lambda = (float)number(line, O_LAMBDA);
    desc->prune_fraction = number(line, O_PRUNE_FRACTION);
    desc->mask = is(line, O_MASK, "critical")   ? SPM_MASK_CRITICAL
                 : is(line, O_MASK, "official") ? SPM_MASK_OFFICIAL
                 : is(line, O_MASK, "random")   ? SPM_MASK_RANDOM
                 : is(line, O_MASK, "gradient") ? SPM_MASK_GRADIENT
                 : is(line, O_MASK, "memory")   ? SPM_MASK_MEMORY
                                                : SPM_MASK_NONE;
    desc->contrast = is(line, O_CONTRAST, "features")  ? SPM_CONTRAST_FEATURES
                     : is(line, O_CONTRAST, "outputs") ? SPM_CONTRAST_OUTPUTS
                                                       : SPM_CONTRAST_NONE;
    desc->cross_entropy = is_on(line, O_CE);
    desc->cross_entropy_pruned = is_on(line, O_CE_PRUNED);
    desc->bn_shared = is(line, O_BN, "shared");
    desc->group_labels = is_on(line, O_GROUP_LABELS);
    desc->group_weighting = is_on(line, O_GROUP_WEIGHTING);
    desc->weight_power = (float)number(line, O_WEIGHT_POWER);
    desc->anchor = (float)number(line, O_ANCHOR);
    desc->mask_mode = is(line, O_MASK_MODE, "damp")     ? SPM_MASK_MODE_DAMP
                      : is(line, O_MASK_MODE, "freeze") ? SPM_MASK_MODE_FREEZE
                                                        : SPM_MASK_MODE_OFF;
    desc->damp = (float)number(line, O_DAMP);
    desc->mask_every = integer(line, O_MASK_EVERY);
    desc->mask_ramp = integer(line, O_MASK_RAMP);
    desc->history = line->value[O_HISTORY];
    desc->by_class = is(line, O_CELLS, "class");
    desc->balanced = is_on(line, O_BALANCED);
    desc->epoch_examples = integer(line, O_EPOCH_EXAMPLES);
    if (line->value[O_HOLD_OUT]) desc->hold_out = number(line, O_HOLD_OUT);
    if (!intervene || line->command->id == TRAIN) fill_methods(line, desc);
    (void)spm_criterion_parse(line->value[O_CRITERION], &desc->criterion);
    if (desc->criterion == SPM_CRITERION_EXHAUSTIVE)
        return wrong("--criterion exhaustive belongs to localize; choose another one for the mask");
    if (fill_optimizer(line, desc)) return 2;
    if (intervene && desc->contrast == SPM_CONTRAST_NONE && !desc->cross_entropy)
        return wrong("--contrast none and --ce off leave no loss to train on; switch one of them on");
    if (is(line, O_PROFILE, "official")) fill_official(line, desc, intervene);
    fill_quirks(line, desc);
    desc->progress = on_progress;
    desc->on_epoch = on_epoch;
    return 0;
}

/* fairdropout without rates in --arch: half of the features always pass, each of the others for a fifth of the examples. */
static spm_status fair_dropout(cli *line, spm_train_desc *desc, spm_error *err)
{
    char text[200];
    spm_arch arch = desc->arch;
    if (desc->method != SPM_METHOD_FAIRDROPOUT || arch.off > 0.0f) return SPM_OK;
    snprintf(text, sizeof text, "%s%calways=0.5,off=0.8", arch.name, strchr(arch.name, ':') ? ',' : ':');
    if (spm_arch_parse(line->ctx, text, &arch, err)) return err->status;
    desc->arch = arch;
    return SPM_OK;
}

static int run_train(cli *line)
{
    int intervene = line->command->id == INTERVENE || is(line, O_METHOD, "intervene"), rc = 0;
    spm_train_desc desc;
    spm_train_result result;
    spm_error err = SPM_ZERO;
    spm_dataset *data;
    spm_json *json;
    if (!required(line, O_DATA) || !required(line, O_OUT)) return 2;
    if (line->command->id == INTERVENE && !required(line, O_CHECKPOINT)) return 2;
    if (fill_train(line, &desc, intervene)) return 2;
    data = open_data(line, 0, &err);
    if (!data) return failed(&err);
    if (resolve_model(line, spm_dataset_classes(data), &desc.arch, &desc.reading, &err)
        || fair_dropout(line, &desc, &err) || spm_train(line->ctx, data, &desc, &result, &err))
        rc = 1;
    progress_clear();
    list_bad(data);
    if (rc == 0) {
        json = spm_json_create(line->ctx);
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "command", line->command->name);
        spm_json_string(json, "out", desc.out);
        spm_json_int(json, "epochs", result.epochs);
        spm_json_int(json, "steps", result.steps);
        spm_json_int(json, "best_epoch", result.best_epoch);
        spm_json_number(json, "best_score", result.best_score);
        spm_json_number(json, "seconds_training", result.seconds);
        spm_json_number(json, "seconds_waited", result.waited); /* of them, for pictures */
        spm_json_bool(json, "stopped", result.stopped);
        spm_json_object_end(json);
        rc = finish_json(line, json);
        if (prints(line) && result.stopped)
            printf("%s: stopped after %lld steps; the same command with --resume%s goes on\n", desc.out,
                   (long long)result.steps, desc.max_steps ? " and without --max-steps" : "");
        else if (prints(line))
            printf("%s: %lld epochs, %lld steps; best.safetensors is epoch %lld\n", desc.out, (long long)result.epochs,
                   (long long)result.steps, (long long)result.best_epoch + 1);
        if (prints(line) && result.seconds > 0.0)
            printf("%.1f s of training steps, %.2f %% of them waiting for pictures\n", result.seconds,
                   100.0 * result.waited / result.seconds);
    } else
        rc = failed(&err);
    spm_dataset_close(data);
    return rc;
}

/* ---- eval ---- */

static int run_eval(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_eval_desc desc = SPM_ZERO;
    spm_eval eval;
    spm_arch arch;
    spm_dataset *data;
    spm_model *model;
    int rc = 1;
    if (!required(line, O_DATA) || !required(line, O_CHECKPOINT)) return 2;
    data = open_data(line, 0, &err);
    model = data ? open_model(line, spm_dataset_classes(data), &arch, &desc.reading, &err) : NULL;
    if (model) {
        (void)spm_split_parse(line->value[O_SPLIT], &desc.split);
        desc.batch = integer(line, O_BATCH);
        desc.workers = (int)integer(line, O_WORKERS);
        desc.progress = on_progress;
        if (spm_dataset_split_size(data, desc.split) == 0) {
            err.status = SPM_E_DATA;
            snprintf(err.text, sizeof err.text, "%s: has no %s split; choose another --split", spm_dataset_path(data),
                     spm_split_name(desc.split));
        } else if (!spm_evaluate(model, data, &desc, &eval, &err)) {
            spm_json *json = spm_json_create(line->ctx);
            progress_clear();
            list_bad(data);
            if (prints(line)) print_eval(&eval);
            spm_eval_json(json, NULL, &eval);
            rc = finish_json(line, json);
            spm_eval_free(line->ctx, &eval);
        }
    }
    progress_clear();
    if (rc && err.status) rc = failed(&err);
    spm_model_destroy(model);
    spm_dataset_close(data);
    return rc;
}

/* ---- localize ---- */

static int fill_localize(const cli *line, spm_localize_desc *desc, int *groups)
{
    double list[SPM_LOCALIZE_MAX];
    char text[300];
    int i, n;
    if (!is(line, O_GROUPS, "all")) {
        n = whole_list(line->value[O_GROUPS], list, SPM_LOCALIZE_MAX);
        if (n < 1) {
            snprintf(text, sizeof text, "--groups %s: it must be all or a list like 0,1", line->value[O_GROUPS]);
            return wrong(text);
        }
        for (i = 0; i < n; i++) groups[i] = (int)list[i];
        desc->groups = groups;
        desc->n_groups = n;
    }
    n = whole_list(line->value[O_TOP], list, SPM_LOCALIZE_MAX);
    for (i = 0; i < n; i++) desc->top[i] = (int64_t)list[i];
    if (n < 1) {
        snprintf(text, sizeof text, "--top %s: it must be a list of whole numbers like 1,2,3", line->value[O_TOP]);
        return wrong(text);
    }
    desc->n_top = n;
    n = number_list(line->value[O_FRACTION], list, SPM_LOCALIZE_MAX);
    for (i = 0; i < n; i++) {
        desc->fraction[i] = list[i];
        if (list[i] < 0.0 || list[i] > 1.0) n = -1;
    }
    if (n < 1) {
        snprintf(text, sizeof text, "--fraction %s: it must be a list of shares from 0 to 1, like 1e-5,0.05",
                 line->value[O_FRACTION]);
        return wrong(text);
    }
    desc->n_fraction = n;
    desc->dropout_p = number(line, O_DROPOUT_P);
    if (desc->dropout_p > 1.0) return wrong("--dropout-p: it must be from 0 to 1");
    desc->screen = number(line, O_SCREEN);
    if (desc->screen >= 1.0) return wrong("--screen: it must be from 0 to below 1");
    n = number_list(line->value[O_STD], list, SPM_LOCALIZE_MAX);
    for (i = 0; i < n; i++) {
        desc->std[i] = list[i];
        if (list[i] < 0.0) n = -1;
    }
    if (n < 1) {
        snprintf(text, sizeof text, "--std %s: it must be a list of numbers, 0 or more, like .005,.01",
                 line->value[O_STD]);
        return wrong(text);
    }
    desc->n_std = n;
    for (i = 0; i < SPM_SPLITS; i++) desc->report[i] = 0;
    snprintf(text, sizeof text, "%s", line->value[O_REPORT_SPLITS]);
    {
        char *word = strtok(text, ",");
        for (; word; word = strtok(NULL, ",")) {
            spm_split split;
            char complaint[200];
            if (!spm_split_parse(word, &split)) {
                snprintf(complaint, sizeof complaint,
                         "--report-splits: %s is not a split; they are train, val and test", word);
                return wrong(complaint);
            }
            desc->report[split] = 1;
        }
    }
    if (!desc->report[SPM_TRAIN] && !desc->report[SPM_VAL] && !desc->report[SPM_TEST])
        return wrong("--report-splits needs at least one of train, val and test");
    (void)spm_split_parse(line->value[O_SELECT_SPLIT], &desc->select_split);
    desc->official = is(line, O_PROFILE, "official");
    desc->quirks = quirks(line);
    desc->grid = is(line, O_GRID, "paper");
    desc->layers = line->value[O_LAYERS] != NULL;
    desc->retrain_epochs = is(line, O_LAYERS, "retrain") ? integer(line, O_RETRAIN_EPOCHS) : 0;
    (void)spm_criterion_parse(line->value[O_CRITERION], &desc->criterion);
    (void)spm_unit_kind_parse(line->value[O_UNIT], &desc->unit);
    (void)spm_modify_parse(line->value[O_MODIFY], &desc->modify);
    if (!line->given[O_MODIFY] && ((desc->quirks & SPM_QUIRK(5)) || desc->unit == SPM_UNIT_WEIGHT))
        desc->modify = SPM_MODIFY_ZERO;
    desc->order_smallest = line->given[O_ORDER] ? is(line, O_ORDER, "smallest") : desc->official;
    desc->steps = integer(line, O_STEPS);
    desc->permutations = integer(line, O_PERMUTATIONS);
    desc->truncation = number(line, O_TRUNCATION);
    desc->scan_plain = is(line, O_SCAN, "resumed") ? 1 : is(line, O_SCAN, "plain") ? 2 : 0;
    desc->allow_same_split = is_on(line, O_ALLOW_SAME_SPLIT);
    if (desc->select_split != SPM_TRAIN && desc->report[desc->select_split] && !desc->allow_same_split
        && !(desc->quirks & SPM_QUIRK(7))) {
        snprintf(text, sizeof text,
                 "--select-split %s: units chosen on the split that is reported would flatter the result; report "
                 "another with --report-splits, or pass --allow-same-split",
                 line->value[O_SELECT_SPLIT]);
        return wrong(text);
    }
    return 0;
}

/* The earlier checkpoints: those given, or for the grid those that lie 5 and 10 epochs before in the same run folder. */
static int find_rewinds(const cli *line, spm_localize_desc *desc, char names[][1024])
{
    const char *at = line->value[O_REWIND], *file = line->value[O_CHECKPOINT], *slash = strrchr(file, '/');
    int folder = slash ? (int)(slash - file) + 1 : 0, n = 0, back;
    for (; at && *at; n++) {
        size_t length = strcspn(at, ",");
        if (n == SPM_LOCALIZE_REWINDS || length >= 1024) return wrong("--rewind takes up to 4 files");
        snprintf(names[n], 1024, "%.*s", (int)length, at);
        at += length + (at[length] == ',');
    }
    if (!at && desc->grid) {
        spm_checkpoint_info info;
        spm_error ignored = SPM_ZERO;
        int64_t epoch = spm_checkpoint_inspect(line->ctx, file, &info, &ignored) ? -1 : info.epoch;
        for (back = 5; back <= 10; back += 5) {
            snprintf(names[n], 1024, "%.*sepoch-%03lld.safetensors", folder < 900 ? folder : 900, file,
                     (long long)epoch - back);
            if (epoch >= back && !spm_checkpoint_inspect(line->ctx, names[n], &info, &ignored))
                n++;
            else
                fprintf(stderr, "grid: no checkpoint %d epochs earlier beside %s (train with --keep-every 5): rewind by %d "
                                "is left out\n", back, file, back);
        }
    }
    for (back = 0; back < n; back++) desc->rewind_file[back] = names[back];
    if (desc->layers && n == 0) return wrong("--layers needs --rewind FILE, an earlier checkpoint");
    if ((desc->modify == SPM_MODIFY_REWIND || desc->modify == SPM_MODIFY_LAYER_REWIND) && !desc->grid && n == 0)
        return wrong("--modify rewind and layer-rewind need --rewind FILE, an earlier checkpoint");
    return 0;
}

static void print_units(const spm_json_value *root)
{
    const spm_json_value *rankings = spm_json_get(root, "rankings");
    int64_t i, u;
    for (i = 0; i < spm_json_length(rankings); i++) {
        const spm_json_value *r = spm_json_at(rankings, i), *units = spm_json_get(r, "units");
        if (spm_json_type_of(spm_json_get(r, "group")) == SPM_JSON_NUMBER)
            printf("group %lld, %s of %lld examples:", (long long)spm_json_as_int(spm_json_get(r, "group"), 0),
                   spm_json_as_string(spm_json_get(r, "criterion"), ""),
                   (long long)spm_json_as_int(spm_json_get(r, "samples"), 0));
        else
            printf("all groups, %s of %ss:", spm_json_as_string(spm_json_get(r, "criterion"), ""),
                   spm_json_as_string(spm_json_get(r, "unit"), ""));
        for (u = 0; u < spm_json_length(units) && u < 5; u++) {
            const spm_json_value *unit = spm_json_at(units, u);
            printf("%s %s[%lld] %.3g", u ? "," : "", spm_json_as_string(spm_json_get(unit, "parameter"), ""),
                   (long long)spm_json_as_int(spm_json_get(unit, "channel"), 0),
                   spm_json_as_number(spm_json_get(unit, "score"), 0.0));
        }
        printf("\n");
        if (spm_json_get(r, "completeness"))
            printf("    completeness error %.2g at the first block, %.2g before the head\n",
                   spm_json_as_number(spm_json_get(spm_json_get(r, "completeness"), "error_first_block"), (double)NAN),
                   spm_json_as_number(spm_json_get(spm_json_get(r, "completeness"), "error_last"), (double)NAN));
        if (spm_json_get(r, "sampling"))
            printf("    %lld orders, %lld units met twice, standard error %.2g on average, %.2g at most\n",
                   (long long)spm_json_as_int(spm_json_get(spm_json_get(r, "sampling"), "permutations"), 0),
                   (long long)spm_json_as_int(spm_json_get(spm_json_get(r, "sampling"), "met_twice"), 0),
                   spm_json_as_number(spm_json_get(spm_json_get(r, "sampling"), "mean_error"), (double)NAN),
                   spm_json_as_number(spm_json_get(spm_json_get(r, "sampling"), "max_error"), (double)NAN));
    }
}

/* What the exhaustive scan found: units by their spurious-memory index. */
static void print_scan(const spm_json_value *scan)
{
    const spm_json_value *units = spm_json_get(scan, "units"), *screening = spm_json_get(scan, "screening");
    int64_t i, shown[8], n = 0, k;
    double held[8];
    if (!scan) return;
    printf("scan (%s): %lld removals, %lld passes of an example, %.1f s; screening left out %lld units, of %lld of these "
           "measured all the same %lld cost a group a point or more\n",
           spm_json_as_string(spm_json_get(scan, "way"), ""), (long long)spm_json_length(units),
           (long long)spm_json_as_int(spm_json_get(scan, "forwards"), 0),
           spm_json_as_number(spm_json_get(scan, "seconds"), 0.0),
           (long long)spm_json_as_int(spm_json_get(screening, "left_out"), 0),
           (long long)spm_json_as_int(spm_json_get(screening, "checked"), 0),
           (long long)spm_json_as_int(spm_json_get(screening, "missed"), 0));
    for (i = 0; i < spm_json_length(units); i++) {
        double index = spm_json_as_number(
            spm_json_get(spm_json_get(spm_json_at(units, i), "memory_index"), "index"), -9.0);
        if (index <= -9.0) continue;
        for (k = n < 8 ? n : 7; k > 0 && held[k - 1] < index; k--) {
            held[k] = held[k - 1];
            shown[k] = shown[k - 1];
        }
        if (n < 8) n++;
        else if (k == 7 && held[7] >= index) continue;
        held[k] = index;
        shown[k] = i;
    }
    for (k = 0; k < n; k++) {
        const spm_json_value *u = spm_json_at(units, shown[k]), *ci = spm_json_get(spm_json_get(u, "memory_index"), "ci95");
        printf("    %s[%lld]  spurious-memory index %+.1f (%+.1f to %+.1f) points\n",
               spm_json_as_string(spm_json_get(u, "parameter"), ""),
               (long long)spm_json_as_int(spm_json_get(u, "channel"), 0), 100.0 * held[k],
               100.0 * spm_json_as_number(spm_json_at(ci, 0), 0.0), 100.0 * spm_json_as_number(spm_json_at(ci, 1), 0.0));
    }
}

/* p-value of a row's (split, group); -1 if it has none. */
static double row_p(const spm_json_value *row, const char *split, int64_t group)
{
    const spm_json_value *controls = spm_json_get(row, "controls");
    int64_t i;
    for (i = 0; i < spm_json_length(controls); i++) {
        const spm_json_value *c = spm_json_at(controls, i);
        if (strcmp(spm_json_as_string(spm_json_get(c, "split"), ""), split) == 0
            && spm_json_as_int(spm_json_get(c, "group"), -1) == group)
            return spm_json_as_number(spm_json_get(c, "p_value"), -1.0);
    }
    return -1.0;
}

static void print_row_cells(const spm_json_value *groups, const spm_json_value *row, const char *split)
{
    int64_t g;
    for (g = 0; g < spm_json_length(groups); g++) {
        double accuracy = spm_json_as_number(spm_json_get(spm_json_at(groups, g), "accuracy"), -1.0),
               p = row ? row_p(row, split, g) : -1.0;
        if (accuracy < 0.0)
            printf("      -       ");
        else if (p >= 0.0)
            printf("  %5.1f p=%.2f", 100.0 * accuracy, p);
        else
            printf("  %5.1f       ", 100.0 * accuracy);
    }
}

/* The results as an aligned table: one line a row and split. */
static void print_localize(const spm_json_value *root)
{
    const spm_json_value *baseline = spm_json_get(root, "baseline"), *results = spm_json_get(root, "results");
    int64_t i, s, g;
    print_units(root);
    print_scan(spm_json_get(root, "scan"));
    printf("\naccuracy by group (p: share of matched controls with at least that drop)\n%-7s %5s %-12s %-7s %-6s",
           "ranked", "top", "modify", "std", "split");
    for (g = 0; g < spm_json_length(spm_json_at(baseline, 0)); g++) printf("  group %-6lld", (long long)g);
    printf("\n");
    for (s = 0; s < spm_json_length(baseline); s++) {
        printf("%-7s %5s %-12s %-7s %-6s", "-", "0", "baseline", "", spm_json_key_at(baseline, s));
        print_row_cells(spm_json_at(baseline, s), NULL, NULL);
        printf("\n");
    }
    for (i = 0; i < spm_json_length(results); i++) {
        const spm_json_value *row = spm_json_at(results, i), *splits = spm_json_get(row, "splits"),
                             *repeat = spm_json_get(row, "repeat");
        int64_t next = i + 1 < spm_json_length(results)
                           ? spm_json_as_int(spm_json_get(spm_json_at(results, i + 1), "repeat"), -1)
                           : 0;
        const spm_json_value *index = spm_json_get(row, "memory_index");
        char ranked[24], std[24], size[24];
        if (spm_json_type_of(repeat) == SPM_JSON_NUMBER && next != 0)
            continue; /* of repeated rows the mean is printed */
        if (spm_json_type_of(spm_json_get(row, "group")) == SPM_JSON_NUMBER)
            snprintf(ranked, sizeof ranked, "group %lld", (long long)spm_json_as_int(spm_json_get(row, "group"), 0));
        else
            snprintf(ranked, sizeof ranked, "all");
        if (spm_json_type_of(spm_json_get(row, "std")) == SPM_JSON_NUMBER)
            snprintf(std, sizeof std, "%.3g", spm_json_as_number(spm_json_get(row, "std"), 0.0));
        else
            std[0] = 0;
        if (spm_json_get(row, "top"))
            snprintf(size, sizeof size, "%lld", (long long)spm_json_as_int(spm_json_get(row, "top"), 0));
        else
            snprintf(size, sizeof size, "%.3g", spm_json_as_number(spm_json_get(row, "fraction"), 0.0));
        for (s = 0; s < spm_json_length(splits); s++) {
            printf("%-7s %5s %-12s %-7s %-6s", ranked, size, spm_json_as_string(spm_json_get(row, "modify"), ""), std,
                   spm_json_key_at(splits, s));
            print_row_cells(spm_json_at(splits, s), row, spm_json_key_at(splits, s));
            printf("\n");
        }
        if (spm_json_type_of(spm_json_get(index, "index")) == SPM_JSON_NUMBER) {
            const spm_json_value *ci = spm_json_get(index, "ci95");
            printf("%-40s spurious-memory index %+.1f (%+.1f to %+.1f) points\n", "",
                   100.0 * spm_json_as_number(spm_json_get(index, "index"), 0.0),
                   100.0 * spm_json_as_number(spm_json_at(ci, 0), 0.0), 100.0 * spm_json_as_number(spm_json_at(ci, 1), 0.0));
        }
    }
    for (i = 0; i < spm_json_length(spm_json_get(root, "layers")); i++) {
        static const char steps[2][12] = { "rewound", "retrained" };
        const spm_json_value *layer = spm_json_at(spm_json_get(root, "layers"), i);
        int step;
        printf("%s\n", spm_json_as_string(spm_json_get(layer, "parameter"), ""));
        for (step = 0; step < 2; step++) {
            const spm_json_value *splits = spm_json_get(spm_json_get(layer, steps[step]), "splits");
            for (s = 0; s < spm_json_length(splits); s++) {
                printf("%-7s %5s %-12s %-7s %-6s", "", "", steps[step], "", spm_json_key_at(splits, s));
                print_row_cells(spm_json_at(splits, s), NULL, NULL);
                printf("\n");
            }
        }
    }
    printf("units were selected on split %s\n", spm_json_as_string(spm_json_get(root, "selected_on"), "?"));
}

/* ---- localize --quirks: the same study with one quirk off and on ---- */

typedef struct quirk_case {
    int number;
    const char *what;
} quirk_case;

/* The object of one study; NULL with an error. */
static spm_json_value *quirk_study(cli *line, spm_model *model, spm_dataset *data, const spm_localize_desc *desc,
                                   spm_error *err)
{
    spm_json *json = spm_json_create(line->ctx);
    spm_json_value *root = NULL;
    if (json && !spm_localize(model, data, desc, json, NULL, err)) {
        const char *text = spm_json_finish(json);
        if (text) root = spm_json_parse(line->ctx, "study", text, strlen(text), err);
    }
    if (json) spm_json_destroy(json);
    if (!root && !err->status) {
        err->status = SPM_E_MEMORY;
        snprintf(err->text, sizeof err->text, "out of memory for the JSON result");
    }
    return root;
}

/* Ranked units that are not the same in the same place, and the largest difference of a group's accuracy in any row. */
static void quirk_compare(const spm_json_value *off, const spm_json_value *on, int64_t *units, double *accuracy)
{
    const spm_json_value *a = spm_json_get(off, "rankings"), *b = spm_json_get(on, "rankings");
    int64_t r, k, s, g;
    *units = 0;
    *accuracy = 0.0;
    for (r = 0; r < spm_json_length(a) && r < spm_json_length(b); r++) {
        const spm_json_value *x = spm_json_get(spm_json_at(a, r), "units"), *y = spm_json_get(spm_json_at(b, r), "units");
        for (k = 0; k < spm_json_length(x) && k < spm_json_length(y); k++) {
            const spm_json_value *u = spm_json_at(x, k), *v = spm_json_at(y, k);
            *units += strcmp(spm_json_as_string(spm_json_get(u, "parameter"), ""),
                             spm_json_as_string(spm_json_get(v, "parameter"), "")) != 0
                      || spm_json_as_int(spm_json_get(u, "channel"), -1) != spm_json_as_int(spm_json_get(v, "channel"), -1);
        }
    }
    a = spm_json_get(off, "results");
    b = spm_json_get(on, "results");
    for (r = 0; r < spm_json_length(a) && r < spm_json_length(b); r++) {
        const spm_json_value *x = spm_json_get(spm_json_at(a, r), "splits"), *y = spm_json_get(spm_json_at(b, r), "splits");
        for (s = 0; s < spm_json_length(x); s++) {
            const spm_json_value *groups = spm_json_at(x, s), *others = spm_json_get(y, spm_json_key_at(x, s));
            for (g = 0; g < spm_json_length(groups) && others; g++) {
                double p = spm_json_as_number(spm_json_get(spm_json_at(groups, g), "accuracy"), -1.0),
                       q = spm_json_as_number(spm_json_get(spm_json_at(others, g), "accuracy"), -1.0);
                if (p >= 0.0 && q >= 0.0 && fabs(p - q) > *accuracy) *accuracy = fabs(p - q);
            }
        }
    }
}

/* Puts the rows of the head in reverse order: with the label order reversed as well, the same classifier. */
static void reverse_head(spm_model *model)
{
    int i;
    for (i = 0; i < spm_model_parameter_count(model); i++) {
        spm_parameter *p = spm_model_parameter(model, i);
        int64_t rows = p->value.shape[0], row = spm_tensor_count(&p->value) / (rows ? rows : 1), r, k;
        if (!(p->flags & SPM_PARAMETER_HEAD)) continue;
        for (r = 0; r < rows / 2; r++) {
            for (k = 0; k < row; k++) {
                float *a = p->value.data + r * row + k, *b = p->value.data + (rows - 1 - r) * row + k, held = *a;
                *a = *b;
                *b = held;
            }
        }
    }
    spm_model_touch(model);
}

/* One quirk off and on, each in the study where it can matter. */
static int quirk_pair(cli *line, spm_model *model, spm_dataset *data, const spm_arch *arch, const spm_localize_desc *base,
                      int number, spm_json_value **root, spm_error *err)
{
    int on, ok = 1;
    for (on = 0; ok && on < 2; on++) {
        spm_localize_desc desc = *base;
        spm_model *other = NULL;
        desc.controls = 0;
        desc.grid = 0;
        desc.quirks = on ? desc.quirks | SPM_QUIRK(number) : desc.quirks & ~SPM_QUIRK(number);
        if (number == 1) {
            spm_arch changed = *arch;
            changed.softmax_head = desc.reading.softmax_head = on;
            other = spm_model_build(line->ctx, &changed, SPM_NO_SEED, err);
            ok = other && !spm_checkpoint_load(other, line->value[O_CHECKPOINT], is_on(line, O_ALLOW_PARTIAL), err);
        }
        if (number == 2 && on != base->reading.label_reversed) {
            reverse_head(model);
            desc.reading.label_reversed = on;
        }
        if (number == 3) desc.criterion = SPM_CRITERION_MAGNITUDE;
        if (number == 4 || number == 6) {
            desc.unit = SPM_UNIT_WEIGHT;
            desc.criterion = SPM_CRITERION_MAGNITUDE;
            desc.modify = number == 4 ? SPM_MODIFY_ZERO : SPM_MODIFY_NOISE;
            desc.repeats = number == 4 ? 1 : 3;
            desc.order_smallest = 1;
        }
        if (number == 5) desc.modify = on ? SPM_MODIFY_ZERO : SPM_MODIFY_ZERO_UNIT;
        if (number == 7) {
            desc.select_split = on ? SPM_TEST : SPM_TRAIN;
            desc.report[SPM_TRAIN] = desc.report[SPM_VAL] = 0;
            desc.report[SPM_TEST] = 1;
        }
        if (ok) root[on] = quirk_study(line, other ? other : model, data, &desc, err);
        ok = ok && root[on] != NULL;
        if (number == 2 && on != base->reading.label_reversed) reverse_head(model);
        spm_model_destroy(other);
    }
    return ok;
}

static int run_quirks(cli *line, spm_model *model, spm_dataset *data, const spm_arch *arch, const spm_localize_desc *base,
                      spm_error *err)
{
    static const quirk_case cases[] = {
        { 1, "softmax before the cross-entropy (gradient ranking)" },
        { 2, "reversed label order (a renaming: with the head's rows reversed nothing may change)" },
        { 3, "magnitude ranking without the shortcut convolutions" },
        { 4, "threshold of the convolutions applied to every parameter (smallest single weights, zero)" },
        { 5, "zeroed weights leave the batch norm's constant (against zero output)" },
        { 6, "uniform noise on single weights (against normal)" },
        { 7, "units chosen on the test split that is reported (against the training split)" },
    };
    spm_json *json = spm_json_create(line->ctx);
    int i, ok = 1;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "localize");
    spm_json_string(json, "profile", base->official ? "official" : "sound");
    spm_json_array_begin(json, "quirks");
    if (prints(line))
        printf("%-4s %14s %22s  %s\n", "", "units changed", "largest accuracy change", "off against on");
    for (i = 0; ok && i < (int)(sizeof cases / sizeof cases[0]); i++) {
        spm_json_value *root[2] = { NULL, NULL };
        int64_t units = 0;
        double accuracy = 0.0;
        char name[8];
        ok = quirk_pair(line, model, data, arch, base, cases[i].number, root, err);
        progress_clear();
        if (ok) quirk_compare(root[0], root[1], &units, &accuracy);
        snprintf(name, sizeof name, "Q%d", cases[i].number);
        if (ok && prints(line))
            printf("%-4s %14lld %15.1f points  %s\n", name, (long long)units, 100.0 * accuracy, cases[i].what);
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "quirk", name);
        spm_json_string(json, "what", cases[i].what);
        spm_json_int(json, "units_changed", units);
        spm_json_number(json, "largest_accuracy_change", accuracy);
        spm_json_object_end(json);
        spm_json_free(line->ctx, root[0]);
        spm_json_free(line->ctx, root[1]);
    }
    spm_json_array_end(json);
    spm_json_object_end(json);
    if (ok && prints(line))
        printf("Q8 to Q11 belong to the intervention: intervene --profile official --quirk Q8=off\n");
    if (ok) return finish_json(line, json);
    spm_json_destroy(json);
    return 1;
}

static int run_localize(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_localize_desc desc = SPM_ZERO;
    spm_arch arch;
    spm_dataset *data;
    spm_model *model;
    spm_json *json = NULL;
    int rc = 1, groups[SPM_LOCALIZE_MAX];
    char names[SPM_LOCALIZE_REWINDS][1024];
    if (!required(line, O_DATA) || !required(line, O_CHECKPOINT)) return 2;
    if (fill_localize(line, &desc, groups)) return 2;
    if (find_rewinds(line, &desc, names)) return 2;
    desc.repeats = integer(line, O_REPEATS);
    desc.controls = integer(line, O_CONTROLS);
    desc.samples = integer(line, O_SAMPLES);
    desc.batch = integer(line, O_BATCH);
    desc.workers = (int)integer(line, O_WORKERS);
    desc.seed = (uint64_t)integer(line, O_SEED);
    desc.progress = on_progress;
    data = open_data(line, 0, &err);
    model = data ? open_model(line, spm_dataset_classes(data), &arch, &desc.reading, &err) : NULL;
    if (model) desc.rewind_arch = arch;
    if (model && is_on(line, O_QUIRKS))
        rc = run_quirks(line, model, data, &arch, &desc, &err);
    else if (model) {
        json = spm_json_create(line->ctx);
        if (!json) {
            err.status = SPM_E_MEMORY;
            snprintf(err.text, sizeof err.text, "out of memory for the JSON result");
        }
    }
    if (json && !spm_localize(model, data, &desc, json, NULL, &err)) {
        const char *text = spm_json_finish(json);
        progress_clear();
        list_bad(data);
        if (text && prints(line)) {
            spm_json_value *root = spm_json_parse(line->ctx, "result", text, strlen(text), &err);
            if (root) print_localize(root);
            spm_json_free(line->ctx, root);
        }
        rc = finish_json(line, json);
        json = NULL;
    }
    progress_clear();
    if (rc && err.status) rc = failed(&err);
    if (json) spm_json_destroy(json);
    spm_model_destroy(model);
    spm_dataset_close(data);
    return rc;
}

/* ---- ledger ---- */

/* A text that grows; `failed` once memory ran out. */
typedef struct table_text {
    char *data;
    size_t length, room;
    int failed;
} table_text;

static void table_add(table_text *t, const char *text)
{
    size_t n = strlen(text);
    if (t->failed) return;
    if (t->length + n + 1 > t->room) {
        size_t room = 2 * (t->length + n + 1) + 4096;
        char *larger = (char *)realloc(t->data, room);
        if (!larger) {
            t->failed = 1;
            return;
        }
        t->data = larger;
        t->room = room;
    }
    memcpy(t->data + t->length, text, n + 1);
    t->length += n;
}

/* A CSV field; quoted where it must be. */
static void table_name(table_text *t, const char *name)
{
    char one[2] = { 0, 0 };
    int quoted = strpbrk(name, ",\"\r\n") != NULL;
    if (quoted) table_add(t, "\"");
    for (; *name; name++) {
        one[0] = *name;
        if (*name == '"') table_add(t, "\"");
        table_add(t, one);
    }
    if (quoted) table_add(t, "\"");
}

/* A count that may be unknown: empty where it is -1. */
static void table_count(table_text *t, int value, const char *behind)
{
    char text[32];
    snprintf(text, sizeof text, "%d", value);
    if (value >= 0) table_add(t, text);
    table_add(t, behind);
}

static void ledger_table(table_text *t, const spm_dataset *data, spm_model *model, const spm_ledger_row *rows,
                         int64_t count)
{
    int64_t i;
    char text[300];
    table_add(t, "id,file,y,confounder,group,minority,predicted,correct,probability,loss,margin,self_influence,"
                 "flip_count,flip_parameter,flip_channel,first_epoch,epochs_wrong,forgotten,network_influence\n");
    for (i = 0; i < count; i++) {
        const spm_ledger_row *r = &rows[i];
        const spm_example *e = spm_dataset_example(data, r->id);
        snprintf(text, sizeof text, "%lld,", (long long)r->id);
        table_add(t, text);
        table_name(t, e->file);
        snprintf(text, sizeof text, ",%d,%d,%d,%d,%d,%d,%.9g,%.9g,%.9g,%.9g,", (int)e->y, (int)e->confounder,
                 (int)e->group, spm_group_is_minority(data, e->group), (int)r->predicted, r->predicted == e->y,
                 r->probability, r->loss, r->margin, r->self_influence);
        table_add(t, text);
        table_count(t, r->flip_count, ",");
        if (r->flip_parameter >= 0) table_add(t, spm_model_parameter(model, r->flip_parameter)->name);
        table_add(t, ",");
        table_count(t, r->flip_channel, ",");
        table_count(t, r->first_epoch, ",");
        table_count(t, r->epochs_wrong, ",");
        table_count(t, r->forgotten, ",");
        snprintf(text, sizeof text, "%.9g", r->network_influence);
        table_add(t, r->network_influence >= 0.0 ? text : ""); /* not asked for: empty */
        table_add(t, "\n");
    }
}

/* Means by group, as a table and as JSON. */
static void ledger_summary(cli *line, spm_json *json, const spm_dataset *data, const spm_ledger_row *rows, int64_t count,
                           int print)
{
    int g;
    int64_t i;
    if (print)
        printf("%-28s %7s %8s %9s %9s %12s %11s %9s\n", "mean by group", "count", "correct", "margin", "influence",
               "units to flip", "first epoch", "forgotten");
    spm_json_array_begin(json, "groups");
    for (g = 0; g < spm_dataset_groups(data); g++) {
        double sum[6] = { 0 }, seen[6] = { 0 };
        int k;
        for (i = 0; i < count; i++) {
            const spm_ledger_row *r = &rows[i];
            const spm_example *e = spm_dataset_example(data, r->id);
            double value[6];
            if (e->group != g) continue;
            value[0] = r->predicted == e->y;
            value[1] = r->margin;
            value[2] = r->self_influence;
            value[3] = r->flip_count;
            value[4] = r->first_epoch;
            value[5] = r->forgotten;
            for (k = 0; k < 6; k++) {
                if (k > 2 && value[k] < 0.0) continue; /* not known */
                sum[k] += value[k];
                seen[k] += 1.0;
            }
        }
        if (seen[0] < 1.0) continue;
        if (print) {
            printf("%-28s %7.0f %8.1f %9.3f %9.3g", spm_dataset_group_name(data, g), seen[0], 100.0 * sum[0] / seen[0],
                   sum[1] / seen[1], sum[2] / seen[2]);
            for (k = 3; k < 6; k++) {
                if (seen[k] > 0.0) printf(" %11.2f", sum[k] / seen[k]);
                else printf(" %11s", "-");
            }
            printf("\n");
        }
        spm_json_object_begin(json, NULL);
        spm_json_int(json, "group", g);
        spm_json_int(json, "count", (int64_t)seen[0]);
        spm_json_number(json, "accuracy", sum[0] / seen[0]);
        spm_json_number(json, "mean_margin", sum[1] / seen[1]);
        spm_json_number(json, "mean_self_influence", sum[2] / seen[2]);
        spm_json_int(json, "flipped", (int64_t)seen[3]);
        spm_json_number(json, "mean_flip_count", seen[3] > 0.0 ? sum[3] / seen[3] : (double)NAN);
        spm_json_number(json, "mean_first_epoch", seen[4] > 0.0 ? sum[4] / seen[4] : (double)NAN);
        spm_json_number(json, "mean_forgotten", seen[5] > 0.0 ? sum[5] / seen[5] : (double)NAN);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    (void)line;
}

/* Rows of one checkpoint's gradient shares. */
static int gradient_rows(table_text *t, spm_model *model, spm_dataset *data, const spm_reading *reading, int64_t epoch,
                         int workers, spm_error *err)
{
    spm_gradient_share *rows = NULL;
    int64_t count = 0, i;
    char text[400];
    if (spm_gradient_shares(model, data, reading, SPM_TRAIN, workers, &rows, &count, err)) return 0;
    for (i = 0; i < count; i++) {
        const spm_parameter *p = spm_model_parameter(model, rows[i].parameter);
        snprintf(text, sizeof text, "%lld,%s,%d,%d,%lld,%.9g,%.9g,%.9g\n", (long long)epoch, p->name, p->block, rows[i].group,
                 (long long)spm_dataset_group_count(data, SPM_TRAIN, rows[i].group), rows[i].norm, rows[i].share,
                 rows[i].cosine);
        table_add(t, text);
    }
    spm_free(spm_model_context(model), rows);
    return 1;
}

/* --gradients: the kept epoch checkpoints beside the checkpoint, in order, then the checkpoint itself. */
static int write_gradients(cli *line, spm_model *model, spm_dataset *data, const spm_reading *reading, spm_error *err)
{
    const char *file = line->value[O_CHECKPOINT], *slash = strrchr(file, '/');
    int folder = slash ? (int)(slash - file) + 1 : 0, ok = 1, epoch, workers = (int)integer(line, O_WORKERS);
    table_text t = { NULL, 0, 0, 0 };
    spm_checkpoint_info info;
    char name[2048];
    table_add(&t, "epoch,parameter,block,group,count,norm,share,cosine\n");
    for (epoch = 0; ok && epoch < 1000 && !interrupted; epoch++) {
        spm_error none = SPM_ZERO;
        snprintf(name, sizeof name, "%.*sepoch-%03d.safetensors", folder < 1900 ? folder : 1900, file, epoch);
        if (spm_checkpoint_inspect(line->ctx, name, &info, &none)) continue;
        ok = !spm_checkpoint_load(model, name, 0, err) && gradient_rows(&t, model, data, reading, epoch, workers, err);
    }
    ok = ok && !spm_checkpoint_load(model, file, is_on(line, O_ALLOW_PARTIAL), err)
         && !spm_checkpoint_inspect(line->ctx, file, &info, err)
         && gradient_rows(&t, model, data, reading, info.epoch, workers, err);
    if (ok && t.failed) {
        err->status = SPM_E_MEMORY;
        snprintf(err->text, sizeof err->text, "out of memory for the table of gradients");
        ok = 0;
    }
    if (ok) ok = !spm_file_write(line->ctx, line->value[O_GRADIENTS], t.data, t.length, err);
    free(t.data);
    return ok;
}

/* The history.csv beside the checkpoint, if there is one. */
static const char *own_history(const char *file, char *text, size_t size)
{
    const char *slash = strrchr(file, '/');
    FILE *there;
    snprintf(text, size, "%.*shistory.csv", slash ? (int)(slash - file) + 1 : 0, file);
    there = fopen(text, "rb");
    if (there) fclose(there);
    return there ? text : NULL;
}

static int run_ledger(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_ledger_desc desc = SPM_ZERO;
    spm_ledger_row *rows = NULL;
    spm_arch arch;
    spm_dataset *data;
    spm_model *model;
    table_text t = { NULL, 0, 0, 0 };
    char beside[2048];
    int64_t count = 0;
    int rc = 1;
    if (!required(line, O_DATA) || !required(line, O_CHECKPOINT)) return 2;
    if (is(line, O_JSON, "-") && !line->value[O_OUT]) return wrong("ledger --json -: give the table's file with --out");
    data = open_data(line, 1, &err);
    model = data ? open_model(line, spm_dataset_classes(data), &arch, &desc.reading, &err) : NULL;
    if (line->given[O_SPLIT]) (void)spm_split_parse(line->value[O_SPLIT], &desc.split);
    desc.history = line->value[O_HISTORY] ? line->value[O_HISTORY]
                   : desc.split == SPM_TRAIN ? own_history(line->value[O_CHECKPOINT], beside, sizeof beside)
                                             : NULL;
    desc.batch = integer(line, O_BATCH);
    desc.max_flips = integer(line, O_MAX_FLIPS) ? integer(line, O_MAX_FLIPS) : -1;
    desc.network_influence = is(line, O_INFLUENCE, "network");
    desc.workers = (int)integer(line, O_WORKERS);
    desc.progress = on_progress;
    if (model && !spm_ledger(model, data, &desc, &rows, &count, &err)) {
        progress_clear();
        list_bad(data);
        ledger_table(&t, data, model, rows, count);
        if (t.failed) {
            err.status = SPM_E_MEMORY;
            snprintf(err.text, sizeof err.text, "out of memory for the ledger");
        } else if (!line->value[O_OUT])
            rc = fwrite(t.data, 1, t.length, stdout) != t.length;
        else
            rc = spm_file_write(line->ctx, line->value[O_OUT], t.data, t.length, &err) != SPM_OK;
        if (!rc && line->value[O_GRADIENTS]) rc = !write_gradients(line, model, data, &desc.reading, &err);
        if (!rc) {
            spm_json *json = spm_json_create(line->ctx);
            spm_json_object_begin(json, NULL);
            spm_json_string(json, "command", "ledger");
            spm_json_string(json, "split", spm_split_name(desc.split));
            spm_json_int(json, "count", count);
            spm_json_string(json, "history", desc.history);
            ledger_summary(line, json, data, rows, count, line->value[O_OUT] && prints(line));
            spm_json_object_end(json);
            rc = finish_json(line, json);
        }
    }
    progress_clear();
    if (rc && err.status) rc = failed(&err);
    free(t.data);
    spm_free(line->ctx, rows);
    spm_model_destroy(model);
    spm_dataset_close(data);
    return rc;
}

/* ---- predict and decode ---- */

/* Class c of "landbird|waterbird"; its number where the checkpoint has no names. */
static void class_name(const char *names, int c, char *text, size_t size)
{
    int i;
    for (i = 0; names && *names; i++) {
        size_t n = 0;
        for (; *names && *names != '|'; names++) {
            if (*names == '\\' && names[1]) names++;
            if (i == c && n + 1 < size) text[n++] = *names;
        }
        if (i == c) {
            text[n] = 0;
            return;
        }
        names += *names == '|';
    }
    snprintf(text, size, "%d", c);
}

/* Loads a picture as the network sees it; errors name the file. */
static spm_status load_picture(cli *line, const char *file, const spm_transform *transform, spm_image *ready,
                               spm_error *err)
{
    spm_image image = SPM_ZERO;
    spm_decode_desc decoding = SPM_ZERO;
    spm_error why = SPM_ZERO;
    spm_status status;
    decoding.apply_exif = is_on(line, O_EXIF);
    if (line->value[O_SCALE]) decoding.scale = (int)integer(line, O_SCALE);
    status = spm_image_load(line->ctx, file, &decoding, transform ? &image : ready, err);
    if (status || !transform) return status;
    status = spm_transform_image(line->ctx, transform, &image, ready, &why);
    spm_image_free(line->ctx, &image);
    if (status) {
        err->status = status;
        snprintf(err->text, sizeof err->text, "%.200s: %.250s", file, why.text);
    }
    return status;
}

/* DIR/BASENAME.png, extension replaced. */
static void output_name(char *text, size_t size, const char *dir, const char *file, const char *extension)
{
    const char *base = strrchr(file, '/'), *dot;
    base = base ? base + 1 : file;
    dot = strrchr(base, '.');
    snprintf(text, size, "%s/%.*s.%s", dir, dot && dot > base ? (int)(dot - base) : (int)strlen(base), base, extension);
}

/* 2 and a sentence if two operands would become one file. */
static int outputs_clash(cli *line, const char *dir, const char *extension)
{
    char path[4096], other[4096], text[4200];
    int i, j;
    for (i = 0; i < line->operands; i++) {
        output_name(path, sizeof path, dir, line->operand[i], extension);
        for (j = 0; j < i; j++) {
            output_name(other, sizeof other, dir, line->operand[j], extension);
            if (strcmp(path, other) != 0) continue;
            snprintf(text, sizeof text,
                     "%.1000s and %.1000s would both become %.2000s; give them to separate calls with other folders",
                     line->operand[j], line->operand[i], path);
            return wrong(text);
        }
    }
    return 0;
}

/* The map of a picture that the network has just seen, over that picture, at 256 pixels or more, as DIR/NAME.png. */
static int write_map(cli *line, spm_model *model, const spm_reading *reading, const float *pixels, const char *file,
                     const spm_image *picture, spm_map *explained, spm_error *err)
{
    spm_map map = SPM_ZERO;
    spm_map_kind kind = is(line, O_MAP, "gradcam")                ? SPM_MAP_GRADCAM
                        : is(line, O_MAP, "rollout")              ? SPM_MAP_ROLLOUT
                        : is(line, O_MAP, "integrated-gradients") ? SPM_MAP_INTEGRATED
                                                                  : SPM_MAP_AUTO;
    spm_image large = SPM_ZERO, overlay = SPM_ZERO;
    char path[4096];
    uint8_t *bytes = NULL;
    size_t size = 0;
    int side = picture->width < picture->height ? picture->width : picture->height, by = side < 256 ? 255 / side + 1 : 1;
    spm_status status = spm_explain(model, reading, pixels, (int)integer(line, O_MAP_CLASS), kind, &map, err);
    output_name(path, sizeof path, line->value[O_GRADCAM], file, "png");
    if (!status)
        status = spm_image_resize(line->ctx, picture, picture->width * by, picture->height * by, SPM_FILTER_BILINEAR,
                                  &large, err);
    if (!status) status = spm_map_overlay(line->ctx, &map, &large, &overlay, err);
    if (!status) status = spm_image_encode_png(line->ctx, &overlay, &bytes, &size, err);
    if (!status) status = spm_file_write(line->ctx, path, bytes, size, err);
    spm_free(line->ctx, bytes);
    spm_free(line->ctx, map.values);
    map.values = NULL;
    *explained = map;
    spm_image_free(line->ctx, &large);
    spm_image_free(line->ctx, &overlay);
    return status == SPM_OK;
}

/* An element of DIR/index.json, as the report reads it. */
static void index_picture(spm_json *index, const cli *line, const char *file, const spm_map *map, const char *class_name,
                          const char *map_class, double probability)
{
    char path[4096];
    output_name(path, sizeof path, ".", file, "png");
    spm_json_object_begin(index, NULL);
    spm_json_string(index, "file", path + 2);
    spm_json_string(index, "source", file);
    spm_json_string(index, "class_name", class_name);
    spm_json_number(index, "probability", probability);
    spm_json_string(index, "map", line->value[O_MAP]);
    spm_json_string(index, "map_class_name", map_class);
    spm_json_int(index, "map_height", map->height);
    spm_json_int(index, "map_width", map->width);
    spm_json_object_end(index);
}

/* One line on stdout; with --json - only the element of the object. */
static int predict_one(cli *line, spm_json *all, spm_json *index, spm_run *run, spm_model *model, const spm_reading *reading,
                       const char *names, const char *file, float *pixels, float *probabilities, int classes,
                       spm_error *err)
{
    const spm_program *program = spm_model_program(model);
    spm_image ready = SPM_ZERO;
    const float *logits;
    const char *text;
    char name[128], of_map[128];
    spm_map map = SPM_ZERO;
    spm_json *json;
    int c, best, ok;
    if (load_picture(line, file, &reading->transform, &ready, err)) return 0;
    spm_transform_normalize(&reading->transform, &ready, pixels);
    ok = !line->value[O_GRADCAM] || write_map(line, model, reading, pixels, file, &ready, &map, err);
    spm_image_free(line->ctx, &ready);
    if (!ok) return 0;
    if (spm_run_input(run, spm_program_find(program, "image"), pixels) || spm_run_forward(run, 1, 0)) {
        *err = *spm_run_error(run);
        return 0;
    }
    logits = spm_run_data(run, spm_program_find(program, "logits"));
    best = spm_classify(reading, logits, classes, probabilities);
    json = spm_json_create(line->ctx);
    class_name(names, best, name, sizeof name);
    class_name(names, map.class_index, of_map, sizeof of_map);
    if (line->value[O_GRADCAM]) index_picture(index, line, file, &map, name, of_map, (double)probabilities[best]);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "file", file);
    spm_json_int(json, "class", best);
    spm_json_string(json, "class_name", name);
    spm_json_array_begin(json, "logits");
    for (c = 0; c < classes; c++) spm_json_number(json, NULL, (double)logits[c]);
    spm_json_array_end(json);
    spm_json_array_begin(json, "probabilities");
    for (c = 0; c < classes; c++) spm_json_number(json, NULL, (double)probabilities[c]);
    spm_json_array_end(json);
    spm_json_object_end(json);
    text = spm_json_finish(json);
    ok = text != NULL;
    if (ok) spm_json_raw(all, NULL, text);
    if (ok && prints(line)) ok = printf("%s\n", text) > 0;
    if (!ok) {
        err->status = text ? SPM_E_IO : SPM_E_MEMORY;
        snprintf(err->text, sizeof err->text, "%s",
                 text ? "stdout: writing failed" : "out of memory for the JSON result");
    }
    spm_json_destroy(json);
    return ok;
}

static int run_predict(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_arch arch;
    spm_reading reading;
    spm_checkpoint_info info;
    spm_model *model;
    spm_run *run = NULL;
    spm_json *json, *index;
    float *pixels = NULL, *probabilities = NULL;
    int i, rc = 0;
    if (!required(line, O_CHECKPOINT)) return 2;
    if (line->operands == 0) return wrong("predict needs at least one picture");
    if (line->value[O_GRADCAM] && outputs_clash(line, line->value[O_GRADCAM], "png")) return 2;
    model = open_model(line, 0, &arch, &reading, &err);
    if (!model) return failed(&err);
    if (spm_checkpoint_inspect(line->ctx, line->value[O_CHECKPOINT], &info, &err)) rc = 1;
    if (!rc && line->value[O_GRADCAM] && spm_directory_create(line->ctx, line->value[O_GRADCAM], &err)) rc = 1;
    if (!rc) {
        spm_run_desc desc = SPM_ZERO;
        run = spm_run_create(model, &desc, &err);
        pixels = (float *)malloc((size_t)(arch.height * arch.width_px * 3) * sizeof *pixels);
        probabilities = (float *)malloc((size_t)arch.classes * sizeof *probabilities);
        if (!run || !pixels || !probabilities) rc = 1;
        if (rc && !err.status) snprintf(err.text, sizeof err.text, "out of memory for one picture");
    }
    json = spm_json_create(line->ctx);
    index = spm_json_create(line->ctx);
    spm_json_object_begin(index, NULL);
    spm_json_array_begin(index, "pictures");
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "predict");
    spm_json_array_begin(json, "predictions");
    for (i = 0; !rc && i < line->operands && !interrupted; i++) {
        if (!predict_one(line, json, index, run, model, &reading, info.class_names, line->operand[i],
                         pixels, probabilities, (int)arch.classes, &err))
            rc = 1;
    }
    spm_json_array_end(json);
    spm_json_object_end(json);
    spm_json_array_end(index);
    spm_json_object_end(index);
    if (!rc && !interrupted && line->value[O_GRADCAM]) {
        const char *text = spm_json_finish(index);
        char path[4096];
        snprintf(path, sizeof path, "%s/index.json", line->value[O_GRADCAM]);
        if (!text) snprintf(err.text, sizeof err.text, "out of memory for %.100s", path);
        if (!text || spm_file_write(line->ctx, path, text, strlen(text), &err)) rc = 1;
    }
    spm_json_destroy(index);
    if (!rc && interrupted) {
        rc = stopped("predict", i, line->operands);
        spm_json_destroy(json);
    } else if (rc) {
        fflush(stdout);
        rc = failed(&err);
        spm_json_destroy(json);
    } else
        rc = finish_json(line, json);
    free(pixels);
    free(probabilities);
    spm_run_destroy(run);
    spm_model_destroy(model);
    return rc;
}

static int decode_one(cli *line, spm_json *json, const char *file, const char *path, spm_error *err)
{
    spm_image image = SPM_ZERO;
    spm_transform transform;
    uint8_t *bytes = NULL;
    size_t size = 0;
    int64_t h = 8, w = 8;
    spm_status status;
    if (line->value[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &h, &w);
    transform = spm_transform_make(h, w);
    (void)spm_resize_mode_parse(line->value[O_RESIZE], &transform.resize);
    status = load_picture(line, file, line->value[O_IMAGE_SIZE] ? &transform : NULL, &image, err);
    if (!status)
        status = is(line, O_AS, "ppm")   ? spm_image_encode_ppm(line->ctx, &image, &bytes, &size, err)
                 : is(line, O_AS, "pgm") ? spm_image_encode_pgm(line->ctx, &image, &bytes, &size, err)
                 : is(line, O_AS, "jpg") ? spm_image_encode_jpeg(line->ctx, &image, (int)integer(line, O_QUALITY),
                                                                 is(line, O_CHROMA, "420"), &bytes, &size, err)
                                         : spm_image_encode_png(line->ctx, &image, &bytes, &size, err);
    if (!status) status = spm_file_write(line->ctx, path, bytes, size, err);
    if (!status) {
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "file", file);
        spm_json_string(json, "output", path);
        spm_json_int(json, "width", image.width);
        spm_json_int(json, "height", image.height);
        spm_json_object_end(json);
    }
    spm_free(line->ctx, bytes);
    spm_image_free(line->ctx, &image);
    return status == SPM_OK;
}

static int run_decode(cli *line)
{
    spm_error err = SPM_ZERO;
    char path[4096];
    spm_json *json;
    int i, ok = 1;
    if (!required(line, O_OUT_DIR)) return 2;
    if (line->operands == 0) return wrong("decode needs at least one picture");
    if (integer(line, O_QUALITY) < 1 || integer(line, O_QUALITY) > 100) return wrong("--quality must be from 1 to 100");
    if (outputs_clash(line, line->value[O_OUT_DIR], line->value[O_AS])) return 2;
    if (spm_directory_create(line->ctx, line->value[O_OUT_DIR], &err)) return failed(&err);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "decode");
    spm_json_array_begin(json, "pictures");
    for (i = 0; ok && i < line->operands && !interrupted; i++) {
        output_name(path, sizeof path, line->value[O_OUT_DIR], line->operand[i], line->value[O_AS]);
        ok = decode_one(line, json, line->operand[i], path, &err);
        if (ok && prints(line)) printf("%s\n", path);
    }
    spm_json_array_end(json);
    spm_json_object_end(json);
    if (ok && !interrupted) return finish_json(line, json);
    spm_json_destroy(json);
    return ok ? stopped("decode", i, line->operands) : failed(&err);
}

/* ---- report ---- */

/* --data: Grad-CAM pictures of the same examples into every run folder. 1 done, 0 failed. */
static int draw_pictures(cli *line, spm_error *err)
{
    spm_dataset *data;
    int ok;
    if (!line->value[O_DATA] || integer(line, O_PICTURES) == 0) return 1;
    data = open_data(line, 1, err);
    ok = data
         && spm_report_draw(line->ctx, data, line->operand, line->operands,
                            (int)integer(line, O_PICTURES), err) == SPM_OK;
    spm_dataset_close(data);
    return ok;
}

static int run_report(cli *line)
{
    spm_report_desc desc = SPM_ZERO;
    spm_error err = SPM_ZERO;
    spm_json *json;
    int i;
    if (line->operands == 0) return wrong("report needs at least one run folder");
    desc.runs = line->operand;
    desc.n_runs = line->operands;
    desc.results = line->value[O_RESULTS];
    desc.title = line->value[O_TITLE];
    if (integer(line, O_PICTURES) < 0 || integer(line, O_PICTURES) > 24) return wrong("--pictures: 0 to 24");
    if (!draw_pictures(line, &err)) return failed(&err);
    if (spm_report_write(line->ctx, &desc, line->value[O_OUTPUT], &err)) return failed(&err);
    if (prints(line)) printf("%s\n", line->value[O_OUTPUT]);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "report");
    spm_json_string(json, "output", line->value[O_OUTPUT]);
    spm_json_array_begin(json, "runs");
    for (i = 0; i < line->operands; i++) spm_json_string(json, NULL, line->operand[i]);
    spm_json_array_end(json);
    spm_json_object_end(json);
    return finish_json(line, json);
}

/* ---- inspect and convert ---- */

static const char *dtype_name(spm_dtype dtype)
{
    switch (dtype) {
    case SPM_F32: return "F32";
    case SPM_F64: return "F64";
    case SPM_F16: return "F16";
    case SPM_BF16: return "BF16";
    case SPM_I64: return "I64";
    case SPM_I32: return "I32";
    case SPM_I16: return "I16";
    case SPM_I8: return "I8";
    case SPM_U8: return "U8";
    case SPM_BOOL: return "BOOL";
    case SPM_DTYPE_NONE: break;
    }
    return "?";
}

static void shape_text(const int64_t *shape, int rank, char *text, size_t size)
{
    size_t at = 0;
    int i;
    at += (size_t)snprintf(text, size, "[");
    for (i = 0; i < rank && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%lld", i ? "," : "", (long long)shape[i]);
    if (at < size) snprintf(text + at, size - at, "]");
}

/* What a network is made of: a line for every layer, then the sums; FLOPs of one picture, a multiply and an add as two.
 * tensors: 1 if no file has listed them. */
static int describe_model(cli *line, const spm_arch *arch, int tensors, spm_json *json)
{
    spm_error err = SPM_ZERO;
    spm_model *model = spm_model_build(line->ctx, arch, SPM_NO_SEED, &err);
    const spm_program *program;
    int64_t total = 0;
    double flops, back;
    size_t bytes[4];
    int i, d;
    if (!model) return failed(&err);
    program = spm_model_program(model);
    if (prints(line))
        printf("  %-32s %-12s %-20s %12s %12s\n", "layer", "operation", "output", "parameters", "MFLOP");
    spm_json_array_begin(json, "layers");
    for (i = 0; i < spm_program_op_count(program); i++) {
        spm_op op;
        spm_value in[SPM_OP_MAX_IN], out = spm_program_op_at(program, i, &op, NULL, in);
        spm_tensor shape = spm_program_shape(program, out, 1);
        int64_t count = 0;
        char text[96], name[96] = "";
        for (d = 0; d < SPM_OP_MAX_IN; d++) {
            int k;
            for (k = 0; in[d] && k < spm_model_parameter_count(model); k++) {
                const spm_parameter *p = spm_model_parameter(model, k);
                const char *dot = strrchr(p->name, '.');
                if (p->id != in[d] || (p->flags & SPM_PARAMETER_BUFFER)) continue;
                count += spm_tensor_count(&p->value);
                if (!name[0]) snprintf(name, sizeof name, "%.*s", (int)(dot ? dot - p->name : (long)strlen(p->name)), p->name);
            }
        }
        total += count;
        if (prints(line))
            printf("  %-32s %-12s %-20s %12lld %12.2f\n", name, spm_op_name(op),
                   spm_tensor_shape_text(&shape, text, sizeof text), (long long)count,
                   spm_program_op_flops(program, i, 1, 0) * 1e-6);
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "name", name);
        spm_json_string(json, "operation", spm_op_name(op));
        spm_json_array_begin(json, "shape");
        for (d = 0; d < shape.rank; d++) spm_json_int(json, NULL, shape.shape[d]);
        spm_json_array_end(json);
        spm_json_int(json, "parameters", count);
        spm_json_number(json, "flops", spm_program_op_flops(program, i, 1, 0));
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    for (i = 0; i < 4; i++) { /* inference and training, at one picture and at two */
        spm_run_desc desc = SPM_ZERO;
        spm_run *run;
        desc.max_batch = 1 + i % 2;
        desc.backward = i / 2;
        run = spm_run_create(model, &desc, &err);
        if (!run) {
            spm_model_destroy(model);
            return failed(&err);
        }
        bytes[i] = spm_run_bytes(run);
        spm_run_destroy(run);
    }
    flops = spm_program_flops(program, 1, 0);
    back = spm_program_flops(program, 1, 1);
    if (tensors) {
        spm_json_array_begin(json, "tensors");
        for (i = 0; i < spm_model_parameter_count(model); i++) {
            const spm_parameter *p = spm_model_parameter(model, i);
            if (p->flags & SPM_PARAMETER_BUFFER) continue;
            spm_json_object_begin(json, NULL);
            spm_json_string(json, "name", p->name);
            spm_json_string(json, "dtype", "F32");
            spm_json_array_begin(json, "shape");
            for (d = 0; d < p->value.rank; d++) spm_json_int(json, NULL, p->value.shape[d]);
            spm_json_array_end(json);
            spm_json_object_end(json);
        }
        spm_json_array_end(json);
        spm_json_int(json, "values", total);
    }
    spm_json_int(json, "parameters", total);
    spm_json_number(json, "flops", flops);
    spm_json_number(json, "flops_backward", back);
    spm_json_int(json, "run_bytes", (int64_t)bytes[0]);
    spm_json_int(json, "run_bytes_per_picture", (int64_t)(bytes[1] - bytes[0]));
    spm_json_int(json, "run_bytes_training", (int64_t)bytes[2]);
    spm_json_int(json, "run_bytes_training_per_picture", (int64_t)(bytes[3] - bytes[2]));
    if (prints(line)) {
        printf("%s at %lld x %lld: %lld parameters, %.3f GFLOP forward, %.3f backward\n", arch->name,
               (long long)arch->height, (long long)arch->width_px, (long long)total, flops * 1e-9, back * 1e-9);
        printf("memory of a run, without the parameters: %.1f MB for inference, of which activations %.1f MB a picture; "
               "%.1f MB for training, %.1f MB a picture\n", (double)bytes[0] * 1e-6,
               (double)(bytes[1] - bytes[0]) * 1e-6, (double)bytes[2] * 1e-6, (double)(bytes[3] - bytes[2]) * 1e-6);
    }
    spm_model_destroy(model);
    return 0;
}

typedef struct differences {
    cli *line;
    spm_json *json;
    int count;
} differences;

static void on_difference(void *user, spm_checkpoint_kind kind, const char *name, const char *in_file,
                          const char *in_model)
{
    static const char words[3][10] = { "misshapen", "missing", "surplus" };
    differences *d = (differences *)user;
    if (prints(d->line)) {
        if (!d->count) printf("what does not fit the model (shapes: the file's / the model's):\n");
        printf("  %-9s %-46s %s / %s\n", words[kind], name, in_file[0] ? in_file : "-", in_model[0] ? in_model : "-");
    }
    spm_json_object_begin(d->json, NULL);
    spm_json_string(d->json, "kind", words[kind]);
    spm_json_string(d->json, "name", name);
    spm_json_string(d->json, "in_file", in_file);
    spm_json_string(d->json, "in_model", in_model);
    spm_json_object_end(d->json);
    d->count++;
}

/* Every parameter of the architecture that the file lacks, has beside it, or has in another shape. */
static int compare_checkpoint(cli *line, const char *path, const spm_arch *arch, spm_json *json)
{
    spm_error err = SPM_ZERO;
    differences d;
    spm_model *model = spm_model_build(line->ctx, arch, SPM_NO_SEED, &err);
    d.line = line;
    d.json = json;
    d.count = 0;
    spm_json_array_begin(json, "differences");
    if (model && !spm_checkpoint_compare(model, path, 0, on_difference, &d, &err) && prints(line))
        printf("every parameter of %s is there, and none beside\n", arch->name);
    spm_json_array_end(json);
    spm_model_destroy(model);
    return err.status && err.status != SPM_E_SHAPE ? failed(&err) : 0;
}

static int inspect_checkpoint(cli *line, const char *path)
{
    spm_error err = SPM_ZERO;
    spm_checkpoint_info info;
    spm_archive *archive = spm_archive_open(line->ctx, path, &err);
    spm_json *json;
    int64_t i, total = 0;
    if (!archive) return failed(&err);
    memset(&info, 0, sizeof info);
    if (spm_checkpoint_inspect(line->ctx, path, &info, &err)) {
        spm_archive_close(archive);
        return failed(&err);
    }
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "inspect");
    spm_json_string(json, "file", path);
    spm_json_string(json, "format", spm_archive_format(archive));
    spm_json_string(json, "arch", info.has_arch ? info.arch.name : NULL);
    spm_json_array_begin(json, "tensors");
    if (prints(line))
        printf("%s: %s%s%s%s%s\n", path, spm_archive_format(archive), info.has_arch ? ", " : "",
               info.has_arch ? info.arch.name : "", info.method[0] ? ", method " : "", info.method);
    for (i = 0; i < spm_archive_count(archive); i++) {
        const spm_archive_tensor *t = spm_archive_tensor_at(archive, i);
        char shape[128];
        int d;
        shape_text(t->shape, t->rank, shape, sizeof shape);
        total += t->count;
        if (prints(line)) printf("  %-52s %-5s %s\n", t->name, dtype_name(t->dtype), shape);
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "name", t->name);
        spm_json_string(json, "dtype", dtype_name(t->dtype));
        spm_json_array_begin(json, "shape");
        for (d = 0; d < t->rank; d++) spm_json_int(json, NULL, t->shape[d]);
        spm_json_array_end(json);
        spm_json_object_end(json);
    }
    spm_json_array_end(json);
    spm_json_int(json, "values", total);
    if (prints(line)) printf("%lld tensors, %lld values\n", (long long)spm_archive_count(archive), (long long)total);
    spm_archive_close(archive);
    if (line->value[O_ARCH]) { /* the user's word stands above the file's */
        info.arch.classes = integer(line, O_NUM_CLASSES) ? integer(line, O_NUM_CLASSES) : head_classes(line, path);
        if (line->value[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &info.arch.height, &info.arch.width_px);
        if (spm_arch_parse(line->ctx, line->value[O_ARCH], &info.arch, &err)) {
            spm_json_destroy(json);
            return failed(&err);
        }
        info.has_arch = 1;
    }
    if (info.has_arch && (compare_checkpoint(line, path, &info.arch, json) || describe_model(line, &info.arch, 0, json))) {
        spm_json_destroy(json);
        return 1;
    }
    spm_json_object_end(json);
    return finish_json(line, json);
}

static int inspect_picture(cli *line, const char *path)
{
    spm_error err = SPM_ZERO;
    spm_image image = SPM_ZERO;
    spm_json *json;
    if (spm_image_load(line->ctx, path, NULL, &image, &err)) return failed(&err);
    if (prints(line)) printf("%s: a picture, %d wide, %d high\n", path, image.width, image.height);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "inspect");
    spm_json_string(json, "file", path);
    spm_json_int(json, "width", image.width);
    spm_json_int(json, "height", image.height);
    spm_json_object_end(json);
    spm_image_free(line->ctx, &image);
    return finish_json(line, json);
}

#define READ_BATCH 64

typedef struct read_work {
    spm_dataset *data;
    int64_t first;
    spm_error error[READ_BATCH];
} read_work;

static void read_one(void *user, int64_t task, int slot)
{
    read_work *work = (read_work *)user;
    spm_image image = SPM_ZERO;
    (void)slot;
    memset(&work->error[task], 0, sizeof work->error[task]);
    (void)spm_dataset_image(work->data, work->first + task, &image, &work->error[task]);
    spm_image_free(spm_dataset_context(work->data), &image);
}

/* Decodes every picture once, to find the broken ones. Returns how many it came to. */
static int64_t find_broken(spm_dataset *data, spm_json *json, int print)
{
    static read_work work;
    int64_t i, j, n = spm_dataset_size(data), broken = 0;
    double start = spm_seconds();
    work.data = data;
    spm_json_array_begin(json, "broken");
    for (i = 0; i < n && !interrupted; i += j) {
        int64_t batch = n - i < READ_BATCH ? n - i : READ_BATCH;
        spm_progress p = SPM_ZERO;
        work.first = i;
        spm_parallel(spm_dataset_context(data), batch, read_one, &work);
        p.what = "read pictures";
        p.unit = "images";
        p.done = i + batch;
        p.total = n;
        p.seconds = spm_seconds() - start;
        (void)on_progress(NULL, &p);
        for (j = 0; j < batch; j++) {
            if (!work.error[j].status) continue;
            broken++;
            spm_json_object_begin(json, NULL);
            spm_json_string(json, "file", spm_dataset_example(data, i + j)->file);
            spm_json_string(json, "reason", work.error[j].text);
            spm_json_object_end(json);
            progress_clear();
            if (print) printf("  broken: %s\n", work.error[j].text);
        }
    }
    spm_json_array_end(json);
    progress_clear();
    if (print && i == n) printf("%lld of %lld pictures cannot be read\n", (long long)broken, (long long)n);
    return i;
}

/* Published sizes of the groups, by split and id. */
typedef struct published_counts {
    const char *name, *group; /* group: what the set calls its group 1 */
    int64_t count[SPM_SPLITS][4];
} published_counts;

static const published_counts published_sets[] = {
    { "Waterbirds", "landbird on water", { { 3498, 184, 56, 1057 }, { 467, 466, 133, 133 }, { 2255, 2255, 642, 642 } } },
    { "CelebA", "non-blond male",
      { { 71629, 66874, 22880, 1387 }, { 8535, 8276, 2874, 182 }, { 9767, 7535, 2480, 180 } } },
};

/* The published set that has this one's groups; NULL if none is known. */
static const published_counts *find_published(const spm_dataset *data)
{
    size_t i;
    for (i = 0; i < sizeof published_sets / sizeof published_sets[0]; i++) {
        if (spm_dataset_groups(data) == 4 && strcmp(spm_dataset_group_name(data, 1), published_sets[i].group) == 0)
            return &published_sets[i];
    }
    return NULL;
}

/* Says whether the counts are the published ones. */
static void compare_published(const spm_dataset *data, const published_counts *known)
{
    int s, g, differ = 0;
    for (s = 0; s < SPM_SPLITS; s++)
        for (g = 0; g < 4; g++) differ += spm_dataset_group_count(data, (spm_split)s, g) != known->count[s][g];
    if (differ)
        printf("%d of 12 counts differ from those of the published %s\n\n", differ, known->name);
    else
        printf("the counts are those of the published %s\n\n", known->name);
}

static int inspect_data(cli *line, const char *path)
{
    spm_error err = SPM_ZERO;
    spm_dataset *data;
    spm_json *json;
    const published_counts *known;
    int64_t read, total;
    int s, g;
    line->value[O_DATA] = path;
    data = open_data(line, 1, &err);
    if (!data) return failed(&err);
    known = find_published(data);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "inspect");
    spm_json_string(json, "format", spm_data_format_name(spm_dataset_format(data)));
    if (known) spm_json_string(json, "published", known->name);
    spm_json_array_begin(json, "splits");
    if (prints(line)) {
        printf("%s: %s, %d classes, %d confounders\n\n  %-6s", path, spm_data_format_name(spm_dataset_format(data)),
               spm_dataset_classes(data), spm_dataset_confounders(data), "split");
        for (g = 0; g < spm_dataset_groups(data); g++) printf("  %s", spm_dataset_group_name(data, g));
        printf("  all\n");
    }
    for (s = 0; s < SPM_SPLITS; s++) {
        if (spm_dataset_split_size(data, (spm_split)s) == 0) continue;
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "name", spm_split_name((spm_split)s));
        spm_json_int(json, "count", spm_dataset_split_size(data, (spm_split)s));
        spm_json_array_begin(json, "groups");
        if (prints(line)) printf("  %-6s", spm_split_name((spm_split)s));
        for (g = 0; g < spm_dataset_groups(data); g++) {
            const char *name = spm_dataset_group_name(data, g);
            spm_json_object_begin(json, NULL);
            spm_json_int(json, "id", g);
            spm_json_string(json, "name", name);
            spm_json_int(json, "y", g / spm_dataset_confounders(data));
            spm_json_int(json, "confounder", g % spm_dataset_confounders(data));
            spm_json_int(json, "count", spm_dataset_group_count(data, (spm_split)s, g));
            if (known) spm_json_int(json, "published_count", known->count[s][g]);
            spm_json_null(json, "correct"); /* no model has seen it: the rest of a group is null */
            spm_json_null(json, "accuracy");
            spm_json_null(json, "ci95");
            spm_json_null(json, "loss");
            spm_json_object_end(json);
            if (prints(line))
                printf("  %*lld", (int)strlen(name), (long long)spm_dataset_group_count(data, (spm_split)s, g));
        }
        spm_json_array_end(json);
        spm_json_object_end(json);
        if (prints(line)) printf("  %lld\n", (long long)spm_dataset_split_size(data, (spm_split)s));
        if (prints(line) && known) {
            int64_t all = 0;
            printf("  %-6s", "  publ.");
            for (g = 0; g < 4; all += known->count[s][g++])
                printf("  %*lld", (int)strlen(spm_dataset_group_name(data, g)) - (g == 0), (long long)known->count[s][g]);
            printf("  %lld\n", (long long)all);
        }
    }
    spm_json_array_end(json);
    if (prints(line)) printf("\n");
    if (prints(line) && known) compare_published(data, known);
    read = find_broken(data, json, prints(line));
    total = spm_dataset_size(data);
    spm_json_object_end(json);
    spm_dataset_close(data);
    if (read == total) return finish_json(line, json);
    spm_json_destroy(json);
    return stopped("reading the pictures", read, total);
}

/* ---- pack ---- */

static int run_pack(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_transform transform = spm_transform_make(224, 224);
    spm_dataset *data;
    spm_json *json;
    int64_t i, id = -1, n = 0, used = 0;
    int rc = 1, whole;
    if (!line->value[O_DATA] && used < line->operands) line->value[O_DATA] = line->operand[used++];
    if (!line->value[O_OUT] && used < line->operands) line->value[O_OUT] = line->operand[used++];
    if (used < line->operands || !line->value[O_DATA] || !line->value[O_OUT])
        return wrong("pack takes one data set and one file to write: spurmem pack DATA FILE");
    (void)spm_resize_mode_parse(line->value[O_RESIZE], &transform.resize);
    whole = transform.resize == SPM_RESIZE_NONE;
    if (whole && line->value[O_IMAGE_SIZE]) return wrong("--resize none keeps pictures whole; leave --image-size away");
    if (line->value[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &transform.height, &transform.width);
    data = open_data(line, 1, &err);
    if (data && !spm_dataset_pack(data, line->value[O_OUT], &transform, on_progress, NULL, &err)) {
        n = spm_dataset_size(data);
        progress_clear();
        list_bad(data);
        if (prints(line) && whole)
            printf("%s: %lld pictures, whole\n", line->value[O_OUT], (long long)n);
        else if (prints(line))
            printf("%s: %lld pictures, %lld x %lld (--resize %s)\n", line->value[O_OUT], (long long)n,
                   (long long)transform.height, (long long)transform.width, spm_resize_mode_name(transform.resize));
        json = spm_json_create(line->ctx);
        spm_json_object_begin(json, NULL);
        spm_json_string(json, "command", "pack");
        spm_json_string(json, "out", line->value[O_OUT]);
        spm_json_int(json, "count", n);
        spm_json_string(json, "resize", spm_resize_mode_name(transform.resize));
        spm_json_int(json, "height", whole ? 0 : transform.height);
        spm_json_int(json, "width", whole ? 0 : transform.width);
        spm_json_array_begin(json, "broken");
        for (i = 0; i < spm_dataset_bad_count(data); i++) {
            const char *reason = spm_dataset_bad(data, i, &id);
            spm_json_object_begin(json, NULL);
            spm_json_string(json, "file", spm_dataset_example(data, id)->file);
            spm_json_string(json, "reason", reason);
            spm_json_object_end(json);
        }
        spm_json_array_end(json);
        spm_json_object_end(json);
        rc = finish_json(line, json);
    }
    progress_clear();
    if (rc && err.status) rc = failed(&err);
    spm_dataset_close(data);
    return rc;
}

/* The parameters of an architecture that is named, not loaded. */
static int inspect_arch(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_arch arch;
    spm_reading reading;
    spm_json *json;
    if (resolve_model(line, 2, &arch, &reading, &err)) return failed(&err);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "inspect");
    spm_json_string(json, "arch", arch.name);
    if (describe_model(line, &arch, 1, json)) {
        spm_json_destroy(json);
        return 1;
    }
    spm_json_object_end(json);
    return finish_json(line, json);
}

static int ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static int run_inspect(cli *line)
{
    unsigned char head[512];
    FILE *file;
    size_t got;
    int folder;
    if (line->operands == 0 && line->value[O_ARCH]) return inspect_arch(line);
    if (line->operands != 1) return wrong("inspect takes one checkpoint, picture or data set (or --arch NAME)");
    file = fopen(line->operand[0], "rb");
    if (!file) {
        spm_error err = SPM_ZERO;
        snprintf(err.text, sizeof err.text, "%.400s: %s", line->operand[0],
                 errno == ENOENT ? "there is no such file or folder" : strerror(errno));
        return failed(&err);
    }
    got = fread(head, 1, sizeof head, file);
    folder = ferror(file); /* a folder opens but does not read */
    fclose(file);
    if (got == 0 && !folder) {
        spm_error err = SPM_ZERO;
        snprintf(err.text, sizeof err.text, "%.400s: the file is empty", line->operand[0]);
        return failed(&err);
    }
    if (folder || (got > 262 && memcmp(head + 257, "ustar", 5) == 0) || (got > 8 && memcmp(head, "SPMPACK", 7) == 0)
        || ends_with(line->operand[0], ".csv"))
        return inspect_data(line, line->operand[0]);
    if (spm_image_probe(head, got, NULL, NULL) != SPM_IMAGE_UNKNOWN) return inspect_picture(line, line->operand[0]);
    return inspect_checkpoint(line, line->operand[0]);
}

static int run_convert(cli *line)
{
    spm_error err = SPM_ZERO;
    spm_json *json;
    const char *to;
    spm_convert_desc desc = SPM_ZERO;
    int64_t tensors = 0;
    if (line->operands != 2) return wrong("convert takes two files: IN OUT");
    to = line->operand[1];
    if (!ends_with(to, ".safetensors") && !ends_with(to, ".pth"))
        return wrong("convert: OUT must end in .safetensors or .pth");
    if (!is(line, O_NAMES, "keep")) desc.names = is(line, O_NAMES, "timm") ? SPM_NAMES_TIMM : SPM_NAMES_TORCHVISION;
    desc.skip_objects = is_on(line, O_SKIP_OBJECTS);
    if (spm_checkpoint_convert(line->ctx, line->operand[0], to, &desc, &tensors, &err)) {
        const size_t used = strlen(err.text);
        if (err.status == SPM_E_UNSUPPORTED && !desc.skip_objects && strstr(err.text, "Python object"))
            snprintf(err.text + used, sizeof err.text - used, " (--skip-objects)");
        return failed(&err);
    }
    if (prints(line)) printf("%s: %lld tensors\n", to, (long long)tensors);
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "convert");
    spm_json_string(json, "file", line->operand[0]);
    spm_json_string(json, "output", to);
    spm_json_int(json, "tensors", tensors);
    spm_json_object_end(json);
    return finish_json(line, json);
}

/* ---- bench ---- */

static int64_t peak_bytes(void)
{
#if defined(_WIN32)
    return 0;
#else
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    #if defined(__APPLE__)
    return (int64_t)usage.ru_maxrss;
    #else
    return (int64_t)usage.ru_maxrss * 1024;
    #endif
#endif
}

static double median(double *values, int n)
{
    int i, j;
    for (i = 1; i < n; i++) {
        double v = values[i];
        for (j = i; j > 0 && values[j - 1] > v; j--) values[j] = values[j - 1];
        values[j] = v;
    }
    return values[n / 2];
}

/* Seconds that copying takes on all threads: half of `bytes` are read, half written. */
typedef struct bench_copying {
    char *from, *to;
    size_t piece;
} bench_copying;

static void bench_copy_piece(void *arg, int64_t task, int slot)
{
    const bench_copying *c = (const bench_copying *)arg;
    (void)slot;
    memcpy(c->to + (size_t)task * c->piece, c->from + (size_t)task * c->piece, c->piece);
}

static double bench_copy(spm_context *ctx, double bytes)
{
    bench_copying c;
    double seconds[7], result = 0.0;
    const size_t half = (size_t)(bytes / 2.0) / 4096 * 4096;
    int i;
    c.piece = 65536;
    c.from = (char *)malloc(half + c.piece);
    c.to = (char *)malloc(half + c.piece);
    if (c.from && c.to) {
        memset(c.from, 1, half + c.piece);
        memset(c.to, 2, half + c.piece);
        for (i = 0; i < 7; i++) {
            const double start = spm_seconds();
            spm_parallel(ctx, (int64_t)((half + c.piece - 1) / c.piece), bench_copy_piece, &c);
            seconds[i] = spm_seconds() - start;
        }
        result = median(seconds, 7);
    }
    free(c.from);
    free(c.to);
    return result > 0.0 ? result : 1e9;
}

/* One line of the bench's table: a repetition's seconds and processor seconds (of all threads; 0: not taken), floating-
 * point operations, images and bytes that it reads and writes at the least (0: not counted), and how many times faster
 * it is than the plain way (0: there is none). */
typedef struct bench_line {
    const char *name;
    int64_t batch;
    double seconds, cpu, flops, images, bytes, times;
} bench_line;

/* Seconds on the wall and on the processors so far. */
static double bench_clock(double *cpu)
{
    *cpu = (double)clock() / (double)CLOCKS_PER_SEC;
    return spm_seconds();
}

static void bench_number(spm_json *json, const char *key, double value)
{
    if (value > 0.0) spm_json_number(json, key, value);
    else spm_json_null(json, key);
}

/* Peak and copying are measured beside the row that is compared with them: other programs may share the machine. */
static void bench_row(cli *line, spm_json *json, const bench_line *row)
{
    const double gflops = row->flops / row->seconds * 1e-9, images = row->images / row->seconds;
    const double peak = row->flops > 0.0 ? spm_measure_peak(line->ctx) : 0.0;
    const double copies = row->bytes > 0.0 ? row->seconds / bench_copy(line->ctx, row->bytes) : 0.0;
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "name", row->name);
    spm_json_int(json, "batch", row->batch);
    spm_json_number(json, "seconds", row->seconds);
    bench_number(json, "cpu_seconds", row->cpu);
    bench_number(json, "images_per_second", images);
    bench_number(json, "gflops", gflops);
    bench_number(json, "peak_gflops", peak);
    bench_number(json, "share_of_peak", peak > 0.0 ? gflops / peak : 0.0);
    bench_number(json, "times_copy", copies);
    bench_number(json, "times_faster", row->times);
    spm_json_int(json, "peak_bytes", peak_bytes());
    spm_json_object_end(json);
    if (!prints(line)) return;
    printf("  %-34s %4lld  %9.3f ms", row->name, (long long)row->batch, 1e3 * row->seconds);
    if (images > 0.0) printf("  %8.2f images/s", images);
    if (peak > 0.0) printf("  %7.1f GFLOP/s  %3.0f %% of peak", gflops, 100.0 * gflops / peak);
    if (copies > 0.0) printf("  %5.2f x a copy", copies);
    if (row->times > 0.0) printf("  %5.2f x faster", row->times);
    if (images > 0.0) printf("  %6.0f MB", (double)peak_bytes() * 1e-6);
    if (row->cpu > 0.0 && row->cpu < 0.7 * row->seconds * spm_context_threads(line->ctx))
        printf("  (had %.0f %% of its processors)", 100.0 * row->cpu / row->seconds / spm_context_threads(line->ctx));
    printf("\n");
    fflush(stdout);
}

static void fill_noise(float *values, int64_t n)
{
    int64_t i;
    for (i = 0; i < n; i++) values[i] = spm_random_uniform(7, 7, (uint64_t)i) - 0.5f;
}

/* A model and what a step of it needs, on synthetic pictures. */
typedef struct bench_state {
    spm_arch arch;
    spm_model *model, *loss_model;
    spm_run *run, *pruned, *loss;
    spm_optimizer *optimizer;
    spm_value image, logits, features, a, b;
    int64_t batch;
    float *pixels, *gradient;
} bench_state;

static void bench_close(bench_state *s)
{
    free(s->pixels);
    free(s->gradient);
    spm_optimizer_destroy(s->optimizer);
    spm_run_destroy(s->run);
    spm_run_destroy(s->pruned);
    spm_run_destroy(s->loss);
    spm_model_destroy(s->model);
    spm_model_destroy(s->loss_model);
}

/* The architecture's text with the command line's size; two classes. */
static int bench_arch(cli *line, const char *name, spm_arch *arch, spm_error *err)
{
    int64_t h = 0, w = 0;
    memset(arch, 0, sizeof *arch);
    if (line->value[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &h, &w);
    arch->height = h;
    arch->width_px = w;
    arch->classes = 2;
    return !spm_arch_parse(line->ctx, name, arch, err);
}

static int bench_open(cli *line, const char *name, int backward, bench_state *s, spm_error *err)
{
    spm_run_desc running = SPM_ZERO;
    spm_optimizer_desc sgd = spm_optimizer_desc_init();
    memset(s, 0, sizeof *s);
    if (!bench_arch(line, name, &s->arch, err)) return 0;
    s->batch = line->given[O_BATCH] ? integer(line, O_BATCH) : s->arch.family == SPM_VIT ? 8 : 16;
    s->model = spm_model_build(line->ctx, &s->arch, 1, err);
    if (!s->model) return 0;
    sgd.kind = SPM_SGD;
    sgd.momentum = 0.9f;
    sgd.lr = 1e-3f;
    running.max_batch = s->batch;
    running.backward = backward;
    running.segments = is_on(line, O_SEGMENTS);
    running.keep_norms = is_on(line, O_KEEP_NORMS);
    s->run = spm_run_create(s->model, &running, err);
    if (s->run && backward) s->optimizer = spm_optimizer_create(s->model, &sgd, err);
    s->pixels = (float *)malloc((size_t)(s->batch * s->arch.height * s->arch.width_px * 3) * sizeof(float));
    s->gradient = (float *)malloc((size_t)(s->batch * 2) * sizeof(float));
    if (!s->run || (backward && !s->optimizer)) return 0;
    if (!s->pixels || !s->gradient) {
        snprintf(err->text, sizeof err->text, "bench: not enough memory for the pictures");
        return 0;
    }
    fill_noise(s->pixels, s->batch * s->arch.height * s->arch.width_px * 3);
    fill_noise(s->gradient, s->batch * 2);
    s->image = spm_program_find(spm_model_program(s->model), "image");
    s->logits = spm_program_find(spm_model_program(s->model), "logits");
    s->features = spm_program_find(spm_model_program(s->model), "features");
    return 1;
}

/* The intervention's second branch, 1 % of the units masked, and its contrast of features. */
static int bench_branch(cli *line, bench_state *s, spm_error *err)
{
    spm_run_desc running = SPM_ZERO;
    spm_program *program = spm_program_create(line->ctx);
    const spm_tensor shape = spm_program_shape(spm_model_program(s->model), s->features, 1);
    int64_t size[2], j;
    spm_value loss;
    int i;
    size[0] = 0;
    size[1] = shape.shape[1];
    s->a = spm_program_input(program, "a", 2, size, 1);
    s->b = spm_program_input(program, "b", 2, size, 1);
    loss = spm_ntxent(program, s->a, s->b, 0.5f);
    spm_program_output(program, "loss", loss);
    s->loss_model = spm_model_create(program, 0, err);
    running.max_batch = s->batch;
    running.backward = 1;
    running.segments = is_on(line, O_SEGMENTS);
    running.keep_norms = is_on(line, O_KEEP_NORMS);
    s->pruned = spm_run_create(s->model, &running, err);
    running.segments = 0;
    if (s->loss_model) s->loss = spm_run_create(s->loss_model, &running, err);
    if (!s->pruned || !s->loss) return 0;
    for (i = 0; i < spm_model_parameter_count(s->model); i++) {
        const spm_parameter *p = spm_model_parameter(s->model, i);
        const int64_t n = spm_tensor_count(&p->value), rows = p->value.shape[0];
        float *keep;
        if (!(p->flags & SPM_PARAMETER_PRUNABLE)) continue;
        keep = (float *)malloc((size_t)n * sizeof *keep);
        for (j = 0; keep && j < n; j++) keep[j] = j / (n / rows) % 100 == 99 ? 0.0f : 1.0f;
        if (!keep || spm_run_set_mask(s->pruned, i, keep)) {
            free(keep);
            *err = *spm_run_error(s->pruned);
            return 0;
        }
        free(keep);
    }
    if (!spm_run_share(s->pruned, s->run)) return 1;
    *err = *spm_run_error(s->pruned);
    return 0;
}

/* One step; 0 with an error. */
static int bench_step(bench_state *s, spm_error *err)
{
    spm_run *run = s->run;
    const int train = s->optimizer != NULL;
    int ok = !spm_run_input(run, s->image, s->pixels) && !spm_run_forward(run, s->batch, train);
    if (ok && train) {
        spm_model_zero_gradients(s->model);
        if (s->pruned) {
            run = s->pruned;
            ok = !spm_run_input(run, s->image, s->pixels) && !spm_run_forward(run, s->batch, 1)
                 && !spm_run_input(s->loss, s->a, spm_run_data(s->run, s->features))
                 && !spm_run_input(s->loss, s->b, spm_run_data(run, s->features)) && !spm_run_forward(s->loss, s->batch, 1)
                 && !spm_run_backward(s->loss)
                 && !spm_run_set_gradient(run, s->features, spm_run_gradient(s->loss, s->b)) && !spm_run_backward(run);
            run = s->run;
            ok = ok && !spm_run_set_gradient(run, s->features, spm_run_gradient(s->loss, s->a));
        }
        ok = ok && !spm_run_set_gradient(run, s->logits, s->gradient) && !spm_run_backward(run)
             && !spm_run_commit_statistics(run, 0.1f);
        spm_model_finish_gradients(s->model);
        spm_optimizer_step(s->optimizer);
    }
    if (!ok) *err = *spm_run_error(run);
    return ok;
}

/* train:, infer: and intervene: at least three measured steps after one warm-up, for about two seconds. */
static int bench_model(cli *line, spm_json *json, const char *what, const char *name, spm_error *err)
{
    bench_state s;
    bench_line row;
    double seconds[64], cpu[65], began;
    char label[160];
    const int backward = what[0] == 't' || strcmp(what, "intervene") == 0;
    int step = 0, ok = bench_open(line, name, backward, &s, err);
    if (ok && strcmp(what, "intervene") == 0) ok = bench_branch(line, &s, err);
    began = spm_seconds();
    for (; ok && !interrupted && step < 64 && (step < 4 || spm_seconds() - began < 2.0); step++) {
        const double start = bench_clock(&cpu[step]);
        ok = bench_step(&s, err);
        seconds[step] = bench_clock(&cpu[step + 1]) - start;
        cpu[step] = cpu[step + 1] - cpu[step];
    }
    if (ok && !interrupted) {
        memset(&row, 0, sizeof row);
        snprintf(label, sizeof label, "%s:%s", what, name);
        row.name = label;
        row.batch = s.batch;
        row.seconds = median(seconds + 1, step - 1);
        row.cpu = median(cpu + 1, step - 1);
        row.images = (double)s.batch;
        row.flops = spm_program_flops(spm_model_program(s.model), s.batch, 0);
        if (backward) row.flops += spm_program_flops(spm_model_program(s.model), s.batch, 1);
        if (s.pruned) row.flops *= 2.0;
        bench_row(line, json, &row);
    }
    bench_close(&s);
    return ok && !interrupted;
}

/* Sets one channel of a value to zero. */
static void bench_zero_channel(void *user, spm_tensor *value)
{
    const int64_t channels = value->shape[value->rank - 1], n = spm_tensor_count(value);
    int64_t i;
    for (i = *(const int64_t *)user; i < n; i += channels) value->data[i] = 0.0f;
}

/* scan: the removal of a seeded 1 % of the units, one at a time; each forward pass resumed at the changed block, and in
 * full.  Both must give the same logits. */
static int bench_scan(cli *line, spm_json *json, const char *name, spm_error *err)
{
    bench_state s;
    bench_line row;
    spm_run *source = NULL;
    spm_run_desc running = SPM_ZERO;
    double full = 0.0, resumed = 0.0;
    int64_t channel, units = 0;
    float *logits = NULL;
    char label[160], mark[32];
    int block, i, same = 1, ok = bench_open(line, name, 0, &s, err);
    if (ok) logits = (float *)malloc((size_t)(2 * s.batch) * sizeof *logits);
    running.max_batch = s.batch;
    for (block = 1; ok && logits && !interrupted; block++) {
        spm_value first;
        snprintf(mark, sizeof mark, "block%d", block);
        first = spm_program_find(spm_model_program(s.model), mark);
        if (!first) break;
        source = spm_run_create(s.model, &running, err);
        ok = source && !spm_run_keep(source, first) && !spm_run_input(source, s.image, s.pixels)
             && !spm_run_input(s.run, s.image, s.pixels) && !spm_run_forward(source, s.batch, 0);
        for (i = 0; ok && i < spm_model_parameter_count(s.model); i++) {
            const spm_parameter *p = spm_model_parameter(s.model, i);
            if (!(p->flags & SPM_PARAMETER_PRUNABLE) || p->block != block) continue;
            for (channel = 0; ok && channel < p->value.shape[0] && !interrupted; channel++) {
                double start;
                if (spm_random_below(1, (uint64_t)i, (uint64_t)channel, 100)) continue;
                ok = !spm_run_hook_write(s.run, p->norm_output, bench_zero_channel, &channel);
                start = spm_seconds();
                ok = ok && !spm_run_forward(s.run, s.batch, 0);
                full += spm_seconds() - start;
                if (!ok) break;
                memcpy(logits, spm_run_data(s.run, s.logits), (size_t)(2 * s.batch) * sizeof *logits);
                start = spm_seconds();
                ok = !spm_run_input(s.run, first, spm_run_data(source, first))
                     && !spm_run_forward_from(s.run, first, s.batch, 0);
                resumed += spm_seconds() - start;
                same = same && ok && !memcmp(logits, spm_run_data(s.run, s.logits), (size_t)(2 * s.batch) * sizeof *logits);
                spm_run_clear_hooks(s.run);
                units++;
            }
        }
        if (!ok && source) *err = spm_run_error(source)->status ? *spm_run_error(source) : *spm_run_error(s.run);
        spm_run_destroy(source);
    }
    free(logits);
    if (ok && !same) {
        snprintf(err->text, sizeof err->text, "scan:%s: the resumed pass gives other logits than the full one", name);
        ok = 0;
    }
    if (ok && units > 0 && !interrupted) {
        memset(&row, 0, sizeof row);
        snprintf(label, sizeof label, "scan:%s", name);
        row.name = label;
        row.batch = s.batch;
        row.seconds = resumed;
        row.images = (double)(units * s.batch);
        row.times = full / resumed;
        bench_row(line, json, &row);
    }
    bench_close(&s);
    return ok && !interrupted;
}

/* start: from nothing to the logits of one picture: a context, the model from its file (warm), one forward pass. */
static int bench_start(cli *line, spm_json *json, const char *name, spm_error *err)
{
    const char *folder = getenv("TMPDIR");
    bench_state s;
    bench_line row;
    double seconds[5];
    char path[600], label[160];
    int round, ok;
    line->value[O_BATCH] = "1";
    line->given[O_BATCH] = 1;
    ok = bench_open(line, name, 0, &s, err);
    snprintf(path, sizeof path, "%s/spurmem-bench-%ld.safetensors", folder ? folder : ".", (long)(spm_seconds() * 1e6));
    ok = ok && !spm_checkpoint_save(s.model, path, NULL, err);
    for (round = 0; ok && round < 5 && !interrupted; round++) {
        const double start = spm_seconds();
        spm_context_desc desc = SPM_ZERO;
        spm_context *ctx;
        spm_model *model;
        spm_run *run = NULL;
        spm_run_desc running = SPM_ZERO;
        desc.threads = spm_context_threads(line->ctx);
        desc.isa = spm_context_isa(line->ctx);
        desc.precision = spm_context_precision(line->ctx);
        ctx = spm_context_create(&desc);
        model = ctx ? spm_model_build(ctx, &s.arch, SPM_NO_SEED, err) : NULL;
        ok = model && !spm_checkpoint_load(model, path, 0, err);
        if (ok) run = spm_run_create(model, &running, err);
        ok = run && !spm_run_input(run, spm_program_find(spm_model_program(model), "image"), s.pixels)
             && !spm_run_forward(run, 1, 0);
        seconds[round] = spm_seconds() - start;
        spm_run_destroy(run);
        spm_model_destroy(model);
        spm_context_destroy(ctx);
    }
    remove(path);
    if (ok && !interrupted) {
        memset(&row, 0, sizeof row);
        snprintf(label, sizeof label, "start:%s", name);
        row.name = label;
        row.batch = 1;
        row.seconds = median(seconds, 5);
        bench_row(line, json, &row);
    }
    bench_close(&s);
    return ok && !interrupted;
}

/* One operation, forward or a part of its backward pass. what: 0 forward, else a set of inputs whose gradient is
 * computed (bit i: input i).  traffic: floats read and written, as a multiple of the first input; 0: GFLOP/s count. */
static void bench_op(cli *line, spm_json *json, const char *name, spm_op op, spm_op_call *call, int what, double traffic)
{
    float *memory[SPM_OP_MAX_IN + SPM_OP_MAX_OUT + 1 + SPM_OP_MAX_IN];
    void *scratch, *packed;
    double seconds[9], cpu[10], began;
    bench_line row;
    spm_error err = SPM_ZERO;
    spm_tensor *tensor[sizeof memory / sizeof memory[0]];
    size_t bytes;
    int i, n = 0, ok = 1;
    if (spm_op_infer(line->ctx, op, call, &err)) return;
    call->d_out = call->out[0];
    for (i = 0; i < call->n_in; i++) {
        tensor[n++] = &call->in[i];
        call->d_in[i] = call->in[i];
        if (what >> i & 1) tensor[n++] = &call->d_in[i];
    }
    for (i = 0; i < call->n_out; i++) tensor[n++] = &call->out[i];
    if (what) tensor[n++] = &call->d_out;
    for (i = 0; i < n; i++) {
        const int64_t count = spm_tensor_count(tensor[i]);
        memory[i] = (float *)malloc((size_t)(count + 32) * sizeof(float));
        ok = ok && memory[i];
        if (!memory[i]) continue;
        tensor[i]->data = (float *)(((uintptr_t)memory[i] + 63) & ~(uintptr_t)63);
        fill_noise(tensor[i]->data, count);
    }
    call->training = 1;
    bytes = spm_op_scratch(line->ctx, op, call, 0);
    if (what && spm_op_scratch(line->ctx, op, call, 1) > bytes) bytes = spm_op_scratch(line->ctx, op, call, 1);
    scratch = malloc(bytes + 128);
    packed = malloc(spm_op_packed(line->ctx, op, call) + 128);
    if (ok && scratch && packed) {
        call->scratch = (void *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
        call->packed = (void *)(((uintptr_t)packed + 63) & ~(uintptr_t)63);
        call->packed_ready = 0;
        if (what) spm_op_forward(line->ctx, op, call); /* what the backward pass reads */
        began = spm_seconds();
        for (i = 0; i < 9 && (i < 5 || spm_seconds() - began < 0.5); i++) {
            const double start = bench_clock(&cpu[i]);
            if (!what) spm_op_forward(line->ctx, op, call);
            else spm_op_backward(line->ctx, op, call);
            seconds[i] = bench_clock(&cpu[i + 1]) - start;
            cpu[i] = cpu[i + 1] - cpu[i];
        }
        memset(&row, 0, sizeof row);
        row.name = name;
        row.batch = call->in[0].shape[0];
        row.seconds = median(seconds + 2, i - 2);
        row.cpu = median(cpu + 2, i - 2);
        row.bytes = traffic * 4.0 * (double)spm_tensor_count(&call->in[0]);
        /* of a product, each of the two backward passes is as much work as the forward one */
        if (!(traffic > 0.0)) row.flops = spm_op_flops(op, call, what > 0 && op == SPM_OP_ATTENTION);
        bench_row(line, json, &row);
    }
    free(scratch);
    free(packed);
    for (i = 0; i < n; i++) free(memory[i]);
}

static void bench_gemm(cli *line, spm_json *json)
{
    static const int64_t size[][3] = { { 2048, 2048, 2048 }, { 1576, 768, 3072 }, { 1576, 3072, 768 }, { 1576, 384, 1152 } };
    static const char pass[3][4] = { "", " dx", " dw" };
    int i, what;
    for (i = 0; i < (int)(sizeof size / sizeof size[0]); i++) {
        for (what = 0; what < 3 && !interrupted; what++) {
            spm_op_call call = SPM_ZERO;
            char name[96];
            call.in[0] = spm_tensor_make(NULL, 2, size[i][0], size[i][1], 0, 0);
            call.in[1] = spm_tensor_make(NULL, 2, size[i][2], size[i][1], 0, 0);
            call.n_in = 2;
            snprintf(name, sizeof name, "gemm %lldx%lldx%lld%s", (long long)size[i][0], (long long)size[i][1],
                     (long long)size[i][2], pass[what]);
            bench_op(line, json, name, SPM_OP_LINEAR, &call, what, 0.0);
        }
    }
}

static void bench_attention(cli *line, spm_json *json)
{
    int64_t heads;
    for (heads = 6; heads <= 12; heads += 6) {
        int what;
        for (what = 0; what < 2 && !interrupted; what++) {
            spm_op_call call = SPM_ZERO;
            char name[96];
            call.in[0] = spm_tensor_make(NULL, 3, 8, 197, 3 * 64 * heads, 0);
            call.n_in = 1;
            call.attr.heads = heads;
            snprintf(name, sizeof name, "attention 197 tokens %lld heads%s", (long long)heads, what ? " dx" : "");
            bench_op(line, json, name, SPM_OP_ATTENTION, &call, what, 0.0);
        }
    }
}

static void bench_conv(cli *line, spm_json *json)
{
    static const int64_t shape[][5] = { { 56, 64, 64, 3, 1 },  { 28, 128, 128, 3, 1 }, { 14, 256, 256, 3, 1 },
                                        { 7, 512, 512, 3, 1 }, { 56, 64, 256, 1, 1 },  { 14, 1024, 256, 1, 1 },
                                        { 56, 64, 128, 3, 2 }, { 224, 3, 64, 7, 2 } };
    static const char pass[3][4] = { "", " dx", " dw" };
    int i, what;
    for (i = 0; i < (int)(sizeof shape / sizeof shape[0]); i++) {
        for (what = 0; what < 3 && !interrupted; what++) {
            spm_op_call call = SPM_ZERO;
            char name[96];
            const int64_t *s = shape[i];
            call.in[0] = spm_tensor_make(NULL, 4, 8, s[0], s[0], s[1]);
            call.in[1] = spm_tensor_make(NULL, 4, s[2], s[3], s[3], s[1]);
            call.n_in = 2;
            call.attr.stride[0] = call.attr.stride[1] = s[4];
            call.attr.padding[0] = call.attr.padding[1] = s[3] / 2;
            snprintf(name, sizeof name, "conv %lldx%lld/%lld %lld->%lld at %lld%s", (long long)s[3], (long long)s[3],
                     (long long)s[4], (long long)s[1], (long long)s[2], (long long)s[0], pass[what]);
            if (what != 1 || s[1] > 3) bench_op(line, json, name, SPM_OP_CONV2D, &call, what, 0.0);
        }
    }
}

/* Operations that move memory, against a copy of as many bytes as they must read and write. */
static void bench_memory(cli *line, spm_json *json)
{
    static const struct {
        char name[24];
        spm_op op;
        int what, inputs, rank;
        double traffic;
    } op[] = {
        { "layer_norm", SPM_OP_LAYER_NORM, 0, 3, 3, 2.0 }, { "layer_norm backward", SPM_OP_LAYER_NORM, 7, 3, 3, 3.0 },
        { "gelu", SPM_OP_GELU, 0, 1, 3, 2.0 },             { "gelu backward", SPM_OP_GELU, 1, 1, 3, 3.0 },
        { "softmax", SPM_OP_SOFTMAX, 0, 1, 3, 2.0 },       { "softmax backward", SPM_OP_SOFTMAX, 1, 1, 3, 3.0 },
        { "add", SPM_OP_ADD, 0, 2, 3, 3.0 },               { "relu", SPM_OP_RELU, 0, 1, 3, 2.0 },
        { "relu backward", SPM_OP_RELU, 1, 1, 3, 3.0 },    { "batch_norm", SPM_OP_BATCH_NORM, 0, 5, 4, 3.0 },
        { "batch_norm backward", SPM_OP_BATCH_NORM, 7, 5, 4, 5.0 },
    };
    int i, j;
    for (i = 0; i < (int)(sizeof op / sizeof op[0]) && !interrupted; i++) {
        spm_op_call call = SPM_ZERO; /* 116 MB a tensor: of less a copy would find a part in the last cache */
        if (op[i].rank == 3) call.in[0] = spm_tensor_make(NULL, 3, 96, 197, 1536, 0);
        else call.in[0] = spm_tensor_make(NULL, 4, 48, 56, 56, 192);
        for (j = 1; j < op[i].inputs; j++) {
            call.in[j] = op[i].op == SPM_OP_ADD ? call.in[0]
                                                : spm_tensor_make(NULL, 1, call.in[0].shape[op[i].rank - 1], 0, 0, 0);
        }
        call.n_in = op[i].inputs;
        call.attr.eps = 1e-5f;
        bench_op(line, json, op[i].name, op[i].op, &call, op[i].what, op[i].traffic);
    }
}

/* Pictures of the command line on one thread: reading and decoding them, then also resizing, cropping and normalising to
 * the network's floats (224 pixels, or --image-size). */
static int bench_decode(cli *line, spm_json *json, spm_error *err)
{
    double seconds[7], pixels = 0.0;
    char name[80];
    bench_line row;
    int64_t h = 224, w = 224;
    int i, round, ready;
    float *floats;
    spm_transform transform;
    if (line->given[O_IMAGE_SIZE]) (void)parse_size(line->value[O_IMAGE_SIZE], &h, &w);
    transform = spm_transform_make(h, w);
    floats = (float *)malloc((size_t)(h * w) * 3 * sizeof *floats);
    for (ready = 0; ready < 2 && floats; ready++) {
        for (round = 0; round < 7; round++) {
            double start = spm_seconds();
            for (i = 0; i < line->operands && !interrupted; i++) {
                spm_image image = SPM_ZERO;
                if (load_picture(line, line->operand[i], ready ? &transform : NULL, &image, err)) {
                    free(floats);
                    return 0;
                }
                if (ready) spm_transform_normalize(&transform, &image, floats);
                else if (round == 0) pixels += (double)image.width * image.height;
                spm_image_free(line->ctx, &image);
            }
            seconds[round] = spm_seconds() - start;
        }
        memset(&row, 0, sizeof row);
        snprintf(name, sizeof name, "decode, %.2f Mpixel a picture", pixels * 1e-6 / line->operands);
        if (ready) snprintf(name, sizeof name, "decode, resize, crop %ldx%ld", (long)h, (long)w);
        row.name = name;
        row.batch = line->operands;
        row.images = (double)line->operands;
        row.seconds = median(seconds + 1, 6); /* the first round fills the caches */
        bench_row(line, json, &row);
    }
    i = floats != NULL;
    if (!i) snprintf(err->text, sizeof err->text, "out of memory for one picture");
    free(floats);
    return i;
}

#define BENCH_ONLY "train:ARCH, infer:ARCH, intervene:ARCH, scan:ARCH, start:ARCH, gemm, conv, attention, memory or decode"

/* One part of the table, by its name. */
static int bench_part(cli *line, spm_json *json, const char *name, spm_error *err)
{
    char what[16];
    const char *arch = strchr(name, ':');
    if (!arch) {
        if (strcmp(name, "gemm") == 0) bench_gemm(line, json);
        else if (strcmp(name, "conv") == 0) bench_conv(line, json);
        else if (strcmp(name, "attention") == 0) bench_attention(line, json);
        else if (strcmp(name, "memory") == 0) bench_memory(line, json);
        else return bench_decode(line, json, err);
        return !interrupted;
    }
    snprintf(what, sizeof what, "%.*s", (int)(arch - name), name);
    if (strcmp(what, "scan") == 0) return bench_scan(line, json, arch + 1, err);
    if (strcmp(what, "start") == 0) return bench_start(line, json, arch + 1, err);
    return bench_model(line, json, what, arch + 1, err);
}

static int bench_known(const char *name)
{
    static const char known[][16] = { "train:", "infer:", "intervene:", "scan:", "start:" };
    static const char plain[][16] = { "gemm", "conv", "attention", "memory", "decode" };
    int i;
    for (i = 0; i < 5; i++) {
        if (strncmp(name, known[i], strlen(known[i])) == 0 || strcmp(name, plain[i]) == 0) return 1;
    }
    return 0;
}

static int run_bench(cli *line)
{
    static const char whole[][24] = { "gemm", "conv", "attention", "memory", "train:resnet18", "train:resnet50",
                                      "train:deit_small", "train:vit_base", "infer:resnet18", "infer:resnet50",
                                      "intervene:resnet50", "start:resnet50" };
    const char *only = line->value[O_ONLY];
    spm_error err = SPM_ZERO;
    spm_json *json;
    int i, ok = 1;
    if (only && !bench_known(only)) return wrong("--only must be " BENCH_ONLY);
    if (only && strchr(only, ':')) {
        spm_arch arch;
        if (!bench_arch(line, strchr(only, ':') + 1, &arch, &err)) return wrong(err.text);
    }
    if (only && strcmp(only, "decode") == 0 && line->operands == 0)
        return wrong("bench --only decode needs the pictures to decode");
    json = spm_json_create(line->ctx);
    spm_json_object_begin(json, NULL);
    spm_json_string(json, "command", "bench");
    spm_json_number(json, "peak_gflops", spm_measure_peak(line->ctx));
    spm_json_string(json, "isa", spm_isa_name(spm_context_isa(line->ctx)));
    spm_json_int(json, "threads", spm_context_threads(line->ctx));
    spm_json_string(json, "precision", line->value[O_PRECISION]);
    spm_json_array_begin(json, "results");
    if (prints(line))
        printf("%s, %s, %d threads, fp32 peak %.0f GFLOP/s (measured again beside each row)\n",
               spm_isa_name(spm_context_isa(line->ctx)), line->value[O_PRECISION], spm_context_threads(line->ctx),
               spm_measure_peak(line->ctx));
    if (only) ok = bench_part(line, json, only, &err);
    for (i = 0; ok && !only && i < (int)(sizeof whole / sizeof whole[0]); i++) {
        ok = bench_part(line, json, whole[i], &err);
    }
    if (ok && !only && line->operands) ok = bench_decode(line, json, &err);
    spm_json_array_end(json);
    /* last: its memory would stand in the rows' peaks */
    spm_json_number(json, "copy_gbytes", 0.268435456 / bench_copy(line->ctx, 268435456.0));
    spm_json_object_end(json);
    if (ok && !interrupted) return finish_json(line, json);
    spm_json_destroy(json);
    if (!interrupted) return failed(&err);
    fprintf(stderr, "spurmem: bench: stopped\n");
    return 1;
}

/* ---- main ---- */

static int run_command(cli *line)
{
    switch (line->command->id) {
    case TRAIN:
    case INTERVENE: return run_train(line);
    case EVAL: return run_eval(line);
    case LOCALIZE: return run_localize(line);
    case LEDGER: return run_ledger(line);
    case PREDICT: return run_predict(line);
    case DECODE: return run_decode(line);
    case REPORT: return run_report(line);
    case INSPECT: return run_inspect(line);
    case CONVERT: return run_convert(line);
    case PACK: return run_pack(line);
    default: return run_bench(line);
    }
}

static const command *find_command(const char *name)
{
    char text[200];
    const command *best = NULL;
    int i, least = 4;
    for (i = 0; i < N_COMMANDS; i++) {
        int d = distance(name, commands[i].name);
        if (d == 0) return &commands[i];
        if (d < least) {
            least = d;
            best = &commands[i];
        }
    }
    if (best)
        snprintf(text, sizeof text, "there is no command %.60s; did you mean %s?", name, best->name);
    else
        snprintf(text, sizeof text, "there is no command %.60s; spurmem --help lists them", name);
    wrong(text);
    return NULL;
}

/* The command line for the protocol; words with blanks in single quotes. */
static void command_line(char *text, size_t size, int argc, char **argv)
{
    size_t at = (size_t)snprintf(text, size, "spurmem");
    int i;
    for (i = 1; i < argc && at < size - 1; i++) {
        const char *quote = *argv[i] == 0 || strpbrk(argv[i], " \t\n\"'$&;|<>()*?") ? "'" : "";
        int n = snprintf(text + at, size - at, " %s%s%s", quote, argv[i], quote);
        at = n < 0 || (size_t)n >= size - at ? size - 1 : at + (size_t)n;
    }
}

int main(int argc, char **argv)
{
    static cli line;
    spm_context_desc desc = SPM_ZERO;
    int rc;
    if (argc < 2) {
        fprintf(stderr, "spurmem: give a command; one of those below\n\n");
        help_all(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        help_all(stdout);
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("spurmem %d.%d\n", SPURMEM_VERSION_MAJOR, SPURMEM_VERSION_MINOR);
        return 0;
    }
    line.command = find_command(argv[1]);
    if (!line.command) return 2;
    line.operand = (const char **)malloc((size_t)argc * sizeof *line.operand);
    if (!line.operand) return 1;
    command_line(line.text, sizeof line.text, argc, argv);
    rc = parse(&line, argc, argv);
    if (rc == 0) rc = check_operands(&line);
    if (rc) {
        free((void *)line.operand);
        return rc < 0 ? 0 : rc;
    }
    desc.log = on_log;
    desc.threads = (int)integer(&line, O_THREADS);
    (void)spm_isa_parse(line.value[O_ISA], &desc.isa);
    desc.direct_convolution = strcmp(line.value[O_CONV], "direct") == 0;
    if (strcmp(line.value[O_PRECISION], "bf16") == 0) desc.precision = SPM_PRECISION_BF16;
    progress_quiet = is_on(&line, O_QUIET);
    line.ctx = spm_context_create(&desc);
    if (!line.ctx) {
        fprintf(stderr,
                "spurmem: no context: this machine or build lacks the instruction set %s (or memory); use --isa auto "
                "and check SPURMEM_ISA\n",
                line.value[O_ISA]);
        free((void *)line.operand);
        return 1;
    }
    catch_interrupts();
    rc = check_model_options(&line);
    if (rc == 0) rc = run_command(&line);
    if ((fflush(stdout) != 0 || ferror(stdout)) && rc == 0) {
        fprintf(stderr, "spurmem: stdout: writing failed\n");
        rc = 1;
    }
    spm_context_destroy(line.ctx);
    free((void *)line.operand);
    return rc;
}
