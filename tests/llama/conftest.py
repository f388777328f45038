"""The tiny models, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the file of a tiny model by its name."""
    directory = tmp_path_factory.mktemp("models")
    return lambda name: tiny_model(name, directory)
