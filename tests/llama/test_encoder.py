"""Models with an encoder beside their decoder: what the encoder reads, for which slots, and when it reads again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.running import Running
from tests.llama.shim import Shim
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.errors import LoadError
from trio_runner.llama.library import last_error
from trio_runner.sampling import SamplingParams

Models = Callable[[str], Path]

SOURCES = ("the model and the answer", "hello world", "a story of the world and the system")


@pytest.fixture
def running(models: Models) -> Running:
    return Running(models("t5"), slots=3)


def generate(running: Running, *sources: str, n_tokens: int = 10, slots: tuple[int, ...] = ()) -> list[list[int]]:
    """Generate texts for all sources together, each in a slot of its own."""
    lanes = slots or tuple(range(len(sources)))
    read = [tuple(running.tokens(source)) for source in sources]
    samplers = {lane: running.sampler() for lane in lanes}
    for lane in lanes:
        assert running.context.apply(Trim(lane, 0))
    texts: list[list[int]] = [[] for _ in sources]
    token = running.capabilities.decoder_start
    assert token is not None
    for position in range(n_tokens):
        chunks = [
            Chunk(lane, lane, position, ((text[-1] if text else token),), output=True, encoder_tokens=source)
            for lane, text, source in zip(lanes, texts, read, strict=True)
        ]
        result = running.step(*chunks, samplers=samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
        for lane, text in zip(lanes, texts, strict=True):
            text.append(result.sampled[lane].token)
    return texts


def test_capabilities(running: Running) -> None:
    capabilities = running.capabilities
    assert capabilities.decoder_start == 0
    assert capabilities.can_generate
    assert capabilities.can_trim
    assert capabilities.can_shift
    assert capabilities.n_ctx == 256
    assert not running.context.takes_rows
    assert running.tokens("hello")[-1] == 2  # texts for the encoder end with EOS


def test_positions_end_only_with_the_cache(models: Models) -> None:
    """The model knows distances only, so no table limits the positions."""
    assert Running(models("t5"), context_length=4096).capabilities.n_ctx == 4096


def test_text_depends_only_on_the_encoder_tokens(running: Running) -> None:
    alone = [generate(running, source)[0] for source in SOURCES]
    assert len({tuple(text) for text in alone}) == len(SOURCES)
    assert [generate(running, source)[0] for source in SOURCES] == alone
    assert generate(running, SOURCES[0], slots=(3,)) == alone[:1]
    assert generate(running, *SOURCES) == alone
    assert generate(running, *reversed(SOURCES)) == alone[::-1]


def test_the_encoder_reads_again_when_it_must_and_only_then(running: Running) -> None:
    context = running.context
    expected = [generate(running, source)[0] for source in SOURCES]
    before = context.n_encoder_runs

    def has_read() -> tuple[int, set[int]]:
        """How often the encoder has run since then, and the slots that it has read for."""
        return context.n_encoder_runs - before, set(context.encoder_tokens)

    assert generate(running, *SOURCES) == expected
    assert has_read() == (1, {0, 1, 2})
    assert generate(running, SOURCES[1], slots=(1,)) == expected[1:2]
    assert has_read() == (1, {0, 1, 2})  # what slot 1 needs is still there
    assert generate(running, SOURCES[1]) == expected[1:2]
    assert has_read() == (2, {0})
    assert generate(running, *SOURCES[:2]) == expected[:2]
    assert has_read() == (3, {0, 1})
    assert generate(running, SOURCES[2]) == expected[2:]
    assert has_read() == (4, {0})


def source_of(running: Running, slot: int) -> tuple[int, ...]:
    return tuple(running.tokens(SOURCES[slot]))


def test_slots_with_the_same_encoder_tokens_can_share_cells(running: Running) -> None:
    source = source_of(running, 0)
    (expected,) = generate(running, SOURCES[0])
    assert running.context.apply(Trim(1, 0))
    assert running.context.apply(Copy(0, 1, 6))
    chunk = Chunk(1, 1, 6, (expected[5],), output=True, encoder_tokens=source)
    result = running.step(chunk, samplers={1: running.sampler()})
    assert result.sampled[1].token == expected[6]


def test_trim_goes_back_to_an_earlier_position(running: Running) -> None:
    source = source_of(running, 0)
    (expected,) = generate(running, SOURCES[0])
    assert running.context.apply(Trim(0, 4))
    chunk = Chunk(0, 0, 4, (expected[3],), output=True, encoder_tokens=source)
    assert running.step(chunk, samplers={0: running.sampler()}).sampled[0].token == expected[4]


def test_slide_renumbers_the_remaining_positions(running: Running) -> None:
    """Keys do not depend on their positions, only the bias depends on distances. So the same text further on gives the
    same result, whether it was decoded there or has been moved there."""
    tokens = tuple(running.tokens("the story of the world and the model"))[:-1]
    source = source_of(running, 0)

    def logprob(begin: int, *, slide: int = 0) -> float:
        assert running.context.apply(Trim(0, 0))
        running.step(Chunk(0, 0, 0, tokens, output=False, offset=begin, encoder_tokens=source))
        end = begin + len(tokens)
        if slide:
            assert running.context.apply(Slide(0, begin, end, -slide))
        chunk = Chunk(0, 0, len(tokens), (5,), output=True, offset=end - slide - len(tokens), encoder_tokens=source)
        params = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=0)
        step = running.step(chunk, samplers={0: running.sampler(params)})
        assert step.outcome is DecodeOutcome.OK, step.message
        return step.sampled[0].logprob

    expected = logprob(0)
    assert logprob(7) == pytest.approx(expected, abs=1e-5)
    assert logprob(7, slide=7) == pytest.approx(expected, abs=1e-5)
    assert logprob(9, slide=2) == pytest.approx(expected, abs=1e-5)


def test_an_abort_before_the_encoder_runs_changes_nothing(running: Running) -> None:
    expected = generate(running, *SOURCES[:2])
    assert running.context.apply(Trim(0, 0))
    running.context.abort(5)
    chunk = Chunk(0, 0, 0, (0,), output=True, encoder_tokens=source_of(running, 2))
    result = running.step(chunk, samplers={0: running.sampler()}, number=5)
    assert (result.outcome, result.kept) == (DecodeOutcome.ABORTED, {0: 0})
    assert generate(running, *SOURCES[:2]) == expected


def test_an_abort_while_the_encoder_runs(models: Models) -> None:
    running = Running(models("t5"), slots=1, batch_size=512, context_length=600)
    tokens = tuple((running.tokens("the story of the world and the answer of the model ")[:-1] * 60)[:512])
    started = threading.Event()

    def abort() -> None:
        started.wait(10)
        running.context.abort(1)

    thread = threading.Thread(target=abort)
    thread.start()
    outcome = DecodeOutcome.OK
    n_steps = 0
    while outcome is DecodeOutcome.OK:
        assert running.context.apply(Trim(0, 0))
        started.set()
        n_steps += 1
        source = (*tokens[:-1], 5 + n_steps % 2)  # different ones, or the encoder would not read again
        result = running.step(Chunk(0, 0, 0, (0,), output=False, encoder_tokens=source), number=1)
        outcome = result.outcome
    thread.join()
    assert outcome is DecodeOutcome.ABORTED
    assert generate(running, SOURCES[0], n_tokens=3)


def test_encoder_tokens_of_all_slots_must_fit_into_a_batch(running: Running) -> None:
    source = (5,) * 40
    one = Chunk(0, 0, 0, (0,), output=False, encoder_tokens=source)
    assert running.step(one).outcome is DecodeOutcome.OK
    result = running.step(one, Chunk(1, 1, 0, (0,), output=False, encoder_tokens=source))
    assert result.outcome is DecodeOutcome.INVALID
    assert "80 rows" in result.message


def test_a_model_with_a_decoder_gives_no_embeddings(running: Running) -> None:
    chunk = Chunk(0, 0, 0, (0,), output=True, encoder_tokens=(5, 2))
    result = running.step(chunk, embeddings=True)
    assert result.outcome is DecodeOutcome.INVALID
    assert "no embeddings" in result.message


def test_flash_attention_is_not_used(models: Models) -> None:
    """Flash attention takes no bias, so this model cannot have a quantised KV cache."""
    expected = generate(Running(models("t5")), SOURCES[0])
    assert generate(Running(models("t5"), flash_attention="on"), SOURCES[0]) == expected
    with pytest.raises(LoadError, match="no context"):
        Running(models("t5"), kv_type="q8_0", flash_attention="on")


# ---- hostile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrays",
    [
        {"n_rows": 0},
        {"n_rows": -1},
        {"n_rows": 65},
        {"n_rows": 2**31 - 1},
        {"tokens": None},
        {"positions": None},
        {"seqs": None},
        {"tokens": [-1, 5]},
        {"tokens": [5, 2**30]},
        {"positions": [1, 2]},
        {"positions": [0, 0]},
        {"positions": [0, 2]},
        {"positions": [-1, 0]},
        {"positions": [0, 2**31 - 1]},
        {"seqs": [0, 1]},
        {"seqs": [-1, -1]},
        {"seqs": [99, 99]},
    ],
)
def test_wrong_batches_are_refused(running: Running, arrays: dict[str, Any]) -> None:
    shim = Shim(running)
    expected = generate(running, SOURCES[0])
    shim.refused("trio_encode", shim.context, shim.encoder_batch(**arrays))
    assert generate(running, SOURCES[0]) == expected


def test_nothing_is_decoded_before_the_encoder_has_run(running: Running) -> None:
    shim = Shim(running)
    outputs = shim.ffi.new("int8_t[]", 2)
    raw = shim.encoder_batch(seqs=[1, 1])
    assert shim.lib.trio_encode(running.context.handle, raw) == 0
    for seq, code in ((0, shim.lib.TRIO_E_INVALID), (1, 0)):
        raw = shim.encoder_batch(seqs=[seq, seq])
        raw.outputs = outputs
        assert shim.lib.trio_step(running.context.handle, raw, shim.ffi.NULL, shim.ffi.NULL) == code
    inputs = np.zeros((2, 64), np.float32)
    for function in ("trio_encode", "trio_step"):
        raw = shim.encoder_batch(tokens=None, seqs=[1, 1], positions=[2, 3])
        raw.outputs, raw.inputs = outputs, shim.ffi.from_buffer("float[]", inputs)
        arguments = (shim.ffi.NULL,) * 2 if function == "trio_step" else ()
        assert getattr(shim.lib, function)(running.context.handle, raw, *arguments) == shim.lib.TRIO_E_INVALID


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_without_an_encoder_refuse_to_encode(models: Models, name: str) -> None:
    running = Running(models(name))
    shim = Shim(running)
    raw = shim.encoder_batch()
    assert shim.lib.trio_encode(running.context.handle, raw) == shim.lib.TRIO_E_INVALID
    assert "no encoder" in last_error()
    assert shim.lib.trio_encode(running.context.handle, shim.ffi.NULL) == shim.lib.TRIO_E_INVALID
    assert shim.lib.trio_encode(shim.ffi.NULL, raw) == shim.lib.TRIO_E_INVALID
    assert running.capabilities.decoder_start is None
