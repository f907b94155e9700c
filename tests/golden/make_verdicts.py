#!/usr/bin/env python3
"""Pictures whole, cut off and damaged, and what Pillow 9.4 says to each.

make_verdicts.py make FILE         writes verdicts.bin (Pillow 9.4.0 with libjpeg-turbo 2.1.5 and zlib 1.2.13 made it)
make_verdicts.py check FILE        0: Pillow says the same as FILE, 1: it does not, 2: no Pillow 9.4 here
make_verdicts.py bulk LIBRARY SEED N [png|jpeg|ppm]
    N pictures drawn from SEED through spurmem (cc -shared -fPIC tests/spurmem.c) and Pillow: verdict and pixels are
    compared, what differs is printed and kept as verdict_*.bin

verdicts.bin: of each picture, bytes in the file (2, little-endian), the file, CRC-32 of its RGB pixels (0: refused),
and for 0, 1, 2 ... all bytes of it a bit (lowest first) that tells whether Pillow reads that much of it.

Known differences, which the pictures here leave out and bulk mode may show: arithmetic-coded JPEG (not read here);
16-bit gray (Pillow clips it); the first frame of an APNG that claims to be smaller than the picture; an IHDR that is
not the first chunk, or not the only one; plain PPM cut off inside a number, which Pillow repeats until the picture is
full."""
import ctypes, io, os, random, struct, sys, warnings, zlib
try:
    import PIL
    from PIL import Image
except ImportError:
    sys.exit(2)

r = random.Random(1)


def some(n):
    return bytes(r.choice([0, 0, 1, 255, r.randrange(256)]) for _ in range(n))


# ---- PNG ----

def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def extra():
    """A chunk beside the pixels: what is in it may be too short, too long, out of turn or right."""
    b = some(r.randrange(12))
    text = zlib.compress(b"q" * r.choice([5, 100, 1 << 20, (1 << 20) + 1, 3 << 20])) if r.random() < .2 else r.choice([b, b""])
    kind = r.randrange(20)
    if kind == 0: return chunk(b"gAMA", b[:r.choice([3, 4, 5])])
    if kind == 1: return chunk(b"cHRM", bytes(r.choice([0, 4, 8, 31, 32, 33])))
    if kind == 2: return chunk(b"sRGB", b[:r.randrange(3)])
    if kind == 3: return chunk(b"pHYs", (b + bytes(9))[:r.choice([8, 9, 10])])
    if kind == 4: return chunk(b"acTL", struct.pack(">II", r.choice([0, 1, 2, 1 << 31, (1 << 31) + 1]), 1)[:r.choice([7, 8, 8])])
    if kind == 5: return chunk(b"fcTL", struct.pack(">6IHBB", r.choice([0, 0, 1]), 7, 5, r.choice([0, 0, 0, 1]), 0, 1, 0, 0, 0)
                               [:r.choice([25, 26, 26, 26])])
    if kind == 6: return chunk(b"fdAT", struct.pack(">I", r.choice([0, 1, 2]))[:r.choice([3, 4, 4])] + b)
    if kind == 7: return chunk(b"iCCP", r.choice([b"", b"n\0\0", b"n\0\1", b"nnn", b"\0", b"n\0"]) + text)
    if kind == 8: return chunk(b"zTXt", r.choice([b"k\0\0", b"k\0\0", b"k\0\1", b"k", b"k\0", b""]) + text)
    if kind == 9: return chunk(b"iTXt", r.choice([b"k\0\0\0l\0t\0", b"k\0\1\0l\0t\0", b"k\0\1\1l\0t\0", b"k\0", b"k\0\1\0l\0"]) + text)
    if kind == 10: return chunk(b"PLTE", bytes(r.randrange(256) for _ in range(r.choice([0, 1, 3, 6, 7, 48, 768, 769, 771]))))
    if kind == 11: return chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, r.choice([0, 1]), r.choice([0, 0, 1]), 0)
                                [:r.choice([12, 13, 14])])
    if kind == 12: return chunk(bytes(r.choice(b"aZ_9\xff ") for _ in range(4)), b)
    return chunk(r.choice([b"tRNS", b"tEXt", b"eXIf", b"bKGD", b"sBIT", b"hIST", b"tIME", b"IDAT"]), b)


