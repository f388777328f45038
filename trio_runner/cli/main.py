"""The entry point: chooses between the commands and the drop-in mode, and makes an exit code of what happens."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from trio_runner import __version__
from trio_runner.cli.bench import bench
from trio_runner.cli.chat.command import chat
from trio_runner.cli.fetch import fetch
from trio_runner.cli.generate import embed, rerank, run
from trio_runner.cli.info import info
from trio_runner.cli.serve import serve
from trio_runner.errors import RunnerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code. Prints errors, and raises nothing that a user can cause."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0].startswith("-") and arguments[0] not in ("--help", "--version"):
            from trio_runner.cli import dropin

            return dropin.main(arguments)
        code = cli.main(arguments, prog_name="trio-runner", standalone_mode=False)
        if sys.stdout is not None:  # it is None if the program was started with a closed stdout
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except RunnerError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Python flushes stdout at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="trio-runner")
def cli() -> None:
    """Run one language model on this machine, for many requests at once, and cancel any of them at any time.

    The model (-m, or MODEL of "fetch") is a path, "SmolLM2-135M-Instruct" (the default, fetched once), or
    hf:owner/repo/file.gguf.

    A slot holds the context of one request: its part of the KV cache, which is what the model remembers. A step
    computes one batch. A row is one token of a batch, or one piece of an image.

    With flags before any command, as in "trio-runner -model x.gguf -port 1234", it takes the place of the runner of an
    Ollama server: "trio-runner -h" lists those flags.
    """


for _command in (serve, run, chat, embed, rerank, info, bench, fetch):
    cli.add_command(_command)
