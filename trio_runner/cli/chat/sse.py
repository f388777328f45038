"""Reads server-sent events, as "9.2 Server-sent events" of the HTML standard describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_EVENT_BYTES: Final = 8 << 20
"""Bytes of one event. A longer one is no part of an answer."""


class EventTooLong(Exception):
    """The stream has an event of more than `MAX_EVENT_BYTES` bytes."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: its name, "message" if it has none, and its data."""

    name: str
    data: str


class EventReader:
    """Makes events of the bytes of a stream, however these are cut. Bytes that are not UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_return = False
        self._at_start = True
        self._name = ""
        self._data: list[str] = []
        self._n_bytes = 0

    def push(self, data: bytes) -> list[ServerSentEvent]:
        """The events that `data` completes. Raises `EventTooLong`."""
        if self._after_return and data:
            data = data.removeprefix(b"\n")  # the second half of a line's end that was cut in two
            self._after_return = False
        self._after_return |= data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events: list[ServerSentEvent] = []
        for line in lines:
            self._grow(line)
            events += self._end_line()
        self._grow(rest)
        return events

    def flush(self) -> list[ServerSentEvent]:
        """The event at the end of a stream that has no empty line after it. The standard drops it, but servers leave
        that line out."""
        return [*self._end_line(), *self._end_event()]

    def _grow(self, data: bytes) -> None:
        self._n_bytes += len(data)
        if self._n_bytes > MAX_EVENT_BYTES:
            raise EventTooLong(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        self._line += data

    def _end_line(self) -> list[ServerSentEvent]:
        line = self._line.decode(errors="replace")
        self._line.clear()
        if self._at_start:
            line, self._at_start = line.removeprefix("\ufeff"), False
        if not line:
            return self._end_event()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif not field:  # a comment, which keeps the connection alive
            self._n_bytes = sum(map(len, self._data))
        return []

    def _end_event(self) -> list[ServerSentEvent]:
        event = ServerSentEvent(self._name or "message", "\n".join(self._data))
        is_event = bool(self._data)
        self._name, self._data, self._n_bytes = "", [], 0
        return [event] if is_event else []
