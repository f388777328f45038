"""The log of a server as JSON: one object on each line, whatever is logged."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.cli.programs import ROOT, exchange, program
from tests.tiny_models import tiny_model
from trio_runner.cli.logs import JsonFormatter

OWN = ["time", "level", "logger", "message"]


def record(message: str = "hello %s", *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("a").makeRecord("a.b", level, "/x/y.py", 7, message, args, None, extra=extra)
    made.created = datetime(2026, 11, 30, 19, 5, 3, 12_000, UTC).timestamp()
    return made


def formatted(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert line.isascii()
    fields: dict[str, Any] = json.loads(line, parse_constant=lambda name: 1 / 0)  # NaN is not JSON
    return fields


def test_a_record() -> None:
    assert formatted(record("hello %s\n", "wörld", level=logging.WARNING)) == {
        "time": "2026-11-30T19:05:03.012Z",
        "level": "warning",
        "logger": "a.b",
        "message": "hello wörld\n",
    }


def test_what_is_passed_as_extra() -> None:
    fields = formatted(record("hello", port=80, path=Path("/x"), level_of_detail=None, parts=[1, {"a": "b"}]))
    assert [fields[name] for name in ("port", "path", "level_of_detail", "parts")] == [80, "/x", None, [1, {"a": "b"}]]


def test_extra_hides_none_of_our_fields() -> None:
    made = record("hello", time="never", logger="nobody", exception="no")
    vars(made)["level"] = "none"
    assert formatted(made) == {**formatted(record("hello")), "exception": "no"}


def test_an_exception() -> None:
    made = record("it failed")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made.exc_info = sys.exc_info()
    fields = formatted(made)
    assert fields["message"] == "it failed"
    assert fields["exception"].startswith("Traceback")
    assert fields["exception"].endswith("ValueError: two\nlines")


ANYTHING: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(object()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=5,
)
NAMES = st.text().filter(lambda name: name not in vars(record()) and name not in ("message", "asctime"))


@given(st.text(st.characters()), st.dictionaries(NAMES, ANYTHING, max_size=3))
def test_anything_can_be_logged(message: str, extra: dict[str, object]) -> None:
    made = record("%s", message)
    vars(made).update(extra)
    fields = formatted(made)
    assert fields["message"] == message
    assert fields.keys() >= {*OWN, *extra}


def test_an_object_inside_itself() -> None:
    inside: list[object] = []
    inside.append(inside)
    assert formatted(record("hello", inside=inside))["inside"] == "[[...]]"


WHAT_PYTHON_PRINTS = """
import gc, sys, threading, warnings
from trio_runner.cli.logs import set_up_logging
set_up_logging(0, log_format="json")
warnings.warn("a warning")
class Unlucky:
    def __del__(self):
        raise ValueError("in a finalizer")
unlucky = Unlucky()
del unlucky
def fail():
    raise ValueError("on a thread")
thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
raise ValueError("in the main thread")
"""


def test_what_python_would_print_is_logged() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", WHAT_PYTHON_PRINTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [fields["level"] for fields in told] == ["warning", "error", "critical", "critical"]
    assert told[0]["logger"] == "py.warnings"
    for fields, text in zip(told, ("a warning", "in a finalizer", "on a thread", "in the main thread"), strict=True):
        assert text in fields["message"] + fields.get("exception", "")
    assert told[2]["message"] == "an exception was not caught on worker"


def lines_of(log: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in log.splitlines()]
    for fields in told:
        assert list(fields)[-len(OWN) :] == OWN or "exception" in fields
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields["time"])
    return told


async def test_a_server_logs_json_only(tmp_path: Path) -> None:
    """Also what llama.cpp logs, and all of its life."""
    model = str(tiny_model("llama", tmp_path))
    arguments = ("--model", model, "--port", "0", "--log-format", "json", "-vv", "--device", "none")
    async with program("serve", *arguments, toy=False) as runner:
        port = int((await runner.logged("listening on http://127.0.0.1:")).partition('"')[0])
        await runner.logged("model loaded")
        assert '"stop":true' in await exchange(port, "/completion", {"prompt": "hello", "n_predict": 2})
        runner.terminate()
        assert await runner.ended() == 0
    told = lines_of(runner.log)
    assert {"trio_runner.llama", "trio_runner.cli.service"} <= {fields["logger"] for fields in told}
    assert any(fields["message"].startswith("SIGTERM") for fields in told)


async def test_why_a_server_ends_is_in_the_log(model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with program("serve", "--model", model, "--port", str(port), "--log-format", "json") as runner:
            assert await runner.ended() == 1
    last = lines_of(runner.log)[-1]
    assert (last["level"], last["logger"]) == ("error", "trio_runner.cli")
    assert last["message"].startswith(f"cannot listen on 127.0.0.1:{port}")


async def test_a_model_that_does_not_load_is_in_the_log(model: str) -> None:
    environment = {"TOY_LOAD": "bad", "PYTHONWARNINGS": "ignore"}
    arguments = ("--model", model, "--port", "0", "--log-format", "json")
    async with program("serve", *arguments, environment=environment) as runner:
        assert await runner.ended() == 1
    log = runner.log.replace("the toy is loading\n", "")  # the toy itself says so
    assert "this is no model at all" in lines_of(log)[-1]["message"]
