"""Steps of bounded time, on simulated machines."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from trio_runner.core.pace import LONE_STEPS, LONGEST_STEP, MIN_ROWS, SHORT_STEP, SHORTEST_GAP, STREAM_GAP, Pace


@dataclass
class Machine:
    """A batch takes `base` seconds, and `row` more for each row. All of it grows with the contexts."""

    base: float
    row: float
    growth: float = 0.0
    """The part of its time that each thousand rows of its prompt so far add to a step. Prompts have 4,000 rows."""
    noise: float = 0.0
    max_rows: int = 512
    n_done: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(3))

    def seconds(self, n_rows: int) -> float:
        """Without the noise."""
        return (self.base + self.row * n_rows) * (1 + self.growth * (self.n_done % 4000) / 1000)

    def run(self, pace: Pace, n_decoding: int, prompt_rows: int = 0) -> float:
        n_rows = min(n_decoding + prompt_rows, self.max_rows)
        seconds = self.seconds(n_rows) * (1 + self.noise * self.random.uniform(-1, 1))
        self.n_done += n_rows
        pace.measured(n_decoding, n_rows, seconds)
        return seconds

    def prefill(self, pace: Pace, n_decoding: int, n_steps: int) -> list[tuple[float, int]]:
        """(seconds, rows of prompts) of steps with as many rows of prompts as they may have."""
        steps = []
        for _ in range(n_steps):
            n_rows = pace.prompt_rows(n_decoding)
            assert min(MIN_ROWS, self.max_rows) <= n_rows <= self.max_rows, "prompts must get on"
            steps.append((self.run(pace, n_decoding, n_rows), n_rows))
        return steps

    def gap(self, n_decoding: int) -> float:
        """Seconds that a step beside so many streams should take: never less than a few rows take."""
        wanted = max(SHORTEST_GAP, STREAM_GAP * self.seconds(n_decoding))
        return max(wanted, self.seconds(n_decoding + MIN_ROWS))


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """From a small model on a GPU to a large one on two cores."""
    is_gpu = draw(st.booleans())
    return Machine(
        base=draw(st.floats(0.002, 0.05)),
        row=draw(st.floats(5e-6, 2e-4) if is_gpu else st.floats(0.001, 0.06)),
        growth=draw(st.floats(0, 0.03 if is_gpu else 0.1)),  # a step on a GPU may lengthen the context by thousands
        noise=draw(st.sampled_from([0.0, 0.05])),
        max_rows=draw(st.sampled_from([64, 512, 2048])),
    )


NEW_PROMPT = 0.65
"""The part of its time that the first step of a prompt takes at least, after the slow end of another prompt."""
SETTLED = 6
"""Batches after which the time of a step is right."""


@settings(max_examples=200)
@given(machines(), st.integers(1, 16), st.integers(1, 16), st.booleans())
def test_streams_wait_no_longer_for_a_prompt_than_they_may(
    machine: Machine, n_before: int, n_now: int, was_lone: bool
) -> None:
    """Whatever ran before: another number of streams, or a prompt alone."""
    pace = Pace(machine.max_rows)
    if was_lone:
        machine.prefill(pace, 0, 5)
    for _ in range(5):
        machine.run(pace, n_before)
    machine.prefill(pace, n_now, SETTLED)
    for _ in range(40 - SETTLED):
        gap = machine.gap(n_now)  # as things are now: it grows as everything does
        [(seconds, _)] = machine.prefill(pace, n_now, 1)
        assert seconds <= 1.2 * gap


@settings(max_examples=200)
@given(machines(), st.integers(1, 16), st.booleans())
def test_a_prompt_gets_all_the_time_that_streams_can_spare(machine: Machine, n_streams: int, was_lone: bool) -> None:
    pace = Pace(machine.max_rows)
    if was_lone:
        machine.prefill(pace, 0, 5)
    for _ in range(5):
        machine.run(pace, n_streams)
    gap = STREAM_GAP * machine.seconds(n_streams)
    steps = machine.prefill(pace, n_streams, 40)
    for seconds, n_rows in steps[20:]:
        assert n_rows == machine.max_rows or seconds >= NEW_PROMPT * gap


@settings(max_examples=200)
@given(machines())
def test_the_time_of_a_step_without_streams_is_bounded(machine: Machine) -> None:
    pace = Pace(machine.max_rows)
    steps = machine.prefill(pace, 0, 40)
    longest = max(LONGEST_STEP, machine.seconds(MIN_ROWS))
    # One such step may be half a prompt, and the next one at once a fifth slower.
    assert all(seconds <= 1.35 * longest for seconds, _ in steps[SETTLED:])
    assert all(n_rows == machine.max_rows or seconds >= NEW_PROMPT * LONGEST_STEP for seconds, n_rows in steps[15:])
    # After an abort, or where a step cannot be aborted.
    n_rows = pace.prompt_rows(0, short=True)
    assert machine.seconds(n_rows) <= max(1.2 * SHORT_STEP + machine.base * 3, machine.seconds(MIN_ROWS))


def test_a_model_that_is_slow_to_read_gets_longer_steps_without_streams() -> None:
    machine = Machine(base=0.4, row=0.02)
    pace = Pace(machine.max_rows)
    machine.run(pace, 1)
    seconds = machine.prefill(pace, 0, 20)[-1][0]
    assert 0.9 * LONE_STEPS * machine.seconds(1) <= seconds <= 1.2 * LONE_STEPS * machine.seconds(1)


@settings(max_examples=100)
@given(machines(), st.integers(0, 8), st.sampled_from([20, 100, 1000]), st.integers(0, 12))
def test_one_slow_step_is_soon_forgotten(machine: Machine, n_streams: int, slower: int, when: int) -> None:
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    for _ in range(5):
        if n_streams:
            machine.run(pace, n_streams)
    machine.prefill(pace, n_streams, when)
    n_rows = pace.prompt_rows(n_streams)
    pace.measured(n_streams, n_streams + n_rows, slower * machine.seconds(n_streams + n_rows))
    machine.prefill(pace, n_streams, 25)
    undisturbed = Pace(machine.max_rows)
    for _ in range(5):
        if n_streams:
            machine.run(undisturbed, n_streams)
    machine.prefill(undisturbed, n_streams, 40)
    assert pace.prompt_rows(n_streams) >= 0.7 * undisturbed.prompt_rows(n_streams)


@given(machines(), st.integers(1, 8))
def test_one_slow_first_token_does_not_slow_streams_down(machine: Machine, n_streams: int) -> None:
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    pace.measured(n_streams, n_streams, 20 * machine.seconds(n_streams))
    for _ in range(10):
        machine.run(pace, n_streams)
    steps = machine.prefill(pace, n_streams, 20)
    assert all(seconds <= 1.5 * machine.gap(n_streams) for seconds, _ in steps[SETTLED:])


@given(machines(), st.integers(0, 8))
def test_a_short_prompt_tells_little_about_a_long_one(machine: Machine, n_streams: int) -> None:
    """Most of its time does not depend on the rows."""
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    for _ in range(5):
        if n_streams:
            machine.run(pace, n_streams)
    machine.prefill(pace, n_streams, 30)
    n_rows = pace.prompt_rows(n_streams)
    for _ in range(10):
        machine.run(pace, n_streams, 1)
    assert pace.prompt_rows(n_streams) >= 0.5 * n_rows


@given(machines(), st.integers(1, 8), st.floats(0.01, 1.0))
def test_a_step_takes_the_time_that_the_configuration_sets(
    machine: Machine, n_streams: int, step_target: float
) -> None:
    pace = Pace(machine.max_rows, step_target)
    for _ in range(5):
        machine.run(pace, n_streams)
    steps = machine.prefill(pace, n_streams, 60)
    target = max(step_target, machine.seconds(n_streams + MIN_ROWS))
    assert all(seconds <= 1.2 * target for seconds, _ in steps[SETTLED:])
    assert all(n_rows == machine.max_rows or seconds >= NEW_PROMPT * step_target for seconds, n_rows in steps[30:])


@given(machines(), st.integers(0, 8), st.booleans())
def test_one_slow_step_changes_the_next_one_little(machine: Machine, n_streams: int, beside_a_prompt: bool) -> None:
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    for _ in range(5):
        machine.run(pace, max(n_streams, 1))
    machine.prefill(pace, n_streams, 30)
    before = pace.prompt_rows(n_streams)
    n_rows = n_streams + before if beside_a_prompt else max(n_streams, 1)
    pace.measured(max(n_streams, 0 if beside_a_prompt else 1), n_rows, 1000.0)
    before, after = n_streams + before, n_streams + pace.prompt_rows(n_streams)
    assert 0.7 * before - 1 <= after <= 1.3 * before + 1


@given(machines(), st.integers(1, 8))
def test_steps_with_and_without_streams_are_learned_apart(machine: Machine, n_streams: int) -> None:
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    for _ in range(5):
        machine.run(pace, n_streams)
    machine.prefill(pace, n_streams, 20)
    alone = machine.prefill(pace, 0, 30)
    assert all(n_rows == machine.max_rows or seconds >= 0.9 * LONGEST_STEP for seconds, n_rows in alone[20:])
    again, _ = machine.prefill(pace, n_streams, 1)[0]
    assert again <= 1.2 * machine.gap(n_streams)


@given(machines())
def test_fewer_streams_than_any_that_were_measured(machine: Machine) -> None:
    """The time of many streams tells at least how long one takes in proportion."""
    machine.growth = machine.noise = 0.0
    pace = Pace(machine.max_rows)
    for _ in range(5):
        machine.run(pace, 16)
    steps = machine.prefill(pace, 1, 30)
    shortest = STREAM_GAP * machine.seconds(16) / 16
    assert all(n_rows == machine.max_rows or seconds >= 0.75 * shortest for seconds, n_rows in steps[20:])


def test_the_first_step_has_a_fixed_number_of_rows() -> None:
    assert Pace(512).prompt_rows(0) == Pace(512).prompt_rows(3) == 64
    assert Pace(16).prompt_rows(0) == 16
    unknown = Pace(512)
    unknown.measured(0, 64, 0.0)  # a clock that stands still
    assert unknown.prompt_rows(0) == 64
