"""Our products for CPUs, with the greatest, the smallest and impossible numbers."""

from __future__ import annotations

import numpy as np

from tests.llama.one_operation import TYPES, Cpu, Floats, Product, exact, plugins
from tests.llama.test_matmul import each_cpu, each_type, each_type_of_ours, same

K = 512
NOTHING = 4e-34
"""Groups of activations that are smaller count as zeros."""

NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x7FC000FF], np.uint32).view(np.float32)


def ordinary(random: np.random.Generator, n_rows: int) -> Floats:
    return random.standard_normal((1, 1, n_rows, K), np.float32)


def extremes(random: np.random.Generator) -> dict[str, Floats]:
    """Rows by what is in them."""
    numbers = ordinary(random, 1)[0, 0, 0]
    rows = {f"times {factor}": numbers * np.float32(factor) for factor in (0, 1e-30, 1e-34, 1e-37, 1e-41, 1e30)}
    rows["one huge"] = np.where(np.arange(K) == 77, np.float32(1e20), numbers)
    rows["one tiny group"] = np.where(np.arange(K) // 32 == 3, np.float32(1e-42), numbers)
    rows["infinite"] = np.where(np.arange(K) == 77, np.float32(np.inf), numbers)
    rows["minus infinite"] = np.where(np.arange(K) == 77, np.float32(-np.inf), numbers)
    for nan in NANS:
        rows[f"one NaN {nan.view(np.uint32):x}"] = np.where(np.arange(K) == 77, nan, numbers)
        rows[f"all NaN {nan.view(np.uint32):x}"] = np.full(K, nan)
    return rows


@each_cpu
@each_type
def test_no_row_disturbs_another(cpu: Cpu, name: str) -> None:
    random = np.random.default_rng(1)
    kind = TYPES[name]
    weights, x = kind.random(random, (1, 1, 35, K)), ordinary(random, 40)
    (alone,) = cpu.multiply(Product(kind, weights, x))
    among = ordinary(random, 40)
    rows = list(extremes(random).values())
    for i in range(40):
        among[0, 0, i] = rows[i % len(rows)] if i % 2 else x[0, 0, i]
    (together,) = cpu.multiply(Product(kind, weights, among), threads=2)
    assert same(np.ascontiguousarray(together[:, :, ::2]), alone[:, :, ::2])


@each_cpu
@each_type_of_ours
def test_what_an_extreme_row_gives(cpu: Cpu, name: str) -> None:
    """A number that is none shows in every result of its row, so that the failure of a model is seen."""
    random = np.random.default_rng(2)
    kind = TYPES[name]
    weights = kind.random(random, (1, 1, 35, K))
    rows = extremes(random)
    (results,) = cpu.multiply(Product(kind, weights, np.array([[list(rows.values())]])))
    sizes = np.abs(kind.to_floats(weights)).astype(np.float64)[0, 0]
    for (what, row), result in zip(rows.items(), results[0, 0], strict=True):
        if "NaN" in what:
            assert np.isnan(result).all(), what
        elif "infinite" in what:
            assert not np.isfinite(result).any(), what
        else:
            groups = np.abs(row).reshape(-1, 32).max(1).repeat(32)  # what activations are rounded with
            right = exact(Product(kind, weights, row[None, None, None]))[0, 0, 0]
            most = sizes.max() * (0.005 * groups.sum() + K * NOTHING)
            assert np.abs(result - right).max() <= most, what
    assert not results[0, 0, list(rows).index("times 0")].any()


@each_cpu
@each_type_of_ours
def test_scales_of_zero_and_impossible_ones_stay_in_their_row(cpu: Cpu, name: str) -> None:
    random = np.random.default_rng(3)
    kind = TYPES[name]
    weights, x = kind.random(random, (1, 1, 21, K)), ordinary(random, 5)
    (usual,) = cpu.multiply(Product(kind, weights, x))
    blocks = weights.reshape(1, 1, 21, -1, kind.block_bytes).copy()
    for place, width in kind.scales:
        if width == "u1":
            blocks[0, 0, 4, :, place] = 0  # 2^-128
            blocks[0, 0, 18, :, place] = 255
        else:
            kind.set_scale(blocks[0, 0, 4], place, width, np.zeros(blocks.shape[3]))
            kind.set_scale(blocks[0, 0, 18], place, width, np.full(blocks.shape[3], np.nan))
    (results,) = cpu.multiply(Product(kind, blocks.reshape(weights.shape), x))
    assert np.abs(results[..., 4]).max() <= 1e-30
    if kind.scales[0][1] != "u1":
        assert np.isnan(results[..., 18]).all()
    others = [row for row in range(21) if row not in (4, 18)]
    assert same(np.ascontiguousarray(results[..., others]), usual[..., others])


def test_a_sum_of_nothing_is_zero() -> None:
    for cpu in plugins():
        for kind in map(TYPES.__getitem__, ("F32", "Q8_0")):
            nothing = Product(
                kind, np.ones((1, 1, 17, 64), np.uint8)[..., :0], np.ones((1, 1, 3, 64), np.float32)[..., :0]
            )
            assert not cpu.multiply(nothing)[0].any()
