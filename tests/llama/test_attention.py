"""Our attention for CPUs, in whole models: it computes attention, and a text depends on nothing but itself.

tests/llama/test_attention_bits.py tests the operation alone.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.llama.pictures import PAIRS, Models, open_pair, picture
from tests.llama.running import Running
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Copy, Trim
from trio_runner.sampling import SamplingParams

PARAMS = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=20)
LENGTHS = (600, 130, 65, 1)
"""Lengths of the texts: more than two chunks of cells, more than two tiles, one cell more than a tile, one cell."""
NAMES = ("llama", "spm", "swa", "mrope")
NOISE = len(LENGTHS)
"""The slot of another sequence, which comes and goes."""
BLUR = 0.1
"""Nats by which keys and values of 16 bits may change log-probabilities of these models."""


def texts(n_vocab: int) -> list[tuple[int, ...]]:
    tokens = random.Random(5)
    return [tuple(tokens.randrange(n_vocab // 2, n_vocab - 8) for _ in range(length)) for length in LENGTHS]


class Noise:
    """A sequence of random length that is forgotten, and begins again. Other sequences grow into the gaps it leaves."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._n_rows = 0

    def next_chunk(self, running: Running) -> Chunk:
        if self._n_rows > 100 and self._random.random() < 0.5:
            assert running.context.apply(Trim(NOISE, 0))
            self._n_rows = 0
        tokens = tuple(self._random.randrange(8, 100) for _ in range(self._random.randint(1, 60)))
        chunk = Chunk(NOISE, NOISE, self._n_rows, tokens, output=False)
        self._n_rows += len(tokens)
        return chunk


def run(running: Running, shares: Sequence[Sequence[int]], noise: Noise | None = None) -> list[Sampled]:
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
            if noise is not None:
                chunks.insert(len(chunks) // 2, noise.next_chunk(running))
            result = running.step(*chunks, samplers=samplers)
            assert result.outcome is DecodeOutcome.OK, result.message
            sampled |= result.sampled
    assert done == list(LENGTHS)
    return [sampled[uid] for uid in range(len(prompts))]


def open_running(path: Path, **config: object) -> Running:
    settings = {"slots": 5, "context_length": 700, "batch_size": 640, "kv_type": "f16"} | config
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


@pytest.mark.parametrize(("name", "kv_type"), [*((name, "f16") for name in NAMES), ("swa", "f32")])
def test_neither_other_rows_nor_the_cuts_of_a_prompt_change_a_bit(models: Models, name: str, kv_type: str) -> None:
    expected = run(open_running(models(name), kv_type=kv_type), alone())
    for most, threads in [(9, 1), (150, 2)]:
        running = open_running(models(name), kv_type=kv_type, threads=threads)
        assert run(running, mixed(most, most)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_gaps_in_the_cache_change_no_bit(models: Models, name: str) -> None:
    """Later rows of a text are in cells before those of its earlier rows, in gaps that another sequence has left."""
    expected = run(open_running(models(name)), alone())
    for seed, most in [(1, 15), (2, 50)]:
        assert run(open_running(models(name)), mixed(seed, most), Noise(seed)) == expected


@pytest.mark.parametrize("name", ["llama", "spm"])
def test_a_copied_beginning_changes_no_bit(models: Models, name: str) -> None:
    """Two sequences share the cells of their beginning, and go on in cells before these."""
    beginning, *ends = (texts(100)[0][:n] for n in (200, 90, 60))
    expected = []
    for end in ends:
        running = open_running(models(name))
        position = running.prefill(beginning)
        expected.append(go_on(running, [(0, position, end)])[0])
    running = open_running(models(name))
    running.prefill(range(8, 100), slot=3)
    position = running.prefill(beginning, slot=2, rows=37)
    for slot in (0, 1):
        assert running.context.apply(Copy(2, slot, position))
    for slot in (2, 3):
        assert running.context.apply(Trim(slot, 0))
    assert go_on(running, [(slot, position, end) for slot, end in enumerate(ends)]) == expected


def go_on(running: Running, rows: Sequence[tuple[int, int, tuple[int, ...]]]) -> list[Sampled]:
    """Decode tokens from a position of a slot on, for several slots in one batch. Returns what is sampled in each."""
    chunks = [Chunk(slot, slot, position, tokens, output=True) for slot, position, tokens in rows]
    result = running.step(*chunks, samplers={slot: running.sampler(PARAMS) for slot, _, _ in rows})
    assert result.outcome is DecodeOutcome.OK, result.message
    return [result.sampled[slot] for slot, _, _ in rows]


@pytest.mark.parametrize("name", PAIRS)
def test_images_have_the_same_bits_in_gaps(models: Models, name: str) -> None:
    """With M-RoPE, rows of an image share a position. Their order is that of the rows."""
    results = []
    for n_before in (0, 100):
        running = open_pair(models, name, kv_type="f16")
        if n_before:
            running.prefill(range(8, 8 + n_before), slot=1)
        image = running.projector.encoding(picture(seed=1)).run()
        question = running.tokens(" and the answer")
        position = running.place((*running.tokens("the story of"), *image.items), image.media)
        assert running.context.apply(Trim(1, 0))  # from here on, in cells before those of the image
        position = running.prefill(question[:-1], start=position)
        results.append(running.go_on(question[-1], position, 8, params=PARAMS))
    assert results[0] == results[1]


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
