"""The load of all tests of scenarios: everything small."""

from __future__ import annotations

from trio_runner.bench.scenarios import Load

LOAD = Load(
    long_prompt=200,
    prefix=120,
    tokens=12,
    streams=(1, 4, 8),
    storm=30,
    crowd=8,
    cancellations=12,
    clients=20,
    endless=4000,
    unread=300,
)
