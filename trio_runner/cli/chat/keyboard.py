"""Reads lines from a terminal with prompt_toolkit: line editing, a history, completion of commands, pasted text.

The editor runs on a thread, so that the event loop goes on. While it runs, the terminal is in raw mode, and Ctrl-C is a
key. At other times Ctrl-C is a signal.
"""

from __future__ import annotations

import asyncio
import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from trio_runner.cli.chat.entry import COMMANDS
from trio_runner.cli.chat.reader import Interrupted

PROMPT: Final = ">>> "
CONTINUED: Final = "... "
_HISTORY_NAME: Final = "chat-history"


class Keyboard:
    """A user at a terminal, whose keys come from `descriptor`. One task reads."""

    is_interactive = True

    def __init__(self, descriptor: int, history: History) -> None:
        self._descriptor = descriptor
        # The answers may go elsewhere. What the user types is shown on the terminal all the same.
        output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            history=history,
            output=output,
            completer=_completer(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            key_bindings=_key_bindings(),
        )
        self._questions: PromptSession[str] = PromptSession(output=output)

    async def read(self, *, more: bool = False) -> str:
        """The next line. Raises EOFError for Ctrl-D on an empty line, and `Interrupted` for Ctrl-C."""
        return await _Edit(self._session).run(CONTINUED if more else PROMPT)

    @contextmanager
    def hold_back_keys(self) -> Iterator[None]:
        """Keep keys off the screen while no line is edited. They wait for the next prompt, Ctrl-D included, and only
        Ctrl-C acts at once: it is a signal, and drops the keys that wait."""
        before = termios.tcgetattr(self._descriptor)
        held_back = [*before]
        held_back[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(self._descriptor, termios.TCSANOW, held_back)
        try:
            yield
        finally:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, before)

    async def confirm(self, question: str) -> bool:
        """Ask for a yes or a no. Ctrl-C and Ctrl-D are a no."""
        try:
            return (await _Edit(self._questions).run(f"{question} [y/N] ")).strip().lower() in ("y", "yes")
        except (EOFError, Interrupted):
            return False


class _Edit:
    """One line that is being edited, on a thread."""

    def __init__(self, session: PromptSession[str]) -> None:
        self._session = session
        self._loop: asyncio.AbstractEventLoop | None = None
        self._abandoned = False

    async def run(self, prompt: str) -> str:
        """The line. If this is cancelled, the editor ends and the terminal is as before."""
        result: list[Callable[[], str]] = []
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def edit() -> None:
                with trio.CancelScope(shield=True):
                    result.append(await trio.to_thread.run_sync(self._edit, prompt))
                done.set()

            nursery.start_soon(edit)
            try:
                await done.wait()
            finally:
                if not done.is_set():
                    self._abandon()
        return result[0]()

    def _edit(self, prompt: str) -> Callable[[], str]:
        """On the thread. Returns what gives the line, or raises why there is none: exceptions do not cross a nursery
        without a group around them."""
        try:
            line = self._session.prompt(prompt, pre_run=self._begin, handle_sigint=False)
        except EOFError:
            return _raiser(EOFError())
        except KeyboardInterrupt:
            return _raiser(Interrupted(had_text=bool(self._session.default_buffer.text)))
        if self._takes_ctrl_c():
            return _raiser(Interrupted(had_text=True))
        return lambda: line

    def _takes_ctrl_c(self) -> bool:
        """Whether Ctrl-C was pressed after Enter, while it was still a key: then it would wait for the next line. Takes
        it, and the keys before it. Those after it stay."""
        keyboard = self._session.app.input
        keys = [*get_typeahead(keyboard), *keyboard.read_keys()]
        n_taken = max((number for number, key in enumerate(keys, 1) if key.key == Keys.ControlC), default=0)
        store_typeahead(keyboard, keys[n_taken:])
        return n_taken > 0

    def _begin(self) -> None:
        """On the thread, once the editor runs."""
        self._loop = asyncio.get_running_loop()
        if self._abandoned:  # before the editor could be told
            self._end()

    def _abandon(self) -> None:
        self._abandoned = True
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._end)
            except RuntimeError:  # the loop is closed: the editor has ended by itself
                return

    def _end(self) -> None:
        """On the thread. End the editor as Ctrl-C does."""
        app = self._session.app
        if app.is_running and not app.is_done:
            app.exit(exception=KeyboardInterrupt())


def _raiser(error: Exception) -> Callable[[], str]:
    def give() -> str:
        raise error

    return give


def _completer() -> Completer:
    paths = PathCompleter(expanduser=True)
    return NestedCompleter({name: paths if command.takes_path else None for name, command in COMMANDS.items()})


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def history_path() -> Path:
    """The file of what was typed: in trio-runner, in $XDG_STATE_HOME or ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "trio-runner" / _HISTORY_NAME


def open_history(path: Path | None) -> tuple[History, str]:
    """(a history in the file `path`, which only its owner can read, or in memory for None; what is wrong with the
    file, or "")."""
    if path is None:
        return InMemoryHistory(), ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        return InMemoryHistory(), f"the history is not kept: {error}"
    return FileHistory(path), ""
