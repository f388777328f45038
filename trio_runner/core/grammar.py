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
    derivations   steps to try every way of deriving the characters of one token
    items         literals, classes and references before repetitions are written out
    positions     places in the grammar, times the characters that it tells apart

What is refused is far outside ordinary grammars: JSON, programming languages, forms with hundreds of alternatives. What
passes can still be costly over a whole vocabulary or in the long run; the shim stops that by the clock, which it reads
between candidates. That is why the cost of one candidate is bounded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trio_runner.errors import InvalidGrammar
from trio_runner.sampling import MAX_GRAMMAR_BYTES

MAX_NESTING: Final = 64
MAX_RULES: Final = 2000
MAX_CHAIN: Final = 200
MAX_REPETITION: Final = 2000  # llama.cpp's own bound
MAX_ELEMENTS: Final = 200_000
MAX_BEGINNINGS: Final = 1024
MAX_LOOPS: Final = 6
MAX_DERIVATIONS: Final = 120_000  # something like 30 ms
MAX_ITEMS: Final = 10_000
MAX_POSITIONS: Final = 1_200_000

_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS: Final = frozenset("0123456789")
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}

# Sets of characters as bits: one per ASCII character, one for all others together.
_OTHER: Final = 128
_N_CHARACTERS: Final = _OTHER + 1
_ANY: Final = (1 << _N_CHARACTERS) - 1


def check_grammar(text: str) -> None:
    """Raise `InvalidGrammar` for a grammar that does not parse, has no rule `root`, or is out of the bounds above."""
    n_bytes = len(text.encode(errors="surrogatepass"))
    if n_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidGrammar(f"the grammar has {n_bytes} bytes, but at most {MAX_GRAMMAR_BYTES} are allowed")
    grammar = _Scanner(text).scan()
    _check_references(grammar)
    empty = _find_empty(grammar)
    inner_first = _inner_first(grammar, empty)
    _check_beginnings(grammar, empty, inner_first)
    _check_derivations(_with_own_copies(grammar))


@dataclass(slots=True)
class _Item:
    """One element of a sequence: some literal characters, or a reference to a rule."""

    size: int = 0
    """Elements, before repetition."""
    first: int = 0
    """The characters that it can begin with, if it refers to no rule."""
    ranges: tuple[tuple[int, int], ...] = ()
    """The same by code points, without the last."""
    inverted: bool = False
    """All characters but those in the ranges."""
    later: bytearray = field(default_factory=bytearray)
    """The other characters of a literal, each as the number of its bit."""
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
                sequence.append(_Item(1, _ANY, inverted=True))
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
            number = min(ord(character), _OTHER)
            if item.size == 0:
                item.first = 1 << number
                item.ranges = ((ord(character), ord(character) + 1),)
            else:
                item.later.append(number)
            item.size += 1
        self._at += 1
        return item

    def _scan_class(self) -> _Item:
        self._at += 1
        inverted = self._peek() == "^"
        if inverted:
            self._at += 1
        item = _Item(inverted=inverted)
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            low = high = ord(self._scan_character())
            item.size += 1
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = ord(self._scan_character())
                item.size += 1
            if low <= high:
                ranges.append((low, high + 1))
                item.first |= (1 << (min(high, _OTHER) + 1)) - (1 << min(low, _OTHER))
        self._at += 1
        item.ranges = tuple(ranges)
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
        return _Item(1, _ANY, inverted=True)

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


def _check_beginnings(grammar: _Grammar, empty: set[str], inner_first: list[str]) -> None:
    first: dict[str, int] = {}
    beginnings: dict[str, int] = {}
    loops: dict[str, _Loops] = {}
    for name in inner_first:
        first[name] = 0
        beginnings[name] = sum(all(_is_empty(item, empty) for item in items) for items in grammar.rules[name])
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


# ---- derivations ----------------------------------------------------------------------------------------------------
# llama.cpp rejects a candidate only after it has followed every way of deriving its characters, one way after another:
# what two ways have in common is walked twice. The number of steps is computed backwards, from strings of one character
# to strings of _N_STEPS, for every place in the grammar and every first character. It is an upper bound, because each
# branch may go on with the character that is worst for itself, and in the worst of the contexts that its rule has.
#
# With arbitrary strings of that length even JSON would look dangerous: every number in "1,1,1,1,1,1,1,1" can be read in
# two ways. Vocabularies have no such tokens. Theirs are words, runs of blanks, and runs of punctuation, all possibly
# behind one other character, and mixtures that are short.

