"""Problems in llama-server's words. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from trio_runner.errors import PromptTooLong
from trio_runner.server.dialects.json_out import whole_characters
from trio_runner.server.problems import Answer, Problem, problem

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    503: "unavailable_error",
}
_JSON: Final = {"Content-Type": "application/json"}


class ErrorFields(msgspec.Struct, omit_defaults=True):
    """What went wrong. `code` is the HTTP status."""

    code: int
    message: str
    type: str
    n_prompt_tokens: int | None = None
    """Tokens of a prompt that is too long."""
    n_ctx: int | None = None
    """Tokens that fit."""


class Refusal(msgspec.Struct):
    """The body of every answer that is no success."""

    error: ErrorFields


def error_fields(refusal: Problem) -> ErrorFields:
    """`refusal` in llama-server's words. What the model cannot do is a 400, like every other fault of a request."""
    code = 400 if refusal.status == 422 else refusal.status
    kind = _TYPES.get(code, "invalid_request_error")
    if refusal.code == "unsupported":
        kind = "not_supported_error"
    elif refusal.code == "context_length_exceeded":
        kind = "exceed_context_size_error"
    return ErrorFields(code, whole_characters(refusal.text), kind)


def worded(refusal: Problem) -> Answer:
    """The answer about `refusal`."""
    return _answer(error_fields(refusal), refusal.headers)


def too_long(error: PromptTooLong) -> Answer:
    """The answer about a prompt that does not fit, with both numbers."""
    fields = error_fields(problem(error))
    fields.n_prompt_tokens, fields.n_ctx = error.n_prompt, error.n_ctx
    return _answer(fields, {})


def loading() -> Answer:
    """The answer of GET /health while the model is loaded."""
    return worded(Problem(503, "Loading model"))


def no_service() -> Answer:
    """The answer of GET /health of an engine that takes no more requests."""
    return worded(Problem(503, "the server takes no more requests"))


def _answer(fields: ErrorFields, headers: dict[str, str]) -> Answer:
    return Answer(fields.code, {**_JSON, **headers}, msgspec.json.encode(Refusal(fields)))
