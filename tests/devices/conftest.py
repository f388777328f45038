"""Every GPU of this machine runs every test here.

ggml looks for devices once in a process, and ignores Mesa's software device unless the environment names it before.
`pytest tests/devices` names it. A run of all tests does not, because their models would lie on it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.placing import placed
from tests.tiny_models import tiny_model
from trio_runner.llama import context, devices

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    chosen = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    if all(path.resolve().is_relative_to(HERE) for path in chosen):
        os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
        # Results in half precision could only be compared roughly.
        os.environ.setdefault("GGML_VK_DISABLE_F16", "1")


def gpus() -> list[str]:
    """The names of this machine's GPUs."""
    return [device.name for device in devices() if device.kind in ("GPU", "integrated GPU") and not device.is_remote]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        none = pytest.param("none", marks=pytest.mark.skip("there is no GPU, or not in a run of all tests"))
        metafunc.parametrize("device", gpus() or [none], scope="session")


@pytest.fixture(autouse=True)
def everything_is_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(context, "WIDE_BATCH", 20)  # a software device is slow, so it warms up with fewer rows
    with placed(device):
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the file of a tiny model by its name."""
    directory = tmp_path_factory.mktemp("models")
    shorter = {"swa": "swa-short"}  # norms are slow on a software device
    return lambda name: tiny_model(shorter.get(name, name), directory)
