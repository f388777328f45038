"""The model files of the kernels' measurements: the same weights in another type, and random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from tests.bench import kernel_models
from tests.tiny_models import tiny_model
from tests.weight_types import finish
from trio_runner.llama.gguf import check_gguf


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def f16_model(directory: Path) -> Path:
    """The tiny llama with its matrices in f16: those are what becomes another type."""
    source, path = gguf.GGUFReader(tiny_model("llama", directory)), directory / "f16.gguf"
    writer = kernel_models._writer(source, path, Type.F16)
    for tensor in source.tensors:
        kernel_models._add(writer, tensor.name, tensor.data, Type.F16 if tensor.data.ndim == 2 else Type.F32)
    finish(writer)
    return path


@pytest.mark.parametrize(("kind", "tolerance"), [(Type.Q8_0, 0.01), (Type.Q4_0, 0.15), (Type.F16, 0.01)])
def test_weights_are_the_same_in_another_type(kind: Type, tolerance: float, tmp_path: Path) -> None:
    source = f16_model(tmp_path)
    path = kernel_models.requantised(source, tmp_path / "out.gguf", kind, Type.Q8_0)
    before, after = tensors(source), tensors(path)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        expected = Type.Q8_0 if name == "token_embd.weight" else kind
        assert tensor.tensor_type == (expected if before[name].tensor_type == Type.F16 else Type.F32)
        old, new = (dequantize(each.data, each.tensor_type) for each in (before[name], tensor))
        assert np.abs(old - new).max() <= tolerance * np.abs(old).max()
    assert check_gguf(path).metadata.keys() == check_gguf(source).metadata.keys()


def test_a_random_model_has_the_vocabulary_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"N_EMBD": 256, "N_FF": 512, "N_LAYER": 2, "N_HEAD": 4, "N_HEAD_KV": 2}.items():
        monkeypatch.setattr(kernel_models, name, size)
    source = tiny_model("llama", tmp_path)
    path = kernel_models.random_model(source, tmp_path / "out.gguf", Type.Q4_K, Type.Q6_K)
    header = check_gguf(path)
    assert header.metadata["tokenizer.ggml.tokens"] == check_gguf(source).metadata["tokenizer.ggml.tokens"]
    assert header.metadata["llama.embedding_length"] == 256
    kinds = {tensor.name: tensor.type for tensor in header.tensors}
    assert kinds["token_embd.weight"] == "q6_K"
    assert kinds["blk.1.ffn_down.weight"] == "q4_K"
    assert kinds["output_norm.weight"] == "f32"
