"""As many layers lie on a device as fit. They take the memory that was measured before, and a device that has less
memory than it reported gets fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.programs import program
from tests.devices.test_numbers import TEXT, check_same, on_cpu, tell
from tests.llama.running import Running
from tests.placing import model_config
from trio_runner.config import EngineConfig
from trio_runner.core.placement import MARGIN_SHARE
from trio_runner.info import Device
from trio_runner.llama import Context, Model, devices
from trio_runner.llama import loader as loader_module
from trio_runner.llama.context_plan import measure

Models = Callable[[str], Path]

SLACK = 64 << 10
"""Bytes by which a buffer for computing may grow in use."""


def found(name: str) -> Device:
    """The device of this name."""
    return next(device for device in devices() if device.name == name)


def sizes(models: Models, device: str, name: str) -> list[int]:
    """Bytes that the model takes of the device, for each number of layers on it."""
    config = EngineConfig(slots=2, context_length=256, batch_size=64, threads=1, kv_type="f32")
    number = found(device).number
    result = []
    for n in range(Model(model_config(models(name), devices=()), no_alloc=True).info.n_layer + 2):
        model = Model(model_config(models(name)), devices=[number], n_device_layers=n, no_alloc=True)
        result.append(next(use.total for use in measure(model, config) if use.device == number))
        model.close()
    return result


@pytest.mark.parametrize("name", ["llama", "swa", "mamba", "t5", "bert"])
def test_a_model_takes_the_memory_that_was_measured(models: Models, device: str, name: str) -> None:
    config = EngineConfig(slots=2, context_length=64, batch_size=16, threads=1)
    number = found(device).number
    n_layers = Model(model_config(models(name), devices=()), no_alloc=True).info.n_layer + 1
    for n in range(1, n_layers + 1):
        model, context = None, None
        memory = []
        for no_alloc in (True, False):
            model = Model(model_config(models(name)), devices=[number], n_device_layers=n, no_alloc=no_alloc)
            if no_alloc:
                uses = measure(model, config)
            else:
                context = Context(model, config, on_devices=True)
                uses = context.memory
                context.close()
            memory.append(next(use for use in uses if use.device == number))
            model.close()
        expected, taken = memory
        assert (expected.model, expected.context) == (taken.model, taken.context)
        assert 0 <= taken.compute - expected.compute <= SLACK
        assert (expected.model > 0) == (name != "bert" or n > 1)  # bert has no layer for logits


def test_a_device_gets_as_many_layers_as_fit(models: Models, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sizes(models, device, "llama")
    cpu = on_cpu(models("llama"))
    tokens = cpu.tokens(TEXT)[:40]
    expected = tell(cpu, tokens)
    there = devices()

    def layers(n_bytes: int) -> int:
        """Layers that the loader puts on a device with `n_bytes` bytes beside the margin."""
        total = n_bytes * MARGIN_SHARE
        free = n_bytes + total // MARGIN_SHARE
        small = [replace(other, memory_free=free, memory_total=total) for other in there]
        monkeypatch.setattr(loader_module, "all_devices", lambda *_: tuple(small))
        running = Running(models("llama"), gpu_layers="auto")
        assert running.placement is not None
        n_layers = running.placement.n_device_layers
        if n_layers:
            check_same(expected, tell(running, tokens, expected))
            number = running.placement.devices[0].number
            assert 0 < running.placement.used(number).total <= n_bytes + SLACK
        return n_layers

    for n in range(1, len(wanted)):
        assert layers(wanted[n]) == n
        assert layers(wanted[n] - 1) < n


@pytest.mark.parametrize("layers", ["3", "auto"])
async def test_a_device_with_less_memory_than_reported(models: Models, device: str, layers: str) -> None:
    """The KV cache does not fit into the memory that the device gives."""
    if found(device).backend != "Vulkan":
        pytest.skip("only Vulkan can be made to run out of memory")
    arguments = ["-m", str(models("llama")), "--device", device, "--threads", "1", "--kv-type", "f32"]
    command = ["run", "hello", *arguments, "--temperature", "0", "-n", "8", "--gpu-layers", layers]
    limit = {"GGML_VK_FORCE_MAX_BUFFER_SIZE": "8000000"}
    said = []
    for options in ([], ["--context-length", "50000"]):
        async with program(*command, *options, toy=False, environment=limit) as runner:
            code = await runner.ended()
            said.append((code, runner.output, runner.log))
    assert said[0][0] == 0, said
    assert said[0][1], said
    if layers == "auto":
        assert said[1][:2] == said[0][:2]
        assert f"1 layers do not load on {device}, trying fewer: " in said[1][2]
    else:
        assert said[1][:2] == (1, b"")
        line = said[1][2].splitlines()[-1]
        assert line.startswith(f"error: {models('llama')}: with 3 layers on {device}: ")
        assert "failed to allocate" in line


async def test_a_missing_device_is_refused(models: Models, device: str) -> None:
    arguments = ["-m", str(models("llama")), "--device", "Vulkan99"]
    async with program("run", "hello", *arguments, toy=False) as runner:
        assert await runner.ended() == 1
        assert runner.log.splitlines()[-1].startswith("error: there is no device 'Vulkan99': there are ")
        assert device in runner.log.splitlines()[-1]
        assert "Traceback" not in runner.log
