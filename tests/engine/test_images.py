"""Images in prompts: what the model gets to see."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.engine.seeing import (
    ARRANGEMENTS,
    KINDS,
    A,
    B,
    C,
    Parts,
    by_parts,
    by_tags,
    said,
    seeing,
    text_of,
)
from tests.engine.toys import (
    Toy,
    items_of,
)
from trio_runner.core.prompt import fit_prompt
from trio_runner.engine.generation import Generation
from trio_runner.errors import (
    PromptTooLong,
)
from trio_runner.events import PromptProgress
from trio_runner.image_source import ImageSource
from trio_runner.testing import toy_text


@pytest.mark.parametrize("ask", [by_parts, by_tags])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_text_is_that_of_the_model_for_texts_and_images(
    toy: Toy, parts: Parts, kind: str, ask: Callable[..., Generation]
) -> None:
    projector = seeing(toy, kind)
    async with toy.engine(batch_size=8) as engine:
        text = await ask(engine, parts, max_tokens=20).collect()
    assert text == said(projector, parts)


PARTS = st.lists(st.text("a1[]-img ", max_size=8) | st.sampled_from([A, B, C]), min_size=1, max_size=8).filter(any)


@given(PARTS, st.sampled_from(list(KINDS)), st.integers(1, 20))
async def test_any_mix_of_texts_and_images(parts: Parts, kind: str, batch_size: int) -> None:
    """In a list, no text is a tag. Where an image may be divided, no batch is too small for it."""
    toy = Toy()
    projector = seeing(toy, kind)
    batch_size = batch_size if kind in ("plain", "tiles") else max(batch_size, 6)
    async with toy.engine(batch_size=batch_size) as engine:
        assert await text_of(engine, parts) == said(projector, parts)
    toy.check_closed()


@given(PARTS, st.sampled_from(list(KINDS)), st.integers(8, 30), st.integers(-1, 30))
async def test_truncation_never_cuts_an_image_in_half(
    parts: Parts, kind: str, context_length: int, n_keep: int
) -> None:
    toy = Toy()
    items = items_of(seeing(toy, kind), parts)
    async with toy.engine(context_length=context_length) as engine:
        generation = engine.generate(parts, truncate=True, n_keep=n_keep, max_tokens=1)
        fitted = fit_prompt(items, n_ctx=context_length, n_keep=n_keep, adds_bos=False, truncate=True).items
        assert await generation.collect() == toy_text(fitted, 1)
        if len(items) > context_length:
            with pytest.raises(PromptTooLong) as caught:
                await engine.generate(parts).start()
            assert (caught.value.n_prompt, caught.value.param) == (len(items), "prompt")
    toy.check_closed()


@pytest.mark.parametrize("parts", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_special_tokens_stand_around_all_parts_together(toy: Toy, parts: Parts) -> None:
    projector = seeing(toy)
    toy.info = {"token_bos": 2, "adds_bos": True, "token_eos": 3, "adds_eos": True}
    async with toy.engine() as engine:
        text = await text_of(engine, parts)
    assert text == toy_text([2, *items_of(projector, parts), 3], 20)


async def test_another_image_gives_another_text(toy: Toy) -> None:
    seeing(toy)
    questions: list[Parts] = [[A, "?"], [B, "?"], ["?", A], [A, B], [B, A], [A, A], [A], ["?"]]
    async with toy.engine() as engine:
        texts = [await text_of(engine, parts) for parts in questions]
    assert len(set(texts)) == len(questions)


async def test_only_the_pixels_count(toy: Toy, tmp_path: Path) -> None:
    """Neither the file format nor the type of the source does."""
    projector = seeing(toy)
    image = Image.open(BytesIO(A))
    bitmap = BytesIO()
    image.save(bitmap, "BMP")
    (tmp_path / "picture.png").write_bytes(A)
    sources: list[ImageSource] = [A, bitmap.getvalue(), tmp_path / "picture.png", image]
    async with toy.engine() as engine:
        texts = [await text_of(engine, [source, "?"]) for source in sources]
    assert texts == [said(projector, [A, "?"])] * len(sources)
    assert len(projector.encoded) == 1


async def test_of_two_images_with_the_same_id_the_first_counts(toy: Toy) -> None:
    projector = seeing(toy)
    async with toy.engine() as engine:
        generation = engine.generate("[img-1]?", image_data=[(1, A), (1, B)], max_tokens=20)
        assert await generation.collect() == said(projector, [A, "?"])


@pytest.mark.parametrize("prompt", ["[img-] [img-x] [img -1] [img-12345678901]", "img-1", "[img-", "[[img]-1]"])
async def test_what_only_looks_like_a_tag_is_text(toy: Toy, prompt: str) -> None:
    seeing(toy)
    async with toy.engine() as engine:
        assert await engine.generate(prompt, max_tokens=20).collect() == toy_text(prompt, 20)


@pytest.mark.parametrize("prompt", ["[img-1]", "see [img-0] and [img-1]"])
async def test_without_a_projector_tags_are_text(toy: Toy, prompt: str) -> None:
    async with toy.engine() as engine:
        assert not engine.has_projector
        assert await engine.generate(prompt, max_tokens=20).collect() == toy_text(prompt, 20)
        assert await engine.generate([prompt, " and more"], max_tokens=20).collect() == toy_text(
            f"{prompt} and more", 20
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_progress_counts_rows(toy: Toy, kind: str) -> None:
    parts: Parts = ["look: ", A, B, "?"]
    n_items = len(items_of(seeing(toy, kind), parts))
    async with toy.engine(batch_size=8) as engine:
        events = [event async for event in engine.generate(parts, max_tokens=1, progress=True)]
    counts = [event.n_decoded for event in events if isinstance(event, PromptProgress)]
    assert counts == sorted(counts)
    assert counts[-1] == n_items
    assert all(event.n_prompt == n_items for event in events if isinstance(event, PromptProgress))
