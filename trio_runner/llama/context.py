"""Context: the KV cache, and the one call per step that decodes a batch and samples from it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import MAX_SLOTS, EngineConfig
from trio_runner.core.batch import AdapterSet, Batch, Chunk, DecodeOutcome, Sampled, StepResult
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.core.placement import MemoryUse
from trio_runner.core.prompt import Media, MediaRow
from trio_runner.engine import runtime
from trio_runner.engine.runtime import NO_ADAPTERS, NO_MEDIA, EncodedMedia
from trio_runner.errors import EngineClosed, InvalidGrammar, LoadError, NativeError, RunnerError
from trio_runner.events import TokenInfo
from trio_runner.llama.adapter import Adapter
from trio_runner.llama.backends import GGML_TYPES
from trio_runner.llama.library import FLASH_ATTENTION, check, drain_log, last_error, native
from trio_runner.llama.model import Model
from trio_runner.llama.sampler import Sampler
from trio_runner.request import MAX_LOGPROBS, SamplingParams

DEFAULT_CONTEXT_LENGTH: Final = 4096
"""What a slot holds unless told otherwise, at most: models trained for a million tokens would want all memory."""

_MAX_SEQUENCES: Final = 2 * MAX_SLOTS
_EMBEDDER_LANES: Final = 64
"""Texts that a model made for embeddings takes in one batch, if they fit."""
_WIDE: Final = 64
"""Rows from which on backends compute as they do for the widest of batches."""
_MIN_PIECE_BYTES: Final = 256  # a sample that failed writes its message where its piece would go
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a context of a model is made with."""

    n_ctx: int
    """Positions of one slot."""
    n_spare: int
    n_embed: int
    params: dict[str, Any]
    """The fields of the shim's trio_context_params."""


def _plan(model: Model, config: EngineConfig) -> _Plan:
    n_ctx = config.context_length or min(max(model.info.n_ctx_train, 1), DEFAULT_CONTEXT_LENGTH)
    n_threads, n_threads_batch = (config.threads, config.threads) if config.threads else default_threads()
    pooling = _POOLINGS.get(config.pooling, model.native_info.pooling_type)
    # Behind the slots for text that may be in use, spare ones, and then those for embeddings alone. With a sliding
    # window, each takes two of llama.cpp's sequences, or cannot be trimmed.
    n_max = _MAX_SEQUENCES // 2 if model.native_info.n_swa else _MAX_SEQUENCES
    if 2 * config.slots > n_max:
        n_max = _MAX_SEQUENCES
    n_spare = min(config.slots, n_max - 2 * config.slots)
    is_embedder = not model.info.causal or pooling > _POOLING_NONE
    n_embed = max(config.slots, min(_EMBEDDER_LANES, n_max - config.slots - n_spare) if is_embedder else 0)
    n_seq_max = config.slots + n_spare + n_embed
    n_batch = max(config.batch_size, n_seq_max)  # llama.cpp plans for an output of every sequence
    params = {
        "n_ctx": n_ctx * config.slots + n_batch,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "n_seq_max": n_seq_max,
        "n_threads": n_threads,
        "n_threads_batch": n_threads_batch,
        "flash_attention": FLASH_ATTENTION[config.flash_attention],
        "type_k": GGML_TYPES[config.kv_type],
        "type_v": GGML_TYPES[config.kv_type],
        "pooling_type": _POOLING_LAST if pooling < 0 else pooling,
        "offload_kqv": True,
        # A window-sized cache forgets what a trimmed slot needs and cannot shift.
        "swa_full": True,
    }
    return _Plan(n_ctx, n_spare, n_embed, params)


def _open(model: Model, plan: _Plan) -> Any:
    """The shim's trio_context. Raises `LoadError`."""
    loaded = native()
    params = loaded.ffi.new("trio_context_params *", plan.params)
    out = loaded.ffi.new("trio_context **")
    try:
        check("trio_context_open", loaded.lib.trio_context_open(model.handle, params, out))
    except NativeError as failure:
        raise LoadError(f"no context could be created: {failure.message}", path=model.path) from failure
    finally:
        drain_log()
    return loaded.ffi.gc(out[0], loaded.lib.trio_context_free)


def _memory(handle: Any) -> tuple[MemoryUse, ...]:
    loaded = native()
    n_max = 64
    entries = loaded.ffi.new("trio_memory[]", n_max)
    n = min(n_max, check("trio_context_memory", loaded.lib.trio_context_memory(handle, entries, n_max)))
    return tuple(
        MemoryUse(None if entry.device < 0 else entry.device, entry.model, entry.context, entry.compute)
        for entry in entries[0:n]
    )


def measure(model: Model, config: EngineConfig) -> tuple[MemoryUse, ...]:
    """What a model that was opened with `no_alloc` and a context for `config` would take. Raises `LoadError`."""
    return _memory(_open(model, _plan(model, config)))


