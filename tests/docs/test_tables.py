"""The tables that Sphinx makes from the code: nothing is missing in them, and nothing is in them that is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from docs._ext import tables
from tests.docs.pages import ROOT, blocks, read
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.events import FinishReason
from trio_runner.info import Capabilities, EngineStatistics, ModelInfo, Phase, SchedulerStatistics
from trio_runner.parameters import parameters_of
from trio_runner.request import EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.sampling import SamplingParams
from trio_runner.server.dialects.runner import responses
from trio_runner.server.metric_table import LLAMA_SERVER_METRICS, METRICS

RUNNER = read(ROOT / "docs" / "runner.md")


def first_cells(section: str) -> set[str]:
    """The names in the first column of the tables of a section of docs/runner.md."""
    begin = RUNNER.index(f"\n## {section}\n")
    text = RUNNER[begin : RUNNER.index("\n## ", begin + 1)]
    return set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    "cls", [SamplingParams, GenerateRequest, EmbedRequest, RerankRequest, EngineConfig, ModelConfig]
)
def test_every_parameter_has_a_row(cls: type[object]) -> None:
    table = tables.parameters(cls)
    assert [row[0] for row in table.rows] == [f"`{name}`" for name in parameters_of(cls)]
    assert all(all(row) for row in table.rows), "an empty cell"


@pytest.mark.parametrize("endpoint", ["completion", "embedding", "rerank", "adapters", "tokenize", "detokenize"])
def test_every_field_of_a_body_has_a_row(endpoint: str) -> None:
    rows = tables.wire_fields(endpoint).rows
    assert all(all(row) for row in rows), "an empty cell"


def test_the_parts_of_a_completion_are_all_of_it() -> None:
    parts = [tables.wire_fields("completion", part=part).rows for part in ("request", "sampling", "ignored")]
    assert {row for part in parts for row in part} == set(tables.wire_fields("completion").rows)
    assert all(parts)


def test_the_page_shows_each_table_of_fields() -> None:
    shown = re.findall(r"^```\{wire-fields\} (\w+)", RUNNER, re.MULTILINE)
    assert set(shown) == {"completion", "embedding", "rerank", "adapters", "tokenize", "detokenize"}


@pytest.mark.parametrize(("page", "prefix"), [("llama-server", "llama-"), ("ollama", "ollama-"), ("openai", "openai-")])
def test_the_page_of_a_dialect_shows_each_of_its_tables(page: str, prefix: str) -> None:
    text = read(ROOT / "docs" / f"{page}.md")
    shown = re.findall(r"^```\{wire-fields\} ([\w-]+)\n(?::(\w+): ([\w-]+))?", text, re.MULTILINE)
    names = {name for name in tables.BODIES if name.startswith(prefix)}
    assert {name for name, _, _ in shown} == names
    options = [(name, {option: value} if option else {}) for name, option, value in shown]
    rows = [row for name, option in options for row in tables.wire_fields(name, **option).rows]
    assert set(rows) == {row for name in names for row in tables.wire_fields(name).rows}
    assert all(all(row) for row in rows), "an empty cell"


def test_statistics_are_those_of_the_server() -> None:
    statistics = EngineStatistics("ready", 4, 0, SchedulerStatistics())
    assert first_cells("GET /statistics") == set(json.loads(responses.statistics_line(statistics)))


def test_props_are_those_of_the_server() -> None:
    info = ModelInfo(name="", architecture="", description="", n_vocab=1, n_ctx_train=1, n_embd=1)
    answer = json.loads(responses.props_line(info, Capabilities(n_slots=1, n_ctx=1, max_rows=1), None))
    assert {name.partition(".")[0] for name in first_cells("GET /props")} == {*answer, "placement"}


@pytest.mark.parametrize("name", ["serve", "run", "embed", "rerank", "info", "bench"])
def test_options_have_a_meaning(name: str) -> None:
    for option, meaning in tables.command_options(name).rows:
        assert meaning, option


def test_errors_and_bounds() -> None:
    assert ("`EngineBusy`", "503") in [row[:2] for row in tables.error_classes().rows]
    assert all(all(row) for row in (*tables.error_classes().rows, *tables.bounds().rows, *tables.commands().rows))


def test_every_page_is_in_the_index() -> None:
    index = read(ROOT / "docs" / "index.md").split()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(index)


def test_the_reference_names_everything_public() -> None:
    import trio_runner

    reference = read(ROOT / "docs" / "api.md")
    named = set(re.findall(r"^\.\. auto\w+:: trio_runner\.(\w+)", reference, re.MULTILINE))
    of_errors = {name for name in trio_runner.__all__ if hasattr(trio_runner.errors, name)}
    assert named | of_errors >= set(trio_runner.__all__)


def test_the_figures_of_the_readme_were_measured() -> None:
    measured = read(ROOT / "BENCHMARKS.md")
    readme: Path = ROOT / "README.md"
    figures = re.findall(r"\*\*(\d[\d.,]*(?: m?s)?)\*\*", read(readme))
    assert len(figures) == 3
    for figure in figures:
        assert figure in measured
    assert len(read(readme).splitlines()) <= 130


def test_every_metric_has_a_row() -> None:
    shown = [row[0] for whose in ("", "llama-server") for row in tables.metrics(whose).rows]
    entries = (*METRICS, *LLAMA_SERVER_METRICS)
    assert [name.partition("`, by")[0].strip("`") for name in shown] == [entry.name for entry in entries]
    page = read(ROOT / "docs" / "metrics.md")
    assert re.findall(r"^```\{metrics\}(.*)$", page, re.MULTILINE) == ["", " llama-server"]
    known = {entry.name for entry in entries}
    for name in re.findall(r"trio_runner_(\w+)", "".join(block.text for block in blocks("text"))):
        assert re.sub("_(bucket|count|sum)$", "", name) in known, name


def test_phases_and_reasons_have_rows() -> None:
    page = read(ROOT / "docs" / "metrics.md")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named >= {*get_args(Phase), *get_args(FinishReason), "abort"}
