#!/usr/bin/python3
"""Writes the seeds of the archive harnesses below corpus/: safetensors, torch_zip, torch_legacy, pickle, checkpoint.
Small files with every kind of tensor and wrapper.  Made with torch 1.13.0a0 (Debian), numpy 1.24.2; seed 0."""
import io, json, os, struct, zipfile
from collections import OrderedDict
import numpy as np
import torch

torch.manual_seed(0)
here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "corpus")


def write(folder, name, data):
    os.makedirs(os.path.join(here, folder), exist_ok=True)
    with open(os.path.join(here, folder, name), "wb") as f:
        f.write(data)


def torch_bytes(value, zip_format):
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zip_format)
    return out.getvalue()


def without_crc(data):
    """All CRC fields of a zip (local headers, descriptors, directory) set to zero: then a reader has none to check."""
    data = bytearray(data)
    for item in zipfile.ZipFile(io.BytesIO(bytes(data))).infolist():
        struct.pack_into("<I", data, item.header_offset + 14, 0)
    at = data.find(b"PK\1\2")
    while at >= 0:
        struct.pack_into("<I", data, at + 16, 0)
        at = data.find(b"PK\1\2", at + 4)
    return bytes(data)


def pickle_of(data):
    z = zipfile.ZipFile(io.BytesIO(data))
    return z.read([n for n in z.namelist() if n.endswith("data.pkl")][0])


base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
kinds = OrderedDict((str(t).split(".")[1], torch.ones(3, dtype=t)) for t in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool))
values = {
    "plain": OrderedDict(a=torch.ones(2, 2), b=torch.zeros(3)),
    "kinds": kinds,
    "views": OrderedDict(t=base.transpose(0, 2), s=base[1, ::2], e=torch.ones(1).expand(5, 2), n=base[:0], o=torch.tensor(3.5)),
    "nested": {"state_dict": OrderedDict([("module.a", torch.ones(2)), ("module.bn.num_batches_tracked", torch.tensor(7))]),
               "epoch": 12, "best": 0.5, "flag": True, "none": None, "list": [1, (2, "x"), torch.ones(1)], 7: "seven",
               "big": 1 << 70, "minus": -5, "long": 1 << 40},
    "optimizer": {"model": OrderedDict(w=torch.ones(1)), "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(1)}},
                  "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]}},
    "parameter": OrderedDict(w=torch.nn.Parameter(torch.ones(2))),
    "tensor": torch.ones(2),
    "module": {"m": torch.nn.Linear(1, 1)},
}
for name, value in values.items():
    new = torch_bytes(value, True)
    write("torch_zip", name + ".pth", without_crc(new))
    write("torch_legacy", name + ".pth", torch_bytes(value, False))
    write("pickle", name + ".pkl", pickle_of(new))
write("torch_zip", "crc.pth", torch_bytes(values["plain"], True))
vgg = OrderedDict((n, torch.full(s, 0.5)) for n, s in (
    ("cls_token", (1, 1, 4)), ("pos_embed", (1, 5, 4)), ("patch_embed.proj.weight", (4, 3, 4, 4)), ("patch_embed.proj.bias", (4,)),
    ("blocks.0.norm1.weight", (4,)), ("blocks.0.norm1.bias", (4,)), ("blocks.0.attn.qkv.weight", (12, 4)), ("blocks.0.attn.qkv.bias", (12,)),
    ("blocks.0.attn.proj.weight", (4, 4)), ("blocks.0.attn.proj.bias", (4,)), ("blocks.0.norm2.weight", (4,)), ("blocks.0.norm2.bias", (4,)),
    ("blocks.0.mlp.fc1.weight", (4, 4)), ("blocks.0.mlp.fc1.bias", (4,)), ("blocks.0.mlp.fc2.weight", (4, 4)), ("blocks.0.mlp.fc2.bias", (4,)),
    ("norm.weight", (4,)), ("norm.bias", (4,)), ("head.weight", (2, 4)), ("head.bias", (2,))))
write("checkpoint", "vit.pth", without_crc(torch_bytes({"model": vgg}, True)))
vgg["pos_embed"] = torch.full((1, 10, 4), 0.5)
write("checkpoint", "vit_large.pth", torch_bytes(vgg, False))


def safetensors(entries, metadata=None, data=b"", pad=True):
    header, body = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body + data


sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
write("safetensors", "kinds.safetensors", safetensors({k: (k, [2], b"\x3f" * 2 * n) for k, n in sizes.items()}))
write("safetensors", "shapes.safetensors", safetensors({"s": ("F32", [], b"abcd"), "e": ("F32", [0, 3], b""),
      "w": ("F32", [1, 2, 1, 3], bytes(24))}, {"format": "pt", "arch": "resnet18"}))
write("safetensors", "odd.safetensors", safetensors({"a\u00e9\"\n": ("BF16", [3], bytes(6))}, pad=False))
arch = {"writer": "spurmem 0.1", "arch": "vit:patch=4,dim=4,depth=1,heads=2,mlp=1", "image_size": "8x8", "classes": "2", "resize": "paper",
        "mean": "0,0,0", "std": "1,1,1", "head": "logits", "label_order": "forward", "epoch": "3"}
vgg["pos_embed"] = torch.full((1, 5, 4), 0.5)
write("checkpoint", "vit.safetensors", safetensors({k: ("F32", list(v.shape), v.numpy().tobytes()) for k, v in vgg.items()}, arch))
