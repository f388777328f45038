"""A device computes the same as the CPU, except for rounding. Both decode the same tokens, and the log-probabilities of
the next ones are compared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.pictures import PAIRS, open_pair, picture, rows_of
from tests.llama.running import Running
from tests.placing import placed
from tests.tiny_models import GENERATIVE
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Trim
from trio_runner.errors import EngineClosed
from trio_runner.sampling import SamplingParams

Models = Callable[[str], Path]

TOLERANCE = 0.1
"""Nats by which log-probabilities may differ. The tiny models are sensitive: ggml's attention on the CPU without flash
attention rounds factors to half precision, which changed them by up to 0.05. One other token in the prompt changes
them by 0.6 and more, and the tests check that it does."""
LIKELY = -7.0
"""Least log-probability of the tokens that are compared. Logits far below the best one mean nothing."""
PARAMS = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=20)
TEXT = "the story of the world and more than a window of thirty-two tokens in this one prompt"


def tell(running: Running, tokens: Sequence[int], chosen: Sequence[Sampled] = (), *, slot: int = 0) -> list[Sampled]:
    """Decode `tokens` in an empty slot, then go on. See `go_on`."""
    assert running.context.apply(Trim(slot, 0))
    return go_on(running, tokens[-1], running.prefill(tokens[:-1], slot=slot, rows=20), chosen, slot=slot)


def go_on(
    running: Running, token: int, position: int, chosen: Sequence[Sampled] = (), *, slot: int = 0
) -> list[Sampled]:
    """Decode `token` at `position` and sample, eight times. Continue with `chosen`, or with the sampled tokens."""
    sampler = running.sampler(PARAMS)
    result: list[Sampled] = []
    for n in range(len(chosen) or 8):
        step = running.step(Chunk(0, slot, position + n, (token,), output=True), samplers={0: sampler})
        assert step.outcome is DecodeOutcome.OK, step.message
        result.append(step.sampled[0])
        token = (chosen or result)[n].token
    return result


def distance(one: Sequence[Sampled], other: Sequence[Sampled]) -> float:
    """The greatest difference between the log-probabilities of likely tokens."""
    result = 0.0
    for here, there in zip(one, other, strict=True):
        known = {info.token: info.logprob for info in there.top}
        least = min(known.values())
        for info in here.top:
            if info.logprob > LIKELY:  # one that the other did not report is at most as likely as its least
                result = max(result, abs(info.logprob - known.get(info.token, min(info.logprob, least))))
    return result


def check_same(one: Sequence[Sampled], other: Sequence[Sampled], tolerance: float = TOLERANCE) -> None:
    """Check that log-probabilities agree, and tokens too unless the two best ones are close."""
    assert distance(one, other) < tolerance
    for here, there in zip(one, other, strict=True):
        best, second = here.top[:2]
        assert here.token == there.token or best.logprob - second.logprob < 2 * tolerance


def on_cpu(path: Path, **config: Any) -> Running:
    """The model at `path` on the CPU."""
    with placed():
        return Running(path, **config)


@pytest.mark.parametrize("name", GENERATIVE)
def test_text_agrees(models: Models, name: str) -> None:
    cpu, device = on_cpu(models(name)), Running(models(name))
    tokens = cpu.tokens(TEXT)[:60]
    expected = tell(cpu, tokens)
    check_same(expected, tell(device, tokens, expected))
    check_same(expected, tell(device, tokens, expected, slot=1))
    # One other token in the prompt would be noticed.
    assert (
        name == "chain" or distance(expected, tell(device, [*tokens[:-3], 5, *tokens[-2:]], expected)) > 5 * TOLERANCE
    )


@pytest.mark.parametrize("name", ["llama", "swa", "mamba", "lfm2"])
def test_text_agrees_with_some_layers_on_the_device(models: Models, name: str) -> None:
    cpu = on_cpu(models(name))
    tokens = cpu.tokens(TEXT)[:40]
    expected = tell(cpu, tokens)
    for n_layers in (1, 2):
        check_same(expected, tell(Running(models(name), gpu_layers=n_layers), tokens, expected))


@pytest.mark.parametrize("config", [{"kv_type": "f16"}, {"flash_attention": "off"}])
def test_other_settings_agree(models: Models, config: dict[str, Any]) -> None:
    cpu, device = on_cpu(models("mrope"), **config), Running(models("mrope"), **config)
    tokens = cpu.tokens(TEXT)[:40]
    expected = tell(cpu, tokens)
    check_same(expected, tell(device, tokens, expected))


def test_adapters_agree(models: Models) -> None:
    adapters = (AdapterConfig(str(models("lora")), 0.7), AdapterConfig(str(models("lora-b")), 0.0))
    cpu, device = (opened(models("llama"), adapters=adapters) for opened in (on_cpu, Running))
    tokens = cpu.tokens()
    plain = tell(on_cpu(models("llama")), tokens)
    for chosen in (((0, 0.7),), ((0, 1.0), (1, 1.0)), ()):
        cpu.adapter_set = device.adapter_set = chosen
        expected = tell(cpu, tokens)
        check_same(expected, tell(device, tokens, expected))
        assert not chosen or distance(tell(cpu, tokens, plain), plain) > 5 * TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_images_agree(models: Models, name: str) -> None:
    device = open_pair(models, name)
    with placed():
        cpu = open_pair(models, name)
    here, there = (running.projector.encoding(picture(seed=1)).run() for running in (cpu, device))
    assert here.items == there.items
    for media, encoded in here.media.items():
        size = np.abs(encoded.rows).max()
        np.testing.assert_allclose(there.media[media].rows, encoded.rows, atol=0.01 * size)
    question = cpu.tokens(" and the answer")
    for running in (cpu, device):
        assert running.context.apply(Trim(0, 0))
        end = running.place((*here.items, *question[:-1]), here.media)  # the same rows: compared above
    expected = go_on(cpu, question[-1], end)
    check_same(expected, go_on(device, question[-1], end, expected))


def test_encoding_can_be_cancelled(models: Models) -> None:
    """How long encoding takes is not known, so shorter and shorter delays are tried."""
    projector = open_pair(models, "mrope", batch_size=256).projector
    pixels = picture(224, 224)
    expected = rows_of(projector.encoding(pixels).run())
    delay, n_cancelled = 0.02, 0
    while not n_cancelled:
        encoding = projector.encoding(pixels)
        timer = threading.Timer(delay, encoding.cancel)
        timer.start()
        try:
            encoding.run()
        except EngineClosed:
            n_cancelled += 1
        timer.join()
        delay /= 2
    np.testing.assert_array_equal(rows_of(projector.encoding(pixels).run()), expected)


def read_and_tell(running: Running, text: str, chosen: Sequence[Sampled] = ()) -> list[Sampled]:
    """What a model with an encoder and a decoder samples for `text`. See `go_on`."""
    source, token = tuple(running.tokens(text)), running.capabilities.decoder_start
    assert token is not None
    assert running.context.apply(Trim(0, 0))
    sampler, result = running.sampler(PARAMS), list[Sampled]()
    for position in range(len(chosen) or 8):
        chunk = Chunk(0, 0, position, (token,), output=True, encoder_tokens=source)
        result.append(running.step(chunk, samplers={0: sampler}).sampled[0])
        token = (chosen or result)[position].token
    return result


def test_encoder_and_decoder_agree(models: Models) -> None:
    """Its attention has no scale, and its values are rounded to half precision, so the tolerance is larger."""
    cpu, device = on_cpu(models("t5")), Running(models("t5"))
    expected = read_and_tell(cpu, "hello")
    check_same(expected, read_and_tell(device, "hello", expected), 2 * TOLERANCE)
    assert distance(expected, read_and_tell(device, "hella", expected)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["bert", "bert-cls", "rerank", "qwen-embed", "llama"])
def test_embeddings_agree(models: Models, name: str) -> None:
    texts = ("hello", "the model and the answer", "system and user " * 3)
    cpu, device = on_cpu(models(name)), Running(models(name))

    def vectors(running: Running, *chosen: str) -> list[Any]:
        lanes = range(running.capabilities.first_embed_slot, running.capabilities.first_embed_slot + len(chosen))
        for lane in lanes:
            assert running.context.apply(Trim(lane, 0))
        chunks = [
            Chunk(lane, lane, 0, tuple(running.tokens(text)), output=True)
            for lane, text in zip(lanes, chosen, strict=True)
        ]
        result = running.step(*chunks, embeddings=True)
        assert result.outcome is DecodeOutcome.OK, result.message
        return [result.embeddings[lane] for lane in lanes]

    expected = [vectors(cpu, text)[0] for text in texts]
    size = max(np.abs(vector).max() for vector in expected)
    for found in ([vectors(device, text)[0] for text in texts], vectors(device, *texts[:2])):
        for one, other in zip(expected, found):  # noqa: B905, as many as there are
            np.testing.assert_allclose(one, other, atol=0.01 * size)
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * size
