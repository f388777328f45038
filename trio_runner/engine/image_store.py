"""Images as the projector has made them: each encoded once, whoever asks for it, and kept while there is room.

Encoding is work of its own, on a helper thread: neither the event loop nor the decode thread waits for it. Whoever asks
for an image that is being encoded waits for that one; when nobody waits any more it is broken off.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from trio_runner.core.ports import EncodedImage, Encoding, Projector
from trio_runner.engine.patience import GaveUp, Patience
from trio_runner.errors import EngineClosed, InvalidImage, NativeError, RunnerError

if TYPE_CHECKING:
    from trio_runner.pixels import Pixels


logger = logging.getLogger("trio_runner.engine")


@dataclass(slots=True, eq=False)
class _Job:
    """An image that is being encoded, or waits for that."""

    encoding: Encoding
    done: trio.Event = field(default_factory=trio.Event)
    n_waiting: int = 0
    result: EncodedImage | Exception | None = None


class ImageStore:
    """All on one trio thread. Keyed by the digest of the pixels; there is one projector."""

    def __init__(self, projector: Projector, max_bytes: int, nursery: trio.Nursery, patience: Patience) -> None:
        """Keeps at most `max_bytes` of rows, those that were asked for last."""
        self.projector = projector
        self.n_bytes = self.n_encoded = self.n_found = 0
        """Bytes that are kept; images that were encoded, and that were there or on their way when asked for."""
        self._max_bytes = max_bytes
        self._nursery = nursery
        self._patience = patience
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._jobs: dict[bytes, _Job] = {}
        self._limiter = trio.CapacityLimiter(1)
        self._closed = False

    async def encode(self, pixels: Pixels, *, param: str) -> EncodedImage:
        """The rows of an image. Raises `InvalidImage`, naming `param`, `NativeError`, `EngineClosed`, and for whatever
        else goes wrong a `RunnerError` with that as its cause."""
        key = pixels.digest
        image = self._images.get(key)
        if image is not None:
            self._images.move_to_end(key)
            self.n_found += 1
            return image
        job = self._jobs.get(key)
        if job is None:
            if self._closed:
                raise EngineClosed("the engine is shutting down")
            job = self._jobs[key] = _Job(self.projector.encoding(pixels))
            self._nursery.start_soon(self._run, key, job)
        else:
            self.n_found += 1
        job.n_waiting += 1
        try:
            await job.done.wait()
        finally:
            job.n_waiting -= 1
            if not job.n_waiting and not job.done.is_set():
                job.encoding.cancel()
                # Whoever asks for it from now on starts anew.
                self._forget(key, job)
        if isinstance(job.result, EncodedImage):
            return job.result
        raise _own_error(job.result, param)

    def close(self) -> None:
        """Break off what runs; nothing more is encoded."""
        self._closed = True
        for job in self._jobs.values():
            job.encoding.cancel()

    async def closed(self) -> None:
        """Until nothing computes any more, after `close`."""
        async with self._limiter:
            pass

    async def _run(self, key: bytes, job: _Job) -> None:
        try:
            async with self._limiter:
                job.result = await self._patience.run(job.encoding.run)
            self.n_encoded += 1
            self._keep(key, job.result)
        except RunnerError as error:
            job.result = error
        except GaveUp:
            job.result = EngineClosed("the engine is shutting down")
        except Exception as failure:  # such as MemoryError: no reason to bring the engine down
            logger.exception("an image could not be encoded")
            job.result = failure
        finally:
            self._forget(key, job)
            job.done.set()

    def _forget(self, key: bytes, job: _Job) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]

    def _keep(self, key: bytes, image: EncodedImage) -> None:
        if image.n_bytes > self._max_bytes:
            return
        replaced = self._images.pop(key, None)
        self._images[key] = image
        self.n_bytes += image.n_bytes - (replaced.n_bytes if replaced is not None else 0)
        while self.n_bytes > self._max_bytes:
            _, oldest = self._images.popitem(last=False)
            self.n_bytes -= oldest.n_bytes


def _own_error(failure: Exception | None, param: str) -> RunnerError:
    """A new exception for each who waits: everybody raises their own."""
    match failure:
        case InvalidImage():
            return InvalidImage(f"{param}: {failure}", param=param)
        case NativeError(function=function, code=code, message=message):
            return NativeError(function, code, message)
        case EngineClosed() | None:
            return EngineClosed("the engine is shutting down")
        case _:
            error = RunnerError(f"{param}: the image could not be encoded")
            error.__cause__ = failure
            return error
