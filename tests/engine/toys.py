"""A toy model that counts, waits and fails on command, for all tests of the engine."""

from __future__ import annotations

import io
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import trio
import trio.testing
from PIL import Image

from trio_runner.config import AdapterConfig, EngineConfig
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.ports import EncodedImage, LoadedAdapter, Runtime
from trio_runner.core.prompt import Item, MediaRow
from trio_runner.engine.engine import Engine
from trio_runner.front_door import open_engine
from trio_runner.image_source import ImageSource
from trio_runner.images import load_pixels
from trio_runner.pixels import Pixels
from trio_runner.sampling import SamplingParams
from trio_runner.testing import (
    END,
    Interruption,
    ToyAdapter,
    ToyContext,
    ToyEncoding,
    ToyLoader,
    ToyModel,
    ToyProjector,
    ToySampler,
    toy_continuation,
)

DEADLINE = 20.0
"""Seconds for a whole test."""
HOLD_SECONDS = 10.0
"""Seconds that a thread is held at most. Trio cannot cancel a thread, so it must give up by itself."""


class Model(ToyModel):
    """A toy that has the special tokens of its `info` around a text."""

    n_closed = 0
    on_tokenize: Callable[[str], None] | None = None
    on_sampler: Callable[[SamplingParams], None] | None = None
    on_adapter: Callable[[str], None] | None = None

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> ToySampler:
        if self.on_sampler is not None:
            self.on_sampler(params)
        return super().sampler(params, prompt)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if self.on_tokenize is not None:
            self.on_tokenize(text)
        tokens, info = super().tokenize(text, add_special=add_special, parse_special=parse_special), self.info
        around = [(info.adds_bos, info.token_bos), (info.adds_eos, info.token_eos), (info.adds_sep, info.token_sep)]
        bos, *others = [[token] if adds and token is not None else [] for adds, token in around]
        return [*bos, *tokens, *itertools.chain(*others)] if add_special else tokens

    def adapter(self, path: str) -> ToyAdapter:
        if self.on_adapter is not None:
            self.on_adapter(path)
        return super().adapter(path)

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


class Projector(ToyProjector):
    """A toy that may divide an image into tiles, each with as many rows as the whole image would have."""

    n_closed = 0

    def __init__(self, *, shares_positions: bool = False, causal: bool = True, n_tiles: int = 1) -> None:
        super().__init__(shares_positions=shares_positions, causal=causal)
        self.n_tiles = n_tiles

    def image(self, pixels: Pixels) -> EncodedImage:
        image = super().image(pixels)
        ((media, encoded),) = image.media.items()
        tiles = [replace(media, key=media.key + bytes([n])) for n in range(self.n_tiles)]
        rows = [MediaRow(tile, row) for tile in tiles for row in range(tile.n_rows)]
        return EncodedImage((image.items[0], *rows, image.items[-1]), dict.fromkeys(tiles, encoded))

    def close(self) -> None:
        super().close()
        self.n_closed += 1


class Toy:
    """A loader that remembers what it loaded. Hooks may be set until it loads; `context.on_decode` and
    `projector.on_encode` at any time."""

    model: Model
    context: Context
    n_loaded = 0

    def __init__(self) -> None:
        self.capabilities: dict[str, object] = {}
        self.info: dict[str, object] = {}
        self.projector: Projector | None = None
        self.adapters: tuple[AdapterConfig, ...] = ()
        self.on_load: Callable[[Callable[[float], None], Callable[[], bool]], None] | None = None
        self.on_decode: Callable[[Batch], Interruption | None] | None = None
        self.on_tokenize: Callable[[str], None] | None = None
        self.on_sampler: Callable[[SamplingParams], None] | None = None
        self.on_adapter: Callable[[str], None] | None = None

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        loaded = ToyLoader(self.capabilities, self.on_load)(config, progress=progress, cancelled=cancelled)
        self.model = Model()
        self.model.info = replace(self.model.info, **self.info)  # type: ignore[arg-type]
        adapters = tuple(
            LoadedAdapter(adapter.name, self.model.adapter(adapter.path), adapter.scale, adapter.path)
            for adapter in self.adapters
        )
        self.model.on_tokenize, self.model.on_sampler = self.on_tokenize, self.on_sampler
        self.model.on_adapter = self.on_adapter
        self.context = Context(loaded.context.capabilities, on_decode=self.on_decode)
        self.n_loaded += 1
        return Runtime(self.model, self.context, self.projector, adapters)

    @asynccontextmanager
    async def engine(self, **options: object) -> AsyncIterator[Engine]:
        """`open_engine` under a deadline."""
        with trio.fail_after(DEADLINE):
            async with open_engine(self, **options) as engine:  # type: ignore[arg-type]
                yield engine

    def check_closed(self) -> None:
        """Check that everything that was loaded is closed exactly once, samplers and adapters included."""
        if self.n_loaded:
            assert self.n_loaded == 1
            assert self.context.n_closed == 1
            assert self.model.n_closed == 1
            assert self.projector is None or self.projector.n_closed == 1
            assert all(sampler.closed for sampler in self.model.samplers)
            assert all(adapter.closed for adapter in self.model.adapters)

    def uids_run(self, since: int = 0) -> list[int]:
        """The uid of every chunk that reached the context, from batch number `since` on."""
        return [chunk.uid for batch in self.context.batches[since:] for chunk in batch.chunks]


