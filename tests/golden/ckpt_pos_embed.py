#!/usr/bin/env python3
"""Writes ckpt_pos_embed.inc: position embeddings resized as timm and DeiT do (tests/test_ckpt.c, position_embeddings).

Made with torch 1.13; run it as  python3 ckpt_pos_embed.py > ckpt_pos_embed.inc
One line per case: side, rows, columns, then rows * columns * 2 values of a grid with two channels.
"""
import torch

for side, rows, columns in [(4, 6, 6), (4, 2, 2), (3, 4, 7)]:
    i = torch.arange(side * side * 2, dtype=torch.float32)
    grid = torch.sin(i * 1.7).reshape(1, side, side, 2).permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    values = out.permute(0, 2, 3, 1).reshape(-1).tolist()
    print("{ %d, %d, %d, { %s } }," % (side, rows, columns, ", ".join("%.6ff" % v for v in values)))
