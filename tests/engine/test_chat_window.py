"""With `truncate`, the oldest messages of a conversation that is too long are dropped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_chat import rendered, talking, turns
from tests.engine.toys import Projector, Toy, items_of, picture
from trio_runner.engine.chat_window import first_that_holds
from trio_runner.engine.engine import Engine
from trio_runner.errors import PromptTooLong
from trio_runner.testing import toy_text

N_CTX = 120
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</>{% endfor %}<assistant>"
)

Messages = list[dict[str, Any]]


def said(*pairs: str) -> Messages:
    """Messages from words such as "user:hello"."""
    return [dict(zip(("role", "content"), pair.split(":"), strict=True)) for pair in pairs]


async def assert_prompt(engine: Engine, messages: Messages, expected: Messages) -> None:
    """The prompt is that of the expected messages."""
    generation = engine.chat(messages, truncate=True, max_tokens=1)
    assert await generation.collect() == toy_text(rendered(expected), 1)
    assert generation.usage is not None
    assert generation.usage.prompt_tokens == len(rendered(expected))


@given(st.integers(0, 200), st.integers(-5, 220), st.integers(0, 200))
def test_the_search_finds_the_first_number_in_few_attempts(n: int, guess: int, first: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        assert 0 <= number < n
        asked.append(number)
        return number >= first

    assert first_that_holds(n, max(guess, 0), holds) == min(first, n)
    assert len(set(asked)) == len(asked) <= 2 * n.bit_length() + 2
    if guess == first < n:
        assert asked[0] == first
        assert len(asked) <= 2


@settings(max_examples=30)
@given(
    st.lists(
        st.builds(
            lambda role, text: {"role": role, "content": text},
            st.sampled_from(["user", "assistant", "system"]),
            st.text("ab", max_size=40),
        ),
        min_size=1,
        max_size=12,
    )
)
async def test_as_few_messages_as_possible_are_dropped(messages: Messages) -> None:
    toy = Toy()
    talking(toy)
    *before, _ = messages
    droppable = [message for message in before if message["role"] != "system"]
    async with toy.engine(context_length=N_CTX) as engine:
        for n in range(len(droppable) + 1):
            dropped = {id(message) for message in droppable[:n]}
            kept = [message for message in messages if id(message) not in dropped]
            if len(rendered(kept)) <= N_CTX:
                await assert_prompt(engine, messages, kept)
                break
        else:
            with pytest.raises(PromptTooLong) as caught:
                await engine.chat(messages, truncate=True).start()
            assert (caught.value.n_prompt, caught.value.n_ctx) == (len(rendered(kept)), N_CTX)
            assert caught.value.param == "messages"
    toy.check_closed()


async def test_without_truncate_it_is_refused(toy: Toy) -> None:
    talking(toy)
    async with toy.engine(context_length=N_CTX) as engine:
        with pytest.raises(PromptTooLong):
            await engine.chat(turns("a" * 60, "b" * 60, "c")).start()


async def test_a_template_that_wants_roles_to_alternate(toy: Toy) -> None:
    """Where one message would have been enough, two are dropped."""
    talking(toy, ALTERNATING)
    messages = turns("a" * 60, "b" * 10, "c" * 10, "d" * 10, "e")
    async with toy.engine(context_length=N_CTX) as engine:
        assert len(rendered(messages[1:])) <= N_CTX < len(rendered(messages))
        await assert_prompt(engine, messages, messages[2:])


async def test_the_result_of_a_tool_does_not_stay_without_its_call(toy: Toy) -> None:
    talking(toy)
    messages = said("user:" + "a" * 20, "assistant:" + "b" * 60, "tool:" + "c" * 5, "assistant:d", "tool:e")
    async with toy.engine(context_length=N_CTX) as engine:
        assert len(rendered(messages[2:])) <= N_CTX < len(rendered(messages[1:]))
        await assert_prompt(engine, messages, messages[3:])


async def test_the_rows_of_images_count(toy: Toy) -> None:
    talking(toy)
    toy.projector = Projector()

    def look(number: int, text: str) -> dict[str, Any]:
        content = [{"type": "image", "image": picture(number)}, {"type": "text", "text": text}]
        return {"role": "user", "content": content}

    messages = [look(1, "a" * 20), *turns("b" * 5), look(2, "c")]
    items = items_of(toy.projector, ["<user>", picture(2), "c</><assistant>"])
    async with toy.engine(context_length=len(items)) as engine:
        generation = engine.chat(messages, truncate=True, max_tokens=1)
        assert await generation.collect() == toy_text(items, 1)
    assert len(toy.projector.encoded) == 2


async def test_a_long_conversation_is_rendered_only_a_few_times(toy: Toy) -> None:
    talking(toy)
    tokenised: list[str] = []
    toy.on_tokenize = tokenised.append
    messages = turns(*(f"{n:04}" * 3 for n in range(1000)))
    messages[0]["role"] = "system"
    kept = [messages[0], *messages[-7:]]
    async with toy.engine(context_length=len(rendered(kept)) + 3) as engine:
        await assert_prompt(engine, messages, kept)
    texts = [text for text in tokenised if text]
    assert len(texts) <= 6
    assert sum(map(len, texts[1:])) < 3 * len(texts[0])
