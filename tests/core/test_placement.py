"""Which devices a model gets, and for how many of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.placement import MARGIN_SHARE, MAX_MARGIN, choose_devices, fits, most_layers, room, steps_down
from trio_runner.info import Device, DeviceKind, MemoryUse, Placement

GIB = 1 << 30
KINDS: tuple[DeviceKind, ...] = ("CPU", "GPU", "integrated GPU", "accelerator", "other")


@st.composite
def machines(draw: st.DrawFn) -> list[Device]:
    """The devices of a machine, each with a number and a name of its own. Some were found by two backends."""
    found = draw(
        st.lists(st.tuples(st.sampled_from(KINDS), st.booleans(), st.sampled_from(["", "a", "b"])), max_size=7)
    )
    return [
        Device(number, f"Dev{number}", "", "Backend", kind, 1, 2, identity, remote)
        for number, (kind, remote, identity) in enumerate(found)
    ]


def able(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.kind in ("GPU", "integrated GPU")]


def device(number: int = 0, *, free: int = 8 * GIB, total: int = 16 * GIB) -> Device:
    return Device(number, f"Dev{number}", "", "Backend", "GPU", free, total)


# ---- choose_devices -------------------------------------------------------------------------------------------------


@given(machines(), st.lists(st.integers(0, 6), unique=True))
def test_without_names_all_gpus_are_chosen(devices: list[Device], remote: list[int]) -> None:
    chosen = choose_devices(devices, None, remote)
    numbers = [device.number for device in chosen]
    assert len(set(numbers)) == len(numbers)
    assert set(chosen) <= set(able(devices))
    # Of the devices of other machines, all that were asked for, in that order.
    by_number = {device.number: device for device in able(devices) if device.is_remote}
    lent = [by_number[number] for number in remote if number in by_number]
    assert [device for device in chosen if device.is_remote] == lent
    # Then the GPUs of this machine, or else the integrated ones; each piece of hardware once.
    local = [device for device in able(devices) if not device.is_remote]
    kinds = {device.kind for device in local}
    here = chosen[len(lent) :]
    assert all(not device.is_remote for device in here)
    assert "GPU" not in kinds or all(device.kind == "GPU" for device in here)
    identities = [device.id for device in chosen if device.id and not device.is_remote]
    assert len(set(identities)) == len(identities)
    for left_out in set(local) - set(here):
        is_second = left_out.id in {device.id for device in chosen}
        assert is_second or (left_out.kind == "integrated GPU" and "GPU" in kinds)


@given(machines(), st.data())
def test_names_are_taken_in_their_order(devices: list[Device], data: st.DataObject) -> None:
    there = able(devices)
    wanted = data.draw(st.lists(st.sampled_from(there), max_size=5) if there else st.just([]))
    names = [data.draw(st.sampled_from([device.name, device.name.upper()])) for device in wanted]
    assert choose_devices(devices, names, ()) == list(dict.fromkeys(wanted))


@given(machines(), st.sampled_from(["nothing", "Dev", "", "Dev99"]))
def test_unknown_names_are_refused_in_one_line(devices: list[Device], name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no device '{name}'") as refused:
        choose_devices(devices, [name], ())
    assert "\n" not in str(refused.value)
    for other in devices:  # it names the devices that there are
        assert (other.name in str(refused.value)) == (other in able(devices))


def test_the_cpu_is_no_device_for_layers() -> None:
    cpu = Device(0, "CPU", "", "CPU", "CPU", 1, 2)
    with pytest.raises(ValueError, match="'CPU': there are none for layers"):
        choose_devices([cpu], ["CPU"], ())
    assert choose_devices([cpu], None, ()) == []
    assert choose_devices([cpu, device(1)], (), ()) == []


# ---- room and fits --------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**42), st.integers(0, 2**42))
def test_a_margin_is_left_free(total: int, free: int) -> None:
    there = room(device(free=free, total=total))
    assert there is not None
    assert there == max(0, free - min(total // MARGIN_SHARE, MAX_MARGIN))


uses = st.builds(MemoryUse, st.integers(0, 2) | st.none(), *[st.integers(0, 8 * GIB)] * 3)


@given(
    st.lists(uses, max_size=4, unique_by=lambda use: use.device),
    st.lists(st.tuples(st.integers(0, 16 * GIB), st.integers(0, 16 * GIB)), max_size=3),
    st.dictionaries(st.integers(0, 2), st.integers(0, GIB)),
)
def test_every_device_must_have_room(
    memory: list[MemoryUse], sizes: list[tuple[int, int]], extra: dict[int, int]
) -> None:
    devices = [device(number, free=free, total=total) for number, (free, total) in enumerate(sizes)]
    wanted = {use.device: use.total for use in memory}
    has_room = [
        (space := room(device)) is None or wanted.get(device.number, 0) + extra.get(device.number, 0) <= space
        for device in devices
    ]
    assert fits(memory, devices, extra) == all(has_room)


def test_a_device_that_does_not_report_its_memory_has_room() -> None:
    assert room(device(free=0, total=0)) is None
    assert fits([MemoryUse(0, 2**50, 0, 0)], [device(free=0, total=0)], {0: 2**50})


# ---- most_layers and steps_down -------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 220))
def test_the_most_layers_that_fit_are_found(n_layers: int, n_fitting: int) -> None:
    asked: list[int] = []

    def try_layers(n: int) -> bool:
        asked.append(n)
        return n <= n_fitting

    assert most_layers(n_layers, try_layers) == min(n_layers, n_fitting)
    assert len(set(asked)) == len(asked)
    assert all(0 < n <= n_layers for n in asked)
    assert len(asked) <= 1 + n_layers.bit_length()
    assert not n_layers or asked[0] == n_layers


@given(st.lists(st.booleans(), max_size=64))
def test_the_number_that_was_found_has_been_tried(answers: list[bool]) -> None:
    """Even if the memory does not grow with the layers."""
    tried: dict[int, bool] = {}

    def try_layers(n: int) -> bool:
        return tried.setdefault(n, answers[n - 1])

    found = most_layers(len(answers), try_layers)
    assert found == 0 or tried[found]


@given(st.integers(0, 2000))
def test_steps_go_down_to_the_cpu(n_layers: int) -> None:
    steps = list(steps_down(n_layers))
    assert (steps[0], steps[-1]) == (n_layers, 0)
    for before, after in pairwise(steps):
        assert 0 <= after < before
        assert before - after <= max(1, before / 4)
    assert len(steps) <= 40


def test_what_a_model_uses_of_a_device() -> None:
    memory = (MemoryUse(None, 1, 2, 3), MemoryUse(4, 10, 20, 30))
    placement = Placement(3, 2, (device(4),), memory)
    assert placement.used(4).total == 60
    assert placement.used(None).total == 6
    assert placement.used(5) == MemoryUse(5, 0, 0, 0)
