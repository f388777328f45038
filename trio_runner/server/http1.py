"""One HTTP/1.1 connection: bytes of the client <-> exchanges with an application.

Rule 1: no websockets, no HTTP/2, no upgrade. Such a request is served as what it is without the upgrade, or refused.
Rule 2: a request that two servers could read in two ways, or whose target is not a path, is refused.
Rule 3: taking what the client has sent never waits: not for an application that does not read, and not for a client
that does not read. The task that reads is the one that notices that the client disconnects.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import h11
import trio

from trio_runner.server.exchange import Exchange, SendEvent
from trio_runner.server.problems import Problem, plain_text

MAX_HEAD_BYTES = 1 << 16
MAX_WAITING_BYTES = 1 << 16
"""Bytes of further requests that may wait for the current one; a client that sends more is disconnected."""
MAX_UNREAD_BYTES = 1 << 20
"""Bytes of a body that may wait for the application. Ours read as fast as the bytes come, or have answered already; if
the client does not take that answer and keeps sending, it is disconnected."""
EVENTS_AT_ONCE = 64
"""Events after which other tasks get their turn: a body in chunks of one byte has ten thousand in one read, 15 us
each."""


class Transport(Protocol):
    """What carries the bytes, and wants to know whether a request is being served."""

    async def write(self, data: bytes) -> None:
        """Write all of it, or close."""

    def write_now(self, data: bytes) -> None:
        """Write all of it without waiting, or close."""

    def begin_request(self) -> None:
        """The head of a request is complete."""

    def end_request(self) -> None:
        """The answer is complete, and another request may follow."""

    def finish(self) -> None:
        """Nothing more will be written."""


class Http1:
    """See above. `open_exchange` makes the exchange for the next request; `is_closing` says whether the server is about
    to stop, so that the answer of an exchange is the last on its connection."""

    def __init__(
        self,
        open_exchange: Callable[[SendEvent, Callable[[], Awaitable[None]]], Exchange],
        transport: Transport,
        nursery: trio.Nursery,
        is_closing: Callable[[], bool],
    ) -> None:
        self._open_exchange = open_exchange
        self._transport = transport
        self._nursery = nursery
        self._is_closing = is_closing
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._exchange: Exchange | None = None
        self._handling = False
        self._paused = False
        self._closed = False

    async def receive(self, data: bytes) -> None:
        """Take what the client has sent."""
        self._h11.receive_data(data)
        if self._too_much_waits():
            await self._finish()
        else:
            await self._handle_events()

    async def disconnect(self) -> None:
        """The client has gone: tell the application, and write nothing more."""
        self._closed = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.disconnect()

    def _too_much_waits(self) -> bool:
        if self._paused:
            return len(self._h11.trailing_data[0]) > MAX_WAITING_BYTES
        return self._exchange is not None and self._exchange.n_unread > MAX_UNREAD_BYTES

    async def _handle_events(self) -> None:
        if self._handling:
            return  # another task is at it, and will come to what has just been received
        self._handling = True
        try:
            n_events = 0
            while not self._closed and await self._handle_event():
                n_events += 1
                if n_events % EVENTS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
        finally:
            self._handling = False

    async def _handle_event(self) -> bool:
        """Pass on one event of what has been received; False when there is none."""
        if self._h11.they_are_waiting_for_100_continue:
            self._transport.write_now(self._encode(h11.InformationalResponse(status_code=100, headers=[])))
        try:
            event = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            await self._refuse(Problem(error.error_status_hint, str(error)))
            return False
        match event:
            case h11.Request():
                refusal = _refusal(event)
                if refusal is not None:
                    await self._refuse(refusal, head=event.method == b"HEAD")
                    return False
                self._transport.begin_request()
                self._exchange = self._open_exchange(self._send, self._exchange_finished)
                await self._exchange.begin(event)
            case h11.Data() if self._exchange is not None:
                await self._exchange.body(bytes(event.data))
            case h11.EndOfMessage() if self._exchange is not None:
                await self._exchange.end_body()
            case _:
                self._paused = event is h11.PAUSED
                return False
        return True

    async def _send(self, event: h11.Event) -> None:
        if not self._closed:
            await self._transport.write(self._encode(event))

    def _encode(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""

    async def _exchange_finished(self) -> None:
        # quart-trio calls this from a task that it has already cancelled, because the answer is complete. So there may
        # be no checkpoint in here.
        self._exchange = None
        if self._closed:
            return  # the answer was complete just as the client disconnected
        both_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if not both_done or self._is_closing():
            await self._finish()
            return
        self._h11.start_next_cycle()
        self._transport.end_request()
        if self._paused:
            self._paused = False
            self._nursery.start_soon(self._handle_events)

    async def _refuse(self, problem: Problem, *, head: bool = False) -> None:
        """Answer what is not a request we serve, unless an answer is under way, and close."""
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = plain_text(problem)
            body = b"" if head else answer.body
            headers = {**answer.headers, "Content-Length": str(len(body)), "Connection": "close"}
            response = h11.Response(status_code=problem.status, headers=list(headers.items()))
            self._transport.write_now(b"".join(map(self._encode, (response, h11.Data(data=body), h11.EndOfMessage()))))
        await self._finish()

    async def _finish(self) -> None:
        self._transport.finish()
        await self.disconnect()


def _refusal(request: h11.Request) -> Problem | None:
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        return Problem(505, "this server speaks HTTP/1.1")
    if b"content-length" in names and b"transfer-encoding" in names:
        return Problem(400, "Content-Length and Transfer-Encoding must not come together")
    if not request.target.startswith(b"/"):
        return Problem(400, "the request target must be a path")
    return None
