"""A prompt as the KV cache sees it: a list of comparable items, one for each row, and how it is made to fit.

An item is a token, or a row of an image. Both are hashable and equal to themselves, so that everything here and in
slots.py compares items; only what has to do with positions, or with where an image may be cut, looks into them.

A row takes one cell of the KV cache. It also has a position, and that is where images of models with M-RoPE differ: all
rows of such an image begin at one position, and what follows it continues a few positions further on.
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
    """A digest of all that its rows depend on."""
    n_rows: int
    n_positions: int
    causal: bool = True
    """False: attention among its rows looks both ways."""
    shares_positions: bool = False
    """Its rows share positions, of which there may be as many all the same: those in a single line have one."""

    @property
    def whole(self) -> bool:
        """It is decoded in one batch and forgotten as a whole: rows that look both ways cannot see those of another
        batch, and rows that share positions cannot be told apart in the KV cache."""
        return not self.causal or self.shares_positions


class MediaRow(NamedTuple):
    """Row `row` of an image: a tuple, as prompts are compared item by item."""

    media: Media
    row: int


Item: TypeAlias = int | MediaRow


def common_prefix(a: Sequence[Item], b: Sequence[Item]) -> int:
    """How many items `a` and `b` share from the start."""
    # Comparing slices runs in C: a few of them beat a loop over thousands of items in Python. Of lists only, though: a
    # list never equals a tuple.
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
    """The greatest place up to `end` where `items` may be cut in two: not within an image that stays whole, nor, with
    `any_media`, within any."""
    item = items[end] if end < len(items) else None
    if isinstance(item, MediaRow) and (any_media or item.media.whole):
        return end - item.row
    return end


def cut_after(items: Sequence[Item], start: int) -> int:
    """The least place from `start` on that is not within an image."""
    item = items[start] if start < len(items) else None
    if isinstance(item, MediaRow) and item.row > 0:
        return min(start + item.media.n_rows - item.row, len(items))
    return start


def n_positions(items: Sequence[Item]) -> int:
    """How many positions `items` take, which are cut nowhere that they may not be."""
    n = len(items)
    for item in items:
        if isinstance(item, MediaRow) and item.row == 0:
            n -= item.media.n_rows - item.media.n_positions
    return n


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt of 1 to `n_ctx` items, and how many at its start every later shift leaves in place."""

    items: tuple[Item, ...]
    n_keep: int


def fit_prompt(
    items: Sequence[Item], *, n_ctx: int, n_keep: int, adds_bos: bool, truncate: bool, param: str = "prompt"
) -> FittedPrompt:
    """Make a prompt fit a slot of `n_ctx` positions.

    `n_keep` counts items after BOS, below 0 the whole prompt; at least one position always stays free to shift.
    A prompt that is too long loses what lies between the kept items and the newest ones, never a part of an image, or,
    without `truncate`, raises `PromptTooLong`. Raises `InvalidRequest` when there is nothing in it. `param` names the
    field in both.

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
        if not items:  # an image larger than the context was all there was
            raise PromptTooLong(n_ctx + n_dropped, n_ctx, param=param)
    return FittedPrompt(tuple(items), n_kept)
