"""The dialect of Ollama's own API, under /api."""

from __future__ import annotations

from collections.abc import Sequence

from trio_runner.server.dialects.dialect import Operation, RouteContext
from trio_runner.server.dialects.ollama.responses import Refusal, refusal
from trio_runner.server.dialects.ollama.routes import OllamaRoutes
from trio_runner.server.problems import Answer, Problem


class OllamaDialect:
    """See `dialect.Dialect`."""

    name = "ollama"
    about = "The API of Ollama, under /api."
    error_type = Refusal

    def speaks_at(self, path: str) -> bool:
        return path == "/api" or path.startswith("/api/")

    def word(self, problem: Problem) -> Answer:
        return refusal(problem)

    def operations(self, context: RouteContext) -> Sequence[Operation]:
        return OllamaRoutes(context).operations()
