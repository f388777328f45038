"""Bound the ways of deriving the next character: at the beginning of a rule, and in loops side by side."""

from __future__ import annotations

from typing import Final, TypeAlias

from trio_runner.core.grammar.rules import OTHER, Grammar, Symbols, beginning_of, is_nullable, title_of
from trio_runner.errors import InvalidGrammar

MAX_BEGINNINGS: Final = 1024
"""Ways in which one rule can begin."""
MAX_LOOPS: Final = 6
"""Unbounded repetitions in a row that the same character can continue."""

_Loops: TypeAlias = dict[int, int]
"""How many unbounded repetitions could match a character next, by the number of its bit."""


def check_beginnings(grammar: Grammar, nullable: set[str], inner_first: list[str]) -> None:
    """Raise `InvalidGrammar` if a bound is exceeded. `inner_first` is the order of `order_inner_first`."""
    first: dict[str, int] = {}
    beginnings: dict[str, int] = {}
    loops: dict[str, _Loops] = {}
    for name in inner_first:
        first[name] = 0
        beginnings[name] = sum(
            all(is_nullable(symbol, nullable) for symbol in symbols) for symbols in grammar.rules[name]
        )
        loops[name] = {}
        for sequence in grammar.rules[name]:
            beginning = list(beginning_of(sequence, nullable))
            for symbol in beginning:
                first[name] |= symbol.first if symbol.rule is None else first[symbol.rule]
                times = symbol.maximum or 1 if symbol.rule in nullable else 1
                beginnings[name] += times * (1 if symbol.rule is None else beginnings[symbol.rule])
            # Loops of different alternatives do not multiply. Loops that follow one another do.
            for bit, count in _live_loops(beginning, nullable, first, loops)[-1].items():
                loops[name][bit] = max(count, loops[name].get(bit, 0))
        if beginnings[name] > MAX_BEGINNINGS:
            raise InvalidGrammar(f"{title_of(name)} can begin in more than {MAX_BEGINNINGS} ways")
    for name, alternatives in grammar.rules.items():
        for sequence in alternatives:
            for live in _live_loops(sequence, nullable, first, loops):
                if max(live.values(), default=0) > MAX_LOOPS:
                    raise InvalidGrammar(
                        f"{title_of(name)} has more than {MAX_LOOPS} unbounded repetitions in a row for one character"
                    )


def _live_loops(sequence: Symbols, nullable: set[str], first: dict[str, int], loops: dict[str, _Loops]) -> list[_Loops]:
    """The loops that can be reached: from the end of the sequence, then from before each symbol, the last one first."""
    live: _Loops = {}
    lives = [live]
    for symbol in reversed(sequence):
        live = dict(live) if is_nullable(symbol, nullable) else {}
        if symbol.rule is not None:
            for bit, count in loops[symbol.rule].items():
                live[bit] = live.get(bit, 0) + count
        if symbol.maximum is None:
            mask = symbol.first if symbol.rule is None else first[symbol.rule]
            for bit in range(OTHER + 1):
                if mask >> bit & 1:
                    live[bit] = live.get(bit, 0) + 1
        lives.append(live)
    return lives
