"""Requests that must be refused, and the path of the field that each refusal must name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from tests.server.dialects.runner.malformed import HUGE, NOT_BOOLEANS, NOT_INTEGERS, NOT_NUMBERS

Case = tuple[str, bytes, str]
"""(path, body, what `param` must be; "" if the body is no object at all)"""

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

RIGHT: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    TEXT: {"prompt": "x"},
    EMBEDDINGS: {"input": "x"},
}
"""What each kind of request needs."""

NOT_TEXTS = ["1", "1.5", "true", "[]", "{}", '["x"]', '"\\ud800"']
NOT_OBJECTS = ["1", "true", '"x"', "[]", "[{}]"]

TEXTS = ["model", "priority", "user", "service_tier", "prompt_cache_key", "grammar"]
INTEGERS = ["n", "max_tokens", "seed", "top_k", "repeat_last_n", "mirostat", "n_keep", "dry_allowed_length"]
NUMBERS = ["temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "deadline"]
BOOLEANS = ["stream", "cache_prompt", "shift", "truncate", "store", "penalize_nl"]
COMMON: Final[dict[str, list[str]]] = {
    **dict.fromkeys(TEXTS, NOT_TEXTS),
    **dict.fromkeys(INTEGERS, NOT_INTEGERS),
    **dict.fromkeys(NUMBERS, NOT_NUMBERS),
    **dict.fromkeys(BOOLEANS, NOT_BOOLEANS),
    **dict.fromkeys(["metadata", "stream_options"], NOT_OBJECTS),
}
OUT_OF_RANGE: Final[dict[str, list[str]]] = {
    "n": ["0", "-1", "17"],
    "max_tokens": ["-2", "-1000"],
    "stream_options.include_usage": ['{"include_usage": 1}', '{"include_usage": "true"}'],
    "stream_options.include_obfuscation": ['{"include_obfuscation": []}'],
    "stop": ["1", "true", "{}", json.dumps(["x"] * 65), json.dumps("x" * 1025), '"\\ud800"'],
    "stop[0]": ["[1]", "[null]", "[[]]", '["\\ud800"]'],
    "stop[1]": ['["a", {}]'],
    "temperature": ["1e7"],
    "top_p": ["-1"],
    "min_p": ["2"],
    "presence_penalty": ["1001"],
    "priority": ['"urgent"'],
    "deadline": ["0", "1e9"],
    "logit_bias": ["1", '"x"', '{"x": 1}', '{"1": "2"}', '{"-1": 1}', "[[1]]", '{"1": 1e9}'],
    "adapters": ["1", '"x"', "[{}]", "[1]"],
}

_NO_ROLES: Final[list[Any]] = [1, [], "", "robot", "User"]
_NO_TEXTS: Final[list[Any]] = [1, True, {}, None]
_NO_LISTS: Final[list[Any]] = [1, "x", {}]
MESSAGES: Final[dict[str, list[Any]]] = {
    "messages": [1, True, "x", {}, []],
    "messages[0]": [[1], ["x"], [None], [[]], [True]],
    "messages[1]": [[{"role": "user", "content": "x"}, 1]],
    "messages[0].role": [[{}], [{"content": "x"}], *[[{"role": role}] for role in _NO_ROLES]],
    "messages[0].content": [
        *[[{"role": "user", "content": content}] for content in _NO_TEXTS],
        [{"role": "system"}],
        [{"role": "tool"}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "user", "content": "\ud800"}],
    ],
    "messages[0].refusal": [[{"role": "assistant", "refusal": 1}]],
    "messages[0].name": [[{"role": "user", "content": "x", "name": 1}]],
    "messages[0].tool_call_id": [[{"role": "tool", "content": "x", "tool_call_id": 1}]],
    "messages[0].audio": [[{"role": "assistant", "content": "x", "audio": {"id": "a"}}]],
    "messages[0].tool_calls": [[{"role": "assistant", "tool_calls": calls}] for calls in _NO_LISTS],
    "messages[0].tool_calls[0]": [[{"role": "assistant", "tool_calls": [1]}]],
    "messages[0].tool_calls[0].function": [[{"role": "assistant", "tool_calls": [{"function": 1}]}]],
    "messages[0].tool_calls[0].function.name": [
        [{"role": "assistant", "tool_calls": [{"function": {}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
    ],
    "messages[0].tool_calls[0].function.arguments": [
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]
    ],
    "messages[0].function_call.name": [[{"role": "assistant", "function_call": {}}]],
}
PARTS: Final[dict[str, list[Any]]] = {
    "": [1, "x", None, [], True],
    ".type": [
        {},
        {"text": "x"},
        *[{"type": kind} for kind in (1, "", "input_text", "input_audio", "file", "video_url")],
    ],
    ".text": [{"type": "text"}, {"type": "text", "text": 1}, {"type": "text", "text": "\udfff"}],
    ".refusal": [{"type": "refusal"}, {"type": "refusal", "refusal": {}}],
    ".image_url": [
        {"type": "image_url"},
        {"type": "image_url", "image_url": 1},
        {"type": "image_url", "image_url": "https://example.org/x.png"},
        {"type": "image_url", "image_url": []},
    ],
    ".image_url.detail": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": detail}}
        for detail in (1, "", "huge")
    ],
    ".image_url.url": [
        {"type": "image_url", "image_url": {"url": url}}
        for url in (
            *[1, None, "", "x", "http://example.org/x.png", "https://example.org/x.png", "file:///etc/passwd"],
            *["data:image/png;base64,", "data:image/png;base64,!", "data:image/png;base64,AAA", "data:image/png,AAAA"],
            *["data:text/plain;base64,AAAA", "data:image/png;base64", "data:,AAAA", "AAAA"],
        )
    ],
}
"""By what follows the path of the part: wrong parts of the second message's content."""

