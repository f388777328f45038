"""Conversations: the chat template in the model's file makes a prompt of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.toys import (
    DEADLINE,
    Gate,
    Latch,
    Projector,
    Shutter,
    Toy,
    is_idle,
    items_of,
    open_when_closing,
    picture,
    prompts,
)
from trio_runner.engine.engine import Engine
from trio_runner.engine.helper_threads import LONG_TEXT
from trio_runner.engine.requests import n_characters
from trio_runner.errors import EngineClosed, InvalidImage, InvalidRequest, PromptTooLong, RequestError, Unsupported
from trio_runner.front_door import open_engine
from trio_runner.request import MAX_IMAGES, Chat, GenerateRequest
from trio_runner.testing import toy_text

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Messages = Sequence[Mapping[str, Any]]


def talking(toy: Toy, template: str = TEMPLATE, **info: object) -> None:
    toy.info = {"chat_template": template, **info}


def turns(*texts: str) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def rendered(messages: Messages) -> str:
    return "".join(f"<{message['role']}>{message['content']}</>" for message in messages) + "<assistant>"


def with_images(*parts: str | bytes) -> list[dict[str, Any]]:
    """One message of the user with images among its texts."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


# -- the prompt -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=10), min_size=1, max_size=5))
async def test_text_is_that_of_the_model_for_the_rendered_conversation(texts: list[str]) -> None:
    toy = Toy()
    talking(toy)
    messages = turns(*texts)
    async with toy.engine() as engine:
        assert await engine.chat(messages, max_tokens=20).collect() == toy_text(rendered(messages), 20)
    toy.check_closed()


async def test_a_conversation_takes_the_options_of_a_request(toy: Toy) -> None:
    talking(toy)
    messages = turns("hello")
    async with toy.engine() as engine:
        generation = engine.chat(messages, max_tokens=3, temperature=0.5, stop=["never there"], priority="background")
        assert await generation.collect() == toy_text(rendered(messages), 3)
        assert generation.request.stop == ("never there",)
        assert generation.request.priority == "background"
        assert toy.model.samplers[0].params.temperature == 0.5
        with pytest.raises(TypeError):
            engine.chat(messages, temprature=0.5)  # type: ignore[call-arg]
        request = GenerateRequest(prompt=Chat(messages=tuple(messages)), max_tokens=3)
        assert await engine.generate(request).collect() == toy_text(rendered(messages), 3)


async def test_the_variables_that_the_template_gets(toy: Toy) -> None:
    talking(
        toy,
        "{{ tools[0].name }} {{ documents[0].title }} {{ add_generation_prompt }} {{ mood }} {{ bos_token }} "
        "{{ eos_token }} {{ strftime_now('%Y') }} {{ messages[0].content }}",
        bos_text="<s>",
        eos_text="</s>",
    )
    async with toy.engine() as engine:
        before = datetime.now().year
        text = await engine.chat(
            turns("hello"),
            tools=[{"name": "hammer"}],
            documents=[{"title": "a book"}],
            add_generation_prompt=False,
            template_variables={"mood": "good"},
            max_tokens=20,
        ).collect()
        years = {before, datetime.now().year}
    assert text in {toy_text(f"hammer a book False good <s> </s> {year} hello", 20) for year in years}


async def test_the_next_turn_continues_from_the_prompt_cache(toy: Toy) -> None:
    talking(toy)
    first = turns("hello")
    async with toy.engine() as engine:
        answer = await engine.chat(first, max_tokens=20).collect()
        whole = answer.split("\ufffd")[0]  # U+FFFD stands for bytes that cannot be sent back as text
        second = turns("hello", whole, "and now?")
        generation = engine.chat(second, max_tokens=20)
        assert await generation.collect() == toy_text(rendered(second), 20)
    assert generation.usage is not None
    assert generation.usage.cached_tokens >= len(rendered(turns("hello"))) + len(whole.encode()) - 1


@pytest.mark.parametrize("begin", ["", "\x02"])
async def test_a_conversation_begins_with_bos_exactly_once(toy: Toy, begin: str) -> None:
    """It does not matter whether the template writes BOS or leaves it to the tokeniser. No token ends the prompt."""
    talking(
        toy, begin + TEMPLATE, token_bos=2, adds_bos=True, bos_text="\x02", eos_text="\x03", token_eos=3, adds_eos=True
    )
    messages = turns("hello")
    async with toy.engine() as engine:
        assert await engine.chat(messages, max_tokens=20).collect() == toy_text("\x02" + rendered(messages), 20)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [("look: ", picture(0), "?"), (picture(0), picture(1)), ("this ", picture(0), " or this ", picture(0))]
)
async def test_images_stand_at_their_place_in_the_message(toy: Toy, parts: tuple[str | bytes, ...]) -> None:
    talking(toy)
    toy.projector = Projector()
    seen: list[str | bytes] = ["<user>", *parts, "</><assistant>"]
    async with toy.engine() as engine:
        text = await engine.chat(with_images(*parts), max_tokens=20).collect()
    assert text == toy_text(items_of(toy.projector, seen), 20)


