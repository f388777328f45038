"""Copy small rules, so that each use of one has a rule of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from trio_runner.core.grammar.rules import Grammar, Symbols

_MAX_COPIED: Final = 24
"""The most symbols and alternatives of a rule that is copied."""
_MAX_COPIES: Final = 1000
"""Copies in all."""


def with_own_copies(grammar: Grammar) -> Grammar:
    """The same grammar with a copy of each small rule for each of its uses.

    The cost of what follows a rule is that of its worst use, and counts again after every character. For a rule such as
    `ws`, which is used everywhere, the result would be far too high.
    """
    copies = Grammar()
    names: list[tuple[str, str, dict[str, str]]] = [("root", "root", {})]
    sizes: dict[str, int] = {}
    shared = {"root"}
    n_copies = 0
    while names:
        name, copy, outer = names.pop()
        outer = outer | {name: copy} if outer or name not in shared else {}
        alternatives: list[Symbols] = []
        for sequence in grammar.rules[name]:
            symbols: Symbols = []
            for symbol in sequence:
                if symbol.rule is not None:
                    if symbol.rule in outer:
                        target = outer[symbol.rule]
                    elif (
                        symbol.rule not in shared
                        and (outer or n_copies < _MAX_COPIES)
                        and _size(grammar, symbol.rule, sizes) <= _MAX_COPIED
                    ):
                        n_copies += 1
                        target = f"{symbol.rule}\n{n_copies}"  # no name that a rule can have
                        names.append((symbol.rule, target, outer))
                    else:
                        target = symbol.rule
                        if target not in shared:
                            shared.add(target)
                            names.append((target, target, {}))
                    symbol = replace(symbol, rule=target)
                symbols.append(symbol)
            alternatives.append(symbols)
        copies.rules[copy] = alternatives
    return copies


def _size(grammar: Grammar, name: str, sizes: dict[str, int]) -> int:
    """The symbols and alternatives of a rule and of all rules that it refers to, counted up to the bound of a copy."""
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
                    (symbol.rule, outer | {symbol.rule})
                    for symbol in sequence
                    if symbol.rule is not None and symbol.rule not in outer
                ]
        sizes[name] = size
    return sizes[name]
