"""Bytes of tokens in, whole characters out."""

from __future__ import annotations

import codecs


class Utf8Assembler:
    """Turns bytes into text, and holds back the bytes of a character that is not complete: a token may end in the
    middle of one.

    Bytes that are part of no character become U+FFFD, one for each maximal subpart as the Unicode standard recommends
    (section 3.9, "U+FFFD Substitution of Maximal Subparts"). The joined text depends only on the bytes, never on how
    they were cut into pieces.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """Take more bytes. Returns the characters that they complete."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End the text. Half a character is dropped, for it never was text; returns the empty string."""
        self._decoder.reset()
        return ""
