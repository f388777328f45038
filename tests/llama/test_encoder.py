"""Models with an encoder beside their decoder: what it reads, for whom, and when it has to read again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.running import Running
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.errors import LoadError
from trio_runner.llama.library import last_error, native
from trio_runner.request import SamplingParams

Models = Callable[[str], Path]

SOURCES = ("the model and the answer", "hello world", "a story of the world and the system")


@pytest.fixture
def running(models: Models) -> Running:
    return Running(models("t5"), slots=3)


def generate(running: Running, *sources: str, n_tokens: int = 10, slots: tuple[int, ...] = ()) -> list[list[int]]:
    """All of them together, one in each slot."""
    lanes = slots or tuple(range(len(sources)))
    read = [tuple(running.tokens(source)) for source in sources]
    samplers = {lane: running.sampler() for lane in lanes}
    for lane in lanes:
        assert running.context.apply(Trim(lane, 0))
    texts: list[list[int]] = [[] for _ in sources]
    token = running.limits.decoder_start
    assert token is not None
    for position in range(n_tokens):
        chunks = [
            Chunk(lane, lane, position, ((text[-1] if text else token),), output=True, source=source)
            for lane, text, source in zip(lanes, texts, read, strict=True)
        ]
        result = running.step(*chunks, samplers=samplers)
        assert result.outcome is DecodeOutcome.OK, result.message
        for lane, text in zip(lanes, texts, strict=True):
            text.append(result.sampled[lane].token)
    return texts


def test_limits(running: Running) -> None:
    limits = running.limits
    assert limits.decoder_start == 0
    assert limits.can_generate
    assert limits.can_trim
    assert limits.can_shift
    assert limits.n_ctx == 256
    assert not running.context.takes_rows
    assert running.tokens("hello")[-1] == 2  # what an encoder reads ends with EOS


def test_positions_have_no_end_but_that_of_the_cache(models: Models) -> None:
    """Distances count, not places: no table limits them."""
    assert Running(models("t5"), context_length=4096).limits.n_ctx == 4096


def test_text_depends_on_the_source_and_on_nothing_else(running: Running) -> None:
    alone = [generate(running, source)[0] for source in SOURCES]
    assert len({tuple(text) for text in alone}) == len(SOURCES)
    assert [generate(running, source)[0] for source in SOURCES] == alone
    assert generate(running, SOURCES[0], slots=(3,)) == alone[:1]
    assert generate(running, *SOURCES) == alone
    assert generate(running, *reversed(SOURCES)) == alone[::-1]


def test_the_encoder_reads_again_when_it_must_and_only_then(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [generate(running, source)[0] for source in SOURCES]
    reads: list[int] = []
    encode_sources = running.context._encode_sources

    def counting(batch: Batch) -> DecodeOutcome:
        before = running.context._sources
        outcome = encode_sources(batch)
        if running.context._sources is not before:
            reads.append(len(batch.chunks))
        return outcome

    monkeypatch.setattr(running.context, "_encode_sources", counting)
    assert generate(running, *SOURCES) == expected
    assert reads == [3]
    assert generate(running, SOURCES[1], slots=(1,)) == expected[1:2]
    assert reads == [3]  # is still among them
    assert generate(running, SOURCES[1]) == expected[1:2]
    assert reads == [3, 1]
    assert generate(running, *SOURCES[:2]) == expected[:2]
    assert generate(running, SOURCES[2]) == expected[2:]
    assert reads == [3, 1, 2, 1]


def source_of(running: Running, slot: int) -> tuple[int, ...]:
    return tuple(running.tokens(SOURCES[slot]))


def test_slots_with_one_source_share_what_they_hold(running: Running) -> None:
    source = source_of(running, 0)
    (expected,) = generate(running, SOURCES[0])
    assert running.context.apply(Trim(1, 0))
    assert running.context.apply(Copy(0, 1, 6))
    chunk = Chunk(1, 1, 6, (expected[5],), output=True, source=source)
    result = running.step(chunk, samplers={1: running.sampler()})
    assert result.sampled[1].token == expected[6]


def test_trim_takes_back_to_an_earlier_position(running: Running) -> None:
    source = source_of(running, 0)
    (expected,) = generate(running, SOURCES[0])
    assert running.context.apply(Trim(0, 4))
    chunk = Chunk(0, 0, 4, (expected[3],), output=True, source=source)
    assert running.step(chunk, samplers={0: running.sampler()}).sampled[0].token == expected[4]


def test_slide_renumbers_what_is_left(running: Running) -> None:
    """Keys say nothing about where they are, only the bias does: all of them further on are as good as where they were,
    and as good as that once they have been moved there."""
    tokens = tuple(running.tokens("the story of the world and the model"))[:-1]
    source = source_of(running, 0)

    def logprob(begin: int, *, slide: int = 0) -> float:
        assert running.context.apply(Trim(0, 0))
        running.step(Chunk(0, 0, 0, tokens, output=False, offset=begin, source=source))
        end = begin + len(tokens)
        if slide:
            assert running.context.apply(Slide(0, begin, end, -slide))
        chunk = Chunk(0, 0, len(tokens), (5,), output=True, offset=end - slide - len(tokens), source=source)
        params = SamplingParams(temperature=0.0, repeat_penalty=1.0, logprobs=0)
        step = running.step(chunk, samplers={0: running.sampler(params)})
        assert step.outcome is DecodeOutcome.OK, step.message
        return step.sampled[0].logprob

    expected = logprob(0)
    assert logprob(7) == pytest.approx(expected, abs=1e-5)
    assert logprob(7, slide=7) == pytest.approx(expected, abs=1e-5)
    assert logprob(9, slide=2) == pytest.approx(expected, abs=1e-5)


def test_aborted_before_it_reads_changes_nothing(running: Running) -> None:
    expected = generate(running, *SOURCES[:2])
    assert running.context.apply(Trim(0, 0))
    running.context.abort(5)
    chunk = Chunk(0, 0, 0, (0,), output=True, source=source_of(running, 2))
    result = running.step(chunk, samplers={0: running.sampler()}, number=5)
    assert (result.outcome, result.kept) == (DecodeOutcome.ABORTED, {0: 0})
    assert generate(running, *SOURCES[:2]) == expected


def test_abort_while_it_reads(models: Models) -> None:
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
        source = (*tokens[:-1], 5 + n_steps % 2)  # another one, or it would not be read again
        result = running.step(Chunk(0, 0, 0, (0,), output=False, source=source), number=1)
        outcome = result.outcome
    thread.join()
    assert outcome is DecodeOutcome.ABORTED
    assert generate(running, SOURCES[0], n_tokens=3)


def test_sources_must_fit_into_a_batch_together(running: Running) -> None:
    source = (5,) * 40
    one = Chunk(0, 0, 0, (0,), output=False, source=source)
    assert running.step(one).outcome is DecodeOutcome.OK
    result = running.step(one, Chunk(1, 1, 0, (0,), output=False, source=source))
    assert result.outcome is DecodeOutcome.INVALID
    assert "80 rows" in result.message


def test_no_vectors(running: Running) -> None:
    chunk = Chunk(0, 0, 0, (0,), output=True, source=(5, 2))
    result = running.step(chunk, embeddings=True)
    assert result.outcome is DecodeOutcome.INVALID
    assert "no embeddings" in result.message


def test_flash_attention_is_left_out(models: Models) -> None:
    """A bias is not for it, and so quantised values are not for this model."""
    expected = generate(Running(models("t5")), SOURCES[0])
    assert generate(Running(models("t5"), flash_attention="on"), SOURCES[0]) == expected
    with pytest.raises(LoadError, match="no context"):
        Running(models("t5"), kv_type="q8_0", flash_attention="on")


# ---- hostile --------------------------------------------------------------------------------------------------------


def batch(shim: Any, **arrays: Any) -> tuple[Any, list[Any]]:
    fields: dict[str, Any] = {"tokens": [5, 6], "positions": [0, 1], "seqs": [0, 0], "n_rows": 2} | arrays
    kept = {
        key: shim.ffi.new("int32_t[]", value) if isinstance(value, list) else value
        for key, value in fields.items()
        if value is not None
    }
    return shim.ffi.new("trio_batch *", kept), list(kept.values())


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
def test_batches(running: Running, arrays: dict[str, Any]) -> None:
    shim = native()
    expected = generate(running, SOURCES[0])
    raw, kept = batch(shim, **arrays)
    assert shim.lib.trio_encode(running.context.handle, raw) == shim.lib.TRIO_E_INVALID
    assert last_error()
    assert generate(running, SOURCES[0]) == expected
    del kept


def test_nothing_is_decoded_before_something_was_read(running: Running) -> None:
    shim = native()
    outputs = shim.ffi.new("int8_t[]", 2)
    raw, kept = batch(shim, seqs=[1, 1])
    assert shim.lib.trio_encode(running.context.handle, raw) == 0
    for seq, code in ((0, shim.lib.TRIO_E_INVALID), (1, 0)):
        raw, kept = batch(shim, seqs=[seq, seq])
        raw.outputs = outputs
        assert shim.lib.trio_step(running.context.handle, raw, shim.ffi.NULL, shim.ffi.NULL) == code
    inputs = np.zeros((2, 64), np.float32)
    for function in ("trio_encode", "trio_step"):
        raw, kept = batch(shim, tokens=None, seqs=[1, 1], positions=[2, 3])
        raw.outputs, raw.inputs = outputs, shim.ffi.from_buffer("float[]", inputs)
        arguments = (shim.ffi.NULL,) * 2 if function == "trio_step" else ()
        assert getattr(shim.lib, function)(running.context.handle, raw, *arguments) == shim.lib.TRIO_E_INVALID
    del kept


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_without_an_encoder_beside_a_decoder(models: Models, name: str) -> None:
    shim = native()
    running = Running(models(name))
    raw, kept = batch(shim)
    assert shim.lib.trio_encode(running.context.handle, raw) == shim.lib.TRIO_E_INVALID
    assert "no encoder" in last_error()
    assert shim.lib.trio_encode(running.context.handle, shim.ffi.NULL) == shim.lib.TRIO_E_INVALID
    assert shim.lib.trio_encode(shim.ffi.NULL, raw) == shim.lib.TRIO_E_INVALID
    assert running.limits.decoder_start is None
    del kept
