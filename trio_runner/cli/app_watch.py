"""Ends the server together with the app that started it, however that ends: it may have been killed.

Each watcher is a thread. So it watches from the first moment, while the model is still being fetched, and even if the
event loop hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_SECONDS = 2.0
"""Seconds in which the server may end in good order after its app has ended. Then the process just ends."""
POLL_SECONDS = 0.5
"""Seconds between two looks at a process, where the system does not tell when it ends."""


class AppWatch:
    """Notices that the app has ended. It gives the rest of this process `EXIT_SECONDS` to end, and then ends it."""

    def __init__(self, *, pid: int | None = None, stdin: bool = False) -> None:
        """Begin to watch: the process `pid`, and with `stdin` also for the end of what the app writes to our stdin."""
        self._has_ended = threading.Event()
        if pid is not None:
            self._start(waiter_for_process(pid), f"process {pid} is gone")
        if stdin:
            self._start(_wait_for_end_of_stdin, "stdin has ended")

    async def wait(self) -> None:
        """Wait until the app has ended."""
        import trio  # only here, because `--help` must be quick

        await trio.to_thread.run_sync(self._has_ended.wait, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))

    def _start(self, wait: Callable[[], object], reason: str) -> None:
        def watch() -> None:
            wait()
            # First of all, because the log may lead into a pipe that is full.
            exit = threading.Timer(EXIT_SECONDS, os._exit, (0,))
            exit.daemon = True
            exit.start()
            logger.warning("%s: stopping at once", reason)
            self._has_ended.set()

        threading.Thread(target=watch, name="app-watch", daemon=True).start()


def waiter_for_process(pid: int) -> Callable[[], object]:
    """A function that blocks until the process that has this number now is gone. It does not take a later process with
    the same number for it. A process that has ended counts as gone, even if its parent has not asked for its exit
    code."""
    try:
        if sys.platform == "linux" and hasattr(os, "pidfd_open"):
            ended = select.poll()
            ended.register(os.pidfd_open(pid), select.POLLIN)
            return ended.poll
        if sys.platform == "darwin":
            events = select.kqueue()
            exit_of = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            events.control([exit_of], 0)
            return lambda: events.control(None, 1)
    except ProcessLookupError:
        return lambda: None
    except OSError:
        pass  # such as an old kernel, or one in a sandbox
    found = identity(pid)

    def poll() -> None:
        while found is not None and identity(pid) == found:
            time.sleep(POLL_SECONDS)

    return poll


def identity(pid: int) -> bytes | None:
    """What tells the process with this number from a later one with the same number: when it began, or nothing where
    the system does not say. None if it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is another user's
    try:
        # The name of the program comes second, in brackets, and may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return b""
    state, began = fields[0], fields[19]
    return None if state in (b"Z", b"X") else began


def _wait_for_end_of_stdin() -> None:
    if sys.stdin is None:
        return  # it was closed at the start, and its number may stand for something else now
    with contextlib.suppress(OSError):  # such as of a terminal that is gone
        while True:
            select.select([0], [], [])  # whoever gave it to us may have made it non-blocking
            with contextlib.suppress(BlockingIOError):
                if not os.read(0, 1 << 16):
                    return
