"""Our attention for CPUs: it computes attention, and a row's result does not depend on the other rows of its batch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.llama.running import Running
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.sampling import SamplingParams

Models = Callable[[str], Path]

PARAMS = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=20)
LENGTHS = (600, 130, 65, 1)
"""Lengths of the texts: more than two chunks of cells, more than two tiles, one cell more than a tile, one cell."""
NAMES = ("llama", "spm", "swa", "mrope")
BLUR = 0.1
"""Nats by which keys and values of 16 bits may change log-probabilities of these models."""
SLIGHT = 0.03
"""Nats by which log-probabilities may change if a few keys and values are rounded the other way."""


def texts(n_vocab: int) -> list[tuple[int, ...]]:
    tokens = random.Random(5)
    return [tuple(tokens.randrange(n_vocab // 2, n_vocab - 8) for _ in range(length)) for length in LENGTHS]


def run(running: Running, shares: Sequence[Sequence[int]]) -> list[Sampled]:
    """Decode all texts. Each of `shares` is a batch: its rows of each text. Returns what is sampled after each text."""
    prompts = texts(running.model.info.n_vocab)
    samplers = {uid: running.sampler(PARAMS) for uid in range(len(prompts))}
    done = [0] * len(prompts)
    sampled: dict[int, Sampled] = {}
    for share in shares:
        chunks = []
        for uid, n_rows in enumerate(share):
            part = prompts[uid][done[uid] : done[uid] + n_rows]
            if part:
                ends = done[uid] + len(part) == len(prompts[uid])
                chunks.append(Chunk(uid, uid, done[uid], part, output=ends))
                done[uid] += len(part)
        if chunks:
            result = running.step(*chunks, samplers=samplers)
            assert result.outcome is DecodeOutcome.OK, result.message
            sampled |= result.sampled
    assert done == list(LENGTHS)
    return [sampled[uid] for uid in range(len(prompts))]


def open_running(path: Path, **config: object) -> Running:
    settings = {"slots": 4, "context_length": 700, "batch_size": 640, "kv_type": "f16"} | config
    return Running(path, projector=None, adapters=(), **settings)


def alone() -> list[list[int]]:
    return [[length if uid == other else 0 for other in range(len(LENGTHS))] for uid, length in enumerate(LENGTHS)]


def mixed(seed: int, most: int) -> list[list[int]]:
    """Batches of random rows, so that the cells of all texts lie between each other."""
    shares = random.Random(seed)
    return [[shares.randint(0, most) for _ in LENGTHS] for _ in range(2000)]


def assert_alike(got: Sequence[Sampled], expected: Sequence[Sampled], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        known = {info.token: info.logprob for info in b.top}
        shared = [info for info in a.top if info.token in known]
        assert len(shared) >= 15
        assert max(abs(info.logprob - known[info.token]) for info in shared) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_attention(models: Models, name: str) -> None:
    exact = run(open_running(models(name), kv_type="f32", flash_attention="off"), alone())
    running = open_running(models(name), flash_attention="on")
    assert_alike(run(running, alone()), exact, BLUR)


@pytest.mark.parametrize("most", [2, 40])
@pytest.mark.parametrize("name", NAMES)
def test_other_rows_of_a_batch_change_nothing(models: Models, name: str, most: int) -> None:
    """Except for the last digits: its cells may lie in other tiles, and products of matrices depend on their sizes."""
    expected = run(open_running(models(name)), alone())
    assert_alike(run(open_running(models(name)), mixed(most, most)), expected, SLIGHT)


@pytest.mark.parametrize("most", [20, 60])
def test_the_number_of_threads_changes_nothing(models: Models, most: int) -> None:
    one, two = (run(open_running(models("llama"), threads=threads), mixed(7, most)) for threads in (1, 2))
    assert one == two


def test_upstreams_attention_can_be_chosen(models: Models) -> None:
    """It runs in a process of its own, because the environment is read once. Its sums of 16 bits differ slightly."""
    path = str(models("llama"))
    program = (
        "import sys; from pathlib import Path; from tests.llama.test_attention import *;"
        "print([s.logprob for s in run(open_running(Path(sys.argv[1])), mixed(3, 3))])"
    )
    environment = {**os.environ, "TRIO_RUNNER_ATTENTION": "ggml", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    theirs = [float(number) for number in done.stdout.strip("[]\n").split(",")]
    ours = [sampled.logprob for sampled in run(open_running(Path(path)), mixed(3, 3))]
    assert theirs == pytest.approx(ours, abs=BLUR)
    assert theirs != ours
