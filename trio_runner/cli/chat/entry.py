"""What an entry of the user means: a message, or a command that begins with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from trio_runner.cli.chat.composer import Entry


class BadEntry(Exception):
    """The entry is no command that there is. The message is one line for the user."""


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the model."""

    text: str


@dataclass(frozen=True, slots=True)
class System:
    """Set the system message, remove it with an empty text, or show it with None."""

    text: str | None


@dataclass(frozen=True, slots=True)
class AttachImage:
    """Send an image with the next message."""

    path: str


@dataclass(frozen=True, slots=True)
class Save:
    """Write the conversation to a file."""

    path: str
    overwrite: bool


@dataclass(frozen=True, slots=True)
class Load:
    """Go on with the conversation in a file."""

    path: str


@dataclass(frozen=True, slots=True)
class Clear:
    """Begin a new conversation. The system message stays."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask for another answer to the last message."""


@dataclass(frozen=True, slots=True)
class Help:
    """List the commands."""


@dataclass(frozen=True, slots=True)
class Leave:
    """End the program."""


Action: TypeAlias = Say | System | AttachImage | Save | Load | Clear | Retry | Help | Leave

OVERWRITE: Final = "-f"
"""The word of `/save` that lets it replace a file."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, for the parser and for `/help`."""

    usage: str
    doc: str
    make: Callable[[str], Action]
    """Makes the action from what follows the name, without spaces around it. Raises `BadEntry`."""
    takes_path: bool = False


def parse_entry(entry: Entry) -> Action | None:
    """What the user wants; None for an empty entry. Raises `BadEntry`."""
    if not entry.text.strip():
        return None
    if entry.literal or not entry.text.startswith("/"):
        return Say(entry.text)
    word, *rest = entry.text.split(maxsplit=1)
    command = COMMANDS.get(word.lower())
    if command is None:
        close = difflib.get_close_matches(word.lower(), COMMANDS, n=1)
        guess = f" Did you mean {close[0]}?" if close else " /help lists the commands."
        raise BadEntry(f'there is no command {word[:40]}.{guess} A message that begins with "/" goes into """.')
    return command.make(rest[0].strip() if rest else "")


def help_text() -> str:
    """What `/help` prints."""
    width = max(len(command.usage) for command in COMMANDS.values())
    commands = [f"  {command.usage:{width}}  {command.doc}" for command in COMMANDS.values()]
    keys = [f"  {key:{width}}  {doc}" for key, doc in _KEYS.items()]
    return "\n".join([*commands, "", *keys])


_KEYS: Final[Mapping[str, str]] = {
    '"""': 'begin a text of several lines; """ at the end of a line ends it',
    "\\": "at the end of a line: the message goes on in the next line",
    "Ctrl-C": "stop the answer, or clear the line",
    "Ctrl-D": "leave",
}


def _system(text: str) -> Action:
    return System(_unquoted(text) if text else None)


def _path(text: str, usage: str) -> str:
    path = _unquoted(text)
    if not path:
        raise BadEntry(f"a path is missing: {usage}")
    return path


def _save(text: str) -> Action:
    first, _, rest = text.partition(" ")
    overwrite = first == OVERWRITE
    return Save(_path(rest.strip() if overwrite else text, "/save PATH"), overwrite)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def _alone(usage: str, action: Action) -> Callable[[str], Action]:
    def make(text: str) -> Action:
        if text:
            raise BadEntry(f"{usage} takes nothing after it")
        return action

    return make


COMMANDS: Final[Mapping[str, Command]] = {
    "/system": Command("/system TEXT", 'set the system message; without TEXT show it, with "" remove it', _system),
    "/image": Command(
        "/image PATH",
        "send an image with the next message",
        lambda text: AttachImage(_path(text, "/image PATH")),
        takes_path=True,
    ),
    "/retry": Command("/retry", "ask for another answer to the last message", _alone("/retry", Retry())),
    "/clear": Command("/clear", "begin a new conversation; the system message stays", _alone("/clear", Clear())),
    "/save": Command(
        "/save PATH", f"save the conversation as JSON; {OVERWRITE} before PATH replaces a file", _save, takes_path=True
    ),
    "/load": Command(
        "/load PATH",
        "go on with a conversation that was saved",
        lambda text: Load(_path(text, "/load PATH")),
        takes_path=True,
    ),
    "/help": Command("/help", "list the commands", _alone("/help", Help())),
    "/bye": Command("/bye", "leave", _alone("/bye", Leave())),
}
"""By name."""
