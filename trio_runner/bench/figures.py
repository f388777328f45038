"""Measurements and their statistics. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["tokens/s", "ms", "s", "tokens", "MiB", "x", "nats", ""]


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity that is measured. `unit` is "" for a count."""

    name: str
    unit: Unit
    difference: bool = False
    """Whether it is the difference of two measurements. Such a value may be close to zero, so ratios are noise."""


@dataclass(slots=True)
class Measured:
    """The result of one round of a scenario: samples of each metric, and remarks for people."""

    samples: dict[Metric, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: Metric, *values: float) -> None:
        """Add samples of `metric`."""
        self.samples.setdefault(metric, []).extend(values)

    def note(self, text: str) -> None:
        """Add a remark, unless it has been made."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Figures:
    """Statistics of samples."""

    n: int
    median: float
    p99: float
    minimum: float
    maximum: float


def figures(values: Sequence[float]) -> Figures:
    """The statistics of `values`. Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    return Figures(len(values), statistics.median(values), percentile(values, 99), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` percent of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def paired_ratio(first: Iterable[Sequence[float]], second: Iterable[Sequence[float]]) -> float | None:
    """The median of median(first) / median(second) of each round, without the rounds where one of them is 0 or less.

    Both servers of a round run on the machine under the same conditions, so this varies less than the ratio of the two
    medians of all rounds. None if no round is left.
    """
    medians = (
        (statistics.median(ours), statistics.median(theirs))
        for ours, theirs in zip(first, second, strict=True)
        if ours and theirs
    )
    ratios = [ours / theirs for ours, theirs in medians if ours > 0 and theirs > 0]
    return statistics.median(ratios) if ratios else None


def median_interval(values: Sequence[float], *, percent: float = 95.0, n_draws: int = 2000) -> tuple[float, float]:
    """The interval that holds the median of `values` with `percent` percent certainty, by bootstrap (Efron, 1979).

    The medians of `n_draws` samples are taken, each drawn from `values` with replacement. The interval leaves out
    equally many of them at both ends. The draws are the same in every call. Raises ValueError if there are no values.
    """
    if not values:
        raise ValueError("no values")
    random = Random(0)
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(n_draws))
    tail = (100 - percent) / 2
    return percentile(medians, tail), percentile(medians, 100 - tail)
