"""One server with the default model, in a process of its own, for the clients that people use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import trio

from tests.cli.programs import ROOT

DEADLINE = 60.0
"""Seconds that anything may take on a busy machine."""
N_CTX = 256


@dataclass(frozen=True, slots=True)
class Service:
    """The server."""

    url: str

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the numbers of GET /statistics meet the condition. Returns them."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            with trio.fail_after(DEADLINE):
                while True:
                    statistics: dict[str, Any] = (await client.get("/statistics")).json()
                    if condition(statistics):
                        return statistics
                    await trio.sleep(0.005)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The server, shared by all tests of a run. It ends with its stdin, and so with the tests in any case."""
    command = [sys.executable, "-m", "trio_runner", "serve", "--port=0", "--announce", "--exit-with-stdin"]
    options = [
        *["--model=default", f"--mmproj={ROOT / 'tests' / 'data' / 'mmproj-shapes.gguf'}", "--alias=smol"],
        *["--slots=2", f"--context-length={N_CTX}", "--threads=1", "--device=none"],
    ]
    with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Service(json.loads(process.stdout.readline())["url"])
        finally:
            process.stdin.close()
            process.wait(DEADLINE)
