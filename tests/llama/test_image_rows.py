"""Rows of images in a context: text depends on them as it depends on tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llama.pictures import ALL, PAIRS, Models, media_of, open_pair, picture
from tests.llama.running import Running, tokens_of
from tests.placing import device_number
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Copy, Trim
from trio_runner.core.ports import EncodedImage
from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.sampling import SamplingParams


def say(
    running: Running, items: tuple[Item, ...], image: EncodedImage, *, slot: int = 0, n_tokens: int = 12
) -> list[int]:
    """Decode `items` and a question after them, and generate."""
    assert running.context.apply(Trim(slot, 0))
    question = running.tokens(" and the answer")
    position = running.place((*items, *question[:-1]), image.media, slot=slot)
    return tokens_of(running.go_on(question[-1], position, n_tokens, slot=slot))


@pytest.mark.parametrize("name", ALL)
def test_text_depends_on_the_image(models: Models, name: str) -> None:
    running = open_pair(models, name)
    before = tuple(running.tokens("the story of"))
    texts = []
    for seed in (1, 2, 1):
        image = running.projector.encoding(picture(seed=seed)).run()
        texts.append(say(running, (*before, *image.items), image))
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    image = running.projector.encoding(picture(seed=1)).run()
    assert say(running, (*before, *image.items), image, slot=1) == texts[0]
    assert say(running, image.items, image) != texts[0]


@pytest.mark.parametrize("name", ALL)
def test_an_image_alone_and_beside_another(models: Models, name: str) -> None:
    """Two images of two sequences in one batch: each sequence generates the same text as alone."""
    running = open_pair(models, name)
    images = [running.projector.encoding(picture(seed=seed)).run() for seed in (1, 2)]
    parts = [media_of(image)[0] for image in images]
    media = {**images[0].media, **images[1].media}
    question = running.tokens(" and the answer")

    def sample(slots: list[int]) -> dict[int, list[int]]:
        for slot in (0, 1):
            assert running.context.apply(Trim(slot, 0))
        rows = [tuple(MediaRow(part, row) for row in range(part.n_rows)) for part in parts]
        result = running.step(*(Chunk(slot, slot, 0, rows[slot], output=False) for slot in slots), media=media)
        assert result.outcome is DecodeOutcome.OK, result.message
        texts = {}
        for slot in slots:
            position = parts[slot].n_positions
            for token in question[:-1]:
                position = running.prefill([token], slot=slot, start=position)
            texts[slot] = tokens_of(running.go_on(question[-1], position, 8, slot=slot))
        return texts

    assert sample([0, 1]) == {**sample([0]), **sample([1])}


@pytest.mark.parametrize("name", ["llama", "tiles"])
def test_causal_rows_may_be_split_into_any_batches(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    media = media_of(image)[0]
    rows = tuple(MediaRow(media, row) for row in range(media.n_rows))

    def sampled(n_rows: int) -> Sampled:
        assert running.context.apply(Trim(0, 0))
        for begin in range(0, len(rows), n_rows):
            part = rows[begin : begin + n_rows]
            ends = begin + len(part) == len(rows)
            samplers = {0: running.sampler(SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=5))}
            result = running.step(Chunk(0, 0, begin, part, output=ends), samplers=samplers, media=image.media)
            assert result.outcome is DecodeOutcome.OK, result.message
        return result.sampled[0]

    whole = sampled(len(rows))
    for n_rows in (1, 3):
        portions = sampled(n_rows)
        assert portions.token == whole.token
        is_cpu = device_number() is None
        assert abs(portions.logprob - whole.logprob) <= (0.0 if is_cpu else 1e-3)  # GPUs round by the number of rows


@pytest.mark.parametrize("name", ALL)
def test_copy_and_trim_know_where_an_image_ends(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    question, other = running.tokens(" and the answer"), running.tokens(" or a story")
    assert running.context.apply(Trim(0, 0))
    end = running.place(image.items, image.media)
    for text in (question, other, question):
        assert running.context.apply(Trim(0, end))
        assert running.context.apply(Trim(1, 0))
        assert running.context.apply(Copy(0, 1, end))
        position = running.prefill(text[:-1], slot=1, start=end)
        forked = tokens_of(running.go_on(text[-1], position, 8, slot=1))
        position = running.prefill(text[:-1], start=end)
        assert tokens_of(running.go_on(text[-1], position, 8)) == forked


@pytest.mark.parametrize("name", ALL)
def test_an_aborted_image_leaves_nothing(models: Models, name: str) -> None:
    running = open_pair(models, name)
    image = running.projector.encoding(picture()).run()
    expected = say(running, image.items, image)
    media = media_of(image)[0]
    assert running.context.apply(Trim(0, 0))
    running.context.abort(3)
    rows = tuple(MediaRow(media, row) for row in range(media.n_rows))
    result = running.step(Chunk(0, 0, 0, rows, output=False), media=image.media, number=3)
    assert (result.outcome, result.kept) == (DecodeOutcome.ABORTED, {0: 0})
    assert say(running, image.items, image) == expected


def test_non_causal_rows_see_later_rows(models: Models) -> None:
    """With the same rows, causal attention gives another text. Text without an image stays the same."""
    running = open_pair(models, "swa")
    text = tokens_of(running.generate("the model"))
    image = running.projector.encoding(picture()).run()
    (media,) = image.media
    back = Media(media.key, media.n_rows, media.n_positions, causal=True)
    items = tuple(MediaRow(back, item.row) if isinstance(item, MediaRow) else item for item in image.items)
    both = say(running, image.items, image)
    assert say(running, items, EncodedImage(items, {back: image.media[media]})) != both
    assert say(running, image.items, image) == both
    assert tokens_of(running.generate("the model")) == text


def logprobs(running: Running, image: EncodedImage) -> list[float]:
    running.context.apply(Trim(0, 0))
    position = running.place(image.items, image.media)
    params = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=0)
    return [sampled.logprob for sampled in running.go_on(5, position, 8, params=params)]


@pytest.mark.parametrize("name", ["swa", "mrope", "tiles"])
def test_our_attention_agrees_with_upstreams(models: Models, name: str) -> None:
    """Upstream's runs in a process of its own, because the environment is read once."""
    paths = [str(models(name)), str(models(PAIRS[name]))]
    program = (
        "import sys; from pathlib import Path; from tests.llama.test_image_rows import *;"
        "running = Running(Path(sys.argv[1]), projector=Path(sys.argv[2]), kv_type='f16');"
        "print(logprobs(running, running.projector.encoding(picture()).run()))"
    )
    environment = {**os.environ, "TRIO_RUNNER_ATTENTION": "ggml", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    theirs = [float(number) for number in done.stdout.strip("[]\n").split(",")]
    running = open_pair(models, name, kv_type="f16")
    assert logprobs(running, running.projector.encoding(picture()).run()) == pytest.approx(theirs, abs=0.1)


def test_rows_work_with_several_threads_and_any_kv_cache(models: Models) -> None:
    for config in ({"threads": 2}, {"flash_attention": "off"}, {"flash_attention": "on", "kv_type": "f16"}):
        running = open_pair(models, "swa", **config)
        image = running.projector.encoding(picture()).run()
        assert len(say(running, image.items, image, n_tokens=4)) == 4
