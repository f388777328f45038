"""Images that are being encoded: the requests that wait for them, and their cancellation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from tests.engine.inside import images_of
from tests.engine.seeing import (
    A,
    B,
    by_parts,
    said,
    seeing,
    shuttered,
    text_of,
)
from tests.engine.toys import (
    DEADLINE,
    Latch,
    Shutter,
    SlowFile,
    Toy,
    picture,
    prompts,
    until,
)
from trio_runner.core.batch import Batch
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.prepare import MAX_PICTURES
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineClosed,
    NativeError,
    RunnerError,
)
from trio_runner.front_door import open_engine
from trio_runner.images import load_pixels
from trio_runner.testing import ToyEncoding, toy_text, toy_vector


@pytest.mark.parametrize("who_leaves", [0, 1])
async def test_closing_one_of_two_requests_does_not_cancel_their_image(toy: Toy, who_leaves: int) -> None:
    shutter = shuttered(toy)
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


async def test_an_encoding_is_cancelled_when_no_request_waits_for_it(toy: Toy) -> None:
    """The next request starts another encoding, even while the cancelled one still runs."""
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


async def test_an_image_that_is_cancelled_before_its_turn_is_never_encoded(toy: Toy) -> None:
    shutter = shuttered(toy)
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


async def test_other_requests_go_on_while_an_image_is_encoded(toy: Toy) -> None:
    shutter = shuttered(toy)
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
        # An image in the cache needs no projector.
        assert toy.projector is not None
        assert await text_of(engine, [B, "?"]) == said(toy.projector, [B, "?"])
        assert engine.statistics().busy == 0
        assert texts == []
        shutter.open()
    assert texts == [said(toy.projector, [A])]


async def test_a_request_that_waits_for_an_image_has_a_place_in_the_queue(toy: Toy) -> None:
    shutter = shuttered(toy)
    async with toy.engine(slots=1, max_queue=1) as engine, trio.open_nursery() as nursery:
        for image in (A, B):
            nursery.start_soon(text_of, engine, [image])
        await shutter.reached()
        with pytest.raises(EngineBusy):
            await engine.generate("one too many").start()
        shutter.open()


async def test_only_so_many_images_are_decoded_ahead(toy: Toy, tmp_path: Path) -> None:
    """The others stay in their files until their turn is near."""
    projector, latch = seeing(toy), Latch()
    shutter = Shutter()
    latch.open()
    n_ahead: list[int] = []

    def count(encoding: ToyEncoding) -> None:
        shutter(encoding)
        n_ahead.append(latch.n_arrived // 2 - len(n_ahead))  # each file is looked at and then opened

    projector.on_encode = count
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        for number in range(2 * MAX_PICTURES):
            nursery.start_soon(text_of, engine, [SlowFile(tmp_path, latch, number)])
        for n in range(2 * MAX_PICTURES):
            n_loaded = min(n + MAX_PICTURES, 2 * MAX_PICTURES)
            await until(lambda n=n_loaded: latch.n_arrived >= 2 * n)  # type: ignore[misc]
            shutter.let()
    assert max(n_ahead) == MAX_PICTURES


async def _read(generation: Generation, errors: list[type[Exception]]) -> None:
    try:
        await generation.collect()
    except RunnerError as error:
        errors.append(type(error))


@pytest.mark.parametrize("n_images", [1, 3])
async def test_closing_the_engine_does_not_wait_for_images(toy: Toy, n_images: int) -> None:
    shutter = shuttered(toy)
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


async def test_closing_the_engine_cancels_an_encoding_first(toy: Toy) -> None:
    """It does so before it waits for helper threads."""
    shutter, tokenising = shuttered(toy), Latch()
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


async def test_a_request_that_waits_for_an_image_fails_when_the_engine_breaks(toy: Toy) -> None:
    shutter = shuttered(toy)
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


async def test_an_image_file_that_is_read_after_the_engine_closed(toy: Toy, tmp_path: Path) -> None:
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


async def test_an_image_file_that_is_read_while_the_engine_closes(toy: Toy, tmp_path: Path) -> None:
    """Its image is in the cache, but the model is about to be freed: only a helper thread still uses it."""
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


async def test_draining_waits_for_requests_whose_images_are_encoded(toy: Toy) -> None:
    shutter = shuttered(toy)
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


async def test_draining_ends_requests_whose_images_are_not_ready_in_time(toy: Toy) -> None:
    shutter = shuttered(toy)
    async with toy.engine() as engine, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(EngineClosed):
                await text_of(engine, [A])

        nursery.start_soon(ask)
        await shutter.reached()
        await engine.drain(0.01)
        shutter.open()
