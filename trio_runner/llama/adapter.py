"""Adapter: a LoRA that changes a loaded model."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, Final

from trio_runner.errors import EngineClosed, LoadError
from trio_runner.info import ModelInfo
from trio_runner.llama.ggml_types import CANNOT_MULTIPLY
from trio_runner.llama.gguf import GgufHeader, GgufTensor, check_gguf
from trio_runner.llama.library import check_file, drain_log, native

MAX_RANK: Final = 16384
"""The greatest rank of a LoRA. Nearly all models are narrower. A damaged file may claim more."""

_A: Final = ".lora_a"
_B: Final = ".lora_b"
_MATRICES_OF_EXPERTS: Final = "_exps.weight"
_MAX_TAIL: Final = 1 << 20  # bytes after the last tensor; alignment adds fewer


class Adapter:
    """A LoRA for one model, which it keeps alive. `Model.adapter` creates it.

    Blocks until the file is loaded and has been tried on a few tokens. Any thread may do so, also while contexts of the
    model decode. Raises `LoadError`.
    """

    def __init__(self, model: Any, info: ModelInfo, path: str) -> None:
        _check_adapter(check_gguf(path), info, path)
        loaded = native()
        out = loaded.ffi.new("trio_adapter **")
        code = loaded.lib.trio_adapter_open(model, os.fsencode(path), out)
        if code < 0:  # the exception says it; a client that loads bad adapters must not fill the log
            drain_log(at_most=logging.DEBUG)
        try:
            check_file("trio_adapter_open", code, path)
        finally:
            drain_log()
        self._handle: Any = loaded.ffi.gc(out[0], loaded.lib.trio_adapter_free)

    @property
    def handle(self) -> Any:
        """The shim's trio_adapter. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the adapter has been closed")
        return self._handle

    def close(self) -> None:
        """Release the adapter. Its memory is freed when no context uses it any more. May be called more than once."""
        self._handle = None


def _check_adapter(header: GgufHeader, info: ModelInfo, path: str) -> None:
    """Refuse what native code does not check, or would find in a thread that catches nothing. Raises `LoadError`."""
    kind = header.metadata.get("general.type")
    if kind != "adapter":
        raise LoadError(f"this is a {kind or 'model'}, not an adapter", path=path)
    if header.architecture != info.architecture:
        raise LoadError(f"the adapter is for {header.architecture}, the model is {info.architecture}", path=path)
    if header.metadata.get("adapter.type") != "lora":
        raise LoadError(f"an adapter of the type {header.metadata.get('adapter.type')}, not lora", path=path)
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise LoadError("damaged: adapter.lora.alpha is not a finite number", path=path)
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise LoadError("an adapter that tokens of the prompt switch on (aLoRA) is not supported", path=path)
    tensors = {tensor.name: tensor for tensor in header.tensors if not tensor.name.endswith("_norm.weight")}
    n_expert = info.metadata.get(f"{info.architecture}.expert_count", "")
    for name, tensor in tensors.items():
        problem = _problem(tensor, tensors, int(n_expert) if n_expert.isdecimal() else 0)
        if problem:
            raise LoadError(f"the tensor {name} {problem}", path=path)
    if not tensors:
        raise LoadError("it adapts no tensor", path=path)
    n_tail = header.file_size - max(tensor.offset + tensor.n_bytes for tensor in header.tensors)
    if n_tail > _MAX_TAIL:  # llama.cpp reads the whole file
        raise LoadError(f"damaged: it goes on for {n_tail} bytes after its last tensor", path=path)


def _problem(tensor: GgufTensor, tensors: dict[str, GgufTensor], n_expert: int) -> str:
    """What is wrong with a factor, checked without the matrix that it changes; "" if nothing."""
    if not tensor.name.endswith((_A, _B)):
        return "is not part of a LoRA"
    if tensor.type in CANNOT_MULTIPLY:
        return f"is of the type {tensor.type}, which cannot be multiplied"
    base = tensor.name[: -len(_A)]
    a, b = tensors.get(base + _A), tensors.get(base + _B)
    if not base or a is None or b is None:
        return "is without its other half"
    # Token embeddings are looked up, not multiplied, so both factors have rows as long as the rank.
    rank_a, rank_b = _size(a, 0 if base == "token_embd.weight" else 1), _size(b, 0)
    if rank_a != rank_b:
        return f"is of rank {rank_a} where its other half is of rank {rank_b}"
    if rank_a > MAX_RANK:
        return f"is of rank {rank_a}, more than {MAX_RANK}"
    n_matrices = n_expert if base.endswith(_MATRICES_OF_EXPERTS) else 1
    if _size(tensor, 2) != n_matrices or _size(tensor, 3) != 1:
        return f"has the shape {tensor.shape}, which are not {n_matrices} matrices"
    return ""


def _size(tensor: GgufTensor, dimension: int) -> int:
    return tensor.shape[dimension] if dimension < len(tensor.shape) else 1
