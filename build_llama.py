"""Builds what trio_runner runs on: llama.cpp, our shim over it, and the cffi module that opens the shim to Python.

There are three ways in:

- ``python build_llama.py --inplace`` for people (``--help`` lists the options);
- ``pip install .``, ``pip install -e .``, ``pip wheel .``, which call the PEP 517 hooks named here;
- ``setup.py``, which setuptools runs for those hooks.

The work is done in native/build/. native/build/pipeline.py is one build from beginning to end, and
native/build/directory.py says what lies where in the cache, outside the checkout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Some versions of pip import this file without its directory on the path.
if (_root := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.insert(0, _root)

from native.build.config import (
    BACKENDS,
    DEFAULT_BACKENDS,
    PACKAGE,
    PROGRAMS,
    SOURCE_PARTS,
    BuildError,
    Pin,
    Selection,
    cache_directory,
    known_variants,
)
from native.build.directory import program_path, where
from native.build.pep517 import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
    setup_arguments,
)
from native.build.pipeline import build
from native.build.progress import say
from native.build.source import ensure_source, local_source
from native.build.tools import locked, require_space

__all__ = [
    "BuildError",
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "main",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "program_path",
    "setup_arguments",
    "where",
]


def argument_parser() -> argparse.ArgumentParser:
    _, variants = known_variants()
    parser = argparse.ArgumentParser(
        description="Builds llama.cpp, the shim and the cffi module in a cache outside the checkout.",
        epilog="environment: TRIO_RUNNER_CACHE (where to build), TRIO_RUNNER_LLAMA_SOURCE (a llama.cpp tree to build "
        "instead of the pinned one), TRIO_RUNNER_BACKENDS and TRIO_RUNNER_CPU_VARIANTS (defaults of the "
        "options), CMAKE_BUILD_PARALLEL_LEVEL (compilers at once), CMAKE_ARGS, CC, CXX, CFLAGS, CXXFLAGS, LDFLAGS.",
    )
    parser.add_argument(
        "--backends",
        metavar="NAME,...",
        help=f"plugins to build: {', '.join(BACKENDS)}; default is {','.join(DEFAULT_BACKENDS)}; cpu is always built",
    )
    parser.add_argument(
        "--cpu-variants",
        metavar="NAME,...",
        help=f"instruction sets to build the CPU plugin for: default, all, {', '.join(variants) or 'no others here'}",
    )
    parser.add_argument(
        "--inplace", action="store_true", help="copy the result into trio_runner/, to run from the checkout"
    )
    parser.add_argument(
        "--llama-server",
        action="store_true",
        help="also build llama.cpp's own server on the same libraries, to compare with, and print its path; it stays "
        "in the cache",
    )
    parser.add_argument(
        "--rpc-server",
        action="store_true",
        help="also build llama.cpp's server for backends on other machines, and print its path; it stays in the cache",
    )
    parser.add_argument("--fetch-only", action="store_true", help="only fetch and unpack llama.cpp")
    parser.add_argument("--where", action="store_true", help="print the directory that holds this build, build nothing")
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises `BuildError`."""
    selection = Selection.read({"backends": options.backends or "", "cpu-variants": options.cpu_variants or ""})
    programs = [name for name in PROGRAMS if getattr(options, name.replace("-", "_"))]
    if options.where:
        print(where())
    elif options.fetch_only:
        cache = cache_directory() / "build"
        with locked(cache / "lock"):
            require_space(cache, 0.3)
            parts = (*SOURCE_PARTS, *(part for name in programs for part in PROGRAMS[name].parts))
            print(local_source() or ensure_source(Pin.read(), cache / "fetch.txt", parts))
    else:
        started = time.monotonic()
        build(selection, PACKAGE if options.inplace else None, programs)
        say(f"up to date after {time.monotonic() - started:.1f} s")
        for name in programs:
            print(program_path(where(), name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    try:
        run(argument_parser().parse_args(arguments))
    except BuildError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; what is compiled so far is kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
