"""Several generations read as one stream."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration
from trio_runner.errors import DecodeFailed, EngineBusy
from trio_runner.events import Finished, TextPiece
from trio_runner.request import GenerateRequest
from trio_runner.server.choices import Choices


def some(n: int) -> tuple[list[FakeGeneration], Choices]:
    engine = FakeEngine()
    generations = [FakeGeneration(engine, GenerateRequest(prompt="x")) for _ in range(n)]
    return generations, Choices(generations)


@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_event_comes_once_and_in_the_order_of_its_choice(bursts: list[list[int]], eager: bool) -> None:
    async def main() -> None:
        generations, choices = some(len(bursts))
        seen: list[list[str]] = [[] for _ in bursts]

        async def speak(generation: FakeGeneration, sizes: list[int]) -> None:
            number = 0
            for size in sizes:
                generation.say(*(str(number + i) for i in range(size)))
                number += size
                await trio.lowlevel.checkpoint()
            generation.say(DONE)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for generation, sizes in zip(generations, bursts, strict=True):
                    nursery.start_soon(speak, generation, sizes)
                events = []
                async for pair in choices:
                    events.append(pair)
                    if eager:
                        events += choices.receive_nowait(at_most=2)
        for index, event in events:
            seen[index].append(event.text if isinstance(event, TextPiece) else "done")
        assert seen == [[*map(str, range(sum(sizes))), "done"] for sizes in bursts]

    trio.run(main)


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_of_one_choice_ends_the_whole_after_what_came_before(n: int) -> None:
    generations, choices = some(n)
    generations[0].say("a")
    generations[0].fail(DecodeFailed("no"))
    with trio.fail_after(5):
        assert await anext(choices) == (0, TextPiece("a"))
        with pytest.raises(DecodeFailed):
            await anext(choices)
    choices.close()
    assert all(generation.closed.is_set() for generation in generations)


async def test_a_cancelled_wait_loses_nothing() -> None:
    generations, choices = some(2)
    with trio.move_on_after(0):
        await anext(choices)
    generations[1].say("b", DONE)
    generations[0].say("a", DONE)
    with trio.fail_after(5):
        events = [pair async for pair in choices]
    assert sorted((index, event.text) for index, event in events) == [(0, ""), (0, "a"), (1, ""), (1, "b")]
    assert sum(isinstance(event, Finished) for _, event in events) == 2


async def test_if_one_cannot_start_none_is_left() -> None:
    engine = FakeEngine()
    generations = [FakeGeneration(engine, GenerateRequest(prompt="x")) for _ in range(3)]
    choices = Choices(generations)
    engine.refusal = EngineBusy("full")
    with pytest.raises(EngineBusy):
        await choices.start()
    assert all(generation.closed.is_set() for generation in generations)
