"""Serves one model over HTTP, from the first signal to the end."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from trio_runner.cli.app_watch import AppWatch
from trio_runner.cli.running import ListenError, die_of_next_signal
from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.errors import EngineClosed
from trio_runner.front_door import open_engine
from trio_runner.server.app import MAX_BODY_BYTES, MAX_BODY_BYTES_WITH_IMAGES
from trio_runner.server.listener import host_and_port
from trio_runner.server.names import ANY_NAME, ModelNames
from trio_runner.server.serve import serve

if TYPE_CHECKING:
    from trio_runner.core.ports import Loader
    from trio_runner.interface import EngineInterface

    Address: TypeAlias = tuple[str, int]
    TaskStatus: TypeAlias = trio.TaskStatus[list[Address]]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.001
"""Seconds after which the decode thread gives the interpreter to the event loop. Python's own 5 ms add up: with dozens
of streams, the event loop falls behind a step that takes 2 ms."""
CLOSING_GRACE = 5.0
"""Seconds after the drain in which connections and the decode thread may end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where to serve, to whom, and for how long."""

    host: str = "127.0.0.1"
    port: int | None = 8080
    """0 lets the system choose, and the log says which port it chose. None: no port, only the socket."""
    socket: Path | None = None
    """Path of a Unix socket to serve on as well."""
    announce: bool = False
    """Say on stdout where the server listens, as one line of JSON."""
    drain_timeout: float = 10.0
    """Seconds that running requests may take after the first signal."""
    api_key: str | None = None
    """What clients must send as a bearer token; None means no key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header besides those of this machine."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages that may call the server."""
    adapter_dir: Path | None = None
    """Clients may load the adapters in this directory."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Bytes that the body of a request may have."""
    names: ModelNames = ANY_NAME
    """What clients may call the model."""
    model_path: Path | None = None
    """File of the model."""
    app: AppWatch | None = None
    """When it notices that the app has ended, the server ends at once."""


def max_body_bytes(model: ModelConfig) -> int:
    """Bytes that the body of a request may have: more if the model takes images."""
    return MAX_BODY_BYTES if model.projector is None else MAX_BODY_BYTES_WITH_IMAGES


async def run_service(model: ModelConfig | Loader, engine_config: EngineConfig, service: ServiceConfig) -> None:
    """Serve until SIGINT or SIGTERM. Then drain and return. A second signal returns without draining.

    HTTP answers from the start, while the model is still loading. It also answers after the decode thread has died:
    /health and every request then say so, and the process goes on until a signal ends it, with exit code 0.

    Raises `ListenError`. Raises, inside an exception group, `LoadError` if the model does not load, or `EngineBroken`
    if loading fails otherwise.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    # What is imported stays. To look through it again took every full garbage collection 20 ms, for all threads.
    gc.freeze()
    shutdown = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as root:
            root.start_soon(_shut_down_on_signal, signals, shutdown, service.drain_timeout, root.cancel_scope)
            if service.app is not None:
                root.start_soon(_end_with_app, service.app, root.cancel_scope)
            async with (
                open_engine(model, engine_config, wait=False, cancel_when_broken=False) as engine,
                trio.open_nursery() as nursery,
            ):
                _tell(await _start_serving(engine, service, shutdown, nursery), service)
                with suppress(EngineClosed):  # a signal came while the model was loading
                    await engine.wait_ready(math.inf)
                    logger.info("model loaded: %s", engine.info.description)
            root.cancel_scope.cancel()


async def _start_serving(
    engine: EngineInterface, service: ServiceConfig, shutdown: trio.Event, nursery: trio.Nursery
) -> list[Address]:
    """Serve in `nursery`, and cancel it after the shutdown. Returns the addresses that the server listens on. Raises
    `ListenError`."""

    async def serve_to_the_end(*, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        await serve(
            engine,
            host=service.host,
            port=service.port,
            socket_path=service.socket,
            shutdown=shutdown,
            drain_timeout=service.drain_timeout,
            adapter_dir=service.adapter_dir,
            names=service.names,
            model_path=service.model_path,
            max_body_bytes=service.max_body_bytes,
            api_key=service.api_key,
            allowed_hosts=service.allowed_hosts,
            allowed_origins=service.allowed_origins,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()

    try:
        addresses: list[Address] = await nursery.start(serve_to_the_end)
    except OSError as error:
        reason = error.strerror or str(error)
        where = "" if reason.startswith("cannot listen") else f"cannot listen on {service.host}:{service.port}: "
        raise ListenError(where + reason) from error
    except ValueError as error:
        raise ListenError(str(error)) from error
    return addresses


def _tell(addresses: Sequence[Address], service: ServiceConfig) -> None:
    """Tell the log, and the app if it wants to know, where the server listens."""
    for address in addresses:
        logger.info("listening on http://%s", host_and_port(address))
    if service.socket is not None:
        logger.info("listening on %s", service.socket)
    if service.announce and sys.stdout is not None:
        sys.stdout.write(announcement(addresses, service.socket))
        sys.stdout.flush()


def announcement(addresses: Sequence[Address], socket: Path | None) -> str:
    """One line of JSON: where a program of this machine reaches the server, and the id of its process."""
    url = "http://localhost"  # for a socket, any host does
    if addresses:
        host, port = addresses[0]
        url = f"http://{host_and_port((_EVERY_ADDRESS.get(host, host), port))}"
    fields: dict[str, object] = {"url": url, "pid": os.getpid()}
    if socket is not None:
        fields["socket"] = str(socket.absolute())
    return json.dumps(fields) + "\n"


_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all of a machine, and those to reach it by."""


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


async def _end_with_app(app: AppWatch, everything: trio.CancelScope) -> None:
    await app.wait()
    everything.cancel()
