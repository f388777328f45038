"""`trio-runner bench` as its users run it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.programs import program
from tests.tiny_models import tiny_model
from trio_runner.cli import bench as command
from trio_runner.cli.main import main

SMALL = ["--repeat", "2", "--prompt-tokens", "60", "-n", "6"]
ENDLESS = {"TOY_ENDLESS": "1", "TOY_STEP": "0.002"}


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"")
    return str(path)


async def test_two_servers_are_compared(toy: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "plot.svg")}
    options = ["--json", str(files["json"]), "--markdown", str(files["markdown"]), "--plot", str(files["plot.svg"])]
    serve = ["serve", "--model", toy, "--port", "0", "--slots", "2"]
    async with program(*serve, environment=ENDLESS) as one, program(*serve, environment=ENDLESS) as other:
        urls = [f"http://127.0.0.1:{await server.listening()}" for server in (one, other)]
        command = ["bench", "--url", urls[0], "--url", urls[1], "--scenario", "ttft", "--scenario", "gaps"]
        async with program(*command, *SMALL, *options, toy=False) as bench:
            assert await bench.ended() == 0, bench.log
    table = bench.output.decode()
    assert "cold, 60 tokens (ms)" in table
    assert "A runner / B runner" in " ".join(table.split())
    assert table.endswith("seed 0\n")
    document = json.loads(files["json"].read_text())
    assert [server["url"] for server in document["servers"]] == urls
    assert [server["slots"] for server in document["servers"]] == [2, 2]
    assert {result["scenario"] for result in document["results"]} == {"ttft", "gaps"}
    assert not _remarks(document)
    assert all(server["n"] >= 2 for result in document["results"] for server in result["servers"])
    assert files["markdown"].read_text().startswith("| scenario | measure | A runner median |")
    assert "<svg" in files["plot.svg"].read_text()


async def test_one_server_is_compared_in_two_dialects(toy: str) -> None:
    serve = ["serve", "--model", toy, "--port", "0", "--slots", "2"]
    async with program(*serve, environment=ENDLESS) as server:
        url = f"http://127.0.0.1:{await server.listening()}"
        same = ["--url", url, "--dialect", "llama", "--url", url, "--dialect", "runner"]
        options = [*SMALL, "--scenario", "throughput", "-n", "60", "--json", "-"]
        async with program("bench", *same, *options, toy=False) as bench:
            assert await bench.ended() == 0, bench.log
        async with program("bench", "--url", url, "--url", url, toy=False) as twice:
            assert await twice.ended() == 1
    assert "a server is measured twice in the same dialect" in twice.log
    document = json.loads(bench.output)
    assert [server["dialect"] for server in document["servers"]] == ["llama", "runner"]
    found = {result["metric"]: result for result in document["results"]}
    assert found["1 stream"]["ratio"] > 0
    cpu = found["1 stream, CPU time a token"]
    assert cpu["unit"] == "ms"
    assert all(server["median"] > 0 for server in cpu["servers"])


async def test_without_a_url_a_server_is_started(tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path))
    command = ["bench", "-m", model, "--slots", "2", "--threads", "1", "--context-length", "256", "--no-mmap"]
    async with program(*command, *SMALL, "--scenario", "ttft", "--json", "-", toy=False) as bench:
        assert await bench.ended() == 0, bench.log
    document = json.loads(bench.output)
    [server] = document["servers"]
    assert server["slots"] == 2
    assert not _remarks(document)
    assert len(document["results"]) == 3


def _remarks(document: dict[str, Any]) -> list[str]:
    """The remarks, except those about other work of this machine."""
    return [remark for remark in document["remarks"] if "was disturbed" not in remark]


async def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    async with program("bench", "-m", str(tmp_path / "bad.gguf"), toy=False) as bench:
        assert await bench.ended() == 1
    assert "bad.gguf" in bench.log
    assert "Traceback" not in bench.log


async def test_ctrl_c_ends_the_server(tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path))
    endless = ["--scenario", "storm", "--storm", "1000000", "--context-length", "512", "--threads", "1"]
    async with program("bench", "-m", model, "--prompt-tokens", "60", *endless, toy=False) as bench:
        while not (child := _server_of(bench.process.pid)):  # noqa: ASYNC110
            await trio.sleep(0.01)
        bench.interrupt()
        assert await bench.ended() == 130
        assert "Traceback" not in bench.log
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _server_of(pid: int) -> int:
    """The server that this process has started, or 0. Imports start other, short-lived processes."""
    with suppress(OSError):  # tasks and processes may end meanwhile
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    return int(child)
    return 0


async def test_ctrl_c_keeps_what_was_measured(toy: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    async with program("serve", "--model", toy, "--port", "0", environment=ENDLESS) as server:
        url = f"http://127.0.0.1:{await server.listening()}"
        endless = ["--scenario", "ttft", "--scenario", "storm", "--storm", "1000000"]
        async with program("bench", "--url", url, *SMALL, *endless, "--json", str(out), toy=False) as bench:
            await bench.logged("storm, round 1")
            assert len(json.loads(out.read_text())["results"]) == 3
            bench.interrupt()
            assert await bench.ended() == 130
    assert "Traceback" not in bench.log
    assert bench.log.startswith("seed 0\n")
    assert "cold, 60 tokens (ms)" in bench.output.decode()
    assert len(json.loads(out.read_text())["results"]) == 3


async def test_a_url_without_a_server_is_reported() -> None:
    async with program("bench", "--url", "127.0.0.1:1", toy=False) as bench:
        assert await bench.ended() == 1
    assert bench.log.startswith("error: http://127.0.0.1:1: ")
    assert bench.log.endswith("Connection refused\n")


def test_the_scenarios_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_logging", lambda verbose: None)
    assert main(["bench", "--scenario", "list"]) == 0
    assert "cancel-prefill  A client disconnects at a random moment of a long prefill.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scenario nothing", "no scenario nothing; there are throughput, ttft,"),
        ("--url https://x", "https://x is not http://HOST:PORT"),
        ("--url x --dialect llama --dialect llama", "--dialect must be given once for each --url"),
        ("--pid 1", "--pid must be given once for each --url"),
        ("--dialect latin", "'latin' is not one of"),
        ("--repeat 0", "0 is not in the range"),
        ("--json /nowhere/at/all.json", "there is no directory /nowhere/at"),
    ],
)
def test_wrong_command_lines_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "set_up_logging", lambda verbose: None)
    assert main(["bench", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in " ".join(err.split())


def test_a_plot_needs_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_logging", lambda verbose: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--url", "x", "--plot", "x.png"]) == 1
    assert "pip install 'trio-runner[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--turns", "--streams 2", "--prompt-tokens 8 --prompt-tokens 9"])
def test_options_of_the_bare_loop_need_it(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options.split()]) == 2
    assert "are for --bare only" in capsys.readouterr().err


def test_more_streams_than_slots_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path))
    assert main(["bench", "--bare", "--streams", "3", "--slots", "2", "--model", model]) == 2
    assert "3 streams need --slots 3" in capsys.readouterr().err