def png():
    depth, color = r.choice([(8, 2), (8, 2), (8, 0), (8, 3), (4, 3), (1, 0), (2, 3), (8, 6), (16, 2), (8, 4), (16, 6)])
    interlaced, (w, h) = r.choice([0, 0, 1]), r.choice([(7, 5), (7, 5), (1, 1), (9, 3), (3, 12)])
    raw, pieces = b"", r.choice([[], [3], [10, 0, 5], [1] * 300, [40, 40]])
    for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)) \
            if interlaced else ((0, 0, 1, 1),):
        wide = len(range(x0, w, dx)) * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] * depth
        for _ in range(y0, h, dy) if wide else ():
            raw += bytes([r.randrange(5)]) + bytes(r.choice([7, 7, r.randrange(256)]) for _ in range((wide + 7) // 8))
    packed = zlib.compress(raw + r.choice([b"", b"", b"12345", bytes(50)]), r.choice([0, 9]))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, interlaced))
    data += b"".join(extra() for _ in range(r.choice([0, 0, 1, 2])))
    if color == 3: data += chunk(b"PLTE", some(3 * min(1 << depth, 20)))
    while packed:
        n = pieces.pop(0) if pieces else len(packed)
        data += chunk(b"IDAT", packed[:n])
        packed = packed[n:]
    data += b"".join(extra() for _ in range(r.choice([0, 0, 1, 2]))) + chunk(b"IEND", b"")
    data, what = bytearray(data), r.randrange(8)
    if what == 1: data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    if what == 2: data[-12:] = r.choice([b"", b"\0", b"\0\0\0\0IENx", b"\0\0\0\5abcd12", bytes(30)])
    if what == 3: data[r.randrange(data.find(b"IDAT"), len(data))] ^= 255
    return bytes(data)


# ---- JPEG ----

def segments(data):
    """[marker, payload, entropy-coded data behind it] of a file that Pillow wrote."""
    found, i = [], 2
    while i + 4 <= len(data) and data[i + 1] != 0xD9:
        n = struct.unpack(">H", data[i + 2:i + 4])[0]
        j = i + 2 + n
        if data[i + 1] == 0xDA:
            while not (data[j] == 255 and data[j + 1] and not 0xD0 <= data[j + 1] <= 0xD7): j += 1
        found.append([data[i + 1], data[i + 4:i + 2 + n], data[i + 2 + n:j]])
        i = j
    return found + [[0xD9, b"", b""]]


def joined(parts, fill=False, junk=False):
    data = b"\xff\xd8"
    for marker, body, coded in parts:
        if fill: data += b"\xff" * r.randrange(3)
        if junk: data += bytes(r.randrange(255) for _ in range(r.randrange(3)))
        data += bytes([255, marker]) + (b"" if marker == 0xD9 else struct.pack(">H", len(body) + 2) + body) + coded
    return data


