"""What the trio thread tells the decode thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

from trio_runner.core.ports import Adapter, EncodedMedia, Sampler
from trio_runner.core.prompt import Media
from trio_runner.core.sequence import SequenceSpec


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this sequence. From now on `sampler`, which is None for embeddings, belongs to the decode thread.

    `media` and `adapters` hold the images and adapters that the sequence names.
    """

    spec: SequenceSpec
    sampler: Sampler | None
    media: Mapping[Media, EncodedMedia] = field(default_factory=dict)
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    arrived: float = field(default_factory=perf_counter, compare=False)
    """When the request was asked for, in seconds of `perf_counter`."""
    submitted: float = field(default_factory=perf_counter, compare=False)
    """When it was prepared."""


@dataclass(frozen=True, slots=True)
class Retire:
    """No sequence submitted after this mail has this adapter. Close it when the last sequence that has it has ended."""

    uid: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel this sequence, without another event."""

    uid: int
    closed: float = field(default_factory=perf_counter, compare=False)
    """When its reader closed it, in seconds of `perf_counter`."""


@dataclass(frozen=True, slots=True)
class Expire:
    """The deadline of this sequence has passed: end it with the text it has."""

    uid: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Give this sequence no more rows: its reader is behind."""

    uid: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Give this sequence rows again: its reader has caught up."""

    uid: int


@dataclass(frozen=True, slots=True)
class Close:
    """End the decode loop, whatever is running."""


Mail: TypeAlias = Submit | Retire | Cancel | Expire | Pause | Resume | Close


class Mailbox:
    """A queue with many writers, which never block, and one reader, which may.

    `queue.SimpleQueue` is not enough: the reader takes all mail at once, and looks for mail without taking it.
    Appending to a deque is atomic. The semaphore only wakes the reader.
    """

    def __init__(self) -> None:
        self._mail: deque[Mail] = deque()
        self._arrived = threading.Semaphore(0)

    def __bool__(self) -> bool:
        """Whether there is mail."""
        return bool(self._mail)

    def put(self, mail: Mail) -> None:
        """Add mail. Never blocks. From any thread."""
        self._mail.append(mail)
        self._arrived.release()

    def take(self, *, wait: bool = False) -> list[Mail]:
        """Take all mail, in the order in which it came. With `wait`, block until there is some."""
        while wait and not self._mail:
            self._arrived.acquire()
        taken = []
        while self._mail:
            taken.append(self._mail.popleft())
        # A wake-up without mail only costs a look into an empty deque, but wake-ups must not pile up.
        while not self._mail and self._arrived.acquire(blocking=False):
            pass
        return taken
