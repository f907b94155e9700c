#!/usr/bin/env python3
"""Prints the tables of tests/test_jpeg.c.  Made with Pillow 9.4.0 on libjpeg-turbo 2.1.5 and its cjpeg 2.1.5.

usage: make_jpeg.py [CJPEG]"""
import hashlib, io, subprocess, sys, tempfile
from PIL import Image


def picture(w, h):
    """The picture that the test draws itself."""
    return Image.frombytes("RGB", (w, h), bytes((x * (7 + 2 * c) + y * (13 - 3 * c) + x * y * (c + 1) // 5) & 255
                                                for y in range(h) for x in range(w) for c in range(3)))


def sha(data):
    return hashlib.sha256(data).hexdigest()


def decoded(data, scale=1):
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(None, (max(1, image.size[0] // scale), max(1, image.size[1] // scale)))
        assert image.decoderconfig[0] == scale
    return image.convert("RGB")


print("/* encoder */")
for w, h, q, half in ((40, 24, 75, 1), (37, 21, 90, 0), (17, 33, 30, 1), (1, 1, 50, 1), (9, 1, 100, 0), (16, 16, 1, 1),
                      (250, 3, 95, 1)):
    out = io.BytesIO()
    picture(w, h).save(out, "JPEG", quality=q, subsampling=2 if half else 0)
    data = out.getvalue()
    print('    {%d, %d, %d, %d, "%s",\n     "%s"},' % (w, h, q, half, sha(data), sha(decoded(data).tobytes())))

print("/* scaled */")
out = io.BytesIO()
picture(75, 83).save(out, "JPEG", quality=85, subsampling=2)
for s in (2, 4, 8):
    image = decoded(out.getvalue(), s)
    print('    {%d, %d, %d, "%s"},' % (s, image.size[0], image.size[1], sha(image.tobytes())))

print("/* files */")
cjpeg = sys.argv[1] if len(sys.argv) > 1 else "cjpeg"


def made(options, mode="RGB", cut=None, w=35, h=29):
    with tempfile.NamedTemporaryFile(suffix=".ppm") as file:
        picture(w, h).convert(mode).save(file.name, "PPM")
        data = subprocess.run([cjpeg] + options + [file.name], capture_output=True, check=True).stdout
    return data if cut is None else data[:cut] + b"\xff\xd9"


cmyk = io.BytesIO()
picture(19, 11).convert("CMYK").save(cmyk, "JPEG", quality=20)
files = [("progressive 2x2 with restarts", made(["-quality", "10", "-progressive", "-restart", "2B"])),
         ("baseline 2x1 with restarts", made(["-quality", "10", "-sample", "2x1", "-optimize", "-restart", "1"])),
         ("baseline 1x2", made(["-quality", "10", "-sample", "1x2", "-optimize"])),
         ("gray, progressive, later scans missing", made(["-quality", "50", "-progressive"], "L", 420)),
         ("baseline cut short, with end marker", made(["-quality", "50", "-optimize"], "RGB", 500)),
         ("RGB with chroma 4x2", made(["-quality", "10", "-rgb", "-sample", "4x2", "-optimize"])),
         ("CMYK", cmyk.getvalue())]
for name, data in files:
    image = decoded(data)
    text = data.hex()
    lines = "\n".join('     "%s"' % text[i:i + 110] for i in range(0, len(text), 110))
    print('    {"%s", %d, %d,\n     "%s",\n%s},' % (name, image.size[0], image.size[1], sha(image.tobytes()), lines))
