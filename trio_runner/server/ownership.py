"""Generations that end with the request they were started for.

A request owns what it starts, and its middleware closes that when the request is over, whatever the reason. The handler
cannot: it is over before the body of its answer starts. The body cannot: a body that was never iterated never runs its
own clean-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from quart import request

_OWNED = "trio_runner.owned"
"""Key of the ASGI scope."""


class Closable(Protocol):
    """A generation, or several of them."""

    def close(self) -> None: ...


@contextmanager
def owning(scope: dict[str, Any]) -> Iterator[None]:
    """Close, at the end of the block, the generations that were given to `own` for the request of `scope`."""
    owned: list[Closable] = []
    scope[_OWNED] = owned
    try:
        yield
    finally:
        for generation in owned:
            generation.close()


def own(generation: Closable) -> None:
    """Close `generation` when the current request is over."""
    cast(dict[str, Any], request.scope)[_OWNED].append(generation)
