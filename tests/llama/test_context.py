"""Decoding and edits of the KV cache, on every kind of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.llama.running import GREEDY, LONG_TEXT, Running, tokens_of
from tests.tiny_models import CHAIN_TEXT, GENERATIVE
from tests.tiny_wide import wide_model
from trio_runner.config import KV_TYPES, AdapterConfig
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.info import Capabilities
from trio_runner.llama import default_threads

Models = Callable[[str], Path]


@pytest.fixture
def llama(models: Models) -> Running:
    return Running(models("llama"))


@pytest.mark.parametrize("prompt", ["hello", "anything at all <|im_end|>\n", " one"])
def test_the_chain_model_generates_its_text_and_ends(models: Models, prompt: str) -> None:
    running = Running(models("chain"))
    result = running.generate(prompt, 30)
    text = b"".join(sampled.piece for sampled in result).decode()
    assert text == (CHAIN_TEXT.removeprefix(" one") if prompt == " one" else CHAIN_TEXT)
    assert result[-1].is_end
    assert result[-1].piece == b""
    assert [sampled.is_end for sampled in result[:-1]] == [False] * (len(result) - 1)


def test_a_character_may_be_spread_over_tokens(models: Models) -> None:
    pieces = [sampled.piece for sampled in Running(models("chain")).generate("hello", 30)]
    emoji = pieces[-6:-2]
    assert [len(piece) for piece in emoji] == [1, 1, 1, 1]
    assert b"".join(emoji).decode() == "\N{SLIGHTLY SMILING FACE}"


@pytest.mark.parametrize(
    ("name", "can_trim", "can_shift"),
    [
        ("llama", True, True),
        ("spm", True, True),
        ("swa", True, True),
        ("mrope", True, False),
        ("gpt2", True, False),
        ("mamba", False, False),
        ("lfm2", False, False),
    ],
)
def test_capabilities_follow_from_the_memory(models: Models, name: str, can_trim: bool, can_shift: bool) -> None:
    running = Running(models(name))
    assert running.capabilities == Capabilities(
        n_slots=2,
        n_spare_slots=2,
        n_embed_slots=2,
        n_ctx=96 if name == "gpt2" else 256,  # the size of its table of positions
        max_rows=64,
        can_trim=can_trim,
        can_shift=can_shift,
        embeds_last_row=can_trim,
        embedding_size=64,
    )
    assert running.context.length(0) == 0


@pytest.mark.parametrize(
    ("slots", "n_spare", "can_trim"), [(42, 42, True), (64, 0, True), (65, 65, False), (128, 0, False)]
)
def test_sliding_windows_leave_fewer_spare_slots(models: Models, slots: int, n_spare: int, can_trim: bool) -> None:
    capabilities = Running(models("swa"), slots=slots, context_length=16, batch_size=16).capabilities
    assert (capabilities.n_spare_slots, capabilities.can_trim) == (n_spare, can_trim)


@pytest.mark.parametrize("name", ["bert", "rerank"])
def test_capabilities_of_an_encoder(models: Models, name: str) -> None:
    capabilities = Running(models(name)).capabilities
    assert not capabilities.has_memory
    assert not capabilities.can_generate
    assert not capabilities.embeds_last_row
    assert capabilities.n_ctx == 64
    assert capabilities.ranks == (name == "rerank")
    assert capabilities.embedding_size == (1 if name == "rerank" else 64)


@pytest.mark.parametrize("name", GENERATIVE)
def test_text_depends_only_on_the_prompt(models: Models, name: str) -> None:
    running = Running(models(name))
    first = tokens_of(running.generate("the model", 16))
    assert tokens_of(running.generate("a story", 16)) != first or name == "chain"
    assert tokens_of(running.generate("the model", 16)) == first
    assert tokens_of(running.generate("the model", 16, slot=1)) == first


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_prompt_may_be_split_into_any_batches(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the answer and the story of the model and the world " * 2)[:60]
    whole = tokens_of(running.generate(tokens))
    for rows in (1, 7):
        assert running.context.apply(Trim(0, 0))
        position = running.prefill(tokens[:-1], rows=rows)
        assert tokens_of(running.go_on(tokens[-1], position, 12)) == whole


@pytest.mark.parametrize("name", GENERATIVE)
def test_text_is_the_same_alone_and_beside_others(models: Models, name: str) -> None:
    running = Running(models(name))
    prompts = [running.tokens("the model"), running.tokens("hello and a longer story")]
    alone = [tokens_of(running.generate(prompt)) for prompt in prompts]
    for slot in (0, 1):
        assert running.context.apply(Trim(slot, 0))
    samplers = {uid: running.sampler() for uid in (10, 11)}
    together: dict[int, list[int]] = {10: [], 11: []}
    chunks = [Chunk(10 + slot, slot, 0, tuple(prompt), output=True) for slot, prompt in enumerate(prompts)]
    for _ in range(12):
        result = running.step(*chunks, samplers=samplers)
        assert result.outcome is DecodeOutcome.OK
        for uid, sampled in result.sampled.items():
            together[uid].append(sampled.token)
        chunks = [Chunk(chunk.uid, chunk.slot, chunk.stop, (together[chunk.uid][-1],), output=True) for chunk in chunks]
    assert [together[10], together[11]] == alone


@pytest.mark.parametrize("name", ["llama", "spm", "swa", "mrope"])
def test_a_copy_continues_like_the_original(models: Models, name: str) -> None:
    running = Running(models(name))
    prefix, one, other = running.tokens("the story of the world"), running.tokens(" hello"), running.tokens(" answer")
    expected = tokens_of(running.generate(prefix + other))
    first = tokens_of(running.generate(prefix + one))
    assert running.context.apply(Trim(1, 0))
    assert running.context.apply(Copy(0, 1, len(prefix)))
    assert running.context.length(1) == len(prefix)
    position = running.prefill(other[:-1], slot=1, start=len(prefix))
    assert tokens_of(running.go_on(other[-1], position, 12, slot=1)) == expected
    # The original has not changed.
    assert running.context.apply(Trim(0, len(prefix)))
    position = running.prefill(one[:-1], start=len(prefix))
    assert tokens_of(running.go_on(one[-1], position, 12)) == first


@pytest.mark.parametrize("name", ["llama", "spm", "swa", "mrope"])
def test_trim_goes_back_to_an_earlier_position(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the story of the world and more than a window of thirty-two tokens in this one prompt")
    first = tokens_of(running.generate(tokens, 20))
    assert running.context.length(0) == len(tokens) + 19
    assert running.context.apply(Trim(0, len(tokens) - 1))
    assert running.context.length(0) == len(tokens) - 1
    assert tokens_of(running.go_on(tokens[-1], len(tokens) - 1, 20)) == first


@pytest.mark.parametrize("name", ["llama", "swa", "mrope"])
def test_cells_of_a_slot_are_not_used_by_others(models: Models, name: str) -> None:
    """Not even cells that its window has passed, because the slot may be trimmed to where they are needed."""
    running = Running(models(name))
    tokens = running.tokens(LONG_TEXT)
    other = (running.tokens("hello and the answer of the model and the user and a count") * 4)[:60]
    cuts = (10, 35, 50)
    expected = [tokens_of(running.generate(tokens[: cut + 1], 8)) for cut in cuts]
    for cut, text in zip(cuts, expected, strict=True):
        for slot in (0, 1):
            assert running.context.apply(Trim(slot, 0))
        running.prefill(other[:20], slot=1)
        running.prefill(tokens, rows=7)
        # It is longer than what was there before, so it must lie around the cells of the first slot.
        assert running.context.apply(Trim(1, 0))
        running.prefill(other, slot=1, rows=5)
        assert running.context.apply(Trim(2, 0))
        assert running.context.apply(Copy(0, 2, cut))
        assert running.context.apply(Trim(0, cut))
        for slot in (0, 2):
            assert tokens_of(running.go_on(tokens[cut], cut, 8, slot=slot)) == text


def test_recurrent_memory_cannot_be_trimmed_in_part(models: Models) -> None:
    running = Running(models("mamba"))
    tokens = running.tokens("the story of the world")
    first = tokens_of(running.generate(tokens, 4))
    length = running.context.length(0)
    assert not running.context.apply(Trim(0, 3))
    assert running.context.length(0) == length
    assert running.context.apply(Trim(0, 0))
    assert running.context.length(0) == 0
    assert tokens_of(running.generate(tokens, 4)) == first
    with pytest.raises(NativeError):
        running.context.apply(Copy(0, 1, 2))
    assert running.context.apply(Copy(0, 1, running.context.length(0)))
    assert running.context.length(1) == running.context.length(0)


def test_slide_renumbers_the_remaining_positions(models: Models) -> None:
    """With one layer, a cell depends only on its token and its position. So sliding must equal decoding again."""
    running = Running(models("single"))
    tokens = running.tokens("the story of the world and the model")
    keep, discard = 3, 5
    assert running.context.apply(Trim(0, 0))
    running.prefill(tokens[:-1])
    assert running.context.apply(Trim(0, keep, keep + discard))
    assert running.context.apply(Slide(0, keep + discard, len(tokens) - 1, -discard))
    assert running.context.length(0) == len(tokens) - 1 - discard
    slid = tokens_of(running.go_on(tokens[-1], len(tokens) - 1 - discard, 12))
    assert slid == tokens_of(running.generate(tokens[:keep] + tokens[keep + discard :]))


@pytest.mark.parametrize("name", ["llama", "spm", "swa"])
def test_sliding_everything_changes_nothing(models: Models, name: str) -> None:
    """Only the distances between positions matter, also for slots that share the cells and with a sliding window."""
    running = Running(models(name))
    tokens = running.tokens(LONG_TEXT)[:50]
    expected = tokens_of(running.generate(tokens, 8))
    for slot in (0, 1):
        assert running.context.apply(Trim(slot, 0))
    assert running.prefill(tokens[:-1], start=7) == 56
    assert running.context.apply(Slide(0, 7, 56, -7))
    assert running.context.length(0) == 49
    assert running.context.apply(Copy(0, 1, 49))
    for slot in (0, 1):
        assert tokens_of(running.go_on(tokens[-1], 49, 8, slot=slot)) == expected
        assert running.context.apply(Trim(slot, 40))
        position = running.prefill(tokens[40:-1], slot=slot, start=40)
        assert tokens_of(running.go_on(tokens[-1], position, 8, slot=slot)) == expected


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(("name", "n_embd_head"), [("chain", 32), ("wide", 64)])
def test_keys_slide_where_that_does_not_end_the_process(
    models: Models, tmp_path: Path, name: str, n_embd_head: int, kv_type: str
) -> None:
    running = Running(wide_model("wide", "f16", tmp_path) if name == "wide" else models(name), kv_type=kv_type)
    is_quantised = kv_type not in ("f32", "f16", "bf16")
    assert running.capabilities.can_shift == (kv_type != "bf16" and not (is_quantised and n_embd_head % 64))
    position = running.prefill(running.tokens("the story of the world"))
    if running.capabilities.can_shift:
        assert running.context.apply(Trim(0, 2, 4))
        assert running.context.apply(Slide(0, 4, position, -2))
        position -= 2
    assert running.go_on(running.tokens("hello")[0], position, 1)


def test_a_slide_survives_an_abort_of_the_next_step(models: Models) -> None:
    running = Running(models("single"))
    tokens = running.tokens("the story of the world and the model")
    expected = tokens_of(running.generate(tokens[:3] + tokens[8:]))
    assert running.context.apply(Trim(0, 0))
    running.prefill(tokens[:-1])
    assert running.context.apply(Trim(0, 3, 8))
    assert running.context.apply(Slide(0, 8, len(tokens) - 1, -5))
    running.context.abort(1)
    chunk = Chunk(0, 0, len(tokens) - 6, tuple(tokens[-1:]), output=True)
    assert running.step(chunk, samplers={0: running.sampler()}, number=1).outcome is DecodeOutcome.ABORTED
    assert tokens_of(running.go_on(tokens[-1], len(tokens) - 6, 12)) == expected


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_batch_aborted_before_it_starts_changes_nothing(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the story of the world")
    expected = tokens_of(running.generate(tokens))
    assert running.context.apply(Trim(0, 0))
    position = running.prefill(tokens[:-1])
    running.context.abort(7)
    chunk = Chunk(5, 0, position, (tokens[-1],), output=True)
    result = running.step(chunk, samplers={5: running.sampler()}, number=7)
    assert result.outcome is DecodeOutcome.ABORTED
    assert result.kept == {5: position}
    assert result.sampled == {}
    assert tokens_of(running.go_on(tokens[-1], position, 12)) == expected


def test_an_abort_touches_no_batch_with_another_number(llama: Running) -> None:
    def outcome(number: int) -> DecodeOutcome:
        assert llama.context.apply(Trim(0, 0))
        return llama.step(Chunk(0, 0, 0, (5,), output=False), number=number).outcome

    llama.context.abort(3)
    aborted, ok = DecodeOutcome.ABORTED, DecodeOutcome.OK
    assert [outcome(number) for number in (0, 2, 3, 4, 3)] == [ok, ok, aborted, ok, aborted]
    llama.context.abort(2**64 - 1)  # only the latest call counts
    assert [outcome(number) for number in (3, 2**64 - 1)] == [ok, aborted]
    llama.context.abort(0)
    assert [outcome(number) for number in (0, 2**64 - 1)] == [ok, ok]


@pytest.mark.parametrize("name", ["llama", "swa", "mamba"])
def test_an_abort_from_another_thread_keeps_what_it_reports(models: Models, name: str) -> None:
    running = Running(models(name), slots=1, context_length=2048, batch_size=512)
    tokens = (running.tokens("the story of the world and the answer of the model ") * 60)[:512]
    expected = tokens_of(running.generate(tokens, 3))
    started = threading.Event()

    def abort() -> None:
        started.wait(10)
        running.context.abort(1)

    thread = threading.Thread(target=abort)
    thread.start()
    outcome, kept = DecodeOutcome.OK, 0
    while outcome is DecodeOutcome.OK:  # until a step sees the abort, before it begins or in the middle
        assert running.context.apply(Trim(0, 0))
        started.set()
        result = running.step(Chunk(0, 0, 0, tuple(tokens), output=False), number=1)
        outcome, kept = result.outcome, result.kept.get(0, 0)
    thread.join()
    assert outcome is DecodeOutcome.ABORTED
    assert kept == running.context.length(0)
    assert kept in (0, 512)
    position = running.prefill(tokens[kept:-1], start=kept, rows=512)
    assert tokens_of(running.go_on(tokens[-1], position, 3)) == expected


def test_a_batch_for_a_full_cache_changes_nothing(models: Models) -> None:
    running = Running(models("llama"), context_length=128)
    # One cache for all: two slots of 128 and a batch of 64 for embeddings. llama.cpp rounds that up.
    assert running.prefill([5] * 512) == 512
    result = running.step(Chunk(1, 1, 0, (5,), output=False))
    assert result.outcome is DecodeOutcome.NO_KV_SPACE
    assert (running.context.length(0), running.context.length(1)) == (512, 0)
    assert running.context.apply(Trim(0, 0))
    assert running.step(Chunk(1, 1, 0, (5,), output=False)).outcome is DecodeOutcome.OK


def test_bad_batches_are_refused(llama: Running) -> None:
    expected = tokens_of(llama.generate("the model"))
    for chunk in (
        Chunk(0, 0, 0, tuple([5] * 65), output=False),
        Chunk(0, 0, -1, (5,), output=False),
        Chunk(0, 0, 768, (5,), output=False),
        Chunk(0, 6, 0, (5,), output=False),
        Chunk(0, -1, 0, (5,), output=False),
        Chunk(0, 0, 0, (llama.model.info.n_vocab,), output=False),
        Chunk(0, 0, 0, (-1,), output=False),
    ):
        result = llama.step(chunk)
        assert result.outcome is DecodeOutcome.INVALID, chunk
        assert result.message
    assert llama.step().outcome is DecodeOutcome.INVALID
    assert tokens_of(llama.generate("the model")) == expected


def test_an_encoder_refuses_to_generate(models: Models) -> None:
    running = Running(models("bert"))
    result = running.step(Chunk(0, 0, 0, (5, 6), output=False))
    assert result.outcome is DecodeOutcome.INVALID
    assert "embeddings only" in result.message


def test_an_adapter_changes_the_text_by_its_scale(models: Models) -> None:
    def text(*adapters: AdapterConfig) -> str:
        return Running(models("llama"), adapters=adapters).text(n_tokens=12)

    plain = text()
    assert text(AdapterConfig(str(models("lora")), 0.0)) == plain
    assert text(AdapterConfig(str(models("lora")), 1.0)) != plain
    with pytest.raises(LoadError, match="not an adapter"):
        text(AdapterConfig(str(models("llama"))))


def test_settings_that_the_model_does_not_support_are_load_errors(models: Models) -> None:
    with pytest.raises(LoadError, match="no context"):
        Running(models("llama"), kv_type="q8_0", flash_attention="off")


@pytest.mark.parametrize(
    "settings",
    [{"kv_type": "q8_0"}, {"flash_attention": "on"}, {"flash_attention": "off"}, {"threads": 2}, {"batch_size": 1}],
)
def test_other_settings_work_too(models: Models, settings: dict[str, Any]) -> None:
    running = Running(models("chain"), **settings)
    tokens = running.tokens("hello")
    assert running.context.apply(Trim(0, 0))
    position = running.prefill(tokens[:-1], rows=1)
    pieces = [sampled.piece for sampled in running.go_on(tokens[-1], position, 3)]
    assert pieces == [b" one", b" two", b" three"]


def test_closing_is_idempotent_and_final(models: Models) -> None:
    running = Running(models("llama"))
    running.model.close()
    assert running.step(Chunk(0, 0, 0, (5,), output=False)).outcome is DecodeOutcome.OK  # it keeps the model alive
    running.context.close()
    running.context.close()
    running.model.close()
    running.context.abort(1)
    with pytest.raises(EngineClosed):
        running.step(Chunk(0, 0, 0, (5,), output=False))
    with pytest.raises(EngineClosed):
        running.model.sampler(GREEDY, ())


def test_default_threads_are_at_least_one() -> None:
    decoding, prefill = default_threads()
    assert 1 <= decoding <= prefill <= 512
    assert prefill == 1 or decoding < prefill
