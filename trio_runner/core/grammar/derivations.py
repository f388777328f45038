"""Bound the steps in which llama.cpp can reject one candidate token.

llama.cpp rejects a candidate only after it has followed every way of deriving its characters, one after another. Steps
that two ways have in common are taken twice. The number of steps is computed here from the end: for strings of one
character, then of two, up to `_N_STEPS`, for every place in the grammar and every first character. It is an upper
bound, because each branch may continue with its own worst character, and in the worst context of its rule.

For arbitrary strings of that length even JSON would look dangerous: every number in "1,1,1,1,1,1,1,1" can be read in
two ways. Vocabularies have no such tokens. They have words, runs of blanks, and runs of punctuation, each possibly
behind one other character, and short mixtures. So only such strings are considered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trio_runner.core.grammar.rules import (
    N_CHARACTERS,
    OTHER,
    Grammar,
    Symbol,
    find_nullable,
    is_nullable,
    order_inner_first,
    title_of,
)
from trio_runner.errors import InvalidGrammar

MAX_DERIVATIONS: Final = 120_000
"""Steps for the characters of one token. They take about 30 ms."""
MAX_SYMBOLS: Final = 10_000
"""Literals, classes and references before repetitions are written out."""
MAX_POSITIONS: Final = 1_200_000
"""Symbols, times the characters that the grammar tells apart."""

_COMPARISONS_PER_STEP: Final = 32
"""Comparisons of two prepared symbols that take as long as one step."""
_MAX_UNMERGED: Final = 20_000_000
"""Symbols, times characters before equal characters are merged: bytes of the largest array."""
_ROUNDS: Final = 2
"""How often a rule may end where another use of itself ends. Deeper recursion is left to the deadline of a step."""

_TOO_MANY_POSITIONS: Final = (
    f"the grammar has more than {MAX_POSITIONS} positions (its symbols times the characters that it tells apart)"
)

_Counts: TypeAlias = NDArray[np.float32]

_WORD: Final = np.array([chr(number).isalnum() or number == OTHER for number in range(N_CHARACTERS)])
_BLANK: Final = np.array([chr(number).isspace() for number in range(N_CHARACTERS)])
_KINDS: Final = np.stack([_WORD, _BLANK, ~(_WORD | _BLANK), np.ones_like(_WORD)])
"""The characters allowed after the first in each kind of string: words, blanks, punctuation, mixtures."""
_N_KINDS: Final = len(_KINDS)
_LENGTHS: Final = np.array([16, 16, 12, 8])
"""The longest string of each kind that is considered."""
_N_STEPS: Final = int(_LENGTHS.max())


@dataclass(slots=True)
class _Place:
    """A symbol, and what stands behind it in its alternative."""

    symbol: Symbol
    owner: str
    """The rule that the symbol stands in."""
    rest_is_nullable: bool
    """The symbols behind it can all be empty, so that the rule can end there."""


def check_derivations(grammar: Grammar) -> None:
    """Raise `InvalidGrammar` if a bound is exceeded."""
    nullable = find_nullable(grammar)
    inner_first = order_inner_first(grammar, nullable)
    rows = {name: row for row, name in enumerate(inner_first)}
    places: list[_Place] = []
    sequences: list[tuple[int, int, int]] = []  # of each: its rule, its first place, the end
    for name in inner_first:
        for sequence in grammar.rules[name]:
            begin = len(places)
            rest_is_nullable = True
            for symbol in reversed(sequence):
                places.append(_Place(symbol, name, rest_is_nullable))
                rest_is_nullable = rest_is_nullable and is_nullable(symbol, nullable)
            places[begin:] = reversed(places[begin:])
            sequences.append((rows[name], begin, len(places)))
    if len(places) > MAX_SYMBOLS:
        raise InvalidGrammar(f"the grammar has more than {MAX_SYMBOLS} symbols")
    masks, kinds = _characters_of([place.symbol for place in places])
    _Derivations(places, sequences, rows, masks, kinds, nullable, _owners_first(places, rows)).check()


def _characters_of(symbols: list[Symbol]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The characters that each symbol can begin with, [symbol, character], and those of each kind, [kind, character].

    Characters that the grammar does not tell apart are one.
    """
    ends = {end for symbol in symbols for low_high in symbol.ranges for end in low_high}
    bounds = sorted(ends | set(range(OTHER + 1)))  # every ASCII character, then ranges of the others
    columns = {bound: column for column, bound in enumerate(bounds)}
    if len(symbols) * len(bounds) > _MAX_UNMERGED:
        raise InvalidGrammar(_TOO_MANY_POSITIONS)
    masks = np.zeros((len(symbols), len(bounds)), np.bool_)
    for row, symbol in zip(masks, symbols, strict=True):
        for low, high in symbol.ranges:
            row[columns[low] : columns[high]] = True
        if symbol.inverted and symbol.first:
            np.logical_not(row, out=row)
    # Merge the characters that are in the same symbols.
    classes: dict[bytes, int] = {}
    numbers = [classes.setdefault(column.tobytes(), len(classes)) for column in np.ascontiguousarray(masks.T)]
    kinds = np.zeros((_N_KINDS, len(classes)), np.bool_)
    merged = np.zeros((len(symbols), len(classes)), np.bool_)
    for column, number in enumerate(numbers):
        kinds[:, number] |= _KINDS[:, min(bounds[column], OTHER)]
        merged[:, number] = masks[:, column]
    if merged.size > MAX_POSITIONS:
        raise InvalidGrammar(_TOO_MANY_POSITIONS)
    return merged, kinds


