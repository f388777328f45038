"""What `check_grammar` accepts and what it refuses."""

from __future__ import annotations

import time

import pytest

from trio_runner.core.grammar import check_grammar
from trio_runner.core.grammar.beginnings import MAX_BEGINNINGS, MAX_LOOPS
from trio_runner.core.grammar.rules import MAX_CHAIN
from trio_runner.core.grammar.scanner import MAX_NESTING, MAX_RULES
from trio_runner.errors import InvalidGrammar
from trio_runner.sampling import MAX_GRAMMAR_BYTES

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


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""

CHESS = r"""
root    ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move    ::= (pawn | piece | castle) [+#]?
piece   ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn    ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle  ::= "O-O" "-O"?
"""

JAPANESE = """
root        ::= char+ ([ \\t\\n] char+)*
char        ::= hiragana | katakana | punctuation | kanji
hiragana    ::= [ぁ-ゟ]
katakana    ::= [ァ-ヿ]
punctuation ::= [、-〾]
kanji       ::= [一-鿿]
"""

# As converters write it for a JSON schema with optional and additional properties.
SCHEMA = r"""
root ::= "{" space name-kv "," space tags-kv ( "," space ( age-kv age-rest | more-kv ) )? "}" space
age-kv ::= "\"age\"" space ":" space integer
age-rest ::= ( "," space more-kv )?
more-k ::= ["] ( [a] ([g] ([e] char+ | [^"e] char*) | [^"g] char*) | [^"a] char* )? ["] space
more-kv ::= more-k ":" space value ( "," space more-k ":" space value )*
name-kv ::= "\"name\"" space ":" space string
tags-kv ::= "\"tags\"" space ":" space tags
tags ::= "[" space (string ("," space string){0,9})? "]" space
array ::= "[" space ( value ("," space value)* )? "]" space
object ::= "{" space ( string ":" space value ("," space string ":" space value)* )? "}" space
boolean ::= ("true" | "false") space
null ::= "null" space
char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
decimal-part ::= [0-9]{1,16}
integral-part ::= [0] | [1-9] [0-9]{0,15}
integer ::= ("-"? integral-part) space
number ::= ("-"? integral-part) ("." decimal-part)? ([eE] [-+]? integral-part)? space
string ::= "\"" char* "\"" space
value ::= object | array | string | number | boolean | null
space ::= | " " | "\n"{1,2} [ \t]{0,20}
"""

ADJACENT_SPACE = r"""
root   ::= "{" ws pairs? ws "}" ws
pairs  ::= pair ("," ws pair)*
pair   ::= string ws ":" ws value ws
value  ::= string | number | root | "[" ws (value ws ("," ws value ws)*)? "]" ws
string ::= "\"" [^"]* "\""
number ::= "-"? [0-9]+
ws     ::= ([ \t\n] ws)?
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
        "root ::= ws* item (ws+ item)*\nws ::= [ ]\nitem ::= [a-z]+",
        ARITHMETIC,
        CHESS,
        JAPANESE,
        SCHEMA,
        ADJACENT_SPACE,
        "root ::= char+ ([ \\t\\n] char+)*\nchar ::= [a-zA-Z] | [0-9] | [!\"#$%&'()*+,-./:;<=>?@[\\\\\\]^_`{|}~]",
        'root ::= ([0-9]{4} "-" [0-9]{2} "-" [0-9]{2} "\\n"){1,100}',
        "root ::= letter{5}\nletter ::= " + " | ".join(f'"{letter}"' for letter in "abcdefghijklmnopqrstuvwxyz"),
        'root ::= word (" " word)*\nword ::= ' + " | ".join(f'"{index}word"' for index in range(100)),
        "root ::= " + " | ".join(f'"{chr(0x4E00 + index)}国"' for index in range(1000)),
        'root ::= "" | item root\nitem ::= [a-z] "\\n"',
        'root ::= "Ünïcödé" [äöü]+ [^あ-ん]',
        'root ::= "first"\nroot ::= "second"',
    ],
)
def test_an_ordinary_grammar_is_accepted(text: str) -> None:
    started = time.process_time()
    check_grammar(text)
    assert time.process_time() - started < 2.0


OVERLAPPING = " | ".join(f"[a-{last}]" for last in "zyxwvuts")
INTERNATIONAL = [f'"{letter}"' for letter in "international"]


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
        ("root ::= x x\nx ::= " + "|" * 10_000, "begin in more than"),
        (f'root ::= ({OVERLAPPING}){{5}} "~"', "steps"),
        (f'root ::= x x x x x "~"\nx ::= {OVERLAPPING}', "steps"),
        (f'root ::= "a prefix" (x y){{3}} "~"\nx ::= ({OVERLAPPING})\ny ::= x', "steps"),
        ('root ::= x x x x "~~~"\nx ::= ' + " | ".join(["[a-z]"] * 16), "steps"),
        ('root ::= x x x x "~"\nx ::= ' + " | ".join(f'"{letter}"' for letter in "aaaaaaaaaaaaaaaa"), "steps"),
        ('root ::= x{4} "~"\nx ::= ' + " | ".join(["[ぁ-ゟ]"] * 16), "steps"),
        ("root ::= " + " ".join(f"({' | '.join([character] * 8)})" for character in INTERNATIONAL), "steps"),
        ("root ::= " + "[a-z]? " * 16 + '"~"', "steps"),
        ("root ::= " + "[a-z]{0,4} " * 16 + '"~"', "steps"),
        ('root ::= ([a-z]+)* "~"', "steps"),
        ('root ::= "a" root "x" | "a" root "y" | ""', "steps"),
        ("root ::= x{5}\nx ::= " + " | ".join(f'"{chr(0x4E00 + index)}"' for index in range(1000)), "steps"),
        ("root ::= " + "x " * 30_000 + '\nx ::= "x"', "symbols"),
        ("root ::= " + '("x")' * 12_000, "symbols"),
        ("root ::= " + " ".join(f"[{chr(0x4E00 + index)}]" for index in range(8000)), "positions"),
    ],
)
def test_a_bad_or_costly_grammar_is_refused_at_once(text: str, match: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidGrammar, match=match) as error:
        check_grammar(text)
    assert time.process_time() - started < 1.0
    assert error.value.param == "grammar"


def test_an_error_has_the_line_and_the_column() -> None:
    with pytest.raises(InvalidGrammar, match="line 3, column 7"):
        check_grammar("root ::= a\n\na ::= {")


def test_the_largest_grammar_is_read_quickly() -> None:
    rule = 'r{0} ::= "a" r{1} [b-d]* ("e" | [f-z])+ "," r{1}?\n'
    n_rules = MAX_GRAMMAR_BYTES // 60
    text = "root ::= r0\n" + "".join(rule.format(index, index + 1) for index in range(n_rules)) + f'r{n_rules} ::= "z"'
    assert len(text) < MAX_GRAMMAR_BYTES
    started = time.process_time()
    check_grammar(text)
    assert time.process_time() - started < 2.0
