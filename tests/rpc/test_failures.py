"""rpc-servers that vanish, hang or send wrong answers: every client gets an error, and our process survives."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import trio

from tests.cli.programs import ROOT
from tests.engine.toys import until
from tests.rpc.meddler import Meddle, Meddler, framed
from tests.rpc.servers import RpcServer
from tests.server.client import Server, post, request, serving
from trio_runner.config import ModelConfig
from trio_runner.engine import lifecycle
from trio_runner.engine.engine import Engine
from trio_runner.errors import EngineBroken, EngineClosed, LoadError
from trio_runner.front_door import open_engine

Models: TypeAlias = Callable[[str], Path]
Servers: TypeAlias = tuple[RpcServer, RpcServer]

DEADLINE = 60.0
ENDLESS: Final = {"prompt": "hello world", "temperature": 0}


@asynccontextmanager
async def surviving(path: Path, *servers: RpcServer) -> AsyncIterator[Engine]:
    """An engine on the servers. The block continues when the engine has broken."""
    endpoints = tuple(server.endpoint for server in servers)
    config = ModelConfig(path=str(path), rpc=endpoints, tensor_split=(1,) * len(servers))
    settings: dict[str, Any] = {"threads": 1, "slots": 2, "context_length": 256, "batch_size": 64, "kv_type": "f32"}
    with trio.fail_after(DEADLINE):
        async with open_engine(config, **settings, cancel_when_broken=False) as engine:
            yield engine


async def text(engine: Engine) -> str:
    return await engine.generate("hello world", temperature=0, max_tokens=20).collect()


async def assert_broken(server: Server, reason: str) -> None:
    """Every later request to `server` fails for this reason."""
    health = await server.ask(request("GET", "/health"))
    assert (health.status, health.json["status"]) == (503, "server error")
    assert reason in health.json["error"]
    later = await server.ask(post("/completion", ENDLESS))
    assert later.status == 503
    assert reason in later.body.decode()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["while it streams", "while idle"])
async def test_a_server_is_killed(models: Models, doomed: Servers, victim: int, when: str) -> None:
    """Running, waiting and new requests fail. Another engine in the same process works when the server is back."""
    reason = f"the rpc-server {doomed[victim].endpoint} is gone"
    async with surviving(models("swa"), *doomed) as engine, serving(engine, deadline=DEADLINE) as server:
        expected = await text(engine)
        if when == "while idle":
            doomed[victim].kill()
            *_, last = (await server.ask(post("/completion", ENDLESS))).lines
            assert reason in last["error"]
        else:
            clients = [await server.connect() for _ in range(3)]
            for client in clients:
                await client.stream.send_all(post("/completion", ENDLESS))
                await client.head()
            for client in clients[:2]:
                assert await client.chunk()
            doomed[victim].kill()
            for client in clients:
                *_, line = (await client.chunks()).splitlines()
                assert reason in json.loads(line)["error"]
        await assert_broken(server, reason)
        with pytest.raises(LoadError, match="is gone"):
            async with surviving(models("swa"), *doomed):
                pass
        doomed[victim].start()
        async with surviving(models("swa"), *doomed) as other:
            assert await text(other) == expected
        await assert_broken(server, reason)


async def test_a_server_is_killed_while_the_model_is_loaded(models: Models, doomed: Servers) -> None:
    """The CPU has room for the layers, but does not take them."""

    def die(answer: bytes, number: int) -> bytes | None:
        if number < 40:
            return answer
        doomed[0].kill()
        return None

    meddler = Meddler(doomed[0].port, "set_tensor", die)
    try:
        with trio.fail_after(DEADLINE), pytest.raises(LoadError, match=f"the rpc-server {meddler.endpoint} is gone"):
            async with open_engine(ModelConfig(path=str(models("swa")), rpc=(meddler.endpoint,)), threads=1):
                pass
    finally:
        meddler.close()


@pytest.mark.parametrize("victim", [0, 1])
async def test_an_engine_closes_after_its_server_has_died(models: Models, doomed: Servers, victim: int) -> None:
    async with surviving(models("swa"), *doomed) as engine:
        expected = await text(engine)
        doomed[victim].kill()
    assert engine.status == "closed"
    doomed[victim].start()
    async with surviving(models("swa"), *doomed) as engine:
        assert await text(engine) == expected


async def test_loading_an_adapter_fails_if_a_server_is_gone(models: Models, doomed: Servers) -> None:
    async with surviving(models("llama"), *doomed) as engine:
        await text(engine)
        doomed[0].kill()
        with pytest.raises(LoadError, match=f"the rpc-server {doomed[0].endpoint} is gone"):
            await engine.load_adapter(models("lora"))
        with pytest.raises(EngineBroken):
            await text(engine)


async def test_a_server_that_hangs_can_be_left(
    models: Models, doomed: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients can still disconnect, and the engine can still be closed."""
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 0.1)
    async with surviving(models("swa"), *doomed) as engine, serving(engine, deadline=DEADLINE) as server:
        client, other = await server.connect(), await server.connect()
        for each in (client, other):
            await each.stream.send_all(post("/completion", ENDLESS))
            await each.head()
            assert await each.chunk()
        doomed[1].hang()
        await client.stream.aclose()
        await until(lambda: engine.statistics().generations == 1)
        with trio.move_on_after(0.05) as scope:
            await text(engine)
        assert scope.cancelled_caught
        assert engine.statistics().generations == 1
        assert (await server.ask(request("GET", "/health"))).status == 200
    assert engine.status == "closed"
    assert "the decode thread does not stop" in caplog.text
    with pytest.raises(EngineClosed):
        await text(engine)


