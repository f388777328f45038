"""The dialects that the server speaks, in the order in which they are asked whether a path is theirs."""

from __future__ import annotations

from trio_runner.server.dialects.dialect import Dialect
from trio_runner.server.dialects.llama_server import LlamaServerDialect
from trio_runner.server.dialects.ollama import OllamaDialect
from trio_runner.server.dialects.openai import OpenAIDialect
from trio_runner.server.dialects.runner import RunnerDialect

DIALECTS: tuple[Dialect, ...] = (OpenAIDialect(), OllamaDialect(), LlamaServerDialect(), RunnerDialect())
"""The last one gets the paths that belong to none."""

__all__ = ["DIALECTS", "Dialect"]
