"""Text on its way to stdout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from trio_runner.cli.terminal import TextOutput


async def test_text_reaches_a_slow_pipe_whole() -> None:
    read_end, write_end = os.pipe()
    text = "äöü" * 50_000
    received = b""
    with trio.fail_after(10):
        async with trio.lowlevel.FdStream(read_end) as reader, trio.open_nursery() as nursery:

            async def write() -> None:
                await TextOutput(write_end).write(text)
                os.close(write_end)

            nursery.start_soon(write)
            async for data in reader:
                received += data
    assert received.decode() == text


async def test_text_reaches_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb") as file:
        output = TextOutput(file.fileno())
        await output.write("one ")
        await output.write("")
        await output.write("twö")
    assert path.read_text(encoding="utf-8") == "one twö"


async def test_writing_to_a_full_pipe_can_be_cancelled() -> None:
    read_end, write_end = os.pipe()
    try:
        with trio.move_on_after(0.05) as scope:
            await TextOutput(write_end).write("x" * 1_000_000)
        assert scope.cancelled_caught
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_a_closed_pipe_raises_broken_pipe_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with trio.fail_after(5), pytest.raises(BrokenPipeError):
            await TextOutput(write_end).write("x")
    finally:
        os.close(write_end)
