"""Context: the KV cache, and the one call per step that decodes a batch and samples from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from trio_runner.config import EngineConfig, KvType
from trio_runner.core import ports
from trio_runner.core.batch import AdapterSet, Batch, BatchKind, Chunk, DecodeOutcome, StepResult
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.core.ports import NO_ADAPTERS, NO_MEDIA, EncodedMedia
from trio_runner.core.prompt import Media
from trio_runner.errors import EngineClosed, LoadError, NativeError, RunnerError
from trio_runner.info import Capabilities, MemoryUse
from trio_runner.llama.adapter import Adapter
from trio_runner.llama.context_plan import (
    POOLING_RANK,
    ContextPlan,
    embeds_last_row,
    memory_use,
    open_context,
    plan_context,
)
from trio_runner.llama.library import check, drain_log, last_error, native
from trio_runner.llama.model import Model
from trio_runner.llama.step_input import OutputRow, StepInput
from trio_runner.llama.step_output import StepOutput
from trio_runner.sampling import SamplingParams

WIDE_BATCH: Final = 64
"""Rows of a batch that devices compute in the same way as the widest batches."""


class Context:
    """A context of a loaded model: `trio_runner.core.ports.Context` over llama.cpp.

    Creating it decodes two tokens, to see what its memory can do and to refuse a model whose outputs are not numbers.
    With `on_devices` it also decodes a wide batch. Backends allocate and compile at the first use; so a lack of memory
    shows while fewer layers can still be tried.

    Raises `LoadError` if llama.cpp cannot create the context: too little memory, a setting that this model does not
    allow, or a damaged file.
    """

    def __init__(self, model: Model, config: EngineConfig, *, on_devices: bool = False) -> None:
        loaded = native()
        self._ffi, self._lib = loaded.ffi, loaded.lib
        self._model = model
        plan = plan_context(model, config)
        self._handle: Any = open_context(model, plan)
        info = self._ffi.new("trio_context_info *")
        check("trio_context_get_info", self._lib.trio_context_get_info(self._handle, info))
        self._takes_rows = bool(info.n_embd_in > 0)
        self._has_encoder = bool(info.has_encoder)
        self._adapters: AdapterSet = ()
        self._encoder_tokens: dict[int, tuple[int, ...]] = {}
        self._n_encoder_runs = 0
        self._input = StepInput(plan.max_rows, int(info.n_input_positions))
        self._output = StepOutput(model, config.slots, int(info.n_embd_out))
        self._outcomes = {
            self._lib.TRIO_OK: DecodeOutcome.OK,
            self._lib.TRIO_NO_KV_SPACE: DecodeOutcome.NO_KV_SPACE,
            self._lib.TRIO_ABORTED: DecodeOutcome.ABORTED,
            self._lib.TRIO_E_INVALID: DecodeOutcome.INVALID,
            self._lib.TRIO_E_FATAL: DecodeOutcome.FATAL,
        }
        # Warming up needs to know what can be computed, and finds out whether the memory can be trimmed.
        self._capabilities = _capabilities(model, config, plan, info, can_trim=False)
        try:
            if on_devices:
                self._warm_up_wide()
            can_trim = self._warm_up()
        except RunnerError as failure:
            raise LoadError(f"the model does not work: {failure}", path=model.path) from failure
        finally:
            drain_log()
        self._capabilities = _capabilities(model, config, plan, info, can_trim=can_trim)

    # ---- warming up --------------------------------------------------------------------------------------------------

    def _warm_up(self) -> bool:
        """Decode two tokens, check that numbers come out, and empty the memory. Tells whether the memory can trim."""
        token = max(self._model.native_info.token_bos, 0)
        if self._capabilities.can_generate:
            encoder_tokens = (token,) if self._has_encoder else ()
            sampler = self._model.sampler(SamplingParams(temperature=0.0, repeat_penalty=1.0), ())
            for position in range(2):
                chunk = Chunk(0, 0, position, (token,), output=position == 1, encoder_tokens=encoder_tokens)
                self._warm_up_step(Batch((chunk,)), {0: sampler})
            sampler.close()
        else:
            for position in range(2 if self._capabilities.has_memory else 1):
                self._warm_up_step(
                    Batch((Chunk(0, 0, position, (token,), output=True),), BatchKind(embedding=True)), {}
                )
        can_trim = self.apply(Trim(0, 1))
        self.apply(Trim(0, 0))
        return can_trim

    def _warm_up_wide(self) -> None:
        """Decode a batch as wide as those of prompts."""
        n_rows = min(self._capabilities.n_ctx, self._capabilities.max_rows, WIDE_BATCH)
        tokens = (max(self._model.native_info.token_bos, 0),) * n_rows
        if self._capabilities.can_generate:
            encoder_tokens = tokens[:1] if self._has_encoder else ()
            batch = Batch((Chunk(0, 0, 0, tokens, output=False, encoder_tokens=encoder_tokens),))
        else:
            batch = Batch((Chunk(0, 0, 0, tokens, output=True),), BatchKind(embedding=True))
        self._warm_up_step(batch, {})
        self.apply(Trim(0, 0))

    def _warm_up_step(self, batch: Batch, samplers: Mapping[int, ports.Sampler]) -> None:
        result = self.decode(batch, samplers)
        if result.outcome is not DecodeOutcome.OK:
            raise NativeError("trio_step", self._lib.TRIO_E_FATAL, result.message or result.outcome.value)
        for sampled in result.sampled.values():
            if sampled.error is not None:
                raise sampled.error

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the context and its model can do."""
        return self._capabilities

    @property
    def memory(self) -> tuple[MemoryUse, ...]:
        """The memory that the context and its model take, one entry for each device that holds something."""
        return memory_use(self.handle)

    @property
    def takes_rows(self) -> bool:
        """Whether rows of images can take the place of tokens."""
        return self._takes_rows

    @property
    def handle(self) -> Any:
        """The shim's trio_context. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the context has been closed")
        return self._handle

    # ---- the KV cache ------------------------------------------------------------------------------------------------

    def apply(self, op: MemoryOp) -> bool:
        """Edit the KV cache.

        Returns False if this memory cannot trim part of a slot; then nothing has changed. Raises `NativeError`.
        """
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
        """Positions that `slot` holds: one more than its last position, or 0 if it is empty. Raises `NativeError`."""
        first, last = self._ffi.new("int32_t *"), self._ffi.new("int32_t *")
        check("trio_seq_range", self._lib.trio_seq_range(self.handle, slot, first, last))
        return int(last[0]) + 1

    # ---- the step ----------------------------------------------------------------------------------------------------

    def decode(
        self,
        batch: Batch,
        samplers: Mapping[int, ports.Sampler],
        *,
        media: Mapping[Media, EncodedMedia] = NO_MEDIA,
        adapters: Mapping[int, ports.Adapter] = NO_ADAPTERS,
    ) -> StepResult:
        """Run one batch, and sample each of its outputs with the sampler of its uid.

        `media` and `adapters` contain those that the batch names. After ABORTED and FATAL, a recurrent model keeps
        nothing of the batch's slots. Raises `NativeError` if the context cannot be used any more; every other failure
        is an outcome.
        """
        handle = self.handle
        n_rows = max(batch.n_rows, sum(len(chunk.encoder_tokens) for chunk in batch.chunks))
        if n_rows > self._input.max_rows:
            message = f"the batch has {n_rows} rows, but at most {self._input.max_rows} are allowed"
            return StepResult(DecodeOutcome.INVALID, {}, {}, {}, message=message)
        started = time.perf_counter()
        self._set_adapters(batch.kind.adapters, adapters)
        outcome = self._encode(batch) if self._has_encoder else DecodeOutcome.OK
        outputs: list[OutputRow] = []
        if outcome is DecodeOutcome.OK:
            inputs = self._input.fill_media(batch, media) if batch.kind.of_media else None
            outputs = self._input.fill(batch, inputs)
            if not batch.kind.embedding:
                self._output.ask(outputs, samplers)
            null = self._ffi.NULL
            request, result = (null, null) if batch.kind.embedding else (self._output.request, self._output.result)
            outcome = self._outcome("trio_step", self._lib.trio_step(handle, self._input.native, request, result))
        if outcome is not DecodeOutcome.OK:
            message, kept = self._explain(outcome, batch)
            return StepResult(outcome, {}, {}, kept, time.perf_counter() - started, message)
        if batch.kind.embedding:
            failed, vectors = self._output.read_embeddings(handle, outputs)
            return StepResult(outcome, failed, vectors, {}, time.perf_counter() - started)
        sampled = self._output.read_samples(outputs)
        if batch.scoring is None:
            return StepResult(outcome, sampled, {}, {}, time.perf_counter() - started)
        failed, scores = self._output.read_scores(handle, batch, self._input.scored_rows(batch))
        seconds = time.perf_counter() - started
        return StepResult(outcome, sampled | failed, {}, {}, seconds, scores=scores)

    def _outcome(self, function: str, code: int) -> DecodeOutcome:
        outcome = self._outcomes.get(code)
        if outcome is None:
            check(function, code)
            raise NativeError(function, code, "unknown code")
        return outcome

    def _explain(self, outcome: DecodeOutcome, batch: Batch) -> tuple[str, dict[int, int]]:
        """What the shim said about a failed batch, and the positions that its slots hold now, by uid."""
        message = last_error()
        # llama.cpp logs an aborted batch as an error, but we asked for it.
        drain_log(at_most=logging.DEBUG if outcome is DecodeOutcome.ABORTED else logging.CRITICAL)
        keeps_part = outcome in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL)
        return message, {chunk.uid: self.length(chunk.slot) for chunk in batch.chunks} if keeps_part else {}

    def _set_adapters(self, wanted: AdapterSet, adapters: Mapping[int, ports.Adapter]) -> None:
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
        self._encoder_tokens = {}  # the encoder has read them under other adapters

    def abort(self, number: int) -> None:
        """Make `decode` of the batch with this number return ABORTED, whether it runs or is yet to start.

        The number 0 withdraws that. CPUs stop at the next operation, devices after a layer of a wide batch, and
        rpc-servers at the end of the batch. May be called from any thread; never blocks.
        """
        handle = self._handle  # a reference of our own: close() may run at the same time
        if handle is not None:
            self._lib.trio_abort(handle, number)

    # ---- the encoder -------------------------------------------------------------------------------------------------

    @property
    def encoder_tokens(self) -> Mapping[int, tuple[int, ...]]:
        """The tokens that the encoder read last, by slot. For tests."""
        return MappingProxyType(self._encoder_tokens)

    @property
    def n_encoder_runs(self) -> int:
        """How often the encoder has run. For tests."""
        return self._n_encoder_runs

    def _encode(self, batch: Batch) -> DecodeOutcome:
        """Let the encoder read what all slots of `batch` need, unless it has done so. It forgets all other slots."""
        if all(self._encoder_tokens.get(chunk.slot) == chunk.encoder_tokens for chunk in batch.chunks):
            return DecodeOutcome.OK
        chunks = [Chunk(chunk.uid, chunk.slot, 0, chunk.encoder_tokens, output=False) for chunk in batch.chunks]
        self._input.fill(Batch(tuple(chunks), number=batch.number))
        self._n_encoder_runs += 1
        outcome = self._outcome("trio_encode", self._lib.trio_encode(self.handle, self._input.native))
        if outcome is DecodeOutcome.OK:
            self._encoder_tokens = {chunk.slot: chunk.encoder_tokens for chunk in batch.chunks}
        return outcome

    def close(self) -> None:
        """Free the context. May be called more than once."""
        self._handle = None


def _capabilities(model: Model, config: EngineConfig, plan: ContextPlan, info: Any, *, can_trim: bool) -> Capabilities:
    """What a context with the shim's `info` can do."""
    has_memory, causal = bool(info.has_memory), bool(info.causal)
    n_positions = min(plan.n_ctx, int(info.n_positions))
    return Capabilities(
        n_slots=config.slots,
        # Non-causal attention, or a memory that keeps nothing, needs the whole text in one step.
        n_ctx=n_positions if has_memory and causal else min(n_positions, plan.max_rows),
        max_rows=plan.max_rows,
        n_spare_slots=plan.n_spare,
        n_embed_slots=plan.n_embed,
        embeds_last_row=has_memory and causal and embeds_last_row(model, int(info.pooling_type)),
        has_memory=has_memory,
        can_trim=can_trim,
        # A recurrent state claims that it can shift, but the part to drop cannot be removed from it.
        can_shift=bool(info.can_shift) and can_trim and _keys_can_move(model, config.kv_type),
        can_generate=has_memory and info.pooling_type != POOLING_RANK and bool(model.native_info.has_vocab),
        ranks=info.pooling_type == POOLING_RANK,
        embedding_size=int(info.n_embd_out),
        decoder_start=int(info.decoder_start) if info.has_encoder else None,
    )


def _keys_can_move(model: Model, kv_type: KvType) -> bool:
    """Whether llama.cpp can give keys of this type other positions. Where it cannot, it does not refuse: it aborts with
    bf16, and with quantised keys it crashes unless their heads are multiples of 64 long, as it then takes for granted
    that it has rotated them."""
    if kv_type in ("f32", "f16"):
        return True
    info, n_head = model.info, model.native_info.n_head
    told = info.metadata.get(f"{info.architecture}.attention.key_length", "")
    n_embd_head = int(told) if told.isdecimal() else int(model.native_info.n_embd) // max(n_head, 1)
    return kv_type != "bf16" and n_embd_head % 64 == 0
