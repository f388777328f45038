"""LlamaLoader: loads a model's files into a `Runtime`, reports progress, and can be cancelled on the way."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeVar

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.core.placement import choose_devices, fits, most_layers, steps_down
from trio_runner.core.ports import LoadedAdapter, Runtime
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.info import MIB, Device, Placement
from trio_runner.llama.backends import add_rpc_server
from trio_runner.llama.backends import devices as all_devices
from trio_runner.llama.context import Context
from trio_runner.llama.context_plan import measure
from trio_runner.llama.gguf import ADAPTER_TYPE, PROJECTOR_ARCHITECTURE, GgufHeader, check_gguf, check_parts
from trio_runner.llama.model import LoadProgress, Model
from trio_runner.llama.projector import Projector, check_projector
from trio_runner.llama.threads import default_threads

POLL_SECONDS: Final = 0.05
"""Seconds between two looks at a load's progress. llama.cpp offers a callback, but calls it inside the load, where
the shim must not call into Python."""

T = TypeVar("T")

logger = logging.getLogger("trio_runner.placement")


class LlamaLoader:
    """Loads a model with its projector and adapters, and creates its context: `trio_runner.core.ports.Loader` over
    llama.cpp."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        """Load everything.

        `progress` and `cancelled` are called from this thread and from one other, but never at the same time. Raises
        `LoadError` that names the file at fault, or `EngineClosed` soon after `cancelled()` has returned True.
        """
        path, projector_path = self.config.path, self.config.projector
        header = _check_model(path)
        n_bytes = sum(map(_size, check_parts(path, header)))
        if projector_path is not None:
            check_projector(projector_path)
        _stop_if(cancelled)
        watch = _Watch(progress, cancelled)
        share = 1.0 if projector_path is None else n_bytes / (n_bytes + _size(projector_path))
        devices = self._devices()
        try:
            model, context, placement = self._load(config, _n_layers(header), devices, cancelled, watch, share)
        except NativeError as failure:
            raise LoadError(failure.message, path=path) from failure
        _stop_if(cancelled)
        projector: Projector | None = None
        if projector_path is not None:
            if not context.takes_rows:
                raise LoadError("the model takes tokens only, not images", path=path)
            device = placement.devices[0].number if placement.devices else None
            projector = watch.load(
                lambda load: self._projector(model, projector_path, config, device, load), share, 1.0
            )
        adapters = []
        for adapter in self.config.adapters:
            _stop_if(cancelled)
            loaded = model.adapter(adapter.path)
            adapters.append(LoadedAdapter(adapter.name, loaded, adapter.scale, adapter.path))
        _stop_if(cancelled)
        progress(1.0)
        return Runtime(model, context, projector, tuple(adapters), placement)

    def _devices(self) -> list[Device]:
        """The devices that layers go to. Raises `LoadError` for settings that cannot be met."""
        servers = {endpoint: add_rpc_server(endpoint) for endpoint in self.config.rpc}
        remote = [number for numbers in servers.values() for number in numbers]
        if self.config.gpu_layers == 0:
            return []
        try:
            devices = choose_devices(there := all_devices(remote), self.config.devices, remote)
        except ValueError as error:
            raise LoadError(str(error)) from None
        if gone := [name for name, numbers in servers.items() if set(numbers) - {device.number for device in there}]:
            raise LoadError(f"the rpc-server {' and '.join(gone)} is gone")
        if not devices and self.config.gpu_layers != "auto" and self.config.gpu_layers > 0:
            logger.warning("there is no device for %d layers: the CPU computes everything", self.config.gpu_layers)
        if self.config.split_mode == "none" and devices:
            if self.config.main_gpu >= len(devices):
                raise LoadError(f"main_gpu is {self.config.main_gpu}, but there are {len(devices)} devices")
            devices = [devices[self.config.main_gpu]]
        if len(self.config.tensor_split) > len(devices) > 0:
            raise LoadError(f"tensor_split has {len(self.config.tensor_split)} parts for {len(devices)} devices")
        if devices and not self.config.tensor_split and not any(d.memory_free or not d.memory_total for d in devices):
            # llama.cpp divides the layers in proportion to the free memory, which is zero everywhere.
            if self.config.gpu_layers != "auto":
                raise LoadError(f"no memory is free on {_names(devices)}")
            logger.warning("no memory is free on %s: the CPU computes everything", _names(devices))
            return []
        return devices

    def _load(
        self,
        config: EngineConfig,
        n_layers: int,
        devices: list[Device],
        cancelled: Callable[[], bool],
        watch: _Watch,
        share: float,
    ) -> tuple[Model, Context, Placement]:
        """Load the model and create its context, with as many layers on devices as wanted, or as fit.

        `share` is the part of all bytes that are the model's. Raises `LoadError`, `NativeError` or `EngineClosed`.
        """
        for n in self._attempts(config, n_layers, devices, cancelled):
            used = tuple(devices) if n else ()
            model: Model | None = None
            try:
                model = watch.load(partial(self._model, used, n), 0.0, share)
                _stop_if(cancelled)
                context = Context(model, config, on_devices=n > 0)
            except (LoadError, NativeError) as failure:
                if model is not None:
                    model.close()  # frees its memory for the next attempt
                if not n:
                    raise
                self._give_up_or_go_on(n, devices, failure)
            else:
                placement = Placement(n_layers, n, used, context.memory)
                for line in describe_placement(placement):
                    logger.info("%s", line)
                return model, context, placement
        raise AssertionError("the last attempt uses no devices")

    def _attempts(
        self, config: EngineConfig, n_layers: int, devices: list[Device], cancelled: Callable[[], bool]
    ) -> Iterable[int]:
        """Numbers of layers to try on devices, one after the other."""
        wanted = self.config.gpu_layers
        if not devices:
            return (0,)
        if wanted != "auto":
            return (n_layers if wanted < 0 else min(wanted, n_layers),)
        fitting = self._fitting_layers(config, n_layers, devices, cancelled)
        if not fitting:
            logger.warning("no layer fits into the free memory of %s: the CPU computes everything", _names(devices))
        return steps_down(fitting)

    def _give_up_or_go_on(self, n: int, devices: list[Device], failure: LoadError | NativeError) -> None:
        """After `n` layers on `devices` have failed: raise `LoadError`, unless fewer layers may be tried."""
        reason = failure.message if isinstance(failure, NativeError) else failure.reason
        message = f"with {n} layers on {_names(devices)}: {reason}"
        if not _are_there(devices):  # trying again would give this machine what other machines were to hold
            raise LoadError(message, path=self.config.path) from failure
        if self.config.gpu_layers != "auto":
            hint = ' (gpu_layers "auto" takes as many as fit)'
            raise LoadError(message + hint, path=self.config.path) from failure
        logger.warning("%d layers do not load on %s, trying fewer: %s", n, _names(devices), reason)

    def _fitting_layers(
        self, config: EngineConfig, n_layers: int, devices: list[Device], cancelled: Callable[[], bool]
    ) -> int:
        """How many layers fit on `devices`, by what llama.cpp says they would take; all, if it cannot say."""
        extra = sum(_size(file) for file in (self.config.projector, *(a.path for a in self.config.adapters)) if file)

        def try_layers(n: int) -> bool:
            _stop_if(cancelled)
            model = self._model(devices, n, no_alloc=True)
            try:
                return fits(measure(model, config), devices, {devices[0].number: extra})
            finally:
                model.close()

        try:
            return most_layers(n_layers, try_layers)
        except (LoadError, NativeError) as failure:
            # Either the file is at fault, and loading it fails too, or this kind of model cannot be measured.
            logger.info("the memory that the model takes of a device is not known: %s", failure)
            return n_layers

    def _model(
        self, devices: Sequence[Device], n: int, progress: LoadProgress | None = None, *, no_alloc: bool = False
    ) -> Model:
        numbers = [device.number for device in devices]
        return Model(self.config, progress, devices=numbers, n_device_layers=n, no_alloc=no_alloc)

    def _projector(
        self, model: Model, path: str, config: EngineConfig, device: int | None, load: LoadProgress
    ) -> Projector:
        open_on = partial(
            Projector,
            model,
            path,
            max_rows=config.batch_size,
            # As many as the context decodes with, at the same time.
            threads=config.threads or default_threads()[0],
            flash_attention=config.flash_attention,
            progress=load,
        )
        if device is not None:
            try:
                return open_on(device=device)
            except (LoadError, NativeError) as failure:
                if self.config.gpu_layers != "auto":
                    raise
                logger.warning("the projector does not load on a device, the CPU computes it: %s", failure)
        return open_on()


class _Watch:
    """Loads one file after the other and reports the progress of all of them, which never goes back."""

    def __init__(self, progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        self._progress = progress
        self._cancelled = cancelled
        self._furthest = 0.0

    def load(self, open_file: Callable[[LoadProgress], T], begin: float, end: float) -> T:
        """Return what `open_file` returns. Its progress from 0 to 1 is reported as `begin` to `end`."""
        load = LoadProgress()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                if self._cancelled():
                    load.cancel()
                    return
                self._furthest = max(self._furthest, begin + (end - begin) * load.fraction)
                self._progress(self._furthest)

        watcher = threading.Thread(target=watch, name="trio-runner-load", daemon=True)
        watcher.start()
        try:
            return open_file(load)
        finally:
            done.set()
            watcher.join()


def describe_placement(placement: Placement) -> list[str]:
    """One line for each device that holds a part of the model, and for this machine."""
    lines = [f"{placement.n_device_layers} of {placement.n_layers} layers are on devices"] if placement.devices else []
    for device, use in placement.places:
        name = "this machine" if device is None else f"{device.name} ({device.description})"
        free = "" if device is None else f" of {device.memory_free >> 20} free"
        lines.append(f"{name}: {use.total / MIB:.0f} MiB{free}: {use}")
    return lines


def _are_there(devices: Iterable[Device]) -> bool:
    """Whether every remote device among `devices` can still be reached."""
    remote = {device.number for device in devices if device.is_remote}
    return not remote or remote <= {device.number for device in all_devices(remote)}


def _n_layers(header: GgufHeader) -> int:
    """Layers that can go to devices: the blocks of the model, and the layer that makes logits."""
    n_blocks = header.metadata.get(f"{header.architecture}.block_count")
    return 1 + (n_blocks if isinstance(n_blocks, int) else 0)


def _names(devices: Iterable[Device]) -> str:
    return ", ".join(device.name for device in devices)


def _check_model(path: str) -> GgufHeader:
    """Check the header of a model's file. Raises `LoadError`, also for an adapter or a projector."""
    header = check_gguf(path)
    if header.architecture == PROJECTOR_ARCHITECTURE:
        raise LoadError("this is a projector (mmproj), not a model", path=path)
    if header.metadata.get("general.type") == ADAPTER_TYPE:
        raise LoadError("this is an adapter, not a model", path=path)
    return header


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as failure:
        raise LoadError(f"cannot be read: {failure}", path=path) from failure


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise EngineClosed("loading was cancelled")
