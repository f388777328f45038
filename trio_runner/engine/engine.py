"""The engine: one model, one decode thread, any number of readers.

    open_engine
      nursery
      |- _live        loads the model on a helper thread, runs the decode loop on its own, tears down in order
      |- Deadlines    one that drops readers that were left paused for too long, one that ends requests in time
      '- the caller's block

All state below lives on the trio thread. The decode thread gets mail, and sends events back through one idempotent
`run_sync_soon` per step.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, Unpack

import numpy as np
import trio
from numpy.typing import NDArray

from trio_runner.config import AdapterConfig, EngineConfig
from trio_runner.core.pooling import normalize as normalize_vector
from trio_runner.core.ports import EncodedImage, Loader, Runtime
from trio_runner.core.scheduler import Emission
from trio_runner.engine.adapters import AdapterTable
from trio_runner.engine.deadlines import Deadlines
from trio_runner.engine.decode_loop import DecodeLoop
from trio_runner.engine.generation import Embedding, Generation, Reader
from trio_runner.engine.image_store import ImageStore
from trio_runner.engine.mailbox import Cancel, Close, Expire, Mailbox, Pause, Resume, Retire, Submit
from trio_runner.engine.patience import GaveUp, Patience
from trio_runner.engine.prepare import AnyRequest, NamedImage, PairRequest, has_parts, parts_of, prepare, size, tokenize
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineClosed,
    InvalidRequest,
    LoadError,
    NativeError,
    ReaderStalled,
    RunnerError,
)
from trio_runner.events import Embedded, Finished, Usage
from trio_runner.images import load_pixels
from trio_runner.info import (
    AdapterInfo,
    Capabilities,
    EngineStatistics,
    ModelInfo,
    Placement,
    SchedulerStatistics,
    Status,
)
from trio_runner.options import ChatOptions, GenerateOptions
from trio_runner.request import (
    AdapterChoice,
    Chat,
    EmbedRequest,
    GenerateRequest,
    Part,
    RerankRequest,
    as_prompt,
    make_request,
)

logger = logging.getLogger("trio_runner.engine")

T = TypeVar("T")

MAX_HELPERS = 2
"""Prompts that are tokenised at the same time: more would only take the cores from the decode thread."""
LONG_TEXT = 1 << 16
"""Characters of a text that takes long to tokenise, about a tenth of a second and more: one at a time, so that short
ones never wait behind it."""
MAX_PICTURES = 8
"""Images that are decoded, or wait as pixels for the projector, at the same time: up to 50 MB each."""
MAX_RETRY_AFTER = 60.0
"""Seconds; an estimate beyond that is worth nothing."""
FREE_SECONDS = 3.0
"""That a device which has failed may take to give back its memory. One that is gone may never do so."""
CLOSE_SECONDS = 4.0
"""That whatever computes or loads may take to end when the engine is closed. A batch is broken off or soon over, and
loading stops at the next tensor; but a device that hangs does neither."""


Kind: TypeAlias = type[GenerateRequest] | type[EmbedRequest]
"""Generations wait for slots, embeddings for lanes of their own: neither takes a place from the other."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A request that was admitted, and who reads it."""

    reader: Reader
    kind: Kind


