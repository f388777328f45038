"""Embeddings of many texts: the engine beside another program, in turns.

    python -m trio_runner.bench.embedding_turns --model minilm.gguf --threads 2 -- /path/to/python ci/onnx_texts.py

The other program gets {"threads": N} and then lines of {"texts": [[token, ...], ...]}. It answers each of these with
{"seconds": S, "cpu_seconds": S, "vector": [...]}, where the vector is the embedding of the first text.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import click

from trio_runner.bench.contenders import Child, ContenderFailed, OwnProcess
from trio_runner.bench.figures import median_interval

CLS, SEP, WORDS = 101, 102, range(1000, 28_000)
"""Of BERT's vocabulary of 30,522 pieces: the first and the last token of every text, and tokens that are pieces of
words."""
SPARE_CELLS: Final = 64
ENGINE, OTHER = "engine", "other"


def texts_of(n_texts: int, n_tokens: int) -> list[list[int]]:
    """Texts of random pieces, the same ones in every call."""
    random = Random(0)
    return [[CLS, *random.choices(WORDS, k=n_tokens - 2), SEP] for _ in range(n_texts)]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.hypot(*one) / math.hypot(*other)


def measure(
    model: Path, command: Sequence[str], texts: list[list[int]], threads: int, slots: int, n_rounds: int
) -> list[dict[str, dict[str, Any]]]:
    """The answers of both programs in each round, after one round that is not kept. Raises `ContenderFailed`."""
    rounds = []
    context = len(texts[0]) + SPARE_CELLS
    with OwnProcess(model, slots=slots, context=context, threads=threads) as ours, Child(command) as theirs:
        theirs.send({"threads": threads})
        for number in range(n_rounds + 1):
            order = [(ENGINE, ours), (OTHER, theirs)] if number % 2 else [(OTHER, theirs), (ENGINE, ours)]
            rounds.append({name: child.ask({"texts": texts}) for name, child in order})
            click.echo(f"round {number} of {n_rounds}" if number else "warming up", err=True)
    return rounds[1:]


def table(rounds: Sequence[dict[str, dict[str, Any]]], n_texts: int) -> str:
    """What was measured, as markdown."""
    lines = ["| program | texts/s | CPU ms a text |", "| --- | --- | --- |"]
    for name in (ENGINE, OTHER):
        seconds, cpu = (statistics.median(turns[name][key] for turns in rounds) for key in ("seconds", "cpu_seconds"))
        lines.append(f"| {name} | {n_texts / seconds:.1f} | {1000 * cpu / n_texts:.2f} |")
    ratios = [turns[OTHER]["seconds"] / turns[ENGINE]["seconds"] for turns in rounds]
    low, high = median_interval(ratios)
    alike = cosine(rounds[0][ENGINE]["vector"], rounds[0][OTHER]["vector"])
    ratio = f"engine / other: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
    return "\n".join([*lines, "", f"{ratio}. The cosine of the two embeddings of the first text is {alike:.4f}.", ""])


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--model", type=click.Path(dir_okay=False, exists=True, path_type=Path), required=True, help="A GGUF file."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each program.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds.")
@click.option("--texts", "n_texts", type=click.IntRange(1), default=256, show_default=True, help="Texts of a turn.")
@click.option("--tokens", "n_tokens", type=click.IntRange(3), default=34, show_default=True, help="Tokens of a text.")
@click.option("--slots", type=click.IntRange(1), default=16, show_default=True, help="Slots of the engine.")
@click.option("--json", "json_file", type=_FILE, help="Write every round to this file.")
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the table to this file.")
@click.argument("command", nargs=-1, required=True)
def main(
    model: Path,
    threads: int,
    rounds: int,
    n_texts: int,
    n_tokens: int,
    slots: int,
    json_file: Path | None,
    markdown_file: Path | None,
    command: Sequence[str],
) -> None:
    """Embed texts with the engine and with COMMAND, in turns, and print how many texts a second that makes."""
    try:
        measured = measure(model.absolute(), command, texts_of(n_texts, n_tokens), threads, slots, rounds)
    except ContenderFailed as error:
        raise click.ClickException(str(error)) from error
    text = table(measured, n_texts)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"threads": threads, "texts": n_texts, "rounds": measured}, indent=1) + "\n", encoding="utf-8"
        )
    if markdown_file is not None:
        markdown_file.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    sys.exit(main())
