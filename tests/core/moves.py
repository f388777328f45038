"""Moves of a World (tests/core/world.py) as values, so that hypothesis can make up whole workloads and print them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hypothesis import strategies as st

from tests.core.oracle import alone, rows_of
from tests.core.world import A, B, World
from trio_runner.core.batch import AdapterSet, DecodeOutcome
from trio_runner.core.prompt import Item, Media, cut_before, fit_prompt
from trio_runner.core.sequence import SequenceSpec
from trio_runner.info import Capabilities
from trio_runner.testing import Interruption

COMMON = (A, A, B, A, B, B, A, A, A, B) * 4
"""What prompts begin with, so that they share long prefixes."""


@dataclass(frozen=True)
class Image:
    """One of the two images that a model could have, put into a prompt at `place`, or at its end."""

    place: int
    number: int


@dataclass(frozen=True)
class PartOfText:
    """A stop string: a part of what the sequence says alone, followed by `after`."""

    start: int
    length: int
    after: str
    """The toy never says z."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit a request that is made to fit the context."""

    prompt: tuple[int, ...]
    images: tuple[Image, ...]
    adapters: AdapterSet
    n_keep: int
    max_tokens: int
    stop: tuple[PartOfText, ...]
    cache_prompt: bool
    share_prompt: bool
    preferred_slot: int | None
    shift: bool
    progress: bool
    logprobs: bool
    embedding: bool
    background: bool
    prompt_logprobs: int


@dataclass(frozen=True)
class SubmitAgain:
    """Submit the same request again. `number` names one of those so far, here and below, modulo how many there are."""

    number: int


@dataclass(frozen=True)
class Steps:
    n: int


@dataclass(frozen=True)
class ThrowBatchAway:
    """Do the edits of a step, and not its batch."""


@dataclass(frozen=True)
class Abort:
    """Abort a batch after its first rows."""

    n_rows: int


@dataclass(frozen=True)
class Fail:
    """Let a batch fail once. Only after FATAL are its first rows kept."""

    outcome: DecodeOutcome
    n_rows: int


@dataclass(frozen=True)
class Poison:
    """Let all batches fail that have rows of a sequence."""

    outcome: DecodeOutcome
    number: int


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Pause:
    number: int


@dataclass(frozen=True)
class Resume:
    number: int


@dataclass(frozen=True)
class Expire:
    number: int


Move: TypeAlias = (
    Submit | SubmitAgain | Steps | ThrowBatchAway | Abort | Fail | Poison | Cancel | Pause | Resume | Expire
)

FAILURES = st.sampled_from([DecodeOutcome.INVALID, DecodeOutcome.FATAL, DecodeOutcome.NO_KV_SPACE])
NUMBERS = st.integers(0, 9)
IMAGES = st.builds(Image, st.sampled_from([*range(13), 99, 99, 99]), st.integers(0, 1))
STOPS = st.builds(PartOfText, st.integers(0, 40), st.integers(0, 4), st.sampled_from(["", "", "z"]))
SUBMISSIONS = st.builds(
    Submit,
    prompt=st.builds(
        lambda n_common, rest: (*COMMON[:n_common], *rest),
        st.integers(0, 40),
        st.lists(st.sampled_from([A, B]), min_size=1),
    ),
    images=st.lists(IMAGES, max_size=2).map(tuple),
    adapters=st.sampled_from([(), (), ((1, 1.0),), ((1, 0.5), (2, 1.0))]),
    n_keep=st.integers(0, 12),
    max_tokens=st.sampled_from([0, *range(1, 60)]),
    stop=st.lists(STOPS, max_size=3).map(tuple),
    cache_prompt=st.sampled_from([True, True, False]),
    share_prompt=st.booleans(),
    preferred_slot=st.sampled_from([None, None, *range(4)]),
    shift=st.sampled_from([True, True, False]),
    progress=st.booleans(),
    logprobs=st.booleans(),
    embedding=st.sampled_from([False] * 5 + [True]),
    background=st.sampled_from([False, False, True]),
    prompt_logprobs=st.sampled_from([-1, -1, -1, -1, 0, 2]),
)
MOVES: st.SearchStrategy[list[Move]] = st.lists(
    st.one_of(
        SUBMISSIONS,
        SUBMISSIONS,
        st.builds(SubmitAgain, NUMBERS),
        st.builds(Steps, st.integers(1, 12)),
        st.builds(Steps, st.integers(1, 3)),
        st.builds(Cancel, NUMBERS),
        st.builds(Pause, NUMBERS),
        st.builds(Resume, NUMBERS),
        st.builds(Expire, NUMBERS),
        st.just(ThrowBatchAway()),
        st.builds(Abort, st.integers(0, 16)),
        st.builds(Fail, FAILURES, st.integers(0, 16)),
        st.builds(Poison, FAILURES, NUMBERS),
    ),
    min_size=10,
    max_size=40,
)


