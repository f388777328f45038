"""Context shift: how a slot that is full makes room and goes on.

    before  [ kept | discarded |        newest ]  n_ctx
    after   [ kept |        newest ]              the next token goes here

The discarded items are the oldest after the kept ones. Half of all positions that are not kept are free afterwards, so
that shifts are rare: each shift moves all positions after the hole.
"""

from __future__ import annotations

from trio_runner.core.memory import MemoryOp, Slide, Trim


def n_discard(n_held: int, *, n_ctx: int, n_keep: int) -> int:
    """How many items to discard from a slot that holds `n_held` items, where `n_ctx` fit. At least 1 if it is full."""
    target_free = max((n_ctx - n_keep) // 2, 1)
    return max(target_free - (n_ctx - n_held), 0)


def shift_ops(slot: int, n_held: int, *, n_keep: int, discard: int) -> tuple[MemoryOp, MemoryOp]:
    """The edits that remove `discard` items of `slot` after the first `n_keep`, and close the hole."""
    return (
        Trim(slot, n_keep, n_keep + discard),
        Slide(slot, n_keep + discard, n_held, -discard),
    )
