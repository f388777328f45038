"""Decode an image that a caller gives into RGB pixels, within bounds of time and memory.

A file is scanned first (`trio_runner.image_formats`), and then given to Pillow's decoder of the format that the scan
found. Pillow's own settings are not changed. Importing this module does not import Pillow, which takes a while.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from trio_runner.errors import InvalidImage
from trio_runner.image_formats import (
    ANIMATED,
    CUT_SHORT,
    BadImage,
    ScannedImage,
    check_size,
    orientation_in,
    scan_image,
)
from trio_runner.image_source import MAX_IMAGE_BYTES, ImageSource
from trio_runner.pixels import Pixels

if TYPE_CHECKING:
    from PIL import Image, ImageFile

MAX_DECODED_SIDE: Final = 4096
"""Pixels of the longer side that are kept. No projector looks at more."""


def load_pixels(source: ImageSource, *, param: str) -> Pixels:
    """Decode a PNG, JPEG, WEBP, GIF or BMP, rotate it as its EXIF orientation says, and put it on white.

    An image whose longer side exceeds `MAX_DECODED_SIDE` is reduced. All others keep their exact pixels. Of 16-bit
    values the high eight bits are kept, and colour profiles are not applied. Of a Pillow image the current frame is
    used. The image is loaded if it was not loaded yet, and otherwise unchanged. May be called from several threads.

    Raises `InvalidImage` with `param` for a file that cannot be read, has another format, is animated, damaged or cut
    short, or exceeds a bound. Damaged pixels of a JPEG are noticed only where the decoder cannot go on. A refusal takes
    little time and memory, whatever the file claims.
    """
    try:
        return _load(source)
    except BadImage as bad:
        raise InvalidImage(f"{param} {bad}", param=param) from bad.__cause__


def _load(source: ImageSource) -> Pixels:
    from PIL import Image

    if isinstance(source, Image.Image):
        check_size(source.width, source.height)
        with _pillow_errors():
            with _LOADING:
                source.load()
            return _to_pixels(source, orientation_in(source.info.get("exif")))
    if isinstance(source, os.PathLike):
        source = _read(source)
    elif not isinstance(source, bytes):
        raise BadImage(f"must be the bytes of a file, a path or a PIL image, not {type(source).__name__}")
    if not source:
        raise BadImage("is empty")
    if len(source) > MAX_IMAGE_BYTES:
        raise BadImage(f"is larger than {MAX_IMAGE_BYTES} bytes, encoded")
    return _decode(scan_image(source))


_LOADING = threading.Lock()
"""Held while a Pillow image loads itself. Callers may use one image in several threads, but it can load only once."""


def _read(path: os.PathLike[str]) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise BadImage("cannot be read: it is not a regular file")
        with open(path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError, TypeError) as error:
        raise BadImage(f"cannot be read: {error}") from error


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turn every exception into `BadImage`: Pillow's decoders raise whatever they stumble over."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _decode(scanned: ScannedImage) -> Pixels:
    from PIL import Image, WebPImagePlugin  # noqa: F401  # the import registers the decoder

    Image.preinit()  # registers the others
    # The decoder itself, because `Image.open(formats=[...])` prints a warning for an image that is very large.
    open_image, _ = Image.OPEN[scanned.format]
    with _pillow_errors(), open_image(io.BytesIO(scanned.data), "") as image:
        check_size(*image.size)
        if scanned.format == "BMP":
            _check_bmp(image, len(scanned.data))
        if getattr(image, "is_animated", False):
            raise BadImage(ANIMATED)
        return _to_pixels(image, orientation_in(scanned.exif or image.info.get("exif")))


def _check_bmp(image: ImageFile.ImageFile, n_bytes: int) -> None:
    """Raise `BadImage` for a BMP that Pillow would decode in Python, pixel by pixel, or that has too few bytes."""
    codec, _, start, args = image.tile[0]
    if codec != "raw" or not isinstance(args, tuple):
        raise BadImage("is a compressed BMP, which is not supported")
    if start + args[1] * image.height > n_bytes:  # the second is the length of a row
        raise BadImage(CUT_SHORT)


# ---- from an opened image to pixels ---------------------------------------------------------------------------------

_TURNS: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Pillow's name of the transposition that undoes each EXIF orientation.

`ImageOps.exif_transpose` is not used: it reads the EXIF block itself, and prints a warning if that is damaged.
"""


def _to_pixels(image: Image.Image, orientation: int) -> Pixels:
    from PIL import Image, JpegImagePlugin

    width, height = image.size
    excess = max(width, height) / MAX_DECODED_SIDE
    size, box = (width, height), (0.0, 0.0, float(width), float(height))
    if excess > 1:
        size = max(1, round(width / excess)), max(1, round(height / excess))
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            # The decoder halves an image faster than it decodes it whole. The filter still gets twice the final size.
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
    """`image` in mode L, RGB or RGBA. The result may be `image` itself."""
    if image.mode == "F":
        raise BadImage("has the mode F, which does not say what is black and what is white")
    if image.mode.startswith("I"):
        transparent = image.info.get("transparency")
        if image.mode == "I":
            darkest, lightest = image.getextrema()
            if darkest < 0 or lightest > 0xFFFF:  # type: ignore[operator]  # one band: two numbers
                raise BadImage("has the mode I and values that do not fit into 16 bits")
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if isinstance(transparent, int):
            image.info["transparency"] = transparent >> 8
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
