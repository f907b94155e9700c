#!/usr/bin/env python3
"""spurmem beside PyTorch and ONNX Runtime on the same machine, in turns.

    python3 tests/bench/peers.py [--threads 2] [--rounds 5] [--spurmem build/spurmem] [--markdown] [ROW...]
    python3 tests/bench/peers.py --list

Each row names a piece of work, the peer and the ratio that is aimed at.  A peer lives in a process of its own, in
whichever Python has it ($PYTHON, python3, /usr/bin/python3 are asked), and does nothing while spurmem works, and the
other way round.  A round is one turn of each (a warm-up, then at least three steps or two seconds; the turn's median
counts); the row's ratio is the median over the rounds of peer seconds / spurmem seconds.  The same ratio of processor
seconds (all threads) is printed beside it: where other programs take turns on the machine, that is the one to read.
PyTorch runs with the better of one thread and all; its linear layers are as fast as its BLAS, so a reference BLAS
is named ("apt install libopenblas0", or LD_LIBRARY_PATH).  --isa avx2 holds spurmem, PyTorch, oneDNN and OpenBLAS to
AVX2; ONNX Runtime knows no such limit.  What the machine itself gives a second thread, in multiplications and in
copying, stands behind the row of threads.  Rows whose peer is missing are named and left out.  Nothing but the standard
library is needed here; the workers need torch and torchvision, or onnxruntime and numpy.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

# name, spurmem bench --only, further options, peers in order of preference, work for the peer, wanted ratio
ROWS = [
    ("train-resnet18", "train:resnet18", [], ["torch"], {"do": "train", "net": "resnet18", "batch": 16}, 2.0),
    ("train-resnet50", "train:resnet50", [], ["torch"], {"do": "train", "net": "resnet50", "batch": 16}, 1.5),
    ("train-vit-s", "train:deit_small", ["--batch", "8"], ["torch"], {"do": "train", "net": "vit_s", "batch": 8}, 1.3),
    ("train-vit-b", "train:vit_base", ["--batch", "8"], ["torch"], {"do": "train", "net": "vit_b", "batch": 8}, 1.3),
    ("infer-resnet18", "infer:resnet18", [], ["onnx", "torch"], {"do": "infer", "net": "resnet18", "batch": 16}, 1.3),
    ("infer-resnet50", "infer:resnet50", [], ["onnx", "torch"], {"do": "infer", "net": "resnet50", "batch": 16}, 1.1),
    ("infer-resnet50-1", "infer:resnet50", ["--batch", "1"], ["onnx", "torch"],
     {"do": "infer", "net": "resnet50", "batch": 1}, 1.1),
    ("infer-vit-b", "infer:vit_base", ["--batch", "8"], ["onnx", "torch"],
     {"do": "infer", "net": "vit_b", "batch": 8}, 1.0),
    ("intervene-resnet50", "intervene:resnet50", ["--keep-norms"], ["torch"],
     {"do": "intervene", "net": "resnet50", "batch": 16}, 2.0),
    ("train-small", "train:resnet18:width=16", ["--image-size", "64", "--batch", "64"], ["torch"],
     {"do": "train", "net": "resnet18", "width": 16, "batch": 64, "size": 64}, 1.25),
    ("start-resnet50", None, [], ["torch"], {"do": "start", "net": "resnet50"}, 1 / 0.15),
    ("threads-resnet50", "train:resnet50", [], ["self"], {"title": "itself, one thread", "threads": 1}, 1.85),
    ("bf16-resnet50", "train:resnet50", ["--precision", "bf16"], ["self"],
     {"title": "itself, fp32, direct convolution", "options": ["--conv", "direct"]}, 1.5),
    ("bf16-vit-b", "train:vit_base", ["--precision", "bf16"], ["self"],
     {"title": "itself, fp32", "options": ["--conv", "direct"]}, 1.5),
    ("scan-resnet18", "scan:resnet18", ["--batch", "32"], ["inside"], {}, 2.5),
]
SIZES = {"vit_s": (12, 6, 384, 1536), "vit_b": (12, 12, 768, 3072)}


# ---- the peers: workers that read one JSON line, and answer with one ----

def torch_net(torch, work):
    """A torchvision network with two classes (ResNets: of any width)."""
    import torchvision
    if work["net"] in SIZES:
        layers, heads, dim, mlp = SIZES[work["net"]]
        return torchvision.models.VisionTransformer(image_size=224, patch_size=16, num_layers=layers, num_heads=heads,
                                                    hidden_dim=dim, mlp_dim=mlp, num_classes=2)
    net = getattr(torchvision.models, work["net"])(num_classes=work.get("classes", 2))
    width = work.get("width", 64)
    if width != 64:
        block, depth = type(net.layer1[0]), len(net.layer1)
        net.inplanes = width
        net.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        net.bn1 = torch.nn.BatchNorm2d(width)
        for i in range(4):
            setattr(net, "layer%d" % (i + 1), net._make_layer(block, width << i, depth, stride=1 if i == 0 else 2))
        net.fc = torch.nn.Linear((width << 3) * block.expansion, 2)
    return net


def contrast(torch, a, b, tau=0.5):
    """NT-Xent of two batches of features."""
    z = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
    n = a.shape[0]
    similarity = (z @ z.t() / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    positive = torch.arange(2 * n).roll(n)
    return torch.nn.functional.cross_entropy(similarity, positive)


def slow_blas():
    """A word of warning if this process multiplies matrices with the reference BLAS."""
    try:
        with open("/proc/self/maps") as f:
            maps = f.read()
    except OSError:
        return ""
    plain = "/blas/libblas.so" in maps and "openblas" not in maps and "mkl" not in maps
    return ", reference BLAS: linear layers slow" if plain else ""


def torch_step(work):
    """A function that does one step in the better of PyTorch's settings, and a word on which that is."""
    import torch
    torch.manual_seed(0)
    net, size, n = torch_net(torch, work), work.get("size", 224), work["batch"]
    x, y = torch.randn(n, 3, size, size), torch.arange(n) % 2
    if work["net"] not in SIZES:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    loss_of = torch.nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def train():
        sgd.zero_grad(set_to_none=True)
        loss_of(net(x), y).backward()
        sgd.step()

    def infer():
        with torch.no_grad():
            net(x)

    def intervene():
        """Dense without gradient, pruned, dense again; both one-sided contrasts and the cross-entropy; one backward."""
        def features(masked):
            if masked:
                torch.nn.utils.stateless.functional_call(net, {k: p * keep[k] if k in keep else p
                                                               for k, p in net.named_parameters()}, (x,))
            else:
                seen["logits"] = net(x)
            return seen["features"]
        sgd.zero_grad(set_to_none=True)
        with torch.no_grad():
            first = features(False)
        pruned = features(True)
        loss = contrast(torch, first, pruned)
        dense = features(False)
        loss = loss + contrast(torch, dense, pruned.detach()) + 0.2 * loss_of(seen["logits"], y)
        loss.backward()
        sgd.step()

    if work["do"] == "intervene":
        import torch.nn.utils.stateless
        seen, keep = {}, {}
        net.avgpool.register_forward_hook(lambda m, i, o: seen.__setitem__("features", o.flatten(1)))
        for k, p in net.named_parameters():
            if p.dim() == 4:
                keep[k] = (torch.arange(p.shape[0]) % 100 != 99).float().view(-1, 1, 1, 1)
    step = {"train": train, "infer": infer, "intervene": intervene}[work["do"]]
    if work["do"] == "infer":
        net.eval()
    best, setting = None, work["threads"]
    for threads in sorted({1, work["threads"]}):
        torch.set_num_threads(threads)
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        if best is None or seconds < best:
            best, setting = seconds, threads
    torch.set_num_threads(setting)
    return step, "torch %s, %d thread%s%s" % (torch.__version__, setting, "s" * (setting > 1), slow_blas())


