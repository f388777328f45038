"""Edits of the KV cache as values: decided here in core/, carried out by a context.

Positions are half-open, [start, end). An edit happens between two steps and takes effect at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Trim:
    """Forget positions [start, end) of `slot`; `end` None: all from `start` on. Later positions keep their numbers.

    The only edit that may fail: where `Capabilities.can_trim` is false, nothing short of the whole slot can go.
    """

    slot: int
    start: int
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Let `target`, which is empty, also hold positions [0, end) of `source`. Copies no data."""

    source: int
    target: int
    end: int


@dataclass(frozen=True, slots=True)
class Slide:
    """Renumber positions [start, end) of `slot` by `delta`, which is negative, into room that a Trim has made."""

    slot: int
    start: int
    end: int
    delta: int


MemoryOp: TypeAlias = Trim | Copy | Slide
