"""The program as its users meet it: a process with arguments, streams, signals and an exit code."""

from __future__ import annotations

import array
import base64
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.cli.programs import DEADLINE, ROOT, TOY, exchange, program, read_all, request
from tests.engine.toys import items_of, picture
from trio_runner.testing import ToyProjector, toy_cache_key, toy_text, toy_vector

SEEN = items_of(ToyProjector(), ["see ", picture(0)])
SLOW = {"TOY_ENDLESS": "1", "TOY_STEP": "0.01"}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"")
    return str(path)


def texts(response: str) -> str:
    """The text of all lines of a /completion response."""
    return "".join(json.loads(line)["content"] for line in re.findall(r"^\{.*\}$", response, re.MULTILINE))


# ---- serve -----------------------------------------------------------------------------------------------------------


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


async def test_draining_is_bounded(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--drain-timeout", "0.1", environment=SLOW) as runner:
        stream = await request(await runner.listening(), "/completion", {"prompt": "hello"})
        await stream.receive_some()
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        await stream.aclose()


async def test_a_second_signal_does_not_wait(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--drain-timeout", "3600", environment=SLOW) as runner:
        stream = await request(await runner.listening(), "/completion", {"prompt": "hello"})
        await stream.receive_some()
        runner.interrupt()
        await runner.logged("SIGINT")
        runner.interrupt()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        await stream.aclose()


async def test_stopped_while_loading(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", environment={"TOY_LOAD": "never"}) as runner:
        port = await runner.listening()
        while '"progress":0.25}' not in (health := await exchange(port, "/health")):  # the load has yet to begin
            assert '{"status":"loading model","progress":0}' in health
        assert '{"status":"loading model","progress":0.25}' in health
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log


async def test_a_model_that_does_not_load(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.endswith("\nerror: toy.gguf: this is no model at all\n")
        assert "Traceback" not in runner.log


REASON = "trio_step failed with -3: the toy broke in two"


@pytest.mark.parametrize("flags", [["serve", "--model", "{}", "--slots", "3"], ["-model", "{}", "-parallel", "3"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_engine_that_dies_does_not_take_the_server_along(
    model: str, flags: list[str], number: signal.Signals
) -> None:
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


async def test_an_address_that_is_taken(model: str) -> None:
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


async def test_other_machines_need_a_key(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--host", "0.0.0.0") as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1].startswith("error: 0.0.0.0 can be reached by other machines")


# ---- drop-in ---------------------------------------------------------------------------------------------------------


async def test_dropin_serves(model: str) -> None:
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


async def test_dropin_tells_the_old_server_what_is_wrong(model: str) -> None:
    async with program("-model", model, "-port", "0", environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1] == "error: error loading model toy.gguf: this is no model at all"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with program("-model", model, "-port", str(taken.getsockname()[1])) as runner:
            assert await runner.ended() == 1
            assert runner.log.splitlines()[-1].startswith("error: cannot listen on 127.0.0.1:")


async def test_dropin_ends_with_its_parent(model: str) -> None:
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


async def test_a_server_that_bench_started_ends_with_it(model: str, tmp_path: Path) -> None:
    """Even if bench is killed before the server has begun to look."""
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


async def test_the_dropin_takes_images(model: str) -> None:
    flags = ["-model", model, "-mmproj", "p.gguf", "-lora", "/srv/a.gguf", "-port", "0"]
    async with program(*flags) as runner:
        port = await runner.listening()
        images = [{"id": 3, "data": base64.b64encode(picture(0)).decode()}]
        fields = {"prompt": "see [img-3]", "n_predict": 12, "image_data": images, "unknown": "x" * (9 << 20)}
        cache_key = toy_cache_key([("/srv/a.gguf", 1.0)])
        assert texts(await exchange(port, "/completion", fields)) == toy_text(SEEN, 12, cache_key)


# ---- run -------------------------------------------------------------------------------------------------------------


async def test_run_prints_the_text_and_nothing_else(model: str) -> None:
    async with program("run", "hello", "--model", model, "-n", "12") as runner:
        assert await runner.ended() == 0
        assert runner.output.decode() == toy_text("hello", 12)
        assert not runner.log.strip()


async def test_run_reads_the_prompt_from_stdin(model: str) -> None:
    for arguments in (["-"], []):
        async with program("run", *arguments, "-m", model, "-n", "12", stdin="hé\nllo\n".encode()) as runner:
            assert await runner.ended() == 0
            assert runner.output.decode() == toy_text("hé\nllo", 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_run_stops_at_once(model: str, number: signal.Signals) -> None:
    async with program("run", "hello", "--model", model, "--shift", environment=SLOW) as runner:
        await runner.printed(3)
        runner.process.send_signal(number)
        assert await runner.ended() == 128 + number
        assert not runner.log.strip()


async def test_run_stops_while_loading(model: str) -> None:
    async with program("run", "hello", "--model", model, environment={"TOY_LOAD": "never"}) as runner:
        await runner.logged("the toy is loading")
        runner.interrupt()
        assert await runner.ended() == 130
        assert "Traceback" not in runner.log


async def test_run_stops_while_nobody_reads_its_output(model: str) -> None:
    async with program("run", "hello", "--model", model, "--shift", environment={"TOY_ENDLESS": "1"}) as runner:
        stdout = runner.process.stdout
        assert isinstance(stdout, trio.lowlevel.FdStream)
        fcntl.fcntl(stdout.fileno(), fcntl.F_SETPIPE_SZ, 8192)
        while _n_waiting(stdout.fileno()) <= 4096:  # noqa: ASYNC110  # nothing tells when the pipe is full
            await trio.sleep(0.01)
        runner.interrupt()
        await runner.process.wait()
        assert runner.process.returncode == 130


def _n_waiting(descriptor: int) -> int:
    """Bytes in the pipe."""
    waiting = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
    return waiting[0]


async def test_run_is_quiet_when_its_reader_leaves(model: str) -> None:
    async with program("run", "hello", "--model", model, "--shift", environment=SLOW) as runner:
        await runner.printed(1)
        assert runner.process.stdout is not None
        await runner.process.stdout.aclose()
        await runner.process.wait()
        assert runner.process.returncode == 141
        assert runner.process.stderr is not None
        assert not await runner.process.stderr.receive_some()


async def test_run_says_what_is_wrong(model: str) -> None:
    async with program("run", "hello", "--model", model, environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1] == "error: toy.gguf: this is no model at all"
    async with program("run", "hello", "--model", f"{model}.not") as runner:
        assert await runner.ended() == 1
        assert runner.log == f"error: {model}.not: there is no such file\n"
    async with program("run", "hello" * 2000, "--model", model) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: prompt has 10000 tokens, but at most 4096 fit\n"


async def test_run_shows_images(model: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
    command = ["run", "what is this?", "-m", model, "-n", "12", *(f"--image={file}" for file in files)]
    async with program(*command, "--mmproj", "p.gguf") as runner:
        assert await runner.ended() == 0
        items = items_of(ToyProjector(), [picture(0), picture(1), "what is this?"])
        assert runner.output.decode() == toy_text(items, 12)
        assert not runner.log.strip()
    async with program(*command) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: prompt has images, which need a model with a projector\n"
    files[1].write_bytes(b"no picture")
    async with program(*command, "--mmproj", "p.gguf") as runner:
        assert await runner.ended() == 1
        assert runner.log.startswith("error: prompt[1] is of an unknown format")
        assert runner.log.count("\n") == 1


async def test_run_chats_where_the_model_has_a_template(model: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}bot:"
    command = ["run", "--chat", "hello", "-m", model, "-n", "12"]
    async with program(*command, environment={"TOY_TEMPLATE": template}) as runner:
        assert await runner.ended() == 0
        assert runner.output.decode() == toy_text("user: hello;bot:", 12)
    file = tmp_path / "picture.png"
    file.write_bytes(picture(0))
    command += ["--image", str(file), "--mmproj", "p.gguf"]
    async with program(*command, environment={"TOY_TEMPLATE": template}) as runner:
        assert await runner.ended() == 0
        items = items_of(ToyProjector(), ["user: ", picture(0), "hello;bot:"])
        assert runner.output.decode() == toy_text(items, 12)
    async with program(*command) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: there is no chat template in the model's file\n"


# ---- start -----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import runpy, signal, sys

class Interrupted:
    def find_spec(name, path=None, target=None):
        if name == interrupted:
            signal.raise_signal(signal.SIGINT)

interrupted = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupted)
runpy.run_module("trio_runner", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["trio_runner.cli", "click", "trio_runner.models", "trio", "numpy", "quart"])
def test_ctrl_c_while_the_program_starts(module: str, model: str) -> None:
    """Importing takes most of the time until there is a server, so this is where it comes."""
    command = [sys.executable, "-c", INTERRUPTED, module, "serve", "--model", model, "--port", "0"]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, b"", b"")


def test_the_package_does_not_import_what_takes_long() -> None:
    """`--help` should come at once, and so should the first word of a program that imports us."""
    look = "import sys, trio_runner.cli; print(*{'numpy', 'trio', 'quart', 'msgspec', 'rich'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", look], capture_output=True, timeout=DEADLINE, cwd=ROOT, check=True)
    assert ended.stdout == b"\n"


# ---- embed -----------------------------------------------------------------------------------------------------------


async def test_embed_prints_one_vector_a_line(model: str) -> None:
    async with program("embed", "one", "-", "two", "--normalize", "--model", model, stdin=b"a\nb\n") as runner:
        assert await runner.ended() == 0
        vectors = [json.loads(line) for line in runner.output.decode().splitlines()]
        assert len(vectors) == 4
        for vector in vectors:
            assert sum(number**2 for number in vector) == pytest.approx(1)
        assert not runner.log.strip()


async def test_embed_cuts_texts_and_vectors(model: str) -> None:
    options = ["--dimensions", "3", "--context-length", "4", "--model", model]
    async with program("embed", "one", "too long", "--truncate", *options) as runner:
        assert await runner.ended() == 0
        vectors = [json.loads(line) for line in runner.output.decode().splitlines()]
        assert vectors == [toy_vector([*text])[:3].tolist() for text in (b"one", b"too ")]
    async with program("embed", "one", "too long", *options) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: content has 8 tokens, but at most 4 fit\n"
        assert not runner.output
    async with program("embed", "one", "--dimensions", "9", "--model", model) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: dimensions must be at most 8, not 9\n"


# ---- rerank ----------------------------------------------------------------------------------------------------------


async def test_rerank_prints_one_score_a_line(model: str) -> None:
    command = ["rerank", "query", "one", "-", "two", "--model", model]
    async with program(*command, stdin=b"a\nb\n", environment={"TOY_RANKS": "1"}) as runner:
        assert await runner.ended() == 0
        scores = [float(line) for line in runner.output.decode().splitlines()]
        assert scores == [toy_vector([*b"query", *text])[0] for text in (b"one", b"a", b"b", b"two")]
        assert not runner.log.strip()
    async with program(*command) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: this model does not rank documents\n"


# ---- fetch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_fetch_can_be_stopped(tmp_path: Path, number: signal.Signals) -> None:
    """Neither pip nor half a file outlives a fetch that a signal ends."""
    fifo, python = tmp_path / "fifo", tmp_path / "python"
    os.mkfifo(fifo)
    python.write_text(f"#!/bin/sh\necho $$ > {fifo}\necho half > {tmp_path}/models/.*.fetch/a.whl\nexec sleep 1000\n")
    python.chmod(0o755)
    environment = {"TOY_PYTHON": str(python), "TRIO_RUNNER_CACHE": str(tmp_path)}
    async with program("fetch", environment=environment) as runner:
        pid = int(await trio.to_thread.run_sync(fifo.read_text, abandon_on_cancel=True))
        runner.process.send_signal(number)
        assert await runner.ended() == 128 + number
        assert not runner.log.strip()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]
