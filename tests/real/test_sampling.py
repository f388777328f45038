"""Several threads sample many sequences at once, from a vocabulary of 49,152 tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.llama.running import Running
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.errors import InvalidGrammar
from trio_runner.sampling import SamplingParams

N_SEQUENCES = 16
DEAD_END = 5
UNDER_A_SCHEMA = range(8, 12)
PARAMS = SamplingParams(temperature=1.2, top_k=200, top_p=0.98, logprobs=3)


pytest.importorskip("llguidance", reason="llguidance is not installed")


def sampled(path: Path, threads: int) -> list[dict[int, Sampled]]:
    """Samples of three steps, of sequences that differ in their first token and their seed."""
    running = Running(path, slots=N_SEQUENCES, context_length=16, threads=threads, flash_attention="off")
    params = {uid: replace(PARAMS, seed=uid) for uid in range(N_SEQUENCES)}
    params |= {
        uid: replace(PARAMS, seed=uid, json_schema='{"type": "string", "minLength": 50}') for uid in UNDER_A_SCHEMA
    }
    params[DEAD_END] = replace(PARAMS, grammar="root ::= <[99999999]>")
    samplers = {uid: running.sampler(setting) for uid, setting in params.items()}
    tokens = {uid: 1000 + uid for uid in params}
    steps = []
    for position in range(3):
        chunks = [Chunk(uid, uid, position, (token,), output=True) for uid, token in tokens.items()]
        result = running.step(*chunks, samplers=samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
        steps.append(dict(result.sampled))
        tokens = {uid: one.token for uid, one in result.sampled.items() if one.error is None}
    return steps


def test_the_number_of_threads_does_not_change_the_samples(default_model: Path) -> None:
    alone, together = sampled(default_model, 1), sampled(default_model, 2)
    for one, many in zip(alone, together, strict=True):
        assert one.keys() == many.keys()
        for uid in one.keys() - {DEAD_END}:
            assert one[uid] == many[uid]
    assert all(alone[0][uid].piece.startswith(b'"') for uid in UNDER_A_SCHEMA)
    assert len({one.token for one in alone[-1].values()}) > N_SEQUENCES // 2
    # The failure of one sequence does not touch the others, whichever thread samples it.
    for steps in (alone, together):
        assert isinstance(steps[0][DEAD_END].error, InvalidGrammar)
        assert all(step.keys() == set(range(N_SEQUENCES)) - {DEAD_END} for step in steps[1:])
