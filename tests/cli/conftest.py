from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.calls import Call
from trio_runner.cli import fetch, running, service
from trio_runner.cli.serve import API_KEY_VARIABLE
from trio_runner.config import EngineConfig, ModelConfig


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Let the program set up logging, and undo it."""
    root, native = logging.getLogger(), logging.getLogger("trio_runner.llama")
    before = root.handlers[:], root.level, native.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    native.setLevel(before[2])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Call:
    """Commands start nothing. They write down here what they would have started."""
    made = Call()

    async def run_service(model: ModelConfig, engine: EngineConfig, options: service.ServiceConfig) -> None:
        made.model, made.engine, made.service = model, engine, options

    def run_with_engine(configs: tuple[ModelConfig, EngineConfig], main: object, **options: object) -> int:
        made.model, made.engine = configs
        return 0

    monkeypatch.setattr(service, "run_service", run_service)
    monkeypatch.setattr(running, "run_with_engine", run_with_engine)
    monkeypatch.setattr(fetch, "resolve_model", lambda reference, **options: Path("/fetched") / reference)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    return made


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The path of a file that stands for a model, for programs over the toy."""
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"")
    return str(path)
