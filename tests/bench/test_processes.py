"""What /proc tells about processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from trio_runner.bench.processes import PeakMemory, cpu_seconds, foreign_seconds, holdings, listener

MIB = 1 << 20

GREEDY = f"""
import mmap, socket, sys, threading
print("started", flush=True)
sys.stdin.readline()
held = socket.socket(), bytearray(b"x" * {8 * MIB})
with open(sys.executable, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # with a descriptor of its own
sum(mapped[::4096])
threading.Thread(target=sys.stdin.readline).start()
print("has more", flush=True)
"""
"""A process of its own, because the threads of the test process come and go."""


def test_holdings_of_a_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", GREEDY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        before = holdings(child.pid)
        print(file=child.stdin, flush=True)
        assert child.stdout.readline() == "has more\n"
        after = holdings(child.pid)
        child.communicate("\n")
        assert holdings(child.pid) is None
    assert before is not None
    assert after is not None
    assert before.memory > 1
    assert 8 <= after.memory - before.memory < 8 + 2  # and not what it maps
    assert after.threads == before.threads + 1
    assert after.descriptors == before.descriptors + 2


def test_memory_that_is_given_back_is_in_the_peak() -> None:
    before = holdings(os.getpid())
    assert before is not None
    expected, give_up = before.memory + 63, time.monotonic() + 60
    with PeakMemory() as peak:
        held = bytearray(b"x" * 64 * MIB)
        while peak.largest < expected and time.monotonic() < give_up:
            time.sleep(0)  # until the next look
        del held
    assert peak.largest >= expected


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert holdings(2**22 + 1) is None


def test_seconds_of_other_processes_are_counted() -> None:
    """A busy process counts unless it is one of ours."""
    with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) as busy:
        try:
            us, both = [os.getpid()], [os.getpid(), busy.pid]
            before = _seconds(us) - _seconds(both)
            spent = cpu_seconds(busy.pid)
            while _seconds(us) - _seconds(both) < before + 0.1:
                pass
            now = cpu_seconds(busy.pid)
            assert spent is not None
            assert now is not None
            assert now > spent
            assert _seconds([*us, *us]) >= _seconds(us)  # a process that is named twice counts once
        finally:
            busy.kill()
    assert foreign_seconds([os.getpid(), None]) is None
    assert cpu_seconds(2**22 + 1) is None
    assert foreign_seconds([2**22 + 1]) is None


def _seconds(pids: list[int]) -> float:
    seconds = foreign_seconds(pids)
    assert seconds is not None
    return seconds


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_listening_process_is_found(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
        assert listener(host, port) == os.getpid()
        assert listener("localhost", port) == os.getpid()
        assert listener("192.0.2.1", port) is None
    assert listener(host, port) is None
