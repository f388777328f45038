"""Headers are read, and damaged files are refused."""

from __future__ import annotations

import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.llama.running import Running
from tests.tiny_models import MODELS
from trio_runner.config import KV_TYPES
from trio_runner.errors import LoadError
from trio_runner.llama.ggml_types import CANNOT_MULTIPLY, GGML_TYPES, WEIGHT_TYPES
from trio_runner.llama.gguf import GgufArray, check_gguf

Models = Callable[[str], Path]

ARCHITECTURES = {"swa": "gemma3", "swa-short": "gemma3", "mrope": "qwen2vl", "bert-cls": "bert", "rerank": "bert"}
ARCHITECTURES |= {"qwen-embed": "qwen3", "rerank-causal": "qwen3"}
ARCHITECTURES |= {name: name for name in ("mamba", "lfm2", "gpt2", "t5", "bert")}
U32, F32, STRING, ARRAY = 4, 6, 8, 9


@pytest.mark.parametrize("name", MODELS)
def test_sound_headers_pass(models: Models, name: str) -> None:
    path = models(name)
    header = check_gguf(path)
    reader = gguf.GGUFReader(path)
    assert header.version == 3
    assert header.name == f"tiny-{name}"
    assert header.architecture == ARCHITECTURES.get(name, "clip" if name.startswith("mmproj") else "llama")
    assert [(tensor.name, tensor.shape, tensor.offset, tensor.n_bytes) for tensor in header.tensors] == [
        (tensor.name, tuple(tensor.shape), tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    ]
    assert set(header.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
    assert header.n_params == sum(tensor.n_elements for tensor in reader.tensors)


def test_short_arrays_are_kept_and_long_ones_counted(models: Models) -> None:
    header = check_gguf(models("mrope"))
    assert header.metadata["qwen2vl.rope.dimension_sections"] == GgufArray("i", 4, (4, 6, 6, 0))
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GgufArray)
    assert tokens.length > 256
    assert tokens.values is None


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    match value:
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case float():
            return struct.pack("<If", F32, value)
        case int():
            return struct.pack("<II", U32, value)
        case list():
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    raise TypeError(value)


Tensor = tuple[str, tuple[int, ...], int, int]


def write(
    path: Path,
    keys: list[tuple[str, object]],
    tensors: tuple[Tensor, ...] = (),
    *,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    n_data: int = 0,
    version: int = 3,
) -> Path:
    data = b"GGUF" + struct.pack("<IQQ", version, n_tensors or len(tensors), n_keys or len(keys))
    data += b"".join(_string(key) + _value(value) for key, value in keys)
    for name, shape, kind, offset in tensors:
        data += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    data += bytes(-len(data) % 32 + n_data)
    path.write_bytes(data)
    return path


ARCHITECTURE = ("general.architecture", "llama")


def with_key(key: str, value: object) -> list[tuple[str, object]]:
    return [ARCHITECTURE, (key, value)]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ([], "architecture"),
        ([ARCHITECTURE, ARCHITECTURE], "twice"),
        (with_key("llama.block_count", 0), "block_count is 0"),
        (with_key("llama.block_count", 513), "block_count is 513"),
        (with_key("llama.block_count", 2**32 - 1), "block_count"),
        (with_key("llama.block_count", 1.5), "block_count"),
        (with_key("llama.context_length", 0), "context_length"),
        (with_key("llama.context_length", 2**32 - 1), "context_length"),
        (with_key("llama.attention.head_count", 0), "head_count"),
        ([ARCHITECTURE, ("llama.attention.head_count", 4), ("llama.attention.head_count_kv", 3)], "share"),
        (with_key("llama.attention.layer_norm_rms_epsilon", math.nan), "epsilon is nan"),
        (with_key("llama.attention.layer_norm_rms_epsilon", -1.0), "negative"),
        (with_key("llama.rope.freq_base", math.nan), "freq_base"),
        (with_key("llama.rope.freq_base", 0.0), "more than 0"),
        (with_key("llama.rope.freq_base", math.inf), "freq_base"),
        (with_key("general.alignment", 0), "alignment"),
        (with_key("general.alignment", 48), "alignment"),
        (with_key("tokenizer.ggml.tokens", ["a", "b", "a"]), "same token twice"),
        (with_key("tokenizer.chat_template", "x" * (2 << 20)), "template"),
        (with_key("split.no", 1), "first part"),
    ],
)
def test_values_that_abort_llama_cpp_are_refused(tmp_path: Path, keys: list[tuple[str, object]], match: str) -> None:
    path = write(tmp_path / "model.gguf", keys)
    with pytest.raises(LoadError, match=match) as error:
        check_gguf(path)
    assert error.value.path == str(path)


@pytest.mark.parametrize("kind", ["modem", "mmproj", "imatrix", 7])
def test_no_general_type_of_a_model_switches_its_checks_off(tmp_path: Path, kind: object) -> None:
    path = write(tmp_path / "model.gguf", [ARCHITECTURE, ("general.type", kind), ("llama.block_count", 0)])
    with pytest.raises(LoadError, match="block_count is 0"):
        check_gguf(path)


