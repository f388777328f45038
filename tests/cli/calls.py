"""What a command would have started, were it not in a test."""

from __future__ import annotations

from dataclasses import dataclass

from trio_runner.cli.service import ServiceConfig
from trio_runner.config import EngineConfig, ModelConfig


@dataclass
class Call:
    model: ModelConfig | None = None
    engine: EngineConfig | None = None
    service: ServiceConfig | None = None
