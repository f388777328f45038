"""The text of one sequence, and why it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.oracle import first_stop, whole_text
from trio_runner.core.batch import Sampled
from trio_runner.core.sequence import GeneratedText, SequenceSpec, finish_reason
from trio_runner.events import SampledToken, TextPiece

PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"", b"\xc3", b"\xa9", b"\xff", "é".encode()]), max_size=14)
STOPS = st.lists(st.sampled_from(["ab", "b", "aab", "abab", "é", "\ufffd", ""]), max_size=3, unique=True).map(tuple)


def sample(n: int, piece: bytes, *, is_end: bool = False) -> Sampled:
    return Sampled(n, piece, is_end=is_end, logprob=-float(n))


@given(PIECES, STOPS, st.sampled_from(["end", "limit"]))
def test_each_token_is_reported_once_and_in_order(pieces: list[bytes], stops: tuple[str, ...], how: str) -> None:
    text = GeneratedText(stops, keep_tokens=True)
    out: list[TextPiece | None] = []
    reported: list[SampledToken] = []
    n_pushed = 0
    for piece in pieces:
        out.append(text.push(sample(n_pushed, piece)))
        n_pushed += 1
        if text.stop_matched is not None:
            break
        # Text is emitted with the token that made it certain, and never before any of its own tokens.
        so_far = "".join(piece.text for piece in out if piece is not None)
        n_reported = sum(len(piece.tokens) for piece in out if piece is not None)
        assert whole_text(b"".join(pieces[:n_reported])).startswith(so_far)
    else:
        if how == "end":
            out.append(text.end(sample(n_pushed, b"", is_end=True)))
            n_pushed += 1
        else:
            out.append(text.flush())
    for event in filter(None, out):
        assert event.text, "an empty piece"
        reported += event.tokens
    reported += text.take_tokens()
    assert [token.token for token in reported] == list(range(n_pushed))
    assert all(token.logprob == -token.token for token in reported)
    assert text.n_tokens == n_pushed
    assert text.take_tokens() == ()

    whole = whole_text(b"".join(pieces))
    expected, matched = first_stop(whole, stops) or (whole, None)
    assert "".join(event.text for event in filter(None, out)) == expected
    assert text.stop_matched == matched


def test_without_logprobs_no_token_is_kept() -> None:
    text = GeneratedText(())
    assert text.push(sample(0, b"a")) == TextPiece("a")
    assert text.take_tokens() == ()


@pytest.mark.parametrize(
    ("pieces", "stop", "n_cut"),
    [
        ([b"a", b"b", b"c"], "b", 1),
        ([b"x", b"a", b"b"], "ab", 2),
        ([b"xa", b"b"], "ab", 2),  # the text of the first is cut in the middle
        ([b"x", b"ab"], "ab", 1),
        ([b"xy"], "y", 1),
        ([b"x", b"", b"y"], "y", 1),
    ],
)
def test_how_many_tokens_a_stop_string_cuts_off(pieces: list[bytes], stop: str, n_cut: int) -> None:
    text = GeneratedText((stop,))
    for n, piece in enumerate(pieces):
        text.push(sample(n, piece))
        if text.stop_matched:
            break
    assert text.stop_matched == stop
    assert text.n_cut() == n_cut


@pytest.mark.parametrize(
    ("piece", "is_end", "max_tokens", "reason"),
    [
        (b"a", False, None, None),
        (b"a", False, 2, None),
        (b"a", False, 1, "length"),
        (b"b", False, 1, "stop"),  # a stop string comes before the limit
        (b"", True, 1, "stop"),  # and so does the end token
        (b"", True, None, "stop"),
    ],
)
def test_why_a_sequence_ends(piece: bytes, is_end: bool, max_tokens: int | None, reason: str | None) -> None:
    spec = SequenceSpec(uid=0, prompt=(1,), max_tokens=max_tokens, stop=("b",))
    text = GeneratedText(spec.stop)
    sampled = sample(0, piece, is_end=is_end)
    text.end(sampled) if is_end else text.push(sampled)
    assert finish_reason(text, sampled, spec) == reason
