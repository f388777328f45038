"""How the rows of one batch are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.batch import Batch, BatchKind, Chunk, plan_batch
from trio_runner.core.prompt import Media, MediaRow


@st.composite
def requests(draw: st.DrawFn) -> list[Chunk]:
    """Chunks that ask for rows, of sequences that decode and of prompts."""
    decoding = draw(st.lists(st.booleans(), max_size=8))
    return [
        Chunk(
            uid=100 + i,
            slot=i,
            start=draw(st.integers(0, 50)),
            items=(0,) if decodes else tuple(range(draw(st.integers(1, 12)))),
            output=decodes or draw(st.booleans()),
            encoder_tokens=draw(st.sampled_from([(), (1, 2)])),
            decoding=decodes,
        )
        for i, decodes in enumerate(decoding)
    ]


def rows(chunks: tuple[Chunk, ...]) -> dict[int, int]:
    return {chunk.uid: len(chunk.items) for chunk in chunks}


@given(requests(), st.integers(1, 20), st.integers(1, 20))
def test_a_batch_is_filled_and_not_overfilled(asked: list[Chunk], max_rows: int, prompt_rows: int) -> None:
    chunks = plan_batch(iter(asked), max_rows=max_rows, prompt_rows=prompt_rows)
    by_uid = {chunk.uid: chunk for chunk in asked}
    assert len(rows(chunks)) == len(chunks), "two chunks of one sequence"
    # No row too many, and none wasted while a sequence whose turn it is could use it.
    in_turn = asked[:max_rows]
    n_decoding = sum(chunk.decoding for chunk in in_turn)
    n_prompts = sum(len(chunk.items) for chunk in in_turn if not chunk.decoding)
    assert Batch(chunks).n_rows == n_decoding + min(max_rows - n_decoding, prompt_rows, n_prompts)
    for chunk in chunks:
        wanted = by_uid[chunk.uid]
        assert chunk.items
        assert (chunk.slot, chunk.start, chunk.position) == (wanted.slot, wanted.start, wanted.start)
        assert chunk.encoder_tokens == wanted.encoder_tokens
        assert chunk.items == wanted.items[: len(chunk.items)]
        assert chunk.stop == wanted.start + len(chunk.items)
        assert chunk.output == (wanted.output and len(chunk.items) == len(wanted.items))
        assert chunk.decoding == wanted.decoding


@given(requests(), st.integers(1, 20), st.integers(1, 20))
def test_sequences_that_decode_come_first_and_each_prompt_gets_its_share(
    asked: list[Chunk], max_rows: int, prompt_rows: int
) -> None:
    chunks = plan_batch(asked, max_rows=max_rows, prompt_rows=prompt_rows)
    got = rows(chunks)
    in_turn = asked[:max_rows]
    decoding = [chunk.uid for chunk in in_turn if chunk.decoding]
    remain = min(max_rows - len(decoding), prompt_rows)
    prefilling = [chunk for chunk in in_turn if not chunk.decoding][:remain]
    # None is left out while the rows suffice, and then those whose turn is last.
    assert [chunk.uid for chunk in chunks] == decoding + [chunk.uid for chunk in prefilling]
    assert all(got[uid] == 1 for uid in decoding)
    # A prompt that did not get all that it asked for got as much as any other, but for the row that cannot be split.
    most = max((got[chunk.uid] for chunk in prefilling), default=0)
    assert all(got[chunk.uid] >= min(len(chunk.items), most - 1) for chunk in prefilling)


def prompt(uid: int, n_rows: int, *, whole: bool = False) -> Chunk:
    return Chunk(uid, uid, 0, (0,) * n_rows, output=True, whole=whole)


def shares(*lengths: int, max_rows: int = 512, prompt_rows: int = 512, n_decoding: int = 0) -> list[int]:
    """The rows that prompts of these lengths get, beside sequences that decode."""
    asked = [prompt(i, n) for i, n in enumerate(lengths)]
    asked += [Chunk(100 + i, 100 + i, 7, (0,), output=True, decoding=True) for i in range(n_decoding)]
    got = rows(plan_batch(asked, max_rows=max_rows, prompt_rows=prompt_rows))
    assert all(got[100 + i] == 1 for i in range(n_decoding))
    return [got.get(i, 0) for i in range(len(lengths))]


def test_shares() -> None:
    assert shares(100, max_rows=8) == [8]
    assert shares(100, 100, max_rows=8) == [4, 4]
    assert shares(100, 2, max_rows=8) == [6, 2]
    assert shares(1, 100, 100, max_rows=9) == [1, 4, 4]
    assert shares(3, 3, max_rows=8) == [3, 3]
    assert shares(100, 100, max_rows=9) == [5, 4]


def test_prompts_get_no_more_rows_than_prompts_may_have() -> None:
    assert shares(5000, prompt_rows=40) == [40]
    assert shares(5000, prompt_rows=40, n_decoding=3) == [40]
    assert shares(5000, max_rows=40, prompt_rows=40, n_decoding=3) == [37]
    assert shares(5000, 5000, 1, prompt_rows=41) == [20, 20, 1]
    # With fewer rows than prompts, those whose turn it is get one.
    assert shares(9, 9, 9, 9, 9, prompt_rows=2, n_decoding=1) == [1, 1, 0, 0, 0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(12, 20), st.integers(1, 20))
def test_a_chunk_that_stays_whole_is_not_divided(lengths: list[int], max_rows: int, prompt_rows: int) -> None:
    asked = [prompt(i, n, whole=True) for i, n in enumerate(lengths)]
    got = rows(plan_batch(asked, max_rows=max_rows, prompt_rows=prompt_rows))
    assert all(n_rows == lengths[uid] for uid, n_rows in got.items())
    assert 0 in got, "the first one does not get on"
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
