"""Tests of the build in good and bad surroundings. Nothing here compiles llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from native.build import pep517

NO_ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CMAKE_ARGS", "TRIO_RUNNER_BACKENDS", "TRIO_RUNNER_LLAMA_SOURCE")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and none of the variables that change a build."""
    for name in (*NO_ENVIRONMENT, "TRIO_RUNNER_CPU_VARIANTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pep517, "_settings", {})
