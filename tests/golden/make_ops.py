#!/usr/bin/env python3
"""Writes ops.bin: outputs and gradients of every operation, computed by PyTorch in float64 from float32 inputs.

Made with Python 3.11.2, PyTorch 1.13.1 (Debian; it calls itself 1.13.0a0), NumPy 1.24.2.  Run: python3 make_ops.py (in this folder).
Inputs are not stored: they come from the integer hash below, which test_ops.c has as well; a case's seeds are
1000 * case + input (gradient of the output: 1000 * case + 99).  The script prints PyTorch's own float32 error beside it.

File, little-endian: "SPMOPS1\\0", int32 cases; per case: char op[16], char label[24], int32 kernel[2] stride[2] padding[2]
dilation[2] groups heads index relu training, float32 eps p temperature label_smoothing, int32 inputs, per input: int32 rank
shape[4], float32 scale offset; int32 arrays, per array: int32 which (j: out[j]; 100 + i: gradient of in[i]), int32 count,
float32 data[count].  Layouts are spurmem.h's (NHWC, OHWI).
"""
import struct
import numpy as np
import torch
import torch.nn.functional as F


def uniform(seed, n):
    """n floats in [-1, 1) with 24 bits: murmur3's finalizer over (seed, index)."""
    mask = np.uint64(0xFFFFFFFF)
    x = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + np.uint64((seed * 0x9E3779B9 + 1) & 0xFFFFFFFF)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & mask
    x ^= x >> np.uint64(16)
    return ((x >> np.uint64(8)).astype(np.float64) / 8388608.0 - 1.0).astype(np.float32)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def conv2d(a, x, w, b=None):
    return nhwc(F.conv2d(nchw(x), nchw(w), b, a['stride'], a['padding'], a['dilation'], a['groups']))


def linear(a, x, w, b=None):
    return F.linear(x, w, b)


def batch_norm(a, x, w, b, mean, var, r=None):
    perm = [0, x.dim() - 1] + list(range(1, x.dim() - 1))
    back = [0] + list(range(2, x.dim())) + [1]
    y = F.batch_norm(x.permute(perm), mean.clone(), var.clone(), w, b, bool(a['training']), 0.0, a['eps']).permute(back)
    if r is not None:
        y = y + r
    return F.relu(y) if a['relu'] else y


def layer_norm(a, x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b, a['eps'])


