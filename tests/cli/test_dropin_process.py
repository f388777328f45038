"""The drop-in mode as an old server meets it: a process with flags, requests, and lines on stderr."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys

import trio

from tests.cli.programs import DEADLINE, ROOT, TOY, exchange, program, texts
from tests.engine.toys import items_of, picture
from trio_runner.testing import ToyProjector, toy_cache_key, toy_text

SEEN = items_of(ToyProjector(), ["see ", picture(0)])


async def test_the_dropin_serves(model: str) -> None:
    flags = [
        "-model",
        model,
        "--ctx-size=256",
        "-parallel",
        "2",
        "--numa",
        "distribute",
        "-verbose=false",
        "-port",
        "0",
    ]
    async with program(*flags) as runner:
        await runner.logged('msg="starting trio runner"')
        port = await runner.listening()
        await runner.logged("model loaded")
        assert '{"status":"ok","progress":1' in await exchange(port, "/health")
        response = await exchange(port, "/completion", {"prompt": "hello", "n_predict": 12, "stream": True})
        assert texts(response) == toy_text("hello", 12)
        runner.terminate()
        assert await runner.ended() == 0


async def test_failures_are_lines_that_the_old_server_looks_for(model: str) -> None:
    async with program("-model", model, "-port", "0", environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1] == "error: error loading model toy.gguf: this is no model at all"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with program("-model", model, "-port", str(taken.getsockname()[1])) as runner:
            assert await runner.ended() == 1
            assert runner.log.splitlines()[-1].startswith("error: cannot listen on 127.0.0.1:")


async def test_the_dropin_ends_when_its_parent_is_gone(model: str) -> None:
    shell = [
        "sh",
        "-c",
        'exec 3<&0; "$@" & read line <&3',
        "sh",
        sys.executable,
        "-c",
        TOY,
        "-model",
        model,
        "-port",
        "0",
    ]
    process = await trio.lowlevel.open_process(
        shell,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stderr is not None
    async with process.stdin, process.stderr:
        with trio.fail_after(DEADLINE):
            log = b""
            while b"listening on" not in log:
                log += await process.stderr.receive_some()
            process.kill()
            await process.wait()
            while data := await process.stderr.receive_some():  # ends when the last process that holds it does
                log += data
    assert b"is gone" in log


async def test_the_dropin_takes_images(model: str) -> None:
    flags = ["-model", model, "-mmproj", "p.gguf", "-lora", "/srv/a.gguf", "-port", "0"]
    async with program(*flags) as runner:
        port = await runner.listening()
        images = [{"id": 3, "data": base64.b64encode(picture(0)).decode()}]
        fields = {"prompt": "see [img-3]", "n_predict": 12, "image_data": images, "unknown": "x" * (9 << 20)}
        cache_key = toy_cache_key([("/srv/a.gguf", 1.0)])
        assert texts(await exchange(port, "/completion", fields)) == toy_text(SEEN, 12, cache_key)
