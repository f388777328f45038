from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from tests.hostile_images import bmp, encoded, good_images, hostile_images, jpeg_segment, noise, png, png_chunk, webp
from trio_runner.errors import InvalidImage
from trio_runner.image_source import MAX_IMAGE_BYTES, is_image_source
from trio_runner.images import load_pixels
from trio_runner.pixels import Pixels

HOSTILE = hostile_images()
SIDES = st.integers(1, 24)
ROOT = Path(__file__).parent.parent

Array = NDArray[np.uint8]


def load(source: Any) -> Pixels:
    return load_pixels(source, param="image_data[0]")


def array_of(pixels: Pixels) -> Array:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)


def random_array(width: int, height: int, seed: int, n_bands: int = 3) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, n_bands), dtype=np.uint8)


def refusal(source: Any) -> str:
    with pytest.raises(InvalidImage) as caught:
        load(source)
    assert caught.value.param == "image_data[0]"
    message = str(caught.value)
    assert message.startswith("image_data[0] ")
    return message


# Files that are refused.


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name: str) -> None:
    started = time.thread_time()
    message = refusal(HOSTILE[name])
    assert time.thread_time() - started < 0.9
    assert len(message) < 250
    if name.startswith("animated"):
        assert "animated" in message
    if " cut " in name:
        assert "cut short" in message


def test_there_are_many_hostile_files() -> None:
    assert len(HOSTILE) >= 50


