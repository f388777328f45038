"""`trio-runner bench`: measures servers, or the engine beside a bare loop of llama.cpp."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trio_runner.cli.logs import set_up_logging
from trio_runner.cli.options import EngineChoice, engine_options
from trio_runner.errors import RunnerError

if TYPE_CHECKING:
    from trio_runner.bench.dialects import DialectName
    from trio_runner.bench.rounds import Outcome
    from trio_runner.bench.scenarios import Load
    from trio_runner.bench.server import Server

_POSITIVE = click.IntRange(1)
_FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What the user asks to be measured, and where the results go."""

    urls: tuple[str, ...]
    dialects: tuple[DialectName, ...]
    """One for each URL, or none. Without a URL, all of the server that is started."""
    pids: tuple[int, ...]
    """Process of each server, or none."""
    scenarios: tuple[str, ...]
    """Names; none means all scenarios."""
    repeat: int
    prompt_tokens: tuple[int, ...]
    """Lengths of prompts; none means the default. More than one only with --bare."""
    streams: tuple[int, ...]
    """Numbers of streams, for --bare; none means the default."""
    max_tokens: int
    storm: int
    cancellations: int
    clients: int
    seed: int
    json_file: str | None
    """"-" means stdout."""
    markdown_file: Path | None
    plot_file: Path | None


@click.command()
@click.option(
    "--url", "urls", multiple=True, help="Server to measure. May be repeated. Without it, a server is started."
)
@click.option(
    "--dialect",
    "dialects",
    multiple=True,
    type=click.Choice(["runner", "llama", "openai", "openai-chat"]),
    help="HTTP dialect of the server, one for each URL. One URL may be given several times, with another dialect each "
    "time; without a URL, the server that is started is measured in each dialect.  [default: found out]",
)
@click.option(
    "--pid", "pids", type=int, multiple=True, help="Process of the server, one for each URL.  [default: found out]"
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    help='Scenario to measure. May be repeated; "list" lists them.  [default: all]',
)
@click.option(
    "--repeat", "--rounds", type=_POSITIVE, default=5, show_default=True, help="Rounds to measure each scenario for."
)
@click.option(
    "--prompt-tokens",
    type=_POSITIVE,
    multiple=True,
    help="Tokens of a long prompt. May be repeated with --bare.  [default: 1900; with --bare: 512]",
)
@click.option(
    "--streams",
    type=_POSITIVE,
    multiple=True,
    help="With --bare: number of streams that decode together. May be repeated.  [default: 1, and one on every slot]",
)
@click.option(
    "--max-tokens",
    "-n",
    type=_POSITIVE,
    default=64,
    show_default=True,
    help="Tokens of a stream. Where a rate is measured, streams have four times as many.",
)
@click.option("--storm", type=_POSITIVE, default=300, show_default=True, help="Connections of a storm.")
@click.option(
    "--cancellations",
    type=_POSITIVE,
    default=100,
    show_default=True,
    help="Clients that disconnect beside others that must not notice.",
)
@click.option(
    "--clients", type=_POSITIVE, default=200, show_default=True, help="Requests at the same time in the overload."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is random.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the results to this file as JSON. - means stdout.",
)
@click.option("--markdown", "markdown_file", type=_FILE, help="Write a table of the results to this file.")
@click.option("--plot", "plot_file", type=_FILE, help="Draw the results into this file.")
@click.option(
    "--bare", is_flag=True, help="Measure instead the engine beside a bare loop of llama.cpp, in this process."
)
@click.option(
    "--turns",
    is_flag=True,
    help="With --bare: load the model, and measure one turn for each line of JSON on stdin. For other programs.",
)
@engine_options()
def bench(options: EngineChoice, /, bare: bool, turns: bool, **chosen: Any) -> int:
    """Measure what the clients of a server notice: how soon and how fast text comes, and what happens when they leave.

    Each scenario is measured for several rounds. Two servers take turns in each round, and the last column of the
    results is the first server over the second: the median of the ratios of all rounds. Without --url, a server with
    the options of `serve` is started for the time of the measurement. The files are written after every round, so that
    Ctrl-C loses nothing.
    """
    set_up_logging(options.verbose)
    asked = BenchOptions(**chosen)
    if bare:
        from trio_runner.cli.bench_bare import bench_bare, take_turns

        return take_turns(options) if turns else bench_bare(options, asked)
    if turns or asked.streams or len(asked.prompt_tokens) > 1:
        raise click.UsageError("--turns, --streams and several --prompt-tokens are for --bare only")
    if asked.scenarios == ("list",):
        _list_scenarios()
        return 0
    _check(asked)
    arguments = [] if asked.urls else options.serve_arguments()

    from trio_runner.cli.running import run_until_signal

    return run_until_signal(partial(_measure, asked, arguments, options.slots))


def _list_scenarios() -> None:
    from trio_runner.bench.rounds import SCENARIOS

    for name, scenario in SCENARIOS.items():
        summary = " ".join((scenario.__doc__ or "").split())
        click.echo(f"{name:<16}{summary}")


