"""Encoded images: each image is encoded once, even if several requests have it, and kept while there is room.

The projector computes on a thread of its own, so neither the event loop nor the decode thread waits for it. A request
for an image that is being encoded waits for the same encoding. An encoding that no request waits for is cancelled.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from trio_runner.core.ports import EncodedImage, Encoding, Projector
from trio_runner.engine.device_threads import DeviceHangs, DeviceThreads
from trio_runner.errors import EngineClosed, InvalidImage, NativeError, RunnerError

if TYPE_CHECKING:
    from trio_runner.pixels import Pixels


logger = logging.getLogger("trio_runner.engine")


@dataclass(slots=True, eq=False)
class _Job:
    """An image that is being encoded, or waits to be."""

    encoding: Encoding
    done: trio.Event = field(default_factory=trio.Event)
    n_waiting: int = 0
    result: EncodedImage | Exception | None = None


class ImageStore:
    """A cache of encoded images, keyed by the digest of their pixels. All on one trio thread."""

    def __init__(self, projector: Projector, max_bytes: int, nursery: trio.Nursery, threads: DeviceThreads) -> None:
        """Keeps at most `max_bytes` bytes of rows: those of the images that were asked for last."""
        self.projector = projector
        self.n_bytes = 0
        """Bytes of the images in the cache."""
        self.n_encoded = 0
        """Images that were encoded."""
        self.n_found = 0
        """Images found in the cache, or being encoded for another request already."""
        self._max_bytes = max_bytes
        self._nursery = nursery
        self._threads = threads
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._jobs: dict[bytes, _Job] = {}
        self._limiter = trio.CapacityLimiter(1)
        self._closed = False

    @property
    def n_encoding(self) -> int:
        """Images that are being encoded, or wait to be."""
        return len(self._jobs)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for an image."""
        return sum(job.n_waiting for job in self._jobs.values())

    async def encode(self, pixels: Pixels, *, param: str) -> EncodedImage:
        """The rows of an image.

        Raises `InvalidImage`, with `param` as the field at fault, for an image that the projector refuses,
        `NativeError` if the projector fails, `EngineClosed` if the engine closes, and for any other failure a
        `RunnerError` with the failure as its cause.
        """
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
                # The next request for this image starts a new encoding.
                self._forget(key, job)
        if isinstance(job.result, EncodedImage):
            return job.result
        raise _own_error(job.result, param)

    def close(self) -> None:
        """Cancel all encodings, and start no more."""
        self._closed = True
        for job in self._jobs.values():
            job.encoding.cancel()

    async def closed(self) -> None:
        """After `close`: wait until nothing computes any more."""
        async with self._limiter:
            pass

    async def _run(self, key: bytes, job: _Job) -> None:
        try:
            async with self._limiter:
                job.result = await self._threads.run(job.encoding.run)
            self.n_encoded += 1
            self._keep(key, job.result)
        except RunnerError as error:
            job.result = error
        except DeviceHangs:
            job.result = EngineClosed("the engine is shutting down")
        except Exception as failure:  # such as MemoryError, which is no reason to end the engine
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
    """A new exception for each request that waits, so that each raises an exception of its own."""
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
