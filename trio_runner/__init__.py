"""trio-runner: the local model runner that never makes you wait for something you no longer want."""

from __future__ import annotations

import importlib
import typing

from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import (
    DecodeFailed,
    EngineBroken,
    EngineBusy,
    EngineClosed,
    EngineLoading,
    InvalidGrammar,
    InvalidImage,
    InvalidRequest,
    LoadError,
    NativeError,
    PromptTooLong,
    ReaderStalled,
    RequestError,
    RunnerError,
    UnknownAdapter,
    UnknownModel,
    Unsupported,
)
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.info import (
    AdapterInfo,
    Capabilities,
    Device,
    EngineStatistics,
    Histogram,
    MemoryUse,
    ModelInfo,
    Placement,
    RequestStatistics,
    SchedulerStatistics,
)
from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Infill, RerankRequest
from trio_runner.sampling import SamplingParams
from trio_runner.version import __version__ as __version__

if typing.TYPE_CHECKING:
    from trio_runner.engine.engine import Engine
    from trio_runner.engine.generation import Generation
    from trio_runner.front_door import open_engine
else:
    # These import trio and numpy, which takes longer than everything else that the command line does when it starts.
    _SLOW = {
        "Engine": "trio_runner.engine.engine",
        "Generation": "trio_runner.engine.generation",
        "open_engine": "trio_runner.front_door",
    }

    def __getattr__(name):
        if name not in _SLOW:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_SLOW[name]), name)
        return value

    def __dir__():
        return sorted(globals().keys() | _SLOW.keys())


__all__ = [
    "AdapterChoice",
    "AdapterConfig",
    "AdapterInfo",
    "Capabilities",
    "Chat",
    "DecodeFailed",
    "Device",
    "EmbedRequest",
    "Embedded",
    "Engine",
    "EngineBroken",
    "EngineBusy",
    "EngineClosed",
    "EngineConfig",
    "EngineLoading",
    "EngineStatistics",
    "Event",
    "Finished",
    "GenerateRequest",
    "Generation",
    "Histogram",
    "Infill",
    "InvalidGrammar",
    "InvalidImage",
    "InvalidRequest",
    "LoadError",
    "MemoryUse",
    "ModelConfig",
    "ModelInfo",
    "NativeError",
    "Placement",
    "PromptProgress",
    "PromptTooLong",
    "ReaderStalled",
    "RequestError",
    "RequestStatistics",
    "RerankRequest",
    "RunnerError",
    "SampledToken",
    "SamplingParams",
    "SchedulerStatistics",
    "TextPiece",
    "TokenInfo",
    "UnknownAdapter",
    "UnknownModel",
    "Unsupported",
    "Usage",
    "open_engine",
]
