"""CPU kernels in turns: the rounds on a tiny model beside a peer that is made up, and the tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.bench.deadline import deadline
from tests.bench.fake_peer import fake_peer, write_program
from tests.tiny_models import tiny_model
from trio_runner.bench.bare import Case
from trio_runner.bench.contenders import Child, ContenderFailed, Loaded, Sample, read_batched_bench, read_llama_bench
from trio_runner.bench.kernel_table import Limits, Loads, Measured, markdown
from trio_runner.bench.kernels import Plan, main

__all__ = ["deadline"]  # a fixture
pytestmark = pytest.mark.usefixtures("deadline")

RATE = 1234.5
LOADED = Loaded(
    seconds=2.0, memory=50.0, peak=60.0, bytes=10**9, weights=10**8, output_weights=2 * 10**7, are_floats=False
)
SMALL = ["--rounds", "1", "--prompts", "16,600", "--streams", "1,2", "--tokens", "4"]


def run_kernels(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_every_contender_is_measured_in_every_round(tmp_path: Path) -> None:
    model, out, table = tiny_model("llama", tmp_path), tmp_path / "out.json", tmp_path / "out.md"
    limits = tmp_path / "limits.json"
    limits.write_text('{"reads": {"1": 10}, "int8": {"1": 100}, "f32": {"1": 50}}')
    files = ["--json", str(out), "--markdown", str(table), "--limits", str(limits)]
    peer = fake_peer(tmp_path, rate=RATE)
    ended = run_kernels("--model", f"tiny={model}", "--peer", str(peer), *SMALL, *files)
    assert ended.exit_code == 0, ended.output
    document = json.loads(out.read_text())
    measured = document["cases"]
    assert [case["case"]["n_prompt"] for case in measured] == [16, 600, 16, 16]
    assert [case["case"]["n_streams"] for case in measured] == [1, 1, 1, 2]
    for case in measured:
        [samples] = case["rounds"]
        assert sorted(samples) == ["bare", "engine", "peer", "upstream"]
        assert samples["peer"]["rate"] == pytest.approx(RATE)
        assert all(samples[name]["rate"] > 0 < samples[name]["cpu"] for name in ("bare", "engine", "upstream"))
    [loads] = document["loads"]
    assert len(loads["rounds"]) == 1
    assert all(0 < child["memory"] <= child["peak"] + 1 for pair in loads["rounds"] for child in pair)
    assert all(child["bytes"] < model.stat().st_size for pair in loads["rounds"] for child in pair)
    lines = table.read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:6]] == [
        *("prefill of 16 tokens", "prefill of 600 tokens", "decode, 1 stream", "decode, 2 streams")
    ]
    assert lines[-1] == (
        "The machine's limits, by threads: reads 1: 10.0 GB/s; products of bytes 1: 100.0 GMAC/s; "
        "products of floats 1: 50.0 GMAC/s."
    )


def test_several_streams_are_measured_without_a_peer_that_can(tmp_path: Path) -> None:
    peer, out = fake_peer(tmp_path, rate=RATE), tmp_path / "out.json"
    peer.with_name("llama-batched-bench").unlink()
    options = ["--rounds", "1", "--prompts", "16", "--streams", "2", "--tokens", "2", "--no-loads", "--json", str(out)]
    ended = run_kernels("--model", f"tiny={tiny_model('llama', tmp_path)}", "--peer", str(peer), *options)
    assert ended.exit_code == 0, ended.output
    prefill, streams = json.loads(out.read_text())["cases"]
    assert "peer" in prefill["rounds"][0]
    assert "peer" not in streams["rounds"][0]
    assert "| - |" in ended.stdout


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('it has no such model')", "ended with 1: it has no such model"),
        ("print('no JSON')", "the peer's output is not llama-bench's JSON"),
    ],
)
def test_a_peer_that_fails_is_reported(program: str, message: str, tmp_path: Path) -> None:
    peer = write_program(tmp_path / "peer", program)
    ended = run_kernels("--model", f"tiny={tiny_model('llama', tmp_path)}", "--peer", str(peer), "--no-loads", *SMALL)
    assert ended.exit_code == 1
    assert message in ended.stderr


def test_a_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    ended = run_kernels("--model", f"bad={tmp_path / 'bad.gguf'}", *SMALL)
    assert ended.exit_code == 1
    assert "Error: a child process has ended without an answer" in ended.stderr


def test_a_child_that_answers_anything_else_is_reported() -> None:
    with (
        Child([sys.executable, "-S", "-c", "print('loading')"]) as child,
        pytest.raises(ContenderFailed, match="sent an answer that is not JSON: 'loading"),
    ):
        child.receive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model {0}", "is not NAME=FILE of a model"),
        ("--model tiny=/nowhere", "is not NAME=FILE of a model"),
        ("--model tiny={0} --prompts 16,x", "16,x is not a list of numbers"),
        ("--model tiny={0} --streams 0", "numbers start at 1"),
        ("--model tiny={0} --peer /nowhere", "does not exist"),
    ],
)
def test_wrong_command_lines_are_refused(options: str, message: str, tmp_path: Path) -> None:
    ended = run_kernels(*options.format(tiny_model("llama", tmp_path)).split())
    assert ended.exit_code == 2
    assert message in " ".join(ended.stderr.split())


def test_several_streams_may_be_for_some_models_only() -> None:
    plan = Plan(1, 1, (16,), (1, 4), streams_of=("b",), n_decode=8, loads=False)
    alone = [Case(16, n_times=32), Case(16, 1, 8)]
    assert list(plan.groups("a")) == [alone]
    assert list(plan.groups("b")) == [alone, [Case(16, 4, 8)]]


def measured(case: Case, *rates: tuple[float, float]) -> Measured:
    """Rounds with a rate of the engine and one of the peer."""
    rounds = tuple({"engine": Sample(ours, 0.001), "peer": Sample(theirs, 0.002)} for ours, theirs in rates)
    return Measured("q8_0", case, LOADED, rounds)


def test_the_ratio_is_that_of_the_rounds() -> None:
    """The machine is slow in one round for both, which says nothing about either."""
    of_rounds = measured(Case(16), (10, 20), (100, 200), (11, 22))
    assert of_rounds.ratio("peer") == (0.5, 0.5, 0.5)
    assert of_rounds.ratio("upstream") is None
    assert of_rounds.rate("engine") == 11


def test_the_limit_is_the_slower_of_reads_and_products() -> None:
    limits = Limits(reads={"2": 20.0}, int8={"2": 400.0}, f32={"2": 50.0})
    decode, streams, prompt = Case(16, 1, 64), Case(16, 4, 64), Case(2000)
    of_a_row = 0.08 + 0.02 / 2000  # 10^9 products of a row of the prompt; only the last row has logits
    assert measured(decode, (5, 5)).share(limits, 2) == pytest.approx(5 * 1 / 20)
    assert measured(streams, (40, 40)).share(limits, 2) == pytest.approx(40 / 4 * 1 / 20)
    assert measured(prompt, (1000, 1000)).share(limits, 2) == pytest.approx(1000 * of_a_row / 400)
    of_floats = dataclasses.replace(measured(prompt, (100, 100)), loaded=dataclasses.replace(LOADED, are_floats=True))
    assert of_floats.share(limits, 2) == pytest.approx(100 * of_a_row / 50)
    assert measured(prompt, (1000, 1000)).share(limits, 1) is None
    assert measured(prompt, (1000, 1000)).share(None, 2) is None


def test_what_was_not_measured_is_left_open_in_the_table() -> None:
    table = markdown([measured(Case(512), (30, 20), (30, 20))], [], None, threads=2)
    row = table.splitlines()[2]
    assert row == (
        "| q8_0 | prefill of 512 tokens | 30.0 | - | - | 20.0 | 1.50 (1.50 to 1.50) | - | - | - | 1.00 | 2.00 |"
    )


def test_memory_that_cannot_be_seen_is_left_open() -> None:
    loads = Loads("q8_0", ((dataclasses.replace(LOADED, memory=0.0), dataclasses.replace(LOADED, memory=0.0)),))
    assert "| q8_0 | 2.00 | 1.00 (1.00 to 1.00) | - | - | 60.0 | 1.00 (1.00 to 1.00) |" in markdown(
        [], [loads], None, 1
    )


@pytest.mark.parametrize("output", ["", "[]", "[{}, {}]", '[{"samples_ns": 1}]', '{"samples_ns": [1]}'])
def test_what_is_not_llama_bench_is_refused(output: str) -> None:
    with pytest.raises(ContenderFailed, match="not llama-bench's JSON"):
        read_llama_bench(output)


def test_the_table_of_batched_bench_is_read() -> None:
    rows = [
        "main: n_kv_max = 512",
        "| PP | TG | S_TG t/s |",
        "|----|----|------|",
        "| 16 | 8 | 12.50 |",
        "| 16 | 8 | 9 |",
    ]
    assert read_batched_bench("\n".join(rows)) == [12.5, 9.0]
    with pytest.raises(ContenderFailed, match="not llama-batched-bench's table"):
        read_batched_bench("| PP | TG |\n")
