"""Projector files on which mtmd would end the process: each is refused with a `LoadError`."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.llama.pictures import PAIRS
from trio_runner.llama.gguf import check_gguf
from trio_runner.llama.mmproj import problem_of

Models = Callable[[str], Path]
Change = Callable[[bytes], bytes]

F16, Q8_0, I8, I32 = 1, 8, 24, 26


def without(tensor: str) -> Change:
    return replaced(tensor, tensor[:-1] + "_")


def replaced(old: str, new: str) -> Change:
    """Replaces bytes of the header by as many others."""

    def change(data: bytes) -> bytes:
        assert len(old) == len(new)
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return change


def tensor_info(data: bytes, tensor: str) -> tuple[int, int]:
    """The offset of the sizes of a tensor, and the number of them."""
    begin = data.index(struct.pack("<Q", len(tensor)) + tensor.encode()) + 8 + len(tensor)
    return begin + 4, int(struct.unpack_from("<I", data, begin)[0])


def of_type(tensor: str, kind: int) -> Change:
    def change(data: bytes) -> bytes:
        begin, n_dimensions = tensor_info(data, tensor)
        at = begin + 8 * n_dimensions
        return data[:at] + struct.pack("<I", kind) + data[at + 4 :]

    return change


def of_size(tensor: str, dimension: int, size: int) -> Change:
    def change(data: bytes) -> bytes:
        at = tensor_info(data, tensor)[0] + 8 * dimension
        return data[:at] + struct.pack("<Q", size) + data[at + 8 :]

    return change


def number(key: str, value: int | float) -> Change:
    def change(data: bytes) -> bytes:
        at = data.index(key.encode()) + len(key) + 4
        return data[:at] + struct.pack("<f" if isinstance(value, float) else "<I", value) + data[at + 4 :]

    return change


def kind(old: str, new: str) -> Change:
    """Another type of projector with the same tensors."""

    def change(data: bytes) -> bytes:
        key = b"clip.projector_type"
        at = data.index(key) + len(key) + 4
        assert data[at + 8 : at + 8 + len(old)] == old.encode()
        padded = data[:at] + struct.pack("<Q", len(new)) + new.encode() + data[at + 8 + len(old) :]
        # The data after the header is aligned to 32 bytes, so the name of the model makes up for the difference.
        name = b"general.name"
        begin = padded.index(name) + len(name) + 4
        length = int(struct.unpack_from("<Q", padded, begin)[0])
        more = (len(old) - len(new)) % 32
        return padded[:begin] + struct.pack("<Q", length + more) + b"x" * more + padded[begin + 8 :]

    return change


HOSTILE: Final[dict[str, tuple[tuple[str, Change], ...]]] = {
    "llama": (
        ("no patches", without("v.patch_embd.weight")),
        ("no positions", without("v.position_embd.weight")),
        ("no queries", without("v.blk.0.attn_q.weight")),
        ("no keys", without("v.blk.1.attn_k.weight")),
        ("no values", without("v.blk.1.attn_v.weight")),
        ("queries, keys and values in one", replaced("v.blk.0.attn_q.weight", "v.blk.0.attn_qkv.weig")),
        ("no first layer", without("mm.0.weight")),
        ("no first bias", without("mm.0.bias")),
        ("no second layer", without("mm.2.weight")),
        ("no second bias", without("mm.2.bias")),
        ("a third layer and no norms", replaced("mm.2.weight", "mm.3.weight")),
        ("more blocks", number("clip.vision.block_count", 3)),
        ("a million blocks", number("clip.vision.block_count", 1_000_000)),
        ("few positions", of_size("v.position_embd.weight", 1, 15)),
        ("larger pictures", number("clip.vision.image_size", 8192)),
        ("pictures of nothing", number("clip.vision.image_size", 0)),
        ("patches of nothing", number("clip.vision.patch_size", 0)),
        ("smaller patches", number("clip.vision.patch_size", 7)),
        ("no heads", number("clip.vision.attention.head_count", 0)),
        ("three heads", number("clip.vision.attention.head_count", 3)),
        ("narrow", number("clip.vision.embedding_length", 32)),
        ("negative epsilon", number("clip.vision.attention.layer_norm_epsilon", -1.0)),
        ("epsilon not a number", number("clip.vision.attention.layer_norm_epsilon", float("nan"))),
        ("integer queries", of_type("v.blk.0.attn_q.weight", I32)),
        ("tiny integer queries", of_type("v.blk.0.attn_q.weight", I8)),
        ("half a bias", of_type("v.blk.0.attn_q.bias", F16)),
        ("half a norm", of_type("v.blk.0.ln1.weight", F16)),
        ("quantized norm", of_type("v.blk.0.ln1.weight", Q8_0)),
        ("narrow queries", of_size("v.blk.0.attn_q.weight", 1, 32)),
        ("narrow keys", of_size("v.blk.0.attn_k.weight", 0, 32)),
        ("short bias", of_size("v.blk.0.attn_v.bias", 0, 33)),
        ("short norm", of_size("v.blk.1.ln2.bias", 0, 33)),
        ("fused with bias", kind("mlp", "qwen3vl_merger")),
        ("no stem", kind("mlp", "gemma3nv")),
    ),
    "swa": (
        ("no patches", without("v.patch_embd.weight")),
        ("integer patches", of_type("v.patch_embd.weight", I32)),
        ("half positions", of_type("v.position_embd.weight", F16)),
        ("quantized projection", of_type("mm.input_projection.weight", Q8_0)),
        ("half a norm", of_type("mm.soft_emb_norm.weight", F16)),
        ("few positions", of_size("v.position_embd.weight", 1, 16)),
        ("no stem", kind("gemma3", "gemma3nv")),
    ),
    "mrope": (
        ("no patches", without("v.patch_embd.weight")),
        ("no patches of the second frame", without("v.patch_embd.weight.1")),
        ("no bias of queries", without("v.blk.0.attn_q.bias")),
        ("no bias of values", without("v.blk.1.attn_v.bias")),
        ("no keys", without("v.blk.0.attn_k.weight")),
    ),
    "tiles": (
        ("no patches", without("v.patch_embd.weight")),
        ("no queries", without("v.blk.1.attn_q.weight")),
        ("tiles of nothing", number("clip.vision.image_size", 0)),
        ("no positions to scale", kind("idefics3", "phi4")),
        ("narrow projection", of_size("mm.model.fc.weight", 0, 128)),
    ),
}
"""Hostile changes to the projector of each model."""

PROGRAM: Final = """
import sys
from trio_runner.config import ModelConfig
from trio_runner.errors import LoadError
from trio_runner.pixels import Pixels
from trio_runner.llama import Model, Projector

