"""The state of a scheduler as values: what it knows between two steps, for checks and tests."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from trio_runner.core.prompt import Item
from trio_runner.core.sequence import Sequence, SequenceSpec
from trio_runner.core.slots import Slot


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
