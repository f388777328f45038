"""What a context is created with: its sizes and settings, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from trio_runner.config import MAX_SLOTS, EngineConfig
from trio_runner.errors import LoadError, NativeError
from trio_runner.info import MemoryUse
from trio_runner.llama.ggml_types import WEIGHT_TYPES
from trio_runner.llama.library import FLASH_ATTENTION, check, drain_log, native
from trio_runner.llama.model import Model
from trio_runner.llama.threads import default_threads

DEFAULT_CONTEXT_LENGTH: Final = 4096
"""Tokens that a slot holds at most, unless the configuration says otherwise. Models trained for a million tokens would
want all memory."""

# Numbers of `enum llama_pooling_type`.
POOLING_UNSPECIFIED: Final = -1
POOLING_NONE: Final = 0
POOLING_LAST: Final = 3
POOLING_RANK: Final = 4
_POOLINGS: Final = {"none": POOLING_NONE, "mean": 1, "cls": 2, "last": POOLING_LAST}

_MAX_SEQUENCES: Final = 2 * MAX_SLOTS
_EMBEDDING_SLOTS: Final = 64
"""Texts that an embedding model takes in one batch, if they fit."""
_MAX_PLACES: Final = 64
"""Devices that a model may lie on, with a place for this machine."""


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """The sizes of a context, and the parameters that the shim creates it with."""

    n_ctx: int
    """Positions of one slot."""
    max_rows: int
    """Rows of one batch."""
    n_spare: int
    """Slots beyond those in use, which keep prompts in the cache."""
    n_embed: int
    """Slots that only embeddings use."""
    params: dict[str, Any]
    """The fields of the shim's trio_context_params."""


def plan_context(model: Model, config: EngineConfig) -> ContextPlan:
    """Choose the sizes of a context of `model` for `config`."""
    n_ctx = config.context_length or min(max(model.info.n_ctx_train, 1), DEFAULT_CONTEXT_LENGTH)
    n_threads, n_threads_batch = (config.threads, config.threads) if config.threads else default_threads()
    pooling = _POOLINGS.get(config.pooling, model.native_info.pooling_type)
    # The slots for text come first, then the spare ones, then those for embeddings. With a sliding window, each slot
    # takes two of llama.cpp's sequences, or it could not be trimmed.
    n_max = _MAX_SEQUENCES // 2 if model.native_info.n_swa else _MAX_SEQUENCES
    if 2 * config.slots > n_max:
        n_max = _MAX_SEQUENCES
    n_spare = min(config.slots, n_max - 2 * config.slots)
    is_embedder = not model.info.causal or pooling > POOLING_NONE
    n_embed = max(config.slots, min(_EMBEDDING_SLOTS, n_max - config.slots - n_spare) if is_embedder else 0)
    n_seq_max = config.slots + n_spare + n_embed
    max_rows = config.batch_size
    if not embeds_last_row(model, pooling):
        # All rows of a text must be in one batch, so the longest text is as long as a batch.
        longest = min(config.embedding_batch_size or max_rows, n_ctx, max(model.info.n_ctx_train, 1))
        max_rows = max(max_rows, longest)
    n_batch = max(max_rows, n_seq_max)  # llama.cpp plans for an output of every sequence
    params = {
        "n_ctx": n_ctx * config.slots + n_batch,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "n_seq_max": n_seq_max,
        "n_threads": n_threads,
        "n_threads_batch": n_threads_batch,
        "flash_attention": FLASH_ATTENTION[config.flash_attention],
        "type_k": WEIGHT_TYPES[config.kv_type],
        "type_v": WEIGHT_TYPES[config.kv_type],
        "pooling_type": POOLING_LAST if pooling < 0 else pooling,
        "offload_kqv": True,
        # A cache of the window's size forgets what a trimmed slot needs, and it cannot shift.
        "swa_full": True,
    }
    return ContextPlan(n_ctx, max_rows, n_spare, n_embed, params)


def embeds_last_row(model: Model, pooling: int) -> bool:
    """Whether the embedding of a text is that of its last row, so that the rows before it may be in other batches."""
    is_recurrent = model.native_info.is_recurrent or model.native_info.is_hybrid
    return model.info.causal and not is_recurrent and pooling in (POOLING_UNSPECIFIED, POOLING_NONE, POOLING_LAST)


def open_context(model: Model, plan: ContextPlan) -> Any:
    """Create the shim's trio_context, which is freed with its last reference. Raises `LoadError` if llama.cpp fails."""
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


def memory_use(handle: Any) -> tuple[MemoryUse, ...]:
    """The memory that the context `handle` takes with its model, one entry for each device that holds something."""
    loaded = native()
    entries = loaded.ffi.new("trio_memory[]", _MAX_PLACES)
    n = min(_MAX_PLACES, check("trio_context_memory", loaded.lib.trio_context_memory(handle, entries, _MAX_PLACES)))
    return tuple(
        MemoryUse(None if entry.device < 0 else entry.device, entry.model, entry.context, entry.compute)
        for entry in entries[0:n]
    )


def measure(model: Model, config: EngineConfig) -> tuple[MemoryUse, ...]:
    """The memory that `model` and a context for `config` would take. The model must be opened with `no_alloc`.

    Raises `LoadError` if no such context can be created.
    """
    return memory_use(open_context(model, plan_context(model, config)))
