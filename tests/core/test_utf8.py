"""Bytes to characters, against the rules of the Unicode standard."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.oracle import starts_character, whole_text
from trio_runner.core.utf8 import Utf8Assembler

# Bytes at the edges of table 3-7, so that sequences that are nearly right are common.
EDGES = bytes.fromhex("00 41 7f 80 8f 90 9f a0 bf c1 c2 df e0 e1 ed ef f0 f4 f5")
DATA = st.lists(st.sampled_from(EDGES), max_size=12).map(bytes) | st.text(max_size=8).map(str.encode) | st.binary()


def substitute_maximal_subparts(data: bytes) -> str:
    """Section 3.9 of the Unicode standard, one byte at a time; half a character at the end is dropped."""
    text, start = "", 0
    while start < len(data):
        end = start + 1
        while starts_character(data[start:end]):
            if end == len(data):
                return text
            if not starts_character(data[start : end + 1]) and not is_character(data[start : end + 1]):
                break
            end += 1
        text += data[start:end].decode() if is_character(data[start:end]) else "\ufffd"
        start = end
    return text


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def push_all(pieces: list[bytes]) -> str:
    assembler = Utf8Assembler()
    return "".join(map(assembler.push, pieces)) + assembler.flush()


@given(DATA, st.lists(st.integers(0, 16), max_size=6))
def test_the_text_does_not_depend_on_how_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    assert push_all(pieces) == push_all([bytes([byte]) for byte in data]) == whole_text(data)
    assert whole_text(data) == substitute_maximal_subparts(data)


@given(st.text(max_size=8).map(str.encode))
def test_a_character_comes_out_with_its_last_byte(data: bytes) -> None:
    assembler = Utf8Assembler()
    out = ""
    for n_seen, byte in enumerate(data, start=1):
        out += assembler.push(bytes([byte]))
        assert out == whole_text(data[:n_seen])
        assert "\ufffd" not in out or "\ufffd" in data.decode()


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"\xc3", b"\xa9"], "é"),
        ([b"\xf0\x9f", b"\x98\x80"], "\U0001f600"),
        ([b"\xe4", b"A"], "\ufffdA"),  # what follows an invalid byte is not lost
        ([b"\xff", b"\xfe", b"A"], "\ufffd\ufffdA"),
        ([b"\xed\xa0\x80"], "\ufffd\ufffd\ufffd"),  # half of a surrogate pair
        ([b"\xf0\x90\x80", b"A"], "\ufffdA"),
        ([b"A\xe2\x82"], "A"),  # half a character at the end was never text
        ([b"\x00"], "\x00"),
        ([b"", b"a", b""], "a"),
    ],
)
def test_table(pieces: list[bytes], text: str) -> None:
    assert push_all(pieces) == text
