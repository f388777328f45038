"""What the last build left in the package."""

from __future__ import annotations

import ctypes
import re

import pytest

from native.build import binding, config, directory
from native.build.config import BuildError


def test_cffi_reads_the_header() -> None:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(binding.declarations((config.NATIVE / "trio_llama.h").read_text()))
    assert ffi.sizeof("trio_device") > 0
    with pytest.raises(BuildError, match="cdef: begin"):
        binding.declarations("int x;\n")


def test_the_package_holds_what_was_built() -> None:
    package = config.PACKAGE
    lib = package / "lib"
    assert (package / "_native.abi3.so").is_file()
    for target in config.LIBRARIES:
        assert directory.library(lib, target).is_file()
    assert list(lib.glob("libggml-cpu*.so"))
    assert (lib / "trio_llama.h").read_bytes() == (config.NATIVE / "trio_llama.h").read_bytes()
    for path in lib.glob("lib*"):
        assert not re.search(rb"/build/[0-9a-f]{16}/", path.read_bytes()), f"{path} names the directory it was built in"


def test_any_language_can_load_the_library() -> None:
    library = ctypes.CDLL(str(directory.library(config.PACKAGE / "lib", "trio_llama")))
    library.trio_abi_version.restype = ctypes.c_int32
    header = (config.PACKAGE / "lib" / "trio_llama.h").read_text()
    assert f"#define TRIO_LLAMA_ABI {library.trio_abi_version()} " in header
