"""Embeddings in turns: the engine on a tiny encoder, beside a program that is made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.bench.deadline import deadline
from tests.tiny_models import tiny_model
from trio_runner.bench import embedding_turns
from trio_runner.bench.embedding_turns import cosine, main, table, texts_of

__all__ = ["deadline"]  # a fixture
pytestmark = pytest.mark.usefixtures("deadline")

OTHER = """
import json, sys
assert json.loads(sys.stdin.readline()) == {"threads": 1}
for line in sys.stdin:
    texts = json.loads(line)["texts"]
    assert len({len(text) for text in texts}) == 1
    print(json.dumps({"seconds": 0.5, "cpu_seconds": 0.25, "vector": [1.0] * 64}), flush=True)
"""
BROKEN = 'print(\'{"error": "no model"}\')'


def run(directory: Path, program: str, *options: str) -> Result:
    model = ["--model", str(tiny_model("bert", directory)), "--texts", "8", "--tokens", "5", "--rounds", "2"]
    return CliRunner().invoke(main, [*model, "--slots", "2", *options, "--", sys.executable, "-S", "-c", program])


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CLS": 1, "SEP": 2, "WORDS": range(3, 30)}.items():
        monkeypatch.setattr(embedding_turns, name, value)


def test_both_embed_the_same_texts_in_turns(tmp_path: Path) -> None:
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    ended = run(tmp_path, OTHER, "--json", str(out), "--markdown", str(markdown))
    assert ended.exit_code == 0, ended.output
    rounds = json.loads(out.read_text())["rounds"]
    assert len(rounds) == 2
    assert all(turns["engine"]["seconds"] > 0 < turns["engine"]["cpu_seconds"] for turns in rounds)
    assert all(len(turns["engine"]["vector"]) == 64 for turns in rounds)
    assert "| other | 16.0 | 31.25 |" in markdown.read_text()


def test_a_program_that_fails_is_reported(tmp_path: Path) -> None:
    assert run(tmp_path, BROKEN).exit_code == 1
    assert "Error: no model" in run(tmp_path, BROKEN).stderr


def test_texts_are_the_same_in_every_call() -> None:
    assert texts_of(3, 6) == texts_of(3, 6)
    assert {(text[0], text[-1], len(text)) for text in texts_of(3, 6)} == {(1, 2, 6)}


def test_the_table_has_the_ratio_of_the_rounds() -> None:
    rounds = [
        {
            "engine": {"seconds": slow, "cpu_seconds": 0.1, "vector": [1.0, 0.0]},
            "other": {"seconds": 2 * slow, "cpu_seconds": 0.2, "vector": [1.0, 1.0]},
        }
        for slow in (0.5, 5.0, 0.6)
    ]
    lines = table(rounds, 60).splitlines()
    assert lines[2:4] == ["| engine | 100.0 | 1.67 |", "| other | 50.0 | 3.33 |"]
    assert lines[-1] == (
        "engine / other: 2.00 (2.00 to 2.00). The cosine of the two embeddings of the first text is 0.7071."
    )
    assert cosine([3.0, 4.0], [3.0, 4.0]) == pytest.approx(1)
