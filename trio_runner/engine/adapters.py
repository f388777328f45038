"""The adapters that requests can choose from, by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from trio_runner.config import check_adapter_name
from trio_runner.core.batch import AdapterSet
from trio_runner.core.ports import Adapter
from trio_runner.errors import InvalidRequest, UnknownAdapter
from trio_runner.info import AdapterInfo
from trio_runner.request import AdapterChoice

MAX_LOADED = 64


class AdapterTable:
    """Only a table: whoever holds it loads and frees. An adapter that has left it may still be in use."""

    def __init__(self) -> None:
        self._by_name: dict[str, tuple[int, Adapter, AdapterInfo]] = {}
        self._coming: set[str] = set()
        self._uids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_name)

    def infos(self) -> tuple[AdapterInfo, ...]:
        return tuple(info for _, _, info in self._by_name.values())

    def reserve(self, name: str) -> None:
        """Nobody else gets this name until `add` or `release`. Raises `InvalidRequest` if somebody has it."""
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
        self._coming.discard(name)

    def add(self, info: AdapterInfo, adapter: Adapter) -> None:
        self._coming.discard(info.name)
        self._by_name[info.name] = next(self._uids), adapter, info

    def remove(self, name: str) -> tuple[int, Adapter, AdapterInfo]:
        """Its uid, and the adapter. Raises `UnknownAdapter`."""
        if name not in self._by_name:
            raise UnknownAdapter(name, param="name")
        return self._by_name.pop(name)

    def clear(self) -> tuple[Adapter, ...]:
        """All that were in it."""
        adapters = tuple(adapter for _, adapter, _ in self._by_name.values())
        self._by_name.clear()
        return adapters

    def choose(self, choices: tuple[AdapterChoice, ...] | None) -> tuple[AdapterSet, Mapping[int, Adapter]]:
        """What batches know the choice by, and what it stands for; None: what applies where nothing is chosen. The
        same uid never means another adapter. Raises `UnknownAdapter`."""
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
