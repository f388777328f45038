"""`perf` on a tiny model, where it is installed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench.deadline import deadline
from tests.tiny_models import tiny_model
from trio_runner.bench import step_profile
from trio_runner.bench.contenders import OwnProcess

__all__ = ["deadline"]  # a fixture
pytestmark = pytest.mark.usefixtures("deadline")


def test_without_perf_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = CliRunner().invoke(step_profile.main, ["--model", str(tiny_model("llama", tmp_path))])
    assert ended.exit_code == 1
    assert "perf is missing. On Debian run: sudo apt install linux-perf" in ended.stderr


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_the_time_of_a_step_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "CASE_SECONDS", 0.5)
    monkeypatch.setitem(step_profile.CASES, "decode", replace(step_profile.CASES["decode"], n_decode=32))
    model = ["--model", str(tiny_model("llama", tmp_path))]
    ended = CliRunner().invoke(step_profile.main, [*model, "--case", "decode", "--functions", "3"])
    if "perf does not work here" in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.exit_code == 0, ended.output
    title, *lines = ended.stdout.splitlines()
    assert title.startswith("decode, 1 stream, 1 tokens before: ")
    rows = [line.split(" ms  ") for line in lines[: lines.index(" functions:")]]
    kinds = {kind: float(figures.split("%")[0]) for figures, kind in rows}
    assert sum(kinds.values()) == pytest.approx(100, abs=1)
    assert {"Python, decode thread", "graphs, memory, batches"} <= kinds.keys()
    assert sum(" ms    " in line for line in lines) == 3  # functions


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_a_perf_that_fails_is_reported(tmp_path: Path) -> None:
    perf = step_profile.Perf(tmp_path, None)
    with pytest.raises(step_profile.ProfilerFailed, match="perf does not work here: "), perf.sampling(2**22 + 1):
        pytest.fail("there is no such process")


def test_the_decode_thread_is_found_by_its_name(tmp_path: Path) -> None:
    with OwnProcess(tiny_model("llama", tmp_path), slots=1, context=256, threads=1) as child:
        threads = child.turn("engine", step_profile.CASES["decode"])["threads"]
        assert sum(step_profile.DECODE_THREAD in name for name in threads) == 1
