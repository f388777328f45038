"""A terminal that keeps what it shows: enough of a VT100 for what this program and prompt_toolkit write."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b(?:\[([?>=]?)([0-9;]*)([A-Za-z@`])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9]|[=>78])")
_BEGINNING = re.compile(r"\x1b(?:\[[?>=]?[0-9;]*|\][^\x07\x1b]*\x1b?|[()])?\Z")


class Screen:
    """`width` columns and `height` rows. Rows that scroll away are kept."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.width, self.height = width, height
        self._rows: list[list[str]] = [[]]
        self._top = self._row = self._column = 0
        self._rest = ""

    @property
    def rows(self) -> list[str]:
        """All rows from the first, without blanks at their ends."""
        return ["".join(row).rstrip() for row in self._rows]

    @property
    def text(self) -> str:
        """All rows, without empty ones at the end."""
        return "\n".join(self.rows).rstrip("\n")

    def feed(self, text: str) -> None:
        """Write to the terminal."""
        text, self._rest = self._rest + text, ""
        place = 0
        while place < len(text):
            if text[place] != "\x1b":
                self._put(text[place])
                place += 1
            elif found := _SEQUENCE.match(text, place):
                if found[3]:
                    self._control(found[1], found[2], found[3])
                place = found.end()
            elif _BEGINNING.match(text, place):
                self._rest = text[place:]
                return
            else:
                raise AssertionError(f"an unknown sequence: {text[place : place + 20]!r}")

    def _put(self, character: str) -> None:
        match character:
            case "\n":
                self._column = 0  # as terminals in cooked mode do
                self._down()
            case "\r":
                self._column = 0
            case "\b":
                self._column = max(self._column - 1, 0)
            case "\x07":
                pass
            case _:
                assert character.isprintable() or character == "\t", repr(character)
                if self._column == self.width:
                    self._column = 0
                    self._down()
                row = self._rows[self._row]
                row += " " * (self._column + 1 - len(row))
                row[self._column] = character
                self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._rows):
            self._rows.append([])
        self._top = max(self._top, self._row - self.height + 1)

    def _control(self, private: str, numbers: str, letter: str) -> None:
        n = int(numbers.split(";")[0] or 0)
        match letter:
            case "A":
                assert self._row - max(n, 1) >= self._top, "the cursor would leave the screen"
                self._row -= max(n, 1)
            case "B":
                for _ in range(max(n, 1)):
                    self._down()
            case "C":
                self._column = min(self._column + max(n, 1), self.width - 1)
            case "D":
                self._column = max(min(self._column, self.width - 1) - max(n, 1), 0)
            case "G":
                self._column = max(n, 1) - 1
            case "J":
                assert n == 0, "only what is below the cursor is erased"
                del self._rows[self._row][self._column :]
                del self._rows[self._row + 1 :]
            case "K":
                assert n in (0, 2)
                del self._rows[self._row][self._column if n == 0 else 0 :]
            case "m" | "h" | "l" | "n" | "q":
                pass
            case _:
                raise AssertionError(f"an unknown sequence: {private}{numbers}{letter}")
