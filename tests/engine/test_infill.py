"""Filling a gap in a text: how the prompt is laid out, and what is left out when it is too long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.toys import DEADLINE, Toy
from tests.placing import model_config
from tests.tiny_models import FIM_TOKENS, tiny_model
from trio_runner.engine.infill import BETWEEN_FILES, CURRENT_FILE, REPOSITORY, infill_tokens
from trio_runner.errors import PromptTooLong, Unsupported
from trio_runner.front_door import open_engine
from trio_runner.request import GenerateRequest, Infill
from trio_runner.testing import ToyModel, toy_text

PRE, SUF, MID, REP, SEP, BOS = 1, 2, 3, 4, 5, 6
"""Bytes that no text here has."""
MARKS: dict[str, Any] = {"token_fim_pre": PRE, "token_fim_suf": SUF, "token_fim_mid": MID}
NAMES: dict[str, Any] = {"token_fim_rep": REP, "token_fim_sep": SEP}
TEXT = st.text("ab\n", max_size=30)
ENDLESS = 10**6


def model(**info: object) -> ToyModel:
    toy = ToyModel()
    toy.info = replace(toy.info, **info)  # type: ignore[arg-type]
    return toy


def laid_out(infill: Infill, n_ctx: int = ENDLESS, *, max_tokens: int | None = 0, **info: object) -> bytes:
    """The prompt of a toy, whose tokens are bytes."""
    return bytes(infill_tokens(model(**info), infill, n_ctx=n_ctx, max_tokens=max_tokens, truncate=n_ctx < ENDLESS))


def test_the_prompt_of_llama_cpps_server() -> None:
    """With BOS in front, which stands behind the other files there."""
    infill = Infill(prefix="def f(", suffix="return", prompt="x)", extra=(("a.py", "A\n"), ("b.py", "B\n")))
    files = b"\4myproject\n\5a.py\nA\n\5b.py\nB\n\5filename\n"
    assert laid_out(infill, **MARKS, **NAMES) == files + b"\1def f(x)\2return\3"
    assert laid_out(infill, **MARKS, **NAMES, token_bos=BOS, adds_bos=True) == b"\6" + files + b"\1def f(x)\2return\3"
    between = BETWEEN_FILES.encode()
    assert laid_out(infill, **MARKS) == between + b"A\n" + between + b"B\n\1def f(x)\2return\3"
    assert laid_out(Infill(prefix="", suffix=""), **MARKS) == b"\1\2\3"
    assert laid_out(Infill(prefix="", suffix=""), **MARKS, **NAMES) == (
        b"\4" + REPOSITORY.encode() + b"\5" + CURRENT_FILE.encode() + b"\1\2\3"
    )


@given(TEXT, TEXT, st.text("ab", max_size=5), st.lists(st.tuples(st.just("n"), TEXT), max_size=3), st.integers(8, 200))
def test_what_is_far_from_the_gap_goes_first(
    prefix: str, suffix: str, prompt: str, extra: list[tuple[str, str]], n_ctx: int
) -> None:
    infill = Infill(prefix=prefix, suffix=suffix, prompt=prompt, extra=tuple(extra))
    whole = laid_out(infill, **MARKS, **NAMES)
    cut = laid_out(infill, n_ctx, **MARKS, **NAMES)
    assert len(cut) == min(n_ctx, len(whole))
    files, _, rest = cut.partition(b"\1")
    kept_prefix, _, rest = rest.partition(b"\2")
    kept_suffix, _, rest = rest.partition(b"\3")
    assert rest == b""
    assert whole.partition(b"\1")[0].endswith(files)
    assert (prefix + prompt).encode().endswith(kept_prefix)
    assert kept_prefix.endswith(prompt.encode())
    assert suffix.encode().startswith(kept_suffix)
    n_prefix, room = len(kept_prefix) - len(prompt), n_ctx - 3 - len(prompt)
    if len(prefix) + len(suffix) > room:
        assert not files
        assert len(kept_suffix) == len(suffix) or len(kept_suffix) >= room // 4
        assert n_prefix == len(prefix) or n_prefix >= room - room // 4
    else:
        assert (n_prefix, len(kept_suffix)) == (len(prefix), len(suffix))


@pytest.mark.parametrize(("max_tokens", "n_free"), [(None, 25), (0, 0), (10, 10), (1000, 50)])
def test_what_is_generated_has_room(max_tokens: int | None, n_free: int) -> None:
    infill = Infill(prefix="a" * 200, suffix="b" * 200)
    assert len(laid_out(infill, 100, max_tokens=max_tokens, **MARKS)) == 100 - n_free
    fitting = Infill(prefix="a" * 90, suffix="b" * 7)
    assert len(laid_out(fitting, 100, max_tokens=max_tokens, **MARKS)) == 100


def test_what_the_filling_begins_with_may_take_the_room_of_what_is_generated() -> None:
    infill = Infill(prefix="a" * 10, suffix="b" * 10, prompt="c" * 90)
    assert laid_out(infill, 100, max_tokens=None, **MARKS) == b"\1" + b"c" * 90 + b"\2\3"
    with pytest.raises(PromptTooLong) as caught:
        laid_out(infill, 92, max_tokens=None, **MARKS)
    assert (caught.value.n_prompt, caught.value.n_ctx) == (93, 92)


async def test_a_model_with_the_tokens_fills_the_gap(toy: Toy) -> None:
    toy.info = {**MARKS}
    prompt = [PRE, *b"def f(", SUF, *b"return", MID]
    async with toy.engine(context_length=32) as engine:
        assert engine.info.can_infill
        generation = engine.generate(Infill(prefix="def f(", suffix="return"), max_tokens=9)
        assert await generation.collect() == toy_text(prompt, 9)
        too_long = Infill(prefix="a" * 40, suffix="b" * 40, prompt="c")
        with pytest.raises(PromptTooLong) as caught:
            await engine.generate(too_long).start()
        assert (caught.value.n_prompt, caught.value.n_ctx, caught.value.param) == (84, 32, "prompt")
        request = GenerateRequest(prompt=too_long, truncate=True, max_tokens=4)
        cut = [PRE, *b"a" * 18, *b"c", SUF, *b"b" * 6, MID]
        assert await engine.generate(request).collect() == toy_text(cut, 4)
        with pytest.raises(PromptTooLong):
            await engine.generate(Infill(prefix="", suffix="", prompt="c" * 30), truncate=True).start()


async def test_a_model_without_the_tokens_is_named_as_the_reason(toy: Toy) -> None:
    async with toy.engine() as engine:
        assert not engine.info.can_infill
        with pytest.raises(Unsupported) as caught:
            await engine.generate(Infill(prefix="a", suffix="b")).start()
    assert (caught.value.feature, caught.value.param) == ("infill", "suffix")


async def test_a_model_file_with_the_tokens(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE):
        config = model_config(tiny_model("fim", tmp_path))
        async with open_engine(config, context_length=256, threads=1) as engine:
            info = engine.info
            assert info.can_infill
            marks = (
                info.token_fim_pre,
                info.token_fim_suf,
                info.token_fim_mid,
                info.token_fim_rep,
                info.token_fim_sep,
            )
            texts = [await engine.detokenize([mark]) for mark in marks if mark is not None]
            assert texts == list(FIM_TOKENS)
            infill = Infill(prefix="the <|fim_middle|>", suffix=" world", extra=(("a.py", "hello"),))
            generation = engine.generate(infill, max_tokens=8, temperature=0)
            text = await generation.collect()
            tokens: list[int] = []
            pieces = [FIM_TOKENS[3], "myproject\n", FIM_TOKENS[4], "a.py\n", "hello", FIM_TOKENS[4], "filename\n"]
            pieces += [FIM_TOKENS[0], "the <|fim_middle|>", FIM_TOKENS[1], " world", FIM_TOKENS[2]]
            for piece in pieces:
                is_mark = piece in FIM_TOKENS
                tokens += await engine.tokenize(piece, add_special=False, parse_special=is_mark)
            assert await engine.generate(tokens, max_tokens=8, temperature=0).collect() == text
            assert generation.usage is not None
            assert generation.usage.prompt_tokens == len(tokens)
        async with open_engine(model_config(tiny_model("llama", tmp_path)), context_length=64, threads=1) as engine:
            assert not engine.info.can_infill
