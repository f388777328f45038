"""`chat` as a user at a terminal meets it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.cli.chat.terminals import CHAT_TEMPLATE, CTRL_C, CTRL_D, terminal
from tests.cli.programs import SLOW, program
from trio_runner.testing import toy_text


async def test_an_exchange_and_the_end(model: str, tmp_path: Path) -> None:
    async with terminal("chat", "-m", model, "-n", "8", "--plain", "--no-history", state=tmp_path / "none") as user:
        await user.prompts(1)
        assert user.screen.rows[0] == "toy.gguf. /help lists the commands, Ctrl-D leaves."
        await user.type("hello\r")
        await user.shows(toy_text("user: hello;assistant: ", 8).strip())
        await user.prompts(2)
        await user.type(CTRL_D)
        assert await user.ended() == 0
    assert not (tmp_path / "none").exists()


async def test_ctrl_c_ends_a_conversation_from_a_pipe(model: str) -> None:
    environment = {**SLOW, "TOY_TEMPLATE": CHAT_TEMPLATE}
    async with program("chat", "-m", model, stdin=b"hello\n", environment=environment) as running:
        await running.printed(3)
        running.interrupt()
        assert await running.ended() == 130
        assert not running.log.strip()


async def test_keys_of_an_answer_wait_for_the_next_prompt(model: str, tmp_path: Path) -> None:
    async with terminal("chat", "-m", model, "-n", "80", state=tmp_path, environment=SLOW) as user:
        await user.prompts(1)
        await user.type("hello\r")
        await user.shows("xyz")
        await user.type(f"/save\r{CTRL_D}")
        assert await user.ended() == 0
        assert "error: a path is missing: /save PATH" in user.screen.text


async def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    async with terminal("chat", "-m", model, state=tmp_path, environment=SLOW) as user:
        await user.prompts(1)
        await user.type("hello\r")
        await user.shows("qrstuvwxyz")  # the toy says the letters of the alphabet, for ever
        await user.type(CTRL_C)
        await user.shows("Stopped.")
        await user.prompts(2)
        await user.type(f"/save {saved}\r")
        await user.shows("Saved 2 messages.")
        question, answer = json.loads(saved.read_text())
        assert question == {"role": "user", "content": "hello"}
        assert "qrstuvwxyz" in answer["content"]
        await user.prompts(3)
        await user.type("again\r")
        await user.shows("qrstuvwxyz", times=2)
        await user.type(CTRL_C)
        await user.shows("Stopped.", times=2)
        await user.prompts(4)
        await user.type(CTRL_D)
        assert await user.ended() == 0


async def test_ctrl_c_at_once_after_enter(model: str, tmp_path: Path) -> None:
    """Whether it is still a key or a signal already: the answer, which would not end, is not waited for."""
    async with terminal("chat", "-m", model, state=tmp_path, environment=SLOW) as user:
        await user.prompts(1)
        await user.type(f"hello\r{CTRL_C}")
        await user.prompts(2)
        await user.type("still here")
        await user.shows(">>> still here")


async def test_an_entry_of_several_lines(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    async with terminal("chat", "-m", model, "-n", "4", state=tmp_path) as user:
        await user.prompts(1)
        await user.type('"""one\r')
        await user.shows("\n...")
        await user.type('two"""\r')
        await user.prompts(2)
        await user.type("three\\\r")
        await user.shows("\n...", times=2)
        await user.type("four\r")
        await user.prompts(3)
        await user.type("\x1b[200~five\nsix\x1b[201~\r")  # as a terminal reports text that was pasted
        await user.prompts(4)
        await user.type(f"/save {saved}\r")
        await user.shows("Saved")
        messages = json.loads(saved.read_text())
        assert [message["content"] for message in messages[::2]] == ["one\ntwo", "three\nfour", "five\nsix"]


async def test_a_file_is_replaced_only_after_a_yes(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text("old")
    async with terminal("chat", "-m", model, state=tmp_path) as user:
        for number, answer in enumerate(("\r", "no\r", CTRL_C, CTRL_D), 1):
            await user.prompts(number)
            await user.type(f"/save {saved}\r")
            await user.shows("Replace it? [y/N]", times=number)
            await user.type(answer)
            await user.shows("Nothing was saved.", times=number)
            assert saved.read_text() == "old"
        await user.prompts(5)
        await user.type(f"/save {saved}\r")
        await user.shows("Replace it? [y/N]", times=5)
        await user.type("y\r")
        await user.shows("Saved 0 messages.")
        assert saved.read_text() == "[]\n"


async def test_ctrl_c_at_the_prompt_clears_the_line(model: str, tmp_path: Path) -> None:
    async with terminal("chat", "-m", model, state=tmp_path) as user:
        await user.prompts(1)
        await user.type("not this")
        await user.shows("not this")
        await user.type(CTRL_C)
        await user.prompts(2)
        await user.type('"""nor')
        await user.shows("nor")
        await user.type(f"\r{CTRL_C}")
        await user.prompts(3)
        await user.type(CTRL_C)
        await user.prompts(4)
        assert "To leave" not in user.screen.text
        await user.type(CTRL_C)
        await user.shows("To leave, press Ctrl-D or type /bye.")
        await user.prompts(5)
        await user.type(f"/save {tmp_path}/x\r")
        await user.shows("Saved 0 messages.")
        await user.type("/bye\r")
        assert await user.ended() == 0


async def test_a_signal_at_the_prompt(model: str, tmp_path: Path) -> None:
    """SIGINT is as good as the key. SIGTERM ends the program, and the terminal is as before."""
    async with terminal("chat", "-m", model, state=tmp_path) as user:
        before = user.modes()
        await user.prompts(1)
        assert user.modes() != before
        await user.type("not this")
        await user.shows("not this")
        os.kill(user.process.pid, signal.SIGINT)
        await user.prompts(2)
        os.kill(user.process.pid, signal.SIGTERM)
        assert await user.ended() == 143
        assert user.modes() == before
        assert "Traceback" not in user.screen.text


async def test_ctrl_c_while_the_model_loads_ends_the_program(model: str, tmp_path: Path) -> None:
    async with terminal("chat", "-m", model, state=tmp_path, environment={"TOY_LOAD": "never"}) as user:
        await user.shows("the toy is loading")
        await user.type(CTRL_C)
        assert await user.ended() == 130


async def test_what_was_typed_is_kept_for_the_next_time(model: str, tmp_path: Path) -> None:
    command = ["chat", "-m", model, "-n", "4"]
    async with terminal(*command, state=tmp_path) as user:
        await user.prompts(1)
        await user.type("remember me\r")
        await user.prompts(2)
        await user.type(CTRL_D)
        assert await user.ended() == 0
    history = tmp_path / "trio-runner" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    async with terminal(*command, state=tmp_path) as user:
        await user.prompts(1)
        await user.type("\x1b[A")  # the arrow up
        await user.shows(">>> remember me")
