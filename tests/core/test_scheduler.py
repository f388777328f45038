"""The same text alone or in company, whatever happens to others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.world import World, alone, cache_key_of, rows_of
from trio_runner.core import scheduler
from trio_runner.core.batch import AdapterSet, Batch, DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.core.prompt import Item, Media, cut_before, fit_prompt
from trio_runner.core.sequence import SequenceSpec
from trio_runner.errors import DecodeFailed, InvalidGrammar
from trio_runner.events import Embedded, Finished, PromptProgress, TextPiece
from trio_runner.info import Capabilities
from trio_runner.sampling import SamplingParams
from trio_runner.testing import Interruption, toy_continuation, toy_vector

A, B, C = 97, 98, 99
COMMON = (A, A, B, A, B, B, A, A, A, B) * 4
"""What prompts begin with, so that they share long prefixes."""

# --- any workload ----------------------------------------------------------------------------------------------------

Move: TypeAlias = tuple[str, Any, Any]

STOPS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 4), st.sampled_from(["", "", "z"])),
    max_size=3,
)
"""(start, length, what follows) of a part of what the sequence says alone; the toy never says z."""
FAILURES = st.sampled_from([DecodeOutcome.INVALID, DecodeOutcome.FATAL, DecodeOutcome.NO_KV_SPACE])


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


@st.composite
def submission(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a SequenceSpec; World.submit makes them fit the context."""
    return {
        "prompt": COMMON[: draw(st.integers(0, 40))] + tuple(draw(st.lists(st.sampled_from([A, B]), min_size=1))),
        "images": draw(st.lists(st.tuples(st.sampled_from([*range(13), 99, 99, 99]), st.integers(0, 1)), max_size=2)),
        "adapters": draw(st.sampled_from([(), (), ((1, 1.0),), ((1, 0.5), (2, 1.0))])),
        "n_keep": draw(st.integers(0, 12)),
        "max_tokens": draw(st.integers(1, 60)),
        "stop": draw(STOPS),
        "cache_prompt": draw(st.sampled_from([True, True, False])),
        "shift": draw(st.sampled_from([True, True, False])),
        "progress": draw(st.booleans()),
        "logprobs": draw(st.booleans()),
        "embedding": draw(st.sampled_from([False] * 5 + [True])),
        "background": draw(st.sampled_from([False, False, True])),
    }


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), submission(), st.none()),
        st.tuples(st.just("submit"), submission(), st.none()),
        st.tuples(st.just("again"), st.integers(0, 9), st.none()),
        st.tuples(st.just("steps"), st.integers(1, 12), st.none()),
        st.tuples(st.just("steps"), st.integers(1, 3), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.none()),
        st.tuples(st.just("pause"), st.integers(0, 9), st.none()),
        st.tuples(st.just("resume"), st.integers(0, 9), st.none()),
        st.tuples(st.just("expire"), st.integers(0, 9), st.none()),
        st.tuples(st.just("throw away"), st.none(), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 16), st.none()),
        st.tuples(st.just("fail"), FAILURES, st.integers(0, 16)),
        st.tuples(st.just("poison"), FAILURES, st.integers(0, 9)),
    ),
    min_size=10,
    max_size=40,
)


ASKED = (
    *("prompt", "n_keep", "max_tokens", "stop", "cache_prompt", "shift", "progress", "logprobs"),
    *("embedding", "background", "adapters", "encoder_tokens"),
)


def images(capabilities: Capabilities) -> list[Media]:
    """Two images that a model with these capabilities could have. Only a model that cannot shift has images whose rows
    share positions. A further capability chooses causal or non-causal images, so that both are tried."""
    shares_positions, causal = capabilities.can_trim and not capabilities.can_shift, capabilities.embeds_last_row
    n_rows = [3, 7] if causal and not shares_positions else [min(n, capabilities.max_rows) for n in (3, 7)]
    return [
        Media(f"image {n}".encode(), n, min(n, 2) if shares_positions else n, causal, shares_positions) for n in n_rows
    ]


def fitted(world: World, what: dict[str, Any]) -> dict[str, Any]:
    """The fields of a SequenceSpec that fits the context."""
    capabilities = world.capabilities
    fields = {name: value for name, value in what.items() if name != "images"} | {"stop": ()}
    if capabilities.decoder_start is not None:
        encoder_tokens = what["prompt"][: capabilities.max_rows]
        return fields | {
            "prompt": (capabilities.decoder_start,),
            "encoder_tokens": encoder_tokens,
            "n_keep": 1,
            "embedding": False,
        }
    if what["embedding"]:
        return fields | {"prompt": what["prompt"][: min(capabilities.n_ctx, capabilities.max_rows)]}
    items: list[Item] = list(what["prompt"])
    for place, number in what["images"]:
        place = cut_before(items, min(place, len(items)), any_media=True)
        items[place:place] = rows_of(images(capabilities)[number])
    prompt = fit_prompt(items, n_ctx=capabilities.n_ctx, n_keep=what["n_keep"], adds_bos=False, truncate=True)
    return fields | {"prompt": prompt.items, "n_keep": prompt.n_keep}


