"""Engine and Generation offer exactly what their interfaces promise: mypy checks the types, these tests the names."""

from __future__ import annotations

from typing import Any

import pytest

from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.interface import EngineInterface, GenerationInterface


def an_engine(engine: Engine) -> EngineInterface:
    """Passes the type check only if an engine satisfies the interface."""
    return engine


def a_generation(generation: Generation) -> GenerationInterface:
    """Passes the type check only if a generation satisfies the interface."""
    return generation


def public_names(cls: type[Any]) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_users_of_an_engine_see_the_interface_and_nothing_else() -> None:
    assert public_names(Engine) == public_names(EngineInterface)


def test_a_generation_has_all_that_its_interface_promises() -> None:
    """The dispatcher calls two more."""
    assert public_names(Generation) == public_names(GenerationInterface) | {"deliver", "fail"}
    operators = {"__aenter__", "__aexit__", "__aiter__", "__anext__"}
    assert operators <= vars(GenerationInterface).keys()
    assert operators <= vars(Generation).keys()


@pytest.mark.parametrize("cls", [Engine, Generation])
def test_every_public_member_says_what_it_does(cls: type[Any]) -> None:
    assert [name for name in public_names(cls) - {"usage"} if not vars(cls)[name].__doc__] == []
