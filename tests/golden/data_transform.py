#!/usr/bin/env python3
"""Writes data_transform.inc: hashes of what torchvision's transforms make of small pictures (tests/test_data.c, transforms).

Made with torchvision 0.14 on Pillow 9.4, torch 1.13; run it as  python3 data_transform.py > data_transform.inc
A line is {width, height, to_height, to_width, mode, FNV-1a of the pixels, FNV-1a of the normalised floats' words}.
"""
import numpy as np
from PIL import Image
from torchvision import transforms as T

CASES = [  # width, height, to_height, to_width, mode: 0 paper, 1 exact, 2 short side, 3 none
    (50, 37, 28, 28, 0), (31, 90, 17, 23, 0), (500, 375, 224, 224, 0), (64, 64, 64, 64, 0), (8, 5, 24, 24, 0),
    (32, 64, 64, 32, 0), (100, 41, 33, 33, 0),
    (50, 37, 28, 28, 1), (31, 90, 17, 23, 1), (28, 28, 28, 28, 1),
    (50, 37, 28, 28, 2), (31, 90, 21, 21, 2), (375, 500, 224, 224, 2), (90, 31, 21, 21, 2),
    (28, 40, 40, 28, 3),
]


def pattern(number, width, height):
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return Image.fromarray(((number * 37 + x * 7 + y * 13 + c * 50 + x * y) & 255).astype(np.uint8))


def fnv(values):
    h = 0xcbf29ce484222325
    for v in values:
        h = ((h ^ int(v)) * 0x100000001b3) & (2 ** 64 - 1)
    return h


for number, (w, h, th, tw, mode) in enumerate(CASES):
    image = pattern(number, w, h)
    steps = []
    if mode == 0:
        steps = [T.Resize((th * 256 // 224, tw * 256 // 224)), T.CenterCrop((th, tw))]
    elif mode == 1:
        steps = [T.Resize((th, tw))]
    elif mode == 2:
        assert th == tw
        steps = [T.Resize(th * 256 // 224), T.CenterCrop((th, tw))]
    image = T.Compose(steps)(image)
    floats = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(image)
    words = np.ascontiguousarray(floats.permute(1, 2, 0).numpy()).view(np.uint32).ravel()
    print("{ %d, %d, %d, %d, %d, UINT64_C(0x%016x), UINT64_C(0x%016x) }," % (w, h, th, tw, mode, fnv(np.asarray(image).ravel()), fnv(words)))
