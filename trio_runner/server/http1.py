"""One HTTP/1.1 connection as bytes and ASGI messages: Hypercorn's protocol, less what we do not serve.

Where this differs from its base class:
- No websockets, no HTTP/2, no upgrade: such a request is served as what it is without the upgrade, or refused.
- A request that two servers could read in two ways, or whose target is not a path, is refused.
- Bytes that follow a request wait without stopping the reader, since it is the reader who notices that the client
  has gone. In the base class one stray byte hides a disconnect until the answer ends.
"""

from __future__ import annotations

from typing import Any

import h11
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

from trio_runner.server.problems import Problem

MAX_WAITING_BYTES = 1 << 16
"""Bytes of further requests that may wait for the current one; a client that sends more is closed."""


class Http1(H11Protocol):
    """See above. Hypercorn's TaskGroup runs its ASGI applications; `send` takes RawData, Updated and Closed."""

    connection: h11.Connection

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._reading = trio.Lock()
        self._paused = False
        self._closed = False

    @property
    def idle(self) -> bool:
        """No request is being served."""
        return self.stream is None

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData):
            self._closed = True
            await super().handle(event)
            return
        self.connection.receive_data(event.data)
        if self._paused and len(self.connection.trailing_data[0]) > MAX_WAITING_BYTES:
            await self.send(Closed())
        else:
            await self._handle_events()

    async def _handle_events(self) -> None:
        async with self._reading:  # the reader and the end of the previous request may both be here
            while not self._closed and await self._handle_event():
                pass

    async def _handle_event(self) -> bool:
        """Pass on one event of what has been received; False when there is none."""
        if self.connection.they_are_waiting_for_100_continue:
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))
        try:
            event = self.connection.next_event()
        except h11.RemoteProtocolError as error:
            await self._refuse(Problem(error.error_status_hint, str(error)))
            return False
        match event:
            case h11.Request():
                refusal = _refusal(event)
                if refusal is not None:
                    await self._refuse(refusal, head=event.method == b"HEAD")
                    return False
                await self.send(Updated(idle=False))
                await self._create_stream(event)
            case h11.Data() if self.stream is not None:
                await self.stream.handle(Body(stream_id=STREAM_ID, data=bytes(event.data)))
            case h11.EndOfMessage() if self.stream is not None:
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            case _:
                self._paused = event is h11.PAUSED
                return False
        return True

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )

    async def _maybe_recycle(self) -> None:
        if self._closed:
            return  # an answer that was complete just as the connection was given up
        await super()._maybe_recycle()
        if self._paused and self.connection.our_state is h11.IDLE:
            self._paused = False
            # In a task of its own: this one belongs to the request that just ended, and is being cancelled.
            self.task_group.spawn(self._handle_events)

    async def _refuse(self, problem: Problem, *, head: bool = False) -> None:
        """Answer what is not a request we serve, unless an answer is under way, and close."""
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = b"" if head else problem.body
            headers = {**problem.all_headers, "Content-Length": str(len(body)), "Connection": "close"}
            await self._send_h11_event(h11.Response(status_code=problem.status, headers=list(headers.items())))
            await self._send_h11_event(h11.Data(data=body))
            await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())


def _refusal(request: h11.Request) -> Problem | None:
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        return Problem(505, "this server speaks HTTP/1.1")
    if b"content-length" in names and b"transfer-encoding" in names:
        return Problem(400, "Content-Length and Transfer-Encoding must not come together")
    if not request.target.startswith(b"/"):
        return Problem(400, "the request target must be a path")
    return None
