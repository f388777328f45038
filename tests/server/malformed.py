"""Requests that must be refused, each with the name that the refusal must contain."""

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
LISTS = ["stop", "dry_sequence_breakers", "image_data", "logit_bias"]

HUGE = "1" + "0" * 5000

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
    "image_data": [
        *["[1]", '[{"data": 1}]', '[{"data": "!"}]', '[{"data": "AAA"}]', '[{"id": "1"}]', '[{"id": 1.0}]'],
        *['[{"id": 1, "data": "AAAA"}]', "[{}]", '[{"data": "\\u00e9"}]'],
    ],
    "prompt": ['"\\ud800"', '"a\\udc00b"', '""'],
}


def malformed() -> Iterator[Case]:
    for name in TEXTS:
        yield from (completion(name, value) for value in ("1", "1.5", "true", "[]", "{}", '["x"]'))
    for name in INTEGERS:
        wrong = ["1.0", "1e3", "true", '"1"', "[]", "{}", HUGE, "-" + HUGE, "9223372036854775808", "1e400"]
        yield from (completion(name, value) for value in wrong)
    for name in NUMBERS:
        yield from (completion(name, value) for value in ("true", '"1"', "[]", "{}", "1e400", "-1e400", HUGE, "1e39"))
    for name in BOOLEANS:
        yield from (completion(name, value) for value in ("1", "0.0", '"true"', "[]", "{}"))
    for name in LISTS:
        yield from (completion(name, value) for value in ("1", "true", '"x"'))
    for name, values in OUT_OF_RANGE.items():
        yield from (completion(name, value) for value in values)
    for path, field in (("/embedding", "content"), ("/tokenize", "content")):
        for value in ("1", "true", "[]", "{}", '"\\ud800"', HUGE):
            yield path, f'{{"{field}": {value}}}'.encode(), field
    for value in ("1", "true", '"x"', "{}", '["x"]', "[1.0]", "[true]", "[-1]", "[2147483648]", f"[{HUGE}]", "[null]"):
        yield "/detokenize", f'{{"tokens": {value}}}'.encode(), "tokens"
    yield "/embedding", b"{}", "content"
    yield "/embedding", b'{"content": ""}', "content"
    yield "/completion", b"{}", "prompt"
    yield "/completion", b"null", "prompt"
    # Any case, and the last of several counts.
    yield "/completion", b'{"PROMPT": 1}', "prompt"
    yield "/completion", b'{"prompt": "x", "N_Predict": "many"}', "n_predict"
    yield "/completion", b'{"prompt": "x", "prompt": 1}', "prompt"
    yield "/completion", b'{"prompt": "x", "top_k": 1, "top_k": true}', "top_k"
    yield from not_json()


def completion(name: str, value: str) -> Case:
    prompt = "" if name == "prompt" else '"prompt": "x", '
    return "/completion", f'{{{prompt}"{name}": {value}}}'.encode(), name


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
        yield "/embedding", body, "bad request: "
