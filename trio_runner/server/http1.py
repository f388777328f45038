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
"""Bytes of the head of a request. A longer head is answered with 431."""
MAX_WAITING_BYTES = 1 << 16
"""Bytes of further requests that may wait for the current one; a client that sends more is disconnected."""
MAX_UNREAD_BYTES = 1 << 20
"""Bytes of a body that may wait for the application; a client that sends more is disconnected. Our handlers read a body
as it arrives, and before they answer. What arrives after the answer has begun is dropped."""
EVENTS_AT_ONCE = 64
"""Events after which other tasks get their turn: a body in chunks of one byte has ten thousand in one read, 15 us
each."""


class Transport(Protocol):
    """What carries the bytes, and needs to know whether a request is being served."""

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be written. A closed transport stays closed."""

    async def write(self, data: bytes, *, complete: bool) -> None:
        """Write all of it, or close. `complete` says that the whole answer exists already: only the client holds it
        up."""

    def write_now(self, data: bytes) -> None:
        """Write all of it without waiting, or close."""

    def await_request(self, *, begun: bool) -> None:
        """No request is being served. `begun` says that a part of the head of the next one has come."""

    def begin_request(self) -> None:
        """The head of a request is complete."""

    def wake_reader(self) -> None:
        """Have the reading task call `Http1.resume`, if it waits for the client. Waits for nothing."""

    def finish(self) -> None:
        """Nothing more will be written."""


class Http1:
    """See above. `open_exchange` makes the exchange for the next request; `is_closing` says whether the server is about
    to stop, so that the answer of an exchange is the last on its connection.

    Only the task that reads calls `receive` and `resume`. While they take one event after the other, nothing more is
    read, so what waits here is bounded.
    """

    def __init__(
        self,
        open_exchange: Callable[[SendEvent, Callable[[], Awaitable[None]]], Exchange],
        transport: Transport,
        is_closing: Callable[[], bool],
    ) -> None:
        self._open_exchange = open_exchange
        self._transport = transport
        self._is_closing = is_closing
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._exchange: Exchange | None = None
        self._is_head = False
        self._answer_has_begun = False
        self._answer_is_complete = False
        self._paused = False
        self._closed = False

    async def receive(self, data: bytes) -> None:
        """Take what the client has sent."""
        self._h11.receive_data(data)
        if self._too_much_waits():
            await self._finish()
        else:
            await self.resume()

    async def resume(self) -> None:
        """Take what waited for the answer that is now complete."""
        n_events = 0
        while not self._is_over and await self._handle_event():
            n_events += 1
            if n_events % EVENTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if self._exchange is None and not self._is_over:
            self._transport.await_request(begun=self._n_waiting > 0)

    async def disconnect(self) -> None:
        """The client has gone: tell the application, and write nothing more."""
        self._closed = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.disconnect()

    @property
    def _is_over(self) -> bool:
        return self._closed or self._transport.is_closed

    @property
    def _n_waiting(self) -> int:
        """How many bytes h11 keeps for later."""
        return len(self._h11.trailing_data[0])

    def _too_much_waits(self) -> bool:
        if self._paused:
            return self._n_waiting > MAX_WAITING_BYTES
        return self._exchange is not None and self._exchange.n_unread > MAX_UNREAD_BYTES

    async def _handle_event(self) -> bool:
        """Pass on one event of what has been received; False when there is none."""
        if self._h11.they_are_waiting_for_100_continue:
            self._transport.write_now(self._encode(h11.InformationalResponse(status_code=100, headers=[])))
        try:
            event = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            text = str(error).partition(": bytearray(")[0]  # h11 repeats what it could not read
            await self._refuse(Problem(error.error_status_hint, text))
            return False
        match event:
            case h11.Request():
                return await self._begin(event)
            case h11.Data() if self._exchange is not None:
                if not self._answer_has_begun:
                    await self._exchange.body(bytes(event.data))
            case h11.EndOfMessage() if self._exchange is not None:
                await self._exchange.end_body()
            case _:
                self._paused = event is h11.PAUSED
                return False
        return True

    async def _begin(self, request: h11.Request) -> bool:
        """Open an exchange for `request`, or refuse it. Returns whether an exchange was opened."""
        self._is_head = request.method == b"HEAD"
        self._answer_has_begun = self._answer_is_complete = False
        refusal = _refusal(request)
        if refusal is not None:
            await self._refuse(refusal)
            return False
        self._transport.begin_request()
        self._exchange = self._open_exchange(self._send, self._exchange_finished)
        await self._exchange.begin(request)
        return True

    async def _send(self, event: h11.Event) -> None:
        if self._is_over:
            return
        match event:
            case h11.Response():
                self._answer_has_begun = True
                self._answer_is_complete = event.status_code == 204 or b"content-length" in _names(event)
            case h11.EndOfMessage():
                self._answer_is_complete = True
        await self._transport.write(self._encode(event), complete=self._answer_is_complete)

    def _encode(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""

    async def _exchange_finished(self) -> None:
        # quart-trio calls this from a task that it has already cancelled, because the answer is complete. So there may
        # be no checkpoint in here.
        self._exchange = None
        if self._is_over:
            return  # the answer was complete just as the client disconnected
        both_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if not both_done or self._is_closing():
            await self._finish()
            return
        self._h11.start_next_cycle()
        self._is_head = self._paused = False
        if self._n_waiting:
            self._transport.wake_reader()  # a whole request may wait, so the connection counts as serving until then
        else:
            self._transport.await_request(begun=False)

    async def _refuse(self, problem: Problem) -> None:
        """Answer what is not a request we serve, unless an answer is under way, and close."""
        self._closed = True  # the application, if one runs, writes nothing more
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = plain_text(problem)
            body = b"" if self._is_head else answer.body
            headers = {**answer.headers, "Content-Length": str(len(answer.body)), "Connection": "close"}
            response = h11.Response(status_code=problem.status, headers=list(headers.items()))
            self._transport.write_now(b"".join(map(self._encode, (response, h11.Data(data=body), h11.EndOfMessage()))))
        await self._finish()

    async def _finish(self) -> None:
        self._closed = True
        self._transport.finish()
        await self.disconnect()


def _refusal(request: h11.Request) -> Problem | None:
    names = _names(request)
    if request.http_version not in (b"1.0", b"1.1"):
        return Problem(505, "this server speaks HTTP/1.1")
    if b"content-length" in names and b"transfer-encoding" in names:
        return Problem(400, "Content-Length and Transfer-Encoding must not come together")
    if not request.target.startswith(b"/"):
        return Problem(400, "the request target must be a path")
    return None


def _names(message: h11.Request | h11.Response) -> set[bytes]:
    """The names of its headers, in lower case."""
    return {name for name, _ in message.headers}
