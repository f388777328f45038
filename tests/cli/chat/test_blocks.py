"""Markdown cut into blocks while it is written."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.cli.chat.blocks import MAX_BLOCK_LINES, MAX_TAIL_CHARACTERS, Block, BlockReader, make_parser

CASES = [
    ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
    ("# title\ntext", ["# title", "text"]),
    ("text\n# title\n", ["text", "# title"]),
    ("title\n---\ntext\n", ["title\n---", "text"]),
    ("```py\na\n\nb\n```\ntext", ["```py\na\n\nb\n```", "text"]),
    ("text\n```\na\n```\n", ["text", "```\na\n```"]),
    ("```\nopen", ["```\nopen"]),
    ("- a\n- b\n\n- c\n\n  more of c\n\nafter", ["- a\n- b\n\n- c\n\n  more of c", "after"]),
    ("1. a\n\n   ```\n\n   x\n   ```\n2. b\n\n\nafter", ["1. a\n\n   ```\n\n   x\n   ```\n2. b", "after"]),
    ("text:\n- a\n- b\n\nafter", ["text:", "- a\n- b", "after"]),
    ("> a\n>\n> b\n\nafter", ["> a\n>\n> b", "after"]),
    ("| a | b |\n|---|---|\n| 1 | 2 |\n\nafter", ["| a | b |\n|---|---|\n| 1 | 2 |", "after"]),
    ("    code\n\nafter", ["    code", "after"]),
    ("<div>\n\ntext", ["<div>", "text"]),
    ("\n\n\n", []),
]


def read(pieces: list[str]) -> list[Block]:
    reader = BlockReader()
    blocks = []
    for piece in pieces:
        reader.push(piece)
        blocks += reader.take()
    return [*blocks, *reader.flush()]


@pytest.mark.parametrize(("text", "blocks"), CASES)
def test_blocks(text: str, blocks: list[str]) -> None:
    assert [block.text.strip("\n") for block in read([text])] == blocks
    assert [block.text.strip("\n") for block in read([*text])] == blocks


LINES = st.sampled_from(
    [
        *("", "", "text", "- a", "  more", "1. b", "2. c", "```", "```py", "~~~", "  ```", "   ```", "# title", "---"),
        *(
            "***",
            "> quote",
            "| a | b |",
            "|---|---|",
            "    code",
            "- ```",
            "- - x",
            "\tx",
            "===",
            "`x`",
            "  - d",
            "<b>",
        ),
    ]
)


@given(st.lists(LINES, max_size=12))
def test_blocks_alone_mean_what_the_whole_text_means(lines: list[str]) -> None:
    text = "\n".join(lines)
    parser = make_parser()
    blocks = read([text])
    apart = "".join(parser.render(block.text) for block in blocks)
    assert without_last_lines(apart) == without_last_lines(parser.render(text))
    assert "\n".join(block.text for block in blocks) == text or not text.strip()


def without_last_lines(html: str) -> str:
    """Without empty lines at the end of code that nothing ends."""
    return re.sub(r"(<code[^>]*>)?\n*</code>", "</code>", html)


@given(st.lists(LINES, max_size=12), st.lists(st.integers(0, 80), max_size=6))
def test_cuts_change_nothing(lines: list[str], places: list[int]) -> None:
    text = "\n".join(lines)
    cuts = [0, *sorted(place for place in places if place < len(text)), len(text)]
    assert read([text[start:stop] for start, stop in pairwise(cuts)]) == read([text])


def test_long_code_comes_in_pieces() -> None:
    lines = [f"line {number}" for number in range(3 * MAX_BLOCK_LINES)]
    blocks = read(["```py\n", *(f"{line}\n" for line in lines), "```\n"])
    assert [block.continues for block in blocks] == [False, True, True]
    assert all(block.text.startswith("```py\n") and block.text.endswith("\n```") for block in blocks)
    assert [line for block in blocks for line in block.text.split("\n")[1:-1]] == lines


def test_nothing_is_left_of_code_that_is_cut_at_its_end() -> None:
    lines = [f"line {number}\n" for number in range(MAX_BLOCK_LINES)]
    blocks = read(["```py\n", *lines, "```\n", "text"])
    assert [block.text.count("\n") for block in blocks] == [MAX_BLOCK_LINES + 1, 0]


@pytest.mark.parametrize("opening", ["", "| a | b |\n|---|---|\n"])
def test_other_long_blocks_come_in_pieces(opening: str) -> None:
    lines = [f"{number} | item" for number in range(3 * MAX_BLOCK_LINES)]
    blocks = read([opening, *(f"{line}\n" for line in lines)])
    assert [block.continues for block in blocks] == [False, True, True, *([True] if opening else [])]
    assert all(block.text.startswith(opening) for block in blocks)
    assert "\n".join(block.text.removeprefix(opening) for block in blocks).strip() == "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "n_lines", "tail"),
    [
        ("one\n\ntwo\nthr", 9, "two\nthr"),
        ("one\ntwo\nthr", 2, "two\nthr"),
        ("```py\none\ntwo\nthr", 2, "```py\ntwo\nthr"),
        ("```py\none", 2, "```py\none"),
        ("| a |\n|---|\n| 1 |\n| 2 |\n| 3 |\n", 1, "| a |\n|---|\n| 3 |"),
        ("| a |\n|---|\n| 1 |\n", 2, "| a |\n|---|\n| 1 |"),
        ("- a\n\n", 9, "- a\n"),
    ],
)
def test_the_tail_of_the_open_block(text: str, n_lines: int, tail: str) -> None:
    reader = BlockReader()
    reader.push(text)
    reader.take()
    assert reader.tail(n_lines) == tail


@pytest.mark.parametrize("text", ["x" * 100_000, "word\n" * 10_000])
def test_the_tail_is_bounded(text: str) -> None:
    reader = BlockReader()
    reader.push(text)
    assert 0 < len(reader.tail(10**6)) <= MAX_TAIL_CHARACTERS
