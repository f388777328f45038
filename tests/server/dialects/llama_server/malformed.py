"""Requests that must be refused, and the name that each refusal must contain."""

from __future__ import annotations

import json
from collections.abc import Iterator

Case = tuple[str, bytes, str]
"""(path, body, what the answer must contain)"""

HUGE = "1" + "0" * 5000
NOT_INTEGERS = ["1.0", "1e3", "true", '"1"', "[]", "{}", HUGE, "9223372036854775808", "1e400"]
NOT_NUMBERS = ["true", '"1"', "[]", "{}", "1e400", HUGE]
NOT_BOOLEANS = ["1", "0.0", '"true"', "[]", "{}"]
NOT_TEXTS = ["1", "true", "[]", "{}", '"\\ud800"']

INTEGERS = [
    "id_slot",
    *["n_predict", "max_tokens", "max_completion_tokens", "n_cmpl", "n", "n_keep", "n_indent", "t_max_predict_ms"],
    *["seed", "n_probs", "logprobs", "top_k", "repeat_last_n", "dry_allowed_length", "dry_penalty_last_n", "mirostat"],
    *["n_discard", "n_cache_reuse", "t_max_prompt_ms", "min_keep", "reasoning_budget_tokens", "sse_ping_interval"],
]
NUMBERS = [
    *["temperature", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "tfs_z"],
    *["repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "deadline"],
    *["dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "adaptive_target", "adaptive_decay"],
]
BOOLEANS = [
    *["stream", "cache_prompt", "return_tokens", "return_progress", "timings_per_token", "penalize_nl"],
    *["backend_sampling", "verbose", "echo", "parse_tool_calls", "grammar_lazy", "ignore_eos", "post_sampling_probs"],
]
TEXTS = ["model", "grammar", "priority", "reasoning_format"]

VALUES = {
    "prompt": [
        *["1", "1.5", "true", "[]", "{}", '"\\ud800"', '{"multimodal_data": []}', "[true]", '["a", true]', "[1.5]"],
        *["[-1]", "[2147483648]", "[1, true]", "[1, []]", '[1, "\\ud800"]', '[["a", {}]]', "[[1.5]]", "[null]"],
        json.dumps(["x"] * 129),
    ],
    "prompt[1]": ['["a", true]', '["a", {}]', '["a", [[]]]', '["a", ["\\ud800"]]'],
    "prompt.prompt_string": ['{"prompt_string": 1}', '{"prompt_string": "\\ud800"}', '{"x": 1}'],
    "prompt.multimodal_data": [
        *[f'{{"prompt_string": "<__media__>", "multimodal_data": {value}}}' for value in ("1", "{}", "[]", '"AAAA"')],
        '{"prompt_string": "a", "multimodal_data": ["AAAA"]}',
        json.dumps({"prompt_string": "<__media__>" * 17, "multimodal_data": ["AAAA"] * 17}),
    ],
    "prompt.multimodal_data[0]": [
        f'{{"prompt_string": "<__media__>", "multimodal_data": [{value}]}}'
        for value in ("1", '""', '"!"', '"AAA"', '"-_-_"')
    ],
    "n_predict": ["-2", "2147483648"],
    "max_tokens": ["-2"],
    "n_cmpl": ["0", "-1", "129"],
    "n": ["0"],
    "n_keep": ["-2"],
    "n_indent": ["-1"],
    "t_max_predict_ms": ["-2"],
    "id_slot": ["-2"],
    "json_schema": ["1", '"x"', "[]", "false", '{"x-guidance": 1}'],
    "n_probs": ["-1", "101"],
    "logprobs": ["-1", "101"],
    "stop": ["1", "true", "{}", "[1]", '["\\ud800"]', json.dumps(["x"] * 65), json.dumps(["x" * 1025])],
    "top_k": ["4294967296"],
    "repeat_last_n": ["1048577", "-2"],
    "dry_allowed_length": ["0", "1048577"],
    "dry_penalty_last_n": ["-2", "2147483647"],
    "mirostat": ["-1", "3"],
    "min_p": ["-0.1", "1.1"],
    "top_p": ["-1"],
    "typical_p": ["-1"],
    "top_n_sigma": ["-2"],
    "xtc_probability": ["-0.1", "2"],
    "xtc_threshold": ["-0.1", "2"],
    "repeat_penalty": ["0", "1001"],
    "dry_multiplier": ["-1"],
    "dry_base": ["0.5"],
    "dynatemp_range": ["-1"],
    "temperature": ["1e7"],
    "priority": ['"urgent"'],
    "deadline": ["0", "-1"],
    "grammar": [json.dumps("x" * 65537), '"root ::= \\u0000"'],
    "dry_sequence_breakers": ["1", '"x"', "[1]", '[""]', json.dumps(["x"] * 17)],
    "samplers": ["1", "true", "{}", "[1]", '["nothing"]', '["top_p", "top_k"]', '["top_k", "top_k"]', '"pk"', '"q"'],
    "logit_bias": [
        *["1", "true", '"x"', "[1]", "[[1]]", "[[1, true]]", "[[true, 1]]", "[[1.5, 1]]", "[[-1, 1]]", "[[1, 1e400]]"],
        *['{"1": "2"}', '{"a": true}', "[[4294967296, 1]]", "[[1, 1e9]]", json.dumps([[i, 1] for i in range(1025)])],
        '[["\\ud800", 1]]',
    ],
    "lora": [
        *["1", "true", "{}", '"x"', "[1]", "[null]", "[{}]", '[{"scale": 1}]', '[{"id": 0}, {"id": 0}]'],
        json.dumps([{"id": i} for i in range(17)]),
    ],
    "lora.id": [f'[{{"id": {value}}}]' for value in (*NOT_INTEGERS, "-1", "2147483648")],
    "lora.scale": [f'[{{"id": 0, "scale": {value}}}]' for value in (*NOT_NUMBERS, "1001", "-1001")],
    "response_fields": ["1", '"content"', "{}", "[1]", '["\\ud800"]', json.dumps(["x"] * 257)],
    "stream_options": ["1", "[]", '"x"'],
    "min_keep": ["2", "-1"],
    "adaptive_target": ["0.5"],
    "grammar_lazy": ["true"],
    "grammar_triggers": ["1", '[{"type": 0, "value": "x"}]'],
    "preserved_tokens": ["1", '["<tool>"]'],
    "reasoning_budget_tokens": ["0", "100", "-2"],
    "image_data": ["1", '[{"id": 1, "data": "AAAA"}]'],
    "sse_ping_interval": ["-2"],
}

OTHERS = {
    "/llama/embedding": {
        "content": [
            *["1", "true", "[]", "{}", '""', '"\\ud800"', "[true]", "[-1]", "[2147483648]", "[1.5]"],
            '{"prompt_string": "<__media__>", "multimodal_data": ["AAAA"]}',
        ],
        "content[1]": ['["a", ""]', '["a", []]', '["a", true]'],
        "input": ["1", "[]", '""'],
        "embd_normalize": [*NOT_INTEGERS, "-2", "1001"],
        "encoding_format": ["1", '"base64"', '"x"'],
        "model": NOT_TEXTS,
    },
    "/llama/rerank": {
        "query": ["1", "true", "[]", '["x"]', '"\\ud800"'],
        "documents": ['"x"', "1", "{}", "[]", "[1]", "[null]", '["\\ud800"]', json.dumps(["x"] * 4097)],
        "texts": ["1", "[]", "[1]"],
        "top_n": [*NOT_INTEGERS, "-1"],
        "return_text": NOT_BOOLEANS,
        "model": NOT_TEXTS,
    },
    "/llama/tokenize": {
        "content": ["1", "true", "{}", '"\\ud800"', "[true]", "[1.5]", "[-1]", "[null]", '["a", {}]'],
        "add_special": NOT_BOOLEANS,
        "parse_special": NOT_BOOLEANS,
        "with_pieces": NOT_BOOLEANS,
    },
    "/llama/apply-template": {
        "messages": ["1", '"x"', "{}", "[1]", "[null]", '[{"role": 1}]', '[{"role": "user", "content": 1}]'],
        "tools": ["1", '"x"', "{}", "[1]"],
        "add_generation_prompt": NOT_BOOLEANS,
        "chat_template_kwargs": ["1", "[]", '"x"'],
    },
    "/llama/detokenize": {"tokens": ["1", "true", '"x"', "{}", '["x"]', "[1.0]", "[true]", "[-1]", "[2147483648]"]},
}

RIGHT = {
    "/llama/completion": '"prompt": "x"',
    "/llama/embedding": '"content": "x"',
    "/llama/rerank": '"query": "x", "documents": ["y"]',
    "/llama/tokenize": '"content": "x"',
    "/llama/detokenize": '"tokens": [1]',
    "/llama/apply-template": '"messages": [{"role": "user", "content": "x"}]',
}


def malformed() -> Iterator[Case]:
    path = "/llama/completion"
    for names, values in (
        (INTEGERS, NOT_INTEGERS),
        (NUMBERS, NOT_NUMBERS),
        (BOOLEANS, NOT_BOOLEANS),
        (TEXTS, NOT_TEXTS),
    ):
        for name in names:
            yield from (wrong(path, name, value) for value in values)
    for name, found in VALUES.items():
        yield from (wrong(path, name, value) for value in found)
    for path, fields in OTHERS.items():
        for name, found in fields.items():
            yield from (wrong(path, name, value) for value in found)
    yield "/llama/completion", b"{}", "prompt"
    yield "/llama/completion", b'{"prompt": null}', "prompt"
    yield "/llama/completion", b'{"PROMPT": 1}', "prompt"
    yield "/llama/completion", b'{"prompt": "x", "top_k": 1, "TOP_K": true}', "top_k"
    yield "/llama/apply-template", b"{}", "messages"
    yield "/llama/embedding", b"{}", "content"
    yield "/llama/rerank", b'{"documents": ["x"]}', "query"
    yield "/llama/rerank", b'{"query": "x"}', "documents"
    texts = ", ".join(['"x"'] * 257)
    yield wrong("/llama/completion", "prompt", f"[1, {texts}]")
    yield wrong("/llama/tokenize", "content", f"[{texts}]")
    yield wrong("/llama/completion", "logit_bias", "{" + ", ".join(f'"x{n}": 1' for n in range(257)) + "}")
    for body in (b"", b"[", b"[]", b"1", b'"x"', b"NaN", b"prompt=x", b'{"prompt": "x",}', b'{"top_p": NaN}'):
        yield "/llama/completion", body, "JSON object"


def wrong(path: str, name: str, value: str) -> Case:
    """All that is needed and then, as the last duplicate counts, the field that `name` begins with."""
    field = name.partition("[")[0].partition(".")[0]
    return path, f'{{{RIGHT[path]}, "{field}": {value}}}'.encode(), name
