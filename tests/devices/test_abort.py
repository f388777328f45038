"""An aborted batch ends between two layers, and leaves nothing in the KV cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.devices.test_numbers import PARAMS, TEXT, check_same, go_on, read_and_tell
from tests.llama.pictures import media_of, open_pair, picture
from tests.llama.running import Running
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.memory import Slide, Trim
from trio_runner.core.prompt import MediaRow

Models = Callable[[str], Path]

NUMBER = 7
DEADLINE = 60.0
Step = Callable[[], StepResult]
"""Prepares a batch of the number `NUMBER` and runs it."""


class Aborter:
    """Aborts a batch of the number `NUMBER` while it is decoded."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self._delay: float | None = None
        self._ended = threading.Event()
        self._has_aborted = False
        running.around_decode = self._watch

    @contextmanager
    def _watch(self, batch: Batch) -> Iterator[None]:
        if self._delay is None or batch.number != NUMBER:
            yield
            return
        self._ended.clear()
        thread = threading.Thread(target=self._abort, args=(self._delay,))
        self._delay = None
        thread.start()
        yield
        self._ended.set()
        thread.join()

    def _abort(self, delay: float) -> None:
        if not self._ended.wait(delay):
            self.running.context.abort(NUMBER)
            self._has_aborted = not self._ended.is_set()

    def abort_after(self, step: Step, delay: float) -> tuple[StepResult, bool]:
        """Run `step` and abort it after `delay` seconds. Returns its result, and whether it was still running then."""
        self.running.context.abort(0)
        self._delay, self._has_aborted = delay, False
        result = step()
        self.running.context.abort(0)
        return result, self._has_aborted

    def abort_in_the_middle(self, step: Step) -> StepResult:
        """Run `step` again and again, until an abort has ended it early. Returns that result."""
        delay, deadline = 0.15, time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            result, has_aborted = self.abort_after(step, delay)
            if has_aborted and result.outcome is DecodeOutcome.ABORTED:
                return result
            # The step had ended, or no layer was left to begin. The first step takes longer than the others.
            delay = min(0.7 * delay, 0.5 * result.seconds)
        raise AssertionError("no step was aborted")

    def abort_in_vain(self, step: Step) -> StepResult:
        """Run a `step` that an abort in the middle must not end early. Returns its result.

        On a busy machine, an abort may come before the step has begun. So there are several attempts.
        """
        step()  # the first one takes longer
        delay = step().seconds / 3
        for _ in range(5):
            result, has_aborted = self.abort_after(step, delay)
            if has_aborted and result.outcome is DecodeOutcome.OK:
                return result
        raise AssertionError("every step was aborted")


