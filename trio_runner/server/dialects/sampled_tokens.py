"""Sampled tokens as answers report them, for every dialect. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trio_runner.events import Finished, SampledToken

LOWEST: Final = -3.4028234663852886e38
"""The lowest float32: what stands for the logarithm of zero, since JSON has no infinity."""


def finite_logprob(logprob: float, lowest: float = LOWEST) -> float:
    """`logprob`, or `lowest` if it is below that or no number."""
    return logprob if logprob > lowest else lowest  # NaN compares false


def last_of_answer(event: Finished) -> Iterable[SampledToken]:
    """The tokens that the last event reports and that belong to the answer: neither the end token nor those of a stop
    string."""
    return () if event.stop is not None else (token for token in event.tokens if token.piece)
