"""Skipped tests look like passing ones. So a machine that must have devices fails if it has none."""

from __future__ import annotations

import os

import pytest

from trio_runner.llama import devices, plugins

WANTED = sorted({name for name in os.environ.get("TRIO_RUNNER_TEST_DEVICES", "").split(",") if name} - {"rpc"})
"""Backends that must have a GPU on this machine: names of their plugins, such as vulkan and cuda."""


@pytest.fixture
def everything_is_on_the_device() -> None:
    """Replaces the fixture that puts models on a device: this test needs no model."""


@pytest.mark.skipif(not WANTED, reason="TRIO_RUNNER_TEST_DEVICES names none")
@pytest.mark.parametrize("name", WANTED or [""])
def test_devices_that_must_be_there(name: str) -> None:
    found = [device for device in devices() if device.backend.casefold() == name and "GPU" in device.kind]
    assert found, (
        f"TRIO_RUNNER_TEST_DEVICES names {name}, but it has no GPU here. There are {devices()} and {plugins()}. "
        "Mesa's software device is found only by a run of these tests alone: pytest tests/devices"
    )
