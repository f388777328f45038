"""Jinja's filters and tests, which spend before they work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from jinja2 import pass_context
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import Context
from jinja2.tests import TESTS as JINJA_TESTS

from trio_runner.core.template.costs import (
    pay_comparison,
    pay_format,
    pay_indent,
    pay_join,
    pay_replace,
    pay_strip,
    width_of,
)
from trio_runner.core.template.work import (
    ELEMENT,
    FILTER,
    REFERENCE,
    number_of,
    paid_result,
    refuse,
    short,
    spend,
    text_of,
    weigh,
)

MAX_PRECISION: Final = 300
"""Decimal places to which a number can be rounded. A float has no more."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_INSTANT: Final = _names("count d default first items last length list reverse")
"""Jinja's filters that look at no element. They spend what their result takes."""
_BY_ELEMENT: Final = _names("map reject rejectattr select selectattr")
"""Jinja's filters that take the same time for each element, whatever its weight."""
_WHOLE: Final = _names("abs capitalize dictsort e escape float groupby lower max min sort truncate unique upper")
"""Jinja's filters that read the whole value."""


def _jinja_filter(name: str) -> Callable[..., Any]:
    """Jinja's filter, bounded. It takes the context, so that Jinja does not call it to fold constants."""
    function: Callable[..., Any] = JINJA_FILTERS[name]
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    by_element, whole = name in _BY_ELEMENT, name in _WHOLE

    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        spend(FILTER)
        weigh(args)
        if kwargs:
            weigh(kwargs)
        if by_element:
            spend(FILTER * len(value) if value else 0)  # these filters accept None, too
        elif whole:
            spend(FILTER * len(value) if isinstance(value, (list, tuple, dict, range)) else 0)
            weigh(value)
        if passes:
            first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passes]
            result = function(first, value, *args, **kwargs)
        else:
            result = function(value, *args, **kwargs)
        return value if result is value else paid_result(result)

    return bounded


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that spends by itself, as a filter or test. Jinja does not call it to fold constants, either."""

    @pass_context
    def bounded(_: Context, *args: Any, **kwargs: Any) -> Any:
        spend(FILTER)
        return function(*args, **kwargs)

    return bounded


# ---- filters --------------------------------------------------------------------------------------------------------


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    spend(FILTER)
    items = value if attribute is None else context.environment.filters["map"](context, value, attribute=attribute)
    spend(ELEMENT * len(items))
    texts = list(map(text_of, items))
    between = text_of(d)
    pay_join(between, texts)
    return between.join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not escaped for HTML, as models have seen it. Other arguments of `json.dumps` are functions, and not allowed."""
    n_between = sum(len(short(separator)) for separator in separators or ())
    # The module `json` indents in Python, otherwise it is C.
    times = 1 if indent is None else 4 + width_of(indent)
    weigh(value, times + n_between // ELEMENT)
    return json.dumps(
        value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )


def _format(layout: Any, *args: Any, **kwargs: Any) -> str:
    text = text_of(layout)
    pay_format(text, "%", kwargs or args)
    return text % (kwargs or args)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = text_of(value), text_of(old), text_of(new)
    pay_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = text_of(value)
    pay_indent(text, width)
    return str(JINJA_FILTERS["indent"](text, width, first, blank))


def _trim(value: Any, chars: str | None = None) -> str:
    text = text_of(value)
    pay_strip(text, chars)
    return text.strip(chars)


def _title(value: Any) -> str:
    text = text_of(value)
    spend(2 * ELEMENT * len(text))
    return str(JINJA_FILTERS["title"](text))


def _int(value: Any, default: int = 0, base: int = 10) -> Any:
    return JINJA_FILTERS["int"](short(value) if isinstance(value, str) else value, default, base)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(number_of(precision)) > MAX_PRECISION:
        refuse(f"rounding to more than {MAX_PRECISION} places")
    return JINJA_FILTERS["round"](number_of(value), precision, method)


@pass_context
def _sum(context: Context, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    spend(FILTER)
    spend(FILTER * len(value))
    return JINJA_FILTERS["sum"](context.environment, value, attribute, number_of(start))


# ---- filters that only the rewriter can name -------------------------------------------------------------------------


def _concat(*values: object) -> str:
    return "".join(map(text_of, values))


def _cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, (str, list, tuple, range)):
        spend((1 if isinstance(value, str) else REFERENCE) * len(range(*part.indices(len(value)))))
    return value[part]


@pass_context
def _pay(_: Context, cost: int) -> bool:
    spend(cost)
    return True


def _weighed(value: Any) -> Any:
    weigh(value)
    return value


FILTERS: Final[dict[str, Any]] = {
    **{name: _jinja_filter(name) for name in _INSTANT | _BY_ELEMENT | _WHOLE},
    "format": _own(_format),
    "indent": _own(_indent),
    "int": _own(_int),
    "join": _join,
    "replace": _own(_replace),
    "round": _own(_round),
    "safe": _own(text_of),
    "string": _own(text_of),
    "sum": _sum,
    "title": _own(_title),
    "tojson": _own(_to_json),
    "trim": _own(_trim),
    "=concat": _own(_concat),
    "=cut": _own(_cut),
    "=pay": _pay,
    "=weighed": _own(_weighed),
}
"""The filters of templates. A name that begins with "=" cannot be written in a template."""


# ---- tests ----------------------------------------------------------------------------------------------------------

_COMPARISONS: Final = {
    alias: name
    for name, aliases in {
        "eq": "eq equalto ==",
        "ne": "ne !=",
        "lt": "lt lessthan <",
        "le": "le <=",
        "gt": "gt greaterthan >",
        "ge": "ge >=",
        "in": "in",
    }.items()
    for alias in aliases.split()
}
_OF_NUMBERS: Final = _names("divisibleby even odd")
_OF_TEXTS: Final = _names("lower upper")
_OF_NAMES: Final = _names("filter test")


def _test(name: str) -> Any:
    """Jinja's test, bounded if its time depends on the value."""
    function: Any = JINJA_TESTS[name]
    if name in _COMPARISONS:
        operator = _COMPARISONS[name]

        def compare(left: Any, right: Any) -> Any:
            pay_comparison(left, operator, right)
            return function(left, right)

        return _own(compare)
    if name in _OF_NUMBERS:
        return _own(lambda value, *args, **kwargs: function(number_of(value), *args, **kwargs))
    if name in _OF_TEXTS:
        return _own(lambda value: function(text_of(value)))
    if name in _OF_NAMES:
        names = FILTERS if name == "filter" else JINJA_TESTS
        return _own(lambda value: isinstance(value, str) and value in names)
    return function


TESTS: Final[dict[str, Any]] = {name: _test(name) for name in JINJA_TESTS}
"""The tests of templates."""
