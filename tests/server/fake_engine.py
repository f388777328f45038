"""An engine that does what the test tells it to do, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trio

from trio_runner.config import EngineConfig
from trio_runner.errors import EngineClosed, LoadError
from trio_runner.events import Embedded, Event, Finished, TextPiece, Usage
from trio_runner.info import AdapterInfo, Capabilities, EngineStatistics, ModelInfo, Placement
from trio_runner.request import Chat, EmbedRequest, GenerateRequest, RerankRequest

INFO = ModelInfo(
    name="Fake 2B",
    architecture="fake",
    description="fake 2B Q4_K - Medium",
    n_vocab=257,
    n_ctx_train=4096,
    n_embd=3,
    n_layer=2,
    n_params=2_400_000_000,
    size=1500,
    chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    metadata={
        "general.file_type": "15",
        "general.size_label": "2B",
        "general.license": "mit",
        "fake.context_length": "4096",
        "fake.rope.freq_base": "10000.000000",
        "tokenizer.ggml.add_bos_token": "true",
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    },
)
DONE = Finished("stop", Usage(3, 1, 5, 0.0129, 0.25))


class FakeGeneration:
    def __init__(self, engine: FakeEngine, request: GenerateRequest) -> None:
        self.engine = engine
        self.request = request
        self.started = trio.Event()
        self.closed = trio.Event()
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._ended = False
        self._arrived = trio.Event()

    # What the server uses.

    async def start(self) -> None:
        await self.engine.admit()
        self.started.set()

    def close(self) -> None:
        self.closed.set()

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._arrived.wait()
        await trio.lowlevel.checkpoint()
        return self._take(1)[0]

    def receive_nowait(self, at_most: int | None = None) -> list[Event]:
        return self._take(at_most)

    def _take(self, at_most: int | None) -> list[Event]:
        events, self._events = self._events[:at_most], self._events[at_most:] if at_most is not None else []
        self._ended = self._ended or any(isinstance(event, Finished) for event in events)
        return events

    # What the test uses.

    @property
    def unread(self) -> list[Event]:
        """The events that the server has not taken yet."""
        return self._events

    def say(self, *events: Event | str) -> None:
        self._events += [TextPiece(event) if isinstance(event, str) else event for event in events]
        self._arrived.set()
        self._arrived = trio.Event()

    def fail(self, error: Exception) -> None:
        self._error = error
        self.say()


class FakeEngine:
    """Ready at once, and admits every request unless the test says otherwise. The test writes the answers."""

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.status = "ready"
        self.progress = 1.0
        self.failure: Exception | None = None
        self.admitting = trio.Event()
        self.admitting.set()
        self.refusal: Exception | None = None
        self.snapshot: EngineStatistics | None = None
        self.generations: list[FakeGeneration] = []
        self.calls: list[object] = []
        self.cancelled = trio.Event()
        self.vector: np.ndarray[tuple[int], np.dtype[np.float32]] = np.array([0.1, -2, 1e-7], dtype=np.float32)
        self.scores: list[float] = []
        self.adapters = [AdapterInfo("one", "/srv/secret/one.gguf", 0.5)]
        self.load_error: LoadError | None = None
        self.info = INFO
        self.capabilities = Capabilities(n_slots=2, n_ctx=100, max_rows=32, embedding_size=3)
        self.placement: Placement | None = None
        self.has_projector = False
        self.drained = False
        self._asked = trio.Event()

    async def asked(self) -> FakeGeneration:
        """The next generation that the server asks for."""
        while not self.generations:
            await self._asked.wait()
        return self.generations.pop(0)

    async def admit(self) -> None:
        try:
            await self.admitting.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        if self.refusal is not None:
            raise self.refusal

    def statistics(self) -> EngineStatistics:
        assert self.snapshot is not None
        return self.snapshot

    def generate(self, request: GenerateRequest) -> FakeGeneration:
        self.calls.append(request)
        self.generations.append(FakeGeneration(self, request))
        self._asked.set()
        self._asked = trio.Event()
        return self.generations[-1]

    async def embed_request(self, request: EmbedRequest) -> Embedded:
        self.calls.append(request)
        await self.admit()
        return Embedded(self.vector, Usage(prompt_tokens=3))

    async def embed_requests(self, requests: Sequence[EmbedRequest]) -> list[Embedded]:
        return [await self.embed_request(request) for request in requests]

    async def rerank_request(self, request: RerankRequest) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        self.calls.append(request)
        await self.admit()
        return np.array(self.scores, np.float32)

    async def wait_ready(self, at_most: float | None = None) -> None:
        self.calls.append("wait_ready")
        await self.admit()

    async def load_adapter(self, path: Path, *, name: str | None, scale: float) -> AdapterInfo:
        self.calls.append((path, name, scale))
        await self.admit()
        if self.load_error is not None:
            raise self.load_error
        return AdapterInfo(name or path.stem, str(path), scale)

    def unload_adapter(self, name: str) -> AdapterInfo:
        self.calls.append(name)
        return AdapterInfo(name, "/srv/secret/x.gguf", 1.0)

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        self.calls.append((text, add_special, parse_special))
        await self.admit()
        return list(text.encode())

    async def detokenize(self, tokens: Sequence[int]) -> str:
        self.calls.append(tuple(tokens))
        await self.admit()
        return bytes(tokens).decode()

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        self.calls.append(tuple(tokens))
        await self.admit()
        return [bytes([token]) for token in tokens]

    async def render(self, chat: Chat) -> str:
        self.calls.append(chat)
        await self.admit()
        return "".join(str(message.get("content")) for message in chat.messages)

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109
        self.drained = True
        self.status = "closing"
        with trio.move_on_after(timeout):
            for generation in self.generations:
                await generation.closed.wait()
        for generation in self.generations:
            generation.fail(EngineClosed("the engine is shutting down"))


def endless(generation: FakeGeneration) -> None:
    """Say more than any socket holds."""
    generation.say(*["x" * 50_000] * 400)
