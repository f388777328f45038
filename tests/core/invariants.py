"""What must always hold in a World (tests/core/world.py), besides what `Scheduler.check_integrity` checks.

These are promises about behaviour, so they also need to know what happened before, what the KV cache really holds, and
what readers were told.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from tests.core.oracle import cache_key_of
from trio_runner.core.batch import Batch
from trio_runner.core.prompt import Item, common_prefix, cut_before
from trio_runner.core.sequence import SequenceSpec
from trio_runner.core.snapshot import SchedulerState, SequenceState
from trio_runner.errors import DecodeFailed
from trio_runner.events import Embedded, Finished, PromptProgress, SampledToken, TextPiece
from trio_runner.testing import toy_score, toy_vector

if TYPE_CHECKING:
    from tests.core.world import World


def check_held(world: World, state: SchedulerState) -> None:
    """Rule 1, once all edits are done."""
    for slot in (*state.slots, *state.embed_slots):
        assert list(slot.items) == world.context.held(slot.id), f"slot {slot.id} is not what the KV cache holds"
    for one, other in combinations(state.slots, 2):
        shared = world.context.shared_rows(one.id, other.id)
        assert max(shared, default=-1) < min(one.n_shared_cells, other.n_shared_cells), "cells are shared unawares"


def check_waiting(world: World, state: SchedulerState) -> None:
    """First come, first served, and interactive sequences first; and none waits without need."""
    specs, capabilities = world.specs, world.capabilities

    def takes_embed_slot(uid: int) -> bool:
        """Whether it takes a slot for embeddings. A text longer than a batch, if its last row gives its embedding, does
        not."""
        is_long = capabilities.embeds_last_row and len(specs[uid].prompt) > capabilities.max_rows
        return specs[uid].embedding and not is_long

    for embedding in (True, False):
        ahead = {uid for uid in state.waiting.keys() - world.paused if takes_embed_slot(uid) == embedding}
        running = {uid for uid in state.running if takes_embed_slot(uid) == embedding}
        for uid in ahead - world.overtaken:
            rivals = {other for other in running if specs[other].background == specs[uid].background}
            assert max(rivals, default=-1) < uid, "a sequence jumped the queue"
        if not ahead:
            continue
        first = min(ahead, key=lambda uid: (specs[uid].background, uid))
        if embedding:
            n_reserved = sum(len(specs[uid].prompt) for uid in running)
            has_room = n_reserved + len(specs[first].prompt) <= capabilities.max_rows
            assert len(running) == capabilities.n_embed_slots or not has_room, "an embedding waits without need"
        elif not state.crowded:
            n_reserved = sum(len(specs[uid].encoder_tokens) for uid in running)
            has_room = n_reserved + len(specs[first].encoder_tokens) <= capabilities.max_rows
            assert len(running) == capabilities.n_slots or not has_room, "a slot is free while a sequence waits"
            is_outranked = any(specs[uid].background for uid in running)
            assert specs[first].background or not is_outranked, "an interactive one waits for a background one"


def check_admission(world: World, before: SchedulerState, after: SchedulerState) -> None:
    """A sequence that got a slot, if no other did in the same step, goes on from the longest prefix that any held."""
    started = [sequence for uid, sequence in after.running.items() if uid not in before.running]
    assert all(sequence.spec.uid not in world.paused for sequence in started), "a slot for a paused sequence"
    # Long texts that are to be embedded take the slots of generations, too.
    started = [sequence for sequence in started if sequence.slot < world.capabilities.first_embed_slot]
    if len(started) != 1 or not world.capabilities.can_trim:
        return
    sequence = started[0]
    if sequence.spec.reuses and sequence.follows is None and not sequence.prompt_done:
        prompt, cache_key = sequence.spec.prompt, sequence.spec.cache_key
        held = (slot.items for slot in before.slots if slot.cache_key == cache_key)
        longest = max((common_prefix(items, prompt) for items in held), default=0)
        longest = cut_before(prompt, min(longest, len(prompt) - 1))
        assert len(after.slots[sequence.slot].items) >= longest, "a prefix was not used"


def check_following(world: World, state: SchedulerState) -> None:
    """A sequence that follows another one waits for something that will come."""

    def items(sequence: SequenceState) -> list[Item]:
        return [*state.slots[sequence.slot].items, *sequence.pending]

    for sequence in state.running.values():
        if sequence.follows is None or sequence.spec.uid in world.paused:
            continue
        followed, own = state.running[sequence.follows], items(sequence)
        assert followed.spec.uid not in world.paused, "it waits for a sequence that is paused"
        n_common = cut_before(own, min(common_prefix(items(followed), own), len(own) - 1))
        assert len(state.slots[followed.slot].items) < n_common, "it waits for rows that are decoded already"


def check_every_sequence_is_served(world: World, batch: Batch, *, failed: bool) -> None:
    served = {chunk.uid for chunk in batch.chunks}
    most = 4 * (world.capabilities.n_slots + world.capabilities.n_embed_slots)
    for uid, sequence in world.state.running.items():
        if uid in served or uid in world.paused or sequence.follows is not None:
            world.n_passed_over[uid] = 0
        elif not failed:
            world.n_passed_over[uid] = world.n_passed_over.get(uid, 0) + 1
            assert world.n_passed_over[uid] <= most, "a sequence starves"


def check_batch(world: World, state: SchedulerState, batch: Batch) -> None:
    assert batch.n_rows <= world.capabilities.max_rows
    if batch.chunks:
        assert batch.number not in world.numbers, "two batches of the same number"
        world.numbers.add(batch.number)
    for chunk in batch.chunks:
        assert chunk.items, "a chunk without rows"
        assert chunk.uid in state.running
        assert chunk.uid not in world.paused, "rows for a paused sequence"
        if not world.specs[chunk.uid].embedding or not world.capabilities.embeds_last_row:
            assert world.specs[chunk.uid].embedding == batch.kind.embedding
        elif batch.kind.embedding:
            assert len(chunk.items) == 1, "rows of an embedding that tokens could have been beside"


def check_idle(world: World) -> None:
    """All is done: every slot is free, and no sequence is remembered."""
    state, statistics = world.state, world.scheduler.statistics()
    assert not state.running
    assert not state.waiting
    assert not state.crowded
    assert not state.suspects
    assert not state.reserved
    assert not any(slot.busy or slot.parked_for is not None for slot in (*state.slots, *state.embed_slots))
    assert not any(slot.items for slot in state.embed_slots)
    n_held = sum(len(world.context.held(slot.id)) for slot in state.slots)
    assert (statistics.n_waiting, statistics.n_running, statistics.n_paused) == (0, 0, 0)
    assert statistics.n_preempted == 0
    assert statistics.n_cached_tokens == n_held
    assert statistics.n_prompt_rows == sum(world.n_prefilled.values())


def check_survivors(world: World) -> None:
    """Every sequence that was not cancelled, and whose batch did not fail while it was alone in it, got what it would
    have got alone."""
    for uid, spec in world.specs.items():
        if uid in world.cancelled:
            continue
        assert world.finished(uid), "a sequence waits for ever"
        *before, last = world.events[uid]
        assert isinstance(last, (Finished, Embedded))
        if isinstance(last, Finished) and last.reason == "error":
            assert uid in world.may_fail, "a sequence paid for another one's failure"
            assert isinstance(last.error, DecodeFailed)
            assert world.alone(uid).text.startswith(world.text(uid)) or spec.embedding
            continue
        assert last.usage.prompt_tokens == len(spec.prompt) + len(spec.encoder_tokens)
        assert last.usage.cached_tokens < len(spec.prompt)
        assert spec.reuses or last.usage.cached_tokens == 0
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
        if isinstance(last, Finished):
            assert last.prompt_logprobs == (expected_scores(spec) if spec.prompt_logprobs >= 0 else ())
        pieces = [event for event in before if isinstance(event, TextPiece)]
        assert all(piece.text for piece in pieces)
        if isinstance(last, Finished):
            n_reported = sum(len(piece.tokens) for piece in pieces) + len(last.tokens)
            assert n_reported == (last.usage.completion_tokens if spec.logprobs else 0)


def expected_scores(spec: SequenceSpec) -> tuple[SampledToken, ...]:
    """How probable the tokens of its prompt are."""
    cache_key, prompt = cache_key_of(spec), spec.prompt
    return tuple(
        toy_score(prompt[:index], item, spec.prompt_logprobs, cache_key)
        for index, item in enumerate(prompt)
        if index and isinstance(item, int)
    )


def check_progress(world: World, uid: int) -> None:
    """The events about the prompt come first, and say how far it is."""
    events = world.events[uid]
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert bool(progress) == world.specs[uid].progress
    for event in progress:
        assert event.n_cached <= event.n_decoded <= event.n_prompt == len(world.specs[uid].prompt)
    if progress:
        assert events[: len(progress)] == progress, "progress of the prompt after the prompt"
        assert progress[-1].n_decoded == progress[-1].n_prompt
