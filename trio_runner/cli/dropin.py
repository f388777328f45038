"""The drop-in mode: takes the place of the runner that an older Ollama server starts.

A first argument that begins with a dash chooses it. The flags are the original's, in Go's syntax, the ignored ones
included. Such a server reads stderr for lines that begin with "error:", and shows the user what follows. So every
failure is such a line, with exit code 1: a model that does not load, an address that is taken, a value that no engine
can have. The original crashed later in these cases. A wrong command line exits with 2 and -h with 0, as Go programs do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from trio_runner import __version__
from trio_runner.cli.app_watch import AppWatch
from trio_runner.cli.go_flags import Flag, FlagError, FlagSet, HelpRequested, Value
from trio_runner.cli.logs import set_up_slog
from trio_runner.config import MAX_BATCH_ROWS, MAX_THREADS, AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import LoadError, RunnerError

logger = logging.getLogger(__name__)

LOAD_ERROR: Final = "error: error loading model "
"""What an Ollama server looks for on stderr. It shows the rest of the line to its user."""

Values: TypeAlias = Mapping[str, Value]
"""The values of all flags by name."""


# ---- the flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration that a flag sets."""

    config: type[Any]
    field: str
    read: Callable[[Any, Values], Any]
    """(value of the flag, values of all flags) -> value of the field. Raises ValueError or `LoadError`."""


@dataclass(frozen=True, slots=True)
class DropinFlag(Flag):
    """A flag of the original runner, and what it sets here. One that sets nothing is ignored."""

    settings: tuple[Setting, ...] = ()


def _flag(name: str, default: Value, usage: str, *settings: Setting) -> DropinFlag:
    return DropinFlag(name, default, usage, settings)


def _model(field: str, read: Callable[[Any, Values], Any] = lambda value, values: value) -> Setting:
    return Setting(ModelConfig, field, read)


def _engine(field: str, read: Callable[[Any, Values], Any] = lambda value, values: value) -> Setting:
    return Setting(EngineConfig, field, read)


def _read_model(path: str, values: Values) -> str:
    if not path:
        raise LoadError("--model is missing")
    return path


def _read_parallel(parallel: int, values: Values) -> int:
    if parallel < 1:
        raise ValueError("parallel must be 1 or more")
    return parallel


def _read_port(port: int, values: Values) -> int:
    if not 0 <= port <= 65535:
        raise ValueError("port must be between 0 and 65535")
    return port


def _slot_context(ctx_size: int, values: Values) -> int:
    """The tokens of one slot: the flag counts those of all slots together."""
    return ctx_size // _read_parallel(int(values["parallel"]), values)


def _embedding_rows(ctx_size: int, values: Values) -> int:
    # The original embedded texts of any length that fits into the context, whatever the batch size.
    return min(max(_slot_context(ctx_size, values), 1), MAX_BATCH_ROWS)


