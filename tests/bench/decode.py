#!/usr/bin/env python3
"""Speed of the picture section against Pillow: one thread each, picture by picture in turn in one process; of every
picture the best of all rounds counts, so that other load on the machine disturbs little.

usage: decode.py [--isa avx2] [--rounds 15] PICTURE...        (needs Pillow and numpy; builds the header with `cc -O2`,
       unless SPURMEM_LIBRARY names a shared library made so)

Prints for each group of pictures (by ending of the name behind the last underscore, else "all"): images/s of both for
decoding, for decoding at 1/2, 1/4 and 1/8 (Pillow's draft), and for decode + resize to 256 x 256 + centre crop to
224 x 224 + normalise to float; where stb_image.h is installed (Debian's libstb-dev), decoding beside it, compiled scalar
(STBI_NO_SIMD) with the same `cc -O2`."""
import argparse, collections, ctypes as C, io, os, subprocess, tempfile, time
import numpy as np
import PIL
from PIL import Image, features

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Error(C.Structure):
    _fields_ = [("text", C.c_char * 496), ("status", C.c_int)]


class Picture(C.Structure):
    _fields_ = [("pixels", C.c_void_p), ("width", C.c_int), ("height", C.c_int)]


class Transform(C.Structure):
    _fields_ = [("height", C.c_int64), ("width", C.c_int64), ("mean", C.c_float * 3), ("std", C.c_float * 3),
                ("resize", C.c_int)]


class Decoding(C.Structure):
    _fields_ = [("max_bytes", C.c_size_t), ("apply_exif", C.c_int), ("allow_truncated", C.c_int), ("scale", C.c_int)]


def build_stb():
    """stb_image as a judge, or None where it is not installed."""
    folder = tempfile.mkdtemp()
    source, library = os.path.join(folder, "stb.c"), os.path.join(folder, "stb.so")
    with open(source, "w") as file:
        file.write("#define STB_IMAGE_IMPLEMENTATION\n#define STBI_NO_SIMD\n#include <stb/stb_image.h>\n")
    made = subprocess.run([os.environ.get("CC", "cc"), "-O2", "-fPIC", "-shared", "-w", "-o", library, source, "-lm"],
                          stderr=subprocess.DEVNULL)
    if made.returncode:
        return None
    lib = C.CDLL(library)
    lib.stbi_load_from_memory.restype = C.c_void_p
    return lib


def build():
    if "SPURMEM_LIBRARY" in os.environ:
        return C.CDLL(os.environ["SPURMEM_LIBRARY"])
    folder = tempfile.mkdtemp()
    library = os.path.join(folder, "spurmem.so")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-fPIC", "-shared", "-I", ROOT, "-o", library,
                    os.path.join(ROOT, "tests", "spurmem.c"), "-lm"], check=True)
    return C.CDLL(library)


def seconds(work, item):
    begin = time.perf_counter()
    work(item)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="c, avx2, avx512 or neon; the best one by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("pictures", nargs="+")
    line = parser.parse_args()
    if line.isa:
        os.environ["SPURMEM_ISA"] = line.isa
    lib = build()
    lib.spm_context_create.restype = C.c_void_p
    lib.spm_isa_name.restype = C.c_char_p
    lib.spm_transform_make.restype = Transform
    ctx = C.c_void_p(lib.spm_context_create(None))
    transform = lib.spm_transform_make(C.c_int64(224), C.c_int64(224))
    floats = np.empty((224, 224, 3), np.float32)
    mean, std = np.array([.485, .456, .406], np.float32), np.array([.229, .224, .225], np.float32)
    error = Error()

    def ours(data, image, scale=1):
        how = Decoding(scale=scale)
        if lib.spm_image_decode(ctx, b"picture", data, C.c_size_t(len(data)), C.byref(how), C.byref(image), C.byref(error)):
            raise SystemExit(error.text.decode())

    def decode_ours(data, scale=1):
        image = Picture()
        ours(data, image, scale)
        lib.spm_image_free(ctx, C.byref(image))

    def decode_pillow(data, scale=1):
        image = Image.open(io.BytesIO(data))
        if scale > 1:
            image.draft("RGB", (image.size[0] // scale, image.size[1] // scale))
        image.load()

    def decode_stb(data):
        w, h, n = C.c_int(), C.c_int(), C.c_int()
        stb.stbi_image_free(C.c_void_p(stb.stbi_load_from_memory(data, len(data), C.byref(w), C.byref(h), C.byref(n), 3)))

    def ready_ours(data):
        image, ready = Picture(), Picture()
        ours(data, image)
        lib.spm_transform_image(ctx, C.byref(transform), C.byref(image), C.byref(ready), C.byref(error))
        lib.spm_transform_normalize(C.byref(transform), C.byref(ready), C.c_void_p(floats.ctypes.data))
        lib.spm_image_free(ctx, C.byref(image))
        lib.spm_image_free(ctx, C.byref(ready))

    def ready_pillow(data):
        image = Image.open(io.BytesIO(data)).resize((256, 256), Image.BILINEAR).crop((16, 16, 240, 240))
        return (np.asarray(image, np.float32) / np.float32(255) - mean) / std

    groups = collections.OrderedDict()
    for path in line.pictures:
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path, "rb") as file:
            groups.setdefault(name.rsplit("_", 1)[1] if "_" in name else "all", []).append(file.read())
    print("Pillow %s, libjpeg-turbo %s; spurmem on %s" % (PIL.__version__, features.version("libjpeg_turbo"),
          lib.spm_isa_name(lib.spm_context_isa(ctx)).decode()))
    rows = [("decode", decode_ours, decode_pillow, "Pillow"), ("pipeline", ready_ours, ready_pillow, "Pillow")]
    rows += [("1/%d" % k, lambda d, k=k: decode_ours(d, k), lambda d, k=k: decode_pillow(d, k), "Pillow") for k in (2, 4, 8)]
    stb = build_stb()
    if stb:
        rows.append(("decode", decode_ours, decode_stb, "stb_image"))
    for name, files in groups.items():
        for title, mine, theirs, judge in rows:
            best = [[1e9, 1e9] for _ in files]
            for _ in range(line.rounds):
                for i, data in enumerate(files):
                    best[i] = [min(best[i][0], seconds(mine, data)), min(best[i][1], seconds(theirs, data))]
            a, b = (sum(pair[k] for pair in best) / len(files) for k in (0, 1))
            print("%-10s %-9s %7.1f images/s, %s %7.1f, ratio %.2f" % (name, title, 1 / a, judge, 1 / b, b / a))


main()
