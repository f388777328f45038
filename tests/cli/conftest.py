from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Let the program set up logging, and undo it."""
    root, native = logging.getLogger(), logging.getLogger("trio_runner.llama")
    before = root.handlers[:], root.level, native.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    native.setLevel(before[2])
