"""The ends of completions that depend on lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.fake_engine import FakeEngine, FakeGeneration
from trio_runner.events import Finished, PromptProgress, SampledToken, TextPiece, Usage
from trio_runner.request import GenerateRequest
from trio_runner.server.dialects.llama_server.line_rules import LineRules, RuledGeneration

TEXTS = st.text(alphabet="a \t\n", max_size=30)


def kept(rules: LineRules, pieces: list[str], pace: float = 0.0) -> str:
    text = ""
    for number, piece in enumerate(pieces):
        more, ends = rules.push(piece, number * pace)
        text += more
        if ends:
            break
    return text


@given(TEXTS, st.integers(1, 4), st.data())
def test_the_indentation_is_the_same_however_the_text_is_cut(text: str, indent: int, data: st.DataObject) -> None:
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = kept(LineRules(indent), [text])
    assert kept(LineRules(indent), pieces) == whole
    assert text.startswith(whole)
    first, *lines = whole.split("\n")
    assert first == text.split("\n", 1)[0]
    for line in lines:
        assert not line.strip(" \t") or len(line) - len(line.lstrip(" \t")) >= indent
    if whole != text:  # it ends within the spaces of the line that is refused
        assert lines
        assert not lines[-1].strip(" \t")
        assert len(lines[-1]) < indent
        assert text[len(whole)] not in " \t"


@pytest.mark.parametrize(
    ("text", "indent", "result"),
    [
        ("a\n  b\nc", 2, "a\n  b\n"),
        ("a\n  b\n c", 2, "a\n  b\n "),
        ("a\n\n  b", 2, "a\n"),
        ("a\nb", 0, "a\nb"),
        ("a\n\tb", 1, "a\n\tb"),
    ],
)
def test_a_line_with_less_indentation_ends_the_text(text: str, indent: int, result: str) -> None:
    assert kept(LineRules(indent), [text]) == result


@given(st.lists(TEXTS, max_size=10), st.integers(0, 9))
def test_late_text_ends_with_its_newline_and_not_before(pieces: list[str], seconds: int) -> None:
    text = kept(LineRules(max_seconds=seconds), pieces, pace=1.0)
    late = [number for number, piece in enumerate(pieces) if number > seconds and "\n" in piece]
    assert text == "".join(pieces[: late[0] + 1] if late else pieces)


def token(number: int) -> SampledToken:
    return SampledToken(number, b"x", -1.0)


def ruled(rules: LineRules) -> tuple[FakeGeneration, RuledGeneration]:
    times = iter(range(100))
    generation = FakeGeneration(FakeEngine(), GenerateRequest(prompt="x"))
    return generation, RuledGeneration(generation, rules, lambda: float(next(times)))


@pytest.mark.parametrize("eager", [False, True])
async def test_a_ruled_generation_is_closed_at_its_end_and_tells_what_it_cost(eager: bool) -> None:
    generation, reader = ruled(LineRules(min_indent=1))
    await reader.start()
    generation.say(
        PromptProgress(4, 4, 1), TextPiece("a\n", (token(1), token(2))), TextPiece(" b\nc", (token(3),)), "never read"
    )
    events = reader.receive_nowait() if eager else [await reader.__anext__() for _ in range(4)]
    assert events[1:] == [
        TextPiece("a\n", (token(1), token(2))),
        TextPiece(" b\n", (token(3),)),
        Finished("length", Usage(4, 1, 3, prompt_seconds=1.0, completion_seconds=1.0)),
    ]
    assert generation.closed.is_set()
    assert reader.receive_nowait() == []
    with pytest.raises(StopAsyncIteration):
        await reader.__anext__()


async def test_a_generation_that_breaks_no_rule_ends_by_itself() -> None:
    generation, reader = ruled(LineRules(min_indent=1))
    await reader.start()
    end = Finished("stop", Usage(1, 0, 1))
    generation.say("a\n b", end)
    assert reader.receive_nowait(at_most=1) == [TextPiece("a\n b")]
    assert await reader.__anext__() == end
    assert reader.receive_nowait() == []
