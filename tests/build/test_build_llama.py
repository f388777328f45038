"""build_llama.py in good and bad surroundings; nothing here compiles llama.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import build_llama
from build_llama import BuildError, Pin, Selection

SCRIPT = Path(build_llama.__file__)
NO_ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CMAKE_ARGS", "TRIO_RUNNER_BACKENDS", "TRIO_RUNNER_LLAMA_SOURCE")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and none of the variables somebody may have set."""
    for name in (*NO_ENVIRONMENT, "TRIO_RUNNER_CPU_VARIANTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_llama, "_settings", {})


def program(path: Path, script: str) -> Path:
    """An executable shell script that needs nothing from PATH."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def source_tree(root: Path) -> Path:
    for name in ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt", "tools/mtmd/mtmd.h", "LICENSE"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def one_line_of_complaint(arguments: list[str], **environment: str) -> str:
    """Runs the script, which must fail, and returns the only line it prints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("build_llama: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ---- what to build ---------------------------------------------------------------------------------------------------


def test_what_needs_nothing_is_on_by_default() -> None:
    selection = Selection.parse()
    assert selection.backends == ("cpu", "rpc")
    options = selection.options()
    assert options["GGML_CPU"] == options["GGML_RPC"] == "ON"
    assert options["GGML_METAL"] == options["GGML_VULKAN"] == options["TRIO_LLAMA_SERVER"] == "OFF"
    assert set(build_llama.LIBRARIES) < set(selection.targets)


def test_other_backends_come_on_top_of_cpu() -> None:
    selection = Selection.parse(" Vulkan,cuda vulkan")
    assert selection.backends == ("cpu", "vulkan", "cuda")
    options = selection.options(["rpc", "rpc-server"])
    assert [options[f"GGML_{name}"] for name in ("VULKAN", "CUDA", "RPC", "HIP")] == ["ON", "ON", "ON", "OFF"]
    assert (options["TRIO_RPC_SERVER"], options["TRIO_LLAMA_SERVER"]) == ("ON", "OFF")
    assert selection.targets[-2:] == ("ggml-vulkan", "ggml-cuda")
    assert Selection.parse("vulkan,default").backends == ("cpu", "vulkan", "rpc")


@pytest.mark.parametrize(
    ("system", "machine", "variants", "targets"),
    [
        ("Linux", "x86_64", "", [f"ggml-cpu-{name}" for name in build_llama.X86_DEFAULT]),
        ("Linux", "x86_64", "haswell,sse42", ["ggml-cpu-haswell", "ggml-cpu-sse42"]),
        ("Linux", "x86_64", "zen4,default", [f"ggml-cpu-{name}" for name in ("zen4", *build_llama.X86_DEFAULT[:-1])]),
        ("Darwin", "arm64", "all", [f"ggml-cpu-{name}" for name in build_llama.APPLE]),
        ("Linux", "loongarch64", "", ["ggml-cpu"]),
    ],
)
def test_cpu_variants(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, variants: str, targets: list[str]
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    selection = Selection.parse(cpu_variants=variants)
    assert [target for target in selection.targets if target.startswith("ggml-cpu")] == targets
    assert selection.options()["GGML_CPU_ALL_VARIANTS"] == ("OFF" if targets == ["ggml-cpu"] else "ON")


def test_unknown_names_are_refused_in_one_line() -> None:
    assert "unknown backend 'vulcan': choose from default, cpu, " in one_line_of_complaint(["--backends", "cpu,vulcan"])
    assert "unknown backend 'gpu'" in one_line_of_complaint([], TRIO_RUNNER_BACKENDS="gpu")
    assert "unknown CPU variant 'pentium'" in one_line_of_complaint(["--cpu-variants", "pentium"])


def test_config_settings_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_RUNNER_BACKENDS", "cuda")
    assert build_llama.selection_from_environment().backends == ("cpu", "cuda")
    with build_llama._hook({"backends": ["vulkan", "blas"]}):
        assert build_llama.selection_from_environment().backends == ("cpu", "vulkan", "blas")


def test_a_hook_ends_with_the_line_and_no_traceback() -> None:
    with pytest.raises(SystemExit, match=r"^build_llama: no disk$"), build_llama._hook(None):
        raise BuildError("no disk")


def test_the_help_names_every_option() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    options = ("--backends", "--cpu-variants", "--inplace", "--llama-server", "--rpc-server", "--fetch-only", "--where")
    for word in (*options, "vulkan", "rpc", "TRIO_RUNNER_CACHE"):
        assert word in done.stdout


# ---- surroundings ----------------------------------------------------------------------------------------------------


def test_no_compiler() -> None:
    line = one_line_of_complaint([], PATH="")
    assert "no C compiler found" in line
    assert "install" in line


def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    broken = program(tmp_path / "broken", "exit 1")
    assert "no C++ compiler found" in one_line_of_complaint([], CXX=str(broken))


def test_no_cmake_and_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cc", "c++"):
        program(tmp_path / "bin" / name, "echo a compiler 1.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match=r"no cmake ninja new enough: run .*pip install"):
        build_llama.build(Selection.parse())
    assert build_llama.get_requires_for_build_wheel() == ["cmake", "ninja"]
    program(tmp_path / "bin" / "ninja", "echo 1.11.1")
    program(tmp_path / "bin" / "cmake", "echo cmake version 3.4.1")
    assert build_llama.get_requires_for_build_wheel() == ["cmake"]
    program(tmp_path / "bin" / "cmake", "echo cmake version 4.0.2")
    assert build_llama.get_requires_for_build_wheel() == []


def test_a_build_directory_keeps_its_tools_while_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, versions in ((first, ("3.25.1", "1.11.1")), (second, ("4.1.0", "1.13.0"))):
        program(directory / "cmake", f"echo cmake version {versions[0]}")
        program(directory / "ninja", f"echo {versions[1]}")
    monkeypatch.setenv("PATH", str(first))
    remembered = tmp_path / "configured.json"
    tools = build_llama.BuildTools.find(remembered)
    assert (tools.ninja, tools.ninja_version) == (str(first / "ninja"), "1.11.1")
    remembered.write_text(json.dumps({"tools": dataclasses.asdict(tools)}))
    monkeypatch.setenv("PATH", str(second))
    assert build_llama.BuildTools.find(remembered) == tools
    program(first / "ninja", "echo 1.12.0")
    assert build_llama.BuildTools.find(remembered).ninja == str(second / "ninja")
    remembered.write_text("half a fi")
    assert build_llama.BuildTools.find(remembered).cmake_version == "cmake version 4.1.0"


def test_tools_beside_this_python_are_found_by_what_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / "venv"
    program(venv / "ninja", "echo 1.13.0")
    script = 'if [ "$1" = --version ]; then echo cmake version 4.1.0; else ninja --version; exit 1; fi'
    program(venv / "cmake", script)
    fake_tools(tmp_path / "bin", monkeypatch)
    for name in ("cmake", "ninja"):
        (tmp_path / "bin" / name).unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(venv / "python"))
    monkeypatch.setenv("TRIO_RUNNER_LLAMA_SOURCE", str(source_tree(tmp_path / "source")))
    with pytest.raises(BuildError, match=r"failed while configuring.*\n  1\.13\.0"):
        build_llama.build(Selection.parse())


def test_no_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"not enough disk space: .* needs 1.0 GB and .* has 0.1 GB free; make room"):
        build_llama.build(Selection.parse())


def test_the_disk_fills_up_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(build_llama, "sync", sync)
    with pytest.raises(BuildError, match=r"no disk space left for somewhere"):
        build_llama.build(Selection.parse())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "TRIO_RUNNER_CACHE" in one_line_of_complaint([], TRIO_RUNNER_CACHE=str(tmp_path / "file"))


def test_a_source_directory_that_is_none(tmp_path: Path) -> None:
    line = one_line_of_complaint([], TRIO_RUNNER_LLAMA_SOURCE=str(tmp_path))
    assert f"TRIO_RUNNER_LLAMA_SOURCE={tmp_path} is not a llama.cpp source tree: it has no CMakeLists.txt" in line


def test_the_second_build_waits_for_the_first(tmp_path: Path) -> None:
    code = "import build_llama, pathlib, sys\nwith build_llama.locked(pathlib.Path(sys.argv[1])): print('in')"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with build_llama.locked(tmp_path / "lock"):
        second = subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert "another build is running" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate(timeout=60) == ("in\n", "")


# ---- source ----------------------------------------------------------------------------------------------------------


def archive(path: Path, files: dict[str, bytes]) -> Pin:
    """Writes a source distribution, and returns the pin that fits it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1_000_000_000
            tar.addfile(member, io.BytesIO(content))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pin("some-package", "1.0", sha256, "abc", "their_backend.build")


@pytest.mark.parametrize(
    ("name", "of_program"),
    [
        ("", set()),
        ("llama-server", {"tools/server/server.cpp", "tools/ui/ui.cpp.in"}),
        ("rpc-server", {"tools/rpc/CMakeLists.txt"}),
    ],
)
def test_unpacking_keeps_what_the_build_needs_and_when_it_was_made(
    tmp_path: Path, name: str, of_program: set[str]
) -> None:
    top = "some_package-1.0/vendor/llama.cpp/"
    pin = archive(
        tmp_path / "some_package-1.0.tar.gz",
        {
            top + "include/llama.h": b"yes",
            top + "tools/mtmd/mtmd.h": b"yes",
            top + "models/vocabulary.gguf": b"no",
            top + "tools/server/server.cpp": b"only for llama-server",
            top + "tools/ui/ui.cpp.in": b"only for llama-server",
            top + "tools/rpc/CMakeLists.txt": b"only for rpc-server",
            top + "tools/ui/src/app.html": b"no",
            top + "src/../../../../escaped": b"no",
            "some_package-1.0/src/other.c": b"no",
        },
    )
    parts = build_llama.SOURCE_PARTS + (build_llama.PROGRAMS[name].parts if name else ())
    build_llama.unpack(tmp_path / "some_package-1.0.tar.gz", pin, tmp_path / "out", parts)
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"include/llama.h", "tools/mtmd/mtmd.h"} | of_program
    assert (tmp_path / "out/include/llama.h").stat().st_mtime == 1_000_000_000
    assert not (tmp_path / "escaped").exists()


def test_a_corrupted_archive(tmp_path: Path) -> None:
    path = tmp_path / "some_package-1.0.tar.gz"
    pin = archive(path, {"some_package-1.0/vendor/llama.cpp/include/llama.h": b"text"})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BuildError, match=r"wrong hash: some_package-1.0.tar.gz has sha256 .*, native/SOURCE.toml says"):
        build_llama.unpack(path, pin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BACKEND_THAT_MUST_NOT_RUN = b"[build-system]\nrequires = ['not-there']\nbuild-backend = 'their_backend.build'\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all the package index the real pip knows."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_pip_hands_over_the_archive_and_runs_nothing_of_it(index: Path, tmp_path: Path) -> None:
    files = {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN, "some_package-1.0/PKG-INFO": b""}
    pin = archive(index / "some_package-1.0.tar.gz", files)
    fetched = build_llama.fetch(pin, tmp_path, tmp_path / "log.txt")
    assert fetched.read_bytes() == (index / "some_package-1.0.tar.gz").read_bytes()


def test_only_missing_parts_are_fetched(index: Path, tmp_path: Path) -> None:
    top = "some_package-1.0/vendor/llama.cpp/"
    files = {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN, "some_package-1.0/PKG-INFO": b""}
    files |= {top + name: b"" for name in ("LICENSE", "tools/mtmd/mtmd.h", "tools/server/server.cpp")}
    pin = archive(index / "some_package-1.0.tar.gz", files)
    log = tmp_path / "log.txt"
    library = ("LICENSE", "tools/mtmd/")
    tree = build_llama.ensure_source(pin, log, library)
    assert not (tree / "tools/server").exists()
    kept = (tree / "tools/mtmd/mtmd.h").stat().st_ino
    assert build_llama.ensure_source(pin, log, (*library, "tools/server/")) == tree
    assert (tree / "tools/server/server.cpp").is_file()
    assert (tree / "tools/mtmd/mtmd.h").stat().st_ino == kept
    (index / "some_package-1.0.tar.gz").unlink()
    for parts in (library, (*library, "tools/server/")):
        assert build_llama.ensure_source(pin, log, parts) == tree
    assert list(tree.parent.iterdir()) == [tree]


def test_pip_refuses_another_hash(index: Path, tmp_path: Path) -> None:
    archive(index / "some_package-1.0.tar.gz", {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN})
    pin = Pin("some-package", "1.0", "0" * 64, "abc", "their_backend.build")
    with pytest.raises(BuildError, match=r"wrong hash: the some-package 1.0 that pip found"):
        build_llama.fetch(pin, tmp_path, tmp_path / "log.txt")


def test_pip_does_not_find_it(index: Path, tmp_path: Path) -> None:
    pin = Pin("some-package", "1.0", "0" * 64, "abc", "their_backend.build")
    with pytest.raises(BuildError, match=r"pip's package index has no source distribution some-package 1.0"):
        build_llama.fetch(pin, tmp_path, tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("WARNING: Retrying: NewConnectionError('Failed to establish a new connection: [Errno -3] ...')", "no network"),
        ("WARNING: Retrying: Temporary failure in name resolution", "no network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no disk space"),
        ("ERROR: Something new", "pip could not fetch llama-cpp-python .*: ERROR: Something new; mend that"),
        ("Segmentation fault", "see .*log.txt"),
    ],
)
def test_pip_fails(complaint: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(f"raise SystemExit({complaint!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with pytest.raises(BuildError, match=line) as caught:
        build_llama.fetch(Pin.read(), tmp_path, tmp_path / "log.txt")
    assert "\n" not in str(caught.value)
    assert complaint in (tmp_path / "log.txt").read_text()


# ---- what backends need ----------------------------------------------------------------------------------------------


def test_all_that_backends_lack_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = ("vulkan|glslc|glslc", "vulkan|libvulkan|libvulkan-dev", "cuda|nvcc (on PATH)|a-toolkit", "metal|macOS|")
    fake_tools(tmp_path / "bin", monkeypatch, cmake="; ".join(f"echo '-- trio lacks: {lack}'" for lack in lacks))
    with pytest.raises(BuildError) as caught:
        build_llama.build(Selection.parse("vulkan,cuda,metal"))
    assert str(caught.value) == (
        "vulkan needs glslc, libvulkan; cuda needs nvcc (on PATH); metal needs macOS "
        "(on Debian: sudo apt install glslc libvulkan-dev a-toolkit)"
    )
    assert not (build_llama.cache_directory() / "build" / "source").exists()  # before anything is fetched


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The real CMake looks for what backends need, but not where this machine has its own."""
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "none"))
    monkeypatch.delenv("CMAKE_PREFIX_PATH", raising=False)
    hidden = ("CMAKE_SYSTEM_PATH", "SYSTEM_ENVIRONMENT_PATH", "CMAKE_SYSTEM_PACKAGE_REGISTRY", "PACKAGE_ROOT_PATH")
    arguments = " ".join(f"-DCMAKE_FIND_USE_{name}=OFF" for name in hidden)
    monkeypatch.setenv("CMAKE_ARGS", f"{arguments} -DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")

    def look(backends: str) -> None:
        selection = Selection.parse(backends)
        compilers = build_llama.Compilers.find()
        env = os.environ | {"CC": compilers.c[0], "CXX": compilers.cxx[0]}
        tools = build_llama.BuildTools.find(tmp_path / "none")
        build_llama.require_backends(selection, selection.backends, tools, env, tmp_path / "log.txt")

    return look


