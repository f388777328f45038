"""CPU kernels: ours beside upstream's, and beside those of a peer, in turns on the same machine.

    python -m trio_runner.bench.kernels --model q4_1=FILE --peer /path/to/llama-bench --threads 2

Each round measures every contender once, beginning with another one each time. What counts are the ratios of the
rounds. `ci/bench` does it for all types of weights.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from trio_runner.bench.bare import N_SHORT_PROMPT, Case
from trio_runner.bench.contenders import UPSTREAM, ContenderFailed, OwnProcess, Peer, Sample
from trio_runner.bench.kernel_table import Limits, Loads, Measured, markdown

WARM_TOKENS: Final = 512
"""Tokens that a turn of prefill has at least: shorter prompts are read several times."""
REST_SECONDS: Final = 0.05
"""Seconds before a turn: threads that wait for their next work spin for a while after the turn before."""
SPARE_CELLS: Final = 64
"""Cells of a slot beyond what the cases need."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured for each model."""

    threads: int
    rounds: int
    prompts: tuple[int, ...]
    streams: tuple[int, ...]
    streams_of: tuple[str, ...]
    """Models that are measured with several streams; none means all."""
    n_decode: int
    loads: bool

    def groups(self, model: str) -> Iterator[list[Case]]:
        """The cases of a model, in groups that share child processes: one stream, and several."""
        yield [
            *(Case(n_prompt, n_times=max(1, WARM_TOKENS // n_prompt)) for n_prompt in self.prompts),
            *(Case(N_SHORT_PROMPT, 1, self.n_decode) for n_streams in self.streams if n_streams == 1),
        ]
        if model in (self.streams_of or (model,)):
            yield [Case(N_SHORT_PROMPT, n_streams, self.n_decode) for n_streams in self.streams if n_streams > 1]


def measure(
    name: str, model: Path, plan: Plan, peer: Peer | None, keep: Callable[[Measured], None], say: Callable[[str], None]
) -> None:
    """Measure all cases of `plan` with one model. `keep` gets each case when its rounds are over.

    Raises `ContenderFailed`.
    """
    for cases in plan.groups(name):
        if not cases:
            continue
        slots = max(case.n_streams for case in cases)
        context = max(case.n_prompt + case.n_decode for case in cases) + SPARE_CELLS
        start = partial(OwnProcess, model, slots=slots, context=context, threads=plan.threads)
        with start() as ours, start(environment=UPSTREAM) as upstream:
            of = ours.loaded
            turns: dict[str, Callable[[Case], Sample]] = {
                "engine": partial(ours.sample, "engine"),
                "bare": partial(ours.sample, "bare"),
                "upstream": partial(upstream.sample, "engine"),
            }
            if peer is not None:
                turns["peer"] = partial(peer.sample, model)
            for case in cases:
                able = {who: turn for who, turn in turns.items() if who != "peer" or (peer and peer.can(case))}
                rounds = _rounds(able, case, plan.rounds, lambda text: say(f"{name}, {text}"))
                keep(Measured(name, case, of, tuple(rounds)))


def _rounds(
    turns: Mapping[str, Callable[[Case], Sample]], case: Case, n_rounds: int, say: Callable[[str], None]
) -> Iterator[dict[str, Sample]]:
    """The rounds of one case, after one that is not kept because it warms up."""
    names = list(turns)
    for number in range(n_rounds + 1):
        say(f"{case.name}, round {number} of {n_rounds}" if number else f"{case.name}, warming up")
        first = number % len(names)
        samples = {}
        for name in names[first:] + names[:first]:
            time.sleep(REST_SECONDS)
            samples[name] = turns[name](case)
        if number:
            yield samples


def measure_loads(name: str, model: Path, plan: Plan) -> Loads:
    """Load the model `plan.rounds` times with our kernels, and as often with upstream's, in turns."""
    found: dict[bool, list[Any]] = {False: [], True: []}
    for number in range(plan.rounds + 1):
        for is_upstream in (False, True) if number % 2 else (True, False):
            environment = UPSTREAM if is_upstream else None
            context = max(*plan.prompts, N_SHORT_PROMPT + plan.n_decode) + SPARE_CELLS
            with OwnProcess(model, slots=1, context=context, threads=plan.threads, environment=environment) as child:
                if number:  # the first time reads the file
                    found[is_upstream].append(child.loaded)
    return Loads(name, tuple(zip(found[False], found[True], strict=True)))


class _Results:
    """What has been measured so far. It is written to the files after every case."""

    def __init__(self, json_file: Path | None, markdown_file: Path | None, plan: Plan, limits: Limits | None) -> None:
        self.measured: list[Measured] = []
        self.loads: list[Loads] = []
        self._json_file, self._markdown_file = json_file, markdown_file
        self._plan, self._limits = plan, limits

    def keep(self, measured: Measured) -> None:
        self.measured.append(measured)
        self.write()

    def write(self) -> None:
        if self._json_file is not None:
            document = {
                "plan": dataclasses.asdict(self._plan),
                "limits": None if self._limits is None else dataclasses.asdict(self._limits),
                "cases": [dataclasses.asdict(measured) for measured in self.measured],
                "loads": [dataclasses.asdict(loads) for loads in self.loads],
            }
            self._json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if self._markdown_file is not None:
            self._markdown_file.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        return markdown(self.measured, self.loads, self._limits, self._plan.threads)


def _models(_context: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    models = {}
    for value in values:
        name, found, file = value.partition("=")
        if not found or not Path(file).is_file():
            raise click.BadParameter(f"{value} is not NAME=FILE of a model")
        models[name] = Path(file).absolute()
    return models


def _names(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word for word in value.split(",") if word)


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in value.split(",") if word)
    except ValueError:
        raise click.BadParameter(f"{value} is not a list of numbers") from None
    if any(number < 1 for number in numbers):
        raise click.BadParameter("numbers start at 1")
    return numbers


_FILE = click.Path(dir_okay=False, path_type=Path)
_PROGRAM = click.Path(dir_okay=False, exists=True, path_type=Path)


@click.command()
@click.option("--model", "models", multiple=True, required=True, callback=_models, help="NAME=FILE. May be repeated.")
@click.option("--peer", type=_PROGRAM, help="llama-bench of another program.  [default: no peer]")
@click.option(
    "--batched-peer", type=_PROGRAM, help="Its llama-batched-bench.  [default: the one beside --peer, if there is one]"
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each program.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds of each case.")
@click.option("--prompts", default="16,64,512,1900", show_default=True, callback=_numbers, help="Lengths of prompts.")
@click.option("--streams", default="1,4,8,16,32", show_default=True, callback=_numbers, help="Numbers of streams.")
@click.option("--streams-of", default="", callback=_names, help="Only these models with several.  [default: all]")
@click.option("--tokens", "n_decode", type=click.IntRange(1), default=64, show_default=True, help="Tokens a stream.")
@click.option("--loads/--no-loads", default=True, show_default=True, help="Measure loading and memory, too.")
@click.option("--limits", type=click.File(), help="What the machine can do, as ci/limits.c prints it.")
@click.option("--json", "json_file", type=_FILE, help="Write every round to this file.")
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the tables to this file.")
def main(
    models: dict[str, Path],
    peer: Path | None,
    batched_peer: Path | None,
    limits: Any,
    json_file: Path | None,
    markdown_file: Path | None,
    **plan_of: Any,
) -> None:
    """Measure CPU kernels: the engine and a bare loop with ours, the engine with upstream's, and a peer's."""
    plan = Plan(**plan_of)
    results = _Results(json_file, markdown_file, plan, None if limits is None else Limits(**json.load(limits)))
    if peer is not None and batched_peer is None:
        beside = peer.with_name("llama-batched-bench")
        batched_peer = beside if beside.is_file() else None
    other = None
    if peer is not None:
        batched = None if batched_peer is None else batched_peer.absolute()
        other = Peer(peer.absolute(), batched, threads=plan.threads)

    def say(text: str) -> None:
        click.echo(text, err=True)

    try:
        for name, model in models.items():
            if plan.loads:
                say(f"{name}, loading")
                results.loads.append(measure_loads(name, model, plan))
            measure(name, model, plan, other, results.keep, say)
    except ContenderFailed as error:
        raise click.ClickException(str(error)) from error
    finally:
        results.write()
        click.echo(results.table())


if __name__ == "__main__":
    sys.exit(main())
