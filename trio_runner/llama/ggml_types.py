"""ggml's tensor types: the one table of their numbers, names and sizes.

Numbers are those of `enum ggml_type` in ggml.h, names are what `ggml_type_name()` gives, and sizes follow from the
structures in ggml-common.h. llama.cpp adds types at the end and never reuses a number.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class GgmlType(NamedTuple):
    """A type of tensor elements; they are stored in blocks."""

    name: str
    block_size: int
    """Elements of one block."""
    block_bytes: int
    """Bytes of one block."""
    can_multiply: bool = True
    """Whether ggml has a product of a matrix of this type with a row of floats. Without one, it would call a null
    pointer."""


GGML_TYPES: Final[dict[int, GgmlType]] = {
    0: GgmlType("f32", 1, 4),
    1: GgmlType("f16", 1, 2),
    2: GgmlType("q4_0", 32, 18),
    3: GgmlType("q4_1", 32, 20),
    6: GgmlType("q5_0", 32, 22),
    7: GgmlType("q5_1", 32, 24),
    8: GgmlType("q8_0", 32, 34),
    9: GgmlType("q8_1", 32, 36, can_multiply=False),
    10: GgmlType("q2_K", 256, 84),
    11: GgmlType("q3_K", 256, 110),
    12: GgmlType("q4_K", 256, 144),
    13: GgmlType("q5_K", 256, 176),
    14: GgmlType("q6_K", 256, 210),
    15: GgmlType("q8_K", 256, 292, can_multiply=False),
    16: GgmlType("iq2_xxs", 256, 66),
    17: GgmlType("iq2_xs", 256, 74),
    18: GgmlType("iq3_xxs", 256, 98),
    19: GgmlType("iq1_s", 256, 50),
    20: GgmlType("iq4_nl", 32, 18),
    21: GgmlType("iq3_s", 256, 110),
    22: GgmlType("iq2_s", 256, 82),
    23: GgmlType("iq4_xs", 256, 136),
    24: GgmlType("i8", 1, 1, can_multiply=False),
    25: GgmlType("i16", 1, 2, can_multiply=False),
    26: GgmlType("i32", 1, 4, can_multiply=False),
    27: GgmlType("i64", 1, 8, can_multiply=False),
    28: GgmlType("f64", 1, 8, can_multiply=False),
    29: GgmlType("iq1_m", 256, 56),
    30: GgmlType("bf16", 1, 2),
    34: GgmlType("tq1_0", 256, 54),
    35: GgmlType("tq2_0", 256, 66),
    39: GgmlType("mxfp4", 32, 17),
    40: GgmlType("nvfp4", 64, 36),
    41: GgmlType("q1_0", 128, 18),
    42: GgmlType("q2_0", 64, 18),
}
"""Every type that a file may have, by its number."""

WEIGHT_TYPES: Final = {kind.name: number for number, kind in GGML_TYPES.items() if kind.can_multiply}
"""The numbers of the types that weights and a KV cache may have, by name."""

CANNOT_MULTIPLY: Final = frozenset(kind.name for kind in GGML_TYPES.values() if not kind.can_multiply)
