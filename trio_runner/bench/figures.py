"""Measurements and what is said of them: the one place with statistics. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["tokens/s", "ms", "s", "tokens", "MiB", "x", "nats", ""]


@dataclass(frozen=True, slots=True)
class Metric:
    """Something measured; `unit` is "" for a count."""

    name: str
    unit: Unit
    difference: bool = False
    """Whether it is what is left of two measurements: around zero, where ratios are noise."""


@dataclass(slots=True)
class Measured:
    """What one round of a scenario found: samples, and remarks for people."""

    samples: dict[Metric, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: Metric, *values: float) -> None:
        self.samples.setdefault(metric, []).extend(values)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Figures:
    """A sample in a few numbers."""

    n: int
    median: float
    p99: float
    minimum: float
    maximum: float


def figures(values: Sequence[float]) -> Figures:
    """Raises ValueError if there are no `values`."""
    if not values:
        raise ValueError("no values")
    return Figures(len(values), statistics.median(values), percentile(values, 99), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least so many percent of them do not exceed: one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def paired_ratio(first: Iterable[Sequence[float]], second: Iterable[Sequence[float]]) -> float | None:
    """The median over the rounds of median(first) / median(second), of the rounds where both are more than 0.

    Both servers of a round meet the same weather, so this is steadier than the ratio of the two medians.
    """
    medians = (
        (statistics.median(ours), statistics.median(theirs))
        for ours, theirs in zip(first, second, strict=True)
        if ours and theirs
    )
    ratios = [ours / theirs for ours, theirs in medians if ours > 0 and theirs > 0]
    return statistics.median(ratios) if ratios else None
