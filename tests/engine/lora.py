"""Toys with adapters, and the texts that they answer."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.engine.toys import (
    Toy,
)
from trio_runner.config import AdapterConfig
from trio_runner.request import AdapterChoice
from trio_runner.testing import toy_cache_key, toy_text

SCALES = {"one": 1.0, "two": 0.0, "three": -0.5}
"""The scales of the adapters by name. `two` applies only to requests that choose it."""


def with_adapters(toy: Toy) -> None:
    """Let the toy load the adapters of `SCALES`."""
    toy.adapters = tuple(AdapterConfig(f"/lora/{name}.gguf", scale) for name, scale in SCALES.items())


def chosen(**scales: float) -> tuple[AdapterChoice, ...]:
    return tuple(AdapterChoice(name, scale) for name, scale in scales.items())


def cache_key(**scales: float) -> str:
    return toy_cache_key([(f"/lora/{name}.gguf", float(scale)) for name, scale in scales.items() if scale])


def said(prompt: str, n_tokens: int = 20, /, **scales: float) -> str:
    """What the toy answers with these adapters."""
    return toy_text(prompt, n_tokens, cache_key(**scales))


CHOICES = st.dictionaries(st.sampled_from(list(SCALES)), st.sampled_from([0, 1, 1.0, 0.25, -2]))
