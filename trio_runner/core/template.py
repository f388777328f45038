"""Run a template that somebody else wrote, within bounds.

A chat template is a program in the model's file. Jinja's sandbox keeps it away from Python, but not from time and
memory: `"x" * 10**9`, ten nested loops, a list that holds itself twice, forty times over. So everything here is counted
before it is done. The template is rewritten so that loops, slices, comparisons and concatenations come here as well
as operators, filters and calls, and each costs about as many units as it takes tens of nanoseconds:

    256     a call
     64     a filter, an operator
     32     an attribute or item that is looked up
     16     an element of a list, tuple or dict that is iterated over, compared or written out
      8     a step of the program, in a loop or a macro, whether or not it is taken
      4     an element that is copied or searched for
      1     a character

What counts of a structure is how large it is written out: one that shares its parts can be much smaller in memory.
The budget is more than the longest conversations need, and one or two seconds of work.

A template sees plain values only: None, bool, int, float, str, list, dict.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, Final, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_BYTES: Final = 128 << 10
MAX_WORK: Final = 1 << 27
MAX_RANGE: Final = 100_000
MAX_BITS: Final = 1024
"""Of an integer that is multiplied."""
MAX_WIDTH: Final = 1000
"""Characters to which something is padded or indented."""
MAX_NESTING: Final = 200

_CALL: Final = 256
_FILTER: Final = 64
_STEP: Final = 8
_ELEMENT: Final = 16
_REFERENCE: Final = 4


class TemplateError(Exception):
    """What is wrong with a template, in words."""


class TooLong(TemplateError):
    """It makes more text than it may."""


class Refusal(Exception):
    """The template has called `raise_exception`, with these words."""


class BoundedTemplate:
    """A compiled template. May be rendered by several threads at once.

    Raises `TemplateError` if it does not compile.
    """

    def __init__(self, source: str) -> None:
        with _bounds(MAX_WORK):
            if len(source.encode(errors="surrogatepass")) > MAX_TEMPLATE_BYTES:
                raise TemplateError(f"it has more than {MAX_TEMPLATE_BYTES} bytes")
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(_Rewriter().visit(tree))

    def render(
        self,
        variables: Mapping[str, Any],
        *,
        max_characters: int,
        strftime_now: Callable[[str], str] | None = None,
        max_work: int = MAX_WORK,
    ) -> str:
        """The text that it makes of `variables`, which are plain values. `strftime_now` is a function of templates
        that have it, and not defined if it is None.

        Raises `Refusal` if the template does, `TooLong` if it makes more than `max_characters`, and
        `TemplateError` if it fails or is at work for too long.
        """
        functions: dict[str, Any] = {}
        if strftime_now is not None:
            functions["strftime_now"] = lambda layout: strftime_now(_short_text(layout))
        pieces: list[str] = []
        n_characters = 0
        with _bounds(max_work):
            for piece in self._template.generate({**variables, **functions}):
                n_characters += len(piece)
                if n_characters > max_characters:
                    raise TooLong(f"it makes more than {max_characters} characters")
                pieces.append(piece)
        return "".join(pieces)


# Counting.


class _Work:
    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


_WORK: ContextVar[_Work] = ContextVar("_WORK")


@contextmanager
def _bounds(max_work: int) -> Iterator[None]:
    """Around work on a template: every failure in it becomes one of the two."""
    token = _WORK.set(_Work(max_work))
    try:
        yield
    except (TemplateError, Refusal):
        raise
    except RecursionError:
        raise TemplateError("it is nested too deeply") from None
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}"[:500]) from error
    finally:
        _WORK.reset(token)


def _spend(work: int) -> None:
    budget = _WORK.get()
    budget.left -= work
    if budget.left < 0:
        raise TemplateError("it is at work for too long")


def _spend_on(*values: object, indent: int = 0, times: int = 1) -> None:
    """For reading, comparing or writing out `values` whole, so many times; lines are indented by as much per level."""
    levels: list[Iterator[object]] = [iter(values)]
    while levels:
        for value in levels[-1]:
            if isinstance(value, str):
                _spend(times * (1 + len(value)))
            elif isinstance(value, (list, tuple, dict)):
                if len(levels) > MAX_NESTING:
                    raise TemplateError("it nests values too deeply")
                _spend(times * (2 * _ELEMENT + (_ELEMENT + len(levels) * indent) * len(value)))
                levels.append(chain(value, value.values()) if isinstance(value, dict) else iter(value))
                break
            else:
                _spend(times)
        else:
            levels.pop()


def _spend_on_length(value: object) -> None:
    """For copying or searching `value` without looking into its elements."""
    if isinstance(value, str):
        _spend(1 + len(value))
    elif isinstance(value, (list, tuple, dict, range)):
        _spend(1 + _REFERENCE * len(value))
    else:
        _spend(1)


def _listed(value: Any) -> Any:
    """What can be read only once as a list, so that it can be weighed as well."""
    return list(_counted(value)) if isinstance(value, Iterator) else value


def _counted(iterable: Iterable[Any], cost: int = _ELEMENT) -> Iterator[Any]:
    for item in iterable:
        _spend(cost)
        yield item


def _refuse(what: str) -> NoReturn:
    raise SecurityError(what)


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        _refuse("only numbers are taken")
    return value


def _short_text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_WIDTH:
        _refuse("the argument must be a short text")
    return value


def _short_width(value: object) -> int:
    if isinstance(value, int) and value <= MAX_WIDTH:
        return max(0, value)
    _refuse(f"a width must be a number of at most {MAX_WIDTH}")


# Functions and operators.


class _Namespace(Namespace):
    def __repr__(self) -> str:  # it may hold itself
        return "<Namespace>"


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    _spend_on(*args)
    return _Namespace(*args, **kwargs)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        _refuse(f"a range of more than {MAX_RANGE}")
    return numbers


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    _spend_on(*args)
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    _spend_on(message)
    raise Refusal(str(message)[:500])


@pass_context
def _finalize(_: Context, value: object) -> object:
    """What is written out. None is nothing: no template means to say "None"."""
    _spend(_STEP)
    if value is None:
        return ""
    _spend_on(value)
    return value


def _plus(left: Any, right: Any) -> Any:
    _spend_on_length(left)
    _spend_on_length(right)
    return left + right


def _times(left: Any, right: Any) -> Any:
    for sequence, number in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(number, int):
            _spend(1 + max(0, number) * (1 if isinstance(sequence, str) else _REFERENCE) * len(sequence))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
        _refuse("a number is too large")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
        _refuse("a number is too large")
    return left**right


_WIDE: Final = re.compile(r"%(?:\([^()%]*\))?[-#0 +]*(?:\*|[0-9]{4}|[0-9]*\.(?:\*|[0-9]{4}))")


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _spend_on_length(left)
        if _WIDE.search(left):
            _refuse("a format with a great or variable width")
        _spend_on(right, times=1 + left.count("%"))
    return left % right


_OPERATORS: Final[dict[str, Callable[[Any, Any], Any]]] = {"+": _plus, "*": _times, "**": _power, "%": _modulo}

_COMPARISONS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def _compare(left: Any, name: str, right: Any) -> Any:
    right = _listed(right)
    if isinstance(left, (list, tuple, dict)):
        _spend_on(left, right)
    elif name in ("in", "notin"):
        _spend_on_length(right)
        if isinstance(left, str) and isinstance(right, str):
            _searched(right, left)
    elif isinstance(left, str) and isinstance(right, str):
        _spend(1 + min(len(left), len(right)))
    return _COMPARISONS[name](left, right)


def _as_test(name: str) -> Callable[[Any, Any], Any]:
    def test(left: Any, right: Any) -> Any:
        _spend(_FILTER)
        return _compare(left, name, right)

    return test


# What may be done to values, by their names in Python.


def _searched(text: str, wanted: str | None = None, *_: object) -> None:
    _spend(len(text) * min(len(wanted or ""), 128) // 16)


def _searched_backwards(text: str, wanted: str | None = None, *_: object) -> None:
    _spend(len(text) * len(wanted or "") // 16)  # quadratic in CPython


def _stripped(text: str, characters: str | None = None) -> None:
    _spend(len(text) * len(characters or "") // 16)


def _replaced(text: str, old: str, new: str, *_: object) -> None:
    _searched(text, old)
    _spend((text.count(old) + 1) * (1 + len(new)))


def _padded(text: str, width: int, *_: object) -> None:
    _spend(_short_width(width))


def _joined(text: str, items: Any) -> None:
    _spend((_ELEMENT + len(text)) * len(items))


_COSTS: Final[dict[str, Callable[..., None]]] = {
    **dict.fromkeys(["count", "find", "index", "partition", "split"], _searched),
    **dict.fromkeys(["rfind", "rindex", "rpartition", "rsplit"], _searched_backwards),
    **dict.fromkeys(["lstrip", "rstrip", "strip"], _stripped),
    **dict.fromkeys(["center", "ljust", "rjust", "zfill"], _padded),
    "join": _joined,
    "replace": _replaced,
}
"""The methods of str that cost more than their text and arguments are long."""

_METHODS: Final[dict[type, frozenset[str]]] = {
    str: frozenset(
        {
            *["capitalize", "casefold", "lower", "swapcase", "title", "upper"],
            *["endswith", "format", "format_map", "removeprefix", "removesuffix", "splitlines", "startswith"],
            *["isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower"],
            *["isnumeric", "isspace", "istitle", "isupper"],
            *_COSTS,
        }
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index", "grouper", "list"}),  # the last two: what groupby makes
}
_JINJAS_OWN: Final = (LoopContext, Macro, Namespace, Cycler, Joiner, BlockReference, TemplateReference)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(_OPERATORS)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, _JINJAS_OWN) and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._found(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):
            _spend_on(argument)
        return self._found(super().getitem(obj, argument))

    def _found(self, value: Any) -> Any:
        _spend(_CALL if isinstance(value, Undefined) else 2 * _ELEMENT)  # for that, something was raised
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        layout: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _spend_on_length(layout)
            if re.search(r"[0-9]{4}|:[^{}:]*\{", layout):
                _refuse("a format with a great or variable width")
            _spend(_CALL * layout.count("{"))
            _spend_on(args, kwargs, times=1 + layout.count("{"))
            return formatted(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in Jinja
        _spend(_CALL + len(args))
        if isinstance(__obj, LoopContext) and args:
            args = (_counted(args[0]), *args[1:])
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, list, tuple, dict, LoopContext)):
            args = tuple(map(_listed, args))
            _spend_on_length(owner)
            _spend_on(args, kwargs)
            if isinstance(owner, str) and __obj.__name__ in _COSTS:
                _COSTS[__obj.__name__](owner, *args, *([kwargs["sep"]] if "sep" in kwargs else []))
            elif isinstance(owner, (list, tuple)):
                _spend_on(owner)  # compared with the argument
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (KeysView, ItemsView, ValuesView)):  # which can be compared and subtracted like a set
            result = list(result)
        _spend_on_length(result)
        return result


# Filters.


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As models have seen it: not escaped for HTML, keys in their order."""
    width = len(_short_text(indent)) if isinstance(indent, str) else _short_width(indent or 0)
    extra = sum(len(_short_text(separator)) for separator in separators or ())
    _spend_on(value, indent=width + extra, times=1 if indent is None else 8)  # Python, not C
    return json.dumps(
        value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )


