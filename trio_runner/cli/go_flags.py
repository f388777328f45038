"""Command line flags as Go's `flag` package parses them, with the same error messages.

The original server starts its runner with such a command line and reads the error messages. Go's rules differ from
those of every Python parser: `-x` means `--x`; a boolean takes a value only after `=`; integers may be written 0x10,
0o17, 017, 0b1 and 1_000; parsing stops at the first argument that is not a flag, or after `--`; the last of several
equal flags counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

Value: TypeAlias = "str | int | bool"

_BOOLEANS = MappingProxyType(
    dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True)
    | dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False)
)

_INTEGER = re.compile(
    r"(?P<sign>[+-]?)"
    r"(?: 0[xX] (?P<hex>(?:_?[0-9a-fA-F])+) | 0[bB] (?P<bin>(?:_?[01])+) | 0[oO] (?P<oct>(?:_?[0-7])+)"
    r"  | 0 (?P<old>(?:_?[0-7])*) | (?P<dec>[1-9](?:_?[0-9])*) )",
    re.VERBOSE,
)
_BASES = {"hex": 16, "bin": 2, "oct": 8, "old": 8, "dec": 10}
_MAX_DIGITS = 64  # no 64-bit number has more in any base


class FlagError(Exception):
    """The command line is wrong. The message is that of Go's package."""


class HelpRequested(Exception):
    """The command line has -h or -help, and no flag of that name is defined."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag. Its values have the type of `default`."""

    name: str
    default: Value
    usage: str

    def parse(self, text: str) -> Value:
        """Return the value that `text` stands for. Raises `ValueError` with Go's reason: "parse error" or "value out of
        range"."""
        if isinstance(self.default, bool):
            if text not in _BOOLEANS:
                raise ValueError("parse error")
            return _BOOLEANS[text]
        return parse_int(text) if isinstance(self.default, int) else text


def parse_int(text: str) -> int:
    """Parse a 64-bit integer as Go's `strconv.ParseInt(text, 0, 64)` does.

    Raises `ValueError` with Go's reason: "parse error" or "value out of range".
    """
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise ValueError("parse error")
    assert match.lastgroup is not None
    digits = match[match.lastgroup].replace("_", "").lstrip("0") or "0"
    if len(digits) > _MAX_DIGITS:
        raise ValueError("value out of range")
    value = int(match["sign"] + digits, _BASES[match.lastgroup])
    if not -(2**63) <= value < 2**63:
        raise ValueError("value out of range")
    return value


@dataclass(frozen=True, slots=True)
class FlagSet:
    """The flags of a program."""

    flags: tuple[Flag, ...]

    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
        """Return the value of every flag by its name, and the arguments after the flags.

        Raises `FlagError` at the first wrong argument, and `HelpRequested` at the first request for help.
        """
        known: Mapping[str, Flag] = {flag.name: flag for flag in self.flags}
        values: dict[str, Value] = {flag.name: flag.default for flag in self.flags}
        rest = list(arguments)
        while rest and len(rest[0]) >= 2 and rest[0].startswith("-"):
            argument = rest.pop(0)
            if argument == "--":
                break
            body = argument[2:] if argument.startswith("--") else argument[1:]
            if not body or body[0] in "-=":
                raise FlagError(f"bad flag syntax: {argument}")
            name, has_value, text = body.partition("=")
            flag = known.get(name)
            if flag is None:
                if name in ("h", "help"):
                    raise HelpRequested
                raise FlagError(f"flag provided but not defined: -{name}")
            is_boolean = isinstance(flag.default, bool)
            if not has_value:
                if is_boolean:
                    text = "true"
                elif not rest:
                    raise FlagError(f"flag needs an argument: -{name}")
                else:
                    text = rest.pop(0)
            try:
                values[name] = flag.parse(text)
            except ValueError as error:
                if is_boolean:
                    raise FlagError(f"invalid boolean value {quote(text)} for -{name}: {error}") from None
                raise FlagError(f"invalid value {quote(text)} for flag -{name}: {error}") from None
        return values, rest

    def describe(self, program: str) -> str:
        """Return the usage text, with the flags in alphabetical order."""
        lines = [f"Usage of {program}:"]
        for flag in sorted(self.flags, key=lambda flag: flag.name):
            lines.append(f"  -{flag.name}{_type_name(flag.default)}\n    \t{flag.usage}{_default_note(flag.default)}")
        return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """Return `text` in double quotes, on one line, with what cannot be printed as escapes."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _type_name(default: Value) -> str:
    if isinstance(default, bool):
        return ""
    return " int" if isinstance(default, int) else " string"


def _default_note(default: Value) -> str:
    if not default:
        return ""
    return f" (default {quote(default)})" if isinstance(default, str) else f" (default {default})"
