from __future__ import annotations

import os
import socket
import threading

import pytest

from trio_runner.bench.processes import holdings, listener


def test_what_we_hold_ourselves() -> None:
    before = holdings(os.getpid())
    assert before is not None
    assert before.rss > 1
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    with socket.socket():
        after = holdings(os.getpid())
    over.set()
    thread.join()
    assert after is not None
    assert after.threads == before.threads + 1
    assert after.descriptors == before.descriptors + 1


def test_nobody() -> None:
    assert holdings(2**22 + 1) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_listens(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
        assert listener(host, port) == os.getpid()
        assert listener("localhost", port) == os.getpid()
        assert listener("192.0.2.1", port) is None
    assert listener(host, port) is None
