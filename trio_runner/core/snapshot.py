"""The state of a scheduler as values: what it knows between two steps, for statistics, checks and tests."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from trio_runner.core.counters import Counters
from trio_runner.core.prompt import Item
from trio_runner.core.sequence import Sequence, SequenceSpec
from trio_runner.core.slots import Slot
from trio_runner.info import SchedulerStatistics


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot; see `core.slots.Slot`."""

    id: int
    items: tuple[Item, ...]
    cache_key: Hashable
    position_lag: int
    n_shared_cells: int
    busy: bool
    parked_for: int | None


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A sequence; see `core.sequence.Sequence`."""

    spec: SequenceSpec
    slot: int
    """-1 while it waits for one."""
    pending: tuple[Item, ...]
    n_cached: int
    n_sampled: int
    prompt_done: bool
    preempted: bool
    paused: bool
    follows: int | None
    """The uid of the sequence that it follows."""
    n_awaited: int


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """A scheduler; see `core.scheduler.Scheduler`."""

    slots: tuple[SlotState, ...]
    embed_slots: tuple[SlotState, ...]
    reserved: Mapping[int, int]
    """Rows that sequences in slots need at once, in one batch, by slot."""
    running: Mapping[int, SequenceState]
    """By uid, in the order in which they got their slots."""
    waiting: Mapping[int, SequenceState]
    suspects: tuple[int, ...]
    max_rows: int
    """Rows that the next batch may have."""
    crowded: bool
    """The KV cache was full: no sequence gets a slot before another one gives one up."""


def slot_states(slots: Iterable[Slot]) -> tuple[SlotState, ...]:
    """A copy of these slots."""
    return tuple(
        SlotState(
            slot.id,
            tuple(slot.items),
            slot.cache_key,
            slot.position_lag,
            slot.n_shared_cells,
            slot.busy,
            slot.parked_for,
        )
        for slot in slots
    )


def sequence_states(sequences: Mapping[int, Sequence]) -> dict[int, SequenceState]:
    """A copy of these sequences."""
    return {
        uid: SequenceState(
            sequence.spec,
            sequence.slot.id,
            tuple(sequence.pending),
            sequence.n_cached,
            sequence.text.n_tokens,
            sequence.prompt_done,
            sequence.preempted,
            sequence.paused,
            None if sequence.follows is None else sequence.follows.spec.uid,
            sequence.n_awaited,
        )
        for uid, sequence in sequences.items()
    }


def statistics(
    waiting: Mapping[int, Sequence],
    running: Mapping[int, Sequence],
    slots: Iterable[Slot],
    counters: Counters,
    n_prompt_rows: int,
) -> SchedulerStatistics:
    """How full a scheduler is, and what it has done so far. `slots` are those that are not for embeddings."""
    n_cached = n_used = 0
    for slot in slots:
        n_cached += len(slot.items)
        if slot.busy:
            n_used += len(slot.items)
    return SchedulerStatistics(
        n_waiting=len(waiting),
        n_running=len(running),
        n_paused=sum(sequence.paused for sequence in running.values()),
        n_preempted=sum(sequence.preempted for sequence in waiting.values()),
        n_cached_tokens=n_cached,
        n_used_tokens=n_used,
        n_prompt_rows=n_prompt_rows,
        n_batches=counters.n_batches,
        n_aborted=counters.n_aborted,
        n_slots_used=counters.n_slots_used,
        n_sampled=counters.n_sampled,
        n_preemptions=counters.n_preemptions,
        n_prompt_tokens=counters.n_prompt_tokens,
        n_looked_up=counters.n_looked_up,
        n_found=counters.n_found,
        n_prompt_decoded=counters.n_prompt_decoded,
        prompt_seconds=counters.prompt_seconds,
        n_generated=counters.n_generated,
        generation_seconds=counters.generation_seconds,
    )
