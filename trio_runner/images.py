"""From what a caller gives as an image to RGB pixels, under limits.

An encoded image is the one input that strangers write whole, and decoders believe it: a few bytes can claim gigabytes,
or stand for hours of work. So a file is walked here before Pillow sees it. The walk costs little, whatever is in the
file, and settles what has to be known beforehand: the format, the size, that it is one still picture, and that it is
all there. Pillow then gets the parts that are pixels; what else a file carries (texts, profiles, thumbnails) is left
out, and with it the code that would read it.

Nothing of Pillow's own settings is changed. Importing this module does not import Pillow, which takes a while.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, Union

from trio_runner.errors import InvalidImage

if TYPE_CHECKING:
    from PIL import Image, ImageFile

ImageSource: TypeAlias = Union[bytes, os.PathLike[str], "Image.Image"]  # `|` would not take the name
"""An encoded file as bytes, the path of one, or an image of Pillow."""

MAX_IMAGE_BYTES: Final = 20 << 20
"""Bytes of an encoded file."""
MAX_PIXELS: Final = 50_000_000
"""Pixels of an image, as decoded: four bytes each, two or three times over while it is converted."""
MAX_SIDE: Final = 16384
"""Pixels of one side."""
MAX_ASPECT: Final = 200
"""How many times longer than the other a side may be."""
MAX_DECODED_SIDE: Final = 4096
"""Pixels of the longer side that are kept: no projector looks at more."""
MAX_PARTS: Final = 100_000
"""Chunks, segments and blocks of one file; 20 MiB of GIF are 82,242 when each is as full as it gets."""
MAX_SCANS: Final = 50
"""Scans of a progressive JPEG, each of which is work on all the picture. Encoders write about ten."""
MAX_INFLATED: Final = 4 << 20
"""Bytes that the compressed texts and profiles of a PNG may stand for, all together."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture: `data` has three bytes (R, G, B) for each pixel, rows from top to bottom.

    Two are equal if their digests are. Raises `ValueError` if there is more or less in `data` than the size says.
    """

    width: int = field(compare=False)
    height: int = field(compare=False)
    data: bytes = field(compare=False, repr=False)
    digest: bytes = field(init=False)
    """32 bytes, cryptographic, of all the above."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or len(self.data) != 3 * self.width * self.height:
            raise ValueError(f"{len(self.data)} bytes are not {self.width} x {self.height} pixels")
        digest = hashlib.blake2b(struct.pack("<QQ", self.width, self.height), digest_size=32)
        digest.update(self.data)
        object.__setattr__(self, "digest", digest.digest())


def is_image_source(value: object) -> bool:
    """Whether `value` is of a type that `load_pixels` takes; what is in it, nobody has looked at."""
    pillow = sys.modules.get("PIL.Image")  # whoever has an image of Pillow has imported it
    return isinstance(value, (bytes, os.PathLike)) or (pillow is not None and isinstance(value, pillow.Image))


def load_pixels(source: ImageSource, *, param: str) -> Pixels:
    """Decode PNG, JPEG, WEBP, GIF or BMP, turn it as its EXIF orientation says, and put it on white.

    What is longer than `MAX_DECODED_SIDE` is reduced; everything else keeps its exact pixels. Of 16 bits the higher
    eight are taken, colour profiles are not applied, and an image of Pillow is taken at the frame where it stands; it
    is loaded, if it was not, but otherwise left as it was. May be called from several threads at once.

    Raises `InvalidImage`, which names `param`, for everything that is wrong with it: a file that cannot be read, is of
    another format, animated, damaged or cut short, or is out of the bounds above. (Damage of a JPEG's pixels shows only
    where it leaves the decoder at a loss.) To refuse one takes little time and memory, whatever it claims to be.
    """
    try:
        return _load(source)
    except _Wrong as wrong:
        raise InvalidImage(f"{param} {wrong}", param=param) from wrong.__cause__


class _Wrong(Exception):
    """What is wrong with an image, to be said after its name."""


