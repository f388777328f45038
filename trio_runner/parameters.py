"""A table of parameters: each field of a dataclass says what it is, and everything else is made from that.

A frozen dataclass declares its fields with the functions below:

    top_k: int = integer(40, -(2**31), 2**31 - 1, doc="Sample only from this many of the most probable tokens. ...")

From this one entry come the range check, the JSON field of a dialect, the option of the command line with its help, the
table in the documentation, and the field of the native struct. `parameters_of` returns the table of a dataclass.

The functions return `Any`, so that a type checker sees an ordinary default value of the annotated type.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["number", "integer", "boolean", "text", "choice", "other"]

_KEY = "trio_runner.parameter"

MAX_SHOWN = 40
"""Characters of a wrong word that a message repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How people give a parameter on the command line, where the plain way does not suit them.

    The plain way is `--` and the name of the parameter with dashes, a value of the parameter's kind, and its `doc` as
    the help.
    """

    flags: tuple[str, ...] = ()
    """All spellings of the option, a long one first; () means the plain one."""
    metavar: str | None = None
    """What stands for the value in `--help`."""
    parse: Callable[[str], Any] | None = None
    """Makes the value from the text that a user gave. Raises ValueError, whose message says what is wrong."""
    repeated: bool = False
    """The option may be given several times. The value of the parameter is a tuple of all of them."""
    scale: float = 1.0
    """What one unit of the command line is in units of the parameter: 0.001 if people give milliseconds."""
    unit: str = ""
    """Unit that people give a number in, if it is another than the parameter's."""
    commands: tuple[str, ...] = ()
    """Commands that have the option; () means all that load a model."""
    doc: str = ""
    """Help of the option, where the parameter's `doc` does not suit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One entry of the table."""

    name: str = ""
    kind: Kind
    default: Any
    doc: str
    """What the parameter does, in full sentences, for the documentation and for `--help`."""
    low: float = -math.inf
    high: float = math.inf
    """Inclusive bounds of a number or an integer."""
    choices: tuple[str, ...] = ()
    """The values that a choice may have."""
    optional: bool = False
    """None is allowed, too."""
    max_bytes: int | None = None
    """Bytes that a text may have in UTF-8."""
    unit: str = ""
    """Unit of a number, such as "seconds", for messages and documentation."""
    options: tuple[Option, ...] = (Option(),)
    """Options of the command line. Several options of one parameter add up to one tuple; () means no option."""
    default_text: str = ""
    """The default in words, where the value itself says too little."""

    @property
    def range_text(self) -> str:
        """The allowed values in words, for the documentation."""
        if self.kind == "boolean":
            return "true or false"
        if self.choices:
            return ", ".join(self.choices)
        if self.kind in ("number", "integer"):
            return _between(self.low, self.high, self.kind) + (f" {self.unit}" if self.unit else "")
        return f"at most {self.max_bytes} bytes" if self.max_bytes is not None else ""

    @property
    def default_words(self) -> str:
        """The default in words, for `--help`. Empty for None, which says nothing to people."""
        if self.default_text or self.default is None:
            return self.default_text
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def complaint(self, value: object) -> str | None:
        """What is wrong with `value`, in one sentence that names the parameter; None if it is allowed."""
        if value is None and self.optional:
            return None
        match self.kind:
            case "number":
                return number_complaint(self.name, value, self.low, self.high, self.unit)
            case "integer":
                return integer_complaint(self.name, value, int(self.low), int(self.high))
            case "boolean":
                return boolean_complaint(self.name, value)
            case "text":
                return text_complaint(self.name, value, self.max_bytes)
            case "choice":
                return choice_complaint(self.name, value, self.choices)
        return None


def number(default: float | None, low: float, high: float, *, doc: str, **more: Any) -> Any:
    """A field for a real number between `low` and `high`, both inclusive."""
    return _field(Parameter(kind="number", default=default, doc=doc, low=low, high=high, **more))


def integer(default: int | None, low: int, high: int, *, doc: str, **more: Any) -> Any:
    """A field for an integer between `low` and `high`, both inclusive."""
    return _field(Parameter(kind="integer", default=default, doc=doc, low=low, high=high, **more))


def boolean(default: bool, *, doc: str, **more: Any) -> Any:
    """A field for true or false."""
    return _field(Parameter(kind="boolean", default=default, doc=doc, **more))


def text(default: str, *, doc: str, **more: Any) -> Any:
    """A field for a text."""
    return _field(Parameter(kind="text", default=default, doc=doc, **more))


