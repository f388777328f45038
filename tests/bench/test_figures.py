"""Statistics of the measurements."""

from __future__ import annotations

import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.bench.figures import Figures, figures, median_interval, paired_ratio, percentile


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5], 99, 5),
        ([5], 0, 5),
        ([2, 1], 50, 1),
        ([2, 1], 51, 2),
        (range(1, 101), 99, 99),
        (range(1, 201), 99, 198),
        ([3, 1, 2], 100, 3),
    ],
)
def test_percentiles_are_values_that_were_measured(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_statistics_of_samples() -> None:
    assert figures([4.0, 1.0, 2.0, 3.0]) == Figures(n=4, median=2.5, p99=4.0, minimum=1.0, maximum=4.0)
    with pytest.raises(ValueError, match="no values"):
        figures([])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[2.0], [9.0]], [[1.0], [3.0]], 2.5),
        ([[2.0], []], [[4.0], [3.0]], 0.5),
        ([[2.0]], [[0.0]], None),
        ([[-2.0]], [[1.0]], None),
        ([], [], None),
    ],
)
def test_ratios_are_taken_by_round(first: list[list[float]], second: list[list[float]], expected: float | None) -> None:
    assert paired_ratio(first, second) == expected


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_the_interval_is_around_the_median(values: list[float]) -> None:
    low, high = median_interval(values, n_draws=200)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


def test_the_interval_is_as_certain_as_it_says() -> None:
    """The median of many experiments' values is known, and lies in about 95 of 100 of their intervals."""
    random = Random(1)
    experiments = [[random.gauss(5, 1) for _ in range(15)] for _ in range(400)]
    intervals = [median_interval(values, n_draws=400) for values in experiments]
    n_right = sum(low <= 5 <= high for low, high in intervals)
    assert 0.91 <= n_right / len(intervals) <= 0.99
    assert median_interval(experiments[0]) == median_interval(experiments[0])
    with pytest.raises(ValueError, match="no values"):
        median_interval([])
