"""trio-runner: the local model runner that never makes you wait for something you no longer want."""

from __future__ import annotations

from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.engine.engine import Engine, EngineStatistics, open_engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineClosed,
    InvalidGrammar,
    InvalidImage,
    InvalidRequest,
    LoadError,
    NativeError,
    PromptTooLong,
    ReaderStalled,
    RequestError,
    RunnerError,
    Unsupported,
)
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.request import EmbedRequest, GenerateRequest, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "EmbedRequest",
    "Embedded",
    "Engine",
    "EngineBroken",
    "EngineBusy",
    "EngineClosed",
    "EngineConfig",
    "EngineStatistics",
    "Event",
    "Finished",
    "GenerateRequest",
    "Generation",
    "InvalidGrammar",
    "InvalidImage",
    "InvalidRequest",
    "LoadError",
    "ModelConfig",
    "NativeError",
    "PromptProgress",
    "PromptTooLong",
    "ReaderStalled",
    "RequestError",
    "RunnerError",
    "SampledToken",
    "SamplingParams",
    "TextPiece",
    "TokenInfo",
    "Unsupported",
    "Usage",
    "open_engine",
]
