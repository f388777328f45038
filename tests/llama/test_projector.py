"""Images: what a projector makes of them, and what a context makes of that."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.running import Running, tokens_of
from tests.placing import device_number
from trio_runner.config import ModelConfig
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Copy, Trim
from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.engine.runtime import EncodedImage, EncodedMedia
from trio_runner.errors import EngineClosed, InvalidImage, LoadError
from trio_runner.images import Pixels
from trio_runner.llama import Model, Projector
from trio_runner.llama.library import drain_log, last_error, native
from trio_runner.request import SamplingParams

Models = Callable[[str], Path]

PAIRS = {"llama": "mmproj", "swa": "mmproj-gemma", "mrope": "mmproj-qwen", "tiles": "mmproj-tiles"}
"""Each model with its projector."""
ALL = tuple(PAIRS)


def picture(width: int = 56, height: int = 56, seed: int = 0) -> Pixels:
    return Pixels(width, height, np.random.default_rng(seed).integers(0, 256, 3 * width * height, np.uint8).tobytes())


def open_pair(models: Models, name: str, **config: object) -> Running:
    return Running(models(name), projector=models(PAIRS[name]), adapters=(), **config)


def open_projector(models: Models, name: str, *, max_rows: int = 64) -> Projector:
    model = Model(ModelConfig(path=str(models(name))))
    return Projector(model, str(models(PAIRS[name])), max_rows=max_rows, device=device_number())


def media_of(image: EncodedImage) -> list[Media]:
    return list(dict.fromkeys(item.media for item in image.items if isinstance(item, MediaRow)))


# ---- what a projector makes of an image -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("llama", (56, 56), [(16, 16, True)]),
        ("llama", (300, 20), [(16, 16, True)]),
        ("swa", (56, 56), [(16, 16, False)]),
        ("mrope", (56, 56), [(9, 3, True)]),
        ("mrope", (140, 84), [(15, 5, True)]),
        ("tiles", (56, 56), [(4, 4, True)] * 5),
        ("tiles", (120, 60), [(4, 4, True)] * 3),
    ],
)
def test_image_is_rows_between_texts(
    models: Models, name: str, size: tuple[int, int], shapes: list[tuple[int, int, bool]]
) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture(*size)).run()
    media = media_of(image)
    assert [(part.n_rows, part.n_positions, part.causal) for part in media] == shapes
    assert list(image.media) == media
    for part, encoded in image.media.items():
        assert encoded.rows.shape == (part.n_rows, 64)
        assert encoded.rows.dtype == np.float32
        assert encoded.rows.flags.c_contiguous
        assert np.isfinite(encoded.rows).all()
        assert [item for item in image.items if isinstance(item, MediaRow) and item.media == part] == [
            MediaRow(part, row) for row in range(part.n_rows)
        ]
    tokens = [item for item in image.items if isinstance(item, int)]
    assert bool(tokens) == (name != "llama")
    assert all(0 <= token < running.model.info.n_vocab for token in tokens)


def test_positions_are_those_of_a_grid(models: Models) -> None:
    (encoded,) = open_projector(models, "mrope").encoding(picture(140, 84)).run().media.values()
    assert encoded.positions is not None
    time, down, across, unused = encoded.positions.tolist()
    assert encoded.positions.shape == (4, 15)
    assert encoded.positions.dtype == np.int32
    assert time == unused == [0] * 15
    assert down == [row for row in range(3) for _ in range(5)]
    assert across == list(range(5)) * 3
    for name in ("llama", "swa", "tiles"):
        image = open_projector(models, name).encoding(picture()).run()
        assert all(encoded.positions is None for encoded in image.media.values())


def test_rows_in_a_single_line_share_their_position_too(models: Models) -> None:
    (media,) = open_projector(models, "mrope").encoding(picture(560, 28)).run().media
    assert media.n_rows == 20
    assert media.folded
    assert media.n_positions == media.n_rows


def test_rows_depend_on_the_image_and_on_nothing_else(models: Models) -> None:
    projector = open_projector(models, "llama")

    def encode(pixels: Pixels) -> tuple[Media, EncodedMedia]:
        ((media, encoded),) = projector.encoding(pixels).run().media.items()
        return media, encoded

    (one, rows), (other, other_rows), (again, same_rows) = (encode(picture(seed=seed)) for seed in (1, 2, 1))
    assert one == again
    assert one != other
    np.testing.assert_array_equal(rows.rows, same_rows.rows)
    assert not np.allclose(rows.rows, other_rows.rows, atol=0.01)


def test_keys_tell_projectors_apart(models: Models, tmp_path: Path) -> None:
    model = Model(ModelConfig(path=str(models("llama"))))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(models("mmproj").read_bytes().replace(b"tiny-mmproj", b"tinymmproj-"))
    paths = (str(models("mmproj")), str(changed))
    digests = {Projector(model, path, max_rows=n_rows).digest for path in paths for n_rows in (16, 64)}
    assert len(digests) == 4
    keys = {next(iter(Projector(model, path, max_rows=64).encoding(picture()).run().media)).key for path in paths}
    assert len(keys) == 2
    tiles = media_of(open_projector(models, "tiles").encoding(picture()).run())
    assert len({part.key for part in tiles}) == len(tiles)


def test_images_are_scaled_down_to_what_fits_into_a_batch(models: Models) -> None:
    def n_rows(max_rows: int, size: tuple[int, int] = (640, 480)) -> int:
        projector = open_projector(models, "mrope", max_rows=max_rows)
        (media,) = projector.encoding(picture(*size)).run().media
        return media.n_rows

    assert n_rows(4096) == 23 * 17
    assert 200 < n_rows(256) <= 256
    assert n_rows(4) <= 4  # fewer than the file has for the smallest image
    with pytest.raises(InvalidImage, match=r"17 rows.* --batch-size is 8"):
        n_rows(8, (4000, 100))


def test_images_that_never_fit_are_refused_at_once(models: Models) -> None:
    with pytest.raises(LoadError, match=r"16 rows.* --batch-size is 15") as error:
        open_projector(models, "swa", max_rows=15)
    assert error.value.path == str(models("mmproj-gemma"))
    assert open_projector(models, "swa", max_rows=16).encoding(picture()).run().media
    assert open_projector(models, "llama", max_rows=1).encoding(picture()).run().media  # may be divided


def test_image_that_mtmd_cannot_take(models: Models) -> None:
    projector = open_projector(models, "tiles")
    with pytest.raises(InvalidImage, match="out of range"):
        projector.encoding(picture(1, 500)).run()
    assert projector.encoding(picture()).run().media


# ---- cancelling -----------------------------------------------------------------------------------------------------


def test_cancelled_before_it_begins(models: Models) -> None:
    projector = open_projector(models, "llama")
    encoding = projector.encoding(picture())
    encoding.cancel()
    encoding.cancel()
    with pytest.raises(EngineClosed):
        encoding.run()
    assert projector.encoding(picture()).run().media


def test_cancelled_at_any_time_or_done(models: Models) -> None:
    projector = open_projector(models, "mrope", max_rows=512)
    expected = projector.encoding(picture(640, 480)).run()
    n_cancelled = 0
    for delay in (0.0, 0.001, 0.005, 0.02, 0.1):
        encoding = projector.encoding(picture(640, 480))
        timer = threading.Timer(delay, encoding.cancel)
        timer.start()
        try:
            image = encoding.run()
        except EngineClosed:
            n_cancelled += 1
        else:
            np.testing.assert_array_equal(rows_of(image), rows_of(expected))
        timer.join()
        again = projector.encoding(picture(640, 480)).run()
        np.testing.assert_array_equal(rows_of(again), rows_of(expected))
    assert n_cancelled >= 1


def test_cancelled_in_the_middle_is_no_error_in_the_log(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever empties the log first, be it the thread that decodes."""
    projector = open_projector(models, "mrope", max_rows=4096)
    projector.encoding(picture()).run()
    monkeypatch.setattr("trio_runner.llama.projector.drain_log", lambda **_: None)
    encoding = projector.encoding(picture(2000, 1500))
    timer = threading.Timer(0.2, encoding.cancel)
    timer.start()
    caplog.clear()
    with pytest.raises(EngineClosed):
        encoding.run()
    timer.join()
    drain_log()
    assert not caplog.records


