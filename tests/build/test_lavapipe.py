"""ci/lavapipe on machines that have its packages or not, with fake dpkg-query and apt-get commands."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ci" / "lavapipe"
Machine = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Runs the script; `apt` is apt-get, in shell. Returns its status, its output, and apt-get's arguments."""

    def run(apt: str, missing: str = "glslc|spirv-headers") -> tuple[int, str, list[str]]:
        bin = tmp_path / "bin"
        bin.mkdir()
        for name in ("bash", "dirname", "env", "mktemp", "rm", "tail"):
            (bin / name).symlink_to(shutil.which(name) or name)
        scripts = {
            "dpkg-query": f"case $3 in {missing}) exit 1;; *) printf installed;; esac",
            "apt-get": f'echo "$DEBIAN_FRONTEND $*" >>{tmp_path}/apt; {apt}',
            "sudo": 'exec "$@"',
        }
        for name, script in scripts.items():
            (bin / name).write_text(f"#!{bin}/bash\n{script}\n")
            (bin / name).chmod(0o755)
        command = [str(bin / "bash"), str(SCRIPT)]
        done = subprocess.run(command, env={"PATH": str(bin)}, capture_output=True, text=True, timeout=60, check=False)
        calls = tmp_path / "apt"
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_everything_is_installed_already(machine: Machine) -> None:
    assert machine("exit 1", missing="none") == (0, "", [])


def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    status, words, calls = machine("echo unpacking")
    assert (status, words) == (0, "ci: installing glslc spirv-headers\n")
    (call,) = calls
    assert call.startswith("noninteractive ")
    assert call.endswith(" install --yes --no-install-recommends glslc spirv-headers")


def test_missing_package_lists_are_fetched(machine: Machine, tmp_path: Path) -> None:
    apt = f'case "$*" in *update*) : >{tmp_path}/lists;; *) [ -e {tmp_path}/lists ];; esac'
    status, _, calls = machine(apt)
    assert status == 0
    assert [("install" in call, "update" in call) for call in calls] == [(True, False), (False, True), (True, False)]


def test_packages_that_cannot_be_installed(machine: Machine) -> None:
    status, words, _ = machine("echo E: Unable to locate package glslc; exit 100")
    assert status == 1
    assert "E: Unable to locate package glslc" in words
    assert words.endswith("ci: could not install glslc spirv-headers\n")
