"""What `run` makes of its command line: a prompt and a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calls import Call
from trio_runner.cli import generate
from trio_runner.cli.generate import make_prompt
from trio_runner.cli.main import main
from trio_runner.request import Chat, GenerateRequest
from trio_runner.sampling import SamplingParams


def test_the_request_of_run(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GenerateRequest] = []

    def request_of_run(*arguments: object) -> GenerateRequest:
        made.append(make(*arguments))  # type: ignore[arg-type]  # whatever they are
        return made[-1]

    make = generate.request_of_run
    monkeypatch.setattr(generate, "request_of_run", request_of_run)

    assert main(["run", "prompt"]) == 0
    assert made[-1] == GenerateRequest(prompt="prompt", shift=False)
    (tmp_path / "grammar").write_text('root ::= "é"', encoding="utf-8")
    options = ["-n", "3", "--stop", "a", "--stop", "b", "--shift", "--temperature", "0", "--top-k", "5", "--seed", "7"]
    assert main(["run", "prompt", *options, "--grammar-file", str(tmp_path / "grammar")]) == 0
    assert made[-1] == GenerateRequest(
        prompt="prompt",
        max_tokens=3,
        stop=("a", "b"),
        shift=True,
        sampling=SamplingParams(temperature=0.0, top_k=5, seed=7, grammar='root ::= "é"'),
    )
    (tmp_path / "schema").write_text('{"const": "é"}', encoding="utf-8")
    assert main(["run", "prompt", "--json-schema", str(tmp_path / "schema")]) == 0
    assert made[-1].sampling == SamplingParams(json_schema='{"const": "é"}')


def test_the_prompt_of_run() -> None:
    a, b = Path("a.png"), Path("b.png")
    assert make_prompt("hello", (), False) == "hello"
    assert make_prompt("hello", (a, b), False) == (a, b, "hello")
    assert make_prompt("hello", (), True) == Chat(messages=({"role": "user", "content": "hello"},))
    parts = [{"type": "image", "image": a}, {"type": "image", "image": b}, {"type": "text", "text": "hello"}]
    assert make_prompt("hello", (a, b), True) == Chat(messages=({"role": "user", "content": parts},))
