#!/usr/bin/python3
"""Writes logits.bin: what PyTorch's networks answer to 5 pictures of an odd size, for `every_architecture` of tests/test_nets.c:
15 float32 logits per architecture (3 classes), in evaluation mode and double precision.  Weights and pictures as in
make_nets.py.  Made with torch 1.13.0a0 and torchvision 0.14.1a0 (Debian), numpy 1.24.2."""
import os, sys
import numpy as np
import torch, torchvision

here = os.path.dirname(os.path.abspath(__file__))
nets = {}
exec(open(os.path.join(here, "make_nets.py")).read().split("CASES = [")[0], nets)
fill, draw, Cifar, Vit = nets["fill"], nets["draw"], nets["Cifar"], nets["Vit"]
tv = lambda name: lambda: getattr(torchvision.models, name)(num_classes=3)
vit = lambda d, depth, heads, distilled: lambda: Vit(48, 80, 16, d, depth, heads, 4, 3, distilled)
CASES = [(tv(name), 75, 61) for name in (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d")]
CASES += [(lambda n=n: Cifar(n, 3), 35, 29) for n in (3, 5, 7, 9, 18)]
CASES += [(vit(d, depth, heads, distilled), 48, 80) for d, depth, heads, distilled in (
    (192, 12, 3, 0), (384, 12, 6, 0), (768, 12, 12, 0), (1024, 24, 16, 0), (192, 12, 3, 1), (384, 12, 6, 1), (768, 12, 12, 1))]

with open(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "logits.bin"), "wb") as out, torch.no_grad():
    for number, (make, h, w) in enumerate(CASES):
        net = make().double().eval()
        for key, value in net.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                value.copy_(fill(key, tuple(value.shape)))
        image = torch.from_numpy(draw("logits%d" % number, 15 * h * w).astype(np.float32).astype(np.float64).reshape(5, 3, h, w)) * 1.5
        logits = net(image)
        out.write(logits.numpy().astype("<f4").tobytes())
        print(number, logits.abs().max().item(), flush=True)
