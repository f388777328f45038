"""The cffi module trio_runner._native, which opens the shim to Python."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import sysconfig
from pathlib import Path

from native.build.config import BuildError
from native.build.directory import BuildDirectory, digest
from native.build.progress import Progress, explain, run

STABLE_ABI = 0x030B0000  # Python 3.11, the oldest we support


def declarations(header: str) -> str:
    """The part of the C header that cffi reads. Raises `BuildError` if it is not marked."""
    parts = re.split(r"^.*\bcdef: (?:begin|end)\b.*\n", header, flags=re.MULTILINE)
    if len(parts) != 3:
        raise BuildError("native/trio_llama.h must have a line with 'cdef: begin' and, after it, one with 'cdef: end'")
    return parts[1]


def build_binding(directory: BuildDirectory) -> Path:
    """Compile trio_runner._native, one module for every Python from 3.11 on, unless it exists. Returns its path.

    Raises `BuildError`.
    """
    try:
        import cffi
    except ImportError as error:
        raise BuildError(f"cffi is missing: run `{sys.executable} -m pip install cffi`") from error
    include = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if not Path(include[0], "Python.h").is_file():
        raise BuildError("the C headers of Python are missing: install them (on Debian: sudo apt install python3-dev)")
    header = (directory.native / "trio_llama.h").read_text("utf-8")
    key = digest(header, cffi.__version__, include, sys.version_info[:2], STABLE_ABI)[:16]
    binding = directory.path / f"binding-{key}" / "_native.abi3.so"
    if binding.exists():
        return binding
    ffi = cffi.FFI()
    ffi.cdef(declarations(header))
    ffi.set_source("trio_runner._native", '#include "trio_llama.h"\n', py_limited_api=True)
    binding.parent.mkdir(exist_ok=True)
    source = binding.parent / "_native.c"
    with contextlib.redirect_stdout(io.StringIO()):  # cffi prints what it writes
        ffi.emit_c_code(str(source))
    partial = binding.with_suffix(".partial")
    command = _compile_command(directory, source, partial, include)
    status, output = run(command, directory.log, Progress("compiling the binding"))
    if status != 0:
        raise explain("compiling the binding", output, directory.log)
    os.replace(partial, binding)
    return binding


def _compile_command(directory: BuildDirectory, source: Path, target: Path, include: list[str]) -> list[str]:
    command = [*directory.compilers.c, *shlex.split(os.environ.get("CFLAGS", "")), "-O2", "-fPIC", "-DNDEBUG"]
    command += [f"-DPy_LIMITED_API={STABLE_ABI:#x}", *(f"-I{path}" for path in [*include, directory.native])]
    if sys.platform == "darwin":
        command += ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/lib"]
    else:
        command += ["-shared", "-Wl,-rpath,$ORIGIN/lib", "-Wl,-s"]
    command += [str(source), *shlex.split(os.environ.get("LDFLAGS", "")), f"-L{directory.lib}", "-ltrio_llama"]
    return [*command, "-o", str(target)]
