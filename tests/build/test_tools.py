"""Compilers, CMake, Ninja, disk space and the lock, on machines that have them or not."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from native.build import pep517, pipeline
from native.build.config import BuildError, Selection
from native.build.tools import BuildTools, locked
from tests.build.surroundings import SCRIPT, error_line, fake_tools, program, source_tree


def test_no_compiler() -> None:
    line = error_line([], PATH="")
    assert "no C compiler found" in line
    assert "install" in line


def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    broken = program(tmp_path / "broken", "exit 1")
    assert "no C++ compiler found" in error_line([], CXX=str(broken))


def test_no_cmake_and_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cc", "c++"):
        program(tmp_path / "bin" / name, "echo a compiler 1.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match=r"no cmake ninja new enough: run .*pip install"):
        pipeline.build(Selection.parse())
    assert pep517.get_requires_for_build_wheel() == ["cmake", "ninja"]
    program(tmp_path / "bin" / "ninja", "echo 1.11.1")
    program(tmp_path / "bin" / "cmake", "echo cmake version 3.4.1")
    assert pep517.get_requires_for_build_wheel() == ["cmake"]
    program(tmp_path / "bin" / "cmake", "echo cmake version 4.0.2")
    assert pep517.get_requires_for_build_wheel() == []


def test_a_build_directory_keeps_its_tools_while_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, versions in ((first, ("3.25.1", "1.11.1")), (second, ("4.1.0", "1.13.0"))):
        program(directory / "cmake", f"echo cmake version {versions[0]}")
        program(directory / "ninja", f"echo {versions[1]}")
    monkeypatch.setenv("PATH", str(first))
    remembered = tmp_path / "configured.json"
    tools = BuildTools.find(remembered)
    assert (tools.ninja, tools.ninja_version) == (str(first / "ninja"), "1.11.1")
    remembered.write_text(json.dumps({"tools": dataclasses.asdict(tools)}))
    monkeypatch.setenv("PATH", str(second))
    assert BuildTools.find(remembered) == tools
    program(first / "ninja", "echo 1.12.0")
    assert BuildTools.find(remembered).ninja == str(second / "ninja")
    remembered.write_text("half a fi")
    assert BuildTools.find(remembered).cmake_version == "cmake version 4.1.0"


def test_cmake_finds_the_ninja_beside_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / "venv"
    program(venv / "ninja", "echo 1.13.0")
    script = 'if [ "$1" = --version ]; then echo cmake version 4.1.0; else ninja --version; exit 1; fi'
    program(venv / "cmake", script)
    fake_tools(tmp_path / "bin", monkeypatch)
    for name in ("cmake", "ninja"):
        (tmp_path / "bin" / name).unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(venv / "python"))
    monkeypatch.setenv("TRIO_RUNNER_LLAMA_SOURCE", str(source_tree(tmp_path / "source")))
    with pytest.raises(BuildError, match=r"failed while configuring.*\n  1\.13\.0"):
        pipeline.build(Selection.parse())


def test_no_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"not enough disk space: .* needs 1.0 GB and .* has 0.1 GB free; make room"):
        pipeline.build(Selection.parse())


def test_the_disk_fills_up_during_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(pipeline, "sync", sync)
    with pytest.raises(BuildError, match=r"no disk space left for somewhere"):
        pipeline.build(Selection.parse())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "TRIO_RUNNER_CACHE" in error_line([], TRIO_RUNNER_CACHE=str(tmp_path / "file"))


def test_a_directory_that_is_not_llama_cpp(tmp_path: Path) -> None:
    line = error_line([], TRIO_RUNNER_LLAMA_SOURCE=str(tmp_path))
    assert f"TRIO_RUNNER_LLAMA_SOURCE={tmp_path} is not a llama.cpp source tree: it has no CMakeLists.txt" in line


def test_the_second_build_waits_for_the_first(tmp_path: Path) -> None:
    code = "import build_llama, pathlib, sys\nwith build_llama.locked(pathlib.Path(sys.argv[1])): print('in')"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with locked(tmp_path / "lock"):
        second = subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert "another build is running" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate(timeout=60) == ("in\n", "")
