"""What a model writes under two hundred schemas: each is refused, or every text that was not cut is a value of it.

The weights are random, so the text goes wherever the mask lets it. An independent validator checks it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.json_validator import check
from tests.placing import model_config
from tests.schemas import EITHER, REFUSED, SUPPORTED
from tests.tiny_models import tiny_model
from trio_runner.engine.engine import Engine
from trio_runner.errors import RequestError
from trio_runner.events import Finished
from trio_runner.front_door import open_engine
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

pytest.importorskip("llguidance", reason="llguidance is not installed")

DEADLINE = 240.0
N_SEEDS = 2
BIAS = 4.0
"""Added to the logits of what closes strings, lists and objects, so that most texts come to an end."""


def request(schema: object, seed: int, closing: Sequence[int]) -> GenerateRequest:
    sampling = SamplingParams(
        json_schema=json.dumps(schema),
        temperature=(0.7, 2.0, 4.0)[seed % 3],
        top_k=0,
        top_p=1.0,
        repeat_penalty=1.0,
        seed=seed,
        logit_bias=tuple((token, BIAS) for token in closing),
    )
    return GenerateRequest(prompt=f"hello {seed}", sampling=sampling, max_tokens=120, shift=False)


async def write(engine: Engine, schema: object, seed: int, closing: Sequence[int]) -> tuple[str, str]:
    """The text under a schema, and why it ended; the message of the refusal and "refused"."""
    try:
        async with engine.generate(request(schema, seed, closing)) as generation:
            events = [event async for event in generation]
    except RequestError as refused:
        return str(refused), "refused"
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events), events[-1].reason


@pytest.mark.parametrize("name", ["llama", "spm"])
async def test_every_text_is_a_value_of_its_schema_or_says_that_it_was_cut(tmp_path: Path, name: str) -> None:
    wrong: list[str] = []
    outcomes: Counter[tuple[str, str]] = Counter()

    async def try_schema(engine: Engine, closing: Sequence[int], kind: str, schema: Any) -> None:
        for seed in range(N_SEEDS):
            text, outcome = await write(engine, schema, seed, closing)
            outcomes[kind, outcome] += 1
            if outcome == "refused" and kind == "supported":
                wrong.append(f"{schema} was refused: {text}")
            if outcome == "stop":
                try:
                    check(schema, text)
                except Exception as error:
                    wrong.append(f"{schema} gave {text!r}: {error}")

    with trio.fail_after(DEADLINE):
        model = model_config(tiny_model(name, tmp_path))
        async with open_engine(model, slots=8, max_queue=1000, threads=1, context_length=256, kv_type="f32") as engine:
            closing = [(await engine.tokenize(character))[-1] for character in '"]}']
            async with trio.open_nursery() as nursery:
                for schema in SUPPORTED:
                    nursery.start_soon(try_schema, engine, closing, "supported", schema)
                for schema in EITHER:
                    nursery.start_soon(try_schema, engine, closing, "either", schema)
    assert not wrong, "\n".join(wrong)
    assert len(SUPPORTED) + len(EITHER) + len(REFUSED) >= 200
    assert outcomes["supported", "stop"] > 0.9 * N_SEEDS * len(SUPPORTED), outcomes
    assert outcomes["either", "stop"], outcomes
    assert outcomes["either", "refused"], outcomes


async def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE):
        async with open_engine(model_config(tiny_model("llama", tmp_path)), threads=1, context_length=64) as engine:
            for named, schema in REFUSED:
                with pytest.raises(RequestError) as refused:
                    await engine.generate("hello", json_schema=json.dumps(schema)).collect()
                assert named in str(refused.value), (schema, str(refused.value))
                assert refused.value.param == "json_schema"
                assert len(str(refused.value)) < 600
