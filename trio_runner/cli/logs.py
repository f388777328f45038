"""How the program logs to stderr: for people, or as the original runner does."""

from __future__ import annotations

import json
import logging
import sys
import time


def set_up_logging(verbose: int, *, base: int = logging.WARNING) -> None:
    """Log to stderr for people. Every -v lowers the level by one. llama.cpp logs a lot, so its lines need one more
    -v."""
    levels = [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG]
    index = min(levels.index(base) + verbose, 3)
    logging.basicConfig(
        level=levels[index],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    if verbose < 2:
        logging.getLogger("trio_runner.llama").setLevel(levels[index - 1])
    for name in ("httpx", "httpx2", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


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