_MAX_COPIED: Final = 24
"""Items and alternatives of a rule that is looked at separately wherever it is used."""
_COMPARISONS_PER_STEP: Final = 32
_MAX_COPIES: Final = 1000
_MAX_UNMERGED: Final = 20_000_000
_ROUNDS: Final = 2
"""How often a rule may end where another use of itself ends: recursion beyond that is left to the clock."""

_TOO_MANY_POSITIONS: Final = (
    f"the grammar has more than {MAX_POSITIONS} positions (its items times the characters that it tells apart)"
)

_Counts: TypeAlias = NDArray[np.float32]

_WORD: Final = np.array([chr(number).isalnum() or number == _OTHER for number in range(_N_CHARACTERS)])
_BLANK: Final = np.array([chr(number).isspace() for number in range(_N_CHARACTERS)])
_KINDS: Final = np.stack([_WORD, _BLANK, ~(_WORD | _BLANK), np.ones_like(_WORD)])
"""The characters that may come second and later in a string of each kind: words, blanks, punctuation, mixtures."""
_N_KINDS: Final = len(_KINDS)
_LENGTHS: Final = np.array([16, 16, 12, 8])
"""The longest string of each kind that is looked at."""
_N_STEPS: Final = int(_LENGTHS.max())


@dataclass(slots=True)
class _Place:
    """An item of a sequence, and what stands behind it."""

    item: _Item
    owner: str
    rest_is_empty: bool
    """The rule that it stands in may end behind it."""


def _check_derivations(grammar: _Grammar) -> None:
    empty = _find_empty(grammar)
    inner_first = _inner_first(grammar, empty)
    rows = {name: row for row, name in enumerate(inner_first)}
    places: list[_Place] = []
    sequences: list[tuple[int, int, int]] = []  # a rule, its first place, the place behind its last
    for name in inner_first:
        for sequence in grammar.rules[name]:
            begin = len(places)
            rest_is_empty = True
            for item in reversed(sequence):
                places.append(_Place(item, name, rest_is_empty))
                rest_is_empty = rest_is_empty and _is_empty(item, empty)
            places[begin:] = reversed(places[begin:])
            sequences.append((rows[name], begin, len(places)))
    if len(places) > MAX_ITEMS:
        raise InvalidGrammar(f"the grammar has more than {MAX_ITEMS} items")
    masks, kinds = _characters_of([place.item for place in places])
    _Derivations(places, sequences, rows, masks, kinds, empty, _owners_first(places, rows)).check()


def _with_own_copies(grammar: _Grammar) -> _Grammar:
    """The same grammar with a copy of each small rule for each of its uses.

    What follows a rule is counted for the worst of its uses, after every character anew; for the one `ws` that stands
    everywhere that would be far too much.
    """
    copies = _Grammar()
    names: list[tuple[str, str, dict[str, str]]] = [("root", "root", {})]
    sizes: dict[str, int] = {}
    shared = {"root"}
    n_copies = 0
    while names:
        name, copy, outer = names.pop()
        outer = outer | {name: copy} if outer or name not in shared else {}
        alternatives: list[_Sequence] = []
        for sequence in grammar.rules[name]:
            items: _Sequence = []
            for item in sequence:
                if item.rule is not None:
                    if item.rule in outer:
                        target = outer[item.rule]
                    elif (
                        item.rule not in shared
                        and (outer or n_copies < _MAX_COPIES)
                        and _size(grammar, item.rule, sizes) <= _MAX_COPIED
                    ):
                        n_copies += 1
                        target = f"{item.rule}\n{n_copies}"  # no name that a rule can have
                        names.append((item.rule, target, outer))
                    else:
                        target = item.rule
                        if target not in shared:
                            shared.add(target)
                            names.append((target, target, {}))
                    item = replace(item, rule=target)
                items.append(item)
            alternatives.append(items)
        copies.rules[copy] = alternatives
    return copies


