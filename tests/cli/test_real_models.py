"""The whole program, with the native library and tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.programs import exchange, program, request
from tests.tiny_models import CHAIN_TEXT, tiny_model

ONE_THREAD = ["--threads", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


async def test_run_prints_the_text(models: Path) -> None:
    chain = str(tiny_model("chain", models))
    async with program("run", "hello", "-m", chain, "--temperature", "0", *ONE_THREAD, toy=False) as runner:
        assert await runner.ended() == 0
        assert runner.output.decode() == CHAIN_TEXT
        assert not runner.log


async def test_run_can_be_interrupted(models: Path) -> None:
    llama = str(tiny_model("llama", models))
    async with program("run", "hello", "-m", llama, "--shift", *ONE_THREAD, toy=False) as runner:
        await runner.printed(20)
        runner.interrupt()
        assert await runner.ended() == 130
        assert "Traceback" not in runner.log


async def test_an_adapter_changes_the_text(models: Path) -> None:
    command = ["run", "hello world", "-m", str(tiny_model("llama", models)), "--temperature", "0", "-n", "16"]
    lora = str(tiny_model("lora", models))
    said = []
    for options in ([], ["--lora-scaled", f"{lora}=0"], ["--lora", lora]):
        async with program(*command, *options, *ONE_THREAD, toy=False) as runner:
            assert await runner.ended() == 0, runner.log
            said.append(runner.output)
    assert said[0] == said[1] != said[2]


async def test_serve_completes_a_prompt(models: Path) -> None:
    arguments = ["serve", "--model", str(tiny_model("chain", models)), "--port", "0", "--slots", "2", *ONE_THREAD]
    async with program(*arguments, toy=False) as runner:
        port = await runner.listening()
        await runner.logged("model loaded")
        response = await exchange(port, "/completion", {"prompt": "hello", "temperature": 0})
        lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", response, re.MULTILINE)]
        assert "".join(line["content"] for line in lines) == CHAIN_TEXT
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log


async def test_the_dropin_drains(models: Path) -> None:
    flags = f"-model {tiny_model('llama', models)} -ctx-size 512 -parallel 2 -threads 1 -flash-attn -embedding -port 0"
    async with program(*flags.split(), toy=False) as runner:
        port = await runner.listening()
        await runner.logged("model loaded")
        stream = await request(port, "/completion", {"prompt": "hello", "n_predict": -1, "cache_prompt": True})
        await stream.receive_some()
        runner.terminate()
        assert await runner.ended() == 0
        assert "Traceback" not in runner.log
        await stream.aclose()


@pytest.mark.parametrize(
    ("arguments", "line"), [(["run", "x", "-m"], "error: "), (["-model"], "error: error loading model ")]
)
async def test_a_file_that_is_no_model_is_refused(arguments: list[str], line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    async with program(*arguments, str(path), toy=False) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1].startswith(f"{line}{path}: ")
        assert "Traceback" not in runner.log


async def test_embed_prints_embeddings(models: Path) -> None:
    bert = str(tiny_model("bert", models))
    async with program("embed", "one", "two", "one", "-m", bert, *ONE_THREAD, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
        one, two, again = (json.loads(line) for line in runner.output.splitlines())
    assert len(one) == 64
    assert one == pytest.approx(again, abs=1e-5)
    assert one != pytest.approx(two, abs=1e-3)


async def test_info_prints_facts(models: Path) -> None:
    llama = str(tiny_model("llama", models))
    async with program("info", "--json", "-m", llama, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
        facts = json.loads(runner.output)
    assert list(facts) == ["model", "context", "placement", "devices", "backends", "library"]
    assert facts["model"]["architecture"] == "llama"
    assert facts["model"]["chat template"] is True
    assert "CPU" in facts["devices"]
    async with program("info", "-m", llama, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
        lines = runner.output.decode().splitlines()
    width = max(len(name) for section in facts.values() for name in section)
    for name, value in (facts["model"] | facts["context"]).items():  # in one column
        assert f"  {name:<{width}} {value}" in lines


async def test_requirements_are_one_line_of_json() -> None:
    async with program("--requirements", toy=False) as runner:
        assert await runner.ended() == 0
        assert runner.output.endswith(b"}\n")
        facts = json.loads(runner.output)
    assert list(facts) == ["cpu_features", "system_info", "version"]
    assert all(isinstance(value, str) and value for value in facts.values())


async def test_bench_compares_with_a_bare_loop(models: Path) -> None:
    options = ["--bare", "--slots", "2", "--repeat", "1", "--prompt-tokens", "40", "-n", "4", "--context-length", "64"]
    async with program("bench", "-m", str(tiny_model("llama", models)), *options, *ONE_THREAD, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
        head, *rows = runner.output.decode().splitlines()
        assert head.split() == ["tokens", "per", "second", "engine", "bare", "loop", "ratio"]
        assert [row[:20].strip() for row in rows] == ["prefill of 40 tokens", "decode, 1 stream", "decode, 2 streams"]
        assert all(float(figure) > 0 for row in rows for figure in row[20:].split())


async def test_bench_refuses_a_prompt_that_does_not_fit(models: Path) -> None:
    options = ["--bare", "--prompt-tokens", "100", "--context-length", "64"]
    async with program("bench", "-m", str(tiny_model("llama", models)), *options, *ONE_THREAD, toy=False) as runner:
        assert await runner.ended() == 1
        assert "error: prompt has 100 tokens, but at most 63 fit" in runner.log
