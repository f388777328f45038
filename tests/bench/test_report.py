"""Results as a table, as markdown, as JSON and as a plot."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trio_runner.bench import report
from trio_runner.bench.client import Address
from trio_runner.bench.dialects import DIALECTS, DialectName
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.rounds import Outcome
from trio_runner.bench.scenarios import Load
from trio_runner.bench.server import Server

FAST, COUNT = Metric("fast", "tokens/s"), Metric("count", "")


def server(dialect: DialectName, port: int) -> Server:
    return Server(f"http://h:{port}", Address("h", port), DIALECTS[dialect](), 4)


def outcomes(*dialects: DialectName) -> list[Outcome]:
    servers = [server(dialect, port) for port, dialect in enumerate(dialects, 1)]
    found = [
        Outcome(
            "speed", each, [Measured({FAST: [10.0 * i], COUNT: [i]}), Measured({FAST: [30.0 * i, 32.0 * i]}, ["oh"])]
        )
        for i, each in enumerate(servers, 1)
    ]
    return [*found, *(Outcome("more", each, unavailable="cannot") for each in servers)]


def test_rows_have_statistics_and_ratios() -> None:
    fast, count = report.rows(outcomes("runner", "llama"))
    assert (fast.scenario, fast.metric) == ("speed", FAST)
    ours, theirs = fast.columns
    assert ours is not None
    assert theirs is not None
    assert (ours.n, ours.median, ours.maximum) == (3, 30.0, 32.0)
    assert theirs.median == 60.0
    assert fast.ratio == 0.5
    assert count.ratio is None


def test_one_server_has_no_ratio() -> None:
    assert report.rows(outcomes("runner"))[0].ratio is None
    assert "/" not in report.markdown(outcomes("runner"), seed=3).splitlines()[0]


def test_differences_have_no_ratio() -> None:
    rest = Metric("what is left", "ms", difference=True)
    both = outcomes("runner", "llama")
    for outcome in both[:2]:
        outcome.rounds[0].add(rest, 0.5)
    [row] = [row for row in report.rows(both) if row.metric == rest]
    assert [column and column.median for column in row.columns] == [0.5, 0.5]
    assert row.ratio is None


def test_a_metric_of_one_server_has_no_ratio() -> None:
    both = outcomes("runner", "llama")
    both[1].rounds.clear()
    row = report.rows(both)[0]
    assert row.columns[1] is None
    assert row.ratio is None


def test_the_markdown_table() -> None:
    assert report.markdown(outcomes("runner", "llama"), seed=3) == (
        "| scenario | measure | runner median | runner p99 | runner max | runner n"
        " | llama median | llama p99 | llama max | llama n | runner / llama |\n"
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |\n"
        "| speed | fast (tokens/s) | 30 | 32 | 32 | 3 | 60 | 64 | 64 | 3 | 0.50 |\n"
        "| speed | count | 1 | 1 | 1 | 1 | 2 | 2 | 2 | 1 | - |\n"
        "| more | - | - | - | - | - | - | - | - | - | - |\n"
        "\n"
        "* speed, runner at http://h:1: oh\n"
        "* speed, llama at http://h:2: oh\n"
        "* more, runner at http://h:1: -, cannot\n"
        "* more, llama at http://h:2: -, cannot\n"
        "* seed 3\n"
    )


def test_one_server_in_two_dialects_has_two_columns() -> None:
    both = outcomes("openai-chat", "runner")
    address = both[0].server.address
    for outcome in both:
        outcome.server = replace(outcome.server, url="http://h:1", address=address)
    header = report.markdown(both, seed=3).splitlines()[0]
    assert header.endswith(" openai-chat / runner |")
    servers = report.document(both, seed=3, repeat=2, load=Load())["servers"]
    assert [server["dialect"] for server in servers] == ["openai-chat", "runner"]


def test_the_terminal_table() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(outcomes("runner", "runner")))
    text = console.export_text()
    assert "A runner" in text
    assert "fast (tokens/s)" in text


def test_the_json_document() -> None:
    document = report.document(outcomes("runner", "llama"), seed=3, repeat=2, load=Load())
    assert json.loads(json.dumps(document))["results"][0]["servers"][0]["median"] == 30
    assert document["results"][0]["rounds"] == (((10.0,), (30.0, 32.0)), ((20.0,), (60.0, 64.0)))
    assert document["load"]["long_prompt"] == 1900
    assert document["machine"]["cores"] > 0


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.md"
    for text in ("old", "new"):
        report.write(path, text)
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError):
        report.write(path, "\ud800")
    assert path.read_text() == "new"
    (tmp_path / "link").symlink_to(path)
    report.write(tmp_path / "link", "newer")
    assert path.read_text() == "newer"


@pytest.mark.parametrize("dialects", [("runner",), ("runner", "llama")])
def test_the_plot(dialects: tuple[DialectName, ...], tmp_path: Path) -> None:
    report.plot(outcomes(*dialects), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report.plot([], tmp_path / "empty.svg")
    assert b"<svg" in (tmp_path / "empty.svg").read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3, "3"),
        (-2, "-2"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (45.67, "45.7"),
        (4.567, "4.57"),
        (0.0012345, "0.0012"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_keep_two_digits(value: float, text: str) -> None:
    assert report.number(value) == text
