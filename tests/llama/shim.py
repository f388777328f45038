"""The shim's functions, called without the checks of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.llama.pictures import picture
from tests.llama.running import Running, tokens_of
from trio_runner.llama.library import last_error, native

Integers: TypeAlias = Sequence[int] | None
"""Values of an array; None gives the shim a null pointer."""


class Shim:
    """The shim's functions, beside a model and its context that Python has opened.

    Native structures point to arrays that cffi frees with their last Python reference. So the shim keeps all of them.
    """

    def __init__(self, running: Running) -> None:
        loaded = native()
        self.ffi, self.lib = loaded.ffi, loaded.lib
        self.running = running
        self.model = running.model.handle
        self.context = running.context.handle
        self._kept: list[object] = []

    def refused(self, function: str, *arguments: object) -> None:
        """Call `function`, which must return TRIO_E_INVALID and leave a message."""
        assert getattr(self.lib, function)(*arguments) == self.lib.TRIO_E_INVALID, function
        assert last_error()

    def text(self) -> list[int]:
        """The tokens that the model generates after a prompt, to see that it still works."""
        return tokens_of(self.running.generate("the model"))

    def batch(
        self,
        *,
        tokens: Integers = (5,),
        positions: Integers = (0,),
        seqs: Integers = (0,),
        outputs: Integers = (1,),
        n_rows: int | None = None,
        embeddings: int = 0,
    ) -> Any:
        """A trio_batch of tokens. It has as many rows as `tokens`, or one, unless `n_rows` says otherwise."""
        arrays = {"tokens": tokens, "positions": positions, "seqs": seqs}
        fields = {name: self._array("int32_t[]", values) for name, values in arrays.items()}
        fields["outputs"] = self._array("int8_t[]", outputs)
        fields["n_rows"] = len(tokens or [0]) if n_rows is None else n_rows
        return self.ffi.new("trio_batch *", {**fields, "embeddings": embeddings})

    def encoder_batch(
        self,
        *,
        tokens: Integers = (5, 6),
        positions: Integers = (0, 1),
        seqs: Integers = (0, 0),
        outputs: Integers = None,
        n_rows: int = 2,
    ) -> Any:
        """A trio_batch of two tokens, as trio_encode takes it: without outputs."""
        return self.batch(tokens=tokens, positions=positions, seqs=seqs, outputs=outputs, n_rows=n_rows)

    def image_batch(self, n_rows: int = 2, /, **changes: NDArray[Any] | int) -> Any:
        """A trio_batch of rows of an image, all zero, with the fields in `changes` instead of its own."""
        n_positions = 4 if self.running.projector.has_mrope else 1
        fields: dict[str, NDArray[Any] | int] = {
            "inputs": np.zeros((n_rows, 64), np.float32),
            "positions": np.tile(np.arange(n_rows, dtype=np.int32), n_positions),
            "seqs": np.zeros(n_rows, np.int32),
            "outputs": np.zeros(n_rows, np.int8),
            "n_rows": n_rows,
        }
        types = {"inputs": "float[]", "outputs": "int8_t[]"}
        native_fields = {
            name: self._keep(self.ffi.from_buffer(types.get(name, "int32_t[]"), np.ascontiguousarray(value)))
            if isinstance(value, np.ndarray)
            else value
            for name, value in (fields | changes).items()
        }
        return self.ffi.new("trio_batch *", native_fields)

    def request(self, rows: Sequence[int], samplers: Sequence[Any]) -> tuple[Any, Any]:
        """A trio_sample_request for `rows` with the handles of `samplers`, and a trio_sample_result for it."""
        samples = self._keep(self.ffi.new("trio_sampled[]", len(rows)))
        pieces = self._keep(self.ffi.new("char[]", 512))
        request = {
            "n_samples": len(rows),
            "rows": self._array("int32_t[]", rows),
            "samplers": self._array("trio_sampler *[]", samplers),
        }
        result = {"sampled": samples, "pieces": pieces, "pieces_size": 512}
        return self.ffi.new("trio_sample_request *", request), self.ffi.new("trio_sample_result *", result)

    def media(self, width: int = 56, height: int = 56) -> Any:
        """A trio_media of a picture, for the projector that was opened with the model."""
        pixels = picture(width, height)
        out = self.ffi.new("trio_media **")
        data = self.ffi.from_buffer("uint8_t[]", pixels.data)
        projector = self.running.projector.handle
        assert self.lib.trio_media_open(projector, data, len(pixels.data), width, height, out) == 0
        return self.ffi.gc(out[0], self.lib.trio_media_free)

    def _array(self, kind: str, values: Sequence[Any] | None) -> Any:
        return self.ffi.NULL if values is None else self._keep(self.ffi.new(kind, list(values)))

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value
