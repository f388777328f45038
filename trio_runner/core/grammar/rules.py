"""A grammar as rules, and what follows from the rules alone: which are nullable, and which begin with which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from trio_runner.errors import InvalidGrammar

MAX_CHAIN: Final = 200
"""Rules that begin with rules that begin with rules ..."""

# A set of characters is a number: one bit for each ASCII character, and one bit for all other characters together.
OTHER: Final = 128
N_CHARACTERS: Final = OTHER + 1
ANY: Final = (1 << N_CHARACTERS) - 1


@dataclass(slots=True)
class Symbol:
    """One part of an alternative: a literal, a class of characters, or a reference to a rule."""

    size: int = 0
    """Elements in llama.cpp's form of the grammar, as far as they are written out."""
    first: int = 0
    """The set of characters that it can begin with. 0 for a reference."""
    ranges: tuple[tuple[int, int], ...] = ()
    """The same characters as ranges of code points (first, last + 1), or the excluded ones if `inverted`."""
    inverted: bool = False
    """The symbol matches all characters except those in the ranges."""
    later: bytearray = field(default_factory=bytearray)
    """The characters of a literal after the first, each as the number of its bit."""
    rule: str | None = None
    """The rule that it refers to. None for a literal and for a class of characters."""
    weight: int = 1
    """Rules that another repetition multiplies, as llama.cpp counts them."""
    minimum: int = 1
    """The fewest repetitions."""
    maximum: int | None = 1
    """The most repetitions. None if there is no bound."""


Symbols: TypeAlias = list[Symbol]
"""The symbols of one alternative, in order."""


@dataclass(slots=True)
class Grammar:
    """A grammar that has been read, but not checked."""

    rules: dict[str, list[Symbols]] = field(default_factory=dict)
    """The alternatives of each rule, by its name. A group in brackets is a rule with the name "(number)"."""
    n_defined: int = 0
    """Definitions in the text, groups not included."""
    n_elements: int = 0
    """Elements when all repetitions are written out."""


def check_references(grammar: Grammar) -> None:
    """Raise `InvalidGrammar` if there is no `root`, or a rule that is used is not defined."""
    if "root" not in grammar.rules:
        raise InvalidGrammar("there is no rule named root")
    for alternatives in grammar.rules.values():
        for sequence in alternatives:
            for symbol in sequence:
                if symbol.rule is not None and symbol.rule not in grammar.rules:
                    raise InvalidGrammar(f"the rule {symbol.rule} is not defined")


def find_nullable(grammar: Grammar) -> set[str]:
    """The names of the rules that can derive the empty text."""
    nullable: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name, alternatives in grammar.rules.items():
            if name not in nullable and any(
                all(is_nullable(symbol, nullable) for symbol in symbols) for symbols in alternatives
            ):
                nullable.add(name)
                changed = True
    return nullable


def is_nullable(symbol: Symbol, nullable: set[str]) -> bool:
    return symbol.minimum == 0 or (symbol.rule in nullable if symbol.rule is not None else symbol.size == 0)


def beginning_of(symbols: Symbols, nullable: set[str]) -> Iterator[Symbol]:
    """The symbols that the first character of `symbols` can come from."""
    for symbol in symbols:
        yield symbol
        if not is_nullable(symbol, nullable):
            return


def order_inner_first(grammar: Grammar, nullable: set[str]) -> list[str]:
    """The names of all rules, each after the rules that it can begin with.

    Raises `InvalidGrammar` for left recursion and for chains longer than `MAX_CHAIN`.
    """
    order: list[str] = []
    chain: dict[str, int] = {}  # for each finished rule, the length of the longest chain that it begins
    for start in grammar.rules:
        if start in chain:
            continue
        path = [start]
        pending = [_inner_rules(grammar, start, nullable)]
        on_path = {start}
        while path:
            inner = next(pending[-1], None)
            if inner is None:
                name = path.pop()
                pending.pop()
                on_path.discard(name)
                chain[name] = 1 + max((chain[rule] for rule in _inner_rules(grammar, name, nullable)), default=0)
                if chain[name] > MAX_CHAIN:
                    raise InvalidGrammar(f"more than {MAX_CHAIN} rules begin with one another")
                order.append(name)
            elif inner in on_path:
                raise InvalidGrammar(f"{title_of(inner)} is left-recursive: it can begin with itself")
            elif inner not in chain:
                path.append(inner)
                pending.append(_inner_rules(grammar, inner, nullable))
                on_path.add(inner)
    return order


def _inner_rules(grammar: Grammar, name: str, nullable: set[str]) -> Iterator[str]:
    for sequence in grammar.rules[name]:
        for symbol in beginning_of(sequence, nullable):
            if symbol.rule is not None:
                yield symbol.rule


def title_of(name: str) -> str:
    """What an error calls a rule. Copies have a line break and a number behind their name."""
    return "a group in brackets" if name.startswith("(") else f"the rule {name.partition(chr(10))[0]}"
