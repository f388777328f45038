"""Encoded images: each image is encoded once, and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.seeing import (
    KINDS,
    A,
    B,
    Parts,
    said,
    seeing,
    shuttered,
    text_of,
)
from tests.engine.toys import (
    DEADLINE,
    Latch,
    Toy,
    items_of,
    until,
)
from trio_runner.core.ports import EncodedImage
from trio_runner.engine.device_threads import DeviceThreads
from trio_runner.engine.engine import Engine
from trio_runner.engine.image_store import ImageStore
from trio_runner.engine.prepare import MAX_PICTURES
from trio_runner.images import load_pixels
from trio_runner.pixels import Pixels
from trio_runner.testing import ToyEncoding, ToyProjector


async def test_an_image_twice_in_one_prompt_is_encoded_once(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        await text_of(engine, [A, " and ", A])
        statistics = engine.statistics()
    assert len(projector.encoded) == 1
    assert (statistics.images_encoded, statistics.images_found) == (1, 1)


async def test_an_image_in_later_requests_is_found_in_the_cache(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        questions: list[Parts] = [[A, "what?"], [A, "why?"], ["so: ", B, A]]
        for parts in questions:
            assert await text_of(engine, parts) == said(projector, parts)
        statistics = engine.statistics()
    assert projector.encoded == [load_pixels(image, param="image").digest for image in (A, B)]
    assert (statistics.images_encoded, statistics.images_found) == (2, 2)


async def test_an_image_in_many_requests_at_once_is_encoded_once(toy: Toy) -> None:
    shutter = shuttered(toy)
    texts: dict[str, str] = {}

    async def read(engine: Engine, question: str) -> None:
        texts[question] = await text_of(engine, [A, question])

    async with toy.engine() as engine, trio.open_nursery() as nursery:
        for n in range(MAX_PICTURES):
            nursery.start_soon(read, engine, f"question {n}")
        await until(lambda: engine.statistics().images_found == MAX_PICTURES - 1)
        shutter.let()
    assert toy.projector is not None
    assert texts == {question: said(toy.projector, [A, question]) for question in texts}
    assert len(texts) == MAX_PICTURES
    assert len(shutter.encodings) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prefix_with_an_image_is_found_in_the_prompt_cache(toy: Toy, kind: str) -> None:
    projector = seeing(toy, kind)

    async def n_cached(engine: Engine, parts: Parts) -> int:
        generation = engine.generate(parts, max_tokens=20)
        assert await generation.collect() == said(projector, parts)
        assert generation.usage is not None
        assert generation.usage.prompt_tokens == len(items_of(projector, parts))
        return generation.usage.cached_tokens

    async with toy.engine() as engine:
        assert await n_cached(engine, ["look: ", A, "what?"]) == 0
        assert await n_cached(engine, ["look: ", A, "why?"]) == len(items_of(projector, ["look: ", A, "wh"]))
        assert await n_cached(engine, ["look: ", B, "why?"]) == len("look: <")
        assert await n_cached(engine, ["look: ", A, "what?"]) == len(items_of(projector, ["look: ", A, "what"]))


def pixels(number: int) -> Pixels:
    return Pixels(1, 1, bytes([number, 0, 0]))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 700))
async def test_the_images_asked_for_last_are_kept(asks: list[int], max_bytes: int) -> None:
    projector = ToyProjector()
    kept: OrderedDict[int, int] = OrderedDict()
    encoded: list[int] = []
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            store = ImageStore(projector, max_bytes, nursery, DeviceThreads())
            for number in asks:
                image = await store.encode(pixels(number), param="image")
                assert image.items == projector.image(pixels(number)).items
                if number in kept:
                    kept.move_to_end(number)
                else:
                    encoded.append(number)
                    if image.n_bytes <= max_bytes:
                        kept[number] = image.n_bytes
                while sum(kept.values()) > max_bytes:
                    kept.popitem(last=False)
                assert store.n_bytes == sum(kept.values())
    assert projector.encoded == [pixels(number).digest for number in encoded]
    assert (store.n_encoded, store.n_found) == (len(encoded), len(asks) - len(encoded))


async def test_an_image_that_is_encoded_twice_is_kept_once() -> None:
    """The first encoding does not notice that it is cancelled, and a second one starts."""
    latch = Latch()

    class DeafEncoding(ToyEncoding):
        def run(self) -> EncodedImage:
            latch()
            return projector.image(self.pixels)

    class DeafProjector(ToyProjector):
        def encoding(self, pixels: Pixels) -> ToyEncoding:
            return DeafEncoding(self, pixels)

    projector = DeafProjector()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            store = ImageStore(projector, 1000, nursery, DeviceThreads())
            encode = partial(store.encode, pixels(1), param="image")
            async with trio.open_nursery() as leaving:
                leaving.start_soon(encode)
                await latch.reached()
                leaving.cancel_scope.cancel()
            nursery.start_soon(encode)
            latch.open()
        assert store.n_encoded == 2
        assert store.n_bytes == projector.image(pixels(1)).n_bytes


@pytest.mark.parametrize("n_bytes", [0, 1 << 20])
async def test_the_size_of_the_cache_is_configured(toy: Toy, n_bytes: int) -> None:
    projector = seeing(toy)
    async with toy.engine(image_cache_bytes=n_bytes) as engine:
        for _ in range(3):
            await text_of(engine, [A])
        assert engine.statistics().images_encoded == len(projector.encoded) == (1 if n_bytes else 3)
        assert (engine.statistics().image_bytes > 0) == (n_bytes > 0)
