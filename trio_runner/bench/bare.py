"""How fast the engine is, and how much of the bare llama.cpp loop's speed it gives up.

Each round measures the engine and, over a second context of the same model in the same process, a loop that does
nothing but decode and sample. The two take turns, also at being first, so that whatever else the machine does falls on
both; what is reported is the median of the rounds and of the rounds' ratios. Absolute figures belong to the machine,
ratios travel.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from trio_runner.config import EngineConfig
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome
from trio_runner.core.memory import Trim
from trio_runner.core.ports import Context, Loader, Model, Sampler
from trio_runner.errors import PromptTooLong
from trio_runner.events import Finished, TextPiece
from trio_runner.front_door import open_engine
from trio_runner.interface import EngineInterface
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

N_SHORT_PROMPT = 16
"""Tokens before the streams whose decoding is measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the rounds, in tokens per second; `ratio` is engine over bare loop."""

    name: str
    engine: float
    bare: float
    ratio: float


async def run_bench(
    loader: Loader, config: EngineConfig, *, n_prompt: int, n_tokens: int, rounds: int
) -> list[Measured]:
    """Measure prefill of one prompt, decoding of one sequence, and decoding of one on every slot.

    Loads the model twice. Raises what `open_engine` raises, and `PromptTooLong` if prompt and tokens do not fit a slot.
    """
    async with open_engine(loader, replace(config, max_queue=None)) as engine:
        if max(n_prompt, N_SHORT_PROMPT + n_tokens) >= engine.capabilities.n_ctx:
            raise PromptTooLong(max(n_prompt, N_SHORT_PROMPT + n_tokens), engine.capabilities.n_ctx - 1)
        load = partial(loader, config, progress=lambda _: None, cancelled=lambda: False)
        bare = await trio.to_thread.run_sync(load)
        sampling = _endless(engine)
        try:
            cases: list[tuple[str, int, int, int]] = [
                ("prefill", n_prompt, 1, 0),
                ("decode, 1 stream", N_SHORT_PROMPT, 1, n_tokens),
                (f"decode, {config.slots} streams", N_SHORT_PROMPT, config.slots, n_tokens),
            ]
            return [
                await _measure(name, engine, bare.model, bare.context, sampling, n_given, n_streams, n_decode, rounds)
                for name, n_given, n_streams, n_decode in cases
            ]
        finally:
            bare.context.close()
            bare.model.close()


async def _measure(
    name: str,
    engine: EngineInterface,
    model: Model,
    context: Context,
    sampling: SamplingParams,
    n_prompt: int,
    n_streams: int,
    n_decode: int,
    rounds: int,
) -> Measured:
    with_engine, without = [], []
    for number in range(rounds + 1):  # the first one warms up
        prompts = [_prompt(n_prompt, number * n_streams + stream, engine.info.n_vocab) for stream in range(n_streams)]
        rates: dict[bool, float] = {}
        for is_engine in (number % 2 == 0, number % 2 == 1):  # whoever comes second finds the machine warmer
            if is_engine:
                rates[is_engine] = await _engine_rate(engine, sampling, prompts, n_decode)
            else:
                measure = partial(_bare_rate, model, context, sampling, prompts, n_decode)
                rates[is_engine] = await trio.to_thread.run_sync(measure)
        if number:
            with_engine.append(rates[True])
            without.append(rates[False])
    ratios = [a / b for a, b in zip(with_engine, without, strict=True)]
    return Measured(name, statistics.median(with_engine), statistics.median(without), statistics.median(ratios))


def _endless(engine: EngineInterface) -> SamplingParams:
    """Greedy, without the model's special tokens, so that no stream ends before the others."""
    special = [
        int(value)
        for key, value in engine.info.metadata.items()
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
    ]
    return SamplingParams(
        temperature=0, repeat_penalty=1.0, logit_bias=tuple((token, -math.inf) for token in set(special))
    )


def _prompt(n_tokens: int, number: int, n_vocab: int) -> tuple[int, ...]:
    """Another prompt each time, so that no prompt cache helps; a small generator, as random as needed."""
    return tuple((1009 * number + 7919 * i + 11 * i * i) % (n_vocab - 300) + 256 for i in range(n_tokens))


async def _engine_rate(
    engine: EngineInterface, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], n_decode: int
) -> float:
    """Tokens per second of prefill, if `n_decode` is 0, or of decoding, all streams together."""
    first: list[float] = []

    async def read(prompt: tuple[int, ...]) -> None:
        options = GenerateRequest(prompt=prompt, max_tokens=n_decode + 1, sampling=sampling, cache_prompt=False)
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
    if n_decode == 0:
        return len(prompts[0]) / (time.perf_counter() - started)
    # Streams get their first tokens one after the other: each is given its own start, and all end together.
    return len(prompts) * n_decode / (time.perf_counter() - statistics.mean(first))


def _bare_rate(
    model: Model, context: Context, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], n_decode: int
) -> float:
    samplers = {slot: model.sampler(sampling, prompt) for slot, prompt in enumerate(prompts)}
    try:
        started = time.perf_counter()
        last = [_bare_prefill(context, slot, prompt, samplers) for slot, prompt in enumerate(prompts)]
        if n_decode == 0:
            return len(prompts[0]) / (time.perf_counter() - started)
        started = time.perf_counter()
        for i in range(n_decode):
            chunks = [Chunk(slot, slot, len(prompts[slot]) + i, (last[slot],), True) for slot in samplers]
            result = context.decode(Batch(tuple(chunks)), samplers)
            last = [result.sampled[slot].token for slot in samplers]
        return len(prompts) * n_decode / (time.perf_counter() - started)
    finally:
        for slot, sampler in samplers.items():
            sampler.close()
            context.apply(Trim(slot, 0))


def _bare_prefill(context: Context, slot: int, prompt: tuple[int, ...], samplers: dict[int, Sampler]) -> int:
    for start in range(0, len(prompt), context.capabilities.max_rows):
        tokens = prompt[start : start + context.capabilities.max_rows]
        chunk = Chunk(slot, slot, start, tokens, output=start + len(tokens) == len(prompt))
        result = context.decode(Batch((chunk,)), samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
    return result.sampled[slot].token
