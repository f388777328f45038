"""A batch that is called off ends between two layers, before it is done, and nothing is left of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.devices.test_numbers import PARAMS, TEXT, check_same, go_on, read_and_tell
from tests.llama.running import Running
from tests.llama.test_projector import media_of, open_pair, picture
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.memory import Slide, Trim
from trio_runner.core.prompt import MediaRow

Models = Callable[[str], Path]

NUMBER = 7
DEADLINE = 60.0
Step = Callable[[], StepResult]
"""Runs a batch of that number, and prepares what it needs."""


class Caller:
    """Calls a batch off, at a moment when native code is at work on it."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running = running
        self._lib = running.context._lib
        self._delay: float | None = None
        self._ended = threading.Event()
        self._is_called_off = False
        monkeypatch.setattr(running.context, "_lib", self)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._lib, name)
        return function if name not in ("trio_step", "trio_encode") else lambda *given: self._run(function, given)

    def _run(self, function: Callable[..., int], given: tuple[Any, ...]) -> int:
        if self._delay is None or given[1].number != NUMBER:
            return function(*given)
        self._ended.clear()
        thread = threading.Thread(target=self._call_off, args=(self._delay,))
        self._delay = None
        thread.start()
        code = function(*given)
        self._ended.set()
        thread.join()
        return code

    def _call_off(self, delay: float) -> None:
        if not self._ended.wait(delay):
            self.running.context.abort(NUMBER)
            self._is_called_off = not self._ended.is_set()

    def call_off(self, step: Step, delay: float) -> tuple[StepResult, bool]:
        """What came of a step that is called off after so many seconds, unless it has ended by then: False."""
        self.running.context.abort(0)
        self._delay, self._is_called_off = delay, False
        result = step()
        self.running.context.abort(0)
        return result, self._is_called_off

    def break_off(self, step: Step) -> StepResult:
        """The result of a step that was called off in the middle."""
        delay, deadline = 0.15, time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            result, is_called_off = self.call_off(step, delay)
            if is_called_off and result.outcome is DecodeOutcome.ABORTED:
                return result
            # It was over by then, or there was no layer left to begin. It takes longer the first time.
            delay = min(0.7 * delay, 0.5 * result.seconds)
        raise AssertionError("it was never broken off")

    def let_end(self, step: Step) -> StepResult:
        """The result of a step that was called off in the middle, and ended all the same. Now and then the machine is
        so busy that it is called off before it has begun."""
        step()  # it takes longer the first time
        delay = step().seconds / 3
        for _ in range(5):
            result, is_called_off = self.call_off(step, delay)
            if is_called_off and result.outcome is DecodeOutcome.OK:
                return result
        raise AssertionError("it was broken off")


