"""A server of each of the dialects, over real sockets. It generates words at a steady pace."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import trio

from trio_runner.bench.client import Address
from trio_runner.bench.dialects import DIALECTS, DialectName
from trio_runner.bench.server import Server

DEADLINE = 30.0
"""Seconds after which a test has failed."""
END_TOKEN = 7
"""The token of "</s>"."""
PADDING = "x" * 250
"""Part of every line, so that buffers are full soon."""
STUCK_SECONDS = 0.05
"""Seconds without progress after which a client counts as one that does not read."""

Fields = dict[str, Any]


class FakeServer:
    """One word is one token. The server remembers one prompt, as far as it has decoded it."""

    def __init__(self, dialect: DialectName, *, slots: int = 4, max_queue: int = 1000) -> None:
        self.dialect = dialect
        self.is_openai = dialect in ("openai", "openai-chat")
        self.n_slots = slots
        self.slots = trio.CapacityLimiter(slots)
        self.max_queue = max_queue
        self.step = 0.0005
        self.prefill_step = 0.00001
        self.generations = 0
        self.n_disconnected = 0
        """Clients that disconnected during a generation."""
        self.cached: list[str] = []
        self.requests: list[Fields] = []
        """The fields of every request for a completion."""
        self.texts_break = False
        """Whether texts depend on who else is there, as with a bug."""
        self.bits_break = False
        """The same of log-probabilities, by a little."""
        self.tells_logprobs = True
        self.leaks = False
        """Whether an abandoned generation is counted for ever."""
        self.pauses = True
        """Whether a client that does not read leaves its part of the speed to the others."""
        self.sending: dict[trio.SocketStream, float] = {}
        """Since when the server waits for a client to take a piece of text."""
        self.embeds = dialect != "llama"
        self.has_statistics = dialect == "runner"
        self.health = 200
        self.embeddings_wait = False
        """Whether an embedding waits until nothing is generated."""
        self.statistics_step = 0.0
        """Seconds between two counts of the queue."""
        self._counted = (-math.inf, 0)

    @property
    def waiting(self) -> int:
        return self.slots.statistics().tasks_waiting

    @property
    def n_stuck(self) -> int:
        """Clients that do not read."""
        return sum(trio.current_time() - since > STUCK_SECONDS for since in self.sending.values())

    # ---- HTTP

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
                buffer = b""
                while True:
                    while b"\r\n\r\n" not in buffer:
                        if not (data := await stream.receive_some()):
                            return
                        buffer += data
                    head, _, buffer = buffer.partition(b"\r\n\r\n")
                    request, *lines = head.decode().split("\r\n")
                    headers = {
                        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
                    }
                    n_body = int(headers.get("content-length", 0))
                    while len(buffer) < n_body:
                        if not (data := await stream.receive_some()):
                            return
                        buffer += data
                    body, buffer = buffer[:n_body], buffer[n_body:]
                    await self._answer(stream, request.split()[1], json.loads(body) if body else {})

    async def _answer(self, stream: trio.SocketStream, path: str, fields: Fields) -> None:
        if path == DIALECTS[self.dialect].path:
            await self._completion(stream, fields)
            return
        while "embedding" in path and self.embeddings_wait and self.generations:  # noqa: ASYNC110
            await trio.sleep(0.001)
        status, answer = self._other(path, fields)
        await _respond(stream, status, json.dumps(answer).encode())

    def _other(self, path: str, fields: Fields) -> tuple[int, object]:
        match path:
            case "/health":
                return self.health, {"status": "ok"} | ({"progress": 1} if self.dialect == "runner" else {})
            case "/tokenize" if not self.is_openai:
                words = fields["content"].split()
                return 200, {"tokens": [END_TOKEN if word == "</s>" else 1 for word in words]}
            case "/statistics" if self.has_statistics:
                running, cached = self.slots.borrowed_tokens, len(self.cached)
                if trio.current_time() - self._counted[0] >= self.statistics_step:
                    self._counted = trio.current_time(), self.waiting
                counts = {"running": running, "waiting": self._counted[1], "generations": self.generations}
                return 200, {
                    "status": "ready",
                    "slots": int(self.slots.total_tokens),
                    "cached_tokens": cached,
                    "paused": self.n_stuck if self.pauses else 0,
                    **counts,
                }
            case "/props" if self.dialect == "llama":
                return 200, {"total_slots": self.n_slots}
            case "/slots" if self.dialect == "llama":
                return 200, [
                    {"is_processing": i < self.slots.borrowed_tokens} for i in range(int(self.slots.total_tokens))
                ]
            case "/v1/models" if self.is_openai:
                return 200, {"data": [{"id": "fake"}]}
            case "/embedding" | "/v1/embeddings" if self.embeds:
                return 200, {"embedding": [1.0]}
            case "/embedding" | "/v1/embeddings":
                return 501, {"error": {"message": "not here"}}
            case _:
                return 404, {"error": {"message": "no such path"}}

    # ---- completions

    async def _completion(self, stream: trio.SocketStream, fields: Fields) -> None:
        self.requests.append(fields)
        if self.waiting >= self.max_queue:
            await _respond(stream, 503, b"full", "Retry-After: 1")
            return
        self.generations += 1
        gone = trio.CancelScope()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                try:
                    # Peek only: it may be the next request of a client that has read its answer.
                    hung_up = not await stream.socket.recv(1, trio.socket.MSG_PEEK)
                except OSError:
                    hung_up = True
                if hung_up:
                    gone.cancel()

            nursery.start_soon(watch)
            with gone:
                try:
                    async with self.slots:
                        await self._generate(stream, fields)
                except trio.BrokenResourceError:  # the writer may notice it first
                    gone.cancel()
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        self.n_disconnected += gone.cancelled_caught
        if not (gone.cancelled_caught and self.leaks):
            self.generations -= 1
        if gone.cancelled_caught:
            await stream.aclose()

    async def _generate(self, stream: trio.SocketStream, fields: Fields) -> None:
        text = fields["messages"][0]["content"] if self.dialect == "openai-chat" else fields["prompt"]
        words = text.split()
        n_cached = min(_n_same(words, self.cached), len(words) - 1) if fields["cache_prompt"] else 0
        for n_decoded in range(n_cached + 1, len(words) + 1, 16):
            self.cached = words[:n_decoded]
            await trio.sleep(16 * self.prefill_step)
        self.cached = words
        n_predict: int = fields["max_tokens" if self.is_openai else "n_predict"]
        streamed = fields.get("stream", True)
        pieces = []
        if streamed:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        n_top = self.tells_logprobs and bool(fields.get("n_probs") or fields.get("logprobs"))
        for number in range(n_predict):
            await trio.sleep(self.step + (0 if self.pauses else 0.01 * self.n_stuck))
            in_company = self.generations > 1 and number > 2
            word = f" {len(words)}:{number}" + ("!" if self.texts_break and in_company else "")
            logprob = -0.1 - 1e-9 * (self.bits_break and in_company)
            pieces.append(word)
            if streamed:
                self.sending[stream] = trio.current_time()
                try:
                    for answer in range(fields.get("n") or fields.get("n_cmpl") or 1):
                        for line in self._piece(word, logprob if n_top else None, answer):
                            await stream.send_all(b"%x\r\n%b\r\n" % (len(line), line))
                finally:
                    del self.sending[stream]
        last = self._last(len(words), n_cached, n_predict, "" if streamed else "".join(pieces))
        if streamed:
            for line in last:
                await stream.send_all(b"%x\r\n%b\r\n" % (len(line), line))
            await stream.send_all(b"0\r\n\r\n")
        else:
            await _respond(stream, 200, last[0].removeprefix(b"data: ").strip())

    def _piece(self, word: str, logprob: float | None, answer: int) -> Iterator[bytes]:
        top = [{"logprob": logprob}, {"logprob": -1.0}]
        token = {"id": len(word), "bytes": list(word.encode()), "logprob": logprob, "top_logprobs": top}
        entry = {"completion_probabilities": [token]} if logprob is not None else {}
        if self.dialect == "runner":
            yield _line({"content": word, "stop": False, "padding": PADDING, **entry})
        elif self.dialect == "llama":
            yield b": a comment\n\n"
            yield _event({"index": answer, "content": word, "stop": False, "padding": PADDING, **entry})
        elif self.dialect == "openai-chat":
            logprobs: Any = {"content": [token]} if logprob is not None else None
            part = {"index": answer, "delta": {"content": word}, "logprobs": logprobs}
            yield _event({"choices": [part], "padding": PADDING})
        else:
            top_of_word = [{word: logprob, "else": -1.0}]
            logprobs = {"tokens": [word], "token_logprobs": [logprob], "top_logprobs": top_of_word}
            part = {"index": answer, "text": word, "finish_reason": None}
            part["logprobs"] = logprobs if logprob is not None else None
            yield _event({"choices": [part], "padding": PADDING})

    def _last(self, n_prompt: int, n_cached: int, n_predicted: int, text: str) -> list[bytes]:
        timings = {"predicted_n": n_predicted, "prompt_n": n_prompt, "cache_n": n_cached}
        match self.dialect:
            case "runner":
                return [_line({"content": "", "stop": True, "timings": timings})]
            case "llama":
                timings["prompt_n"] -= n_cached
                return [_event({"content": text, "stop": True, "timings": timings})]
            case "openai" | "openai-chat":
                usage = {"prompt_tokens": n_prompt, "completion_tokens": n_predicted}
                usage["prompt_tokens_details"] = {"cached_tokens": n_cached}  # type: ignore[assignment]
                choice = {"text": text, "message": {"content": text}, "finish_reason": "length"}
                return [_event({"choices": [choice], "usage": usage}), b"data: [DONE]\n\n"]


def _n_same(words: list[str], others: list[str]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(words, others, strict=False)) if a != b), min(len(words), len(others))
    )


def _line(fields: Fields) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _event(fields: Fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


async def _respond(stream: trio.SocketStream, status: int, body: bytes, *headers: str) -> None:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    await stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)


@asynccontextmanager
async def listening(handler: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[Address]:
    """Yield an address whose connections `handler` gets, for at most `DEADLINE` seconds."""
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            yield Address("127.0.0.1", listener.socket.getsockname()[1])
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def fake_server(
    dialect: DialectName, *, slots: int = 4, max_queue: int = 1000
) -> AsyncIterator[tuple[FakeServer, Server]]:
    """Yield a running server, and what the load generator knows of it."""
    fake = FakeServer(dialect, slots=slots, max_queue=max_queue)
    async with listening(fake.serve) as address:
        kind = DIALECTS[dialect](model="fake")
        yield fake, Server(f"http://{address}", address, kind, fake.n_slots, tokenizes=not fake.is_openai)
