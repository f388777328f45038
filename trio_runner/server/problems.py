"""What HTTP says when something went wrong. Pure.

Every error becomes a status, a text for people, and headers. The status comes from the class of the error; the text of
a caller's mistake always names the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trio_runner.errors import EngineBusy, RequestError, RunnerError


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is not what was asked for."""

    status: int
    text: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The text as one line, as Go's `http.Error` sends it."""
        return self.text.encode("utf-8", errors="replace") + b"\n"

    @property
    def all_headers(self) -> dict[str, str]:
        return {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff", **self.headers}


def problem(error: Exception) -> Problem:
    """What `error` is to the client. What is not a `RunnerError` is our own fault, and its text stays here."""
    if not isinstance(error, RunnerError):
        return Problem(500, "internal error")
    headers = {}
    if isinstance(error, EngineBusy):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Problem(error.status, problem_text(error), headers)


def problem_text(error: Exception) -> str:
    """What to tell the client, in one line that names the field at fault."""
    if not isinstance(error, RunnerError):
        return "internal error"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RequestError) and error.param is not None and error.param not in text:
        text = f"{error.param}: {text}"
    return text