def rows_of(image: EncodedImage) -> Any:
    (encoded,) = image.media.values()
    return encoded.rows


def test_one_at_a_time_whoever_asks(models: Models) -> None:
    """All of them at once, on threads of their own; some leave."""
    projector = open_projector(models, "mrope", max_rows=128)
    pictures = [picture(200, 150, seed) for seed in range(8)]
    expected = [rows_of(projector.encoding(pixels).run()) for pixels in pictures]
    encodings = [projector.encoding(pixels) for pixels in pictures]
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = rows_of(encodings[index].run())
        except EngineClosed as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(pictures))]
    for thread in threads:
        thread.start()
    for encoding in encodings[1::3]:
        encoding.cancel()
    for thread in threads:
        thread.join(60)
    for index, rows in enumerate(expected):
        if index % 3 != 1 or not isinstance(results[index], EngineClosed):
            np.testing.assert_array_equal(results[index], rows)


def test_closing_is_idempotent_and_waits_for_nobody(models: Models) -> None:
    running = open_pair(models, "llama")
    encoding = running.projector.encoding(picture())
    running.projector.close()
    running.projector.close()
    running.model.close()
    running.context.close()
    assert encoding.run().media  # keeps the projector, and that the model
    with pytest.raises(EngineClosed):
        running.projector.encoding(picture())