class Scene:
    """A batch with one row of a running text, the middle of a prompt and the beginning of another one.

    A fourth slot, which is not in the batch, holds something too.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self.one = running.tokens(TEXT)
        self.other = running.tokens("hello and a story of the answer and the system and the user")

    def prepare(self) -> None:
        """Fill the slots with what the batch continues."""
        for slot in range(4):
            assert self.running.context.apply(Trim(slot, 0))
        for slot, tokens in ((0, self.one[:20]), (1, self.one[:18]), (3, self.other[:9])):
            self.running.prefill(tokens, slot=slot)

    def lengths(self) -> list[int]:
        """Positions that each slot holds."""
        return [self.running.context.length(slot) for slot in range(4)]

    def step(self) -> StepResult:
        """Prepare the slots and run the batch."""
        self.prepare()
        return self.run()

    def run(self) -> StepResult:
        """Run the batch."""
        chunks = (
            Chunk(0, 0, 20, (self.one[20],), output=True),
            Chunk(1, 1, 18, tuple(self.one[18:36]), output=False),
            Chunk(2, 2, 0, tuple(self.other[:10]), output=False),
        )
        return self.running.step(*chunks, samplers={0: self.running.sampler(PARAMS)}, number=NUMBER)

    def tell(self, slot: int, chosen: list[Sampled]) -> list[Sampled]:
        """What the model samples next in `slot`. See `go_on`."""
        text = self.one if slot < 2 else self.other
        position = self.lengths()[slot]
        return go_on(self.running, text[position], position, chosen, slot=slot)


@pytest.mark.parametrize("name", ["swa", "mrope"])
def test_an_aborted_batch_changes_nothing(models: Models, name: str) -> None:
    running = Running(models(name), slots=3, batch_size=32)
    scene, aborter = Scene(running), Aborter(running)
    first = scene.step()
    sampled = [first.sampled[0]]
    expected = [scene.tell(slot, []) for slot in range(4)]

    result = aborter.abort_in_the_middle(scene.step)
    assert result.kept == {0: 20, 1: 18, 2: 0}
    assert scene.lengths() == [20, 18, 0, 9]
    assert result.sampled == {}
    # A batch of another shape, another aborted one, and the same batch once more.
    check_same(sampled, go_on(running, scene.one[20], 20, sampled))
    aborter.abort_in_the_middle(scene.step)
    result = scene.run()
    assert result.outcome is DecodeOutcome.OK, result.message
    check_same(sampled, [result.sampled[0]])
    for slot in (3, 2, 1, 0):
        check_same(expected[slot], scene.tell(slot, expected[slot]))
    # Positions that were decoded twice can be trimmed, to where a window needs the cells before.
    assert running.context.apply(Trim(1, 20))
    running.prefill(scene.one[20:36], slot=1, start=20)
    check_same(expected[1], scene.tell(1, expected[1]))


def test_memory_that_cannot_be_trimmed_is_emptied(models: Models) -> None:
    running = Running(models("mamba"), slots=3, batch_size=32)
    scene, aborter = Scene(running), Aborter(running)
    scene.step()
    expected = [scene.tell(slot, []) for slot in range(4)]
    result = aborter.abort_in_the_middle(scene.step)
    assert result.kept == {0: 0, 1: 0, 2: 0}
    assert scene.lengths() == [0, 0, 0, 9]
    check_same(expected[3], scene.tell(3, expected[3]))
    assert scene.step().outcome is DecodeOutcome.OK
    for slot in (2, 1, 0):
        check_same(expected[slot], scene.tell(slot, expected[slot]))


def test_a_step_of_single_rows_is_not_aborted(models: Models) -> None:
    running = Running(models("llama"))
    tokens = running.tokens(TEXT)
    running.prefill(tokens[:20])
    running.prefill(tokens[:30], slot=1)

    def step() -> StepResult:
        for slot, length in enumerate((20, 30)):
            assert running.context.apply(Trim(slot, length))
        chunks = [Chunk(slot, slot, start, (tokens[start],), output=True) for slot, start in enumerate((20, 30))]
        return running.step(*chunks, samplers={n: running.sampler(PARAMS) for n in range(2)}, number=NUMBER)

    first = step()
    result = Aborter(running).abort_in_vain(step)
    for slot in range(2):
        check_same([first.sampled[slot]], [result.sampled[slot]])
    assert [running.context.length(slot) for slot in range(2)] == [21, 31]


def test_a_step_that_renumbers_positions_is_not_aborted(models: Models) -> None:
    running = Running(models("llama"))
    tokens = running.tokens(TEXT)

    def step() -> StepResult:
        assert running.context.apply(Trim(0, 0))
        running.prefill(tokens[:30])
        assert running.context.apply(Trim(0, 3, 8))
        assert running.context.apply(Slide(0, 8, 30, -5))
        chunk = Chunk(0, 0, 25, tuple(tokens[30:50]), output=True)
        return running.step(chunk, samplers={0: running.sampler(PARAMS)}, number=NUMBER)

    first = step()
    result = Aborter(running).abort_in_vain(step)
    check_same([first.sampled[0]], [result.sampled[0]])
    following = go_on(running, tokens[50], 45)
    step()
    check_same(following, go_on(running, tokens[50], 45, following))


def test_an_aborted_embedding(models: Models) -> None:
    running = Running(models("bert"))
    lane = running.capabilities.first_embed_slot
    tokens = tuple((running.tokens(TEXT) * 2)[:60])

    def step() -> StepResult:
        assert running.context.apply(Trim(lane, 0))
        return running.step(Chunk(0, lane, 0, tokens, output=True), embeddings=True, number=NUMBER)

    first = step()
    result = Aborter(running).abort_in_the_middle(step)
    assert (result.kept, result.embeddings) == ({0: 0}, {})
    np.testing.assert_allclose(np.asarray(step().embeddings[0]), np.asarray(first.embeddings[0]), atol=1e-3)


def test_aborted_non_causal_rows_of_an_image(models: Models) -> None:
    """Rows of a text stay causal after it was aborted."""
    running = open_pair(models, "swa")
    image = running.projector.encoding(picture()).run()
    media = media_of(image)[0]
    rows = tuple(MediaRow(media, row) for row in range(media.n_rows))
    tokens = running.tokens(TEXT)

    def step() -> StepResult:
        assert running.context.apply(Trim(0, 0))
        return running.step(Chunk(0, 0, 0, rows, output=False), media=image.media, number=NUMBER)

    def follow(chosen: list[Sampled]) -> list[Sampled]:
        assert step().outcome is DecodeOutcome.OK
        position = running.prefill(tokens[:10], start=media.n_positions)
        return go_on(running, tokens[10], position, chosen)

    expected = follow([])
    result = Aborter(running).abort_in_the_middle(step)
    assert result.kept == {0: 0}
    running.prefill(tokens[:20], slot=1)
    check_same(expected, follow(expected))


def test_an_aborted_encoder(models: Models) -> None:
    running = Running(models("t5"))
    expected = read_and_tell(running, "hello")
    texts = [tuple((running.tokens(text)[:-1] * 12)[:60]) for text in (TEXT, "hello world")]
    n_steps = 0

    def step() -> StepResult:
        nonlocal n_steps
        n_steps += 1
        assert running.context.apply(Trim(0, 0))
        chunk = Chunk(
            0, 0, 0, (0,), output=False, encoder_tokens=texts[n_steps % 2]
        )  # different ones, or the encoder need not read
        return running.step(chunk, number=NUMBER)

    result = Aborter(running).abort_in_the_middle(step)
    assert result.kept == {0: 0}
    check_same(expected, read_and_tell(running, "hello", expected))
