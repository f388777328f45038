"""The device that tiny models are loaded on.

The default is the CPU, even on a machine with GPUs. tests/devices runs some of the same tests on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trio_runner.config import ModelConfig
from trio_runner.core.placement import choose_devices
from trio_runner.llama import devices

_names: tuple[str, ...] = ()


@contextmanager
def placed(*names: str) -> Iterator[None]:
    """Load models on the devices with these names for the length of the block."""
    global _names
    before, _names = _names, names
    try:
        yield
    finally:
        _names = before


def model_config(path: Path, **fields: object) -> ModelConfig:
    return ModelConfig(path=str(path), **{"devices": _names} | fields)  # type: ignore[arg-type]


def device_number() -> int | None:
    """The number of the device that a projector is loaded on; None for the CPU."""
    chosen = choose_devices(devices(), _names, ())
    return chosen[0].number if chosen else None
