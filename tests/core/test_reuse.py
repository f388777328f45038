"""The prompt cache: what a new sequence finds of what others left behind."""

from __future__ import annotations

import pytest

from tests.core.invariants import check_idle, check_progress, check_survivors
from tests.core.world import A, B, C, endless, make_world
from trio_runner.core.memory import Copy
from trio_runner.events import Finished, TextPiece
from trio_runner.info import Capabilities
from trio_runner.testing import toy_continuation


def test_a_retry_after_a_cancelled_prompt_goes_on_from_there() -> None:
    prompt = tuple(A + n % 5 for n in range(20))
    world = make_world(2, max_rows=6)
    first = world.submit(prompt=prompt, max_tokens=5)
    world.step()
    world.step()
    world.cancel(first)
    second = world.submit(prompt=prompt, max_tokens=5)
    world.run()
    assert world.last(second).usage.cached_tokens == 12
    assert world.outcome(second) == world.alone(second)
    assert world.n_prefilled[second] == 8


def test_a_retry_after_a_cancelled_generation_decodes_one_token_of_the_prompt() -> None:
    world = make_world(2)
    first = world.submit(prompt=endless(0), max_tokens=20)
    for _ in range(6):
        world.step()
    world.cancel(first)
    second = world.submit(prompt=endless(0), max_tokens=20)
    world.run()
    assert world.last(second).usage.cached_tokens == len(endless(0)) - 1
    assert world.outcome(second) == world.alone(second)


def test_the_conversation_goes_on_from_what_was_said() -> None:
    """After a stop string the slot holds what the client has seen, and nothing of what was cut off."""
    prompt = endless(0)
    said = toy_continuation(prompt, 10)
    stop = bytes(said[6:8]).decode()
    world = make_world(1)
    first = world.submit(prompt=prompt, max_tokens=12, stop=(stop,))
    world.run()
    assert world.last(first).stop == stop
    assert world.text(first) == bytes(said[:6]).decode(errors="replace")
    assert world.context.held(0) == [*prompt, *said[:6]]
    second = world.submit(prompt=(*prompt, *said[:6], B, B, B), max_tokens=1)
    world.run()
    assert world.last(second).usage.cached_tokens == len(prompt) + 6


def test_a_prefix_is_copied_from_a_busy_slot() -> None:
    world = make_world(2)
    first = world.submit(prompt=endless(0), max_tokens=20)
    world.step()
    second = world.submit(prompt=endless(1), max_tokens=20)
    world.run()
    assert Copy(0, 1, 4) in world.ops
    assert world.last(second).usage.cached_tokens >= 4
    assert world.outcome(first) == world.alone(first)
    assert world.outcome(second) == world.alone(second)


def test_recurrent_state_keeps_what_a_stop_string_cut_off() -> None:
    said = toy_continuation(endless(0), 10)
    world = make_world(1, can_trim=False, can_shift=False)
    world.submit(prompt=endless(0), max_tokens=12, stop=(bytes(said[6:8]).decode(),))
    world.run()
    assert world.ops == []
    assert world.context.held(0) == [*endless(0), *said[:7]]


@pytest.mark.parametrize("can_trim", [True, False])
def test_a_refused_trim_starts_the_slot_again_from_nothing(can_trim: bool) -> None:
    """A context may refuse a partial Trim that its capabilities had promised."""
    world = make_world(1, max_rows=4)
    world.submit(prompt=(A, B, A, B), max_tokens=1)
    world.run()
    uid = world.submit(prompt=(A, B, C, C), max_tokens=5, progress=True)
    world.context.capabilities = Capabilities(n_slots=1, n_ctx=32, max_rows=4, can_trim=can_trim)
    world.run()
    assert world.last(uid).usage.cached_tokens == (2 if can_trim else 0)
    assert world.outcome(uid) == world.alone(uid)
    check_progress(world, uid)


def test_a_refused_trim_of_a_free_slot_empties_it() -> None:
    said = toy_continuation(endless(0), 10)
    world = make_world(1)
    world.submit(prompt=endless(0), max_tokens=12, stop=(bytes(said[6:8]).decode(),))
    while not world.finished(0):
        world.step()
    world.context.capabilities = Capabilities(n_slots=1, n_ctx=32, max_rows=8, can_trim=False)
    world.run()
    assert world.context.held(0) == []
    check_idle(world)


def test_text_that_is_held_back_comes_out_at_the_limit() -> None:
    world = make_world(1)
    said = world.submit(prompt=endless(0), max_tokens=6)
    world.run()
    held = world.submit(prompt=endless(0), max_tokens=6, stop=(world.text(said)[-2:] + "z",))
    world.run()
    assert world.outcome(held) == world.outcome(said)
    *_, piece, last = world.events[held]
    assert isinstance(last, Finished)
    assert isinstance(piece, TextPiece)
    assert len(piece.text) == 2


def test_text_that_is_held_back_comes_out_at_the_deadline() -> None:
    world = make_world(1)
    said = world.submit(prompt=endless(0), max_tokens=6)
    world.run()
    held = world.submit(prompt=endless(0), max_tokens=30, stop=(world.text(said)[-2:] + "z",))
    for _ in range(6):
        world.step()
    assert world.text(held) == world.text(said)[:-2]
    world.expire(held)
    assert world.text(held) == world.text(said)
    check_survivors(world)
    check_idle(world)


def test_texts_to_embed_push_at_most_one_prompt_out_of_the_cache() -> None:
    """They are longer than a batch, so each takes a slot. Nothing of them is kept."""
    world = make_world(2, n_ctx=64, max_rows=16, embeds_last_row=True)
    for token in (A, B):
        world.submit(prompt=(token,) * 20, max_tokens=1)
        world.run()
    for _ in range(3):
        world.submit(prompt=(C,) * 60, embedding=True, cache_prompt=False)
        world.run()
    assert [slot.items for slot in world.state.slots] == [(), (B,) * 20]
    check_survivors(world)
    check_idle(world)


@pytest.mark.parametrize("is_preempted", [False, True])
def test_nothing_is_kept_of_a_text_whose_embedding_is_cancelled(is_preempted: bool) -> None:
    world = make_world(1, n_ctx=64, max_rows=16, n_spare_slots=1, embeds_last_row=True)
    text = world.submit(prompt=(C,) * 60, embedding=True, cache_prompt=False, background=True)
    world.step()
    if is_preempted:
        world.submit(prompt=(A,) * 6, max_tokens=20)
        world.step()
        assert world.waiting == [text]
    assert (C,) * 16 in [slot.items for slot in world.state.slots]
    world.cancel(text)
    world.run()
    assert not any(C in slot.items[:1] for slot in world.state.slots)
    check_survivors(world)
