"""The block of thinking at the beginning of an answer, however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.server.dialects.ollama.thinking import (
    KNOWN_TAGS,
    ThinkingSplitter,
    template_variables,
    thinking_style,
)

TAGS = KNOWN_TAGS[0]
TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "<thi", "nk>", ">", " ", "\n", "a", "é", "</think", "think>"])
).map("".join)
"""Texts full of tags and of what might become one."""


def split(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(thinking, rest) of the whole of `text`, found without a splitter."""
    said = text.lstrip()
    if not opened:
        if not said.startswith(TAGS.opening):
            return "", text
        said = said.removeprefix(TAGS.opening).lstrip()
    thinking, _, rest = said.partition(TAGS.closing)
    return thinking, rest.lstrip()


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(TEXTS, st.lists(st.integers(0, 1000)), st.booleans())
def test_the_pieces_make_no_difference(text: str, cuts: list[int], opened: bool) -> None:
    splitter = ThinkingSplitter(TAGS, opened=opened)
    thinking = rest = ""
    for piece in pieces_of(text, cuts):
        more_thinking, more = splitter.add(piece)
        assert not (rest and more_thinking), "after the answer has begun, no thinking comes"
        thinking, rest = thinking + more_thinking, rest + more
        whole_thinking, whole_rest = split(text, opened=opened)
        assert whole_thinking.startswith(thinking), "what was returned is taken back"
        assert whole_rest.startswith(rest), "what was returned is taken back"
    more_thinking, more = splitter.finish()
    assert (thinking + more_thinking, rest + more) == split(text, opened=opened)


@given(TEXTS)
def test_what_is_held_back_may_still_become_a_tag(text: str) -> None:
    splitter = ThinkingSplitter(TAGS)
    said = "".join(splitter.add(text))
    held = "".join(splitter.finish())
    assert not held.strip() or any(tag.startswith(held.lstrip()) for tag in TAGS)
    assert len(said) + len(held) <= len(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nI see.\n</think>\n\nYes.", ("I see.\n", "Yes.")),
        (" \n<think>a</think>b", ("a", "b")),
        ("<think></think>b", ("", "b")),
        ("<think>a", ("a", "")),
        ("<think>a</thin", ("a</thin", "")),
        ("Yes. <think>no</think>", ("", "Yes. <think>no</think>")),
        ("<thin", ("", "<thin")),
        ("  ", ("", "  ")),
        ("", ("", "")),
    ],
)
def test_examples(text: str, expected: tuple[str, str]) -> None:
    splitter = ThinkingSplitter(TAGS)
    first, last = splitter.add(text), splitter.finish()
    assert (first[0] + last[0], first[1] + last[1]) == expected == split(text)


def test_a_piece_is_returned_at_once_unless_it_may_become_a_tag() -> None:
    splitter = ThinkingSplitter(TAGS)
    assert splitter.add("<think>one") == ("one", "")
    assert splitter.add(" two<") == (" two", "")
    assert splitter.add("b></") == ("<b>", "")
    assert splitter.add("think>") == ("", "")
    assert splitter.add("\n") == ("", "")
    assert splitter.add("\nthree<think>") == ("", "three<think>")


@pytest.mark.parametrize(
    ("template", "tags", "thinks"),
    [
        (None, None, False),
        ("{{ messages[0].content }}", None, False),
        ("{{ content.split('</think>')[-1] }}", "<think>", True),
        ("{% if enable_thinking %}{{ '[THINK]' }}{% endif %}", None, True),
        ("{{ reasoning_effort }}", None, True),
        ("{{ '<seed:think>' }}{{ x }}{{ '</seed:think>' }}", "<seed:think>", True),
    ],
)
def test_what_a_template_tells(template: str | None, tags: str | None, thinks: bool) -> None:
    style = thinking_style(template)
    assert (style.tags.opening if style.tags else None, style.thinks) == (tags, thinks)


def test_the_variables_of_a_template() -> None:
    assert template_variables(True) == {"enable_thinking": True, "thinking": True}
    assert template_variables(False) == {"enable_thinking": False, "thinking": False}
    assert template_variables("low") == {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}
