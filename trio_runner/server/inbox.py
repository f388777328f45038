"""What a client has sent for one request, until the application reads it."""

from __future__ import annotations

from typing import Any

import trio


class Inbox:
    """The ASGI messages of one request.

    Putting a message never waits for the application. So the task that reads from the client keeps reading, and notices
    a client that disconnects, even if the application never reads its request. The connection bounds what waits here.
    """

    def __init__(self) -> None:
        self._body = bytearray()
        self._has_request = False
        self._is_complete = False
        self._is_disconnected = False
        self._changed = trio.Event()

    @property
    def n_bytes(self) -> int:
        """How many bytes of the body wait."""
        return len(self._body)

    async def put(self, message: Any) -> None:
        """Add an "http.request" or "http.disconnect" message. Waits for nothing; it is a coroutine because Hypercorn
        awaits it."""
        if message["type"] == "http.disconnect":
            self._is_disconnected = True
        else:
            self._body += message["body"]
            self._has_request = True
            self._is_complete = not message["more_body"]
        self._changed.set()

    async def receive(self) -> dict[str, Any]:
        """The next message, as ASGI's `receive`. All bytes of the body that wait come in one."""
        await trio.lowlevel.checkpoint()
        while not self._has_request and not self._is_disconnected:
            self._changed = trio.Event()
            await self._changed.wait()
        if not self._has_request:
            return {"type": "http.disconnect"}
        body, self._body, self._has_request = bytes(self._body), bytearray(), False
        return {"type": "http.request", "body": body, "more_body": not self._is_complete}
