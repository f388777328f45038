"""Who goes first: queues, turns, and how many rows a step has."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.core.invariants import check_idle
from tests.core.world import A, B, C, World, endless, make_world
from trio_runner.core.batch import AdapterSet, Batch
from trio_runner.core.pace import Pace
from trio_runner.info import Capabilities


def test_first_come_first_served() -> None:
    world = make_world(1)
    order: list[int] = []
    world.on_batch = lambda batch: order.extend(chunk.uid for chunk in batch.chunks)
    for n in range(5):
        world.submit(prompt=(A, B, A + n), max_tokens=5)
    world.run()
    assert order == sorted(order)
    assert set(order) == set(range(5))


def test_a_sequence_that_is_cancelled_in_the_queue_is_never_run() -> None:
    world = make_world(1)
    first, second, third = (world.submit(prompt=(A, B), max_tokens=5) for _ in range(3))
    world.step()
    world.cancel(second)
    world.run()
    assert world.events[second] == []
    assert world.outcome(first) == world.outcome(third) == world.alone(first)
    check_idle(world)


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("with_embeddings", [False, True])
def test_no_sequence_starves(n_rows: int, with_embeddings: bool) -> None:
    """With more sequences than rows, some of which would go on for ever, each gets a row again and again."""
    world = make_world(5, max_rows=n_rows, n_ctx=16)
    generations = {world.submit(prompt=endless(n), max_tokens=None, n_keep=2) for n in range(2)}
    late = {world.submit(prompt=(B, B, B, B, *endless(2)), n_keep=2, max_tokens=None)}
    served: list[set[int]] = []
    world.on_batch = lambda batch: served.append({chunk.uid for chunk in batch.chunks})
    for _ in range(120):
        while with_embeddings and len(world.running) + world.scheduler.statistics().n_waiting < 5:
            world.submit(prompt=(A,), embedding=True)
        if not any(map(world.finished, generations | late)):
            world.step()
    for uid in generations | late:
        turns = [0, *(n for n, uids in enumerate(served, start=1) if uid in uids), len(served) + 1]
        assert max(b - a for a, b in pairwise(turns)) <= 12


def test_a_later_sequence_is_not_served_sooner() -> None:
    """Although a step has one row only, and short sequences come all the time."""
    world = make_world(2, max_rows=1)
    old = world.submit(prompt=endless(0), max_tokens=10)
    for _ in range(60):
        if len(world.running) + len(world.waiting) < 2:
            world.submit(prompt=(A,), max_tokens=1, cache_prompt=False)
        world.step()
    assert world.finished(old)


def test_kinds_of_rows_take_turns() -> None:
    """However many sequences need rows of one kind, and however few of them get some at a time."""
    world = make_world(3, n_ctx=128, max_rows=64, slowness=40.0, n_embed_slots=8)
    kinds: list[tuple[bool, object]] = []
    world.on_batch = lambda batch: kinds.append((batch.kind.embedding, batch.kind.adapters))
    for n in range(80):
        live = [spec for uid, spec in world.specs.items() if not world.finished(uid)]
        for adapters in {(), ((1, 1.0),), ((2, 1.0),)} - {spec.adapters for spec in live if not spec.embedding}:
            world.submit(prompt=(A, n), max_tokens=None, adapters=adapters)
        if sum(spec.embedding for spec in live) < 8 and n > 12:
            world.submit(prompt=(A, B) * 4, embedding=True)
        world.step()
    assert all(len(set(kinds[n : n + 4])) == 4 for n in range(20, 77))


def test_kinds_that_have_prompts_share_the_time_between_two_tokens() -> None:
    """A prompt beside a stream has fewer rows in a batch when another one, of another kind, has its batches, too."""

    def n_rows(*kinds: AdapterSet) -> float:
        world = make_world(4, n_ctx=4096, max_rows=512)
        batches: list[Batch] = []
        world.on_batch = batches.append
        stream = world.submit(prompt=endless(0), max_tokens=None, n_keep=2)
        for _ in range(20):
            world.step()
        prompts = [world.submit(prompt=(A, B, *range(n, n + 900)), adapters=kind) for n, kind in enumerate(kinds)]
        for _ in range(30):
            world.step()
        rows = [len(chunk.items) for batch in batches for chunk in batch.chunks if chunk.uid == prompts[0]]
        assert not world.finished(stream)
        return float(np.median(rows[1:-1]))

    one = n_rows(((1, 1.0),))
    assert n_rows(((1, 1.0),), ((2, 1.0),), ((3, 1.0),)) <= one / 2


def test_a_prompt_beside_a_stream_gets_rows_by_what_they_cost() -> None:
    world = make_world(2, n_ctx=512, max_rows=256, slowness=20.0)
    rows: list[int] = []
    world.on_batch = lambda batch: rows.append(batch.n_rows)
    world.submit(prompt=endless(0), max_tokens=50)
    for _ in range(4):
        world.step()
    world.submit(prompt=(C,) * 300, max_tokens=1)
    for _ in range(10):
        world.step()
    # 20 ms for each row, and 2.4 of them for each token of the stream: the fewest rows that a prompt may have.
    assert rows[-3:] == [1 + 4] * 3


def test_a_prompt_of_one_row_is_no_token_of_a_stream() -> None:
    measured: list[tuple[int, int]] = []

    class RecordingPace(Pace):
        def measured(self, n_decoding: int, n_rows: int, seconds: float) -> None:
            measured.append((n_decoding, n_rows))

    world = World(Capabilities(n_slots=1, n_ctx=32, max_rows=8), pace=RecordingPace(8))
    world.submit(prompt=(A,), max_tokens=1)
    world.run()
    assert measured == [(0, 1)]


def test_seconds_count_only_steps_with_rows_of_the_sequence() -> None:
    world = make_world(2, max_rows=4)  # the toy takes a millisecond for each row of a batch
    first = world.submit(prompt=endless(0), max_tokens=5)
    world.run()
    second = world.submit(prompt=endless(0), max_tokens=1)
    world.run()
    usage = world.last(first).usage
    assert usage.prompt_seconds == pytest.approx(0.006)
    assert usage.completion_seconds == pytest.approx(0.004)
    usage = world.last(second).usage
    assert usage.prompt_seconds == pytest.approx(0.001)
    assert usage.completion_seconds == 0.0


def test_a_paused_sequence_gets_no_rows_and_keeps_its_slot() -> None:
    world = make_world(2)
    paused, other = world.submit(prompt=endless(0), max_tokens=20), world.submit(prompt=endless(1), max_tokens=20)
    world.step()
    world.pause(paused)
    world.run()
    assert world.finished(other)
    assert not world.finished(paused)
    assert world.scheduler.statistics().n_paused == 1
    world.resume(paused)
    world.run()
    assert world.outcome(paused) == world.alone(paused)


def test_unknown_uids_are_ignored() -> None:
    world = make_world(1)
    for forget in (world.scheduler.cancel, world.scheduler.pause, world.scheduler.resume):
        forget(17)
    assert not world.step()


def test_a_batch_that_was_thrown_away_is_no_turn() -> None:
    """Two sequences whose rows are of different kinds get rows equally often, although each time one of two batches is
    thrown away."""
    world = make_world(2, n_ctx=64)
    one = world.submit(prompt=endless(0), max_tokens=None, n_keep=2)
    two = world.submit(prompt=endless(1), max_tokens=None, n_keep=2, adapters=((1, 1.0),))
    served: list[int] = []
    world.on_batch = lambda batch: served.extend(chunk.uid for chunk in batch.chunks)
    for _ in range(20):
        world.step(discard=True)
        world.step()
    assert served.count(one) == served.count(two) == 10
