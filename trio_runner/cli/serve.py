"""`trio-runner serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import click

from trio_runner.cli.app_watch import AppWatch
from trio_runner.cli.logs import LogFormat, set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options
from trio_runner.models import model_name as name_of_model

API_KEY_VARIABLE = "TRIO_RUNNER_API_KEY"


def _read_origins(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    if not values:
        return ()
    from trio_runner.server.access import read_origin  # only here, because `--help` must be quick

    try:
        return tuple(map(read_origin, values))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option(
    "--host",
    help="Address to listen on. An address that other machines can reach needs an API key. [default: 127.0.0.1]",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on. 0 takes any free port. [default: 8080; with --socket alone, none]",
)
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Listen on a Unix socket that only you can reach. No port is opened then, unless --host or --port is given.",
)
@click.option(
    "--announce",
    is_flag=True,
    help='Print one line of JSON on stdout as soon as the server listens: {"url": ..., "pid": ..., "socket": ...}.',
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0, 86400),
    default=10.0,
    show_default=True,
    help="Seconds that running requests may take after SIGTERM or Ctrl-C.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the key that clients must send. Without it, the environment variable {API_KEY_VARIABLE} has it.",
)
@click.option("--allowed-host", multiple=True, help="Accept this name in the Host header. May be repeated.")
@click.option(
    "--allowed-origin",
    multiple=True,
    callback=_read_origins,
    help="Let web pages of this origin call the server, such as https://example.org, tauri://localhost, app://name or "
    "chrome-extension://id. May be repeated.",
)
@click.option(
    "--model-name",
    metavar="NAME",
    help="What clients call the model. [default: the name of its file, or the name that -m gave]",
)
@click.option("--alias", multiple=True, metavar="NAME", help="Another name for the model. May be repeated.")
@click.option(
    "--any-model", is_flag=True, help="Accept every model name in requests. Without it, a wrong one is a 404."
)
@click.option(
    "--adapter-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Let clients load the LoRA adapters in this directory, and unload any adapter.",
)
@click.option(
    "--parent-pid",
    type=click.IntRange(1, 2**31 - 1),
    metavar="PID",
    help="End at once when the process with this id is gone, whether it started this one or not.",
)
@click.option(
    "--exit-with-stdin",
    is_flag=True,
    help="End at once when stdin ends, as a pipe does when the program that holds it has ended. From /dev/null that is "
    "right after the start.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How to log to stderr: for people, or one JSON object on each line.",
)
@engine_options(load_wait=120.0)
def serve(
    options: EngineChoice,
    /,
    host: str | None,
    port: int | None,
    socket: Path | None,
    announce: bool,
    drain_timeout: float,
    api_key_file: Path | None,
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
    model_name: str | None,
    alias: tuple[str, ...],
    any_model: bool,
    adapter_dir: Path | None,
    parent_pid: int | None,
    exit_with_stdin: bool,
    log_format: LogFormat,
) -> int:
    """Serve the model over HTTP.

    The server answers while the model is still loading. SIGTERM or Ctrl-C lets running requests finish within the
    drain timeout. A second signal stops at once.
    """
    set_up_logging(options.verbose, base=logging.INFO, log_format=log_format)
    app = AppWatch(pid=parent_pid, stdin=exit_with_stdin) if parent_pid or exit_with_stdin else None
    api_key = read_api_key(api_key_file)

    # These imports are slow, and `--help` needs none of them.
    from trio_runner.cli.running import run_to_exit_code
    from trio_runner.cli.service import ServiceConfig, max_body_bytes, run_service
    from trio_runner.server.names import ModelNames

    try:
        names = ModelNames(name_of_model(options.model) if model_name is None else model_name, alias, any_model)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--model-name or --alias") from error
    model, engine = options.configs()
    service = ServiceConfig(
        host="127.0.0.1" if host is None else host,
        port=8080 if port is None and (host is not None or socket is None) else port,
        socket=socket,
        announce=announce,
        drain_timeout=drain_timeout,
        api_key=api_key,
        allowed_hosts=allowed_host,
        allowed_origins=allowed_origin,
        adapter_dir=adapter_dir,
        max_body_bytes=max_body_bytes(model),
        names=names,
        model_path=Path(model.path),
        app=app,
    )

    async def run_until_signal() -> None:
        await run_service(model, engine, service)

    report = logging.getLogger("trio_runner.cli").error if log_format == "json" else None
    return run_to_exit_code(run_until_signal, report=report)


def read_api_key(path: Path | None, variable: str = API_KEY_VARIABLE) -> str | None:
    """The key in the file, or in the environment variable, or None. Raises `click.UsageError` for an empty key, because
    it would silently mean "no key", and for one that a header cannot have."""
    try:
        key = os.environ.get(variable) if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the API key cannot be read: {error}") from error
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise click.UsageError("the API key must be printable ASCII and not empty")
    return key
