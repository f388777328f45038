"""Every field of every request: a bad value is an InvalidRequest that names the field, a good one never raises."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import InvalidRequest
from trio_runner.json_schema import MAX_SCHEMA_BYTES
from trio_runner.request import (
    MAX_ADAPTER_NAME_BYTES,
    MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
    MAX_DEADLINE,
    MAX_DOCUMENTS,
    MAX_EXTRA_FILES,
    MAX_FILE_NAME_BYTES,
    MAX_IMAGES,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    MAX_TEXT_BYTES,
    AdapterChoice,
    Chat,
    EmbedRequest,
    GenerateRequest,
    Infill,
    Part,
    RerankRequest,
    as_prompt,
    make_request,
)
from trio_runner.sampling import (
    MAX_DRY_BREAKER_BYTES,
    MAX_DRY_BREAKERS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_WINDOW,
    RANDOM_SEED,
    SamplingParams,
)

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HUGE = 10**5000
"""More digits than Python is willing to print, and more than a float can hold."""
SURROGATE = "\ud800"

NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (-1e6, 1e6),
    "dynatemp_range": (0, 1e6),
    "dynatemp_exponent": (0, 1e3),
    "top_p": (0, 1e6),
    "min_p": (0, 1),
    "typical_p": (0, 1e6),
    "tfs_z": (0, 1e6),
    "top_n_sigma": (-1, 1e6),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (1e-3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "dry_multiplier": (0, 1e3),
    "dry_base": (1, 1e3),
    "mirostat_tau": (0, 1e3),
    "mirostat_eta": (0, 1e3),
}
INTEGERS: dict[str, tuple[int, int]] = {
    "top_k": (INT_MIN, INT_MAX),
    "repeat_last_n": (-1, MAX_WINDOW),
    "dry_allowed_length": (1, MAX_WINDOW),
    "dry_penalty_last_n": (-1, MAX_WINDOW),
    "mirostat": (0, 2),
    "seed": (0, RANDOM_SEED),
    "logprobs": (-1, MAX_LOGPROBS),
}

NOT_NUMBERS: list[Any] = [None, True, "1", (1.0,), 1j, math.nan, math.inf, -math.inf, HUGE, -HUGE]
NOT_INTEGERS: list[Any] = [None, True, False, "1", 1.0, math.nan, (1,), HUGE, -HUGE]
NOT_BOOLS: list[Any] = [None, 0, 1, "true", 1.0]
NOT_TEXTS: list[Any] = [None, 1, b"a", ("a",), SURROGATE]
NOT_LISTS: list[Any] = [None, 1, "ab", {"a": 1}, b"ab"]
TOKENS: list[Any] = [None, 1, b"a", SURROGATE, (1, 2.0), (True,), (-1,), (INT_MAX + 1,), (None,), {1}, (HUGE,)]
PICTURE = b"a picture, for all that anybody knows here"
ADAPTERS: list[Any] = [
    *[value for value in NOT_LISTS if value is not None],
    *[("a",), (None,), ({"name": "a"},), (("a", 1.0),)],
    (AdapterChoice("a"), AdapterChoice("a", 2.0)),
    tuple(AdapterChoice(str(index)) for index in range(MAX_ADAPTERS + 1)),
]

BAD_SAMPLING: dict[str, list[Any]] = {
    **{name: [*NOT_NUMBERS, low - 1, high * 2] for name, (low, high) in NUMBERS.items()},
    **{name: [*NOT_INTEGERS, low - 1, high + 1] for name, (low, high) in INTEGERS.items()},
    "penalize_nl": NOT_BOOLS,
    "ignore_eos": NOT_BOOLS,
    "post_sampling_probs": NOT_BOOLS,
    "json_schema": [*NOT_TEXTS, "{", "[]", "false", "NaN", " " * (MAX_SCHEMA_BYTES + 1)],
    "grammar": [*NOT_TEXTS, "root ::= \0", "a" * (MAX_GRAMMAR_BYTES + 1), "é" * (MAX_GRAMMAR_BYTES // 2 + 1)],
    "logit_bias": [
        *NOT_LISTS,
        (1,),
        ((1,),),
        ((1, 2.0, 3),),
        ("ab",),
        (None,),
        *[((token, 1.0),) for token in (*NOT_INTEGERS, -1, INT_MAX + 1)],
        *[((1, bias),) for bias in (None, True, "1", math.nan, math.inf, 1e7, -1e7, HUGE)],
        ((1, 1.0),) * (MAX_LOGIT_BIAS + 1),
    ],
    "dry_sequence_breakers": [
        *NOT_LISTS,
        *[(breaker,) for breaker in (*NOT_TEXTS, "", "a\0", "a" * (MAX_DRY_BREAKER_BYTES + 1))],
        ("a",) * (MAX_DRY_BREAKERS + 1),
    ],
}
COUNTS: list[Any] = [-1, INT_MAX + 1, *[value for value in NOT_INTEGERS if value is not None]]
LIMITS: list[Any] = [*[value for value in NOT_NUMBERS if value is not None], 0, -1, 0.0009, MAX_DEADLINE + 1]
BAD_GENERATE: dict[str, list[Any]] = {
    "prompt": [
        *TOKENS,
        *[("a", 1), (1, "a"), ("a", None), (PICTURE, SURROGATE), (bytearray(b"a"),), (["a"],), ("a", True)],
        (PICTURE,) * (MAX_IMAGES + 1),
        ["a"],
    ],
    "image_data": [
        *NOT_LISTS,
        *[(PICTURE,), ((1,),), ([1, PICTURE],), ((1, PICTURE, 1),), ((1, "picture.png"),), ((1, None),)],
        *[((number, PICTURE),) for number in (*NOT_INTEGERS, -1, INT_MAX + 1)],
        ((1, PICTURE),) * (MAX_IMAGES + 1),
    ],
    "adapters": ADAPTERS,
    "max_tokens": COUNTS,
    "prompt_logprobs": [*NOT_INTEGERS, -2, MAX_LOGPROBS + 1],
    "preferred_slot": COUNTS,
    "stop": [
        *NOT_LISTS,
        *[(stop,) for stop in (*NOT_TEXTS, "a" * (MAX_STOP_BYTES + 1), "é" * (MAX_STOP_BYTES // 2 + 1))],
        ("a",) * (MAX_STOP_STRINGS + 1),
    ],
    "sampling": [None, {}, 1],
    "n_keep": [*NOT_INTEGERS, INT_MIN - 1, INT_MAX + 1],
    **dict.fromkeys(["cache_prompt", "share_prompt", "shift", "truncate", "parse_special", "progress"], NOT_BOOLS),
    "priority": [None, 1, True, "", "urgent", "Background", b"background", ["background"], {}],
    "deadline": LIMITS,
    "decode_seconds": LIMITS,
}
BAD_EMBED: dict[str, list[Any]] = {
    "content": [*TOKENS, ("a",), (PICTURE,)],
    "normalize": NOT_BOOLS,
    "truncate": NOT_BOOLS,
    "dimensions": [0, -1, INT_MAX + 1, *[value for value in NOT_INTEGERS if value is not None]],
    "adapters": ADAPTERS,
}
BAD_RERANK: dict[str, list[Any]] = {
    "query": [*NOT_TEXTS, "a" * (MAX_TEXT_BYTES + 1)],
    "documents": [
        *NOT_LISTS,
        *[("a", text) for text in (*NOT_TEXTS, "a" * (MAX_TEXT_BYTES + 1))],
        ("a",) * (MAX_DOCUMENTS + 1),
    ],
    "truncate": NOT_BOOLS,
    "adapters": ADAPTERS,
}
BAD_CHOICE: dict[str, list[Any]] = {
    "name": [*NOT_TEXTS, "a" * (MAX_ADAPTER_NAME_BYTES + 1)],
    "scale": [*NOT_NUMBERS, MAX_ADAPTER_SCALE + 1, -MAX_ADAPTER_SCALE - 1],
}
LONG = [*NOT_TEXTS, "a" * (MAX_TEXT_BYTES + 1)]
BAD_INFILL: dict[str, list[Any]] = {
    "prefix": LONG,
    "suffix": LONG,
    "prompt": LONG,
    "extra": [
        *NOT_LISTS,
        *[(pair,) for pair in (None, "ab", ("a",), ("a", "b", "c"), ["a", "b"])],
        *[(("a", text),) for text in LONG],
        *[((name, "a"),) for name in (*NOT_TEXTS, "a" * (MAX_FILE_NAME_BYTES + 1))],
        (("a", "b"),) * (MAX_EXTRA_FILES + 1),
        (("a", "é" * (MAX_TEXT_BYTES // 4)), ("b", "é" * (MAX_TEXT_BYTES // 4)), ("c", "c")),
    ],
}
BAD_CHAT: dict[str, list[Any]] = {"messages": [None, 1, "ab", b"ab", {"role": "user"}, {1}, iter(())]}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{n}") for name, values in table.items() for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value"), cases(BAD_SAMPLING))
def test_sampling_params_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), cases(BAD_GENERATE))
def test_generate_request_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        GenerateRequest(**{"prompt": "a", name: value})
    assert field_of(caught.value) == name


@pytest.mark.parametrize(("name", "value"), cases(BAD_EMBED))
def test_embed_request_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        EmbedRequest(**{"content": "a", name: value})
    assert field_of(caught.value) == name


@pytest.mark.parametrize(("name", "value"), cases(BAD_RERANK))
def test_rerank_request_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        RerankRequest(**{"query": "a", "documents": ("a",), name: value})
    assert field_of(caught.value) == name


@pytest.mark.parametrize(("name", "value"), cases(BAD_CHOICE))
def test_adapter_choice_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        AdapterChoice(**{"name": "a", name: value})
    assert caught.value.param == f"adapters.{name}"


@pytest.mark.parametrize(("name", "value"), cases(BAD_INFILL))
def test_infill_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        Infill(**{"prefix": "", "suffix": "", name: value})
    assert caught.value.param is not None
    assert caught.value.param.startswith(name)


@pytest.mark.parametrize(("name", "value"), cases(BAD_CHAT))
def test_chat_names_the_bad_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        Chat(**{name: value})
    assert caught.value.param == name


def field_of(error: InvalidRequest) -> str | None:
    """The param without the part of the field that it names."""
    return error.param.partition("[")[0] if error.param is not None else None


def test_the_bad_part_of_a_list_is_named() -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: GenerateRequest(prompt=("a", SURROGATE)), "prompt[1]"),
        (lambda: GenerateRequest(prompt="a", image_data=((1, PICTURE), (-1, PICTURE))), "image_data[1].id"),
        (lambda: RerankRequest(query="a", documents=("a", "b", SURROGATE)), "documents[2]"),
    ]
    for make, name in refused:
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert caught.value.param == name
        assert name in str(caught.value)


@pytest.mark.parametrize("prompt", [(1, 2), ("a", PICTURE), Chat(messages=())])
def test_image_data_needs_a_prompt_of_text(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="image_data is for a prompt of text"):
        GenerateRequest(prompt=prompt, image_data=((1, PICTURE),))


@pytest.mark.parametrize(
    ("request_type", "table"),
    [
        (SamplingParams, BAD_SAMPLING),
        (GenerateRequest, BAD_GENERATE),
        (EmbedRequest, BAD_EMBED),
        (RerankRequest, BAD_RERANK),
        (AdapterChoice, BAD_CHOICE),
    ],
)
def test_the_tables_above_have_every_field(request_type: Any, table: dict[str, list[Any]]) -> None:
    assert {field.name for field in fields(request_type)} == set(table)


@pytest.mark.parametrize(("name", "ends"), [*NUMBERS.items(), *INTEGERS.items()])
def test_both_ends_of_a_range_are_in_it(name: str, ends: tuple[float, float]) -> None:
    for value in ends:
        assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOKEN = st.integers(0, INT_MAX)
TOKENIZED = TEXT | st.lists(TOKEN, max_size=5).map(tuple)
IMAGE = st.binary() | st.just(Path("picture.png"))
CHOICES = st.none() | st.lists(
    st.builds(AdapterChoice, name=TEXT, scale=st.floats(-MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)),
    max_size=MAX_ADAPTERS,
    unique_by=lambda choice: choice.name,
).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    **{name: st.floats(low, high) | st.just(int(high)) for name, (low, high) in NUMBERS.items()},
    **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items()},
    ignore_eos=st.booleans(),
    post_sampling_probs=st.booleans(),
    penalize_nl=st.booleans(),
    grammar=TEXT.map(lambda text: text.replace("\0", "")),
    logit_bias=st.lists(st.tuples(TOKEN, st.floats(-1e6, 1e6) | st.just(-math.inf)), max_size=3).map(tuple),
    dry_sequence_breakers=st.lists(
        TEXT.map(lambda text: text.replace("\0", "")[:16]).filter(bool), max_size=MAX_DRY_BREAKERS
    ).map(tuple),
)


@given(
    st.builds(
        GenerateRequest,
        prompt=TOKENIZED | st.lists(TEXT | IMAGE, max_size=MAX_IMAGES).map(tuple),
        adapters=CHOICES,
        max_tokens=st.none() | st.integers(0, INT_MAX),
        stop=st.lists(TEXT, max_size=MAX_STOP_STRINGS).map(tuple),
        sampling=SAMPLING,
        cache_prompt=st.booleans(),
        share_prompt=st.booleans(),
        n_keep=st.integers(INT_MIN, INT_MAX),
        shift=st.booleans(),
        truncate=st.booleans(),
        parse_special=st.booleans(),
        progress=st.booleans(),
        priority=st.sampled_from(["interactive", "background"]),
        deadline=st.none() | st.floats(0.001, MAX_DEADLINE) | st.integers(1, 10),
        decode_seconds=st.none() | st.floats(0.001, MAX_DEADLINE),
        prompt_logprobs=st.integers(-1, MAX_LOGPROBS),
        preferred_slot=st.none() | st.integers(0, INT_MAX),
    )
)
def test_values_in_range_are_taken_unchanged(request: GenerateRequest) -> None:
    hash(request)  # frozen through and through


@given(TEXT, st.lists(st.tuples(st.integers(0, INT_MAX), IMAGE), max_size=MAX_IMAGES))
def test_images_in_a_text(prompt: str, images: list[tuple[int, bytes]]) -> None:
    request = GenerateRequest(prompt=prompt, image_data=images)  # type: ignore[arg-type]
    assert request.image_data == tuple(images)
    hash(request)


@given(TOKENIZED, st.booleans(), st.none() | st.integers(1, INT_MAX), st.booleans(), CHOICES)
def test_embed_request(
    content: str | tuple[int, ...],
    normalize: bool,
    dimensions: int | None,
    truncate: bool,
    adapters: tuple[AdapterChoice, ...] | None,
) -> None:
    request = EmbedRequest(
        content=content, normalize=normalize, dimensions=dimensions, truncate=truncate, adapters=adapters
    )
    assert (request.content, request.dimensions, request.adapters) == (content, dimensions, adapters)
    hash(request)


@given(TEXT, st.lists(TEXT), st.booleans(), CHOICES)
def test_rerank_request(
    query: str, documents: list[str], truncate: bool, adapters: tuple[AdapterChoice, ...] | None
) -> None:
    request = RerankRequest(query=query, documents=documents, truncate=truncate, adapters=adapters)  # type: ignore[arg-type]
    assert request.documents == tuple(documents)
    hash(request)


def test_lists_become_tuples() -> None:
    """A frozen value must not change when the caller's list does."""
    request = GenerateRequest(prompt="a", stop=["b"])  # type: ignore[arg-type]
    assert request.stop == ("b",)
    assert GenerateRequest(prompt="a", adapters=[AdapterChoice("b")]).adapters == (AdapterChoice("b"),)  # type: ignore[arg-type]
    assert Chat(messages=[{"role": "user"}]).messages == ({"role": "user"},)  # type: ignore[arg-type]
    params = SamplingParams(logit_bias=[[1, 2.0]], dry_sequence_breakers=["\n"])  # type: ignore[arg-type]
    assert params.logit_bias == ((1, 2.0),)
    assert params.dry_sequence_breakers == ("\n",)


