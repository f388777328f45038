"""OpenAI's API, as its clients use it, below /v1."""

from __future__ import annotations

from collections.abc import Sequence

from trio_runner.server.dialects.dialect import Operation, RouteContext
from trio_runner.server.dialects.openai.responses import ErrorBody, error_answer
from trio_runner.server.dialects.openai.routes import OpenAIRoutes
from trio_runner.server.problems import Answer, Problem


class OpenAIDialect:
    """See `dialect.Dialect`."""

    name = "openai"
    about = "OpenAI's API: chats, completions, embeddings."
    error_type = ErrorBody

    def speaks_at(self, path: str) -> bool:
        return path == "/v1" or path.startswith("/v1/")

    def word(self, problem: Problem) -> Answer:
        return error_answer(problem)

    def operations(self, context: RouteContext) -> Sequence[Operation]:
        return OpenAIRoutes(context).operations()
