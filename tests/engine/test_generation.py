"""What one reader of a generation gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.engine.toys import Gate, Toy, is_idle, prompts, until_idle
from trio_runner.engine.generation import Generation
from trio_runner.errors import EngineBusy, InvalidGrammar, InvalidRequest, PromptTooLong
from trio_runner.events import Event, Finished, PromptProgress, TextPiece
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams
from trio_runner.testing import END, N_VOCAB, toy_continuation, toy_text


async def events_of(generation: Generation) -> list[Event]:
    async with generation:
        return [event async for event in generation]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(event, Finished) for event in events[:-1])
    return events[-1]


@pytest.mark.parametrize("prompt", ["a", "hello", "another prompt that is a bit longer", "été"])
async def test_text_is_that_of_the_model(toy: Toy, prompt: str) -> None:
    async with toy.engine() as engine:
        events = await events_of(engine.generate(prompt, max_tokens=40))
    assert text_of(events) == toy_text(prompt, 40)
    assert all(event.text for event in events if isinstance(event, TextPiece))


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17])
async def test_max_tokens_is_exact(toy: Toy, max_tokens: int) -> None:
    (prompt,) = prompts(1, 20)
    async with toy.engine() as engine:
        generation = engine.generate(prompt, max_tokens=max_tokens)
        end = finished(await events_of(generation))
    assert end.reason == "length"
    assert end.usage.completion_tokens == max_tokens
    assert end.usage.prompt_tokens == len(prompt)
    assert end.usage.cached_tokens == 0
    assert generation.usage == end.usage
    # The last token is sampled and never decoded.
    assert sum(batch.n_rows for batch in toy.context.batches) == len(prompt) + max_tokens - 1


async def test_the_end_token_ends_the_text(toy: Toy) -> None:
    prompt = next(f"prompt {i}" for i in range(1000) if toy_continuation(list(f"prompt {i}".encode()), 30)[-1] == END)
    n_tokens = len(toy_continuation(list(prompt.encode()), 30))
    async with toy.engine() as engine:
        events = await events_of(engine.generate(prompt))
    assert text_of(events) == toy_text(prompt, n_tokens)
    assert finished(events).reason == "stop"
    assert finished(events).stop is None
    assert finished(events).usage.completion_tokens == n_tokens


async def test_text_ends_before_a_stop_string(toy: Toy) -> None:
    (prompt,) = prompts(1, 60)
    text = toy_text(prompt, 60)
    stop = text[20:24]
    async with toy.engine() as engine:
        for stops in (stop, [stop], ("never there", stop)):
            events = await events_of(engine.generate(prompt, max_tokens=60, stop=stops))
            assert text_of(events) == text[: text.index(stop)]
            assert finished(events).reason == "stop"
            assert finished(events).stop == stop


async def test_text_held_back_for_a_stop_string_comes_out_at_the_limit(toy: Toy) -> None:
    (prompt,) = prompts(1, 30)
    text = toy_text(prompt, 30)
    async with toy.engine() as engine:
        events = await events_of(engine.generate(prompt, max_tokens=30, stop=text + "and more"))
    assert [event.text for event in events] == [text, ""]


async def test_a_prompt_of_tokens(toy: Toy) -> None:
    async with toy.engine() as engine:
        assert await engine.generate(list(b"hello"), max_tokens=20).collect() == toy_text("hello", 20)
        assert await engine.generate(tuple(b"hello"), max_tokens=20).collect() == toy_text("hello", 20)


@pytest.mark.parametrize("prompt", [b"\x89PNG", bytearray(b"hello"), memoryview(b"hello"), {"hello": 1}, {"hello"}, 5])
async def test_what_is_no_prompt_is_refused(toy: Toy, prompt: Any) -> None:
    """Bytes would be taken for tokens, and a mapping for a list of texts."""
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest, match="prompt must be text") as caught:
            engine.generate(prompt)
        assert caught.value.param == "prompt"


async def test_a_whole_request(toy: Toy) -> None:
    request = GenerateRequest(prompt="hello", max_tokens=5, sampling=SamplingParams(temperature=0.0))
    async with toy.engine() as engine:
        assert await engine.generate(request).collect() == toy_text("hello", 5)
        with pytest.raises(TypeError):
            engine.generate(request, max_tokens=6)
    assert toy.model.samplers[0].params is request.sampling


async def test_fields_by_name_reach_the_sampler(toy: Toy) -> None:
    async with toy.engine() as engine:
        await engine.generate("hello", max_tokens=1, temperature=0.5, seed=42).collect()
    assert toy.model.samplers[0].params == SamplingParams(temperature=0.5, seed=42)


async def test_sampling_and_its_fields_do_not_mix(toy: Toy) -> None:
    """Otherwise one of them would be ignored silently."""
    async with toy.engine() as engine:
        with pytest.raises(TypeError, match="sampling"):
            engine.generate("hello", sampling=SamplingParams(seed=1), temperature=0.5)


async def test_progress_counts_decoded_and_cached_tokens(toy: Toy) -> None:
    prompt = "0123456789"
    async with toy.engine(batch_size=4) as engine:
        events = await events_of(engine.generate(prompt, max_tokens=3, progress=True))
        again = await events_of(engine.generate(prompt, max_tokens=3, progress=True))
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert [event.n_decoded for event in progress] == [4, 8, 10]
    assert {(event.n_prompt, event.n_cached) for event in progress} == {(10, 0)}
    assert [event for event in again if isinstance(event, PromptProgress)] == [PromptProgress(10, 10, 9)]
    assert finished(again).usage.cached_tokens == 9


async def test_logprobs_name_every_token(toy: Toy) -> None:
    prompt = next(f"prompt {i}" for i in range(1000) if toy_continuation(list(f"prompt {i}".encode()), 30)[-1] == END)
    expected = toy_continuation(list(prompt.encode()), 30)
    async with toy.engine() as engine:
        events = await events_of(engine.generate(prompt, logprobs=2))
    tokens = [token for event in events if isinstance(event, (TextPiece, Finished)) for token in event.tokens]
    assert [token.token for token in tokens] == expected
    assert all(len(token.top) == 2 for token in tokens[:-1])


async def test_no_logprobs_unless_asked_for(toy: Toy) -> None:
    async with toy.engine() as engine:
        events = await events_of(engine.generate("hello", max_tokens=10))
    assert all(event.tokens == () for event in events if isinstance(event, (TextPiece, Finished)))


async def test_iteration_needs_no_block(toy: Toy) -> None:
    async with toy.engine() as engine:
        assert "".join([event.text async for event in engine.generate("hello", max_tokens=20)]) == toy_text("hello", 20)
        await until_idle(engine)


async def test_an_event_may_be_awaited_with_a_timeout(toy: Toy) -> None:
    """If the wait for one event is cancelled, no event is lost: only the block closes the generation."""
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine, engine.generate("hello", max_tokens=20) as generation:
        for _ in range(3):
            with trio.move_on_after(0) as timeout:
                await anext(generation)
            assert timeout.cancelled_caught
        gate.open()
        assert "".join([event.text async for event in generation]) == toy_text("hello", 20)


async def test_nothing_happens_before_the_start(toy: Toy) -> None:
    async with toy.engine() as engine:
        generation = engine.generate("hello")
        await trio.testing.wait_all_tasks_blocked()
        assert is_idle(engine)
        assert toy.model.samplers == []
        assert generation.receive_nowait() == []
        generation.close()
        with pytest.raises(trio.ClosedResourceError):
            await anext(generation)
        await until_idle(engine)


async def test_starting_twice_is_starting_once(toy: Toy) -> None:
    async with toy.engine() as engine:
        generation = engine.generate("hello", max_tokens=10)
        await generation.start()
        await generation.start()
        assert await generation.collect() == toy_text("hello", 10)
    assert len(toy.model.samplers) == 1


async def test_reading_after_the_end(toy: Toy) -> None:
    async with toy.engine() as engine:
        generation = engine.generate("hello", max_tokens=3)
        async for _ in generation:
            pass
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(generation)
            assert generation.receive_nowait() == []
        generation.close()
        with pytest.raises(trio.ClosedResourceError):
            await anext(generation)
        with pytest.raises(trio.ClosedResourceError):
            generation.receive_nowait()


async def test_receive_nowait_takes_all_events_that_have_arrived(toy: Toy) -> None:
    async with toy.engine() as engine, engine.generate("hello", max_tokens=20) as generation:
        await until_idle(engine)
        events = generation.receive_nowait()
        assert text_of(events) == toy_text("hello", 20)
        assert generation.usage == finished(events).usage
        assert generation.receive_nowait() == []
        with pytest.raises(StopAsyncIteration):
            await anext(generation)


async def test_both_ways_of_reading_mix(toy: Toy) -> None:
    (prompt,) = prompts(1, 50)
    text = ""
    async with toy.engine() as engine, engine.generate(prompt, max_tokens=50) as generation:
        async for event in generation:
            text += event.text + text_of(generation.receive_nowait())
    assert text == toy_text(prompt, 50)


# -- what is wrong with a request is said before it takes a slot ----------------------------------------------------

WRONG: dict[str, tuple[object, dict[str, Any], type[Exception]]] = {
    "too long": ("x" * 100, {}, PromptTooLong),
    "empty": ("", {}, InvalidRequest),
    "no tokens": ((), {}, InvalidRequest),
    "no such token": ((1, N_VOCAB), {}, InvalidRequest),
    "bad grammar": ("hello", {"grammar": "("}, InvalidGrammar),
}


async def _anext(generation: Generation) -> None:
    await anext(generation)


async def _iterate(generation: Generation) -> None:
    async for _ in generation:
        pytest.fail("an event, and no error")


async def _enter(generation: Generation) -> None:
    async with generation:
        pytest.fail("the block was entered")


@pytest.mark.parametrize("use", [Generation.start, _enter, _anext, _iterate, Generation.collect])
@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_request_takes_no_slot(
    toy: Toy, wrong: str, use: Callable[[Generation], Awaitable[object]]
) -> None:
    prompt, fields, error = WRONG[wrong]
    async with toy.engine(context_length=64) as engine:
        generation = engine.generate(prompt, **fields)  # type: ignore[arg-type]
        with pytest.raises(error):
            await use(generation)
        assert is_idle(engine)
        # It has ended: reading again neither hangs nor starts it again.
        with pytest.raises(trio.ClosedResourceError):
            await anext(generation)
        assert is_idle(engine)
        assert toy.context.batches == []
        assert await engine.generate("hello", max_tokens=5).collect() == toy_text("hello", 5)


async def test_a_prompt_that_is_too_long_says_by_how_much(toy: Toy) -> None:
    async with toy.engine(context_length=64) as engine:
        with pytest.raises(PromptTooLong) as caught:
            await engine.generate("x" * 100).start()
        assert (caught.value.n_prompt, caught.value.n_ctx) == (100, 64)
        assert len(await engine.generate("x" * 100, truncate=True, max_tokens=1, shift=False).collect()) <= 1


async def test_a_field_that_does_not_exist_is_a_programming_error(toy: Toy) -> None:
    async with toy.engine() as engine:
        with pytest.raises(TypeError):
            engine.generate("hello", temprature=0.5)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest):
            engine.generate("hello", temperature="hot")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest):
            engine.generate("hello", max_tokens=-1)


async def test_a_full_context_that_may_not_shift_ends_with_length(toy: Toy) -> None:
    (prompt,) = prompts(1, 60)
    async with toy.engine(context_length=32) as engine:
        events = await events_of(engine.generate(prompt, shift=False))
    assert finished(events).reason == "length"
    # The last sampled token needs no position.
    assert finished(events).usage.completion_tokens == 32 - len(prompt) + 1
    assert text_of(events) == toy_text(prompt, 32 - len(prompt) + 1)


@pytest.mark.parametrize("at_once", [False, True])
async def test_an_error_in_the_middle_comes_after_the_text_before_it(toy: Toy, at_once: bool) -> None:
    allowed = "abcdefgh"
    prompt = next(prompt for prompt in prompts(20, 40) if set(toy_text(prompt, 3)) <= set(allowed))
    text = toy_text(prompt, 40)
    n_allowed = next(n for n, char in enumerate(text) if char not in allowed)
    got = ""
    async with toy.engine() as engine:
        async with engine.generate(prompt, grammar=allowed) as generation:
            if at_once:
                await until_idle(engine)
                got += text_of(generation.receive_nowait())
                assert generation.receive_nowait() == []
            with pytest.raises(InvalidGrammar):  # noqa: PT012
                while True:
                    got += (await anext(generation)).text
            assert got == text[:n_allowed]
            assert generation.usage is not None
            assert generation.receive_nowait() == []
            with pytest.raises(StopAsyncIteration):
                await anext(generation)
        assert await engine.generate(prompt, max_tokens=40).collect() == text


async def test_facts_of_a_ready_engine(toy: Toy) -> None:
    async with toy.engine() as engine:
        assert engine.status == "ready"
        assert engine.progress == 1.0
        assert engine.info.architecture == "toy"
        assert engine.capabilities.n_slots == engine.statistics().slots == 4
        assert await engine.tokenize("été") == list("été".encode())
        assert await engine.detokenize(list("été".encode())[:-1]) == "ét\ufffd"
        with pytest.raises(InvalidRequest):
            await engine.detokenize([N_VOCAB])
        assert await engine.pieces(list("é".encode())) == [b"\xc3", b"\xa9"]
        with pytest.raises(InvalidRequest) as caught:
            await engine.pieces([65, N_VOCAB])
        assert caught.value.param == "tokens"


async def test_facts_of_a_loading_engine_raise(toy: Toy) -> None:
    def wait(report: object, cancelled: Callable[[], bool]) -> None:
        while not cancelled():
            trio.from_thread.run(trio.sleep, 0.001)

    toy.on_load = wait
    async with toy.engine(wait=False) as engine:
        assert engine.status == "loading"
        with pytest.raises(EngineBusy):
            _ = engine.info
        with pytest.raises(EngineBusy):
            _ = engine.capabilities
        assert is_idle(engine)


async def test_ignore_eos_goes_on_to_the_limit(toy: Toy) -> None:
    prompt = next(f"prompt {i}" for i in range(1000) if toy_continuation(list(f"prompt {i}".encode()), 30)[-1] == END)
    async with toy.engine() as engine:
        end = finished(await events_of(engine.generate(prompt, max_tokens=50, ignore_eos=True)))
    assert end.reason == "length"
    assert end.usage.completion_tokens == 50