model = Model(ModelConfig(path=sys.argv[1]))
for path in sys.argv[2:]:
    print(path, flush=True)
    try:
        projector = Projector(model, path, max_rows=64, threads=2)
        projector.encoding(Pixels(56, 56, bytes(3 * 56 * 56))).run()
    except LoadError as error:
        assert error.path == path
        continue
    print("loaded", flush=True)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_projectors_are_refused(models: Models, tmp_path: Path, name: str) -> None:
    good = models(PAIRS[name])
    paths = []
    for what, change in HOSTILE[name]:
        paths.append(tmp_path / f"{what}.gguf")
        paths[-1].write_bytes(change(good.read_bytes()))
        assert paths[-1].read_bytes() != good.read_bytes()
        check_gguf(paths[-1])  # the header as such is well-formed
    command = [sys.executable, "-c", PROGRAM, str(models(name)), *map(str, paths), str(good)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout.splitlines()
    assert said == [*map(str, paths), str(good), "loaded"], done.stderr[-2000:]
    assert done.returncode == 0


def test_sound_projectors_pass(models: Models) -> None:
    data = Path(__file__).resolve().parents[1] / "data" / "mmproj-shapes.gguf"
    for path in (*map(models, PAIRS.values()), data):
        assert problem_of(check_gguf(path)) is None
