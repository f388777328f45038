"""What a projector's file must contain, because mtmd uses it without checking.

mtmd builds its graph from whatever it has found, and a tensor that is missing ends the process. So does a type that an
operation does not support, or an index beyond a table, if a worker thread of ggml runs into it. Other contradictions in
a file are found when the library plans an image, and caught there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from trio_runner.llama.ggml_types import CANNOT_MULTIPLY
from trio_runner.llama.gguf import MAX_BLOCKS, GgufArray, GgufHeader, GgufTensor

_VISION: Final = "clip.vision."
_PATCHES: Final = "v.patch_embd.weight"
_PATCHES_OF_SECOND_FRAME: Final = "v.patch_embd.weight.1"
_POSITIONS: Final = "v.position_embd.weight"
_CLASS: Final = "v.class_embd"

_FLOATS: Final = frozenset({"f32", "f16", "bf16"})

_MLP: Final = "mlp"
_LLAVA: Final = frozenset({_MLP, "ldp", "ldpv2", "adapter"})
_RESAMPLERS: Final = frozenset({"resampler", "minicpmv4_6"})
_LOOK_UP: Final = _LLAVA | _RESAMPLERS
"""Kinds of projectors that look positions up in a table without checking its size."""
_TURNED: Final = frozenset({"mm.input_projection.weight"})
"""Matrices that are transposed, which quantised ones cannot be."""
_TWO_FRAMES: Final = frozenset(
    {"qwen2vl_merger", "qwen2.5vl_merger", "qwen2.5o", "qwen3vl_merger", "ling3vl", "exaone4_5", "glm4v", "glm5v"}
)
"""Kinds that have patches of a second frame, for videos."""
_WITH_POSITIONS: Final = frozenset(
    {*_LOOK_UP, "lfm2", "phi4", "kimivl", "kimik25", "paddleocr", "muse-glimmer", "ling3vl", "gemma4v"}
    | {"gemma4uv", "hunyuanvl", "deepseekocr"}
)
"""Kinds that use the table of positions without checking that it exists."""
_SQUARE: Final = frozenset(
    {*_LOOK_UP, "gemma3", "gemma3nv", "idefics3", "internvl", "nemotron_v2_vl", "llama4"}
    | {"cogvlm", "janus_pro", "step3vl"}
)
"""Kinds that scale images to one size, or cut them into squares of this size. Other kinds leave the size at 0."""
_CONVOLUTIONS: Final = "gemma3nv"
"""The kind that is not a transformer. It has no patches, and blocks of its own."""
_OF_CONVOLUTIONS: Final = {
    ".conv_exp.weight": (".conv_pwl.weight",),
    ".attn.query.proj.weight": tuple(f".attn.{part}.proj.weight" for part in ("key", "value", "output")),
}
_APART: Final = frozenset({*_LLAVA, "minicpmv4_6", "granite4_vision"})
"""Kinds whose queries, keys and values have matrices of their own, even if the file has fused ones."""
_APART_WITH_BIAS: Final = frozenset({"qwen2vl_merger", "qwen2.5vl_merger", "qwen2.5o", "youtuvl"})
"""Kinds that have such matrices with biases."""
_FUSED_WITH_BIAS: Final = frozenset({"qwen3vl_merger", "cogvlm", "exaone4_5", "mimovl"})
"""Kinds that have one matrix for queries, keys and values, with a bias."""
_RESAMPLER_GRID: Final = 70
"""Rows and columns of the table of positions that resamplers use for images of any size."""


def problem_of(header: GgufHeader) -> str | None:
    """Why mtmd must not be given a file with this header, in words that follow the file's name; None if it may be."""
    if header.metadata.get("clip.has_vision_encoder") is not True:
        return None  # mtmd refuses it
    problem = _problem_of_numbers(header)
    if problem is not None:
        return problem
    kind = _kind(header)
    for tensor in header.tensors:
        if not _can_compute(tensor, kind):
            return f"the tensor {tensor.name} has the type {tensor.type}, which mtmd cannot compute with"
    tensors = {tensor.name: tensor for tensor in header.tensors}
    missing = next((name for name in _needed(header, tensors) if name not in tensors), None)
    if missing is not None:
        return f"the tensor {missing} is missing"
    return _problem_of_positions(header, tensors)


def _kind(header: GgufHeader) -> object:
    return header.metadata.get("clip.projector_type") or header.metadata.get(_VISION + "projector_type")


