"""The adapters that requests can choose from, by name, and how another one is loaded."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from functools import partial

from trio_runner.config import AdapterConfig, check_adapter_name
from trio_runner.core.batch import AdapterSet
from trio_runner.core.ports import Adapter
from trio_runner.engine.helper_threads import HelperThreads
from trio_runner.engine.state import EngineState
from trio_runner.errors import InvalidRequest, RunnerError, UnknownAdapter
from trio_runner.info import AdapterInfo
from trio_runner.request import AdapterChoice

MAX_LOADED = 64
"""Adapters that may be loaded at the same time."""


class AdapterTable:
    """A table of loaded adapters. It loads and frees nothing itself. An adapter that was removed may still be in
    use."""

    def __init__(self) -> None:
        self._by_name: dict[str, tuple[int, Adapter, AdapterInfo]] = {}
        self._coming: set[str] = set()
        self._uids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_name)

    def infos(self) -> tuple[AdapterInfo, ...]:
        """The adapters, in the order in which they were added."""
        return tuple(info for _, _, info in self._by_name.values())

    def reserve(self, name: str) -> None:
        """Keep a name for an adapter that is being loaded, until `add` or `release`. Raises `InvalidRequest` if the
        name is taken or not allowed, and if there are too many adapters."""
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise InvalidRequest(f"name: {error}", param="name") from None
        if name in self._by_name or name in self._coming:
            raise InvalidRequest(f"name: there is an adapter {name!r} already", param="name")
        if len(self._by_name) + len(self._coming) >= MAX_LOADED:
            raise InvalidRequest(f"{MAX_LOADED} adapters are loaded: unload one first", param="name")
        self._coming.add(name)

    def release(self, name: str) -> None:
        """Give a reserved name back: its adapter did not load."""
        self._coming.discard(name)

    def add(self, info: AdapterInfo, adapter: Adapter) -> None:
        """Let requests choose a loaded adapter."""
        self._coming.discard(info.name)
        self._by_name[info.name] = next(self._uids), adapter, info

    def remove(self, name: str) -> tuple[int, Adapter, AdapterInfo]:
        """Let no further request choose an adapter. Returns its uid, the adapter and its facts. Raises
        `UnknownAdapter`."""
        if name not in self._by_name:
            raise UnknownAdapter(name, param="name")
        return self._by_name.pop(name)

    def clear(self) -> tuple[Adapter, ...]:
        """Remove all adapters, and return them."""
        adapters = tuple(adapter for _, adapter, _ in self._by_name.values())
        self._by_name.clear()
        return adapters

    def choose(self, choices: tuple[AdapterChoice, ...] | None) -> tuple[AdapterSet, Mapping[int, Adapter]]:
        """The choice of a request as batches name it, and the adapters by uid.

        None stands for all adapters at the scales they were loaded with. A uid is never used again for another adapter.
        Raises `UnknownAdapter`.
        """
        if choices is None:
            scales = {info.name: info.scale for info in self.infos()}
        else:
            scales = {choice.name: choice.scale for choice in choices}
        chosen: list[tuple[int, float]] = []
        adapters: dict[int, Adapter] = {}
        for name, scale in scales.items():
            if name not in self._by_name:
                raise UnknownAdapter(name, param="adapters")
            uid, adapter, _ = self._by_name[name]
            if scale:
                chosen.append((uid, float(scale)))
                adapters[uid] = adapter
        return tuple(sorted(chosen)), adapters


async def load_adapter(
    table: AdapterTable,
    state: EngineState,
    helpers: HelperThreads,
    path: str | os.PathLike[str],
    name: str,
    scale: float,
) -> AdapterInfo:
    """Load an adapter on a helper thread and add it to the table. Without a name it gets that of its file.

    Raises `LoadError` for the file, `InvalidRequest` for a name that is taken or not allowed and for a scale that is
    not finite, and the errors of `EngineState.ready_runtime`.
    """
    if not math.isfinite(scale):
        raise InvalidRequest(f"scale must be finite, not {scale}", param="scale")
    try:
        config = AdapterConfig(os.fspath(path), scale, name)
    except ValueError as error:
        raise InvalidRequest(str(error), param="name") from None
    table.reserve(config.name)
    try:
        load = partial(state.ready_runtime().model.adapter, config.path)
        adapter = await helpers.run(load, "long", discard=lambda adapter: adapter.close())
    finally:
        table.release(config.name)
    try:
        state.ready_runtime()
    except RunnerError:
        adapter.close()
        raise
    info = AdapterInfo(config.name, config.path, config.scale)
    table.add(info, adapter)
    return info