def test_cmake_says_what_is_not_there(look: Callable[[str], None]) -> None:
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


def test_where_cmake_fails_otherwise_the_build_goes_on(
    look: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_TOOLCHAIN_FILE=/not/there")
    look("vulkan")


def test_what_needs_nothing_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools(tmp_path / "bin", monkeypatch, cmake="exit 1")
    monkeypatch.setenv("TRIO_RUNNER_LLAMA_SOURCE", str(source_tree(tmp_path / "source")))
    with pytest.raises(BuildError, match="failed while configuring"):
        build_llama.build(Selection.parse())
    assert "TRIO_CHECK_ONLY" not in (build_llama.where() / "log.txt").read_text()


# ---- libraries -------------------------------------------------------------------------------------------------------


def fake_tools(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts compilers, a CMake that makes its build directory and a Ninja first on PATH; `scripts` replace what the
    latter two do."""
    for name, text in {"cc": "1.0", "c++": "1.0", "cmake": "cmake version 3.25.1", "ninja": "1.11.1"}.items():
        script = scripts.get(name, 'while [ "$1" != -B ]; do shift; done; mkdir -p "$2"')
        program(directory / name, f'if [ "$1" = --version ]; then echo {text}; exit 0; fi; {script}')
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("tool", "script", "line"),
    [
        ("cmake", "echo 'CMake Error: your compiler is odd'; exit 1", "failed while configuring"),
        ("ninja", "echo '[1/9] Building x.o'; echo 'x.cpp:1: error: what?'; exit 1", "x.cpp:1: error: what?"),
        ("ninja", "echo 'cc1plus: No space left on device'; exit 1", "no disk space left while compiling"),
        ("ninja", "echo 'fatal error: Killed signal terminated program cc1plus'; exit 1", "out of memory .*LEVEL=1"),
    ],
)
def test_a_failing_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, script: str, line: str) -> None:
    fake_tools(tmp_path / "bin", monkeypatch, **{tool: script})
    monkeypatch.setenv("TRIO_RUNNER_LLAMA_SOURCE", str(source_tree(tmp_path / "source")))
    with pytest.raises(BuildError, match=line) as caught:
        build_llama.build(Selection.parse())
    if "failed" in str(caught.value):
        log = Path(str(caught.value).partition("the whole log is ")[2].partition("\n")[0])
        assert script.split("'")[1] in log.read_text()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """A machine on which everything is built at once. Returns what asks for the commands of CMake and Ninja since."""
    ninja = 'dir=$2; mkdir -p "$dir/bin"; shift 3; for t in "$@"; do echo >"$dir/bin/lib$t.so"; done'
    cmake = 'case "$*" in *GGML_CUDA=ON*) test -e %s || exit 1;; esac; echo "-- trio lacks nothing"'
    fake_tools(tmp_path / "bin", monkeypatch, cmake=cmake % (tmp_path / "cuda"), ninja=ninja)
    program(tmp_path / "bin" / "strip", "exit 0")
    monkeypatch.setattr(build_llama, "build_binding", lambda *arguments: tmp_path / "_native.abi3.so")
    monkeypatch.setattr(build_llama, "ensure_source", lambda *arguments: source_tree(tmp_path / "source" / "pinned"))
    log = build_llama.where() / "log.txt"

    def since() -> list[list[str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split()[1:] for line in lines if line.startswith("$ ")]

    return since


def defined(command: list[str]) -> set[str]:
    """What a command of CMake turns on, of backends and programs."""
    names = {backend.option: name for name, backend in build_llama.BACKENDS.items()}
    names |= {program.option: name for name, program in build_llama.PROGRAMS.items()}
    return {name for option, name in names.items() if f"-D{option}=ON" in command}


def test_what_cmake_has_once_defined_stays_defined(commands: Callable[[], list[list[str]]]) -> None:
    build_llama.build(Selection.parse("cpu,opencl"))
    look, cmake, ninja = commands()
    assert "-DTRIO_CHECK_ONLY=ON" in look
    assert defined(look) == defined(cmake) == {"cpu", "opencl"}
    assert "ggml-opencl" in ninja

    build_llama.build(Selection.parse("cpu"))
    (ninja,) = commands()
    assert "ggml-opencl" not in ninja
    build_llama.build(Selection.parse("cpu,opencl"))
    (ninja,) = commands()
    assert "ggml-opencl" in ninja
    build_llama.build(Selection.parse("cpu,opencl"))
    assert commands() == []

    build_llama.build(Selection.parse("cpu,rpc"))  # which nothing has to be looked for for
    cmake, ninja = commands()
    assert defined(cmake) == {"cpu", "opencl", "rpc"}


def test_what_cmake_had_defined_is_dropped_where_it_fails_now(
    commands: Callable[[], list[list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "cuda").touch()
    build_llama.build(Selection.parse("cpu,cuda"))
    commands()
    (tmp_path / "cuda").unlink()
    build_llama.build(Selection.parse("cpu,opencl"))
    _, first, second, _ = commands()
    assert [defined(first), defined(second)] == [{"cpu", "cuda", "opencl"}, {"cpu", "opencl"}]
    with pytest.raises(BuildError, match="failed while configuring"):
        build_llama.build(Selection.parse("cpu,cuda"))


@pytest.mark.parametrize(("name", "target"), [("llama-server", "llama-server"), ("rpc-server", "ggml-rpc-server")])
def test_a_program_is_one_more_target_in_the_tree_of_the_libraries(
    commands: Callable[[], list[list[str]]], name: str, target: str
) -> None:
    plugins = {"rpc"} if name == "rpc-server" else set()
    for _ in range(2):  # whoever asks for it gets it brought up to date
        build_llama.build(Selection.parse("cpu"), programs=[name])
        *cmake, ninja = commands()
        assert {target, *(f"ggml-{plugin}" for plugin in plugins)} <= set(ninja)
        assert all(defined(command) == {"cpu", name, *plugins} for command in cmake)
    assert not cmake
    build_llama.build(Selection.parse("cpu"))
    assert commands() == []
    where = build_llama.where()
    assert build_llama.program_path(where, name) == where / "cmake" / "bin" / target
    assert sorted(path.name for path in (where / "lib").glob("*.so")) == sorted(
        f"lib{target}.so" for target in Selection.parse("cpu").targets
    )


def test_the_key_covers_what_goes_into_every_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Pin.read()
    compilers = build_llama.Compilers(("cc",), ("c++",), "gcc 12")
    key = build_llama.tree_key(pin, None, compilers)
    assert key == build_llama.tree_key(pin, None, compilers)
    others = [
        build_llama.tree_key(Pin("p", "1", "0" * 64, "abc", "b"), None, compilers),
        build_llama.tree_key(pin, tmp_path, compilers),
        build_llama.tree_key(pin, None, build_llama.Compilers(("cc",), ("c++",), "gcc 13")),
    ]
    monkeypatch.setenv("CXXFLAGS", "-g")
    others.append(build_llama.tree_key(pin, None, compilers))
    assert len({key, *others}) == 5


def test_sync_touches_only_what_differs(tmp_path: Path) -> None:
    source, target = tmp_path / "checkout", tmp_path / "cache"
    source.mkdir()
    for name in ("a.cpp", "b.h", "README.md"):
        (source / name).write_text(name)
    build_llama.sync(source, target, ("*.cpp", "*.h"))
    assert sorted(path.name for path in target.iterdir()) == ["a.cpp", "b.h"]
    os.utime(target / "a.cpp", (1, 1))
    (source / "c.cpp").write_text("new")
    (source / "b.h").unlink()
    build_llama.sync(source, target, ("*.cpp", "*.h"))
    assert sorted(path.name for path in target.iterdir()) == ["a.cpp", "c.cpp"]
    assert (target / "a.cpp").stat().st_mtime == 1


def test_install_copies_what_differs_and_leaves_nothing_else(tmp_path: Path) -> None:
    tree, package = tmp_path / "tree", tmp_path / "package"
    selection = Selection(("cpu",), ())
    (tree / "lib").mkdir(parents=True)
    names = [f"lib{target}.so" for target in selection.targets] + ["trio_llama.h", "LICENSES"]
    for name in (*names, "libggml-vulkan.so"):
        (tree / "lib" / name).write_text(name)
    binding = tree / "_native.abi3.so"
    binding.write_text("binding")
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "libggml-cuda.so").write_text("of an earlier build")
    files = build_llama.install(tree, selection, binding, package)
    assert sorted(path.name for path in (package / "lib").iterdir()) == sorted(names)
    assert sorted(files) == sorted([package / "_native.abi3.so", *(package / "lib" / name for name in names)])
    before = {path: path.stat().st_ino for path in files}
    (tree / "lib" / "libllama.so").write_text("a new one")
    build_llama.install(tree, selection, binding, package)
    assert [path.name for path in files if path.stat().st_ino != before[path]] == ["libllama.so"]


def test_the_progress_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    terminal, file = Terminal(), io.StringIO()
    for progress in (build_llama.Progress("compiling", terminal), build_llama.Progress("compiling", file)):
        now = 0.0
        for second in range(1, 25):
            now = float(second)
            progress.update(f"step {second}")
            progress.tick()
        progress.finish()
    assert terminal.getvalue().count("\r\x1b[Kbuild_llama: compiling 0:") == 24 + 1
    assert file.getvalue().splitlines() == [
        "build_llama: compiling 0:10 step 10",
        "build_llama: compiling 0:20 step 20",
        "build_llama: compiling 0:24 step 24",
    ]


# ---- the result ------------------------------------------------------------------------------------------------------


def test_cffi_reads_the_header() -> None:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(build_llama.declarations((build_llama.NATIVE / "trio_llama.h").read_text()))
    assert ffi.sizeof("trio_device") > 0
    with pytest.raises(BuildError, match="cdef: begin"):
        build_llama.declarations("int x;\n")


def test_the_package_holds_what_was_built() -> None:
    package = build_llama.PACKAGE
    lib = package / "lib"
    assert (package / "_native.abi3.so").is_file()
    for target in build_llama.LIBRARIES:
        assert build_llama.library(lib, target).is_file()
    assert list(lib.glob("libggml-cpu*.so"))
    assert (lib / "trio_llama.h").read_bytes() == (build_llama.NATIVE / "trio_llama.h").read_bytes()
    for path in lib.glob("lib*"):
        assert not re.search(rb"/build/[0-9a-f]{16}/", path.read_bytes()), f"{path} names the directory it was built in"


def test_any_language_can_load_the_library() -> None:
    library = ctypes.CDLL(str(build_llama.library(build_llama.PACKAGE / "lib", "trio_llama")))
    library.trio_abi_version.restype = ctypes.c_int32
    header = (build_llama.PACKAGE / "lib" / "trio_llama.h").read_text()
    assert f"#define TRIO_LLAMA_ABI {library.trio_abi_version()} " in header
