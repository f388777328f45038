"""The block of thinking that some models begin an answer with: what a chat template tells of it, and how the text of an
answer is split. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, NamedTuple


class Tags(NamedTuple):
    """The texts around a block of thinking."""

    opening: str
    closing: str


KNOWN_TAGS: Final = (
    Tags("<think>", "</think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<reasoning>", "</reasoning>"),
)
"""Tags that models write as plain text. Others, such as those of gpt-oss, are special tokens, which are no part of the
text of an answer."""
VARIABLES: Final = ("enable_thinking", "reasoning_effort", "thinking_budget")
"""Variables of chat templates that turn thinking on and off, or say how much of it there should be."""


@dataclass(frozen=True, slots=True)
class ThinkingStyle:
    """What a chat template tells of thinking."""

    tags: Tags | None
    """The tags that its model writes; None if the template has no tags that we know."""
    is_steered: bool
    """The template reads a variable about thinking."""

    @property
    def thinks(self) -> bool:
        """Whether the model can be asked to think."""
        return self.tags is not None or self.is_steered


def thinking_style(template: str | None) -> ThinkingStyle:
    """What `template` tells of thinking. A template may have the closing tag alone: it takes the thinking out of
    earlier answers with it, while the model writes the opening tag itself."""
    text = template or ""
    tags = next((tags for tags in KNOWN_TAGS if tags.closing in text), None)
    return ThinkingStyle(tags, any(name in text for name in VARIABLES))


def template_variables(think: bool | str) -> dict[str, Any]:
    """The variables that tell a chat template whether to think. `think` may be a level, such as "low".

    Templates call the same thing `enable_thinking` (Qwen) or `thinking` (DeepSeek, Granite), and a level
    `reasoning_effort` (gpt-oss). A template ignores the variables that it does not know.
    """
    level = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"enable_thinking": bool(think), "thinking": bool(think), **level}


class _State(Enum):
    BEFORE = auto()
    """Nothing but white space, or a part of the opening tag, has come."""
    OPENED = auto()
    """The opening tag has come, and white space at most after it."""
    THINKING = auto()
    CLOSED = auto()
    """The closing tag has come, and white space at most after it."""
    ANSWERING = auto()


class ThinkingSplitter:
    """Splits the text of one answer into its thinking and the rest, as it arrives.

    The tags, and the white space directly after each, are left out. What may still become a tag is held back, so half a
    tag is never returned, and what was returned stays true. How the text is cut into pieces makes no difference.

    A text that does not begin with the opening tag, after white space at most, has no thinking. If the prompt ends with
    that tag, say so with `opened`: then the text begins within the thinking.
    """

    def __init__(self, tags: Tags, *, opened: bool = False) -> None:
        self._tags = tags
        self._state = _State.OPENED if opened else _State.BEFORE
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """More of the answer. Returns what is certain by now: (thinking, rest), either maybe empty."""
        self._held += text
        thinking = rest = ""
        state = None
        while state is not self._state:
            state = self._state
            match state:
                case _State.BEFORE:
                    self._look_for_opening()
                case _State.OPENED:
                    self._skip_space(_State.THINKING)
                case _State.THINKING:
                    thinking += self._take_thinking()
                case _State.CLOSED:
                    self._skip_space(_State.ANSWERING)
                case _State.ANSWERING:
                    rest += self._take(len(self._held))
        return thinking, rest

    def finish(self) -> tuple[str, str]:
        """The answer is complete. Returns what was held back: (thinking, rest)."""
        held = self._take(len(self._held))
        return (held, "") if self._state is _State.THINKING else ("", held)

    def _look_for_opening(self) -> None:
        said = self._held.lstrip()
        if said.startswith(self._tags.opening):
            self._held = said.removeprefix(self._tags.opening)
            self._state = _State.OPENED
        elif not self._tags.opening.startswith(said):
            self._state = _State.ANSWERING

    def _skip_space(self, then: _State) -> None:
        self._held = self._held.lstrip()
        if self._held:
            self._state = then

    def _take_thinking(self) -> str:
        before, closing, after = self._held.partition(self._tags.closing)
        if closing:
            self._held, self._state = after, _State.CLOSED
            return before
        return self._take(len(self._held) - _overlap(self._held, self._tags.closing))

    def _take(self, n: int) -> str:
        taken, self._held = self._held[:n], self._held[n:]
        return taken


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
