"""Regular expressions of JSON schemas, for an engine of another dialect.

JSON Schema means those of JavaScript (ECMA-262). llguidance reads them as Rust's. The two differ in a few places, where
Rust's would allow a text that JavaScript's does not. There, `rust_pattern` writes the same in another way, or refuses.
"""

from __future__ import annotations

import re
from typing import Final

_SPACE: Final = r"\t-\r\x20\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""What both take for white space."""
_REWRITTEN: Final = {".": r"[^\n\r\u2028\u2029]", r"\s": f"[{_SPACE}]", r"\S": r"[^\s\ufeff]"}

_TOKEN: Final = re.compile(
    r"""
      (?P<escape>  \\ (?: x[0-9A-Fa-f]{2} | u[0-9A-Fa-f]{4} | u\{[0-9A-Fa-f]{1,6}\} | [pP](?:\{[\w=^]+\}|\w)
                        | [dDwWsSbBnrtvf] | [^A-Za-z0-9] ))
    | (?P<group>   \( (?: \?: | \?P?<[A-Za-z_]\w*> | \?[ims]+[:)] | \?<?[=!] | (?!\?) ))
    | (?P<class>   \[ (?! \^? \] ) \^? )
    | (?P<other>   [^\\(\[] )
    """,
    re.VERBOSE | re.DOTALL,
)
_IN_CLASS: Final = re.compile(
    r"""
      (?P<escape>  \\ (?: x[0-9A-Fa-f]{2} | u[0-9A-Fa-f]{4} | u\{[0-9A-Fa-f]{1,6}\} | [pP](?:\{[\w=^]+\}|\w)
                        | [dDwWsSnrtvf] | [^A-Za-z0-9] ))
    | (?P<end>     \] )
    | (?P<other>   (?! \[ | && | -- | ~~ ) . )
    """,
    re.VERBOSE | re.DOTALL,
)


def rust_pattern(pattern: str) -> str:
    """A pattern for Rust's engine that matches nothing which `pattern` does not match in JavaScript's.

    Raises ValueError, with the part in question, for what the two read differently.
    """
    written: list[str] = []
    position, in_class = 0, False
    while position < len(pattern):
        token = (_IN_CLASS if in_class else _TOKEN).match(pattern, position)
        if token is None:
            raise ValueError(f"{pattern[position : position + 8]!r} has no meaning that is the same everywhere")
        position = token.end()
        part = token[0]
        if token.lastgroup == "class":
            in_class = True
        elif token.lastgroup == "end":
            in_class = False
        written.append(part if in_class and part == "." else _REWRITTEN.get(part, part))
    return "".join(written)
