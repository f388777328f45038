"""The whole program with rpc-servers, and its errors for endpoints that are not rpc-servers."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import trio

from tests.cli.programs import ROOT, Program, exchange, program, read_all, request
from tests.rpc.servers import RpcServer, free_port
from trio_runner.cli.main import main
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.errors import LoadError
from trio_runner.llama import backends
from trio_runner.llama.library import LIBRARY_DIRECTORY
from trio_runner.llama.loader import LlamaLoader

Models: TypeAlias = Callable[[str], Path]
Servers: TypeAlias = tuple[RpcServer, RpcServer]

ENDLESS: Final = {"prompt": "hello world", "temperature": 0}
SHORT: Final = {**ENDLESS, "n_predict": 24, "cache_prompt": True}
IMPATIENT: Final = {"TRIO_RUNNER_RPC_SECONDS": "2"}


def serve(model: Path, *servers: RpcServer) -> list[str]:
    endpoints = ",".join(server.endpoint for server in servers)
    options = ["--rpc", endpoints, "--tensor-split", "1,1"] if servers else []
    return ["serve", "-m", str(model), "--port", "0", "--threads", "1", "--drain-timeout", "0", *options]


async def loaded(runner: Program) -> int:
    port = await runner.listening()
    await runner.logged("model loaded")
    return port


def lines(response: str) -> list[Any]:
    return [json.loads(line) for line in re.findall(r"^\{.*\}$", response, re.MULTILINE)]


async def ended(runner: Program) -> None:
    """Send SIGTERM. The program must end as it should."""
    runner.terminate()
    assert await runner.ended() == 0
    assert "Traceback" not in runner.log


async def test_the_program_serves_until_a_server_is_gone(models: Models, doomed: Servers) -> None:
    """From the first text to the errors after one of the servers is gone."""
    answers = []
    async with program(*serve(models("swa")), toy=False) as runner:
        answers.append(lines(await exchange(await loaded(runner), "/completion", SHORT)))
    async with program(*serve(models("swa"), *doomed), toy=False) as runner:
        port = await loaded(runner)
        answers.append(lines(await exchange(port, "/completion", SHORT)))
        [props] = lines(await exchange(port, "/props"))
        placement = props["placement"]
        assert (placement["device_layers"], placement["layers"]) == (7, 7)
        for device, server in zip(placement["devices"], doomed, strict=True):
            assert (device["description"], device["backend"]) == (server.endpoint, "RPC")
            assert all(n_bytes > 100_000 for n_bytes in device["memory_used"].values())

        stream = await request(port, "/completion", ENDLESS)
        assert await stream.receive_some()
        # Stopping and continuing a process interrupts its system calls.
        runner.process.send_signal(signal.SIGSTOP)
        runner.process.send_signal(signal.SIGCONT)
        assert '"status":"ok"' in await exchange(port, "/health")
        assert lines(await exchange(port, "/completion", SHORT))[-1]["stopped_limit"]

        doomed[1].kill()
        reason = f"the rpc-server {doomed[1].endpoint} is gone"
        assert reason in lines(await read_all(stream))[-1]["error"]
        health = await exchange(port, "/health")
        assert "HTTP/1.1 503" in health
        assert reason in lines(health)[0]["error"]
        assert "HTTP/1.1 503" in await exchange(port, "/completion", SHORT)
        await ended(runner)
        assert f"the decode thread died: trio_step failed with -2: {reason}" in runner.log
    texts = [[line["content"] for line in answer] for answer in answers]
    assert "".join(texts[0]) == "".join(texts[1]) != ""


async def test_a_server_that_hangs_for_too_long_is_gone(models: Models, doomed: Servers) -> None:
    """A server that hangs for longer than the limit counts as gone."""
    async with program(*serve(models("swa"), *doomed), toy=False, environment=IMPATIENT) as runner:
        port = await loaded(runner)
        stream = await request(port, "/completion", ENDLESS)
        assert await stream.receive_some()
        doomed[0].hang()
        reason = f"the rpc-server {doomed[0].endpoint} has not answered for 2 seconds"
        assert reason in lines(await read_all(stream))[-1]["error"]
        assert reason in await exchange(port, "/health")
        await ended(runner)


async def test_the_program_ends_while_a_server_hangs(models: Models, doomed: Servers) -> None:
    async with program(*serve(models("swa"), *doomed), toy=False) as runner:
        port = await loaded(runner)
        stream = await request(port, "/completion", ENDLESS)
        assert await stream.receive_some()
        doomed[0].hang()
        other = await request(port, "/completion", ENDLESS)
        await stream.aclose()
        assert '"status":"ok"' in await exchange(port, "/health")
        start = trio.current_time()
        await ended(runner)
        assert trio.current_time() - start < 15
        assert "the decode thread does not stop: a device does not answer" in runner.log
        await other.aclose()


async def test_a_server_serves_one_client_at_a_time(models: Models, doomed: Servers) -> None:
    """A second client gets no answer while the first one is connected. When that one is killed, it does."""
    command = ["run", "hello world", "-m", str(models("chain")), "--rpc", doomed[0].endpoint, "--temperature", "0"]
    async with program(*serve(models("chain"), *doomed), toy=False) as runner:
        await loaded(runner)
        async with program(*command, toy=False, environment=IMPATIENT) as other:
            assert await other.ended() == 1
            words = "gave no valid answer: is it an rpc-server of this version, and without another client?"
            assert "Traceback" not in other.log
            assert other.log.splitlines()[-1] == f"error: the rpc-server {doomed[0].endpoint} {words}"
        runner.process.kill()
        await runner.ended()
        async with program(*command, toy=False) as other:
            assert await other.ended() == 0, other.log
            assert other.output.decode().startswith(" one two three")


# ---- refusals --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saying(answer: bytes) -> Iterator[str]:
    """The endpoint of a server that sends `answer` to every client, or nothing if it is empty."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections = []

    def answer_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                connections[-1].sendall(answer)

    thread = threading.Thread(target=answer_all)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in connections:
            connection.close()


