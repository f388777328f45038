"""Edits of the KV cache as values: core/ decides them, and a context carries them out.

Positions are half-open, [start, end). An edit happens between two steps and takes effect at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Trim:
    """Forget positions [start, end) of `slot`, or all from `start` on if `end` is None. Later positions keep their
    numbers.

    The only edit that may fail: where `Capabilities.can_trim` is false, only the whole slot can be forgotten.
    """

    slot: int
    start: int
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Let the empty slot `target` also hold positions [0, end) of the slot `source`. Copies no data."""

    source: int
    target: int
    end: int


@dataclass(frozen=True, slots=True)
class Slide:
    """Add the negative `delta` to positions [start, end) of `slot`, which moves them into room that a Trim made."""

    slot: int
    start: int
    end: int
    delta: int


MemoryOp: TypeAlias = Trim | Copy | Slide
