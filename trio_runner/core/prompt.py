"""A prompt as the KV cache sees it: a list of comparable items, one for each row, and how it is made to fit.

An item is a token, or a row of an image. Items are hashable and can be compared. Most code here and in slots.py only
compares them; only code about positions, or about where an image may be cut, looks into them.

A row takes one cell of the KV cache. It also has a position. In models with M-RoPE the rows of an image share
positions, so that what follows the image continues only a few positions further on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from trio_runner.errors import InvalidRequest, PromptTooLong


@dataclass(frozen=True, slots=True)
class Media:
    """An image, or a part of one, as a projector has encoded it: `n_rows` rows that take `n_positions` positions."""

    key: bytes
    """A digest of everything that the rows depend on."""
    n_rows: int
    n_positions: int
    causal: bool = True
    """False: each row attends to all rows of the image."""
    shares_positions: bool = False
    """The rows share positions. There may still be as many positions as rows, if all rows are in one line."""

    @property
    def whole(self) -> bool:
        """Whether the image is decoded in one batch and forgotten as a whole. Non-causal rows cannot attend to rows of
        another batch, and rows that share positions cannot be told apart in the KV cache."""
        return not self.causal or self.shares_positions


class MediaRow(NamedTuple):
    """One row of an image. A tuple, because prompts are compared item by item."""

    media: Media
    row: int


Item: TypeAlias = int | MediaRow


def common_prefix(a: Sequence[Item], b: Sequence[Item]) -> int:
    """How many items `a` and `b` share from the start."""
    # To compare slices runs in C: a few of them beat a loop over thousands of items in Python. Both must be lists, for
    # a list never equals a tuple.
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def cut_before(items: Sequence[Item], end: int, *, any_media: bool = False) -> int:
    """The last place up to `end` where `items` may be cut in two: not within an image that stays whole or, with
    `any_media`, within any image."""
    item = items[end] if end < len(items) else None
    if isinstance(item, MediaRow) and (any_media or item.media.whole):
        return end - item.row
    return end


def cut_after(items: Sequence[Item], start: int) -> int:
    """The first place from `start` on that is not within an image."""
    item = items[start] if start < len(items) else None
    if isinstance(item, MediaRow) and item.row > 0:
        return min(start + item.media.n_rows - item.row, len(items))
    return start


def n_positions(items: Sequence[Item]) -> int:
    """How many positions `items` take. They must contain no part of an image that stays whole."""
    n = len(items)
    for item in items:
        if isinstance(item, MediaRow) and item.row == 0:
            n -= item.media.n_rows - item.media.n_positions
    return n


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt of 1 to `n_ctx` items."""

    items: tuple[Item, ...]
    n_keep: int
    """Items at the start that every later context shift leaves in place."""


def fit_prompt(
    items: Sequence[Item], *, n_ctx: int, n_keep: int, adds_bos: bool, truncate: bool, param: str = "prompt"
) -> FittedPrompt:
    """Make a prompt fit a slot of `n_ctx` positions.

    `n_keep` counts items after BOS; below 0 it means the whole prompt. At least one position always stays free to
    shift. A prompt that is too long loses what lies between the kept items and the newest ones, but never a part of an
    image. `items` is not changed.

    Raises `PromptTooLong` for such a prompt without `truncate`, or if a single image is longer than the context. Raises
    `InvalidRequest` for an empty prompt. Both name the field `param`.

        items   [ kept | dropped |           newest ]
        fitted  [ kept |           newest ]            n_ctx items
    """
    if not items:
        raise InvalidRequest(f"{param} is empty: no input provided", param=param)
    n_kept = min(len(items) if n_keep < 0 else n_keep + adds_bos, n_ctx - 1)
    n_kept = cut_before(items, n_kept, any_media=True)
    n_dropped = len(items) - n_ctx
    if n_dropped > 0:
        if not truncate:
            raise PromptTooLong(len(items), n_ctx, param=param)
        items = [*items[:n_kept], *items[cut_after(items, n_kept + n_dropped) :]]
        if not items:  # the prompt was one image that is longer than the context
            raise PromptTooLong(n_ctx + n_dropped, n_ctx, param=param)
    return FittedPrompt(tuple(items), n_kept)
