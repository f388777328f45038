from __future__ import annotations

from tests.engine.conftest import toy

__all__ = ["toy"]
