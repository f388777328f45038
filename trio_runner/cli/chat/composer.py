'''Puts an entry together from the lines that a user types.

Most entries are one line. A line that ends with a backslash goes on in the next one, and """ begins a text of several
lines, which the next """ at the end of a line ends.
'''

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_QUOTES: Final = '"""'
_OPENING: Final = re.compile(r'(\s*/system\s+|\s*)"""')


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry. A `literal` one was in quotes: it is a message, even if it looks like a command."""

    text: str
    literal: bool = False


class Composer:
    """Takes lines and gives entries."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._prefix: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the entry goes on in the next line."""
        return bool(self._lines) or self._prefix is not None

    def push(self, line: str) -> Entry | None:
        """The entry that `line` completes, if it does. A line that was pasted may have several lines in it."""
        if not self.is_open and (opening := _OPENING.match(line)):
            self._prefix = opening[1].lstrip()
            line = line[opening.end() :]
        if self._prefix is not None:
            ended = line.rstrip().endswith(_QUOTES)
            text = line.rstrip().removesuffix(_QUOTES) if ended else line
            self._lines.append(text)
            return self.flush() if ended else None
        if (len(line) - len(line.rstrip("\\"))) % 2:
            self._lines.append(line[:-1])
            return None
        self._lines.append(line)
        return self.flush()

    def flush(self) -> Entry | None:
        """What there is of an entry, now that no line comes any more; None if there is nothing."""
        if not self.is_open:
            return None
        lines, prefix = self._lines, self._prefix
        self.clear()
        if prefix is None:
            return Entry("\n".join(lines))
        # The line breaks beside the quotes are not part of the text.
        text = "\n".join(lines).removeprefix("\n").removesuffix("\n")
        return Entry(prefix + text, literal=not prefix)

    def clear(self) -> None:
        """Forget an entry that is not complete."""
        self._lines, self._prefix = [], None
