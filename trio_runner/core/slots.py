"""Slots: the lanes of the KV cache, and which of them a prompt takes so that least is decoded again.

A slot remembers what its last sequence left in the KV cache. A prompt that starts the same way goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trio_runner.config import CachePolicy
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, MemoryOp, Trim
from trio_runner.core.prompt import common_prefix


@dataclass(slots=True, eq=False)
class Slot:
    """One lane. `tokens` is what its part of the KV cache really holds, by position."""

    id: int
    tokens: list[int] = field(default_factory=list)
    n_shared: int = 0
    """Positions below this may be the same cells as another slot's, since a copy: renumbering them here would
    renumber them there. Never too low, sometimes too high, as it is not told when the other slot lets go."""
    busy: bool = False
    last_used: int = 0
    """Tick of the pool when it was last taken or released; 0 never."""

    def trim(self, start: int) -> Trim:
        """Forget all positions from `start` on."""
        del self.tokens[start:]
        self.n_shared = min(self.n_shared, start)
        return Trim(self.id, start)


class SlotPool:
    """All slots of one context. Policies as in `EngineConfig.cache_policy`."""

    def __init__(self, limits: Limits, policy: CachePolicy = "longest") -> None:
        self.slots = tuple(Slot(slot_id) for slot_id in range(limits.n_slots))
        self._limits = limits
        self._policy = policy
        self._tick = 0

    @property
    def n_busy(self) -> int:
        return sum(slot.busy for slot in self.slots)

    def acquire(self, prompt: Sequence[int], *, cache_prompt: bool) -> tuple[Slot, list[MemoryOp]] | None:
        """Take a free slot for `prompt`; None when there is none.

        Carrying out the returned edits makes the KV cache hold `slot.tokens`, which is now a proper prefix of
        `prompt`: the last item is always left to decode, for without it there are no logits to sample from.
        Mutates the slot taken, and of the one it is copied from `n_shared`.
        """
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        source, n_shared = self._longest(self.slots if self._forks else free, prompt) if cache_prompt else (None, 0)
        if source is None:
            slot = min(free, key=lambda slot: slot.last_used)
        elif self._policy == "longest" or (not source.busy and n_shared == len(source.tokens)):
            slot = source
        else:
            slot = min(free, key=lambda slot: slot.last_used)
        n_kept = self._n_reusable(source, min(n_shared, len(prompt) - 1)) if source is not None else 0

        ops: list[MemoryOp] = []
        n_own = n_kept if slot is source else 0
        if n_own < len(slot.tokens):
            ops.append(slot.trim(n_own))
        if source is not None and n_own < n_kept:
            ops.append(Copy(source.id, slot.id, n_kept))
            slot.tokens = source.tokens[:n_kept]
            slot.n_shared = n_kept
            source.n_shared = max(source.n_shared, n_kept)
        slot.busy = True
        self._touch(slot)
        return slot, ops

    def release(self, slot: Slot) -> None:
        """Give a slot back. What it holds stays, for the next prompt that starts the same way."""
        slot.busy = False
        self._touch(slot)

    @property
    def _forks(self) -> bool:
        return self._policy == "best" and self._limits.can_trim

    def _longest(self, slots: Sequence[Slot], prompt: Sequence[int]) -> tuple[Slot, int]:
        """The slot that shares the longest prefix; of equals the first, and a slot that need not be forked before
        one that must."""
        shared = [(common_prefix(slot.tokens, prompt), not slot.busy, -slot.id, slot) for slot in slots]
        n_shared, _, _, slot = max(shared)
        return slot, n_shared

    def _n_reusable(self, source: Slot, n_kept: int) -> int:
        """Recurrent state cannot go back to an earlier position: it can be used whole or not at all."""
        return n_kept if self._limits.can_trim or n_kept == len(source.tokens) else 0

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.last_used = self._tick
