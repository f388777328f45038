"""Tiny projectors (mmproj files): each turns an image into rows for one of the tiny models.

They differ in the number of rows and in what goes with them:

    mmproj        for "llama": 16 rows for every image, and no text around them
    mmproj-wide   mmproj for a wider model: refused
    mmproj-gemma  for "swa": 16 rows with non-causal attention, between two texts
    mmproj-qwen   for "mrope": one row for 28 x 28 pixels, at least 8 rows, between two texts; as many positions as rows
                  along the longer side
    mmproj-tiles  for "tiles": an overview, and tiles of 56 pixels of the image scaled to 112 pixels; each has 4 rows
                  and a text
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import gguf

from tests.tiny_gguf import N_EMBD, N_FF, Array, ModelFile, ones, zeros

N_LAYER: Final = 2
IMAGE_SIZE: Final = 56
PATCH_SIZE: Final = 14


def _projector(path: Path, kind: str, name: str, *, seed: int, patch: int = PATCH_SIZE, merge: int = 1) -> ModelFile:
    model = ModelFile(path, "clip", name, seed=seed)
    writer = model.writer
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(IMAGE_SIZE)
    writer.add_vision_patch_size(patch)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_embedding_length(N_EMBD)
    writer.add_vision_feed_forward_length(N_FF)
    writer.add_vision_projection_dim(N_EMBD)
    writer.add_vision_block_count(N_LAYER)
    writer.add_vision_head_count(4)
    writer.add_vision_attention_layernorm_eps(1e-5)
    if merge > 1:
        writer.add_vision_projector_scale_factor(merge)
    return model


def _patches(model: ModelFile, patch: int = PATCH_SIZE) -> Array:
    return model.random(N_EMBD, 3 * patch * patch).reshape(N_EMBD, 3, patch, patch)


def _add_encoder(model: ModelFile, patch: int = PATCH_SIZE) -> None:
    """Add the whole encoder except the projection."""
    model.add({"v.patch_embd.weight": _patches(model, patch), "v.patch_embd.bias": zeros(N_EMBD)})
    n_positions = (IMAGE_SIZE // patch) ** 2
    model.add({"v.position_embd.weight": model.random(n_positions, N_EMBD, gain=8.0)})
    _add_layers(model)


def _add_layers(model: ModelFile) -> None:
    shapes: dict[str, tuple[int, int]] = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (N_EMBD, N_EMBD))
    shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    for layer in range(N_LAYER):
        for part, shape in shapes.items():
            model.add({f"v.blk.{layer}.{part}.weight": model.random(*shape, gain=2.0)})
            model.add({f"v.blk.{layer}.{part}.bias": zeros(shape[0])})
        for norm in ("ln1", "ln2"):
            model.add({f"v.blk.{layer}.{norm}.weight": ones(N_EMBD), f"v.blk.{layer}.{norm}.bias": zeros(N_EMBD)})
    model.add({"v.post_ln.weight": ones(N_EMBD), "v.post_ln.bias": zeros(N_EMBD)})


def _add_perceptron(model: ModelFile, n_in: int, n_out: int) -> None:
    model.add({"mm.0.weight": model.random(N_FF, n_in), "mm.0.bias": zeros(N_FF)})
    model.add({"mm.2.weight": model.random(n_out, N_FF, gain=2.0), "mm.2.bias": zeros(n_out)})


def _write_mmproj(path: Path, *, name: str = "tiny-mmproj", n_out: int = N_EMBD) -> None:
    model = _projector(path, "mlp", name, seed=1)
    model.writer.add_array("clip.vision.feature_layer", [N_LAYER])  # the default leaves out the last layer
    _add_encoder(model)
    _add_perceptron(model, N_EMBD, n_out)
    model.write()


def _write_wide(path: Path) -> None:
    _write_mmproj(path, name="tiny-mmproj-wide", n_out=2 * N_EMBD)


def _write_gemma(path: Path) -> None:
    patch, merge = 7, 2
    model = _projector(path, "gemma3", "tiny-mmproj-gemma", seed=2, patch=patch, merge=merge)
    _add_encoder(model, patch)
    model.add({"mm.soft_emb_norm.weight": ones(N_EMBD), "mm.input_projection.weight": model.random(N_EMBD, N_EMBD)})
    model.write()


def _write_qwen(path: Path) -> None:
    model = _projector(path, "qwen2vl_merger", "tiny-mmproj-qwen", seed=3)
    for suffix in ("", ".1"):  # one per frame of a video; a still image uses both
        model.add({f"v.patch_embd.weight{suffix}": _patches(model)})
    _add_layers(model)
    _add_perceptron(model, 4 * N_EMBD, N_EMBD)
    model.write()


def _write_tiles(path: Path) -> None:
    merge = 2
    model = _projector(path, "idefics3", "tiny-mmproj-tiles", seed=4, merge=merge)
    model.writer.add_vision_preproc_image_size(2 * IMAGE_SIZE)
    _add_encoder(model)
    model.add({"mm.model.fc.weight": model.random(N_EMBD, merge**2 * N_EMBD)})
    model.write()


PROJECTORS: Final[dict[str, Callable[[Path], None]]] = {
    "mmproj": _write_mmproj,
    "mmproj-wide": _write_wide,
    "mmproj-gemma": _write_gemma,
    "mmproj-qwen": _write_qwen,
    "mmproj-tiles": _write_tiles,
}
