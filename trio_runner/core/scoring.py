"""Scoring a prompt: how probable the model found each of its tokens.

Rule 1: a prompt that is scored is decoded from its first row on, by its own sequence, since what a slot holds has no
logits any more. For the same reason nothing is kept of a batch that was aborted.
Rule 2: its rows are a kind of batch of their own, of few rows, because the logits of each row take much memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trio_runner.core.batch import Chunk, Scoring
from trio_runner.core.sequence import Sequence
from trio_runner.events import SampledToken


def scoring_of(chunks: Iterable[Chunk], running: Mapping[int, Sequence]) -> dict[int, Scoring]:
    """What to report of each chunk of a batch that is scored, by uid."""
    scoring = {}
    for chunk in chunks:
        sequence, n_rows = running[chunk.uid], len(chunk.items)
        next_item = sequence.pending[n_rows] if n_rows < len(sequence.pending) else None
        scoring[chunk.uid] = Scoring(sequence.spec.prompt_logprobs, next_item)
    return scoring


def keep_scores(scores: Mapping[int, Mapping[int, SampledToken]], running: Mapping[int, Sequence]) -> None:
    """Note what a batch has told, by uid and by place in the prompt."""
    for uid, found in scores.items():
        if uid in running:
            running[uid].scores.update(found)
