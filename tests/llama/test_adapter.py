"""Adapters: which files are refused, and that adapters come and go while a context decodes."""

from __future__ import annotations

import gc
import itertools
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.llama.running import Running, tokens_of
from tests.tiny_gguf import Bpe
from trio_runner.config import AdapterConfig, ModelConfig
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Trim
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.llama import Model
from trio_runner.llama.adapter import MAX_RANK
from trio_runner.llama.library import last_error, native

Models = Callable[[str], Path]
Tensors = dict[str, NDArray[Any]]

RANK: Final = 4
N: Final = 64
N_VOCAB: Final = len(Bpe().tokens)
Q: Final = "blk.0.attn_q.weight"
"""A matrix of 64 by 64 elements."""
DOWN: Final = "blk.0.ffn_down.weight"
"""A matrix that maps 128 elements to 64."""


def pair(base: str = Q, *, n_in: int = N, n_out: int = N, ranks: tuple[int, int] = (RANK, RANK)) -> Tensors:
    numbers = np.random.default_rng(len(base))
    a, b = (numbers.standard_normal(shape, np.float32) / 2 for shape in ((ranks[0], n_in), (n_out, ranks[1])))
    return {f"{base}.lora_a": a, f"{base}.lora_b": b}


def write(path: Path, tensors: Tensors, metadata: dict[str, object] | None = None, *, quantised: bool = False) -> Path:
    """Write an adapter with these tensors. Keys whose value is None are left out."""
    values: dict[str, object] = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(RANK),
    } | (metadata or {})
    writer = gguf.GGUFWriter(str(path), str(values.pop("general.architecture")))
    for name, value in values.items():
        match value:
            case str():
                writer.add_string(name, value)
            case float():
                writer.add_float32(name, value)
            case int():
                writer.add_uint32(name, value)
            case list():
                writer.add_array(name, value)
    for name, tensor in tensors.items():
        raw_dtype = gguf.GGMLQuantizationType.Q8_0 if quantised else None
        writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cast(tensors: Tensors, dtype: type) -> Tensors:
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def with_value(value: float, which: str = ".lora_b") -> Tensors:
    tensors = pair()
    tensors[Q + which][0, 0] = value
    return tensors


def reshaped(*shape: int) -> Tensors:
    return {name: np.ones(shape, np.float32) for name in pair()}


GOOD: Final[dict[str, tuple[Tensors, dict[str, object]]]] = {
    "a pair": (pair(), {}),
    "halves": (cast(pair(), np.float16), {}),
    "not square": (pair(DOWN, n_in=128), {}),
    "rank 1": (pair(ranks=(1, 1)), {}),
    "a rank above all sizes": (pair(ranks=(300, 300)), {}),
    "no alpha": (pair(), {"adapter.lora.alpha": None}),
    "alpha 0": (pair(), {"adapter.lora.alpha": 0.0}),
    "vectors of tokens": (pair("token_embd.weight", n_in=RANK, n_out=N, ranks=(N_VOCAB, RANK)), {}),
    "norms besides": (pair() | {"blk.0.attn_norm.weight": np.ones(N, np.float32)}, {}),
}

