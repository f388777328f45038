"""Compiling and installing, with a fake CMake and a fake Ninja."""

from __future__ import annotations

import io
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from native.build import config, directory, install, pipeline
from native.build.config import BuildError, Pin, Selection
from native.build.progress import Progress
from native.build.tools import Compilers
from tests.build.surroundings import fake_tools, program, source_tree


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
        pipeline.build(Selection.parse())
    if "failed" in str(caught.value):
        log = Path(str(caught.value).partition("the whole log is ")[2].partition("\n")[0])
        assert script.split("'")[1] in log.read_text()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """A machine where every build succeeds at once. A call returns the commands of CMake and Ninja since the last."""
    ninja = 'bin=$2/bin; mkdir -p "$bin"; shift 3; for t in "$@"; do echo | tee "$bin/lib$t.so" >"$bin/$t"; done'
    cmake = 'case "$*" in *GGML_CUDA=ON*) test -e %s || exit 1;; esac; echo "-- trio lacks nothing"'
    fake_tools(tmp_path / "bin", monkeypatch, cmake=cmake % (tmp_path / "cuda"), ninja=ninja)
    program(tmp_path / "bin" / "strip", "exit 0")
    monkeypatch.setattr(pipeline, "build_binding", lambda *arguments: tmp_path / "_native.abi3.so")
    tree = tmp_path / "source" / "pinned"
    monkeypatch.setattr("native.build.cmake.ensure_source", lambda *arguments: source_tree(tree))
    log = directory.where() / "log.txt"

    def since() -> list[list[str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split()[1:] for line in lines if line.startswith("$ ")]

    return since


def defined(command: list[str]) -> set[str]:
    """The backends and programs that a CMake command turns on."""
    names = {backend.option: name for name, backend in config.BACKENDS.items()}
    names |= {program.option: name for name, program in config.PROGRAMS.items()}
    return {name for option, name in names.items() if f"-D{option}=ON" in command}


def test_backends_stay_defined_in_cmake(commands: Callable[[], list[list[str]]]) -> None:
    pipeline.build(Selection.parse("cpu,opencl"))
    look, cmake, ninja = commands()
    assert "-DTRIO_CHECK_ONLY=ON" in look
    assert defined(look) == defined(cmake) == {"cpu", "opencl"}
    assert "ggml-opencl" in ninja

    pipeline.build(Selection.parse("cpu"))
    (ninja,) = commands()
    assert "ggml-opencl" not in ninja
    pipeline.build(Selection.parse("cpu,opencl"))
    (ninja,) = commands()
    assert "ggml-opencl" in ninja
    pipeline.build(Selection.parse("cpu,opencl"))
    assert commands() == []

    pipeline.build(Selection.parse("cpu,rpc"))  # which needs nothing, so nothing is checked
    cmake, ninja = commands()
    assert defined(cmake) == {"cpu", "opencl", "rpc"}


def test_backends_that_fail_now_are_no_longer_defined(commands: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    (tmp_path / "cuda").touch()
    pipeline.build(Selection.parse("cpu,cuda"))
    commands()
    (tmp_path / "cuda").unlink()
    pipeline.build(Selection.parse("cpu,opencl"))
    _, first, second, _ = commands()
    assert [defined(first), defined(second)] == [{"cpu", "cuda", "opencl"}, {"cpu", "opencl"}]
    with pytest.raises(BuildError, match="failed while configuring"):
        pipeline.build(Selection.parse("cpu,cuda"))


@pytest.mark.parametrize(("name", "target"), [("llama-server", "llama-server"), ("rpc-server", "ggml-rpc-server")])
def test_a_program_is_built_beside_the_libraries(
    commands: Callable[[], list[list[str]]], name: str, target: str
) -> None:
    plugins = {"rpc"} if name == "rpc-server" else set()
    for _ in range(2):  # each build that names it brings it up to date
        pipeline.build(Selection.parse("cpu"), programs=[name])
        *cmake, ninja = commands()
        assert {target, *(f"ggml-{plugin}" for plugin in plugins)} <= set(ninja)
        assert all(defined(command) == {"cpu", name, *plugins} for command in cmake)
    assert not cmake
    pipeline.build(Selection.parse("cpu"))
    assert commands() == []
    where = directory.where()
    assert directory.program_path(where, name) == where / "cmake" / "bin" / target
    assert sorted(path.name for path in (where / "lib").glob("*.so")) == sorted(
        f"lib{target}.so" for target in Selection.parse("cpu").targets
    )


def plugins_beside_programs() -> set[str]:
    """The plugins that a program in the build directory's bin/ opens."""
    return {path.stem.removeprefix("libggml-") for path in (directory.where() / "cmake" / "bin").glob("libggml-*.so")}


def test_plugins_of_earlier_selections_are_removed(
    commands: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    pipeline.build(Selection.parse("cpu,opencl", "x64,sapphirerapids"))
    assert plugins_beside_programs() == {"base", "cpu-x64", "cpu-sapphirerapids", "opencl"}
    pipeline.build(Selection.parse("cpu,rpc", "x64,haswell"), programs=["llama-server"])
    assert plugins_beside_programs() == {"base", "cpu-x64", "cpu-haswell", "rpc"}


def test_a_program_keeps_the_plugin_that_it_links_to(commands: Callable[[], list[list[str]]]) -> None:
    pipeline.build(Selection.parse("cpu,opencl"), programs=["rpc-server"])
    pipeline.build(Selection.parse("cpu"))
    assert {"base", "rpc"} <= plugins_beside_programs()
    assert "opencl" not in plugins_beside_programs()


def test_a_change_of_the_build_itself_compiles_nothing(
    commands: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native = tmp_path / "native"
    shutil.copytree(config.NATIVE, native)
    monkeypatch.setattr(pipeline, "NATIVE", native)
    pipeline.build(Selection.parse("cpu"))
    commands()
    for name in ("__init__.py", "build/cmake.py", "README.md"):
        (native / name).write_text("changed")
    pipeline.build(Selection.parse("cpu"))
    assert commands() == []
    for name in ("CMakeLists.txt", "patches/rpc.cmake"):
        (native / name).write_text("changed")
        pipeline.build(Selection.parse("cpu"))
        (ninja,) = commands()
        assert "trio_llama" in ninja


def test_the_key_covers_what_goes_into_every_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Pin.read()
    compilers = Compilers(("cc",), ("c++",), "gcc 12")
    key = directory.tree_key(pin, None, compilers)
    assert key == directory.tree_key(pin, None, compilers)
    others = [
        directory.tree_key(Pin("p", "1", "0" * 64, "abc", "b"), None, compilers),
        directory.tree_key(pin, tmp_path, compilers),
        directory.tree_key(pin, None, Compilers(("cc",), ("c++",), "gcc 13")),
    ]
    monkeypatch.setenv("CXXFLAGS", "-g")
    others.append(directory.tree_key(pin, None, compilers))
    assert len({key, *others}) == 5


def test_sync_touches_only_what_differs(tmp_path: Path) -> None:
    source, target = tmp_path / "checkout", tmp_path / "cache"
    source.mkdir()
    for name in ("a.cpp", "b.h", "README.md"):
        (source / name).write_text(name)
    directory.sync(source, target, ("*.cpp", "*.h"))
    assert sorted(directory.state(target)) == ["a.cpp", "b.h"]
    os.utime(target / "a.cpp", (1, 1))
    (target / "of another version").mkdir()
    (source / "c.cpp").write_text("new")
    (source / "b.h").unlink()
    directory.sync(source, target, ("*.cpp", "*.h"))
    assert sorted(directory.state(target)) == ["a.cpp", "c.cpp"]
    assert (target / "a.cpp").stat().st_mtime == 1


def test_install_copies_what_differs_and_deletes_the_rest(tmp_path: Path) -> None:
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
    files = install.install(tree / "lib", selection, binding, package)
    assert sorted(path.name for path in (package / "lib").iterdir()) == sorted(names)
    assert sorted(files) == sorted([package / "_native.abi3.so", *(package / "lib" / name for name in names)])
    before = {path: path.stat().st_ino for path in files}
    (tree / "lib" / "libllama.so").write_text("a new one")
    install.install(tree / "lib", selection, binding, package)
    assert [path.name for path in files if path.stat().st_ino != before[path]] == ["libllama.so"]


def test_the_progress_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    terminal, file = Terminal(), io.StringIO()
    for progress in (Progress("compiling", terminal), Progress("compiling", file)):
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