def play(world: World, moves: Sequence[Move]) -> None:
    """Make these moves. Moves that name a request do nothing while there is none."""
    for move in moves:
        match move:
            case Submit():
                spec = fitted(move, world.capabilities)
                said = alone(spec, world.capabilities.n_ctx).text
                stop = tuple(said[part.start : part.start + part.length] + part.after for part in move.stop)
                world.add(replace(spec, stop=stop))
            case Steps(n):
                for _ in range(n):
                    world.step()
            case ThrowBatchAway():
                world.step(discard=True)
            case Abort(n_rows):
                world.step(Interruption(DecodeOutcome.ABORTED, n_rows))
            case Fail(outcome, n_rows):
                world.step(Interruption(outcome, n_rows if outcome is DecodeOutcome.FATAL else 0))
            case _ if world.specs:
                play_on(world, move.number % len(world.specs), move)


def play_on(world: World, uid: int, move: SubmitAgain | Cancel | Pause | Resume | Expire | Poison) -> None:
    """Make a move that names the request `uid`."""
    match move:
        case SubmitAgain():
            world.add(world.specs[uid])
        case Cancel():
            world.cancel(uid)
        case Pause():
            world.pause(uid)
        case Resume():
            world.resume(uid)
        case Expire():
            world.expire(uid)
        case Poison(outcome):
            world.poison[uid] = outcome


def images(capabilities: Capabilities) -> list[Media]:
    """Two images that a model with these capabilities could have. Only a model that cannot shift has images whose rows
    share positions. A further capability chooses causal or non-causal images, so that both are tried."""
    shares_positions, causal = capabilities.can_trim and not capabilities.can_shift, capabilities.embeds_last_row
    n_rows = [3, 7] if causal and not shares_positions else [min(n, capabilities.max_rows) for n in (3, 7)]
    return [
        Media(f"image {n}".encode(), n, min(n, 2) if shares_positions else n, causal, shares_positions) for n in n_rows
    ]


def fitted(move: Submit, capabilities: Capabilities) -> SequenceSpec:
    """The request that fits the context, without stop strings."""
    spec = SequenceSpec(
        uid=0,
        prompt=move.prompt,
        adapters=move.adapters,
        n_keep=move.n_keep,
        max_tokens=move.max_tokens,
        cache_prompt=move.cache_prompt,
        share_prompt=move.share_prompt and not move.embedding,
        preferred_slot=None if move.preferred_slot is None else move.preferred_slot % capabilities.n_slots,
        shift=move.shift,
        progress=move.progress,
        logprobs=move.logprobs,
        embedding=move.embedding,
        background=move.background,
        prompt_logprobs=-1 if move.embedding or capabilities.decoder_start is not None else move.prompt_logprobs,
    )
    if capabilities.decoder_start is not None:
        encoder_tokens = move.prompt[: capabilities.max_rows]
        return replace(
            spec, prompt=(capabilities.decoder_start,), encoder_tokens=encoder_tokens, n_keep=1, embedding=False
        )
    if move.embedding:
        longest = capabilities.n_ctx if capabilities.embeds_last_row else min(capabilities.n_ctx, capabilities.max_rows)
        return replace(spec, prompt=move.prompt[:longest])
    items: list[Item] = list(move.prompt)
    for image in move.images:
        place = cut_before(items, min(image.place, len(items)), any_media=True)
        items[place:place] = rows_of(images(capabilities)[image.number])
    prompt = fit_prompt(items, n_ctx=capabilities.n_ctx, n_keep=move.n_keep, adds_bos=False, truncate=True)
    return replace(spec, prompt=prompt.items, n_keep=prompt.n_keep)
