"""Pictures of coloured shapes, which `mmproj-shapes.gguf` in tests/data was trained on."""

from __future__ import annotations

import io
import math
from typing import Final, Literal, TypeAlias

from PIL import Image, ImageDraw

Colour: TypeAlias = tuple[int, int, int]
Shape: TypeAlias = Literal["circle", "square", "triangle"]

COLOURS: Final[dict[str, Colour]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 60, 220),
    "yellow": (240, 225, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "orange": (245, 140, 20),
    "purple": (140, 40, 170),
}
"""Colours of shapes and of backgrounds."""
SHAPES: Final[tuple[Shape, ...]] = ("circle", "square", "triangle")


def picture(colour: str, shape: Shape, background: str, *, width: int = 128, height: int = 128) -> bytes:
    """A PNG file. For "red", "circle", "white": a red circle in the middle of a white background."""
    middle = (width / 2, height / 2)
    image = draw(shape, COLOURS[colour], COLOURS[background], (width, height), middle, 0.4 * min(width, height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw(
    shape: Shape,
    colour: Colour,
    background: Colour,
    size: tuple[int, int],
    middle: tuple[float, float],
    radius: float,
    *,
    turn: float = 0.0,
) -> Image.Image:
    """Draw a shape whose corners lie on a circle, turned clockwise by `turn` radians. Sizes are in pixels."""
    scale = 2  # drawn larger and scaled down, so that edges are smooth
    image = Image.new("RGB", (scale * size[0], scale * size[1]), background)
    canvas = ImageDraw.Draw(image)
    x, y, radius = scale * middle[0], scale * middle[1], scale * radius
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        n_corners, first = (4, math.pi / 4) if shape == "square" else (3, -math.pi / 2)
        angles = [first + turn + math.tau * corner / n_corners for corner in range(n_corners)]
        canvas.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=colour)
    return image.resize(size, Image.Resampling.BICUBIC)
