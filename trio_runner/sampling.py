"""The table of sampling parameters: how the next token is chosen.

To add a parameter, add one field here, and one line to `trio_sampler_params` in native/trio_llama.h with the code that
uses it. Everything else is made from this table: the range check, the fields of the HTTP dialects, the options of
`trio-runner run` with their help, the table in the documentation, the values in the native struct, and the keyword
arguments of `Engine.generate`, which `ci/options` writes down for type checkers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trio_runner.errors import InvalidRequest
from trio_runner.json_schema import MAX_SCHEMA_BYTES, check_schema
from trio_runner.parameters import (
    boolean,
    first_complaint,
    integer,
    integer_complaint,
    number,
    number_complaint,
    other,
    text,
    text_complaint,
)

MAX_LOGIT_BIAS = 1024
"""Tokens whose logits one request may change."""
MAX_LOGPROBS = 100
"""Alternatives that one request may ask for with each token."""
MAX_DRY_BREAKERS = 16
"""DRY breakers that one request may have: making a sampler takes time for each."""
MAX_DRY_BREAKER_BYTES = 64
"""Bytes that one DRY breaker may have."""
MAX_GRAMMAR_BYTES = 64 * 1024
"""Bytes that a grammar may have."""
MAX_WINDOW = 1 << 20
"""Tokens that a repetition penalty may look back; llama.cpp allocates the whole window at once."""

RANDOM_SEED = 0xFFFFFFFF
"""The seed that means "choose one", as in llama.cpp."""

_ANY_INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The samplers run in the order of the fields.

    The bounds are wide for people and tight for machines: each keeps a value away from something in llama.cpp that
    aborts, allocates without limit, or silently samples nonsense. Raises `InvalidRequest`, which names the field, for a
    value outside its bounds.
    """

    logit_bias: tuple[tuple[int, float], ...] = other(
        (),
        doc="Pairs of a token and a number that is added to the logit of that token. Negative infinity forbids it.",
        options=(),
        default_text="none",
    )
    ignore_eos: bool = boolean(
        False, doc="Never choose a token that ends the generation, so that it goes on up to its limit."
    )
    repeat_last_n: int = integer(
        64,
        -1,
        MAX_WINDOW,
        doc="Tokens that the repeat, frequency and presence penalties look back on, the prompt included. 0 turns them "
        "off, -1 means the whole context.",
    )
    repeat_penalty: float = number(
        1.1,
        1e-3,
        1e3,
        doc="Divides positive logits, and multiplies negative logits, of tokens that occurred recently. 1 is off.",
    )
    frequency_penalty: float = number(
        0.0, -1e3, 1e3, doc="Is subtracted from the logit of a token for each time it occurred recently. 0 is off."
    )
    presence_penalty: float = number(
        0.0, -1e3, 1e3, doc="Is subtracted once from the logit of a token that occurred recently. 0 is off."
    )
    penalize_nl: bool = boolean(True, doc="Apply the penalties to the newline token too.", options=())
    dry_multiplier: float = number(
        0.0, 0, 1e3, doc='Strength of the DRY penalty ("don\'t repeat yourself") on repeated phrases. 0 is off.'
    )
    dry_base: float = number(1.75, 1, 1e3, doc="Base of the DRY penalty, which grows exponentially with the phrase.")
    dry_allowed_length: int = integer(
        2, 1, MAX_WINDOW, doc="Phrases up to this many tokens may repeat without a DRY penalty."
    )
    dry_penalty_last_n: int = integer(
        -1, -1, MAX_WINDOW, doc="Tokens that the DRY penalty looks back on. 0 turns it off, -1 means the whole context."
    )
    dry_sequence_breakers: tuple[str, ...] = other(
        ("\n", ":", '"', "*"),
        doc="Texts that end a phrase, so that DRY does not count across them.",
        options=(),
        default_text='"\\n", ":", "\\"", "*"',
    )
    top_n_sigma: float = number(
        -1.0,
        -1,
        1e6,
        doc="Keep only tokens whose logits lie within this many standard deviations of the highest. -1 is off.",
    )
    top_k: int = integer(
        40, *_ANY_INT32, doc="Sample only from this many of the most probable tokens. 0 and below is off."
    )
    tfs_z: float = number(
        1.0, 0, 1e6, doc="Tail-free sampling: cut the tail where the curve of probabilities flattens. 1 is off."
    )
    typical_p: float = number(
        1.0, 0, 1e6, doc="Locally typical sampling: keep the most typical tokens with this total probability. 1 is off."
    )
    top_p: float = number(
        0.9, 0, 1e6, doc="Nucleus sampling: keep the most probable tokens with this total probability. 1 is off."
    )
    min_p: float = number(
        0.0, 0, 1, doc="Drop tokens less probable than this share of the most probable token. 0 is off."
    )
    xtc_probability: float = number(
        0.0, 0, 1, doc="Chance, for each token, that XTC excludes the most probable choices. 0 is off."
    )
    xtc_threshold: float = number(0.1, 0, 1, doc="Probability from which XTC counts a token among the top choices.")
    temperature: float = number(
        0.8,
        -1e6,
        1e6,
        doc="Divides the logits before the draw: higher values make the text more varied. At 0 and below, the most "
        "probable token is always chosen.",
    )
    dynatemp_range: float = number(
        0.0,
        0,
        1e6,
        doc="The temperature varies by up to this much in both directions, with the entropy of the choice. 0 is off.",
    )
    dynatemp_exponent: float = number(1.0, 0, 1e3, doc="How the entropy is mapped to the temperature.")
    mirostat: int = integer(
        0,
        0,
        2,
        doc="Version of Mirostat, 1 or 2, which replaces all truncating samplers from top_n_sigma to XTC. 0 is off.",
    )
    mirostat_tau: float = number(5.0, 0, 1e3, doc="Surprise per token that Mirostat aims at, in bits.")
    mirostat_eta: float = number(0.1, 0, 1e3, doc="Learning rate of Mirostat.")
    seed: int = integer(
        RANDOM_SEED,
        0,
        RANDOM_SEED,
        doc="Seed of the random draw. The same seed gives the same text for the same request.",
        default_text="random",
    )
    grammar: str = text(
        "",
        max_bytes=MAX_GRAMMAR_BYTES,
        doc="GBNF grammar with a rule named root, which the text must follow. A token that the other samplers chose "
        "against the grammar is chosen anew under it.",
        options=(),
        default_text="none",
    )
    json_schema: str = text(
        "",
        max_bytes=MAX_SCHEMA_BYTES,
        doc="JSON schema, as JSON text, that the text must obey: it is one value of the schema, and nothing before or "
        "after it. Tokens that the schema does not allow are no candidates for the other samplers. Python callers "
        "may give an object or a class, too. Not together with `grammar`.",
        options=(),
        default_text="none",
    )
    logprobs: int = integer(
        -1,
        -1,
        MAX_LOGPROBS,
        doc="Number of most probable alternatives to report with every token. 0 reports the chosen token's own "
        "log-probability, -1 reports nothing.",
        options=(),
    )
    post_sampling_probs: bool = boolean(
        False,
        doc="Report log-probabilities as they are after all samplers, in place of the model's own. Tokens that a "
        "sampler ruled out are no alternatives. A token that is chosen without a draw has the probability 1.",
        options=(),
    )

    def __post_init__(self) -> None:
        complaint = first_complaint(self)
        if complaint is not None:
            raise InvalidRequest(complaint[1], param=complaint[0])
        if "\0" in self.grammar:
            raise InvalidRequest("grammar must not contain a NUL character", param="grammar")
        if self.json_schema:
            if self.grammar:
                raise InvalidRequest("json_schema and grammar cannot be combined", param="json_schema")
            check_schema(self.json_schema)
        object.__setattr__(self, "logit_bias", _token_biases(self.logit_bias))
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))