def _check(asked: BenchOptions) -> None:
    """Raises `click.ClickException` for what would fail only after minutes of measuring."""
    from trio_runner.bench import report
    from trio_runner.bench.rounds import SCENARIOS
    from trio_runner.bench.server import parse_url

    if unknown := set(asked.scenarios) - set(SCENARIOS):
        raise click.UsageError(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    for given, of_each in ((asked.dialects, "--dialect"), (asked.pids, "--pid")):
        if given and len(given) != len(asked.urls) and (asked.urls or of_each == "--pid"):
            raise click.UsageError(f"{of_each} must be given once for each --url, or not at all")
    try:
        for url in asked.urls:
            parse_url(url)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for path in (asked.json_file, asked.markdown_file, asked.plot_file):
        if path is not None and not Path(path).parent.is_dir():
            raise click.UsageError(f"there is no directory {Path(path).parent}")
    if asked.plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException(report.NO_MATPLOTLIB)


def _load(asked: BenchOptions) -> Load:
    from trio_runner.bench.scenarios import Load

    load = Load(tokens=asked.max_tokens, storm=asked.storm, cancellations=asked.cancellations, clients=asked.clients)
    if not asked.prompt_tokens:
        return load
    [n_prompt] = asked.prompt_tokens
    return dataclasses.replace(load, long_prompt=n_prompt, prefix=max(n_prompt * 15 // 19, 1))


async def _measure(asked: BenchOptions, arguments: Sequence[str], slots: int | None) -> None:
    """Measure the servers, or a new one that is started with `arguments`; `slots` is what the user said it has."""
    from rich.console import Console

    from trio_runner.bench.rounds import SCENARIOS, run_rounds

    errors = Console(stderr=True)
    results = _Results(asked, _load(asked))
    async with AsyncExitStack() as stack:
        with errors.status("starting") as status:
            servers = await _meet_servers(asked, arguments, slots, stack)
            errors.print(f"seed {asked.seed}", highlight=False)
            try:
                await run_rounds(
                    servers,
                    asked.scenarios or list(SCENARIOS),
                    repeat=asked.repeat,
                    seed=asked.seed,
                    load=results.load,
                    progress=status.update if errors.is_terminal else errors.print,
                    keep=results.keep,
                )
            finally:
                status.stop()
                results.show()


async def _meet_servers(
    asked: BenchOptions, arguments: Sequence[str], slots: int | None, stack: AsyncExitStack
) -> list[Server]:
    """The servers to measure. One that was started for it ends with `stack`."""
    from trio_runner.bench import peers
    from trio_runner.bench.server import meet

    if not asked.urls:
        url, pid = await stack.enter_async_context(peers.own_server(arguments))
        servers = [
            dataclasses.replace(
                await meet(url, dialect, slots=slots, pid=pid),
                fresh=partial(peers.another_server, arguments, dialect, slots),
            )
            for dialect in asked.dialects or ("runner",)
        ]
    else:
        dialects = asked.dialects or (None,) * len(asked.urls)
        pids = asked.pids or (None,) * len(asked.urls)
        servers = [
            await meet(url, dialect, slots=slots, pid=pid)
            for url, dialect, pid in zip(asked.urls, dialects, pids, strict=True)
        ]
    if len({server.key for server in servers}) < len(servers):
        raise RunnerError("a server is measured twice in the same dialect: give each another --dialect")
    return servers


class _Results:
    """What has been measured so far."""

    def __init__(self, asked: BenchOptions, load: Load) -> None:
        self.load = load
        self._asked = asked
        self._outcomes: list[Outcome] = []

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        """Write the results to the files. Raises `RunnerError` if they cannot be written."""
        from trio_runner.bench import report

        self._outcomes = list(outcomes)
        json_file, markdown_file = self._asked.json_file, self._asked.markdown_file
        try:
            if json_file not in (None, "-"):
                report.write(Path(json_file), self._document() + "\n")
            if markdown_file is not None:
                report.write(markdown_file, report.markdown(outcomes, seed=self._asked.seed))
        except OSError as error:
            raise RunnerError(f"the results cannot be written: {error}") from error

    def show(self) -> None:
        """Print the results, and draw them. Does nothing if there are none."""
        from rich.console import Console

        from trio_runner.bench import report

        if not self._outcomes:
            return
        if self._asked.plot_file is not None:
            report.plot(self._outcomes, self._asked.plot_file)
        if self._asked.json_file == "-":
            click.echo(self._document())
            return
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(report.table(self._outcomes))
        for remark in report.remarks(self._outcomes):
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
        console.print(f"seed {self._asked.seed}", highlight=False)

    def _document(self) -> str:
        from trio_runner.bench import report

        document = report.document(self._outcomes, seed=self._asked.seed, repeat=self._asked.repeat, load=self.load)
        return json.dumps(document, indent=1)
