"""Waiting for threads that compute on a device, which may hang."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class GaveUp(Exception):
    """A thread was left to itself."""


class Patience:
    """What a thread computes with may only be freed when it is done, so it is waited for, also when everything around
    is cancelled. But not for ever: a device that hangs would keep the program from ending. One that was given up keeps
    alive what it refers to, and frees it should it come back. All on one trio thread."""

    def __init__(self) -> None:
        self._deadline = math.inf
        self._scopes: set[trio.CancelScope] = set()

    async def run(self, call: Callable[[], T]) -> T:
        """`call` on a thread. Raises what it raises, and `GaveUp`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._scopes.add(scope)
            try:
                return await trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
            finally:
                self._scopes.discard(scope)
        raise GaveUp

    def end(self, seconds: float) -> None:
        """Wait so much longer, and no more. The first call counts."""
        self._deadline = min(self._deadline, trio.current_time() + seconds)
        for scope in self._scopes:
            scope.deadline = self._deadline
