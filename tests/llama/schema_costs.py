"""What a schema costs: CPU time of a thread for each token, with and without one. No test; run it by hand:

    python -m tests.llama.schema_costs

It samples from random logits under the schemas of tests/schemas.py, without a model's weights: once with the vocabulary
of the default model, and once with one of 150,000 tokens that is made from it. For comparison it samples without a
schema, and under a GBNF grammar of JSON, which is what llama-server makes of a schema.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.llama.test_sampler import JSON
from tests.schemas import EITHER, SUPPORTED
from tests.tiny_gguf import N_EMBD, ModelFile, add_llama_layer, ones
from trio_runner.config import ModelConfig
from trio_runner.errors import RequestError
from trio_runner.llama import Model
from trio_runner.llama.library import check, native
from trio_runner.models import DEFAULT_MODEL, resolve_model
from trio_runner.sampling import SamplingParams

N_LARGE = 150_000
N_TOKENS = 64
"""Tokens of each text, at most."""
N_LOGITS = 16
"""Rows of logits, which are used in turn."""


def large_model(small: Path, directory: Path) -> Path:
    """A model with the vocabulary of `small` and pairs of its tokens, and with weights that nobody reads."""
    reader = gguf.GGUFReader(small)
    pieces = [bytes(part).decode() for part in _parts(reader, "tokenizer.ggml.tokens")]
    kinds = [int(part[0]) for part in _parts(reader, "tokenizer.ggml.token_type")]
    known, random = set(pieces), np.random.default_rng(1)
    normal = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == gguf.TokenType.NORMAL]
    while len(pieces) < N_LARGE:
        left, right = normal[random.integers(len(normal))], normal[int(random.integers(2000))]
        if left + right not in known:
            known.add(left + right)
            pieces.append(left + right)
    path = directory / "large.gguf"
    model = ModelFile(path, "llama", "large", seed=1)
    model.add_sizes(n_layer=1)
    model.add_attention(4, 2)
    writer = model.writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (N_LARGE - len(kinds)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_vocab_size(N_LARGE)
    model.add({"token_embd.weight": np.zeros((N_LARGE, N_EMBD), np.float32)})
    add_llama_layer(model, 0, n_head=4, n_head_kv=2)
    model.add({"output_norm.weight": ones(N_EMBD)})
    model.write()
    return path


def _parts(reader: gguf.GGUFReader, key: str) -> list[Any]:
    field = reader.fields[key]
    return [field.parts[index] for index in field.data]


class Costs:
    """CPU microseconds of sampling with one vocabulary."""

    def __init__(self, path: Path) -> None:
        self.model = Model(ModelConfig(path=str(path)))
        n_vocab = self.model.info.n_vocab
        random = np.random.default_rng(7)
        self.logits = random.normal(0, 3, (N_LOGITS, n_vocab)).astype(np.float32)
        for character in '"]},:':
            token = self.model.tokenize(character, add_special=False, parse_special=False)[-1]
            self.logits[:, token] += 6  # so that strings and lists come to an end, as those of models do
        self.rows = [native().ffi.from_buffer("float[]", row) for row in self.logits]

    def sample(self, params: SamplingParams, seed: int) -> list[float]:
        """Microseconds of each token of one text."""
        sampler = self.model.sampler(replace(params, seed=seed), ())
        take, n_vocab, times = native().lib.trio_sampler_sample, self.model.info.n_vocab, list[float]()
        for index in range(N_TOKENS):
            row = self.rows[(seed + index) % N_LOGITS]
            started = time.thread_time_ns()
            token = check("trio_sampler_sample", take(sampler.handle, row, n_vocab))
            times.append((time.thread_time_ns() - started) / 1000)
            if self.model.is_end(token):
                break
        return times

    def under_schemas(self, schemas: Sequence[object]) -> tuple[list[float], list[float]]:
        """Microseconds of each token, and milliseconds of compiling each schema."""
        tokens: list[float] = []
        compiling: list[float] = []
        for index, schema in enumerate(schemas):
            params = SamplingParams(json_schema=json.dumps(schema))
            started = time.thread_time_ns()
            try:
                self.model.sampler(params, ())
            except RequestError:
                continue
            compiling.append((time.thread_time_ns() - started) / 1e6)
            for seed in range(3):
                with contextlib.suppress(RequestError):  # the value was complete, and nothing may follow it
                    tokens += self.sample(params, 3 * index + seed)
        return tokens, compiling


def _line(name: str, values: Sequence[float], unit: str = "us") -> None:
    figures = np.percentile(values, [50, 99, 100])
    median, high, most = (f"{figure:.0f}" if figure >= 10 else f"{figure:.1f}" for figure in figures)
    mean, n = np.mean(values), len(values)
    print(f"{name:40s} mean {mean:7.1f}  median {median:>6s}  p99 {high:>6s}  max {most:>6s} {unit}  n = {n}")


def report(path: Path) -> None:
    costs = Costs(path)
    print(f"{costs.model.info.n_vocab} tokens")
    started = time.process_time()
    costs.model.sampler(SamplingParams(json_schema="{}"), ())
    print(f"the first schema took {time.process_time() - started:.2f} s of CPU time")
    plain = [time for seed in range(60) for time in costs.sample(SamplingParams(), seed)]
    _line("without a schema", plain)
    tokens, compiling = costs.under_schemas((*SUPPORTED, *EITHER))
    _line("with a schema", tokens)
    _line("  the difference is the schema's", [value - float(np.mean(plain)) for value in tokens])
    _line("compiling a schema (this thread's part)", compiling, "ms")
    _line("any object, by a schema", costs.under_schemas([{"type": "object"}] * 20)[0])
    _line(
        "any object, by a GBNF grammar",
        [time for seed in range(60) for time in costs.sample(SamplingParams(grammar=JSON), seed)],
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        small = resolve_model(DEFAULT_MODEL.name)
        report(small)
        report(large_model(small, Path(directory)))


if __name__ == "__main__":
    main()