def damage_jpeg(data):
    """One of many kinds of oddness or damage, most of them in the markers."""
    parts = segments(data)
    frame = next((p for p in parts if p[0] in (0xC0, 0xC1, 0xC2)), parts[0])
    scans = [p for p in parts if p[0] == 0xDA] or [[0, b"\0", b""]]
    kind = r.randrange(24)
    if kind == 0: return joined(parts, fill=True)
    if kind == 1: return joined(parts, junk=True)
    if kind == 2:  # 16-bit quantisers
        for p in parts:
            if p[0] == 0xDB:
                p[1] = b"".join(bytes([p[1][i] | 16]) + b"".join(bytes([r.random() < .02, x]) for x in p[1][i + 1:i + 65])
                                for i in range(0, len(p[1]), 65))
    if kind == 3:
        parts = [p for p in parts if p[0] != 0xEE and (p[0] != 0xE0 or r.random() < .6)]
        parts.insert(r.randrange(2), [0xEE, b"Adobe\0d\0\0\0\0" + bytes([r.randrange(4)]) + some(r.choice([0, 0, 2])), b""])
    if kind == 4: parts = [p for p in parts if p[0] not in (0xE0, 0xEE)]
    if kind == 5:  # names of components
        parts = [p for p in parts if p[0] != 0xE0]
        names, body = r.choice([b"RGB4", b"rgb4", b"\0\1\2\3", b"\1\1\1\1", b"CMYK"]), bytearray(frame[1])
        old = body[6::3]
        body[6::3] = names[:len(old)]
        frame[1] = bytes(body)
        for s in scans:
            body = bytearray(s[1])
            for i in range(1, 1 + 2 * body[0], 2): body[i] = names[old.index(body[i])] if body[i] in old else body[i]
            s[1] = bytes(body)
    if kind in (6, 7):  # restart markers lost, doubled, renumbered, misplaced
        coded = bytearray(scans[0][2])
        at = [i for i in range(len(coded) - 1) if coded[i] == 255 and coded[i + 1]]
        if at:
            i, way = r.choice(at), r.randrange(5)
            if way == 0: del coded[i:i + 2]
            if way == 1: coded[i:i] = coded[i:i + 2]
            if way == 2: coded[i + 1] = 0xD0 + r.randrange(8)
            if way == 3: coded[i:i] = bytes(r.randrange(255) for _ in range(r.randrange(1, 6)))
            if way == 4: del coded[max(0, i - 3):i]
        scans[0][2] = bytes(coded)
    if kind == 8: parts.insert(r.randrange(len(parts)), [r.choice([0xDC, 0xDD, 0xFE, 0xE1, 0xE2, 0xED, 0xDB, 0xC4, 0xF0, 0xC8, 0xDF]),
                                                         some(r.choice([0, 2, 2, 5, 17, 65])), b""])
    if kind == 9: parts.insert(r.randrange(len(parts)), list(r.choice(parts)))
    if kind == 10: del parts[r.randrange(len(parts))]
    if kind == 11: i, j = r.randrange(len(parts)), r.randrange(len(parts)); parts[i], parts[j] = parts[j], parts[i]
    if kind == 12: return data + some(20)
    if kind in (13, 14, 15):
        data = bytearray(data)
        for _ in range(r.choice([1, 1, 2, 5])): data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        return bytes(data)
    if kind == 16 and len(scans) > 1: parts.remove(r.choice(scans[1:]))
    if kind in (17, 18):
        s = r.choice(scans)
        coded = bytearray(s[2] or b"\0")
        i, way = r.randrange(len(coded)), r.randrange(4)
        if way == 0: coded[i:i] = b"\xff"
        if way == 1: coded[i:i] = bytes([255, r.choice([1, 2, 0xC8, 0xD0, 0xD8, 0xD9, 0xFE])])
        if way == 2: del coded[i:i + r.randrange(1, 9)]
        if way == 3: del coded[i:]
        s[2] = bytes(coded)
    if kind == 19: parts[:1] = [[0xE0, r.choice([b"JFIF\0\1\1\0\0\1\0\1\2\2" + bytes(12), b"JFIF\0\2\1\0\0\1\0\1\0\0", b"JFIF\0",
                                                 b"JFXX\0\x13\1\1abc", b""]), b""]]
    if kind == 20: parts[1:1] = [[0xFE, b"", b""], [0xDD, struct.pack(">H", r.choice([0, 1, 2, 100])), b""]]
    if kind in (21, 22) and len(frame[1]) > 8:
        body = bytearray(frame[1])
        if kind == 21: body[r.choice([2, 4])] = r.randrange(70)
        else: body[7 + 3 * r.randrange(body[5])] = r.choice([0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x31, 0x33, 0, 0x51])
        frame[1] = bytes(body)
    if kind == 23 and r.random() < .5: frame[0] = r.choice([0xC0, 0xC1, 0xC2, 0xC3, 0xC5])
    return joined(parts)


