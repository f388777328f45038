"""The toy is as strict as llama.cpp. It raises AssertionError where llama.cpp would abort or compute a wrong token."""

from __future__ import annotations

import pytest

from trio_runner.core.batch import Batch, Chunk
from trio_runner.core.memory import Copy, MemoryOp, Slide, Trim
from trio_runner.info import Capabilities
from trio_runner.testing import END, ToyContext, toy_continuation, toy_next, toy_text


def filled(*, can_trim: bool = True, can_shift: bool = True) -> ToyContext:
    """A context whose slot 0 holds 0 1 2 3 4 5, and whose slot 1 holds nothing."""
    context = ToyContext(Capabilities(n_slots=2, n_ctx=8, max_rows=8, can_trim=can_trim, can_shift=can_shift))
    context.decode(Batch((Chunk(0, 0, 0, tuple(range(6)), output=False),)), {})
    return context


@pytest.mark.parametrize(
    ("ops", "slot_0", "slot_1"),
    [
        ([Trim(0, 4)], [0, 1, 2, 3], []),
        ([Trim(0, 0)], [], []),
        ([Copy(0, 1, 3)], [0, 1, 2, 3, 4, 5], [0, 1, 2]),
        ([Trim(0, 1, 3), Slide(0, 3, 6, -2)], [0, 3, 4, 5], []),
        ([Copy(0, 1, 3), Trim(0, 0)], [], [0, 1, 2]),  # a copy outlives its source
    ],
)
def test_edits(ops: list[MemoryOp], slot_0: list[int], slot_1: list[int]) -> None:
    context = filled()
    assert all(context.apply(op) for op in ops)
    assert (context.held(0), context.held(1)) == (slot_0, slot_1)
    assert (context.length(0), context.length(1)) == (len(slot_0), len(slot_1))


def test_a_hole_in_the_positions_is_found() -> None:
    context = filled()
    context.apply(Trim(0, 1, 3))
    with pytest.raises(AssertionError):
        context.held(0)


def test_a_copy_shares_cells() -> None:
    context = filled()
    for op in (Copy(0, 1, 6), Trim(0, 0, 2), Slide(0, 2, 6, -2)):
        context.apply(op)
    assert context.held(0) == [2, 3, 4, 5]
    assert context.shared_rows(0, 1) == [0, 1, 2, 3]
    assert context.shared_rows(1, 0) == [2, 3, 4, 5]
    with pytest.raises(AssertionError):
        context.held(1)


@pytest.mark.parametrize("op", [Copy(1, 0, 1), Copy(0, 1, 7), Slide(0, 1, 6, -1)])
def test_edits_that_would_abort_in_llama_cpp(op: MemoryOp) -> None:
    with pytest.raises(AssertionError):
        filled(can_shift=False).apply(op)


def test_a_partial_trim_is_refused_by_a_memory_that_cannot_trim() -> None:
    context = filled(can_trim=False)
    assert not context.apply(Trim(0, 3))
    assert context.held(0) == [0, 1, 2, 3, 4, 5]
    assert context.apply(Trim(0, 6))
    assert context.apply(Trim(0, 0))
    assert context.held(0) == []


@pytest.mark.parametrize(("start", "tokens"), [(5, (1,)), (7, (1,)), (6, (1, 2, 3))])
def test_rows_that_do_not_follow_or_do_not_fit(start: int, tokens: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        filled().decode(Batch((Chunk(0, 0, start, tokens, output=False),)), {})


def test_the_next_token_depends_on_every_token_and_its_place() -> None:
    prompt = list(b"the quick brown fox")
    differ = [
        toy_continuation([*prompt[:n], 0, *prompt[n + 1 :]], 8) != toy_continuation(prompt, 8)
        for n in range(len(prompt))
    ]
    assert all(differ)
    assert toy_continuation(prompt[::-1], 8) != toy_continuation(prompt, 8)


def test_toy_text() -> None:
    tokens = toy_continuation(list(b"ab"), 200)
    assert tokens[-1] == END or len(tokens) == 200
    assert all(token == toy_next([*b"ab", *tokens[:n]]) for n, token in enumerate(tokens))
    data = bytes(token for token in tokens if token != END)
    assert data.decode(errors="replace").startswith(toy_text("ab", 200))