def play(world: World, moves: list[Move]) -> None:
    n_ctx = world.capabilities.n_ctx
    for name, what, more in moves:
        uid = what % len(world.specs) if isinstance(what, int) and world.specs else 0
        match name:
            case "submit":
                fields = fitted(world, what)
                said = alone(SequenceSpec(uid=0, **fields), n_ctx).text
                stop = tuple(said[start : start + length] + after for start, length, after in what["stop"])
                world.submit(**fields | {"stop": stop})
            case "steps":
                for _ in range(what):
                    world.step()
            case "throw away":
                world.step(discard=True)
            case "abort":
                world.step(Interruption(DecodeOutcome.ABORTED, what))
            case "fail":
                world.step(Interruption(what, more if what is DecodeOutcome.FATAL else 0))
            case _ if not world.specs:
                pass
            case "again":
                fields = {name: getattr(world.specs[uid], name) for name in ASKED}
                world.submit(**fields)
            case "cancel":
                world.cancel(uid)
            case "pause":
                world.pause(uid)
            case "resume":
                world.resume(uid)
            case "expire":
                world.expire(uid)
            case "poison":
                world.poison[more % len(world.specs)] = what


def check_survivors(world: World) -> None:
    """Whoever was not cancelled, and did not break a batch all alone, got what it would have got alone."""
    for uid, spec in world.specs.items():
        if uid in world.cancelled:
            continue
        assert world.finished(uid), "somebody waits for ever"
        *before, last = world.events[uid]
        assert isinstance(last, (Finished, Embedded))
        if isinstance(last, Finished) and last.reason == "error":
            assert uid in world.may_fail, "somebody paid for another's failure"
            assert isinstance(last.error, DecodeFailed)
            assert world.alone(uid).text.startswith(world.text(uid)) or spec.embedding
            continue
        assert last.usage.prompt_tokens == len(spec.prompt) + len(spec.encoder_tokens)
        assert last.usage.cached_tokens < len(spec.prompt)
        assert spec.cache_prompt or last.usage.cached_tokens == 0
        if uid in world.expired and not last.usage.completion_tokens:
            assert world.outcome(uid) == world.alone(uid)
            continue
        if isinstance(last, Embedded):
            assert spec.embedding
            assert isinstance(last.vector, np.ndarray)
            assert np.array_equal(last.vector, toy_vector(spec.prompt, cache_key_of(spec)))
        else:
            assert world.outcome(uid) == world.alone(uid)
            assert last.usage.prompt_seconds > 0
        check_progress(world, uid)
        pieces = [event for event in before if isinstance(event, TextPiece)]
        assert all(piece.text for piece in pieces)
        if isinstance(last, Finished):
            n_reported = sum(len(piece.tokens) for piece in pieces) + len(last.tokens)
            assert n_reported == (last.usage.completion_tokens if spec.logprobs else 0)


def check_progress(world: World, uid: int) -> None:
    events = world.events[uid]
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert bool(progress) == world.specs[uid].progress
    for event in progress:
        assert event.n_cached <= event.n_decoded <= event.n_prompt == len(world.specs[uid].prompt)
    if progress:
        assert events[: len(progress)] == progress, "progress of the prompt after the prompt"
        assert progress[-1].n_decoded == progress[-1].n_prompt


