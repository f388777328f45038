"""The keyword arguments that type checkers see are those of the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.options import EngineOptions, GenerateOptions
from trio_runner.parameters import parameters_of
from trio_runner.request import EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.sampling import SamplingParams

ROOT = Path(__file__).parent.parent


def all_names(options: type) -> set[str]:
    return set(options.__annotations__)  # of a TypedDict: those of its bases included


def test_the_written_options_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "ci/write_options.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_sampling_parameter_is_an_argument_of_generate() -> None:
    assert set(parameters_of(SamplingParams)) <= all_names(GenerateOptions)
    assert set(parameters_of(EngineConfig)) == all_names(EngineOptions)


@pytest.mark.parametrize(
    "cls", [SamplingParams, GenerateRequest, EmbedRequest, RerankRequest, ModelConfig, EngineConfig]
)
def test_every_parameter_is_documented_in_full_sentences(cls: type) -> None:
    for parameter in parameters_of(cls).values():
        assert parameter.doc[0].isupper() or parameter.doc.split(":")[0] in parameter.choices or ":" in parameter.doc
        assert parameter.doc.endswith("."), parameter.name
