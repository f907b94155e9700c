#!/usr/bin/python3
"""Writes localize.bin: what the published study's rules (METHOD 2.2 to 2.5, every quirk on) give on a small ResNet-18 and
76 drawn pictures, for tests/test_official.c.  Written from the rules alone; it shares no code with the header.

Weights and pictures come from `draw` of make_nets.py, which the C test repeats.  Little-endian 32-bit words:
  float bias of the head's column 0 (so that both classes are predicted)
  4 x (count, correct) of the groups before any change
  per group g: int samples, then 10 x (int parameter, int channel, float score): the top of the gradient ranking
  10 x (int parameter, int channel, float score): the top of the magnitude ranking
  then 4 int correct per change, in this order:
    per ranking (4 gradient, 1 magnitude), top k in KS: zero;  then top k in 1..3: rewind
    per (fraction in FRACTIONS, order in smallest, largest): int weights changed, 4 int correct after zeroing these
`parameter` counts named_parameters() and buffers as a state dict does, without num_batches_tracked.
Made with torch 1.13.0a0 and torchvision 0.14.1a0 (Debian), numpy 1.24.2."""
import math, struct, sys
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock

torch.set_num_threads(1)
SIZES = (30, 8, 8, 30)
SAMPLES = 20
KS = (1, 2, 3, 5, 10)
FRACTIONS = (0.0, 0.001, 0.05, 0.4, 1.0)
SIDE = 32


def draw(name, count):
    """count numbers in [-1, 1): FNV-1a of the name, then a 32-bit mix of (seed + index * odd), as in make_nets.py."""
    seed = 2166136261
    for c in name.encode():
        seed = (seed ^ c) * 16777619 & 0xFFFFFFFF
    x = (np.arange(count, dtype=np.uint64) * 0x9E3779B1 + seed).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float64) / 8388608.0 - 1.0