# ---- what a context makes of rows -----------------------------------------------------------------------------------


def say(
    running: Running, items: tuple[Item, ...], image: EncodedImage, *, slot: int = 0, n_tokens: int = 12
) -> list[int]:
    """Place `items`, a question behind them, and generate."""
    assert running.context.apply(Trim(slot, 0))
    question = running.tokens(" and the answer")
    position = running.place((*items, *question[:-1]), image.media, slot=slot)
    return tokens_of(running.go_on(question[-1], position, n_tokens, slot=slot))


@pytest.mark.parametrize("name", ALL)
def test_text_depends_on_the_image(models: Models, name: str) -> None:
    running = open_pair(models, name)
    before = tuple(running.tokens("the story of"))
    texts = []
    for seed in (1, 2, 1):
        image = running.projector.encoding(picture(seed=seed)).run()
        texts.append(say(running, (*before, *image.items), image))
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    image = running.projector.encoding(picture(seed=1)).run()
    assert say(running, (*before, *image.items), image, slot=1) == texts[0]
    assert say(running, image.items, image) != texts[0]


@pytest.mark.parametrize("name", ALL)
def test_image_alone_and_beside_another(models: Models, name: str) -> None:
    """Two images in one batch, of two sequences; each says what it would have said alone."""
    running = open_pair(models, name)
    images = [running.projector.encoding(picture(seed=seed)).run() for seed in (1, 2)]
    parts = [media_of(image)[0] for image in images]
    media = {**images[0].media, **images[1].media}
    question = running.tokens(" and the answer")

    def sample(slots: list[int]) -> dict[int, list[int]]:
        for slot in (0, 1):
            assert running.context.apply(Trim(slot, 0))
        rows = [tuple(MediaRow(part, row) for row in range(part.n_rows)) for part in parts]
        result = running.step(*(Chunk(slot, slot, 0, rows[slot], output=False) for slot in slots), media=media)
        assert result.outcome is DecodeOutcome.OK, result.message
        texts = {}
        for slot in slots:
            position = parts[slot].n_positions
            for token in question[:-1]:
                position = running.prefill([token], slot=slot, start=position)
            texts[slot] = tokens_of(running.go_on(question[-1], position, 8, slot=slot))
        return texts

    assert sample([0, 1]) == {**sample([0]), **sample([1])}


