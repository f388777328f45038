"""How long a step may take: rows of prompts are dealt out by time, as measured, rather than by number.

Everything that is running waits for the whole batch, so its length is how long a stream pauses between two tokens, how
long a new request waits before it is looked at, and how much of a prompt is lost when it is broken off. A batch takes
what its sequences that decode would take without a prompt, and more for each row of one, by an amount that only the
machine knows and that grows with the context. So what the last batches took says how many rows the next one may have.
From far off this comes nearer with each batch, for not all of that time depends on the rows.
"""

from __future__ import annotations

STREAM_GAP = 2.5
"""How long a step that also carries a prompt may take, in steps that do not. Of a step of three times their length the
streams' own rows take a third, and so the prompt half as long again; but some steps take longer than was meant."""
SHORTEST_GAP = 0.025
"""Seconds between two tokens that are smooth enough for anybody, where a step that only decodes is much shorter yet."""
LONGEST_STEP = 0.25
"""Seconds of a step in which nobody decodes. A fuller batch prefills hardly faster, and a request that comes in the
middle of it waits for its end."""
LONE_STEPS = 8
"""The same in steps of one stream, if that is longer: a model that takes long to read from memory needs more rows to be
worth it."""
SHORT_STEP = 0.1
"""Seconds of a step that is likely to be broken off, or cannot be."""
FIRST_ROWS = 64
"""Rows to measure with before anything was measured."""
MIN_ROWS = 4
"""Rows of prompts in any batch, so that they get on at all."""

_WEIGHT = 0.3  # of a new measurement
_SLOWER_WEIGHT = 0.1  # of one that says that decoding takes longer: what else the machine does only ever adds to it


class Pace:
    """Learns from `measured`, tells `prompt_rows`. Knows no clock."""

    def __init__(self, max_rows: int, step_target: float | None = None) -> None:
        """`step_target`: seconds of a step that carries prompts beside sequences that decode, instead of what is
        learned."""
        self._max_rows = max_rows
        self._step_target = step_target
        self._row_seconds: dict[bool, float] = {}  # of a prompt, by whether sequences decode in the same batch
        self._decode_seconds: dict[int, float] = {}  # of a batch that only decodes, by its rows

    def measured(self, n_decoding: int, n_rows: int, seconds: float) -> None:
        """A batch of `n_rows`, `n_decoding` of them one row each of sequences that decode, took so long."""
        if seconds <= 0:
            return
        if n_decoding == n_rows:
            known = self._decode_seconds.get(n_rows, seconds)
            self._decode_seconds[n_rows] = _learn(known, seconds, _WEIGHT if seconds < known else _SLOWER_WEIGHT)
        else:
            beside = n_decoding > 0
            # What is known of a step without them, and how many rows were added to that one.
            nearest = self._nearest(n_decoding) if beside and self._decode_seconds else 0
            n_added = n_rows - nearest
            if n_added <= 0:
                return
            # They have added something, even if all of the time seems to have gone into the others.
            added = max(seconds - self._decode_seconds.get(nearest, 0.0), 0.25 * seconds * n_added / n_rows)
            # Far fewer rows than there might have been tell little: they spend their time on something else.
            weight = _WEIGHT * min(n_added / self.prompt_rows(n_decoding), 1.0)
            known = self._row_seconds.get(beside, added / n_added)
            self._row_seconds[beside] = _learn(known, added / n_added, weight)

    def prompt_rows(self, n_decoding: int, *, short: bool = False) -> int:
        """Rows of prompts for the next batch, in which `n_decoding` sequences decode; `short`: it will hardly be
        finished, or cannot be broken off."""
        row_seconds = self._row_seconds_beside(n_decoding > 0)
        if row_seconds is None:
            return min(FIRST_ROWS, self._max_rows)
        decode_step = self._decode_step(n_decoding)
        if n_decoding:
            seconds = self._step_target or max(SHORTEST_GAP, STREAM_GAP * decode_step)
        elif short:
            seconds = SHORT_STEP
        else:
            seconds = max(LONGEST_STEP, LONE_STEPS * self._decode_step(1) if self._decode_seconds else 0.0)
        n_rows = round((seconds - decode_step) / row_seconds)
        return min(max(n_rows, MIN_ROWS), self._max_rows)

    def _nearest(self, n_decoding: int) -> int:
        return min(self._decode_seconds, key=lambda n_rows: abs(n_rows - n_decoding))

    def _row_seconds_beside(self, beside: bool) -> float | None:
        return self._row_seconds.get(beside, self._row_seconds.get(not beside))

    def _decode_step(self, n_decoding: int) -> float:
        """Seconds of a step that only decodes so many rows. If none was measured: of the nearest one and the rows
        between, or in proportion, whichever comes nearer to it."""
        row_seconds = self._row_seconds_beside(n_decoding > 0) or 0.0
        if not self._decode_seconds or not n_decoding:
            return n_decoding * row_seconds
        nearest = self._nearest(n_decoding)
        seconds = self._decode_seconds[nearest]
        in_proportion, by_rows = seconds * n_decoding / nearest, seconds + (n_decoding - nearest) * row_seconds
        return min(in_proportion, by_rows) if n_decoding > nearest else max(in_proportion, by_rows)


def _learn(known: float, seconds: float, weight: float) -> float:
    """One step that was held up by something else is no news, and the one after it says so."""
    known = min(known, 2 * seconds)
    return known + weight * (min(seconds, 2 * known) - known)
