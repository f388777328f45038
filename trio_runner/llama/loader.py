"""LlamaLoader: from files to a `Runtime`, with progress, and cancellable while the weights are read."""

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
"""How often a load is watched. llama.cpp would call back instead, but from inside the load, where Python must not."""

T = TypeVar("T")

logger = logging.getLogger("trio_runner.placement")


class LlamaLoader:
    """Loads a model with its projector and adapters, and makes its context: `trio_runner.core.ports.Loader` over
    llama.cpp."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        """Load everything. `progress` and `cancelled` are called from this thread and from one more, never at once.

        Raises `LoadError` naming the file at fault, or `EngineClosed` soon after `cancelled()` has turned true.
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
                raise LoadError("the model takes tokens only, no rows of images", path=path)
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
        """Those that layers go to. Raises `LoadError`."""
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
            # llama.cpp would share out layers by proportions of nothing.
            names = ", ".join(device.name for device in devices)
            if self.config.gpu_layers != "auto":
                raise LoadError(f"no memory is free on {names}")
            logger.warning("no memory is free on %s: the CPU computes everything", names)
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
        """The model and its context, with as many layers on devices as was asked for, or as there is room for."""
        wanted = self.config.gpu_layers
        if not devices:
            attempts: Iterable[int] = (0,)
        elif wanted == "auto":
            fitting = self._fitting_layers(config, n_layers, devices, cancelled)
            if not fitting:
                names = ", ".join(device.name for device in devices)
                logger.warning("not one layer fits into what is free on %s: the CPU computes everything", names)
            attempts = steps_down(fitting)
        else:
            attempts = (n_layers if wanted < 0 else min(wanted, n_layers),)
        for n in attempts:
            used = tuple(devices) if n else ()
            model: Model | None = None
            try:
                model = watch.load(partial(self._model, used, n), 0.0, share)
                _stop_if(cancelled)
                context = Context(model, config, on_devices=n > 0)
            except (LoadError, NativeError) as failure:
                if model is not None:
                    model.close()  # or the next attempt would have to do with what it leaves
                if not n:
                    raise
                reason = failure.message if isinstance(failure, NativeError) else failure.reason
                names = ", ".join(device.name for device in devices)
                if not _are_there(devices):  # or the CPU would be given what was to be on other machines
                    raise LoadError(f"with {n} layers on {names}: {reason}", path=self.config.path) from failure
                if wanted != "auto":
                    raise LoadError(
                        f'with {n} layers on {names}: {reason} (gpu_layers "auto" takes as many as fit)',
                        path=self.config.path,
                    ) from failure
                logger.warning("%d layers cannot be had on %s, trying fewer: %s", n, names, reason)
            else:
                placement = Placement(n_layers, n, used, context.memory)
                for line in describe_placement(placement):
                    logger.info("%s", line)
                return model, context, placement
        raise AssertionError("the last attempt is without devices")

    def _fitting_layers(
        self, config: EngineConfig, n_layers: int, devices: list[Device], cancelled: Callable[[], bool]
    ) -> int:
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
            # The file is to blame, and then so does the load; or this kind of model cannot be measured.
            logger.info("what the model takes of a device is not known: %s", failure)
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
            # Images are encoded beside a context that decodes, which has as many.
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
                logger.warning("the projector cannot be had on a device: %s", failure)
        return open_on()


class _Watch:
    """Loads one file after the other, and tells how far all of them have come: never less than before."""

    def __init__(self, progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        self._progress = progress
        self._cancelled = cancelled
        self._furthest = 0.0

    def load(self, open_file: Callable[[LoadProgress], T], begin: float, end: float) -> T:
        """Call `open_file` with a progress of its own, which stands for `begin` to `end` of the whole."""
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
    """A line for each place that the model lies in."""
    lines = [f"{placement.n_device_layers} of {placement.n_layers} layers are on devices"] if placement.devices else []
    for device, use in placement.places:
        name = "this machine" if device is None else f"{device.name} ({device.description})"
        free = "" if device is None else f" of {device.memory_free >> 20} free"
        lines.append(f"{name}: {use.total / MIB:.0f} MiB{free}: {use}")
    return lines


def _are_there(devices: Iterable[Device]) -> bool:
    """Whether those among them that belong to rpc-servers can still be reached."""
    remote = {device.number for device in devices if device.is_remote}
    return not remote or remote <= {device.number for device in all_devices(remote)}


def _n_layers(header: GgufHeader) -> int:
    """The blocks of the model, and the layer that makes logits."""
    n_blocks = header.metadata.get(f"{header.architecture}.block_count")
    return 1 + (n_blocks if isinstance(n_blocks, int) else 0)


def _check_model(path: str) -> GgufHeader:
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
