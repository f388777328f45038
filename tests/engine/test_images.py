"""Images in prompts: each is encoded once, whoever asks for it, and nobody else waits for that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.engine.inside import images_of
from tests.engine.toys import (
    DEADLINE,
    Gate,
    Latch,
    Projector,
    Shutter,
    SlowFile,
    Toy,
    items_of,
    picture,
    prompts,
    until,
    until_idle,
)
from tests.hostile_images import good_images, hostile_images
from trio_runner.core.batch import Batch
from trio_runner.core.ports import EncodedImage
from trio_runner.core.prompt import fit_prompt
from trio_runner.engine.device_threads import DeviceThreads
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.image_store import ImageStore
from trio_runner.engine.prepare import MAX_PICTURES
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineClosed,
    InvalidImage,
    InvalidRequest,
    NativeError,
    PromptTooLong,
    RequestError,
    RunnerError,
    Unsupported,
)
from trio_runner.events import PromptProgress
from trio_runner.front_door import open_engine
from trio_runner.image_source import ImageSource
from trio_runner.images import load_pixels
from trio_runner.pixels import Pixels
from trio_runner.request import MAX_IMAGES
from trio_runner.testing import ToyEncoding, ToyProjector, toy_text, toy_vector

Parts: TypeAlias = Sequence[str | ImageSource]

A, B, C = picture(0), picture(1), picture(2)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "folded": {"shares_positions": True},
    "looking both ways": {"causal": False},
    "in tiles": {"n_tiles": 3},
    "in folded tiles": {"shares_positions": True, "n_tiles": 2},
}
ARRANGEMENTS: dict[str, Parts] = {
    "alone": [A],
    "first": [A, "what is this?"],
    "last": ["this is ", A],
    "in the middle": ["here: ", A, " what is it?"],
    "twice": [A, " and ", A],
    "side by side": ["compare ", A, B, A],
    "many": [A, B, "x", C, A, "y", B, C],
}


def seeing(toy: Toy, kind: str = "plain") -> Projector:
    toy.projector = Projector(**KINDS[kind])
    toy.capabilities = {**toy.capabilities, "can_shift": not toy.projector.shares_positions}
    return toy.projector


def shut(toy: Toy) -> Shutter:
    """A projector that encodes nothing before it is let."""
    seeing(toy).on_encode = shutter = Shutter()
    return shutter


def tagged(parts: Parts) -> tuple[str, tuple[tuple[int, ImageSource], ...]]:
    """The same prompt as text with tags, and what they stand for."""
    images = [part for part in parts if not isinstance(part, str)]
    numbers = {image: 7 * images.index(image) + 1 for image in images}
    text = "".join(part if isinstance(part, str) else f"[img-{numbers[part]}]" for part in parts)
    return text, tuple((number, image) for image, number in numbers.items())


def by_parts(engine: Engine, parts: Parts, **options: Any) -> Generation:
    return engine.generate(parts, **options)


def by_tags(engine: Engine, parts: Parts, **options: Any) -> Generation:
    prompt, image_data = tagged(parts)
    return engine.generate(prompt, image_data=image_data, **options)


async def text_of(engine: Engine, parts: Parts, **options: Any) -> str:
    return await engine.generate(parts, max_tokens=20, **options).collect()


def said(projector: ToyProjector, parts: Parts) -> str:
    """What `text_of` should be."""
    return toy_text(items_of(projector, parts), 20)


# -- what the model sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [by_parts, by_tags])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_text_is_what_the_model_says_to_what_it_sees(
    toy: Toy, parts: Parts, kind: str, ask: Callable[..., Generation]
) -> None:
    projector = seeing(toy, kind)
    async with toy.engine(batch_size=8) as engine:
        text = await ask(engine, parts, max_tokens=20).collect()
    assert text == said(projector, parts)


PARTS = st.lists(st.text("a1[]-img ", max_size=8) | st.sampled_from([A, B, C]), min_size=1, max_size=8).filter(any)


@given(PARTS, st.sampled_from(list(KINDS)), st.integers(1, 20))
async def test_any_texts_and_images(parts: Parts, kind: str, batch_size: int) -> None:
    """In a list nothing is a tag; and where an image may be cut, no batch is too small for it."""
    toy = Toy()
    projector = seeing(toy, kind)
    batch_size = batch_size if kind in ("plain", "in tiles") else max(batch_size, 6)
    async with toy.engine(batch_size=batch_size) as engine:
        assert await text_of(engine, parts) == said(projector, parts)
    toy.check_closed()


@given(PARTS, st.sampled_from(list(KINDS)), st.integers(8, 30), st.integers(-1, 30))
async def test_a_prompt_that_is_cut_loses_no_half_of_an_image(
    parts: Parts, kind: str, context_length: int, n_keep: int
) -> None:
    toy = Toy()
    items = items_of(seeing(toy, kind), parts)
    async with toy.engine(context_length=context_length) as engine:
        generation = engine.generate(parts, truncate=True, n_keep=n_keep, max_tokens=1)
        fitted = fit_prompt(items, n_ctx=context_length, n_keep=n_keep, adds_bos=False, truncate=True).items
        assert await generation.collect() == toy_text(fitted, 1)
        if len(items) > context_length:
            with pytest.raises(PromptTooLong) as caught:
                await engine.generate(parts).start()
            assert (caught.value.n_prompt, caught.value.param) == (len(items), "prompt")
    toy.check_closed()


@pytest.mark.parametrize("parts", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_what_the_model_has_around_a_text_stands_around_all_parts(toy: Toy, parts: Parts) -> None:
    projector = seeing(toy)
    toy.info = {"token_bos": 2, "adds_bos": True, "token_eos": 3, "adds_eos": True}
    async with toy.engine() as engine:
        text = await text_of(engine, parts)
    assert text == toy_text([2, *items_of(projector, parts), 3], 20)


async def test_another_picture_is_another_text(toy: Toy) -> None:
    seeing(toy)
    questions: list[Parts] = [[A, "?"], [B, "?"], ["?", A], [A, B], [B, A], [A, A], [A], ["?"]]
    async with toy.engine() as engine:
        texts = [await text_of(engine, parts) for parts in questions]
    assert len(set(texts)) == len(questions)


async def test_it_is_the_pixels_that_count(toy: Toy, tmp_path: Path) -> None:
    """Not the file, nor how it is given."""
    projector = seeing(toy)
    image = Image.open(BytesIO(A))
    bitmap = BytesIO()
    image.save(bitmap, "BMP")
    (tmp_path / "picture.png").write_bytes(A)
    sources: list[ImageSource] = [A, bitmap.getvalue(), tmp_path / "picture.png", image]
    async with toy.engine() as engine:
        texts = [await text_of(engine, [source, "?"]) for source in sources]
    assert texts == [said(projector, [A, "?"])] * len(sources)
    assert len(projector.encoded) == 1


async def test_of_two_images_with_one_number_the_first_counts(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        generation = engine.generate("[img-1]?", image_data=[(1, A), (1, B)], max_tokens=20)
        assert await generation.collect() == said(projector, [A, "?"])


@pytest.mark.parametrize("prompt", ["[img-] [img-x] [img -1] [img-12345678901]", "img-1", "[img-", "[[img]-1]"])
async def test_what_only_looks_like_a_tag_is_text(toy: Toy, prompt: str) -> None:
    seeing(toy)
    async with toy.engine() as engine:
        assert await engine.generate(prompt, max_tokens=20).collect() == toy_text(prompt, 20)


@pytest.mark.parametrize("prompt", ["[img-1]", "see [img-0] and [img-1]"])
async def test_without_a_projector_tags_are_text(toy: Toy, prompt: str) -> None:
    async with toy.engine() as engine:
        assert not engine.has_projector
        assert await engine.generate(prompt, max_tokens=20).collect() == toy_text(prompt, 20)
        assert await engine.generate([prompt, " and more"], max_tokens=20).collect() == toy_text(
            f"{prompt} and more", 20
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_progress_counts_rows(toy: Toy, kind: str) -> None:
    parts: Parts = ["look: ", A, B, "?"]
    n_items = len(items_of(seeing(toy, kind), parts))
    async with toy.engine(batch_size=8) as engine:
        events = [event async for event in engine.generate(parts, max_tokens=1, progress=True)]
    counts = [event.n_decoded for event in events if isinstance(event, PromptProgress)]
    assert counts == sorted(counts)
    assert counts[-1] == n_items
    assert all(event.n_prompt == n_items for event in events if isinstance(event, PromptProgress))


# -- once -------------------------------------------------------------------------------------------------------------


async def test_twice_in_one_prompt(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        await text_of(engine, [A, " and ", A])
        statistics = engine.statistics()
    assert len(projector.encoded) == 1
    assert (statistics.images_encoded, statistics.images_found) == (1, 1)


async def test_one_request_after_the_other(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        questions: list[Parts] = [[A, "what?"], [A, "why?"], ["so: ", B, A]]
        for parts in questions:
            assert await text_of(engine, parts) == said(projector, parts)
        statistics = engine.statistics()
    assert projector.encoded == [load_pixels(image, param="image").digest for image in (A, B)]
    assert (statistics.images_encoded, statistics.images_found) == (2, 2)


async def test_many_at_the_same_time(toy: Toy) -> None:
    shutter = shut(toy)
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
async def test_a_beginning_with_an_image_is_found_in_the_prompt_cache(toy: Toy, kind: str) -> None:
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
async def test_those_that_were_asked_for_last_are_kept(asks: list[int], max_bytes: int) -> None:
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


async def test_what_could_not_be_broken_off_any_more_counts_once() -> None:
    """It is encoded to its end, and so is what came in its place."""
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
async def test_how_much_is_kept_is_configured(toy: Toy, n_bytes: int) -> None:
    projector = seeing(toy)
    async with toy.engine(image_cache_bytes=n_bytes) as engine:
        for _ in range(3):
            await text_of(engine, [A])
        assert engine.statistics().images_encoded == len(projector.encoded) == (1 if n_bytes else 3)
        assert (engine.statistics().image_bytes > 0) == (n_bytes > 0)


# -- who waits for it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who_leaves", [0, 1])
async def test_who_leaves_does_not_take_the_image_along(toy: Toy, who_leaves: int) -> None:
    shutter = shut(toy)
    scopes = [trio.CancelScope(), trio.CancelScope()]
    texts: dict[int, str] = {}

    async def read(engine: Engine, n: int) -> None:
        with scopes[n]:
            texts[n] = await text_of(engine, [A, f"question {n}"])

    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(read, engine, 0)
        await shutter.reached()
        nursery.start_soon(read, engine, 1)
        await until(lambda: engine.statistics().images_found == 1)
        scopes[who_leaves].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert scopes[who_leaves].cancelled_caught
        assert not shutter.encodings[0].cancelled.is_set()
        shutter.open()
    assert toy.projector is not None
    stays = 1 - who_leaves
    assert texts == {stays: said(toy.projector, [A, f"question {stays}"])}
    assert len(shutter.encodings) == 1


async def test_when_all_have_left_it_is_broken_off_and_the_next_starts_anew(toy: Toy) -> None:
    """Even if what was broken off is still there, hard of hearing."""
    projector, latch = seeing(toy), Latch()
    encodings: list[ToyEncoding] = []
    texts: list[str] = []

    def encode(encoding: ToyEncoding) -> None:
        encodings.append(encoding)
        latch()

    async def read(engine: Engine) -> None:
        texts.append(await text_of(engine, [A]))

    projector.on_encode = encode
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        async with trio.open_nursery() as leaving:
            for n in range(3):
                leaving.start_soon(by_parts(engine, [A, f"question {n}"]).collect)
            await until(lambda: engine.statistics().images_found == 2)
            leaving.cancel_scope.cancel()
        assert encodings[0].cancelled.is_set()
        nursery.start_soon(read, engine)
        await until(lambda: (images_of(engine).n_encoding, images_of(engine).n_waiting) == (1, 1))
        latch.open()
    assert texts == [said(projector, [A])]
    assert [encoding.cancelled.is_set() for encoding in encodings] == [True, False]


async def test_who_leaves_while_it_waits_for_its_turn_is_never_encoded(toy: Toy) -> None:
    shutter = shut(toy)
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(text_of, engine, [A])
        await shutter.reached()
        async with trio.open_nursery() as leaving:
            leaving.start_soon(text_of, engine, [B])
            await until(lambda: images_of(engine).n_encoding == 2)
            leaving.cancel_scope.cancel()
        shutter.open()
    assert [encoding.pixels for encoding in shutter.encodings if not encoding.cancelled.is_set()] == [
        load_pixels(A, param="image")
    ]


async def test_others_go_on_while_an_image_is_encoded(toy: Toy) -> None:
    shutter = shut(toy)
    (prompt,) = prompts(1, 60)
    texts: list[str] = []

    async def read(engine: Engine) -> None:
        texts.append(await text_of(engine, [A]))

    async with toy.engine(slots=1) as engine, trio.open_nursery() as nursery:
        shutter.let()
        await text_of(engine, [B])
        async with engine.generate(prompt, max_tokens=60) as stream:
            text = (await anext(stream)).text
            nursery.start_soon(read, engine)
            await shutter.reached(2)
            text += "".join([event.text async for event in stream])
        assert text == toy_text(prompt, 60)
        np.testing.assert_array_equal(await engine.embed(["hello"]), [toy_vector(list(b"hello"))])
        assert await engine.tokenize("hello") == list(b"hello")
        # An image that is there already needs no projector.
        assert toy.projector is not None
        assert await text_of(engine, [B, "?"]) == said(toy.projector, [B, "?"])
        assert engine.statistics().busy == 0
        assert texts == []
        shutter.open()
    assert texts == [said(toy.projector, [A])]


async def test_who_waits_for_an_image_has_a_place_in_the_queue(toy: Toy) -> None:
    shutter = shut(toy)
    async with toy.engine(slots=1, max_queue=1) as engine, trio.open_nursery() as nursery:
        for image in (A, B):
            nursery.start_soon(text_of, engine, [image])
        await shutter.reached()
        with pytest.raises(EngineBusy):
            await engine.generate("one too many").start()
        shutter.open()


async def test_only_so_many_pictures_are_in_memory(toy: Toy, tmp_path: Path) -> None:
    """Those that nobody encodes yet stay in their files."""
    projector, latch = seeing(toy), Latch()
    shutter = Shutter()
    latch.open()
    n_ahead: list[int] = []

    def count(encoding: ToyEncoding) -> None:
        shutter(encoding)
        n_ahead.append(latch.n_arrived // 2 - len(n_ahead))  # a path is asked for twice, to look at it and to open it

    projector.on_encode = count
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        for number in range(2 * MAX_PICTURES):
            nursery.start_soon(text_of, engine, [SlowFile(tmp_path, latch, number)])
        for n in range(2 * MAX_PICTURES):
            n_loaded = min(n + MAX_PICTURES, 2 * MAX_PICTURES)
            await until(lambda n=n_loaded: latch.n_arrived >= 2 * n)  # type: ignore[misc]
            shutter.let()
    assert max(n_ahead) == MAX_PICTURES


# -- what is wrong with them ------------------------------------------------------------------------------------------

FAILURES: dict[str, tuple[Exception, type[RunnerError]]] = {
    "refused": (InvalidImage("too small"), InvalidImage),
    "failed": (NativeError("encode", 3, "out of memory"), NativeError),
    "memory": (MemoryError(), RunnerError),
    "bug": (ValueError("a bug"), RunnerError),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_what_cannot_be_encoded_fails_all_who_wait_for_it_and_is_forgotten(toy: Toy, failure: str) -> None:
    projector, shutter = seeing(toy), Shutter()
    raised, expected = FAILURES[failure]
    (prompt,) = prompts(1, 40)

    def fail(encoding: ToyEncoding) -> None:
        shutter(encoding)
        raise raised

    projector.on_encode = fail
    errors: dict[str, RunnerError] = {}

    async def read(param: str, generation: Generation) -> None:
        with pytest.raises(RunnerError) as caught:
            await generation.collect()
        errors[param] = caught.value

    async with toy.engine() as engine, engine.generate(prompt, max_tokens=40) as neighbour:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "prompt[0]", engine.generate([A]))
            nursery.start_soon(read, "prompt[1]", engine.generate(("what is this? ", A)))
            nursery.start_soon(read, "image_data[0]", engine.generate("[img-3]", image_data=[(3, A)]))
            await until(lambda: engine.statistics().images_found == 2)
            shutter.open()
        assert {type(error) for error in errors.values()} == {expected}
        assert len({id(error) for error in errors.values()} | {id(raised)}) == 4
        for param, error in errors.items():
            if isinstance(error, InvalidImage):
                assert error.param == param
                assert "too small" in str(error)
            elif isinstance(error, NativeError):
                assert str(error) == str(raised)
            else:
                assert error.__cause__ is raised
                assert param in str(error)
        assert engine.statistics().generations <= 1
        assert len(shutter.encodings) == 1
        projector.on_encode = None
        assert await text_of(engine, [A]) == said(projector, [A])
        assert engine.statistics().images_encoded == 1
        assert await neighbour.collect() == toy_text(prompt, 40)


WRONG: dict[str, tuple[Any, dict[str, Any], type[RequestError], str]] = {
    "a tag without an image": ("see [img-0] [img-2]", {"image_data": [(0, A)]}, InvalidRequest, "prompt"),
    "a tag and no image at all": ("see [img-0]", {}, InvalidRequest, "prompt"),
    "an image without a tag": ("see", {"image_data": [(0, A)]}, InvalidRequest, "image_data"),
    "one of two without a tag": ("[img-1]", {"image_data": [(1, A), (2, B)]}, InvalidRequest, "image_data"),
    "too many": ([A] * (MAX_IMAGES + 1), {}, InvalidRequest, "prompt"),
    "too many tags": ("[img-1]" * (MAX_IMAGES + 1), {"image_data": [(1, A)]}, InvalidRequest, "image_data"),
    "too many to choose from": (
        "[img-1]",
        {"image_data": [(n, A) for n in range(MAX_IMAGES + 1)]},
        InvalidRequest,
        "image_data",
    ),
    "images both ways": ([A], {"image_data": [(1, A)]}, InvalidRequest, "prompt"),
    "a token among them": ([1, A], {}, InvalidRequest, "prompt"),
    "something else among them": ([A, 1.5], {}, InvalidRequest, "prompt"),
    "nothing": (["", ""], {}, InvalidRequest, "prompt"),
    "too long": (["x" * 64, A], {}, PromptTooLong, "prompt"),
    "no bytes": ([A, b""], {}, InvalidImage, "prompt[1]"),
    "no such file": ([Path("/nowhere/at/all.png")], {}, InvalidImage, "prompt[0]"),
    "no picture": ("[img-1][img-2]", {"image_data": [(1, A), (2, b"a cat")]}, InvalidImage, "image_data[1]"),
}
WITHOUT_A_PROJECTOR: dict[str, tuple[Any, dict[str, Any], type[RequestError], str]] = {
    "parts": (["see", A], {}, Unsupported, "prompt"),
    "tags": ("see [img-1]", {"image_data": [(1, A)]}, Unsupported, "image_data"),
    "no picture": ("see [img-1]", {"image_data": [(1, b"a cat")]}, Unsupported, "image_data"),
}


async def _refused(toy: Toy, prompt: Any, fields: dict[str, Any], error: type[RequestError], param: str) -> None:
    """The request is refused, and a neighbour in the middle of its text does not notice."""
    (other,) = prompts(1, 20)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(context_length=64) as engine:
        neighbour = engine.generate(other, max_tokens=20)
        await neighbour.start()
        gate.let(3)
        await gate.reached(4)
        with pytest.raises(error) as caught:
            await engine.generate(prompt, **fields).start()
        assert caught.value.param == param
        assert param in str(caught.value)
        statistics = engine.statistics()
        assert (statistics.generations, statistics.busy, statistics.waiting) == (1, 1, 0)
        assert len(toy.model.samplers) == 1
        gate.open()
        assert await neighbour.collect() == toy_text(other, 20)
        await until_idle(engine)


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_prompt_takes_no_slot(toy: Toy, wrong: str) -> None:
    seeing(toy)
    await _refused(toy, *WRONG[wrong])


@pytest.mark.parametrize("wrong", WITHOUT_A_PROJECTOR)
async def test_without_a_projector_no_image_is_looked_at(toy: Toy, wrong: str) -> None:
    await _refused(toy, *WITHOUT_A_PROJECTOR[wrong])


async def test_hostile_files_are_refused_one_and_all(toy: Toy) -> None:
    """At the same time, beside those that are good."""
    projector = seeing(toy)
    texts: dict[str, str] = {}
    params: dict[str, str | None] = {}

    async def read_good(engine: Engine, name: str) -> None:
        texts[name] = await text_of(engine, [good_images()[name], "?"])

    async def read_bad(engine: Engine, name: str) -> None:
        with pytest.raises(InvalidImage) as caught:
            await engine.generate("[img-1]", image_data=[(1, hostile_images()[name])]).start()
        params[name] = caught.value.param

    async with toy.engine(max_queue=None) as engine:
        async with trio.open_nursery() as nursery:
            for name in hostile_images():
                nursery.start_soon(read_bad, engine, name)
            for name in good_images():
                nursery.start_soon(read_good, engine, name)
        await until_idle(engine)
    assert texts == {name: said(projector, [data, "?"]) for name, data in good_images().items()}
    assert params == dict.fromkeys(hostile_images(), "image_data[0]")


# -- the end ----------------------------------------------------------------------------------------------------------


async def _read(generation: Generation, errors: list[type[Exception]]) -> None:
    try:
        await generation.collect()
    except RunnerError as error:
        errors.append(type(error))


@pytest.mark.parametrize("n_images", [1, 3])
async def test_leaving_does_not_wait_for_images(toy: Toy, n_images: int) -> None:
    shutter = shut(toy)
    errors: list[type[Exception]] = []
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            async with open_engine(toy) as engine:
                for n in range(n_images):
                    nursery.start_soon(_read, engine.generate([picture(n)]), errors)
                await shutter.reached()
                await until(lambda: images_of(engine).n_encoding == n_images)
            assert [encoding.cancelled.is_set() for encoding in shutter.encodings] == [True]
    assert errors == [EngineClosed] * n_images


async def test_leaving_breaks_off_an_image_first(toy: Toy) -> None:
    """Whatever else there is to wait for."""
    shutter, tokenising = shut(toy), Latch()
    toy.on_tokenize = tokenising
    errors: list[type[Exception]] = []

    async def let_them_go() -> None:
        await until(shutter.encodings[0].cancelled.is_set)
        tokenising.open()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(_read, engine.generate([A]), errors)
            await shutter.reached()
            nursery.start_soon(_read, engine.generate("hello"), errors)
            await tokenising.reached()
            nursery.start_soon(let_them_go)
    assert errors == [EngineClosed] * 2


async def test_who_waits_for_an_image_hears_that_the_engine_has_broken(toy: Toy) -> None:
    shutter = shut(toy)
    errors: list[type[Exception]] = []

    def die(batch: Batch) -> None:
        raise NativeError("decode", 1, "a bug")

    toy.on_decode = die
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            with pytest.raises(EngineBroken):  # noqa: PT012
                async with open_engine(toy) as engine:
                    nursery.start_soon(_read, engine.generate([A]), errors)
                    await shutter.reached()
                    nursery.start_soon(_read, engine.generate("hello"), errors)
                    await trio.sleep_forever()
    assert errors == [EngineBroken] * 2


async def test_a_file_that_is_read_when_the_engine_has_gone(toy: Toy, tmp_path: Path) -> None:
    seeing(toy)
    latch = Latch()
    errors: list[type[Exception]] = []
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            async with open_engine(toy) as engine:
                nursery.start_soon(_read, engine.generate([SlowFile(tmp_path, latch)]), errors)
                await latch.reached()
            toy.check_closed()
            latch.open()
    assert errors == [EngineClosed]


async def test_a_file_that_is_read_while_the_engine_is_leaving(toy: Toy, tmp_path: Path) -> None:
    """Its image is there, but the model is about to go: somebody is still tokenising with it."""
    seeing(toy)
    latch, tokenising = Latch(), Latch()
    toy.on_tokenize = lambda text: tokenising() if text == "slow" else None
    errors: list[type[Exception]] = []

    async def let_them_go(engine: Engine) -> None:
        await until(lambda: engine.status == "closing")
        await trio.testing.wait_all_tasks_blocked()
        latch.open()
        await until(lambda: len(errors) == 1)
        tokenising.open()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            await text_of(engine, [A])
            nursery.start_soon(_read, engine.generate("slow"), errors)
            nursery.start_soon(_read, engine.generate([SlowFile(tmp_path, latch)]), errors)
            await latch.reached()
            await tokenising.reached()
            nursery.start_soon(let_them_go, engine)
    assert errors == [EngineClosed] * 2


async def test_draining_waits_for_who_was_there_before_it(toy: Toy) -> None:
    shutter = shut(toy)
    texts: list[str] = []

    async def ask(engine: Engine) -> None:
        texts.append(await text_of(engine, [A, "what is this?"]))

    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(ask, engine)
        await shutter.reached()
        nursery.start_soon(engine.drain, DEADLINE)
        await until(lambda: engine.status == "closing")
        with pytest.raises(EngineClosed):
            await text_of(engine, [A])
        shutter.open()
    assert toy.projector is not None
    assert texts == [said(toy.projector, [A, "what is this?"])]


async def test_draining_ends_who_is_not_ready_in_time(toy: Toy) -> None:
    shutter = shut(toy)
    async with toy.engine() as engine, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(EngineClosed):
                await text_of(engine, [A])

        nursery.start_soon(ask)
        await shutter.reached()
        await engine.drain(0.01)
        shutter.open()