class Net(nn.Module):
    """ResNet-18 of width 8 with the ImageNet stem; the head is Linear and Softmax (Q1)."""

    def __init__(self, w=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, w, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.pool = nn.MaxPool2d(3, 2, 1)
        i = w
        for s in range(4):
            o = w << s
            blocks = []
            for b in range(2):
                stride = 2 if s and not b else 1
                down = None
                if stride != 1 or i != o:
                    down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
                blocks.append(BasicBlock(i, o, stride, down))
                i = o
            setattr(self, "layer%d" % (s + 1), nn.Sequential(*blocks))
        self.fc = nn.Sequential(nn.Linear(i, 2), nn.Softmax(1))

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def fill(model, prefix, bias):
    for name, t in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        u = draw(prefix + name.replace("fc.0.", "fc."), t.numel())
        if name.endswith("running_var"):
            u = 1.0 + 0.4 * u
        elif name.endswith("running_mean"):
            u = 0.1 * u
        elif name.startswith("fc"):
            u = (2.0 if name.endswith("weight") else 0.0) * u
        elif name.endswith("bias"):
            u = 0.3 * u
        elif t.dim() == 1:
            u = 1.0 + 0.3 * u
        else:
            u = u * np.sqrt(6.0 / np.prod(t.shape[1:]))
        t.copy_(torch.from_numpy(u.astype(np.float32).astype(np.float64).reshape(tuple(t.shape))))
    model.fc[0].bias.data[0] = bias


def picture(i):
    base = draw("localize.base.%d" % i, 12).reshape(2, 2, 3).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
    noise = draw("localize.noise.%d" % i, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3)
    return np.clip(np.floor(128.0 + 90.0 * base + 37.0 * noise), 0, 255)


def main():
    groups = np.repeat(np.arange(4), SIZES)
    y = torch.from_numpy(groups // 2)
    x = np.stack([picture(i) for i in range(len(groups))]).astype(np.float32) / np.float32(255)
    x = (x - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64))
    column = 1 - y  # Q2: column 0 is class 1
    model, earlier = Net().double().eval(), Net().double().eval()
    with torch.no_grad():
        fill(model, "", 0.0)
        logits = model.fc[0](forward_features(model, x))
        middle = (logits[:, 1] - logits[:, 0]).sort()[0]
        bias = float(np.float32((middle[37] + middle[38]) / 2))
        fill(model, "", bias)
        fill(earlier, "earlier.", bias)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    order = [n for n in start if not n.endswith("num_batches_tracked")]
    out, margins = [], []

    def correct():
        with torch.no_grad():
            logits = model.fc[0](forward_features(model, x))
        margins.append(float((logits[:, 0] - logits[:, 1]).abs().min()))
        hit = (logits.argmax(1) == column).numpy()
        return [int(hit[groups == g].sum()) for g in range(4)]

    def restore():
        model.load_state_dict(start)

    out += [struct.pack("<f", bias)]
    for g, c in enumerate(correct()):
        out.append(struct.pack("<ii", SIZES[g], c))
    with torch.no_grad():
        p_true = model(x).gather(1, column[:, None])[:, 0].numpy()
    rankings = []
    for g in range(4):
        mine = np.where(groups == g)[0]
        chosen = mine[np.argsort(p_true[mine], kind="stable")][:min(SAMPLES, len(mine))]
        model.zero_grad()
        F.cross_entropy(model(x[chosen]), column[chosen]).backward()
        scored = []
        for name, p in model.named_parameters():
            if p.dim() == 4:
                scored += [(-float(v), order.index(name), c) for c, v in enumerate(p.grad.flatten(1).norm(dim=1))]
        scored.sort()
        rankings.append(scored)
        out.append(struct.pack("<i", len(chosen)))
        out += [struct.pack("<iif", i, c, -s) for s, i, c in scored[:10]]
    scored = []
    for name, p in model.named_parameters():
        if p.dim() == 4 and "downsample" not in name:  # Q3
            scored += [(-float(v), order.index(name), c) for c, v in enumerate(p.detach().flatten(1).norm(dim=1))]
    scored.sort()
    rankings.append(scored)
    out += [struct.pack("<iif", i, c, -s) for s, i, c in scored[:10]]
    gaps = [(-a[0] + b[0]) / -a[0] for r in rankings for a, b in zip(r[:10], r[1:11])]
    state = model.state_dict()
    for r in rankings:
        for rewind in (0, 1):
            for k in (1, 2, 3) if rewind else KS:
                for s, i, c in r[:k]:
                    # Q5: the batch norm behind it stays as it is
                    state[order[i]][c] = earlier.state_dict()[order[i]][c] if rewind else 0.0
                out.append(struct.pack("<4i", *correct()))
                restore()
    v = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if p.dim() == 4]).sort()[0]
    n = len(v)
    for fraction in FRACTIONS:
        k = math.ceil(fraction * n)
        for smallest in (1, 0):
            changed = 0
            if smallest:
                t = v[min(k, n - 1)]
            elif k:
                t = v[n - min(k, n - 1)]
            with torch.no_grad():
                for name, p in model.named_parameters():  # Q4: every parameter
                    chosen = p.abs() <= t if smallest else p.abs() >= t if k else torch.ones_like(p, dtype=bool)
                    changed += int(chosen.sum())
                    p[chosen] = 0.0
            # all logits equal: PyTorch's argmax of equal values is not a fact to test
            out.append(struct.pack("<5i", changed, *(correct() if fraction < 1 and (k or smallest) else [-1] * 4)))
            restore()
    with open(sys.argv[1] if len(sys.argv) > 1 else "localize.bin", "wb") as f:
        f.write(b"".join(out))
    print("smallest margin %.2g, smallest gap of two ranked scores %.2g" % (min(margins), min(gaps)))


def forward_features(model, x):
    x = model.pool(F.relu(model.bn1(model.conv1(x))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x)))).mean((2, 3))


if __name__ == "__main__":
    main()