def test_type_table_agrees_with_the_gguf_package() -> None:
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    # The package counts two floats in a block of q8_1; ggml-common.h has two halves.
    sizes[gguf.GGMLQuantizationType.Q8_1] = (32, 36)
    assert {number: GGML_TYPES[number][1:3] for number in sizes} == sizes
    names = {number: gguf.GGMLQuantizationType(number).name for number in sizes}
    assert {number: GGML_TYPES[number].name.upper() for number in sizes} == names


def test_every_type_is_a_type_of_weights_or_cannot_be_multiplied() -> None:
    assert WEIGHT_TYPES.keys() | CANNOT_MULTIPLY == {kind.name for kind in GGML_TYPES.values()}
    assert not WEIGHT_TYPES.keys() & CANNOT_MULTIPLY
    assert set(KV_TYPES) <= WEIGHT_TYPES.keys()


def test_odd_but_sound_values_pass(tmp_path: Path) -> None:
    keys = [ARCHITECTURE, ("tokenizer.ggml.tokens", ["a", "", ""]), ("llama.logit_scale", math.inf)]
    check_gguf(write(tmp_path / "model.gguf", keys, (("scalar", (), 0, 0),), n_data=64))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ((("a", (32, 4), 0, 0),), "truncated: the tensor a ends at byte"),
        ((("a", (8, 1), 0, 0), ("a", (8, 1), 0, 32)), "twice"),
        ((("a", (8, 0), 0, 0),), "shape"),
        ((("a", (2**40, 2**40), 0, 0),), "shape"),
        ((("a", (1, 1, 1, 1, 1), 0, 0),), "5 dimensions"),
        ((("a", (8, 1), 77, 0),), "unknown type 77"),
        ((("a", (8, 1), 2, 0),), "blocks"),
        ((("a", (8, 1), 0, 3),), "aligned"),
        ((("a", (8, 1), 0, 2**63),), "truncated"),
        ((("a" * 64, (8, 1), 0, 0),), "too long"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path: Path, tensors: tuple[Tensor, ...], match: str) -> None:
    path = write(tmp_path / "model.gguf", [ARCHITECTURE], tensors, n_data=64)
    with pytest.raises(LoadError, match=match):
        check_gguf(path)


def test_impossible_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for n_keys, n_tensors in ((2**60, None), (None, 2**60), (5, None), (None, 5)):
        with pytest.raises(LoadError):
            check_gguf(write(path, [ARCHITECTURE], n_keys=n_keys, n_tensors=n_tensors))
    for version in (0, 1, 4, 3 << 24):
        with pytest.raises(LoadError, match=r"version|big-endian"):
            check_gguf(write(path, [ARCHITECTURE], version=version))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(LoadError, match="no such file"):
        check_gguf(path)
    path.touch()
    with pytest.raises(LoadError, match="empty"):
        check_gguf(path)
    path.write_bytes(b"<html>")
    with pytest.raises(LoadError, match=r"begins with b'<htm'"):
        check_gguf(path)
    with pytest.raises(LoadError, match="regular"):
        check_gguf(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(LoadError, match="regular"):
            check_gguf(tmp_path / "pipe")
    with pytest.raises(LoadError):
        check_gguf("a\0b")


def test_a_file_cut_short_anywhere_is_refused(models: Models, tmp_path: Path) -> None:
    data = models("llama").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(1, 200, 7), *np.linspace(200, len(data) - 1, 60).astype(int).tolist()]:
        path.write_bytes(data[:size])
        with pytest.raises(LoadError):
            check_gguf(path)


# Loads the files on the command line as LlamaLoader does, and decodes a little. Every failure must be a LoadError.
LOAD_ALL = """
import sys
from pathlib import Path
from tests.llama.running import Running
from trio_runner.errors import LoadError
outcomes = []
for path in sys.argv[1:]:
    print(path, file=sys.stderr, flush=True)
    try:
        Running(Path(path)).generate([5, 6, 7], 2)
        outcomes.append("runs")
    except LoadError:
        outcomes.append("refused")
print(len(outcomes), outcomes.count("refused"))
"""


def test_flipped_bytes_are_refused_or_harmless(models: Models, tmp_path: Path) -> None:
    """Bits of the header are flipped, with a fixed seed. The files are loaded in a process of its own."""
    rng = random.Random(20)
    data = models("llama").read_bytes()
    header_size = min(tensor.offset for tensor in check_gguf(models("llama")).tensors)
    paths = []
    for index in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            # Most of the header is the vocabulary. Every second file is damaged in the keys before it.
            at = rng.randrange(4, 1200 if index % 2 else header_size)
            damaged[at] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(damaged)
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *paths], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    n_loaded, n_refused = map(int, done.stdout.split())
    assert n_loaded == 60
    assert n_refused > 10


def test_weights_that_are_not_numbers_are_refused(models: Models, tmp_path: Path) -> None:
    data = bytearray(models("llama").read_bytes())
    tensor = next(tensor for tensor in check_gguf(models("llama")).tensors if tensor.name == "output_norm.weight")
    data[tensor.offset : tensor.offset + 4] = struct.pack("<f", math.nan)
    path = tmp_path / "nan.gguf"
    path.write_bytes(data)
    with pytest.raises(LoadError, match="not numbers"):
        Running(path)
