"""The dialect of Ollama's Go runner, and some more paths."""

from __future__ import annotations

from collections.abc import Sequence

from trio_runner.server.dialects.dialect import Operation, RouteContext
from trio_runner.server.dialects.runner.routes import RunnerRoutes
from trio_runner.server.problems import Answer, Problem, plain_text


class RunnerDialect:
    """See `dialect.Dialect`."""

    name = "runner"
    about = "The dialect of Ollama's Go runner, and some more paths."
    error_type = None

    def speaks_at(self, path: str) -> bool:
        return True

    def word(self, problem: Problem) -> Answer:
        return plain_text(problem)

    def operations(self, context: RouteContext) -> Sequence[Operation]:
        return RunnerRoutes(context).operations()
