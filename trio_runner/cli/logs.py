"""How the program logs to stderr: for people, for programs, or as the original runner does."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]

_OF_EVERY_RECORD: Final = frozenset(
    [*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName"]
)
"""Attributes of a record that are not from `extra`: those that it is made with, and those that it may get later."""


def set_up_logging(verbose: int, *, base: int = logging.WARNING, log_format: LogFormat = "text") -> None:
    """Log to stderr, for people or as JSON. Every -v lowers the level by one. llama.cpp logs a lot, so its lines need
    one more -v. As JSON, warnings of Python and exceptions that nothing catches are logged too."""
    levels = [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG]
    index = min(levels.index(base) + verbose, 3)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=levels[index], handlers=[handler], force=True)
    if log_format == "json":
        _log_what_python_prints()
    logging.getLogger("trio_runner.llama").setLevel(levels[index - 1 if verbose < 2 else index])
    for name in ("httpx", "httpx2", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _log_what_python_prints() -> None:
    """Log what Python would print on stderr: warnings, and exceptions that nothing catches."""
    logger = logging.getLogger("trio_runner")

    def uncaught(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        logger.critical("an exception was not caught", exc_info=(kind, value, traceback))

    def uncaught_on_thread(args: threading.ExceptHookArgs) -> None:
        value = args.exc_value or args.exc_type()
        name = args.thread.name if args.thread is not None else "a thread"
        logger.critical("an exception was not caught on %s", name, exc_info=value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        logger.error("an exception was ignored: %s", args.err_msg or args.object, exc_info=args.exc_value)

    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, uncaught_on_thread, unraisable


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object on one line, in ASCII.

    It has what was passed as `extra`, then `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `exception` and
    `stack` where there is a traceback or a stack. A field of `extra` with the name of one of these is replaced. A value
    that JSON does not have is its text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end. Never raises for what is in `extra`."""
        extra = {str(name): value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["exception"] = record.exc_text
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        try:
            return json.dumps({**extra, **fields}, default=str, allow_nan=False)
        except (TypeError, ValueError, RecursionError):  # NaN, keys that are no text, an object inside itself
            return json.dumps({**{name: repr(value) for name, value in extra.items()}, **fields})


def set_up_slog(*, verbose: bool) -> None:
    """Log to stderr in the format of the original runner."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SlogFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    if not verbose:
        logging.getLogger("trio_runner.llama").setLevel(logging.WARNING)


class SlogFormatter(logging.Formatter):
    """Formats lines as the text handler of Go's `slog` package does."""

    def format(self, record: logging.LogRecord) -> str:
        """One line per record. A traceback is quoted with the message."""
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
