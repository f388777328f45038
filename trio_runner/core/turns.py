"""Whose turn it is: sequences that waited longest go first, and kinds of batches take turns.

Rule 1: a batch that was run counts as a turn, whatever came of it. A batch that was planned and thrown away changes
nothing, so that a client whose requests keep throwing batches away takes no turn from anybody.
"""

from __future__ import annotations

from collections.abc import Mapping

from trio_runner.core.batch import Batch, BatchKind
from trio_runner.core.sequence import Sequence


class Turns:
    """Counts batches, and remembers which was the last of each kind."""

    def __init__(self) -> None:
        self.now = 0
        """Batches so far."""
        self._last_kind: BatchKind | None = None
        self._last_turn: dict[BatchKind, int] = {}  # of each kind that there are rows of

    def next_kind(self, by_kind: Mapping[BatchKind, list[Sequence]]) -> BatchKind:
        """The kind whose last batch was the longest ago.

        A kind that had no batch yet counts from the last turn of the sequence that waited longest for it. `by_kind` has
        the sequences that need rows. Kinds that are not in it are forgotten.
        """
        last = self._last_turn
        self._last_turn = {
            kind: last[kind] if kind in last else min(sequence.last_turn for sequence in sequences)
            for kind, sequences in by_kind.items()
        }
        return min(by_kind, key=lambda kind: (self._last_turn[kind], kind == self._last_kind))

    def count(self, batch: Batch, running: Mapping[int, Sequence]) -> None:
        """This batch was run, whatever came of it. Sets `last_turn` of its sequences."""
        self.now += 1
        self._last_kind = batch.kind
        self._last_turn[batch.kind] = self.now
        for chunk in batch.chunks:
            sequence = running.get(chunk.uid)
            if sequence is not None:
                sequence.last_turn = self.now
