"""Prompts that are only decoded: nothing is sampled, and later sequences find them in the cache."""

from __future__ import annotations

import pytest

from tests.core.invariants import check_idle, check_survivors
from tests.core.oracle import rows_of
from tests.core.world import A, B, C, make_world
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.prompt import Item, Media
from trio_runner.testing import Interruption

PROMPT = tuple(A + n % 5 for n in range(20))
IMAGE = Media(b"an image", 5, 5)
WHOLE_IMAGE = Media(b"an image", 5, 5, causal=False)


@pytest.mark.parametrize(
    "prompt", [PROMPT, PROMPT[:1], (*PROMPT, *rows_of(IMAGE)), (*rows_of(WHOLE_IMAGE), *PROMPT)], ids=len
)
def test_all_rows_are_decoded_and_nothing_is_sampled(prompt: tuple[Item, ...]) -> None:
    world = make_world(2, max_rows=6)
    batches: list[Batch] = []
    world.on_batch = batches.append
    warmed = world.submit(prompt=prompt, max_tokens=0, progress=True)
    world.run()
    check_survivors(world)
    check_idle(world)
    assert world.last(warmed).reason == "length"
    assert world.last(warmed).usage.completion_tokens == 0
    assert world.context.held(0) == list(prompt)
    assert not any(chunk.output for batch in batches for chunk in batch.chunks)


def test_the_same_prompt_then_decodes_its_last_row() -> None:
    world = make_world(2, max_rows=6)
    world.submit(prompt=PROMPT, max_tokens=0)
    world.run()
    again = [world.submit(prompt=PROMPT, max_tokens=n) for n in (0, 5)]
    longer = world.submit(prompt=(*PROMPT, B), max_tokens=5)
    world.run()
    check_survivors(world)
    assert [world.n_prefilled[uid] for uid in (*again, longer)] == [1, 1, 1]


@pytest.mark.parametrize("n_rows", range(7))
@pytest.mark.parametrize("outcome", [DecodeOutcome.ABORTED, DecodeOutcome.NO_KV_SPACE])
def test_it_ends_after_a_batch_that_was_not_finished(outcome: DecodeOutcome, n_rows: int) -> None:
    world = make_world(2, max_rows=6)
    warmed = world.submit(prompt=PROMPT[:6], max_tokens=0)
    world.step(Interruption(outcome, n_rows if outcome is DecodeOutcome.ABORTED else 0))
    world.run()
    check_survivors(world)
    check_idle(world)
    assert world.last(warmed).reason == "length"
    assert world.context.held(0) == list(PROMPT[:6])


def test_it_is_cancelled_paused_and_preempted_like_others() -> None:
    world = make_world(1, max_rows=6)
    cancelled = world.submit(prompt=PROMPT, max_tokens=0)
    world.step()
    world.cancel(cancelled)
    paused = world.submit(prompt=PROMPT, max_tokens=0, background=True)
    world.step()
    world.pause(paused)
    interactive = world.submit(prompt=(C,) * 5, max_tokens=3)
    world.run()
    assert world.finished(interactive)
    assert world.preempted == {paused}
    assert not world.finished(paused)
    world.resume(paused)
    world.run()
    check_survivors(world)
    check_idle(world)
    assert world.last(paused).reason == "length"
