"""JSON that clients send, whatever the dialect."""

from __future__ import annotations

import json

import pytest

from trio_runner.errors import InvalidRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import Body, field
from trio_runner.server.dialects.runner import requests

MANY = json_in.MAX_VALUES


@pytest.mark.parametrize(
    ("value", "n_values"),
    [
        ("[]", 1),
        ("{}", 1),
        ('""', 1),
        ('"a[b"', 1),
        ('"\\\\"', 1),
        ('"\\""', 1),
        ('"\\\\\\"["', 1),
        ('{"a":1}', 2),
        ("[" * 50 + "]" * 50, 50),
    ],
)
def test_a_body_has_only_so_many_values(value: str, n_values: int) -> None:
    most = (MANY - 3) // n_values  # beside the body, its list and the name of that
    assert requests.tokenize(f'{{"z":[{",".join([value] * most)}]}}'.encode()) == ("", False, True)
    with pytest.raises(InvalidRequest, match=f"but at most {MANY} are allowed"):
        requests.tokenize(f'{{"z":[{",".join([value] * (most + 1))}]}}'.encode())


def test_text_and_numbers_do_not_count() -> None:
    text = '[{"\\' * MANY
    assert requests.tokenize(json.dumps({"content": text}).encode())[0] == text
    tokens = list(range(2 * MANY))
    assert requests.detokenize(json.dumps({"tokens": tokens}).encode()) == tuple(tokens)


def test_only_the_fields_of_the_request_match_in_any_case_and_lose_their_nulls() -> None:
    """A JSON schema has names and nulls of its own."""
    schema = field({}, "A schema.", check=lambda name, value: value)
    given = Body({"schema": schema}, {}).read(b'{"SCHEMA": {"firstName": null, "a": {"B": null}}, "Other": 1}')
    assert given == {"schema": {"firstName": None, "a": {"B": None}}}
    assert json_in.fold(given["schema"]["a"]) == {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a": 1, "A": 2, "a": 3}', {"a": 3}),
        (b'{"a": 1, "A": null}', {"a": 1}),
        (b'{"A": 1, "b": 2}', {"a": 1, "b": 2}),
    ],
)
def test_the_last_duplicate_wins_whatever_its_case(body: bytes, expected: dict[str, int]) -> None:
    assert json_in.fold(json_in.decode(body)) == expected


@pytest.mark.parametrize("body", [b"[1]", b"1", b'"x"', b"", b"{", b"true"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^no: ."):
        Body({}, {}, "no: {}").read(body)
