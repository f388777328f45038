"""StepInput: a batch laid out as the rows that the shim's trio_step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from trio_runner.core.batch import Batch, Chunk, ScoredRow
from trio_runner.core.ports import EncodedMedia
from trio_runner.core.prompt import Media, MediaRow
from trio_runner.llama.library import native

OutputRow: TypeAlias = tuple[Chunk, int]
"""A chunk with output, and the row of the batch that is its last. A plain tuple: every token of every stream takes one,
and a named one takes several times as long to make."""


class StepInput:
    """The shim's trio_batch of one context, and the arrays it points to. Every step fills them anew.

    `n_input_positions` is the number of positions that one row of an image has: 1, or 4 with M-RoPE.
    """

    def __init__(self, max_rows: int, n_input_positions: int) -> None:
        ffi = native().ffi
        self.max_rows = max_rows
        self._null = ffi.NULL
        self._from_buffer = ffi.from_buffer
        self._n_input_positions = n_input_positions
        self._positions_from_zero: NDArray[np.int32] = np.arange(max_rows, dtype=np.int32)
        self._tokens: NDArray[np.int32] = np.zeros(max_rows, np.int32)
        self._positions: NDArray[np.int32] = np.zeros(max_rows * n_input_positions, np.int32)
        self._seqs: NDArray[np.int32] = np.zeros(max_rows, np.int32)
        self._outputs: NDArray[np.int8] = np.zeros(max_rows, np.int8)
        self._native_tokens = ffi.from_buffer("int32_t[]", self._tokens)
        self.native = ffi.new(
            "trio_batch *",
            {
                "tokens": self._native_tokens,
                "positions": ffi.from_buffer("int32_t[]", self._positions),
                "seqs": ffi.from_buffer("int32_t[]", self._seqs),
                "outputs": ffi.from_buffer("int8_t[]", self._outputs),
            },
        )

    def fill(self, batch: Batch, inputs: NDArray[np.float32] | None = None) -> list[OutputRow]:
        """Lay `batch` out, of at most `max_rows` rows. Returns the rows whose outputs it wants, in order.

        For rows of images, `inputs` is what `fill_media` has returned. It must stay alive until the step has run.
        """
        native_batch = self.native
        native_batch.n_rows, outputs = self._fill_rows(batch)
        native_batch.inputs = self._null if inputs is None else self._from_buffer("float[]", inputs)
        native_batch.tokens = self._native_tokens if inputs is None else self._null
        native_batch.non_causal = not batch.kind.causal
        native_batch.embeddings = batch.kind.embedding
        native_batch.number = batch.number
        return outputs

    def fill_media(self, batch: Batch, media: Mapping[Media, EncodedMedia]) -> NDArray[np.float32]:
        """Lay out the positions of a batch of rows of images. Returns the rows, shape (n_rows, n_embd)."""
        n_rows = batch.n_rows
        positions = self._positions[: n_rows * self._n_input_positions].reshape(self._n_input_positions, n_rows)
        parts: list[NDArray[np.float32]] = []
        row = 0
        for chunk in batch.chunks:
            first = chunk.items[0]
            assert isinstance(first, MediaRow)
            encoded, begin, end = media[first.media], first.row, first.row + len(chunk.items)
            parts.append(encoded.rows[begin:end])
            own = positions[:, row : row + len(chunk.items)]
            if encoded.positions is None:
                own[:] = np.arange(chunk.position, chunk.position + len(chunk.items), dtype=np.int32)
            else:
                own[:] = encoded.positions[:, begin:end]
                # Not the last of four: see trio_media_positions().
                own[:3] += chunk.position - encoded.positions[0, begin]
            row += len(chunk.items)
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _fill_rows(self, batch: Batch) -> tuple[int, list[OutputRow]]:
        """Write everything that rows of tokens and of images have in common. Returns the number of rows, too."""
        tokens, positions, seqs, flags = self._tokens, self._positions, self._seqs, self._outputs
        of_media = batch.kind.of_media
        outputs: list[OutputRow] = []
        row = 0
        for chunk in batch.chunks:
            items = cast("tuple[int, ...]", chunk.items)  # unless they are rows of an image
            n_items = len(items)
            if n_items == 1 and not of_media:  # most rows of most steps
                tokens[row] = items[0]
                positions[row] = chunk.position
                seqs[row] = chunk.slot
                flags[row] = 0
                row += 1
            else:
                stop = row + n_items
                if not of_media:
                    tokens[row:stop] = items
                    np.add(self._positions_from_zero[:n_items], chunk.position, out=positions[row:stop])
                seqs[row:stop] = chunk.slot
                flags[row:stop] = 0
                row = stop
            if chunk.output and n_items:
                flags[row - 1] = 1
                outputs.append((chunk, row - 1))
        if batch.scoring is not None:
            for scored_row, _, _ in self.scored_rows(batch):
                flags[scored_row] = 1
        return row, outputs

    @staticmethod
    def scored_rows(batch: Batch) -> list[tuple[int, Chunk, ScoredRow]]:
        """The rows of a batch that is scored which a token of the prompt follows: the row of the batch, its chunk, and
        the row of the chunk with that token."""
        assert batch.scoring is not None
        rows: list[tuple[int, Chunk, ScoredRow]] = []
        begin = 0
        for chunk in batch.chunks:
            rows += [(begin + scored[0], chunk, scored) for scored in batch.scoring[chunk.uid].rows(chunk)]
            begin += len(chunk.items)
        return rows
