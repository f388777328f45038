"""Where tiny models are when a test does not say: on the CPU, whatever else the machine has. In tests/devices, they are
on a device in the same tests."""

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
    """In the block, layers go to the devices of these names."""
    global _names
    before, _names = _names, names
    try:
        yield
    finally:
        _names = before


def model_config(path: Path, **fields: object) -> ModelConfig:
    return ModelConfig(path=str(path), **{"devices": _names} | fields)  # type: ignore[arg-type]


def device_number() -> int | None:
    """Of the device that a projector goes to; None: the CPU."""
    chosen = choose_devices(devices(), _names, ())
    return chosen[0].number if chosen else None
