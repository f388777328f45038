"""Helper threads: they tokenise, compile samplers and load adapters, beside the event loop and the decode thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeAlias, TypeVar

import trio

from trio_runner.engine.state import EngineState

T = TypeVar("T")

MAX_HELPERS = 2
"""Short calls that run at the same time. More would only take cores from the decode thread."""
LONG_TEXT = 1 << 16
"""Characters of a text that takes a tenth of a second or more to tokenise."""

CallKind: TypeAlias = Literal["short", "long", "sampler"]
"""What a call waits for its turn with. "sampler" is the kind of a call that makes a sampler and takes long for it."""


def kind_for(n_text: int) -> CallKind:
    """The kind of a call that reads so many characters or tokens."""
    return "long" if n_text >= LONG_TEXT else "short"


class HelperThreads:
    """Runs calls that use the model. Short calls share `MAX_HELPERS` threads. Each other kind has one thread, so that
    a short call never waits for a long one, and a sampler never for a long text. All on one trio thread."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._limiters: dict[CallKind, trio.CapacityLimiter] = {
            "short": trio.CapacityLimiter(MAX_HELPERS),
            "long": trio.CapacityLimiter(1),
            "sampler": trio.CapacityLimiter(1),
        }

    async def run(self, call: Callable[[], T], kind: CallKind, *, discard: Callable[[T], None] = lambda _: None) -> T:
        """Run `call` on a helper thread and return what it returns. It waits for other calls of its `kind`.

        When the caller is cancelled, this returns at once. The call still runs to its end, the model is kept for it,
        and its result goes to `discard`. Raises what the call raises, and what `EngineState.live_runtime` raises if the
        engine ends before the call starts.
        """
        results: list[T] = []
        is_abandoned = False

        def work() -> None:
            self._state.live_runtime()  # the engine may have ended while this call waited for a thread
            results.append(call())
            if is_abandoned:
                drop()

        def drop() -> None:
            with suppress(IndexError):  # both threads may get here
                discard(results.pop())

        try:
            await trio.to_thread.run_sync(work, limiter=self._limiters[kind], abandon_on_cancel=True)
        except trio.Cancelled:
            is_abandoned = True
            drop()
            raise
        return results.pop()

    async def wait_until_idle(self) -> None:
        """Wait until no call runs, and let no further call start. Calls that were abandoned count too."""
        for limiter in self._limiters.values():
            for _ in range(int(limiter.total_tokens)):
                await limiter.acquire_on_behalf_of(object())