def _number(header: GgufHeader, key: str) -> int:
    """The value of a key, or 0 if it is missing. mtmd itself reports the keys that it needs."""
    value = header.metadata.get(_VISION + key)
    return value if isinstance(value, int) else 0


def _problem_of_numbers(header: GgufHeader) -> str | None:
    n_blocks = _number(header, "block_count")
    if not 0 <= n_blocks <= MAX_BLOCKS:
        return f"damaged: it claims {n_blocks} blocks"
    if _kind(header) in _SQUARE and _number(header, "image_size") < 1:
        return "damaged: it does not say how large images are"
    epsilon = header.metadata.get(_VISION + "attention.layer_norm_epsilon")
    if isinstance(epsilon, float) and not (math.isfinite(epsilon) and epsilon >= 0):
        return f"damaged: layer_norm_epsilon is {epsilon}"
    for name in ("image_mean", "image_std"):
        values = header.metadata.get(_VISION + name)
        numbers = values.values if isinstance(values, GgufArray) and values.values else ()
        if not all(isinstance(value, float) and math.isfinite(value) for value in numbers):
            return f"damaged: {name} is {numbers}"
        if name == "image_std" and 0.0 in numbers:
            return "damaged: image_std is 0"
    return None


def _can_compute(tensor: GgufTensor, kind: object) -> bool:
    n_dimensions = max((i + 1 for i, size in enumerate(tensor.shape) if size > 1), default=1)
    is_added = n_dimensions == 1 or (tensor.name == _POSITIONS and kind not in _LOOK_UP)
    if is_added:  # or multiplied element by element
        return tensor.type == "f32"
    is_kernel = n_dimensions > 2 and "_exps." not in tensor.name
    return tensor.type in _FLOATS if is_kernel or tensor.name in _TURNED else tensor.type not in CANNOT_MULTIPLY


def _needed(header: GgufHeader, tensors: dict[str, GgufTensor]) -> Iterator[str]:
    """Names of the tensors that mtmd uses without checking that they exist."""
    kind = _kind(header)
    if kind == _CONVOLUTIONS:
        yield "v.conv_stem.conv.weight"
        for name in tensors:
            for end, others in _OF_CONVOLUTIONS.items():
                yield from (name.removesuffix(end) + other for other in others if name.endswith(end))
        return
    yield _PATCHES
    if kind in _TWO_FRAMES:
        yield _PATCHES_OF_SECOND_FRAME
    if kind in _WITH_POSITIONS:
        yield _POSITIONS
    if kind == _MLP:
        yield from ("mm.0.weight", "mm.0.bias")
        if "mm.3.weight" in tensors:
            yield from ("mm.1.weight", "mm.1.bias", "mm.3.bias", "mm.4.weight", "mm.4.bias")
        else:
            yield from ("mm.2.weight", "mm.2.bias")
    if "mm.patch_merger.weight" in tensors and kind in ("pixtral", "lightonocr"):
        yield "mm.input_norm.weight"
    for block in range(_number(header, "block_count")):
        for part in _attention(kind, f"v.blk.{block}.attn_", tensors):
            yield f"v.blk.{block}.attn_{part}"


def _attention(kind: object, prefix: str, tensors: dict[str, GgufTensor]) -> tuple[str, ...]:
    if kind in _APART_WITH_BIAS:
        return tuple(f"{part}.{what}" for part in "qkv" for what in ("weight", "bias"))
    if kind in _FUSED_WITH_BIAS:
        return ("qkv.weight", "qkv.bias")
    if prefix + "qkv.weight" in tensors and kind not in _APART:
        return ()
    return tuple(f"{part}.weight" for part in "qkv")


def _problem_of_positions(header: GgufHeader, tensors: dict[str, GgufTensor]) -> str | None:
    """What is wrong with the table of positions, which is read without a check of its bounds."""
    kind, patch_size = _kind(header), _number(header, "patch_size")
    if kind in _LLAVA and patch_size > 0:
        n_needed = (_number(header, "image_size") // patch_size) ** 2 + (_CLASS in tensors)
    elif kind in _RESAMPLERS:
        n_needed = _RESAMPLER_GRID**2
    else:
        return None
    shape = tensors[_POSITIONS].shape
    n_positions = shape[1] if len(shape) > 1 else 1
    return f"the tensor {_POSITIONS} has {n_positions} rows, not {n_needed}" if n_positions < n_needed else None
