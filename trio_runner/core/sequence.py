"""One request in flight, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from trio_runner.core.batch import AdapterSet, BatchKind, Sampled
from trio_runner.core.prompt import Item
from trio_runner.core.slots import Slot
from trio_runner.core.stop import StopMatcher
from trio_runner.core.utf8 import Utf8Assembler
from trio_runner.events import FinishReason, SampledToken, TextPiece, Usage
from trio_runner.info import Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """What the scheduler is asked to run. The prompt fits a slot; see `core.prompt.fit_prompt`."""

    uid: int
    prompt: tuple[Item, ...]
    encoder_tokens: tuple[int, ...] = ()
    """The tokens that the encoder reads, if the model has an encoder."""
    adapters: AdapterSet = ()
    n_keep: int = 0
    max_tokens: int | None = None
    """With 0, nothing is sampled: the sequence ends when its prompt is decoded."""
    stop: tuple[str, ...] = ()
    cache_prompt: bool = True
    share_prompt: bool = False
    """Follow other sequences for any number of tokens. It goes on from what slots hold, as with `cache_prompt`."""
    preferred_slot: int | None = None
    """The slot to take if it is free; see `SlotPool.acquire`."""
    shift: bool = True
    embedding: bool = False
    """The request is for the embedding of the prompt, not for a continuation."""
    background: bool = False
    """Interactive sequences go first, and may take its slot for a while."""
    progress: bool = False
    logprobs: bool = False
    prompt_logprobs: int = -1
    """Alternatives to report with every token of the prompt; -1 reports nothing. All rows are decoded anew."""
    tells_first_token: bool = False
    """Emit `FirstToken`."""

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled, or only the rows of the prompt are wanted."""
        return not self.embedding and self.max_tokens != 0

    @property
    def reuses(self) -> bool:
        """Whether it may go on from what other sequences have decoded."""
        return (self.cache_prompt or self.share_prompt) and self.prompt_logprobs < 0

    @property
    def cache_key(self) -> Hashable:
        """What its rows in the KV cache depend on besides the rows before them."""
        return (self.adapters, self.encoder_tokens) if self.adapters or self.encoder_tokens else None


def takes_embed_slot(spec: SequenceSpec, capabilities: Capabilities) -> bool:
    """Whether the sequence runs in a slot for embeddings. Those slots together hold no more rows than one batch. A
    longer text, if its last row gives its embedding, takes a slot like a generation."""
    return spec.embedding and not (capabilities.embeds_last_row and len(spec.prompt) > capabilities.max_rows)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of a sequence was sampled, whether or not its text is certain yet. Not for readers."""


def no_slot() -> Slot:
    """What a sequence that waits has instead of a slot."""
    return Slot(-1)


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's side of a request. `slot` holds what is in the KV cache, and `pending` what is to go there next.
    While the sequence waits for a slot, all of it is pending."""

    spec: SequenceSpec
    in_embed_slot: bool = False
    """It runs in a slot for embeddings; see `takes_embed_slot`."""
    pending: list[Item] = field(init=False)
    kind: BatchKind = field(init=False)
    """The kind of batch for its tokens, except for those that give its embedding."""
    slot: Slot = field(default_factory=no_slot)
    n_cached: int = 0
    """Items of the prompt that were found in the KV cache."""
    preempted: bool = False
    """It had a slot before and had to give it up."""
    prompt_done: bool = False
    """At least one token was sampled."""
    paused: bool = False
    follows: Sequence | None = None
    """A sequence that decodes the start of the same prompt. This one waits until that one's slot holds `n_awaited`
    items."""
    n_awaited: int = 0
    last_turn: int = 0
    """The turn in which it last had rows in a batch, or got its slot."""
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0
    scores: dict[int, SampledToken] = field(default_factory=dict)
    """How probable each token of the prompt was, by its place in the prompt, as far as that is known and wanted."""
    text: GeneratedText = field(init=False)

    def __post_init__(self) -> None:
        self.pending = list(self.spec.prompt)
        self.kind = BatchKind(self.spec.adapters, scored=self.spec.prompt_logprobs >= 0)
        self.text = GeneratedText(self.spec.stop, keep_tokens=self.spec.logprobs)

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done and one sampled token waits to be decoded: the cheap, steady state."""
        return self.prompt_done and len(self.pending) == 1

    @property
    def items(self) -> list[Item]:
        """Everything that the next token depends on, besides the cache key."""
        return self.slot.items + self.pending

    @property
    def usage(self) -> Usage:
        """What the request cost so far."""
        return Usage(
            prompt_tokens=len(self.spec.prompt) + len(self.spec.encoder_tokens),
            cached_tokens=self.n_cached,
            completion_tokens=self.text.n_tokens,
            prompt_seconds=self.prompt_seconds,
            completion_seconds=self.completion_seconds,
        )


class GeneratedText:
    """Sampled tokens in, certain text out: whole characters, and nothing that may yet be part of a stop string."""

    def __init__(self, stops: tuple[str, ...], *, keep_tokens: bool = False) -> None:
        self.n_tokens = 0
        """Tokens sampled so far, an end token included."""
        self._utf8 = Utf8Assembler()
        self._stop = StopMatcher(stops)
        self._keep_tokens = keep_tokens
        self._tokens: list[SampledToken] = []
        self._n_emitted = 0
        self._n_assembled = 0
        self._ends: list[int] = []
        # Where the text of each token ended; needed only where a stop string can cut it.
        self._track_ends = any(stops)

    @property
    def stop_matched(self) -> str | None:
        """The stop string that was found."""
        return self._stop.matched

    def push(self, sampled: Sampled) -> TextPiece | None:
        """Take one token. Returns the text that became certain, if any."""
        self._count(sampled)
        text = self._utf8.push(sampled.piece)
        self._n_assembled += len(text)
        if self._track_ends:
            self._ends.append(self._n_assembled)
        return self._emit(self._stop.push(text))

    def end(self, sampled: Sampled) -> TextPiece | None:
        """Take the last token, which may have text. Returns it after what was held back."""
        self._count(sampled)
        text = self._utf8.push(sampled.piece)
        self._n_assembled += len(text)
        if self._track_ends and text:
            self._ends.append(self._n_assembled)
        return self._emit(self._stop.push(text + self._utf8.flush()) + self._stop.flush())

    def flush(self) -> TextPiece | None:
        """Take no more tokens. Returns what was held back; half a character is dropped."""
        return self._emit(self._stop.push(self._utf8.flush()) + self._stop.flush())

    def take_tokens(self) -> tuple[SampledToken, ...]:
        """The tokens that were not reported yet; empty unless they are kept."""
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def n_cut(self) -> int:
        """How many tokens, from the last one back, have text that a stop string cut off, in whole or in part."""
        return sum(end > self._n_emitted for end in self._ends)

    def _count(self, sampled: Sampled) -> None:
        self.n_tokens += 1
        if self._keep_tokens:
            self._tokens.append(SampledToken(sampled.token, sampled.piece, sampled.logprob, sampled.top))

    def _emit(self, text: str) -> TextPiece | None:
        self._n_emitted += len(text)
        return TextPiece(text, self.take_tokens()) if text else None


def finish_reason(text: GeneratedText, sampled: Sampled, spec: SequenceSpec) -> FinishReason | None:
    """Why the sequence ends with this token, which `text` has taken; None when it goes on. An end token comes before
    a stop string, and that before the limit."""
    if sampled.is_end or text.stop_matched is not None:
        return "stop"
    if spec.max_tokens is not None and text.n_tokens >= spec.max_tokens:
        return "length"
    return None
