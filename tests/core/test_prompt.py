"""Prompts as lists of items, and how a long one is made to fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.prompt import common_prefix, fit_prompt
from trio_runner.errors import InvalidRequest, PromptTooLong

ITEMS = st.lists(st.integers(0, 2), max_size=30)


@given(ITEMS, ITEMS, ITEMS)
def test_common_prefix(shared: list[int], a: list[int], b: list[int]) -> None:
    a, b = shared + a, shared + b
    naive = 0
    while naive < min(len(a), len(b)) and a[naive] == b[naive]:
        naive += 1
    assert common_prefix(a, b) == common_prefix(b, a) == naive
    # A slot has a list, a request a tuple.
    assert common_prefix(a, tuple(b)) == common_prefix(tuple(a), b) == common_prefix(tuple(a), tuple(b)) == naive


def test_common_prefix_of_whole_lists() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [2, 2, 3]) == 0


@given(st.integers(1, 40), st.integers(1, 20), st.integers(-3, 30), st.booleans())
def test_fit_prompt(n_items: int, n_ctx: int, n_keep: int, adds_bos: bool) -> None:
    items = list(range(100, 100 + n_items))
    fitted = fit_prompt(items, n_ctx=n_ctx, n_keep=n_keep, adds_bos=adds_bos, truncate=True)
    wanted = n_items if n_keep < 0 else n_keep + (1 if adds_bos else 0)
    assert fitted.n_keep == min(wanted, n_ctx - 1)
    assert len(fitted.items) == min(n_items, n_ctx)
    if n_items <= n_ctx:
        assert fitted.items == tuple(items)
    else:
        n_newest = n_ctx - fitted.n_keep
        assert n_newest >= 1
        assert list(fitted.items) == items[: fitted.n_keep] + items[n_items - n_newest :]
    assert items == list(range(100, 100 + n_items)), "the caller's list was changed"


@given(st.integers(1, 40), st.integers(1, 20))
def test_without_truncation_a_long_prompt_is_refused(n_items: int, n_ctx: int) -> None:
    items = list(range(n_items))
    if n_items <= n_ctx:
        assert fit_prompt(items, n_ctx=n_ctx, n_keep=0, adds_bos=False, truncate=False).items == tuple(items)
        return
    with pytest.raises(PromptTooLong) as caught:
        fit_prompt(items, n_ctx=n_ctx, n_keep=0, adds_bos=False, truncate=False, param="content")
    assert (caught.value.n_prompt, caught.value.n_ctx, caught.value.param) == (n_items, n_ctx, "content")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no input provided") as caught:
        fit_prompt([], n_ctx=8, n_keep=0, adds_bos=True, truncate=True)
    assert caught.value.param == "prompt"
