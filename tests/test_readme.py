"""What the README shows works as it stands there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click

from tests.tiny_models import tiny_model
from trio_runner.cli import cli

README = Path(__file__).parent.parent / "README.md"
PYTHON = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_embedded_example_runs(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path).rename(tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("(2, 64)\n")
    assert len(done.stdout) > 64


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README.read_text(encoding="utf-8")


def test_every_example_is_python() -> None:
    assert len(PYTHON) == 4
    for example in PYTHON:
        compile(example, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_command_and_option_exists() -> None:
    text = README.read_text(encoding="utf-8")
    commands = set(re.findall(r"^trio-runner (\w+)", text, re.MULTILINE))
    assert commands == set(cli.commands)
    options = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help"}
    build = set(re.findall(r'"(--[a-z-]+)"', README.with_name("build_llama.py").read_text(encoding="utf-8")))
    assert mentioned <= options | build | {"--requirements"}