class Engine:
    """One loaded model, ready for any number of concurrent requests. Made by `open_engine`; used on its trio thread.

    It breaks if the model does not load or its decode thread dies, and once only: `status` is "broken" from then on,
    `failure` says why, the model is freed, and whatever was or is asked of it raises. Open another one to go on.
    """

    def __init__(self, loader: Loader, config: EngineConfig, *, cancel_when_broken: bool = True) -> None:
        """Not to be called: `open_engine` does."""
        self.config = config
        self.failure: BaseException | None = None
        """Why `status` is "broken"."""
        self._loader = loader
        self._cancel_when_broken = cancel_when_broken
        self._status: Status = "loading"
        self._progress = 0.0
        self._settled = trio.Event()
        self._runtime: Runtime | None = None
        self._loop: DecodeLoop | None = None
        self._mailbox = Mailbox()
        self._uids = itertools.count(1)
        self._requests: dict[int, _InFlight] = {}
        self._emissions: deque[Emission] = deque()
        self._stalled = Deadlines(self._drop_stalled)
        self._overdue = Deadlines(self._expire)
        self._preparing: Counter[Kind] = Counter()
        self._stopping = False  # what is in flight ends now; while it is drained, it does not
        self._seconds: dict[Kind, float] = {}  # that a request has rows in batches for, lately
        self._idle = trio.Event()
        self._helpers = trio.CapacityLimiter(MAX_HELPERS)
        self._long_helper = trio.CapacityLimiter(1)
        self._pictures = trio.CapacityLimiter(MAX_PICTURES)
        self._picture_helper = trio.CapacityLimiter(1)
        self._images: ImageStore | None = None
        self._adapters = AdapterTable()
        self._patience = Patience()
        self._hangs = False

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        return self._status

    @property
    def progress(self) -> float:
        """How much of the model is loaded, from 0 to 1."""
        return self._progress

    @property
    def info(self) -> ModelInfo:
        """Facts about the model. While there is none, raises as `wait_ready`, or `EngineBusy` if it is loading."""
        return self._ready_runtime().model.info

    @property
    def capabilities(self) -> Capabilities:
        """What the context can do. Raises as `info`."""
        return self._ready_runtime().context.capabilities

    def statistics(self) -> EngineStatistics:
        scheduler = self._loop.statistics if self._loop is not None else SchedulerStatistics()
        statistics = EngineStatistics(self._status, self.config.slots, len(self._requests), scheduler)
        images = self._images
        if images is None:
            return statistics
        return replace(
            statistics, images_encoded=images.n_encoded, images_found=images.n_found, image_bytes=images.n_bytes
        )

    @property
    def has_projector(self) -> bool:
        """Whether prompts may have images. Raises as `info`."""
        return self._ready_runtime().projector is not None

    @property
    def placement(self) -> Placement | None:
        """Which devices the model is on, where the runtime says so. Raises as `info`."""
        return self._ready_runtime().placement

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Those that requests can choose from. Raises as `info`."""
        self._ready_runtime()
        return self._adapters.infos()

    async def wait_ready(self) -> None:
        """Until the model is loaded. Raises `LoadError` if that failed, `EngineBroken` if the engine died,
        `EngineClosed` if it was closed or is closing."""
        await self._settled.wait()
        self._ready_runtime()

    # -- what it does -------------------------------------------------------------------------------------------------

    def generate(
        self,
        request: GenerateRequest | Chat | str | Sequence[int | Part],
        /,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continue a prompt: a whole request, or text, or tokens, or a list of texts and images, with any fields of
        `GenerateRequest` and `SamplingParams` by name. Nothing happens before the generation is entered, started or
        iterated.

        Raises `InvalidRequest` for a value outside its range and TypeError for a name that is no field.
        """
        if not isinstance(request, GenerateRequest):
            request = make_request(as_prompt(request), options)
        elif options:
            raise TypeError("options go into the request")
        return Generation(self, request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Generation:
        """Continue a conversation, which the chat template in the model's file makes a prompt of; the rest as
        `generate`. A message's content is text, or a list of parts: `{"type": "text", "text": ...}` and
        `{"type": "image", "image": ...}`."""
        chat = Chat(
            messages=tuple(messages),
            tools=None if tools is None else tuple(tools),
            documents=None if documents is None else tuple(documents),
            add_generation_prompt=add_generation_prompt,
            variables=template_variables or {},
        )
        return self.generate(chat, **options)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = False,
        adapters: Sequence[AdapterChoice] | None = None,
    ) -> NDArray[np.float32]:
        """One vector per text, shape (len(texts), n) with n the model's n_embd, or `dimensions`. See `EmbedRequest`.
        Raises as `Generation.start`; then no vector is lost, for none is returned."""
        if isinstance(texts, str):
            raise TypeError("embed takes a list of texts")
        choices = None if adapters is None else tuple(adapters)
        requests = [
            EmbedRequest(content=text, normalize=normalize, dimensions=dimensions, truncate=truncate, adapters=choices)
            for text in texts
        ]
        vectors = [np.asarray(embedded.vector) for embedded in await self.embed_requests(requests)]
        return np.stack(vectors) if vectors else np.empty((0, dimensions or self.capabilities.n_vector), np.float32)

    async def embed_requests(self, requests: Sequence[EmbedRequest]) -> list[Embedded]:
        """As `embed_request`, of many at once: all of them, or none."""
        await self.wait_ready()
        embedded = await self._all_vectors(requests)
        return [Embedded(_vector(one, request), one.usage) for one, request in zip(embedded, requests, strict=True)]

    async def embed_request(self, request: EmbedRequest) -> Embedded:
        """The vector of one request, float32, shape (n,), and what it cost. Raises as `Generation.start`."""
        embedding = Embedding(self, request)
        try:
            await embedding.start()
            embedded = await embedding.result()
        finally:
            embedding.close()
        return Embedded(_vector(embedded, request), embedded.usage)

    async def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """How well each document answers the query, shape (len(documents),): the model's own scores, of which only
        the order means something. Raises as `Generation.start`, `Unsupported` if the model was not made for it."""
        return await self.rerank_request(RerankRequest(query=query, documents=tuple(documents), truncate=truncate))

    async def rerank_request(self, request: RerankRequest) -> NDArray[np.float32]:
        """As `rerank`, of a whole request."""
        pairs = [
            PairRequest(request.query, document, request.truncate, request.adapters, f"documents[{index}]")
            for index, document in enumerate(request.documents)
        ]
        await self.wait_ready()
        embedded = await self._all_vectors(pairs)
        return np.array([np.asarray(one.vector, np.float32).flat[0] for one in embedded], np.float32)

    async def _all_vectors(self, requests: Sequence[EmbedRequest | PairRequest]) -> list[Embedded]:
        """In the order of the requests, which run in the order of their lengths: texts that share a batch wait for the
        longest of them."""
        vectors: dict[int, Embedded] = {}
        in_flight: deque[tuple[int, Embedding]] = deque()
        # A window, so that a long list neither fills the queue nor starves the requests of others.
        lanes, max_queue = self.capabilities.n_embed_slots, self.config.max_queue
        window = 2 * lanes if max_queue is None else lanes + min(lanes, max_queue)

        async def take_first() -> None:
            index, embedding = in_flight[0]
            vectors[index] = await embedding.result()
            in_flight.popleft()

        try:
            for index in sorted(range(len(requests)), key=lambda index: size(requests[index]), reverse=True):
                if len(in_flight) == window:
                    await take_first()
                embedding = Embedding(self, requests[index])
                # Others may have filled the queue meanwhile; those before this one make room in it.
                while True:
                    try:
                        await embedding.start()
                        break
                    except EngineBusy:
                        if not in_flight:
                            raise
                    await take_first()
                in_flight.append((index, embedding))
            while in_flight:
                await take_first()
        finally:
            for _, embedding in in_flight:
                embedding.close()
        return [vectors[index] for index in range(len(requests))]

    async def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 0.0
    ) -> AdapterInfo:
        """Load a LoRA while others are served; `name`: the file's without its ending, unless given. `scale` is for
        requests that choose no adapters. Raises `LoadError`, `InvalidRequest` for a name that is taken, and as
        `wait_ready`."""
        await self.wait_ready()
        if not math.isfinite(scale):
            raise InvalidRequest(f"scale must be finite, not {scale}", param="scale")
        try:
            config = AdapterConfig(os.fspath(path), scale, name or "")
        except ValueError as error:
            raise InvalidRequest(str(error), param="name") from None
        self._adapters.reserve(config.name)
        try:
            call = partial(self._ready_runtime().model.adapter, config.path)
            adapter = await self._help(call, LONG_TEXT, discard=lambda adapter: adapter.close())
        finally:
            self._adapters.release(config.name)
        try:
            self._ready_runtime()
        except RunnerError:
            adapter.close()
            raise
        info = AdapterInfo(config.name, config.path, config.scale)
        self._adapters.add(info, adapter)
        return info

    def unload_adapter(self, name: str) -> AdapterInfo:
        """No request gets it from now on; it is freed when those that have it are done. Raises `UnknownAdapter`."""
        self._ready_runtime()
        uid, adapter, info = self._adapters.remove(name)
        self._mailbox.put(Retire(uid, adapter))
        return info

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The tokens of `text`. Raises `InvalidRequest`, and as `wait_ready`."""
        await self.wait_ready()
        model = self._ready_runtime().model
        call = partial(tokenize, model, text, param="content", add_special=add_special, parse_special=parse_special)
        return await self._help(call, len(text))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; bytes that are no characters become U+FFFD. Raises as `tokenize`."""
        await self.wait_ready()
        data = await self._help(partial(self._ready_runtime().model.detokenize, tokens), len(tokens))
        return data.decode(errors="replace")

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests and wait until those in flight are done, also those that are still being prepared, at
        most `timeout` seconds; then end what is left with `EngineClosed`."""
        if self._status in ("loading", "ready"):
            self._status = "closing"
            self._settled.set()
        with trio.move_on_after(timeout):
            while self._requests or self._preparing.total():
                await self._idle.wait()
        self._stopping = True
        for uid in list(self._requests):
            self.cancel(uid, EngineClosed("the engine is shutting down"))

    # -- the desk: what Generation and Embedding use ------------------------------------------------------------------

    @property
    def max_backlog(self) -> int:
        return self.config.max_backlog

    async def submit(self, reader: Reader, request: AnyRequest) -> int:
        """Prepare a sequence on a helper thread and queue it. Returns its uid. A deadline that passes before that ends
        it here."""
        uid = next(self._uids)
        deadline = math.inf
        if isinstance(request, GenerateRequest) and request.deadline is not None:
            deadline = trio.current_time() + request.deadline
        mail: Submit | None = None
        kind = _kind(request)
        self._refuse_if_full(request)
        self._preparing[kind] += 1  # its place in the queue, from now on
        try:
            with trio.CancelScope(deadline=deadline):
                await self.wait_ready()
                self._adapters.choose(request.adapters)
                mail = await self._prepare(request, uid)
        finally:
            self._preparing[kind] -= 1
            self._tell_if_idle()
        # No checkpoint from here to the return: a sequence that is queued has a reader that knows its uid.
        if mail is None or deadline <= trio.current_time():
            _close_sampler(mail)
            reader.deliver(Finished("deadline", Usage()))
            return uid
        try:
            self._live_runtime()
            chosen, adapters = self._adapters.choose(request.adapters)
        except RunnerError:
            _close_sampler(mail)
            raise
        self._requests[uid] = _InFlight(reader, kind)
        self._mailbox.put(replace(mail, spec=replace(mail.spec, adapters=chosen), adapters=adapters))
        if deadline < math.inf:
            self._overdue.set(uid, deadline)
        return uid

    async def _prepare(self, request: AnyRequest, uid: int) -> Submit:
        runtime = self._ready_runtime()
        n_characters = size(request)
        parts: list[str | EncodedImage] | None = None
        if isinstance(request, GenerateRequest) and has_parts(request, runtime):
            named = await self._help(partial(parts_of, request, runtime), n_characters)
            n_characters = sum(len(part) for part in named if isinstance(part, str))
            parts = [await self._encode(part) if isinstance(part, NamedImage) else part for part in named]
            self._live_runtime()  # that took a while: the model may be about to go
        call = partial(prepare, request, runtime, uid, parts)
        return await self._help(call, n_characters, discard=_close_sampler)

    async def _encode(self, image: NamedImage) -> EncodedImage:
        async with self._pictures:
            decode = partial(load_pixels, image.source, param=image.param)
            pixels = await trio.to_thread.run_sync(decode, limiter=self._picture_helper, abandon_on_cancel=True)
            self._live_runtime()
            assert self._images is not None, "an image, and no projector"
            try:
                return await self._images.encode(pixels, param=image.param)
            except EngineClosed:
                self._live_runtime()  # broken, maybe
                raise

    def cancel(self, uid: int, error: Exception | None = None) -> None:
        """Let go of a sequence; with `error`, its reader is told. Ignores a uid that has ended."""
        request = self._requests.pop(uid, None)
        if request is None:
            return
        self._forget(uid)
        self._tell(Cancel(uid))
        if error is not None:
            request.reader.fail(error)

    def pause(self, uid: int) -> None:
        self._mailbox.put(Pause(uid))
        self.still_reading(uid)

    def still_reading(self, uid: int) -> None:
        """Its reader is slow, not gone."""
        self._stalled.set(uid, trio.current_time() + self.config.stall_timeout)

    def resume(self, uid: int) -> None:
        self._stalled.clear(uid)
        self._mailbox.put(Resume(uid))

    # -- its life -----------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Load, run until cancelled, tear down. Returns if loading fails; if the decode thread dies, raises
        `EngineBroken`, or returns as well if that shall not cancel anybody."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_cancelled)
                runtime = await self._load()
                if runtime is not None:
                    if runtime.projector is not None:
                        self._images = ImageStore(
                            runtime.projector, self.config.image_cache_bytes, nursery, self._patience
                        )
                    nursery.start_soon(self._stalled.watch)
                    nursery.start_soon(self._overdue.watch)
                    try:
                        await self._run(runtime)
                    finally:
                        await self._free(runtime)
                nursery.cancel_scope.cancel()
        finally:
            if self._status != "broken":
                self._status = "closed"
            self._settled.set()

    async def _load(self) -> Runtime | None:
        def report(progress: float) -> None:
            self._progress = progress

        load = partial(self._loader, self.config, progress=report, cancelled=self._is_closing)
        try:
            runtime = await self._patience.run(load)
        except EngineClosed:
            return None
        except GaveUp:
            logger.error("loading does not stop: a device does not answer")
            return None
        except Exception as failure:
            logger.info("loading failed: %s", failure)
            self._break(failure)
            _forget_variables(failure)
            return None
        self._progress = 1.0
        return runtime

    async def _run(self, runtime: Runtime) -> None:
        token = trio.lowlevel.current_trio_token()

        def deliver(emissions: list[Emission]) -> None:
            self._emissions.extend(emissions)
            token.run_sync_soon(self._hand_over, idempotent=True)

        for loaded in runtime.adapters:
            self._adapters.add(AdapterInfo(loaded.name, loaded.path, loaded.scale), loaded.adapter)
        loop = DecodeLoop(runtime.context, self._mailbox, deliver, step_target=self.config.step_target)
        self._runtime, self._loop = runtime, loop
        if self._status == "loading":
            self._status = "ready"
        self._settled.set()
        try:
            await self._patience.run(loop.run)
        except GaveUp:
            self._hangs = True
            logger.error("the decode thread does not stop: a device does not answer")
            return
        except Exception as failure:
            # Where the native library failed, it has said itself; anything else is a bug, to be looked for.
            trace = None if isinstance(failure, NativeError) else failure
            logger.error("the decode thread died: %s", " ".join(str(failure).split()), exc_info=trace)
            self._hand_over()
            self._break(failure)
            if self._cancel_when_broken:
                raise EngineBroken(f"the decode thread died: {failure}") from failure
            return
        self._hand_over()

    async def _free(self, runtime: Runtime) -> None:
        self._end_readers(lambda: self._broken() if self._status == "broken" else EngineClosed("the engine was closed"))
        # Whoever is still tokenising, in whatever task, does so with this model.
        seconds = FREE_SECONDS if self._status == "broken" else CLOSE_SECONDS
        with trio.move_on_after(seconds, shield=True) as scope:
            for limiter in (self._helpers, self._long_helper):
                for _ in range(int(limiter.total_tokens)):
                    await limiter.acquire_on_behalf_of(object())
            await trio.lowlevel.checkpoint()  # so that whoever asked has what was made for them, to close it
            if self._images is not None:
                self._images.close()
                await self._images.closed()
        loop, self._runtime, self._loop, self._images = self._loop, None, None, None
        adapters = self._adapters.clear()
        if self._hangs:
            return  # freed, should its thread come back, by whoever has the last of it
        if loop is not None:
            # What was submitted between the end of the decode thread and the news of it.
            loop.refuse_mail()
        if self.failure is not None:
            _forget_variables(self.failure)

        def free() -> None:
            runtime.context.close()
            for adapter in adapters:
                adapter.close()
            if runtime.projector is not None:
                runtime.projector.close()
            runtime.model.close()

        if not scope.cancelled_caught:
            # On a thread, as it may take a while, in which a server that is broken still says so.
            with trio.move_on_after(seconds, shield=True) as scope:
                await trio.to_thread.run_sync(free, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
        if scope.cancelled_caught:
            logger.warning("the memory of the model is not free yet: a device does not answer")

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._stopping = True
            if self._status != "broken":
                self._status = "closing"
            self._patience.end(CLOSE_SECONDS)
            self._mailbox.put(Close())
            if self._loop is not None:
                self._loop.interrupt_all()
            if self._images is not None:
                self._images.close()

    def _drop_stalled(self, uid: int) -> None:
        self.cancel(uid, ReaderStalled(f"nothing was read for {self.config.stall_timeout:g} seconds"))

    def _expire(self, uid: int) -> None:
        self._tell(Expire(uid))

    def _tell(self, mail: Cancel | Expire) -> None:
        """Tell the decode thread to let go of a sequence, and not to finish what it does for it alone."""
        self._mailbox.put(mail)
        if self._loop is not None:
            self._loop.interrupt(mail.uid)

    # -----------------------------------------------------------------------------------------------------------------

    def _is_closing(self) -> bool:
        return self._status != "loading"

    def _ready_runtime(self) -> Runtime:
        if self._status == "ready" and self._runtime is not None:
            return self._runtime
        if self._status == "broken":
            raise self._broken()
        if self._status == "loading":
            raise EngineBusy("the model is still loading")
        raise EngineClosed("the engine is shutting down")

    def _live_runtime(self) -> Runtime:
        """For a request that was there before the engine took no more."""
        if self._status == "closing" and self._runtime is not None and not self._stopping:
            return self._runtime
        return self._ready_runtime()

    def _broken(self) -> RunnerError:
        """A new exception each time: each reader raises its own."""
        if isinstance(self.failure, LoadError):
            return LoadError(self.failure.reason, path=self.failure.path)
        error = EngineBroken(f"the engine is broken: {self.failure}")
        error.__cause__ = self.failure
        return error

    def _break(self, failure: Exception) -> None:
        self.failure = failure
        self._status = "broken"
        self._settled.set()

    def _refuse_if_full(self, request: AnyRequest) -> None:
        max_queue = self.config.max_queue
        if max_queue is None:
            return
        if isinstance(request, GenerateRequest) and request.priority == "background":
            max_queue //= 2  # the other half is for those who are waited for
        kind = _kind(request)
        n_in_flight = self._preparing[kind] + sum(other.kind is kind for other in self._requests.values())
        n_lanes = self._n_lanes(kind)
        n_excess = n_in_flight - n_lanes - max_queue + 1
        if n_excess > 0:
            seconds = self._seconds.get(kind, 0.0) * n_excess / n_lanes  # until so many have ended
            message = f"{n_lanes} requests are running and {n_in_flight - n_lanes} waiting"
            raise EngineBusy(message, retry_after=min(max(seconds, 1.0), MAX_RETRY_AFTER))

    def _n_lanes(self, kind: Kind) -> int:
        """Requests of a kind that run at once, as far as that is known before there is a model."""
        runtime = self._runtime
        return (
            self.config.slots
            if kind is GenerateRequest or runtime is None
            else runtime.context.capabilities.n_embed_slots
        )

    def _hand_over(self) -> None:
        # Runs inside trio's own entry queue: an exception here would bring down trio itself.
        while self._emissions:
            uid, event = self._emissions.popleft()
            request = self._requests.get(uid)
            if request is None:
                continue
            if isinstance(event, (Finished, Embedded)):
                del self._requests[uid]
                self._forget(uid)
                if isinstance(event, Embedded) or event.error is None:
                    self._learn_seconds(request.kind, event.usage)
            request.reader.deliver(event)

    def _learn_seconds(self, kind: Kind, usage: Usage) -> None:
        """A moving average over some ten requests, of those that ever ran."""
        seconds = usage.prompt_seconds + usage.completion_seconds
        if seconds > 0:
            average = self._seconds.get(kind, seconds)
            self._seconds[kind] = average + 0.1 * (seconds - average)

    def _forget(self, uid: int) -> None:
        self._stalled.clear(uid)
        self._overdue.clear(uid)
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if not self._requests and not self._preparing.total():
            self._idle.set()
            self._idle = trio.Event()

    def _end_readers(self, error: Callable[[], Exception]) -> None:
        while self._requests:
            uid, request = self._requests.popitem()
            self._forget(uid)
            request.reader.fail(error())

    async def _help(self, call: Callable[[], T], size: int, *, discard: Callable[[T], None] = lambda _: None) -> T:
        """Run `call`, about a text of `size`, on a helper thread.

        Cancelled, it returns at once; the call runs to its end, for which the model is kept, and `discard` gets its
        result.
        """
        results: list[T] = []
        is_abandoned = False

        def work() -> None:
            self._live_runtime()  # it may have gone while this waited for its turn
            results.append(call())
            if is_abandoned:
                drop()

        def drop() -> None:
            with suppress(IndexError):  # both threads may be here
                discard(results.pop())

        limiter = self._helpers if size < LONG_TEXT else self._long_helper
        try:
            await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)
        except trio.Cancelled:
            is_abandoned = True
            drop()
            raise
        return results.pop()


def _forget_variables(failure: BaseException) -> None:
    """Those of all frames that it came through, which are over: some may be of what is to be freed, and the failure is
    kept."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _close_sampler(mail: Submit | None) -> None:
    if mail is not None and mail.sampler is not None:
        mail.sampler.close()


def _kind(request: AnyRequest) -> Kind:
    return GenerateRequest if isinstance(request, GenerateRequest) else EmbedRequest


def _vector(embedded: Embedded, request: EmbedRequest) -> NDArray[np.float32]:
    vector = np.asarray(embedded.vector, dtype=np.float32)[: request.dimensions]
    return normalize_vector(vector) if request.normalize else vector