HOSTILE: Final[dict[str, tuple[Tensors, dict[str, object], str]]] = {
    "a model": (pair(), {"general.type": "model"}, "a model, not an adapter"),
    "a projector": (pair(), {"general.type": "mmproj"}, "a mmproj, not an adapter"),
    "its type is a number": (pair(), {"general.type": 1}, "not an adapter"),
    "no type": (pair(), {"general.type": None}, "a model, not an adapter"),
    "another architecture": (pair(), {"general.architecture": "gemma3"}, "is for gemma3, the model is llama"),
    "not a LoRA": (pair(), {"adapter.type": "lokr"}, "lokr, not lora"),
    "what it is stays open": (pair(), {"adapter.type": None}, "None, not lora"),
    "what it is is a number": (pair(), {"adapter.type": 7}, "7, not lora"),
    "alpha is not a number": (pair(), {"adapter.lora.alpha": math.nan}, "alpha is not a finite number"),
    "alpha is infinite": (pair(), {"adapter.lora.alpha": math.inf}, "alpha is not a finite number"),
    "alpha is a text": (pair(), {"adapter.lora.alpha": "16"}, "alpha is not a finite number"),
    "alpha is whole": (pair(), {"adapter.lora.alpha": 16}, "alpha is not a finite number"),
    "alpha is a list": (pair(), {"adapter.lora.alpha": [16.0]}, "alpha is not a finite number"),
    "activated": (pair(), {"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
    "activated by nothing": (pair(), {"adapter.alora.invocation_tokens": 1}, "aLoRA"),
    "empty": ({}, {}, "adapts no tensor"),
    "norms only": ({"blk.0.attn_norm.weight": np.ones(N, np.float32)}, {}, "adapts no tensor"),
    "only a": ({f"{Q}.lora_a": pair()[f"{Q}.lora_a"]}, {}, "without its other half"),
    "only b": ({f"{Q}.lora_b": pair()[f"{Q}.lora_b"]}, {}, "without its other half"),
    "halves of different matrices": (
        {f"{Q}.lora_a": np.ones((RANK, N), np.float32), f"{DOWN}.lora_b": np.ones((N, RANK), np.float32)},
        {},
        "without its other half",
    ),
    "no name": (
        {".lora_a": np.ones((RANK, N), np.float32), ".lora_b": np.ones((N, RANK), np.float32)},
        {},
        "other half",
    ),
    "something else": (pair() | {"blk.0.attn_q.bias": np.ones(N, np.float32)}, {}, "not part of a LoRA"),
    "a matrix that the model does not have": (pair("blk.7.attn_q.weight"), {}, "does not exist in base model"),
    "too long": (pair(n_in=2 * N), {}, "incorrect shape"),
    "too wide": (pair(n_out=2 * N), {}, "incorrect shape"),
    "ranks that differ": (pair(ranks=(RANK, 2 * RANK)), {}, "of rank 4 where its other half is of rank 8"),
    "vectors of tokens whose ranks differ": (
        pair("token_embd.weight", n_in=RANK, n_out=N, ranks=(N_VOCAB, 2 * RANK)),
        {},
        "of rank 4 where",
    ),
    "vectors of tokens the other way round": (pair("token_embd.weight", n_in=N, n_out=N_VOCAB), {}, "rank"),
    "whole numbers": (cast(pair(), np.int32), {}, "i32, which cannot be multiplied"),
    "small whole numbers": (cast(pair(), np.int8), {}, "i8, which cannot be multiplied"),
    "large whole numbers": (cast(pair(), np.int64), {}, "i64, which cannot be multiplied"),
    "doubles": (cast(pair(), np.float64), {}, "f64, which cannot be multiplied"),
    "a whole number in one half": (
        pair() | cast({f"{Q}.lora_b": pair()[f"{Q}.lora_b"]}, np.int16),
        {},
        "i16, which cannot be multiplied",
    ),
    "three dimensions": (reshaped(2, N, N), {}, r"the shape \(64, 64, 2\)"),
    "four dimensions": (reshaped(2, 1, N, N), {}, r"the shape \(64, 64, 1, 2\)"),
    "experts of a model without": (pair("blk.0.ffn_up_exps.weight"), {}, "not 0 matrices"),
    "b is not a number": (with_value(math.nan), {}, "does not compute numbers"),
    "a is not a number": (with_value(math.nan, ".lora_a"), {}, "does not compute numbers"),
    "b is infinite": (with_value(-math.inf), {}, "does not compute numbers"),
    "too large to count": (
        {name: tensor * np.float32(1e30) for name, tensor in pair().items()},
        {},
        "does not compute numbers",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_sound_adapters_load(models: Models, tmp_path: Path, name: str) -> None:
    tensors, metadata = GOOD[name]
    path = write(tmp_path / "lora.gguf", tensors, metadata)
    plain = Running(models("llama")).text(n_tokens=12)
    assert Running(models("llama"), adapters=(AdapterConfig(str(path)),)).text(n_tokens=12) != plain


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_adapters_are_refused(models: Models, tmp_path: Path, name: str) -> None:
    tensors, metadata, words = HOSTILE[name]
    path = str(write(tmp_path / "lora.gguf", tensors, metadata))
    running = Running(models("llama"))
    text = running.text(n_tokens=4)
    with pytest.raises(LoadError, match=words) as error:
        running.model.adapter(path)
    assert error.value.path == path
    assert running.text(n_tokens=4) == text


def test_quantised_adapters_need_whole_blocks(models: Models, tmp_path: Path) -> None:
    """They load if their rows are whole blocks, and are refused otherwise."""
    a, b = pair(ranks=(32, 32)).values()
    q8 = gguf.GGMLQuantizationType.Q8_0
    blocks = {f"{Q}.lora_{half}": gguf.quantize(values, q8) for half, values in (("a", a), ("b", b))}
    path = write(tmp_path / "lora.gguf", blocks, quantised=True)
    plain = Running(models("llama")).text(n_tokens=12)
    running = Running(models("llama"), adapters=(AdapterConfig(str(path)),))
    assert running.text(n_tokens=12) != plain
    data = path.read_bytes()
    shape = np.array([32, N], np.uint64).tobytes()
    assert shape in data
    path.write_bytes(data.replace(shape, np.array([RANK, N * 8], np.uint64).tobytes()))
    with pytest.raises(LoadError, match="not whole blocks"):
        running.model.adapter(str(path))


@pytest.mark.parametrize("n_bytes", [0, 4, 24, 300, -1])
def test_files_cut_short_are_refused(models: Models, tmp_path: Path, n_bytes: int) -> None:
    path = write(tmp_path / "lora.gguf", pair())
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(LoadError):
        Model(ModelConfig(path=str(models("llama")))).adapter(str(path))


@pytest.mark.parametrize("n_bytes", [1 << 21, 1 << 36])
def test_a_file_with_much_behind_its_last_tensor_is_refused(models: Models, tmp_path: Path, n_bytes: int) -> None:
    """A file with much behind its last tensor is refused, because llama.cpp would read all of it."""
    path = write(tmp_path / "lora.gguf", pair())
    os.truncate(path, n_bytes)
    with pytest.raises(LoadError, match=r"goes on for \d+ bytes after its last tensor"):
        Model(ModelConfig(path=str(models("llama")))).adapter(str(path))


def test_ranks_that_would_fill_the_memory_are_refused(models: Models, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.gguf", pair(ranks=(MAX_RANK + 1,) * 2))
    with pytest.raises(LoadError, match=f"is of rank {MAX_RANK + 1}, more than {MAX_RANK}"):
        Model(ModelConfig(path=str(models("llama")))).adapter(str(path))


def test_an_adapter_with_a_tensor_twice_is_refused(models: Models, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.gguf", pair())
    path.write_bytes(path.read_bytes().replace(b"lora_b", b"lora_a"))
    with pytest.raises(LoadError, match="appears twice"):
        Model(ModelConfig(path=str(models("llama")))).adapter(str(path))


def test_native_code_refuses_files_that_skip_the_header_check(models: Models, tmp_path: Path) -> None:
    """Files that skip the header check are refused by native code."""
    loaded = native()
    running = Running(models("llama"))
    out = loaded.ffi.new("trio_adapter **")
    hostile: list[tuple[Tensors, dict[str, object]]] = [
        (pair(), {"adapter.type": 7}),
        (pair(), {"adapter.lora.alpha": "16"}),
        (pair(), {"adapter.lora.alpha": 16}),
        (pair(), {"adapter.alora.invocation_tokens": [1, 2]}),
        (pair(ranks=(RANK, 2 * RANK)), {}),
        (reshaped(2, N, N), {}),
        ({f"{Q}.lora_a": pair()[f"{Q}.lora_a"]}, {}),
        (with_value(math.nan), {}),
    ]
    for tensors, metadata in hostile:
        path = write(tmp_path / "lora.gguf", tensors, metadata)
        code = loaded.lib.trio_adapter_open(running.model.handle, str(path).encode(), out)
        assert code == loaded.lib.TRIO_E_LOAD, (metadata, last_error())
        assert last_error()
        assert out[0] == loaded.ffi.NULL
    for arguments in ((running.model.handle, b"/nowhere", out), (running.model.handle, str(tmp_path).encode(), out)):
        assert loaded.lib.trio_adapter_open(*arguments) == loaded.lib.TRIO_E_LOAD
    assert running.text(n_tokens=4)


# ---- coming and going -----------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "one.gguf", pair()), write(tmp_path / "other.gguf", pair("blk.1.attn_q.weight"))


def configs(*paths: Path) -> tuple[AdapterConfig, ...]:
    return tuple(AdapterConfig(str(path), name=f"adapter{index}") for index, path in enumerate(paths))


def test_every_step_uses_the_adapters_it_names(models: Models, paths: tuple[Path, Path]) -> None:
    """Sequences with different adapters take turns. Each generates the same text as alone."""
    running = Running(models("llama"), adapters=configs(*paths), slots=6)
    sets = ((), ((0, 1.0),), ((1, 1.0),), ((0, 1.0), (1, 1.0)), ((0, 0.5),))
    tokens = running.tokens()

    def alone(adapters: tuple[tuple[int, float], ...]) -> list[int]:
        running.adapter_set = adapters
        return tokens_of(running.generate(tokens, 8))

    expected = [alone(adapters) for adapters in sets]
    assert len({tuple(text) for text in expected}) == len(sets)
    running.adapter_set = ()
    texts: list[list[int]] = [[] for _ in sets]
    samplers = [running.sampler() for _ in sets]
    for slot in range(len(sets)):
        assert running.context.apply(Trim(slot, 0))
    for _ in range(8):
        for slot, adapters in enumerate(sets):
            start = len(tokens) + len(texts[slot]) - 1 if texts[slot] else 0
            items = (texts[slot][-1],) if texts[slot] else tuple(tokens)
            chunk = Chunk(slot, slot, start, items, output=True)
            result = running.step(chunk, samplers={slot: samplers[slot]}, adapters=adapters)
            assert result.outcome is DecodeOutcome.OK
            texts[slot].append(result.sampled[slot].token)
    assert texts == expected


def test_an_adapter_in_use_outlives_its_handle(models: Models, paths: tuple[Path, Path]) -> None:
    running = Running(models("llama"), adapters=configs(*paths))
    expected = running.text(n_tokens=8)
    for adapter in running.adapters.values():
        adapter.close()
        adapter.close()
    gc.collect()
    assert running.text(n_tokens=8) == expected  # the step sets no adapters anew
    plain = Running(models("llama")).text(n_tokens=8)
    running.adapter_set = ()
    assert running.text(n_tokens=8) == plain
    running.adapter_set = ((0, 1.0),)
    with pytest.raises(EngineClosed):
        running.step(Chunk(0, 0, 0, (5,), output=False))
    running.adapter_set = ()
    assert running.text(n_tokens=8) == plain


@pytest.mark.parametrize("order", list(itertools.permutations(("model", "context", "adapter"))))
def test_handles_may_be_freed_in_any_order(models: Models, paths: tuple[Path, Path], order: tuple[str, ...]) -> None:
    running = Running(models("llama"), adapters=configs(*paths))
    assert running.step(Chunk(0, 0, 0, (5,), output=False)).outcome is DecodeOutcome.OK
    for what in order:
        if what == "adapter":
            for adapter in running.adapters.values():
                adapter.close()
        else:
            getattr(running, what).close()
        gc.collect()


def test_adapters_come_and_go_while_a_context_decodes(models: Models, paths: tuple[Path, Path]) -> None:
    running = Running(models("llama"), adapters=configs(*paths))
    expected = {adapters: texts(running, adapters) for adapters in ((), ((0, 1.0),), ((1, 1.0),))}
    done, n_loaded = threading.Event(), 0

    def load() -> None:
        nonlocal n_loaded
        while not done.is_set():
            running.model.adapter(str(paths[n_loaded % 2])).close()
            n_loaded += 1

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            for adapters, text in expected.items():
                assert texts(running, adapters) == text
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert n_loaded >= 2


def texts(running: Running, adapters: tuple[tuple[int, float], ...]) -> list[int]:
    running.adapter_set = adapters
    return tokens_of(running.generate(n_tokens=6))


def test_refused_sets_of_adapters_change_nothing(models: Models, paths: tuple[Path, Path]) -> None:
    loaded = native()
    ffi, lib = loaded.ffi, loaded.lib
    running, other = Running(models("llama"), adapters=configs(*paths)), Running(models("single"))
    expected = running.text(n_tokens=8)
    own = [adapter.handle for adapter in running.adapters.values()]  # type: ignore[attr-defined]
    foreign = other.model.adapter(str(paths[0])).handle
    for handles, scales, n_adapters in (
        ([own[0], own[0]], [1.0, 1.0], 2),
        ([own[0], foreign], [1.0, 1.0], 2),
        ([own[0], ffi.NULL], [1.0, 1.0], 2),
        ([own[0]], [math.nan], 1),
        ([own[0]], [math.inf], 1),
        ([own[0]], [1.0], -1),
    ):
        pointers, numbers = ffi.new("trio_adapter *[]", handles), ffi.new("float[]", scales)
        code = lib.trio_context_set_adapters(running.context.handle, pointers, numbers, n_adapters)
        assert code == lib.TRIO_E_INVALID
    lib.trio_adapter_free(ffi.NULL)
    assert running.text(n_tokens=8) == expected


@pytest.mark.parametrize("name", ["mamba", "t5", "bert"])
def test_adapters_of_other_architectures(models: Models, tmp_path: Path, name: str) -> None:
    base, n_in, n_out = {
        "mamba": ("blk.0.ssm_in.weight", 64, 256),
        "t5": ("dec.blk.0.attn_q.weight", 64, 64),
        "bert": ("blk.0.attn_q.weight", 64, 64),
    }[name]
    model = Model(ModelConfig(path=str(models(name))))
    metadata: dict[str, object] = {"general.architecture": name}
    path = write(tmp_path / "lora.gguf", pair(base, n_in=n_in, n_out=n_out), metadata)
    model.adapter(str(path)).close()
    bad = with_value(math.nan)
    path = write(tmp_path / "bad.gguf", {key.replace(Q, base): value for key, value in bad.items()}, metadata)
    with pytest.raises((LoadError, NativeError)):
        model.adapter(str(path))
