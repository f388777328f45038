from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.served import DATA, Served, served


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """One server for all clients. It sees images, and no request of one test is left when the next begins."""
    with served(f"--mmproj={DATA / 'mmproj-shapes.gguf'}", "--alias", "gpt-4o") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server: Served) -> Iterator[None]:
    yield
    server.wait_until_idle()
