"""Compiling: CMake where something about it changed, then Ninja."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from native.build.config import (
    BACKENDS,
    DEFAULT_BACKENDS,
    LIBRARIES,
    NATIVE,
    OPTIONS,
    PROGRAMS,
    SOURCE_PARTS,
    BuildError,
    Selection,
)
from native.build.directory import BuildDirectory, program_path
from native.build.progress import Progress, explain, run
from native.build.source import ensure_source
from native.build.tools import BuildTools, default_jobs


class ConfigureError(Exception):
    """CMake failed. The message is what it printed, in short."""


def compile_libraries(directory: BuildDirectory, selection: Selection, programs: Sequence[str] = ()) -> Path:
    """Bring the selected libraries and programs up to date in the build directory. Returns the llama.cpp tree.

    What CMake has once defined stays defined, as long as the tools for it are there: Ninja forgets what it knows of
    targets that are gone, and would compile them again when they come back. So going to and fro between selections
    compiles nothing. Raises `BuildError`.
    """
    configured = directory.path / "configured.json"
    tools = BuildTools.find(configured)
    wanted = {*selection.backends, *programs, *(name for program in programs for name in PROGRAMS[program].backends)}
    before = defined_before(configured)
    compilers = {"CC": shlex.join(directory.compilers.c), "CXX": shlex.join(directory.compilers.cxx)}
    env = os.environ | compilers | {"PATH": tools.path}
    if not wanted <= before:
        require_backends(selection, wanted, tools, env, directory.log)
    parts = (*SOURCE_PARTS, *(part for program in programs for part in PROGRAMS[program].parts))
    source = directory.source or ensure_source(directory.pin, directory.log, parts)
    targets = [*selection.targets]
    for program in programs:
        targets += [PROGRAMS[program].target, *(f"ggml-{name}" for name in PROGRAMS[program].backends)]
    attempts = list(dict.fromkeys([frozenset(wanted | before), frozenset(wanted)]))
    for defined in attempts:
        try:
            configure(directory, source, selection.options(defined), defined, tools, env)
            compile_targets(directory, targets, tools)
            break
        except ConfigureError as error:
            configured.unlink(missing_ok=True)
            (directory.cmake / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers what it did not find
            if defined == attempts[-1]:
                require_backends(selection, wanted, tools, env, directory.log)  # a tool may have been removed
                raise BuildError(str(error)) from None
    remove_stale_plugins(directory, selection)
    return source


def defined_before(configured: Path) -> set[str]:
    """The backends and programs that the build directory knows, from the file that `configure` left."""
    try:
        return set(json.loads(configured.read_text("utf-8"))["defined"]) & {*BACKENDS, *PROGRAMS}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def cmake_command(tools: BuildTools, source: Path, directory: Path, options: Mapping[str, str]) -> list[str]:
    command = [tools.cmake, "-S", str(source), "-B", str(directory), "-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    return [*command, f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]


def configure(
    directory: BuildDirectory,
    source: Path,
    selected: Mapping[str, str],
    defined: Collection[str],
    tools: BuildTools,
    env: Mapping[str, str],
) -> None:
    """Run CMake, unless it was last run with the same options. Raises `ConfigureError`.

    `selected` are the options that define the backends and programs `defined`.
    """
    options = {**OPTIONS, **selected}
    options |= {
        "LLAMA_BUILD_COMMIT": "local" if directory.source else directory.pin.commit,
        "LLAMA_SOURCE": str(source),
        "SOURCE_PREFIX": str(source),
        "TRIO_PATCHES": str(directory.patches),
    }
    command = cmake_command(tools, directory.native, directory.cmake, options)
    state = json.dumps({"tools": dataclasses.asdict(tools), "command": command, "defined": sorted(defined)})
    configured = directory.path / "configured.json"
    # A tree of the user's own may have changed in ways that only CMake sees.
    if directory.source is None and configured.exists() and configured.read_text("utf-8") == state:
        return
    configured.unlink(missing_ok=True)
    status, output = run(command, directory.log, Progress("configuring"), env)
    if status != 0:
        raise ConfigureError(explain("configuring", output, directory.log))
    configured.write_text(state, "utf-8")


def compile_targets(directory: BuildDirectory, targets: Sequence[str], tools: BuildTools) -> None:
    """Run Ninja, which runs CMake first if one of its files changed. Raises `BuildError` or `ConfigureError`."""
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(default_jobs())
    command = [tools.ninja, "-C", str(directory.cmake), f"-j{jobs}", *targets]
    env = os.environ | {"NINJA_STATUS": "[%f/%t] ", "PATH": tools.path}
    status, output = run(command, directory.log, Progress("compiling"), env)
    if status != 0:
        error = explain("compiling", output, directory.log)
        raise ConfigureError(error) if "rebuilding 'build.ninja'" in output else error


def remove_stale_plugins(directory: BuildDirectory, selection: Selection) -> None:
    """Remove the plugins that earlier selections left beside the programs.

    A program opens every plugin in its own directory and keeps the CPU plugin that suits the machine best: it would
    run one that this selection leaves out, perhaps on purpose, such as instructions that a hypervisor forbids. Their
    objects stay, so another build links such a plugin again in a second.
    """
    kept = {*LIBRARIES, *selection.plugins}
    for name, program in PROGRAMS.items():
        if program_path(directory.path, name).exists():
            kept |= {f"ggml-{backend}" for backend in program.backends}
    for path in (directory.cmake / "bin").glob("libggml-*"):
        if path.name.removeprefix("lib").removesuffix(".so").removesuffix(".dylib") not in kept:
            path.unlink()


LACK = re.compile(r"trio lacks: ([^|]+)\|([^|]+)\|(.*)")


def require_backends(
    selection: Selection, wanted: Collection[str], tools: BuildTools, env: Mapping[str, str], log: Path
) -> None:
    """Raises `BuildError`, with all that these backends need and native/backends.cmake does not find in one line.

    CMake looks as it will in the build: things are found wherever CMAKE_ARGS and the environment say. If CMake itself
    fails here, nothing is raised: the build will fail in the same way, and say why.
    """
    if not set(wanted) - {*DEFAULT_BACKENDS, *PROGRAMS}:
        return
    with tempfile.TemporaryDirectory(prefix="trio-runner-backends-") as scratch:
        options = selection.options(wanted) | {"TRIO_CHECK_ONLY": "ON"}
        _, output = run(cmake_command(tools, NATIVE, Path(scratch), options), log, Progress("looking for tools"), env)
    needs: dict[str, list[str]] = {}
    packages: dict[str, None] = {}
    for backend, what, package in LACK.findall(output):
        needs.setdefault(backend, []).append(what)
        packages |= dict.fromkeys(package.split())
    if needs:
        line = "; ".join(f"{backend} needs {', '.join(things)}" for backend, things in needs.items())
        raise BuildError(line + (f" (on Debian: sudo apt install {' '.join(packages)})" if packages else ""))
