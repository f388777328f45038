"""Where a model goes: which devices it gets, and for how many of its layers they have room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

from trio_runner.info import Device, MemoryUse

MAX_MARGIN: Final = 1 << 30
MARGIN_SHARE: Final = 8
"""Part of a device's memory that stays free: one eighth, but at most MAX_MARGIN bytes. The driver, the screen, and what
the backend allocates for a moment need it, and no figure of the model counts them."""


def choose_devices(devices: Sequence[Device], names: Collection[str] | None, remote: Sequence[int]) -> list[Device]:
    """The devices that layers may go to.

    With `names`, these are the named devices, in the order of the names. With None, they are the devices with the
    numbers `remote`, in that order, and then all GPUs of this machine. Integrated GPUs share the memory of the CPU, and
    are chosen only where there is no other GPU. Hardware that two backends found is chosen once.

    Raises ValueError for a name that no device for layers has.
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
    # Remote devices come first, as in llama.cpp, so that the last layers and the logits are on this machine.
    by_number = {device.number: device for device in able if device.is_remote}
    chosen = [by_number[number] for number in remote if number in by_number]
    for device in gpus:
        if not device.id or device.id not in {other.id for other in chosen}:
            chosen.append(device)
    return chosen


def room(device: Device) -> int | None:
    """Bytes of a device that a model may take; None if the backend does not report the device's memory."""
    if device.memory_total <= 0:
        return None
    return max(0, device.memory_free - min(MAX_MARGIN, device.memory_total // MARGIN_SHARE))


def fits(memory: Sequence[MemoryUse], devices: Sequence[Device], extra: Mapping[int, int]) -> bool:
    """Whether every device has room for what `memory` puts there, and for its `extra` bytes, by number."""
    wanted = {use.device: use.total for use in memory}
    for device in devices:
        free = room(device)
        if free is not None and wanted.get(device.number, 0) + extra.get(device.number, 0) > free:
            return False
    return True


def most_layers(n_layers: int, try_layers: Callable[[int], bool]) -> int:
    """The most layers, up to `n_layers`, for which `try_layers` returns True.

    All layers are tried first, for they mostly fit. Otherwise fewer layers are taken to fit where more do. No number is
    tried twice, and 0 is never tried.
    """
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
    """Numbers of layers to try one after the other, down to 0, when a device has less room than it reported."""
    yield n_layers
    while n_layers > 0:
        n_layers -= max(1, n_layers // 4)
        yield n_layers
