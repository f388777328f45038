"""Prefixes that several prompts share: one sequence decodes them, and the others follow it."""

from __future__ import annotations

import enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.invariants import check_idle, check_survivors
from tests.core.oracle import alone
from tests.core.world import A, B, C, World, make_world
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.sequence import SequenceSpec
from trio_runner.info import Capabilities
from trio_runner.testing import Interruption


def make_prompts(n_prompts: int, n_shared: int, n_own: int = 3) -> list[tuple[int, ...]]:
    shared = tuple(A + n % 7 for n in range(n_shared))
    return [(*shared, *((B + n) for _ in range(n_own))) for n in range(n_prompts)]


def test_prompts_that_arrive_together_decode_what_they_share_once() -> None:
    world = make_world(4, n_ctx=256, max_rows=32)
    for prompt in make_prompts(4, 150):
        world.submit(prompt=prompt, max_tokens=5)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 150 + 4 * 3
    check_survivors(world)


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_followers_take_over_what_a_sequence_has_decoded_that_ends_early(how: str) -> None:
    """Even when another sequence is waiting for its slot."""
    prompts = make_prompts(3, 150)
    world = make_world(3, n_ctx=256, max_rows=32)
    followed, *_ = (world.submit(prompt=prompt, max_tokens=5) for prompt in prompts)
    queued = world.submit(prompt=(C,) * 40, max_tokens=5)
    for _ in range(3):
        world.step()
    world.cancel(followed) if how == "cancel" else world.expire(followed)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 150 + 2 * 3 + 40
    assert world.finished(queued)
    check_survivors(world)


def test_followers_take_over_what_a_preempted_sequence_has_decoded() -> None:
    prompts = make_prompts(2, 150)
    world = make_world(2, n_ctx=256, max_rows=32)
    followed = world.submit(prompt=prompts[0], max_tokens=5, background=True)
    world.step()
    world.submit(prompt=prompts[1], max_tokens=5)
    world.step()
    world.step()
    world.submit(prompt=(C,) * 40, max_tokens=5)
    world.run()
    assert world.preempted == {followed}
    assert world.scheduler.statistics().n_prompt_rows == 150 + 2 * 3 + 40
    check_survivors(world)


def test_a_preempted_sequence_does_not_follow_its_followers() -> None:
    prompts = make_prompts(2, 100)
    world = make_world(3, n_ctx=256, max_rows=32)
    other = world.submit(prompt=(C, C, B), max_tokens=9)
    world.submit(prompt=prompts[0], max_tokens=5, background=True)
    world.step()
    world.submit(prompt=prompts[1], max_tokens=5)
    world.step()
    world.step(Interruption(DecodeOutcome.NO_KV_SPACE))
    assert world.waiting == [1]
    world.cancel(other)
    world.run()
    check_survivors(world)


def test_a_paused_follower_gets_the_prefix_when_it_is_there() -> None:
    """The sequence that it follows may shift it away later."""
    start = (*(A + n % 7 for n in range(56)), *(B for _ in range(2)))
    prompts = [(*start, number) for number in range(100, 200)]
    lasting = [
        prompt for prompt in prompts if alone(SequenceSpec(uid=0, prompt=prompt, max_tokens=12), 64).n_sampled == 12
    ]
    world = make_world(2, n_ctx=64, max_rows=16)
    world.submit(prompt=lasting[0], max_tokens=12)
    follower = world.submit(prompt=lasting[1], max_tokens=12)
    world.step()
    world.pause(follower)
    while not world.finished(0):
        world.step()
    world.resume(follower)
    world.run()
    assert world.last(follower).usage.cached_tokens == 58
    check_survivors(world)


@pytest.mark.parametrize(("cache_prompt", "can_trim"), [(False, True), (True, False)])
def test_a_sequence_that_could_not_use_the_prefix_does_not_wait_for_it(cache_prompt: bool, can_trim: bool) -> None:
    world = make_world(2, n_ctx=256, max_rows=32, can_trim=can_trim, can_shift=can_trim)
    batches: list[Batch] = []
    world.on_batch = batches.append
    for prompt in make_prompts(2, 100):
        world.submit(prompt=prompt, max_tokens=5, cache_prompt=cache_prompt)
    world.run()
    assert [len(chunk.items) for chunk in batches[0].chunks] == [16, 16]
    check_survivors(world)


def test_followers_go_on_when_the_followed_sequence_is_paused_and_it_goes_on_from_there() -> None:
    prompts = make_prompts(2, 100)
    world = make_world(2, n_ctx=256, max_rows=32)
    followed, follower = (world.submit(prompt=prompt, max_tokens=5) for prompt in prompts)
    world.step()
    world.pause(followed)
    world.run()
    assert world.finished(follower)
    world.resume(followed)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 100 + 2 * 3
    check_survivors(world)


@st.composite
def families(draw: st.DrawFn) -> tuple[int, list[tuple[int, ...]]]:
    """(how many tokens they share, prompts of which no two share more)"""
    n_prompts, n_shared = draw(st.integers(2, 5)), draw(st.integers(1, 60))
    return n_shared, [(*prompt, B) for prompt in make_prompts(n_prompts, n_shared, draw(st.integers(1, 3)))]


class Move(enum.Enum):
    SUBMIT = enum.auto()
    SUBMIT_BACKGROUND = enum.auto()
    CANCEL = enum.auto()
    EXPIRE = enum.auto()
    STEP = enum.auto()
    THROW_BATCH_AWAY = enum.auto()


MOVES = st.lists(st.tuples(st.sampled_from(Move), st.integers(0, 9)), max_size=30)
"""With the number of a request, modulo how many there are."""


@settings(max_examples=100)
@given(families(), st.integers(1, 24), MOVES)
def test_what_prompts_share_is_decoded_once(
    family: tuple[int, list[tuple[int, ...]]], max_rows: int, moves: list[tuple[Move, int]]
) -> None:
    """Whenever they come, and whichever of them end early."""
    n_shared, prompts = family
    world = World(Capabilities(n_slots=len(prompts) + 1, n_ctx=128, max_rows=max_rows), min_follow=1)
    shared_rows: list[int] = []
    world.on_batch = lambda batch: shared_rows.extend(
        position for chunk in batch.chunks for position in range(chunk.start, chunk.stop) if position < n_shared
    )
    left = list(prompts)
    for move, number in moves:
        uid = number % max(len(world.specs), 1)
        match move:
            case Move.SUBMIT | Move.SUBMIT_BACKGROUND if left:
                world.submit(prompt=left.pop(), max_tokens=4, background=move is Move.SUBMIT_BACKGROUND)
            case Move.CANCEL if uid in world.specs:
                world.cancel(uid)
            case Move.EXPIRE if uid in world.specs:
                world.expire(uid)
            case Move.THROW_BATCH_AWAY:
                world.step(discard=True)
            case _:
                world.step()
    for prompt in left:
        world.submit(prompt=prompt, max_tokens=4)
    world.run()
    check_survivors(world)
    check_idle(world)
    assert sorted(shared_rows) == list(range(len(shared_rows)))
    assert len(shared_rows) == n_shared or len(world.cancelled | world.expired) == len(prompts)
