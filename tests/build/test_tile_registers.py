"""Whether the tile registers of Intel's AMX may be used: asked of the operating system, not only of the CPU."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from native.build.config import NATIVE
from native.build.tools import Compilers

PROGRAM = """
#include "tile_registers.h"
#include <cstdio>
int main() {
    const bool may = trio::may_use_tiles();
    if (may) __asm__ __volatile__(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"); // tilerelease, for assemblers without AMX
    std::printf("%d %llu", may, static_cast<unsigned long long>(trio::saved_registers()));
}
"""
AVX = 1 << 2
"""The bit of the registers of AVX in XCR0."""


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="for x86 and Linux")
def test_tiles_are_used_only_where_that_ends_no_process(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    compiler = Compilers.find().cxx
    subprocess.run([*compiler, "-std=c++17", f"-I{NATIVE}", str(source), "-o", str(program)], check=True, timeout=60)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60)
    may_use_tiles, saved = map(int, done.stdout.split())
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    assert bool(saved & AVX) == ("avx" in flags)
    assert not may_use_tiles or "amx_tile" in flags
