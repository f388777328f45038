"""The field `samplers` of llama-server: which samplers are used, in which order. Pure.

There, a request may put its samplers in any order. Here the order is fixed: that of llama-server's default. So a list
in this order has the same effect as there, and any other list is refused, because its effect would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.json_in import list_of

OFF: Final[Mapping[str, Mapping[str, float]]] = {
    "penalties": {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_n_sigma": {"top_n_sigma": -1.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0, "dynatemp_range": 0.0},
}
"""The samplers in the order in which they run, and the values of the parameters that switch each of them off."""

WITHOUT_EFFECT: Final = "infill"
"""A sampler that editors name and that does not exist here: it joins alternatives that begin alike."""

_LETTERS: Final = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
    "i": WITHOUT_EFFECT,
}
_OTHER_NAMES: Final = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical_p": "typ_p"}


def check_samplers(name: str, value: Any) -> tuple[str, ...]:
    """The samplers that a request names, by their names in `OFF`. A text names each by a letter."""
    if isinstance(value, str):
        names = tuple(_named(name, letter, _LETTERS.get(letter)) for letter in value)
    else:
        given = list_of(json_in.check_text, "strings")(name, value)
        names = tuple(_named(name, text, _known(text)) for text in given)
    places = [list(OFF).index(sampler) for sampler in names if sampler in OFF]
    if any(before >= after for before, after in pairwise(places)):
        raise InvalidRequest(f"{name} cannot change the order of the samplers, which is {', '.join(OFF)}", param=name)
    return names


def _known(text: str) -> str | None:
    plain = text.lower().replace("-", "_")
    for sampler in (*OFF, WITHOUT_EFFECT):
        if plain in (sampler, sampler.replace("_", "")):
            return sampler
    return _OTHER_NAMES.get(plain)


def _named(name: str, text: str, sampler: str | None) -> str:
    if sampler is None:
        raise InvalidRequest(
            f"{name} names {text[:40]!r}, but the samplers are {', '.join((*OFF, WITHOUT_EFFECT))}", param=name
        )
    return sampler


def switched_off(names: Sequence[str]) -> dict[str, float]:
    """The values of parameters that switch off all samplers but `names`."""
    return {
        parameter: value
        for sampler, values in OFF.items()
        if sampler not in names
        for parameter, value in values.items()
    }
