#!/usr/bin/python3
"""Writes train.bin for tests/test_golden.c: gradients, training steps and steps of the intervention, in double precision,
and how far PyTorch's own fp32 is from that.  Networks, weights and pictures as in make_nets.py (whose functions are used);
`signs` is repeated by the C test.  Little endian, 32-bit words and 64-bit floats (low word first), in this order:
  A  three ResNets in training mode, gradient of sum(direction * logits): int32 number of the picture, int32 parameters; per parameter float64 norm,
     float64 dot product with `draw`, float32 error of torch's fp32 (L2, relative), the same against the exact gradient of a network whose ReLUs and max pools
     decide as they did in fp32.  The C test computes the whole gradient in double precision itself (tests/exact.h), is held to norm and dot product, and
     then measures the library's gradient against all of it
  B  DeiT-tiny the same way: int32 number of the picture, int32 parameters; per parameter float32 norm, 64 float32 projections on vectors of signs
  C  CIFAR ResNet-20, batch 16, 10 steps at lr 1e-5 of SGD (momentum .9) and of Adam: 10 losses, then all running means and variances
  D  one step of the intervention on CIFAR ResNet-20, batch 8, 16 px, 2 classes, official and sound: int32 number of the picture, ntxent (both sides), ce, int32
     parameters; per parameter norm and 64 projections of the dense branch's gradient, then of the masked one's
How the pictures were chosen, and what others give: README.md in this folder.
Usage: make_train.py [FILE [PICTURE]]; with PICTURE (a number) A is of that picture alone, and nothing else is written.
Made with torch 1.13.0a0 and torchvision 0.14.1a0 (Debian), numpy 1.24.2; one thread."""
import copy, os, struct, sys
import numpy as np
import torch, torchvision
from torch import nn
import torch.nn.functional as F

here = os.path.dirname(os.path.abspath(__file__))
nets = {}
exec(open(os.path.join(here, "make_nets.py")).read().split("CASES = [")[0], nets)
fill, draw, Cifar, Vit = nets["fill"], nets["draw"], nets["Cifar"], nets["Vit"]
P = 64  # a 24-bit hash gives 16


