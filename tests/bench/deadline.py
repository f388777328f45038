"""A deadline for tests that wait for child processes without trio."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

SECONDS = 240
"""Generous, because the machines that run tests are busy."""


@pytest.fixture
def deadline() -> Iterator[None]:
    """Raises TimeoutError in the test if it takes too long."""

    def too_slow(_number: int, _frame: object) -> None:
        raise TimeoutError(f"the test has taken {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
