from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.toys import Toy


@pytest.fixture
def toy() -> Iterator[Toy]:
    """Every test ends with everything closed, and closed once."""
    toy = Toy()
    yield toy
    toy.check_closed()
