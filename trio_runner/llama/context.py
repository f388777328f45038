"""Context: the KV cache, and the one call per step that decodes a batch and samples from it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import MAX_SLOTS, EngineConfig
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.engine import runtime
from trio_runner.errors import EngineClosed, InvalidGrammar, LoadError, NativeError, RunnerError
from trio_runner.events import TokenInfo
from trio_runner.llama.adapter import Adapter
from trio_runner.llama.library import check, drain_log, last_error, native
from trio_runner.llama.model import Model
from trio_runner.llama.sampler import Sampler
from trio_runner.request import MAX_LOGPROBS, SamplingParams

DEFAULT_CONTEXT_LENGTH: Final = 4096
"""What a slot holds unless told otherwise, at most: models trained for a million tokens would want all memory."""

_MAX_SEQUENCES: Final = 2 * MAX_SLOTS
_MIN_PIECE_BYTES: Final = 256  # a sample that failed writes its message where its piece would go
_GGML_TYPES: Final = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
_POOLINGS: Final = {"none": 0, "mean": 1, "cls": 2, "last": 3}
_POOLING_NONE: Final = 0
_POOLING_LAST: Final = 3
_POOLING_RANK: Final = 4


def default_threads() -> tuple[int, int]:
    """Threads to decode with, and to prefill with.

    Prefill: one per physical core that this process may use. Decoding, one fewer: its threads meet after every short
    operation and wait by spinning, so one core that is taken away, be it by our own event loop, stalls the others. On
    two cores, two threads decoded four streams 1.25 times as fast as one on an idle machine, and not half as fast
    beside another busy process. A CPU quota of the container counts.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # not Linux: every CPU counts as a core
            cores.add(str(cpu))
    n_cores = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            n_cores = min(n_cores, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return max(1, n_cores - 1), max(1, n_cores)


class Context:
    """A context of a loaded model: `trio_runner.engine.runtime.Context` over llama.cpp.

    Creating it decodes two tokens to see what its memory can do, and to refuse a model that computes rubbish. Raises
    `LoadError` where llama.cpp cannot create it: no memory, a setting that this model does not allow, a damaged file.
    """

    def __init__(self, model: Model, config: EngineConfig, adapters: tuple[Adapter, ...] = ()) -> None:
        loaded = native()
        self._ffi, self._lib = loaded.ffi, loaded.lib
        self._model = model
        n_ctx = config.context_length or min(max(model.info.n_ctx_train, 1), DEFAULT_CONTEXT_LENGTH)
        n_threads, n_threads_batch = (config.threads, config.threads) if config.threads else default_threads()
        pooling = _POOLINGS.get(config.pooling, model.native_info.pooling_type)
        # Behind the slots for text that may be in use, spare ones, and as many again for embeddings alone.
        n_spare = min(config.slots, _MAX_SEQUENCES - 2 * config.slots)
        n_seq_max = 2 * config.slots + n_spare
        n_batch = max(config.batch_size, n_seq_max)  # llama.cpp plans for an output of every sequence
        params = self._ffi.new(
            "trio_context_params *",
            {
                "n_ctx": n_ctx * config.slots + n_batch,
                "n_batch": n_batch,
                "n_ubatch": n_batch,
                "n_seq_max": n_seq_max,
                "n_threads": n_threads,
                "n_threads_batch": n_threads_batch,
                "flash_attention": _FLASH_ATTENTION[config.flash_attention],
                "type_k": _GGML_TYPES[config.kv_type],
                "type_v": _GGML_TYPES[config.kv_type],
                "pooling_type": _POOLING_LAST if pooling < 0 else pooling,
                "offload_kqv": True,
                # A window-sized cache forgets what a trimmed slot needs and cannot shift.
                "swa_full": True,
            },
        )
        out = self._ffi.new("trio_context **")
        try:
            check("trio_context_open", self._lib.trio_context_open(model.handle, params, out))
        except NativeError as failure:
            raise LoadError(f"no context could be created: {failure.message}", path=model.path) from failure
        finally:
            drain_log()
        self._handle: Any = self._ffi.gc(out[0], self._lib.trio_context_free)
        info = self._ffi.new("trio_context_info *")
        check("trio_context_get_info", self._lib.trio_context_get_info(self._handle, info))
        self._n_embd_out = int(info.n_embd_out)
        self._has_memory = bool(info.has_memory)
        self._allocate(config)
        self._set_adapters(adapters)

        has_vocab = bool(model.native_info.has_vocab)
        can_generate = self._has_memory and info.pooling_type != _POOLING_RANK and has_vocab
        n_positions = min(n_ctx, int(info.n_positions))
        is_recurrent = bool(model.native_info.is_recurrent or model.native_info.is_hybrid)
        pools_last_row = info.pooling_type in (_POOLING_NONE, _POOLING_LAST)
        try:
            can_trim = self._warm_up(can_generate)
        except RunnerError as failure:
            raise LoadError(f"the model does not work: {failure}", path=model.path) from failure
        finally:
            drain_log()
        self._limits = Limits(
            n_slots=config.slots,
            # Attention that looks both ways, or a memory that keeps nothing, needs the whole text in one step.
            n_ctx=n_positions if self._has_memory and info.causal else min(n_positions, config.batch_size),
            max_rows=config.batch_size,
            n_spare_slots=n_spare,
            n_embed_slots=config.slots,
            embeds_last_row=self._has_memory and bool(info.causal) and pools_last_row and not is_recurrent,
            has_memory=self._has_memory,
            can_trim=can_trim,
            # A recurrent state claims that it can shift, but the part to drop cannot be taken out of it.
            can_shift=bool(info.can_shift) and can_trim,
            can_generate=can_generate,
        )

    def _allocate(self, config: EngineConfig) -> None:
        """The arrays that every step reuses, and the structures that point to them."""
        ffi = self._ffi
        n_rows, n_samples = config.batch_size, config.slots
        self._max_rows = n_rows
        self._positions_from_zero: NDArray[np.int32] = np.arange(n_rows, dtype=np.int32)
        self._tokens: NDArray[np.int32] = np.zeros(n_rows, np.int32)
        self._positions: NDArray[np.int32] = np.zeros(n_rows, np.int32)
        self._seqs: NDArray[np.int32] = np.zeros(n_rows, np.int32)
        self._outputs: NDArray[np.int8] = np.zeros(n_rows, np.int8)
        self._batch = ffi.new(
            "trio_batch *",
            {
                "tokens": ffi.from_buffer("int32_t[]", self._tokens),
                "positions": ffi.from_buffer("int32_t[]", self._positions),
                "seqs": ffi.from_buffer("int32_t[]", self._seqs),
                "outputs": ffi.from_buffer("int8_t[]", self._outputs),
            },
        )
        self._rows = ffi.new("int32_t[]", n_samples)
        self._samplers = ffi.new("trio_sampler *[]", n_samples)
        self._request = ffi.new("trio_sample_request *", {"rows": self._rows, "samplers": self._samplers})
        self._piece_bytes = max(_MIN_PIECE_BYTES, self._model.native_info.max_piece)
        self._sampled = ffi.new("trio_sampled[]", n_samples)
        self._pieces = ffi.new("char[]", n_samples * self._piece_bytes)
        self._top_tokens = ffi.new("int32_t[]", n_samples * MAX_LOGPROBS)
        self._top_logprobs = ffi.new("float[]", n_samples * MAX_LOGPROBS)
        self._result = ffi.new(
            "trio_sample_result *",
            {
                "sampled": self._sampled,
                "pieces": self._pieces,
                "top_tokens": self._top_tokens,
                "top_logprobs": self._top_logprobs,
                "top_stride": MAX_LOGPROBS,
            },
        )
        self._outcomes = {
            self._lib.TRIO_OK: DecodeOutcome.OK,
            self._lib.TRIO_NO_KV_SPACE: DecodeOutcome.NO_KV_SPACE,
            self._lib.TRIO_ABORTED: DecodeOutcome.ABORTED,
            self._lib.TRIO_E_INVALID: DecodeOutcome.INVALID,
            self._lib.TRIO_E_FATAL: DecodeOutcome.FATAL,
        }

    def _set_adapters(self, adapters: tuple[Adapter, ...]) -> None:
        if not adapters:
            return
        handles = self._ffi.new("trio_adapter *[]", [adapter.handle for adapter in adapters])
        scales = self._ffi.new("float[]", [adapter.scale for adapter in adapters])
        code = self._lib.trio_context_set_adapters(self._handle, handles, scales, len(adapters))
        check("trio_context_set_adapters", code)

    def _warm_up(self, can_generate: bool) -> bool:
        """Decode two tokens, check that numbers come out, and leave the memory empty. Tells whether it can trim."""
        token = max(self._model.native_info.token_bos, 0)
        if can_generate:
            sampler = self._model.sampler(SamplingParams(temperature=0.0, repeat_penalty=1.0), ())
            samplers: dict[int, runtime.Sampler] = {0: sampler}
            self._warm_up_step(Batch((Chunk(0, 0, 0, (token,), output=False),)), samplers)
            self._warm_up_step(Batch((Chunk(0, 0, 1, (token,), output=True),)), samplers)
            sampler.close()
        else:
            self._warm_up_step(Batch((Chunk(0, 0, 0, (token,), output=True),), embeddings=True), {})
            if self._has_memory:
                self._warm_up_step(Batch((Chunk(0, 0, 1, (token,), output=True),), embeddings=True), {})
        can_trim = self.apply(Trim(0, 1))
        self.apply(Trim(0, 0))
        return can_trim

    def _warm_up_step(self, batch: Batch, samplers: Mapping[int, runtime.Sampler]) -> None:
        result = self.decode(batch, samplers)
        if result.outcome is not DecodeOutcome.OK:
            raise NativeError("trio_step", self._lib.TRIO_E_FATAL, result.message or result.outcome.value)
        for sampled in result.sampled.values():
            if sampled.error is not None:
                raise sampled.error

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def handle(self) -> Any:
        """The shim's trio_context. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the context has been closed")
        return self._handle

    def apply(self, op: MemoryOp) -> bool:
        """Edit the KV cache. False: this memory cannot trim part of a slot; nothing changed. Raises `NativeError`."""
        lib, handle = self._lib, self.handle
        match op:
            case Trim(slot, start, end):
                code = lib.trio_seq_remove(handle, slot, start, -1 if end is None else end)
                return check("trio_seq_remove", code) == 1
            case Copy(source, target, end):
                check("trio_seq_copy", lib.trio_seq_copy(handle, source, target, 0, end))
            case Slide(slot, start, end, delta):
                check("trio_seq_add", lib.trio_seq_add(handle, slot, start, end, delta))
        return True

    def length(self, slot: int) -> int:
        """Positions that `slot` holds: one more than the last, 0 when empty. Raises `NativeError`."""
        first, last = self._ffi.new("int32_t *"), self._ffi.new("int32_t *")
        check("trio_seq_range", self._lib.trio_seq_range(self.handle, slot, first, last))
        return int(last[0]) + 1

    def decode(self, batch: Batch, samplers: Mapping[int, runtime.Sampler]) -> StepResult:
        """Run one batch and sample its outputs with the samplers of their uids.

        Raises `NativeError` when the context cannot be used any more; everything else is an outcome. A recurrent model
        keeps nothing of the batch's slots after ABORTED and FATAL.
        """
        handle = self.handle
        if batch.n_rows > self._max_rows:
            message = f"the batch has {batch.n_rows} rows, but at most {self._max_rows} are allowed"
            return StepResult(DecodeOutcome.INVALID, {}, {}, {}, message=message)
        started = time.perf_counter()
        n_rows, outputs = self._fill_rows(batch)
        if not batch.embeddings:
            self._fill_request(outputs, samplers)
        request, result = (self._ffi.NULL, self._ffi.NULL) if batch.embeddings else (self._request, self._result)
        self._batch.n_rows = n_rows
        self._batch.embeddings = batch.embeddings
        self._batch.number = batch.number
        code = self._lib.trio_step(handle, self._batch, request, result)
        outcome = self._outcomes.get(code)
        if outcome is None:
            check("trio_step", code)
            raise NativeError("trio_step", code, "unknown code")
        if outcome is not DecodeOutcome.OK:
            message = last_error()
            # llama.cpp calls it an error when a batch is broken off; to us it is what was asked for.
            drain_log(at_most=logging.DEBUG if outcome is DecodeOutcome.ABORTED else logging.CRITICAL)
            keeps_part = outcome in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL)
            kept = {chunk.uid: self.length(chunk.slot) for chunk in batch.chunks} if keeps_part else {}
            return StepResult(outcome, {}, {}, kept, time.perf_counter() - started, message)
        sampled: dict[int, Sampled] = {}
        vectors: dict[int, object] = {}
        if batch.embeddings:
            self._read_vectors(outputs, sampled, vectors)
        else:
            for index, (chunk, _) in enumerate(outputs):
                sampled[chunk.uid] = self._read_sampled(index)
        return StepResult(outcome, sampled, vectors, {}, time.perf_counter() - started)

    def _fill_rows(self, batch: Batch) -> tuple[int, list[tuple[Chunk, int]]]:
        """Lay the chunks out as rows. Returns the number of rows, and each chunk with output with its last row."""
        tokens, positions, seqs, flags = self._tokens, self._positions, self._seqs, self._outputs
        outputs: list[tuple[Chunk, int]] = []
        row = 0
        for chunk in batch.chunks:
            n_tokens = len(chunk.items)
            if n_tokens == 1:  # most rows of most steps
                tokens[row] = chunk.items[0]
                positions[row] = chunk.start
                seqs[row] = chunk.slot
                flags[row] = 0
                row += 1
            else:
                stop = row + n_tokens
                tokens[row:stop] = chunk.items
                np.add(self._positions_from_zero[:n_tokens], chunk.start, out=positions[row:stop])
                seqs[row:stop] = chunk.slot
                flags[row:stop] = 0
                row = stop
            if chunk.output and n_tokens:
                flags[row - 1] = 1
                outputs.append((chunk, row - 1))
        return row, outputs

    def _fill_request(self, outputs: list[tuple[Chunk, int]], samplers: Mapping[int, runtime.Sampler]) -> None:
        for index, (chunk, row) in enumerate(outputs):
            sampler = samplers[chunk.uid]
            assert isinstance(sampler, Sampler)
            self._rows[index] = row
            self._samplers[index] = sampler.handle
        self._request.n_samples = len(outputs)
        self._result.pieces_size = len(outputs) * self._piece_bytes

    def _read_sampled(self, index: int) -> Sampled:
        raw = self._sampled[index]
        piece = bytes(self._ffi.buffer(self._pieces + raw.piece_offset, raw.piece_length))
        if raw.status < 0:
            message = piece.decode(errors="replace")
            if raw.status == self._lib.TRIO_E_GRAMMAR:
                return Sampled(error=InvalidGrammar(message))
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

    def _read_vectors(
        self, outputs: list[tuple[Chunk, int]], sampled: dict[int, Sampled], vectors: dict[int, object]
    ) -> None:
        for chunk, row in outputs:
            vector: NDArray[np.float32] = np.empty(self._n_embd_out, np.float32)
            values = self._ffi.from_buffer("float[]", vector)
            code = self._lib.trio_embedding(self.handle, chunk.slot, row, values, self._n_embd_out)
            if code < 0:
                sampled[chunk.uid] = Sampled(error=NativeError("trio_embedding", code, last_error()))
            else:
                vectors[chunk.uid] = vector

    def abort(self, number: int) -> None:
        """Make `decode` of the batch of this number, running or yet to start, return ABORTED; 0 withdraws that. Only
        CPU backends stop in the middle. From any thread; never blocks."""
        handle = self._handle  # a reference of our own, for close() may come in between
        if handle is not None:
            self._lib.trio_abort(handle, number)

    def close(self) -> None:
        """Free it. Idempotent."""
        self._handle = None
