"""Batches that fail: the culprit ends, and the others go on."""

from __future__ import annotations

import pytest

from tests.core.invariants import check_idle, check_survivors
from tests.core.world import A, B, C, endless, make_world
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome
from trio_runner.core.fault_isolation import FORGIVEN_AFTER, MAX_FAILED, FaultIsolation
from trio_runner.core.sequence import Sequence, SequenceSpec
from trio_runner.errors import DecodeFailed, InvalidGrammar
from trio_runner.sampling import SamplingParams
from trio_runner.testing import Interruption


def test_after_a_failure_each_is_tried_alone_and_then_all_together_again() -> None:
    world = make_world(3, max_rows=32)
    for n in range(3):
        world.submit(prompt=endless(n), max_tokens=5)
    batches: list[list[int]] = []
    world.on_batch = lambda batch: batches.append(sorted(chunk.uid for chunk in batch.chunks))
    world.step(Interruption(DecodeOutcome.INVALID))
    world.run()
    assert batches[:5] == [[0, 1, 2], [0], [1], [2], [0, 1, 2]]
    check_survivors(world)


def test_sequences_whose_batches_fail_again_and_again_run_alone() -> None:
    """They take turns with the others, and run with them again once a culprit was found."""
    world = make_world(4)
    for n in range(2):
        world.submit(prompt=endless(n), max_tokens=100)
    batches: list[list[int]] = []
    world.on_batch = lambda batch: batches.append(sorted(chunk.uid for chunk in batch.chunks))
    for _ in range(2):
        world.step(Interruption(DecodeOutcome.FATAL))
        world.step()
        world.step()
    assert batches == [[0, 1], [0], [1]] * 2
    for n in range(2, 4):
        world.submit(prompt=endless(n), max_tokens=100)
    batches.clear()
    for _ in range(9):
        world.step()
    assert sorted(batches) == [*[[0]] * 3, *[[1]] * 3, *[[2, 3]] * 3]
    world.poison[2] = DecodeOutcome.FATAL
    while not world.finished(2):
        world.step()
    world.run()
    assert [0, 1, 3] in batches
    check_survivors(world)


@pytest.mark.parametrize("outcome", [DecodeOutcome.INVALID, DecodeOutcome.FATAL, DecodeOutcome.NO_KV_SPACE])
@pytest.mark.parametrize("embedding", [False, True])
def test_only_the_culprit_fails(outcome: DecodeOutcome, embedding: bool) -> None:
    world = make_world(3)
    others = [world.submit(prompt=endless(n), max_tokens=10) for n in range(2)]
    culprit = world.submit(prompt=(A, B, C), max_tokens=10, embedding=embedding)
    others += [world.submit(prompt=(A, C), embedding=True), world.submit(prompt=(C, C), max_tokens=10)]
    world.poison[culprit] = outcome
    world.run()
    assert world.last(culprit).reason == "error"
    assert isinstance(world.last(culprit).error, DecodeFailed)
    check_survivors(world)
    assert all(world.events[uid][-1] != world.last(culprit) for uid in others)
    check_idle(world)


def test_the_slot_of_a_culprit_is_emptied() -> None:
    """A failure may have left anything in it."""
    world = make_world(1, max_rows=4)
    culprit = world.submit(prompt=endless(0), max_tokens=5)
    world.step()
    world.step(Interruption(DecodeOutcome.FATAL, 1))
    assert world.last(culprit).reason == "error"
    retry = world.submit(prompt=endless(0), max_tokens=5)
    world.run()
    assert world.last(retry).usage.cached_tokens == 0
    assert world.outcome(retry) == world.alone(retry)


def test_a_sampler_that_fails_ends_its_own_sequence_only() -> None:
    world = make_world(3)
    before = world.submit(prompt=endless(0), max_tokens=20)
    broken = world.submit(SamplingParams(grammar="z"), prompt=endless(1), max_tokens=20)
    after = world.submit(prompt=endless(2), max_tokens=20)
    world.run()
    assert isinstance(world.last(broken).error, InvalidGrammar)
    assert world.last(broken).reason == "error"
    assert world.text(broken) == ""
    for other in (before, after):
        assert world.outcome(other) == world.alone(other)
    # What was decoded is sound: only sampling failed.
    retry = world.submit(prompt=endless(1), max_tokens=20)
    world.run()
    assert world.last(retry).usage.cached_tokens == len(endless(1)) - 1
    check_idle(world)


def test_a_paused_suspect_gets_no_rows() -> None:
    world = make_world(2)
    first, second = world.submit(prompt=endless(0), max_tokens=20), world.submit(prompt=endless(1), max_tokens=20)
    world.step(Interruption(DecodeOutcome.INVALID))
    world.pause(first)
    world.run()
    assert world.finished(second)
    world.resume(first)
    world.run()
    assert world.outcome(first) == world.alone(first)
    assert world.outcome(second) == world.alone(second)


