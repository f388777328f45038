"""LlamaLoader: from files to a `Runtime`, with progress, and cancellable while the weights are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.engine.runtime import LoadedAdapter, Runtime
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.llama.context import Context, default_threads
from trio_runner.llama.gguf import check_gguf
from trio_runner.llama.model import LoadProgress, Model
from trio_runner.llama.projector import ARCHITECTURE, Projector, check_projector

POLL_SECONDS: Final = 0.05
"""How often a load is watched. llama.cpp would call back instead, but from inside the load, where Python must not."""

T = TypeVar("T")


class LlamaLoader:
    """Loads a model with its projector and adapters, and makes its context: `trio_runner.engine.runtime.Loader` over
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
        _check_model(path)
        if projector_path is not None:
            check_projector(projector_path)
        _stop_if(cancelled)
        watch = _Watch(progress, cancelled)
        share = 1.0 if projector_path is None else _size(path) / (_size(path) + _size(projector_path))
        try:
            model = watch.load(lambda load: Model(self.config, load), 0.0, share)
            _stop_if(cancelled)
            context = Context(model, config)
        except NativeError as failure:
            raise LoadError(failure.message, path=path) from failure
        _stop_if(cancelled)
        projector: Projector | None = None
        if projector_path is not None:
            if not context.takes_rows:
                raise LoadError("the model takes tokens only, no rows of images", path=path)
            projector = watch.load(lambda load: self._projector(model, projector_path, config, load), share, 1.0)
        adapters = []
        for adapter in self.config.adapters:
            _stop_if(cancelled)
            loaded = model.adapter(adapter.path)
            adapters.append(LoadedAdapter(adapter.name, loaded, adapter.scale, adapter.path))
        _stop_if(cancelled)
        progress(1.0)
        return Runtime(model, context, projector, tuple(adapters))

    def _projector(self, model: Model, path: str, config: EngineConfig, load: LoadProgress) -> Projector:
        return Projector(
            model,
            path,
            max_rows=config.batch_size,
            # Images are encoded beside a context that decodes, which has as many.
            threads=config.threads or default_threads()[0],
            use_gpu=self.config.gpu_layers != 0,
            flash_attention=config.flash_attention,
            progress=load,
        )


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


def _check_model(path: str) -> None:
    header = check_gguf(path)
    kind = header.metadata.get("general.type", "model")
    if header.architecture == ARCHITECTURE:
        raise LoadError("this is a projector (mmproj), not a model", path=path)
    if kind == "adapter":
        raise LoadError("this is an adapter, not a model", path=path)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as failure:
        raise LoadError(f"cannot be read: {failure}", path=path) from failure


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise EngineClosed("loading was cancelled")