def _token_biases(value: object) -> tuple[tuple[int, float], ...]:
    # Lists become tuples: a frozen value must not change when the caller's list does.
    pairs = [as_tuple("logit_bias", pair, 2) for pair in as_tuple("logit_bias", value, MAX_LOGIT_BIAS)]
    for pair in pairs:
        if len(pair) != 2:
            raise InvalidRequest("logit_bias must be a list of (token, bias)", param="logit_bias")
        token, bias = pair
        complaint = integer_complaint("logit_bias", token, 0, 2**31 - 1)
        if complaint is None and bias != -math.inf:
            complaint = number_complaint("logit_bias", bias, -1e6, 1e6)
        if complaint is not None:
            raise InvalidRequest(complaint, param="logit_bias")
    return tuple((token, bias) for token, bias in pairs)


def _breakers(value: object) -> tuple[str, ...]:
    name = "dry_sequence_breakers"
    breakers = as_tuple(name, value, MAX_DRY_BREAKERS)
    for breaker in breakers:
        complaint = text_complaint(name, breaker, MAX_DRY_BREAKER_BYTES)
        if complaint is None and (not breaker or "\0" in breaker):
            complaint = f"{name} must not be empty or contain NUL"
        if complaint is not None:
            raise InvalidRequest(complaint, param=name)
    return breakers


def as_tuple(name: str, value: object, max_items: int) -> tuple[Any, ...]:
    """`value`, a sequence that is no text, as a tuple. Raises `InvalidRequest`, which names the field `name`, for
    anything else and for more than `max_items` items."""
    if isinstance(value, (str, bytes, bytearray, memoryview)) or not isinstance(value, Sequence):
        raise InvalidRequest(f"{name} must be a list, not {type(value).__name__}", param=name)
    if len(value) > max_items:
        raise InvalidRequest(f"{name} may have at most {max_items} entries, not {len(value)}", param=name)
    return tuple(value)