def jpeg():
    w, h = r.choice([(1, 1), (1, 17), (19, 1), (2, 2), (7, 9), (8, 8), (9, 8), (17, 33), (33, 24), (5, 100)])
    a, b, noise = r.randrange(1, 9), r.randrange(1, 9), r.choice([1, 60])
    picture = Image.new("RGB", (w, h))
    picture.putdata([((x * a * 3 + y) % 256, (y * b * 5 + r.randrange(noise)) % 256, x * y // 3 % 256) for y in range(h) for x in range(w)])
    file, options = io.BytesIO(), {}
    if r.random() < .3: options["comment"] = some(r.choice([0, 5]))
    picture = picture.convert(r.choice(["RGB", "RGB", "RGB", "L", "CMYK"]))
    picture.save(file, "JPEG", quality=r.choice([5, 50, 75, 95, 100]), subsampling=r.choice([0, 1, 2]),
                 progressive=r.random() < .4, optimize=r.random() < .2, **options)
    data = file.getvalue()
    if r.random() < .3:  # restart intervals, which Pillow does not write: of two MCUs that its decoder takes for one
        parts = segments(data)
        parts.insert(1, [0xDD, b"\0\1", b""])
        data = joined(parts)
    for _ in range(r.choice([0, 1, 1, 2])):
        try: data = damage_jpeg(data)
        except (IndexError, ValueError): pass  # damaged too far to be damaged again
    return data


# ---- PPM, PGM, PBM ----

def ppm():
    kind, w, h, most = r.randrange(1, 7), r.randrange(1, 12), r.randrange(1, 5), r.choice([255, 255, 1, 2, 100, 254, 256, 65535, 65536, 0])
    space = lambda: r.choice([b" ", b"\n", b"\t", b"\r\n", b"\n#c 1 2\n", b" # x\n", b"\x0b", b"\x0c"])
    one_bit, n = kind % 3 == 1, w * h * (3 if kind % 3 == 0 else 1)
    data = b"P%d%s%d%s%d" % (kind, space(), w, space(), h)
    if not one_bit: data += b"%s%d" % (space(), most)
    if kind < 4:
        data += space() + b"".join(b"%d%s" % (r.randrange(2 if one_bit else most + 1), space()) for _ in range(n))
    else: data += r.choice([b" ", b"\n", b"\t"]) + bytes(r.randrange(256) for _ in range(
        (w + 7) // 8 * h if one_bit else n * (1 + (most > 255))))
    data = bytearray(data)
    what = r.randrange(6)
    if what == 1: data[r.randrange(len(data))] = r.choice(b"0123456789 #\n-+.aP\xff")
    if what == 2 and kind != 1: data += b"12 13 xx"
    if what == 3: data.insert(r.randrange(len(data)), r.choice(b"0 #\n"))
    return bytes(data)


# ---- verdicts ----

def pillow(data):
    """RGB bytes (None: refused), whether the pixels may be compared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
            return image.size, image.convert("RGB").tobytes(), not image.mode.startswith("I")
    except Exception: return None, None, False


def golden():
    out = b""
    for make, wanted, most in ((png, 110, 260), (jpeg, 40, 800), (ppm, 40, 200)):
        while wanted:
            data = make()
            if len(data) > most or b"fcTL" in data[:200] or data.count(b"IHDR") > 1 or (make == ppm and data[1] < 52): continue
            if make == jpeg and any(b"\xff" + bytes([m]) in data for m in (0xC9, 0xCA, 0xCB)): continue
            wanted -= 1
            _, pixels, sure = pillow(data)
            bits = 0
            for cut in range(len(data) + 1): bits |= (pillow(data[:cut])[1] is not None) << cut
            out += struct.pack("<H", len(data)) + data + struct.pack("<I", zlib.crc32(pixels) if pixels and sure else 0)
            out += bits.to_bytes((len(data) + 8) // 8, "little")
    return out


def bulk(library, seed, n, kinds):
    class Picture(ctypes.Structure):
        _fields_ = [("pixels", ctypes.c_void_p), ("width", ctypes.c_int), ("height", ctypes.c_int)]

    class Error(ctypes.Structure):
        _fields_ = [("text", ctypes.c_char * 496), ("status", ctypes.c_int)]
    lib = ctypes.CDLL(os.path.abspath(library))
    lib.spm_context_create.restype = ctypes.c_void_p
    ctx, differ = ctypes.c_void_p(lib.spm_context_create(None)), 0
    r.seed(seed)
    for i in range(n):
        data = r.choice(kinds)()
        if r.random() < .15 and data[:1] != b"P": data = data[:r.randrange(len(data) + 1)]
        image, err = Picture(), Error()
        lib.spm_image_decode(ctx, b"picture", data, ctypes.c_size_t(len(data)), None, ctypes.byref(image), ctypes.byref(err))
        size, pixels, sure = pillow(data)
        mine = ctypes.string_at(image.pixels, image.width * image.height * 3) if image.pixels else None
        if (mine is None) != (pixels is None) or (sure and (size != (image.width, image.height) or mine != pixels)):
            differ += 1
            print("verdict_%d_%d.bin: %s" % (seed, i, "Pillow refuses" if pixels is None else err.text.decode(errors="replace")
                                             if mine is None else "other pixels"))
            with open("verdict_%d_%d.bin" % (seed, i), "wb") as file: file.write(data)
        lib.spm_image_free(ctx, ctypes.byref(image))
    print("%d pictures, %d differ" % (n, differ))


Image.MAX_IMAGE_PIXELS = None
if sys.argv[1:2] == ["bulk"]:
    bulk(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), [globals()[k] for k in sys.argv[5:]] or [png, jpeg, ppm])
elif not PIL.__version__.startswith("9.4"): sys.exit(2)
elif sys.argv[1] == "make":
    with open(sys.argv[2], "wb") as file: file.write(golden())
else:
    with open(sys.argv[2], "rb") as file: sys.exit(file.read() != golden())
