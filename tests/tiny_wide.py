"""Tiny models whose rows are 256 and 512 floats long, so that their weights can have any of ggml's types.

    wide          two layers of grouped-query attention, like "llama" of tests/tiny_models.py
    wide-moe      the same with four experts in each layer, two of which compute a token
    wide-lora     an adapter for "wide" that changes its text

`wide_model` writes one of them with all its matrices in one type. tests/weight_types.py converts them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from tests.tiny_gguf import Array, Bpe, ModelFile, attention, feed_forward, ones
from tests.weight_types import convert

N_EMBD: Final = 256
N_FF: Final = 512
N_LAYER: Final = 2
N_EXPERT: Final = 4
N_EXPERT_USED: Final = 2


def wide_model(name: str, kind: str, directory: Path) -> Path:
    """The file of the model `name` in `directory`, with matrices of type `kind`. It is written if it is not there."""
    path = directory / f"tiny-{name}-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        if kind == "f32":
            WIDE_MODELS[name](partial)
        else:
            convert(wide_model(name, "f32", directory), partial, kind)
        partial.rename(path)
    return path


def _write_wide(path: Path, *, name: str = "tiny-wide", seed: int = 21, experts: bool = False) -> None:
    model, vocabulary = ModelFile(path, "llama", name, seed=seed), Bpe()
    model.add_sizes(n_layer=N_LAYER, n_embd=N_EMBD, n_ff=N_FF)
    model.add_attention(4, 2)
    vocabulary.add_to(model)
    model.add({"token_embd.weight": model.random(len(vocabulary.tokens), N_EMBD, gain=8.0)})
    if experts:
        model.writer.add_expert_count(N_EXPERT)
        model.writer.add_expert_used_count(N_EXPERT_USED)
    for layer in range(N_LAYER):
        tensors = attention(model, n_head=4, n_head_kv=2, n_embd=N_EMBD)
        model.add_layer(layer, tensors | (_experts(model) if experts else _one_expert(model)))
    model.add({"output_norm.weight": ones(N_EMBD), "output.weight": vocabulary.output(model, n_embd=N_EMBD)})
    model.write()


def _one_expert(model: ModelFile) -> dict[str, Array]:
    return feed_forward(model, n_embd=N_EMBD, n_ff=N_FF)


def _experts(model: ModelFile) -> dict[str, Array]:
    experts = [_one_expert(model) for _ in range(N_EXPERT)]
    parts = ("ffn_gate", "ffn_up", "ffn_down")
    return {
        "ffn_norm.weight": ones(N_EMBD),
        "ffn_gate_inp.weight": model.random(N_EXPERT, N_EMBD, gain=2.0),
        **{f"{part}_exps.weight": np.stack([expert[f"{part}.weight"] for expert in experts]) for part in parts},
    }


def _write_moe(path: Path) -> None:
    _write_wide(path, name="tiny-wide-moe", seed=22, experts=True)


def _write_lora(path: Path) -> None:
    rank = 4
    model = ModelFile(path, "llama", "tiny-wide-lora", seed=23)
    model.writer.add_type(gguf.GGUFType.ADAPTER)
    model.writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    model.writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for layer in range(N_LAYER):
        a, b = model.random(rank, N_FF), model.random(N_EMBD, rank, gain=4.0)
        model.add_layer(layer, {"ffn_down.weight.lora_a": a, "ffn_down.weight.lora_b": b})
    model.write()


WIDE_MODELS: Final[dict[str, Callable[[Path], None]]] = {
    "wide": _write_wide,
    "wide-moe": _write_moe,
    "wide-lora": _write_lora,
}
