#!/usr/bin/env python3
"""Writes resize.inc: hashes of what Pillow's Image.resize makes of small pictures (tests/test_resize.c).

Made with Pillow 9.4.0, numpy 1.24, Python 3.11; run it as  python3 make_resize.py > resize.inc
A line is {width, height, to_width, to_height, filter (spm_filter), FNV-1a of the RGB bytes}.  resize_pixels.inc, made by
`python3 make_resize.py pixels > resize_pixels.inc`, holds one result in full, for reading."""
import sys

import numpy as np
from PIL import Image

FILTERS = [Image.BILINEAR, Image.NEAREST, Image.BOX, Image.BICUBIC, Image.LANCZOS]
SIZES = [  # width, height, to_width, to_height
    (1, 1, 7, 5), (2, 3, 1, 1), (3, 2, 64, 48), (5, 7, 5, 3), (7, 5, 3, 5), (16, 16, 16, 16), (17, 9, 13, 40),
    (64, 64, 32, 32), (64, 64, 63, 65), (50, 37, 28, 28), (31, 90, 17, 23), (200, 3, 9, 100), (3, 200, 100, 9),
    (100, 75, 256, 256), (128, 96, 56, 42), (255, 1, 2, 1), (1, 255, 1, 2), (90, 60, 6, 4), (300, 200, 11, 7),
]


def pattern(number, width, height):
    """Ramps, a product and hard edges, so that every filter overshoots somewhere."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    ramp = (number * 37 + x * 7 + y * 13 + c * 50 + x * y) & 255
    return Image.fromarray(np.where((x // 3 + y // 2 + c) % 4 == 0, 255 * (x & 1), ramp).astype(np.uint8))


def fnv(values):
    h = 0xcbf29ce484222325
    for v in values:
        h = ((h ^ v) * 0x100000001b3) & (2 ** 64 - 1)
    return h


if sys.argv[1:] == ["pixels"]:
    pixels = np.asarray(pattern(0, 9, 8).resize((5, 4), Image.BICUBIC)).reshape(4, 15)
    for row in pixels:
        print("    " + ", ".join(str(v) for v in row) + ",")
else:
    for number, (w, h, to_w, to_h) in enumerate(SIZES):
        for index, kind in enumerate(FILTERS):
            result = pattern(number, w, h).resize((to_w, to_h), kind)
            print("{ %d, %d, %d, %d, %d, UINT64_C(0x%016x) }," % (w, h, to_w, to_h, index, fnv(result.tobytes())))
