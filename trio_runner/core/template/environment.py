"""Jinja's sandbox, with operators, lookups, calls, filters and tests that spend before they work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from jinja2 import nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace

from trio_runner.core.template.work import (
    CALL,
    ELEMENT,
    FILTER,
    LOOKUP,
    REFERENCE,
    SEARCH,
    Refusal,
    factor_of,
    length_of,
    number_of,
    paid_result,
    refuse,
    short,
    spend,
    text_of,
    weigh,
)

MAX_BITS: Final = 1024
"""Bits of a product of integers."""

_WIDE: Final = {
    "%": re.compile(r"%(?:\([^()%]*\))?[-#0 +]*(?:\*|[0-9]{4}|[0-9]*\.(?:\*|[0-9]{4}))"),
    "{": re.compile(r"[0-9]{4}|:[^{}:]*\{"),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _check_format(layout: str, mark: str, values: object) -> None:
    """Spend the cost of writing `values` into `layout`, where each place begins with `mark`."""
    if _WIDE[mark].search(layout):
        refuse("a format with a great or variable width")
    spend(len(layout) + CALL * layout.count(mark))
    weigh(values, 1 + layout.count(mark))


_JINJA_TYPES: Final = (LoopContext, Macro, Namespace, Cycler, Joiner, BlockReference, TemplateReference)
_UNSAFE: Final = frozenset({"encode", "expandtabs", "maketrans", "translate"})
"""Methods of str that make bytes, or more text than the arguments have."""
_MULTIPLYING: Final = _names(
    "center indent int join ljust lstrip replace rfind rindex rjust round rpartition rsplit rstrip strip tojson trim "
    "zfill"
)
"""Methods and filters that may take, or return, the product of their arguments."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox. Each method spends, then does what it does in Jinja."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(FILTER)
        match operator, left, right:
            case "*", int(), int() if left.bit_length() + right.bit_length() > MAX_BITS:
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
                _check_format(left, "%", right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = isinstance(obj, (str, list, tuple, dict, *_JINJA_TYPES)) and attr not in _UNSAFE
        return known and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._found(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        weigh(argument)
        return self._found(super().getitem(obj, argument))

    def _found(self, value: Any) -> Any:
        spend(CALL if isinstance(value, Undefined) else LOOKUP)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in Jinja
        spend(CALL + len(args))
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if not isinstance(__obj, Macro):
            weigh((args, kwargs))
        if isinstance(owner, str):
            product = method.__name__ in _MULTIPLYING
            spend(len(owner) * (factor_of(*args, *kwargs.values()) if product else SEARCH))
            if method.__name__ in ("format", "format_map"):
                _check_format(owner, "{", (args, kwargs))
        elif isinstance(owner, (list, tuple)):
            weigh(owner)  # which is compared with the argument
        return paid_result(super().call(__context, __obj, *args, **kwargs))


# ---- filters and tests ----------------------------------------------------------------------------------------------

_JINJA_FILTERS: Final = _names(
    "abs capitalize count d default dictsort e escape first float groupby indent int items last length list lower map "
    "max min reject rejectattr reverse round select selectattr sort title truncate unique upper"
)
"""Jinja's filters that templates may use."""
_INSTANT: Final = _names("count d default first last length =cut")
_BY_ELEMENT: Final = _names("items list map reject rejectattr reverse select selectattr")
"""Filters that take the same time for each element, whatever its weight."""
_OF_TYPE: Final = _names(
    "boolean callable defined escaped false float integer iterable mapping none number sameas sequence string true "
    "undefined"
)
"""Tests that take the same time for every value."""
_COSTS: Final = {"in": SEARCH, "title": 2 * ELEMENT}
"""Units for each character, where they are more than one."""
_PREPARED: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(["divisibleby", "even", "odd", "round"], number_of),
    **dict.fromkeys(["format", "indent", "replace", "title", "trim"], text_of),
    "int": lambda value: short(value) if isinstance(value, str) else value,
}
"""What a value becomes before it is weighed."""


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a filter or a test that spends before it works.

    It takes the context, so that Jinja does not call it to fold constants.
    """
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    instant, by_element, multiplying = name in _INSTANT, name in _BY_ELEMENT, name in _MULTIPLYING
    prepared, cost = _PREPARED.get(name), _COSTS.get(name, 1)

    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        spend(FILTER)
        if not instant:
            if prepared is not None:
                value = prepared(value)
            for arg in (*args, *kwargs.values()):
                weigh(arg, cost)
            if by_element or isinstance(value, (list, tuple, dict, range)):
                spend(FILTER * len(value))
            if not by_element:
                weigh(value, factor_of(*args, *kwargs.values()) if multiplying else cost)
        if passes:
            first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passes]
            return paid_result(function(first, value, *args, **kwargs))
        return paid_result(function(value, *args, **kwargs))

    return bounded


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = value if attribute is None else FILTERS["map"](context, value, attribute=attribute)
    return text_of(d).join(map(text_of, items))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not escaped for HTML, as models have seen it. Other arguments of `json.dumps` are functions, and not allowed."""
    return json.dumps(
        value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )


def _format(layout: str, *args: Any, **kwargs: Any) -> str:
    _check_format(layout, "%", kwargs or args)
    return layout % (kwargs or args)


def _replace(text: str, old: Any, new: Any, count: int | None = None) -> str:
    return text.replace(text_of(old), text_of(new), -1 if count is None else count)


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> Any:
    return FILTERS["sum"](ENVIRONMENT, value, attribute, number_of(start))


def _cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, (str, list, tuple, range)):
        spend((1 if isinstance(value, str) else REFERENCE) * len(range(*part.indices(len(value)))))
    return value[part]


@pass_context
def _pay(_: Context, cost: int) -> bool:
    spend(cost)
    return True


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    name: _bounded(name, function)
    for name, function in {
        **{name: FILTERS[name] for name in _JINJA_FILTERS},
        "format": _format,
        "join": _join,
        "replace": _replace,
        "safe": text_of,
        "string": text_of,
        "sum": _sum,
        "tojson": _to_json,
        "trim": lambda text, chars=None: text.strip(chars),
        # The rewriter calls these. A template cannot, because they are no names.
        "=concat": lambda *values: "".join(map(text_of, values)),
        "=cut": _cut,
        "=weighed": lambda value: value,
    }.items()
} | {"=pay": _pay}
_JINJA_TESTS: Final[dict[str, Any]] = TESTS
_TESTS: Final[dict[str, Any]] = {
    name: function if name in _OF_TYPE else _bounded(name, function) for name, function in _JINJA_TESTS.items()
}


# ---- tags and functions ---------------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained to say. Here that is text like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # it may contain itself
        return "<Namespace>"


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(text_of(message)[:500])


@pass_context
def _finalize(_: Context, value: object) -> str:
    spend(LOOKUP)
    return text_of(value)


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        extensions=[LoopControlExtension, _GenerationTag],
    )
    environment.filters, environment.tests = _FILTERS, _TESTS
    environment.globals = {
        "cycler": Cycler,
        "dict": dict,
        "joiner": Joiner,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "range": safe_range,
    }
    return environment


ENVIRONMENT: Final = _make_environment()
"""Templates do not change it, so all of them share it."""
