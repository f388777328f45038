"""Adapter: a LoRA on top of a loaded model."""

from __future__ import annotations

import os
from typing import Any

from trio_runner.config import AdapterConfig
from trio_runner.errors import LoadError
from trio_runner.llama.gguf import check_gguf
from trio_runner.llama.library import check, drain_log, native
from trio_runner.llama.model import Model


class Adapter:
    """A loaded LoRA; lives as long as its model. Raises `LoadError`."""

    def __init__(self, model: Model, config: AdapterConfig) -> None:
        header = check_gguf(config.path)
        kind = header.metadata.get("general.type")
        if kind != "adapter":
            raise LoadError(f"this is a {kind or 'model'}, not an adapter", path=config.path)
        if header.architecture != model.info.architecture:
            raise LoadError(
                f"the adapter is for {header.architecture}, the model is {model.info.architecture}", path=config.path
            )
        loaded = native()
        out = loaded.ffi.new("trio_adapter **")
        try:
            check("trio_adapter_open", loaded.lib.trio_adapter_open(model.handle, os.fsencode(config.path), out))
        except LoadError as failure:
            raise LoadError(failure.reason, path=config.path) from None
        drain_log()
        self.handle: Any = out[0]
        self.scale = config.scale
