"""Images over HTTP, and bytes that are no images."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from tests.engine.toys import Gate, Projector, Shutter, Toy, is_idle, items_of, picture, prompts, until_idle
from tests.hostile_images import good_images, hostile_images
from tests.server.client import WAYS, Leave, Server, image, post, request, serving, until
from trio_runner.cli.service import max_body_bytes
from trio_runner.config import ModelConfig
from trio_runner.image_source import ImageSource
from trio_runner.testing import toy_text

A, B = picture(0), picture(1)
HEALTH = request("GET", "/health")


def seeing(toy: Toy) -> Projector:
    toy.projector = Projector()
    return toy.projector


def shut(toy: Toy) -> Shutter:
    seeing(toy).on_encode = shutter = Shutter()
    return shutter


def asking(prompt: str, *images: dict[str, object], n_predict: int = 12, **fields: object) -> bytes:
    return post("/completion", {"prompt": prompt, "n_predict": n_predict, "image_data": images, **fields})


def seen(toy: Toy, parts: Sequence[str | ImageSource], n_tokens: int = 12) -> str:
    assert toy.projector is not None
    return toy_text(items_of(toy.projector, parts), n_tokens)


@pytest.mark.parametrize(
    ("prompt", "images", "parts"),
    [
        ("[img-0]", [image(A)], [A]),
        ("[img-7] what is this?", [image(A, 7)], [A, " what is this?"]),
        ("see [img-1] and [img-0] and [img-1]", [image(A), image(B, 1)], ["see ", B, " and ", A, " and ", B]),
        ("[img-3][img-2147483647]", [image(A, 2**31 - 1), image(B, 3)], [B, A]),
        ("[img-0]: [img-1], [img-]", [image(A), image(A, 1)], [A, ": ", A, ", [img-]"]),
        ("the first [img-5] counts", [image(A, 5), image(B, 5)], ["the first ", A, " counts"]),
        ("nothing to be seen", [], ["nothing to be seen"]),
        ("images that no [img-7] names", [image(A, 7), image(B)], ["images that no ", A, " names"]),
        ("nor any of [img-]", [image(B), image(b"not an image", 3)], ["nor any of [img-]"]),
    ],
)
async def test_images_stand_where_the_text_names_them(
    toy: Toy, prompt: str, images: list[dict[str, object]], parts: Sequence[str | ImageSource]
) -> None:
    seeing(toy)
    async with toy.engine() as engine, serving(engine) as server:
        said = (await server.ask(asking(prompt, *images))).text
        assert said == seen(toy, parts)
        assert (said == toy_text(prompt, 12)) == (list(parts) == [prompt])


async def test_every_format_that_is_accepted(toy: Toy) -> None:
    seeing(toy)
    async with toy.engine() as engine, serving(engine) as server:
        texts = {}
        for name, data in good_images().items():
            texts[name] = (await server.ask(asking("look: [img-0]", image(data), n_predict=20))).text
            assert texts[name] == seen(toy, ["look: ", data], 20), name
        assert len({*texts.values()}) > len(texts) // 2


async def test_an_image_is_encoded_once_for_all_clients(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine, serving(engine) as server:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(server.ask, asking(f"{number}: [img-0]", image(A)))
        assert len(projector.encoded) == 1
        statistics = (await server.ask(request("GET", "/statistics"))).json
        assert (statistics["images_encoded"], statistics["images_found"]) == (1, 3)
        assert statistics["image_bytes"] > 0


@pytest.mark.parametrize(
    ("prompt", "images", "status", "name"),
    [
        ("[img-1]", [image(A)], 400, "prompt names [img-1]"),
        ("[img-4294967296]", [image(A)], 400, "prompt names [img-4294967296]"),
        ("[img-0]", [], 400, "prompt names [img-0]"),
        ("[img-0]" * 17, [image(A)], 400, "image_data has 17 images"),
        ("[img-1][img-0]", [image(b"text"), image(A, 1)], 400, "image_data[0] is of an unknown format"),
        ("[img-1][img-0]", [image(A), image(A[:-1], 1)], 400, "image_data[1] is cut short"),
    ],
)
async def test_what_is_wrong_with_images_is_named(
    toy: Toy, prompt: str, images: list[dict[str, object]], status: int, name: str
) -> None:
    seeing(toy)
    async with toy.engine() as engine, serving(engine) as server:
        refusal = await server.ask(asking(prompt, *images))
        assert refusal.status == status
        assert refusal.body.startswith(b"Failed to create new sequence: ")
        assert name in refusal.body.decode()
        assert refusal.body.count(b"\n") == 1


async def test_images_need_a_projector() -> None:
    toy = Toy()
    async with toy.engine() as engine, serving(engine) as server:
        refusal = await server.ask(asking("[img-0]", image(A)))
        assert (refusal.status, b"image_data has images, which need a model with a projector" in refusal.body) == (
            422,
            1,
        )
        assert (await server.ask(asking("[img-0]"))).text == toy_text("[img-0]", 12)


async def test_no_image_disturbs_a_stream_beside_it(toy: Toy) -> None:
    """Each is refused by name, while a stream goes on."""
    gate = toy.on_decode = Gate(toy)
    seeing(toy)
    (prompt,) = prompts(1, 300)
    async with toy.engine(slots=2) as engine, serving(engine, deadline=60) as server:
        bystander, client = await server.connect(), await server.connect()
        await bystander.stream.send_all(post("/completion", {"prompt": prompt, "n_predict": 300}))
        for n_sampled, (name, data) in enumerate(hostile_images().items(), 1):
            gate.let()
            refusal = await client.ask(asking("[img-0]", image(data)))
            assert 400 <= refusal.status < 500, name
            assert b"image_data[0]" in refusal.body, name
            assert len(refusal.body) < 500, name
            while engine.statistics().scheduler.n_sampled < n_sampled:  # noqa: ASYNC110
                await trio.sleep(0.001)
        gate.open()
        assert (await bystander.answer()).text == toy_text(prompt, 300)
        await until_idle(engine)
        assert toy.projector is not None
        assert toy.projector.encoded == []
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(sees, toy, server, number)


async def sees(toy: Toy, server: Server, number: int) -> None:
    data = picture(number)
    assert (await server.ask(asking(f"{number}: [img-0]", image(data)))).text == seen(toy, [f"{number}: ", data])


@pytest.mark.parametrize("leave", WAYS)
async def test_the_image_of_a_client_that_disconnects_is_not_encoded(toy: Toy, leave: Leave) -> None:
    """And nobody else waits for it."""
    shutter = shut(toy)
    async with toy.engine() as engine, serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking("[img-0]", image(A)))
        await shutter.reached()
        for _ in range(3):
            with trio.fail_after(1):
                assert (await server.ask(HEALTH)).json["status"] == "ok"
            assert (await server.ask(asking("text"))).text == toy_text("text", 12)
        assert not shutter.encodings[0].cancelled.is_set()
        await leave(client)
        await until(shutter.encodings[0].cancelled.is_set)
        shutter.open()
        await sees(toy, server, 0)
        await until_idle(engine)


async def test_a_client_that_disconnects_takes_no_image_from_another(toy: Toy) -> None:
    shutter = shut(toy)
    async with toy.engine() as engine, serving(engine) as server:
        client, other = await server.connect(), await server.connect()
        for each in (client, other):
            await each.stream.send_all(asking("[img-0]", image(A)))
        await shutter.reached()
        await until(lambda: engine.statistics().images_found == 1)
        client.reset()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not shutter.encodings[0].cancelled.is_set()
        shutter.open()
        assert (await other.answer()).text == seen(toy, [A])
        assert len(shutter.encodings) == 1


async def test_clients_that_disconnect_while_they_wait_for_an_encoder(toy: Toy) -> None:
    """They leave the queue from its middle."""
    shutter = shut(toy)
    async with toy.engine() as engine, serving(engine) as server:
        clients = [await server.connect() for _ in range(4)]
        for number, client in enumerate(clients):
            await client.stream.send_all(asking("[img-0]", image(picture(number))))
            if number == 0:
                await shutter.reached()
        await trio.testing.wait_all_tasks_blocked(0.01)
        for client in clients[1:]:
            client.reset()
        await trio.testing.wait_all_tasks_blocked(0.01)
        shutter.open()
        assert (await clients[0].answer()).text == seen(toy, [picture(0)])
        await until_idle(engine)
        assert engine.statistics().images_encoded == 1
        assert all(encoding.cancelled.is_set() for encoding in shutter.encodings[1:])


async def test_shutting_down_does_not_wait_for_an_image(toy: Toy) -> None:
    shutter = shut(toy)
    async with toy.engine() as engine, serving(engine, drain_timeout=0.1) as server:
        client = await server.connect()
        await client.stream.send_all(asking("[img-0]", image(A)))
        await shutter.reached()
        server.shutdown.set()
        with trio.fail_after(3):
            await server.stopped.wait()
        await until(shutter.encodings[0].cancelled.is_set)


async def test_images_are_in_the_prompt_cache(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine, serving(engine) as server:
        first = await server.ask(asking("[img-0] what?", image(A), cache_prompt=True))
        again = await server.ask(asking("[img-9] what?", image(A, 9), cache_prompt=True))
        other = await server.ask(asking("[img-0] what?", image(B), cache_prompt=True))
        n_items = len(items_of(projector, [A, " what?"]))
        assert [answer.lines[-1]["timings"]["cache_n"] for answer in (first, again)] == [0, n_items - 1]
        assert other.lines[-1]["timings"]["cache_n"] <= 1
        assert first.text == again.text == seen(toy, [A, " what?"])
        assert other.text == seen(toy, [B, " what?"])


@pytest.mark.parametrize("projector", [None, "mmproj.gguf"])
async def test_a_request_may_be_larger_if_the_model_takes_images(toy: Toy, projector: str | None) -> None:
    seeing(toy)
    limit = max_body_bytes(ModelConfig(path="m", projector=projector))
    assert limit == (8 << 20 if projector is None else 64 << 20)
    bmp = b"BM" + random.Random(0).randbytes(9_000_000)
    async with toy.engine() as engine, serving(engine, max_body_bytes=limit) as server:
        answer = await server.ask(asking("[img-0]", image(bmp)))
        assert answer.status == (413 if projector is None else 400)
        assert (b"image_data[0]" in answer.body) == (projector is not None)
        too_large = b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n{" % (limit + 1)
        answer = await server.ask(too_large)
        assert (answer.status, answer.body) == (413, b"the body is larger than %d bytes\n" % limit)
        await sees(toy, server, 0)
        assert is_idle(engine)
