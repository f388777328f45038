"""Calls that are known to abort, hang or corrupt llama.cpp. The shim turns each into an error, and works on."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.llama.running import GREEDY, Running
from tests.llama.shim import Shim
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.errors import InvalidRequest, LoadError, NativeError
from trio_runner.llama import Context, Model
from trio_runner.llama.library import ABI, LIBRARY_DIRECTORY, last_error

Models = Callable[[str], Path]


@pytest.fixture
def shim(models: Models) -> Iterator[Shim]:
    """The shim on a context that must generate the same text before and after the test."""
    shim = Shim(Running(models("llama")))
    expected = shim.text()
    yield shim
    assert shim.text() == expected


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": [-1]},
        {"tokens": [2**30]},
        {"positions": [-1]},
        {"positions": [-(2**31)]},
        {"positions": [2**31 - 1]},
        {"positions": [768]},
        {"seqs": [-1]},
        {"seqs": [6]},
        {"outputs": [2]},
        {"outputs": [-1]},
        {"n_rows": 0},
        {"n_rows": -1},
        {"n_rows": 2**31 - 1},
        {"tokens": [5] * 65, "positions": list(range(65)), "seqs": [0] * 65, "outputs": [0] * 65},
        {"tokens": None},
        {"positions": None},
        {"seqs": None},
        {"outputs": None},
        {"tokens": [5, 5], "positions": [0, 0], "seqs": [0, 0], "outputs": [0, 1]},
        {"tokens": [5, 5], "positions": [0, 2], "seqs": [0, 0], "outputs": [0, 1]},
        {"tokens": [5, 5], "positions": [1, 0], "seqs": [0, 0], "outputs": [0, 1]},
    ],
)
def test_wrong_batches_are_refused(shim: Shim, arrays: dict[str, Any]) -> None:
    assert shim.running.context.apply(Trim(0, 0))
    shim.refused("trio_step", shim.context, shim.batch(**arrays), shim.ffi.NULL, shim.ffi.NULL)


def test_wrong_sample_requests_are_refused(shim: Shim, models: Models) -> None:
    ffi = shim.ffi
    assert shim.running.context.apply(Trim(0, 0))
    sampler = shim.running.sampler().handle
    foreign = Running(models("chain")).sampler().handle
    two = shim.batch(tokens=[5, 6], positions=[0, 1], seqs=[0, 0], outputs=[0, 1])
    for rows, samplers in (
        ([0], [sampler]),  # the row has no output
        ([2], [sampler]),
        ([-1], [sampler]),
        ([1], [ffi.NULL]),
        ([1], [foreign]),
        ([1, 1], [sampler, sampler]),
        ([1, 1, 1], [sampler] * 3),
    ):
        shim.refused("trio_step", shim.context, two, *shim.request(rows, samplers))
    request, result = shim.request([1], [sampler])
    shim.refused("trio_step", shim.context, two, request, ffi.NULL)
    vectors = shim.batch(tokens=[5, 6], positions=[0, 1], seqs=[0, 0], outputs=[0, 1], embeddings=1)
    shim.refused("trio_step", shim.context, vectors, request, result)
    top = shim.running.sampler(replace(GREEDY, logprobs=5)).handle
    shim.refused("trio_step", shim.context, two, *shim.request([1], [top]))


def test_wrong_edits_of_the_memory_are_refused(shim: Shim) -> None:
    for seq in (-1, 6, 300, 2**31 - 1, -(2**31)):
        shim.refused("trio_seq_remove", shim.context, seq, 0, -1)
        shim.refused("trio_seq_copy", shim.context, seq, 0, 0, -1)
        shim.refused("trio_seq_copy", shim.context, 0, seq, 0, -1)
        shim.refused("trio_seq_add", shim.context, seq, 0, -1, -1)
        first, last = shim.ffi.new("int32_t *"), shim.ffi.new("int32_t *")
        shim.refused("trio_seq_range", shim.context, seq, first, last)
    for start, end in ((-1, -1), (0, -2), (5, 3), (769, -1), (0, 769), (2**31 - 1, 2**31 - 1)):
        shim.refused("trio_seq_remove", shim.context, 0, start, end)
        shim.refused("trio_seq_add", shim.context, 0, start, end, 0)
    shim.refused("trio_seq_copy", shim.context, 0, 0, 0, -1)
    shim.refused("trio_seq_add", shim.context, 0, 2, -1, -3)
    shim.refused("trio_seq_add", shim.context, 0, 2, 10, 2**31 - 1)
    shim.refused("trio_seq_add", shim.context, 0, 2, 10, -(2**31))
    shim.refused("trio_seq_range", shim.context, 0, shim.ffi.NULL, shim.ffi.NULL)


@pytest.mark.parametrize("name", ["mrope", "bert"])
def test_positions_cannot_be_renumbered_without_support(models: Models, name: str) -> None:
    running = Running(models(name))
    with pytest.raises(NativeError):
        running.context.apply(Slide(0, 2, 4, -1))
    if name == "bert":
        with pytest.raises(NativeError):
            running.context.apply(Copy(0, 1, 2))
        assert running.context.apply(Trim(0, 0))
        assert running.context.length(0) == 0


def test_positions_beyond_a_table_are_refused(models: Models) -> None:
    running = Running(models("bert"), context_length=4096, batch_size=600)
    assert running.capabilities.n_ctx == 512
    assert running.step(Chunk(0, 0, 512, (5,), True), embeddings=True).outcome is DecodeOutcome.INVALID
    assert running.step(Chunk(0, 0, 0, (5,) * 513, True), embeddings=True).outcome is DecodeOutcome.INVALID
    assert running.step(Chunk(0, 0, 0, (5,) * 512, True), embeddings=True).outcome is DecodeOutcome.OK


def test_tokens_outside_the_vocabulary_are_refused(shim: Shim) -> None:
    ffi, buffer = shim.ffi, shim.ffi.new("char[]", 64)
    tokens = ffi.new("int32_t[]", 64)
    for token in (-1, 2**30, 2**31 - 1, shim.running.model.info.n_vocab):
        shim.refused("trio_token_bytes", shim.model, token, buffer, 64)
        shim.refused("trio_token_is_end", shim.model, token)
        shim.refused("trio_detokenize", shim.model, ffi.new("int32_t[]", [5, token]), 2, buffer, 64)
        with pytest.raises(InvalidRequest):
            shim.running.model.piece(token)
        with pytest.raises(InvalidRequest):
            shim.running.model.detokenize([5, token])
    shim.refused("trio_tokenize", shim.model, b"hello", -1, 1, 1, tokens, 64)
    shim.refused("trio_tokenize", shim.model, ffi.NULL, 5, 1, 1, tokens, 64)
    shim.refused("trio_tokenize", shim.model, b"hello", 5, 1, 1, ffi.NULL, 64)
    shim.refused("trio_detokenize", shim.model, tokens, -1, buffer, 64)
    beyond_unicode = b"\xf4\x90\x80\x80"
    assert shim.lib.trio_tokenize(shim.model, beyond_unicode, 4, 1, 1, tokens, 64) == shim.lib.TRIO_E_NATIVE
    assert "codepoint" in last_error()


def test_every_pointer_may_be_null(shim: Shim) -> None:
    null = shim.ffi.NULL
    for function, n_numbers in (
        ("trio_model_get_info", 0),
        ("trio_context_get_info", 0),
        ("trio_sampler_open", 0),
        ("trio_context_open", 0),
    ):
        n_pointers = 3 if function.endswith("open") else 2
        shim.refused(function, *[null] * n_pointers, *[0] * n_numbers)
    shim.refused("trio_model_open", null, null, null, null)
    shim.refused("trio_adapter_open", null, null, null)
    shim.refused("trio_context_set_adapters", null, null, null, 0)
    shim.refused("trio_context_set_adapters", shim.context, null, null, 1)
    shim.refused("trio_step", null, null, null, null)
    shim.refused("trio_step", shim.context, null, null, null)
    shim.refused("trio_embedding", null, 0, 0, null, 0)
    shim.refused("trio_embedding", shim.context, 0, 0, null, 0)
    shim.refused("trio_score", null, 0, 0, 0, null, null, null)
    shim.refused("trio_score", shim.context, 0, 0, 0, null, null, null)
    shim.refused("trio_seq_remove", null, 0, 0, 0)
    shim.refused("trio_sampler_accept_prompt", null, null, 0)
    shim.refused("trio_device_get", -1, shim.ffi.new("trio_device *"))
    shim.refused("trio_model_meta_key", shim.model, 10**6, shim.ffi.new("char[]", 8), 8)
    shim.lib.trio_abort(null, 1)
    for free in ("trio_model_free", "trio_context_free", "trio_sampler_free", "trio_adapter_free", "trio_load_free"):
        getattr(shim.lib, free)(null)


def test_missing_embeddings_are_refused(shim: Shim) -> None:
    values = shim.ffi.new("float[]", 64)
    shim.refused("trio_embedding", shim.context, 0, 0, values, 64)  # the last step generated text
    assert shim.running.context.apply(Trim(0, 0))
    step = shim.running.step(Chunk(0, 0, 0, (5, 6), True), embeddings=True)
    assert step.outcome is DecodeOutcome.OK
    for seq in (-1, 1, 7):
        shim.refused("trio_embedding", shim.context, seq, 0, values, 64)
    assert shim.lib.trio_embedding(shim.context, 0, 1, values, 64) == 64


def test_rows_without_logits_have_no_score(shim: Shim) -> None:
    logprob, tokens, logprobs = (shim.ffi.new(f"{kind}[]", 8) for kind in ("float", "int32_t", "float"))
    null = shim.ffi.NULL
    assert shim.running.context.apply(Trim(0, 0))
    samplers = {0: shim.running.sampler()}
    assert shim.running.step(Chunk(0, 0, 0, (5, 6), True), samplers=samplers).outcome is DecodeOutcome.OK
    n_vocab = shim.running.model.info.n_vocab
    for row, token, n_top in ((-1, 5, 0), (0, 5, 0), (2, 5, 0), (1, -1, 0), (1, n_vocab, 0), (1, 5, -1)):
        shim.refused("trio_score", shim.context, row, token, n_top, logprob, tokens, logprobs)
    shim.refused("trio_score", shim.context, 1, 5, 8, logprob, null, null)
    shim.refused("trio_score", shim.context, 1, 5, n_vocab + 1, logprob, tokens, logprobs)
    assert shim.lib.trio_score(shim.context, 1, 5, 8, logprob, tokens, logprobs) == 8
    assert logprob[0] <= logprobs[0]
    # A batch that was refused leaves nothing to score, and neither do embeddings.
    assert shim.running.step(Chunk(0, 0, 5, (5,), True), samplers={0: shim.running.sampler()}).outcome is (
        DecodeOutcome.INVALID
    )
    shim.refused("trio_score", shim.context, 1, 5, 0, logprob, null, null)
    assert shim.running.step(Chunk(0, 0, 2, (5,), True), embeddings=True).outcome is DecodeOutcome.OK
    shim.refused("trio_score", shim.context, 0, 5, 0, logprob, null, null)


@pytest.mark.parametrize(
    "change",
    [
        {"n_ctx": 0},
        {"n_ctx": 2**32 - 1},
        {"n_batch": 0},
        {"n_batch": 2**32 - 1},
        {"n_ubatch": 0},
        {"n_ubatch": 128},
        {"n_seq_max": 0},
        {"n_seq_max": 257},
        {"n_threads": 0},
        {"n_threads": -1},
        {"n_threads": 10000},
        {"n_threads_batch": 10000},
        {"flash_attention": 7},
        {"type_k": 16},
        {"type_v": 99},
        {"type_k": -1},
        {"pooling_type": 99},
        {"pooling_type": 4},
        {"pooling_type": -2},
        {"rope_freq_base": math.nan},
        {"rope_freq_scale": -1.0},
        {"rope_freq_base": math.inf},
    ],
)
def test_wrong_context_parameters_are_refused(shim: Shim, change: dict[str, Any]) -> None:
    params = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 1, "n_threads": 1, "n_threads_batch": 1}
    params |= {"flash_attention": -1, "type_k": 1, "type_v": 1, "pooling_type": -1, "offload_kqv": 1, "swa_full": 1}
    out = shim.ffi.new("trio_context **")
    shim.refused("trio_context_open", shim.model, shim.ffi.new("trio_context_params *", params | change), out)
    assert out[0] == shim.ffi.NULL


@pytest.mark.parametrize("change", [{"swa_full": 0}, {"n_seq_max": 129, "n_batch": 129, "n_ubatch": 129}])
def test_a_slot_whose_window_forgets_is_not_trimmed(models: Models, change: dict[str, int]) -> None:
    shim = Shim(Running(models("swa")))
    ffi, lib = shim.ffi, shim.lib
    params = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 2, "n_threads": 1, "n_threads_batch": 1}
    params |= {"flash_attention": -1, "type_k": 1, "type_v": 1, "pooling_type": -1, "swa_full": 1} | change
    out = ffi.new("trio_context **")
    assert lib.trio_context_open(shim.model, ffi.new("trio_context_params *", params), out) == 0
    context = ffi.gc(out[0], lib.trio_context_free)
    batch = shim.batch(tokens=[5, 6, 7], positions=[0, 1, 2], seqs=[0, 0, 0], outputs=[0, 0, 0])
    assert lib.trio_step(context, batch, ffi.NULL, ffi.NULL) == 0
    assert lib.trio_seq_remove(context, 0, 1, -1) == 0
    shim.refused("trio_seq_copy", context, 0, 1, 0, 2)
    assert lib.trio_seq_copy(context, 0, 1, 0, 3) == 0
    assert lib.trio_seq_remove(context, 0, 3, -1) == 1
    assert lib.trio_seq_remove(context, 0, 0, -1) == 1
    first, last = ffi.new("int32_t *"), ffi.new("int32_t *")
    for seq, expected in ((0, (-1, -1)), (1, (0, 2))):
        assert lib.trio_seq_range(context, seq, first, last) == 0
        assert (first[0], last[0]) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": math.nan},
        {"top_p": math.inf},
        {"min_p": -0.1},
        {"typical_p": math.nan},
        {"tfs_z": math.nan},
        {"xtc_probability": 2.0},
        {"repeat_last_n": -2},
        {"repeat_penalty": 0.0},
        {"frequency_penalty": math.nan},
        {"dry_base": math.nan},
        {"dry_penalty_last_n": -5},
        {"mirostat": 3},
        {"mirostat_tau": math.nan},
        {"n_bias": 1},
        {"n_bias": -1},
        {"n_dry_breakers": 1},
        {"n_top": 10**6},
        {"n_top": -2},
    ],
)
def test_wrong_sampler_parameters_are_refused(shim: Shim, change: dict[str, Any]) -> None:
    params = {"temperature": 1.0, "repeat_penalty": 1.0, "dry_base": 1.75, "n_top": -1}
    out = shim.ffi.new("trio_sampler **")
    shim.refused("trio_sampler_open", shim.model, shim.ffi.new("trio_sampler_params *", params | change), out)


def test_huge_penalty_windows_cost_nothing(shim: Shim) -> None:
    params = {"temperature": 0.0, "repeat_penalty": 1.5, "repeat_last_n": 2**31 - 1, "n_top": -1}
    params |= {"dry_multiplier": 1.0, "dry_base": 1.75, "dry_penalty_last_n": 2**31 - 1, "dry_allowed_length": 2}
    out = shim.ffi.new("trio_sampler **")
    assert shim.lib.trio_sampler_open(shim.model, shim.ffi.new("trio_sampler_params *", params), out) == 0
    shim.lib.trio_sampler_free(out[0])


def test_asserts_of_llama_cpp_are_errors(shim: Shim, models: Models, tmp_path: Path) -> None:
    """The header check would refuse these files. Without it they run into asserts of llama.cpp and ggml."""
    data = models("llama").read_bytes()
    epsilon = b"llama.attention.layer_norm_rms_epsilon" + struct.pack("<I", 6)
    token_a, token_b = struct.pack("<Q", 1) + b"A", struct.pack("<Q", 1) + b"B"
    path = tmp_path / "bad.gguf"

    path.write_bytes(data.replace(token_b, token_a, 1))
    with pytest.raises(LoadError, match="GGML_ASSERT"):
        Model(ModelConfig(path=str(path)))

    path.write_bytes(data.replace(epsilon + struct.pack("<f", 1e-5), epsilon + struct.pack("<f", -1.0)))
    model = Model(ModelConfig(path=str(path)))
    with pytest.raises(LoadError, match="GGML_ASSERT") as error:
        Context(model, EngineConfig(slots=1, context_length=64, batch_size=16, threads=1))
    assert error.value.path == str(path)
    assert isinstance(error.value.__cause__, NativeError)
    assert error.value.__cause__.code == shim.lib.TRIO_E_ASSERT


def test_the_library_can_be_used_without_this_package(models: Models) -> None:
    """A process of its own uses ctypes and the declarations of the header, and nothing of this package."""
    program = f"""
