"""Conversations with a toy in this process: the input is a file, and so is the output."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.chat.terminals import CHAT_TEMPLATE
from tests.cli.programs import DEADLINE
from tests.engine.toys import picture
from trio_runner import open_engine
from trio_runner.cli.chat.conversation import Conversation, to_json
from trio_runner.cli.chat.display import PlainDisplay
from trio_runner.cli.chat.local import LocalModel
from trio_runner.cli.chat.loop import ChatLoop
from trio_runner.cli.chat.reader import LineReader
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams
from trio_runner.testing import ToyLoader, ToyProjector, toy_text


@dataclass
class Talk:
    """What came of a conversation."""

    code: int
    output: str
    notices: list[str]
    conversation: Conversation


Run = Callable[..., Any]


@asynccontextmanager
async def toy_model(toy: ToyLoader, context_length: int = 4096, **options: Any) -> AsyncIterator[LocalModel]:
    def load(config: Any, **more: Any) -> Any:
        loaded = toy(config, **more)
        loaded.model.info = replace(loaded.model.info, chat_template=CHAT_TEMPLATE)  # type: ignore[misc]
        return loaded

    with trio.fail_after(DEADLINE):
        async with open_engine(load, slots=1, context_length=context_length) as engine:
            sampling = SamplingParams(ignore_eos=True)
            defaults = {"max_tokens": 8, "shift": False, "sampling": sampling}
            yield LocalModel(engine, GenerateRequest(prompt="", **{**defaults, **options}), "toy")


async def talk(model: LocalModel, directory: Path, *lines: str, conversation: Conversation | None = None) -> Talk:
    """Have a conversation of these lines, until the end of them."""
    source, target = directory / "in", directory / "out"
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    conversation = conversation or Conversation()
    notices: list[str] = []
    with source.open("rb") as reading, target.open("wb") as writing:
        reader, display = LineReader(reading.fileno()), PlainDisplay(writing.fileno())
        code = await ChatLoop(reader, display, conversation, notify=notices.append).run(model)
    return Talk(code, target.read_text(encoding="utf-8"), notices, conversation)


def answer_to(*texts: str) -> str:
    return toy_text(prompt_of(*texts), 8)


def prompt_of(*texts: str) -> str:
    roles = ("user", "assistant")
    return "".join(f"{roles[number % 2]}: {text};" for number, text in enumerate(texts)) + "assistant: "


async def test_each_exchange_has_the_whole_conversation_and_decodes_only_what_is_new(tmp_path: Path) -> None:
    toy = ToyLoader()
    async with toy_model(toy) as model:
        first = answer_to("one?")
        second = answer_to("one?", first, "two?")
        assert (await talk(model, tmp_path, "one?", "two?")).output == f"{first}\n{second}\n"
        assert toy.context is not None
        starts = [chunk.start for batch in toy.context.batches for chunk in batch.chunks if len(chunk.items) > 1]
        # All of the first prompt, then what the first exchange did not leave in the slot: its last token is not there.
        assert starts == [0, len(prompt_of("one?")) + 7]


async def test_a_conversation_that_fills_the_context_loses_its_oldest_messages(tmp_path: Path) -> None:
    async with toy_model(ToyLoader(), context_length=200) as model:
        lines = ["the first of all messages", *(f"message number {number}" for number in range(12))]
        result = await talk(model, tmp_path, *lines, conversation=Conversation("be kind"))
        assert result.code == 0
        assert len(result.conversation.messages) == 27
        assert len(result.conversation.sent) < 10
        assert result.conversation.sent[0]["role"] == "system"
        assert result.conversation.sent[1]["role"] == "user"
        full = [notice for notice in result.notices if "The context is full: the oldest" in notice]
        assert 1 < len(full) < 7  # half of it at once, and not a little in each exchange


async def test_a_message_that_makes_the_conversation_too_long(tmp_path: Path) -> None:
    async with toy_model(ToyLoader(), context_length=200) as model:
        result = await talk(model, tmp_path, "x" * 80, "y" * 150)
        assert result.code == 0
        assert "The context is full: the oldest 2 messages will no longer be sent." in result.notices
        assert result.output.splitlines()[1] == answer_to("y" * 150)
        result = await talk(model, tmp_path, "z" * 300, "never read")
        assert result.code == 1
        assert result.notices == ["error: the conversation has 318 tokens, but at most 200 fit (--context-length)"]
        assert result.conversation.messages == ()


async def test_answers_that_are_cut(tmp_path: Path) -> None:
    async with toy_model(ToyLoader(), context_length=64, max_tokens=None) as model:
        result = await talk(model, tmp_path, "x" * 40)
        assert result.notices[0] == "The answer was cut, because the context is full."


async def test_images(tmp_path: Path) -> None:
    file, other = tmp_path / "picture.png", tmp_path / "other.txt"
    file.write_bytes(picture(0))
    other.write_text("text")
    async with toy_model(ToyLoader(projector=ToyProjector())) as model:
        result = await talk(model, tmp_path, f"/image {file}", "what is it?", "and now?", f"/image {other}")
        assert result.code == 1
        assert result.notices[0] == "The next message has 1 image."
        assert result.notices[-1].startswith(f"error: {other} is of an unknown format")
        question = result.conversation.messages[0]["content"]
        assert [part["type"] for part in question] == ["image_url", "text"]
        assert len(result.output.splitlines()) == 2
    async with toy_model(ToyLoader()) as model:
        result = await talk(model, tmp_path, f"/image {file}", "what is it?")
        assert result.notices[-1] == "error: messages has images, which need a model with a projector"
        assert result.conversation.messages == ()


async def test_saving_and_loading(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    async with toy_model(ToyLoader()) as model:
        first = await talk(model, tmp_path, "/system be kind", "one?", f"/save {saved}", "/system")
        assert first.notices[-2:] == ["Saved 3 messages.", "be kind"]
        assert saved.read_text() == to_json(first.conversation.messages)
        both = await talk(model, tmp_path, f"/load {saved}", "two?", f"/save {saved}")
        assert both.notices[0] == "The conversation has 3 messages."
        assert both.code == 1
        os.chmod(saved, 0o640)
        assert both.notices[-1] == f"error: there is a file {saved}: /save -f PATH replaces it"
        assert len(json.loads(saved.read_text())) == 3
        again = await talk(model, tmp_path, f"/load {saved}", "two?", f"/save -f {saved}")
        assert again.code == 0
        assert json.loads(saved.read_text()) == [*both.conversation.messages]
        assert saved.stat().st_mode & 0o777 == 0o640
        assert sorted(os.listdir(tmp_path)) == ["in", "out", "saved.json"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/load {}/none", "error: {}/none cannot be read: No such file or directory"),
        ("/load {}", "error: {} cannot be read: Is a directory"),
        ("/load {}/bad", "error: {}/bad is no conversation: it is not JSON"),
        ("/save {}/none/x", "error: {}/none/x cannot be written: No such file or directory"),
        ("/save -f {}/none/x", "error: {}/none/x cannot be written: No such file or directory"),
        ("/save -f {}", "error: {} is not a regular file"),
        ("/save -f /dev/null", "error: /dev/null is not a regular file"),
        ("/image {}/none", "error: {}/none cannot be read"),
        ("/retry", "error: there is no message to answer again"),
        ("/nothing", "error: there is no command /nothing"),
    ],
)
async def test_the_first_error_ends_a_conversation_from_a_pipe(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("x")
    async with toy_model(ToyLoader()) as model:
        result = await talk(model, tmp_path, line.replace("{}", str(tmp_path)), "never read")
        assert result.code == 1
        assert len(result.notices) == 1
        assert result.notices[0].startswith(words.replace("{}", str(tmp_path)))
        assert not result.output


async def test_other_commands(tmp_path: Path) -> None:
    async with toy_model(ToyLoader()) as model:
        result = await talk(
            model, tmp_path, "/system", "one?", "/retry", "/clear", '"""', "two", 'lines"""', "/help", "/bye", "no"
        )
        assert result.code == 0
        assert result.notices[0] == "There is no system message."
        assert "/help" in result.notices[-1]
        answers = [answer_to(text) for text in ("one?", "one?", "two\nlines")]
        assert result.output == "".join(f"{answer}\n" for answer in answers)
        assert len(result.conversation.messages) == 2


async def test_the_end_of_the_input_ends_a_message_too(tmp_path: Path) -> None:
    async with toy_model(ToyLoader()) as model:
        result = await talk(model, tmp_path, '"""no end')
        assert result.output == answer_to("no end") + "\n"


async def test_lines_of_a_slow_pipe() -> None:
    read_end, write_end = os.pipe()
    try:
        reader = LineReader(read_end)
        lines: list[str] = []
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    while True:
                        try:
                            lines.append(await reader.read())
                        except EOFError:
                            return

                nursery.start_soon(read)
                for piece in (b"\xef\xbb\xbfone\r", b"\ntw", b"o\n\n\xc3", b"\xa4\xff", b"\nlast"):
                    await trio.testing.wait_all_tasks_blocked()
                    os.write(write_end, piece)
                os.close(write_end)
        assert lines == ["one", "two", "", "ä\ufffd", "last"]
    finally:
        os.close(read_end)
