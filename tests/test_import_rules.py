"""The arrows between the rooms of the package, which go one way only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import trio_runner

PACKAGE = Path(trio_runner.__file__).parent
VALUES = {
    *{"errors", "events", "parameters", "sampling", "request", "config", "info", "options"},
    *{"image_source", "json_schema", "pixels", "version"},
}
"""The values that everyone speaks in."""

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "events": set(),
    "parameters": set(),
    "info": set(),
    "image_source": set(),
    "json_schema": {"errors"},
    "pixels": set(),
    "version": set(),
    "image_formats": set(),
    "images": {"errors", "image_formats", "image_source", "pixels"},
    "config": {"parameters"},
    "sampling": {"errors", "json_schema", "parameters"},
    "request": {"errors", "json_schema", "parameters", "sampling", "image_source"},
    "options": VALUES,
    "interface": VALUES,
    "core": {"core", *VALUES},
    "llama": {"llama", "core", *VALUES},
    "engine": {"engine", "core", "images", *VALUES},
    "server": {"server", "interface", *VALUES},
    "testing": {"testing", "core", *VALUES},
    "cli.chat.blocks": set(),
    "cli.chat.composer": set(),
    "cli.chat.conversation": set(),
    "cli.chat.entry": {"cli.chat.composer"},
    "cli.chat.openai": {"cli.chat.conversation", "cli.chat.model"},
    "cli.chat.painter": {"cli.chat.blocks"},
    "cli.chat.sse": set(),
    "bench": {"bench", "errors"},
    "bench.bare": {"front_door", "interface", "core", *VALUES},
}
"""What each room may import of ours. A module that is not listed is a front door: it wires the rooms together and may
import everything. A part of a room may have rules of its own."""

DECISIONS = {"core.scheduler", "core.sequence", "core.slots", "core.stop", "core.utf8", "core.shift"}
"""The native room is told what to do; it takes values from core/ and decides nothing itself."""

OUTSIDE: dict[str, set[str]] = {
    "quart": {"server"},
    "quart_trio": {"server"},
    "hypercorn": {"server.exchange"},
    "h11": {"server", "bench.client"},
    "cffi": {"llama"},
    "trio": {"engine", "server", "bench", ""},
    "numpy": {
        "core.pooling",
        "core.grammar",
        "core.ports",
        "interface",
        "llama",
        "engine",
        "server",
        "testing",
        "bench.bare",
        "",
    },
    "msgspec": {"server", "json_schema", ""},
    "llguidance": {"llama.schema"},
    "ctypes": {"llama"},
    "jinja2": {f"core.template.{name}" for name in ("environment", "filters", "rewriter", "work")},
    "matplotlib": {"bench.report"},
    "prometheus_client": {"server.metrics"},
    "PIL": {"images", "image_source"},
    "httpx2": {"cli.chat.remote"},
    "markdown_it": {"cli.chat.blocks"},
    "prompt_toolkit": {"cli.chat.keyboard"},
}
"""Who may import what is not ours: the packages that belong to some rooms only; "" are the front doors."""

IMPURE = {"threading", "time", "datetime", "socket", "ssl", "asyncio", "subprocess", "multiprocessing", "os", "io"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    room: str
    source: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(node: ast.stmt) -> Iterator[str]:
    """Full names of modules; ours start with a dot."""
    match node:
        case ast.Import(names):
            names_found = [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            names_found = [
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}".partition(".")[2]) else module
                for alias in names
            ]
        case ast.ImportFrom():
            raise AssertionError("relative imports hide where an arrow goes")
        case _:
            return
    for name in names_found:
        package, _, rest = name.partition(".")
        yield f".{rest}" if package == "trio_runner" else name


def imports_of(tree: ast.AST, *, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, name, lazy) for name in imported(node))
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from imports_of(node, lazy=lazy or inside)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in allowed)


def all_imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = module_name(path)
        room = max((room for room in ROOMS if within(source, {room})), key=len, default="")
        for line, target, lazy in imports_of(ast.parse(path.read_text())):
            found.append(Import(str(path.relative_to(PACKAGE.parent)), line, room, source, target, lazy))
    return found


IMPORTS = all_imports()


def test_arrows() -> None:
    wrong = []
    for found in IMPORTS:
        if not found.room or not found.target.startswith("."):
            continue
        if not within(found.target[1:], ROOMS[found.room]):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_the_native_room_takes_only_values_from_core() -> None:
    assert not [str(found) for found in IMPORTS if found.room == "llama" and within(found.target[1:], DECISIONS)]


def test_what_is_not_ours_stays_in_its_rooms() -> None:
    wrong = []
    for found in IMPORTS:
        places = OUTSIDE.get(found.target.partition(".")[0])
        if places is not None and found.room not in places and not within(found.source, places - {""}):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_core_is_pure() -> None:
    wrong = []
    for found in IMPORTS:
        top = found.target.partition(".")[0]
        if found.room == "core" and top:
            pure = top in sys.stdlib_module_names and top not in IMPURE
            if not pure and not within(found.source, OUTSIDE.get(top, set()) - {""}):
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_one_door_to_the_native_library() -> None:
    named = [
        module_name(path)
        for path in PACKAGE.rglob("*.py")
        if any(
            (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value == "trio_runner._native")
            or (isinstance(node, ast.alias) and node.name == "_native")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert named == ["llama.library"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import trio_runner.core.batch", [".core.batch"]),
        ("from trio_runner.core import ports", [".core.ports"]),
        ("from trio_runner.core.ports import Model", [".core.ports"]),
        ("import os, trio.lowlevel", ["os", "trio.lowlevel"]),
    ],
)
def test_the_reader_of_imports(text: str, names: list[str]) -> None:
    assert [name for _, name, _ in imports_of(ast.parse(text))] == names
