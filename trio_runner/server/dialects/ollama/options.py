"""The `options` of requests in Ollama's dialect: how the next token is chosen, and when to stop. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from trio_runner.parameters import parameters_of
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import (
    ADAPTERS,
    BOOLEAN,
    INTEGER,
    STOP,
    Field,
    Fields,
    field,
    fields_of,
    ignored,
)

REPEAT_PENALTY: Final = 1.0
"""Ollama's default since version 0.32.10. Before, it was 1.1, which is ours elsewhere. Its other defaults are ours."""
CONTEXTS_OF_TEXT: Final = 10
"""How many times the context a text without a limit may fill: as in Ollama, so that no text is endless."""
UNTIL_FULL: Final = -2
"""The `num_predict` that ends the text where the context is full."""
MAX_INT32: Final = 2**31 - 1

_ELSEWHERE: Final = ("logprobs", "json_schema")
"""Sampling parameters that Ollama has beside the options: `logprobs`, `top_logprobs` and `format`."""
_SETTLED: Final = "Checked and ignored: this is settled when the model is loaded."
_SETTLED_INTEGERS: Final = ("num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict")
_SETTLED_BOOLEANS: Final = (
    *("numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only"),
)


def _integer(name: str, value: Any) -> int:
    """Ollama takes 1.0 for 1, but 1.5 too, which we do not."""
    return json_in.check_integer(name, int(value) if type(value) is float and value.is_integer() else value)


def _lenient(known: Field) -> Field:
    return replace(known, check=_integer) if known.check is json_in.check_integer else known


_SAMPLING: Final = {
    name: known
    for name, known in fields_of(SamplingParams, repeat_penalty=REPEAT_PENALTY).items()
    if name not in _ELSEWHERE
}
_FIELDS: Fields = {
    "num_predict": field(
        INTEGER,
        "Tokens to generate at most. -1: until the model ends the text, with a bound of ten times the context. -2: "
        "until the context is full.",
        default=-1,
    ),
    "num_keep": field(INTEGER, parameters_of(GenerateRequest)["n_keep"].doc, default=4),
    "stop": STOP,
    "num_ctx": field(
        INTEGER,
        "Tokens of context that the client expects. It is accepted and changes nothing: the context is settled when "
        "the model is loaded. A value above the context that is served is logged once.",
        default_text="the context that is served",
    ),
    **_SAMPLING,
    "seed": field(INTEGER, "Seed of the random draw. Only the lowest 32 bits count; -1 chooses a seed.", default=-1),
    "penalize_newline": field(BOOLEAN, "Another name for `penalize_nl`.", default=True),
    "adapters": ADAPTERS,
    **fields_of(GenerateRequest, "priority", "deadline"),
    **{name: ignored(INTEGER, _SETTLED) for name in _SETTLED_INTEGERS},
    **{name: ignored(BOOLEAN, _SETTLED) for name in _SETTLED_BOOLEANS},
}
OPTIONS: Final[Fields] = {name: _lenient(known) for name, known in _FIELDS.items()}
"""All options. Those after `num_ctx` that Ollama does not have are ours."""


def settings(given: Mapping[str, Any], **sampling: Any) -> dict[str, Any]:
    """The fields of a `GenerateRequest` that `given`, checked options, decide. `sampling` are further sampling
    parameters. Raises `InvalidRequest`, which names the option, for a value outside its bounds."""
    n_predict = given.get("num_predict", -1)
    return {
        "max_tokens": None if n_predict < 0 else min(n_predict, MAX_INT32),
        "n_keep": max(-1, min(given.get("num_keep", 4), MAX_INT32)),
        "stop": given.get("stop", ()),
        "sampling": _sampling(given, sampling),
        "adapters": given.get("adapters"),
        "priority": given.get("priority", "interactive"),
        "deadline": given.get("deadline"),
        **({"shift": False} if n_predict == UNTIL_FULL else {}),
    }


def _sampling(given: Mapping[str, Any], more: Mapping[str, Any]) -> SamplingParams:
    params: dict[str, Any] = {"repeat_penalty": REPEAT_PENALTY, **more}
    params.update((name, given[name]) for name in _SAMPLING if name in given)
    params["seed"] = params.get("seed", -1) & 0xFFFFFFFF
    if "penalize_newline" in given:
        params["penalize_nl"] = given["penalize_newline"]
    return SamplingParams(**params)
