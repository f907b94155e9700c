#!/usr/bin/python3
"""Writes optim.bin for tests/test_optim.c: parameters after 1 and after 20 steps of PyTorch's optimizers (fp32), learning rates
of its schedulers, a clipped gradient.  Float32, little endian, in the order below.  The start and the gradients come from
`draw`, a hash that the C test repeats.  Made with torch 1.13.0a0 (Debian), numpy 1.24.2."""
import sys
import numpy as np
import torch

N = 37


def draw(name, count):
    seed = 2166136261
    for c in name.encode():
        seed = (seed ^ c) * 16777619 & 0xFFFFFFFF
    x = (np.arange(count, dtype=np.uint64) * 0x9E3779B1 + seed).astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return ((x >> np.uint32(8)).astype(np.float64) / 8388608.0 - 1.0).astype(np.float32)


def tensor(name):
    return torch.from_numpy(draw(name, N))


out = []
for make in (
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    lambda p: torch.optim.Adam(p, lr=1e-3),
    lambda p: torch.optim.Adam(p, lr=5e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.05),
):
    p = torch.nn.Parameter(tensor("start"))
    optimizer = make([p])
    for step in range(20):
        if step == 10:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        p.grad = tensor("gradient%d" % step) * (0.01 if step % 3 else 1.0)
        optimizer.step()
        if step in (0, 19):
            out.append(p.detach().numpy().copy())

p = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([p], lr=2e-4)
schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
watched = [3.0, 2.0, 2.0, 1.99999, 1.5, 1.6, 1.6, 1.6, 1.6, 1.6, 1.2, 1.3, 1.3, 1.3, 1.3]
rates = []
for x in watched:
    rates.append(optimizer.param_groups[0]["lr"])
    schedule.step(x)
out.append(np.array(rates, np.float32))
optimizer = torch.optim.SGD([p], lr=3e-8)
schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
rates = []
for x in [1.0] * 6:
    rates.append(optimizer.param_groups[0]["lr"])
    schedule.step(x)
out.append(np.array(rates, np.float32))
optimizer = torch.optim.SGD([p], lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
rates = []
for _ in range(9):
    rates.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    schedule.step()
out.append(np.array(rates, np.float32))

p = torch.nn.Parameter(tensor("start"))
p.grad = tensor("gradient0")
norm = torch.nn.utils.clip_grad_norm_([p], 0.75)
out.append(np.array([norm.item()], np.float32))
out.append(p.grad.numpy())
np.concatenate(out).astype("<f4").tofile(sys.argv[1] if len(sys.argv) > 1 else "optim.bin")
print([len(o) for o in out])
