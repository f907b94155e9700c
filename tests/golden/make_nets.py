#!/usr/bin/python3
"""Writes nets.bin: what PyTorch computes for whole networks, for tests/test_nets.c.

Weights, pictures and loss directions come from `draw`, a hash that the C test repeats, so only results are stored:
per network  int32 logits, int32 parameters,
             float32 logits in evaluation mode, float32 logits in training mode (batch statistics),
             per parameter float32 norm and float32 projection (dot product with `draw`) of the gradient of
             sum(direction * logits) in evaluation mode, in the order of named_parameters().
All in double precision, rounded at the end.  Little endian.  Made with torch 1.13.0a0 and torchvision 0.14.1a0 (Debian), numpy 1.24.2."""
import struct, sys
import numpy as np
import torch, torchvision
from torch import nn
import torch.nn.functional as F

torch.set_num_threads(1)


def draw(name, count):
    """count numbers in [-1, 1): FNV-1a of the name, then a 32-bit mix of (seed + index * odd)."""
    seed = 2166136261
    for c in name.encode():
        seed = (seed ^ c) * 16777619 & 0xFFFFFFFF
    x = (np.arange(count, dtype=np.uint64) * 0x9E3779B1 + seed).astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float64) / 8388608.0 - 1.0


def fill(name, shape):
    u = draw(name, int(np.prod(shape)))
    if name.endswith("running_var"):
        u = 1.0 + 0.3 * u
    elif name.endswith("running_mean") or name.endswith("bias"):
        u = 0.1 * u
    elif "token" in name or "pos_embed" in name:
        u = 0.5 * u
    elif len([d for d in shape if d > 0]) == 1:
        u = 1.0 + 0.2 * u
    else:
        u = u * np.sqrt(4.0 / np.prod(shape[1:]))
    return torch.from_numpy(u.astype(np.float32).astype(np.float64).reshape(shape))


class CifarBlock(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.grow = o - i

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return F.relu(x + y)


class Cifar(nn.Module):
    def __init__(self, n, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for s, (i, o) in enumerate(((16, 16), (16, 32), (32, 64))):
            setattr(self, "layer%d" % (s + 1), nn.Sequential(*[CifarBlock(i if b == 0 else o, o, 2 if s and b == 0 else 1) for b in range(n)]))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        p = ((q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5).softmax(-1)
        return self.proj((p @ v).transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, d, ratio):
        super().__init__()
        self.fc1 = nn.Linear(d, d * ratio)
        self.fc2 = nn.Linear(d * ratio, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, d, heads, ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.attn = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = Mlp(d, ratio)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, d, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, d, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    def __init__(self, h, w, patch, d, depth, heads, ratio, classes, distilled):
        super().__init__()
        self.distilled = distilled
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + distilled + h // patch * (w // patch), d))
        self.patch_embed = Patches(d, patch)
        self.blocks = nn.Sequential(*[Block(d, heads, ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, classes)
        if distilled:
            self.head_dist = nn.Linear(d, classes)

    def forward(self, x):
        x = self.patch_embed(x)
        extra = [self.cls_token] + ([self.dist_token] if self.distilled else [])
        x = torch.cat([e.expand(x.shape[0], -1, -1) for e in extra] + [x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        y = self.head(x[:, 0])
        return (y + self.head_dist(x[:, 1])) / 2 if self.distilled else y


CASES = [  # in the order of test_nets.c: network, batch, height, width, classes
    (torchvision.models.resnet18(num_classes=10), 2, 64, 64, 10),
    (torchvision.models.resnet50(num_classes=10), 2, 64, 64, 10),
    (torchvision.models.resnext50_32x4d(num_classes=4), 2, 48, 37, 4),
    (Cifar(3, 10), 5, 32, 32, 10),
    (Vit(48, 64, 16, 96, 3, 3, 4, 7, 0), 5, 48, 64, 7),
    (Vit(32, 32, 8, 40, 2, 4, 2, 7, 1), 3, 32, 32, 7),
]

with open(sys.argv[1] if len(sys.argv) > 1 else "nets.bin", "wb") as out:
    for number, (net, n, h, w, classes) in enumerate(CASES):
        net = net.double()
        state = net.state_dict()
        for key, value in state.items():
            if not key.endswith("num_batches_tracked"):
                value.copy_(fill(key, tuple(value.shape)))
        image = torch.from_numpy(draw("image%d" % number, n * 3 * h * w).astype(np.float32).astype(np.float64).reshape(n, 3, h, w)) * 1.5
        direction = torch.from_numpy(draw("direction%d" % number, n * classes).astype(np.float32).astype(np.float64).reshape(n, classes))
        net.eval()
        logits = net(image)
        net.zero_grad()
        (logits * direction).sum().backward()
        named = list(net.named_parameters())
        out.write(struct.pack("<ii", logits.numel(), len(named)))
        out.write(logits.detach().numpy().astype("<f4").tobytes())
        grads = []
        for key, p in named:
            g = p.grad.numpy().ravel()
            grads += [np.sqrt((g * g).sum()), (g * draw("project " + key, g.size)).sum()]
        net.train()
        with torch.no_grad():
            out.write(net(image).numpy().astype("<f4").tobytes())
        out.write(np.array(grads, "<f4").tobytes())
        print(number, logits.abs().max().item(), len(named))
