"""The drop-in mode: the command line and the start of the runner that an older Ollama server spawns.

Chosen by a first argument that begins with a dash. The flags are the original's, the ignored ones too, in Go's syntax.
Where the original would have crashed later we say `error: ...` on stderr, which such a server scans, and exit with 1:
a model that does not load, an address that is taken, values that no engine can have. A wrong command line exits with 2
and -h with 0, as Go programs do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trio_runner import __version__
from trio_runner.config import MAX_BATCH_ROWS, MAX_THREADS, AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import LoadError, RunnerError
from trio_runner.go_flags import Flag, FlagError, FlagSet, HelpRequested, Value

logger = logging.getLogger(__name__)

FLAGS = FlagSet(
    (
        Flag("model", "", "path of the model, a GGUF file"),
        Flag("mmproj", "", "path of the projector for images"),
        Flag("parallel", 1, "requests that run at once"),
        Flag("batch-size", 512, "rows of one batch"),
        Flag("n-gpu-layers", 0, "layers to put on the GPU"),
        Flag("main-gpu", 0, "the GPU for what is not split"),
        Flag("flash-attn", False, "use flash attention"),
        Flag("ctx-size", 2048, "tokens of context, all requests together"),
        Flag("lora", "", "path of a LoRA adapter"),
        Flag("port", 8080, "port to listen on, on 127.0.0.1"),
        Flag("threads", 0, "threads that compute; 0 chooses"),
        Flag("verbose", False, "log more"),
        Flag("no-mmap", False, "read the model instead of mapping it"),
        Flag("mlock", False, "keep the model out of swap"),
        Flag("tensor-split", "", "proportions of the model per GPU, separated by commas"),
        Flag("requirements", False, "print what this runner needs as JSON and exit"),
        Flag("multiuser-cache", False, "ignored: the cache is always for many users"),
        Flag("embedding", False, "ignored"),
        Flag("log-disable", False, "ignored"),
        Flag("memory-f32", False, "ignored"),
        Flag("numa", "", "ignored"),  # the original lacked it and died of the server's --numa
    )
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a drop-in command line means to us."""

    model: ModelConfig
    engine: EngineConfig
    port: int


def main(arguments: Sequence[str], program: str = "trio-runner") -> int:
    """Run the drop-in mode to its exit code."""
    try:
        values, _ = FLAGS.parse(arguments)  # as the original, deaf to what follows the flags
    except HelpRequested:
        sys.stderr.write(FLAGS.describe(program))
        return 0
    except FlagError as error:
        sys.stderr.write(f"{error}\n{FLAGS.describe(program)}")
        return 2
    if values["requirements"]:
        sys.stdout.write(requirements())
        return 0
    set_up_logging(verbose=bool(values["verbose"]))
    try:
        settings = read_settings(values)
    except (ValueError, RunnerError) as error:
        print(f"{_prefix(error)}{error}", file=sys.stderr)
        return 1

    parent = os.getppid()  # before it can be gone
    # Slow imports, and all that is above works without the native library.
    from trio_runner.service import ServiceConfig, max_body_bytes, run_service, run_to_exit_code

    logger.info("starting trio runner")
    service = ServiceConfig(
        host="127.0.0.1",
        port=settings.port,
        drain_timeout=1.0,
        max_body_bytes=max_body_bytes(settings.model),
        parent=parent,
    )

    async def serve() -> None:
        await run_service(settings.model, settings.engine, service)

    return run_to_exit_code(serve, load_error=LOAD_ERROR)


LOAD_ERROR = "error: error loading model "
"""What an Ollama server looks for on stderr; it shows what follows to its user."""


def _prefix(error: Exception) -> str:
    return LOAD_ERROR if isinstance(error, LoadError) else "error: "


def read_settings(values: Mapping[str, Value]) -> Settings:
    """Translate the parsed flags. Raises `ValueError` or `LoadError` where they cannot be had."""
    model, lora, tensor_split = str(values["model"]), str(values["lora"]), str(values["tensor-split"])
    parallel, threads = int(values["parallel"]), int(values["threads"])
    if not model:
        raise LoadError("--model is missing")
    if parallel < 1:
        raise ValueError("parallel must be 1 or more")
    port = int(values["port"])
    if not 0 <= port <= 65535:
        raise ValueError("port must be between 0 and 65535")
    return Settings(
        ModelConfig(
            path=model,
            projector=str(values["mmproj"]) or None,
            adapters=(AdapterConfig(lora),) if lora else (),
            gpu_layers=max(int(values["n-gpu-layers"]), -1),
            main_gpu=int(values["main-gpu"]),
            tensor_split=read_tensor_split(tensor_split),
            mmap=not values["no-mmap"] and not lora,
            mlock=bool(values["mlock"]),
        ),
        EngineConfig(
            slots=parallel,
            context_length=int(values["ctx-size"]) // parallel,
            batch_size=int(values["batch-size"]),
            # The original embedded texts of any length that fits into the context, whatever the batch size.
            embedding_batch_size=min(max(int(values["ctx-size"]) // parallel, 1), MAX_BATCH_ROWS),
            threads=min(threads, MAX_THREADS) if threads > 0 else None,
            flash_attention="on" if values["flash-attn"] else "auto",
        ),
        port,
    )


def read_tensor_split(text: str) -> tuple[float, ...]:
    """Comma-separated proportions; an item that is no such number counts as 0, as it did in the original."""

    def share(item: str) -> float:
        try:
            value = float(item)
        except ValueError:
            return 0.0
        return value if math.isfinite(value) and value >= 0 else 0.0

    return tuple(share(item) for item in text.split(",")) if text else ()


def requirements() -> str:
    """One line of JSON about this build and this machine."""
    from trio_runner.llama.library import system_info

    facts = {"cpu_features": cpu_features(system_info()), "system_info": system_info(), "version": __version__}
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"


def cpu_features(system_info: str) -> str:
    """The instruction sets in use, from llama.cpp's line "CPU : AVX = 1 | AVX2 = 1 | ...", as "avx,avx2"."""
    items = [item.rpartition(":")[2].split("=") for item in system_info.split("|")]
    present = [item[0].strip().lower() for item in items if len(item) == 2 and item[1].strip() == "1"]
    return ",".join(name for name in present if name not in ("llamafile", "repack", "openmp"))  # of the build


class SlogFormatter(logging.Formatter):
    """Lines as Go's `slog` text handler writes them."""

    def format(self, record: logging.LogRecord) -> str:
        """One line per record; a traceback is quoted with the message."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        zone = time.strftime("%z", time.localtime(record.created))
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        level = {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname)
        return (
            f"time={moment}.{int(record.msecs):03}{zone[:3]}:{zone[3:]} level={level} "
            f"source={record.filename}:{record.lineno} msg={json.dumps(message, ensure_ascii=False)}"
        )


def set_up_logging(*, verbose: bool) -> None:
    """Log to stderr in the original's format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SlogFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    if not verbose:
        logging.getLogger("trio_runner.llama").setLevel(logging.WARNING)
