"""What operations spend in addition to the length of what they read: searches, products, formats, comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from trio_runner.core.template.work import CALL, ELEMENT, MAX_WIDTH, REFERENCE, length_of, refuse, short, spend, weigh

MAX_BITS: Final = 1024
"""Bits of an integer that is an operand, and of a product."""

_WIDE: Final = {
    "%": re.compile(r"%(?:\([^()%]*\))?[-#0 +]*(?:\*|[0-9]{4}|[0-9]*\.(?:\*|[0-9]{4}))"),
    "{": re.compile(r"[0-9]{4}|:[^{}:]*\{"),
}


def pay_format(layout: str, mark: str, values: object) -> None:
    """Spend the cost of writing `values` into `layout`, where each place begins with `mark`."""
    if _WIDE[mark].search(layout):
        refuse("a format with a great or variable width")
    spend(len(layout) + CALL * layout.count(mark))
    weigh(values, 1 + layout.count(mark))


def pay_operator(operator: str, left: Any, right: Any) -> None:
    """Spend the cost of a binary operator. Numbers that could grow without end are refused."""
    n_bits = [value.bit_length() for value in (left, right) if isinstance(value, int)]
    if n_bits and max(n_bits) > MAX_BITS:
        refuse("a number is too large")
    match operator, left, right:
        case "*", int(), int() if sum(n_bits) > MAX_BITS:
            refuse("a number is too large")
        case "**", int(), int() if left.bit_length() * abs(right) > MAX_BITS:
            refuse("a number is too large")
        case "*", int(), _:
            spend(max(0, left) * length_of(right))
        case "*", _, int():
            spend(max(0, right) * length_of(left))
        case "+", _, _:
            spend(length_of(left) + length_of(right))
        case "%", str(), _:
            pay_format(left, "%", right)


def pay_comparison(left: Any, operator: str, right: Any) -> None:
    """Spend the cost of a comparison, or of a search for `left` in `right` if the operator is `in`."""
    if isinstance(left, (list, tuple, dict)):
        weigh(left)
        weigh(right)
    elif operator != "in":
        if isinstance(left, str) and isinstance(right, str):
            spend(min(len(left), len(right)))
    elif isinstance(right, str):
        spend(len(right))
        if isinstance(left, str):
            pay_search(right, left)
    elif isinstance(right, range):
        spend(ELEMENT * len(right))  # each number is made, unless `left` is an integer
    else:
        # A text may be compared with each element. Those that have another length differ at once.
        n_characters = len(left) if isinstance(left, str) else 0
        spend(n_characters + length_of(right) * (1 + n_characters // 64))


# ---- methods of text, and the filters that do the same ---------------------------------------------------------------
#
# A divisor of 16: CPython compares about 16 characters in a unit of time.


def pay_search(text: str, sep: str | None = None, *_: object, **__: object) -> None:
    """A search forwards. CPython takes the product of both lengths if the wanted text is short."""
    spend(len(text) * min(len(sep or ""), 128) // 16)


def _pay_search_backwards(text: str, sep: str | None = None, *_: object, **__: object) -> None:
    """A search backwards. CPython takes the product of both lengths."""
    spend(len(text) * len(sep or "") // 16)


def pay_strip(text: str, characters: str | None = None) -> None:
    spend(len(text) * len(characters or "") // 16)


def pay_replace(text: str, old: str, new: str, *_: object, **__: object) -> None:
    pay_search(text, old)
    spend((text.count(old) + 1) * (1 + len(new)))


def pay_join(between: str, items: Any) -> None:
    spend((ELEMENT + len(between)) * len(items))


def pay_indent(text: str, width: int | str) -> None:
    spend((ELEMENT + width_of(width)) * (1 + text.count("\n")))


def _pay_padding(_: str, width: int, *__: object) -> None:
    spend(width_of(width))


def width_of(width: int | str) -> int:
    """The number of characters in `width`, which is that number or the characters themselves."""
    if isinstance(width, str):
        return len(short(width))
    if not isinstance(width, int) or width > MAX_WIDTH:
        refuse(f"a width must be a number of at most {MAX_WIDTH}")
    return max(0, width)


_METHODS: Final[dict[str, Callable[..., None]]] = {
    **dict.fromkeys(["count", "find", "index", "partition", "split"], pay_search),
    **dict.fromkeys(["rfind", "rindex", "rpartition", "rsplit"], _pay_search_backwards),
    **dict.fromkeys(["lstrip", "rstrip", "strip"], pay_strip),
    **dict.fromkeys(["center", "ljust", "rjust", "zfill"], _pay_padding),
    "join": pay_join,
    "replace": pay_replace,
}


def pay_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Spend the cost of a method of `text`, whose arguments have been weighed."""
    spend(len(text))
    if name in ("format", "format_map"):
        pay_format(text, "{", (args, kwargs))
    elif name in _METHODS:
        _METHODS[name](text, *args, **kwargs)


def pay_loop_variables(variables: object) -> None:
    """Spend the cost of a new context of Jinja, which the variables of a loop or a block are copied into."""
    spend(ELEMENT * len(variables) if isinstance(variables, dict) else REFERENCE)
