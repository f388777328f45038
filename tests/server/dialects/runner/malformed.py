"""Requests that must be refused, and the name that each refusal must contain."""

from __future__ import annotations

import json
from collections.abc import Iterator

Case = tuple[str, bytes, str]
"""(path, body, what the answer must contain)"""

TEXTS = ["prompt", "grammar", "priority"]
INTEGERS = [
    *["n_predict", "n_keep", "seed", "top_k", "repeat_last_n", "mirostat", "n_probs", "logprobs"],
    *["dry_allowed_length", "dry_penalty_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"],
]
NUMBERS = [
    *["temperature", "top_p", "min_p", "tfs_z", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"],
    *["repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base"],
    *["dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "deadline"],
]
BOOLEANS = [
    *["cache_prompt", "penalize_nl", "shift", "truncate", "low_vram", "f16_kv", "logits_all", "vocab_only"],
    *["use_mmap", "use_mlock"],
]
LISTS = ["stop", "dry_sequence_breakers", "image_data", "logit_bias", "adapters"]

HUGE = "1" + "0" * 5000
NOT_INTEGERS = ["1.0", "1e3", "true", '"1"', "[]", "{}", HUGE, "-" + HUGE, "9223372036854775808", "1e400"]
NOT_NUMBERS = ["true", '"1"', "[]", "{}", "1e400", "-1e400", HUGE, "1e39"]
NOT_BOOLEANS = ["1", "0.0", '"true"', "[]", "{}"]

OUT_OF_RANGE = {
    "top_k": ["4294967296", "-9223372036854775808"],
    "repeat_last_n": ["1048577", "2147483647"],
    "mirostat": ["-1", "3"],
    "n_probs": ["101"],
    "logprobs": ["101"],
    "dry_allowed_length": ["0", "-3", "1048577"],
    "dry_penalty_last_n": ["-2", "2147483647"],
    "min_p": ["-0.1", "1.1"],
    "top_p": ["-1"],
    "typical_p": ["-1"],
    "tfs_z": ["-1"],
    "top_n_sigma": ["-2"],
    "xtc_probability": ["-0.1", "2"],
    "xtc_threshold": ["-0.1", "2"],
    "repeat_penalty": ["0", "-1", "1001"],
    "presence_penalty": ["-1001", "1e30"],
    "frequency_penalty": ["-1001", "1e30"],
    "dry_multiplier": ["-1"],
    "dry_base": ["0.5"],
    "dynatemp_range": ["-1"],
    "dynatemp_exponent": ["-1"],
    "mirostat_tau": ["-1"],
    "mirostat_eta": ["-1"],
    "temperature": ["1e7", "-1e7"],
    "priority": ['"urgent"', '""', '"Background"'],
    "deadline": ["0", "-1", "0.0001", "1e9"],
    "logit_bias": [
        *["[[-1, 1]]", "[[1, 1e400]]", "[[1, 1e9]]", "[[4294967296, 1]]", "[[1]]", "[1]", '{"x": 1}'],
        *['{"1": "2"}', "[[1, true]]", "[[true, 1]]", "[[1.5, 1]]", json.dumps([[i, 1] for i in range(1025)])],
    ],
    "stop": ['["\\ud800"]', json.dumps(["x"] * 65), json.dumps(["x" * 1025]), "[1]", "[[]]", "[{}]"],
    "grammar": [json.dumps("x" * 65537), '"root ::= \\u0000"', '"\\udfff"'],
    "dry_sequence_breakers": ['[""]', '["\\u0000"]', json.dumps(["x"] * 17), json.dumps(["x" * 65])],
    "image_data": [json.dumps([{"id": i, "data": "AAAA"} for i in range(17)])],
    "image_data[0]": ["[1]", "[null]", "[[]]", '["AAAA"]'],
    "image_data[1]": ['[{"data": "AAAA"}, true]'],
    "image_data[0].id": [f'[{{"data": "AAAA", "id": {value}}}]' for value in [*NOT_INTEGERS, "-1", "2147483648"]],
    "image_data[0].data": [
        f'[{{"data": {value}}}]'
        for value in [
            "1",
            "null",
            '""',
            "[]",
            '"!"',
            '"A"',
            '"AAA"',
            '"===="',
            '"AA=A"',
            '"AA==AA=="',
            '"\\u00e9"',
            '"-_-_"',
        ]
    ],
    "image_data[1].data": ['[{"data": "AAAA"}, {"ID": 1, "DATA": "?"}]', '[{"data": "AAAA"}, {}]'],
    "prompt": ['"\\ud800"', '"a\\udc00b"', '""'],
}
ADAPTERS = {
    "adapters": [
        *["[1]", "[null]", '["a"]', "[{}]", '[{"scale": 1}]', '[{"name": null}]', '[{"name": "a"}, {"NAME": "a"}]'],
        json.dumps([{"name": str(i)} for i in range(17)]),
    ],
    "adapters.name": [f'[{{"name": {value}}}]' for value in ("1", "[]", '"\\ud800"', json.dumps("a" * 1000))],
    "adapters.scale": [f'[{{"name": "a", "scale": {value}}}]' for value in [*NOT_NUMBERS, "1001", "-1001"]],
}
OTHERS = {
    "/embedding": {
        "content": ["1", "true", "[]", "{}", '"\\ud800"', HUGE, '""', json.dumps(["x"] * 4097)],
        "content[0]": ["[1]", "[null]", "[[]]", '["\\ud800"]'],
        "content[1]": ['["a", {}]', json.dumps(["a", "x" * (4 << 20) + "x"])],
        "normalize": NOT_BOOLEANS,
        "truncate": NOT_BOOLEANS,
        "cache_prompt": NOT_BOOLEANS,
        "dimensions": [*NOT_INTEGERS, "0", "-1", "2147483648"],
        **ADAPTERS,
    },
    "/rerank": {
        "query": ["1", "true", "[]", '["x"]', '""', '"\\ud800"'],
        "documents": ['"x"', "1", "{}", "[]", "[1]", "[null]", '[["x"]]', '["\\ud800"]', json.dumps(["x"] * 4097)],
        "top_n": [*NOT_INTEGERS, "0", "-1"],
        "truncate": NOT_BOOLEANS,
        **ADAPTERS,
    },
    "/adapters": {
        "file": [
            *["1", "true", "[]", "{}", '""', '"."', '".."', '"../x"', '"/etc/passwd"', '"a/b"', '"a/../b"', '"a/"'],
            *[
                r'"a\\b"',
                r'"a\u0000"',
                r'"\u0000"',
                '".hidden"',
                '"\\ud800"',
                json.dumps("a" * 256),
                json.dumps("é" * 128),
            ],
        ],
        "name": ["1", "true", "[]", "{}", '"\\ud800"'],
        "scale": [*NOT_NUMBERS, "1001", "-1001"],
    },
}
"""By path: the name that the answer must contain, and values of the field that it begins with."""


def malformed() -> Iterator[Case]:
    for name in TEXTS:
        yield from (completion(name, value) for value in ("1", "1.5", "true", "[]", "{}", '["x"]'))
    for name in INTEGERS:
        yield from (completion(name, value) for value in NOT_INTEGERS)
    for name in NUMBERS:
        yield from (completion(name, value) for value in NOT_NUMBERS)
    for name in BOOLEANS:
        yield from (completion(name, value) for value in NOT_BOOLEANS)
    for name in LISTS:
        yield from (completion(name, value) for value in ("1", "true", '"x"'))
    for name, values in (*OUT_OF_RANGE.items(), *ADAPTERS.items()):
        yield from (completion(name, value) for value in values)
    for path, fields in OTHERS.items():
        for name, values in fields.items():
            yield from (wrong(path, name, value) for value in values)
    for value in ("1", "true", "[]", "{}", '"\\ud800"', HUGE):
        yield "/tokenize", f'{{"content": {value}}}'.encode(), "content"
    for value in ("1", "true", '"x"', "{}", '["x"]', "[1.0]", "[true]", "[-1]", "[2147483648]", f"[{HUGE}]", "[null]"):
        yield "/detokenize", f'{{"tokens": {value}}}'.encode(), "tokens"
    yield "/embedding", b"{}", "content"
    yield "/rerank", b"{}", "query"
    yield "/rerank", b'{"query": "x"}', "documents"
    yield "/rerank", b'{"documents": ["x"]}', "query"
    yield "/adapters", b"{}", "file"
    yield "/adapters", b'{"name": "x"}', "file"
    yield "/completion", b"{}", "prompt"
    yield "/completion", b"null", "prompt"
    # Any case, and the last of several counts.
    yield "/completion", b'{"PROMPT": 1}', "prompt"
    yield "/completion", b'{"prompt": "x", "N_Predict": "many"}', "n_predict"
    yield "/completion", b'{"prompt": "x", "prompt": 1}', "prompt"
    yield "/completion", b'{"prompt": "x", "top_k": 1, "top_k": true}', "top_k"
    yield from not_json()


RIGHT = {
    "/completion": '"prompt": "x"',
    "/embedding": '"content": "x"',
    "/rerank": '"query": "x", "documents": ["y"]',
    "/adapters": '"file": "x"',
}


def completion(name: str, value: str) -> Case:
    return wrong("/completion", name, value)


def wrong(path: str, name: str, value: str) -> Case:
    """All that is needed, and then, as the last duplicate counts, the field that `name` begins with."""
    field = name.partition("[")[0].partition(".")[0]
    return path, f'{{{RIGHT[path]}, "{field}": {value}}}'.encode(), name


def not_json() -> Iterator[Case]:
    whole = b'{"prompt": "x", "stop": ["a", "b"], "n_predict": -12, "cache_prompt": true}'
    broken = [whole[:end] for end in range(len(whole))]
    broken += [b"\xff" + whole, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole.replace(b'"', b"'")]
    broken += [b"{,}", b"[", b"[]", b"1", b'"x"', b"true", b"NaN", b"prompt=x", b"\0", b"{}"[:1], b"{'a':1}"]
    broken += [b'{"prompt": "x" "n_predict": 1}', b'{"prompt": "x",}', b'{prompt: "x"}', b'{"prompt": "\n"}']
    broken += [b'{"prompt": "\\x41"}', b'{"prompt": "\\u12"}', b'{"n_predict": 01}', b'{"n_predict": +1}']
    broken += [b'{"top_p": NaN}', b'{"top_p": Infinity}', b'{"top_p": -Infinity}', b'{"top_p": .5}', b'{"top_p": 5.}']
    broken += [b'{"n_predict": 0x10}', b'{"cache_prompt": True}', b'{"cache_prompt": None}']
    broken += [b"[" * 50_000, b'{"a":' * 30_000, b'{"prompt": "x", "stop": ' + b"[" * 50_000]
    for body in broken:
        yield "/completion", body, "Bad request"
        for path in ("/embedding", "/rerank", "/adapters"):
            yield path, body, "bad request: "
