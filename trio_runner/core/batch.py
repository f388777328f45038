"""What one step decodes, and what came of it: the values that pass between the scheduler and a context."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.events import TokenInfo

AdapterSet: TypeAlias = tuple[tuple[int, float], ...]
"""(uid of an adapter, scale), in the order of the uids, no scale 0: what is added to the model's weights."""


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

    def for_media(self, media: Media) -> BatchKind:
        """The kind of batch that takes rows of this image, with the same adapters."""
        return self._replace(of_media=True, causal=media.causal)


PLAIN_TOKENS: Final = BatchKind()
"""The kind of a batch of tokens that are sampled from, without adapters."""


class Chunk(NamedTuple):
    """Consecutive rows of one sequence, all of them tokens, or all of one image: `items` follow the `start` rows that
    `slot` holds, at positions `position`, `position` + 1, ... or where the image says.

    With `output`, the last row's logits are computed and sampled (or the sequence's vector, in an embeddings batch).
    """

    # A tuple, like Wanting: every token of every stream takes one of each, and frozen dataclasses take five times as
    # long to make.

    uid: int
    slot: int
    start: int
    items: tuple[Item, ...]
    output: bool
    offset: int = 0
    """From `start` to `position`: below 0 where rows before it share positions."""
    encoder_tokens: tuple[int, ...] = ()
    """What the encoder has read, if the model has one."""

    @property
    def position(self) -> int:
        return self.start + self.offset

    @property
    def stop(self) -> int:
        """How many rows the slot holds then."""
        return self.start + len(self.items)

    @property
    def media(self) -> Media | None:
        """The image that the rows are of; None for tokens."""
        first = self.items[0] if self.items else None
        return first.media if isinstance(first, MediaRow) else None


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: at most one chunk per sequence, all of one kind."""

    chunks: tuple[Chunk, ...]
    kind: BatchKind = PLAIN_TOKENS
    number: int = 0
    """Names the batch to those who abort it. No two batches of a context have the same number, except empty ones."""

    @property
    def n_rows(self) -> int:
        """Rows of all chunks together."""
        return sum(len(chunk.items) for chunk in self.chunks)


class DecodeOutcome(enum.Enum):
    """What became of a batch. After OK every row is in the KV cache; NO_KV_SPACE and INVALID changed nothing."""

    OK = "ok"
    NO_KV_SPACE = "no space in the KV cache"
    ABORTED = "aborted"
    """Micro-batches that were finished are in the KV cache; `Context.length` tells which rows."""
    INVALID = "the batch was refused"
    FATAL = "the backend failed"
    """As ABORTED, and the same batch is not worth trying again."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token sampled for a chunk. `error` instead: this sequence cannot go on, the others can."""

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
    """

    outcome: DecodeOutcome
    sampled: dict[int, Sampled]
    embeddings: dict[int, object]
    kept: dict[int, int]
    seconds: float = 0.0
    message: str = ""


class Wanting(NamedTuple):
    """A sequence that could use rows: `pending` items to go to `slot` after the `start` rows that it holds."""

    uid: int
    slot: int
    start: int
    pending: Sequence[Item]
    decoding: bool
    """The prompt is done: the one pending token is the one sampled last."""
    output: bool = True
    """The last pending row is to be sampled."""
    whole: bool = False
    """All of `pending` in one batch, or nothing."""
    offset: int = 0
    encoder_tokens: tuple[int, ...] = ()


def plan_batch(wanting: Iterable[Wanting], *, max_rows: int, prompt_rows: int) -> tuple[Chunk, ...]:
    """Fill one batch of at most `max_rows` rows, `prompt_rows` of them for prompts.

    Sequences that decode come first, one row each, so that no prompt of another delays their next token by more than
    this one step. What cannot be divided comes next, as long as there is room, and the first of it in any case. What is
    left is dealt to the other prompts in equal shares, in the order given; what a short prompt leaves of its share goes
    to the others. Where sequences outnumber rows the first ones get a row each: whoever gives the order in turns
    starves nobody. `wanting` is not mutated.
    """
    decoding: list[Wanting] = []
    prefilling: list[Wanting] = []
    for want in islice(wanting, max_rows):
        (decoding if want.decoding else prefilling).append(want)
    remain = min(max_rows - len(decoding), prompt_rows)
    shares: dict[int, int] = {}
    for want in prefilling:
        if want.whole and (len(want.pending) <= remain or not shares):
            shares[want.uid] = len(want.pending)
            remain = max(remain - len(want.pending), 0)
    divisible = [want for want in prefilling if not want.whole][:remain]
    # Shortest first, so that one pass settles what each leaves over; the batch itself keeps the given order.
    for n_served, want in enumerate(sorted(divisible, key=lambda want: len(want.pending))):
        share = min(len(want.pending), -(-remain // (len(divisible) - n_served)))
        shares[want.uid] = share
        remain -= share
    chunks = [_chunk(want, 1) for want in decoding]
    chunks += [_chunk(want, shares[want.uid]) for want in prefilling if want.uid in shares]
    return tuple(chunks)


def _chunk(want: Wanting, n_rows: int) -> Chunk:
    items = tuple(want.pending[:n_rows])
    output = want.output and n_rows == len(want.pending)
    return Chunk(want.uid, want.slot, want.start, items, output, want.offset, want.encoder_tokens)
