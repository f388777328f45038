"""The native library: loading it, its log, and its error codes as exceptions.

Importing this module loads nothing. The first call that needs the library loads it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trio_runner.errors import EngineClosed, InvalidGrammar, LoadError, NativeError, RunnerError

LIBRARY_DIRECTORY: Final = Path(__file__).resolve().parent.parent / "lib"
"""The directory of the shared libraries and the backend plugins."""

ABI: Final = 8
"""The TRIO_LLAMA_ABI that this binding was written for."""

logger = logging.getLogger("trio_runner.llama")

_LOG_LEVELS: Final = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_MAX_LINE_BYTES: Final = 8192
_MAX_MESSAGE_BYTES: Final = 4096
FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
"""The shim's numbers for the values of `EngineConfig.flash_attention`."""


@dataclass(frozen=True, slots=True)
class Native:
    """The two names of every cffi module. They are untyped, because the module is generated from a C header."""

    ffi: Any
    lib: Any


@functools.cache
def native() -> Native:
    """Load and initialise the library once. Raises ImportError if it is missing, and `LoadError` if it cannot start."""
    # ggml reads it when it is loaded. Without it, an abort would fork a debugger.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        module = importlib.import_module("trio_runner._native")
    except ImportError as failure:
        raise ImportError(
            "trio-runner's native library is missing: install trio-runner as a wheel, "
            f"or build it in this checkout with `python build_llama.py` ({failure})"
        ) from failure
    loaded = Native(module.ffi, module.lib)
    if loaded.lib.trio_abi_version() != ABI:
        raise ImportError(
            f"trio-runner's native library has ABI {loaded.lib.trio_abi_version()}, not {ABI}: build it again"
        )
    code = loaded.lib.trio_init(os.fsencode(LIBRARY_DIRECTORY), _native_log_level())
    if code < 0:
        raise _translate(loaded, "trio_init", code)
    _drain(loaded)
    return loaded


def _native_log_level() -> int:
    effective = logger.getEffectiveLevel()
    return next((native_level for native_level, level in _LOG_LEVELS.items() if level >= effective), 5)


def check(function: str, code: int) -> int:
    """Return `code`, which `function` of the shim has returned, or raise the exception that a negative code stands for.

    Call it on the same thread, before any other function of the shim. Raises `LoadError`, `InvalidGrammar`,
    `EngineClosed` for a cancelled load, and `NativeError` for everything else.
    """
    if code < 0:
        raise _translate(native(), function, code)
    return code


def check_file(function: str, code: int, path: str) -> None:
    """Check the code of a `function` that loads the file `path`.

    Raises `LoadError` that names the file, or `EngineClosed` if the load was cancelled.
    """
    try:
        check(function, code)
    except LoadError as failure:
        raise LoadError(failure.reason, path=path) from None
    except NativeError as failure:
        raise LoadError(failure.message, path=path) from failure


def last_error() -> str:
    """The shim's message about the last failure on this thread."""
    return _last_error(native())


def _last_error(loaded: Native) -> str:
    buffer = loaded.ffi.new("char[]", _MAX_MESSAGE_BYTES)
    loaded.lib.trio_last_error(buffer, _MAX_MESSAGE_BYTES)
    message: bytes = loaded.ffi.string(buffer)
    return message.decode(errors="replace").strip()


def _translate(loaded: Native, function: str, code: int) -> RunnerError:
    message = _last_error(loaded)
    _drain(loaded)
    if code == loaded.lib.TRIO_E_LOAD:
        return LoadError(message)
    if code == loaded.lib.TRIO_E_GRAMMAR:
        return InvalidGrammar(message)
    if code == loaded.lib.TRIO_E_CANCELLED:
        return EngineClosed(message)
    return NativeError(function, code, message)


def drain_log(*, at_most: int = logging.CRITICAL) -> None:
    """Pass what llama.cpp has logged to the logger `trio_runner.llama`. Levels above `at_most` are lowered to it.

    May be called from any thread.
    """
    _drain(native(), at_most)


def _drain(loaded: Native, at_most: int = logging.CRITICAL) -> None:
    buffer = loaded.ffi.new("char[]", _MAX_LINE_BYTES)
    level = loaded.ffi.new("int32_t *")
    while loaded.lib.trio_log_next(buffer, _MAX_LINE_BYTES, level) > 0:
        line: bytes = loaded.ffi.string(buffer)
        logger.log(min(_LOG_LEVELS.get(level[0], logging.INFO), at_most), "%s", line.decode(errors="replace").rstrip())


def read_text(function: str, *arguments: object) -> bytes:
    """Call a function of the shim whose last two arguments are a buffer for text and its size. Returns the text.

    Raises what `check` raises.
    """
    loaded = native()
    size = 256
    while True:
        buffer = loaded.ffi.new("char[]", size)
        length = check(function, getattr(loaded.lib, function)(*arguments, buffer, size))
        if length < size:
            return bytes(loaded.ffi.buffer(buffer, length))
        size = length + 1


def system_info() -> str:
    """llama.cpp's line about the compiled and the detected CPU features."""
    return read_text("trio_system_info").decode(errors="replace")
