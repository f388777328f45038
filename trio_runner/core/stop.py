"""Find the first stop string in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Finds the stop string that *ends* first in the text; of several, the longest. The text ends before it.

    Text is held back only while it may still be the start of a stop string. Neither the match nor the text depends on
    how the text was cut into pieces. Each stop string is followed character by character with the automaton of Knuth,
    Morris and Pratt ("Fast pattern matching in strings", 1977), so that a long one costs no more than a short one.
    Empty strings never match.
    """

    matched: str | None = None
    """The stop string that was found; nothing may be pushed after that."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_Automaton(stop) for stop in dict.fromkeys(stops) if stop]
        self._beginnings = {automaton.stop[0] for automaton in self._automata}
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text. Returns the text that is certain now: no stop string can reach back into it."""
        if not self._held and self._beginnings.isdisjoint(text):
            return text
        self._held += text
        for n_seen, char in enumerate(text, start=len(self._held) - len(text) + 1):
            finished = [automaton.stop for automaton in self._automata if automaton.feed(char)]
            if finished:
                self.matched = max(finished, key=len)
                certain, self._held = self._held[: n_seen - len(self.matched)], ""
                return certain
        n_certain = len(self._held) - max(automaton.n_matched for automaton in self._automata)
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return certain

    def flush(self) -> str:
        """End the text. Returns what was held back, which was no stop string after all."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Follows one stop string; `n_matched` of its characters are the end of the text so far."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.n_matched = 0
        # borders[n]: the longest proper prefix of stop that is also a suffix of stop[:n].
        self._borders = [0] * (len(stop) + 1)
        n_border = 0
        for n in range(2, len(stop) + 1):
            while n_border and stop[n - 1] != stop[n_border]:
                n_border = self._borders[n_border]
            n_border += stop[n - 1] == stop[n_border]
            self._borders[n] = n_border

    def feed(self, char: str) -> bool:
        """Take one character; True when it completes the stop string."""
        while self.n_matched and char != self.stop[self.n_matched]:
            self.n_matched = self._borders[self.n_matched]
        self.n_matched += char == self.stop[self.n_matched]
        return self.n_matched == len(self.stop)
