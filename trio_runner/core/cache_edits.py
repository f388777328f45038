"""How what a sequence holds of the KV cache changes: rows come in, are shifted, are trimmed, or start over.

Rule 1 of scheduler.py is kept here: each change of `slot.items` that the KV cache does not make by itself adds an edit.
"""

from __future__ import annotations

from trio_runner.core.batch import Batch, Chunk, StepResult
from trio_runner.core.memory import MemoryOp, Trim
from trio_runner.core.prompt import Item, cut_after, cut_before
from trio_runner.core.sequence import Sequence
from trio_runner.core.shift import n_discard, shift_ops
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.info import Capabilities


class CacheEdits:
    """Moves items between `slot.items` and `pending` of a sequence, and collects the edits of the next step."""

    def __init__(self, pool: SlotPool, capabilities: Capabilities) -> None:
        self.edits: list[MemoryOp] = []
        """Edits for the next step, in their order. Always the same list."""
        self.n_prompt_rows = 0
        """Rows of prompts that were decoded so far."""
        self._pool = pool
        self._capabilities = capabilities

    def take(self) -> tuple[MemoryOp, ...]:
        """The edits so far. They count as done now."""
        edits = tuple(self.edits)
        self.edits.clear()
        return edits

    def hold(self, sequence: Sequence, items: tuple[Item, ...]) -> None:
        """Note that `items`, which were pending, are in the KV cache now."""
        if self._capabilities.has_memory:
            sequence.slot.hold(items)
        if not sequence.prompt_done:
            self.n_prompt_rows += len(items)
        del sequence.pending[: len(items)]

    def empty(self, slot: Slot) -> None:
        """Forget all that the slot holds."""
        self.edits.append(slot.trim(0))

    def start_over(self, sequence: Sequence) -> None:
        """Empty the slot, and decode again all that it should hold."""
        if not sequence.prompt_done:
            sequence.n_cached = 0
        sequence.pending[:0] = sequence.slot.items
        self.empty(sequence.slot)

    def shift(self, sequence: Sequence) -> None:
        """Make room in a full slot: discard the oldest items after the first `n_keep`."""
        slot = sequence.slot
        n_held, n_keep = len(slot.items), sequence.spec.n_keep
        discard = n_discard(n_held, n_ctx=self._capabilities.n_ctx, n_keep=n_keep)
        discard = cut_after(slot.items, n_keep + discard) - n_keep  # no half of an image
        can_slide = self._capabilities.can_shift and self._capabilities.can_trim
        trims = self._pool.unshare(slot, n_keep + discard) if can_slide else None
        del slot.items[n_keep : n_keep + discard]
        if trims is None:
            self.start_over(sequence)
        else:
            self.edits += [*trims, *shift_ops(slot.id, n_held, n_keep=n_keep, discard=discard)]
            slot.n_shared_cells = min(slot.n_shared_cells, n_keep)

    def trim_cut_text(self, sequence: Sequence) -> None:
        """Remove the tokens whose text a stop string cut off: the conversation will go on without them. The token that
        was sampled last was never decoded."""
        slot, n_cut = sequence.slot, sequence.text.n_cut() - 1
        if sequence.text.stop_matched is not None and n_cut > 0 and self._capabilities.can_trim:
            # After a context shift the slot may hold fewer tokens than were sampled.
            self.edits.append(slot.trim(cut_before(slot.items, max(len(slot.items) - n_cut, 0))))

    def keep_finished_rows(self, sequence: Sequence, chunk: Chunk, batch: Batch, result: StepResult) -> None:
        """Keep the rows of a chunk that an aborted or failed batch left in the KV cache, for they cost time. The last
        row that the sequence needs is decoded again: nothing was sampled from it, and its logits are lost."""
        if not self._capabilities.has_memory:
            return
        needs_all_rows = batch.kind.embedding and not self._capabilities.embeds_last_row
        n_kept = _n_kept(sequence.slot, chunk, result.kept.get(chunk.uid, 0))
        if needs_all_rows or n_kept is None:
            self.start_over(sequence)
            return
        # Rows of a prompt that is scored are of no use without their logits.
        n_useful = 0 if batch.kind.scored else cut_before(chunk.items, n_kept - (n_kept == len(sequence.pending)))
        if n_useful < n_kept:
            self.edits.append(Trim(chunk.slot, chunk.position + n_useful))
        self.hold(sequence, chunk.items[:n_useful])


def _n_kept(slot: Slot, chunk: Chunk, length: int) -> int | None:
    """How many rows of a chunk the KV cache has, if it has `length` positions of `slot` now. None: not even the rows
    that the slot held before."""
    if length == slot.length:
        return 0
    if chunk.media is not None and chunk.media.shares_positions:
        return len(chunk.items) if length > chunk.position else None
    n_kept = length - chunk.position
    return n_kept if 0 <= n_kept <= len(chunk.items) else None
