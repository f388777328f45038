"""Runs the asynchronous part of a command, from the first signal to the exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable

import trio

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.errors import LoadError, RunnerError
from trio_runner.front_door import leaves, open_engine
from trio_runner.interface import EngineInterface


class ListenError(Exception):
    """The server cannot listen on its address, or must not."""


def run_with_engine(
    configs: tuple[ModelConfig, EngineConfig],
    main: Callable[[EngineInterface], Awaitable[None]],
    *,
    interrupt: Callable[[], bool] = lambda: False,
) -> int:
    """Load the model, run `main` with the engine, and return the exit code. Signals do what `run_until_signal` says."""

    async def with_engine() -> None:
        async with open_engine(*configs, wait=False) as engine:
            await _wait_ready(engine)
            await main(engine)

    return run_until_signal(with_engine, interrupt=interrupt)


async def _wait_ready(engine: EngineInterface) -> None:
    """Wait for the model. On a terminal, show a bar if that takes more than a moment."""
    if not sys.stderr.isatty():
        await engine.wait_ready()
        return
    with trio.move_on_after(0.5):
        await engine.wait_ready()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=1.0)
        async with trio.open_nursery() as nursery:

            async def show() -> None:
                while True:
                    bar.update(task, completed=engine.progress)
                    await trio.sleep(0.1)

            nursery.start_soon(show)
            await engine.wait_ready()
            nursery.cancel_scope.cancel()


def run_until_signal(main: Callable[[], Awaitable[None]], *, interrupt: Callable[[], bool] = lambda: False) -> int:
    """Run `main` and return the exit code. The first SIGTERM cancels it, and so does the first SIGINT for which
    `interrupt` returns False."""

    async def interruptible() -> int:
        return await _until_signal(main, interrupt)

    return run_to_exit_code(interruptible)


async def _until_signal(main: Callable[[], Awaitable[None]], interrupt: Callable[[], bool]) -> int:
    """Run `main`, and cancel it at the first signal. Returns 0, or 128 plus the number of the signal."""
    code = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal code
                async for number in signals:
                    if number == signal.SIGINT and interrupt():
                        continue
                    code = 128 + number
                    die_of_next_signal()
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await main()
            nursery.cancel_scope.cancel()
    return code


def die_of_next_signal() -> None:
    """Let the next SIGINT or SIGTERM kill the process. The user is in a hurry, or the program hangs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def run_to_exit_code(
    main: Callable[[], Awaitable[int | None]],
    *,
    load_error: str = "error: ",
    report: Callable[[str], None] | None = None,
) -> int:
    """Run `main` under trio and return the exit code. An expected failure is one line on stderr and exit code 1.

    Any other exception propagates. `load_error` is how the line about a model that cannot be loaded begins. `report`
    is given the reason instead, if it is not None.
    """
    code: int | None = 0
    failures: list[BaseException] = []
    try:
        code = trio.run(main)
    except* (RunnerError, ListenError) as group:
        failures.extend(leaves(group))
    except* BrokenPipeError:
        code = 128 + signal.SIGPIPE  # what a shell reports of a program that SIGPIPE killed
    except* KeyboardInterrupt:
        code = 128 + signal.SIGINT
    if failures:
        # A model that did not load also breaks its engine. Report the cause, not the consequence.
        failure = next((error for error in failures if isinstance(error, LoadError)), failures[0])
        if report is not None:
            report(_explain(failure))
        else:
            print(f"{load_error if isinstance(failure, LoadError) else 'error: '}{_explain(failure)}", file=sys.stderr)
        return 1
    return code or 0


def _explain(error: BaseException) -> str:
    """The message of `error` and of its causes, on one line."""
    message = str(error) or type(error).__name__
    cause = error.__cause__
    if cause is not None and not isinstance(error, (LoadError, ListenError)) and str(cause) not in message:
        message += f": {_explain(cause)}"
    return " ".join(message.split())
