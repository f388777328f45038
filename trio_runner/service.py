"""One model served over HTTP by one process, from its first signal to its exit code."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import trio

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.errors import EngineClosed, LoadError, RunnerError
from trio_runner.front_door import leaves, open_engine
from trio_runner.server.app import MAX_BODY_BYTES, MAX_BODY_BYTES_WITH_IMAGES
from trio_runner.server.serve import serve

if TYPE_CHECKING:
    from trio_runner.core.ports import Loader

    TaskStatus: TypeAlias = trio.TaskStatus[list[tuple[str, int]]]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.001
"""Seconds after which the decode thread gives the interpreter to the event loop. Python's own 5 ms add up: with dozens
of streams, the loop falls behind a step that takes 2 ms."""
CLOSING_GRACE = 5.0
"""Seconds after the drain in which connections and the decode thread may end by themselves."""


class ListenError(Exception):
    """The address cannot be listened on, or must not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where and for how long to serve."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 lets the system choose; the log says which."""
    drain_timeout: float = 10.0
    """Seconds that running requests get after the first signal."""
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header besides those of this machine."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages that may call the server."""
    adapter_dir: Path | None = None
    """Clients may load the adapters in it."""
    max_body_bytes: int = MAX_BODY_BYTES
    parent: int | None = None
    """The process that started us: end at once when it is gone."""


def max_body_bytes(model: ModelConfig) -> int:
    """What a request may have, which is more where there are images in it."""
    return MAX_BODY_BYTES if model.projector is None else MAX_BODY_BYTES_WITH_IMAGES


async def run_service(model: ModelConfig | Loader, engine_config: EngineConfig, service: ServiceConfig) -> None:
    """Serve until SIGINT or SIGTERM; then drain and return. A second signal returns without draining.

    HTTP answers from the start, while the model is still loading, and to the end, even if the decode thread dies: then
    /health and every request say so, and whoever wants a restart can bring it about. That end, too, is an orderly one.
    Raises `ListenError`, or inside a group of exceptions `LoadError`, or `EngineBroken` if loading fails otherwise.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.freeze()  # what is imported stays; to look through it again took every full collection 20 ms, for all threads
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as root:
            root.start_soon(_shut_down_on_signal, signals, shutdown, service.drain_timeout, root.cancel_scope)
            if service.parent is not None:
                root.start_soon(_cancel_without_parent, service.parent, root.cancel_scope)
            async with (
                open_engine(model, engine_config, wait=False, cancel_when_broken=False) as engine,
                trio.open_nursery() as nursery,
            ):

                async def serve_to_the_end(*, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
                    await serve(
                        engine,
                        host=service.host,
                        port=service.port,
                        shutdown=shutdown,
                        drain_timeout=service.drain_timeout,
                        adapter_dir=service.adapter_dir,
                        max_body_bytes=service.max_body_bytes,
                        api_key=service.api_key,
                        allowed_hosts=service.allowed_hosts,
                        allowed_origins=service.allowed_origins,
                        task_status=task_status,
                    )
                    nursery.cancel_scope.cancel()

                try:
                    addresses: list[tuple[str, int]] = await nursery.start(serve_to_the_end)
                except OSError as error:
                    where = f"{service.host}:{service.port}"
                    raise ListenError(f"cannot listen on {where}: {error.strerror or error}") from error
                except ValueError as error:
                    raise ListenError(str(error)) from error
                for host, port in addresses:
                    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
                with suppress(EngineClosed):  # shut down while loading
                    await engine.wait_ready()
                    logger.info("model loaded: %s", engine.info.description)
            root.cancel_scope.cancel()


async def _shut_down_on_signal(
    signals: AsyncIterator[int], shutdown: trio.Event, drain_timeout: float, everything: trio.CancelScope
) -> None:
    number = await anext(signals)
    logger.info("%s: no new requests; running ones have %g s", signal.Signals(number).name, drain_timeout)
    shutdown.set()
    with trio.move_on_after(drain_timeout + CLOSING_GRACE):
        await anext(signals)
    logger.warning("stopping at once")
    die_of_next_signal()
    everything.cancel()


async def _cancel_without_parent(parent: int, everything: trio.CancelScope) -> None:
    while os.getppid() == parent:  # noqa: ASYNC110  # nothing tells us, so look
        await trio.sleep(1)
    logger.warning("the process that started this one is gone")
    everything.cancel()


def die_of_next_signal() -> None:
    """From here on a SIGINT or SIGTERM kills the process: somebody is really in a hurry, or we hang."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


async def until_signal(main: Callable[[], Awaitable[None]]) -> int:
    """Run `main`, cancelling it at the first SIGINT or SIGTERM. Returns 0, or 128 plus the signal's number."""
    code = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal code
                code = 128 + await anext(signals)
                die_of_next_signal()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await main()
            nursery.cancel_scope.cancel()
    return code


def run_to_exit_code(main: Callable[[], Awaitable[int | None]], *, load_error: str = "error: ") -> int:
    """`trio.run(main)` as an exit code. A failure that was to be expected is one line on stderr, and 1.

    Any other exception propagates. `load_error` begins the line about a model that cannot be loaded.
    """
    code: int | None = 0
    failures: list[BaseException] = []
    try:
        code = trio.run(main)
    except* (RunnerError, ListenError) as group:
        failures.extend(leaves(group))
    except* BrokenPipeError:
        code = 128 + signal.SIGPIPE  # what the shell reports of a program that has no opinion
    except* KeyboardInterrupt:
        code = 128 + signal.SIGINT
    if failures:
        # The first cause, not what it did to others: a model that failed to load also breaks its engine.
        failure = next((error for error in failures if isinstance(error, LoadError)), failures[0])
        print(f"{load_error if isinstance(failure, LoadError) else 'error: '}{explain(failure)}", file=sys.stderr)
        return 1
    return code or 0


def explain(error: BaseException) -> str:
    """The message of `error` and of what caused it, on one line."""
    message = str(error) or type(error).__name__
    cause = error.__cause__
    if cause is not None and not isinstance(error, (LoadError, ListenError)) and str(cause) not in message:
        message += f": {explain(cause)}"
    return " ".join(message.split())
