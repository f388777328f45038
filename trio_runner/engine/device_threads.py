"""Threads that compute on a device, which may hang."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class DeviceHangs(Exception):
    """A thread did not end in time and was abandoned."""


class DeviceThreads:
    """Waits for threads that compute on a device, even under cancellation.

    Memory that a thread computes with may be freed only after the thread has ended. So the thread is waited for, even
    when everything around it is cancelled. The wait is bounded: a device that hangs must not keep the program from
    ending. A thread that was abandoned keeps what it refers to alive, and frees it should it ever come back. All on one
    trio thread.
    """

    def __init__(self) -> None:
        self._deadline = math.inf
        self._scopes: set[trio.CancelScope] = set()

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` on a thread of its own and return what it returns. Raises what it raises, and `DeviceHangs` if it
        does not end in time."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._scopes.add(scope)
            try:
                return await trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
            finally:
                self._scopes.discard(scope)
        raise DeviceHangs

    def wait_at_most(self, seconds: float) -> None:
        """Bound the wait for all threads, those that run and those to come: `seconds` from now. Only the first call
        counts."""
        self._deadline = min(self._deadline, trio.current_time() + seconds)
        for scope in self._scopes:
            scope.deadline = self._deadline
