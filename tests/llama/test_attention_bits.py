"""Our attention for CPUs, one operation at a time: each row has the bits that its own sequence gives it."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.llama.flash_attention import Operands, attend, exact

N_KV_HEADS = 2
N_SEQUENCES = 3
N_PLACES = 700
"""More than two chunks of cells."""

Cell = tuple[int, int] | None
"""A sequence and a place in it. None is an empty cell."""


@dataclass(frozen=True, slots=True)
class Shape:
    n_embd: int
    n_embd_v: int
    group: int
    """Heads that share keys and values."""
    in_bytes: bool = False
    """Whether keys and values are stored as q8_0."""


SHAPES = (Shape(16, 16, 1), Shape(64, 64, 3), Shape(40, 24, 2), Shape(80, 12, 7), Shape(64, 96, 2, in_bytes=True))
"""Among them widths that are no multiple of a vector's."""


@functools.cache
def numbers(shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.float16], NDArray[np.float16]]:
    """Queries, keys and values of every place of every sequence. Each array is [sequences, places, heads, n_embd]."""
    generator = np.random.default_rng(3)
    sizes = ((N_KV_HEADS * shape.group, shape.n_embd), (N_KV_HEADS, shape.n_embd), (N_KV_HEADS, shape.n_embd_v))
    queries, keys, values = (generator.standard_normal((N_SEQUENCES, N_PLACES, *size)) for size in sizes)
    return (2 * queries).astype(np.float32), (2 * keys).astype(np.float16), values.astype(np.float16)


def operands(
    shape: Shape, cells: Sequence[Cell], rows: Sequence[tuple[int, int]], *, window: int = N_PLACES, causal: bool = True
) -> Operands:
    """Rows of some places, and a KV cache with these cells. What an empty cell holds is not a number."""
    queries, keys, values = numbers(shape)
    k = np.full((len(cells), N_KV_HEADS, shape.n_embd), np.nan, np.float16)
    v = np.full((len(cells), N_KV_HEADS, shape.n_embd_v), np.nan, np.float16)
    for index, cell in enumerate(cells):
        if cell is not None:
            k[index], v[index] = keys[cell], values[cell]
    sequence_of, place_of = np.array([cell or (-1, -1) for cell in cells]).T
    sequences, places = np.array(rows).T[:, :, None]
    seen = (sequence_of == sequences) & (place_of > places - window) & ((place_of <= places) | (not causal))
    return Operands(
        np.stack([queries[row] for row in rows], axis=1),
        k.swapaxes(0, 1),
        v.swapaxes(0, 1),
        seen,
        place_of.tolist(),
        sequences.ravel().tolist(),
        in_bytes=shape.in_bytes,
    )


@functools.cache
def alone(shape: Shape, sequence: int, place: int, window: int, last: int | None = None) -> NDArray[np.float32]:
    """The result of one row in a batch of its own, with its sequence alone in the cache. It sees up to `last`."""
    cells = [(sequence, other) for other in range((place if last is None else last) + 1)]
    return attend(operands(shape, cells, [(sequence, place)], window=window, causal=last is None))


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[Cell], list[tuple[int, int]], int]:
    """A cache with cells in any order, a batch of the last rows of each sequence, and the size of a window."""
    lengths = [draw(st.integers(0, N_PLACES)) for _ in range(N_SEQUENCES)]
    n_rows = [min(draw(st.integers(0, 40)), length) for length in lengths]
    if not any(n_rows):
        lengths[0], n_rows[0] = max(lengths[0], 1), 1
    window = draw(st.sampled_from([N_PLACES, 300, 32, 5]))
    cells: list[Cell] = [None] * draw(st.integers(0, 100))
    for sequence, length in enumerate(lengths):
        first = max(0, length - n_rows[sequence] - window - draw(st.integers(0, 50)))  # older cells have gone
        cells += [(sequence, place) for place in range(first, length)]
    draw(st.randoms(use_true_random=False)).shuffle(cells)
    rows = [(s, place) for s, n in enumerate(n_rows) for place in range(lengths[s] - n, lengths[s])]
    return cells, rows, window


