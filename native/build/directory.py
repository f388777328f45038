"""One build directory in the cache: which one a build uses, what lies where in it, and its copy of native/.

::

    <cache>/build/source/<sha256>/   llama.cpp, unpacked
    <cache>/build/<key>/native/      the C++ and CMake files of native/, copied: objects do not depend on where the
                                     checkout is
    <cache>/build/<key>/patches/     the files of native/patches/, copied. They are not in the copy of native/, because
                                     builds from before there were patches stop at a directory in there
    <cache>/build/<key>/cmake/       the CMake build directory; in its bin/ the programs that were asked for
    <cache>/build/<key>/lib/         the finished libraries, stripped
    <cache>/build/<key>/log.txt      what pip, CMake, Ninja and the compilers printed
    <cache>/build/<key>/binding-*/   the cffi module

<key> covers what would make every object different: source, options, compilers, platform, flags from the environment.
Within one directory Ninja keeps things up to date. So another backend or CPU variant, or a change of the shim, compiles
only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from native.build.config import OPTIONS, PROGRAMS, Pin, cache_directory
from native.build.source import local_source
from native.build.tools import Compilers


@dataclass(frozen=True, slots=True)
class BuildDirectory:
    """The directory <cache>/build/<key>, and what its key was made from."""

    pin: Pin
    source: Path | None
    """The tree of TRIO_RUNNER_LLAMA_SOURCE, or None: the one that the pin names."""
    compilers: Compilers

    @classmethod
    def find(cls) -> BuildDirectory:
        """The one for this environment. It need not exist. Raises `BuildError` if there are no compilers."""
        return cls(Pin.read(), local_source(), Compilers.find())

    @property
    def path(self) -> Path:
        return cache_directory() / "build" / tree_key(self.pin, self.source, self.compilers)

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def native(self) -> Path:
        return self.path / "native"

    @property
    def patches(self) -> Path:
        return self.path / "patches"

    @property
    def cmake(self) -> Path:
        return self.path / "cmake"

    @property
    def lib(self) -> Path:
        return self.path / "lib"


def where() -> Path:
    """The build directory for this environment. Raises `BuildError` if there are no compilers."""
    return BuildDirectory.find().path


def program_path(directory: Path, name: str) -> Path:
    """The file of a program of PROGRAMS: beside the libraries and plugins that it loads, which the package gets too."""
    return directory / "cmake" / "bin" / PROGRAMS[name].target


def library(directory: Path, name: str) -> Path:
    """The file of a library. Plugins are .so on macOS too."""
    path = directory / f"lib{name}.dylib"
    return path if path.exists() else path.with_suffix(".so")


def tree_key(pin: Pin, source: Path | None, compilers: Compilers) -> str:
    environment = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "MACOSX_DEPLOYMENT_TARGET")
    return digest(
        str(source) if source else pin.sha256,
        OPTIONS,
        compilers.c,
        compilers.cxx,
        compilers.identity,
        platform.system(),
        platform.machine(),
        {name: os.environ.get(name, "") for name in environment},
    )[:16]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


NATIVE_FILES = ("*.h", "*.c", "*.cpp", "*.cmake", "CMakeLists.txt")
"""The files that are compiled or read by CMake. Anything else in native/ may change without a rebuild."""


def sync(source: Path, target: Path, patterns: Sequence[str] = NATIVE_FILES) -> None:
    """Make `target` hold the files of `source` that match the patterns, and nothing else.

    Equal files keep their time, so that Ninja sees a change only where there is one.
    """
    target.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for pattern in patterns for path in source.glob(pattern)}
    for path in target.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        content = path.read_bytes()
        if not (target / name).exists() or (target / name).read_bytes() != content:
            (target / name).write_bytes(content)


def state(directory: Path) -> dict[str, str]:
    """The hash of every file in the directory, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
