"""Images and prompts with images that are refused, or that the projector fails on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.engine.seeing import (
    A,
    B,
    said,
    seeing,
    text_of,
)
from tests.engine.toys import (
    Gate,
    Shutter,
    Toy,
    prompts,
    until,
    until_idle,
)
from tests.hostile_images import good_images, hostile_images
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import (
    InvalidImage,
    InvalidRequest,
    NativeError,
    PromptTooLong,
    RequestError,
    RunnerError,
    Unsupported,
)
from trio_runner.request import MAX_IMAGES
from trio_runner.testing import ToyEncoding, toy_text

FAILURES: dict[str, tuple[Exception, type[RunnerError]]] = {
    "refused": (InvalidImage("too small"), InvalidImage),
    "failed": (NativeError("encode", 3, "out of memory"), NativeError),
    "memory": (MemoryError(), RunnerError),
    "bug": (ValueError("a bug"), RunnerError),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_encoding_that_fails_fails_all_requests_that_wait_for_it(toy: Toy, failure: str) -> None:
    """Nothing of it is kept: the next request tries again."""
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
async def test_without_a_projector_images_are_refused_unread(toy: Toy, wrong: str) -> None:
    await _refused(toy, *WITHOUT_A_PROJECTOR[wrong])


async def test_all_hostile_files_are_refused(toy: Toy) -> None:
    """They come at the same time as good files, which are encoded."""
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
