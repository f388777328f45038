"""The command line: `trio-runner serve | run | embed | rerank | info | bench | fetch`, and the way to the drop-in mode.

What was asked for goes to stdout, everything else to stderr. Exit codes: 0, 1 for a failure that one line on stderr
explains, 2 for a wrong command line, 128 plus the signal's number for a command that a signal ended; `serve` ends with
0 on the signals that mean "please stop".

Heavy modules are imported where they are used, so that `--help` is quick and works without the native library.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Concatenate, Literal, NoReturn, ParamSpec, TypeVar, cast

import click
from click.core import ParameterSource

from trio_runner import __version__
from trio_runner.config import KV_TYPES, POOLINGS, SPLIT_MODES, AdapterConfig, EngineConfig, ModelConfig
from trio_runner.errors import RunnerError
from trio_runner.models import DEFAULT_MODEL, resolve_model
from trio_runner.request import Chat, GenerateRequest, Prompt
from trio_runner.sampling import SamplingParams

if TYPE_CHECKING:
    from rich.progress import Progress

    from trio_runner.bench.dialects import DialectName
    from trio_runner.config import FlashAttention, KvType, Pooling, SplitMode
    from trio_runner.engine.engine import Engine
    from trio_runner.info import Device, Placement

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "TRIO_RUNNER_API_KEY"
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program to its exit code. Prints, and never raises for what a user can cause."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0].startswith("-") and arguments[0] not in ("--help", "--version"):
            from trio_runner import dropin

            return dropin.main(arguments)
        code = cli.main(arguments, prog_name="trio-runner", standalone_mode=False)
        if sys.stdout is not None:  # started with a closed stdout
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except RunnerError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Python would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="trio-runner")
def cli() -> None:
    """Run one language model on this machine, for many requests at once, and cancel any of them at any time.

    MODEL is a path, "SmolLM2-135M-Instruct" (the default, fetched once), or hf:owner/repo/file.gguf.

    With flags before any command, as in "trio-runner -model x.gguf -port 1234", it takes the place of the runner of an
    Ollama server: "trio-runner -h" lists those flags.
    """


# ---- options ---------------------------------------------------------------------------------------------------------


def read_adapter(text: str) -> AdapterConfig:
    """FILE."""
    return _adapter(text, 1.0)


def read_scaled_adapter(text: str) -> AdapterConfig:
    """FILE=SCALE; the last = counts."""
    path, sign, scale = text.rpartition("=")
    try:
        factor = float(scale)
    except ValueError:
        sign = ""
    if not sign or not path:
        raise click.BadParameter(f"{text!r} is not a file, = and a number")
    return _adapter(path, factor)


def _adapter(path: str, scale: float) -> AdapterConfig:
    try:
        return AdapterConfig(path, scale)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_proportions(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers separated by commas") from None


def read_layers(text: str) -> int | Literal["auto"]:
    """A number of layers, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither auto nor a number") from None