def read_tensor_split(text: str) -> tuple[float, ...]:
    """Proportions from a list with commas. An item that is not a finite number from 0 on counts as 0, as it did in the
    original."""

    def share(item: str) -> float:
        try:
            value = float(item)
        except ValueError:
            return 0.0
        return value if math.isfinite(value) and value >= 0 else 0.0

    return tuple(share(item) for item in text.split(",")) if text else ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a drop-in command line asks for."""

    model: ModelConfig
    engine: EngineConfig
    port: int


FLAGS: Final = FlagSet(
    (
        _flag("model", "", "path of the model, a GGUF file", _model("path", _read_model)),
        _flag(
            "mmproj",
            "",
            "path of the projector for images",
            _model("projector", lambda path, values: path or None),
        ),
        _flag("parallel", 1, "requests that run at once", _engine("slots", _read_parallel)),
        _flag("batch-size", 512, "rows of one batch", _engine("batch_size")),
        _flag(
            "n-gpu-layers", 0, "layers to put on the GPU", _model("gpu_layers", lambda layers, values: max(layers, -1))
        ),
        _flag("main-gpu", 0, "the GPU for what is not split", _model("main_gpu")),
        _flag(
            "flash-attn",
            False,
            "use flash attention",
            _engine("flash_attention", lambda on, values: "on" if on else "auto"),
        ),
        _flag(
            "ctx-size",
            2048,
            "tokens of context, all requests together",
            _engine("context_length", _slot_context),
            _engine("embedding_batch_size", _embedding_rows),
        ),
        _flag(
            "lora",
            "",
            "path of a LoRA adapter",
            _model("adapters", lambda path, values: (AdapterConfig(path),) if path else ()),
        ),
        _flag("port", 8080, "port to listen on, on 127.0.0.1", Setting(Settings, "port", _read_port)),
        _flag(
            "threads",
            0,
            "threads that compute; 0 chooses",
            _engine("threads", lambda threads, values: min(threads, MAX_THREADS) if threads > 0 else None),
        ),
        _flag("verbose", False, "log more"),
        _flag(
            "no-mmap",
            False,
            "read the model instead of mapping it",
            _model("mmap", lambda no_mmap, values: not no_mmap and not values["lora"]),
        ),
        _flag("mlock", False, "keep the model out of swap", _model("mlock")),
        _flag(
            "tensor-split",
            "",
            "proportions of the model per GPU, separated by commas",
            _model("tensor_split", lambda text, values: read_tensor_split(text)),
        ),
        _flag("requirements", False, "print what this runner needs as JSON and exit"),
        _flag("multiuser-cache", False, "ignored: the cache is always for many users"),
        _flag("embedding", False, "ignored"),
        _flag("log-disable", False, "ignored"),
        _flag("memory-f32", False, "ignored"),
        # The original did not know this flag, and ended with an error where its own server gave it.
        _flag("numa", "", "ignored"),
    )
)
"""To add a flag, add one entry: its name, its default, its usage, and the fields that it sets."""


def read_settings(values: Values) -> Settings:
    """Translate the values of all flags. Raises `ValueError` or `LoadError` if no engine can have them."""
    fields: dict[type[Any], dict[str, Any]] = {ModelConfig: {}, EngineConfig: {}, Settings: {}}
    for flag in FLAGS.flags:
        for setting in flag.settings if isinstance(flag, DropinFlag) else ():
            fields[setting.config][setting.field] = setting.read(values[flag.name], values)
    return Settings(ModelConfig(**fields[ModelConfig]), EngineConfig(**fields[EngineConfig]), **fields[Settings])


# ---- the program -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], program: str = "trio-runner") -> int:
    """Run the drop-in mode and return its exit code."""
    try:
        values, _ = FLAGS.parse(arguments)  # as in the original, arguments after the flags are ignored
    except HelpRequested:
        sys.stderr.write(FLAGS.describe(program))
        return 0
    except FlagError as error:
        sys.stderr.write(f"{error}\n{FLAGS.describe(program)}")
        return 2
    if values["requirements"]:
        sys.stdout.write(requirements())
        return 0
    set_up_slog(verbose=bool(values["verbose"]))
    try:
        settings = read_settings(values)
    except (ValueError, RunnerError) as error:
        print(f"{LOAD_ERROR if isinstance(error, LoadError) else 'error: '}{error}", file=sys.stderr)
        return 1

    app = AppWatch(pid=os.getppid())  # now, because the parent may be gone after the imports
    # These imports are slow, and everything above works without the native library.
    from trio_runner.cli.running import run_to_exit_code
    from trio_runner.cli.service import ServiceConfig, max_body_bytes, run_service

    logger.info("starting trio runner")
    service = ServiceConfig(
        host="127.0.0.1",
        port=settings.port,
        drain_timeout=1.0,
        max_body_bytes=max_body_bytes(settings.model),
        app=app,
    )

    async def serve() -> None:
        await run_service(settings.model, settings.engine, service)

    return run_to_exit_code(serve, load_error=LOAD_ERROR)


def requirements() -> str:
    """One line of JSON about this build and this machine."""
    from trio_runner.llama.library import system_info

    facts = {"cpu_features": cpu_features(system_info()), "system_info": system_info(), "version": __version__}
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"


def cpu_features(system_info: str) -> str:
    """The instruction sets in use, as "avx,avx2", from llama.cpp's line "CPU : AVX = 1 | AVX2 = 1 | ..."."""
    items = [item.rpartition(":")[2].split("=") for item in system_info.split("|")]
    present = [item[0].strip().lower() for item in items if len(item) == 2 and item[1].strip() == "1"]
    return ",".join(name for name in present if name not in _NOT_OF_THE_CPU)


_NOT_OF_THE_CPU: Final = ("llamafile", "repack", "openmp")
"""Features of the build that are in the same line."""
