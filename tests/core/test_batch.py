from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.batch import PREFILL_ROWS_BESIDE_DECODING, Batch, Wanting, plan_batch


@st.composite
def wantings(draw: st.DrawFn) -> list[Wanting]:
    decoding = draw(st.lists(st.booleans(), max_size=8))
    return [
        Wanting(
            uid=100 + i,
            slot=i,
            start=draw(st.integers(0, 50)),
            pending=[0] if decodes else list(range(draw(st.integers(1, 12)))),
            decoding=decodes,
        )
        for i, decodes in enumerate(decoding)
    ]


def rows(batch: Batch) -> dict[int, int]:
    return {chunk.uid: len(chunk.tokens) for chunk in batch.chunks}


@given(wantings(), st.integers(1, 20))
def test_plan(wanting: list[Wanting], max_rows: int) -> None:
    before = [(want, list(want.pending)) for want in wanting]
    batch = plan_batch(wanting, max_rows)
    assert [(want, list(want.pending)) for want in wanting] == before, "what it was given was changed"
    assert not batch.embeddings

    by_uid = {want.uid: want for want in wanting}
    assert len(rows(batch)) == len(batch.chunks), "two chunks of one sequence"
    # No row too many, none wasted while somebody wants it.
    assert batch.n_rows == min(max_rows, sum(len(want.pending) for want in wanting))
    for chunk in batch.chunks:
        want = by_uid[chunk.uid]
        assert chunk.tokens
        assert (chunk.slot, chunk.start) == (want.slot, want.start)
        assert chunk.tokens == tuple(want.pending[: len(chunk.tokens)])
        assert chunk.stop == want.start + len(chunk.tokens)
        assert chunk.output == (len(chunk.tokens) == len(want.pending))


@given(wantings(), st.integers(1, 20))
def test_who_decodes_comes_first_and_each_prompt_gets_its_share(wanting: list[Wanting], max_rows: int) -> None:
    batch = plan_batch(wanting, max_rows)
    got = rows(batch)
    decoding = [want.uid for want in wanting if want.decoding]
    prefilling = [want for want in wanting if not want.decoding]
    order = decoding + [want.uid for want in prefilling]
    assert [chunk.uid for chunk in batch.chunks] == [uid for uid in order if uid in got]
    # Whoever did not get all it wants got as much as anybody else, give or take the row that cannot be split.
    most = max((got.get(want.uid, 0) for want in prefilling), default=0)
    assert all(got.get(want.uid, 0) >= min(len(want.pending), most - 1) for want in prefilling)
    # Nobody is left out while the rows suffice, and then whose turn is last.
    assert set(got) == {want.uid for want in wanting[:max_rows]}


def test_shares() -> None:
    def shares(*lengths: int, max_rows: int) -> list[int]:
        wanting = [Wanting(i, i, 0, [0] * n, decoding=False) for i, n in enumerate(lengths)]
        got = rows(plan_batch(wanting, max_rows))
        return [got.get(i, 0) for i in range(len(lengths))]

    assert shares(100, max_rows=8) == [8]
    assert shares(100, 100, max_rows=8) == [4, 4]
    assert shares(100, 2, max_rows=8) == [6, 2]
    assert shares(1, 100, 100, max_rows=9) == [1, 4, 4]
    assert shares(3, 3, max_rows=8) == [3, 3]


def test_a_prompt_beside_streams_gets_less_at_a_time() -> None:
    prompt = Wanting(0, 0, 0, [0] * 5000, decoding=False)
    stream = Wanting(1, 1, 7, [0], decoding=True)
    assert rows(plan_batch([prompt], 512)) == {0: 512}
    assert rows(plan_batch([prompt, stream], 512)) == {0: PREFILL_ROWS_BESIDE_DECODING, 1: 1}
    assert rows(plan_batch([prompt, stream], 64)) == {0: 63, 1: 1}
    # Even then nobody is left out.
    prompts = [Wanting(10 + i, i, 0, [0] * 2, decoding=False) for i in range(200)]
    assert set(rows(plan_batch([stream, *prompts], 512)).values()) == {1}