def test_hostile_files_take_little_memory_and_print_nothing() -> None:
    program = """if True:
        import resource
        import warnings
        warnings.simplefilter("always")
        from tests.hostile_images import good_images, hostile_images
        from trio_runner.errors import InvalidImage
        from trio_runner.images import load_pixels

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hostile = hostile_images()
        for data in good_images().values():
            load_pixels(data, param="image")
        before = peak()
        for data in hostile.values():
            try:
                load_pixels(data, param="image")
            except InvalidImage:
                continue
            raise AssertionError
        print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stderr == ""
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 64 << 20


@settings(deadline=None)
@given(st.sampled_from(sorted(good_images())), st.floats(0, 1, exclude_max=True))
def test_the_beginning_of_a_file_is_refused(name: str, part: float) -> None:
    data = good_images()[name]
    refusal(data[: int(part * len(data))])


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(good_images())),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_damaged_file_is_decoded_or_refused(name: str, damages: list[tuple[float, int]]) -> None:
    data = bytearray(good_images()[name])
    for place, value in damages:
        data[int(place * min(len(data), 200))] = value
    with suppress(InvalidImage):
        assert load(bytes(data)).width >= 1


def test_truncated_files_are_refused_even_if_the_program_lets_pillow_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name, data in HOSTILE.items():
        if " cut " in name or "too few" in name or "fewer" in name:
            refusal(data)


def test_the_bounds() -> None:
    assert "larger than 20971520 bytes" in refusal(bytes(MAX_IMAGE_BYTES + 1))
    assert load(png(200, 1, colour=0)).width == 200
    assert "200 times" in refusal(png(201, 1, colour=0))
    assert "16384" in refusal(Image.new("1", (16385, 100)))
    assert "no pixels" in refusal(Image.new("RGB", (0, 10)))
    with Image.open(io.BytesIO(png(9000, 9000))) as lazy:
        assert "50000000" in refusal(lazy)


def test_the_size_of_a_webp_is_checked_whatever_bound_the_program_gives_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    large = [name for name in HOSTILE if re.fullmatch(r"webp, (lossless, )?([0-9]{5}|2\^24) x .*", name)]
    assert len(large) == 5
    for n_pixels in (None, 100, Image.MAX_IMAGE_PIXELS):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", n_pixels)
        for name in large:
            assert re.search("no side may have more than 16384|at most 50000000 are allowed", refusal(HOSTILE[name]))
    assert "has no pixels" in refusal(HOSTILE["webp, 0 x 0"])


def test_values_that_are_no_image_source(tmp_path: Path) -> None:
    for value in ["image.png", None, 1, bytearray(b"x"), [b"x"], memoryview(b"x"), b"x".__class__]:
        assert "must be the bytes of a file, a path or a PIL image" in refusal(value)
        assert not is_image_source(value)
    for source in [b"", tmp_path, Image.new("1", (1, 1))]:
        assert is_image_source(source)


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "image.of.a.kind"
    path.write_bytes(good_images()["png"])
    assert load(path) == load(good_images()["png"])
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    assert "larger than" in refusal(path)
    os.mkfifo(tmp_path / "pipe")
    for bad in [tmp_path, tmp_path / "nothing", tmp_path / "pipe", Path("/dev/zero"), Path("a\0b"), path / "x"]:
        assert "cannot be read" in refusal(bad)


# Files that are accepted, and their pixels.


@pytest.mark.parametrize("name", good_images())
def test_good_images_are_accepted(name: str) -> None:
    pixels = load(good_images()[name])
    assert (pixels.width, pixels.height) == (40, 30)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**32), st.sampled_from(["PNG", "BMP", "WEBP"]))
def test_lossless_formats_are_exact(width: int, height: int, seed: int, kind: str) -> None:
    array = random_array(width, height, seed)
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = load(encoded(Image.fromarray(array), kind, **options))
    assert (array_of(pixels) == array).all()
    assert pixels == load(Image.fromarray(array)) == Pixels(width, height, array.tobytes())


SMALL = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 3)).map(
    lambda spec: Pixels(spec[0], spec[1], bytes([spec[2]]) * (3 * spec[0] * spec[1]))
)


@given(SMALL, SMALL)
def test_digests_are_equal_exactly_if_the_pixels_are(a: Pixels, b: Pixels) -> None:
    same = (a.width, a.height, a.data) == (b.width, b.height, b.data)
    assert (a.digest == b.digest) == (a == b) == same
    assert hash(a) == hash(b) or not same
    assert len(a.digest) == 32


def test_pixels_of_the_wrong_length_are_an_error() -> None:
    for width, height, n_bytes in [(1, 1, 2), (0, 0, 0), (2, 1, 3), (-1, -1, 3)]:
        with pytest.raises(ValueError, match="pixels"):
            Pixels(width, height, bytes(n_bytes))


def turned(array: Array, orientation: int) -> Array:
    """How a picture that is stored as `array` with that orientation looks."""
    flips = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }
    return flips.get(orientation, array)


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    layout = f"{order}HHIHH"
    entries = struct.pack(layout, 0x0100, 3, 1, 7, 0) + struct.pack(layout, 0x0112, kind, 1, orientation, 0)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(0, 9), st.sampled_from("<>"), st.integers(0, 2**32))
def test_orientation(width: int, height: int, orientation: int, order: str, seed: int) -> None:
    array = random_array(width, height, seed)
    image, tag = Image.fromarray(array), exif(orientation, order)
    upright = turned(array, orientation)
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True})]:
        data = encoded(image, kind, exif=tag, **options)
        assert (array_of(load(data)) == upright).all()
        with Image.open(io.BytesIO(data)) as opened:
            assert load(opened) == load(data)
    plain = load(encoded(image, "JPEG"))
    assert (
        array_of(load(encoded(image, "JPEG", exif=b"Exif\0\0" + tag))) == turned(array_of(plain), orientation)
    ).all()


def test_the_orientation_of_a_png_may_stand_after_its_pixels() -> None:
    data = png(4, 2)
    assert (load(data).width, load(data).height) == (4, 2)
    for tag in (exif(6), exif(8, ">")):
        after = load(data.replace(b"\0\0\0\0IEND", png_chunk(b"eXIf", tag) + b"\0\0\0\0IEND"))
        assert (after.width, after.height) == (2, 4)
        assert after == load(png(4, 2, extra=png_chunk(b"eXIf", tag)))


def test_a_damaged_orientation_is_ignored() -> None:
    plain = load(good_images()["png"])
    tags = [b"", b"II", b"XX*\0" + bytes(20), exif(6, kind=4), b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
    for tag in [*tags, *(exif(6)[:n] for n in range(30))]:
        for data in [
            good_images()["png"].replace(b"\0\0\0\0IEND", png_chunk(b"eXIf", tag) + b"\0\0\0\0IEND"),
            good_images()["jpeg"][:2] + jpeg_segment(0xE1, b"Exif\0\0" + tag) + good_images()["jpeg"][2:],
            webp((b"VP8X", bytes(4) + b"\x27\0\0\x1d\0\0"), (b"VP8 ", good_images()["webp"][20:]), (b"EXIF", tag)),
        ]:
            pixels = load(data)
            assert (pixels.width, pixels.height) == (plain.width, plain.height)


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from(["LA", "RGBA"]), st.integers(0, 2**32))
def test_alpha_is_put_on_white(width: int, height: int, mode: str, seed: int) -> None:
    array = random_array(width, height, seed, n_bands=len(mode))
    colours, alpha = array[..., :-1].astype(float), array[..., -1:] / 255
    expected = colours * alpha + 255 * (1 - alpha)
    image = Image.fromarray(array, mode)
    sources: list[Any] = [
        image,
        encoded(image, "PNG"),
        encoded(image.convert("RGBA"), "WEBP", lossless=True, exact=True),
    ]
    for source in sources:
        assert np.abs(array_of(load(source)) - expected).max() <= 1


def grey(values: list[list[int]], depth: int) -> bytes:
    layout = {8: ">{}B", 16: ">{}H"}[depth]
    return b"".join(b"\0" + struct.pack(layout.format(len(row)), *row) for row in values)


def column(pixels: Pixels) -> list[tuple[int, ...]]:
    """The first pixel of each row."""
    return [tuple(int(value) for value in row[0]) for row in array_of(pixels)]


def test_transparent_colours_become_white() -> None:
    key = png_chunk(b"tRNS", b"\0\x07")
    assert column(load(png(1, 2, colour=0, rows=grey([[7], [8]], 8), extra=key))) == [(255, 255, 255), (8, 8, 8)]
    key = png_chunk(b"tRNS", b"\0\1\0\2\0\3")
    rows = b"\0\1\2\3\0\1\2\4"
    assert column(load(png(1, 2, rows=rows, extra=key))) == [(255, 255, 255), (1, 2, 4)]
    palette = png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    rows = b"\0\0\0\1\0\2"
    one = png(1, 3, colour=3, rows=rows, extra=palette + png_chunk(b"tRNS", b"\xff\0"))
    assert column(load(one)) == [(10, 20, 30), (255, 255, 255), (70, 80, 90)]
    some = png(1, 3, colour=3, rows=rows, extra=palette + png_chunk(b"tRNS", b"\x80\0\xff"))
    half, none, full = column(load(some))
    assert (none, full) == ((255, 255, 255), (70, 80, 90))
    assert all(
        abs(value - (before * 128 + 255 * 127) / 255) <= 1 for value, before in zip(half, (10, 20, 30), strict=True)
    )
    with Image.open(io.BytesIO(some)) as opened:
        assert load(opened) == load(some)
        assert load(opened.convert("PA")) == load(some)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_16_bits_are_scaled(values: list[int]) -> None:
    data = png(1, len(values), depth=16, colour=0, rows=grey([[value] for value in values], 16))
    array = np.array([[value] for value in values])
    sources: list[Any] = [data, Image.fromarray(array.astype(np.uint16)), Image.fromarray(array.astype(np.int32))]
    for source in sources:
        assert column(load(source)) == [(value >> 8,) * 3 for value in values]


def test_16_bits_of_every_kind() -> None:
    colours = png(1, 1, depth=16, rows=b"\0" + bytes.fromhex("112233445566"))
    assert column(load(colours)) == [(0x11, 0x33, 0x55)]
    key = png_chunk(b"tRNS", bytes.fromhex("112233445566"))
    colours = png(
        1, 2, depth=16, rows=b"\0" + bytes.fromhex("112233445566") + b"\0" + bytes.fromhex("112233446666"), extra=key
    )
    assert column(load(colours)) == [(255, 255, 255), (0x11, 0x33, 0x66)]
    key = png_chunk(b"tRNS", bytes.fromhex("1122"))
    assert column(load(png(1, 2, depth=16, colour=0, rows=grey([[0x1122], [0x2222]], 16), extra=key))) == [
        (255, 255, 255),
        (0x22, 0x22, 0x22),
    ]
    alpha = png(1, 1, depth=16, colour=6, rows=b"\0" + bytes.fromhex("112233445566ffff"))
    assert column(load(alpha)) == [(0x11, 0x33, 0x55)]
    assert column(load(png(1, 1, depth=16, colour=4, rows=b"\0" + bytes.fromhex("1122ffff")))) == [(0x11, 0x11, 0x11)]


def test_few_bits_and_interlacing() -> None:
    for depth in (1, 2, 4):
        lightest = png(9, 3, depth=depth, colour=0, rows=(b"\0" + b"\xff" * ((9 * depth + 7) // 8)) * 3)
        assert set(load(lightest).data) == {255}
    image = noise(13, 9)
    assert load(interlaced(image)) == load(image)


def interlaced(image: Image.Image) -> bytes:
    array = np.asarray(image)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(
        b"\0" + row.tobytes() for left, top, right, down in passes for row in array[top::down, left::right] if row.size
    )
    return png(image.width, image.height, rows=rows, interlaced=1)


def test_the_rows_of_a_bmp_may_go_up_or_down() -> None:
    data = bytearray(encoded(noise(8, 3), "BMP"))
    assert load(bytes(data)) == load(noise(8, 3))
    data[22:26] = struct.pack("<i", -3)
    assert (array_of(load(bytes(data))) == array_of(load(noise(8, 3)))[::-1]).all()
    assert load(bmp(4, 4)).data == bytes(48)


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa", "I", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_is_not_changed(mode: str) -> None:
    image = Image.new(mode, (7, 5))
    image.info["exif"] = exif(6)
    before = image.copy()
    pixels = load(image)
    assert (pixels.width, pixels.height) == (5, 7)
    assert (image.mode, image.size, image.tobytes(), image.info) == (
        before.mode,
        before.size,
        before.tobytes(),
        before.info,
    )


def test_pillow_modes_without_a_range_of_colours_are_refused() -> None:
    assert "mode F" in refusal(Image.new("F", (2, 2)))
    assert "mode I" in refusal(Image.new("I", (2, 2), 65536))
    assert "mode I" in refusal(Image.new("I", (2, 2), -1))
    assert "cannot be decoded" in refusal(Image.new("La", (2, 2)))


def test_cmyk() -> None:
    for source in [Image.new("CMYK", (9, 9)), encoded(Image.new("CMYK", (9, 9)), "JPEG")]:
        assert min(load(source).data) >= 250
    ink = encoded(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "JPEG")
    assert np.abs(array_of(load(ink)).astype(int) - [0, 255, 255]).max() <= 5


def test_the_current_frame_of_a_pillow_image_is_used() -> None:
    with Image.open(io.BytesIO(HOSTILE["animated WEBP"])) as image:
        first = load(image)
        image.seek(2)
        assert load(image) != first
        assert image.tell() == 2
        image.seek(0)
        assert load(image) == first


# Large images.


@pytest.mark.parametrize(
    ("kind", "size", "reduced"),
    [
        ("PNG", (4096, 21), (4096, 21)),
        ("PNG", (4097, 21), (4096, 21)),
        ("PNG", (6000, 300), (4096, 205)),
        ("PNG", (60, 12000), (20, 4096)),
        ("JPEG", (16384, 100), (4096, 25)),
        ("JPEG", (90, 9001), (41, 4096)),
        ("WEBP", (5000, 40), (4096, 33)),
    ],
)
def test_large_images_are_reduced(kind: str, size: tuple[int, int], reduced: tuple[int, int]) -> None:
    width, height = size
    slope = np.linspace(0, 255, max(size)).astype(np.uint8)
    array = np.broadcast_to(slope[None, :, None] if width > height else slope[:, None, None], (height, width, 3))
    image = Image.fromarray(np.ascontiguousarray(array))
    for source in [encoded(image, kind), image]:
        pixels = load(source)
        assert (pixels.width, pixels.height) == reduced
        # A gradient keeps its values.
        line = array_of(pixels)[:, :, 1].mean(axis=0 if width > height else 1)
        assert np.abs(line - np.linspace(0, 255, max(reduced))).max() <= 4


def test_a_large_image_with_alpha_has_no_dark_edges() -> None:
    array = np.zeros((30, 5000, 4), np.uint8)
    array[:, 2500:] = 255  # the transparent part is black
    assert array_of(load(encoded(Image.fromarray(array), "PNG"))).min() >= 254


def test_a_jpeg_with_an_allowed_number_of_scans() -> None:
    progressive = good_images()["jpeg, progressive"]
    last = progressive.rindex(b"\xff\xc4")
    assert load(progressive[:-2] + progressive[last:-2] * 30 + b"\xff\xd9").width == 40


def test_parts_beside_the_pixels_are_ignored() -> None:
    jpeg, picture = good_images()["jpeg"], good_images()["png"]
    texts = [
        png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"zTXt", b"not deflated\0\0rubbish"),
        png_chunk(b"iTXt", b"\xff\xff"),
        png_chunk(b"iCCP", b""),
        png_chunk(b"tEXt", b"a" * 100_000),
        png_chunk(b"gAMA", b""),
        png_chunk(b"acTL", struct.pack(">II", 1, 0)),
    ]
    assert load(picture[:33] + b"".join(texts) + picture[33:] + b"what follows the end") == load(picture)
    segments = [
        jpeg_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        jpeg_segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(60_000)),
        jpeg_segment(0xE2, b"MPF\0II*\0"),
        jpeg_segment(0xED, b"Photoshop 3.0\x008BIM"),
        jpeg_segment(0xFE, b"\xff\xd9\xff\xda"),
    ]
    assert load(jpeg[:2] + b"".join(segments) + jpeg[2:] + jpeg) == load(jpeg)


# Threads and imports.


def test_several_threads_decode_the_same_images() -> None:
    sources: list[Any] = list(good_images().values())
    expected = [load(source) for source in sources]
    lazy = [Image.open(io.BytesIO(data)) for data in sources]
    barrier = threading.Barrier(4)

    def work(number: int) -> list[Pixels]:
        barrier.wait()
        found = []
        for source in [*lazy, *sources]:
            found.append(load(source))
            refusal(HOSTILE["png, a row too few"])
        return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            assert found == expected * 2


def test_importing_does_not_import_pillow() -> None:
    program = "import sys, trio_runner, trio_runner.images; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
