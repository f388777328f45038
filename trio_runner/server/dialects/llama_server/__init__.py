"""The dialect of llama-server, llama.cpp's own server, under /llama."""

from __future__ import annotations

from collections.abc import Sequence

from trio_runner.server.dialects.dialect import Operation, RouteContext
from trio_runner.server.dialects.llama_server.problem_words import Refusal, worded
from trio_runner.server.dialects.llama_server.routes import LlamaServerRoutes
from trio_runner.server.problems import Answer, Problem


class LlamaServerDialect:
    """See `dialect.Dialect`."""

    name = "llama"
    about = "The dialect of llama-server, llama.cpp's own server."
    error_type = Refusal

    def speaks_at(self, path: str) -> bool:
        return path == "/llama" or path.startswith("/llama/")

    def word(self, problem: Problem) -> Answer:
        return worded(problem)

    def operations(self, context: RouteContext) -> Sequence[Operation]:
        return LlamaServerRoutes(context).operations()
