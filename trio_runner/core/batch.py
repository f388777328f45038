"""What one step decodes, and what came of it: the values that pass between the scheduler and a context."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from trio_runner.events import TokenInfo


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one sequence: `tokens` go to positions `start`, `start` + 1, ... of `slot`.

    With `output`, the last row's logits are computed and sampled (or the sequence's vector, in an embeddings batch).
    """

    uid: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    output: bool

    @property
    def stop(self) -> int:
        """The position after the last row."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, at most one chunk per sequence. `embeddings`: vectors are wanted instead of tokens."""

    chunks: tuple[Chunk, ...]
    embeddings: bool = False
    number: int = 0
    """Its name to whoever wants to break it off; no two batches of a context that are not empty share one."""

    @property
    def n_rows(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


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

    `sampled` has, by uid, one entry for each chunk with `output` of a token batch, `vectors` for each one of an
    embeddings batch (`error` entries go to `sampled` there too). Both are empty unless `outcome` is OK.
    `kept` has, by uid, the number of positions the slot holds now; filled only after ABORTED and FATAL.
    """

    outcome: DecodeOutcome
    sampled: dict[int, Sampled]
    vectors: dict[int, object]
    kept: dict[int, int]
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Wanting:
    """A sequence that could use rows: `pending` tokens to go to `slot` from position `start` on."""

    uid: int
    slot: int
    start: int
    pending: Sequence[int]
    decoding: bool
    """The prompt is done: the one pending token is the one sampled last."""
    output: bool = True
    """The last pending row is to be sampled."""


def plan_batch(wanting: Iterable[Wanting], *, max_rows: int, prompt_rows: int, number: int = 0) -> Batch:
    """Fill one batch of at most `max_rows` rows, `prompt_rows` of them for prompts.

    Sequences that decode come first, one row each, so that no prompt of another delays their next token by more than
    this one step. What is left is dealt to the prompts in equal shares, in the order given; what a short prompt leaves
    of its share goes to the others. Where sequences outnumber rows the first ones get a row each: whoever gives the
    order in turns starves nobody. `wanting` is not mutated.
    """
    decoding: list[Wanting] = []
    prefilling: list[Wanting] = []
    for want in islice(wanting, max_rows):
        (decoding if want.decoding else prefilling).append(want)
    chunks = [_chunk(want, 1) for want in decoding]
    remain = min(max_rows - len(chunks), prompt_rows)
    del prefilling[remain:]
    # Shortest first, so that one pass settles what each leaves over; the batch itself keeps the given order.
    shares: dict[int, int] = {}
    for n_served, want in enumerate(sorted(prefilling, key=lambda want: len(want.pending))):
        share = min(len(want.pending), -(-remain // (len(prefilling) - n_served)))
        shares[want.uid] = share
        remain -= share
    chunks += [_chunk(want, shares[want.uid]) for want in prefilling]
    return Batch(tuple(chunks), number=number)


def _chunk(want: Wanting, n_rows: int) -> Chunk:
    tokens = tuple(want.pending[:n_rows])
    return Chunk(want.uid, want.slot, want.start, tokens, output=want.output and n_rows == len(want.pending))
