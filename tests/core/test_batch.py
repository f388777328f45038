from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.batch import Batch, BatchKind, Chunk, Wanting, plan_batch
from trio_runner.core.prompt import Media, MediaRow


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
            output=decodes or draw(st.booleans()),
            encoder_tokens=draw(st.sampled_from([(), (1, 2)])),
        )
        for i, decodes in enumerate(decoding)
    ]


def rows(chunks: tuple[Chunk, ...]) -> dict[int, int]:
    return {chunk.uid: len(chunk.items) for chunk in chunks}


@given(wantings(), st.integers(1, 20), st.integers(1, 20))
def test_plan(wanting: list[Wanting], max_rows: int, prompt_rows: int) -> None:
    before = [(want, list(want.pending)) for want in wanting]
    chunks = plan_batch(iter(wanting), max_rows=max_rows, prompt_rows=prompt_rows)
    assert [(want, list(want.pending)) for want in wanting] == before, "what it was given was changed"
    by_uid = {want.uid: want for want in wanting}
    assert len(rows(chunks)) == len(chunks), "two chunks of one sequence"
    # No row too many, none wasted while somebody whose turn it is wants it.
    in_turn = wanting[:max_rows]
    n_decoding = sum(want.decoding for want in in_turn)
    n_prompts = sum(len(want.pending) for want in in_turn if not want.decoding)
    assert Batch(chunks).n_rows == n_decoding + min(max_rows - n_decoding, prompt_rows, n_prompts)
    for chunk in chunks:
        want = by_uid[chunk.uid]
        assert chunk.items
        assert (chunk.slot, chunk.start, chunk.position) == (want.slot, want.start, want.start)
        assert chunk.encoder_tokens == want.encoder_tokens
        assert chunk.items == tuple(want.pending[: len(chunk.items)])
        assert chunk.stop == want.start + len(chunk.items)
        assert chunk.output == (want.output and len(chunk.items) == len(want.pending))


@given(wantings(), st.integers(1, 20), st.integers(1, 20))
def test_who_decodes_comes_first_and_each_prompt_gets_its_share(
    wanting: list[Wanting], max_rows: int, prompt_rows: int
) -> None:
    chunks = plan_batch(wanting, max_rows=max_rows, prompt_rows=prompt_rows)
    got = rows(chunks)
    in_turn = wanting[:max_rows]
    decoding = [want.uid for want in in_turn if want.decoding]
    remain = min(max_rows - len(decoding), prompt_rows)
    prefilling = [want for want in in_turn if not want.decoding][:remain]
    # Nobody is left out while the rows suffice, and then whose turn is last.
    assert [chunk.uid for chunk in chunks] == decoding + [want.uid for want in prefilling]
    assert all(got[uid] == 1 for uid in decoding)
    # Whoever did not get all it wants got as much as anybody else, give or take the row that cannot be split.
    most = max((got[want.uid] for want in prefilling), default=0)
    assert all(got[want.uid] >= min(len(want.pending), most - 1) for want in prefilling)


def shares(*lengths: int, max_rows: int = 512, prompt_rows: int = 512, n_decoding: int = 0) -> list[int]:
    wanting = [Wanting(i, i, 0, [0] * n, decoding=False) for i, n in enumerate(lengths)]
    wanting += [Wanting(100 + i, 100 + i, 7, [0], decoding=True) for i in range(n_decoding)]
    got = rows(plan_batch(wanting, max_rows=max_rows, prompt_rows=prompt_rows))
    assert all(got[100 + i] == 1 for i in range(n_decoding))
    return [got.get(i, 0) for i in range(len(lengths))]


def test_shares() -> None:
    assert shares(100, max_rows=8) == [8]
    assert shares(100, 100, max_rows=8) == [4, 4]
    assert shares(100, 2, max_rows=8) == [6, 2]
    assert shares(1, 100, 100, max_rows=9) == [1, 4, 4]
    assert shares(3, 3, max_rows=8) == [3, 3]
    assert shares(100, 100, max_rows=9) == [5, 4]


def test_prompts_have_so_many_rows_and_no_more() -> None:
    assert shares(5000, prompt_rows=40) == [40]
    assert shares(5000, prompt_rows=40, n_decoding=3) == [40]
    assert shares(5000, max_rows=40, prompt_rows=40, n_decoding=3) == [37]
    assert shares(5000, 5000, 1, prompt_rows=41) == [20, 20, 1]
    # Fewer rows than prompts: those whose turn it is.
    assert shares(9, 9, 9, 9, 9, prompt_rows=2, n_decoding=1) == [1, 1, 0, 0, 0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(12, 20), st.integers(1, 20))
def test_what_cannot_be_divided_is_not(lengths: list[int], max_rows: int, prompt_rows: int) -> None:
    wanting = [Wanting(i, i, 0, [0] * n, decoding=False, whole=True) for i, n in enumerate(lengths)]
    got = rows(plan_batch(wanting, max_rows=max_rows, prompt_rows=prompt_rows))
    assert all(n_rows == lengths[uid] for uid, n_rows in got.items())
    assert 0 in got, "who comes first does not get on"
    assert sum(got.values()) <= max(min(max_rows, prompt_rows), lengths[0])
    room = min(max_rows, prompt_rows) - sum(got.values())
    assert all(n > room for uid, n in enumerate(lengths) if uid not in got), "one more would have fitted"


def test_rows_of_images_make_a_batch_of_their_own_kind() -> None:
    text, image = Media(b"a", 3, 3), Media(b"b", 3, 1, causal=False, shares_positions=True)
    rows_of = [tuple(MediaRow(media, row) for row in range(3)) for media in (text, image)]
    chunks = [Chunk(0, 0, 0, items, output=False) for items in [*rows_of, (1, 2)]]
    assert [chunk.media for chunk in chunks] == [text, image, None]
    of_text, of_image = (BatchKind(((1, 1.0),)).for_media(media) for media in (text, image))
    assert of_text == BatchKind(((1, 1.0),), of_media=True, causal=True)
    assert of_image == BatchKind(((1, 1.0),), of_media=True, causal=False)
    assert len({of_text, of_image, BatchKind(((1, 1.0),)), BatchKind(), BatchKind(embedding=True)}) == 5
    assert [media.whole for media in (text, image)] == [False, True]
