"""How fast the engine is, compared with a bare loop over llama.cpp.

The loop does nothing but decode and sample. It runs in the same process, on a second context of the same model. The two
take turns in each round, also in going first, so that other work of the machine disturbs both alike. Absolute figures
depend on the machine; ratios can be compared between machines.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, TypeAlias

import numpy as np
import trio

from trio_runner.config import EngineConfig
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome
from trio_runner.core.memory import Trim
from trio_runner.core.ports import Context, Loader, Model, Runtime, Sampler
from trio_runner.errors import PromptTooLong
from trio_runner.events import Finished, TextPiece
from trio_runner.front_door import open_engine
from trio_runner.interface import EngineInterface
from trio_runner.request import EmbedRequest, GenerateRequest
from trio_runner.sampling import SamplingParams

N_SHORT_PROMPT: Final = 16
"""Tokens of the prompts when decoding is measured."""

Loop: TypeAlias = Literal["engine", "bare"]
LOOPS: Final[tuple[Loop, Loop]] = ("engine", "bare")


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: prefill of one prompt, or decoding of `n_streams` together. Raises ValueError if neither."""

    n_prompt: int
    n_streams: int = 1
    n_decode: int = 0
    """Tokens that each stream decodes while it is timed. 0: prefill is timed instead."""
    n_times: int = 1
    """How often it is done in one turn. Short prompts take too little time to be measured once."""
    reuse: bool = False
    """Whether the engine may find prompts of earlier turns in its cache, and prompts are the same in each turn."""

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_streams, self.n_times) < 1 or self.n_decode < 0:
            raise ValueError("a case needs a prompt and a stream")
        if self.n_decode == 0 and self.n_streams != 1:
            raise ValueError("prefill is measured with one stream")

    @property
    def name(self) -> str:
        """For people: "prefill of 512 tokens", "decode, 4 streams"."""
        if self.n_decode == 0:
            return f"prefill of {self.n_prompt:,} tokens"
        return f"decode, {self.n_streams} streams" if self.n_streams > 1 else "decode, 1 stream"

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed in one turn."""
        return self.n_times * (self.n_streams * self.n_decode or self.n_prompt)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of one loop took."""

    rate: float
    """Tokens per second, of all streams together."""
    cpu_seconds: float
    """Seconds that cores spent on this process in the whole turn, which includes the prompts before decoding."""
    seconds: float
    """Seconds of the whole turn."""
    n_batches: int
    """Batches of the engine in the whole turn. 0 for the bare loop, which does not count."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rounds of one case, after one that is not kept because it warms up."""

    case: Case
    rounds: tuple[dict[Loop, Turn], ...]

    def median(self, loop: Loop) -> float:
        """The median rate of `loop`, in tokens per second."""
        return statistics.median(turns[loop].rate for turns in self.rounds)

    @property
    def ratio(self) -> float:
        """The engine's rate divided by the bare loop's: the median of the rounds' ratios."""
        return statistics.median(turns["engine"].rate / turns["bare"].rate for turns in self.rounds)


def cases(prompts: Sequence[int], streams: Sequence[int], n_decode: int) -> list[Case]:
    """Prefill of each of `prompts`, and decoding with each number of `streams`."""
    return [
        *(Case(n_prompt) for n_prompt in prompts),
        *(Case(N_SHORT_PROMPT, n_streams, n_decode) for n_streams in streams),
    ]


async def run_bench(loader: Loader, config: EngineConfig, cases: Sequence[Case], *, rounds: int) -> list[Comparison]:
    """Measure `cases` for `rounds` rounds each.

    Loads the model twice. Raises `LoadError` if it cannot be loaded, and `PromptTooLong` if a case does not fit into a
    slot. Raises ValueError if a case has more streams than the engine has slots.
    """
    async with open_pair(loader, config) as pair:
        for case in cases:
            pair.check(case)
        return [await _compare(pair, case, rounds) for case in cases]


async def _compare(pair: Pair, case: Case, rounds: int) -> Comparison:
    kept: list[dict[Loop, Turn]] = []
    for number in range(rounds + 1):
        order = LOOPS if number % 2 == 0 else LOOPS[::-1]  # the second one finds the machine warmer
        turns: dict[Loop, Turn] = {loop: await pair.turn(loop, case) for loop in order}
        if number:
            kept.append(turns)
    return Comparison(case, tuple(kept))


