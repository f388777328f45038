"""Helpers: programs that are shell scripts, source trees of a few files, and runs of build_llama.py that must fail."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_llama
from native.build.config import Pin

SCRIPT = Path(build_llama.__file__)


def program(path: Path, script: str) -> Path:
    """An executable shell script that needs nothing from PATH."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def source_tree(root: Path) -> Path:
    for name in ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt", "tools/mtmd/mtmd.h", "LICENSE"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def error_line(arguments: list[str], **environment: str) -> str:
    """Runs build_llama.py, which must fail, and returns the only line that it prints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("build_llama: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def fake_tools(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts fake compilers, a CMake that makes its build directory, and a Ninja first on PATH.

    `scripts` replace what they do.
    """
    for name, text in {"cc": "1.0", "c++": "1.0", "cmake": "cmake version 3.25.1", "ninja": "1.11.1"}.items():
        script = scripts.get(name, 'while [ "$1" != -B ]; do shift; done; mkdir -p "$2"')
        program(directory / name, f'if [ "$1" = --version ]; then echo {text}; exit 0; fi; {script}')
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def archive(path: Path, files: dict[str, bytes]) -> Pin:
    """Writes a source distribution. Returns the pin for it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1_000_000_000
            tar.addfile(member, io.BytesIO(content))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pin("some-package", "1.0", sha256, "abc", "their_backend.build")
