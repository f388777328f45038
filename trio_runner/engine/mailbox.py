"""What the trio thread tells the decode thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from trio_runner.core.ports import Adapter, EncodedMedia, Sampler
from trio_runner.core.prompt import Media
from trio_runner.core.sequence import SequenceSpec


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this sequence; `sampler`, None for embeddings, belongs to the decode thread from now on. `media` and
    `adapters` are what the sequence names."""

    spec: SequenceSpec
    sampler: Sampler | None
    media: Mapping[Media, EncodedMedia] = field(default_factory=dict)
    adapters: Mapping[int, Adapter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Retire:
    """No sequence that comes after this mail has this adapter: close it when the last of those before it has ended."""

    uid: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget this sequence."""

    uid: int


@dataclass(frozen=True, slots=True)
class Expire:
    """Its deadline has passed: end this sequence with what it has."""

    uid: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Its reader has fallen behind: no more rows for this sequence."""

    uid: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Its reader has caught up."""

    uid: int


@dataclass(frozen=True, slots=True)
class Close:
    """Stop, whatever is running."""


Mail: TypeAlias = Submit | Retire | Cancel | Expire | Pause | Resume | Close


class Mailbox:
    """Many writers that never block, one reader that may.

    Not `queue.SimpleQueue`: the reader wants all there is at once, and to know without taking it whether something is
    there. Appending to a deque is atomic; the semaphore only wakes the reader up.
    """

    def __init__(self) -> None:
        self._mail: deque[Mail] = deque()
        self._arrived = threading.Semaphore(0)

    def __bool__(self) -> bool:
        return bool(self._mail)

    def put(self, mail: Mail) -> None:
        """Never blocks, from any thread."""
        self._mail.append(mail)
        self._arrived.release()

    def take(self, *, wait: bool = False) -> list[Mail]:
        """All mail in the order it came; with `wait`, at least one."""
        while wait and not self._mail:
            self._arrived.acquire()
        taken = []
        while self._mail:
            taken.append(self._mail.popleft())
        # Leftover wake-ups only cost a look into an empty deque, but they must not pile up.
        while not self._mail and self._arrived.acquire(blocking=False):
            pass
        return taken