DEEP: Final = '{"a":' * 70 + "1" + "}" * 70
CHAT_ONLY: Final[dict[str, list[str]]] = {
    "max_completion_tokens": ["-2", *NOT_INTEGERS],
    "logprobs": [*NOT_BOOLEANS],
    "top_logprobs": ["1", "5", "-1", "101", *NOT_INTEGERS],
    "response_format": NOT_OBJECTS,
    "response_format.type": ["{}", '{"type": 1}', '{"type": "xml"}', '{"json_schema": {}}'],
    "response_format.schema": ['{"type": "json_object", "schema": 1}', '{"type": "json_object", "schema": []}'],
    "response_format.json_schema": [
        '{"type": "json_schema"}',
        '{"type": "json_schema", "json_schema": null}',
        '{"type": "json_schema", "json_schema": 1}',
        '{"type": "json_schema", "json_schema": "{}"}',
    ],
    "response_format.json_schema.name": ['{"type": "json_schema", "json_schema": {"name": 1, "schema": {}}}'],
    "response_format.json_schema.strict": ['{"type": "json_schema", "json_schema": {"strict": 1, "schema": {}}}'],
    "response_format.json_schema.schema": [
        *[f'{{"type": "json_schema", "json_schema": {schema}}}' for schema in ("{}", '{"name": "x"}')],
        *[
            f'{{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'
            for schema in ("1", '"{}"', "[]", '{"maximum": 1e999}', '{"title": "\\ud800"}', "null", DEEP)
        ],
    ],
    "json_schema": ["1", "[]", "true", '"x"', '"[]"', DEEP],
    "tools": ["1", "{}", '"x"', '[{"type": "function", "function": {"name": "f"}}]', "[{}]"],
    "tools[0]": ["[1]", '["x"]', "[null]"],
    "tool_choice": ["1", "[]", "true"],
    "functions": ["1", "{}", '[{"name": "f"}]'],
    "function_call": ["1", "[]"],
    "modalities": ['"text"', "1", '["text", "audio"]', '["audio"]'],
    "modalities[0]": ["[1]"],
    "audio": ['{"voice": "x", "format": "wav"}', "1"],
    "web_search_options": ["{}", "1"],
    "chat_template_kwargs": [*NOT_OBJECTS, '{"_x": 1}', '{"a b": 1}', '{"\\ud800": 1}', '{"": 1}'],
    "chat_template_kwargs.messages": ['{"messages": []}'],
    "reasoning_effort": NOT_TEXTS,
    "prediction": NOT_OBJECTS,
    "parallel_tool_calls": NOT_BOOLEANS,
    "verbosity": NOT_TEXTS,
}
TEXT_ONLY: Final[dict[str, list[str]]] = {
    "prompt": [
        *["1", "true", "{}", "[]", '"\\ud800"', "[1.5]", "[true]", "[1, true]", '[1, "x"]', "[-1]", "[2147483648]"],
        json.dumps(["x"] * 129),
        HUGE,
    ],
    "prompt[0]": ["[null]", "[{}]", "[[]]", "[[-1]]", '[["x"]]', "[[1.0]]", '["\\ud800"]', f"[[{HUGE}]]"],
    "prompt[1]": ['["a", 1]', '["a", []]', '["a", null]', '[[1], [2, "x"]]'],
    "suffix": NOT_TEXTS,
    "echo": NOT_BOOLEANS,
    "logprobs": ["-1", "101", *NOT_INTEGERS],
    "best_of": ["0", "-1", "2", "17", *NOT_INTEGERS],
}
EMBEDDINGS_ONLY: Final[dict[str, list[str]]] = {
    "input": ["1", "true", "{}", "[]", "[1, 2]", "[[1, 2]]", "[[]]", '"\\ud800"', json.dumps(["x"] * 4097)],
    "input[0]": ["[null]", "[true]", "[{}]", '["\\ud800"]', "[1.5]"],
    "input[1]": ['["a", 1]', '["a", []]'],
    "model": NOT_TEXTS,
    "encoding_format": [*NOT_TEXTS, '"hex"', '""', '"FLOAT"'],
    "dimensions": [*NOT_INTEGERS, "0", "-1", "2147483648"],
    "normalize": NOT_BOOLEANS,
    "truncate": NOT_BOOLEANS,
    "user": NOT_TEXTS,
}


def malformed() -> Iterator[Case]:
    for path in (CHAT, TEXT):
        for table in (COMMON, OUT_OF_RANGE):
            yield from _all(path, table)
    yield from _all(CHAT, CHAT_ONLY)
    yield from _all(TEXT, TEXT_ONLY)
    yield from _all(EMBEDDINGS, EMBEDDINGS_ONLY)
    for param, values in MESSAGES.items():
        yield from ((CHAT, json.dumps({"messages": value}).encode(), param) for value in values)
    for end, parts in PARTS.items():
        for part in parts:
            content = [{"type": "text", "text": "x"}, part]
            messages = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
            yield CHAT, json.dumps({"messages": messages}).encode(), f"messages[1].content[1]{end}"
    for path, needed in RIGHT.items():
        [name] = needed
        yield from ((path, body, name) for body in (b"{}", b"null", b'{"model": "x"}', b'{"%b": null}' % name.encode()))
        for body in (b"", b"[]", b"1", b'"x"', b"{", b"{'a': 1}", b"\0", b"[" * 50_000, b'{"prompt": "x",}', b"x=1"):
            yield path, body, ""
    yield TEXT, b'{"prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"], "n": 15}', "prompt"
    yield TEXT, b'{"prompt": "a", "echo": true, "logprobs": 0, "stream": true}', "echo"
    yield TEXT, b'{"prompt": "a", "echo": true, "logprobs": 0, "suffix": "b"}', "echo"
    yield TEXT, b'{"prompt": "a", "n": 3, "best_of": 4}', "best_of"
    yield TEXT, b'{"prompt": [[1, 2]], "suffix": "x"}', "suffix"
    yield TEXT, b'{"prompt": "x", "PROMPT": 1}', "prompt"
    grammar = {"grammar": 'root ::= "x"', "response_format": {"type": "json_object"}}
    yield CHAT, json.dumps(RIGHT[CHAT] | grammar).encode(), "response_format"


def _all(path: str, table: dict[str, list[str]]) -> Iterator[Case]:
    """All that is needed, and then, as the last duplicate counts, the field that the path begins with."""
    for param, values in table.items():
        field = param.partition("[")[0].partition(".")[0]
        right = json.dumps(RIGHT[path])[:-1]
        yield from ((path, f'{right}, "{field}": {value}}}'.encode(), param) for value in values)
