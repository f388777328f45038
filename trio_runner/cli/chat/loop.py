"""The conversation itself: reads an entry, does what it says, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from trio_runner.cli.chat import files
from trio_runner.cli.chat.composer import Composer, Entry
from trio_runner.cli.chat.conversation import Conversation
from trio_runner.cli.chat.display import AnswerView, Display
from trio_runner.cli.chat.entry import (
    OVERWRITE,
    Action,
    AttachImage,
    BadEntry,
    Clear,
    Help,
    Leave,
    Load,
    Retry,
    Save,
    Say,
    System,
    help_text,
    parse_entry,
)
from trio_runner.cli.chat.model import ChatError, ChatModel, ConversationTooLong, Ended, Reading, Said, Thought
from trio_runner.cli.chat.reader import Interrupted, Reader

_GREETING: Final = "/help lists the commands, Ctrl-D leaves."
_FULL: Final = 0.75
"""The share of a context above which the oldest messages are forgotten, so that there is room for the next exchange."""
_HOW_TO_LEAVE: Final = "To leave, press Ctrl-D or type /bye."


class ChatLoop:
    """A conversation of `reader`'s user with a model.

    `notify` shows one or more lines that are no part of an answer.
    """

    def __init__(
        self,
        reader: Reader,
        display: Display,
        conversation: Conversation,
        *,
        notify: Callable[[str], None],
    ) -> None:
        self._reader = reader
        self._display = display
        self._conversation = conversation
        self._notify = notify
        self._composer = Composer()
        self._scope: trio.CancelScope | None = None
        self._is_running = self._is_interrupted = False
        self._n_idle_interrupts = 0

    def interrupt(self) -> bool:
        """Take a Ctrl-C that came as a signal: stop the answer, or clear the line. False if the program should end."""
        if not self._is_running or not self._reader.is_interactive:
            return False
        if self._scope is not None:
            self._scope.cancel()
        else:
            self._is_interrupted = True
        return True

    async def run(self, model: ChatModel) -> int:
        """Go on until the user leaves. Returns the exit code.

        A conversation that is not interactive ends with 1 at the first error.
        """
        self._is_running = True
        try:
            with self._reader.hold_back_keys():
                return await self._go_on(model)
        finally:
            self._is_running = False

    async def _go_on(self, model: ChatModel) -> int:
        if self._reader.is_interactive:
            await self._greet(model)
        while True:
            try:
                action = await self._next_action()
                if isinstance(action, Leave):
                    return 0
                if action is not None:
                    await self._do(action, model)
            except (BadEntry, ChatError) as error:
                self._notify(f"error: {' '.join(str(error).split())}")
                if not self._reader.is_interactive:
                    return 1

    async def _greet(self, model: ChatModel) -> None:
        try:
            with self._interruptible() as scope:
                self._notify(f"{await model.find_name()}. {_GREETING}")
            if not scope.cancelled_caught:
                return
        except ChatError as error:
            self._notify(f"error: {error}")
        self._notify(_GREETING)

    # Entries.

    async def _next_action(self) -> Action | None:
        """What the user wants next; None if that is nothing. Raises `BadEntry`."""
        try:
            if self._is_interrupted:  # by a Ctrl-C between two lines
                self._is_interrupted = False
                raise Interrupted(had_text=True)
            with self._interruptible() as scope:
                line = await self._reader.read(more=self._composer.is_open)
            if scope.cancelled_caught:
                raise Interrupted(had_text=True)
        except Interrupted as interrupted:
            self._clear_line(interrupted)
            return None
        except EOFError:
            rest = self._composer.flush()
            # At the end of a pipe, what it has is what the user wanted. At a terminal, Ctrl-D means to leave.
            return (parse_entry(rest) if rest and not self._reader.is_interactive else None) or Leave()
        self._n_idle_interrupts = 0
        entry: Entry | None = self._composer.push(line)
        return None if entry is None else parse_entry(entry)

    def _clear_line(self, interrupted: Interrupted) -> None:
        was_idle = not interrupted.had_text and not self._composer.is_open
        self._composer.clear()
        self._n_idle_interrupts = self._n_idle_interrupts + 1 if was_idle else 0
        if was_idle and self._n_idle_interrupts > 1:
            self._notify(_HOW_TO_LEAVE)

    async def _do(self, action: Action, model: ChatModel) -> None:
        conversation = self._conversation
        match action:
            case Say(text):
                conversation.ask(text)
                await self._exchange(model)
            case Retry():
                if not conversation.retry():
                    raise ChatError("there is no message to answer again")
                await self._exchange(model)
            case System(None):
                self._notify(conversation.system or "There is no system message.")
            case System(text):
                conversation.system = text or ""
            case AttachImage(path):
                with self._interruptible():
                    conversation.attach(await files.read_image(path))
                    self._notify(f"The next message has {_count(conversation.n_images, 'image')}.")
            case Save(path, overwrite):
                await self._save(path, overwrite)
            case Load(path):
                with self._interruptible():
                    conversation.restore(await files.load(path))
                    self._notify(f"The conversation has {_count(len(conversation.messages), 'message')}.")
            case Clear():
                conversation.clear()
            case Help():
                self._notify(help_text())
            case Leave():
                raise AssertionError("the caller leaves")

    async def _save(self, path: str, overwrite: bool) -> None:
        messages = self._conversation.messages
        try:
            await files.save(path, messages, overwrite=overwrite)
        except FileExistsError:
            if not self._reader.is_interactive:
                raise ChatError(f"there is a file {path}: /save {OVERWRITE} PATH replaces it") from None
            if not await self._reader.confirm(f"There is a file {path}. Replace it?"):
                self._notify("Nothing was saved.")
                return
            await files.save(path, messages, overwrite=True)
        self._notify(f"Saved {_count(len(messages), 'message')}.")

    # Exchanges.

    async def _exchange(self, model: ChatModel) -> None:
        """Let the model answer. Raises `ChatError`. What there is of an answer stays in the conversation."""
        said: list[str] = []
        try:
            while True:
                try:
                    end = await self._try_to_answer(model, said)
                    break
                except ConversationTooLong:
                    if said or not self._forget_oldest():
                        raise
        finally:
            text = "".join(said)
            if text:
                self._conversation.answer(text)
            else:
                self._conversation.withdraw()
        if end is None:
            self._notify("Stopped." if text else "Stopped before the answer began. /retry asks again.")
            return
        if notice := end.notice or ("" if text else "The model said nothing. /retry asks again."):
            self._notify(notice)
        if end.share > _FULL:
            self._forget_oldest()

    def _forget_oldest(self) -> bool:
        """Make room in the context. False if there is nothing to forget."""
        n_forgotten = self._conversation.forget_oldest()
        if n_forgotten:
            self._notify(f"The context is full: the oldest {_count(n_forgotten, 'message')} will no longer be sent.")
        return n_forgotten > 0

    async def _try_to_answer(self, model: ChatModel, said: list[str]) -> Ended | None:
        """Show an answer and collect its text. Returns None if it was stopped. Raises `ChatError`."""
        failure: ChatError | None = None
        end = None
        async with self._display.answer() as view:
            try:
                with self._interruptible():
                    end = await self._show_answer(model, view, said)
            except ChatError as error:  # raised below, outside the nursery of the display
                failure = error
        if failure is not None:
            raise failure
        return end

    async def _show_answer(self, model: ChatModel, view: AnswerView, said: list[str]) -> Ended:
        """Show an answer as it comes, and collect its text."""
        end = Ended()
        view.wait("waiting for the answer")
        async with model.answer(self._conversation.sent) as events:
            async for event in events:
                match event:
                    case Said(text):
                        said.append(text)
                        await view.say(text)
                    case Thought(text):
                        await view.think(text)
                    case Reading(n_read, n_tokens):
                        view.wait(f"reading: {n_read} of {n_tokens} tokens")
                    case Ended():
                        end = event
        return end

    @contextmanager
    def _interruptible(self) -> Iterator[trio.CancelScope]:
        """Let Ctrl-C cancel the block."""
        with trio.CancelScope() as scope:
            self._scope = scope
            if self._is_interrupted:  # just before the block
                self._is_interrupted = False
                scope.cancel()
            try:
                yield scope
            finally:
                self._scope = None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
