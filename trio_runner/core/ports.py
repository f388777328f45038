"""What the engine needs from a model and its context. `llama/` implements it over llama.cpp, `testing/` as a toy."""

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
    """Chooses tokens for one sequence, and remembers what it chose."""

    def close(self) -> None:
        """Free the sampler. Idempotent."""


class Adapter(Protocol):
    """A LoRA on top of a model."""

    def close(self) -> None:
        """Free the adapter, now or once no context uses it any more. Idempotent."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedMedia:
    """The rows of an image, which take the place of tokens."""

    rows: NDArray[np.float32]
    """Shape (n_rows, n_embd of the model's input)."""
    positions: NDArray[np.int32] | None = None
    """Shape (4, n_rows), relative to the first row; only for models with M-RoPE."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """An image as a part of a prompt: its rows, and the tokens that the model needs around and between them."""

    items: tuple[Item, ...]
    media: Mapping[Media, EncodedMedia]

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(media.rows.nbytes for media in self.media.values())


class Encoding(Protocol):
    """One image on its way through the projector."""

    def run(self) -> EncodedImage:
        """Encode the image. Blocks; only one encoding computes at a time. Raises `InvalidImage` for an image that the
        model cannot take, and `EngineClosed` soon after it was cancelled."""

    def cancel(self) -> None:
        """Make `run` end soon. From any thread; never blocks."""


class Projector(Protocol):
    """Turns images into rows that the model takes like tokens. Any thread may use it."""

    @property
    def digest(self) -> bytes:
        """A digest of everything that the rows of an image depend on besides its pixels."""

    def encoding(self, pixels: Pixels) -> Encoding:
        """Prepare to encode an image. Computes nothing yet."""

    def close(self) -> None:
        """Free the projector, after its encodings have ended. Idempotent."""


NO_MEDIA: Final[Mapping[Media, EncodedMedia]] = MappingProxyType({})
NO_ADAPTERS: Final[Mapping[int, Adapter]] = MappingProxyType({})


class Model(Protocol):
    """Weights and vocabulary. They are read-only, so that any thread may use them."""

    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of `text`. Raises `InvalidRequest` for text that the tokenizer cannot take; its `param` has no
        meaning."""

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of `tokens`. Raises `InvalidRequest` for a token outside the vocabulary."""

    def piece(self, token: int) -> bytes:
        """The bytes of one token, or the name of a special token. Raises `InvalidRequest` for a token outside the
        vocabulary."""

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Sampler:
        """A sampler whose penalties count the tokens of `prompt`. Raises `InvalidGrammar`, or `InvalidRequest` or
        `Unsupported` for other parameters that cannot be met."""

    def has_schema(self, text: str) -> bool:
        """Whether a JSON schema is compiled already, so that a sampler with it takes little time to make."""

    def adapter(self, path: str) -> Adapter:
        """Load a LoRA for this model. Raises `LoadError` if the file is at fault."""

    def close(self) -> None:
        """Free the model, after its context, samplers and adapters. Idempotent."""


class Context(Protocol):
    """A KV cache, and what computes on it. Only one thread may use it, except for `abort`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def apply(self, op: MemoryOp) -> bool:
        """Edit the KV cache. Returns False if this memory cannot trim part of a slot; nothing changed then."""

    def length(self, slot: int) -> int:
        """Positions that `slot` holds: one more than the last one, 0 if it is empty."""

    def decode(
        self,
        batch: Batch,
        samplers: Mapping[int, Sampler],
        *,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        adapters: Mapping[int, Adapter] = NO_ADAPTERS,
    ) -> StepResult:
        """Run one batch, and sample each output with the sampler of its uid.

        `media` has the rows of the images in the batch, and `adapters` the adapters of its kind, by uid. Raises
        `NativeError` when the context cannot be used any more. Every other failure is an outcome.
        """

    def abort(self, number: int) -> None:
        """Make `decode` of the batch with this number return ABORTED soon, whether it runs or is yet to start. Other
        batches are not touched. Only the latest call counts. From any thread; never blocks."""

    def close(self) -> None:
        """Free the context. Idempotent."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter and the name that requests use for it. `scale` applies to requests that choose no adapters."""

    name: str
    adapter: Adapter
    scale: float
    path: str = ""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model, the context that the engine will own, and what was loaded with them."""

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
        """Load what `config` names.

        Calls `progress` with values from 0 to 1, from any thread. Raises `EngineClosed` soon after `cancelled()` turns
        true, and `LoadError` if a file is at fault.
        """
