"""What HTTP says when something went wrong. Pure.

Every error becomes a `Problem`: a status, a text for people, and headers. The status comes from the class of the error;
the text of a caller's mistake always names the field. A dialect makes an `Answer` of it, in its own words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineLoading,
    InvalidImage,
    LoadError,
    PromptTooLong,
    RequestError,
    RunnerError,
    UnknownAdapter,
    UnknownModel,
    Unsupported,
)

CODES: Final[Mapping[type[RunnerError], str]] = {
    PromptTooLong: "context_length_exceeded",
    InvalidImage: "invalid_image",
    UnknownAdapter: "adapter_not_found",
    UnknownModel: "model_not_found",
    Unsupported: "unsupported",
    EngineBusy: "server_busy",
    EngineLoading: "model_loading",
    EngineBroken: "engine_broken",
    LoadError: "engine_broken",
}
"""Words for programs. OpenAI's clients know the first one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is not what was asked for."""

    status: int
    text: str
    headers: dict[str, str] = field(default_factory=dict)
    param: str | None = None
    """The field of the request that is at fault, as a path such as `messages[2].content`."""
    code: str | None = None
    """A word that programs can compare, where there is one; see `CODES`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `headers` are without its length."""

    status: int
    headers: dict[str, str]
    body: bytes


Wording: TypeAlias = Callable[[str, Problem], Answer]
"""(path of the request, problem) -> the answer, in the words of the dialect that the path belongs to."""


def plain_text(problem: Problem) -> Answer:
    """The text as one line, as Go's `http.Error` sends it."""
    headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff", **problem.headers}
    return Answer(problem.status, headers, problem.text.encode("utf-8", errors="replace") + b"\n")


def problem(error: Exception) -> Problem:
    """What `error` is to the client. If it is not a `RunnerError`, the fault is ours, and its text stays here."""
    if not isinstance(error, RunnerError):
        return Problem(500, "internal error")
    headers = {}
    if isinstance(error, EngineBusy):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, (EngineBroken, LoadError)):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would try twice more, as they do with every 503
    param = error.param if isinstance(error, RequestError) else None
    # Editors that ask for completions take a 400 as "not with this model", and other statuses as a failure.
    cannot_infill = isinstance(error, Unsupported) and error.feature == "infill"
    return Problem(400 if cannot_infill else error.status, problem_text(error), headers, param, CODES.get(type(error)))


def problem_text(error: Exception) -> str:
    """What to tell the client, in one line that names the field at fault."""
    if not isinstance(error, RunnerError):
        return "internal error"
    text = load_failure(error) if isinstance(error, LoadError) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, RequestError) and error.param is not None and error.param not in text:
        text = f"{error.param}: {text}"
    return text


def load_failure(error: LoadError, *, named: bool = True) -> str:
    """What is wrong with a file: with its name, if `named`, and never with its directory, which is no client's
    business."""
    if error.path is None:
        return error.reason
    name = error.path.replace("\\", "/").rpartition("/")[2]
    reason = error.reason.replace(error.path, name)
    return f"{name}: {reason}" if named else reason
