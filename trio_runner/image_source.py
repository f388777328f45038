"""What a caller may give as an image. It is decoded later, by `trio_runner.images`; nothing here imports Pillow."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Final, TypeAlias, Union

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = Union[bytes, os.PathLike[str], "Image.Image"]  # `|` does not accept a name in quotes
"""The bytes of an encoded file, the path of one, or a Pillow image."""

MAX_IMAGE_BYTES: Final = 20 << 20
"""The largest encoded file that is accepted, in bytes."""

IMAGE_MARKER: Final = "<__media__>"
"""What stands for an image in a conversation that is shown as text. It is llama.cpp's own marker."""

IMAGE_TAG: Final = re.compile(r"\[img-([0-9]{1,10})\]")
"""Where the image with a number stands in a prompt that is text."""


def is_image_source(value: object) -> bool:
    """Whether `value` has a type that `load_pixels` accepts. Its content is not checked."""
    pillow = sys.modules.get("PIL.Image")  # a program that has a Pillow image has imported Pillow
    return isinstance(value, (bytes, os.PathLike)) or (pillow is not None and isinstance(value, pillow.Image))
