"""Server-sent events, as a client reads them."""

from __future__ import annotations

import json
from typing import Any

from tests.server.client import Answer


def parts(answer: Answer) -> list[Any]:
    """The objects of a stream, whose comments are left out. The stream must have nothing else."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "text/event-stream"
    found = []
    for block in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        assert "\n" not in block
        if not block.startswith(":"):
            found.append(json.loads(block.removeprefix("data: ")))
    return found


def text_of(answer: Answer) -> str:
    """The text of a stream that came to its end."""
    objects = parts(answer)
    assert [part["stop"] for part in objects] == [False] * (len(objects) - 1) + [True]
    return "".join(part["content"] for part in objects)
