"""How long a step may take: rows of prompts are dealt out by measured time, not by number.

All sequences that run wait for the whole batch. So the time of a batch is the pause between two tokens of a stream,
the time before a new request is looked at, and the part of a prompt that is lost with an abort. A batch takes as long
as its streams alone would take, and more for each row of a prompt. How much more depends on the machine, and grows with
the context. So the times of the last batches tell how many rows the next one may have.

Rule 1: beside streams a step takes a fixed multiple of a step without prompts, so that streams slow down by no more.
Rule 2: without streams a step takes a fixed time, so that a request that comes in the middle of it is seen soon.
Rule 3: after an abort steps are short, for what a client cancels again is lost.
Rule 4: prompts always get a few rows, and one slow step changes little: the machine may have been busy otherwise.

The first estimates may be far off. They come nearer with each batch, for only a part of its time depends on the rows.
BENCHMARKS.md has what came of the thresholds: the rows "gaps of 3 streams", "that prompt's first token" and "client
disconnects in a 1,900-token prefill", and "Why two targets are not met".
"""

from __future__ import annotations

STREAM_GAP = 2.5
"""Time of a step that also carries a prompt, in steps that do not. Some steps take longer than planned: beside three
streams, BENCHMARKS.md has a p99 of 2.86 undisturbed gaps, where 3 are allowed. The prompt takes 1.8 times as long there
as on an idle server, for the streams' own rows need the rest of the time."""
SHORTEST_GAP = 0.025
"""Seconds between two tokens that are always allowed. These are 40 tokens a second, more than anybody reads. In
BENCHMARKS.md a step of three streams takes 22 ms; the bound matters on faster machines."""
LONGEST_STEP = 0.25
"""Seconds of a step without streams. In BENCHMARKS.md a prompt of 1,900 tokens takes 6.3 s, which makes 75 rows. A row
costs hardly less in a larger batch, and a request that comes in the middle of a step waits for its end."""
LONE_STEPS = 8
"""Steps of one stream that a step without streams may take, if that is longer than LONGEST_STEP. A step of one stream
takes about as long as reading the weights from memory, so that a prompt spends about an eighth of its time on that."""
SHORT_STEP = 0.1
"""Seconds of a step that is likely to be aborted, or that cannot be aborted. Chosen, not measured: an editor that asks
again with every key that is pressed does so a few times a second."""
FIRST_ROWS = 64
"""Rows of a prompt before anything was measured. From 64 rows on, llama.cpp computes a batch the way it computes the
largest ones. With its own attention, at 1,500 tokens of context, a row took 5.5 ms there and 9.5 ms in smaller ones: a
measurement from before attention was our own. Only older revisions of BENCHMARKS.md have it."""
MIN_ROWS = 4
"""Rows of prompts that any batch may have, so that prompts get on. Chosen, not measured."""

_WEIGHT = 0.3  # of a new measurement
_SLOWER_WEIGHT = 0.1  # of one that says that decoding takes longer: other work of the machine only ever adds to it


class Pace:
    """Learns from `measured`, and tells `prompt_rows`. Knows no clock."""

    def __init__(self, max_rows: int, step_target: float | None = None) -> None:
        """`max_rows`: rows of a batch. `step_target`: seconds of a step that carries prompts beside streams; None:
        learned from what was measured."""
        self._max_rows = max_rows
        self._step_target = step_target
        self._row_seconds: dict[bool, float] = {}  # of a prompt, by whether streams are in the same batch
        self._decode_seconds: dict[int, float] = {}  # of a batch that only decodes, by its rows

    def measured(self, n_decoding: int, n_rows: int, seconds: float) -> None:
        """Learn that a batch of `n_rows` rows took `seconds`. `n_decoding` of the rows belong to streams, one each."""
        if seconds <= 0:
            return
        if n_decoding == n_rows:
            known = self._decode_seconds.get(n_rows, seconds)
            self._decode_seconds[n_rows] = _learn(known, seconds, _WEIGHT if seconds < known else _SLOWER_WEIGHT)
        else:
            beside = n_decoding > 0
            # The nearest step without prompts that was measured, and how many rows were added to it.
            nearest = self._nearest(n_decoding) if beside and self._decode_seconds else 0
            n_added = n_rows - nearest
            if n_added <= 0:
                return
            # The added rows took some time, even if all of it seems to have gone into the others.
            added = max(seconds - self._decode_seconds.get(nearest, 0.0), 0.25 * seconds * n_added / n_rows)
            # Far fewer rows than were allowed tell little: most of their time did not depend on the rows.
            weight = _WEIGHT * min(n_added / self.prompt_rows(n_decoding), 1.0)
            known = self._row_seconds.get(beside, added / n_added)
            self._row_seconds[beside] = _learn(known, added / n_added, weight)

    def prompt_rows(self, n_decoding: int, *, n_kinds: int = 1, short: bool = False) -> int:
        """Rows of prompts for the next batch, beside `n_decoding` streams. `n_kinds` kinds of batches have prompts.
        `short`: the batch is likely to be aborted, or cannot be aborted."""
        if n_decoding and n_kinds > 1:
            # Between two tokens of a stream comes a batch of each kind: those with prompts share the time.
            return max(self.prompt_rows(n_decoding, short=short) // n_kinds, 1)
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
        """Seconds of a step that decodes `n_decoding` streams and no prompt. If none was measured, the nearest one that
        was measured tells, with the rows between added or in proportion: the estimate that is nearer to it."""
        row_seconds = self._row_seconds_beside(n_decoding > 0) or 0.0
        if not self._decode_seconds or not n_decoding:
            return n_decoding * row_seconds
        nearest = self._nearest(n_decoding)
        seconds = self._decode_seconds[nearest]
        in_proportion, by_rows = seconds * n_decoding / nearest, seconds + (n_decoding - nearest) * row_seconds
        return min(in_proportion, by_rows) if n_decoding > nearest else max(in_proportion, by_rows)


def _learn(known: float, seconds: float, weight: float) -> float:
    """A weighted mean in which one measurement counts as at most twice what is known: a single step that the machine
    held up tells nothing, and the step after it corrects the rest."""
    known = min(known, 2 * seconds)
    return known + weight * (min(seconds, 2 * known) - known)
