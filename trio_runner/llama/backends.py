"""Backends and devices: those found on this machine, why a backend could not be opened, and devices of rpc-servers."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from trio_runner.errors import LoadError, NativeError, RunnerError
from trio_runner.info import Device, DeviceKind
from trio_runner.llama.ggml_types import WEIGHT_TYPES
from trio_runner.llama.library import LIBRARY_DIRECTORY, check, drain_log, logger, native

RPC_SECONDS: Final = 10.0
"""Seconds an rpc-server may take to say which devices it has."""

_KINDS: Final[dict[int, DeviceKind]] = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}
_WEIGHTS, _KV_CACHE = 0, 1

_rpc_lock = threading.Lock()
_remote: set[int] = set()
"""Numbers of the devices of rpc-servers. ggml's list of devices is global, so it has those of every engine."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A backend that is shipped beside the package. `problem` says why it could not be opened, if so."""

    name: str
    problem: str | None = None


def devices(remote: Collection[int] = ()) -> tuple[Device, ...]:
    """Every device that a backend has found on this machine, and the `remote` devices with these numbers.

    A device that is gone is left out, with a warning in the log.
    """
    found = []
    for number in range(check("trio_device_count", native().lib.trio_device_count())):
        if number in remote or number not in _remote:
            try:
                found.append(_device(number))
            except NativeError as failure:
                logger.warning("device %d does not answer: %s", number, failure.message)
    return tuple(found)


def _device(number: int) -> Device:
    loaded = native()
    raw = loaded.ffi.new("trio_device *")
    check("trio_device_get", loaded.lib.trio_device_get(number, raw))
    name, description, backend, identity = (
        loaded.ffi.string(text).decode(errors="replace") for text in (raw.name, raw.description, raw.backend, raw.id)
    )
    kind = _KINDS.get(raw.type, "other")
    remote = bool(raw.is_remote)
    return Device(number, name, description, backend, kind, raw.memory_free, raw.memory_total, identity, remote)


def weight_types(device: Device) -> tuple[str, ...]:
    """The types of weights that the device multiplies with. The CPU computes with the others.

    A remote device claims to support every type.
    """
    return _types(device, _WEIGHTS)


def kv_types(device: Device) -> tuple[str, ...]:
    """The types of a KV cache that the device's flash attention reads. A remote device claims to support every type."""
    return _types(device, _KV_CACHE)


def _types(device: Device, use: int) -> tuple[str, ...]:
    supports = native().lib.trio_device_supports
    return tuple(
        name
        for name, number in WEIGHT_TYPES.items()
        if check("trio_device_supports", supports(device.number, use, number))
    )


def plugins() -> tuple[Plugin, ...]:
    """The backends beside the package, without those for the CPU."""
    native()
    found = []
    for path in sorted(LIBRARY_DIRECTORY.glob("libggml-*.so")):
        name = path.stem.removeprefix("libggml-")
        if name == "base" or re.match(r"cpu\b", name):
            continue
        try:
            # ggml does not say why it could not open a plugin, so open it here again.
            ctypes.CDLL(str(path))
        except OSError as problem:
            found.append(Plugin(name, str(problem)))
        else:
            found.append(Plugin(name))
    return tuple(found)


def add_rpc_server(endpoint: str) -> range:
    """Add the devices of the rpc-server at `endpoint`, "host:port", and return their numbers.

    For a server that was added before, returns the same numbers again. Raises `LoadError` if it does not answer within
    `RPC_SECONDS`, or is not an rpc-server of this version.
    """
    loaded = native()
    result: list[range | RunnerError] = []

    def add() -> None:
        first = loaded.ffi.new("int32_t *")
        try:
            with _rpc_lock:
                n_devices = check("trio_rpc_add", loaded.lib.trio_rpc_add(endpoint.encode(), first))
            numbers = range(first[0], first[0] + n_devices)
            _remote.update(numbers)
            result.append(numbers)
        except RunnerError as failure:
            result.append(failure)

    # A thread, because looking up the name and connecting have deadlines of their own, which may be longer.
    thread = threading.Thread(target=add, name="trio-runner-rpc", daemon=True)
    thread.start()
    thread.join(RPC_SECONDS)
    drain_log()
    if not result:
        raise LoadError(
            f"the rpc-server {endpoint} did not answer within {RPC_SECONDS:g} seconds: is it an rpc-server of this "
            "version, and without another client?"
        )
    outcome = result[0]
    if isinstance(outcome, RunnerError):
        reason = outcome.message if isinstance(outcome, NativeError) else str(outcome)
        raise LoadError(reason if endpoint in reason else f"the rpc-server {endpoint} cannot be used: {reason}")
    return outcome
