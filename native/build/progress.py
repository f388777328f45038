"""What the build shows: messages, a progress line, and the part of a failed command's output that says why."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from native.build.config import BuildError


def say(text: str) -> None:
    print(f"build_llama: {text}", file=sys.stderr, flush=True)


class Progress:
    """A line about a running command: rewritten in place on a terminal, and a new one every ten seconds elsewhere."""

    def __init__(self, label: str, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._label = label
        self._text = ""
        self._started = time.monotonic()
        self._shown = self._started

    def update(self, text: str) -> None:
        self._text = text

    def tick(self) -> None:
        """Show the latest text. To be called about once a second."""
        now = time.monotonic()
        if self._terminal:
            line = self._line(now)[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        elif now - self._shown >= 10:
            self._shown = now
            print(self._line(now), file=self._stream, flush=True)

    def finish(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
        print(self._line(time.monotonic()), file=self._stream, flush=True)

    def _line(self, now: float) -> str:
        minutes, seconds = divmod(int(now - self._started), 60)
        return f"build_llama: {self._label} {minutes}:{seconds:02d} {self._text}".rstrip()


NINJA_STATUS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
PIP_STATUS = re.compile(r"Progress (\d+) of (\d+)")


def _read(output: IO[str], log: IO[str], lines: list[str], progress: Progress) -> None:
    """Copies a command's output to the log and to `lines`, and its state to the progress line."""
    for line in output:
        if status := PIP_STATUS.match(line):  # hundreds of them, so not for the log
            done, total = int(status[1]), int(status[2])
            progress.update(f"{100 * done // max(total, 1):3d} % of {total / 1e6:.0f} MB")
            continue
        log.write(line)
        lines.append(line)
        if status := NINJA_STATUS.match(line):
            done, total, what = int(status[1]), int(status[2]), status[3]
            progress.update(f"{100 * done // total:3d} % [{done}/{total}] {what.rpartition('/')[2]}")


def run(command: Sequence[str], log: Path, progress: Progress, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command with its output in the log and its state in the progress line. Returns exit status and output."""
    lines: list[str] = []
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None
        with process.stdout as output:
            reader = threading.Thread(target=_read, args=(output, file, lines, progress))
            reader.start()
            try:
                while reader.is_alive():
                    reader.join(1)
                    progress.tick()
                return process.wait(), "".join(lines)
            finally:
                if process.poll() is None:
                    process.terminate()
                process.wait()
                reader.join()
                progress.finish()


def explain(what: str, output: str, log: Path) -> BuildError:
    """The error to raise after a compiler or CMake failed: the lines that say why, and where the rest is."""
    if "No space left on device" in output:
        return BuildError(f"no disk space left while {what}: make room, or set TRIO_RUNNER_CACHE to a place with more")
    if re.search(r"Killed signal|out of memory|memory exhausted|cannot allocate memory", output, re.IGNORECASE):
        return BuildError(f"out of memory while {what}; try again with CMAKE_BUILD_PARALLEL_LEVEL=1")
    lines = output.splitlines()
    errors = [n for n, line in enumerate(lines) if re.search(r"error:|CMake Error|undefined reference", line)]
    shown = lines[errors[0] : errors[0] + 15] if errors else lines[-15:]
    return BuildError("\n  ".join([f"failed while {what}; the whole log is {log}", *shown]))
