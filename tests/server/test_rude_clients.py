"""Polite and rude clients at once: the polite get the right answers, and the rude leave nothing behind."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import trio

from tests.engine.toys import Projector, Toy, items_of, picture, until_idle
from tests.hostile_images import good_images, hostile_images
from tests.server.client import WAYS, Client, Server, image, post, request, serving, until
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch
from trio_runner.testing import ToyEncoding, toy_cache_key, toy_text, toy_vector

Rude: TypeAlias = Callable[[Server, random.Random], Awaitable[None]]

HOSTILE = [data for data in hostile_images().values() if 0 < len(data) < 100_000]
GOOD = list(good_images().values())
CACHE_KEY = toy_cache_key([("/srv/always.gguf", 0.5)])
"""The cache key of requests that choose no adapters."""


def asking(data: bytes, n_predict: int = 12) -> bytes:
    fields = {"prompt": "see [img-0]", "n_predict": n_predict, "image_data": [image(data)]}
    return post("/completion", fields)


async def leave_at_any_time(server: Server, chance: random.Random, raw: bytes) -> None:
    client = await server.connect()
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await client.stream.send_all(raw)
        await trio.sleep(chance.choice([0, 0.001, 0.01, 0.03]) * chance.random())
        await chance.choice(WAYS)(client)


async def leave_an_image(server: Server, chance: random.Random) -> None:
    await leave_at_any_time(server, chance, asking(chance.choice([*GOOD, picture(chance.randrange(30))]), 500))


async def leave_half_an_image(server: Server, chance: random.Random) -> None:
    raw = asking(chance.choice(GOOD))
    await leave_at_any_time(server, chance, raw[: chance.randrange(len(raw))])


async def leave_a_list(server: Server, chance: random.Random) -> None:
    texts = [f"text {number}" for number in range(chance.randrange(1, 60))]
    await leave_at_any_time(server, chance, post("/embedding", {"content": texts}))


async def leave_a_load(server: Server, chance: random.Random) -> None:
    await leave_at_any_time(server, chance, post("/adapters", {"file": f"{chance.randrange(9)}.gguf"}))


async def send_no_image(server: Server, chance: random.Random) -> None:
    refusal = await server.ask(asking(chance.choice(HOSTILE)))
    assert (refusal.status, b"image_data[0]" in refusal.body) == (400, True)


async def ask_for_what_is_not_there(server: Server, chance: random.Random) -> None:
    fields = {"prompt": "x", "adapters": [{"name": f"none{chance.randrange(9)}"}]}
    assert (await server.ask(post("/completion", fields))).status == 404
    assert (await server.ask(post("/rerank", {"query": "x", "documents": ["y"]}))).status == 422
    assert (await server.ask(post("/embedding", {"content": ["x"], "dimensions": 99}))).status == 400
    assert (await server.ask(post("/adapters", {"file": "../../etc/passwd"}))).status == 400


async def load_choose_unload(server: Server, chance: random.Random) -> None:
    name = f"a{chance.randrange(3)}"
    assert (await server.ask(post("/adapters", {"file": "a.gguf", "name": name, "scale": 0}))).status in (200, 400)
    fields = {"prompt": "x", "n_predict": 200, "adapters": [{"name": name}]}
    await leave_at_any_time(server, chance, post("/completion", fields))
    assert (await server.ask(request("DELETE", f"/adapters/{name}"))).status in (200, 404)


async def send_rubbish(server: Server, chance: random.Random) -> None:
    await leave_at_any_time(server, chance, request("POST", "/completion", chance.randbytes(500)))


RUDE: list[Rude] = [
    *[leave_an_image, leave_half_an_image, leave_a_list, leave_a_load, send_no_image],
    *[ask_for_what_is_not_there, load_choose_unload, send_rubbish],
]


@pytest.mark.parametrize("seed", range(3))
async def test_rude_clients_disturb_no_polite_ones(toy: Toy, tmp_path: Path, seed: int) -> None:
    def decode_slowly(batch: Batch) -> None:
        time.sleep(0.001)

    def encode_slowly(encoding: ToyEncoding) -> None:
        encoding.cancelled.wait(0.003)

    toy.projector = Projector()
    toy.projector.on_encode, toy.on_decode = encode_slowly, decode_slowly
    toy.adapters = (AdapterConfig("/srv/always.gguf", 0.5),)
    options = {"slots": 2, "max_queue": None, "image_cache_bytes": 2000}
    async with toy.engine(**options) as engine, serving(engine, adapter_dir=tmp_path, deadline=60) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living

        async def be_rude(number: int) -> None:
            chance = random.Random(f"{seed}, {number}")
            for _ in range(12):
                await chance.choice(RUDE)(server, chance)

        async def be_polite(number: int) -> None:
            client = await server.connect()
            for turn in range(8):
                data = picture(10 * number + turn % 3)
                items = items_of(toy.projector or Projector(), ["see ", data])
                assert (await client.ask(asking(data, 30))).text == toy_text(items, 30, CACHE_KEY)
                await embed(client, [f"{number}, {turn}", "x" * turn + "y"])
            await client.stream.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(be_rude, number)
            for number in range(3):
                nursery.start_soon(be_polite, number)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= n_tasks)
        await until_idle(engine)
        for adapter in engine.adapters:
            assert (await server.ask(request("DELETE", f"/adapters/{adapter.name}"))).status == 200
        await until(lambda: all(adapter.closed for adapter in toy.model.adapters))
        for number in range(3):  # no name is still taken by an adapter that never came
            raw = post("/adapters", {"file": "a.gguf", "name": f"a{number}"})
            assert (await server.ask(raw)).status == 200


async def embed(client: Client, texts: list[str]) -> None:
    answer = await client.ask(post("/embedding", {"content": texts}))
    assert answer.json == {"embeddings": [toy_vector([*text.encode()], CACHE_KEY).tolist() for text in texts]}
