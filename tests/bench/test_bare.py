"""`trio-runner bench --bare`: every round as JSON, and one turn at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.programs import program
from tests.tiny_models import tiny_model
from trio_runner.bench.bare import Case, cases

ONE_THREAD = ["--threads", "1"]


def test_cases_say_what_they_are() -> None:
    named = {case.name: case.n_tokens for case in cases([16, 1900], [1, 4], 64)}
    assert named == {
        "prefill of 16 tokens": 16,
        "prefill of 1,900 tokens": 1900,
        "decode, 1 stream": 64,
        "decode, 4 streams": 256,
    }
    assert Case(16, n_times=3).n_tokens == 48


@pytest.mark.parametrize(
    "fields",
    [{"n_prompt": 0}, {"n_prompt": 1, "n_streams": 0}, {"n_prompt": 1, "n_times": 0}, {"n_prompt": 1, "n_streams": 2}],
)
def test_cases_without_anything_to_measure_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a case needs|with one stream"):
        Case(**fields)


async def test_every_round_is_in_the_json(tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path))
    options = ["--slots", "3", "--repeat", "2", "-n", "4", "--context-length", "64", "--json", "-", *ONE_THREAD]
    what = ["--prompt-tokens", "16", "--prompt-tokens", "40", "--streams", "1", "--streams", "3"]
    async with program("bench", "--bare", "-m", model, *options, *what, toy=False) as runner:
        assert await runner.ended() == 0, runner.log
    results = json.loads(runner.output)["results"]
    assert [result["name"] for result in results] == [
        *("prefill of 16 tokens", "prefill of 40 tokens", "decode, 1 stream", "decode, 3 streams")
    ]
    for result in results:
        assert len(result["rounds"]) == 2
        for turns in result["rounds"]:
            assert set(turns) == {"engine", "bare"}
            assert all(turn["rate"] > 0 < turn["cpu_seconds"] for turn in turns.values())
        assert result["engine"] == pytest.approx(sum(turns["engine"]["rate"] for turns in result["rounds"]) / 2)


async def test_a_turn_is_measured_for_each_line(tmp_path: Path) -> None:
    model = str(tiny_model("llama", tmp_path))
    asked = [
        {"loop": "engine", "n_prompt": 1, "n_decode": 5},
        {"loop": "bare", "n_prompt": 20, "n_times": 3},
        {"loop": "engine", "n_prompt": 20, "n_decode": 2, "reuse": True},
        {"loop": "neither", "n_prompt": 20},
        {"loop": "engine", "n_prompt": 80},
        {"loop": "engine", "n_prompt": 1, "n_streams": 2, "n_decode": 1},
        {"loop": "engine"},
        [],
        {"loop": "engine", "n_prompt": 20, "n_decode": 2, "reuse": True},
    ]
    stdin = "".join(json.dumps(line) + "\n" for line in asked).encode()
    options = ["--slots", "1", "--context-length", "64", *ONE_THREAD]
    async with program("bench", "--bare", "--turns", "-m", model, *options, toy=False, stdin=stdin) as runner:
        assert await runner.ended() == 0, runner.log
    loaded, decode, prefill, first, *refused, again = (json.loads(line) for line in runner.output.splitlines())
    assert loaded["peak"] >= loaded["memory"] > 0
    assert loaded["bytes"] > loaded["weights"] > loaded["output_weights"] > 0
    assert loaded["are_floats"]
    assert decode["n_batches"] == 6
    assert decode["threads"]["MainThread"] > 0
    assert prefill["n_batches"] == 0
    assert prefill["rate"] > 0
    assert first["n_batches"] == again["n_batches"] == 3
    assert [answer["error"] for answer in refused] == [
        "there is no loop neither",
        "prompt has 80 tokens, but at most 63 fit",
        "2 streams need as many slots, and there are 1",
        "Case.__init__() missing 1 required positional argument: 'n_prompt'",
        "'str' object cannot be interpreted as an integer",
    ]
