"""Models, contexts and samplers over llama.cpp. Only this package calls the native library."""

from __future__ import annotations

from trio_runner.llama.adapter import Adapter
from trio_runner.llama.backends import devices, plugins
from trio_runner.llama.context import Context
from trio_runner.llama.gguf import GgufHeader, check_gguf
from trio_runner.llama.library import drain_log, system_info
from trio_runner.llama.loader import LlamaLoader
from trio_runner.llama.model import Model
from trio_runner.llama.projector import Projector
from trio_runner.llama.sampler import Sampler
from trio_runner.llama.threads import default_threads

__all__ = [
    "Adapter",
    "Context",
    "GgufHeader",
    "LlamaLoader",
    "Model",
    "Projector",
    "Sampler",
    "check_gguf",
    "default_threads",
    "devices",
    "drain_log",
    "plugins",
    "system_info",
]