@pytest.mark.parametrize("name", ["llama", "tiles"])
def test_rows_that_look_back_only_may_come_in_any_portions(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    media = media_of(image)[0]
    rows = tuple(MediaRow(media, row) for row in range(media.n_rows))

    def sampled(n_rows: int) -> Sampled:
        assert running.context.apply(Trim(0, 0))
        for begin in range(0, len(rows), n_rows):
            part = rows[begin : begin + n_rows]
            ends = begin + len(part) == len(rows)
            samplers = {0: running.sampler(SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=5))}
            result = running.step(Chunk(0, 0, begin, part, output=ends), samplers=samplers, media=image.media)
            assert result.outcome is DecodeOutcome.OK, result.message
        return result.sampled[0]

    whole = sampled(len(rows))
    for n_rows in (1, 3):
        portions = sampled(n_rows)
        assert portions.token == whole.token
        assert portions.logprob == pytest.approx(whole.logprob, abs=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_fork_and_trim_know_where_an_image_ends(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    question, other = running.tokens(" and the answer"), running.tokens(" or a story")
    assert running.context.apply(Trim(0, 0))
    end = running.place(image.items, image.media)
    for text in (question, other, question):
        assert running.context.apply(Trim(0, end))
        assert running.context.apply(Trim(1, 0))
        assert running.context.apply(Copy(0, 1, end))
        position = running.prefill(text[:-1], slot=1, start=end)
        forked = tokens_of(running.go_on(text[-1], position, 8, slot=1))
        position = running.prefill(text[:-1], start=end)
        assert tokens_of(running.go_on(text[-1], position, 8)) == forked


@pytest.mark.parametrize("name", ALL)
def test_aborted_image_leaves_nothing(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    expected = say(running, image.items, image)
    media = media_of(image)[0]
    assert running.context.apply(Trim(0, 0))
    running.context.abort(3)
    rows = tuple(MediaRow(media, row) for row in range(media.n_rows))
    result = running.step(Chunk(0, 0, 0, rows, output=False), media=image.media, number=3)
    assert (result.outcome, result.kept) == (DecodeOutcome.ABORTED, {0: 0})
    assert say(running, image.items, image) == expected


def test_rows_with_non_causal_attention_do(models: Models) -> None:
    """With the same rows, attention that only looks back gives another text; and text is as it was before."""
    running = open_pair(models, "swa")
    text = tokens_of(running.generate("the model"))
    image = running.projector.encoding(picture()).run()
    (media,) = image.media
    back = Media(media.key, media.n_rows, media.n_positions, causal=True)
    items = tuple(MediaRow(back, item.row) if isinstance(item, MediaRow) else item for item in image.items)
    both = say(running, image.items, image)
    assert say(running, items, EncodedImage(items, {back: image.media[media]})) != both
    assert say(running, image.items, image) == both
    assert tokens_of(running.generate("the model")) == text


def logprobs(running: Running, image: EncodedImage) -> list[float]:
    running.context.apply(Trim(0, 0))
    position = running.place(image.items, image.media)
    params = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=0)
    return [sampled.logprob for sampled in running.go_on(5, position, 8, params=params)]


@pytest.mark.parametrize("name", ["swa", "mrope", "tiles"])
def test_our_attention_computes_what_upstreams_does(models: Models, name: str) -> None:
    """In a process of its own, as the environment is read once."""
    paths = [str(models(name)), str(models(PAIRS[name]))]
    program = (
        "import sys; from pathlib import Path; from tests.llama.test_projector import *;"
        "running = Running(Path(sys.argv[1]), projector=Path(sys.argv[2]), kv_type='f16');"
        "print(logprobs(running, running.projector.encoding(picture()).run()))"
    )
    environment = {**os.environ, "TRIO_RUNNER_ATTENTION": "ggml", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    theirs = [float(number) for number in done.stdout.strip("[]\n").split(",")]
    running = open_pair(models, name, kv_type="f16")
    assert logprobs(running, running.projector.encoding(picture()).run()) == pytest.approx(theirs, abs=0.1)


def test_rows_go_with_threads_of_prefill_and_kv_caches_of_all_kinds(models: Models) -> None:
    for config in ({"threads": 2}, {"flash_attention": "off"}, {"flash_attention": "on", "kv_type": "f16"}):
        running = open_pair(models, "swa", **config)
        image = running.projector.encoding(picture()).run()
        assert len(say(running, image.items, image, n_tokens=4)) == 4


# ---- hostile --------------------------------------------------------------------------------------------------------


class Shim:
    """A projector without anything in between."""

    def __init__(self, models: Models, name: str = "llama") -> None:
        loaded = native()
        self.ffi, self.lib = loaded.ffi, loaded.lib
        self.running = open_pair(models, name)
        self.projector = self.running.projector.handle

    def refused(self, function: str, *arguments: object) -> None:
        assert getattr(self.lib, function)(*arguments) == self.lib.TRIO_E_INVALID, function
        assert last_error()

    def media(self, width: int = 56, height: int = 56) -> Any:
        pixels = picture(width, height)
        out = self.ffi.new("trio_media **")
        data = self.ffi.from_buffer("uint8_t[]", pixels.data)
        assert self.lib.trio_media_open(self.projector, data, len(pixels.data), width, height, out) == 0
        return self.ffi.gc(out[0], self.lib.trio_media_free)


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
def test_sizes_of_images(models: Models, n_bytes: int, width: int, height: int) -> None:
    shim = Shim(models)
    data = shim.ffi.new("uint8_t[]", 16)
    out = shim.ffi.new("trio_media **")
    shim.refused("trio_media_open", shim.projector, data, n_bytes, width, height, out)
    assert out[0] == shim.ffi.NULL


def test_every_pointer_may_be_null(models: Models) -> None:
    shim = Shim(models)
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
    shim.refused("trio_projector_get_info", shim.projector, null)
    data = ffi.new("uint8_t[]", 3)
    shim.refused("trio_media_open", null, data, 3, 1, 1, ffi.new("trio_media **"))
    shim.refused("trio_media_open", shim.projector, null, 3, 1, 1, ffi.new("trio_media **"))
    shim.refused("trio_media_open", shim.projector, data, 3, 1, 1, null)
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
def test_parameters(models: Models, change: dict[str, int]) -> None:
    shim = Shim(models)
    params = shim.ffi.new("trio_projector_params *", {"n_threads": 1, "flash_attention": -1} | change)
    out = shim.ffi.new("trio_projector **")
    path = str(models("mmproj")).encode()
    shim.refused("trio_projector_open", shim.running.model.handle, path, params, shim.ffi.NULL, out)
    assert out[0] == shim.ffi.NULL


def test_chunks(models: Models) -> None:
    shim = Shim(models, "swa")
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


def test_cancelled_media_is_never_encoded(models: Models) -> None:
    shim = Shim(models)
    media, rows = shim.media(), shim.ffi.new("float[]", 1024)
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == 0
    shim.lib.trio_media_cancel(media)
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == shim.lib.TRIO_E_CANCELLED
    assert shim.lib.trio_media_encode(shim.media(), 0, rows, 1024) == 0


def test_handles_may_be_freed_in_any_order(models: Models) -> None:
    shim = Shim(models)
    media, rows = shim.media(), shim.ffi.new("float[]", 1024)
    shim.running.context.close()
    shim.running.projector.close()
    shim.running.model.close()
    del shim.projector
    assert shim.lib.trio_media_encode(media, 0, rows, 1024) == 0


def rows_batch(shim: Shim, n_rows: int = 2, **changes: Any) -> tuple[Any, list[Any]]:
    """A batch of inputs, and what it points to."""
    n_positions = 4 if shim.running.projector.has_mrope else 1
    fields = {
        "inputs": np.zeros((n_rows, 64), np.float32),
        "positions": np.tile(np.arange(n_rows, dtype=np.int32), n_positions),
        "seqs": np.zeros(n_rows, np.int32),
        "outputs": np.zeros(n_rows, np.int8),
        "n_rows": n_rows,
    } | changes
    types = {"inputs": "float[]", "outputs": "int8_t[]"}
    kept: list[Any] = list(fields.values())
    raw = {
        key: shim.ffi.from_buffer(types.get(key, "int32_t[]"), np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else value
        for key, value in fields.items()
    }
    kept += raw.values()
    return shim.ffi.new("trio_batch *", raw), kept


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
def test_batches_of_rows(models: Models, name: str, changes: dict[str, Any]) -> None:
    shim = Shim(models, name)
    context = shim.running.context
    assert context.apply(Trim(0, 0))
    batch, kept = rows_batch(shim, **changes)
    shim.refused("trio_step", context.handle, batch, shim.ffi.NULL, shim.ffi.NULL)
    assert context.length(0) == 0
    batch, kept = rows_batch(shim)
    assert shim.lib.trio_step(context.handle, batch, shim.ffi.NULL, shim.ffi.NULL) == 0
    del kept


def test_rows_with_non_causal_attention_must_fit_into_a_micro_batch(models: Models) -> None:
    shim = Shim(models)
    model = shim.running.model.handle
    params = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 16, "n_seq_max": 1, "n_threads": 1, "n_threads_batch": 1}
    params |= {"flash_attention": -1, "type_k": 1, "type_v": 1, "pooling_type": 0}
    out = shim.ffi.new("trio_context **")
    assert shim.lib.trio_context_open(model, shim.ffi.new("trio_context_params *", params), out) == 0
    context = shim.ffi.gc(out[0], shim.lib.trio_context_free)
    batch, kept = rows_batch(shim, 17, non_causal=1)
    shim.refused("trio_step", context, batch, shim.ffi.NULL, shim.ffi.NULL)
    batch, kept = rows_batch(shim, 17)
    assert shim.lib.trio_step(context, batch, shim.ffi.NULL, shim.ffi.NULL) == 0
    batch, kept = rows_batch(shim, 16, positions=np.arange(17, 33, dtype=np.int32), non_causal=1)
    assert shim.lib.trio_step(context, batch, shim.ffi.NULL, shim.ffi.NULL) == 0
    del kept


def test_positions_of_rows_follow_what_the_sequence_holds(models: Models) -> None:
    shim = Shim(models, "mrope")
    running, context = shim.running, shim.running.context

    def step(positions: list[int]) -> int:
        n_rows = len(positions) // 4
        batch, kept = rows_batch(shim, n_rows, positions=np.array(positions, np.int32))
        code = int(shim.lib.trio_step(context.handle, batch, shim.ffi.NULL, shim.ffi.NULL))
        del kept
        return code

    assert context.apply(Trim(0, 0))
    running.prefill([5, 6, 7])
    assert step([1, 1, 1, 1, 1, 2, 0, 0]) == shim.lib.TRIO_E_INVALID  # goes back
    assert step([3, 3, 3, 3, 3, 4, 0, 0]) == 0
    assert context.length(0) == 4
    assert step([3, 3, 4, 4, 3, 4, 0, 0]) == 0  # more of the same place, as upstream allows
    assert running.step(Chunk(0, 0, 3, (5,), output=False)).outcome is DecodeOutcome.INVALID
    assert running.step(Chunk(0, 0, 5, (5,), output=False)).outcome is DecodeOutcome.OK
    assert context.length(0) == 6


def test_encoder_takes_no_rows(models: Models) -> None:
    shim = Shim(models)
    bert = Running(models("bert"))
    batch, kept = rows_batch(shim, embeddings=1, outputs=np.ones(2, np.int8))
    shim.refused("trio_step", bert.context.handle, batch, shim.ffi.NULL, shim.ffi.NULL)
    assert "tokens only" in last_error()
    del kept


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
def test_files_that_lack_something(models: Models, tmp_path: Path, change: tuple[bytes, bytes]) -> None:
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
def test_files_that_are_cut_short(models: Models, tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(models("mmproj").read_bytes()[:n_bytes])
    with pytest.raises(LoadError):
        Projector(Model(ModelConfig(path=str(models("llama")))), str(path), max_rows=64)


def test_vocabulary_that_lacks_the_texts_around_images(models: Models) -> None:
    with pytest.raises(LoadError, match="vocabulary lacks"):
        Projector(Model(ModelConfig(path=str(models("chain")))), str(models("mmproj-tiles")), max_rows=64)
