"""LlamaLoader: from files to a `Runtime`, with progress, and cancellable while the weights are read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.engine.runtime import Runtime
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.llama.adapter import Adapter
from trio_runner.llama.context import Context
from trio_runner.llama.gguf import check_gguf
from trio_runner.llama.model import LoadProgress, Model

POLL_SECONDS: Final = 0.05
"""How often a load is watched. llama.cpp would call back instead, but from inside the load, where Python must not."""


class LlamaLoader:
    """Loads a model with its adapters and makes its context: `trio_runner.engine.runtime.Loader` over llama.cpp."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        """Load everything. `progress` and `cancelled` are called from this thread and from one more, never at once.

        Raises `LoadError` naming the file at fault, or `EngineClosed` soon after `cancelled()` has turned true.
        """
        check_gguf(self.config.path)
        _stop_if(cancelled)
        model = self._load_model(progress, cancelled)
        _stop_if(cancelled)
        adapters = tuple(Adapter(model, adapter) for adapter in self.config.adapters)
        try:
            context = Context(model, config, adapters)
        except NativeError as failure:
            raise LoadError(f"no context could be created: {failure.message}", path=self.config.path) from failure
        _stop_if(cancelled)
        progress(1.0)
        return Runtime(model, context)

    def _load_model(self, progress: Callable[[float], None], cancelled: Callable[[], bool]) -> Model:
        load = LoadProgress()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                if cancelled():
                    load.cancel()
                    return
                progress(load.fraction)

        watcher = threading.Thread(target=watch, name="trio-runner-load", daemon=True)
        watcher.start()
        try:
            return Model(self.config, load)
        except NativeError as failure:
            raise LoadError(failure.message, path=self.config.path) from failure
        finally:
            done.set()
            watcher.join()


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise EngineClosed("loading was cancelled")
