"""The same text alone or in company, whatever happens to others: workloads that hypothesis makes up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.invariants import check_idle, check_survivors
from tests.core.moves import MOVES, Abort, Fail, Move, Poison, Submit, play
from tests.core.world import A, World
from trio_runner.core.following import MIN_FOLLOW
from trio_runner.events import Embedded, Finished
from trio_runner.info import Capabilities


@st.composite
def capabilities_of_a_model(draw: st.DrawFn) -> Capabilities:
    can_trim = draw(st.sampled_from([True, True, True, False]))
    return Capabilities(
        n_slots=draw(st.integers(1, 4)),
        n_ctx=draw(st.integers(8, 48)),
        max_rows=draw(st.integers(1, 16)),
        n_spare_slots=draw(st.integers(0, 3)),
        n_embed_slots=draw(st.integers(1, 3)),
        embeds_last_row=draw(st.booleans()),
        can_trim=can_trim,
        can_shift=can_trim and draw(st.booleans()),
        decoder_start=draw(st.sampled_from([None, None, None, None, A])),
    )


def finish(world: World) -> None:
    """Resume all, run to the end, and check what came of it."""
    for uid in world.specs:
        world.resume(uid)
    world.run()
    check_survivors(world)
    check_idle(world)


@pytest.mark.parametrize("min_follow", [1, 4, MIN_FOLLOW])
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(capabilities_of_a_model(), st.sampled_from([1.0, 40.0]), MOVES)
def test_the_same_text_alone_or_in_company(
    min_follow: int, capabilities: Capabilities, slowness: float, moves: list[Move]
) -> None:
    """With a small `min_follow`, short prompts wait for each other, too."""
    world = World(capabilities, slowness, min_follow)
    play(world, moves)
    finish(world)
    if any(isinstance(move, (Fail, Poison)) for move in moves):
        return
    if not capabilities.can_trim and any(isinstance(move, Abort) for move in moves):
        return
    # Nothing that was decoded was lost, so each row of a prompt was either found or decoded once.
    for uid, spec in world.specs.items():
        if uid not in world.cancelled | world.preempted and world.events[uid]:
            last = world.events[uid][-1]
            assert isinstance(last, (Finished, Embedded))
            if isinstance(last, Embedded) or last.usage.completion_tokens or last.reason == "length":
                n_prompt = last.usage.prompt_tokens - len(spec.encoder_tokens)
                assert last.usage.cached_tokens + world.n_prefilled[uid] == n_prompt


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(4, 16), MOVES)
def test_embeddings_of_a_model_without_memory(n_slots: int, max_rows: int, moves: list[Move]) -> None:
    capabilities = Capabilities(
        n_slots=n_slots,
        n_ctx=max_rows,
        max_rows=max_rows,
        has_memory=False,
        can_trim=False,
        can_shift=False,
        can_generate=False,
    )
    world = World(capabilities)
    play(world, [replace(move, embedding=True) if isinstance(move, Submit) else move for move in moves])
    finish(world)
