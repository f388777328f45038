"""Wrong arguments and damaged files of projectors and images: the shim refuses each, and works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.llama.pictures import Models, open_pair, picture
from tests.llama.running import Running
from tests.llama.shim import Shim
from trio_runner.config import ModelConfig
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Trim
from trio_runner.errors import LoadError
from trio_runner.llama import Model, Projector
from trio_runner.llama.library import last_error


@pytest.mark.parametrize(
    ("n_bytes", "width", "height"),
    [
        (0, 0, 0),
        (0, 1, 0),
        (3, 1, 2),
        (4, 1, 1),
        (-3, 1, -1),
        (3, -1, -1),
        (3 * 16385, 16385, 1),
        (3 * 16385, 1, 16385),
        (3 * 2**31, 2**31 - 1, 2**31 - 1),
        (2**63 - 1, 1, 1),
        (-(2**63), -(2**31), -(2**31)),
    ],
)
def test_impossible_sizes_of_images_are_refused(models: Models, n_bytes: int, width: int, height: int) -> None:
    shim = Shim(open_pair(models, "llama"))
    data = shim.ffi.new("uint8_t[]", 16)
    out = shim.ffi.new("trio_media **")
    shim.refused("trio_media_open", shim.running.projector.handle, data, n_bytes, width, height, out)
    assert out[0] == shim.ffi.NULL


def test_every_pointer_may_be_null(models: Models) -> None:
    shim = Shim(open_pair(models, "llama"))
    null, ffi = shim.ffi.NULL, shim.ffi
    out = ffi.new("trio_projector **")
    params = ffi.new("trio_projector_params *", {"n_threads": 1})
    model, path = shim.running.model.handle, str(models("mmproj")).encode()
    shim.refused("trio_projector_open", null, path, params, null, out)
    shim.refused("trio_projector_open", model, null, params, null, out)
    shim.refused("trio_projector_open", model, path, null, null, out)
    shim.refused("trio_projector_open", model, path, params, null, null)
    shim.refused("trio_projector_open", model, b"", params, null, out)
    shim.refused("trio_projector_get_info", null, ffi.new("trio_projector_info *"))
    shim.refused("trio_projector_get_info", shim.running.projector.handle, null)
    data = ffi.new("uint8_t[]", 3)
    shim.refused("trio_media_open", null, data, 3, 1, 1, ffi.new("trio_media **"))
    shim.refused("trio_media_open", shim.running.projector.handle, null, 3, 1, 1, ffi.new("trio_media **"))
    shim.refused("trio_media_open", shim.running.projector.handle, data, 3, 1, 1, null)
    media = shim.media()
    shim.refused("trio_media_count", null)
    shim.refused("trio_media_get_chunk", null, 0, ffi.new("trio_chunk_info *"))
    shim.refused("trio_media_get_chunk", media, 0, null)
    shim.refused("trio_media_tokens", null, 0, null, 0)
    shim.refused("trio_media_positions", null, 0, null, 0)
    shim.refused("trio_media_positions", media, 0, null, 16)
    shim.refused("trio_media_encode", null, 0, ffi.new("float[]", 1024), 1024)
    shim.refused("trio_media_encode", media, 0, null, 1024)
    shim.lib.trio_media_cancel(null)
    shim.lib.trio_media_free(null)
    shim.lib.trio_projector_free(null)


@pytest.mark.parametrize(
    "change",
    [
        {"n_threads": 0},
        {"n_threads": 513},
        {"n_threads": -1},
        {"flash_attention": 2},
        {"flash_attention": -2},
        {"max_rows": -1},
        {"max_rows": 2**31 - 1},
    ],
)
def test_wrong_parameters_are_refused(models: Models, change: dict[str, int]) -> None:
    shim = Shim(open_pair(models, "llama"))
    params = shim.ffi.new("trio_projector_params *", {"n_threads": 1, "flash_attention": -1} | change)
    out = shim.ffi.new("trio_projector **")
    path = str(models("mmproj")).encode()
    shim.refused("trio_projector_open", shim.running.model.handle, path, params, shim.ffi.NULL, out)
    assert out[0] == shim.ffi.NULL


def test_wrong_chunks_are_refused(models: Models) -> None:
    shim = Shim(open_pair(models, "swa"))
    media, info = shim.media(), shim.ffi.new("trio_chunk_info *")
    numbers, rows = shim.ffi.new("int32_t[]", 64), shim.ffi.new("float[]", 1024)
    assert shim.lib.trio_media_count(media) == 3
    for index in (-1, 3, 2**31 - 1, -(2**31)):
        shim.refused("trio_media_get_chunk", media, index, info)
        shim.refused("trio_media_tokens", media, index, numbers, 64)
        shim.refused("trio_media_positions", media, index, numbers, 64)
        shim.refused("trio_media_encode", media, index, rows, 1024)
    shim.refused("trio_media_encode", media, 0, rows, 1024)  # a text
    shim.refused("trio_media_positions", media, 0, numbers, 64)
    shim.refused("trio_media_tokens", media, 1, numbers, 64)
    for size in (0, -1, 1023, -(2**63)):
        shim.refused("trio_media_encode", media, 1, rows, size)
    assert shim.lib.trio_media_tokens(media, 0, shim.ffi.NULL, 0) > 0
    assert shim.lib.trio_media_tokens(media, 0, numbers, -5) > 0
    assert shim.lib.trio_media_encode(media, 1, rows, 1024) == 0


def test_a_cancelled_image_is_never_encoded(models: Models) -> None:
    shim = Shim(open_pair(models, "llama"))
    media, rows = shim.media(), shim.ffi.new("float[]", 1024)
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == 0
    shim.lib.trio_media_cancel(media)
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == shim.lib.TRIO_E_CANCELLED
    assert shim.lib.trio_media_encode(shim.media(), 0, rows, 1024) == 0


def test_handles_may_be_freed_in_any_order(models: Models) -> None:
    shim = Shim(open_pair(models, "llama"))
    media, rows = shim.media(), shim.ffi.new("float[]", 1024)
    shim.running.context.close()
    shim.running.projector.close()
    shim.running.model.close()
    del shim.model, shim.context  # the last references to their handles
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"positions": np.array([0, 0], np.int32)}),
        ("llama", {"positions": np.array([0, 2], np.int32)}),
        ("llama", {"positions": np.array([1, 0], np.int32)}),
        ("llama", {"positions": np.array([-1, 0], np.int32)}),
        ("llama", {"positions": np.array([2**31 - 1, 0], np.int32)}),
        ("llama", {"inputs": np.full((2, 64), np.nan, np.float32)}),
        ("llama", {"inputs": np.full((2, 64), np.inf, np.float32)}),
        ("llama", {"tokens": np.zeros(2, np.int32)}),
        ("llama", {"seqs": np.array([0, 99], np.int32)}),
        ("llama", {"outputs": np.array([0, 2], np.int8)}),
        ("mrope", {"positions": np.array([1, 0, 0, 0, 0, 0, 0, 0], np.int32)}),
        ("mrope", {"positions": np.array([0, 0, 0, -1, 0, 0, 0, 0], np.int32)}),
        ("mrope", {"positions": np.array([0, 0, 0, 0, 0, 2**31 - 1, 0, 0], np.int32)}),
        ("mrope", {"positions": np.array([0, 0, 0, 0, 0, 0, 0, 100_000], np.int32)}),
    ],
)
def test_wrong_batches_of_rows_are_refused(models: Models, name: str, changes: dict[str, NDArray[Any] | int]) -> None:
    shim = Shim(open_pair(models, name))
    context = shim.running.context
    assert context.apply(Trim(0, 0))
    batch = shim.image_batch(**changes)
    shim.refused("trio_step", context.handle, batch, shim.ffi.NULL, shim.ffi.NULL)
    assert context.length(0) == 0
    batch = shim.image_batch()
    assert shim.lib.trio_step(context.handle, batch, shim.ffi.NULL, shim.ffi.NULL) == 0


def test_non_causal_rows_must_fit_into_a_micro_batch(models: Models) -> None:
    shim = Shim(open_pair(models, "llama"))
    model = shim.running.model.handle
    params = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 16, "n_seq_max": 1, "n_threads": 1, "n_threads_batch": 1}
    params |= {"flash_attention": -1, "type_k": 1, "type_v": 1, "pooling_type": 0}
    out = shim.ffi.new("trio_context **")
    assert shim.lib.trio_context_open(model, shim.ffi.new("trio_context_params *", params), out) == 0
    context = shim.ffi.gc(out[0], shim.lib.trio_context_free)
    batch = shim.image_batch(17, non_causal=1)
    shim.refused("trio_step", context, batch, shim.ffi.NULL, shim.ffi.NULL)
    batch = shim.image_batch(17)
    assert shim.lib.trio_step(context, batch, shim.ffi.NULL, shim.ffi.NULL) == 0
    batch = shim.image_batch(16, positions=np.arange(17, 33, dtype=np.int32), non_causal=1)
    assert shim.lib.trio_step(context, batch, shim.ffi.NULL, shim.ffi.NULL) == 0


def test_positions_of_rows_must_follow_the_sequence(models: Models) -> None:
    shim = Shim(open_pair(models, "mrope"))
    running, context = shim.running, shim.running.context

    def step(positions: list[int]) -> int:
        n_rows = len(positions) // 4
        batch = shim.image_batch(n_rows, positions=np.array(positions, np.int32))
        return int(shim.lib.trio_step(context.handle, batch, shim.ffi.NULL, shim.ffi.NULL))

    assert context.apply(Trim(0, 0))
    running.prefill([5, 6, 7])
    assert step([1, 1, 1, 1, 1, 2, 0, 0]) == shim.lib.TRIO_E_INVALID  # backwards
    assert step([3, 3, 3, 3, 3, 4, 0, 0]) == 0
    assert context.length(0) == 4
    assert step([3, 3, 4, 4, 3, 4, 0, 0]) == 0  # further rows at the same position, as upstream allows
    assert running.step(Chunk(0, 0, 3, (5,), output=False)).outcome is DecodeOutcome.INVALID
    assert running.step(Chunk(0, 0, 5, (5,), output=False)).outcome is DecodeOutcome.OK
    assert context.length(0) == 6


def test_an_encoder_refuses_rows(models: Models) -> None:
    shim = Shim(open_pair(models, "llama"))
    bert = Running(models("bert"))
    batch = shim.image_batch(embeddings=1, outputs=np.ones(2, np.int8))
    shim.refused("trio_step", bert.context.handle, batch, shim.ffi.NULL, shim.ffi.NULL)
    assert "tokens only" in last_error()


@pytest.mark.parametrize(
    "change",
    [
        (b"clip.projector_type", b"clip.projector_tipe"),
        (b"clip.vision.image_size", b"clip.vision.image_sise"),
        (b"v.blk.1.ffn_down.weight", b"v.blk.1.ffn_down.weigth"),
        (b"clip.has_vision_encoder", b"clip.has_wision_encoder"),
        (b"clip.vision.image_mean", b"clip.vision.image_maen"),
    ],
)
def test_incomplete_files_are_refused(models: Models, tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    data = models("mmproj").read_bytes()
    assert change[0] in data
    path = tmp_path / "bad.gguf"
    path.write_bytes(data.replace(*change))
    model = Model(ModelConfig(path=str(models("llama"))))
    with pytest.raises(LoadError) as error:
        Projector(model, str(path), max_rows=64)
    assert error.value.path == str(path)
    assert Projector(model, str(models("mmproj")), max_rows=64).encoding(picture()).run().media


@pytest.mark.parametrize("n_bytes", [0, 3, 100, 5000, -1])
def test_files_cut_short_are_refused(models: Models, tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(models("mmproj").read_bytes()[:n_bytes])
    with pytest.raises(LoadError):
        Projector(Model(ModelConfig(path=str(models("llama")))), str(path), max_rows=64)


def test_a_vocabulary_without_the_image_tokens_is_refused(models: Models) -> None:
    with pytest.raises(LoadError, match="vocabulary lacks"):
        Projector(Model(ModelConfig(path=str(models("chain")))), str(models("mmproj-tiles")), max_rows=64)
