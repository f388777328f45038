"""Where a model goes: which devices it is given, and how many of its layers they have room for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

from trio_runner.info import Device, MemoryUse

MAX_MARGIN: Final = 1 << 30
MARGIN_SHARE: Final = 8
"""What is left free on a device: an eighth of it, at most 1 GiB. Its driver, the screen and what the backend allocates
for a moment are in no figure of the model's."""


def choose_devices(devices: Sequence[Device], names: Collection[str] | None, remote: Sequence[int]) -> list[Device]:
    """Those that layers may go to: the named ones in their order, or, for None, the `remote` ones by their numbers, in
    that order, and all GPUs of this machine. Integrated GPUs, which share the memory of the CPU, only where there is no
    other.

    Raises ValueError for a name that no device has that could be given layers.
    """
    able = [device for device in devices if device.kind in ("GPU", "integrated GPU")]
    if names is not None:
        by_name = {device.name.casefold(): device for device in able}
        if unknown := [name for name in names if name.casefold() not in by_name]:
            there = f"there are {', '.join(device.name for device in able)}" if able else "there are none for layers"
            raise ValueError(f"there is no device {', '.join(map(repr, unknown))}: {there}")
        return list({device.number: device for name in names if (device := by_name[name.casefold()])}.values())
    local = [device for device in able if not device.is_remote]
    gpus = [device for device in local if device.kind == "GPU"] or local
    # First the remote ones, as llama.cpp has it: the last layers, and the logits with them, are then here.
    by_number = {device.number: device for device in able if device.is_remote}
    chosen = [by_number[number] for number in remote if number in by_number]
    for device in gpus:
        if not device.id or device.id not in {other.id for other in chosen}:
            chosen.append(device)
    return chosen


def room(device: Device) -> int | None:
    """Bytes that may be taken of a device; None where nobody knows how many it has."""
    if device.memory_total <= 0:
        return None
    return max(0, device.memory_free - min(MAX_MARGIN, device.memory_total // MARGIN_SHARE))


def fits(memory: Sequence[MemoryUse], devices: Sequence[Device], extra: Mapping[int, int]) -> bool:
    """Whether every device has room for what it is to hold, and for the `extra` bytes by its number."""
    wanted = {use.device: use.total for use in memory}
    for device in devices:
        free = room(device)
        if free is not None and wanted.get(device.number, 0) + extra.get(device.number, 0) > free:
            return False
    return True


def most_layers(n_layers: int, try_layers: Callable[[int], bool]) -> int:
    """The most layers, up to `n_layers`, for which `try_layers` is true, taking it that fewer layers fit where more do;
    it is asked about a number once, and never about 0. All are tried first, as they mostly fit."""
    if n_layers <= 0 or try_layers(n_layers):
        return max(0, n_layers)
    least, most = 0, n_layers - 1
    while least < most:
        middle = (least + most + 1) // 2
        if try_layers(middle):
            least = middle
        else:
            most = middle - 1
    return least


def steps_down(n_layers: int) -> Iterator[int]:
    """Numbers of layers to try, one after the other, where a device has less room than it said."""
    yield n_layers
    while n_layers > 0:
        n_layers -= max(1, n_layers // 4)
        yield n_layers