def test_as_prompt() -> None:
    assert as_prompt("ab") == "ab"
    assert as_prompt([1, 2]) == (1, 2)
    parts: list[Part] = ["ab", PICTURE]
    assert as_prompt(parts) == ("ab", PICTURE)
    chat = Chat(messages=())
    assert as_prompt(chat) is chat
    no_prompts: list[Any] = [b"ab", bytearray(b"ab"), memoryview(b"ab"), {"ab": 1}, {1, 2}, 1, None]
    for value in no_prompts:
        with pytest.raises(InvalidRequest, match=f"not {type(value).__name__}"):
            as_prompt(value)


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("logit_bias", (1, 2.0)),
        ("dry_sequence_breakers", "."),
        ("image_data", (1, b"image")),
        ("adapters", AdapterChoice("a")),
    ],
)
def test_any_sequence_is_taken_for_a_list_and_text_is_not(name: str, item: object) -> None:
    """Type checkers allow any sequence."""
    request = make_request("hello", {name: deque([item])})
    assert getattr(request.sampling if hasattr(SamplingParams, name) else request, name) == (item,)
    for text in (b"ab", bytearray(b"ab"), memoryview(b"ab")):
        with pytest.raises(InvalidRequest, match=f"{name} must be a list, not {type(text).__name__}"):
            make_request("hello", {name: text})