def onnx_step(work):
    import numpy
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work["threads"]
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(work["file"], options, providers=["CPUExecutionProvider"])
    x = numpy.random.RandomState(0).randn(work["batch"], 3, 224, 224).astype(numpy.float32)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x}), "onnxruntime " + onnxruntime.__version__


def worker(kind):
    step = None
    for line in sys.stdin:
        work = json.loads(line)
        if work.get("export"):
            import torch
            net = torch_net(torch, work).eval()
            torch.onnx.export(net, torch.randn(work["batch"], 3, 224, 224), work["export"], opset_version=14)
            answer = {}
        elif work.get("save"):
            import torch
            torch.save(torch_net(torch, work).state_dict(), work["save"])
            answer = {}
        elif "do" in work:
            step, name = (onnx_step if kind == "onnx" else torch_step)(work)
            step()
            answer = {"peer": name}
        else:
            seconds, cpu, began = [], [], time.perf_counter()
            step()
            while len(seconds) < 3 or time.perf_counter() - began < 2.0:
                start, start_cpu = time.perf_counter(), time.process_time()
                step()
                seconds.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            answer = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu),
                      "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print("answer " + json.dumps(answer), flush=True)


START = """
import sys, torch, torchvision
torch.set_num_threads(int(sys.argv[3]))
net = torchvision.models.resnet50()
net.load_state_dict(torch.load(sys.argv[1]))
net.eval()
with open(sys.argv[2], 'rb') as f: pixels = f.read()[-3 * 224 * 224:]
x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, 224, 224, 3).permute(0, 3, 1, 2) / 255.
with torch.no_grad(): print(int(net((x - .45) / .22).argmax()))
"""


