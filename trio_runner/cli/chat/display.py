"""Shows answers: as plain text, or as Markdown that is rendered while it is written."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

import trio

from trio_runner.cli.chat.blocks import Block, BlockReader
from trio_runner.cli.chat.painter import Painter, Render, Row
from trio_runner.cli.terminal import TextOutput, printable

REDRAWS_PER_SECOND: Final = 12
PAINTING_SHARE: Final = 0.1
"""The share of the time that painting may take, so that most of it is left for the model."""

_STYLES: Final = {"markdown.code": "bold cyan"}
"""Without rich's black background, which suits dark terminals only."""


class AnswerView(Protocol):
    """One answer on its way to the user."""

    async def say(self, text: str) -> None:
        """Show more of the answer. Raises OSError."""

    async def think(self, text: str) -> None:
        """Show more of what the model thinks."""

    def wait(self, doing: str) -> None:
        """Show what is being done, until there is text."""


class Display(Protocol):
    def answer(self) -> AbstractAsyncContextManager[AnswerView]:
        """Show an answer for the length of the block. After it, the cursor is at the start of a row."""


class PlainDisplay:
    """Writes the text of answers and nothing else, each with a line break at its end."""

    def __init__(self, descriptor: int) -> None:
        self._output = TextOutput(descriptor)
        self._is_terminal = os.isatty(descriptor)

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[AnswerView]:
        view = _PlainView(self._output, is_terminal=self._is_terminal)
        yield view
        if not view.is_at_start:
            await self._output.write("\n")


class _PlainView:
    def __init__(self, output: TextOutput, *, is_terminal: bool) -> None:
        self._output = output
        self._is_terminal = is_terminal
        self.is_at_start = True

    async def say(self, text: str) -> None:
        await self._output.write(printable(text) if self._is_terminal else text)
        self.is_at_start = text.endswith("\n")

    async def think(self, text: str) -> None:
        """Thoughts are not part of the answer."""

    def wait(self, doing: str) -> None:
        """A program that reads the text wants no other."""


class MarkdownDisplay:
    """Renders answers on a terminal while they are written, at most `REDRAWS_PER_SECOND` times a second, and less often
    if that would take more than `PAINTING_SHARE` of the time."""

    def __init__(self, descriptor: int, render: Render) -> None:
        self._descriptor = descriptor
        self._render = render

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[AnswerView]:
        view = _MarkdownView(self._descriptor, Painter(self._render))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.paint)
            yield view
            view.end()


class _MarkdownView:
    def __init__(self, descriptor: int, painter: Painter) -> None:
        self._descriptor = descriptor
        self._output = TextOutput(descriptor)
        self._painter = painter
        self._reader = BlockReader()
        self._blocks: list[Block] = []
        self._status = ""
        self._is_thinking = self._has_text = False
        self._changed = trio.Event()
        self._ended = trio.Event()

    async def say(self, text: str) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self._blocks += self._reader.flush()
        self._add(text)

    async def think(self, text: str) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            self._blocks += self._reader.flush()
            text = f"> {text}"
        self._add(text.replace("\n", "\n> "))  # shown as a quote

    def wait(self, doing: str) -> None:
        self._status = doing
        self._changed.set()

    def end(self) -> None:
        """No text comes any more: paint the last frame, and an empty row after it."""
        self._ended.set()
        self._changed.set()

    async def paint(self) -> None:
        """Paint frames until the answer has ended and all of it is on the terminal. Raises OSError."""
        while not self._ended.is_set():
            await self._changed.wait()
            self._changed = trio.Event()
            begin = trio.current_time()
            if not self._ended.is_set():
                await self._paint_frame()
            seconds = trio.current_time() - begin
            with trio.move_on_after(max(1 / REDRAWS_PER_SECOND, seconds / PAINTING_SHARE)):
                await self._ended.wait()
        self._blocks += self._reader.flush()
        self._status = ""
        await self._paint_frame()
        if self._has_text:
            await self._output.write("\n")

    def _add(self, text: str) -> None:
        self._status = ""
        self._has_text = True
        self._reader.push(printable(text))
        self._changed.set()

    async def _paint_frame(self) -> None:
        width, height = _size(self._descriptor)
        blocks, self._blocks = [*self._blocks, *self._reader.take()], []
        rest: list[Row] | str = self._reader.tail(height)
        if self._status and not rest:
            rest = [Row(f"\x1b[2m{self._status[: width - 1]}\x1b[0m", len(self._status[: width - 1]))]
        await self._output.write(self._painter.frame(blocks, rest, width=width, height=height))


def _size(descriptor: int) -> tuple[int, int]:
    """The columns and rows of a terminal; those of a VT100 if it does not say."""
    try:
        width, height = os.get_terminal_size(descriptor)
    except OSError:
        width, height = 0, 0
    return width or 80, height or 24


def make_display(*, plain: bool) -> Display:
    """What suits stdout: Markdown on a terminal, unless `plain`."""
    descriptor = sys.stdout.fileno()
    if plain or not os.isatty(descriptor) or os.environ.get("TERM") == "dumb":
        return PlainDisplay(descriptor)
    from rich.console import Console
    from rich.theme import Theme

    from trio_runner.cli.chat.markdown import MarkdownRenderer

    return MarkdownDisplay(descriptor, MarkdownRenderer(Console(theme=Theme(_STYLES))))
