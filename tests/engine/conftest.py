from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.toys import Toy


@pytest.fixture
def toy() -> Iterator[Toy]:
    """A toy model. After the test, everything that it made must have been closed exactly once."""
    toy = Toy()
    yield toy
    toy.check_closed()
