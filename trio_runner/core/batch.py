"""What one step decodes, and what came of it: the values that pass between the scheduler and a context."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.events import SampledToken, TokenInfo

AdapterSet: TypeAlias = tuple[tuple[int, float], ...]
"""(uid of an adapter, scale), in the order of the uids, without scale 0: what is added to the model's weights."""


class BatchKind(NamedTuple):
    """What a batch computes and how. Rows of different kinds cannot share a batch."""

    # A tuple: the scheduler compares and hashes one for each running sequence in every step.

    adapters: AdapterSet = ()
    """Added to the model's weights for all rows."""
    of_media: bool = False
    """The rows are rows of images, which llama.cpp does not take together with tokens."""
    causal: bool = True
    """False: each row of an image attends to the whole image."""
    embedding: bool = False
    """The batch computes embeddings and samples no tokens."""
    scored: bool = False
    """The rows also tell how probable the items after them were; see `Scoring`."""

    def for_media(self, media: Media) -> BatchKind:
        """The kind of batch that takes rows of this image, with the same adapters."""
        return self._replace(of_media=True, causal=media.causal)


PLAIN_TOKENS: Final = BatchKind()
"""The kind of a batch of tokens that are sampled from, without adapters."""


class Chunk(NamedTuple):
    """Consecutive rows of one sequence: all of them tokens, or all of them rows of one image.

    The `items` follow the `start` rows that `slot` holds. They go to the positions `position`, `position` + 1, ... or,
    if they are rows of an image, to the positions that the image prescribes.

    Before `plan_batch`, a chunk asks for rows: it has all items that could go into one batch. After it, a chunk has the
    items that it was given.
    """

    # A tuple: every token of every stream takes one, and a frozen dataclass takes five times as long to make.

    uid: int
    slot: int
    start: int
    items: tuple[Item, ...]
    output: bool
    """The last row is sampled or, in a batch that computes embeddings, gives the embedding of the sequence."""
    offset: int = 0
    """From `start` to `position`; below 0 where earlier rows share positions."""
    encoder_tokens: tuple[int, ...] = ()
    """The tokens that the encoder has read, if the model has an encoder."""
    decoding: bool = False
    """The prompt is done, and the one item is the token that was sampled last."""
    whole: bool = False
    """All items go into one batch, or none."""

    @property
    def position(self) -> int:
        """Position of the first row."""
        return self.start + self.offset

    @property
    def stop(self) -> int:
        """How many rows the slot holds afterwards."""
        return self.start + len(self.items)

    @property
    def media(self) -> Media | None:
        """The image that the rows belong to; None for tokens."""
        first = self.items[0] if self.items else None
        return first.media if isinstance(first, MediaRow) else None

    def first(self, n_rows: int) -> Chunk:
        """The first `n_rows` rows. Without the last row there is no output."""
        if n_rows == len(self.items):
            return self
        return self._replace(items=self.items[:n_rows], output=False)


ScoredRow: TypeAlias = tuple[int, int]
"""(row of a chunk, counted from 0; the token of the prompt that follows it)"""


class Scoring(NamedTuple):
    """What to report of a chunk in a batch that is scored."""

    n_top: int
    """Alternatives to each token."""
    next_item: Item | None
    """The item of the prompt after the chunk; None if there is none."""

    def rows(self, chunk: Chunk) -> list[ScoredRow]:
        """The rows of the chunk that a token of the prompt follows."""
        followers = (*chunk.items[1:], self.next_item)
        return [(row, item) for row, item in enumerate(followers) if isinstance(item, int)]


MAX_SCORED_ROWS: Final = 64
"""Rows of a batch that is scored. llama.cpp keeps the logits of all rows, 4 bytes for each entry of the vocabulary: 39
MB for 64 rows and a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: at most one chunk per sequence, all of one kind."""

    chunks: tuple[Chunk, ...]
    kind: BatchKind = PLAIN_TOKENS
    number: int = 0
    """Names the batch when it is to be aborted. No two batches of a context have the same number, except empty ones."""
    scoring: Mapping[int, Scoring] | None = None
    """By uid, for each chunk of a batch that is scored."""

    @property
    def n_rows(self) -> int:
        """Rows of all chunks together."""
        return sum(len(chunk.items) for chunk in self.chunks)


