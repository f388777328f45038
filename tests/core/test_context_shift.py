"""Slots that are full, and images, which may not be cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tests.core.invariants import check_survivors
from tests.core.oracle import alone, rows_of
from tests.core.world import A, B, C, World, endless, make_world
from trio_runner.core.batch import DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.core.prompt import Item, Media, fit_prompt
from trio_runner.core.sequence import SequenceSpec
from trio_runner.info import Capabilities
from trio_runner.testing import Interruption


@pytest.mark.parametrize("shares_positions", [True, False])
def test_a_stop_string_leaves_images_whole(shares_positions: bool) -> None:
    """Even a stop string that is longer than what shifts have left of the text."""
    image = rows_of(Media(b"image", 4, 2 if shares_positions else 4, causal=False, shares_positions=shares_positions))
    for number in range(20):
        world = make_world(1, n_ctx=8, can_shift=False)
        spec = SequenceSpec(uid=0, prompt=(A, number, *image), n_keep=6, max_tokens=12)
        uid = world.add(replace(spec, stop=(alone(spec, 8).text[-5:],)))
        world.run()
        assert world.outcome(uid) == world.alone(uid)
        assert world.context.held(0) in ([A, number], [A, number, *image])


@pytest.mark.parametrize("which_shifts", ["source", "fork"])
@pytest.mark.parametrize("n_keep", [0, 3])
@pytest.mark.parametrize("n_shared_cells", range(4, 12))
def test_a_shift_does_not_touch_cells_that_another_slot_shares(
    n_shared_cells: int, n_keep: int, which_shifts: str
) -> None:
    """After a copy both slots have the same cells: to renumber them in one is to renumber them in the other."""
    common = (A, B) * 6
    world = make_world(2, n_ctx=16, max_rows=16)
    source = world.submit(prompt=lasting(common, n_keep), n_keep=n_keep, max_tokens=20, shift=which_shifts == "source")
    world.step()
    prompt = lasting(common[:n_shared_cells], n_keep)
    fork = world.submit(prompt=prompt, n_keep=n_keep, max_tokens=20, shift=which_shifts == "fork")
    world.step()
    assert Copy(0, 1, n_shared_cells) in world.ops
    world.run()
    assert world.outcome(source) == world.alone(source)
    assert world.outcome(fork) == world.alone(fork)
    assert world.last(source if which_shifts == "source" else fork).usage.completion_tokens == 20


def lasting(start: tuple[int, ...], n_keep: int) -> tuple[int, ...]:
    """`start` and two more tokens, after which the toy generates 20."""
    for number in range(100, 200):
        prompt = (*start, C + len(start), number)
        if alone(SequenceSpec(uid=0, prompt=prompt, n_keep=n_keep, max_tokens=20), 16).n_sampled == 20:
            return prompt
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize("n_keep", [0, 3, 14, 15])
def test_a_full_slot_shifts(can_shift: bool, n_keep: int) -> None:
    capabilities = Capabilities(n_slots=1, n_ctx=16, max_rows=16, can_shift=can_shift)
    world = World(capabilities)
    uid = world.submit(prompt=endless(0), n_keep=n_keep, max_tokens=50)
    world.run()
    assert world.outcome(uid) == world.alone(uid)
    assert {type(op) for op in world.ops} == ({Trim, Slide} if can_shift else {Trim})


def test_without_shift_a_full_slot_ends_the_generation() -> None:
    world = make_world(1, n_ctx=16)
    uid = world.submit(prompt=endless(0, shift=True), shift=False, max_tokens=50)
    world.run()
    assert world.last(uid).reason == "length"
    assert world.last(uid).usage.completion_tokens == 16 - 6 + 1
    assert world.outcome(uid) == world.alone(uid)


@pytest.mark.parametrize("n_kept", [None, 0, 4])
@pytest.mark.parametrize("n_keep", [0, 3, -1])
@pytest.mark.parametrize("kind", ["divisible", "non-causal", "shares_positions"])
def test_an_image_at_every_place(kind: str, n_keep: int, n_kept: int | None) -> None:
    """Two sequences at once, through context shifts, while every other batch is aborted, and then a third one."""
    shares_positions = kind == "shares_positions"
    image = rows_of(
        Media(b"image", 4, 2 if shares_positions else 4, causal=kind == "divisible", shares_positions=shares_positions)
    )
    n_shifted = 0
    for place, number in product(range(9), range(2)):
        items: list[Item] = [A, B, A, B, A, B, A, A + number]
        items[place:place] = image
        prompt = fit_prompt(items, n_ctx=16, n_keep=n_keep, adds_bos=False, truncate=False)
        capabilities = Capabilities(n_slots=2, n_ctx=16, max_rows=6, can_shift=not shares_positions)
        world = World(capabilities, min_follow=1)
        for max_tokens in (3, 30):
            world.submit(prompt=prompt.items, n_keep=prompt.n_keep, max_tokens=max_tokens)
        for _ in range(number):
            world.step()
        while world.step() and (n_kept is None or world.step(Interruption(DecodeOutcome.ABORTED, n_kept))):
            assert world.n_steps < 1000, "no end in sight"
        world.submit(prompt=prompt.items, n_keep=prompt.n_keep, max_tokens=3)
        world.run()
        check_survivors(world)
        n_shifted += world.last(1).usage.completion_tokens > 5
    assert n_shifted > 4