def refusal(model: Path, endpoint: str) -> str:
    loader = LlamaLoader(ModelConfig(path=str(model), rpc=(endpoint,)))
    with pytest.raises(LoadError) as error:
        loader(EngineConfig(threads=1), progress=lambda _: None, cancelled=lambda: False)
    return str(error.value)


@pytest.mark.usefixtures("rpc_program")
def test_other_servers_are_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = f"127.0.0.1:{free_port()}"
    unreachable = f"the rpc-server {closed} cannot be reached: Connection refused"
    assert refusal(models("llama"), closed) == unreachable
    unknown = "nobody.invalid:1000"
    assert refusal(models("llama"), unknown) == f"the rpc-server {unknown} cannot be found: its host name is unknown"
    with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as rubbish:
        assert refusal(models("llama"), rubbish).startswith(
            f"the rpc-server {rubbish} gave no valid answer: is it an rpc-server of this version"
        )
    monkeypatch.setattr(backends, "RPC_SECONDS", 0.1)
    with saying(b"") as silent:
        words = f"the rpc-server {silent} did not answer within 0.1 seconds: is it an rpc-server of this version"
        assert refusal(models("llama"), silent).startswith(words)
    monkeypatch.undo()
    assert refusal(models("llama"), closed) == unreachable  # the failures before have left nothing behind


WITHOUT_PLUGIN = """
import sys
from pathlib import Path
from trio_runner.llama import library
library.LIBRARY_DIRECTORY = Path(sys.argv.pop(1))
from trio_runner.cli.main import main
sys.exit(main())
"""


@pytest.mark.usefixtures("rpc_program")
async def test_without_the_plugin_rpc_is_refused(models: Models, tmp_path: Path) -> None:
    for plugin in LIBRARY_DIRECTORY.glob("libggml-cpu*"):
        (tmp_path / plugin.name).symlink_to(plugin)
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path), "run", "x", "-m", str(models("llama"))]
    done = await trio.run_process(
        [*command, "--rpc", "127.0.0.1:1"], capture_stdout=True, capture_stderr=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "error: the rpc-server 127.0.0.1:1 cannot be used: the backend rpc was not built or cannot be opened\n"
    )


@pytest.mark.parametrize(
    "endpoint", ["nonsense", ":1", "host:", "host:0", "host:65536", "a host:1", "[::1]:5", "a,b:1"]
)
def test_malformed_endpoints_are_refused(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x", "--rpc", endpoint]) == 2
    assert "is not host:port" in capsys.readouterr().err
