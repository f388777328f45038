"""A conversation with a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import ip_address
from socket import gaierror
from ssl import SSLError
from typing import Any, Final

import httpx2
import trio

from trio_runner.cli.chat.conversation import Message
from trio_runner.cli.chat.model import AnswerEvent, ChatError
from trio_runner.cli.chat.openai import AnswerReader, chat_body, first_model, refusal
from trio_runner.cli.chat.sse import EventReader, EventTooLong
from trio_runner.front_door import leaves

_CONNECT_SECONDS: Final = 15.0
_MAX_BODY_BYTES: Final = 8 << 20
"""Bytes that are read of an answer that is no stream."""


class RemoteModel:
    """Answers by asking a server.

    `url` ends with the version (see `openai.base_url`). `model` is its name there; "" means the first that the server
    lists. `options` are further fields of each request.
    """

    def __init__(
        self, client: httpx2.AsyncClient, url: str, *, model: str, api_key: str | None, options: Mapping[str, Any]
    ) -> None:
        self._client = client
        self._url = url
        self._model = model
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._options = options

    async def find_name(self) -> str:
        if not self._model:
            with _chat_errors(self._url):
                async with self._client.stream("GET", f"{self._url}/models", headers=self._headers) as response:
                    body = await self._body_of(response)
            self._model = first_model(body)
        return self._model

    @asynccontextmanager
    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[AsyncIterator[AnswerEvent]]:
        body = chat_body(await self.find_name(), messages, self._options)
        url = f"{self._url}/chat/completions"
        with _chat_errors(self._url):
            async with self._client.stream("POST", url, json=body, headers=self._headers) as response:
                if response.headers.get("Content-Type", "").startswith("application/json") or response.is_error:
                    yield _Whole(await self._body_of(response))
                else:
                    if response.status_code != 200:
                        raise refusal(response.status_code, b"", has_key=bool(self._headers))
                    async with _unwound(response.aiter_bytes()) as data:
                        yield _Answer(data)

    async def _body_of(self, response: httpx2.Response) -> bytes:
        """The whole body. Raises `ChatError` for a status other than 200, and for a body that is too long."""
        body = b""
        async with _unwound(response.aiter_bytes()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > _MAX_BODY_BYTES:
                    raise ChatError(f"the server answered with more than {_MAX_BODY_BYTES} bytes")
        if response.status_code != 200:
            raise refusal(response.status_code, body, has_key=bool(self._headers))
        return body


class _Answer:
    """The events of a stream."""

    def __init__(self, data: AsyncIterator[bytes]) -> None:
        self._data = data
        self._reader = EventReader()
        self._answer = AnswerReader()
        self._events: deque[AnswerEvent] = deque()
        self._ended = False
        self._failure: ChatError | None = None

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> AnswerEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            await self._read()
        return self._events.popleft()

    async def _read(self) -> None:
        try:
            events = self._reader.push(await anext(self._data))
        except StopAsyncIteration:
            events, self._ended = self._reader.flush(), True
        try:
            for event in events:
                self._events += self._answer.push(event.data)
            if self._ended:
                self._events += self._answer.flush()
        except ChatError as error:
            self._failure = error  # raised after the events before it


class _Whole:
    """The events of an answer that did not come as a stream."""

    def __init__(self, body: bytes) -> None:
        answer = AnswerReader()
        self._events = iter([*answer.push_whole(body), *answer.flush()])

    def __aiter__(self) -> _Whole:
        return self

    async def __anext__(self) -> AnswerEvent:
        try:
            return next(self._events)
        except StopIteration:
            raise StopAsyncIteration from None


@asynccontextmanager
async def _unwound(data: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Close `data` at the end of the block, and all the generators that httpx has inside it.

    Closing the outer one leaves the inner ones to the garbage collector, which trio complains about. A read that is
    cancelled ends them all.
    """
    try:
        yield data
    finally:
        with suppress(httpx2.HTTPError, httpx2.StreamError), trio.CancelScope() as scope:
            scope.cancel()
            async for _ in data:
                pass


def open_client(url: str) -> httpx2.AsyncClient:
    """A client for one server, to be closed with `async with`. A server on this machine is never behind a proxy."""
    timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)  # a long prompt may take minutes to read
    return httpx2.AsyncClient(timeout=timeout, trust_env=not _is_loopback(httpx2.URL(url).host))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """Why a connection failed: what the system says about the first address, if it says something."""
    cause: BaseException | None = error
    while cause is not None:
        for leaf in leaves(cause):
            if isinstance(leaf, OSError) and leaf.strerror and leaf.errno:
                return leaf.strerror if isinstance(leaf, gaierror | SSLError) else os.strerror(leaf.errno)
        cause = cause.__cause__ or cause.__context__
    return str(error) or "it does not answer"


@contextmanager
def _chat_errors(url: str) -> Iterator[None]:
    """Turn failures of the network into `ChatError`."""
    try:
        yield
    except EventTooLong as error:
        raise ChatError(str(error)) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise ChatError(f"cannot reach {url}: {_reason(error)}") from error
    except (httpx2.ReadError, httpx2.RemoteProtocolError) as error:
        raise ChatError("the connection broke before the answer ended") from error
    except httpx2.HTTPError as error:
        raise ChatError(f"{url}: {str(error) or type(error).__name__}") from error
    except httpx2.InvalidURL as error:
        raise ChatError(f"{url}: {error}") from error
