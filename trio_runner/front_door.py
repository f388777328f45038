"""The front door: it wires the native library to an engine, and opens the engine for the length of a block."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Unpack

import trio

from trio_runner.config import EngineConfig, ModelConfig
from trio_runner.core.ports import Loader
from trio_runner.engine.engine import Engine
from trio_runner.engine.lifecycle import Lifecycle
from trio_runner.errors import EngineBroken
from trio_runner.options import EngineOptions


@asynccontextmanager
async def open_engine(
    model: str | os.PathLike[str] | ModelConfig | Loader,
    config: EngineConfig | None = None,
    *,
    wait: bool = True,
    cancel_when_broken: bool = True,
    **options: Unpack[EngineOptions],
) -> AsyncIterator[Engine]:
    """An engine for the length of the block.

    `model` is a path, a `ModelConfig`, or a loader such as `testing.ToyLoader`. `config` says how to run it; instead,
    the fields of `EngineConfig` may be given by name. Leaving the block ends every request with `EngineClosed`.

    With `wait`, the block starts when the model is loaded, and a model that does not load raises `LoadError`. Without
    it, the block starts at once: `engine.status` is "loading", and "broken" if the model does not load.

    If the decode thread dies, for example because a device fails or vanishes, every request ends with `EngineBroken`,
    whose `__cause__` says why. The block is cancelled, and `EngineBroken` is raised out of it. With
    `cancel_when_broken=False` the block goes on, for programs that have more to do: `engine.status` is "broken",
    requests raise `EngineBroken` at once, another engine may be opened meanwhile, and leaving the block raises nothing.

    Raises ValueError for a configuration out of range, and TypeError for a name that is no field.
    """
    if config is not None and options:
        raise TypeError("give either config or its fields by name")
    lifecycle = Lifecycle(_loader(model), config or EngineConfig(**options), cancel_when_broken=cancel_when_broken)
    engine = Engine(lifecycle)
    own: BaseException | None = None
    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lifecycle.live)
            try:
                if wait:
                    await engine.wait_ready(math.inf)
                yield engine
            except BaseException as error:
                own = error
                # A cancellation is for trio to sort out. Any other error goes around the nursery, which would wrap it
                # in a group: code that raises X in the block expects this very X to come out of the block.
                if any(isinstance(leaf, trio.Cancelled) for leaf in leaves(error)):
                    raise
                errors.append(error)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        errors += leaves(group, own)
    if errors:
        raise _one_of(errors, own)


def _one_of(errors: list[BaseException], own: BaseException | None) -> BaseException:
    """The error that matters, or a group if several do. `own` is the caller's."""
    failures = [error for error in errors if not isinstance(error, trio.Cancelled)]
    if not failures:
        return errors[0]
    if len(failures) > 1 and own in failures and all(isinstance(leaf, EngineBroken) for leaf in leaves(own)):
        # A reader in the block has raised the same error that the engine raises.
        failures.remove(own)
    return failures[0] if len(failures) == 1 else BaseExceptionGroup("the engine and the block failed", failures)


def leaves(error: BaseException | None, whole: BaseException | None = None) -> Iterator[BaseException]:
    """The errors in `error`, which may be nested groups. The group `whole` counts as one error."""
    if isinstance(error, BaseExceptionGroup) and error is not whole:
        for inside in error.exceptions:
            yield from leaves(inside, whole)
    elif error is not None:
        yield error


def _loader(model: str | os.PathLike[str] | ModelConfig | Loader) -> Loader:
    if isinstance(model, (str, os.PathLike)):
        model = ModelConfig(path=os.fspath(model))
    if isinstance(model, ModelConfig):
        # Imported here, so that everything except real models works without the native library.
        from trio_runner.llama.loader import LlamaLoader

        return LlamaLoader(model)
    return model
