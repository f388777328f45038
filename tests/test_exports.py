"""The public names: all there, all explained, and no others."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import trio_runner
from trio_runner import errors


@pytest.mark.parametrize("name", trio_runner.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    assert not name.startswith("_")
    value = getattr(trio_runner, name)
    if get_args(value):
        return  # a union of types, each of which explains itself
    doc = value.__doc__
    assert doc
    assert doc.strip()
    assert not doc.startswith(f"{name}("), "only what dataclass wrote"


def test_all_is_sorted_and_has_no_doubles() -> None:
    assert sorted(set(trio_runner.__all__)) == trio_runner.__all__


def test_nothing_else_looks_public() -> None:
    public = {
        name
        for name in dir(trio_runner)
        if not name.startswith("_") and not isinstance(getattr(trio_runner, name), ModuleType) and name != "annotations"
    }
    assert public == set(trio_runner.__all__)


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == trio_runner.__version__


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def drawn_tree() -> dict[str, str | None]:
    """Each class in the tree at the top of errors.py, with its parent."""
    parents: dict[str, str | None] = {}
    branch: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:\|  |   )*(?:\|- |'- )?)([A-Z]\w+)", line)
        if match is None:
            continue
        depth = len(match[1])
        while branch and branch[-1][0] >= depth:
            branch.pop()
        parents[match[2]] = branch[-1][1] if branch else None
        branch.append((depth, match[2]))
    return parents


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    actual = {cls.__name__: next((base.__name__ for base in cls.__mro__[1:] if base in ERRORS), None) for cls in ERRORS}
    assert drawn_tree() == actual


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_is_public_explained_and_has_a_status(cls: type[errors.RunnerError]) -> None:
    assert getattr(trio_runner, cls.__name__) is cls
    assert vars(cls).get("__doc__")
    assert 400 <= cls.status <= 599
    assert (cls.status < 500) == issubclass(cls, errors.RequestError)