def read_names(text: str) -> tuple[str, ...]:
    """Names separated by commas; "none" stands for none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options that every command with an engine has; None leaves the choice to the configuration."""

    model: str
    offline: bool
    slots: int | None
    context_length: int | None
    batch_size: int | None
    threads: int | None
    gpu_layers: int | Literal["auto"]
    devices: tuple[str, ...] | None
    rpc: tuple[str, ...]
    split_mode: SplitMode
    main_gpu: int
    tensor_split: tuple[float, ...] | None
    mmproj: str | None
    lora: tuple[AdapterConfig, ...]
    lora_scaled: tuple[AdapterConfig, ...]
    flash_attention: FlashAttention
    kv_type: KvType
    mmap: bool
    mlock: bool
    check_tensors: bool
    step_target: float | None
    pooling: Pooling
    verbose: int

    def configs(
        self, *, slots: int, max_queue: int | None = None, stall_timeout: float | None = None
    ) -> tuple[ModelConfig, EngineConfig]:
        """Both configurations, the model fetched if need be; `slots` where the user gave none.

        Raises `click.UsageError` for a value outside its range and `LoadError` when there is no such model.
        """
        defaults = EngineConfig()
        try:
            engine = EngineConfig(
                slots=self.slots if self.slots is not None else slots,
                context_length=self.context_length,
                batch_size=self.batch_size if self.batch_size is not None else defaults.batch_size,
                threads=self.threads,
                flash_attention=self.flash_attention,
                kv_type=self.kv_type,
                step_target=self.step_target / 1000 if self.step_target is not None else None,
                pooling=self.pooling,
                max_queue=max_queue if max_queue is not None else defaults.max_queue,
                stall_timeout=stall_timeout if stall_timeout is not None else defaults.stall_timeout,
            )
            model = ModelConfig(
                path=self.model,
                projector=self.mmproj,
                adapters=(*self.lora, *self.lora_scaled),
                gpu_layers=self.gpu_layers,
                devices=self.devices,
                rpc=self.rpc,
                split_mode=self.split_mode,
                main_gpu=self.main_gpu,
                tensor_split=self.tensor_split or (),
                mmap=self.mmap,
                mlock=self.mlock,
                check_tensors=self.check_tensors,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        path = fetch_model(self.model, offline=self.offline)
        return dataclasses.replace(model, path=str(path)), engine


_ENGINE_OPTIONS = (
    click.option("--model", "-m", default=DEFAULT_MODEL.name, show_default=True, help="The model to load."),
    click.option("--offline", is_flag=True, help="Never fetch anything."),
    click.option("--slots", type=int, help="Requests that run at once.  [default: 4; run and info: 1]"),
    click.option("--context-length", type=int, help="Tokens per slot.  [default: the model's, at most 4096]"),
    click.option("--batch-size", type=int, help="Rows of one step.  [default: 512]"),
    click.option("--threads", type=int, help="Threads that compute.  [default: one per core, one fewer to decode]"),
    click.option(
        "--gpu-layers",
        "--n-gpu-layers",
        "-ngl",
        "gpu_layers",
        type=read_layers,
        metavar="auto|N",
        default="auto",
        show_default=True,
        help="Layers to put on GPUs; auto: as many as there is room for; -1: all.",
    ),
    click.option(
        "--device",
        "devices",
        type=read_names,
        metavar="NAME,...",
        help='Devices for layers, as `info` names them; "none": only the CPU.  [default: all GPUs]',
    ),
    click.option(
        "--rpc",
        type=read_names,
        metavar="HOST:PORT,...",
        default="",
        help="rpc-servers of llama.cpp that take layers too. Only in a network that you trust.",
    ),
    click.option(
        "--split-mode",
        type=click.Choice(SPLIT_MODES),
        default="layer",
        show_default=True,
        help="How to spread over several devices; none: --main-gpu takes all.",
    ),
    click.option("--main-gpu", type=int, default=0, show_default=True, help="The device for what is not split."),
    click.option(
        "--tensor-split", type=read_proportions, metavar="A,B,...", help="Proportion of the model per device."
    ),
    click.option("--mmproj", metavar="FILE", help="Projector of the model: prompts may have images then."),
    click.option(
        "--lora", type=read_adapter, metavar="FILE", multiple=True, help="LoRA adapter at scale 1; may be repeated."
    ),
    click.option(
        "--lora-scaled",
        type=read_scaled_adapter,
        metavar="FILE=SCALE",
        multiple=True,
        help="The same at another scale; 0: only for requests that choose it.",
    ),
    click.option("--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True),
    click.option(
        "--kv-type", type=click.Choice(KV_TYPES), default="f16", show_default=True, help="Element type of the KV cache."
    ),
    click.option("--mmap/--no-mmap", default=True, show_default=True, help="Map the model file instead of reading it."),
    click.option("--mlock", is_flag=True, help="Keep the model out of swap."),
    click.option("--check-tensors", is_flag=True, help="Read every tensor and refuse NaN and infinity."),
    click.option(
        "--step-target",
        type=float,
        metavar="MS",
        help="Milliseconds that a prompt may hold up the streams beside it, per step.  [default: as measured]",
    ),
    click.option("--pooling", type=click.Choice(POOLINGS), default="model", show_default=True, help="For embeddings."),
    click.option("--verbose", "-v", count=True, help="Log more; -vv everything."),
)


def engine_options(function: Callable[Concatenate[EngineOptions, P], R]) -> Callable[P, R]:
    """Give a command the options above, gathered in its first argument."""
    names = [field.name for field in dataclasses.fields(EngineOptions)]

    @wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        own = EngineOptions(**{name: kwargs.pop(name) for name in names})  # type: ignore[arg-type]  # click has checked
        return function(own, *args, **kwargs)

    decorated: Callable[P, R] = command
    for option in reversed(_ENGINE_OPTIONS):
        decorated = option(decorated)
    return decorated


def set_up_logging(verbose: int, *, base: int = logging.WARNING) -> None:
    """Log to stderr; every -v lowers the level by one. llama.cpp talks a lot, so its own words need one more -v."""
    levels = [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG]
    index = min(levels.index(base) + verbose, 3)
    logging.basicConfig(
        level=levels[index],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    if verbose < 2:
        logging.getLogger("trio_runner.llama").setLevel(levels[index - 1])
    for name in ("httpx", "httpx2", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


# ---- models ----------------------------------------------------------------------------------------------------------


def fetch_model(reference: str, *, offline: bool = False) -> Path:
    """`resolve_model` with a progress bar on stderr, undone cleanly by SIGTERM as by Ctrl-C."""
    with _terminate_by_exception(), _progress_bar(f"fetching {reference}") as progress:
        return resolve_model(reference, progress=progress, offline=offline)


@contextmanager
def _terminate_by_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that a child process and scratch files do not outlive us."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the bytes done and the bytes in all; the bar appears with its first call."""
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


async def wait_ready(engine: Engine) -> None:
    """Wait for the model, with a bar where there is a terminal and something to wait for."""
    import trio

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


def run_with_engine(configs: tuple[ModelConfig, EngineConfig], main: Callable[[Engine], Awaitable[None]]) -> int:
    """Load the model, run `main` with the engine, and turn signals and expected failures into an exit code."""
    from trio_runner.front_door import open_engine
    from trio_runner.service import run_to_exit_code, until_signal

    async def with_engine() -> None:
        async with open_engine(*configs, wait=False) as engine:
            await wait_ready(engine)
            await main(engine)

    async def interruptible() -> int:
        return await until_signal(with_engine)

    return run_to_exit_code(interruptible)


# ---- commands --------------------------------------------------------------------------------------------------------


@cli.command()
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen here; elsewhere only with an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0, 86400),
    default=10.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM or Ctrl-C.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the key that clients must send; or the environment variable {API_KEY_VARIABLE}.",
)
@click.option("--allowed-host", multiple=True, help="Accept this name in the Host header; may be repeated.")
@click.option("--allowed-origin", multiple=True, help="Let web pages from this origin call; may be repeated.")
@click.option(
    "--adapter-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Let clients load the LoRA adapters in this directory, and unload any.",
)
@click.option(
    "--max-queue",
    type=int,
    default=EngineConfig().max_queue,
    show_default=True,
    help="Requests that may wait for a slot; more are told to come back later.",
)
@click.option("--parent", type=int, hidden=True, help="End when this process, which started the server, is gone.")
def serve(
    options: EngineOptions,
    /,
    host: str,
    port: int,
    drain_timeout: float,
    api_key_file: Path | None,
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
    adapter_dir: Path | None,
    max_queue: int,
    parent: int | None,
) -> int:
    """Serve the model over HTTP.

    The server answers while the model is still loading. SIGTERM or Ctrl-C lets running requests finish within the
    drain timeout; a second one stops at once.
    """
    set_up_logging(options.verbose, base=logging.INFO)
    api_key = read_api_key(api_key_file)
    model, engine = options.configs(slots=EngineConfig().slots, max_queue=max_queue)

    from trio_runner.service import ServiceConfig, max_body_bytes, run_service, run_to_exit_code

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


def read_api_key(path: Path | None) -> str | None:
    """The key from the file, else from the environment, else None. An empty key is a usage error, not "no key"."""
    try:
        key = os.environ.get(API_KEY_VARIABLE) if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the API key cannot be read: {error}") from error
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise click.UsageError("the API key must be printable ASCII and not empty")
    return key


_SAMPLING_HELP = {
    "temperature": "0: always the most probable token.",
    "top_k": "Sample from the so many most probable tokens; 0 off.",
    "top_p": "Sample from the most probable tokens that have this share together; 1 off.",
    "min_p": "Drop tokens below this share of the most probable one; 0 off.",
    "typical_p": "Locally typical sampling; 1 off.",
    "tfs_z": "Tail-free sampling; 1 off.",
    "top_n_sigma": "Drop tokens so many standard deviations below the best; -1 off.",
    "xtc_probability": "Chance to exclude top choices; 0 off.",
    "xtc_threshold": "What counts as a top choice.",
    "dynatemp_range": "Temperature varies so much with the entropy; 0 off.",
    "dynatemp_exponent": "How the entropy becomes a temperature.",
    "repeat_last_n": "Tokens the penalties look back on; -1 all.",
    "repeat_penalty": "1 off.",
    "frequency_penalty": "0 off.",
    "presence_penalty": "0 off.",
    "dry_multiplier": "Strength of the DRY penalty on repeated phrases; 0 off.",
    "dry_base": "How DRY grows with the phrase.",
    "dry_allowed_length": "Phrases up to so many tokens may repeat.",
    "dry_penalty_last_n": "Tokens DRY looks back on; -1 all.",
    "mirostat": "0 off, 1 or 2.",
    "mirostat_tau": "Target surprise.",
    "mirostat_eta": "Learning rate.",
    "seed": "The same seed gives the same text.",
}


def sampling_options(function: Callable[P, R]) -> Callable[P, R]:
    """An option for every number in `SamplingParams`, absent unless given."""
    defaults = SamplingParams()
    for name, text in reversed(_SAMPLING_HELP.items()):
        default = getattr(defaults, name)
        note = "random" if name == "seed" else f"{default:g}"
        flag = f"--{name.replace('_', '-')}"
        function = click.option(flag, name, type=type(default), help=f"{text}  [default: {note}]")(function)
    return function


@cli.command()
@click.argument("prompt", required=False)
@click.option(
    "--image",
    "images",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A picture before the prompt, for a model with --mmproj; may be repeated.",
)
@click.option("--chat", is_flag=True, help="PROMPT is what a user says, to the model's chat template.")
@click.option("--max-tokens", "-n", type=int, help="Tokens at most.  [default: until the model ends]")
@click.option("--stop", multiple=True, help="End before this text; may be repeated.")
@click.option("--shift", is_flag=True, help="Go on beyond a full context, forgetting the oldest text.")
@click.option(
    "--grammar-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GBNF grammar the text must follow.",
)
@sampling_options
@engine_options
def run(
    options: EngineOptions,
    /,
    prompt: str | None,
    images: tuple[Path, ...],
    chat: bool,
    max_tokens: int | None,
    stop: tuple[str, ...],
    shift: bool,
    grammar_file: Path | None,
    **sampling: float | None,
) -> int:
    """Continue PROMPT and stream the text to stdout. Without PROMPT, or with "-", it is read from stdin."""
    set_up_logging(options.verbose)
    request = make_request(make_prompt(prompt, images, chat), max_tokens, stop, shift, grammar_file, sampling)
    # A pager may keep the text waiting for as long as its reader likes.
    configs = options.configs(slots=1, stall_timeout=float("inf"))

    async def generate(engine: Engine) -> None:
        from trio_runner.terminal import TextOutput

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
    """What `run` asks to be continued. Raises `click.UsageError`."""
    if text is None or text == "-":
        if text is None and sys.stdin.isatty():
            raise click.UsageError("a prompt is missing")
        text = read_stdin().removesuffix("\n")
    if chat:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        return Chat(messages=({"role": "user", "content": parts if images else text},))
    return cast(Prompt, (*images, text)) if images else text


def make_request(
    prompt: Prompt,
    max_tokens: int | None,
    stop: tuple[str, ...],
    shift: bool,
    grammar_file: Path | None,
    sampling: dict[str, float | None],
) -> GenerateRequest:
    """What `run` asks of the engine. Raises `click.UsageError`."""
    try:
        grammar = grammar_file.read_text(encoding="utf-8") if grammar_file is not None else ""
        chosen = {name: value for name, value in sampling.items() if value is not None}
        params = SamplingParams(grammar=grammar, **chosen)  # type: ignore[arg-type]  # of the fields' own types
        return GenerateRequest(prompt=prompt, max_tokens=max_tokens, stop=stop, shift=shift, sampling=params)
    except (RunnerError, OSError, UnicodeDecodeError) as error:
        raise click.UsageError(str(error)) from error


def read_stdin() -> str:
    """All of stdin. Raises `click.UsageError` when it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: {error}") from error


def read_texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the lines of stdin in the place of "-"."""
    return [line for text in arguments for line in (read_stdin().splitlines() if text == "-" else [text])]


@cli.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--normalize", is_flag=True, help="Scale every vector to length 1.")
@click.option("--dimensions", type=click.IntRange(1), help="Only so many elements, the first ones.")
@click.option("--truncate", is_flag=True, help="Cut off the end of a text that is too long.")
@engine_options
def embed(
    options: EngineOptions, /, texts: tuple[str, ...], normalize: bool, dimensions: int | None, truncate: bool
) -> int:
    """Print the embedding of every TEXT as a JSON array, one per line. "-" stands for the lines of stdin."""
    set_up_logging(options.verbose)
    all_texts = read_texts(texts)
    configs = options.configs(slots=EngineConfig().slots)

    async def print_vectors(engine: Engine) -> None:
        vectors = await engine.embed(all_texts, normalize=normalize, dimensions=dimensions, truncate=truncate)
        for vector in vectors:
            click.echo(f"[{','.join(str(number) for number in vector)}]")  # the shortest text of each float32

    return run_with_engine(configs, print_vectors)


@cli.command()
@click.argument("query")
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT...")
@click.option("--truncate", is_flag=True, help="Cut off the end of a document that is too long.")
@engine_options
def rerank(options: EngineOptions, /, query: str, documents: tuple[str, ...], truncate: bool) -> int:
    """Print the score of every DOCUMENT for QUERY, one per line, by a model made for it. "-" stands for the lines of
    stdin."""
    set_up_logging(options.verbose)
    texts = read_texts(documents)
    configs = options.configs(slots=EngineConfig().slots)

    async def print_scores(engine: Engine) -> None:
        for score in await engine.rerank(query, texts, truncate=truncate):
            click.echo(str(score))

    return run_with_engine(configs, print_scores)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def info(options: EngineOptions, /, as_json: bool) -> int:
    """Print what is known of the model, the devices and the libraries."""
    set_up_logging(options.verbose)
    configs = options.configs(slots=1)

    async def print_facts(engine: Engine) -> None:
        facts = collect_facts(engine)
        if as_json:
            click.echo(json.dumps(facts, ensure_ascii=False, default=str))
        else:
            width = max(len(name) for section in facts.values() for name in section)
            for title, section in facts.items():
                click.echo(f"{title}:")
                for name, value in section.items():
                    click.echo(f"  {name:<{width}} {value}")

    return run_with_engine(configs, print_facts)


def collect_facts(engine: Engine) -> dict[str, dict[str, object]]:
    """Sections of names and values, in the order in which a reader wants them."""
    from trio_runner.llama import backends, library

    model, capabilities, placement = engine.info, engine.capabilities, engine.placement
    remote = [device.number for device in placement.devices if device.is_remote] if placement else []
    return {
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "description": model.description,
            "parameters": model.n_params,
            "bytes": model.size,
            "layers": model.n_layer,
            "embedding length": model.n_embd,
            "vocabulary": model.n_vocab,
            "trained context": model.n_ctx_train,
            "causal": model.causal,
            "chat template": model.chat_template is not None,
        },
        "context": {
            "tokens per slot": capabilities.n_ctx,
            "generates text": capabilities.can_generate,
            "takes images": engine.has_projector,
            "ranks": capabilities.ranks,
            "reads with an encoder": capabilities.decoder_start is not None,
            "can go back in a text": capabilities.can_trim,
            "can shift": capabilities.can_shift,
        },
        "placement": placement_facts(placement),
        "devices": {device.name: describe_device(device) for device in backends.devices(remote)},
        "backends": {
            plugin.name: "opened" if plugin.problem is None else f"cannot be opened: {plugin.problem}"
            for plugin in backends.plugins()
        },
        "library": {"trio-runner": __version__, "binding ABI": library.ABI, "system": library.system_info()},
    }


def placement_facts(placement: Placement | None) -> dict[str, object]:
    """What the model takes where."""
    if placement is None:
        return {}
    facts: dict[str, object] = {"layers on devices": f"{placement.n_device_layers} of {placement.n_layers}"}
    for device, use in placement.places:
        facts["this machine" if device is None else device.name] = f"{use.total / MIB:.0f} MiB: {use}"
    return facts


def describe_device(device: Device) -> str:
    """What it is, its memory, and the types of weights and of KV caches that it computes with by itself."""
    from trio_runner.llama.backends import kv_types, weight_types

    text = f"{device.kind}, {device.description} ({device.backend})"
    if device.memory_total:
        text += f", {device.memory_free / MIB:.0f} of {device.memory_total / MIB:.0f} MiB free"
    if device.kind == "CPU":
        return text
    if device.is_remote:
        return f"{text}, computes with what its backend has"
    return f"{text}; weights: {' '.join(weight_types(device))}; KV cache: {' '.join(kv_types(device))}"


@cli.command()
@click.option("--url", "urls", multiple=True, help="A server to drive; may be repeated. Without it, one is started.")
@click.option(
    "--dialect",
    "dialects",
    multiple=True,
    type=click.Choice(["runner", "llama", "openai"]),
    help="What the server speaks; one for each URL.  [default: found out]",
)
@click.option("--pid", "pids", type=int, multiple=True, help="Its process; one for each URL.  [default: found out]")
@click.option("--scenario", "scenarios", multiple=True, help='May be repeated; "list" lists them.  [default: all]')
@click.option("--repeat", "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds of each.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens of a long prompt.  [default: 1900; --bare: 512]")
@click.option(
    "--max-tokens",
    "-n",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens per stream; four times as many where a rate is measured.",
)
@click.option("--storm", type=click.IntRange(1), default=300, show_default=True, help="Connections of a storm.")
@click.option(
    "--cancellations", type=click.IntRange(1), default=100, show_default=True, help="Beside those that must not notice."
)
@click.option("--clients", type=click.IntRange(1), default=200, show_default=True, help="At once, in the overload.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is random.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write JSON; - for stdout.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a table.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw a picture.")
@click.option("--bare", is_flag=True, help="Instead: the engine beside a bare llama.cpp loop, in this process.")
@engine_options
def bench(
    options: EngineOptions,
    /,
    urls: tuple[str, ...],
    dialects: tuple[DialectName, ...],
    pids: tuple[int, ...],
    scenarios: tuple[str, ...],
    repeat: int,
    prompt_tokens: int | None,
    max_tokens: int,
    storm: int,
    cancellations: int,
    clients: int,
    seed: int,
    json_file: str | None,
    markdown_file: Path | None,
    plot_file: Path | None,
    bare: bool,
) -> int:
    """Measure what the clients of a server feel: how soon, how fast, and what happens when they go away.

    Each scenario is repeated; of two servers, the rounds alternate, and the last column is first over second, of the
    medians of each round. Without --url, a server with the options of `serve` is started for the time of the
    measurement. What has been measured is in the files after every round, and shown after Ctrl-C too.
    """
    set_up_logging(options.verbose)
    if bare:
        return _bench_bare(options, n_prompt=prompt_tokens or 512, n_tokens=max_tokens, rounds=repeat)

    from rich.console import Console

    from trio_runner.bench import peers, report
    from trio_runner.bench.rounds import SCENARIOS, Outcome, run_rounds
    from trio_runner.bench.scenarios import Load
    from trio_runner.bench.server import meet, parse_url
    from trio_runner.service import run_to_exit_code, until_signal

    if scenarios == ("list",):
        for name, scenario in SCENARIOS.items():
            summary = " ".join((scenario.__doc__ or "").split())
            click.echo(f"{name:<16}{summary}")
        return 0
    if unknown := set(scenarios) - set(SCENARIOS):
        raise click.UsageError(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    for given, of_each in ((dialects, "--dialect"), (pids, "--pid")):
        if given and len(given) != len(urls):
            raise click.UsageError(f"{of_each} must be given once for each --url, or not at all")
    try:
        for url in urls:
            parse_url(url)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for path in (json_file, markdown_file, plot_file):
        if path is not None and not Path(path).parent.is_dir():
            raise click.UsageError(f"there is no directory {Path(path).parent}")
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException(report.NO_MATPLOTLIB)
    arguments = [] if urls else _serve_arguments(options)
    load = Load(tokens=max_tokens, storm=storm, cancellations=cancellations, clients=clients)
    if prompt_tokens is not None:
        load = dataclasses.replace(load, long_prompt=prompt_tokens, prefix=max(prompt_tokens * 15 // 19, 1))
    errors = Console(stderr=True)
    measured: list[Outcome] = []

    def document(outcomes: Sequence[Outcome]) -> str:
        return json.dumps(report.document(outcomes, seed=seed, repeat=repeat, load=load), indent=1)

    def keep(outcomes: Sequence[Outcome]) -> None:
        measured[:] = outcomes
        try:
            if json_file not in (None, "-"):
                report.write(Path(json_file), document(outcomes) + "\n")
            if markdown_file is not None:
                report.write(markdown_file, report.markdown(outcomes, seed=seed))
        except OSError as error:
            raise RunnerError(f"the results cannot be written: {error}") from error

    def show(outcomes: Sequence[Outcome]) -> None:
        if plot_file is not None:
            report.plot(outcomes, plot_file)
        if json_file == "-":
            click.echo(document(outcomes))
        else:
            console = Console(width=None if sys.stdout.isatty() else 160)
            console.print(report.table(outcomes))
            for remark in report.remarks(outcomes):
                console.print(remark, markup=False, highlight=False, soft_wrap=True)
            console.print(f"seed {seed}", highlight=False)

    async def measure() -> None:
        async with AsyncExitStack() as stack:
            asked: list[tuple[str, DialectName | None, int | None]] = [
                (url, dialects[i] if dialects else None, pids[i] if pids else None) for i, url in enumerate(urls)
            ]
            with errors.status("starting") as status:
                if not urls:
                    url, pid = await stack.enter_async_context(peers.own_server(arguments))
                    asked = [(url, "runner", pid)]
                servers = [await meet(url, dialect, slots=options.slots, pid=pid) for url, dialect, pid in asked]
                errors.print(f"seed {seed}", highlight=False)
                progress = status.update if errors.is_terminal else errors.print
                names = scenarios or list(SCENARIOS)
                try:
                    await run_rounds(servers, names, repeat=repeat, seed=seed, load=load, progress=progress, keep=keep)
                finally:
                    status.stop()
                    if measured:
                        show(measured)

    async def interruptible() -> int:
        return await until_signal(measure)

    return run_to_exit_code(interruptible)


def _bench_bare(options: EngineOptions, *, n_prompt: int, n_tokens: int, rounds: int) -> int:
    model, config = options.configs(slots=EngineConfig().slots)

    from trio_runner.bench.bare import run_bench
    from trio_runner.llama.loader import LlamaLoader
    from trio_runner.service import run_to_exit_code, until_signal

    async def measure() -> None:
        measured = await run_bench(LlamaLoader(model), config, n_prompt=n_prompt, n_tokens=n_tokens, rounds=rounds)
        click.echo(f"{'tokens per second':<20} {'engine':>10} {'bare loop':>10} {'ratio':>7}")
        for row in measured:
            click.echo(f"{row.name:<20} {row.engine:>10.1f} {row.bare:>10.1f} {row.ratio:>7.3f}")

    async def interruptible() -> int:
        return await until_signal(measure)

    return run_to_exit_code(interruptible)


def _serve_arguments(options: EngineOptions) -> list[str]:
    """What was asked of the engine, for the command line of `serve`; the model as a path. Raises as `configs`."""
    model, _ = options.configs(slots=EngineConfig().slots)
    arguments = [f"--model={model.path}"]
    context = click.get_current_context()
    fields = {field.name for field in dataclasses.fields(EngineOptions)} - {"model", "offline", "verbose"}
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in fields or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        flag, value = parameter.opts[0], getattr(options, name)
        if isinstance(value, bool):
            arguments.append(flag if value else parameter.secondary_opts[0])
        elif name == "lora":
            arguments += [f"{flag}={adapter.path}" for adapter in value]
        elif name == "lora_scaled":
            arguments += [f"{flag}={adapter.path}={adapter.scale}" for adapter in value]
        else:
            arguments.append(f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return arguments


@cli.command()
@click.argument("model", default=DEFAULT_MODEL.name)
def fetch(model: str) -> int:
    """Fetch MODEL if it is not here yet, and print the path of its file."""
    set_up_logging(0)
    click.echo(fetch_model(model))
    return 0
