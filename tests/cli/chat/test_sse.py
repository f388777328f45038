"""Server-sent events out of bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.cli.chat.sse import MAX_EVENT_BYTES, EventReader, EventTooLong, ServerSentEvent

CASES = [
    (b"data: one\n\n", [("message", "one")]),
    (b"data:one\n\ndata: two\n\n", [("message", "one"), ("message", "two")]),
    (b"data: a\ndata: b\ndata\n\n", [("message", "a\nb\n")]),
    (b"event: error\ndata: bad\n\ndata: good\n\n", [("error", "bad"), ("message", "good")]),
    (b": comment\n\ndata: x\n\n", [("message", "x")]),
    (b"\xef\xbb\xbfdata: x\r\n\r\n", [("message", "x")]),
    (b"data: x\r\rdata: y\r\r", [("message", "x"), ("message", "y")]),
    (b"id: 1\nretry: 2\nnothing\n\n", []),
    (b"event: lonely\n\ndata: x\n\n", [("message", "x")]),
    (b"data: \n\n", [("message", "")]),
    (b"data:  two spaces\n\n", [("message", " two spaces")]),
    (b"data: no empty line after it", [("message", "no empty line after it")]),
    (b"data: \xff\n\n", [("message", "\ufffd")]),
    ("data: héé\n\n".encode(), [("message", "héé")]),
]


def read(pieces: list[bytes]) -> list[ServerSentEvent]:
    reader = EventReader()
    return [*(event for piece in pieces for event in reader.push(piece)), *reader.flush()]


@pytest.mark.parametrize(("data", "events"), CASES)
def test_events(data: bytes, events: list[tuple[str, str]]) -> None:
    expected = [ServerSentEvent(name, text) for name, text in events]
    assert read([data]) == expected
    assert read([data[place : place + 1] for place in range(len(data))]) == expected


@given(
    st.lists(st.sampled_from([b"data: x", b"data", b"event: e", b":", b"", b"\r", b"\n", b"\r\n", b"\n\n"])),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_cuts_change_nothing(parts: list[bytes], places: list[int]) -> None:
    data = b"".join(parts)
    cuts = [0, *sorted(place for place in places if place < len(data)), len(data)]
    assert read([data[start:stop] for start, stop in pairwise(cuts)]) == read([data])


def test_an_event_without_end_is_refused() -> None:
    reader = EventReader()
    for _ in range(MAX_EVENT_BYTES // 65536):
        reader.push(b"x" * 65536)
    with pytest.raises(EventTooLong):
        reader.push(b"x")


def test_comments_without_end_are_no_event() -> None:
    reader = EventReader()
    for _ in range(MAX_EVENT_BYTES // 65536 + 1):
        assert reader.push(b": " + b"x" * 65536 + b"\n") == []