@contextmanager
def _decoding() -> Iterator[None]:
    """Around what Pillow does. It has no tree of errors: whatever a decoder stumbles over comes out of it."""
    try:
        yield
    except _Wrong:
        raise
    except Exception as error:
        raise _Wrong(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _load(source: ImageSource) -> Pixels:
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size(source.width, source.height)
        with _decoding():
            with _LOADING:
                source.load()
            return _to_pixels(source, _orientation(source.info.get("exif", b"")))
    if isinstance(source, os.PathLike):
        source = _read(source)
    elif not isinstance(source, bytes):
        raise _Wrong(f"must be the bytes of a file, a path or a PIL image, not {type(source).__name__}")
    if not source:
        raise _Wrong("is empty")
    if len(source) > MAX_IMAGE_BYTES:
        raise _Wrong(f"is larger than {MAX_IMAGE_BYTES} bytes, encoded")
    name = _format_of(source)
    file = _WALKS[name](_Reader(source))
    _check_size(file.width, file.height)
    with _decoding(), _open(name, file.data) as image:
        if image.size != (file.width, file.height):
            _damaged("it contradicts itself about its size")
        return _to_pixels(image, file.orientation)


_LOADING = threading.Lock()
"""Held while an image of Pillow's loads itself, which it cannot do twice at once; the same one may be used twice."""


def _read(path: os.PathLike[str]) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise _Wrong("cannot be read: it is not a regular file")
        with open(path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError, TypeError) as error:
        raise _Wrong(f"cannot be read: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _Wrong(f"has no pixels: it is {width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise _Wrong(f"is {width} x {height} pixels, but no side may have more than {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise _Wrong(f"is {width} x {height} pixels, but at most {MAX_PIXELS} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Wrong(f"is {width} x {height} pixels: no side may be more than {MAX_ASPECT} times the other")


# From an opened image to pixels.


def _open(name: str, data: bytes) -> ImageFile.ImageFile:
    """The decoder itself: `Image.open` would try all that there are, and warn of sizes."""
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    decoders: dict[str, type[ImageFile.ImageFile]] = {
        "BMP": BmpImageFile,
        "GIF": GifImageFile,
        "JPEG": JpegImageFile,
        "PNG": PngImageFile,
        "WEBP": WebPImageFile,
    }
    return decoders[name](io.BytesIO(data))


_TURNS: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What undoes each EXIF orientation, by its name in Pillow."""


def _to_pixels(image: Image.Image, orientation: int) -> Pixels:
    from PIL import Image, JpegImagePlugin

    width, height = image.size
    excess = max(width, height) / MAX_DECODED_SIDE
    size, box = (width, height), (0.0, 0.0, float(width), float(height))
    if excess > 1:
        size = max(1, round(width / excess)), max(1, round(height / excess))
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            # The decoder halves for less than nothing; twice the size is left for the filter to choose from.
            draft = image.draft(None, (2 * size[0], 2 * size[1]))
            box = draft[1] if draft is not None else box
    picture = _eight_bits(image)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    if picture.mode == "RGBA":
        white = Image.new("RGB", size, "white")
        white.paste(picture, mask=picture)
        picture = white
    if orientation in _TURNS:
        picture = picture.transpose(Image.Transpose[_TURNS[orientation]])
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return Pixels(picture.width, picture.height, picture.tobytes())


def _eight_bits(image: Image.Image) -> Image.Image:
    """In mode L, RGB or RGBA; possibly `image` itself."""
    if image.mode == "F":
        raise _Wrong("is in mode F, which says nothing about what is black and what is white")
    if image.mode.startswith("I"):
        transparent = image.info.get("transparency")
        if image.mode == "I":
            darkest, lightest = image.getextrema()
            if darkest < 0 or lightest > 0xFFFF:  # type: ignore[operator]  # one band: two numbers
                raise _Wrong("is in mode I with values that are not of 16 bits")
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if isinstance(transparent, int):
            image.info["transparency"] = transparent >> 8
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _orientation(exif: Any) -> int:
    """The tag of that name, 1 to 8; 1 if there is none or `exif` is damaged."""
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


# From bytes to what is in them.

_FORMATS: Final = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
}
_EXOTIC: Final = {
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
    taken = "only PNG, JPEG, WEBP, GIF and BMP are taken"
    for name, magic in _EXOTIC.items():
        if re.match(magic, data, re.DOTALL):
            raise _Wrong(f"is of an exotic format, {name}: {taken}")
    raise _Wrong(f"is of an unknown format, or no image at all: {taken}")


@dataclass(frozen=True, slots=True)
class _File:
    """One still picture."""

    width: int
    height: int
    data: bytes
    """What the decoder needs, and little else."""
    orientation: int = 1


def _damaged(how: str) -> NoReturn:
    raise _Wrong(f"is damaged: {how}")


_CUT_SHORT: Final = "is cut short"
_ANIMATED: Final = "is animated: only still images are taken"


class _Reader:
    """A file from start to end; what would lie beyond the end raises `_Wrong`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self._n_parts = 0

    def count(self) -> None:
        """One more part."""
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise _Wrong(f"has more than {MAX_PARTS} parts")

    def skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.data):
            raise _Wrong(_CUT_SHORT)

    def take(self, n_bytes: int) -> bytes:
        start = self.at
        self.skip(n_bytes)
        return self.data[start : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def _inflated_size(parts: Iterable[bytes], limit: int) -> int:
    """How many bytes a deflated stream stands for, counted up to `limit` or a little more."""
    stream = zlib.decompressobj()
    n_bytes = 0
    for part in parts:
        while part and n_bytes < limit:
            n_bytes += len(stream.decompress(part, 1 << 20))
            part = stream.unconsumed_tail
    return n_bytes + (len(stream.flush()) if n_bytes < limit else 0)


def _walk_png(reader: _Reader) -> _File:
    reader.skip(8)
    kept, pixels = [reader.data[:8]], []
    header = b""
    orientation = 1
    n_inflated = 0
    while True:
        reader.count()
        start = reader.at
        length, kind = reader.unpack(">I4s")
        body = reader.take(length)
        (checksum,) = reader.unpack(">I")
        if checksum != zlib.crc32(body, zlib.crc32(kind)):
            _damaged("a checksum is wrong")
        if (kind == b"IHDR") != (not header):
            _damaged("its header is not at its start")
        match kind:
            case b"IHDR":
                if length != 13:
                    _damaged("its header is of the wrong length")
                header = body
                width, height = struct.unpack_from(">II", header)
                _check_size(width, height)
            case b"acTL":
                if length < 4 or body[:4] != b"\0\0\0\1":
                    raise _Wrong(_ANIMATED)
                continue
            case b"iCCP" | b"zTXt" | b"iTXt":
                n_inflated += _n_hidden(kind, body, MAX_INFLATED - n_inflated)
                if n_inflated > MAX_INFLATED:
                    raise _Wrong(f"has texts and profiles of more than {MAX_INFLATED} bytes")
                continue
            case b"eXIf":
                orientation = _orientation(body)
                continue
            case b"IDAT":
                pixels.append(body)
            case b"tRNS" if header[8:10] == b"\x10\2" and length == 6:
                # The decoder drops the lower halves of the pixels, but not those of the colour to compare them with.
                kept.append(_png_chunk(kind, b"\0%c\0%c\0%c" % (body[0], body[2], body[4])))
                continue
            case b"PLTE" | b"tRNS" | b"IEND":
                pass
            case _ if kind[0] & 0x20:  # a lower-case letter: ancillary
                continue
            case _:
                _damaged(f"a chunk of an unknown kind, {kind!r}")
        kept.append(reader.data[start : reader.at])
        if kind == b"IEND":
            break
    # A stream that ends too early leaves black rows behind, and the decoder says nothing.
    size = _png_size(header)
    try:
        if _inflated_size(pixels, size) < size:
            raise _Wrong(_CUT_SHORT)
    except zlib.error as error:
        _damaged(str(error))
    return _File(width, height, b"".join(kept), orientation)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _n_hidden(kind: bytes, body: bytes, limit: int) -> int:
    """How many bytes a text or a profile stands for, counted up to `limit` or a little more."""
    _, _, rest = body.partition(b"\0")
    stream = rest[1:]
    if kind == b"iTXt":
        if rest[:1] != b"\1":
            return 0  # not compressed
        stream = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return _inflated_size([stream], limit + 1)
    except zlib.error:
        return 0  # it is not needed


_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(left, top, step right, step down) of the passes of an interlaced PNG."""


def _png_size(header: bytes) -> int:
    """Bytes of all the rows, each with the filter's number before it."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    n_bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)  # other colours are the decoder's to refuse
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    n_bytes = 0
    for left, top, right, down in passes:
        n_columns, n_rows = -(-(width - left) // right), -(-(height - top) // down)
        if n_columns > 0 and n_rows > 0:
            n_bytes += n_rows * (1 + (n_columns * n_bits + 7) // 8)
    return n_bytes


_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""What begins a segment; not the restarts and stuffed bytes inside of coded pixels."""
_FRAMES: Final = frozenset(b"\xc0\xc1\xc2\xc9\xca")
"""Baseline, extended and progressive, by Huffman or arithmetic; the others are lossless or hierarchical."""
_TABLES: Final = frozenset(b"\xc4\xcc\xdb\xdd")
_ADOBE: Final = 0xEE
"""It, and JFIF, say what the colours are."""


def _walk_jpeg(reader: _Reader) -> _File:
    data = reader.data
    kept = [data[:2]]
    reader.skip(2)
    width = height = n_scans = scans_at = 0
    orientation = 1
    while True:
        reader.count()
        found = _MARKER.search(data, reader.at)
        if found is None:
            raise _Wrong(_CUT_SHORT)
        marker = found[1][0]
        reader.at = found.end()
        if marker == 0xD9:
            break
        if marker == 0xD8:
            _damaged("it begins twice")
        (length,) = reader.unpack(">H")
        if length < 2:
            _damaged("a segment is shorter than nothing")
        body = reader.take(length - 2)
        keep = marker in _TABLES or marker in (0xE0, _ADOBE)
        if marker in _FRAMES:
            if width:
                _damaged("it has two sizes")
            if length < 8:
                _damaged("its header is too short")
            height, width = struct.unpack_from(">HH", body, 1)
            _check_size(width, height)
            keep = True
        elif marker == 0xDA:
            n_scans += 1
            if n_scans > MAX_SCANS:
                raise _Wrong(f"has more than {MAX_SCANS} scans")
            scans_at = scans_at or found.start()
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation(body)
        elif not keep and not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            raise _Wrong("is of an exotic kind of JPEG, lossless or hierarchical")
        if keep and not scans_at:
            kept.append(data[found.start() : reader.at])
    if not width or not scans_at:
        _damaged("there is no picture in it")
    return _File(width, height, b"".join([*kept, data[scans_at : reader.at]]), orientation)


def _walk_gif(reader: _Reader) -> _File:
    def skip_colours(flags: int) -> None:
        if flags & 0x80:
            reader.skip(6 << (flags & 7))

    def skip_blocks() -> None:
        while True:
            reader.count()
            (length,) = reader.unpack("B")
            reader.skip(length)
            if not length:
                return

    reader.skip(6)
    width, height, flags, _, _ = reader.unpack("<HHBBB")
    _check_size(width, height)
    skip_colours(flags)
    kept = [reader.data[: reader.at]]
    control = b""
    while True:
        start = reader.at
        (kind,) = reader.unpack("B")
        if kind == 0x3B:
            break
        if kind == 0x21:
            (label,) = reader.unpack("B")
            skip_blocks()
            if label == 0xF9:
                control = reader.data[start : reader.at]
        elif kind == 0x2C:
            if len(kept) > 1:
                raise _Wrong(_ANIMATED)
            x, y, frame_width, frame_height, flags = reader.unpack("<HHHHB")
            if not 0 < frame_width <= width - x or not 0 < frame_height <= height - y:
                _damaged("its picture is not within its size")
            skip_colours(flags)
            reader.skip(1)
            skip_blocks()
            kept += [control, reader.data[start : reader.at]]
        else:
            _damaged("a block of an unknown kind")
    if len(kept) == 1:
        _damaged("there is no picture in it")
    return _File(width, height, b"".join([*kept, b";"]))


def _walk_webp(reader: _Reader) -> _File:
    reader.skip(4)
    (length,) = reader.unpack("<I")
    end = 8 + length
    if end > len(reader.data):
        raise _Wrong(_CUT_SHORT)
    reader.skip(4)
    size: tuple[int, int] | None = None
    n_frames = 0
    orientation = 1
    while reader.at < end:
        reader.count()
        kind, length = reader.unpack("<4sI")
        body = reader.take(length)
        reader.skip(min(length % 2, len(reader.data) - reader.at))
        match kind:
            case b"ANMF":
                n_frames += 1
                if n_frames > 1:
                    raise _Wrong(_ANIMATED)
            case b"EXIF":
                orientation = _orientation(body)
            case b"VP8X" | b"VP8 " | b"VP8L" if size is None:
                size = _webp_size(kind, body)
                _check_size(*size)
    if size is None:
        _damaged("there is no picture in it")
    return _File(*size, reader.data[:end], orientation)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if len(body) < 10 and not (kind == b"VP8L" and len(body) >= 5):
        raise _Wrong(_CUT_SHORT)
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _walk_bmp(reader: _Reader) -> _File:
    reader.skip(10)
    start, length = reader.unpack("<II")
    compression = 0
    if length == 12:
        width, height, _, n_bits = reader.unpack("<HHHH")
    else:
        width, height, _, n_bits, compression = reader.unpack("<iiHHI")
    if compression not in (0, 3):
        raise _Wrong("is of an exotic kind of BMP, compressed")  # Pillow decodes that in Python, pixel by pixel
    height = abs(height)  # below 0: from top to bottom
    _check_size(width, height)
    if start + (width * n_bits + 31) // 32 * 4 * height > len(reader.data):
        raise _Wrong(_CUT_SHORT)
    return _File(width, height, reader.data)


_WALKS: Final[dict[str, Callable[[_Reader], _File]]] = {
    "PNG": _walk_png,
    "JPEG": _walk_jpeg,
    "WEBP": _walk_webp,
    "GIF": _walk_gif,
    "BMP": _walk_bmp,
}
