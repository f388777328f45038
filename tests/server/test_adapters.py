"""/adapters: what clients may load, choose and unload while others are served, and what they must not learn."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
import trio
import trio.testing

from tests.engine.toys import Gate, Latch, Toy, is_idle, prompts, until_idle
from tests.server.client import WAYS, Leave, Server, post, request, serving, until
from trio_runner.config import AdapterConfig
from trio_runner.engine.adapters import MAX_LOADED
from trio_runner.errors import LoadError
from trio_runner.testing import END, toy_cache_key, toy_continuation, toy_text, toy_vector

LIST = request("GET", "/adapters")


def completion(prompt: str, *adapters: dict[str, object], n_predict: int = 12) -> bytes:
    return post("/completion", {"prompt": prompt, "n_predict": n_predict, "adapters": adapters})


def delete(name: str) -> bytes:
    return request("DELETE", f"/adapters/{quote(name, safe='')}")


async def names(server: Server) -> list[str]:
    return [adapter["name"] for adapter in (await server.ask(LIST)).json["adapters"]]


async def test_the_life_of_an_adapter(toy: Toy, tmp_path: Path) -> None:
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        assert (await server.ask(LIST)).json == {"adapters": []}
        loaded = await server.ask(post("/adapters", {"file": "tale.gguf"}))
        assert (loaded.status, loaded.json) == (200, {"name": "tale", "file": "tale.gguf", "scale": 0})
        assert (await server.ask(LIST)).json == {"adapters": [loaded.json]}

        plain, told = toy_text("once", 12), toy_text("once", 12, toy_cache_key([(str(tmp_path / "tale.gguf"), 0.5)]))
        assert plain != told
        assert (await server.ask(post("/completion", {"prompt": "once", "n_predict": 12}))).text == plain
        assert (await server.ask(completion("once", {"name": "tale", "scale": 0.5}))).text == told
        assert (await server.ask(completion("once", {"name": "tale", "scale": 0}))).text == plain
        assert (await server.ask(completion("once"))).text == plain

        unloaded = await server.ask(delete("tale"))
        assert (unloaded.status, unloaded.json) == (200, loaded.json)
        assert (await server.ask(LIST)).json == {"adapters": []}
        refusal = await server.ask(completion("once", {"name": "tale"}))
        assert (refusal.status, b"adapters: there is no adapter 'tale'" in refusal.body) == (404, True)
        await until(lambda: toy.model.adapters[0].closed)
        assert (await server.ask(post("/adapters", {"file": "other.gguf", "name": "tale"}))).status == 200


async def test_the_scale_of_an_adapter_is_for_requests_that_choose_none(toy: Toy, tmp_path: Path) -> None:
    toy.adapters = (AdapterConfig("/srv/a.gguf", 0.5), AdapterConfig("/srv/b.gguf", 0.0))
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        loaded = await server.ask(post("/adapters", {"file": "x.gguf", "name": "c", "scale": -2}))
        assert loaded.json == {"name": "c", "file": "x.gguf", "scale": -2}
        assert [adapter["file"] for adapter in (await server.ask(LIST)).json["adapters"]] == [
            "a.gguf",
            "b.gguf",
            "x.gguf",
        ]
        both = toy_cache_key([("/srv/a.gguf", 0.5), (str(tmp_path / "x.gguf"), -2.0)])
        assert (await server.ask(post("/completion", {"prompt": "x", "n_predict": 12}))).text == toy_text("x", 12, both)
        assert (await server.ask(completion("x"))).text == toy_text("x", 12)
        only = toy_cache_key([("/srv/b.gguf", 1.0)])
        assert (await server.ask(completion("x", {"name": "b"}))).text == toy_text("x", 12, only)
        embedding = await server.ask(post("/embedding", {"content": "x"}))
        assert embedding.json["embedding"] == toy_vector([*b"x"], both).tolist()
        embedding = await server.ask(post("/embedding", {"content": ["x", "y"], "adapters": [{"name": "b"}]}))
        assert embedding.json["embeddings"] == [toy_vector([*text], only).tolist() for text in (b"x", b"y")]


async def test_without_a_directory_nothing_is_loaded_or_unloaded(toy: Toy) -> None:
    toy.adapters = (AdapterConfig("/srv/a.gguf", 0.5),)
    async with toy.engine() as engine, serving(engine) as server:
        for raw in (post("/adapters", {"file": "x" * 1_000_000}), post("/adapters", {}), delete("a"), delete("b")):
            refusal = await server.ask(raw)
            assert (refusal.status, b"--adapter-dir" in refusal.body) == (422, True)
            assert (await server.ask(LIST)).json == {"adapters": [{"name": "a", "file": "a.gguf", "scale": 0.5}]}
        assert len(toy.model.adapters) == 1


TRICKS = [
    *["../x", "/etc/passwd", "a/b", "a/../b", "./a", "a/", "/", "..", ".", ".hidden", "", "a\0b", "\0", "a\0.gguf"],
    *["..\\x", "C:\\x", "a\\b", "x" * 256, "é" * 128, "x" * 100_000, "~/x", "file:///etc/passwd"],
]
ODD = [
    "é.gguf",
    "a b",
    "-",
    "~x",
    "\u2215etc\u2215passwd",
    "\uff0e\uff0e\uff0fx",
    "a\nb",
    "%2e%2e%2fx",
    "x" * 255,
    "\u202e",
]
"""Odd, but names of files."""


async def test_no_file_outside_the_directory_is_loaded(toy: Toy, tmp_path: Path) -> None:
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        client = await server.connect()
        for file in TRICKS:
            refusal = await client.ask(post("/adapters", {"file": file}))
            assert refusal.status == 400, file
            assert refusal.body == b"file must be the name of a file in the directory of adapters\n"
        assert toy.model.adapters == []
        for number, file in enumerate(ODD):
            answer = await client.ask(post("/adapters", {"file": file, "name": f"odd{number}"}))
            assert (answer.status, answer.json["file"]) == (200, file)
        assert [Path(adapter.path) for adapter in toy.model.adapters] == [tmp_path / file for file in ODD]


async def test_links_in_the_directory_are_followed(toy: Toy, tmp_path: Path) -> None:
    """The operator who names the directory decides what is in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path / "a") as server:
        assert (await server.ask(post("/adapters", {"file": "link.gguf"}))).status == 200


