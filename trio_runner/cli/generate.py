"""`trio-runner run`, `embed` and `rerank`: what a model makes of texts, on stdout."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from trio_runner.cli.logs import set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options, table_options
from trio_runner.errors import RunnerError
from trio_runner.request import Chat, EmbedRequest, GenerateRequest, Prompt, RerankRequest
from trio_runner.sampling import SamplingParams

if TYPE_CHECKING:
    from trio_runner.interface import EngineInterface

logger = logging.getLogger(__name__)


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--image",
    "images",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Image to show before the prompt, to a model with --mmproj. May be repeated.",
)
@click.option("--chat", is_flag=True, help="Take PROMPT as what a user says, and apply the model's chat template.")
@click.option(
    "--max-tokens",
    "-n",
    type=int,
    help="Tokens to generate at most.  [default: until the model ends the text or the context is full]",
)
@click.option("--stop", multiple=True, help="End before this text. May be repeated.")
@click.option("--shift", is_flag=True, help="When the context is full, drop the oldest text and go on.")
@click.option(
    "--grammar-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a GBNF grammar that the text must follow.",
)
@click.option(
    "--json-schema",
    "schema_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File with a JSON schema that the text must obey. Needs the package llguidance.",
)
@table_options(SamplingParams)
@engine_options(slots=1, stall_timeout=math.inf)  # a pager may keep the text waiting for as long as its user likes
def run(
    options: EngineChoice,
    sampling: dict[str, Any],
    /,
    prompt: str | None,
    images: tuple[Path, ...],
    chat: bool,
    max_tokens: int | None,
    stop: tuple[str, ...],
    shift: bool,
    grammar_file: Path | None,
    schema_file: Path | None,
) -> int:
    """Continue PROMPT and stream the text to stdout. Without PROMPT, or with "-", read it from stdin."""
    set_up_logging(options.verbose)
    files = {"grammar": grammar_file, "json_schema": schema_file}
    request = request_of_run(make_prompt(prompt, images, chat), max_tokens, stop, shift, files, sampling)
    configs = options.configs()

    from trio_runner.cli.running import run_with_engine
    from trio_runner.cli.terminal import TextOutput

    async def generate(engine: EngineInterface) -> None:
        output = TextOutput(sys.stdout.fileno())
        generation = engine.generate(request)
        try:
            async with generation:
                async for event in generation:
                    await output.write(event.text)
        finally:
            if sys.stdout.isatty():
                print(flush=True)
        if generation.usage is not None:
            logger.info("%s", generation.usage)

    return run_with_engine(configs, generate)


def make_prompt(text: str | None, images: tuple[Path, ...], chat: bool) -> Prompt:
    """The prompt of `run`. Raises `click.UsageError` if there is none."""
    if text is None or text == "-":
        if text is None and sys.stdin.isatty():
            raise click.UsageError("a prompt is missing")
        text = read_stdin().removesuffix("\n")
    if chat:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        return Chat(messages=({"role": "user", "content": parts if images else text},))
    return cast(Prompt, (*images, text)) if images else text


def request_of_run(
    prompt: Prompt,
    max_tokens: int | None,
    stop: tuple[str, ...],
    shift: bool,
    files: Mapping[str, Path | None],
    sampling: dict[str, Any],
) -> GenerateRequest:
    """The request of `run`; `sampling` has fields of `SamplingParams` by name, and `files` the files with others of
    them, as far as there are any. Raises `click.UsageError`."""
    try:
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path is not None}
        params = SamplingParams(**{**texts, **sampling})
        return GenerateRequest(prompt=prompt, max_tokens=max_tokens, stop=stop, shift=shift, sampling=params)
    except (RunnerError, OSError, UnicodeDecodeError) as error:
        raise click.UsageError(str(error)) from error


def read_stdin() -> str:
    """All of stdin. Raises `click.UsageError` if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: {error}") from error


def read_texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, with "-" replaced by the lines of stdin."""
    return [line for text in arguments for line in (read_stdin().splitlines() if text == "-" else [text])]


@click.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@table_options(EmbedRequest, "normalize", "dimensions", "truncate")
@engine_options()
def embed(options: EngineChoice, chosen: dict[str, Any], /, texts: tuple[str, ...]) -> int:
    """Print the embedding of every TEXT as a JSON array, one per line. "-" stands for the lines of stdin."""
    set_up_logging(options.verbose)
    all_texts = read_texts(texts)
    configs = options.configs()

    from trio_runner.cli.running import run_with_engine

    async def print_embeddings(engine: EngineInterface) -> None:
        for embedding in await engine.embed(all_texts, **chosen):
            # The text of a NumPy float32 is the shortest one that means the same number.
            click.echo(f"[{','.join(str(number) for number in embedding)}]")

    return run_with_engine(configs, print_embeddings)


@click.command()
@click.argument("query")
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT...")
@table_options(RerankRequest, "truncate")
@engine_options()
def rerank(options: EngineChoice, chosen: dict[str, Any], /, query: str, documents: tuple[str, ...]) -> int:
    """Print how well every DOCUMENT answers QUERY, one score per line, by a model made for it. "-" stands for the lines
    of stdin."""
    set_up_logging(options.verbose)
    texts = read_texts(documents)
    configs = options.configs()

    from trio_runner.cli.running import run_with_engine

    async def print_scores(engine: EngineInterface) -> None:
        for score in await engine.rerank(query, texts, **chosen):
            click.echo(str(score))

    return run_with_engine(configs, print_scores)
