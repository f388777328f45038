"""The program without a process: help, version, logging, and the API key."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trio_runner
from tests.cli.calls import Call
from tests.cli.programs import DEADLINE, ROOT
from trio_runner.cli.main import cli, main
from trio_runner.cli.serve import API_KEY_VARIABLE


@pytest.mark.parametrize("key", ["", " \n", "ключ", "a\x00b"])
def test_an_api_key_that_no_header_can_have_is_refused(
    key: str, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(key, encoding="utf-8")
    assert main(["serve", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "API key" in capsys.readouterr().err


def test_the_file_with_the_api_key_overrules_the_environment(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("of the file\n")
    monkeypatch.setenv(API_KEY_VARIABLE, "of the environment")
    assert main(["serve"]) == 0
    assert call.service is not None
    assert call.service.api_key == "of the environment"
    assert main(["serve", "--api-key-file", str(tmp_path / "key")]) == 0
    assert call.service.api_key == "of the file"


@pytest.mark.parametrize("arguments", [["--help"], *[[command, "--help"] for command in cli.commands]])
def test_help_goes_to_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: trio-runner")
    assert "None" not in out
    assert not err


_ENGINE = ["--mmproj FILE", "--lora FILE", "--lora-scaled FILE=SCALE"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("serve", [*_ENGINE, "--adapter-dir DIRECTORY"]),
        ("run", [*_ENGINE, "--image FILE", "--chat"]),
        ("embed", [*_ENGINE, "--dimensions INTEGER", "--truncate", "--normalize"]),
        ("rerank", [*_ENGINE, "--truncate", "QUERY DOCUMENT..."]),
        ("info", _ENGINE),
        ("bench", _ENGINE),
    ],
)
def test_help_lists_the_options_of_a_command(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [option for option in options if option not in text] == []
    assert ("--adapter-dir" in text) == (command == "serve")


def test_help_mentions_the_flags_of_the_dropin_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert '"trio-runner -h"' in " ".join(capsys.readouterr().out.split())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trio-runner, version {trio_runner.__version__}\n"


def test_help_imports_no_heavy_module() -> None:
    code = """
import sys
from trio_runner.cli.main import main
main(["--help"])
heavy = {"trio_runner._native", "trio_runner.server", "quart", "hypercorn", "rich", "huggingface_hub", "jinja2", "PIL"}
print("loaded:", heavy & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.endswith("loaded: set()\n"), done


@pytest.mark.parametrize(
    ("flags", "level", "native"),
    [([], "INFO", "WARNING"), (["-v"], "DEBUG", "INFO"), (["-vv"], "DEBUG", "DEBUG")],
)
def test_each_v_makes_serve_log_more(flags: list[str], level: str, native: str, call: Call) -> None:
    assert main(["serve", *flags]) == 0
    assert logging.getLevelName(logging.getLogger("trio_runner.engine").getEffectiveLevel()) == level
    assert logging.getLevelName(logging.getLogger("trio_runner.llama").getEffectiveLevel()) == native


# ---- start -----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import runpy, signal, sys

class Interrupted:
    def find_spec(name, path=None, target=None):
        if name == interrupted:
            signal.raise_signal(signal.SIGINT)

interrupted = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupted)
runpy.run_module("trio_runner", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module", ["trio_runner.cli", "trio_runner.cli.main", "click", "trio_runner.models", "trio", "numpy", "quart"]
)
def test_ctrl_c_while_the_program_imports_ends_it_silently(module: str, model: str) -> None:
    """Imports take most of the time until the server is up, so this is when Ctrl-C is most likely."""
    command = [sys.executable, "-c", INTERRUPTED, module, "serve", "--model", model, "--port", "0"]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, b"", b"")


def test_the_command_line_is_imported_without_slow_modules() -> None:
    """`--help` must be quick, and so must the start of a program that imports this package."""
    look = (
        "import sys, trio_runner.cli.main; print(*{'numpy', 'trio', 'quart', 'msgspec', 'rich'} & sys.modules.keys())"
    )
    ended = subprocess.run([sys.executable, "-c", look], capture_output=True, timeout=DEADLINE, cwd=ROOT, check=True)
    assert ended.stdout == b"\n"
