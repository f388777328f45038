"""Every `curl` in README and docs is sent to a real server, is answered with 200, and has the fields that are shown.

The blocks run in bash as they stand there. Only `curl` is a program of ours: it knows the servers' ports, and fails
where the status is another one. The default model answers, with the projector and the adapters of tests/data. A tiny
model that ranks answers /rerank.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from tests.cli.programs import ROOT, program
from tests.docs.pages import Block, blocks
from tests.tiny_models import tiny_model
from trio_runner.models import DEFAULT_MODEL, resolve_model

EXAMPLES = [block for block in blocks("console", "sh") if re.search(r"^(\$ )?curl ", block.text, re.MULTILINE)]

CURL = f"""#!{sys.executable} -IS
import http.client, os, sys

arguments, method, body, headers, url = sys.argv[1:], None, None, {{}}, None
while arguments:
    match arguments.pop(0):
        case "-d":
            body = arguments.pop(0)
            body = sys.stdin.buffer.read() if body == "@-" else body.encode()
        case "-X":
            method = arguments.pop(0)
        case "-H":
            name, _, value = arguments.pop(0).partition(": ")
            headers[name] = value
        case argument if not argument.startswith("-") and url is None:
            url = argument
        case argument:
            sys.exit(f"curl: what is {{argument}}?")
host, slash, path = url.partition("/")
assert host == "127.0.0.1:8080", url
port = os.environ["RANKER" if path == "rerank" else "SERVER"]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
connection.request(method or ("GET" if body is None else "POST"), slash + path, body, headers)
answer = connection.getresponse()
sys.stdout.buffer.write(answer.read())
sys.exit(None if answer.status == 200 else f"curl: {{url}} was answered with {{answer.status}}")
"""


def commands(example: Block) -> list[tuple[str, list[str]]]:
    """Each command of a block, with the lines of output that are shown for it. In a block of sh, all is one command."""
    if example.language == "sh":
        return [(example.text, [])]
    found: list[tuple[str, list[str]]] = []
    for line in example.text.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def shape(value: object) -> object:
    """A JSON value without its values: the names of the fields, and of those of the first element of a list."""
    if isinstance(value, dict):
        return {name: shape(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [shape(inside) for inside in value[:1]]
    return None


def shapes(lines: list[str]) -> list[object]:
    """Those of all lines, each once. Lists that are shown without their elements stand for any list."""
    found: list[object] = []
    for line in lines:
        here = shape(json.loads(line))
        if here not in found:
            found.append(here)
    return found


@pytest.mark.parametrize(
    ("text", "expected"), [('{"a":[{"b":1}],"c":"x"}', {"a": [{"b": None}], "c": None}), ("[]", [])]
)
def test_shape(text: str, expected: object) -> None:
    assert shape(json.loads(text)) == expected


async def test_every_example_is_answered(tmp_path: Path) -> None:
    pages = {
        "README.md",
        "http.md",
        "llama-server.md",
        "metrics.md",
        "models.md",
        "ollama.md",
        "openai.md",
        "runner.md",
    }
    assert {example.page.name for example in EXAMPLES} == pages
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text(CURL)
    curl.chmod(0o755)
    model = await trio.to_thread.run_sync(resolve_model, DEFAULT_MODEL.name)
    data = ROOT / "tests" / "data"
    options = ("--context-length", "512", "--threads", "1", "--port", "0", "--device", "none")
    vision = (f"--mmproj={data / 'mmproj-shapes.gguf'}", f"--adapter-dir={data}")
    async with (
        program("serve", f"--model={model}", *vision, *options, toy=False) as server,
        program("serve", f"--model={tiny_model('rerank', tmp_path)}", *options, toy=False) as ranker,
    ):
        environment = {
            "PATH": os.pathsep.join([str(curl.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "SERVER": str(await server.listening()),
            "RANKER": str(await ranker.listening()),
        }
        for example in EXAMPLES:
            for command, expected in commands(example):
                output = await run(command, str(example), tmp_path, environment)
                if expected:
                    assert shapes(output) == shapes(expected), f"{example}: the answer has other fields"


async def run(command: str, place: str, directory: Path, environment: Mapping[str, str]) -> list[str]:
    done = await trio.run_process(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env={**os.environ, **environment},
        check=False,
        capture_stdout=True,
        capture_stderr=True,
    )
    assert done.returncode == 0, f"{place}: {done.stderr.decode()}{done.stdout.decode()}"
    return done.stdout.decode().splitlines()
