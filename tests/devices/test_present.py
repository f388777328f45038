"""What is skipped looks like what passes. So where devices must be there, it is a failure that they are not."""

from __future__ import annotations

import os

import pytest

from trio_runner.llama import devices, plugins

WANTED = sorted({name for name in os.environ.get("TRIO_RUNNER_TEST_DEVICES", "").split(",") if name} - {"rpc"})
"""Backends that must have a GPU here, by the names of their plugins, such as vulkan and cuda."""


@pytest.fixture
def everything_is_on_the_device() -> None:
    """Nothing is."""


@pytest.mark.skipif(not WANTED, reason="TRIO_RUNNER_TEST_DEVICES names none")
@pytest.mark.parametrize("name", WANTED or [""])
def test_devices_that_must_be_there(name: str) -> None:
    found = [device for device in devices() if device.backend.casefold() == name and "GPU" in device.kind]
    assert found, (
        f"TRIO_RUNNER_TEST_DEVICES wants a GPU of {name}; there are {devices()} and {plugins()}. Where tests of other "
        "directories run too, Mesa's software device is not among them: pytest tests/devices"
    )
