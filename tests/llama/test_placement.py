"""How many layers a loader puts on which devices, and what it does when a device has less room than it reported.

The devices and the results of loads are made up, except where the CPU takes everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.config import AdapterConfig, EngineConfig, ModelConfig
from trio_runner.core.ports import Runtime
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.info import Device, MemoryUse
from trio_runner.llama import LlamaLoader
from trio_runner.llama import loader as loader_module

Models = Callable[[str], Path]

N_LAYERS = 7  # of "swa", with the layer that makes logits
GIB = 1 << 30
SMALL = EngineConfig(slots=1, context_length=64, batch_size=16, threads=1)


def device(number: int, name: str, *, free: int = 4 * GIB, total: int = 8 * GIB) -> Device:
    return Device(number, name, f"made up {number}", "Fake", "GPU", free, total)


class Machine:
    """The devices of a machine, and the results of loads. Each layer takes 1 GiB unless a test changes that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *devices: Device) -> None:
        self.path = path
        self.devices = (*devices, Device(len(devices), "CPU", "", "CPU", "CPU", GIB, GIB))
        self.per_layer = GIB
        self.most: dict[type, int] = {}
        """Number of layers from which on creating an object of the type fails."""
        self.failure: Exception = LoadError("there is no memory left")
        self.loads: list[tuple[int, tuple[int, ...]]] = []
        self.measured: list[int] = []
        self.models: list[Any] = []
        machine = self

        class Model:
            def __init__(
                self,
                config: ModelConfig,
                progress: object = None,
                *,
                devices: Sequence[int] = (),
                n_device_layers: int = -1,
                no_alloc: bool = False,
            ) -> None:
                self.n = n_device_layers if devices else 0
                self.closed = False
                if not no_alloc:
                    assert all(other.closed for other in machine.models), "what was tried in vain is still there"
                    machine.loads.append((self.n, tuple(devices)))
                    machine.check(Model, self.n)
                    machine.models.append(self)

            def close(self) -> None:
                self.closed = True

        class Context:
            takes_rows = True

            def __init__(self, model: Model, config: EngineConfig, *, on_devices: bool) -> None:
                assert on_devices == (model.n > 0)
                machine.check(Context, model.n)
                self.memory = machine.memory(model.n)

        def measure(model: Model, config: EngineConfig) -> tuple[MemoryUse, ...]:
            machine.measured.append(model.n)
            machine.check(Measure, model.n)
            return machine.memory(model.n)

        self.model, self.context = Model, Context
        monkeypatch.setattr(loader_module, "Model", Model)
        monkeypatch.setattr(loader_module, "Context", Context)
        monkeypatch.setattr(loader_module, "measure", measure)
        monkeypatch.setattr(loader_module, "all_devices", lambda *_: self.devices)

    def check(self, kind: type, n: int) -> None:
        if n > self.most.get(kind, n):
            raise self.failure

    def memory(self, n: int) -> tuple[MemoryUse, ...]:
        return (MemoryUse(0, n * self.per_layer, 0, 0), MemoryUse(None, (N_LAYERS - n) * self.per_layer, 0, 0))

    def load(self, **fields: Any) -> Runtime:
        cancelled = fields.pop("cancelled", lambda: False)
        loader = LlamaLoader(ModelConfig(path=str(self.path), **fields))
        return loader(SMALL, progress=lambda _: None, cancelled=cancelled)

    def layers(self, **fields: Any) -> int:
        placement = self.load(**fields).placement
        assert placement is not None
        assert placement.n_layers == N_LAYERS
        assert bool(placement.devices) == bool(placement.n_device_layers)
        return placement.n_device_layers


class Measure:
    """Raised where measuring fails."""


@pytest.fixture
def machine(models: Models, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, models("swa"), device(0, "Gpu0"))


@pytest.mark.parametrize(
    ("wanted", "n_layers"), [(-1, N_LAYERS), (0, 0), (1, 1), (5, 5), (N_LAYERS, N_LAYERS), (99, N_LAYERS)]
)
def test_as_many_layers_as_were_asked_for(machine: Machine, wanted: int, n_layers: int) -> None:
    """Whether they fit or not. Nothing is measured."""
    machine.per_layer = 100 * GIB
    assert machine.layers(gpu_layers=wanted) == n_layers
    assert machine.loads == [(n_layers, (0,) if n_layers else ())]
    assert machine.measured == []


@pytest.mark.parametrize(("free", "n_layers"), [(8, 7), (7.99, 6), (4, 3), (2, 1), (1.99, 0), (0.5, 0)])
def test_as_many_layers_as_fit(machine: Machine, free: float, n_layers: int) -> None:
    """A margin of 1 GiB stays free."""
    machine.devices = (device(0, "Gpu0", free=int(free * GIB), total=8 * GIB), *machine.devices[1:])
    assert machine.layers() == n_layers
    assert [n for n, _ in machine.loads] == [n_layers]


def test_a_file_beside_the_model_needs_room_too(machine: Machine, models: Models, tmp_path: Path) -> None:
    machine.devices = (device(0, "Gpu0", free=8 * GIB, total=8 * GIB), *machine.devices[1:])
    adapter = tmp_path / "large.gguf"
    with adapter.open("wb") as file:
        file.truncate(2 * GIB)  # a sparse file
    machine.model.adapter = lambda *_: None  # type: ignore[attr-defined]
    assert machine.layers(adapters=(AdapterConfig(str(adapter)),)) == 5


def test_a_device_of_unknown_memory_gets_everything(machine: Machine) -> None:
    machine.devices = (device(0, "Gpu0", free=0, total=0), *machine.devices[1:])
    assert machine.layers() == N_LAYERS


