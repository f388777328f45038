"""POST /infill: what is read, and a gap that the toy model fills."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engine.toys import Toy
from tests.server.client import post, serving
from trio_runner.errors import InvalidRequest
from trio_runner.front_door import open_engine
from trio_runner.request import Infill
from trio_runner.server.dialects.llama_server.infill import infill
from trio_runner.server.dialects.llama_server.requests import Completion
from trio_runner.testing import ToyLoader, toy_text

PRE, SUF, MID = 1, 2, 3
MARKS: dict[str, object] = {"token_fim_pre": PRE, "token_fim_suf": SUF, "token_fim_mid": MID}


def read(**fields: Any) -> Completion:
    return infill(json.dumps({"input_prefix": "a", "input_suffix": "b", **fields}).encode())


def test_the_fields_of_the_gap() -> None:
    assert read().prompts == (Infill(prefix="a", suffix="b"),)
    extra = [{"text": "A", "filename": "a.py"}, {"text": "B", "time": 3}]
    asked = read(prompt="c", input_extra=extra)
    assert asked.prompts == (Infill(prefix="a", suffix="b", prompt="c", extra=(("a.py", "A"), ("tmp", "B"))),)
    assert asked.request.truncate
    assert asked.request.sampling.top_p == 0.95


WRONG: dict[str, list[Any]] = {
    "input_prefix": [None, 1, [], ["a"], "\ud800", "x" * ((4 << 20) + 1)],
    "input_suffix": [None, 1, {}, True],
    "prompt": [1, ["a"], {"prompt_string": "x"}, "\ud800"],
    "input_extra": [1, "x", {}, [1], [{"filename": "x"}], [{"text": 1}], [{"text": "x"}] * 257],
    "input_extra[0].filename": [[{"text": "x", "filename": 1}]],
    "input_extra[0].name": [[{"text": "x", "filename": "x" * 2000}]],
    "input_extra[1].text": [[{"text": "x"}, {"text": None}]],
    "n_predict": [-2],
    "samplers": [["nothing"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**{name.partition("[")[0]: value})
    assert name in str(caught.value)


def test_texts_that_are_too_long_together_are_named() -> None:
    with pytest.raises(InvalidRequest, match="input_prefix, input_suffix, prompt and input_extra have"):
        read(input_prefix="x" * (3 << 20), input_suffix="x" * (3 << 20))


async def test_a_gap_is_filled() -> None:
    toy = Toy()
    toy.info = {**MARKS}
    prompt = [PRE, *b"a", SUF, *b"b", MID]
    async with toy.engine(slots=1) as engine, serving(engine) as server:
        answer = (
            await server.ask(post("/llama/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 9}))
        ).json
        assert answer["content"] == toy_text(prompt, 9)
        assert (answer["tokens_evaluated"], answer["generation_settings"]["n_predict"]) == (len(prompt), 9)
        assert "prompt" not in answer  # it is laid out by the engine


async def test_a_gap_in_a_long_text_is_filled_from_what_is_near() -> None:
    toy = Toy()
    toy.info = {**MARKS}
    async with toy.engine(slots=1, context_length=32) as engine, serving(engine) as server:
        fields = {"input_prefix": "a" * 100, "input_suffix": "b" * 100, "n_predict": 4}
        answer = (await server.ask(post("/llama/infill", fields))).json
        assert answer["content"] == toy_text([PRE, *b"a" * 19, SUF, *b"b" * 6, MID], 4)


async def test_a_model_that_cannot_is_a_clear_refusal() -> None:
    async with open_engine(ToyLoader(), slots=1) as engine, serving(engine) as server:
        answer = await server.ask(post("/llama/infill", {"input_prefix": "a", "input_suffix": "b"}))
        assert (answer.status, answer.json["error"]["type"]) == (400, "not_supported_error")
        assert "filling in the middle" in answer.json["error"]["message"]
