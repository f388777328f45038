"""Batches that fail: which requests fail with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from tests.engine.toys import Toy, prompts, until_idle
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.errors import DecodeFailed
from trio_runner.testing import Interruption, toy_text

CULPRIT = "the one that the context does not like"
POISON = ord("k")
"""Neither the other prompts nor what the toy says contains it."""


async def read_all(engine: Engine, requests: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Exception]]:
    texts: dict[str, str] = {}
    errors: dict[str, Exception] = {}

    async def read(prompt: str) -> None:
        texts[prompt] = ""
        try:
            async with engine.generate(prompt, max_tokens=40) as generation:
                async for event in generation:
                    texts[prompt] += event.text
        except DecodeFailed as error:
            errors[prompt] = error

    async with trio.open_nursery() as nursery:
        for prompt in requests:
            nursery.start_soon(read, prompt)
    return texts, errors


def every(n: int, interruption: Callable[[Batch], Interruption]) -> Callable[[Batch], Interruption | None]:
    count = 0

    def interrupt(batch: Batch) -> Interruption | None:
        nonlocal count
        count += 1
        return interruption(batch) if count % n == 0 else None

    return interrupt


@pytest.mark.parametrize("outcome", [DecodeOutcome.INVALID, DecodeOutcome.FATAL, DecodeOutcome.NO_KV_SPACE])
async def test_only_the_culprit_fails(toy: Toy, outcome: DecodeOutcome) -> None:
    """Every batch with a certain token in it fails."""

    def dislike(batch: Batch) -> Interruption | None:
        tainted = any(POISON in chunk.items for chunk in batch.chunks)
        return Interruption(outcome) if tainted else None

    toy.on_decode = dislike
    others = prompts(5, 40)
    async with toy.engine(slots=4) as engine:
        texts, errors = await read_all(engine, (*others[:2], CULPRIT, *others[2:]))
        assert list(errors) == [CULPRIT]
        assert texts.pop(CULPRIT) == ""
        assert texts == {prompt: toy_text(prompt, 40) for prompt in others}
        await until_idle(engine)
        assert engine.status == "ready"


async def test_the_culprit_keeps_the_text_before_its_failure(toy: Toy) -> None:
    """Its text until then was right, and is not taken back."""
    culprit, *others = prompts(4, 40)
    uids: list[int] = []

    def dislike(batch: Batch) -> Interruption | None:
        for chunk in batch.chunks:
            # The prefix that its prompt shares with another may have been found in the cache.
            if chunk.stop == len(culprit) and chunk.items == tuple(culprit.encode())[chunk.start :]:
                uids.append(chunk.uid)
            if chunk.uid in uids and chunk.start > 30:
                return Interruption(DecodeOutcome.INVALID)
        return None

    toy.on_decode = dislike
    async with toy.engine(slots=4) as engine:
        texts, errors = await read_all(engine, (culprit, *others))
    assert list(errors) == [culprit]
    assert len(texts[culprit]) > 10
    assert toy_text(culprit, 40).startswith(texts.pop(culprit))
    assert texts == {prompt: toy_text(prompt, 40) for prompt in others}


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("n", [2, 3, 7])
async def test_aborted_batches_change_no_text(toy: Toy, n: int, n_rows: int) -> None:
    toy.on_decode = every(n, lambda batch: Interruption(DecodeOutcome.ABORTED, min(n_rows, batch.n_rows)))
    requests = prompts(6, 40)
    async with toy.engine(slots=3, batch_size=16) as engine:
        texts, errors = await read_all(engine, requests)
    assert errors == {}
    assert texts == {prompt: toy_text(prompt, 40) for prompt in requests}


@pytest.mark.parametrize("n", [3, 7])
@pytest.mark.parametrize("outcome", [DecodeOutcome.NO_KV_SPACE, DecodeOutcome.INVALID])
async def test_a_failure_that_does_not_come_again_fails_no_request(toy: Toy, n: int, outcome: DecodeOutcome) -> None:
    """This holds as long as more than one request could have caused it."""
    toy.on_decode = every(n, lambda batch: Interruption(outcome if len(batch.chunks) > 1 else DecodeOutcome.ABORTED))
    requests = prompts(4, 40)
    async with toy.engine(slots=4) as engine:
        texts, errors = await read_all(engine, requests)
    assert errors == {}
    assert texts == {prompt: toy_text(prompt, 40) for prompt in requests}


async def test_a_context_that_always_fails_fails_every_request_and_the_engine_lives(toy: Toy) -> None:
    toy.on_decode = lambda batch: Interruption(DecodeOutcome.FATAL)
    requests = prompts(5, 40)
    async with toy.engine(slots=2) as engine:
        texts, errors = await read_all(engine, requests)
        assert set(errors) == set(requests)
        assert len({id(error) for error in errors.values()}) == len(requests)
        assert set(texts.values()) == {""}
        await until_idle(engine)
        toy.context.on_decode = None
        assert await engine.generate(requests[0], max_tokens=40).collect() == toy_text(requests[0], 40)


@pytest.mark.parametrize("can_trim", [True, False], ids=["trims", "recurrent"])
@pytest.mark.parametrize("n_rows", [0, 3])
async def test_batches_that_fail_only_when_shared_come_to_an_end(toy: Toy, can_trim: bool, n_rows: int) -> None:
    """Each request runs alone, so none is at fault. But recurrent state is lost with every failed batch, so prompts
    of several batches would begin again for ever."""
    n_failed = 0

    def fail_if_shared(batch: Batch) -> Interruption | None:
        nonlocal n_failed
        n_failed += len(batch.chunks) > 1
        return Interruption(DecodeOutcome.FATAL, n_rows) if len(batch.chunks) > 1 else None

    toy.capabilities = {"can_trim": can_trim, "can_shift": can_trim}
    toy.on_decode = fail_if_shared
    requests = prompts(4, 40)
    async with toy.engine(slots=4, batch_size=4) as engine:
        texts, errors = await read_all(engine, requests)
    assert errors == {}
    assert texts == {prompt: toy_text(prompt, 40) for prompt in requests}
    assert n_failed <= len(requests)
