"""From the build directory into the package: stripped libraries, the header, the licences, the cffi module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from native.build.config import Selection
from native.build.directory import BuildDirectory, library
from native.build.tools import find_tool


def stage(directory: BuildDirectory, source: Path, selection: Selection) -> None:
    """Copy what goes into the package to the build directory's lib: libraries (stripped), header, licences."""
    lib = directory.lib
    lib.mkdir(exist_ok=True)
    strip = find_tool("strip")
    for target in selection.targets:
        built = library(directory.cmake / "bin", target)
        staged = lib / built.name
        if not staged.exists() or staged.stat().st_mtime_ns != built.stat().st_mtime_ns:
            shutil.copy2(built, staged)
            if strip is not None:
                option = "-x" if sys.platform == "darwin" else "--strip-unneeded"
                subprocess.run([strip, option, str(staged)], check=True, stderr=subprocess.DEVNULL)
            os.utime(staged, ns=(built.stat().st_atime_ns, built.stat().st_mtime_ns))
    shutil.copy2(directory.native / "trio_llama.h", lib)
    notices = [source / "LICENSE", *sorted(source.glob("licenses/*")), *sorted(source.glob("vendor/**/LICENSE*"))]
    text = "".join(f"==== {notice.relative_to(source)} ====\n\n{notice.read_text('utf-8')}\n" for notice in notices)
    if not (lib / "LICENSES").exists() or (lib / "LICENSES").read_text("utf-8") != text:
        (lib / "LICENSES").write_text(text, "utf-8")


def install(lib: Path, selection: Selection, binding: Path, package: Path) -> list[Path]:
    """Copy staged files and the binding into the package where they differ. Returns the files of the package.

    Any other file in the package's lib/ is deleted.
    """
    target_lib = package / "lib"
    target_lib.mkdir(parents=True, exist_ok=True)
    sources = [library(lib, target) for target in selection.targets]
    sources += [lib / "trio_llama.h", lib / "LICENSES"]
    files = {target_lib / source.name: source for source in sources} | {package / binding.name: binding}
    for stale in set(target_lib.iterdir()) - files.keys():
        stale.unlink()
    for target, source in files.items():
        if not target.exists() or _state(target) != _state(source):
            partial = target.with_name(target.name + ".partial")
            shutil.copy2(source, partial)
            os.replace(partial, target)  # a process that has the old one mapped keeps it
    return list(files)


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns
