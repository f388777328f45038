"""Requests that must be refused, and what each refusal must contain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Case = tuple[str, bytes, str]
"""(path, body, what the answer must contain)"""

HUGE = "1" + "0" * 5000
NOT_TEXTS = ["1", "true", "[]", "{}", '"\\ud800"']
NOT_BOOLEANS = ["1", "0.0", '"true"', "[]", "{}"]
NOT_INTEGERS = ["1.5", "true", '"1"', "[]", "{}", HUGE, "1e400"]
NOT_NUMBERS = ["true", '"1"', "[]", "{}", "1e400"]
NOT_LISTS = ["1", "true", '"x"', "{}"]

OPTION_INTEGERS = [
    *["num_predict", "num_keep", "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"],
    *["seed", "top_k", "repeat_last_n", "mirostat", "dry_allowed_length", "dry_penalty_last_n"],
]
OPTION_NUMBERS = [
    *["temperature", "top_p", "min_p", "typical_p", "tfs_z", "repeat_penalty", "presence_penalty"],
    *["frequency_penalty", "mirostat_tau", "mirostat_eta", "deadline", "xtc_probability", "dynatemp_range"],
]
OPTION_BOOLEANS = ["penalize_newline", "penalize_nl", "use_mmap", "low_vram", "numa", "f16_kv"]
OUT_OF_RANGE = {
    "temperature": ["1e7"],
    "top_k": ["4294967296"],
    "top_p": ["-1"],
    "min_p": ["-0.1", "1.1"],
    "typical_p": ["-1"],
    "repeat_last_n": ["-2", "1048577"],
    "repeat_penalty": ["0", "1001"],
    "presence_penalty": ["-1001"],
    "frequency_penalty": ["1e30"],
    "mirostat": ["3"],
    "mirostat_tau": ["-1"],
    "mirostat_eta": ["-1"],
    "stop": ["1", "{}", "[1]", json.dumps(["x"] * 65), json.dumps("x" * 1025)],
    "logit_bias": ["[[-1, 1]]", "[1]", '{"x": 1}'],
    "priority": ['"urgent"', "1"],
    "deadline": ["0", "1e9"],
    "adapters": ["{}", "[1]", "[{}]", '[{"name": 1}]', '[{"name": "x", "scale": 1e9}]'],
    "grammar": [json.dumps("x" * 65537), '"\\u0000"', "1"],
    "dry_sequence_breakers": ['[""]', "[1]"],
}
"""Values of options that have the right type."""

COMMON: dict[str, list[str]] = {
    "model": [*NOT_TEXTS, json.dumps("x" * 201)],
    "stream": NOT_BOOLEANS,
    "truncate": NOT_BOOLEANS,
    "shift": NOT_BOOLEANS,
    "logprobs": NOT_BOOLEANS,
    "top_logprobs": [*NOT_INTEGERS, "-1", "21"],
    "think": ["1", '"yes"', '""', "[]", "{}"],
    "format": ["1", "true", "[]", '"xml"', '"{}"', '{"minimum": 1e400}'],
    "keep_alive": ["true", "[]", "{}", '"soon"', '"5 m"', '"m"', '""', json.dumps("1m" * 100)],
    "options": ["1", "[]", '"x"', "true"],
}
IMAGES = ["1", '"AAAA"', "{}", "[1]", "[null]", '[""]', '["!"]', '["AAA"]', json.dumps(["AAAA"] * 17)]
GENERATE = {
    "prompt": NOT_TEXTS,
    "suffix": NOT_TEXTS,
    "system": NOT_TEXTS,
    "template": [*NOT_TEXTS, '"{{ .Prompt }}"'],
    "context": [*NOT_LISTS, "[1.5]", "[-1]", "[1, 2]"],
    "raw": NOT_BOOLEANS,
    "images": IMAGES,
}
CHAT = {
    "messages": [*NOT_LISTS, "[1]", "[null]", "[[]]"],
    "tools": [*NOT_LISTS, '[{"type": "function"}]'],
}
MESSAGE = {
    "role": [*NOT_TEXTS, "null"],
    "content": NOT_TEXTS,
    "thinking": NOT_TEXTS,
    "images": IMAGES,
    "tool_calls": [*NOT_LISTS, "[1]", "[{}]", '[{"function": 1}]', '[{"function": {}}]', '[{"function": {"name": 1}}]'],
    "tool_name": NOT_TEXTS,
    "tool_call_id": NOT_TEXTS,
}
TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, "system cannot be combined with raw"),
    ("/api/generate", {"prompt": "x", "suffix": "y", "images": ["AAAA"]}, "images cannot be combined with suffix"),
    ("/api/generate", {"prompt": "x", "suffix": "y", "think": True}, "think cannot be combined with suffix"),
    ("/api/generate", {"prompt": "x", "raw": True, "images": ["AAAA"]}, "images[0] has no [img-0] in prompt"),
    ("/api/generate", {"prompt": "x", "think": True, "format": "json"}, "think cannot be combined with format"),
    ("/api/generate", {"prompt": "x", "think": "high"}, "think"),
    ("/api/chat", {"messages": [], "format": {}, "options": {"grammar": "root ::= [a]"}}, "format and grammar"),
    ("/api/chat", {"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    ("/api/chat", {"messages": [{"role": "user", "images": ["AAAA"] * 9}] * 2}, "messages has 18 images"),
]
"""What is wrong only together, or with this model."""


def _body(**fields: str) -> bytes:
    return ("{" + ",".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


def malformed() -> Iterator[Case]:
    """Every case. A field of an object is named by its path."""
    chat = '[{"role": "user", "content": "x"}]'
    for path, fields, right in (
        ("/api/generate", {**COMMON, **GENERATE}, {"prompt": '"x"'}),
        ("/api/chat", {**COMMON, **CHAT}, {"messages": chat}),
    ):
        for name, values in fields.items():
            for value in values:
                yield path, _body(**{**right, name: value}), name
    for name, values in MESSAGE.items():
        for value in values:
            message = ",".join(f'"{key}": {one}' for key, one in {"role": '"user"', name: value}.items())
            yield "/api/chat", _body(messages=f"[{chat[1:-1]}, {{{message}}}]"), f"messages[1].{name}"
    wrong_types = [
        *((name, NOT_INTEGERS) for name in OPTION_INTEGERS),
        *((name, NOT_NUMBERS) for name in OPTION_NUMBERS),
        *((name, NOT_BOOLEANS) for name in OPTION_BOOLEANS),
    ]
    for name, values in wrong_types:
        for value in values:
            yield "/api/generate", _body(prompt='"x"', options=f'{{"{name}": {value}}}'), f"options.{name}"
    for name, values in OUT_OF_RANGE.items():
        for value in values:
            yield "/api/chat", _body(messages=chat, options=f'{{"{name}": {value}}}'), name
    for path, given, words in TOGETHER:
        yield path, json.dumps(given).encode(), words
    for name, values in {
        "input": ["1", "true", "{}", "[1]", "[null]", json.dumps(["x"] * 4097)],
        "truncate": NOT_BOOLEANS,
        "dimensions": [*NOT_INTEGERS, "-1", "1.0"],
        "options": ["1", '{"seed": "x"}'],
        "keep_alive": ["{}"],
    }.items():
        for value in values:
            yield "/api/embed", _body(**{"input": '"x"', name: value}), name
    for value in NOT_TEXTS:
        yield "/api/embeddings", _body(prompt=value), "prompt"
        yield "/api/show", _body(name=value), "name"
        yield "/api/pull", _body(model=value), "model"
    for value in NOT_BOOLEANS:
        yield "/api/pull", _body(stream=value), "stream"
        yield "/api/show", _body(verbose=value), "verbose"
    for path in ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/show", "/api/pull"):
        for body in (b"", b"{", b"[]", b'"x"', b"1", b"{} {", b'{"model": NaN}', b"[" * 100_000):
            if body != b"{} {":  # what follows the first value is ignored
                yield path, body, "the body"
