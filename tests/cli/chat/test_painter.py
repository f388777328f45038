"""Frames of an answer, shown by a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.cli.chat.screen import Screen
from trio_runner.cli.chat.blocks import BlockReader
from trio_runner.cli.chat.markdown import MarkdownRenderer
from trio_runner.cli.chat.painter import Painter, Row

WIDTH, HEIGHT = 40, 8
RENDER = MarkdownRenderer(Console(force_terminal=True, color_system="256", width=WIDTH))


def shown(pieces: list[str], *, every: int = 1, width: int = WIDTH) -> Screen:
    """The screen after an answer that was written in these pieces, with a frame after each `every` of them."""
    reader, painter, screen = BlockReader(), Painter(RENDER), Screen(width, HEIGHT)
    for number, piece in enumerate(pieces):
        reader.push(piece)
        if number % every == 0:
            blocks = reader.take()
            screen.feed(painter.frame(blocks, reader.tail(HEIGHT), width=width, height=HEIGHT))
    screen.feed(painter.frame(reader.flush(), "", width=width, height=HEIGHT))
    return screen


TEXT = """# Title

A paragraph of **several** words that is longer than the terminal is wide, with `code` and *more* in it.

1. one
2. two

   ```python
   def f():
       return 1
   ```

```c
int main(void) {
    return 0;
}
```

| name | value |
|------|-------|
| one  | 1     |

> a quote
"""

SHOWN = """Title

A paragraph of several words that is
longer than the terminal is wide, with
code and more in it.

 1 one
 2 two
   def f():
       return 1

int main(void) {
    return 0;
}

 name  value
 ───────────
 one   1

▌ a quote"""


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_an_answer_ends_up_on_the_screen_once(every: int) -> None:
    assert shown([*TEXT], every=every).text == SHOWN


def test_what_is_not_open_is_not_written_again() -> None:
    reader, painter = BlockReader(), Painter(RENDER)
    frames = []
    for piece in ("first words\n\n", "second", " words", "\nthird"):
        reader.push(piece)
        frames.append(painter.frame(reader.take(), reader.tail(HEIGHT), width=WIDTH, height=HEIGHT))
    assert ["first" in frame for frame in frames] == [True, False, False, False]
    assert painter.frame(reader.take(), reader.tail(HEIGHT), width=WIDTH, height=HEIGHT) == ""


LINES = st.sampled_from(
    [
        "word " * 12,
        "- item",
        "",
        "```py",
        "x = 1",
        "```",
        "# title",
        "| a | b |",
        "|---|---|",
        "> quote",
        "wörd 漢字",
        "é",
    ]
)


@given(st.lists(LINES, max_size=20), st.integers(1, 50))
def test_frames_add_up_to_the_whole_answer(lines: list[str], every: int) -> None:
    """Whenever frames are painted, the screen ends up as if there had been only the last one."""
    text = "\n".join(lines)
    assert shown([*text], every=every).text == shown([text], every=1).text


def test_an_open_block_that_is_higher_than_the_terminal_shows_its_end() -> None:
    lines = [f"line {number}" for number in range(30)]
    reader, painter, screen = BlockReader(), Painter(RENDER), Screen(WIDTH, HEIGHT)
    reader.push("```\n")
    for line in lines:
        reader.push(f"{line}\n")
        screen.feed(painter.frame(reader.take(), reader.tail(HEIGHT), width=WIDTH, height=HEIGHT))
        assert screen.rows[-1] == line
        assert len(screen.rows) < HEIGHT
    screen.feed(painter.frame(reader.flush(), "", width=WIDTH, height=HEIGHT))
    assert screen.text.split("\n") == lines


def test_a_status_gives_way_to_the_answer() -> None:
    painter, screen = Painter(RENDER), Screen(WIDTH, HEIGHT)
    screen.feed(painter.frame([], [Row("reading", 7)], width=WIDTH, height=HEIGHT))
    assert screen.text == "reading"
    screen.feed(painter.frame([], "answer", width=WIDTH, height=HEIGHT))
    assert screen.text == "answer"
    screen.feed(painter.frame([], "", width=WIDTH, height=HEIGHT))
    assert screen.text == ""


def test_a_terminal_that_became_narrow() -> None:
    """It has wrapped the rows that it shows, so they take more rows than before."""
    painter = Painter(RENDER)
    painter.frame([], "word " * 7, width=WIDTH, height=HEIGHT)
    frame = painter.frame([], "word " * 8, width=WIDTH // 2, height=HEIGHT)
    assert "\x1b[1A" in frame


@pytest.mark.parametrize(
    "text", ["<div>text</div>", "a <b>text</b> c", "<!-- text -->", "<think>\ntext\n</think>", "[text](http://x.org)"]
)
def test_nothing_that_was_said_is_hidden(text: str) -> None:
    screen = shown([text])
    for word in text.replace("[", " ").replace("](", " ").replace(")", " ").split():
        assert word in screen.text


def test_a_huge_block_is_shown_as_it_is() -> None:
    text = "[" * 100_000
    assert sum(row.n_columns for row in RENDER(text, WIDTH)) == 100_000
