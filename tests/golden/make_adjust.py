#!/usr/bin/env python3
"""Writes adjust.inc: hashes of what torchvision makes of small Pillow pictures by rotate and adjust_* (test_resize.c).

Made with torchvision 0.14.1, Pillow 9.4.0; run it as  python3 make_adjust.py > adjust.inc
A line is {width, height, what, factor or degrees, filter (spm_filter), expand, center_x, center_y, fill, FNV-1a of the
RGB bytes}; what: spm_adjust, 9 for a rotation; no center where center_x is negative; fill is r, g, b = f, f / 2, f / 3."""
import numpy as np
from PIL import Image
import torchvision.transforms.functional_pil as F


def pattern(number, width, height):
    """The picture of make_resize.py."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    ramp = (number * 37 + x * 7 + y * 13 + c * 50 + x * y) & 255
    return Image.fromarray(np.where((x // 3 + y // 2 + c) % 4 == 0, 255 * (x & 1), ramp).astype(np.uint8))


def fnv(values):
    h = 0xcbf29ce484222325
    for v in values:
        h = ((h ^ v) * 0x100000001b3) & (2 ** 64 - 1)
    return h


ADJUST = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
FILTERS = [Image.BILINEAR, Image.NEAREST, None, Image.BICUBIC]

for what in range(4):
    for k, factor in enumerate((-.5, -.31, 0, .1, .5) if what == 3 else (0, .25, .9, 1, 1.3, 7)):
        out = ADJUST[what](pattern(k, 31, 17), factor)
        print("    { 31, 17, %d, %r, 0, 0, -1, 0, 0, UINT64_C(0x%016x) }," % (what, float(factor), fnv(out.tobytes())))
ROTATIONS = [(31, 17, 0, 0, -1, 0), (31, 17, 90, 0, -1, 0), (31, 17, 90, 1, -1, 0), (20, 20, 270, 0, -1, 0),
             (31, 17, 180, 0, -1, 0), (31, 17, -45, 0, -1, 0), (31, 17, 45, 1, -1, 0), (17, 31, 12.5, 0, 3, 4.5),
             (17, 31, 400, 1, -1, 0), (1, 1, 33, 1, -1, 0), (64, 48, -7.25, 0, -1, 0), (31, 17, 180, 0, 0, 0)]
for k, (w, h, degrees, expand, x, y) in enumerate(ROTATIONS):
    for number in (0, 1, 3):
        fill = k * 20
        out = F.rotate(pattern(k, w, h), degrees, FILTERS[number], bool(expand), None if x < 0 else (x, y),
                       [fill, fill // 2, fill // 3])
        print("    { %d, %d, 9, %r, %d, %d, %r, %r, %d, UINT64_C(0x%016x) }," %
              (w, h, float(degrees), number, expand, float(x), float(y), fill, fnv(out.tobytes())))
