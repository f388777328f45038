"""Batches that are aborted: what was decoded is kept, and the rest is decoded again."""

from __future__ import annotations

import pytest

from tests.core.oracle import rows_of
from tests.core.world import A, B, C, make_world
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.prompt import Media
from trio_runner.core.scheduler import N_SHORT_STEPS
from trio_runner.testing import Interruption


def test_an_aborted_batch_keeps_what_was_decoded() -> None:
    world = make_world(2, max_rows=16)
    batches: list[Batch] = []
    world.on_batch = batches.append
    first = world.submit(prompt=tuple(A + n % 5 for n in range(12)), max_tokens=3)
    world.step(Interruption(DecodeOutcome.ABORTED, 7))
    assert world.context.held(0) == list(world.specs[first].prompt[:7])
    world.run()
    assert batches[1].chunks[0].start == 7
    assert world.outcome(first) == world.alone(first)


def test_an_abort_in_the_last_row_decodes_only_that_one_again() -> None:
    world = make_world(1, max_rows=16)
    batches: list[Batch] = []
    world.on_batch = batches.append
    uid = world.submit(prompt=(A, B, C), max_tokens=3)
    world.step(Interruption(DecodeOutcome.ABORTED, 3))
    world.run()
    assert (batches[1].chunks[0].start, batches[1].chunks[0].items) == (2, (C,))
    assert world.outcome(uid) == world.alone(uid)


@pytest.mark.parametrize(("n_done", "n_kept"), [(0, 1), (1, 0), (1, 3), (1, 4), (2, 0), (2, 1), (2, 3)])
@pytest.mark.parametrize("shares_positions", [True, False])
def test_an_abort_around_an_image_costs_only_the_rows_that_were_lost(
    n_done: int, n_kept: int, shares_positions: bool
) -> None:
    image = rows_of(
        Media(b"image", 4, 2 if shares_positions else 4, causal=shares_positions, shares_positions=shares_positions)
    )
    world = make_world(1, can_shift=False)
    uid = world.submit(prompt=(A, *image, B, C, B, A), max_tokens=3)
    for _ in range(n_done):
        world.step()
    world.step(Interruption(DecodeOutcome.ABORTED, n_kept))
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 9
    assert world.outcome(uid) == world.alone(uid)


def test_rows_that_were_kept_of_an_aborted_prompt_are_counted() -> None:
    world = make_world(1, max_rows=16)
    world.submit(prompt=(A, B) * 8, max_tokens=1)
    world.step(Interruption(DecodeOutcome.ABORTED, 7))
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 16


@pytest.mark.parametrize("n_done", [1, 2])
@pytest.mark.parametrize("n_rows", [0, 4])
def test_recurrent_state_that_was_caught_half_way_is_decoded_again(n_rows: int, n_done: int) -> None:
    image = rows_of(Media(b"image", n_rows, 2, shares_positions=True))
    world = make_world(2, max_rows=8, can_trim=False, can_shift=False)
    uid = world.submit(prompt=(A, B, *image, *(A + n % 5 for n in range(20))), max_tokens=3)
    for _ in range(n_done):
        world.step()
    world.step(Interruption(DecodeOutcome.ABORTED, 3))
    world.run()
    assert world.outcome(uid) == world.alone(uid)
    assert world.last(uid).usage.cached_tokens == 0


def test_after_an_abort_a_lone_prompt_takes_short_steps() -> None:
    world = make_world(1, n_ctx=512, max_rows=256, slowness=5.0)
    rows: list[int] = []
    world.on_batch = lambda batch: rows.append(batch.n_rows)
    world.submit(prompt=(C,) * 500, max_tokens=1)
    world.step()
    world.step()
    world.step(Interruption(DecodeOutcome.ABORTED, 1))
    for _ in range(N_SHORT_STEPS + 1):
        world.step()
    # 5 ms for each row: 50 fit a step, 20 a short one.
    assert rows == [64, 50, 50, *[20] * N_SHORT_STEPS, 50]
    statistics = world.scheduler.statistics()
    assert (statistics.n_batches, statistics.n_aborted) == (2 + N_SHORT_STEPS + 1, 1)
