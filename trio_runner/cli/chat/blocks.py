"""Cuts Markdown that is still being written into blocks, so that each can be shown for good once it is complete.

A block is what stands at the outer level of the text: a paragraph, a heading, a list, a table, a quote, code. The same
parser that renders them tells where one ends. In CommonMark no later line changes a block that another one follows. So
every block is complete except the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

MAX_BLOCK_LINES: Final = 100
MAX_BLOCK_CHARACTERS: Final = 16384
"""An open block that is larger is cut, so that it takes little time to look at it again and again."""
MAX_TAIL_CHARACTERS: Final = 4096
"""Characters that `BlockReader.tail` returns at most, the opening lines of code or a table aside."""


def make_parser() -> MarkdownIt:
    """A parser of the Markdown that models write: without HTML, so that what is in angle brackets is text."""
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


_BLOCK_PARSER: Final = make_parser().disable(["inline"])
"""Finds blocks and does not look into them."""


@dataclass(frozen=True, slots=True)
class Block:
    """A complete block, with the empty lines around it. One that `continues` is a piece of the block before it, and
    stands close to it."""

    text: str
    continues: bool = False


class BlockReader:
    """Takes text as it is written and gives the blocks that are complete."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        """The complete lines of the open block, and what has not been looked at."""
        self._partial: list[str] = []
        """The pieces of the line after those."""
        self._frame = _Frame()
        """What is around the lines of the open block."""
        self._n_seen = 0
        """The lines when they were looked at last."""
        self._continued: _Frame | None = None
        """The frame of the block that the open block continues, if it continues one."""

    def push(self, text: str) -> None:
        """Take more text. The cost is linear in it."""
        first, *others = text.split("\n")
        self._partial.append(first)
        for piece in others:
            self._lines.append("".join(self._partial))
            self._partial = [piece]

    def take(self) -> list[Block]:
        """The blocks that have been completed since the last call."""
        if len(self._lines) == self._n_seen:
            return []
        starts = self._find_starts()
        blocks = [block for start, stop in pairwise(starts) for block in self._block(self._lines[start:stop])]
        if starts:
            del self._lines[: starts[-1]]
        blocks += self._cut()
        self._n_seen = len(self._lines)
        return blocks

    def flush(self) -> list[Block]:
        """The last blocks, now that no text comes any more."""
        self._lines.append("".join(self._partial))
        self._partial = []
        blocks = self.take()
        blocks += self._block(self._lines)
        self._lines, self._frame, self._n_seen = [], _Frame(), 0
        return blocks

    def tail(self, max_lines: int) -> str:
        """The end of the open block, after `take`: its last lines, and what there is of the next one.

        Code and tables begin with the lines that make them so.
        """
        partial = "".join(self._partial)[-MAX_TAIL_CHARACTERS:]
        lines = [*self._lines[-max_lines:], *([partial] if partial else [])][-max_lines:]
        n_characters = sum(len(line) + 1 for line in lines)
        while len(lines) > 1 and n_characters > MAX_TAIL_CHARACTERS:
            n_characters -= len(lines.pop(0)) + 1
        n_hidden = len(self._lines) + bool(partial) - len(lines)
        return "\n".join([*self._frame.opening[:n_hidden], *lines])

    def _find_starts(self) -> list[int]:
        """The lines at which blocks begin, the first of them 0."""
        tokens = _BLOCK_PARSER.parse("\n".join(self._lines))
        outer = [token for token in tokens if token.level == 0 and token.map is not None and token.nesting >= 0]
        self._frame = _frame_of(outer[-1], self._lines) if outer else _Frame()
        return [0, *(token.map[0] for token in outer[1:] if token.map is not None)]

    def _cut(self) -> list[Block]:
        """Complete the open block if it is too large, and begin another that continues it."""
        frame, lines = self._frame, self._lines
        if len(lines) <= MAX_BLOCK_LINES and sum(map(len, lines)) <= MAX_BLOCK_CHARACTERS:
            return []
        if len(lines) <= len(frame.opening):
            return []
        if frame.is_closed_by(lines[-1]):
            self._lines = []
            return self._block(lines)
        blocks = self._block([*lines, *frame.closing])
        self._lines, self._continued = [*frame.opening], frame
        return blocks

    def _block(self, lines: list[str]) -> list[Block]:
        """A block of these lines, if anything is in it."""
        text, continued = "\n".join(lines), self._continued
        self._continued = None
        # A block that was cut at its end leaves nothing but a frame.
        is_empty = not text.strip() or (continued is not None and text.strip("\n") in continued.empty_texts)
        return [] if is_empty else [Block(text, continues=continued is not None)]


@dataclass(frozen=True, slots=True)
class _Frame:
    opening: tuple[str, ...] = ()
    """The lines that make a block code or a table."""
    closing: tuple[str, ...] = ()
    """The line that ends it, if it is code."""

    @property
    def empty_texts(self) -> tuple[str, str]:
        return "\n".join(self.opening), "\n".join((*self.opening, *self.closing))

    def is_closed_by(self, line: str) -> bool:
        """Whether the block ends with this line."""
        mark = line.strip()
        return any(mark.startswith(end) and not mark.strip(end[0]) for end in self.closing)


def _frame_of(block: Token, lines: list[str]) -> _Frame:
    assert block.map is not None
    start = block.map[0]
    if block.type == "fence":
        return _Frame((lines[start],), (block.markup,))
    if block.type == "table_open":
        return _Frame(tuple(lines[start : start + 2]))
    return _Frame()
