"""TRIO_RUNNER_MATMUL=ggml gives upstream's products back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llama.one_operation import plugins
from tests.llama.running import Running
from tests.tiny_wide import wide_model
from trio_runner.sampling import SamplingParams

PARAMS = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=20)
BLUR = 0.5
"""Nats by which 8 bits of activations may change log-probabilities of this model."""


PROGRAM = (
    "import logging, sys; from pathlib import Path; from tests.llama.test_matmul_choice import *;"
    "logging.basicConfig(level=logging.INFO, stream=sys.stdout); print(*logprobs(Path(sys.argv[1])))"
)


def logprobs(path: Path) -> list[float]:
    return [info.logprob for info in Running(path).generate(n_tokens=1, params=PARAMS)[0].top]


def run(path: Path, choice: str) -> tuple[str, list[float]]:
    """The log and the log-probabilities of a process of its own: the environment is read once."""
    environment = {**os.environ, "TRIO_RUNNER_MATMUL": choice, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    log, _, told = done.stdout.strip().rpartition("\n")
    return log, [float(number) for number in told.split()]


def test_upstreams_products_can_be_chosen(tmp_path: Path) -> None:
    """Upstream keeps weights in a layout of its own, a copy of the file's. Our products take them from the file."""
    path = wide_model("wide", "q4_0", tmp_path)
    log, ours = run(path, "")
    upstreams_log, theirs = run(path, "ggml")
    assert theirs != ours
    assert theirs[:3] == pytest.approx(ours[:3], abs=BLUR)
    assert "model buffer size" in log
    assert "CPU_REPACK" not in log
    if plugins()[0].library.ggml_cpu_has_avx2():
        assert "CPU_REPACK model buffer size" in upstreams_log
