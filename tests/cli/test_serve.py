"""`trio-runner serve` as its users meet it: a process with arguments, requests, signals and an exit code."""

from __future__ import annotations

import base64
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.cli.programs import DEADLINE, SLOW, TOY, exchange, program, read_all, request, texts
from tests.engine.toys import items_of, picture
from trio_runner.testing import ToyProjector, toy_cache_key, toy_text

SEEN = items_of(ToyProjector(), ["see ", picture(0)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_answers_and_ends_when_asked(model: str, number: signal.Signals) -> None:
    async with program("serve", "--model", model, "--port", "0") as runner:
        port = await runner.listening()
        await runner.logged("model loaded")
        assert '{"status":"ok","progress":1' in await exchange(port, "/health")
        response = await exchange(port, "/completion", {"prompt": "hello", "n_predict": 12})
        assert texts(response) == toy_text("hello", 12)
        runner.process.send_signal(number)
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        assert not runner.output


async def test_a_running_request_is_drained(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", environment=SLOW) as runner:
        stream = await request(await runner.listening(), "/completion", {"prompt": "hello", "n_predict": 40})
        first = (await stream.receive_some()).decode()
        runner.terminate()
        response = first + await read_all(stream)
        assert len(texts(response)) == 40
        assert '"stopped_limit":true' in response
        assert await runner.ended() == 0


async def test_requests_may_not_run_on_after_the_drain_timeout(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--drain-timeout", "0.1", environment=SLOW) as runner:
        stream = await request(await runner.listening(), "/completion", {"prompt": "hello"})
        await stream.receive_some()
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        await stream.aclose()


async def test_a_second_signal_stops_the_server_at_once(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--drain-timeout", "3600", environment=SLOW) as runner:
        stream = await request(await runner.listening(), "/completion", {"prompt": "hello"})
        await stream.receive_some()
        runner.interrupt()
        await runner.logged("SIGINT")
        runner.interrupt()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        await stream.aclose()


async def test_the_server_can_be_stopped_while_the_model_loads(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", environment={"TOY_LOAD": "never"}) as runner:
        port = await runner.listening()
        while '"progress":0.25}' not in (health := await exchange(port, "/health")):  # the load has yet to begin
            assert '{"status":"loading model","progress":0}' in health
        assert '{"status":"loading model","progress":0.25}' in health
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log


async def test_a_model_that_does_not_load_ends_the_server(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.endswith("\nerror: toy.gguf: this is no model at all\n")
        assert "Traceback" not in runner.log


REASON = "trio_step failed with -3: the toy broke in two"


@pytest.mark.parametrize("flags", [["serve", "--model", "{}", "--slots", "3"], ["-model", "{}", "-parallel", "3"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_server_goes_on_after_the_engine_died(model: str, flags: list[str], number: signal.Signals) -> None:
    arguments = [flag.format(model) for flag in flags] + ["--port", "0"]
    async with program(*arguments, environment={**SLOW, "TOY_DIES": "1"}) as runner:
        port = await runner.listening()
        streams = [await request(port, "/completion", {"prompt": f"hello {n}"}) for n in range(4)]
        for stream in streams:  # three of them run and one waits
            await stream.receive_some()
        embedding = await exchange(port, "/embedding", {"content": "hello"})
        assert "HTTP/1.1 503" in embedding
        assert REASON in embedding
        for stream in streams:
            assert f'{{"error":"the engine is broken: {REASON}","content":"","stop":true' in await read_all(stream)
        health = await exchange(port, "/health")
        assert "HTTP/1.1 503" in health
        assert f'{{"status":"server error","progress":1,"error":"{REASON}"}}' in health
        later = await exchange(port, "/completion", {"prompt": "hello"})
        assert "HTTP/1.1 503" in later
        assert REASON in later
        runner.process.send_signal(number)
        with trio.fail_after(DEADLINE / 4):
            assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        assert runner.log.count("ERROR") == 1
        assert f"the decode thread died: {REASON}" in runner.log


async def test_an_address_that_is_taken_ends_the_server(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with program("serve", "--model", model, "--port", str(port)) as runner:
            assert await runner.ended() == 1
            assert runner.log.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1:{port}: ")


async def test_an_api_key_comes_from_a_file_or_the_environment(model: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    in_file = ["--api-key-file", str(tmp_path / "key")], dict[str, str]()
    in_environment = list[str](), {"TRIO_RUNNER_API_KEY": "secret"}
    for arguments, environment in (in_file, in_environment):
        async with program("serve", "--model", model, "--port", "0", *arguments, environment=environment) as runner:
            assert "HTTP/1.1 401" in await exchange(await runner.listening(), "/completion", {"prompt": "hello"})


async def test_an_address_that_others_reach_needs_a_key(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--host", "0.0.0.0") as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1].startswith("error: 0.0.0.0 can be reached by other machines")


async def test_a_server_that_bench_started_ends_when_bench_is_killed(model: str, tmp_path: Path) -> None:
    """Even if that happens before the server has begun to watch its parent."""
    fifo, python = tmp_path / "fifo", tmp_path / "python"
    os.mkfifo(fifo)
    python.write_text(f'#!/bin/sh\nexec 9>{fifo}\necho $$ >&9\nshift 2\nexec {sys.executable} -c "$TOY" "$@"\n')
    python.chmod(0o755)
    async with program("bench", "-m", model, environment={"TOY_PYTHON": str(python), "TOY": TOY}) as bench:
        with await trio.to_thread.run_sync(fifo.open, abandon_on_cancel=True) as held:
            server = int(await trio.to_thread.run_sync(held.readline, abandon_on_cancel=True))
            try:
                bench.process.kill()
                await trio.to_thread.run_sync(held.read, abandon_on_cancel=True)  # until the server is gone
            finally:
                with suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)


async def test_serve_takes_images_and_adapters(model: str, tmp_path: Path) -> None:
    options = ["--mmproj", "p.gguf", "--lora-scaled", "/srv/a.gguf=0.5", "--adapter-dir", str(tmp_path)]
    async with program("serve", "--model", model, "--port", "0", *options) as runner:
        port = await runner.listening()
        await runner.logged("model loaded")
        assert '{"adapters":[{"name":"a","file":"a.gguf","scale":0.5}]}' in await exchange(port, "/adapters")
        assert '{"name":"b","file":"b.gguf","scale":0}' in await exchange(port, "/adapters", {"file": "b.gguf"})
        images = [{"id": 3, "data": base64.b64encode(picture(0)).decode()}]
        fields = {"prompt": "see [img-3]", "n_predict": 12, "adapters": [], "image_data": images}
        assert texts(await exchange(port, "/completion", fields)) == toy_text(SEEN, 12)
        large = {**fields, "unknown": "x" * (9 << 20)}
        assert texts(await exchange(port, "/completion", large)) == toy_text(SEEN, 12)
        cache_key = toy_cache_key([(str(tmp_path / "b.gguf"), 1.0)])
        adapted = {**fields, "adapters": [{"name": "b"}]}
        assert texts(await exchange(port, "/completion", adapted)) == toy_text(SEEN, 12, cache_key)
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