class Scene:
    """A batch with one row of a text that goes on, the middle of a prompt and the beginning of another. A slot that has
    no part in it holds something too."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.one = running.tokens(TEXT)
        self.other = running.tokens("hello and a story of the answer and the system and the user")

    def prepare(self) -> None:
        for slot in range(4):
            assert self.running.context.apply(Trim(slot, 0))
        for slot, tokens in ((0, self.one[:20]), (1, self.one[:18]), (3, self.other[:9])):
            self.running.prefill(tokens, slot=slot)

    def lengths(self) -> list[int]:
        return [self.running.context.length(slot) for slot in range(4)]

    def step(self) -> StepResult:
        """From where it was prepared."""
        self.prepare()
        return self.run()

    def run(self) -> StepResult:
        chunks = (
            Chunk(0, 0, 20, (self.one[20],), output=True),
            Chunk(1, 1, 18, tuple(self.one[18:36]), output=False),
            Chunk(2, 2, 0, tuple(self.other[:10]), output=False),
        )
        return self.running.step(*chunks, samplers={0: self.running.sampler(PARAMS)}, number=NUMBER)

    def tell(self, slot: int, chosen: list[Sampled]) -> list[Sampled]:
        text = self.one if slot < 2 else self.other
        position = self.lengths()[slot]
        return go_on(self.running, text[position], position, chosen, slot=slot)


@pytest.mark.parametrize("name", ["swa", "mrope"])
def test_everything_is_as_it_was_before(models: Models, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    running = Running(models(name), slots=3, batch_size=32)
    scene, caller = Scene(running), Caller(running, monkeypatch)
    first = scene.step()
    sampled = [first.sampled[0]]
    expected = [scene.tell(slot, []) for slot in range(4)]

    result = caller.break_off(scene.step)
    assert result.kept == {0: 20, 1: 18, 2: 0}
    assert scene.lengths() == [20, 18, 0, 9]
    assert result.sampled == {}
    # A batch of another shape, one that is broken off again, and the same once more.
    check_same(sampled, go_on(running, scene.one[20], 20, sampled))
    caller.break_off(scene.step)
    result = scene.run()
    assert result.outcome is DecodeOutcome.OK, result.message
    check_same(sampled, [result.sampled[0]])
    for slot in (3, 2, 1, 0):
        check_same(expected[slot], scene.tell(slot, expected[slot]))
    # What was decoded twice can be taken back, to where a window needs what is before it.
    assert running.context.apply(Trim(1, 20))
    running.prefill(scene.one[20:36], slot=1, start=20)
    check_same(expected[1], scene.tell(1, expected[1]))


def test_nothing_is_left_of_what_cannot_be_taken_back(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(models("mamba"), slots=3, batch_size=32)
    scene, caller = Scene(running), Caller(running, monkeypatch)
    scene.step()
    expected = [scene.tell(slot, []) for slot in range(4)]
    result = caller.break_off(scene.step)
    assert result.kept == {0: 0, 1: 0, 2: 0}
    assert scene.lengths() == [0, 0, 0, 9]
    check_same(expected[3], scene.tell(3, expected[3]))
    assert scene.step().outcome is DecodeOutcome.OK
    for slot in (2, 1, 0):
        check_same(expected[slot], scene.tell(slot, expected[slot]))


def test_a_step_between_two_tokens_is_too_short_to_break_off(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result = Caller(running, monkeypatch).let_end(step)
    for slot in range(2):
        check_same([first.sampled[slot]], [result.sampled[slot]])
    assert [running.context.length(slot) for slot in range(2)] == [21, 31]


def test_a_step_that_renumbers_positions_is_not_broken_off(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result = Caller(running, monkeypatch).let_end(step)
    check_same([first.sampled[0]], [result.sampled[0]])
    following = go_on(running, tokens[50], 45)
    step()
    check_same(following, go_on(running, tokens[50], 45, following))


def test_vectors(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(models("bert"))
    lane = running.capabilities.first_embed_slot
    tokens = tuple((running.tokens(TEXT) * 2)[:60])

    def step() -> StepResult:
        assert running.context.apply(Trim(lane, 0))
        return running.step(Chunk(0, lane, 0, tokens, output=True), embeddings=True, number=NUMBER)

    first = step()
    result = Caller(running, monkeypatch).break_off(step)
    assert (result.kept, result.vectors) == ({0: 0}, {})
    np.testing.assert_allclose(np.asarray(step().vectors[0]), np.asarray(first.vectors[0]), atol=1e-3)


def test_rows_of_an_image_that_see_each_other(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a text do not, after that."""
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
    result = Caller(running, monkeypatch).break_off(step)
    assert result.kept == {0: 0}
    running.prefill(tokens[:20], slot=1)
    check_same(expected, follow(expected))


def test_an_encoder_that_reads(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
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
        )  # another one, or it need not be read
        return running.step(chunk, number=NUMBER)

    result = Caller(running, monkeypatch).break_off(step)
    assert result.kept == {0: 0}
    check_same(expected, read_and_tell(running, "hello", expected))
