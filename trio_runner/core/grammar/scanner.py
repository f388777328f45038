"""Read the text of a grammar by the rules of llama.cpp's parser, but within bounds of nesting and size."""

from __future__ import annotations

from typing import Final

from trio_runner.core.grammar.rules import ANY, OTHER, Grammar, Symbol, Symbols
from trio_runner.errors import InvalidGrammar

MAX_NESTING: Final = 64
"""Brackets inside brackets."""
MAX_RULES: Final = 2000
"""Rules that are defined."""
MAX_REPETITION: Final = 2000
"""Repetitions, multiplied where they are nested. llama.cpp has the same bound."""
MAX_ELEMENTS: Final = 200_000
"""Characters, classes and references when repetitions are written out."""

_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS: Final = frozenset("0123456789")
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


class Scanner:
    """Reads one text. Each method raises `InvalidGrammar` with the line and the column."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._nesting = 0
        self._n_groups = 0
        self._grammar = Grammar()

    def scan(self) -> Grammar:
        self._skip_space(newlines=True)
        while self._peek():
            self._scan_rule()
        return self._grammar

    def _peek(self, offset: int = 0) -> str:
        index = self._at + offset
        return self._text[index] if index < len(self._text) else ""

    def _fail(self, message: str) -> InvalidGrammar:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - (self._text.rfind("\n", 0, self._at) + 1) + 1
        return InvalidGrammar(f"line {line}, column {column}: {message}")

    def _skip_space(self, *, newlines: bool) -> None:
        text, at = self._text, self._at
        blank = " \t\r\n" if newlines else " \t"
        while at < len(text):
            if text[at] == "#":
                while at < len(text) and text[at] not in "\r\n":
                    at += 1
            elif text[at] in blank:
                at += 1
            else:
                break
        self._at = at

    def _take_while(self, characters: frozenset[str], what: str) -> str:
        begin = self._at
        while self._peek() in characters and self._peek():
            self._at += 1
        if self._at == begin:
            raise self._fail(f"expected {what}")
        return self._text[begin : self._at]

    def _scan_rule(self) -> None:
        name = self._take_while(_NAME, "the name of a rule")
        self._skip_space(newlines=False)
        if not self._text.startswith("::=", self._at):
            raise self._fail("expected ::=")
        self._at += 3
        self._skip_space(newlines=True)
        self._grammar.n_defined += 1
        if self._grammar.n_defined > MAX_RULES:
            raise self._fail(f"more than {MAX_RULES} rules")
        self._grammar.rules[name] = self._scan_alternatives()
        if self._peek() not in ("", "\r", "\n"):
            raise self._fail("expected the end of the line")
        self._skip_space(newlines=True)

    def _scan_alternatives(self) -> list[Symbols]:
        alternatives = [self._scan_sequence()]
        while self._peek() == "|":
            self._at += 1
            self._skip_space(newlines=True)
            alternatives.append(self._scan_sequence())
        return alternatives

    def _scan_sequence(self) -> Symbols:
        sequence: Symbols = []
        while character := self._peek():
            if character == '"':
                sequence.append(self._scan_literal())
            elif character == "[":
                sequence.append(self._scan_class())
            elif character in "<!":
                sequence.append(self._scan_token())
            elif character in _NAME:
                sequence.append(Symbol(1, rule=self._take_while(_NAME, "a name")))
            elif character == "(":
                sequence.append(self._scan_group())
            elif character == ".":
                self._at += 1
                sequence.append(Symbol(1, ANY, inverted=True))
            elif character in "*+?{":
                if not sequence:
                    raise self._fail(f"nothing to repeat before {character}")
                self._scan_repetition(sequence[-1])
                self._skip_space(newlines=self._nesting > 0)
                continue
            else:
                break
            self._count(sequence[-1].size)
            self._skip_space(newlines=self._nesting > 0)
        return sequence

    def _count(self, n_elements: int) -> None:
        self._grammar.n_elements += n_elements
        if self._grammar.n_elements > MAX_ELEMENTS:
            raise self._fail(f"more than {MAX_ELEMENTS} elements when repetitions are written out")

    def _scan_character(self) -> str:
        character = self._peek()
        if not character:
            raise self._fail("unexpected end of the grammar")
        self._at += 1
        if character != "\\":
            return character
        escape = self._peek()
        self._at += 1
        if escape in _HEX_DIGITS:
            n_digits = _HEX_DIGITS[escape]
            digits = self._text[self._at : self._at + n_digits]
            if len(digits) != n_digits or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                raise self._fail(f"expected {n_digits} hexadecimal digits")
            self._at += n_digits
            return chr(min(int(digits, 16), 0x10FFFF))
        if not escape or escape not in _ESCAPES:
            raise self._fail(f"unknown escape \\{escape}")
        return _ESCAPES[escape]

    def _scan_literal(self) -> Symbol:
        self._at += 1
        symbol = Symbol()
        while self._peek() != '"':
            character = self._scan_character()
            number = min(ord(character), OTHER)
            if symbol.size == 0:
                symbol.first = 1 << number
                symbol.ranges = ((ord(character), ord(character) + 1),)
            else:
                symbol.later.append(number)
            symbol.size += 1
        self._at += 1
        return symbol

    def _scan_class(self) -> Symbol:
        self._at += 1
        inverted = self._peek() == "^"
        if inverted:
            self._at += 1
        symbol = Symbol(inverted=inverted)
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            low = high = ord(self._scan_character())
            symbol.size += 1
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = ord(self._scan_character())
                symbol.size += 1
            if low <= high:
                ranges.append((low, high + 1))
                symbol.first |= (1 << (min(high, OTHER) + 1)) - (1 << min(low, OTHER))
        self._at += 1
        symbol.ranges = tuple(ranges)
        if inverted:
            symbol.first = (ANY & ~symbol.first) | (1 << OTHER) if symbol.size else 0
        return symbol

    def _scan_token(self) -> Symbol:
        if self._peek() == "!":
            self._at += 1
        if self._peek() != "<":
            raise self._fail("expected <")
        end = self._text.find(">", self._at)
        if end < 0:
            raise self._fail("expected >")
        name = self._text[self._at + 1 : end]
        if name.startswith("[") and not (name.endswith("]") and name[1:-1].isascii() and name[1:-1].isdigit()):
            raise self._fail("expected <[number]>")
        if len(name) > 256:
            raise self._fail("no token has so long a name")
        self._at = end + 1
        return Symbol(1, ANY, inverted=True)

    def _scan_group(self) -> Symbol:
        if self._nesting == MAX_NESTING:
            raise self._fail(f"brackets nested deeper than {MAX_NESTING}")
        self._at += 1
        self._nesting += 1
        self._skip_space(newlines=True)
        before = self._n_groups
        self._n_groups += 1
        name = f"({before})"  # no name that a rule can have
        self._grammar.rules[name] = self._scan_alternatives()
        if self._peek() != ")":
            raise self._fail("expected )")
        self._at += 1
        self._nesting -= 1
        return Symbol(1, rule=name, weight=max(1, self._n_groups - before))

    def _scan_repetition(self, symbol: Symbol) -> None:
        sign = self._peek()
        self._at += 1
        minimum, maximum = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign) or self._scan_braces()
        if minimum > MAX_REPETITION:
            raise self._fail(f"more than {MAX_REPETITION} repetitions")
        if maximum is not None and maximum < minimum:
            raise self._fail("the most repetitions are fewer than the least")
        if maximum is not None and maximum > MAX_REPETITION:
            maximum = None
        # llama.cpp writes the symbol out `minimum` times, and each further one as a rule of its own.
        times = max(1, minimum if maximum is None else maximum)
        symbol.weight *= times
        if symbol.weight > MAX_REPETITION:
            raise self._fail(f"repetitions of repetitions multiply to more than {MAX_REPETITION}")
        n_optional = 1 if maximum is None else maximum - minimum
        self._count((symbol.size + 3) * n_optional + symbol.size * max(0, minimum - 1))
        self._n_groups += n_optional
        symbol.size = symbol.size * minimum + (1 if n_optional else 0)
        symbol.minimum *= minimum
        symbol.maximum = None if symbol.maximum is None or maximum is None else symbol.maximum * maximum

    def _scan_braces(self) -> tuple[int, int | None]:
        newlines = self._nesting > 0
        self._skip_space(newlines=newlines)
        minimum = self._scan_number()
        maximum: int | None = minimum
        self._skip_space(newlines=newlines)
        if self._peek() == ",":
            self._at += 1
            self._skip_space(newlines=newlines)
            maximum = self._scan_number() if self._peek() in _DIGITS and self._peek() else None
            self._skip_space(newlines=newlines)
        if self._peek() != "}":
            raise self._fail("expected }")
        self._at += 1
        return minimum, maximum

    def _scan_number(self) -> int:
        digits = self._take_while(_DIGITS, "a number")
        if len(digits) > 9:
            raise self._fail("the number is too large")
        return int(digits)
