"""The results for people and for programs: as a table, as markdown, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_runner.bench.figures import Figures, Metric, figures, paired_ratio
from trio_runner.bench.rounds import Outcome
from trio_runner.bench.scenarios import Load

if TYPE_CHECKING:
    from rich.table import Table

_COMPARED = {"tokens/s", "ms", "s", "tokens"}

NO_MATPLOTLIB = "--plot needs matplotlib: pip install 'trio-runner[plot]'"


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one scenario, with the samples of every server."""

    scenario: str
    metric: Metric
    samples: tuple[tuple[tuple[float, ...], ...], ...]
    """Samples by server and by round."""

    @property
    def columns(self) -> list[Figures | None]:
        """The statistics of each server, over all rounds. None if the server has no samples."""
        pooled = [[value for samples in rounds for value in samples] for rounds in self.samples]
        return [figures(values) if values else None for values in pooled]

    @property
    def ratio(self) -> float | None:
        """The first of two servers divided by the second, from the medians of each round.

        None for a count, a difference or a ratio, and if there are not two servers.
        """
        if len(self.samples) != 2 or self.metric.unit not in _COMPARED or self.metric.difference:
            return None
        n_rounds = min(map(len, self.samples))
        return paired_ratio(self.samples[0][:n_rounds], self.samples[1][:n_rounds])


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The rows of the table, by scenario, and by metric in the order of their first samples."""
    found = []
    for scenario in dict.fromkeys(outcome.scenario for outcome in outcomes):
        of_scenario = [outcome for outcome in outcomes if outcome.scenario == scenario]
        metrics = dict.fromkeys(metric for outcome in of_scenario for turn in outcome.rounds for metric in turn.samples)
        for metric in metrics:
            samples = (tuple(tuple(turn.samples.get(metric, ())) for turn in outcome.rounds) for outcome in of_scenario)
            found.append(Row(scenario, metric, tuple(samples)))
    return found


def remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """Remarks for people: why a result is missing, and what was noticed while measuring."""
    found = []
    for outcome in outcomes:
        where = f"{outcome.scenario}, {outcome.server.dialect.name} at {outcome.server.url}"
        if outcome.unavailable is not None:
            found.append(f"{where}: -, {outcome.unavailable}")
        found += [f"{where}: {note}" for note in outcome.notes]
    return found


def number(value: float) -> str:
    """Format a number with at least two significant digits, and with all digits before the point."""
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def _cells(column: Figures | None) -> list[str]:
    if column is None:
        return ["-", "-", "-", "-"]
    return [number(column.median), number(column.p99), number(column.maximum), str(column.n)]


def _cells_of(row: Row) -> list[str]:
    ratio = [] if len(row.samples) != 2 else ["-" if row.ratio is None else f"{row.ratio:.2f}"]
    unit = f"{row.metric.name} ({row.metric.unit})" if row.metric.unit else row.metric.name
    return [row.scenario, unit, *(cell for column in row.columns for cell in _cells(column)), *ratio]


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of the servers: their dialects, with a letter before each if that does not tell them apart."""
    servers = list({outcome.server.key: outcome.server for outcome in outcomes}.values())
    names = [str(server.dialect.name) for server in servers]
    return names if len(set(names)) == len(names) else [f"{'ABCDEFGH'[i % 8]} {name}" for i, name in enumerate(names)]


def _header(outcomes: Sequence[Outcome], joint: str = " ") -> list[str]:
    names = _names(outcomes)
    figures_of = ["median", "p99", "max", "n"]
    ratio = [f"{names[0]} / {names[1]}"] if len(names) == 2 else []
    return ["scenario", "measure", *(f"{name}{joint}{title}" for name in names for title in figures_of), *ratio]


def _missing(outcomes: Sequence[Outcome]) -> list[str]:
    """Scenarios without results on any server."""
    measured = {row.scenario for row in rows(outcomes)}
    return [name for name in dict.fromkeys(outcome.scenario for outcome in outcomes) if name not in measured]