@pytest.fixture(params=[1, 4, 32])
def min_follow(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many tokens it takes to wait for another's prefix: short prompts do, if need be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MIN_FOLLOW", request.param)
        yield request.param


@pytest.mark.usefixtures("min_follow")
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(capabilities_of_a_model(), st.sampled_from([1.0, 40.0]), MOVES)
def test_the_same_text_alone_or_in_company(capabilities: Capabilities, slowness: float, moves: list[Move]) -> None:
    world = World(capabilities, slowness)
    play(world, moves)
    for uid in world.specs:
        world.resume(uid)
    world.run()
    check_survivors(world)
    world.check_idle()
    lossless = capabilities.can_trim or not any(move[0] == "abort" for move in moves)
    if lossless and not any(move[0] in ("fail", "poison") for move in moves):
        for uid in world.specs:
            if uid not in world.cancelled | world.preempted and world.events[uid]:
                last = world.events[uid][-1]
                assert isinstance(last, (Finished, Embedded))
                if isinstance(last, Embedded) or last.usage.completion_tokens:
                    n_encoder_tokens = len(world.specs[uid].encoder_tokens)
                    assert (
                        last.usage.cached_tokens + world.n_prefilled[uid] == last.usage.prompt_tokens - n_encoder_tokens
                    )


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
    play(world, [(name, what | {"embedding": True} if name == "submit" else what, more) for name, what, more in moves])
    for uid in world.specs:
        world.resume(uid)
    world.run()
    check_survivors(world)
    world.check_idle()


# --- one case each ---------------------------------------------------------------------------------------------------


def make_world(n_slots: int = 2, *, n_ctx: int = 32, max_rows: int = 8, slowness: float = 1.0, **fields: Any) -> World:
    return World(Capabilities(n_slots=n_slots, n_ctx=n_ctx, max_rows=max_rows, **fields), slowness)


def endless(n: int, *, shift: bool = True, at_least: int = 60) -> tuple[int, ...]:
    """The n-th prompt (of 6 tokens, all with the same first 4) after which the toy goes on for long enough."""
    found = -1
    for number in range(10_000):
        prompt = (A, B, A, B, A + number % 8, A + number // 8 % 8)
        world = make_world(1, n_ctx=16)
        uid = world.submit(prompt=prompt, max_tokens=at_least, n_keep=2, shift=shift)
        found += world.alone(uid).n_sampled == at_least
        if found == n:
            return prompt
    raise AssertionError("no such prompt")


def test_first_come_first_served() -> None:
    world = make_world(1)
    order: list[int] = []
    world.on_batch = lambda batch: order.extend(chunk.uid for chunk in batch.chunks)
    for n in range(5):
        world.submit(prompt=(A, B, A + n), max_tokens=5)
    world.run()
    assert order == sorted(order)
    assert set(order) == set(range(5))


def test_who_leaves_the_queue_is_never_run() -> None:
    world = make_world(1)
    first, second, third = (world.submit(prompt=(A, B), max_tokens=5) for _ in range(3))
    world.step()
    world.cancel(second)
    world.run()
    assert world.events[second] == []
    assert world.outcome(first) == world.outcome(third) == world.alone(first)
    world.check_idle()


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("with_embeddings", [False, True])
def test_nobody_starves(n_rows: int, with_embeddings: bool) -> None:
    """More sequences than rows, some of which would go on for ever: each gets a row again and again."""
    world = make_world(5, max_rows=n_rows, n_ctx=16)
    generations = {world.submit(prompt=endless(n), max_tokens=None, n_keep=2) for n in range(2)}
    late = {world.submit(prompt=(B, B, B, B, *endless(2)), n_keep=2, max_tokens=None)}
    served: list[set[int]] = []
    world.on_batch = lambda batch: served.append({chunk.uid for chunk in batch.chunks})
    for _ in range(120):
        while with_embeddings and len(world.running) + world.scheduler.statistics().n_waiting < 5:
            world.submit(prompt=(A,), embedding=True)
        if not any(map(world.finished, generations | late)):
            world.step()
    for uid in generations | late:
        turns = [0, *(n for n, uids in enumerate(served, start=1) if uid in uids), len(served) + 1]
        assert max(b - a for a, b in pairwise(turns)) <= 12


def test_kinds_of_rows_take_turns() -> None:
    """However many want rows of one kind, and however few of them get some at a time."""
    world = make_world(3, n_ctx=128, max_rows=64, slowness=40.0, n_embed_slots=8)
    kinds: list[tuple[bool, object]] = []
    world.on_batch = lambda batch: kinds.append((batch.kind.embedding, batch.kind.adapters))
    for n in range(80):
        live = [spec for uid, spec in world.specs.items() if not world.finished(uid)]
        for adapters in {(), ((1, 1.0),), ((2, 1.0),)} - {spec.adapters for spec in live if not spec.embedding}:
            world.submit(prompt=(A, n), max_tokens=None, adapters=adapters)
        if sum(spec.embedding for spec in live) < 8 and n > 12:
            world.submit(prompt=(A, B) * 4, embedding=True)
        world.step()
    assert all(len(set(kinds[n : n + 4])) == 4 for n in range(20, 77))


def test_kinds_that_have_prompts_share_the_time_between_two_tokens() -> None:
    """A prompt beside a stream has fewer rows in a batch when another one, of another kind, has its batches, too."""

    def n_rows(*kinds: AdapterSet) -> float:
        world = make_world(4, n_ctx=4096, max_rows=512)
        batches: list[Batch] = []
        world.on_batch = batches.append
        stream = world.submit(prompt=endless(0), max_tokens=None, n_keep=2)
        for _ in range(20):
            world.step()
        prompts = [world.submit(prompt=(A, B, *range(n, n + 900)), adapters=kind) for n, kind in enumerate(kinds)]
        for _ in range(30):
            world.step()
        rows = [len(chunk.items) for batch in batches for chunk in batch.chunks if chunk.uid == prompts[0]]
        assert not world.finished(stream)
        return float(np.median(rows[1:-1]))

    one = n_rows(((1, 1.0),))
    assert n_rows(((1, 1.0),), ((2, 1.0),), ((3, 1.0),)) <= one / 2


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


@pytest.mark.parametrize("shares_positions", [True, False])
def test_a_stop_string_leaves_images_whole(shares_positions: bool) -> None:
    """Even one that is longer than what shifts have left of the text."""
    image = rows_of(Media(b"image", 4, 2 if shares_positions else 4, causal=False, shares_positions=shares_positions))
    for number in range(20):
        world = make_world(1, n_ctx=8, can_shift=False)
        asked: dict[str, Any] = {"prompt": (A, number, *image), "n_keep": 6, "max_tokens": 12}
        said = alone(SequenceSpec(uid=0, **asked), 8).text
        uid = world.submit(**asked, stop=(said[-5:],))
        world.run()
        assert world.outcome(uid) == world.alone(uid)
        assert world.context.held(0) in ([A, number], [A, number, *image])


@pytest.mark.parametrize("which_shifts", ["source", "fork"])
@pytest.mark.parametrize("n_keep", [0, 3])
@pytest.mark.parametrize("n_shared_cells", range(4, 12))
def test_a_shift_leaves_cells_alone_that_another_slot_shares(
    n_shared_cells: int, n_keep: int, which_shifts: str
) -> None:
    """A forked slot has the same cells as its source: to renumber them in one is to renumber them in the other."""
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


def test_a_fork_from_a_busy_slot() -> None:
    world = make_world(2)
    first = world.submit(prompt=endless(0), max_tokens=20)
    world.step()
    second = world.submit(prompt=endless(1), max_tokens=20)
    world.run()
    assert Copy(0, 1, 4) in world.ops
    assert world.last(second).usage.cached_tokens >= 4
    assert world.outcome(first) == world.alone(first)
    assert world.outcome(second) == world.alone(second)


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


@pytest.mark.parametrize("n_kept", [None, 0, 4])
@pytest.mark.parametrize("n_keep", [0, 3, -1])
@pytest.mark.parametrize("kind", ["divisible", "both ways", "shares_positions"])
def test_an_image_at_every_place(kind: str, n_keep: int, n_kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, through context shifts, while every other batch is broken off, and then another one."""
    monkeypatch.setattr(scheduler, "MIN_FOLLOW", 1)
    shares_positions = kind == "shares_positions"
    image = rows_of(
        Media(b"image", 4, 2 if shares_positions else 4, causal=kind == "divisible", shares_positions=shares_positions)
    )
    n_shifted = 0
    for place, number in product(range(9), range(2)):
        items: list[Item] = [A, B, A, B, A, B, A, A + number]
        items[place:place] = image
        prompt = fit_prompt(items, n_ctx=16, n_keep=n_keep, adds_bos=False, truncate=False)
        world = make_world(2, n_ctx=16, max_rows=6, can_shift=not shares_positions)
        asked: dict[str, Any] = {"prompt": prompt.items, "n_keep": prompt.n_keep}
        for max_tokens in (3, 30):
            world.submit(**asked, max_tokens=max_tokens)
        for _ in range(number):
            world.step()
        while world.step() and (n_kept is None or world.step(Interruption(DecodeOutcome.ABORTED, n_kept))):
            assert world.n_steps < 1000, "no end in sight"
        world.submit(**asked, max_tokens=3)
        world.run()
        check_survivors(world)
        n_shifted += world.last(1).usage.completion_tokens > 5
    assert n_shifted > 4


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


def test_after_a_failure_each_is_tried_alone_and_then_all_together_again() -> None:
    world = make_world(3, max_rows=32)
    for n in range(3):
        world.submit(prompt=endless(n), max_tokens=5)
    batches: list[list[int]] = []
    world.on_batch = lambda batch: batches.append(sorted(chunk.uid for chunk in batch.chunks))
    world.step(Interruption(DecodeOutcome.INVALID))
    world.run()
    assert batches[:5] == [[0, 1, 2], [0], [1], [2], [0, 1, 2]]
    check_survivors(world)


def test_those_whose_batches_fail_again_and_again_run_alone() -> None:
    """In turns with the others; and with them, once there is somebody else to blame."""
    world = make_world(4)
    for n in range(2):
        world.submit(prompt=endless(n), max_tokens=100)
    batches: list[list[int]] = []
    world.on_batch = lambda batch: batches.append(sorted(chunk.uid for chunk in batch.chunks))
    for _ in range(2):
        world.step(Interruption(DecodeOutcome.FATAL))
        world.step()
        world.step()
    assert batches == [[0, 1], [0], [1]] * 2
    for n in range(2, 4):
        world.submit(prompt=endless(n), max_tokens=100)
    batches.clear()
    for _ in range(9):
        world.step()
    assert sorted(batches) == [*[[0]] * 3, *[[1]] * 3, *[[2, 3]] * 3]
    world.poison[2] = DecodeOutcome.FATAL
    while not world.finished(2):
        world.step()
    world.run()
    assert [0, 1, 3] in batches
    check_survivors(world)


@pytest.mark.parametrize("outcome", [DecodeOutcome.INVALID, DecodeOutcome.FATAL, DecodeOutcome.NO_KV_SPACE])
@pytest.mark.parametrize("embedding", [False, True])
def test_only_the_culprit_fails(outcome: DecodeOutcome, embedding: bool) -> None:
    world = make_world(3)
    others = [world.submit(prompt=endless(n), max_tokens=10) for n in range(2)]
    culprit = world.submit(prompt=(A, B, C), max_tokens=10, embedding=embedding)
    others += [world.submit(prompt=(A, C), embedding=True), world.submit(prompt=(C, C), max_tokens=10)]
    world.poison[culprit] = outcome
    world.run()
    assert world.last(culprit).reason == "error"
    assert isinstance(world.last(culprit).error, DecodeFailed)
    check_survivors(world)
    assert all(world.events[uid][-1] != world.last(culprit) for uid in others)
    world.check_idle()


def test_the_slot_of_a_culprit_is_emptied() -> None:
    """Nobody knows what a failure has left in it."""
    world = make_world(1, max_rows=4)
    culprit = world.submit(prompt=endless(0), max_tokens=5)
    world.step()
    world.step(Interruption(DecodeOutcome.FATAL, 1))
    assert world.last(culprit).reason == "error"
    retry = world.submit(prompt=endless(0), max_tokens=5)
    world.run()
    assert world.last(retry).usage.cached_tokens == 0
    assert world.outcome(retry) == world.alone(retry)


def test_a_sampler_that_fails_ends_its_own_sequence_only() -> None:
    world = make_world(3)
    before = world.submit(prompt=endless(0), max_tokens=20)
    broken = world.submit(SamplingParams(grammar="z"), prompt=endless(1), max_tokens=20)
    after = world.submit(prompt=endless(2), max_tokens=20)
    world.run()
    assert isinstance(world.last(broken).error, InvalidGrammar)
    assert world.last(broken).reason == "error"
    assert world.text(broken) == ""
    for other in (before, after):
        assert world.outcome(other) == world.alone(other)
    # What was decoded is sound: only sampling failed.
    retry = world.submit(prompt=endless(1), max_tokens=20)
    world.run()
    assert world.last(retry).usage.cached_tokens == len(endless(1)) - 1
    world.check_idle()


def test_seconds_are_those_of_the_steps_with_own_rows() -> None:
    world = make_world(2, max_rows=4)  # the toy takes a millisecond for each row of a batch
    first = world.submit(prompt=endless(0), max_tokens=5)
    world.run()
    second = world.submit(prompt=endless(0), max_tokens=1)
    world.run()
    usage = world.last(first).usage
    assert usage.prompt_seconds == pytest.approx(0.006)
    assert usage.completion_seconds == pytest.approx(0.004)
    usage = world.last(second).usage
    assert usage.prompt_seconds == pytest.approx(0.001)
    assert usage.completion_seconds == 0.0


def test_no_space_gives_up_idle_slots_first_and_then_takes_fewer_rows() -> None:
    world = make_world(2, max_rows=8)
    world.submit(prompt=(A, B), max_tokens=1)
    world.run()
    batches: list[Batch] = []
    world.on_batch = batches.append
    uid = world.submit(prompt=(B,) * 16, max_tokens=2, cache_prompt=False)
    no_space = Interruption(DecodeOutcome.NO_KV_SPACE)
    world.step(no_space)
    assert world.context.held(0) != []
    world.step(no_space)
    assert world.context.held(0) == []
    world.step()
    world.step()
    assert [batch.n_rows for batch in batches] == [8, 8, 4, 8]
    world.run()
    assert world.outcome(uid) == world.alone(uid)


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


def test_a_paused_sequence_gets_no_rows_and_keeps_its_slot() -> None:
    world = make_world(2)
    paused, other = world.submit(prompt=endless(0), max_tokens=20), world.submit(prompt=endless(1), max_tokens=20)
    world.step()
    world.pause(paused)
    world.run()
    assert world.finished(other)
    assert not world.finished(paused)
    assert world.scheduler.statistics().n_paused == 1
    world.resume(paused)
    world.run()
    assert world.outcome(paused) == world.alone(paused)


def test_a_paused_suspect_gets_no_rows() -> None:
    world = make_world(2)
    first, second = world.submit(prompt=endless(0), max_tokens=20), world.submit(prompt=endless(1), max_tokens=20)
    world.step(Interruption(DecodeOutcome.INVALID))
    world.pause(first)
    world.run()
    assert world.finished(second)
    world.resume(first)
    world.run()
    assert world.outcome(first) == world.alone(first)
    assert world.outcome(second) == world.alone(second)


def test_unknown_uids_are_ignored() -> None:
    world = make_world(1)
    for forget in (world.scheduler.cancel, world.scheduler.pause, world.scheduler.resume):
        forget(17)
    assert not world.step()


# --- background work -------------------------------------------------------------------------------------------------


def test_an_interactive_sequence_takes_the_slot_of_the_background_one_that_came_last() -> None:
    world = make_world(2)
    first, second = (world.submit(prompt=endless(n), max_tokens=20, background=True) for n in range(2))
    for _ in range(5):
        world.step()
    waits = world.submit(prompt=endless(3), max_tokens=20, background=True)
    urgent = world.submit(prompt=endless(2), max_tokens=4)
    world.step()
    assert sorted(world.running) == [first, urgent]
    assert world.scheduler.statistics().n_preempted == 1
    world.run()
    check_survivors(world)
    # What it had said before is said once, and it is back before those who came later.
    assert world.preempted == {second}
    order = [uid for uid in world.events if world.finished(uid)]
    assert {first, second, waits, urgent} == set(order)
    world.check_idle()


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize("max_rows", [5, 8])
def test_a_sequence_whose_slot_is_full_gives_way_without_losing_its_text(max_rows: int, can_shift: bool) -> None:
    """It has a token that no longer fits: it must shift just as it would have alone."""
    for n_said in range(1, 30):
        world = make_world(1, n_ctx=16, max_rows=max_rows, can_shift=can_shift)
        background = world.submit(prompt=endless(0), n_keep=2, max_tokens=40, background=True)
        for _ in range(n_said):
            world.step()
        world.submit(prompt=(C, C, B), max_tokens=2)
        world.run()
        assert world.preempted == {background}
        check_survivors(world)


def test_a_preempted_prompt_counts_as_cached_only_what_is_not_decoded_again() -> None:
    prompt = tuple(A + n % 5 for n in range(20))
    world = make_world(1, max_rows=6)
    world.submit(prompt=prompt[:8], max_tokens=1)
    world.run()
    background = world.submit(prompt=prompt, max_tokens=4, background=True, progress=True)
    world.step()
    world.submit(prompt=(C, C, B), max_tokens=2)
    world.run()
    assert world.last(background).usage.cached_tokens == 0
    check_survivors(world)


def test_an_embedding_in_the_background_gives_up_no_slot_for_a_generation() -> None:
    world = make_world(1, embeds_last_row=True)
    generation = world.submit(prompt=endless(0), max_tokens=20, background=True)
    world.step()
    world.submit(prompt=(A, B, C), embedding=True, background=True)
    urgent = world.submit(prompt=endless(1), max_tokens=4)
    world.step()
    assert generation in world.waiting
    assert urgent in world.running
    world.run()
    check_survivors(world)


# --- prefixes that several prompts share -----------------------------------------------------------------------------


def make_prompts(n_prompts: int, n_shared_cells: int, n_own: int = 3) -> list[tuple[int, ...]]:
    shared = tuple(A + n % 7 for n in range(n_shared_cells))
    return [(*shared, *((B + n) for _ in range(n_own))) for n in range(n_prompts)]


def test_prompts_that_arrive_together_decode_what_they_share_once() -> None:
    world = make_world(4, n_ctx=256, max_rows=32)
    for prompt in make_prompts(4, 150):
        world.submit(prompt=prompt, max_tokens=5)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 150 + 4 * 3
    check_survivors(world)


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_a_leader_that_leaves_bequeaths_what_it_has_decoded(how: str) -> None:
    """Even when somebody else is waiting for its slot."""
    prompts = make_prompts(3, 150)
    world = make_world(3, n_ctx=256, max_rows=32)
    leader, *_ = (world.submit(prompt=prompt, max_tokens=5) for prompt in prompts)
    queued = world.submit(prompt=(C,) * 40, max_tokens=5)
    for _ in range(3):
        world.step()
    getattr(world, how)(leader)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 150 + 2 * 3 + 40
    assert world.finished(queued)
    check_survivors(world)


def test_a_leader_that_gives_way_bequeaths_what_it_has_decoded() -> None:
    prompts = make_prompts(2, 150)
    world = make_world(2, n_ctx=256, max_rows=32)
    leader = world.submit(prompt=prompts[0], max_tokens=5, background=True)
    world.step()
    world.submit(prompt=prompts[1], max_tokens=5)
    world.step()
    world.step()
    world.submit(prompt=(C,) * 40, max_tokens=5)
    world.run()
    assert world.preempted == {leader}
    assert world.scheduler.statistics().n_prompt_rows == 150 + 2 * 3 + 40
    check_survivors(world)


def test_a_leader_that_comes_back_does_not_follow_who_follows_it() -> None:
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
    """Its leader may shift it away later."""
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
def test_who_could_not_use_the_prefix_does_not_wait_for_it(cache_prompt: bool, can_trim: bool) -> None:
    world = make_world(2, n_ctx=256, max_rows=32, can_trim=can_trim, can_shift=can_trim)
    batches: list[Batch] = []
    world.on_batch = batches.append
    for prompt in make_prompts(2, 100):
        world.submit(prompt=prompt, max_tokens=5, cache_prompt=cache_prompt)
    world.run()
    assert [len(chunk.items) for chunk in batches[0].chunks] == [16, 16]
    check_survivors(world)


def test_who_decodes_what_others_wait_for_may_be_paused() -> None:
    prompts = make_prompts(2, 100)
    world = make_world(2, n_ctx=256, max_rows=32)
    leader, follower = (world.submit(prompt=prompt, max_tokens=5) for prompt in prompts)
    world.step()
    world.pause(leader)
    world.run()
    assert world.finished(follower)
    world.resume(leader)
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 100 + 2 * 3 + 100 - 32
    check_survivors(world)


def test_rows_that_were_kept_of_an_aborted_prompt_are_counted() -> None:
    world = make_world(1, max_rows=16)
    world.submit(prompt=(A, B) * 8, max_tokens=1)
    world.step(Interruption(DecodeOutcome.ABORTED, 7))
    world.run()
    assert world.scheduler.statistics().n_prompt_rows == 16


def test_who_comes_later_is_not_served_sooner() -> None:
    """One row for each step, and short sequences that come all the time."""
    world = make_world(2, max_rows=1)
    old = world.submit(prompt=endless(0), max_tokens=10)
    for _ in range(60):
        if len(world.running) + len(world.waiting) < 2:
            world.submit(prompt=(A,), max_tokens=1, cache_prompt=False)
        world.step()
    assert world.finished(old)


@st.composite
def families(draw: st.DrawFn) -> tuple[int, list[tuple[int, ...]]]:
    """(what they share, prompts of which no two share more)"""
    n_prompts, n_shared_cells = draw(st.integers(2, 5)), draw(st.integers(1, 60))
    return n_shared_cells, [(*prompt, B) for prompt in make_prompts(n_prompts, n_shared_cells, draw(st.integers(1, 3)))]


@settings(max_examples=100)
@given(families(), st.integers(1, 24), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=30))
def test_what_prompts_share_is_decoded_once(
    family: tuple[int, list[tuple[int, ...]]], max_rows: int, moves: list[tuple[int, int]]
) -> None:
    """Whenever they come, and whoever leaves."""
    n_shared_cells, prompts = family
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MIN_FOLLOW", 1)
        world = make_world(len(prompts) + 1, n_ctx=128, max_rows=max_rows)
        shared_rows: list[int] = []
        world.on_batch = lambda batch: shared_rows.extend(
            position
            for chunk in batch.chunks
            for position in range(chunk.start, chunk.stop)
            if position < n_shared_cells and chunk.uid in family_uids
        )
        family_uids: set[int] = set()
        left = list(prompts)
        for what, n in moves:
            uid = n % max(len(world.specs), 1)
            if what <= 2 and left:
                family_uids.add(world.submit(prompt=left.pop(), max_tokens=4, background=what == 0))
            elif what == 3 and uid in world.specs:
                world.cancel(uid)
            elif what == 4 and uid in world.specs:
                world.expire(uid)
            elif what == 5:
                world.step(discard=True)
            else:
                world.step()
        family_uids |= {world.submit(prompt=prompt, max_tokens=4) for prompt in left}
        world.run()
        check_survivors(world)
        world.check_idle()
    assert sorted(shared_rows) == list(range(len(shared_rows)))
    assert len(shared_rows) == n_shared_cells or len(world.cancelled | world.expired) == len(prompts)


# --- what is easily forgotten ----------------------------------------------------------------------------------------


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
    world.check_idle()


def test_a_prompt_beside_a_stream_gets_rows_by_what_they_cost() -> None:
    world = make_world(2, n_ctx=512, max_rows=256, slowness=20.0)
    rows: list[int] = []
    world.on_batch = lambda batch: rows.append(batch.n_rows)
    world.submit(prompt=endless(0), max_tokens=50)
    for _ in range(4):
        world.step()
    world.submit(prompt=(C,) * 300, max_tokens=1)
    for _ in range(10):
        world.step()
    # 20 ms for each row, and 2.4 of them for each token of the stream: the fewest rows that a prompt may have.
    assert rows[-3:] == [1 + 4] * 3


def test_after_an_abort_a_lone_prompt_takes_short_steps() -> None:
    world = make_world(1, n_ctx=512, max_rows=256, slowness=5.0)
    rows: list[int] = []
    world.on_batch = lambda batch: rows.append(batch.n_rows)
    world.submit(prompt=(C,) * 500, max_tokens=1)
    world.step()
    world.step()
    world.step(Interruption(DecodeOutcome.ABORTED, 1))
    for _ in range(scheduler.N_SHORT_STEPS + 1):
        world.step()
    # 5 ms for each row: 50 fit a step, 20 a short one.
    assert rows == [64, 50, 50, *[20] * scheduler.N_SHORT_STEPS, 50]
    statistics = world.scheduler.statistics()
    assert (statistics.n_batches, statistics.n_aborted) == (2 + scheduler.N_SHORT_STEPS + 1, 1)


@pytest.mark.parametrize("cache_prompt", [True, False])
@pytest.mark.parametrize("n_slots", [1, 3])
def test_a_background_request_goes_on_from_where_it_was(n_slots: int, cache_prompt: bool) -> None:
    """However often its slot is taken from it, and whatever the request says about what others have cached."""
    world = make_world(n_slots, n_ctx=256, max_rows=8, n_spare_slots=n_slots)
    patient = [
        world.submit(prompt=(C + 1 + n,) * 150, max_tokens=3, background=True, cache_prompt=cache_prompt)
        for n in range(n_slots)
    ]
    n_taken = 0
    while not all(map(world.finished, patient)):
        for _ in range(n_slots):
            world.submit(prompt=(C, B, C), max_tokens=2)
        for _ in range(12):
            world.step()
        n_taken += 1
        assert n_taken < 100, "it never gets anywhere"
    world.run()
    assert all(world.n_prefilled[uid] == 150 for uid in patient)
    assert set(patient) <= world.preempted
    check_survivors(world)


def test_a_prompt_of_one_row_is_no_token_of_a_stream() -> None:
    world = make_world(1)
    world.submit(prompt=(A,), max_tokens=1)
    world.run()
    assert world.scheduler._pace._decode_seconds == {}


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


def test_recurrent_state_keeps_what_a_stop_string_cut_off() -> None:
    said = toy_continuation(endless(0), 10)
    world = make_world(1, can_trim=False, can_shift=False)
    world.submit(prompt=endless(0), max_tokens=12, stop=(bytes(said[6:8]).decode(),))
    world.run()
    assert world.ops == []
    assert world.context.held(0) == [*endless(0), *said[:7]]


def test_a_refused_trim_of_a_slot_that_nobody_uses_empties_it() -> None:
    said = toy_continuation(endless(0), 10)
    world = make_world(1)
    world.submit(prompt=endless(0), max_tokens=12, stop=(bytes(said[6:8]).decode(),))
    while not world.finished(0):
        world.step()
    world.context.capabilities = Capabilities(n_slots=1, n_ctx=32, max_rows=8, can_trim=False)
    world.run()
    assert world.context.held(0) == []
    world.check_idle()


@pytest.mark.parametrize("with_embeddings", [False, True])
def test_who_never_finds_space_holds_nobody_up_for_ever(with_embeddings: bool) -> None:
    """Not while batches of another kind succeed all the time either."""
    world = make_world(2)
    culprit, other = (world.submit(prompt=endless(n), max_tokens=4) for n in range(2))
    world.poison[culprit] = DecodeOutcome.NO_KV_SPACE
    for _ in range(60):
        if with_embeddings and not world.scheduler.statistics().n_waiting > 1:
            world.submit(prompt=(A, B), embedding=True)
        world.step()
    assert world.last(culprit).reason == "error"
    assert world.finished(other)
    world.run()
    check_survivors(world)
    world.check_idle()


def test_without_space_one_waits_and_gives_up_what_it_holds() -> None:
    world = make_world(3, n_embed_slots=1, embeds_last_row=True)
    for n in range(2):
        world.submit(prompt=endless(n), max_tokens=9)
    embedding = world.submit(prompt=(A, B, C), embedding=True)
    world.step()
    world.pause(embedding)
    world.step(Interruption(DecodeOutcome.NO_KV_SPACE))
    assert (world.waiting, sorted(world.running)) == ([1], [0, embedding])
    world.step()
    assert world.context.held(1) == []
    # The one that is left only gets fewer rows; nobody waits for an embedding's sake.
    world.step(Interruption(DecodeOutcome.NO_KV_SPACE))
    assert sorted(world.running) == [0, embedding]
    world.resume(embedding)
    world.run()
    check_survivors(world)
    world.check_idle()
