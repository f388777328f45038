"""`trio-runner serve`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from trio_runner.cli.logs import set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options

API_KEY_VARIABLE = "TRIO_RUNNER_API_KEY"


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. An address that other machines can reach needs an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on. 0 takes any free port.",
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
@click.option("--allowed-origin", multiple=True, help="Let web pages of this origin call the server. May be repeated.")
@click.option(
    "--adapter-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Let clients load the LoRA adapters in this directory, and unload any adapter.",
)
@click.option(
    "--parent",
    type=int,
    metavar="PID",
    help="End at once when the process that started this one is gone. PID must be its process id: with any other "
    "number the server ends right after its start.",
)
@engine_options()
def serve(
    options: EngineChoice,
    /,
    host: str,
    port: int,
    drain_timeout: float,
    api_key_file: Path | None,
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
    adapter_dir: Path | None,
    parent: int | None,
) -> int:
    """Serve the model over HTTP.

    The server answers while the model is still loading. SIGTERM or Ctrl-C lets running requests finish within the
    drain timeout. A second signal stops at once.
    """
    set_up_logging(options.verbose, base=logging.INFO)
    api_key = read_api_key(api_key_file)
    model, engine = options.configs()

    from trio_runner.cli.running import run_to_exit_code
    from trio_runner.cli.service import ServiceConfig, max_body_bytes, run_service

    service = ServiceConfig(
        host=host,
        port=port,
        drain_timeout=drain_timeout,
        api_key=api_key,
        allowed_hosts=allowed_host,
        allowed_origins=allowed_origin,
        adapter_dir=adapter_dir,
        max_body_bytes=max_body_bytes(model),
        parent=parent,
    )

    async def run_until_signal() -> None:
        await run_service(model, engine, service)

    return run_to_exit_code(run_until_signal)


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
