"""JSON schemas, compiled by llguidance: a package of its own, which need not be there.

The package is a Python module that exports a C interface too. Python only loads it and tells the shim where the
functions are. What is sampled under a schema never comes through Python.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict
from typing import Any, Final

from trio_runner.core.schema import guided_schema
from trio_runner.errors import InvalidGrammar, InvalidRequest
from trio_runner.llama.library import check, native

VERSION: Final = "1.9"
"""The version of llguidance whose structs native/schema.cpp declares."""
MAX_SCHEMAS: Final = 32
"""Compiled schemas that one model keeps. The one that was used least recently is dropped for another."""

_FUNCTIONS: Final = (
    "llg_new_tokenizer_v2",
    "llg_free_tokenizer",
    "llg_new_matcher",
    "llg_clone_matcher",
    "llg_free_matcher",
    "llg_matcher_compute_mask_into",
    "llg_matcher_consume_token",
    "llg_matcher_is_stopped",
    "llg_matcher_get_error",
    "llg_matcher_get_cancellation_handle",
    "llg_cancel",
    "llg_free_cancellation_handle",
)
"""What trio_schema_functions has, in its order."""


class Schemas:
    """The compiled schemas of one model. Any thread may use it."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def has(self, text: str) -> bool:
        """Whether the schema is compiled already."""
        return text in self._compiled

    def compiled(self, model: Any, text: str) -> Any:
        """The trio_schema of the shim's trio_model `model`.

        Compiles the schema if that was not done yet, which blocks for milliseconds or, for the first schema of a model,
        for a tenth of a second or more.

        Raises `InvalidGrammar` for a schema that cannot be honoured, and `InvalidRequest` if llguidance is missing.
        """
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        schema = _compile(model, text)
        with self._lock:
            if not self._closed:  # it may have been closed meanwhile
                self._compiled[text] = schema
            while len(self._compiled) > MAX_SCHEMAS:
                self._compiled.popitem(last=False)
        return schema

    def close(self) -> None:
        """Forget all schemas, and keep no more: each keeps the memory of its model."""
        with self._lock:
            self._closed = True
            self._compiled.clear()


def _compile(model: Any, text: str) -> Any:
    load_llguidance()
    loaded = native()
    out = loaded.ffi.new("trio_schema **")
    code = loaded.lib.trio_schema_open(model, guided_schema(text).encode(), out)
    try:
        check("trio_schema_open", code)
    except InvalidGrammar as failure:
        raise InvalidGrammar(f"json_schema cannot be honoured: {failure}", param="json_schema") from None
    return loaded.ffi.gc(out[0], loaded.lib.trio_schema_free)


def load_llguidance() -> None:
    """Load llguidance, and tell the shim where its functions are. Raises `InvalidRequest`, which says how to get it, if
    it is missing or has another version."""
    reason = _load()
    if reason:
        raise InvalidRequest(
            f"json_schema needs the package llguidance {VERSION}, {reason}: pip install 'trio-runner[schema]'",
            param="json_schema",
        )


@functools.cache
def _load() -> str:
    """Why llguidance cannot be used; "" if it can."""
    try:
        from llguidance import _lib
    except ImportError:
        return "which is not installed"
    try:
        # The module is loaded already, so this opens nothing new.
        library = ctypes.CDLL(_lib.__file__)
        library.llg_get_version.restype = ctypes.c_char_p
        version = (library.llg_get_version() or b"").decode(errors="replace")
        if not version.startswith(f"llguidance@{VERSION}."):
            return f"but this is {version[:40]}"
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS]
    except (AttributeError, OSError):
        return "but this one has no C interface"
    loaded = native()
    functions = loaded.ffi.new("trio_schema_functions *", [loaded.ffi.cast("void *", at) for at in addresses])
    check("trio_schema_use", loaded.lib.trio_schema_use(functions))
    return ""
