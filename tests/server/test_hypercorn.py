"""What the server uses of Hypercorn. Hypercorn documents none of it, so a new version may change it.

If one of these tests fails, look at what changed, mend trio_runner/server/exchange.py, and then the list below.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

import trio_runner
from trio_runner.server import exchange

PACKAGE = Path(trio_runner.__file__).parent

SIGNATURES = {
    "hypercorn.config.Config": "()",
    "hypercorn.config.Config.response_headers": "(self, protocol)",
    "hypercorn.trio.worker_context.WorkerContext": "(max_requests)",
    "hypercorn.protocol.http_stream.HTTPStream": (
        "(app, config, context, task_group, ssl, client, server, send, stream_id)"
    ),
    "hypercorn.protocol.http_stream.HTTPStream.handle": "(self, event)",
    "hypercorn.protocol.events.Event": "(stream_id)",
    "hypercorn.protocol.events.Request": "(stream_id, headers, http_version, method, raw_path, state)",
    "hypercorn.protocol.events.Body": "(stream_id, data)",
    "hypercorn.protocol.events.EndBody": "(stream_id)",
    "hypercorn.protocol.events.Response": "(stream_id, headers, status_code)",
    "hypercorn.protocol.events.StreamClosed": "(stream_id)",
    "hypercorn.typing.ConnectionState": None,
}
"""Everything that is called, with the names of its parameters; None for a name that is only a type."""

SETTINGS = ["include_server_header", "accesslog", "errorlog"]
"""Attributes of Config that are set."""


def find(name: str) -> Any:
    """The object with a full name, at most two levels below its module. Fails if there is none."""
    version = importlib.metadata.version("hypercorn")
    parts = name.split(".")
    for n_attributes in (1, 2):
        found: Any
        try:
            found = importlib.import_module(".".join(parts[:-n_attributes]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[-n_attributes:]:
            found = getattr(found, attribute, None)
        if found is not None:
            return found
    return pytest.fail(f"Hypercorn {version} has no {name}: mend {exchange.__file__}")


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_used_is_there_and_takes_the_same(name: str) -> None:
    found, expected = find(name), SIGNATURES[name]
    if expected is None:
        return
    signature = f"({', '.join(inspect.signature(found).parameters)})"
    version = importlib.metadata.version("hypercorn")
    assert signature == expected, f"Hypercorn {version} changed the parameters of {name}: mend {exchange.__file__}"


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist(name: str) -> None:
    version = importlib.metadata.version("hypercorn")
    assert hasattr(find("hypercorn.config.Config")(), name), f"the Config of Hypercorn {version} has no {name}"


def imported_from_hypercorn(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases):
                names |= {f"{module}.{alias.name}" for alias in aliases}
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
    return {name for name in names if name.partition(".")[0] == "hypercorn"}


def test_one_file_uses_hypercorn_and_the_list_is_complete() -> None:
    used = {path: names for path in PACKAGE.rglob("*.py") if (names := imported_from_hypercorn(path))}
    assert [*used] == [Path(exchange.__file__)]
    [names] = used.values()
    assert names == {name for name in SIGNATURES if name.rpartition(".")[0] not in SIGNATURES}


def test_no_private_name_is_used() -> None:
    """Of any object: neither Hypercorn's nor h11's, nor our own from outside."""
    for file in ("exchange.py", "http1.py"):
        for node in ast.walk(ast.parse((PACKAGE / "server" / file).read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                assert ast.unparse(node.value) == "self", f"{file}:{node.lineno}: {ast.unparse(node)}"


async def test_hypercorn_asks_for_one_task_and_gives_it_what_asgi_needs() -> None:
    """The other direction: what Hypercorn calls of ours."""
    scopes: list[dict[str, Any]] = []
    sent: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scopes.append(scope)
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": message["body"]})

    async def note(event: Any) -> None:
        sent.append(type(event).__name__)

    async def note_end() -> None:
        sent.append("end")

    async with trio.open_nursery() as nursery:
        one = exchange.Exchange(app, nursery, exchange.Peers(("127.0.0.1", 1), None), note, note_end)
        request = h11.Request(method="POST", target="/x%20y?z=1", headers=[("Host", "a")])
        await one.begin(request)
        await one.body(b"body")
        await one.end_body()
    assert sent == ["Response", "Data", "EndOfMessage", "end"]
    [scope] = scopes
    wanted = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/x y",
        "raw_path": b"/x%20y",
        "query_string": b"z=1",
        "headers": [(b"host", b"a")],
        "client": ("127.0.0.1", 1),
        "server": None,
    }
    assert {name: scope[name] for name in wanted} == wanted
