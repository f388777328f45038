"""What backends need of the machine, and how a build says that it is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from native.build import config, directory, pipeline
from native.build.cmake import require_backends
from native.build.config import BuildError, Selection
from native.build.tools import BuildTools, Compilers
from tests.build.surroundings import fake_tools, program, source_tree


def test_everything_that_backends_lack_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = ("vulkan|glslc|glslc", "vulkan|libvulkan|libvulkan-dev", "cuda|nvcc (on PATH)|a-toolkit", "metal|macOS|")
    fake_tools(tmp_path / "bin", monkeypatch, cmake="; ".join(f"echo '-- trio lacks: {lack}'" for lack in lacks))
    with pytest.raises(BuildError) as caught:
        pipeline.build(Selection.parse("vulkan,cuda,metal"))
    assert str(caught.value) == (
        "vulkan needs glslc, libvulkan; cuda needs nvcc (on PATH); metal needs macOS "
        "(on Debian: sudo apt install glslc libvulkan-dev a-toolkit)"
    )
    assert not (config.cache_directory() / "build" / "source").exists()  # before anything is fetched


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the real CMake look for what backends need, but not in the directories of this machine."""
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "none"))
    monkeypatch.delenv("CMAKE_PREFIX_PATH", raising=False)
    hidden = ("CMAKE_SYSTEM_PATH", "SYSTEM_ENVIRONMENT_PATH", "CMAKE_SYSTEM_PACKAGE_REGISTRY", "PACKAGE_ROOT_PATH")
    arguments = " ".join(f"-DCMAKE_FIND_USE_{name}=OFF" for name in hidden)
    monkeypatch.setenv("CMAKE_ARGS", f"{arguments} -DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")

    def look(backends: str) -> None:
        selection = Selection.parse(backends)
        compilers = Compilers.find()
        env = os.environ | {"CC": compilers.c[0], "CXX": compilers.cxx[0]}
        tools = BuildTools.find(tmp_path / "none")
        require_backends(selection, selection.backends, tools, env, tmp_path / "log.txt")

    return look


def test_cmake_reports_what_is_missing(look: Callable[[str], None]) -> None:
    with pytest.raises(BuildError) as caught:
        look("vulkan,opencl,hip")
    assert str(caught.value) == (
        "vulkan needs glslc, vulkan/vulkan.h, libvulkan, the SPIR-V headers; opencl needs CL/cl.h, libOpenCL; "
        "hip needs hip, hipblas, rocblas (on Debian: sudo apt install glslc libvulkan-dev spirv-headers opencl-headers "
        "ocl-icd-opencl-dev hipcc libamdhip64-dev libhipblas-dev librocblas-dev)"
    )


def test_cmake_finds_what_its_arguments_name(look: Callable[[str], None], tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    program(prefix / "bin" / "glslc", "exit 0")
    for name in ("include/vulkan/vulkan.h", "lib/libvulkan.so", "lib/libvulkan.dylib"):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).touch()
    with pytest.raises(BuildError, match=r"^vulkan needs the SPIR-V headers \(on Debian: .* spirv-headers\)$"):
        look("vulkan")
    (prefix / "share/cmake/SPIRV-Headers").mkdir(parents=True)
    (prefix / "share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake").touch()
    look("vulkan")


def test_another_failure_of_cmake_is_left_to_the_build(
    look: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_TOOLCHAIN_FILE=/not/there")
    look("vulkan")


def test_default_backends_are_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools(tmp_path / "bin", monkeypatch, cmake="exit 1")
    monkeypatch.setenv("TRIO_RUNNER_LLAMA_SOURCE", str(source_tree(tmp_path / "source")))
    with pytest.raises(BuildError, match="failed while configuring"):
        pipeline.build(Selection.parse())
    assert "TRIO_CHECK_ONLY" not in (directory.where() / "log.txt").read_text()
