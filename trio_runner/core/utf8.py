"""Bytes of tokens in, whole characters out."""

from __future__ import annotations

import codecs


class Utf8Assembler:
    """Holds back the bytes of a character that is not complete yet: one token may end in the middle of one.

    Bytes that no character can start or continue with become U+FFFD, one for each maximal such run as the Unicode
    standard recommends (section 3.9, "U+FFFD Substitution of Maximal Subparts"). What comes out, joined, depends only
    on the bytes, never on how they were cut into pieces.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end: half a character is dropped, as it was never part of the text."""
        self._decoder.reset()
        return ""
