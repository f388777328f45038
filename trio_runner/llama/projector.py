"""Projector: turns images into rows that a model takes like tokens."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trio_runner.core.ports import EncodedImage, EncodedMedia
from trio_runner.core.prompt import Item, Media, MediaRow
from trio_runner.errors import EngineClosed, InvalidImage, LoadError
from trio_runner.llama.gguf import PROJECTOR_ARCHITECTURE, check_gguf
from trio_runner.llama.library import FLASH_ATTENTION, check, check_file, drain_log, last_error, native
from trio_runner.llama.mmproj import problem_of
from trio_runner.llama.model import LoadProgress, Model
from trio_runner.pixels import Pixels

_N_POSITIONS: Final = 4  # of a row, with M-RoPE
_DIGEST_BYTES: Final = 32


def check_projector(path: str) -> None:
    """Check the header of a projector's file. Raises `LoadError` unless mtmd can load the file safely."""
    header = check_gguf(path)
    if header.architecture != PROJECTOR_ARCHITECTURE:
        kind = header.metadata.get("general.type", "model")
        raise LoadError(f"this is a {kind} ({header.architecture}), not a projector (mmproj)", path=path)
    problem = problem_of(header)
    if problem is not None:
        raise LoadError(problem, path=path)


class Projector:
    """The projector in a file: `trio_runner.core.ports.Projector` over llama.cpp. Keeps its model alive.

    `max_rows` is the number of rows of a batch. If the rows of an image must share a batch, the projector scales the
    image down to about that many rows, if it can. It computes on the device with the number `device`; None means the
    CPU. Blocks while it loads, with the GIL released. Raises `LoadError`, or `EngineClosed` if `progress` was
    cancelled.
    """

    def __init__(
        self,
        model: Model,
        path: str,
        *,
        max_rows: int,
        threads: int = 1,
        device: int | None = None,
        flash_attention: str = "auto",
        progress: LoadProgress | None = None,
    ) -> None:
        check_projector(path)
        loaded = native()
        self.path = path
        self.max_rows = max_rows
        params = loaded.ffi.new(
            "trio_projector_params *",
            {
                "n_threads": threads,
                "device": -1 if device is None else device,
                "flash_attention": FLASH_ATTENTION[flash_attention],
                "max_rows": max_rows,
            },
        )
        out = loaded.ffi.new("trio_projector **")
        load = loaded.ffi.NULL if progress is None else progress.handle
        try:
            code = loaded.lib.trio_projector_open(model.handle, os.fsencode(path), params, load, out)
            check_file("trio_projector_open", code, path)
        finally:
            drain_log()
        # Freed with the last reference, so an encoding keeps it alive after close().
        self._handle: Any = loaded.ffi.gc(out[0], loaded.lib.trio_projector_free)
        info = loaded.ffi.new("trio_projector_info *")
        check("trio_projector_get_info", loaded.lib.trio_projector_get_info(self._handle, info))
        self.n_embd = int(info.n_embd)
        self.has_mrope = bool(info.mrope)
        if (info.mrope or info.non_causal) and info.max_rows > max_rows:
            raise LoadError(_too_many_rows(info.max_rows, max_rows), path=path)
        self._digest = _file_digest(path, max_rows)

    @property
    def digest(self) -> bytes:
        """A digest of the file and of `max_rows`: rows of an image depend on both, besides its pixels."""
        return self._digest

    @property
    def handle(self) -> Any:
        """The shim's trio_projector. Raises `EngineClosed` after close()."""
        if self._handle is None:
            raise EngineClosed("the projector has been closed")
        return self._handle

    def encoding(self, pixels: Pixels) -> Encoding:
        """Prepare to encode one image; `Encoding.run` does so. Raises `EngineClosed` after close()."""
        return Encoding(self, pixels)

    def close(self) -> None:
        """Release the projector. Its memory is freed when its encodings have ended. May be called more than once."""
        self._handle = None


