"""One product of ggml at a time: MUL_MAT and MUL_MAT_ID, computed by any variant of the CPU plugin, on arrays of numpy.

The plugins are opened beside each other in this process, and not registered as backends, so nothing else sees them.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import numpy.typing as npt
import pytest

from trio_runner.llama.library import LIBRARY_DIRECTORY

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

GUARD = 0xA5
"""The byte that stands where nothing may be written."""
N_GUARD = 4096
"""Bytes of it behind a work buffer."""
GAP = 5
"""Floats of it behind each row of results."""
CACHE_LINE = 64
"""Bytes of a work buffer that ggml plans for each thread, besides those that operations ask for."""

ffi = cffi.FFI()
ffi.cdef(
    """
    typedef bool (*ggml_abort_callback)(void *data);
    struct ggml_tensor {
        int type; void *buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16]; int32_t flags;
        struct ggml_tensor *src[10]; struct ggml_tensor *view_src; size_t view_offs; void *data; char name[64];
        void *extra; char padding[8];
    };
    struct ggml_init_params { size_t mem_size; void *mem_buffer; bool no_alloc; };
    struct ggml_type_traits {
        const char *type_name; int64_t blck_size; int64_t blck_size_interleave; size_t type_size; bool is_quantized;
        void (*to_float)(const void *, float *, int64_t); void *from_float_ref;
    };
    struct ggml_cplan {
        size_t work_size; uint8_t *work_data; int n_threads; void *threadpool; ggml_abort_callback abort_callback;
        void *abort_callback_data; bool use_ref;
    };
    void *ggml_init(struct ggml_init_params);
    void ggml_free(void *);
    size_t ggml_tensor_overhead(void);
    size_t ggml_graph_overhead_custom(size_t, bool);
    struct ggml_tensor *ggml_new_tensor_4d(void *, int, int64_t, int64_t, int64_t, int64_t);
    struct ggml_tensor *ggml_mul_mat(void *, struct ggml_tensor *, struct ggml_tensor *);
    struct ggml_tensor *ggml_mul_mat_id(void *, struct ggml_tensor *, struct ggml_tensor *, struct ggml_tensor *);
    void *ggml_new_graph_custom(void *, size_t, bool);
    void ggml_build_forward_expand(void *, struct ggml_tensor *);
    const struct ggml_type_traits *ggml_get_type_traits(int);

    int ggml_backend_score(void);
    int ggml_cpu_has_avx2(void);
    struct ggml_cplan ggml_graph_plan(const void *, int, void *);
    int ggml_graph_compute(void *, struct ggml_cplan *);
    """
)

I32 = 26
"""GGML_TYPE_I32"""


@functools.cache
def base() -> Any:
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # as the package does before it opens this library
    library = ffi.dlopen(str(next(LIBRARY_DIRECTORY.glob("libggml-base.*"))))
    assert library.ggml_tensor_overhead() == ffi.sizeof("struct ggml_tensor") + 32, "ggml_tensor has changed"
    return library


@dataclass(frozen=True)
class Type:
    """A type of weights. `scales` are the places of its scales and offsets in a block, and their numpy types."""

    name: str
    number: int
    scales: tuple[tuple[int, str], ...]

    @property
    def traits(self) -> Any:
        return base().ggml_get_type_traits(self.number)

    @property
    def block(self) -> int:
        """Numbers in a block."""
        return int(self.traits.blck_size)

    @property
    def block_bytes(self) -> int:
        return int(self.traits.type_size)

    def random(self, random: np.random.Generator, shape: Sequence[int]) -> Bytes:
        """Blocks of random codes and ordinary scales, for numbers of this shape. The last axis becomes bytes."""
        *rows, k = shape
        blocks = random.integers(0, 256, (*rows, k // self.block, self.block_bytes), np.uint8)
        for place, kind in self.scales:
            if kind == "u1":  # an exponent
                blocks[..., place] = random.integers(118, 128, blocks.shape[:-1], np.uint8)
            else:
                self.set_scale(blocks, place, kind, random.uniform(-0.02, 0.02, blocks.shape[:-1]))
        return blocks.reshape(*rows, -1)

    @staticmethod
    def set_scale(blocks: Bytes, place: int, kind: str, values: npt.ArrayLike) -> None:
        numbers = np.asarray(values, np.float32)
        if kind == "bf16":
            halves = np.ascontiguousarray(numbers.view(np.uint32) >> 16, np.uint16).view(np.uint8)
        else:
            halves = numbers.astype(kind).reshape(*numbers.shape, 1).view(np.uint8)
        width = {"f2": 2, "bf16": 2, "f4": 4}[kind]
        blocks[..., place : place + width] = halves.reshape(*numbers.shape, width)

    def to_floats(self, weights: Bytes) -> Floats:
        """What the weights stand for, as ggml reads them."""
        if self.name == "F32":
            return np.ascontiguousarray(weights).view(np.float32)
        packed = np.ascontiguousarray(weights)
        numbers = np.empty((*weights.shape[:-1], weights.shape[-1] // self.block_bytes * self.block), np.float32)
        self.traits.to_float(ffi.from_buffer(packed), ffi.from_buffer("float *", numbers), numbers.size)
        return numbers


TYPES = {
    kind.name: kind
    for kind in (
        Type("F32", 0, ((0, "f4"),)),
        Type("F16", 1, ((0, "f2"),)),
        Type("BF16", 30, ((0, "bf16"),)),
        Type("Q4_0", 2, ((0, "f2"),)),
        Type("Q4_1", 3, ((0, "f2"), (2, "f2"))),
        Type("Q5_0", 6, ((0, "f2"),)),
        Type("Q5_1", 7, ((0, "f2"), (2, "f2"))),
        Type("Q8_0", 8, ((0, "f2"),)),
        Type("Q2_K", 10, ((80, "f2"), (82, "f2"))),
        Type("Q3_K", 11, ((108, "f2"),)),
        Type("Q4_K", 12, ((0, "f2"), (2, "f2"))),
        Type("Q5_K", 13, ((0, "f2"), (2, "f2"))),
        Type("Q6_K", 14, ((208, "f2"),)),
        Type("IQ4_NL", 20, ((0, "f2"),)),
        Type("IQ4_XS", 23, ((0, "f2"),)),
        Type("MXFP4", 39, ((0, "u1"),)),
        # These are left to ggml's dot product of one row.
        Type("IQ2_XXS", 16, ((0, "f2"),)),
        Type("IQ3_S", 21, ((0, "f2"),)),
        Type("TQ2_0", 35, ((64, "f2"),)),
        Type("Q1_0", 41, ((0, "f2"),)),
    )
}


@dataclass(frozen=True)
class Product:
    """An operation: weights of shape (n3, n2, rows, bytes), and activations of shape (m3, m2, m1, k).

    With `ids`, of shape (tokens, slots), it is MUL_MAT_ID: weights (1, experts, rows, bytes), activations
    (1, tokens, slots or 1, k). Arrays may have strides, except within a row.
    """

    kind: Type
    weights: Bytes
    x: Floats
    ids: Ints | None = None


class Aborted(Exception):
    """The computation was aborted. `results` are as it left them: NaN where nothing was written."""

    def __init__(self, results: list[Floats]) -> None:
        super().__init__()
        self.results = results


class Cpu:
    """An opened variant of the CPU plugin."""

    def __init__(self, path: Path, *, is_upstreams: bool = False) -> None:
        base()
        self.is_upstreams = is_upstreams
        self.path = path
        self.name = path.stem.rpartition("-")[2]
        self.library = ffi.dlopen(str(path))
        self.score = int(self.library.ggml_backend_score())
        """0: this machine cannot run it. The greatest one suits it best."""
        if self.score:  # the first product is when it reads its environment
            one = np.ones((1, 1, 1, 32), np.float32)
            self.multiply(Product(TYPES["F32"], one.view(np.uint8), one))

    def multiply(self, *products: Product, threads: int = 1, abort: Callable[[], bool] | None = None) -> list[Floats]:
        """Compute all as one graph. Checks that nothing else was written. Raises `Aborted`."""
        lib = base()
        n_tensors = 4 * len(products)
        size = n_tensors * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(n_tensors, False)
        context = lib.ggml_init({"mem_size": size + 1024, "mem_buffer": ffi.NULL, "no_alloc": True})
        try:
            graph = lib.ggml_new_graph_custom(context, n_tensors, False)
            results = []
            for product in products:
                result = _operation(context, product)
                ne = list(result.ne)
                space = np.full((*ne[:0:-1], ne[0] + GAP), np.nan, np.float32)
                space[..., ne[0] :].view(np.uint8)[:] = GUARD
                _attach(result, space)
                lib.ggml_build_forward_expand(graph, result)
                results.append(space)
            status = self._compute(graph, threads, abort)
        finally:
            lib.ggml_free(context)
        for space in results:
            assert (np.ascontiguousarray(space[..., -GAP:]).view(np.uint8) == GUARD).all(), "wrote beside the results"
        wanted = [space[..., :-GAP] for space in results]
        if status == 1:
            raise Aborted(wanted)
        assert status == 0
        return wanted

    def _compute(self, graph: Any, threads: int, abort: Callable[[], bool] | None) -> int:
        plan = self.library.ggml_graph_plan(graph, threads, ffi.NULL)
        size = plan.work_size if self.is_upstreams else plan.work_size - threads * CACHE_LINE
        work = np.full(size + N_GUARD + CACHE_LINE, GUARD, np.uint8)
        alignment = CACHE_LINE if self.is_upstreams else 4  # as bad as can be
        begin = (CACHE_LINE + alignment - work.ctypes.data) % CACHE_LINE
        plan.work_data = ffi.cast("uint8_t *", work.ctypes.data + begin)
        callback = ffi.callback("ggml_abort_callback", lambda _: abort()) if abort is not None else ffi.NULL
        plan.abort_callback = callback
        status = int(self.library.ggml_graph_compute(graph, ffi.new("struct ggml_cplan *", plan)))
        assert (work[:begin] == GUARD).all(), "wrote before the work buffer"
        assert (work[begin + size :] == GUARD).all(), "wrote behind the work buffer"
        return status


def _operation(context: Any, product: Product) -> Any:
    lib = base()
    kind = product.kind
    n3, n2, n_rows, n_bytes = product.weights.shape
    weights = lib.ggml_new_tensor_4d(context, kind.number, n_bytes // kind.block_bytes * kind.block, n_rows, n2, n3)
    _attach(weights, product.weights)
    x = lib.ggml_new_tensor_4d(context, 0, *product.x.shape[::-1])
    _attach(x, product.x)
    if product.ids is None:
        return lib.ggml_mul_mat(context, weights, x)
    ids = lib.ggml_new_tensor_4d(context, I32, *product.ids.shape[::-1], 1, 1)
    _attach(ids, product.ids)
    return lib.ggml_mul_mat_id(context, weights, x, ids)


def _attach(tensor: Any, array: npt.NDArray[Any]) -> None:
    """Let the tensor be where the array is."""
    assert array.strides[-1] == array.itemsize
    tensor.data = ffi.cast("void *", array.ctypes.data)
    for i, stride in enumerate(array.strides[-2::-1]):
        tensor.nb[i + 1] = stride


@functools.cache
def plugins() -> tuple[Cpu, ...]:
    """The variants that this machine can run, the best one first."""
    opened = (Cpu(path) for path in sorted(LIBRARY_DIRECTORY.glob("libggml-cpu*")))
    return tuple(sorted((cpu for cpu in opened if cpu.score > 0), key=lambda cpu: -cpu.score))


@functools.cache
def upstreams() -> Cpu:
    """The best variant again, but with upstream's products. A copy of its file is a plugin of its own."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_RUNNER_MATMUL", "ggml")
        return Cpu(Path(shutil.copy(plugins()[0].path, directory)), is_upstreams=True)


def exact(product: Product) -> npt.NDArray[np.float64]:
    """The product in double precision, of the weights as ggml reads them."""
    weights = product.kind.to_floats(product.weights).astype(np.float64)
    x = product.x.astype(np.float64)
    if product.ids is not None:
        slots = np.broadcast_to(x[0], (*product.ids.shape, x.shape[-1]))
        results = np.einsum("tsrk,tsk->tsr", weights[0][product.ids], slots)
        return np.asarray(results[None])
    repeated = np.repeat(np.repeat(weights, x.shape[0] // len(weights), 0), x.shape[1] // weights.shape[1], 1)
    return np.asarray(np.einsum("abrk,abmk->abmr", repeated, x))
