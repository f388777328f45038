"""The programs whose kernels are compared: ours as child processes that take turns, and llama-bench of a peer.

A peer is any program with the options and the JSON of ik_llama.cpp's llama-bench. That of llama.cpp lacks the option
`-gp`, which times decoding after a prompt. The peer is started for every turn, and its own figures are taken. Its first
run of each start is not counted, because it touches memory for the first time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from trio_runner.bench.bare import Case, Loop
from trio_runner.errors import RunnerError

UPSTREAM: Final = {"TRIO_RUNNER_MATMUL": "ggml", "TRIO_RUNNER_ATTENTION": "ggml"}
"""The environment in which our library computes with upstream's kernels."""
CLOSE_SECONDS: Final = 10
"""Seconds after which a child that does not end by itself is killed."""
CELLS: Final = 256
"""The peer gets a context of a multiple of this."""


class ContenderFailed(RunnerError):
    """A program that is measured has failed, or does not speak as expected."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one turn gave."""

    rate: float
    """Tokens per second, of all streams together."""
    cpu: float
    """CPU seconds of the whole process for each token that was timed. The time to start and load does not count."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a child of ours says when its model is loaded."""

    seconds: float
    memory: float
    """MiB of anonymous memory then. Pages of the model's file do not count. 0 where it cannot be seen."""
    peak: float
    """MiB: the largest value of `memory` meanwhile."""
    bytes: int
    """Bytes of weights that a step reads."""
    weights: int
    """Weights that a row is multiplied with, if its logits are wanted."""
    output_weights: int
    """Those of them that give the logits."""
    are_floats: bool
    """Whether they are floats, and not codes of a few bits."""


class Child:
    """A process that answers each line of JSON with one, until the end of the block.

    Raises `ContenderFailed` if it ends before it has answered, or answers with an error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        env = os.environ | dict(environment or {})
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def send(self, document: Mapping[str, Any]) -> None:
        """Send a line that has no answer."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(document), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise ContenderFailed("a child process has ended") from None

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderFailed("a child process has ended without an answer")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise ContenderFailed(f"a child process sent an answer that is not JSON: {line[:200]!r}") from None
        if "error" in answer:
            raise ContenderFailed(answer["error"])
        return answer

    def ask(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a line."""
        self.send(document)
        return self.receive()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process, and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it has not read
                pipe.close()  # at the end of its input it ends by itself
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class OwnProcess(Child):
    """`trio-runner bench --bare --turns` as a child process. Raises `ContenderFailed` if it does not start."""

    def __init__(
        self, model: Path, *, slots: int, context: int, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        options = {"--model": model, "--slots": slots, "--context-length": context, "--threads": threads}
        words = [str(word) for pair in options.items() for word in pair]
        super().__init__([sys.executable, "-m", "trio_runner", "bench", "--bare", "--turns", *words], environment)
        try:
            self.loaded = Loaded(**self.receive())
        except BaseException:
            self.close()
            raise

    def turn(self, loop: Loop, case: Case) -> dict[str, Any]:
        """Measure once. Returns the fields of `bare.Turn`, and the ids of Python's threads by their names."""
        return self.ask({"loop": loop, **dataclasses.asdict(case)})

    def sample(self, loop: Loop, case: Case) -> Sample:
        """Measure once."""
        turn = self.turn(loop, case)
        return Sample(turn["rate"], turn["cpu_seconds"] / case.n_tokens)


class Peer:
    """llama-bench, and llama-batched-bench for several streams; without the latter, those are not measured."""

    def __init__(self, program: Path, batched: Path | None, *, threads: int) -> None:
        self._program = program
        self._batched = batched
        self._threads = threads
        self._start_seconds: dict[Path, float] = {}

    def can(self, case: Case) -> bool:
        """Whether the peer can measure this case."""
        return case.n_streams == 1 or self._batched is not None

    def sample(self, model: Path, case: Case) -> Sample:
        """Measure once. Raises `ContenderFailed`."""
        if model not in self._start_seconds:
            self._start_seconds[model] = _run(self._command(model, Case(1), 1)).cpu_seconds
        if case.n_streams > 1:
            return self._streams(model, case)
        n_runs = case.n_times + 1
        ended = _run(self._command(model, case, n_runs))
        nanoseconds = read_llama_bench(ended.output)[1:]
        n_once = case.n_tokens // case.n_times
        rate = n_once * len(nanoseconds) * 1e9 / sum(nanoseconds)
        # The run that is not counted takes as much CPU time as the others.
        return Sample(rate, self._cpu(model, ended) / (n_once * n_runs))

    def _command(self, model: Path, case: Case, n_runs: int) -> list[str]:
        what = ["-p", case.n_prompt, "-n", 0] if not case.n_decode else ["-p", 0, "-n", 0, "-gp", _gp(case)]
        rest = ["-r", n_runs, "-t", self._threads, "-ub", 512, "-o", "json"]
        return [str(word) for word in (self._program, "-m", model, *what, *rest)]

    def _streams(self, model: Path, case: Case) -> Sample:
        n_each, n_cells = case.n_prompt + case.n_decode, CELLS
        while n_cells < n_each * case.n_streams:
            n_cells += CELLS
        twice = f"{case.n_streams},{case.n_streams}"  # the first time warms up
        what = ["-npp", case.n_prompt, "-ntg", case.n_decode, "-npl", twice]
        rest = ["-c", n_cells, "-ub", 512, "-t", self._threads]
        ended = _run([str(word) for word in (self._batched, "-m", model, *what, *rest)])
        rates = read_batched_bench(ended.output + ended.errors)
        return Sample(rates[-1], self._cpu(model, ended) / (2 * case.n_tokens))

    def _cpu(self, model: Path, ended: _Ended) -> float:
        return max(0.0, ended.cpu_seconds - self._start_seconds[model])


def _gp(case: Case) -> str:
    return f"{case.n_prompt},{case.n_decode}"


def read_llama_bench(output: str) -> list[float]:
    """The nanoseconds of each run in llama-bench's JSON. Raises `ContenderFailed` if it is not that."""
    try:
        [result] = json.loads(output)
        return [float(value) for value in result["samples_ns"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ContenderFailed(f"the peer's output is not llama-bench's JSON: {output[-200:]!r}") from error


def read_batched_bench(output: str) -> list[float]:
    """The column `S_TG t/s` of llama-batched-bench's table: tokens per second, a value for each row.

    Raises `ContenderFailed` if there is no such table.
    """
    table = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in output.splitlines() if "|" in line]
    column = next((row.index("S_TG t/s") for row in table if "S_TG t/s" in row), None)
    if column is None:
        raise ContenderFailed(f"the peer's output is not llama-batched-bench's table: {output[-200:]!r}")
    return [float(row[column]) for row in table if len(row) > column and row[column].replace(".", "").isdigit()]


@dataclass(frozen=True, slots=True)
class _Ended:
    """A program that has run to its end."""

    output: str
    errors: str
    cpu_seconds: float


def _run(command: Sequence[str]) -> _Ended:
    """Run a program to its end. Raises `ContenderFailed` if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as scratch:  # it writes a log into the current directory
        ended = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ContenderFailed(f"{command[0]} ended with {ended.returncode}: {last}")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Ended(ended.stdout, ended.stderr, cpu_seconds)
