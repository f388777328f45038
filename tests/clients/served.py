"""One server with the default model, in a process of its own, for clients that other people wrote."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trio_runner.models import DEFAULT_MODEL, resolve_model

DEADLINE: Final = 60.0
"""Seconds that anything may take on a busy machine."""
DATA: Final = Path(__file__).parent.parent / "data"
SLOTS: Final = 4
QUEUE: Final = 4
CONTEXT: Final = 1024
MODEL: Final = DEFAULT_MODEL.name


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with urllib.request.urlopen(self.url + path, timeout=DEADLINE) as answer:
            return json.load(answer)

    @property
    def statistics(self) -> dict[str, Any]:
        """How busy the server is."""
        statistics: dict[str, Any] = self.get("/statistics")
        return statistics

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Poll the statistics until they meet `condition`, and return them."""
        deadline = time.monotonic() + DEADLINE
        while not condition(statistics := self.statistics):
            assert time.monotonic() < deadline, f"waiting until {what}: {statistics}"
            time.sleep(0.002)
        return statistics

    def wait_until_idle(self) -> None:
        """Poll until no request is left."""
        self.wait_until(lambda statistics: statistics["generations"] == 0, "no request is left")


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    """A server with the default model, which is loaded when the block begins."""
    limits = ("--slots", str(SLOTS), "--max-queue", str(QUEUE), "--context-length", str(CONTEXT), "--threads", "1")
    command = [sys.executable, "-m", "trio_runner", "serve", "--port", "0", "--announce", "--device", "none", *limits]
    process = subprocess.Popen(
        [*command, "--model", str(resolve_model(MODEL)), "--model-name", MODEL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        server = Served(json.loads(process.stdout.readline())["url"])
        server.get("/props")  # which is answered when the model is loaded
        yield server
    finally:
        process.terminate()
        process.wait(DEADLINE)
        assert process.stdout is not None
        process.stdout.close()
