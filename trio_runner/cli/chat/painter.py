"""Paints an answer that is still being written: what to write to a terminal so that it shows the next frame.

Rows that are complete are written once and scroll away. Below them is the live region: the rows of the open block,
which change. Of these, only the rows from the first that has changed are written again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from trio_runner.cli.chat.blocks import Block

_BEGIN: Final = "\x1b[?2026h"
_END: Final = "\x1b[?2026l"
"""Around a frame: "synchronized output", with which a terminal shows the whole frame at once. Others ignore it."""
_ERASE_BELOW: Final = "\x1b[J"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of text with escape sequences for its colours, and the columns that it takes."""

    text: str
    n_columns: int


EMPTY: Final = Row("", 0)

Render: TypeAlias = Callable[[str, int], Sequence[Row]]
"""Makes rows of Markdown for a number of columns."""


class Painter:
    """Makes the frames of one answer. The cursor must be at the start of an empty row before the first one."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._region: list[Row] = [EMPTY]
        """What the live region shows. The cursor is at the end of its last row."""
        self._needs_gap = False

    def frame(self, blocks: Sequence[Block], rest: Sequence[Row] | str, *, width: int, height: int) -> str:
        """What to write for a frame: "" if nothing has changed.

        `blocks` have been completed since the last frame. `rest` is the open block, as Markdown or as rows. `width` and
        `height` are the columns and rows of the terminal.
        """
        complete: list[Row] = []
        for block in blocks:
            complete += self._with_gap(self._render(block.text, width), block.continues)
        rows = self._render(rest, width) if isinstance(rest, str) else rest
        live = [EMPTY, *rows] if rows and self._needs_gap else [*rows]
        # A row that has left the screen at the top can never be written again.
        live = live[-max(height - 1, 1) :] or [EMPTY]
        return self._write([*complete, *live], live, width)

    def _with_gap(self, rows: Sequence[Row], continues: bool) -> list[Row]:
        needs_gap, self._needs_gap = self._needs_gap and not continues, self._needs_gap or bool(rows)
        return [EMPTY, *rows] if needs_gap and rows else [*rows]

    def _write(self, rows: list[Row], live: list[Row], width: int) -> str:
        old, self._region = self._region, live
        if old == rows:
            return ""
        n_same = 0
        while n_same < min(len(old), len(rows) - 1) and old[n_same] == rows[n_same]:
            n_same += 1
        text = "\n".join(row.text for row in rows[n_same:])
        if n_same == len(old):
            return f"{_BEGIN}\n{text}{_END}"
        # Terminals wrap a row that has become too long for them, so it may take several.
        n_up = sum(max(math.ceil(row.n_columns / width), 1) for row in old[n_same:]) - 1
        up = f"\x1b[{n_up}A" if n_up else ""
        return f"{_BEGIN}\r{up}{_ERASE_BELOW}{text}{_END}"
