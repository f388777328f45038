"""What an engine tells about itself: its model, what the model can do, where it lies, and how busy it is.

All of these are values. They cross every wall: from the native library to the engine, and from there to HTTP, to the
command line and to other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

DeviceKind: TypeAlias = Literal["CPU", "GPU", "integrated GPU", "accelerator", "other"]
Status: TypeAlias = Literal["loading", "ready", "closing", "closed", "broken"]
Phase: TypeAlias = Literal["preparing", "waiting", "prefill", "decode"]
"""Where a request is: it is tokenised, it waits for a slot, its prompt is decoded, or its text is generated."""

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model."""

    name: str
    architecture: str
    """The value of `general.architecture` in the file, such as "llama"."""
    description: str
    """llama.cpp's one-line description: architecture, size, type of the weights."""
    n_vocab: int
    n_ctx_train: int
    """Tokens of context that the model was trained with."""
    n_embd: int
    """Elements of one hidden state."""
    n_layer: int = 0
    n_params: int = 0
    size: int = 0
    """Bytes of all tensors."""
    token_bos: int | None = None
    token_eos: int | None = None
    token_sep: int | None = None
    token_fim_pre: int | None = None
    """Stands before the text in front of a gap that is to be filled. `token_fim_suf` stands before the text behind it,
    and `token_fim_mid` before what fills it."""
    token_fim_suf: int | None = None
    token_fim_mid: int | None = None
    token_fim_rep: int | None = None
    """Stands before the name of a repository."""
    token_fim_sep: int | None = None
    """Stands before the name of a file in it."""
    adds_bos: bool = False
    """Tokenised text begins with `token_bos`."""
    adds_eos: bool = False
    """Tokenised text ends with `token_eos`."""
    adds_sep: bool = False
    """Tokenised text ends with `token_sep`."""
    bos_text: str = ""
    eos_text: str = ""
    causal: bool = True
    """A token attends only to the tokens before it. False for encoders such as BERT."""
    chat_template: str | None = None
    """The Jinja template in the file that turns a conversation into a prompt."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's scalar keys and values, as text."""

    @property
    def can_infill(self) -> bool:
        """Whether the model has the tokens to fill a gap between a prefix and a suffix."""
        return None not in (self.token_fim_pre, self.token_fim_suf, self.token_fim_mid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a model and its context can do. Fixed for the life of a context; every decision in `core/` rests on it."""

    n_slots: int
    """Sequences that run at once. Together they hold at most `n_slots * n_ctx` positions."""
    n_ctx: int
    """Positions that one slot can hold."""
    max_rows: int
    """Rows of one batch."""
    n_spare_slots: int = 0
    """Further slots within the same positions. They keep prompts in the cache: a new sequence need not take the slot
    whose contents another prompt may want."""
    n_embed_slots: int = 1
    """Further slots, numbered from `first_embed_slot`, that only embeddings use. So embeddings never wait for
    generations and push nothing out of the prompt cache. Together they hold at most `max_rows` positions. If
    `embeds_last_row`, a longer text takes an ordinary slot."""
    embeds_last_row: bool = False
    """True: the embedding of a text is that of its last row, and the rows before it may run in any batches.
    False: all rows of a text must be in one batch."""
    has_memory: bool = True
    """False: nothing stays in the KV cache between steps, as in BERT. Only embeddings are possible."""
    can_trim: bool = True
    """False: part of a sequence cannot be removed (recurrent state). A trimmed slot starts again from nothing."""
    can_shift: bool = True
    """False: positions cannot be renumbered. A full slot decodes again what it keeps."""
    can_generate: bool = True
    """False: the model has no tokens to sample, only embeddings."""
    ranks: bool = False
    """The model's embeddings are scores of a document for a query."""
    embedding_size: int = 0
    """Elements of an embedding."""
    decoder_start: int | None = None
    """Not None: an encoder reads the prompt, and the generated text begins with this token. All running sequences
    together may have the encoder read at most `max_rows` tokens, since it reads them all at once."""

    @property
    def first_embed_slot(self) -> int:
        """Number of the first slot that only embeddings use."""
        return self.n_slots + self.n_spare_slots


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A loaded LoRA adapter. `scale` applies to requests that choose no adapters."""

    name: str
    path: str
    scale: float


@dataclass(frozen=True, slots=True)
class Device:
    """A device that computes. Memory is in bytes, and 0 where the backend does not report it."""

    number: int
    name: str
    description: str
    backend: str
    kind: DeviceKind
    memory_free: int
    memory_total: int
    id: str = ""
    """Equal for one piece of hardware that two backends found; may be empty."""
    is_remote: bool = False
    """The device belongs to an rpc-server."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one device that a model and its context take. `device` None means this machine's own memory."""

    device: int | None
    model: int
    context: int
    compute: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.model + self.context + self.compute

    def __str__(self) -> str:
        """The parts of the total in MiB, for people."""
        model, context, compute = (round(n / MIB) for n in (self.model, self.context, self.compute))
        return f"{model} for the model, {context} for the KV cache, {compute} to compute"


@dataclass(frozen=True, slots=True)
class Placement:
    """Which devices hold which part of a loaded model."""

    n_layers: int
    """Layers that could go to devices: those of the model, and the one that makes logits."""
    n_device_layers: int
    """Layers that did go to devices."""
    devices: tuple[Device, ...]
    """The devices as they were before loading. The model's layers lie on them in this order."""
    memory: tuple[MemoryUse, ...]

    @property
    def places(self) -> tuple[tuple[Device | None, MemoryUse], ...]:
        """Each device and what the model takes of it; last, under None, the memory of this machine."""
        devices = tuple((device, self.used(device.number)) for device in self.devices)
        return (*devices, (None, self.used(None)))

    def used(self, device: int | None) -> MemoryUse:
        """What the model takes of the device with this number or, for None, of this machine."""
        return next((use for use in self.memory if use.device == device), MemoryUse(device, 0, 0, 0))


class SchedulerStatistics(NamedTuple):
    """How full the scheduler is, and counters of what it has done so far."""

    # A tuple: two are made in every step, and a frozen dataclass takes several times as long.

    n_waiting: int = 0
    n_running: int = 0
    n_paused: int = 0
    n_preempted: int = 0
    """Sequences that wait for a slot and had one before."""
    n_cached_tokens: int = 0
    """Positions that all slots hold, in use or kept for later prompts."""
    n_batches: int = 0
    n_aborted: int = 0
    """Batches that were aborted."""
    n_prompt_rows: int = 0
    """Rows of prompts that were decoded."""
    n_sampled: int = 0
    """Tokens that were sampled."""
    n_used_tokens: int = 0
    """Positions that slots in use hold."""
    n_slots_used: int = 0
    """The sum, over all batches that were not aborted, of the slots that were in use."""
    n_preemptions: int = 0
    """How often a sequence had to give up its slot and wait again."""
    n_prompt_tokens: int = 0
    """Tokens of all prompts that were read to their end, those found in the prompt cache included."""
    n_looked_up: int = 0
    """Tokens of prompts that could use the prompt cache."""
    n_found: int = 0
    """How many of them were found there."""
    n_prompt_decoded: int = 0
    """Tokens of the prompts of generations that were read to their end, without those found in the prompt cache."""
    prompt_seconds: float = 0.0
    """The sum of `Usage.prompt_seconds` of these generations."""
    n_generated: int = 0
    """Tokens of generations that have finished."""
    generation_seconds: float = 0.0
    """The sum of `Usage.completion_seconds` of these generations."""

    def at_rest(self) -> SchedulerStatistics:
        """The same counters of a scheduler that is gone: nothing waits, runs or is held."""
        return self._replace(n_waiting=0, n_running=0, n_paused=0, n_preempted=0, n_cached_tokens=0, n_used_tokens=0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values there were in which range."""

    bounds: tuple[float, ...] = ()
    """Upper bounds of the ranges, in rising order. A value on a bound is in the range below it."""
    counts: tuple[int, ...] = (0,)
    """Values in each range. The last range has no upper bound."""
    total: float = 0.0
    """The sum of all values."""

    @property
    def count(self) -> int:
        """Values in all ranges."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatistics:
    """How requests ended, and how many seconds they took. The numbers only rise.

    A request that is cancelled is in `cancelled` and `cancel`, and the tokens that it had are in `first_token` and
    `between_tokens`. It is in none of the other histograms.
    """

    finished: Mapping[str, int] = field(default_factory=dict)
    """Generations that have ended, by the reason that `Finished` gives, and under "abort" those that were cancelled."""
    cancelled: Mapping[Phase, int] = field(default_factory=dict)
    """Generations and embeddings that were cancelled, by the phase they were in."""
    n_refused: int = 0
    """Requests that were refused because the queue was full."""
    cancel: Mapping[Phase, Histogram] = field(default_factory=dict)
    """From the moment a reader closes its request until the slot is free. None is in "preparing", which has no slot."""
    first_token: Histogram = Histogram()
    """From the arrival of a generation to its first token."""
    between_tokens: Histogram = Histogram()
    """From one token of a generation to the next."""
    latency: Histogram = Histogram()
    """From the arrival of a generation to its end."""
    queue: Histogram = Histogram()
    """`Usage.queue_seconds` of a generation."""
    prefill: Histogram = Histogram()
    """From when the first rows of a generation began to be decoded to its first token."""
    decode: Histogram = Histogram()
    """From the first token of a generation to its last."""
    prompt_tokens: Histogram = Histogram()
    """Tokens of the prompt of a generation."""
    generated_tokens: Histogram = Histogram()
    """Tokens that a generation sampled."""
    embedding: Histogram = Histogram()
    """From the arrival of a text to its embedding or score."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of an engine. The scheduler's part is as of the last step."""

    status: Status
    slots: int
    generations: int
    """Requests in flight: waiting, running, paused, or with last events that are not handed over yet."""
    scheduler: SchedulerStatistics
    images_encoded: int = 0
    images_found: int = 0
    """Images found in the cache, or being encoded for another request already."""
    image_bytes: int = 0
    """Bytes of encoded images in the cache."""
    preparing: int = 0
    """Requests that are tokenised, whose images are encoded, or that wait for the model to load."""
    requests: RequestStatistics = field(default_factory=RequestStatistics)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return self.scheduler.n_running

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return self.scheduler.n_waiting
