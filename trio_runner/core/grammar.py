"""Whether a grammar is worth handing to llama.cpp: a scanner for GBNF that measures what it would cost.

A grammar is the most expensive thing a request can carry: llama.cpp's parser recurses with its nesting, copies what is
repeated, and follows every way of deriving the next character at once, and none of that can be interrupted. So it is
read here first, by the same rules, and refused when one of these is out of bounds:

    nesting       brackets inside brackets
    rules         names that are defined
    chain         rules that begin with rules that begin with rules ...
    repetition    counts in braces, multiplied where they follow each other
    elements      characters, classes and references after repetitions are written out
    beginnings    ways in which the next character of one rule can be derived
    loops         unbounded repetitions side by side that the same character can continue

What is refused is far outside ordinary grammars: JSON, programming languages, forms with hundreds of alternatives. What
passes can still be ambiguous in ways that only show while it runs; the shim stops those by the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from trio_runner.errors import InvalidGrammar
from trio_runner.request import MAX_GRAMMAR_BYTES

MAX_NESTING: Final = 64
MAX_RULES: Final = 2000
MAX_CHAIN: Final = 200
MAX_REPETITION: Final = 2000  # llama.cpp's own bound
MAX_ELEMENTS: Final = 200_000
MAX_BEGINNINGS: Final = 1024
MAX_LOOPS: Final = 6

_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS: Final = frozenset("0123456789")
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}

# Sets of characters as bits: one per ASCII character, one for all others together.
_OTHER: Final = 128
_ANY: Final = (1 << (_OTHER + 1)) - 1


def check_grammar(text: str) -> None:
    """Raise `InvalidGrammar` for a grammar that does not parse, has no rule `root`, or is out of the bounds above."""
    n_bytes = len(text.encode(errors="surrogatepass"))
    if n_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidGrammar(f"the grammar has {n_bytes} bytes, but at most {MAX_GRAMMAR_BYTES} are allowed")
    grammar = _Scanner(text).scan()
    _check_references(grammar)
    _check_beginnings(grammar)


@dataclass(slots=True)
class _Item:
    """One element of a sequence: some literal characters, or a reference to a rule."""

    size: int = 0
    """Elements, before repetition."""
    first: int = 0
    """The characters that a literal can begin with."""
    rule: str | None = None
    weight: int = 1
    """Rules that one more repetition would multiply, as llama.cpp counts them."""
    minimum: int = 1
    maximum: int | None = 1
    """None: no bound."""


_Sequence = list[_Item]


@dataclass(slots=True)
class _Grammar:
    """Rules by name, with a name of its own for each group; each is a list of alternatives."""

    rules: dict[str, list[_Sequence]] = field(default_factory=dict)
    n_defined: int = 0
    n_elements: int = 0


class _Scanner:
    """Reads a grammar's text as llama.cpp does."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._nesting = 0
        self._n_groups = 0
        self._grammar = _Grammar()

    def scan(self) -> _Grammar:
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

    def _scan_alternatives(self) -> list[_Sequence]:
        alternatives = [self._scan_sequence()]
        while self._peek() == "|":
            self._at += 1
            self._skip_space(newlines=True)
            alternatives.append(self._scan_sequence())
        return alternatives

    def _scan_sequence(self) -> _Sequence:
        sequence: _Sequence = []
        while character := self._peek():
            if character == '"':
                sequence.append(self._scan_literal())
            elif character == "[":
                sequence.append(self._scan_class())
            elif character in "<!":
                sequence.append(self._scan_token())
            elif character in _NAME:
                sequence.append(_Item(1, rule=self._take_while(_NAME, "a name")))
            elif character == "(":
                sequence.append(self._scan_group())
            elif character == ".":
                self._at += 1
                sequence.append(_Item(1, _ANY))
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

    def _scan_literal(self) -> _Item:
        self._at += 1
        item = _Item()
        while self._peek() != '"':
            character = self._scan_character()
            if item.size == 0:
                item.first = 1 << min(ord(character), _OTHER)
            item.size += 1
        self._at += 1
        return item

    def _scan_class(self) -> _Item:
        self._at += 1
        inverted = self._peek() == "^"
        if inverted:
            self._at += 1
        item = _Item()
        while self._peek() != "]":
            low = high = min(ord(self._scan_character()), _OTHER)
            item.size += 1
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = min(ord(self._scan_character()), _OTHER)
                item.size += 1
            if low <= high:
                item.first |= (1 << (high + 1)) - (1 << low)
        self._at += 1
        if inverted:
            item.first = (_ANY & ~item.first) | (1 << _OTHER) if item.size else 0
        return item

    def _scan_token(self) -> _Item:
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
        return _Item(1, _ANY)

    def _scan_group(self) -> _Item:
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
        return _Item(1, rule=name, weight=max(1, self._n_groups - before))

    def _scan_repetition(self, item: _Item) -> None:
        symbol = self._peek()
        self._at += 1
        minimum, maximum = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(symbol) or self._scan_braces()
        if minimum > MAX_REPETITION:
            raise self._fail(f"more than {MAX_REPETITION} repetitions")
        if maximum is not None and maximum < minimum:
            raise self._fail("the most repetitions are fewer than the least")
        if maximum is not None and maximum > MAX_REPETITION:
            maximum = None
        # llama.cpp writes the item out `minimum` times, and each further one as a rule of its own.
        times = max(1, minimum if maximum is None else maximum)
        item.weight *= times
        if item.weight > MAX_REPETITION:
            raise self._fail(f"repetitions of repetitions multiply to more than {MAX_REPETITION}")
        n_optional = 1 if maximum is None else maximum - minimum
        self._count((item.size + 3) * n_optional + item.size * max(0, minimum - 1))
        self._n_groups += n_optional
        item.size = item.size * minimum + (1 if n_optional else 0)
        item.minimum *= minimum
        item.maximum = None if item.maximum is None or maximum is None else item.maximum * maximum

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


