"""Files, classes, commands and options that README and docs name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from tests.docs.pages import PAGES, ROOT, blocks, code_spans, read
from trio_runner.bench import embedding_turns, kernels, step_profile
from trio_runner.cli.dropin import FLAGS
from trio_runner.cli.main import cli

PATH = re.compile(r"(?<![\w./-])(?:(?:trio_runner|tests|native|docs|ci)/[\w*./-]*|build_llama\.py)")
MEMBER = re.compile(r"([A-Z]\w+)\.(\w+)(?:\(.*\))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[\w-]+)?\)")
NOT_OURS = {"--help", "--hypothesis-profile", "--unix-socket"}
VARIABLE = re.compile(r"\bTRIO_RUNNER_[A-Z_]+\b")
OF_TESTS = {"TRIO_RUNNER_TEST_DEVICES", "TRIO_RUNNER_TEST_EVENTS"}


def shell_text(page: Path | None = None) -> str:
    """What is in the shell blocks of a page, or of all."""
    return "\n".join(block.text for block in blocks("sh", "console") if page in (None, block.page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    named = {match for span in code_spans(page) for match in PATH.findall(span)} | set(PATH.findall(shell_text(page)))
    missing = sorted(name for name in named if not list(ROOT.glob(name.rstrip("./"))))
    assert not missing
    linked = {target for target in LINK.findall(read(page)) if not (page.parent / target).exists()}
    assert not linked, "links that lead nowhere"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_conflict_of_a_merge_is_left(page: Path) -> None:
    assert not re.search(r"^(<<<<<<<|>>>>>>>)", read(page), re.MULTILINE)


def members_of_classes() -> dict[str, set[str]]:
    members: dict[str, set[str]] = {}
    for path in (ROOT / "trio_runner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = members.setdefault(node.name, set())
                for inside in ast.walk(node):
                    match inside:
                        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                            names.add(name)
                        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                            names.add(name)
                        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                            names.add(name)
                        case _:
                            pass
    return members


def test_members_of_classes_exist() -> None:
    members = members_of_classes()
    named = {span for page in PAGES for span in code_spans(page)}
    matches = [match for span in named if (match := MEMBER.fullmatch(span))]
    missing = sorted(match[0] for match in matches if match[2] not in members.get(match[1], set()))
    assert len(matches) > 10
    assert not missing


def test_bugs_to_plant_can_be_planted() -> None:
    page = read(ROOT / "docs" / "contributing.md")
    begin = page.index("## Plant a bug")
    rows = re.findall(r"^\| `(trio_runner/[^`]+)` \| `([^`]+)` \|", page[begin : page.index("## Adding")], re.MULTILINE)
    assert rows
    for path, text in rows:
        assert text in read(ROOT / path), path


def test_environment_variables_exist() -> None:
    sources = [ROOT / "build_llama.py", *(ROOT / "trio_runner").rglob("*.py")]
    sources += [path for path in (ROOT / "native").rglob("*") if path.suffix in (".cpp", ".h", ".cmake", ".py")]
    known = {name for path in sources for name in VARIABLE.findall(read(path))}
    named = {name for page in PAGES for name in VARIABLE.findall(read(page))}
    assert named <= known | OF_TESTS


def test_commands_exist() -> None:
    shown = "\n".join([shell_text(), *(span for page in PAGES for span in code_spans(page))])
    named = set(re.findall(r"trio-runner ([a-z]+)", shown))
    assert named == set(cli.commands)


def test_options_exist() -> None:
    options = {
        option
        for command in (*cli.commands.values(), embedding_turns.main, kernels.main, step_profile.main)
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    scripts = [ROOT / "build_llama.py", *(ROOT / "native").rglob("*.py"), *(ROOT / "ci").iterdir()]
    scripts += [ROOT / "tests" / "engine" / "play.py"]
    of_scripts = {
        option
        for path in scripts
        if path.is_file()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8"))
    }
    of_the_original = {f"--{flag.name}" for flag in FLAGS.flags}
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", read(page)))
        assert mentioned <= options | of_scripts | of_the_original | NOT_OURS, page