async def test_a_file_that_is_no_adapter_is_named_without_its_directory(toy: Toy, tmp_path: Path) -> None:
    directory = tmp_path / "secret"

    def refuse(path: str) -> None:
        if "locked" in path:
            raise LoadError(f"cannot be read: [Errno 13] Permission denied: {path!r}", path=path)

    toy.on_adapter = refuse
    async with toy.engine() as engine, serving(engine, adapter_dir=directory) as server:
        for file in ("bad.gguf", "locked.gguf", "bad <é>"):
            refusal = await server.ask(post("/adapters", {"file": file, "name": "x"}))
            assert refusal.status == 422
            assert refusal.body.startswith(f"file: {file}: ".encode())
            assert b"secret" not in refusal.body
            assert await names(server) == []
        assert (await server.ask(post("/adapters", {"file": "good.gguf", "name": "x"}))).status == 200


async def test_names_of_adapters(toy: Toy, tmp_path: Path) -> None:
    toy.adapters = (AdapterConfig("/srv/a.gguf"),)
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        for name in ("a", "../x", "a/b", " ", "-x", ".x", "é", "a\0", "x" * 65, "x" * 1000):
            refusal = await server.ask(post("/adapters", {"file": "x.gguf", "name": name}))
            assert (refusal.status, b"name" in refusal.body) == (400, True), name
        refusal = await server.ask(post("/adapters", {"file": "a.gguf"}))
        assert (refusal.status, refusal.body) == (400, b"name: there is an adapter 'a' already\n")
        assert len(toy.model.adapters) == 1
        for name in ("b", "x" * 64, "0", "a.b-c_D"):
            assert (await server.ask(post("/adapters", {"file": "a.gguf", "name": name}))).json["name"] == name
        assert (await server.ask(post("/adapters", {"file": "c d.gguf", "name": ""}))).json["name"] == "c_d"
        assert await names(server) == ["a", "b", "x" * 64, "0", "a.b-c_D", "c_d"]


async def test_the_number_of_loaded_adapters_is_bounded(toy: Toy, tmp_path: Path) -> None:
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        client = await server.connect()
        for number in range(MAX_LOADED):
            assert (await client.ask(post("/adapters", {"file": f"{number}.gguf"}))).status == 200
        refusal = await client.ask(post("/adapters", {"file": "x.gguf"}))
        assert (refusal.status, b"64 adapters are loaded" in refusal.body) == (400, True)
        assert (await client.ask(delete("7"))).status == 200
        assert (await client.ask(post("/adapters", {"file": "x.gguf"}))).status == 200


UNKNOWN = ["b", "A", "", " ", "..", "../a", "a/", "\0", "é", "\u202e", "x" * 5000, "a%00"]


async def test_unknown_names_are_not_found(toy: Toy, tmp_path: Path) -> None:
    toy.adapters = (AdapterConfig("/srv/a.gguf"),)
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        client = await server.connect()
        for name in UNKNOWN:
            answer = await client.ask(delete(name))
            # A name with a slash makes another path, and so does an empty name.
            elsewhere = name == "" or "/" in name
            assert answer.status == 404, name
            assert answer.body == b"404 page not found\n" or (not elsewhere and answer.body.startswith(b"name: "))
            assert answer.body.count(b"\n") == 1
        for path, fields in (
            ("/completion", {"prompt": "x"}),
            ("/embedding", {"content": "x"}),
            ("/embedding", {"content": ["x", "y"]}),
        ):
            for name in ("b", "A", "", "é", "\0", "x" * 256):
                refusal = await client.ask(post(path, {**fields, "adapters": [{"name": "a"}, {"name": name}]}))
                assert (refusal.status, b"adapters: there is no adapter" in refusal.body) == (404, True), name
        assert await names(server) == ["a"]
        assert is_idle(engine)


