"""The KV cache of the toy, which notices whatever llama.cpp would abort on or silently compute rubbish from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_runner.core.batch import MAX_SCORED_ROWS, Batch, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.core.ports import (
    NO_ADAPTERS,
    NO_MEDIA,
    Adapter,
    EncodedMedia,
    Sampler,
)
from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.errors import InvalidGrammar
from trio_runner.events import SampledToken, TokenInfo
from trio_runner.info import Capabilities
from trio_runner.testing.model import ToyAdapter, ToySampler
from trio_runner.testing.text import END, N_EMBD, ToyAdapters, toy_cache_key, toy_next, toy_score, toy_vector

if TYPE_CHECKING:
    pass


def _path(adapter: Adapter) -> str:
    assert isinstance(adapter, ToyAdapter)
    assert not adapter.closed
    return adapter.path


@dataclass(slots=True, eq=False)
class _Cell:
    """One entry of the KV cache. Slots that share it share its position, as in llama.cpp."""

    position: int
    item: Item
    cache_key: str


def _positions(items: Sequence[Item], start: int) -> list[int]:
    """The positions of consecutive `items`, of which the first is at `start`."""
    positions = []
    for item in items:
        positions.append(start)
        if not isinstance(item, MediaRow) or not item.media.shares_positions:
            start += 1
        elif item.row == item.media.n_rows - 1:
            start += item.media.n_positions
    return positions


@dataclass(frozen=True, slots=True)
class Interruption:
    """What a hook of `ToyContext` makes of a batch: its outcome, after the first `n_rows` rows were decoded."""

    outcome: DecodeOutcome
    n_rows: int = 0
    message: str = ""


_KEEPS_ROWS = frozenset({DecodeOutcome.ABORTED, DecodeOutcome.FATAL})


class ToyContext:
    """A KV cache of lists.

    `on_decode` is called before each batch. It may wait, raise, or return an Interruption. If it returns None, a batch
    whose number is `aborted_number` by then is aborted before its first row.
    """

    def __init__(
        self, capabilities: Capabilities, *, on_decode: Callable[[Batch], Interruption | None] | None = None
    ) -> None:
        self.capabilities = capabilities
        self.on_decode = on_decode
        self.aborted_number: int | None = None
        self.batches: list[Batch] = []
        self.closed = False
        self._cells: list[list[_Cell]] = [[] for _ in range(capabilities.first_embed_slot + capabilities.n_embed_slots)]

    def held(self, slot: int) -> list[Item]:
        """The tokens and rows that `slot` holds. Raises AssertionError unless they are at the positions where they must
        be, without holes, and were all made with the same adapters."""
        cells = self._cells[slot]
        items = [cell.item for cell in cells]
        assert [cell.position for cell in cells] == _positions(items, 0), "positions have a hole or a double"
        assert len({cell.cache_key for cell in cells}) <= 1, "the rows of one slot were made with different adapters"
        return items

    def shared_rows(self, slot: int, other: int) -> list[int]:
        """The rows of `slot` that are the same cells as rows of the slot `other`."""
        cells = {id(cell) for cell in self._cells[other]}
        return [row for row, cell in enumerate(self._cells[slot]) if id(cell) in cells]

    def length(self, slot: int) -> int:
        return self._cells[slot][-1].position + 1 if self._cells[slot] else 0

    def apply(self, op: MemoryOp) -> bool:
        assert not self.closed
        match op:
            case Trim(slot, start, end):
                stop = self.length(slot) if end is None else end
                kept = [cell for cell in self._cells[slot] if not start <= cell.position < stop]
                if kept and len(kept) < len(self._cells[slot]) and not self.capabilities.can_trim:
                    return False
                self._cells[slot] = kept
            case Copy(source, target, end):
                assert not self._cells[target], "the target of a copy must be empty"
                assert end <= len(self._cells[source]), "a copy of more than the source holds"
                assert max(source, target) < self.capabilities.first_embed_slot, (
                    "nothing is shared with a slot for embeddings"
                )
                self._cells[target] = [cell for cell in self._cells[source] if cell.position < end]
            case Slide(slot, start, end, delta):
                assert self.capabilities.can_shift, "this context cannot shift"
                for cell in self._cells[slot]:
                    if start <= cell.position < end:
                        cell.position += delta
        return True

    def decode(
        self,
        batch: Batch,
        samplers: Mapping[int, Sampler],
        *,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        adapters: Mapping[int, Adapter] = NO_ADAPTERS,
    ) -> StepResult:
        assert not self.closed
        assert 0 < batch.n_rows <= self.capabilities.max_rows
        assert len({chunk.uid for chunk in batch.chunks}) == len(batch.chunks)
        for media_of_chunk in (chunk.media for chunk in batch.chunks):
            assert batch.kind.of_media == (media_of_chunk is not None), "rows of another kind than the batch"
            assert media_of_chunk is None or batch.kind.causal == media_of_chunk.causal
        for chunk in batch.chunks:
            self._check_slot(chunk, batch.kind.embedding)
            self._check_rows(chunk, media)
        assert sum(len(chunk.encoder_tokens) for chunk in batch.chunks) <= self.capabilities.max_rows, (
            "too much for the encoder to read at once"
        )
        self.batches.append(batch)
        interruption = self.on_decode(batch) if self.on_decode else None
        if interruption is None and batch.number == self.aborted_number:
            interruption = Interruption(DecodeOutcome.ABORTED)
        named = [(_path(adapters[uid]), scale) for uid, scale in batch.kind.adapters]
        if interruption is not None:
            return self._interrupt(batch, interruption, named)
        sampled: dict[int, Sampled] = {}
        embeddings: dict[int, object] = {}
        for chunk in batch.chunks:
            cache_key = toy_cache_key(named, chunk.encoder_tokens)
            items = self._hold(chunk, len(chunk.items), cache_key)
            if chunk.output and batch.kind.embedding:
                embeddings[chunk.uid] = toy_vector(items, cache_key)
            elif chunk.output:
                sampled[chunk.uid] = self._sample(items, cache_key, samplers[chunk.uid])
        seconds = 0.001 * batch.n_rows
        return StepResult(DecodeOutcome.OK, sampled, embeddings, {}, seconds, scores=self._scores(batch, named))

    def abort(self, number: int) -> None:
        self.aborted_number = number

    def close(self) -> None:
        self.closed = True

    def _check_slot(self, chunk: Chunk, embeddings: bool) -> None:
        if chunk.slot >= self.capabilities.first_embed_slot:
            assert embeddings == chunk.output, "the last row of a text, and no other, gives its embedding"
        if embeddings:
            assert chunk.output, "a batch of embeddings has the last row of each of its texts"
            assert self.capabilities.embeds_last_row or chunk.start == 0, "all rows of a text make its embedding"

    def _check_rows(self, chunk: Chunk, media: Mapping[Media, EncodedMedia]) -> None:
        assert bool(chunk.encoder_tokens) == (self.capabilities.decoder_start is not None), (
            "a model has encoder tokens if and only if it has an encoder"
        )
        if chunk.media is None:
            assert all(isinstance(item, int) for item in chunk.items), "tokens and rows of images in one chunk"
            return
        rows = [item for item in chunk.items if isinstance(item, MediaRow) and item.media == chunk.media]
        numbers = [item.row for item in rows]
        assert numbers == list(range(numbers[0], numbers[0] + len(chunk.items))), "rows of two images in one chunk"
        assert media[chunk.media].rows.shape == (chunk.media.n_rows, N_EMBD)
        if chunk.media.whole:
            assert len(rows) == chunk.media.n_rows, "part of an image that must stay whole"

    def _interrupt(self, batch: Batch, interruption: Interruption, named: ToyAdapters) -> StepResult:
        n_rows = interruption.n_rows
        for chunk in batch.chunks:
            n_done = max(min(n_rows, len(chunk.items)), 0)
            if chunk.media is not None and chunk.media.whole and n_done < len(chunk.items):
                n_done = 0
            self._hold(chunk, n_done, toy_cache_key(named, chunk.encoder_tokens))
            n_rows -= len(chunk.items)
            if interruption.outcome in _KEEPS_ROWS and not self.capabilities.can_trim:
                self._cells[chunk.slot] = []  # recurrent state that was caught half-way is lost
        kept = {chunk.uid: self.length(chunk.slot) for chunk in batch.chunks}
        return StepResult(interruption.outcome, {}, {}, kept, message=interruption.message)

    def _hold(self, chunk: Chunk, n_rows: int, cache_key: str) -> list[Item]:
        if not self.capabilities.has_memory:
            return list(chunk.items[:n_rows])
        assert chunk.start == len(self._cells[chunk.slot]), "rows must follow what the slot holds"
        assert chunk.stop <= self.capabilities.n_ctx, "the slot is full"
        items = chunk.items[:n_rows]
        positions = _positions(items, chunk.position)
        self._cells[chunk.slot] += [
            _Cell(position, item, cache_key) for position, item in zip(positions, items, strict=True)
        ]
        first = self.capabilities.first_embed_slot
        n_embedding = sum(map(len, self._cells[first:]))
        assert n_embedding <= self.capabilities.max_rows, "the slots for embeddings are full"
        n_cells = len({id(cell) for cells in self._cells[:first] for cell in cells})
        assert n_cells <= self.capabilities.n_slots * self.capabilities.n_ctx, "the KV cache is full"
        return self.held(chunk.slot)

    def _scores(self, batch: Batch, named: ToyAdapters) -> dict[int, dict[int, SampledToken]] | None:
        """The scores of a batch that was decoded."""
        if batch.scoring is None:
            return None
        assert batch.n_rows <= MAX_SCORED_ROWS or any(chunk.whole for chunk in batch.chunks)
        scores: dict[int, dict[int, SampledToken]] = {}
        for chunk in batch.chunks:
            held, cache_key = self.held(chunk.slot), toy_cache_key(named, chunk.encoder_tokens)
            scoring = batch.scoring[chunk.uid]
            scores[chunk.uid] = {
                chunk.start + row + 1: toy_score(held[: chunk.start + row + 1], token, scoring.n_top, cache_key)
                for row, token in scoring.rows(chunk)
            }
        return scores

    @staticmethod
    def _sample(items: Sequence[Item], cache_key: str, sampler: Sampler) -> Sampled:
        assert isinstance(sampler, ToySampler)
        assert not sampler.closed
        token = toy_next(items, cache_key, ignore_eos=sampler.params.ignore_eos)
        logprob = 0.0 if sampler.params.post_sampling_probs else -1.0
        if token == END:
            return Sampled(token, is_end=True, logprob=logprob)
        piece = bytes([token])
        if sampler.params.grammar and token not in sampler.params.grammar.encode():
            return Sampled(error=InvalidGrammar("the grammar allows no token here"))
        n_top = min(sampler.params.logprobs, 1 if sampler.params.post_sampling_probs else sampler.params.logprobs)
        top = tuple(TokenInfo(token, piece, logprob) for _ in range(n_top))
        return Sampled(token, piece, logprob=logprob, top=top)