def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    _spend(_FILTER)
    items = list(value)
    if attribute is not None:
        items = list(FILTERS["map"](context, items, attribute=attribute))
    texts = list(map(_text, items))
    between = _text(d)
    _joined(between, texts)
    return between.join(texts)


def _text(value: object) -> str:
    _spend_on(value)
    return "" if value is None else str(value)


def _concat(*values: object) -> str:
    return "".join(map(_text, values))


def _replace(value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = _text(value), _text(old), _text(new)
    _replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    n_characters = len(_short_text(width)) if isinstance(width, str) else _short_width(width)
    text = _text(value)
    _spend((_ELEMENT + n_characters) * (1 + text.count("\n")))
    return str(FILTERS["indent"](text, width, first, blank))


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if not -300 < precision < 300:
        _refuse("rounding to too many digits")
    return FILTERS["round"](_number(value), precision, method)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    return str(_modulo(_text(value), kwargs or args))


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str):
        _short_text(value)
    return int(FILTERS["int"](value, default, base))


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, (str, list, tuple, range)):
        _spend((1 if isinstance(value, str) else _REFERENCE) * len(range(*part.indices(len(value)))))
    return value[part]


def _key(value: Any) -> Any:
    if isinstance(value, tuple):
        _refuse("a tuple as a key")  # the time to hash one grows with its size as it is written out
    return value


