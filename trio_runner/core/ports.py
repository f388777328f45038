"""What the engine needs from a model and its context. `llama/` provides it over llama.cpp, `testing.py` as a toy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import EngineConfig
from trio_runner.core.batch import Batch, StepResult
from trio_runner.core.memory import MemoryOp
from trio_runner.core.prompt import Item, Media
from trio_runner.info import Capabilities, ModelInfo, Placement
from trio_runner.sampling import SamplingParams

if TYPE_CHECKING:
    from trio_runner.pixels import Pixels


class Sampler(Protocol):
    """Chooses tokens for one sequence; remembers what it chose."""

    def close(self) -> None:
        """Free it. Idempotent."""


class Adapter(Protocol):
    """A LoRA on top of a model."""

    def close(self) -> None:
        """Free it, now or when no context has it set any more. Idempotent."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedMedia:
    """What takes the place of tokens: `rows`, shape (n_rows, n_embd of the model's input). `positions`, shape
    (4, n_rows), relative to the first one, for models with M-RoPE."""

    rows: NDArray[np.float32]
    positions: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """An image as a part of a prompt: rows, and maybe tokens around and between them."""

    items: tuple[Item, ...]
    media: Mapping[Media, EncodedMedia]

    @property
    def n_bytes(self) -> int:
        return sum(media.rows.nbytes for media in self.media.values())


class Encoding(Protocol):
    """One image on its way through the projector."""

    def run(self) -> EncodedImage:
        """Blocks; one at a time computes. Raises `InvalidImage` for one that the model cannot take, `EngineClosed` soon
        after it was cancelled."""

    def cancel(self) -> None:
        """From any thread; never blocks."""


class Projector(Protocol):
    """Turns images into rows that the model takes like tokens. Any thread may use it."""

    @property
    def digest(self) -> bytes:
        """Of all that the rows of an image depend on besides its pixels."""

    def encoding(self, pixels: Pixels) -> Encoding: ...

    def close(self) -> None:
        """Free it, after its encodings. Idempotent."""


NO_MEDIA: Final[Mapping[Media, EncodedMedia]] = MappingProxyType({})
NO_ADAPTERS: Final[Mapping[int, Adapter]] = MappingProxyType({})


class Model(Protocol):
    """Weights and vocabulary: read-only, so any thread may call it."""

    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of `text`. Raises `InvalidRequest`, its `param` of no meaning, for text that cannot be taken."""

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of `tokens`. Raises `InvalidRequest` for a token outside the vocabulary."""

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Sampler:
        """A sampler whose penalties have seen `prompt`. Raises `InvalidGrammar` or `InvalidRequest`."""

    def adapter(self, path: str) -> Adapter:
        """Load a LoRA for this model. Raises `LoadError`."""

    def close(self) -> None:
        """Free it, after its context, samplers and adapters. Idempotent."""


class Context(Protocol):
    """The KV cache and what computes on it. Belongs to one thread, except `abort`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def apply(self, op: MemoryOp) -> bool:
        """Edit the KV cache. False: this memory cannot trim part of a slot, and nothing changed."""

    def length(self, slot: int) -> int:
        """Positions that `slot` holds: one more than the last, 0 when empty."""

    def decode(
        self,
        batch: Batch,
        samplers: Mapping[int, Sampler],
        *,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        adapters: Mapping[int, Adapter] = NO_ADAPTERS,
    ) -> StepResult:
        """Run one batch and sample its outputs with the samplers of their uids; `media` and `adapters` have what the
        batch names. Raises `NativeError` when the context cannot be used any more; everything else is an outcome."""

    def abort(self, number: int) -> None:
        """Make `decode` of the batch of this number, running or yet to start, return ABORTED soon; a batch of any other
        number is not touched. Only the latest call counts. From any thread; never blocks."""

    def close(self) -> None:
        """Free it. Idempotent."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter under the name that requests know it by. `scale` is for those that choose none."""

    name: str
    adapter: Adapter
    scale: float
    path: str = ""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model with the context that the engine will own, and what was loaded with it."""

    model: Model
    context: Context
    projector: Projector | None = None
    adapters: tuple[LoadedAdapter, ...] = ()
    placement: Placement | None = None


class Loader(Protocol):
    """Loads a runtime. Called once per engine, on a helper thread."""

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        """Report progress from 0 to 1, from any thread; give up soon after `cancelled()` turns true, raising
        `EngineClosed`. Raises `LoadError` when the file is at fault."""
