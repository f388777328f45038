"""The budget of a rendering, and what values weigh."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, Final, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext

MAX_WIDTH: Final = 1000
"""The largest number of characters by which a text can be padded or indented."""
MAX_NESTING: Final = 200
"""Lists, tuples and dicts inside each other."""

CALL: Final = 256
FILTER: Final = 64
LOOKUP: Final = 32
ELEMENT: Final = 16
STEP: Final = 8
REFERENCE: Final = 4

HASH_BITS: Final = 60
"""Bits of integers that all have different hashes in CPython."""
LARGE_NUMBER: Final = 1024
"""Units for a larger integer. Thousands of them can have one hash, so that each key of a dict is compared with all."""


class TemplateError(Exception):
    """What is wrong with a template, in words."""


class TooLong(TemplateError):
    """The text is longer than allowed."""


class Refusal(Exception):
    """The template called `raise_exception` with these words."""


_WORK_LEFT: ContextVar[list[int]] = ContextVar("_WORK_LEFT")
"""One number: the rest of the budget."""


@contextmanager
def bounds(max_work: int) -> Iterator[None]:
    """Set the budget, and turn every exception into `TemplateError` or `Refusal`."""
    token = _WORK_LEFT.set([max_work])
    try:
        yield
    except (TemplateError, Refusal):
        raise
    except RecursionError:
        raise TemplateError("it is nested too deeply") from None
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}"[:500]) from error
    finally:
        _WORK_LEFT.reset(token)


def spend(work: int) -> None:
    """Raises `TemplateError` if less than `work` units are left, or if `work` is negative."""
    left = _WORK_LEFT.get()
    if work < 0:
        raise TemplateError("it would be given more time")
    left[0] -= work
    if left[0] < 0:
        raise TemplateError("it is at work for too long")


def weigh(value: object, times: int = 1, depth: int = 1) -> int:
    """Return the weight of `value`: what it takes to read, compare or write it as a whole. Spends `times` as much."""
    if not isinstance(value, (list, tuple, dict)):
        weight = 1 + length_of(value)
        if isinstance(value, int) and value.bit_length() > HASH_BITS:
            weight += LARGE_NUMBER
        spend(weight * times)
        return weight
    if depth > MAX_NESTING:
        raise TemplateError("it nests values too deeply")
    weight = 2 * ELEMENT + max(ELEMENT, depth) * len(value)  # an indented line can be as long as it is deep
    spend(weight * times)
    inner = leaves = 0
    for item in chain(value, value.values()) if isinstance(value, dict) else value:
        if isinstance(item, (list, tuple, dict)):
            inner += weigh(item, times, depth + 1)
        else:  # here, because a call for each would take longer than all else
            leaves += 1
            if isinstance(item, (str, range)):
                leaves += length_of(item)
            elif isinstance(item, int) and item.bit_length() > HASH_BITS:
                leaves += LARGE_NUMBER
    spend(leaves * times)
    return weight + inner + leaves


def length_of(value: object) -> int:
    """The cost of a copy of `value` that shares its elements."""
    if isinstance(value, str):
        return len(value)
    return REFERENCE * len(value) if isinstance(value, (list, tuple, dict, range)) else 0


def paid_result(value: Any) -> Any:
    """Spend the cost of a copy of `value`. Views and iterators become lists, and HTML becomes text."""
    if isinstance(value, str):
        spend(1 + len(value))
        return str.__str__(value)
    # Most values are of the first types, and a check for an iterator takes long. A loop is one, but not used up by it.
    common = isinstance(value, (int, list, tuple, dict, LoopContext))
    if not common and isinstance(value, (Iterator, KeysView, ItemsView, ValuesView)):
        items = []
        for item in value:
            spend(ELEMENT)
            items.append(item)
        return items
    spend(1 + length_of(value))
    return value


def refuse(what: str) -> NoReturn:
    """Raise what Jinja's sandbox raises for something unsafe."""
    raise SecurityError(what)


def short(text: str) -> str:
    """`text`, if it is not longer than `MAX_WIDTH`."""
    if len(text) > MAX_WIDTH:
        refuse(f"a text of more than {MAX_WIDTH} characters")
    return text


def number_of(value: Any) -> Any:
    """`value`, if it is a number."""
    if not isinstance(value, (int, float)):
        refuse("only numbers are accepted")
    return value


def text_of(value: object) -> str:
    """What is written for `value`. None is nothing: no template means to write "None"."""
    weigh(value)
    return "" if value is None else str(value)
