"""Renders Markdown for a terminal with rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from trio_runner.cli.chat.blocks import make_parser
from trio_runner.cli.chat.painter import Row

_MAX_CHARACTERS: Final = 1 << 16
"""A longer block is shown as it is, because parsers of Markdown can take very long for nonsense."""
_MIN_WIDTH: Final = 20
_COLOR_SYSTEMS: Final = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
}


class MarkdownRenderer:
    """Makes rows of Markdown, in the colours that the terminal of `console` has. Nothing is written to it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._colors = _COLOR_SYSTEMS.get(console.color_system or "")

    def __call__(self, text: str, width: int) -> list[Row]:
        """The rows, for a terminal with `width` columns."""
        # The last column stays free: some terminals move on to the next row after it, and some do not.
        options = self._console.options.update(width=max(width - 1, _MIN_WIDTH), height=None)
        shown = _Markdown(text) if len(text) <= _MAX_CHARACTERS else Text(text)
        rows = [self._row(line) for line in self._console.render_lines(shown, options, pad=False)]
        full = [index for index, row in enumerate(rows) if row.n_columns]
        return rows[full[0] : full[-1] + 1] if full else []

    def _row(self, segments: Sequence[Segment]) -> Row:
        kept = [segment for segment in segments if not segment.control]
        while kept and not _has_visible_blanks(kept[-1]):
            last = kept.pop()
            if text := last.text.rstrip():
                kept.append(Segment(text, last.style))
                break
        texts = [
            segment.text if segment.style is None else segment.style.render(segment.text, color_system=self._colors)
            for segment in kept
        ]
        return Row("".join(texts), sum(segment.cell_length for segment in kept))


def _has_visible_blanks(segment: Segment) -> bool:
    style = segment.style
    if style is None:
        return False
    has_background = style.bgcolor is not None and not style.bgcolor.is_default
    return has_background or bool(style.underline) or bool(style.reverse)


class _CodeBlock(CodeBlock):
    """Code without a frame or a background, so that it can be copied, in the terminal's own colours."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True
        )


class _Heading(Heading):
    """A heading at the left, like everything else."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Markdown(Markdown):
    """Markdown without HTML: what a model writes in angle brackets is text, which rich would leave out."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "heading_open": _Heading,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = make_parser().parse(text)
