"""What check_grammar lets through and what it stops."""

from __future__ import annotations

import time

import pytest

from trio_runner.core.grammar import (
    MAX_BEGINNINGS,
    MAX_CHAIN,
    MAX_LOOPS,
    MAX_NESTING,
    MAX_RULES,
    check_grammar,
)
from trio_runner.errors import InvalidGrammar
from trio_runner.request import MAX_GRAMMAR_BYTES

OLLAMA_JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= ([ \t\n] ws)?
"""

C_LIKE = r"""
root       ::= (declaration)*
declaration ::= type ws identifier "(" parameter? ")" "{" statement* "}"
type       ::= "int" | "float" | "char"
identifier ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter  ::= type ws identifier
statement  ::= ( type ws identifier ws "=" ws expression ";" ) | ( identifier ws "=" ws expression ";" ) |
  ( identifier ws "(" arguments? ")" ";" ) | ( "return" ws expression ";" ) |
  ( "while" "(" condition ")" "{" statement* "}" ) | ( comment )
condition  ::= expression ("<=" | "<" | "==" | "!=" | ">=" | ">") expression
expression ::= term (("+" | "-") term)*
term       ::= factor (("*" | "/") factor)*
factor     ::= identifier | number | unary | "(" expression ")" | identifier "(" arguments? ")"
unary      ::= "-" factor
arguments  ::= expression ("," ws expression)*
number     ::= [0-9]+
comment    ::= "//" [^\n]* "\n"
ws         ::= [ \t\n]+
"""


@pytest.mark.parametrize(
    "text",
    [
        OLLAMA_JSON,
        C_LIKE,
        'root ::= "yes" | "no"',
        'root ::= "yes"\r\n# and a comment\r\n\r\n',
        'root ::= ("a" |\n "b")\nother ::= root',
        "root ::= [a-z]{3} [0-9]{1,} [A-Z]{0,2} [!]{ 2 , 3 }",
        r'root ::= "\x41\u00e9\U0001F642\t\r\n\\\"\[\]\-" [\x00-\x1F\-\]] [^a\]-z-] . [] ""',
        "root ::= <[1]> !<[2]> <think>",
        'root ::= ([a-z]+ " "){1000}',
        "root ::= " + " | ".join(f'"city {index}"' for index in range(1000)),
        "root ::= " + "(" * MAX_NESTING + '"a"' + ")" * MAX_NESTING,
        "root ::= " + " | ".join(f'ws "{index}"' for index in range(100)) + "\nws ::= [ ]*",
        "root ::= [a-c]* [d-f]* [g-i]* [j-l]* [m-o]* [p-r]* [s-u]* [v-z]*",
        "root ::= ws* item (ws* item)*\nws ::= [ ]\nitem ::= [a-z]+",
        'root ::= "" | item root\nitem ::= [a-z] "\\n"',
        'root ::= "Ünïcödé" [äöü]+ [^あ-ん]',
        'root ::= "first"\nroot ::= "second"',
    ],
)
def test_ordinary_grammars_pass(text: str) -> None:
    check_grammar(text)


def chain(n_rules: int, link: str) -> str:
    rules = [f"r{index} ::= " + link.replace("@", f"r{index + 1}") for index in range(n_rules)]
    return "\n".join(["root ::= r0", *rules, f'r{n_rules} ::= "z"'])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no rule named root"),
        ("# nothing", "no rule named root"),
        ('other ::= "a"', "no rule named root"),
        ("root ::= other", "other is not defined"),
        ("root", "expected ::="),
        ("::= x", "name of a rule"),
        ('root ::= "a', "unexpected end"),
        ("root ::= [a", "unexpected end"),
        ("root ::= [a-", "unexpected end"),
        ('root ::= ("a"', r"expected \)"),
        ('root ::= "a")', "end of the line"),
        ('root ::= "a"\n | "b"', "name of a rule"),
        ("root ::= *", "nothing to repeat"),
        ('root ::= "a" | +', "nothing to repeat"),
        ('root ::= "a"{', "expected a number"),
        ('root ::= "a"{2', "expected }"),
        ('root ::= "a"{2,1}', "fewer than the least"),
        ('root ::= "a"{99999999999}', "too large"),
        (r'root ::= "\q"', "unknown escape"),
        (r'root ::= "\x4"', "hexadecimal"),
        ("root ::= <abc", "expected >"),
        ("root ::= !abc", "expected <"),
        ("root ::= <[x]>", "number"),
        ("root ::= <[1>", "number"),
        ('root ::= root "a" | "b"', "left-recursive"),
        ('root ::= a\na ::= b\nb ::= a "x" | "y"', "left-recursive"),
        ('root ::= empty root "a" | "b"\nempty ::= other\nother ::= "x"?', "left-recursive"),
        ("root ::= " + "a" * MAX_GRAMMAR_BYTES, "bytes"),
        ("root ::= " + "(" * 60_000, "nested"),
        ("root ::= " + "(" * (MAX_NESTING + 1) + '"a"' + ")" * (MAX_NESTING + 1), "nested"),
        (chain(MAX_CHAIN + 1, "@"), "begin with one another"),
        (chain(11, '@ "x" | @ "y"'), "begin in more than"),
        (chain(30, '@ "x" | @ "y"'), "begin in more than"),
        ("\n".join(f'r{index} ::= "a"' for index in range(MAX_RULES + 1)), "more than 2000 rules"),
        ('root ::= "' + "a" * 20_000 + '"{2000}', "elements"),
        ('root ::= "a"{2001}', "repetitions"),
        ('root ::= (("a"?){0,100} "b"){100}', "multiply"),
        ('root ::= "a"{100}{100}', "multiply"),
        ("root ::= " + "s " * 20 + "\ns ::= [a-z]* [a-z]* [a-z]*", "unbounded repetitions"),
        ("root ::= " + "[a-z]* " * (MAX_LOOPS + 1), "unbounded repetitions"),
        ('root ::= "x" ' + "s " * 20 + "\ns ::= t\nt ::= [a-z]* [a-z]*", "unbounded repetitions"),
        ("root ::= " + " | ".join(f'"{index}"' for index in range(MAX_BEGINNINGS + 1)), "begin in more than"),
    ],
)
def test_bad_and_costly_grammars_are_refused_at_once(text: str, match: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidGrammar, match=match) as error:
        check_grammar(text)
    assert time.process_time() - started < 1.0
    assert error.value.param == "grammar"


def test_errors_say_where() -> None:
    with pytest.raises(InvalidGrammar, match="line 3, column 7"):
        check_grammar("root ::= a\n\na ::= {")


def test_the_largest_grammar_is_read_quickly() -> None:
    rule = 'r{0} ::= "a" r{1} [a-z]* ("b" | [^c])+ r{1}?\n'
    n_rules = MAX_GRAMMAR_BYTES // 60
    text = "root ::= r0\n" + "".join(rule.format(index, index + 1) for index in range(n_rules)) + f'r{n_rules} ::= "z"'
    assert len(text) < MAX_GRAMMAR_BYTES
    started = time.process_time()
    check_grammar(text)
    assert time.process_time() - started < 2.0
