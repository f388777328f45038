"""Context shift: how much is discarded, and by which edits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.batch import Batch, Chunk
from trio_runner.core.shift import n_discard, shift_ops
from trio_runner.info import Capabilities
from trio_runner.testing import ToyContext


@given(st.integers(1, 60), st.data())
def test_a_full_slot_discards_half_of_what_it_may(n_ctx: int, data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(0, n_ctx - 1))
    discard = n_discard(n_ctx, n_ctx=n_ctx, n_keep=n_keep)
    assert discard == max((n_ctx - n_keep) // 2, 1)
    assert 1 <= discard <= n_ctx - n_keep


@given(st.integers(1, 60), st.data())
def test_a_slot_with_room_discards_only_what_is_missing(n_ctx: int, data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(0, n_ctx - 1))
    n_held = data.draw(st.integers(0, n_ctx))
    discard = n_discard(n_held, n_ctx=n_ctx, n_keep=n_keep)
    n_free = n_ctx - n_held
    assert discard + n_free == max(n_free, (n_ctx - n_keep) // 2, 1)


@given(st.integers(1, 30), st.data())
def test_the_edits_keep_the_start_and_the_newest(n_ctx: int, data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(0, n_ctx - 1))
    discard = n_discard(n_ctx, n_ctx=n_ctx, n_keep=n_keep)
    context = ToyContext(Capabilities(n_slots=1, n_ctx=n_ctx, max_rows=n_ctx))
    tokens = tuple(range(n_ctx))
    context.decode(Batch((Chunk(0, 0, 0, tokens, output=False),)), {})
    for op in shift_ops(0, n_ctx, n_keep=n_keep, discard=discard):
        assert context.apply(op)
    assert context.held(0) == [*tokens[:n_keep], *tokens[n_keep + discard :]]
