"""What pip and setuptools call: the PEP 517 hooks, which wrap those of setuptools, and the arguments of setup().

build_llama.py is the backend that pyproject.toml names, and passes these hooks on.
"""

from __future__ import annotations

import atexit
import contextlib
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from native.build.config import PACKAGE, BuildError, Selection
from native.build.pipeline import build
from native.build.tools import BUILD_TOOLS, find_build_tool

Settings = Mapping[str, Any] | None
"""What the user passes with ``pip install -C backends=cpu,vulkan .``"""

_settings: dict[str, str] = {}  # of the hook that is running; setup.py runs inside it


def setup_arguments() -> dict[str, Any]:
    """What setup.py passes to setuptools.setup()."""
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    class BuildNative(build_ext):  # type: ignore[misc, unused-ignore]  # older setuptools are not typed
        """Builds everything at once instead of one extension after the other, and reports the files."""

        _files: tuple[Path, ...] = ()

        def run(self) -> None:
            in_place = self.inplace or getattr(self, "editable_mode", False)
            package = PACKAGE if in_place else Path(self.build_lib) / PACKAGE.name
            self._files = tuple(build(Selection.read(_settings), package))

        def get_outputs(self) -> list[str]:
            return [str(path) for path in self._files]

        def get_output_mapping(self) -> dict[str, str]:
            return {}

    # Setuptools would put whatever an earlier build left in build/ into the wheel, so each build gets a fresh one.
    scratch = tempfile.mkdtemp(prefix="trio-runner-build-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    wheel = {"py_limited_api": "cp311"}
    if sys.platform == "darwin":  # a universal Python, too, builds for this machine only
        wheel["plat_name"] = sysconfig.get_platform().replace("universal2", platform.machine())
    return {
        "ext_modules": [Extension("trio_runner._native", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": BuildNative},
        "options": {"build": {"build_base": scratch}, "bdist_wheel": wheel},
    }


@contextlib.contextmanager
def hook(config_settings: Settings) -> Iterator[Any]:
    """Yields setuptools' hooks. A `BuildError` ends the process with its message, which pip shows, and no traceback."""
    from setuptools import build_meta

    for name in ("backends", "cpu-variants"):
        value = (config_settings or {}).get(name, "")
        _settings[name] = value if isinstance(value, str) else ",".join(value)
    try:
        yield build_meta
    except BuildError as error:
        raise SystemExit(f"build_llama: {error}") from None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """cmake and ninja, each only if the machine has none of its own that is new enough."""
    return [name for name in BUILD_TOOLS if find_build_tool(name) is None]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    with hook(config_settings) as setuptools:
        return str(setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    with hook(config_settings) as setuptools:
        return str(setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with hook(config_settings) as setuptools:
        return str(setuptools.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    with hook(config_settings) as setuptools:
        return str(setuptools.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    with hook(config_settings) as setuptools:
        return str(setuptools.build_sdist(sdist_directory, config_settings))
