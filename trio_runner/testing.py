"""A toy model to test against, ours or yours, without a model file or the native library.

    async with trio_runner.open_engine(ToyLoader(), slots=2) as engine:
        ...

The next token of a sequence is a hash of every token its slot holds and of where: one stale, missing, misplaced or
foreign entry of the KV cache gives another text. `toy_text` says what the right one is. What llama.cpp would answer
with an abort or with silent rubbish is an AssertionError here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import EngineConfig
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.engine.runtime import ModelInfo, Runtime, Sampler
from trio_runner.errors import EngineClosed, InvalidGrammar, InvalidRequest
from trio_runner.events import TokenInfo
from trio_runner.request import SamplingParams

N_VOCAB = 257
END = 256
"""The end token; every other token is the byte of its number."""
N_EMBD = 8

_ALPHABET = b"abcdefgh \xc3\xa9"


def toy_next(tokens: Sequence[int]) -> int:
    """The token that follows `tokens` at positions 0, 1, 2, ..."""
    digest = hashlib.blake2b(",".join(map(str, tokens)).encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "big")
    return END if number % 61 == 0 else _ALPHABET[number % len(_ALPHABET)]


def toy_continuation(prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The first `n_tokens` tokens after `prompt`, up to and including the end token, in an endless context."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < n_tokens and (len(tokens) == len(prompt) or tokens[-1] != END):
        tokens.append(toy_next(tokens))
    return tokens[len(prompt) :]


def toy_text(prompt: str, n_tokens: int) -> str:
    """The text the toy generates after `prompt`, at most `n_tokens` tokens of it, in an endless context."""
    tokens = toy_continuation(list(prompt.encode()), n_tokens)
    return _whole_characters(bytes(token for token in tokens if token != END))


def _whole_characters(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text[:-1] if data and data[-1] == 0xC3 else text


class ToySampler:
    """Takes what the toy model says. A grammar, if any, is a string of the characters it allows."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ToyModel:
    """Tokens are the bytes of the text."""

    def __init__(self, name: str = "toy", *, causal: bool = True) -> None:
        self.info = ModelInfo(
            name=name,
            architecture="toy",
            description="a hash",
            n_vocab=N_VOCAB,
            n_ctx_train=4096,
            n_embd=N_EMBD,
            causal=causal,
        )
        self.samplers: list[ToySampler] = []
        self.closed = False

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not self.closed
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        if any(not 0 <= token < N_VOCAB for token in tokens):
            raise InvalidRequest("a token is outside the vocabulary", param="tokens")
        return bytes(token for token in tokens if token != END)

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> ToySampler:
        assert not self.closed
        if "(" in params.grammar:
            raise InvalidGrammar("the toy grammar does not like parentheses")
        self.samplers.append(ToySampler(params))
        return self.samplers[-1]

    def close(self) -> None:
        assert all(sampler.closed for sampler in self.samplers)
        self.closed = True


@dataclass(slots=True, eq=False)
class _Cell:
    """One entry of the KV cache. Slots that share it share its position, as in llama.cpp."""

    position: int
    token: int


@dataclass(frozen=True, slots=True)
class Interruption:
    """What a hook of `ToyContext` makes of a batch: an outcome, after the first `n_rows` rows were done."""

    outcome: DecodeOutcome
    n_rows: int = 0


_BROKEN_OFF = frozenset({DecodeOutcome.ABORTED, DecodeOutcome.FATAL})