def _check_references(grammar: _Grammar) -> None:
    if "root" not in grammar.rules:
        raise InvalidGrammar("there is no rule named root")
    for alternatives in grammar.rules.values():
        for sequence in alternatives:
            for item in sequence:
                if item.rule is not None and item.rule not in grammar.rules:
                    raise InvalidGrammar(f"the rule {item.rule} is not defined")


def _find_empty(grammar: _Grammar) -> set[str]:
    """The rules that may derive nothing."""
    empty: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name, alternatives in grammar.rules.items():
            if name not in empty and any(all(_is_empty(item, empty) for item in items) for items in alternatives):
                empty.add(name)
                changed = True
    return empty


def _is_empty(item: _Item, empty: set[str]) -> bool:
    return item.minimum == 0 or (item.rule in empty if item.rule is not None else item.size == 0)


def _beginning(sequence: _Sequence, empty: set[str]) -> Iterator[_Item]:
    """The items that the first character of a sequence can come from."""
    for item in sequence:
        yield item
        if not _is_empty(item, empty):
            return


def _check_beginnings(grammar: _Grammar) -> None:
    empty = _find_empty(grammar)
    first: dict[str, int] = {}
    beginnings: dict[str, int] = {}
    loops: dict[str, _Loops] = {}
    for name in _inner_first(grammar, empty):
        first[name] = 0
        beginnings[name] = 1 if name in empty else 0
        loops[name] = {}
        for sequence in grammar.rules[name]:
            beginning = list(_beginning(sequence, empty))
            for item in beginning:
                first[name] |= item.first if item.rule is None else first[item.rule]
                times = item.maximum or 1 if item.rule in empty else 1
                beginnings[name] += times * (1 if item.rule is None else beginnings[item.rule])
            # Alternatives do not multiply, only what follows one another does.
            for bit, count in _live_loops(beginning, empty, first, loops)[-1].items():
                loops[name][bit] = max(count, loops[name].get(bit, 0))
        if beginnings[name] > MAX_BEGINNINGS:
            raise InvalidGrammar(f"{_title(name)} can begin in more than {MAX_BEGINNINGS} ways")
    for name, alternatives in grammar.rules.items():
        for sequence in alternatives:
            for live in _live_loops(sequence, empty, first, loops):
                if max(live.values(), default=0) > MAX_LOOPS:
                    raise InvalidGrammar(
                        f"{_title(name)} has more than {MAX_LOOPS} unbounded repetitions in a row for one character"
                    )


_Loops: TypeAlias = dict[int, int]
"""For a character (its bit), how many unbounded repetitions could take it next."""


def _live_loops(sequence: _Sequence, empty: set[str], first: dict[str, int], loops: dict[str, _Loops]) -> list[_Loops]:
    """The loops that can be reached from behind the sequence, then from before each of its items, last item first."""
    live: _Loops = {}
    lives = [live]
    for item in reversed(sequence):
        live = dict(live) if _is_empty(item, empty) else {}
        if item.rule is not None:
            for bit, count in loops[item.rule].items():
                live[bit] = live.get(bit, 0) + count
        if item.maximum is None:
            mask = item.first if item.rule is None else first[item.rule]
            for bit in range(_OTHER + 1):
                if mask >> bit & 1:
                    live[bit] = live.get(bit, 0) + 1
        lives.append(live)
    return lives


def _inner_first(grammar: _Grammar, empty: set[str]) -> list[str]:
    """All rules, each after those it can begin with. Raises `InvalidGrammar` for left recursion and for long chains."""
    order: list[str] = []
    chain: dict[str, int] = {}  # rules that stand behind one another at the beginning, once a rule is done
    for start in grammar.rules:
        if start in chain:
            continue
        path = [start]
        pending = [_inner_rules(grammar, start, empty)]
        on_path = {start}
        while path:
            inner = next(pending[-1], None)
            if inner is None:
                name = path.pop()
                pending.pop()
                on_path.discard(name)
                chain[name] = 1 + max((chain[rule] for rule in _inner_rules(grammar, name, empty)), default=0)
                if chain[name] > MAX_CHAIN:
                    raise InvalidGrammar(f"more than {MAX_CHAIN} rules begin with one another")
                order.append(name)
            elif inner in on_path:
                raise InvalidGrammar(f"{_title(inner)} is left-recursive: it can begin with itself")
            elif inner not in chain:
                path.append(inner)
                pending.append(_inner_rules(grammar, inner, empty))
                on_path.add(inner)
    return order


def _inner_rules(grammar: _Grammar, name: str, empty: set[str]) -> Iterator[str]:
    for sequence in grammar.rules[name]:
        for item in _beginning(sequence, empty):
            if item.rule is not None:
                yield item.rule


def _title(name: str) -> str:
    return "a group in brackets" if name.startswith("(") else f"the rule {name}"