async def test_unloading_an_adapter_takes_nothing_from_a_request_that_uses_it(toy: Toy, tmp_path: Path) -> None:
    gate = toy.on_decode = Gate(toy)
    cache_key = toy_cache_key([(str(tmp_path / "a.gguf"), 1.0)])
    prompt = next(each for each in prompts(50, 60) if END not in toy_continuation([*each.encode()], 60, cache_key))
    async with toy.engine(slots=2) as engine, serving(engine, adapter_dir=tmp_path) as server:
        assert (await server.ask(post("/adapters", {"file": "a.gguf"}))).status == 200
        client = await server.connect()
        await client.stream.send_all(completion(prompt, {"name": "a"}, n_predict=60))
        gate.let(3)
        await gate.reached(4)
        assert (await server.ask(delete("a"))).status == 200
        assert (await server.ask(delete("a"))).status == 404
        assert (await server.ask(completion("x", {"name": "a"}))).status == 404
        # The same name may now mean another adapter.
        assert (await server.ask(post("/adapters", {"file": "b.gguf", "name": "a"}))).status == 200
        assert not toy.model.adapters[0].closed
        gate.open()
        assert (await client.answer()).text == toy_text(prompt, 60, cache_key)
        await until(lambda: toy.model.adapters[0].closed)
        assert not toy.model.adapters[1].closed
        other = toy_cache_key([(str(tmp_path / "b.gguf"), 1.0)])
        assert (await server.ask(completion(prompt, {"name": "a"}))).text == toy_text(prompt, 12, other)


@pytest.mark.parametrize("leave", WAYS)
async def test_a_client_that_disconnects_while_its_adapter_loads(toy: Toy, tmp_path: Path, leave: Leave) -> None:
    """The adapter does not stay, and its name is free. Nobody else waits while it loads."""
    latch = Latch()
    toy.on_adapter = latch
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        client = await server.connect()
        await client.stream.send_all(post("/adapters", {"file": "a.gguf"}))
        await latch.reached()
        refusal = await server.ask(post("/adapters", {"file": "other.gguf", "name": "a"}))
        assert (refusal.status, b"name" in refusal.body) == (400, True)
        assert (await server.ask(completion("x"))).text == toy_text("x", 12)
        await leave(client)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= n_tasks)
        latch.open()
        answer = await server.ask(post("/adapters", {"file": "a.gguf"}))
        assert answer.status == 200
        assert await names(server) == ["a"]
        await until(lambda: sorted(adapter.closed for adapter in toy.model.adapters) == [False, True])


async def test_many_clients_load_use_and_unload_at_once(toy: Toy, tmp_path: Path) -> None:
    """In any order: each request gets the adapter that it asked for, or learns that there is none."""
    async with toy.engine(slots=2) as engine, serving(engine, adapter_dir=tmp_path, deadline=30) as server:
        n_told = 0

        async def load_and_unload(name: str) -> None:
            for number in range(10):
                answer = await server.ask(post("/adapters", {"file": f"{name}.gguf"}))
                assert answer.status == 200, number
                await trio.lowlevel.checkpoint()
                assert (await server.ask(delete(name))).status == 200

        async def tell(number: int) -> None:
            nonlocal n_told
            for turn in range(15):
                name = "ab"[(number + turn) % 2]
                answer = await server.ask(completion(f"{number}, {turn}", {"name": name, "scale": 2}))
                if answer.status == 200:
                    cache_key = toy_cache_key([(str(tmp_path / f"{name}.gguf"), 2.0)])
                    assert answer.text == toy_text(f"{number}, {turn}", 12, cache_key)
                    n_told += 1
                else:
                    assert answer.status == 404

        async with trio.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(load_and_unload, name)
            for number in range(4):
                nursery.start_soon(tell, number)
        assert n_told > 0
        await until_idle(engine)
        assert await names(server) == []
        await until(lambda: all(adapter.closed for adapter in toy.model.adapters))


async def test_a_model_that_does_not_load_is_not_blamed_on_an_adapter(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise LoadError("not a GGUF file", path="model.gguf")

    toy = Toy()
    toy.on_load = fail
    async with toy.engine(wait=False) as engine, serving(engine, adapter_dir=tmp_path) as server:
        for raw in (LIST, post("/adapters", {"file": "a.gguf"}), delete("a")):
            answer = await server.ask(raw)
            assert (answer.status, answer.body) == (503, b"model.gguf: not a GGUF file\n")


async def test_adapters_need_the_api_key(toy: Toy, tmp_path: Path) -> None:
    async with toy.engine() as engine, serving(engine, adapter_dir=tmp_path, api_key="s3cret") as server:
        for raw in (LIST, post("/adapters", {"file": "a.gguf"}), delete("a")):
            assert (await server.ask(raw)).status == 401
        key = "Authorization: Bearer s3cret"
        assert (await server.ask(post("/adapters", {"file": "a.gguf"}, key))).status == 200
        assert json.loads((await server.ask(request("GET", "/adapters", b"", key))).body)["adapters"] != []
        assert (await server.ask(request("DELETE", "/adapters/a", b"", key))).status == 200
