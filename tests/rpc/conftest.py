from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import build_llama
from tests.rpc.servers import RpcServer
from tests.tiny_models import tiny_model
from trio_runner.llama.backends import plugins


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the file of a tiny model by its name."""
    directory = tmp_path_factory.mktemp("models")
    return lambda name: tiny_model(name, directory)


@pytest.fixture(scope="session")
def rpc_program() -> Path:
    """The rpc-server that `build_llama.py --rpc-server` has built.

    Without it, tests are skipped. They fail if TRIO_RUNNER_TEST_DEVICES says that it must be there.
    """
    lack, path = "", None
    try:
        path = build_llama.program_path(build_llama.where(), "rpc-server")
    except build_llama.BuildError as error:
        lack = str(error)
    if not any(plugin.name == "rpc" and plugin.problem is None for plugin in plugins()):
        lack = "there is no plugin for rpc"
    elif path is not None and not path.exists():
        lack = "there is no rpc-server: build_llama.py --rpc-server makes one"
    if path is None or lack:
        if "rpc" in os.environ.get("TRIO_RUNNER_TEST_DEVICES", "").split(","):
            pytest.fail(lack)
        pytest.skip(lack)
    return path


@pytest.fixture(scope="module")
def servers(rpc_program: Path) -> Iterator[tuple[RpcServer, RpcServer]]:
    """Two rpc-servers that no test harms."""
    yield from _two(rpc_program)


@pytest.fixture
def doomed(rpc_program: Path) -> Iterator[tuple[RpcServer, RpcServer]]:
    """Two rpc-servers for one test, which may kill them."""
    yield from _two(rpc_program)


def _two(program: Path) -> Iterator[tuple[RpcServer, RpcServer]]:
    started: list[RpcServer] = []
    try:
        started += [RpcServer(program), RpcServer(program)]
        yield started[0], started[1]
    finally:
        for server in started:
            server.kill()
