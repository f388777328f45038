"""Our products for CPUs: they are right, and a row's result does not depend, to the last bit, on its company."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.llama.one_operation import TYPES, Aborted, Cpu, Floats, Product, Type, exact, plugins, upstreams

Doubles = npt.NDArray[np.float64]

FLOATS = ("F32", "F16", "BF16")
LEFT_TO_GGML = ("IQ2_XXS", "IQ3_S", "TQ2_0", "Q1_0")
OURS = tuple(name for name in TYPES if name not in LEFT_TO_GGML)
WITH_SIGNS = ("Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4")
"""The types whose activations are rounded to 16 bits on some machines: on those before SSSE3, all types' are."""
HALF_A_STEP = 0.5 / 32767
"""Of the greatest number in its group: by how much such an activation may change."""
EPSILON = 2.0**-24
"""By how much one operation with floats rounds."""

each_cpu = pytest.mark.parametrize("cpu", plugins(), ids=lambda cpu: cpu.name)
each_type = pytest.mark.parametrize("name", TYPES)
each_type_of_ours = pytest.mark.parametrize("name", OURS)
seeds = st.integers(0, 2**32 - 1)
numbers_of_threads = st.sampled_from((2, 3, 5))


def spread(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Ordinary numbers. Between their rows are others, and the axes before the last may lie in another order."""
    axes = tuple(random.permutation(len(shape) - 1))
    order = (*axes, len(shape) - 1)
    *rows, k = (shape[axis] for axis in order)
    numbers = random.standard_normal((*rows, k + int(random.integers(0, 3)) * 32), np.float32)
    return numbers[..., :k].transpose(np.argsort(order))


@st.composite
def lengths(draw: st.DrawFn, kind: Type) -> int:
    """Of a row: up to two parts of a tile, with those at whose ends a part ends."""
    most = 700 if kind.block == 1 else 2304
    return min(draw(st.sampled_from((0, 256, 512, 1024))) + draw(st.integers(1, 4)) * kind.block, most)


def same(a: Floats, b: Floats) -> bool:
    """Whether all bits are equal."""
    return np.array_equal(a.view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@each_cpu
@each_type
def test_a_row_gives_the_same_alone_and_among_others(cpu: Cpu, name: str) -> None:
    kind = TYPES[name]

    @settings(max_examples=3, phases=[Phase.generate])
    @given(lengths(kind), st.integers(1, 50), st.integers(1, 70), seeds, numbers_of_threads)
    def check(k: int, n_weights: int, n_rows: int, seed: int, threads: int) -> None:
        random = np.random.default_rng(seed)
        n3, n2, by_3, by_2 = random.integers(1, 3, 4)
        weights = kind.random(random, (n3, n2 + 1, n_weights, k + kind.block))[
            :, :n2, :, : k // kind.block * kind.block_bytes
        ]
        x = spread(random, (n3 * by_3, n2 * by_2, n_rows, k))
        orders = [np.arange(n_rows), random.integers(0, n_rows, 1), random.integers(0, n_rows, random.integers(2, 7))]
        together, alone, few = cpu.multiply(*(Product(kind, weights, x[:, :, order]) for order in orders))
        assert np.isfinite(together).all()
        assert same(alone, together[:, :, orders[1]])
        assert same(few, together[:, :, orders[2]])
        order = random.permutation(n_rows)
        (divided,) = cpu.multiply(Product(kind, weights, x[:, :, order]), threads=threads)
        assert same(divided, together[:, :, order])

    check()


@each_cpu
@each_type
def test_a_row_gives_the_same_with_one_expert_among_many(cpu: Cpu, name: str) -> None:
    kind = TYPES[name]

    @settings(max_examples=2, phases=[Phase.generate])
    @given(lengths(kind), st.integers(1, 40), st.integers(1, 6), st.integers(1, 20), seeds, numbers_of_threads)
    def check(k: int, n_weights: int, n_experts: int, n_tokens: int, seed: int, threads: int) -> None:
        random = np.random.default_rng(seed)
        n_slots = int(random.integers(1, 4))
        weights = kind.random(random, (1, n_experts, n_weights, k))
        x = spread(random, (1, n_tokens, n_slots if random.integers(2) else 1, k))
        ids = random.integers(0, n_experts, (n_tokens, n_slots + 2), np.int32)[:, :n_slots]
        by_all = np.broadcast_to(x.reshape(1, 1, -1, k), (1, n_experts, x.size // k, k)).copy()
        (of_all,) = cpu.multiply(Product(kind, weights, by_all))
        expected = np.empty((1, n_tokens, n_slots, n_weights), np.float32)
        for token, slot in np.ndindex(n_tokens, n_slots):
            row = token * x.shape[2] + slot % x.shape[2]
            expected[0, token, slot] = of_all[0, ids[token, slot], row]
        (together,) = cpu.multiply(Product(kind, weights, x, ids), threads=threads)
        assert same(together, expected)
        (alone,) = cpu.multiply(Product(kind, weights, x[:, -1:], ids[-1:]))
        assert same(alone, expected[:, -1:])

    check()


@each_cpu
@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q6_K", "IQ3_S"])
def test_many_rows_are_divided_and_give_the_same(cpu: Cpu, name: str) -> None:
    random = np.random.default_rng(6)
    kind = TYPES[name]
    weights, x = kind.random(random, (1, 1, 39, 512)), spread(random, (1, 1, 600, 512))
    parts = [Product(kind, weights, x[:, :, begin : begin + 75]) for begin in range(0, 600, 75)]
    (together,) = cpu.multiply(Product(kind, weights, x), threads=2)
    assert same(together, np.concatenate(cpu.multiply(*parts), axis=2))


def relative_error(results: Floats, right: Doubles) -> float:
    return float(np.sqrt(np.square(results - right).mean() / np.square(right).mean()))


@each_cpu
@each_type
def test_results_are_as_close_as_upstreams(cpu: Cpu, name: str) -> None:
    """Or as close as one chain of additions of floats can be."""
    random = np.random.default_rng(7)
    kind = TYPES[name]
    weights, x = kind.random(random, (2, 3, 37, 1280)), spread(random, (2, 6, 5, 1280))
    ids = random.integers(0, 3, (6, 5), np.int32)
    products = Product(kind, weights, x), Product(kind, weights[:1], x[:1], ids)
    for product, ours, theirs in zip(products, cpu.multiply(*products), upstreams().multiply(*products), strict=True):
        right = exact(product)
        assert relative_error(ours, right) <= max(1.05 * relative_error(theirs, right), 1e-6)


def assert_right(cpu: Cpu, product: Product, results: Floats) -> None:
    """For activations that are whole numbers, up to 127 in every group: only additions of floats round."""
    weights, x = product.kind.to_floats(product.weights).astype(np.float64), np.abs(product.x).astype(np.float64)
    steps = 2 * x.shape[-1] + 8 if product.kind.name in FLOATS else x.shape[-1] / 8 + 8
    most = steps * EPSILON * np.abs(weights).max() * x.sum(-1).max()
    may_have_words = product.kind.name in WITH_SIGNS or (cpu.name == "x64" and product.kind.name not in FLOATS)
    if may_have_words and not set(np.unique(x)) <= {0, 127}:
        most += HALF_A_STEP * 127 * np.abs(weights).sum(-1).max()
    assert np.abs(results - exact(product)).max() <= most


@each_cpu
@each_type_of_ours
def test_whole_numbers_are_multiplied_exactly(cpu: Cpu, name: str) -> None:
    """So each code has the right place and the right scale. The first activations are all -127, 0 or 127."""
    random = np.random.default_rng(8)
    kind = TYPES[name]
    weights = kind.random(random, (1, 1, 45, 1536))
    x = random.integers(-127, 128, (2, 1, 4, 1536)).astype(np.float32)
    x[0] = 127 * random.integers(-1, 2, x[0].shape)
    x[..., ::32] = 127
    for plane in x[:, None]:
        product = Product(kind, weights, plane)
        assert_right(cpu, product, cpu.multiply(product)[0])


@each_cpu
@each_type_of_ours
@pytest.mark.parametrize("byte", [0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF])
def test_sums_of_the_greatest_codes_do_not_overflow(cpu: Cpu, name: str, byte: int) -> None:
    random = np.random.default_rng(9)
    kind = TYPES[name]
    weights = kind.random(random, (1, 1, 20, 512))
    scales = weights.reshape(1, 1, 20, -1, kind.block_bytes).copy()
    crafted = np.full_like(scales, byte)
    for place, width in kind.scales:
        end = place + (1 if width == "u1" else 4 if width == "f4" else 2)
        crafted[..., place:end] = scales[..., place:end]
    x = np.full((1, 1, 4, 512), 127, np.float32)
    x[:, :, 1] = -127
    x[:, :, 2, ::2] = -127
    x[:, :, 3, 2::4] = x[:, :, 3, 3::4] = -127
    product = Product(kind, crafted.reshape(weights.shape), x)
    assert_right(cpu, product, cpu.multiply(product)[0])


def test_all_variants_agree() -> None:
    random = np.random.default_rng(10)
    for name in OURS:
        kind = TYPES[name]
        x = 127 * random.integers(-1, 2, (1, 1, 6, 1280)).astype(np.float32)
        x[..., ::32] = 127
        product = Product(kind, kind.random(random, (1, 1, 33, 1280)), x)
        results = [cpu.multiply(product)[0] for cpu in plugins()]
        for result in results:
            np.testing.assert_allclose(result, results[0], atol=2e-5 * np.abs(results[0]).max(), rtol=0, err_msg=name)


BIG = (1, 1, 1024, 512)
"""Weights of a product that is worth looking whether it is aborted, with 64 rows."""


@each_cpu
@pytest.mark.parametrize("name", ["F16", "Q4_K", "IQ3_S"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_abort_ends_a_product_early(cpu: Cpu, name: str, threads: int) -> None:
    random = np.random.default_rng(11)
    kind = TYPES[name]
    product = Product(kind, kind.random(random, BIG), random.standard_normal((1, 1, 64, 512), np.float32))
    lock = threading.Lock()
    answers: list[tuple[int, bool]] = []

    def abort_from(first: int) -> bool:
        with lock:
            answers.append((threading.get_ident(), len(answers) >= first))
            return answers[-1][1]

    (undisturbed,) = cpu.multiply(product, threads=threads, abort=lambda: abort_from(10**9))
    n_looks = len(answers)
    assert n_looks >= 8 * threads or threads == 1
    for first in (0, min(5, n_looks - 2)):
        answers.clear()
        with pytest.raises(Aborted) as caught:
            cpu.multiply(product, threads=threads, abort=lambda first=first: abort_from(first))  # type: ignore[misc]
        done = np.isfinite(caught.value.results[0])
        told = [thread for thread, answer in answers if answer]
        assert len(set(told)) <= threads
        assert len(told) <= threads + 1  # and once after the operation
        assert len(answers) <= first + threads + 1
        assert done.mean() <= first / (n_looks - 1)
        if first == 0:
            assert len(set(told)) == threads
    assert same(cpu.multiply(product, threads=threads)[0], undisturbed)
