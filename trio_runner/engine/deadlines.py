"""Deadlines by uid, and the task that acts when one passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import trio


class Deadlines:
    """Calls `passed(uid)` once for each deadline that passes before it is cleared. All on one trio thread; only `watch`
    waits."""

    def __init__(self, passed: Callable[[int], None]) -> None:
        self._passed = passed
        self.moments: dict[int, float] = {}
        """The deadlines that are set, in trio's time. Only to be read."""
        self._sleep = trio.CancelScope()

    def set(self, uid: int, moment: float) -> None:
        """Set the deadline of `uid`, in trio's time, in place of the one it has."""
        self.moments[uid] = moment
        # A later deadline needs no alarm of its own: `watch` looks again when the earlier moment comes.
        self._sleep.deadline = min(self._sleep.deadline, moment)

    def clear(self, uid: int) -> None:
        """Remove the deadline of `uid`, if it has one."""
        self.moments.pop(uid, None)

    async def watch(self) -> NoReturn:
        """Wait for deadlines, until cancelled."""
        while True:
            with trio.CancelScope(deadline=min(self.moments.values(), default=math.inf)) as self._sleep:
                await trio.sleep_forever()
            for uid, moment in list(self.moments.items()):
                if moment <= trio.current_time():
                    del self.moments[uid]
                    self._passed(uid)
