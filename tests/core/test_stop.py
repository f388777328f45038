"""Stop strings, against a search that looks everywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.oracle import first_stop
from trio_runner.core.stop import StopMatcher

TEXT = st.text("ab", max_size=24) | st.text("abé\U0001f600 ", max_size=24)
STOPS = st.lists(st.text("ab", max_size=5) | st.text("abé\U0001f600 ", max_size=4), max_size=5)
CUTS = st.lists(st.integers(0, 24), max_size=10)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.flush(), None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    return first_stop(text, tuple(stops)) or (text, None)


@given(STOPS, TEXT, CUTS)
def test_the_match_does_not_depend_on_how_the_text_is_cut(stops: list[str], text: str, cuts: list[int]) -> None:
    assert run(stops, pieces_of(text, cuts)) == expected(stops, text)
    assert run(stops, list(text)) == expected(stops, text)


@given(STOPS, TEXT)
def test_only_text_that_may_still_be_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for n_seen, char in enumerate(text, start=1):
        out += matcher.push(char)
        if matcher.matched is not None:
            return
        seen = text[:n_seen]
        starts = [stop[:n] for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert out == seen[: n_seen - max(map(len, starts), default=0)]
    assert out + matcher.flush() == text
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "out", "matched"),
    [
        (["aa"], "baaab", "b", "aa"),
        (["aab"], "aaab", "a", "aab"),
        (["abab"], "aabaabab", "aaba", "abab"),
        (["aabaac"], "aabaabaac", "aab", "aabaac"),
        (["ab", "b"], "xab", "x", "ab"),  # a tie: the longest
        (["b", "ab"], "xab", "x", "ab"),
        (["abc", "b"], "xabc", "xa", "b"),  # the one that ends first, though the other began first
        (["c", "b"], "xbc", "x", "b"),  # not the order of the list
        (["", "b"], "ab", "a", "b"),
        ([""], "ab", "ab", None),
        ([], "ab", "ab", None),
        (["ab"], "xa", "xa", None),  # held back to the end, and then text after all
        (["é"], "aé", "a", "é"),
        (["\n\n"], "a\n\n", "a", "\n\n"),
        (["a", "a"], "ba", "b", "a"),
        (["whole"], "whole", "", "whole"),
    ],
)
def test_table(stops: list[str], text: str, out: str, matched: str | None) -> None:
    assert run(stops, [text]) == (out, matched)
    assert run(stops, list(text)) == (out, matched)


def test_a_long_stop_string_that_nearly_matches_everywhere_is_quick() -> None:
    stop = "a" * 1023 + "b"
    text = "a" * 100_000
    matcher = StopMatcher([stop])
    assert len(matcher.push(text)) == len(text) - 1023
    assert len(matcher.flush()) == 1023
