"""How an app finds the server that it starts: one line on stdout, and a socket that only its user can reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio

from tests.cli.programs import Program, exchange, program, read_all
from trio_runner.cli.service import announcement


async def announced(runner: Program) -> dict[str, object]:
    """What the server says on stdout."""
    await runner.printed(1)
    while not runner.output.endswith(b"\n"):
        await runner.printed(len(runner.output) + 1)
    fields = json.loads(runner.output)
    assert isinstance(fields, dict)
    return fields


async def health(path: Path) -> str:
    stream = await trio.open_unix_socket(path)
    await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return await read_all(stream)


async def test_one_line_says_where_the_server_listens(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--announce") as runner:
        fields = await announced(runner)
        port = await runner.listening()
        assert fields == {"url": f"http://127.0.0.1:{port}", "pid": runner.process.pid}
        await runner.logged("model loaded")
        assert "HTTP/1.1 200" in await exchange(port, "/health")
        runner.terminate()
        assert await runner.ended() == 0
        assert runner.output.count(b"\n") == 1


async def test_a_socket_instead_of_a_port(model: str, tmp_path: Path) -> None:
    """A server that was killed leaves its file behind, and the next one takes its place."""
    path = tmp_path / "s"
    arguments = ["serve", "--model", model, "--socket", str(path), "--announce"]
    for is_last in (False, True):
        async with program(*arguments) as runner:
            fields = await announced(runner)
            assert fields == {"url": "http://localhost", "pid": runner.process.pid, "socket": str(path)}
            await runner.logged(f"listening on {path}")
            await runner.logged("model loaded")
            assert "listening on http" not in runner.log
            assert "HTTP/1.1 200" in await health(path)
            if is_last:
                runner.terminate()
                assert await runner.ended() == 0
                break
            async with program(*arguments) as second:
                assert await second.ended() == 1
                assert second.log.splitlines()[-1] == f"error: cannot listen on {path}: another server listens there"
            runner.process.kill()
    assert os.listdir(tmp_path) == ["toy.gguf"]


async def test_a_socket_and_a_port(model: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with program("serve", "--model", model, "--port", "0", "--socket", str(path), "--announce") as runner:
        fields = await announced(runner)
        port = await runner.listening()
        assert (fields["url"], fields["socket"]) == (f"http://127.0.0.1:{port}", str(path))
        assert "HTTP/1.1 200" in await exchange(port, "/health")
        assert "HTTP/1.1 200" in await health(path)


@pytest.mark.parametrize(
    ("addresses", "url"),
    [
        ([("127.0.0.1", 1), ("::1", 1)], "http://127.0.0.1:1"),
        ([("::1", 2)], "http://[::1]:2"),
        ([("0.0.0.0", 3)], "http://127.0.0.1:3"),
        ([("::", 4)], "http://[::1]:4"),
        ([], "http://localhost"),
    ],
)
def test_the_url_is_one_that_this_machine_can_use(addresses: list[tuple[str, int]], url: str) -> None:
    assert announcement(addresses, None) == f'{{"url": "{url}", "pid": {os.getpid()}}}\n'