class ToyContext:
    """A KV cache of lists. `on_decode`, called before each batch, may wait, raise, or return an Interruption. A batch
    whose number is, or meanwhile becomes, `aborted_number` is broken off before its first row, unless the hook knows
    better."""

    def __init__(self, limits: Limits, *, on_decode: Callable[[Batch], Interruption | None] | None = None) -> None:
        self.limits = limits
        self.on_decode = on_decode
        self.aborted_number: int | None = None
        self.batches: list[Batch] = []
        self.closed = False
        self._cells: list[list[_Cell]] = [[] for _ in range(limits.first_embed_slot + limits.n_embed_slots)]

    def held(self, slot: int) -> list[int]:
        """The tokens that `slot` holds. Raises AssertionError unless they are at positions 0, 1, 2, ..."""
        cells = self._cells[slot]
        assert [cell.position for cell in cells] == list(range(len(cells))), "positions have a hole or a double"
        return [cell.token for cell in cells]

    def length(self, slot: int) -> int:
        return self._cells[slot][-1].position + 1 if self._cells[slot] else 0

    def apply(self, op: MemoryOp) -> bool:
        assert not self.closed
        match op:
            case Trim(slot, start, end):
                stop = self.length(slot) if end is None else end
                kept = [cell for cell in self._cells[slot] if not start <= cell.position < stop]
                if kept and len(kept) < len(self._cells[slot]) and not self.limits.can_trim:
                    return False
                self._cells[slot] = kept
            case Copy(source, target, end):
                assert not self._cells[target], "the target of a copy must be empty"
                assert end <= self.length(source), "a copy of what is not there"
                assert max(source, target) < self.limits.first_embed_slot, (
                    "nothing is shared with a lane for embeddings"
                )
                self._cells[target] = self._cells[source][:end]
            case Slide(slot, start, end, delta):
                assert self.limits.can_shift, "this context cannot shift"
                for cell in self._cells[slot]:
                    if start <= cell.position < end:
                        cell.position += delta
        return True

    def decode(self, batch: Batch, samplers: Mapping[int, Sampler]) -> StepResult:
        assert not self.closed
        assert 0 < batch.n_rows <= self.limits.max_rows
        assert len({chunk.uid for chunk in batch.chunks}) == len(batch.chunks)
        for chunk in batch.chunks:
            self._check_lane(chunk, batch.embeddings)
        self.batches.append(batch)
        interruption = self.on_decode(batch) if self.on_decode else None
        if interruption is None and batch.number == self.aborted_number:
            interruption = Interruption(DecodeOutcome.ABORTED)
        if interruption is not None:
            return self._interrupt(batch, interruption)
        sampled: dict[int, Sampled] = {}
        vectors: dict[int, object] = {}
        for chunk in batch.chunks:
            tokens = self._hold(chunk, len(chunk.tokens))
            if chunk.output and batch.embeddings:
                vectors[chunk.uid] = toy_vector(tokens)
            elif chunk.output:
                sampled[chunk.uid] = self._sample(tokens, samplers[chunk.uid])
        return StepResult(DecodeOutcome.OK, sampled, vectors, {}, seconds=0.001 * batch.n_rows)

    def abort(self, number: int) -> None:
        self.aborted_number = number

    def close(self) -> None:
        self.closed = True

    def _check_lane(self, chunk: Chunk, embeddings: bool) -> None:
        if chunk.slot >= self.limits.first_embed_slot:
            assert embeddings == chunk.output, "a lane for embeddings makes vectors only, and only in their batches"
        if embeddings:
            assert chunk.output, "a batch of embeddings ends each of its texts"
            assert self.limits.embeds_last_row or chunk.start == 0, "all rows of a text make its vector"

    def _interrupt(self, batch: Batch, interruption: Interruption) -> StepResult:
        n_rows = interruption.n_rows
        for chunk in batch.chunks:
            self._hold(chunk, max(n_rows, 0))
            n_rows -= len(chunk.tokens)
            if interruption.outcome in _BROKEN_OFF and not self.limits.can_trim:
                self._cells[chunk.slot] = []  # recurrent state that was caught half-way is worth nothing
        kept = {chunk.uid: self.length(chunk.slot) for chunk in batch.chunks}
        return StepResult(interruption.outcome, {}, {}, kept)

    def _hold(self, chunk: Chunk, n_rows: int) -> list[int]:
        if not self.limits.has_memory:
            return list(chunk.tokens[:n_rows])
        assert chunk.start == self.length(chunk.slot), "rows must follow what the slot holds"
        assert chunk.stop <= self.limits.n_ctx, "the slot is full"
        self._cells[chunk.slot] += [_Cell(chunk.start + i, token) for i, token in enumerate(chunk.tokens[:n_rows])]
        first = self.limits.first_embed_slot
        n_embedding = sum(map(len, self._cells[first:]))
        assert n_embedding <= self.limits.max_rows, "the lanes for embeddings are full"
        n_cells = len({id(cell) for cells in self._cells[:first] for cell in cells})
        assert n_cells <= self.limits.n_slots * self.limits.n_ctx, "the KV cache is full"
        return self.held(chunk.slot)

    @staticmethod
    def _sample(tokens: Sequence[int], sampler: Sampler) -> Sampled:
        assert isinstance(sampler, ToySampler)
        assert not sampler.closed
        token = toy_next(tokens)
        logprob = -1.0
        if token == END:
            return Sampled(token, is_end=True, logprob=logprob)
        piece = bytes([token])
        if sampler.params.grammar and token not in sampler.params.grammar.encode():
            return Sampled(error=InvalidGrammar("the grammar allows no token here"))
        top = tuple(TokenInfo(token, piece, logprob) for _ in range(max(sampler.params.logprobs, 0)))
        return Sampled(token, piece, logprob=logprob, top=top)


def toy_vector(tokens: Sequence[int]) -> NDArray[np.float32]:
    """The vector of a prompt, shape (8,)."""
    digest = hashlib.blake2b(",".join(map(str, tokens)).encode(), digest_size=N_EMBD).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32)


@dataclass(slots=True)
class ToyLoader:
    """Loads a toy. `limits` replaces fields of the Limits that follow from the engine's configuration; `on_load` may
    wait or raise; `model` and `context` are what was loaded last."""

    limits: Mapping[str, object] = field(default_factory=dict)
    on_load: Callable[[Callable[[float], None], Callable[[], bool]], None] | None = None
    on_decode: Callable[[Batch], Interruption | None] | None = None
    model: ToyModel | None = None
    context: ToyContext | None = None

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        if self.on_load is not None:
            self.on_load(progress, cancelled)
        if cancelled():
            raise EngineClosed("loading was cancelled")
        progress(1.0)
        limits = Limits(
            n_slots=config.slots,
            n_ctx=config.context_length or 4096,
            max_rows=config.batch_size,
            n_spare_slots=config.slots,
            n_embed_slots=config.slots,
        )
        limits = replace(limits, **self.limits)  # type: ignore[arg-type]
        self.model = ToyModel()
        self.context = ToyContext(limits, on_decode=self.on_decode)
        return Runtime(self.model, self.context)
