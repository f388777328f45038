"""Where the time of a step goes, by Linux's `perf`, which looks about 2,000 times a second what each thread is doing.

    python -m trio_runner.bench.step_profile --model FILE --threads 1 --symbols DIRECTORY

`ci/profile` does it in a checkout. The samples are of time, not of cycles, so that they work on virtual machines too.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from trio_runner.bench.bare import Case
from trio_runner.bench.contenders import ContenderFailed, OwnProcess
from trio_runner.bench.hotspots import Profile, Sample, read_samples, read_symbols
from trio_runner.errors import RunnerError

FREQUENCY: Final = 1999
"""Samples a second of each thread. Not a round number, or they might follow something that is periodic."""
CASE_SECONDS: Final = 4.0
"""Seconds that a case is measured for, or a little more."""
SPARE_CELLS: Final = 64
POLL_SECONDS: Final = 0.05
"""Seconds between two looks whether perf is still there."""
DECODE_THREAD: Final = "Lifecycle.live"
"""A part of the name of the thread that decodes."""

CASES: Final = {
    "prefill": Case(512),
    "decode": Case(1, 1, 128, reuse=True),
    "streams": Case(1, 4, 128, reuse=True),
    "long": Case(1900, 1, 128, reuse=True),
}
NO_PERF: Final = (
    "the program perf is missing. On Debian run: sudo apt install linux-perf; "
    "on Ubuntu: sudo apt install linux-tools-generic"
)


class ProfilerFailed(RunnerError):
    """`perf` is missing or does not work. The message says what to do."""


class Perf:
    """`perf`, with the programs that name functions. Raises `ProfilerFailed` if it is missing."""

    def __init__(self, scratch: Path, symbols: Path | None) -> None:
        self._scratch = scratch
        if shutil.which("perf") is None:
            raise ProfilerFailed(NO_PERF)
        try:
            paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
        except (OSError, ValueError):
            paranoid = 2
        self._event = "cpu-clock" if os.geteuid() == 0 or paranoid < 2 else "cpu-clock:u"  # u: not Linux itself
        self._files: dict[str, str] = {}
        for library in sorted(symbols.glob("*.so")) if symbols is not None else ():
            # Installed libraries are stripped. perf finds these by their build ids.
            self._run("buildid-cache", "--add", str(library))
            listing = _output(["readelf", "--symbols", "--wide", str(library)])
            self._files |= read_symbols(listing)

    @contextmanager
    def sampling(self, pid: int) -> Iterator[None]:
        """Sample the threads of process `pid` while the block runs. Raises `ProfilerFailed`."""
        control, answers = self._scratch / "control", self._scratch / "answers"
        for path in (control, answers):
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        with open(self._scratch / "log", "w+b") as log:
            options = ["--event", self._event, "--freq", str(FREQUENCY), "--pid", str(pid), "--delay=-1", "--quiet"]
            process = subprocess.Popen(
                self._command("record", *options, f"--control=fifo:{control},{answers}", "--output", self._data),
                stderr=log,
            )
            try:
                with _opened(control) as orders, _opened(answers) as replies:
                    _tell(process, orders, replies, "enable")
                    yield
                    _tell(process, orders, replies, "disable")
            except _Ended:
                log.seek(0)
                said = log.read().decode(errors="replace").strip() or "it said nothing"
                raise ProfilerFailed(f"perf does not work here: {said}") from None
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()

    def samples(self) -> list[Sample]:
        """The samples of the last block."""
        script = self._run("script", "--no-demangle", "--fields", "tid,ip,sym,dso", "--input", self._data)
        names = sorted({word for word in script.split() if word.startswith("_Z")})
        spoken = dict(zip(names, _output(["c++filt", *names]).splitlines(), strict=False)) if names else {}
        return read_samples(script, self._files, {name: _short(text) for name, text in spoken.items()})

    @property
    def _data(self) -> str:
        return str(self._scratch / "samples")

    def _command(self, *arguments: str) -> list[str]:
        return ["perf", "--buildid-dir", str(self._scratch / "symbols"), *arguments]

    def _run(self, *arguments: str) -> str:
        ended = subprocess.run(self._command(*arguments), capture_output=True, text=True, errors="replace")
        if ended.returncode != 0:
            raise ProfilerFailed(f"perf {arguments[0]} failed: {ended.stderr.strip()}")
        return ended.stdout


class _Ended(Exception):
    """perf has ended before it was told to."""


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A pipe with a name. As it is open in both directions, nothing waits for the other side."""
    pipe = os.open(path, os.O_RDWR)
    try:
        yield pipe
    finally:
        os.close(pipe)


def _tell(perf: subprocess.Popen[bytes], orders: int, replies: int, word: str) -> None:
    """Give perf an order, and wait until it has obeyed."""
    os.write(orders, f"{word}\n".encode())
    while not select.select([replies], [], [], POLL_SECONDS)[0]:
        if perf.poll() is not None:
            raise _Ended
    os.read(replies, 64)


def _output(command: list[str]) -> str:
    """What a program prints; nothing if there is no such program, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    except OSError:
        return ""


def _short(name: str) -> str:
    """The name of a C++ function without its arguments."""
    return name.replace("(anonymous namespace)::", "").partition("(")[0] or name


def profile(perf: Perf, model: Path, name: str, threads: int) -> Profile:
    """Measure the case `name`. Raises `ProfilerFailed` or `ContenderFailed`."""
    case = CASES[name]
    n_cells = case.n_prompt + case.n_decode + SPARE_CELLS
    with OwnProcess(model, slots=case.n_streams, context=n_cells, threads=threads) as child:
        child.turn("engine", case)  # warms up, and fills the prompt cache
        once = child.turn("engine", case)["seconds"]
        case = replace(case, n_times=math.ceil(CASE_SECONDS / once))
        with perf.sampling(child.pid):
            turn = child.turn("engine", case)
        decode_thread = next((number for name, number in turn["threads"].items() if DECODE_THREAD in name), None)
    samples = perf.samples()
    if not samples:
        raise ProfilerFailed("perf has found nothing to count")
    if case.n_decode:
        n_steps, step, title = turn["n_batches"], "a step", f"{case.name}, {case.n_prompt:,} tokens before"
    else:
        n_steps, step, title = case.n_times, f"the prompt, in {turn['n_batches'] / case.n_times:.1f} steps", case.name
    return Profile(title, samples, 1 / FREQUENCY, turn["seconds"], n_steps, step, decode_thread)


@click.command()
@click.option(
    "--model", type=click.Path(dir_okay=False, exists=True, path_type=Path), required=True, help="A GGUF file."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that compute.")
@click.option(
    "--case",
    "names",
    multiple=True,
    type=click.Choice(list(CASES)),
    help="prefill: 512 tokens; decode: 1 stream; streams: 4; long: 1 stream behind 1,900 tokens. May be repeated. "
    "[default: all]",
)
@click.option("--functions", type=click.IntRange(0), default=20, show_default=True, help="Functions to list.")
@click.option(
    "--symbols",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where the libraries are that are not stripped.  [default: functions that are not exported have no name]",
)
def main(model: Path, threads: int, names: Iterable[str], functions: int, symbols: Path | None) -> None:
    """Print where the time of a step goes: by kind of work, and by function."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            perf = Perf(Path(scratch), symbols)
            for name in names or CASES:
                click.echo(profile(perf, model.absolute(), name, threads).table(functions))
    except (ContenderFailed, ProfilerFailed) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
