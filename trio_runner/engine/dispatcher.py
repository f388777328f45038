"""The requests in flight, by uid: what their readers tell the decode thread, and what it tells them.

Generations and embeddings use the dispatcher, users do not. All of it is on the trio thread. The decode thread reaches
it through `receiver`, in one idempotent `run_sync_soon` per step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import trio

from trio_runner.core.scheduler import Emission
from trio_runner.core.sequence import FirstToken
from trio_runner.engine.adapters import AdapterTable
from trio_runner.engine.admission import Admission, Queue
from trio_runner.engine.deadlines import Deadlines
from trio_runner.engine.mailbox import Cancel, Expire, Mailbox, Pause, Resume, Submit
from trio_runner.engine.prepare import Preparation, close_sampler
from trio_runner.engine.requests import AnyRequest
from trio_runner.engine.state import EngineState
from trio_runner.errors import ReaderStalled, RunnerError
from trio_runner.events import Embedded, Event, Finished, Usage
from trio_runner.info import RequestStatistics
from trio_runner.request import GenerateRequest


class Reader(Protocol):
    """What reads the events of one request. It is called on the trio thread, and may neither raise nor wait."""

    def deliver(self, event: Event | Embedded) -> None:
        """Take the next event."""

    def fail(self, error: Exception) -> None:
        """Take the error that ends the request. Nothing is delivered after it."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A request that the decode thread knows."""

    reader: Reader
    queue: Queue
    decode_seconds: float | None = None
    """Seconds from its first token after which it ends."""