async def test_images_in_several_messages(toy: Toy) -> None:
    talking(toy)
    toy.projector = Projector()
    messages = [*with_images(picture(0)), *turns("hello"), *with_images(picture(1), "?")]
    seen: list[str | bytes] = ["<user>", picture(0), "</><user>hello</><user>", picture(1), "?</><assistant>"]
    async with toy.engine() as engine:
        assert await engine.chat(messages, max_tokens=20).collect() == toy_text(items_of(toy.projector, seen), 20)


async def test_a_conversation_with_an_image_can_be_closed(toy: Toy) -> None:
    talking(toy)
    toy.projector, shutter = Projector(), Shutter()
    toy.projector.on_encode = shutter
    async with toy.engine() as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.chat(with_images(picture(0))).collect)
            await shutter.reached()
            nursery.cancel_scope.cancel()
        assert shutter.encodings[0].cancelled.is_set()
        assert is_idle(engine)


async def test_a_conversation_that_is_rendered_while_the_engine_closes(toy: Toy) -> None:
    talking(toy)
    latch = Latch()

    class SlowMessage(dict[str, Any]):
        def get(self, key: str, default: Any = None, /) -> Any:
            if key == "role":
                latch()
            return super().get(key, default)

    async def ask(engine: Engine) -> None:
        with pytest.raises(EngineClosed):
            await engine.chat([SlowMessage(turns("hello")[0])]).start()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(ask, engine)
            await latch.reached()
            nursery.start_soon(open_when_closing, engine, toy, latch)
    assert toy.model.samplers == []


def test_an_image_does_not_make_a_conversation_long() -> None:
    """Its length is measured on the event loop, and images must not hold that up."""
    chat = Chat(messages=tuple(with_images("hello", bytes(20_000_000), " you")))
    assert n_characters(GenerateRequest(prompt=chat)) == len("hello you")
    strange: list[Any] = [{}, {"content": None}, {"content": [1, {"text": b"x"}, {}]}, 1, "text", None]
    assert n_characters(GenerateRequest(prompt=Chat(messages=tuple(strange)))) == 0


async def test_long_conversations_do_not_hold_up_short_texts(toy: Toy) -> None:
    """Two of them would hold both helper threads for short texts."""
    talking(toy, "x" * LONG_TEXT + TEMPLATE)
    latch = Latch()
    toy.on_tokenize = lambda text: latch() if len(text) > LONG_TEXT else None
    async with toy.engine(context_length=2 * LONG_TEXT) as engine, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(engine.chat(turns("hello"), max_tokens=1).start)
        await latch.reached()
        assert await engine.generate("hello", max_tokens=20).collect() == toy_text("hello", 20)
        latch.open()


# -- what is wrong ----------------------------------------------------------------------------------------------------