def signs(name, count):
    """64 times [count] of +-1: bits 4 to 19 of the hashes behind `draw`."""
    for k in range(P // 16):
        h = ((draw("signs%d %s" % (k, name), count) + 1.0) * 8388608.0).astype(np.int64)
        for p in range(16):
            yield (1 - 2 * (h >> (p + 4) & 1)).astype(np.float64)


def measures(name, gradient):
    g = gradient.detach().double().numpy().ravel()
    return [np.sqrt((g * g).sum())], [(s * g).sum() for s in signs(name, g.size)]


def prepare(net):
    for key, value in net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(fill(key, tuple(value.shape)) * (0.25 if key.endswith("bn3.weight") else 1))
    return net


def picture(name, n, h, w):
    return torch.from_numpy((draw(name, n * 3 * h * w) * 1.5).astype(np.float32).astype(np.float64).reshape(n, 3, h, w))


def put(values):
    out.write(np.array(values, "<f4").tobytes())


def margin(net, x):
    """The smallest |input of a ReLU| by the rms fp32 error of its layer's inputs."""
    found = [[], []]
    functional, layer = F.relu, nn.ReLU.forward
    for which, copy_of, picture_of in ((0, copy.deepcopy(net).float(), x.float()), (1, copy.deepcopy(net).double(), x)):
        F.relu = lambda v, inplace=False, which=which: (found[which].append(v.detach().double().clone()), functional(v))[1]
        nn.ReLU.forward = lambda self, v, which=which: (found[which].append(v.detach().double().clone()), functional(v))[1]
        with torch.no_grad():
            copy_of.train()(picture_of)
        F.relu, nn.ReLU.forward = functional, layer
    return min(((b.abs() / (a - b).pow(2).mean().sqrt()).min().item()) for a, b in zip(*found)) if found[0] else 1e9


def choose(name, n, side, nets):
    best = (-1, 0)
    for k in [FIXED] if FIXED >= 0 else range(40):
        x = picture("%s %d" % (name, k), n, side, side)
        m = 1e9
        for net in nets:
            m = min(m, margin(net, x))
            if m <= best[0]:
                break
        if m > best[0]:
            best = (m, k)
        if m == 1e9:
            break
    print(name, "picture", best[1], "ReLUs at least %.1f times their rms error from 0" % best[0], flush=True)
    out.write(struct.pack("<i", best[1]))
    return picture("%s %d" % (name, best[1]), n, side, side)


class Decisions:
    """Inside of `with`, ReLUs and max pools of a fp32 network leave a note of what they let through; those of a double one do
    the same again, whatever their own inputs say."""

    def __init__(self):
        self.notes, self.again = [], False

    def __enter__(self):
        self.saved = F.relu, nn.ReLU.forward, nn.MaxPool2d.forward
        F.relu = lambda v, inplace=False: self.relu(v)
        nn.ReLU.forward = lambda layer, v: self.relu(v)
        nn.MaxPool2d.forward = lambda layer, v: self.pool(layer, v)

    def __exit__(self, *error):
        F.relu, nn.ReLU.forward, nn.MaxPool2d.forward = self.saved
        self.again = True

    def relu(self, v):
        if not self.again:
            self.notes.append(v.detach() > 0)
            return self.saved[0](v)
        return v * self.notes.pop(0)

    def pool(self, layer, v):
        if not self.again:
            y, places = F.max_pool2d(v, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
            self.notes.append(places)
            return y
        places = self.notes.pop(0)
        return v.flatten(2).gather(2, places.flatten(2)).view(places.shape)


def gradients(number, net, n, side):
    """Name, exact gradient, error of torch's fp32, and its error against the exact gradient under fp32's decisions."""
    single = prepare(net).train()
    double, led = copy.deepcopy(single).double(), copy.deepcopy(single).double()
    x = choose("train%d" % number, n, side, [double])
    direction = torch.from_numpy(draw("train direction%d" % number, n * 10).astype(np.float32).astype(np.float64).reshape(n, 10))
    decisions = Decisions()
    with decisions:
        logits = single(x.float())
    (logits * direction.float()).sum().backward()
    with decisions:
        logits = led(x)
    (logits * direction).sum().backward()
    (double(x) * direction).sum().backward()
    out.write(struct.pack("<i", len(list(double.parameters()))))
    fp32, led = dict(single.named_parameters()), dict(led.named_parameters())
    off = lambda key, g: (torch.linalg.norm(fp32[key].grad.double() - g) / torch.linalg.norm(g)).item()
    errors = [(off(key, p.grad), off(key, led[key].grad)) for key, p in double.named_parameters()]
    for (key, p), error in zip(double.named_parameters(), errors):
        yield key, p.grad, error
    print("gradients", number, "torch fp32 off by at most %.1e, under its own decisions %.1e" % tuple(map(max, zip(*errors))), flush=True)


FIXED = int(sys.argv[2]) if len(sys.argv) > 2 else -1
out = open(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "train.bin"), "wb")
for number, (net, n, side) in enumerate((  # A
        (Cifar(3, 10), 8, 16), (torchvision.models.resnet18(num_classes=10), 4, 112), (torchvision.models.resnet50(num_classes=10), 4, 64))):
    for key, g, error in gradients(number, net, n, side):
        flat = g.numpy().ravel()
        out.write(struct.pack("<ddff", np.linalg.norm(flat), (draw("project " + key, flat.size) * flat).sum(), *error))
if FIXED >= 0:
    sys.exit()
for key, g, error in gradients(3, Vit(64, 64, 16, 192, 12, 3, 4, 10, 0), 4, 64):  # B
    norm, projections = measures(key, g)
    put(norm + projections)

for kind in ("sgd", "adam"):  # C
    net = prepare(Cifar(3, 10)).double().train()
    x = picture("steps", 16, 32, 32)
    y = torch.arange(16) % 10
    optimizer = torch.optim.SGD(net.parameters(), 1e-5, momentum=0.9) if kind == "sgd" else torch.optim.Adam(net.parameters(), 1e-5)
    losses = []
    for step in range(10):
        loss = F.cross_entropy(net(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    put(losses)
    put(np.concatenate([v.numpy().ravel() for k, v in net.state_dict().items() if "running" in k]))
    print("C", kind, losses[0], losses[-1])


def ntxent(a, b, tau=0.5):
    z = F.normalize(torch.cat([a, b]), dim=1)
    n = a.shape[0]
    s = z @ z.t() / tau
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(s, torch.cat([torch.arange(n) + n, torch.arange(n)]))


for profile in ("official", "sound"):  # D
    dense = prepare(Cifar(3, 2)).double().train()
    pruned = copy.deepcopy(dense)
    convs = [p for p in pruned.parameters() if p.dim() == 4]
    if profile == "official":  # the smallest 1 % of the convolutions' weights
        v = torch.cat([p.detach().abs().flatten() for p in convs]).sort()[0]
        threshold = v[min(int(np.ceil(0.01 * v.numel())), v.numel() - 1)]
        masks = [(p.detach().abs() >= threshold).double() for p in convs]
    else:  # the first channel of every convolution
        masks = [torch.ones_like(p) for p in convs]
        for m in masks:
            m[0] = 0
    with torch.no_grad():
        for p, m in zip(convs, masks):
            p.mul_(m)
    x = choose("intervention", 8, 16, [dense, pruned])
    y = torch.arange(8) % 2

    def run(net):
        kept = {}
        hook = net.linear.register_forward_hook(lambda m, i, o: kept.update(features=i[0]))
        logits = net(x)
        hook.remove()
        outputs = logits.softmax(1) if profile == "official" else logits
        return outputs, outputs if profile == "official" else kept["features"]

    (o1, f1), (o2, f2) = run(dense), run(pruned)
    first, second, ce = ntxent(f1.detach(), f2), ntxent(f1, f2.detach()), F.cross_entropy(o1, y)
    (first + second + 0.2 * ce).backward()
    put([(first + second).item(), ce.item()])
    named = list(dense.named_parameters())
    out.write(struct.pack("<i", len(named)))
    masked = {id(p): m for p, m in zip(convs, masks)}
    for (key, p), q in zip(named, pruned.parameters()):
        for g in (p.grad, q.grad if q.grad is None else q.grad * masked.get(id(q), torch.ones(()))):
            norm, projections = measures(key, torch.zeros_like(p) if g is None else g)
            put(norm + projections)
    print("D", profile, (first + second).item(), ce.item())
