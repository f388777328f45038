"""The dialect of Ollama's Go runner, and some more paths."""

from __future__ import annotations

from quart_trio import QuartTrio

from trio_runner.server.dialects.dialect import RouteContext
from trio_runner.server.dialects.runner.routes import RunnerRoutes
from trio_runner.server.problems import Answer, Problem, plain_text


class RunnerDialect:
    """See `dialect.Dialect`."""

    def speaks_at(self, path: str) -> bool:
        return True

    def word(self, problem: Problem) -> Answer:
        return plain_text(problem)

    def add_routes(self, app: QuartTrio, context: RouteContext) -> None:
        RunnerRoutes(context).add_to(app)
