"""`trio-runner fetch`, and how every other command finds its model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from trio_runner.cli.logs import set_up_logging
from trio_runner.models import DEFAULT_MODEL, resolve_model

if TYPE_CHECKING:
    from rich.progress import Progress


@click.command()
@click.argument("model", default=DEFAULT_MODEL.name)
def fetch(model: str) -> int:
    """Fetch MODEL if it is not on this machine, and print the path of its file."""
    set_up_logging(0)
    click.echo(fetch_model(model))
    return 0


def fetch_model(reference: str, *, offline: bool = False) -> Path:
    """The file of a model, as `resolve_model` returns it, with a progress bar on stderr while it arrives.

    SIGTERM undoes a fetch that is under way, as Ctrl-C does. Raises `LoadError` if there is no such model.
    """
    with _terminate_by_exception(), _progress_bar(f"fetching {reference}") as progress:
        return resolve_model(reference, progress=progress, offline=offline)


@contextmanager
def _terminate_by_exception() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that no child process and no scratch file is left behind."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the bytes that have arrived and the bytes there will be. Its first call shows the bar."""
    with ExitStack() as stack:
        bar: Progress | None = None
        task = None

        def report(done: int, total: int) -> None:
            nonlocal bar, task
            if bar is None or task is None:
                from rich.console import Console
                from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

                columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
                bar = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
                task = bar.add_task(title)
            bar.update(task, completed=done, total=total)

        yield report
