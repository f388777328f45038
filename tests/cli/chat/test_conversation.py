"""The messages of a conversation."""

from __future__ import annotations

import json

import pytest

from trio_runner.cli.chat.conversation import BadConversation, Conversation, from_json, image_url, to_json


def said(conversation: Conversation) -> list[tuple[str, object]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def with_an_exchange() -> Conversation:
    conversation = Conversation("be kind")
    conversation.ask("one?")
    conversation.answer("one!")
    return conversation


EXCHANGE = [("system", "be kind"), ("user", "one?"), ("assistant", "one!")]


def test_exchanges() -> None:
    conversation = with_an_exchange()
    conversation.ask("two?")
    conversation.answer("two!")
    assert said(conversation) == [*EXCHANGE, ("user", "two?"), ("assistant", "two!")]


def test_an_exchange_without_an_answer_is_withdrawn_and_can_be_tried_again() -> None:
    conversation = with_an_exchange()
    conversation.ask("two?")
    conversation.withdraw()
    assert said(conversation) == EXCHANGE
    assert conversation.retry()
    conversation.withdraw()
    assert said(conversation) == EXCHANGE
    assert conversation.retry()
    conversation.answer("two!")
    assert said(conversation) == [*EXCHANGE, ("user", "two?"), ("assistant", "two!")]


def test_another_answer_takes_the_place_of_the_last() -> None:
    conversation = with_an_exchange()
    assert conversation.retry()
    assert said(conversation) == EXCHANGE[:2]
    conversation.withdraw()  # the other answer failed
    assert said(conversation) == EXCHANGE
    assert conversation.retry()
    conversation.answer("uno!")
    assert said(conversation) == [*EXCHANGE[:2], ("assistant", "uno!")]


@pytest.mark.parametrize(
    "messages", [[], [("system", "x")], [("assistant", "x")], [("system", "x"), ("assistant", "x")]]
)
def test_nothing_to_try_again(messages: list[tuple[str, str]]) -> None:
    conversation = Conversation()
    conversation.restore([{"role": role, "content": text} for role, text in messages])
    assert not conversation.retry()
    assert said(conversation) == messages


def test_the_system_message() -> None:
    conversation = Conversation()
    assert conversation.system == ""
    conversation.ask("one?")
    conversation.system = "be kind"
    assert said(conversation) == EXCHANGE[:2]
    conversation.system = "be quick"
    assert conversation.system == "be quick"
    assert said(conversation) == [("system", "be quick"), ("user", "one?")]
    conversation.clear()
    assert said(conversation) == [("system", "be quick")]
    conversation.system = ""
    assert said(conversation) == []


def test_images_go_with_the_next_message() -> None:
    conversation = Conversation()
    conversation.attach(image_url(b"\x00\xff", "image/png"))
    conversation.attach(image_url(b"", "image/jpeg"))
    assert conversation.n_images == 2
    conversation.ask("what is it?")
    assert conversation.n_images == 0
    assert said(conversation) == [
        (
            "user",
            [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AP8="}},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,"}},
                {"type": "text", "text": "what is it?"},
            ],
        )
    ]


def test_a_conversation_survives_its_file() -> None:
    conversation = with_an_exchange()
    conversation.attach(image_url(b"x", "image/png"))
    conversation.ask("wäs?")
    assert from_json(to_json(conversation.messages)) == [*conversation.messages]
    assert "wäs" in to_json(conversation.messages)


def test_the_body_of_a_request_is_a_conversation() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert from_json(json.dumps({"model": "x", "messages": messages})) == messages


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1", "no list of messages"),
        ("{}", "no list of messages"),
        ("[1]", "messages[0] must be an object"),
        ('[{"role": "user", "content": ""}, {"content": "x"}]', "messages[1].role must be one of system, "),
        ('[{"role": "king"}]', "messages[0].role"),
        ('[{"role": ["user"]}]', "messages[0].role"),
        ('[{"role": "user", "content": 1}]', "messages[0].content must be text or a list of parts"),
        ('[{"role": "user", "content": [{}]}]', "messages[0].content[0] must be an object with a type"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(text: str, words: str) -> None:
    with pytest.raises(BadConversation) as caught:
        from_json(text)
    assert words in str(caught.value)


def test_about_half_is_forgotten_at_once() -> None:
    conversation = Conversation("be kind")
    for number in range(8):
        conversation.ask(f"{number}?" + "x" * 50)
        conversation.answer(f"{number}!" + "x" * 50)
    everything = conversation.messages
    assert conversation.forget_oldest() == 8
    assert conversation.sent == (everything[0], *everything[9:])
    assert conversation.forget_oldest() == 4
    assert conversation.sent == (everything[0], *everything[13:])
    assert conversation.messages == everything
    conversation.system = ""
    assert conversation.sent == everything[13:]


def test_the_last_message_of_the_user_is_never_forgotten() -> None:
    conversation = with_an_exchange()
    conversation.ask("x" * 1000)
    assert conversation.forget_oldest() == 2
    assert said(conversation)[-1] == ("user", "x" * 1000)
    assert [message["role"] for message in conversation.sent] == ["system", "user"]
    assert conversation.forget_oldest() == 0
    conversation.withdraw()
    assert conversation.forget_oldest() == 0
    conversation.ask("two?")
    assert [message["content"] for message in conversation.sent] == ["be kind", "two?"]


def test_an_image_counts_as_much_text() -> None:
    conversation = Conversation()
    conversation.ask("one?")
    conversation.answer("one!")
    conversation.attach(image_url(b"x" * 10**6, "image/png"))
    conversation.ask("what is it?")
    conversation.answer("a cat " * 300)
    conversation.ask("what else?" * 300)
    assert conversation.forget_oldest() == 4


def test_a_new_conversation_has_forgotten_nothing() -> None:
    for begin in (Conversation.clear, lambda conversation: conversation.restore(with_an_exchange().messages)):
        conversation = with_an_exchange()
        conversation.ask("two?")
        assert conversation.forget_oldest() == 2
        begin(conversation)
        assert conversation.sent == conversation.messages