def has_avx512():
    try:
        with open("/proc/cpuinfo") as f:
            return "avx512f" in f.read()
    except OSError:
        return False


class Peer:
    """A worker process; ask() hands it a line and waits for the answer."""

    def __init__(self, python, kind):
        environment = dict(os.environ)
        if environment.get("SPURMEM_ISA") == "avx2":
            environment.update(OPENBLAS_CORETYPE="Haswell", ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
        elif has_avx512():  # OpenBLAS takes processors younger than itself for plain AVX2 ones
            environment.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
        self.process = subprocess.Popen([python, os.path.abspath(__file__), "--worker", kind], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)

    def ask(self, work):
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line[7:])
        raise RuntimeError("the peer ended early")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def find_pythons():
    """Which Python has which peer."""
    found = {}
    for kind, modules in (("torch", "torch, torchvision"), ("onnx", "onnxruntime, numpy")):
        for python in (os.environ.get("PYTHON"), "python3", "/usr/bin/python3"):
            if not python:
                continue
            try:
                done = subprocess.run([python, "-c", "import " + modules], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL)
            except OSError:
                continue
            if done.returncode == 0:
                found[kind] = python
                break
    return found


# ---- the rows ----

def ours(options, only, further, threads):
    """One turn of spurmem: the row of its JSON, and what the machine gives as many threads."""
    command = [options.spurmem, "bench", "--only", only, "--threads", str(threads), "--json", "-"] + further
    command += options.extra.split()
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return dict(said["results"][0], machine=(said["peak_gflops"], said["copy_gbytes"]))


