"""How long a step may take: rows of prompts are dealt out by time, as measured, rather than by number.

Everything that is running waits for the whole batch, so its length is how long a stream pauses between two tokens, how
long a new request waits before it is looked at, and how much of a prompt is lost when it is broken off. The time that a
batch takes grows with its rows, steadily but by an amount that only the machine knows, and that grows with the context:
so what the last batches took says how many rows the next one may have. From far off this comes nearer with each batch,
for a batch of fewer rows spends more of its time on what does not depend on them, and looks slower than it is.
"""

from __future__ import annotations

STREAM_GAP = 2.2
"""How long a step that also carries a prompt may take, in steps that do not. Shorter gaps would cost the prompt more
than they please the reader of a stream: even so, a good third of such a step is spent on the streams' rows."""
SHORTEST_GAP = 0.025
"""Seconds between two tokens that are smooth enough for anybody, where a step that only decodes is much shorter yet."""
LONGEST_STEP = 0.5
"""Seconds of a step in which nobody decodes. A fuller batch prefills hardly faster, and a request that comes in the
middle of it waits for its end."""
SHORT_STEP = 0.1
"""Seconds of a step that nobody can break off, since the one before it was."""
FIRST_ROWS = 64
"""Rows to measure with before anything was measured."""
MIN_ROWS = 4
"""Rows of prompts in any batch, so that they get on at all."""

_WEIGHT = 0.3  # of a new measurement
_DECODE_WEIGHT = 0.1


class Pace:
    """Learns from `measured`, tells `prompt_rows`. Knows no clock."""

    def __init__(self, max_rows: int, step_target: float | None = None) -> None:
        """`step_target`: seconds of a step that carries prompts beside sequences that decode, instead of what is
        learned."""
        self._max_rows = max_rows
        self._step_target = step_target
        self._row_seconds: dict[bool, float] = {}  # by whether sequences decode in the same batch
        self._decode_seconds: dict[int, float] = {}  # of a batch that only decodes, by its rows

    def measured(self, n_decoding: int, n_rows: int, seconds: float) -> None:
        """A batch of `n_rows`, `n_decoding` of them one row each of sequences that decode, took so long."""
        if seconds <= 0:
            return
        if n_decoding == n_rows:
            known = self._decode_seconds.get(n_rows, seconds)
            self._decode_seconds[n_rows] = _learn(known, seconds, _DECODE_WEIGHT)
        else:
            # Far fewer rows than there might have been tell little: they spend their time on something else.
            weight = _WEIGHT * min((n_rows - n_decoding) / self.prompt_rows(n_decoding), 1.0)
            beside, row_seconds = n_decoding > 0, seconds / n_rows
            self._row_seconds[beside] = _learn(self._row_seconds.get(beside, row_seconds), row_seconds, weight)

    def prompt_rows(self, n_decoding: int, *, short: bool = False) -> int:
        """Rows of prompts for the next batch, in which `n_decoding` sequences decode; `short`: it cannot be broken
        off."""
        beside = n_decoding > 0
        row_seconds = self._row_seconds.get(beside, self._row_seconds.get(not beside))
        if row_seconds is None:
            return min(FIRST_ROWS, self._max_rows)
        if beside:
            seconds = self._step_target or max(SHORTEST_GAP, STREAM_GAP * self._decode_step(n_decoding, row_seconds))
        else:
            seconds = SHORT_STEP if short else LONGEST_STEP
        n_rows = int(seconds / row_seconds) - n_decoding
        return min(max(n_rows, MIN_ROWS), self._max_rows)

    def _decode_step(self, n_decoding: int, row_seconds: float) -> float:
        """Seconds of a step that only decodes so many rows. If none was measured: of the nearest one and the rows
        between, or in proportion, whichever comes nearer to it."""
        if not self._decode_seconds:
            return n_decoding * row_seconds
        nearest = min(self._decode_seconds, key=lambda n_rows: abs(n_rows - n_decoding))
        seconds = self._decode_seconds[nearest]
        in_proportion, by_rows = seconds * n_decoding / nearest, seconds + (n_decoding - nearest) * row_seconds
        return min(in_proportion, by_rows) if n_decoding > nearest else max(in_proportion, by_rows)


def _learn(known: float, seconds: float, weight: float) -> float:
    """One step that was held up by something else is no news, and the one after it says so."""
    known = min(known, 2 * seconds)
    return known + weight * (min(seconds, 2 * known) - known)
