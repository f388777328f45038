"""The flash attention of the CPU plugin, called directly: one operation, as llama.cpp's graphs have it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from native.build.directory import library
from trio_runner.llama.library import LIBRARY_DIRECTORY, native

TYPES = {"float32": 0, "float16": 1, "uint8": 8, "int32": 26}
"""Numbers of ggml's types. Bytes are blocks of q8_0."""
BLOCK, BLOCK_BYTES = 32, 34
"""The numbers of a block of q8_0, and its bytes."""
CPU = 0
"""The number of ggml's type of device."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` in ggml.h."""


Tensor._fields_ = [
    ("type", c_int),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(Tensor) * 10),
    ("view_src", POINTER(Tensor)),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
    ("extra", c_void_p),
]


class _ContextParams(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


SIGNATURES = {
    "ggml_init": (c_void_p, _ContextParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_4d": (POINTER(Tensor), c_void_p, c_int, c_int64, c_int64, c_int64, c_int64),
    "ggml_flash_attn_ext": (POINTER(Tensor), c_void_p, *[POINTER(Tensor)] * 4, c_float, c_float, c_float),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, POINTER(Tensor)),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, ctypes.c_char_p),
    "ggml_backend_init_by_type": (c_void_p, c_int, ctypes.c_char_p),
}


@functools.cache
def ggml() -> dict[str, ctypes._NamedFuncPointer]:
    """Functions of the libraries that trio-runner has loaded."""
    native()
    libraries = [ctypes.CDLL(str(library(LIBRARY_DIRECTORY, name))) for name in ("ggml-base", "ggml")]
    functions = {}
    for name, (result, *arguments) in SIGNATURES.items():
        function = next(getattr(loaded, name) for loaded in libraries if hasattr(loaded, name))
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


@dataclass(frozen=True, slots=True)
class Operands:
    """What one operation computes with. `places` and `sequences` may both be absent."""

    queries: NDArray[np.float32]
    """[n_heads, n_rows, n_embd]"""
    keys: NDArray[np.float16]
    """[n_kv_heads, n_cells, n_embd]"""
    values: NDArray[np.float16]
    """[n_kv_heads, n_cells, n_embd_v]"""
    seen: NDArray[np.bool_]
    """[n_rows, n_cells]: which cells each row sees."""
    places: Sequence[int] | None = None
    """The place of each cell in its sequence, or -1."""
    sequences: Sequence[int] | None = None
    """The sequence of each row."""
    number: int = 0
    """The number of what `seen`, `places` and `sequences` hold, below 2**31; or 0."""
    soft_cap: float = 0.0
    """Scores become soft_cap * tanh(score / soft_cap), unless it is 0."""
    sinks: NDArray[np.float32] | None = None
    """For each head, a score that takes weight and has no value."""
    in_bytes: bool = False
    """Whether keys and values are stored as q8_0."""


def attend(operands: Operands, *, threads: int = 1) -> NDArray[np.float32]:
    """Compute the operation. Returns [n_rows, n_heads, n_embd_v]."""
    lib = ggml()
    n_heads, n_rows, n_embd = operands.queries.shape
    mask = np.where(operands.seen, np.float16(0), np.float16(-np.inf))
    with _graph(threads) as (context, backend):
        keys, values = operands.keys, operands.values
        stored = [_blocks(keys), _blocks(values)] if operands.in_bytes else [keys, values]
        arrays: list[NDArray[Any]] = [operands.queries, *stored, mask]
        sources = [_tensor(context, array) for array in arrays]
        result = lib["ggml_flash_attn_ext"](context, *sources, n_embd**-0.5, 0.0, operands.soft_cap)
        assert ctypes.addressof(result.contents.src[3].contents) == ctypes.addressof(sources[3].contents)
        if operands.places is not None and operands.sequences is not None:
            arrays.append(np.array([*operands.places, *operands.sequences, operands.number, 0], np.int32))
            sources.append(_tensor(context, arrays[-1]))
            result.contents.src[5] = sources[-1]
        if operands.sinks is not None:
            arrays.append(operands.sinks)
            sources.append(_tensor(context, operands.sinks))
            result.contents.src[4] = sources[-1]
        graph = lib["ggml_new_graph"](context)
        lib["ggml_build_forward_expand"](graph, result)
        buffer = lib["ggml_backend_alloc_ctx_tensors"](context, backend)
        for tensor, array in zip(sources, arrays, strict=True):
            data = np.ascontiguousarray(array)
            ctypes.memmove(tensor.contents.data, data.ctypes.data, data.nbytes)
        assert lib["ggml_backend_graph_compute"](backend, graph) == 0
        output = np.empty((n_rows, n_heads, operands.values.shape[2]), np.float32)
        ctypes.memmove(output.ctypes.data, result.contents.data, output.nbytes)
        lib["ggml_backend_buffer_free"](buffer)
    return output


def exact(operands: Operands) -> NDArray[np.float64]:
    """The same in 64 bits, by the definition: softmax(q k^T / sqrt(n_embd)) v, with a soft cap and a sink if any."""
    n_heads, n_rows, n_embd = operands.queries.shape
    group = n_heads // operands.keys.shape[0]
    all_keys, all_values = (
        dequantize(_blocks(stored), GGMLQuantizationType.Q8_0) if operands.in_bytes else stored
        for stored in (operands.keys, operands.values)
    )
    output = np.zeros((n_rows, n_heads, operands.values.shape[2]))
    for head in range(n_heads):
        for row in range(n_rows):
            seen = operands.seen[row]
            keys = all_keys[head // group, seen].astype(np.float64)
            values = all_values[head // group, seen].astype(np.float64)
            scores = keys @ operands.queries[head, row].astype(np.float64) * n_embd**-0.5
            if operands.soft_cap:
                scores = operands.soft_cap * np.tanh(scores / operands.soft_cap)
            sink = -np.inf if operands.sinks is None else float(operands.sinks[head])
            weights = np.exp(scores)
            output[row, head] = weights @ values / (weights.sum() + np.exp(sink)) if seen.any() else 0.0
    return output


@contextmanager
def _graph(threads: int) -> Iterator[tuple[int, int]]:
    lib = ggml()
    context = lib["ggml_init"](_ContextParams(1 << 20, None, True))
    backend = lib["ggml_backend_init_by_type"](CPU, None)
    try:
        registry = lib["ggml_backend_dev_backend_reg"](lib["ggml_backend_get_device"](backend))
        address = lib["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)(backend, threads)
        yield context, backend
    finally:
        lib["ggml_backend_free"](backend)
        lib["ggml_free"](context)


def _tensor(context: int, array: NDArray[Any]) -> ctypes._Pointer[Tensor]:
    ne = [*reversed(array.shape), *[1] * (4 - array.ndim)]
    if array.dtype == np.uint8:
        ne[0] = ne[0] // BLOCK_BYTES * BLOCK
    tensor: ctypes._Pointer[Tensor] = ggml()["ggml_new_tensor_4d"](context, TYPES[array.dtype.name], *ne)
    return tensor


def _blocks(numbers: NDArray[np.float16]) -> NDArray[np.uint8]:
    """The numbers as q8_0. The factor of a block with something that is not a number is not a number."""
    blocks = quantize(np.nan_to_num(numbers).astype(np.float32), GGMLQuantizationType.Q8_0)
    is_nan = np.isnan(numbers.reshape(*numbers.shape[:-1], -1, BLOCK)).any(axis=-1)
    blocks.reshape(*is_nan.shape, BLOCK_BYTES)[is_nan, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    return blocks