def test_no_space_gives_up_idle_slots_first_and_then_takes_fewer_rows() -> None:
    world = make_world(2, max_rows=8)
    world.submit(prompt=(A, B), max_tokens=1)
    world.run()
    batches: list[Batch] = []
    world.on_batch = batches.append
    uid = world.submit(prompt=(B,) * 16, max_tokens=2, cache_prompt=False)
    no_space = Interruption(DecodeOutcome.NO_KV_SPACE)
    world.step(no_space)
    assert world.context.held(0) != []
    world.step(no_space)
    assert world.context.held(0) == []
    world.step()
    world.step()
    assert [batch.n_rows for batch in batches] == [8, 8, 4, 8]
    world.run()
    assert world.outcome(uid) == world.alone(uid)


@pytest.mark.parametrize("with_embeddings", [False, True])
def test_a_sequence_that_never_finds_space_does_not_stop_the_others(with_embeddings: bool) -> None:
    """Not even while batches of another kind succeed all the time."""
    world = make_world(2)
    culprit, other = (world.submit(prompt=endless(n), max_tokens=4) for n in range(2))
    world.poison[culprit] = DecodeOutcome.NO_KV_SPACE
    for _ in range(60):
        if with_embeddings and not world.scheduler.statistics().n_waiting > 1:
            world.submit(prompt=(A, B), embedding=True)
        world.step()
    assert world.last(culprit).reason == "error"
    assert world.finished(other)
    world.run()
    check_survivors(world)
    check_idle(world)


def test_without_space_one_waits_and_gives_up_what_it_holds() -> None:
    world = make_world(3, n_embed_slots=1, embeds_last_row=True)
    for n in range(2):
        world.submit(prompt=endless(n), max_tokens=9)
    embedding = world.submit(prompt=(A, B, C), embedding=True)
    world.step()
    world.pause(embedding)
    world.step(Interruption(DecodeOutcome.NO_KV_SPACE))
    assert (world.waiting, sorted(world.running)) == ([1], [0, embedding])
    world.step()
    assert world.context.held(1) == []
    # The one that is left only gets fewer rows; no generation waits so that an embedding can go on.
    world.step(Interruption(DecodeOutcome.NO_KV_SPACE))
    assert sorted(world.running) == [0, embedding]
    world.resume(embedding)
    world.run()
    check_survivors(world)
    check_idle(world)


@pytest.mark.parametrize("outcome", [DecodeOutcome.INVALID, DecodeOutcome.NO_KV_SPACE])
def test_a_sequence_that_is_cancelled_while_its_batch_fails_is_no_suspect(outcome: DecodeOutcome) -> None:
    world = make_world(2)
    first, second = (world.submit(prompt=endless(n), max_tokens=5) for n in range(2))
    world.on_batch = lambda batch: world.cancel(first)
    world.step(Interruption(outcome))
    assert world.state.suspects == (second,)
    world.on_batch = None
    world.run()
    check_survivors(world)
    check_idle(world)


def test_failures_are_forgotten_after_many_successes() -> None:
    """Two failures that are far apart do not make the sequences run alone to their ends."""
    world = make_world(2, n_ctx=16)
    for n in range(2):
        world.submit(prompt=endless(n, at_least=150), max_tokens=None, n_keep=2)
    batches: list[list[int]] = []
    world.on_batch = lambda batch: batches.append(sorted(chunk.uid for chunk in batch.chunks))
    for _ in range(2):
        world.step(Interruption(DecodeOutcome.INVALID))
        for _ in range(2 + FORGIVEN_AFTER):
            world.step()
    assert batches[-FORGIVEN_AFTER:] == [[0, 1]] * FORGIVEN_AFTER


def test_sequences_that_run_alone_are_tried_together_again_but_ever_less_often() -> None:
    """Whenever they are together their batch fails: the failures must cost them ever less."""
    running = {uid: Sequence(SequenceSpec(uid=uid, prompt=(A,))) for uid in range(2)}
    faults = FaultIsolation(8, running)
    n_alone: list[int] = [0]
    while len(n_alone) < 12:
        chosen = faults.choose(sorted(running.values(), key=lambda sequence: sequence.last_turn))
        batch = Batch(tuple(Chunk(sequence.spec.uid, 0, 0, (A,), output=True) for sequence in chosen))
        for sequence in chosen:
            sequence.last_turn += 1
        if len(chosen) == 1:
            faults.succeeded(batch)
            n_alone[-1] += 1
        else:
            assert not faults.failed(batch)
            n_alone.append(0)
    # MAX_FAILED failures, with a batch of each alone after each; then twice as many batches alone as the last time.
    assert n_alone[:-1] == [0, *(n for k in range(5) for n in (2, 2 * (FORGIVEN_AFTER << k)))]


def test_a_culprit_explains_the_failures_before() -> None:
    running = {uid: Sequence(SequenceSpec(uid=uid, prompt=(A,))) for uid in range(3)}
    faults = FaultIsolation(8, running)
    chunks = [Chunk(uid, 0, 0, (A,), output=True) for uid in running]
    for _ in range(MAX_FAILED):
        assert not faults.failed(Batch(tuple(chunks)))
    assert list(faults.suspects) == [0, 1, 2]
    faults.succeeded(Batch((chunks[0],)))
    assert faults.failed(Batch((chunks[1],)))
    faults.forget(1)
    assert list(faults.suspects) == [2]
    faults.succeeded(Batch((chunks[2],)))
    assert faults.choose([running[0], running[2]]) == [running[0], running[2]]
