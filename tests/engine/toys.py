"""A toy that counts, waits and fails on command: what the tests of the engine share."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache

import trio

from trio_runner.config import EngineConfig
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine, open_engine
from trio_runner.engine.runtime import Runtime
from trio_runner.testing import END, Interruption, ToyContext, ToyLoader, ToyModel, toy_continuation

DEADLINE = 20.0
"""Seconds for a whole test."""
PATIENCE = 10.0
"""Seconds a thread is held at most: trio cannot cancel it, so it must give up by itself."""


class Model(ToyModel):
    n_closed = 0
    on_tokenize: Callable[[str], None] | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if self.on_tokenize is not None:
            self.on_tokenize(text)
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)

    def close(self) -> None:
        super().close()
        self.n_closed += 1


class Context(ToyContext):
    n_closed = 0
    n_aborts = 0

    def abort(self, number: int) -> None:
        assert not self.closed
        self.n_aborts += 1
        super().abort(number)

    def close(self) -> None:
        super().close()
        self.n_closed += 1


class Toy:
    """A loader that remembers what it loaded. The hooks may be set until then, `context.on_decode` at any time."""

    model: Model
    context: Context
    n_loaded = 0

    def __init__(self) -> None:
        self.limits: dict[str, object] = {}
        self.on_load: Callable[[Callable[[float], None], Callable[[], bool]], None] | None = None
        self.on_decode: Callable[[Batch], Interruption | None] | None = None
        self.on_tokenize: Callable[[str], None] | None = None

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        loaded = ToyLoader(self.limits, self.on_load)(config, progress=progress, cancelled=cancelled)
        self.model = Model()
        self.model.on_tokenize = self.on_tokenize
        self.context = Context(loaded.context.limits, on_decode=self.on_decode)
        self.n_loaded += 1
        return Runtime(self.model, self.context)

    @asynccontextmanager
    async def engine(self, **options: object) -> AsyncIterator[Engine]:
        """`open_engine` under a deadline."""
        with trio.fail_after(DEADLINE):
            async with open_engine(self, **options) as engine:  # type: ignore[arg-type]
                yield engine

    def check_closed(self) -> None:
        """Whatever was loaded is closed, once, and so are all samplers."""
        if self.n_loaded:
            assert self.n_loaded == 1
            assert self.context.n_closed == 1
            assert self.model.n_closed == 1
            assert all(sampler.closed for sampler in self.model.samplers)

    def uids_run(self, since: int = 0) -> list[int]:
        """The uid of every chunk that reached the context, beginning with batch number `since`."""
        return [chunk.uid for batch in self.context.batches[since:] for chunk in batch.chunks]


class Gate:
    """For `on_decode`: stands the decode thread still before each batch, until it is let through or aborted. Of an
    aborted batch `n_kept` rows are in the KV cache."""

    def __init__(self, toy: Toy, *, n_kept: int = 0) -> None:
        self.batches: list[Batch] = []
        """All that have arrived."""
        self.n_aborted = 0
        self.n_kept = n_kept
        self._toy = toy
        self._passes = threading.Semaphore(0)
        self._is_open = False

    def __call__(self, batch: Batch) -> Interruption | None:
        self.batches.append(batch)
        deadline = time.monotonic() + PATIENCE
        while not self._is_open and not self._passes.acquire(timeout=0.002):
            if self._toy.context.aborted_number == batch.number:
                self.n_aborted += 1
                return Interruption(DecodeOutcome.ABORTED, self.n_kept)
            assert time.monotonic() < deadline, "nobody opened the gate"
        return None

    def let(self, n_batches: int = 1) -> None:
        """Let that many batches through, the one that waits included."""
        self._passes.release(n_batches)

    def open(self) -> None:
        """Let all batches through from now on."""
        self._is_open = True
        self._passes.release()

    async def reached(self, n_batches: int) -> None:
        """Until the decode thread stands before batch number `n_batches`, counted from 1."""
        await until(lambda: len(self.batches) >= n_batches)


class Latch:
    """For the other hooks: whoever comes waits until `open`."""

    def __init__(self) -> None:
        self.n_arrived = 0
        self._opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self.n_arrived += 1
        assert self._opened.wait(PATIENCE), "nobody opened the latch"

    def open(self) -> None:
        self._opened.set()

    async def reached(self, n_arrived: int = 1) -> None:
        await until(lambda: self.n_arrived >= n_arrived)


async def until(condition: Callable[[], bool]) -> None:
    """Threads tell nobody: look again and again. The caller has the deadline."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


def is_idle(engine: Engine) -> bool:
    """No reader, no slot in use, nothing in the queue."""
    statistics = engine.statistics()
    return statistics.generations == statistics.busy == statistics.waiting == 0


async def until_idle(engine: Engine) -> None:
    await until(lambda: is_idle(engine))


@cache
def prompts(count: int, n_tokens: int) -> tuple[str, ...]:
    """Different prompts, each of 10 bytes, that the toy continues with at least `n_tokens` tokens."""
    candidates = (f"prompt{i:03}:" for i in itertools.count())
    endless = (text for text in candidates if END not in toy_continuation(list(text.encode()), n_tokens))
    return tuple(itertools.islice(endless, count))
