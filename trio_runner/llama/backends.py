"""Backends and devices: what is there, what is not and why, and those that other machines lend."""

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
"""How long an rpc-server may take to say which devices it has."""

_KINDS: Final[dict[int, DeviceKind]] = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}
_WEIGHTS, _KV_CACHE = 0, 1

_rpc_lock = threading.Lock()
_remote: set[int] = set()
"""Numbers of the devices of rpc-servers: those that one engine has added are there for all of them."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A backend that is shipped beside the package; `problem` says why it could not be opened."""

    name: str
    problem: str | None = None


def devices(remote: Collection[int] = ()) -> tuple[Device, ...]:
    """Every device that a backend found on this machine, and the `remote` ones by their numbers. One that is gone and
    cannot be asked is left out, with a warning."""
    found = []
    for number in range(check("trio_device_count", native().lib.trio_device_count())):
        if number in remote or number not in _remote:
            try:
                found.append(_device(number))
            except NativeError as failure:
                logger.warning("device %d cannot be asked what it is: %s", number, failure.message)
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
    """The types of weights that the device multiplies with; the CPU computes with the others. A remote one says yes to
    all."""
    return _types(device, _WEIGHTS)


def kv_types(device: Device) -> tuple[str, ...]:
    """The types of a KV cache that its flash attention reads, likewise."""
    return _types(device, _KV_CACHE)


def _types(device: Device, use: int) -> tuple[str, ...]:
    supports = native().lib.trio_device_supports
    return tuple(
        name
        for name, number in WEIGHT_TYPES.items()
        if check("trio_device_supports", supports(device.number, use, number))
    )


def plugins() -> tuple[Plugin, ...]:
    """The backends besides the CPU's that are shipped here."""
    native()
    found = []
    for path in sorted(LIBRARY_DIRECTORY.glob("libggml-*.so")):
        name = path.stem.removeprefix("libggml-")
        if name == "base" or re.match(r"cpu\b", name):
            continue
        try:
            # ggml has opened it if it could, and says nothing if it could not.
            ctypes.CDLL(str(path))
        except OSError as problem:
            found.append(Plugin(name, str(problem)))
        else:
            found.append(Plugin(name))
    return tuple(found)


def add_rpc_server(endpoint: str) -> range:
    """The numbers of the devices of an rpc-server, "host:port". Raises `LoadError` where it does not answer in
    `RPC_SECONDS`, or is not one."""
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

    # What waits for a name server, or for what never answers, has deadlines of its own, and may outlive this one.
    thread = threading.Thread(target=add, name="trio-runner-rpc", daemon=True)
    thread.start()
    thread.join(RPC_SECONDS)
    drain_log()
    if not result:
        raise LoadError(
            f"the rpc-server {endpoint} does not answer after {RPC_SECONDS:g} seconds: is it one, of this version, and "
            "has it no other client?"
        )
    outcome = result[0]
    if isinstance(outcome, RunnerError):
        reason = outcome.message if isinstance(outcome, NativeError) else str(outcome)
        raise LoadError(reason if endpoint in reason else f"the rpc-server {endpoint} cannot be used: {reason}")
    return outcome
