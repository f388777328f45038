"""Projectors: what they make of an image, and how that is cancelled."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.pictures import Models, media_of, open_pair, open_projector, picture, rows_of
from trio_runner.config import ModelConfig
from trio_runner.core.ports import EncodedMedia
from trio_runner.core.prompt import Media, MediaRow
from trio_runner.errors import EngineClosed, InvalidImage, LoadError
from trio_runner.llama import Model, Projector
from trio_runner.llama.library import drain_log
from trio_runner.pixels import Pixels

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
def test_an_image_becomes_rows_between_tokens(
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


def test_rows_have_the_positions_of_a_grid(models: Models) -> None:
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


def test_rows_of_a_narrow_image_share_their_position_too(models: Models) -> None:
    (media,) = open_projector(models, "mrope").encoding(picture(560, 28)).run().media
    assert media.n_rows == 20
    assert media.shares_positions
    assert media.n_positions == media.n_rows


def test_rows_depend_only_on_the_image(models: Models) -> None:
    projector = open_projector(models, "llama")

    def encode(pixels: Pixels) -> tuple[Media, EncodedMedia]:
        ((media, encoded),) = projector.encoding(pixels).run().media.items()
        return media, encoded

    (one, rows), (other, other_rows), (again, same_rows) = (encode(picture(seed=seed)) for seed in (1, 2, 1))
    assert one == again
    assert one != other
    np.testing.assert_array_equal(rows.rows, same_rows.rows)
    assert not np.allclose(rows.rows, other_rows.rows, atol=0.01)


def test_keys_differ_between_projectors(models: Models, tmp_path: Path) -> None:
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


def test_images_are_scaled_down_to_fit_into_a_batch(models: Models) -> None:
    def n_rows(max_rows: int, size: tuple[int, int] = (640, 480)) -> int:
        projector = open_projector(models, "mrope", max_rows=max_rows)
        (media,) = projector.encoding(picture(*size)).run().media
        return media.n_rows

    assert n_rows(4096) == 23 * 17
    assert 200 < n_rows(256) <= 256
    assert n_rows(4) <= 4  # fewer rows than the file allows for the smallest image
    with pytest.raises(InvalidImage, match=r"17 rows.* --batch-size is 8"):
        n_rows(8, (4000, 100))


def test_images_that_never_fit_are_refused_at_once(models: Models) -> None:
    with pytest.raises(LoadError, match=r"16 rows.* --batch-size is 15") as error:
        open_projector(models, "swa", max_rows=15)
    assert error.value.path == str(models("mmproj-gemma"))
    assert open_projector(models, "swa", max_rows=16).encoding(picture()).run().media
    assert open_projector(models, "llama", max_rows=1).encoding(picture()).run().media  # causal rows


def test_an_image_that_mtmd_refuses_is_invalid(models: Models) -> None:
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


def test_encoding_is_cancelled_or_complete_at_any_time(models: Models) -> None:
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


def test_a_cancelled_encoding_logs_no_error(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another thread, such as the one that decodes, takes the lines out of the log first."""
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


def test_images_are_encoded_one_at_a_time(models: Models) -> None:
    """Eight threads encode at once, and some are cancelled."""
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


def test_closing_twice_is_harmless_and_does_not_wait(models: Models) -> None:
    running = open_pair(models, "llama")
    encoding = running.projector.encoding(picture())
    running.projector.close()
    running.projector.close()
    running.model.close()
    running.context.close()
    assert encoding.run().media  # the encoding keeps the projector alive, and the projector the model
    with pytest.raises(EngineClosed):
        running.projector.encoding(picture())
