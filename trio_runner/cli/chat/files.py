"""Files of a conversation: images to send, and conversations that are saved and loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import trio

from trio_runner.cli.chat.conversation import BadConversation, Message, from_json, image_url, to_json
from trio_runner.cli.chat.model import ChatError
from trio_runner.errors import InvalidImage
from trio_runner.image_source import MAX_IMAGE_BYTES

_MAX_CONVERSATION_BYTES: Final = 512 << 20


async def read_image(path: str) -> str:
    """The data URL of an image file. Raises `ChatError` for a file that is no image which models here take."""
    return await trio.to_thread.run_sync(_read_image, _expanded(path), abandon_on_cancel=True)


async def save(path: str, messages: Sequence[Message], *, overwrite: bool) -> None:
    """Write a conversation. Raises FileExistsError if there is such a file and `overwrite` is off, and `ChatError`.

    A file that is replaced is replaced as a whole, or not at all.
    """
    await trio.to_thread.run_sync(_save, _expanded(path), to_json(messages), overwrite)


async def load(path: str) -> list[Message]:
    """Read a conversation. Raises `ChatError`."""
    # A pipe or a device may never end, so the thread may have to be left alone.
    return await trio.to_thread.run_sync(_load, _expanded(path), abandon_on_cancel=True)


def _expanded(path: str) -> Path:
    return Path(path).expanduser()


def _read_image(path: Path) -> str:
    from trio_runner.image_formats import scan_image
    from trio_runner.images import load_pixels

    try:
        load_pixels(path, param=str(path))
        data = path.read_bytes()
    except InvalidImage as error:
        raise ChatError(str(error)) from error
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ChatError(f"{path} has changed while it was read")
    return image_url(data, f"image/{scan_image(data).format.lower()}")


def _save(path: Path, text: str, overwrite: bool) -> None:
    try:
        if not overwrite:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return
        _replace(path.resolve(), text)
    except FileExistsError:
        raise
    except OSError as error:
        raise ChatError(f"{path} cannot be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
        raise ChatError(f"{path} is not a regular file")
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            if path.exists():
                shutil.copymode(path, file.name)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _load(path: Path) -> list[Message]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONVERSATION_BYTES + 1)
        if len(data) > _MAX_CONVERSATION_BYTES:
            raise BadConversation(f"it has more than {_MAX_CONVERSATION_BYTES} bytes")
        return from_json(data.decode())
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror}") from error
    except (BadConversation, UnicodeDecodeError) as error:
        raise ChatError(f"{path} is no conversation: {error}") from error