class Encoding:
    """The encoding of one image. `run` is called once, `cancel` any number of times."""

    def __init__(self, projector: Projector, pixels: Pixels) -> None:
        loaded = native()
        self._ffi, self._lib = loaded.ffi, loaded.lib
        self._projector = projector
        self._handle = projector.handle
        self._pixels = pixels
        self._media: Any = None
        self._cancelled = False

    def run(self) -> EncodedImage:
        """Encode the image and return its rows.

        Blocks, with the GIL released. The projector encodes one image at a time; others wait. Raises `InvalidImage` for
        an image that the projector cannot take, and `EngineClosed` soon after `cancel` was called.
        """
        pixels, ffi = self._pixels, self._ffi
        self._raise_if_cancelled()
        out = ffi.new("trio_media **")
        data = ffi.from_buffer("uint8_t[]", pixels.data)
        code = self._lib.trio_media_open(self._handle, data, len(pixels.data), pixels.width, pixels.height, out)
        if code == self._lib.TRIO_E_INVALID:
            message = last_error()
            drain_log(at_most=logging.DEBUG)  # the client's error, not ours
            raise InvalidImage(message)
        check("trio_media_open", code)
        self._media = ffi.gc(out[0], self._lib.trio_media_free)
        try:
            self._raise_if_cancelled()  # a cancel() before this moment did not know the media yet
            return self._encode_all()
        finally:
            self._media = None  # freed with the last reference

    def _encode_all(self) -> EncodedImage:
        items: list[Item] = []
        encoded: dict[Media, EncodedMedia] = {}
        info = self._ffi.new("trio_chunk_info *")
        for index in range(check("trio_media_count", self._lib.trio_media_count(self._media))):
            check("trio_media_get_chunk", self._lib.trio_media_get_chunk(self._media, index, info))
            if info.is_text:
                items += self._integers("trio_media_tokens", index, info.n_rows).tolist()
                continue
            media, rows = self._encode(index, info)
            encoded[media] = rows
            items += [MediaRow(media, row) for row in range(media.n_rows)]
        return EncodedImage(tuple(items), encoded)

    def _encode(self, index: int, info: Any) -> tuple[Media, EncodedMedia]:
        projector = self._projector
        n_rows, n_positions = int(info.n_rows), int(info.n_positions)
        positions: NDArray[np.int32] | None = None
        shares_positions = False
        if projector.has_mrope:
            positions = self._integers("trio_media_positions", index, _N_POSITIONS * n_rows).reshape(-1, n_rows)
            shares_positions = bool(positions[0, -1] == positions[0, 0]) and n_rows > 1
        key = hashlib.blake2b(self._pixels.digest, digest_size=_DIGEST_BYTES)
        key.update(projector.digest + index.to_bytes(4, "little"))
        media = Media(key.digest(), n_rows, n_positions, causal=not info.non_causal, shares_positions=shares_positions)
        if media.whole and n_rows > projector.max_rows:
            raise InvalidImage(_too_many_rows(n_rows, projector.max_rows))
        rows: NDArray[np.float32] = np.empty((n_rows, projector.n_embd), np.float32)
        buffer = self._ffi.from_buffer("float[]", rows)
        code = self._lib.trio_media_encode(self._media, index, buffer, rows.size)
        check("trio_media_encode", code)
        return media, EncodedMedia(rows, positions)

    def _integers(self, function: str, index: int, n: int) -> NDArray[np.int32]:
        values: NDArray[np.int32] = np.empty(n, np.int32)
        buffer = self._ffi.from_buffer("int32_t[]", values)
        check(function, getattr(self._lib, function)(self._media, index, buffer, n))
        return values

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise EngineClosed("encoding was cancelled")

    def cancel(self) -> None:
        """Make `run`, now or later, raise `EngineClosed` soon. May be called from any thread; never blocks."""
        self._cancelled = True
        media = self._media  # a reference of our own: run() may end at the same time
        if media is not None:
            self._lib.trio_media_cancel(media)


def _too_many_rows(n_rows: int, max_rows: int) -> str:
    return f"the image has {n_rows} rows, which must be in one batch, but --batch-size is {max_rows}"


def _file_digest(path: str, max_rows: int) -> bytes:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    except OSError as failure:
        raise LoadError(f"cannot be read: {failure}", path=path) from failure
    digest.update(max_rows.to_bytes(4, "little"))
    return digest.digest()
