"""Events and results, as Ollama's dialect writes them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import EngineBroken, RunnerError
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.server.dialects.ollama.responses import (
    ChatLine,
    ChatLines,
    GenerateLine,
    GenerateLines,
    embed_line,
    embedding_line,
    refusal,
)
from trio_runner.server.dialects.ollama.thinking import KNOWN_TAGS, ThinkingSplitter
from trio_runner.server.dialects.ollama.times import Stopwatch, timestamp
from trio_runner.server.problems import Problem

NOW = "2026-11-30T19:42:09.000000007Z"
DONE = Finished("stop", Usage(30, 20, 5, 0.0129, 0.25))


class StoppedWatch(Stopwatch):
    """A clock that stands still."""

    load_duration = 11

    def __init__(self) -> None: ...

    def elapsed(self) -> int:
        return 42

    def now(self) -> str:
        return NOW


def generate(*, thinks: bool = False) -> GenerateLines:
    return GenerateLines("m", StoppedWatch(), ThinkingSplitter(KNOWN_TAGS[0]) if thinks else None)


def chat(*, thinks: bool = False) -> ChatLines:
    return ChatLines("m", StoppedWatch(), ThinkingSplitter(KNOWN_TAGS[0]) if thinks else None)


def written(lines: GenerateLines, *events: Event) -> list[dict[str, Any]]:
    body = b"".join(map(lines.event, events))
    assert body == b"" or body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


COUNTS = (
    b'"total_duration":42,"load_duration":11,"prompt_eval_count":30,"prompt_eval_duration":12900000,'
    b'"eval_count":5,"eval_duration":250000000}\n'
)


def test_the_bytes_of_generate() -> None:
    lines, start = generate(), f'{{"model":"m","created_at":"{NOW}","response":'.encode()
    assert lines.event(PromptProgress(1, 2, 0)) == b""
    assert lines.event(TextPiece('é"<\n')) == start + '"é\\"<\\n","done":false}\n'.encode()
    assert lines.event(DONE) == start + b'"","done":true,"done_reason":"stop",' + COUNTS
    assert lines.idle("load") == start + b'"","done":true,"done_reason":"load"}\n'
    assert lines.failure(EngineBroken("it died")) == b'{"error":"it died"}\n'
    assert lines.failure(KeyError("secret")) == b'{"error":"internal error"}\n'


def test_the_bytes_of_chat() -> None:
    lines, start = chat(), f'{{"model":"m","created_at":"{NOW}","message":{{"role":"assistant","content":'.encode()
    assert lines.event(TextPiece("a")) == start + b'"a"},"done":false}\n'
    assert lines.event(DONE) == start + b'""},"done":true,"done_reason":"stop",' + COUNTS
    assert lines.idle("unload") == start + b'""},"done":true,"done_reason":"unload"}\n'
    assert chat().whole([TextPiece("a"), TextPiece("b"), DONE]) == (
        start + b'"ab"},"done":true,"done_reason":"stop",' + COUNTS
    )


@pytest.mark.parametrize("reason", ["stop", "length", "deadline"])
def test_every_line_has_the_types_that_strict_clients_decode(reason: Any) -> None:
    events: list[Event] = [TextPiece("<think>a"), TextPiece("</think>b"), Finished(reason, Usage())]
    for lines, kind in ((generate(thinks=True), GenerateLine), (chat(thinks=True), ChatLine)):
        body = b"".join(map(lines.event, events))
        read: list[Any] = [msgspec.json.decode(line, type=kind) for line in body.splitlines()]
        assert [(one.done, one.done_reason) for one in read] == [(False, msgspec.UNSET)] * 2 + [(True, reason)]
        assert all(type(number) is int for number in (read[-1].eval_duration, read[-1].total_duration))


def test_thinking_is_told_apart() -> None:
    pieces = [TextPiece(text) for text in ("<thi", "nk>", "\nI ", "see", "</th", "ink>", "\n\n", "Yes", ".<")]
    assert [line["message"] for line in written(chat(thinks=True), *pieces, DONE)] == [
        {"role": "assistant", "content": "", "thinking": "I "},
        {"role": "assistant", "content": "", "thinking": "see"},
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": ".<"},
        {"role": "assistant", "content": ""},
    ]
    whole = json.loads(generate(thinks=True).whole([*pieces, DONE]))
    assert (whole["thinking"], whole["response"]) == ("I see", "Yes.<")
    assert written(generate(), pieces[1])[0]["response"] == "nk>"


@given(st.lists(st.text("<think/> a", max_size=9), max_size=9), st.booleans(), st.booleans())
def test_a_stream_and_a_whole_answer_say_the_same(texts: list[str], thinks: bool, is_chat: bool) -> None:
    events: list[Event] = [*(TextPiece(text) for text in texts), DONE]
    make = chat if is_chat else generate

    def said(line: dict[str, Any]) -> tuple[str, str]:
        inside = line["message"] if is_chat else line
        return inside.get("thinking", ""), inside["content" if is_chat else "response"]

    lines = [said(line) for line in written(make(thinks=thinks), *events)]
    assert said(json.loads(make(thinks=thinks).whole(events))) == tuple(map("".join, zip(*lines, strict=True)))


def test_log_probabilities() -> None:
    tokens = tuple(SampledToken(1, b"\xc3", -0.5, (TokenInfo(2, b"a", -math.inf),)) for _ in range(2))
    expected = {
        "token": "�",
        "logprob": -0.5,
        "bytes": [195],
        "top_logprobs": [{"token": "a", "logprob": -3.4028234663852886e38, "bytes": [97]}],
    }
    for lines in (generate(), chat()):
        first, rest, last = written(lines, TextPiece("a", tokens), Finished("stop", Usage(), tokens=tokens[:1]))
        assert first["logprobs"] == [expected, expected]
        assert rest["logprobs"] == [expected]
        assert "logprobs" not in last
        whole = json.loads(lines.whole([TextPiece("a", tokens), Finished("stop", Usage(), tokens=tokens[:1])]))
        assert whole["logprobs"] == [expected] * 3
        # The end token and the tokens of a stop string are no part of the answer.
        end = SampledToken(0, b"", -0.5, ())
        cut = Finished("stop", Usage(), tokens=tokens, stop="b")
        for finished in (Finished("stop", Usage(), tokens=(end,)), cut):
            assert [line.get("logprobs") for line in written(lines, finished)] == [None]
            assert json.loads(lines.whole([TextPiece("a", tokens), finished]))["logprobs"] == [expected, expected]
    # What the splitter holds back does not hold back the tokens.
    assert written(chat(thinks=True), TextPiece("<th", tokens))[0]["logprobs"] == [expected, expected]


def test_embeddings() -> None:
    vectors = [Embedded(np.array(vector, np.float32), Usage(prompt_tokens=3)) for vector in ([0.1, -2], [1e-7, 3])]
    assert embed_line("m", vectors, StoppedWatch()) == (
        b'{"model":"m","embeddings":[[0.1,-2.0],[1e-07,3.0]],'
        b'"total_duration":42,"load_duration":11,"prompt_eval_count":6}\n'
    )
    assert embedding_line(vectors[:1]) == b'{"embedding":[0.1,-2.0]}\n'
    assert embedding_line([]) == b'{"embedding":[]}\n'
    broken = Embedded(np.array([math.nan], np.float32), Usage())
    with pytest.raises(RunnerError, match="not finite"):
        embedding_line([broken])


def test_refusals() -> None:
    answer = refusal(Problem(422, 'no "x" \ud800', {"Retry-After": "1"}))
    assert (answer.status, answer.body) == (400, b'{"error":"no \\"x\\" ?"}\n')
    assert answer.headers == {"Content-Type": "application/json", "Retry-After": "1"}
    assert refusal(Problem(503, "busy")).status == 503


@given(st.integers(0, 253402300799 * 10**9))
def test_timestamps(unix_ns: int) -> None:
    text = timestamp(unix_ns)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", text)
    assert int(text[-10:-1]) == unix_ns % 10**9


def test_a_stopwatch() -> None:
    assert timestamp(1_700_000_000_000_000_005) == "2023-11-14T22:13:20.000000005Z"
    watch = Stopwatch()
    assert watch.load_duration == 0
    watch.loaded()
    assert 0 <= watch.load_duration <= watch.elapsed()
