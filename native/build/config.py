"""What can be built, and what one build was asked for: backends, CPU variants, programs, CMake options, the source."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the unpacked source distribution."""
NATIVE = ROOT / "native"
PACKAGE = ROOT / "trio_runner"

LIBRARIES = ("trio_llama", "mtmd", "llama", "ggml", "ggml-base")
SOURCE_PARTS = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake/",
    "ggml/",
    "include/",
    "src/",
    "tools/mtmd/",
    "vendor/",
    "licenses/",
)
"""The files and directories of llama.cpp that every build needs."""

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",  # backends are plugins, opened at run time
    "GGML_NATIVE": "OFF",  # nothing is compiled for this machine only
    "GGML_OPENMP": "OFF",  # ggml's own threads can be told to stop; and there is no libgomp to ship
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_MTMD": "ON",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    "MTMD_VIDEO": "OFF",  # it would start ffmpeg on any buffer that is not an image
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",  # wheels cannot hold the usual symbolic links
}
"""CMake options of every build."""


class BuildError(Exception):
    """The build cannot go on. The message says what is wrong and what to do about it, in a line or a few."""


def cache_directory() -> Path:
    """The directory of everything that trio-runner makes and fetches. trio_runner/models.py has the same rule."""
    if chosen := os.environ.get("TRIO_RUNNER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-runner"


@dataclass(frozen=True, slots=True)
class Program:
    """One of llama.cpp's programs that can be built on the same libraries. It never leaves the cache."""

    option: str
    """The option of native/CMakeLists.txt that defines the target."""
    target: str
    """The Ninja target, and the name of the file in the build directory's bin/."""
    parts: tuple[str, ...]
    """The parts of the source that it needs besides SOURCE_PARTS."""
    backends: tuple[str, ...] = ()
    """The backends whose plugins it links to."""


PROGRAMS = {
    "llama-server": Program(
        "TRIO_LLAMA_SERVER",
        "llama-server",
        (  # of its web page only the empty template
            "common/",
            "tools/server/",
            "tools/ui/CMakeLists.txt",
            "tools/ui/ui.cpp.in",
            "tools/ui/ui.h.in",
            "scripts/ui-assets.cmake",
        ),
    ),
    "rpc-server": Program("TRIO_RPC_SERVER", "ggml-rpc-server", ("tools/rpc/",), ("rpc",)),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A plugin ggml-<name>. native/backends.cmake lists what it needs of the machine, where that is known."""

    option: str
    """The CMake option that defines the target."""
    gigabytes: float = 0.1
    """Disk space that its build takes at most."""


BACKENDS = {
    "cpu": Backend("GGML_CPU"),
    "blas": Backend("GGML_BLAS"),
    "cuda": Backend("GGML_CUDA", 4),
    "hip": Backend("GGML_HIP", 4),
    "metal": Backend("GGML_METAL"),
    "opencl": Backend("GGML_OPENCL"),
    "rpc": Backend("GGML_RPC", 0),
    "sycl": Backend("GGML_SYCL", 2),
    "vulkan": Backend("GGML_VULKAN", 0.5),
}
DEFAULT_BACKENDS = ("cpu", "rpc")  # rpc compiles in five seconds, needs nothing, and opens no port by itself

# At run time ggml chooses the CPU plugin that suits the machine best. Each costs a minute of compiling on two cores. So
# the default has a good answer for every common machine, and leaves the others out:
# x64: any; haswell: AVX2; alderlake: + AVX-VNNI (desktops); skylakex: AVX-512; icelake: + VNNI, VBMI; zen4: + BF16.
X86_DEFAULT = ("x64", "haswell", "alderlake", "skylakex", "icelake", "zen4")
X86_ALL = (*X86_DEFAULT, "sse42", "sandybridge", "ivybridge", "piledriver", "cannonlake", "cascadelake", "cooperlake")
ARM_DEFAULT = ("armv8.0_1", "armv8.2_2", "armv8.6_1", "armv8.6_2")
ARM_ALL = (*ARM_DEFAULT, "armv8.2_1", "armv8.2_3", "armv9.2_1", "armv9.2_2")
APPLE = ("apple_m1", "apple_m2_m3", "apple_m4")
CPU_VARIANTS = {
    ("Linux", "x86_64"): (X86_DEFAULT, (*X86_ALL, "sapphirerapids")),
    ("Darwin", "x86_64"): (("x64", "haswell", "skylakex", "icelake"), (*X86_ALL, "sapphirerapids")),
    ("Linux", "aarch64"): (ARM_DEFAULT, ARM_ALL),
    ("Darwin", "arm64"): (APPLE, APPLE),
}
"""(default variants, all variants) for each system and machine. Other machines get one plain CPU plugin."""


def known_variants() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The default CPU variants of this machine, and all of them. Both are empty where there is one plain plugin."""
    return CPU_VARIANTS.get((platform.system(), platform.machine()), ((), ()))


@dataclass(frozen=True, slots=True)
class Pin:
    """The source distribution that native/SOURCE.toml names."""

    package: str
    version: str
    sha256: str
    commit: str
    """The commit of llama.cpp that the package carries."""
    backend: str
    """The name of the package's own build backend. It is never run."""

    @classmethod
    def read(cls) -> Pin:
        return cls(**tomllib.loads((NATIVE / "SOURCE.toml").read_text("utf-8")))


@dataclass(frozen=True, slots=True)
class Selection:
    """The plugins that one build makes. Empty `cpu_variants` mean one plain CPU plugin."""

    backends: tuple[str, ...]
    cpu_variants: tuple[str, ...]

    @classmethod
    def parse(cls, backends: str = "", cpu_variants: str = "") -> Selection:
        """Read two comma-separated lists; empty ones ask for the default. Raises `BuildError` for unknown names."""
        chosen: dict[str, None] = {"cpu": None}
        for name in _names(backends) or ["default"]:
            if name not in ("default", *BACKENDS):
                raise BuildError(f"unknown backend {name!r}: choose from default, {', '.join(BACKENDS)}")
            chosen |= dict.fromkeys(DEFAULT_BACKENDS if name == "default" else (name,))
        default, known = known_variants()
        variants: dict[str, None] = {}
        for name in _names(cpu_variants) or ["default"]:
            if name not in ("default", "all", *known):
                raise BuildError(f"unknown CPU variant {name!r}: choose from default, all, {', '.join(known)}")
            variants |= dict.fromkeys({"default": default, "all": known}.get(name, (name,)))
        return cls(tuple(chosen), tuple(variants))

    @classmethod
    def read(cls, settings: Mapping[str, str]) -> Selection:
        """The selection that `settings` ask for (``backends`` and ``cpu-variants``), else the environment, else the
        default. Raises `BuildError` for an unknown name."""

        def setting(name: str) -> str:
            return settings.get(name) or os.environ.get("TRIO_RUNNER_" + name.upper().replace("-", "_"), "")

        return cls.parse(setting("backends"), setting("cpu-variants"))

    def options(self, more: Collection[str] = ()) -> dict[str, str]:
        """The CMake options that define these plugins, and `more` backends and programs by name.

        Every backend is turned on or off, because some are on by default on some systems.
        """
        defined = {*self.backends, *more}
        return {
            "GGML_CPU_ALL_VARIANTS": "ON" if self.cpu_variants else "OFF",
            "GGML_RPC_RDMA": "OFF",  # a plugin built where the RDMA library exists would not load without it
            **{backend.option: "ON" if name in defined else "OFF" for name, backend in BACKENDS.items()},
            **{program.option: "ON" if name in defined else "OFF" for name, program in PROGRAMS.items()},
        }

    @property
    def plugins(self) -> tuple[str, ...]:
        """The plugins to build, as Ninja targets, which are also their file names without prefix and suffix."""
        cpu = tuple(f"ggml-cpu-{name}" for name in self.cpu_variants) or ("ggml-cpu",)
        return (*cpu, *(f"ggml-{name}" for name in self.backends if name != "cpu"))

    @property
    def targets(self) -> tuple[str, ...]:
        """Every library to build, plugins included, named as `plugins` are."""
        return (*LIBRARIES, *self.plugins)


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[,\s]+", text.lower()) if name]