@settings(max_examples=25)
@given(cache=caches(), threads=st.integers(1, 3), shape=st.sampled_from(SHAPES))
def test_a_row_has_the_same_bits_in_any_company(
    cache: tuple[list[Cell], list[tuple[int, int]], int], threads: int, shape: Shape
) -> None:
    cells, rows, window = cache
    result = attend(operands(shape, cells, rows, window=window), threads=threads)
    for row, (sequence, place) in enumerate(rows):
        assert np.array_equal(result[row], alone(shape, sequence, place, window)[0]), (row, sequence, place)


def test_layers_with_the_same_mask_share_a_plan_and_others_do_not() -> None:
    """Also two kinds of layers that take turns, as in models with a sliding window."""
    shape = SHAPES[1]
    rows = [(sequence, place) for sequence in range(2) for place in range(380, 400)]
    cells: list[Cell] = [(sequence, place) for place in range(400) for sequence in range(2)]
    for number in (1, 3, 5):
        random.Random(number).shuffle(cells)
        for kind in (0, 1, 0, 0, 1):
            window = (N_PLACES, 30)[kind]
            given = replace(operands(shape, cells, rows, window=window), number=number + kind)
            for row, result in zip(rows, attend(given), strict=True):
                assert np.array_equal(result, alone(shape, *row, window)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_soft_cap_and_sinks(shape: Shape) -> None:
    """As in Gemma 2 and gpt-oss. A row beside others has the bits that it has alone, for any number of threads."""
    rows = [(sequence, place) for sequence in range(2) for place in (0, 50, 399)]
    cells: list[Cell] = [(sequence, place) for sequence in range(2) for place in range(400)]
    random.Random(1).shuffle(cells)
    sinks = np.linspace(-3, 9, N_KV_HEADS * shape.group, dtype=np.float32)
    for change in ({"soft_cap": 5.0}, {"sinks": sinks}, {"soft_cap": 2.0, "sinks": sinks}):
        given = replace(operands(shape, cells, rows), **change)
        result = attend(given, threads=2)
        assert np.abs(result - exact(given)).max() < 1e-5
        for index, row in enumerate(rows):
            one = replace(operands(shape, cells[::-1], [row]), **change)
            assert np.array_equal(result[index], attend(one)[0])


@settings(max_examples=10)
@given(st.data())
def test_rows_that_see_all_of_their_sequence_have_the_same_bits(data: st.DataObject) -> None:
    """Encoders, and images without M-RoPE, are not causal."""
    shape = data.draw(st.sampled_from(SHAPES))
    lengths = [data.draw(st.integers(1, 300)) for _ in range(N_SEQUENCES)]
    rows = [(sequence, place) for sequence, length in enumerate(lengths) for place in range(length)]
    result = attend(operands(shape, rows, rows, causal=False), threads=2)
    for row in data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=20, max_size=20)):
        sequence, place = rows[row]
        assert np.array_equal(result[row], alone(shape, sequence, place, N_PLACES, lengths[sequence] - 1)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
def test_it_is_attention(shape: Shape, known: bool) -> None:
    cells: list[Cell] = [(sequence, place) for sequence in range(2) for place in range(400)]
    random.Random(1).shuffle(cells)
    rows = [(0, place) for place in range(370, 400)] + [(1, 399)]
    given = operands(shape, cells, rows, window=300)
    if not known:
        given = replace(given, places=None, sequences=None)
    assert np.abs(attend(given) - exact(given)).max() < 1e-5


def test_cells_that_share_a_place_are_all_summed() -> None:
    """llama.cpp can have them. Then the order is that of the cells."""
    shape = SHAPES[1]
    cells = [(0, place) for place in range(300)]
    given = operands(shape, cells, [(0, 299)])
    shared = replace(given, places=[place // 2 for place in range(300)])
    assert np.abs(attend(shared) - exact(given)).max() < 1e-5


def test_places_far_from_each_other_cost_no_memory() -> None:
    shape = SHAPES[0]
    cells = [(0, place) for place in range(300)]
    given = operands(shape, cells, [(0, 299)])
    far = replace(given, places=[place * 5_000_000 for place in range(300)])
    assert np.abs(attend(far) - exact(given)).max() < 1e-5


def test_a_row_that_sees_nothing_gives_zero() -> None:
    given = operands(SHAPES[0], [(0, 0), (1, 0)], [(0, 0), (2, 0)])
    result = attend(given)
    assert result[0].any()
    assert not result[1].any()