def attention(a, qkv):
    n, t, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    h = a['heads']
    q, k, v = qkv.reshape(n, t, 3, h, d // h).permute(2, 0, 3, 1, 4).unbind(0)
    if a['tokens']:
        q = q[:, :, :a['tokens']]
    p = (q @ k.transpose(-2, -1) * (d // h) ** -0.5).softmax(dim=-1)
    return (p @ v).transpose(1, 2).reshape(n, -1, d), p


def token(a, x):
    return x[:, a['index']:a['index'] + a['tokens']] if a['tokens'] else x[:, a['index']]


def max_pool(a, x):
    return nhwc(F.max_pool2d(nchw(x), a['kernel'], a['stride'], a['padding']))


def avg_pool(a, x):
    return nhwc(F.avg_pool2d(nchw(x), a['kernel'], a['stride'], a['padding']))


def shortcut_a(a, x):
    s = x[:, ::a['stride'][0], ::a['stride'][1], :]
    extra = a['groups'] - x.shape[3]
    return F.pad(s, (extra // 2, extra - extra // 2))


def tokens(a, x, cls, pos, dist=None):
    n = x.shape[0]
    front = [t.unsqueeze(0).expand(n, -1, -1) for t in (cls, dist) if t is not None]
    return torch.cat(front + [x.reshape(n, -1, x.shape[3])], dim=1) + pos


def cross_entropy(a, x, target, weight=None):
    each = F.cross_entropy(x, target, reduction='none', label_smoothing=a['label_smoothing'])
    loss = each.mean() if weight is None else (each * weight).sum()
    return loss.reshape(1), each, x.softmax(1)


def ntxent(a, x, y):
    z = F.normalize(torch.cat([x, y]), dim=1)
    n = x.shape[0]
    s = z @ z.t() / a['temperature']
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), float('-inf'))
    positive = torch.cat([torch.arange(n, 2 * n), torch.arange(0, n)])
    return F.cross_entropy(s, positive).reshape(1), z


OPS = {
    'conv2d': (conv2d, [0, 1, 2]), 'linear': (linear, [0, 1, 2]), 'batch_norm': (batch_norm, [0, 1, 2, 5]),
    'layer_norm': (layer_norm, [0, 1, 2]), 'relu': (lambda a, x: F.relu(x), [0]), 'gelu': (lambda a, x: F.gelu(x), [0]),
    'softmax': (lambda a, x: F.softmax(x, -1), [0]), 'attention': (attention, [0]), 'max_pool': (max_pool, [0]),
    'avg_pool': (avg_pool, [0]), 'global_pool': (lambda a, x: x.mean((1, 2)), [0]), 'add': (lambda a, x, y: x + y, [0, 1]),
    'shortcut_a': (shortcut_a, [0]), 'tokens': (tokens, [0, 1, 2, 3]), 'token': (token, [0]),
    'mean2': (lambda a, x, y: (x + y) / 2, [0, 1]), 'cross_entropy': (cross_entropy, [0]), 'ntxent': (ntxent, [0, 1]),
}
# scale and offset of inputs that are not uniform in [-2, 2)
FILL = {('batch_norm', 1): (.5, 1), ('batch_norm', 4): (.5, 1.5), ('layer_norm', 1): (.5, 1), ('cross_entropy', 0): (4, 0),
        ('cross_entropy', 1): (.25, .25), ('cross_entropy', 2): (.5, 1), ('gelu', 0): (8, 0), ('conv2d', 1): (.5, 0),
        ('linear', 1): (.5, 0), ('softmax', 0): (8, 0)}


def bn(x, residual=False):
    c = [x[-1]]
    return [x, c, c, c, c] + ([x] if residual else [])


CASES = [
    ('conv2d', '3x3 pad 1', [[2, 7, 6, 5], [9, 3, 3, 5]], dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1])),
    ('conv2d', '3x3 stride 2 bias', [[2, 9, 8, 8], [7, 3, 3, 8], [7]], dict(kernel=[3, 3], stride=[2, 2], padding=[1, 1])),
    ('conv2d', '1x1', [[2, 5, 6, 17], [19, 1, 1, 17]], dict(kernel=[1, 1])),
    ('conv2d', '1x1 stride 2', [[2, 7, 7, 16], [10, 1, 1, 16]], dict(kernel=[1, 1], stride=[2, 2])),
    ('conv2d', 'stem 7x7', [[1, 23, 21, 3], [8, 7, 7, 3]], dict(kernel=[7, 7], stride=[2, 2], padding=[3, 3])),
    ('conv2d', 'groups 2', [[2, 6, 5, 8], [6, 3, 3, 4], [6]], dict(kernel=[3, 3], padding=[1, 1], groups=2)),
    ('conv2d', 'depthwise', [[2, 6, 7, 6], [6, 3, 3, 1]], dict(kernel=[3, 3], padding=[1, 1], groups=6)),
    ('conv2d', 'dilation 2', [[1, 9, 9, 4], [5, 3, 3, 4]], dict(kernel=[3, 3], padding=[2, 2], dilation=[2, 2])),
    ('conv2d', 'odd 2x3 stride 3x1', [[2, 8, 9, 3], [4, 2, 3, 3], [4]], dict(kernel=[2, 3], stride=[3, 1], padding=[1, 0], dilation=[1, 2])),
    ('conv2d', 'patch 4', [[2, 8, 12, 3], [20, 4, 4, 3], [20]], dict(kernel=[4, 4], stride=[4, 4])),
    ('linear', 'rank 2', [[5, 33], [17, 33], [17]], {}),
    ('linear', 'rank 3 no bias', [[2, 7, 18], [35, 18]], {}),
    ('batch_norm', 'train', bn([2, 7, 5, 19]), dict(eps=1e-5, training=1)),
    ('batch_norm', 'train relu residual', bn([2, 7, 5, 19], True), dict(eps=1e-5, training=1, relu=1)),
    ('batch_norm', 'eval', bn([2, 5, 5, 21]), dict(eps=1e-5)),
    ('batch_norm', 'eval relu residual', bn([2, 5, 5, 21], True), dict(eps=1e-5, relu=1)),
    ('batch_norm', 'train rows', bn([13, 6]), dict(eps=1e-3, training=1, relu=1)),
    ('layer_norm', 'rank 3', [[2, 9, 37], [37], [37]], dict(eps=1e-6)),
    ('layer_norm', 'rank 2', [[5, 16], [16], [16]], dict(eps=1e-5)),
    ('relu', '', [[3, 5, 7]], {}),
    ('gelu', '', [[7, 149]], {}),
    ('softmax', '2 classes', [[9, 2]], {}),
    ('softmax', '45', [[2, 5, 45]], {}),
    ('attention', '3 heads', [[2, 11, 63]], dict(heads=3)),
    ('attention', '1 head', [[2, 19, 48]], dict(heads=1)),
    ('max_pool', '3x3 stride 2', [[2, 9, 8, 21]], dict(kernel=[3, 3], stride=[2, 2], padding=[1, 1])),
    ('max_pool', '2x3', [[2, 6, 7, 5]], dict(kernel=[2, 3], stride=[2, 1])),
    ('avg_pool', '3x3 stride 2', [[2, 9, 8, 21]], dict(kernel=[3, 3], stride=[2, 2], padding=[1, 1])),
    ('avg_pool', '2x2', [[2, 6, 7, 5]], dict(kernel=[2, 2], stride=[2, 2])),
    ('global_pool', '', [[3, 7, 5, 21]], {}),
    ('add', '', [[3, 5, 7], [3, 5, 7]], {}),
    ('shortcut_a', '', [[2, 7, 6, 8]], dict(stride=[2, 2], groups=16)),
    ('shortcut_a', 'odd', [[2, 4, 6, 5]], dict(stride=[2, 3], groups=8)),
    ('tokens', '1 class token', [[3, 2, 5, 18], [1, 18], [11, 18]], {}),
    ('tokens', '2 class tokens', [[2, 3, 3, 7], [2, 7], [11, 7]], {}),
    ('tokens', 'distillation token', [[2, 3, 2, 6], [1, 6], [8, 6], [1, 6]], {}),
    ('token', '', [[3, 5, 18]], dict(index=1)),
    ('mean2', '', [[4, 9], [4, 9]], {}),
    ('cross_entropy', 'mean', [[6, 10], [6, 10]], {}),
    ('cross_entropy', 'weights, smoothing', [[7, 3], [7, 3], [7]], dict(label_smoothing=.1)),
    ('ntxent', '', [[5, 19], [5, 19]], dict(temperature=.5)),
    ('ntxent', 'narrow', [[9, 2], [9, 2]], dict(temperature=.07)),
    ('attention', '1 token asks', [[2, 11, 63]], dict(heads=3, tokens=1)),
    ('attention', '13 tokens ask', [[2, 19, 48]], dict(heads=2, tokens=13)),
    ('token', '3 tokens', [[3, 5, 18]], dict(index=1, tokens=3)),
]
DEFAULT = dict(kernel=[0, 0], stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1, heads=0, index=0, tokens=0, relu=0, training=0,
               eps=0., p=0., temperature=0., label_smoothing=0.)


def run(case, op, shapes, attr, dtype):
    function, wanted = OPS[op]
    ins = []
    for i, shape in enumerate(shapes):
        scale, offset = FILL.get((op, i), (2, 0))
        v = uniform(1000 * case + i, int(np.prod(shape))) * np.float32(scale) + np.float32(offset)
        ins.append(torch.tensor(v.reshape(shape), dtype=dtype, requires_grad=i in wanted))
    a = dict(attr)
    for k in ('eps', 'temperature', 'label_smoothing'):
        a[k] = float(np.float32(a[k]))  # the value that the C side sees
    out = function(a, *ins)
    out = out if isinstance(out, tuple) else (out,)
    dy = torch.tensor(uniform(1000 * case + 99, out[0].numel()).reshape(out[0].shape), dtype=dtype)
    out[0].backward(dy)
    arrays = [(j, o) for j, o in enumerate(out)] + [(100 + i, ins[i].grad) for i in wanted if i < len(ins)]
    return [(which, np.ascontiguousarray(t.detach().numpy())) for which, t in arrays]


def main():
    data = bytearray(b'SPMOPS1\0' + struct.pack('<i', len(CASES)))
    for case, (op, label, shapes, given) in enumerate(CASES):
        attr = dict(DEFAULT, **given)
        arrays, single = run(case, op, shapes, attr, torch.float64), run(case, op, shapes, attr, torch.float32)
        error = max(np.abs(x - y).max() / np.abs(x).max() for (_, x), (_, y) in zip(arrays, single))
        print('%-14s %-22s PyTorch float32 against float64: %.1e' % (op, label, error))
        data += struct.pack('<16s24s', op.encode(), label.encode())
        data += struct.pack('<14i', *attr['kernel'], *attr['stride'], *attr['padding'], *attr['dilation'], attr['groups'],
                            attr['heads'], attr['index'], attr['tokens'], attr['relu'], attr['training'])
        data += struct.pack('<4f', attr['eps'], attr['p'], attr['temperature'], attr['label_smoothing'])
        data += struct.pack('<i', len(shapes))
        for i, shape in enumerate(shapes):
            data += struct.pack('<5i2f', len(shape), *(shape + [0] * (4 - len(shape))), *FILL.get((op, i), (2, 0)))
        data += struct.pack('<i', len(arrays))
        for which, x in arrays:
            data += struct.pack('<2i', which, x.size) + x.astype('<f4').tobytes()
    with open('ops.bin', 'wb') as f:
        f.write(data)
    print(len(data), 'bytes')


main()
