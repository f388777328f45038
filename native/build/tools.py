"""What the build finds on this machine: compilers, CMake, Ninja, disk space, and the lock between two builds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from native.build.config import BuildError
from native.build.progress import say


def find_tool(*names: str) -> str | None:
    """The first of these programs on PATH or beside this Python, where wheels such as cmake and ninja put theirs."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def tool_version(command: Sequence[str]) -> str:
    """The first line that a program prints for --version, or "" if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).partition("\n")[0] if done.returncode == 0 else ""


BUILD_TOOLS = {"cmake": (3, 18), "ninja": (1, 8)}
"""The oldest versions that will do. Wheels of these names carry newer ones."""


def find_build_tool(name: str) -> tuple[str, str] | None:
    """Path and version of cmake or ninja, if this machine has one that runs and is new enough."""
    path = find_tool(name)
    version = tool_version([path]) if path else ""
    number = re.search(r"(\d+)\.(\d+)", version)
    if path is None or number is None or (int(number[1]), int(number[2])) < BUILD_TOOLS[name]:
        return None
    return path, version


@dataclass(frozen=True, slots=True)
class BuildTools:
    """Paths and versions of CMake and Ninja."""

    cmake: str
    cmake_version: str
    ninja: str
    ninja_version: str

    @property
    def path(self) -> str:
        """The PATH to run them with. The generator of Vulkan's shaders is a CMake build of its own inside ours, and
        uses the Ninja that it finds there."""
        return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(self.ninja).parent)])

    @classmethod
    def find(cls, remembered: Path) -> BuildTools:
        """The tools that a build directory was made with if they are still there, else those of this machine.

        Other versions would work, but would compile everything again: one version of Ninja does not read the log of
        another, and one version of CMake does not write the commands of another. pip's isolated builds bring newer ones
        all the time. Raises `BuildError` if there are none.
        """
        with contextlib.suppress(OSError, ValueError, TypeError):
            tools = cls(**json.loads(remembered.read_text("utf-8"))["tools"])
            if (tools.cmake_version, tools.ninja_version) == (tool_version([tools.cmake]), tool_version([tools.ninja])):
                return tools
        found = {name: tool for name in BUILD_TOOLS if (tool := find_build_tool(name))}
        if missing := " ".join(name for name in BUILD_TOOLS if name not in found):
            raise BuildError(f"no {missing} new enough: run `{sys.executable} -m pip install --upgrade {missing}`")
        return cls(*found["cmake"], *found["ninja"])


@dataclass(frozen=True, slots=True)
class Compilers:
    """The commands of the C and the C++ compiler, and what they say their versions are."""

    c: tuple[str, ...]
    cxx: tuple[str, ...]
    identity: str

    @classmethod
    def find(cls) -> Compilers:
        """The compilers that CC and CXX name, else those on PATH. Raises `BuildError` if one does not run."""
        c = _compiler("CC", "cc", "gcc", "clang")
        cxx = _compiler("CXX", "c++", "g++", "clang++")
        versions = [tool_version(command) for command in (c, cxx)]
        if not all(versions):
            hint = "xcode-select --install" if sys.platform == "darwin" else "on Debian: sudo apt install g++"
            culprit = "C" if not versions[0] else "C++"
            raise BuildError(f"no {culprit} compiler found: install one ({hint}), or set CC and CXX")
        return cls(c, cxx, " | ".join(versions))


def _compiler(variable: str, *names: str) -> tuple[str, ...]:
    if chosen := os.environ.get(variable):
        return tuple(shlex.split(chosen))
    found = find_tool(*names)
    if found is None:
        return names[:1]
    # One compiler reached through several directories, such as /bin and /usr/bin, must not make two builds.
    home = os.path.join(os.path.dirname(os.path.realpath(found)), os.path.basename(found))
    return (home if os.path.exists(home) and os.path.samefile(home, found) else found,)


def default_jobs() -> int:
    """One compiler for each core that this process may use, but no more than fit into memory at one gigabyte each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError, AttributeError):
        cores = min(cores, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1_000_000_000)
    return max(1, cores)


def require_space(directory: Path, gigabytes: float) -> None:
    """Raises `BuildError` if the file system that will hold `directory` has less room than that."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free / 1e9
    if free < gigabytes:
        raise BuildError(
            f"not enough disk space: the build needs {gigabytes:.1f} GB and {directory} has {free:.1f} GB free; "
            "make room, or set TRIO_RUNNER_CACHE to a directory elsewhere"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes. It is released when the process ends, however that happens."""
    import fcntl  # not on Windows, where `build` refuses to run before it gets here

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
