"""Ollama's dialect with a real engine: the prompts that the model really gets."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from tests.real.pictures import picture
from tests.server.client import Server, post, serving
from tests.tiny_models import tiny_model
from trio_runner.core.ports import Runtime
from trio_runner.front_door import open_engine
from trio_runner.request import Infill
from trio_runner.testing import ToyLoader, toy_text

PIXEL = base64.b64encode(picture("red", "circle", "white", width=8, height=8)).decode()
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
THINKER = (
    f"{{{{ reasoning_effort }}}}{TEMPLATE}{{% if enable_thinking %}}<think>\n{{% elif false %}}</think>{{% endif %}}"
)


@contextlib.asynccontextmanager
async def toy(template: str | None, **options: Any) -> AsyncIterator[Server]:
    """A server over the toy, which has this chat template."""
    loader = ToyLoader()

    def load(*args: Any, **more: Any) -> Runtime:
        runtime = loader(*args, **more)
        assert loader.model is not None
        loader.model.info = replace(loader.model.info, chat_template=template)
        return runtime

    async with open_engine(load, **options) as engine, serving(engine) as server:
        yield server


async def said(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    answer = await server.ask(post(path, {"stream": False, "options": {"num_predict": 9}, **fields}))
    assert answer.status == 200, answer.body
    whole: dict[str, Any] = answer.json
    message: dict[str, Any] = whole.get("message", whole)
    return message


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


async def test_prompts() -> None:
    async with toy(TEMPLATE) as server:
        for fields, prompt in (
            ({"prompt": "x"}, "[user]x[assistant]"),
            ({"prompt": "x", "system": "y"}, "[system]y[user]x[assistant]"),
            ({"prompt": "x", "raw": True}, "x"),
        ):
            assert (await said(server, "/api/generate", **fields))["response"] == toy_text(prompt, 9)
        conversation = [user("x"), {"role": "assistant", "content": "z"}, user("w")]
        answer = await said(server, "/api/chat", messages=conversation)
        assert answer["content"] == toy_text("[user]x[assistant]z[user]w[assistant]", 9)
    async with toy(None) as server:
        assert (await said(server, "/api/generate", prompt="x", system="y"))["response"] == toy_text("y\n\nx", 9)
        refused = await server.ask(post("/api/chat", {"messages": [user("x")]}))
        assert (refused.status, "chat template" in refused.json["error"]) == (400, True)


async def test_a_conversation_that_is_too_long_loses_its_oldest_messages() -> None:
    messages = [{"role": "system", "content": "s"}, user("a" * 60), user("b" * 60), user("c")]
    async with toy(TEMPLATE, context_length=100) as server:
        answer = await said(server, "/api/chat", messages=messages)
        assert answer["content"] == toy_text(f"[system]s[user]{'b' * 60}[user]c[assistant]", 9)
        refused = await server.ask(post("/api/chat", {"messages": messages, "truncate": False}))
        assert (refused.status, "100" in refused.json["error"]) == (400, True)


async def test_num_predict() -> None:
    async with toy(TEMPLATE, context_length=100) as server:
        fields: dict[str, Any] = {"prompt": "x", "raw": True, "stream": False}

        async def ask(**options: Any) -> dict[str, Any]:
            answer: dict[str, Any] = (await server.ask(post("/api/generate", {**fields, "options": options}))).json
            return answer

        full = await ask(num_predict=-2, ignore_eos=True)
        assert (full["eval_count"], full["done_reason"]) == (100, "length")
        endless = await ask(num_predict=-1, ignore_eos=True)
        assert (endless["eval_count"], endless["done_reason"]) == (1000, "length")
        nothing = await ask(num_predict=0)
        assert (nothing["eval_count"], nothing["done_reason"], nothing["response"]) == (0, "length", "")


async def test_a_template_that_opens_the_thinking_itself() -> None:
    """The toy never writes a closing tag, so all is thinking."""
    async with toy(THINKER) as server:
        for think, effort in ((True, ""), ("low", "low")):
            answer = await said(server, "/api/chat", messages=[user("x")], think=think)
            thinking = toy_text(f"{effort}[user]x[assistant]<think>\n", 9).lstrip()
            assert answer == {"role": "assistant", "content": "", "thinking": thinking}
        for fields in ({"think": False}, {"think": None}):
            answer = await said(server, "/api/chat", messages=[user("x")], **fields)
            assert answer == {"role": "assistant", "content": toy_text("[user]x[assistant]", 9)}


async def test_images_for_a_model_that_takes_none() -> None:
    async with toy(TEMPLATE) as server:
        for path, fields in (
            ("/api/generate", {"prompt": "x", "images": [PIXEL]}),
            ("/api/chat", {"messages": [user("x"), {**user("y"), "images": [PIXEL]}]}),
            ("/api/generate", {"prompt": "[img-0]x", "raw": True, "images": [PIXEL]}),
        ):
            refused = await server.ask(post(path, fields))
            assert refused.status == 400
            assert "images, which need a model with a projector" in refused.json["error"]


async def test_a_gap_is_filled(tmp_path: Path) -> None:
    path = await trio.to_thread.run_sync(tiny_model, "fim", tmp_path)
    async with open_engine(path, threads=1) as engine, serving(engine, model_path=path) as server:
        fields = {"prompt": "one", "suffix": "two", "options": {"num_predict": 6, "temperature": 0}}
        expected = await engine.generate(
            Infill(prefix="one", suffix="two"), max_tokens=6, temperature=0, repeat_penalty=1
        ).collect()
        answer = await said(server, "/api/generate", **fields)
        assert (answer["response"], answer["eval_count"]) == (expected, 6)
        shown = (await server.ask(post("/api/show", {}))).json
        assert "insert" in shown["capabilities"]
        assert ".Suffix" in shown["template"]


async def test_a_model_without_tokens_for_gaps_takes_no_suffix() -> None:
    async with toy(TEMPLATE) as server:
        refused = await server.ask(post("/api/generate", {"prompt": "x", "suffix": "y"}))
        assert (refused.status, "suffix" in refused.json["error"]) == (400, True)
