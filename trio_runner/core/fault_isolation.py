"""Fault isolation: which sequence makes batches fail, found without harm to the others.

A batch that fails does not say which of its sequences is to blame. So each of them is a *suspect* and is run alone
once. If its batch succeeds, it is cleared. If its batch fails, it is the culprit and ends with an error.

Some batches fail although each of their sequences succeeds alone: they run out of memory together, or a device had a
bad moment. To try them together again and again could last for ever, for each failure may cost them all they have
decoded. So a sequence that was in MAX_FAILED such batches runs alone, until FORGIVEN_AFTER of its batches in a row have
succeeded. That number doubles each time, so that every sequence makes progress however long the failures last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trio_runner.core.batch import Batch
from trio_runner.core.sequence import Sequence

MAX_FAILED: Final = 2
"""Batches shared with others that may fail, with no culprit found, before a sequence is run alone."""
FORGIVEN_AFTER: Final = 64
"""Batches of a sequence that must succeed before its failures are forgotten: a few seconds of decoding."""


@dataclass(slots=True)
class _Record:
    """What is known of one sequence that was in a failed batch."""

    n_failed: int = 0
    """Failed batches that it shared with others, since they were last forgotten."""
    n_succeeded: int = 0
    """Its batches since the last failure."""
    n_to_forgive: int = FORGIVEN_AFTER


class FaultIsolation:
    """Decides who may be in a batch, from what became of the batches before."""

    def __init__(self, max_rows: int, running: Mapping[int, Sequence]) -> None:
        """`max_rows`: rows of a batch while nothing fails. `running`: the scheduler's own."""
        self.max_rows = max_rows
        """Rows that the next batch may have. Fewer only while the KV cache has no space for a whole batch."""
        self._most_rows = max_rows
        self._running = running
        self._suspects: list[int] = []
        self._records: dict[int, _Record] = {}

    @property
    def suspects(self) -> tuple[int, ...]:
        """The uids of sequences that are yet to be run alone."""
        return tuple(self._suspects)

    def choose(self, ready: list[Sequence]) -> list[Sequence]:
        """Those of `ready`, in its order, that may share the next batch.

        `ready` has the sequences that need rows; those that waited longest come first.
        """
        if self._suspects:
            for sequence in ready:
                if sequence.spec.uid in self._suspects:
                    return [sequence]
        if not self._records or not ready:
            return ready
        if self._runs_alone(ready[0]):
            return ready[:1]
        return [sequence for sequence in ready if not self._runs_alone(sequence)]

    def succeeded(self, batch: Batch) -> None:
        """This batch was decoded: its sequences are not to blame."""
        self.max_rows = self._most_rows
        if not self._suspects and not self._records:
            return
        for chunk in batch.chunks:
            if chunk.uid in self._suspects:
                self._suspects.remove(chunk.uid)
            record = self._records.get(chunk.uid)
            if record is not None:
                record.n_succeeded += 1
                if record.n_failed and record.n_succeeded >= record.n_to_forgive:
                    record.n_failed = 0
                    record.n_to_forgive *= 2

    def failed(self, batch: Batch) -> bool:
        """This batch failed. True: its one sequence is the culprit. False: those that still run are suspects."""
        if len(batch.chunks) == 1:
            self._records.clear()  # the culprit explains the failures before
            return True
        self._suspect(batch)
        for uid in self._suspects:
            record = self._records.setdefault(uid, _Record())
            record.n_failed += 1
            record.n_succeeded = 0
        return False

    def found_no_space(self, batch: Batch) -> bool:
        """The KV cache has no space for this batch. Its sequences are tried one by one, with half as many rows.

        Each is tried alone, because other batches may find space where these do not, and would only restore the number
        of rows. Returns False if not even one row found space.
        """
        self._suspect(batch)
        self.max_rows //= 2
        if self.max_rows:
            return True
        self.max_rows = self._most_rows
        return False

    def forget(self, uid: int) -> None:
        """This sequence has ended."""
        if uid in self._suspects:
            self._suspects.remove(uid)
        self._records.pop(uid, None)

    def _suspect(self, batch: Batch) -> None:
        """Suspect the sequences of this batch, except those that have ended since it was planned."""
        self._suspects = [chunk.uid for chunk in batch.chunks if chunk.uid in self._running]

    def _runs_alone(self, sequence: Sequence) -> bool:
        record = self._records.get(sequence.spec.uid)
        return record is not None and record.n_failed >= MAX_FAILED