class Dispatcher:
    """Submits requests, cancels them, and delivers their events."""

    def __init__(
        self,
        state: EngineState,
        mailbox: Mailbox,
        admission: Admission,
        adapters: AdapterTable,
        preparation: Preparation,
    ) -> None:
        self.stall_deadlines = Deadlines(self._end_stalled)
        """When the readers of paused generations must have read something."""
        self.request_deadlines = Deadlines(self._expire)
        """When requests with a deadline of their own end, or with a limit of the time after their first token."""
        self.n_preparing = 0
        """Requests that were admitted, and that the decode thread does not know yet."""
        self._n_cancelled_preparing = 0
        self._ended: Counter[str] = Counter()  # generations that ended without the decode thread, by reason
        self._state = state
        self._mailbox = mailbox
        self._admission = admission
        self._adapters = adapters
        self._preparation = preparation
        self._uids = itertools.count(1)
        self._in_flight: dict[int, _InFlight] = {}
        self._emissions: deque[Emission] = deque()

    @property
    def n_in_flight(self) -> int:
        """Requests that the decode thread knows, or whose last events it has not handed over yet."""
        return len(self._in_flight)

    def statistics(self) -> RequestStatistics:
        """How requests ended and how long they took."""
        return self._state.times.statistics(
            n_refused=self._admission.n_refused, n_cancelled_preparing=self._n_cancelled_preparing, ended=self._ended
        )

    # -- for generations and embeddings -------------------------------------------------------------------------------

    @property
    def max_backlog(self) -> int:
        """Unread events after which a generation is to be paused."""
        return self._state.config.max_backlog

    async def submit(self, reader: Reader, request: AnyRequest) -> int:
        """Prepare the sequence of a request and send it to the decode thread. Returns its uid.

        A deadline that passes before that ends the request here. Raises `EngineBusy` if the queue is full, and what
        `Preparation.prepare` raises.
        """
        arrived = perf_counter()
        uid = next(self._uids)
        deadline = math.inf
        if isinstance(request, GenerateRequest) and request.deadline is not None:
            deadline = trio.current_time() + request.deadline
        queue = self._admission.admit(request)
        self.n_preparing += 1
        try:
            mail: Submit | None = None
            with trio.CancelScope(deadline=deadline):
                await self._state.wait_ready()
                self._adapters.choose(request.adapters)
                mail = await self._preparation.prepare(request, uid)
            # No checkpoint from here to the return: a sequence that was submitted has a reader that knows its uid.
            if mail is None or deadline <= trio.current_time():
                close_sampler(mail)
                self._ended["deadline"] += 1
                reader.deliver(Finished("deadline", Usage()))
                self._admission.leave(queue)
                return uid
            try:
                self._state.live_runtime()
                chosen, adapters = self._adapters.choose(request.adapters)
            except RunnerError:
                close_sampler(mail)
                raise
        except BaseException as error:
            self._admission.leave(queue)
            if isinstance(error, trio.Cancelled):
                self._n_cancelled_preparing += 1
                self._ended["abort"] += queue == "generation"
            raise
        finally:
            self.n_preparing -= 1
        decode_seconds = request.decode_seconds if isinstance(request, GenerateRequest) else None
        self._in_flight[uid] = _InFlight(reader, queue, decode_seconds)
        spec = replace(mail.spec, adapters=chosen)
        self._mailbox.put(replace(mail, spec=spec, adapters=adapters, arrived=arrived, submitted=perf_counter()))
        if deadline < math.inf:
            self.request_deadlines.set(uid, deadline)
        return uid

    def cancel(self, uid: int, error: Exception | None = None) -> None:
        """Cancel a sequence. With `error`, its reader is told. A uid that has ended is ignored."""
        request = self._in_flight.pop(uid, None)
        if request is None:
            return
        self._forget(uid, request)
        self._tell(Cancel(uid))
        if error is not None:
            request.reader.fail(error)

    def pause(self, uid: int) -> None:
        """Give a sequence no more rows until `resume`: its reader is behind. It must read before the stall timeout."""
        self._mailbox.put(Pause(uid))
        self.extend_stall_deadline(uid)

    def extend_stall_deadline(self, uid: int) -> None:
        """Give the reader of a paused sequence the whole stall timeout again: it has read something."""
        self.stall_deadlines.set(uid, trio.current_time() + self._state.config.stall_timeout)

    def resume(self, uid: int) -> None:
        """Give a sequence rows again: its reader has caught up."""
        self.stall_deadlines.clear(uid)
        self._mailbox.put(Resume(uid))

    # -- for the lifecycle --------------------------------------------------------------------------------------------

    def receiver(self, token: trio.lowlevel.TrioToken) -> Callable[[list[Emission]], None]:
        """What the decode thread calls with the events of a step. It neither blocks nor raises."""

        def receive(emissions: list[Emission]) -> None:
            self._emissions.extend(emissions)
            token.run_sync_soon(self.hand_over, idempotent=True)

        return receive

    def hand_over(self) -> None:
        """Deliver the events that have arrived from the decode thread."""
        # This runs in trio's entry queue, where an exception would crash trio itself.
        while self._emissions:
            uid, event = self._emissions.popleft()
            request = self._in_flight.get(uid)
            if request is None:
                continue
            if isinstance(event, FirstToken):
                self._limit_decoding(uid, request.decode_seconds)
                continue
            if isinstance(event, (Finished, Embedded)):
                del self._in_flight[uid]
                self._forget(uid, request)
                if isinstance(event, Embedded) or event.error is None:
                    self._admission.learn(request.queue, event.usage)
            request.reader.deliver(event)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """End all requests, each with an error of its own. The decode thread has ended already."""
        while self._in_flight:
            uid, request = self._in_flight.popitem()
            self._forget(uid, request)
            self._ended["error"] += request.queue == "generation"
            request.reader.fail(make_error())

    def cancel_all(self, make_error: Callable[[], Exception]) -> None:
        """End all requests, each with an error of its own, and tell the decode thread."""
        for uid in list(self._in_flight):
            self.cancel(uid, make_error())

    # -----------------------------------------------------------------------------------------------------------------

    def _end_stalled(self, uid: int) -> None:
        self.cancel(uid, ReaderStalled(f"nothing was read for {self._state.config.stall_timeout:g} seconds"))

    def _limit_decoding(self, uid: int, seconds: float | None) -> None:
        moment = trio.current_time() + (math.inf if seconds is None else seconds)
        self.request_deadlines.set(uid, min(moment, self.request_deadlines.moments.get(uid, math.inf)))

    def _expire(self, uid: int) -> None:
        self._tell(Expire(uid))

    def _tell(self, mail: Cancel | Expire) -> None:
        """Tell the decode thread that a sequence ends, and abort the running batch if that is worth it."""
        self._mailbox.put(mail)
        if self._state.loop is not None:
            self._state.loop.abort_for(mail.uid)

    def _forget(self, uid: int, request: _InFlight) -> None:
        self.stall_deadlines.clear(uid)
        self.request_deadlines.clear(uid)
        self._admission.leave(request.queue)