class Turnstile:
    """Stops threads, each until it is let through or gives up."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self._is_open = False

    def let(self, n: int = 1) -> None:
        """Let `n` threads through, the one that waits included."""
        self._passes.release(n)

    def open(self) -> None:
        """Let all threads through from now on."""
        self._is_open = True
        self._passes.release()

    def pass_through(self, gave_up: Callable[[], bool]) -> bool:
        """Wait to be let through. False if `gave_up`."""
        deadline = time.monotonic() + HOLD_SECONDS
        while not self._is_open and not self._passes.acquire(timeout=0.002):
            if gave_up():
                return False
            assert time.monotonic() < deadline, "nobody opened the gate"
        return True


class Gate(Turnstile):
    """For `on_decode`: stops the decode thread before each batch, until the batch is let through or aborted. Of an
    aborted batch, `n_kept` rows are in the KV cache."""

    def __init__(self, toy: Toy, *, n_kept: int = 0) -> None:
        super().__init__()
        self.batches: list[Batch] = []
        """All that have arrived at it, in order."""
        self.n_aborted = 0
        self.n_kept = n_kept
        self._toy = toy

    def __call__(self, batch: Batch) -> Interruption | None:
        self.batches.append(batch)
        if self.pass_through(lambda: self._toy.context.aborted_number == batch.number):
            return None
        self.n_aborted += 1
        return Interruption(DecodeOutcome.ABORTED, self.n_kept)

    async def reached(self, n_batches: int) -> None:
        """Until the decode thread stands before batch number `n_batches`, counted from 1."""
        await until(lambda: len(self.batches) >= n_batches)


class Shutter(Turnstile):
    """For `on_encode`: stops the projector before each image, until the image is let through or cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.encodings: list[ToyEncoding] = []
        """All that have arrived at it, in order."""

    def __call__(self, encoding: ToyEncoding) -> None:
        self.encodings.append(encoding)
        self.pass_through(encoding.cancelled.is_set)

    async def reached(self, n_encodings: int = 1) -> None:
        await until(lambda: len(self.encodings) >= n_encodings)


class Latch:
    """For the other hooks: stops threads until `open`."""

    def __init__(self) -> None:
        self.n_arrived = 0
        self._opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self.n_arrived += 1
        assert self._opened.wait(HOLD_SECONDS), "nobody opened the latch"

    def open(self) -> None:
        """Let all threads through from now on."""
        self._opened.set()

    async def reached(self, n_arrived: int = 1) -> None:
        await until(lambda: self.n_arrived >= n_arrived)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that a thread makes true, by looking again and again. The caller has the deadline."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


def is_idle(engine: Engine) -> bool:
    """No request in flight, no slot in use, nothing in the queue."""
    statistics = engine.statistics()
    return statistics.generations == statistics.busy == statistics.waiting == 0


async def until_idle(engine: Engine) -> None:
    await until(lambda: is_idle(engine))


async def open_when_closing(engine: Engine, toy: Toy, latch: Latch) -> None:
    """Open the latch once the engine is closing and waits for the thread at the latch, with nothing freed yet."""
    with trio.CancelScope(shield=True):
        await until(lambda: engine.status == "closing")
        await trio.testing.wait_all_tasks_blocked()
        assert not toy.context.closed
        assert not toy.model.closed
        latch.open()


@cache
def prompts(count: int, n_tokens: int) -> tuple[str, ...]:
    """Different prompts, each of 10 bytes, that the toy continues with at least `n_tokens` tokens."""
    candidates = (f"prompt{i:03}:" for i in itertools.count())
    endless = (text for text in candidates if END not in toy_continuation(list(text.encode()), n_tokens))
    return tuple(itertools.islice(endless, count))


# -- pictures ---------------------------------------------------------------------------------------------------------


@cache
def picture(number: int) -> bytes:
    """An encoded picture. Each number gives another one."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def items_of(projector: ToyProjector, parts: Sequence[str | ImageSource]) -> list[Item]:
    """The items that the toy makes of texts and images."""
    items: list[Item] = []
    for part in parts:
        items += part.encode() if isinstance(part, str) else projector.image(load_pixels(part, param="a picture")).items
    return items


class SlowFile(os.PathLike[str]):
    """The path of a picture that cannot be read before `latch` is open."""

    def __init__(self, directory: Path, latch: Latch, number: int = 0) -> None:
        self._path = directory / f"{number}.png"
        self._path.write_bytes(picture(number))
        self._latch = latch

    def __fspath__(self) -> str:
        self._latch()
        return str(self._path)
