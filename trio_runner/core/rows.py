"""Which rows a sequence needs next, and in what kind of batch."""

from __future__ import annotations

from itertools import takewhile

from trio_runner.core.batch import BatchKind, Chunk
from trio_runner.core.prompt import MediaRow
from trio_runner.core.sequence import Sequence
from trio_runner.info import Capabilities


def next_kind(sequence: Sequence, capabilities: Capabilities) -> BatchKind:
    """The kind of batch that takes the next rows of this sequence."""
    first = sequence.pending[0]
    if isinstance(first, MediaRow):
        return sequence.kind.for_media(first.media)
    if sequence.spec.embedding and _embeds_next(sequence, capabilities):
        return sequence.kind._replace(embedding=True)
    return sequence.kind


def next_chunk(sequence: Sequence, capabilities: Capabilities) -> Chunk:
    """The next rows that could go into one batch, if it had room for all: tokens up to the next image, or one image.

    If only the last row gives the embedding, the rows before it form chunks of their own.
    """
    spec, slot, pending = sequence.spec, sequence.slot, sequence.pending
    start, offset = len(slot.items), -slot.position_lag
    if sequence.decoding:
        return Chunk(spec.uid, slot.id, start, tuple(pending), True, offset, spec.encoder_tokens, True)
    embeds = spec.embedding and _embeds_next(sequence, capabilities)
    n_pending = len(pending) - (spec.embedding and not embeds)
    first = pending[0]
    if isinstance(first, MediaRow):
        rows = tuple(pending[: min(n_pending, first.media.n_rows - first.row)])
    else:
        several = pending[: min(n_pending, capabilities.max_rows)]
        rows = tuple(takewhile(lambda item: not isinstance(item, MediaRow), several))
    return Chunk(
        spec.uid,
        slot.id,
        start,
        rows,
        output=embeds or (spec.samples and len(rows) == n_pending),
        offset=offset,
        encoder_tokens=spec.encoder_tokens,
        whole=embeds or (isinstance(first, MediaRow) and first.media.whole),
    )


def _embeds_next(sequence: Sequence, capabilities: Capabilities) -> bool:
    """Whether the next rows of this sequence, which is to be embedded, give its embedding."""
    return not capabilities.embeds_last_row or len(sequence.pending) == 1
