"""Writes a model file again with weights of another type, by ggml's own quantisation.

llama.cpp has a program for that, which chooses types by the names of tensors. Here every matrix gets the type that is
asked for, so that a test knows what it tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from trio_runner.llama.ggml_types import GGML_TYPES, WEIGHT_TYPES
from trio_runner.llama.library import LIBRARY_DIRECTORY, native

OUR_TYPES: Final = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_K", "q5_K", "q6_K", "iq4_nl", "f16", "f32", "bf16"),
    *("q2_K", "q3_K", "iq4_xs", "mxfp4"),
)
"""The types whose products with activations are our own."""
OTHER_TYPES: Final = ("iq3_s", "tq2_0")
"""Some of the types whose products are upstream's."""

_KEPT: Final = (
    *("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight"),
    *("ssm_a", "ssm_conv1d.weight", "shortconv.conv.weight"),
)
"""Routers of experts, what is added to the rows of tokens, and parts of recurrent layers."""
_NEED_IMPORTANCE: Final = ("iq2_xxs", "iq2_xs", "iq1_s")


def convert(source: Path, target: Path, kind: str) -> None:
    """Write the model `source` to `target` with all its matrices in type `kind`.

    Vectors, what llama.cpp keeps in float32, and matrices whose rows are no whole number of blocks become float32.
    `source` may have any types that the gguf package can read.
    """
    reader = GGUFReader(source)
    writer = writer_like(reader, target)
    block_size = GGML_TYPES[WEIGHT_TYPES[kind]].block_size
    for tensor in reader.tensors:
        values = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim < 2 or tensor.name.endswith(_KEPT) or values.shape[-1] % block_size:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantized(values, kind), raw_dtype=GGMLQuantizationType(WEIGHT_TYPES[kind]))
    finish(writer)


def writer_like(reader: GGUFReader, target: Path, changed: Mapping[str, int] | None = None) -> GGUFWriter:
    """A writer of `target` with the metadata of `reader`, without the file's type. `changed` has other values for some
    keys."""
    writer = GGUFWriter(str(target), _text(reader, "general.architecture"))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            value = (changed or {}).get(field.name, field.contents())
            is_array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(field.name, value, field.types[0], field.types[-1] if is_array else None)
    return writer


def finish(writer: GGUFWriter) -> None:
    """Write everything to the file, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """`values` in type `kind`: for float32 and float16 as such, for all others as bytes, shape (..., bytes of a row).

    All columns are equally important. Raises ValueError if a row is no whole number of blocks.
    """
    if kind == "f32":
        return values
    if kind == "f16":
        return values.astype(np.float16)
    found = GGML_TYPES[WEIGHT_TYPES[kind]]
    *shape, n_columns = values.shape
    n_rows = int(np.prod(shape))
    if n_columns % found.block_size:
        raise ValueError(f"rows of {n_columns} are no whole number of blocks of {found.block_size}")
    packed = np.empty((*shape, n_columns // found.block_size * found.block_bytes), np.uint8)
    importance = np.ones(n_columns, np.float32) if kind in _NEED_IMPORTANCE else None
    pointers = [array if array is None else array.ctypes.data for array in (values, packed, importance)]
    n_bytes = _quantize_chunk()(WEIGHT_TYPES[kind], pointers[0], pointers[1], 0, n_rows, n_columns, pointers[2])
    assert n_bytes == packed.nbytes
    return packed


@cache
def _quantize_chunk() -> Any:
    native()  # opens the library, and initialises ggml
    [path] = [one for one in LIBRARY_DIRECTORY.iterdir() if one.name.startswith("libggml-base.")]
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    function.restype = ctypes.c_size_t
    return function


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    assert field is not None
    return str(field.contents())
