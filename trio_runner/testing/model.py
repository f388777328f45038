"""What a toy loader loads: the model, its samplers and adapters, and the projector for images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trio_runner.core.ports import (
    EncodedImage,
    EncodedMedia,
)
from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.errors import EngineClosed, InvalidGrammar, InvalidRequest, LoadError, Unsupported
from trio_runner.info import ModelInfo
from trio_runner.sampling import SamplingParams
from trio_runner.testing.text import END, N_EMBD, N_VOCAB

if TYPE_CHECKING:
    from trio_runner.pixels import Pixels


class ToySampler:
    """Takes the token that the toy gives. A grammar is a string of the characters that it allows; "" allows all."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ToyAdapter:
    """Loaded from a path that need not exist. A path with "bad" in it is refused with a LoadError."""

    def __init__(self, path: str) -> None:
        if "bad" in path:
            raise LoadError("the toy does not like this adapter", path=path)
        self.path = path
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ToyEncoding:
    """One image being encoded. Calls the projector's `on_encode`, which may wait for `cancelled`; the rest is quick."""

    def __init__(self, projector: ToyProjector, pixels: Pixels) -> None:
        self.pixels = pixels
        self.cancelled = threading.Event()
        self._projector = projector

    def run(self) -> EncodedImage:
        projector = self._projector
        with projector.lock:
            assert not projector.closed
            projector.encoded.append(self.pixels.digest)
            if projector.on_encode is not None:
                projector.on_encode(self)
            if self.cancelled.is_set():
                raise EngineClosed("encoding was cancelled")
            return projector.image(self.pixels)

    def cancel(self) -> None:
        self.cancelled.set()


class ToyProjector:
    """Makes the items `<`, 2 to 6 rows, `>` of an image. The digest of its pixels decides how many rows.

    `shares_positions` and `causal` are those of the `Media` that it makes. `on_encode(encoding)` is called for each
    image.
    """

    def __init__(self, *, shares_positions: bool = False, causal: bool = True) -> None:
        self.shares_positions, self.causal = shares_positions, causal
        self.digest = b"toy"
        self.on_encode: Callable[[ToyEncoding], None] | None = None
        self.encoded: list[bytes] = []
        """The digests of all images, in the order in which they were encoded."""
        self.lock = threading.Lock()
        self.closed = False

    def encoding(self, pixels: Pixels) -> ToyEncoding:
        return ToyEncoding(self, pixels)

    def image(self, pixels: Pixels) -> EncodedImage:
        n_rows = 2 + pixels.digest[0] % 5
        media = Media(pixels.digest, n_rows, 2 if self.shares_positions else n_rows, self.causal, self.shares_positions)
        rows = np.full((n_rows, N_EMBD), pixels.digest[0], np.float32)
        items: tuple[Item, ...] = (ord("<"), *(MediaRow(media, row) for row in range(n_rows)), ord(">"))
        return EncodedImage(items, {media: EncodedMedia(rows)})

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
        self.adapters: list[ToyAdapter] = []
        self.closed = False

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not self.closed
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        if any(not 0 <= token < N_VOCAB for token in tokens):
            raise InvalidRequest("a token is outside the vocabulary", param="tokens")
        return bytes(token for token in tokens if token != END)

    def piece(self, token: int) -> bytes:
        return self.detokenize([token])

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> ToySampler:
        assert not self.closed
        if "(" in params.grammar:
            raise InvalidGrammar("the toy grammar does not like parentheses")
        if params.json_schema:
            raise Unsupported("schemas", "the toy model takes no schema", param="json_schema")
        self.samplers.append(ToySampler(params))
        return self.samplers[-1]

    def has_schema(self, text: str) -> bool:
        return False

    def adapter(self, path: str) -> ToyAdapter:
        assert not self.closed
        self.adapters.append(ToyAdapter(path))
        return self.adapters[-1]

    def close(self) -> None:
        assert all(sampler.closed for sampler in self.samplers)
        assert all(adapter.closed for adapter in self.adapters)
        self.closed = True