# ---- answers that are wrong ------------------------------------------------------------------------------------------

ATTEMPT = """
import json, logging, sys
import trio
from trio_runner.config import ModelConfig
from trio_runner.front_door import open_engine

logging.disable()

async def attempt(rpc, gpu_layers):
    model = ModelConfig(path=sys.argv[1], rpc=(rpc,), gpu_layers=gpu_layers)
    try:
        with trio.fail_after(20):
            async with open_engine(
                model, threads=1, slots=1, context_length=256, batch_size=64, cancel_when_broken=False
            ) as engine:
                return await engine.generate("hello world", temperature=0, max_tokens=20).collect()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for rpc in sys.stdin:
    print(json.dumps([trio.run(attempt, rpc.strip(), gpu_layers) for gpu_layers in (-1, "auto")]), flush=True)
"""


def always(answer: bytes) -> Meddle:
    return lambda _, __: answer


def hang_up(number: int) -> Meddle:
    """Close the connection instead of the answer with this number. A second attempt has no answer of that number."""
    return lambda answer, n: None if n == number else answer


WRONG: Final[dict[str, tuple[str, Meddle, str]]] = {
    "nothing": ("hello", lambda answer, _: answer, ""),
    "another version": (
        "hello",
        lambda answer, _: answer[:8] + b"c" + answer[9:],
        r"speaks version 99\.\d+ of the protocol, not",
    ),
    "a newer version": (
        "hello",
        lambda answer, _: answer[:9] + b"c" + answer[10:],
        r"speaks version \d+\.99 of the protocol, not",
    ),
    "a short greeting": ("hello", always(framed(1)), "gave no valid answer: is it an rpc-server of this version"),
    "a greeting without end": (
        "hello",
        always(struct.pack("<Q", 2**63)),
        "gave no valid answer: is it an rpc-server of this version",
    ),
    "no devices": ("device_count", always(struct.pack("<QI", 4, 0)), "has 0 devices"),
    "a billion devices": ("device_count", always(struct.pack("<QI", 4, 10**9)), "has 1000000000 devices"),
    "a device too many": ("device_count", always(struct.pack("<QI", 4, 2)), "is gone"),
    "no memory at all": ("get_device_memory", always(framed(0, 2**33)), "no memory is free on RPC"),
    "more than all memory": ("get_device_memory", always(framed(2**64 - 1, 5)), ""),
    "an alignment of 0": ("get_alignment", always(framed(0)), "aligns to 0"),
    "an odd alignment": ("get_alignment", always(framed(3)), "aligns to 3"),
    "a huge alignment": ("get_alignment", always(framed(2**63)), "unable to allocate"),
    "no buffer": ("alloc_buffer", always(framed(0, 0)), "unable to allocate"),
    "a small buffer": ("alloc_buffer", lambda answer, _: answer[:16] + framed(10)[8:], "unable to allocate"),
    "a buffer at 0": ("buffer_get_base", always(framed(0)), "cannot be NULL"),
    "a buffer at the end": ("buffer_get_base", always(framed(2**64 - 1)), "ASSERT"),
    "a huge tensor": ("get_alloc_size", always(framed(2**62)), "failed to allocate"),
    "a short tensor": ("get_tensor", always(framed(1)), "is gone"),
    "no numbers": ("get_tensor", lambda answer, _: answer[:8] + b"\xff" * (len(answer) - 8), "are not numbers"),
    "gone with the greeting": ("hello", hang_up(0), "gave no valid answer: is it an rpc-server of this version"),
    "gone before its memory": ("get_device_memory", hang_up(1), "is gone"),
    "gone before its buffer": ("alloc_buffer", hang_up(0), "is gone"),
    "gone amid the weights": ("set_tensor", hang_up(40), "is gone"),
    "gone before the cache": ("alloc_buffer", hang_up(1), "is gone"),
    "gone before a graph": ("graph_compute", hang_up(0), "is gone"),
    "gone amid a text": ("get_tensor", hang_up(8), "is gone"),
    "gone amid what is freed": ("free_buffer", hang_up(1), ""),
}
"""The command whose answers are wrong, and the error; "" if they do no harm."""


def test_wrong_answers_do_not_end_the_process(models: Models, rpc_program: Path) -> None:
    """Wrong answers are an error, unless the layers may go elsewhere. One process tries all of them and survives."""
    server = RpcServer(rpc_program)
    command = [sys.executable, "-c", ATTEMPT, str(models("swa"))]
    seen: dict[str, list[str]] = {}
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        too_late = threading.Timer(DEADLINE, process.kill)
        too_late.start()
        try:
            for name, (answered, meddle, _) in WRONG.items():
                meddler = Meddler(server.port, answered, meddle)
                process.stdin.write(meddler.endpoint + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                meddler.close()
                assert line, f"the process ended with {process.wait()} of {name}"
                seen[name] = json.loads(line)
            process.stdin.close()
            assert process.wait() == 0
        finally:
            process.kill()
            too_late.cancel()
            server.kill()
    right, also_right = seen["nothing"]
    assert right == also_right
    for name, (_, _, words) in WRONG.items():
        on_server, anywhere = seen[name]
        assert re.search(words, on_server) if words else on_server == right, name
        assert anywhere in (right, on_server), name
