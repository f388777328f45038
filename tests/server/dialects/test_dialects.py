"""What holds for every dialect."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from quart import Response

import trio_runner.server.dialects
from tests.server.client import post, request, serving
from tests.server.fake_engine import FakeEngine
from trio_runner.errors import EngineBusy
from trio_runner.server.dialects import DIALECTS
from trio_runner.server.dialects.dialect import Operation, RouteContext, json_response
from trio_runner.server.problems import Answer, Problem

ROOM = Path(trio_runner.server.dialects.__file__).parent
NOT_PURE = ("routes", "__init__", "dialect")
"""Ends of the names of modules that may know Quart and the interface of an engine."""


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)):
                names.add(module)
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
    return names


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOM)))
def test_a_dialect_knows_bytes_requests_and_events_and_never_an_engine(path: Path) -> None:
    found = imports(path)
    assert not [name for name in found if name.startswith("trio_runner.engine")]
    if not path.stem.endswith(NOT_PURE):
        assert not {name.partition(".")[0] for name in found} & {"quart", "quart_trio", "trio", "hypercorn", "h11"}
        assert "trio_runner.interface" not in found


class LoudDialect:
    """Says everything in capitals, below /loud."""

    name = "loud"
    about = "Says everything in capitals."
    error_type = None

    def speaks_at(self, path: str) -> bool:
        return path.startswith("/loud/")

    def word(self, problem: Problem) -> Answer:
        return Answer(problem.status, {"Content-Type": "text/loud", **problem.headers}, problem.text.upper().encode())

    def operations(self, context: RouteContext) -> list[Operation]:
        async def length() -> Response:
            text = await context.threads.read_body(bytes.decode)
            tokens = await context.engine.tokenize(text)
            return json_response(b"%d" % len(tokens))

        return [Operation(method="POST", path="/loud/length", handler=length, summary="Count the tokens of a text.")]


async def test_each_dialect_words_the_problems_of_its_paths() -> None:
    engine = FakeEngine()
    key = "Authorization: Bearer k"
    async with serving(engine, api_key="k", dialects=[LoudDialect(), *DIALECTS]) as server:
        assert (await server.ask(request("POST", "/loud/length", b"abc", key))).body == b"3"
        for path, loud in (("/loud/length", True), ("/loud/nowhere", True), ("/tokenize", False), ("/nowhere", False)):
            refused = await server.ask(request("POST", path, b"abc"))
            assert (refused.status, refused.body.isupper()) == (401, loud)
            assert refused.headers["www-authenticate"] == "Bearer"
            wrong = await server.ask(request("DELETE", path, b"", key))
            assert (wrong.status in (404, 405), wrong.headers["content-type"] == "text/loud") == (True, loud)
        engine.refusal = EngineBusy("full", retry_after=2)
        busy = await server.ask(request("POST", "/loud/length", b"abc", key))
        assert (busy.status, busy.headers["retry-after"], busy.body.isupper()) == (503, "2", True)
        assert (await server.ask(post("/tokenize", {"content": "a"}, key))).body.islower()
