"""Images, projectors and models that take images: what the tests of images share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.llama.running import Running
from tests.placing import device_number
from trio_runner.config import ModelConfig
from trio_runner.core.ports import EncodedImage
from trio_runner.core.prompt import Media, MediaRow
from trio_runner.llama import Model, Projector
from trio_runner.pixels import Pixels

Models = Callable[[str], Path]

PAIRS = {"llama": "mmproj", "swa": "mmproj-gemma", "mrope": "mmproj-qwen", "tiles": "mmproj-tiles"}
"""Each model with its projector."""
ALL = tuple(PAIRS)


def picture(width: int = 56, height: int = 56, seed: int = 0) -> Pixels:
    return Pixels(width, height, np.random.default_rng(seed).integers(0, 256, 3 * width * height, np.uint8).tobytes())


def open_pair(models: Models, name: str, **config: object) -> Running:
    return Running(models(name), projector=models(PAIRS[name]), adapters=(), **config)


def open_projector(models: Models, name: str, *, max_rows: int = 64) -> Projector:
    model = Model(ModelConfig(path=str(models(name))))
    return Projector(model, str(models(PAIRS[name])), max_rows=max_rows, device=device_number())


def media_of(image: EncodedImage) -> list[Media]:
    return list(dict.fromkeys(item.media for item in image.items if isinstance(item, MediaRow)))


def rows_of(image: EncodedImage) -> Any:
    (encoded,) = image.media.values()
    return encoded.rows