def _weighed(value: Any) -> Any:
    _spend_on(value)
    return value


def _as_it_is(value: Any) -> Any:
    return value


def _whole(value: Any) -> Any:
    value = _listed(value)
    if isinstance(value, (list, tuple, dict, range)):
        _spend(_FILTER * len(value))
    return _weighed(value)


def _by_element(value: Any) -> Any:
    return _counted(value, _FILTER) if value else value


_JINJAS: Final[dict[Callable[[Any], Any], list[str]]] = {
    _as_it_is: ["count", "d", "default", "first", "items", "last", "length", "list", "reverse"],
    _whole: [
        *["abs", "capitalize", "dictsort", "e", "escape", "float", "groupby", "lower", "max", "min", "sort"],
        *["truncate", "unique", "upper"],
    ],
    _by_element: ["map", "reject", "rejectattr", "select", "selectattr"],
}
"""Jinja's own filters, by what they do with what they are given."""


def _jinjas(name: str, given: Callable[[Any], Any]) -> Callable[..., Any]:
    function = FILTERS[name]
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(_FILTER)
        _spend_on(args, kwargs)
        value = given(value)
        match kind:
            case "context":
                result = function(context, value, *args, **kwargs)
            case "eval_context":
                result = function(context.eval_ctx, value, *args, **kwargs)
            case "environment":
                result = function(context.environment, value, *args, **kwargs)
            case _:
                result = function(value, *args, **kwargs)
        if isinstance(result, str):
            result = str.__str__(result)  # not Markup
        if result is not value:
            _spend_on_length(result)
        return result

    return filtered


