"""The Python examples of README and docs: all of them are Python, and the complete programs run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import Block, blocks
from tests.tiny_models import tiny_model

EXAMPLES = blocks("python")
PROGRAMS = [example for example in EXAMPLES if "trio.run" in example.text]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_it_compiles(example: Block) -> None:
    compile(example.text, str(example), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_pages_have_programs() -> None:
    assert {program.page.name for program in PROGRAMS} >= {"README.md", "python.md", "embedding-in-apps.md"}


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_complete_program_runs(program: Block, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path).rename(tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program.text], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "vectors.shape" in program.text:
        assert done.stdout.endswith("(2, 64)\n")
        assert len(done.stdout) > 64
