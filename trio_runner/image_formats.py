"""What an encoded image is, read from its bytes before a decoder sees them.

Strangers write these files, and a decoder believes them: a few bytes can claim gigabytes of pixels, or ask for hours of
work. So each file is scanned first, from its start to its end, in time proportional to its length. A scan drops what
the pixels do not need (texts, profiles, thumbnails), so that Pillow's parsers for it never run. Headers, tables, codes
and animations are left for Pillow to check. The scans check what Pillow 13 does not, which was measured with
`tests/hostile_images.py`:

- All formats: if a program sets `ImageFile.LOAD_TRUNCATED_IMAGES`, files that are cut short are decoded.
- PNG: missing rows turn black. A wrong checksum of pixels and a missing end are ignored. A damaged animation prints a
  warning. A compressed text of more than 1 MiB is an error, though ordinary files have such texts.
- JPEG: any number of scans is decoded, and each is work on all pixels. A million segments take 3 s and 67 MiB.
- GIF: a missing end is ignored. A frame that lies outside the image makes the image larger.
- EXIF: a damaged block prints a warning, and an orientation of the wrong type is used.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, NoReturn

MAX_PIXELS: Final = 50_000_000
"""Pixels of an image. Decoded, each takes four bytes, and two or three copies exist while it is converted."""
MAX_SIDE: Final = 16384
"""Pixels of one side."""
MAX_ASPECT: Final = 200
"""How many times longer one side may be than the other."""
MAX_PARTS: Final = 100_000
"""Chunks, segments and blocks of one file. A GIF of 20 MiB has 82,242 blocks if all of them are full."""
MAX_SCANS: Final = 50
"""Scans of a progressive JPEG, each of which is work on all pixels. Encoders write about ten."""
MAX_INFLATED: Final = 4 << 20
"""Bytes of all compressed texts and profiles of one PNG, inflated."""


class BadImage(Exception):
    """What is wrong with an image: the rest of a sentence that begins with the image's name."""


class ScannedImage(NamedTuple):
    """A complete file, not yet decoded."""

    format: str
    """Pillow's name of the format."""
    data: bytes
    """The file, reduced to what the pixels depend on."""
    exif: bytes = b""
    """The EXIF block of a JPEG or PNG, which `data` lacks.

    Pillow would parse that of a JPEG at once. It reads that of a PNG too late, if it stands after the pixels. Of other
    formats it only copies the block.
    """


def scan_image(data: bytes) -> ScannedImage:
    """Scan a file. Raises `BadImage` for another format, and for damage that a scan can notice."""
    name = _format_of(data)
    return _SCANS[name](_Reader(data))


