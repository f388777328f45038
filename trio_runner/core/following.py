"""Following: a sequence waits while another one decodes the start of the same prompt, and then copies it.

Copying a prefix costs no memory and no time, and decoding it twice costs both. So of prompts that arrive together and
begin alike, one sequence decodes what they share. The others *follow* it: they get no rows until its slot holds the
prefix that they wait for.

Rule 1: a sequence follows another one only if that runs, is not paused, has the same cache key, and will hold more of
the prompt than any slot holds now.
Rule 2: sequences never wait for each other in a circle. As a rule a sequence follows one that got its slot earlier. One
that was paused in its prompt may follow a later one that has overtaken it.
Rule 3: when the followed sequence stops, is paused, or has decoded enough, its followers take over what it has decoded,
and look for another sequence to follow. If it stops, they do so at once, before its slot gets other contents; otherwise
when the next batch is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Final

from trio_runner.core.batch import Batch
from trio_runner.core.memory import MemoryOp
from trio_runner.core.prompt import common_prefix, cut_before
from trio_runner.core.sequence import Sequence
from trio_runner.core.slots import SlotPool

MIN_FOLLOW: Final = 32
"""Tokens that another sequence must save a prompt to be worth waiting for, unless it has `share_prompt`."""


class Following:
    """Sets `follows` and `n_awaited` of sequences."""

    def __init__(
        self, running: Mapping[int, Sequence], pool: SlotPool, edits: list[MemoryOp], *, can_trim: bool, min_follow: int
    ) -> None:
        """`running` and `edits` are the scheduler's own; edits are appended. `min_follow`: see MIN_FOLLOW."""
        self._running = running
        self._pool = pool
        self._edits = edits
        self._can_trim = can_trim  # recurrent state cannot be copied in part
        self._min_follow = min_follow

    def find(self, sequence: Sequence) -> None:
        """Let it follow the running sequence that will soon hold most of the start of its prompt, if any is worth it.

        Only sequences that got their slots earlier are considered, so that the first ones are done first.
        """
        self._find(sequence, takewhile(lambda other: other is not sequence, self._running.values()))

    def resumed(self, sequence: Sequence) -> None:
        """It was paused and runs again. Others may have decoded more of its prompt by now, or will do so."""
        if sequence.prompt_done or sequence.in_embed_slot or sequence.follows is not None:
            return
        if not sequence.spec.reuses or not self._can_trim:
            return
        self._take_over(sequence)
        self._find(sequence, self._running.values())

    def _find(self, sequence: Sequence, others: Iterable[Sequence]) -> None:
        if not self._can_trim:
            return
        items = sequence.items
        min_follow = 1 if sequence.spec.share_prompt else self._min_follow
        n_best = len(sequence.slot.items) + min_follow - 1
        for other in others:
            if other.paused or other.spec.embedding or len(other.pending) == 1:
                continue
            if other.spec.cache_key != sequence.spec.cache_key or _waits_for(other, sequence):
                continue
            n_common = cut_before(items, min(common_prefix(other.items, items), len(items) - 1))
            if n_common > n_best:
                n_best = n_common
                sequence.follows, sequence.n_awaited = other, n_common

    def still_waits(self, sequence: Sequence) -> bool:
        """Whether it must wait on. If what it waited for is there, or will not come, it takes over what there is."""
        followed = sequence.follows
        if followed is None:
            return False
        runs = self._running.get(followed.spec.uid) is followed and not followed.paused
        if runs and len(followed.slot.items) < sequence.n_awaited:
            return True
        sequence.follows = None
        self._take_over(sequence)
        self.find(sequence)
        return sequence.follows is not None

    def _take_over(self, sequence: Sequence) -> None:
        """Let its slot hold the longest start of its prompt that any slot holds."""
        items, n_held = sequence.items, len(sequence.slot.items)
        self._edits += self._pool.extend(sequence.slot, items)
        sequence.pending = items[len(sequence.slot.items) :]
        if not sequence.prompt_done:
            sequence.n_cached += len(sequence.slot.items) - n_held

    def stopped(self, sequence: Sequence) -> None:
        """This sequence runs no more. Its followers take over what it decoded, before its slot gets other contents."""
        for other in self._running.values():
            if other.follows is sequence:
                self.still_waits(other)

    def followers(self, batch: Batch) -> tuple[int, ...]:
        """The uids of sequences that wait, directly or through others, for what this batch decodes."""
        following = {uid: sequence.follows for uid, sequence in self._running.items() if sequence.follows is not None}
        if not following:
            return ()
        decoded = {chunk.uid for chunk in batch.chunks}

        def waits(followed: Sequence | None) -> bool:
            return followed is not None and (followed.spec.uid in decoded or waits(followed.follows))

        return tuple(uid for uid, followed in following.items() if waits(followed))


def _waits_for(sequence: Sequence, other: Sequence) -> bool:
    """Whether it is the other one, or waits for it, directly or through others."""
    link: Sequence | None = sequence
    while link is not None and link is not other:
        link = link.follows
    return link is other
