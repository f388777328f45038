"""Adapter: a LoRA on top of a loaded model."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any, Final

from trio_runner.errors import EngineClosed, LoadError
from trio_runner.llama.ggml_types import CANNOT_MULTIPLY
from trio_runner.llama.gguf import GgufHeader, GgufTensor, check_gguf
from trio_runner.llama.library import check_file, drain_log, native

if TYPE_CHECKING:
    from trio_runner.info import ModelInfo

MAX_RANK: Final = 16384
"""Above the sizes of all but the largest models; a damaged file may claim what fills the memory."""

_A: Final = ".lora_a"
_B: Final = ".lora_b"
_MATRICES_OF_EXPERTS: Final = "_exps.weight"
_MAX_TAIL: Final = 1 << 20  # bytes after the last tensor, as alignment goes


class Adapter:
    """A LoRA for one model, which it keeps alive. Made by `Model.adapter`, on any thread, also while contexts decode.

    Blocks until it is loaded and was tried on a few tokens. Raises `LoadError`.
    """

    def __init__(self, model: Any, info: ModelInfo, path: str) -> None:
        _check_adapter(check_gguf(path), info, path)
        loaded = native()
        out = loaded.ffi.new("trio_adapter **")
        code = loaded.lib.trio_adapter_open(model, os.fsencode(path), out)
        if code < 0:  # what is raised says it, and whoever loads adapters could fill the log
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
        """Let go of it; its memory is freed when no context has it set any more. Idempotent."""
        self._handle = None


def _check_adapter(header: GgufHeader, info: ModelInfo, path: str) -> None:
    """What native code takes for granted, or would find out in a thread where nothing catches it."""
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
        raise LoadError("an adapter that tokens of the prompt turn on (aLoRA) is not supported", path=path)
    tensors = {tensor.name: tensor for tensor in header.tensors if not tensor.name.endswith("_norm.weight")}
    n_expert = info.metadata.get(f"{info.architecture}.expert_count", "")
    for name, tensor in tensors.items():
        problem = _problem(tensor, tensors, int(n_expert) if n_expert.isdecimal() else 0)
        if problem:
            raise LoadError(f"the tensor {name} {problem}", path=path)
    if not tensors:
        raise LoadError("it adapts no tensor", path=path)
    n_tail = header.file_size - max(tensor.offset + tensor.n_bytes for tensor in header.tensors)
    if n_tail > _MAX_TAIL:  # the file is read through, all of it
        raise LoadError(f"damaged: it goes on for {n_tail} bytes after its last tensor", path=path)


def _problem(tensor: GgufTensor, tensors: dict[str, GgufTensor], n_expert: int) -> str:
    """What is wrong with one of the two factors of a matrix, of those that do not depend on the matrix."""
    if not tensor.name.endswith((_A, _B)):
        return "is not part of a LoRA"
    if tensor.type in CANNOT_MULTIPLY:
        return f"is of the type {tensor.type}, which cannot be multiplied"
    base = tensor.name[: -len(_A)]
    a, b = tensors.get(base + _A), tensors.get(base + _B)
    if not base or a is None or b is None:
        return "is without its other half"
    # The vectors of tokens are looked up, not multiplied: there both have a row of as many elements as the rank.
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
