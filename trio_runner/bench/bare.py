"""How fast the engine is, compared with a bare loop over llama.cpp.

Each round measures the engine, and a loop that does nothing but decode and sample. The loop runs in the same process on
a second context of the same model. The two take turns, also in going first, so that other work of the machine disturbs
both alike. The report has the medians of the rounds, and the median of the rounds' ratios. Absolute figures depend on
the machine; ratios can be compared between machines.
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
"""Tokens of the prompts when decoding is measured."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians of the rounds, in tokens per second. `ratio` is the engine's rate divided by the bare loop's."""

    name: str
    engine: float
    bare: float
    ratio: float


async def run_bench(
    loader: Loader, config: EngineConfig, *, n_prompt: int, n_tokens: int, rounds: int
) -> list[Comparison]:
    """Measure prefill of one prompt, decoding of one sequence, and decoding of a sequence on every slot.

    Loads the model twice. Raises `LoadError` if it cannot be loaded, and `PromptTooLong` if the prompt, or a short
    prompt and the generated tokens, do not fit into a slot.
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
) -> Comparison:
    with_engine, without = [], []
    for number in range(rounds + 1):  # the first one warms up
        prompts = [_prompt(n_prompt, number * n_streams + stream, engine.info.n_vocab) for stream in range(n_streams)]
        rates: dict[bool, float] = {}
        for is_engine in (number % 2 == 0, number % 2 == 1):  # the second one finds the machine warmer
            if is_engine:
                rates[is_engine] = await _engine_rate(engine, sampling, prompts, n_decode)
            else:
                measure = partial(_bare_rate, model, context, sampling, prompts, n_decode)
                rates[is_engine] = await trio.to_thread.run_sync(measure)
        if number:
            with_engine.append(rates[True])
            without.append(rates[False])
    ratios = [a / b for a, b in zip(with_engine, without, strict=True)]
    return Comparison(name, statistics.median(with_engine), statistics.median(without), statistics.median(ratios))


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


async def _engine_rate(
    engine: EngineInterface, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], n_decode: int
) -> float:
    """The engine's tokens per second: of prefill if `n_decode` is 0, or of decoding, all streams together."""
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
    # Streams get their first tokens one after the other, and end together. So the mean of the starts is the start.
    return len(prompts) * n_decode / (time.perf_counter() - statistics.mean(first))


def _bare_rate(
    model: Model, context: Context, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]], n_decode: int
) -> float:
    """The bare loop's tokens per second: of prefill if `n_decode` is 0, or of decoding, all streams together."""
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
    """Decode a prompt in `slot`. Returns the first token that is sampled after it."""
    for start in range(0, len(prompt), context.capabilities.max_rows):
        tokens = prompt[start : start + context.capabilities.max_rows]
        chunk = Chunk(slot, slot, start, tokens, output=start + len(tokens) == len(prompt))
        result = context.decode(Batch((chunk,)), samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
    return result.sampled[slot].token