class DecodeOutcome(enum.Enum):
    """What became of a batch. After OK all rows are in the KV cache. NO_KV_SPACE and INVALID changed nothing."""

    OK = "ok"
    NO_KV_SPACE = "no space in the KV cache"
    ABORTED = "aborted"
    """The micro-batches that were finished are in the KV cache. `Context.length` tells which rows these are."""
    INVALID = "the batch was refused"
    FATAL = "the backend failed"
    """The KV cache is as after ABORTED, and to try the same batch again is pointless."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token sampled for a chunk. One that `is_end` is the last of its sequence; it has a piece only if it
    completes a value of a JSON schema. With `error` there is none: this sequence cannot go on, the others can."""

    token: int = -1
    piece: bytes = b""
    is_end: bool = False
    logprob: float = 0.0
    top: tuple[TokenInfo, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What running one batch gave.

    `sampled` has, by uid, one entry for each chunk with `output`. In a batch that computes embeddings, these entries
    are in `embeddings` instead, except those with an error, which are in `sampled`. Both are empty unless `outcome` is
    OK. `kept` has, by uid, the number of positions that the slot holds now. It is filled only after ABORTED and FATAL.

    `scores` is not None after a batch that is scored. It has, by uid and by its place in the prompt, each token that
    follows a row of the batch. `sampled` has an error for each chunk that could not be scored.
    """

    outcome: DecodeOutcome
    sampled: dict[int, Sampled]
    embeddings: dict[int, object]
    kept: dict[int, int]
    seconds: float = 0.0
    message: str = ""
    scores: dict[int, dict[int, SampledToken]] | None = None


def plan_batch(asked: Iterable[Chunk], *, max_rows: int, prompt_rows: int) -> tuple[Chunk, ...]:
    """Fill one batch of at most `max_rows` rows, of which at most `prompt_rows` are rows of prompts.

    `asked` has one chunk for each sequence, with all rows that it could use, in the order in which the sequences are
    served. What is returned has the same chunks, or the first rows of them; those that get no row are left out.

    1. Sequences that decode come first, with one row each. So the prompt of another sequence delays their next token by
       no more than this one step.
    2. Then come the chunks that stay whole, as long as there is room for them, and the first of them in any case.
    3. The rows that are left are dealt to the other prompts in equal shares, in the order given. What a short prompt
       does not need of its share goes to the others.

    Where there are more sequences than rows, the first ones get a row each. A caller that gives the order in turns
    starves nobody.
    """
    decoding: list[Chunk] = []
    prefilling: list[Chunk] = []
    for chunk in islice(asked, max_rows):
        (decoding if chunk.decoding else prefilling).append(chunk)
    if not prefilling:
        return tuple(decoding)
    remain = min(max_rows - len(decoding), prompt_rows)
    shares: dict[int, int] = {}
    for chunk in prefilling:
        if chunk.whole and (len(chunk.items) <= remain or not shares):
            shares[chunk.uid] = len(chunk.items)
            remain = max(remain - len(chunk.items), 0)
    divisible = [chunk for chunk in prefilling if not chunk.whole][:remain]
    # Shortest first, so that one pass settles what each leaves to the others; the batch itself keeps the given order.
    for n_served, chunk in enumerate(sorted(divisible, key=lambda chunk: len(chunk.items))):
        share = min(len(chunk.items), -(-remain // (len(divisible) - n_served)))
        shares[chunk.uid] = share
        remain -= share
    return (*decoding, *(chunk.first(shares[chunk.uid]) for chunk in prefilling if chunk.uid in shares))