@pytest.mark.parametrize("kind", ["model", "context"])
@pytest.mark.parametrize("failure", [LoadError("no memory"), NativeError("trio_context_open", -2, "no memory")])
def test_fewer_layers_are_tried_if_those_that_should_fit_do_not(
    machine: Machine, caplog: pytest.LogCaptureFixture, kind: str, failure: Exception
) -> None:
    machine.per_layer = 1
    machine.failure = failure
    machine.most[getattr(machine, kind)] = 3
    assert machine.layers() == 3
    tried = [n for n, _ in machine.loads]
    assert tried == sorted(tried, reverse=True)
    assert (tried[0], tried[-1]) == (N_LAYERS, 3)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(tried) - 1
    assert all("Gpu0" in line and "no memory" in line for line in warnings)


def test_in_the_end_the_cpu_takes_everything(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.per_layer = 1
    machine.most[machine.context] = 0
    assert machine.layers() == 0
    assert machine.loads[-1] == (0, ())
    assert any("Gpu0" in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_if_the_cpu_fails_too_it_is_an_error(machine: Machine) -> None:
    machine.per_layer = 1
    machine.most[machine.context] = -1
    with pytest.raises(LoadError, match="no memory left"):
        machine.load()


@pytest.mark.parametrize("kind", ["model", "context"])
@pytest.mark.parametrize("wanted", [-1, 4])
def test_a_fixed_number_of_layers_loads_or_is_an_error(machine: Machine, kind: str, wanted: int) -> None:
    machine.most[getattr(machine, kind)] = 3
    with pytest.raises(LoadError, match=r"with [47] layers on Gpu0: there is no memory left") as error:
        machine.load(gpu_layers=wanted)
    assert error.value.path == str(machine.path)
    assert len(machine.loads) == 1


def test_a_model_that_cannot_be_measured_is_tried(machine: Machine) -> None:
    machine.most |= {Measure: 0, machine.context: 5}
    assert machine.layers() == 5
    assert [n for n, _ in machine.loads] == [7, 6, 5]


def test_a_cancelled_load_does_not_try_again(machine: Machine) -> None:
    machine.per_layer = 1
    machine.most[machine.context] = 0
    with pytest.raises(EngineClosed):
        machine.load(cancelled=lambda: len(machine.loads) >= 2)
    assert len(machine.loads) == 2


@given(most_model=st.integers(0, N_LAYERS), most_context=st.integers(0, N_LAYERS), free=st.floats(0, 20))
def test_it_loads_wherever_it_fails_first(most_model: int, most_context: int, free: float) -> None:
    """The loader never uses more layers than load, and at least three quarters of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, _path, device(0, "Gpu0", free=int(free * GIB), total=20 * GIB))
        machine.most |= {machine.model: most_model, machine.context: most_context}
        n_layers = machine.layers()
        possible = min(most_model, most_context, max(0, int(free - 1)), N_LAYERS)
        assert possible * 3 // 4 - 1 <= n_layers <= possible


_path = Path()


@pytest.fixture(autouse=True, scope="module")
def path_for_all_examples(models: Models) -> None:
    global _path
    _path = models("swa")


# ---- which devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(models: Models, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(monkeypatch, models("swa"), device(0, "Gpu0"), device(1, "Gpu1"))
    machine.per_layer = 1
    return machine


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, (0, 1)),
        ({"devices": ("Gpu1",)}, (1,)),
        ({"devices": ("gpu1", "GPU0")}, (1, 0)),
        ({"devices": ()}, ()),
        ({"split_mode": "none"}, (0,)),
        ({"split_mode": "none", "main_gpu": 1}, (1,)),
        ({"split_mode": "none", "main_gpu": 1, "devices": ("Gpu1", "Gpu0")}, (0,)),
        ({"tensor_split": (1.0, 3.0)}, (0, 1)),
        ({"tensor_split": (1.0,)}, (0, 1)),
    ],
)
def test_devices_are_chosen(pair: Machine, fields: dict[str, Any], numbers: tuple[int, ...]) -> None:
    placement = pair.load(**fields).placement
    assert placement is not None
    assert tuple(device.number for device in placement.devices) == numbers
    assert pair.loads == [(N_LAYERS if numbers else 0, numbers)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"devices": ("Gpu2",)}, "there is no device 'Gpu2': there are Gpu0, Gpu1"),
        ({"devices": ("Gpu0", "what", "ever")}, "there is no device 'what', 'ever': there are Gpu0, Gpu1"),
        ({"devices": ("CPU",)}, "there is no device 'CPU': there are Gpu0, Gpu1"),
        ({"split_mode": "none", "main_gpu": 2}, "main_gpu is 2, but there are 2 devices"),
        ({"split_mode": "none", "main_gpu": 1, "devices": ("Gpu1",)}, "main_gpu is 1, but there are 1 devices"),
        ({"tensor_split": (1.0, 1.0, 1.0)}, "tensor_split has 3 parts for 2 devices"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(pair: Machine, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LoadError) as error:
        pair.load(**fields)
    assert str(error.value) == words
    assert pair.loads == []


def test_without_layers_on_devices_no_device_is_looked_for(pair: Machine) -> None:
    assert pair.layers(gpu_layers=0, devices=("nowhere",)) == 0


@pytest.mark.parametrize(("wanted", "n_warnings"), [(5, 1), ("auto", 0), (-1, 0)])
def test_layers_without_a_device(
    pair: Machine, caplog: pytest.LogCaptureFixture, wanted: object, n_warnings: int
) -> None:
    pair.devices = pair.devices[2:]
    assert pair.layers(gpu_layers=wanted) == 0
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == n_warnings
