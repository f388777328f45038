"""Slots: the lanes of the KV cache, and which of them a prompt takes so that least is decoded again.

A slot remembers what its last sequence left in the KV cache. A prompt that starts the same way goes on from there: in
that slot, or in another one that shares those positions, which costs no memory and no time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from trio_runner.core.memory import Copy, MemoryOp, Trim
from trio_runner.core.prompt import Item, MediaRow, common_prefix, cut_before, n_positions
from trio_runner.info import Capabilities


@dataclass(slots=True, eq=False)
class Slot:
    """One lane of the KV cache. `items` is what it really holds, row by row."""

    id: int
    items: list[Item] = field(default_factory=list)
    cache_key: Hashable = None
    """What the rows depend on besides the items, such as adapters. Only prompts with the same key can reuse them."""
    position_lag: int = 0
    """How many positions fewer than rows the slot takes: rows of an image may share positions."""
    n_shared_cells: int = 0
    """Rows below this may be the same cells as those of another slot, since a copy: to renumber them here is to
    renumber them there. Never too low; sometimes too high, for a slot is not told when the other one is trimmed."""
    busy: bool = False
    """A running sequence has it."""
    parked_for: int | None = None
    """The uid of a waiting sequence that left it and wants to go on from it. Others take other slots while they can."""
    last_used: int = 0
    """Tick of the pool when it was last taken or released; 0 means never, or that it was emptied since."""

    @property
    def position(self) -> int:
        """Where the next row goes."""
        return len(self.items) - self.position_lag

    @property
    def length(self) -> int:
        """What `Context.length` tells: one more than the last position. Rows that share positions count as at their
        first one."""
        last = self.items[-1] if self.items else None
        if isinstance(last, MediaRow) and last.media.shares_positions:
            return self.position - last.media.n_positions + 1
        return self.position

    def hold(self, items: Sequence[Item]) -> None:
        """Note that these rows have been decoded."""
        self.items += items
        self.position_lag += len(items) - n_positions(items)

    def trim(self, start: int) -> Trim:
        """Forget all rows from `start` on, where no image that stays whole is cut."""
        if self.position_lag:
            self.position_lag = start - n_positions(self.items[:start])
        del self.items[start:]
        self.n_shared_cells = min(self.n_shared_cells, start)
        return Trim(self.id, self.position)


class SlotPool:
    """All slots of one context."""

    def __init__(self, capabilities: Capabilities) -> None:
        first = capabilities.first_embed_slot
        self.slots = tuple(Slot(slot_id) for slot_id in range(first))
        self.embed_slots = tuple(Slot(slot_id) for slot_id in range(first, first + capabilities.n_embed_slots))
        self._capabilities = capabilities
        self._reserved: dict[int, int] = {}
        self._tick = 0

    def __getitem__(self, slot_id: int) -> Slot:
        return (*self.slots, *self.embed_slots)[slot_id]

    @property
    def n_busy(self) -> int:
        """Slots in use, those for embeddings included."""
        return sum(slot.busy for slot in (*self.slots, *self.embed_slots))

    @property
    def reserved(self) -> Mapping[int, int]:
        """Rows that sequences in slots need at once, in one batch, by slot: texts to embed, and encoder tokens."""
        return self._reserved

    def acquire(
        self,
        items: Sequence[Item],
        *,
        reuse: bool,
        uid: int | None = None,
        cache_key: Hashable = None,
        n_encoder_tokens: int = 0,
        preferred: int | None = None,
    ) -> tuple[Slot, list[MemoryOp]] | None:
        """Take a free slot for `items` of the sequence `uid`. Returns the slot and edits of the KV cache.

        None while as many slots as may be are in use, or while the encoder has no room for `n_encoder_tokens` tokens.

        The edits make the KV cache hold `slot.items`, which is now a proper prefix of `items`: the last item is always
        left to decode, for without it there are no logits to sample from. Without `reuse` the slot starts empty, or
        with what is in the slot that is parked for `uid`. No slot is parked for `uid` afterwards.

        The longest prefix that any slot holds, in use or not, is kept. A free slot that holds it is taken itself,
        unless that forgets more than giving up the slot that was unused for longest. In that case the latter copies
        the prefix. A slot that is parked for another sequence is taken only when no other one is free. The slot
        `preferred` is taken if it is free and not parked, unless the sequence itself has left one.
        """
        free = sorted((slot for slot in self.slots if not slot.busy), key=_worth)
        if len(self.slots) - len(free) == self._capabilities.n_slots or not self._has_room(n_encoder_tokens):
            return None
        own = self._parked_for(uid)
        n_kept = {slot: self._n_reusable(slot, items, cache_key) if reuse or slot is own else 0 for slot in self.slots}
        slot = oldest = free[0]
        source = max(self.slots, key=lambda slot: (n_kept[slot], not slot.busy, -slot.last_used))
        wanted = self.slots[preferred] if preferred is not None and own is None else None
        if wanted is not None and not wanted.busy and wanted.parked_for is None:
            slot = wanted
            source = source if self._capabilities.can_trim else wanted
        elif n_kept[source] > 0 and not source.busy and (source is own or source.parked_for is None):
            n_lost, n_lost_oldest = (len(slot.items) - n_kept[slot] for slot in (source, oldest))
            if n_lost <= n_lost_oldest:
                slot = source
        ops: list[MemoryOp] = []
        if n_kept[slot] < n_kept[source]:
            ops += self._copy(source, slot, n_kept[source])
        elif n_kept[slot] < len(slot.items):
            ops.append(slot.trim(n_kept[slot]))
        if own is not None:
            own.parked_for = None
        slot.busy, slot.parked_for, slot.cache_key = True, None, cache_key
        if n_encoder_tokens:
            self._reserved[slot.id] = n_encoder_tokens
        self._touch(slot)
        return slot, ops

    def acquire_for_embedding(self, n_tokens: int, cache_key: Hashable = None) -> Slot | None:
        """Take a slot for the embedding of a text; None while no slot is free, or its rows have no room in a batch."""
        free = [slot for slot in self.embed_slots if not slot.busy]
        if not free or not self._has_room(n_tokens):
            return None
        self._reserved[free[0].id] = n_tokens
        free[0].busy, free[0].cache_key = True, cache_key
        return free[0]

    def release(self, slot: Slot, *, parked_for: int | None = None, forget: bool = False) -> list[MemoryOp]:
        """Give a slot back. What it holds stays, for the next prompt that starts the same way, and for the sequence
        `parked_for` first of all. With `forget`, it is removed. So are rows in slots for embeddings, and rows that
        depend on encoder tokens."""
        slot.busy, slot.parked_for = False, parked_for
        self._touch(slot)
        is_reserved = self._reserved.pop(slot.id, None) is not None
        return self._empty(slot) if forget or is_reserved else []

    def unpark(self, uid: int, *, forget: bool = False) -> list[MemoryOp]:
        """This sequence waits for no slot any more. With `forget`, what is in the slot parked for it is removed."""
        own = self._parked_for(uid)
        if own is None:
            return []
        own.parked_for = None
        return self._empty(own) if forget else []

    def extend(self, slot: Slot, items: Sequence[Item]) -> list[MemoryOp]:
        """Let a slot in use, which holds a prefix of `items`, hold the longest one that any other slot has now."""
        n_kept, source = max(
            ((self._n_reusable(other, items, slot.cache_key), other) for other in self.slots if other is not slot),
            key=lambda pair: pair[0],
            default=(0, slot),
        )
        return self._copy(source, slot, n_kept) if n_kept > len(slot.items) else []

    def make_room(self, n_rows: int) -> list[MemoryOp]:
        """Edits after which `n_rows` more rows fit. Slots in use are never touched. The slots that were unused for
        longest give up rows first, from their ends."""
        n_excess = (
            sum(len(slot.items) for slot in self.slots) + n_rows - self._capabilities.n_slots * self._capabilities.n_ctx
        )
        ops: list[MemoryOp] = []
        for slot in sorted(self.slots, key=_worth) if n_excess > 0 else ():
            if n_excess > 0 and slot.items and not slot.busy:
                n_held = len(slot.items)
                start = cut_before(slot.items, max(n_held - n_excess, 0)) if self._capabilities.can_trim else 0
                n_excess -= n_held - start
                ops.append(slot.trim(start))
        return ops

    def unshare(self, slot: Slot, start: int) -> list[MemoryOp] | None:
        """Edits after which no other slot shares rows of `slot` from `start` on: free slots give them up. None, and
        nothing changed, when a slot in use shares them."""
        sharing = [
            other
            for other in self.slots
            if other is not slot
            and other.cache_key == slot.cache_key
            and min(slot.n_shared_cells, other.n_shared_cells) > start
            and common_prefix(slot.items, other.items) > start
        ]
        if any(other.busy for other in sharing):
            return None
        return [other.trim(start) for other in sharing]

    def _empty(self, slot: Slot) -> list[MemoryOp]:
        """Forget what a free slot holds. It is the next one to be taken, so that others keep theirs."""
        slot.last_used = 0
        return [slot.trim(0)] if slot.items else []

    def _parked_for(self, uid: int | None) -> Slot | None:
        return next((slot for slot in self.slots if slot.parked_for == uid), None) if uid is not None else None

    def _n_reusable(self, slot: Slot, items: Sequence[Item], cache_key: Hashable) -> int:
        """How many of `items` the slot has to offer. Recurrent state cannot go back to an earlier position, nor be
        copied in part: it is used whole, in its own slot, or not at all."""
        if slot.cache_key != cache_key:
            return 0
        n_kept = cut_before(items, min(common_prefix(slot.items, items), len(items) - 1))
        if self._capabilities.can_trim:
            return n_kept
        return n_kept if not slot.busy and n_kept == len(slot.items) else 0

    def _copy(self, source: Slot, target: Slot, n_rows: int) -> list[MemoryOp]:
        ops: list[MemoryOp] = [target.trim(0)] if target.items else []
        target.hold(source.items[:n_rows])
        ops.append(Copy(source.id, target.id, target.position))
        target.n_shared_cells = n_rows
        source.n_shared_cells = max(source.n_shared_cells, n_rows)
        return ops

    def _has_room(self, n_rows: int) -> bool:
        return sum(self._reserved.values()) + n_rows <= self._capabilities.max_rows

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.last_used = self._tick


def _worth(slot: Slot) -> tuple[bool, int]:
    """Sorts the slots by what is given up first."""
    return slot.parked_for is not None, slot.last_used
