"""Images for the default model: a projector that was trained for it, pictures as files, real sockets."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.hostile_images import hostile_images
from tests.real.conftest import Service, serving
from tests.real.pictures import picture
from tests.server.client import post
from trio_runner import ModelConfig

PROJECTOR: Final = Path(__file__).parent.parent / "data" / "mmproj-shapes.gguf"
BEFORE, AFTER = "<|im_start|>user\n", "\nDescribe the image.<|im_end|>\n<|im_start|>assistant\n"
PICTURES: Final = [("red", "circle", "white"), ("blue", "square", "yellow"), ("green", "triangle", "black")]


@pytest.fixture
async def service(default_model: Path) -> AsyncIterator[Service]:
    model = ModelConfig(path=str(default_model), projector=str(PROJECTOR))
    async with serving(model, slots=2, context_length=512) as service:
        yield service


def about(*images: bytes, **fields: Any) -> dict[str, Any]:
    """The fields of a request that asks what is in the images."""
    tags = "".join(f"[img-{index}]" for index in range(len(images)))
    data = [{"id": index, "data": base64.b64encode(image).decode()} for index, image in enumerate(images)]
    asked = {"prompt": BEFORE + tags + AFTER, "image_data": data, "n_predict": 12, "cache_prompt": True}
    return asked | {"temperature": 0, "repeat_penalty": 1} | fields


@pytest.mark.parametrize(("colour", "shape", "background"), PICTURES)
async def test_the_text_names_what_is_in_the_image(service: Service, colour: str, shape: str, background: str) -> None:
    image = picture(colour, shape, background)  # type: ignore[arg-type]  # one of its shapes
    said = await service.complete(**about(image))
    assert f"{colour} {shape} on a {background} background" in said
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "repeat_penalty": 1}
    engine = service.engine
    assert await engine.generate([BEFORE, image, AFTER], **greedy).collect() == said
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "\nDescribe the image."}]
    messages = [{"role": "user", "content": parts}]
    assert f"{colour} {shape}" in await engine.chat(messages, **greedy).collect()
    assert engine.statistics().images_encoded == 1


async def test_an_image_is_encoded_once_and_then_in_the_prompt_cache(service: Service) -> None:
    red, blue = picture("red", "circle", "white"), picture("blue", "square", "yellow")
    first = await service.complete(**about(red))
    other = await service.complete(**about(blue))
    assert first != other
    *_, last = await service.lines("/completion", **about(red))
    assert last["timings"]["cache_n"] == last["timings"]["prompt_n"] - 1
    [*_, fresh] = await service.lines("/completion", **about(red, cache_prompt=False))
    assert fresh["timings"]["cache_n"] == 0
    assert await service.complete(**about(red, cache_prompt=False)) == first
    [statistics] = (await service.server.ask(b"GET /statistics HTTP/1.1\r\nHost: localhost\r\n\r\n")).lines
    assert (statistics["images_encoded"], statistics["images_found"]) == (2, 3)


async def test_hostile_images_do_not_disturb_a_stream(service: Service) -> None:
    greedy = {"prompt": "Once upon a time", "n_predict": 60, "temperature": 0}
    alone = await service.complete(**greedy)
    hostile = list(hostile_images().items())
    assert len(hostile) >= 50
    texts: list[str] = []

    async def stream() -> None:
        texts.append(await service.complete(**greedy))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream)
        for name, image in hostile:
            answer = await service.server.ask(post("/completion", about(image)))
            assert 400 <= answer.status < 500, name
            assert b"image_data[0]" in answer.body, name
    assert texts == [alone]
    assert "red circle" in await service.complete(**about(picture("red", "circle", "white")))
    assert service.engine.statistics().busy == 0
