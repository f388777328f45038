"""The llama.cpp source: what is fetched, checked and unpacked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from native.build import config, source
from native.build.config import BuildError, Pin
from tests.build.surroundings import archive


@pytest.mark.parametrize(
    ("name", "of_program"),
    [
        ("", set()),
        ("llama-server", {"tools/server/server.cpp", "tools/ui/ui.cpp.in"}),
        ("rpc-server", {"tools/rpc/CMakeLists.txt"}),
    ],
)
def test_unpacking_keeps_the_needed_files_and_their_times(tmp_path: Path, name: str, of_program: set[str]) -> None:
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
    parts = config.SOURCE_PARTS + (config.PROGRAMS[name].parts if name else ())
    source.unpack(tmp_path / "some_package-1.0.tar.gz", pin, tmp_path / "out", parts)
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
        source.unpack(path, pin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BACKEND_THAT_MUST_NOT_RUN = b"[build-system]\nrequires = ['not-there']\nbuild-backend = 'their_backend.build'\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the only package index of the real pip."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_pip_downloads_the_archive_and_runs_none_of_its_code(index: Path, tmp_path: Path) -> None:
    files = {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN, "some_package-1.0/PKG-INFO": b""}
    pin = archive(index / "some_package-1.0.tar.gz", files)
    fetched = source.fetch(pin, tmp_path, tmp_path / "log.txt")
    assert fetched.read_bytes() == (index / "some_package-1.0.tar.gz").read_bytes()


def test_only_missing_parts_are_fetched(index: Path, tmp_path: Path) -> None:
    top = "some_package-1.0/vendor/llama.cpp/"
    files = {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN, "some_package-1.0/PKG-INFO": b""}
    files |= {top + name: b"" for name in ("LICENSE", "tools/mtmd/mtmd.h", "tools/server/server.cpp")}
    pin = archive(index / "some_package-1.0.tar.gz", files)
    log = tmp_path / "log.txt"
    library = ("LICENSE", "tools/mtmd/")
    tree = source.ensure_source(pin, log, library)
    assert not (tree / "tools/server").exists()
    kept = (tree / "tools/mtmd/mtmd.h").stat().st_ino
    assert source.ensure_source(pin, log, (*library, "tools/server/")) == tree
    assert (tree / "tools/server/server.cpp").is_file()
    assert (tree / "tools/mtmd/mtmd.h").stat().st_ino == kept
    (index / "some_package-1.0.tar.gz").unlink()
    for parts in (library, (*library, "tools/server/")):
        assert source.ensure_source(pin, log, parts) == tree
    assert list(tree.parent.iterdir()) == [tree]


def test_pip_refuses_another_hash(index: Path, tmp_path: Path) -> None:
    archive(index / "some_package-1.0.tar.gz", {"some_package-1.0/pyproject.toml": BACKEND_THAT_MUST_NOT_RUN})
    pin = Pin("some-package", "1.0", "0" * 64, "abc", "their_backend.build")
    with pytest.raises(BuildError, match=r"wrong hash: the some-package 1.0 that pip found"):
        source.fetch(pin, tmp_path, tmp_path / "log.txt")


def test_pip_does_not_find_it(index: Path, tmp_path: Path) -> None:
    pin = Pin("some-package", "1.0", "0" * 64, "abc", "their_backend.build")
    with pytest.raises(BuildError, match=r"pip's package index has no source distribution some-package 1.0"):
        source.fetch(pin, tmp_path, tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("WARNING: Retrying: NewConnectionError('Failed to establish a new connection: [Errno -3] ...')", "no network"),
        ("WARNING: Retrying: Temporary failure in name resolution", "no network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no disk space"),
        ("ERROR: Something new", "pip could not fetch llama-cpp-python .*: ERROR: Something new; fix that"),
        ("Segmentation fault", "see .*log.txt"),
    ],
)
def test_pip_fails(complaint: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(f"raise SystemExit({complaint!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with pytest.raises(BuildError, match=line) as caught:
        source.fetch(Pin.read(), tmp_path, tmp_path / "log.txt")
    assert "\n" not in str(caught.value)
    assert complaint in (tmp_path / "log.txt").read_text()
