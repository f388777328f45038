"""The tables of fields: each entry has a check, a schema and a meaning, and bodies are read by them."""

from __future__ import annotations

import logging

import pytest

from trio_runner.errors import InvalidRequest
from trio_runner.parameters import parameters_of
from trio_runner.request import EmbedRequest
from trio_runner.sampling import SamplingParams
from trio_runner.server.dialects import fields
from trio_runner.server.dialects.fields import INTEGER, STRING, Body, array, field, fields_of


def test_every_sampling_parameter_has_a_check() -> None:
    table = fields_of(SamplingParams)
    assert list(table) == list(parameters_of(SamplingParams))
    for name, entry in table.items():
        with pytest.raises(InvalidRequest, match=name):
            entry.check(name, None)


def test_the_fields_of_some_parameters() -> None:
    assert list(fields_of(EmbedRequest, "dimensions", "truncate")) == ["dimensions", "truncate"]
    with pytest.raises(KeyError):
        fields_of(EmbedRequest, "no_such_name")


def test_a_dialect_may_have_defaults_of_its_own() -> None:
    table = fields_of(SamplingParams, "temperature", "seed", seed=-1)
    assert table["temperature"].schema == {"type": "number", "minimum": -1e6, "maximum": 1e6, "default": 0.8}
    assert (table["seed"].schema["default"], table["seed"].default_text) == (-1, "")


def test_a_required_field_must_be_given() -> None:
    body = Body({"a": field(STRING, "One."), "b": field(INTEGER, "Two.", required=True)}, {"b": 1})
    assert body.read(b'{"B": 1}') == {"b": 1}
    for missing in (b"{}", b'{"b": null}', b'{"a": "x"}'):
        with pytest.raises(InvalidRequest, match="b is missing") as caught:
            body.read(missing)
        assert caught.value.param == "b"


def test_a_schema_of_more_than_one_type_needs_a_check() -> None:
    with pytest.raises(KeyError):
        field(array(STRING), "A list.")


def test_an_unknown_field_is_ignored_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "_logged", set())
    caplog.set_level(logging.INFO, logger=fields.__name__)
    for _ in range(3):
        assert Body({}, {}).read(b'{"strange": 1, "odd\\n": [2]}') == {}
    assert len(caplog.records) == 2
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"[]", "the body is not a JSON object: it is a list"),
        (b'"x"', "the body is not a JSON object: it is a string"),
        (b"[" * 60_000 + b"]" * 60_000, "the body is not a JSON object: it is nested too deeply"),
    ],
)
def test_a_body_that_is_no_object_is_refused_in_one_sentence(body: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Body({}, {}).read(body)
    assert (str(caught.value), caught.value.param) == (text, None)
