"""StepOutput: what a step is asked to sample, and what it has sampled or embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trio_runner.core import ports
from trio_runner.core.batch import Batch, Chunk, Sampled, ScoredRow
from trio_runner.errors import InvalidGrammar, NativeError
from trio_runner.events import SampledToken, TokenInfo
from trio_runner.llama.library import last_error, native
from trio_runner.llama.model import Model
from trio_runner.llama.sampler import Sampler
from trio_runner.llama.step_input import OutputRow
from trio_runner.sampling import MAX_LOGPROBS

_MIN_PIECE_BYTES: Final = 256
"""Bytes of each sample's piece, at least: a sample that failed writes its message there."""


class StepOutput:
    """The shim's trio_sample_request and trio_sample_result of one context, with the arrays they point to.

    `n_samples` is the most samples of one step, and `n_embd` the number of elements of an embedding.
    """

    def __init__(self, model: Model, n_samples: int, n_embd: int) -> None:
        loaded = native()
        ffi = loaded.ffi
        self._ffi, self._lib = ffi, loaded.lib
        self._model = model
        self._n_embd = n_embd
        self._rows = ffi.new("int32_t[]", n_samples)
        self._samplers = ffi.new("trio_sampler *[]", n_samples)
        self._grammar_params = ["grammar"] * n_samples
        self.request = ffi.new("trio_sample_request *", {"rows": self._rows, "samplers": self._samplers})
        self._piece_bytes = max(_MIN_PIECE_BYTES, model.native_info.max_piece)
        self._sampled = ffi.new("trio_sampled[]", n_samples)
        self._pieces = ffi.new("char[]", n_samples * self._piece_bytes)
        self._top_tokens = ffi.new("int32_t[]", n_samples * MAX_LOGPROBS)
        self._top_logprobs = ffi.new("float[]", n_samples * MAX_LOGPROBS)
        self.result = ffi.new(
            "trio_sample_result *",
            {
                "sampled": self._sampled,
                "pieces": self._pieces,
                "top_tokens": self._top_tokens,
                "top_logprobs": self._top_logprobs,
                "top_stride": MAX_LOGPROBS,
            },
        )

    def ask(self, outputs: Sequence[OutputRow], samplers: Mapping[int, ports.Sampler]) -> None:
        """Fill the request: sample each of `outputs` with the sampler of its uid."""
        for index, (chunk, row) in enumerate(outputs):
            sampler = samplers[chunk.uid]
            assert isinstance(sampler, Sampler)
            self._rows[index] = row
            self._samplers[index] = sampler.handle
            self._grammar_params[index] = sampler.grammar_param
        self.request.n_samples = len(outputs)
        self.result.pieces_size = len(outputs) * self._piece_bytes

    def read_samples(self, outputs: Sequence[OutputRow]) -> dict[int, Sampled]:
        """Read what was sampled for `outputs`, by uid."""
        return {chunk.uid: self._read_sample(index) for index, (chunk, _) in enumerate(outputs)}

    def _read_sample(self, index: int) -> Sampled:
        raw = self._sampled[index]
        piece = bytes(self._ffi.buffer(self._pieces + raw.piece_offset, raw.piece_length))
        if raw.status < 0:
            message = piece.decode(errors="replace")
            if raw.status == self._lib.TRIO_E_GRAMMAR:
                return Sampled(error=InvalidGrammar(message, param=self._grammar_params[index]))
            return Sampled(error=NativeError("trio_step", raw.status, message))
        if raw.n_top == 0:
            return Sampled(raw.token, piece, bool(raw.is_end), raw.logprob)
        begin = index * MAX_LOGPROBS
        top = tuple(
            TokenInfo(token, self._model.piece(token), logprob)
            for token, logprob in zip(
                self._top_tokens[begin : begin + raw.n_top], self._top_logprobs[begin : begin + raw.n_top], strict=True
            )
        )
        return Sampled(raw.token, piece, bool(raw.is_end), raw.logprob, top)

    def read_scores(
        self, context: Any, batch: Batch, rows: Sequence[tuple[int, Chunk, ScoredRow]]
    ) -> tuple[dict[int, Sampled], dict[int, dict[int, SampledToken]]]:
        """Ask the shim's `context` how probable the tokens after the `rows` of a batch were.

        Returns the failures by uid, and the tokens by uid and by their places in the prompt.
        """
        assert batch.scoring is not None
        failed: dict[int, Sampled] = {}
        scores: dict[int, dict[int, SampledToken]] = {chunk.uid: {} for chunk in batch.chunks}
        logprob = self._ffi.new("float *")
        top_tokens, top_logprobs = self._top_tokens, self._top_logprobs
        for row, chunk, (row_of_chunk, token) in rows:
            n_top = min(batch.scoring[chunk.uid].n_top, self._model.info.n_vocab)
            n_found = self._lib.trio_score(context, row, token, n_top, logprob, top_tokens, top_logprobs)
            if n_found < 0:
                failed[chunk.uid] = Sampled(error=NativeError("trio_score", n_found, last_error()))
                continue
            top = tuple(
                TokenInfo(other, self._model.piece(other), value)
                for other, value in zip(top_tokens[0:n_found], top_logprobs[0:n_found], strict=True)
            )
            found = SampledToken(token, self._model.piece(token), logprob[0], top)
            scores[chunk.uid][chunk.start + row_of_chunk + 1] = found
        return failed, scores

    def read_embeddings(
        self, context: Any, outputs: Sequence[OutputRow]
    ) -> tuple[dict[int, Sampled], dict[int, object]]:
        """Copy the embeddings of `outputs` out of the shim's `context`.

        Returns the failures and the embeddings, both by uid. An embedding is an array of `n_embd` floats.
        """
        failed: dict[int, Sampled] = {}
        vectors: dict[int, object] = {}
        for chunk, row in outputs:
            vector: NDArray[np.float32] = np.empty(self._n_embd, np.float32)
            values = self._ffi.from_buffer("float[]", vector)
            code = self._lib.trio_embedding(context, chunk.slot, row, values, self._n_embd)
            if code < 0:
                failed[chunk.uid] = Sampled(error=NativeError("trio_embedding", code, last_error()))
            else:
                vectors[chunk.uid] = vector
        return failed, vectors