def one_of(default: str, choices: tuple[str, ...], *, doc: str, **more: Any) -> Any:
    """A field for one of a few words."""
    return _field(Parameter(kind="choice", default=default, doc=doc, choices=choices, **more))


def other(default: Any = dataclasses.MISSING, *, doc: str, **more: Any) -> Any:
    """A field of any other type. The dataclass checks it by itself."""
    return _field(Parameter(kind="other", default=default, doc=doc, **more))


def _field(parameter: Parameter) -> Any:
    parameter = dataclasses.replace(parameter, optional=parameter.optional or parameter.default is None)
    return dataclasses.field(default=parameter.default, metadata={_KEY: parameter})


_tables: dict[type[Any], Mapping[str, Parameter]] = {}


def parameters_of(cls: type[Any]) -> Mapping[str, Parameter]:
    """The table of a dataclass, by name, in the order of its fields. Fields that are no parameters are left out."""
    if cls not in _tables:
        _tables[cls] = _table(cls)
    return _tables[cls]


def _table(cls: type[Any]) -> dict[str, Parameter]:
    return {
        field.name: dataclasses.replace(field.metadata[_KEY], name=field.name)
        for field in dataclasses.fields(cls)
        if _KEY in field.metadata
    }


_Quick: TypeAlias = tuple[str, type[Any] | None, float, float, Parameter]
"""The name of a parameter, the type and the bounds of nearly all values that it gets, and the parameter."""
_quick_tables: dict[type[Any], tuple[_Quick, ...]] = {}
_QUICK_TYPES: dict[str, type[Any]] = {"number": float, "integer": int, "boolean": bool}


def first_complaint(values: Any) -> tuple[str, str] | None:
    """The first parameter of a dataclass instance whose value is not allowed, in the order of the table, and what is
    wrong with it; None if everything is allowed."""
    cls = type(values)
    if cls not in _quick_tables:  # made once: every request is checked against its table
        _quick_tables[cls] = tuple(
            (name, _QUICK_TYPES.get(parameter.kind), parameter.low, parameter.high, parameter)
            for name, parameter in parameters_of(cls).items()
            if parameter.kind != "other"
        )
    for name, usual_type, low, high, parameter in _quick_tables[cls]:
        value = getattr(values, name)
        if type(value) is usual_type and low <= value <= high:
            continue
        complaint = parameter.complaint(value)
        if complaint is not None:
            return name, complaint
    return None


# ---- single checks: each returns what is wrong, or None --------------------------------------------------------------


def number_complaint(name: str, value: object, low: float, high: float, unit: str = "") -> str | None:
    """What is wrong with `value` as a real number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} must be a number, not {type(value).__name__}"
    if not low <= value <= high:  # NaN is in no range
        return f"{name} must be {_between(low, high, 'number')}{f' {unit}' if unit else ''}, not {_shown(value)}"
    return None


def integer_complaint(name: str, value: object, low: int, high: int) -> str | None:
    """What is wrong with `value` as an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{name} must be an integer, not {type(value).__name__}"
    if not low <= value <= high:
        return f"{name} must be {_between(low, high, 'integer')}, not {_shown(value)}"
    return None


def boolean_complaint(name: str, value: object) -> str | None:
    """What is wrong with `value` as true or false."""
    return None if isinstance(value, bool) else f"{name} must be true or false, not {type(value).__name__}"


def choice_complaint(name: str, value: object, choices: tuple[str, ...]) -> str | None:
    """What is wrong with `value` as one of a few words."""
    if isinstance(value, str) and value in choices:
        return None
    *first, last = (f'"{choice}"' for choice in choices)
    shown = json.dumps(value[:MAX_SHOWN]) if isinstance(value, str) else type(value).__name__
    return f"{name} must be {', '.join(first)} or {last}, not {shown}"


def text_complaint(name: str, value: object, max_bytes: int | None = None) -> str | None:
    """What is wrong with `value` as a text of at most `max_bytes` bytes of UTF-8."""
    if not isinstance(value, str):
        return f"{name} must be a string, not {type(value).__name__}"
    try:
        n_bytes = len(value.encode())
    except UnicodeEncodeError:
        return f"{name} contains half of a surrogate pair, which is no character"
    if max_bytes is not None and n_bytes > max_bytes:
        return f"{name} has {n_bytes} bytes, but at most {max_bytes} are allowed"
    return None


def _between(low: float, high: float, kind: Kind) -> str:
    shown = str if kind == "integer" else "{:g}".format
    if high == math.inf:
        return f"{shown(low)} or more"
    return f"between {shown(low)} and {shown(high)}"


def _shown(value: float) -> str:
    """`value` for a message: Python refuses to print integers of some thousand digits."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else str(value)
