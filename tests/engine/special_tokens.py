"""Models that have special tokens before or after a text."""

from __future__ import annotations

SPECIALS: dict[str, dict[str, object]] = {
    "none": {},
    "before": {"token_bos": 2, "adds_bos": True},
    "after": {"token_eos": 3, "adds_eos": True},
    "around": {"token_bos": 2, "adds_bos": True, "token_sep": 4, "adds_sep": True},
    "all": {"token_bos": 2, "adds_bos": True, "token_eos": 3, "adds_eos": True, "token_sep": 4, "adds_sep": True},
}


def around(text: bytes, special: str) -> list[int]:
    """The tokens of a text and what stands around it."""
    begin = {"before": [2], "around": [2], "all": [2]}.get(special, [])
    end = {"after": [3], "around": [4], "all": [3, 4]}.get(special, [])
    return [*begin, *text, *end]
