"""`trio-runner bench --bare`: the engine beside a bare loop of llama.cpp, in this process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trio_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_runner.bench.bare import Comparison, Pair
    from trio_runner.cli.bench import BenchOptions
    from trio_runner.cli.options import EngineChoice


def bench_bare(options: EngineChoice, asked: BenchOptions) -> int:
    """Measure as `asked`, and print a table. Returns the exit code."""
    model, config = options.configs()

    from trio_runner.bench.bare import cases, run_bench
    from trio_runner.cli.running import run_until_signal
    from trio_runner.llama.loader import LlamaLoader

    streams = asked.streams or (1, config.slots)
    if max(streams) > config.slots:
        raise click.UsageError(f"{max(streams)} streams need --slots {max(streams)}")

    async def measure() -> None:
        chosen = cases(asked.prompt_tokens or (512,), streams, asked.max_tokens)
        compared = await run_bench(LlamaLoader(model), config, chosen, rounds=asked.repeat)
        if asked.json_file is not None:
            _write(asked.json_file, _document(model.path, config.threads, compared))
        if asked.json_file == "-":
            return
        width = max(len(comparison.case.name) for comparison in compared)
        click.echo(f"{'tokens per second':<{width}} {'engine':>10} {'bare loop':>10} {'ratio':>7}")
        for comparison in compared:
            rates = f"{comparison.median('engine'):>10.1f} {comparison.median('bare'):>10.1f}"
            click.echo(f"{comparison.case.name:<{width}} {rates} {comparison.ratio:>7.3f}")

    return run_until_signal(measure)


def _document(path: str, threads: int | None, compared: Sequence[Comparison]) -> dict[str, Any]:
    """Everything that was measured, as JSON: rates in tokens per second, every turn of every round."""
    return {
        "model": path,
        "threads": threads,
        "results": [
            {
                "name": comparison.case.name,
                "case": dataclasses.asdict(comparison.case),
                "engine": comparison.median("engine"),
                "bare": comparison.median("bare"),
                "ratio": comparison.ratio,
                "rounds": [
                    {loop: dataclasses.asdict(turn) for loop, turn in turns.items()} for turns in comparison.rounds
                ],
            }
            for comparison in compared
        ],
    }


def _write(file: str, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1)
    if file == "-":
        click.echo(text)
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunnerError(f"the results cannot be written: {error}") from error


def take_turns(options: EngineChoice) -> int:
    """Load the model and say so in a line of JSON; then answer each line on stdin, until there are no more.

    A line has the fields of `Case`, and "loop": "engine" or "bare". The answer has the fields of `Turn`, and the ids of
    Python's threads by name. Or a line has "texts", lists of tokens to embed; the answer says how long that took, and
    has the first "vector". An answer may also be an "error". Returns the exit code.
    """
    model, config = options.configs()

    import trio

    from trio_runner.bench.bare import open_pair
    from trio_runner.bench.processes import PeakMemory
    from trio_runner.cli.running import run_until_signal
    from trio_runner.llama.loader import LlamaLoader

    async def serve() -> None:
        started = time.perf_counter()
        async with AsyncExitStack() as stack:
            with PeakMemory() as peak:
                pair = await stack.enter_async_context(open_pair(LlamaLoader(model), config))
                seconds = time.perf_counter() - started
            _say(_loaded(model.path, seconds, peak.largest))
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                _say(await _answer(pair, line))

    return run_until_signal(serve)


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def _loaded(path: str, seconds: float, peak: float) -> dict[str, Any]:
    """What is known when the model is loaded: the fields of `contenders.Loaded`."""
    from trio_runner.bench.processes import holdings
    from trio_runner.llama.gguf import check_gguf

    held = holdings(os.getpid())
    tensors = check_gguf(path).tensors
    has_output = any(tensor.name == "output.weight" for tensor in tensors)
    used = [tensor for tensor in tensors if not (has_output and tensor.name == "token_embd.weight")]
    matrices = [tensor for tensor in used if len(tensor.shape) == 2]
    output = "output.weight" if has_output else "token_embd.weight"
    return {
        "seconds": seconds,
        "memory": 0.0 if held is None else held.memory,
        "peak": peak,
        "bytes": sum(tensor.n_bytes for tensor in used),
        "weights": sum(math.prod(tensor.shape) for tensor in matrices),
        "output_weights": sum(math.prod(tensor.shape) for tensor in matrices if tensor.name == output),
        "are_floats": max(matrices, key=lambda tensor: math.prod(tensor.shape)).type in ("f16", "f32", "bf16"),
    }


async def _answer(pair: Pair, line: str) -> dict[str, Any]:
    from trio_runner.bench.bare import LOOPS, Case

    try:
        fields = json.loads(line)
        if "texts" in fields:
            seconds, cpu_seconds, vector = await pair.embed(fields["texts"])
            return {"seconds": seconds, "cpu_seconds": cpu_seconds, "vector": vector}
        loop = fields.pop("loop")
        if loop not in LOOPS:
            raise ValueError(f"there is no loop {loop}")
        turn = dataclasses.asdict(await pair.turn(loop, Case(**fields)))
        return turn | {"threads": {thread.name: thread.native_id for thread in threading.enumerate()}}
    except (AttributeError, KeyError, TypeError, ValueError, RunnerError) as error:
        return {"error": str(error)}