class Pair:
    """An engine, and beside it a bare loop on a context of its own, which is opened at its first turn."""

    def __init__(self, engine: EngineInterface, load: Callable[[], Runtime]) -> None:
        self.engine = engine
        self._load = load
        self._bare: Runtime | None = None
        self._sampling = _endless(engine)
        self._n_prompts = 0

    def check(self, case: Case) -> None:
        """Raises `PromptTooLong` if a stream of `case` does not fit into a slot, and ValueError if there are too few
        slots."""
        if case.n_prompt + case.n_decode >= self.engine.capabilities.n_ctx:
            raise PromptTooLong(case.n_prompt + case.n_decode, self.engine.capabilities.n_ctx - 1)
        if case.n_streams > self.engine.config.slots:
            raise ValueError(f"{case.n_streams} streams need as many slots, and there are {self.engine.config.slots}")

    async def turn(self, loop: Loop, case: Case) -> Turn:
        """Measure `case` once in `loop`. Raises what `check` raises, and `LoadError` if the bare loop has no memory."""
        self.check(case)
        if loop == "bare" and self._bare is None:
            self._bare = await trio.to_thread.run_sync(self._load)
        seconds, started, cpu_started = 0.0, time.perf_counter(), time.process_time()
        batches_started = self.engine.statistics().scheduler.n_batches
        for _ in range(case.n_times):
            prompts = self._prompts(case)
            if loop == "engine":
                seconds += await _engine_seconds(self.engine, self._sampling, prompts, case)
            else:
                assert self._bare is not None
                measure = partial(_bare_seconds, self._bare, self._sampling, prompts, case.n_decode)
                seconds += await trio.to_thread.run_sync(measure)
        return Turn(
            rate=case.n_tokens / seconds,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            n_batches=self.engine.statistics().scheduler.n_batches - batches_started,
        )

    async def embed(self, texts: Sequence[Sequence[int]]) -> tuple[float, float, list[float]]:
        """Embed `texts`, given as tokens. Returns seconds, CPU seconds of this process, and the first embedding."""
        requests = [EmbedRequest(content=tuple(text)) for text in texts]
        started, cpu_started = time.perf_counter(), time.process_time()
        embedded = await self.engine.embed_requests(requests)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        vector: list[float] = np.asarray(embedded[0].vector).tolist()
        return seconds, cpu_seconds, vector

    def close(self) -> None:
        """Free the context of the bare loop."""
        if self._bare is not None:
            self._bare.context.close()
            self._bare.model.close()

    def _prompts(self, case: Case) -> list[tuple[int, ...]]:
        if case.reuse:
            self._n_prompts = 0
        first, self._n_prompts = self._n_prompts, self._n_prompts + case.n_streams
        return [_prompt(case.n_prompt, first + stream, self.engine.info.n_vocab) for stream in range(case.n_streams)]


@asynccontextmanager
async def open_pair(loader: Loader, config: EngineConfig) -> AsyncIterator[Pair]:
    """An engine and a bare loop for the length of the block. Raises `LoadError` if the model cannot be loaded."""
    async with open_engine(loader, replace(config, max_queue=None)) as engine:
        pair = Pair(engine, partial(loader, config, progress=lambda _: None, cancelled=lambda: False))
        try:
            yield pair
        finally:
            pair.close()


def _endless(engine: EngineInterface) -> SamplingParams:
    """Greedy sampling without the model's special tokens, so that no stream ends before the others."""
    special = [
        int(value)
        for key, value in engine.info.metadata.items()
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
    ]
    return SamplingParams(
        temperature=0, repeat_penalty=1.0, logit_bias=tuple((token, -math.inf) for token in set(special))
    )


def _prompt(n_tokens: int, number: int, n_vocab: int) -> tuple[int, ...]:
    """A different prompt for each `number`, so that no prompt cache helps. The tokens need not be very random."""
    return tuple((1009 * number + 7919 * i + 11 * i * i) % (n_vocab - 300) + 256 for i in range(n_tokens))


async def _engine_seconds(
    engine: EngineInterface, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], case: Case
) -> float:
    """The engine's seconds for the tokens of `case`, once."""
    first: list[float] = []

    async def read(prompt: tuple[int, ...]) -> None:
        options = GenerateRequest(
            prompt=prompt, max_tokens=case.n_decode + 1, sampling=sampling, cache_prompt=case.reuse
        )
        async with engine.generate(options) as generation:
            async for event in generation:
                if isinstance(event, (TextPiece, Finished)):
                    first.append(time.perf_counter())
                    break
            async for _ in generation:
                pass

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(read, prompt)
    if case.n_decode == 0:
        return time.perf_counter() - started
    # Streams get their first tokens one after the other, and end together. So the mean of the starts is the start.
    return time.perf_counter() - statistics.mean(first)


def _bare_seconds(
    runtime: Runtime, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], n_decode: int
) -> float:
    """The bare loop's seconds: of prefill if `n_decode` is 0, or of decoding, all streams together."""
    model: Model = runtime.model
    context: Context = runtime.context
    samplers = {slot: model.sampler(sampling, prompt) for slot, prompt in enumerate(prompts)}
    try:
        started = time.perf_counter()
        last = [_bare_prefill(context, slot, prompt, samplers) for slot, prompt in enumerate(prompts)]
        if n_decode == 0:
            return time.perf_counter() - started
        started = time.perf_counter()
        for i in range(n_decode):
            chunks = [Chunk(slot, slot, len(prompts[slot]) + i, (last[slot],), True) for slot in samplers]
            result = context.decode(Batch(tuple(chunks)), samplers)
            last = [result.sampled[slot].token for slot in samplers]
        return time.perf_counter() - started
    finally:
        for slot, sampler in samplers.items():
            sampler.close()
            context.apply(Trim(slot, 0))


def _bare_prefill(context: Context, slot: int, prompt: tuple[int, ...], samplers: dict[int, Sampler]) -> int:
    """Decode a prompt in `slot`. Returns the first token that is sampled after it."""
    for start in range(0, len(prompt), context.capabilities.max_rows):
        tokens = prompt[start : start + context.capabilities.max_rows]
        chunk = Chunk(slot, slot, start, tokens, output=start + len(tokens) == len(prompt))
        result = context.decode(Batch((chunk,)), samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
    return result.sampled[slot].token
