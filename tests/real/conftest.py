"""The default model and a server for it, for the tests with real models."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server.client import Server, post
from tests.server.client import serving as serving_engine
from trio_runner import Engine, ModelConfig, open_engine
from trio_runner.models import DEFAULT_MODEL, resolve_model

DEADLINE = 120.0
"""Seconds that a test may take on a busy machine."""


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model. It is fetched once for all checkouts on this machine."""
    return resolve_model(DEFAULT_MODEL.name)


@dataclass(frozen=True, slots=True)
class Service:
    """An engine with the default model, and the server in front of it."""

    engine: Engine
    server: Server

    async def lines(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of the answer to a request to `path`."""
        answer = await self.server.ask(post(path, fields))
        assert answer.status == 200, answer.body
        return answer.lines

    async def complete(self, **fields: Any) -> str:
        """The text of the answer to a request to /completion."""
        return "".join(line["content"] for line in await self.lines("/completion", **fields))


@contextlib.asynccontextmanager
async def serving(model: Path | ModelConfig, **options: Any) -> AsyncIterator[Service]:
    """Serve `model` on a port of its own, with one thread, until the block ends."""
    async with (
        open_engine(model, **{"threads": 1, "batch_size": 128} | options) as engine,
        serving_engine(engine, deadline=DEADLINE) as server,
    ):
        yield Service(engine, server)
