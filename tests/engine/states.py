"""A request in every state that it can be in. In each, the decode thread stands still."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import trio

from tests.engine.inside import is_paused
from tests.engine.toys import Gate, Latch, Projector, Shutter, SlowFile, Toy, picture, until, until_idle
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.testing import toy_text

PROMPT = "a prompt that is long enough to be worth breaking off in the middle of it, 15"
"""The toy answers 197 tokens to this."""
N_PROMPT = len(PROMPT)
N_KEPT = 20
"""Rows that are done when a batch is aborted."""


@dataclass
class Scene:
    """A request that has reached the state under test; `keeps` of its tokens are in the KV cache."""

    engine: Engine
    generation: Generation
    gate: Gate
    keeps: int = 0
    is_aborted: bool = False
    """Whether closing it aborts a batch."""
    release: Callable[[], None] = lambda: None
    """Release what holds it, if that is not the gate."""
    is_abandoned: Callable[[], bool] = lambda: True
    """Whether whatever was computed for it alone has been cancelled."""
    reader: trio.CancelScope = field(default_factory=trio.CancelScope)
    leave: trio.Event = field(default_factory=trio.Event)

    async def read(self) -> None:
        with self.reader:
            async with self.generation:
                await self.leave.wait()


@asynccontextmanager
async def _in_state(
    toy: Toy, request: dict[str, Any], options: dict[str, Any], prompt: Any = PROMPT, **facts: Any
) -> AsyncIterator[Scene]:
    gate = Gate(toy, n_kept=N_KEPT)
    toy.on_decode = gate
    async with toy.engine(slots=1, **options) as engine, trio.open_nursery() as nursery:
        scene = Scene(engine, engine.generate(prompt, **request), gate, **facts)
        nursery.start_soon(scene.read)
        yield scene


@asynccontextmanager
async def loading(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    toy.on_load = latch = Latch()
    async with _in_state(toy, request, {"wait": False}, release=latch.open) as scene:
        await latch.reached()
        yield scene


@asynccontextmanager
async def tokenising(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    toy.on_tokenize = latch = Latch()
    async with _in_state(toy, request, {}, release=latch.open) as scene:
        await latch.reached()
        yield scene


@asynccontextmanager
async def reading_a_file(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    toy.projector, latch = Projector(), Latch()
    with tempfile.TemporaryDirectory() as directory:
        prompt = [PROMPT, SlowFile(Path(directory), latch)]
        async with _in_state(toy, request, {}, prompt, release=latch.open) as scene:
            await latch.reached()
            yield scene


@asynccontextmanager
async def encoding(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    toy.projector, shutter = Projector(), Shutter()
    toy.projector.on_encode = shutter
    async with _in_state(toy, request, {}, [PROMPT, picture(0)], release=shutter.open) as scene:
        await shutter.reached()
        scene.is_abandoned = shutter.encodings[0].cancelled.is_set
        yield scene


@asynccontextmanager
async def encoding_for_two(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    """Another request, without a deadline, waits for the same image and stays."""
    async with encoding(toy, **request) as scene, trio.open_nursery() as nursery:
        nursery.start_soon(scene.engine.generate([picture(0)], max_tokens=1).start)
        await until(lambda: scene.engine.statistics().images_found == 1)
        is_cancelled = scene.is_abandoned
        scene.is_abandoned = lambda: not is_cancelled()
        yield scene


@asynccontextmanager
async def waiting(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    toy.on_tokenize = latch = Latch()
    async with _in_state(toy, request, {}) as scene:
        await latch.reached()
        # A prompt of tokens needs no tokeniser, so it overtakes.
        another = scene.engine.generate(list(b"another prompt"), max_tokens=3)
        await another.start()
        await scene.gate.reached(1)
        latch.open()
        await until(lambda: scene.engine.statistics().generations == 2)
        yield scene


@asynccontextmanager
async def prefilling(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    async with _in_state(toy, request, {}, keeps=N_KEPT, is_aborted=True) as scene:
        await scene.gate.reached(1)
        yield scene


@asynccontextmanager
async def between_chunks(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    """The chunk that runs is small, but no other request wants it. The next chunk must not run."""
    async with _in_state(toy, request, {"batch_size": 8}, keeps=16, is_aborted=True) as scene:
        scene.gate.let()
        await scene.gate.reached(2)
        yield scene


@asynccontextmanager
async def decoding(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    async with _in_state(toy, request, {}, keeps=N_PROMPT - 1, is_aborted=True) as scene:
        scene.gate.let(5)
        await scene.gate.reached(6)
        yield scene


@asynccontextmanager
async def holding_back(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    """All its text so far may be the start of a stop string."""
    request["stop"] = toy_text(PROMPT, 10) + " and more"
    async with _in_state(toy, request, {}, keeps=N_PROMPT - 1, is_aborted=True) as scene:
        scene.gate.let(5)
        await scene.gate.reached(6)
        assert scene.generation.receive_nowait() == []
        yield scene


@asynccontextmanager
async def paused(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    async with _in_state(toy, request, {"max_backlog": 2}, keeps=N_PROMPT - 1) as scene:
        # Eight unread tokens are too many. A ninth may be on its way by then.
        scene.gate.let(8)
        await until(lambda: is_paused(scene.generation))
        scene.gate.let()
        await until(lambda: scene.engine.statistics().scheduler.n_paused == 1)
        yield scene


@asynccontextmanager
async def over(toy: Toy, **request: Any) -> AsyncIterator[Scene]:
    async with _in_state(toy, {"max_tokens": 5, **request}, {}, keeps=N_PROMPT - 1) as scene:
        scene.gate.open()
        await until(lambda: len(scene.gate.batches) >= 5)
        await until_idle(scene.engine)
        yield scene


State: TypeAlias = Callable[..., AbstractAsyncContextManager[Scene]]

STATES: list[State] = [
    loading,
    tokenising,
    reading_a_file,
    encoding,
    encoding_for_two,
    waiting,
    prefilling,
    between_chunks,
    decoding,
    holding_back,
    paused,
    over,
]