class Context:
    """A context of a loaded model: `trio_runner.engine.runtime.Context` over llama.cpp.

    Creating it decodes two tokens to see what its memory can do, and to refuse a model that computes rubbish. With
    `on_devices` a wide batch, too: what backends allocate and compile at the first use is then there, or is missed
    while fewer layers can still be tried. Raises `LoadError` where llama.cpp cannot create it: no memory, a setting
    that this model does not allow, a damaged file.
    """

    def __init__(self, model: Model, config: EngineConfig, *, on_devices: bool = False) -> None:
        loaded = native()
        self._ffi, self._lib = loaded.ffi, loaded.lib
        self._model = model
        plan = _plan(model, config)
        n_ctx, n_spare, n_embed = plan.n_ctx, plan.n_spare, plan.n_embed
        self._handle: Any = _open(model, plan)
        info = self._ffi.new("trio_context_info *")
        check("trio_context_get_info", self._lib.trio_context_get_info(self._handle, info))
        self._n_embd_out = int(info.n_embd_out)
        self._n_embd_in = int(info.n_embd_in)
        self._n_input_positions = int(info.n_input_positions)
        self._has_memory = bool(info.has_memory)
        self._has_encoder = bool(info.has_encoder)
        self._adapters: AdapterSet = ()  # that are set
        self._sources: dict[int, tuple[int, ...]] = {}  # what the encoder has read, by slot
        self._allocate(config)

        has_vocab = bool(model.native_info.has_vocab)
        can_generate = self._has_memory and info.pooling_type != _POOLING_RANK and has_vocab
        n_positions = min(n_ctx, int(info.n_positions))
        is_recurrent = bool(model.native_info.is_recurrent or model.native_info.is_hybrid)
        pools_last_row = info.pooling_type in (_POOLING_NONE, _POOLING_LAST)
        try:
            if on_devices:
                self._warm_up_rows(min(n_positions, config.batch_size, _WIDE), can_generate)
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
            n_embed_slots=n_embed,
            embeds_last_row=self._has_memory and bool(info.causal) and pools_last_row and not is_recurrent,
            has_memory=self._has_memory,
            can_trim=can_trim,
            # A recurrent state claims that it can shift, but the part to drop cannot be taken out of it.
            can_shift=bool(info.can_shift) and can_trim,
            can_generate=can_generate,
            ranks=info.pooling_type == _POOLING_RANK,
            n_vector=self._n_embd_out,
            decoder_start=int(info.decoder_start) if self._has_encoder else None,
        )

    def _allocate(self, config: EngineConfig) -> None:
        """The arrays that every step reuses, and the structures that point to them."""
        ffi = self._ffi
        n_rows, n_samples = config.batch_size, config.slots
        self._max_rows = n_rows
        self._positions_from_zero: NDArray[np.int32] = np.arange(n_rows, dtype=np.int32)
        self._tokens: NDArray[np.int32] = np.zeros(n_rows, np.int32)
        self._positions: NDArray[np.int32] = np.zeros(n_rows * self._n_input_positions, np.int32)
        self._seqs: NDArray[np.int32] = np.zeros(n_rows, np.int32)
        self._outputs: NDArray[np.int8] = np.zeros(n_rows, np.int8)
        self._native_tokens = ffi.from_buffer("int32_t[]", self._tokens)
        self._batch = ffi.new(
            "trio_batch *",
            {
                "tokens": self._native_tokens,
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

    def _warm_up(self, can_generate: bool) -> bool:
        """Decode two tokens, check that numbers come out, and leave the memory empty. Tells whether it can trim."""
        token = max(self._model.native_info.token_bos, 0)
        source = (token,) if self._has_encoder else ()
        if can_generate:
            sampler = self._model.sampler(SamplingParams(temperature=0.0, repeat_penalty=1.0), ())
            samplers: dict[int, runtime.Sampler] = {0: sampler}
            self._warm_up_step(Batch((Chunk(0, 0, 0, (token,), output=False, source=source),)), samplers)
            self._warm_up_step(Batch((Chunk(0, 0, 1, (token,), output=True, source=source),)), samplers)
            sampler.close()
        else:
            self._warm_up_step(Batch((Chunk(0, 0, 0, (token,), output=True),), embeddings=True), {})
            if self._has_memory:
                self._warm_up_step(Batch((Chunk(0, 0, 1, (token,), output=True),), embeddings=True), {})
        can_trim = self.apply(Trim(0, 1))
        self.apply(Trim(0, 0))
        return can_trim

    def _warm_up_rows(self, n_rows: int, can_generate: bool) -> None:
        """Decode a batch that goes the way of prompts."""
        tokens = (max(self._model.native_info.token_bos, 0),) * n_rows
        if can_generate:
            batch = Batch((Chunk(0, 0, 0, tokens, output=False, source=tokens[:1] if self._has_encoder else ()),))
        else:
            batch = Batch((Chunk(0, 0, 0, tokens, output=True),), embeddings=True)
        self._warm_up_step(batch, {})
        self.apply(Trim(0, 0))

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
    def memory(self) -> tuple[MemoryUse, ...]:
        """What it takes with its model, by device."""
        return _memory(self.handle)

    @property
    def takes_rows(self) -> bool:
        """Whether rows of images can take the place of tokens."""
        return self._n_embd_in > 0

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

    def decode(
        self,
        batch: Batch,
        samplers: Mapping[int, runtime.Sampler],
        *,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        adapters: Mapping[int, runtime.Adapter] = NO_ADAPTERS,
    ) -> StepResult:
        """Run one batch and sample its outputs with the samplers of their uids; `media` and `adapters` have what the
        batch names.

        Raises `NativeError` when the context cannot be used any more; everything else is an outcome. A recurrent model
        keeps nothing of the batch's slots after ABORTED and FATAL.
        """
        handle = self.handle
        n_rows = max(batch.n_rows, sum(len(chunk.source) for chunk in batch.chunks))
        if n_rows > self._max_rows:
            message = f"the batch has {n_rows} rows, but at most {self._max_rows} are allowed"
            return StepResult(DecodeOutcome.INVALID, {}, {}, {}, message=message)
        started = time.perf_counter()
        self._set_adapters(batch.adapters, adapters)
        outcome = self._encode_sources(batch) if self._has_encoder else DecodeOutcome.OK
        if outcome is DecodeOutcome.OK:
            self._batch.n_rows, outputs = self._fill_rows(batch)
            inputs = self._fill_inputs(batch, media) if batch.of_media else None
            self._batch.inputs = self._ffi.NULL if inputs is None else self._ffi.from_buffer("float[]", inputs)
            self._batch.tokens = self._native_tokens if inputs is None else self._ffi.NULL
            self._batch.non_causal = not batch.causal
            if not batch.embeddings:
                self._fill_request(outputs, samplers)
            request, result = (self._ffi.NULL, self._ffi.NULL) if batch.embeddings else (self._request, self._result)
            self._batch.embeddings = batch.embeddings
            self._batch.number = batch.number
            outcome = self._outcome("trio_step", self._lib.trio_step(handle, self._batch, request, result))
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

    def _outcome(self, function: str, code: int) -> DecodeOutcome:
        outcome = self._outcomes.get(code)
        if outcome is None:
            check(function, code)
            raise NativeError(function, code, "unknown code")
        return outcome

    def _set_adapters(self, wanted: AdapterSet, adapters: Mapping[int, runtime.Adapter]) -> None:
        if wanted == self._adapters:
            return
        handles = []
        for uid, _ in wanted:
            adapter = adapters[uid]
            assert isinstance(adapter, Adapter)
            handles.append(adapter.handle)
        pointers = self._ffi.new("trio_adapter *[]", handles)
        scales = self._ffi.new("float[]", [scale for _, scale in wanted])
        code = self._lib.trio_context_set_adapters(self.handle, pointers, scales, len(wanted))
        check("trio_context_set_adapters", code)
        self._adapters = wanted
        self._sources = {}  # were read with others

    def _encode_sources(self, batch: Batch) -> DecodeOutcome:
        """Have the encoder read what the batch's slots begin with, unless it has. It reads for all of them at once, and
        forgets what it has read for others."""
        if all(self._sources.get(chunk.slot) == chunk.source for chunk in batch.chunks):
            return DecodeOutcome.OK
        sources = Batch(tuple(Chunk(chunk.uid, chunk.slot, 0, chunk.source, output=False) for chunk in batch.chunks))
        self._batch.n_rows, _ = self._fill_rows(sources)
        self._batch.inputs = self._ffi.NULL
        self._batch.tokens = self._native_tokens
        self._batch.number = batch.number
        outcome = self._outcome("trio_encode", self._lib.trio_encode(self.handle, self._batch))
        if outcome is DecodeOutcome.OK:
            self._sources = {chunk.slot: chunk.source for chunk in batch.chunks}
        return outcome

    def _fill_rows(self, batch: Batch) -> tuple[int, list[tuple[Chunk, int]]]:
        """Lay the chunks out as rows. Returns the number of rows, and each chunk with output with its last row."""
        tokens, positions, seqs, flags = self._tokens, self._positions, self._seqs, self._outputs
        of_media = batch.of_media
        outputs: list[tuple[Chunk, int]] = []
        row = 0
        for chunk in batch.chunks:
            items = cast("tuple[int, ...]", chunk.items)  # if not of media
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
        return row, outputs

    def _fill_inputs(self, batch: Batch, media: Mapping[Media, EncodedMedia]) -> NDArray[np.float32]:
        """Lay the positions of rows of images out, and return the rows themselves."""
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
                own[:3] += chunk.position - encoded.positions[0, begin]
            row += len(chunk.items)
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

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
        """Make `decode` of the batch of this number, running or yet to start, return ABORTED; 0 withdraws that. CPUs
        stop at the next operation, devices after a layer of a wide batch, rpc-servers at its end. From any thread;
        never blocks."""
        handle = self._handle  # a reference of our own, for close() may come in between
        if handle is not None:
            self._lib.trio_abort(handle, number)

    def close(self) -> None:
        """Free it. Idempotent."""
        self._handle = None
