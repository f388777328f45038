"""One build from beginning to end."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from native.build.binding import build_binding
from native.build.cmake import compile_libraries
from native.build.config import BACKENDS, NATIVE, BuildError, Selection, cache_directory
from native.build.directory import BuildDirectory, digest, state, sync
from native.build.install import install, stage
from native.build.tools import locked, require_space

_MAX_LOG_BYTES = 4_000_000


def build(selection: Selection, package: Path | None = None, programs: Sequence[str] = ()) -> list[Path]:
    """Bring the libraries and the binding up to date in the cache, and in a package directory if one is given.

    `programs` are built too, in the cache only. Returns the files of the package directory that belong to the build.
    Raises `BuildError`.
    """
    if os.name != "posix":
        raise BuildError("building is supported on Linux and macOS; on Windows, build inside WSL")
    directory = BuildDirectory.find()
    cache = cache_directory() / "build"
    try:
        with locked(cache / "lock"):
            _prepare(directory, selection)
            _compile(directory, selection, programs)
            binding = build_binding(directory)
            return install(directory.lib, selection, binding, package) if package else []
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BuildError(f"no disk space left for {error.filename or directory.path}: make room") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            hint = "set TRIO_RUNNER_CACHE to a directory that you can write"
            raise BuildError(f"cannot write {error.filename}: {hint}") from error
        raise


def _prepare(directory: BuildDirectory, selection: Selection) -> None:
    if not directory.lib.is_dir():
        gigabytes = 0.9 + sum(BACKENDS[name].gigabytes for name in selection.backends)
        require_space(directory.path.parent, gigabytes)
    directory.path.mkdir(parents=True, exist_ok=True)
    if directory.log.exists() and directory.log.stat().st_size > _MAX_LOG_BYTES:
        directory.log.unlink()
    sync(NATIVE, directory.native)
    sync(NATIVE / "patches", directory.patches)


def _compile(directory: BuildDirectory, selection: Selection, programs: Sequence[str]) -> None:
    """Compile, unless the very same was compiled last. Programs and a source tree of the user's own are always looked
    at: nothing here knows whether they changed."""
    files = state(directory.native), state(directory.patches)
    inputs = digest(files, selection.options(), selection.targets, str(directory.source))
    built = directory.path / "built.json"
    if not programs and directory.source is None and built.exists() and built.read_text("utf-8") == inputs:
        return
    built.unlink(missing_ok=True)
    source = compile_libraries(directory, selection, programs)
    stage(directory, source, selection)
    built.write_text(inputs, "utf-8")
