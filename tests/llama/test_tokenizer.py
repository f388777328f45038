"""Text to tokens and back: any text survives, and text that costs too much is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.llama.running import Running
from trio_runner.errors import InvalidRequest

Models = Callable[[str], Path]


def test_a_long_text_does_not_exhaust_the_stack(models: Models) -> None:
    model = Running(models("llama")).model
    result: list[int] = []

    def tokenize() -> None:
        result.append(len(model.tokenize("A" * 300_000, add_special=True, parse_special=True)))

    threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=tokenize)
        thread.start()
    finally:
        threading.stack_size(0)
    thread.join()
    assert result == [300_000]


def test_a_text_of_too_many_special_tokens_is_refused(models: Models) -> None:
    model = Running(models("llama")).model
    text = "<|im_end|>" * 20_000
    with pytest.raises(InvalidRequest, match="special tokens"):
        model.tokenize(text, add_special=True, parse_special=True)
    assert model.tokenize(text[:10_000], add_special=False, parse_special=True) == [2] * 1000
    assert len(model.tokenize(text, add_special=False, parse_special=False)) > 100_000


def test_a_text_must_be_unicode_and_bounded(models: Models) -> None:
    model = Running(models("llama")).model
    with pytest.raises(InvalidRequest) as surrogate:
        model.tokenize("\ud800", add_special=True, parse_special=True)
    assert surrogate.value.param == "prompt"
    with pytest.raises(InvalidRequest):
        model.tokenize("a" * (5 << 20), add_special=True, parse_special=True)


@pytest.mark.parametrize("name", ["llama", "spm"])
@pytest.mark.parametrize("text", ["", " ", "hello world", "na\u00efve \u4f60\u597d \U0001f642\n\ttab", "a\0b"])
def test_a_text_survives_tokens_and_back(models: Models, name: str, text: str) -> None:
    model = Running(models(name)).model
    tokens = model.tokenize(text, add_special=False, parse_special=False)
    again = b"".join(model.piece(token) for token in tokens).decode()
    assert again == (f" {text}" if name == "spm" and text else text)  # SentencePiece puts a space before every text
