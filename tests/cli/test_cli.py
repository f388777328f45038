"""The command line without a process: options, what they become, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import trio

import trio_runner
from tests.cli.programs import ROOT
from trio_runner import cli, service
from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import EngineBroken, LoadError, RunnerError
from trio_runner.request import Chat, GenerateRequest
from trio_runner.sampling import SamplingParams
from trio_runner.terminal import TextOutput

COMMANDS = ["serve", "run", "embed", "rerank", "info", "bench", "fetch"]


@dataclasses.dataclass
class Call:
    """What a command would have started, had it not been a test."""

    model: ModelConfig | None = None
    engine: EngineConfig | None = None
    service: service.ServiceConfig | None = None


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Call:
    made = Call()

    async def run_service(model: ModelConfig, engine: EngineConfig, options: service.ServiceConfig) -> None:
        made.model, made.engine, made.service = model, engine, options

    def run_with_engine(configs: tuple[ModelConfig, EngineConfig], main: object) -> int:
        made.model, made.engine = configs
        return 0

    monkeypatch.setattr(service, "run_service", run_service)
    monkeypatch.setattr(cli, "run_with_engine", run_with_engine)
    monkeypatch.setattr(cli, "resolve_model", lambda reference, **options: Path("/fetched") / reference)
    monkeypatch.delenv(cli.API_KEY_VARIABLE, raising=False)
    return made


def test_defaults_are_those_of_the_configuration(call: Call) -> None:
    assert cli.main(["serve"]) == 0
    assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct")
    assert call.engine == EngineConfig()
    assert call.service == service.ServiceConfig()
    assert cli.main(["run", "hello"]) == 0
    assert call.engine == EngineConfig(slots=1, stall_timeout=float("inf"))
    for command in (["embed", "hello"], ["rerank", "hello", "you"]):
        assert cli.main(command) == 0
        assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct")
        assert call.engine == EngineConfig()


def test_every_option_arrives(call: Call, tmp_path: Path) -> None:
    command = "serve -m m.gguf --slots 2 --context-length 100 --batch-size 32 --threads 3 --gpu-layers 7 --main-gpu 1"
    command += " --tensor-split 3,1.5 --lora a.gguf --lora-scaled b.gguf=0.5 --lora c.gguf --lora-scaled d=1=-2"
    command += " --device Vulkan0,RPC1 --rpc 127.0.0.1:50052,box.example:1 --split-mode row"
    command += f" --mmproj p.gguf --flash-attention on --kv-type q8_0 --no-mmap --adapter-dir {tmp_path}"
    command += " --mlock --check-tensors --step-target 40 --pooling mean --max-queue 9 --host ::1 --port 0"
    command += " --drain-timeout 2.5 --allowed-host a.example --allowed-origin https://b.example -v"
    assert cli.main(command.split()) == 0
    assert call.model == ModelConfig(
        path="/fetched/m.gguf",
        projector="p.gguf",
        adapters=(
            AdapterConfig("a.gguf"),
            AdapterConfig("c.gguf"),
            AdapterConfig("b.gguf", 0.5),
            AdapterConfig("d=1", -2.0),
        ),
        gpu_layers=7,
        devices=("Vulkan0", "RPC1"),
        rpc=("127.0.0.1:50052", "box.example:1"),
        split_mode="row",
        main_gpu=1,
        tensor_split=(3.0, 1.5),
        mmap=False,
        mlock=True,
        check_tensors=True,
    )
    assert call.engine == EngineConfig(
        slots=2,
        context_length=100,
        batch_size=32,
        threads=3,
        flash_attention="on",
        kv_type="q8_0",
        step_target=0.04,
        pooling="mean",
        max_queue=9,
    )
    assert call.service == service.ServiceConfig(
        host="::1",
        port=0,
        drain_timeout=2.5,
        allowed_hosts=("a.example",),
        allowed_origins=("https://b.example",),
        adapter_dir=tmp_path,
        max_body_bytes=64 << 20,
    )


@pytest.mark.parametrize(
    ("options", "layers", "devices"),
    [
        ("", "auto", None),
        ("--gpu-layers auto --device none", "auto", ()),
        ("--n-gpu-layers -1 --device Metal", -1, ("Metal",)),
        ("-ngl 0", 0, None),
    ],
)
def test_what_goes_to_devices(
    options: str, layers: int | Literal["auto"], devices: tuple[str, ...] | None, call: Call
) -> None:
    assert cli.main(["serve", *options.split()]) == 0
    assert call.model == ModelConfig(path="/fetched/SmolLM2-135M-Instruct", gpu_layers=layers, devices=devices)


@pytest.mark.parametrize(
    "more", ["", " --device none", " --device A,B --rpc a:1,b:2 --split-mode none --gpu-layers auto"]
)
def test_what_bench_is_told_of_an_engine_it_tells_its_server(
    more: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "bench --slots 2 --context-length 100 --batch-size 32 --threads 3 --gpu-layers 7 --main-gpu 1 --mlock"
    command += " --tensor-split 3,1.5 --lora a.gguf --lora-scaled b.gguf=0.5 --lora c:1 --lora-scaled d=1=-2 --no-mmap"
    command += " --mmproj p.gguf --flash-attention on --kv-type q8_0 --check-tensors --step-target 40 --pooling mean"
    command += more
    told: list[list[str]] = []

    def tell(options: cli.EngineOptions) -> list[str]:
        told.append(serve_arguments(options))
        raise RunnerError("enough")

    serve_arguments = cli._serve_arguments
    monkeypatch.setattr(cli, "_serve_arguments", tell)
    assert cli.main(command.split()) == 1
    assert cli.main(["serve", *told[0]]) == 0
    told_of = call.model, call.engine
    assert cli.main(["serve", *command.split()[1:]]) == 0
    assert told_of == (call.model, call.engine)


@pytest.mark.parametrize(
    "command",
    [
        "serve --port 65536",
        "serve --port x",
        "serve --slots 0",
        "serve --slots 1000",
        "serve --context-length 1",
        "serve --threads 0",
        "serve --kv-type f64",
        "serve --flash-attention maybe",
        "serve --gpu-layers all",
        "serve --gpu-layers -2",
        "serve --rpc nonsense",
        "serve --rpc a:0",
        "serve --rpc a:1,:2",
        "serve --split-mode tensor",
        "serve --main-gpu -1",
        "serve --tensor-split 1,x",
        "serve --tensor-split 1,-1",
        "serve --mmproj=",
        "serve --lora=",
        "serve --lora-scaled a",
        "serve --lora-scaled a=",
        "serve --lora-scaled =1",
        "serve --lora-scaled a=b",
        "serve --lora-scaled a=nan",
        "serve --lora-scaled a=-inf",
        "serve --lora-scaled a:1",
        "serve --lora x/a.gguf --lora y/a.gguf",
        "serve --lora a.gguf --lora-scaled a.gguf=2",
        "serve --adapter-dir /no/such/directory",
        f"serve --adapter-dir {__file__}",
        "serve --drain-timeout -1",
        "serve --max-queue -1",
        "serve --max-queue none",
        "serve --step-target 0",
        "serve --step-target nan",
        "serve --step-target fast",
        "serve --cache-policy best",
        "serve --model=",
        "serve --api-key-file /no/such/file",
        "serve x",
        "run x --temperature hot",
        "run x --temperature nan",
        "run x --min-p 2",
        "run x --seed -1",
        "run x -n 0",
        "run x --stop " + "y" * 2000,
        "run x --grammar-file /no/such/file",
        "run x y",
        "run x --image /no/such/file",
        "run x --image /",
        "embed",
        "embed x --dimensions 0",
        "embed x --dimensions few",
        "rerank",
        "rerank x",
        "rerank x y --normalize",
        "fetch x y",
        "nonsense",
        "bench --rounds 0",
    ],
)
def test_a_wrong_command_line_is_a_usage_error(command: str, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split(" ")) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Usage: trio-runner" in err
    assert "Error: " in err
    assert call == Call()


@pytest.mark.parametrize("path", ["a.gguf", "a.gguf:0.25", "C:a.gguf", "C:\\a.gguf", "a=1", "a=b=", "dir=1/é", "=2"])
@pytest.mark.parametrize(("text", "scale"), [("0.25", 0.25), ("-1", -1.0), ("+2e-1", 0.2), ("0", 0.0)])
def test_adapters(path: str, text: str, scale: float) -> None:
    assert cli.read_adapter(path) == AdapterConfig(path, 1.0)
    assert cli.read_scaled_adapter(f"{path}={text}") == AdapterConfig(path, scale)


def test_requests(tmp_path: Path) -> None:
    def make(*options: str) -> GenerateRequest:
        values = cli.run.make_context("run", ["prompt", *options]).params
        own = {name: values.pop(name) for name in ("prompt", "max_tokens", "stop", "shift", "grammar_file")}
        for name in ["images", "chat", *(field.name for field in dataclasses.fields(cli.EngineOptions))]:
            del values[name]
        return cli.make_request(**own, sampling=values)

    assert make() == GenerateRequest(prompt="prompt", shift=False)
    (tmp_path / "grammar").write_text('root ::= "é"', encoding="utf-8")
    options = ["-n", "3", "--stop", "a", "--stop", "b", "--shift", "--temperature", "0", "--top-k", "5", "--seed", "7"]
    assert make(*options, "--grammar-file", str(tmp_path / "grammar")) == GenerateRequest(
        prompt="prompt",
        max_tokens=3,
        stop=("a", "b"),
        shift=True,
        sampling=SamplingParams(temperature=0.0, top_k=5, seed=7, grammar='root ::= "é"'),
    )


def test_prompts() -> None:
    a, b = Path("a.png"), Path("b.png")
    assert cli.make_prompt("hello", (), False) == "hello"
    assert cli.make_prompt("hello", (a, b), False) == (a, b, "hello")
    assert cli.make_prompt("hello", (), True) == Chat(messages=({"role": "user", "content": "hello"},))
    parts = [{"type": "image", "image": a}, {"type": "image", "image": b}, {"type": "text", "text": "hello"}]
    assert cli.make_prompt("hello", (a, b), True) == Chat(messages=({"role": "user", "content": parts},))


@pytest.mark.parametrize("key", ["", " \n", "ключ", "a\x00b"])
def test_an_api_key_that_is_none(key: str, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text(key, encoding="utf-8")
    assert cli.main(["serve", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "API key" in capsys.readouterr().err


def test_the_file_beats_the_environment(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("of the file\n")
    monkeypatch.setenv(cli.API_KEY_VARIABLE, "of the environment")
    assert cli.main(["serve"]) == 0
    assert call.service is not None
    assert call.service.api_key == "of the environment"
    assert cli.main(["serve", "--api-key-file", str(tmp_path / "key")]) == 0
    assert call.service.api_key == "of the file"


@pytest.mark.parametrize("arguments", [["--help"], *[[command, "--help"] for command in COMMANDS]])
def test_help_goes_to_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: trio-runner")
    assert not err


_ENGINE = ["--mmproj FILE", "--lora FILE", "--lora-scaled FILE=SCALE"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("serve", [*_ENGINE, "--adapter-dir DIRECTORY"]),
        ("run", [*_ENGINE, "--image FILE", "--chat"]),
        ("embed", [*_ENGINE, "--dimensions INTEGER", "--truncate", "--normalize"]),
        ("rerank", [*_ENGINE, "--truncate", "QUERY DOCUMENT..."]),
        ("info", _ENGINE),
        ("bench", _ENGINE),
    ],
)
def test_help_lists_what_a_command_takes(command: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [option for option in options if option not in text] == []
    assert ("--adapter-dir" in text) == (command == "serve")


def test_help_says_how_to_reach_the_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert '"trio-runner -h"' in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trio-runner, version {trio_runner.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from trio_runner.cli import main
main(["--help"])
heavy = {"trio_runner._native", "trio_runner.server", "quart", "hypercorn", "rich", "huggingface_hub", "jinja2", "PIL"}
print("loaded:", heavy & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.endswith("loaded: set()\n"), done


@pytest.mark.parametrize(
    ("flags", "level", "native"),
    [([], "INFO", "WARNING"), (["-v"], "DEBUG", "INFO"), (["-vv"], "DEBUG", "DEBUG")],
)
def test_serve_logs_more_when_asked(flags: list[str], level: str, native: str, call: Call) -> None:
    assert cli.main(["serve", *flags]) == 0
    assert logging.getLevelName(logging.getLogger("trio_runner.engine").getEffectiveLevel()) == level
    assert logging.getLevelName(logging.getLogger("trio_runner.llama").getEffectiveLevel()) == native


# ---- exit codes ------------------------------------------------------------------------------------------------------


def broken() -> EngineBroken:
    error = EngineBroken("the decode thread died")
    error.__cause__ = RuntimeError("twice\nover")
    return error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (LoadError("no model", path="x"), 1, "error: x: no model"),
        (BaseExceptionGroup("", [ExceptionGroup("", [LoadError("no\nmodel")])]), 1, "error: no model"),
        (broken(), 1, "error: the decode thread died: twice over"),
        (ExceptionGroup("", [broken(), LoadError("no model")]), 1, "error: no model"),
        (service.ListenError("cannot listen"), 1, "error: cannot listen"),
        (RunnerError(), 1, "error: RunnerError"),
        (BrokenPipeError(), 141, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, ""),
    ],
)
def test_expected_failures_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise error

    assert service.run_to_exit_code(fail) == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_unexpected_failures_are_not_hidden() -> None:
    async def fail() -> None:
        raise ExceptionGroup("", [LoadError("no model"), ZeroDivisionError()])

    with pytest.raises(ExceptionGroup) as caught:
        service.run_to_exit_code(fail)
    assert caught.group_contains(ZeroDivisionError)


# ---- the terminal ----------------------------------------------------------------------------------------------------


async def test_text_reaches_a_slow_pipe_whole() -> None:
    read_end, write_end = os.pipe()
    text = "äöü" * 50_000
    received = b""
    with trio.fail_after(10):
        async with trio.lowlevel.FdStream(read_end) as reader, trio.open_nursery() as nursery:

            async def write() -> None:
                await TextOutput(write_end).write(text)
                os.close(write_end)

            nursery.start_soon(write)
            async for data in reader:
                received += data
    assert received.decode() == text


async def test_text_reaches_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb") as file:
        output = TextOutput(file.fileno())
        await output.write("one ")
        await output.write("")
        await output.write("twö")
    assert path.read_text(encoding="utf-8") == "one twö"


async def test_a_full_pipe_can_be_left() -> None:
    read_end, write_end = os.pipe()
    try:
        with trio.move_on_after(0.05) as scope:
            await TextOutput(write_end).write("x" * 1_000_000)
        assert scope.cancelled_caught
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_a_reader_that_has_gone() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with trio.fail_after(5), pytest.raises(BrokenPipeError):
            await TextOutput(write_end).write("x")
    finally:
        os.close(write_end)
