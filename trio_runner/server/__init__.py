"""HTTP for an engine. The only room that imports Quart and Hypercorn."""

from __future__ import annotations

from trio_runner.server.app import create_app
from trio_runner.server.serve import serve

__all__ = ["create_app", "serve"]
