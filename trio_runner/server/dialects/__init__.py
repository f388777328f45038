"""The dialects that the server speaks, in the order in which they are asked whether a path is theirs."""

from __future__ import annotations

from trio_runner.server.dialects.dialect import Dialect
from trio_runner.server.dialects.openai import OpenAIDialect
from trio_runner.server.dialects.runner import RunnerDialect

DIALECTS: tuple[Dialect, ...] = (OpenAIDialect(), RunnerDialect())
"""The last one gets the paths that belong to none."""

__all__ = ["DIALECTS", "Dialect"]
