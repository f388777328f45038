"""A toy model to test against, ours or yours, without a model file or the native library.

    async with trio_runner.open_engine(ToyLoader(), slots=2) as engine:
        ...

The next token of a sequence is a hash of everything that its slot holds, and of the adapters that it was made with. So
one stale, missing, misplaced or foreign entry of the KV cache gives another text; `toy_text` tells the right one. Where
llama.cpp would abort or silently compute rubbish, the toy raises AssertionError.

An image is a few rows that depend only on the digest of its pixels (`ToyProjector`). Adapters are known by the paths
that they are loaded from.

`ToyLoader` and `toy_text` are public API. Other names may change without notice.

`text` says what the toy answers, `model` has what is loaded, and `context` the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from trio_runner.config import AdapterConfig, EngineConfig
from trio_runner.core.batch import Batch
from trio_runner.core.ports import LoadedAdapter, Runtime
from trio_runner.errors import EngineClosed
from trio_runner.info import Capabilities
from trio_runner.testing.context import Interruption, ToyContext
from trio_runner.testing.model import ToyAdapter, ToyEncoding, ToyModel, ToyProjector, ToySampler
from trio_runner.testing.text import (
    END,
    N_EMBD,
    N_VOCAB,
    ToyAdapters,
    toy_cache_key,
    toy_continuation,
    toy_next,
    toy_score,
    toy_text,
    toy_vector,
)


@dataclass(slots=True)
class ToyLoader:
    """Loads a toy model.

    `capabilities` replaces fields of the `Capabilities` that follow from the engine's configuration. `on_load`, called
    with `progress` and `cancelled`, may wait or raise. `on_decode` is the hook of the context. `projector`, if any, and
    `adapters` are loaded too. `model` and `context` are those that were loaded last.
    """

    capabilities: Mapping[str, object] = field(default_factory=dict)
    on_load: Callable[[Callable[[float], None], Callable[[], bool]], None] | None = None
    on_decode: Callable[[Batch], Interruption | None] | None = None
    projector: ToyProjector | None = None
    adapters: tuple[AdapterConfig, ...] = ()
    model: ToyModel | None = None
    context: ToyContext | None = None

    def __call__(
        self, config: EngineConfig, *, progress: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Runtime:
        if self.on_load is not None:
            self.on_load(progress, cancelled)
        if cancelled():
            raise EngineClosed("loading was cancelled")
        progress(1.0)
        capabilities = Capabilities(
            n_slots=config.slots,
            n_ctx=config.context_length or 4096,
            max_rows=config.batch_size,
            n_spare_slots=config.slots,
            n_embed_slots=config.slots,
            embedding_size=N_EMBD,
        )
        capabilities = replace(capabilities, **self.capabilities)  # type: ignore[arg-type]
        self.model = ToyModel()
        self.context = ToyContext(capabilities, on_decode=self.on_decode)
        adapters = tuple(
            LoadedAdapter(adapter.name, self.model.adapter(adapter.path), adapter.scale, adapter.path)
            for adapter in self.adapters
        )
        return Runtime(self.model, self.context, self.projector, adapters)


__all__ = [
    "END",
    "N_EMBD",
    "N_VOCAB",
    "Interruption",
    "ToyAdapter",
    "ToyAdapters",
    "ToyContext",
    "ToyEncoding",
    "ToyLoader",
    "ToyModel",
    "ToyProjector",
    "ToySampler",
    "toy_cache_key",
    "toy_continuation",
    "toy_next",
    "toy_score",
    "toy_text",
    "toy_vector",
]
