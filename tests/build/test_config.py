"""What a build is asked for: backends, CPU variants, settings, the command line."""

from __future__ import annotations

import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from native.build import config, pep517
from native.build.config import BuildError, Selection
from tests.build.surroundings import SCRIPT, error_line


def test_default_backends_need_nothing_installed() -> None:
    selection = Selection.parse()
    assert selection.backends == ("cpu", "rpc")
    options = selection.options()
    assert options["GGML_CPU"] == options["GGML_RPC"] == "ON"
    assert options["GGML_METAL"] == options["GGML_VULKAN"] == options["TRIO_LLAMA_SERVER"] == "OFF"
    assert set(config.LIBRARIES) < set(selection.targets)


def test_the_cpu_backend_is_always_selected() -> None:
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
        ("Linux", "x86_64", "", [f"ggml-cpu-{name}" for name in config.X86_DEFAULT]),
        ("Linux", "x86_64", "haswell,sse42", ["ggml-cpu-haswell", "ggml-cpu-sse42"]),
        ("Linux", "x86_64", "zen4,default", [f"ggml-cpu-{name}" for name in ("zen4", *config.X86_DEFAULT[:-1])]),
        ("Darwin", "arm64", "all", [f"ggml-cpu-{name}" for name in config.APPLE]),
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
    assert "unknown backend 'vulcan': choose from default, cpu, " in error_line(["--backends", "cpu,vulcan"])
    assert "unknown backend 'gpu'" in error_line([], TRIO_RUNNER_BACKENDS="gpu")
    assert "unknown CPU variant 'pentium'" in error_line(["--cpu-variants", "pentium"])


def test_config_settings_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_RUNNER_BACKENDS", "cuda")
    assert Selection.read(pep517._settings).backends == ("cpu", "cuda")
    with pep517.hook({"backends": ["vulkan", "blas"]}):
        assert Selection.read(pep517._settings).backends == ("cpu", "vulkan", "blas")


def test_a_hook_reports_an_error_without_a_traceback() -> None:
    with pytest.raises(SystemExit, match=r"^build_llama: no disk$"), pep517.hook(None):
        raise BuildError("no disk")


def test_the_help_names_every_option() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    options = ("--backends", "--cpu-variants", "--inplace", "--llama-server", "--rpc-server", "--fetch-only", "--where")
    for word in (*options, "vulkan", "rpc", "TRIO_RUNNER_CACHE"):
        assert word in done.stdout


def test_only_the_standard_library_is_needed(tmp_path: Path) -> None:
    """And not even the directory of build_llama.py on the path: some versions of pip import it without."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_source_distribution_has_the_build(tmp_path: Path) -> None:
    code = "import build_llama, sys; print(build_llama.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, timeout=120, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    built_from = ("build/*.py", "patches/*", "*.cpp", "*.h", "*.cmake", "CMakeLists.txt", "SOURCE.toml")
    files = {str(path.relative_to(SCRIPT.parent)) for glob in built_from for path in config.NATIVE.glob(glob)}
    assert {"build_llama.py", "native/__init__.py", *files} <= names
    assert not [name for name in names if "__pycache__" in name]
