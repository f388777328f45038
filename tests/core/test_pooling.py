"""Embeddings are scaled to length 1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from trio_runner.core.pooling import normalize

VECTORS = st_numpy.arrays(np.float32, st.integers(1, 8), elements=st.floats(-(2**100), 2**100, width=32))


@given(VECTORS)
def test_length_and_direction(vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    before = vector.copy()
    unit = normalize(vector)
    assert unit.dtype == np.float32
    assert unit.shape == vector.shape
    assert np.array_equal(vector, before), "the vector itself was changed"
    assert not np.shares_memory(unit, vector)
    if not vector.any():
        assert not unit.any()
        return
    wide = vector.astype(np.float64)
    largest = np.abs(wide).max()
    expected = (wide / largest) / np.sqrt(np.sum((wide / largest) ** 2))
    assert unit == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1.0, abs=1e-5)


def test_the_zero_vector() -> None:
    assert not normalize(np.zeros(4, np.float32)).any()
