"""The machines that products are compiled for, and how a program for each runs here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from native.build.config import NATIVE, Pin
from native.build.source import ensure_source, local_source

HERE = Path(__file__).resolve().parent
EMULATOR = "qemu-aarch64"
CROSS_COMPILER = "aarch64-linux-gnu-g++"


@dataclass(frozen=True, slots=True)
class Machine:
    """A level of instruction sets."""

    name: str
    flags: tuple[str, ...]
    is_arm: bool = False
    words: Literal["", "signed", "all"] = ""
    """The codes that can only be multiplied as words of 16 bits: none, those with signs, or all."""
    rounds_once: bool = True
    """It multiplies and adds with one rounding."""

    def missing(self) -> str:
        """What this machine lacks to compile and run a program for that one, or nothing."""
        if self.is_arm and platform.machine() not in ("aarch64", "arm64"):
            lacking = [program for program in (CROSS_COMPILER, EMULATOR) if shutil.which(program) is None]
            return f"{' and '.join(lacking)}: ci/arm installs them" if lacking else ""
        if not self.is_arm and (platform.machine() != "x86_64" or " avx2 " not in Path("/proc/cpuinfo").read_text()):
            return "an x86-64 CPU with AVX2"
        return "" if shutil.which(compiler()) is not None else f"the compiler {compiler()}"

    def build(self, directory: Path) -> list[str]:
        """Compile products.cpp. Returns the command that runs it. Raises `CalledProcessError`."""
        program = directory / self.name
        crosses = self.is_arm and platform.machine() not in ("aarch64", "arm64")
        ggml = (local_source() or ensure_source(Pin.read(), directory / "fetch.txt")) / "ggml"
        command = [CROSS_COMPILER if crosses else compiler(), "-std=c++17", "-w", "-ffp-contract=off", *self.flags]
        command += ["-static"] if crosses else []
        for include in (NATIVE, ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu"):
            command += ["-I", str(include)]
        command += [str(HERE / "products.cpp"), "-o", str(program)]
        subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return [EMULATOR, "-cpu", "max", str(program)] if crosses else [str(program)]


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


# Optimising takes three times as long. It is done for one machine that this one probably is not.
_AVX2 = ("-O0", "-mavx2", "-mfma", "-mf16c", "-mbmi2")
_EMULATED = (*_AVX2, "-include", str(HERE / "emulated_x86.h"))
MACHINES = (
    Machine("portable", ("-O0", '-DMATMUL_VECTORS="matmul_portable.h"'), rounds_once=False),
    Machine("sse2", ("-O0",), words="all", rounds_once=False),
    Machine("ssse3", ("-O0", "-mssse3"), words="signed", rounds_once=False),
    Machine("avx2", _AVX2, words="signed"),
    Machine("avx2-vnni", (*_EMULATED, "-DEMULATES_VNNI", '-DMATMUL_VECTORS="matmul_avx2.h"')),
    Machine("avx512", (*_EMULATED, '-DMATMUL_VECTORS="matmul_avx512.h"'), words="signed"),
    Machine("avx512-vnni", (*_EMULATED, "-DEMULATES_VNNI", '-DMATMUL_VECTORS="matmul_avx512.h"')),
    Machine("arm", ("-O0", "-march=armv8-a"), is_arm=True),
    Machine("arm-dotprod", ("-O1", "-march=armv8.2-a+dotprod"), is_arm=True),
)
