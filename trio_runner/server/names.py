"""What clients call the model. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trio_runner.errors import UnknownModel

MAX_NAME_LENGTH = 200
"""Characters of one name."""
LATEST = ":latest"
"""Ollama's clients add this tag to a name that has none."""


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The names of the one model that a server has. Upper and lower case are the same in them, and so are `name` and
    `name:latest`.

    Raises ValueError for a name that is empty, too long, or has characters that cannot be printed.
    """

    name: str
    """What the server calls its model."""
    aliases: tuple[str, ...] = ()
    """Further names that clients may use."""
    any_model: bool = False
    """Requests may name any model. This one answers them."""

    def __post_init__(self) -> None:
        for name in self:
            if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
                raise ValueError(
                    f"the name of a model has 1 to {MAX_NAME_LENGTH} printable characters, which {name[:50]!r} has not"
                )

    def __iter__(self) -> Iterator[str]:
        """The name, then the aliases."""
        yield self.name
        yield from self.aliases

    def check(self, name: str | None) -> None:
        """Raise `UnknownModel` if a request for the model called `name` is not for this one.

        None or an empty text says that the request names no model. It is for the model that there is.
        """
        if name and not self.any_model and _plain(name) not in map(_plain, self):
            raise UnknownModel(name, known=tuple(self))


ANY_NAME = ModelNames("model", any_model=True)
"""For a server that was not told what its model is called."""


def _plain(name: str) -> str:
    return name.casefold().removesuffix(LATEST)
