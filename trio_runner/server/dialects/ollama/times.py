"""Times in Ollama's dialect: durations in nanoseconds, and moments as texts."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Final

SECOND: Final = 10**9
"""Nanoseconds of a second."""
NEVER: Final = "9999-12-31T23:59:59Z"
"""When a model expires that is never unloaded."""


class Stopwatch:
    """The times of one request. It starts when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter_ns()
        self.load_duration = 0
        """Nanoseconds that the request waited for the model to load."""

    def loaded(self) -> None:
        """The model is loaded."""
        self.load_duration = self.elapsed()

    def elapsed(self) -> int:
        """Nanoseconds since the start."""
        return time.perf_counter_ns() - self._start

    def now(self) -> str:
        """The time of day."""
        return timestamp(time.time_ns())


def timestamp(unix_ns: int) -> str:
    """A moment, in nanoseconds since 1970, as RFC 3339 has it: in UTC, with nine digits of the second."""
    seconds, rest = divmod(unix_ns, SECOND)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=4)  # the lines of a second have it in common
def _second(unix: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix))


def nanoseconds(seconds: float) -> int:
    """A duration as Ollama gives it."""
    return round(seconds * SECOND)
