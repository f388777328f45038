"""Toys that see: projectors, prompts with images, and the texts that the toy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from tests.engine.toys import (
    Projector,
    Shutter,
    Toy,
    items_of,
    picture,
)
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.image_source import ImageSource
from trio_runner.testing import ToyProjector, toy_text

Parts: TypeAlias = Sequence[str | ImageSource]


A, B, C = picture(0), picture(1), picture(2)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared positions": {"shares_positions": True},
    "non-causal": {"causal": False},
    "tiles": {"n_tiles": 3},
    "tiles with shared positions": {"shares_positions": True, "n_tiles": 2},
}


ARRANGEMENTS: dict[str, Parts] = {
    "alone": [A],
    "first": [A, "what is this?"],
    "last": ["this is ", A],
    "in the middle": ["here: ", A, " what is it?"],
    "twice": [A, " and ", A],
    "side by side": ["compare ", A, B, A],
    "many": [A, B, "x", C, A, "y", B, C],
}


def seeing(toy: Toy, kind: str = "plain") -> Projector:
    """Give the toy a projector of one of the `KINDS`."""
    toy.projector = Projector(**KINDS[kind])
    toy.capabilities = {**toy.capabilities, "can_shift": not toy.projector.shares_positions}
    return toy.projector


def shuttered(toy: Toy) -> Shutter:
    """A projector that encodes nothing before the shutter opens."""
    seeing(toy).on_encode = shutter = Shutter()
    return shutter


def tagged(parts: Parts) -> tuple[str, tuple[tuple[int, ImageSource], ...]]:
    """The same prompt as text with tags, and the images that the tags stand for."""
    images = [part for part in parts if not isinstance(part, str)]
    numbers = {image: 7 * images.index(image) + 1 for image in images}
    text = "".join(part if isinstance(part, str) else f"[img-{numbers[part]}]" for part in parts)
    return text, tuple((number, image) for image, number in numbers.items())


def by_parts(engine: Engine, parts: Parts, **options: Any) -> Generation:
    return engine.generate(parts, **options)


def by_tags(engine: Engine, parts: Parts, **options: Any) -> Generation:
    prompt, image_data = tagged(parts)
    return engine.generate(prompt, image_data=image_data, **options)


async def text_of(engine: Engine, parts: Parts, **options: Any) -> str:
    return await engine.generate(parts, max_tokens=20, **options).collect()


def said(projector: ToyProjector, parts: Parts) -> str:
    """The text that `text_of` should return."""
    return toy_text(items_of(projector, parts), 20)
