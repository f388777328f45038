"""`trio-runner chat`."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from trio_runner.cli.generate import request_of_run
from trio_runner.cli.logs import set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options, table_options
from trio_runner.cli.serve import read_api_key
from trio_runner.sampling import SamplingParams

if TYPE_CHECKING:
    from trio_runner.cli.chat.loop import ChatLoop
    from trio_runner.interface import EngineInterface
    from trio_runner.request import GenerateRequest

KEY_VARIABLE: Final = "OPENAI_API_KEY"


@click.command()
@click.option(
    "--url",
    metavar="URL",
    help="Talk to this server, which speaks OpenAI's chat completions, and load no model. --model is then the model's "
    "name there; without it, the first that the server lists.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the key for --url. Without it, the environment variable {KEY_VARIABLE} has it.",
)
@click.option("--system", default="", metavar="TEXT", help="System message to begin the conversation with.")
@click.option("--plain", is_flag=True, help="Print answers as they are, and do not render their Markdown.")
@click.option("--no-history", is_flag=True, help="Keep no file of what you type.")
@click.option(
    "--max-tokens",
    "-n",
    type=int,
    help="Tokens of an answer at most.  [default: until the model ends it or the context is full]",
)
@click.option("--stop", multiple=True, help="End an answer before this text. May be repeated.")
@click.option(
    "--grammar-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a GBNF grammar that each answer must follow.",
)
@click.option(
    "--json-schema",
    "schema_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File with a JSON schema that each answer must obey.",
)
@click.option("--shift", is_flag=True, help="When the context is full, drop the oldest text and go on with the answer.")
@table_options(SamplingParams)
@engine_options(slots=1, stall_timeout=math.inf)  # a pager may keep the text waiting for as long as its user likes
def chat(
    options: EngineChoice,
    sampling: dict[str, Any],
    /,
    url: str | None,
    api_key_file: Path | None,
    system: str,
    plain: bool,
    no_history: bool,
    max_tokens: int | None,
    stop: tuple[str, ...],
    grammar_file: Path | None,
    schema_file: Path | None,
    shift: bool,
) -> int:
    """Talk with a model, here or on a server.

    Lines come from the terminal or from a pipe. /help lists the commands. Ctrl-C stops an answer and keeps the
    conversation. Ctrl-D leaves.
    """
    set_up_logging(options.verbose)
    files = {"grammar": grammar_file, "json_schema": schema_file}
    request = request_of_run("", max_tokens, stop, shift, files, sampling)
    if url is not None:
        fields = _request_fields(sampling, request)
        return _chat_with_server(url, options, fields, api_key_file, (system, plain, no_history))
    if api_key_file is not None:
        raise click.UsageError("--api-key-file is for --url")
    configs = options.configs()

    from trio_runner.cli.chat.local import LocalModel
    from trio_runner.cli.running import run_with_engine

    loop = _make_loop(system, plain=plain, no_history=no_history)
    code = 0

    async def talk(engine: EngineInterface) -> None:
        nonlocal code
        code = await loop.run(LocalModel(engine, request, Path(options.model).name))

    return run_with_engine(configs, talk, interrupt=loop.interrupt) or code


def _chat_with_server(
    url: str,
    options: EngineChoice,
    fields: dict[str, Any],
    api_key_file: Path | None,
    of_loop: tuple[str, bool, bool],
) -> int:
    given = [*options.of_model.arguments, *options.of_engine.arguments]
    if given:
        name = given[0].partition("=")[0]
        raise click.UsageError(f"{name} is for a model in this process, and --url is for one on a server")
    source = click.get_current_context().get_parameter_source("model")
    model = options.model if source is not None and source.name != "DEFAULT" else ""
    api_key = read_api_key(api_key_file, KEY_VARIABLE)

    from trio_runner.cli.chat.openai import base_url
    from trio_runner.cli.chat.remote import RemoteModel, open_client
    from trio_runner.cli.running import run_until_signal

    try:
        base = base_url(url)
    except ValueError as error:
        raise click.UsageError(f"--url: {error}") from error
    system, plain, no_history = of_loop
    loop = _make_loop(system, plain=plain, no_history=no_history)
    code = 0

    async def talk() -> None:
        nonlocal code
        async with open_client(base) as client:
            code = await loop.run(RemoteModel(client, base, model=model, api_key=api_key, options=fields))

    return run_until_signal(talk, interrupt=loop.interrupt) or code


def _make_loop(system: str, *, plain: bool, no_history: bool) -> ChatLoop:
    from trio_runner.cli.chat.conversation import Conversation
    from trio_runner.cli.chat.display import make_display
    from trio_runner.cli.chat.loop import ChatLoop
    from trio_runner.cli.chat.reader import LineReader, Reader
    from trio_runner.cli.terminal import printable

    def notify(text: str) -> None:
        print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    if sys.stdin is None or sys.stdout is None:  # the program was started with a closed descriptor
        raise click.UsageError("stdin and stdout must be open")
    descriptor = sys.stdin.fileno()
    reader: Reader = LineReader(descriptor)
    if os.isatty(descriptor) and (sys.stdout.isatty() or sys.stderr.isatty()):
        from trio_runner.cli.chat.keyboard import Keyboard, history_path, open_history

        history, complaint = open_history(None if no_history else history_path())
        if complaint:
            notify(complaint)
        reader = Keyboard(descriptor, history)
    return ChatLoop(reader, make_display(plain=plain), Conversation(system), notify=notify)


def _request_fields(sampling: dict[str, Any], request: GenerateRequest) -> dict[str, Any]:
    """The fields of a request over HTTP for what the user chose. The rest is left to the defaults of the server."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()}
    if request.max_tokens is not None:
        fields["max_tokens"] = request.max_tokens
    if request.stop:
        fields["stop"] = list(request.stop)
    if grammar := request.sampling.grammar:
        fields["grammar"] = grammar
    if schema := request.sampling.json_schema:
        named = {"name": "answer", "schema": json.loads(schema), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return fields
