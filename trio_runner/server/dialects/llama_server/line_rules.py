"""Two ways in which llama-server ends a completion that code editors use: `n_indent` and `t_max_predict_ms`. Pure.

Both look at lines: an editor wants the rest of a line or of a block, and no line that is cut in two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from trio_runner.events import Event, Finished, PromptProgress, TextPiece, Usage


@dataclass(slots=True)
class LineRules:
    """Text in, the text that is kept out."""

    min_indent: int = 0
    """A line after the first ends the text if it begins with fewer spaces and tabs. 0 allows every line."""
    max_seconds: float | None = None
    """Seconds from the first text on, after which the next newline ends it."""
    _began: float | None = None
    _indent: int | None = None
    """Spaces and tabs so far of a line that has nothing else yet; None within the rest of a line."""

    def push(self, text: str, now: float) -> tuple[str, bool]:
        """What is kept of `text`, which came at `now`, and whether the whole ends there."""
        if self._began is None:
            self._began = now
        if self.min_indent > 0:
            end = self._first_outside(text)
            if end is not None:
                return text[:end], True
        is_late = self.max_seconds is not None and now - self._began > self.max_seconds
        return text, is_late and "\n" in text

    def _first_outside(self, text: str) -> int | None:
        """Where in `text` a line begins that is not indented enough, after its spaces and tabs."""
        for place, character in enumerate(text):
            if self._indent is not None:
                if character in " \t":
                    self._indent += 1
                    continue
                if self._indent < self.min_indent:
                    return place
                self._indent = None
            if character == "\n":
                self._indent = 0
        return None


class Source(Protocol):
    """A generation, as `Choices` reads it."""

    async def start(self) -> None: ...

    def close(self) -> None: ...

    async def __anext__(self) -> Event: ...

    def receive_nowait(self, at_most: int | None = None) -> list[Event]: ...


class RuledGeneration:
    """A generation that ends where `rules` say so, with the reason "length". It is closed there.

    A generation that is closed does not tell what it cost, so this counts: the request must ask for progress and for
    log-probabilities. `clock` gives seconds.
    """

    def __init__(self, generation: Source, rules: LineRules, clock: Callable[[], float]) -> None:
        self._generation = generation
        self._rules = rules
        self._clock = clock
        self._usage = Usage()
        self._started = self._first = 0.0
        self._last: Finished | None = None
        """The end that the rules made, until it is read."""
        self._ended = False

    async def start(self) -> None:
        await self._generation.start()
        self._started = self._clock()

    def close(self) -> None:
        self._generation.close()

    async def __anext__(self) -> Event:
        if self._last is not None:
            last, self._last = self._last, None
            return last
        if self._ended:
            raise StopAsyncIteration
        return self._seen(await self._generation.__anext__())

    def receive_nowait(self, at_most: int | None = None) -> list[Event]:
        events: list[Event] = []
        while (at_most is None or len(events) < at_most) and not self._ended:
            arrived = self._generation.receive_nowait(1)
            if not arrived:
                break
            events.append(self._seen(arrived[0]))
        if self._last is not None and (at_most is None or len(events) < at_most):
            events.append(self._last)
            self._last = None
        return events

    def _seen(self, event: Event) -> Event:
        match event:
            case PromptProgress():
                self._usage = replace(self._usage, prompt_tokens=event.n_prompt, cached_tokens=event.n_cached)
            case TextPiece():
                return self._piece(event)
            case Finished():
                self._ended = True
        return event

    def _piece(self, piece: TextPiece) -> TextPiece:
        now = self._clock()
        if not self._usage.completion_tokens:
            self._first = now
        self._usage = replace(
            self._usage,
            completion_tokens=self._usage.completion_tokens + len(piece.tokens),
            prompt_seconds=self._first - self._started,
            completion_seconds=now - self._first,
        )
        text, ends = self._rules.push(piece.text, now)
        if ends:
            self._generation.close()
            self._ended = True
            self._last = Finished("length", self._usage)
        return TextPiece(text, piece.tokens)