def _size(grammar: _Grammar, name: str, sizes: dict[str, int]) -> int:
    """The items and alternatives of a rule and of all that it refers to, counted only as far as it matters."""
    if name not in sizes:
        size = 0
        pending = [(name, frozenset((name,)))]
        while pending and size <= _MAX_COPIED:
            inner, outer = pending.pop()
            for sequence in grammar.rules[inner]:
                size += 1 + len(sequence)
                if size > _MAX_COPIED:
                    break
                pending += [
                    (item.rule, outer | {item.rule})
                    for item in sequence
                    if item.rule is not None and item.rule not in outer
                ]
        sizes[name] = size
    return sizes[name]


def _characters_of(items: list[_Item]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the characters that the grammar tells apart each item can begin with, and which are in each kind."""
    ends = {end for item in items for low_high in item.ranges for end in low_high}
    bounds = sorted(ends | set(range(_OTHER + 1)))  # every ASCII character, then stretches of the others
    columns = {bound: column for column, bound in enumerate(bounds)}
    if len(items) * len(bounds) > _MAX_UNMERGED:
        raise InvalidGrammar(_TOO_MANY_POSITIONS)
    masks = np.zeros((len(items), len(bounds)), np.bool_)
    for row, item in zip(masks, items, strict=True):
        for low, high in item.ranges:
            row[columns[low] : columns[high]] = True
        if item.inverted and item.first:
            np.logical_not(row, out=row)
    # Characters that stand in the same items are counted as one.
    classes: dict[bytes, int] = {}
    numbers = [classes.setdefault(column.tobytes(), len(classes)) for column in np.ascontiguousarray(masks.T)]
    kinds = np.zeros((_N_KINDS, len(classes)), np.bool_)
    merged = np.zeros((len(items), len(classes)), np.bool_)
    for column, number in enumerate(numbers):
        kinds[:, number] |= _KINDS[:, min(bounds[column], _OTHER)]
        merged[:, number] = masks[:, column]
    if merged.size > MAX_POSITIONS:
        raise InvalidGrammar(_TOO_MANY_POSITIONS)
    return merged, kinds


def _owners_first(places: list[_Place], rows: dict[str, int]) -> list[int]:
    """All rules, each behind those that can end where it ends, as far as recursion leaves such an order."""
    owners: list[list[int]] = [[] for _ in rows]
    for place in places:
        if place.item.rule is not None and place.rest_is_empty:
            owners[rows[place.item.rule]].append(rows[place.owner])
    order: list[int] = []
    seen: set[int] = set()
    for start in range(len(rows)):
        pending = [(start, iter(owners[start]))] if start not in seen else []
        seen.add(start)
        while pending:
            row, left = pending[-1]
            owner = next((owner for owner in left if owner not in seen), None)
            if owner is None:
                order.append(row)
                pending.pop()
            else:
                seen.add(owner)
                pending.append((owner, iter(owners[owner])))
    return order


class _Derivations:
    """The steps for strings of each length, [kind of string, first character] for each rule and place."""

    def __init__(
        self,
        places: list[_Place],
        sequences: list[tuple[int, int, int]],
        rows: dict[str, int],
        masks: NDArray[np.bool_],
        kinds: NDArray[np.bool_],
        empty: set[str],
        owners_first: list[int],
    ) -> None:
        self._places = places
        self._sequences = sequences
        self._owners_first = owners_first
        self._masks = masks[:, None, :].astype(np.float32)
        self._kinds = kinds
        self._targets = [-1 if place.item.rule is None else rows[place.item.rule] for place in places]
        self._owners = np.array([rows[place.owner] for place in places], np.intp)
        self._rest_is_empty = np.array([place.rest_is_empty for place in places], np.bool_)
        self._is_empty = [_is_empty(place.item, empty) for place in places]
        # What may be empty stands at the beginning as often as it is repeated.
        self._times = [place.item.maximum or 1 if place.item.rule in empty else 1 for place in places]
        self._callers: list[list[int]] = [[] for _ in rows]
        for index, target in enumerate(self._targets):
            if target >= 0:
                self._callers[target].append(index)
        self._lengths = np.array([[1 + len(place.item.later)] * _N_KINDS for place in places])
        self._derivable = np.array([_lengths_in_kinds(place.item.later) for place in places])
        # What a string of each length costs behind each place: [length, place, kind].
        self._after = np.zeros((_N_STEPS + 1, len(places), _N_KINDS), np.float32)
        self._begin = self._follow = np.zeros((0, 0, 0), np.float32)

    def check(self) -> None:
        # llama.cpp prepares what comes behind each possible item before it knows whether the item matches at all, and
        # compares everything that it has prepared with everything else.
        ones = self._masks.max(axis=2, keepdims=True)
        n_behind = self._sum_behind(ones)
        work = self._sum_behind(ones * (1 + n_behind + n_behind**2 / _COMPARISONS_PER_STEP))[:, :, 0]
        for n_steps in range(1, _N_STEPS + 1):
            cost = self._cost_of_literals(n_steps, work)
            behind = self._sum_behind(self._masks * cost[:, :, None])
            self._after[n_steps] = (behind * self._kinds).max(axis=2)
            worst = np.maximum(behind.max(axis=2), self._begin[self._owners].max(axis=2))
            worst *= n_steps <= _LENGTHS
            if worst.max() > MAX_DERIVATIONS:
                owner = self._places[int(worst.max(axis=1).argmax())].owner
                raise InvalidGrammar(
                    f"{_title(owner)} can derive {n_steps} characters in more than "
                    f"{MAX_DERIVATIONS} steps: too many alternatives or repetitions match the same characters"
                )

    def _sum_behind(self, items: _Counts) -> _Counts:
        """The sum over the items that can come behind each place. Fills in those of places that refer to rules."""
        self._compute_begin(items)
        rest = self._compute_rest(items)
        self._compute_follow(rest)
        rest += self._follow[self._owners] * self._rest_is_empty[:, None, None]
        return rest

    def _cost_of_literals(self, n_steps: int, work: _Counts) -> _Counts:
        """[place, kind]"""
        lengths = self._lengths
        left = np.maximum(n_steps - lengths, 0)
        after = np.take_along_axis(self._after, left[None], axis=0)[0]
        whole = (self._derivable == lengths) & (lengths <= n_steps)
        cost: _Counts = np.where(whole, lengths + work + after, np.minimum(self._derivable, n_steps)).astype(np.float32)
        return cost

    def _compute_begin(self, items: _Counts) -> None:
        """Fills in what rules begin with, and the items that refer to rules at beginnings."""
        self._begin = np.zeros((len(self._callers), *items.shape[1:]), np.float32)
        for rule, begin, end in self._sequences:  # inner rules come first
            for index in range(begin, end):
                target = self._targets[index]
                if target >= 0:
                    np.multiply(self._begin[target], self._times[index], out=items[index])
                self._begin[rule] += items[index]
                if not self._is_empty[index]:
                    break

    def _compute_rest(self, items: _Counts) -> _Counts:
        """What can come behind each place before its rule ends."""
        rest = np.zeros_like(items)
        for _, begin, end in self._sequences:
            suffix: _Counts | None = None
            for index in range(end - 1, begin - 1, -1):
                target = self._targets[index]
                if target >= 0:
                    np.multiply(self._begin[target], self._times[index], out=items[index])
                if suffix is not None:
                    rest[index] = suffix
                item = self._places[index].item
                if item.maximum != 1:
                    if item.minimum == item.maximum:
                        np.maximum(rest[index], items[index], out=rest[index])
                    else:
                        rest[index] += items[index]
                suffix = items[index] if suffix is None or not self._is_empty[index] else suffix + items[index]
        return rest

    def _compute_follow(self, rest: _Counts) -> None:
        """What can come behind each rule: the worst of its uses."""
        self._follow = np.zeros_like(self._begin)
        for _ in range(_ROUNDS):
            for rule in self._owners_first:
                for index in self._callers[rule]:
                    behind = rest[index]
                    if self._rest_is_empty[index]:
                        behind = behind + self._follow[self._owners[index]]
                    np.maximum(self._follow[rule], behind, out=self._follow[rule])


def _lengths_in_kinds(later: bytearray) -> list[int]:
    """How much of a literal is a string of each kind."""
    if not later:
        return [1] * _N_KINDS
    inside = _KINDS[:, np.frombuffer(later, np.uint8)]
    return [1 + (len(later) if row.all() else int(row.argmin())) for row in inside]


def _title(name: str) -> str:
    return "a group in brackets" if name.startswith("(") else f"the rule {name.partition(chr(10))[0]}"
