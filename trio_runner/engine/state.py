"""What an engine is doing and what it has loaded: the facts that all its parts share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from trio_runner.config import EngineConfig
from trio_runner.core.ports import Runtime
from trio_runner.engine.request_times import RequestTimes
from trio_runner.errors import EngineBroken, EngineClosed, EngineLoading, LoadError, RunnerError
from trio_runner.info import SchedulerStatistics, Status

if TYPE_CHECKING:
    from trio_runner.engine.decode_loop import DecodeLoop
    from trio_runner.engine.image_store import ImageStore

MIN_RETRY_AFTER = 1.0
"""Seconds after which a refused request is told to come back, at least: HTTP counts in whole seconds."""
MAX_RETRY_AFTER = 60.0
"""Seconds after which a refused request is told to come back, at most. OpenAI's clients ignore longer times: they
come back within a few seconds."""


def seconds_left(progress: float, elapsed: float) -> float:
    """The seconds until something that has reached `progress`, from 0 to 1, after `elapsed` seconds reaches 1; between
    `MIN_RETRY_AFTER` and `MAX_RETRY_AFTER`."""
    seconds = elapsed * (1 - progress) / progress if progress > 0 else elapsed
    return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


class EngineState:
    """Changed by the lifecycle only, and on the trio thread only, except `progress`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.status: Status = "loading"
        self.progress = 0.0
        """How much of the model is loaded, from 0 to 1. The loading thread sets it."""
        self.failure: BaseException | None = None
        """Why `status` is "broken"."""
        self.runtime: Runtime | None = None
        """The model and its context, from the end of loading until the engine starts to free them."""
        self.loop: DecodeLoop | None = None
        """The decode loop. Set exactly while `runtime` is."""
        self.last_statistics = SchedulerStatistics()
        """What is left of the statistics of the decode loop, once that is gone."""
        self.times = RequestTimes()
        """How long requests took. The decode thread writes it."""
        self.images: ImageStore | None = None
        """The encoded images. Set exactly while `runtime` is, if the model has a projector."""
        self.is_stopping = False
        """Requests in flight end now. While the engine drains, they may still finish."""
        self._settled = trio.Event()
        self.begun = time.monotonic()
        """When the load began."""

    def is_load_cancelled(self) -> bool:
        """Whether a model that is being loaded is not wanted any more. The loading thread calls this."""
        return self.status != "loading"

    def settle(self) -> None:
        """Wake everybody who waits for the model: it is loaded, or will never be."""
        self._settled.set()

    def break_down(self, failure: BaseException) -> None:
        """Set the status to "broken", for this reason."""
        self.failure = failure
        self.status = "broken"
        self.settle()

    async def wait_ready(self, at_most: float | None = None) -> None:
        """Wait until the model is loaded: at most `at_most` seconds, or those of the configuration. Raises
        `EngineLoading` if that is too short, `LoadError` if the model did not load, `EngineBroken` if the engine broke,
        and `EngineClosed` if the engine is closed or closing."""
        with trio.move_on_after(self.config.load_wait if at_most is None else at_most):
            await self._settled.wait()
        self.ready_runtime()

    def seconds_to_load(self) -> float:
        """How long the rest of the load will probably take: it goes on as fast as it has gone so far. If nothing is
        loaded yet, as long again as it has taken."""
        return seconds_left(self.progress, time.monotonic() - self.begun)

    def ready_runtime(self) -> Runtime:
        """The runtime, for a new request. Raises `EngineLoading` while the model loads, and otherwise the errors of
        `wait_ready`."""
        if self.status == "ready" and self.runtime is not None:
            return self.runtime
        if self.status == "broken":
            raise self.broken_error()
        if self.status == "loading":
            text = f"the model is still loading ({self.progress:.0%})"
            raise EngineLoading(text, retry_after=self.seconds_to_load())
        raise EngineClosed("the engine is shutting down")

    def live_runtime(self) -> Runtime:
        """The runtime, for a request that came before the engine began to drain. Raises the errors of
        `ready_runtime`."""
        if self.status == "closing" and self.runtime is not None and not self.is_stopping:
            return self.runtime
        return self.ready_runtime()

    def broken_error(self) -> RunnerError:
        """What a request to a broken engine raises. It is a new exception each time, so that every reader raises an
        exception of its own."""
        if isinstance(self.failure, LoadError):
            return LoadError(self.failure.reason, path=self.failure.path)
        error = EngineBroken(f"the engine is broken: {self.failure}")
        error.__cause__ = self.failure
        return error
