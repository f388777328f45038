"""A prompt as the KV cache sees it: a list of comparable items, one for each position, and how it is made to fit.

An item is a token. Anything else that takes a position (the row of an image, say) only has to be hashable and equal
to itself: everything here and in slots.py compares items and never looks into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trio_runner.errors import InvalidRequest, PromptTooLong


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
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


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt of 1 to `n_ctx` items, and how many at its start every later shift leaves in place."""

    items: tuple[int, ...]
    n_keep: int


def fit_prompt(
    items: Sequence[int], *, n_ctx: int, n_keep: int, adds_bos: bool, truncate: bool, param: str = "prompt"
) -> FittedPrompt:
    """Make a prompt fit a slot of `n_ctx` positions.

    `n_keep` counts items after BOS, below 0 the whole prompt; at least one position always stays free to shift.
    A prompt that is too long loses what lies between the kept items and the newest ones, or, without `truncate`,
    raises `PromptTooLong`. Raises `InvalidRequest` when there is nothing in it. `param` names the field in both.

        items   [ kept | dropped |           newest ]
        fitted  [ kept |           newest ]            n_ctx items
    """
    if not items:
        raise InvalidRequest(f"{param} is empty: no input provided", param=param)
    n_kept = min(len(items) if n_keep < 0 else n_keep + adds_bos, n_ctx - 1)
    n_dropped = len(items) - n_ctx
    if n_dropped > 0:
        if not truncate:
            raise PromptTooLong(len(items), n_ctx, param=param)
        items = [*items[:n_kept], *items[n_kept + n_dropped :]]
    return FittedPrompt(tuple(items), n_kept)
