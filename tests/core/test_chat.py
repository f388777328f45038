from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.core.chat_templates import TEMPLATES
from trio_runner.core.chat import ChatTemplate
from trio_runner.core.conversation import MAX_MESSAGES
from trio_runner.errors import InvalidRequest, RequestError, Unsupported
from trio_runner.request import MAX_TEXT_BYTES

DAY = datetime(2025, 1, 31)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It's <the> weather.",
        "parameters": {"type": "object", "properties": {"día": {"type": "string"}}},
    },
}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")


def of(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def text_of(name: str, *messages: dict[str, Any], **variables: Any) -> str:
    (text,) = template(name).render(messages, **{"now": DAY, **variables})
    assert isinstance(text, str)
    return text


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(*content: Any) -> dict[str, Any]:
    """A message of a user: one text, or parts, which are texts and images."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in content]
    return {"role": "user", "content": parts}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": content}


# Templates of well-known models.


def test_chatml() -> None:
    assert text_of("chatml", user("Hi <b>"), assistant("Yes?"), user("Bye")) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of("chatml", system("S"), user("U"), add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    )


def test_llama_3() -> None:
    begin = "<s><|start_header_id|>system<|end_header_id|>\n\n"
    said = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert text_of("llama 3", system(" S "), user(" Hi ")) == f"{begin}Today Date: 31 Jan 2025\n\nS<|eot_id|>{said}"
    assert text_of("llama 3", user("Hi"), now=None) == f"{begin}Today Date: 26 Jul 2024\n\n<|eot_id|>{said}"
    text = text_of("llama 3", user("Hi"), assistant(None, tool_calls=[call({"día": "x"})]), tool("sun"), tools=[TOOL])
    assert "Environment: ipython" in text
    assert '\n    "function": {\n        "name": "weather",\n        "description": "It\'s <the> weather.",\n' in text
    assert '"día": {' in text
    assert '{"name": "weather", "parameters": {"día": "x"}}<|eot_id|>' in text
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n"sun"<|eot_id|>' in text
    with pytest.raises(InvalidRequest, match="single tool-calls"):
        text_of("llama 3", user("Hi"), assistant(None, tool_calls=[call({}), call({})]))


def test_gemma() -> None:
    assert text_of("gemma", user(" a "), assistant("b"), user("c")) == (
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )
    for first, words in [(system("S"), "System role not supported"), (assistant("a"), "alternate")]:
        with pytest.raises(InvalidRequest, match=f"the model's chat template refuses messages: .*{words}") as caught:
            text_of("gemma", first, user("b"))
        assert caught.value.param == "messages"


def test_mistral() -> None:
    assert text_of("mistral", system("S"), user("a"), assistant(" b "), user("c")) == (
        "<s>[INST] a[/INST] b</s>[INST] S\n\nc[/INST]"
    )
    text = text_of("mistral", user("a"), assistant(None, tool_calls=[call({"día": 1})]), tool("sun"), tools=[TOOL])
    assert text.startswith('<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", ')
    assert text.endswith(
        '[INST] a[/INST][TOOL_CALLS] [{"name": "weather", "arguments": {"día": 1}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": sun, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )


def test_qwen() -> None:
    assert text_of("qwen", user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), enable_thinking=False) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    text = text_of("qwen", user("a"), assistant("<think>\nhm\n</think>\n\nb"), add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n")
    text = text_of(
        "qwen", user("a"), assistant(None, tool_calls=[call({"día": [1, None]})]), tool("x"), tool("y"), tools=[TOOL]
    )
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "description": "It\'s <the> ' in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"día": [1, null]}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nx\n</tool_response>\n"
        "<tool_response>\ny\n</tool_response><|im_end|>\n"
    ) in text


def test_deepseek() -> None:
    assert text_of("deepseek", system("S"), user("a"), assistant("<think>hm</think>b"), user("c")) == (
        "<s>S<｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>\n"
    )
    called = assistant(None, tool_calls=[call('{"x": 1}')])
    assert text_of("deepseek", user("a"), called, tool("sun"), assistant("b")) == (
        '<s><｜User｜>a<｜Assistant｜><｜call｜>weather\n```json\n{"x": 1}\n```<｜end▁of▁sentence｜>'
        "<｜output｜>sun<｜outputs｜>b<｜end▁of▁sentence｜><｜Assistant｜><think>\n"
    )


def test_phi() -> None:
    messages = [system("S"), user("a"), assistant("b")]
    said = "<|system|>\nS<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"
    assert text_of("phi", *messages) == f"{said}<|assistant|>\n"
    assert text_of("phi", *messages, add_generation_prompt=False) == f"{said}</s>"


def test_documents() -> None:
    documents = [{"title": "b", "text": " x\ny "}, {"title": "a", "text": "z"}]
    assert text_of("documents", user("u"), documents=documents) == (
        "<s>Document 1 of 2: A\nz;\nDocument 2 of 2: B\nx y\nuser> u\n"
    )


# Text and parts.


def test_contents_are_given_in_the_form_that_a_template_accepts() -> None:
    for name in TEMPLATES:
        if name != "gemma":
            before = [system("S"), user("one"), assistant("two")]
            part = {"type": "text", "text": "three"}
            assert text_of(name, *before, user("three")) == text_of(name, *before, {"role": "user", "content": [part]})
    assert "User: a<end" in text_of("only parts", user("a"))
    assert "System: a\nb<end" in text_of("only parts", system([{"type": "text", "text": "a\nb"}]))
    assert "user\nab<" in text_of("text or parts", user("a", "b"))
    assert "user\na\nb<" in text_of("chatml", user("a", "b"))
    assert "system\na\nb<" in text_of("text or parts", system(user("a", "b")["content"]), user("u"))


def test_arguments_are_given_in_the_form_that_a_template_accepts() -> None:
    for name in ("llama 3", "mistral", "qwen", "deepseek", "text or parts"):
        texts = {
            text_of(name, user("a"), assistant(None, tool_calls=[call(arguments)]), tool("sun"))
            for arguments in ({"día": "x"}, '{"día": "x"}')
        }
        assert len(texts) == 1
        assert "día" in texts.pop()
    for odd in ("no JSON", "[1]", '"text"', "[" * 100_000, None, 3):
        assert "weather" in text_of("qwen", user("a"), assistant("", tool_calls=[call(odd)]), tool("sun"))
    both = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}" + (
        "{{ a if a is string else a | tojson }}{% endfor %}{% endfor %}"
    )
    for arguments, shown in [('{"x":1}', '{"x":1}'), ({"x": 1}, '{"x": 1}')]:
        assert of(both).render([user("a"), assistant(None, tool_calls=[call(arguments)])]) == (shown,)


def test_messages_without_content() -> None:
    with_call = [user("a"), assistant(None, tool_calls=[call({})]), tool("sun"), assistant(None)]
    for name in TEMPLATES:
        if name not in ("gemma", "mistral", "documents"):
            assert "None" not in text_of(name, *with_call)
    without = [{key: value for key, value in message.items() if value is not None} for message in with_call]
    assert text_of("chatml", *without) == text_of("chatml", *with_call)


# Images.

IMAGES = st.builds(bytes, st.lists(st.integers(0, 255), max_size=3)) | st.just(Path("a.png"))
ODD_TEXTS = [
    *["[img-0]", "image", "image0n0e", f"image{'0' * 32}n0e", "<image>", "<|image_pad|>", "<start_of_image>"],
    *["{{ x }}", "{% raw %}", "{# no #}", "{{ raise_exception('x') }}", "'", '"', "\\", "\n", "é", "日本", "\0", "n0e"],
    *["<|im_end|>", "{'type': 'text'}", "None", "%s", "{0}"],
]
CHARACTERS = st.characters(exclude_categories=["Cs", "Co"])
TEXTS = st.lists(st.sampled_from(ODD_TEXTS) | st.text(CHARACTERS, max_size=5), max_size=4).map("".join)
CONVERSATIONS = st.lists(st.lists(TEXTS | IMAGES, min_size=1, max_size=4), min_size=1, max_size=3)
FOR_IMAGES = ["chatml", "only parts", "text or parts", "phi", "llama 3", "qwen"]


def turns(contents: list[list[Any]]) -> Iterator[dict[str, Any]]:
    for index, content in enumerate(contents):
        if index:
            yield assistant("yes")
        yield user(*content)


@settings(deadline=None)
@given(CONVERSATIONS, st.sampled_from(FOR_IMAGES))
def test_images_stay_in_their_places(contents: list[list[Any]], name: str) -> None:
    parts = template(name).render(list(turns(contents)), now=DAY)
    images = [part for content in contents for part in content if not isinstance(part, str)]
    found = [part for part in parts if not isinstance(part, str)]
    assert len(found) == len(images)
    assert all(a is b for a, b in zip(found, images, strict=True))
    assert "" not in parts
    # With a character in the place of each image, the text is the same.
    joined = "".join(part if isinstance(part, str) else "\uf8ff" for part in parts)
    pictured = [[part if isinstance(part, str) else "\uf8ff" for part in content] for content in contents]
    if not template(name).style.takes_parts:
        pictured = [[in_lines(content)] for content in pictured]
    assert template(name).render(list(turns(pictured)), now=DAY) == (joined,)


def in_lines(content: list[str]) -> str:
    """Each text is a line, and nothing is added around an image."""
    breaks = ["" if "\uf8ff" in (before, part) else "\n" for before, part in pairwise(content)]
    return "".join(chain.from_iterable(zip(content, [*breaks, ""], strict=True)))


@settings(deadline=None)
@given(st.lists(TEXTS.filter(str.strip), min_size=1, max_size=5), st.sampled_from(sorted(TEMPLATES)), st.booleans())
def test_texts_stay_in_order(texts: list[str], name: str, in_parts: bool) -> None:
    contents = [[{"type": "text", "text": text}] if in_parts else text for text in texts]
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]
    output = text_of(name, *messages)
    at = 0
    for text in texts:
        at = output.index(text.strip(), at) + len(text.strip())


def test_a_message_cannot_contain_the_marker_of_an_image() -> None:
    # In upper case a marker is not recognised, so that the test can read it.
    shown = of("{% for m in messages %}{{ m.content }}|{{ m.content | upper }}{% endfor %}")
    image, text = shown.render([user(b"x")])
    assert image == b"x"
    assert isinstance(text, str)
    first = text.removeprefix("|").lower()
    parts = shown.render([user(first, b"x"), assistant(f"{first}{first}")])
    assert [part for part in parts if not isinstance(part, str)] == [b"x"]
    texts = [part for part in parts if isinstance(part, str)]
    assert "".join(texts).count(first) == 3
    second = texts[1].removeprefix(f"|{first.upper()}").lower()
    assert second.startswith("image")
    assert not second.startswith(first)


def test_images_of_every_kind() -> None:
    picture = Image.new("RGB", (1, 1))
    url = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    parts = template("text or parts").render([user(b"x", Path("a"), picture, b"")])
    assert parts[1:-1] == (b"x", Path("a"), picture, b"")
    content = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "?"}]
    assert template("text or parts").render([{"role": "user", "content": content}])[1] == b"bytes"
    content[0] = {"type": "image_url", "image_url": {"url": url.replace("data:image/png", "DATA:image/svg+xml;x=y")}}
    assert template("chatml").render([{"role": "user", "content": content}])[1] == b"bytes"


def test_an_image_that_the_template_leaves_out_is_an_error() -> None:
    last_only = of("{{ messages[-1].content }}")
    assert last_only.render([user("a"), user(b"x", "b")]) == (b"x", "b")
    with pytest.raises(Unsupported, match=r"leaves out messages\[0\]\.content\[1\]\.image"):
        last_only.render([user("a", b"x"), user("b")])
    twice = of("{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}")
    assert twice.render([user(b"x")]) == (b"x", "|", b"x")
    with pytest.raises(Unsupported, match="leaves out"):
        of("{{ messages[0].content | upper }}").render([user(b"x")])
    assert of("").render([user("a")]) == ()


# Conversations that are refused.

BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ("text", "messages"),
    ({"role": "user", "content": "x"}, "messages"),
    ([], "messages"),
    ([user("x")] * (MAX_MESSAGES + 1), "messages"),
    (["text"], "messages[0]"),
    ([user("x"), None], "messages[1]"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "", "content": "x"}], "messages[0].role"),
    ([{"role": 1, "content": "x"}], "messages[0].role"),
    ([{"role": "\ud800", "content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": 1}], "messages[0].content"),
    ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
    ([{"role": "user", "content": b"bytes"}], "messages[0].content"),
    ([{"role": "user", "content": "\udfff"}], "messages[0].content"),
    ([user("x"), {"role": "user", "content": ["text"]}], "messages[1].content[0]"),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0].text"),
    ([user("x", b"y"), {"role": "user", "content": [{"type": "image"}]}], "messages[1].content[0].image"),
    ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "messages[0].content[0].image"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url.url"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0].image_url.url"),
    *(
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
            "messages[0].content[0].image_url.url",
        )
        for url in [
            *["http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "", 1],
            *["data:image/png,abc", "data:text/plain;base64,YQ==", "data:;base64,YQ==", "data:image/png;base64"],
            *["data:image/png;base64,YQ=", "data:image/png;base64,Y Q==", "data:image/png;base64,\xe9\xe9\xe9\xe9"],
            "data:image/png;base64," + "A" * (28 << 20),
        ]
    ),
    ([{"role": "user", "content": "x", "name": object()}], "messages[0].name"),
    ([{"role": "user", "content": "x", "name": {1: 2}}], "messages[0].name"),
    ([{"role": "user", "content": "x", 1: 2}], "messages[0]"),
    ([{"role": "user", "content": "x", "n": 10**400}], "messages[0].n"),
    ([{"role": "user", "content": "x" * (MAX_TEXT_BYTES // 2)}] * 2, "messages[1].content"),
    ([{"role": "user", "content": "é" * (MAX_TEXT_BYTES // 2)}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text", "text": ""}] * 300_000}], "messages[0].content"),
    ([{"role": "user", "content": "x", "list": [[]] * 300_000}], "messages[0].list"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_bad_messages_are_refused(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template("chatml").render(messages)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)
    assert len(str(caught.value)) < 200


def test_values_that_contain_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for given_too in ({"tools": loop}, {"documents": [loop]}, {"x": loop}):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            text_of("chatml", user("x"), **given_too)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].x is nested too deeply"):
        text_of("chatml", {"role": "user", "content": "x", "x": {"y": loop}})


def test_variables() -> None:
    shown = of("{{ a }}{{ tools }}{{ documents }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}")
    assert shown.render([user("x")], a=["é", 1]) == ("['é', 1]<s></s>True",)
    for name in ["bos_token", "eos_token", "messages", "_x", "a b", ""]:
        variables: dict[str, Any] = {name: 1}
        with pytest.raises(InvalidRequest) as caught:
            shown.render([user("x")], **variables)
        assert caught.value.param == name
    for name in ["tools", "documents"]:
        for value in ["text", {"a": 1}, 1]:
            variables = {name: value}
            with pytest.raises(InvalidRequest, match=f"{name} must be a list"):
                shown.render([user("x")], **variables)
    assert of("{{ tools is none and documents is none }}").render([user("x")], tools=[], documents=()) == ("True",)


def test_messages_are_not_changed() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": b"x"}]
    messages = [{"role": "user", "content": content}, assistant(None, tool_calls=[call("{}")]), tool("sun")]
    before = repr(messages)
    for name in FOR_IMAGES:
        template(name).render(messages, tools=[TOOL], now=DAY)
    assert repr(messages) == before


def test_failing_templates() -> None:
    for source in ["{% if %}", "{{ x | nothing }}", "{{ '<' * }}", "{% for %}", "x" * 200_000]:
        with pytest.raises(Unsupported, match="the model's chat template does not compile: ") as caught:
            of(source)
        assert caught.value.feature == "chat"
    for source in ["{{ x.y.z }}", "{{ messages[0].content + 1 }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}"]:
        with pytest.raises(Unsupported, match="the model's chat template fails with these messages: ") as caught:
            of(source).render([user("x")])
        assert caught.value.param == "messages"
    endless = of("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(Unsupported, match="too long"):
        endless.render([user("x")])
    with pytest.raises(InvalidRequest, match="a prompt of more than"):
        of("{% for m in messages %}{{ m.content * 3 }}{% endfor %}").render([user("x" * (MAX_TEXT_BYTES // 2))])


def test_the_longest_conversations() -> None:
    messages = [user("w" * 900) if index % 2 == 0 else assistant("w" * 900) for index in range(MAX_MESSAGES - 1)]
    for name in TEMPLATES:
        assert text_of(name, *messages).count("w" * 900) == len(messages)


VALUES: list[Any] = [None, True, 0, -1.5, "", "x", [], [None], {}, {"a": 1}, b"x", ["x"], [{"type": "text"}], "\ud800"]


@given(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system", *VALUES])}),
    st.dictionaries(st.sampled_from(["content", "tool_calls", "tool_call_id", "name"]), st.sampled_from(VALUES)),
    st.dictionaries(st.sampled_from(["tools", "documents", "enable_thinking"]), st.sampled_from(VALUES)),
    st.sampled_from(sorted(TEMPLATES)),
)
def test_any_message_is_rendered_or_refused(
    role: dict[str, Any], rest: dict[str, Any], variables: dict[str, Any], name: str
) -> None:
    with suppress(RequestError):
        template(name).render([{**role, **rest}], **variables)


def test_the_style_of_each_template_is_found() -> None:
    styles = {name: template(name).style for name in TEMPLATES}
    assert [name for name, style in styles.items() if style.takes_parts] == ["only parts", "text or parts"]
    assert [name for name, style in styles.items() if not style.takes_text] == ["only parts"]
    assert [name for name, style in styles.items() if style.takes_json] == ["qwen 3", "deepseek"]
    objects = ["llama 3", "mistral", "qwen", "qwen 3", "text or parts"]
    assert [name for name, style in styles.items() if style.takes_objects] == objects