def turn(command):
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(options, row, pythons, folder):
    """[(spurmem seconds, peer seconds, and processor seconds where known)] by rounds, the peer's name, peak bytes of both (0: not known)."""
    name, only, further, kinds, work, _ = row
    kind = next((k for k in kinds if k in pythons or k in ("self", "inside")), None)
    rounds, memory = [], [0, 0]
    if kind is None or (kind == "onnx" and "torch" not in pythons):
        return None, " and ".join(kinds), memory
    if kind == "inside":
        for _ in range(options.rounds):
            one = ours(options, only, further, options.threads)
            rounds.append((one["seconds"], one["seconds"] * one["times_faster"]))
        return rounds, "every pass in full", memory
    if kind == "self":
        machine, title = [], work["title"]
        for _ in range(options.rounds):
            us = ours(options, only, further, options.threads)
            them = ours(options, only, work.get("options", further), work.get("threads", options.threads))
            rounds.append((us["seconds"], them["seconds"]))
            machine.append([a / b for a, b in zip(us["machine"], them["machine"])])
        if "threads" in work:
            title += "; the machine: %.2f in FMA, %.2f in copies" % tuple(map(statistics.median, zip(*machine)))
        return rounds, title, memory
    if work["do"] == "start":
        maker = Peer(pythons["torch"], "torch")
        saved, picture = os.path.join(folder, "net.pth"), os.path.join(folder, "picture.ppm")
        maker.ask(dict(work, save=saved, classes=1000))
        maker.close()
        with open(picture, "wb") as f:
            f.write(b"P6\n224 224\n255\n" + bytes(i * 7 % 251 for i in range(3 * 224 * 224)))
        subprocess.run([options.spurmem, "convert", saved, saved[:-3] + "safetensors", "--quiet"],
                       stdout=subprocess.DEVNULL, check=True)
        us = [options.spurmem, "predict", "--checkpoint", saved[:-3] + "safetensors", "--arch", work["net"], "--threads",
              str(options.threads), "--quiet", picture]
        them = [pythons["torch"], "-c", START, saved, picture, str(options.threads)]
        turn(us), turn(them)
        return [(turn(us), turn(them)) for _ in range(options.rounds)], "torch, from import to answer", memory
    work = dict(work, threads=options.threads)
    if kind == "onnx":
        work["file"] = os.path.join(folder, "%s-%d.onnx" % (work["net"], work["batch"]))
        maker = Peer(pythons["torch"], "torch")
        maker.ask(dict(work, export=work["file"]))
        maker.close()
    peer = Peer(pythons[kind], kind)
    try:
        title = peer.ask(work)["peer"]
        for _ in range(options.rounds):
            us, them = ours(options, only, further, options.threads), peer.ask({})
            rounds.append((us["seconds"], them["seconds"], us["cpu_seconds"], them["cpu_seconds"]))
            memory = [max(memory[0], us["peak_bytes"]), max(memory[1], them["peak_bytes"])]
    finally:
        peer.close()
    return rounds, title, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="names of rows; all if none is given")
    parser.add_argument("--list", action="store_true", help="the names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spurmem", default="build/spurmem")
    parser.add_argument("--extra", default="", help="further options of spurmem bench, e.g. '--precision bf16'")
    parser.add_argument("--isa", choices=["avx2"], help="no instructions beyond these, for spurmem and its peers")
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    if options.isa:
        os.environ["SPURMEM_ISA"] = options.isa
    known = [row[0] for row in ROWS]
    if options.list:
        return print("\n".join(known))
    unknown = [name for name in options.rows if name not in known]
    if unknown:
        sys.exit("peers.py: no row %s; there are %s" % (unknown[0], ", ".join(known)))
    if not os.path.exists(options.spurmem):
        sys.exit("peers.py: %s is not there; make builds it, --spurmem names another" % options.spurmem)
    pythons = find_pythons()
    if options.markdown:
        print("| work | spurmem | peer | ratio | range | wanted |\n|---|---|---|---|---|---|")
    for row in ROWS:
        if options.rows and row[0] not in options.rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rounds, title, memory = measure(options, row, pythons, folder)
        if rounds is None:
            print("%-20s left out: no Python with %s" % (row[0], title), flush=True)
            continue
        ratios = [turns[1] / turns[0] for turns in rounds]
        ratio = statistics.median(ratios)
        mine, theirs = (1e3 * statistics.median(pair[i] for pair in rounds) for i in (0, 1))
        line = (row[0], mine, theirs, ratio, min(ratios), max(ratios), row[5])
        if options.markdown:
            print("| %s | %.0f ms | %.0f ms (%s) | %.2f | %.2f-%.2f | %.2f |" % (line[:3] + (title,) + line[3:]), flush=True)
        else:
            print("%-20s %9.1f ms  peer %9.1f ms  ratio %5.2f (%.2f to %.2f)  wanted %.2f" % line, end="")
            if len(rounds[0]) > 2:
                print("  by processor time %5.2f" % statistics.median(turns[3] / turns[2] for turns in rounds), end="")
            print("  " + title, end="")
            print("  %.2f of %.2f GB" % (memory[0] * 1e-9, memory[1] * 1e-9) if memory[1] else "", flush=True)


if __name__ == "__main__":
    main()
