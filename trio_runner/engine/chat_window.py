"""The newest part of a conversation that fits the context.

The oldest messages are dropped. System messages stay, and so does the last message. What is left never begins with the
result of a tool, whose call would be missing. If the template refuses a conversation that begins in the middle of a
turn, it begins with the next message of the user.

Each attempt renders and tokenises what would be left. So the first attempt is a guess, from the share that each message
has in the whole text. The search goes on from there in steps that double, so that few attempts are much longer than
what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final, NamedTuple

from trio_runner.core.ports import EncodedImage, EncodedMedia, Model
from trio_runner.core.prompt import Item, Media
from trio_runner.engine.prompt_parts import NamedImage, join_parts, named_images, render_chat
from trio_runner.engine.requests import texts_of
from trio_runner.errors import PromptTooLong, RequestError
from trio_runner.request import Chat

_SYSTEM: Final = ("system", "developer")
_RESULTS: Final = ("tool", "function", "ipython")
"""Roles of messages that answer a call in the message before them."""


class ChatItems(NamedTuple):
    """The items of a rendered conversation, and the rows of their images."""

    items: list[Item]
    media: dict[Media, EncodedMedia]


class ChatWindow:
    """The search in one conversation. Renders and tokenises, so it belongs on a helper thread."""

    def __init__(
        self, chat: Chat, images: Mapping[str, EncodedImage], model: Model, *, n_ctx: int, parse_special: bool
    ) -> None:
        """`images`: those of the whole conversation, by their names. `n_ctx`: items that fit."""
        self._chat = chat
        self._images = images
        self._model = model
        self._n_ctx = n_ctx
        self._parse_special = parse_special
        self._now = datetime.now()
        self._names = {name: index for index, name in named_images(chat) if name in images}
        """The images whose rows are known, by their names, and the numbers of their messages."""
        roles = [message.get("role") for message in chat.messages]
        last = len(roles) - 1
        self._droppable = [index for index in range(last) if roles[index] not in _SYSTEM]
        heads = [*self._droppable, last]
        n_all = len(self._droppable)
        self._starts = [n for n in range(1, n_all + 1) if n == n_all or roles[heads[n]] not in _RESULTS]
        """How many messages may be dropped."""
        self._users = [n for n in self._starts if roles[heads[n]] == "user"]
        """Those of them after which the first message is one of the user."""

    def find(self, n_items: int) -> ChatItems:
        """The items of the longest end that fits. `n_items`: those of the whole conversation, which are too many.

        Raises `PromptTooLong`, with `messages` as the field, if what must stay does not fit or cannot be rendered.
        """
        found: dict[int, ChatItems] = {}
        n_shortest = n_items

        def fits(at: int) -> bool:
            nonlocal n_shortest
            rendered = self._render(self._starts[at])
            if rendered is not None:
                found[at] = rendered
                n_shortest = min(n_shortest, len(rendered.items))
            return rendered is not None and len(rendered.items) <= self._n_ctx

        at = first_that_holds(len(self._starts), self._guess(n_items), fits)
        if at == len(self._starts):
            raise PromptTooLong(n_shortest, self._n_ctx, param="messages")
        return found[at]

    def _guess(self, n_items: int) -> int:
        """A number in `self._starts` after which the rest is about as long as the context."""
        lengths = [sum(map(len, texts_of(message))) for message in self._chat.messages]
        n_rows = [0] * len(lengths)
        for name, index in self._names.items():
            n_rows[index] += len(self._images[name].items)
        share = (n_items - sum(n_rows)) / max(sum(lengths), 1)
        n_excess, n_dropped = float(n_items - self._n_ctx), 0
        for index in self._droppable:
            if n_excess <= 0:
                break
            n_excess -= lengths[index] * share + n_rows[index]
            n_dropped += 1
        return next((at for at, n in enumerate(self._starts) if n >= n_dropped), len(self._starts) - 1)

    def _render(self, n_dropped: int) -> ChatItems | None:
        """The items without the first messages; without more of them where the template refuses that; None if it
        refuses everything."""
        fallbacks = (next((n for n in self._users if n >= n_dropped), n_dropped), len(self._droppable))
        for n in dict.fromkeys((n_dropped, *fallbacks)):
            dropped = set(self._droppable[:n])
            kept = [index for index in range(len(self._chat.messages)) if index not in dropped]
            try:
                named = render_chat(self._chat, self._model.info, kept=kept, now=self._now)
            except RequestError:
                continue
            # A template that shows an image twice leaves it open which one is which.
            if all(isinstance(part, str) or part.param in self._names for part in named):
                parts = [self._images[part.param] if isinstance(part, NamedImage) else part for part in named]
                special = self._parse_special
                return ChatItems(*join_parts(parts, self._model, param="messages", parse_special=special, is_chat=True))
        return None


def first_that_holds(n: int, guess: int, holds: Callable[[int], bool]) -> int:
    """The first of the numbers below `n` for which `holds` is true, or `n` if there is none. If it is true for one, it
    is true for all after it. Begins with `guess`, and goes on in steps that double."""
    low, high, at, step = 0, n, min(guess, n - 1), 1
    has_failed = has_held = False
    while low < high:
        if holds(at):
            high, has_held = at, True
        else:
            low, has_failed = at + 1, True
        if has_failed and has_held:
            at = (low + high) // 2
        else:
            at = max(high - step, low) if has_held else min(low + step - 1, high - 1)
        step *= 2
    return low
