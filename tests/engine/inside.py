"""What these tests look at that users of an engine cannot see.

Everything else in the tests of the engine uses public members. A test needs one of these functions where the public
effect would come only after a long wait, such as a stall timeout, or not at all, such as a leak.
"""

from __future__ import annotations

from trio_runner.engine.admission import Admission
from trio_runner.engine.dispatcher import Dispatcher
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.image_store import ImageStore
from trio_runner.engine.state import EngineState


def dispatcher_of(engine: Engine) -> Dispatcher:
    """The requests of an engine and their deadlines."""
    return engine._lifecycle.dispatcher


def admission_of(engine: Engine) -> Admission:
    """The queues of an engine."""
    return engine._lifecycle.admission


def state_of(engine: Engine) -> EngineState:
    """What an engine knows of itself."""
    return engine._state


def images_of(engine: Engine) -> ImageStore:
    """The image cache of an engine that has loaded a projector."""
    images = engine._state.images
    assert images is not None, "the engine has no projector, or is not ready"
    return images


def uid_of(generation: Generation) -> int | None:
    """The uid that batches know a generation by. None before it was submitted."""
    return generation._uid


def is_paused(generation: Generation) -> bool:
    """Whether the generation has asked for a pause. The scheduler hears of it a little later."""
    return generation._paused


def n_unread(generation: Generation) -> int:
    """Events that have arrived and were not read."""
    return generation._n_unread
