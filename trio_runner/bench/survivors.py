"""Streams beside clients that come and go: whether each is told the same, to the last bit, as on an idle server.

Every stream is greedy and asks for log-probabilities. What it is told is compared with what the same prompt gets alone,
on a server that has just been started or, if that cannot be, on one that has forgotten all prompts. Each number is
compared as it stands in the JSON, so that equal numbers are equal bits of the server's.

Beside the streams, clients are cancelled in their prompts and while they decode; prompts begin alike, so that they are
found in the cache or copied; there are more streams than slots, and on a server of ours one of them is a background
request, which is preempted again and again, and one client stops reading until it is paused.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from trio_runner.bench.client import Stream
from trio_runner.bench.dialects import Choice, Request
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.leaving import SMALL_BUFFER, leaving_requests
from trio_runner.bench.scenarios import N_SHORT, Turn
from trio_runner.bench.server import Server, watching

N_QUEUED: Final = 3
"""Clients that disconnect beside survivors, in addition to those that have a slot."""
IN_SLOT: Final = 0.8
"""Share of them that do not leave before they have a slot."""
N_TOP: Final = 3
"""Most probable tokens that are compared at each place, besides the token itself."""
N_LATE_TOP: Final = 20
"""The same for the client that reads late: with more of them, its tokens fill the buffers on their way to it sooner."""
N_BEGINNING: Final = 4 * N_SHORT
"""Tokens that the prompts of all streams begin with, and those of some clients that leave."""
LATE_SECONDS: Final = 20.0
"""Seconds after which the client that reads late reads on, even if it was not paused. A server of ours disconnects one
that has taken nothing for 30 seconds."""
LOOK_SECONDS: Final = 0.1
"""Seconds between two looks at whether it is paused."""
COUNTED: Final = {
    "preempted_total": "preemptions",
    "batch_aborted_total": "batches aborted",
    "prefix_cache_hits_total": "tokens found in the prompt cache",
}
"""What servers of ours count meanwhile, and what the report calls it."""


@dataclass(frozen=True, slots=True)
class _Survivor:
    """A request, and what it is told alone."""

    request: Request
    alone: Stream
    late: bool = False
    """Its client reads nothing until it is paused."""


@dataclass(frozen=True, slots=True)
class _Difference:
    """Where a stream parts from what it is told alone."""

    place: int
    """The first token that is not the same in every bit."""
    nats: float
    """The greatest difference of two log-probabilities, up to the first token that is another one."""
    in_text: bool
    """Whether a token is another one."""


async def survivors(turn: Turn) -> Measured:
    """Greedy streams beside clients that connect and disconnect: whether each is told the same bits as alone."""
    measured, server = Measured(), turn.server
    beginning = await turn.prompts.make(N_BEGINNING)
    requests = await _requests(turn, measured, beginning)
    pool, delay = await leaving_requests(turn)
    pool += [await _request(turn, beginning, n, turn.load.endless) for n in (1, N_SHORT)]
    alone = [await _alone(turn, measured, request) for request in requests]
    await server.quiet()
    told = [_Survivor(request, stream) for request, stream in zip(requests, alone, strict=True)]
    if server.is_ours and server.slots > 2:
        told[0] = replace(told[0], late=True)
    before = await server.counted()
    company = _Company(turn, told, pool, delay)
    await company.run(measured)
    for name, n in (await server.counted()).items():
        if name in COUNTED:
            measured.add(Metric(COUNTED[name], ""), n - before[name])
    _compare(measured, company.answers)
    return measured


async def _requests(turn: Turn, measured: Measured, beginning: str) -> list[Request]:
    """The requests of the streams; that of the late client, if there is one, comes first. Notes what this server has
    none of. Raises `Unavailable` without a slot to spare."""
    server, n_tokens = turn.server, turn.load.tokens
    lengths = [N_SHORT * (1 + number) for number in range(max(turn.beside(1) - 1, 1))]
    requests = [await _request(turn, beginning, n_more, n_tokens) for n_more in lengths]
    if server.dialect.max_answers > 1:
        requests.append(replace(await _request(turn, beginning, N_SHORT, n_tokens), n_answers=2))
    else:
        measured.note("no request for several answers: this dialect has none")
    if server.is_ours:
        requests.append(replace(await _request(turn, beginning, 2 * N_SHORT, n_tokens), background=True))
        if server.slots > 2:
            late = await _request(turn, beginning, 3 * N_SHORT, turn.load.late)
            requests.insert(0, replace(late, n_top=N_LATE_TOP))
    else:
        measured.note("nobody is preempted or paused on purpose: only servers of ours can be asked for that")
    return requests


async def _request(turn: Turn, beginning: str, n_more: int, max_tokens: int) -> Request:
    """A request whose prompt is `beginning`, which has `N_BEGINNING` tokens, and `n_more` tokens."""
    prompt = await turn.prompts.make(N_BEGINNING + n_more, prefix=beginning)
    return Request(prompt=prompt, max_tokens=max_tokens, reuse=True, n_top=N_TOP)


async def _alone(turn: Turn, measured: Measured, request: Request) -> Stream:
    """What the request is told on an idle server that knows no prompt."""
    request = replace(request, reuse=False, n_answers=1, background=False)
    if turn.server.fresh is not None:
        measured.note("each run alone is the first one of a server that was started for it")
        async with turn.server.fresh() as server:
            return await server.complete(request)
    measured.note(
        f"the runs alone are on the same server, after every slot was given another prompt of {N_SHORT} tokens"
    )
    await _forget(turn)
    return await turn.server.complete(request)


async def _forget(turn: Turn) -> None:
    """Give every slot another prompt, so that the server forgets those before; twice, as some have spare slots."""
    server = turn.server
    for _ in range(2):
        requests = [await turn.request(N_SHORT, turn.load.endless) for _ in range(server.slots)]
        n_begun = 0
        async with trio.open_nursery() as nursery:

            async def begin(request: Request) -> None:
                nonlocal n_begun
                async with server.requesting(request) as stream:
                    await stream.step()  # the head, after which it has a slot
                    await stream.step()
                    n_begun += 1
                    if n_begun == server.slots:
                        nursery.cancel_scope.cancel()
                    await stream.finish()

            for request in requests:
                nursery.start_soon(begin, request)
        await server.quiet()


class _Company:
    """The streams, which begin anew as long as clients come and go beside them."""

    def __init__(self, turn: Turn, told: Sequence[_Survivor], pool: Sequence[Request], delay: float) -> None:
        self.answers: list[tuple[_Survivor, Stream]] = []
        """Every stream that ended, and what it should have been told."""
        self._turn = turn
        self._server: Server = turn.server
        self._told = told
        self._pool = pool
        self._delay = delay
        self._in_flight: list[Stream] = []  # in the order in which they came
        self._phases = Counter({"queued": 0, "in its prefill": 0, "decoding": 0})
        self._n_paused = 0

    async def run(self, measured: Measured) -> None:
        """Let all clients come and go, and all streams end."""
        n_leaving = self._turn.load.cancellations
        remaining = itertools.repeat(None, n_leaving)

        async def come_and_go() -> None:
            for _ in remaining:
                await self._leave()

        async with trio.open_nursery() as surviving:
            over = trio.Event()
            for survivor in self._told:
                surviving.start_soon(self._survive, survivor, over)
            async with trio.open_nursery() as leaving:
                n_loops = sum(not survivor.request.background for survivor in self._told)
                for _ in range(max(self._server.slots - n_loops, 1) + N_QUEUED):
                    leaving.start_soon(come_and_go)
            over.set()
        measured.add(Metric("cancellations", ""), n_leaving)
        for phase, n in self._phases.items():
            measured.add(Metric(f"of those, {phase}", ""), n)
        if any(survivor.late for survivor in self._told):
            measured.add(Metric("streams that were paused", ""), self._n_paused)

    async def _leave(self) -> None:
        chance = self._turn.random
        await trio.sleep(chance.uniform(0, 2 * self._delay))  # so that slots are free for the background at times
        async with self._requesting(chance.choice([self._pool[0], *self._pool])) as victim:
            if chance.random() < IN_SLOT:
                while not self._has_slot(victim):  # noqa: ASYNC110
                    await trio.sleep(LOOK_SECONDS / 10)
            with trio.move_on_after(chance.uniform(0, self._delay)):
                await victim.finish()
            phase = "decoding" if victim.pieces else "in its prefill" if self._has_slot(victim) else "queued"
            self._phases[phase] += 1
            victim.disconnect()

    def _has_slot(self, stream: Stream) -> bool:
        """Whether it has a slot, if those that came first have the slots."""
        return self._in_flight.index(stream) < self._server.slots

    async def _survive(self, survivor: _Survivor, over: trio.Event) -> None:
        while True:
            async with self._requesting(survivor.request, SMALL_BUFFER if survivor.late else None) as stream:
                if survivor.late:
                    await self._wait_until_paused()
                await stream.finish()
            self.answers.append((survivor, stream))
            if survivor.late or over.is_set():
                return

    async def _wait_until_paused(self) -> None:
        async with watching(self._server) as watch:
            with trio.move_on_after(LATE_SECONDS):
                while not (await watch.look() or {}).get("paused"):  # noqa: ASYNC110
                    await trio.sleep(LOOK_SECONDS)
                self._n_paused += 1

    @asynccontextmanager
    async def _requesting(self, request: Request, receive_buffer: int | None = None) -> AsyncIterator[Stream]:
        async with self._server.requesting(request, receive_buffer=receive_buffer) as stream:
            self._in_flight.append(stream)
            try:
                yield stream
            finally:
                self._in_flight.remove(stream)


# ---- the comparison --------------------------------------------------------------------------------------------------


def _compare(measured: Measured, answers: Sequence[tuple[_Survivor, Stream]]) -> None:
    """Report how many streams were told the same as alone, and where the others part from it."""
    if not all(survivor.alone.choices for survivor, _ in answers):
        measured.note("the server reports no log-probabilities: only texts are compared")
        texts = [stream.text == survivor.alone.text for survivor, stream in answers if survivor.request.n_answers == 1]
        measured.add(Metric("texts compared", ""), len(texts))
        measured.add(Metric("texts that are identical", ""), sum(texts))
        return
    differences = [
        _difference([choice for choice in stream.choices if choice.answer == answer], survivor.alone.choices)
        for survivor, stream in answers
        for answer in range(survivor.request.n_answers)
    ]
    found = [difference for difference in differences if difference is not None]
    measured.add(Metric("streams compared", ""), len(differences))
    measured.add(Metric("tokens compared", ""), sum(len(stream.choices) for _, stream in answers))
    measured.add(Metric("identical in every bit", ""), len(differences) - len(found))
    measured.add(Metric("not identical", ""), len(found))
    measured.add(Metric("of those, with another text", ""), sum(difference.in_text for difference in found))
    if found:
        measured.add(Metric("first token that differs", ""), *(difference.place for difference in found))
        measured.add(Metric("greatest difference", "nats"), *(difference.nats for difference in found))


def _difference(told: Sequence[Choice], alone: Sequence[Choice]) -> _Difference | None:
    """How two answers differ; None if all is equal."""
    first, nats = None, 0.0
    for place, (one, other) in enumerate(itertools.zip_longest(told, alone)):
        if one is not None and other is not None and replace(one, answer=other.answer) == other:
            continue
        first = place if first is None else first
        if one is None or other is None:
            return _Difference(first, nats, in_text=True)
        pairs = [*zip(one.top, other.top, strict=False)]
        is_other = (one.piece, one.token) != (other.piece, other.token)
        if not is_other and one.logprob is not None and other.logprob is not None:
            pairs.append((one.logprob, other.logprob))
        nats = max([nats, *(abs(a - b) for a, b in pairs)])
        if is_other:
            return _Difference(first, nats, in_text=True)
    return None if first is None else _Difference(first, nats, in_text=False)