def _owners_first(places: list[_Place], rows: dict[str, int]) -> list[int]:
    """The rows of all rules, each after the rules that can end where it ends, as far as recursion allows."""
    owners: list[list[int]] = [[] for _ in rows]
    for place in places:
        if place.symbol.rule is not None and place.rest_is_nullable:
            owners[rows[place.symbol.rule]].append(rows[place.owner])
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
    """The steps for strings of each length.

    The arrays have the shape [place or rule, kind of string, first character], unless they say otherwise.
    """

    def __init__(
        self,
        places: list[_Place],
        sequences: list[tuple[int, int, int]],
        rows: dict[str, int],
        masks: NDArray[np.bool_],
        kinds: NDArray[np.bool_],
        nullable: set[str],
        owners_first: list[int],
    ) -> None:
        self._places = places
        self._sequences = sequences
        self._owners_first = owners_first
        self._masks = masks[:, None, :].astype(np.float32)
        self._kinds = kinds
        self._targets = [-1 if place.symbol.rule is None else rows[place.symbol.rule] for place in places]
        self._owners = np.array([rows[place.owner] for place in places], np.intp)
        self._rest_is_nullable = np.array([place.rest_is_nullable for place in places], np.bool_)
        self._is_nullable = [is_nullable(place.symbol, nullable) for place in places]
        # A nullable symbol stands at the beginning as often as it is repeated.
        self._times = [place.symbol.maximum or 1 if place.symbol.rule in nullable else 1 for place in places]
        self._callers: list[list[int]] = [[] for _ in rows]
        for index, target in enumerate(self._targets):
            if target >= 0:
                self._callers[target].append(index)
        self._lengths = np.array([[1 + len(place.symbol.later)] * _N_KINDS for place in places])
        self._derivable = np.array([_lengths_in_kinds(place.symbol.later) for place in places])
        # The cost of a string of each length behind each place: [length, place, kind].
        self._after = np.zeros((_N_STEPS + 1, len(places), _N_KINDS), np.float32)
        self._begin = self._follow = np.zeros((0, 0, 0), np.float32)

    def check(self) -> None:
        """Raise `InvalidGrammar` if some string takes more than `MAX_DERIVATIONS` steps."""
        # llama.cpp prepares the symbols behind each possible one before it knows whether that one matches. It compares
        # every prepared symbol with every other.
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
                    f"{title_of(owner)} can derive {n_steps} characters in more than "
                    f"{MAX_DERIVATIONS} steps: too many alternatives or repetitions match the same characters"
                )

    def _sum_behind(self, symbols: _Counts) -> _Counts:
        """For each place, the sum over the symbols that can come behind it. Fills in the `symbols` of references."""
        self._compute_begin(symbols)
        rest = self._compute_rest(symbols)
        self._compute_follow(rest)
        rest += self._follow[self._owners] * self._rest_is_nullable[:, None, None]
        return rest

    def _cost_of_literals(self, n_steps: int, work: _Counts) -> _Counts:
        """The cost of the strings of `n_steps` characters that begin with each literal: [place, kind]."""
        lengths = self._lengths
        left = np.maximum(n_steps - lengths, 0)
        after = np.take_along_axis(self._after, left[None], axis=0)[0]
        whole = (self._derivable == lengths) & (lengths <= n_steps)
        cost: _Counts = np.where(whole, lengths + work + after, np.minimum(self._derivable, n_steps)).astype(np.float32)
        return cost

    def _compute_begin(self, symbols: _Counts) -> None:
        """Fill in `_begin`, and the symbols at beginnings that refer to rules."""
        self._begin = np.zeros((len(self._callers), *symbols.shape[1:]), np.float32)
        for rule, begin, end in self._sequences:  # inner rules come first
            for index in range(begin, end):
                target = self._targets[index]
                if target >= 0:
                    np.multiply(self._begin[target], self._times[index], out=symbols[index])
                self._begin[rule] += symbols[index]
                if not self._is_nullable[index]:
                    break

    def _compute_rest(self, symbols: _Counts) -> _Counts:
        """For each place, the sum over the symbols that can come behind it before its rule ends."""
        rest = np.zeros_like(symbols)
        for _, begin, end in self._sequences:
            suffix: _Counts | None = None
            for index in range(end - 1, begin - 1, -1):
                target = self._targets[index]
                if target >= 0:
                    np.multiply(self._begin[target], self._times[index], out=symbols[index])
                if suffix is not None:
                    rest[index] = suffix
                symbol = self._places[index].symbol
                if symbol.maximum != 1:
                    if symbol.minimum == symbol.maximum:
                        np.maximum(rest[index], symbols[index], out=rest[index])
                    else:
                        rest[index] += symbols[index]
                suffix = symbols[index] if suffix is None or not self._is_nullable[index] else suffix + symbols[index]
        return rest

    def _compute_follow(self, rest: _Counts) -> None:
        """Fill in `_follow`: what can come behind each rule at the worst of its uses."""
        self._follow = np.zeros_like(self._begin)
        for _ in range(_ROUNDS):
            for rule in self._owners_first:
                for index in self._callers[rule]:
                    behind = rest[index]
                    if self._rest_is_nullable[index]:
                        behind = behind + self._follow[self._owners[index]]
                    np.maximum(self._follow[rule], behind, out=self._follow[rule])


def _lengths_in_kinds(later: bytearray) -> list[int]:
    """For each kind of string, how many characters of a literal are such a string."""
    if not later:
        return [1] * _N_KINDS
    inside = _KINDS[:, np.frombuffer(later, np.uint8)]
    return [1 + (len(later) if row.all() else int(row.argmin())) for row in inside]
