"""Whether a grammar may be handed to llama.cpp: a scanner for GBNF that measures what the grammar would cost.

A grammar is the most expensive thing that a request can carry. llama.cpp's parser recurses with the nesting, copies
what is repeated, and follows every way of deriving the next character at once. None of that can be interrupted. So the
grammar is read here first, by the same rules, and refused if one of these is out of bounds:

    nesting       brackets inside brackets                                                      scanner.py
    rules         names that are defined                                                        scanner.py
    repetition    counts in braces, multiplied where they follow each other                     scanner.py
    elements      characters, classes and references after repetitions are written out          scanner.py
    chain         rules that begin with rules that begin with rules ...                         rules.py
    beginnings    ways in which the next character of one rule can be derived                   beginnings.py
    loops         unbounded repetitions side by side that the same character can continue       beginnings.py
    derivations   steps to try every way of deriving the characters of one token                derivations.py
    symbols       literals, classes and references before repetitions are written out           derivations.py
    positions     places in the grammar, times the characters that it tells apart               derivations.py

Ordinary grammars are far inside the bounds: JSON, programming languages, forms with hundreds of alternatives. A grammar
that passes can still be costly over a whole vocabulary or in the long run. The native code stops that by its deadline,
which it reads between candidates. That is why the cost of one candidate is bounded here.
"""

from __future__ import annotations

from trio_runner.core.grammar.beginnings import check_beginnings
from trio_runner.core.grammar.copies import with_own_copies
from trio_runner.core.grammar.derivations import check_derivations
from trio_runner.core.grammar.rules import check_references, find_nullable, order_inner_first
from trio_runner.core.grammar.scanner import Scanner
from trio_runner.errors import InvalidGrammar
from trio_runner.sampling import MAX_GRAMMAR_BYTES


def check_grammar(text: str) -> None:
    """Raise `InvalidGrammar` if `text` does not parse, has no rule `root`, or exceeds a bound above."""
    n_bytes = len(text.encode(errors="surrogatepass"))
    if n_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidGrammar(f"the grammar has {n_bytes} bytes, but at most {MAX_GRAMMAR_BYTES} are allowed")
    grammar = Scanner(text).scan()
    check_references(grammar)
    nullable = find_nullable(grammar)
    check_beginnings(grammar, nullable, order_inner_first(grammar, nullable))
    check_derivations(with_own_copies(grammar))
