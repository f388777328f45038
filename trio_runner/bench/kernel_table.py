"""What was measured of CPU kernels, and its tables. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trio_runner.bench.bare import Case
from trio_runner.bench.contenders import Loaded, Sample
from trio_runner.bench.figures import median_interval

STEP_ROWS: Final = 512
"""Rows of the widest step."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do, by the number of threads, as `ci/limits.c` measures it."""

    reads: Mapping[str, float]
    """GB/s of reads from memory."""
    int8: Mapping[str, float]
    """Products of bytes, added up, in GMAC/s."""
    f32: Mapping[str, float]
    """The same of floats."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All rounds of one case with one model."""

    model: str
    case: Case
    loaded: Loaded
    """What the process says about the model. Weights that are no floats are multiplied as bytes."""
    rounds: tuple[Mapping[str, Sample], ...]
    """Samples by contender: "engine", "bare", "upstream", and "peer" if there is one."""

    def rate(self, name: str) -> float | None:
        """The median rate of a contender. None if it was not measured."""
        return self._median([samples[name].rate for samples in self.rounds if name in samples])

    def cpu(self, name: str) -> float | None:
        """The median CPU time of a token, in ms."""
        return self._median([1000 * samples[name].cpu for samples in self.rounds if name in samples])

    def ratio(self, other: str) -> tuple[float, float, float] | None:
        """The engine's rate divided by another contender's: the median of the rounds and its 95 % interval."""
        ratios = [samples["engine"].rate / samples[other].rate for samples in self.rounds if other in samples]
        return (statistics.median(ratios), *median_interval(ratios)) if ratios else None

    def share(self, limits: Limits | None, threads: int) -> float | None:
        """What part of the machine's limit the engine uses. None if that limit was not measured.

        A step must read all weights once, and multiply each row with them. Only the last row of a prompt is multiplied
        with those that give the logits. The limit is the one of the two that takes longer.
        """
        if limits is None or (rate := self.rate("engine")) is None:
            return None
        rows, weights = self.case.n_streams, float(self.loaded.weights)
        if not self.case.n_decode:
            rows = min(self.case.n_prompt, STEP_ROWS)
            weights -= self.loaded.output_weights * (1 - 1 / self.case.n_prompt)
        products = limits.f32 if self.loaded.are_floats else limits.int8
        of_reads, of_products = limits.reads.get(str(threads)), products.get(str(threads))
        if not of_reads or not of_products:
            return None
        return max(rate / rows * self.loaded.bytes / 1e9 / of_reads, rate * weights / 1e9 / of_products)

    @staticmethod
    def _median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Loads:
    """Loads of one model, in pairs: with our kernels, and with upstream's."""

    model: str
    rounds: tuple[tuple[Loaded, Loaded], ...]


def markdown(measured: Sequence[Measured], loads: Sequence[Loads], limits: Limits | None, threads: int) -> str:
    """The tables, and a line about the machine."""
    parts = []
    if measured:
        parts.append(_table(_HEADER, [_row(one, limits, threads) for one in measured]))
    if loads:
        parts.append(_table(_LOAD_HEADER, [_load_row(one) for one in loads]))
    parts.append(_about(limits, threads))
    return "\n".join(parts)


_HEADER = [
    *("model", "case", "engine, tokens/s", "bare loop", "upstream's kernels", "peer"),
    *("engine / peer", "engine / bare loop", "engine / upstream's", "of the limit", "CPU ms a token: engine", "peer"),
]
_LOAD_HEADER = ["model", "load, s", "/ upstream's", "memory, MiB", "/ upstream's", "peak, MiB", "/ upstream's"]


def _row(one: Measured, limits: Limits | None, threads: int) -> list[str]:
    share = one.share(limits, threads)
    return [
        *(one.model, one.case.name),
        *(_number(one.rate(name), ".1f") for name in ("engine", "bare", "upstream", "peer")),
        *(_interval(one.ratio(name)) for name in ("peer", "bare", "upstream")),
        _number(share, ".0%"),
        *(_number(one.cpu(name), ".2f") for name in ("engine", "peer")),
    ]


def _load_row(one: Loads) -> list[str]:
    cells = [one.model]
    for name, form in (("seconds", ".2f"), ("memory", ".1f"), ("peak", ".1f")):
        pairs = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in one.rounds]
        if not all(theirs for _, theirs in pairs):  # memory, where it cannot be seen
            cells += ["-", "-"]
            continue
        ratios = [ours / theirs for ours, theirs in pairs]
        cells.append(format(statistics.median(ours for ours, _ in pairs), form))
        cells.append(_interval((statistics.median(ratios), *median_interval(ratios))))
    return cells


def _about(limits: Limits | None, threads: int) -> str:
    text = f"Threads: {threads}. Ratios are medians of the rounds' ratios, with their 95 % intervals.\n"
    if limits is None:
        return text
    figures: list[tuple[str, Mapping[str, float], str]] = [
        ("reads", limits.reads, "GB/s"),
        ("products of bytes", limits.int8, "GMAC/s"),
        ("products of floats", limits.f32, "GMAC/s"),
    ]
    said = [f"{name} {_of_threads(values)} {unit}" for name, values, unit in figures]
    return f"{text}The machine's limits, by threads: {'; '.join(said)}.\n"


def _of_threads(values: Mapping[str, float]) -> str:
    return ", ".join(f"{threads}: {value:.1f}" for threads, value in values.items())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
