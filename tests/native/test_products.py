"""The products of native/matmul_product.h, with the vectors of each machine: right, and the same in any company.

Instructions that this machine lacks are emulated: those of x86 by emulated_x86.h, those of ARM by QEMU.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from tests.native.machines import MACHINES, Machine

Floats = npt.NDArray[np.float32]

GROUP = 32
"""Numbers of a row of activations that are rounded together."""
N_ROWS = 29
"""Rows of activations: more than any machine multiplies at once, and no multiple of that."""

HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}
"""Where each type has numbers of 16 bits in its blocks. All other bytes may be anything."""
SIGNED = {"Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"}
"""The types whose codes have signs when they are multiplied. Those of Q3_K and Q6_K have an offset instead."""
TYPES = ("F32", "F16", "BF16", *HALVES)


@dataclass(frozen=True, slots=True)
class Case:
    """A tile of weights, and rows of activations."""

    type: str
    weights: npt.NDArray[np.uint8]
    values: Floats
    """The weights as numbers."""
    x: Floats

    def packed(self) -> bytes:
        (n, stride), (n_rows, k) = self.weights.shape, self.x.shape
        number = int(gguf.GGMLQuantizationType[self.type])
        return struct.pack("5q", number, k, n, stride, n_rows) + self.weights.tobytes() + self.x.tobytes()

    def expected(self, machine: Machine) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The results, and the sums of the magnitudes of what is added up in each."""
        x = self.x.astype(np.float64)
        if self.type in HALVES:
            is_wide = machine.words == "all" or (machine.words == "signed" and self.type in SIGNED)
            most = np.float32(32767 if is_wide else 127)
            groups = self.x.reshape(N_ROWS, -1, GROUP)
            highest = np.abs(groups).max(axis=2, keepdims=True)
            factor = np.divide(most, highest, out=np.zeros_like(highest), where=highest > 0)
            x = (np.rint(groups * factor) * (highest / most).astype(np.float64)).reshape(N_ROWS, -1)
        values = self.values.astype(np.float64)
        return x @ values.T, np.abs(x) @ np.abs(values).T


@cache
def case(name: str) -> Case:
    """Random blocks. Some tiles are not full, and the lengths are no multiples of what is unpacked at once."""
    numbers = np.random.default_rng(TYPES.index(name))
    n, k = (16 if TYPES.index(name) % 2 else 13), (1536 if name in HALVES else 300)
    sizes = 10.0 ** numbers.integers(-3, 3, size=(N_ROWS, k // 4))
    x = (numbers.normal(size=(N_ROWS, k)) * sizes.repeat(4, axis=1)).astype(np.float32)
    x[3], x[5, 64:96] = 0, 0
    if name in HALVES:
        n_weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        blocks = numbers.integers(0, 256, size=(n, k // n_weights, size), dtype=np.uint8)
        for at in HALVES[name]:
            scales = numbers.uniform(-0.1, 0.1, size=(n, k // n_weights, 1)).astype(np.float16)
            blocks[:, :, at : at + 2] = scales.view(np.uint8)
        if name == "MXFP4":
            blocks[:, :, 0] = numbers.integers(118, 130, size=(n, k // n_weights))
        weights = blocks.reshape(n, -1)
    else:
        floats = numbers.normal(size=(n, k)).astype(np.float32)
        upper = np.ascontiguousarray(floats.view(np.uint16)[:, 1::2])
        narrow: dict[str, npt.NDArray[Any]] = {"F32": floats, "F16": floats.astype(np.float16), "BF16": upper}
        weights = narrow[name].view(np.uint8)
    values = gguf.quants.dequantize(weights, gguf.GGMLQuantizationType[name]).astype(np.float32)
    return Case(name, weights, values, x)


Run = Callable[[Machine], dict[str, tuple[Floats, Floats]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Gives the results of a machine for each type: of all rows together, and of each alone. May skip the test."""
    directory = tmp_path_factory.mktemp("products")

    def results(machine: Machine) -> dict[str, tuple[Floats, Floats]]:
        cases = [case(name) for name in TYPES]
        program = machine.build(directory)
        packed = b"".join(each.packed() for each in cases)
        done = subprocess.run(program, input=packed, capture_output=True, timeout=300, check=True)
        numbers = np.frombuffer(done.stdout, np.float32)
        found = {}
        for each in cases:
            size = len(each.weights) * N_ROWS
            together, alone, numbers = numbers[:size], numbers[size : 2 * size], numbers[2 * size :]
            found[each.type] = together.reshape(N_ROWS, -1), alone.reshape(N_ROWS, -1)
        assert not len(numbers)
        return found

    with ThreadPoolExecutor(2) as pool:
        running: dict[str, Future[dict[str, tuple[Floats, Floats]]]] = {
            machine.name: pool.submit(results, machine) for machine in MACHINES if not machine.missing()
        }

        def wait(machine: Machine) -> dict[str, tuple[Floats, Floats]]:
            if missing := machine.missing():
                pytest.skip(f"this machine lacks {missing}")
            return running[machine.name].result()

        yield wait


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_products_are_right(run: Run, machine: Machine, name: str) -> None:
    together, _ = run(machine)[name]
    expected, magnitudes = case(name).expected(machine)
    assert np.all(np.abs(together - expected) <= 1e-5 * magnitudes)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_a_row_alone_has_the_bits_that_it_has_in_company(run: Run, machine: Machine) -> None:
    for name, (together, alone) in run(machine).items():
        assert together.tobytes() == alone.tobytes(), name


@pytest.mark.parametrize("words", ["", "signed"])
def test_machines_that_round_alike_agree_to_the_last_bit(run: Run, words: str) -> None:
    alike = [machine for machine in MACHINES if machine.rounds_once and machine.words == words]
    alike = [machine for machine in alike if not machine.missing()]
    if len(alike) < 2:
        pytest.skip("this machine cannot run programs of two such machines")
    first, *others = (run(machine) for machine in alike)
    for other in others:
        for name in TYPES:
            assert first[name][0].tobytes() == other[name][0].tobytes(), name