import ctypes
lib = ctypes.CDLL({str(LIBRARY_DIRECTORY / "libtrio_llama.so")!r})
assert lib.trio_abi_version() == {ABI}
assert lib.trio_init({str(LIBRARY_DIRECTORY).encode()!r}, 4) == 0
class Params(ctypes.Structure):
    _fields_ = [("n_gpu_layers", ctypes.c_int32), ("devices", ctypes.POINTER(ctypes.c_int32))]
    _fields_ += [(name, ctypes.c_int32) for name in
                 ("n_devices", "split_mode", "main_gpu", "use_mmap", "use_mlock", "check_tensors", "vocab_only")]
    _fields_ += [("tensor_split", ctypes.POINTER(ctypes.c_float)), ("n_tensor_split", ctypes.c_int32),
                 ("no_alloc", ctypes.c_int32)]
model = ctypes.c_void_p()
params = Params(use_mmap=1)
assert lib.trio_model_open({str(models("chain")).encode()!r}, ctypes.byref(params), None, ctypes.byref(model)) == 0
tokens = (ctypes.c_int32 * 16)()
text = b" one two"
assert lib.trio_tokenize(model, text, len(text), 1, 1, tokens, 16) == 2
print(list(tokens[:2]))
assert lib.trio_tokenize(model, text, -1, 1, 1, tokens, 16) == -1
message = ctypes.create_string_buffer(256)
assert lib.trio_last_error(message, 256) > 0
print(message.value.decode())
lib.trio_model_free(model)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    tokens, message = done.stdout.splitlines()
    assert tokens == str(Running(models("chain")).tokens(" one two"))
    assert message == "length is negative"
