"""`chat --url` against a real server: what it sends, what it shows, and what it says when the server fails."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.cli.chat.openai_server import Script, breaks_off, chunk, never_ends, openai_server, says, sends
from tests.cli.chat.terminals import CHAT_TEMPLATE, CTRL_C, CTRL_D, terminal
from tests.cli.programs import DEADLINE, SLOW, Program, program
from trio_runner.cli.chat.model import AnswerEvent, ChatError, ConversationTooLong, Ended, Said
from trio_runner.cli.chat.remote import RemoteModel, open_client
from trio_runner.testing import toy_text

ASKED = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def remote_model(url: str, model: str = "m", api_key: str | None = None) -> AsyncIterator[RemoteModel]:
    with trio.fail_after(DEADLINE):
        async with open_client(url) as client:
            yield RemoteModel(client, f"{url}/v1", model=model, api_key=api_key, options={"seed": 1})


async def answer(model: RemoteModel) -> list[AnswerEvent]:
    async with model.answer(ASKED) as events:
        return [event async for event in events]


async def test_an_answer_comes_as_it_is_made() -> None:
    async with openai_server(says("hel", "lö")) as server, remote_model(server.url) as model:
        assert await answer(model) == [Said("hel"), Said("lö"), Ended()]
        assert server.bodies == [{"model": "m", "messages": ASKED, "stream": True, "seed": 1}]


async def test_the_first_model_is_taken_unless_one_is_named() -> None:
    async with openai_server(says("x"), says("y")) as server, remote_model(server.url, model="") as model:
        await answer(model)
        await answer(model)
        assert [body["model"] for body in server.bodies] == ["first", "first"]


async def test_leaving_the_block_closes_the_connection() -> None:
    async with openai_server(never_ends("hello")) as server, remote_model(server.url) as model:
        async with model.answer(ASKED) as events:
            assert await anext(events) == Said("hello")
        await server.closed.wait()


async def test_an_answer_that_is_cancelled_closes_the_connection() -> None:
    async with openai_server(never_ends("hello"), says("again")) as server, remote_model(server.url) as model:
        with trio.CancelScope() as scope:
            async with model.answer(ASKED) as events:
                async for _ in events:
                    scope.cancel()
        assert scope.cancelled_caught
        await server.closed.wait()
        assert await answer(model) == [Said("again"), Ended()]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (404, "the server answered 404: no model m"),
        (breaks_off("hello"), "the connection broke before the answer ended"),
        (sends(chunk(content="hello")), "the connection ended before the answer did"),
        (sends(b'data: {"error": {"message": "no memory"}}\n\n'), "the server reports an error: no memory"),
        (sends(b"data: what?\n\n"), "no part of an answer: what?"),
        (sends(b"data: " + b"x" * (9 << 20)), "an event of more than"),
        (sends(b"hello"), "the connection ended before the answer did"),
    ],
)
async def test_failures_are_one_line(script: Script | int, words: str) -> None:
    async with openai_server(script, says("fine")) as server, remote_model(server.url) as model:
        with pytest.raises(ChatError) as caught:
            await answer(model)
        assert words in str(caught.value)
        assert await answer(model) == [Said("fine"), Ended()]


async def test_what_came_before_a_failure_is_not_lost() -> None:
    data = chunk(content="hello") + b'data: {"error": "no memory"}\n\n'
    async with (
        openai_server(sends(data)) as server,
        remote_model(server.url) as model,
        model.answer(ASKED) as events,
    ):
        assert await anext(events) == Said("hello")
        with pytest.raises(ChatError, match="no memory"):
            await anext(events)


async def test_keys() -> None:
    async with openai_server(says("x"), api_key="sesame") as server:
        for key, words in ((None, "wants an API key"), ("wrong", "refuses the API key")):
            async with remote_model(server.url, api_key=key) as model:
                with pytest.raises(ChatError, match=words):
                    await answer(model)
        async with remote_model(server.url, api_key="sesame") as model:
            assert await answer(model) == [Said("x"), Ended()]


async def test_a_server_that_is_away() -> None:
    async with openai_server() as server:
        url = server.url
    async with remote_model(url) as model:
        with pytest.raises(ChatError, match=f"cannot reach {url}/v1: Connection refused"):
            await answer(model)


@asynccontextmanager
async def our_server(model: str, **environment: str) -> AsyncIterator[str]:
    """Our own server over a toy with one slot. Gives its URL."""
    variables = {"TOY_TEMPLATE": CHAT_TEMPLATE, **environment}
    async with program("serve", "--port", "0", "--slots", "1", "-m", model, environment=variables) as server:
        yield f"http://127.0.0.1:{await server.listening()}"


async def test_our_own_server(model: str) -> None:
    async with our_server(model) as url, chat("--url", url, "-n", "8", stdin="one?\ntwo?\n") as running:
        assert await running.ended() == 0
        first = toy_text("user: one?;assistant: ", 8)
        second = toy_text(f"user: one?;assistant: {first};user: two?;assistant: ", 8)
        assert running.output.decode() == f"{first}\n{second}\n"


async def test_an_answer_of_our_own_server_that_is_stopped_gives_its_slot_back(model: str) -> None:
    async with our_server(model, **SLOW) as url, remote_model(url, model="") as remote:
        for _ in range(2):  # the second has the only slot after the first
            async with remote.answer(ASKED) as events:
                assert isinstance(await anext(events), Said)


async def test_a_conversation_that_our_own_server_finds_too_long(model: str) -> None:
    async with our_server(model) as url, remote_model(url, model="") as remote:
        with pytest.raises(ConversationTooLong, match="4096"):
            async with remote.answer([{"role": "user", "content": "x" * 5000}]):
                pass


# ---- the program -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def chat(*arguments: str, stdin: str, key: str | None = None) -> AsyncIterator[Program]:
    environment = {} if key is None else {"OPENAI_API_KEY": key}
    async with program("chat", *arguments, toy=False, stdin=stdin.encode(), environment=environment) as running:
        yield running


async def test_the_program_in_a_pipe() -> None:
    async with openai_server(says("one!\n"), says("two"), api_key="sesame") as server:
        command = ["--url", server.url, "--model", "mine", "--system", "be kind", "--temperature", "0", "-n", "5"]
        async with chat(*command, "--stop", "x", stdin="one?\ntwo?\n", key="sesame") as running:
            assert await running.ended() == 0
            assert running.output == b"one!\ntwo\n"
            assert not running.log.strip()
        last = server.bodies[-1]
        assert [message["content"] for message in last.pop("messages")] == ["be kind", "one?", "one!\n", "two?"]
        assert last == {"model": "mine", "stream": True, "temperature": 0.0, "max_tokens": 5, "stop": ["x"]}


async def test_grammars_and_schemas_are_sent(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "grammar", tmp_path / "schema"
    grammar.write_text('root ::= "a"')
    schema.write_text('{"type": "object"}')
    async with openai_server(says("x"), says("y")) as server:
        for option in (f"--grammar-file={grammar}", f"--json-schema={schema}"):
            async with chat("--url", server.url, option, stdin="hi\n") as running:
                assert await running.ended() == 0
        assert server.bodies[0]["grammar"] == 'root ::= "a"'
        assert server.bodies[1]["response_format"]["json_schema"]["schema"] == {"type": "object"}


async def test_the_program_in_a_pipe_ends_at_the_first_error() -> None:
    async with openai_server(says("one"), 500) as server, chat("--url", server.url, stdin="a\nb\nc\n") as running:
        assert await running.ended() == 1
        assert running.output == b"one\n"
        assert running.log == "error: the server answered 500: no model first\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://x"], "no URL of a server"),
        (["--url", "x", "--context-length", "5"], "--context-length is for a model in this process"),
        (["--api-key-file", __file__], "--api-key-file is for --url"),
        (["--url", "x", "--mirostat", "7"], "must be between 0 and 2"),
    ],
)
async def test_options_that_do_not_fit(arguments: list[str], words: str) -> None:
    async with chat(*arguments, stdin="") as running:
        assert await running.ended() == 2
        assert words in running.log


async def test_a_conversation_goes_on_after_errors(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    scripts: list[Script | int] = [404, breaks_off("half"), never_ends("stop", " me"), says("**the** end\x1b[2J")]
    async with openai_server(*scripts) as server, terminal("chat", "--url", server.url, state=tmp_path) as user:
        await user.prompts(1)
        assert user.screen.rows[0].startswith("first. /help")
        await user.type("one\r")
        await user.shows("error: the server answered 404: no model first")
        await user.prompts(2)
        await user.type("/retry\r")
        await user.shows("half")
        await user.shows("error: the connection broke before the answer ended")
        await user.prompts(3)
        await user.type("two\r")
        await user.shows("stop me")
        await user.type(CTRL_C)
        await server.closed.wait()
        await user.shows("Stopped.")
        await user.prompts(4)
        await user.type("three\r")
        await user.shows("the end␛[2J")
        await user.prompts(5)
        await user.type(f"/save {saved}\r")
        await user.shows("Saved")
        said = [(message["role"], message["content"]) for message in json.loads(saved.read_text())]
        assert said[:4] == [("user", "one"), ("assistant", "half"), ("user", "two"), ("assistant", "stop me")]
        assert said[4:] == [("user", "three"), ("assistant", "**the** end\x1b[2J")]
        assert server.bodies[-1]["messages"] == json.loads(saved.read_text())[:-1]
        await user.type(CTRL_D)
        assert await user.ended() == 0
