"""Jinja's sandbox, with operators, lookups and calls that spend before they work."""

from __future__ import annotations

from typing import Any, Final, NoReturn

from jinja2 import nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

from trio_runner.core.template.costs import pay_loop_variables, pay_method, pay_operator
from trio_runner.core.template.filters import FILTERS, TESTS
from trio_runner.core.template.work import (
    CALL,
    FILTER,
    LOOKUP,
    Refusal,
    paid_result,
    refuse,
    spend,
    text_of,
    weigh,
)

_JINJA_TYPES: Final = (LoopContext, Macro, Namespace, Cycler, Joiner, BlockReference, TemplateReference)
_VARIABLES_OF_JINJA: Final = ("_loop_vars", "_block_vars")
_UNSAFE: Final = frozenset({"encode", "expandtabs", "maketrans", "translate"})
"""Methods of str that make bytes, or more text than the arguments have."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox. Each method spends, then does what it does in Jinja."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(FILTER)
        pay_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Called by `map`, which gets the name from the template."""
        if name not in FILTERS or name.startswith("="):
            refuse("no filter has this name")
        return super().call_filter(name, *args, **kwargs)

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
        # In loops and blocks, Jinja passes their variables beside the arguments. The context removes them.
        arguments = {name: value for name, value in kwargs.items() if name not in _VARIABLES_OF_JINJA}
        if len(arguments) < len(kwargs):
            for name in _VARIABLES_OF_JINJA:
                pay_loop_variables(kwargs.get(name))
        spend(CALL + len(args) + len(arguments))
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if not isinstance(__obj, Macro):
            weigh(args)
            weigh(arguments)
        if isinstance(owner, str):
            pay_method(owner, method.__name__, args, arguments)
        elif isinstance(owner, (list, tuple)):
            weigh(owner)  # which is compared with the argument
        return paid_result(super().call(__context, __obj, *args, **kwargs))


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
    weigh(message)
    raise Refusal(str(message)[:500])


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
    environment.filters, environment.tests = FILTERS, TESTS
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