def check_size(width: int, height: int) -> None:
    """Raise `BadImage` if a size is out of bounds."""
    if width < 1 or height < 1:
        raise BadImage(f"has no pixels: it is {width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"is {width} x {height} pixels, but no side may have more than {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"is {width} x {height} pixels, but at most {MAX_PIXELS} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"is {width} x {height} pixels: no side may be more than {MAX_ASPECT} times the other")


def orientation_in(exif: object) -> int:
    """The orientation in an EXIF block, 1 to 8. It is 1 if there is none, or if the block is damaged."""
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(n_entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if (tag, kind) == (0x0112, 3):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# ---- formats --------------------------------------------------------------------------------------------------------

_FORMATS: Final = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
}
_UNSUPPORTED: Final = {
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PSD": rb"8BPS",
    "ICO": rb"\0\0[\x01\x02]\0[\x01-\x20]\0",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "SVG or XML": rb"(\xef\xbb\xbf)?\s{0,9}<(\?xml|!DOCTYPE|svg)",
    "HEIC or AVIF": rb"....ftyp",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "PPM": rb"P[1-7fF][\s#]",
    "QOI": rb"qoif",
    "DDS": rb"DDS ",
    "ZIP": rb"PK\x03\x04",
}
"""Formats that are refused by name."""


def _format_of(data: bytes) -> str:
    for name, magic in _FORMATS.items():
        if re.match(magic, data, re.DOTALL):
            return name
    supported = "only PNG, JPEG, WEBP, GIF and BMP are supported"
    for name, magic in _UNSUPPORTED.items():
        if re.match(magic, data, re.DOTALL):
            raise BadImage(f"is of the unsupported format {name}: {supported}")
    raise BadImage(f"is of an unknown format, or no image: {supported}")


# ---- scanning -------------------------------------------------------------------------------------------------------

CUT_SHORT: Final = "is cut short"
ANIMATED: Final = "is animated: only still images are supported"


def damaged(how: str) -> NoReturn:
    raise BadImage(f"is damaged: {how}")


class _Reader:
    """Reads a file from its start to its end. Reading beyond the end raises `BadImage`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self._n_parts = 0

    def count(self) -> None:
        """Count one more part of the file."""
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise BadImage(f"has more than {MAX_PARTS} parts")

    def skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.data):
            raise BadImage(CUT_SHORT)

    def take(self, n_bytes: int) -> bytes:
        start = self.at
        self.skip(n_bytes)
        return self.data[start : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


# ---- PNG ------------------------------------------------------------------------------------------------------------


def _scan_png(reader: _Reader) -> ScannedImage:
    kept, pixels = [reader.take(8)], []
    header = exif = b""
    n_inflated = 0
    for kind, body in _png_chunks(reader):
        if (kind == b"IHDR") != (not header):
            damaged("its header is not at its start")
        match kind:
            case b"IHDR":
                if len(body) != 13:
                    damaged("its header has the wrong length")
                header = body
                check_size(*struct.unpack_from(">II", header))
            case b"IDAT":
                pixels.append(body)
            case b"acTL":
                if body[:4] != b"\0\0\0\1":
                    raise BadImage(ANIMATED)
                continue
            case b"iCCP" | b"zTXt" | b"iTXt":
                n_inflated += _n_inflated_text(kind, body, MAX_INFLATED - n_inflated)
                if n_inflated > MAX_INFLATED:
                    raise BadImage(f"has texts and profiles of more than {MAX_INFLATED} bytes")
                continue
            case b"tRNS" if header[8:10] == b"\x10\2" and len(body) == 6:
                # Pillow drops the low halves of 16-bit pixels, but not those of the transparent colour.
                body = b"\0%c\0%c\0%c" % (body[0], body[2], body[4])
            case b"eXIf":
                exif = body
                continue
            case b"PLTE" | b"tRNS" | b"IEND":
                pass
            case _ if kind[0] & 0x20:  # a lower-case letter marks an ancillary chunk
                continue
            case _:
                damaged(f"a chunk of an unknown kind, {kind!r}")
        kept.append(_png_chunk(kind, body))
    _check_rows(header, pixels)
    return ScannedImage("PNG", b"".join(kept), exif)


def _png_chunks(reader: _Reader) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the body of each chunk, up to the one that ends the file."""
    kind = b""
    while kind != b"IEND":
        reader.count()
        length, kind = reader.unpack(">I4s")
        body = reader.take(length)
        (checksum,) = reader.unpack(">I")
        if checksum != zlib.crc32(body, zlib.crc32(kind)):
            damaged("a checksum is wrong")
        yield kind, body


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _check_rows(header: bytes, pixels: list[bytes]) -> None:
    """Raise `BadImage` if the compressed pixels have fewer bytes than all rows together."""
    size = _n_row_bytes(header)
    try:
        if _inflated_size(pixels, size) < size:
            raise BadImage(CUT_SHORT)
    except zlib.error as error:
        damaged(str(error))


def _inflated_size(parts: Iterable[bytes], limit: int) -> int:
    """The inflated length of a stream, counted up to `limit` or a little more."""
    stream = zlib.decompressobj()
    n_bytes = 0
    for part in parts:
        while part and n_bytes < limit:
            n_bytes += len(stream.decompress(part, 1 << 20))
            part = stream.unconsumed_tail
    return n_bytes + (len(stream.flush()) if n_bytes < limit else 0)


def _n_inflated_text(kind: bytes, body: bytes, limit: int) -> int:
    """The inflated length of a text or a profile, counted up to `limit` or a little more."""
    _, _, rest = body.partition(b"\0")
    stream = rest[1:]
    if kind == b"iTXt":
        if rest[:1] != b"\1":
            return 0  # not compressed
        stream = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return _inflated_size([stream], limit + 1)
    except zlib.error:
        return 0  # the text is dropped in any case


_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(left, top, step right, step down) of each pass of an interlaced PNG."""


def _n_row_bytes(header: bytes) -> int:
    """Bytes of all rows, each with the number of its filter before it."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    n_bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)  # Pillow refuses other colour types
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    n_bytes = 0
    for left, top, right, down in passes:
        n_columns, n_rows = -(-(width - left) // right), -(-(height - top) // down)
        if n_columns > 0 and n_rows > 0:
            n_bytes += n_rows * (1 + (n_columns * n_bits + 7) // 8)
    return n_bytes


# ---- JPEG -----------------------------------------------------------------------------------------------------------

_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""What begins a segment. Restarts and stuffed bytes, which occur within coded pixels, are not matched."""
_DROPPED: Final = (frozenset(range(0xE0, 0xF0)) | {0xFE}) - {0xE0, 0xEE}
"""Segments of applications, and comments. JFIF and Adobe segments stay: they say what the colours are."""


def _scan_jpeg(reader: _Reader) -> ScannedImage:
    data = reader.data
    kept = [reader.take(2)]
    exif = b""
    n_scans = scans_at = 0
    while True:
        reader.count()
        found = _MARKER.search(data, reader.at)
        if found is None:
            raise BadImage(CUT_SHORT)
        marker = found[1][0]
        reader.at = found.end()
        if marker == 0xD9:  # end of image
            break
        (length,) = reader.unpack(">H")
        if length < 2:
            damaged("a segment has an impossible length")
        body = reader.take(length - 2)
        if marker == 0xDA:  # start of scan
            n_scans += 1
            scans_at = scans_at or found.start()
            if n_scans > MAX_SCANS:
                raise BadImage(f"has more than {MAX_SCANS} scans")
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = body
        if not scans_at and marker not in _DROPPED:
            kept.append(data[found.start() : reader.at])
    if not scans_at:
        damaged("it has no pixels")
    return ScannedImage("JPEG", b"".join([*kept, data[scans_at : reader.at]]), exif)


# ---- GIF ------------------------------------------------------------------------------------------------------------


def _scan_gif(reader: _Reader) -> ScannedImage:
    reader.skip(6)
    width, height, flags, _, _ = reader.unpack("<HHBBB")
    check_size(width, height)
    _skip_gif_colours(reader, flags)
    kept = [reader.data[: reader.at]]
    while True:
        start = reader.at
        kind = reader.take(1)
        if kind == b";":  # end of file
            return ScannedImage("GIF", b"".join([*kept, kind]))
        if kind == b"!":  # an extension
            label = reader.take(1)
            _skip_gif_blocks(reader)
            if label != b"\xf9":  # it does not control a frame
                continue
        elif kind == b",":  # a frame
            x, y, frame_width, frame_height, flags = reader.unpack("<HHHHB")
            if not 0 < frame_width <= width - x or not 0 < frame_height <= height - y:
                damaged("a frame is not within its size")
            _skip_gif_colours(reader, flags)
            reader.skip(1)
            _skip_gif_blocks(reader)
        else:
            damaged("a block of an unknown kind")
        kept.append(reader.data[start : reader.at])


def _skip_gif_colours(reader: _Reader, flags: int) -> None:
    if flags & 0x80:
        reader.skip(6 << (flags & 7))


def _skip_gif_blocks(reader: _Reader) -> None:
    length = None
    while length != 0:
        reader.count()
        (length,) = reader.unpack("B")
        reader.skip(length)


# ---- WEBP and BMP ---------------------------------------------------------------------------------------------------


def _scan_webp(reader: _Reader) -> ScannedImage:
    reader.skip(4)
    (length,) = reader.unpack("<I")
    end = 8 + length
    if end > len(reader.data):
        raise BadImage(CUT_SHORT)
    reader.skip(4)
    while reader.at < end:
        reader.count()
        kind, length = reader.unpack("<4sI")
        size = _webp_size(kind, reader.take(length)[:10])
        if size is not None:
            check_size(*size)
        reader.skip(min(length % 2, len(reader.data) - reader.at))
    return ScannedImage("WEBP", reader.data[:end])


def _webp_size(kind: bytes, beginning: bytes) -> tuple[int, int] | None:
    """The size that a chunk states in its first ten bytes. It is None for other chunks, and for damaged ones.

    Pillow would refuse a large size before it can be checked, but with a bound that the program can change.
    """
    if kind == b"VP8 " and len(beginning) == 10 and beginning[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", beginning, 6)  # two bits of each are a factor for display
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(beginning) >= 5 and beginning[0] == 0x2F:
        (bits,) = struct.unpack_from("<I", beginning, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8X" and len(beginning) == 10:
        return 1 + int.from_bytes(beginning[4:7], "little"), 1 + int.from_bytes(beginning[7:], "little")
    return None


def _scan_bmp(reader: _Reader) -> ScannedImage:
    return ScannedImage("BMP", reader.data)  # Pillow reads nothing but the header until the size is checked


_SCANS: Final[dict[str, Callable[[_Reader], ScannedImage]]] = {
    "PNG": _scan_png,
    "JPEG": _scan_jpeg,
    "WEBP": _scan_webp,
    "GIF": _scan_gif,
    "BMP": _scan_bmp,
}
