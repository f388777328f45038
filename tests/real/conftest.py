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
"""Seconds one test may take, on a machine that is busy with other things."""


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model, fetched once for all checkouts of this machine."""
    return resolve_model(DEFAULT_MODEL.name)


@dataclass(frozen=True, slots=True)
class Service:
    """An engine on the default model, and the server in front of it."""

    engine: Engine
    server: Server

    async def lines(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        answer = await self.server.ask(post(path, fields))
        assert answer.status == 200, answer.body
        return answer.lines

    async def complete(self, **fields: Any) -> str:
        return "".join(line["content"] for line in await self.lines("/completion", **fields))


@contextlib.asynccontextmanager
async def serving(model: Path | ModelConfig, **options: Any) -> AsyncIterator[Service]:
    """Serve `model` on a port of its own, with one thread, for the length of the block."""
    async with (
        open_engine(model, **{"threads": 1, "batch_size": 128} | options) as engine,
        serving_engine(engine, deadline=DEADLINE) as server,
    ):
        yield Service(engine, server)
