"""How far weights of each type are from float32, with our products and with llama.cpp's.

    python -m tests.accuracy                                   # the default model, every type, 5,000 tokens: an hour
    python -m tests.accuracy --types q4_0,q8_0 --tokens 300

The reference is the model with its weights as float32, and llama.cpp's products. For each type they are quantised from
there. Two figures compare it with the reference, over a text from docs/: perplexity, and the mean Kullback-Leibler
divergence in nats, over the whole vocabulary. Both kinds of products read the same file. A process chooses between them
when it starts, so each type is scored in two processes.

Matrices whose rows are no whole number of blocks stay float32; the last column says how many of the weights do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from tests.llama.running import Running
from tests.weight_types import OTHER_TYPES, OUR_TYPES, convert
from trio_runner.core.batch import Batch, BatchKind, Chunk, DecodeOutcome, Scoring
from trio_runner.core.memory import Trim
from trio_runner.llama.library import check, native
from trio_runner.models import DEFAULT_MODEL, resolve_model

ROOT: Final = Path(__file__).parent.parent
WINDOW: Final = 500
"""Tokens of a part of the text. Nothing before it is known."""
BATCH: Final = 64
"""Rows of a step: that many logits are kept at a time."""
UPSTREAM: Final = {"TRIO_RUNNER_MATMUL": "ggml"}
"""What llama.cpp's products are chosen by, in the environment."""

Logprobs = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good a model is at a text."""

    perplexity: float
    divergence: float
    """Mean Kullback-Leibler divergence from the reference, in nats."""


def log_probabilities(running: Running, tokens: Sequence[int]) -> Iterator[tuple[int, Logprobs]]:
    """Each token but the first of its window, with the log-probabilities of the whole vocabulary at its place."""
    for begin in range(0, len(tokens), WINDOW):
        window = tokens[begin : begin + WINDOW]
        assert running.context.apply(Trim(0, 0))
        for start in range(0, len(window), BATCH):
            part = tuple(window[start : start + BATCH])
            follower = window[start + BATCH] if start + BATCH < len(window) else None
            yield from _scored(running, start, part, Scoring(0, follower))


def _scored(running: Running, start: int, part: tuple[int, ...], scoring: Scoring) -> Iterator[tuple[int, Logprobs]]:
    chunk = Chunk(0, 0, start, part, output=False)
    batch = Batch((chunk,), BatchKind(scored=True), scoring={0: scoring})
    result = running.context.decode(batch, {})
    assert result.outcome is DecodeOutcome.OK, result.message
    ffi, lib = native().ffi, native().lib
    n_vocab = running.model.info.n_vocab
    order, sorted_values = np.empty(n_vocab, np.int32), np.empty(n_vocab, np.float32)
    pointers = ffi.from_buffer("int32_t[]", order), ffi.from_buffer("float[]", sorted_values)
    for row, token in scoring.rows(chunk):
        own = ffi.new("float *")
        check("trio_score", lib.trio_score(running.context.handle, row, token, n_vocab, own, *pointers))
        values = np.empty(n_vocab, np.float32)
        values[order] = sorted_values
        yield token, values


def write_reference(path: Path, running: Running, tokens: Sequence[int]) -> None:
    """Write the log-probabilities of a model, one row for each token that is scored."""
    with path.open("wb") as file:
        for _, values in log_probabilities(running, tokens):
            file.write(values.tobytes())


def accuracy(running: Running, tokens: Sequence[int], reference: Path) -> Accuracy:
    """How good a model is at a text, beside what `write_reference` wrote about the same text."""
    n_vocab = running.model.info.n_vocab
    rows = np.memmap(reference, np.float32, "r").reshape(-1, n_vocab)
    own, divergences = [], []
    for (token, values), expected in zip(log_probabilities(running, tokens), rows, strict=True):
        exact = expected.astype(np.float64)
        own.append(float(values[token]))
        divergences.append(float(np.sum(np.exp(exact) * (exact - values))))
    return Accuracy(float(np.exp(-np.mean(own))), float(np.mean(divergences)))


def write_reference_apart(model: Path, tokens: Path, reference: Path) -> None:
    """The same in a process of its own, with llama.cpp's products. `tokens` is a file with a JSON list."""
    _run("reference", tokens, reference, [model], UPSTREAM)


def accuracy_apart(models: Sequence[Path], tokens: Path, reference: Path, *, upstream: bool) -> list[Accuracy]:
    """How good models are, in a process of its own."""
    lines = _run("score", tokens, reference, models, UPSTREAM if upstream else {}).splitlines()
    return [Accuracy(*json.loads(line)) for line in lines]


def _run(command: str, tokens: Path, reference: Path, models: Sequence[Path], environment: dict[str, str]) -> str:
    arguments = [sys.executable, "-m", "tests.accuracy", command, str(tokens), str(reference), *map(str, models)]
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(source: Path, kinds: Sequence[str], n_tokens: int) -> None:
    """Print the table for the model `source`."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        exact, tokens, reference = work / "f32.gguf", work / "tokens.json", work / "reference"
        convert(source, exact, "f32")
        tokens.write_text(json.dumps(text_tokens(source, n_tokens)))
        write_reference_apart(exact, tokens, reference)
        print("| weights | perplexity: ours | llama.cpp's | divergence (nats): ours | llama.cpp's | of this type |")
        print("|---|--:|--:|--:|--:|--:|")
        for kind in kinds:
            path = work / f"{kind}.gguf"
            convert(exact, path, kind)
            found = [accuracy_apart([path], tokens, reference, upstream=upstream)[0] for upstream in (False, True)]
            figures = [f"{one.perplexity:.4f}" for one in found] + [f"{one.divergence:.3g}" for one in found]
            print(f"| {kind} | {' | '.join(figures)} | {_share(path, kind):.0%} |", flush=True)
            path.unlink()


def text_tokens(model: Path, n_tokens: int) -> list[int]:
    """The first tokens of the pages in docs/, in the order of their names."""
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    tokens = Running(model).tokens(text)
    assert len(tokens) >= n_tokens
    return tokens[:n_tokens]


def _share(path: Path, kind: str) -> float:
    tensors = GGUFReader(path).tensors
    of_kind = sum(int(tensor.n_elements) for tensor in tensors if tensor.tensor_type.name.lower() == kind.lower())
    return of_kind / sum(int(tensor.n_elements) for tensor in tensors)


def open_for_scoring(model: Path) -> Running:
    """The model, with a context for `log_probabilities`."""
    return Running(model, slots=1, context_length=WINDOW, batch_size=BATCH, threads=1, kv_type="f16")


def main() -> None:
    if sys.argv[1:2] in (["reference"], ["score"]):
        command, tokens_file, reference, *models = sys.argv[1:]
        tokens = json.loads(Path(tokens_file).read_text())
        for model in map(open_for_scoring, map(Path, models)):
            if command == "reference":
                write_reference(Path(reference), model, tokens)
            else:
                found = accuracy(model, tokens, Path(reference))
                print(json.dumps([found.perplexity, found.divergence]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the default model without it")
    parser.add_argument("--types", default=",".join((*OUR_TYPES, *OTHER_TYPES)))
    parser.add_argument("--tokens", type=int, default=5000)
    asked: Any = parser.parse_args()
    compare(asked.model or resolve_model(DEFAULT_MODEL.name), asked.types.split(","), asked.tokens)


if __name__ == "__main__":
    main()