REFUSING = "{{ raise_exception('no, thank you') }}"
NOBODY: list[dict[str, Any]] = []
WRONG: dict[str, tuple[Any, dict[str, Any], type[RequestError], str]] = {
    "nobody says anything": (NOBODY, {}, InvalidRequest, "messages"),
    "no role": ([{"content": "x"}], {}, InvalidRequest, "messages[0].role"),
    "no message": ([*turns("x"), "hello"], {}, InvalidRequest, "messages[1]"),
    "half a character": (turns("\ud800"), {}, InvalidRequest, "messages[0].content"),
    "an unknown kind of part": (
        [{"role": "user", "content": [{"type": "smell"}]}],
        {},
        InvalidRequest,
        "messages[0].content[0].type",
    ),
    "too long": (turns("x" * 500), {}, PromptTooLong, "messages"),
    "no picture": (
        [*turns("x"), *with_images("see ", picture(0), b"a cat")],
        {},
        InvalidImage,
        "messages[1].content[2]",
    ),
    "too many pictures": (with_images(*[picture(0)] * (MAX_IMAGES + 1)), {}, InvalidRequest, "messages"),
    "a variable of our own": (turns("x"), {"template_variables": {"bos_token": "x"}}, InvalidRequest, "bos_token"),
    "an argument as a variable": (turns("x"), {"template_variables": {"tools": []}}, InvalidRequest, "tools"),
    "a time as a variable": (turns("x"), {"template_variables": {"now": 1}}, InvalidRequest, "now"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_conversation_takes_no_slot(toy: Toy, wrong: str) -> None:
    messages, fields, error, param = WRONG[wrong]
    talking(toy)
    toy.projector = Projector()
    (other,) = prompts(1, 20)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(context_length=128) as engine:
        neighbour = engine.generate(other, max_tokens=20)
        await neighbour.start()
        await gate.reached(1)
        with pytest.raises(error) as caught:
            await engine.chat(messages, **fields).start()
        assert caught.value.param == param
        assert engine.statistics().generations == 1
        assert len(toy.model.samplers) == 1
        gate.open()
        assert await neighbour.collect() == toy_text(other, 20)


async def test_an_image_that_a_template_shows_twice_is_named_by_its_messages(toy: Toy) -> None:
    talking(toy, TEMPLATE + TEMPLATE)
    toy.projector = Projector()
    seen: list[str | bytes] = ["<user>", picture(0), "</><assistant><user>", picture(0), "</><assistant>"]
    async with toy.engine() as engine:
        text = await engine.chat(with_images(picture(0)), max_tokens=20).collect()
        assert text == toy_text(items_of(toy.projector, seen), 20)
        with pytest.raises(InvalidImage) as caught:
            await engine.chat(with_images(b"a cat")).start()
        assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "error"), [(None, Unsupported), ("{% for %}", Unsupported), (REFUSING, InvalidRequest)]
)
async def test_a_model_without_a_usable_template(toy: Toy, template: str | None, error: type[RequestError]) -> None:
    toy.info = {"chat_template": template}
    async with toy.engine() as engine:
        for _ in range(2):
            with pytest.raises(error):
                await engine.chat(turns("hello")).start()
        assert is_idle(engine)
        assert await engine.generate("hello", max_tokens=20).collect() == toy_text("hello", 20)


async def test_images_need_a_projector(toy: Toy) -> None:
    talking(toy)
    async with toy.engine() as engine:
        with pytest.raises(Unsupported) as caught:
            await engine.chat(with_images("see ", b"a cat")).start()
        assert (caught.value.feature, caught.value.param) == ("images", "messages")
        assert await engine.chat(with_images("see"), max_tokens=20).collect() == toy_text(rendered(turns("see")), 20)


# -- the prompt as text -----------------------------------------------------------------------------------------------


async def test_the_rendered_text_is_the_prompt(toy: Toy) -> None:
    talking(toy, TEMPLATE + "{{ mood }}")
    messages = turns("hello", "hi", "\u00e9t\u00e9")
    chat = Chat(messages=tuple(messages), variables={"mood": "good"})
    async with toy.engine() as engine:
        text = await engine.render(chat)
        assert text == rendered(messages) + "good"
        assert await engine.generate(chat, max_tokens=9).collect() == toy_text(text, 9)
        assert await engine.render(Chat(messages=tuple(messages), add_generation_prompt=False)) == (
            rendered(messages).removesuffix("<assistant>")
        )
        assert is_idle(engine)


async def test_a_marker_stands_for_an_image_in_the_rendered_text(toy: Toy) -> None:
    talking(toy)
    toy.projector = Projector()
    chat = Chat(messages=tuple(with_images("a", b"no picture", "b")))
    async with toy.engine() as engine:
        assert await engine.render(chat) == "<user>a<__media__>b</><assistant>"
    assert toy.projector.encoded == []


@pytest.mark.parametrize("wrong", WRONG.keys() - {"too long", "no picture"})
async def test_what_is_wrong_with_a_conversation_is_told_when_it_is_rendered(toy: Toy, wrong: str) -> None:
    messages, options, error, param = WRONG[wrong]
    talking(toy)
    toy.projector = Projector()
    async with toy.engine() as engine:
        chat = Chat(messages=tuple(messages), variables=options.get("template_variables", {}))
        with pytest.raises(error) as caught:
            await engine.render(chat)
    assert caught.value.param == param


async def test_a_model_without_a_template_or_a_projector_renders_nothing(toy: Toy) -> None:
    async with toy.engine() as engine:
        with pytest.raises(Unsupported) as caught:
            await engine.render(Chat(messages=tuple(turns("hello"))))
        assert caught.value.feature == "chat"
    blind = Toy()
    talking(blind)
    async with blind.engine() as engine:
        with pytest.raises(Unsupported) as caught:
            await engine.render(Chat(messages=tuple(with_images("a", b"x"))))
        assert caught.value.feature == "images"
