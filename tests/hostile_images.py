"""Files that are refused as images: cut short, damaged, lying, animated, of other formats, or no images at all."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> Image.Image:
    n_bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(seed).randbytes(width * height * n_bands))


@cache
def good_images() -> dict[str, bytes]:
    """A file of each kind that is accepted."""
    picture = noise()
    return {
        "png": encoded(picture, "PNG"),
        "png, palette": encoded(picture.quantize(16), "PNG"),
        "png, alpha": encoded(noise(mode="RGBA"), "PNG"),
        "jpeg": encoded(picture, "JPEG"),
        "jpeg, progressive": encoded(picture, "JPEG", progressive=True),
        "jpeg, cmyk": encoded(noise(mode="CMYK"), "JPEG"),
        "gif": encoded(picture, "GIF"),
        "webp": encoded(picture, "WEBP"),
        "webp, lossless": encoded(picture, "WEBP", lossless=True),
        "webp, alpha": encoded(noise(mode="RGBA"), "WEBP"),
        "bmp": encoded(picture, "BMP"),
        "bmp, palette": encoded(picture.quantize(16), "BMP"),
    }


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int = 4,
    height: int = 4,
    *,
    depth: int = 8,
    colour: int = 2,
    rows: bytes | None = None,
    extra: bytes = b"",
    interlaced: int = 0,
) -> bytes:
    """A PNG. Its rows are zeros unless `rows` are given, and `extra` chunks stand before them."""
    if rows is None:
        n_bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
        rows = bytes((1 + (min(width, 300) * n_bits + 7) // 8) * min(height, 300))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"".join(
        [
            PNG_MAGIC,
            png_chunk(b"IHDR", header),
            extra,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


def bmp(
    width: int, height: int, *, n_bits: int = 24, compression: int = 0, length: int = 40, offset: int = 54
) -> bytes:
    header = struct.pack("<IiiHHIIiiII", length, width, height, 1, n_bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 200, 0, 0, offset) + header + bytes(200)


def webp(*chunks: tuple[bytes, bytes], length: int | None = None) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body) if length is None else length) + b"WEBP" + body


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@cache
def hostile_images() -> dict[str, bytes]:
    """The files, by what is wrong with them."""
    images: dict[str, bytes] = {"empty": b"", "one byte": b"\x89", "zeros": bytes(5000)}
    for make in (_cut, _png, _jpeg, _gif, _webp, _bmp, _animated, _other_formats, _random):
        for name, data in make():
            assert name not in images
            images[name] = data
    return images


def _cut() -> Iterator[tuple[str, bytes]]:
    for name, data in good_images().items():
        for at in (1, 2, 4, 5, 7):
            yield f"{name}, cut at {at}/8", data[: len(data) * at // 8]
        for n_bytes in (1, 2, 5, 16):
            yield f"{name}, cut {n_bytes} from the end", data[:-n_bytes]
        yield f"{name}, its magic alone", data[:12]


def _png() -> Iterator[tuple[str, bytes]]:
    good = good_images()["png"]
    for name, at in (("header", 29), ("pixels", 60), ("checksum of the pixels", len(good) - 14)):
        yield f"png, wrong in its {name}", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for width, height in (
        (60000, 60000),
        (0, 4),
        (4, 0),
        (2**31, 1),
        (2**32 - 1, 2**32 - 1),
        (16385, 200),
        (9000, 9000),
        (13000, 13000),
    ):
        yield f"png, {width} x {height}", png(width, height)
    yield "png, 1000 x 4", png(1000, 4, rows=bytes(3001 * 4))
    yield "png, a row too few", png(rows=bytes(13 * 3))
    yield "png, no rows", png(rows=b"")
    yield "png, a byte too few", png(rows=bytes(13 * 4 - 1))
    yield "png, interlaced, a row too few", png(8, 8, colour=0, rows=bytes(70), interlaced=1)
    yield "png, an unknown filter of a row", png(rows=(b"\x09" + bytes(12)) * 4)
    yield "png, colour 5", png(colour=5)
    yield "png, 3 bits", png(depth=3, colour=0)
    yield "png, no pixels", PNG_MAGIC + good[8:33] + png_chunk(b"IEND", b"")
    yield "png, no header", PNG_MAGIC + png_chunk(b"IDAT", zlib.compress(bytes(52))) + png_chunk(b"IEND", b"")
    yield "png, two headers", good[:33] + good[8:]
    yield "png, a short header", PNG_MAGIC + png_chunk(b"IHDR", good[16:28]) + good[33:]
    yield "png, pixels that are not deflated", good[:33] + png_chunk(b"IDAT", b"rubbish") + png_chunk(b"IEND", b"")
    yield "png, an unknown critical chunk", png(extra=png_chunk(b"XYZW", b""))
    yield "png, a chunk of 2 GiB", good[:33] + b"\x7f\xff\xff\xffIDAT" + good[41:]
    bomb = zlib.compress(bytes(8 << 20), 9)
    yield "png, a bomb in iCCP", png(extra=png_chunk(b"iCCP", b"profile\0\0" + bomb))
    yield "png, a bomb in zTXt", png(extra=png_chunk(b"zTXt", b"comment\0\0" + bomb))
    yield "png, a bomb in iTXt", png(extra=png_chunk(b"iTXt", b"comment\0\1\0en\0comment\0" + bomb))
    small = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(512 << 10), 9))
    yield "png, many small bombs", png(extra=small * 20)
    yield "png, 200,000 empty chunks", png(extra=png_chunk(b"IDAT", b"") * 200_000)
    yield "png, then a jpeg", PNG_MAGIC + good_images()["jpeg"]


def _jpeg() -> Iterator[tuple[str, bytes]]:
    good, progressive = good_images()["jpeg"], good_images()["jpeg, progressive"]
    frame = good.index(b"\xff\xc0")
    scan = good.index(b"\xff\xda")
    for width, height in ((60000, 60000), (65535, 1), (0, 30), (40, 0), (16384, 4000), (13000, 13000)):
        yield f"jpeg, {width} x {height}", good[: frame + 5] + struct.pack(">HH", height, width) + good[frame + 9 :]
    for name, body in (("two sizes", good[frame : frame + 19]), ("a segment of length 0", b"\xff\xe5\0\0")):
        yield f"jpeg, {name}", good[:frame] + body + good[frame:]
    yield "jpeg, a segment that goes on beyond the end", good[:2] + b"\xff\xe1\xff\xff" + good[2:60]
    yield "jpeg, no tables", good[:20] + good[frame : frame + 19] + good[scan:]
    yield "jpeg, a bad quantization table", good[:20] + jpeg_segment(0xDB, b"\0" * 10) + good[20:]
    yield "jpeg, a bad Huffman table", good[:20] + jpeg_segment(0xC4, b"\0" + b"\xff" * 16) + good[20:]
    yield "jpeg, no picture", b"\xff\xd8\xff\xe0\0\2\xff\xd9"
    yield "jpeg, no size", good[:frame] + good[frame + 19 :]
    yield "jpeg, no scan", good[:scan] + b"\xff\xd9"
    yield "jpeg, 12 bits", good[: frame + 4] + b"\x0c" + good[frame + 5 :]
    yield "jpeg, 2 components", good[: frame + 9] + b"\2" + good[frame + 10 :]
    yield "jpeg, lossless", good[: frame + 1] + b"\xc3" + good[frame + 2 :]
    yield "jpeg, hierarchical", good[:frame] + b"\xff\xde" + good[frame + 2 : frame + 19] + good[frame:]
    yield "jpeg, within a jpeg", good[:2] + good
    last = progressive.rindex(b"\xff\xc4")
    yield "jpeg, a thousand scans", progressive[:-2] + progressive[last:-2] * 1000 + b"\xff\xd9"
    yield "jpeg, a million segments", good[:2] + b"\xff\xfe\0\2" * 1_000_000 + good[2:]
    yield "jpeg, padded without end", b"\xff\xd8" + b"\xff" * 1_000_000
    yield "jpeg, junk without end", b"\xff\xd8\xff\xe0\0\2" + b"\0\xff" * 500_000


def _gif() -> Iterator[tuple[str, bytes]]:
    screen = struct.pack("<6sHHBBB", b"GIF89a", 4, 4, 0x80, 0, 0) + bytes(6)
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 4, 4, 0)
    yield "gif, 65535 x 65535", struct.pack("<6sHHBBB", b"GIF89a", 65535, 65535, 0, 0, 0) + good_images()["gif"][13:]
    yield "gif, 0 x 0", struct.pack("<6sHHBBB", b"GIF89a", 0, 0, 0, 0, 0) + good_images()["gif"][13:]
    yield "gif, a frame of 65535 x 65535", screen + struct.pack("<BHHHHB", 0x2C, 0, 0, 65535, 65535, 0) + b"\2\1\0\0;"
    yield (
        "gif, a frame of 60000 x 60000 to be disposed of",
        screen + b"!\xf9\4\x08\0\0\0\0" + struct.pack("<BHHHHB", 0x2C, 0, 0, 60000, 60000, 0) + b"\2\1\0\0;",
    )
    yield (
        "gif, 13000 x 13000 to be disposed of",
        struct.pack("<6sHHBBB", b"GIF89a", 13000, 13000, 0x80, 0, 0)
        + bytes(6)
        + b"!\xf9\4\x08\0\0\0\0"
        + struct.pack("<BHHHHB", 0x2C, 0, 0, 13000, 13000, 0)
        + b"\2\1\0\0;",
    )
    yield "gif, a frame of 0 x 0", screen + struct.pack("<BHHHHB", 0x2C, 0, 0, 0, 0, 0) + b"\2\1\0\0;"
    yield "gif, a frame beside its screen", screen + struct.pack("<BHHHHB", 0x2C, 3, 3, 4, 4, 0) + b"\2\1\0\0;"
    yield "gif, no frame", screen + b";"
    yield "gif, sub-blocks without end", screen + b"!\xfe" + b"\1a" * 1_000_000
    yield "gif, extensions without end", screen + b"!\xfe\0" * 500_000
    yield "gif, a frame of sub-blocks without end", screen + frame + b"\2" + b"\1\0" * 500_000 + b"\0;"
    yield "gif, no pixels", screen + frame + b"\2\0;"
    yield "gif, an end before its pixels", screen + frame + b"\2\1\x2c\0;"
    yield "gif, a code that does not exist", screen + frame + b"\2\2\xfc\xff\0;"
    yield "gif, codes of 13 bits", screen + frame + b"\x0d\2\0\0\0;"
    yield "gif, an unknown block", screen + b"\x55" + frame + b"\2\2\x44\1\0;"
    yield "gif, a script as well", b"GIF89a/*" + bytes(6) + b"*/=1;alert(1);//"


def _webp() -> Iterator[tuple[str, bytes]]:
    good, lossless = good_images()["webp"], good_images()["webp, lossless"]
    canvas = struct.pack("<I", 0) + (59999).to_bytes(3, "little") * 2
    yield "webp, 60000 x 60000", webp((b"VP8X", canvas), (b"VP8 ", good[20:]))
    yield "webp, 13000 x 13000", webp((b"VP8X", bytes(4) + (12999).to_bytes(3, "little") * 2), (b"VP8 ", good[20:]))
    yield "webp, 2^24 x 2^24", webp((b"VP8X", bytes(4) + b"\xff" * 6), (b"VP8 ", good[20:]))
    yield "webp, 16383 x 16383", good[:26] + b"\xff\x3f\xff\x3f" + good[30:]
    yield "webp, 0 x 0", good[:26] + bytes(4) + good[30:]
    yield "webp, lossless, 16384 x 16384", lossless[:21] + b"\xff\xff\xff\x0f" + lossless[25:]
    yield "webp, a canvas of another size", webp((b"VP8X", bytes(4) + b"\x09\0\0" * 2), (b"VP8 ", good[20:]))
    yield "webp, no picture", webp()
    yield "webp, a canvas alone", webp((b"VP8X", bytes(4) + b"\x09\0\0" * 2))
    yield "webp, an empty picture", webp((b"VP8 ", b""))
    yield "webp, no key frame", good[:20] + bytes([good[20] | 1]) + good[21:]
    yield "webp, longer than it is", webp((b"VP8 ", good[20:]), length=2**32 - 1)
    yield "webp, a chunk longer than the file", webp((b"VP8 ", good[20:]))[:16] + b"\xff\xff\xff\x7f" + good[20:]
    yield "webp, 200,000 chunks", webp(*[(b"JUNK", b"")] * 200_000, (b"VP8 ", good[20:]))
    yield "a sound", b"RIFF\x24\0\0\0WAVEfmt " + bytes(24)


def _bmp() -> Iterator[tuple[str, bytes]]:
    for width, height in (
        (0, 4),
        (4, 0),
        (-4, 4),
        (60000, 60000),
        (60000, -60000),
        (13000, 13000),
        (2**31 - 1, 1),
        (4, -(2**31)),
    ):
        yield f"bmp, {width} x {height}", bmp(width, height)
    yield "bmp, 4 x 2,000", bmp(4, 2000)
    yield "bmp, fewer rows than it says", bmp(40, 40)
    yield "bmp, compressed by run length", bmp(4, 4, n_bits=8, compression=1)
    yield "bmp, a jpeg inside", bmp(4, 4, compression=4)
    yield "bmp, 65535 bits", bmp(4, 4, n_bits=65535)
    yield "bmp, masks that are none", bmp(4, 4, n_bits=16, compression=3)
    yield "bmp, a header of 4 GiB", bmp(4, 4, length=2**32 - 1)
    yield "bmp, a header of 0 bytes", bmp(4, 4, length=0)
    yield "bmp, pixels beyond the end", bmp(4, 4, offset=2**32 - 1)
    yield "bmp, in words", b"BM is what this text begins with, and it is quite long enough to be a header."


def _animated() -> Iterator[tuple[str, bytes]]:
    frames = [noise(seed=seed) for seed in range(4)]
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"animated {kind}", encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    control = struct.pack(">I", 2**32 - 1) + bytes(4)
    yield "png, 2^32 - 1 frames", png(extra=png_chunk(b"acTL", control))
    yield "png, 0 frames", png(extra=png_chunk(b"acTL", bytes(8)))
    yield "png, frames in 2 bytes", png(extra=png_chunk(b"acTL", b"\0\1"))
    yield "png, frames twice", png(extra=png_chunk(b"acTL", bytes(8)) * 2)
    gif = good_images()["gif"]
    frame = gif[gif.index(b"\x2c\0\0\0\0") : -1]
    yield "gif, 10,000 frames", gif[:-1] + frame[:11] * 10_000 + b";"


def _other_formats() -> Iterator[tuple[str, bytes]]:
    picture = noise()
    for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "PDF", "EPS", "XBM", "DIB"):
        image = picture.convert("1") if kind == "XBM" else picture
        try:
            yield kind.lower(), encoded(image, kind)
        except (KeyError, OSError):  # this Pillow does not write it
            yield kind.lower(), kind.encode()
    yield "psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30, 40, 8, 3) + bytes(12)
    yield "heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    yield "avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100)
    yield "jpeg xl", b"\xff\x0a" + bytes(50)
    yield "svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    yield "svg, bare", b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100000 100000\nshowpage\n"
    yield "html around a png", b"<!DOCTYPE html><img src='" + good_images()["png"] + b"'>"
    yield "pdf around a jpeg", b"%PDF-1.4\n" + good_images()["jpeg"] + b"\n%%EOF"
    yield "text", b"This is a picture of a cat."
    yield "base64", b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    yield "a data URL", b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    yield "json", b'{"image": [1, 2, 3]}'
    yield "gzip around a png", gzip.compress(good_images()["png"], mtime=0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("cat.png"), good_images()["png"])
    yield "zip around a png", archive.getvalue()
    yield "a png with a text editor's mark", b"\xef\xbb\xbf" + good_images()["png"]
    yield "a byte before a png", b"\n" + good_images()["png"]
    yield "a png through a text editor", good_images()["png"].replace(b"\r\n", b"\n")
    yield "an executable", b"\x7fELF\2\1\1" + bytes(100)
    yield "utf-16", "not a picture".encode("utf-16")


def _random() -> Iterator[tuple[str, bytes]]:
    for seed in range(6):
        yield f"random bytes {seed}", b"?" + random.Random(seed).randbytes(3000)
    for name, magic in (
        ("png", PNG_MAGIC),
        ("jpeg", b"\xff\xd8\xff"),
        ("gif", b"GIF89a"),
        ("webp", b"RIFF\x00\x10\0\0WEBPVP8 "),
        ("bmp", b"BM"),
    ):
        for seed in range(3):
            yield f"random bytes {seed} after the magic of {name}", magic + random.Random(seed).randbytes(5000)