def _ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the context, so that Jinja does not call it when it compiles."""

    @pass_context
    def filtered(_: Context, *args: Any, **kwargs: Any) -> Any:
        _spend(_FILTER)
        return function(*args, **kwargs)

    return filtered


def _sum(iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    items = _counted(iterable)
    values = items if attribute is None else (_ENVIRONMENT.getitem(item, attribute) for item in items)
    return sum(map(_number, values), _number(start))


def _trim(value: Any, chars: str | None = None) -> str:
    text = _text(value)
    _stripped(text, chars)
    return text.strip(chars)


def _title(value: Any) -> str:
    text = _text(value)
    _spend(2 * _ELEMENT * len(text))
    return str(FILTERS["title"](text))


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: _jinjas(name, given) for given, names in _JINJAS.items() for name in names},
    "format": _ours(_format),
    "indent": _ours(_indent),
    "int": _ours(_int),
    "join": pass_context(_join),
    "replace": _ours(_replace),
    "round": _ours(_round),
    "safe": _ours(_concat),
    "string": _ours(_concat),
    "sum": _ours(_sum),
    "title": _ours(_title),
    "tojson": _ours(_to_json),
    "trim": _ours(_trim),
    # What the rewriter puts in; no template can name these.
    "=compare": _ours(_compare),
    "=concat": _ours(_concat),
    "=counted": _ours(_counted),
    "=cost": _ours(_spend),
    "=key": _ours(_key),
    "=slice": _ours(_slice),
    "=weighed": _ours(_weighed),
}
_TESTS: Final[dict[str, Any]] = {
    **TESTS,
    # These would look at more than they seem to.
    "filter": lambda value: isinstance(value, str) and value in _FILTERS,
    "test": lambda value: isinstance(value, str) and value in _TESTS,
    "lower": lambda value: _text(value).islower(),
    "upper": lambda value: _text(value).isupper(),
    "divisibleby": lambda value, number: _modulo(value, number) == 0,
    "even": lambda value: _modulo(value, 2) == 0,
    "odd": lambda value: _modulo(value, 2) == 1,
    **{
        alias: _as_test(name)
        for name, aliases in {
            "eq": "eq equalto ==",
            "ne": "ne !=",
            "lt": "lt lessthan <",
            "lteq": "le <=",
            "gt": "gt greaterthan >",
            "gteq": "ge >=",
            "in": "in",
        }.items()
        for alias in aliases.split()
    },
}


# Rewriting.


_BODIES: Final = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


class _Rewriter(NodeTransformer):
    """Leads what Jinja would do by itself through the filters above."""

    def _filter(self, name: str, first: nodes.Expr, *others: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(
            first, name, list(others), [], None, None, lineno=first.lineno, environment=first.environment
        )

    def _const(self, value: object, like: nodes.Node) -> nodes.Const:
        return nodes.Const(value, lineno=like.lineno, environment=like.environment)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        # Fixed text too is counted when it is written.
        node.nodes = [
            self._const(child.data, child) if isinstance(child, nodes.TemplateData) else child for child in node.nodes
        ]
        return node

    def _n_steps(self, *within: nodes.Node) -> int:
        """Of the nodes and all that is in them, but for other bodies, which count themselves."""
        n_steps = 0
        todo = list(within)
        while todo:
            step = todo.pop()
            n_steps += 1
            todo += step.iter_child_nodes(exclude=("body",) if isinstance(step, _BODIES) else ())
        return n_steps

    def _count_steps(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Let the body begin with what it costs."""
        self.generic_visit(node)
        cost = self._filter("=cost", self._const(_STEP * (4 + self._n_steps(node, *node.body)), node))
        node.body.insert(0, nodes.ExprStmt(cost, lineno=node.lineno, environment=node.environment))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _count_steps  # noqa: N815

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._count_steps(node)
        cost = _ELEMENT + (0 if node.test is None else _STEP * self._n_steps(node.test))
        node.iter = self._filter("=counted", node.iter, self._const(cost, node))  # type: ignore[arg-type]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter("=concat", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if len(node.ops) == 1:
            return self._filter("=compare", node.expr, self._const(node.ops[0].op, node), node.ops[0].expr)
        node.expr = self._filter("=weighed", node.expr)
        for operand in node.ops:
            operand.expr = self._filter("=weighed", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = self._const(None, node)
        bounds: Sequence[nodes.Expr | None] = (node.arg.start, node.arg.stop, node.arg.step)
        return self._filter("=slice", node.node, *(none if bound is None else bound for bound in bounds))

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._filter("=key", node.key)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> NoReturn:  # noqa: N802
        raise TemplateError("it escapes for HTML")


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained to say; here that is text like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, finalize=_finalize, extensions=[LoopControlExtension, _GenerationTag]
    )
    environment.filters = _FILTERS
    environment.tests = _TESTS
    environment.globals = {
        "cycler": Cycler,
        "dict": _dict,
        "joiner": Joiner,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
        "range": _range,
    }
    return environment


_ENVIRONMENT: Final = _make_environment()
"""Templates do not change it: they may share it."""