def table(outcomes: Sequence[Outcome]) -> Table:
    """The results as a table for the terminal."""
    from rich.table import Table

    header = _header(outcomes, "\n")
    built = Table(title=None, header_style="bold", pad_edge=False)
    for title in header:
        figure = title not in ("scenario", "measure")
        built.add_column(title, justify="right" if figure else "left", no_wrap=title != "measure")
    before = None
    for row in rows(outcomes):
        if before not in (None, row.scenario):
            built.add_section()
        scenario, *cells = _cells_of(row)
        built.add_row(scenario if scenario != before else "", *cells)
        before = row.scenario
    for name in _missing(outcomes):
        built.add_section()
        built.add_row(name, *["-"] * (len(header) - 1))
    return built


def markdown(outcomes: Sequence[Outcome], *, seed: int) -> str:
    """The results as a markdown table, followed by the remarks and the seed."""
    header = _header(outcomes)
    lines = [header, ["---", "---", *["--:"] * (len(header) - 2)], *map(_cells_of, rows(outcomes))]
    lines += [[name, *["-"] * (len(header) - 1)] for name in _missing(outcomes)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    noted = "".join(f"* {remark}\n" for remark in [*remarks(outcomes), f"seed {seed}"])
    return f"{text}\n{noted}"


def document(outcomes: Sequence[Outcome], *, seed: int, repeat: int, load: Load) -> dict[str, Any]:
    """All results and settings, for `json.dump`."""
    servers = list({outcome.server.key: outcome.server for outcome in outcomes}.values())
    return {
        "machine": machine(),
        "servers": [
            {"url": server.url, "dialect": server.dialect.name, "slots": server.slots, "model": server.dialect.model}
            for server in servers
        ],
        "seed": seed,
        "repeat": repeat,
        "load": dataclasses.asdict(load),
        "results": [
            {
                "scenario": row.scenario,
                "metric": row.metric.name,
                "unit": row.metric.unit,
                "servers": [column and dataclasses.asdict(column) for column in row.columns],
                "rounds": row.samples,
                "ratio": row.ratio,
            }
            for row in rows(outcomes)
        ],
        "remarks": remarks(outcomes),
    }


def write(path: Path, text: str) -> None:
    """Replace the contents of the file with `text`, as a whole or not at all. Raises OSError."""
    if path.is_symlink() or (path.exists() and not path.is_file()):  # for example /dev/stdout
        path.write_text(text)
        return
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text)
    scratch.replace(path)


def machine() -> dict[str, Any]:
    """The machine on which the load generator runs."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {"system": platform.platform(), "processor": model or platform.processor(), "cores": os.cpu_count()}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw medians as bars with whiskers up to p99, and a panel for each scenario, into the file at `path`.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    by_scenario: dict[str, list[Row]] = {}
    for row in rows(outcomes):
        if row.metric.unit:  # counts are only in the table
            by_scenario.setdefault(row.scenario, []).append(row)
    names = _names(outcomes)
    heights = [1 + 0.35 * len(names) * len(panel) for panel in by_scenario.values()]
    figure = Figure(figsize=(10, max(sum(heights), 2)), layout="constrained")
    if not by_scenario:
        figure.savefig(path)
        return
    axes = figure.subplots(len(by_scenario), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (scenario, panel) in zip(axes, by_scenario.items(), strict=True):
        for index, name in enumerate(names):
            columns = [(place, row.columns[index]) for place, row in enumerate(panel)]
            measured = [(place, column) for place, column in columns if column is not None]
            places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place, _ in measured]
            medians = [column.median for _, column in measured]
            whiskers = [[0.0] * len(measured), [max(column.p99 - column.median, 0) for _, column in measured]]
            axis.barh(places, medians, 0.7 / len(names), xerr=whiskers, label=name, color=f"C{index}", ecolor="0.4")
        axis.set_yticks(range(len(panel)), [f"{row.metric.name} ({row.metric.unit})" for row in panel], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(scenario, loc="left", fontsize=10)
        axis.set_xscale("symlog")
    axes[0].legend(fontsize=8)
    figure.savefig(path)
